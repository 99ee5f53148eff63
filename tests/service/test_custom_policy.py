"""Policies of one's own: begun, checked, pointed at where they are wrong, run, and set live."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from steer.config.sources import load
from steer.errors import CompileError, ConfigError, VerifierError
from steer.loader import compile, find, verifier
from steer.loader.verifier import Figures
from steer.policy import declarations
from steer.policy.builtin import POLICIES
from steer.policy_tools import check as own
from steer.policy_tools import new
from testkit import ROOT
from testkit.clients import http_get
from testkit.confine import NOBODY
from testkit.fixtures import RunSteer, StartService
from testkit.service import Service, run_steer

GOLDEN = ROOT / "tests" / "golden" / "verifier.json"
HEAD = '/* mine - for a test. */\n#include "steer.h"\n'
TO_SLOT = """
STEER_PARAM(slot, 0, 0, 8191, "everything goes there")
STEER_COUNTER(all, "calls")
STEER_COUNTER(late, "calls since slot is not 0")
STEER_HISTOGRAM(slots, "slots", "chosen")

STEER_POLICY(ctx, table)
{
	if (steer_is_ack(ctx)) /* of a connection that is gone, now and then */
		return steer_to(steer_param(slot));
	steer_add(all, 1);
	if (steer_param(slot))
		steer_add(late, 2);
	steer_record(slots, steer_param(slot));
	return steer_to(steer_param(slot));
}
"""
BIND = ("-b", "127.0.0.1:8080")


@pytest.fixture
def cli(home: Path, environment: dict[str, str]) -> RunSteer:
    def run(*arguments: str, user: int | None = None) -> Any:
        return run_steer(*arguments, environment=environment, cwd=home, user=user)

    return run


@pytest.fixture
def mine(home: Path) -> Path:
    """A policy that sends everything to the slot that its parameter names."""
    return write(home, TO_SLOT)


def write(home: Path, text: str, name: str = "mine.c") -> Path:
    file = home / name
    file.write_text(HEAD + text)
    return file


def policy(body: str) -> str:
    """The body is line 5 of the file."""
    return f"STEER_POLICY(ctx, table)\n{{\n{body}\n}}\n"


# ---- steer policies new


@pytest.mark.needs("bcc", "bpf")
@pytest.mark.parametrize("name", ["mine", "mine.c", "my-2nd_policy.v2"])
def test_a_new_policy_is_whole(cli: RunSteer, home: Path, name: str) -> None:
    done = cli("policies", "new", name)
    stem = name.removesuffix(".c")
    assert done.stdout.splitlines()[0] == f"wrote {stem}.c. Edit it, then try:"
    # What is printed to be tried next does work.
    check = done.stdout.splitlines()[1].split()
    assert check[0] == "steer"
    found = json.loads(cli(*check[1:], "--json").stdout)
    assert (found["name"], found["notes"]) == (stem, [])
    assert [len(found[kind]) for kind in ("params", "counters", "histograms")] == [1, 1, 1]
    assert found["summary"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("hash", "write hash.c: there is a built-in policy hash; give it another name"),
        ("kernel", "write kernel.c: there is a built-in policy kernel"),
        ("a/b", "write a/b.c: 'a/b' cannot be a policy's name; allowed: letters, digits"),
        ("", "write .c: '' cannot be a policy's name"),
        ("x" * 64, "cannot be a policy's name"),
        ("ü", "'ü' cannot be a policy's name"),
        ("there", "write there.c: the file exists; give it another name"),
    ],
)
def test_new_policy_that_cannot_be(cli: RunSteer, home: Path, name: str, words: str) -> None:
    (home / "there.c").write_text("precious")
    done = cli("policies", "new", name)
    assert done.returncode == 1
    assert words in done.stderr
    assert (home / "there.c").read_text() == "precious"


@pytest.mark.needs("nobody")
def test_new_policy_where_nothing_can_be_written(cli: RunSteer, home: Path) -> None:
    home.chmod(0o755)
    done = cli("policies", "new", "mine", user=NOBODY)
    assert done.stderr == "steer: write mine.c: Permission denied\n"


def test_new_policy_as_json(cli: RunSteer) -> None:
    assert json.loads(cli("policies", "new", "mine", "--json").stdout) == {"written": "mine.c"}


# ---- steer policies check


@pytest.mark.needs("bcc", "bpf", "root")
def test_check_says_what_there_is_to_say(cli: RunSteer, mine: Path) -> None:
    found = json.loads(cli("policies", "check", "mine.c", "--json").stdout)
    assert found["summary"] == "for a test"
    assert found["table"] == "consistent"
    assert found["compiler"].startswith("bcc ")
    assert [one["name"] for one in found["counters"]] == ["all", "late"]
    assert found["params"] == [
        {"name": "slot", "default": 0, "least": 0, "most": 8191, "help": "everything goes there"}
    ]
    assert set(found["programs"]) == {"plain", "migrate"}
    for figures in found["programs"].values():
        assert 50 < figures["instructions"] < figures["processed"]
        assert 0 < figures["stack_bytes"] <= 512
    assert 1 < found["cost_ns"] < 10_000


@pytest.mark.needs("bcc", "bpf")
def test_check_prints_it_too(cli: RunSteer, mine: Path) -> None:
    lines = cli("policies", "check", str(mine)).stdout.splitlines()
    assert lines[0] == "mine: for a test"
    for heading in ("verifier", "parameters", "counters", "histograms"):
        assert heading in lines
    assert any(line.split()[:2] == ["slot", "0"] for line in lines)


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "kernel"])
def test_built_in_policies_can_be_checked_too(name: str) -> None:
    found = own.check(name)
    assert found.summary == POLICIES[name].summary
    assert found.programs["migrate"].processed


@pytest.mark.needs("bcc", "bpf", "root")
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "kernel"])
def test_a_copy_of_a_built_in_policy_is_one_of_ones_own(home: Path, name: str) -> None:
    shutil.copy(compile.sources() / f"{name}.c", home / "copy.c")
    checked = own.check(str(home / "copy.c"))
    found = find.find(name)
    assert (checked.table, checked.params) == (found.table, found.declared.params)
    assert "migrate" in checked.programs


@pytest.mark.needs("bcc", "nobody")
def test_check_without_privilege_compiles(cli: RunSteer, mine: Path) -> None:
    done = cli("policies", "check", "mine.c", "--json", user=NOBODY)
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert (found["programs"], found["cost_ns"]) == ({}, None)
    [note] = found["notes"]
    assert note.startswith("not loaded: create BPF map steer_")
    assert "EPERM; needs CAP_BPF: run as root" in note


@pytest.mark.parametrize(
    "file, words",
    [
        ("none.c", "read HOME/none.c: No such file or directory"),
        ("directory.c", "read HOME/directory.c: Is a directory"),
        ("binary.c", "read HOME/binary.c: not UTF-8 at byte 1"),
        ("pipe.c", "read HOME/pipe.c: not a regular file"),
        ("endless.c", "read HOME/endless.c: not a regular file"),
        ("large.c", "read HOME/large.c: larger than 1048576 bytes"),
        ("empty.c", "read HOME/empty.c: no STEER_POLICY in it; see `steer policies new`"),
        ("hash.c", "read HOME/hash.c: there is a built-in policy hash; give it another name"),
        ("a b.c", "read HOME/a b.c: 'a b' cannot be a policy's name"),
        ("nonsense", "policy 'nonsense': unknown; allowed: auto, cpu, round-robin, "),
        ("kernel", "check kernel: it has no program"),
    ],
)
def test_file_that_is_no_policy(cli: RunSteer, home: Path, file: str, words: str) -> None:
    (home / "directory.c").mkdir()
    os.mkfifo(home / "pipe.c")
    (home / "endless.c").symlink_to("/dev/zero")
    (home / "large.c").write_text("/*" + " " * (1 << 20) + "*/")
    (home / "binary.c").write_bytes(b"x\xff")
    for name in ("empty.c", "hash.c", "a b.c"):
        (home / name).touch()
    done = cli("policies", "check", file)
    assert done.returncode == 1
    assert done.stderr.startswith("steer: " + words.replace("HOME", str(home)))


def test_wrong_declaration_is_named_with_its_line(cli: RunSteer, home: Path) -> None:
    write(home, 'STEER_PARAM(slot, 9, 0, 8, "x")\n' + policy("return 0;"))
    done = cli("policies", "check", "mine.c")
    line = f"read {home}/mine.c: line 3: the default of slot, 9, is not from 0 to 8"
    assert (done.returncode, done.stderr) == (1, f"steer: {line}\n")


@pytest.mark.needs("bcc")
@pytest.mark.parametrize(
    "body, error",
    [
        ("return steer_param(percent);", "8: error: use of undeclared identifier 'STEER_PARAM_"),
        # The kernel would refuse these too, and not say where.
        ("return steer_rand();", "8: error: .* function 'steer_rand'"),
        ("u32 i; return steer_to(i);", "24: error: variable 'i' is uninitialized"),
    ],
)
def test_compiler_error_names_the_line(home: Path, body: str, error: str) -> None:
    file = write(home, policy(body))
    with pytest.raises(CompileError) as caught:
        own.check(str(file))
    assert re.search(f"{re.escape(str(file))}:5:{error}", caught.value.detail)


@pytest.mark.needs("bcc")
def test_header_beside_a_policy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From wherever it is compiled."""
    (home / "beside.h").write_text("#define NOBODY 0\n")
    file = write(home, '#include "beside.h"\n' + policy("return NOBODY;"))
    monkeypatch.chdir("/")
    assert own.check(str(file)).compiler
    assert compile.read_by(file) == [home / "beside.h"]


