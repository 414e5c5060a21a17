"""What there is to call, what words may mean, and what a command reads before its stage. Imports no torch."""
