import errno
import itertools
import json
import os
import re
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import torch
import zstandard

import data
import tokenise
from data import Corpus
from run import UserError
from tokenise import bpe_encoding, learn_bpe

DOCUMENTS = [f"This is document number {i}, about café {i * i} 🙂.\n" for i in range(200)]


@pytest.fixture(scope="module", autouse=True)
def no_gpt2():
    """GPT-2's vocabulary cannot be had, and a learnt one is small."""

    def refuse(name):
        raise OSError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", refuse)
        patch.setattr(tokenise, "BPE_VOCAB", 300)
        yield


def write(folder, suffix, documents, column="text"):
    """A dataset of these documents; a `.txt` file holds one, so several make a folder."""
    path = folder / f"set{suffix}"
    if suffix == ".txt":
        path.write_bytes(documents[0].encode())
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, column: d}) + "\n" for i, d in enumerate(documents)))
    elif suffix == ".jsonl.zst":  # the Pile's shape
        rows = "".join(json.dumps({column: d, "meta": {"pile_set_name": "Pile-CC"}}) + "\n" for d in documents)
        path.write_bytes(zstandard.compress(rows.encode()))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({column: documents}), path)
    else:
        path.mkdir()
        for i, document in enumerate(documents):
            (path / f"{i:04}.txt").write_bytes(document.encode())
    return str(path)


def read(corpus, split):
    """The documents of a split: what stands before each end-of-text token."""
    ids = corpus.tokens[split].tolist()
    assert ids[-1] == corpus.encoding.eot_token
    documents, start = [], 0
    for i, token in enumerate(ids):
        if token == corpus.encoding.eot_token:
            documents.append(corpus.encoding.decode(ids[start:i]))
            start = i + 1
    return documents


# ---------------------------------------------------------------------------------------------------------------------
# BPE


@pytest.mark.parametrize(
    "text, merges",
    [
        # Words "ab", " ab", " ab". a+b 3 times, then " "+ab twice, then every word is one token.
        ("ab ab ab", [b"ab", b" ab"]),
        # Words "ab", " ab", " cd", " cd": " "+c, a+b and c+d twice each; the lower ids win: 32 before 97 before 256.
        ("ab ab cd cd", [b" c", b"ab", b" cd"]),
        # Words "a", " b" x 3, " a" x 2: nothing joins across words.
        ("a b a b a b", [b" b", b" a"]),
        # a+a; aaaa is then aa aa, in both words. " "+aaaa occurs once.
        ("aaaa aaaa", [b"aa", b"aaaa"]),
        # aaaaa is aa aa a: aa+a (256, 97) ties with aa+aa (256, 256) and wins; then aa+aaa.
        ("aaaaa aaaaa", [b"aa", b"aaa", b"aaaaa"]),
        # One word, a+a at three overlapping places: aa aa, a pair that occurs once.
        ("aaaa", [b"aa"]),
        ("abc", []),
    ],
)
def test_learn_bpe_by_hand(text, merges):
    tokens = learn_bpe(text, 300)
    assert tokens[:256] == [bytes([b]) for b in range(256)]
    assert tokens[256:] == merges


def test_learn_bpe_stops_at_vocab_size():
    assert learn_bpe("ab ab ab", 257)[256:] == [b"ab"]


def test_encoding_applies_the_merges():
    encoding = bpe_encoding(learn_bpe("ab ab ab", 300))
    assert encoding.encode_ordinary("ab abb") == [256, 257, ord("b")]


@pytest.mark.parametrize(
    "text", ["plain words, 42!", "naïve Ελληνικά 日本語", "🙂👩‍👩‍👧 emoji", "tab\t\n\n  end ", "nul\0\0nul", ""]
)
def test_encoding_round_trip(text):
    encoding = bpe_encoding(learn_bpe("plain words nul\0\0nul 🙂🙂 日本日本 " * 2, 300))
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_end_of_text_is_the_last_id():
    encoding = bpe_encoding(learn_bpe("ab ab ab", 300))
    assert (encoding.n_vocab, encoding.eot_token) == (259, 258)  # 256 bytes, 2 merges, end-of-text


