"""Text of any kind to token files: read once, tokenised once, drawn from for ever (data.py).

  A. byte-level BPE   learnt with numpy, held as a `tiktoken.Encoding`
  B. documents        `stdlib`: the Python standard library's own source; a .txt, .jsonl, .jsonl.zst or .parquet file or
                      a folder; `pile`, `simplestories`, `tinystories` or `hf:<id>[:column]` from the Hugging Face hub
  C. encodings        a learnt BPE for `stdlib`; for other text GPT-2's, or a learnt one where that cannot be had; for a
                      model that we have not trained its own
  D. token files      made a few documents at a time, so that it can stop at any moment and go on from there;
                      what is not of our making is never deleted, nor written over

Documents end with an end-of-text token. A twentieth of all tokens is validation text. It is whole documents, chosen by
a hash of their text: training never sees them, nor a copy of them. Left out: shuffling of documents.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import tiktoken
from tqdm import tqdm

from flags import UserError
from run import is_run_folder, settle, write_text

END_OF_TEXT = "<|endoftext|>"
# How text is cut into words before BPE: GPT-2's pattern.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BPE_VOCAB = 1024  # tokens of a learnt encoding, end-of-text included
BPE_SAMPLE = 2_000_000  # characters that it is learnt from
SPACE = 100_000  # characters of white space in a row that are encoded at once
SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".parquet")  # the types of local files
COLUMNS = ("text", "story", "content", "input_ids")  # where a document is, the first that exists; input_ids is tokens
HUB = {  # sets with a short name: (id on the hub, column)
    "pile": ("monology/pile-uncopyrighted", "text"),
    "simplestories": ("SimpleStories/SimpleStories", "story"),
    "tinystories": ("roneneldan/TinyStories", "text"),
}
SETTLE = 4_000_000  # tokens of a stream between two points that tokenising can be restarted from
MARKS = ("meta.json", "progress.json")  # what proves a folder to be of our making
NAMES = ("tokens.bin", "documents.bin", "train.bin", "val.bin", "vocab.json", "progress.json", "meta.json")
FILES = [name + end for name in NAMES for end in (".tmp", "")]  # what a folder of ours can hold
END = object()  # what `next` gives where there are no more rows

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
        inside, n = (ids[:-1] >= 0) & (ids[1:] >= 0), len(tokens)
        pair = ids[:-1] * n + ids[1:]
        frequency = np.bincount(pair[inside], weights=weight[:-1][inside], minlength=1)
        best = int(frequency.argmax())
        if frequency[best] < 2:
            break
        left, right = divmod(best, n)
        at = np.flatnonzero(inside & (pair == best))
        if left == right:  # in a run like "aaa" the two candidates overlap: keep every second one
            run_start = np.r_[True, np.diff(at) > 1]
            offset = at - np.maximum.accumulate(np.where(run_start, at, 0))
            at = at[offset % 2 == 0]
        ids[at] = n
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


def stdlib_files() -> list[Path]:
    """Every .py file of the Python standard library here, in order of its path; installed packages excluded."""
    files = []
    for folder, inside, names in os.walk(stdlib_folder()):
        inside[:] = set(inside) - {"site-packages", "dist-packages"}
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def file_type(path: Path) -> str:
    """The one of SUFFIXES that the file's name ends with, or ''."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def files_in(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """All files of a known type in a folder, in order of their paths; links are followed, but no folder read twice.

    Left out: hidden files and folders, and what this code itself writes: token files and run folders.
    """
    if folder.resolve() in seen or is_run_folder(folder) or any(read_mark(folder / mark) for mark in MARKS):
        return
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "~$")):
            continue
        if path.is_dir():
            yield from files_in(path, seen)
        elif file_type(path):
            yield path


def local_files(dataset: str) -> list[Path]:
    """The files of a local dataset: `stdlib`, a file or a folder; without empty ones. UserError if there is none."""
    if dataset == "stdlib":
        return stdlib_files()
    path, known = Path(dataset), ", ".join(SUFFIXES)
    if not dataset or not path.exists():
        why = "is a link to nothing" if path.is_symlink() else "does not exist" if dataset else "has no name"
        names = f"'stdlib', {', '.join(map(repr, HUB))}, 'hf:<id>[:column]'"
        raise UserError(f"dataset {dataset!r} {why}: give {names} or the path of a {known} file or a folder of them")
    files = [path] if path.is_file() else list(files_in(path, set()))
    types = sorted(set(map(file_type, files)))
    if not files or not types[0]:
        raise UserError(f"dataset {dataset!r}: no {known} file there")
    if len(types) > 1:
        one_each = ", ".join(str(next(p for p in files if file_type(p) == type)) for type in types)
        raise UserError(f"dataset {dataset!r} mixes {', '.join(types)} files ({one_each}): give one type at a time")
    for file in files:
        if not file.is_file():
            raise UserError(f"dataset {dataset!r}: {file} is no file that can be read: take it out, or mend the link")
    if not (files := [p for p in files if p.stat().st_size > 0]):
        raise UserError(f"dataset {dataset!r} is empty")
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
    except UserError:
        raise
    except kind as error:
        line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        reason = (isinstance(error, OSError) and error.strerror) or line
        raise UserError(f"{problem} ({reason}){remedy and ': '}{remedy}") from error


class LocalRows:
    """The rows of local files of one type, in order: objects that hold a document, or None for an empty line.

    As a stream of `datasets` does, it tells where it stands and goes on from there. `where` names the row for messages.
    Any other field of a row is not looked at: what it holds, or that it changes its type, does not matter.
    """

    def __init__(self, files: list[Path], lenient: bool = False) -> None:
        self.files, self.lenient, self.file, self.row = files, lenient, 0, 0

    @property
    def where(self) -> str:
        return f"{self.files[self.file]}, line {self.row}" if self.row > 1 else str(self.files[self.file])

    def state_dict(self) -> dict[str, int]:
        return {"file": self.file, "row": self.row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.file, self.row = state["file"], state["row"]

    def __iter__(self) -> Iterator[dict | None]:
        while self.file < len(self.files):
            path = self.files[self.file]
            type = file_type(path) or ".txt"
            with explained(f"{path} cannot be opened"), open(path, "rb") as file:
                rows = itertools.islice(self.rows(type, file), self.row, None)
                while True:
                    with explained(f"{self.where}: the row after this cannot be read as {type}"):
                        row = next(rows, END)
                    if row is END:
                        break
                    self.row += 1
                    yield self.parsed(type, row)
            self.file, self.row = self.file + 1, 0

    def rows(self, type: str, file: BinaryIO) -> Iterator[bytes | dict]:
        """Lines, the whole of a .txt file, or the rows of a .parquet file with no other column than the document's."""
        if type == ".txt":
            yield file.read()
        elif type == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.ParquetFile(file)
            column = column_of(table.schema_arrow.names, "", self.where)
            for batch in table.iter_batches(256, columns=[column]):
                yield from batch.to_pylist()
        elif type == ".jsonl.zst":
            yield from lines_of_zst(file)
        else:
            yield from file

    def parsed(self, type: str, row: bytes | dict) -> dict | None:
        if type == ".txt":
            try:
                text = row.decode("utf-8-sig", "replace" if self.lenient else "strict")
            except UnicodeDecodeError as error:
                what = f"byte 0x{row[error.start]:02x} at {error.start:,}"
                raise UserError(f"{self.where} is not UTF-8 ({what}): save it as UTF-8, or take it out") from error
            return {"text": text.replace("\r\n", "\n").replace("\r", "\n")}
        if type == ".parquet":
            return row
        if not row.strip():
            return None
        with explained(f"{self.where} is not a JSON object in UTF-8"):
            row = json.loads(row.decode("utf-8-sig"))
            if not isinstance(row, dict):
                raise TypeError(f"it is a {row.__class__.__name__}")
            return row


