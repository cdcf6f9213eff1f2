"""Text to token batches: tokenise once into flat files, then draw every batch as a function of (seed, split, step).

  A. byte-level BPE       learnt with numpy, held as a `tiktoken.Encoding`
  B. documents            `stdlib`: the Python standard library's own source; or a .txt, .jsonl, .parquet file or a folder
  C. Corpus               `train.bin` and `val.bin` (uint16, memory-mapped), `vocab.json`, `meta.json`

Documents end with an end-of-text token. One document in twenty, chosen by a hash of its text, is validation: training
never sees it, nor a copy of it. Left out: downloads, corpora larger than memory, shuffling of documents.
"""

import base64
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
# How text is cut into words before BPE: GPT-2's pattern.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BPE_VOCAB = 1024  # tokens of a learnt encoding, end-of-text included
BPE_SAMPLE = 2_000_000  # characters that it is learnt from
SUFFIXES = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}  # file type to the builder of `datasets`

# ---------------------------------------------------------------------------------------------------------------------
# A. Byte-level BPE


def learn_bpe(text: str, vocab_size: int) -> list[bytes]:
    """`vocab_size` tokens of a byte-level BPE (Sennrich et al. 2016), in order of rank: 256 bytes, then one a merge.

    Each round joins the most frequent pair of neighbours inside words; the lowest pair of ids wins ties. Stops early
    when no pair occurs twice.
    """
    import regex  # a dependency of tiktoken; Python's own `re` has no \p{L}

    counts = Counter(regex.findall(WORDS, text))
    words = [word.encode() for word in counts]
    # One flat array of ids over all distinct words with a gap (-1) after each, and how often its word occurs beside it.
    ids = np.concatenate([np.frombuffer(word + b"\0", np.uint8).astype(np.int64) for word in words])
    lengths = np.array([len(word) + 1 for word in words])
    ids[np.cumsum(lengths) - 1] = -1
    weight = np.repeat(np.array(list(counts.values())), lengths)

    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size:
        inside = (ids[:-1] >= 0) & (ids[1:] >= 0)
        pair = ids[:-1] * vocab_size + ids[1:]
        frequency = np.bincount(pair[inside], weights=weight[:-1][inside])
        if frequency.size == 0 or frequency.max() < 2:
            break
        left, right = divmod(int(frequency.argmax()), vocab_size)
        at = np.flatnonzero(inside & (pair == left * vocab_size + right))
        if left == right:  # in a run like "aaa" the two candidates overlap: keep every second one
            run_start = np.r_[True, np.diff(at) > 1]
            offset = at - np.maximum.accumulate(np.where(run_start, at, 0))
            at = at[offset % 2 == 0]
        ids[at] = len(tokens)
        keep = np.ones(len(ids), bool)
        keep[at + 1] = False
        ids, weight = ids[keep], weight[keep]
        tokens.append(tokens[left] + tokens[right])
    return tokens


def bpe_encoding(tokens: list[bytes]) -> tiktoken.Encoding:
    """A tiktoken.Encoding of these tokens by rank; the end-of-text token comes after the last one."""
    return tiktoken.Encoding(
        name=f"bpe-{len(tokens) + 1}",
        pat_str=WORDS,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={END_OF_TEXT: len(tokens)},
    )


# ---------------------------------------------------------------------------------------------------------------------
# B. Documents


def stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_documents() -> Iterator[str]:
    """Every .py file of the Python standard library on this machine, in order of its path; installed packages excluded."""
    root = stdlib_folder()
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def local_files(path: Path) -> list[Path]:
    """The file itself, or all files of the first known type in a folder. FileNotFoundError, ValueError: see the text."""
    if not path.exists():
        raise FileNotFoundError(f"dataset {str(path)!r} does not exist: give 'stdlib' or the path of a {', '.join(SUFFIXES)} file or a folder of them")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    types = sorted({p.suffix.lower() for p in files})
    if not files or types[0] not in SUFFIXES:
        raise ValueError(f"dataset {str(path)!r}: no {', '.join(SUFFIXES)} file there")
    if len(types) > 1:
        raise ValueError(f"dataset {str(path)!r} mixes {', '.join(types)} files: give one type at a time")
    if all(p.stat().st_size == 0 for p in files):
        raise ValueError(f"dataset {str(path)!r} is empty")
    return [p for p in files if p.stat().st_size > 0]


