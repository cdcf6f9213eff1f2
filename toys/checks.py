"""Is a decomposition the known one? From a trained VPD to a list of checks (what each means: docs/toys.md).

  A. Numbers    plain functions of U, V and causal importances g: how far from the known answer?
  B. Answers    of one matrix what is known and what was found; the whole known decomposition
  C. Features   the checks of a toy whose mechanisms are known, and whether cluster.py groups its subcomponents
  D. Induction  what the circuit loses without some subcomponents, and the checks of that

A probe is an input with exactly one mechanism at work. Fresh inputs come from seeds that training never uses.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import losses
from cluster import cluster
from decompose import VPD
from eval import adversarial_sources, masks
from model import Decomposition
from toys.targets import FeatureToy, Pieces

ON = 0.1  # a subcomponent counts as on where its g is above this
ALPHAS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Check:
    """One row of the table. `expected` is for people; `ok` is None where there is nothing to expect."""

    name: str
    matrix: str
    value: float
    expected: str = ""
    ok: bool | None = None


def within(name: str, matrix: str, value: float, low: float, high: float) -> Check:
    """A Check that passes for low <= value <= high."""
    expected = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    return Check(name, matrix, value, expected, low <= value <= high)


# ---------------------------------------------------------------------------------------------------------------------
# A. Numbers


def column_match(U: Tensor, V: Tensor, W: Tensor) -> tuple[float, float]:
    """MMCS and ML2R of the columns of W [d_out, n]: U [d_out, C], V [n, C].

    MMCS = mean_j max_c cos(U_c V_jc, W_j), signed; ML2R = mean_j |U_c V_jc| / |W_j| at that c. Neither says enough
    alone: in two dimensions 20 random vectors already have an MMCS of 0.98 (and an ML2R of 0.09). U and V are those of
    the live subcomponents: a dead one is often a little better aligned than the one that does the work.
    """
    if not U.shape[1]:
        return 0.0, 0.0
    cos = torch.einsum("oc,jc,oj->jc", U, V.sign(), W) / (U.norm(dim=0) * W.norm(dim=0)[:, None] + 1e-12)
    mmcs, best = cos.max(1)
    lengths = (U.norm(dim=0) * V.abs()).gather(1, best[:, None])[:, 0]
    return mmcs.mean().item(), (lengths / W.norm(dim=0)).mean().item()


def piece_cosines(U: Tensor, V: Tensor, pieces: Pieces) -> Tensor:
    """cos between each of n known rank-one pieces and each subcomponent U_c V_c^T as whole matrices, [n, C]."""
    u, v = pieces
    dots = (u.T @ U) * (v.T @ V)
    return dots / (u.norm(dim=0) * v.norm(dim=0))[:, None] / (U.norm(dim=0) * V.norm(dim=0) + 1e-12)


def matrix_cosine(U: Tensor, V: Tensor, pieces: Pieces) -> float:
    """Mean over the known pieces of the best subcomponent's cosine: unlike MMCS it sees the whole of V."""
    return piece_cosines(U, V, pieces).max(1).values.mean().item()


def permute_identity(g: Tensor) -> Tensor:
    """g [n, C] with its columns permuted to put as much as possible on the diagonal, the rest behind by mass."""
    _, columns = linear_sum_assignment(g.numpy(), maximize=True)
    rest = [c for c in g.sum(0).argsort(descending=True).tolist() if c not in set(columns)]
    return g[:, [*columns, *rest]]


def identity_error(g: Tensor, tol: float = ON) -> int:
    """Permuted-CI error of g [n probes, C] against one subcomponent a probe; 0 is right.

    It counts entries off the diagonal above tol and diagonal entries under 1 - tol, missing ones too.
    """
    g = permute_identity(F.pad(g, (0, max(0, len(g) - g.shape[1]))))
    diagonal = g.diagonal()
    return int((g > tol).sum() - (diagonal > tol).sum() + (diagonal < 1 - tol).sum())


