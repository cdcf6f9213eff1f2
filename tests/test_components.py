"""Components as parts of the model, their interactions, and distances between clusterings."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import one_line

import cluster
import decompose
from bench.clustering import planted
from eval import adversarial_sources, open_run, validation_windows
from losses import kl_divergence, reconstruction, sample_sources
from model import Decomposition
from studies import components
from studies.components import Components, adjusted_rand, hamming_distance, interaction_shares, pair_distance


@pytest.fixture(scope="module")
def worth_once(session_home, session_whole) -> None:
    shutil.copytree(session_whole, session_home / "worth")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(session_home)
        cluster.main(cluster.Config(run="worth", tokens=300, restarts=1, alpha="1"))


@pytest.fixture
def worth(home, worth_once) -> Path:
    """The tiny run, clustered."""
    return home / "worth"


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.fixture
def case(decomposition, tokens):
    """52 subcomponents in 10 components, by chance; g [B, T, 52] with a third at 0."""
    generator = torch.Generator().manual_seed(5)
    g = (torch.rand(*tokens.shape, 52, generator=generator) * 1.5 - 0.5).clamp(0, 1)
    return decomposition, tokens, g, torch.arange(52) % 10


def test_a_component_is_as_important_as_its_most_important_member(case):
    decomposition, _, g, label = case
    g_k = Components(decomposition, label).importances(g)
    assert g_k.shape == (3, 8, 10)
    for k in range(10):
        assert torch.equal(g_k[..., k], g[..., label == k].amax(-1))


def test_members_share_one_mask(case):
    decomposition, x, _, label = case
    m = torch.rand(3, 8, 10 + 12, generator=torch.Generator().manual_seed(6))
    by_hand = torch.cat([m[..., k : k + 1] for k in label.tolist()] + [m[..., 10:]], -1)  # [3, 8, 52 + 12]
    assert torch.equal(Components(decomposition, label)(x, m), decomposition(x, by_hand))


def test_single_components_are_subcomponents(case):
    """With a component for each subcomponent, importances, masks and adversary are eval.py's to the last bit."""
    decomposition, x, g, _ = case
    single = Components(decomposition, torch.arange(52))
    assert torch.equal(single.importances(g), g)
    batches = [(x, decomposition.f(x), g)]
    r, r_single = (
        adversarial_sources(parts, batches, 3, torch.Generator().manual_seed(0))[0] for parts in (decomposition, single)
    )
    assert torch.equal(r, r_single)


def test_the_adversary_has_one_source_a_component_and_gets_what_it_climbs(case):
    decomposition, x, g, label = case
    parts = Components(decomposition, label)
    batch = x, decomposition.f(x), parts.importances(g)
    r, kl, _ = adversarial_sources(parts, [batch], 8, torch.Generator().manual_seed(0))
    start = sample_sources((1, 1, 1, 10 + 12), torch.Generator().manual_seed(0))
    assert r.shape == start.shape
    assert kl > reconstruction(parts, *batch, start, None, kl_divergence).item()


def test_evaluate_agrees_with_eval(worth, monkeypatch):
    """Subcomponents: the L0, CE and KL of metrics.json, whose windows are the same."""
    run, corpus = open_run("worth", device="cpu")
    _, label, live = cluster.read_clusters(run.folder, run.decomposition.C, run.mark)
    monkeypatch.setattr(components, "STEPS", (1,))
    numbers = components.evaluate(run, corpus, label, live, windows=2, seed=0)
    metrics = json.loads((worth / "metrics.json").read_text())
    sub, own, component = (numbers[name] for name in ("subcomponents", "own masks", "components"))
    assert sub["l0"] == pytest.approx(metrics["l0"]["total"]) == sub["carried"]
    for mode in ("ci", "rounded_0.0"):  # no chance in these
        assert sub[f"ce:{mode}"] == pytest.approx(metrics["ce"][mode], abs=1e-5)
        assert sub[f"kl:{mode}"] == pytest.approx(metrics["kl"][mode], abs=1e-5)
        # Where no sources are drawn, to share a mask is to share g.
        assert own[f"kl:{mode}"] == pytest.approx(component[f"kl:{mode}"], abs=1e-6)
    assert component["l0"] <= sub["l0"] <= component["carried"] == pytest.approx(own["l0"]) == own["carried"]
    assert sub["ce:target"] == pytest.approx(metrics["ce"]["target"], abs=1e-5)
    assert all(row["kl:adversarial_1"] <= row["largest:adversarial_1"] for row in numbers.values())


