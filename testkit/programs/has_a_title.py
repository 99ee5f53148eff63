"""Has a title of its own."""

import contextlib
import ctypes
import json
import os
from pathlib import Path

getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p


def serve(worker):
    worker.ready()
    # C code, and Python, still see the environment and the arguments that there were.
    seen = getenv(b"PATH").decode(), os.environ["PATH"], __import__("sys").orig_argv[-1]
    Path("seen").write_text(json.dumps(seen))
    while not worker.stopping:
        with contextlib.suppress(BlockingIOError):
            worker.sockets[0].accept()[0].close()