def dense_error(g: Tensor, k: int, tol: float = ON, share: float = 0.5) -> int:
    """Permuted-CI error of g [n probes, C] against k subcomponents that every probe needs; 0 is right.

    It counts, of the k columns with most mass, those that never reach 1 - tol or are above tol on less than `share` of
    the probes, and entries above tol elsewhere. share=0 is the published error: a column may be lit on one probe alone.
    Half is strict behind a ReLU, where a neuron's piece is wanted while that neuron is on, at about half of the probes.
    """
    g = g[:, g.sum(0).argsort(descending=True)]
    first, rest = g[:, :k], g[:, k:]
    lit = (first.amax(0) >= 1 - tol) & ((first > tol).float().mean(0) >= share)
    return int(k - lit.sum() + (rest > tol).sum())


def live(g: Tensor) -> Tensor:
    """Which subcomponents are on at some probe, a row of g [n, C]: bool [C]."""
    return (g > ON).any(0)


def n_shared(g: Tensor) -> int:
    """How many subcomponents serve several mechanisms: are on at more than one probe of g [n, C]."""
    return int(((g > ON).sum(0) > 1).sum())


# ---------------------------------------------------------------------------------------------------------------------
# B. Answers


@torch.no_grad()
def importances(vpd: VPD, x: Tensor) -> Tensor:
    """g [B, (T,) C] on inputs x."""
    return vpd.importances(x)[1]


@dataclass(frozen=True)
class Matrix:
    """A decomposed matrix of a FeatureToy: the known answer and the one that was found."""

    name: str
    W: Tensor
    pieces: Pieces  # known
    n: int  # of them
    dense: bool  # see FeatureToy
    U: Tensor  # found
    V: Tensor
    g: Tensor  # on inputs, [B, C_l]
    g_probes: Tensor  # [probes, C_l]


def matrices(vpd: VPD, x: Tensor) -> list[Matrix]:
    """Every matrix, with its importances on x and on the probes."""
    f, target = vpd.decomposition, vpd.decomposition.target
    pieces, found = target.canonical(), []
    gs = [importances(vpd, inputs).split([*f.C.values()], -1) for inputs in (x, target.probes())]
    for name, *g in zip(f.names, *gs):
        known = pieces[name], pieces[name][0].shape[1], name in target.dense
        found.append(Matrix(name, f.W(name), *known, f.U[name].detach(), f.V[name].detach(), *g))
    return found


def canonical_decomposition(target: FeatureToy, x: Tensor) -> tuple[Decomposition, Tensor]:
    """The known decomposition of a target and its importances on x: 1 where a mechanism is at work, [B, C]."""
    pieces, active = target.canonical(), target.active(x).float()
    decomposition = Decomposition(target, {name: U.shape[1] for name, (U, V) in pieces.items()})
    for name, (U, V) in pieces.items():
        decomposition.U[name].data, decomposition.V[name].data = U.detach().clone(), V.detach().clone()
    wherever = active.amax(-1, keepdim=True)
    g = [wherever.expand(-1, C) if name in target.dense else active for name, C in decomposition.C.items()]
    return decomposition, torch.cat(g, -1)


@torch.no_grad()
def masked_mse(f: Decomposition, x: Tensor, g: Tensor, generator: torch.Generator, mode: str = "stochastic") -> float:
    """MSE of the target's output under masks of eval.py; stochastic: all at random down to their g, Deltas too."""
    return losses.mse(f.target(x), f(x, masks(mode, g, f.L, generator))).item()


def Delta_check(name: str, W: Tensor, U: Tensor, V: Tensor) -> Check:
    return within("|Delta| / |W|", name, ((W - U @ V.T).norm() / W.norm()).item(), 0, 0.02)


# ---------------------------------------------------------------------------------------------------------------------
# C. Features


