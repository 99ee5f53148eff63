"""The ASGI app once more, for those who have to wait for it: its import sleeps and computes for so
many seconds as the environment says."""

from __future__ import annotations

import os
import time

from bench.apps import asgi

__all__ = ["asgi"]
SLEEP, BUSY = "BENCH_IMPORT_SLEEP_S", "BENCH_IMPORT_BUSY_S"

time.sleep(float(os.environ.get(SLEEP, "0")))
_until_s = time.process_time() + float(os.environ.get(BUSY, "0"))
while time.process_time() < _until_s:
    pass
