"""Text of any kind to token files: read once, tokenised once, drawn from for ever (data.py).

  A. byte-level BPE   learnt with numpy, held as a `tiktoken.Encoding`
  B. documents        `stdlib`: the Python standard library's own source; a .txt, .jsonl, .jsonl.zst or .parquet file or
                      a folder; `pile`, `simplestories`, `tinystories` or `hf:<id>[:column]` from the Hugging Face hub
  C. encodings        a learnt BPE for `stdlib`; for other text GPT-2's, or a learnt one where that cannot be had
  D. token files      made in memory or, where `max_tokens` or the hub asks for it, as a stream that can be restarted;
                      what is not of our making is never deleted, nor written over

Documents end with an end-of-text token. One document in twenty, chosen by a hash of its text, is validation: training
never sees it, nor a copy of it. Left out: shuffling of documents, two processes that tokenise the same set at once.
"""

import base64
import contextlib
import itertools
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from run import UserError, settle, write_text

END_OF_TEXT = "<|endoftext|>"
# How text is cut into words before BPE: GPT-2's pattern.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BPE_VOCAB = 1024  # tokens of a learnt encoding, end-of-text included
BPE_SAMPLE = 2_000_000  # characters that it is learnt from
# The types of local files, and which builder of `datasets` reads each.
SUFFIXES = {".txt": "text", ".jsonl": "json", ".jsonl.zst": "json", ".parquet": "parquet"}
COLUMNS = ("text", "story", "content", "input_ids")  # where a document is, the first that exists; input_ids is tokens
HUB = {  # sets with a short name: (id on the hub, column)
    "pile": ("monology/pile-uncopyrighted", "text"),
    "simplestories": ("SimpleStories/SimpleStories", "story"),
    "tinystories": ("roneneldan/TinyStories", "text"),
}
SETTLE = 4_000_000  # tokens of a stream between two points that tokenising can be restarted from
NAMES = ("train.bin", "val.bin", "vocab.json", "progress.json", "meta.json")
FILES = [name + end for name in NAMES for end in (".tmp", "")]  # what a folder of ours can hold

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
        frequency = np.bincount(pair[inside], weights=weight[:-1][inside], minlength=1)
        best = int(frequency.argmax())
        if frequency[best] < 2:
            break
        left, right = divmod(best, vocab_size)
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
    ranks, end = {token: rank for rank, token in enumerate(tokens)}, {END_OF_TEXT: len(tokens)}
    return tiktoken.Encoding(f"bpe-{len(tokens) + 1}", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=end)


def numbered_encoding(n: int) -> tiktoken.Encoding:
    """Stands in for the unknown vocabulary of text that came as ids below n: it decodes 42 to "<42>"."""
    ranks = {f"<{i}>".encode(): i for i in range(n - 1)}
    return tiktoken.Encoding("ids", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={f"<{n - 1}>": n - 1})


# ---------------------------------------------------------------------------------------------------------------------
# B. Documents


def stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_documents() -> Iterator[str]:
    """Every .py file of the Python standard library here, in order of its path; installed packages excluded."""
    root = stdlib_folder()
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def file_type(path: Path) -> str:
    """The key of SUFFIXES that the file's name ends with, or ''."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def local_files(path: Path) -> list[Path]:
    """The file itself, or all files of a known type in a folder, without empty ones. UserError if there is none."""
    if not path.exists():
        raise UserError(
            f"dataset {str(path)!r} does not exist: give 'stdlib', {', '.join(map(repr, HUB))}, 'hf:<id>[:column]' "
            f"or the path of a {', '.join(SUFFIXES)} file or a folder of them"
        )
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if file_type(p))
    types = sorted(set(map(file_type, files)))
    if not files or not types[0]:
        raise UserError(f"dataset {str(path)!r}: no {', '.join(SUFFIXES)} file there")
    if len(types) > 1:
        raise UserError(f"dataset {str(path)!r} mixes {', '.join(types)} files: give one type at a time")
    if not (files := [p for p in files if p.stat().st_size > 0]):
        raise UserError(f"dataset {str(path)!r} is empty")
    return files


def hub_set(dataset: str) -> tuple[str, str] | None:
    """(id on the hub, column or '') of a dataset that is streamed from there; None for one of this machine."""
    if not dataset.startswith("hf:"):
        return HUB.get(dataset)
    id, _, column = dataset.removeprefix("hf:").partition(":")
    if not id:
        raise UserError(f"dataset {dataset!r}: write 'hf:<id>' or 'hf:<id>:<column>'")
    return id, column


@contextlib.contextmanager
def explained(problem: str, remedy: str = "", kind: type[Exception] = Exception) -> Iterator[None]:
    """What a library or the disk (OSError) refuses becomes one UserError, "problem (reason): remedy"."""
    try:
        yield
    except kind as error:
        line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        reason = (kind is OSError and error.strerror) or line
        raise UserError(f"{problem} ({reason}){remedy and ': '}{remedy}") from error


def unreadable(dataset: str) -> tuple[str, str]:
    """The problem and the remedy where the rows of a dataset cannot be read."""
    if not (hub := hub_set(dataset)):
        return f"dataset {dataset!r} cannot be read as {SUFFIXES[file_type(local_files(Path(dataset))[0])]}", ""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    problem = f"dataset {dataset!r}: the data step failed, as {hub[0]} cannot be read from {endpoint}"
    return problem, "set HF_HOME to a cache that holds it, HF_ENDPOINT to a mirror, or give the path of a local copy"


def open_rows(dataset: str):
    """The rows of a local or hub dataset, an IterableDataset of `datasets`: nothing is downloaded or copied before."""
    import datasets

    if hub := hub_set(dataset):
        source, options = hub[0], {}
    else:
        files = local_files(Path(dataset))
        source, options = SUFFIXES[file_type(files[0])], {"data_files": list(map(str, files))}
        options |= {"sample_by": "document"} if source == "text" else {}
    with explained(*unreadable(dataset)):
        return datasets.load_dataset(source, split="train", streaming=True, **options)


def documents_of(dataset: str, rows) -> Iterator[str | list[int]]:
    """The document of every row that is not empty: text, or token ids. Each .txt file is one row."""
    column, problem = (hub_set(dataset) or ("", ""))[1], unreadable(dataset)
    rows = iter(rows)
    while True:
        with explained(*problem):
            row = next(rows, None)
        if row is None:
            return
        column = column or next((name for name in COLUMNS if name in row), "")
        if column not in row:
            wanted = f"there is no {column!r}" if column else f"one must be {', '.join(map(repr, COLUMNS))}"
            raise UserError(f"dataset {dataset!r} has columns {', '.join(row)}: {wanted}")
        document = row[column]
        if not document:
            continue
        if not isinstance(document, str) and not (isinstance(document, list) and isinstance(document[0], int)):
            raise UserError(f"dataset {dataset!r}: {column!r} holds {type(document).__name__}, not text or token ids")
        yield document


def is_validation(document: str | list[int]) -> bool:
    """True for one document in twenty, chosen by its content alone."""
    is_text = isinstance(document, str)
    content = document.encode("utf-8", "replace") if is_text else np.array(document, np.int64).tobytes()
    return zlib.crc32(content) % 20 == 0


def split_documents(documents: list[str]) -> list[tuple[str, str]]:
    """(split, document) of each. If one split would be empty, the last document or its last 5 % goes there."""
    if len(set(documents)) == 1:
        cut = int(0.95 * len(documents[0]))
        print("data: one document only: its last 5 % is the validation text")
        return [("train", documents[0][:cut]), ("val", documents[0][cut:])]
    splits = ["val" if is_validation(document) else "train" for document in documents]
    if len(set(splits)) == 1:
        other = {"train": "val", "val": "train"}[splits[0]]
        splits = [other if d == documents[-1] else splits[0] for d in documents]  # with all its copies
    return list(zip(splits, documents))


def sample_of(documents: Iterable[str], size: int) -> str:
    """The first `size` characters of training text."""
    sample, training = "", (document for document in documents if not is_validation(document))
    while len(sample) < size and (document := next(training, "")):
        sample += document
    return sample[:size]


# ---------------------------------------------------------------------------------------------------------------------
# C. Encodings


def gpt2(dataset: str) -> tiktoken.Encoding:
    """GPT-2's encoding. UserError, naming what to set, where it is not at hand and cannot be downloaded."""
    where = "openaipublic.blob.core.windows.net"
    problem = f"dataset {dataset!r}: the vocabulary step failed, as GPT-2's encoding cannot be read from {where}"
    remedy = "set TIKTOKEN_CACHE_DIR to a folder that holds it, or give a local path, for which a BPE is learnt"
    with explained(problem, remedy):
        return tiktoken.get_encoding("gpt2")


