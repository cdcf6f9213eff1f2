"""Components as parts of the model, their interactions, and distances between clusterings."""

import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from test_cluster import home, whole  # noqa: F401  a tiny run

import cluster
import decompose
import losses
from bench.clustering import planted
from eval import adversarial_sources
from model import Decomposition
from studies import components
from studies.components import Components, OwnMasks, adjusted_rand, hamming_distance, interaction_shares, pair_distance
from train_target import run_script


@pytest.fixture(scope="module")
def clustered(whole):  # noqa: F811
    cluster.main(cluster.Config(run="whole", tokens=300, restarts=1, alpha="1"))
    return whole


class Importances:
    """A stand-in for a run: g is given."""

    def __init__(self, decomposition: Decomposition, g: torch.Tensor) -> None:
        self.decomposition, self.g = decomposition, g

    def importances(self, x):
        return self.decomposition.target(x), self.g


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.fixture
def case(decomposition, tokens):
    """52 subcomponents in 10 components, by chance; g [B, T, 52] with a third at 0."""
    generator = torch.Generator().manual_seed(5)
    g = (torch.rand(*tokens.shape, 52, generator=generator) * 1.5 - 0.5).clamp(0, 1)
    return Importances(decomposition, g), tokens, torch.arange(52) % 10


def test_a_component_is_as_important_as_its_most_important_member(case):
    run, x, label = case
    _, g = Components(run, label).importances(x)
    assert g.shape == (3, 8, 10)
    for k in range(10):
        assert torch.equal(g[..., k], run.g[..., label == k].amax(-1))
    _, spread = OwnMasks(run, label).importances(x)
    assert torch.equal(spread, g[..., label])


def test_members_share_one_mask(case):
    run, x, label = case
    m = torch.rand(3, 8, 10 + 12, generator=torch.Generator().manual_seed(6))
    by_hand = torch.cat([m[..., k : k + 1] for k in label.tolist()] + [m[..., 10:]], -1)  # [3, 8, 52 + 12]
    assert torch.equal(Components(run, label)(x, m), run.decomposition(x, by_hand))


def test_single_components_are_subcomponents(case):
    """With a component for each subcomponent, masks, adversary and losses are those of eval.py to the last bit."""
    run, x, _ = case
    single = Components(run, torch.arange(52))
    target_output, g = single.importances(x)
    assert torch.equal(g, run.g)
    r = [
        adversarial_sources(of.decomposition, x, target_output, g, 3, torch.Generator().manual_seed(0))
        for of in (run, single)
    ]
    assert torch.equal(*r)


def test_the_adversary_has_one_source_a_component_and_gets_what_it_climbs(case):
    run, x, label = case
    parts = Components(run, label)
    target_output, g = parts.importances(x)
    r = adversarial_sources(parts.decomposition, x, target_output, g, 8, torch.Generator().manual_seed(0))
    start = losses.sample_sources((1, 1, 1, 10 + 12), torch.Generator().manual_seed(0))
    assert r.shape == start.shape
    kl = [losses.reconstruction(parts, x, target_output, g, of).item() for of in (start, r)]
    assert kl[1] > kl[0]


def test_evaluate_agrees_with_eval(clustered, monkeypatch):
    """Subcomponents: the L0, CE and KL of metrics.json, whose windows are the same."""
    run, corpus = components.open_run("whole", "", "cpu")
    _, label, live = components.read_clusters(run.folder, run.decomposition.C)
    monkeypatch.setattr(components, "PGD", (1,))
    numbers = components.evaluate(run, corpus, label, live, windows=2, seed=0)
    metrics = json.loads((clustered / "metrics.json").read_text())
    sub, own, component = (numbers[name] for name in ("subcomponents", "own masks", "components"))
    assert sub["l0"] == pytest.approx(metrics["l0"]["total"]) == sub["carried"]
    for mode in ("ci", "rounded_0.0"):  # no chance in these
        assert sub[f"ce:{mode}"] == pytest.approx(metrics["ce"][mode], abs=1e-5)
        assert sub[f"kl:{mode}"] == pytest.approx(metrics["kl"][mode], abs=1e-5)
        assert own[f"kl:{mode}"] == pytest.approx(
            component[f"kl:{mode}"], abs=1e-6
        )  # without sources sharing a mask is sharing g
    assert component["l0"] <= sub["l0"] <= component["carried"] == pytest.approx(own["l0"])
    assert sub["ce:target"] == pytest.approx(metrics["ce"]["target"], abs=1e-5)


