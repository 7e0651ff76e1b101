"""Compiled code: the transport in C (`_transport`, through cffi) and the exchange as an MLX primitive in C++."""
