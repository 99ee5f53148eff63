"""The controller's log, on standard error: for people as gunicorn's users know it, or as JSON."""

from __future__ import annotations

import logging
import os
import sys
import time

import msgspec


def make(level: str, form: str) -> logging.Logger:
    """The logger.

    Args:
        level: "debug", "info", "warning" or "error".
        form: "text" or "json".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    logger = logging.getLogger("steer")
    logger.setLevel(level.upper())
    logger.handlers = [handler]
    logger.propagate = False
    return logger


class _Text(logging.Formatter):
    """[2026-01-01 00:00:00 +0000] [pid] [INFO] message"""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(record.created))
        return f"[{at}] [{os.getpid()}] [{record.levelname}] {record.getMessage()}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": round(record.created, 3),
            "pid": os.getpid(),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        return msgspec.json.encode(fields).decode()
