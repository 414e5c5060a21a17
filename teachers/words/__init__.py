"""What a LLM is asked and what it answers, in tokens: prompts, rows, ends. Knows no ears."""
