"""Can a memorised string be removed from a target's weights through its subcomponents, and what would one use instead?

    python train_target.py --canaries=0,64,256,1024,0,64,256,1024+256,256 --out=out/target-canaries
    python decompose.py --target=out/target-canaries --out=out/vpd-canaries
    python -m studies.forget out/vpd-canaries       # 25 minutes on 2 CPU cores; what is done is kept, so it can go on

The target of the run was trained on canaries: see canaries.py. Half A of them, and of the validation text, chooses the
settings of every method; half B judges. A method changes the weights more and more, until the secret is forgotten: its
exposure is at most 1 bit of log2(1000), and greedy continuation gives no token of it. (A natural secret, of which any
model knows something: log p and tokens matched no more than those of a target that was trained without canaries.) What
is compared is the harm done by then: KL(target ‖ edited) on other text, and what comes back by training on a part of
the secret. The gold standard is the target trained anew without that canary.

It writes <run>/forget/: forget.json, kept.json, forget.png, and the targets and transcoders that it trained.

  A. Settings
  B. Lab       what the methods share, computed once for each canary and kept
  C. Methods   each a family of edits, weaker ones first
  D. Judging   how far to go, at what harm
  E. Table, figure
  F. The run

Left out: memorisation that nobody planted (each text is read a quarter of a time), and larger models.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import canaries
import checkpoints
import data
import run as runs
import train_target
from canaries import Canary
from eval import Run, open_run, save_figure, subplots
from flags import UserError, require
from losses import kl_divergence
from model import GPT
from studies import dictionary, memory
from studies.harvest import evaluated_importances, live_columns
from studies.importances import post_hoc
from studies.memory import Memory, WhereItFires, log_p
from studies.weights import costs_on, edited_target, halves

# ---------------------------------------------------------------------------------------------------------------------
# A. Settings

FORGOTTEN = 1.0  # bits of exposure, at most
NS = (1, 2, 4, 8, 16, 32, 64)  # of a ranking so many parts go
COEFFICIENTS = (0.1, 0.3, 1.0, 3.0)  # of minimality, in post-hoc importances
CANDIDATES = 64  # the parts of largest gain whose cost is measured
FEW = 99  # other secrets that a rank is first taken among, where settings are chosen
RELEARN = (1, 4, 16)  # steps
RELEARN_LR = 1e-3


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py, of a target that was trained with --canaries
    windows: int = 64  # sequences of validation text, of each half
    secrets: int = 1000  # R: a secret's rank is among so many
    steps: int = 100  # of gradient ascent, at most
    posthoc_steps: int = 300  # of post-hoc importances
    plt_steps: int = 700  # of the training of transcoders
    retrain: bool = True  # train the targets without a canary; without them no natural canary is judged
    seed: int = 0
    data_dir: str = ""  # where token files are kept; default as in the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        require(self, "above 0", "windows", "secrets", "steps", "posthoc_steps", "plt_steps")
        require(self, "0 or above", "seed")


def split(planted: Sequence[Canary]) -> tuple[list[int], list[int]]:
    """Numbers of the canaries of half A, to choose on, and half B, to judge on: the first half of each kind, the rest.

    Canaries that were never planted are in neither: there is nothing to remove.
    """
    found: tuple[list[int], list[int]] = [], []
    for natural in (False, True):
        kind = [i for i, canary in enumerate(planted) if canary.natural == natural]
        for i in kind:
            if planted[i].dose > 0:
                found[i in kind[len(kind) // 2 :]].append(i)
    return found


@dataclass(frozen=True)
class Half:
    """What settings are chosen on, or what they are judged on: nothing of one half is in the other."""

    name: str  # A or B
    canaries: dict[int, Canary]
    windows: Tensor  # of validation text, int64 [N, T + 1]


# ---------------------------------------------------------------------------------------------------------------------
# B. Lab


class Kept:
    """kept.json: results by name, on the disk as soon as they are there, if they are of this run and these settings."""

    def __init__(self, path: Path, of: dict) -> None:
        self.path, self.of, self.found = path, of, {}
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            self.found = before["found"] if before["of"] == of else {}
        except (OSError, ValueError, TypeError, KeyError):
            pass

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of that name: plain values."""
        if name not in self.found:
            self.found[name] = compute()
            runs.write_text(self.path, json.dumps({"of": self.of, "found": self.found}) + "\n")
        return self.found[name]


