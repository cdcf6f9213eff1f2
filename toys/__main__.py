"""Toys with known answers: decompose one, and check that its mechanisms were found (paper: canonical decompositions of the toys
of the APD and SPD papers).

    python -m toys tms_5-2                      # half a minute on 2 CPU cores; every check passes
    python -m toys tms_5-2 --method=spd         # the predecessor: no adversary, no frequency term
    python -m toys ping_pong --beta_freq=0 --beta_imp=3e-3    # without the frequency term, as sparse
    python -m toys resid_mlp1 --help            # a toy's own settings

Trains the target (toys/targets.py), decomposes it with the VPD of decompose.py, prints the checks and writes
out/toy-<name>-<method>-<seed>/ with metrics.json, config.json, checkpoint.pt and toy.png.

  A. Settings
  B. Checks      is this decomposition the known one? Plain functions of U, V and causal importances
  C. Measuring   a trained VPD to a list of checks
  D. Table, figure
  E. The run

Left out: APD, whose published numbers stand beside ours; training on several seeds at once.
"""

import dataclasses
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.sparse as sp
import torch
import tyro
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import losses
from ci_fn import CIMLPs, CISharedMLP, CITransformer, lower_leaky
from cluster import cluster
from decompose import VPD, Method, free_folder, require
from eval import adversarial_sources, save_figure
from model import Decomposition
from run import progress_bar, run_script, save, write_config, written
from toys.targets import TOYS, InductionHead, Pieces, train

# ---------------------------------------------------------------------------------------------------------------------
# A. Settings

# What the toys share; the defaults of Method are those of a language model.
SHARED = dict(
    steps=3000, lr_warmup=0.0, lr_end=0.0, clip=1.0, faith_steps=200, beta_delta=1.0, adv_lr=0.05, p_start=2.0, p_end=1.0,
    ci="shared", hidden=128,
)  # fmt: skip
# TMS 5-2: in two dimensions any two features can share a subcomponent. Pressure of L_frequency, a small batch (its logarithm is then
# steeper), a quick rate and a Gamma that starts on different features for each subcomponent keep them apart; see README.md.
TMS_SMALL = dict(C=50, B=256, lr=1e-2, beta_adv=0.1, beta_imp=1e-4, beta_freq=1e-3, ci_spread=20.0, ci_bias=-1.0)
TMS_LARGE = dict(C=200, B=256, lr=3e-3, beta_adv=0.5, beta_imp=1e-5, beta_freq=2e-4, restarts=3)
# Residual MLPs: a Gamma that sees V_c^T x alone keeps mlp_in's subcomponents apart by itself. The frequency term is off, as it costs a
# dense matrix most; and p does not fall, so that the pieces of a dense one, here and in 40-10-id, pay little where they matter little.
RESID = dict(
    ci="mlp", hidden=16, C=100, B=256, steps=12_000, lr=1e-2, beta_adv=0.2, beta_imp=5e-6, beta_freq=0.0, p_end=2.2,
)  # fmt: skip
VPD_PRESETS = {
    "tms_5-2": TMS_SMALL,
    "tms_5-2-id": TMS_SMALL | dict(lr=2e-2, beta_adv=0.2, restarts=3),
    "tms_40-10": TMS_LARGE,
    "tms_40-10-id": TMS_LARGE | dict(steps=12_000, lr=5e-3, beta_imp=2e-4, beta_freq=5.5e-5, p_end=2.5, restarts=1),
    "resid_mlp1": RESID,
    "resid_mlp2": RESID | dict(steps=6000, beta_imp=2e-5, p_end=2.0),
    "resid_mlp3": RESID | dict(steps=6000, beta_imp=2e-5, p_end=2.0, C=102),
    # It starts with Delta = W and small subcomponents, each important on a few inputs of its own, that grow where they are wanted: the
    # faithfulness warm-up would write into all of them what the circuits have in common.
    "ping_pong": dict(
        C=800,
        B=64,
        steps=5000,
        lr=3e-3,
        faith_steps=0,
        U_scale=0.1,
        leak=1e-3,
        beta_adv=0.5,
        beta_imp=1e-5,
        beta_freq=1e-3,
        hidden=1024,
        ci_spread=100.0,
        ci_bias=-30.0,
    ),
    "induction": dict(
        C=32,
        B=32,
        steps=5000,
        lr=3e-3,
        beta_adv=0.5,
        beta_imp=5e-3,
        beta_freq=5e-4,
        p_end=0.5,
        beta_delta=1e3,
        ci="transformer",
        hidden=64,
    ),
}
# The predecessor with its authors' importance coefficient, p, C and learning rate. It differs from theirs in having one stochastic
# loss, routed through random subsets, and not one over all matrices and one over each alone; in its batch (theirs: 1024 to 4096),
# steps (10,000 to 200,000), a cosine for every toy, and a clipped gradient.
SPD = dict(
    ci_spread=1.0, ci_bias=0.0, B=1024, steps=10_000, beta_adv=0.0, beta_freq=0.0, beta_delta=1.0, faith_steps=200, leak=0.01,
    ci="mlp", hidden=16, U_scale=1.0, restarts=1,
)  # fmt: skip
SPD_PRESETS = {
    "tms_5-2": dict(C=20, lr=1e-3, beta_imp=3e-3, p_start=1.0, p_end=1.0),
    "tms_5-2-id": dict(C=20, lr=1e-3, beta_imp=3e-3, p_start=1.0, p_end=1.0),
    "tms_40-10": dict(C=200, lr=1e-3, beta_imp=1e-4, p_start=2.0, p_end=2.0),
    "tms_40-10-id": dict(C=200, lr=1e-3, beta_imp=1e-4, p_start=2.0, p_end=2.0),
    "resid_mlp1": dict(C=100, lr=2e-3, beta_imp=1e-5, p_start=2.0, p_end=2.0),
    "resid_mlp2": dict(C=400, lr=1e-3, beta_imp=1e-5, p_start=2.0, p_end=2.0),
    "resid_mlp3": dict(C=500, lr=1e-3, beta_imp=5e-6, p_start=2.0, p_end=2.0, hidden=128),
    "ping_pong": dict(C=200, lr=3e-3, beta_imp=3e-3, p_start=1.0, p_end=1.0),  # not theirs
    "induction": dict(C=32, lr=1e-3, beta_imp=1e-2, p_start=1.0, p_end=1.0, B=64),  # theirs is stale
}


