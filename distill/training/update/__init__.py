"""The end of a step: its gradient is measured, clipped and applied, and what must be known of the steps before."""
