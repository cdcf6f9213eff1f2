"""f(x | W) and f(x | W'): a small decoder-only language model, and the masked twin that VPD makes of any model.

  A. GPT            the target f(x | W): RMSNorm, RoPE, attention, GELU MLP. It knows nothing of the method.
  B. Decomposition  every chosen weight matrix as W = U V^T + Delta, ablated by masks (paper, "Method", W').

The target needs no surgery. While `Decomposition.forward` runs, each `F.linear` whose weight is a chosen W^l is
answered with W'^l(m) x instead. When it returns nothing is left behind: masks are an argument, never a mode of a layer.

Left out: embeddings and biases are not decomposed; no key-value cache; a target that recomputes its own activations in
the backward pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoints import load_into
from flags import UserError, require
from linears import LinearsAnswered, first_block, key_of, match_linears, refuse_unlike, refuse_weights_of

# ---------------------------------------------------------------------------------------------------------------------
# A. The target f(x | W)


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 1024
    context: int = 64  # longest sequence, in tokens
    n_layer: int = 2
    n_head: int = 4
    d_model: int = 64
    d_mlp: int = 256

    def __post_init__(self) -> None:
        require(self, "above 0", *vars(self))
        if self.d_model % (2 * self.n_head):
            raise UserError(f"d_model={self.d_model}: RoPE needs a multiple of 2 * n_head={2 * self.n_head}")


def rms_norm(x: Tensor) -> Tensor:
    """x / RMS(x) over the last dimension, without a learned scale."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


@torch.compiler.assume_constant_result  # compiled code would compute it again for every head of every sequence
def rotation(T: int, d: int, base: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of t * base^(-2i/d), [T, d/2]."""
    freqs = base ** (-torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
    angle = torch.arange(T, device=device, dtype=torch.float32)[:, None] * freqs
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rope(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding of x [B, H, T, d_head]: pair (i, i + d/2) turns by t * base^(-2i/d) at position t."""
    cos, sin = rotation(*x.shape[-2:], base, x.device, x.dtype)
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1)