@dataclass(frozen=True)
class Config(Method):
    toy: tyro.conf.Positional[str] = (
        "tms_5-2"  # tms_5-2, tms_5-2-id, tms_40-10, tms_40-10-id, resid_mlp1, resid_mlp2, resid_mlp3, ping_pong or induction
    )
    method: Literal["vpd", "spd"] = "vpd"  # spd: no adversary, no frequency term, an MLP for each subcomponent
    C: int = 20  # subcomponents of each matrix
    ci: Literal["shared", "mlp", "transformer"] = (
        "shared"  # Gamma: one MLP over all layers, an MLP for each subcomponent, or as for language
    )
    hidden: int = 128  # width of Gamma's hidden layer or of its residual stream
    restarts: int = 1  # decompositions to make; the one of least loss is kept
    U_scale: float = 1.0  # on the initial U
    ci_spread: float = 1.0  # scale of the shared Gamma's last layer at the start
    ci_bias: float = 0.0  # and its bias
    out: str = ""  # run folder; default out/toy-<toy>-<method>-<seed>, with a number behind it if that is taken

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "above 0", "C", "hidden", "restarts", "U_scale")
        require(self, "0 or above", "ci_spread")
        if not math.isfinite(self.ci_bias):
            raise ValueError(f"ci_bias={self.ci_bias}: must be finite")
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"device={self.device}: toys run on the CPU, where they take minutes")
        if self.ci == "transformer" and self.hidden % 8:
            raise ValueError(f"hidden={self.hidden}: with ci=transformer a multiple of 8")
        if self.toy not in TOYS:
            raise ValueError(f"unknown toy {self.toy!r}: there are {', '.join(TOYS)}")
        for beta in ("beta_adv", "beta_freq"):
            if self.method == "spd" and getattr(self, beta):
                raise ValueError(
                    f"method=spd contradicts {beta}={getattr(self, beta)}: SPD has neither an adversary nor a frequency term"
                )
        if self.ci != "shared" and (self.ci_spread, self.ci_bias) != (1.0, 0.0):
            raise ValueError(
                f"ci={self.ci} contradicts ci_spread={self.ci_spread} or ci_bias={self.ci_bias}: they are for the shared Gamma"
            )
        if self.ci == "transformer" and self.toy != "induction":
            raise ValueError(f"ci=transformer contradicts toy={self.toy}: its inputs have no sequence axis")


