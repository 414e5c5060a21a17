"""How answers are scored: a file a metric, and what all of them share."""
