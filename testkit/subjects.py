"""The rule for the subjects of commits: `python -m testkit.subjects`.

It holds for commits since the last tag, and for none before this file was added.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from testkit import ROOT

_FILE = "testkit/subjects.py"
_RIGHT = re.compile(r"[a-z][a-z0-9/_-]*: [a-z]")
_LENGTH_MAX = 72


def problem(subject: str) -> str:
    """What is wrong with a subject; "" if nothing is."""
    if not _RIGHT.match(subject):
        return "has to be like `area: verb object`"
    if len(subject) > _LENGTH_MAX:
        return f"has {len(subject)} characters, {_LENGTH_MAX} at most"
    return ""


def wrong_commits(repository: Path) -> Iterator[str]:
    """Each commit with a subject that breaks the rule, and why. None where git does not know: it is
    no repository, or a shallow one, in which the first commit seems to add every file."""
    if _git(repository, "rev-parse", "--is-shallow-repository") != "false":
        return
    added = _git(repository, "log", "--diff-filter=A", "--format=%H", "--", _FILE).split()
    if not added:
        return
    tag = _git(repository, "describe", "--tags", "--abbrev=0")
    before = [f"{added[-1]}^@", *filter(None, [tag])]
    log = _git(repository, "log", "--no-merges", "--format=%h %s", "HEAD", "--not", *before)
    for line in log.splitlines():
        commit, _, subject = line.partition(" ")
        if why := problem(subject):
            yield f"{commit} {subject!r}: the subject {why}"


def _git(repository: Path, *arguments: str) -> str:
    """What git prints; "" if it fails, or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments], capture_output=True, text=True
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def main() -> int:
    """Print what is wrong; the exit status."""
    wrong = list(wrong_commits(ROOT))
    for line in wrong:
        print(line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
