"""The engine: a queue of requests, one step loop, events back. `messages` imports no MLX."""
