import errno
import fcntl
import itertools
import json
import os
import re
import sys
import threading
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import torch
import zstandard

import data
import run
import tokenise
from data import Corpus
from flags import UserError
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


@pytest.mark.parametrize("copies", [1, 3])
def test_a_single_text_gives_its_last_twentieth_to_validation(tmp_path, copies, capsys):
    text = "".join(DOCUMENTS[:40])
    corpus = data.load(write(tmp_path, ".jsonl", [text] * copies), tmp_path / "data")
    train, val = read(corpus, "train"), read(corpus, "val")
    assert [head + tail for head, tail in zip(train, val)] == [text] * copies
    assert len(set(train)) == len(set(val)) == 1
    assert len(corpus.tokens["val"]) == pytest.approx(sum(map(len, corpus.tokens.values())) / 20, abs=copies)
    assert f"the largest of {copies} documents is cut, its last" in capsys.readouterr().out


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


def share(corpus):
    return len(corpus.tokens["val"]) / sum(map(len, corpus.tokens.values()))


@pytest.mark.parametrize(
    "lengths",
    [
        [1] * 400,
        [400, 20_000],
        [20_000, 400],
        [5000] * 2,
        [1000] * 10,
        [1000] * 30,
        [10_000] + [10] * 300,
        [1] * 19 + [99_999],
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_validation_is_a_twentieth_of_the_tokens_whatever_the_documents(lengths, seed):
    rng = np.random.default_rng(seed)
    checksums, lengths = rng.permutation(10**6)[: len(lengths)], np.array(lengths)
    train, val = tokenise.split(checksums, lengths)
    assert np.array_equal(train + val, lengths)
    assert 0.03 <= val.sum() / lengths.sum() <= 0.05
    cut = (train > 0) & (val > 0)
    assert cut.sum() <= 1 and all(lengths[cut] == lengths.max())  # the largest one, if any


def test_the_split_does_not_depend_on_the_order_of_documents():
    rng = np.random.default_rng(0)
    checksums, lengths = rng.integers(0, 2**32, 300), rng.integers(1, 1000, 300)
    order = rng.permutation(300)
    _, val = tokenise.split(checksums, lengths)
    _, val_of_permuted = tokenise.split(checksums[order], lengths[order])
    assert np.array_equal(val[order], val_of_permuted)
    assert val.sum() == pytest.approx(lengths.sum() / 20, rel=0.02)


def test_a_book_behind_a_preface_is_training_text(tmp_path, capsys):
    preface, book = "A preface of few words. " * 20, "".join(DOCUMENTS) * 5
    corpus = data.load(write(tmp_path, "-folder", [preface, book]), tmp_path / "data")
    assert 0.03 < share(corpus) < 0.06
    assert len([d for d in read(corpus, "val") if d in book]) == 1
    assert "the largest of 2 documents is cut" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Files


def all_text(corpus):
    return "".join(corpus.encoding.decode(tokens.tolist()) for tokens in corpus.tokens.values())


def rows(path, texts, **more):
    path.write_text("".join(json.dumps({"text": text} | more) + "\n" for text in texts))


@pytest.mark.parametrize(
    "name", ["part[1].jsonl", "a*b.jsonl", "who?.jsonl", "two words.jsonl", "{x}.jsonl", "%20#.jsonl"]
)
def test_names_are_names_and_no_patterns(tmp_path, name):
    folder = tmp_path / "set"
    folder.mkdir()
    for other in ("part1.jsonl", "axxb.jsonl", "whom.jsonl", "x.jsonl"):
        rows(folder / other, ["PLAIN " + d for d in DOCUMENTS[:40]])
    rows(folder / name, ["SPECIAL " + d for d in DOCUMENTS[:40]])
    text = all_text(data.load(str(folder / name), tmp_path / "data"))
    assert (text.count("SPECIAL "), text.count("PLAIN ")) == (40, 0)
    text = all_text(data.load(str(folder) + "/", tmp_path / "data"))  # a slash at the end changes nothing
    assert (text.count("SPECIAL "), text.count("PLAIN ")) == (40, 160)


@pytest.mark.parametrize("late", ["web", "2024-01-01T00:00:00", 3, {"a": 1}, [None]])
def test_other_fields_may_hold_anything(tmp_path, late):
    path = tmp_path / "set.jsonl"
    lines = [json.dumps({"text": d, "source": None if i < 100 else late}) for i, d in enumerate(DOCUMENTS)]
    path.write_text("\n".join([*lines, "", '{"text": null, "source": 1}', '{"text": ""}', ""]))
    corpus = data.load(str(path), tmp_path / "data")
    assert sorted(read(corpus, "train") + read(corpus, "val")) == sorted(DOCUMENTS)


def test_a_text_that_looks_like_a_date_stays_text(tmp_path):
    dates = [f"2024-01-01T00:{i // 60:02}:{i % 60:02}" for i in range(300)]
    corpus = data.load(write(tmp_path, ".jsonl", dates), tmp_path / "data")
    assert sorted(read(corpus, "train") + read(corpus, "val")) == sorted(dates)


def test_half_a_surrogate_pair_refuses_no_file(tmp_path):
    corpus = data.load(write(tmp_path, ".jsonl", [*DOCUMENTS, "half \ud83d a pair"]), tmp_path / "data")
    assert "half ? a pair" in read(corpus, "train") + read(corpus, "val")


@pytest.mark.parametrize("suffix", [".jsonl", "-folder"])
def test_byte_order_marks_are_no_text(tmp_path, suffix):
    path = write(tmp_path, suffix, [("\ufeff" if suffix == ".jsonl" else "") + d for d in DOCUMENTS])
    for file in tokenise.local_files(path):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    corpus = data.load(path, tmp_path / "data")
    assert "\ufeff" not in all_text(corpus)
    assert sorted(read(corpus, "train") + read(corpus, "val")) == sorted(DOCUMENTS)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_line_ends_of_text_files(tmp_path, ends):
    path = tmp_path / "set.txt"
    path.write_bytes("".join(DOCUMENTS).replace("\n", ends).encode())
    assert "".join(read(data.load(str(path), tmp_path / "data"), "train")) in "".join(DOCUMENTS)


@pytest.mark.parametrize(
    "suffix, content, message",
    [
        ("txt", "caf\u00e9".encode("latin-1"), r"f5\.txt is not UTF-8 \(byte 0xe9 at 3\): save it as UTF-8"),
        ("txt", "text".encode("utf-16"), r"f5\.txt is not UTF-8 \(byte 0xff at 0\)"),
        (
            "jsonl",
            b'{"text": "a"}\n{"text": "caf\xe9"}\n',
            r"f5\.jsonl, line 2 is not a JSON object in UTF-8 \(Unicode",
        ),
        ("jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"f5\.jsonl, line 3 is not a JSON object in UTF-8 \(JSONDecode"),
        (
            "jsonl",
            b'{"text": "a"}\n["b"]\n',
            r"f5\.jsonl, line 2 is not a JSON object in UTF-8 \(TypeError: it is a list",
        ),
        ("jsonl", b'{"text": "a"}\n{"story": "b"}\n', r"f5\.jsonl, line 2 has columns story: there is no 'text'"),
        ("jsonl", b'{"text": "a"}\n{"text": 3}\n', r"f5\.jsonl, line 2: 'text' holds int, not text"),
        ("jsonl", b'{"text": "a"}\n{"text": [true]}\n', r"f5\.jsonl, line 2: 'text' holds list, not text"),
        ("jsonl.zst", b"no zst", r"f5\.jsonl\.zst: the row after this cannot be read as \.jsonl\.zst \(ZstdError"),
        (
            "jsonl.zst",
            zstandard.compress(b'{"text": "a"}\n' * 999)[:-3],
            r"f5\.jsonl\.zst: the row .* \(EOFError: the file is cut",
        ),
        (
            "jsonl",
            b'{"text": "a"}\n{"text": [1, 2]}\n',
            r"f5\.jsonl, line 2: 'text' holds token ids, other than before",
        ),
        ("jsonl", b'{"text": [1, null]}\n', r"f5\.jsonl: 'text' holds list, not text or token ids"),
        ("jsonl", b'{"text": [1, false]}\n', r"f5\.jsonl: 'text' holds list, not text or token ids"),
        ("parquet", b"no parquet", r"f5\.parquet: the row after this cannot be read as \.parquet \(ArrowInvalid"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path, suffix, content, message):
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(8):
        good = {"txt": DOCUMENTS[i].encode(), "jsonl": json.dumps({"text": DOCUMENTS[i]}).encode()}
        good["jsonl.zst"] = zstandard.compress(good["jsonl"])
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [DOCUMENTS[i]]}), folder / f"f{i}.parquet")
        else:
            (folder / f"f{i}.{suffix}").write_bytes(good[suffix])
    (folder / f"f5.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=message):
        data.load(str(folder), tmp_path / "data")
    assert not list((tmp_path / "data").glob("*"))


def test_hidden_files_and_what_we_write_are_no_text(tmp_path):
    folder = tmp_path / "set"
    files = [
        "a.txt",
        "deep/b.txt",
        ".hidden.txt",
        "._a.txt",
        ".git/c.txt",
        "deep/._b.txt",
        "run/sample.txt",
        "bare/log.txt",
    ]
    files += ["~$a.txt", "data/set-0/x.txt", "data/set-1.part/x.txt", "other/config.json", "other/d.txt"]
    for i, name in enumerate(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"FILE {name}. " + DOCUMENTS[i])
    mark = json.dumps({"fingerprint": "0"})
    ours = json.dumps({"command": "", "commit": "", "hardware": "", "versions": {}})
    for name, content in {
        "run/config.json": ours, "bare/checkpoint.pt": "", "data/set-0/meta.json": mark,
        "data/set-1.part/progress.json": mark, "other/config.json": "[]",
    }.items():  # fmt: skip
        (folder / name).write_text(content)
    (folder / "folder.txt").mkdir()
    (folder / "folder.txt" / "e.txt").write_text("FILE folder.txt/e.txt. text")
    read = [str(p.relative_to(folder)) for p in tokenise.local_files(str(folder))]
    assert read == ["a.txt", "bare/log.txt", "deep/b.txt", "folder.txt/e.txt", "other/d.txt"]


def test_frames_of_a_compressed_file_are_read_to_the_last(tmp_path):
    rows = "".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS).encode()
    path = tmp_path / "set.jsonl.zst"
    path.write_bytes(zstandard.compress(rows[:5001]) + zstandard.compress(rows[5001:]))  # the first ends within a line
    corpus = data.load(str(path), tmp_path / "data")
    assert sorted(read(corpus, "train") + read(corpus, "val")) == sorted(DOCUMENTS)


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(DOCUMENTS), pyarrow.array(DOCUMENTS)], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "set.parquet")
    with pytest.raises(UserError, match="set.parquet has columns text, text: there are two of 'text'"):
        data.load(str(tmp_path / "set.parquet"), tmp_path / "data")


def test_copies_of_one_word_cannot_be_divided(tmp_path):
    with pytest.raises(UserError, match="is 100 copies of one short text: nothing is left to hold out"):
        data.load(write(tmp_path, ".jsonl", ["a"] * 100), tmp_path / "data")


def test_links_are_followed_once_and_a_dead_one_is_named(tmp_path):
    folder, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    (elsewhere / "a.txt").write_text("a")
    (folder / "link").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    assert tokenise.local_files(str(folder)) == [folder / "link" / "a.txt"]
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="set/gone.txt is no file that can be read"):
        tokenise.local_files(str(folder))
    with pytest.raises(UserError, match="gone.txt' is a link to nothing"):
        tokenise.local_files(str(folder / "gone.txt"))