def choose_encoding(dataset: str, sample: Callable[[], str]) -> tiktoken.Encoding:
    """A BPE learnt from the sample for `stdlib`; GPT-2's encoding for other text, or for local text a learnt BPE."""
    if dataset != "stdlib":
        try:
            return gpt2(dataset)
        except UserError as error:
            if hub_set(dataset):
                raise
            print(f"data: GPT-2's vocabulary cannot be had here ({type(error.__cause__).__name__}): ", end="")
            print(f"learning a BPE of {BPE_VOCAB} tokens from the text")
    return bpe_encoding(learn_bpe(sample(), BPE_VOCAB - 1))


def vocab_of(encoding: tiktoken.Encoding) -> str | int | list[str]:
    """What vocab.json holds: "gpt2", the number of anonymous tokens, or the tokens of a learnt BPE in base64."""
    if encoding.name in ("gpt2", "ids"):
        return "gpt2" if encoding.name == "gpt2" else encoding.n_vocab
    return [base64.b64encode(encoding.decode_single_token_bytes(i)).decode() for i in range(encoding.eot_token)]


def encoding_of(vocab: str | int | list[str], dataset: str) -> tiktoken.Encoding:
    """The inverse of `vocab_of`. UserError if GPT-2's encoding is needed and cannot be had."""
    if isinstance(vocab, int):
        return numbered_encoding(vocab)
    return gpt2(dataset) if vocab == "gpt2" else bpe_encoding([base64.b64decode(t) for t in vocab])


# ---------------------------------------------------------------------------------------------------------------------
# D. Token files


def read_mark(path: Path) -> dict:
    """A meta.json or progress.json of ours, which has a fingerprint; {} if it is missing, broken or another's."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and "fingerprint" in content else {}


def stored(folder: Path) -> dict[str, float]:
    """How many tokens train.bin and val.bin hold; a missing file holds none."""
    files = {split: folder / f"{split}.bin" for split in ("train", "val")}
    return {split: file.stat().st_size / 2 if file.exists() else 0 for split, file in files.items()}


def check_ours(folder: Path, proof: str) -> None:
    """UserError unless the path is free, or a folder that holds nothing but FILES, with a fingerprint in `proof`.

    An empty folder is as good as none. A link is never ours, whatever it points to.
    """
    if not os.path.lexists(folder):
        return
    names = os.listdir(folder) if folder.is_dir() and not folder.is_symlink() else [folder.name]
    foreign = sorted(set(names) - set(FILES))
    if foreign or (names and not read_mark(folder / proof)):
        what = f"{foreign[0]!r} is not" if foreign else f"without a whole {proof} it cannot be known to be"
        raise UserError(f"{folder} is in the way and stays, as {what} of this code's making: give another --data_dir")


def remove(folder: Path) -> None:
    """Delete a folder, if it is there, that holds nothing but FILES; what proves it to be ours goes last."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    if folder.exists():
        folder.rmdir()


