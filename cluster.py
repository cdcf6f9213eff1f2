"""Cluster rank-one subcomponents into parameter components by minimum description length (paper, "clustering method").

    python cluster.py out/vpd-stdlib                         # half a minute on one CPU core; about 500 components
    python cluster.py out/vpd-stdlib --alpha=1,3,10,30,100   # a sweep: a line each and figures/alphas.png, no more

Subcomponents that are causally important at the same positions belong together. The grouping is kept that takes the
fewest bits to name the groups that are on and to pay for their ranks. Writes to the run's folder clusters.json (the
members of each component by matrix, rank, frequency, fill, span; the cost after every merge), clusters.txt (tokens at
which each component is on, in context) and three figures.

  A. The cost                mdl_cost, merge_cost: the formulas
  B. The merging             Groups, which makes a merge cheap; cluster: a binary [N, n] matrix in, labels out
  C. Firing and components   g > tau at N positions of a run; what clusters.json and clusters.txt say
  D. Figures
  E. The run

Left out: merge samplers other than by rank, importances that are not binarised. What components are worth, and
whether another run finds them too: studies/components.py.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

import data
from eval import Run, check_mark, layer_of, open_run, save_figure, subplots, validation_windows
from flags import UserError, require
from run import command, run_script, write_text

# ---------------------------------------------------------------------------------------------------------------------
# A. The cost


def mdl_cost(s: np.ndarray, rank: np.ndarray, alpha: float) -> float:
    """MDL = sum_i s_i (log2 k + alpha rank_i), in bits over all positions.

    s [k]: positions at which group i is on, which is where any member is. rank [k]: the number of its members.
    Wherever a group is on, log2 k bits name it and alpha bits pay for each member, also for those that are off there.
    With alpha = 0 one group of everything is free. As alpha grows, only what always fires together stays together.
    Two of rank 1 and equal frequency, each on at a share `co` of the other's positions, merge for large k if
        alpha < co / (1 - co) * log2(k) / 2.
    A merge also makes every other group cheaper to name, by S log2(k / (k - 1)) bits in all, where S = sum_i s_i.
    So two that never fire together merge too, if each is on at fewer than about 0.72 S / (alpha k) positions.
    Such lumps have a small fill: see `rank_frequency_fill`.
    """
    return float((s * (np.log2(len(s)) + alpha * rank)).sum())


def merge_cost(s_i, s_j, s_ij, rank_i, rank_j, S, k: int, alpha: float):
    """Change of mdl_cost, in bits, when groups i and j of k >= 2 become one. Numbers, or arrays that broadcast.

    s, rank: as in mdl_cost. s_ij: positions where both are on. S = sum_i s_i over all k groups.

    PAPER: the published formula has s_ij, which its text defines as *both on*, for the count of the merged group. But a
    group is on where any member is, so that count is the union. Only the union gives the difference of mdl_cost.
    With s_ij, pairs that never fire together are the best to merge: tests/test_cluster.py has its numbers.
    """
    union = s_i + s_j - s_ij
    naming = (S - s_i - s_j) * math.log2((k - 1) / k) + union * math.log2(k - 1) - (s_i + s_j) * math.log2(k)
    return naming + alpha * (union * (rank_i + rank_j) - s_i * rank_i - s_j * rank_j)


def grouped(X: sp.csr_matrix, label: np.ndarray) -> sp.csr_matrix:
    """Where each group is on, bool [N, k]: the OR over the members of X [N, n], by label [n] in 0 .. k - 1."""
    members = sp.csr_matrix((np.ones(len(label), np.int32), (np.arange(len(label)), label)))
    return (X.astype(np.int32) @ members).astype(bool)


def sample_rank(u: float, gamma: float, pairs: int) -> int:
    """J in 0 .. pairs - 1 with P(J) proportional to exp(-gamma J), from u ~ U(0, 1). gamma = inf: 0, the best pair."""
    if math.isinf(gamma):
        return 0
    return min(int(-math.log1p(u * math.expm1(-gamma * pairs)) / gamma), pairs - 1)


# ---------------------------------------------------------------------------------------------------------------------
# B. The merging


def coactivation(X: sp.csr_matrix) -> np.ndarray:
    """s_ij, the positions where i and j are both on, int32 [n, n], of a binary X [N, n]; s_i on the diagonal."""
    X, n = X.astype(np.int32), X.shape[1]
    columns, both = X.tocsc(), np.empty((n, n), np.int32)
    for a in range(0, n, 1024):  # in blocks: the sparse product of all would take twice the memory of the dense result
        block = (columns[:, a : a + 1024].T @ X[:, a:]).toarray()
        both[a : a + 1024, a:], both[a:, a : a + 1024] = block, block.T
    return both


class Groups:
    """k groups of subcomponents while they merge. At first every subcomponent of X [N, K] is a group of its own.

    A group has a slot; there are K >= k of them. s, rank [K]: as in mdl_cost. both [K, K]: s_ij, as in `coactivation`.
    gone [K]: inf where a slot's group was merged into another, else 0. first [K]: a subcomponent of each group.
    on[i]: the positions of group i, int32. rows [N, width]: the groups on at each position, K where there is no more.

    Without the term S log2((k - 1) / k), which all pairs share, merge_cost is
        change_ij = alpha (s_i rank_j + s_j rank_i) - s_ij (log2(k - 1) + alpha (rank_i + rank_j)).
    For a pair that is left alone it only grows as k falls. So the smallest change once seen in a row stays a lower
    `bound` [K] on it, and the best pairs are in the few rows with the lowest bounds: not all k^2 / 2 are looked at.
    """

    def __init__(self, X: sp.csr_matrix, both: np.ndarray, alpha: float) -> None:
        N, K = X.shape
        self.alpha, self.k, self.both = alpha, K, both.copy()
        self.s, self.rank = both.diagonal().astype(np.float64), np.ones(K)
        self.gone, self.first, self.marked = np.zeros(K), np.arange(K), np.zeros(N, bool)
        width = np.diff(X.indptr)
        self.rows = np.full((N, width.max()), K, np.int32)
        self.rows[np.arange(width.max()) < width[:, None]] = X.indices
        columns = X.tocsc()
        self.on = np.split(columns.indices, columns.indptr[1:-1])
        self.bound = np.concatenate([self.change(np.arange(a, min(a + 256, K))).min(1) for a in range(0, K, 256)])

    def change(self, i: np.ndarray, above: bool = True) -> np.ndarray:
        """change_ij in bits for rows i and all slots j, [len(i), K]; inf where one is gone.

        above: also inf where j <= i, to have each pair once.
        """
        s, rank, gone, both, i = self.s, self.rank, self.gone, self.both[i], i[:, None]
        bits = math.log2(max(1, self.k - 1)) + self.alpha * (rank[i] + rank)  # at k = 1 no pair is left
        change = self.alpha * (s[i] * rank + rank[i] * s) - both * bits + gone[i] + gone
        return np.where(np.arange(len(s)) > i, change, np.inf) if above else change

    def cost(self) -> float:
        """mdl_cost of the groups as they are. Both sums are of whole numbers, so nothing drifts."""
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
            self.bound[stale] = self.change(stale).min(1)
            fresh[stale] = True
        change = self.change(lowest)
        i, j = np.nonzero((change <= self.bound[lowest].max()) & np.isfinite(change))
        best = np.argsort(change[i, j], kind="stable")[J]
        return int(lowest[i[best]]), int(j[best])

    def merge(self, i: int, j: int) -> tuple[int, int]:
        """Groups i and j become one. Returns the `first` of both, the one that stays first."""
        if self.s[i] < self.s[j]:
            i, j = j, i  # the smaller group moves
        K, on_i, on_j = len(self.s), self.on[i], self.on[j]
        self.marked[on_i] = True
        already = self.marked[on_j]
        self.marked[on_i] = False
        gained = on_j[~already]  # positions of the union that i lacks: row i of `both` grows there and nowhere else
        self.both[i] += np.bincount(self.rows[gained].ravel(), minlength=K + 1)[:K].astype(np.int32)
        self.rows[on_j, (self.rows[on_j] == j).argmax(1)] = np.where(already, K, i)  # j stands once in each of its rows
        self.on[i], self.on[j] = np.concatenate((on_i, gained)), on_j[:0]
        self.s[i] += len(gained)
        self.rank[i] += self.rank[j]
        self.both[i, i] = self.s[i]
        self.both[:, i] = self.both[i]
        self.gone[j] = self.bound[j] = np.inf
        self.k -= 1
        change = self.change(np.array([i]), above=False)[0]
        self.bound[:i] = np.minimum(self.bound[:i], change[:i])
        self.bound[i] = change[i + 1 :].min(initial=np.inf)
        merged = int(self.first[i]), int(self.first[j])
        if self.k <= K // 2:
            self.compact()
        return merged

    def compact(self) -> None:
        """Renumber the groups 0 .. k - 1 and forget the empty slots."""
        keep, K = np.flatnonzero(self.gone == 0), len(self.s)
        self.both, self.on = self.both[np.ix_(keep, keep)], [self.on[i] for i in keep]
        self.s, self.rank, self.first, self.bound = (a[keep] for a in (self.s, self.rank, self.first, self.bound))
        self.gone = np.zeros(self.k)
        number = np.full(K + 1, self.k, np.int32)
        number[keep] = np.arange(self.k)
        self.rows = np.sort(number[self.rows], axis=1)  # what is empty comes last
        self.rows = self.rows[:, : max(1, (self.rows < self.k).sum(1).max())].copy()


def merge_path(groups: Groups, gamma: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Merge n new groups to one, a pair at a time, the pair's rank by cost drawn by `sample_rank`.

    Returns merges, int [n - 1, 2], each a member of the group that grows and one of the group that it takes in; and
    mdl_cost after 0, 1, ... n - 1 merges, float [n].
    """
    merges, cost = [], [groups.cost()]
    while groups.k > 1:
        J = sample_rank(rng.random(), gamma, groups.k * (groups.k - 1) // 2)
        merges.append(groups.merge(*groups.ranked_pair(J)))
        cost.append(groups.cost())
    return np.array(merges, int).reshape(-1, 2), np.array(cost)


TIGHT = 0.5  # a component of more than one is tight at this fill or above, and a lump below


def rank_frequency_fill(X: sp.csr_matrix, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each component's rank, its s, the positions where it is on, and its fill, [k] each. X [N, n], label [n].

    fill: the share of these positions at which a member is on, mean over members. It is 1 / rank if no two members
    ever fire together, and 1 if they always all do.
    """
    rank, s = np.bincount(label), grouped(X, label).getnnz(0)
    return rank, s, np.bincount(label, weights=X.getnnz(0)) / (rank * s)


@dataclass(frozen=True)
class Clustering:
    """label [n] in 0 .. k - 1: the component of each subcomponent. cost [restarts, n]: mdl_cost after each merge, bits.

    Tight components come first, then single subcomponents, then lumps; each kind by rank times frequency, descending.
    The least cost is cost[best, cut], after `cut` merges of restart `best`.
    """

    label: np.ndarray
    cost: np.ndarray
    best: int
    cut: int


def cluster(X: sp.csr_matrix, alpha: float, gamma: float = 0.2, seed: int = 0, restarts: int = 1) -> Clustering:
    """The grouping of least mdl_cost along `restarts` merge paths; along one if gamma = inf, as then nothing is drawn.

    X: binary [N, n], nonzero where a subcomponent is causally important. ValueError if n is 0 or one never fires.

    PAPER: the text stops where the change of cost turns positive. With pairs drawn by rank it does so many times on the
    way. So ours is the least cost of all that the path passes. The text gives no alpha.
    """
    X = sp.csr_matrix(X, dtype=bool)
    X.eliminate_zeros()
    X.sort_indices()
    n, dead = X.shape[1], int((X.getnnz(0) == 0).sum())
    if dead or not n:
        raise ValueError(f"{dead} of {n} subcomponents never fire: drop the dead ones; at least one must be live")
    both, starts = coactivation(X), 1 if math.isinf(gamma) else restarts
    paths = [merge_path(Groups(X, both, alpha), gamma, np.random.default_rng([seed, i])) for i in range(starts)]
    cost = np.array([cost for _, cost in paths])
    best, cut = np.unravel_index(cost.argmin(), cost.shape)

    label = np.arange(n)
    for i, j in paths[best][0][:cut]:
        label[label == j] = i
    label = np.unique(label, return_inverse=True)[1]
    rank, s, fill = rank_frequency_fill(X, label)
    order = np.lexsort((-rank * s, np.where(rank == 1, 1, np.where(fill >= TIGHT, 0, 2))))
    return Clustering(np.argsort(order)[label], cost, int(best), int(cut))


# ---------------------------------------------------------------------------------------------------------------------
# C. Firing and components


@dataclass(frozen=True)
class Firing:
    """Which live subcomponents of a run fire where, at N positions of validation text.

    X: bool [N, n], g > tau. live [n]: their columns among all C. names [n]: (matrix, number in it). tokens [N / T, T].
    """

    X: sp.csr_matrix
    live: np.ndarray
    names: list[tuple[str, int]]
    tokens: np.ndarray


def gather(run: Run, corpus: data.Corpus, tau: float, n_tokens: int, seed: int) -> Firing:
    """Causal importances of a run, binarised at tau in [0, 1), on whole windows with n_tokens positions or a few more.

    UserError if no subcomponent ever fires.
    """
    windows = validation_windows(corpus, -(-n_tokens // run.config["T"]), run.config["T"], seed)
    blocks = []
    for tokens in run.batches(windows):
        _, g, _ = run.importances(tokens[:, :-1])
        blocks.append(sp.csr_matrix((g > tau).flatten(0, 1).cpu().numpy()))
    X = sp.vstack(blocks, format="csr")
    live = np.flatnonzero(X.getnnz(0))
    if not len(live):
        raise UserError(f"{run.folder}: no live subcomponent, nowhere is g > tau={tau}: lower tau or train longer")
    names = [(name, c) for name, C in run.decomposition.C.items() for c in range(C)]
    return Firing(X[:, live], live, [names[c] for c in live], windows[:, :-1].numpy())


SPANS = {  # how far a component reaches: in words, and its colour
    "single": ("one subcomponent", "#7f7f7f"),
    "matrix": ("one matrix", "#0072b2"),
    "layer": ("several matrices of a layer", "#009e73"),
    "layers": ("several layers", "#d55e00"),
}
KINDS = SPANS | {"lump": ("lumps", "#000000")}  # a lump is one however far it reaches


def span(members: dict[str, list[int]]) -> str:
    """One of SPANS; members: {matrix: numbers}."""
    if sum(map(len, members.values())) == 1:
        return "single"
    return "matrix" if len(members) == 1 else "layer" if len(set(map(layer_of, members))) == 1 else "layers"


def components_of(X: sp.csr_matrix, names: list[tuple[str, int]], label: np.ndarray) -> list[dict]:
    """What clusters.json holds of each component: members {matrix: numbers}, rank, frequency s / N, fill, span."""
    components = [
        {"members": {}, "rank": int(rank), "frequency": float(s / X.shape[0]), "fill": float(fill)}
        for rank, s, fill in zip(*rank_frequency_fill(X, label))
    ]
    for i, (matrix, number) in zip(label, names):
        components[i]["members"].setdefault(matrix, []).append(number)
    return [c | {"span": span(c["members"])} for c in components]


def kind_of(component: dict) -> str:
    """One of KINDS."""
    return "lump" if component["fill"] < TIGHT else component["span"]


def summary(components: list[dict]) -> str:
    """How many components, and in brackets subcomponents, there are of each kind."""
    ranks = {kind: [c["rank"] for c in components if kind_of(c) == kind] for kind in KINDS}
    kinds = [f"{words} {len(ranks[kind])} ({sum(ranks[kind])})" for kind, (words, _) in KINDS.items()]
    return f"{len(components)} components (of so many subcomponents): {', '.join(kinds)}"


def describe(i: int, component: dict, on: np.ndarray, tokens: np.ndarray, decode, rng: np.random.Generator) -> str:
    """Component i as text: its members, the tokens that it goes with most, and five random places where it is on.

    on: bool [N]; tokens [N / T, T]; decode: token ids to text. Behind a token: its share of the places where the
    component is on, and at how much of the token's own places that is.
    """
    T, flat, at = tokens.shape[1], tokens.ravel(), np.flatnonzero(on)

    def shown(ids: np.ndarray) -> str:
        return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in decode(ids.tolist()))

    members = "; ".join(f"{name} {' '.join(map(str, numbers))}" for name, numbers in component["members"].items())
    rank, frequency, fill = (component[key] for key in ("rank", "frequency", "fill"))
    lines = [f"component {i}: rank {rank}, on at {frequency:.2%} of tokens, fill {fill:.2f}; {members}"]
    count, of = np.bincount(flat[at], minlength=flat.max() + 1), np.maximum(1, np.bincount(flat))
    # How much more often a token is there than anywhere, weighed by how often it is there.
    information = count * np.log(np.maximum(count / of / on.mean(), 1e-9))
    top = [t for t in np.argsort(-information, kind="stable")[:8] if count[t]]
    top = [f"[{shown(np.array([t]))}] {count[t] / len(at):.0%}/{count[t] / of[t]:.0%}" for t in top]
    lines.append(f"    {', '.join(top)}")
    for p in np.sort(rng.choice(at, min(5, len(at)), replace=False)):
        start = p - p % T
        before, after = shown(flat[max(start, p - 16) : p]), shown(flat[p + 1 : min(start + T, p + 6)])
        lines.append(f"    {before[-48:]:>48s}[{shown(flat[p : p + 1])}]{after}")
    return "\n".join(lines)


def read_clusters(folder: Path, C: dict[str, int], mark: str) -> tuple[dict, np.ndarray, np.ndarray]:
    """clusters.json of a run; the component of each of its C subcomponents, [C]; the columns of the live ones, [n].

    Dead subcomponents are components of their own, after the others. C: {matrix: subcomponents}. mark: of the Run.
    UserError if the file is not there, not whole, of other subcomponents or of another training.
    """
    path = folder / "clusters.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: run cluster.py first")
    labels = {name: np.full(size, -1) for name, size in C.items()}
    try:
        clusters = json.loads(path.read_text(encoding="utf-8"))
        for i, component in enumerate(clusters["components"]):
            for name, numbers in component["members"].items():
                labels[name][numbers] = i
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not fit this run ({error!r}): run cluster.py again") from error
    check_mark(path, clusters, mark, "cluster.py")
    label = np.concatenate(list(labels.values()))
    live, dead = np.flatnonzero(label >= 0), np.flatnonzero(label < 0)
    label[dead] = len(clusters["components"]) + np.arange(len(dead))
    return clusters, label, live


# ---------------------------------------------------------------------------------------------------------------------
# D. Figures


def plot_cost(found: Clustering, N: int, alpha: float, path: Path) -> None:
    """MDL in bits a token over the merges of every restart, and the cut of the best one."""
    cost, cut, (restarts, n) = found.cost / N, found.cut, found.cost.shape
    least = f"least: {cost[found.best, cut]:.1f} bits, {n - cut} components"
    figure, axes = subplots(1, 2, (11, 4))
    for ax, title in zip(axes, ("All merges", "Around the cut")):
        ax.plot(cost.T, color="#7f7f7f", lw=0.7, alpha=0.6)
        ax.plot(cost[found.best], color="#0072b2", lw=1.5, label=f"the best of {restarts} restarts")
        ax.axvline(cut, color="#d55e00", ls="--", lw=1, label=least)
        ax.set(xlabel=f"merges, from {n} groups to one", ylabel="description length, bits a token")
        ax.set_title(f"{title} (α = {alpha:g})")
    low, high = max(0, cut - n // 8), min(n - 1, cut + n // 12)
    near = cost[:, low : high + 1]
    room = 0.05 * np.ptp(near) + 1e-9
    axes[1].set(xlim=(low - 0.5, high + 0.5), ylim=(near.min() - room, near.max() + room))
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=8, loc="upper left")
    save_figure(figure, path)


def plot_coactivation(firing: Firing, label: np.ndarray, components: list[dict], path: Path) -> None:
    """Co-activation of the members of tight components, ordered by their matrix and by their component. label [n]."""
    from matplotlib.patches import Rectangle

    tight = np.array([kind_of(c) not in ("single", "lump") for c in components])
    shown = np.flatnonzero(tight[label]) if tight.any() else np.arange(len(label))
    title = f"The {len(shown)} subcomponents {'of tight components' if tight.any() else '(no component is tight)'}"
    both, label, matrices = coactivation(firing.X[:, shown]), label[shown], [firing.names[i][0] for i in shown]
    jaccard, n = both / (both.diagonal()[:, None] + both.diagonal() - both), len(both)
    figure, axes = subplots(1, 2, (13, 6))
    for ax, order, by in zip(axes, (np.arange(n), np.argsort(label, kind="stable")), ("matrix", "component")):
        image = ax.imshow(jaccard[np.ix_(order, order)], cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
        ax.set(xlabel=f"subcomponent, by {by}", title=f"{title}, by {by}")
    names = list(dict.fromkeys(matrices))
    edges = np.array([*map(matrices.index, names), n])
    axes[0].set_yticks((edges[:-1] + edges[1:] - 1) / 2, names, fontsize=7)
    for edge in edges[1:-1] - 0.5:
        axes[0].axhline(edge, color="#7f7f7f", lw=0.4)
        axes[0].axvline(edge, color="#7f7f7f", lw=0.4)
    sizes = np.bincount(label)
    for start, size in zip(np.cumsum(sizes) - sizes - 0.5, sizes):
        axes[1].add_patch(Rectangle((start, start), size, size, fill=False, ec="#0072b2", lw=0.7))
    figure.colorbar(image, ax=axes, label="tokens where both are on / tokens where either is", fraction=0.03, pad=0.01)
    save_figure(figure, path)


def plot_sizes(components: list[dict], path: Path) -> None:
    """Ranks of the components, whether their members fire together, and how far they reach."""
    figure, (ax_rank, ax_fill, ax_span) = subplots(1, 3, (14, 4))
    rank, frequency, fill, reach = (np.array([c[k] for c in components]) for k in ("rank", "frequency", "fill", "span"))
    for kind, (words, colour) in SPANS.items():
        of, tight = reach == kind, (reach == kind) & (fill >= TIGHT)
        lumps = "" if kind == "single" else f", {of.sum() - tight.sum()} of them lumps"
        bar, inside = f"{words}\n{of.sum()} components{lumps}", rank[tight].sum()
        ax_span.barh(bar, inside, color=colour)
        ax_span.barh(bar, rank[of].sum() - inside, left=inside, color=colour, alpha=0.3)
        if kind != "single":
            ax_fill.scatter(frequency[of], fill[of], s=6 * rank[of], alpha=0.5, color=colour, lw=0)
    ranks, colours = [rank[reach == kind] for kind in SPANS], [colour for _, colour in SPANS.values()]
    ax_rank.hist(ranks, bins=np.arange(0.5, rank.max() + 1), stacked=True, color=colours)
    ax_rank.set(xlabel="rank: subcomponents in a component", ylabel="components", yscale="log", title="Ranks")
    ax_fill.axhline(TIGHT, color="#7f7f7f", lw=0.8, ls=":")
    ax_fill.set(xscale="log", xlim=(frequency.min() / 2, 2), ylim=(0, 1.02))  # also where there is nothing to draw
    ax_fill.set_xlabel("frequency: share of tokens where it is on")
    ax_fill.set(ylabel="fill: share of them where a member is on", title="Components of rank above 1 (area: rank)")
    ax_span.set(xlabel="subcomponents in such components (pale: in lumps)", title="How far components reach")
    ax_span.invert_yaxis()
    save_figure(figure, path)


def plot_alphas(found: dict[float, list[dict]], path: Path) -> None:
    """Components against alpha, and how far they reach; found: {alpha: components}."""
    figure, (ax, ax_span) = subplots(1, 2, (11, 4))
    alphas, live = list(found), sum(c["rank"] for c in next(iter(found.values())))

    def line(ax, of, keep, **style):  # over alpha: `of` the components to keep
        ax.plot(alphas, [of([c for c in components if keep(c)]) for components in found.values()], marker="o", **style)

    line(ax, len, lambda c: True, color="#000000", label="components")
    line(ax, len, lambda c: c["rank"] > 1, color="#0072b2", label="of rank above 1")
    line(ax, len, lambda c: c["rank"] > 1 and c["fill"] >= TIGHT, color="#d55e00", label="of them tight (fill ≥ 0.5)")
    ax.axhline(live, color="#7f7f7f", lw=1, ls=":", label="live subcomponents")
    share = lambda kept: sum(c["rank"] for c in kept) / live
    for kind, (words, colour) in KINDS.items():
        line(ax_span, share, lambda c: kind_of(c) == kind, color=colour, ls=":" if kind == "lump" else "-", label=words)
    ax.set(ylabel="count", title="Components against α")
    ax_span.set(ylabel="share of the live subcomponents", title="How far their component reaches")
    ax_span.set_ylim(-0.02, 1.5)  # room for the legend
    least = min((alpha for alpha in alphas if alpha > 0), default=1)
    scale = {"value": "log"} if min(alphas) > 0 else {"value": "symlog", "linthresh": least}  # a log axis has no 0
    for a in (ax, ax_span):
        a.set_xlabel("α, bits for each rank of a component that is on")
        a.set_xscale(**scale)
        a.autoscale(axis="x")
        a.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        a.set_xticks([], minor=True)
        a.legend(fontsize=8)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# E. The run


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py
    alpha: str = "10"  # bits for each rank of a component that is on; several, as in 0.1,1,10, make a sweep
    tau: float = 0.01  # a subcomponent fires where g > tau
    gamma: float = 0.2  # the pair of rank J by cost merges with probability ~ exp(-gamma J); inf is greedy
    tokens: int = 65_536  # of validation text, at which firing is counted
    restarts: int = 4  # merge paths, of which the one of least cost counts
    seed: int = 0  # of the text and the merges
    data_dir: str = ""  # where token files are kept; default as in the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        self.alphas()
        if not 0 <= self.tau < 1:
            raise UserError(f"tau={self.tau}: must be in [0, 1), as g is in [0, 1]")
        if not self.gamma > 0:
            raise UserError(f"gamma={self.gamma}: must be above 0; inf is greedy")
        require(self, "above 0", "tokens", "restarts")
        require(self, "0 or above", "seed")

    def alphas(self) -> list[float]:
        try:
            alphas = [float(alpha) for alpha in self.alpha.split(",")]
        except ValueError:
            alphas = [math.nan]
        if not all(0 <= alpha < math.inf for alpha in alphas):
            raise UserError(f"alpha={self.alpha}: must be 0 or above, or several such numbers as in 0.1,1,10")
        return alphas


def main(config: Config) -> None:
    run, corpus = open_run(config.run, config.data_dir, config.device)
    began, figures = time.time(), run.folder / "figures"
    firing = gather(run, corpus, config.tau, config.tokens, config.seed)
    X, (N, n), C = firing.X, firing.X.shape, sum(run.decomposition.C.values())
    fired = f"{n} of {C} subcomponents at one of {N:,} tokens, {X.nnz / N:.2f} at a token"
    print(f"firing (g > {config.tau}): {fired}; {time.time() - began:.0f} s")

    results = {}
    for alpha in config.alphas():
        began = time.time()
        found = cluster(X, alpha, config.gamma, config.seed, config.restarts)
        seconds = time.time() - began
        results[alpha] = components = components_of(X, firing.names, found.label)
        bits = f"{found.cost[0, 0] / N:.1f} bits a token apart, {found.cost.min() / N:.1f} clustered"
        print(f"alpha {alpha:g}: {summary(components)}; {bits}; {seconds:.1f} s")
    if len(results) > 1:
        plot_alphas(results, figures / "alphas.png")
        print(f"written: {figures}/alphas.png")
        return

    settings = {name: getattr(config, name) for name in ("tau", "gamma", "tokens", "restarts", "seed")}
    report = {"command": command(), "run_mark": run.mark, "alpha": alpha} | settings
    report |= {"live": n, "seconds": seconds, "merges": found.cut}
    report |= {"cost": found.cost.min(), "cost_of_restarts": found.cost.min(1).tolist()}
    report |= {"cost_curve": found.cost[found.best].tolist(), "components": components}
    write_text(run.folder / "clusters.json", json.dumps(report) + "\n")
    rng, on, decode = np.random.default_rng(config.seed), grouped(X, found.label).tocsc(), corpus.encoding.decode
    texts = [describe(i, c, on[:, [i]].toarray()[:, 0], firing.tokens, decode, rng) for i, c in enumerate(components)]
    write_text(run.folder / "clusters.txt", "\n\n".join(texts) + "\n")
    print("\n".join(texts[:3]))
    plot_cost(found, N, alpha, figures / "clusters.png")
    plot_coactivation(firing, found.label, components, figures / "coactivation.png")
    plot_sizes(components, figures / "sizes.png")
    print(f"written: {run.folder}/clusters.json and .txt, {figures}/clusters.png, coactivation.png and sizes.png")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
