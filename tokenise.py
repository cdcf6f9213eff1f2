"""Text of any kind to token files: read once, tokenised once, drawn from for ever (data.py).

  A. byte-level BPE       learnt with numpy, held as a `tiktoken.Encoding`
  B. documents            `stdlib`: the Python standard library's own source; a .txt, .jsonl, .jsonl.zst or .parquet file or
                          a folder; `pile`, `simplestories`, `tinystories` or `hf:<id>[:column]` from the Hugging Face hub
  C. tokenising           in memory, or, where `max_tokens` or the hub asks for it, as a stream that can be restarted

Documents end with an end-of-text token. One document in twenty, chosen by a hash of its text, is validation: training
never sees it, nor a copy of it. Left out: shuffling of documents, two processes that tokenise the same set at once.
"""

import base64
import contextlib
import itertools
import json
import os
import shutil
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from run import settle, written

END_OF_TEXT = "<|endoftext|>"
# How text is cut into words before BPE: GPT-2's pattern.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BPE_VOCAB = 1024  # tokens of a learnt encoding, end-of-text included
BPE_SAMPLE = 2_000_000  # characters that it is learnt from
SUFFIXES = {
    ".txt": "text",
    ".jsonl": "json",
    ".jsonl.zst": "json",
    ".parquet": "parquet",
}  # file type to the builder of `datasets`
COLUMNS = (
    "text",
    "story",
    "content",
    "input_ids",
)  # where a document is looked for, in this order; input_ids is tokens already
HUB = {  # sets with a short name: (id on the hub, column)
    "pile": ("monology/pile-uncopyrighted", "text"),
    "simplestories": ("SimpleStories/SimpleStories", "story"),
    "tinystories": ("roneneldan/TinyStories", "text"),
}
SETTLE = 4_000_000  # tokens of a stream between two points that tokenising can be restarted from

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


def numbered_encoding(n: int) -> tiktoken.Encoding:
    """Stands in for the unknown vocabulary of text that came as n kinds of token: decodes id 42 to "<42>", encodes nothing."""
    ranks = {f"<{i}>".encode(): i for i in range(n - 1)}
    return tiktoken.Encoding(name="ids", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={f"<{n - 1}>": n - 1})


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


def file_type(path: Path) -> str:
    """The key of SUFFIXES that the file's name ends with, or ''."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def local_files(path: Path) -> list[Path]:
    """The file itself, or all files of a known type in a folder. FileNotFoundError, ValueError: see the text."""
    if not path.exists():
        raise FileNotFoundError(
            f"dataset {str(path)!r} does not exist: give 'stdlib', {', '.join(map(repr, HUB))}, 'hf:<id>[:column]' or the path of a {', '.join(SUFFIXES)} file or a folder of them"
        )
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if file_type(p))
    types = sorted(set(map(file_type, files)))
    if not files or not types[0]:
        raise ValueError(f"dataset {str(path)!r}: no {', '.join(SUFFIXES)} file there")
    if len(types) > 1:
        raise ValueError(f"dataset {str(path)!r} mixes {', '.join(types)} files: give one type at a time")
    if all(p.stat().st_size == 0 for p in files):
        raise ValueError(f"dataset {str(path)!r} is empty")
    return [p for p in files if p.stat().st_size > 0]


def hub_set(dataset: str) -> tuple[str, str] | None:
    """(id on the hub, column or '') of a dataset that is streamed from there; None for one of this machine."""
    if dataset.startswith("hf:"):
        id, _, column = dataset.removeprefix("hf:").partition(":")
        if not id:
            raise ValueError(f"dataset {dataset!r}: write 'hf:<id>' or 'hf:<id>:<column>'")
        return id, column
    return HUB.get(dataset)


@contextlib.contextmanager
def explained(dataset: str) -> Iterator[None]:
    """What the library that reads a dataset raises, of whatever type, becomes one ValueError that says what to do."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if hub_set(dataset) is None:
            raise ValueError(
                f"dataset {dataset!r} cannot be read as {SUFFIXES[file_type(local_files(Path(dataset))[0])]}: {reason}"
            ) from error
        from huggingface_hub import constants

        raise ValueError(
            f"dataset {dataset!r}: the data step failed, as {hub_set(dataset)[0]} cannot be read from {constants.ENDPOINT} ({reason}): "
            "set HF_HOME to a cache that holds it, HF_ENDPOINT to a mirror, or give the path of a local copy"
        ) from error


