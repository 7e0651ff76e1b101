"""The throughput suite and the experiments behind it."""
