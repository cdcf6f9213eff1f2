import errno
import itertools
import json
import os
import re

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
from tokenise import bpe_encoding, learn_bpe

DOCUMENTS = [f"This is document number {i}, about café {i * i} 🙂.\n" for i in range(200)]


@pytest.fixture(autouse=True)
def no_gpt2(monkeypatch):
    def refuse(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)


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
    assert tokenise.choose_encoding("stdlib", "ab ab ab").n_vocab == 259
    assert capsys.readouterr().out == ""


def test_other_text_gets_gpt2_where_it_can_be_had(tmp_path, monkeypatch):
    ranks = {bytes([b]): b for b in range(256)}
    pretend = tiktoken.Encoding(
        "gpt2", pat_str=data.WORDS, mergeable_ranks=ranks, special_tokens={tokenise.END_OF_TEXT: 256}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": pretend}[name])
    corpus = data.load(write(tmp_path, ".jsonl", DOCUMENTS), tmp_path / "data")
    assert corpus.encoding is pretend


def test_without_network_a_bpe_is_learnt_and_said_so(tmp_path, capsys):
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
            "has columns title, body: one must be 'text', 'story', 'content' or 'input_ids'",
        ),
        ({"a.jsonl": '{"text": ""}\n'}, "holds no text"),
        ({"a.jsonl": "not json at all\n"}, "cannot be read as json"),
        ({"a.parquet": "not parquet at all"}, "cannot be read as parquet"),
    ],
)
def test_unusable_dataset(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        data.load(str(bad_folder(tmp_path, files)), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_unknown_dataset(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="'no-such-set' does not exist: give 'stdlib', 'pile', 'simplestories',"
    ):
        data.load("no-such-set", tmp_path / "data")


# ---------------------------------------------------------------------------------------------------------------------
# Token files and batches


def damage(home, how):
    meta = json.loads((home / "meta.json").read_text())
    if how == "tokens cut short":
        (home / "train.bin").write_bytes((home / "train.bin").read_bytes()[:-2])
    elif how == "no meta file":
        (home / "meta.json").unlink()
    elif how == "meta file cut short":
        (home / "meta.json").write_text(json.dumps(meta)[:20])
    elif how == "made from something else":
        (home / "meta.json").write_text(json.dumps(meta | {"fingerprint": "0" * 16}))
        np.zeros(meta["train"], np.uint16).tofile(home / "train.bin")


@pytest.mark.parametrize("how", ["tokens cut short", "no meta file", "meta file cut short", "made from something else"])
def test_damaged_token_files_are_made_anew(tmp_path, how):
    dataset = write(tmp_path, ".jsonl", DOCUMENTS)
    corpus = data.load(dataset, tmp_path / "data")
    before = {split: np.array(tokens) for split, tokens in corpus.tokens.items()}
    damage(tmp_path / "data" / corpus.name, how)
    again = data.load(dataset, tmp_path / "data")
    assert all(np.array_equal(again.tokens[split], before[split]) for split in before)


def test_whole_token_files_are_not_made_anew(tmp_path, monkeypatch):
    dataset = write(tmp_path, ".jsonl", DOCUMENTS)
    first = data.load(dataset, tmp_path / "data")
    monkeypatch.setattr(tokenise, "local_documents", lambda path: pytest.fail("read again"))
    assert np.array_equal(data.load(dataset, tmp_path / "data").tokens["val"], first.tokens["val"])


def test_a_changed_dataset_is_read_again(tmp_path):
    data.load(write(tmp_path, ".jsonl", DOCUMENTS), tmp_path / "data")
    corpus = data.load(write(tmp_path, ".jsonl", DOCUMENTS[:50]), tmp_path / "data")
    assert len(read(corpus, "train") + read(corpus, "val")) == 50


def test_an_interrupted_tokenisation_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenise, "split_documents", stop)
    with pytest.raises(KeyboardInterrupt):
        data.load(write(tmp_path, ".jsonl", DOCUMENTS), tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


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


@pytest.fixture
def folder_of_two(tmp_path, monkeypatch):
    """A folder of two .jsonl.zst files, read in steps of 64 documents that are settled after every one."""
    monkeypatch.setattr(tokenise, "SETTLE", 1)
    for i, half in enumerate((DOCUMENTS[:100], DOCUMENTS[100:])):
        (tmp_path / f"set/{i}").mkdir(parents=True)
        write(tmp_path / f"set/{i}", ".jsonl.zst", half)
    return str(tmp_path / "set")


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("how", ["killed", "killed in the middle of a write", "disk full"])
def test_a_stream_goes_on_where_it_stopped(tmp_path, folder_of_two, monkeypatch, capsys, steps, how):
    whole = data.load(folder_of_two, tmp_path / "whole", max_tokens=10**6)
    count, encode, settle = itertools.count(), tokenise.ids_of, os.fsync

    def stops(*args):
        if next(count) == steps:
            raise KeyboardInterrupt
        return encode(*args)

    def full(handle):
        if next(count) >= 4 * steps:  # a step settles two token files, progress.json and its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        settle(handle)

    with monkeypatch.context() as patch:
        if how == "disk full":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(tokenise, "ids_of", stops)
        with pytest.raises((KeyboardInterrupt, OSError)) as stop:
            data.load(folder_of_two, tmp_path / "data", max_tokens=10**6)
    (part,) = (tmp_path / "data").iterdir()
    if how == "disk full":
        assert re.search("No space left on device.*make room and give the same command again", str(stop.value))
    if how == "killed in the middle of a write" and (part / "train.bin").exists():
        with open(part / "train.bin", "ab") as file:
            file.write(b"half a tok")
    capsys.readouterr()
    assert same(data.load(folder_of_two, tmp_path / "data", max_tokens=10**6), whole)
    assert (f"going on after document {64 * steps:,}" in capsys.readouterr().out) == (steps > 0)
    assert [p.name for p in (tmp_path / "data").iterdir()] == [whole.name]


def test_half_written_token_files_are_not_taken_for_a_part(tmp_path, folder_of_two, monkeypatch):
    """progress.json of more tokens than there are: begun again."""
    whole = data.load(folder_of_two, tmp_path / "whole", max_tokens=10**6)
    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            data.load(folder_of_two, tmp_path / "data", max_tokens=10**6)
    (part,) = (tmp_path / "data").iterdir()
    (part / "progress.json").write_text(
        json.dumps(
            {"fingerprint": data.fingerprint(folder_of_two, 10**6), "train": 10**5, "val": 10, "documents": 10**3}
        )
    )
    assert same(data.load(folder_of_two, tmp_path / "data", max_tokens=10**6), whole)


def test_a_stream_keeps_its_vocabulary_when_gpt2_appears_half_way(tmp_path, folder_of_two, monkeypatch):
    whole = data.load(folder_of_two, tmp_path / "whole", max_tokens=10**6)
    count, encode = itertools.count(), tokenise.ids_of
    with monkeypatch.context() as patch:
        patch.setattr(
            tokenise,
            "ids_of",
            lambda *args: encode(*args) if next(count) < 2 else (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            data.load(folder_of_two, tmp_path / "data", max_tokens=10**6)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail("another vocabulary"))
    assert same(data.load(folder_of_two, tmp_path / "data", max_tokens=10**6), whole)


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
    with pytest.raises(ValueError, match=message):
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
    with pytest.raises(ValueError, match="train has 1000 tokens, a window needs T [+] 1 = 1001"):
        counting.batch("train", step=0, B=1, T=1000)
