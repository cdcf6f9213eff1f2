"""python -m toys: each check is shown a right answer and wrong ones; one toy runs end to end."""

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import one_line
from torch import nn

import checkpoints
import losses
import run
import toys.__main__ as toy
from decompose import VPD
from flags import UserError
from model import Decomposition
from toys import checks, figures, targets
from toys.__main__ import Config, preset
from toys.answer import start_from_answer
from toys.checks import column_match, dense_error, identity_error, live, matrix_cosine, n_shared, permute_identity
from toys.gamma import CIMLPs, CISharedMLP
from toys.targets import TMS, TOYS, InductionHead, PingPong, ResidMLP

ROOT = Path(toy.__file__).parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
EYE = torch.eye(3)


def wide(g: torch.Tensor, C: int) -> torch.Tensor:
    """g [n, k] with columns of zeros up to C."""
    return torch.nn.functional.pad(g, (0, C - g.shape[1]))


# What a check must say of each kind of answer: 3 features, g [3 probes, C].
ANSWERS = {
    "right": (wide(EYE, 5)[:, [3, 0, 4, 1, 2]], 0),  # permuted
    "split": (torch.cat((EYE, EYE), 1), 3),  # every feature on two subcomponents
    "one split": (torch.cat((EYE, EYE[:, :1], torch.zeros(3, 1)), 1), 1),
    "shared": (wide(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), 5), 2),  # one off the diagonal, one diagonal dark
    "dead": (wide(EYE[:, :2], 5), 1),
    "all dead": (torch.zeros(3, 5), 3),
    "all on": (torch.ones(3, 5), 12),
    "weak": (0.8 * EYE, 3),
    "fewer subcomponents than features": (EYE[:, :2], 1),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_identity_error_says_what_is_wrong(kind):
    g, error = ANSWERS[kind]
    assert identity_error(g) == error


def test_identity_error_at_a_wider_tolerance():
    assert identity_error(0.8 * EYE, tol=0.2) == 0


def test_permute_identity_only_moves_columns():
    g = torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    moved = permute_identity(g)
    assert sorted(map(tuple, moved.T.tolist())) == sorted(map(tuple, g.T.tolist()))
    assert moved.diagonal().sum() >= g.diagonal().sum()


def test_dense_error():
    full = torch.zeros(5, 20)
    full[:, [4, 11]] = 1
    assert dense_error(full, 2) == 0
    five = torch.zeros(5, 20)
    five[:, :5] = 1
    assert dense_error(five, 2) == 15  # three columns too many on five probes
    single_rows = torch.zeros(5, 20)
    single_rows[0, 0] = single_rows[1, 1] = 1
    assert dense_error(single_rows, 2) == 2  # lit, but not dense
    assert dense_error(torch.zeros(5, 20), 2) == 2
    assert dense_error(0.8 * full, 2) == 2
    half = torch.zeros(4, 3)
    half[:2, 0] = half[2:, 1] = 1
    assert dense_error(half, 2) == 0 and dense_error(half[1:], 2) == 1


def test_the_stricter_dense_error_behind_a_relu():
    """Exact importances of a neuron's pieces, on at about half of the probes: right as published, not to us."""
    torch.manual_seed(0)
    target = ResidMLP(100, 1, 50)
    on = (target.probes() @ target.W_E @ target.mlp_in[0].weight.T > 0).float()
    assert dense_error(on, 50, share=0) == 0 < dense_error(on, 50)
    aligned = wide(torch.eye(50).repeat(2, 1), 60)  # each on at two of 100 probes
    assert dense_error(aligned, 50, share=0) == 0 and dense_error(aligned, 50) == 50


def test_live_and_shared_counts():
    assert [int(live(ANSWERS[kind][0]).sum()) for kind in ("right", "split", "shared", "dead")] == [3, 6, 2, 2]
    assert [n_shared(ANSWERS[kind][0]) for kind in ("right", "split", "shared", "all on")] == [0, 0, 1, 5]


@pytest.fixture
def W():
    """Five columns 72 degrees apart, as TMS 5-2 learns them."""
    angle = torch.arange(5) * 2 * torch.pi / 5
    return 1.13 * torch.stack((angle.cos(), angle.sin()))


def test_match_of_a_right_answer(W):
    assert column_match(W, torch.eye(5), W) == pytest.approx((1, 1), abs=1e-6)
    flipped = column_match(-2 * W, -0.5 * torch.eye(5), W)  # scale and sign are free between U and V
    assert flipped == pytest.approx((1, 1), abs=1e-6)
    assert matrix_cosine(-2 * W, -0.5 * torch.eye(5), (W, torch.eye(5))) == pytest.approx(1, abs=1e-6)


