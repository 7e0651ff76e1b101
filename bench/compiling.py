"""The loops of a benchmark that are in C: compiled when it starts, with the system's compiler."""

import os
import shutil
import subprocess
from pathlib import Path

from expertd.errors import ClusterError, ConfigError

COMPILE_TIMEOUT_S = 60.0


def compile_library(source: Path, folder: Path, optimise: str = "-O2") -> Path:
    """Compile `source` into `folder` and return the library, as optimised (-O2) as expertd's own is.

    Raises ConfigError without a compiler, ClusterError with its words when it fails.
    """
    compiler = os.environ.get("CC", "cc")
    if not shutil.which(compiler):
        raise ConfigError(
            f"no C compiler {compiler!r} for the loops of this benchmark. Install one, or set CC."
        )
    library = folder / f"{source.stem}.so"
    flags = ["-std=c11", optimise, "-shared", "-fPIC", "-pthread"]
    command = [compiler, *flags, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    if done.returncode:
        raise ClusterError(f"{compiler} could not compile {source.name}: {done.stderr.strip()[:300]}")
    return library
