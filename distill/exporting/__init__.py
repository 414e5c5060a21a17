"""A finished student in the forms that others run: a folder for devices, and what other programs read."""