def test_match_of_a_split_answer_shows_in_the_lengths_alone(W):
    U, V = torch.cat((W, W), 1), torch.cat((torch.eye(5), torch.eye(5)), 1) / 2
    assert column_match(U, V, W) == pytest.approx((1, 0.5), abs=1e-6)
    assert matrix_cosine(U, V, (W, torch.eye(5))) == pytest.approx(1, abs=1e-6)


def test_match_of_contaminated_V_shows_in_the_whole_matrix_alone(W):
    V = torch.eye(5)
    V[1, 0] = 0.5
    assert column_match(W, V, W) == pytest.approx((1, 1), abs=1e-6)
    assert matrix_cosine(W, V, (W, torch.eye(5))) == pytest.approx((4 + 1 / 1.25**0.5) / 5, abs=1e-6)


def test_match_of_an_svd(W):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    mmcs, _ = column_match(U * S, Vh.T, W)
    assert mmcs < 0.95
    assert matrix_cosine(U * S, Vh.T, (W, torch.eye(5))) < 0.7


def test_match_of_a_missing_feature(W):
    mmcs, ml2r = column_match(W[:, :4], torch.eye(5)[:, :4], W)
    assert mmcs < 0.81 and ml2r < 0.81  # 4 of 5 columns
    assert matrix_cosine(W[:, :4], torch.eye(5)[:, :4], (W, torch.eye(5))) == pytest.approx(0.8, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------


TARGETS = {  # and how many pieces each matrix has
    "tms": (lambda: TMS(5, 2, identity=False), {"linear1": 5, "linear2": 5}),
    "tms-id": (lambda: TMS(5, 2, identity=True), {"linear1": 5, "hidden": 2, "linear2": 5}),
    "resid": (lambda: ResidMLP(6, 2, 4, d=30), {"mlp_in.0": 6, "mlp_in.1": 6, "mlp_out.0": 4, "mlp_out.1": 4}),
    "ping_pong": (PingPong, {"circuits": 16}),
}


@functools.cache
def trained(name: str, steps: int) -> nn.Module:
    return targets.train(replace(TOYS[name], steps=steps), 0)


@pytest.mark.parametrize("kind", TARGETS)
def test_the_canonical_pieces_are_the_target(kind):
    """They sum to W, up to what no input of the target can see, so that leaving Delta out changes nothing."""
    torch.manual_seed(0)
    make, pieces = TARGETS[kind]
    target = make()
    x = target.batch(64, torch.Generator().manual_seed(1))
    with torch.no_grad():
        decomposition, g = checks.canonical_decomposition(target, x)
        unmasked = torch.cat((torch.ones_like(g), torch.zeros(64, decomposition.L)), -1)
        assert g.shape == (64, sum(decomposition.C.values()))
        if kind != "resid":  # its later layers read what mlp_out wrote outside of the features' span
            torch.testing.assert_close(decomposition(x, unmasked), target(x), atol=1e-5, rtol=0)
    linears = [name for name, module in target.named_modules() if isinstance(module, nn.Linear)]
    assert decomposition.C == pieces and list(pieces) == linears and set(target.dense) <= set(linears)


def test_ping_pong_circuits_are_independent():
    """With importance 1 exactly where a circuit is at work nothing is lost, whatever the masks: canonical MSE 0."""
    target = PingPong()
    x = target.batch(512, torch.Generator().manual_seed(0))
    decomposition, g = checks.canonical_decomposition(target, x)
    assert checks.masked_mse(decomposition, x, g, torch.Generator().manual_seed(1)) < 1e-12
    assert torch.linalg.matrix_rank(target.circuits.weight) == 2  # 16 circuits
    wrong = torch.zeros_like(g)
    assert checks.masked_mse(decomposition, x, wrong, torch.Generator().manual_seed(1)) > 1e-3


def test_ping_pong_probes_call_for_one_circuit_each():
    target = PingPong()
    probes = target.probes()
    assert torch.equal(target.active(probes), torch.eye(16, dtype=torch.bool))
    fan_in, fan_out = target(probes).split(8)
    assert (fan_in[:, 0] == 0.75).all() and not fan_in[:, 1:].any()
    assert torch.equal(fan_out[:, 1:], 0.75 * torch.eye(8)) and not fan_out[:, 0].any()


def test_the_canonical_band_of_tms():
    """Close to what was worked out for canonical pieces of a trained TMS 5-2: 2.7e-4, and 1e-2 without importances."""
    target = trained("tms_5-2", 5000)
    x = target.batch(20_000, torch.Generator().manual_seed(0))
    decomposition, g = checks.canonical_decomposition(target, x)
    mse, nothing = (checks.masked_mse(decomposition, x, on * g, torch.Generator().manual_seed(1)) for on in (1, 0))
    assert (mse, nothing) == pytest.approx((2.7e-4, 1.2e-2), rel=0.25)
    with torch.no_grad():
        assert target.loss(x).item() == pytest.approx(0.00178, rel=0.1)
        assert target.linear1.weight.norm(dim=0) == pytest.approx(torch.full((5,), 1.13), abs=0.02)
    assert torch.equal(target.linear2.weight, target.linear1.weight.T)  # tied in training, two memories after it
    assert target.linear2.weight.data_ptr() != target.linear1.weight.data_ptr()


def known(target, wrong=lambda g: g) -> VPD:
    """A finished run whose decomposition is the canonical one and whose Gamma knows which mechanisms are at work."""

    class Knowing(nn.Module):
        def forward(self, inputs):
            return wrong(checks.canonical_decomposition(target, inputs[0])[1])

    decomposition, _ = checks.canonical_decomposition(target, target.batch(2, torch.Generator()))
    return VPD(decomposition, Knowing(), preset("tms_5-2", "vpd"), (2,), torch.device("cpu"), losses.mse)


@pytest.mark.parametrize("name, steps", [("tms_5-2", 5000), ("tms_5-2-id", 1000), ("ping_pong", 0)])
def test_the_known_answer_passes_every_check_and_a_wrong_one_fails(name, steps):
    target = trained(name, steps)
    found = checks.feature_checks(known(target), seed=0)
    assert {c.name for c in found if c.ok is False} == set(), figures.table(name, found)
    assert sum(c.ok is True for c in found) == {"tms_5-2": 14, "tms_5-2-id": 17, "ping_pong": 7}[name]
    always_on = checks.feature_checks(known(target, wrong=torch.ones_like), seed=0)
    seen = {"permuted-CI error", "serve several", "L0 on data"}
    seen |= {"MSE stochastic"} if name != "ping_pong" else set()  # its known MSE is 0 too
    assert seen <= {c.name for c in always_on if c.ok is False}
    dead = checks.feature_checks(known(target, wrong=torch.zeros_like), seed=0)
    assert {"permuted-CI error", "live", "L0 on data"} <= {c.name for c in dead if c.ok is False}


def test_a_loss_that_is_not_finite_ends_the_run():
    config = replace(preset("tms_5-2", "vpd"), steps=2, faith_steps=0, lr=9e18, B=4)
    with pytest.raises(UserError, match="at step 1: try a smaller lr than 9e\\+18"):
        toy.decompose(config, TMS(5, 2, identity=False))


def test_a_rotated_residual_mlp_is_the_same():
    """Outputs, neurons, and the angles between features; with fewer dimensions."""
    torch.manual_seed(0)
    target = ResidMLP(6, 2, 4, d=60)
    same, x = target.rotated(), target.batch(64, torch.Generator().manual_seed(1))
    assert same.W_E.shape == (6, 22)
    torch.testing.assert_close(same(x), target(x))
    torch.testing.assert_close(same.W_E @ same.W_E.T, target.W_E @ target.W_E.T)
    torch.testing.assert_close(same.mlp_in[1](x @ same.W_E), target.mlp_in[1](x @ target.W_E))


def test_a_start_from_inputs():
    """With an input for each feature it is the known answer, as far as one feature is read without the others."""
    torch.manual_seed(0)
    target = ResidMLP(6, 1, 4, d=60).rotated()
    decomposition = Decomposition(target, {"mlp_in.*": 6, "*": 9})
    before = {name: V.clone() for name, V in decomposition.V.items()}
    toy.start_from_inputs(decomposition, "mlp_in.*", torch.eye(6))
    assert torch.equal(decomposition.V["mlp_out.0"], before["mlp_out.0"])
    U, V = decomposition.U["mlp_in.0"].detach(), decomposition.V["mlp_in.0"].detach()
    assert checks.matrix_cosine(U, V, target.canonical()["mlp_in.0"]) > 0.95
    torch.testing.assert_close(U.norm(dim=0), V.norm(dim=0))
    W = decomposition.W("mlp_in.0")
    assert ((W - U @ V.T) * (U @ V.T)).sum() == pytest.approx(0, abs=1e-4)  # no multiple of U V^T is nearer to W
    toy.start_from_inputs(decomposition, "mlp_in.*", torch.eye(6)[:3])  # too few inputs: the others stay as they are
    assert torch.equal(decomposition.V["mlp_in.0"][:, 3:], V[:, 3:])


@pytest.mark.parametrize("name, make", [("tms_5-2", TARGETS["tms"][0]), ("resid_mlp2", TARGETS["resid"][0])])
def test_a_start_from_the_answer(name, make):
    """Before the first step it is the answer: nothing is left over, and Gamma knows where each piece is wanted."""
    torch.manual_seed(0)
    target = make()
    config = replace(preset(name, "vpd"), C=8, from_answer=True)
    vpd = toy.build(config, target)
    start_from_answer(vpd, config.B, torch.Generator().manual_seed(1))
    for matrix in checks.matrices(vpd, target.probes()):
        assert (matrix.W - matrix.U @ matrix.V.T).norm() < 0.03 * matrix.W.norm()
        if matrix.name == "linear1":
            assert identity_error(matrix.g_probes) == 0
    with pytest.raises(UserError, match="C=3: the known answer has [456] subcomponents in (linear1|mlp_in.0)"):
        start_from_answer(toy.build(replace(config, C=3), target), 8, torch.Generator())


def test_the_best_restart_is_kept(capsys):
    config = replace(preset("tms_5-2", "vpd"), steps=20, faith_steps=5, B=16, C=6, restarts=3)
    best = toy.decompose(config, TMS(5, 2, identity=False))
    found = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(set(found)) == 3 and best.config.seed == 1000 * found.index(min(found))


def test_known_clusterings():
    """Both pieces of a feature in one component, the identity's two in another; not when a feature's pieces part."""
    target = TMS(5, 2, identity=True)
    assert {1, 2} <= set(checks.known_clusterings(known(target), seed=0))

    def part(g):  # linear1's piece of feature 0 is on wherever anything is
        return torch.cat((g.amax(-1, keepdim=True), g[:, 1:]), -1)

    assert checks.known_clusterings(known(target, wrong=part), seed=0) == []
    assert checks.known_clusterings(known(target, wrong=torch.zeros_like), seed=0) == []


def test_induction_batches():
    target = InductionHead()
    x = target.batch(200, torch.Generator().manual_seed(0))
    first = target.first(x)
    assert x.shape == (200, 64) and (x[:, 0] == 0).all() and (x[:, -1] == 129).all()
    assert ((x == 129).sum(1) == 2).all() and first.min() >= 2 and first.max() <= 61
    for row, at, m in zip(x.tolist(), first.tolist(), target.memory(x).tolist()):
        assert row[at] == 129 and row[at + 1] == m and 1 <= m <= 128
    assert target(x).shape == (200, 130)


def test_induction_attention_is_causal():
    target = InductionHead()
    x = target.batch(3, torch.Generator().manual_seed(0))
    patterns = []
    target.layers[0].pattern.register_forward_hook(lambda module, args, out: patterns.append(out))
    target(x)
    assert patterns[0].triu(1).abs().max() == 0
    torch.testing.assert_close(patterns[0].sum(-1), torch.ones(3, 64))


def test_sparse_features():
    x = targets.sparse_features((20_000, 4), 0.05, -1.0, torch.Generator().manual_seed(0))
    assert (x != 0).float().mean().item() == pytest.approx(0.05, abs=0.005)
    on = x[x != 0]
    assert -1 <= on.min() < -0.95 and 0.95 < on.max() <= 1 and on.mean().abs() < 0.05


# ---------------------------------------------------------------------------------------------------------------------


def test_ci_mlps_look_at_one_subcomponent_each():
    V = [torch.randn(4, 3, requires_grad=True), torch.randn(6, 2, requires_grad=True)]
    torch.manual_seed(0)
    ci_fn = CIMLPs(V, d_hidden=5)
    inputs = [torch.randn(7, 4), torch.randn(7, 6)]
    z = ci_fn(inputs)
    assert z.shape == (7, 5)
    z[:, 4].sum().backward()
    assert V[0].grad is None or not V[0].grad.any()
    assert V[1].grad[:, 1].any() and not V[1].grad[:, 0].any()
    assert len([*ci_fn.parameters()]) == 4  # V stay the decomposition's
    a = inputs[1] @ V[1][:, 1]  # the last one by hand
    by_hand = torch.nn.functional.gelu(a[:, None] * ci_fn.w_in[4] + ci_fn.b_in[4]) @ ci_fn.w_out[4] + ci_fn.b_out[4]
    torch.testing.assert_close(z[:, 4], by_hand)


def test_ci_shared_mlp_sees_all_layers():
    torch.manual_seed(0)
    ci_fn = CISharedMLP([4, 6], C=5, d_hidden=8)
    inputs = [torch.randn(3, 2, 4, requires_grad=True), torch.randn(3, 2, 6, requires_grad=True)]
    z = ci_fn(inputs)
    assert z.shape == (3, 2, 5)
    z[..., 0].sum().backward()
    assert all(x.grad.any() for x in inputs)
    assert [(layer.in_features, layer.out_features) for layer in (ci_fn.inp, ci_fn.out)] == [(10, 8), (8, 5)]


# ---------------------------------------------------------------------------------------------------------------------


def test_contradictions_are_refused_with_both_names():
    with pytest.raises(UserError, match="method=spd contradicts beta_adv=0.5"):
        Config(toy="tms_5-2", method="spd", beta_adv=0.5, beta_freq=0.0)
    with pytest.raises(UserError, match="method=spd contradicts beta_freq=0.1"):
        Config(toy="tms_5-2", method="spd", beta_adv=0.0, beta_freq=0.1)
    with pytest.raises(UserError, match="ci=transformer contradicts toy=tms_5-2"):
        Config(toy="tms_5-2", ci="transformer")


@pytest.mark.parametrize("flags, said", [
    (["nosuch"], "unknown toy 'nosuch': there are tms_5-2, tms_5-2-id"),
    (["tms_5-2", "--method=spd", "--beta_adv=0.5"], "method=spd contradicts beta_adv=0.5"),
    (["--steps=3", "resid_mlp1"], "resid_mlp1: the name of the toy comes first"),
    (["tms_5-2", "--C=0"], "C=0: must be above 0"),
    (["tms_5-2", "--ci=mlp"], "ci=mlp contradicts ci_spread=20.0 or ci_bias=-1.0"),
    (["tms_5-2", "--method=spd", "--ci_spread=7"], "ci=mlp contradicts ci_spread=7.0"),
    (["tms_5-2", "--ci_bias=nan"], "ci_bias=nan: must be a number of magnitude below 2^63"),
    (["tms_5-2", "--ci_spread=inf"], "ci_spread=inf: must be 0 or above"),
    (["tms_5-2", "--lr=inf"], "lr=inf: must be above 0"),
    (["tms_5-2", "--beta_imp=nan"], "beta_imp=nan: must be 0 or above"),
    (["tms_5-2", "--beta_adv=0", "--beta_stoch=0"], "without a reconstruction loss"),
    (["tms_5-2", "--device=cuda"], "device=cuda: toys run on the CPU"),
    (["tms_5-2", "--restart=2"], "did you mean --restarts?"),
    (["induction", "--hidden=12"], "hidden=12: with ci=transformer a multiple of 8"),
    (["ping_pong", "--steps=2", "--C=6", "--lr=9e18"], "at step 1: try a smaller lr than 9e+18"),
    (["tms_5-2", "--out=full"], "out=full is not an empty folder"),
])  # fmt: skip
def test_bad_flags_end_with_one_line(flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "checkpoint.pt").touch()
    assert said in one_line(toy, *flags)
    assert not [path for path in tmp_path.glob("out/*/*")]


@pytest.mark.parametrize("method", ["vpd", "spd"])
@pytest.mark.parametrize("name", TOYS)
def test_every_toy_has_presets_and_steps(name, method):
    """Two steps of every toy with its own settings at a small size: finite losses, one Decomposition for all."""
    config = replace(preset(name, method), B=4, steps=2, faith_steps=2, C=6)
    torch.manual_seed(0)
    target = TOYS[name].make()
    vpd = toy.decompose(config, target)
    assert isinstance(vpd, VPD) and isinstance(vpd.decomposition, Decomposition) and vpd.step == 2
    g = checks.importances(vpd, target.batch(5, torch.Generator().manual_seed(0)))
    assert g.shape[-1] == sum(vpd.decomposition.C.values()) and g.isfinite().all() and 0 <= g.min() and g.max() <= 1
    assert (vpd.divergence is losses.kl_divergence) == (name == "induction")
    assert ("adversarial" in vpd.train_step(target.batch(4, torch.Generator().manual_seed(1)))) == (method == "vpd")


def test_the_induction_table():
    torch.manual_seed(0)
    config = replace(preset("induction", "vpd"), B=4, steps=1, faith_steps=1, C=3)
    vpd = toy.decompose(config, InductionHead())
    ablations = checks.induction_ablations(vpd, seed=0, rows=16)
    assert {f"without layers.{l}.{w}" for l in (0, 1) for w in "qkvo"} <= set(ablations)
    assert all(0 <= value <= 1 for row in ablations.values() for value in row)
    assert not vpd.decomposition.target.layers[0].pattern._forward_hooks  # nothing stays behind
    assert "last S attends to m" in figures.ablation_table(ablations)


@pytest.mark.parametrize("name, flags, n", [("ping_pong", ["--seed=1"], 7), ("induction", [], 10)])
def test_a_run_leaves_its_folder(name, flags, n, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TOYS, name, replace(TOYS[name], steps=min(1, TOYS[name].steps)))
    monkeypatch.setattr(sys, "argv", ["toys", name, "--steps=1", "--B=4", "--C=1", "--hidden=8", *flags])
    run.run_script(toy.main, Config, toy.__doc__, toy.defaults)
    seed = 1 if "--seed=1" in flags else 0
    folder = tmp_path / "out" / f"toy-{name}-vpd-{seed}"
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.json", "checkpoint.pt", "toy.png"}
    metrics, config = (json.loads((folder / f"{file}.json").read_text()) for file in ("metrics", "config"))
    assert set(metrics) == {"checks", "ablations", "alphas", "seconds"} and f"of {n} checks" in capsys.readouterr().out
    assert (config["toy"], config["seed"], config["hidden"]) == (name, seed, 8)
    assert set(checkpoints.load_checkpoint(folder / "checkpoint.pt", "toy")["vpd"]["decomposition"]) >= {
        "U:circuits" if name == "ping_pong" else "U:layers/0/q"
    }


@pytest.mark.parametrize(
    "args, shown", [([], {"3000", "50", "-1.0"}), (["resid_mlp1"], {"12000", "5e-06", "2.2", "mlp"})]
)
def test_help_shows_the_preset_of_the_toy(args, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toys", *args, "--help"])
    with pytest.raises(SystemExit) as stop:
        run.run_script(toy.main, Config, toy.__doc__, toy.defaults)
    out = capsys.readouterr().out
    assert not stop.value.code and "Toys with known answers" in out
    assert shown <= set(re.findall(r"\(default: (\S*)\)", out))


@pytest.mark.slow
def test_tms_5_2_end_to_end(tmp_path):
    """The command of the README, from another folder, recovers the mechanisms exactly."""
    command = [sys.executable, "-m", "toys", "tms_5-2", "--device=cpu"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENV)
    assert ran.returncode == 0, ran.stderr
    folder = tmp_path / "out" / "toy-tms_5-2-vpd-0"
    found = {(c["name"], c["matrix"]): c for c in json.loads((folder / "metrics.json").read_text())["checks"]}
    assert found["MMCS of columns", "linear1"]["value"] >= 0.999
    assert 0.96 <= found["ML2R of columns", "linear1"]["value"] <= 1.02
    assert found["whole-matrix cosine", "linear1"]["value"] >= 0.99
    for matrix in ("linear1", "linear2"):
        assert found["permuted-CI error", matrix]["value"] == 0
        assert found["live", matrix]["value"] == 5
        assert 0.15 <= found["L0 on data", matrix]["value"] <= 0.28
    assert 1e-4 <= found["MSE stochastic", ""]["value"] <= 1e-3
    assert all(c["ok"] is not False for c in found.values())
    assert (folder / "toy.png").stat().st_size > 10_000 and (folder / "checkpoint.pt").exists()
    assert "14 of 14 checks pass" in ran.stdout


def test_a_pattern_that_matches_no_matrix_is_refused():
    config = Config(toy="resid_mlp2", C=4, from_inputs="mlp_on.*")
    with pytest.raises(UserError, match=r"from_inputs='mlp_on\.\*' matches none of mlp_in\.0, mlp_in\.1, mlp_out\.0"):
        toy.build(config, ResidMLP(6, 2, 3, d=8))