class Attention(nn.Module):
    """Multi-head attention with RoPE; q, k, v, o without biases. Causal for f, bidirectional for Gamma."""

    def __init__(self, d_model: int, n_head: int, causal: bool) -> None:
        super().__init__()
        self.n_head, self.causal = n_head, causal
        self.q, self.k, self.v, self.o = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).view(*x.shape[:-1], self.n_head, -1).transpose(1, 2) for w in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=self.causal)  # [B, H, T, d_head]
        return self.o(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """down(GELU(up(x)))."""

    def __init__(self, d_model: int, d_mlp: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_mlp, bias=bias)
        self.down = nn.Linear(d_mlp, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, d_model: int, n_head: int, d_mlp: int, causal: bool, bias: bool) -> None:
        super().__init__()
        self.attn = Attention(d_model, n_head, causal)
        self.mlp = MLP(d_model, d_mlp, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(rms_norm(x))
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    """The target language model f(x | W): tokens [B, T] to next-token logits [B, T, vocab]."""

    unembedding_bias = softcap = None  # some models of pretrained.py have them

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(
            Block(config.d_model, config.n_head, config.d_mlp, causal=True, bias=False) for _ in range(config.n_layer)
        )
        for name, weight in self.named_parameters():
            # What writes to the residual stream starts smaller, so that its variance does not grow with depth.
            into_stream = name.endswith(("o.weight", "down.weight"))
            nn.init.normal_(weight, std=0.02 / (2 * config.n_layer) ** 0.5 if into_stream else 0.02)

    def hidden(self, tokens: Tensor) -> Tensor:
        """The last hidden state, normalised, [B, T, d_model]: `unembedding` makes it logits."""
        if tokens.shape[-1] > self.config.context:
            raise UserError(f"T={tokens.shape[-1]} tokens: the target's context is {self.config.context}")
        return self.hidden_from(self.embed(tokens), 0)

    def enter(self, tokens: Tensor, i: int) -> Tensor:
        """What enters block i, [B, T, d_model]."""
        x = self.embed(tokens)
        for block in self.blocks[:i]:
            x = block(x)
        return x

    def hidden_from(self, x: Tensor, i: int) -> Tensor:
        """The last hidden state, of what enters block i, [B, T, d_model]."""
        for block in self.blocks[i:]:
            x = block(x)
        return rms_norm(x)

    @property
    def unembedding(self) -> Tensor:
        """[vocab, d_model], tied to the embedding."""
        return self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.unembedding)


# ---------------------------------------------------------------------------------------------------------------------
# B. The masked twin f(x | W'(m))


def masked_product(x: Tensor, Wx: Tensor, m: Tensor, m_Delta: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """W' x for W' = sum_c U_c m_c V_c^T + m_Delta Delta, with Delta = W - U V^T, which is never formed:

        W' x = m_Delta W x + U ((m - m_Delta) * V^T x)

    x [..., d_in], Wx [..., d_out], m [..., C], m_Delta [..., 1], U [d_out, C], V [d_in, C]; the result is [..., d_out].

    PAPER: the draft's W' is the sum alone. Delta with a mask of its own is in the published method, which we follow.
    """
    return m_Delta * Wx + F.linear((m - m_Delta) * (x @ V), U)


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, but its inner activations are not kept: the backward pass computes them again."""
    return lambda *args: checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def each(function: Callable[[Tensor], Tensor], x: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """function(x); of the several inputs of a target, which are a tuple, each by itself."""
    return tuple(map(function, x)) if isinstance(x, tuple) else function(x)


class Decomposition(nn.Module):
    """Rank-one subcomponents U_c V_c^T of chosen matrices of `target`, which is frozen and otherwise left alone.

    target: any module that applies `nn.Linear` layers; where x is a tuple, `target(*x)`.
    C: subcomponents per matrix, {glob pattern over module names: count}, the first match counts; an int: for each.
    ends_in: f(x | W) is the target's output, or its last hidden state `target.hidden(x)`, for `losses.HiddenKL`. Then
      the blocks before `start`, the first with a chosen matrix, can be left to `enter`, once for many passes.
    memory_budget: share of the matrices whose masked product keeps its activations for the backward pass.
    Attributes: `names` in column order, `C` {name: C_l}, `L`, `U[name]` [d_out, C_l], `V[name]` [d_in, C_l], which
    begin as U ~ N(0, 1/C_l), V ~ N(0, 1/d_in).
    UserError if a pattern matches no nn.Linear, a count is below 1, or a weight is not the parameter of one layer; in a
    pass, if a chosen layer is not applied exactly once, or its weight is used in any other way.
    """

    def __init__(
        self, target: nn.Module, C: int | Mapping[str, int], generator: torch.Generator | None = None,
        ends_in: Literal["output", "hidden"] = "output", memory_budget: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.target, self.ends_in, self.memory_budget, self.searched = target, ends_in, memory_budget, False
        self.C = match_linears(target, C if isinstance(C, Mapping) else {"*": C})
        self.names, self.L = list(self.C), len(self.C)
        self.layers = [target.get_submodule(name) for name in self.names]
        refuse_weights_of(self.names, self.layers, target)
        self.start = first_block(self.names) if ends_in == "hidden" else 0
        self.keys = {name: key_of(name) for name in self.names}
        for name, layer in zip(self.names, self.layers):
            W, n = layer.weight, self.C[name]
            V = nn.Parameter(torch.randn(W.shape[1], n, generator=generator) / W.shape[1] ** 0.5)
            U = nn.Parameter(torch.randn(W.shape[0], n, generator=generator) / n**0.5)
            self.register_parameter(f"U:{self.keys[name]}", U)  # a parameter's name has no dots
            self.register_parameter(f"V:{self.keys[name]}", V)
        target.requires_grad_(False).eval()

    # Looked up at each use, as anybody may replace a module's parameters
    U = property(lambda self: {name: self._parameters[f"U:{key}"] for name, key in self.keys.items()})
    V = property(lambda self: {name: self._parameters[f"V:{key}"] for name, key in self.keys.items()})

    def train(self, mode: bool = True) -> "Decomposition":
        """The target stays in eval mode: f(x | W) is the same at each call."""
        super().train(mode).target.eval()
        return self

    def enter(self, x: Tensor) -> Tensor:
        """What every pass shares, as no mask changes it: of tokens x [B, T] what enters block `start`, [B, T, d_model].

        x itself where that is the first block. Every other method takes it in the place of x.
        """
        if self.start == 0:
            return x
        with torch.no_grad(), LinearsAnswered(self.names, self.layers, lambda l, x, Wx, bias: Wx, search=True) as mode:
            entering = self.target.enter(x, self.start)
        for name, n in zip(self.names, mode.applied):
            if n:
                raise UserError(f"{name} cannot be decomposed: the target applies it before its block")
        return entering.detach()

    def f(self, x: Tensor) -> Tensor:
        """f(x | W): the target's output, or its last hidden state, as `ends_in` says."""
        if self.start and x.is_floating_point():  # of `enter`: tokens are whole numbers
            return self.target.hidden_from(x, self.start)
        if self.ends_in == "hidden":
            return self.target.hidden(x)
        return self.target(*x) if isinstance(x, tuple) else self.target(x)

    def subcomponents(self) -> list[nn.Parameter]:
        """U and V of every matrix: what descends, without the target's own weights."""
        return [*self.U.values(), *self.V.values()]

    def subcomponents_state(self) -> dict[str, Tensor]:
        """U and V for a checkpoint: the state_dict without the target."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("target.")}

    def load_subcomponents(self, state: dict[str, Tensor]) -> None:
        load_into(self, self.target.state_dict(prefix="target.") | state)

    def W(self, name: str) -> Tensor:
        """The frozen target matrix W^l, [d_out, d_in]."""
        return self.target.get_submodule(name).weight

    def Delta(self, name: str) -> Tensor:
        """Delta^l = W^l - U^l V^lT, [d_out, d_in]: what the subcomponents leave over. Never stored."""
        U, V = (self._parameters[f"{letter}:{self.keys[name]}"] for letter in "UV")
        return self.W(name) - U @ V.T

    def answered(self, x: Tensor, answer: Callable[..., Tensor], search: bool) -> Tensor:
        """f(x | W), in which answer(l, x, Wx, b) takes the place of each chosen F.linear(x, W, b)."""
        with (mode := LinearsAnswered(self.names, self.layers, answer, search)):
            output = self.f(x)
        for name, n in zip(self.names, mode.applied):
            if n != 1:
                raise UserError(f"{name} cannot be decomposed: the target applies it {n} times in a pass, not once")
        if search and not torch.compiler.is_compiling():
            self.searched = self.state_of(x)
        return output

    def state_of(self, x: Tensor) -> tuple:
        """What a pass depends on, as far as where a weight goes is concerned: another one is searched anew."""
        return each(lambda x: x.shape, x), *(id(layer.weight) for layer in self.layers)

    def target_pass(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """f(x | W) and the input of every decomposed matrix, in the order of `names`: ([B, T, out], L x [B, T, d_in]).

        Neither carries a gradient: Gamma reads the activations of the target, which is not trained. Each target pass
        searches for other uses of a chosen weight; of the masked passes, which it would slow, the first eager one does.
        """
        inputs: list[Tensor | None] = [None] * self.L

        def record(l: int, x: Tensor, Wx: Tensor, bias: Tensor | None) -> Tensor:
            inputs[l] = x.detach()
            return Wx

        with torch.no_grad():
            output = self.answered(x, record, search=True)
        for name, x in zip(self.names, inputs):
            if x.shape[:-1] != (first := inputs[0].shape)[:-1]:
                raise UserError(f"{name} reads {tuple(x.shape)}, {self.names[0]} {tuple(first)}: no mask fits both")
        return output, inputs

    def forward(self, x: Tensor, m: Tensor | None = None, routing: Tensor | None = None, frozen=False) -> Tensor:
        """f(x | W'(m)), the paper's masked forward pass; with m=None exactly f(x | W).

        m: masks [B, T, C + L] (or broadcastable to it), the subcomponents in the order of `names`, then one for each
           Delta^l. All ones give the target's own output.
        routing: bool [B, T, L], True where matrix l is masked; False keeps its original W^l there. None masks all.
        frozen: no gradient for U and V, for the adversary's ascent.
        A bias is added once, unmasked.
        """
        if m is None:
            if routing is not None:
                raise UserError("routing says which matrices are masked: it needs m")
            return self.f(x)
        sizes = [*self.C.values(), self.L]
        for what, given, dtype, n in (("m", m, m.dtype, sum(sizes)), ("routing", routing, torch.bool, self.L)):
            if given is not None and (given.shape[-1:] != (n,) or given.dtype != dtype):
                raise UserError(f"{what} is {given.dtype} {tuple(given.shape)}: it must be {dtype} [..., {n}]")
        *ms, m_Deltas = m.split(sizes, dim=-1)
        Us, Vs = [*self.U.values()], [*self.V.values()]

        def masked(l: int, x: Tensor, Wx: Tensor, bias: Tensor | None) -> Tensor:
            U, V = (Us[l].detach(), Vs[l].detach()) if frozen else (Us[l], Vs[l])
            refuse_unlike(self.names[l], x, m, routing, U)
            Wx = Wx if bias is None else Wx - bias
            product = masked_product if l < self.memory_budget * self.L else recomputed(masked_product)
            y = product(x, Wx, ms[l], m_Deltas[..., l : l + 1], U, V)
            if routing is not None:
                y = torch.where(routing[..., l : l + 1], y, Wx)
            return y if bias is None else y + bias

        return self.answered(x, masked, search=torch.compiler.is_compiling() or self.searched != self.state_of(x))
