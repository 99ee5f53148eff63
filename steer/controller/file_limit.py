"""The limit on open files, and the descriptors that a service keeps to spare."""

from __future__ import annotations

from steer.config.plan import Plan
from steer.linux import descriptors
from steer.linux.spare import Spare

_SPARE = 10
"""Descriptors that the start of a worker takes, beside two for each of its sockets: three pairs,
a pidfd, and what is looked at in /proc; and some to spare."""


class FileLimit:
    """Raised for one service; to be made before anything of it is opened.

    Attributes:
        inherited: the limits as they were; workers get them back.
        spare: lent to what has to be done even if there are no more descriptors.

    Raises:
        ConfigError: the hard limit is too low.
    """

    def __init__(self, plan: Plan) -> None:
        self._open_before = descriptors.open_descriptors()
        self.inherited = descriptors.allow_descriptors(self._open_before + plan.descriptors)
        self.spare = Spare(_SPARE + 2 * len(plan.binds))

    def allow(self, plan: Plan) -> None:
        """Have room for what a changed plan starts, and for what it may start after that.

        What is open by now belongs to the plan in force, and is in that plan's own count already:
        only one more generation comes on top of it.

        Raises:
            ConfigError: the hard limit is lower.
        """
        one_more = descriptors.open_descriptors() + plan.generation_descriptors
        descriptors.allow_descriptors(max(self._open_before + plan.descriptors, one_more))

    def put_back(self) -> None:
        """For the program that is executed in our place."""
        descriptors.limit_descriptors(self.inherited)
