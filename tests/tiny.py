"""Tiny settings, and small helpers, of the tests that run whole scripts."""

import dataclasses
import sys

import pytest
import torch

import decompose
import run

TINY_TARGET = dict(steps=12, B=4, T=16, d_model=16, n_head=2, d_mlp=32, val_every=4, val_windows=8)
TINY = dict(
    steps=8, B=2, T=16, C="*=6", d_ci=16, n_head_ci=2, d_mlp_ci=16, faith_steps=3, log_every=1, save_every=4,
    eval_windows=2, report_tokens=0, compile=False,
)  # fmt: skip


def as_flags(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def config(**changes) -> decompose.Config:
    return decompose.Config(**(dict(dataset="text", target="target") | TINY | changes))


def resumed(folder: str, **changes) -> decompose.Config:
    """What the command line makes of --resume and other flags."""
    return dataclasses.replace(decompose.Config(resume=folder).defaults(), **changes)


def tensors(tree) -> list[torch.Tensor]:
    """All tensors of nested dictionaries and lists, in a fixed order."""
    if isinstance(tree, dict):
        return [t for key in sorted(tree, key=str) for t in tensors(tree[key])]
    if isinstance(tree, (list, tuple)):
        return [t for item in tree for t in tensors(item)]
    return [tree] if isinstance(tree, torch.Tensor) else []


def one_line(script, *args: str) -> str:
    """The one line with which the script, a module, ends when called with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__ + ".py", *args])
        with pytest.raises(SystemExit) as stop:
            run.run_script(script.main, script.Config, script.__doc__, getattr(script, "defaults", None))
    assert isinstance(stop.value.code, str), f"exit code {stop.value.code}"
    assert len(stop.value.code.splitlines()) == 1 and stop.value.code.startswith("error: "), stop.value.code
    return stop.value.code