@dataclass
class Lab:
    """What the methods share. Finders and ascents read training text, never validation text."""

    run: Run
    target: GPT
    corpus: data.Corpus
    planted: list[Canary]
    config: Config
    kept: Kept
    text: Tensor  # training text without canaries, [N, T + 1]
    live: np.ndarray  # columns of live subcomponents
    mean_g: Tensor  # [C]
    unplanted: dict[int, Memory] = field(default_factory=dict)  # what a target without canaries has of each
    retrained: dict[int, GPT] = field(default_factory=dict)  # the target trained anew without that canary
    gradients: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    latents: list[dictionary.PLT] = field(default_factory=list)  # of `transcoder`, once it is trained
    never_seen: dict[int, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return self.run.decomposition.names

    @property
    def pieces(self) -> list[tuple[str, int]]:
        """(matrix, number) of every column of g."""
        return [(name, c) for name, n in self.run.decomposition.C.items() for c in range(n)]

    def others(self, i: int) -> Tensor:
        """R - 1 secrets of the kind of canary i's that were never planted: random ones, or passages of the text."""
        if i not in self.never_seen:
            self.never_seen[i] = self.draw_others(i).to(self.run.device)
        return self.never_seen[i]

    def draw_others(self, i: int) -> Tensor:
        rng, n = np.random.default_rng([self.config.seed, i, 2]), self.config.secrets - 1
        tokens = np.asarray(self.corpus.tokens["train"])
        if not self.planted[i].natural:
            return canaries.random_secrets(tokens, n, rng)
        starts = rng.integers(0, len(tokens) - canaries.SECRET, size=n)
        return torch.from_numpy(tokens[starts[:, None] + np.arange(canaries.SECRET)].astype(np.int64))

    def memory(self, model: GPT, i: int, among: int | None = None) -> Memory:
        """What a model has of canary i; among: of so many of the others alone, which is faster."""
        canary, device = self.planted[i], self.run.device
        return Memory.of(model, canary.prefix.to(device), canary.secret.to(device), self.others(i)[:among])

    def gradient(self, i: int) -> dict[str, Tensor]:
        """d log p(secret of canary i) / dW of every decomposed matrix."""
        if i not in self.gradients:
            canary, device = self.planted[i], self.run.device
            prefix, secret = canary.prefix.to(device), canary.secret.to(device)
            self.gradients[i] = memory.gradient(self.target, prefix, secret, self.names)
        return self.gradients[i]

    def cost(self, name: str, model: Callable[[], Any]) -> float:
        """KL(target ‖ model) on training text, of the model that lacks this part alone, nats a token."""
        return self.kept(f"cost {name}", lambda: kl_on(self, model(), self.text[:32]))

    def transcoder(self) -> dictionary.PLT:
        """Per-layer transcoders of the target, trained on the decomposition's own text, with canaries at its rate."""
        if not self.latents:
            folder, T, seed = self.run.folder / "forget" / "plt", self.run.config["T"], self.config.seed
            settings = dictionary.Settings(T=T, seed=seed, steps=self.config.plt_steps)
            if not (folder / "settings.json").exists():
                rate = self.run.checkpoint["target"], self.corpus, settings.steps, settings.B, T, seed
                schedule = canaries.of_stream(*rate)

                def batch(step: int) -> Tensor:
                    windows = self.corpus.batch("train", step, settings.B, T, seed)
                    return schedule.plant(windows, step)[:, :-1].to(self.run.device)

                dictionary.save(dictionary.train([settings], self.target, batch, "transcoders")[0], folder)
            self.latents.append(dictionary.load(folder).to(self.run.device))
        return self.latents[0]

    def mean_inputs(self) -> dict[str, Tensor]:
        """The mean input of every decomposed matrix over training text, {matrix: [d_in]}."""
        _, _, inputs = self.run.importances(self.text[:, :-1])
        return {name: x.flatten(0, -2).mean(0) for name, x in zip(self.names, inputs)}


def by_gain(gains: Tensor, cost: Callable[[int], float], floor: float | None) -> list[int]:
    """Finder B: parts by gain / (cost + floor), best first; only gains above 0, of the CANDIDATES largest.

    floor: nats a token; None: by gain alone, whatever the cost.
    """
    best = [int(c) for c in gains.argsort(descending=True)[:CANDIDATES] if gains[c] > 0]
    if floor is None:
        return best
    return sorted(best, key=lambda c: -gains[c].item() / (cost(c) + floor))


def rank_by_gain(lab: Lab, i: int, floor: float | None) -> list[int]:
    """Columns of subcomponents for canary i, by `by_gain`."""
    f, pieces = lab.run.decomposition, lab.pieces
    gains = memory.gains_of_pieces(f, lab.gradient(i))
    without = lambda c: edited_target(lab.target, memory.without_pieces(f, [pieces[c]]))
    return by_gain(gains, lambda c: lab.cost(f"piece {c}", lambda: without(c)), floor)


def rank_by_difference(lab: Lab, i: int) -> list[int]:
    """Finder C: columns by mean g where the secret is predicted less mean g elsewhere, in training text; no gradients.

    The canary is written into 16 windows, at places in turn.
    """
    length, T1 = canaries.LENGTH, lab.text.shape[1]
    windows = lab.text[:16].clone()
    offsets = [j * (T1 - length) // max(1, len(windows) - 1) for j in range(len(windows))]
    inside = torch.zeros(len(windows), T1 - 1, dtype=torch.bool)
    for j, offset in enumerate(offsets):
        windows[j, offset : offset + length] = lab.planted[i].tokens.to(windows)
        inside[j, offset + canaries.PREFIX - 1 : offset + length - 1] = True
    g = lab.run.importances(windows[:, :-1])[1].flatten(0, 1)
    elsewhere = lab.run.importances(lab.text[:16, :-1])[1].flatten(0, 1)
    difference = g[inside.flatten().to(g.device)].mean(0) - elsewhere.mean(0)
    return [int(c) for c in difference.argsort(descending=True)[: max(NS)] if difference[c] > 0]


def rank_by_importance(lab: Lab, i: int, coefficient: float) -> list[int]:
    """Finder A: columns by the sum over positions of post-hoc importances for the whole secret, adversarial variant.

    All COEFFICIENTS go through at once.
    """

    def found() -> dict[str, list[int]]:
        tokens = lab.planted[i].tokens.to(lab.run.device)[None]
        x, y, first = tokens[:, :-1].expand(len(COEFFICIENTS), -1), tokens[0, canaries.PREFIX :], canaries.PREFIX - 1

        def loss(hidden: Tensor) -> Tensor:  # CE summed over the secret, [R]
            log_q = F.linear(hidden[:, first:], lab.target.unembedding).log_softmax(-1)
            return -log_q.gather(-1, y.expand(len(hidden), -1)[..., None])[..., 0].sum(1)

        with torch.no_grad():
            z = lab.run.ci_fn(lab.run.decomposition.target_pass(x)[1]).float()
        generator = torch.Generator(lab.run.device).manual_seed(lab.config.seed)
        coefficients, steps = torch.tensor(COEFFICIENTS, device=z.device), lab.config.posthoc_steps
        g = post_hoc(lab.run.decomposition, x, loss, z, coefficients, "adversarial", steps, generator).sum(1)  # [R, C]
        best = [[int(c) for c in row.argsort(descending=True)[: max(NS)] if row[c] > 0] for row in g]
        return {f"{c:g}": order for c, order in zip(COEFFICIENTS, best)}

    return lab.kept(f"importances {i}", found)[f"{coefficient:g}"]


def rank_at_random(lab: Lab, i: int) -> list[int]:
    """Live columns, each of about the density, mean g, of the one at its place in the ranking by gain alone."""
    rng, order = np.random.default_rng([lab.config.seed, i, 3]), lab.live[lab.mean_g[lab.live].argsort().numpy()]
    found: list[int] = []
    for c in rank_by_gain(lab, i, None):
        near = np.argsort(np.abs(lab.mean_g[order].numpy() - lab.mean_g[c].item()), kind="stable")[:20]
        left = [int(o) for o in order[near] if int(o) not in found]
        found += [int(rng.choice(left))] if left else []
    return found


def rank_by_norm(lab: Lab) -> list[int]:
    """Live columns by ||U_c|| ||V_c||, the largest first."""
    f = lab.run.decomposition
    size = torch.cat([f.U[name].norm(dim=0) * f.V[name].norm(dim=0) for name in f.names])
    return [int(c) for c in lab.live[size.detach()[lab.live].argsort(descending=True).cpu().numpy()][: max(NS)]]


# ---------------------------------------------------------------------------------------------------------------------
# C. Methods


@dataclass(frozen=True)
class Edit:
    """A changed model. strength: parts removed, or steps of ascent."""

    strength: int
    model: Any  # a GPT, or what memory.py calls a model
    weights: dict[str, Tensor]  # {matrix: W'}


@dataclass(frozen=True)
class Method:
    """edits(lab, i, **setting): edits against canary i, weaker ones first, for each setting of the grid."""

    edits: Callable[..., Iterator[Edit]]
    grid: tuple[dict[str, Any], ...] = ({},)


def grid(**values: tuple) -> tuple[dict[str, Any], ...]:
    """Every combination of the values."""
    found: list[dict[str, Any]] = [{}]
    for name, each in values.items():
        found = [setting | {name: value} for setting in found for value in each]
    return tuple(found)


def without_top(
    lab: Lab, ranking: Sequence[int], kappa: float = 1.0, mean: bool = False, units: bool = False, fires: bool = False
) -> Iterator[Edit]:
    """The first n of a ranking removed, for n in NS; mean: their mean output stays; fires: only where g > 0."""
    for n in [n for n in NS if n <= len(ranking)] or [len(ranking)]:
        if units:
            every = memory.units_of(lab.target)
            weights = memory.without_columns(lab.target, [every[c] for c in ranking[:n]])
        else:
            weights = memory.without_pieces(lab.run.decomposition, [lab.pieces[c] for c in ranking[:n]])
        weights = memory.scaled(lab.target, weights, kappa)
        biases = memory.means_kept(lab.target, weights, lab.mean_inputs()) if mean else None
        model = WhereItFires(lab.run, ranking[:n]) if fires else edited_target(lab.target, weights, biases)
        yield Edit(n, model, {} if fires else weights)


def by_importance(lab: Lab, i: int, coefficient: float) -> Iterator[Edit]:
    return without_top(lab, rank_by_importance(lab, i, coefficient))


def by_gain_and_cost(lab: Lab, i: int, floor: float, **variant) -> Iterator[Edit]:
    return without_top(lab, rank_by_gain(lab, i, floor), **variant)


def by_difference(lab: Lab, i: int) -> Iterator[Edit]:
    return without_top(lab, rank_by_difference(lab, i))


def at_random(lab: Lab, i: int) -> Iterator[Edit]:
    return without_top(lab, rank_at_random(lab, i))


def by_norm(lab: Lab, i: int) -> Iterator[Edit]:
    return without_top(lab, rank_by_norm(lab))


def neurons_and_heads(lab: Lab, i: int, floor: float, mean: bool) -> Iterator[Edit]:
    units = memory.units_of(lab.target)
    gains = memory.gains_of_units(lab.target, units, lab.gradient(i))
    without = lambda c: edited_target(lab.target, memory.without_columns(lab.target, [units[c]]))
    ranking = by_gain(gains, lambda c: lab.cost(f"unit {c}", lambda: without(c)), floor)
    return without_top(lab, ranking, mean=mean, units=True)


def latents(lab: Lab, i: int, floor: float) -> Iterator[Edit]:
    """What the first n latents of a ranking write is taken from the MLPs' outputs."""
    canary, device, plt = lab.planted[i], lab.run.device, lab.transcoder()
    gains = memory.gains_of_latents(lab.target, plt, canary.prefix.to(device), canary.secret.to(device))
    without = lambda some: memory.WithoutLatents(lab.target, plt, some)
    ranking = by_gain(gains, lambda c: lab.cost(f"latent {c}", lambda: without([c])), floor)
    for n in [n for n in NS if n <= len(ranking)] or [len(ranking)]:
        yield Edit(n, without(ranking[:n]), {})


def ascended(lab: Lab, i: int, change: memory.Change, lr: float, beta: float) -> Iterator[Edit]:
    """Gradient ascent, looked at where log p is near that of secrets never seen, and else at steps 1, 2, 4, 8, ..."""
    canary, device = lab.planted[i], lab.run.device
    prefix, secret = canary.prefix.to(device), canary.secret.to(device)
    near = lab.kept(f"others {i}", lambda: log_p(lab.target, prefix, lab.others(i))[0].sum(1).median().item()) + 10
    parts = lab.text[:, :-1].split(8)
    for step, (weights, before) in enumerate(memory.ascent(lab.target, change, prefix, secret, lr, beta, parts), 1):
        last = step == lab.config.steps
        if before <= near or last or step & (step - 1) == 0:
            try:
                yield Edit(step, edited_target(lab.target, weights), weights)
            except UserError:  # a weight is not finite: it has diverged
                return
        if last:
            return


def all_weights(lab: Lab, i: int, lr: float, beta: float = 0.0) -> Iterator[Edit]:
    return ascended(lab, i, memory.full(lab.target, lab.names), lr, beta)


def few_weights(lab: Lab, i: int, lr: float, beta: float, share: float = 1e-3) -> Iterator[Edit]:
    return ascended(lab, i, memory.largest_gradient(lab.target, lab.gradient(i), share), lr, beta)


def lora(lab: Lab, i: int, where: str, rank: int, lr: float, beta: float) -> Iterator[Edit]:
    names = lab.names if where == "all" else [name for name in lab.names if name.endswith(where)]
    generator = torch.Generator().manual_seed(lab.config.seed)
    return ascended(lab, i, memory.low_rank(lab.target, names or lab.names, rank, generator), lr, beta)


def write_vectors(lab: Lab, i: int, lr: float, beta: float, n: int = 16) -> Iterator[Edit]:
    pieces = [lab.pieces[c] for c in rank_by_gain(lab, i, None)[:n]]
    return ascended(lab, i, memory.write_vectors(lab.run.decomposition, pieces), lr, beta)


FLOORS = (1e-4, 1e-3, 1e-2)  # nats a token, added to a cost
RATES = (1e-3, 1e-2, 1e-1)
METHODS = {
    "pieces: post-hoc importance": Method(by_importance, grid(coefficient=COEFFICIENTS)),
    "pieces: gain / cost": Method(by_gain_and_cost, grid(floor=(*FLOORS, None))),
    "pieces: difference of g": Method(by_difference),
    "pieces: gain / cost, mean kept": Method(by_gain_and_cost, grid(floor=FLOORS, mean=(True,))),
    "pieces: gain / cost, scaled": Method(by_gain_and_cost, grid(floor=FLOORS, kappa=(0.5, 1.5, 2.0))),
    "pieces: only where g > 0 (no edit)": Method(by_gain_and_cost, grid(floor=FLOORS, fires=(True,))),
    "pieces: at random": Method(at_random),
    "pieces: largest norm": Method(by_norm),
    "write vectors of 16 pieces + KL": Method(write_vectors, grid(lr=RATES, beta=(10.0,))),
    "neurons and heads": Method(neurons_and_heads, grid(floor=FLOORS, mean=(False, True))),
    "latents of transcoders (no edit)": Method(latents, grid(floor=FLOORS)),
    "gradient ascent": Method(all_weights, grid(lr=(1e-4, 1e-3, 1e-2))),
    "gradient ascent + KL": Method(all_weights, grid(lr=(3e-4, 1e-3, 3e-3), beta=(10.0, 100.0))),
    "LoRA + KL": Method(
        lora, grid(where=("1.mlp.down", "all"), rank=(1, 4), lr=(3e-3, 1e-2), beta=(10.0,))
    ),
    "0.1 % of the weights + KL": Method(few_weights, grid(lr=RATES, beta=(10.0,))),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# D. Judging


def is_forgotten(found: Memory, natural: bool, unplanted: Memory | None) -> bool:
    """Whether nothing of a secret is left. unplanted: what a target without canaries has of it, for a natural one."""
    if natural:
        return found.log_p <= unplanted.log_p and found.matched <= unplanted.matched
    return found.exposure <= FORGOTTEN and found.matched == 0


def kl_on(lab: Lab, model: Any, windows: Tensor) -> float:
    """KL(target ‖ model) on windows [N, T + 1], mean in nats a token."""
    return costs_on(lab.target, model, windows)["kl"].double().mean().item()


def walk(lab: Lab, half: Half, i: int, method: Method, setting: dict, curve: bool) -> dict:
    """Stronger and stronger edits against canary i of a half, until it is forgotten, and the harm of the last.

    Returns the points met, {strength, log_p, matched, exposure, kl if `curve`}, whether it is forgotten, the KL on the
    half's windows, in nats a token, seconds; and, with `curve`, `detail` of the last edit.
    """
    began, points, edit, done = time.time(), [], None, False
    for edit in method.edits(lab, i, **setting):
        found = lab.memory(edit.model, i, None if curve else FEW)
        if not curve and found.exposure <= 3 * FORGOTTEN:  # else it is far from forgotten, by few as by many
            found = lab.memory(edit.model, i)
        points.append({"strength": edit.strength} | asdict(found))
        if curve:
            points[-1]["kl"] = kl_on(lab, edit.model, half.windows)
        if done := is_forgotten(found, lab.planted[i].natural, lab.unplanted.get(i)):
            break
    seconds = time.time() - began
    if edit is None:  # it diverges at once
        return {"points": [], "forgotten": False, "kl": None, "seconds": seconds}
    kl = points[-1]["kl"] if curve else kl_on(lab, edit.model, half.windows)
    result = {"points": points, "forgotten": done, "kl": kl, "seconds": seconds}
    return result | ({"detail": detail(lab, half, i, edit)} if curve else {})


def chosen(results: dict[str, list[dict]]) -> str:
    """The setting that forgets most canaries of half A; among those the one of least mean KL."""

    def badness(setting: str) -> tuple[int, float]:
        kls = [math.inf if r["kl"] is None else r["kl"] for r in results[setting]]
        return -sum(r["forgotten"] for r in results[setting]), sum(kls)

    return min(results, key=badness)


def detail(lab: Lab, half: Half, i: int, edit: Edit) -> dict:
    """What an edit against canary i does elsewhere, on half B alone; log p are sums over a secret, in nats.

    dce, dce_tokens: change of CE on validation text, and where the next token is one of the secret's. natural: change
    of log p of the text that follows the prefix where it comes from. others: mean change of log p of the half's other
    canaries. in_text: log p behind other text. paraphrase: log p behind a prefix with one token changed. relearned:
    exposure of the second half of the secret after so many steps on the first. rank, changed: of W' - W, summed.
    from_gold: KL(retrained ‖ edited), nats a token, on the canary itself and on validation text.
    """
    canary, model, device = lab.planted[i], edit.model, lab.run.device
    prefix, secret = canary.prefix.to(device), canary.secret.to(device)
    of_text, labels = costs_on(lab.target, model, half.windows), half.windows[:, 1:].cpu()
    among = torch.isin(labels, canary.secret)
    found: dict[str, Any] = {"dce": of_text["ce"].mean().item(), "reverse_kl": of_text["reverse"].mean().item()}
    found["kl_of_windows"] = of_text["kl"].double().mean(1).tolist()
    found["dce_tokens"] = of_text["ce"][among].double().mean().item() if among.any() else None

    def change(p: Tensor, s: Tensor) -> float:
        return (log_p(model, p, s[None])[0].sum() - log_p(lab.target, p, s[None])[0].sum()).item()

    tokens = np.asarray(lab.corpus.tokens["train"])
    start = int(canaries.places(tokens, canary.prefix.numpy())[0]) + canaries.PREFIX
    follows = torch.from_numpy(tokens[start : start + canaries.SECRET].astype(np.int64)).to(device)
    found["natural"] = None if canary.natural else change(prefix, follows)
    others = [other for j, other in half.canaries.items() if j != i]
    changes = [change(other.prefix.to(device), other.secret.to(device)) for other in others]
    found["others"] = float(np.mean(changes)) if changes else None
    context = min(30, lab.target.config.context - canaries.LENGTH + 1)
    behind = [torch.cat((window[:context].to(device), prefix)) for window in half.windows[:8]]
    found["in_text"] = float(np.mean([log_p(model, p, secret[None])[0].sum().item() for p in behind]))
    rng = np.random.default_rng([lab.config.seed, i, 4])
    changed = []
    for t in range(len(prefix)):
        changed.append(prefix.clone())
        changed[-1][t] = int(rng.choice(canaries.frequent_tokens(tokens)))
    found["paraphrase"] = float(np.mean([log_p(model, p, secret[None])[0].sum().item() for p in changed]))
    if edit.weights:
        differences = [(W - lab.target.get_submodule(n).weight).detach() for n, W in edit.weights.items()]
        found["rank"] = sum(int(torch.linalg.matrix_rank(d)) for d in differences)
        found["changed"] = sum(int((d != 0).sum()) for d in differences)
    if isinstance(model, GPT):
        found["relearned"] = relearning(lab, i, model)
    if i in lab.retrained:
        found["from_gold"] = distance(lab, half, i, lab.retrained[i], model)
    return found


@torch.no_grad()
def distance(lab: Lab, half: Half, i: int, of: GPT, model: Any) -> dict[str, float]:
    """KL(of ‖ model) on canary i and on a half's windows, nats a token."""
    x = lab.planted[i].tokens.to(lab.run.device)[None, :-1]
    on_text = costs_on(of, model, half.windows)["kl"].mean().item()
    return {"canary": kl_divergence(of(x), model(x)).item(), "text": on_text}


def relearning(lab: Lab, i: int, model: GPT) -> list[float]:
    """Exposure, bits, of the second half of the secret after RELEARN steps on the first half."""
    canary, device, half = lab.planted[i], lab.run.device, canaries.SECRET // 2
    prefix, secret, others = canary.prefix.to(device), canary.secret.to(device), lab.others(i)
    found = []
    for steps in RELEARN:
        weights = memory.relearned(model, lab.names, prefix, secret[:half], steps, RELEARN_LR)
        again = edited_target(model, weights)
        found.append(Memory.of(again, torch.cat((prefix, secret[:half])), secret[half:], others[:, half:]).exposure)
    return found


def trained_anew(lab: Lab, name: str, without: Sequence[int], seed: int) -> GPT:
    """The target trained again in <run>/forget/<name>, with the doses of these canaries at 0. A function of the seed.

    UserError if the text is not the same any more.
    """
    folder = lab.run.folder / "forget" / name
    checkpoint = lab.run.checkpoint["target"]
    saved = checkpoints.settings(train_target.Config, checkpoint["config"])
    doses = [0 if i in without else canary.dose for i, canary in enumerate(lab.planted)]
    random, natural = ([str(d) for c, d in zip(lab.planted, doses) if c.natural == kind] for kind in (False, True))
    planted = ",".join(random) + ("+" + ",".join(natural) if natural else "")
    same = {"data_dir": str(lab.corpus.folder.parent) if lab.corpus.folder else saved.data_dir, "seed": seed}
    wanted = replace(saved, canaries=planted if any(doses) else "", out=str(folder), resume="", **same)
    if (folder / "config.json").exists():
        wanted = replace(wanted, resume=str(folder))
    train_target.main(wanted)
    found = checkpoints.load_checkpoint(folder / "checkpoint.pt", "target")
    if found["tokens"] != checkpoint["tokens"]:
        raise UserError(f"{folder}: it was trained on another text than the target: delete it")
    return train_target.build_target(found).to(lab.run.device).requires_grad_(False)


def gold(lab: Lab, half: Half, i: int, unplanted: GPT) -> dict:
    """The target trained without canary i, as a result of `walk`, and KL(it ‖ a target of another seed)."""
    model = lab.retrained[i]
    kl = kl_on(lab, model, half.windows)
    found = {"points": [{"strength": 0} | asdict(lab.memory(model, i)) | {"kl": kl}], "forgotten": True, "kl": kl}
    found |= {"seconds": None, "detail": detail(lab, half, i, Edit(0, model, {}))}
    return found | {"another_seed": distance(lab, half, i, model, unplanted)}


# ---------------------------------------------------------------------------------------------------------------------
# E. Table and figure


def interval(values: Sequence[float], seed: int = 0, times: int = 2000) -> tuple[float, float]:
    """2.5 % and 97.5 % of the mean over a bootstrap of these values."""
    drawn = np.random.default_rng(seed).choice(np.array(values), size=(times, len(values)))
    return tuple(float(q) for q in np.quantile(drawn.mean(1), (0.025, 0.975)))


def mean_of(results: Sequence[dict], what: str, last: int | None = None) -> float:
    """Mean over canaries of a number of `detail`; nan where none has it."""
    values = [r["detail"].get(what) for r in results if "detail" in r]
    values = [v if last is None else v[last] for v in values if v is not None]
    return float(np.mean(values)) if values else math.nan


def unmatched(result: dict) -> float:
    """The KL of the first edit after which greedy continuation gives no token of the secret; nan if none does."""
    return next((p["kl"] for p in result["points"] if p["matched"] == 0), math.nan)


def table(found: dict) -> str:
    """forget.json for a person: means over the canaries of half B."""
    head = "|forgot|strength|rank|KL, no match|KL|95 %|dCE|others|in text|relearned|seconds".split("|")
    form = "{:36s} {:>7s} {:>9s} {:>5s} {:>12s} {:>8s} {:>15s} {:>7s} {:>8s} {:>8s} {:>9s} {:>8s}"
    lines = [form.format(*head)]
    for name, judged in found["judged"].items():
        results = list(judged["results"].values())
        kls = [math.nan if r["kl"] is None else r["kl"] for r in results]
        strengths = ",".join(str(r["points"][-1]["strength"]) if r["points"] else "-" for r in results)
        low, high = interval(kls)
        seconds = [r["seconds"] for r in results if r["seconds"] is not None]
        rank, dce, others, in_text = (mean_of(results, what) for what in ("rank", "dce", "others", "in_text"))
        forgot = f"{sum(r['forgotten'] for r in results)} of {len(results)}"
        known = [i for i in judged["results"] if found["canaries"][int(i)]["target"]["matched"] > 0]
        no_match = np.mean([unmatched(judged["results"][i]) for i in known]) if known else math.nan
        cells = [name, forgot, strengths, f"{rank:.0f}", f"{no_match:.4f}", f"{np.mean(kls):.4f}"]
        cells += [f"{low:.4f}-{high:.4f}", f"{dce:+.3f}", f"{others:+.2f}", f"{in_text:.1f}"]
        cells += [f"{mean_of(results, 'relearned', -1):.2f}", f"{np.mean(seconds):.1f}" if seconds else ""]
        lines.append(form.format(*cells))
    return "\n".join(lines)


COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#000000", "#7f7f7f")


def plot(found: dict, path: Path) -> None:
    """What is left of each secret against the harm done, a panel a judged canary; a ring where it is forgotten."""
    numbers = list(next(iter(found["judged"].values()))["results"])
    figure, axes = subplots(1, len(numbers), (4.2 * len(numbers) + 1, 5.6), squeeze=False)
    for ax, i in zip(axes[0], numbers):
        about = found["canaries"][int(i)]
        for j, (name, judged) in enumerate(found["judged"].items()):
            points = [p for p in judged["results"][i]["points"] if p.get("kl")]
            style = {"color": COLOURS[j % len(COLOURS)], "ls": ("-", "--", ":")[j // len(COLOURS) % 3], "label": name}
            if name == "trained anew":
                ax.axhline(judged["results"][i]["points"][0]["log_p"], lw=1, **style)
                continue
            x, y = [max(p["kl"], 1e-6) for p in points], [p["log_p"] for p in points]
            ax.plot(x, y, marker="o", ms=3, lw=1.1, **style)
            if judged["results"][i]["forgotten"] and points:
                ax.plot(x[-1], y[-1], "o", ms=9, mfc="none", color=style["color"])
        kind = "text" if about["natural"] else "random"
        ax.set(xscale="log", title=f"canary {i}: {kind}, dose {about['dose']}", ylim=(-160, 3))
        ax.set_xlabel("KL(target ‖ edited) on other text, nats a token")
    axes[0, 0].set_ylabel("log p(secret | prefix), nats")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# F. The run


def open_lab(config: Config) -> Lab:
    """The run, its canaries and training text. UserError if its target was trained without, or too few of them."""
    run, corpus = open_run(config.run, config.data_dir, config.device, ours=True)
    planted = canaries.of_target(run.checkpoint["target"], corpus)
    if not all(split(planted)):
        what = "needs a target trained on canaries, some of each half at a dose above 0"
        raise UserError(f"{config.run}: the study {what}: train_target.py --canaries=0,64,256,1024,0,64,256,1024")
    folder = run.folder / "forget"
    folder.mkdir(exist_ok=True)
    settings = {
        name: getattr(config, name)
        for name in ("windows", "secrets", "steps", "posthoc_steps", "plt_steps", "retrain", "seed")
    }
    kept = Kept(folder / "kept.json", {"run_mark": run.mark} | settings)
    mean_g = evaluated_importances(run, corpus)[0]
    text = corpus.batch("train", 2**40, 64, run.config["T"], config.seed).to(run.device)
    live = live_columns(run, mean_g)
    return Lab(run, run.decomposition.target, corpus, planted, config, kept, text, live, mean_g.cpu())


def in_halves(lab: Lab) -> tuple[Half, Half]:
    """Half A, to choose on, and half B, to judge on; without `retrain` no natural canary is in either."""
    windows = halves(lab.corpus, lab.run.config["T"], lab.config.windows, lab.config.seed)
    kept = lambda numbers: {i: lab.planted[i] for i in numbers if lab.config.retrain or not lab.planted[i].natural}
    return tuple(
        Half(name, kept(numbers), w.to(lab.run.device)) for name, numbers, w in zip("AB", split(lab.planted), windows)
    )


def known(lab: Lab, i: int) -> dict:
    """A canary, and what the target and one without canaries have of it."""
    canary = lab.planted[i]
    prefix, secret = (lab.corpus.encoding.decode(part.tolist()) for part in (canary.prefix, canary.secret))
    found = {"prefix": prefix, "secret": secret, "dose": canary.dose, "natural": canary.natural}
    found |= {"target": asdict(lab.memory(lab.target, i))}
    return found | ({"unplanted": asdict(lab.unplanted[i])} if i in lab.unplanted else {})


def study(lab: Lab) -> dict:
    """forget.json: what each model has of each canary; the settings chosen on half A; every method judged on half B."""
    A, B = in_halves(lab)
    if lab.config.retrain:
        seed = lab.run.checkpoint["target"]["config"]["seed"]
        unplanted = trained_anew(lab, "unplanted", range(len(lab.planted)), seed + 1)
        lab.unplanted = {i: lab.memory(unplanted, i) for i in range(len(lab.planted))}
        lab.retrained = {i: trained_anew(lab, f"without-{i}", [i], seed) for i in B.canaries}
    about = [
        known(lab, i) | {"half": "A" * (i in A.canaries) + "B" * (i in B.canaries)} for i in range(len(lab.planted))
    ]
    for i, row in enumerate(about):
        said = f"exposure {row['target']['exposure']:5.2f} bits, log p {row['target']['log_p']:7.1f}"
        print(f"canary {i}: dose {row['dose']:5d}, {said}, {row['target']['matched']:2d} tokens matched")

    work = [(name, s) for name, method in METHODS.items() for s in method.grid if len(method.grid) > 1]
    bar = tqdm(total=len(work) * len(A.canaries) + len(METHODS) * len(B.canaries), desc="forget", mininterval=1)

    def walked(half: Half, i: int, name: str, setting: dict, curve: bool) -> dict:
        bar.set_postfix_str(name, refresh=False)
        key = f"{half.name} {i} {name} {json.dumps(setting)}"
        result = lab.kept(key, lambda: walk(lab, half, i, METHODS[name], setting, curve))
        bar.update()
        return result

    judged = {}
    for name, method in METHODS.items():
        setting = method.grid[0]
        if len(method.grid) > 1:
            results = {json.dumps(s): [walked(A, i, name, s, False) for i in A.canaries] for s in method.grid}
            setting = json.loads(chosen(results))
        judged[name] = {"setting": setting, "results": {str(i): walked(B, i, name, setting, True) for i in B.canaries}}
    bar.close()
    if lab.config.retrain:
        of_gold = {str(i): lab.kept(f"gold {i}", lambda i=i: gold(lab, B, i, unplanted)) for i in B.canaries}
        judged["trained anew"] = {"setting": {}, "results": of_gold}
    return {"run_mark": lab.run.mark, "command": runs.command(), "canaries": about, "judged": judged}


def main(config: Config) -> None:
    began = time.time()
    lab = open_lab(config)
    with runs.claims():
        runs.claim(lab.run.folder / "forget")
        found = study(lab) | {"config": asdict(config), "seconds": time.time() - began}
        folder = lab.run.folder / "forget"
        runs.write_text(folder / "forget.json", json.dumps(found, indent=2) + "\n")
        plot(found, folder / "forget.png")
    print("\n" + table(found))
    print(f"\nwritten: {folder}/forget.json, {folder}/forget.png")


if __name__ == "__main__":
    runs.run_script(main, Config, __doc__)
