"""Tars: walked, indexed, written, fetched."""
