"""studies/export.py and share.py: what is sent opens as the run does, also from the hub; format 1 for ever."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import one_line

import eval as evaluation
import share
import studies.export as export
from flags import UserError

TESTS = Path(__file__).parent
CPU = torch.device("cpu")
# Of that sample, as the first code that opened it found them
MARK, TOKENS = "a31bbfccdc62c63c", [119, 327, 358, 258, 288, 748, 997]
SUM_G, KL = 131.74991, 0.110688


@pytest.fixture(scope="module")
def session_exported(session_whole) -> Path:
    before = os.getcwd()
    os.chdir(session_whole.parent)
    export.main(export.Config("whole", "exported"))
    os.chdir(before)
    return session_whole.parent / "exported"


@pytest.fixture
def exported(home, session_exported) -> Path:
    """The export of `whole`: not to be changed, copy it."""
    return session_exported


def test_an_export_is_the_run(whole, exported, tmp_path):
    of_run, of_export = evaluation.load_run(whole, CPU), evaluation.load_run(exported, CPU)
    assert sorted(path.name for path in exported.iterdir()) == sorted(share.FILES)
    assert of_export.mark == of_run.mark and of_export.decomposition.C == of_run.decomposition.C
    for name, value in of_run.decomposition.state_dict().items():  # the target's weights too
        assert torch.equal(of_export.decomposition.state_dict()[name], value)
    x = torch.arange(10)[None]
    for one, other in zip(of_run.importances(x)[:2], of_export.importances(x)[:2]):
        assert torch.equal(one, other)
    assert of_export.config["T"] == of_run.config["T"] and of_export.config["out"] == ""
    weights = load_file(exported / share.WEIGHTS)
    assert torch.equal(weights["U.blocks.0.attn.q"], of_run.decomposition.U["blocks.0.attn.q"])
    assert torch.equal(weights["target.embed.weight"], of_run.unembedding)
    export.main(export.Config("whole", str(tmp_path / "again")))
    assert (tmp_path / "again" / share.WEIGHTS).read_bytes() == (exported / share.WEIGHTS).read_bytes()


def test_readers_open_it_with_its_text(whole, exported, tmp_path, capsys):
    copy = shutil.copytree(exported, tmp_path / "copy")
    opened, corpus = evaluation.open_run(copy)
    assert share.encoding(copy).decode([65, 66]) == corpus.encoding.decode([65, 66])
    assert share.encoding(copy).n_vocab == corpus.vocab_size
    (copy / "metrics.json").unlink()
    evaluation.main(evaluation.Config(str(copy), windows=2, adv_steps="1", against=str(whole)))
    numbers = json.loads((copy / "metrics.json").read_text())
    assert numbers["run_mark"] == opened.mark and (copy / "figures" / "spectrum.png").is_file()
    export.main(export.Config(str(whole), str(copy)))  # over an earlier one
    assert (copy / "metrics.json").read_text() == (whole / "metrics.json").read_text()


def test_the_card_says_what_it_is_and_how_to_open_it(whole, exported, monkeypatch):
    text, metrics = (exported / "README.md").read_text(), evaluation.read_metrics(whole)
    assert f"| KL under random masks | {metrics['kl']['stochastic']:.3f} |" in text
    assert "python eval.py exported" in text and "{" not in text.replace("{text}", "")
    assert str(exported.parent) not in (exported / "config.json").read_text() + text  # no path of this machine
    code = text.split("```python\n")[1].split("```")[0]
    said: dict = {}
    exec(code, said)
    assert said["g"].shape[-1] == sum(said["run"].decomposition.C.values())


def test_without_its_text_one_line_says_how_to_get_it(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported, "copy")
    tokens = json.loads(Path("copy", "config.json").read_text())["tokens_folder"]
    line = one_line(evaluation, "copy")
    assert line.startswith("error: copy: its text is not here: dataset 'text' does not exist")
    assert line.endswith(f"; or put {tokens}, its folder of token files, into the folder --data_dir")
    assert evaluation.load_run("copy", CPU).importances(torch.tensor([[1, 2]]))[1].shape == (1, 2, 72)
    shutil.copytree(exported.parent / "data" / tokens, Path("tokens", tokens))
    assert evaluation.open_run("copy", "tokens")[1].folder == Path("tokens", tokens)


def test_bad_input_is_one_line(whole, exported, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("mine")
    assert "is not an empty folder" in one_line(export, "whole", str(tmp_path / "taken"))
    assert "push='name': must be <owner>/<name>" in one_line(export, "whole", str(tmp_path / "x"), "--push=name")
    copy = shutil.copytree(whole, tmp_path / "copy")
    (copy / "metrics.json").unlink()
    assert "evaluate that run first" in one_line(export, str(copy), str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()
    assert "hf:no/where cannot be fetched from" in one_line(evaluation, "hf:no/where")


def config_with(folder: Path, change) -> None:
    content = json.loads((folder / share.CONFIG).read_text())
    change(content)
    (folder / share.CONFIG).write_text(json.dumps(content))


def weights_with(folder: Path, change) -> None:
    weights = load_file(folder / share.WEIGHTS)
    change(weights)
    save_file(weights, folder / share.WEIGHTS)


BROKEN = {
    "newer": (lambda f: config_with(f, lambda c: c.update(format=2)), "has format 2, not 1: it is of a newer version"),
    "no format": (lambda f: config_with(f, lambda c: c.pop("format")), "is not a whole export (KeyError: 'format')"),
    "no C": (lambda f: config_with(f, lambda c: c.pop("C")), "lacks 'C'"),
    "no JSON": (lambda f: (f / share.CONFIG).write_text("{"), "is not a whole export (JSONDecodeError"),
    "cut": (lambda f: os.truncate(f / share.WEIGHTS, 1000), "is not a whole export (SafetensorError"),
    "no U": (lambda f: weights_with(f, lambda w: w.pop("U.blocks.0.attn.q")), "U:blocks/0/attn/q"),
    "a nan": (lambda f: weights_with(f, lambda w: w["V.blocks.0.attn.q"].fill_(torch.nan)), "is not finite"),
    "foreign": (lambda f: weights_with(f, lambda w: w.update(x=torch.ones(1))), "is not whole"),
    "vocabulary": (lambda f: (f / share.VOCAB).write_text('"gpt2"'), "vocab.json is not the vocabulary"),
    "no vocabulary": (lambda f: (f / share.VOCAB).unlink(), "is not a whole export (FileNotFoundError"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_whole_is_one_line(exported, tmp_path, what):
    copy = shutil.copytree(exported, tmp_path / "copy")
    BROKEN[what][0](copy)
    line = one_line(evaluation, str(copy))
    assert line.startswith(f"error: {copy}") and BROKEN[what][1] in line


def test_format_1_opens_for_ever(monkeypatch, tmp_path):
    """tests/format1 is a decomposition of 300 steps, exported by the first code that could."""
    shutil.copytree(TESTS / "format1", tmp_path / "format1")
    monkeypatch.chdir(tmp_path)
    run = evaluation.load_run("format1", CPU)
    assert run.mark == evaluation.read_metrics("format1", run.mark)["run_mark"] == MARK
    encoding = share.encoding(run.folder)
    tokens = encoding.encode_ordinary("without a licence")
    assert encoding.decode(tokens) == "without a licence" and tokens == TOKENS
    x = torch.tensor([tokens])
    hidden, g, _ = run.importances(x)
    m = evaluation.masks("ci", g, run.decomposition.L, torch.Generator())
    with torch.no_grad():
        kl = run.kl(hidden, run.decomposition(x, m))
    assert (g.sum().item(), kl.item()) == pytest.approx((SUM_G, KL), rel=1e-4)
    assert "its text is not here: dataset 'text' does not exist" in one_line(evaluation, "format1")


# The hub: the library's own code against a server on the loopback address, in a process of its own, as it reads
# HF_ENDPOINT and HF_HUB_OFFLINE when it is imported.
SCRIPT = """
import base64, http.server, json, os, re, shutil, sys, threading, urllib.parse
from pathlib import Path
from hub import COMMIT, Hub

