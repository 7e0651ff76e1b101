"""The guest's kernel: fetched from Debian through apt, unpacked without installing, and kept in build/rxe.

The machine's own apt set-up stays untouched: the package lists and the downloads live in a folder of ours.
XD_RXE_SUITE and XD_RXE_MIRROR choose another suite or mirror.
"""

import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build/rxe"
SUITE = "trixie-backports"
MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Before 7.3, `rdma dev set DEVICE netns HOST` is refused for rxe ("Operation not supported" on 7.2.13), and before 7
# its packages never leave the first namespace.
OLDEST = (7, 3)
MODULES = ("9p", "9pnet_virtio", "veth", "bridge", "sch_netem", "sch_tbf", "ib_uverbs", "rdma_rxe")
BUSYBOX = Path("/bin/busybox")


class HarnessError(Exception):
    """What is missing on this machine, or failed to arrive, and what to do."""


def fetch() -> tuple[Path, list[Path]]:
    """The kernel image and its modules in the order of loading; downloads about 121 MB if they are not there."""
    image, order = CACHE / "vmlinuz", CACHE / "modules/order"
    if not order.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="unpack-") as scratch:
            _unpack(Path(scratch))
            fresh = _collect(Path(scratch))
            fresh_image, fresh_modules = fresh / "vmlinuz", fresh / "modules"
            shutil.rmtree(CACHE / "modules", ignore_errors=True)
            fresh_image.replace(image)
            fresh_modules.rename(CACHE / "modules")  # last: `order` says that all is there
    return image, [CACHE / "modules" / f"{name}.ko" for name in order.read_text().split()]


def initrd(init: Path, job: str, modules: list[Path]) -> bytes:
    """The first file system of the guest: busybox, the modules, and `job`, the settings that `init` reads."""
    files = {f"modules/{n:02}-{m.name}": (m.read_bytes(), 0o644) for n, m in enumerate(modules)}
    files |= {
        "init": (init.read_bytes(), 0o755),
        "job": (job.encode(), 0o644),
        "bin/busybox": (_busybox(), 0o755),
    }
    folders = ("bin", "modules", "proc", "sys", "dev", "root")
    entries = [(name, b"", stat.S_IFDIR | 0o755) for name in folders]
    entries += [(name, body, stat.S_IFREG | mode) for name, (body, mode) in files.items()]
    entries.append(("TRAILER!!!", b"", 0))
    return b"".join(_cpio_entry(n, name, body, mode) for n, (name, body, mode) in enumerate(entries, 1))


def _cpio_entry(inode: int, name: str, body: bytes, mode: int) -> bytes:
    """One file in the "newc" format (kernel: Documentation/driver-api/early-userspace/buffer-format.rst)."""
    path = name.encode() + b"\0"
    numbers = (inode, mode, 0, 0, 1, 0, len(body), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % n for n in numbers) + path
    return head + b"\0" * (-len(head) % 4) + body + b"\0" * (-len(body) % 4)


def _busybox() -> bytes:
    if not BUSYBOX.exists():
        raise HarnessError(f"no {BUSYBOX}: apt-get install busybox-static")
    binary = BUSYBOX.read_bytes()
    if b"ld-linux" in binary[:4096]:
        raise HarnessError(
            f"{BUSYBOX} needs shared libraries, wanted one without: apt-get install busybox-static"
        )
    return binary


def _unpack(folder: Path) -> None:
    """Download the kernel's packages and unpack them into folder/tree."""
    suite = os.environ.get("XD_RXE_SUITE", SUITE)
    mirror = os.environ.get("XD_RXE_MIRROR") or _machines_mirror()
    if not KEYRING.exists():
        raise HarnessError(f"no {KEYRING}: apt-get install debian-archive-keyring")
    where = f"{suite} of {mirror} (XD_RXE_SUITE and XD_RXE_MIRROR choose others)"
    apt = _Apt(folder, f"deb [signed-by={KEYRING}] {mirror} {suite} main\n", where)
    print(f"rxe: fetching the kernel from {where}", flush=True)
    apt.run("apt-get", "update")
    image = _newest_image(apt, where)
    depends = re.findall(r"linux-(?:base|binary|modules)-[0-9][^ ,]*", apt.show(image, "Depends"))
    apt.run("apt-get", "download", image, *depends)
    for package in folder.glob("*.deb"):
        _run(["dpkg-deb", "-x", str(package), str(folder / "tree")], f"unpacking {package.name}")


