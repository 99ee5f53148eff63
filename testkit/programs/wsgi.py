"""An application for WSGI servers."""

import json
import os
import pathlib
import time


def until(name):
    while not pathlib.Path(name).exists():
        time.sleep(0.01)


if "HOLD" in os.environ:
    until("start-" + os.environ["STEER_SLOT"])


def app(environ, start_response):
    if environ["PATH_INFO"] == "/held":
        pathlib.Path("under-way").touch()
        until("go")
    body = json.dumps({"slot": int(os.environ["STEER_SLOT"]), "pid": os.getpid()}).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