def feature_checks(vpd: VPD, seed: int, rows: int = 8192) -> list[Check]:
    """The checks of a toy whose mechanisms are known, on `rows` fresh inputs."""
    f, target, generator = vpd.decomposition, vpd.decomposition.target, torch.Generator().manual_seed(seed + 1_000_000)
    x = target.batch(rows, generator)
    checks = [check for matrix in matrices(vpd, x) for check in matrix_checks(matrix, target, x)]

    g = importances(vpd, x)
    known, known_g = canonical_decomposition(target, x)
    canonical, nothing = (masked_mse(known, x, known_g * on, generator) for on in (1, 0))
    high = max(4 * canonical, 0.02 * nothing)  # the canonical circuits of ping_pong lose nothing at all
    stochastic = masked_mse(f, x, g, generator)
    _, adversarial, _ = adversarial_sources(f, [(x, target(x), g)], 20, generator, losses.mse)
    return checks + [
        within("MSE stochastic", "", stochastic, canonical / 3, high),
        Check("MSE stochastic, canonical", "", canonical),
        Check("MSE adversarial, 20 steps", "", adversarial),
        Check("MSE unmasked, without Delta", "", masked_mse(f, x, g, generator, "unmasked")),
    ]


def matrix_checks(matrix: Matrix, target: FeatureToy, x: Tensor) -> list[Check]:
    """Those of one matrix; x: the inputs of its g. U and V are judged where earlier papers do it, and in PingPong."""
    name, n, U, V, g_probes = matrix.name, matrix.n, matrix.U, matrix.V, matrix.g_probes
    l0, active, checks = (matrix.g > ON).sum(-1).float().mean().item(), target.active(x), []
    if name == "linear1":
        mmcs, ml2r = column_match(U[:, live(g_probes)], V[:, live(g_probes)], matrix.W)
        spd, width = (0.99, 0.03) if n < 40 else (1.03 if target.dense else 1.01, 0.05)  # around what SPD published
        checks.append(within("MMCS of columns", name, mmcs, 0.999, 1.001))
        checks.append(within("ML2R of columns", name, ml2r, spd - width, spd + width))
    if name in ("linear1", "circuits"):
        cosine = matrix_cosine(U, V, matrix.pieces)
        checks.append(within("whole-matrix cosine", name, cosine, 0.99 if n < 40 else 0.98, 1.001))
    elif name == "linear2":
        checks.append(Check("whole-matrix cosine", name, matrix_cosine(U, V, matrix.pieces)))
    if matrix.dense:
        checks.append(within("permuted-CI error, dense", name, dense_error(g_probes, n), 0, 0))
        checks.append(Check("permuted-CI, as published", name, dense_error(g_probes, n, share=0)))
        checks.append(Check("L0 on data", name, l0, f"at most {n * active.any(-1).float().mean().item():.3g}"))
    else:
        at_work = active.float().sum(-1).mean().item()  # mechanisms an input
        checks.append(within("permuted-CI error", name, identity_error(g_probes), 0, 0))
        checks.append(Check("permuted-CI error, tol 0.2", name, identity_error(g_probes, 0.2)))
        checks.append(within("serve several", name, n_shared(g_probes), 0, 0))
        checks.append(Check("most that one serves", name, int((g_probes > ON).sum(0).max())))
        # Small values need nothing: TMS's ReLU, for one, cuts off what is under about 0.2.
        checks.append(within("L0 on data", name, l0, 0.6 * at_work, 1.15 * at_work))
    return [*checks, within("live", name, int(live(g_probes).sum()), n, n), Delta_check(name, matrix.W, U, V)]


