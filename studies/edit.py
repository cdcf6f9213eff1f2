"""Edit a target by hand, and see what the edit does where its subcomponent fires, around there, and elsewhere.

    python -m studies.edit out/vpd-stdlib --subcomponent=1.mlp.down:4 --token=" get"     # 15 s on one CPU core
    python -m studies.edit out/vpd-stdlib --subcomponent=1.mlp.down:4 --scale=0          # removes it; 2 doubles it
    python -m studies.edit out/vpd-stdlib --subcomponent=1.mlp.down:4 --scale=0 --save=out/edited    # a target folder
    python -m studies.edit out/vpd-s0 out/vpd-s1 --study     # 2 minutes a run: would LoRA have been better?

An edit is exact: W' = W + (U'_c - U_c) V_c^T, at every position, whether c fires there or not. With --token the new
write vector U'_c points along that token's row of the unembedding (paper, "Editing"). --push says how far: the mean of
|U'_c a_c| where c fires, over the RMS of the residual stream before the last norm. Without it, the push that makes
the token's probability there 0.7 on half A of the validation text. All that is printed is of half B.

The study edits the last matrix. It takes pieces and tokens by rule, and brings every method to the same probability
where the piece fires. Then what it costs around there and elsewhere can be compared. <run>/edit/study.json, edit.png.

  A. Text      where pieces fire, in both halves of the validation text
  B. One edit
  C. The study: methods, each a line of edits along which the probability rises; costs at equal probability
  D. Table, figure
  E. The run

Left out: edits of q, k, v and up by a token, as they do not write to the residual stream.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
from eval import Run, open_run, save_figure, subplots
from flags import UserError, require
from model import GPT, rms_norm
from run import command, run_script, write_text
from studies import weights
from studies.harvest import evaluated_importances, live_columns, names_of, short
from studies.weights import Piece, Push, mean_over, name_of, regions, rewritten
from train_target import generate

LEVELS = (0.25, 0.5, 0.75, 0.9, 0.97)  # probabilities on half A, whose strengths are taken to half B
AT = (0.5, 0.7, 0.9)  # probabilities on half B, at which methods are compared
LAMBDAS = (1.0, 30.0, 1000.0)  # weights of the KL in LoRA's loss
LORA_LR = 1e-2  # better than 1e-3 and 3e-3 on half A
STRENGTHS = torch.logspace(-2, 4, 37)  # of which those for LEVELS are interpolated
NEAR, RANDOM = 64, 64  # windows of half B that hold a firing position, and any
DRAWS = 400  # of the bootstrap over windows
FEWEST, MOST = 100, 0.02  # positions, and share of them, of half A where a piece of the study fires
FREQUENT = 256  # the tokens of the study are among so many, the most frequent
SAYABLE = 0.99  # and can be said with this probability


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...]  # run folders of decompose.py; several for the study alone
    subcomponent: tuple[str, ...] = ()  # what to edit, as report.html names it; may be given several times
    token: str = ""  # write towards this token instead
    push: float = 0.0  # how far, in RMS of the residual stream; 0: to a probability of 0.7
    scale: float = 1.0  # without a token: factor on the subcomponents
    save: str = ""  # folder for the edited target, which must not exist
    study: bool = False  # compare with other ways to edit; so it is without a subcomponent
    windows: int = 512  # of each half of the validation text, of T tokens
    pieces: int = 3  # subcomponents of the study, each with two tokens
    steps: int = 300  # of each LoRA of the study
    seed: int = 0
    data_dir: str = ""  # where token files are kept; default as in each run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs=(): name at least one run folder")
        require(self, "above 0", "windows", "pieces", "steps")
        require(self, "0 or above", "push", "scale", "seed")
        if self.study and self.subcomponent:
            raise UserError("study=True: the study takes its subcomponents by rule, leave out --subcomponent")
        if self.subcomponent and len(self.runs) > 1:
            raise UserError(f"runs={' '.join(self.runs)}: a subcomponent belongs to one run")
        if self.subcomponent and not self.token and self.scale == 1:
            raise UserError("scale=1.0: that changes nothing; give --token, or another --scale")
        if self.token and self.scale != 1:
            raise UserError(f"scale={self.scale}: either a token or a scale, not both")
        if self.push and not self.token:
            raise UserError(f"push={self.push}: towards which token? give --token")
        if not self.subcomponent and (self.token or self.scale != 1 or self.save):
            raise UserError("subcomponent=(): name what is to be edited, as --subcomponent=1.mlp.down:4")


# ---------------------------------------------------------------------------------------------------------------------
# A. Text


@dataclass(frozen=True)
class Text:
    """A half of the validation text and n pieces: where they fire by Gamma, on the unedited target."""

    x: Tensor  # [N, T + 1]
    fires: Tensor  # bool [N, T, n]
    a: Tensor  # V_c^T x, [N, T, n]
    stream: Tensor  # residual stream before the last norm, [N, T, d_model]
    inputs: Tensor  # of the matrix of the first piece, [N, T, d_in]

    def push_of(self, i: int) -> Push:
        return Push.of(self.a[..., i][self.fires[..., i]], self.stream[self.fires[..., i]])


def read(run: Run, x: Tensor, pieces: list[Piece], tick: Callable[[int], object]) -> Text:
    """Windows x [N, T + 1] seen by the target and Gamma; tick(n): n windows are done."""
    target, stream, inputs = run.decomposition.target, [], []
    hooks = [target.blocks[-1].register_forward_hook(lambda block, args, y: stream.append(y.cpu()))]
    layer = target.get_submodule(pieces[0][0])
    hooks.append(layer.register_forward_hook(lambda layer, args, y: inputs.append(args[0].detach().cpu())))
    try:
        fires, a = weights.firing(run, x[:, :-1], pieces, tick=tick)
    finally:
        for hook in hooks:
            hook.remove()
    return Text(x, fires, a.detach(), torch.cat(stream).detach(), torch.cat(inputs))


def read_halves(run: Run, corpus: data.Corpus, pieces: list[Piece], config: Config) -> tuple[Text, Text]:
    halves = weights.halves(corpus, run.config["T"], config.windows, config.seed)
    with tqdm(total=sum(map(len, halves)), desc="Gamma", unit="window", mininterval=1, leave=False) as bar:
        A, B = (read(run, x, pieces, bar.update) for x in halves)
    return A, B


# ---------------------------------------------------------------------------------------------------------------------
# B. One edit

REACHED = 0.7  # the probability that a push is looked for, where none is given; 0.9 costs several times as much


def written(run: Run, A: Text, pieces: list[Piece], direction: Tensor, push: float) -> dict[str, Tensor]:
    """All pieces write along a direction [d_model] instead, each as far as `push` says: {matrix: W'}."""
    return rewritten(run.decomposition, {piece: A.push_of(i).write(direction, push) for i, piece in enumerate(pieces)})


def push_for(p_of: Callable[[float], float], wanted: float) -> tuple[float, float]:
    """The least push of a doubling row that makes the probability p_of(push) `wanted`, refined to 2 %, and that p.

    If none does, one that makes it 90 % of the most that any of the row does.
    """
    row: dict[float, float] = {}
    for k in range(-2, 14):
        row[2.0**k] = p_of(2.0**k)
        if row[2.0**k] >= wanted:
            break
    if max(row.values()) < wanted:
        wanted = 0.9 * max(row.values())
    high = next(push for push, p in row.items() if p >= wanted)
    low, p = high / 2, row[high]
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        if (p_middle := p_of(middle)) >= wanted:
            high, p = middle, p_middle
        else:
            low = middle
    return high, p


def holding(fires: Tensor, n: int) -> Tensor:
    """The first n windows with a firing position, of bool [N, T]: their numbers. UserError if there are none."""
    found = fires.any(1).nonzero()[:n, 0]
    if not len(found):
        raise UserError("it fires nowhere in the text that was looked at: give more --windows")
    return found


def single(run: Run, corpus: data.Corpus, config: Config) -> None:
    """One edit: what it costs on half B, text before and after, and the saved target."""
    token = weights.token_named(corpus, config.token) if config.token else None
    if config.save:
        weights.refuse_existing(Path(config.save))
    pieces = weights.pieces_named(run, evaluated_importances(run, corpus)[0], config.subcomponent)
    if token is not None:
        for piece in pieces:
            if not piece[0].endswith((".o", ".down")):
                where = f"{short(piece[0])} does not write to the residual stream"
                raise UserError(f"subcomponent={name_of(piece)}: {where}: no token to write towards; use --scale")
    A, B = read_halves(run, corpus, pieces, config)
    target, push = run.decomposition.target, config.push
    if token is None:
        new = rewritten(run.decomposition, dict.fromkeys(pieces, config.scale))
        print(f"edit: {', '.join(map(name_of, pieces))} times {config.scale:g}")
    else:
        near = holding(A.fires.any(-1), 32)
        x, fires = A.x[near], A.fires.any(-1)[near]
        direction = weights.direction_of(run.unembedding, token)

        def p_of(push: float) -> float:
            edited = weights.edited_target(target, written(run, A, pieces, direction, push))
            return mean_over(weights.costs_on(target, edited, x, token)["p"], fires)

        if not push:
            most = weights.said_at_most(run.unembedding, direction, token)
            push, p = push_for(p_of, REACHED * most)
            if p < 0.9 * REACHED:
                said = f"p({config.token!r}) comes to {p:.2g} on half A where it fires"
                print(f"{said}; {most:.2g} is the most that a push along one direction can give")
        new = written(run, A, pieces, direction, push)
        print(f"edit: {', '.join(map(name_of, pieces))} writes {config.token!r}, --push={push:.3g}")
    edited = weights.edited_target(target, new)
    print(cost_table(run, corpus, edited, pieces, B, token, config.token))
    print(before_and_after(run, corpus, edited, B, config.seed))
    if config.save:
        folder = weights.save_target(config.save, run, new)
        print(f"saved: {folder}, a target: python decompose.py --target={folder}")


def cost_table(
    run: Run, corpus: data.Corpus, edited: GPT, pieces: list[Piece], B: Text, token: int | None, said: str
) -> str:
    """What the edit costs on half B: where a piece fires and around; on random windows elsewhere and all in all."""
    target, fires = run.decomposition.target, B.fires.any(-1)
    near = holding(fires, NEAR)
    lines = []
    for piece, n in zip(pieces, B.fires.sum((0, 1)).tolist()):
        share = n / B.fires[..., 0].numel()
        lines.append(f"{name_of(piece)} fires at {n:,} of {B.fires[..., 0].numel():,} positions of half B, {share:.2%}")
    head = f"{'nats a token':16s} {'positions':>9s} {'KL(target‖edited)':>18s} {'KL(edited‖target)':>18s} {'CE':>17s}"
    lines += ["", head + (f" {f'p({said!r})':>18s}" if token is not None else "")]
    for windows, kinds in ((near, ("firing", "around")), (torch.arange(min(RANDOM, len(B.x))), ("elsewhere", "all"))):
        x, where = B.x[windows], regions(fires[windows])
        after = weights.costs_on(target, edited, x, token)
        before = before_the_edit(target, x, token)
        for kind in kinds:
            region = where[kind]
            if not region.any():
                continue
            ce = mean_over(before["ce"], region)
            numbers = f"{mean_over(after['kl'], region):18.4f} {mean_over(after['reverse'], region):18.4f}"
            numbers += f" {ce:7.3f} → {ce + mean_over(after['ce'], region):.3f}"
            if token is not None:
                numbers += f" {mean_over(before['p'], region):9.4f} → {mean_over(after['p'], region):.4f}"
            what = {"firing": "where it fires", "around": f"within {weights.AROUND}"}.get(kind, kind)
            lines.append(f"{what:16s} {int(region.sum()):9,} {numbers}")
    return "\n".join(lines)


@torch.no_grad()
def before_the_edit(target: GPT, x: Tensor, token: int | None) -> dict[str, Tensor]:
    """CE of the labels, and p of a token, of the target itself at windows x [N, T + 1]: {what: [N, T]}."""
    found: dict[str, list[Tensor]] = {"ce": [], "p": []}
    for part in x.to(target.unembedding.device).split(32):
        log_p = target(part[:, :-1]).log_softmax(-1)
        found["ce"].append(-log_p.gather(-1, part[:, 1:, None])[..., 0].cpu())
        found["p"].append(log_p[..., token or 0].exp().cpu())
    return {what: torch.cat(parts) for what, parts in found.items()}


def before_and_after(run: Run, corpus: data.Corpus, edited: GPT, B: Text, seed: int, n: int = 3) -> str:
    """Text of half B up to a firing position, and its continuation by the target and by the edited one, same draws."""
    T, fires, lines = run.config["T"], B.fires.any(-1), []
    late = fires & (torch.arange(fires.shape[1]) >= min(8, fires.shape[1] // 2))
    for b in late.any(1).nonzero()[:n, 0].tolist():
        t = int(late[b].nonzero()[0, 0])
        prompt = B.x[b : b + 1, : t + 1].to(run.device)
        lines += ["", "prompt: …" + shown(corpus, prompt[0, -16:].tolist())]
        for what, f in (("before", run.decomposition.target), ("after", edited)):
            generator = torch.Generator(run.device).manual_seed(seed)
            text = generate(f, prompt, 24, T, generator)[0, t + 1 :].tolist()
            lines.append(f"{what:>6s}: {shown(corpus, text)[:90]}")
    return "\n".join(lines)


def shown(corpus: data.Corpus, tokens: list[int]) -> str:
    """Tokens as text on one line."""
    text = corpus.encoding.decode(tokens).replace("\n", "⏎")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


# ---------------------------------------------------------------------------------------------------------------------
# C. The study


@dataclass(frozen=True)
class Line:
    """Edits of the last matrix along which the token's probability rises: W + fixed + s rising, bias s bias, s > 0."""

    fixed: Tensor  # [d_out, d_in]
    rising: Tensor  # [d_out, d_in]
    bias: Tensor  # [d_out]

    def at(self, strength: float) -> tuple[Tensor, Tensor]:
        """The change of W and of the bias."""
        return self.fixed + strength * self.rising, strength * self.bias


class Judge:
    """Windows of a half as the last matrix sees them: all that follows it is a norm and the unembedding."""

    def __init__(self, run: Run, text: Text, i: int, windows: Tensor) -> None:
        self.E, fires = run.unembedding.detach().cpu(), text.fires[windows, :, i]
        self.stream, self.inputs, self.labels = text.stream[windows], text.inputs[windows], text.x[windows, 1:]
        self.log_p = (rms_norm(self.stream) @ self.E.T).log_softmax(-1)  # [N, T, vocab], of the target
        self.regions = regions(fires)
        self.regions["others"] = ~fires

    def costs(self, line: Line, strength: float, token: int) -> dict[str, Tensor]:
        """`weights.costs` at every position, [N, T] each, some windows at a time."""
        change, bias = line.at(strength)
        parts: dict[str, list[Tensor]] = {}
        for s in range(0, len(self.stream), 16):
            stream, inputs, labels, log_p = (
                of[s : s + 16] for of in (self.stream, self.inputs, self.labels, self.log_p)
            )
            log_q = (rms_norm(stream + inputs @ change.T + bias) @ self.E.T).log_softmax(-1)
            for what, value in weights.costs_of(log_p, log_q, labels, token).items():
                parts.setdefault(what, []).append(value)
        return {what: torch.cat(of) for what, of in parts.items()}


def strengths_for(line: Line, stream: Tensor, inputs: Tensor, E: Tensor, token: int) -> list[float | None]:
    """Of each of LEVELS the smallest strength at which the mean of p(token) reaches it, between those of STRENGTHS.

    stream [n, d_model] and inputs [n, d_in] at firing positions. None where no strength does.
    """
    fixed, rising = stream + inputs @ line.fixed.T, inputs @ line.rising.T + line.bias
    p = torch.stack([(rms_norm(fixed + s * rising) @ E.T).softmax(-1)[:, token].mean() for s in STRENGTHS])
    found: list[float | None] = []
    for level in LEVELS:
        above = (p >= level).nonzero()
        if not len(above):
            found.append(None)
            continue
        k = int(above[0, 0])
        if k == 0:
            found.append(STRENGTHS[0].item())
            continue
        share = ((level - p[k - 1]) / (p[k] - p[k - 1])).item()
        found.append(math.exp(torch.lerp(STRENGTHS[k - 1].log(), STRENGTHS[k].log(), share).item()))
    return found


def study_pieces(run: Run, corpus: data.Corpus, A: Text, live: list[Piece], n: int) -> list[tuple[int, int, float]]:
    """The pieces to edit, by rule: (which of `live`, the token predicted most often where it fires, its share).

    Of those that fire at FEWEST positions of half A at least and at most at MOST of them: the largest shares first, and
    of each predicted token one alone.
    """
    predicted = run.logits(rms_norm(A.stream.to(run.device)).flatten(0, 1)).argmax(-1).cpu()
    fires, found = A.fires.flatten(0, 1), []
    for i in range(len(live)):
        count = torch.bincount(predicted[fires[:, i]], minlength=corpus.vocab_size)
        if FEWEST <= fires[:, i].sum() <= MOST * len(fires):
            found.append((i, int(count.argmax()), (count.max() / count.sum()).item()))
    best: list[tuple[int, int, float]] = []
    for row in sorted(found, key=lambda row: -row[2]):
        if row[1] not in {token for _, token, _ in best}:
            best.append(row)
    if not best:
        why = f"no live one fires at {FEWEST} to {MOST * len(fires):.0f} of {len(fires):,} positions"
        raise UserError(f"{run.folder}: nothing to edit in {short(live[0][0])}: {why}; give more --windows")
    return best[:n]


def study_tokens(run: Run, A: Text, i: int, predicted: int) -> dict[str, int]:
    """What to write instead, by rule: the runner-up of the mean prediction where it fires, and the unlikeliest there.

    Of the FREQUENT tokens that are most frequent in half A, those that some direction gives a probability of SAYABLE.
    """
    p = run.logits(rms_norm(A.stream[A.fires[..., i]].to(run.device))).softmax(-1).mean(0).cpu()
    frequent = torch.bincount(A.x.flatten(), minlength=len(p)).topk(min(FREQUENT, len(p))).indices.tolist()
    E, found = run.unembedding.detach(), {}
    for kind, sign in (("plausible", -1), ("implausible", 1)):
        for token in sorted(frequent, key=lambda token: sign * p[token].item()):
            most = weights.said_at_most(E, weights.direction_of(E, token), token)
            if token != predicted and token not in found.values() and most >= SAYABLE:
                found[kind] = token
                break
    return found


def rule_token(A: Text, i: int) -> tuple[int, float]:
    """The input token that tells best where piece i fires in half A, and its F1."""
    x, fires = A.x[:, :-1].flatten(), A.fires[..., i].flatten()
    count, hits = torch.bincount(x), torch.bincount(x[fires], minlength=int(x.max()) + 1)
    f1 = 2 * hits / (count + fires.sum())
    return int(f1.argmax()), f1.max().item()


def lines_of(run: Run, A: Text, live: list[Piece], i: int, token: int, other: int) -> dict[str, Line]:
    """The methods without training, as lines of edits. other: a random live piece of the same matrix."""
    name, W = live[i][0], run.decomposition.W(live[i][0]).detach().cpu()
    U, V = (of[name].detach().cpu() for of in (run.decomposition.U, run.decomposition.V))
    E = run.unembedding.detach().cpu()
    u, inputs, fires = weights.direction_of(E, token), A.inputs.flatten(0, 1), A.fires[..., i].flatten()
    stream, nothing, no_bias = A.stream.flatten(0, 1)[fires], torch.zeros_like(W), torch.zeros(W.shape[0])

    def along(read: Tensor, old: Tensor, u: Tensor = u) -> Line:
        """What read^T x made `old`, it makes u instead."""
        write = Push.of(inputs[fires] @ read, stream).write(u, 1.0)
        return Line(torch.outer(-old, read), torch.outer(write, read), no_bias)

    c, neuron = live[i][1], int(weights.correlation(inputs, fires).abs().argmax())
    svd_U, S, svd_V = torch.linalg.svd(W, full_matrices=False)
    k = int(weights.correlation(inputs @ svd_V.T, fires).abs().argmax())
    means, whitened = (weights.difference_of_means(inputs, fires, ridge) for ridge in (None, 1e-2))
    of_piece = torch.outer(-U[:, c], V[:, c])  # the piece itself is taken out

    def oracle(read: Tensor) -> Line:
        line = along(read, torch.zeros(W.shape[0]))
        return Line(of_piece, line.rising, no_bias)

    rms = stream.pow(2).mean(-1).sqrt().mean()
    return {
        "subcomponent": along(V[:, c], U[:, c]),
        "subcomponent, added": along(V[:, c], torch.zeros(W.shape[0])),
        "subcomponent, row of E": along(V[:, c], U[:, c], E[token]),
        "difference of means": oracle(means),
        "discriminant": oracle(whitened),
        "neuron": along(F.one_hot(torch.tensor(neuron), W.shape[1]).to(W), W[:, neuron]),
        "SVD direction": along(svd_V[k], svd_U[:, k] * S[k]),
        "random subcomponent": along(V[:, live[other][1]], U[:, live[other][1]]),
        "bias": Line(nothing, nothing, rms * u / u.norm()),
    }


def lora_lines(
    run: Run, A: Text, name: str, where: Tensor, n: int, token: int, config: Config, tick: Callable[[], object]
) -> list[Line]:
    """LoRAs of rank 1 on the last matrix, one for each of LAMBDAS: CE(token) at n positions of `where`, bool [N, T]

    (0: all), plus lambda KL(target || edited) at the other positions of their windows. 128 positions of each a step.
    """
    generator = torch.Generator().manual_seed(config.seed)
    W, E = run.decomposition.W(name).detach().cpu(), run.unembedding.detach().cpu()
    flat = where.flatten().nonzero()[:, 0]
    chosen = flat[torch.randperm(len(flat), generator=generator)[: n or len(flat)]]
    windows = torch.zeros(len(where), dtype=torch.bool).index_fill_(0, chosen // where.shape[1], True)
    others = (windows[:, None] & ~where).flatten().nonzero()[:, 0]
    stream, inputs = A.stream.flatten(0, 1), A.inputs.flatten(0, 1)
    lines = []
    for weight in LAMBDAS:
        drawn = torch.Generator().manual_seed(config.seed)

        def loss(new: dict[str, Tensor], step: int) -> Tensor:
            on = chosen[torch.randint(len(chosen), (min(128, len(chosen)),), generator=drawn)]
            off = others[torch.randint(len(others), (128,), generator=drawn)]
            at = torch.cat((on, off))
            log_q = (rms_norm(stream[at] + inputs[at] @ (new[name] - W).T) @ E.T).log_softmax(-1)
            log_p = (rms_norm(stream[off]) @ E.T).log_softmax(-1)
            kl = F.kl_div(log_q[len(on) :], log_p, log_target=True, reduction="none").sum(-1).mean()
            return weight * kl - log_q[: len(on), token].mean()

        change = weights.train_lora({name: W}, loss, config.steps, LORA_LR, generator)[name]
        lines.append(Line(torch.zeros_like(W), change, torch.zeros(W.shape[0])))
        tick()
    return lines


def at_level(p: Tensor, cost: Tensor, level: float) -> Tensor:
    """The cost at which p would be `level`, between neighbours in (logit p, cost): p, cost [strengths, draws].

    nan where p does not pass the level.
    """
    logit, wanted = p.clamp(1e-9, 1 - 1e-9).logit(), math.log(level / (1 - level))
    found = torch.full(p.shape[1:], torch.nan, dtype=p.dtype)
    for k in range(len(p) - 1):
        inside = (logit[k] <= wanted) & (wanted <= logit[k + 1]) & found.isnan() & (logit[k] < logit[k + 1])
        share = (wanted - logit[k]) / (logit[k + 1] - logit[k])
        found = torch.where(inside, torch.lerp(cost[k], cost[k + 1], share), found)
    return found


Judged = dict[str, Tensor]  # {"kl around": [len(AT), draws + 1], ...}, and "p" [strengths, draws + 1]


def judged(near: Judge, anywhere: Judge, edits: list[tuple[Line, float]], token: int, draws: tuple) -> Judged:
    """Costs on half B at each probability of AT, for every draw of windows. Empty where there are under two edits.

    edits: of rising probability, each a line and its strength.
    """
    if len(edits) < 2:
        return {}
    rows: dict[str, list[Tensor]] = {}
    for line, s in edits:
        for judge, of_windows, kinds in zip((near, anywhere), draws, (("firing", "around"), ("elsewhere", "all"))):
            met = judge.costs(line, s, token)
            for kind in kinds:
                for what in ("kl", "reverse", "ce", "p"):
                    value = weights.bootstrap(met[what], judge.regions[kind], of_windows)
                    rows.setdefault(f"{what} {kind}", []).append(value)
    stacked = {what: torch.stack(of) for what, of in rows.items()}
    found = {"p": stacked["p firing"]}
    for what, cost in stacked.items():
        if what.startswith("ce"):
            found[what] = torch.stack([at_level(found["p"], cost, level) for level in AT])
        elif not what.startswith("p"):
            log = cost.clamp(min=1e-12).log()
            found[what] = torch.stack([at_level(found["p"], log, level) for level in AT]).exp()
    return found


def with_interval(draws: Tensor) -> list[float] | None:
    """[plain value, 2.5 %, 97.5 %] of [draws + 1]; None where the plain value, or one draw in ten, is not known."""
    if draws[0].isnan() or draws.isnan().double().mean() > 0.1:
        return None
    low, high = draws[~draws.isnan()].quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return [draws[0].item(), low, high]


def measure_pair(
    run: Run, corpus: data.Corpus, A: Text, B: Text, live: list[Piece], i: int, token: int, config: Config,
    tick: Callable[[], object],
) -> dict:  # fmt: skip
    """All methods for one piece and one token: of each its strengths, and its costs on half B at equal probability."""
    generator = torch.Generator().manual_seed(config.seed)
    others = [j for j in range(len(live)) if j != i] or [i]
    other = others[int(torch.randint(len(others), (1,), generator=generator))]
    rule, f1 = rule_token(A, i)
    fires = A.fires[..., i]
    candidates = {method: [line] for method, line in lines_of(run, A, live, i, token, other).items()}
    tick()
    places = {"LoRA, 10 examples": (fires, 10), "LoRA, all": (fires, 0), "LoRA, by a token": (A.x[:, :-1] == rule, 0)}
    for method, (where, n) in places.items():
        candidates[method] = lora_lines(run, A, live[i][0], where, n, token, config, tick)

    on = fires.flatten().nonzero()[:, 0]
    on = on[torch.randperm(len(on), generator=generator)[:256]]
    E, at = run.unembedding.detach().cpu(), (A.stream.flatten(0, 1)[on], A.inputs.flatten(0, 1)[on])
    chooser = Judge(run, A, i, torch.arange(min(48, len(A.x))))
    near = Judge(run, B, i, holding(B.fires[..., i], NEAR))
    anywhere = Judge(run, B, i, torch.arange(min(RANDOM, len(B.x))))
    draws = tuple(weights.resampled(len(judge.labels), DRAWS, generator) for judge in (near, anywhere))
    found, met = {}, {}
    for method, lines in candidates.items():
        strengths = [strengths_for(line, *at, E, token) for line in lines]
        chosen = [chosen_line(chooser, lines, row, token) for row in zip(*strengths)]  # of each level
        edits = [(lines[k], strengths[k][level]) for level, k in enumerate(chosen) if k is not None]
        met[method] = judged(near, anywhere, edits, token, draws)
        found[method] = {"strengths": [s for _, s in edits]}
        if len(lines) > 1:
            found[method]["lambdas"] = [LAMBDAS[k] for k in chosen if k is not None]
        tick()
    base = met["subcomponent"]
    for method, costs in met.items():
        of = found[method]
        of["p"] = costs["p"][:, 0].tolist() if costs else []
        for what in (what for what in costs if what != "p"):
            of[what] = [with_interval(row) for row in costs[what]]
            if base and not what.startswith("ce"):
                of[f"{what}, ratio"] = [with_interval(row) for row in costs[what] / base[what]]
    p_before = weights.bootstrap(
        before_the_edit(run.decomposition.target, B.x[holding(B.fires[..., i], NEAR)], token)["p"],
        near.regions["firing"], draws[0][:1],
    )  # fmt: skip
    about = {"fires": int(fires.sum()), "fires_B": int(near.regions["firing"].sum()), "p_before": p_before.item()}
    about |= {"rule": corpus.encoding.decode([rule]), "rule_f1": f1, "random": name_of(live[other])}
    return about | {"methods": found}


def chosen_line(judge: Judge, lines: list[Line], strengths: tuple[float | None, ...], token: int) -> int | None:
    """Of lines that reach one level at these strengths, the one with the least KL where the piece does not fire."""
    reached = [k for k, s in enumerate(strengths) if s is not None]
    if len(reached) < 2:
        return reached[0] if reached else None
    others = judge.regions["others"]
    return min(reached, key=lambda k: mean_over(judge.costs(lines[k], strengths[k], token)["kl"], others))


def settings(run: Run, config: Config) -> dict:
    """What the numbers of study.json follow from; of how many pieces they are may change."""
    return {"run_mark": run.mark} | {name: getattr(config, name) for name in ("windows", "steps", "seed")}


def study(run: Run, corpus: data.Corpus, config: Config) -> dict:
    """study.json of a run; written after each piece and token, and gone on with where it was left."""
    path = run.folder / "edit" / "study.json"
    wanted = settings(run, config)
    anew = {"command": command(), "seconds": 0.0, "pieces": 0, "pairs": {}}
    found = weights.begun(path, wanted, "pairs", "pieces", "seconds") or wanted | anew
    if found["pieces"] >= config.pieces:
        print(f"{run.folder}: as measured before; to do so again, delete {path}")
        return found
    began, name = time.time() - found["seconds"], run.decomposition.names[-1]
    if name != f"blocks.{len(run.decomposition.target.blocks) - 1}.mlp.down":
        raise UserError(f"{run.folder}: the study edits the last matrix, and {short(name)} is not the target's last")
    mean_g = evaluated_importances(run, corpus)[0]
    live = [n for n in names_of(run, live_columns(run, mean_g)) if n.startswith(f"{short(name)}:")]
    if not live:
        raise UserError(f"{run.folder}: no subcomponent of {short(name)} is live")
    pieces = weights.pieces_named(run, mean_g, live)
    A, B = read_halves(run, corpus, pieces, config)
    chosen = study_pieces(run, corpus, A, pieces, config.pieces)
    pairs = [(*row, *pair) for row in chosen for pair in study_tokens(run, A, *row[:2]).items()]
    path.parent.mkdir(exist_ok=True)
    with tqdm(total=len(pairs) * (1 + 3 * len(LAMBDAS) + len(COLOURS)), desc="edit", unit="step", leave=False) as bar:
        for i, predicted, share, kind, token in pairs:
            said = name_of(pieces[i]), corpus.encoding.decode([token])
            if (key := " → ".join(said)) in found["pairs"]:
                bar.update(1 + 3 * len(LAMBDAS) + len(COLOURS))
                continue
            about = {"piece": said[0], "token": said[1], "kind": kind, "share": share}
            about["predicted"] = corpus.encoding.decode([predicted])
            found["pairs"][key] = about | measure_pair(run, corpus, A, B, pieces, i, token, config, bar.update)
            found["seconds"] = time.time() - began
            write_text(path, json.dumps(found, indent=1) + "\n")
    found["pieces"] = config.pieces
    write_text(path, json.dumps(found, indent=1) + "\n")
    print(f"{run.folder}: {found['seconds']:.0f} s; written: {path}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# D. Table and figure


def geometric(values: list[float]) -> float:
    return math.exp(sum(math.log(max(v, 1e-12)) for v in values) / len(values)) if values else math.nan


def of_pairs(pairs: list[dict], method: str, what: str, level: float) -> list[list[float]]:
    """[value, low, high] of all pairs in which the method reaches the level."""
    rows = [pair["methods"][method].get(what) for pair in pairs]
    return [row[AT.index(level)] for row in rows if row and row[AT.index(level)]]


def table(pairs: list[dict], level: float) -> str:
    """Of each method, over pieces and tokens: pairs that reach the probability, costs, and the ratio to the piece's.

    Costs are geometric means in nats. worse: pairs in which the 95 % interval of the ratio lies above 1; better: below.
    """
    lines = [f"at p = {level:g} where the piece fires; KL(target‖edited), and how many times that of the subcomponent"]
    head = ("", "reached", "around", "elsewhere", "all", "× around", "× elsewhere", "× reversed", "worse", "better")
    lines.append("{:22s} {:>8s} {:>9s} {:>9s} {:>9s} {:>9s} {:>11s} {:>10s} {:>6s} {:>6s}".format(*head))
    for method in pairs[0]["methods"]:
        kl = {w: of_pairs(pairs, method, w, level) for w in ("kl around", "kl elsewhere", "kl all")}
        ratio = {w: of_pairs(pairs, method, f"{w}, ratio", level) for w in (*kl, "reverse elsewhere")}
        numbers = [geometric([v for v, _, _ in rows]) for rows in kl.values()]
        numbers += [geometric([v for v, _, _ in ratio[w]]) for w in ("kl around", "kl elsewhere", "reverse elsewhere")]
        decided = [sum(low > 1 for _, low, _ in ratio["kl elsewhere"]), sum(h < 1 for *_, h in ratio["kl elsewhere"])]
        reached = f"{len(kl['kl around'])} of {len(pairs)}"
        cells = "{:9.5f} {:9.5f} {:9.5f} {:9.2f} {:11.2f} {:10.2f}".format(*numbers)
        lines.append(f"{method:22s} {reached:>8s} {cells} {decided[0]:6d} {decided[1]:6d}")
    return "\n".join(lines)


COLOURS = {
    "subcomponent": "#000000", "subcomponent, added": "#7f7f7f", "subcomponent, row of E": "#a0522d",
    "difference of means": "#009e73", "discriminant": "#56b4e9", "neuron": "#e69f00", "SVD direction": "#f0e442",
    "random subcomponent": "#bbbbbb", "bias": "#999933", "LoRA, 10 examples": "#cc79a7", "LoRA, all": "#d55e00",
    "LoRA, by a token": "#0072b2",
}  # fmt: skip


def plot(runs: dict[str, dict], path: Path) -> None:
    """KL around and elsewhere over that of the subcomponent's edit, against the probability that both reach.

    Geometric mean over the pieces and tokens of all runs where both do, if they are half of all; bars: from the least
    to the most of the runs' own means.
    """
    figure, axes = subplots(1, 2, (11, 5), sharey=True)
    of_runs = [[*found["pairs"].values()] for found in runs.values()]
    pairs = [pair for of in of_runs for pair in of]
    of_regions = (("kl around, ratio", f"within {weights.AROUND} tokens"), ("kl elsewhere, ratio", "elsewhere"))
    for ax, (what, title) in zip(axes, of_regions):
        for n, (method, colour) in enumerate(COLOURS.items()):
            points = []
            for level in AT:
                rows = [[v for v, _, _ in of_pairs(of, method, what, level)] for of in (pairs, *of_runs)]
                if 2 * len(rows[0]) >= len(pairs):
                    each = [geometric(row) for row in rows[1:] if row]
                    points.append((level + 0.004 * (n - 6), geometric(rows[0]), min(each), max(each)))
            if points:
                x, y, low, high = zip(*points)
                bars = [[v - a for v, a in zip(y, low)], [b - v for v, b in zip(y, high)]]
                bars = [[max(0.0, length) for length in side] for side in bars]  # a mean over all may lie outside
                ax.errorbar(x, y, bars, color=colour, lw=1.4, marker="o", ms=4, capsize=2, label=method)
        ax.set(yscale="log", xlabel="p(token) where the piece fires", title=f"KL {title}", xticks=AT)
        ax.grid(axis="y", color="#eeeeee", lw=0.6)
    axes[0].set_ylabel("KL(target ‖ edited) / that of the subcomponent's edit")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# E. The run


def main(config: Config) -> None:
    if config.subcomponent:
        return single(*open_run(config.runs[0], config.data_dir, config.device, ours=True), config)
    of_run = lambda folder: open_run(folder, config.data_dir, config.device, ours=True)
    opened = {folder: of_run(folder) for folder in dict.fromkeys(config.runs)}
    runs = {folder: study(*of, config) for folder, of in opened.items()}
    for folder, found in runs.items():
        for key, pair in found["pairs"].items():
            where = f"{pair['fires']} times in half A, p {pair['p_before']:.4f} before"
            print(f"{folder}: {key!r} ({pair['kind']}), for {pair['predicted']!r} at {pair['share']:.0%}; {where}")
    pairs = [pair for found in runs.values() for pair in found["pairs"].values()]
    for level in AT:
        print(f"\n{table(pairs, level)}")
    path = next(iter(opened.values()))[0].folder / "edit" / "edit.png"
    plot(runs, path)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
