"""The whole run at tiny size: the step, the README's commands and its map, and every bad input of a user."""

import gc
import importlib.machinery
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import TINY, TINY_TARGET, as_flags, config, one_line, resumed, tensors
from torch import nn

import checkpoints
import ci_fn
import data
import decompose
import eval as evaluation
import flags
import losses
import model
import run
import train_target
from bench.naive import NaiveVPD
from flags import UserError

compile_with = torch.compile
ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# A run


def test_run_folder(whole):
    files = {"config.json", "metrics.jsonl", "metrics.json", "checkpoint.pt", "state.pt", "figures", "generations.txt"}
    assert {p.name for p in whole.iterdir()} == files | {"report.html", "labels.jsonl"}
    figures = {"losses.png", "spectrum.png", "importances.png", "ablations.png"}
    assert {p.name for p in (whole / "figures").iterdir()} == figures
    about = json.loads((whole / "config.json").read_text())
    assert about["steps"] == TINY["steps"] and about["versions"]["torch"] == torch.__version__
    assert about["command"] and about["hardware"] and "commit" in about
    rows = [row for row in rows_of(whole) if "total" in row]
    assert [row["step"] for row in rows] == list(range(TINY["steps"]))
    assert rows[0]["p"] == 2.0 and rows[-1]["p"] == pytest.approx(0.4)
    c = config()
    for row in rows:
        terms = c.beta_adv * row["adversarial"] + c.beta_stoch * row["stochastic"] + c.beta_imp * row["importance"]
        total = terms + c.beta_freq * row["frequency"] + c.beta_delta * row["faithfulness"]
        assert row["total"] == pytest.approx(total, rel=1e-4)


def test_short_evaluations_are_rows_of_the_log(whole):
    rows = [row for row in rows_of(whole) if "val_l0" in row]
    assert [row["step"] for row in rows] == [3, 7]  # eval_every = 4
    assert {"val_live", "val_kl_stochastic", "val_kl_rounded", "val_kl_adversarial"} <= set(rows[0])
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_short_evaluations_change_nothing(whole, home):
    decompose.train(config(out="unwatched"))
    watched, unwatched = (
        checkpoints.load_checkpoint(f / "state.pt", "decomposition in training")["vpd"]
        for f in (whole, home / "unwatched")
    )
    assert all(torch.equal(a, b) for a, b in zip(tensors(watched), tensors(unwatched), strict=True))


def test_metrics_json(whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    modes = set(evaluation.MODES)
    assert modes | {"target"} == set(metrics["ce"])
    assert modes | {f"adversarial_{n}{kind}" for n in (20, 80) for kind in ("", "_largest")} == set(metrics["kl"])
    assert modes == set(metrics["ce_unrecovered"]) == set(metrics["compute_recovered"])
    assert metrics["ce_unrecovered"]["zero"] == 1
    assert metrics["l0"]["total"] == pytest.approx(sum(metrics["l0"]["per_matrix"].values()))
    assert metrics["live"]["total"] == sum(metrics["live"]["per_matrix"].values()) <= metrics["live"]["C"] == 12 * 6
    assert set(metrics["hidden_mse"]) == {"stochastic", "ci"}
    assert set(metrics["seconds"]) == {"target", "decompose", "eval"}
    assert all(math.isfinite(value) for part in ("ce", "kl") for value in metrics[part].values())


def test_what_readers_open_has_no_optimiser_and_no_sources(whole):
    read, state = (torch.load(whole / name, weights_only=True) for name in ("checkpoint.pt", "state.pt"))
    assert (read["kind"], read["format"], read["step"]) == ("decomposition", checkpoints.FORMAT, TINY["steps"])
    assert {"config", "C", "gamma", "target", "decomposition", "ci_fn"} <= set(read) and "vpd" not in read
    assert {"optimizer", "adversary", "generators"} <= set(state["vpd"])
    assert all(torch.equal(read["ci_fn"][name], state["vpd"]["ci_fn"][name]) for name in read["ci_fn"])


def test_same_seed_same_numbers(whole, home):
    decompose.main(config(out="again"))
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, home / "again"))
    assert first["ce"] == second["ce"] and first["kl"] == second["kl"]


