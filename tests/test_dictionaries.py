"""Axes against a loop, masks of 1 and perfect replacements cost nothing, Jacobians against autograd, the run."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import one_line

from eval import open_run
from studies import dictionaries
from studies.dictionaries import (
    PROTOCOLS,
    Config,
    Part,
    ascend,
    dictionary_jacobians,
    dictionary_passes,
    gelu_slope,
    halves,
    kl_with_masks,
    kl_with_unselected,
    mean_cosine,
    measure,
    mlp_jacobians,
    neuron_passes,
    parts_of,
    rounded,
    size,
    vpd_jacobians,
    vpd_passes,
)
from studies.dictionary import Settings, clean_outputs, mlps_of, new, target_pass

close = torch.testing.assert_close


@pytest.fixture
def opened(whole):
    return open_run(whole)


@pytest.fixture
def parts(opened) -> list[Part]:
    run, corpus = opened
    return parts_of(run, {"whole": run}, halves(corpus, 40, 16, 0)[1])


def settings(kind, **changes) -> Settings:
    return Settings(kind, **dict(D=24, k=3, steps=4, B=3, T=16, lr=1e-2) | changes)


# ---------------------------------------------------------------------------------------------------------------------
# Axes and protocols


def test_the_axes_by_a_loop():
    d, d_mlp = 64, 256
    assert size("plt", [6.0, 4.0], d, d_mlp) == {"module": 5, "mlp": 5, "parameters": 10 * 2 * d}
    # a CLT's layer 0 writes to 2 MLPs, its layer 1 to 1
    assert size("clt", [6.0, 4.0], d, d_mlp) == {"module": 5, "mlp": (6 + 10) / 2, "parameters": 6 * 3 * d + 4 * 2 * d}
    k = 2.0
    assert size("clt", [k] * 4, d, d_mlp)["mlp"] == 2.5 * k
    vpd = size("vpd", [8.0, 9.0, 3.0, 4.0], d, d_mlp)
    assert vpd == {"module": 6, "mlp": 12, "parameters": 24 * (64 + 256)}


def test_all_masks_and_Deltas_at_1_cost_nothing(opened, parts):
    run, _ = opened
    ones = lambda part: vpd_passes(run, part, torch.ones_like(F.pad(part.g["whole"], (0, run.decomposition.L))))
    found = measure(run, parts, "vpd", ones)
    assert all(abs(value) < 1e-5 for value in found["delta_ce"].values()) and found["unexplained"] < 1e-8
    assert found["l0"] == pytest.approx([6, 6, 6, 6]) and found["mlp"] == pytest.approx(12)


def test_masks_are_those_of_the_mlps_alone(opened, parts):
    """Against brute force: W' of up and down in place of W, attention as it is."""
    run, _ = opened
    part, names = parts[0], run.decomposition.names
    m = rounded(run, part.g["whole"], 0.0)
    passes = vpd_passes(run, part, m)
    sizes = [*run.decomposition.C.values()]
    of = dict(zip(names, m[..., : sum(sizes)].split(sizes, -1)))

    def masked(name, x):
        return ((x @ run.decomposition.V[name]) * of[name]) @ run.decomposition.U[name].T

    def mlp(l, x):
        return masked(f"blocks.{l}.mlp.down", F.gelu(masked(f"blocks.{l}.mlp.up", x)))

    for l, x in enumerate(part.xs):
        close(passes.outputs[l], mlp(l, x), atol=1e-5, rtol=1e-4)
    with dictionaries.mlps_answered(run.decomposition.target, mlp):
        close(passes.hidden, run.decomposition.target.hidden(part.x), atol=1e-5, rtol=1e-4)
    mlp_l0 = [(of[f"blocks.{l}.mlp.{w}"] > 0).sum(-1).float().mean().item() for l in (0, 1) for w in ("up", "down")]
    assert passes.l0 == pytest.approx(mlp_l0)


