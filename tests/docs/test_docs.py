"""What the documentation names is there, and what is there it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click
import pytest

from steer import features, values
from steer.cli.main import cli
from steer.config import plan_change, service, sources
from steer.config.servers import SERVERS
from steer.config.socket_options import OPTIONS
from steer.errors import ConfigError
from steer.loader import find
from steer.policy import builtin
from steer.workers.lifecycle import State
from testkit import ROOT, diagrams, pages
from testkit.pages import PAGES

DOCS = ROOT / "docs"

every_policy = pytest.mark.parametrize("name", builtin.POLICIES)


def page(name: str) -> str:
    return (DOCS / "policies" / f"{name}.md").read_text()


def test_a_page_for_every_policy() -> None:
    assert {file.stem for file in (DOCS / "policies").iterdir()} == set(builtin.POLICIES)


@every_policy
def test_page_is_found_and_says_where_the_policy_runs(name: str) -> None:
    assert page(name).startswith(f"# {name}\n")
    assert f"[`{name}`](docs/policies/{name}.md)" in (ROOT / "README.md").read_text()
    assert f"[`{name}`](policies/{name}.md)" in (DOCS / "CHOOSE-A-POLICY.md").read_text()
    found = builtin.POLICIES[name]
    if found.source is not None:
        assert ("`ebpf` only" in page(name)) == (found.assemble is None)


@every_policy
def test_page_names_all_that_the_policy_declares(name: str) -> None:
    declared = find.find(name).declared
    for param in declared.params:
        row = f"| `{param.name}` | {param.default} | {param.least:,} to {param.most:,} |"
        assert row in page(name)
    for each in (*declared.counters, *declared.histograms):
        assert f"| `{each.name}` |" in page(name)
    if not declared.params:
        assert "No parameters" in page(name)


@every_policy
def test_page_has_what_a_choice_costs_as_measured(name: str) -> None:
    cost = page(name).split("\n## Cost\n")[1].split("\n## ")[0]
    rows = re.findall(rf"^\| `{name}`.*$", (DOCS / "BENCH.md").read_text(), re.MULTILINE)
    measured = [row.split("|") for row in rows if row.count(" ns |") == 4]
    assert len(measured) == (name != builtin.KERNEL)
    for _, _, _, few, _, many, *_ in measured:
        for ns in re.findall(r"[\d.]+", few + many):
            assert re.search(rf"(?<![\d.]){re.escape(ns)}(?![\d.]*\d)", cost), ns


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_links_resolve(file: Path) -> None:
    assert not list(pages.broken_links(file))


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("# One\n[a](#one) [b](#two) [c](none.md) [d](page.md#one) `[e](none.md)`\n")
    assert list(pages.broken_links(file)) == ["#two", "none.md"]


def test_a_replaced_word_is_found() -> None:
    assert list(pages.replaced_words("The Fleet. A fleet-footed pool.")) == ["fleet: say pool"]


def test_every_command_is_told_of() -> None:
    text = "".join(file.read_text() for file in PAGES)
    for name in cli.commands:
        assert f"steer {name}" in text, name
    options = (each for each in cli.commands["policy"].params if isinstance(each, click.Option))
    for option in options:
        for spelt in option.opts:
            assert re.search(rf"{spelt}\b", text), spelt


def test_what_cannot_change_live_is_told() -> None:
    words = (DOCS / "RELOAD.md").read_text().split("cannot change while the service runs")[1]
    told = re.findall(r"`(\w+)`", words.partition("the command names")[0])
    assert sorted(told) == sorted(plan_change.FIXED)


def test_every_socket_option_is_told() -> None:
    rows = re.findall(r"^\| (`.+?`) \|", (DOCS / "SOCKETS.md").read_text(), re.MULTILINE)
    assert re.findall(r"`(.+?)`", " ".join(rows)) == list(OPTIONS)


def test_every_known_server_is_told() -> None:
    rows = re.findall(r"^\| (`.+?) \| (SIG\w+) \|", (DOCS / "RELOAD.md").read_text(), re.MULTILINE)
    told = {name: number for names, number in rows for name in re.findall(r"`(.+?)`", names)}
    assert told == {name: server.stop_signal.name for name, server in SERVERS.items()}


def test_life_of_a_worker_is_as_the_table_has_it() -> None:
    text = diagrams.PAGE.read_text()
    assert diagrams.page(text) == text, "write it again: python -m testkit.diagrams"
    states = set(re.findall(r"^\| (\w+) \| ", diagrams.lifecycle(), re.MULTILINE)) - {"state"}
    assert states == {state.value for state in State} - {"gone"}


def test_every_folder_is_on_the_map_and_says_what_belongs_there() -> None:
    told = re.findall(r"^\| `(\w+)/` \|", (DOCS / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    there = [file.parent for file in (ROOT / "steer").glob("*/__init__.py")]
    assert sorted(told) == sorted(folder.name for folder in there)
    for folder in there:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_readme_names_the_kernels_that_are_needed() -> None:
    said = " ".join((ROOT / "README.md").read_text().split())
    for feature in features.FEATURES[features.FEATURES.index(features.RUN) :]:
        assert f"{feature.version} {feature.gives}" in said


def options(command: click.Command) -> set[str]:
    """Of it, and of the commands below it."""
    own = {option for param in command.params for option in param.opts}
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return own.union(*map(options, below))


def test_counts_agree_with_what_is_counted() -> None:
    """Neither "1 workers" nor "worker 1, 2"."""
    assert [values.plural(count, "byte") for count in (0, 1, 2)] == ["0 bytes", "1 byte", "2 bytes"]
    assert [values.several("pid", iter(pids)) for pids in ((7,), (7, 9))] == ["pid 7", "pids 7, 9"]
    always_plural = re.compile(r"""["'(]%d [a-z]+s\b|\{len\([^{}]*\} [a-z]+s\b""")
    for file in (ROOT / "steer").rglob("*.py"):
        assert not always_plural.findall(file.read_text()), file


OF_OTHERS = {
    "--bind",
    "--cap-add",
    "--check",
    "--daemon",
    "--factory",
    "--fd",
    "--force-reinstall",
    "--interface",
    "--net",
    "--no-block",
    "--ready",
    "--replace",
    "--reuse-port",
    "--scope",
    "--worker-class",
}
"""Options of docker, nsenter, pip, systemd-run, servers and our own tools that messages name."""


def test_what_is_said_names_options_that_there_are() -> None:
    known = options(cli) | OF_OTHERS | {"--help"}
    for file in (ROOT / "steer").rglob("*.py"):
        for named in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", file.read_text()):
            assert named in known, (file, named)
    for key in service.FIELDS:
        with pytest.raises(ConfigError) as caught:
            sources.load({key: {}}, {}, {}, "steer.toml")
        source = str(caught.value).partition(": ")[0]
        assert source in known or not source.startswith("--")
