"""An application that takes 2 s of CPU to import, and then holds what pandas does.

Both are what a larger site has: the time of thousands of modules, and their memory.
"""

from __future__ import annotations

import time

import pandas as pd

from bench.lifespan import asgi as small

IMPORT_S = 2.0


async def asgi(scope, receive, send):  # type: ignore[no-untyped-def]
    """As the small one. See asgiref's specification of a scope."""
    await small(scope, receive, send)


TABLE = pd.DataFrame({"number": range(10_000)})
while time.process_time() < IMPORT_S:
    TABLE["number"].sum()