def five_steps_say_eight(minutes, began, step):
    """Takes the place of run.steps_that_fit."""
    for _ in range(5):
        step()
    return TINY["steps"]


@pytest.mark.parametrize("changes", [{}, {"beta_adv": 0.0}, {"adv_scope": "batch"}, {"adv_fresh": 0.5}])
def test_a_run_in_minutes_is_that_of_the_steps_it_found(home, monkeypatch, changes):
    """The steps that are timed leave no trace: not in the weights, the moments, the sources nor the random state."""
    name = "-".join(map(str, changes.values()))
    decompose.train(config(out=f"in-steps{name}", **changes))
    with monkeypatch.context() as patch:
        patch.setattr(run, "steps_that_fit", five_steps_say_eight)
        decompose.train(config(out=f"in-minutes{name}", minutes=1.5, **changes | {"steps": 5000}))
    folders = home / f"in-steps{name}", home / f"in-minutes{name}"
    once, twice = (checkpoints.load_checkpoint(f / "state.pt", "decomposition in training") for f in folders)
    assert all(torch.equal(a, b) for a, b in zip(tensors(once["vpd"]), tensors(twice["vpd"]), strict=True))
    assert rows_of(folders[0]) == rows_of(folders[1])
    about = json.loads((folders[1] / "config.json").read_text())
    assert (about["steps"], about["minutes"]) == (twice["config"]["steps"], 1.5) == (8, 1.5)


def test_a_resumed_run_in_minutes_keeps_its_steps(home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "steps_that_fit", five_steps_say_eight)
        patch.setattr(run, "interruptible", Interrupted)
        with pytest.raises(SystemExit, match="130"):
            decompose.train(config(out="minutes-halves", minutes=1.5, steps=5000))
    assert resumed("minutes-halves").steps == 8
    with pytest.raises(UserError, match="minutes=3: the run in minutes-halves has minutes=1.5, and on resuming only"):
        decompose.train(resumed("minutes-halves", minutes=3))
    monkeypatch.delattr(run, "steps_that_fit")  # nothing is measured again
    decompose.train(resumed("minutes-halves"))
    decompose.train(config(out="minutes-whole"))
    once, twice = (checkpoints.load_checkpoint(home / f / "checkpoint.pt", "decomposition")
                   for f in ("minutes-whole", "minutes-halves"))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(tensors(once), tensors(twice), strict=True))


def test_minutes_that_are_none(home):
    for value in ("nan", "-1", "inf"):
        shown = f"minutes={float(value)}: must be 0 or above"
        assert shown in one_line(decompose, "--dataset=text", "--target=target", f"--minutes={value}")
    assert "--minutes=soon: must be a number" in one_line(decompose, "--minutes=soon")
    short = one_line(decompose, *as_flags(TINY), "--dataset=text", "--target=target", "--out=short", "--minutes=1e-6")
    assert "minutes=1e-06: not one step fits" in short


class Interrupted:
    """Takes the place of run.interruptible: Ctrl-C comes after the fourth step."""

    def __enter__(self):
        stop_after_step = iter([False] * 3 + [True] * 99)
        return lambda: next(stop_after_step)

    def __exit__(self, *_):
        pass


def test_resumed_run_is_the_whole_run_bit_for_bit(whole, home, monkeypatch):
    """Interrupted after step 3 of 8, not at a regular save, saved, resumed."""
    with monkeypatch.context() as patch:
        patch.setattr(run, "interruptible", Interrupted)
        with pytest.raises(SystemExit, match="130"):
            decompose.main(config(out="halves", save_every=1000, eval_every=4))
    assert torch.load(home / "halves/state.pt", weights_only=True)["vpd"]["step"] == 4
    decompose.main(resumed("halves"))
    once, twice = (torch.load(f / "state.pt", weights_only=True)["vpd"] for f in (whole, home / "halves"))
    assert len(tensors(once)) == len(tensors(twice)) > 50
    assert all(torch.equal(a, b) for a, b in zip(tensors(once), tensors(twice)))
    assert (whole / "metrics.jsonl").read_text() == (home / "halves/metrics.jsonl").read_text()