def test_all_neurons_cost_nothing_and_few_cost_more(opened, parts):
    run, _ = opened
    target = run.decomposition.target
    deltas = [measure(run, parts, "neurons", partial(neuron_passes, target, k=k))["delta_ce"] for k in (32, 16, 0)]
    assert all(abs(value) < 1e-5 for value in deltas[0].values())
    zero = measure(run, parts, "vpd", lambda part: vpd_passes(run, part, torch.zeros(1, 1, 12 * 6 + 12)))["delta_ce"]
    assert deltas[2] == pytest.approx(zero, abs=1e-5)


def test_a_measurement_is_the_mean_over_windows(opened, parts):
    run, corpus = opened
    target = run.decomposition.target
    plt = new(settings("plt"), target)
    plt.threshold += 0.5
    whole = parts_of(run, {}, halves(corpus, 40, 16, 0)[1][:32])
    both = [measure(run, of, "plt", partial(dictionary_passes, target, plt)) for of in (parts, parts[:1], parts[1:])]
    sizes = [len(part.x) for part in parts]
    assert sizes == [32, 8] and whole[0].x.equal(parts[0].x)
    for protocol in PROTOCOLS:
        mean = (32 * both[1]["delta_ce"][protocol] + 8 * both[2]["delta_ce"][protocol]) / 40
        assert both[0]["delta_ce"][protocol] == pytest.approx(mean, abs=1e-6)
    hs = [F.relu(plt.encode(l, x)) for l, x in enumerate(parts[0].xs)]
    l0 = [float(np.mean([[int((row > 0.5).sum()) for row in window] for window in h])) for h in hs]
    assert both[1]["l0"] == pytest.approx(l0) and both[1]["module"] == pytest.approx(sum(l0) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Faithfulness


def test_jacobians_against_autograd(opened, parts):
    run, _ = opened
    x = torch.cat([part.xs[0].flatten(0, 1) for part in parts])[:5]
    mlp = mlps_of(run.decomposition.target)[0]
    expected = torch.stack([torch.autograd.functional.jacobian(mlp, row) for row in x])
    close(mlp_jacobians(mlp.up.weight, mlp.down.weight, x), expected, atol=1e-5, rtol=1e-4)
    z = torch.linspace(-3, 3, 20, requires_grad=True)
    close(gelu_slope(z.detach()), torch.autograd.grad(F.gelu(z).sum(), z)[0], atol=1e-6, rtol=1e-5)


def test_whole_masks_have_the_true_jacobian(opened, parts):
    run, _ = opened
    xs = [x.flatten(0, 1)[:7] for x in parts[0].xs]
    true = [mlp_jacobians(mlp.up.weight, mlp.down.weight, x) for mlp, x in zip(mlps_of(run.decomposition.target), xs)]
    m = torch.ones(7, 12 * 6 + 12)
    found = vpd_jacobians(run, m, xs)
    for a, b in zip(found, true):
        close(a, b, atol=1e-5, rtol=1e-4)
    assert mean_cosine(found, true) == pytest.approx(1, abs=1e-5)
    assert mean_cosine([-2 * J for J in true], true) == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize("kind", ["sae", "plt", "clt"])
def test_a_dictionarys_jacobian_against_autograd(opened, parts, kind):
    run, _ = opened
    mlps, made = mlps_of(run.decomposition.target), new(settings(kind), run.decomposition.target)
    xs, ys = ([x.flatten(0, 1)[:4] for x in of] for of in (parts[0].xs, parts[0].ys))
    true = [mlp_jacobians(mlp.up.weight, mlp.down.weight, x) for mlp, x in zip(mlps, xs)]
    found = dictionary_jacobians(made, xs, ys, true)

    def output(x):
        h = made.codes(1, mlps[1](x) if kind == "sae" else x)
        return h @ made.own_decoder(1)

    expected = torch.stack([torch.autograd.functional.jacobian(output, row) for row in xs[1]])
    close(found[1], expected, atol=1e-5, rtol=1e-4)


def test_ascent_climbs_and_counts():
    goal = torch.tensor([1.0, 0.0, 1.0])
    kl = lambda r: 0.5 * (3 - (r - goal).abs().sum())
    ticks = []
    found = ascend([kl, kl], 3, 4, 2, torch.Generator().manual_seed(0), lambda: ticks.append(1))
    assert found["kl"] == found["largest"] == pytest.approx(3) and found["start"] < 2.5 and len(ticks) == 10


def test_what_the_adversary_adds_to_is_the_replacement(opened, parts):
    run, _ = opened
    target, part = run.decomposition.target, parts[1]
    plt = new(settings("plt"), target)
    plt.threshold += 0.4
    none, everything = (kl_with_unselected(run, plt, part, 1.0, torch.full((48,), r)) for r in (0.0, 1.0))
    close(none, run.kl(part.hidden, dictionary_passes(target, plt, part).hidden))
    plt.threshold.zero_()
    close(everything, run.kl(part.hidden, dictionary_passes(target, plt, part).hidden))
    g = part.g["whole"]
    close(kl_with_masks(run, g, part, 1.0, torch.ones(84)), torch.zeros(()), atol=1e-6, rtol=0)
    ci = vpd_passes(run, part, F.pad(g, (0, 12))).hidden
    close(kl_with_masks(run, g, part, 0.5, torch.zeros(84)), 0.5 * run.kl(part.hidden, ci))


# ---------------------------------------------------------------------------------------------------------------------
# The run


def test_halves_share_no_position(opened):
    _, corpus = opened
    A, B = halves(corpus, 30, 16, 0)
    tokens = corpus.tokens["val"]
    starts = {tuple(tokens[i : i + 17]): i for i in range(0, len(tokens) - 16, 16)}
    of = [{starts[tuple(window)] for window in half.tolist()} for half in (A, B)]
    assert len(of[0]) == len(of[1]) == 30 and not of[0] & of[1]
    with pytest.raises(dictionaries.UserError, match="windows=1000000: the validation text has"):
        halves(corpus, 10**6, 16, 0)


QUICK = dict(D=24, k="2,4", steps=3, windows=4, tokens=2000, adv_steps=1, starts=1)


@pytest.fixture
def copy(home, whole, request) -> str:
    name = f"dictionaries-{request.node.name}"
    shutil.copytree(whole, home / name)
    return name


def test_a_run_gets_its_dictionaries_and_goes_on(copy, capsys):
    quick = QUICK | dict(lr="1e-2,2e-2")
    dictionaries.main(Config((copy,), **quick))
    home = Path(copy, "dictionaries")
    found = json.loads((home / "results.json").read_text())
    run = open_run(copy)[0]
    assert found["run_mark"] == run.mark == found["runs"][copy] and "command" in found and found["trained"] == 9
    assert found["cost"]["tokens"] == 8 * 2 * 16 and found["cost"]["flops"] > 0
    for kind in ("sae", "plt", "clt"):
        scores, used = found["rates"][f"{kind} local"], [r for r in found["curve"] if r.get("kind") == kind]
        best = min(scores, key=scores.get)
        assert [row["k"] for row in used] == [2, 4] and all(f"{r['settings']['lr']:g}" == best for r in used)
        assert all(set(row["delta_ce"]) == set(row["batch"]) == set(PROTOCOLS) for row in used)
    assert len([row for row in found["curve"] if row["kind"] == "vpd"]) == 3
    assert found["jacobian"].keys() == {f"VPD {copy}, g > 0", f"VPD {copy}, r ~ U(0, 1)"} | {
        f"{kind} local, k 4" for kind in ("sae", "plt", "clt")
    }
    assert all(row["largest"] >= row["start"] > 0 for row in found["adversary"].values())
    assert found["interpretability"].keys() == {row["of"] for row in found["objects"]}
    for name in ("frontier.png", "objects.png"):
        assert (home / name).read_bytes()[:4] == b"\x89PNG"
    key = json.loads((home / "reading_key.json").read_text())
    assert (home / "reading.txt").read_text().count("object ") >= len(key)
    assert "cosine of the replaced MLPs' Jacobians" in capsys.readouterr().out
    # once more: what is there is not trained again, and says the same; what was cut off is
    shutil.rmtree(next(home.glob("clt-*k2-*")))
    dictionaries.main(Config((copy,), **quick))
    again = json.loads((home / "results.json").read_text())
    assert again["trained"] == 1 and again["curve"] == found["curve"]
    (home / "target.json").write_text("{}")
    with pytest.raises(dictionaries.UserError, match="holds dictionaries of another target or text"):
        dictionaries.main(Config((copy,), **quick))


@pytest.mark.slow
def test_the_whole_study(copy, whole):
    dictionaries.main(Config((copy, str(whole)), full=True, **QUICK | dict(k="4")))
    found = json.loads(Path(copy, "dictionaries", "results.json").read_text())
    budgets = {(row["budget"], row.get("mode")) for row in found["curve"] if "mode" in row}
    modes = ("local", "error-propagating", "clean-input", "single-layer")
    assert budgets == {(budget, mode) for budget in ("equal tokens", "equal FLOPs") for mode in modes}
    pairs = {(row["of"], row["in"]) for row in found["objects"] if row["of"] != row["in"]}
    assert ("plt local, k 4", "plt local, seed 1, k 4") in pairs and ("plt local, k 4", "plt local, D 96, k 4") in pairs
    assert (f"VPD {copy}", "VPD whole") in pairs
    flops = [row for row in found["curve"] if row["budget"] == "equal FLOPs" and row["name"] == "plt local, k 4"]
    spent = found["cost"][f"flops, plt local D 24, {flops[0]['settings']['steps']} steps"]
    assert spent == pytest.approx(found["cost"]["flops"], rel=0.5)


def other_target(folder: Path) -> None:
    """The same run, but one weight of its target is another."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["target"]["model"]["blocks.0.mlp.up.weight"] += 1
    torch.save(checkpoint, folder / "checkpoint.pt")


@pytest.mark.parametrize("args, said", [
    ([], "name at least one run folder"),
    (["nowhere"], "nowhere"),
    (["COPY", "nowhere"], "nowhere"),
    (["COPY", "--k=5,30", "--D=24"], "k='5,30': 30 is above the D=24 latents"),
    (["COPY", "--k=0"], "k='0': must be whole numbers above 0"),
    (["COPY", "--lr=2"], "lr='2': must be numbers between 0 and 1"),
    (["COPY", "--lr=x"], "lr='x': must be numbers between 0 and 1"),
    (["COPY", "--kinds=plt,molt"], "kinds='plt,molt': 'molt' is none of sae, plt, clt"),
    (["COPY", "--windows=1000000"], "windows=1000000: the validation text has"),
    (["whole", "COPY"], "is a run of another target than"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(copy, whole, args, said):
    if args[:1] == ["whole"]:
        other_target(Path(copy))
    assert said in one_line(dictionaries, *[copy if arg == "COPY" else arg for arg in args])


def test_a_run_without_its_mlps_is_refused(opened):
    run, _ = opened
    names = [name for name in run.decomposition.names if not name.endswith("1.mlp.down")]
    run.decomposition.names = names
    with pytest.raises(dictionaries.UserError, match="does not decompose blocks.1.mlp.down"):
        dictionaries.mlp_columns(run)


def test_what_a_clean_pass_reads(opened, parts):
    run, _ = opened
    target = run.decomposition.target
    hidden, xs, ys = target_pass(target, parts[0].x)
    sae = new(settings("sae"), target)
    passes = dictionary_passes(target, sae, parts[0])
    close(passes.outputs[0], clean_outputs(sae, ys)[0][0])
    assert hidden.equal(parts[0].hidden) and xs[1].equal(parts[0].xs[1])