@pytest.mark.needs("bcc")
def test_policy_that_answers_nothing(home: Path) -> None:
    file = write(home, policy(""))
    with pytest.raises(CompileError) as caught:
        own.check(str(file))
    assert f"{file}:6:1: error: non-void function does not return a value" in caught.value.detail


REFUSED = {
    "a packet not looked at first": (
        "u8 *data = ctx->data;\nreturn data[0];",
        "6: return data[0];",
        "compare with ctx->data_end before you read",
    ),
    "beyond the table": (
        "u32 hash = ctx->hash;\nreturn table->entries[hash];",
        "6: return table->entries[hash];",
        "",
    ),
    "one of two fields": (
        "return steer_spread(table, steer_random() & 1 ? ctx->hash : ctx->len);",
        "5: return steer_spread(table, steer_random() & 1 ? ctx->hash : ctx->len);",
        "the compiler has merged two reads of ctx into one; read each into a variable first",
    ),
}


@pytest.mark.needs("bcc", "bpf")
@pytest.mark.parametrize("case", REFUSED)
def test_verifier_error_names_the_line_and_what_would_help(home: Path, case: str) -> None:
    body, line, cure = REFUSED[case]
    file = write(home, policy(body))
    with pytest.raises(VerifierError, match=r"load mine\.c: the kernel's verifier") as caught:
        own.check(str(file))
    assert f"\n{file}:{line}" in caught.value.detail
    assert caught.value.detail.splitlines()[-1].startswith(cure)


