"""The input files of a compilation, and whether they are still the same.

The compiler lists the files that it read (-MD). Finding the includes without it would require a
preprocessor, as a macro can produce a name. Files that did not exist matter, too: a new header of
the same name, in a directory that is searched earlier, would be read instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from steer.errors import CompileError
from steer.policy.bytecode import Inputs

if TYPE_CHECKING:
    from hashlib import sha256 as sha256
else:
    # hashlib loads OpenSSL, which takes longer than hashing all files.
    try:
        from _sha256 import sha256
    except ImportError:
        try:
            from _sha2 import sha256  # its name since Python 3.12
        except ImportError:
            from hashlib import sha256

Read = Callable[[Path], bytes]
"""The content of a file. Raises CompileError."""
_ESCAPED = r"\\([ #\\])|\$(\$)"
_ASKS = rb"__has_(include|include_next|embed)\b"
_SPLICE = rb"\\[ \t]*\r?\n"


def collect(read: Sequence[Path], own: Path, source: Path, content: Read) -> Inputs:
    """The inputs of a compilation.

    Args:
        read: the files that the compiler read.
        own: directory of steer's headers, which are not included.
        source: the file that was compiled.

    Raises:
        CompileError: a file is gone, or uses __has_include, so that the inputs of the next
            compilation are unknown.
    """
    others = [path for path in read if own not in path.parents]
    for path in (source, *others):
        if re.search(_ASKS, re.sub(_SPLICE, b"", content(path))):
            raise CompileError(f"read {path}", "it uses __has_include")
    digests = {str(path): digest(content(path)) for path in others}
    return Inputs(digests, tuple(_find_shadowing(read, own, source)))


def are_current(found: Inputs, content: Read) -> bool:
    """Whether compiling now would read the same content."""
    with suppress(CompileError):
        return not any(map(os.path.lexists, found.absent)) and all(
            digest(content(Path(path))) == wanted for path, wanted in found.digests.items()
        )
    return False


def version(key: str, found: Inputs) -> str:
    """A digest of the key and of the content of all inputs."""
    if not found.digests:
        return key
    return digest(f"{key} {sorted(found.digests.items())}".encode(errors="surrogateescape"))


def digest(data: bytes) -> str:
    return sha256(data).hexdigest()


def parse(rule: str, directory: Path) -> Sequence[Path]:
    """The files in a make rule of clang, without the virtual ones of bcc.

    Args:
        directory: base of relative paths.
    """
    _, _, text = rule.replace("\\\n", " ").partition(": ")
    words = (
        re.sub(_ESCAPED, r"\1\2", word) for word in re.split(r"(?<!\\)\s+", text.strip()) if word
    )
    return [directory / word for word in words if not word.startswith("/virtual/")]


def _find_shadowing(read: Iterable[Path], own: Path, source: Path) -> Iterable[str]:
    """Paths of missing files that would be read instead if they existed.

    Any directory of a file that was read may be searched, and the order differs for each
    #include. So all of these directories count.
    """
    roots = {source.parent, own, own / "include"}
    roots.update(path.parent for path in read)
    searched = {root for root in roots if own != root and own not in root.parents}
    names = {str(path.relative_to(root)) for path in read for root in roots if root in path.parents}
    return sorted(
        path
        for path in (os.path.join(root, name) for root in searched for name in names)
        if not os.path.lexists(path)
    )
