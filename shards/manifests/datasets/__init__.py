"""Data sets as they are published, read into entries of a manifest: one file each; `table` is the list of them."""
