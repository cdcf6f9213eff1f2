"""The losses of VPD as plain functions, in the order of the paper, and the adversary.

  A. masks        mask, sample_sources, pin_Deltas, sample_routing, sample_layerwise_routing
  B. divergence   kl_divergence, HiddenKL, mse
  C. five losses  reconstruction (stochastic or adversarial), importance_ and frequency_minimality, faithfulness
  D. Adversary    persistent sources that ascend the reconstruction loss (PPGD)

Where gradients flow: U and V learn from faithfulness and both reconstructions; Gamma from both reconstructions through
g_lower and from both minimalities through g_upper; the sources from the adversarial reconstruction alone, upwards.

Shapes are written for sequences, [B, T, ...]; inputs without a sequence axis, [B, ...], work alike.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import distributed
from model import Decomposition, each

EPS = 1e-12  # keeps (g + eps)^p differentiable at g = 0
# The logged losses and the settings that weigh them, in the order of the published sum
BETAS = {"adversarial": "beta_adv", "stochastic": "beta_stoch", "importance": "beta_imp", "frequency": "beta_freq"}
BETAS |= {"faithfulness": "beta_delta"}

# ---------------------------------------------------------------------------------------------------------------------
# A. Masks


def mask(g: Tensor, r: Tensor) -> Tensor:
    """m = g + (1 - g) r in [g, 1]; for the Deltas, whose importance is 0, m = r.

    g [B, T, C] in [0, 1]; r [..., C + L] in [0, 1], broadcasting with g up to the last axis; m [..., C + L].
    """
    C = g.shape[-1]
    r, of_Deltas = r.split((C, r.shape[-1] - C), -1)
    m = torch.lerp(r, torch.ones((), device=r.device, dtype=r.dtype), g.to(r.dtype))  # r + g (1 - r), in one pass
    return torch.cat((m, of_Deltas.expand(*m.shape[:-1], -1)), -1)


def sample_sources(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Sources r ~ U(0, 1), independent everywhere."""
    return torch.rand(shape, generator=generator, device=generator.device)


def pin_Deltas(r: Tensor, L: int) -> Tensor:
    """r [S, B, T, C + L] of a targeted run: the Deltas' are 1 at every other sequence, which is other text.

    There W' = Delta + sum_c U_c m_c V_c^T: what the prompts do not need may stay in Delta, and what they do need must
    not disturb the rest. At the prompts Delta is ablated like the others (Vigouroux and Sharkey, arXiv 2607.13047).
    """
    r[:, 1::2, ..., r.shape[-1] - L :] = 1
    return r


def sample_routing(shape: tuple[int, ...], L: int, generator: torch.Generator) -> Tensor:
    """Uniform-k-subset routing, bool [*shape, L]: per position k ~ U{1..L}, then k of the L matrices are masked."""
    k = torch.randint(1, L + 1, (*shape, 1), generator=generator, device=generator.device)
    order = torch.rand(*shape, L, generator=generator, device=generator.device).argsort(-1)  # a random permutation
    return order < k


def sample_layerwise_routing(shape: tuple[int, ...], L: int, generator: torch.Generator) -> Tensor:
    """SPD's routing, bool [*shape, L]: half of the positions have all matrices masked, the others a random one alone.

    SPD has two losses, D with all matrices masked and the mean over l of D with matrix l masked alone. Under this
    routing twice the reconstruction loss has their sum as its expectation, in one pass and not 1 + L of them.
    """
    every = torch.rand(*shape, 1, generator=generator, device=generator.device) < 0.5
    one = torch.randint(0, L, shape, generator=generator, device=generator.device)
    return every | (torch.arange(L, device=one.device) == one[..., None])


# ---------------------------------------------------------------------------------------------------------------------
# B. Divergence


def kl_divergence(target_logits: Tensor, masked_logits: Tensor) -> Tensor:
    """D = KL(target || masked) over the last axis in nats, mean over all positions; computed in fp32."""
    log_p = target_logits.float().log_softmax(-1)
    log_q = masked_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def logits_of(hidden: Tensor, unembedding: Tensor, bias: Tensor | None = None, softcap: float | None = None) -> Tensor:
    """Logits [..., vocab] of last hidden states [..., d_model]: E h + b, and with a soft cap s tanh((E h + b) / s).

    GPT has neither b nor s; Phi has b, Gemma 2 has s.
    """
    logits = F.linear(hidden, unembedding, bias)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class HiddenKL:
    """kl_divergence from last hidden states [..., d_model] and the frozen unembedding [vocab, d_model]: what runs.

    Takes `chunk` positions at a time and makes the gradient to the masked hidden state on the way, so that logits
    [B, T, vocab] are never held. The target's hidden state gets no gradient.
    """

    def __init__(
        self, unembedding: Tensor, chunk: int = 2048, bias: Tensor | None = None, softcap: float | None = None
    ) -> None:
        self.head, self.chunk = (unembedding, bias, softcap), chunk

    def __call__(self, target_hidden: Tensor, masked_hidden: Tensor) -> Tensor:
        return ChunkedKL.apply(target_hidden.flatten(0, -2), masked_hidden.flatten(0, -2), self.chunk, *self.head)


class ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target_hidden, masked_hidden, chunk: int, unembedding: Tensor, bias, softcap) -> Tensor:
        assert len(target_hidden) == len(masked_hidden), "both have one hidden state a position"
        n, total, grads = len(masked_hidden), torch.zeros((), device=masked_hidden.device), []
        for of_target, of_masked in zip(target_hidden.split(chunk), masked_hidden.split(chunk)):
            log_p = logits_of(of_target, unembedding, bias, softcap).float().log_softmax(-1)  # [chunk, vocab]
            logits = logits_of(of_masked, unembedding, bias, softcap).float()
            log_q = logits.log_softmax(-1)
            probability = log_p.exp()
            total += (probability * (log_p - log_q)).sum()
            grad = log_q.exp() - probability  # d KL / d logits of the masked model
            if softcap:
                grad = grad * (1 - (logits / softcap).square())  # tanh' = 1 - tanh^2
            grads.append(grad.to(of_masked.dtype) @ unembedding.to(of_masked.dtype))
        ctx.save_for_backward(torch.cat(grads) / n)
        return total / n

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, grad * ctx.saved_tensors[0], None, None, None, None


def mse(target_output: Tensor, masked_output: Tensor) -> Tensor:
    """D for regression: squared error, mean over all elements."""
    return F.mse_loss(masked_output, target_output)


# ---------------------------------------------------------------------------------------------------------------------
# C. The five losses


def reconstruction(
    decomposition: Decomposition,
    x: Tensor,
    target_output: Tensor,
    g: Tensor,
    r: Tensor,
    routing: Tensor | None = None,
    divergence: Callable[[Tensor, Tensor], Tensor] = kl_divergence,
    frozen: bool = False,
) -> Tensor:
    """1/S sum_s D(f(x | W), f(x | W'(x, r^(s)))): both reconstruction losses, which differ in r alone.

    L_stochastic-recon: r of `sample_sources`, routing of `sample_routing`. Gradients to U, V and, through g, Gamma.
    L_adversarial-recon: the `Adversary`'s r, which stand in for the maximum over r. Gradients to U, V, Gamma and r: the
    same backward pass serves the descent and the last ascent of a step. With `frozen` and a detached g, to r alone.

    x [B, ...] or a tuple; target_output = f(x | W); g = g_lower [B, T, C]; r [S, B, T, C + L] or broadcastable to it;
    routing bool [S, B, T, L], None masks every matrix. The S samples go through as one batch.

    PAPER: the text masks a random subset of the matrices in both losses; the authors' released configuration masks all
    of them in the adversarial one. Ours does as the latter unless --adv_routing=subset says otherwise.
    """
    S = r.shape[0]
    m = mask(g, r).flatten(0, 1)  # [S * B, T, C + L]
    if S > 1:
        x, target_output = (each(lambda a: a.repeat(S, *[1] * (a.dim() - 1)), a) for a in (x, target_output))
    return divergence(target_output, decomposition(x, m, None if routing is None else routing.flatten(0, 1), frozen))


def power_sums(g: Tensor, p: float | Tensor) -> Tensor:
    """s_c = sum_{b,t} (g + eps)^p, [C], for g = g_upper [B, T, C]: what both minimality terms are made of; in fp32."""
    # exp(p log .) and not pow, whose backward pass would take a second power: 3 times faster, the same to rounding.
    return (p * (g.float() + EPS).log()).exp().flatten(0, -2).sum(0)


def importance_minimality(s: Tensor, n: int) -> Tensor:
    """L_importance-minimality = 1/n sum_{b,t,c} (g + eps)^p = 1/n sum_c s_c, n = B T positions. Gradients to Gamma."""
    return s.sum() / n


def frequency_minimality(s: Tensor, n: int) -> Tensor:
    """L_frequency-minimality = 1/n sum_c s_c log2(1 + s_c), s = `power_sums` of a whole batch of n = B T positions.

    Gradients to Gamma.

    PAPER: the draft writes one datapoint's term, without 1/n. The mean over positions is the published form; the sum
    inside the logarithm stays over the whole batch, so the loss grows with the logarithm of the batch.
    """
    return (s * torch.log2(1 + s)).sum() / n


