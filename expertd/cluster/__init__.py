"""The supervisor and the rank processes it spawns, watches and reaps; the supervisor imports no MLX."""