def test_main_writes_components_json(clustered, monkeypatch):
    monkeypatch.setattr(components, "PGD", (2,))
    components.main(components.Config(run="whole", windows=2))
    report = json.loads((clustered / "components.json").read_text())
    assert set(report["evaluation"]) == {"subcomponents", "own masks", "components", "random components"}
    assert set(report["interactions"]) == {"blocks.0.mlp.up", "blocks.1.mlp.up"}
    assert (clustered / "figures/interactions.png").exists() and not list(clustered.rglob("*.tmp"))


def test_stability_against_the_run_itself(clustered):
    before = (clustered / "clusters.json").read_bytes()
    components.main(components.Config(run="whole", against="whole"))
    found = json.loads((clustered / "stability-whole.json").read_text())["stability"]
    assert (
        found["matched cosine"]["mean"] == pytest.approx(1)
        and found["mmcs"]["U"] == pytest.approx(1) == found["mmcs"]["V initial"]
    )
    assert (
        found["other run"]["pair distance"] == found["other run"]["Hamming"] == 0
        and found["other run"]["adjusted Rand"] == 1
    )
    assert (
        found["other run"]["items"] == json.loads(before)["live"]
        and (clustered / "clusters.json").read_bytes() == before
    )


# ---------------------------------------------------------------------------------------------------------------------
# Interactions


def test_interactions_by_hand(clustered):
    """The formula in loops over neurons and positions."""
    run, corpus = components.open_run("whole", "", "cpu")
    name, columns, D = "blocks.1.mlp.up", np.array([0, 2, 5]), run.decomposition
    run.ci_fn.out.bias.data += 1.0  # importances above 0 everywhere
    I, shuffled = components.interactions(run, corpus, name, columns, 32, 0)
    (tokens,) = cluster.validation(run, corpus, 32, 0)
    _, inputs = D.target_pass(tokens[:, :-1])
    _, g = run.importances(tokens[:, :-1])
    l = D.names.index(name)
    ga = (g.split(list(D.C.values()), -1)[l] * (inputs[l] @ D.V[name])).flatten(0, 1)[:, columns].abs().tolist()
    U = D.U[name][:, columns].abs().tolist()
    for c, d in itertools.product(range(3), range(3)):
        neurons = sum(row[c] * row[d] for row in U) / sum(row[c] ** 2 for row in U)
        positions = sum(row[c] * row[d] for row in ga) / sum(row[c] ** 2 for row in ga)
        assert I[c, d] == pytest.approx(neurons * positions, rel=1e-4)
    assert np.diag(I) == pytest.approx(1) and np.diag(shuffled) == pytest.approx(1) and not np.allclose(I, shuffled)


