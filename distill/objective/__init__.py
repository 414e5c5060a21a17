"""What a student is trained on: the terms, their weights, and how two tokenizers meet. Knows no loop."""
