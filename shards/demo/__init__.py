"""The embedded corpus: synthesised speech and sounds."""
