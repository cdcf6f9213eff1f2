"""400 command lines with random values for random flags of every script: each runs, or ends in one line."""

import dataclasses
import random
import sys
import typing

import pytest
import torch
from tiny import TINY, TINY_TARGET, as_flags

import bench.gpu
import bench.models
import bench.plan
import bench.step
import cluster
import decompose
import eval as evaluation
import flags
import run
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
from cost import Cost

NUMBERS = ["0", "1", "2", "3", "-1", "-0.5", "0.3", "0.5", "1.5", "nan", "inf", "-inf", "1e3", "1e-9", "2e30"]
TEXTS = [
    "",
    "x",
    "*",
    "*=2",
    "*.q=1,*.k=3",
    "1,2",
    "0.1,1",
    "nowhere",
    "text",
    "target",
    "fuzzed",
    "~",
    "True",
    "None",
    "é\n",
]
SEEDS = ["18446744073709551616", "9223372036854775807", "-9223372036854775809"]
USUAL = {
    decompose: as_flags(dict(dataset="text", target="target") | TINY | dict(report_tokens=64)),
    train_target: ["--dataset=text", *as_flags(TINY_TARGET)],
    evaluation: ["fuzzed", "--windows=2", "--adv_steps=1"],
    cluster: ["fuzzed", "--tokens=64", "--restarts=1"],
    studies.report: ["fuzzed", "--tokens=64", "--val_prompts=1", "--examples=2"],
    studies.components: ["fuzzed", "--windows=1"],
    studies.terms: ["fuzzed", "--windows=2"],
    studies.export: ["fuzzed", "exported"],
    studies.targeted: ["fuzzed", "--windows=1"],
    studies.dictionaries: [
        "fuzzed",
        "--D=16",
        "--k=2",
        "--steps=1",
        "--windows=2",
        "--tokens=64",
        "--adv_steps=1",
        "--starts=1",
    ],
    studies.sharing: ["fuzzed", "--windows=2", "--steps=1", "--more=2", "--starts=1"],
    studies.circuits: ["fuzzed", "--prompt=import", "--steps=1", "--coefficients=1"],
    studies.forget: ["fuzzed", "--windows=2", "--secrets=4", "--steps=1", "--posthoc_steps=1", "--plt_steps=1"],
    studies.rules: ["fuzzed", "--tokens=64", "--shuffles=19"],
    studies.steer: ["fuzzed", "--windows=4", "--prompts=2"],
    studies.edit: ["fuzzed", "--subcomponent=1.mlp.down:0", "--scale=0", "--windows=4"],
    toys.__main__: ["tms_5-2", "--steps=2", "--restarts=1", "--faith_steps=1"],
    bench.step: ["--steps=1", "--scale=0.1", "--B=1", "--T=4", "--compile=False", "--naive=False"],
    bench.plan: [],
    bench.models: [],
    bench.gpu: ["--tiny=True", "--minutes=0.001", "--out=gpu"],  # no time for any task
}
SLOW_FLAGS = (
    "compile",
    "minutes",
    "shuffles",
    "device",
    "wandb",
    "sweep",
    "size",
    "dataset",
    "data_dir",
)  # minutes, other machines, hubs, folders


def command_line(rng: random.Random, script) -> list[str]:
    fields = [field for field in dataclasses.fields(script.Config) if field.name not in SLOW_FLAGS]
    types = typing.get_type_hints(script.Config)
    args = list(USUAL[script])
    for field in rng.sample(fields, rng.choice((1, 1, 2, 3))):
        kinds = flags.kinds(types[field.name])
        literals = [str(value) for kind in kinds for value in typing.get_args(kind)]
        pool = SEEDS + NUMBERS if field.name == "seed" else NUMBERS if {int, float} & set(kinds) else TEXTS + literals
        value = rng.choice(pool if rng.random() < 0.9 else TEXTS + NUMBERS)
        args = [arg for arg in args if arg.partition("=")[0] != f"--{field.name}"]
        args.append(rng.choice((f"--{field.name}={value}",) * 9 + (f"--{field.name}", f"--{field.name}x={value}")))
    return args


class TwoSteps:
    """Takes the place of run.interruptible: Ctrl-C after two steps, whatever --steps says."""

    def __enter__(self):
        calls = iter([False] + [True] * 10**6)
        return lambda: next(calls)

    def __exit__(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_random_flags_of_every_script_run_or_end_in_one_line(home, monkeypatch, tmp_path, part):
    rng = random.Random(part)
    if not (home / "fuzzed").exists():
        decompose.train(decompose.Config(dataset="text", target="target", out="fuzzed", **TINY))
    monkeypatch.chdir(tmp_path)
    for name in ("text", "target", "fuzzed", "data"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.setattr(run, "interruptible", TwoSteps)
    monkeypatch.setattr(toys.__main__, "train", lambda toy, seed: toy.make())  # untrained: an answer is not asked for
    sizes = dict.fromkeys(("C", "target", "U, V", "Gamma"), 1)
    monkeypatch.setattr(bench.plan, "counted_step", lambda *args: (Cost(1, 1, 1, 1), {}))
    monkeypatch.setattr(bench.plan, "needed_flops", lambda *args: 1)
    monkeypatch.setattr(bench.plan, "counted", lambda *args: (Cost(1, 1, 1, 1), sizes))  # it takes minutes
    sizes_of_models = dict.fromkeys(("weights", "L", "C"), 1)
    monkeypatch.setattr(bench.models, "counted", lambda *args: (Cost(1, 1, 1, 1), sizes_of_models))
    for i in range(50):
        script = rng.choice(list(USUAL))
        args = command_line(rng, script)
        monkeypatch.setattr(sys, "argv", [script.__name__, *args])
        torch.manual_seed(0)
        try:
            run.run_script(script.main, script.Config, script.__doc__, getattr(script, "defaults", None))
        except SystemExit as stop:
            line = stop.code if isinstance(stop.code, str) else ""
            assert stop.code in (None, 0, 130) or (line.startswith("error: ") and "\n" not in line), (
                script.__name__,
                args,
            )
        except BaseException as error:
            raise AssertionError(f"{script.__name__} {args} ended in {type(error).__name__}: {error}") from error
