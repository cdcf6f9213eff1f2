"""Every number that a script can be given, at values that make no sense: refused in one line that names the setting."""

import dataclasses
import typing

import pytest

import bench.frontier
import bench.gpu
import bench.models
import bench.plan
import bench.report
import bench.step
import cluster
import decompose
import eval as evaluation
import flags
import studies.circuits
import studies.components
import studies.dictionaries
import studies.edit
import studies.export
import studies.forget
import studies.report
import studies.rules
import studies.sharing
import studies.steer
import studies.targeted
import studies.terms
import toys.__main__
import train_target
from flags import UserError

SCRIPTS = (
    train_target, decompose, evaluation, cluster, studies.report, studies.components, toys.__main__, bench.plan,
    bench.report, bench.step, bench.frontier, studies.rules, studies.sharing, studies.terms, studies.circuits,
    studies.edit, studies.export, studies.forget, studies.steer, studies.targeted, studies.dictionaries, bench.models,
    bench.gpu,
)  # fmt: skip
SENSELESS = (float("nan"), float("inf"), -float("inf"), -1, 2**64)
FINE = {("gamma", float("inf")), ("gamma", 2**64), ("ci_bias", -1)}  # greedy merging; any number that is not huge
SHARES = {"warmup", "lr_warmup", "lr_end", "adv_warmup", "memory_budget"}  # of something: at most 1
TEXTS = {  # numbers in text
    "adv_steps": ("", "nan", "-1", "1e400", "0", "20,", "2.5", "9" * 5000, str(2**64)),
    "steps": ("", "nan", "0", "20,", "2.5"),
    "more": ("nan", "0", "320,", "2.5"),
    "k": ("", "nan", "-1", "0", "6,", "2.5", "9" * 12),
    "lr": ("nan", "-1", "0", "1", "1e400", "1e-3,"),
    "alpha": ("", "nan", "-1", "1e400", "inf", "10,", "1,nan"),
    "live": ("", "nan", "-1", "1e400", "0", "1000,", "9" * 12),
    "factors": ("", "nan", "-1", "0", "1e400", "1,", "1,1"),
    "coefficients": ("", "nan", "-1", "0", "1e400", "1,", "1,1"),
    "seeds": ("", "nan", "-1", "2.5", "0,", "1,1", str(2**64)),
    "canaries": ("nan", "-1", "1,", "1.5", "1+", "1++2"),
    "C": ("", "nan", "-1", "*=nan", "*=1e400", "*="),
}


def numbers() -> list[tuple]:
    """(script, field, value) for every field that holds numbers and all that it must refuse, and whatever is fine."""
    found = []
    for script in SCRIPTS:
        for field, hint in typing.get_type_hints(script.Config).items():
            kinds = flags.kinds(hint)
            if {int, float} & set(kinds):
                found += [(script, field, value) for value in SENSELESS]
                found += [(script, field, 1.5)] if field in SHARES else [(script, field, 1)] if field == "tau" else []
            elif typing.get_origin(hint) is tuple and float in typing.get_args(hint):  # of 2 numbers, each in [0, 1)
                found += [(script, field, pair) for value in SENSELESS for pair in ((value, 0.9), (0.9, value))]
            elif field in TEXTS and hint is str:
                found += [(script, field, value) for value in TEXTS[field]]
    return found


def test_every_number_is_walked():
    walked = {(script.__name__, field) for script, field, _ in numbers()}
    assert len(walked) > 80 and {
        ("train_target", "adam_betas"), ("decompose", "lr_end"), ("decompose", "C"), ("eval", "adv_steps"),
        ("cluster", "alpha"), ("toys.__main__", "C"), ("bench.step", "memory_budget"), ("bench.report", "live"),
    } <= walked  # fmt: skip


@pytest.mark.parametrize(
    "script, field, value", numbers(), ids=lambda x: getattr(x, "__name__", None) or str(x)[:20] or "empty"
)
def test_senseless_values_are_refused(script, field, value):
    folders = {"run": "somewhere", "runs": ("somewhere",)}
    path = {f.name: folders[f.name] for f in dataclasses.fields(script.Config) if f.name in folders}
    if (field, value) in FINE:
        assert getattr(script.Config(**path | {field: value}), field) == value
        return
    with pytest.raises(UserError) as refused:
        script.Config(**path | {field: value})
    assert str(refused.value).startswith(f"{field}=") and len(str(refused.value).splitlines()) == 1
