"""Gets the policy object of a C file: prebuilt, cached, or compiled by bcc in a child process.

Importing bcc costs 70 MB and compiling takes half a second, so this process does neither.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from steer.errors import CompileError, NoCompiler, in_words
from steer.linux import fork
from steer.loader import inputs
from steer.policy import declarations
from steer.policy.bytecode import NO_INPUTS, Inputs, PolicyObject, extract_links, inline_exits

_HERE = Path(__file__).resolve().parent
_CHILD = _HERE / "bcc_child.py"
_NO_BCC = 3
_SEARCHED = frozenset({"CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "OBJC_INCLUDE_PATH"})
"""Variables that add include directories; see ENVIRONMENT in clang(1)."""
_TIMEOUT_S = 120
SYSTEM_PYTHON = "/usr/bin/python3"
_FOR_CUSTOM = ["-g", "-mllvm=-sink-common-insts=false"]
"""Flags for custom policies: line numbers, and no merging of reads in two branches into one read at
a selected address, which the verifier rejects for ctx."""
_ATTACHED = "-DSTEER_ATTACHED"
_BCC_SOURCE_NAME = "/virtual/main.c"
"""The name that bcc gives the source file in its messages."""


def sources() -> Path:
    """The directory of steer.h and the built-in policies: in the package or beside it."""
    packaged = _HERE.parent / "bpf"
    return packaged if packaged.is_dir() else _HERE.parents[1] / "bpf"


def prebuilt(name: str, attached: bool = False) -> Path:
    """The path of the prebuilt object of the built-in policy `name`.

    Args:
        attached: see `load`.
    """
    directory = sources() / "prebuilt"
    return (directory / "attached" if attached else directory) / f"{name}.json"


def digest(source: Path, attached: bool = False) -> str:
    """A hash of the policy's text, steer.h, the other headers, and the code that compiles.

    For a custom policy it covers the directory, too, which determines what it includes.

    Raises:
        CompileError: `source` cannot be read.
    """
    # declarations.py is not part of it: the indexes of names follow from the source.
    headers = sources()
    whose = [] if source.parent == headers else [os.fsencode(source.resolve().parent)]
    variant = [_ATTACHED.encode()] if attached else []
    parts = [_digest_of_headers(headers), *variant, *whose, _read_file(source)]
    return inputs.digest(b"\0".join(parts))


_header_digests: dict[tuple[object, ...], bytes] = {}
"""Cache of `_digest_of_headers`, by the stat(2) of all files."""


def _digest_of_headers(headers: Path) -> bytes:
    """The hash of the files that affect every object. Cached, as each start needs it twice."""
    found = os.walk(headers / "include")
    names = sorted(os.path.join(at, name) for at, _, there in found for name in there)
    own = (f"{headers}/steer.h", f"{headers}/tracing.h")
    files = (str(_CHILD), *own, *(name for name in names if name.endswith(".h")))
    try:
        seen = tuple((name, *_seen(os.stat(name))) for name in files)
    except OSError as error:
        raise CompileError.from_oserror(f"read {error.filename}", error) from None
    if seen not in _header_digests:
        _header_digests.clear()
        contents = (_read_file(Path(name)) for name in files)
        _header_digests[seen] = inputs.digest(
            b"\0".join([sys.byteorder.encode(), *contents])
        ).encode()
    return _header_digests[seen]


def _seen(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read_file(file: Path) -> bytes:
    """The content of a regular file of limited size. Raises CompileError."""
    act = f"read {file}"
    try:
        # O_NONBLOCK, as opening a FIFO would block until it has a writer.
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise CompileError(act, "not a regular file")
            # Allocating the maximum would take longer than reading most files.
            data = stream.read(min(found.st_size, _MOST_BYTES) + 1)
            data += stream.read(_MOST_BYTES) if len(data) > found.st_size else b""
    except OSError as error:
        raise CompileError.from_oserror(act, error) from None
    if len(data) > _MOST_BYTES:
        raise CompileError(act, f"larger than {_MOST_BYTES} bytes")
    return data


_MOST_BYTES = 1 << 20


_compiled: dict[str, PolicyObject] = {}
"""Objects that this process compiled, by digest of the source. Some cannot be cached on disk."""


def load(source: Path, wanted: str = "", attached: bool = False) -> PolicyObject:
    """The object of a policy's source file. Compiles only if no current object is stored.

    Args:
        wanted: digest of an object that this process compiled before, to get that one again.
        attached: compile for `steer attach`, see STEER_ATTACHED in bpf/steer.h.

    Raises:
        CompileError: it does not compile, or there is no compiler.
    """
    key = digest(source, attached)
    found = _compiled.get(key)
    if found is not None and found.digest == wanted:
        return found
    found = _find_stored(source, key, attached)
    if found is None:
        found = _compiled[key] = compile_source(source, attached)
        if found.inputs is not None:
            _store(key, found)
    return found


def version(source: Path) -> str:
    """A digest that changes with every input of the object.

    Before the source is compiled, it covers only its own text; afterwards also its includes.

    Raises:
        CompileError: `source` cannot be read.
    """
    key = digest(source)
    found = _find_stored(source, key)
    return found.digest if found is not None else key


def _find_stored(source: Path, key: str, attached: bool = False) -> PolicyObject | None:
    """A prebuilt or cached object, if compiling now would give the same. Else None."""
    if source.parent == sources():
        shipped = _read(prebuilt(source.stem, attached), trusted=True)
        if shipped is not None and shipped.digest == key:
            return shipped
    found = _cached(key)
    if found is None or found.inputs is None:
        return None
    return found if inputs.are_current(found.inputs, _read_file) else None


def _cached(key: str) -> PolicyObject | None:
    file = _cache_file(key)
    found = _read(file, trusted=False) if file else None
    is_whole = found and found.inputs and found.digest == inputs.version(key, found.inputs)
    return found if is_whole else None


def compile_source(source: Path, attached: bool = False) -> PolicyObject:
    """Compile without regard to caches.

    Args:
        attached: see `load`.

    Raises:
        CompileError: with the compiler's messages in `detail`.
    """
    import subprocess

    act = f"compile {source.name}"
    flags = [*_flags(source), *([_ATTACHED] if attached else [])]
    began_ns = time.time_ns()
    for python in interpreters():
        try:
            child = [python, "-I", str(_CHILD), str(source.resolve()), str(sources()), *flags]
            # bcc searches the current directory first (its ClangLoader::parse), so set it.
            done = fork.run(child, _TIMEOUT_S, str(sources()), _environment())
        except subprocess.TimeoutExpired:
            raise CompileError(act, f"bcc took longer than {_TIMEOUT_S} s") from None
        except OSError as error:  # for example EAGAIN of fork(2)
            cause = f"start {python}: {in_words(error)}"
            raise CompileError.from_oserror(act, error, cause=cause) from None
        if done.returncode == _NO_BCC:
            continue
        if done.returncode < 0:
            how = fork.how_it_ended(done.returncode)
            cause = f"bcc was {how}: out of memory, or over its limit of CPU time"
            raise CompileError(act, cause)
        if done.returncode != 0:
            message = done.stderr.decode(errors="replace").strip()
            message = message.replace(_BCC_SOURCE_NAME, str(source))
            raise CompileError(act, "bcc rejects it", detail=message)
        return _object(source, done.stdout, began_ns, attached)
    raise NoCompiler(act, "bcc is not installed", "install it (Debian, Ubuntu: python3-bpfcc)")


def _environment() -> dict[str, str]:
    """Our environment without variables that silently add include directories."""
    return {name: value for name, value in os.environ.items() if name not in _SEARCHED}


class _Answer(msgspec.Struct):
    """The output of the child process."""

    compiler: str
    programs: dict[str, str]
    lines: dict[str, dict[int, int]]
    read: str


def _object(source: Path, output: bytes, began_ns: int, attached: bool) -> PolicyObject:
    """Args: began_ns: when the compiler was started."""
    answer = msgspec.json.decode(output, type=_Answer)
    act = f"compile {source.name}"
    if not answer.programs:
        raise CompileError(act, "no STEER_POLICY in it", "see `steer policies new`")
    try:
        ended = {name: inline_exits(bytes.fromhex(code)) for name, code in answer.programs.items()}
        programs = {name: extract_links(raw) for name, (raw, _) in ended.items()}
    except ValueError as error:
        raise CompileError(act, str(error)) from None
    read = _inputs(source, answer.read, began_ns)
    # If the inputs are unknown, the version is that of the output.
    key = digest(source, attached)
    made_from = inputs.version(key, read or Inputs({"": inputs.digest(output)}))
    lines = {
        name: {ended[name][1][at]: line for at, line in of.items()}
        for name, of in answer.lines.items()
    }
    return PolicyObject(made_from, answer.compiler, programs, lines, read)


def _inputs(source: Path, rule: str, began_ns: int) -> Inputs | None:
    """The files that the compiler read; None if they cannot be determined reliably."""
    files = inputs.parse(rule, sources())
    if not files:
        return None
    try:
        found = inputs.collect(files, sources(), source.resolve(), _read_file)
        # A file changed while the compiler ran may have been read before or after the change.
        is_settled = all(os.stat(path).st_ctime_ns <= began_ns for path in found.digests)
    except (CompileError, OSError):
        return None
    # Built-in policies have no other inputs, and their objects do not store any.
    return (NO_INPUTS if found == NO_INPUTS else found) if is_settled else None


def read_by(source: Path) -> Sequence[Path]:
    """The files that a policy includes, other than steer's own. Raises CompileError."""
    read = load(source).inputs
    return [Path(path) for path in read.digests] if read is not None else []


