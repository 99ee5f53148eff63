"""The limit on open files of the controller, and its spare descriptors."""

from __future__ import annotations

from steer.config.plan import Plan
from steer.linux import descriptors
from steer.linux.spare import Spare

_SPARE = 10
"""How many descriptors the start of a worker needs, beside two for each of its sockets: three pairs
of pipes or sockets, a pidfd, files in /proc, and some in reserve."""


class FileLimit:
    """Raises the limit for one service. Create it before any descriptor of the service is opened.

    Attributes:
        inherited: the limits before they were raised. Workers get these.
        spare: descriptors for what must work even if the limit is reached.

    Raises:
        ConfigError: the hard limit is too low.
    """

    def __init__(self, plan: Plan) -> None:
        self._open_before = descriptors.open_descriptors()
        self.inherited = descriptors.allow_descriptors(self._open_before + plan.descriptors)
        self.spare = Spare(_SPARE + 2 * len(plan.binds))

    def allow(self, plan: Plan) -> None:
        """Raise the limit so that the workers of a changed plan can be started.

        Descriptors that are open now belong to the plan in force. The change adds one generation of
        workers to them.

        Raises:
            ConfigError: the hard limit is too low.
        """
        one_more = descriptors.open_descriptors() + plan.generation_descriptors
        descriptors.allow_descriptors(max(self._open_before + plan.descriptors, one_more))

    def put_back(self) -> None:
        """Restore the inherited limits, before another program is executed in this process."""
        descriptors.limit_descriptors(self.inherited)
