"""Builds or checks the objects that steer ships: `python -m steer.loader.prebuilt [--check]`."""

from __future__ import annotations

import sys

from steer.errors import SteerError
from steer.loader import compile as compiler
from steer.policy.bytecode import PolicyObject


def build() -> None:
    """Compile every built-in policy and write its object."""
    for source in sorted(compiler.sources().glob("*.c")):
        file = compiler.prebuilt(source.stem)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(compiler.compile_source(source).encode())


def stale() -> list[str]:
    """Descriptions of the shipped objects that differ from what the sources compile to.

    A different compiler may produce different bytecode. Then only the digest of the sources is
    compared, and a line on standard output says so.
    """
    found = []
    for source in sorted(compiler.sources().glob("*.c")):
        fresh = compiler.compile_source(source)
        try:
            shipped = PolicyObject.decode(compiler.prebuilt(source.stem).read_bytes())
        except OSError:
            found.append(f"{source.name}: not built")
            continue
        if shipped.digest != fresh.digest:
            found.append(f"{source.name}: changed since it was built")
        elif shipped.compiler != fresh.compiler:
            print(f"{source.name}: built by {shipped.compiler}, here is {fresh.compiler}")
        elif shipped.programs != fresh.programs:
            found.append(f"{source.name}: the compiled bytecode differs")
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
