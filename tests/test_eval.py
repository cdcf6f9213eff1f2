"""The numbers of the table, each made a second time: from overwritten weights, by loops, or by hand."""

import copy
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_losses import linears
from tiny import TINY, one_line
from torch import nn

import cost
import data
import eval as evaluation
import losses
import run
import tokenise
from ci_fn import CITransformer
from eval import MODES, adversarial_sources, compute_recovered, evaluate, hidden_mse, masks, mean_importances, table
from flags import UserError
from model import Decomposition
from train_target import generate

close = torch.testing.assert_close
L, C, T = 12, 52, 8  # of the decomposition in conftest.py


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def opened(gpt):
    """As `load_run` gives it: a decomposition of the tiny GPT, with a Gamma whose g are 0, 1 and in between."""
    decomposition = Decomposition(gpt, {"*.q": 3, "*.up": 7, "*": 4}, generator(2), ends_in="hidden")
    torch.manual_seed(0)
    gamma = CITransformer([V.shape[0] for V in decomposition.V.values()], C, 16, 1, 2, 16)
    nn.init.normal_(gamma.out.weight, std=0.3)
    nn.init.constant_(gamma.out.bias, 0.3)
    # The curve falls by a nat every 1/1000 of the training, so that a CE gap of x nats recovers 1 - x / 1000.
    target = {"curve": [[0, 1000.0], [500, 500.0], [1000, 0.0]], "seconds": 1.0}
    checkpoint = {"target": target, "seconds": 2.0}
    return evaluation.Run(Path(), {"leak": 0.01, "T": T}, checkpoint, decomposition, gamma)


@pytest.fixture(scope="module")
def corpus():
    """Random tokens below 49."""
    tokens = np.random.default_rng(0).integers(0, 49, 500).astype(np.uint16)
    return data.Corpus("random", {"train": tokens, "val": tokens}, None, "")


@pytest.fixture
def windows(corpus):
    return evaluation.validation_windows(corpus, 8, T, 0)


def config(**settings):
    return evaluation.Config("", **(dict(windows=8, batch=8, adv_steps="2,3") | settings))


@pytest.fixture
def metrics(opened, corpus):
    return evaluate(opened, corpus, config())[0]


class PerPosition(nn.Module):
    """A linear layer with weights of its own at every position, W [B, T, d_out, d_in]."""

    def __init__(self, W):
        super().__init__()
        self.W = W

    def forward(self, x):
        return torch.stack([torch.stack([W @ x for W, x in zip(*row)]) for row in zip(self.W, x)])


@torch.no_grad()
def overwritten(decomposition, m):
    """A copy of the target with weights sum_c m_c U_c V_c^T + m_Delta (W - U V^T) at each position, m [B, T, C + L]."""
    twin, start = copy.deepcopy(decomposition.target), 0
    for i, (name, C_l) in enumerate(decomposition.C.items()):
        U, V, W = decomposition.U[name], decomposition.V[name], decomposition.target.get_submodule(name).weight
        W_prime = m[..., C + i, None, None] * (W - U @ V.T)  # [B, T, d_out, d_in]
        for c in range(C_l):
            W_prime = W_prime + m[..., start + c, None, None] * torch.outer(U[:, c], V[:, c])
        start += C_l
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, PerPosition(W_prime))
    return twin


@torch.no_grad()
def judged(opened, windows, m):
    """Last hidden states, KL from the target and CE of the overwritten target on windows [N, T + 1]."""
    twin, x, y = overwritten(opened.decomposition, m), windows[:, :-1], windows[:, 1:]
    p, q = (f(x).double().softmax(-1) for f in (opened.decomposition.target, twin))
    kl = (p * (p / q).log()).sum(-1).mean().item()
    return twin.hidden(x), kl, F.cross_entropy(twin(x).flatten(0, 1), y.flatten()).item()


# ---------------------------------------------------------------------------------------------------------------------
# A. Windows and parts


@pytest.mark.parametrize("at_a_time, parts", [(1, [1] * 8), (3, [3, 3, 2]), (64, [8])])
def test_windows_come_in_parts(opened, windows, at_a_time, parts):
    found = opened.batches(windows, at_a_time)
    assert [len(part) for part in found] == parts and torch.equal(torch.cat(found), windows)


@pytest.mark.parametrize("room, parts", [(0, [1] * 8), (3, [3, 3, 2]), (1000, [8])])
def test_as_many_windows_at_a_time_as_memory_allows(opened, windows, room, parts, monkeypatch):
    """Half of what is free is used, as the target of another run, the corpus and the figures want some too."""
    one = cost.Cost(0, 10**6, 0, 0)
    monkeypatch.setattr(cost, "counted", lambda make, **_: [one])
    monkeypatch.setattr(cost, "available_memory", lambda device: room * 2 * one.peak)
    assert [len(part) for part in opened.batches(windows)] == parts


def test_a_window_is_counted(opened):
    """The count runs on what has been trained, and leaves it as it was."""
    before = [p.detach().clone() for p in opened.decomposition.parameters()]
    (window,) = cost.counted(lambda: [opened.one_window], again=False)
    logits = 4 * T * 50  # bytes
    assert window.peak > 2 * logits
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, opened.decomposition.parameters()))


