"""Two network cards on one wire for the guest, one with a receive queue for every CPU.

Their other ends are taps on a bridge, in a network namespace of the VM's own that is gone with it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from functools import cache

from vm.cache import say

_TAP = "script=no,downscript=no,vhost=off"
_WIRES = """set -e
ip link add br0 type bridge
ip link set br0 up
ip tuntap add dev many mode tap multi_queue
ip tuntap add dev single mode tap
for end in many single; do ip link set $end master br0 up; done
exec "$@"
"""


def arguments(queues: int) -> str:
    """For qemu. No option ROM: nothing boots from them."""
    vectors = 2 * queues + 2
    cards = f"""-netdev tap,id=many,ifname=many,{_TAP},queues={queues}
        -device virtio-net-pci,netdev=many,romfile=,mq=on,vectors={vectors}
        -netdev tap,id=single,ifname=single,{_TAP}
        -device virtio-net-pci,netdev=single,romfile="""
    return " ".join(cards.split())


@cache
def can_wire() -> bool:
    """Whether the other ends can be had: it takes /dev/net/tun and a network namespace."""
    done = subprocess.run(_in_namespace(["true"]), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["unshare failed"])[-1]
        say(f"without network cards: {said}")
    return done.returncode == 0


def wired(command: Sequence[str]) -> Sequence[str]:
    """The command, where the other ends are; as it is where they cannot be had."""
    return _in_namespace(command) if can_wire() else command


def _in_namespace(command: Sequence[str]) -> Sequence[str]:
    """Processes have one, too: so that all end with the first of them, however that ends."""
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    ending = ("--pid", "--fork", "--kill-child")
    return ["unshare", *user, "--net", *ending, "sh", "-c", _WIRES, "wires", *command]