def faithfulness(decomposition: Decomposition) -> Tensor:
    """L_faithfulness: mean of Delta^2 over all N decomposed weights, in fp32. Gradients to U and V."""
    Deltas = [decomposition.Delta(name) for name in decomposition.names]
    return sum(Delta.float().pow(2).sum() for Delta in Deltas) / sum(Delta.numel() for Delta in Deltas)


# ---------------------------------------------------------------------------------------------------------------------
# D. The adversary

ADAM_EPS = 1e-8


def adam_ascent(
    r: Tensor, grad_r: Tensor, mom1: Tensor, mom2: Tensor, count: Tensor, lr: Tensor, n: float, beta1, beta2
) -> None:
    """One Adam step uphill along grad_r / n, in place, then r is clamped to [0, 1]. count and lr are scalar tensors."""
    count += 1
    grad_r = grad_r / n  # here, as compiled code makes it part of the one pass over r and its moments
    mom1.lerp_(grad_r, 1 - beta1)
    mom2.lerp_(grad_r.square(), 1 - beta2)
    size = lr / (1 - beta1**count)
    r.add_(size * mom1 / ((mom2 / (1 - beta2**count)).sqrt() + ADAM_EPS)).clamp_(0, 1)


class Adversary:
    """Persistent sources r that live across steps and ascend the adversarial loss (PPGD).

    scope `position`: r [S, B, T, C + L], one source per position; `sequence`: r [S, B, 1, C + L], shared by its
    positions; `batch`: r [S, 1, 1, C + L], shared by the whole batch, of all processes.
    fresh: 0, or the size of sign steps from sources that are drawn anew at each step, in place of Adam's on old ones.
    r starts at U(0, 1) and stays in [0, 1] after every ascent.
    """

    def __init__(
        self, positions: tuple[int, ...], n_sources: int, generator: torch.Generator, S: int = 1,
        scope: Literal["position", "sequence", "batch"] = "position", betas: tuple[float, float] = (0.5, 0.99),
        fresh: float = 0.0,
    ) -> None:  # fmt: skip
        own = {"position": len(positions), "sequence": 1, "batch": 0}[scope]  # axes along which r is not shared
        axes = *positions[:own], *(1,) * (len(positions) - own)
        self.generator, self.fresh = generator, fresh
        self.r = sample_sources((S, *axes, n_sources), generator)
        self.mom1, self.mom2 = torch.zeros_like(self.r), torch.zeros_like(self.r)
        self.count = torch.zeros((), device=self.r.device)
        self.betas, self.shared = betas, scope == "batch"
        self.update = adam_ascent  # or its compiled twin
        if self.shared:
            distributed.broadcast_([self.r])

    def begin_step(self) -> None:
        """Fresh sources are drawn; persistent ones stay as they are."""
        if self.fresh:
            self.r.copy_(sample_sources(self.r.shape, self.generator))
            if self.shared:
                distributed.broadcast_([self.r])

    def gradient(self, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """d loss(r) / d r, without a gradient for anything else."""
        r = self.r.detach().requires_grad_()
        return torch.autograd.grad(loss(r), r)[0]

    @torch.no_grad()
    def ascend(self, grad_r: Tensor, lr: Tensor, beta: float = 1.0) -> None:
        """r <- clamp(r + lr * Adam(grad_r / beta), 0, 1), for the gradient of beta times this process's loss.

        lr: a scalar tensor on r's device.
        """
        n = beta if self.shared else beta * distributed.world()  # the gradient of the whole batch's loss
        grad_r = distributed.mean(grad_r) if self.shared else grad_r
        if self.fresh:
            self.r.add_(grad_r.sign(), alpha=self.fresh).clamp_(0, 1)
            return
        self.update(self.r, grad_r, self.mom1, self.mom2, self.count, lr, n, *self.betas)

    def state_dict(self) -> dict[str, Tensor]:
        """In the first process r and its moments are those of the whole batch: to be called by all."""
        of_rows = {"r": self.r, "mom1": self.mom1, "mom2": self.mom2}
        if not self.shared:
            of_rows = {name: torch.cat(distributed.gathered(value), 1) for name, value in of_rows.items()}
        return of_rows | {"count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in ("r", "mom1", "mom2"):
            own, value = getattr(self, name), state[name] if self.shared else distributed.rows(state[name], dim=1)
            if value.shape != own.shape:
                raise ValueError(f"the adversary's {name} has shape {list(value.shape)}, not {list(own.shape)}")
            own.copy_(value)
        self.count.copy_(state["count"])
