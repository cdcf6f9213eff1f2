"""A run that is killed at any moment goes on to the very bits of the run that was not."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_decompose import TINY, TINY_TARGET, config, flags, home, resumed, tensors  # noqa: F401  (home is a fixture)

import data
import decompose
import run
import train_target

# Runs one command in a forked child again and again, as a person would after each crash, and kills it at the given moments:
# (lines that the log has by then, seconds to wait after that). Prints how many of the kills met a living process.
KILLER = """
import contextlib, importlib, json, os, signal, sys, time
from pathlib import Path
import torch, torch._dynamo, tyro  # imported once, before the forks
torch.set_num_threads(1)
script, folder, moments, begin = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:]
module = importlib.import_module(script)
import train_target

def start():
    pid = os.fork()
    if pid == 0:
        sys.argv = [script + ".py", *([f"--resume={folder}"] if (folder / "config.json").exists() else begin)]
        run.run_script(module.main, module.Config, None)
        os._exit(0)
    return pid

def lines():
    with contextlib.suppress(FileNotFoundError):
        return (folder / "metrics.jsonl").read_bytes().count(b"\\n")
    return 0

killed = 0
for wanted, wait in [*moments, (None, None)]:
    pid, status = start(), None
    if wanted is not None:
        while lines() < wanted and os.waitpid(pid, os.WNOHANG)[0] == 0:
            time.sleep(0.001)
        time.sleep(wait)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        _, status = os.waitpid(pid, 0)
    killed += status is not None and os.WIFSIGNALED(status)
