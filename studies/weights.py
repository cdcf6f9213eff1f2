"""Edits of a target's weight matrices, exact, and what they cost: the shared half of studies/edit.py and its kin.

  A. Names     "1.mlp.down:4" to a matrix and a column; where a subcomponent fires
  B. Edits     new weights {matrix: W'}: from rewritten subcomponents, neurons, read vectors; from a trained LoRA
  C. Reads     which direction tells firing positions from the others: a neuron, a singular vector, a mean
  D. Costs     KL in both directions, CE and a token's probability: where it fires, around, elsewhere; bootstrap
  E. Targets   an edited GPT, in memory and as a folder that decompose.py --target=... takes
  F. Goes on   what a study that was stopped has measured already

An edit holds at every position, whether or not anything fires there. Only W changes: Delta is what it was.
"""

import copy
import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

import checkpoints
import data
import train_target
from eval import Run
from flags import UserError
from model import GPT, Decomposition
from run import claims, new_folder, write_config
from studies.harvest import live_columns, names_of, short

AROUND = 20  # tokens on each side of a firing one that count as around it
Piece = tuple[str, int]  # a subcomponent: the name of its matrix, its number there

# ---------------------------------------------------------------------------------------------------------------------
# A. Names


def pieces_named(run: Run, mean_g: Tensor, names: Iterable[str]) -> list[Piece]:
    """ "1.mlp.down:4", or "blocks.1.mlp.down:4", to ("blocks.1.mlp.down", 4), for each of `names`.

    mean_g [C] of `harvest.evaluated_importances`. UserError for one that does not exist or is dead, with the live ones
    nearest to it, and for one that is named twice.
    """
    live = dict.fromkeys(names_of(run, live_columns(run, mean_g)))
    every = set(names_of(run, np.arange(len(mean_g))))
    found = []
    for name in names:
        given = short(name.strip())
        if given not in live:
            what = "is dead: its mean g is 0 or nearly" if given in every else "is no subcomponent of this run"
            raise UserError(f"subcomponent={name!r} {what}; live ones near it: {', '.join(nearest(given, list(live)))}")
        matrix, _, number = given.rpartition(":")
        piece = next(full for full in run.decomposition.names if short(full) == matrix), int(number)
        if piece in found:
            raise UserError(f"subcomponent={name!r} is named twice")
        found.append(piece)
    return found


def nearest(name: str, live: list[str], n: int = 4) -> list[str]:
    """The n of `live` whose number is nearest in the same matrix, or without one there in that of the likest name."""
    matrix, _, number = name.rpartition(":")
    matrices = list(dict.fromkeys(other.rpartition(":")[0] for other in live))
    if matrix not in matrices:
        matrix = (difflib.get_close_matches(matrix or name, matrices, 1, 0.0) or matrices)[0]
    at = int(number) if number.isdecimal() and len(number) < 10 else 0
    inside = [other for other in live if other.rpartition(":")[0] == matrix]
    return sorted(inside, key=lambda other: (abs(int(other.rpartition(":")[2]) - at), other))[:n]


def name_of(piece: Piece) -> str:
    """("blocks.1.mlp.down", 4) to "1.mlp.down:4"."""
    return f"{short(piece[0])}:{piece[1]}"


def column_of(decomposition: Decomposition, piece: Piece) -> int:
    """Where a subcomponent is among all C, as the last axis of g."""
    counts = [*decomposition.C.values()]
    return sum(counts[: decomposition.names.index(piece[0])]) + piece[1]


def token_named(corpus: data.Corpus, text: str) -> int:
    """The id of the token that is exactly this text. UserError if it is none or several, with how it would be split."""
    if corpus.encoding.name == "ids":
        raise UserError(f"token={text!r}: this corpus came as token ids, its vocabulary is unknown")
    ids = corpus.encoding.encode_ordinary(text)
    if len(ids) != 1:
        parts = " + ".join(repr(corpus.encoding.decode([i])) for i in ids[:8]) or "nothing"
        raise UserError(f"token={text!r} is not one token but {len(ids)}: {parts}{' + …' if len(ids) > 8 else ''}")
    return ids[0]


