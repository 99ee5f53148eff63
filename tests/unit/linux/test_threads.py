"""A thread that cannot start is an error of its own type."""

from __future__ import annotations

import errno
import threading

import pytest

from steer.errors import NoThread
from steer.linux import retry, threads


def test_a_thread_calls_the_function_and_does_not_keep_the_process() -> None:
    called = threading.Event()
    thread = threads.start(called.set)
    thread.join()
    assert called.is_set()
    assert thread.daemon


def test_no_more_threads_is_no_bug_and_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(NoThread) as caught:
        threads.start(lambda: None)
    assert caught.value.errno == errno.EAGAIN
    assert retry.is_lack(caught.value)
    assert retry.in_words(caught.value) == (
        "start a thread: no more threads; raise the limit on processes (ulimit -u, TasksMax=) or on"
        " memory"
    )
