"""A running service, for Python programs: `steer.connect`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from steer.api import arguments
from steer.config.service import MAX_WEIGHT
from steer.control import client, find, outcomes, schema
from steer.errors import ControlError
from steer.policy.builtin import CUSTOM_SUFFIX

_POLICIES = "the name of a policy, or the path of a C file"
_T = TypeVar("_T", bound=outcomes.Outcome)


def connect(name: str | None = None, *, control_socket: str | None = None) -> ServiceConnection:
    """Find a running service and connect to it.

    Args:
        name: the name of the service; not needed if only one runs.
        control_socket: the path of its control socket, instead of a name.

    Raises:
        NotRunning: no service runs, or no service has that name.
        ControlError: several run and no name was given.
    """
    return ServiceConnection(find.locate(name, control_socket, os.environ))


class ServiceConnection:
    """One running service. Every method waits until the service has finished the operation.

    Use it as a context manager, or `close` it. It may be used by one thread at a time. If the
    service's controller is replaced meanwhile (a new steer with the same name), it connects again.

    Every method raises:
        NotRunning: the service has ended.
        Refused: the service could not do it, and nothing has changed. The subclass `Orphaned`
            means that the service has no controller now.
        ControlError: the service did not answer.
        ConfigError: an argument is not of its type.
    """

    def __init__(self, path: Path) -> None:
        self.control_socket = path
        self._connections = client.Connections()

    @property
    def name(self) -> str:
        """The name of the service, taken from the file name of its control socket."""
        return self.control_socket.stem

    def status(self) -> schema.Service:
        """The status of the service, as `steer status --json` prints it."""
        return client.status(self.control_socket, self._connections).services[0]

    def reload(self) -> outcomes.Reloaded:
        """Start workers with the current configuration; old workers finish and exit."""
        return self._perform("reload", outcomes.Reloaded)

    def scale(self, workers: int) -> outcomes.Scaled:
        """Set the number of workers, 1 to 1024."""
        count = self._number("scale", "workers", workers)
        return self._perform("scale", outcomes.Scaled, workers=count)

    def set_policy(
        self,
        policy: str,
        params: Mapping[str, int] | None = None,
        weights: Sequence[int] | None = None,
    ) -> outcomes.Swapped:
        """Switch the policy, atomically; no connection is lost or misrouted.

        Args:
            policy: a built-in's name, or the path of a C file.
            params: the parameters of the policy, by name. None: unchanged if the policy stays the
                same, else the defaults.
            weights: one for each worker; None: unchanged.
        """
        act = f"policy {self.name}"
        if arguments.string("policy", policy, act, _POLICIES).endswith(CUSTOM_SUFFIX):
            policy = os.path.abspath(policy)
        pairs = None if params is None else arguments.parameters(params, act)
        shares = None if weights is None else arguments.weights(weights, act, MAX_WEIGHT)
        return self._perform(
            "policy", outcomes.Swapped, policy=policy, params=pairs, weights=shares
        )

    def drain(self, slot: int) -> outcomes.Drained:
        """Stop sending new connections to the worker in the slot."""
        return self._perform("drain", outcomes.Drained, slot=self._number("drain", "slot", slot))

    def undrain(self, slot: int) -> outcomes.Drained:
        """Send new connections to the worker in the slot again."""
        number = self._number("undrain", "slot", slot)
        return self._perform("undrain", outcomes.Drained, slot=number)

    def restart(self, slot: int) -> outcomes.Restarted:
        """Replace the worker in the slot; it exits once the new one is ready."""
        number = self._number("restart", "slot", slot)
        return self._perform("restart", outcomes.Restarted, slot=number)

    def stop(self, quick: bool = False) -> None:
        """Stop the service and wait until it has ended.

        Args:
            quick: do not wait for open requests.
        """
        client.stop(self.control_socket, quick)

    def close(self) -> None:
        """Close the connection. The service continues to run."""
        self._connections.close()

    def _number(self, command: str, argument: str, value: int) -> int:
        """The value, if it is a whole number. The service checks the range.

        Raises:
            ConfigError
        """
        act = f"{command} {self.name}"
        return arguments.whole_number(argument, value, act, allowed="a whole number")

    def _perform(self, command: str, kind: type[_T], **more: Any) -> _T:
        outcome = client.perform(self.control_socket, command, **more)
        if not isinstance(outcome, kind):
            raise ControlError(f"{command} {self.name}", "answer not understood")
        return outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
