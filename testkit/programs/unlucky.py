"""Answers, and fails as it is told to."""

import sys
from pathlib import Path


def serve(worker):
    if Path("broken").exists():
        sys.exit(1)
    print("not flushed", end="")
    while True:
        worker.sockets[0].accept()[0].close()


def chatters(worker):
    for _ in range(320):
        sys.stderr.write("x" * 100_000)
    sys.stderr.flush()
    serve(worker)
