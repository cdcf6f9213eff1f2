"""What a batch is: a function of (seed, split, step), drawn from flat files of tokens.

A corpus is a folder with train.bin and val.bin (uint16, memory-mapped), vocab.json and meta.json. tokenise.py makes it
on first use.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor

import tokenise
from run import UserError


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus."""

    name: str  # of the run folders: out/vpd-<name>
    tokens: dict[str, np.ndarray]  # "train", "val" to flat uint16 arrays
    encoding: tiktoken.Encoding  # text to ids and back
    vocabulary: str  # a hash of the encoding: whether tokens mean what they did when a target was trained
    folder: Path | None = None  # of the token files; None where the tokens are in memory only

    @property
    def vocab_size(self) -> int:
        return self.encoding.n_vocab

    def digest(self) -> str:
        """A hash of the token counts and of both ends of each split: a resumed run must find its tokens again."""
        ends = [part.tobytes() for tokens in self.tokens.values() for part in (tokens[:500_000], tokens[-500_000:])]
        return hashlib.sha256(b"".join([repr([len(t) for t in self.tokens.values()]).encode(), *ends])).hexdigest()[:16]

    def batch(self, split: str, step: int, B: int, T: int, seed: int = 0) -> Tensor:
        """B random windows of T + 1 tokens, int64 [B, T + 1]: a function of (seed, split, step) alone.

        UserError if there are fewer than T + 1 tokens.
        """
        self.refuse_shorter(T)
        tokens = self.tokens[split]
        rng = np.random.default_rng([seed, ("train", "val").index(split), step])
        starts = rng.integers(0, len(tokens) - T, size=B)
        return torch.from_numpy(tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64))

    def refuse_shorter(self, T: int) -> None:
        """UserError if the text, of either split, has not a window of T + 1 tokens."""
        for split, tokens in self.tokens.items():
            if len(tokens) < T + 1:
                short = f"{split} has {len(tokens)} tokens, a window needs T + 1 = {T + 1}"
                raise UserError(f"{self.name}: {short}: give more text or a smaller T")


def fingerprint(dataset: str, max_tokens: int = 0) -> str:
    """What the token files were made from: they are made anew when it changes."""
    if dataset == "stdlib":
        source = [sys.version, str(tokenise.stdlib_folder())]
    elif hub := tokenise.hub_set(dataset):
        source = ["hub", *hub]
    else:
        files = tokenise.local_files(Path(dataset))
        source = [f"{p.resolve()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    source += [f"{max_tokens} tokens"] if max_tokens else []
    source += [tokenise.WORDS, str(tokenise.BPE_VOCAB), str(tokenise.BPE_SAMPLE)]
    return hashlib.sha256("\n".join(source).encode()).hexdigest()[:16]


def name_of(dataset: str, max_tokens: int, mark: str) -> str:
    """The name of a corpus: "stdlib", "pile-1000M", "owner--set", "novels-1f0c33d2"."""
    if dataset == "stdlib":
        name = dataset
    elif hub := tokenise.hub_set(dataset):
        name = dataset if dataset in tokenise.HUB else "--".join(filter(None, hub)).replace("/", "--")
    else:
        name = f"{Path(dataset).name.removesuffix(tokenise.file_type(Path(dataset)))}-{mark[:8]}"
    millions, rest = divmod(max_tokens, 10**6)
    return f"{name}-{max_tokens if rest else f'{millions}M'}" if max_tokens else name


def load(dataset: str = "stdlib", folder: str | Path = "data", max_tokens: int = 0) -> Corpus:
    """The corpus, tokenised on first use into `folder`: all of it, or about its first `max_tokens` tokens.

    UserError for a dataset that cannot be used, and for a path in `folder` that is taken by something else.
    """
    mark = fingerprint(dataset, max_tokens)  # first: an unknown dataset ends here
    name = name_of(dataset, max_tokens, mark)
    # Each Python has a standard library of its own, so that another one leaves the tokens of earlier runs in place.
    home = Path(folder) / (f"{name}-{mark[:8]}" if dataset == "stdlib" else name)
    meta = tokenise.read_mark(home / "meta.json")
    counts = {split: meta.get(split) for split in ("train", "val")}
    if meta.get("fingerprint") != mark or tokenise.stored(home) != counts:
        if dataset != "stdlib" and (max_tokens or tokenise.hub_set(dataset)):
            tokenise.tokenise_stream(dataset, home, mark, max_tokens)
        else:
            tokenise.tokenise(dataset, home, mark)
    vocab = (home / "vocab.json").read_text()
    return Corpus(
        name=name,
        tokens={split: np.memmap(home / f"{split}.bin", np.uint16, mode="r") for split in ("train", "val")},
        encoding=tokenise.encoding_of(json.loads(vocab), dataset),
        vocabulary=hashlib.sha256(vocab.encode()).hexdigest()[:16],
        folder=home,
    )
