"""Causal importance function Gamma: how important is each subcomponent at each position? (paper, "Training a causal
importance function")

  A. two leaky hard sigmoids   one forward value, two ways to learn: `lower_leaky` builds masks, `upper_leaky` is penalised
  B. CITransformer             one shared bidirectional transformer over the inputs of all decomposed matrices
  C. CISharedMLP, CIMLPs       for the toys, whose inputs have no sequence axis

Gamma sees the *unmasked* target's activations, without gradient, and gives one logit z per subcomponent and position;
g = clamp(z, 0, 1). Deltas have no logit: their importance is 0 by definition.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Block, rms_norm

# ---------------------------------------------------------------------------------------------------------------------
# A. z to g


class LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, leak: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.leak = leak
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        below = ctx.leak * grad.clamp(max=0)  # only the gradient that would raise g
        return torch.where(z <= 0, below, torch.where(z <= 1, grad, 0)), None


def lower_leaky(z: Tensor, leak: float = 0.01) -> Tensor:
    """g in [0, 1] for masks: clamp(z, 0, 1), whose gradient can revive dead subcomponents but never pushes them down.

    z            forward   dL/dz given dL/dg = +1   given -1
    z <= 0       0         0                        -leak
    0 < z <= 1   z         1                        -1
    z > 1        1         0                        0
    """
    return LowerLeaky.apply(z, leak)


def upper_leaky(z: Tensor, leak: float = 0.01) -> Tensor:
    """g >= 0 for the minimality losses: clamp(z, 0, 1) that goes on with slope `leak` above 1, so saturated g come down.

    z            forward              dL/dz given dL/dg = +1   given -1
    z < 0        0                    0                        0
    0 <= z <= 1  z                    1                        -1
    z > 1        1 + leak * (z - 1)   leak                     -leak
    """
    return torch.where(z > 1, 1 + leak * (z - 1), z.clamp(0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# B. Gamma


class CITransformer(nn.Module):
    """Gamma: inputs of L matrices, L x [B, T, d_in_l], to causal importance logits z [B, T, C].

    Each input is RMS-normalised on its own and all are concatenated (D = sum of d_in), then: linear to d_ci, pre-norm
    blocks with bidirectional attention (RoPE, no biases) and a GELU MLP (with biases), linear to C = sum of C_l.
    """

    def __init__(
        self, d_ins: list[int], C: int, d_ci: int = 128, n_layer: int = 2, n_head: int = 4, d_mlp: int = 512
    ) -> None:
        super().__init__()
        if d_ci % (2 * n_head):
            raise ValueError(f"d_ci={d_ci}: RoPE needs a multiple of 2 * n_head={2 * n_head}")
        self.inp = nn.Linear(sum(d_ins), d_ci)
        self.blocks = nn.ModuleList(Block(d_ci, n_head, d_mlp, causal=False, bias=True) for _ in range(n_layer))
        self.out = nn.Linear(d_ci, C)

    def units(self) -> list[nn.Module]:
        """Its parts, in the order in which they run: what has to be whole at a time when it is sharded."""
        return [self.inp, *self.blocks, self.out]

    def forward(self, inputs: list[Tensor]) -> Tensor:
        assert inputs[0].dim() == 3, f"inputs are [B, T, d_in], not {list(inputs[0].shape)}"
        x = self.inp(torch.cat([rms_norm(x) for x in inputs], dim=-1))  # [B, T, D] to [B, T, d_ci]
        for block in self.blocks:
            x = block(x)
        return self.out(x)


# ---------------------------------------------------------------------------------------------------------------------
# C. Gamma of the toys


class CISharedMLP(nn.Module):
    """One MLP over all layers: inputs L x [..., d_in_l], concatenated as they are, to causal importance logits z [..., C].

    hidden: widths of its hidden layers, with GELU between them. No norm: in a toy an input's size is its meaning.
    spread, bias: scale and bias of the last layer at the start. With a large spread and a bias below 0 each subcomponent is
    alive at first on a few inputs of its own, not on all alike; see README.md for what that decides.
    """

    def __init__(
        self, d_ins: list[int], C: int, hidden: tuple[int, ...] = (256,), spread: float = 1.0, bias: float = 0.0
    ) -> None:
        super().__init__()
        widths = [sum(d_ins), *hidden, C]
        self.layers = nn.ModuleList(nn.Linear(d_in, d_out) for d_in, d_out in zip(widths, widths[1:]))
        for layer in self.layers[:-1]:
            nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.layers[-1].weight, std=spread / widths[-2] ** 0.5)
        nn.init.constant_(self.layers[-1].bias, bias)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        x = torch.cat(inputs, dim=-1)
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        return self.layers[-1](x)


class CIMLPs(nn.Module):
    """A small MLP of its own for each subcomponent (SPD): V_c^T x, a scalar, to `hidden` GELU units to z_c.

    V: L x [d_in_l, C_l], the decomposition's own parameters: they learn from Gamma as well. inputs L x [..., d_in_l],
    z [..., C].
    """

    def __init__(self, V: list[Tensor], hidden: int = 16) -> None:
        super().__init__()
        self.V = V  # a plain list, so that they stay the decomposition's parameters and not ours
        C = sum(v.shape[1] for v in V)
        self.w_in = nn.Parameter(torch.randn(C, hidden) * 2**0.5)
        self.w_out = nn.Parameter(torch.randn(C, hidden) / hidden**0.5)
        self.b_in, self.b_out = nn.Parameter(torch.zeros(C, hidden)), nn.Parameter(torch.zeros(C))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        a = torch.cat([x @ V for x, V in zip(inputs, self.V)], dim=-1)  # [..., C]
        h = F.gelu(a[..., None] * self.w_in + self.b_in)  # [..., C, hidden]
        return (h * self.w_out).sum(-1) + self.b_out
