"""Gamma of the toys: small MLPs from the inputs of all matrices, L x [..., d_in_l], to importance logits z [..., C].

d_hidden: GELU units of the one hidden layer. There is no norm: in a toy an input's size is its meaning.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CISharedMLP(nn.Module):
    """One MLP over all matrices, whose inputs are concatenated.

    spread, bias: scale and bias of the last layer at the start. With a large spread and a bias below 0 each
    subcomponent is alive at first on a few inputs of its own, not on all alike; docs/toys.md says what that decides.
    """

    def __init__(self, d_ins: list[int], C: int, d_hidden: int, spread: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(sum(d_ins), d_hidden), nn.Linear(d_hidden, C)
        nn.init.normal_(self.inp.weight, std=(2 / sum(d_ins)) ** 0.5)
        nn.init.zeros_(self.inp.bias)
        nn.init.normal_(self.out.weight, std=spread / d_hidden**0.5)
        nn.init.constant_(self.out.bias, bias)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.out(F.gelu(self.inp(torch.cat(inputs, dim=-1))))


class CIMLPs(nn.Module):
    """A small MLP of its own for each subcomponent (SPD), that sees V_c^T x alone.

    V: L x [d_in_l, C_l], the decomposition's own parameters: they learn from Gamma as well.
    """

    def __init__(self, V: list[Tensor], d_hidden: int) -> None:
        super().__init__()
        self.V = V  # a plain list, so that they stay the decomposition's parameters and not ours
        C = sum(v.shape[1] for v in V)
        self.w_in = nn.Parameter(torch.randn(C, d_hidden) * 2**0.5)
        self.w_out = nn.Parameter(torch.randn(C, d_hidden) / d_hidden**0.5)
        self.b_in, self.b_out = nn.Parameter(torch.zeros(C, d_hidden)), nn.Parameter(torch.zeros(C))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        a = torch.cat([x @ V for x, V in zip(inputs, self.V)], dim=-1)  # [..., C]
        h = F.gelu(a[..., None] * self.w_in + self.b_in)  # [..., C, d_hidden]
        return (h * self.w_out).sum(-1) + self.b_out
