"""bench.frontier: its arithmetic by hand, its numbers against eval.py, and what it runs, skips, resumes and refuses."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from tiny import TINY, as_flags, one_line, tensors

import checkpoints
import cost
import decompose
import eval as evaluation
import run
from bench import frontier
from flags import UserError

TINY_FLAGS = " ".join(["--dataset=text", "--target=target", *as_flags(TINY | {"steps": 6})])


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    monkeypatch.setattr(cost, "counted", lambda make, *_, **options: [cost.Cost(0, 10**6, 100, 0)])


def settings(**changes) -> frontier.Config:
    return frontier.Config(**{"flags": TINY_FLAGS, "windows": 2, "factors": "1", "seeds": "0", **changes})


def a_point(recipe="a", factor=1.0, seed=0, **numbers) -> dict:
    values = {"l0": 10.0, "l0_above_0.1": 5.0, "rounded": 0.4, "stochastic": 0.2, "adversarial": 0.8} | numbers
    more = {"recipe": recipe, "factor": factor, "seed": seed, "steps": 6, "seconds": 7.0, "flops": 2e15}
    return more | values | {"second": values, "starts": [values["adversarial"]] * 3} | numbers


def test_at_equal_l0_by_hand():
    """From (10, 0.4) to (40, 0.1) both fall by 4: at twice 10 the KL is half of 0.4."""
    points = [{"l0": 40, "kl": 0.1}, {"l0": 10, "kl": 0.4}, {"l0": 80, "kl": 0.1}]
    assert frontier.at_l0(points, 20, "kl") == pytest.approx(0.2)
    assert [frontier.at_l0(points, l0, "kl") for l0 in (10, 60, 80)] == pytest.approx([0.4, 0.1, 0.1])
    assert frontier.at_l0(points, 9.9, "kl") is frontier.at_l0(points, 81, "kl") is None
    assert frontier.at_l0([{"l0": 0, "kl": 0.1}], 1, "kl") is None


def test_noise_by_hand():
    """KL 0.4 and 0.6: sd over seeds 0.1 sqrt 2 of 0.5; the second set has a quarter, and a half, more."""
    first = a_point(seed=0, rounded=0.4, second=a_point()["second"] | {"rounded": 0.5}, starts=[1.0, 2.0, 3.0])
    second = a_point(seed=1, rounded=0.6, second=a_point()["second"] | {"rounded": 0.9}, starts=[2.0, 2.0, 2.0])
    found = frontier.noise([first, second])
    assert found["rounded"] == pytest.approx({"sets": (0.25 + 0.5) / 2, "seeds": 0.2 * math.sqrt(0.5) / 0.5})
    assert found["adversarial"] == pytest.approx({"sets": 0, "seeds": 0, "starts": (1 / 2 + 0) / 2})
    assert "seeds" not in frontier.noise([first])["l0"]


def test_table():
    points = [a_point("a", f, s, l0=l0 + s, rounded=kl) for f, l0, kl in ((1, 10, 0.4), (2, 40, 0.1)) for s in (0, 1)]
    points += [a_point("b", f, 0, l0=l0, rounded=kl) for f, l0, kl in ((1, 10, 0.2), (2, 40, 0.05))]
    failed = [{"recipe": "b", "factor": 2.0, "seed": 1, "error": "the total loss is nan"}]
    lines = frontier.table(points, failed, 20.0).splitlines()
    assert lines[0] == "Noise of each measure, in per cent of it (means over runs):"
    row = "| a | 1 | 0, 1 | 10.5 ± 0.7 | 5.0 ± 0.0 | 0.400 ± 0.000 | 0.200 ± 0.000 | 0.800 ± 0.000 | 6 | 7 | 2 |"
    assert row in lines
    assert "| b | 1 of 2 | 0.100 (-50%) | 0.200 (+0%) | 0.800 (+0%) |" in lines  # a, seed 0: 0.2
    assert "beyond its points" in frontier.table(points, [], 100.0)
    assert lines[-1] == "failed: b × 2, seed 1: the total loss is nan"
    widths = [line.count("|") for line in lines if line.startswith("|")]
    assert widths == [5] * 7 + [12] * 6 + [6] * 4


def test_judged_as_eval_does(whole):
    """On the same windows the numbers without chance are eval.py's; the others are near."""
    opened, corpus = evaluation.open_run(whole)
    found = frontier.judged(opened, corpus, 8, 3)
    metrics, _ = evaluation.evaluate(opened, corpus, evaluation.Config(str(whole), windows=8, seed=3, adv_steps="20"))
    assert found["l0"] == pytest.approx(metrics["l0"]["total"])
    assert found["l0_above_0.1"] == pytest.approx(metrics["l0_above_0.1"])
    assert found["rounded"] == pytest.approx(metrics["kl"]["rounded_0.0"], rel=1e-4)
    assert found["stochastic"] == pytest.approx(metrics["kl"]["stochastic"], rel=0.2)
    assert found["adversarial"] == pytest.approx(sum(found["starts"]) / 3)
    assert found["adversarial"] == pytest.approx(metrics["kl"]["adversarial_20"], rel=0.3)
    assert found != frontier.judged(opened, corpus, 8, 4)