def test_a_run_without_an_adversary_has_no_sources_and_resumes(home, monkeypatch):
    decompose.train(config(out="no-adversary", beta_adv=0.0))
    with monkeypatch.context() as patch:
        patch.setattr(run, "interruptible", Interrupted)
        with pytest.raises(SystemExit, match="130"):
            decompose.train(config(out="no-adversary-halves", beta_adv=0.0))
    decompose.train(resumed("no-adversary-halves"))
    whole, halves = (
        torch.load(home / f / "state.pt", weights_only=True)["vpd"] for f in ("no-adversary", "no-adversary-halves")
    )
    assert whole["adversary"] == {} and "adversarial" not in rows_of(home / "no-adversary")[0]
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(halves), strict=True))


def test_a_step_is_replayed_where_it_pays(home, monkeypatch):
    """What is recorded is the step's losses and gradients, with the generator that they draw from."""
    recorded = []

    class Recorder:
        def __init__(self, function, generator):
            self.function = function
            recorded.append((function.__func__, generator))

        def __call__(self, *args):
            assert all(isinstance(arg, torch.Tensor) for arg in args)
            return self.function(*args)

    monkeypatch.setattr(run, "Graphed", Recorder)
    decompose.train(config(out="launched", steps=3))
    assert recorded == []
    monkeypatch.setattr(run, "wants_graph", lambda wanted, device, processes, step_bytes: wanted == "auto")
    kept = []
    init = decompose.VPD.__init__
    monkeypatch.setattr(
        decompose.VPD, "__init__", lambda self, *a, **k: init(self, *a, **k) or kept.append(self.generator)
    )
    decompose.train(config(out="replayed", steps=3))
    assert recorded == [(decompose.VPD.losses_and_gradients, kept[0])]
    assert rows_of(Path("replayed")) == rows_of(Path("launched"))


def test_nothing_of_the_training_is_alive_when_the_evaluation_begins(home, monkeypatch):
    alive = []
    init = decompose.VPD.__init__
    monkeypatch.setattr(
        decompose.VPD, "__init__", lambda self, *a, **k: alive.append(weakref.ref(self)) or init(self, *a, **k)
    )

    def report(opened, corpus, c):
        gc.collect()
        assert alive and all(vpd() is None for vpd in alive)
        return {"live": {"total": 0}}

    monkeypatch.setattr(evaluation, "report", report)
    decompose.main(config(out="freed", steps=2))


# ---------------------------------------------------------------------------------------------------------------------
# One step


def tiny_vpd(home, compiled: bool = False, **changes) -> tuple[decompose.VPD, torch.Tensor]:
    c = config(**changes)
    vpd, _ = decompose.build(c, checkpoints.load_checkpoint(home / "target/checkpoint.pt", "target"), CPU, compiled)
    return vpd, data.load("text").batch("train", 0, c.B, c.T)[:, :-1]


def test_sources_and_parameters_both_move_and_the_target_does_not(home):
    vpd, x = tiny_vpd(home)
    r, W = vpd.adversary.r.clone(), [weight.clone() for weight in vpd.decomposition.target.parameters()]
    before = [weight.detach().clone() for weight in vpd.learning]
    vpd.train_step(x)
    assert not torch.equal(r, vpd.adversary.r) and vpd.adversary.r.min() >= 0 and vpd.adversary.r.max() <= 1
    assert vpd.adversary.count == vpd.config.n_adv
    assert all(not torch.equal(a, b) for a, b in zip(before, vpd.learning))
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(W, vpd.decomposition.target.parameters()))


