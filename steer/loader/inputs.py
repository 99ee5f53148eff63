"""What a compiler read, and whether a later one would read the same.

The compiler says which files it read (-MD, as make wants it): to find the includes of C by
ourselves we would have to preprocess it, as a name may come out of a macro. Beside what was read
it matters what was not there: a header of the same name in a directory that is searched earlier
takes the place of one that was read.
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
    # hashlib brings OpenSSL, which takes longer to load than to hash all that there is here.
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


def of(read: Sequence[Path], own: Path, source: Path, content: Read) -> Inputs:
    """As the compiler found them.

    Args:
        read: the files that it read.
        own: directory of our headers: they are no part of this.
        source: what was compiled.

    Raises:
        CompileError: one is gone, or asks what files there are, so that nobody can tell what
            another compilation would read.
    """
    others = [path for path in read if own not in path.parents]
    for path in (source, *others):
        if re.search(_ASKS, re.sub(_SPLICE, b"", content(path))):
            raise CompileError(f"read {path}", "it asks with __has_include what files there are")
    digests = {str(path): digest(content(path)) for path in others}
    return Inputs(digests, tuple(_earlier(read, own, source)))


def are_the_same(found: Inputs, content: Read) -> bool:
    """Whether a compiler would read the same now."""
    with suppress(CompileError):
        return not any(map(os.path.lexists, found.absent)) and all(
            digest(content(Path(path))) == wanted for path, wanted in found.digests.items()
        )
    return False


def version(key: str, found: Inputs) -> str:
    """Of what has that key and these inputs: another where any content is another."""
    if not found.digests:
        return key
    return digest(f"{key} {sorted(found.digests.items())}".encode(errors="surrogateescape"))


def digest(data: bytes) -> str:
    return sha256(data).hexdigest()


def parse(rule: str, directory: Path) -> Sequence[Path]:
    """The files in a make rule as clang writes it, without those that bcc has built in.

    Args:
        directory: what relative paths in it are relative to.
    """
    _, _, text = rule.replace("\\\n", " ").partition(": ")
    words = (
        re.sub(_ESCAPED, r"\1\2", word) for word in re.split(r"(?<!\\)\s+", text.strip()) if word
    )
    return [directory / word for word in words if not word.startswith("/virtual/")]


def _earlier(read: Iterable[Path], own: Path, source: Path) -> Iterable[str]:
    """Where else files of these names might be, and are not.

    Every directory that has a file that was read may be one that is searched, in an order that
    differs with each #include: so all of them count.
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