def test_validation_windows_are_consecutive_tokens_of_the_text(corpus, windows):
    text = corpus.tokens["val"].tolist()
    for window in windows.tolist():
        assert any(text[i : i + T + 1] == window for i in range(len(text)))
    assert len({tuple(window) for window in windows.tolist()}) == 8
    assert not torch.equal(windows, evaluation.validation_windows(corpus, 8, T, 1))


# ---------------------------------------------------------------------------------------------------------------------
# B. Masks


BY_HAND = {  # of g = 0, 0.05, 0.3, 1
    "unmasked": [1, 1, 1, 1],
    "ci": [0, 0.05, 0.3, 1],
    "rounded_0.0": [0, 1, 1, 1],
    "rounded_0.1": [0, 0, 1, 1],
    "rounded_0.5": [0, 0, 0, 1],
    "zero": [0, 0, 0, 0],
}


@pytest.mark.parametrize("mode", BY_HAND)
def test_masks_by_hand(mode):
    m = masks(mode, torch.tensor([[[0, 0.05, 0.3, 1]]]), 2, generator())
    close(m, torch.tensor([[[*BY_HAND[mode], 0, 0]]], dtype=torch.float32))  # the Deltas' are 0


RANDOM = {  # of g = 0, 0.4, 1 and one Delta: the range of each mask, in which it is uniform
    "stochastic": [(0, 1), (0.4, 1), (1, 1), (0, 1)],
    "stochastic_no_delta": [(0, 1), (0.4, 1), (1, 1), (0, 0)],
    "random": [(0, 1), (0, 1), (0, 1), (0, 0)],
}


@pytest.mark.parametrize("mode", RANDOM)
def test_random_masks_are_uniform_in_their_range(mode):
    m = masks(mode, torch.tensor([0, 0.4, 1]).expand(100, 200, 3), 1, generator())
    for of_one, (low, high) in zip(m.flatten(0, 1).T, RANDOM[mode]):
        quarters = torch.quantile(of_one, torch.tensor([0, 0.25, 0.5, 0.75, 1])).tolist()
        assert quarters == pytest.approx([low + (high - low) * i / 4 for i in range(5)], abs=0.01)
    assert abs(torch.corrcoef(m[..., :2].flatten(0, 1).T)[0, 1]) < 0.03  # of two subcomponents


def test_every_mode_is_checked_here():
    assert set(BY_HAND) | set(RANDOM) == set(MODES)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_the_model_with_overwritten_weights(opened, windows, mode):
    x, y = windows[:3, :-1], windows[:3, 1:]
    target_hidden, g, _ = opened.importances(x)
    assert (g == 0).any() and (g == 1).any() and ((g > 0.1) & (g < 0.5)).any()
    m = masks(mode, g, L, generator())
    with torch.no_grad():
        hidden = opened.decomposition(x, m)
    expected, kl, ce = judged(opened, windows[:3], m)
    close(hidden, expected, atol=1e-5, rtol=1e-5)
    assert opened.kl(target_hidden, hidden).item() == pytest.approx(kl, rel=1e-4) and kl > 0.1
    assert opened.ce(hidden, y).item() == pytest.approx(ce, rel=1e-4)


def test_r_of_one_gives_the_target_exactly(opened, windows):
    x = windows[:, :-1]
    target_hidden, g, _ = opened.importances(x)
    ones = losses.mask(g, torch.ones(C + L))
    assert torch.equal(opened.decomposition(x, ones), target_hidden)
    assert torch.equal(target_hidden, opened.decomposition.target.hidden(x))


# ---------------------------------------------------------------------------------------------------------------------
# The adversary


def one_by_one(g=0.5):
    """W = 2, U = V = 1 and g: W' = m + m_Delta; two batches of one and three x = 3, on which f(x | W) = 6."""
    f = linears([[2]], UV=1)
    return f, [(torch.full((n, 1), 3.0), torch.full((n, 1), 6.0), torch.full((n, 1), g)) for n in (1, 3)]


@pytest.mark.parametrize("n_steps", [2, 5, 20])
def test_adversary_finds_the_worst_sources_of_one_weight(n_steps):
    # r = 0 is the worst: W' = g = 0.5, and (6 - 1.5)^2 = 20.25. Any source can get there, as 2 ranges are walked.
    r, last, largest = adversarial_sources(*one_by_one(), n_steps, generator(), losses.mse)
    assert r.tolist() == [[[0, 0]]] and last == largest == pytest.approx(20.25)


def test_adversary_walks_by_2_over_n_in_the_direction_of_the_sign():
    start = losses.sample_sources((1, 1, 2), generator())
    r, *_ = adversarial_sources(*one_by_one(), 1, generator(), losses.mse)
    assert (start > 0).all() and r.tolist() == [[[0, 0]]]  # one step of 2, clamped
    f, batches = one_by_one()
    seen = []

    def divergence(target, masked):
        seen.append(masked[0].item() / 3)  # W' = 0.5 + 0.5 r + r_Delta
        return losses.mse(target, masked)

    adversarial_sources(f, batches, 10, generator(), divergence)
    (r, r_Delta), step = start.flatten().tolist(), 0.2
    expected = [0.5 + 0.5 * max(0, r - step * i) + max(0, r_Delta - step * i) for i in range(11)]
    assert seen[::2] == seen[1::2] == pytest.approx(expected, abs=1e-5)  # both batches, of 1 and of 3, share r


