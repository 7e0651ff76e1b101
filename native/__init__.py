"""Compiled code: the transport, the quantizer and the CPU kernels in C (`_transport`, `_quantize`, `_kernels`, through
cffi); the exchange and the kernels as operations of the MLX graph in C++ (`_graph`)."""