def known_clusterings(vpd: VPD, seed: int, rows: int = 20_000) -> list[float]:
    """The alphas of ALPHAS at which cluster.py, greedy, groups the live subcomponents as they belong together.

    That is: the pieces of one mechanism in all matrices, the one that its probe calls for, and all pieces of all dense
    matrices, as those are wanted on the same inputs. None where subcomponents are split or shared, or in one matrix.
    """
    x = vpd.decomposition.target.batch(rows, torch.Generator().manual_seed(seed + 3_000_000))
    found = matrices(vpd, x)
    if len(found) == 1 or any(identity_error(of.g_probes) for of in found if not of.dense):
        return []
    probe_of = [torch.full((of.g.shape[1],), -1) if of.dense else of.g_probes.argmax(0) for of in found]  # -1: any
    g, g_probes = torch.cat([of.g for of in found], -1), torch.cat([of.g_probes for of in found], -1)
    kept = live(g_probes) & live(g)  # by chance others fire once in 20,000 inputs
    belongs, X = torch.cat(probe_of)[kept], sp.csr_matrix((g > ON)[:, kept].numpy())
    labels = {alpha: torch.from_numpy(cluster(X, alpha, gamma=float("inf")).label) for alpha in ALPHAS}
    same = belongs[:, None] == belongs
    return [alpha for alpha, label in labels.items() if torch.equal(label[:, None] == label, same)]


# ---------------------------------------------------------------------------------------------------------------------
# D. Induction

# {what: (accuracy, layer 0's attention from the memory to the S before it, layer 1's from the last S to the memory)}
Ablations = dict[str, tuple[float, float, float]]


def induction_ablations(vpd: VPD, seed: int, rows: int = 512) -> Ablations:
    """What is left of the induction circuit without all of a matrix, `without layers.0.q`, or one subcomponent.

    `without layers.0.q:3` is given where it costs at least 0.01 of accuracy. What is not ablated is rounded: masks 1
    where g > 0, else 0, no Delta.
    """
    f, target, generator = vpd.decomposition, vpd.decomposition.target, torch.Generator().manual_seed(seed + 1_000_000)
    x = target.batch(rows, generator)
    g, b, first = importances(vpd, x), torch.arange(rows), target.first(x)
    rounded, patterns = masks("rounded_0.0", g, f.L, generator), []

    @torch.no_grad()
    def measure(m: Tensor | None) -> tuple[float, float, float]:
        patterns.clear()
        right = f(x, m).argmax(-1) == target.memory(x)
        scores = right.float(), patterns[0][b, first + 1, first], patterns[1][b, -1, first + 1]
        return tuple(score.mean().item() for score in scores)

    with ExitStack() as hooks:
        for layer in target.layers:
            hooks.enter_context(layer.pattern.register_forward_hook(lambda _, args, out: patterns.append(out)))
        found = {"target": measure(None), "rounded": measure(rounded)}
        for name, columns in zip(f.names, torch.arange(g.shape[-1]).split([*f.C.values()])):
            found[f"without {name}"] = measure(rounded.index_fill(-1, columns, 0))
            on_somewhere = (rounded[..., columns] > 0).any(0).any(0)
            for c in on_somewhere.nonzero()[:, 0].tolist():
                one = measure(rounded.index_fill(-1, columns[c], 0))
                if one[0] < found["rounded"][0] - 0.01:
                    found[f"without {name}:{c}"] = one
    return found


def induction_checks(vpd: VPD, seed: int, ablations: Ablations, rows: int = 2048) -> list[Check]:
    f = vpd.decomposition
    g = importances(vpd, f.target.batch(rows, torch.Generator().manual_seed(seed + 2_000_000)))
    checks = [within("accuracy", "", ablations["target"][0], 0.99, 1)]
    checks.append(within("accuracy, rounded", "", ablations["rounded"][0], 0.95, 1))
    for name, g in zip(f.names, g.split([*f.C.values()], -1)):
        checks.append(Check("live (mean g > 1e-3)", name, int((g.mean((0, 1)) > 1e-3).sum())))
        checks.append(Check("L0 on data", name, (g > ON).sum(-1).float().mean().item()))
        checks.append(Delta_check(name, f.W(name), f.U[name].detach(), f.V[name].detach()))
    return checks
