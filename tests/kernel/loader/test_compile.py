"""Getting a policy object: prebuilt, cached, or compiled by bcc in a child process.

`no_child` makes starting any child fail, so what passes with it had none.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import pytest

from steer import abi
from steer.errors import CompileError
from steer.loader import compile
from steer.policy.builtin import EBPF, POLICIES
from steer.policy.bytecode import PolicyObject
from testkit.bpf_objects import OTHER_PROGRAMS
from testkit.confine import NOBODY, as_user
from testkit.harness import Harness

BUILT_IN = [policy.name for policy in POLICIES.values() if policy.source]
POLICY = """
#include "steer.h"

STEER_POLICY(ctx, table)
{
	return %s;
}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "steer"


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_more: Any) -> NoReturn:
        pytest.fail("a child was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.fixture
def no_bcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the Python of the virtual environment is found, which has no bcc."""
    monkeypatch.setattr(compile, "SYSTEM_PYTHON", "/nonexistent/python3")
    monkeypatch.setenv("PATH", "/nonexistent")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A custom policy."""
    file = tmp_path / "own.c"
    file.write_text(POLICY % "ctx->len")
    return file


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of bpf/ to edit, in place of the real one."""
    copy = tmp_path / "bpf"
    shutil.copytree(compile.sources(), copy)
    monkeypatch.setattr(compile, "sources", lambda: copy)
    return copy


# ---- built-in policies


@pytest.mark.needs("bpf", "netns")
@pytest.mark.usefixtures("netns", "no_child")
@pytest.mark.parametrize("policy", BUILT_IN)
def test_built_in_policies_are_ebpf_without_a_compiler(policy: str) -> None:
    with Harness(EBPF, policy, "tcp4").serving() as harness:
        assert sum(harness.count(20).values()) == sum(harness.selected().values()) == 20


@pytest.mark.usefixtures("no_child")
def test_built_in_policies_are_all_prebuilt() -> None:
    names = {file.stem for file in compile.sources().glob("*.c")}
    assert names == {*BUILT_IN, *OTHER_PROGRAMS}
    for name in names:
        made = compile.load(compile.sources() / f"{name}.c")
        assert set(made.programs) == OTHER_PROGRAMS.get(name, {"migrate", "plain"})


@pytest.mark.usefixtures("no_child")
def test_built_in_policies_leave_no_cache(cache: Path) -> None:
    compile.load(compile.sources() / "cpu.c")
    assert not cache.exists()


def is_alike(made: PolicyObject, shipped: PolicyObject) -> bool:
    """The same, if the same compiler made them."""
    if made.compiler == shipped.compiler:
        return made.programs == shipped.programs
    return made.programs.keys() == shipped.programs.keys()


@pytest.mark.needs("bcc")
@pytest.mark.parametrize("name", ["hash.c", "steer.h", "include/linux/types.h"])
def test_edited_source_is_compiled_despite_a_prebuilt_object(
    checkout: Path, cache: Path, name: str
) -> None:
    shipped = compile.load(checkout / "hash.c")
    file = checkout / name
    file.write_text(file.read_text() + "\n/* edited */\n")
    made = compile.load(checkout / "hash.c")
    assert made.digest != shipped.digest
    assert is_alike(made, shipped)
    assert [each.name for each in cache.iterdir()] == [f"{made.digest}.json"]


@pytest.mark.needs("bcc")
def test_broken_prebuilt_object_is_compiled_again(checkout: Path) -> None:
    shipped = compile.load(checkout / "hash.c")
    (checkout / "prebuilt" / "hash.json").write_bytes(b"{}")
    made = compile.load(checkout / "hash.c")
    assert made.digest == shipped.digest
    assert is_alike(made, shipped)


@pytest.mark.usefixtures("no_bcc")
def test_edited_built_in_policy_without_a_compiler(checkout: Path) -> None:
    (checkout / "hash.c").write_text(POLICY % "0")
    with pytest.raises(
        CompileError, match=r"compile hash\.c: bcc is not installed; install it \(Debian"
    ):
        compile.load(checkout / "hash.c")


@pytest.mark.needs("bpf", "bcc")
@pytest.mark.usefixtures("netns")
def test_edited_policy_runs(checkout: Path) -> None:
    """All to the last position."""
    (checkout / "random.c").write_text(POLICY % "table->length - 1")
    with Harness(EBPF, "random", "tcp4", workers=3).serving() as harness:
        assert harness.count(20) == {2: 20}


# ---- the cache


@pytest.mark.needs("bcc")
def test_second_time_no_child_process_is_started(
    source: Path, cache: Path, request: pytest.FixtureRequest
) -> None:
    made = compile.load(source)
    assert made.digest == compile.digest(source)
    assert made.compiler.startswith("bcc ")
    assert PolicyObject.decode((cache / f"{made.digest}.json").read_bytes()) == made
    request.getfixturevalue("no_child")
    assert compile.load(source) == made


@pytest.mark.needs("bcc")
def test_cache_goes_by_content(source: Path, request: pytest.FixtureRequest) -> None:
    first_text = source.read_text()
    first = compile.load(source)
    source.write_text(POLICY % "ctx->hash")
    second = compile.load(source)
    assert second.programs != first.programs
    request.getfixturevalue("no_child")
    elsewhere = source.with_name("elsewhere.c")
    elsewhere.write_text(first_text)
    assert compile.load(elsewhere) == first
    assert compile.load(source) == second


@pytest.mark.needs("bcc")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"digest": 1}', b"\xff"])
def test_broken_cache_is_compiled_again(source: Path, cache: Path, content: bytes) -> None:
    file = cache / f"{compile.digest(source)}.json"
    cache.mkdir(parents=True)
    file.write_bytes(content)
    made = compile.load(source)
    assert PolicyObject.decode(file.read_bytes()) == made
    assert list(cache.iterdir()) == [file]


@pytest.mark.needs("bcc")
def test_cache_with_another_digest_is_compiled_again(source: Path, cache: Path) -> None:
    made = compile.load(source)
    file = cache / f"{made.digest}.json"
    stored = json.loads(file.read_bytes())
    file.write_text(json.dumps({**stored, "digest": "0" * 64}))
    assert compile.load(source) == made


@pytest.mark.needs("root", "bcc")
def test_cache_of_another_user_is_not_trusted(source: Path, cache: Path) -> None:
    made = compile.load(source)
    file = cache / f"{made.digest}.json"
    stored = json.loads(file.read_bytes())
    forged = {**stored, "programs": {}}
    file.write_text(json.dumps(forged))
    assert compile.load(source).programs == {}
    os.chown(file, NOBODY, NOBODY)
    assert compile.load(source) == made
    assert file.stat().st_uid == 0


@pytest.mark.needs("bcc")
@pytest.mark.parametrize("base", ["/proc/nonexistent", "/dev/null"])
def test_cache_that_cannot_be_written(
    source: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    assert compile.load(source).digest == compile.digest(source)


# ---- the compiler


@pytest.mark.needs("bcc")
@pytest.mark.parametrize(
    "returned, message",
    [
        ("nonsense", "error: use of undeclared identifier 'nonsense'"),
        ("ctx->nonsense", "error: no member named 'nonsense' in 'struct sk_reuseport_md'"),
        ("1 +", "error: expected expression"),
    ],
)
def test_compiler_names_file_and_line(source: Path, returned: str, message: str) -> None:
    source.write_text(POLICY % returned)
    with pytest.raises(CompileError) as caught:
        compile.load(source)
    assert caught.value.what == "compile own.c"
    assert f"{source}:6:" in caught.value.detail
    assert message in caught.value.detail


@pytest.mark.needs("bcc")
def test_file_without_a_policy(source: Path) -> None:
    source.write_text('#include "steer.h"\n')
    with pytest.raises(CompileError, match=r"compile own\.c: "):
        compile.load(source)


@pytest.mark.needs("bcc")
def test_map_that_steer_does_not_have(source: Path) -> None:
    source.write_text(POLICY % "*(u32 *)bpf_pseudo_fd(BPF_PSEUDO_MAP_VALUE, 0x57ee00ff)")
    with pytest.raises(CompileError, match=r"uses a map that steer\.h does not have"):
        compile.load(source)


def test_source_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"read .*own\.c: No such file or directory"):
        compile.load(tmp_path / "own.c")


@pytest.mark.parametrize("content, where", [(b"\xff", 0), (b"/* \xe9 */", 3)])
def test_source_that_is_not_utf_8(source: Path, content: bytes, where: int) -> None:
    source.write_bytes(content)
    with pytest.raises(CompileError, match=rf"^read .*own\.c: not UTF-8 at byte {where}$"):
        compile.load(source)


# ---- what a policy declares

DECLARES = """
#include "steer.h"
STEER_PARAM(one, %d, 0, 9, "the first")
STEER_PARAM(two, 2, 0, 9, "the second")
STEER_COUNTER(all, "calls")

STEER_POLICY(ctx, table)
{
	steer_add(all, 1);
	return steer_param(%s);
}
"""


def offsets(made: PolicyObject) -> Counter[int]:
    """Of all that the program reads 4 bytes of, and how often."""
    code = b"".join(bytes.fromhex(line) for line in made.programs["plain"].instructions)
    loads = struct.iter_unpack("=BBhi", code)
    return Counter(offset for insn, _, offset, _ in loads if insn == 0x61)


@pytest.mark.needs("bcc")
def test_names_become_indexes(source: Path) -> None:
    made = {}
    for name in ("one", "two"):
        source.write_text(DECLARES % (1, name))
        made[name] = offsets(compile.load(source))
    first = abi.PARAMS.size - 4 * abi.VALUES
    assert set(made["one"] - made["two"]) == {first}
    assert set(made["two"] - made["one"]) == {first + 4}


@pytest.mark.needs("bcc")
def test_defaults_are_not_in_the_program(source: Path) -> None:
    source.write_text(DECLARES % (1, "one"))
    before = compile.load(source)
    source.write_text(DECLARES % (9, "one"))
    assert compile.load(source).programs == before.programs


@pytest.mark.needs("bcc")
def test_the_compiler_reports_a_name_that_is_not_declared(source: Path) -> None:
    source.write_text(DECLARES % (1, "three"))
    with pytest.raises(CompileError, match=r"^compile own\.c: bcc rejects it") as caught:
        compile.load(source)
    assert f"{source}:10:" in caught.value.detail
    assert "STEER_PARAM_three" in caught.value.detail


def test_wrong_declaration_is_found_without_a_compiler(source: Path) -> None:
    source.write_text(DECLARES % (10, "one"))
    with pytest.raises(CompileError, match=r"^compile own\.c: line 3: the default of one, 10,"):
        compile.load(source)


@pytest.mark.needs("bcc")
def test_source_lines_are_kept_for_custom_policies_only(source: Path) -> None:
    """They translate the verifier's position into a line of C."""
    source.write_text(POLICY % "ctx->len *\n\t\tctx->hash")
    made = compile.load(source)
    assert set(made.lines) == set(made.programs)
    for kind, lines in made.lines.items():
        assert {6, 7} <= set(lines.values())
        assert all(0 <= at < len(made.programs[kind].instructions) for at in lines)
    assert compile.load(source) == made, "as it is read from the cache"
    assert compile.load(compile.sources() / "hash.c").lines == {}


# ---- without a compiler


@pytest.mark.usefixtures("no_bcc")
def test_no_bcc(source: Path) -> None:
    with pytest.raises(CompileError, match=r"compile own\.c: bcc is not installed; install it"):
        compile.load(source)


@pytest.mark.needs("bcc")
def test_compiler_that_does_not_end(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "_TIMEOUT_S", 0.01)
    with pytest.raises(CompileError, match=r"compile own\.c: bcc took longer than 0\.01 s"):
        compile.load(source)


def test_compiler_that_is_killed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example by a resource limit."""
    killed = ["sh", "-c", "kill -KILL $$"]
    monkeypatch.setattr(compile.fork, "run", lambda *_: subprocess.run(killed, check=False))
    with pytest.raises(CompileError, match=r"compile own\.c: bcc was killed by SIGKILL: out of"):
        compile.load(source)


@pytest.mark.needs("bcc", "nobody")
def test_compiling_needs_no_privilege(home: Path) -> None:
    source = home / "own.c"
    source.write_text(POLICY % "ctx->len")
    program = "import sys; from pathlib import Path; from steer.loader import compile; "
    program += "print(compile.load(Path(sys.argv[1])).compiler)"
    done = subprocess.run(
        as_user(NOBODY, sys.executable, "-c", program, str(source)),
        env={**os.environ, "XDG_CACHE_HOME": str(home / "cache"), "HOME": "/nonexistent"},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("bcc "), done.stderr
    [cached] = (home / "cache" / "steer").iterdir()
    assert cached.stat().st_uid == NOBODY
    assert cached.stat().st_mode & 0o077 == 0
