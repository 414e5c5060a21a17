"""Making a small student: 4-bit, LoRA, saving and exporting it."""
