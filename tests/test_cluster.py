"""Clustering: the worked example, the fast loop against brute force at every merge, planted answers, bad input."""

import errno
import itertools
import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from matplotlib import pyplot
from tiny import one_line

import cluster
from cluster import Groups, coactivation, mdl_cost, merge_cost, sample_rank
from eval import Run, open_run

INF = math.inf


def brute_cost(X: np.ndarray, label: np.ndarray, alpha: float) -> float:
    """MDL from the firing itself: a loop over groups, sharing no code with the file but the formula."""
    total, groups = 0.0, [np.flatnonzero(label == i) for i in sorted(set(label.tolist()))]
    for members in groups:
        total += sum(any(row[members]) for row in X) * (math.log2(len(groups)) + alpha * len(members))
    return total


def brute_differences(X: np.ndarray, label: np.ndarray, alpha: float) -> dict[tuple[int, int], float]:
    before = brute_cost(X, label, alpha)
    return {
        (a, b): brute_cost(X, np.where(label == b, a, label), alpha) - before
        for a, b in itertools.combinations(sorted(set(label.tolist())), 2)
    }


# ---------------------------------------------------------------------------------------------------------------------
# The cost

EXAMPLE = np.zeros((8, 4), bool)  # 8 positions: c0 on 0-3, c1 on 0-2, c2 and c3 on 4-5
EXAMPLE[:4, 0] = EXAMPLE[:3, 1] = EXAMPLE[4:6, 2] = EXAMPLE[4:6, 3] = True
FIRST = {  # alpha: MDL apart, then the costs of the first merges
    1.0: (33.0, {(0, 1): -8.3203, (2, 3): -7.7353, (0, 2): 1.4346, (1, 2): 0.4346, (0, 3): 1.4346, (1, 3): 0.4346}),
    0.1: (23.1, {(0, 1): -9.2203, (2, 3): -7.7353, (0, 2): -3.9654, (1, 2): -4.0654}),
    10.0: (132.0, {(0, 1): 0.6797, (2, 3): -7.7353, (0, 2): 55.4346, (1, 2): 45.4346}),
}
GREEDY = {  # alpha: MDL after each merge, and the components
    1.0: ([33.0, 24.6797, 18.0, 24.0], [0, 0, 1, 1]),
    0.1: ([23.1, 13.8797, 7.2, 2.4], [0, 0, 0, 0]),
    10.0: ([132.0, 124.2647, 126.0, 240.0], [1, 2, 0, 0]),
}


def example_merge_cost(i: int, j: int, alpha: float) -> float:
    s, both = np.array([4, 3, 2, 2]), EXAMPLE.T.astype(int) @ EXAMPLE
    return merge_cost(s[i], s[j], both[i, j], 1, 1, s.sum(), 4, alpha)


@pytest.mark.parametrize("alpha", FIRST)
def test_worked_example(alpha):
    start, first = FIRST[alpha]
    assert mdl_cost(np.array([4, 3, 2, 2]), np.ones(4), alpha) == pytest.approx(start, abs=1e-3)
    for (i, j), expected in first.items():
        assert example_merge_cost(i, j, alpha) == pytest.approx(expected, abs=1e-3)
        assert brute_differences(EXAMPLE, np.arange(4), alpha)[i, j] == pytest.approx(expected, abs=1e-3)
    found = cluster.cluster(sp.csr_matrix(EXAMPLE), alpha, INF)
    assert found.cost[0] == pytest.approx(GREEDY[alpha][0], abs=1e-3)
    assert same(found.label, np.array(GREEDY[alpha][1]))


def test_worked_example_at_three_groups():
    """{01}, 2, 3 at alpha 1: either of the last two costs 3.3203 to add."""
    assert merge_cost(4, 2, 0, 2, 1, 8, 3, 1.0) == pytest.approx(3.3203, abs=1e-3)
    assert brute_differences(EXAMPLE, np.array([0, 0, 2, 3]), 1.0)[0, 2] == pytest.approx(3.3203, abs=1e-3)