def test_the_command(home, monkeypatch, capsys):
    """Two recipes, two weights: ordinary run folders, a table, a figure; once more, and nothing is run or judged."""
    line = ["--recipe=a=", "--recipe=b=--B=4 --steps=5", f"--flags={TINY_FLAGS}", "--factors=1,3", "--seeds=0"]
    monkeypatch.setattr(sys, "argv", ["frontier", *line, "--windows=2", "--out=front", "--at_l0=5"])
    run.run_script(frontier.main, frontier.Config, frontier.__doc__)
    found = json.loads((home / "front/frontier.json").read_text())
    assert [(p["recipe"], p["factor"], p["steps"], p["flops"]) for p in found["points"]] == [
        ("a", 1, 6, 600), ("a", 3, 6, 600), ("b", 1, 5, 500), ("b", 3, 5, 500)]  # fmt: skip
    assert (home / "front/frontier.png").stat().st_size > 20_000 and "## " not in capsys.readouterr().out
    saved = checkpoints.load_checkpoint(home / "front/b/x3-seed0/checkpoint.pt", "decomposition")["config"]
    assert (saved["B"], saved["steps"], saved["seed"]) == (4, 5, 0)
    assert saved["beta_imp"] == pytest.approx(3 * decompose.Config().beta_imp)

    monkeypatch.delattr(decompose, "train")
    monkeypatch.delattr(frontier, "judged")
    run.run_script(frontier.main, frontier.Config, frontier.__doc__)
    assert json.loads((home / "front/frontier.json").read_text()) == found
    refused = r"front/a/x1-seed0 is a run of lr=0.003, not 0.5: give the recipe another name, or --out"
    with pytest.raises(UserError, match=refused):
        frontier.main(settings(recipe=("a=--lr=0.5",), out="front"))


def test_an_interrupted_run_goes_on(home, monkeypatch):
    class Interrupted:
        def __enter__(self):
            stop = iter([False] * 2 + [True] * 99)
            return lambda: next(stop)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(frontier, "point", lambda folder, *_: a_point())
    with monkeypatch.context() as patch:
        patch.setattr(run, "interruptible", Interrupted)
        with pytest.raises(SystemExit, match="130"):
            frontier.main(settings(out="cut"))
    frontier.main(settings(out="cut"))
    frontier.main(settings(out="uncut"))
    once, twice = (checkpoints.load_checkpoint(home / f / "default/x1-seed0/checkpoint.pt", "decomposition")
                   for f in ("cut", "uncut"))  # fmt: skip
    assert once["step"] == 6
    assert all(torch.equal(a, b) for a, b in zip(tensors(once), tensors(twice), strict=True))


def test_the_first_run_finds_the_steps_of_a_recipe(home, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "steps_that_fit", lambda minutes, began, step: asked.append(minutes) or 3 + len(asked))
    monkeypatch.setattr(frontier, "point", lambda folder, *_: a_point())
    both = settings(out="timed", minutes=2.0, recipe=("a=", "b=--B=4"), seeds="0,1")
    frontier.main(both)
    assert asked == [2.0, 2.0]
    steps = {p.parent.name + p.name: frontier.saved_settings(p)["steps"] for p in (home / "timed").glob("*/x*")}
    assert steps == {"ax1-seed0": 4, "ax1-seed1": 4, "bx1-seed0": 5, "bx1-seed1": 5}
    frontier.main(both)
    assert len(asked) == 2
    with pytest.raises(UserError, match="is a run of minutes=2.0, not 3.0"):
        frontier.main(dataclasses.replace(both, minutes=3.0))


def test_a_recipe_that_fails_is_an_answer(home, monkeypatch, capsys):
    def train(config):
        if config.B == 4:
            raise UserError("the total loss is nan at step 3")

    monkeypatch.setattr(decompose, "train", train)
    monkeypatch.setattr(frontier, "point", lambda folder, *_: a_point())
    frontier.main(settings(out="failing", recipe=("a=", "b=--B=4")))
    assert "failed: b × 1, seed 0: the total loss is nan at step 3" in capsys.readouterr().out
    assert [f["recipe"] for f in json.loads((home / "failing/frontier.json").read_text())["failed"]] == ["b"]
    with pytest.raises(UserError, match="no run is finished: the total loss is nan"):
        frontier.main(settings(out="failing-all", recipe=("b=--B=4",)))


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--recipe=a", "recipe='a': must be NAME=flags"),
        ("--recipe=../a=", "must be NAME=flags"),
        ("--recipe=a=--beta_im=1", "recipe='a=--beta_im=1': unknown flag '--beta_im=1': did you mean --beta_imp?"),
        ("--recipe=a=--seed=3", "recipe='a=--seed=3': --seed is not a recipe's to say"),
        ("--recipe=a=--beta_imp=0", "beta_imp=0: there is nothing to vary"),
        ("--recipe=a=--lr='1", "No closing quotation"),
        ("--factors=1,1", "factors='1,1': must be different numbers"),
        ("--factors=nan", "factors='nan': must be different numbers"),
        ("--seeds=-1", "seeds='-1': must be different numbers, as in 0,1,2"),
        ("--minutes=-1", "minutes=-1.0: must be 0 or above"),
        ("--at_l0=0", "at_l0=0.0: must be above 0"),
    ],
)
def test_bad_input_ends_in_one_line(home, flag, message):
    assert message in one_line(frontier, flag)
