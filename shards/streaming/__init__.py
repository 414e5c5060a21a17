"""The exact, resumable order of samples, and their reading."""
