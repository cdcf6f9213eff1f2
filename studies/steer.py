"""Steer a target: add one vector to the residual stream while it writes. Does it write a concept more often, and what?

    python -m studies.steer out/vpd-stdlib                   # 4 minutes on one CPU core
    python -m studies.steer out/vpd-s0 out/vpd-s1            # several runs in one table

A concept is a pattern in the text: a program says whether a continuation has it. The vector is the write vector of the
subcomponent of an MLP's `down` whose firing tells best, on half A of the validation text, that the concept begins next.
It is added behind its block at every position that writes. Vectors of the same length are the measure: the difference
of means, a token's direction, a transcoder's row (--dictionary), a random live subcomponent, a random direction. What a
steered text costs is its CE under the target that is not steered. <run>/steer/steer.json, steer.png.

  A. Concepts    patterns, where they begin
  B. Vectors     of each method; which block, which direction
  C. Text        continuations of prompts of half B; rate and CE; the frontier between them
  D. Table, figure
  E. The run

Left out: vectors that are chosen by how well they steer; judges that read.
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
from eval import Run, open_run, save_figure, subplots
from flags import UserError, require
from model import GPT
from run import command, run_script, write_text
from studies import weights
from studies.harvest import evaluated_importances, live_columns, names_of
from studies.weights import Piece, name_of

CONCEPTS = {  # patterns of bytes, as a token may be a part of a character
    "docstring": rb'"""',
    "test name": rb"\btest_\w",
    "hex or bytes": rb"\b0x[0-9a-fA-F]|\bb['\"]",
    "capitals": rb"\b[A-Z][A-Z_]{3,}\b",
}
STRENGTHS = (0.1, 0.25, 0.6, 1.5)  # length of the added vector over the mean length of the residual stream there
PROMPT, WRITTEN = 8, 32  # tokens of a prompt, and of its continuation
PRICE = 2.0  # nats a token of CE, up to which the area under the frontier is taken
SOLD_AT = 0.5  # nats a token: the price at which a rate is printed
FEWEST = 20  # positions of half A where a subcomponent fires, and where a concept begins, at least
DRAWS = 400  # of the bootstrap over prompts


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...]  # run folders of decompose.py
    windows: int = 512  # of each half of the validation text, of T tokens
    prompts: int = 256  # texts that each method continues at each strength, at most `windows`
    dictionary: str = ""  # folder of transcoders of studies.dictionaries on the same target, whose rows steer too
    seed: int = 0
    data_dir: str = ""  # where token files are kept; default as in each run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs=(): name at least one run folder")
        require(self, "above 0", "windows", "prompts")
        require(self, "0 or above", "seed")
        if self.prompts > self.windows:
            raise UserError(f"prompts={self.prompts}: at most the {self.windows} windows")


# ---------------------------------------------------------------------------------------------------------------------
# A. Concepts


def matches(corpus: data.Corpus, tokens: list[int], pattern: bytes) -> list[int]:
    """Tokens of a text in which a match of the pattern begins: their places."""
    pieces = [corpus.encoding.decode_single_token_bytes(token) for token in tokens]
    ends = np.cumsum([len(piece) for piece in pieces])
    return [int(np.searchsorted(ends, m.start(), "right")) for m in re.finditer(pattern, b"".join(pieces))]


def begins_next(corpus: data.Corpus, x: Tensor, pattern: bytes) -> Tensor:
    """Whether a match begins in the token after each position: bool [N, T] of windows x [N, T + 1]."""
    found = torch.zeros(len(x), x.shape[1] - 1, dtype=torch.bool)
    for b, tokens in enumerate(x.tolist()):
        for t in matches(corpus, tokens, pattern):
            if t:
                found[b, t - 1] = True
    return found


# ---------------------------------------------------------------------------------------------------------------------
# B. Vectors


@dataclass(frozen=True)
class Vector:
    """What is added behind a block of the target at strength 1, [d_model]; its length is that of the stream there."""

    block: int
    added: Tensor
    what: str  # for a person
    score: float | None = None  # correlation with the concept on half A, where it was chosen by it