def test_the_standard_library_gets_a_learnt_bpe_unasked(capsys):
    assert tokenise.choose_encoding("stdlib", lambda: "ab ab ab").n_vocab == 259
    assert capsys.readouterr().out == ""


def test_other_text_gets_gpt2_where_it_can_be_had(tmp_path, monkeypatch):
    ranks = {bytes([b]): b for b in range(256)}
    pretend = tiktoken.Encoding(
        "gpt2", pat_str=tokenise.WORDS, mergeable_ranks=ranks, special_tokens={tokenise.END_OF_TEXT: 256}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": pretend}[name])
    corpus = data.load(write(tmp_path, ".jsonl", DOCUMENTS), tmp_path / "data")
    assert corpus.encoding is pretend


def test_without_network_a_bpe_is_learnt_and_said_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenise, "BPE_VOCAB", 1024)
    corpus = data.load(write(tmp_path, ".jsonl", DOCUMENTS), tmp_path / "data")
    assert 257 < corpus.vocab_size <= 1024
    assert re.search(
        r"GPT-2's vocabulary cannot be had.*OSError.*learning a BPE of 1024 tokens", capsys.readouterr().out
    )


# ---------------------------------------------------------------------------------------------------------------------
# Documents


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet", "-folder"])
def test_every_document_ends_with_end_of_text(tmp_path, suffix):
    documents = [*DOCUMENTS, "This text spells <|endoftext|> but does not end there."]
    corpus = data.load(write(tmp_path, suffix, documents), tmp_path / "data")
    assert sorted(read(corpus, "train") + read(corpus, "val")) == sorted(documents)


def test_a_single_text_gives_its_last_twentieth_to_validation(tmp_path):
    text = "".join(DOCUMENTS[:40])
    corpus = data.load(write(tmp_path, ".txt", [text]), tmp_path / "data")
    (train,), (val,) = read(corpus, "train"), read(corpus, "val")
    assert train + val == text
    assert len(val) == pytest.approx(0.05 * len(text), abs=1)


@pytest.mark.parametrize("column", ["text", "story", "content"])
def test_text_columns(tmp_path, column):
    corpus = data.load(write(tmp_path, ".jsonl", DOCUMENTS, column), tmp_path / "data")
    assert set(read(corpus, "train") + read(corpus, "val")) == set(DOCUMENTS)


def test_no_copy_of_a_validation_document_is_trained_on(tmp_path):
    corpus = data.load(write(tmp_path, ".jsonl", DOCUMENTS * 2), tmp_path / "data")
    train, val = read(corpus, "train"), read(corpus, "val")
    assert len(train) + len(val) == 400
    assert len(set(val)) >= 2
    assert not set(train) & set(val)


def test_no_copy_even_where_the_hash_leaves_validation_empty(tmp_path):
    train_only = [d for d in DOCUMENTS if not tokenise.is_validation(d)][:3]
    corpus = data.load(write(tmp_path, ".jsonl", [*train_only, train_only[0]]), tmp_path / "data")
    assert read(corpus, "val")
    assert not set(read(corpus, "train")) & set(read(corpus, "val"))


