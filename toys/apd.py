"""APD, the oldest of the methods, as a baseline (Braun et al. 2025, Attribution-based Parameter Decomposition).

    python -m toys tms_5-2 --method=apd

A *component* P_c has a matrix P_c^l = sum_m U_cm V_cm^T of any rank for each layer l: it spans all matrices, where a
subcomponent of VPD is of one. The components sum to the weights. There is no Gamma: which of them an input needs says a
gradient. And there are no masks in between: a component is whole or gone.

  A. Equations  attributions, batch_top_k, schatten, simplicity; faithfulness is that of losses.py
  B. Training   Config, PRESETS, decompose
  C. Checks     what VPD's toys are asked, of each component's largest singular value

TMS ties W2 to W1^T in training; its components are tied too, for which docs/toys.md has a reason.

The components are the columns (c, m) of a `Decomposition`, with one mask for a c in all matrices and 0 for the Deltas.

Left out: the loss on hidden activations, unit norms, and with them the residual MLPs; attributions at the sum of the
components, which the authors took in TMS 5-2: ours are at the target's weights.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

import flags
import losses
import run
from flags import UserError
from model import Decomposition
from toys import checks
from toys.checks import Check, Matrix
from toys.targets import TOYS, FeatureToy
from train_target import cosine

# ---------------------------------------------------------------------------------------------------------------------
# A. Equations


def of_components(columns: Tensor, C: int) -> Tensor:
    """The last axis, columns (c, m), in two: [..., C, rank]."""
    return columns.unflatten(-1, (C, -1))


def attributions(decomposition: Decomposition, x: Tensor, C: int) -> Tensor:
    """A_c(x) = sqrt(1/d_out sum_o (sum_l <df_o/dW_l, P_c^l>)^2), the first-order effect of P_c on f(x | W); [B, C].

    <df_o/dW_l, U V^T> = (delta_lo . U) (V . x_l), where x_l enters matrix l and delta_lo = df_o/d(W_l x_l) [o, B, d]:
    d_out backward passes and no gradient of a weight's size. Without a gradient.
    """
    inputs, zeros = {}, {}

    def record(l: int, x_l: Tensor, Wx: Tensor, b: Tensor | None) -> Tensor:
        inputs[l], zeros[l] = x_l.detach(), torch.zeros_like(Wx, requires_grad=True)
        return Wx + zeros[l]

    with torch.enable_grad():
        output = decomposition.answered(x, record, search=False)  # [B, d_out]
    L, d_out = range(decomposition.L), output.shape[-1]
    one_hot = torch.eye(d_out)[:, None].expand(-1, len(x), -1)
    deltas = torch.autograd.grad(output, [zeros[l] for l in L], one_hot, is_grads_batched=True)
    with torch.no_grad():
        U, V = [*decomposition.U.values()], [*decomposition.V.values()]
        effects = sum(of_components((deltas[l] @ U[l]) * (inputs[l] @ V[l]), C).sum(-1) for l in L)  # [o, B, C]
        return effects.square().mean(0).sqrt()


def batch_top_k(A: Tensor, k: float) -> Tensor:
    """s [B, C] in {0, 1}: 1 at the round(k B) largest attributions of the whole batch, so k an input in the mean."""
    s = torch.zeros_like(A)
    s.view(-1)[A.flatten().topk(round(k * len(A))).indices] = 1
    return s


def mask(decomposition: Decomposition, s: Tensor) -> Tensor:
    """m [B, all columns + L]: s_c for all m and l of a component, 0 for the Deltas."""
    m = [s.repeat_interleave(n // s.shape[-1], -1) for n in decomposition.C.values()]
    return torch.cat([*m, s.new_zeros(len(s), decomposition.L)], -1)


def schatten(decomposition: Decomposition, C: int, p: float) -> Tensor:
    """sum_l sum_m (|U_cm| |V_cm|)^p, [C]: at least the Schatten norm sum_l |P_c^l|_p^p, and equal where U and V are
    those of a singular value decomposition. So its minimum over all U, V of one P_c is the norm (p <= 1).
    """
    return sum(
        of_components((U.square().sum(0) * V.square().sum(0) + 1e-16) ** (p / 2), C).sum(-1)
        for U, V in zip(decomposition.U.values(), decomposition.V.values())
    )


def simplicity(decomposition: Decomposition, s: Tensor, p: float) -> Tensor:
    """L_simple = 1/N mean_b sum_c s_c |P_c|_p^p, N weights: what the components in use cost, few and of low rank.

    Gradients to U and V, none through s. As in the authors' code it is divided by N, as faithfulness is.
    """
    N = sum(decomposition.W(name).numel() for name in decomposition.names)
    return (s.mean(0) * schatten(decomposition, s.shape[-1], p)).sum() / N


# ---------------------------------------------------------------------------------------------------------------------
# B. Training


@dataclass(frozen=True)
class Config:
    toy: tyro.conf.Positional[str] = "tms_5-2"  # tms_5-2, tms_5-2-id, tms_40-10 or tms_40-10-id
    method: Literal["apd"] = "apd"
    C: int = 5  # components
    tied: bool = True  # P_c^linear2 is the transpose of P_c^linear1, as the weights are
    rank: int = 0  # of a component in each matrix, at most; 0: that of the matrix
    top_k: float = 0.211  # components an input, in the mean over a batch
    beta_delta: float = 1.0  # faithfulness
    beta_recon: float = 1.0  # reconstruction by the components in use
    beta_simple: float = 0.7  # simplicity
    p: float = 1.0  # of the Schatten norm
    steps: int = 10_000
    B: int = 512
    lr: float = 0.03
    lr_warmup: float = 0.05  # share of the steps
    lr_end: float = 1.0  # share of lr that its cosine ends at; 1: constant
    seed: int = 0
    out: str = ""  # run folder; default out/toy-<toy>-apd-<seed>, with a number behind it if that is taken

    def __post_init__(self) -> None:
        flags.require(self, "above 0", "C", "top_k", "p", "steps", "B", "lr")
        flags.require(self, "0 or above", "rank", "beta_delta", "beta_recon", "beta_simple", "seed")
        flags.require(self, "between 0 and 1", "lr_warmup", "lr_end")
        if self.toy not in PRESETS:
            known = "" if self.toy in TOYS else "unknown toy "
            raise UserError(f"method=apd: {known}{self.toy!r} has no settings; there are {', '.join(PRESETS)}")
        if self.top_k > self.C:
            raise UserError(f"top_k={self.top_k}: must be at most C={self.C}")


# As published, but for C in 5-2, which is not stated (docs/toys.md), and for time: a quarter of the batch, half of the
# steps, in 40-10 rank one, as a known piece has. The identity's toys have the settings of those without.
LARGE = dict(C=50, rank=1, top_k=1.0, beta_recon=10.0, beta_simple=20.0, p=0.9, lr=1e-3, lr_end=0.0)
PRESETS = {"tms_5-2": {}, "tms_5-2-id": {}, "tms_40-10": LARGE, "tms_40-10-id": LARGE}


def preset(toy: str) -> Config:
    return Config(toy=toy, **PRESETS.get(toy, {}))


def build(config: Config, target: nn.Module) -> Decomposition:
    torch.manual_seed(config.seed)
    ranks = {name: min(of.weight.shape) for name, of in target.named_modules() if isinstance(of, nn.Linear)}
    f = Decomposition(target, {name: config.C * min(config.rank or rank, rank) for name, rank in ranks.items()})
    if config.tied:  # else a component takes a feature's piece of one matrix and another component that of the other
        f.register_parameter("U:linear2", f.V["linear1"])
        f.register_parameter("V:linear2", f.U["linear1"])
    return f


def decompose(config: Config, target: nn.Module) -> Decomposition:
    """L = beta_delta L_faithfulness + beta_recon D(f(x | W), f(x | sum_c s_c P_c)) + beta_simple L_simple, by Adam."""
    f, generator = build(config, target), torch.Generator().manual_seed(config.seed + 1)
    optimizer = torch.optim.Adam([*dict.fromkeys(f.subcomponents())], lr=config.lr)  # tied ones once
    for step in (bar := run.progress_bar(0, config.steps, "decompose")):
        optimizer.param_groups[0]["lr"] = config.lr * cosine(step, config.steps, config.lr_warmup, config.lr_end)
        x = target.batch(config.B, generator)
        s = batch_top_k(attributions(f, x, config.C), config.top_k)
        recon = losses.mse(target(x), f(x, mask(f, s)))
        delta, simple = losses.faithfulness(f), simplicity(f, s, config.p)
        loss = config.beta_delta * delta + config.beta_recon * recon + config.beta_simple * simple
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == config.steps - 1:
            run.refuse_non_finite({"step": step, "total": loss.item()}, f.subcomponents(), str(config.lr))
            bar.set_postfix({"recon": f"{recon.item():.2e}", "faith": f"{delta.item():.2e}"}, refresh=False)
    return f


# ---------------------------------------------------------------------------------------------------------------------
# C. Checks


@torch.no_grad()
def matrices(config: Config, f: Decomposition, x: Tensor) -> list[Matrix]:
    """Every matrix, each component by its largest singular value's rank-one part, s in place of g.

    On the probes, which need one component each, s has as many as there are probes.
    """
    target, found, C = f.target, [], config.C
    pieces, probes = target.canonical(), target.probes()
    s, s_probes = batch_top_k(attributions(f, x, C), config.top_k), batch_top_k(attributions(f, probes, C), 1.0)
    for name in f.names:
        P = torch.einsum("ocm,icm->coi", of_components(f.U[name], C), of_components(f.V[name], C))
        u, sigma, vh = torch.linalg.svd(P, full_matrices=False)
        known = pieces[name], pieces[name][0].shape[1], name in target.dense
        found.append(Matrix(name, f.W(name), *known, (u[..., 0] * sigma[:, :1]).T, vh[:, 0].T, s, s_probes))
    return found


@torch.no_grad()
def feature_checks(config: Config, f: Decomposition, rows: int = 8192) -> list[Check]:
    """The checks of checks.feature_checks that APD can be asked, on `rows` fresh inputs.

    It has no masks between 0 and 1, so the known answer and its own are compared with all else ablated, Deltas too.
    """
    target, generator = f.target, torch.Generator().manual_seed(config.seed + 1_000_000)
    assert isinstance(target, FeatureToy)
    x, found = target.batch(rows, generator), []
    for matrix in matrices(config, f, x):
        name, W, U, V = matrix.name, matrix.W, f.U[matrix.name], f.V[matrix.name]
        first = (matrix.U.norm(dim=0) * matrix.V.norm(dim=0))[checks.live(matrix.g_probes)]
        P = torch.einsum("ocm,icm->coi", of_components(U, config.C), of_components(V, config.C))
        size = P.flatten(1).norm(dim=1)[checks.live(matrix.g_probes)]
        found += checks.matrix_checks(matrix, target, x)[:-1] + [checks.Delta_check(name, W, U, V)]
        found.append(Check("rank one: share of |P_c|^2", name, (first.square().sum() / size.square().sum()).item()))
    known, known_s = checks.canonical_decomposition(target, x)
    canonical, nothing = (checks.masked_mse(known, x, known_s * on, generator, "rounded_0.0") for on in (1, 0))
    s = batch_top_k(attributions(f, x, config.C), config.top_k)
    top_k = losses.mse(target(x), f(x, mask(f, s))).item()
    return found + [
        checks.within("MSE top-k", "", top_k, canonical / 3, max(4 * canonical, 0.02 * nothing)),
        Check("MSE top-k, canonical", "", canonical),
        Check("MSE with all components", "", losses.mse(target(x), f(x, mask(f, torch.ones_like(s)))).item()),
    ]
