"""Probes of what this kernel and this process can do. Each tries the feature on a small scale.

`PROBES` has a probe for each of `features.FEATURES`. `ask` runs it and remembers its answer.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping

from steer import abi, features
from steer.errors import KernelError, VerifierError, errno_name
from steer.features import Answer, Feature, Finding
from steer.loader import bpf_maps, programs
from steer.loader.libbpf import Descriptor, NoLibrary
from steer.policy.builtin import CBPF, EBPF
from steer.policy.bytecode import Code
from steer.sockets import group_program, listeners

_PASS = Code(["b700000001000000", "9500000000000000"], {})
"""return SK_PASS"""
_ASKED = Code(["7910300000000000", *_PASS.instructions], {})
"""Reads ctx->migrating_sk, then returns SK_PASS. The attach type alone tells nothing, as a kernel
without migration accepts any (Linux 5.10, bpf_prog_load_check_attach)."""

_NO = (
    errno.EPERM,
    errno.EACCES,
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
)


def run() -> Finding:
    """Can this process wait for others by pidfd, which every backend needs?"""
    try:
        pidfd = os.pidfd_open(os.getpid())
    except OSError as error:
        return _cannot_run(error)
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:  # this process is not its own child, but the call is supported
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
"""The newest kinds of maps: a sockarray (Linux 4.19) and an array that can be mapped (5.5)."""


def ebpf(maps: Iterable[str] = abi.MAPS) -> Finding:
    """Can sk_reuseport programs be loaded and attached, and their maps created?"""
    try:
        for name in maps:
            bpf_maps.Map(name).close()
        with (
            _program(_PASS, abi.BPF_SK_REUSEPORT_SELECT) as program,
            group_program.scratch() as sock,
        ):
            group_program.attach_ebpf(sock.fileno(), program.fileno())
    except KernelError as error:
        release = os.uname().release
        if features.EBPF.is_newer_than(release):
            lacking = f"Linux {release} cannot map arrays into memory"
            return Finding(Answer.NO, lacking, features.EBPF.cure)
        return _finding(error)
    return Finding(Answer.YES)


def migrate() -> Finding:
    """Can a program select where the connections of a closing listener migrate?"""
    try:
        _program(_ASKED, abi.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE).close()
    except KernelError as error:
        if isinstance(error, VerifierError) or error.errno == errno.EINVAL:
            lacking = f"Linux {os.uname().release} cannot migrate connections"
            return Finding(Answer.NO, lacking, features.MIGRATE.cure)
        return _finding(error)
    return Finding(Answer.YES)


def cbpf() -> Finding:
    """Can a classic BPF program be attached? Needs no privilege."""
    try:
        with group_program.scratch() as sock:
            group_program.attach_cbpf(sock.fileno(), [(0x06, 0, 0, 0)])
    except KernelError as error:
        return _finding(error)
    return Finding(Answer.YES)


def borrow() -> Finding:
    """Can a descriptor of another process be duplicated? Tried on this process itself."""
    try:
        with group_program.scratch() as sock:
            os.close(listeners.pidfd_getfd(os.getpid(), sock.fileno()))
    except OSError as error:
        return _finding(KernelError.from_oserror("duplicate a descriptor", error))
    return Finding(Answer.YES)


def count() -> Finding:
    """Can a program be attached to a cgroup by a link? Tried without a program."""
    try:
        programs.Link(Descriptor(-1), -1).close()
    except KernelError as error:
        if error.errno == errno.EINVAL:
            lacking = f"Linux {os.uname().release} has no {features.COUNT.name}"
            return Finding(Answer.NO, lacking, features.COUNT.cure, error.errno)
        if error.errno != errno.EBADF:  # EBADF: supported, but there is no program
            return _finding(error)
    return Finding(Answer.YES)


# ---- answers

PROBES: dict[Feature, Callable[[], Finding]] = {
    features.CBPF: cbpf,
    features.RUN: run,
    features.EBPF: ebpf,
    features.BORROW: borrow,
    features.COUNT: count,
    features.MIGRATE: migrate,
}

_answers: dict[Feature, Finding] = {}
_PASSES = (errno.EPERM, errno.EACCES, errno.ENOENT)
"""Errors that may go away, as permissions and installed libraries can change."""


def ask(feature: Feature) -> Finding:
    """The answer of a feature's probe.

    A yes, and a no because the kernel lacks the feature, are remembered for the life of this
    process. After any other answer the probe runs again next time.
    """
    found = _answers.get(feature)
    if found is None:
        found = PROBES[feature]()
        lacks = found.answer is Answer.NO and found.errno not in _PASSES
        if lacks or found.answer is Answer.YES:
            _answers[feature] = found
    return found


def findings() -> Mapping[str, Finding]:
    """The findings that determine the backend candidates, by backend.

    Raises:
        KernelError: steer can run on no backend here.
    """
    _refuse_to_run()
    return {EBPF: ask(features.EBPF), CBPF: ask(features.CBPF)}


def findings_before_start() -> Mapping[str, Finding]:
    """A faster `findings` for a start that follows at once.

    If a short probe of the best backend succeeds, nothing else is probed. If that backend fails
    during the start, the start itself falls back to the next one.

    Raises:
        KernelError: steer can run on no backend here.
    """
    _refuse_to_run()
    best = ebpf(_NEWEST)
    return {EBPF: best} if best.answer is Answer.YES else findings()


def _refuse_to_run() -> None:
    """Raises KernelError: steer can run on no backend here."""
    found = ask(features.RUN)
    if found.answer is Answer.NO:
        raise KernelError("run workers", found.reason, found.cure, errno=found.errno)


def _program(code: Code, attach_type: int) -> programs.Program:
    return programs.Program("steer_probe", code, {}, attach_type)


def _finding(error: KernelError) -> Finding:
    """A refusal means no. An error such as ENOMEM leaves the answer unknown."""
    sure = error.errno in _NO or isinstance(error, NoLibrary)
    return Finding.of(Answer.NO if sure else Answer.UNKNOWN, error.note)