def _flags(source: Path) -> list[str]:
    """Flags for the child process: indexes of declared names; for custom policies debug aids."""
    flags = _FOR_CUSTOM if source.parent != sources() else []
    content = text(source)
    if "STEER_POLICY" in content:
        return flags + declarations.defines(declarations.parse(content, f"compile {source.name}"))
    return flags


def text(source: Path) -> str:
    """The text of a policy's file.

    Raises:
        CompileError: it cannot be read, or is not UTF-8.
    """
    try:
        return _read_file(source).decode()
    except UnicodeDecodeError as error:
        raise CompileError(f"read {source}", f"not UTF-8 at byte {error.start}") from None


def interpreters() -> list[str]:
    """Pythons that may have bcc. It is a system package, which a virtual environment lacks."""
    import shutil

    found = [sys.executable, SYSTEM_PYTHON, shutil.which("python3") or ""]
    return [path for path in dict.fromkeys(found) if path and os.access(path, os.X_OK)]


def _cache_file(key: str) -> Path | None:
    """The path in the cache, or None if this user has no cache directory.

    The XDG Base Directory Specification says to ignore a relative XDG_CACHE_HOME. Without a
    known home directory, expanduser() returns "~" unchanged.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        home = os.path.expanduser("~")
        if not os.path.isabs(home) or home == "/":
            return None
        base = os.path.join(home, ".cache")
    return Path(base) / "steer" / f"{key}.json"


def _read(file: Path, *, trusted: bool) -> PolicyObject | None:
    """Decode an object file. None if it is missing, broken, or owned by another user.

    The owner matters as the bytecode goes into the kernel. A prebuilt object is trusted like
    the code that it is installed with.
    """
    try:
        with file.open("rb") as stream:
            if not trusted and os.fstat(stream.fileno()).st_uid not in (0, os.geteuid()):
                return None
            return PolicyObject.decode(stream.read())
    except (OSError, msgspec.MsgspecError):
        return None


def _store(key: str, compiled: PolicyObject) -> None:
    """Write an object into the cache. Errors are ignored: then it is compiled again next time."""
    import tempfile

    file = _cache_file(key)
    if file is None:
        return
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent)
    except OSError:
        return
    try:
        with open(descriptor, "wb") as stream:
            stream.write(compiled.encode())
        os.replace(temporary, file)
    except OSError:  # for example ENOSPC: do not leave a partial file on a full disk
        with suppress(OSError):
            os.unlink(temporary)
