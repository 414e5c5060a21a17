"""What only a teacher made from nothing needs."""
