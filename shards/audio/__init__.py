"""Bytes of a recording to a checked waveform, and what augmentation makes of it."""