def open_rows(dataset: str):
    """The rows of a local or hub dataset as an IterableDataset of `datasets`: nothing is downloaded or copied beforehand."""
    import datasets

    hub = hub_set(dataset)
    files = [] if hub else [str(p) for p in local_files(Path(dataset))]
    with explained(dataset):
        if hub:
            return datasets.load_dataset(hub[0], split="train", streaming=True)
        builder = SUFFIXES[file_type(Path(files[0]))]
        options = {"sample_by": "document"} if builder == "text" else {}
        return datasets.load_dataset(builder, data_files=files, split="train", streaming=True, **options)


def documents_of(dataset: str, rows) -> Iterator[str | list[int]]:
    """The document of every row that is not empty: text, or token ids. Each .txt file is one row."""
    column = (hub_set(dataset) or ("", ""))[1]
    rows = iter(rows)
    while True:
        with explained(dataset):
            row = next(rows, None)
        if row is None:
            return
        if column not in row:
            found = [] if column else [name for name in COLUMNS if name in row]
            if not found:
                raise ValueError(
                    f"dataset {dataset!r} has columns {', '.join(row)}: "
                    + (
                        f"there is no {column!r}"
                        if column
                        else f"one must be {', '.join(map(repr, COLUMNS[:-1]))} or {COLUMNS[-1]!r}"
                    )
                )
            column = found[0]
        document = row[column]
        if (
            document
            and not isinstance(document, str)
            and not (isinstance(document, list) and isinstance(document[0], int))
        ):
            raise ValueError(
                f"dataset {dataset!r}: column {column!r} holds {type(document).__name__}, not text or token ids"
            )
        if document:
            yield document


def local_documents(path: Path) -> Iterator[str | list[int]]:
    """The documents of a file or folder: each .txt file is one, each row of a .jsonl or .parquet file is one."""
    return documents_of(str(path), open_rows(str(path)))


def gpt2(dataset: str) -> tiktoken.Encoding:
    """GPT-2's encoding. ValueError, naming what to set, where it is not at hand and cannot be downloaded."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken raises whatever its download raised
        raise ValueError(
            f"dataset {dataset!r}: the vocabulary step failed, as GPT-2's encoding cannot be read from openaipublic.blob.core.windows.net "
            f"({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a folder that holds it, or give a local path, for which a BPE is learnt"
        ) from error


def choose_encoding(dataset: str, sample: str) -> tiktoken.Encoding:
    """A learnt BPE for the standard library; for other text GPT-2's encoding, or a learnt one where it cannot be had."""
    if dataset != "stdlib":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken raises whatever its download raised
            print(
                f"data: GPT-2's vocabulary cannot be had here ({type(error).__name__}): learning a BPE of {BPE_VOCAB} tokens from the text"
            )
    return bpe_encoding(learn_bpe(sample, BPE_VOCAB - 1))


def vocab_of(encoding: tiktoken.Encoding) -> str | int | list[str]:
    """What vocab.json holds: "gpt2", the number of anonymous tokens, or the tokens of a learnt BPE in base64."""
    if encoding.name in ("gpt2", "ids"):
        return "gpt2" if encoding.name == "gpt2" else encoding.n_vocab
    return [base64.b64encode(encoding.decode_single_token_bytes(i)).decode() for i in range(encoding.eot_token)]


def encoding_of(vocab: str | int | list[str], dataset: str) -> tiktoken.Encoding:
    """The inverse of `vocab_of`. ValueError if GPT-2's encoding is needed and cannot be had."""
    if isinstance(vocab, int):
        return numbered_encoding(vocab)
    return gpt2(dataset) if vocab == "gpt2" else bpe_encoding([base64.b64decode(t) for t in vocab])


# ---------------------------------------------------------------------------------------------------------------------
# C. Tokenising


def finish(temporary: Path, home: Path, meta: dict, encoding: tiktoken.Encoding) -> None:
    """vocab.json and meta.json beside the token files, and the folder gets its name, all of it on the disk."""
    (temporary / "vocab.json").write_text(json.dumps(vocab_of(encoding)))
    meta = meta | {"encoding": encoding.name, "vocab_size": encoding.n_vocab}
    (temporary / "meta.json").write_text(json.dumps(meta, indent=2))
    for path in (*temporary.iterdir(), temporary):
        settle(path)
    shutil.rmtree(home, ignore_errors=True)
    os.replace(temporary, home)
    settle(home.parent)
    print(
        f"data: {meta['dataset']}: {meta['documents']:,} documents, {meta['train']:,} training and {meta['val']:,} validation tokens, vocabulary {encoding.n_vocab:,}"
    )


