"""What a batch is: a function of (seed, split, step), drawn from flat files of tokens that tokenise.py makes on first use.

A corpus is a folder with `train.bin` and `val.bin` (uint16, memory-mapped), `vocab.json` and `meta.json`.
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

from tokenise import (
    BPE_SAMPLE,
    BPE_VOCAB,
    HUB,
    WORDS,
    encoding_of,
    file_type,
    hub_set,
    local_files,
    stdlib_folder,
    tokenise,
    tokenise_stream,
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus.

    `tokens`: {"train", "val"} to flat uint16 arrays; `encoding`: text to ids and back; `vocabulary`: a hash of the encoding,
    by which a target knows whether tokens mean what they did when it was trained.
    """

    name: str
    tokens: dict[str, np.ndarray]
    encoding: tiktoken.Encoding
    vocabulary: str

    @property
    def vocab_size(self) -> int:
        return self.encoding.n_vocab

    def digest(self) -> str:
        """A hash of the token counts and of both ends of each split: a resumed run must have the tokens that it began with."""
        ends = [part.tobytes() for tokens in self.tokens.values() for part in (tokens[:500_000], tokens[-500_000:])]
        return hashlib.sha256(b"".join([repr([len(t) for t in self.tokens.values()]).encode(), *ends])).hexdigest()[:16]

    def batch(self, split: str, step: int, B: int, T: int, seed: int = 0) -> Tensor:
        """B random windows of T + 1 tokens, int64 [B, T + 1]: a function of (seed, split, step) alone.

        ValueError if the split has fewer than T + 1 tokens.
        """
        tokens = self.tokens[split]
        if len(tokens) < T + 1:
            raise ValueError(
                f"{self.name}: {split} has {len(tokens)} tokens, a window needs T + 1 = {T + 1}: give more text or a smaller T"
            )
        rng = np.random.default_rng([seed, ("train", "val").index(split), step])
        starts = rng.integers(0, len(tokens) - T, size=B)
        return torch.from_numpy(tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64))


def fingerprint(dataset: str, max_tokens: int = 0) -> str:
    """What the token files were made from: they are made anew when it changes."""
    if dataset == "stdlib":
        source = [sys.version, str(stdlib_folder())]
    elif hub := hub_set(dataset):
        source = ["hub", *hub]
    else:
        source = [f"{p.resolve()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in local_files(Path(dataset))]
    source += [f"{max_tokens} tokens"] if max_tokens else []
    return hashlib.sha256("\n".join([*source, WORDS, str(BPE_VOCAB), str(BPE_SAMPLE)]).encode()).hexdigest()[:16]


def name_of(dataset: str, max_tokens: int, mark: str) -> str:
    """ "stdlib", "pile-1000M", "owner--set", "novels-1f0c33d2": the name of the folder of token files."""
    if dataset == "stdlib":
        name = dataset
    elif hub := hub_set(dataset):
        name = dataset if dataset in HUB else "--".join(filter(None, hub)).replace("/", "--")
    else:
        name = f"{Path(dataset).name.removesuffix(file_type(Path(dataset)))}-{mark[:8]}"
    millions, rest = divmod(max_tokens, 10**6)
    return f"{name}-{max_tokens if rest else f'{millions}M'}" if max_tokens else name


def is_whole(home: Path, mark: str) -> bool:
    """True if `home` holds finished token files of this source: the meta file is written last."""
    try:
        meta = json.loads((home / "meta.json").read_text())
        return meta["fingerprint"] == mark and all(
            (home / f"{s}.bin").stat().st_size == 2 * meta[s] for s in ("train", "val")
        )
    except (OSError, ValueError, KeyError):
        return False


def load(dataset: str = "stdlib", folder: str | Path = "data", max_tokens: int = 0) -> Corpus:
    """The corpus, tokenised on first use into `folder`: all of it, or about its first `max_tokens` tokens.

    FileNotFoundError or ValueError for a dataset that cannot be used.
    """
    mark = fingerprint(dataset, max_tokens)  # first: an unknown dataset ends here
    name = name_of(dataset, max_tokens, mark)
    home = Path(folder) / name
    if not is_whole(home, mark):
        if dataset != "stdlib" and (max_tokens or hub_set(dataset)):
            tokenise_stream(dataset, home, mark, max_tokens)
        else:
            tokenise(dataset, home, mark)
    vocab = (home / "vocab.json").read_text()
    return Corpus(
        name=name,
        tokens={split: np.memmap(home / f"{split}.bin", np.uint16, mode="r") for split in ("train", "val")},
        encoding=encoding_of(json.loads(vocab), dataset),
        vocabulary=hashlib.sha256(vocab.encode()).hexdigest()[:16],
    )
