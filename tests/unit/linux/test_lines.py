"""A stream cut into lines."""

from __future__ import annotations

import json

from steer.linux.lines import MOST_BYTES, Lines, shown


def test_nothing_of_a_stream_is_lost_and_long_lines_go_on() -> None:
    long = b"y" * (2 * MOST_BYTES + 5)
    data = b"one\n\ntwo\n" + long + b"\nrest"
    for step in (1, 7, 4096, len(data)):
        lines = Lines()
        cut = [
            each for at in range(0, len(data), step) for each in lines.feed(data[at : at + step])
        ]
        cut += lines.end()
        assert b"".join(line + (b"" if goes_on else b"\n") for line, goes_on in cut) == data + b"\n"
        assert max(len(line) for line, _ in cut) == MOST_BYTES
    assert list(shown([(b"a", True), (b"b", False)], "text", 1, 2, 3.0)) == [b"a\\\n", b"b\n"]
    (one,) = shown([(b"a\xff", True)], "json", 1, 2, 3.0)
    assert json.loads(one) == {
        "time": 3.0, "pid": 1, "slot": 2, "stream": "worker", "message": "a\ufffd", "goes_on": True,
    }  # fmt: skip