def test_adversary_reports_the_last_and_the_largest_divergence_over_all_batches():
    values = iter([8.0, 0.0, 1.0, 5.0, 2.0, 2.0])  # batches of 1 and 3: (8 + 0) / 4, (1 + 15) / 4, (2 + 6) / 4
    _, last, largest = adversarial_sources(
        *one_by_one(), 2, generator(), lambda target, masked: next(values) + 0 * masked.sum()
    )
    assert (last, largest) == (2.0, 4.0)


@pytest.mark.parametrize("seed", range(3))
def test_adversary_ends_above_its_start_within_bounds_and_moves_nothing_else(opened, windows, seed):
    (batch,), _ = evaluation.of_windows(opened, windows, 8)
    parts, _ = evaluation.of_windows(opened, windows, 3)
    start = losses.sample_sources((1, 1, 1, C + L), generator(seed))
    _, kl, _ = judged(opened, windows, losses.mask(batch[2], start)[0])
    r, last, largest = adversarial_sources(opened.decomposition, parts, 6, generator(seed), opened.kl)
    assert r.shape == (1, 1, 1, C + L) and r.min() == 0 and r.max() == 1  # shared by all windows and positions
    assert largest >= last > 1.05 * kl and not r.requires_grad
    assert judged(opened, windows, losses.mask(batch[2], r)[0])[1] == pytest.approx(last, rel=1e-4)
    assert all(p.grad is None for p in (*opened.decomposition.parameters(), *opened.ci_fn.parameters()))


def test_the_largest_is_never_below_the_start(opened, windows):
    """Where the first step goes down, the start is the largest that was met."""
    (batch,), _ = evaluation.of_windows(opened, windows, 8)
    f = opened.decomposition
    r = losses.sample_sources((1, 1, 1, C + L), generator())
    start = losses.reconstruction(f, batch[0], batch[1], batch[2], r, divergence=opened.kl).item()

    def downhill(target_hidden, hidden):  # the value of the KL, with its gradient turned round
        kl = opened.kl(target_hidden, hidden)
        return 2 * kl.detach() - kl

    _, last, largest = adversarial_sources(f, [batch], 4, generator(), downhill)
    assert last < 0.9 * start and largest == pytest.approx(start)


# ---------------------------------------------------------------------------------------------------------------------
# C. Numbers


def test_ce_is_that_of_whole_logits(opened):
    """2,500 positions: more than are taken at a time."""
    hidden, y = torch.randn(5, 500, 16, generator=generator()), torch.randint(0, 50, (5, 500), generator=generator())
    logits = hidden @ opened.unembedding.T
    assert opened.ce(hidden, y).item() == pytest.approx(F.cross_entropy(logits.mT, y).item(), rel=1e-6)
    close(opened.logits(hidden), logits)
    target = 2 * hidden.flip(0)
    p, log_q = (target @ opened.unembedding.T).softmax(-1), logits.log_softmax(-1)
    kl = F.kl_div(log_q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean")
    assert opened.kl(target, hidden).item() == pytest.approx(kl.item(), rel=1e-5)


def test_hidden_mse_by_hand():
    f = linears([[2]], [[1], [3]], UV=1)  # W = 2, then (1, 3)
    f.U["0"].data, f.U["1"].data = torch.tensor([[2.0]]), torch.tensor([[1.0], [3]])  # so that both Deltas are 0
    # x = 1: 2 and (2, 6). Both matrices halved: 1 and (0.5, 1.5). Squares 1, 2.25, 20.25; x = 0 gives three zeros.
    x, m = torch.tensor([[1.0], [0]]), torch.tensor([0.5, 0.5, 0.7, 0.7])
    assert hidden_mse(f, x, m).item() == pytest.approx(23.5 / 6)
    assert hidden_mse(f, x, torch.ones(4)).item() == 0
    assert not any(layer._forward_hooks for layer in f.layers)


def test_hidden_mse_of_overwritten_weights(opened, windows):
    x = windows[:2, :-1]
    m = masks("stochastic", opened.importances(x)[1], L, generator())
    outputs = []
    for f in (opened.decomposition.target, overwritten(opened.decomposition, m)):
        hooks = [
            f.get_submodule(name).register_forward_hook(lambda layer, args, y: outputs.append(y.flatten()))
            for name in opened.decomposition.names
        ]
        f(x)
        for hook in hooks:
            hook.remove()
    expected = F.mse_loss(torch.cat(outputs[L:]), torch.cat(outputs[:L])).item()
    assert hidden_mse(opened.decomposition, x, m).item() == pytest.approx(expected, rel=1e-4)


def test_compute_recovered_by_hand():
    curve = [[100, 5.0], [200, 4.0], [300, 3.5], [400, 3.4]]
    assert compute_recovered(0.0, curve) == 1.0  # the final CE, reached at the end
    assert compute_recovered(-0.1, curve) == 1.0
    assert compute_recovered(0.35, curve) == pytest.approx(250 / 400)  # 3.75, half way from 4.0 to 3.5
    assert compute_recovered(9.0, curve) == 100 / 400  # worse than the first point


def test_mean_importances_by_a_loop():
    gs = [torch.rand(n, 4, 3, generator=generator(n)) - 0.3 for n in (2, 1)]
    gs = [g.clamp(min=0) for g in gs]  # about a third of them 0
    mean_g, l0 = mean_importances(gs)
    rows = [row for g in gs for window in g.tolist() for row in window]  # 12 positions
    assert mean_g.tolist() == pytest.approx([sum(row[c] for row in rows) / 12 for c in range(3)])
    assert l0.tolist() == pytest.approx([sum(row[c] > 0 for row in rows) / 12 for c in range(3)])
    assert 0 < l0.min() and l0.max() < 1


def test_every_mode_of_the_table_by_overwritten_weights(opened, windows, metrics):
    _, g, _ = opened.importances(windows[:, :-1])
    drawn = generator()
    for mode in MODES:
        _, kl, ce = judged(opened, windows, masks(mode, g, L, drawn))
        assert metrics["kl"][mode] == pytest.approx(kl, rel=1e-4), mode
        assert metrics["ce"][mode] == pytest.approx(ce, rel=1e-4), mode


def test_shares_of_the_table(opened, windows, metrics):
    target = opened.decomposition.target(windows[:, :-1])
    assert metrics["ce"]["target"] == pytest.approx(F.cross_entropy(target.mT, windows[:, 1:]).item(), rel=1e-6)
    for mode in MODES:
        gap = metrics["ce"][mode] - metrics["ce"]["target"]
        assert metrics["compute_recovered"][mode] == pytest.approx(1 - max(0, gap) / 1000, abs=1e-6)
    assert metrics["ce_unrecovered"]["zero"] == 1
    between = metrics["ce_unrecovered"]["unmasked"]  # weighs the CE of the zero masks against that of the target
    weighed = between * metrics["ce"]["zero"] + (1 - between) * metrics["ce"]["target"]
    assert weighed == pytest.approx(metrics["ce"]["unmasked"], rel=1e-6)


def test_one_constant_source(opened, windows, metrics):
    assert metrics["constant_r"]["r"] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1])
    ce = metrics["constant_r"]["ce"]
    assert ce[-1] == metrics["ce"]["target"] and ce[0] == pytest.approx(metrics["ce"]["ci"], rel=1e-6)
    _, g, _ = opened.importances(windows[:, :-1])
    half_way = torch.cat([(1 + g) / 2, torch.full((*g.shape[:-1], L), 0.5)], -1)
    assert ce[5] == pytest.approx(judged(opened, windows, half_way)[2], rel=1e-4)


