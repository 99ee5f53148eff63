"""Builds or checks the objects that steer ships: `python -m steer.loader.prebuilt [--check]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from steer.errors import SteerError
from steer.loader import compile as compiler
from steer.policy.bytecode import PolicyObject


def build() -> None:
    """Compile every built-in policy and write its object."""
    for source, attached in _all():
        file = compiler.prebuilt(source.stem, attached)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(compiler.compile_source(source, attached).encode())


def _all() -> Iterator[tuple[Path, bool]]:
    """Each source, and whether to compile it for `steer attach`: policies both ways."""
    for source in sorted(compiler.sources().glob("*.c")):
        yield source, False
        if "STEER_POLICY" in compiler.text(source):
            yield source, True


def stale() -> list[str]:
    """Descriptions of the shipped objects that differ from what the sources compile to.

    A different compiler may produce different bytecode. Then only the digest of the sources is
    compared, and a line on standard output says so.
    """
    found = []
    for source, attached in _all():
        fresh = compiler.compile_source(source, attached)
        name = f"{source.name} for attach" if attached else source.name
        try:
            file = compiler.prebuilt(source.stem, attached)
            shipped = PolicyObject.decode(file.read_bytes())
        except OSError:
            found.append(f"{name}: not built")
            continue
        if shipped.digest != fresh.digest:
            found.append(f"{name}: changed since it was built")
        elif shipped.compiler != fresh.compiler:
            print(f"{name}: built by {shipped.compiler}, here is {fresh.compiler}")
        elif shipped.programs != fresh.programs:
            found.append(f"{name}: the compiled bytecode differs")
    return found


def main(arguments: list[str]) -> int:
    try:
        if arguments != ["--check"]:
            build()
            return 0
        problems = stale()
    except SteerError as error:
        problems = [f"{error}\n{error.detail}"]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print("to rebuild: python -m steer.loader.prebuilt", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