@pytest.mark.parametrize("halves", [False, True])
def test_shared_backward_gives_the_sources_the_gradient_of_the_adversarial_loss_alone(home, halves):
    """With n_adv = 1 the only ascent is the one that shares the backward pass: repeat it by hand."""
    vpd, x = tiny_vpd(home, n_adv=1, halves=halves)
    target_output, g, _ = (t.detach() for t in vpd.importances(x))
    r = vpd.adversary.r.clone().requires_grad_()
    attacked = (t[:: 1 + halves] for t in (x, target_output, g))
    (grad_r,) = torch.autograd.grad(losses.reconstruction(vpd.decomposition, *attacked, r, None, vpd.divergence), r)
    vpd.train_step(x)
    # After one update Adam's first moment is (1 - beta1) grad_r.
    assert torch.allclose(vpd.adversary.mom1, 0.5 * grad_r, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        dict(beta_adv=0.0),
        dict(beta_stoch=0.0),
        dict(adv_scope="batch", S=2),
        dict(adv_scope="sequence", adv_fresh=0.5),
        dict(adv_routing="subset", S=2),
        dict(stoch_routing="layerwise", S=2),
        dict(muon=0.0),
        dict(halves=False, S=2),
    ],
)
def test_variants_of_the_loss(home, changes):
    vpd, x = tiny_vpd(home, **changes)
    row = vpd.train_step(x)
    assert math.isfinite(row["total"])
    assert ("adversarial" in row) == (vpd.adversary is not None) == (vpd.config.beta_adv > 0)
    assert ("stochastic" in row) == (vpd.config.beta_stoch > 0)


def test_halves_give_each_reconstruction_its_own_sequences(home):
    """The adversary the even rows, random masks the odd ones: the step of two batches of half the size."""
    vpd, x = tiny_vpd(home, halves=True, B=4, n_adv=1)
    target_output, g, _ = (t.detach() for t in vpd.importances(x))
    r, random = vpd.adversary.r.clone(), vpd.generator.clone_state()
    assert r.shape[:3] == (1, 2, vpd.config.T)
    row = vpd.train_step(x)
    rest = (
        losses.sample_sources(r.shape, random),
        losses.sample_routing((1, *x[1::2].shape), vpd.decomposition.L, random),
    )
    vpd, _ = tiny_vpd(home, halves=True, B=4, n_adv=1)  # before the step
    for i, name, sources in ((0, "adversarial", (r, None)), (1, "stochastic", rest)):
        loss = vpd.reconstruction(x[i::2], target_output[i::2], g[i::2], *sources)
        assert row[name].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("changes", [dict(B=3), dict(B=4, beta_adv=0.0), dict(B=4, beta_stoch=0.0)])
def test_halves_are_whole_where_the_batch_is_odd_or_one_loss_alone(home, changes):
    (vpd, x), (other, _) = (tiny_vpd(home, halves=halves, **changes) for halves in (True, False))
    assert_same_step(vpd, other, x, loss=0, gradient=0)


def test_gamma_is_clipped_and_its_norm_logged(home):
    norms = []
    for clip_ci in (0.0, 0.5, 1e9):
        vpd, x = tiny_vpd(home, clip_ci=clip_ci and min(clip_ci * norms[0], 1e9))
        norms.append(vpd.train_step(x)["grad_ci"].item())
        left = torch.cat([weight.grad.flatten() for weight in vpd.ci_fn.parameters()]).norm().item()
        assert left == pytest.approx(norms[0] * (0.5 if clip_ci == 0.5 else 1.0), rel=1e-4)
    assert norms == pytest.approx(norms[:1] * 3)


def a_step(vpd: decompose.VPD, x: torch.Tensor) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Losses of a step, and what it left: the gradients of U, V and Gamma before the clip, the sources and moments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", lambda *_: None)
        row = vpd.train_step(x)
    sources = vpd.adversary.state_dict().values() if vpd.adversary else []
    return {name: value.item() for name, value in row.items()}, [*(w.grad for w in vpd.learning), *sources]