def test_l0_and_live_by_brute_force(opened, corpus, windows):
    opened.ci_fn.out.bias.data[:5] = -100  # never on
    opened.ci_fn.out.weight.data[5], opened.ci_fn.out.bias.data[5] = 0, 1e-7  # always on, but too little to be live
    metrics, mean_g = evaluate(opened, corpus, config(batch=3))
    names = [name for name, C_l in opened.decomposition.C.items() for _ in range(C_l)]  # of each subcomponent
    on, total, above = dict.fromkeys(names, 0), torch.zeros(C), 0
    for window in windows:
        for g in opened.importances(window[None, :-1])[1][0]:  # [C] of a position
            total += g
            above += sum(value > 0.1 for value in g.tolist())
            for name, value in zip(names, g.tolist()):
                on[name] += value > 0
    live = {name: sum(total[c].item() / (8 * T) > 1e-6 for c in range(C) if names[c] == name) for name in on}
    assert metrics["l0"]["per_matrix"] == pytest.approx({name: n / (8 * T) for name, n in on.items()})
    assert metrics["l0"]["total"] == pytest.approx(sum(on.values()) / (8 * T))
    assert metrics["l0_above_0.1"] == pytest.approx(above / (8 * T)) and 0 < above < sum(on.values())
    assert metrics["live"]["per_matrix"] == live and metrics["live"]["total"] == sum(live.values()) <= C - 6
    assert metrics["live"]["C"] == C
    assert list(mean_g) == opened.decomposition.names
    assert np.concatenate([*mean_g.values()]).tolist() == pytest.approx((total / (8 * T)).tolist(), rel=1e-4, abs=1e-9)


def test_adversaries_of_the_table(opened, windows, metrics):
    """adversarial_n is the mean of the last KLs over three starts, _largest the largest of any."""
    drawn = generator()
    for _ in MODES:  # of the same generator as the masks before them
        losses.sample_sources((8, T, C + L), drawn)
    (batch,), _ = evaluation.of_windows(opened, windows, 8)
    assert metrics["adv_steps"] == [2, 3]
    for n in (2, 3):
        met = [adversarial_sources(opened.decomposition, [batch], n, drawn, opened.kl)[1:] for _ in range(3)]
        assert metrics["kl"][f"adversarial_{n}"] == pytest.approx(sum(last for last, _ in met) / 3)
        assert metrics["kl"][f"adversarial_{n}_largest"] == max(largest for _, largest in met)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batch_changes_no_number(opened, corpus, metrics, batch):
    other, _ = evaluate(opened, corpus, config(batch=batch))
    assert metrics["run_mark"] == other["run_mark"]
    apart = ("seconds", "run_mark")
    numbers, others = ({k: v for k, v in flat(m).items() if not k.startswith(apart)} for m in (metrics, other))
    assert others == pytest.approx(numbers, rel=1e-5)


