"""expertd: one large mixture-of-experts model on two machines that sit on a desk."""

import os
from pkgutil import extend_path

# Else transformers, which mlx-lm imports, tells every user of every process that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# A checkout keeps native/, quant/, topology/ and bench/ beside this folder, a wheel keeps them inside
# it. Without this line `python -m pytest` in a checkout could not see what an installed wheel holds.
__path__ = extend_path(__path__, __name__)
__version__ = "0.1.0"
