"""What documentation shows of tables in the code: `python -m testkit.diagrams [--check]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from steer.workers.lifecycle import TRANSITIONS
from testkit import ROOT

PAGE = ROOT / "docs" / "ARCHITECTURE.md"
_BEGIN, _END = "<!-- lifecycle -->\n", "<!-- /lifecycle -->\n"


def lifecycle() -> str:
    """The states of a worker and what leads from one to the next, as a table in Markdown."""
    return "\n".join(["| state | if | then | next state |", "| --- | --- | --- | --- |", *_rows()])


def _rows() -> Iterator[str]:
    for state, events in TRANSITIONS.items():
        for event, (then, commands) in events.items():
            acts = ", ".join(command.value for command in commands) or "nothing"
            yield f"| {state.value} | {event.value} | {acts} | {then.value} |"


def page(text: str) -> str:
    """A page with the table in its place."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{lifecycle()}\n\n{_END}{after}"


def main() -> int:
    """Write the page, or say whether it is up to date; the exit status."""
    found = PAGE.read_text()
    made = page(found)
    if sys.argv[1:] == ["--check"]:
        return int(found != made)
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