def lines_of_zst(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a compressed file of one frame or more. EOFError if it is cut short."""
    import zstandard

    frame, rest = zstandard.ZstdDecompressor().decompressobj(), b""
    while chunk := file.read(2**20):
        while chunk:
            frame = zstandard.ZstdDecompressor().decompressobj() if frame.eof else frame
            *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
            yield from lines
            chunk = frame.unused_data
    if not frame.eof:
        raise EOFError("the file is cut short")
    yield rest


def open_rows(dataset: str):
    """The rows of a local or hub dataset, one after the other: nothing is downloaded or copied before."""
    if not (hub := hub_set(dataset)):
        return LocalRows(local_files(dataset), lenient=dataset == "stdlib")
    import datasets

    with explained(*unreachable(dataset)):
        return datasets.load_dataset(hub[0], split="train", streaming=True)


def unreachable(dataset: str) -> tuple[str, str]:
    """The problem and the remedy where a dataset of the hub cannot be read."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    problem = f"dataset {dataset!r}: the data step failed, as {hub_set(dataset)[0]} cannot be read from {endpoint}"
    return problem, "set HF_HOME to a cache that holds it, HF_ENDPOINT to a mirror, or give the path of a local copy"


def column_of(names: Iterable[str], wanted: str, where: str) -> str:
    """The wanted column, or without one the first of COLUMNS. UserError if it is not among the names."""
    names = list(names)
    column = wanted or next((name for name in COLUMNS if name in names), "")
    if names.count(column) != 1:
        what = "are two of" if column in names else "is no"
        need = f"there {what} {column!r}" if column else f"one must be {', '.join(map(repr, COLUMNS))}"
        raise UserError(f"{where} has columns {', '.join(names) or '(none)'}: {need}")
    return column


def documents_of(dataset: str, rows) -> Iterator[str | list[int]]:
    """The document of every row that is not empty: text, or token ids, of one kind. Each .txt file is one row."""
    hub, kind = hub_set(dataset), None
    column, at = hub[1] if hub else "", lambda: f"dataset {dataset!r}" if hub else rows.where
    stream = iter(rows)
    while True:
        with explained(*unreachable(dataset)) if hub else contextlib.nullcontext():
            row = next(stream, END)
        if row is END:
            return
        if row is None:
            continue
        column = column_of(row, column, at())
        document = row[column]
        if isinstance(document, str):  # without a byte order mark, or half a surrogate pair
            document = document.removeprefix("\ufeff")
            document = document if document.isascii() else document.encode("utf-8", "replace").decode()
        if not document:
            continue
        ids = isinstance(document, list) and set(map(type, document)) == {int}
        if not ids and not isinstance(document, str):
            raise UserError(f"{at()}: {column!r} holds {document.__class__.__name__}, not text or token ids")
        if ids != (ids if kind is None else kind):
            raise UserError(f"{at()}: {column!r} holds {('text', 'token ids')[ids]}, other than before")
        kind = ids
        yield document


def checksum(document: str | list[int]) -> int:
    """A number below 2^32 that copies of a document share: the order in which validation documents are chosen."""
    return zlib.crc32(document.encode() if isinstance(document, str) else np.array(document, np.int64).tobytes())


def split(checksums: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens of each document are training text, its first ones, and how many validation: [n] and [n].

    Documents, with their copies, become validation by rising checksum while they fit into a twentieth of all tokens.
    If that leaves less than 3 % there, documents are too few for it, and the end of the largest one fills it up.
    """
    _, group = np.unique(checksums, return_inverse=True)  # copies together, in order of the checksum
    sizes = np.bincount(group, lengths).astype(np.int64)
    chosen, left = np.zeros(len(sizes), bool), int(lengths.sum()) // 20
    for i, size in enumerate(sizes.tolist()):
        if size <= left:
            chosen[i], left = True, left - size
    val = np.where(chosen[group], lengths, 0)
    if left > 0.02 * lengths.sum():
        copies = np.flatnonzero(group == np.where(chosen, 0, sizes).argmax())
        val[copies] = left // len(copies)
    return lengths - val, val


def sample_of(documents: Iterable[str], size: int) -> str:
    """The first `size` characters of documents that, but in a very small set, are training text."""
    sample, training = "", (document for document in documents if checksum(document) > 2**32 // 10)
    while len(sample) < size and (document := next(training, "")):
        sample += document
    return sample[:size]


# ---------------------------------------------------------------------------------------------------------------------
# C. Encodings


class Encoding(Protocol):
    """What is asked of a vocabulary. tiktoken.Encoding has it, and so has FastTokenizer."""

    name: str  # "ids" where text came as ids, and there is no text
    n_vocab: int  # ids are below it
    eot_token: int  # the id of end-of-text

    def encode_ordinary(self, text: str) -> list[int]: ...
    def encode_ordinary_batch(self, texts: list[str], *, num_threads: int) -> list[list[int]]: ...
    def decode(self, ids: list[int]) -> str: ...
    def decode_single_token_bytes(self, id: int) -> bytes: ...


class FastTokenizer:
    """A tokenizer.json of the `tokenizers` library as an Encoding: no special token is made of text, none is added.

    end: the id of end-of-text. n_vocab: the logits of its model, often more than there are tokens.
    """

    def __init__(self, text: str, end: int, n_vocab: int) -> None:
        import tokenizers

        self.text, self.eot_token, self.n_vocab = text, end, n_vocab
        self.name = "fast-" + hashlib.sha256(f"{end} {n_vocab} {text}".encode()).hexdigest()[:8]
        self.tokenizer = tokenizers.Tokenizer.from_str(text)
        self.tokenizer.no_truncation(), self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        made = json.loads(text)
        self.whole = {token["id"]: token["content"] for token in made["added_tokens"]}  # they stand for themselves
        self.byte_level = '"ByteLevel"' in json.dumps(made["decoder"])

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode_ordinary_batch([text], num_threads=1)[0]

    def encode_ordinary_batch(self, texts: list[str], *, num_threads: int) -> list[list[int]]:
        return [encoded.ids for encoded in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def decode_single_token_bytes(self, id: int) -> bytes:
        """A byte-level token is written in letters that stand for bytes; others in text, ▁ a space, <0x0A> a byte."""
        token = self.tokenizer.id_to_token(id)
        if token is None or id in self.whole:
            return (self.whole.get(id) or f"<{id}>").encode()
        if self.byte_level:
            return bytes(BYTES[letter] for letter in token) if set(token) <= BYTES.keys() else token.encode()
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1])
        return token.replace("\u2581", " ").encode()


# GPT-2's letters for bytes: what can be seen stands for itself, the others for U+0100, U+0101, ... in order.
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in SEEN} | {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(SEEN)))}


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


def vocab_of(encoding: Encoding) -> str | int | list[str] | dict:
    """What vocab.json holds: "gpt2", the number of anonymous tokens, the tokens of a learnt BPE in base64, or a model's
    own tokenizer.json, with the id of its end-of-text and the number of the model's logits.
    """
    if isinstance(encoding, FastTokenizer):
        return {"tokenizer": encoding.text, "end": encoding.eot_token, "n_vocab": encoding.n_vocab}
    if encoding.name in ("gpt2", "ids"):
        return "gpt2" if encoding.name == "gpt2" else encoding.n_vocab
    return [base64.b64encode(encoding.decode_single_token_bytes(i)).decode() for i in range(encoding.eot_token)]


def encoding_of(vocab: str | int | list[str] | dict, dataset: str) -> Encoding:
    """The inverse of `vocab_of`. UserError if GPT-2's encoding, or the `tokenizers` library, is needed and missing."""
    if isinstance(vocab, dict):
        with explained(f"dataset {dataset!r}: its vocabulary is a model's own", "pip install tokenizers", ImportError):
            return FastTokenizer(vocab["tokenizer"], vocab["end"], vocab["n_vocab"])
    if isinstance(vocab, int):
        return numbered_encoding(vocab)
    return gpt2(dataset) if vocab == "gpt2" else bpe_encoding([base64.b64decode(t) for t in vocab])


# tiktoken panics at about a million of white space in a row (its pattern looks ahead, one step of a stack for each).
LONG_SPACE = re.compile(rf"\s{{{SPACE}}}")


def encode(encoding: Encoding, texts: list[str]) -> list[list[int]]:
    """The tokens of each text, end-of-text behind it, by several threads. White space is cut after each SPACE of it."""
    parts, counts = [], []
    for text in texts:
        cuts = [match.end() for match in LONG_SPACE.finditer(text)] if len(text) > SPACE else []
        parts += [text[i:j] for i, j in zip([0, *cuts], [*cuts, None])]
        counts.append(len(cuts) + 1)
    encoded = iter(encoding.encode_ordinary_batch(parts, num_threads=os.cpu_count() or 1))
    whole = [next(encoded) if n == 1 else [*itertools.chain(*itertools.islice(encoded, n))] for n in counts]
    return [ids + [encoding.eot_token] for ids in whole]


# ---------------------------------------------------------------------------------------------------------------------
# D. Token files


def read_mark(path: Path) -> dict:
    """A meta.json or progress.json of ours, which has a fingerprint; {} if it is missing, broken or another's."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and "fingerprint" in content else {}


def number_type(n_vocab: int) -> np.dtype:
    """Of the tokens in a file: uint16, or uint32 where 65,536 of them are too few."""
    return np.dtype(np.uint16 if n_vocab <= 2**16 else np.uint32)


def is_whole(folder: Path) -> bool:
    """Whether train.bin and val.bin have as many tokens as meta.json counts, and vocab.json can be read."""
    meta, files = read_mark(folder / "meta.json"), [(split, folder / f"{split}.bin") for split in ("train", "val")]
    try:
        vocab = json.loads((folder / "vocab.json").read_text())
        encoded = isinstance(vocab, (str, int, list)) or {"tokenizer", "end", "n_vocab"} <= vocab.keys()
    except (OSError, ValueError, AttributeError):
        encoded = False
    size = number_type(meta.get("vocab_size", 0)).itemsize
    counted = all(file.is_file() and file.stat().st_size == size * meta.get(split, -1) for split, file in files)
    return encoded and counted and {"name", "dataset"} <= meta.keys()


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


def encoded(dataset: str, documents: Iterator[str | list[int]], encoding: Encoding) -> Iterator[list[tuple]]:
    """(checksum, tokens) of each document, in lists of 64. Text gets an end-of-text token behind it.

    UserError for an id that cannot be stored, or that the model has no token for.
    """
    known = 2**16 if encoding.name == "ids" else encoding.n_vocab
    while some := list(itertools.islice(documents, 64)):
        tokens = encode(encoding, some) if isinstance(some[0], str) else some
        arrays = [np.array(ids) for ids in tokens]
        if wrong := [id for ids in arrays for id in (ids.min(), ids.max()) if not 0 <= id < known]:
            raise UserError(f"dataset {dataset!r} has the token id {wrong[0]}: 0 to {known - 1:,} can be stored")
        yield list(zip(map(checksum, some), (ids.astype(number_type(known)) for ids in arrays)))


def append(
    part: Path, progress: dict, lists: Iterator[list], place: Callable[[], dict], max_tokens: float, size: int
) -> None:
    """Write tokens behind those that `progress` counts, until it counts max_tokens or there are no more.

    tokens.bin holds them; documents.bin a checksum and a length of each document. place: tells where the source
    stands; progress.json holds it beside the counts, as a point to restart from. size: bytes of a token.
    """
    with open(part / "tokens.bin", "ab") as tokens, open(part / "documents.bin", "ab") as documents:
        tokens.truncate(size * progress["tokens"])
        documents.truncate(16 * progress["documents"])
        settled = progress["tokens"]
        end = max_tokens if max_tokens < float("inf") else None
        bar = tqdm(total=end, initial=settled, desc="tokenise", unit=" tokens", unit_scale=True)
        some = True
        while some:
            some = next(lists, []) if progress["tokens"] < max_tokens else []
            for number, ids in some:
                tokens.write(ids.tobytes())
                documents.write(np.array([number, len(ids)], np.uint64).tobytes())
                progress["documents"] += 1
                progress["tokens"] += len(ids)
                progress["largest"] = max(progress["largest"], int(ids.max()))
                if progress["tokens"] >= max_tokens:
                    break
            bar.update(progress["tokens"] - bar.n)
            if not some or progress["tokens"] >= settled + SETTLE:
                settled = progress["tokens"]
                for file in (tokens, documents):
                    file.flush()
                    os.fsync(file.fileno())
                write_text(part / "progress.json", json.dumps(progress | {"source": place()}))
        bar.close()


def finish(part: Path, home: Path, meta: dict, encoding: Encoding) -> None:
    """train.bin and val.bin of the documents in `part`, vocab.json, meta.json; the folder gets its name, `home`.

    An older folder of that name goes. No document is in both files; where one has to be cut, a line says so.
    """
    checksums, lengths = np.fromfile(part / "documents.bin", np.uint64).astype(np.int64).reshape(-1, 2).T
    kind = number_type(encoding.n_vocab)
    tokens, starts = np.memmap(part / "tokens.bin", kind, mode="r"), np.cumsum(lengths) - lengths
    train, val = split(checksums, lengths)
    if not val.any() and lengths.sum() >= 20:
        copies = f"is {len(lengths):,} copies of one short text"
        raise UserError(f"dataset {meta['dataset']!r} {copies}: nothing is left to hold out for validation")
    cut = (train > 0) & (val > 0)
    end = np.array([] if encoding.name == "ids" else [encoding.eot_token], kind)
    meta |= {"train": 0, "val": 0}
    with open(part / "train.bin", "wb") as train_file, open(part / "val.bin", "wb") as val_file:
        for start, n_train, n_val, is_cut in zip(starts.tolist(), train.tolist(), val.tolist(), cut.tolist()):
            head, tail = tokens[start : start + n_train], tokens[start + n_train : start + n_train + n_val]
            head = np.concatenate([head, end]) if is_cut else head
            for name, file, ids in (("train", train_file, head), ("val", val_file, tail)):
                file.write(ids.tobytes())
                meta[name] += len(ids)
    if cut.any():
        about = f"the largest of {len(lengths):,} documents is cut, its last {val[cut].sum():,} tokens are"
        print(f"data: {meta['dataset']}: too few documents for a twentieth of them: {about} validation text")
    for name in ("train", "val"):
        settle(part / f"{name}.bin")
    write_text(part / "vocab.json", json.dumps(vocab_of(encoding)))
    write_text(part / "meta.json", json.dumps(meta | {"encoding": encoding.name, "vocab_size": encoding.n_vocab}))
    check_ours(home, "meta.json")  # again, as hours may have passed
    remove(home)
    del tokens
    os.replace(part, home)
    settle(home.parent)
    for name in ("tokens.bin", "documents.bin", "progress.json"):  # only now that nothing can be lost
        (home / name).unlink(missing_ok=True)
    print(f"data: {meta['dataset']}: {meta['documents']:,} documents, {meta['train']:,} training and ", end="")
    print(f"{meta['val']:,} validation tokens, vocabulary {encoding.n_vocab:,}")


def first_document(dataset: str, documents: Iterator) -> str | list[int]:
    """The next document. UserError if there is none."""
    if (first := next(documents, None)) is None:
        raise UserError(f"dataset {dataset!r} holds no text")
    return first


def sample_for_bpe(dataset: str, max_tokens: int) -> str:
    """Training text that a BPE is learnt from: spread evenly over files that are read to their end, else the first."""
    rows, size, step = open_rows(dataset), BPE_SAMPLE, 1
    if isinstance(rows, LocalRows) and not max_tokens:
        step = max(1, sum(file.stat().st_size for file in rows.files) // BPE_SAMPLE)
        size *= 1 if step == 1 else 2
        if all(file_type(file) in ("", ".txt") for file in rows.files):  # a document each: open no other file
            rows.files, step = rows.files[::step], 1
    documents = documents_of(dataset, rows)
    first = first_document(dataset, documents)
    return (
        sample_of(itertools.islice(itertools.chain([first], documents), 0, None, step), size)
        or first[: len(first) * 19 // 20]
    )


def tokenise(dataset: str, name: str, home: Path, mark: str, max_tokens: int = 0, own: Encoding | None = None) -> None:
    """Make the folder `home` of the first max_tokens tokens of `dataset` (0: of all), a few documents at a time.

    own: the encoding of a model that we have not trained; without one it is chosen.

    Restartable at any moment: progress.json in <home>.part names the documents, tokens and place in the source that are
    on the disk; what came after it is cut off and made again. A full disk is a UserError that leaves this state.
    """
    part = home.with_name(home.name + ".part")
    check_ours(home, "meta.json")
    check_ours(part, "progress.json")
    rows = open_rows(dataset)
    progress = {"fingerprint": mark, "source": None, "vocab": None, "documents": 0, "tokens": 0, "largest": 0}
    saved = read_mark(part / "progress.json")
    size = number_type(own.n_vocab if own else 0).itemsize
    there = [
        (part / "tokens.bin", size * saved.get("tokens", 0)),
        (part / "documents.bin", 16 * saved.get("documents", 0)),
    ]
    if (
        saved.get("fingerprint") == mark
        and saved["documents"]
        and all(file.is_file() and file.stat().st_size >= size for file, size in there)
    ):
        progress = saved
        rows.load_state_dict(saved["source"])
        print(f"data: {dataset}: going on after document {saved['documents']:,}")
    documents = documents_of(dataset, rows)
    if progress is not saved:
        first = first_document(dataset, documents)
        documents = itertools.chain([first], documents)
        # Token ids have a stand-in for now: how many kinds there are is known at the end.
        sample = lambda: sample_for_bpe(dataset, max_tokens)
        if own:
            progress["vocab"] = vocab_of(own)
        else:
            progress["vocab"] = 2 if isinstance(first, list) else vocab_of(choose_encoding(dataset, sample))
    encoding = encoding_of(progress["vocab"], dataset)

    remedy = "make room and give the same command again, it goes on from there"
    with explained(f"cannot write the tokens of {dataset!r} to {part}", remedy, OSError):
        part.mkdir(parents=True, exist_ok=True)
        if progress is not saved:
            write_text(part / "progress.json", json.dumps(progress))  # before any other file: it makes the folder ours
        try:
            lists = encoded(dataset, documents, encoding)
            append(part, progress, lists, rows.state_dict, max_tokens or float("inf"), size)
        except UserError:
            if not hub_set(dataset):  # a file that has to be mended is another one then
                remove(part)
            raise
        if progress["tokens"] < max_tokens:
            print(f"data: {dataset} ends after {progress['tokens']:,} tokens, fewer than the ", end="")
            print(f"{max_tokens:,} asked for: training goes round it more than once")
        if encoding.name == "ids":
            encoding = numbered_encoding(max(2, progress["largest"] + 1))
        meta = {"fingerprint": mark, "dataset": dataset, "name": name, "documents": progress["documents"]}
        finish(part, home, meta, encoding)
