"""Files of every package: whole writes (`write`), hashes (`hash`), locks (`lock`), room (`space`). Knows no content."""