def encoded(dataset: str, pairs: Iterable[tuple], encoding: tiktoken.Encoding) -> Iterator[list[tuple]]:
    """(split, document) to (split, uint16 tokens), in lists of 64 that several threads encode.

    Text gets an end-of-text token behind it, token ids stay as they are. UserError for an id that cannot be stored.
    """
    pairs = iter(pairs)
    while some := list(itertools.islice(pairs, 64)):
        splits, documents = zip(*some)
        if encoding.name != "ids":
            texts = encoding.encode_ordinary_batch(list(documents), num_threads=os.cpu_count() or 1)
            documents = [[*ids, encoding.eot_token] for ids in texts]
        arrays = [np.array(ids) for ids in documents]
        if wrong := [id for ids in arrays for id in (ids.min(), ids.max()) if not 0 <= id < 2**16]:
            raise UserError(f"dataset {dataset!r} has the token id {wrong[0]}: 0 to 65,535 can be stored")
        yield list(zip(splits, (ids.astype(np.uint16) for ids in arrays)))


def append(part: Path, progress: dict, lists: Iterator[list], place: Callable[[], dict], max_tokens: float) -> None:
    """Write tokens behind those that `progress` counts, until it counts max_tokens or there are no more.

    place: tells where the source stands; progress.json holds it beside the counts, as a point to restart from.
    """
    with open(part / "train.bin", "ab") as train, open(part / "val.bin", "ab") as val:
        files = {"train": train, "val": val}
        for split, file in files.items():
            file.truncate(2 * progress[split])
        total = settled = progress["train"] + progress["val"]
        bar = tqdm(total=max_tokens, initial=total, desc="tokenise", unit=" tokens", unit_scale=True)
        some = True
        while some:
            some = next(lists, []) if total < max_tokens else []
            for split, ids in some:
                files[split].write(ids.tobytes())
                progress["documents"] += 1
                progress[split] += len(ids)
                progress["largest"] = max(progress["largest"], int(ids.max()))
                total += len(ids)
                if total >= max_tokens:
                    break
            bar.update(total - bar.n)
            if not some or total >= settled + SETTLE:
                settled = total
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                write_text(part / "progress.json", json.dumps(progress | {"source": place()}))
        bar.close()


def finish(made: Path, home: Path, meta: dict, encoding: tiktoken.Encoding) -> None:
    """vocab.json and, last, meta.json beside the token files; the folder gets its name, in place of an older one."""
    for split in ("train", "val"):
        settle(made / f"{split}.bin")
    write_text(made / "vocab.json", json.dumps(vocab_of(encoding)))
    meta = meta | {"encoding": encoding.name, "vocab_size": encoding.n_vocab}
    write_text(made / "meta.json", json.dumps(meta, indent=2))
    check_ours(home, "meta.json")  # again, as hours may have passed
    remove(home)
    os.replace(made, home)
    settle(home.parent)
    (home / "progress.json").unlink(missing_ok=True)  # only now that nothing can be lost
    print(f"data: {meta['dataset']}: {meta['documents']:,} documents, {meta['train']:,} training and ", end="")
    print(f"{meta['val']:,} validation tokens, vocabulary {encoding.n_vocab:,}")