def test_the_literal_AND_reading_is_wrong():
    """With s_ij for the union the formula prefers the pair that never fires together, and is no difference of MDL."""

    def literal(s_i, s_j, s_ij, S, k, alpha):
        naming = (S - s_i - s_j) * math.log2((k - 1) / k) + s_ij * math.log2(k - 1) - (s_i + s_j) * math.log2(k)
        return naming + alpha * (2 * s_ij - s_i - s_j)

    together, apart = literal(4, 3, 3, 11, 4, 1.0), literal(4, 2, 0, 11, 4, 1.0)
    assert together == pytest.approx(-11.9053, abs=1e-3) and apart == pytest.approx(-20.0752, abs=1e-3)
    differences = brute_differences(EXAMPLE, np.arange(4), 1.0)
    assert abs(together - differences[0, 1]) > 3 and abs(apart - differences[0, 2]) > 20


@pytest.mark.parametrize("co, k", [(0.5, 10_000), (0.9, 10_000), (0.99, 10_000)])
def test_what_alpha_means(co, k):
    """Two of rank 1 and equal frequency merge below alpha = co / (1 - co) * log2(k) / 2: published 6.64, 59.8, 658."""
    threshold, s = co / (1 - co) * math.log2(k) / 2, 1e6
    assert threshold == pytest.approx({0.5: 6.64, 0.9: 59.8, 0.99: 658}[co], rel=1e-3)
    costs = [merge_cost(s, s, co * s, 1, 1, 2 * s, k, alpha) for alpha in (0.99 * threshold, 1.01 * threshold)]
    assert costs[0] < 0 < costs[1]


def test_the_rare_are_lumped_together_though_they_never_meet():
    """The bound in mdl_cost's docstring: s < 0.72 S / (alpha k) each."""
    S, k, alpha = 1e6, 500, 10.0
    bound = S * math.log2(k / (k - 1)) / (2 * alpha)
    assert bound == pytest.approx(0.72 * S / (alpha * k), rel=0.01)
    costs = [merge_cost(s, s, 0, 1, 1, S, k, alpha) for s in (0.99 * bound, 1.01 * bound)]
    assert costs[0] < 0 < costs[1]


