"""Checks of what is written: links that lead nowhere, and words that the glossary has replaced.

`python -m testkit.pages` prints each with its file, and fails if there are any.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from testkit import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/*.md")])
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```|`[^`]*`", re.DOTALL | re.MULTILINE)

INSTEAD: Mapping[str, str] = {
    "crew": "members, workers",
    "crews": "members, workers",
    "custody": "guard",
    "deck": "ring",
    "decks": "rings",
    "fleet": "pool",
    "flip": "publish",
    "flips": "publishes",
    "keeper": "guard",
    "ladder": "candidates, fallback",
    "orphanage": "standby",
    "rehearse": "dry run",
    "reserves": "backup listeners",
    "rotation": "selection",
    "rung": "backend, candidate",
    "rungs": "backends, candidates",
    "seat": "spec",
    "seats": "specs",
}
"""Words of before, and the ones that docs/GLOSSARY.md has for them."""


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    """The links of a page to files and headings that are not there; other sites are not asked."""
    for link in _LINK.findall(_CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        there = page.parent / path if path else page
        if not there.exists() or (anchor and anchor not in anchors(there.read_text())):
            yield link


def replaced_words(text: str) -> Iterator[str]:
    """What should be said otherwise, with what to say."""
    for word in re.findall(r"(?<![\w-])[a-z]+(?![\w-])", text.lower()):
        if word in INSTEAD:
            yield f"{word}: say {INSTEAD[word]}"


def main() -> int:
    """Print what is wrong; the exit status."""
    wrong = [
        f"{page.relative_to(ROOT)}: no {link}" for page in PAGES for link in broken_links(page)
    ]
    sources = [*(ROOT / "steer").rglob("*.py"), *(ROOT / "bpf").glob("*.[ch]")]
    for file in [*PAGES, *sources]:
        wrong += [f"{file.relative_to(ROOT)}: {word}" for word in replaced_words(file.read_text())]
    print("\n".join(wrong), end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