def local_documents(path: Path) -> Iterator[str]:
    """The documents of a file or folder: each .txt file is one, each row of a .jsonl or .parquet file is one."""
    import datasets
    import pyarrow

    files = local_files(path)
    builder = SUFFIXES[files[0].suffix.lower()]
    options = {"sample_by": "document"} if builder == "text" else {}
    # Streaming reads the file itself and leaves no second copy in a cache.
    try:
        rows = datasets.load_dataset(builder, data_files=[str(p) for p in files], split="train", streaming=True, **options)
        columns = None
        for row in rows:
            if columns is None:
                columns = [name for name in ("text", "story", "content") if name in row]
                if not columns:
                    raise ValueError(f"dataset {str(path)!r} has columns {', '.join(row)}: one must be 'text', 'story' or 'content'")
            text = row[columns[0]]
            if text and not isinstance(text, str):
                raise ValueError(f"dataset {str(path)!r}: column {columns[0]!r} holds {type(text).__name__}, not text")
            if text:
                yield text
    except (OSError, datasets.exceptions.DatasetsError, pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(f"dataset {str(path)!r} cannot be read as {builder}: {str(error).splitlines()[0]}") from error


def choose_encoding(dataset: str, sample: str) -> tiktoken.Encoding:
    """A learnt BPE for the standard library; for other text GPT-2's encoding, or a learnt one where it cannot be had."""
    if dataset != "stdlib":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken raises whatever its download raised
            print(f"data: GPT-2's vocabulary cannot be had here ({type(error).__name__}): learning a BPE of {BPE_VOCAB} tokens from the text")
    return bpe_encoding(learn_bpe(sample, BPE_VOCAB - 1))


# ---------------------------------------------------------------------------------------------------------------------
# C. Corpus


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
            raise ValueError(f"{self.name}: {split} has {len(tokens)} tokens, a window needs T + 1 = {T + 1}: give more text or a smaller T")
        rng = np.random.default_rng([seed, ("train", "val").index(split), step])
        starts = rng.integers(0, len(tokens) - T, size=B)
        return torch.from_numpy(tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64))