@pytest.mark.needs("bcc", "bpf")
def test_whole_log_of_the_verifier_is_shown_if_asked_for(cli: RunSteer, home: Path) -> None:
    """With the line of C and the cure at its end, as they are told without it."""
    write(home, policy("u8 *data = ctx->data;\nreturn data[0];"))
    short = cli("policies", "check", "mine.c").stderr.splitlines()
    whole = cli("policies", "check", "mine.c", "--verbose").stderr.splitlines()
    assert (whole[0], whole[-2:]) == (short[0], short[-2:])
    assert "mine.c:6: return data[0];" in whole[-2]
    assert len(short) < len(whole)
    assert any(line.startswith("  | 0: (") for line in whole)
    assert any(line.startswith("  | processed ") for line in whole)
    assert not any(line.startswith("  | processed ") for line in short)


@pytest.mark.needs("bcc", "bpf")
def test_verifier_error_in_a_function_names_its_line(home: Path) -> None:
    text = (
        "static u32 first(struct sk_reuseport_md *ctx)\n{\n\treturn *(u8 *)ctx->data;\n}\n\n"
        "STEER_POLICY(ctx, table)\n{\n\treturn first(ctx);\n}\n"
    )
    file = write(home, text)
    with pytest.raises(VerifierError) as caught:
        own.check(str(file))
    assert f"\n{file}:5: return *(u8 *)ctx->data;\n" in caught.value.detail