def test_main_writes_components_json(worth, monkeypatch, capsys):
    monkeypatch.setattr(components, "STEPS", (2,))
    components.main(components.Config(run="worth", windows=2))
    report = json.loads((worth / "components.json").read_text())
    assert report["run_mark"] == open_run("worth", device="cpu")[0].mark
    assert set(report["evaluation"]) == {"subcomponents", "own masks", "components", "random components"}
    assert set(report["interactions"]) == {"blocks.0.mlp.up", "blocks.1.mlp.up"}
    assert (worth / "figures/interactions.png").exists() and not list(worth.rglob("*.tmp"))
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("subcomponents")]
    row = report["evaluation"]["subcomponents"]
    assert [float(x) for x in table[0][1:4]] == pytest.approx(
        [row["l0"], row["carried"], row["ce:stochastic"] - row["ce:target"]], abs=0.006
    )
    monkeypatch.setattr(components, "evaluate", lambda *args: {})
    components.main(components.Config(run="worth", windows=1, up="nothing"))
    assert "no matrix with two live subcomponents is called nothing" in capsys.readouterr().out


def test_a_figure_that_cannot_be_drawn_costs_no_numbers(worth, monkeypatch):
    (worth / "components.json").unlink(missing_ok=True)
    monkeypatch.setattr(components, "evaluate", lambda *args: {})
    monkeypatch.setattr(components, "evaluation_table", lambda numbers: "")
    monkeypatch.setattr(components, "plot_interactions", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        components.main(components.Config(run="worth", windows=1))
    assert json.loads((worth / "components.json").read_text())["interactions"]


def test_stability_against_the_run_itself(worth):
    before = (worth / "clusters.json").read_bytes()
    components.main(components.Config(run="worth", against="worth"))
    found = json.loads((worth / "stability-worth.json").read_text())["stability"]
    assert found["matched cosine"]["mean"] == pytest.approx(1) == found["matched cosine"]["initial"]
    assert found["mmcs"]["U"] == pytest.approx(1) == found["mmcs"]["V initial"]
    other = found["other run"]
    assert other["pair distance"] == other["Hamming"] == 0 and other["adjusted Rand"] == 1
    assert other["items"] == json.loads(before)["live"] and (worth / "clusters.json").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# Interactions


def test_interactions_by_hand(worth):
    """The formula in loops over neurons and positions."""
    run, corpus = open_run("worth", device="cpu")
    name, columns, decomposition = "blocks.1.mlp.up", np.array([0, 2, 5]), run.decomposition
    run.ci_fn.out.bias.data += 1.0  # importances above 0 everywhere
    I, shuffled = components.interactions(run, corpus, name, columns, 32, 0)
    _, g, inputs = run.importances(validation_windows(corpus, 2, 16, 0)[:, :-1])
    l, V, U = decomposition.names.index(name), decomposition.V[name], decomposition.U[name]
    ga = (g.split(list(decomposition.C.values()), -1)[l] * (inputs[l] @ V)).flatten(0, 1)[:, columns].abs().tolist()
    U = U[:, columns].abs().tolist()
    for c, d in itertools.product(range(3), range(3)):
        neurons = sum(row[c] * row[d] for row in U) / sum(row[c] ** 2 for row in U)
        positions = sum(row[c] * row[d] for row in ga) / sum(row[c] ** 2 for row in ga)
        assert I[c, d] == pytest.approx(neurons * positions, rel=1e-4)
    assert np.diag(I) == pytest.approx(1) and np.diag(shuffled) == pytest.approx(1) and not np.allclose(I, shuffled)


def test_interaction_shares_by_hand():
    """Four subcomponents, components {0, 1} (tight) and {2, 3} (a lump)."""
    I = np.array([[1, 2, 0, 0], [0.5, 1, 3, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    label, lump, rng = np.array([0, 0, 1, 1]), np.array([False, False, True, True]), np.random.default_rng(0)
    shares = interaction_shares(I, np.eye(4), label, lump, rng)
    assert shares["inside"] == 3 / 4 and shares["pairs inside"] == 4
    assert shares["between"] == 1 / 8 and shares["shuffled positions"] == 0
    assert shares["shuffled labels"] == pytest.approx(4 / 12, abs=0.06)  # that of all pairs, in expectation
    assert shares["inside, no lumps"] == 1 / 2 and shares["pairs inside, no lumps"] == 2
    assert math.isnan(shares["between, no lumps"])
    alone = interaction_shares(I, np.ones((4, 4)), np.arange(4), np.zeros(4, bool), rng)
    assert math.isnan(alone["inside"]) and alone["shuffled positions"] == 1
    assert alone["between"] == alone["between, no lumps"] == 4 / 12


# ---------------------------------------------------------------------------------------------------------------------
# Stability


@pytest.mark.parametrize("a, b, hamming, unordered", [
    ([0, 0, 1], [1, 1, 0], 0, 0), ([0, 0, 1], [0, 1, 0], 1, 2),
    ([0, 0, 1, 1], [0, 1, 0, 1], 2, 4), ([0, 1, 2, 3], [0, 0, 1, 1], 2, 2),
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
    """bench/clustering.py in small."""
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
    few = components.match(A, B, names[:5], names[:2])  # 3 of the first matrix and 2 of the next: 2 have a match
    assert sorted(found["pairs"].tolist()) != few["pairs"].tolist() and len(few["pairs"]) == 2


def test_initial_is_where_the_run_started(whole):
    run, _ = open_run(whole, device="cpu")
    vpd, _ = decompose.build(decompose.Config(**run.config), run.checkpoint["target"], torch.device("cpu"))
    at_start, U, V = components.initial(run), vpd.decomposition.U, vpd.decomposition.V
    assert all(torch.equal(at_start.U[n], U[n]) and torch.equal(at_start.V[n], V[n]) for n in at_start.names)
    assert not torch.equal(at_start.U["blocks.0.mlp.up"], run.decomposition.U["blocks.0.mlp.up"])


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.fixture(scope="module")
def spoilt(session_home, worth_once) -> None:
    """The run without clusters.json, with half of one, of other subcomponents, of another training; another target."""
    checkpoint = session_home / "worth/checkpoint.pt"
    foreign = '{"components": [{"members": {"blocks.0.attn.q": [99]}}]}'
    for name, text in (("bare", ""), ("broken", '{"components": ['), ("alien", foreign), ("changed", "")):
        (session_home / name).mkdir()
        shutil.copy(checkpoint, session_home / name)
        if text:
            (session_home / name / "clusters.json").write_text(text)
    changed = torch.load(checkpoint, weights_only=True)
    changed["target"]["model"]["blocks.0.attn.q.weight"] += 1
    torch.save(changed, session_home / "changed/checkpoint.pt")
    shutil.copytree(session_home / "worth", session_home / "trained-on")
    changed["decomposition"][next(iter(changed["decomposition"]))] += 1
    torch.save(changed, session_home / "trained-on/checkpoint.pt")


@pytest.mark.parametrize("args, message", [
    (["nowhere"], "run folder 'nowhere' does not exist"),
    (["bare"], "clusters.json does not exist: run cluster.py first"),
    (["broken"], "does not fit this run"),
    (["alien"], "does not fit this run"),
    (["trained-on"], "trained-on/clusters.json is of an earlier training or code than the checkpoint beside it"),
    (["worth", "--against=nowhere"], "run folder 'nowhere' does not exist"),
    (["worth", "--against=changed"], "not a decomposition of the target of worth"),
    (["worth", "--windows=0"], "windows=0"),
])  # fmt: skip
def test_bad_input_ends_in_one_line(home, spoilt, args, message):
    assert message in one_line(components, *args)