def test_no_name_is_no_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "diary.txt").write_text("private")
    with pytest.raises(UserError, match="dataset '' has no name: give 'stdlib'"):
        data.load("")


@pytest.mark.parametrize("white", [" ", "\n", "\t ", "\u00a0"])
def test_a_million_of_white_space(tmp_path, white):
    text = "".join(DOCUMENTS) + white * (1_200_000 // len(white)) + "".join(DOCUMENTS)
    path = tmp_path / "set.txt"
    path.write_text(text)
    (train,), (val,) = (read(data.load(str(path), tmp_path / "data"), split) for split in ("train", "val"))
    assert train + val == text


def test_white_space_is_only_cut_where_it_is_long():
    encoding = bpe_encoding(learn_bpe(" ".join(DOCUMENTS), 300))
    for text in (" ".join(DOCUMENTS) * 20, "a" + " " * (tokenise.SPACE - 1) + "b"):
        assert tokenise.encode(encoding, [text, "x"]) == [
            [*encoding.encode_ordinary(part), encoding.eot_token] for part in (text, "x")
        ]


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
        ({"a.jsonl": "not json at all\n"}, "a.jsonl is not a JSON object"),
        ({"a.parquet": "not parquet at all"}, "cannot be read as .parquet"),
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


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(tokenise, "encoded", interrupted(1, full))
    with pytest.raises(UserError, match=r"set.jsonl' to .* \(No space left on device\): make room and give the same"):
        data.load(write(tmp_path, ".jsonl", DOCUMENTS), tmp_path / "data")
    assert [path.suffix for path in (tmp_path / "data").iterdir()] == [".part"]  # to go on from


def test_each_python_has_tokens_of_its_own_standard_library(tmp_path, monkeypatch):
    files = tokenise.local_files(write(tmp_path, "-folder", DOCUMENTS))
    tmp_path = tmp_path / "data"
    monkeypatch.setattr(tokenise, "stdlib_files", lambda: files)
    first = data.load("stdlib", tmp_path)
    tokens = (first.folder / "train.bin").read_bytes()
    monkeypatch.setattr(sys, "version", "4.0")
    monkeypatch.setattr(tokenise, "stdlib_files", lambda: files[:100])
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
def test_more_tokens_than_there_are_change_nothing(tmp_path, suffix, column, capsys):
    dataset = write(tmp_path, suffix, DOCUMENTS, column)
    whole = data.load(dataset, tmp_path / "data")
    assert same(data.load(dataset, tmp_path / "data", max_tokens=10**9), whole)
    assert re.search("ends after [0-9,]+ tokens, fewer than the 1,000,000,000 asked for", capsys.readouterr().out)


def test_max_tokens_ends_with_the_document_that_reaches_it(tmp_path):
    dataset = write(tmp_path, ".jsonl", DOCUMENTS)
    whole, short = data.load(dataset, tmp_path / "data"), data.load(dataset, tmp_path / "data", max_tokens=500)
    longest = max(len(whole.encoding.encode_ordinary(d)) for d in DOCUMENTS) + 1
    assert 500 <= sum(len(t) for t in short.tokens.values()) < 500 + longest
    first = json.loads((short.folder / "meta.json").read_text())["documents"]
    assert sorted(read(short, "train") + read(short, "val")) == sorted(DOCUMENTS[:first])


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
        for name in ("tokens.bin", "documents.bin"):
            with open(part / name, "ab") as file:
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


@pytest.mark.parametrize("changes", [{"tokens": 10**5}, {"documents": 10**3}, {"fingerprint": "0" * 16}])
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


def test_max_tokens_holds_for_the_standard_library_too(tmp_path):
    corpus = data.load("stdlib", tmp_path, max_tokens=20_000)
    assert 20_000 <= sum(map(len, corpus.tokens.values())) < 100_000
    assert corpus.name == "stdlib-20000"


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
# The text of a run


def saved(corpus, dataset):
    config = {"dataset": dataset, "data_dir": str(corpus.folder.parent), "max_tokens": 0}
    return {"config": config} | corpus.of_checkpoint()


def test_a_run_finds_its_tokens_when_the_text_has_changed_or_is_gone(tmp_path, monkeypatch):
    dataset = write(tmp_path, ".jsonl", DOCUMENTS)
    corpus = data.load(dataset, tmp_path / "data")
    checkpoint = saved(corpus, dataset)
    write(tmp_path, ".jsonl", DOCUMENTS[:50])
    assert same(data.of_run("run", checkpoint), corpus)
    os.unlink(dataset)
    assert same(data.of_run("run", checkpoint), corpus) and data.of_run("run", checkpoint).name == corpus.name
    os.rename(tmp_path / "data", tmp_path / "moved")
    with pytest.raises(UserError, match="set.jsonl' does not exist"):
        data.of_run("run", checkpoint)
    assert same(data.of_run("run", checkpoint, str(tmp_path / "moved")), corpus)


def test_a_run_makes_its_tokens_anew_and_sees_whether_they_are_the_same(tmp_path):
    dataset = write(tmp_path, ".jsonl", DOCUMENTS)
    corpus = data.load(dataset, tmp_path / "data")
    checkpoint = saved(corpus, dataset)
    assert same(data.of_run("run", checkpoint, str(tmp_path / "other")), corpus)
    write(tmp_path, ".jsonl", DOCUMENTS[:-1] + ["another one"])
    with pytest.raises(UserError) as error:
        data.of_run("run", checkpoint, str(tmp_path / "third"))
    (third,) = (tmp_path / "third").iterdir()
    found = f"those in {third} have the digest {data.open_tokens(third).digest}, not {corpus.digest}"
    assert str(error.value) == f"run: its text, {dataset!r}, has changed since that run: {found}"


def test_a_run_finds_its_tokens_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = write(tmp_path, ".jsonl", DOCUMENTS)
    corpus = data.load("set.jsonl", "data")
    checkpoint = {"config": {"dataset": "set.jsonl", "data_dir": "data", "max_tokens": 0}} | corpus.of_checkpoint()
    (tmp_path / "other" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "other")
    assert same(data.of_run("run", checkpoint), corpus)
    os.unlink(dataset)
    assert same(data.of_run("run", checkpoint), corpus)


@pytest.mark.parametrize("vocab", ["{", "[1]", '"gpt3"', "{}"])
def test_a_vocabulary_that_cannot_be_read(tmp_path, vocab):
    dataset = write(tmp_path, ".jsonl", DOCUMENTS)
    corpus = data.load(dataset, tmp_path / "data")
    (corpus.folder / "vocab.json").write_text(vocab)
    if vocab[0] == "{":  # no vocabulary: made anew
        assert same(data.load(dataset, tmp_path / "data"), corpus)
    else:
        with pytest.raises(UserError, match="vocab.json is not whole"):
            data.load(dataset, tmp_path / "data")


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_other_token_anywhere_is_seen(tmp_path, split):
    dataset = write(tmp_path, ".jsonl", DOCUMENTS)
    corpus = data.load(dataset, tmp_path / "data")
    checkpoint = saved(corpus, dataset)
    file = corpus.folder / f"{split}.bin"
    tokens = np.fromfile(file, np.uint16)
    tokens[len(tokens) // 2] += 1
    tokens.tofile(file)
    with pytest.raises(UserError, match="has changed since that run"):
        data.of_run("run", checkpoint)


def test_two_processes_tokenise_a_set_once(tmp_path, capsys):
    """The second waits for the first, and then finds what it made."""
    dataset, corpora = write(tmp_path, ".jsonl", DOCUMENTS), []
    name = data.name_of(dataset, 0, data.fingerprint(dataset))
    lock = tmp_path / "data" / (name + run.LOCK)
    lock.parent.mkdir()
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 1 on moon")
        file.flush()
        second = threading.Thread(target=lambda: corpora.append(data.load(dataset, tmp_path / "data")))
        second.start()
        time.sleep(0.5)
        assert not corpora and [path.name for path in lock.parent.iterdir()] == [lock.name]
        tokenise.tokenise(dataset, name, tmp_path / "data" / name, data.fingerprint(dataset))
        made = (tmp_path / "data" / name / "train.bin").stat().st_mtime_ns
        lock.unlink()  # as the first does when it ends
    second.join(10)
    assert corpora[0].name == name and (corpora[0].folder / "train.bin").stat().st_mtime_ns == made
    assert "is being written by process 1 on moon: waiting until it is done" in capsys.readouterr().out
    assert [path.name for path in lock.parent.iterdir()] == [name]


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
