"""Recipes and launch files: data only."""