def halves(corpus: data.Corpus, T: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Half A of the validation text, to choose on, and half B, to judge on: int64 [N, T + 1] each, N at most n.

    A is the first half of the tokens, B the second. Windows of a half are in random order and share no position.
    UserError if a half has no whole window.
    """
    tokens = corpus.tokens["val"]
    middle, rng, found = len(tokens) // 2, np.random.default_rng(seed), []
    for first, end in ((0, middle), (middle, len(tokens))):
        starts = first + T * rng.permutation((end - first - 1) // T)[:n]
        if not len(starts):
            raise UserError(
                f"{corpus.name}: a half of its validation text has {end - first} tokens, under T + 1={T + 1}"
            )
        found.append(torch.from_numpy(tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64)))
    return found[0], found[1]


@torch.no_grad()
def firing(
    run: Run, windows: Tensor, pieces: Sequence[Piece], at_a_time: int = 32,
    tick: Callable[[int], object] = lambda n: None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Where subcomponents fire, g > 0 by Gamma on the unedited target, bool [N, T, n], and a = V_c^T x, [N, T, n].

    windows [N, T]. tick(n): n windows are done.
    """
    columns = torch.tensor([column_of(run.decomposition, piece) for piece in pieces], device=run.device)
    inputs_of = {name: l for l, name in enumerate(run.decomposition.names)}
    fires, a = [], []
    for x in windows.to(run.device).split(at_a_time):
        _, g, inputs = run.importances(x)
        fires.append((g[..., columns] > 0).cpu())
        a.append(torch.stack([inputs[inputs_of[m]] @ run.decomposition.V[m][:, c] for m, c in pieces], -1).cpu())
        tick(len(x))
    return torch.cat(fires), torch.cat(a)


# ---------------------------------------------------------------------------------------------------------------------
# B. Edits


@torch.no_grad()
def rewritten(decomposition: Decomposition, write: Mapping[Piece, Tensor | float]) -> dict[str, Tensor]:
    """Subcomponents with another write vector: W' = W + sum_c (U'_c - U_c) V_c^T, {matrix: W' [d_out, d_in]}.

    write: {piece: U'_c [d_out]}, or a factor f for U'_c = f U_c: 0 removes the subcomponent, 1 leaves it, 2 doubles it.
    Delta = W - U V^T is that of W and U before. With factor 0 the target is the masked model at m_c = 0, all else 1.
    """
    new = {}
    for (name, c), u in write.items():
        old, V = decomposition.U[name][:, c], decomposition.V[name][:, c]
        change = torch.outer((u if isinstance(u, Tensor) else u * old) - old, V)
        new[name] = new.get(name, decomposition.W(name)) + change
    return new


def removed(decomposition: Decomposition, pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """W' = W - sum_c U_c V_c^T of every matrix that holds some of `pieces`."""
    return rewritten(decomposition, dict.fromkeys(pieces, 0.0))


def rank_one(W: Tensor, write: Tensor, read: Tensor, old: Tensor | None = None) -> Tensor:
    """W + (write - old) read^T, [d_out, d_in]: read^T x, which wrote along `old`, writes along `write`; old None: 0."""
    return W + torch.outer(write if old is None else write - old, read)


@dataclass(frozen=True)
class Push:
    """How far a write vector goes, so that it does not depend on the length of the read vector it is paired with.

    sign: of the mean of a = read^T x where it fires; mean_a: the mean of |a| there; rms: RMS of the residual stream
    before the last norm there.
    """

    sign: float
    mean_a: float
    rms: float

    @classmethod
    def of(cls, a: Tensor, residual: Tensor) -> "Push":
        """a [n] and the residual stream [n, d_model] at the firing positions. UserError if there are none."""
        if not len(a):
            raise UserError("it fires nowhere in the text that was looked at: nothing says how far to push")
        sign = -1.0 if a.mean() < 0 else 1.0
        return cls(sign, max(a.abs().mean().item(), 1e-30), residual.pow(2).mean(-1).sqrt().mean().item())

    def write(self, direction: Tensor, push: float) -> Tensor:
        """s alpha u, u the unit vector of `direction`, alpha = push rms / mean |a|: on average it adds push rms u."""
        return self.sign * push * self.rms / self.mean_a * direction / direction.norm()


@torch.enable_grad()
def direction_of(E: Tensor, token: int, steps: int = 200) -> Tensor:
    """The unit vector u [d_model] for which softmax(sqrt(d_model) E u) is largest at `token`; E [vocab, d_model].

    A last hidden state has the norm sqrt(d_model), so that pushed along u without end the model says the token with
    this probability, the most that any single direction can give it.

    PAPER: the edit writes along the token's row of the unembedding. In so few dimensions that is often another
    token's best direction: the longer row of a similar one.
    """
    E = E.detach()
    h = (E[token] - E.mean(0)).clone().requires_grad_()
    optimizer = torch.optim.Adam([h], lr=0.05)
    for _ in range(steps):
        loss = -(E @ (h / h.norm()) * len(h) ** 0.5).log_softmax(-1)[token]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (h / h.norm()).detach()


def said_at_most(E: Tensor, direction: Tensor, token: int) -> float:
    """The probability of `token` where a last hidden state has been pushed along a direction [d_model] without end."""
    return (E @ direction / direction.norm() * len(direction) ** 0.5).softmax(-1)[token].item()


def train_lora(
    W: Mapping[str, Tensor], loss: Callable[[dict[str, Tensor], int], Tensor], steps: int, lr: float,
    generator: torch.Generator, rank: int = 1, tick: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:  # fmt: skip
    """{matrix: B A [d_out, d_in]}, the changes of low rank that minimise loss({matrix: W + B A}, step); AdamW.

    A ~ 0.01 N(0, 1) and B = 0, so that it starts from the target itself.
    """
    names = list(W)
    with torch.enable_grad():
        A = [0.01 * torch.randn(rank, W[n].shape[1], generator=generator, dtype=W[n].dtype) for n in names]
        A = [a.to(W[n].device).requires_grad_() for n, a in zip(names, A)]
        B = [W[n].new_zeros(W[n].shape[0], rank, requires_grad=True) for n in names]
        optimizer = torch.optim.AdamW([*A, *B], lr=lr, weight_decay=0.0)
        for step in range(steps):
            value = loss({n: W[n] + b @ a for n, a, b in zip(names, A, B)}, step)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            tick()
    return {n: (b @ a).detach() for n, a, b in zip(names, A, B)}


def logits_with(target: GPT, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """f(tokens | W'), [B, T, vocab], through which the new weights {matrix: W'} get a gradient."""
    return functional_call(target, {f"{name}.weight": W for name, W in weights.items()}, (tokens,))


# ---------------------------------------------------------------------------------------------------------------------
# C. Reads


def correlation(features: Tensor, fires: Tensor) -> Tensor:
    """Pearson correlation of each of n features [N, n] with fires, bool [N]: [n]; 0 where either does not vary."""
    features, fires = features.double() - features.double().mean(0), fires.double() - fires.double().mean()
    scale = (features.square().sum(0) * fires.square().sum()).sqrt()
    return torch.where(scale > 0, (features * fires[:, None]).sum(0) / scale.clamp(min=1e-300), 0.0)


def difference_of_means(x: Tensor, fires: Tensor, ridge: float | None = None) -> Tensor:
    """d = mean of x where it fires - mean of x elsewhere, [d_in], for x [N, d_in] and fires, bool [N].

    With `ridge` the linear discriminant S^-1 d, S the covariance of x where it does not fire, plus ridge times its mean
    eigenvalue: the read vector that tells the two apart best where both are normal with this covariance.
    """
    on, off = x[fires].double(), x[~fires].double()
    d = on.mean(0) - off.mean(0)
    if ridge is not None:
        S = torch.cov(off.T)
        d = torch.linalg.solve(S + ridge * S.diagonal().mean() * torch.eye(len(d), dtype=d.dtype, device=d.device), d)
    return d.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# D. Costs


def regions(fires: Tensor, radius: int = AROUND) -> dict[str, Tensor]:
    """Positions by where they are, bool [N, T] each: `firing`, `around`, within `radius` of one, `elsewhere`; `all`."""
    near = nn.functional.max_pool1d(fires[:, None].float(), 2 * radius + 1, 1, radius)[:, 0] > 0
    return {"firing": fires, "around": near & ~fires, "elsewhere": ~near, "all": torch.ones_like(fires)}


@torch.no_grad()
def costs(logits: Tensor, edited: Tensor, labels: Tensor, token: int | None = None) -> dict[str, Tensor]:
    """Of each position, what an edit changes, from the logits before and after, [..., vocab]: {what: [...]}.

    kl: KL(target || edited), reverse: KL(edited || target), ce: CE of the labels after less before, all in nats.
    p: the probability of `token` after the edit, if one is given.
    """
    return costs_of(logits.float().log_softmax(-1), edited.float().log_softmax(-1), labels, token)


def costs_of(log_p: Tensor, log_q: Tensor, labels: Tensor, token: int | None = None) -> dict[str, Tensor]:
    """`costs` from log probabilities before and after, [..., vocab]."""
    difference = log_p - log_q
    found = {"kl": (log_p.exp() * difference).sum(-1).clamp(min=0)}
    found["reverse"] = -(log_q.exp() * difference).sum(-1).clamp(max=0)
    found["ce"] = difference.gather(-1, labels[..., None])[..., 0]
    return found if token is None else found | {"p": log_q[..., token].exp()}


@torch.no_grad()
def costs_on(
    target: GPT, edited: GPT, windows: Tensor, token: int | None = None, at_a_time: int = 32,
    tick: Callable[[int], object] = lambda n: None,
) -> dict[str, Tensor]:  # fmt: skip
    """`costs` at every position of windows [N, T + 1], {what: [N, T]} on the CPU. tick(n): n windows are done."""
    found: dict[str, list[Tensor]] = {}
    for part in windows.to(target.unembedding.device).split(at_a_time):
        for what, value in costs(target(part[:, :-1]), edited(part[:, :-1]), part[:, 1:], token).items():
            found.setdefault(what, []).append(value.cpu())
        tick(len(part))
    return {what: torch.cat(parts) for what, parts in found.items()}


def mean_over(values: Tensor, region: Tensor) -> float:
    """Mean of values [N, T] over the positions of a region, bool [N, T]; nan if it has none."""
    return values[region].double().mean().item()


def resampled(n: int, times: int, generator: torch.Generator) -> Tensor:
    """How often each of n windows is in each of `times` draws of n with replacement, [times + 1, n]; row 0: once."""
    drawn = torch.cat((torch.arange(n)[None], torch.randint(0, n, (times, n), generator=generator)))
    return torch.zeros(times + 1, n, dtype=torch.double).scatter_add_(1, drawn, torch.ones(drawn.shape).double())


def bootstrap(values: Tensor, region: Tensor, draws: Tensor) -> Tensor:
    """Means of values [N, T] over a region, bool [N, T], of each row of `resampled`: [times + 1], first the plain one.

    nan where a draw has no position of the region.
    """
    values, region = values.double(), region.double()
    return (draws @ (values * region).sum(1)) / (draws @ region.sum(1))


# ---------------------------------------------------------------------------------------------------------------------
# E. Targets


def edited_target(target: GPT, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor] | None = None) -> GPT:
    """A copy of the target with new weights {matrix: W'} and, where there was no bias, biases {matrix: [d_out]}.

    UserError if a weight is not finite: with it the model says nothing.
    """
    edited = copy.deepcopy(target)
    for name, W in weights.items():
        if not W.isfinite().all():
            raise UserError(f"{short(name)} is not finite after the edit: give a smaller push or scale")
        edited.get_submodule(name).weight.data = W.detach().clone()
    for name, bias in (biases or {}).items():
        edited.get_submodule(name).bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return edited


def save_target(folder: str | Path, run: Run, weights: Mapping[str, Tensor]) -> Path:
    """The run's target with new weights {matrix: W'}, as a folder of train_target.py: config.json and checkpoint.pt.

    Returns the folder. UserError if anything is there already, with which nothing is done.
    """
    folder, checkpoint = Path(folder), run.checkpoint["target"]
    refuse_existing(folder)
    new = {f"{name}.weight": W.detach().cpu().clone() for name, W in weights.items()}
    # A setting that the target was trained before there was one had its default.
    config = checkpoints.settings(train_target.Config, asdict(train_target.Config()) | dict(checkpoint["config"]))
    with claims():
        new_folder(str(folder))
        write_config(folder, config, run.device)
        checkpoints.save(folder / "checkpoint.pt", "target", {**checkpoint, "model": {**checkpoint["model"], **new}})
    return folder


def refuse_existing(folder: Path) -> None:
    """UserError if there is a folder, or a file, where an edited target is to be saved."""
    if folder.exists():
        raise UserError(f"save={folder} exists already: name a folder that does not")


# ---------------------------------------------------------------------------------------------------------------------
# F. Goes on


def begun(path: Path, wanted: dict, parts: str, *others: str) -> dict | None:
    """A study's JSON to go on with, or None: if it is not there, not whole, or of other settings than `wanted`.

    parts: the key of what is measured part by part, a dictionary. others: what else it must have.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = {parts, *others} <= found.keys() and isinstance(found[parts], dict)
        return found if whole and found | wanted == found else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None