def preset(toy: str, method: Literal["vpd", "spd"]) -> Config:
    """The settings that a toy is decomposed with. ValueError for an unknown name."""
    given = VPD_PRESETS.get(toy, {}) | (SPD | SPD_PRESETS.get(toy, {}) if method == "spd" else {})
    return Config(toy=toy, method=method, **(SHARED | given))


# ---------------------------------------------------------------------------------------------------------------------
# B. Checks


def column_match(U: Tensor, V: Tensor, W: Tensor) -> tuple[float, float]:
    """MMCS and ML2R of the columns of W [d_out, n]: U [d_out, C], V [n, C].

    MMCS = mean_j max_c cos(U_c V_jc, W_j), signed; ML2R = mean_j |U_c V_jc| / |W_j| at that c. Neither says enough alone: in
    two dimensions 20 random vectors already have an MMCS of 0.98 (and an ML2R of 0.09). `feature_checks` gives it the live
    subcomponents alone, as in two dimensions a dead one is often a little better aligned than the one that does the work.
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


def identity_error(g: Tensor, tol: float = 0.1) -> int:
    """Permuted-CI error of g [n probes, C] against one subcomponent a probe: entries off the diagonal above tol, plus diagonal
    entries under 1 - tol; a probe without a subcomponent counts too. 0 is right."""
    n = g.shape[0]
    g = permute_identity(torch.nn.functional.pad(g, (0, max(0, n - g.shape[1]))))
    diagonal = g.diagonal()
    return int((g > tol).sum() - (diagonal > tol).sum() + (diagonal < 1 - tol).sum())


def dense_error(g: Tensor, k: int, tol: float = 0.1, share: float = 0.5) -> int:
    """Permuted-CI error of g [n probes, C] against k subcomponents that every probe needs: of the k columns with most mass
    those that never reach 1 - tol or are above tol on less than `share` of the probes, plus entries above tol elsewhere.

    share=0 is the published error, which takes k columns that are lit on one probe each. Half is strict behind a ReLU: there the
    exact answer of a piece a neuron is on where the neuron is, at about half of the probes."""
    g = g[:, g.sum(0).argsort(descending=True)]
    first, rest = g[:, :k], g[:, k:]
    lit = (first.amax(0) >= 1 - tol) & ((first > tol).float().mean(0) >= share)
    return int(k - lit.sum() + (rest > tol).sum())


def n_live(g: Tensor, threshold: float = 0.1) -> int:
    """Subcomponents whose causal importance passes the threshold on some probe of g [n, C]."""
    return int((g > threshold).any(0).sum())


def n_shared(g: Tensor, threshold: float = 0.1) -> int:
    """Subcomponents that serve several mechanisms: important on more than one probe of g [n, C]."""
    return int(((g > threshold).sum(0) > 1).sum())


# ---------------------------------------------------------------------------------------------------------------------
# C. Measuring


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
    if low == high:
        return Check(name, matrix, value, f"{low:.4g}", value == low)
    return Check(name, matrix, value, f"{low:.4g} to {high:.4g}", low <= value <= high)


def stochastic_mse(decomposition: Decomposition, x: Tensor, g: Tensor, generator: torch.Generator) -> float:
    """MSE of the target's output when everything is masked at random down to its importance, Deltas too."""
    r = losses.sample_sources((1, *g.shape[:-1], g.shape[-1] + decomposition.L), generator)
    with torch.no_grad():
        return losses.reconstruction(decomposition, x, decomposition.target(x), g, r, divergence=losses.mse).item()