def bad_folder(folder, files):
    path = folder / "bad"
    path.mkdir()
    for name, content in files.items():
        (path / name).write_text(content)
    return path


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a.txt": ""}, "is empty"),
        ({"a.txt": "x", "b.jsonl": '{"text": "x"}'}, r"mixes \.jsonl, \.txt"),
        ({"a.csv": "x"}, r"no .txt, .jsonl, .jsonl.zst, .parquet file there"),
        ({}, r"no .txt, .jsonl, .jsonl.zst, .parquet file there"),
        (
            {"a.jsonl": '{"title": "x", "body": "y"}\n'},
            "has columns title, body: one must be 'text', 'story', 'content', 'input_ids'",
        ),
        ({"a.jsonl": '{"text": ""}\n'}, "holds no text"),
        ({"a.jsonl": '{"text": 3}\n'}, "'text' holds int, not text or token ids"),
        ({"a.jsonl": '{"input_ids": [1, 2]}\n'}, "holds token ids: give --max_tokens"),
        ({"a.jsonl": "not json at all\n"}, "cannot be read as json"),
        ({"a.parquet": "not parquet at all"}, "cannot be read as parquet"),
    ],
)
def test_unusable_dataset(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        data.load(str(bad_folder(tmp_path, files)), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_unknown_dataset(tmp_path):
    with pytest.raises(UserError, match="'no-such-set' does not exist: give 'stdlib', 'pile', 'simplestories',"):
        data.load("no-such-set", tmp_path / "data")


# ---------------------------------------------------------------------------------------------------------------------
# Token files and batches


def damage(home, how):
    meta = json.loads((home / "meta.json").read_text())
    if how == "tokens cut short":
        (home / "train.bin").write_bytes((home / "train.bin").read_bytes()[:-2])
    elif how == "no tokens":
        (home / "val.bin").unlink()
    elif how == "counts missing":
        (home / "meta.json").write_text(json.dumps({"fingerprint": meta["fingerprint"]}))
    elif how == "made from something else":
        (home / "meta.json").write_text(json.dumps(meta | {"fingerprint": "0" * 16}))
        np.zeros(meta["train"], np.uint16).tofile(home / "train.bin")


@pytest.mark.parametrize("max_tokens", [0, 10**6])
@pytest.mark.parametrize("how", ["tokens cut short", "no tokens", "counts missing", "made from something else"])
def test_damaged_token_files_are_made_anew(tmp_path, how, max_tokens):
    dataset = write(tmp_path, ".jsonl", DOCUMENTS)
    corpus = data.load(dataset, tmp_path / "data", max_tokens)
    before = {split: np.array(tokens) for split, tokens in corpus.tokens.items()}
    damage(corpus.folder, how)
    again = data.load(dataset, tmp_path / "data", max_tokens)
    assert all(np.array_equal(again.tokens[split], before[split]) for split in before)
    assert sorted(p.name for p in corpus.folder.iterdir()) == ["meta.json", "train.bin", "val.bin", "vocab.json"]
    assert list((tmp_path / "data").iterdir()) == [corpus.folder]


def test_whole_token_files_are_not_made_anew(tmp_path, monkeypatch):
    dataset = write(tmp_path, ".jsonl", DOCUMENTS)
    first = data.load(dataset, tmp_path / "data")
    monkeypatch.setattr(tokenise, "open_rows", lambda dataset: pytest.fail("read again"))
    assert np.array_equal(data.load(dataset, tmp_path / "data").tokens["val"], first.tokens["val"])


def test_a_changed_dataset_is_read_again(tmp_path):
    data.load(write(tmp_path, ".jsonl", DOCUMENTS), tmp_path / "data")
    corpus = data.load(write(tmp_path, ".jsonl", DOCUMENTS[:50]), tmp_path / "data")
    assert len(read(corpus, "train") + read(corpus, "val")) == 50


def interrupted(steps, error=KeyboardInterrupt):
    """`tokenise.encoded`, but in place of the lists of documents after the first `steps` there is an error."""
    encoded = tokenise.encoded

    def stops(*args):
        yield from itertools.islice(encoded(*args), steps)
        raise error

    return stops


def test_an_interrupted_tokenisation_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "encoded", interrupted(1))
    with pytest.raises(KeyboardInterrupt):
        data.load(write(tmp_path, ".jsonl", DOCUMENTS), tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(tokenise, "encoded", interrupted(1, full))
    with pytest.raises(UserError, match=r"set.jsonl' to .* \(No space left on device\): make room and give the same"):
        data.load(write(tmp_path, ".jsonl", DOCUMENTS), tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_each_python_has_tokens_of_its_own_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "stdlib_documents", lambda: iter(DOCUMENTS))
    first = data.load("stdlib", tmp_path)
    tokens = (first.folder / "train.bin").read_bytes()
    monkeypatch.setattr(sys, "version", "4.0")
    monkeypatch.setattr(tokenise, "stdlib_documents", lambda: iter(DOCUMENTS[:100]))
    second = data.load("stdlib", tmp_path)
    assert first.name == second.name == "stdlib"
    assert {first.folder, second.folder} == set(tmp_path.iterdir())
    assert re.fullmatch("stdlib-[0-9a-f]{8}", first.folder.name)
    assert (first.folder / "train.bin").read_bytes() == tokens


# ---------------------------------------------------------------------------------------------------------------------
# What is the user's


def everything(folder):
    """Every path below the folder, with what a file holds or a link points to."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def put(path, files):
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_text(content)


def in_the_way(path, what):
    mark = json.dumps({"fingerprint": "0" * 16, "documents": 0, "train": 3, "val": 3})
    ours = {"meta.json": mark, "progress.json": mark}
    if what == "a file":
        path.write_text("mine")
    elif what == "a folder in a folder":
        put(path / "chapters", {})
    elif what == "a link to token files of ours":
        put(path.parent / "elsewhere", ours)
        path.symlink_to(path.parent / "elsewhere")
    elif what == "a link to nothing":
        path.symlink_to(path.parent / "nothing")
    else:
        files = {
            "a text": {"thesis.txt": "mine"},
            "files of our names": {"train.bin": "mine"},
            "another's meta.json": {name: "{}" for name in ours},
            "a list": {name: '["fingerprint"]' for name in ours},
            "a meta.json cut short": {name: mark[:20] for name in ours},
            "token files of ours and a text": ours | {"thesis.txt": "mine"},
        }
        put(path, files[what])


THINGS = (
    "a file",
    "a folder in a folder",
    "a link to token files of ours",
    "a link to nothing",
    "a text",
    "files of our names",
    "another's meta.json",
    "a list",
    "a meta.json cut short",
    "token files of ours and a text",
)


@pytest.mark.parametrize("what", THINGS)
@pytest.mark.parametrize("end, max_tokens", [("", 0), ("", 10**6), (".part", 10**6)])
def test_what_is_not_ours_is_refused_and_stays(tmp_path, monkeypatch, what, end, max_tokens):
    dataset = write(tmp_path, ".jsonl", DOCUMENTS)
    name = data.name_of(dataset, max_tokens, data.fingerprint(dataset, max_tokens))
    home = tmp_path / "data" / (name + end)
    home.parent.mkdir()
    in_the_way(home, what)
    before = everything(tmp_path)
    monkeypatch.setattr(tokenise, "open_rows", lambda dataset: pytest.fail("begun"))
    with pytest.raises(UserError, match=f"^{re.escape(str(home))} is in the way .* give another --data_dir"):
        data.load(dataset, home.parent, max_tokens)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("max_tokens", [0, 10**6])
def test_what_comes_in_the_way_meanwhile_stays(tmp_path, monkeypatch, max_tokens):
    dataset = write(tmp_path, ".jsonl", DOCUMENTS)
    name = data.name_of(dataset, max_tokens, data.fingerprint(dataset, max_tokens))
    mine, encoded = tmp_path / "data" / name / "thesis.txt", tokenise.encoded

    def appears(*args):
        yield from encoded(*args)
        mine.parent.mkdir()
        mine.write_text("mine")

    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "encoded", appears)
        with pytest.raises(UserError, match="'thesis.txt' is not of this code's making"):
            data.load(dataset, tmp_path / "data", max_tokens)
    assert mine.read_text() == "mine"
    mine.unlink()  # an empty folder is in nobody's way
    assert len(data.load(dataset, tmp_path / "data", max_tokens).tokens["train"]) > 1000
    assert list((tmp_path / "data").iterdir()) == [mine.parent]


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def same(a, b):
    return (
        all(np.array_equal(a.tokens[split], b.tokens[split]) for split in ("train", "val"))
        and a.vocabulary == b.vocabulary
    )


@pytest.mark.parametrize("suffix, column", [(".jsonl.zst", "text"), (".parquet", "story"), ("-folder", "text")])
def test_a_stream_gives_the_tokens_that_memory_does(tmp_path, suffix, column, capsys):
    dataset = write(tmp_path, suffix, DOCUMENTS, column)
    whole = data.load(dataset, tmp_path / "data")
    assert same(data.load(dataset, tmp_path / "data", max_tokens=10**9), whole)
    assert re.search("ends after [0-9,]+ tokens, fewer than the 1,000,000,000 asked for", capsys.readouterr().out)


def test_max_tokens_ends_with_the_document_that_reaches_it(tmp_path):
    dataset = write(tmp_path, ".jsonl", DOCUMENTS)
    whole, short = data.load(dataset, tmp_path / "data"), data.load(dataset, tmp_path / "data", max_tokens=500)
    longest = max(len(whole.encoding.encode_ordinary(d)) for d in DOCUMENTS) + 1
    assert 500 <= sum(len(t) for t in short.tokens.values()) < 500 + longest
    assert all(np.array_equal(t, whole.tokens[split][: len(t)]) for split, t in short.tokens.items())


@pytest.fixture(scope="module")
def two_files(tmp_path_factory, no_gpt2):
    """A folder of two .jsonl.zst files, and its corpus."""
    folder = tmp_path_factory.mktemp("two")
    for i, half in enumerate((DOCUMENTS[:100], DOCUMENTS[100:])):
        (folder / f"set/{i}").mkdir(parents=True)
        write(folder / f"set/{i}", ".jsonl.zst", half)
    return str(folder / "set"), data.load(str(folder / "set"), folder / "data", max_tokens=10**6)


@pytest.fixture
def folder_of_two(two_files, monkeypatch):
    """As `two_files`, read in steps of 64 documents that are settled after every one."""
    monkeypatch.setattr(tokenise, "SETTLE", 1)
    return two_files


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("how", ["killed", "killed in the middle of a write", "disk full"])
def test_a_stream_goes_on_where_it_stopped(tmp_path, folder_of_two, monkeypatch, capsys, steps, how):
    dataset, whole = folder_of_two
    count, settle = itertools.count(), os.fsync

    def full(handle):
        # The first progress.json and its folder; then a step settles two token files, progress.json and its folder.
        if next(count) >= (2 + 4 * steps if steps else 0):
            raise OSError(errno.ENOSPC, "No space left on device")
        settle(handle)

    with monkeypatch.context() as patch:
        if how == "disk full":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(tokenise, "encoded", interrupted(steps))
        with pytest.raises(UserError if how == "disk full" else KeyboardInterrupt) as stop:
            data.load(dataset, tmp_path / "data", max_tokens=10**6)
    (part,) = (tmp_path / "data").iterdir()
    if how == "disk full":
        wanted = r"\(No space left on device\): make room and give the same command again, it goes on from there"
        assert re.search(wanted, str(stop.value))
    if how == "killed in the middle of a write":
        with open(part / "train.bin", "ab") as file:
            file.write(b"half a tok")
    capsys.readouterr()
    assert same(data.load(dataset, tmp_path / "data", max_tokens=10**6), whole)
    assert (f"going on after document {64 * steps:,}" in capsys.readouterr().out) == (steps > 0)
    assert [p.name for p in (tmp_path / "data").iterdir()] == [whole.name]


def stop_before_the_end(dataset, folder, monkeypatch):
    """The .part folder of a stream that was interrupted when all its tokens were on the disk."""
    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            data.load(dataset, folder, max_tokens=10**6)
    (part,) = folder.iterdir()
    return part


@pytest.mark.parametrize("changes", [{"train": 10**5, "documents": 10**3}, {"fingerprint": "0" * 16}])
def test_another_progress_is_begun_again(tmp_path, folder_of_two, monkeypatch, capsys, changes):
    """progress.json of more tokens than there are, or of another source."""
    dataset, whole = folder_of_two
    progress = stop_before_the_end(dataset, tmp_path / "data", monkeypatch) / "progress.json"
    progress.write_text(json.dumps(json.loads(progress.read_text()) | changes))
    assert same(data.load(dataset, tmp_path / "data", max_tokens=10**6), whole)
    assert "going on" not in capsys.readouterr().out


def test_what_a_power_cut_leaves_is_ours(tmp_path, folder_of_two, monkeypatch, capsys):
    dataset, whole = folder_of_two
    part = stop_before_the_end(dataset, tmp_path / "data", monkeypatch)
    for name in ("progress.json.tmp", "vocab.json", "meta.json.tmp"):
        (part / name).write_text('{"half')
    corpus = data.load(dataset, tmp_path / "data", max_tokens=10**6)
    assert same(corpus, whole) and "going on after document 200" in capsys.readouterr().out
    assert sorted(p.name for p in corpus.folder.iterdir()) == ["meta.json", "train.bin", "val.bin", "vocab.json"]


def test_a_stream_keeps_its_vocabulary_when_gpt2_appears_half_way(tmp_path, folder_of_two, monkeypatch):
    dataset, whole = folder_of_two
    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "encoded", interrupted(2))
        with pytest.raises(KeyboardInterrupt):
            data.load(dataset, tmp_path / "data", max_tokens=10**6)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail("another vocabulary"))
    assert same(data.load(dataset, tmp_path / "data", max_tokens=10**6), whole)


def test_one_long_document_is_divided_as_in_memory(tmp_path):
    dataset = write(tmp_path, ".txt", ["".join(DOCUMENTS)])
    assert same(data.load(dataset, tmp_path / "data", max_tokens=10**6), data.load(dataset, tmp_path / "data"))


def test_token_ids_come_through_as_they_are(tmp_path):
    sequences = [[i % 50_277, 7, i % 13] for i in range(50_000, 50_300)]
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": sequences}), tmp_path / "set.parquet")
    corpus = data.load(str(tmp_path / "set.parquet"), tmp_path / "data", max_tokens=10**6)
    assert sorted(np.concatenate(list(corpus.tokens.values())).tolist()) == sorted(sum(sequences, []))
    assert (corpus.vocab_size, corpus.encoding.decode([7, 50_276])) == (50_277, "<7><50276>")
    assert len(corpus.tokens["train"]) % 3 == 0  # no end-of-text between sequences


@pytest.mark.parametrize("ids, message", [([1, 70_000], "has the token id 70000"), ([-5, 3], "has the token id -5")])
def test_token_ids_that_cannot_be_stored(tmp_path, ids, message):
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": [ids] * 30}), tmp_path / "set.parquet")
    with pytest.raises(UserError, match=message):
        data.load(str(tmp_path / "set.parquet"), tmp_path / "data", max_tokens=100)


@pytest.mark.parametrize(
    "dataset, max_tokens, name",
    [
        ("stdlib", 0, "stdlib"),
        ("pile", 10**9, "pile-1000M"),
        ("tinystories", 2_500_000, "tinystories-2500000"),
        ("hf:owner/set", 10**6, "owner--set-1M"),
        ("hf:owner/set:body", 10**6, "owner--set--body-1M"),
        ("books/novels.jsonl.zst", 0, "novels-01234567"),
    ],
)
def test_names_of_token_folders(dataset, max_tokens, name):
    assert data.name_of(dataset, max_tokens, "0123456789abcdef") == name


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.fixture
def counting():
    """A corpus whose i-th token is i, so that a window shows where it begins."""
    return Corpus(
        "counting",
        {split: np.arange(1000, dtype=np.uint16) for split in ("train", "val")},
        encoding=None,
        vocabulary="",
    )


def test_batch_is_B_windows_of_T_plus_1_tokens(counting):
    batch = counting.batch("train", step=0, B=5, T=7)
    assert (batch.shape, batch.dtype) == ((5, 8), torch.int64)
    assert torch.equal(batch - batch[:, :1], torch.arange(8).expand(5, 8))


def test_batch_depends_on_nothing_but_seed_split_and_step(counting):
    first = counting.batch("train", step=3, B=5, T=7, seed=1)
    counting.batch("val", step=4, B=2, T=3)
    np.random.seed(5)
    assert torch.equal(counting.batch("train", step=3, B=5, T=7, seed=1), first)


@pytest.mark.parametrize("other", [("val", 3, 1), ("train", 4, 1), ("train", 3, 2), ("train", 1, 3)])
def test_batch_differs_by_seed_split_and_step(counting, other):
    split, step, seed = other
    assert not torch.equal(counting.batch(split, step, 5, 7, seed), counting.batch("train", 3, 5, 7, 1))


def test_batch_reaches_the_first_and_the_last_window(counting):
    assert set(counting.batch("train", step=0, B=100, T=998)[:, 0].tolist()) == {
        0,
        1,
    }  # 1,000 tokens: two windows of 999


def test_too_few_tokens_for_a_window(counting):
    assert counting.batch("train", step=0, B=1, T=999)[0].tolist() == list(range(1000))
    with pytest.raises(UserError, match="train has 1000 tokens, a window needs T [+] 1 = 1001"):
        counting.batch("train", step=0, B=1, T=1000)
