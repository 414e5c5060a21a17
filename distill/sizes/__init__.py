"""What models cost in parameters, bytes and FLOPs, without their weights."""
