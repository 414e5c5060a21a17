"""Codecs: how a teacher's distribution becomes bytes and comes back, one file each; `table` is the list of them."""