def flat(tree, path=""):
    """{"kl.zero": 0.1, ...} of nested dictionaries and lists of numbers."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in flat(value, f"{path}.{key}".strip(".")).items()}
    return {path: tree}


def test_short_is_the_same_numbers(opened, corpus, windows, metrics):
    c = dataclasses.make_dataclass("Config", ["T", "leak"])(T, 0.01)
    state, weights = torch.get_rng_state(), [*opened.decomposition.parameters(), *opened.ci_fn.parameters()]
    wanted, before = [p.requires_grad for p in weights], [p.detach().clone() for p in weights]
    row = evaluation.short(opened.decomposition, opened.ci_fn, corpus, c)
    # Nothing is left behind
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled()
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, weights))
    assert [p.requires_grad for p in weights] == wanted
    assert row == evaluation.short(opened.decomposition, opened.ci_fn, corpus, c)
    # What needs no random masks is in the table, on the same 8 windows
    assert row["val_l0"] == metrics["l0"]["total"] and row["val_live"] == metrics["live"]["total"]
    assert row["val_kl_rounded"] == pytest.approx(metrics["kl"]["rounded_0.0"], rel=1e-5)
    # The rest is made here once more
    drawn = generator()
    (batch,), _ = evaluation.of_windows(opened, windows, 8)
    m = masks("stochastic", batch[2], L, drawn)
    assert row["val_kl_stochastic"] == pytest.approx(judged(opened, windows, m)[1], rel=1e-4)
    losses.sample_sources((8, T, C + L), drawn)  # as the rounded masks did
    _, last, _ = adversarial_sources(opened.decomposition, [batch], 20, drawn, opened.kl)
    assert row["val_kl_adversarial"] == pytest.approx(last) and last > row["val_kl_stochastic"]


def test_a_short_evaluation_is_logged_of_the_weights_that_are_saved(whole):
    opened, corpus = evaluation.open_run(whole)
    c = dataclasses.make_dataclass("Config", ["T", "leak"])(opened.config["T"], opened.config["leak"])
    logged = [row for row in run.read_log(whole) if "val_l0" in row][-1]
    row = evaluation.short(opened.decomposition, opened.ci_fn, corpus, c)
    assert logged == {"step": TINY["steps"] - 1} | row


# ---------------------------------------------------------------------------------------------------------------------
# metrics.json and the command


def test_evaluating_again_gives_the_same_numbers(whole, tmp_path, capsys, monkeypatch):
    """`python eval.py` of a finished run, and what decompose.py wrote at its end."""
    again, drawn = shutil.copytree(whole, tmp_path / "again"), []
    for name in ("plot_losses", "plot_spectrum", "plot_importances", "plot_ablations"):
        monkeypatch.setattr(evaluation, name, lambda *args: drawn.append(args))
    evaluation.main(evaluation.Config(str(again), windows=TINY["eval_windows"], adv_steps="2", against=str(whole)))
    first, second = (evaluation.read_metrics(folder) for folder in (whole, again))
    for name in ("run_mark", "ce", "l0", "live", "hidden_mse", "constant_r", "compute_recovered", "faithfulness"):
        assert first[name] == second[name]
    assert first["adv_steps"] == [20, 80] and second["adv_steps"] == [2]
    assert second["windows"] == TINY["eval_windows"] and second["seed"] == 0
    assert table(second, {name: 6 for name in first["l0"]["per_matrix"]}) in capsys.readouterr().out
    assert len(drawn) == 4 and drawn[-1][0] == {str(again): second, str(whole): first}


@pytest.mark.parametrize("steps", ["", "0", "20,0", "20,-5", "20,", ",", "twenty", "2.5", "20 80", "1e3", "nan"])
def test_bad_steps_of_the_adversary(steps):
    line = one_line(evaluation, "somewhere", f"--adv_steps={steps}")
    assert line == f"error: adv_steps={steps!r}: must be whole numbers above 0, as in 20,80"


@pytest.mark.parametrize("steps, expected", [("20", [20]), ("1, 2 ,3", [1, 2, 3])])
def test_steps_of_the_adversary(steps, expected):
    assert evaluation.Config("", adv_steps=steps).steps_of_adversary() == expected


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--windows=0", "windows=0: must be above 0"),
        ("--batch=-1", "batch=-1: must be 0 or above"),
        ("--seed=-1", "seed=-1: must be 0 or above"),
        ("--against=nowhere", "nowhere/metrics.json does not exist: evaluate that run first"),
        ("--device=abacus", "device=abacus: cannot be used here"),
    ],
)
def test_bad_flags_end_in_one_line_before_anything_is_evaluated(whole, flag, message, monkeypatch):
    def evaluate(*_):
        raise AssertionError("too late")

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    assert message in one_line(evaluation, str(whole), flag)


def test_read_metrics_refuses(tmp_path):
    path = tmp_path / "metrics.json"
    with pytest.raises(UserError, match=f"{re.escape(str(path))} does not exist: evaluate that run first"):
        evaluation.read_metrics(tmp_path)
    whole = {"constant_r": {}, "adv_steps": [20], "kl": {"adversarial_20_largest": 1.0}}
    path.write_text(json.dumps(whole))
    assert evaluation.read_metrics(str(tmp_path)) == whole
    path.write_text(json.dumps(whole | {"run_mark": "a"}))
    assert evaluation.read_metrics(tmp_path, "a")["run_mark"] == "a"
    with pytest.raises(
        UserError, match="is of an earlier training or code than the checkpoint beside it: run eval.py again"
    ):
        evaluation.read_metrics(tmp_path, "b")
    older = [
        {name: value for name, value in whole.items() if name != "constant_r"},
        {name: value for name, value in whole.items() if name != "adv_steps"},
        whole | {"kl": {"adversarial_20": 1.0}},
    ]
    for text in ["", json.dumps(whole)[:-3], "[]", "3", *map(json.dumps, older)]:
        path.write_text(text)
        with pytest.raises(UserError, match="is not a whole metrics.json of eval.py"):
            evaluation.read_metrics(tmp_path)
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="is not a whole metrics.json of eval.py"):
        evaluation.read_metrics(tmp_path)


def test_a_mark_is_of_U_V_and_Gamma(opened):
    """Each of their weights changes it, and nothing else."""
    mark, U, V = opened.mark, opened.decomposition.U, opened.decomposition.V
    assert re.fullmatch("[0-9a-f]{16}", mark) and copy.deepcopy(opened).mark == mark
    with torch.no_grad():
        for weight in (U["blocks.0.attn.q"], V["blocks.1.mlp.down"], opened.ci_fn.out.bias):
            weight.view(-1)[-1] += 1e-3
            assert opened.mark != mark
            weight.view(-1)[-1] -= 1e-3
            mark = opened.mark
        opened.unembedding[0] += 1
    assert opened.mark == mark


@pytest.mark.parametrize(
    "log",
    [None, b"", b"\xff", b'{"step": 3, "val_l0": 2}\n', b"7\n", b'{"total": 1}\n', b'{"step": 1, "total": 1}\n', b"{"],
)
def test_a_run_reduced_to_its_checkpoint(whole, tmp_path, log, monkeypatch, capsys):
    """It is evaluated all the same, without losses.png; also where metrics.jsonl is not what it should be."""
    shutil.copy(whole / "checkpoint.pt", tmp_path)
    if log is not None:
        (tmp_path / "metrics.jsonl").write_bytes(log)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: (evaluation.read_metrics(whole), {"x.y.q": np.ones(2)}))
    evaluation.main(evaluation.Config(str(tmp_path), windows=2, batch=2))
    assert f"not drawn, as {tmp_path}/metrics.jsonl holds no step of the training" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "spectrum.png", "importances.png", "ablations.png"
    }  # fmt: skip
    assert (tmp_path / "generations.txt").exists()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("bias", [0, -1000])
@pytest.mark.parametrize("only", ["blocks.0.attn.q", "blocks.1.mlp.up"])
def test_one_subcomponent_of_one_matrix_is_evaluated(gpt, corpus, tmp_path, only, bias, monkeypatch):
    """Live or dead; and with T = 1 queries make no difference, so that there is no gap of which a share is left."""
    f, T = Decomposition(gpt, {only: 1}, generator(2), ends_in="hidden"), 1 if only.endswith("q") else 8
    gamma = CITransformer([V.shape[0] for V in f.V.values()], 1, 16, 1, 2, 16)
    nn.init.constant_(gamma.out.bias, bias + 0.3)
    checkpoint = {"target": {"curve": [[1, 2.0]], "seconds": 1.0}, "seconds": 2.0}
    opened = evaluation.Run(tmp_path, {"leak": 0.01, "T": T}, checkpoint, f, gamma)
    monkeypatch.setattr(evaluation, "generations", lambda *_: "")
    ids = dataclasses.replace(corpus, encoding=tokenise.bpe_encoding([b"%d" % i for i in range(50)]))
    metrics = evaluation.report(opened, ids, config())
    assert metrics["live"]["total"] == (bias == 0) and all(map(math.isfinite, metrics["ce_unrecovered"].values()))
    assert (metrics["ce_unrecovered"]["zero"] == 0) == (T == 1)


# ---------------------------------------------------------------------------------------------------------------------
# D. Table


def test_table_shows_every_number():
    counts = {"blocks.0.attn.q": 3, "blocks.0.mlp.up": 5, "blocks.1.attn.q": 7}
    metrics = {
        "ce": {"target": 0.5} | {mode: 1.0 + i for i, mode in enumerate(MODES)},
        "kl": {mode: 0.125 * i for i, mode in enumerate(MODES)}
        | {"adversarial_20": 0.31, "adversarial_20_largest": 0.32, "adversarial_1280": 0.41}
        | {"adversarial_1280_largest": 0.42},
        "ce_unrecovered": {mode: 0.01 * i for i, mode in enumerate(MODES)},
        "compute_recovered": {mode: 1 - 0.05 * i for i, mode in enumerate(MODES)},
        "adv_steps": [20, 1280],
        "l0": {"total": 6.75, "per_matrix": dict(zip(counts, (1.5, 2.25, 3.0)))},
        "l0_above_0.1": 5.25,
        "live": {"total": 9, "per_matrix": dict(zip(counts, (2, 3, 4))), "C": 15},
        "faithfulness": 1.25e-7,
        "hidden_mse": {"stochastic": 0.0125, "ci": 0.25},
        "seconds": {"target": 51.0, "decompose": 377.0, "eval": 42.0},
    }
    rows = {" ".join(line.split()) for line in table(metrics, counts).splitlines()}
    assert rows == {
        "CE KL CE unrecovered compute recovered",
        "target 0.5000",
        "unmasked 1.0000 0.0000 0.00% 100.0%",
        "stochastic 2.0000 0.1250 1.00% 95.0%",
        "stochastic_no_delta 3.0000 0.2500 2.00% 90.0%",
        "ci 4.0000 0.3750 3.00% 85.0%",
        "rounded_0.0 5.0000 0.5000 4.00% 80.0%",
        "rounded_0.1 6.0000 0.6250 5.00% 75.0%",
        "rounded_0.5 7.0000 0.7500 6.00% 70.0%",
        "random 8.0000 0.8750 7.00% 65.0%",
        "zero 9.0000 1.0000 8.00% 60.0%",
        "adversarial_20 0.3100 largest met 0.3200",
        "adversarial_1280 0.4100 largest met 0.4200",
        "",
        "C live L0",
        "blocks.0.attn.q 3 2 1.50",
        "blocks.0.mlp.up 5 3 2.25",
        "blocks.1.attn.q 7 4 3.00",
        "blocks.0 8 5 3.75",  # 3 + 5, 2 + 3, 1.5 + 2.25
        "blocks.1 7 4 3.00",
        "total 15 9 6.75",
        "total, g > 0.1 5.25",
        "faithfulness 1.25e-07 hidden MSE stochastic 0.0125, ci 0.2500",
        "seconds: target 51, decompose 377, eval 42",
    }


def test_columns_of_the_table_stand_below_each_other(metrics, opened):
    lines = table(metrics, opened.decomposition.C).splitlines()
    ends = [[match.end() for match in re.finditer(r"(?<= )\S+(?= |$)", line)] for line in lines[2 : 2 + len(MODES)]]
    assert all(end == ends[0] for end in ends) and len(ends[0]) == 4


# ---------------------------------------------------------------------------------------------------------------------
# E. Figures


def pixels(path):
    """The picture, [height, width, 3] in 0 .. 255."""
    from matplotlib import image

    return (255 * image.imread(path)[..., :3]).round().astype(int)


def test_figures_of_a_run_are_drawn(whole):
    for name in ("losses", "spectrum", "importances", "ablations"):
        picture = pixels(whole / "figures" / f"{name}.png")
        assert min(picture.shape[:2]) > 300
        assert 0.02 < (picture.min(-1) < 250).mean() < 0.98, name  # neither an empty page nor a black one


@pytest.fixture
def figure(monkeypatch):
    """The axes of the figure that was drawn last, in place of its file: figure()."""
    drawn = []
    monkeypatch.setattr(evaluation, "save_figure", lambda figure, path: drawn.append(figure))
    return lambda: drawn[-1].axes


def heights(ax):
    """The heights of each line of these axes."""
    return [list(map(float, line.get_ydata())) for line in ax.lines]


def test_losses_are_drawn_times_their_coefficients(figure):
    names = ["stochastic", "importance", "frequency", "faithfulness"]  # beta_adv = 0 leaves the first one out
    betas = dict(adversarial=0, stochastic=0.5, importance=2, frequency=3, faithfulness=1e5)
    rows = [{"step": i, "total": 9.0, "l0": 9 - i, "p": 2.0} | dict.fromkeys(names, 1.0 + i) for i in range(3)]
    evaluation.plot_losses(rows, betas, None)
    losses, l0, p = figure()
    assert dict(zip((line.get_label() for line in losses.lines), heights(losses))) == {
        "0.5 × stochastic": [0.5, 1, 1.5],
        "2 × importance": [2, 4, 6],
        "3 × frequency": [3, 6, 9],
        "100000 × faithfulness": [1e5, 2e5, 3e5],
        "total": [9, 9, 9],
    }
    assert (heights(l0), heights(p)) == ([[9, 8, 7]], [[2, 2, 2]])


def test_spectrum_says_how_many_are_live(figure):
    mean_g = {"blocks.0.attn.q": np.array([1e-8, 0.5, 2e-6, 0]), "blocks.1.mlp.up": np.array([1e-7, 1e-9])}
    evaluation.plot_spectrum(mean_g, None)
    first, second = figure()
    legends = [ax.get_legend().get_texts()[0].get_text() for ax in (first, second)]
    assert legends == ["q: 2 of 4 live", "up: 0 of 2 live"]
    # Sorted, with 0 at the floor; a dot at the last live one; the line between the live and the others
    assert heights(first) == [[0.5, 2e-6, 1e-8, 1e-9], [2e-6], [1e-6, 1e-6]] and first.lines[1].get_xdata() == [2]


def test_ablations_of_two_runs_are_drawn(figure, metrics):
    other = copy.deepcopy(metrics) | {"adv_steps": [2]}
    evaluation.plot_ablations({"this": metrics, "other": other}, None)
    left, right = figure()
    largest = [metrics["kl"][f"adversarial_{n}_largest"] for n in (2, 3)]
    stochastic, target, ce = (
        [metrics["kl"]["stochastic"]] * 2,
        [metrics["ce"]["target"]] * 2,
        metrics["constant_r"]["ce"],
    )
    assert heights(left) == [largest, stochastic, largest[:1], stochastic]
    assert heights(right) == [ce, ce, target]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [0, 1, 2, 3, 40])
def test_importances_of_any_number_of_subcomponents_are_drawn(figure, n):
    """Those above 0.1 somewhere; none at all is no reason to warn."""
    g = np.zeros((6, 50), np.float32)
    g[3, :n], g[:, 45] = np.linspace(0.2, 1, n), 0.09
    evaluation.plot_importances(g, list("tokens"), None)
    for image in figure()[0].images if n else []:
        assert sorted(image.get_array()[:, 3].tolist()) == np.linspace(0.2, 1, n, dtype=np.float32).tolist()
    assert [label.get_text() for label in figure()[0].get_xticklabels()] == list("tokens")


# ---------------------------------------------------------------------------------------------------------------------
# Generations


def test_generations_stand_side_by_side(whole):
    opened, corpus = evaluation.open_run(whole)
    text, T = evaluation.generations(opened, corpus, 0), opened.config["T"]
    assert text == (whole / "generations.txt").read_text()
    prompt = corpus.batch("val", 1, 1, T, 0)[:, : T // 2]
    assert text.startswith("prompt:\n" + corpus.encoding.decode(prompt[0].tolist()) + "\n\ntarget ")
    lines = text[text.index("\n\ntarget ") + 2 :].splitlines()
    assert [name.strip() for name in lines[0].split(" | ")] == ["target", "stochastic", "rounded_0.0", "zero"]
    ids = generate(opened.decomposition.target, prompt, 64, T, generator())[0, T // 2 :]
    said = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in corpus.encoding.decode(ids.tolist()))
    written = "".join(line[:44] for line in lines[2:])  # the first column, below its name and a rule
    assert re.sub(r"\s|\ufffd", "", written) == re.sub(r"\s|\ufffd", "", said)


def test_numbers_of_a_run_are_finite(whole):
    metrics = evaluation.read_metrics(whole)
    assert len(metrics.pop("run_mark")) == 16
    assert all(math.isfinite(value) for value in flat(metrics).values())


BROKEN = {  # a change to a checkpoint, and what the one line names
    "no C": (lambda c: c.pop("C"), "it lacks 'C'"),
    "no leak": (lambda c: c["config"].pop("leak"), "it lacks 'config.leak'"),
    "no vocabulary": (lambda c: c["target"].pop("vocabulary"), "it lacks 'target.vocabulary'"),
    "no heads": (lambda c: c["target"]["gpt"].pop("n_head"), "it lacks 'target.gpt.n_head'"),
    "no width of Gamma": (lambda c: c["gamma"].pop("d_ci"), "d_ci"),
    "an argument of Gamma too many": (lambda c: c["gamma"].update(colour=1), "colour"),
    "no tensor of U": (lambda c: c["decomposition"].pop("U:blocks/0/attn/q"), "U:blocks/0/attn/q"),
    "a tensor of U too many": (lambda c: c["decomposition"].update({"U:x": torch.ones(1)}), "U:x"),
    "another shape of V": (
        lambda c: c["decomposition"].update({"V:blocks/0/attn/q": torch.ones(2, 2)}),
        "size mismatch",
    ),
    "no tensor of the target": (lambda c: c["target"]["model"].pop("embed.weight"), "embed.weight"),
    "a tensor of Gamma too many": (lambda c: c["ci_fn"].update(x=torch.ones(1)), "x"),
    "a list for a dictionary": (lambda c: c.update(decomposition=[1]), "not whole"),
    "another count": (lambda c: c["C"].update({"blocks.0.attn.q": 5}), "size mismatch"),
    "a matrix that is not there": (lambda c: c["C"].update({"blocks.7.attn.q": 5}), "blocks.7.attn.q"),
    "half precision": (
        lambda c: c["ci_fn"].update({"out.bias": c["ci_fn"]["out.bias"].half()}),
        "out.bias is torch.float16",
    ),
    "no number": (lambda c: c["decomposition"]["U:blocks/0/attn/q"].fill_(float("nan")), "is not finite"),
    "a config that is none": (lambda c: c.update(config="x"), "its config is no dictionary"),
    "no digest": (lambda c: c.pop("tokens"), "it lacks 'tokens'"),
    "a newer format": (lambda c: c.update(format=10**6), "a newer version of this code"),
    "no format": (lambda c: c.pop("format"), "an older version of this code"),
    "a format that is a word": (lambda c: c.update(format="new"), "of a newer version"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_checkpoint_that_is_not_whole_is_one_line_that_names_what(whole, tmp_path, what):
    change, named = BROKEN[what]
    checkpoint = torch.load(whole / "checkpoint.pt")
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    line = one_line(evaluation, str(tmp_path), "--windows=1", "--adv_steps=1")
    assert str(tmp_path / "checkpoint.pt") in line and re.search(named, line), line


def test_what_is_new_in_a_checkpoint_is_left_alone(whole, tmp_path):
    checkpoint = torch.load(whole / "checkpoint.pt")
    checkpoint |= {"new": 1}
    checkpoint["config"]["new"] = 2
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    opened, _ = evaluation.open_run(tmp_path)
    assert opened.checkpoint["new"] == 1
