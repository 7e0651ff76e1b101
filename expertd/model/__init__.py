"""mlx-lm models with the exchange inside; the only package that imports MLX with the engine."""
