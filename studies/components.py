"""What components are worth: are they parts of the model that can be ablated as one, and would another run find them too?

    python -m studies.components out/vpd-stdlib                        # after cluster.py: 5 minutes on one CPU core
    python -m studies.components out/vpd-stdlib --against=out/seed1    # the stability alone, half a minute: another run of the same target

Reads <run>/clusters.json; writes <run>/components.json and <run>/figures/interactions.png, or <run>/stability-<other run>.json.

  A. Evaluation     components as objects of the method: one mask for all members, measured as eval.py measures subcomponents
  B. Interactions   which MLP-up subcomponents share neurons at the same positions (paper, "nonlinear interactions")
  C. Stability      distances between clusterings; mean max cosine similarity (MMCS) of U and V between runs
  D. The run

Left out: a decomposition trained with components as its parts; the CE of components under other thresholds.
"""

import json
import math
import shlex
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

import data
from ci_fn import lower_leaky
from cluster import TIGHT, Firing, cluster, gather, open_run, rank_frequency_fill, validation
from eval import Run, adversarial_sources, masks, save_figure
from losses import kl_divergence, reconstruction
from model import Decomposition
from run import run_script, written
from train_target import build_target, next_token_ce

# ---------------------------------------------------------------------------------------------------------------------
# A. Components as objects of the method


