"""What travels with a model: its prompt, join, gate and feedback."""
