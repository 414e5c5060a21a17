"""The encoders that hear, and the features they hear."""