@dataclass(frozen=True)
class Seen:
    """Half A: live subcomponents of every `down`, and the residual stream behind every block."""

    x: Tensor  # [N, T + 1]
    pieces: list[Piece]
    fires: Tensor  # bool [N T, n]
    a: Tensor  # [N T, n]
    streams: list[Tensor]  # n_layer x [N T, d_model]
    inputs: list[Tensor]  # of every MLP, n_layer x [N T, d_model]

    def scaled(self, block: int, direction: Tensor) -> Tensor:
        """A direction, as long as the stream behind a block is on average."""
        return direction / direction.norm() * self.streams[block].norm(dim=-1).mean()


def see(run: Run, corpus: data.Corpus, config: Config, tick: Callable[[int], object]) -> tuple[Seen, Tensor]:
    """Half A, looked at; and the prompts, of half B, [prompts, PROMPT]. UserError if no piece of a `down` is live."""
    A, B = weights.halves(corpus, run.config["T"], config.windows, config.seed)
    mean_g = evaluated_importances(run, corpus)[0]
    names = [name for name in names_of(run, live_columns(run, mean_g)) if name.rpartition(":")[0].endswith("mlp.down")]
    if not names:
        raise UserError(f"{run.folder}: no subcomponent of an MLP's down is live: there is nothing to steer with")
    pieces, blocks = weights.pieces_named(run, mean_g, names), run.decomposition.target.blocks
    streams: list[list[Tensor]] = [[] for _ in blocks]
    inputs: list[list[Tensor]] = [[] for _ in blocks]
    keep = lambda x, of: of.append(x.detach().flatten(0, 1).cpu())
    hooks = [
        block.register_forward_hook(lambda block, args, y, of=of: keep(y, of)) for block, of in zip(blocks, streams)
    ]
    hooks += [
        block.mlp.register_forward_pre_hook(lambda mlp, args, of=of: keep(args[0], of))
        for block, of in zip(blocks, inputs)
    ]
    try:
        fires, a = weights.firing(run, A[:, :-1], pieces, tick=tick)
    finally:
        for hook in hooks:
            hook.remove()
    streams, inputs = ([torch.cat(of) for of in parts] for parts in (streams, inputs))
    seen = Seen(A, pieces, fires.flatten(0, 1), a.detach().flatten(0, 1), streams, inputs)
    return seen, B[: config.prompts, : prompt_length(run)]


