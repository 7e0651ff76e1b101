"""The OpenAI-compatible HTTP API, on starlette; imports no MLX."""
