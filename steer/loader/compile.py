"""From C to a policy object: prebuilt, else cached, else compiled by bcc in a child.

Importing bcc costs 70 MB and compiling half a second, so neither ever happens in
this process.
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
from steer.policy.bytecode import NO_INPUTS, Inputs, PolicyObject, unlink, with_near_ends

_HERE = Path(__file__).resolve().parent
_CHILD = _HERE / "bcc_child.py"
_NO_BCC = 3
_SEARCHED = frozenset({"CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "OBJC_INCLUDE_PATH"})
"""As the clang command has them, "ENVIRONMENT"."""
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
    """Names what is compiled: a hash of the policy's text, steer.h, our headers and how we compile.

    For one of the user's own also of where it is, as that decides what it includes.

    Raises:
        CompileError: `source` cannot be read.
    """
    # Nothing of declared.py: it gives each name the number of its place in the source.
    headers = sources()
    whose = [] if source.parent == headers else [os.fsencode(source.resolve().parent)]
    return inputs.digest(b"\0".join([_digest_of_ours(headers), *whose, _read_file(source)]))


_ours: dict[tuple[object, ...], bytes] = {}
"""What `_digest_of_ours` is, by what stat(2) says of the files."""


def _digest_of_ours(headers: Path) -> bytes:
    """Of what goes into every object. A start asks for it twice, and it takes a while to read."""
    found = os.walk(headers / "include")
    names = sorted(os.path.join(at, name) for at, _, there in found for name in there)
    files = (str(_CHILD), f"{headers}/steer.h", *(name for name in names if name.endswith(".h")))
    try:
        seen = tuple((name, *_seen(os.stat(name))) for name in files)
    except OSError as error:
        raise CompileError.from_oserror(f"read {error.filename}", error) from None
    if seen not in _ours:
        _ours.clear()
        contents = (_read_file(Path(name)) for name in files)
        _ours[seen] = inputs.digest(b"\0".join([sys.byteorder.encode(), *contents])).encode()
    return _ours[seen]


def _seen(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read_file(file: Path) -> bytes:
    """A regular file, and no endless one. Raises CompileError."""
    act = f"read {file}"
    try:
        # Not to wait for somebody to write into a pipe.
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise CompileError(act, "it is no regular file")
            # Room for as much as may be would take longer to have than most files to read.
            data = stream.read(min(found.st_size, _MOST_BYTES) + 1)
            data += stream.read(_MOST_BYTES) if len(data) > found.st_size else b""
    except OSError as error:
        raise CompileError.from_oserror(act, error) from None
    if len(data) > _MOST_BYTES:
        raise CompileError(act, f"it has more than {_MOST_BYTES} bytes")
    return data


_MOST_BYTES = 1 << 20


_made: dict[str, PolicyObject] = {}
"""By digest of the source: what this process compiled last, whether it can be cached or not."""


def load(source: Path, wanted: str = "") -> PolicyObject:
    """The object of a policy's source file, compiling only where nothing is at hand.

    Args:
        wanted: its digest, if it was compiled before in this process: then it is that one.

    Raises:
        CompileError: it does not compile, or there is no compiler.
    """
    key = digest(source)
    found = _made.get(key)
    if found is not None and found.digest == wanted:
        return found
    found = _at_hand(source, key)
    if found is None:
        found = _made[key] = compile_source(source)
        if found.inputs is not None:
            _store(key, found)
    return found


def version(source: Path) -> str:
    """Another one when anything that the object is made from is another. As long as it has not
    been compiled that is its own text; from then on also what it includes.

    Raises:
        CompileError: `source` cannot be read.
    """
    key = digest(source)
    found = _at_hand(source, key)
    return found.digest if found is not None else key


def _at_hand(source: Path, key: str) -> PolicyObject | None:
    """An object that is as good as one compiled now."""
    if source.parent == sources():
        shipped = _read(prebuilt(source.stem), trusted=True)
        if shipped is not None and shipped.digest == key:
            return shipped
    found = _cached(key)
    if found is None or found.inputs is None:
        return None
    return found if inputs.are_the_same(found.inputs, _read_file) else None


def _cached(key: str) -> PolicyObject | None:
    file = _cache_file(key)
    found = _read(file, trusted=False) if file else None
    is_whole = found and found.inputs and found.digest == inputs.version(key, found.inputs)
    return found if is_whole else None


def compile_source(source: Path) -> PolicyObject:
    """Compile, whatever is cached.

    Raises:
        CompileError: with the compiler's messages in `detail`.
    """
    import subprocess

    act = f"compile {source.name}"
    flags = _flags(source)
    began_ns = time.time_ns()
    for python in interpreters():
        try:
            child = [python, "-I", str(_CHILD), str(source.resolve()), str(sources()), *flags]
            # bcc searches the current directory before all others (its ClangLoader::parse).
            done = fork.run(child, _TIMEOUT_S, str(sources()), _environment())
        except subprocess.TimeoutExpired:
            raise CompileError(act, f"bcc took longer than {_TIMEOUT_S} s") from None
        except OSError as error:  # EAGAIN of fork(2), say
            cause = f"start {python}: {in_words(error)}"
            raise CompileError.from_oserror(act, error, cause=cause) from None
        if done.returncode == _NO_BCC:
            continue
        if done.returncode < 0:
            how = fork.how_it_ended(done.returncode)
            cause = f"bcc was {how}: there was no more memory, or it computed for too long"
            raise CompileError(act, cause)
        if done.returncode != 0:
            message = done.stderr.decode(errors="replace").strip()
            message = message.replace(_BCC_CALLS_IT, str(source))
            raise CompileError(act, "bcc refuses it", detail=message)
        return _object(source, done.stdout, began_ns)
    raise NoCompiler(act, "no bcc here", "install it (Debian, Ubuntu: python3-bpfcc)")


def _environment() -> dict[str, str]:
    """Ours, without what has clang search other directories, which nobody would notice."""
    return {name: value for name, value in os.environ.items() if name not in _SEARCHED}


class _Answer(msgspec.Struct):
    """What the child writes."""

    compiler: str
    programs: dict[str, str]
    lines: dict[str, dict[int, int]]
    read: str


def _object(source: Path, output: bytes, began_ns: int) -> PolicyObject:
    """Args: began_ns: when the compiler was started."""
    answer = msgspec.json.decode(output, type=_Answer)
    act = f"compile {source.name}"
    if not answer.programs:
        raise CompileError(act, "no STEER_POLICY in it", "see `steer policies new`")
    try:
        ended = {
            name: with_near_ends(bytes.fromhex(code)) for name, code in answer.programs.items()
        }
        programs = {name: unlink(raw) for name, (raw, _) in ended.items()}
    except ValueError as error:
        raise CompileError(act, str(error)) from None
    read = _inputs(source, answer.read, began_ns)
    # Where that is not known any other program is another version.
    made_from = inputs.version(digest(source), read or Inputs({"": inputs.digest(output)}))
    lines = {
        name: {ended[name][1][at]: line for at, line in of.items()}
        for name, of in answer.lines.items()
    }
    return PolicyObject(made_from, answer.compiler, programs, lines, read)


def _inputs(source: Path, rule: str, began_ns: int) -> Inputs | None:
    """What the compiler read; None where that cannot be told for sure."""
    files = inputs.parse(rule, sources())
    if not files:
        return None
    try:
        found = inputs.of(files, sources(), source.resolve(), _read_file)
        # Edited while the compiler ran: who knows which of the two it saw.
        is_settled = all(os.stat(path).st_ctime_ns <= began_ns for path in found.digests)
    except (CompileError, OSError):
        return None
    # That of the built-in ones is not written into their files.
    return (NO_INPUTS if found == NO_INPUTS else found) if is_settled else None


def read_by(source: Path) -> Sequence[Path]:
    """What it includes that is not ours. Raises CompileError."""
    read = load(source).inputs
    return [Path(path) for path in read.digests] if read is not None else []


def _flags(source: Path) -> list[str]:
    """What the child is told: the numbers of what the file declares, and what makes it
    easier to write a policy of one's own."""
    flags = _FOR_OWN if source.parent != sources() else []
    content = text(source)
    if "STEER_POLICY" in content:
        return flags + declarations.defines(declarations.parse(content, f"compile {source.name}"))
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


def _cache_file(key: str) -> Path | None:
    """None where this user has no directory for it.

    A relative XDG_CACHE_HOME is to be passed over (XDG Base Directory Specification), and where
    nobody has told of a home directory "~" stays "~".
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        home = os.path.expanduser("~")
        if not os.path.isabs(home) or home == "/":
            return None
        base = os.path.join(home, ".cache")
    return Path(base) / "steer" / f"{key}.json"


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


def _store(key: str, compiled: PolicyObject) -> None:
    """Keep for next time; where nothing can be written, the next time compiles again."""
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
    except OSError:  # ENOSPC: what got there would only make the disk fuller
        with suppress(OSError):
            os.unlink(temporary)
