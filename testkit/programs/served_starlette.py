"""A Starlette application as its users write it."""

import os
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route


@asynccontextmanager
async def lifespan(app):
    with open("events", "a") as file:
        file.write(f"started {os.getpid()}\n")
    yield
    with open("events", "a") as file:
        file.write(f"ended {os.getpid()}\n")


async def root(request):
    return JSONResponse({"slot": int(os.environ["STEER_SLOT"]), "pid": os.getpid()})


app = Starlette(routes=[Route("/", root)], lifespan=lifespan)