def test_sample_rank():
    assert [sample_rank(u, 0.2, 6) for u in (0.2, 0.5, 0.9, 0.99)] == [0, 2, 4, 5]
    assert [sample_rank(u, 0.2, 10**8) for u in (0.5, 0.9, 0.9999)] == [3, 11, 46]
    assert sample_rank(0.999, INF, 6) == 0 and sample_rank(0.999, 0.2, 1) == 0
    u = (np.arange(200_000) + 0.5) / 200_000
    shares = np.bincount([sample_rank(x, 0.2, 6) for x in u]) / len(u)
    assert shares == pytest.approx([0.2594, 0.2124, 0.1739, 0.1424, 0.1166, 0.0954], abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The fast loop against brute force


def random_case(case: int) -> tuple[np.ndarray, float, float, np.random.Generator]:
    """Firing with duplicates (every third case), ties, always-on and rare columns; an alpha and a gamma."""
    rng = np.random.default_rng(case)
    n, N = int(rng.integers(1, 13)), int(rng.integers(3, 40))
    X = rng.random((N, n)) < rng.choice([0.05, 0.2, 0.5, 0.9], n)
    X[0] |= ~X.any(0)  # none is dead
    if case % 3 == 0 and n > 3:
        X[:, 1] = X[:, 2] = X[:, 0]
    return X, float(rng.choice([0, 0.1, 1, 10])), float(rng.choice([0.05, 0.2, 1, INF])), rng


@pytest.mark.parametrize("case", range(60))
def test_every_merge_against_brute_force(case):
    X, alpha, gamma, rng = random_case(case)
    sparse, label = sp.csr_matrix(X), np.arange(X.shape[1])
    groups = Groups(sparse, coactivation(sparse), alpha)
    assert groups.cost() == pytest.approx(brute_cost(X, label, alpha), abs=1e-6)
    for _ in range(X.shape[1] - 1):
        differences = sorted(brute_differences(X, label, alpha).values())
        J = sample_rank(rng.random(), gamma, len(differences))
        i, j = groups.merge(*groups.ranked_pair(J))
        before, label = brute_cost(X, label, alpha), np.where(label == j, i, label)
        after = brute_cost(X, label, alpha)
        assert after - before == pytest.approx(differences[J], abs=1e-6)  # the pair was of rank J; ties in any order
        assert groups.cost() == pytest.approx(after, abs=1e-6)
        alive = np.flatnonzero(groups.gone == 0)
        on = np.stack([X[:, label == label[groups.first[i]]].any(1) for i in alive], 1).astype(int)
        assert (groups.both[np.ix_(alive, alive)] == on.T @ on).all()
    assert groups.k == 1


@pytest.mark.parametrize("case", range(60, 75))
def test_ranks_of_all_pairs(case):
    """Every rank J, not only those that are drawn often: ranked_pair sorts all pairs as merge_cost does."""
    X, alpha, *_ = random_case(case)
    sparse = sp.csr_matrix(X)
    groups, both, k = Groups(sparse, coactivation(sparse), alpha), X.T.astype(int) @ X, X.shape[1]
    s = both.diagonal()
    costs = {
        (i, j): merge_cost(s[i], s[j], both[i, j], 1, 1, s.sum(), k, alpha)
        for i, j in itertools.combinations(range(k), 2)
    }
    for J, cost in enumerate(sorted(costs.values())):
        assert costs[groups.ranked_pair(J)] == pytest.approx(cost, abs=1e-9)


def test_the_kept_grouping_is_the_cheapest_on_the_paths():
    X = np.random.default_rng(0).random((200, 30)) < 0.2
    found = cluster.cluster(sp.csr_matrix(X), 0.5, 0.2, seed=3, restarts=5)
    assert found.cost.shape == (5, 30) and found.cost[found.best, found.cut] == found.cost.min()
    assert brute_cost(X, found.label, 0.5) == pytest.approx(found.cost.min())
    assert found.label.max() + 1 == 30 - found.cut
    again = cluster.cluster(sp.csr_matrix(X), 0.5, 0.2, seed=3, restarts=5)
    other = cluster.cluster(sp.csr_matrix(X), 0.5, 0.2, seed=4, restarts=5)
    assert (again.label == found.label).all() and (again.cost == found.cost).all() and (other.cost != found.cost).any()
    assert cluster.cluster(sp.csr_matrix(X), 0.5, INF, restarts=5).cost.shape == (1, 30)


def test_coactivation_in_blocks():
    X = np.random.default_rng(0).random((20, 1100)) < 0.1
    assert (coactivation(sp.csr_matrix(X)) == X.T.astype(int) @ X).all()


@pytest.mark.parametrize("X", [np.zeros((5, 0), bool), np.zeros((5, 2), bool), np.eye(3, 4, dtype=bool)])
def test_dead_subcomponents_are_refused(X):
    with pytest.raises(ValueError, match="never fire"):
        cluster.cluster(sp.csr_matrix(X), 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Planted answers


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal groupings: as many distinct pairs of labels as labels on either side."""
    return len(set(zip(a.tolist(), b.tolist()))) == len(set(a.tolist())) == len(set(b.tolist()))


def toy(
    features: int, p: float, dense: int, layers: int, missing: float, N: int = 20_000, seed: int = 0
) -> tuple[sp.csr_matrix, np.ndarray]:
    """Canonical firing of a toy, and the component that each piece belongs to.

    `layers` matrices have a piece per feature, on with it; one matrix has `dense` pieces, on whenever any feature is.
    Every piece is missing at a share of its places.
    """
    rng = np.random.default_rng(seed)
    feature = rng.random((N, features)) < p
    X = np.concatenate([feature] * layers + [np.repeat(feature.any(1, keepdims=True), dense, 1)], 1)
    truth = np.concatenate((np.tile(np.arange(features), layers), np.full(dense, features)))
    return sp.csr_matrix(X & (rng.random(X.shape) >= missing)), truth


# features, p, pieces of the dense matrix, matrices with a piece per feature, alphas between which its answer is found
TOYS = {
    "TMS 5-2-id": (5, 0.05, 2, 2, 1, 20), "TMS 40-10-id": (40, 0.05, 10, 2, 1, 50),
    "residual MLP": (100, 0.01, 50, 1, 2, 100), "residual MLP, 2 layers": (100, 0.01, 25, 2, 1, 100),
}  # fmt: skip


@pytest.mark.parametrize("name", TOYS)
def test_toys(name):
    """In a range of alpha, not outside: the dense matrix is one component, pieces of two layers pair up by feature."""
    *shape, low, high = TOYS[name]
    X, truth = toy(*shape, missing=0.05)
    for alpha in (low, 10.0, high):
        assert same(cluster.cluster(X, alpha, INF).label, truth)
    for alpha in (0.2, 1000):
        assert not same(cluster.cluster(X, alpha, INF).label, truth)
    exact, truth = toy(*shape, missing=0.0)
    assert same(cluster.cluster(exact, 10_000.0, INF).label, truth)  # with nothing missing no alpha is too large


def test_always_on_subcomponents_and_a_single_one():
    X = np.ones((10, 3), bool)
    assert same(cluster.cluster(sp.csr_matrix(X), 5.0).label, np.zeros(3, int))
    only = cluster.cluster(sp.csr_matrix(X[:, :1]), 5.0)
    assert only.label.tolist() == [0] and only.cost.tolist() == [[50.0]]


def test_order_and_fill_of_components():
    """A tight pair first, though a single one is on more often, and a lump last."""
    X = np.zeros((100, 5), bool)
    X[:40, 0] = X[:4, 1:3] = X[50, 3] = X[60, 4] = True
    label = np.array([1, 0, 0, 2, 2])
    rank, s, fill = cluster.rank_frequency_fill(sp.csr_matrix(X), label)
    assert rank.tolist() == [2, 1, 2] and s.tolist() == [4, 40, 2] and fill.tolist() == [1, 1, 0.5]
    many = np.zeros((1000, 6), bool)
    many[:400, 0] = many[:40, 1:3] = many[500, 3] = many[600, 4] = many[700, 5] = True
    assert cluster.cluster(sp.csr_matrix(many), 10.0, INF).label.tolist() == [1, 0, 0, 2, 2, 2]


# ---------------------------------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def clustered_once(session_home, session_whole) -> None:
    shutil.copytree(session_whole, session_home / "clustered")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(session_home)
        cluster.main(cluster.Config(run="clustered", tokens=500, restarts=2))


@pytest.fixture
def clustered(home, clustered_once) -> Path:
    return home / "clustered"


def test_clusters_json(clustered):
    report = json.loads((clustered / "clusters.json").read_text())
    run, corpus = open_run("clustered", device="cpu")
    firing = cluster.gather(run, corpus, 0.01, 500, 0)
    assert report["run_mark"] == run.mark
    members = [[(name, c) for name in of["members"] for c in of["members"][name]] for of in report["components"]]
    assert sorted(sum(members, [])) == sorted(firing.names)  # every live one once, no dead one
    assert len(firing.names) == report["live"] == len(report["cost_curve"]) == report["merges"] + len(members)
    assert min(report["cost_curve"]) == report["cost"] == report["cost_curve"][report["merges"]]
    X, cost = firing.X.toarray(), 0.0
    for component, names in zip(report["components"], members):
        own = [firing.names.index(name) for name in names]
        s = X[:, own].any(1).sum()
        assert component["rank"] == len(own) and component["frequency"] == pytest.approx(s / len(X))
        assert component["fill"] == pytest.approx(X[:, own].sum() / (s * len(own)))
        matrices, layers = {name for name, _ in names}, {name.split(".")[1] for name, _ in names}
        reach = [of for of, n in (("single", names), ("matrix", matrices), ("layer", layers)) if len(n) == 1]
        assert component["span"] == (reach or ["layers"])[0]
        cost += s * (math.log2(len(members)) + 10 * len(own))
    assert cost == pytest.approx(report["cost"])
    assert {"clusters.png", "coactivation.png", "sizes.png"} <= {p.name for p in (clustered / "figures").iterdir()}
    assert not list(clustered.rglob("*.tmp"))


def test_firing_is_g_above_tau(whole, monkeypatch):
    run, corpus = open_run(whole, device="cpu")
    firing = cluster.gather(run, corpus, 0.3, 500, 1)
    assert firing.tokens.shape == (32, 16)  # whole windows of T = 16
    _, g, _ = run.importances(torch.from_numpy(firing.tokens))
    on = (g > 0.3).flatten(0, 1).numpy()
    assert (firing.X.toarray() == on[:, firing.live]).all()
    assert not on[:, np.setdiff1d(np.arange(72), firing.live)].any()
    monkeypatch.setattr(Run, "batches", lambda self, windows: windows.split(5))  # in as little memory as may be
    assert (cluster.gather(run, corpus, 0.3, 500, 1).X != firing.X).nnz == 0


def test_clusters_txt_shows_tokens_where_the_component_is_on(clustered):
    text = (clustered / "clusters.txt").read_text()
    components = json.loads((clustered / "clusters.json").read_text())["components"]
    heads = [line for line in text.splitlines() if line.startswith("component ")]
    assert [int(line.split()[1][:-1]) for line in heads] == list(range(len(components)))
    decode = {0: " a", 1: "b", 2: "\n"}
    on, tokens = np.array([0, 1, 0, 0, 0, 1], bool), np.array([[0, 1, 0], [2, 0, 1]])
    component = {"members": {"up": [3, 5]}, "rank": 2, "frequency": 1 / 3, "fill": 0.5}
    shown = cluster.describe(
        7, component, on, tokens, lambda ids: "".join(decode[i] for i in ids), np.random.default_rng(0)
    )
    assert [line.strip() for line in shown.splitlines()] == [
        "component 7: rank 2, on at 33.33% of tokens, fill 0.50; up 3 5",
        "[b] 100%/100%",
        "a[b] a",
        "⏎ a[b]",
    ]


def test_read_clusters(tmp_path):
    """Two matrices of 3 and 2; subcomponents 1 and 3 of 0 .. 4 are dead."""
    components = [{"members": {"up": [0], "down": [1]}}, {"members": {"up": [2]}}]
    (tmp_path / "clusters.json").write_text(json.dumps({"components": components, "run_mark": "a"}))
    clusters, label, live = cluster.read_clusters(tmp_path, {"up": 3, "down": 2}, "a")
    assert clusters["components"] == components
    assert label.tolist() == [0, 2, 1, 3, 0] and live.tolist() == [0, 2, 4]
    with pytest.raises(cluster.UserError, match="clusters.json is of an earlier training .*: run cluster.py again"):
        cluster.read_clusters(tmp_path, {"up": 3, "down": 2}, "b")


@pytest.mark.parametrize("text", ["", "[]", "7", "{}", '{"components": [{"members": [3]}]}',
    '{"components": [{"members": {"up": [3]}}]}', '{"components": [{"members": {"up": [0.5]}}]}'])  # fmt: skip
def test_clusters_that_do_not_fit(tmp_path, text):
    (tmp_path / "clusters.json").write_text(text)
    with pytest.raises(cluster.UserError, match="does not fit this run"):
        cluster.read_clusters(tmp_path, {"up": 3}, "a")


@pytest.mark.parametrize("X, alpha", [(np.ones((5, 1)), 10.0), (np.eye(4), 1000.0)])
def test_figures_of_few_or_no_groups(monkeypatch, X, alpha):
    """One live subcomponent; nothing that merges: no figure may fail, nor warn."""
    monkeypatch.setattr(cluster, "save_figure", lambda figure, path: figure.canvas.draw())
    X = sp.csr_matrix(X.astype(bool))
    names = [("blocks.0.mlp.up", i) for i in range(X.shape[1])]
    found = cluster.cluster(X, alpha)
    components = cluster.components_of(X, names, found.label)
    firing = cluster.Firing(X, np.arange(X.shape[1]), names, np.zeros((1, X.shape[0]), int))
    with warnings.catch_warnings(action="error"):
        cluster.plot_cost(found, X.shape[0], alpha, Path())
        cluster.plot_coactivation(firing, found.label, components, Path())
        cluster.plot_sizes(components, Path())
        cluster.plot_alphas({0.0: components, 10.0: components}, Path())
    pyplot.close("all")


def test_a_sweep_draws_its_figure_and_leaves_clusters_json_alone(clustered, capsys):
    before = (clustered / "clusters.json").read_bytes()
    cluster.main(cluster.Config(run="clustered", tokens=500, restarts=1, alpha="0,1,100"))
    assert (clustered / "clusters.json").read_bytes() == before and (clustered / "figures/alphas.png").exists()
    counts = [int(line.split()[2]) for line in capsys.readouterr().out.splitlines() if line.startswith("alpha ")]
    assert counts[0] == 1 and counts == sorted(counts) and len(counts) == 3


def test_a_full_disk_keeps_the_earlier_clusters(clustered, monkeypatch):
    before = (clustered / "clusters.json").read_bytes()

    def full(self, *args, **kwargs):
        self.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            cluster.main(cluster.Config(run="clustered", tokens=100, restarts=1))
    assert (clustered / "clusters.json").read_bytes() == before and not list(clustered.glob("*.tmp"))


@pytest.fixture(scope="module")
def dead(session_home, session_whole) -> None:
    """The run with a Gamma that finds nothing important, in the folder `dead`."""
    checkpoint = torch.load(session_whole / "checkpoint.pt", weights_only=True)
    checkpoint["ci_fn"]["out.bias"] -= 1000
    (session_home / "dead").mkdir()
    torch.save(checkpoint, session_home / "dead/checkpoint.pt")


BAD = [
    (["whole", "--alpha=-1"], "alpha=-1"),
    (["whole", "--alpha=1,-1"], "alpha=1,-1"),
    (["whole", "--alpha=nan"], "alpha=nan"),
    (["whole", "--alpha=much"], "alpha=much"),
    (["whole", "--tau=1"], "tau=1"),
    (["whole", "--tau=-0.1"], "tau=-0.1"),
    (["whole", "--tau=nan"], "tau=nan"),
    (["whole", "--gamma=0"], "gamma=0"),
    (["whole", "--tokens=0"], "tokens=0"),
    (["whole", "--restarts=0"], "restarts=0"),
    (["whole", "--seed=-1"], "seed=-1"),
    (["whole", "--tua=0.1"], "did you mean --tau"),
    (["dead"], "dead: no live subcomponent"),
    (["nowhere"], "run folder 'nowhere' does not exist"),
    (["text"], "holds no checkpoint.pt"),
    (["target"], "checkpoint of kind 'target', not 'decomposition'"),
    ([], "needs RUN"),
]


@pytest.mark.parametrize("args, message", BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input_ends_in_one_line(home, whole, dead, args, message):
    assert message in one_line(cluster, *args)
