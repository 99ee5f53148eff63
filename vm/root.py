"""The guest's root file system: a minimal Debian 12 on which ./dev has been set up, in one file.

An image rather than this machine's own root: emulated, 9p takes several times as long to import a
Python module, and what is measured should not depend on what is installed here.
"""

from __future__ import annotations

import hashlib
import os
import py_compile
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache as once
from pathlib import Path

from vm import cache
from vm.errors import VmError

TREE = Path(__file__).resolve().parent.parent
SUITE = "bookworm"
_PYTHON = (3, 11)
"""That suite's."""
GUEST_TREE = "/steer"
_GUEST = TREE / "vm" / "guest"
_MADE_FROM = (TREE / "dev", _GUEST / "systemd-udevd", Path(__file__))
_LEFT_OUT = {".git", ".venv", "__pycache__"}
_COMPILED = {"bench", "steer", "testkit", "vm"}
_KEPT = 3
_MAKE = "make the guest's root file system"
_CONTAINED = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child")
"""So that nothing that is mounted or started outlives it."""
_HOSTS = ("/etc/pip.conf", "~/.config/pip/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
"""How this machine reaches PyPI, wherever it does so in a way of its own."""


def image() -> Path:
    """The image, made if there is none for the packages that ./dev and pyproject.toml name.

    Raises:
        VmError: it cannot be made.
    """
    name = f"root-{_digest()}.squashfs"
    with cache.alone():
        kept = cache.directory("roots") / name
        if kept.exists():
            os.utime(kept)
            return kept
        if os.geteuid():
            raise VmError(_MAKE, "it takes root", "run ./dev vm as root")
        _require("mmdebstrap", "tar2sqfs", "unshare")
        cache.say("making the guest's root: Debian 12, and what ./dev sets up (minutes)")
        with cache.making() as scratch:
            _make(scratch, scratch / name)
            (scratch / name).chmod(0o600)  # pip's configuration may have a password in it
            cache.keep(scratch / name, "roots")
        _leave_only_newest(cache.directory("roots"))
        return kept


def _leave_only_newest(roots: Path) -> None:
    """Other checkouts have theirs; what a VM still reads stays until it ends."""
    by_use = sorted(roots.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in by_use[:-_KEPT]:
        old.unlink()


def tree(archive: Path) -> None:
    """This tree as it is now, as a tar file for the guest."""
    files = sorted(_files(TREE))
    with tarfile.open(archive, "w") as tar:
        for path in files:
            tar.add(path, path.relative_to(TREE), recursive=False)
        if _is_guests_python():
            _add_compiled(tar, files)


def _add_compiled(tar: tarfile.TarFile, files: Sequence[Path]) -> None:
    """As Python would leave it in the tree: to compile takes long in the guest."""
    with tempfile.TemporaryDirectory() as scratch:
        compiled = Path(scratch, "pyc")
        for path in files:
            name = path.relative_to(TREE)
            if path.suffix != ".py" or name.parts[0] not in _COMPILED:
                continue
            if py_compile.compile(str(path), str(compiled), quiet=2):
                kept = f"{path.stem}.{sys.implementation.cache_tag}.pyc"
                tar.add(compiled, name.parent / "__pycache__" / kept)


@once
def _is_guests_python() -> bool:
    """No other reads what ours compiles."""
    ours = sys.version_info[:2]
    if ours != _PYTHON:
        named = "Python {}.{} here, {}.{} in the guest".format(*ours, *_PYTHON)
        cache.say(f"{named}, which has to compile this tree: slow where it is emulated")
    return ours == _PYTHON


def _files(top: Path) -> Iterator[Path]:
    found = [top / name for name in _known_to_git(top) or _all_names(top)]
    yield from (path for path in found if path.is_symlink() or path.is_file())


def _known_to_git(top: Path) -> Sequence[str]:
    """Or would be added to it; none where there is no git, or this is no checkout."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listed, cwd=top, capture_output=True, text=True, check=False)
    except OSError:
        return ()
    return [name for name in done.stdout.split("\0") if name] if done.returncode == 0 else ()


def _all_names(top: Path) -> Iterator[Path]:
    for directory, below, names in os.walk(top):
        below[:] = [name for name in below if name not in _LEFT_OUT and "_cache" not in name]
        yield from (Path(directory, name) for name in names)


def _digest() -> str:
    project = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
    asked = repr((project["dependencies"], project["optional-dependencies"]))
    made_from = hashlib.sha256(asked.encode())
    for path in _MADE_FROM:
        made_from.update(path.read_bytes())
    return made_from.hexdigest()[:12]


def _require(*tools: str) -> None:
    for tool in tools:
        if not shutil.which(tool):
            cure = "install it: Debian has it in mmdebstrap and squashfs-tools-ng"
            raise VmError(_MAKE, f"no command {tool}", cure)


def _make(scratch: Path, made: Path) -> None:
    """mmdebstrap(1) runs its hooks outside of the new root, which is $1."""
    tree(scratch / "tree.tar")
    log = scratch / "log"
    debian = ["mmdebstrap", "--variant=minbase", "--include=ca-certificates,python3,kmod"]
    command = [*_CONTAINED, "--mount-proc", *debian, *_hooks(scratch), SUITE, "-"]
    packed = ["tar2sqfs", "--quiet", "--compressor", "lz4", "--no-skip", "--force", str(made)]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with (
        log.open("wb") as heard,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=heard, env=environment, process_group=0
        ) as source,
    ):
        try:
            sink = subprocess.run(packed, stdin=source.stdout, stderr=heard, check=False)
        except BaseException:
            os.killpg(source.pid, signal.SIGKILL)
            raise
    statuses = {"mmdebstrap": source.returncode, "tar2sqfs": sink.returncode}
    if failed := [tool for tool, status in statuses.items() if status]:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise VmError(_MAKE, f"{' and '.join(failed)} failed", detail=last)


def _hooks(scratch: Path) -> Sequence[str]:
    """Set up what the tree asks for at the place it will have, and leave only that."""
    hosts = [path for path in (Path(each).expanduser() for each in _HOSTS) if path.is_file()]
    copied = [f'install -D "{path}" "$1{_in_guest(path)}"' for path in hosts]
    steps = [
        *copied,
        f'mkdir "$1{GUEST_TREE}" "$1/host"',
        f'tar -C "$1{GUEST_TREE}" --no-same-owner -xf "{scratch}/tree.tar"',
        f'chroot "$1" {GUEST_TREE}/dev setup bench',
        f'cd "$1{GUEST_TREE}" && find . -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -r {{}} +',
        f'install -D "{_GUEST}/systemd-udevd" "$1/usr/lib/systemd/systemd-udevd"',
        'ln -s true "$1/usr/bin/udevadm"',
        'rm -rf "$1/var/cache/apt/archives" "$1/var/lib/apt/lists"',
    ]
    return [f"--customize-hook={step}" for step in steps]


def _in_guest(path: Path) -> Path:
    return Path("/root") / path.relative_to(Path.home()) if Path.home() in path.parents else path
