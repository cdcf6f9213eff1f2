"""How subcomponents act on each other, on one prompt and over text: edges, total gradients, ablation effects.

  A. Leaf pass    f(x | W), cut open at every subcomponent: a_c = V_c^T x is both what is computed and what goes on
  B. One prompt   three numbers that are never mixed: direct edges, total gradients, ablation effects
  C. Over text    attributions between all live subcomponents

All of it is taken at the unmasked target, where values are the target's own. The target is model.GPT; f(x | W) is its
last hidden state, and an output is a logit less the mean logit, which no softmax sees.

An edge is what is direct: the gradient stops at every other subcomponent, at Delta and at the embedding. So it runs
from what is written into the residual stream (embedding, o, down) to what reads it there (q, k, v, up, the output),
over any number of blocks; and within a block from q, k, v to o and from up to down. No other pair has one.

PAPER: the published graphs let the norm's factor move. RMSNorm is homogeneous of degree 0, so that all contributions to
whatever reads it then cancel, and a share of their sum means nothing. Here the factor is a constant, unless asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model import Decomposition
from studies.harvest import columns_of

# ---------------------------------------------------------------------------------------------------------------------
# A. Leaf pass


@dataclass
class Leaves:
    """One pass over x [B, T]. What is a leaf takes the gradient of whatever comes after it, directly."""

    e: Tensor  # [B, T, d_model]: the embedding, a leaf
    a: list[Tensor]  # L x [B, T, C_l]: V^T x of every matrix, as it follows from earlier leaves
    leaf: list[Tensor]  # L x [B, T, C_l]: the same values, leaves
    delta: list[Tensor]  # L x [B, T, d_out]: Delta x, what the subcomponents leave over; leaves, unless `through`
    hidden: Tensor  # [B, T, d_model]: f(x | W)


class OpenedAtEnds(TorchFunctionMode):
    """Inside, the embedding is a leaf; with `frozen`, the factor of every RMSNorm is a constant."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.frozen, self.e = frozen, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.embedding:
            self.e = out = out.detach().requires_grad_()
        if func is F.rms_norm and self.frozen:
            x, _, weight, eps = rms_norm_arguments(*args, **(kwargs or {}))
            factor = x.detach().square().mean(-1, keepdim=True).add(eps or 0.0).rsqrt()
            return x * factor if weight is None else x * factor * weight
        return out


def rms_norm_arguments(input: Tensor, normalized_shape, weight: Tensor | None = None, eps: float | None = None):
    return input, normalized_shape, weight, eps


def leaf_pass(decomposition: Decomposition, x: Tensor, frozen: bool = True, through: bool = False) -> Leaves:
    """f(x | W) of tokens x [B, T], in which every matrix's output is leaf U^T + Delta x, with exactly the value W x.

    frozen: the factor of every RMSNorm is a constant. through: the gradient also goes through Delta, by which J, the
    direct derivatives between all leaves, gives the whole derivative as (I - J)^-1; otherwise Delta x is a leaf.
    """
    L, (Us, Vs) = decomposition.L, ([M.detach() for M in of.values()] for of in (decomposition.U, decomposition.V))
    a, leaf, delta = ([None] * L for _ in range(3))

    def open_up(l: int, x: Tensor, Wx: Tensor, bias: Tensor | None) -> Tensor:
        a[l] = x @ Vs[l]
        leaf[l] = a[l].detach().requires_grad_()
        rest = Wx - F.linear(a[l], Us[l])
        delta[l] = rest if through else rest.detach().requires_grad_()
        return F.linear(leaf[l], Us[l]) + delta[l]

    with OpenedAtEnds(frozen) as ends:
        hidden = decomposition.answered(x, open_up, search=False)
    return Leaves(ends.e, a, leaf, delta, hidden)


def output_direction(decomposition: Decomposition, y: Tensor) -> Tensor:
    """The direction [..., d_model] whose product with the last hidden state is the logit of y less the mean logit."""
    E = decomposition.target.unembedding.detach()
    return E[y] - E.mean(0)


# ---------------------------------------------------------------------------------------------------------------------
# B. One prompt


def edges(
    decomposition: Decomposition, tokens: Tensor, nodes: Tensor, outputs: Tensor, frozen: bool = True,
    through: bool = False, at_a_time: int = 64, tick: Callable[[int], object] = lambda n: None,
) -> Tensor:  # fmt: skip
    """Direct edges: weight[n, s] = (d a_n / d a_s)* a_s, * the gradient stopped at every other source.

    tokens [T]. nodes int [N, 2]: (t, column among all C) of each subcomponent, a target and a source. outputs int
    [M, 2]: (t, token), targets alone. Targets are the N nodes, then the M outputs. Sources are the N nodes, then T
    embeddings, then L T Deltas, matrix by matrix; of the latter two all dimensions are added up. The result is
    [N + M, N + T + L T]. Not multiplied by any importance.

    The prompt is repeated, one target an entry of the batch: so one backward pass of a sum gives `at_a_time` rows.
    """
    T, N, rows = len(tokens), len(nodes), []
    for start in range(0, N + len(outputs), at_a_time):
        part = torch.cat((nodes, outputs))[start : start + at_a_time]
        p, n = leaf_pass(decomposition, tokens.expand(len(part), T), frozen, through), torch.arange(len(part))
        is_node = n + start < N
        at, of = part[is_node].unbind(-1), part[~is_node].unbind(-1)
        value = torch.cat(p.a, -1)[n[is_node], *at].sum()
        value = value + (p.hidden[n[~is_node], of[0]] * output_direction(decomposition, of[1])).sum()
        sources = [p.e, *p.leaf, *([] if through else p.delta)]
        grads = torch.autograd.grad(value, sources, allow_unused=True, materialize_grads=True)
        times = [grad * source.detach() for grad, source in zip(grads, sources)]
        a, L = torch.cat(times[1 : 1 + decomposition.L], -1), decomposition.L  # [n, T, C]
        deltas = [of_matrix.sum(-1) for of_matrix in times[1 + L :]] or [a.new_zeros(len(part), L * T)]
        rows.append(torch.cat((a[:, *nodes.unbind(-1)], times[0].sum(-1), *deltas), -1).detach())
        tick(len(part))
    return torch.cat(rows)