def assert_same_step(one: decompose.VPD, other: decompose.VPD, x: torch.Tensor, loss=1e-4, gradient=1e-3) -> None:
    """Three steps from one state: each loss, and the gradients and sources by their norm."""
    for _ in range(3):
        (row, left), (other_row, other_left) = a_step(one, x), a_step(other, x)
        assert {name: other_row[name] for name in row} == pytest.approx(row, rel=loss)
        for a, b in zip(left, other_left, strict=True):
            assert (a - b).norm() <= gradient * a.norm()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"S": 2},
        {"adv_scope": "batch"},
        {"beta_adv": 0.0},
        {"memory_budget": 0.0},
        {"muon": 0.0},
        {"halves": False, "S": 2},
    ],
)
def test_compiled_step_agrees_with_eager(home, monkeypatch, changes):
    """Every compiled part of the step, traced and differentiated by torch.compile; a slow test has its C++ too."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_with(f, dynamic=False, backend="aot_eager"))
    eager, x = tiny_vpd(home, **changes)
    assert_same_step(eager, tiny_vpd(home, compiled=True, **changes)[0], x)


def test_compiled_bf16_agrees_with_eager_bf16(home, monkeypatch):
    """autocast and torch.compile together, as on a GPU. Sums in another order: bf16 has 8 bits."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_with(f, dynamic=False, backend="aot_eager"))
    monkeypatch.setattr(run, "bf16", lambda device: True)
    eager, x = tiny_vpd(home)
    dtypes = []
    eager.ci_fn.out.register_forward_hook(lambda layer, args, out: dtypes.append(out.dtype))
    assert_same_step(eager, tiny_vpd(home, compiled=True)[0], x, loss=1e-2, gradient=5e-2)
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("memory_budget", [1.0, 0.0])
def test_step_compiled_to_cpp_agrees_with_eager(home, memory_budget):
    if not run.wants_compile("auto", CPU, steps=10**6):
        pytest.skip("no working compiler here")
    eager, x = tiny_vpd(home)
    assert_same_step(eager, tiny_vpd(home, compiled=True, memory_budget=memory_budget)[0], x)


def test_recomputing_activations_changes_no_bit(home):
    vpd, x = tiny_vpd(home)
    for budget in (0.5, 0.0):
        assert_same_step(vpd, tiny_vpd(home, memory_budget=budget)[0], x, loss=0, gradient=0)
        vpd, x = tiny_vpd(home)


def test_the_papers_recipe_is_one_flag_away():
    """At the default size; a scale and single flags go on top."""
    read = lambda *args: flags.read_flags(decompose.Config, None, list(args))
    paper, tiny = read("--recipe=paper"), read("--recipe=paper", "--scale=tiny", "--lr=0.5")
    assert (paper.muon, paper.halves, paper.B, paper.steps) == (0.0, False, 2, 8000)
    assert (tiny.muon, tiny.halves, tiny.B, tiny.steps, tiny.lr) == (0.0, False, 2, 40, 0.5)
    plain = {name: getattr(decompose.Config(), name) for name in decompose.PAPER}
    assert replace(paper, recipe="", **plain) == decompose.Config(scale="laptop")
    for scale in "gpu", "published":  # sizes of the authors, whose recipe they have anyway
        assert replace(read(f"--scale={scale}", "--recipe=paper"), recipe="") == read(f"--scale={scale}")


@pytest.mark.parametrize("changes", [{}, {"muon": 0.0}, {"halves": False}])
def test_naive_step_is_the_same_step(home, changes):
    """No materialised Delta, no backward pass for the sources alone, no logits: none of it changes a number."""
    vpd, x = tiny_vpd(home, **changes)
    other, _ = tiny_vpd(home, **changes)
    naive = NaiveVPD(other.decomposition, other.ci_fn, other.config, tuple(x.shape), other.device)
    assert_same_step(naive, vpd, x)


def test_bf16_autocast_stays_near_fp32(home, monkeypatch):
    """As on a GPU, here on the CPU: after 50 steps from one state each loss is within 1 % of fp32's.

    Of a longer run: at its end few importances are left, and p = 0.4 makes the penalties steep next to g = 0.
    """
    rows = []
    for half in (False, True):
        monkeypatch.setattr(run, "bf16", lambda device: half)
        vpd, x = tiny_vpd(home, steps=2000, B=16)
        for _ in range(50):
            row = vpd.train_step(x)
        rows.append({name: value.item() for name, value in row.items() if name != "grad_ci"})  # no loss
    fp32, bf16 = rows
    assert bf16 != fp32 and bf16 == pytest.approx(fp32, rel=0.01)


def test_warm_up_lowers_faithfulness(home):
    vpd, _ = tiny_vpd(home, faith_steps=100, C="*=20")
    start = losses.faithfulness(vpd.decomposition).item()
    assert vpd.warm_up() < 0.05 * start


# ---------------------------------------------------------------------------------------------------------------------
# The README's map: what is documented is what runs


