"""What the target can do, found by rule in its own validation text: nothing is picked by hand.

A. Groups      (current token -> predicted token) that it gets right, told apart as contextual or bigram
B. Screens     induction on repeated random tokens; which closing bracket, by the opening one
C. Prompts     occurrences of a group in other text, cut at the prediction
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

import data
from eval import Run

SURE = 0.5  # the least probability of a prediction that counts
BRACKETS = ("()", "[]", "{}")

# ---------------------------------------------------------------------------------------------------------------------
# A. Groups


@dataclass(frozen=True)
class Group:
    """Positions with this token, at which the target says the next one with p >= SURE and is right."""

    current: int
    predicted: int
    n: int
    p: float  # mean over them
    p_without: float  # mean where attention writes nothing there

    @property
    def kind(self) -> str:
        """contextual if p at least halves without attention, else bigram: such a group needs no attention."""
        return "contextual" if self.p_without <= self.p / 2 else "bigram"


@torch.no_grad()
def hidden_without_attention(run: Run, x: Tensor) -> Tensor:
    """f(x | W) with every attention output 0, [B, T, d_model].

    At a position this is the same as 0 at that position alone: nothing else brings anything there.
    """
    blocks = run.decomposition.target.blocks
    hooks = [block.attn.register_forward_hook(lambda module, args, y: torch.zeros_like(y)) for block in blocks]
    try:
        return run.decomposition.f(x)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def groups_of(run: Run, windows: Tensor) -> list[Group]:
    """Every group in windows [N, T + 1], the most frequent first."""
    found = defaultdict(list)
    for part in run.batches(windows):
        x, label = part[:, :-1], part[:, 1:]
        p, top = run.logits(run.decomposition.f(x)).softmax(-1).max(-1)
        without = run.logits(hidden_without_attention(run, x)).softmax(-1).gather(-1, label[..., None])[..., 0]
        right = (top == label) & (p >= SURE)
        for row in zip(*(of[right].tolist() for of in (x, label, p, without))):
            found[row[:2]].append(row[2:])
    groups = [Group(*pair, len(ps), *(sum(of) / len(ps) for of in zip(*ps))) for pair, ps in found.items()]
    return sorted(groups, key=lambda group: (-group.n, group.current, group.predicted))


# ---------------------------------------------------------------------------------------------------------------------
# B. Screens


@torch.no_grad()
def induction(run: Run, windows: Tensor, seed: int, sequences: int = 64, frequent: int = 200) -> tuple[float, float]:
    """CE of the first and the second half of random tokens that are repeated once, nats a token.

    The tokens are drawn evenly from the most frequent of the windows. A target with induction is better by far in the
    second half.
    """
    half, generator = run.config["T"] // 2, torch.Generator().manual_seed(seed)
    common = windows.flatten().bincount().topk(min(frequent, int((windows.flatten().bincount() > 0).sum()))).indices
    x = common[torch.randint(len(common), (sequences, half), generator=generator)].repeat(1, 2).to(run.device)
    log_p = run.logits(run.decomposition.f(x)).log_softmax(-1)[:, :-1].gather(-1, x[:, 1:, None])[..., 0]
    return -log_p[:, : half - 1].mean().item(), -log_p[:, half:].mean().item()


def single_token(corpus: data.Corpus, text: str) -> int | None:
    ids = [] if corpus.encoding.name == "ids" else corpus.encoding.encode_ordinary(text)
    return ids[0] if len(ids) == 1 else None


@torch.no_grad()
def brackets(run: Run, corpus: data.Corpus, windows: Tensor, most: int = 64) -> dict | None:
    """Does the opening bracket decide which closing one comes? None where the vocabulary or the text has too few.

    A place: the next token closes, and the last bracket before it, of the same kind, opens. There the opening one is
    replaced by another kind, alone. Moved: share of such pairs in which the logit of the closing bracket, less that of
    the other kind, falls. Right: share in which the closing bracket of greater logit is right in both texts.
    """
    pairs = [(single_token(corpus, pair[0]), single_token(corpus, pair[1])) for pair in BRACKETS]
    if any(token is None for pair in pairs for token in pair):
        return None
    opens, closes = zip(*pairs)
    texts, own, other = [], [], []
    for window in windows.tolist():
        last = None
        for t, token in enumerate(window):
            if token in closes:
                k = closes.index(token)
                if last is not None and window[last] == opens[k] and len(texts) < most:
                    for j in range(len(pairs)):
                        if j != k:
                            changed = window[:t]
                            changed[last] = opens[j]
                            texts.append((window[:t], changed))
                            own.append(closes[k]), other.append(closes[j])
                last = None
            elif token in opens:
                last = t
    if not texts:
        return None
    gaps = []
    for pair, a, b in zip(texts, own, other):
        logits = run.logits(run.decomposition.f(torch.tensor(pair, device=run.device))[:, -1])
        gaps.append((logits[:, a] - logits[:, b]).tolist())
    moved = sum(before > after for before, after in gaps) / len(gaps)
    right = sum(before > 0 > after for before, after in gaps) / len(gaps)
    return {"pairs": len(gaps), "moved": moved, "right": right, "mean": sum(a - b for a, b in gaps) / len(gaps)}


# ---------------------------------------------------------------------------------------------------------------------
# C. Prompts


@dataclass(frozen=True)
class Prompt:
    """Tokens up to a prediction, what the target predicts there, and its probability."""

    tokens: list[int]
    y: int
    p: float
    kind: str  # contextual, bigram, or own


def chosen_groups(groups: list[Group], n: int) -> list[Group]:
    """Of each kind the n most frequent, no predicted token and no current one twice."""
    chosen: list[Group] = []
    for kind in ("contextual", "bigram"):
        of_kind: list[Group] = []
        for group in groups:
            taken = chosen + of_kind
            new = all(group.current != g.current and group.predicted != g.predicted for g in taken)
            if group.kind == kind and new and len(of_kind) < n:
                of_kind.append(group)
        chosen += of_kind
    return chosen


@torch.no_grad()
def prompts_of(run: Run, group: Group, windows: Tensor, length: int, n: int) -> list[Prompt]:
    """The first n occurrences of a group in windows [N, T + 1] with `length` tokens up to it, as prompts of just those.

    Those count that the target still gets right with p >= SURE, whichever token comes before the first. None twice.
    """
    found: list[Prompt] = []
    for window in windows.tolist():
        for t in range(length - 1, len(window) - 1):
            cut = window[t - length + 1 : t + 1]
            if (window[t], window[t + 1]) == (group.current, group.predicted) and len(found) < n:
                p = run.logits(run.decomposition.f(torch.tensor([cut], device=run.device))[0, -1]).softmax(-1)
                fits = int(p.argmax()) == group.predicted and p.max() >= SURE
                if fits and all(cut != prompt.tokens for prompt in found):
                    found.append(Prompt(cut, group.predicted, p.max().item(), group.kind))
    return found
