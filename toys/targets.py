"""Toys with known answers: small targets f(x | W) whose mechanisms somebody worked out, their data and their training.

  A. TMS            toy model of superposition, with or without an identity in the middle
  B. ResidMLP       x + relu(x) by fewer neurons than features, in 1, 2 or 3 layers: computation in superposition
  C. PingPong       hand-made circuits that share neurons, so that their sum stays rank one: what L_frequency is for
  D. InductionHead  two attention-only layers that copy what followed a token the last time
  E. TOYS, train

Each target is a plain module of `nn.Linear` layers. It knows its data (`batch`), its task (`loss`) and, where there is
one, its canonical decomposition (`canonical`, `dense`, `active`). toys/__main__.py decomposes it.

Architectures and data are those of the papers on APD and SPD. Training is shorter: TMS half the steps, 40-10 a quarter
of the batch, the induction transformer 4,000 steps of 256, not 100,000 of 1,024.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import run
from train_target import cosine

Pieces = tuple[Tensor, Tensor]  # U [d_out, n], V [d_in, n]: n rank-one pieces that sum to a matrix


def sparse_features(shape: tuple[int, int], chance: float, low: float, generator: torch.Generator) -> Tensor:
    """[B, n]: each feature is on with this chance and then U(low, 1), else 0."""
    value = low + (1 - low) * torch.rand(shape, generator=generator)
    return value * (torch.rand(shape, generator=generator) < chance)


class FeatureToy(nn.Module):
    """What the toys without a sequence have in common: inputs x [B, n] of n features that are mostly 0.

    A mechanism is a feature, or in PingPong a circuit. A matrix has a piece for each mechanism, important where that is
    at work; the pieces of a `dense` matrix are all important wherever any mechanism is.
    """

    n: int
    chance, low = 0.05, 0.0  # a feature is on with this chance, and then U(low, 1)
    dense: tuple[str, ...] = ()

    def batch(self, B: int, generator: torch.Generator) -> Tensor:
        return sparse_features((B, self.n), self.chance, self.low, generator)

    def probes(self) -> Tensor:
        """One mechanism a row: here a feature at 0.75, [n, n]."""
        return 0.75 * torch.eye(self.n)

    def active(self, x: Tensor) -> Tensor:
        """Whether a mechanism is at work on x: bool [B, mechanisms]."""
        return x != 0


# ---------------------------------------------------------------------------------------------------------------------
# A. Toy model of superposition


class TMS(FeatureToy):
    """relu(W2 (I) W1 x + b), W2 = W1^T: n features through d dimensions. With `identity` a frozen I is in the middle.

    Canonical: a piece W1[:, j] e_j^T for each feature and its transpose in W2; d pieces of I, in any basis.
    """

    def __init__(self, n: int, d: int, identity: bool) -> None:
        super().__init__()
        self.n, self.d = n, d
        self.linear1 = nn.Linear(n, d, bias=False)
        self.hidden = nn.Linear(d, d, bias=False) if identity else nn.Identity()
        self.linear2 = nn.Linear(d, n)
        if identity:
            nn.init.eye_(self.hidden.weight).requires_grad_(False)
            self.dense = ("hidden",)
        nn.init.zeros_(self.linear2.bias)  # from PyTorch's own start most 5-2 targets lose a feature or more
        self.linear2.weight.data = self.linear1.weight.data.T.clone()

    def tie(self, tied: bool) -> None:
        """One memory for W1 and W2, or two. One is stepped twice by AdamW, with each gradient, as in earlier papers."""
        W1 = self.linear1.weight.data
        self.linear2.weight.data = W1.T if tied else W1.T.clone()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear2(self.hidden(self.linear1(x))))

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self(x), x)

    def canonical(self) -> dict[str, Pieces]:
        W1, W2 = self.linear1.weight, self.linear2.weight
        pieces = {"linear1": (W1, torch.eye(self.n)), "linear2": (torch.eye(self.n), W2.T)}
        return pieces | {name: (torch.eye(self.d), torch.eye(self.d)) for name in self.dense}


# ---------------------------------------------------------------------------------------------------------------------
# B. Residual MLP


class ResidMLP(FeatureToy):
    """x + relu(x) of n features: in by a fixed W_E of unit rows, d_mlp ReLU neurons a layer, out by W_E^T.

    Canonical: mlp_in has a piece for each feature, over many neurons; mlp_out is one component of full rank, wanted as
    soon as any feature is on.
    """

    chance, low = 0.01, -1.0

    def __init__(self, n: int, n_layer: int, d_mlp: int, d: int = 1000) -> None:
        super().__init__()
        self.n = n
        self.register_buffer("W_E", F.normalize(torch.randn(n, d), dim=-1))
        self.mlp_in = nn.ModuleList(nn.Linear(d, d_mlp, bias=False) for _ in range(n_layer))
        self.mlp_out = nn.ModuleList(nn.Linear(d_mlp, d, bias=False) for _ in range(n_layer))
        self.dense = tuple(f"mlp_out.{l}" for l in range(n_layer))

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.W_E  # [B, d]
        for mlp_in, mlp_out in zip(self.mlp_in, self.mlp_out):
            h = h + mlp_out(F.relu(mlp_in(h)))
        return h @ self.W_E.T

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self(x), x + F.relu(x))

    @torch.no_grad()
    def rotated(self) -> "ResidMLP":
        """The same function in fewer dimensions: of the d of its residual stream a matrix reads or writes few.

        Q, an orthonormal basis of what W_E, W_in and W_out span, [n + 2 n_layer d_mlp, d], takes h to Q h. Angles, and
        so mechanisms, stay what they are. A step of the decomposition is cheaper; faithfulness, a mean over all
        entries, weighs an entry more.
        """
        into = [self.W_E, *(layer.weight for layer in self.mlp_in), *(layer.weight.T for layer in self.mlp_out)]
        Q = torch.linalg.qr(torch.cat(into).T.double()).Q.T.float()
        same = ResidMLP(self.n, len(self.mlp_in), self.mlp_in[0].out_features, d=len(Q))
        same.W_E.copy_(self.W_E @ Q.T)
        for own, layer in zip((*same.mlp_in, *same.mlp_out), (*self.mlp_in, *self.mlp_out)):
            own.weight.copy_(layer.weight @ Q.T if layer.in_features == Q.shape[1] else Q @ layer.weight)
        return same

    def canonical(self) -> dict[str, Pieces]:
        pieces = {}
        for l, (mlp_in, mlp_out) in enumerate(zip(self.mlp_in, self.mlp_out)):
            # The dual basis of W_E reads one feature each; what W_in does outside of their span is left to Delta.
            pieces[f"mlp_in.{l}"] = mlp_in.weight @ self.W_E.T, torch.linalg.pinv(self.W_E)
            pieces[f"mlp_out.{l}"] = mlp_out.weight, torch.eye(mlp_out.in_features)
        return pieces


# ---------------------------------------------------------------------------------------------------------------------
# C. Ping-pong


class PingPong(FeatureToy):
    """Two groups of 8 circuits in one matrix W, nothing to train. y = relu(W x + G x - 1), the - 1 where gated.

    Fan-in: inputs 0..7 each feed output 0. Fan-out: input 8 feeds outputs 1..8, each only while its gate, input 9..16,
    is open; the gates act by the fixed G, outside of W. Any circuit is at work without the others, so the canonical
    pieces are the 16 single entries of W. But each group sums to a rank-one matrix, which one subcomponent could serve.
    """

    n = 17

    def __init__(self) -> None:
        super().__init__()
        self.circuits = nn.Linear(17, 9, bias=False)
        U, V = self.canonical()["circuits"]
        self.circuits.weight.data = U @ V.T
        self.register_buffer("G", torch.zeros(9, 17))
        self.G[range(1, 9), range(9, 17)] = 1

    def batch(self, B: int, generator: torch.Generator) -> Tensor:
        x = super().batch(B, generator)
        source = sparse_features((B, 1), 0.5, 0.0, generator)
        gates = (torch.rand((B, 8), generator=generator) < 0.1).float()
        return torch.cat((x[:, :8], source, gates), dim=-1)

    def probes(self) -> Tensor:
        """One circuit a row: input k, or input 8 with the circuit's gate open; [16, 17]."""
        probes = 0.75 * self.canonical()["circuits"][1].T
        probes[range(8, 16), range(9, 17)] = 1
        return probes

    def active(self, x: Tensor) -> Tensor:
        return torch.cat((x[:, :8] != 0, (x[:, 8:9] != 0) & (x[:, 9:] != 0)), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.circuits(x) + x @ self.G.T - self.G.sum(1))

    def canonical(self) -> dict[str, Pieces]:
        U, V = torch.zeros(9, 16), torch.zeros(17, 16)
        U[0, :8] = 1
        U[range(1, 9), range(8, 16)] = 1
        V[range(8), range(8)] = 1
        V[8, 8:] = 1
        return {"circuits": (U, V)}


