"""Answers counted, and what is said of them: metrics, validation, scorecard, report, transcripts."""