def prompt_length(run: Run) -> int:
    return max(1, min(PROMPT, run.config["T"] // 2))


def block_of(piece: Piece) -> int:
    """("blocks.1.mlp.down", 4) to 1."""
    return int(piece[0].split(".")[1])


def of_transcoders(folder: str, A: Seen, label: Tensor) -> Vector:
    """The decoder row of the latent whose firing tells best that the concept begins next; of per-layer transcoders.

    UserError for another kind of dictionary, or one of another target.
    """
    from studies import dictionary

    plt = dictionary.load(Path(folder))
    if plt.settings.kind != "plt" or plt.n != len(A.inputs) or plt.W_dec[0].shape[1] != A.inputs[0].shape[1]:
        shape = f"{plt.settings.kind} of {plt.n} layers of {plt.W_dec[0].shape[1]}"
        raise UserError(f"dictionary={folder}: {shape}, not plt of {len(A.inputs)} of {A.inputs[0].shape[1]}")
    best: tuple[float, int, int] = (-2.0, 0, 0)
    for l, x in enumerate(A.inputs):
        fires = plt.codes(l, x) > 0
        score = weights.correlation(fires.float(), label).masked_fill(fires.sum(0) < FEWEST, -1.0)
        best = max(best, (score.max().item(), l, int(score.argmax())))
    score, l, c = best
    return Vector(l, A.scaled(l, plt.own_decoder(l)[c]), f"{l}:{c}", score)


def vectors(run: Run, corpus: data.Corpus, A: Seen, label: Tensor, config: Config) -> dict[str, Vector]:
    """One vector a method for a concept that begins after the positions `label`, bool [N T] of half A.

    UserError if no subcomponent fires often enough.
    """
    generator, U = torch.Generator().manual_seed(config.seed), run.decomposition.U
    often = A.fires.sum(0) >= FEWEST
    if not often.any():
        raise UserError(f"{run.folder}: no subcomponent of a down fires {FEWEST} times in {len(label):,} positions")
    score = weights.correlation(A.fires.float(), label).masked_fill(~often, -torch.inf)
    best = int(score.argmax())
    block = block_of(A.pieces[best])

    def of_piece(i: int) -> Vector:
        name, c = A.pieces[i]
        sign = -1.0 if A.a[:, i][A.fires[:, i]].mean() < 0 else 1.0
        vector = A.scaled(block_of(A.pieces[i]), sign * U[name][:, c].detach().cpu())
        return Vector(block_of(A.pieces[i]), vector, name_of(A.pieces[i]), score[i].item())

    others = [i for i, piece in enumerate(A.pieces) if piece[0] == A.pieces[best][0] and i != best and often[i]] or [
        best
    ]
    other = others[int(torch.randint(len(others), (1,), generator=generator))]
    means = weights.difference_of_means(A.streams[block], label)
    first = int(torch.bincount(A.x[:, 1:].flatten()[label]).argmax())
    last, E = len(A.streams) - 1, run.unembedding.detach().cpu()
    drawn = torch.randn(len(means), generator=generator)
    transcoder = {"transcoder row": of_transcoders(config.dictionary, A, label)} if config.dictionary else {}
    return {
        "subcomponent": of_piece(best),
        **transcoder,
        "difference of means": Vector(block, A.scaled(block, means), f"behind block {block}"),
        "token direction": Vector(
            last, A.scaled(last, weights.direction_of(E, first)), repr(corpus.encoding.decode([first]))
        ),
        "random subcomponent": of_piece(other),
        "random direction": Vector(block, A.scaled(block, drawn), f"behind block {block}"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# C. Text


@torch.no_grad()
def continued(target: GPT, prompts: Tensor, n: int, block: int, added: Tensor, generator: torch.Generator) -> Tensor:
    """prompts [N, P] and n more tokens each, [N, P + n], sampled while `added` [d_model] is added behind a block.

    At the last token of the prompt and all that follow: where the next token is written.
    """
    P, tokens = prompts.shape[1], prompts
    since = lambda y: (torch.arange(y.shape[1], device=y.device) >= P - 1)[:, None] * added.to(y)
    with target.blocks[block].register_forward_hook(lambda block, args, y: y + since(y)):
        for _ in range(n):
            logits = F.linear(target.hidden(tokens)[:, -1], target.unembedding)
            drawn = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, drawn), 1)
    return tokens


@torch.no_grad()
def ce_of(target: GPT, tokens: Tensor, P: int) -> Tensor:
    """Mean CE in nats of each text's tokens from P on, under the target as it is: [N] of tokens [N, P + n]."""
    log_p = target(tokens[:, :-1])[:, P - 1 :].float().log_softmax(-1)
    return -log_p.gather(-1, tokens[:, P:, None])[..., 0].mean(-1).cpu()


def has_concept(corpus: data.Corpus, tokens: Tensor, P: int, pattern: bytes) -> Tensor:
    """Whether a match begins behind the P tokens of the prompt: 0 or 1, [N]."""
    return torch.tensor([float(any(t >= P for t in matches(corpus, row, pattern))) for row in tokens.tolist()])


def best_rates(rate: Tensor, ce: Tensor, prices: Tensor) -> Tensor:
    """The frontier: the best rate that costs at most each price, [prices, draws].

    rate, ce [strengths, draws], of rising strength, the first without steering; a price is CE above that one's. Between
    two strengths both go along a straight line.
    """
    cost, prices = ce - ce[0], prices[:, None]
    best = torch.full((len(prices), rate.shape[1]), -torch.inf, dtype=rate.dtype)
    for k in range(len(rate)):
        best = torch.where(cost[k] <= prices, torch.maximum(best, rate[k]), best)
        if k + 1 < len(rate):
            low, high = torch.minimum(cost[k], cost[k + 1]), torch.maximum(cost[k], cost[k + 1])
            share = (prices - cost[k]) / (cost[k + 1] - cost[k])
            crossing = (low < prices) & (prices < high)
            best = torch.where(crossing, torch.maximum(best, torch.lerp(rate[k], rate[k + 1], share)), best)
    return best


def with_interval(draws: Tensor) -> list[float]:
    """[plain value, 2.5 %, 97.5 %] of [draws + 1]."""
    return [draws[0].item(), *draws.quantile(torch.tensor([0.025, 0.975]).to(draws)).tolist()]


def measure(
    run: Run, corpus: data.Corpus, prompts: Tensor, vector: Vector, pattern: bytes, plain: tuple[Tensor, Tensor],
    config: Config, tick: Callable[[], object],
) -> dict:  # fmt: skip
    """Rate and CE of one vector at each strength; the area under its frontier and its rate at SOLD_AT, less the plain.

    plain: hits [N] and CE [N] of the texts that are not steered. A `gain` is above the rate without steering.
    """
    target, P, n = run.decomposition.target, prompts.shape[1], min(WRITTEN, run.config["T"] - prompts.shape[1])
    hits, ces = [plain[0]], [plain[1]]
    for strength in STRENGTHS:
        generator = torch.Generator(run.device).manual_seed(config.seed)
        text = continued(target, prompts, n, vector.block, strength * vector.added, generator)
        hits.append(has_concept(corpus, text, P, pattern))
        ces.append(ce_of(target, text, P))
        tick()
    draws = weights.resampled(len(prompts), DRAWS, torch.Generator().manual_seed(config.seed))
    rate, ce = (torch.stack(of).double() @ draws.T / len(prompts) for of in (hits, ces))  # [strengths, draws + 1]
    area = best_rates(rate, ce, torch.linspace(0, PRICE, 41).double()).mean(0)
    sold = best_rates(rate, ce, torch.tensor([SOLD_AT]).double())[0]
    return {
        "what": vector.what, "block": vector.block, "correlation": vector.score,
        "strengths": [0.0, *STRENGTHS], "rate": rate[:, 0].tolist(), "ce": ce[:, 0].tolist(),
        "gain_area": with_interval(area - rate[0]), "gain_sold": with_interval(sold - rate[0]),
    }  # fmt: skip


def settings(run: Run, config: Config) -> dict:
    """What the numbers of steer.json follow from."""
    return {"run_mark": run.mark} | {
        name: getattr(config, name) for name in ("windows", "prompts", "dictionary", "seed")
    }


def study(run: Run, corpus: data.Corpus, config: Config) -> dict:
    """steer.json of a run; written after each concept, and gone on with where it was left."""
    path, wanted = run.folder / "steer" / "steer.json", settings(run, config)
    anew = {"command": command(), "seconds": 0.0, "whole": False, "concepts": {}}
    found = weights.begun(path, wanted, "concepts", "whole", "seconds") or wanted | anew
    if found["whole"]:
        print(f"{run.folder}: as measured before; to do so again, delete {path}")
        return found
    if run.config["T"] < 2:
        raise UserError(f"{run.folder}: T={run.config['T']}: a prompt and its continuation need 2 tokens")
    began = time.time() - found["seconds"]
    with tqdm(total=config.windows, desc="Gamma", unit="window", mininterval=1, leave=False) as bar:
        A, prompts = see(run, corpus, config, bar.update)
    labels = {name: begins_next(corpus, A.x, pattern).flatten() for name, pattern in CONCEPTS.items()}
    rare = [name for name, label in labels.items() if label.sum() < FEWEST]
    if len(rare) == len(labels):
        raise UserError(f"{run.folder}: no concept begins {FEWEST} times in half A of {corpus.name}: edit CONCEPTS")
    if rare:
        print(f"{run.folder}: left out, as they begin under {FEWEST} times in half A: {', '.join(rare)}")
    prompts, P = prompts.to(run.device), prompts.shape[1]
    generator = torch.Generator(run.device).manual_seed(config.seed)
    n = min(WRITTEN, run.config["T"] - P)
    plain = continued(run.decomposition.target, prompts, n, 0, torch.zeros(A.streams[0].shape[-1]), generator)
    ce = ce_of(run.decomposition.target, plain, P)
    path.parent.mkdir(exist_ok=True)
    with tqdm(total=len(labels), desc="steer", unit="concept", leave=False) as bar:
        for name, label in labels.items():
            if name not in rare and name not in found["concepts"]:
                hits = has_concept(corpus, plain, P, CONCEPTS[name])
                of = vectors(run, corpus, A, label, config)
                tick = lambda: bar.update(1 / (len(of) * len(STRENGTHS)))
                found["concepts"][name] = {
                    "begins": int(label.sum()),
                    "rate": hits.mean().item(),
                    "methods": {
                        method: measure(run, corpus, prompts, vector, CONCEPTS[name], (hits, ce), config, tick)
                        for method, vector in of.items()
                    },
                }
                found["seconds"] = time.time() - began
                write_text(path, json.dumps(found, indent=1) + "\n")
    found["whole"] = True
    write_text(path, json.dumps(found, indent=1) + "\n")
    print(f"{run.folder}: {found['seconds']:.0f} s; written: {path}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# D. Table and figure


def table(runs: dict[str, dict]) -> str:
    """What each method adds to a concept's rate: mean over runs, least to most; runs whose interval is above 0."""
    lines = [f"texts with the concept: what steering adds to their share, at CE + {SOLD_AT:g}, and on average up to "]
    lines[0] += f"CE + {PRICE:g} nats a token"
    concepts = list(dict.fromkeys(name for found in runs.values() for name in found["concepts"]))
    for concept in concepts:
        of = [found["concepts"][concept] for found in runs.values() if concept in found["concepts"]]
        plain = sum(row["rate"] for row in of) / len(of)
        lines += ["", f"{concept}: {plain:.1%} without steering"]
        lines.append(
            f"  {'':22s} {f'CE + {SOLD_AT:g}':>8s} {'runs':>18s} {'area':>8s} {'runs':>18s} {'above 0':>9s}  vector"
        )
        for method in of[0]["methods"]:
            rows = [row["methods"][method] for row in of]
            cells = ""
            for what in ("gain_sold", "gain_area"):
                values = [row[what][0] for row in rows]
                cells += f" {sum(values) / len(values):8.3f} {f'{min(values):.3f} to {max(values):.3f}':>18s}"
            above = sum(row["gain_area"][1] > 0 for row in rows)
            lines.append(
                f"  {method:22s}{cells} {f'{above} of {len(rows)}':>9s}  {', '.join(row['what'] for row in rows)}"
            )
    return "\n".join(lines)


COLOURS = {
    "subcomponent": "#000000", "transcoder row": "#cc79a7", "difference of means": "#009e73",
    "token direction": "#0072b2", "random subcomponent": "#bbbbbb", "random direction": "#e69f00",
}  # fmt: skip


def plot(runs: dict[str, dict], path: Path) -> None:
    """Share of texts with a concept against their CE, a panel a concept, a thin line a run."""
    concepts = list(dict.fromkeys(name for found in runs.values() for name in found["concepts"]))
    figure, axes = subplots(1, len(concepts), (3.6 * len(concepts) + 1, 4.2), squeeze=False)
    for ax, concept in zip(axes[0], concepts):
        for found in runs.values():
            for method, row in found["concepts"].get(concept, {"methods": {}})["methods"].items():
                ax.plot(row["ce"], row["rate"], "o-", color=COLOURS[method], ms=3, lw=1, label=method)
        ax.set(title=concept, xlabel="CE under the target as it is, nats", ylim=(-0.03, 1.03))
        ax.grid(color="#eeeeee", lw=0.6)
    axes[0, 0].set_ylabel("share of texts with the concept")
    handles, names = axes[0, 0].get_legend_handles_labels()
    by_name = dict(zip(names, handles))
    figure.legend(by_name.values(), by_name, loc="outside lower center", ncols=6, fontsize=8)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# E. The run


def main(config: Config) -> None:
    of_run = lambda folder: open_run(folder, config.data_dir, config.device, ours=True)
    opened = {folder: of_run(folder) for folder in dict.fromkeys(config.runs)}
    runs = {folder: study(*of, config) for folder, of in opened.items()}
    print(f"\n{table(runs)}")
    path = next(iter(opened.values()))[0].folder / "steer" / "steer.png"
    plot(runs, path)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
