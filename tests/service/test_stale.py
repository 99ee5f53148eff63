"""A policy whose headers were edited is compiled again, however it includes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from steer.errors import CompileError, Refused
from steer.loader import compile, find, inputs
from steer.policy.bytecode import Inputs
from testkit.bpf_objects import bpf_ids
from testkit.confine import as_user
from testkit.fixtures import StartService

POLICY = """
#include "steer.h"
%s

STEER_POLICY(ctx, table)
{
	return 0 %s;
}
"""
# Each of these the compiler reads and a reader of "#include" lines does not see.
INCLUDES = {
    "by_macro": '#define BY_MACRO "by_macro.h"\n#include BY_MACRO',
    "comment": '#/* a */include/* comment */"comment.h"',
    "splice": '#inc\\\nlude "spl\\\nice.h"',
    "digraph": '%:include "digraph.h"',
    "next": '#include_next "next.h"',
    "absolute": "#include <{home}/absolute.h>",
    "deeper": '#include "lib/deeper.h"',
}
FILES = {
    "next.h": "#define VALUE_next 1\n",
    "lib/deeper.h": '#include "two.h"\n',
    "lib/two.h": "#define VALUE_deeper 1\n",
    **{f"{name}.h": f"#define VALUE_{name} 1\n" for name in ("by_macro", "comment", "splice")},
    **{f"{name}.h": f"#define VALUE_{name} 1\n" for name in ("digraph", "absolute")},
}


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; and nothing that this process compiled before counts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setattr(compile, "_compiled", {})
    return home / "cache" / "steer"


def write(home: Path, body: str = "", more: str = "") -> Path:
    for name, content in FILES.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(content)
    source = home / "mine.c"
    source.write_text(POLICY % (body.replace("{home}", str(home)), more))
    return source


@pytest.mark.needs("bcc")
def test_every_way_to_include_is_noticed(home: Path, cache: Path) -> None:
    terms = "".join(f"+ VALUE_{name}" for name in INCLUDES)
    source = write(home, "\n".join(INCLUDES.values()), terms)
    first = compile.load(source)
    assert set(compile.read_by(source)) == {home / name for name in FILES}
    before = find.find(str(source))
    assert before.digest == first.digest != compile.digest(source)
    compile._compiled.clear()
    assert compile.load(source) == first, "from the cache"
    for name, content in FILES.items():
        (home / name).write_text(content + "/* edited */\n")
        assert find.find(str(source)) != before, name
        (home / name).write_text(content)
        assert find.find(str(source)) == before, name
    (home / "digraph.h").write_text("#define VALUE_digraph 7\n")
    second = compile.load(source)
    assert second.programs != first.programs
    assert second.digest != first.digest
    assert len(list(cache.iterdir())) == 1, "what is stale is replaced"
    (home / "lib" / "two.h").unlink()
    assert find.find(str(source)).digest != second.digest


@pytest.mark.needs("bcc")
@pytest.mark.parametrize("name", ["steer.h", "lib/lib/two.h", "two.h", "linux/types.h"])
def test_header_that_takes_the_place_of_one_that_was_read(home: Path, name: str) -> None:
    source = write(home, INCLUDES["deeper"])
    first = compile.load(source)
    (home / name).parent.mkdir(exist_ok=True, parents=True)
    (home / name).write_text("")
    assert find.find(str(source)).digest != first.digest


@pytest.mark.needs("bcc")
@pytest.mark.parametrize("way", ["directory", "CPATH", "C_INCLUDE_PATH"])
def test_where_steer_is_started_has_no_part_in_what_is_read(
    home: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What is in the cache would be of one place, and used in another."""
    source = write(home, INCLUDES["deeper"], "+ VALUE_deeper")
    other = home / "other"
    (other / "lib").mkdir(parents=True)
    (other / "lib" / "deeper.h").write_text("#define VALUE_deeper 7\n")
    if way == "directory":
        monkeypatch.chdir(other)
    else:
        monkeypatch.setenv(way, str(other))
    compile.load(source)
    assert set(compile.read_by(source)) == {home / "lib" / "deeper.h", home / "lib" / "two.h"}
    (other / "only.h").touch()
    source.write_text(POLICY % ('#include "only.h"', ""))
    with pytest.raises(CompileError) as caught:
        compile.load(source)
    assert "'only.h' file not found" in caught.value.detail


