"""What a batch is: a function of (seed, split, step), drawn from flat files of tokens.

A corpus is a folder with train.bin and val.bin (uint16, or uint32 for a large vocabulary; memory-mapped), vocab.json
and meta.json. tokenise.py makes it on first use.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkpoints
import pretrained
import run
import tokenise
from flags import UserError


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus."""

    name: str  # of the run folders: out/vpd-<name>
    tokens: dict[str, np.ndarray]  # "train", "val" to flat uint16 or uint32 arrays
    encoding: tokenise.Encoding  # text to ids and back
    vocabulary: str  # a hash of the encoding: whether tokens mean what they did when a target was trained
    folder: Path | None = None  # of the token files; None where the tokens are in memory only

    @property
    def vocab_size(self) -> int:
        return self.encoding.n_vocab

    @cached_property
    def digest(self) -> str:
        """A hash of all tokens of both splits: a run must find its own text again."""
        digest = hashlib.sha256(repr([len(tokens) for tokens in self.tokens.values()]).encode())
        for tokens in self.tokens.values():
            digest.update(np.ascontiguousarray(tokens))
        return digest.hexdigest()[:16]

    def of_checkpoint(self) -> dict[str, str]:
        """What a checkpoint keeps of its text, for `of_run`."""
        return {"tokens": self.digest, "tokens_folder": str(self.folder.absolute()) if self.folder else ""}

    def as_tensors(self) -> dict[str, Tensor]:
        """All tokens, for a checkpoint to hold: {split: int32 [n]}."""
        return {split: torch.from_numpy(tokens.astype(np.int32)) for split, tokens in self.tokens.items()}

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


def texts(prompts: str, corpus: Corpus, T: int, saved: dict | None = None) -> list[Corpus]:
    """The corpus alone; of a targeted run its prompts, from the checkpoint `saved` if there is one, and the corpus."""
    if not prompts:
        return [corpus]
    return [of_prompts(saved, corpus) if saved else read_prompts(prompts, corpus, T), corpus]


