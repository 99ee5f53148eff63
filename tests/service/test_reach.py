"""Workers of --user that may not reach their command or their modules: who, where, and the cure."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from steer.linux import reach
from steer.linux.reach import Barrier
from testkit.clients import BIND
from testkit.confine import NOBODY
from testkit.fixtures import RunSteer

pytestmark = pytest.mark.needs("netns", "nobody")

AS_NOBODY = ("-w", "1", "--user", "nobody", *BIND)
APP = "def serve(worker): worker.sockets[0].accept()"


def script(path: Path, interpreter: object = "/bin/sh") -> Path:
    path.write_text(f"#!{interpreter}\nexit 1\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def private(home: Path) -> Path:
    """A directory of root's alone."""
    made = home / "private"
    made.mkdir(mode=0o700)
    return made


def relative(home: Path, private: Path) -> tuple[str, Path]:
    """As in a home directory: workers run in it."""
    script(home / "uv")
    home.chmod(0o700)
    return "./uv", home


def absolute(home: Path, private: Path) -> tuple[str, Path]:
    return str(script(private / "uv")), private


def interpreted(home: Path, private: Path) -> tuple[str, Path]:
    """As by a virtual environment whose Python is another's, a symbolic link."""
    (home / "python").symlink_to("private/sh")
    (private / "sh").symlink_to("/bin/sh")
    return str(script(home / "uv", home / "python")), private


def on_path(home: Path, private: Path) -> tuple[str, Path]:
    script(private / "uv-on-path")
    return "uv-on-path", private


WAYS = [relative, absolute, interpreted, on_path]


@pytest.mark.parametrize("way", WAYS, ids=lambda each: each.__name__)
def test_command(
    steer: RunSteer,
    home: Path,
    private: Path,
    environment: dict[str, str],
    way: Callable[[Path, Path], tuple[str, Path]],
) -> None:
    command, closed = way(home, private)
    environment["PATH"] = f"{private}:{environment['PATH']}"
    why = f"nobody may not enter {closed} (mode 0700); chmod o+x {closed}, or have app and"
    run = steer("run", *AS_NOBODY, "--", command)
    assert run.returncode == 4, run.stderr
    assert f"run {command}: Permission denied; {why}" in run.stderr
    check = steer("check", *AS_NOBODY, "--", command)
    assert check.returncode == 4
    assert f"steer: run {command}: {why}" in check.stderr


def test_command_that_is_reached_by_another_name(
    steer: RunSteer, home: Path, private: Path, environment: dict[str, str]
) -> None:
    """The first directory of PATH is closed, which keeps nobody from the second."""
    script(private / "uv-on-path")
    script(home / "uv-on-path")
    environment["PATH"] = f"{private}:{home}:{environment['PATH']}"
    done = steer("check", *AS_NOBODY, "--", "uv-on-path")
    assert done.returncode == 0, done.stderr
    assert "may not" not in done.stdout


def test_callable(steer: RunSteer, home: Path) -> None:
    (home / "app.py").write_text(APP)
    home.chmod(0o700)
    why = f"nobody may not enter {home} (mode 0700); chmod o+x {home}"
    run = steer("run", *AS_NOBODY, "app:serve")
    assert run.returncode == 4, run.stderr
    assert f"ModuleNotFoundError: No module named 'app'; {why}" in run.stderr
    check = steer("check", *AS_NOBODY, "app:serve", "--json")
    assert check.returncode == 0, check.stderr
    assert any(why in note for note in json.loads(check.stdout)["notes"])


@pytest.mark.needs("uvicorn")
def test_server_that_does_not_find_its_application(steer: RunSteer, home: Path) -> None:
    """It says no more than that; steer has said why before it started."""
    (home / "app.py").touch()
    home.chmod(0o700)
    done = steer("run", *AS_NOBODY, "--", sys.executable, "-m", "uvicorn", "app:app", "--fd={fd}")
    said, _, after = done.stderr.partition('Could not import module "app"')
    assert after
    why = f"workers may not find the application: nobody may not enter {home} (mode 0700)"
    assert why in said


def test_nothing_is_said_where_all_is_reached(steer: RunSteer, home: Path) -> None:
    (home / "app.py").write_text(APP)
    script(home / "uv")
    for what in (["app:serve"], ["--", "./uv"]):
        done = steer("check", *AS_NOBODY, *what)
        assert done.returncode == 0, done.stderr
        assert "may not" not in done.stdout


def as_nobody(look: Callable[[], Barrier | None]) -> Barrier | None:
    [found] = reach.tried(lambda: os.setuid(NOBODY), lambda: [look()])
    return found


def test_what_is_missing_or_goes_in_circles_is_no_barrier(home: Path, private: Path) -> None:
    (home / "circle").symlink_to("circle")
    for name in ("circle", "nowhere", "nowhere/uv", "circle/uv"):
        assert as_nobody(lambda name=name: reach.to_path(str(home / name))) is None
        assert as_nobody(lambda name=name: reach.to_command(str(home / name), [])) is None


def test_file_that_is_not_executable(home: Path) -> None:
    (home / "uv").touch(mode=0o640)
    found = as_nobody(lambda: reach.to_command("uv", ["/nowhere", str(home)]))
    assert str(found) == f"nobody may not execute {home}/uv (mode 0640)"
    assert found is not None
    assert found.cure == f"chmod a+x {home}/uv"


def test_who_cannot_look_finds_nothing_and_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise PermissionError

    with pytest.raises(OSError, match="give up privileges"):
        reach.tried(refuse, list)
    with pytest.raises(OSError, match="give up privileges"):
        as_nobody(lambda: reach.to_path("a\0b"))
    assert capfd.readouterr() == ("", "")
