"""Streaming from the Hugging Face hub, with the library's own code against a server on the loopback address (hub.py).

All of it runs once in a process of its own, as the library reads HF_ENDPOINT when it is imported.
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

# The server, a byte-level stand-in for GPT-2's vocabulary, and then what each test below looks at.
SCRIPT = """
import http.server, itertools, json, os, threading, time
from pathlib import Path
from hub import Hub
Hub.root = Path("hub")
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
import tiktoken, data, tokenise
ranks, end = {bytes([b]): b for b in range(256)}, {tokenise.END_OF_TEXT: 256}
stand_in = tiktoken.Encoding("gpt2", pat_str=tokenise.WORDS, mergeable_ranks=ranks, special_tokens=end)
tiktoken.get_encoding = lambda name: {"gpt2": stand_in}[name]
found = {}

def text(corpus):
    return {split: corpus.encoding.decode(tokens.tolist()) for split, tokens in corpus.tokens.items()}

# The named sets.
names = ("pile", "simplestories", "tinystories", "hf:SimpleStories/SimpleStories:story")
found["sets"] = [text(data.load(name, max_tokens=10**6)) for name in names] + [text(data.load("tinystories"))]
found["ids"] = [t.tolist() for t in data.load("hf:owner/ids", max_tokens=10**6).tokens.values()]
asked = len(Hub.asked)
found["again"] = text(data.load("pile", max_tokens=10**6))
found["silent"] = asked == len(Hub.asked)

# A stopped download.
tokenise.SETTLE, encoded = 1, tokenise.encoded
def stops(*args):
    yield from itertools.islice(encoded(*args), 4)  # 256 documents are settled: the first file holds 200
    raise KeyboardInterrupt
tokenise.encoded = stops
try:
    data.load("pile", "stopped", max_tokens=10**6)
except KeyboardInterrupt:
    tokenise.encoded = encoded
(progress,) = Path("stopped").glob("*.part/progress.json")
found["settled"] = json.loads(progress.read_text())["documents"]
found["parts"] = text(data.load("pile", "stopped", max_tokens=10**6))

# Failures.
def error(dataset):
    try:
        data.load(dataset, "failed", max_tokens=1000)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
def refuse(name):
    raise ConnectionError("no route")
found["missing"], found["column"] = error("hf:owner/nothing"), error("hf:owner/ids:words")
tiktoken.get_encoding = refuse
found["vocabulary"] = error("pile")
server.shutdown(), server.server_close()
time.sleep = lambda seconds: None  # the library tries again a few times
found["network"] = error("hf:owner/unseen")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What SCRIPT finds, in a folder with a stand-in hub."""
    home = tmp_path_factory.mktemp("hub")

    def sets(path, content):
        (home / "hub" / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            pyarrow.parquet.write_table(pyarrow.table(content), home / "hub" / path)
        else:
            rows = "".join(json.dumps({"text": d, "meta": {"pile_set_name": "Pile-CC"}}) + "\n" for d in content)
            (home / "hub" / path).write_bytes(zstandard.compress(rows.encode()))

    sets("monology/pile-uncopyrighted/train/00.jsonl.zst", DOCUMENTS[:200])
    sets("monology/pile-uncopyrighted/train/01.jsonl.zst", DOCUMENTS[200:])
    sets("SimpleStories/SimpleStories/data/train-00000-of-00001.parquet", {"story": DOCUMENTS, "topic": ["x"] * 300})
    sets("roneneldan/TinyStories/data/train-00000-of-00001.parquet", {"text": DOCUMENTS})
    sets("owner/ids/data/train-00000-of-00001.parquet", {"input_ids": [[i, i + 1] for i in range(300)]})
    sets("owner/unseen/data/train-00000-of-00001.parquet", {"text": DOCUMENTS})

    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TIKTOKEN"))}
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    env |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(home / "home"), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_named_sets_stream_through_the_library(found):
    for texts in found["sets"]:
        documents = "".join(texts.values()).split("<|endoftext|>")[:-1]
        assert sorted(documents) == sorted(DOCUMENTS) and texts["train"] and texts["val"]
    assert found["again"] == found["sets"][0] and found["silent"]  # tokenised once, without another request
    assert sorted(sum(found["ids"], [])) == sorted([*range(300), *range(1, 301)])


def test_a_stopped_download_goes_on_in_the_second_file(found):
    assert found["settled"] == 256
    assert found["parts"] == found["sets"][0]


def test_without_network_one_line_names_the_step_and_what_to_set(found):
    missing, column, vocabulary, network = (found[k] for k in ("missing", "column", "vocabulary", "network"))
    assert missing.startswith("UserError: dataset 'hf:owner/nothing': the data step failed, as owner/nothing cannot")
    assert "cannot be read from http://127.0.0.1" in missing
    assert column == "UserError: dataset 'hf:owner/ids:words' has columns input_ids: there is no 'words'"
    assert vocabulary.startswith("UserError: dataset 'pile': the vocabulary step failed")
    assert "(ConnectionError: no route): set TIKTOKEN_CACHE_DIR" in vocabulary
    assert network.startswith("UserError: dataset 'hf:owner/unseen': the data step failed")
    assert "set HF_HOME" in network and "a local copy" in network
    assert not any("\n" in line for line in (missing, column, vocabulary, network))
