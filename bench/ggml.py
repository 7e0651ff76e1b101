"""llama.cpp's quantization formats by its own code: two of its C files, compiled from the source on PyPI.

    Ggml(Path("build/llama-cpp")).round("q2_K", weight, importance)

`fetch` has pip download the source distribution of llama-cpp-python (77 MB), which carries llama.cpp, unless it is in
the folder already. Of it only ggml.c and ggml-quants.c are compiled; what these call elsewhere is never reached by
rounding and ends the process here.
"""

import ctypes
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from expertd.errors import ConfigError

Array = np.ndarray[Any, np.dtype[Any]]

# ggml_type, bytes of a block of 256 weights: ggml.h and ggml-common.h of llama.cpp.
TYPES = {"q2_K": (10, 84), "iq2_xxs": (16, 66), "iq2_xs": (17, 74), "iq2_s": (22, 82)}
BLOCK = 256
BITS = {name: 8 * num_bytes / BLOCK for name, (_, num_bytes) in TYPES.items()}

SDIST = "llama_cpp_python-*.tar.gz"
SOURCES = ("ggml.c", "ggml-quants.c")
DOWNLOAD_TIMEOUT_S = 600.0
COMPILE_TIMEOUT_S = 300.0
STUBS = """
#include <stdlib.h>
void ggml_critical_section_start(void) {}
void ggml_critical_section_end(void) {}
void ggml_backend_buffer_get_usage(void) { abort(); }
void ggml_backend_tensor_memset(void) { abort(); }
void ggml_backend_tensor_set(void) { abort(); }
"""


class Ggml:
    """The library, compiled into `folder` if it is not there yet; raises ConfigError when that cannot be done."""

    def __init__(self, folder: Path) -> None:
        library = folder / "libggml-quants.so"
        if not library.exists():
            compile_library(fetch(folder), library)
        self._library = ctypes.CDLL(str(library))
        self._library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def round(self, kind: str, weight: Array, importance: Array) -> Array:
        """What float32 [rows, columns] is after a trip through format `kind` (TYPES), columns a multiple of 256.

        `importance` [columns] is float32: sum(x^2) of what each column is multiplied by.
        """
        number, block_bytes = TYPES[kind]
        rows, columns = weight.shape
        assert columns % BLOCK == 0, columns
        weight = np.ascontiguousarray(weight, dtype=np.float32)
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        packed = np.empty(weight.size // BLOCK * block_bytes, dtype=np.uint8)
        num_bytes = self._library.ggml_quantize_chunk(
            ctypes.c_int(number),
            _pointer(weight),
            _pointer(packed),
            ctypes.c_int64(0),
            ctypes.c_int64(rows),
            ctypes.c_int64(columns),
            _pointer(importance),
        )
        assert num_bytes == packed.size, (kind, num_bytes, packed.size)
        decoded = np.empty_like(weight)
        decode = getattr(self._library, f"dequantize_row_{kind}")
        decode(_pointer(packed), _pointer(decoded), ctypes.c_int64(weight.size))
        return decoded


def _pointer(values: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.ctypes.data)


def fetch(folder: Path) -> Path:
    """The folder with llama.cpp's `ggml` under `folder`, downloaded from PyPI if it is not there."""
    if (source := folder / "ggml").is_dir():
        return source
    folder.mkdir(parents=True, exist_ok=True)
    if not (archives := sorted(folder.glob(SDIST))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
        _run([*command, "--dest", str(folder), "llama-cpp-python"], DOWNLOAD_TIMEOUT_S)
        archives = sorted(folder.glob(SDIST))
    with tarfile.open(archives[-1]) as archive:
        for member in archive:
            path = Path(*Path(member.name).parts[3:])  # llama_cpp_python-x.y.z/vendor/llama.cpp/ggml/...
            if member.isfile() and path.parts[:1] == ("ggml",) and path.suffix in (".c", ".h"):
                member.name = str(path)
                archive.extract(member, folder, filter="data")
    return source


def compile_library(source: Path, library: Path) -> None:
    """ggml.c and ggml-quants.c of `source` as a shared library. Raises ConfigError with the compiler's words."""
    (library.parent / "ggml-version.h").touch()  # made by its build system, and wanted for nothing here
    stubs = library.parent / "stubs.c"
    stubs.write_text(STUBS)
    made = library.with_suffix(".partial")
    include = [f"-I{folder}" for folder in (source / "include", source / "src", library.parent)]
    defines = ['-DGGML_VERSION="0"', '-DGGML_COMMIT="0"']
    files = [*(str(source / "src" / name) for name in SOURCES), str(stubs)]
    _run(
        [
            "cc",
            "-shared",
            "-fPIC",
            "-O2",
            "-w",
            *defines,
            *include,
            *files,
            "-o",
            str(made),
            "-lm",
            "-lpthread",
        ],
        COMPILE_TIMEOUT_S,
    )
    made.replace(library)


def _run(command: list[str], timeout_s: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"--llama-cpp: {command[0]} failed ({error}). Leave --llama-cpp out.") from error
    if done.returncode:
        reason = " ".join(done.stderr.split())[-300:]
        raise ConfigError(
            f"--llama-cpp: {' '.join(command[:4])} ... failed: {reason}. Leave --llama-cpp out."
        )
