"""Streaming from the Hugging Face hub, with the library's own code against a server on the loopback address (hub.py).

Each test runs in a process of its own, as the library reads HF_ENDPOINT when it is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

TESTS = Path(__file__).parent
DOCUMENTS = [f"This is document number {i}, about café {i * i}.\n" for i in range(300)]

# The server, a byte-level stand-in for GPT-2's vocabulary, and a function for what a corpus holds.
PREAMBLE = """
import http.server, json, os, shutil, sys, threading
from pathlib import Path
from hub import Hub
Hub.root = Path("hub")
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
import tiktoken, data, tokenise
ranks = {bytes([b]): b for b in range(256)}
stand_in = tiktoken.Encoding("gpt2", pat_str=tokenise.WORDS, mergeable_ranks=ranks, special_tokens={tokenise.END_OF_TEXT: 256})
tiktoken.get_encoding = lambda name: {"gpt2": stand_in}[name]

def text(corpus):
    return {split: corpus.encoding.decode(tokens.tolist()) for split, tokens in corpus.tokens.items()}
"""


@pytest.fixture
def run(tmp_path):
    """Runs lines of Python after PREAMBLE in a folder with a stand-in hub; gives what they print last, from JSON."""

    def sets(path, content):
        (tmp_path / "hub" / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / "hub" / path)
        else:
            rows = "".join(json.dumps({"text": d, "meta": {"pile_set_name": "Pile-CC"}}) + "\n" for d in content)
            (tmp_path / "hub" / path).write_bytes(zstandard.compress(rows.encode()))

    sets("monology/pile-uncopyrighted/train/00.jsonl.zst", DOCUMENTS[:200])
    sets("monology/pile-uncopyrighted/train/01.jsonl.zst", DOCUMENTS[200:])
    sets("SimpleStories/SimpleStories/data/train-00000-of-00001.parquet", {"story": DOCUMENTS, "topic": ["x"] * 300})
    sets("roneneldan/TinyStories/data/train-00000-of-00001.parquet", {"text": DOCUMENTS})
    sets("owner/ids/data/train-00000-of-00001.parquet", {"input_ids": [[i, i + 1] for i in range(300)]})

    def run(code):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TIKTOKEN"))}
        env |= {
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        }
        done = subprocess.run(
            [sys.executable, "-c", PREAMBLE + code], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_the_named_sets_stream_through_the_library(run):
    found = run("""
names = ("pile", "simplestories", "tinystories", "hf:SimpleStories/SimpleStories:story")
first = [text(data.load(name, max_tokens=10**6)) for name in names]
ids = data.load("hf:owner/ids", max_tokens=10**6)
asked = len(Hub.asked)
again = text(data.load("pile", max_tokens=10**6))
print(json.dumps([first, again, asked == len(Hub.asked), [t.tolist() for t in ids.tokens.values()]]))
""")
    sets, again, silent, ids = found
    for texts in sets:
        documents = "".join(texts.values()).split("<|endoftext|>")[:-1]
        assert sorted(documents) == sorted(DOCUMENTS) and texts["train"] and texts["val"]
    assert again == sets[0] and silent  # tokenised once, without another request
    assert sorted(sum(ids, [])) == sorted([*range(300), *range(1, 301)])


def test_a_stopped_download_goes_on_in_the_second_file(run):
    found = run("""
whole = text(data.load("pile", "whole", max_tokens=10**6))
tokenise.SETTLE, encode, count = 1, tokenise.ids_of, []
def stops(*args):
    count.append(0)
    if len(count) == 5:  # 256 documents are settled: the first file holds 200
        raise KeyboardInterrupt
    return encode(*args)
tokenise.ids_of = stops
try:
    data.load("pile", max_tokens=10**6)
except KeyboardInterrupt:
    tokenise.ids_of = encode
(progress,) = Path("data").glob("*.part/progress.json")
settled = json.loads(progress.read_text())["documents"]
parts = text(data.load("pile", max_tokens=10**6))
print(json.dumps([settled, parts == whole]))
""")
    assert found == [256, True]


def test_without_network_one_line_names_the_step_and_what_to_set(run):
    found = run("""
def error(dataset):
    try:
        data.load(dataset, max_tokens=1000)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
def refuse(name):
    raise ConnectionError("no route")
missing, column = error("hf:owner/nothing"), error("hf:owner/ids:words")
tiktoken.get_encoding = refuse
vocabulary = error("pile")
server.shutdown(), server.server_close()
import time
time.sleep = lambda seconds: None  # the library tries again a few times
print(json.dumps([missing, column, vocabulary, error("tinystories")]))
""")
    missing, column, vocabulary, network = found
    assert missing.startswith(
        "ValueError: dataset 'hf:owner/nothing': the data step failed, as owner/nothing cannot be read from http://127.0.0.1"
    )
    assert column == "ValueError: dataset 'hf:owner/ids:words' has columns input_ids: there is no 'words'"
    assert (
        vocabulary.startswith("ValueError: dataset 'pile': the vocabulary step failed")
        and "(ConnectionError): set TIKTOKEN_CACHE_DIR" in vocabulary
    )
    assert (
        network.startswith("ValueError: dataset 'tinystories': the data step failed")
        and "set HF_HOME" in network
        and "a local copy" in network
    )
    assert not any("\n" in line for line in found)
