"""From what the user typed as MODEL to a folder on this machine."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from expertd.errors import CheckpointError

DEMO = "demo"
FORMS = "Give a local folder, 'demo', a hub id such as org/name, or a URL of a checkpoint's folder."
# Only the top folder: some repositories hold the weights again, for other engines, in folders below it.
WANTED_FILES = ("*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
UNWANTED_FILES = ("*/*",)
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w][\w./-]*))?", re.ASCII)


def find_checkpoint(
    name: str,
    cache: Path | None = None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Path:
    """The folder of checkpoint `name`: a local folder, the word `demo`, a hub id `org/name[@revision]`, or a URL.

    A local folder comes first, except that `demo` always means the embedded model (`./demo` is a folder).
    A hub id is downloaded into the cache of huggingface_hub, with its progress bars; what is behind an
    https:// URL into the folder `cache`, with `report(what, bytes done, of)`.
    Raises CheckpointError when there is no such folder or the download fails.
    """
    if name == DEMO:
        return demo_folder()
    if name.startswith("file:"):
        return find_checkpoint(path_of(name))
    if is_url(name):
        if cache is None:
            raise CheckpointError(f"{name}: wanted a folder or a hub id here. Download it first.")
        from expertd.checkpoint.source import download_url

        return download_url(name, cache, report)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder.resolve()
    if name and folder.exists():
        raise CheckpointError(
            f"{name}: found a file, wanted the folder of a checkpoint. Give its folder instead."
        )
    return download(*split_hub_id(name))


def is_url(name: str) -> bool:
    return "://" in name


def is_here(name: str) -> bool:
    """Whether `name` means something on this machine: `demo`, a path that exists, or a file: URL."""
    return name == DEMO or name.startswith("file:") or bool(name and Path(name).expanduser().exists())


def path_of(url: str) -> str:
    """The absolute path in a file: URL. Raises CheckpointError."""
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not path.startswith("/"):
        raise CheckpointError(f"{url[:200]}: not a folder on this machine. Give file:///absolute/path.")
    return path


def split_hub_id(name: str) -> tuple[str, str | None]:
    """`org/name` and the revision after an @, if any. Raises CheckpointError for what is no hub id."""
    if not (match := HUB_ID.fullmatch(name)):
        raise CheckpointError(f"{name!r}: no such folder, and not a hub id. {FORMS}")
    return match[1], match[2]


def demo_folder() -> Path:
    """The folder of the embedded demo model. Raises CheckpointError if this installation lacks it."""
    spec = importlib.util.find_spec("expertd.demo")
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / "config.json").is_file():
        raise CheckpointError(
            "demo: this installation has no demo model. Install expertd again from a wheel."
        )
    return Path(spec.origin).resolve().parent


def download(hub_id: str, revision: str | None = None) -> Path:
    """The local snapshot of a hub repository, downloaded if need be. Raises CheckpointError."""
    # Imported here: it takes half a second, which local folders need not pay.
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=list(WANTED_FILES),
            ignore_patterns=list(UNWANTED_FILES),
        )
    except Exception as error:  # whatever the hub or the network does, the user sees one line
        raise CheckpointError(f"{hub_id}: {_reason(error)}") from error
    folder = Path(found)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{hub_id}: the repository has no config.json, so it is no checkpoint. Check the id."
        )
    return folder


def cached_snapshot(hub_id: str, revision: str | None) -> Path | None:
    """What the hub's cache holds of a repository, perhaps not all of it; None when that is nothing."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except Exception:  # whatever is wrong with the cache, the hub has it too
        return None


def hub_files(hub_id: str, revision: str | None) -> tuple[str, list[str], dict[str, str]]:
    """Where a repository's files are now: the URL of their folder, at one commit, with a slash at its end; the
    names in its top folder; and the headers that the hub wants. Raises CheckpointError."""
    from huggingface_hub import HfApi, constants, get_token, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    try:
        api = HfApi()
        commit = api.model_info(hub_id, revision=revision, timeout=30).sha or ""
        names = [e.path for e in api.list_repo_tree(hub_id, revision=commit) if isinstance(e, RepoFile)]
        url = hf_hub_url(hub_id, "config.json", revision=commit).removesuffix("config.json")
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    except Exception as error:  # as for a download
        raise CheckpointError(f"{hub_id}: {_reason(error)}") from error
    return url, names, {"Authorization": f"Bearer {token}"} if token else {}


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