def tokenise(dataset: str, home: Path, mark: str) -> None:
    """Write the token files of `dataset`, read into memory, in a new folder that is named `home` when it is whole."""
    check_ours(home, "meta.json")
    source = stdlib_documents() if dataset == "stdlib" else documents_of(dataset, open_rows(dataset))
    documents = list(tqdm(source, desc="read", unit=" documents"))
    if not documents:
        raise UserError(f"dataset {dataset!r} holds no text")
    if isinstance(documents[0], list):
        raise UserError(f"dataset {dataset!r} holds token ids: give --max_tokens, as they are read as a stream")
    step = max(1, sum(map(len, documents)) // BPE_SAMPLE)  # a sample spread evenly over the corpus
    most = documents[0][: len(documents[0]) * 19 // 20]  # where the only document is validation text by its hash
    encoding = choose_encoding(dataset, lambda: sample_of(documents[::step], 2 * BPE_SAMPLE) or most)
    assert encoding.n_vocab <= 2**16, "uint16 holds 65,536 tokens"

    meta = {"fingerprint": mark, "dataset": dataset, "documents": len(documents), "train": 0, "val": 0}
    pairs = tqdm(split_documents(documents), desc="tokenise", unit=" documents")
    made = home.with_name(f"{home.name}.{os.urandom(4).hex()}.tmp")
    remedy = "make room and give the same command again"
    with explained(f"cannot write the tokens of {dataset!r} to {home}", remedy, OSError):
        made.mkdir(parents=True)
        try:
            with open(made / "train.bin", "wb") as train, open(made / "val.bin", "wb") as val:
                for split, ids in itertools.chain.from_iterable(encoded(dataset, pairs, encoding)):
                    {"train": train, "val": val}[split].write(ids.tobytes())
                    meta[split] += len(ids)
            finish(made, home, meta, encoding)
        finally:
            remove(made)


def tokenise_stream(dataset: str, home: Path, mark: str, max_tokens: int) -> None:
    """As `tokenise`, but a few documents at a time and only until there are max_tokens tokens (0: until the end).

    Restartable at any moment: progress.json in <home>.part names the documents, tokens and place in the source that are
    on the disk; what came after it is cut off and made again. A full disk is a UserError that leaves this state.
    """
    part = home.with_name(home.name + ".part")
    check_ours(home, "meta.json")
    check_ours(part, "progress.json")
    rows = open_rows(dataset)
    progress = {"fingerprint": mark, "source": None, "vocab": None, "documents": 0, "train": 0, "val": 0, "largest": 0}
    saved, there = read_mark(part / "progress.json"), stored(part)
    if saved.get("fingerprint") == mark and saved["documents"] and all(there[s] >= saved[s] for s in there):
        progress = saved
        rows.load_state_dict(saved["source"])
        print(f"data: {dataset}: going on after document {saved['documents']:,}")
    documents = documents_of(dataset, rows)
    if progress is not saved:
        if (first := next(documents, None)) is None:
            raise UserError(f"dataset {dataset!r} holds no text")
        documents = itertools.chain([first], documents)
        sample = lambda: sample_of(documents_of(dataset, open_rows(dataset)), BPE_SAMPLE) or first
        # Token ids have a stand-in for now: how many kinds there are is known at the end.
        progress["vocab"] = 2 if isinstance(first, list) else vocab_of(choose_encoding(dataset, sample))
    encoding = encoding_of(progress["vocab"], dataset)

    pairs = (("val" if is_validation(document) else "train", document) for document in documents)
    remedy = "make room and give the same command again, it goes on from there"
    with explained(f"cannot write the tokens of {dataset!r} to {part}", remedy, OSError):
        part.mkdir(parents=True, exist_ok=True)
        if progress is not saved:
            write_text(part / "progress.json", json.dumps(progress))  # before any other file: it makes the folder ours
        append(part, progress, encoded(dataset, pairs, encoding), rows.state_dict, max_tokens or float("inf"))
        total = progress["train"] + progress["val"]
        if total < max_tokens:
            print(f"data: {dataset} ends after {total:,} tokens, fewer than the {max_tokens:,} asked for: ", end="")
            print("training goes round it more than once")
        if progress["train"] and progress["val"]:
            if encoding.name == "ids":
                encoding = numbered_encoding(progress["largest"] + 1)
            meta = {"dataset": dataset} | {k: progress[k] for k in ("fingerprint", "documents", "train", "val")}
            return finish(part, home, meta, encoding)
        remove(part)
    if hub_set(dataset) or encoding.name == "ids":
        few = f"its {progress['documents']} documents are too few for a training and a validation set"
        raise UserError(f"dataset {dataset!r}: {few}: raise --max_tokens")
    tokenise(dataset, home, mark)  # so few documents that one has to be divided
