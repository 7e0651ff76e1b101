"""Which part of a step each rank computes: pure arithmetic."""
