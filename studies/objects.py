"""Single objects of several methods side by side: subcomponents of a run's MLPs, or latents of its dictionaries.

  A. Objects       those that are live: their vectors, where they fire
  B. Overlap       splitting and agreement across seeds, in three spaces, beside random directions
  C. Legibility    intruders by a fixed rule, entropies, and material for a blind reader

studies/dictionaries.py asks it. Left out: a language model as the reader.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from eval import ALIVE, Run
from flags import UserError
from studies.dictionary import PLT, clean_outputs, mlps_of, target_pass

SAMPLES = 32  # firings of an object that are looked at; with fewer it is left out
BAND = (0.002, 0.02)  # share of positions at which an object fires, where methods are compared
TRIALS, EXAMPLES, BAG = 10, 4, 8  # intruder test: trials an object, own examples in one, tokens of context before
READ, SHOWN, BEFORE, AFTER = 30, 8, 20, 5  # reading material: objects, examples of each, tokens around
SPACES = ("output", "input", "rank-one")

# ---------------------------------------------------------------------------------------------------------------------
# A. Objects


def mlp_columns(run: Run) -> list[tuple[int, int]]:
    """Places of each MLP's up and down among the run's matrices. UserError if it does not decompose them all."""
    named, places = dict(run.decomposition.target.named_modules()), []
    of_mlps = {id(mlp): name for name, mlp in named.items()}
    for mlp in mlps_of(run.decomposition.target):
        names = [f"{of_mlps[id(mlp)]}.{matrix}" for matrix in ("up", "down")]
        missing = [name for name in names if name not in run.decomposition.names]
        if missing:
            raise UserError(f"{run.folder} does not decompose {missing[0]}: its MLPs cannot be compared")
        places.append(tuple(run.decomposition.names.index(name) for name in names))
    return places


@dataclass
class Objects:
    """The live objects of one method. A *module* is an MLP's dictionary, or one matrix.

    vectors {space: for each module its factors, each [objects, d]}: a cosine is the product of its factors'. gauge: the
    sign of a single factor is a free choice, as U_c V_c^T = (-U_c)(-V_c)^T. fires [N, objects]: at which positions.
    """

    vectors: dict[str, list[list[Tensor]]]
    gauge: bool
    fires: sp.csc_matrix
    names: list[str]


@torch.no_grad()
def firings(of: Callable[[Tensor], Tensor], windows: Tensor, B: int = 32) -> tuple[sp.csc_matrix, np.ndarray]:
    """Where of(x) [B, T, n] is above 0, without the last position of each window, [N, n]; and its mean, [n]."""
    fires, total = [], 0.0
    for x in windows.split(B):
        values = of(x)[:, :-1].flatten(0, 1)
        fires.append(sp.csr_matrix((values > 0).cpu().numpy()))
        total = total + values.double().sum(0)
    fires = sp.vstack(fires, format="csc")
    return fires, (total / fires.shape[0]).cpu().numpy()


def dictionary_objects(run: Run, dictionary: PLT, windows: Tensor) -> Objects:
    """Latents that fire at least once."""

    def codes(x: Tensor) -> Tensor:
        _, xs, ys = target_pass(run.decomposition.target, x)
        return torch.cat(clean_outputs(dictionary, ys if dictionary.reads == "y" else xs)[1], -1)

    fires, _ = firings(codes, windows)
    live = torch.from_numpy(np.diff(fires.indptr) > 0)
    of_layers = live.view(dictionary.n, -1)
    reads = [dictionary.W_enc[l].T[of_layers[l]] for l in range(dictionary.n)]
    writes = [dictionary.own_decoder(l)[of_layers[l]] for l in range(dictionary.n)]
    vectors = {
        "output": [[w] for w in writes],
        "input": [[r] for r in reads],
        "rank-one": [list(p) for p in zip(reads, writes)],
    }
    names = [f"{l}:{c}" for l, c in of_layers.nonzero().tolist()]
    return Objects(vectors, False, fires[:, live.numpy()], names)


def vpd_objects(run: Run, windows: Tensor) -> Objects:
    """Subcomponents of the MLPs' matrices with a mean g above ALIVE. output: U of down; input: V of up; rank-one: both
    vectors, of either matrix.
    """
    decomposition = run.decomposition
    pairs, sizes = mlp_columns(run), [*decomposition.C.values()]
    matrices = [l for pair in pairs for l in pair]
    fires, mean_g = firings(
        lambda x: torch.cat([run.importances(x)[1].split(sizes, -1)[l] for l in matrices], -1), windows
    )
    live = torch.from_numpy(mean_g > ALIVE)
    of_matrices = dict(zip(matrices, live.split([sizes[l] for l in matrices])))
    names = decomposition.names
    V = {l: decomposition.V[names[l]].detach().T[alive] for l, alive in of_matrices.items()}
    U = {l: decomposition.U[names[l]].detach().T[alive] for l, alive in of_matrices.items()}
    vectors = {"output": [[U[down]] for _, down in pairs], "input": [[V[up]] for up, _ in pairs]}
    vectors["rank-one"] = [[V[l], U[l]] for l in matrices]
    labels = [
        f"{names[l].removeprefix('blocks.')}:{c}" for l in matrices for c in of_matrices[l].nonzero()[:, 0].tolist()
    ]
    return Objects(vectors, True, fires[:, live.numpy()], labels)


# ---------------------------------------------------------------------------------------------------------------------
# B. Overlap


def cosines(A: list[Tensor], B: list[Tensor], unsigned: bool = False) -> Tensor:
    """[a, b]: the product over factors of their cosines; unsigned: its absolute value."""
    product = torch.ones(())
    for a, b in zip(A, B):
        product = product * (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T)
    return product.abs() if unsigned else product


def splitting(cos: Tensor, same: bool) -> float:
    """Share of the rows with more than one column of cosine above 0.5; same: A is B, and an object is not its own."""
    matches = (cos > 0.5).sum(-1) - ((cos.diagonal() > 0.5).long() if same else 0)
    return (matches > 1).float().mean().item()


def mmcs(cos: Tensor) -> float:
    """Mean over rows of the largest cosine."""
    return cos.amax(-1).mean().item()


def random_like(factors: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """As many objects of random directions: the null."""
    return [torch.randn(f.shape, generator=generator).to(f) for f in factors]


def compare(A: Objects, B: Objects, equal: int, generator: torch.Generator) -> dict[str, dict[str, float]]:
    """{space: split, mmcs and mmcs_equal of A's objects in B, mean over modules; each with its null}.

    mmcs_equal: in `equal` random objects of each module of B, as the largest of more cosines is larger.
    """
    found, same = {}, A is B
    for space in SPACES:
        rows = []
        for a, b in zip(A.vectors[space], B.vectors[space]):
            if not len(a[0]) or not len(b[0]):
                continue
            unsigned = A.gauge and len(a) == 1
            random_a = random_like(a, generator)
            random = cosines(random_a, random_a if same else random_like(b, generator), unsigned)
            row = []
            for cos in (cosines(a, b, unsigned), random):
                few = torch.randperm(cos.shape[1], generator=generator)[:equal]
                row += [splitting(cos, same), mmcs(cos), mmcs(cos[:, few])]
            rows.append(row)
        names = ("split", "mmcs", "mmcs_equal", "split_null", "mmcs_null", "mmcs_equal_null")
        found[space] = dict(zip(names, np.mean(rows, 0).tolist() if rows else [0.0] * 6))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# C. Legibility


def contexts(windows: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each position of windows [W, T] but the last of each: its token and the next, [N]; the BAG before, -1 where
    there is none, nearest first, [N, BAG].
    """
    x = windows.cpu().numpy()
    padded = np.pad(x, ((0, 0), (BAG, 0)), constant_values=-1)
    T = x.shape[1]
    before = np.stack([padded[:, BAG - i : BAG - i + T] for i in range(1, BAG + 1)], -1)
    return x[:, :-1].ravel(), x[:, 1:].ravel(), before[:, :-1].reshape(-1, BAG)


def similarity(tokens: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The rule of the intruder test: of examples tokens [..., e], before [..., e, BAG] every two, [..., e, e].

    1 for the same token, 1/2 for the same previous token, and the share of either's context that the other's has.
    """
    previous = before[..., 0]
    alike = (tokens[..., :, None] == tokens[..., None, :]) + 0.5 * (previous[..., :, None] == previous[..., None, :])
    known = before >= 0
    shared = (before[..., :, None, :, None] == before[..., None, :, None, :]).any(-1) & known[..., :, None, :]
    share = shared.sum(-1) / np.maximum(1, known.sum(-1))[..., :, None]
    return alike + (share + np.swapaxes(share, -1, -2)) / 2


def intruders(fires: sp.csc_matrix, windows: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Share of TRIALS in which the rule finds the intruder, of each object, nan with fewer than SAMPLES firings.

    A trial: EXAMPLES positions where it fires, and one where it does not but another object does, that fires as often
    within 5 %, or the nearest to that. The rule takes the example with the least similarity to the others. Chance is
    1 / (EXAMPLES + 1).
    """
    tokens, _, before = contexts(windows)
    counts, accuracy = np.diff(fires.indptr), np.full(fires.shape[1], np.nan)
    able = np.flatnonzero(counts >= SAMPLES)
    for c in able if len(able) > 1 else ():
        own, others = fires.indices[fires.indptr[c] : fires.indptr[c + 1]], able[able != c]
        off = np.abs(counts[others] / counts[c] - 1)
        matched, trials = others[off <= max(0.05, off.min())], []
        for _ in range(TRIALS):
            other = rng.choice(matched)
            strange = np.setdiff1d(fires.indices[fires.indptr[other] : fires.indptr[other + 1]], own)
            if len(strange):
                trials.append([*rng.choice(own, EXAMPLES, replace=False), rng.choice(strange)])
        if trials:
            trials = np.array(trials)
            alike = similarity(tokens[trials], before[trials]).sum(-1) + 1e-6 * rng.random(trials.shape)  # ties: by lot
            accuracy[c] = (alike.argmin(-1) == EXAMPLES).mean()
    return accuracy


def entropy(values: np.ndarray) -> float:
    """Of a sample, bits."""
    p = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(p * np.log2(p)).sum())


def interpretability(objects: Objects, windows: Tensor, seed: int) -> dict[str, float]:
    """Means over the objects in BAND: accuracy of the intruder rule, entropy in bits of the current and the next token
    over SAMPLES firings each; how many they are, and their mean density. `_all`: over all with SAMPLES firings.
    """
    rng, (tokens, following, _) = np.random.default_rng(seed), contexts(windows)
    fires, counts = objects.fires, np.diff(objects.fires.indptr)
    found = np.full((fires.shape[1], 3), np.nan)
    found[:, 0] = intruders(fires, windows, rng)
    for c in np.flatnonzero(counts >= SAMPLES):
        at = rng.choice(fires.indices[fires.indptr[c] : fires.indptr[c + 1]], SAMPLES, replace=False)
        found[c, 1:] = entropy(tokens[at]), entropy(following[at])
    density, numbers = counts / fires.shape[0], {}
    for end, inside in (("", (density >= BAND[0]) & (density <= BAND[1])), ("_all", np.ones(len(counts), bool))):
        chosen = inside & np.isfinite(found).all(1)
        means = found[chosen].mean(0).tolist() if chosen.any() else [0.0] * 3
        numbers |= {f"{name}{end}": value for name, value in zip(("intruder", "entropy", "entropy_next"), means)}
        numbers |= {
            f"objects{end}": int(chosen.sum()),
            f"density{end}": float(density[chosen].mean()) if chosen.any() else 0.0,
        }
    return numbers


def reading(methods: dict[str, Objects], windows: Tensor, corpus: data.Corpus, seed: int) -> tuple[str, list[dict]]:
    """READ objects of BAND, as many of each method as can be, in random order: text without their origin, and the key.

    A position where the object fires stands between « and »; line breaks are written ↵.
    """
    rng, T, chosen = np.random.default_rng(seed), windows.shape[1], []
    x, show = windows.cpu().numpy(), lambda ids: corpus.encoding.decode([int(t) for t in ids]).replace("\n", "↵")
    for i, (name, objects) in enumerate(methods.items()):
        density = np.diff(objects.fires.indptr) / objects.fires.shape[0]
        able = np.flatnonzero((density >= BAND[0]) & (density <= BAND[1]) & (np.diff(objects.fires.indptr) >= SHOWN))
        share = READ // len(methods) + (i < READ % len(methods))
        chosen += [(name, c) for c in rng.choice(able, min(share, len(able)), replace=False)]
    lines, key = [], []
    for number, i in enumerate(rng.permutation(len(chosen)), 1):
        name, c = chosen[i]
        objects = methods[name]
        own = objects.fires.indices[objects.fires.indptr[c] : objects.fires.indptr[c + 1]]
        lines.append(f"object {number}")
        for at in rng.choice(own, SHOWN, replace=False):
            b, t = divmod(int(at), T - 1)
            before, after = x[b, max(0, t - BEFORE) : t], x[b, t + 1 : t + 1 + AFTER]
            lines.append(f"    {show(before)}«{show(x[b, t : t + 1])}»{show(after)}")
        lines += ["    says: ", ""]
        key.append({"object": number, "method": name, "name": objects.names[c]})
    return "\n".join(lines) + "\n", key
