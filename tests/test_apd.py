"""toys/apd.py: each equation against another way to compute it, and the checks on a right answer."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import one_line
from torch.func import functional_call, jvp

import losses
import run
import toys.__main__ as toy
from model import Decomposition
from toys import apd
from toys.apd import attributions, batch_top_k, mask, schatten
from toys.targets import TMS, TOYS

close = torch.testing.assert_close


@pytest.fixture(params=[False, True], ids=["tms", "tms-id"])
def f(request):
    """Random components of rank 2 of an untrained target: 4 columns of 8 in each matrix."""
    torch.manual_seed(0)
    return Decomposition(TMS(5, 2, request.param), 8)


def inputs(f, B=16):
    return torch.rand(B, 5, generator=torch.Generator().manual_seed(1))


def moved(f, c, t, C=4):
    """The target's weights with t times component c added."""
    of = {n: apd.of_components(f.U[n], C)[:, c] @ apd.of_components(f.V[n], C)[:, c].T for n in f.names}
    return {f"{name}.weight": f.W(name) + t * P for name, P in of.items()}


def test_attributions_against_derivatives_along_a_component(f):
    A = attributions(f, x := inputs(f), 4)
    assert A.shape == (16, 4) and not A.requires_grad
    for c in range(4):
        weights, there = moved(f, c, 0.0), moved(f, c, 1.0)
        P = {name: (there[name] - W).detach() for name, W in weights.items()}
        weights = {name: W.detach() for name, W in weights.items()}
        _, exact = jvp(lambda w: functional_call(f.target, w, x), (weights,), (P,))
        close(A[:, c], exact.square().mean(-1).sqrt().detach(), rtol=1e-4, atol=1e-6)


