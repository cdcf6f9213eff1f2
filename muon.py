"""Muon, with which U and V learn: descent along the orthogonalised momentum (Jordan et al., 2024).

torch.optim.Muon does the same with five Newton-Schulz steps in bf16, which takes a CPU without bf16 units five times as
long as fp32: more than the rest of a step of the default run. Three steps serve as well there.
"""

import torch
from torch import Tensor

import run

A, B, C = 3.4445, -4.7750, 2.0315  # s -> A s + B s^3 + C s^5 takes a singular value up, and ends between 0.7 and 1.2


def orthogonalised(G: Tensor, steps: int) -> Tensor:
    """G [d_out, d_in] with its singular values nearer to 1, by `steps` of Newton-Schulz; five take most of them there.

    In bf16 where a training step is.
    """
    X = G.bfloat16() if run.bf16(G.device) else G
    X = X.T if (tall := G.shape[0] > G.shape[1]) else X
    X = X / (X.norm() + 1e-7)
    if X.shape[1] > 2 * X.shape[0]:  # cheaper in the smaller space: every step is a polynomial of X X^T, times X
        gram, product = X @ X.T, torch.eye(len(X), device=X.device, dtype=X.dtype)
        for _ in range(steps):
            polynomial = torch.addmm(gram, gram, gram, beta=B, alpha=C)
            polynomial.diagonal().add_(A)
            product, gram = polynomial @ product, polynomial @ gram @ polynomial
        X = product @ X
    else:
        for _ in range(steps):
            gram = X @ X.T
            X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=B, alpha=C), X, beta=A)
    return (X.T if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """W <- W - 0.2 sqrt(max(d_out, d_in)) lr O, O the orthogonalised Nesterov momentum of the gradient of W.

    The factor gives an update the root mean square that one of Adam has (Liu et al., 2025).
    """

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95, steps: int = 3) -> None:
        super().__init__(matrices, dict(lr=lr, momentum=momentum, steps=steps))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for W in (W for W in group["params"] if W.grad is not None):
                momentum = self.state[W].setdefault("momentum", torch.zeros_like(W))
                momentum.lerp_(W.grad, 1 - group["momentum"])
                O = orthogonalised(W.grad.lerp(momentum, group["momentum"]), group["steps"])
                W.sub_(O, alpha=0.2 * max(W.shape) ** 0.5 * group["lr"])