def batch_of(texts: list[Corpus], step: int, config) -> Tensor:
    """Rows of the training text of each in turn, int64 [B, T + 1]; of one corpus its `batch`. config: B, T and seed."""
    parts = [text.batch("train", step, config.B // len(texts), config.T, config.seed) for text in texts]
    return torch.stack(parts, 1).flatten(0, 1)


def read_prompts(dataset: str, corpus: Corpus, T: int) -> Corpus:
    """Prompts in the tokens of the corpus, one after the other, an end-of-text token behind each; held in memory.

    Every 20th of the different ones is validation text; where there are fewer, all of them are both. What is shorter
    than two windows is repeated. UserError for what is no text of this machine.
    """
    if corpus.encoding.name == "ids":
        raise UserError(f"prompts={dataset!r}: {corpus.name} came as token ids, its vocabulary is unknown")
    if tokenise.hub_set(dataset):
        raise UserError(f"prompts={dataset!r}: must be a file or a folder of text, not a set of the hub")
    try:
        found = list(tokenise.documents_of(dataset, tokenise.open_rows(dataset)))
    except UserError as error:
        raise UserError(f"prompts={dataset!r}: {error}") from error
    if not found or not all(isinstance(text, str) for text in found):
        raise UserError(f"prompts={dataset!r} holds {'token ids, not' if found else 'no'} text")
    unique = list(dict.fromkeys(found))
    parts = {"train": [text for i, text in enumerate(unique) if i % 20], "val": unique[::20]}
    if len(unique) < 20:
        print(f"prompts: {len(unique)} different ones are too few to hold any out: they are validation text too")
        parts = {"train": unique, "val": unique}
    tokens = {}
    for split, part in parts.items():
        flat = np.concatenate([np.array(ids, np.int32) for ids in tokenise.encode(corpus.encoding, part)])
        tokens[split] = np.resize(flat, max(len(flat), 2 * T + 2))  # which repeats
    return replace(corpus, name=f"prompts-{corpus.name}", tokens=tokens)


def of_prompts(saved: dict, corpus: Corpus) -> Corpus:
    """The prompts that a checkpoint of a targeted run holds."""
    tokens = {split: saved["prompts"][split].numpy() for split in ("train", "val")}
    return replace(corpus, name=f"prompts-{corpus.name}", tokens=tokens)


def fingerprint(dataset: str, max_tokens: int = 0, own: tokenise.Encoding | None = None) -> str:
    """What the token files were made from: they are made anew when it changes. own: a model's own encoding."""
    if dataset == "stdlib":
        source = [sys.version, str(tokenise.stdlib_folder())]
    elif hub := tokenise.hub_set(dataset):
        source = ["hub", *hub]
    else:
        files = tokenise.local_files(dataset)
        source = [f"{p.resolve()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    source += [f"{max_tokens} tokens"] if max_tokens else []
    source += [tokenise.WORDS, str(tokenise.BPE_VOCAB), str(tokenise.BPE_SAMPLE), "5 % of the tokens"]
    source += [own.name] if own else []
    return hashlib.sha256("\n".join(source).encode()).hexdigest()[:16]


def name_of(dataset: str, max_tokens: int, mark: str) -> str:
    """The name of a corpus: "stdlib", "pile-1000M", "owner--set", "novels-1f0c33d2"."""
    if dataset == "stdlib":
        name = dataset
    elif hub := tokenise.hub_set(dataset):
        name = dataset if dataset in tokenise.HUB else "--".join(filter(None, hub)).replace("/", "--")
    else:
        path = Path(dataset).absolute()
        name = f"{path.name.removesuffix(tokenise.file_type(path)) or 'root'}-{mark[:8]}"
    millions, rest = divmod(max_tokens, 10**6)
    return f"{name}-{max_tokens if rest else f'{millions}M'}" if max_tokens else name


def load(
    dataset: str = "stdlib", folder: str | Path = "data", max_tokens: int = 0, own: tokenise.Encoding | None = None
) -> Corpus:
    """The corpus, tokenised on first use into `folder`: all of it, or about its first `max_tokens` tokens.

    own: the encoding of a model that we have not trained. Its tokens have a folder of their own.

    UserError for a dataset that cannot be used, and for a path in `folder` that is taken by something else.
    """
    mark = fingerprint(dataset, max_tokens, own)  # first: an unknown dataset ends here
    name = name_of(dataset, max_tokens, fingerprint(dataset, max_tokens))
    # Each Python has a standard library of its own, so that another one leaves the tokens of earlier runs in place.
    home = Path(folder) / (f"{name}-{mark[:8]}" if dataset == "stdlib" or own else name)

    def is_made() -> bool:
        return tokenise.read_mark(home / "meta.json").get("fingerprint") == mark and tokenise.is_whole(home)

    if not is_made():
        with run.claims():
            run.claim(home, beside=True, wait=True)  # another process may be making it
            if not is_made():
                tokenise.tokenise(dataset, name, home, mark, max_tokens, own)
    return open_tokens(home)


def open_tokens(home: Path) -> Corpus:
    """The corpus whose token files are in this folder. UserError if its vocabulary cannot be read."""
    meta, vocab = tokenise.read_mark(home / "meta.json"), (home / "vocab.json").read_text()
    kind = tokenise.number_type(meta["vocab_size"])
    none = np.zeros(0, kind)  # an empty file cannot be mapped
    with checkpoints.built_from(home / "vocab.json"):
        encoding = tokenise.encoding_of(json.loads(vocab), meta["dataset"])
    return Corpus(
        name=meta["name"],
        tokens={
            split: np.memmap(home / f"{split}.bin", kind, mode="r") if meta[split] else none
            for split in ("train", "val")
        },
        encoding=encoding,
        vocabulary=hashlib.sha256(vocab.encode()).hexdigest()[:16],
        folder=home,
    )


def of_run(folder: str | Path, saved: dict, data_dir: str = "") -> Corpus:
    """The text of the run in `folder`, by a checkpoint of it: its token files, even where the source is gone.

    They are looked for in data_dir, or without it in that of the run, from here and from where the run was; where they
    are not, they are made anew from the source. UserError if the tokens are not those that the run was made with.
    """
    config, made = saved["config"], Path(saved["tokens_folder"])
    homes = [Path(data_dir or config["data_dir"]) / made.name, *([] if data_dir else [made])]
    corpora = [open_tokens(home) for home in homes if tokenise.is_whole(home)]
    if not corpora:
        about = saved.get("target", {}).get("pretrained", {})
        own = pretrained.encoding_of(about["target"], about["revision"]) if about else None
        try:
            corpora = [load(config["dataset"], data_dir or config["data_dir"], config["max_tokens"], own)]
        except UserError as error:
            remedy = f"put {made.name}, its folder of token files, into the folder --data_dir"
            raise UserError(f"{folder}: its text is not here: {error}; or {remedy}") from error
    for corpus in corpora:
        if corpus.digest == saved["tokens"]:
            return corpus
    found = f"those in {corpus.folder} have the digest {corpus.digest}, not {saved['tokens']}"
    raise UserError(f"{folder}: its text, {config['dataset']!r}, has changed since that run: {found}")