def _newest_image(apt: "_Apt", where: str) -> str:
    """The package that linux-image-amd64 stands for, if its rxe knows namespaces."""
    found = re.search(r"linux-image-(([0-9]+)\.([0-9]+)[^ ,]*)", apt.show("linux-image-amd64", "Depends"))
    if found is None:
        raise HarnessError(f"{where} names no kernel in linux-image-amd64")
    if (int(found[2]), int(found[3])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise HarnessError(
            f"{where} has kernel {found[1]}, wanted {wanted} or newer: its rdma_rxe knows no namespaces"
        )
    return found[0]


class _Apt:
    """apt with its state in a folder of ours; errors name the mirror and suite."""

    def __init__(self, folder: Path, sources: str, where: str) -> None:
        self.folder, self.where = folder, where
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        (folder / "sources.list").write_text(sources)
        settings = {
            "Dir::Etc::SourceList": folder / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State::Lists": folder / "lists",
            "Dir::State::Status": "/dev/null",
            "Dir::Cache": folder / "cache",
            "APT::Sandbox::User": "root",  # _apt may not write where the checkout lies
            "Acquire::Retries": "3",
        }
        self._options = [f"-o{key}={value}" for key, value in settings.items()]

    def run(self, program: str, *args: str) -> str:
        what = f"{program} {' '.join(args)} from {self.where}"
        return _run([program, *self._options, "-q", *args], what, cwd=self.folder)

    def show(self, package: str, field: str) -> str:
        for line in self.run("apt-cache", "show", "--no-all-versions", package).splitlines():
            if line.startswith(f"{field}: "):
                return line.removeprefix(f"{field}: ")
        raise HarnessError(f"{self.where} has no package {package}")


def _machines_mirror() -> str:
    """The mirror that this machine's apt uses for Debian, else the usual one."""
    argv = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian"]
    found = _run(argv, "reading the apt set-up").split()
    return next((uri.rstrip("/") for uri in found if uri.rstrip("/").endswith("/debian")), MIRROR)


def _collect(folder: Path) -> Path:
    """Take the image and the modules that we load, with what these need, out of folder/tree."""
    tree, fresh = folder / "tree", folder / "fresh"
    (fresh / "modules").mkdir(parents=True)
    images = [*tree.rglob("vmlinuz"), *tree.rglob("vmlinuz-*")]
    if len(images) != 1:
        raise HarnessError(f"the kernel's packages hold {len(images)} images, wanted one")
    images[0].replace(fresh / "vmlinuz")
    files = {_module_name(p.name): p for p in tree.rglob("*.ko*")}
    builtin = {_module_name(Path(line).name) for p in tree.rglob("modules.builtin") for line in p.open()}
    order = dict.fromkeys(n for name in MODULES for n in _with_needs(name, files, builtin, fresh))
    (fresh / "modules/order").write_text("\n".join(order) + "\n")
    return fresh


def _module_name(file_name: str) -> str:
    return file_name.strip().split(".ko")[0].replace("-", "_")


def _with_needs(name: str, files: dict[str, Path], builtin: set[str], fresh: Path) -> Iterator[str]:
    """A module after all that it needs; its file, unpacked, lands in fresh/modules."""
    if name in builtin:
        return
    if name not in files:
        raise HarnessError(f"the kernel's packages have no module {name}")
    packed = files[name].read_bytes()
    body = lzma.decompress(packed) if files[name].suffix == ".xz" else packed
    (fresh / f"modules/{name}.ko").write_bytes(body)
    needs = re.search(rb"\0depends=([^\0]*)\0", body)
    for need in needs[1].decode().split(",") if needs else []:
        if need:
            yield from _with_needs(_module_name(need), files, builtin, fresh)
    yield name


def _run(argv: list[str], what: str, cwd: Path | None = None) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, cwd=cwd, timeout=600, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise HarnessError(f"{what} gave {done.returncode}: {said[-400:]}")
    return done.stdout