def half(f):
    return lambda *args, **kwargs: 0.5 * f(*args, **kwargs)


def half_of_first(f):
    def changed(*args, **kwargs):
        first, *rest = f(*args, **kwargs)
        return 0.5 * first, *rest

    return changed


def all_true(f):
    return lambda *args: torch.ones_like(f(*args))


MAP = {  # each function of the README's map, and an edit to its body
    "model.GPT.hidden": half, "model.Decomposition.target_pass": half_of_first, "model.Decomposition.forward": half,
    "model.masked_product": half, "ci_fn.CITransformer.forward": half, "ci_fn.lower_leaky": half,
    "ci_fn.upper_leaky": half, "losses.mask": half, "losses.sample_sources": half, "losses.sample_routing": all_true,
    "losses.HiddenKL.__call__": half, "losses.reconstruction": half, "losses.power_sums": half,
    "losses.importance_minimality": half, "losses.frequency_minimality": half, "losses.faithfulness": half,
    "losses.Adversary.ascend": lambda f: lambda *args: None, "losses.adam_ascent": lambda f: lambda *args: None,
    "decompose.VPD.train_step": lambda f: lambda self, x: {n: 0.5 * v for n, v in f(self, x).items()},
    "decompose.VPD.losses_and_gradients": lambda f: lambda self, *args: (f(self, *args)[0], 0 * f(self, *args)[1]),
}  # fmt: skip
OURS = (ci_fn, decompose, evaluation, losses, model, run, train_target)


def losses_after_two_steps(name: str) -> list[dict]:
    decompose.train(config(out=f"map-{name}", steps=2, faith_steps=0))
    return rows_of(Path(f"map-{name}"))


@pytest.mark.parametrize("name", MAP)
def test_editing_a_function_of_the_map_changes_the_run(home, monkeypatch, name):
    if not Path("map-as-it-is").exists():
        losses_after_two_steps("as-it-is")
    before = rows_of(Path("map-as-it-is"))
    *owner, function = name.split(".")
    holder = next(module for module in OURS if module.__name__ == owner[0])
    holder = getattr(holder, owner[1]) if owner[1:] else holder
    original = getattr(holder, function)
    changed = MAP[name](original)
    for place in (holder, *OURS):  # wherever it is imported to, as an edit of its file would
        for attribute, value in list(vars(place).items()):
            if value is original:
                monkeypatch.setattr(place, attribute, changed)
    after = losses_after_two_steps(name)
    assert after != before


