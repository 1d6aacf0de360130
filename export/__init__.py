"""A merged student -> quantized GGUF and MLX, checked against the original."""
