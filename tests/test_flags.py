"""flags.py: what a command line makes of a dataclass, and the one line for what does not fit."""

import contextlib
import dataclasses
import math
import os
import sys
from types import SimpleNamespace
from typing import Literal

import pytest

import flags
import run
import train_target
from flags import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    folder: str  # a positional argument
    steps: int = 10
    lr: float = 0.5
    shard: bool = False
    compile: bool | Literal["auto"] = "auto"
    scale: Literal["", "tiny", "laptop"] = ""
    betas: tuple[float, float] = (0.5, 0.9)
    prompt: tuple[str, ...] = ()
    C: str = "*=6"

    def __post_init__(self):
        flags.require(self, "above 0", "steps", "lr")
        if self.C == "bug":
            raise ValueError("two shapes do not fit")


def read(*args):
    return flags.read_flags(Config, "What it does.", ["somewhere", *args])


@pytest.mark.parametrize(
    "args, changed",
    [
        ("", {}),
        ("--steps=3", dict(steps=3)),
        ("--steps 3", dict(steps=3)),
        ("--steps=3 --steps=4", dict(steps=4)),
        ("--lr=1e-3", dict(lr=0.001)),
        ("--shard=True", dict(shard=True)),
        ("--shard=False", dict(shard=False)),
        ("--shard False", dict(shard=False)),
        ("--shard", dict(shard=True)),  # a lone flag, at the end
        ("--shard --lr=1", dict(shard=True, lr=1.0)),  # and before another flag
        ("--compile", dict(compile=True)),
        ("--compile=auto", dict(compile="auto")),
        ("--scale=tiny", dict(scale="tiny")),
        ("--scale=", dict(scale="")),
        ("--betas 0.1 0.2", dict(betas=(0.1, 0.2))),
        ("--prompt=a --prompt=--b", dict(prompt=("a", "--b"))),
        ("--C=*.q=3,*=4", dict(C="*.q=3,*=4")),
    ],
)
def test_flags(args, changed):
    assert read(*args.split()) == dataclasses.replace(Config("somewhere"), **changed)


@pytest.mark.parametrize(
    "args, message",
    [
        ("--setps=3", "unknown flag '--setps=3': did you mean --steps?"),
        ("--setps 3", "unknown flag '--setps': did you mean --steps?"),
        ("--no-shard", "unknown flag '--no-shard': did you mean --shard?"),
        ("--zzzzzzz=3", "unknown flag '--zzzzzzz=3'; --help lists the flags"),
        ("elsewhere", "unknown flag 'elsewhere'; --help lists the flags"),
        ("--steps=many", "--steps=many: must be a whole number"),
        ("--steps many", "--steps=many: must be a whole number"),
        ("--steps=2.5", "--steps=2.5: must be a whole number"),
        ("--steps=1e3", "--steps=1e3: must be a whole number"),
        ("--steps=", "--steps=: must be a whole number"),
        ("--lr=fast", "--lr=fast: must be a number"),
        ("--shard=maybe", "--shard=maybe: must be True or False"),
        ("--shard=1", "--shard=1: must be True or False"),
        ("--compile=maybe", "--compile=maybe: must be True or False or 'auto'"),
        ("--scale=huge", "--scale=huge: must be '', 'tiny', 'laptop'"),
        ("--steps", "--steps needs a value, as in --steps=..."),
        ("--steps --lr=1", "--steps needs a value, as in --steps=..."),
        ("--C", "--C needs a value, as in --C=..."),
        (
            "--lr=1 --steps=many",
            "--steps=many: must be a whole number",
        ),  # not the first flag, but the one that is wrong
        # Of Config itself
        ("--steps=0", "steps=0: must be above 0"),
        ("--lr=nan", "lr=nan: must be above 0"),
        ("--lr -1", "lr=-1.0: must be above 0"),
    ],
)
def test_a_bad_flag_is_named_in_one_line(args, message):
    with pytest.raises(UserError) as error:
        read(*args.split())
    assert str(error.value) == message


@pytest.mark.parametrize("value", ["1", "0.1,0.2", "a b"])
def test_a_bad_list_of_numbers_is_not_said_to_need_text(value):
    with pytest.raises(UserError, match=f"--betas={value.split()[0]}: must be .*number"):
        read("--betas", *value.split())


def test_a_missing_positional_argument(as_a_file):
    with pytest.raises(UserError, match="^tried.py needs FOLDER; --help lists the flags$"):
        flags.read_flags(Config, None, [])


def test_a_bug_of_config_itself_is_no_fault_of_the_flags():
    with pytest.raises(ValueError, match="two shapes do not fit") as error:
        read("--C=bug")
    assert not isinstance(error.value, UserError)


def test_flags_go_on_top_of_a_scale():
    config = flags.read_flags(train_target.Config, None, ["--scale=tiny", "--T=8"])
    assert (config.d_model, config.T, config.steps) == (16, 8, 40)


def test_flags_go_on_top_of_defaults_that_are_found_out():
    config = flags.read_flags(Config, None, ["--steps=3"], lambda: Config("found", steps=7, lr=0.25))
    assert config == Config("found", steps=3, lr=0.25)


def test_help_lists_the_flags_and_ends_well(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "What it does." in printed
    assert all(f"--{field.name}" in printed for field in dataclasses.fields(Config) if field.name != "folder")


def test_no_colours_and_no_boxes_on_a_terminal(as_a_file):
    """One child on a pseudo-terminal: four bad command lines, four lines."""
    pty = pytest.importorskip("pty")
    pid, terminal = pty.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.environ |= {"TERM": "xterm-256color", "FORCE_COLOR": "1"}
            sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
            for args in (["f", "--steps=many"], ["f", "--setps=3"], ["f", "--lr=nan"], []):
                sys.argv = ["tried.py", *args]
                try:
                    run.run_script(lambda config: print("ran"), Config, "What it does.")
                except SystemExit as stop:
                    print(stop.code)
        os._exit(0)
    printed = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while part := os.read(terminal, 10_000):
            printed += part
    os.waitpid(pid, 0)
    assert printed.decode().splitlines() == [
        "error: --steps=many: must be a whole number",
        "error: unknown flag '--setps=3': did you mean --steps?",
        "error: lr=nan: must be above 0",
        "error: tried.py needs FOLDER; --help lists the flags",
    ]


def test_counts_of_patterns():
    assert flags.parse_counts("C", "*.q=64, *.k = 32,*=5") == {"*.q": 64, "*.k": 32, "*": 5}
    for text, message in [
        ("12", "C='12': '12' is not PATTERN=COUNT, as in '[*].q=64,[*].up=248'"),
        ("", "'' is not PATTERN=COUNT"),
        ("*.q=64,", "'' is not PATTERN=COUNT"),
        ("*.q=many", "'[*].q=many' is not PATTERN=COUNT"),
        ("*.q=2.5", "'[*].q=2.5' is not PATTERN=COUNT"),
        ("*.q=64,*.q=65", "gives '[*].q' two counts"),
    ]:
        with pytest.raises(UserError, match=message):
            flags.parse_counts("C", text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2**63, -1, 0])
def test_require(value):
    config = SimpleNamespace(lr=value, B=1)
    with pytest.raises(UserError, match=f"^lr={value}: must be above 0"):
        flags.require(config, "above 0", "B", "lr")
    with pytest.raises(UserError, match="0 or above") if value != 0 else contextlib.nullcontext():
        flags.require(config, "0 or above", "B", "lr")
