"""What this kernel and this process can do: found out by doing it in the small."""

from __future__ import annotations

import errno
import os

from steer import abi
from steer.bytecode import Code
from steer.errors import KernelError, VerifierError
from steer.kernel import bpf, sockets
from steer.ladder import EBPF_SINCE, Answer, Finding, kernel_version

_PASS = Code(["b700000001000000", "9500000000000000"], {})
"""return SK_PASS"""
_ASKED = Code(["7910300000000000", *_PASS.instructions], {})
"""Before that, read ctx->migrating_sk. The attach type tells nothing: a kernel that has not got it
takes any (5.10, bpf_prog_load_check_attach)."""

_NO = {
    errno.errorcode[code]
    for code in (
        errno.EPERM,
        errno.EACCES,
        errno.EINVAL,
        errno.ENOSYS,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
    )
}


def ebpf() -> Finding:
    """Can sk_reuseport programs be loaded and attached, with the maps they need?"""
    try:
        for name in abi.MAPS:
            bpf.Map(name).close()
        with _program(_PASS, abi.BPF_SK_REUSEPORT_SELECT) as program, sockets.scratch() as sock:
            sockets.attach_ebpf(sock.fileno(), program.fileno())
    except KernelError as error:
        release = os.uname().release
        if kernel_version(release) < EBPF_SINCE:
            return Finding(Answer.NO, f"Linux {release} cannot map arrays into memory; 5.5 can")
        return _finding(error)
    return Finding(Answer.YES)


def migrate() -> Finding:
    """Can a program be asked where the queue of a closing listener goes? Linux 5.14+."""
    try:
        _program(_ASKED, abi.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE).close()
    except KernelError as error:
        if isinstance(error, VerifierError) or error.cause == "EINVAL":
            return Finding(Answer.NO, f"Linux {os.uname().release} has not got it; 5.14 has")
        return _finding(error)
    return Finding(Answer.YES)


def cbpf() -> Finding:
    """Can a classic program be attached? Needs Linux 4.6 and no privilege."""
    try:
        with sockets.scratch() as sock:
            sockets.attach_cbpf(sock.fileno(), [(0x06, 0, 0, 0)])
    except KernelError as error:
        return _finding(error)
    return Finding(Answer.YES)


def findings() -> dict[str, Finding]:
    """All that the ladder asks for, by backend."""
    return {"ebpf": ebpf(), "cbpf": cbpf()}


def _program(code: Code, attach_type: int) -> bpf.Program:
    return bpf.Program("steer_probe", code, {}, attach_type)


def _finding(error: KernelError) -> Finding:
    """A refusal is a no; running out of something tells nothing."""
    sure = error.cause in _NO or error.what.startswith("load libbpf")
    return Finding(Answer.NO if sure else Answer.UNKNOWN, str(error))
