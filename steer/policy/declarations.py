"""The declarations in a policy's C file: table, parameters, counters and histograms. Pure.

The macros expand to nothing in C. Their text is parsed here, and the compiler gets only the
index of each name. So a default or a range is in one place, and changing a value needs no
compiler.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import msgspec

from steer import values as inputs
from steer.errors import CompileError, ConfigError
from steer.values import Invalid, plural

TABLES = ("consistent", "shares", "turns", "cpus", "ring")
"""The kinds of tables; see `builtin.LAYOUTS`."""
MAX_PARAMS = 16
MAX_COUNTERS = 16
MAX_HISTOGRAMS = 4
_MOST = 2**32 - 1


class Param(msgspec.Struct, frozen=True):
    """A number that the policy reads, from `least` to `most`. It can be changed at run time."""

    name: str
    default: int
    least: int
    most: int
    help: str


class Counter(msgspec.Struct, frozen=True):
    """A number that the policy counts up."""

    name: str
    help: str


class Histogram(msgspec.Struct, frozen=True):
    """A distribution that the policy records, in `unit`. Bucket n counts values below 2**n."""

    name: str
    unit: str
    help: str


class Declared(msgspec.Struct, frozen=True):
    """The declarations of one file, in the order in which the program numbers them.

    Args:
        summary: the text after the policy's name in the head comment.
        table: one of TABLES.
    """

    summary: str = ""
    table: str = "consistent"
    params: tuple[Param, ...] = ()
    counters: tuple[Counter, ...] = ()
    histograms: tuple[Histogram, ...] = ()


def parse(text: str, act: str) -> Declared:
    """Parse the declarations in the C text of a policy.

    Args:
        act: the act that errors name, such as "read mine.c".

    Raises:
        CompileError: names the line and the mistake.
    """
    tokens = list(_tokens(text))
    code = [token for token in tokens if token.kind != "comment"]
    found: dict[str, list[Any]] = {name: [] for name in _MACROS}
    is_policy = False
    for index, token in enumerate(code):
        is_policy = is_policy or token.text == "STEER_POLICY"
        if token.text in _MACROS:
            try:
                _declare(found, token.text, _arguments(code[index + 1 :], token.text))
            except ValueError as error:
                raise CompileError(act, f"line {token.line}: {error}") from None
    if not is_policy:
        raise CompileError(act, "no STEER_POLICY in it", "see `steer policies new`")
    return Declared(
        _summary(tokens),
        found["STEER_TABLE"][0] if found["STEER_TABLE"] else TABLES[0],
        tuple(found["STEER_PARAM"]),
        tuple(found["STEER_COUNTER"]),
        tuple(found["STEER_HISTOGRAM"]),
    )


def values(declared: Declared, given: Sequence[str], act: str) -> tuple[int, ...]:
    """The values of all parameters, in the order of their declaration.

    Args:
        given: "NAME=VALUE" for those that differ from their defaults.
        act: the act that errors name.

    Raises:
        ConfigError: names the parameter, the value and the allowed range.
    """
    known = {param.name: param for param in declared.params}
    chosen = {param.name: param.default for param in declared.params}
    named: set[str] = set()
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            allowed = f"allowed: {', '.join(known)}" if known else "this policy has none"
            given_as = f"no parameter {inputs.shown(name)} (of {inputs.shown(text)})"
            hint = inputs.did_you_mean(name, known)
            raise ConfigError(act, given_as, f"{hint} {allowed}".strip())
        if name in named:
            raise ConfigError(act, f"parameter {name} is given twice", "give it once")
        named.add(name)
        chosen[name] = _value(known[name], value, act)
    return tuple(chosen.values())


def defines(declared: Declared) -> list[str]:
    """Flags that give the compiler the index of each name, for steer_param(name) and others."""
    kinds: Mapping[str, Sequence[Param | Counter | Histogram]] = {
        "PARAM": declared.params,
        "COUNTER": declared.counters,
        "HISTOGRAM": declared.histograms,
    }
    return [
        f"-DSTEER_{kind}_{each.name}={index}"
        for kind, all_of_it in kinds.items()
        for index, each in enumerate(all_of_it)
    ]


def _value(param: Param, text: str, act: str) -> int:
    try:
        return inputs.whole_number(text.strip(), param.least, param.most)
    except Invalid:
        raise ConfigError(
            act,
            f"parameter {param.name} = {inputs.shown(text)}",
            f"allowed: whole numbers from {param.least} to {param.most}",
        ) from None


# ---- tokens


class _Token(msgspec.Struct, frozen=True):
    kind: str
    text: str
    line: int


_TOKEN = re.compile(
    r"""(?P<comment>/\*.*?(?:\*/|\Z)|//(?:\\\n|[^\n])*)
    |(?P<string>"(?:\\.|[^"\\\n])*")
    |(?P<character>'(?:\\.|[^'\\\n])*')
    |(?P<word>\w+)
    |(?P<space>\s+|\\\n)
    |(?P<other>.)""",
    re.DOTALL | re.VERBOSE | re.ASCII,
)


def _tokens(text: str) -> Iterator[_Token]:
    line = 1
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "space":
            yield _Token(match.lastgroup or "", match.group(), line)
        line += match.group().count("\n")


def _summary(tokens: Sequence[_Token]) -> str:
    """The text after "name - " in the comments before any code."""
    for comment in takewhile(lambda token: token.kind == "comment", tokens):
        found = re.search(r"^[\s/*]*[\w.-]+ - (.+?)\.?[\s*/]*$", comment.text, re.MULTILINE)
        if found:
            return found[1]
    return ""


def _arguments(tokens: Sequence[_Token], macro: str) -> list[list[_Token]]:
    """The arguments between the parentheses. Raises ValueError."""
    if not tokens or tokens[0].text != "(":
        raise ValueError(f"{macro} without (...)")
    arguments: list[list[_Token]] = [[]]
    for token in tokens[1:]:
        if token.text == ")":
            return arguments
        if token.text == ",":
            arguments.append([])
        else:
            arguments[-1].append(token)
    raise ValueError(f"{macro} without its closing parenthesis")


# ---- one declaration


def _declare(
    found: dict[str, list[Any]], macro: str, arguments: Sequence[Sequence[_Token]]
) -> None:
    """Add a declaration to `found`. Raises ValueError with the mistake."""
    form = _MACROS[macro]
    if len(arguments) != len(form.readers):
        count = plural(len(arguments), "argument")
        raise ValueError(f"{macro} is given {count}; write {macro}{form.usage}")
    made = form.make(*(read(each) for read, each in zip(form.readers, arguments, strict=True)))
    if len(found[macro]) == form.at_most:
        raise ValueError(f"more than {form.at_most} {macro}")
    if macro != "STEER_TABLE" and made.name in {each.name for each in found[macro]}:
        raise ValueError(f"{macro}({made.name}, ...) is declared twice")
    found[macro].append(made)


def _name(tokens: Sequence[_Token]) -> str:
    text = _source(tokens)
    if len(tokens) != 1 or not re.fullmatch(r"[A-Za-z_]\w{0,30}", text, re.ASCII):
        raise ValueError(
            f"{inputs.shown(text)} is not a valid name; allowed: at most 31 letters, digits and '_'"
        )
    return text


def _number(tokens: Sequence[_Token]) -> int:
    text = _source(tokens)
    try:
        value = int(text.rstrip("uUlL"), 0)
    except ValueError:
        value = -1
    if not 0 <= value <= _MOST:
        raise ValueError(f"{inputs.shown(text)} is not a number from 0 to {_MOST}")
    return value


def _words(tokens: Sequence[_Token]) -> str:
    """The text of a string; adjacent literals are joined, as in C."""
    if not tokens or any(token.kind != "string" for token in tokens):
        raise ValueError(f"{inputs.shown(_source(tokens))} is not a string")
    return "".join(re.sub(r"\\(.)", r"\1", token.text[1:-1]) for token in tokens)


def _source(tokens: Sequence[_Token]) -> str:
    return "".join(token.text for token in tokens)


def _table(name: str) -> str:
    if name not in TABLES:
        raise ValueError(f"no table {inputs.shown(name)}; allowed: {', '.join(TABLES)}")
    return name


def _param(name: str, default: int, least: int, most: int, words: str) -> Param:
    if not least <= default <= most:
        raise ValueError(f"the default of {name}, {default}, is not from {least} to {most}")
    return Param(name, default, least, most, words)


class _Form(msgspec.Struct, frozen=True):
    """The syntax of a macro.

    Args:
        readers: one for each argument; each raises ValueError.
        at_most: how often a file may use the macro.
    """

    usage: str
    readers: tuple[Callable[[Sequence[_Token]], Any], ...]
    make: Callable[..., Any]
    at_most: int


_MACROS: Mapping[str, _Form] = {
    "STEER_TABLE": _Form("(kind)", (_name,), _table, 1),
    "STEER_PARAM": _Form(
        '(name, default, least, most, "help")',
        (_name, _number, _number, _number, _words),
        _param,
        MAX_PARAMS,
    ),
    "STEER_COUNTER": _Form('(name, "help")', (_name, _words), Counter, MAX_COUNTERS),
    "STEER_HISTOGRAM": _Form(
        '(name, "unit", "help")', (_name, _words, _words), Histogram, MAX_HISTOGRAMS
    ),
}
