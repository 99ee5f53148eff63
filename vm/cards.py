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
_ENDING = ("--pid", "--fork", "--kill-child")
_WIRES = """set -e
ip link add br0 type bridge
ip link set br0 up
ip tuntap add dev many mode tap {multi_queue}
ip tuntap add dev single mode tap
for end in many single; do ip link set $end master br0 up; done
exec "$@"
"""


def arguments(queues: int) -> str:
    """For qemu. No option ROM: nothing boots from them."""
    taps, card = "", ""
    if queues > 1:
        taps, card = f",queues={queues}", f",mq=on,vectors={2 * queues + 2}"
    cards = f"""-netdev tap,id=many,ifname=many,{_TAP}{taps}
        -device virtio-net-pci,netdev=many,romfile={card}
        -netdev tap,id=single,ifname=single,{_TAP}
        -device virtio-net-pci,netdev=single,romfile="""
    return " ".join(cards.split())


@cache
def can_wire() -> bool:
    """Whether the other ends can be had: it takes /dev/net/tun and a network namespace."""
    tried = _on_wires(["true"], 2)
    done = subprocess.run(tried, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["unshare failed"])[-1]
        say(f"without network cards: {said}")
    return done.returncode == 0


def wired(command: Sequence[str], queues: int) -> Sequence[str]:
    """The command where the other ends are, if they can be had; always with a namespace for its
    processes, so that all end with the first of them, however that ends."""
    return _on_wires(command, queues) if can_wire() else _unshare(*_ENDING, *command)


def _on_wires(command: Sequence[str], queues: int) -> Sequence[str]:
    # qemu opens a tap as one of several queues only where it is to have several.
    wires = _WIRES.format(multi_queue="multi_queue" if queues > 1 else "")
    return _unshare("--net", *_ENDING, "sh", "-c", wires, "wires", *command)


def _unshare(*arguments: str) -> Sequence[str]:
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    return ["unshare", *user, *arguments]
