"""The two things pyproject.toml cannot say: how to compile what is in C, and the operations of the MLX graph.

These are built against the installed mlx wheel, whose headers and library they use, and are tied to
that exact release; there is no fallback. A missing compiler or mlx wheel therefore fails the installation here.
"""

import os
import sys
import warnings
from pathlib import Path

import mlx
import nanobind
from setuptools import Extension, setup

MLX = Path(next(iter(mlx.__path__)))
NANOBIND = Path(nanobind.__file__).parent
ORIGIN = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"

# An editable install warns of a folder here that has the package's name: it is the package.
warnings.filterwarnings("ignore", "Editable installation")

graph = Extension(
    "expertd.native._graph",
    sources=[
        f"native/{name}.cpp"
        for name in (
            "graph",
            "exchange",
            "kernel_ops",
            "attention_ops",
            "cache_ops",
            "replay",
            "segment",
            "settled",
            "twins",
            "nanobind_all",
        )
    ],
    depends=[
        "native/graph.h",
        "native/kernel_ops.h",
        "native/segment.h",
        "native/arena.h",
        "native/settled.h",
        "native/steps.h",
        "native/twins.h",
        "native/kernels/kernels.h",
        "native/kernels/ops.h",
    ],
    language="c++",
    include_dirs=[
        str(MLX / "include"),
        nanobind.include_dir(),
        str(NANOBIND / "src"),
        str(NANOBIND / "ext/robin_map/include"),
    ],
    libraries=["mlx"],
    library_dirs=[str(MLX / "lib")],
    # In a wheel the module lies in site-packages/expertd/native, in an editable install anywhere; there
    # the library is found because mlx.core, which loads it, is imported first.
    extra_link_args=[f"-Wl,-rpath,{ORIGIN}/../../mlx/lib"],
    define_macros=[("NB_DOMAIN", "mlx"), ("NDEBUG", None)],
    extra_compile_args=["-std=c++20", "-O3", "-fvisibility=hidden", "-fno-strict-aliasing"],
)

setup(
    cffi_modules=[f"native/{name}.py:ffibuilder" for name in ("build", "build_quantize", "build_kernels")],
    ext_modules=[graph],
    # The four of them at once: two minutes of compiling on one core.
    options={"build_ext": {"parallel": os.cpu_count()}},
)