def total_gradients(decomposition: Decomposition, tokens: Tensor, y: int) -> Tensor:
    """a_c d output / d a_c over all paths, norms and all, [T, C + L]: d output / d m at m = 1, the Deltas' at the end.

    The output is the centred logit of y after the last of the tokens [T]. By first order, ablating c changes it by
    minus this.
    """
    m = ones(decomposition, 1, len(tokens)).requires_grad_()
    output = decomposition(tokens[None], m, frozen=True)[0, -1] @ output_direction(decomposition, torch.as_tensor(y))
    return torch.autograd.grad(output, m)[0][0]


@torch.no_grad()
def ablations(
    decomposition: Decomposition, tokens: Tensor, nodes: Tensor, y: int, at_a_time: int = 64
) -> tuple[Tensor, Tensor]:
    """What one ablation does, nothing else masked: centred logit and probability of y after the last token, [N] each.

    nodes int [N, 2]: (t, column among all C + L).
    """
    logits, ps = [], []
    for part in nodes.split(at_a_time):
        m = ones(decomposition, len(part), len(tokens))
        m[torch.arange(len(part)), *part.unbind(-1)] = 0
        hidden = decomposition(tokens.expand(len(part), -1), m)[:, -1]
        logits.append(hidden @ output_direction(decomposition, torch.tensor(y)))
        ps.append(F.linear(hidden, decomposition.target.unembedding).softmax(-1)[:, y])
    return torch.cat(logits or [torch.zeros(0)]), torch.cat(ps or [torch.zeros(0)])


def ones(decomposition: Decomposition, B: int, T: int) -> Tensor:
    """Masks [B, T, C + L] that mask nothing."""
    E = decomposition.target.unembedding
    return E.new_ones((B, T, sum(decomposition.C.values()) + decomposition.L)).detach()


def influence(weight: Tensor, N: int, of_outputs: Tensor, stage: Tensor) -> Tensor:
    """How much of the outputs goes back to each source, by all paths, as circuit-tracer has it: w sum_k |A|^k, [S].

    weight [N + M, S]: `edges`, of which the first N sources are nodes. |A| is |weight| with every row divided by its
    sum. of_outputs [M]: the weight w of each output. stage [N]: of each node, which grows along every edge.
    """
    A = weight.abs() / weight.abs().sum(-1, keepdim=True).clamp(min=1e-30)
    found = of_outputs.to(A) @ A[N:]
    for s in stage.unique().flip(0):
        here = (stage == s).nonzero()[:, 0]
        found += found[here] @ A[here]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# C. Over text


def dataset_attributions(
    decomposition: Decomposition, batches: list[tuple[Tensor, Tensor]], live: np.ndarray, absolute: bool = True,
    tick: Callable[[int], object] = lambda n: None,
) -> Tensor:  # fmt: skip
    """Attributions over text between the live subcomponents, [n, n]: source, then target.

        A(c' -> c) = sum_{b, t, t'} (d a_c(t) / d a_c'(t'))* a_c'(t') g_c'(t') / (sum g_c' RMS(a_c))

    batches: x [B, T] and g [B, T, C] each. The RMS is over all positions, not only where c is on. absolute: of |a_c| in
    place of a_c, so that a positive value raises |a_c|, whichever sign U_c and V_c happen to have.
    """
    n, columns = len(live), columns_of(live, decomposition.C)
    first = np.cumsum([0, *map(len, columns)])
    A, sum_g, squares, positions = torch.zeros(n, n), torch.zeros(n), torch.zeros(n), 0
    for x, g in batches:
        p = leaf_pass(decomposition, x)
        weight = [leaf.detach() * part for leaf, part in zip(p.leaf, g.split([*decomposition.C.values()], -1))]
        sum_g += g[..., live].sum((0, 1)).cpu()
        positions += x.numel()
        for l in range(decomposition.L):
            for i, c in zip(range(first[l], first[l + 1]), columns[l].tolist()):
                a = p.a[l][..., c]
                squares[i] += a.detach().square().sum().cpu()
                tick(1)
                if l:
                    sign = a.detach().sign() if absolute else torch.ones_like(a)
                    grads = torch.autograd.grad(a, p.leaf[:l], sign, retain_graph=True, allow_unused=True)
                    for k, grad in enumerate(grads):
                        if grad is not None and len(columns[k]):
                            of = columns[k]
                            A[first[k] : first[k + 1], i] += (grad[..., of] * weight[k][..., of]).sum((0, 1)).cpu()
    return A / (sum_g[:, None] * (squares / positions).sqrt()).clamp(min=1e-30)


def strongest(A: Tensor, n: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The n sources of largest |A| of each target, 0 left out: place, -1 where there are no more, and value, [N, n]."""
    value, place = A.T.abs().topk(min(n, len(A)), 1)
    value = torch.where(value > 0, A.T.gather(1, place), 0.0)
    pad = n - place.shape[1]
    place, value = F.pad(place.masked_fill(value == 0, -1), (0, pad), value=-1), F.pad(value, (0, pad))
    return place.numpy(), value.numpy()
