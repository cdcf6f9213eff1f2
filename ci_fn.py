"""Causal importance function Gamma: how important is each subcomponent at each position? (paper, "Training a causal
importance function")

  A. two leaky hard sigmoids   `lower_leaky` builds masks, `upper_leaky` is penalised: equal in [0, 1], two gradients
  B. CITransformer             one shared bidirectional transformer over the inputs of all decomposed matrices

Gamma sees the *unmasked* target's activations, without gradient, and gives one logit z per subcomponent and position;
g = clamp(z, 0, 1). Deltas have no logit: their importance is 0 by definition.
"""

import torch
from torch import Tensor, nn

from flags import UserError
from model import Block, recomputed, rms_norm

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
        below = grad.clamp(max=0).mul_(ctx.leak)  # only the gradient that would raise g
        return torch.where(z <= 0, below, grad.masked_fill(z > 1, 0)), None


def lower_leaky(z: Tensor, leak: float = 0.01) -> Tensor:
    """g in [0, 1] for masks: clamp(z, 0, 1), whose gradient can revive dead subcomponents but never pushes them down.

    z            forward   dL/dz given dL/dg = +1   given -1
    z <= 0       0         0                        -leak
    0 < z <= 1   z         1                        -1
    z > 1        1         0                        0
    """
    return LowerLeaky.apply(z, leak)


def upper_leaky(z: Tensor, leak: float = 0.01) -> Tensor:
    """g >= 0 for the minimality losses: clamp(z, 0, 1), with slope `leak` above 1, so that saturated g come down.

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

    Each input is RMS-normalised on its own and all are concatenated, then: linear to d_ci, pre-norm blocks with
    bidirectional attention (RoPE, no biases) and a GELU MLP (with biases), linear to C = sum of C_l.
    memory_budget: share of the blocks that keep activations; the rest recompute. UserError if d_ci does not fit n_head.
    """

    def __init__(
        self, d_ins: list[int], C: int, d_ci: int, n_layer: int, n_head: int, d_mlp: int, memory_budget: float = 1.0
    ) -> None:
        super().__init__()
        if d_ci % (2 * n_head):
            raise UserError(f"d_ci={d_ci}: RoPE needs a multiple of 2 * n_head={2 * n_head}")
        self.memory_budget = memory_budget
        self.inp = nn.Linear(sum(d_ins), d_ci)
        self.blocks = nn.ModuleList(Block(d_ci, n_head, d_mlp, causal=False, bias=True) for _ in range(n_layer))
        self.out = nn.Linear(d_ci, C)

    def units(self) -> list[nn.Module]:
        """Its parts, in the order in which they run: what has to be whole at a time when it is sharded."""
        return [self.inp, *self.blocks, self.out]

    def forward(self, inputs: list[Tensor]) -> Tensor:
        assert inputs[0].dim() == 3, f"inputs are [B, T, d_in], not {list(inputs[0].shape)}"
        x = self.inp(torch.cat([rms_norm(x) for x in inputs], dim=-1))  # [B, T, sum of d_in] to [B, T, d_ci]
        for i, block in enumerate(self.blocks):
            x = block(x) if i < self.memory_budget * len(self.blocks) else recomputed(block)(x)
        return self.out(x)
