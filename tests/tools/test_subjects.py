"""The subjects of commits that `./dev check` refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from testkit import subjects

_WHO = ("-c", "user.name=a", "-c", "user.email=a@example.org")


def git(repository: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(repository), *_WHO, *arguments], check=True)


def commit(repository: Path, subject: str) -> None:
    git(repository, "commit", "-q", "--allow-empty", "-m", subject)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One with a commit from before the rule, and the commit that adds the rule."""
    made = tmp_path / "made"
    git(tmp_path, "init", "-q", str(made))
    commit(made, "Mend what was broken")
    (made / "testkit").mkdir()
    (made / "testkit" / "subjects.py").touch()
    git(made, "add", "testkit")
    commit(made, "dev: check the subjects of commits")
    return made


@pytest.mark.parametrize(
    "subject, is_right",
    [
        ("workers: call a worker a worker", True),
        ("tests/tools: add a test", True),
        ("Workers: call a worker a worker", False),
        ("workers: Call a worker a worker", False),
        ("call a worker a worker", False),
        ("workers: " + "x" * 63, True),
        ("workers: " + "x" * 64, False),
    ],
)
def test_subject(subject: str, is_right: bool) -> None:
    assert (not subjects.problem(subject)) is is_right


def test_only_commits_since_the_rule_and_the_last_tag(repository: Path) -> None:
    assert list(subjects.wrong_commits(repository)) == []
    commit(repository, "Wrong")
    (wrong,) = subjects.wrong_commits(repository)
    assert wrong.endswith("'Wrong': the subject has to be like `area: verb object`")
    git(repository, "tag", "v1")
    assert list(subjects.wrong_commits(repository)) == []


def test_nothing_is_known_of_a_shallow_clone(repository: Path, tmp_path: Path) -> None:
    commit(repository, "Wrong")
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", repository.as_uri(), str(shallow))
    assert list(subjects.wrong_commits(shallow)) == []
    assert list(subjects.wrong_commits(tmp_path)) == []
