"""A teacher on a disk: loaded, saved, read from others' files, known by its contents."""
