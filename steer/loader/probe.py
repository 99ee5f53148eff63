"""What this kernel and this process can do: found out by doing it in the small."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping

from steer import abi, features
from steer.errors import KernelError, VerifierError, errno_name
from steer.features import Answer, Finding
from steer.loader import bpf_maps, programs
from steer.loader.libbpf import NoLibrary
from steer.policy.bytecode import Code
from steer.sockets import reuseport

_PASS = Code(["b700000001000000", "9500000000000000"], {})
"""return SK_PASS"""
_ASKED = Code(["7910300000000000", *_PASS.instructions], {})
"""Before that, read ctx->migrating_sk. The attach type tells nothing: a kernel that has not got it
takes any (5.10, bpf_prog_load_check_attach)."""

_NOTHING: Mapping[str, Finding] = {}
_NO = (
    errno.EPERM,
    errno.EACCES,
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
)


def run() -> Finding:
    """Can processes be waited for and signalled by descriptor, as we do on every backend?"""
    try:
        pidfd = os.pidfd_open(os.getpid())
    except OSError as error:
        return _cannot_run(error)
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:  # we are no child of ours: it was understood
        return Finding(Answer.YES)
    except OSError as error:
        return _cannot_run(error)
    finally:
        os.close(pidfd)
    return Finding(Answer.YES)


LET_PASS = "let the seccomp filter pass pidfd_open and waitid"


def _cannot_run(error: OSError) -> Finding:
    lacking = f"{features.RUN.name}: {errno_name(error)}"
    if error.errno in (errno.EINVAL, errno.ENOSYS):
        return Finding(Answer.NO, lacking, features.RUN.cure, error.errno)
    if error.errno in _NO:
        return Finding(Answer.NO, lacking, LET_PASS, error.errno)
    return Finding(Answer.UNKNOWN, lacking, errno=error.errno)


_NEWEST = ("sockets", "params")
"""Of `abi.MAPS`, what came last to the kernel: a sockarray (4.19), an array to be mapped (5.5)."""


def ebpf(maps: Iterable[str] = abi.MAPS) -> Finding:
    """Can sk_reuseport programs be loaded and attached, with the maps they need?"""
    try:
        for name in maps:
            bpf_maps.Map(name).close()
        with _program(_PASS, abi.BPF_SK_REUSEPORT_SELECT) as program, reuseport.scratch() as sock:
            reuseport.attach_ebpf(sock.fileno(), program.fileno())
    except KernelError as error:
        release = os.uname().release
        if features.kernel_version(release) < features.EBPF.since:
            lacking = f"Linux {release} cannot map arrays into memory"
            return Finding(Answer.NO, lacking, f"{features.EBPF.version} can")
        return _finding(error)
    return Finding(Answer.YES)


def migrate() -> Finding:
    """Can a program be asked where the queue of a closing listener goes?"""
    try:
        _program(_ASKED, abi.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE).close()
    except KernelError as error:
        if isinstance(error, VerifierError) or error.errno == errno.EINVAL:
            lacking = f"Linux {os.uname().release} has not got it"
            return Finding(Answer.NO, lacking, f"{features.MIGRATE.version} has")
        return _finding(error)
    return Finding(Answer.YES)


def cbpf() -> Finding:
    """Can a classic program be attached? Needs no privilege."""
    try:
        with reuseport.scratch() as sock:
            reuseport.attach_cbpf(sock.fileno(), [(0x06, 0, 0, 0)])
    except KernelError as error:
        return _finding(error)
    return Finding(Answer.YES)


def findings(known: Mapping[str, Finding] = _NOTHING) -> Mapping[str, Finding]:
    """All that the ladder asks for, by backend.

    Args:
        known: what was found before: what works then works still.

    Raises:
        KernelError: steer can run on no backend here.
    """
    if not known:
        found = run()
        if found.answer is Answer.NO:
            raise KernelError("run workers", found.reason, found.cure, errno=found.errno)
    works = {name for name, found in known.items() if found.answer is Answer.YES}
    probes = {"ebpf": ebpf, "cbpf": cbpf}
    return {name: known[name] if name in works else look() for name, look in probes.items()}


def findings_before_start() -> Mapping[str, Finding]:
    """As `findings`, where what follows from them is done at once: if the best backend holds as
    far as can be seen in a moment, no more is asked. Should it fail all the same, that is why the
    next is tried.

    Raises:
        KernelError: steer can run on no backend here.
    """
    if run().answer is not Answer.NO:
        best = ebpf(_NEWEST)
        if best.answer is Answer.YES:
            return {"ebpf": best}
    return findings()


def _program(code: Code, attach_type: int) -> programs.Program:
    return programs.Program("steer_probe", code, {}, attach_type)


def _finding(error: KernelError) -> Finding:
    """A refusal is a no; running out of something tells nothing."""
    sure = error.errno in _NO or isinstance(error, NoLibrary)
    return Finding.of(Answer.NO if sure else Answer.UNKNOWN, error.note)
