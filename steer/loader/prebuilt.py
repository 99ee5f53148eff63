"""The objects shipped with steer: `python -m steer.loader.prebuilt [--check]`."""

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
    """What of the shipped objects is not what the sources compile to, in words.

    Another compiler than the one that made an object may rightly give other
    bytecode; then only the sources' digest is compared, and that is said.
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
            found.append(f"{source.name}: compiles to something else")
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
        print("mend with: python -m steer.loader.prebuilt", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
