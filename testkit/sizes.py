"""How long a file, a class and a function of `steer/` may be: `python -m testkit.sizes`.

What is longer has more than one idea. Part it by idea.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from testkit import ROOT

_FILE_LINES, _CLASS_LINES, _FUNCTION_LINES = 400, 250, 50


def too_long(file: Path) -> Iterator[str]:
    """Each part of a file of Python that is too long, and how long it may be."""
    text = file.read_text()
    if (lines := len(text.splitlines())) > _FILE_LINES:
        yield f"{file}: {lines} lines, {_FILE_LINES} at most"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            kind, most = "class", _CLASS_LINES
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kind, most = "function", _FUNCTION_LINES
        else:
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > most:
            yield f"{file}:{node.lineno}: {kind} {node.name}: {lines} lines, {most} at most"


def main() -> int:
    """Print what is too long; the exit status."""
    found = [each for file in sorted((ROOT / "steer").rglob("*.py")) for each in too_long(file)]
    for line in found:
        print(line)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
