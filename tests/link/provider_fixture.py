"""The provider with Apple's temper, built for a test: a path for `library`, and environments for processes.

library = build_provider(folder)           # once per session
Fabric(folder, library).environment("10.0.0.1", temper="loss:7")
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "native"


def build_provider(folder: Path) -> Path:
    """Compile the provider into `folder`, or skip the test where that cannot be done."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the verbs provider cannot be built")
    # Linux's header has macros in the place of two functions that the provider exports; ours is the same interface.
    own = ["-DXD_VERBS_OWN_ABI"] if sys.platform == "linux" else []
    library = folder / "libprovider.so"
    subprocess.run(
        [compiler, "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *own]
        + [f"-I{NATIVE}", "-o", str(library), *map(str, sorted((HERE / "provider").glob("*.c")))],
        check=True,
        timeout=120,
    )
    return library


class Fabric:
    """One cable between processes: a file in `folder`."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.library, self._path = library, folder / "fabric"

    def environment(self, ip: str, temper: str = "") -> dict[str, str]:
        """What a process needs to have devices with these addresses (by commas); temper: see provider.c."""
        return {"XDP_FABRIC": str(self._path), "XDP_IP": ip, "XDP_TEMPER": temper}

    def breaches(self) -> list[str]:
        """Rules that a process broke and no provider need notice."""
        path = Path(f"{self._path}.breach")
        return path.read_text().splitlines() if path.exists() else []
