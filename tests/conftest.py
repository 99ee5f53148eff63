"""Fixtures for all tests, and what is done once before them."""

from __future__ import annotations

import compileall
import gc
import resource

import pytest

from steer.loader import probe
from testkit import ROOT
from testkit.capabilities import require
from testkit.fixtures import (  # noqa: F401
    cgroup,
    clients,
    datagrams,
    environment,
    home,
    listener,
    netns,
    service,
    steer,
)


def pytest_configure() -> None:
    """Leave compiled modules in the tree, as an installation does: each of the thousands of
    processes that tests start would compile them for itself, as these may write none.

    Some tests stand for hundreds of workers, whose sockets one process seldom holds.
    """
    for package in ("bench", "steer", "testkit", "vm"):
        compileall.compile_dir(ROOT / package, quiet=1)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def pytest_collection_finish() -> None:
    """Leave what is collected out of garbage collection: it lives to the end, and going through all
    of it again and again took a tenth of the time of the unit tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test asks the kernel itself, as some have it be another."""
    monkeypatch.setattr(probe, "_answers", {})


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        require(*mark.args)
