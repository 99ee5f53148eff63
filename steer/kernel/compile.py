"""From C to a policy object: prebuilt, else cached, else compiled by bcc in a child.

Importing bcc costs 70 MB and compiling half a second, so neither ever happens in
this process.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from steer import declared
from steer.bytecode import PolicyObject, unlink
from steer.errors import CompileError

_HERE = Path(__file__).resolve().parent
_CHILD = _HERE / "bcc_child.py"
_NO_BCC = 3
_TIMEOUT_S = 120
SYSTEM_PYTHON = "/usr/bin/python3"
_FOR_OWN = ["-g", "-mllvm=-sink-common-insts=false"]
"""Line numbers; and no reading of what two branches read after they meet, from an address
that each has chosen: the verifier takes no context at such an address."""
_BCC_CALLS_IT = "/virtual/main.c"
"""The file it compiles, in its messages."""


def sources() -> Path:
    """The directory of steer.h and the built-in policies: in the package, or beside it."""
    packaged = _HERE.parent / "bpf"
    return packaged if packaged.is_dir() else _HERE.parents[1] / "bpf"


def prebuilt(name: str) -> Path:
    """Where the shipped object of the built-in policy `name` is."""
    return sources() / "prebuilt" / f"{name}.json"


def digest(source: Path) -> str:
    """What names an object: a hash of the policy, what it includes, steer.h and our headers.

    Raises:
        CompileError: `source` cannot be read.
    """
    # Nothing of declared.py: it gives each name the number of its place in the source.
    headers = sources()
    own = [_CHILD, headers / "steer.h", *sorted((headers / "include").rglob("*.h"))]
    total = hashlib.sha256(sys.byteorder.encode())
    for data in map(_read_file, (source, *included(source), *own)):
        total.update(data)
        total.update(b"\0")
    return total.hexdigest()


def included(source: Path) -> Iterator[Path]:
    """What it includes by name from where it is itself, and what that does."""
    seen, left = {source}, [source]
    while left:
        here = left.pop()
        for name in _INCLUDE.findall(_read_file(here)):
            beside = (at / os.fsdecode(name) for at in (here.parent, source.parent))
            file = next(filter(Path.is_file, beside), None)
            if file and file not in seen:
                seen.add(file)
                left.append(file)
                yield file


_INCLUDE = re.compile(rb'^\s*#\s*include\s*"([^"\n]+)"', re.MULTILINE)


def _read_file(file: Path) -> bytes:
    """A regular file, and no endless one. Raises CompileError."""
    act = f"read {file}"
    try:
        # Not to wait for somebody to write into a pipe.
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise CompileError(act, "it is no regular file")
            data = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise CompileError(act, error.strerror or str(error)) from None
    if len(data) > _MOST_BYTES:
        raise CompileError(act, f"it has more than {_MOST_BYTES} bytes")
    return data


_MOST_BYTES = 1 << 20


def load(source: Path) -> PolicyObject:
    """The object of a policy's source file, compiling only where nothing is at hand.

    Raises:
        CompileError: it does not compile, or there is no compiler.
    """
    wanted = digest(source)
    cached = _cache_dir() / f"{wanted}.json"
    shipped = [prebuilt(source.stem)] if source.parent == sources() else []
    for file in [*shipped, cached]:
        found = _read(file, trusted=file is not cached)
        if found is not None and found.digest == wanted:
            return found
    fresh = compile_source(source)
    _store(cached, fresh)
    return fresh


def compile_source(source: Path) -> PolicyObject:
    """Compile, whatever is cached.

    Raises:
        CompileError: with the compiler's messages in `detail`.
    """
    import subprocess

    act = f"compile {source.name}"
    flags = _flags(source)
    for python in interpreters():
        try:
            done = subprocess.run(
                [python, "-I", str(_CHILD), str(source.resolve()), str(sources()), *flags],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise CompileError(act, f"bcc took longer than {_TIMEOUT_S} s") from None
        if done.returncode == _NO_BCC:
            continue
        if done.returncode != 0:
            message = done.stderr.decode(errors="replace").strip()
            message = message.replace(_BCC_CALLS_IT, str(source))
            raise CompileError(act, "bcc refuses it", detail=message)
        return _object(source, done.stdout)
    raise CompileError(act, "no bcc here", "install it (Debian, Ubuntu: python3-bpfcc)")


class _Answer(msgspec.Struct):
    """What the child writes."""

    compiler: str
    programs: dict[str, str]
    lines: dict[str, dict[int, int]]


def _object(source: Path, output: bytes) -> PolicyObject:
    answer = msgspec.json.decode(output, type=_Answer)
    act = f"compile {source.name}"
    if not answer.programs:
        raise CompileError(act, "no STEER_POLICY in it", "see `steer policies new`")
    try:
        programs = {name: unlink(bytes.fromhex(code)) for name, code in answer.programs.items()}
    except ValueError as error:
        raise CompileError(act, str(error)) from None
    return PolicyObject(digest(source), answer.compiler, programs, answer.lines)


def _flags(source: Path) -> list[str]:
    """What the child is told: the numbers of what the file declares, and what makes it
    easier to write a policy of one's own."""
    flags = _FOR_OWN if source.parent != sources() else []
    content = text(source)
    if "STEER_POLICY" in content:
        return flags + declared.defines(declared.parse(content, f"compile {source.name}"))
    return flags


def text(source: Path) -> str:
    """What is in a policy's file.

    Raises:
        CompileError: it cannot be read, or is no text.
    """
    try:
        return _read_file(source).decode()
    except UnicodeDecodeError as error:
        raise CompileError(f"read {source}", f"not UTF-8 at byte {error.start}") from None


def interpreters() -> list[str]:
    """bcc is a system package: only the system's Python may see it."""
    import shutil

    found = [sys.executable, SYSTEM_PYTHON, shutil.which("python3") or ""]
    return [path for path in dict.fromkeys(found) if path and os.access(path, os.X_OK)]


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "steer"


def _read(file: Path, *, trusted: bool) -> PolicyObject | None:
    """An object file, unless it is missing or broken, or, as it goes into the kernel,
    another user's. One that came with this code is to be trusted as far as the code."""
    try:
        with file.open("rb") as stream:
            if not trusted and os.fstat(stream.fileno()).st_uid not in (0, os.geteuid()):
                return None
            return PolicyObject.decode(stream.read())
    except (OSError, msgspec.MsgspecError):
        return None


def _store(file: Path, compiled: PolicyObject) -> None:
    """Keep for next time; where nothing can be written, the next time compiles again."""
    import tempfile

    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            temporary.write(compiled.encode())
        os.replace(temporary.name, file)
    except OSError:
        return