class Components:
    """A run whose parts are K components: what eval.py asks of a Run, and of its decomposition, with K for C.

    label [C]: the component of every subcomponent. A component's importance is the largest of its members': it is
    as important as whatever in it must not be ablated. Its one mask is the mask of all its members.
    """

    def __init__(self, run: Run, label: Tensor) -> None:
        self.run, self.label, self.L, self.decomposition = run, label, run.decomposition.L, self

    def importances(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(x | W) and g [B, T, K] in [0, 1]."""
        target_output, g = self.run.importances(x)
        g_k = g.new_zeros(*g.shape[:-1], int(self.label.max()) + 1)
        return target_output, g_k.scatter_reduce(-1, self.label.expand_as(g), g, "amax")

    def __call__(self, x: Tensor, m: Tensor, routing: Tensor | None = None, frozen: bool = False) -> Tensor:
        """f(x | W'(m)) for masks m [B, T, K + L] of components, then Deltas."""
        return self.run.decomposition(
            x, torch.cat((m[..., : -self.L][..., self.label], m[..., -self.L :]), -1), routing, frozen
        )


class OwnMasks(Components):
    """Subcomponents with the importance of their component and masks of their own: what the sharing of importance alone does."""

    def importances(self, x: Tensor) -> tuple[Tensor, Tensor]:
        target_output, g_k = super().importances(x)
        return target_output, g_k[..., self.label]

    def __call__(self, x: Tensor, m: Tensor, routing: Tensor | None = None, frozen: bool = False) -> Tensor:
        return self.run.decomposition(x, m, routing, frozen)


QUANTITIES = ("ce:stochastic", "ce:ci", "ce:rounded_0.0", "kl:stochastic", "kl:ci", "kl:rounded_0.0")
PGD, STARTS = (20, 80), 3  # steps of the adversary, and its random starts


def evaluate(
    run: Run, corpus: data.Corpus, label: np.ndarray, live: np.ndarray, windows: int, seed: int
) -> dict[str, dict[str, float]]:
    """The numbers of eval.py, on its windows, for subcomponents, components and two controls: {parts: {quantity: value}}.

    label [C] in 0 .. K - 1, live [n] among C. l0: parts with g > 0 a position; carried: subcomponents in them; ce:*, kl:*: nats a
    token; kl:adversarial_n: n steps of sign ascent, a source per part shared by 64 windows, mean over STARTS random starts, and
    sd: their standard deviation. `own masks`: subcomponents with the importances of components and sources of their own;
    `random components`: the labels of the live subcomponents permuted.
    """
    device = next(run.ci_fn.parameters()).device
    permuted = label.copy()
    permuted[live] = np.random.default_rng(seed).permutation(label[live])
    label, permuted, each = (torch.from_numpy(a).to(device) for a in (label, permuted, np.arange(len(label))))
    parts = {
        "subcomponents": (run, each), "own masks": (OwnMasks(run, label), each),
        "components": (Components(run, label), label), "random components": (Components(run, permuted), permuted),
    }  # fmt: skip
    batches = list(validation(run, corpus, windows * run.config["T"], seed))
    bar = tqdm(
        total=len(batches) * len(parts) * STARTS * sum(PGD), desc="evaluate", unit="pass", mininterval=1, leave=False
    )
    numbers = {}
    for name, (part, label_of) in parts.items():
        total: dict[str, float] = {}
        generator = torch.Generator(device).manual_seed(seed)
        for tokens in batches:
            x, labels = tokens[:, :-1], tokens[:, 1:]
            target_output, g = part.importances(x)
            on = (g > 0).float().mean((0, 1))
            row = {"l0": on.sum(), "carried": on[label_of].sum(), "ce:target": next_token_ce(target_output, labels)}
            for mode in ("stochastic", "ci", "rounded_0.0"):
                with torch.no_grad():
                    output = part.decomposition(x, masks(mode, g, run.decomposition.L, generator))
                row |= {f"ce:{mode}": next_token_ce(output, labels), f"kl:{mode}": kl_divergence(target_output, output)}
            for n in PGD:
                kl = []
                for _ in range(STARTS):
                    r = adversarial_sources(part.decomposition, x, target_output, g, n, generator)
                    with torch.no_grad():
                        kl.append(reconstruction(part.decomposition, x, target_output, g, r))
                    bar.update(n)
                row |= {f"kl:adversarial_{n}": torch.stack(kl).mean(), f"sd:adversarial_{n}": torch.stack(kl).std()}
            for quantity, value in row.items():
                total[quantity] = total.get(quantity, 0.0) + value.item() * len(x)
        numbers[name] = {quantity: value / sum(map(len, batches)) for quantity, value in total.items()}
    bar.close()
    return numbers


def evaluation_table(numbers: dict[str, dict[str, float]]) -> str:
    """CE less that of the target and KL, nats a token; L0 in parts a position, and the subcomponents that they carry."""
    ce_target = numbers["subcomponents"]["ce:target"]
    short = [q.replace("stochastic", "stoch").replace("rounded_0.0", "round") for q in QUANTITIES]
    lines = [
        f"{'':18s} {'L0':>7s} {'carried':>8s}"
        + "".join(f"{q:>10s}" for q in short)
        + "".join(f"{f'adversarial_{n}':>18s}" for n in PGD)
    ]
    for what, row in numbers.items():
        values = "".join(f"{row[q] - ce_target * q.startswith('ce'):10.4f}" for q in QUANTITIES)
        adversarial = "".join(f"{row[f'kl:adversarial_{n}']:10.4f} ± {row[f'sd:adversarial_{n}']:.3f}" for n in PGD)
        lines.append(f"{what:18s} {row['l0']:7.2f} {row['carried']:8.2f}{values}{adversarial}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# B. Interactions


@torch.no_grad()
def interactions(
    run: Run, corpus: data.Corpus, name: str, columns: np.ndarray, n_tokens: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """I_{c,c'} of subcomponents `columns` [n] of the matrix `name`, and its baseline; both [n, n] >= 0, ones on the diagonal.

        I_{c,c'} = (sum_i |U_ic| |U_ic'| / sum_i U_ic^2) (sum_bt |g_c a_c| |g_c' a_c'| / sum_bt (g_c a_c)^2),   a = V^T x

    At 1 and above c' reaches the neurons of c, while c is on, with as much as c itself. In the baseline the g_c a_c of each
    subcomponent are shuffled over the positions b, t on their own.
    """
    D, l = run.decomposition, run.decomposition.names.index(name)
    U, V = D.U[name][:, columns].abs().double().cpu(), D.V[name][:, columns]
    activations = []
    for tokens in validation(run, corpus, n_tokens, seed):
        _, inputs = D.target_pass(tokens[:, :-1])
        g = lower_leaky(run.ci_fn(inputs), run.config["leak"]).split(list(D.C.values()), -1)[l][..., columns]
        activations.append((g * (inputs[l] @ V)).abs().flatten(0, 1).cpu())
    ga = torch.cat(activations)  # [B * T, n]
    order = torch.rand(ga.shape, generator=torch.Generator().manual_seed(seed)).argsort(0)

    def I(ga: Tensor) -> np.ndarray:
        neurons, positions = U.T @ U, (ga.T @ ga).double()
        return (neurons / neurons.diagonal()[:, None] * positions / positions.diagonal()[:, None]).numpy()

    return I(ga), I(ga.gather(0, order))


def interaction_shares(
    I: np.ndarray, shuffled: np.ndarray, label: np.ndarray, lump: np.ndarray, rng: np.random.Generator
) -> dict[str, float]:
    """Share of the entries off the diagonal that are >= 1, of I and its baseline [n, n]; label [n]; lump [n] bool: in a lump?

    `inside` a component, `between` two, `shuffled labels`: inside after permuting the labels, mean and standard deviation of 200;
    `shuffled positions`: of the baseline, all pairs. Then the same of the subcomponents that are in no lump: what is on at a
    handful of positions has next to no sum (g_c a_c)^2 to divide by, and interacts with all that is on there. nan: no such pair.
    """

    def shares(I: np.ndarray, shuffled: np.ndarray, label: np.ndarray, suffix: str) -> dict[str, float]:
        off = ~np.eye(len(I), dtype=bool)

        def inside(label: np.ndarray) -> np.ndarray:
            return off & (label[:, None] == label)

        def share(I: np.ndarray, of: np.ndarray) -> float:
            return float((I[of] >= 1).mean()) if of.any() else math.nan

        chance = [share(I, inside(rng.permutation(label))) for _ in range(200)]
        found = {
            "inside": share(I, inside(label)),
            "pairs inside": int(inside(label).sum()),
            "between": share(I, off & ~inside(label)),
        }
        found |= {
            "shuffled labels": float(np.mean(chance)),
            "sd": float(np.std(chance)),
            "shuffled positions": share(shuffled, off),
        }
        return {what + suffix: value for what, value in found.items()}

    kept = np.ix_(~lump, ~lump)
    return shares(I, shuffled, label, "") | shares(I[kept], shuffled[kept], label[~lump], ", no lumps")


def plot_interactions(matrices: dict[str, tuple], path: Path) -> None:
    """matrices: {name: (I [n, n], shuffled [n, n], label [n])}. Heat maps ordered by component, and histograms of the entries off the diagonal."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(matrices), figsize=(6 * len(matrices), 9), squeeze=False, layout="constrained", height_ratios=(3, 2)
    )
    bins = np.linspace(-6, 2, 65)
    for (ax, ax_hist), (name, (I, shuffled, label)) in zip(axes.T, matrices.items()):
        order = np.argsort(label, kind="stable")
        off, inside = ~np.eye(len(I), dtype=bool), label[:, None] == label
        log_I, log_shuffled = (np.log10(np.maximum(a, 1e-12)) for a in (I, shuffled))
        image = ax.imshow(log_I[np.ix_(order, order)], cmap="RdBu_r", vmin=-3, vmax=3, interpolation="nearest")
        start = np.flatnonzero(np.diff(label[order], prepend=-1))
        for a, size in zip(start, np.diff(np.append(start, len(label)))):
            if size > 1:
                ax.add_patch(plt.Rectangle((a - 0.5, a - 0.5), size, size, fill=False, ec="#000000", lw=0.8))
        ax.set(
            title=f"{name}: {(I[off] >= 1).mean():.2%} of pairs at 1 or above",
            xlabel="subcomponent c′, by component",
            ylabel="subcomponent c, by component",
        )
        for values, what, colour in (
            (log_I[off & ~inside], "between components", "#0072b2"),
            (log_I[off & inside], "inside components", "#d55e00"),
        ):
            if len(values):
                ax_hist.hist(
                    values.clip(-6, 2),
                    bins,
                    density=True,
                    histtype="step",
                    color=colour,
                    label=f"{what} ({len(values):,} pairs)",
                )
        ax_hist.hist(
            log_shuffled[off].clip(-6, 2),
            bins,
            density=True,
            histtype="step",
            color="#7f7f7f",
            ls=":",
            label="positions shuffled",
        )
        ax_hist.axvline(0, color="#000000", lw=0.8, ls="--")
        ax_hist.set(
            xlabel="log10 of I (dashed: I = 1; beyond an end: at it)", ylabel="density of pairs c ≠ c′", yscale="log"
        )
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
    """Adjusted Rand index: 1 for equal groupings, 0 in expectation for labels shuffled; 1 if both are all singletons or all one."""
    table = contingency(a, b)
    in_a, in_b = pairs(table.sum(1)), pairs(table.sum(0))
    chance, most = in_a * in_b / max(1, pairs(np.array(len(a)))), (in_a + in_b) / 2
    return 1.0 if most == chance else (pairs(table) - chance) / (most - chance)


def cosines(A: Tensor, B: Tensor) -> np.ndarray:
    """Cosine similarity of the columns of A [d, n] and B [d, n'], [n, n'] in [-1, 1]."""
    return (
        (torch.nn.functional.normalize(A, dim=0).T @ torch.nn.functional.normalize(B, dim=0))
        .detach()
        .double()
        .cpu()
        .numpy()
    )


def match(
    A: Decomposition, B: Decomposition, a: list[tuple[str, int]], b: list[tuple[str, int]]
) -> dict[str, np.ndarray]:
    """Subcomponents `a` of A and `b` of B, lists of (matrix, number), matched one to one within every matrix.

    `pairs` [m, 2]: places in a and b, by the assignment of greatest summed cosine between U_c V_c^T and U_c' V_c'^T; `cosine` [m].
    `U`, `V` [len(a)]: each vector's largest |cosine| with any of b's in its matrix (a subcomponent may flip both signs); their mean is MMCS.
    """
    found, cosine, U, V = [], [], np.zeros(len(a)), np.zeros(len(a))
    for name in A.names:
        i, j = ([place for place, (matrix, _) in enumerate(of) if matrix == name] for of in (a, b))
        if i and j:
            ca, cb = [a[p][1] for p in i], [b[p][1] for p in j]
            cos_U, cos_V = cosines(A.U[name][:, ca], B.U[name][:, cb]), cosines(A.V[name][:, ca], B.V[name][:, cb])
            rows, columns = linear_sum_assignment(-cos_U * cos_V)
            found += [(i[row], j[column]) for row, column in zip(rows, columns)]
            cosine += list((cos_U * cos_V)[rows, columns])
            U[i], V[i] = abs(cos_U).max(1), abs(cos_V).max(1)
    return {"pairs": np.array(found, int).reshape(-1, 2), "cosine": np.array(cosine), "U": U, "V": V}


def distances(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Of two labellings of the same items, any whole numbers [n], with the pairs that each groups; n may be 0."""
    if not len(a):
        return {"items": 0}
    a, b = (np.unique(label, return_inverse=True)[1] for label in (a, b))
    return {
        "items": len(a), "pairs": pairs(np.bincount(a)), "pairs there": pairs(np.bincount(b)),
        "pair distance": pair_distance(a, b), "Hamming": hamming_distance(a, b), "adjusted Rand": adjusted_rand(a, b),
    }  # fmt: skip


def initial(run: Run) -> Decomposition:
    """The decomposition of a run before its first step, made as decompose.py makes it."""
    torch.manual_seed(run.config["seed"])
    return Decomposition(build_target(run.checkpoint["target"]), run.checkpoint["C"])


def stability(run: Run, corpus: data.Corpus, clusters: dict, against: str, config: "Config") -> dict[str, dict]:
    """Clusterings of this run with other random numbers, and of the run `against` with the same: distances, matches, MMCS."""

    def clustered(of: Run, text: int, merges: int) -> tuple[Firing, np.ndarray, np.ndarray]:
        firing = gather(of, corpus, clusters["tau"], clusters["tokens"], text)
        label = cluster(firing.X, clusters["alpha"], clusters["gamma"], merges, clusters["restarts"]).label
        return firing, label, rank_frequency_fill(firing.X, label)[2][label] < TIGHT  # the last: is it in a lump?

    other, _ = open_run(against, config.data_dir, config.device)
    names = run.decomposition.names
    if other.decomposition.C != run.decomposition.C or not all(
        torch.equal(run.decomposition.W(n), other.decomposition.W(n)) for n in names
    ):
        raise ValueError(
            f"against={against}: not a decomposition of the target of {run.folder} into as many subcomponents"
        )
    seed, found = clusters["seed"], {}
    firing, label, lump = clustered(run, seed, seed)
    for what, (of, text) in {
        "other merges": (run, seed),
        "other text and merges": (run, seed + 1),
        "other run": (other, seed),
    }.items():
        firing_2, label_2, lump_2 = clustered(of, text, seed if of is other else seed + 1)
        if of is other:
            matched = match(run.decomposition, other.decomposition, firing.names, firing_2.names)
            start = match(initial(run), initial(other), firing.names, firing_2.names)
            i, j = matched["pairs"].T
        else:
            _, i, j = np.intersect1d(firing.live, firing_2.live, return_indices=True)
        keep = ~lump[i] & ~lump_2[j]
        found |= {
            what: distances(label[i], label_2[j]),
            f"{what}, without lumps": distances(label[i[keep]], label_2[j[keep]]),
        }
    close = keep & (matched["cosine"] >= 0.5)  # i, j and keep are of the other run, the last one
    return found | {
        "other run, without lumps, matched at cosine >= 0.5": distances(label[i[close]], label_2[j[close]]),
        "matched cosine": {what: float(of["cosine"].mean()) for what, of in (("mean", matched), ("initial", start))},
        "mmcs": {
            x + what: float(of[x][~lump].mean())
            for what, of in ((", no lumps", matched), (" initial, no lumps", start))
            for x in "UV"
        }
        | {x + what: float(of[x].mean()) for what, of in (("", matched), (" initial", start)) for x in "UV"},
    }


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
        if self.windows < 1:
            raise ValueError(f"windows={self.windows}: must be at least 1")


def read_clusters(folder: Path, C: dict[str, int]) -> tuple[dict, np.ndarray, np.ndarray]:
    """clusters.json; the component of each of all C subcomponents, [C], dead ones on their own; the live ones, [n].

    FileNotFoundError, or ValueError if it is not whole or of other subcomponents.
    """
    path = folder / "clusters.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: run cluster.py first")
    try:
        clusters = json.loads(path.read_text(encoding="utf-8"))
        first = dict(zip(C, np.cumsum([0, *C.values()])))
        label = np.full(sum(C.values()), -1)
        for i, component in enumerate(clusters["components"]):
            for name, numbers in component["members"].items():
                if max(numbers) >= C[name]:
                    raise ValueError(f"{name} has no subcomponent {max(numbers)}")
                label[first[name] + np.array(numbers)] = i
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not fit this run ({type(error).__name__}: {error}): run cluster.py again"
        ) from error
    live, dead = np.flatnonzero(label >= 0), np.flatnonzero(label < 0)
    label[dead] = len(clusters["components"]) + np.arange(len(dead))
    return clusters, label, live


def save_report(path: Path, report: dict) -> None:
    with written(path) as temporary:
        temporary.write_text(
            json.dumps({"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])} | report, indent=2) + "\n",
            encoding="utf-8",
        )
    print(f"written: {path}")


def main(config: Config) -> None:
    import matplotlib

    matplotlib.use("Agg")
    run, corpus = open_run(config.run, config.data_dir, config.device)
    C = run.decomposition.C
    clusters, label, live = read_clusters(run.folder, C)
    if config.against:
        found = stability(run, corpus, clusters, config.against, config)
        for what, values in found.items():
            print(f"{what}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        save_report(
            run.folder / f"stability-{Path(config.against).resolve().name}.json",
            {"clusters": clusters["command"], "alpha": clusters["alpha"], "stability": found},
        )
        return

    shares_of, drawn, rng = {}, {}, np.random.default_rng(clusters["seed"])
    names = np.repeat(list(C), list(C.values()))
    for name in C:
        here = live[names[live] == name] if fnmatchcase(name, config.up) else []
        if len(here) > 1:
            I, shuffled = interactions(
                run, corpus, name, here - np.flatnonzero(names == name)[0], clusters["tokens"], clusters["seed"]
            )
            drawn[name] = I, shuffled, label[here]
            lump = np.array([clusters["components"][k]["fill"] < TIGHT for k in label[here]])
            shares = interaction_shares(I, shuffled, label[here], lump, rng)
            shares_of[name] = {what: None if math.isnan(value) else value for what, value in shares.items()}
            print(
                f"interactions of {name}, share at 1 or above: "
                + "; ".join(f"{what} {value:.4g}" for what, value in shares.items())
            )
    if drawn:
        plot_interactions(drawn, run.folder / "figures" / "interactions.png")
    numbers = evaluate(run, corpus, label, live, config.windows, 0)
    print(evaluation_table(numbers))
    save_report(
        run.folder / "components.json",
        {"clusters": clusters["command"], "alpha": clusters["alpha"], "evaluation": numbers, "interactions": shares_of},
    )


if __name__ == "__main__":
    run_script(main, Config, __doc__)