def fingerprint(dataset: str) -> str:
    """What the token files were made from: they are made anew when it changes."""
    if dataset == "stdlib":
        source = [sys.version, str(stdlib_folder())]
    else:
        source = [f"{p.resolve()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in local_files(Path(dataset))]
    return hashlib.sha256("\n".join([*source, WORDS, str(BPE_VOCAB), str(BPE_SAMPLE)]).encode()).hexdigest()[:16]


def load(dataset: str = "stdlib", folder: str | Path = "data") -> Corpus:
    """The corpus, tokenised on first use into `folder`. FileNotFoundError or ValueError for a dataset that cannot be used."""
    mark = fingerprint(dataset)  # first: an unknown dataset ends here
    name = dataset if dataset == "stdlib" else f"{Path(dataset).stem}-{mark[:8]}"
    home = Path(folder) / name
    if not is_whole(home, mark):
        tokenise(dataset, home, mark)
    vocab = (home / "vocab.json").read_text()
    ranks = json.loads(vocab)
    return Corpus(
        name=name,
        tokens={split: np.memmap(home / f"{split}.bin", np.uint16, mode="r") for split in ("train", "val")},
        encoding=tiktoken.get_encoding("gpt2") if ranks == "gpt2" else bpe_encoding([base64.b64decode(t) for t in ranks]),
        vocabulary=hashlib.sha256(vocab.encode()).hexdigest()[:16],
    )


def is_whole(home: Path, mark: str) -> bool:
    """True if `home` holds finished token files of this source: the meta file is written last."""
    try:
        meta = json.loads((home / "meta.json").read_text())
        return meta["fingerprint"] == mark and all((home / f"{s}.bin").stat().st_size == 2 * meta[s] for s in ("train", "val"))
    except (OSError, ValueError, KeyError):
        return False


def tokenise(dataset: str, home: Path, mark: str) -> None:
    """Write train.bin, val.bin, vocab.json and meta.json, in a folder of its own that is renamed when it is whole."""
    documents = list(tqdm(stdlib_documents() if dataset == "stdlib" else local_documents(Path(dataset)), desc="read", unit=" documents"))
    if not documents:
        raise ValueError(f"dataset {dataset!r} holds no text")
    encoding = choose_encoding(dataset, bpe_sample(documents))
    if encoding.n_vocab > 2**16:
        raise ValueError(f"encoding {encoding.name} has {encoding.n_vocab} tokens: uint16 holds 65,536")

    temporary = home.with_name(f"{home.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        size = Counter()
        with open(temporary / "train.bin", "wb") as train, open(temporary / "val.bin", "wb") as val:
            for split, ids in split_documents(documents, encoding):
                np.array([*ids, encoding.eot_token], np.uint16).tofile({"train": train, "val": val}[split])
                size[split] += len(ids) + 1
        ranks = "gpt2" if encoding.name == "gpt2" else [
            base64.b64encode(encoding.decode_single_token_bytes(i)).decode() for i in range(encoding.eot_token)
        ]
        (temporary / "vocab.json").write_text(json.dumps(ranks))
        meta = {"fingerprint": mark, "dataset": dataset, "encoding": encoding.name, "vocab_size": encoding.n_vocab, "documents": len(documents), **size}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2))
        shutil.rmtree(home, ignore_errors=True)
        os.replace(temporary, home)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"data: {dataset}: {len(documents):,} documents, {size['train']:,} training and {size['val']:,} validation tokens, vocabulary {encoding.n_vocab:,}")


def bpe_sample(documents: list[str]) -> str:
    """About BPE_SAMPLE characters of training documents, spread evenly over the corpus."""
    total = sum(map(len, documents))
    step = max(1, total // BPE_SAMPLE)
    return "".join(d for d in documents[::step] if not is_validation(d))[: 2 * BPE_SAMPLE] or documents[0][: int(0.95 * len(documents[0]))]


def is_validation(document: str) -> bool:
    return zlib.crc32(document.encode("utf-8", "replace")) % 20 == 0


def split_documents(documents: list[str], encoding: tiktoken.Encoding) -> Iterator[tuple[str, list[int]]]:
    """(split, tokens) of every document; where the hash leaves a split empty, the last document or its last 5 % goes there."""
    splits = ["val" if is_validation(d) else "train" for d in documents]
    if len(set(documents)) == 1:
        cut = int(0.95 * len(documents[0]))
        print("data: one document only: its last 5 % is the validation text")
        documents, splits = [documents[0][:cut], documents[0][cut:]], ["train", "val"]
    elif len(set(splits)) == 1:  # with all its copies
        splits = [{"train": "val", "val": "train"}[split] if d == documents[-1] else split for d, split in zip(documents, splits)]
    bar = tqdm(total=sum(map(len, documents)), desc="tokenise", unit=" characters", unit_scale=True)
    for i in range(0, len(documents), 64):  # a few documents at a time on several threads
        for split, document, ids in zip(splits[i : i + 64], documents[i : i + 64], encoding.encode_ordinary_batch(documents[i : i + 64], num_threads=os.cpu_count() or 1)):
            bar.update(len(document))
            yield split, ids
    bar.close()
