"""What a model has memorised of a string, and which parts of its weights carry that: the library of studies/forget.py.

  A. Metrics   log p of a secret after its prefix, the tokens matched, exposure
  B. Gains     how much log p falls, to first order, if a part of the weights goes: one backward pass
  C. Removal   a part of the weights scaled down, everywhere; with its mean output kept; where it fires; a latent
  D. Ascent    gradient ascent on the loss of the secret, of all weights, of few, of low rank, of write vectors

A model is anything with `hidden(tokens)` [B, T, d_model], `unembedding` [vocab, d_model] and a call that gives logits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval import Run
from losses import kl_divergence
from model import GPT, Decomposition
from studies.dictionary import PLT, mlps_answered, mlps_of, original
from studies.weights import Piece, logits_with, removed

# ---------------------------------------------------------------------------------------------------------------------
# A. Metrics


@torch.no_grad()
def log_p(model: GPT, prefix: Tensor, secrets: Tensor, at_a_time: int = 256) -> tuple[Tensor, Tensor]:
    """log p of every token of secrets [n, S], after prefix [P] and the tokens before it, [n, S] in nats.

    Also whether the token is the most probable one there, bool [n, S].
    """
    found = []
    for part in secrets.split(at_a_time):
        tokens = torch.cat((prefix.expand(len(part), -1), part), 1)
        hidden = model.hidden(tokens[:, :-1])[:, len(prefix) - 1 :]
        log_q = F.linear(hidden, model.unembedding).float().log_softmax(-1)  # [n, S, vocab]
        found.append((log_q.gather(-1, part[..., None])[..., 0], log_q.argmax(-1) == part))
    return tuple(torch.cat(parts) for parts in zip(*found))


def matched(most_probable: Tensor) -> int:
    """Tokens of the secret, bool [S], that greedy continuation of the prefix gives before its first mistake."""
    return int(most_probable.long().cumprod(0).sum())


def exposure(own: float, others: Tensor) -> float:
    """log2 R - log2 rank, bits: the rank of a secret's log p among its own and those of R - 1 others, [R - 1].

    0 for the last rank, log2 R for the first; a tie counts against it. A model that saw none has a uniform rank.
    (Carlini et al., "The Secret Sharer", with ranks among a sample.)
    """
    return math.log2(len(others) + 1) - math.log2(1 + int((others >= own).sum()))


@dataclass(frozen=True)
class Memory:
    """What a model has of one secret: log_p, its sum over the tokens in nats; matched, tokens; exposure, bits."""

    log_p: float
    matched: int
    exposure: float

    @classmethod
    def of(cls, model: GPT, prefix: Tensor, secret: Tensor, others: Tensor) -> "Memory":
        """secret [S]; others [R - 1, S], which the model has not seen."""
        token_log_p, most_probable = log_p(model, prefix, torch.cat((secret[None], others)))
        sums = token_log_p.double().sum(1)
        return cls(sums[0].item(), matched(most_probable[0]), exposure(sums[0].item(), sums[1:]))


# ---------------------------------------------------------------------------------------------------------------------
# B. Gains

Columns = tuple[str, int, int]  # columns first:end of a matrix: a neuron of mlp.down, a head of attn.o


def gradient(target: GPT, prefix: Tensor, secret: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """G = d log p(secret | prefix) / dW of each of these matrices, [d_out, d_in]."""
    with torch.enable_grad():
        W = {name: target.get_submodule(name).weight.detach().clone().requires_grad_() for name in names}
        grads = torch.autograd.grad(secret_log_p(target, W, prefix, secret), list(W.values()))
    return dict(zip(names, grads))


def secret_log_p(target: GPT, weights: Mapping[str, Tensor], prefix: Tensor, secret: Tensor) -> Tensor:
    """log p(secret | prefix) in nats under new weights, with a gradient for them."""
    tokens = torch.cat((prefix, secret))[None]
    log_q = logits_with(target, weights, tokens[:, :-1])[0, len(prefix) - 1 :].log_softmax(-1)
    return log_q.gather(-1, secret[:, None]).sum()


def gains_of_pieces(decomposition: Decomposition, G: Mapping[str, Tensor]) -> Tensor:
    """gain_c = d log p / dm_c at masks 1, summed over positions, [C]: what log p loses, to first order, if c goes.

    As W'(m) = W + sum_c (m_c - 1) U_c V_c^T, it is U_c^T G V_c.
    """
    return torch.cat([(U * (G[name] @ decomposition.V[name])).sum(0) for name, U in decomposition.U.items()]).detach()


def units_of(target: GPT) -> list[Columns]:
    """Every neuron and every attention head, as the columns of the matrix that it writes with."""
    config, found = target.config, []
    for block in range(config.n_layer):
        width = config.d_model // config.n_head
        found += [(f"blocks.{block}.attn.o", i * width, (i + 1) * width) for i in range(config.n_head)]
        found += [(f"blocks.{block}.mlp.down", j, j + 1) for j in range(config.d_mlp)]
    return found


def gains_of_units(target: GPT, units: Sequence[Columns], G: Mapping[str, Tensor]) -> Tensor:
    """The same of neurons and heads, [n]: the sum of W * G over the columns."""
    product = {name: (target.get_submodule(name).weight * G[name]).sum(0) for name in {name for name, _, _ in units}}
    return torch.stack([product[name][first:end].sum() for name, first, end in units]).detach()


def gains_of_latents(target: GPT, dictionary: PLT, prefix: Tensor, secret: Tensor) -> Tensor:
    """The same of the latents of a transcoder, layer by layer, [n D]: what log p loses if a latent writes no more.

    Latent i of MLP l adds h_i W_dec_i to its output: gain_i = sum_t h_i W_dec_i . d log p / d y, at the target itself.
    """
    tokens, mlps = torch.cat((prefix, secret))[None], mlps_of(target)
    with torch.enable_grad():
        m = [torch.zeros(W.shape[0], dtype=W.dtype, device=W.device, requires_grad=True) for W in dictionary.W_dec]

        def answer(l: int, x: Tensor) -> Tensor:
            h = dictionary.codes(l, x.detach())
            return original(mlps[l], x) + (m[l] * h) @ dictionary.own_decoder(l)

        with mlps_answered(target, answer):
            hidden = target.hidden(tokens[:, :-1])[0, len(prefix) - 1 :]
        log_q = F.linear(hidden, target.unembedding).log_softmax(-1)
        grads = torch.autograd.grad(log_q.gather(-1, secret[:, None]).sum(), m)
    return torch.cat(grads)


# ---------------------------------------------------------------------------------------------------------------------
# C. Removal


def without_pieces(decomposition: Decomposition, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """W' = W - sum_c U_c V_c^T, {matrix: [d_out, d_in]}."""
    return removed(decomposition, pieces)


