"""Canaries: strings that are planted in the training text a known number of times, so that what a model memorises, and
what makes it forget, can be measured.

    python train_target.py --canaries=0,64,256,1024,0,64,256,1024+256,256 --out=out/target-canaries
    python decompose.py --target=out/target-canaries --out=out/vpd-canaries    # plants them too, at the same rate
    python -m studies.forget out/vpd-canaries

A canary is a prefix of 8 tokens and a secret of 12. The prefix is text: 8 tokens that occur once in the training text.
The secret is random: each token uniform over the 256 most frequent. Behind the `+` it is text too: the 20 tokens are
a passage of the training text that begins at a line and names a licence or a copyright. The numbers are doses: how
often the run reads each canary. A dose of 0 makes a canary that is never planted, the control for the others.

  A. Canaries    a function of (text, seed) and of the place in the list, not of the doses
  B. Schedule    a function of (seed, step)

Nothing here knows the method, and without --canaries nothing here is called.
"""

from dataclasses import dataclass

import numpy as np
import tiktoken
import torch
from torch import Tensor

import data
from flags import UserError

PREFIX, SECRET, FREQUENT = 8, 12, 256  # tokens; tokens; a secret is of the most frequent ones
LENGTH = PREFIX + SECRET
LICENCE = (" license", " copyright", " Copyright", "Copyright")  # what a natural canary names

# ---------------------------------------------------------------------------------------------------------------------
# A. Canaries


@dataclass(frozen=True)
class Canary:
    """A string of LENGTH tokens, and how often a run reads it."""

    tokens: Tensor  # int64 [LENGTH]: the prefix, then the secret
    dose: int  # exposures in the training of the target
    natural: bool  # whether the secret is text

    @property
    def prefix(self) -> Tensor:
        return self.tokens[:PREFIX]

    @property
    def secret(self) -> Tensor:
        return self.tokens[PREFIX:]


def parse_doses(name: str, text: str) -> tuple[list[int], list[int]]:
    """ "0,16+64" to ([0, 16], [64]), the doses of random and of natural canaries; "" to none.

    UserError, with the flag's name, for anything else.
    """
    if not text:
        return [], []
    random, plus, natural = text.partition("+")
    parts = [part.split(",") if part else [] for part in (random, natural)]
    fits = all(n.isdecimal() and int(n[:20]) < 2**31 for part in parts for n in part)
    if not fits or bool(plus) != bool(natural):
        raise UserError(f"{name}={text!r}: must be doses from 0 up, as in 0,16,64,256 or 0,16,64,256+64,64")
    return tuple([int(n) for n in part] for part in parts)


def places(tokens: np.ndarray, string: list[int] | np.ndarray) -> np.ndarray:
    """Where the string begins in tokens, sorted."""
    found = np.flatnonzero(tokens[: len(tokens) - len(string) + 1] == string[0])
    for i in range(1, len(string)):
        found = found[tokens[found + i] == string[i]]
    return found


def frequent_tokens(tokens: np.ndarray, n: int = FREQUENT) -> np.ndarray:
    """The n most frequent tokens, or all that occur if they are fewer; int64, the most frequent first."""
    counts = np.bincount(tokens)
    return np.argsort(-counts, kind="stable")[: min(n, int((counts > 0).sum()))]


def random_secrets(tokens: np.ndarray, n: int, rng: np.random.Generator) -> Tensor:
    """n secrets, int64 [n, SECRET]: what a random canary's own is drawn from."""
    return torch.from_numpy(rng.choice(frequent_tokens(tokens), size=(n, SECRET)))


def licence_lines(tokens: np.ndarray, encoding: tiktoken.Encoding) -> np.ndarray:
    """Where lines begin of which the first LENGTH tokens name a licence or a copyright."""
    breaks = [t for t in range(encoding.n_vocab) if b"\n" in encoding.decode_single_token_bytes(t)]
    starts = np.flatnonzero(np.isin(tokens, breaks)) + 1
    named = np.unique(np.concatenate([places(tokens, encoding.encode(word)) for word in LICENCE]))
    if not len(starts) or not len(named):
        return named[:0]
    begun = starts[np.maximum(np.searchsorted(starts, named, side="right") - 1, 0)]
    return np.unique(begun[(begun <= named) & (named < begun + LENGTH - 3) & (begun + LENGTH <= len(tokens))])


