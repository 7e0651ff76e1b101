"""Finding, checking and normalising checkpoints; imports no MLX."""
