"""Which subcomponents does this one prediction need? Causal importances fitted to a prompt, and what tests them.

  A. Loss        of one token after a prompt
  B. Post hoc    causal importances that start at Gamma's and descend, under one of three kinds of masks
  C. Judges      the probability of the token under masks of importances, random masks and an adversary's
  D. Baselines   other sets of as many subcomponents

A row is one prompt under one coefficient: all rows go through as one batch, and random numbers are the same for each,
so a row's numbers do not depend on which others there are. Prompts end where the prediction is made: Gamma is
bidirectional, so that of a longer text it would have seen the label.

PAPER: the released code sets what is not alive to 0, and leaves Delta out. The text draws both at random, as here.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ci_fn import lower_leaky, upper_leaky
from losses import mask, sample_sources
from model import Decomposition

Variant = Literal["adversarial", "stochastic", "ci"]
VARIANTS = ("adversarial", "stochastic", "ci")
FLOOR = 1e-3  # added to g inside the power: at 0 the slope of g^0.3 is infinite, and one such step freezes Adam

# ---------------------------------------------------------------------------------------------------------------------
# A. The loss of a row

Loss = Callable[[Tensor], Tensor]  # of last hidden states [k R, T, d_model]: [k R]


def ce_at_end(decomposition: Decomposition, y: Tensor) -> Loss:
    """-log p(y after the last position), nats; y [R]."""
    E = decomposition.target.unembedding

    def loss(hidden: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden[:, -1], E), y.repeat(len(hidden) // len(y)), reduction="none")

    return loss


def kl_at_end(decomposition: Decomposition, target_hidden: Tensor) -> Loss:
    """KL(target || masked) of the whole prediction after the last position, nats; target_hidden [R, T, d_model]."""
    E = decomposition.target.unembedding
    log_p = F.linear(target_hidden[:, -1], E).log_softmax(-1).detach()

    def loss(hidden: Tensor) -> Tensor:
        log_q = F.linear(hidden[:, -1], E).log_softmax(-1)
        of = log_p.repeat(len(hidden) // len(log_p), 1)
        return (of.exp() * (of - log_q)).sum(-1)

    return loss


# ---------------------------------------------------------------------------------------------------------------------
# B. Post-hoc causal importances


def ascend(
    decomposition: Decomposition, x: Tensor, loss: Loss, g: Tensor, alive: Tensor, r: Tensor, n_steps: int, size: float,
    last: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """n_steps of sign ascent on the sources r [R, T, C + L] of what is alive, [R, T, C]; the others stay.

        r <- clamp(r + size sign(dL / dr), 0, 1)

    Also the loss before every step and, with `last`, after the last one, [n_steps + 1, R].
    """
    g, met = g.detach(), []
    attacked = F.pad(alive, (0, r.shape[-1] - alive.shape[-1]))
    for step in range(n_steps + last):
        r.requires_grad_(step < n_steps)
        with torch.set_grad_enabled(step < n_steps):
            values = loss(decomposition(x, mask(g, r), frozen=True))
        met.append(values.detach())
        if step < n_steps:
            (grad_r,) = torch.autograd.grad(values, r, torch.ones_like(values))
            r = torch.where(attacked, r.detach() + size * grad_r.sign(), r.detach()).clamp_(0, 1)
    return r.detach(), torch.stack(met)


def post_hoc(
    decomposition: Decomposition, x: Tensor, loss: Loss, z: Tensor, coefficient: Tensor, variant: Variant,
    steps: int, generator: torch.Generator, lr: float = 0.01, p: float = 0.3, n_adv: int = 4, adv_lr: float = 1.0,
    tick: Callable[[], object] = lambda: None,
) -> Tensor:  # fmt: skip
    """Causal importances g [R, T, C] of each row, by Adam on phi, which starts at z where z > 0; elsewhere g stays 0.

        adversarial   1/2 L(r ~ U(0, 1)) + 1/2 L(r of an adversary) + coefficient 1/T sum_{t, c} (g_upper + FLOOR)^p
        stochastic    1/2 L(r ~ U(0, 1))                            + the same
        ci            L(m = g, m_Delta = 0)                         + the same

    The adversary starts anew at U(0, 1) in every step, and moves only what is alive, n_adv times by adv_lr. All
    matrices are masked. x [R, T]; loss gives [R]; z [R, T, C], Gamma's; coefficient [R].

    PAPER: the text has a cosine schedule; the released code makes one and never applies it. The rate is constant here.
    """
    (R, T), L, alive = x.shape, decomposition.L, z > 0
    row = alive.nonzero()[:, 0]
    phi = z[alive].detach().clone().requires_grad_()
    adam = torch.optim.Adam([phi], lr)
    sources = (T, z.shape[-1] + L)

    def importances() -> Tensor:
        return torch.zeros_like(z).masked_scatter(alive, lower_leaky(phi))

    for _ in range(steps):
        g = importances()
        if variant == "ci":
            reconstruction = loss(decomposition(x, F.pad(g, (0, L)), frozen=True)).sum()
        else:
            ms = [mask(g, sample_sources(sources, generator).to(z))]
            if variant == "adversarial":
                start = sample_sources(sources, generator).to(z).expand(R, *sources).clone()
                ms.append(mask(g, ascend(decomposition, x, loss, g, alive, start, n_adv, adv_lr, last=False)[0]))
            hidden = decomposition(x.repeat(len(ms), 1), torch.cat(ms), frozen=True)
            reconstruction = 0.5 * loss(hidden).sum()
        sparse = (coefficient[row] * (upper_leaky(phi) + FLOOR) ** p).sum() / T
        (phi.grad,) = torch.autograd.grad(reconstruction + sparse, phi)
        adam.step()
        tick()
    return importances().detach()


# ---------------------------------------------------------------------------------------------------------------------
# C. Judges

DRAWS = 32  # of random masks
JUDGES = {"adversarial": (4, 1.0, 1), "adversarial_20": (20, 0.1, 4)}  # steps, size, starts; the first is published


@torch.no_grad()
def judge(
    decomposition: Decomposition, x: Tensor, y: Tensor, g: Tensor, alive: Tensor, generator: torch.Generator,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:  # fmt: skip
    """The probability of y after the last position under masks of g [R, T, C], by kind of mask, [R] each.

    ci: m = g, m_Delta = 0. stochastic: mean over DRAWS. adversarial: after 4 steps of 1.0, as published, which is what
    trains the adversarial variant. adversarial_20: the least met in 20 steps of 0.1 from 4 starts. The adversaries move
    what is alive [R, T, C]; what is not, and Delta, is drawn at random. logit: the centred one of y under m = g.
    """
    L, loss = decomposition.L, ce_at_end(decomposition, y)
    shape = (x.shape[1], g.shape[-1] + L)
    hidden = decomposition(x, F.pad(g, (0, L)))
    E = decomposition.target.unembedding
    found = {"ci": (-loss(hidden)).exp(), "logit": (hidden[:, -1] * (E[y] - E.mean(0))).sum(-1)}
    drawn = [decomposition(x, mask(g, sample_sources(shape, generator).to(g))) for _ in range(DRAWS)]
    found["stochastic"] = torch.stack([(-loss(hidden)).exp() for hidden in drawn]).mean(0)
    for name, (n_steps, size, starts) in JUDGES.items():
        met = []
        for _ in range(starts):
            r = sample_sources(shape, generator).to(g).expand(len(x), *shape).clone()
            met.append(ascend(decomposition, x, loss, g, alive, r, n_steps, size)[1])
            tick()
        worst = met[0][-1] if starts == 1 else torch.stack(met).amax((0, 1))
        found[name] = (-worst).exp()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# D. Baselines


def largest(score: Tensor, alive: Tensor, k: Tensor) -> Tensor:
    """1 for the k [R] alive entries of largest score in each row, else 0: [R, T, C]. Scores of a row are unequal."""
    flat = score.masked_fill(~alive, -torch.inf).flatten(1)
    order = flat.argsort(1, descending=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return ((rank < k[:, None]) & alive.flatten(1)).view_as(score).to(score.dtype)
