"""Cluster rank-one subcomponents into full parameter components by minimum description length (paper, "clustering method").

    python cluster.py out/vpd-stdlib                           # half a minute on one CPU core
    python cluster.py out/vpd-stdlib --alpha=1,3,10,30,100     # a sweep: a table and figures/alphas.png, nothing else

Subcomponents that are causally important at the same positions belong together. The grouping is kept under which it takes the
fewest bits to name the groups that are on and to pay for their ranks. Writes <run>/clusters.json (members by matrix, rank,
frequency, cost curve), <run>/clusters.txt (tokens at which each component is on, in context) and three figures.

  A. The cost       mdl_cost, merge_cost: the formulas
  B. The merging    Groups, the state that makes a merge cheap; cluster: a binary [N, n] matrix in, labels out
  C. Firing         g > tau of a run, over N tokens
  D. Text
  E. Figures
  F. The run

Left out: merge samplers other than by rank, importances that are not binarised. What components are worth, and
whether another run finds them too: studies/components.py.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from torch import Tensor

import data
from eval import Run, layer_of, load_run, save_figure
from run import pick_device, run_script, written
from train_target import check_vocabulary

# ---------------------------------------------------------------------------------------------------------------------
# A. The cost


def mdl_cost(s: np.ndarray, rank: np.ndarray, alpha: float) -> float:
    """MDL = sum_i s_i (log2 k + alpha rank_i), in bits over all positions.

    s [k]: positions at which group i is on, which is where any member is; rank [k]: one for each member.
    Whenever a group is on, log2 k bits name it and alpha bits are paid for each of its ranks, also for members that are off
    there. With alpha = 0 one group of everything is free; as alpha grows only what always fires together stays together:
    two subcomponents of equal frequency, each on at a share `co` of the other's positions, merge if
    alpha < co / (1 - co) * log2(k) / 2, for large k. But a merge also makes every other group cheaper to name, by
    S log2(k / (k - 1)) bits in all (S = sum_i s_i), which pays for lumping together what is rare: two that never fire together,
    if they are on at fewer than about 0.72 S / (alpha k) positions each. `rank_frequency_fill` tells such lumps apart.
    """
    return float((s * (np.log2(len(s)) + alpha * rank)).sum())


def merge_cost(s_i, s_j, n_ij, rank_i, rank_j, S, k: int, alpha: float):
    """Change of mdl_cost, in bits, when groups i and j of k >= 2 become one; numbers, or arrays that broadcast.

    s, rank as in mdl_cost; n_ij: positions where both are on; S = sum_i s_i over all k groups.

    PAPER: the published formula prints for the merged group's count the symbol that its text defines as *both on*. A group is
    on where any member is, so the count is the union, o_ij. Only that equals the difference of mdl_cost; the literal reading
    makes pairs that never fire together the best to merge (tests/test_cluster.py has its numbers).
    """
    o_ij = s_i + s_j - n_ij
    naming = (S - s_i - s_j) * math.log2((k - 1) / k) + o_ij * math.log2(k - 1) - (s_i + s_j) * math.log2(k)
    return naming + alpha * (o_ij * (rank_i + rank_j) - s_i * rank_i - s_j * rank_j)


def grouped(X: sp.csr_matrix, label: np.ndarray) -> sp.csr_matrix:
    """Where each group is on, bool [N, k]: the OR over the members of X [N, n], by label [n] in 0 .. k - 1."""
    members = sp.csr_matrix((np.ones(len(label), np.int32), (np.arange(len(label)), label)))
    return (X.astype(np.int32) @ members).astype(bool)


def sample_rank(u: float, gamma: float, pairs: int) -> int:
    """J in 0 .. pairs - 1 with P(J) proportional to exp(-gamma J), from u ~ U(0, 1); gamma = inf gives 0, the best pair."""
    if math.isinf(gamma):
        return 0
    return min(int(-math.log1p(u * math.expm1(-gamma * pairs)) / gamma), pairs - 1)


# ---------------------------------------------------------------------------------------------------------------------
# B. The merging


def coactivation(X: sp.csr_matrix) -> np.ndarray:
    """n_ij = positions where i and j are both on, int32 [n, n], of a binary X [N, n]; s_i on the diagonal."""
    X, k = X.astype(np.int32), X.shape[1]
    columns, n = X.tocsc(), np.empty((k, k), np.int32)
    for a in range(0, k, 1024):  # in blocks: the sparse product of all would take twice the memory of the dense result
        block = (columns[:, a : a + 1024].T @ X[:, a:]).toarray()
        n[a : a + 1024, a:], n[a:, a : a + 1024] = block, block.T
    return n


class Groups:
    """k groups of subcomponents while they merge; at first every one is its own.

    s, rank [K] as in mdl_cost and n [K, K] as in `coactivation`, over K >= k slots; `gone` [K] is inf where a slot's group was
    merged into another, else 0. on[i]: the positions of group i, int32. rows [N, width]: the groups on at each position,
    K where there is no more. first [K]: a subcomponent of each group.

    Without its first term, which all pairs share, the cost of a merge is
        D_ij = alpha (s_i rank_j + s_j rank_i) - n_ij (log2(k - 1) + alpha (rank_i + rank_j)),
    which for a pair that is left alone only grows as k falls. So the smallest D_ij once seen in a row stays a lower `bound`
    [K] on it, and the best pairs are found by looking at the few rows with the lowest bounds instead of at all k^2 / 2 pairs.
    """

    def __init__(self, X: sp.csr_matrix, n: np.ndarray, alpha: float) -> None:
        N, K = X.shape
        self.alpha, self.k, self.n = alpha, K, n.copy()
        self.s, self.rank = n.diagonal().astype(np.float64), np.ones(K)
        self.gone, self.first, self.marked = np.zeros(K), np.arange(K), np.zeros(N, bool)
        width = np.diff(X.indptr)
        self.rows = np.full((N, width.max()), K, np.int32)
        self.rows[np.arange(width.max()) < width[:, None]] = X.indices
        columns = X.tocsc()
        self.on = np.split(columns.indices, columns.indptr[1:-1])
        self.bound = np.concatenate([self.D(np.arange(a, min(a + 256, K))).min(1) for a in range(0, K, 256)])

    def D(self, i: np.ndarray, above: bool = True) -> np.ndarray:
        """D_ij in bits for rows i and all slots j, [len(i), K]; inf where one is gone and, to have each pair once, where j <= i."""
        s, rank, gone, n, i = self.s, self.rank, self.gone, self.n[i], i[:, None]
        naming = math.log2(max(1, self.k - 1))  # at k = 1 no pair is left
        D = self.alpha * (s[i] * rank + rank[i] * s) - n * (naming + self.alpha * (rank[i] + rank)) + gone[i] + gone
        return np.where(np.arange(len(s)) > i, D, np.inf) if above else D

    def cost(self) -> float:
        """mdl_cost of the groups as they are; both sums are of whole numbers, so nothing drifts."""
        there = self.gone == 0
        return float(self.s[there].sum() * math.log2(self.k) + self.alpha * (self.s * self.rank)[there].sum())

    def ranked_pair(self, J: int) -> tuple[int, int]:
        """The pair of rank J = 0, 1, ... by merge_cost, ascending; equal costs in any order."""
        fresh = np.zeros(len(self.s), bool)
        while True:  # until the J + 1 rows of the lowest bounds are known exactly: no other row holds a better pair
            lowest = np.argpartition(self.bound, J)[: J + 1] if J < len(self.bound) else np.arange(len(self.bound))
            stale = lowest[~fresh[lowest]]
            if not len(stale):
                break
            self.bound[stale] = self.D(stale).min(1)
            fresh[stale] = True
        D = self.D(lowest)
        i, j = np.nonzero((D <= self.bound[lowest].max()) & np.isfinite(D))
        best = np.argsort(D[i, j], kind="stable")[J]
        return int(lowest[i[best]]), int(j[best])

    def merge(self, i: int, j: int) -> tuple[int, int]:
        """Groups i and j become one; returns the `first` of both, the one that stays first."""
        if self.s[i] < self.s[j]:
            i, j = j, i  # the smaller group moves
        K, on_i, on_j = len(self.s), self.on[i], self.on[j]
        self.marked[on_i] = True
        already = self.marked[on_j]
        self.marked[on_i] = False
        gained = on_j[
            ~already
        ]  # positions of the union that i lacks: n_i grows there and nowhere else, so the update is exact
        self.n[i] += np.bincount(self.rows[gained].ravel(), minlength=K + 1)[:K].astype(np.int32)
        self.rows[on_j, (self.rows[on_j] == j).argmax(1)] = np.where(already, K, i)  # j stands once in each of its rows
        self.on[i], self.on[j] = np.concatenate((on_i, gained)), on_j[:0]
        self.s[i] += len(gained)
        self.rank[i] += self.rank[j]
        self.n[i, i] = self.s[i]
        self.n[:, i] = self.n[i]
        self.gone[j] = self.bound[j] = np.inf
        self.k -= 1
        D = self.D(np.array([i]), above=False)[0]
        self.bound[:i] = np.minimum(self.bound[:i], D[:i])
        self.bound[i] = D[i + 1 :].min(initial=np.inf)
        merged = int(self.first[i]), int(self.first[j])
        if self.k <= K // 2:
            self.compact()
        return merged

    def compact(self) -> None:
        """Renumber the groups 0 .. k - 1 and forget the empty slots."""
        keep, K = np.flatnonzero(self.gone == 0), len(self.s)
        self.n = self.n[np.ix_(keep, keep)]
        self.s, self.rank, self.gone, self.first, self.bound = (
            a[keep] for a in (self.s, self.rank, self.gone, self.first, self.bound)
        )
        self.on = [self.on[i] for i in keep]
        number = np.full(K + 1, self.k, np.int32)
        number[keep] = np.arange(self.k)
        self.rows = np.sort(number[self.rows], axis=1)  # what is empty comes last
        self.rows = self.rows[:, : max(1, (self.rows < self.k).sum(1).max())].copy()


def merge_path(
    X: sp.csr_matrix, n: np.ndarray, alpha: float, gamma: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Merge the subcomponents of X [N, n] to one group, a pair at a time, the pair's rank by cost drawn by `sample_rank`.

    n: `coactivation(X)`. Returns merges int [n - 1, 2], each (a member of the group that grows, of the one it takes in), and
    mdl_cost after 0, 1, ... n - 1 merges, float [n].
    """
    groups = Groups(X, n, alpha)
    merges, cost = [], [groups.cost()]
    while groups.k > 1:
        J = sample_rank(rng.random(), gamma, groups.k * (groups.k - 1) // 2)
        merges.append(groups.merge(*groups.ranked_pair(J)))
        cost.append(groups.cost())
    return np.array(merges, int).reshape(-1, 2), np.array(cost)


TIGHT = 0.5  # a component of more than one is tight at this fill or above, and a lump below


def rank_frequency_fill(X: sp.csr_matrix, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each component, [k]: its rank; s, the positions where it is on; and its fill, the share of these at which a member is.

    The fill is a mean over members: 1 / rank if no two are ever on together, 1 if they always all are. X [N, n], label [n].
    """
    rank, s = np.bincount(label), grouped(X, label).getnnz(0)
    return rank, s, np.bincount(label, weights=X.getnnz(0)) / (rank * s)


@dataclass(frozen=True)
class Clustering:
    """label [n] in 0 .. k - 1: the component of each subcomponent. First come components whose members fire together (fill of 0.5
    or more), then single subcomponents, then lumps; each by rank times frequency.

    cost [restarts, n]: mdl_cost after each merge, bits; the least is cost[best, cut], after `cut` merges of restart `best`.
    """

    label: np.ndarray
    cost: np.ndarray
    best: int
    cut: int


def cluster(X: sp.csr_matrix, alpha: float, gamma: float = 0.2, seed: int = 0, restarts: int = 1) -> Clustering:
    """The grouping of least mdl_cost along `restarts` merge paths; a greedy path (gamma = inf) has no chance in it, one is taken.

    X: binary [N, n], nonzero where a subcomponent is causally important. ValueError if there is none, or one that never fires.

    PAPER: the text stops where the change of cost turns positive. Pairs drawn by rank make it do so many times on the way, so ours is
    the least cost of all that the path passes. The text gives no alpha.
    """
    X = sp.csr_matrix(X, dtype=bool)
    X.eliminate_zeros()
    X.sort_indices()
    if not X.shape[1] or not X.getnnz(0).all():
        raise ValueError(
            f"{(X.getnnz(0) == 0).sum()} of {X.shape[1]} subcomponents never fire: drop the dead ones; at least one must be live"
        )
    n = coactivation(X)
    paths = [
        merge_path(X, n, alpha, gamma, np.random.default_rng([seed, i]))
        for i in range(1 if math.isinf(gamma) else restarts)
    ]
    cost = np.array([cost for _, cost in paths])
    best, cut = np.unravel_index(cost.argmin(), cost.shape)

    label = np.arange(X.shape[1])
    for i, j in paths[best][0][:cut]:
        label[label == j] = i
    label = np.unique(label, return_inverse=True)[1]
    rank, s, fill = rank_frequency_fill(X, label)
    order = np.lexsort((-rank * s, np.where(rank == 1, 1, np.where(fill >= TIGHT, 0, 2))))
    return Clustering(np.argsort(order)[label], cost, int(best), int(cut))


# ---------------------------------------------------------------------------------------------------------------------
# C. Firing


@dataclass(frozen=True)
class Firing:
    """Which live subcomponents of a run fire where, over N tokens of validation text.

    X: bool [N, n], g > tau; live [n]: their columns among all C; names [n]: (matrix, number in it); tokens [N / T, T].
    """

    X: sp.csr_matrix
    live: np.ndarray
    names: list[tuple[str, int]]
    tokens: np.ndarray


def validation(run: Run, corpus: data.Corpus, n_tokens: int, seed: int) -> Iterator[Tensor]:
    """Random windows of T + 1 tokens with n_tokens or a few more positions in all, up to 64 at a time, [B, T + 1]."""
    T, device = run.config["T"], next(run.ci_fn.parameters()).device
    windows = -(-n_tokens // T)
    for i in range(0, windows, 64):
        yield corpus.batch("val", i // 64, min(64, windows - i), T, seed).to(device)


def gather(run: Run, corpus: data.Corpus, tau: float, n_tokens: int, seed: int) -> Firing:
    """Causal importances of a run, binarised at tau in [0, 1). ValueError if no subcomponent ever fires."""
    blocks, tokens = [], []
    for batch in validation(run, corpus, n_tokens, seed):
        _, g = run.importances(batch[:, :-1])
        blocks.append(sp.csr_matrix((g > tau).flatten(0, 1).cpu().numpy()))
        tokens.append(batch[:, :-1].cpu().numpy())
    X = sp.vstack(blocks, format="csr")
    live = np.flatnonzero(X.getnnz(0))
    if not len(live):
        raise ValueError(
            f"{run.folder}: no live subcomponent: none has g > tau={tau} at any of {X.shape[0]:,} tokens; try a smaller tau, or train longer"
        )
    names = [(name, c) for name, C in run.decomposition.C.items() for c in range(C)]
    return Firing(X[:, live], live, [names[c] for c in live], np.concatenate(tokens))


SPANS = {
    "single": "one subcomponent",
    "matrix": "one matrix",
    "layer": "several matrices of a layer",
    "layers": "several layers",
}


def span(members: dict[str, list[int]]) -> str:
    """How far a component reaches, a key of SPANS; members: {matrix: numbers}."""
    if sum(map(len, members.values())) == 1:
        return "single"
    return "matrix" if len(members) == 1 else "layer" if len(set(map(layer_of, members))) == 1 else "layers"


def components_of(X: sp.csr_matrix, names: list[tuple[str, int]], label: np.ndarray) -> list[dict]:
    """What clusters.json holds of each component, by label: members {matrix: numbers}, rank, frequency s / N, fill, span."""
    components = [
        {"members": {}, "rank": int(rank), "frequency": float(s / X.shape[0]), "fill": float(fill)}
        for rank, s, fill in zip(*rank_frequency_fill(X, label))
    ]
    for i, (matrix, number) in zip(label, names):
        components[i]["members"].setdefault(matrix, []).append(number)
    return [c | {"span": span(c["members"])} for c in components]


def is_tight(component: dict) -> bool:
    return component["rank"] > 1 and component["fill"] >= TIGHT


def summary(components: list[dict]) -> str:
    def count(keep) -> str:
        kept = [c for c in components if keep(c)]
        return f"{len(kept)} ({sum(c['rank'] for c in kept)})"

    reach = ", ".join(
        f"{name} {count(lambda c: c['span'] == kind and (kind == 'single' or is_tight(c)))}"
        for kind, name in SPANS.items()
    )
    return (
        f"{len(components)} components (of so many subcomponents): {reach}; lumps {count(lambda c: c['fill'] < TIGHT)}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# D. Text


def describe(i: int, component: dict, on: np.ndarray, tokens: np.ndarray, decode, rng: np.random.Generator) -> str:
    """Component i as text: members, the tokens that it goes with most, and five random places where it is on (bool [N]), in context.

    tokens [N / T, T]. Behind a token: its share of the places where the component is on, and at how much of its own places that is.
    """
    T, flat, at = tokens.shape[1], tokens.ravel(), np.flatnonzero(on)

    def shown(ids: np.ndarray) -> str:
        return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in decode(ids.tolist()))

    count, of = np.bincount(flat[at], minlength=flat.max() + 1), np.maximum(1, np.bincount(flat))
    information = count * np.log(
        np.maximum(count / of / on.mean(), 1e-9)
    )  # how much more often than anywhere, weighed by how often
    top = [t for t in np.argsort(-information, kind="stable")[:8] if count[t]]
    members = "; ".join(f"{name} {' '.join(map(str, numbers))}" for name, numbers in component["members"].items())
    lines = [
        f"component {i}: rank {component['rank']}, on at {component['frequency']:.2%} of tokens, fill {component['fill']:.2f}; {members}"
    ]
    lines.append(
        "    " + ", ".join(f"[{shown(np.array([t]))}] {count[t] / len(at):.0%}/{count[t] / of[t]:.0%}" for t in top)
    )
    for p in np.sort(rng.choice(at, min(5, len(at)), replace=False)):
        start = p - p % T
        before, after = shown(flat[max(start, p - 16) : p]), shown(flat[p + 1 : min(start + T, p + 6)])
        lines.append(f"    {before[-48:]:>48s}[{shown(flat[p : p + 1])}]{after}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# E. Figures

SPAN_COLOURS = {"single": "#7f7f7f", "matrix": "#0072b2", "layer": "#009e73", "layers": "#d55e00"}


def plot_cost(found: Clustering, N: int, alpha: float, path: Path) -> None:
    """MDL in bits a token over the merges of every restart, and the cut of the best one."""
    from matplotlib import pyplot as plt

    cost, n, cut = found.cost / N, found.cost.shape[1], found.cut
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for ax, title in zip(axes, ("All merges", "Around the cut")):
        ax.plot(cost.T, color="#7f7f7f", lw=0.7, alpha=0.6)
        ax.plot(cost[found.best], color="#0072b2", lw=1.5, label=f"the best of {len(cost)} restarts")
        ax.axvline(
            cut, color="#d55e00", ls="--", lw=1, label=f"least: {cost[found.best, cut]:.1f} bits, {n - cut} components"
        )
        ax.set(
            xlabel=f"merges, from {n} groups to one",
            ylabel="description length, bits a token",
            title=f"{title} (α = {alpha:g})",
        )
    low, high = max(0, cut - n // 8), min(n - 1, cut + n // 12)
    near = cost[:, low : high + 1]
    axes[1].set(
        xlim=(low, high), ylim=(near.min() - 0.05 * np.ptp(near) - 1e-9, near.max() + 0.05 * np.ptp(near) + 1e-9)
    )
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=8, loc="upper left")
    save_figure(figure, path)


def plot_coactivation(
    X: sp.csr_matrix, label: np.ndarray, components: list[dict], matrices: list[str], path: Path
) -> None:
    """Co-activation of the members of tight components, by their matrix [n] and by their component [n]."""
    from matplotlib import pyplot as plt

    shown = np.flatnonzero([is_tight(components[i]) for i in label])
    shown = shown if len(shown) else np.arange(len(label))  # none is tight: all
    n, label, matrices = coactivation(X[:, shown]), label[shown], [matrices[i] for i in shown]
    jaccard = n / (n.diagonal()[:, None] + n.diagonal() - n)
    sizes, names = np.bincount(label), list(dict.fromkeys(matrices))
    figure, axes = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    for ax, order, by in zip(axes, (np.arange(len(n)), np.argsort(label, kind="stable")), ("matrix", "component")):
        image = ax.imshow(jaccard[np.ix_(order, order)], cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
        ax.set(xlabel=f"subcomponent, by {by}", title=f"The {len(n)} subcomponents of tight components, by {by}")
    edges = np.array([matrices.index(name) for name in names] + [len(n)])
    axes[0].set_yticks((edges[:-1] + edges[1:] - 1) / 2, names, fontsize=7)
    for edge in edges[1:-1] - 0.5:
        axes[0].axhline(edge, color="#7f7f7f", lw=0.4), axes[0].axvline(edge, color="#7f7f7f", lw=0.4)
    for start, size in zip(np.cumsum(sizes) - sizes, sizes):
        axes[1].add_patch(plt.Rectangle((start - 0.5, start - 0.5), size, size, fill=False, ec="#0072b2", lw=0.7))
    figure.colorbar(image, ax=axes, label="tokens where both are on / tokens where either is", fraction=0.03, pad=0.01)
    save_figure(figure, path)


def plot_sizes(components: list[dict], path: Path) -> None:
    """Ranks of the components, whether their members fire together, and how far they reach."""
    from matplotlib import pyplot as plt

    figure, (ax_rank, ax_fill, ax_span) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    rank, frequency, fill = (np.array([c[key] for c in components]) for key in ("rank", "frequency", "fill"))
    for kind, colour in SPAN_COLOURS.items():
        of = np.array([c["span"] == kind for c in components])
        tight = of & (fill >= TIGHT)
        bar = f"{SPANS[kind]}\n{of.sum()} components" + (
            f", {of.sum() - tight.sum()} of them lumps" if kind != "single" else ""
        )
        ax_span.barh(bar, rank[tight].sum(), color=colour)
        ax_span.barh(bar, rank[of & ~tight].sum(), left=rank[tight].sum(), color=colour, alpha=0.3)
        if kind != "single":
            ax_fill.scatter(frequency[of], fill[of], s=6 * rank[of], alpha=0.5, color=colour, lw=0)
    ax_rank.hist(
        [rank[[c["span"] == kind for c in components]] for kind in SPANS],
        bins=np.arange(0.5, rank.max() + 1),
        stacked=True,
        color=SPAN_COLOURS.values(),
    )
    ax_rank.set(xlabel="rank: subcomponents in a component", ylabel="components", yscale="log", title="Ranks")
    ax_fill.axhline(TIGHT, color="#7f7f7f", lw=0.8, ls=":")
    ax_fill.set(
        xlabel="frequency: share of tokens where it is on",
        ylabel="fill: share of them where a member is on",
        xscale="log",
        ylim=(0, 1.02),
    )
    ax_fill.set(title="Components of rank above 1 (area: rank)")
    ax_span.set(xlabel="subcomponents in such components (pale: in lumps)", title="How far components reach")
    ax_span.invert_yaxis()
    save_figure(figure, path)


def plot_alphas(found: dict[float, list[dict]], path: Path) -> None:
    """Components against alpha, and how far they reach; found: {alpha: components}."""
    from matplotlib import pyplot as plt

    figure, (ax, ax_span) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    alphas, live = list(found), sum(c["rank"] for c in next(iter(found.values())))

    def line(on, keep, weigh, **style) -> None:
        on.plot(
            alphas, [sum(weigh(c) for c in components if keep(c)) for components in found.values()], marker="o", **style
        )

    line(ax, lambda c: True, lambda c: 1, color="#000000", label="components")
    line(ax, lambda c: c["rank"] > 1, lambda c: 1, color="#0072b2", label="of rank above 1")
    line(ax, is_tight, lambda c: 1, color="#d55e00", label="of rank above 1 and tight (fill ≥ 0.5)")
    ax.axhline(live, color="#7f7f7f", lw=1, ls=":", label="live subcomponents")
    for kind, colour in SPAN_COLOURS.items():
        line(
            ax_span,
            lambda c: c["span"] == kind and c["fill"] >= TIGHT,
            lambda c: c["rank"] / live,
            color=colour,
            label=SPANS[kind],
        )
    line(
        ax_span,
        lambda c: c["fill"] < TIGHT,
        lambda c: c["rank"] / live,
        color="#000000",
        ls=":",
        label="any, but a lump (fill < 0.5)",
    )
    ax.set(ylabel="count", title="Components against α")
    ax_span.set(
        ylabel="share of the live subcomponents", title="How far their component reaches", ylim=(-0.02, 1.5)
    )  # room for the legend
    for a in (ax, ax_span):
        a.set(xlabel="α, bits for each rank of a component that is on")
        a.set_xscale("log") if min(alphas) > 0 else a.set_xscale(
            "symlog", linthresh=min([x for x in alphas if x > 0], default=1)
        )
        a.set_xticks(alphas, [f"{x:g}" for x in alphas])
        a.set_xticks([], minor=True)
        a.legend(fontsize=8)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# F. The run


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py
    alpha: str = "10"  # bits for each rank of a component that is on; several, as in 0.1,1,10, make a sweep
    tau: float = 0.01  # a subcomponent fires where g > tau
    gamma: float = (
        0.2  # the pair of rank J by cost is merged with probability proportional to exp(-gamma J); inf is greedy
    )
    tokens: int = 65_536  # of validation text, at which firing is counted
    restarts: int = 4  # merge paths, of which the one of least cost counts
    seed: int = 0  # of the text and the merges
    data_dir: str = ""  # where token files are kept; default as in the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        self.alphas()
        if not 0 <= self.tau < 1:
            raise ValueError(
                f"tau={self.tau}: must be in [0, 1), as g is in [0, 1] and a subcomponent fires where g > tau"
            )
        if not self.gamma > 0:
            raise ValueError(f"gamma={self.gamma}: must be above 0; inf is greedy")
        if min(self.tokens, self.restarts) < 1 or self.seed < 0:
            raise ValueError(
                f"tokens={self.tokens}, restarts={self.restarts}: must be at least 1, and seed={self.seed} not negative"
            )

    def alphas(self) -> list[float]:
        try:
            alphas = [float(a) for a in self.alpha.split(",")]
        except ValueError:
            raise ValueError(f"alpha={self.alpha!r}: must be a number, or several as in 0.1,1,10") from None
        if not all(0 <= a < math.inf for a in alphas):
            raise ValueError(f"alpha={self.alpha}: must be finite and not negative")
        return alphas


def open_run(folder: str, data_dir: str, device: str) -> tuple[Run, data.Corpus]:
    """A run and its text. FileNotFoundError or ValueError as in load_run and data.load."""
    run = load_run(folder, pick_device(device))
    corpus = data.load(run.config["dataset"], data_dir or run.config["data_dir"], run.config.get("max_tokens", 0))
    check_vocabulary(run.folder, run.checkpoint["target"], corpus)
    return run, corpus


def main(config: Config) -> None:
    import matplotlib

    matplotlib.use("Agg")
    run, corpus = open_run(config.run, config.data_dir, config.device)
    began, figures = time.time(), run.folder / "figures"
    firing = gather(run, corpus, config.tau, config.tokens, config.seed)
    X, (N, n) = firing.X, firing.X.shape
    C = sum(run.decomposition.C.values())
    print(
        f"firing: {n} of {C} subcomponents have g > {config.tau} at one of {N:,} tokens, {X.nnz / N:.2f} at a token; {time.time() - began:.0f} s"
    )

    results = {}
    for alpha in config.alphas():
        began = time.time()
        found = cluster(X, alpha, config.gamma, config.seed, config.restarts)
        seconds = time.time() - began
        results[alpha] = components = components_of(X, firing.names, found.label)
        print(
            f"alpha {alpha:g}: {summary(components)}; {found.cost[0, 0] / N:.1f} bits a token apart, {found.cost.min() / N:.1f} clustered; {seconds:.1f} s"
        )
    if len(results) > 1:
        plot_alphas(results, figures / "alphas.png")
        print(f"written: {figures}/alphas.png")
        return

    report = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "alpha": alpha, "tau": config.tau, "gamma": config.gamma, "tokens": config.tokens,
        "restarts": config.restarts, "seed": config.seed, "live": n, "seconds": seconds, "merges": found.cut, "cost": found.cost.min(),
        "cost_of_restarts": found.cost.min(1).tolist(), "cost_curve": found.cost[found.best].tolist(), "components": components,
    }  # fmt: skip
    with written(run.folder / "clusters.json") as temporary:
        temporary.write_text(json.dumps(report) + "\n", encoding="utf-8")
    rng, on = np.random.default_rng(config.seed), grouped(X, found.label).tocsc()
    texts = [
        describe(i, c, on[:, [i]].toarray()[:, 0], firing.tokens, corpus.encoding.decode, rng)
        for i, c in enumerate(components)
    ]
    with written(run.folder / "clusters.txt") as temporary:
        temporary.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    print("\n".join(texts[:3]))
    plot_cost(found, N, alpha, figures / "clusters.png")
    plot_coactivation(X, found.label, components, [name for name, _ in firing.names], figures / "coactivation.png")
    plot_sizes(components, figures / "sizes.png")
    print(
        f"written: {run.folder}/clusters.json, {run.folder}/clusters.txt, {figures}/clusters.png, coactivation.png and sizes.png"
    )


if __name__ == "__main__":
    run_script(main, Config, __doc__)