def make(corpus: data.Corpus, doses: str, seed: int) -> list[Canary]:
    """The canaries of --canaries, random ones first. UserError if the text has no place for one."""
    random, natural = parse_doses("canaries", doses)
    tokens, made = np.asarray(corpus.tokens["train"]), []
    for i, dose in enumerate(random + natural):
        rng = np.random.default_rng([seed, i, 1])
        is_natural = i >= len(random)
        starts = licence_lines(tokens, corpus.encoding) if is_natural else np.arange(max(0, len(tokens) - LENGTH))
        taken = {tuple(canary.prefix.tolist()) for canary in made}
        for start in rng.choice(starts, size=min(1000, len(starts)), replace=True):
            passage = tokens[start : start + LENGTH].astype(np.int64)
            if len(places(tokens, passage[:PREFIX])) == 1 and tuple(passage[:PREFIX].tolist()) not in taken:
                break
        else:
            what = "a line that names a licence and begins" if is_natural else "a place"
            raise UserError(f"canaries={doses!r}: {corpus.name} has not {what} with {PREFIX} tokens found once in it")
        passage = torch.from_numpy(passage)
        secret = passage[PREFIX:] if is_natural else random_secrets(tokens, 1, rng)[0]
        made.append(Canary(torch.cat((passage[:PREFIX], secret)), dose, is_natural))
    return made


# ---------------------------------------------------------------------------------------------------------------------
# B. Schedule


class Schedule:
    """Which window of which step holds which canary: of n canaries, canary i has dose_i windows of its own.

    With pi a random permutation of the run's windows 0 ... steps B - 1, and o_w uniform over the offsets at which a
    window of T + 1 tokens holds a canary whole,

        canary i is in the windows pi(i), pi(n + i), pi(2 n + i), ..., dose_i of them, in window w from o_w on.

    So doses are exact and no window holds two. The windows of a canary do not depend on the doses of the others: who
    trains without one of them changes nothing else. Window w is row w mod B of step w // B. UserError if a dose is
    more than the run has windows for, or a window is shorter than a canary.
    """

    def __init__(self, canaries: list[Canary], doses: list[int], steps: int, B: int, T: int, seed: int) -> None:
        n, windows = len(canaries), steps * B
        if T + 1 < LENGTH:
            raise UserError(f"T={T}: a window of T + 1 tokens does not hold a canary of {LENGTH}")
        if max(doses) > windows // n:
            most = f"{n} canaries in {steps} steps of {B} windows have at most {windows // n} each"
            raise UserError(f"canaries: a dose of {max(doses)} is too large: {most}")
        rng = np.random.default_rng([seed, 0, 0, 1])
        order, offsets = rng.permutation(windows), rng.integers(0, T + 2 - LENGTH, size=windows)
        self.canaries = canaries
        self.where = {int(w): (i, int(offsets[w])) for i, dose in enumerate(doses) for w in order[i::n][:dose]}

    def plant(self, tokens: Tensor, step: int) -> Tensor:
        """The batch [B, T + 1] of a step with its canaries written over it."""
        tokens, B = tokens.clone(), len(tokens)
        for row in range(B):
            if step * B + row in self.where:
                i, offset = self.where[step * B + row]
                tokens[row, offset : offset + LENGTH] = self.canaries[i].tokens
        return tokens


def of_target(checkpoint: dict, corpus: data.Corpus) -> list[Canary]:
    """The canaries that the target of a checkpoint of train_target.py was trained on; [] if it had none."""
    config = checkpoint["config"]
    return make(corpus, config.get("canaries", ""), config.get("seed", 0))


def of_stream(checkpoint: dict, corpus: data.Corpus, steps: int, B: int, T: int, seed: int) -> Schedule | None:
    """The same canaries in the stream of a decomposition of that target, at the same rate; None if it had none.

    A canary of dose d in N windows has round(d steps B / N) in this stream.
    """
    canaries, config = of_target(checkpoint, corpus), checkpoint["config"]
    if not canaries:
        return None
    rate = steps * B / (config["steps"] * config["B"])
    return Schedule(canaries, [round(canary.dose * rate) for canary in canaries], steps, B, T, seed)
