"""A run that is killed at any moment goes on to the very bits of the run that was not."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY, TINY_TARGET, as_flags, config, resumed, tensors

import data
import decompose
import eval as evaluation
import run
import train_target
from flags import UserError

# Runs one command in a forked child again and again, as a person would after each crash, and kills it at the given
# moments: (lines that the log has by then, seconds to wait after that). Prints how many kills met a living process.
KILLER = """
import contextlib, importlib, json, os, signal, sys, time
from pathlib import Path
import torch, torch._dynamo, tyro  # imported once, before the forks
torch.set_num_threads(1)
script, folder, moments, begin = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:]
module = importlib.import_module(script)
import run
import cost
cost.report = lambda *args: 0

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
        home, "decompose", "killed", 50, "--dataset=text", "--target=target", "--out=killed", *as_flags(settings)
    )
    once, often = (torch.load(home / name / "state.pt", weights_only=True)["vpd"] for name in ("unharmed", "killed"))
    assert len(tensors(once)) == len(tensors(often)) > 50
    assert all(torch.equal(a, b) for a, b in zip(tensors(once), tensors(often)))
    assert (home / "unharmed/metrics.jsonl").read_text() == (home / "killed/metrics.jsonl").read_text()
    once, often = (json.loads((home / name / "metrics.json").read_text()) for name in ("unharmed", "killed"))
    assert once.pop("seconds") != often.pop("seconds")
    assert once == often
    assert not list((home / "killed").glob("*.tmp"))


@pytest.mark.slow
def test_train_target_killed_ten_times_ends_in_the_same_bits(home):
    settings = TINY_TARGET | dict(steps=150, val_every=1, save_every=1)
    train_target.main(train_target.Config(dataset="text", out="unharmed-target", **settings))
    kill_ten_times(
        home, "train_target", "killed-target", 130, "--dataset=text", "--out=killed-target", *as_flags(settings)
    )
    once, often = (
        torch.load(home / name / "checkpoint.pt", weights_only=True) for name in ("unharmed-target", "killed-target")
    )
    assert all(torch.equal(once["model"][name], often["model"][name]) for name in once["model"])
    assert once["curve"] == often["curve"] and len(once["curve"]) == 150
    assert (home / "unharmed-target/sample.txt").read_text() == (home / "killed-target/sample.txt").read_text()
    assert not (home / "killed-target/state.pt").exists()


@pytest.mark.parametrize("script", [decompose, train_target])
def test_a_run_that_ended_before_its_first_save_has_its_settings_from_config_json(tmp_path, script):
    begun = script.Config(lr=0.5, seed=7)
    run.write_config(tmp_path, begun, torch.device("cpu"))
    assert script.Config(resume=str(tmp_path)).defaults() == dataclasses.replace(begun, resume=str(tmp_path))


@pytest.fixture
def half(home):
    """A finished run of 4 steps, no test's own."""
    if not (home / "half").exists():
        decompose.train(config(out="half", steps=4))
    return "half"


CHANGES = dict(lr=0.1, B=4, T=8, beta_imp=1.0, seed=3, C="*=5", d_ci=32, dataset="elsewhere", target="elsewhere")
CHANGES |= dict(adv_scope="batch", faith_steps=4, shard=True)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_refused_by_name(half, name):
    with pytest.raises(UserError, match=f"^{name}=.*: the run in half has {name}="):
        decompose.train(resumed(half, **{name: CHANGES[name]}))


def test_steps_logging_and_what_helps_when_memory_is_short_may_change(home, capsys):
    decompose.train(config(out="longer", steps=4))
    changes = dict(steps=6, log_every=5, save_every=2, eval_every=6, memory_budget=0.0, compile="auto")
    decompose.train(resumed("longer", **changes))
    assert "resume: 6 steps, not 4: from step 4 on all schedules" in capsys.readouterr().out
    checkpoint = torch.load(home / "longer/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == checkpoint["config"]["steps"] == 6
    rows = [json.loads(line) for line in (home / "longer/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 5, 5] and "val_l0" in rows[-1]


def test_other_tokens_are_refused(half, monkeypatch):
    monkeypatch.setattr(data.Corpus, "digest", "0" * 16)
    changed = (
        "half: its text, 'text', has changed since that run: those in data/text-.* have the digest 0000000000000000"
    )
    with pytest.raises(UserError, match=changed):
        decompose.train(resumed(half, steps=9))


def test_a_run_reduced_to_what_readers_open_cannot_go_on(home, whole):
    (home / "reduced").mkdir()
    for name in ("checkpoint.pt", "config.json", "metrics.jsonl"):
        (home / "reduced" / name).write_bytes((whole / name).read_bytes())
    with pytest.raises(UserError, match="'reduced' holds no state.pt"):
        decompose.train(resumed("reduced", steps=9))


def test_a_folder_that_is_being_written_is_refused(home, half, held):
    with held(home / half), pytest.raises(UserError, match="^half is being written by process 1 on moon: wait until"):
        decompose.train(resumed(half, steps=9))
    with held(home / "taken"), pytest.raises(UserError, match="^taken is being written by process 1 on moon"):
        decompose.train(config(out="taken"))
    with held(home / "taken"), pytest.raises(UserError, match="^taken is being written by process 1 on moon"):
        train_target.main(train_target.Config(dataset="text", out="taken", **TINY_TARGET))


def test_a_run_goes_on_when_its_text_is_gone(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "text", "mine")
    train_target.main(train_target.Config(dataset="mine", out="target", **TINY_TARGET))
    decompose.train(config(dataset="mine", out="run", steps=4))
    shutil.rmtree("mine")
    decompose.train(resumed("run", steps=6))
    opened, corpus = evaluation.open_run("run")
    assert opened.checkpoint["step"] == 6 and corpus.digest == opened.checkpoint["tokens"]
    (Path("data") / opened.checkpoint["tokens_folder"] / "val.bin").unlink()
    with pytest.raises(UserError, match="dataset 'mine' does not exist"):
        evaluation.open_run("run")


def test_the_labels_that_somebody_wrote_stay_when_a_run_is_resumed(home, whole):
    shutil.copytree(whole, home / "labelled")
    labels = home / "labelled" / "labels.jsonl"
    first, *rest = labels.read_text(encoding="utf-8").splitlines()
    name = json.loads(first)["name"]
    labels.write_text("\n".join([json.dumps(json.loads(first) | {"label": "mine"}), *rest]) + "\n", encoding="utf-8")
    decompose.main(resumed("labelled", steps=9, report_tokens=64))
    written = {row["name"]: row["label"] for row in map(json.loads, labels.read_text(encoding="utf-8").splitlines())}
    assert written[name] == "mine"
