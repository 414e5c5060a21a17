"""Proof that a run is right before it costs hours."""
