"""What is needed of pathlib, which takes longer to import than all that is on the way to import it
here. Whatever has a name here does the same there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Self


class Path(str):
    """A path, without what is superfluous in it. It is a string, and so equal to one."""

    __slots__ = ()

    def __new__(cls, *parts: str | os.PathLike[str]) -> Self:
        joined = os.path.join(*parts)
        names = [name for name in joined.split("/") if name not in ("", ".")]
        root = "/" if joined.startswith("/") else ""
        return super().__new__(cls, root + "/".join(names) or ".")

    def __truediv__(self, below: str | os.PathLike[str]) -> Self:
        return type(self)(self, below)

    @property
    def name(self) -> str:
        return "" if self == "." else os.path.basename(self)

    @property
    def stem(self) -> str:
        return self.name.removesuffix(self.suffix)

    @property
    def suffix(self) -> str:
        name = self.name
        at = name.rfind(".")
        return name[at:] if 0 < at < len(name) - 1 else ""

    @property
    def parent(self) -> Self:
        return type(self)(os.path.dirname(self))

    @property
    def parents(self) -> Sequence[Self]:
        above, found = self, list[Self]()
        while above not in ("/", "."):
            above = above.parent
            found.append(above)
        return found

    def absolute(self) -> Self:
        return type(self)(os.getcwd(), self)
