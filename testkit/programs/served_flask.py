"""A Flask application as its users write it: made by a factory."""

import os
import pathlib
import time

from flask import Flask


def create_app():
    app = Flask(__name__)

    @app.get("/")
    def root():
        return {"slot": int(os.environ["STEER_SLOT"]), "pid": os.getpid()}

    @app.get("/stream")
    def stream():
        def lines():
            yield "first\n"
            while not pathlib.Path("go").exists():
                time.sleep(0.01)
            yield "last\n"

        return lines()

    @app.get("/large")
    def large():
        return b"x" * 20_000_000

    return app
