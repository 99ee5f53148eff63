"""Gives the lines of an access log the slot of the worker."""

import logging
import os


class SlotFilter(logging.Filter):
    """Adds `slot` to each record. Logging may be configured before the fork, so it is looked up
    when the record is made."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.slot = os.environ.get("STEER_SLOT", "-")
        return True
