"""Compiled code: the transport and the quantizer in C (`_transport`, `_quantize`, through cffi) and the exchange as
an MLX primitive in C++."""