@pytest.mark.needs("bcc", "bpf")
@pytest.mark.parametrize(
    "body",
    [
        # As the compiler would merge them, the verifier refuses both.
        "if (ctx->ip_protocol == 6)\nreturn steer_spread(table, ctx->hash);\n"
        "if (ctx->ip_protocol == 17)\nreturn steer_spread(table, ctx->len);\nreturn 0;",
        "u32 hash = ctx->hash, length = ctx->len;\nsteer_barrier(hash);\nsteer_barrier(length);\n"
        "return steer_spread(table, steer_random() & 1 ? hash : length);",
    ],
)
def test_fields_read_in_branches_are_taken(home: Path, body: str) -> None:
    own.check(str(write(home, policy(body))))


@pytest.mark.parametrize(
    "detail, pointed",
    [
        ("3: (bf) r1 = r2\nbad", "mine.c:3: two"),
        ("7: (bf) r1 = r2\nbad", "mine.c:4: three"),
        ("7: (bf) r1 = r2\ninfinite loop detected at insn 4", "mine.c:3: two"),
        ("0: (bf) r1 = r2\nbad", ""),
        ("nothing of the kind", ""),
        ("3: (bf) r1 = r2\nBPF program is too large. Processed 1000001 insn", "mine.c:3: two"),
    ],
)
def test_pointing(tmp_path: Path, detail: str, pointed: str) -> None:
    file = tmp_path / "mine.c"
    file.write_text("one\n\n  two\nthree\n")
    found = verifier.explain(detail, {2: 3, 5: 4}, file).removeprefix(detail)
    assert found.startswith(f"\n{tmp_path}/{pointed}" if pointed else "")
    assert bool(pointed) == (str(tmp_path) in found)


def test_pointing_into_a_file_that_has_changed(tmp_path: Path) -> None:
    (tmp_path / "mine.c").touch()
    for name in ("mine.c", "gone.c"):
        file = tmp_path / name
        assert verifier.explain("3: (bf) x", {0: 9}, file) == f"3: (bf) x\n{file}:9: "


@pytest.mark.needs("bcc")
def test_lines_are_right_where_the_compiler_warns(home: Path) -> None:
    """What it says stands before the text that the lines are of."""
    file = write(home, policy("u16 *port = ctx->data;\nconst u32 *hash = port;\nreturn !hash;"))
    made = compile.compile_source(file)
    assert set(made.lines["plain"].values()) <= {3, 5, 6, 7}
    assert 3 in made.lines["plain"].values()


