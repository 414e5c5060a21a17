"""Files of every package: atomic writes (`write`), hashes of files (`hash`), locks (`lock`). Knows no content."""