def tokenise(dataset: str, home: Path, mark: str) -> None:
    """Write train.bin, val.bin, vocab.json and meta.json, in a folder of its own that is renamed when it is whole."""
    documents = list(
        tqdm(
            stdlib_documents() if dataset == "stdlib" else local_documents(Path(dataset)),
            desc="read",
            unit=" documents",
        )
    )
    if not documents:
        raise ValueError(f"dataset {dataset!r} holds no text")
    if isinstance(documents[0], list):
        raise ValueError(f"dataset {dataset!r} holds token ids: give --max_tokens, as they are read as a stream")
    encoding = choose_encoding(dataset, bpe_sample(documents))
    assert encoding.n_vocab <= 2**16, "uint16 holds 65,536 tokens"

    temporary = home.with_name(f"{home.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        size = Counter()
        with open(temporary / "train.bin", "wb") as train, open(temporary / "val.bin", "wb") as val:
            for split, ids in split_documents(documents, encoding):
                np.array([*ids, encoding.eot_token], np.uint16).tofile({"train": train, "val": val}[split])
                size[split] += len(ids) + 1
        finish(
            temporary, home, {"fingerprint": mark, "dataset": dataset, "documents": len(documents), **size}, encoding
        )
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tokenise_stream(dataset: str, home: Path, mark: str, max_tokens: int) -> None:
    """As `tokenise`, but a few documents at a time and only until there are max_tokens tokens (0: until the end).

    Restartable at any moment: progress.json names the documents, tokens and place in the source that are on the disk; what
    came after it is cut off and made again. A full disk is an OSError that leaves this state.
    """
    rows = open_rows(dataset)
    part = home.with_name(home.name + ".part")
    progress = {"fingerprint": mark, "source": None, "vocab": None, "documents": 0, "train": 0, "val": 0, "largest": 0}
    try:
        saved = json.loads((part / "progress.json").read_text())
        if saved["fingerprint"] == mark and all(
            (part / f"{s}.bin").stat().st_size >= 2 * saved[s] for s in ("train", "val")
        ):
            progress = saved
            rows.load_state_dict(saved["source"])
            print(f"data: {dataset}: going on after document {saved['documents']:,}")
    except (OSError, ValueError, KeyError):
        pass  # none, or of another source: from the beginning
    documents = documents_of(dataset, rows)
    first = next(documents, None)
    if first is None and not progress["documents"]:
        raise ValueError(f"dataset {dataset!r} holds no text")
    encoding = stream_encoding(dataset, first) if progress["vocab"] is None else encoding_of(progress["vocab"], dataset)
    progress["vocab"] = vocab_of(encoding)
    documents = itertools.chain([first] if first is not None else [], documents)

    def settled() -> None:
        for split, file in files.items():
            file.flush()
            os.fsync(file.fileno())
        with written(part / "progress.json") as temporary:
            temporary.write_text(json.dumps(progress | {"source": rows.state_dict()}))

    try:
        part.mkdir(parents=True, exist_ok=True)
        with open(part / "train.bin", "ab") as train, open(part / "val.bin", "ab") as val:
            files = {"train": train, "val": val}
            for split, file in files.items():
                file.truncate(2 * progress[split])
            total = progress["train"] + progress["val"]
            bar = tqdm(total=max_tokens or None, initial=total, desc="tokenise", unit=" tokens", unit_scale=True)
            next_settle = total + SETTLE
            while (not max_tokens or total < max_tokens) and (some := list(itertools.islice(documents, 64))):
                for document, ids in zip(some, ids_of(dataset, some, encoding)):
                    split = "val" if is_validation(document) else "train"
                    ids.tofile(files[split])
                    progress["documents"] += 1
                    progress[split] += len(ids)
                    progress["largest"] = max(progress["largest"], int(ids.max()))
                    total += len(ids)
                    if max_tokens and total >= max_tokens:
                        break
                bar.update(total - bar.n)
                if total >= next_settle:
                    next_settle = total + SETTLE
                    settled()
            settled()
            bar.close()
    except OSError as error:
        raise OSError(
            f"cannot write the tokens of {dataset!r} to {part} ({error.strerror or error}): make room and give the same command again, it goes on from there"
        ) from error
    if total < max_tokens:
        print(
            f"data: {dataset} ends after {total:,} tokens, fewer than the {max_tokens:,} asked for: training goes round it more than once"
        )
    if not (progress["train"] and progress["val"]):
        shutil.rmtree(part)
        if hub_set(dataset) or encoding.name == "ids":
            raise ValueError(
                f"dataset {dataset!r}: its {progress['documents']} documents are too few for a training and a validation set: raise --max_tokens"
            )
        return tokenise(dataset, home, mark)  # so few documents that one has to be divided
    if encoding.name == "ids":
        encoding = numbered_encoding(progress["largest"] + 1)
    finish(
        part,
        home,
        {"dataset": dataset, **{name: progress[name] for name in ("fingerprint", "documents", "train", "val")}},
        encoding,
    )
    (home / "progress.json").unlink()  # only now that nothing can be lost


def stream_encoding(dataset: str, first: str | list[int]) -> tiktoken.Encoding:
    """GPT-2's encoding; for token ids their own; for local text where GPT-2's cannot be had one learnt from its beginning."""
    if isinstance(first, list):
        return numbered_encoding(2)  # its size is known at the end
    if hub_set(dataset):
        return gpt2(dataset)
    sample, size = [], 0
    for document in documents_of(dataset, open_rows(dataset)):
        if not is_validation(document):
            sample.append(document)
            size += len(document)
        if size > BPE_SAMPLE:
            break
    return choose_encoding(dataset, "".join(sample)[: 2 * BPE_SAMPLE] or first)


def ids_of(dataset: str, documents: list[str] | list[list[int]], encoding: tiktoken.Encoding) -> list[np.ndarray]:
    """uint16 tokens of each document: text with an end-of-text token behind it, ids as they came."""
    if encoding.name != "ids":
        return [
            np.array([*ids, encoding.eot_token], np.uint16)
            for ids in encoding.encode_ordinary_batch(documents, num_threads=os.cpu_count() or 1)
        ]
    for ids in documents:
        if min(ids) < 0 or max(ids) >= 2**16:
            raise ValueError(
                f"dataset {dataset!r} has the token id {min(ids) if min(ids) < 0 else max(ids)}: 0 to 65,535 can be stored"
            )
    return [np.array(ids, np.uint16) for ids in documents]


def bpe_sample(documents: list[str]) -> str:
    """About BPE_SAMPLE characters of training documents, spread evenly over the corpus."""
    total = sum(map(len, documents))
    step = max(1, total // BPE_SAMPLE)
    return (
        "".join(d for d in documents[::step] if not is_validation(d))[: 2 * BPE_SAMPLE]
        or documents[0][: int(0.95 * len(documents[0]))]
    )


def is_validation(document: str | list[int]) -> bool:
    content = (
        document.encode("utf-8", "replace") if isinstance(document, str) else np.array(document, np.int64).tobytes()
    )
    return zlib.crc32(content) % 20 == 0


def split_documents(documents: list[str], encoding: tiktoken.Encoding) -> Iterator[tuple[str, list[int]]]:
    """(split, tokens) of every document; where the hash leaves a split empty, the last document or its last 5 % goes there."""
    splits = ["val" if is_validation(d) else "train" for d in documents]
    if len(set(documents)) == 1:
        cut = int(0.95 * len(documents[0]))
        print("data: one document only: its last 5 % is the validation text")
        documents, splits = [documents[0][:cut], documents[0][cut:]], ["train", "val"]
    elif len(set(splits)) == 1:  # with all its copies
        splits = [
            {"train": "val", "val": "train"}[split] if d == documents[-1] else split
            for d, split in zip(documents, splits)
        ]
    bar = tqdm(total=sum(map(len, documents)), desc="tokenise", unit=" characters", unit_scale=True)
    for i in range(0, len(documents), 64):  # a few documents at a time on several threads
        for split, document, ids in zip(
            splits[i : i + 64],
            documents[i : i + 64],
            encoding.encode_ordinary_batch(documents[i : i + 64], num_threads=os.cpu_count() or 1),
        ):
            bar.update(len(document))
            yield split, ids
    bar.close()