@pytest.mark.needs("bcc")
def test_what_cannot_be_told_is_not_cached(home: Path, cache: Path) -> None:
    """Whether a header is there that the policy only asks for; what was edited meanwhile."""
    asks = '#if __has_\\\ninclude("tuning.h")\n#include "tuning.h"\n#else\n#define VALUE 1\n#endif'
    source = write(home, asks, "+ VALUE")
    first = compile.load(source)
    assert first.inputs is None
    assert compile.load(source, first.digest) is first, "it is the one that was asked for"
    (home / "tuning.h").write_text("#define VALUE 2\n")
    second = compile.load(source)
    assert second.programs != first.programs
    assert second.digest != first.digest
    assert not cache.exists()
    source = write(home, '#include "next.h"')
    os.utime(home / "next.h")
    later_ns = (home / "next.h").stat().st_ctime_ns - 1
    rule = f"main.o: /virtual/main.c {home}/next.h\n"
    assert compile._inputs(source, rule, later_ns) is None
    assert compile._inputs(source, rule, later_ns + 1) is not None
    assert compile._inputs(source, "", later_ns) is None


def test_a_rule_of_make_is_read_as_clang_writes_it() -> None:
    rule = "main.o: /virtual/main.c include/a.h \\\n  /x/with\\ space.h /x/\\#.h \\\n /x/$$.h\n"
    names = ["/own/include/a.h", "/x/with space.h", "/x/#.h", "/x/$.h"]
    assert inputs.parse(rule, Path("/own")) == [Path(name) for name in names]


def test_inputs_that_cannot_be_read_are_not_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.h").touch()
    content = compile._read_file
    found = Inputs({str(tmp_path / "a.h"): inputs.digest(b"")})
    assert inputs.are_current(found, content)
    assert not inputs.are_current(Inputs({str(tmp_path / "b.h"): ""}), content)
    assert not inputs.are_current(Inputs({}, (str(tmp_path / "a.h"),)), content)


@pytest.mark.needs("bcc", "nobody")
@pytest.mark.parametrize("environment", [{}, {"HOME": ""}, {"HOME": "x"}, {"XDG_CACHE_HOME": "y"}])
def test_no_folder_named_after_a_tilde(home: Path, environment: dict[str, str]) -> None:
    """Nor any other where the service was started; of a user that nobody has told of a home."""
    source = write(home)
    program = "import sys; from pathlib import Path; from steer.loader import compile; "
    program += "print(compile.load(Path(sys.argv[1])).compiler)"
    before = sorted(home.iterdir())
    done = subprocess.run(
        as_user(40_000 + os.getpid() % 20_000, sys.executable, "-c", program, str(source)),
        env={"PATH": os.environ["PATH"], **environment},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("bcc "), done.stderr
    assert sorted(home.iterdir()) == before
    assert not Path("/.cache/steer").exists()


@pytest.mark.needs("bpf", "bcc")
def test_reload_runs_what_the_headers_say_now(service: StartService, home: Path) -> None:
    """And where nothing was edited the program stays, with what it remembers."""
    source = write(home, INCLUDES["by_macro"], "+ VALUE_by_macro")
    running = service("-w", "2", "--policy", str(source))

    def programs() -> set[tuple[str, int]]:
        return {each for each in bpf_ids(running.pid) if each[0] == "prog"}

    before = programs()
    assert before
    running.ask("reload", timeout_s=None)
    assert programs() == before
    (home / "by_macro.h").write_text("#define VALUE_by_macro 0\n")
    running.ask("reload", timeout_s=None)
    assert programs() != before
    (home / "by_macro.h").write_text("#define VALUE_by_macro nonsense\n")
    after = programs()
    with pytest.raises(Refused, match=r"^compile mine\.c: bcc rejects it"):
        running.ask("reload", timeout_s=None)
    assert programs() == after
