"""What goes wrong with a VM, said as `steer` says it."""

from __future__ import annotations

from steer.errors import SteerError


class VmError(SteerError):
    """No VM, or none such."""
