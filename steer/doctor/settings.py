"""Checks of the machine's settings."""

from __future__ import annotations

from collections.abc import Iterator

from steer import features
from steer.doctor.case import ASK_AS_ROOT, MIGRATE, MOUNT_SYSFS, Case, Opinion, known, sysctl
from steer.doctor.facts import Unknown
from steer.features import Answer
from steer.policy.builtin import EBPF


def jit(case: Case) -> Iterator[Opinion]:
    if not case.is_steered:
        return
    value = sysctl(case, "net.core.bpf_jit_enable")
    cure = "sysctl -w net.core.bpf_jit_enable=1"
    if value == 0:
        yield Opinion("warn", "0: programs are interpreted, so each selection costs more", cure)
    elif value == 2:
        yield Opinion("warn", "2: the kernel logs all machine code, for debugging", cure)
    else:
        yield Opinion("ok", f"{value}: programs are compiled to machine code")


def syncookies(case: Case) -> Iterator[Opinion]:
    if not case.has_tcp:
        return
    value = sysctl(case, "net.ipv4.tcp_syncookies")
    cure = "sysctl -w net.ipv4.tcp_syncookies=1"
    if value == 0:
        yield Opinion("warn", "0: a SYN flood fills the queues, and connections fail", cure)
    elif value == 2:
        yield Opinion(
            "warn", "2: the program runs twice for each connection, at its SYN and its ACK", cure
        )
    else:
        yield Opinion("ok", f"{value}: cookies are sent only while a queue overflows")


def somaxconn(case: Case) -> Iterator[Opinion]:
    if not case.has_tcp:
        return
    most, backlog = sysctl(case, "net.core.somaxconn"), case.service.backlog
    if backlog > most:
        cure = f"sysctl -w net.core.somaxconn={backlog}, or --backlog {most}"
        yield Opinion("warn", f"{most}: the kernel reduces the backlog, {backlog}, to this", cure)
    else:
        yield Opinion("ok", f"{most}: allows the backlog, {backlog}")


def migrate_req(case: Case) -> Iterator[Opinion]:
    """With a program that migrates, the setting does not matter. Without one the kernel migrates
    if the setting is 1."""
    if not case.has_tcp:
        return
    value = case.facts.sysctls["net.ipv4.tcp_migrate_req"]
    shown = f"could not be read ({value.reason})" if isinstance(value, Unknown) else value
    on_ebpf = known(case.plan, MOUNT_SYSFS).backends[0].backend == EBPF
    if features.MIGRATE.is_newer_than(case.facts.release):
        lost = f"{shown}: this kernel resets connections that wait in a closing worker's queue"
        yield Opinion("warn", lost, features.MIGRATE.cure)
    elif on_ebpf and case.probes[MIGRATE].answer is Answer.YES:
        yield Opinion("ok", f"{shown}: no effect, as the program migrates at any setting")
    elif isinstance(value, Unknown):
        lost = f"{value.reason}: connections in a closing worker's queue may be reset"
        yield Opinion("unknown", lost, ASK_AS_ROOT)
    elif value == 0:
        lost = "0: connections that wait in a closing worker's queue are reset"
        yield Opinion("warn", lost, "sysctl -w net.ipv4.tcp_migrate_req=1, or steer by eBPF")
    else:
        yield Opinion(
            "ok", f"{value}: the kernel moves a closing worker's queue to another, by hash"
        )


def files(case: Case) -> Iterator[Opinion]:
    soft, hard = case.facts.files
    needed = known(case.plan, MOUNT_SYSFS).descriptors
    if hard is not None and hard < needed:
        cure = (
            f"raise it (ulimit -Hn {needed}; systemd: LimitNOFILE={needed}), or run fewer workers"
        )
        yield Opinion("fail", f"{needed} needed, but the hard limit is {hard}", cure)
    elif soft is not None and soft < needed:
        yield Opinion("ok", f"{needed} needed: steer will raise the soft limit, {soft}")
    else:
        yield Opinion("ok", f"{needed} needed, {'no limit' if soft is None else f'limit {soft}'}")


def places(case: Case) -> Iterator[Opinion]:
    places = case.facts.places
    obstacles = [f"{place.directory}: {place.obstacle}" for place in places if place.obstacle]
    usable = [str(place.directory) for place in places if not place.obstacle]
    if usable:
        yield Opinion("ok", "; ".join([usable[0], *obstacles]))
    else:
        yield Opinion(
            "fail", "; ".join(obstacles), "choose another directory with --control-socket PATH"
        )