def canonical_decomposition(target: nn.Module, x: Tensor) -> tuple[Decomposition, Tensor]:
    """The known decomposition of a target and its importances on x: 1 where a mechanism is at work, [B, C]."""
    pieces, active = target.canonical(), target.active(x).float()
    decomposition = Decomposition(target, {name: pieces[name][0].shape[1] for name in pieces})
    for name, (U, V) in pieces.items():
        decomposition.U[name].data, decomposition.V[name].data = U.detach().clone(), V.detach().clone()
    any_active = active.amax(-1, keepdim=True)
    g = [
        active if target.importance[name][0] == "identity" else any_active.expand(-1, C)
        for name, C in decomposition.C.items()
    ]
    return decomposition, torch.cat(g, -1)


def feature_checks(vpd: VPD, seed: int, rows: int = 8192) -> list[Check]:
    """The checks of a toy whose mechanisms are known. Data: `rows` fresh inputs."""
    decomposition, target = vpd.decomposition, vpd.decomposition.target
    generator = torch.Generator(vpd.device).manual_seed(seed + 1_000_000)
    x = target.batch(rows, generator)
    g, g_probes = importances(vpd, x), importances(vpd, target.probes().to(vpd.device))
    pieces = target.canonical()
    checks = []
    for name, g_data, g_probe in zip(
        decomposition.names, by_matrix(decomposition, g), by_matrix(decomposition, g_probes)
    ):
        kind, n = target.importance[name]
        U, V = decomposition.U[name].detach(), decomposition.V[name].detach()
        any_on = target.active(x).any(-1).float().mean().item()
        if kind == "identity":
            if name == "linear1":
                live = (g_probe > 0.1).any(0)
                mmcs, ml2r = column_match(U[:, live], V[:, live], decomposition.W(name))
                checks.append(within("MMCS of columns", name, mmcs, 0.999, 1.001))
                centre, width = (
                    (0.99, 0.03) if n < 40 else (1.03 if "hidden" in target.importance else 1.01, 0.05)
                )  # SPD's, published
                checks.append(within("ML2R of columns", name, ml2r, centre - width, centre + width))
            if name in ("linear1", "circuits"):
                checks.append(
                    within(
                        "whole-matrix cosine", name, matrix_cosine(U, V, pieces[name]), 0.99 if n < 40 else 0.98, 1.001
                    )
                )
            elif name == "linear2":
                checks.append(Check("whole-matrix cosine", name, matrix_cosine(U, V, pieces[name])))
            checks.append(within("permuted-CI error", name, identity_error(g_probe), 0, 0))
            checks.append(Check("permuted-CI error, tol 0.2", name, identity_error(g_probe, 0.2)))
            checks.append(within("serve several", name, n_shared(g_probe), 0, 0))
            on = target.active(x).float().sum(-1).mean().item()
            # Small values need nothing: TMS's ReLU, for one, cuts off what is under about 0.2.
            checks.append(within("L0 on data", name, (g_data > 0.1).sum(-1).float().mean().item(), 0.6 * on, 1.15 * on))
        else:
            checks.append(within("permuted-CI error, dense", name, dense_error(g_probe, n), 0, 0))
            checks.append(Check("permuted-CI, as published", name, dense_error(g_probe, n, share=0)))
            checks.append(
                Check("L0 on data", name, (g_data > 0.1).sum(-1).float().mean().item(), f"at most {n * any_on:.3g}")
            )
        checks.append(within("live", name, n_live(g_probe), n, n))
        relative = (decomposition.Delta(name).norm() / decomposition.W(name).norm()).item()
        checks.append(within("|Delta| / |W|", name, relative, 0, 0.02))
    known, known_g = canonical_decomposition(target, x)
    band, nothing = (stochastic_mse(known, x, known_g * scale, generator) for scale in (1, 0))
    high = max(4 * band, 0.02 * nothing)  # the canonical circuits of ping_pong lose nothing at all
    checks.append(within("MSE stochastic", "", stochastic_mse(decomposition, x, g, generator), band / 3, high))
    checks.append(Check("MSE stochastic, canonical", "", band))
    target_output = target(x)
    r = adversarial_sources(decomposition, x, target_output, g, 20, generator, losses.mse)
    with torch.no_grad():
        adversarial = losses.reconstruction(decomposition, x, target_output, g, r, divergence=losses.mse).item()
        unmasked = losses.mse(
            target_output,
            decomposition(x, torch.cat((torch.ones_like(g), torch.zeros_like(g[:, : decomposition.L])), -1)),
        ).item()
    checks.append(Check("MSE adversarial, 20 steps", "", adversarial))
    checks.append(Check("MSE unmasked, without Delta", "", unmasked))
    return checks


