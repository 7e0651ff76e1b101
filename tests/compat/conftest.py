import sys
from pathlib import Path

# The stubs are imported by name, and by the ranks that are started with our sys.path.
sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
