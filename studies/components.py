"""What are components worth: can each be ablated as one part of the model, and would another run find them too?

    python -m studies.components out/vpd-stdlib                       # after cluster.py: 5 minutes on one CPU core
    python -m studies.components out/vpd-stdlib --against=out/seed1   # a minute: another run of the same target

The first prints the numbers of eval.py for components in place of subcomponents, and how many pairs of subcomponents
interact. It writes <run>/components.json and <run>/figures/interactions.png. The second only measures the stability.
It prints how far two clusterings are apart, and writes <run>/stability-<other run>.json. Both read <run>/clusters.json.

  A. Evaluation     components as parts of the model: one mask for all members
  B. Interactions   which MLP-up subcomponents share neurons at the same positions (paper, "nonlinear interactions")
  C. Stability      distances between clusterings; mean max cosine similarity (MMCS) of U and V between runs
  D. The run

Left out: a decomposition trained with components as its parts; the CE of components under other thresholds.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

import data
from cluster import TIGHT, Firing, cluster, gather, rank_frequency_fill, read_clusters
from eval import (
    STARTS,
    Run,
    adversarial_sources,
    masks,
    of_windows,
    open_run,
    save_figure,
    subplots,
    validation_windows,
)
from flags import UserError, require
from model import Decomposition
from run import command, run_script, write_text
from train_target import build_target

# ---------------------------------------------------------------------------------------------------------------------
# A. Components as parts of the model


class Components:
    """f(x | W'(m)) whose parts are K components: what eval.py asks of a decomposition, with K for C.

    label [C] in 0 .. K - 1: the component of every subcomponent. A component is as important as its most important
    member, and its one mask is the mask of all its members.
    """

    def __init__(self, decomposition: Decomposition, label: Tensor) -> None:
        self.decomposition, self.label, self.L = decomposition, label, decomposition.L

    def importances(self, g: Tensor) -> Tensor:
        """g [B, T, C] of subcomponents to g [B, T, K] of components."""
        g_k = g.new_zeros(*g.shape[:-1], int(self.label.max()) + 1)
        return g_k.scatter_reduce(-1, self.label.expand_as(g), g, "amax")

    def __call__(self, x: Tensor, m: Tensor, routing: Tensor | None = None, frozen: bool = False) -> Tensor:
        """m [B, T, K + L]: masks of components, then of Deltas."""
        m = torch.cat((m[..., : -self.L][..., self.label], m[..., -self.L :]), -1)  # [B, T, C + L]
        return self.decomposition(x, m, routing, frozen)


MODES = ("stochastic", "ci", "rounded_0.0")
STEPS = (20, 80)  # of the adversary


def evaluate(run: Run, corpus: data.Corpus, label: np.ndarray, live: np.ndarray, windows: int, seed: int) -> dict:
    """The numbers of eval.py, on its windows, for four kinds of parts: {parts: {quantity: value}}.

    subcomponents; components; own masks: subcomponents with the importances of their components, but masks of their
    own; random components: components with the labels of the live subcomponents permuted.
    label [C] in 0 .. K - 1; live [n]: columns among all C.

    l0: parts with g > 0, a position. carried: subcomponents in them. ce:*, kl:*: nats a token. kl:adversarial_n: after
    n steps, a source per part shared by all windows, mean over STARTS; sd: standard deviation; largest: met on the way.
    """
    permuted = label.copy()
    permuted[live] = np.random.default_rng(seed).permutation(label[live])
    label, permuted, each = (torch.from_numpy(a).to(run.device) for a in (label, permuted, np.arange(len(label))))
    shared, random = Components(run.decomposition, label), Components(run.decomposition, permuted)
    parts = {  # f(x | W'(m)), importances of parts from g, the part of each subcomponent
        "subcomponents": (run.decomposition, lambda g: g, each),
        "own masks": (run.decomposition, lambda g: shared.importances(g)[..., label], each),
        "components": (shared, shared.importances, label),
        "random components": (random, random.importances, permuted),
    }
    batches, labels = of_windows(run, validation_windows(corpus, windows, run.config["T"], seed))
    bar = tqdm(total=len(parts) * STARTS * sum(STEPS), desc="evaluate", unit="pass", mininterval=1, leave=False)
    numbers = {}
    for name, (masked, importances, part_of) in parts.items():
        row: dict[str, float] = defaultdict(float)
        generator = torch.Generator(run.device).manual_seed(seed)
        batches_of_parts = [(x, target_hidden, importances(g)) for x, target_hidden, g in batches]
        for (x, target_hidden, g), y in zip(batches_of_parts, labels):
            on = (g > 0).float().mean((0, 1))
            found = {"l0": on.sum(), "carried": on[part_of].sum(), "ce:target": run.ce(target_hidden, y)}
            for mode in MODES:
                with torch.no_grad():
                    hidden = masked(x, masks(mode, g, run.decomposition.L, generator))
                    found |= {f"ce:{mode}": run.ce(hidden, y), f"kl:{mode}": run.kl(target_hidden, hidden)}
            for quantity, value in found.items():
                row[quantity] += value.item() * len(x) / windows
        for n in STEPS:
            met = []
            for _ in range(STARTS):
                met.append(adversarial_sources(masked, batches_of_parts, n, generator, run.kl)[1:])
                bar.update(n)
            last, largest = np.array(met).T
            row |= {f"kl:adversarial_{n}": last.mean(), f"sd:adversarial_{n}": last.std(ddof=1)}
            row[f"largest:adversarial_{n}"] = largest.max()
        numbers[name] = dict(row)
    bar.close()
    return numbers


def evaluation_table(numbers: dict[str, dict[str, float]]) -> str:
    """CE less that of the target and KL, nats a token; L0 in parts a position, and the subcomponents they carry."""
    short = [mode.replace("stochastic", "stoch").replace("rounded_0.0", "round") for mode in MODES]
    lines = [f"{'':18s} {'L0':>7s} {'carried':>8s}"]
    lines[0] += "".join(f"{f'{kind}:{mode}':>10s}" for kind in ("ce", "kl") for mode in short)
    lines[0] += "".join(f"{f'adversarial_{n}':>18s}" for n in STEPS)
    for what, row in numbers.items():
        values = [row[f"ce:{mode}"] - row["ce:target"] for mode in MODES] + [row[f"kl:{mode}"] for mode in MODES]
        adversarial = "".join(f"{row[f'kl:adversarial_{n}']:10.4f} ± {row[f'sd:adversarial_{n}']:.3f}" for n in STEPS)
        printed = "".join(f"{value:10.4f}" for value in values)
        lines.append(f"{what:18s} {row['l0']:7.2f} {row['carried']:8.2f}{printed}{adversarial}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# B. Interactions


def interactions(
    run: Run, corpus: data.Corpus, name: str, columns: np.ndarray, n_tokens: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """I_{c,c'} of subcomponents `columns` [n] of the matrix `name`, and its baseline: [n, n] >= 0, 1 on the diagonal.

        I_{c,c'} = (sum_i |U_ic| |U_ic'| / sum_i U_ic^2) (sum_bt |g_c a_c| |g_c' a_c'| / sum_bt (g_c a_c)^2), a = V^T x

    At 1 and above c' reaches the neurons of c, while c is on, with as much as c itself. In the baseline the g_c a_c of
    each subcomponent are shuffled over the positions b, t on their own.
    """
    decomposition, T, of_positions = run.decomposition, run.config["T"], []
    l, C_l = decomposition.names.index(name), list(decomposition.C.values())
    U = decomposition.U[name][:, columns].detach().abs().double().cpu()
    V = decomposition.V[name][:, columns].detach()
    for tokens in run.batches(validation_windows(corpus, -(-n_tokens // T), T, seed)):
        _, g, inputs = run.importances(tokens[:, :-1])
        g = g.split(C_l, -1)[l][..., columns]
        of_positions.append((g * (inputs[l] @ V)).abs().flatten(0, 1).cpu())
    ga = torch.cat(of_positions)  # [B * T, n]
    order = torch.rand(ga.shape, generator=torch.Generator().manual_seed(seed)).argsort(0)

    def I(ga: Tensor) -> np.ndarray:
        neurons, positions = U.T @ U, (ga.T @ ga).double()  # [n, n] each
        return (neurons / neurons.diagonal()[:, None] * positions / positions.diagonal()[:, None]).numpy()

    return I(ga), I(ga.gather(0, order))


def interaction_shares(
    I: np.ndarray, shuffled: np.ndarray, label: np.ndarray, lump: np.ndarray, rng: np.random.Generator
) -> dict[str, float]:
    """Share of the pairs c, c' (not c = c') with I >= 1, for I and its baseline `shuffled` [n, n]; nan: no such pair.

    inside: pairs of one component, by label [n]; between: of two. shuffled labels: inside, after permuting the labels,
    mean and sd of 200. shuffled positions: of the baseline, all pairs. Then the same for the subcomponents that are not
    in a lump, by lump [n] bool: what is on at a handful of positions has next to no sum (g_c a_c)^2 to divide by, and
    interacts with all that is on there.
    """
    found = {}
    for suffix, kept in (("", np.arange(len(label))), (", no lumps", np.flatnonzero(~lump))):
        strong, strong_shuffled = (a[np.ix_(kept, kept)] >= 1 for a in (I, shuffled))
        off = ~np.eye(len(kept), dtype=bool)

        def inside(label: np.ndarray) -> np.ndarray:
            return off & (label[:, None] == label)

        def share(strong: np.ndarray, of: np.ndarray) -> float:
            return float(strong[of].mean()) if of.any() else math.nan

        ours = inside(label[kept])
        chance = [share(strong, inside(rng.permutation(label[kept]))) for _ in range(200)]
        values = {"inside": share(strong, ours), "pairs inside": int(ours.sum()), "between": share(strong, off & ~ours)}
        values |= {"shuffled labels": float(np.mean(chance)), "sd": float(np.std(chance))}
        values |= {"shuffled positions": share(strong_shuffled, off)}
        found |= {what + suffix: value for what, value in values.items()}
    return found


def plot_interactions(matrices: dict[str, tuple], path: Path) -> None:
    """Heat maps of log10 I ordered by component, and histograms of its entries off the diagonal.

    matrices: {name: (I [n, n], shuffled [n, n], label [n])}.
    """
    from matplotlib.patches import Rectangle

    size = (6 * len(matrices), 9)
    figure, axes = subplots(2, len(matrices), size, squeeze=False, height_ratios=(3, 2))
    for (ax, ax_hist), (name, (I, shuffled, label)) in zip(axes.T, matrices.items()):
        order = np.argsort(label, kind="stable")
        off, inside = ~np.eye(len(I), dtype=bool), label[:, None] == label
        log_I, log_shuffled = (np.log10(np.maximum(a, 1e-12)) for a in (I, shuffled))
        image = ax.imshow(log_I[np.ix_(order, order)], cmap="RdBu_r", vmin=-3, vmax=3, interpolation="nearest")
        starts = np.flatnonzero(np.diff(label[order], prepend=-1))
        for a, n in zip(starts - 0.5, np.diff(np.append(starts, len(label)))):
            if n > 1:
                ax.add_patch(Rectangle((a, a), n, n, fill=False, ec="#000000", lw=0.8))
        ax.set(xlabel="subcomponent c′, by component", ylabel="subcomponent c, by component")
        ax.set_title(f"{name}: {(I[off] >= 1).mean():.2%} of pairs at 1 or above")
        between, within = log_I[off & ~inside], log_I[off & inside]
        for values, what, style in (
            (between, f"between components ({len(between):,} pairs)", {"color": "#0072b2"}),
            (within, f"inside components ({len(within):,} pairs)", {"color": "#d55e00"}),
            (log_shuffled[off], "positions shuffled", {"color": "#7f7f7f", "ls": ":"}),
        ):
            if len(values):
                bins = np.linspace(-6, 2, 65)
                ax_hist.hist(values.clip(-6, 2), bins, density=True, histtype="step", label=what, **style)
        ax_hist.axvline(0, color="#000000", lw=0.8, ls="--")
        ax_hist.set_xlabel("log10 of I (dashed: I = 1; beyond an end: at it)")
        ax_hist.set(ylabel="density of pairs c ≠ c′", yscale="log")
        ax_hist.legend(fontsize=8)
    figure.colorbar(image, ax=axes[0], label="log10 of the nonlinear interaction I(c, c′)", fraction=0.03)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# C. Stability


def contingency(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Items with label i in a [n] and label j in b [n], whole-number counts [k_a, k_b]."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    return table


def pairs(counts: np.ndarray) -> float:
    """Unordered pairs of items inside groups of these sizes."""
    return float((counts * (counts - 1) / 2).sum())


def pair_distance(a: np.ndarray, b: np.ndarray) -> int:
    """Unordered pairs of items that one labelling groups and the other does not, 0 .. n (n - 1) / 2."""
    table = contingency(a, b)
    return int(pairs(table.sum(1)) + pairs(table.sum(0)) - 2 * pairs(table))


def hamming_distance(a: np.ndarray, b: np.ndarray) -> int:
    """Items to relabel until two labellings are the same up to the names of the groups, 0 .. n - 1."""
    table = contingency(a, b)
    return int(len(a) - table[linear_sum_assignment(-table)].sum())


def adjusted_rand(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted Rand index: 1 for equal groupings, 0 in expectation for shuffled labels.

    Also 1 if both are all singletons or both a single group.
    """
    table = contingency(a, b)
    in_a, in_b = pairs(table.sum(1)), pairs(table.sum(0))
    chance, most = in_a * in_b / max(1, pairs(np.array(len(a)))), (in_a + in_b) / 2
    return 1.0 if most == chance else (pairs(table) - chance) / (most - chance)


def distances(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Of two labellings of the same items, any whole numbers [n], with the pairs that each groups; n may be 0."""
    if not len(a):
        return {"items": 0}
    a, b = (np.unique(label, return_inverse=True)[1] for label in (a, b))
    grouped = {"items": len(a), "pairs": pairs(np.bincount(a)), "pairs there": pairs(np.bincount(b))}
    apart = {"pair distance": pair_distance(a, b), "Hamming": hamming_distance(a, b)}
    return grouped | apart | {"adjusted Rand": adjusted_rand(a, b)}


def cosines(A: Tensor, B: Tensor) -> np.ndarray:
    """Cosine similarity of the columns of A [d, n] and B [d, n'], [n, n'] in [-1, 1]."""
    return (normalize(A, dim=0).T @ normalize(B, dim=0)).detach().double().cpu().numpy()


Names = list[tuple[str, int]]  # of subcomponents: matrix, number in it


def match(A: Decomposition, B: Decomposition, a: Names, b: Names) -> dict[str, np.ndarray]:
    """Subcomponents `a` of A and `b` of B, matched one to one within every matrix.

    pairs [n, 2]: places in a and b, by the assignment of greatest summed cosine between U_c V_c^T and U_c' V_c'^T.
    cosine [n]: theirs. U, V [len(a)]: each vector's largest |cosine| with any of b's in its matrix, as a subcomponent
    may flip both signs; their mean is MMCS.
    """
    matched, cosine, U, V = [], [], np.zeros(len(a)), np.zeros(len(a))
    for name in A.names:
        i, j = (np.flatnonzero([matrix == name for matrix, _ in of]) for of in (a, b))
        if len(i) and len(j):
            ca, cb = [a[place][1] for place in i], [b[place][1] for place in j]
            cos_U, cos_V = cosines(A.U[name][:, ca], B.U[name][:, cb]), cosines(A.V[name][:, ca], B.V[name][:, cb])
            rows, columns = linear_sum_assignment(-cos_U * cos_V)
            matched += zip(i[rows], j[columns])
            cosine += list((cos_U * cos_V)[rows, columns])
            U[i], V[i] = abs(cos_U).max(1), abs(cos_V).max(1)
    return {"pairs": np.array(matched, int).reshape(-1, 2), "cosine": np.array(cosine), "U": U, "V": V}


def initial(run: Run) -> Decomposition:
    """The decomposition of a run before its first step, made as decompose.py makes it."""
    torch.manual_seed(run.config["seed"])
    return Decomposition(build_target(run.checkpoint["target"]), run.checkpoint["C"])


def stability(run: Run, other: Run, corpus: data.Corpus, clusters: dict) -> dict[str, dict]:
    """Clusterings of `run` with other random numbers, and of `other` with the same: distances, matches, MMCS.

    clusters: clusters.json of `run`. UserError if `other` is of another target or has other subcomponents.
    """
    names = run.decomposition.names
    if other.decomposition.C != run.decomposition.C or not all(
        torch.equal(run.decomposition.W(name), other.decomposition.W(name)) for name in names
    ):
        of_run = f"the target of {run.folder} into as many subcomponents"
        raise UserError(f"against={other.folder}: not a decomposition of {of_run}")

    def fire(of: Run, text_seed: int) -> Firing:
        return gather(of, corpus, clusters["tau"], clusters["tokens"], text_seed)

    def clustered(X, merge_seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The component of each subcomponent, and whether it is a lump, [n]."""
        label = cluster(X, clusters["alpha"], clusters["gamma"], merge_seed, clusters["restarts"]).label
        return label, rank_frequency_fill(X, label)[2][label] < TIGHT

    seed, found = clusters["seed"], {}
    ours, theirs = fire(run, seed), fire(other, seed)
    label, lump = clustered(ours.X, seed)
    matched = match(run.decomposition, other.decomposition, ours.names, theirs.names)
    start = match(initial(run), initial(other), ours.names, theirs.names)
    for what, firing, merge_seed in (
        ("other merges", ours, seed + 1), ("other text and merges", fire(run, seed + 1), seed + 1),
        ("other run", theirs, seed),
    ):  # fmt: skip
        label_2, lump_2 = clustered(firing.X, merge_seed)
        if firing is theirs:
            i, j = matched["pairs"].T
        else:
            _, i, j = np.intersect1d(ours.live, firing.live, return_indices=True)
        keep = ~lump[i] & ~lump_2[j]
        found[what] = distances(label[i], label_2[j])
        found[f"{what}, without lumps"] = distances(label[i[keep]], label_2[j[keep]])
    close = keep & (matched["cosine"] >= 0.5)  # i, j and keep are of the other run, the last one
    found["other run, without lumps, matched at cosine >= 0.5"] = distances(label[i[close]], label_2[j[close]])
    found["matched cosine"] = {"mean": float(matched["cosine"].mean()), "initial": float(start["cosine"].mean())}
    found["mmcs"] = {
        f"{vector}{when}{which}": float(of[vector][rows].mean())
        for which, rows in ((", no lumps", ~lump), ("", slice(None)))
        for when, of in (("", matched), (" initial", start))
        for vector in "UV"
    }
    return found


# ---------------------------------------------------------------------------------------------------------------------
# D. The run


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py, clustered by cluster.py
    against: str = ""  # run folder of another decomposition of the same target: only the stability is measured
    windows: int = 64  # validation sequences of the evaluation, the same as those of eval.py
    up: str = "*.up"  # glob pattern: the matrices before a nonlinearity, for the interactions
    data_dir: str = ""  # where token files are kept; default as in the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        require(self, "above 0", "windows")


def main(config: Config) -> None:
    run, corpus = open_run(config.run, config.data_dir, config.device)
    C = run.decomposition.C
    clusters, label, live = read_clusters(run.folder, C, run.mark)
    report = {"command": command(), "run_mark": run.mark}
    report |= {"clusters": clusters["command"], "alpha": clusters["alpha"]}
    if config.against:
        other, _ = open_run(config.against, config.data_dir, config.device)
        report["stability"] = stability(run, other, corpus, clusters)
        for what, values in report["stability"].items():
            print(f"{what}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        path = run.folder / f"stability-{Path(config.against).resolve().name}.json"
    else:
        shares_of, drawn, rng = {}, {}, np.random.default_rng(clusters["seed"])
        matrix = np.repeat(list(C), list(C.values()))  # [C]
        for name in C:
            here = live[matrix[live] == name]
            if not fnmatchcase(name, config.up) or len(here) < 2:
                continue
            columns = here - np.flatnonzero(matrix == name)[0]
            I, shuffled = interactions(run, corpus, name, columns, clusters["tokens"], clusters["seed"])
            drawn[name] = I, shuffled, label[here]
            lump = np.array([clusters["components"][k]["fill"] < TIGHT for k in label[here]])
            shares = interaction_shares(I, shuffled, label[here], lump, rng)
            shares_of[name] = {what: None if math.isnan(value) else value for what, value in shares.items()}
            printed = "; ".join(f"{what} {value:.4g}" for what, value in shares.items())
            print(f"interactions of {name}, share at 1 or above: {printed}")
        if not drawn:
            print(f"interactions: none, as no matrix with two live subcomponents is called {config.up}")
        report["evaluation"] = evaluate(run, corpus, label, live, config.windows, 0)
        report["interactions"] = shares_of
        print(evaluation_table(report["evaluation"]))
        path = run.folder / "components.json"
    write_text(path, json.dumps(report, indent=2) + "\n")
    if not config.against and drawn:
        plot_interactions(drawn, run.folder / "figures" / "interactions.png")
    print(f"written: {path}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
