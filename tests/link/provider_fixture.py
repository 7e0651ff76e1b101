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
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *own, f"-I{NATIVE}"]
    sources = sorted((HERE / "provider").glob("*.c"))
    subprocess.run([compiler, *flags, "-o", library, *sources], check=True, timeout=120)
    return library


def build_check(folder: Path, library: Path) -> Path:
    """Compile the program that asks the provider for what our back end never does."""
    own = ["-DXD_VERBS_OWN_ABI"] if sys.platform == "linux" else []
    program = folder / "check"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", *own, f"-I{NATIVE}"]
    source = HERE / "provider_check" / "check.c"
    compiler = os.environ.get("CC") or "cc"
    subprocess.run([compiler, *flags, "-o", program, source, library], check=True, timeout=120)
    return program


class Fabric:
    """One cable between processes: a file in `folder`."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.library, self._path = library, folder / "fabric"

    def environment(self, ip: str, temper: str = "") -> dict[str, str]:
        """What a process needs to have devices with these addresses (by commas); temper: see provider.c."""
        return {"XDP_FABRIC": str(self._path), "XDP_IP": ip, "XDP_TEMPER": temper}

    def breaches(self) -> list[str]:
        """Rules that a process broke and no provider need notice."""
        return self._lines("breach")

    def hanging(self) -> list[str]:
        """The functions, of all processes, that were called and never return."""
        return self._lines("hang")

    def _lines(self, suffix: str) -> list[str]:
        path = Path(f"{self._path}.{suffix}")
        return path.read_text().splitlines() if path.exists() else []