def test_interaction_shares_by_hand():
    """Four subcomponents, components {0, 1} (tight) and {2, 3} (a lump)."""
    I = np.array([[1, 2, 0, 0], [0.5, 1, 3, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    shares = interaction_shares(
        I, np.eye(4), np.array([0, 0, 1, 1]), np.array([False, False, True, True]), np.random.default_rng(0)
    )
    assert shares["inside"] == 3 / 4 and shares["pairs inside"] == 4
    assert shares["between"] == 1 / 8 and shares["shuffled positions"] == 0
    assert shares["shuffled labels"] == pytest.approx(4 / 12, abs=0.06)  # that of all pairs, in expectation
    assert (
        shares["inside, no lumps"] == 1 / 2
        and shares["pairs inside, no lumps"] == 2
        and math.isnan(shares["between, no lumps"])
    )
    alone = interaction_shares(I, np.ones((4, 4)), np.arange(4), np.zeros(4, bool), np.random.default_rng(0))
    assert (
        math.isnan(alone["inside"])
        and alone["between"] == alone["between, no lumps"] == 4 / 12
        and alone["shuffled positions"] == 1
    )


# ---------------------------------------------------------------------------------------------------------------------
# Stability


@pytest.mark.parametrize("a, b, hamming, unordered", [
    ([0, 0, 1], [1, 1, 0], 0, 0), ([0, 0, 1], [0, 1, 0], 1, 2), ([0, 0, 1, 1], [0, 1, 0, 1], 2, 4), ([0, 1, 2, 3], [0, 0, 1, 1], 2, 2),
])  # fmt: skip
def test_distances_by_hand(a, b, hamming, unordered):
    a, b = np.array(a), np.array(b)
    assert hamming_distance(a, b) == hamming_distance(b, a) == hamming
    assert pair_distance(a, b) == pair_distance(b, a) == unordered


def test_distances_of_any_labels():
    found = components.distances(np.array([7, 7, 3]), np.array([0, 5, 5]))
    assert found["items"] == 3 and found["pairs"] == found["pairs there"] == 1 and found["pair distance"] == 2
    assert components.distances(np.array([], int), np.array([], int)) == {"items": 0}


def test_adjusted_rand():
    """Against its definition over all permutations of one labelling: (agreement - mean) / (largest - mean)."""
    a, b = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2])

    def together(a, b):
        return sum(a[i] == a[j] and b[i] == b[j] for i, j in itertools.combinations(range(6), 2))

    chance = np.mean([together(a, b[list(p)]) for p in itertools.permutations(range(6))])
    most = (together(a, a) + together(b, b)) / 2
    assert adjusted_rand(a, b) == pytest.approx((together(a, b) - chance) / (most - chance))
    assert adjusted_rand(a, 2 - a) == 1 and adjusted_rand(np.arange(4), np.arange(4)) == 1


@pytest.mark.parametrize("gamma", [0.2, math.inf])
def test_planted_clusters_are_found(gamma):
    """bench_cluster.py in small."""
    X, truth = planted(400, 5000, 20)
    assert X.nnz / 5000 == pytest.approx(20, rel=0.05)
    assert adjusted_rand(cluster.cluster(X, 1.0, gamma).label, truth) >= 0.95


def test_match_finds_a_permutation(decomposition, gpt):
    """B is A with the subcomponents of each matrix permuted, signs of U and V flipped together, and a little noise."""
    A, B = decomposition, Decomposition(gpt, decomposition.C, torch.Generator().manual_seed(9))
    generator, order = torch.Generator().manual_seed(3), {}
    with torch.no_grad():
        for name, C in A.C.items():
            order[name] = torch.randperm(C, generator=generator)
            sign = torch.where(torch.rand(C, generator=generator) < 0.5, -1.0, 1.0)
            for mine, theirs in ((A.U, B.U), (A.V, B.V)):
                theirs[name].copy_(
                    mine[name][:, order[name]] * sign
                    + 0.01 * torch.randn(mine[name].shape, generator=generator) * mine[name].std()
                )
    names = [(name, c) for name, C in A.C.items() for c in range(C)]
    found = components.match(A, B, names, names)
    assert len(found["pairs"]) == 52 and found["cosine"].min() > 0.99 and min(found["U"].min(), found["V"].min()) > 0.99
    for i, j in found["pairs"]:
        (name, c), (other, d) = names[i], names[j]
        assert name == other and order[name][d] == c
    few = components.match(
        A, B, names[:5], names[:2]
    )  # the first matrix, of 3, and a part of the next: 2 of 3 have a match
    assert sorted(found["pairs"].tolist()) != few["pairs"].tolist() and len(few["pairs"]) == 2


def test_initial_is_where_the_run_started(whole):  # noqa: F811
    run, _ = components.open_run("whole", "", "cpu")
    vpd, _ = decompose.build(decompose.Config(**run.config), run.checkpoint["target"], torch.device("cpu"))
    at_start = components.initial(run)
    assert all(
        torch.equal(at_start.U[n], vpd.decomposition.U[n]) and torch.equal(at_start.V[n], vpd.decomposition.V[n])
        for n in at_start.names
    )
    assert not torch.equal(at_start.U["blocks.0.mlp.up"], run.decomposition.U["blocks.0.mlp.up"])


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("args, message", [
    (["nowhere"], "run folder 'nowhere' does not exist"),
    (["bare"], "clusters.json does not exist: run cluster.py first"),
    (["broken"], "does not fit this run"),
    (["foreign"], "does not fit this run"),
    (["whole", "--against=nowhere"], "run folder 'nowhere' does not exist"),
    (["whole", "--against=smaller"], "not a decomposition of the target of whole"),
    (["whole", "--windows=0"], "windows=0"),
])  # fmt: skip
def test_bad_input_ends_in_one_line(home, clustered, args, message, monkeypatch, capsys):  # noqa: F811
    for name, text in (
        ("bare", None),
        ("broken", '{"components": ['),
        ("foreign", '{"components": [{"members": {"blocks.0.attn.q": [99]}}]}'),
        ("smaller", None),
    ):
        (home / name).mkdir(exist_ok=True)
        checkpoint = (clustered / "checkpoint.pt").read_bytes()
        (home / name / "checkpoint.pt").write_bytes(checkpoint)
        if text:
            (home / name / "clusters.json").write_text(text)
    if "--against=smaller" in args:
        checkpoint = torch.load(clustered / "checkpoint.pt", weights_only=True)
        checkpoint["target"]["model"]["blocks.0.attn.q.weight"] += 1
        torch.save(checkpoint, home / "smaller/checkpoint.pt")
    monkeypatch.setattr(sys, "argv", ["components.py", *args])
    with pytest.raises(SystemExit) as stop:
        run_script(components.main, components.Config, components.__doc__)
    error = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message in error and stop.value.code != 0
    assert len(error.strip().splitlines()) == 1