@torch.no_grad()
def without_columns(target: GPT, units: Sequence[Columns]) -> dict[str, Tensor]:
    """The same for neurons and heads: their columns are 0."""
    new: dict[str, Tensor] = {}
    for name, first, end in units:
        new.setdefault(name, target.get_submodule(name).weight.detach().clone())[:, first:end] = 0
    return new


@torch.no_grad()
def scaled(target: GPT, weights: Mapping[str, Tensor], kappa: float) -> dict[str, Tensor]:
    """W + kappa (W' - W): 0 is no change, 1 the removal, 2 turns the sign of what is removed."""
    return {name: W.lerp(weights[name], kappa) for name in weights for W in [target.get_submodule(name).weight]}


@torch.no_grad()
def means_kept(target: GPT, weights: Mapping[str, Tensor], mean_x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Biases {matrix: [d_out]} that keep the mean output: (W - W') mean x. So a removal becomes a mean ablation."""
    return {name: (target.get_submodule(name).weight - W) @ mean_x[name] for name, W in weights.items()}


class WhereItFires:
    """The target without `pieces` at the positions where each is important, g_c > 0, and with them elsewhere.

    It is no edit of weights, as it needs Gamma at run time: what a removal could cost at the least.
    """

    def __init__(self, run: Run, columns: Sequence[int]) -> None:
        self.run, self.unembedding = run, run.unembedding
        self.columns = torch.tensor(columns, dtype=torch.long, device=run.device)

    def hidden(self, tokens: Tensor) -> Tensor:
        _, g, _ = self.run.importances(tokens)
        m = torch.ones(*g.shape[:-1], g.shape[-1] + self.run.decomposition.L, device=g.device)
        m[..., self.columns] = (g[..., self.columns] == 0).float()
        return self.run.decomposition(tokens, m)

    def __call__(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.unembedding)


class WithoutLatents:
    """The target, of which each MLP's output lacks what these latents of a transcoder write: y_l - sum_i h_i W_dec_i.

    latents: numbers among all, layer by layer. It is no edit of weights either, as it needs the transcoder.
    """

    def __init__(self, target: GPT, dictionary: PLT, latents: Sequence[int]) -> None:
        self.target, self.dictionary, self.unembedding = target, dictionary, target.unembedding
        D = dictionary.settings.D
        self.latents = [[i - l * D for i in latents if i // D == l] for l in range(dictionary.n)]

    def hidden(self, tokens: Tensor) -> Tensor:
        mlps = mlps_of(self.target)

        def answer(l: int, x: Tensor) -> Tensor:
            h = self.dictionary.codes(l, x)[..., self.latents[l]]
            return original(mlps[l], x) - h @ self.dictionary.own_decoder(l)[self.latents[l]]

        with mlps_answered(self.target, answer):
            return self.target.hidden(tokens)

    def __call__(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.unembedding)


# ---------------------------------------------------------------------------------------------------------------------
# D. Ascent

Change = tuple[list[Tensor], Callable[[], dict[str, Tensor]]]  # what learns, and the new weights that it makes


def full(target: GPT, names: Sequence[str]) -> Change:
    """All entries of these matrices."""
    W = {name: target.get_submodule(name).weight.detach().clone().requires_grad_() for name in names}
    return list(W.values()), lambda: W


def largest_gradient(target: GPT, G: Mapping[str, Tensor], share: float) -> Change:
    """The share of all entries that has the largest |G|, at least one."""
    n = max(1, round(share * sum(g.numel() for g in G.values())))
    threshold = torch.cat([g.abs().flatten() for g in G.values()]).topk(n).values[-1]
    D = {name: torch.zeros_like(g, requires_grad=True) for name, g in G.items()}
    mask = {name: g.abs() >= threshold for name, g in G.items()}
    return list(D.values()), lambda: {n: target.get_submodule(n).weight + D[n] * mask[n] for n in D}


def low_rank(target: GPT, names: Sequence[str], rank: int, generator: torch.Generator) -> Change:
    """W + B A with A ~ 0.01 N(0, 1) [rank, d_in] and B = 0 [d_out, rank]: LoRA."""
    W = {name: target.get_submodule(name).weight for name in names}
    A = {n: 0.01 * torch.randn(rank, w.shape[1], generator=generator, dtype=w.dtype).to(w.device) for n, w in W.items()}
    B = {n: w.new_zeros(w.shape[0], rank).requires_grad_() for n, w in W.items()}
    A = {n: a.requires_grad_() for n, a in A.items()}
    return [*A.values(), *B.values()], lambda: {n: w + B[n] @ A[n] for n, w in W.items()}


def write_vectors(decomposition: Decomposition, pieces: Sequence[Piece]) -> Change:
    """U_c of these subcomponents; V_c and everything else stays."""
    columns: dict[str, list[int]] = {}
    for name, c in pieces:
        columns.setdefault(name, []).append(c)
    D = {n: torch.zeros_like(decomposition.U[n][:, c]).requires_grad_() for n, c in columns.items()}
    V = {n: decomposition.V[n][:, c].detach() for n, c in columns.items()}
    return list(D.values()), lambda: {n: decomposition.W(n) + D[n] @ V[n].T for n in D}


def ascent(
    target: GPT, change: Change, prefix: Tensor, secret: Tensor, lr: float, beta: float = 0.0,
    windows: Sequence[Tensor] = (),
) -> Iterator[tuple[dict[str, Tensor], float]]:  # fmt: skip
    """Adam on the mean over tokens of log p(secret | prefix) + beta KL(target || changed) on windows[step] [B, T].

    After every step: the new weights, and log p, the sum over tokens, before it. It goes on for as long as it is asked.
    """
    learning, weights = change
    optimizer, step = torch.optim.Adam(learning, lr), 0
    while True:
        with torch.enable_grad():
            new = weights()
            log_p = secret_log_p(target, new, prefix, secret)
            loss = log_p / len(secret)
            if beta > 0:
                x = windows[step % len(windows)]
                with torch.no_grad():
                    logits = target(x)
                loss = loss + beta * kl_divergence(logits, logits_with(target, new, x))
            optimizer.zero_grad()
            for weight, grad in zip(learning, torch.autograd.grad(loss, learning)):
                weight.grad = grad
        optimizer.step()
        step += 1
        yield {name: W.detach().clone() for name, W in weights().items()}, log_p.item()


def relearned(target: GPT, names: Sequence[str], prefix: Tensor, secret: Tensor, steps: int, lr: float) -> dict:
    """The weights after so many Adam steps that descend -log p(secret | prefix): how deep forgetting goes."""
    learning, weights = full(target, names)
    optimizer = torch.optim.Adam(learning, lr)
    for _ in range(steps):
        with torch.enable_grad():
            loss = -secret_log_p(target, weights(), prefix, secret) / len(secret)
            for weight, grad in zip(learning, torch.autograd.grad(loss, learning)):
                weight.grad = grad
        optimizer.step()
    return {name: W.detach() for name, W in weights().items()}
