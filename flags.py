"""A frozen dataclass is the command line of a script; what the user can mend is one line.

    config = read_flags(Config, __doc__, sys.argv[1:])

Flags are parsed by tyro. This file says what it does not: which flag is wrong, and what it may be.
"""

import contextlib
import difflib
import io
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields, make_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal


class UserError(ValueError):
    """What the user can mend: a flag, a file, a folder, a data set, a full disk.

    `run_script` prints it as one line. Any other error is a bug of ours and keeps its traceback.
    """


def read_flags(Config: type, doc: str | None, args: list[str], defaults: Callable[[], Any] | None = None) -> Any:
    """The Config that these arguments make. UserError for an unknown flag or a value that does not fit."""
    types = typing.get_type_hints(Config)
    args = [home_expanded(arg) for arg in args]
    args = [f"{arg}=True" if lone and bool in kinds(types.get(arg[2:])) else arg for arg, lone in lone_flags(args)]
    try:
        config, unknown = parse(Config, doc, args, **({"default": defaults()} if defaults else {}))
        if hasattr(config, "defaults"):  # the flags go on top of the settings of a scale, or of the run that is resumed
            config, unknown = parse(Config, doc, args, default=config.defaults())
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        if isinstance(stop.__context__, ValueError):  # of Config itself; a UserError is one
            raise stop.__context__ from None
        raise UserError(what_is_wrong(Config, types, args)) from None
    if unknown:
        flags = ["--" + field.name for field in fields(Config)]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        hint = f": did you mean {near[0]}?" if near else "; --help lists the flags"
        raise UserError(f"unknown flag {unknown[0]!r}{hint}")
    return config


def parse(Config: type, doc: str | None, args: list[str], **default) -> tuple[Any, list[str]]:
    """By tyro, silent but for --help. Booleans are written --compile=False; a flag for a list is given once an item."""
    import tyro

    style = (tyro.conf.FlagConversionOff, tyro.conf.PositionalRequiredArgs, tyro.conf.UseAppendAction)
    with contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(
            Config, args=args, prog=script(), description=doc, config=style, use_underscores=True,
            return_unknown_args=True, **default,
        )  # fmt: skip


def script() -> str:
    """What the user typed to get here: "decompose.py", "-m studies.report"."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return Path(sys.argv[0]).name if spec is None else f"-m {spec.name.removesuffix('.__main__')}"


def home_expanded(arg: str) -> str:
    """--out=~/runs as a shell would hand over --out ~/runs."""
    name, equals, value = arg.partition("=")
    return name + equals + os.path.expanduser(value) if name.startswith("--") else os.path.expanduser(arg)


def lone_flags(args: list[str]) -> list[tuple[str, bool]]:
    """Each argument, and whether it is a flag without any value."""
    follows = [*args[1:], "--"]
    return [
        (arg, arg.startswith("--") and "=" not in arg and next_.startswith("--")) for arg, next_ in zip(args, follows)
    ]


def kinds(annotation: Any) -> tuple:
    """The members of a union: bool | Literal["auto"] to (bool, Literal["auto"])."""
    return typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, UnionType) else (annotation,)


def what_is_wrong(Config: type, types: dict[str, Any], args: list[str]) -> str:
    """Why the arguments make no Config: the first flag that does not parse by itself, or a missing argument."""
    names = {int: "a whole number", float: "a number", bool: "True or False"}
    for i, arg in enumerate(args):
        name, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or name not in types:
            continue
        if not equals and (i + 1 == len(args) or args[i + 1].startswith("--")):
            return f"--{name} needs a value, as in --{name}=..."
        one = make_dataclass("One", [(name, types[name])])
        one.__annotations__[name] = types[name]
        try:
            parse(one, None, [value if equals else args[i + 1]])
        except SystemExit:
            allowed = []
            for kind in kinds(types[name]):
                inside = typing.get_args(kind)
                if typing.get_origin(kind) is Literal:
                    allowed.append(", ".join(map(repr, inside)))
                elif typing.get_origin(kind) is tuple:
                    allowed.append(f"{len(inside)} numbers, as in --{name} 0.1 0.2")
                else:
                    allowed.append(names.get(kind, "text"))
            return f"--{name}={value if equals else args[i + 1]}: must be {' or '.join(allowed)}"
    missing = [field.name.upper() for field in fields(Config) if field.default is field.default_factory is MISSING]
    return f"{script()} needs {', '.join(missing)}; --help lists the flags" if missing else "--help lists the flags"


def parse_counts(name: str, text: str) -> dict[str, int]:
    """'*.q=64,*.k=64' to {pattern: count}. UserError, with the flag's name, for anything else."""
    counts = {}
    for pair in text.split(","):
        pattern, equals, count = pair.rpartition("=")
        if not equals or not count.strip().isdecimal() or not 0 < int(count[:20]) < 2**31:
            raise UserError(f"{name}={text!r}: {pair!r} is not PATTERN=COUNT, as in '*.q=64,*.up=248'")
        if counts.setdefault(pattern.strip(), int(count)) != int(count):
            raise UserError(f"{name}={text!r} gives {pattern!r} two counts")
    return counts


def require(config: object, what: Literal["above 0", "0 or above", "between 0 and 1"], *names: str) -> None:
    """UserError, with the name and the value, unless each of these numbers is what it must be, and below 2^63.

    `between 0 and 1` takes both ends. nan is refused.
    """
    for name in names:
        value = getattr(config, name)
        fits = {"above 0": value > 0, "0 or above": value >= 0, "between 0 and 1": 0 <= value <= 1}[what]
        if not (abs(value) < 2**63 and fits):
            raise UserError(f"{name}={value}: must be {what}" + (", and below 2^63" if abs(value) >= 2**63 else ""))
