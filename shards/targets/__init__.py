"""What a teacher said, as bytes on a disk: codecs, records, header, store."""