ALPHAS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def known_clusterings(vpd: VPD, seed: int, rows: int = 20_000) -> list[float]:
    """The alphas of ALPHAS at which cluster.py, greedy, groups the live subcomponents as they belong together.

    That is: the pieces of one feature in all matrices (the one that its probe calls for), and all pieces of a dense matrix, or of
    several dense matrices, as they too are wanted on the same inputs. None where subcomponents are split or shared, or in a single matrix.
    """
    decomposition, target = vpd.decomposition, vpd.decomposition.target
    X = importances(vpd, target.batch(rows, torch.Generator(vpd.device).manual_seed(seed + 3_000_000))) > 0.1
    g_probes = importances(vpd, target.probes().to(vpd.device))
    belongs = [
        g.argmax(0) if target.importance[name][0] == "identity" else torch.full((g.shape[1],), -1)
        for name, g in zip(decomposition.names, by_matrix(decomposition, g_probes))
    ]
    wrong = [
        identity_error(g)
        for name, g in zip(decomposition.names, by_matrix(decomposition, g_probes))
        if target.importance[name][0] == "identity"
    ]
    if any(wrong) or decomposition.L == 1:
        return []
    live = (g_probes > 0.1).any(0) & X.any(0)  # what the probes call for: by chance others fire once in 20,000 inputs
    belongs, X = torch.cat(belongs)[live], sp.csr_matrix(X[:, live].numpy())
    known = belongs[:, None] == belongs
    found = []
    for alpha in ALPHAS:
        label = torch.from_numpy(cluster(X, alpha, gamma=float("inf")).label)
        if torch.equal(label[:, None] == label, known):
            found.append(alpha)
    return found


def importances(vpd: VPD, x: Tensor) -> Tensor:
    """g_lower [B, (T,) C] on inputs x; no gradient."""
    with torch.no_grad():
        _, inputs = vpd.decomposition.target_pass(x)
        return lower_leaky(vpd.ci_fn(inputs), vpd.config.leak)


def by_matrix(decomposition: Decomposition, g: Tensor) -> tuple[Tensor, ...]:
    """g [..., C] split into the matrices' own."""
    return g.split([*decomposition.C.values()], dim=-1)


def induction_ablations(vpd: VPD, seed: int, rows: int = 512) -> dict[str, tuple[float, float, float]]:
    """What is left of the induction circuit without some subcomponents: {what: (accuracy, previous, induction)}.

    previous: layer 0's attention from m to the S before it. induction: layer 1's attention from the last S to m. Everything else is
    rounded (masks 1 where g > 0, else 0, no Delta). `without layers.0.q` takes all of a matrix, `without layers.0.q:3` one
    subcomponent, given where it costs at least 0.01 of accuracy.
    """
    decomposition, target = vpd.decomposition, vpd.decomposition.target
    generator = torch.Generator(vpd.device).manual_seed(seed + 1_000_000)
    x = target.batch(rows, generator)
    b, first, m = torch.arange(rows, device=vpd.device), target.first(x), target.memory(x)
    patterns: list[Tensor] = []
    hooks = [
        layer.pattern.register_forward_hook(lambda module, args, out: patterns.append(out)) for layer in target.layers
    ]

    @torch.no_grad()
    def measure(masks: Tensor | None) -> tuple[float, float, float]:
        patterns.clear()
        right = decomposition(x, masks).argmax(-1) == m
        scores = right.float(), patterns[0][b, first + 1, first], patterns[1][b, -1, first + 1]
        return tuple(score.mean().item() for score in scores)

    try:
        g = importances(vpd, x)
        rounded = torch.cat(((g > 0).float(), torch.zeros(*g.shape[:-1], decomposition.L, device=vpd.device)), -1)
        found = {"target": measure(None), "rounded": measure(rounded)}
        start = 0
        for name, C in decomposition.C.items():
            ablated = rounded.clone()
            ablated[..., start : start + C] = 0
            found[f"without {name}"] = measure(ablated)
            for c in torch.nonzero((g[..., start : start + C] > 0).any(0).any(0))[:, 0].tolist():
                ablated = rounded.clone()
                ablated[..., start + c] = 0
                one = measure(ablated)
                if one[0] < found["rounded"][0] - 0.01:
                    found[f"without {name}:{c}"] = one
            start += C
    finally:
        for hook in hooks:
            hook.remove()
    return found


