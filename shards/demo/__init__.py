"""The embedded corpus: synthesized speech and sounds."""
