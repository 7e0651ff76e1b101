"""expertd: one large mixture-of-experts model on two machines that sit on a desk."""

from pkgutil import extend_path

# A checkout keeps native/, quant/, topology/ and bench/ beside this folder, a wheel keeps them inside
# it. Without this line `python -m pytest` in a checkout could not see what an installed wheel holds.
__path__ = extend_path(__path__, __name__)
__version__ = "0.1.0"
