"""`python -m distill` is the console command."""

import sys

from distill.cli import main

sys.exit(main())
