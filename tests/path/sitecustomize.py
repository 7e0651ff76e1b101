"""What every Python that the tests start does first: it sees to it that `import transformers` takes less.

That package reads the text of its 1,700 model files, twice, to learn what is in them; every rank does so, and the tests
start hundreds. Here the first process leaves what it learned in build/, and the others take it from there: the same
names, and a rank imports for 1.3 s of processor time instead of 2.1. Where the package has changed it is read again.
"""

import contextlib
import marshal
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

NAME, FUNCTION = "transformers.utils.import_utils", "create_import_structure_from_path"
BUILD = Path(__file__).parents[2] / "build"


class Finder:
    """Finds the module in which the reading is done, and changes it as soon as it was run."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None, _: object = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == NAME else None
        if spec and spec.loader:
            run = spec.loader.exec_module

            def run_and_change(module: ModuleType) -> None:
                run(module)
                if read := getattr(module, FUNCTION, None):
                    setattr(module, FUNCTION, remembering(read))

            spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec


def remembering(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function, which calls itself for each folder; what it gives for all of them is kept."""

    def structure_of(path: Any) -> Any:
        folder = Path(path)
        folder = folder.parent if folder.is_file() else folder
        if folder.name != "models":
            return read(path)
        changed = folder.stat()
        kept = BUILD / f"transformers-{changed.st_ino}-{changed.st_mtime_ns}.marshal"
        with contextlib.suppress(OSError, ValueError, EOFError, TypeError):
            return marshal.loads(kept.read_bytes())  # dicts and sets of strings; JSON knows no sets
        found, own = read(path), kept.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):  # a checkout that cannot be written
            BUILD.mkdir(exist_ok=True)
            own.write_bytes(marshal.dumps(found))
            own.replace(kept)
        return found

    return structure_of


sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]
