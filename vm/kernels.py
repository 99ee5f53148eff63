"""Kernels to boot: a bzImage by its path, or Debian's newest of a series, fetched once and kept."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vm import cache
from vm.errors import VmError

SERIES = ("5.10", "6.1", "6.12")
"""Of the matrix: before migration, Debian 12's, and Debian 13's."""
_SUITES = ("bullseye", "bookworm", "trixie")
_MAGIC, _MAGIC_AT = b"HdrS", 0x202
"""Documentation/arch/x86/boot.rst."""
_LAST_LINES = 10
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_SERIES = re.compile(r"[0-9]+\.[0-9]+")
_PACKAGE = r"^linux-image-{series}\.[0-9.]+(\+deb[0-9]+(\.[0-9]+)?)?(-[0-9]+)?-amd64$"
"""Not -cloud, whose modules cannot mount what virtme-ng exports, nor -rt, -dbg, -unsigned."""


@dataclass(frozen=True)
class Kernel:
    """Args: release: as uname(1) has it, "6.1.0-56-amd64"; of a path, its name."""

    release: str
    image: Path


def find(wanted: str) -> Kernel:
    """The kernel that is meant, fetched if need be.

    Args:
        wanted: a series, "6.1", or the path of a bzImage.

    Raises:
        VmError: no such file, no such kernel at Debian, or it cannot be had.
    """
    if not _SERIES.fullmatch(wanted):
        return _file(Path(wanted))
    with cache.alone():
        return _kept(wanted) or _fetch(wanted)


def _file(image: Path) -> Kernel:
    cure = "give a series (6.1), or the path of a bzImage"
    try:
        with image.open("rb") as stream:
            head = stream.read(_MAGIC_AT + len(_MAGIC))
    except OSError as error:
        raise VmError(f"kernel {image}", error.strerror or str(error), cure) from None
    if not head.endswith(_MAGIC):
        raise VmError(f"kernel {image}", "it is no bzImage", f"vmlinux is none either; {cure}")
    return Kernel(image.name, image.resolve())


def _kept(series: str) -> Kernel | None:
    found = [_kernel(each) for each in cache.directory("kernels").glob(f"{series}.*")]
    return max(found, key=lambda each: _numbers(each.release), default=None)


def _kernel(unpacked: Path) -> Kernel:
    return Kernel(unpacked.name, unpacked / "boot" / f"vmlinuz-{unpacked.name}")


def _fetch(series: str) -> Kernel:
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise VmError(f"kernel {series}", f"no {tool} to fetch it", "give a bzImage's path")
    with cache.making() as scratch:
        apt = _Apt(scratch)
        package = _newest(apt, series)
        cache.say(f"fetching {package}")
        _run([*apt("apt-get"), "download", package], f"fetch {package}", cwd=scratch)
        [archive] = scratch.glob("*.deb")
        unpacked = scratch / package.removeprefix("linux-image-")
        _run(["dpkg-deb", "-x", str(archive), str(unpacked)], f"unpack {package}")
        return _kernel(cache.keep(unpacked, "kernels"))


class _Apt:
    """apt on lists of its own: of Debian's suites, whatever this machine's are."""

    def __init__(self, scratch: Path) -> None:
        self._options = scratch / "apt.conf"
        sources = scratch / "sources.list"
        for each in ("lists/partial", "cache/archives/partial"):
            (scratch / each).mkdir(parents=True)
        (scratch / "status").touch()
        sources.write_text("\n".join(_sources(_SUITES)) + "\n")
        settings = {
            "Dir::State": scratch,
            "Dir::State::status": scratch / "status",
            "Dir::Cache": scratch / "cache",
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "-",
            # The scratch directory is ours alone, which apt would warn of.
            "APT::Sandbox::User": "root",
        }
        lines = [f'{name} "{value}";' for name, value in settings.items()]
        self._options.write_text("\n".join(lines) + "\n")
        # A suite that has moved away does not keep us from the others.
        update = [*self("apt-get"), "update"]
        done = subprocess.run(update, capture_output=True, text=True, check=False)
        self.last_words = "\n".join(done.stderr.strip().splitlines()[-_LAST_LINES:])

    def __call__(self, tool: str) -> Sequence[str]:
        return [tool, "-q", "-c", str(self._options)]


def _sources(suites: Iterable[str]) -> Iterable[str]:
    mirror = "http://deb.debian.org/debian"
    for suite in suites:
        yield f"deb [signed-by={_KEYRING}] {mirror} {suite} main"
        yield f"deb [signed-by={_KEYRING}] {mirror}-security {suite}-security main"


def _newest(apt: _Apt, series: str) -> str:
    pattern = _PACKAGE.format(series=re.escape(series))
    named = _run([*apt("apt-cache"), "pkgnames", f"linux-image-{series}."], "ask apt")
    names = [name for name in named.split() if re.match(pattern, name)]
    if not names:
        cause = f"Debian's {', '.join(_SUITES)} have none, or are out of reach"
        raise VmError(f"kernel {series}", cause, detail=apt.last_words)
    listed = _run([*apt("apt-cache"), "madison", *names], "ask apt")
    rows = [[field.strip() for field in line.split("|")] for line in listed.splitlines()]
    return max((row for row in rows if len(row) > 1), key=lambda row: _numbers(row[1]))[0]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"[0-9]+", version))


def _run(command: Sequence[str], act: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VmError(act, done.stderr.strip() or f"{command[0]} failed")
    return done.stdout