def test_attributions_against_finite_differences(f):
    f, x, h = f.double(), inputs(f).double(), 1e-6
    A = apd.attributions(f, x, 4)
    for c in range(4):
        up, down = (functional_call(f.target, moved(f, c, t), x) for t in (h, -h))
        close(A[:, c], ((up - down) / (2 * h)).square().mean(-1).sqrt().detach(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("k, on", [(0.211, 3), (1, 16), (1.28, 20), (4, 64)])
def test_batch_top_k_counts(k, on):
    A = torch.rand(16, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    s = batch_top_k(A, k)
    assert s.sum() == on and set(s.unique().tolist()) <= {0.0, 1.0} and not s.requires_grad
    assert on == 64 or A[s == 1].min() > A[s == 0].max()


@pytest.mark.parametrize("p", [1.0, 0.9, 0.5])
def test_schatten_is_the_norm_of_singular_values_and_never_less(f, p):
    norm = torch.zeros(4)
    for name in f.names:
        U, V = apd.of_components(f.U[name].data, 4), apd.of_components(f.V[name].data, 4)
        norm += torch.linalg.svdvals(torch.einsum("ocm,icm->coi", U, V))[:, :2].pow(p).sum(-1)
    assert (schatten(f, 4, p) >= norm - 1e-6).all() and (schatten(f, 4, p) > 1.01 * norm).any()
    for name in f.names:  # the same components, written as their singular value decomposition
        U, V = apd.of_components(f.U[name].data, 4), apd.of_components(f.V[name].data, 4)
        u, sigma, vh = torch.linalg.svd(torch.einsum("ocm,icm->coi", U, V), full_matrices=False)
        f.U[name].data = (u * sigma[:, None])[..., :2].permute(1, 0, 2).flatten(1)
        f.V[name].data = vh[:, :2].permute(2, 0, 1).flatten(1)
    close(schatten(f, 4, p).detach(), norm, rtol=1e-4, atol=1e-5)


def test_simplicity_counts_what_is_in_use(f):
    s = torch.tensor([[1.0, 0, 0, 0], [1, 0, 1, 0]])
    norm, N = schatten(f, 4, 0.9), sum(f.W(name).numel() for name in f.names)
    close(apd.simplicity(f, s, 0.9), (norm[0] + norm[2] / 2) / N)


def test_all_components_and_none(f):
    """f(x | sum of all), and f(x | 0): only the bias is left. One component in use: its matrices, in all layers."""
    x = inputs(f)
    everything = {f"{name}.weight": f.U[name] @ f.V[name].T for name in f.names}
    close(f(x, mask(f, torch.ones(16, 4))), functional_call(f.target, everything, x))
    nothing = {f"{name}.weight": 0 * f.W(name) for name in f.names}
    close(f(x, mask(f, torch.zeros(16, 4))), functional_call(f.target, nothing, x))
    one = {name: moved(f, 2, 1.0)[name] - moved(f, 2, 0.0)[name] for name in everything}
    close(f(x, mask(f, torch.eye(4)[[2]].expand(16, -1))), functional_call(f.target, one, x))


@pytest.fixture(scope="module")
def target():
    return toy.train(replace(TOYS["tms_5-2"], steps=3000), 0)


@pytest.fixture
def right(target):
    """The known pieces of a trained TMS 5-2, one component a feature, and five that are 0."""
    f = Decomposition(target, 10)
    for name, (U, V) in target.canonical().items():
        f.U[name].data, f.V[name].data = (torch.cat((W.detach(), 0 * W.detach()), 1) for W in (U, V))
    return f


def test_a_right_answer_passes(right):
    config = replace(apd.preset("tms_5-2"), C=10)
    assert losses.faithfulness(right).item() < 1e-12  # they sum to W
    probes = right.target.probes()
    assert torch.equal(batch_top_k(attributions(right, probes, 10), 1)[:, :5], torch.eye(5))  # and A finds them
    W1 = right.W("linear1").norm(dim=0)
    close(schatten(right, 10, 1.0)[:5], 2 * W1, rtol=1e-4, atol=1e-5)
    found = {(c.name, c.matrix): c for c in apd.feature_checks(config, right)}
    assert found["MMCS of columns", "linear1"].value == pytest.approx(1, abs=1e-5)
    assert found["rank one: share of |P_c|^2", "linear2"].value == pytest.approx(1, abs=1e-5)
    assert found["MSE with all components", ""].value < 1e-10
    passed = [c.ok for c in found.values() if c.ok is not None and "ML2R" not in c.name]
    assert len(passed) == 13 and all(passed)


def test_checks_see_a_split_component(right):
    for name in right.names:  # two halves of feature 0
        right.U[name].data[:, 5], right.V[name].data[:, 5] = right.U[name][:, 0], right.V[name][:, 0] / 2
        right.V[name].data[:, 0] /= 2
    found = {(c.name, c.matrix): c for c in apd.feature_checks(replace(apd.preset("tms_5-2"), C=10), right)}
    assert found["ML2R of columns", "linear1"].value == pytest.approx(0.9, abs=1e-5)
    assert not found["ML2R of columns", "linear1"].ok and found["|Delta| / |W|", "linear1"].ok


def test_decompose_learns_the_sum():
    """A short training reduces faithfulness and its step is Adam's on the three losses."""
    torch.manual_seed(0)
    config, target = replace(apd.preset("tms_5-2"), steps=100, B=64), TMS(5, 2, identity=False)
    before = losses.faithfulness(apd.build(config, target)).item()
    assert losses.faithfulness(apd.decompose(config, target)).item() < 0.1 * before


@pytest.mark.parametrize("tied", [True, False])
def test_tied_components_are_transposes(tied):
    config, target = replace(apd.preset("tms_5-2-id"), steps=3, B=8, tied=tied), TMS(5, 2, identity=True)
    f = apd.decompose(config, target)
    P1, P2 = (f.U[name] @ f.V[name].T for name in ("linear1", "linear2"))
    assert torch.allclose(P1, P2.T, atol=1e-6) == tied and f.C == dict.fromkeys(f.names, 10)
    assert len({*f.subcomponents()}) == (4 if tied else 6)


@pytest.mark.parametrize("name", apd.PRESETS)
def test_a_run_leaves_its_folder(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TOYS, name, replace(TOYS[name], steps=1))
    monkeypatch.setattr(sys, "argv", ["toys", name, "--method=apd", "--steps=1", "--B=8", "--C=4"])
    run.run_script(toy.main, apd.Config, toy.__doc__, toy.defaults)
    folder = tmp_path / "out" / f"toy-{name}-apd-0"
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.json", "checkpoint.pt", "toy.png"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["toy"], config["method"], config["C"]) == (name, "apd", 4)
    assert "checks pass" in capsys.readouterr().out


@pytest.mark.parametrize("flags, said", [
    (["tms_5-2", "--method=apd", "--out=full"], "out=full is not an empty folder"),
    (["ping_pong", "--method=apd"], "method=apd: 'ping_pong' has no settings; there are tms_5-2"),
    (["nosuch", "--method", "apd"], "method=apd: unknown toy 'nosuch'"),
    (["tms_5-2", "--method=apd", "--top_k=6"], "top_k=6.0: must be at most C=5"),
    (["tms_5-2", "--method=apd", "--beta_adv=1"], "unknown flag '--beta_adv=1'"),
    (["tms_5-2", "--method=apd", "--lr=9e18", "--steps=3", "--B=8"], "try a smaller lr than 9e+18"),
])  # fmt: skip
def test_bad_flags_end_with_one_line(flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TOYS, "tms_5-2", replace(TOYS["tms_5-2"], steps=1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "checkpoint.pt").touch()
    script = SimpleNamespace(
        __name__="toys", __doc__=toy.__doc__, main=toy.main, Config=apd.Config, defaults=toy.defaults
    )
    assert said in one_line(script, *flags)


def test_the_method_on_the_command_line(monkeypatch):
    for flags, method in (["--method=apd"], "apd"), (["--method", "spd"], "spd"), (["--C=3"], "vpd"):
        monkeypatch.setattr(sys, "argv", ["toys", "tms_5-2", *flags])
        assert toy.named_method() == method == toy.defaults().method