def test_the_map_of_the_readme_is_the_one_that_is_tested():
    table = (ROOT / "README.md").read_text().split("## The paper and the code")[1].split("\n## ")[0]
    named = set(re.findall(r"`((?:model|ci_fn|losses|decompose)\.[\w.]+)`", table))
    assert named == set(MAP) | {"losses.kl_divergence"}  # the plain definition beside the one that runs


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.slow
@pytest.mark.count
def test_readme_commands_at_tiny_size(home):
    """train_target.py, decompose.py and eval.py as a person calls them."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def call(script: str, *args: str) -> str:
        done = subprocess.run([sys.executable, ROOT / script, *args], cwd=home, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "validation CE" in call("train_target.py", "--dataset=text", "--out=cli-target", *as_flags(TINY_TARGET))
    printed = call("decompose.py", "--dataset=text", "--target=cli-target", "--out=cli", *as_flags(TINY))
    assert "adversarial_80" in printed and "rounded_0.0" in printed and "GFLOP a token" in printed
    table = call("eval.py", "cli", "--windows=2")
    of_target = next(line for line in printed.splitlines() if line.startswith("target "))
    assert table.splitlines()[1].split() == of_target.split()


def test_another_T_gets_a_target_of_its_own(home, monkeypatch):
    """The plain command still runs after one with another T."""
    for T in (8, 16):
        decompose.train(config(target="", scale="tiny", T=T, out=f"T{T}", steps=1))
    name = data.load("text").name
    assert (home / f"out/target-{name}-tiny/checkpoint.pt").exists() and (
        home / f"out/target-{name}-tiny-T8/checkpoint.pt"
    ).exists()


def test_wandb_mirrors_the_log(home, monkeypatch):
    """Against a stand-in: the same rows as metrics.jsonl; without the package one line says so."""
    sent, begun = [], {}
    mirror = SimpleNamespace(log=lambda row, step: sent.append((step, row)), finish=lambda: sent.append("finished"))
    spec = importlib.machinery.ModuleSpec("wandb", None)
    stand_in = SimpleNamespace(init=lambda **about: begun.update(about) or mirror, __spec__=spec)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    decompose.train(config(out="mirrored", wandb="vpd", steps=3))
    assert sent == [(row["step"], row) for row in rows_of(home / "mirrored")] + ["finished"]
    assert begun["project"] == "vpd" and begun["name"] == "mirrored" and begun["config"]["steps"] == 3
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb=vpd: wandb is not installed"):
        config(wandb="vpd")


def test_ctrl_c_saves_and_says_how_to_go_on(home):
    settings = TINY | dict(steps=100_000, save_every=100_000)
    command = [sys.executable, ROOT / "decompose.py", "--dataset=text", "--target=target", "--out=stopped"]
    process = subprocess.Popen(
        [*command, *as_flags(settings)], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = home / "stopped/metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "--resume=stopped" in printed
    assert torch.load(home / "stopped/checkpoint.pt", weights_only=True)["step"] >= 1


def test_a_terminal_that_is_closed_saves_too(home):
    """As when a connection breaks: the system sends SIGHUP, and nothing can be printed any more."""
    settings = TINY | dict(steps=100_000, save_every=100_000)
    command = [str(ROOT / "decompose.py"), "--dataset=text", "--target=target", "--out=closed", *as_flags(settings)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, *command])
    log = home / "closed/metrics.jsonl"
    while os.waitpid(pid, os.WNOHANG)[0] == 0 and not (log.exists() and log.stat().st_size):
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 65_536)
    os.close(terminal)
    os.waitpid(pid, 0)
    state = torch.load(home / "closed/state.pt", weights_only=True)
    assert 1 <= state["step"] < 100_000
    rows = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert rows == list(range(state["step"]))


BAD = [
    ("decompose", "--dataset=nowhere", "nowhere"),
    ("decompose", "--dataset=empty.txt", "empty.txt"),
    ("decompose", "--dataset=hf:no/where", "the data step failed, as no/where cannot be read from"),
    ("decompose", "--max_tokens=-1", "max_tokens=-1"),
    ("decompose", "--dataset=short.txt", "T + 1 = 17"),
    ("decompose", "--setps=3", "did you mean --steps"),
    ("decompose", "--steps=many", "many"),
    ("decompose", "--C=*.nothing=4", "'*.nothing' matches no nn.Linear"),
    ("decompose", "--C=*.q=0", "'*.q=0' is not PATTERN=COUNT"),
    ("decompose", "--C=12", "PATTERN=COUNT"),
    ("decompose", "--C=*=2,*=3", "two counts"),
    ("decompose", "--T=17", "T=17: the context of the target in target is 16"),
    ("decompose", "--steps=0", "steps=0"),
    ("decompose", "--device=abacus", "abacus"),
    ("decompose", "--target=nowhere", "run folder 'nowhere' does not exist"),
    ("decompose", "--resume=nowhere", "run folder 'nowhere' does not exist"),
    ("decompose", "--resume=foreign", "run folder 'foreign' holds no state.pt"),
    ("decompose", "--resume=whole --lr=0.1", "lr=0.1: the run in whole has lr=0.003, and on resuming only steps,"),
    ("decompose", "--resume=whole --steps=7", "steps=7: the run in whole has done 8 already"),
    ("decompose", "--resume=text", "holds no state.pt"),
    ("decompose", "--d_ci=0", "d_ci=0"),
    ("decompose", "--seed=-1", "seed=-1"),
    ("decompose", "--lr=nan", "lr=nan"),
    ("decompose", "--memory_budget=1.5", "memory_budget=1.5"),
    ("decompose", "--beta_adv=0 --beta_stoch=0", "without a reconstruction loss"),
    ("decompose", "--shard", "one process has nothing to divide"),
    ("decompose", "--out=whole", "out=whole is not an empty folder: give another one"),
    ("decompose", "--out=unfinished", "not an empty folder: give another one, or go on with --resume=unfinished"),
    ("decompose", "--out=target", "out=target is not an empty folder"),
    ("decompose", "--lr=1e18 --out=nan", "try a smaller lr"),
    ("eval", "nowhere", "run folder 'nowhere' does not exist"),
    ("eval", "truncated", "not a whole checkpoint"),
    ("eval", "text", "holds no checkpoint.pt"),
    ("eval", "foreign", "checkpoint of kind 'target', not 'decomposition'"),
    ("eval", "newer", "has format 99, not 2: it is of a newer version"),
    ("eval", "", "needs RUN"),
    ("eval", "whole --against=target", "evaluate that run first"),
    ("eval", "whole --windows=0", "windows=0"),
    ("eval", "whole --adv_steps=20,x", "adv_steps='20,x'"),
    ("train_target", "--resume=text", "holds no state.pt"),
    ("train_target", "--T=0", "T=0"),
    ("train_target", "--out=target", "out=target is not an empty folder"),
]  # fmt: skip


@pytest.mark.parametrize("script, args, message", BAD, ids=[f"{script}:{args}" for script, args, _ in BAD])
def test_bad_input_ends_in_one_line_and_touches_nothing(home, whole, script, args, message):
    (home / "empty.txt").write_text("")
    (home / "short.txt").write_text("hello\n")
    saved = {
        "foreign": (home / "target/checkpoint.pt").read_bytes(),
        "truncated": (whole / "checkpoint.pt").read_bytes()[:5000],
    }
    for name in ("foreign", "truncated", "newer", "unfinished"):
        (home / name).mkdir(exist_ok=True)
        if name in saved:
            (home / name / "checkpoint.pt").write_bytes(saved[name])
    torch.save(torch.load(whole / "checkpoint.pt", weights_only=True) | {"format": 99}, home / "newer/checkpoint.pt")
    (home / "unfinished/config.json").write_text((whole / "config.json").read_text())
    kept = ("whole", "target", "unfinished", "foreign")
    before = {path: path.read_bytes() for name in kept for path in (home / name).rglob("*") if path.is_file()}
    args = args.split()
    given = {arg.partition("=")[0] for arg in args}
    usual = {
        "decompose": [] if "--resume" in given else as_flags(dict(dataset="text", target="target") | TINY),
        "train_target": ["--dataset=text"],
        "eval": [],
    }[script]
    module = {"decompose": decompose, "eval": evaluation, "train_target": train_target}[script]
    assert message in one_line(module, *(flag for flag in usual if flag.partition("=")[0] not in given), *args)
    assert before == {path: path.read_bytes() for name in kept for path in (home / name).rglob("*") if path.is_file()}


def test_non_finite_loss_stops_with_term_and_step_and_keeps_the_checkpoint(home, monkeypatch):
    original = decompose.VPD.train_step

    def sometimes_nan(self, x):
        row = original(self, x)
        return row | {"stochastic": torch.tensor(float("nan"))} if self.step == 7 else row

    monkeypatch.setattr(decompose.VPD, "train_step", sometimes_nan)
    with pytest.raises(UserError, match="stochastic loss is nan at step 6"):
        decompose.train(config(out="diverged"))
    assert torch.load(home / "diverged/checkpoint.pt", weights_only=True)["step"] == 4


def test_another_vocabulary_is_refused(home):
    """Token ids of equal range but other meaning: as after an upgrade of the Python whose library is the corpus."""
    (home / "other.txt").write_text("a wholly different text, " * 200)
    with pytest.raises(UserError, match="another vocabulary"):
        decompose.main(config(dataset="other.txt"))


def test_a_bug_of_ours_keeps_its_traceback(home, monkeypatch):
    """A forker's shape error is no user's mistake."""
    monkeypatch.setattr(model, "masked_product", lambda x, Wx, m, m_Delta, U, V: m_Delta * Wx + U)
    monkeypatch.setattr(
        sys, "argv", ["decompose.py", "--dataset=text", "--target=target", "--out=bug", *as_flags(TINY)]
    )
    with pytest.raises(RuntimeError):
        run.run_script(decompose.main, decompose.Config, None)