def induction_checks(
    vpd: VPD, seed: int, ablations: dict[str, tuple[float, float, float]], rows: int = 2048
) -> list[Check]:
    decomposition = vpd.decomposition
    x = decomposition.target.batch(rows, torch.Generator(vpd.device).manual_seed(seed + 2_000_000))
    checks = [
        within("accuracy", "", ablations["target"][0], 0.99, 1),
        within("accuracy, rounded", "", ablations["rounded"][0], 0.95, 1),
    ]
    for name, g in zip(decomposition.names, by_matrix(decomposition, importances(vpd, x))):
        checks.append(Check("live (mean g > 1e-3)", name, int((g.mean((0, 1)) > 1e-3).sum())))
        checks.append(Check("L0 on data", name, (g > 0.1).sum(-1).float().mean().item()))
        relative = (decomposition.Delta(name).norm() / decomposition.W(name).norm()).item()
        checks.append(within("|Delta| / |W|", name, relative, 0, 0.02))
    return checks


# ---------------------------------------------------------------------------------------------------------------------
# D. Table, figure

# MMCS and ML2R of linear1 as published, mean and sd over seeds: SPD, APD. APD fails on the identity toys.
PUBLISHED = {
    ("tms_5-2", "MMCS of columns"): ("1.000 ± 0.000", "0.998 ± 0.000"),
    ("tms_5-2", "ML2R of columns"): ("0.993 ± 0.002", "0.893 ± 0.004"),
    ("tms_40-10", "MMCS of columns"): ("1.000 ± 0.000", "0.996 ± 0.003"),
    ("tms_40-10", "ML2R of columns"): ("1.010 ± 0.007", "0.935 ± 0.001"),
    ("tms_5-2-id", "MMCS of columns"): ("1.000 ± 0.000", "fails"),
    ("tms_5-2-id", "ML2R of columns"): ("0.992 ± 0.010", "fails"),
    ("tms_40-10-id", "MMCS of columns"): ("1.000 ± 0.000", "fails"),
    ("tms_40-10-id", "ML2R of columns"): ("1.031 ± 0.001", "fails"),
}


def table(toy: str, checks: list[Check]) -> str:
    """The checks, one a line, beside what was published."""
    lines = [
        f"{'check':<26} {'matrix':<12} {'value':>10}  {'expected':<18} {'':<5} {'SPD, published':<15} APD, published"
    ]
    for c in checks:
        spd, apd = PUBLISHED.get((toy, c.name), ("", ""))
        verdict = "" if c.ok is None else "pass" if c.ok else "FAIL"
        lines.append(
            f"{c.name:<26} {c.matrix:<12} {c.value:>10.4g}  {c.expected:<18} {verdict:<5} {spd:<15} {apd}".rstrip()
        )
    return "\n".join(lines)


def ablation_table(ablations: dict[str, tuple[float, float, float]]) -> str:
    lines = [f"{'':<26} {'accuracy':>10} {'m attends to S before':>22} {'last S attends to m':>20}"]
    return "\n".join(lines + [f"{what:<26} {a:>10.3f} {p:>22.3f} {i:>20.3f}" for what, (a, p, i) in ablations.items()])


