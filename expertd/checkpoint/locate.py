"""From what the user typed as MODEL to a folder on this machine."""

import importlib.util
import re
from pathlib import Path

from expertd.errors import CheckpointError

DEMO = "demo"
FORMS = "Give a local folder, 'demo', or a hub id such as org/name."
# Only the top folder: some repositories hold the weights again, for other engines, in folders below it.
WANTED_FILES = ("*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
UNWANTED_FILES = ("*/*",)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def find_checkpoint(name: str) -> Path:
    """The folder of checkpoint `name`: a local folder, the word `demo`, or a hub id `org/name`.

    A local folder comes first, except that `demo` always means the embedded model (`./demo` is a folder).
    A hub id is downloaded into the cache of huggingface_hub, with its progress bars.
    Raises CheckpointError when there is no such folder or the download fails.
    """
    if name == DEMO:
        return demo_folder()
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder.resolve()
    if name and folder.exists():
        raise CheckpointError(
            f"{name}: found a file, wanted the folder of a checkpoint. Give its folder instead."
        )
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name!r}: no such folder, and not a hub id. {FORMS}")
    return download(name)


def demo_folder() -> Path:
    """The folder of the embedded demo model. Raises CheckpointError if this installation lacks it."""
    spec = importlib.util.find_spec("expertd.demo")
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / "config.json").is_file():
        raise CheckpointError(
            "demo: this installation has no demo model. Install expertd again from a wheel."
        )
    return Path(spec.origin).resolve().parent


def download(hub_id: str) -> Path:
    """The local snapshot of a hub repository, downloaded if need be. Raises CheckpointError."""
    # Imported here: it takes half a second, which local folders need not pay.
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            hub_id, allow_patterns=list(WANTED_FILES), ignore_patterns=list(UNWANTED_FILES)
        )
    except Exception as error:  # whatever the hub or the network does, the user sees one line
        raise CheckpointError(f"{hub_id}: {_reason(error)}") from error
    folder = Path(found)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{hub_id}: the repository has no config.json, so it is no checkpoint. Check the id."
        )
    return folder


def _reason(error: Exception) -> str:
    """One line on why a download failed and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated. Ask for access on its page, then log in with `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such folder or public hub repository. Check the id; if it is private: `hf auth login`."
    if isinstance(error, errors.HFValidationError):
        return f"no such folder, and not a valid hub id. {FORMS}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "not in the cache, and the hub does not answer. Check the network (and HF_ENDPOINT), try again."
        )
    first_line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub refused the download ({first_line}). Try again later."
    return f"the download failed ({type(error).__name__}: {first_line}). Check network and disk, try again."
