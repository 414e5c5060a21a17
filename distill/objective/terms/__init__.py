"""The terms of the loss."""
