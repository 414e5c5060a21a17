"""What follows a run: the files, dashboards and lines that tell how it goes, and callbacks of one's own."""