# ---------------------------------------------------------------------------------------------------------------------
# D. Induction head


class InductionLayer(nn.Module):
    """A causal attention head without norm; a sinusoidal position code is added to q and k after their projections."""

    def __init__(self, d: int, context: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        angle = torch.arange(context)[:, None] / 10_000 ** (torch.arange(0, d, 2) / d)
        self.register_buffer("positions", torch.stack((angle.sin(), angle.cos()), -1).flatten(1))  # [T, d]
        self.register_buffer("future", torch.ones(context, context, dtype=torch.bool).triu(1))
        self.pattern = nn.Softmax(-1)  # a module, so that a hook can read the attention pattern [B, T, T]

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x) + self.positions, self.k(x) + self.positions
        scores = (q @ k.transpose(-1, -2)) / x.shape[-1] ** 0.5
        return x + self.o(self.pattern(scores.masked_fill(self.future, -torch.inf)) @ self.v(x))


class InductionHead(nn.Module):
    """`BOS ... S m ... S`, predict the token m: 64 tokens, m and the filler uniform of 128, S only twice."""

    T, BOS, S, vocab_size = 64, 0, 129, 130

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(self.vocab_size, d), nn.Linear(d, self.vocab_size, bias=False)
        self.layers = nn.ModuleList(InductionLayer(d, self.T) for _ in range(2))

    def batch(self, B: int, generator: torch.Generator) -> Tensor:
        """Tokens [B, 64]."""
        x = torch.randint(1, 129, (B, self.T), generator=generator)
        first = torch.randint(2, 62, (B, 1), generator=generator)
        x[:, 0], x[:, -1] = self.BOS, self.S
        return x.scatter(1, first, self.S)

    def first(self, x: Tensor) -> Tensor:
        """Position of the first S, [B]; the memory is behind it."""
        return (x == self.S).int().argmax(-1)

    def memory(self, x: Tensor) -> Tensor:
        """The token to predict, [B]."""
        return x.gather(1, self.first(x)[:, None] + 1)[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the last position, the only one that is trained: tokens [B, 64] to [B, vocab]."""
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.unembed(h[:, -1])

    def loss(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self(x), self.memory(x))


# ---------------------------------------------------------------------------------------------------------------------
# E. Training


@dataclass(frozen=True)
class Toy:
    """A target's architecture and how it is trained: AdamW with weight decay 0.01."""

    make: Callable[[], nn.Module]
    steps: int = 0
    B: int = 1024
    lr: float = 5e-3
    lr_warmup: float = 0.0  # share of the steps
    lr_end: float = 1.0  # share of lr that its cosine ends at; 1: constant
    rotate: bool = False  # decompose ResidMLP.rotated


TOYS = {
    "tms_5-2": Toy(lambda: TMS(5, 2, identity=False), 5000),
    "tms_5-2-id": Toy(lambda: TMS(5, 2, identity=True), 5000),
    "tms_40-10": Toy(lambda: TMS(40, 10, identity=False), 5000, B=2048),
    "tms_40-10-id": Toy(lambda: TMS(40, 10, identity=True), 5000, B=2048),
    "resid_mlp1": Toy(lambda: ResidMLP(100, 1, 50), 1000, B=2048, lr=3e-3, lr_end=0.0),
    "resid_mlp2": Toy(lambda: ResidMLP(100, 2, 25), 1000, B=2048, lr=3e-3, lr_end=0.0, rotate=True),
    "resid_mlp3": Toy(lambda: ResidMLP(102, 3, 17), 10_000, B=2048, lr=3e-3, lr_end=0.0),
    "ping_pong": Toy(PingPong),
    "induction": Toy(InductionHead, 4000, B=256, lr=3e-3, lr_warmup=0.25),
}


def train(toy: Toy, seed: int) -> nn.Module:
    """The trained target: a function of the toy and the seed."""
    torch.manual_seed(seed)
    target, generator = toy.make(), torch.Generator().manual_seed(seed)
    if isinstance(target, TMS):
        target.tie(True)
    optimizer = torch.optim.AdamW([w for w in target.parameters() if w.requires_grad], lr=toy.lr, weight_decay=0.01)
    for step in (bar := run.progress_bar(0, toy.steps, "target")):
        optimizer.param_groups[0]["lr"] = toy.lr * cosine(step, toy.steps, toy.lr_warmup, toy.lr_end)
        loss = target.loss(target.batch(toy.B, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.2e}", refresh=False)
    if isinstance(target, TMS):
        target.tie(False)
    return target.rotated() if toy.rotate else target