@pytest.mark.needs("bcc")
def test_lines_are_kept_with_the_object(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    file = write(home, policy("return steer_spread(table, ctx->hash ^ ctx->len);"))
    made, cached = compile.load(file), compile.load(file)
    assert cached == made
    for kind in ("plain", "migrate"):
        assert set(made.lines[kind].values()) == {3, 5}
        assert max(made.lines[kind]) < len(made.programs[kind].instructions)


def test_built_in_policies_have_no_lines() -> None:
    assert compile.load(compile.sources() / "hash.c").lines == {}


# ---- what the verifier says of the built-in policies


def golden() -> dict[str, dict[str, int]]:
    """Of this kernel, or of the newest that is known."""
    known: dict[str, dict[str, dict[str, int]]] = json.loads(GOLDEN.read_bytes())
    newest = max(known, key=lambda series: [int(part) for part in series.split(".")])
    return known.get(verifier.series(), known[newest])


@pytest.mark.needs("bpf")
def test_built_in_policies_ask_no_more_of_the_verifier() -> None:
    """Mend with: python -m steer.loader.verifier tests/golden/verifier.json"""
    expected, found = golden(), verifier.built_in()
    assert set(found) == set(expected)
    grown = {
        f"{program}: {figure}": (value, getattr(found[program], figure))
        for program, figures in expected.items()
        for figure, value in figures.items()
        if getattr(found[program], figure) > 1.2 * value + 16
    }
    assert grown == {}


@pytest.mark.needs("bpf")
def test_figures_are_written_beside_those_of_other_kernels(tmp_path: Path) -> None:
    file = tmp_path / "new" / "verifier.json"
    assert verifier.main([str(file)]) == 0
    fresh = json.loads(file.read_bytes())
    file.write_text(json.dumps({**fresh, "4.19": {"x": {}}}))
    assert verifier.main([str(file)]) == 0
    assert json.loads(file.read_bytes()) == {**fresh, "4.19": {"x": {}}}
    figures = set(Figures.__struct_fields__) - {"time_us"}
    assert all(set(each) == figures for each in fresh[verifier.series()].values())


def test_figures_without_a_file() -> None:
    assert verifier.main([]) == 2


@pytest.mark.needs("bpf")
def test_all_figures_are_found_in_the_log() -> None:
    code = compile.load(compile.sources() / "hash.c").programs["migrate"]
    with ExitStack() as stack:
        found = verifier.figures("migrate", code, verifier.maps_of([code], stack))
    assert all(msgspec.structs.astuple(found))


# ---- configuration


def test_parameters_are_configured_like_variables() -> None:
    service = load({"params": ("b=2",)}, {"STEER_POLICY": "/mine.c"}, {"params": ["a=1"]}, "x")
    assert (service.policy, service.params) == ("/mine.c", ("b=2",))
    assert load({}, {"STEER_PARAMS": "a=1,b=2"}, {}, "").params == ("a=1", "b=2")
    with pytest.raises(ConfigError, match=r"^--param: params = 'a'.*allowed: NAME=VALUE"):
        load({"params": ("a",)}, {}, {}, "")


@pytest.mark.parametrize("given", ["mine.c", "./mine.c", "sub/../mine.c", "HOME/mine.c"])
def test_relative_policy_is_where_steer_was_started(cli: RunSteer, home: Path, given: str) -> None:
    (home / "steer.toml").write_text('[service]\npolicy = "from-file.c"\n')
    printed = cli("run", "--print-config").stdout
    assert f'policy = "{home}/from-file.c"' in printed
    printed = cli("run", "--print-config", "--policy", given.replace("HOME", str(home))).stdout
    assert f'policy = "{home}/mine.c"' in printed


def test_find() -> None:
    assert find.find("kernel") is POLICIES["kernel"]
    assert [param.name for param in find.find("source").declared.params] == [
        "prefix4",
        "prefix6",
    ]
    with pytest.raises(ConfigError, match="policy 'nonsense': unknown"):
        find.find("nonsense")


def test_found_policy_is_another_when_its_text_is(mine: Path) -> None:
    first = find.find(str(mine))
    assert (first.name, first.source, first.is_custom) == ("mine", str(mine), True)
    assert first == find.find(str(mine))
    mine.write_text(mine.read_text() + "\n")
    assert first != find.find(str(mine))


# ---- running


def ask() -> int:
    """The slot that answered."""
    slot: int = http_get("127.0.0.1", 8080)[1]["slot"]
    return slot


def start(service: StartService, *arguments: str) -> Service:
    return service(*BIND, "-w", "3", *arguments)


@pytest.mark.needs("bcc", "bpf")
def test_policy_of_ones_own_chooses(service: StartService, mine: Path) -> None:
    running = start(service, "--policy", "./mine.c", "--param", "slot=2")
    assert {ask() for _ in range(10)} == {2}
    status = running.status()
    assert (status["policy"], status["backend"]) == ("mine", "ebpf")
    assert status["params"] == {"slot": 2}


@pytest.mark.needs("bcc", "bpf")
def test_what_it_counts_is_shown(service: StartService, mine: Path) -> None:
    running = start(service, "--policy", "./mine.c", "--param", "slot=2")
    for _ in range(7):
        ask()
    status = running.status()
    assert status["counters"] == {"all": 7, "late": 14}
    assert status["histograms"]["slots"]["unit"] == "slots"
    buckets = status["histograms"]["slots"]["buckets"]
    assert [bucket for bucket in buckets if bucket[1]] == [[2, 7]]
    shown = running.steer("status").stdout
    assert "late" in shown
    assert "slots" in shown


@pytest.mark.needs("bcc", "bpf")
def test_parameter_is_changed_live(service: StartService, mine: Path) -> None:
    running = start(service, "--policy", "./mine.c")
    for slot in (0, 1, 2, 0):
        done = running.steer("policy", "./mine.c", "--param", f"slot={slot}")
        assert done.returncode == 0, done.stderr
        assert {ask() for _ in range(5)} == {slot}
    assert running.status()["counters"]["all"] == 20


@pytest.mark.needs("bcc", "bpf")
@pytest.mark.parametrize("answer", ["steer_to(8000)", "4000000000u"])
def test_nonsense_falls_to_live_workers_and_is_counted(
    service: StartService, home: Path, answer: str
) -> None:
    write(home, policy(f"return {answer};"))
    running = start(service, "--policy", "./mine.c")
    assert {ask() for _ in range(20)} <= {0, 1, 2}
    totals = running.status()["totals"]
    assert (totals["selected"], totals["fallback"]) == (20, 20)


@pytest.mark.needs("bcc", "bpf")
@pytest.mark.parametrize("table", declarations.TABLES)
def test_every_table_can_be_had(service: StartService, home: Path, table: str) -> None:
    entry = "0" if table == "turns" else "steer_random() % 2"
    write(home, f"STEER_TABLE({table})\n" + policy(f"return {entry};"))
    running = start(service, "--policy", "./mine.c")
    for _ in range(20):
        ask()
    totals = running.status()["totals"]
    assert (totals["selected"], totals["fallback"]) == (20, 0)


BROKEN = {
    "no file": (None, "No such file or directory"),
    "C": (policy("return nonsense;"), "mine.c:5:8: error: use of undeclared identifier"),
    "the verifier": (policy("return *(u8 *)ctx->data;"), "mine.c:5: return *(u8 *)ctx->data;"),
    "its declarations": ("STEER_TABLE(none)\n" + policy("return 0;"), "line 3: no table 'none'"),
}


@pytest.mark.needs("bcc", "bpf")
@pytest.mark.parametrize("what", BROKEN)
def test_broken_policy_is_refused_and_the_old_one_stays(
    service: StartService, mine: Path, home: Path, what: str
) -> None:
    text, words = BROKEN[what]
    running = start(service, "--policy", "./mine.c", "--param", "slot=1")
    other = home / "other.c"
    if text:
        other.write_text(HEAD + text)
    done = running.steer("policy", "./other.c")
    assert done.returncode == 1
    assert words.replace("mine.c", "other.c") in done.stderr
    assert {ask() for _ in range(5)} == {1}
    assert running.status()["policy"] == "mine"


@pytest.mark.needs("bcc", "bpf")
def test_value_out_of_range_is_refused_and_the_old_one_stays(
    service: StartService, mine: Path
) -> None:
    running = start(service, "--policy", "./mine.c", "--param", "slot=1")
    done = running.steer("policy", "./mine.c", "--param", "slot=8192")
    assert done.returncode == 1
    assert "parameter slot = '8192'; allowed: whole numbers from 0 to 8191" in done.stderr
    assert ask() == 1
    assert running.status()["params"] == {"slot": 1}


@pytest.mark.parametrize("what", ["no file", "its declarations"])
def test_service_with_a_broken_policy_does_not_start(
    steer: RunSteer, home: Path, what: str
) -> None:
    text, words = BROKEN[what]
    if text:
        write(home, text)
    done = steer("run", *BIND, "--policy", "./mine.c")
    assert done.returncode == 1
    assert words in done.stderr


@pytest.mark.needs("bpf", "bcc")
def test_edited_file_takes_effect_when_asked_for(service: StartService, mine: Path) -> None:
    running = start(service, "--policy", "./mine.c")
    assert ask() == 0
    write(mine.parent, policy("return steer_to(2);"))
    assert ask() == 0
    assert running.steer("policy", "./mine.c").returncode == 0
    assert {ask() for _ in range(5)} == {2}


def test_template_is_shipped() -> None:
    """Beside the code, where the wheel has it too."""
    template = Path(new.__file__).with_name("template.c")
    assert "@NAME@ - " in template.read_text()
    assert os.access(template, os.R_OK)