print(killed, os.waitstatus_to_exitcode(status))
"""


def kill_ten_times(home: Path, script: str, folder: str, rows: int, *begin: str) -> None:
    """Ten moments: three before the first logged step, seven spread over `rows` lines of the log."""
    rng = random.Random(script)
    moments = [(0, rng.uniform(0, 0.4)) for _ in range(3)] + [
        (1 + int(rows * (i + rng.random()) / 7), rng.uniform(0, 0.02)) for i in range(7)
    ]
    command = [sys.executable, "-c", KILLER, script, folder, json.dumps(moments), *begin]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(decompose.__file__).parent)}
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, env=env)
    assert done.stdout.splitlines()[-1].split() == ["10", "0"], done.stderr


@pytest.mark.slow
def test_decompose_killed_ten_times_ends_in_the_same_bits(home):
    """Every step is saved, so about half of the kills fall into a save."""
    settings = TINY | dict(steps=60, save_every=1)
    decompose.main(config(out="unharmed", **dict(steps=60, save_every=1)))
    kill_ten_times(
        home, "decompose", "killed", 50, "--dataset=text", "--target=target", "--out=killed", *flags(settings)
    )
    once, often = (torch.load(home / run / "checkpoint.pt", weights_only=True)["vpd"] for run in ("unharmed", "killed"))
    assert len(tensors(once)) == len(tensors(often)) > 50
    assert all(torch.equal(a, b) for a, b in zip(tensors(once), tensors(often)))
    assert (home / "unharmed/metrics.jsonl").read_text() == (home / "killed/metrics.jsonl").read_text()
    once, often = (json.loads((home / run / "metrics.json").read_text()) for run in ("unharmed", "killed"))
    assert once.pop("seconds") != often.pop("seconds")
    assert once == often
    assert not list((home / "killed").glob("*.tmp"))


@pytest.mark.slow
def test_train_target_killed_ten_times_ends_in_the_same_bits(home):
    settings = TINY_TARGET | dict(steps=150, val_every=1, save_every=1)
    train_target.main(train_target.Config(dataset="text", out="unharmed-target", **settings))
    kill_ten_times(
        home, "train_target", "killed-target", 130, "--dataset=text", "--out=killed-target", *flags(settings)
    )
    once, often = (
        torch.load(home / run / "checkpoint.pt", weights_only=True) for run in ("unharmed-target", "killed-target")
    )
    assert all(torch.equal(once["model"][name], often["model"][name]) for name in once["model"])
    assert once["curve"] == often["curve"] and len(once["curve"]) == 150
    assert (home / "unharmed-target/sample.txt").read_text() == (home / "killed-target/sample.txt").read_text()
    assert not (home / "killed-target/state.pt").exists()


def test_a_power_cut_before_the_rename_leaves_the_old_file_whole(tmp_path, monkeypatch):
    """The new bytes are settled on the disk before they get the name, and the name after it."""
    events = []
    real_replace, real_fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), real_replace(a, b)))
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("settle"), real_fsync(handle)))
    run.save(tmp_path / "checkpoint.pt", {"kind": "target", "value": 1})
    assert events == ["settle", "rename", "settle"]

    def power_cut(a, b):
        raise SystemError("dark")

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(SystemError):
        run.save(tmp_path / "checkpoint.pt", {"kind": "target", "value": 2})
    assert torch.load(tmp_path / "checkpoint.pt")["value"] == 1


@pytest.mark.parametrize("script", [decompose, train_target])
def test_a_run_that_ended_before_its_first_save_has_its_settings_from_config_json(tmp_path, script):
    begun = script.Config(lr=0.5, seed=7)
    run.write_config(tmp_path, begun, torch.device("cpu"))
    assert script.Config(resume=str(tmp_path)).defaults() == dataclasses.replace(begun, resume=str(tmp_path))


@pytest.fixture(scope="module")
def half(home):
    """A finished run of 4 steps."""
    decompose.main(config(out="half", steps=4))
    return "half"


CHANGES = dict(
    lr=0.1,
    B=4,
    T=8,
    beta_imp=1.0,
    seed=3,
    C="*=5",
    d_ci=32,
    dataset="elsewhere",
    target="elsewhere",
    adv_scope="batch",
    faith_steps=4,
    shard=True,
)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_refused_by_name(half, name):
    with pytest.raises(ValueError, match=f"^{name}=.*: the run in half has {name}="):
        decompose.main(resumed(half, **{name: CHANGES[name]}))


def test_steps_and_logging_may_change(home, half, capsys):
    decompose.main(resumed(half, steps=6, log_every=5, save_every=2))
    assert "resume: 6 steps, not 4: from step 4 on all schedules" in capsys.readouterr().out
    checkpoint = torch.load(home / "half/checkpoint.pt", weights_only=True)
    assert checkpoint["vpd"]["step"] == checkpoint["config"]["steps"] == 6
    assert [json.loads(line)["step"] for line in (home / "half/metrics.jsonl").read_text().splitlines()] == [
        0,
        1,
        2,
        3,
        5,
    ]


def test_other_tokens_are_refused(home, half, monkeypatch):
    monkeypatch.setattr(data.Corpus, "digest", lambda self: "0" * 16)
    with pytest.raises(ValueError, match="the tokens of text-.* are not those of that run"):
        decompose.main(resumed(half, steps=9))


def test_an_unfinished_target_is_finished_by_decompose(home, monkeypatch):
    """The target that decompose.py trains by itself stopped half way: the same command goes on with it."""
    tiny = [(name, type(value), value) for name, value in (TINY_TARGET | dict(dataset="text", save_every=5)).items()]
    monkeypatch.setattr(
        train_target, "Config", dataclasses.make_dataclass("Config", tiny, bases=(train_target.Config,), frozen=True)
    )

    def power_cut(folder, row):
        if row["step"] > 8:
            raise SystemError("dark")
        log_line(folder, row)

    log_line = train_target.log_line
    with monkeypatch.context() as patch:
        patch.setattr(train_target, "log_line", power_cut)
        with pytest.raises(SystemError):
            train_target.main(train_target.Config().defaults())
    corpus = data.load("text")
    assert torch.load(home / f"out/target-{corpus.name}/state.pt", weights_only=True)["step"] == 5
    checkpoint = decompose.target_of(config(target=""), corpus)
    whole = torch.load(home / "target/checkpoint.pt", weights_only=True)
    assert all(torch.equal(whole["model"][key], checkpoint["model"][key]) for key in whole["model"])
    assert checkpoint["curve"] == whole["curve"]