class Models(Hub):  # what pushing and fetching use of the hub's HTTP interface
    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.asked.append((self.command, path, ""))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            files = self.files(found[1])
            about = {"id": found[1], "sha": COMMIT, "private": False, "gated": False, "disabled": False}
            self.send_json(about | {"siblings": [{"rfilename": f} for f in files]}, bool(files))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?", path):
            self.send_json([self.about(found[1], f) for f in self.files(found[1])], True)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.send_file(self.root / found[1] / found[2])
        else:
            self.send_json(None, False)
    do_HEAD = do_GET
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.asked.append((self.command, self.path, ""))
        address = f"http://127.0.0.1:{self.server.server_port}"
        if self.headers.get("Authorization") != "Bearer hf_secret":
            self.send(401, b'{"error": "no token"}', {})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            (self.root / asked["organization"] / asked["name"]).mkdir(parents=True)
            self.send_json({"url": f"{address}/{asked['organization']}/{asked['name']}"}, True)
        elif self.path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []}, True)
        elif self.path.endswith("/preupload/main"):
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self.send_json({"files": [{"path": f["path"]} | how for f in json.loads(body)["files"]]}, True)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    file = line["value"]
                    (self.root / found[1] / file["path"]).write_bytes(base64.b64decode(file["content"]))
            self.send_json({"commitUrl": f"{address}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT}, True)
        else:
            self.send_json(None, False)

Models.root = Path("hub").absolute()
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Models)
threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
import torch
import eval as evaluation, share, studies.export as export
found = {}
def error(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
os.environ["HF_TOKEN"] = "hf_wrong"
found["refused"] = error(lambda: export.main(export.Config("whole", "pushed", push="owner/name")))
os.environ["HF_TOKEN"] = "hf_secret"
export.main(export.Config("whole", "pushed", push="owner/name"))
found["files"] = Models.files(Models, "owner/name")
found["card"] = Path("hub/owner/name/README.md").read_text()
found["marks"] = [evaluation.load_run(run, torch.device("cpu")).mark for run in ("whole", "hf:owner/name")]
opened, corpus = evaluation.open_run("hf:owner/name")
found["folder"], found["tokens"] = str(opened.folder), corpus.digest
asked = len(Models.asked)
evaluation.read_metrics("hf:owner/name", opened.mark)
found["again"] = len(Models.asked) - asked
found["missing"] = error(lambda: share.located("hf:owner/nothing"))
Path("hub/owner/foreign").mkdir()
Path("hub/owner/foreign/config.json").write_text("{}")
found["foreign"] = error(lambda: share.located("hf:owner/foreign"))
server.shutdown(), server.server_close()
found["network"] = error(lambda: share.located("hf:owner/unseen"))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(session_whole, tmp_path_factory):
    home = tmp_path_factory.mktemp("pushing")
    for name in ("whole", "text", "data"):
        (home / name).symlink_to(session_whole.parent / name)
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    env |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(home / "home"), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_pushed_and_fetched_it_is_the_same(found, whole):
    assert set(share.FILES) <= set(found["files"]) <= {*share.FILES, ".gitattributes"}
    assert found["marks"][0] == found["marks"][1]
    assert found["folder"] == "out/owner--name" and found["again"] == 0  # fetched once
    assert "python eval.py hf:owner/name" in found["card"]
    assert found["tokens"] == evaluation.load_run(whole, CPU).checkpoint["tokens"]


def test_what_the_hub_refuses_is_one_line(found):
    assert found["refused"].startswith("UserError: push=owner/name: cannot be uploaded to http://127.0.0.1")
    assert found["refused"].endswith("log in with `hf auth login`, or set HF_TOKEN to a token that may write")
    assert found["missing"].startswith("UserError: hf:owner/nothing cannot be fetched from http://127.0.0.1")
    assert found["network"].startswith("UserError: hf:owner/unseen cannot be fetched from http://127.0.0.1")
    assert found["foreign"] == "UserError: hf:owner/foreign is no exported decomposition: there is no " + share.WEIGHTS
    assert not any("\n" in found[what] for what in ("refused", "missing", "network", "foreign"))


def test_without_the_library_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="^huggingface_hub is not installed: pip install huggingface_hub$"):
        share.located("hf:owner/name")