def plot(vpd: VPD, path: Path, title: str) -> None:
    """A row for each matrix: what is in W, what was recovered of it, and the causal importances on the probes.

    For one piece a feature: the known pieces beside the best subcomponent of each, both as columns of what they write. For a dense
    matrix: W beside the sum of what is live. A right answer has the same picture twice and a diagonal, or k full columns.
    """
    from matplotlib import pyplot as plt

    decomposition, target = vpd.decomposition, vpd.decomposition.target
    pieces, g_probes = target.canonical(), importances(vpd, target.probes().to(vpd.device))
    figure, axes = plt.subplots(
        decomposition.L, 3, figsize=(11, 2.9 * decomposition.L), layout="constrained", squeeze=False
    )
    for (ax_W, ax_found, ax_g), name, g in zip(axes, decomposition.names, by_matrix(decomposition, g_probes)):
        kind, n = target.importance[name]
        U, V = decomposition.U[name].detach(), decomposition.V[name].detach()
        if kind == "identity":
            u, v = (piece.detach() for piece in pieces[name])
            best = piece_cosines(U, V, (u, v)).argmax(1)
            known, found = u * v.norm(dim=0), U[:, best] * (V[:, best] * v / v.norm(dim=0)).sum(0)
            titles, labels = ("known pieces U_c |V_c|", "the best subcomponent of each"), ("mechanism", "output")
            g = permute_identity(g)
        else:
            live = (g > 0.1).any(0)
            known, found = decomposition.W(name), U[:, live] @ V[:, live].T
            titles, labels = ("W", f"sum of its {int(live.sum())} live subcomponents"), ("input", "output")
            g = g[:, g.sum(0).argsort(descending=True)]
        top = known.abs().max().item()
        for ax, values, what in ((ax_W, known, titles[0]), (ax_found, found, titles[1])):
            image = ax.imshow(values.cpu(), cmap="RdBu", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
            ax.set(title=f"{name}: {what}", xlabel=labels[0], ylabel=labels[1])
            ax.locator_params(integer=True)
        figure.colorbar(image, ax=ax_found)
        image = ax_g.imshow(
            g[:, : n + max(3, n // 4)].cpu(), cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        ax_g.set(title=f"{name}: causal importance g", xlabel="subcomponent, ordered", ylabel="probe: one mechanism on")
        ax_g.locator_params(integer=True)
        figure.colorbar(image, ax=ax_g)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_induction(ablations: dict[str, tuple[float, float, float]], path: Path, title: str) -> None:
    """Accuracy and the two attentions with each whole matrix ablated."""
    from matplotlib import pyplot as plt

    rows = {what.removeprefix("without "): values for what, values in ablations.items() if ":" not in what}
    figure, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    at = np.arange(len(rows))
    for i, (label, colour) in enumerate(
        (
            ("accuracy", "#000000"),
            ("layer 0: m attends to the S before it", "#0072b2"),
            ("layer 1: the last S attends to m", "#d55e00"),
        )
    ):
        ax.bar(at + 0.27 * (i - 1), [values[i] for values in rows.values()], 0.25, label=label, color=colour)
    ax.set_xticks(at, rows, rotation=30)
    ax.set(ylabel="share", xlabel="subcomponents ablated", title=title, ylim=(0, 1.25))
    ax.legend(ncols=3, fontsize=8)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# E. The run


def build(config: Config, target: nn.Module, device: torch.device) -> VPD:
    """A VPD of a toy at its initialisation: the Decomposition, losses and step of decompose.py."""
    torch.manual_seed(config.seed)
    matrices = {name: config.C for name in (target.importance if hasattr(target, "importance") else ["layers.*"])}
    decomposition = Decomposition(target, matrices).to(device)
    for U in decomposition.U.values():
        U.data *= config.U_scale
    d_ins, C = [V.shape[0] for V in decomposition.V.values()], sum(decomposition.C.values())
    if config.ci == "mlp":
        ci_fn = CIMLPs([*decomposition.V.values()], config.hidden)
    elif config.ci == "shared":
        ci_fn = CISharedMLP(d_ins, C, (config.hidden,), config.ci_spread, config.ci_bias)
    else:
        ci_fn = CITransformer(d_ins, C, config.hidden, n_layer=2, n_head=4, d_mlp=4 * config.hidden)
    positions = (config.B, target.T) if isinstance(target, InductionHead) else (config.B,)
    divergence = losses.kl_divergence if isinstance(target, InductionHead) else losses.mse
    return VPD(decomposition, ci_fn.to(device), config, positions, device, divergence)


def decompose(config: Config, target: nn.Module, device: torch.device) -> VPD:
    """The VPD with the least loss, mean over its last tenth of the steps, of `restarts` that see the same data.

    The loss knows nothing of the answer. Subcomponents that serve several mechanisms are local minima of it, above the canonical one.
    """
    best, best_loss, last_tenth = None, float("inf"), min(int(0.9 * config.steps), config.steps - 1)
    for restart in range(config.restarts):
        vpd = build(dataclasses.replace(config, seed=config.seed + 1000 * restart), target, device)
        vpd.warm_up()
        generator = torch.Generator(device).manual_seed(config.seed + 1)
        loss = torch.zeros((), device=device)
        for step in (bar := progress_bar(0, config.steps, f"decompose {restart + 1}/{config.restarts}")):
            row = vpd.train_step(target.batch(config.B, generator))
            if step >= last_tenth:
                loss += row["total"] / (config.steps - last_tenth)
            if step % 100 == 0:
                bar.set_postfix(
                    {name: f"{row[name].item():.2e}" for name in ("total", "stochastic", "l0") if name in row},
                    refresh=False,
                )
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()} at the end: try a smaller lr than {config.lr}")
        print(f"decompose {restart + 1}/{config.restarts}: loss {loss.item():.6f}")
        if loss.item() < best_loss:
            best, best_loss = vpd, loss.item()
    return best


def main(config: Config) -> None:
    torch.set_num_threads(1)  # these matrices are small: a second thread costs more than it gives
    device = torch.device("cpu")
    folder = (
        Path(config.out) if config.out else free_folder(Path(f"out/toy-{config.toy}-{config.method}-{config.seed}"))
    )
    if any((folder / name).exists() for name in ("metrics.json", "checkpoint.pt", "config.json")):
        raise ValueError(f"out={config.out} already holds a run: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config, device)
    began = time.time()
    target = train(TOYS[config.toy], config.seed, device)
    trained = time.time()
    vpd = decompose(config, target, device)
    seconds = {"target": trained - began, "decompose": time.time() - trained}
    title, ablations, alphas = f"{config.toy}, {config.method}, seed {config.seed}", {}, []
    if config.toy == "induction":
        ablations = induction_ablations(vpd, config.seed)
        checks = induction_checks(vpd, config.seed, ablations)
        plot_induction(ablations, folder / "toy.png", title)
        print(ablation_table(ablations))
    else:
        checks = feature_checks(vpd, config.seed)
        plot(vpd, folder / "toy.png", title)
        alphas = known_clusterings(vpd, config.seed)
        print(
            f"cluster.py groups the live subcomponents as they belong together at alpha = {', '.join(f'{alpha:g}' for alpha in alphas) or 'none'}"
        )
    save(
        folder / "checkpoint.pt",
        {"kind": "toy", "config": asdict(config), "target": target.state_dict(), "vpd": vpd.state_dict()},
    )
    with written(folder / "metrics.json") as temporary:
        temporary.write_text(
            json.dumps(
                {"checks": [asdict(c) for c in checks], "ablations": ablations, "alphas": alphas, "seconds": seconds},
                indent=2,
            )
            + "\n"
        )
    print(table(config.toy, checks))
    judged = [c.ok for c in checks if c.ok is not None]
    print(
        f"{sum(judged)} of {len(judged)} checks pass; target {seconds['target']:.0f} s, decomposition {seconds['decompose']:.0f} s; saved in {folder}"
    )


def defaults() -> Config:
    """The preset of the toy and the method that the command line names, so that --help shows it and flags change it."""
    named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    late = [arg for arg in sys.argv[2:] if arg in TOYS]
    if late and not named:
        raise ValueError(f"{late[0]}: the name of the toy comes first")
    spd = "--method=spd" in sys.argv or ("--method", "spd") in zip(sys.argv, sys.argv[1:])
    return preset(sys.argv[1] if named else "tms_5-2", "spd" if spd else "vpd")


if __name__ == "__main__":
    run_script(main, Config, __doc__, defaults)
