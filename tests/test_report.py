"""The report: every number against a slow computation over all tokens, bad input, labels, and the page in a real browser."""

import base64
import dataclasses
import gzip
import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_decompose import config, home  # noqa: F401  a tiny run
from torch import nn

import cluster
import data
import decompose
import eval as evaluation
import tokenise
from model import rms_norm
from studies import harvest
from studies import report as interpret
from train_target import run_script

T, WINDOWS = 8, 150  # several batches
C = harvest.CONTEXT
NASTY = [
    "</script>",
    "<img src=x onerror=alert(1)>",
    "&amp;",
    "😀",
    "\x07",
    "\u202e",
    "\u200b",
    "שלום",
    "self",
    " self",
    "\n" + 7 * " ",
    "{{data}}",
    "<!--",
    "'\"\\",
]


class Gamma(nn.Module):
    """Stands in for the CI function: each z a fixed direction of the inputs, or any constant."""

    def __init__(self, d_in: int, n: int, constant: float | None = None) -> None:
        super().__init__()
        self.W, self.constant = (
            nn.Parameter(torch.randn(d_in, n, generator=torch.Generator().manual_seed(3)) / d_in**0.5),
            constant,
        )

    def forward(self, inputs):
        z = torch.cat([rms_norm(x) for x in inputs], -1) @ self.W - 0.8
        z[..., 0] = -1  # one is dead
        return z if self.constant is None else torch.full_like(z, self.constant)


@pytest.fixture
def case(decomposition, tmp_path):
    """A run of random weights on 150 windows of random text, in a vocabulary of unpleasant tokens: Run, Corpus."""
    words = NASTY + [f"w{i}" for i in range(49 - len(NASTY))]
    text = torch.randint(0, 49, (WINDOWS * T,), generator=torch.Generator().manual_seed(4)).numpy().astype(np.uint16)
    text.reshape(WINDOWS, T)[:, 0], text.reshape(WINDOWS, T)[:, 1] = (
        np.arange(WINDOWS) // 45,
        np.arange(WINDOWS) % 45,
    )  # a window's number
    corpus = data.Corpus("nasty", {"train": text, "val": text}, tokenise.bpe_encoding([w.encode() for w in words]), "")
    gamma = Gamma(sum(V.shape[0] for V in decomposition.V.values()), sum(decomposition.C.values()))
    settings = decompose.Config(T=T, eval_windows=20, out="nasty")
    run = evaluation.Run(tmp_path, dataclasses.asdict(settings), {}, decomposition, gamma)
    return run, corpus


def live_of(run, corpus) -> np.ndarray:
    mean_g, _ = evaluation.mean_importances(run, corpus, evaluation.Config("", windows=20))
    return np.flatnonzero(mean_g > evaluation.ALIVE)


@pytest.fixture
def slow(case):
    """tokens, predicted [N]; g, a [N, n], of every window of the text, one at a time; live [n]."""
    run, corpus = case
    live, D = live_of(run, corpus), run.decomposition
    owner = [(name, c) for name, count in D.C.items() for c in range(count)]
    tokens, predicted, g, a = [], [], [], []
    for window in corpus.tokens["val"].reshape(-1, T):
        x = torch.from_numpy(window.astype(np.int64))[None]
        output, inputs = D.target_pass(x)
        tokens += x[0].tolist()
        predicted += output[0].argmax(-1).tolist()
        g.append(run.ci_fn(inputs)[0].clamp(0, 1)[:, live].detach())
        a.append(
            torch.stack(
                [
                    D.U[name][:, c].norm() * (inputs[D.names.index(name)][0] @ D.V[name][:, c])
                    for name, c in (owner[i] for i in live)
                ],
                -1,
            ).detach()
        )
    return np.array(tokens), np.array(predicted), torch.cat(g).numpy(), torch.cat(a).numpy(), live


# ---------------------------------------------------------------------------------------------------------------------
# The harvest


def test_harvest_against_all_tokens_at_once(case, slow, monkeypatch):
    tokens, predicted, g, a, live = slow
    monkeypatch.setattr(harvest, "PAIRS_EVERY", 512)  # pairs are counted in three parts
    h, N = harvest.harvest(*case, live, 10**6, 5, seed=1), len(tokens)
    fires = g > 0
    assert len(live) == 51 and 0.05 < fires.mean() < 0.5, "the case should be neither empty nor full"
    assert h.N == N and (h.live == live).all()
    assert (h.fires == fires.sum(0)).all() and (h.together == fires.T.astype(int) @ fires).all()
    assert np.allclose(h.sum_g, g.sum(0), rtol=1e-5) and np.allclose(h.sum_a, (a * fires).sum(0), rtol=1e-4, atol=1e-3)
    assert np.allclose(h.largest_a, abs(a).max(0), rtol=1e-5)
    for c in range(len(live)):
        low, high = h.a_range[c]
        edges = np.linspace(low, high, harvest.BINS + 1)
        for found, values in ((h.histogram_a[c], a[:, c]), (h.histogram_a_fires[c], a[fires[:, c], c])):
            expected = np.histogram(values.clip(low, high), edges)[0]
            assert found.sum() == len(values) and abs(found - expected).sum() <= 2, "one value may lie on an edge"
        expected = np.histogram(g[fires[:, c], c], np.linspace(0, 1, harvest.BINS + 1))[0]
        assert h.histogram_g[c].sum() == fires[:, c].sum() and abs(h.histogram_g[c] - expected).sum() <= 2
        for found, of in ((h.input, tokens), (h.predicted, predicted)):
            assert (found[[c]].toarray()[0] == np.bincount(of[fires[:, c]], minlength=50)).all()
    assert (h.input_total == np.bincount(tokens, minlength=50)).all() and (
        h.predicted_total == np.bincount(predicted, minlength=50)
    ).all()


def test_top_examples_are_the_best_of_every_window(case, slow):
    tokens, _, g, a, live = slow
    h = harvest.harvest(*case, live, 10**6, 5, seed=1)
    score = np.where(g > 0, g * abs(a), -np.inf).reshape(WINDOWS, T, -1)
    for c in range(len(live)):
        best, seen = score[..., c].max(1), set()
        assert np.allclose(h.top.priority[c], np.sort(best)[::-1][:5], rtol=1e-5)
        for j in range(int(h.top.priority[c].isfinite().sum())):
            t = int(h.top.t[c, j])
            around = slice(C - t, C - t + T)  # where the window lies within the example: all of it, as it is short
            first, second = h.top.tokens[c, j, around][:2].tolist()
            window = first * 45 + second  # equal scores may come in any order
            assert (
                best[window] == pytest.approx(float(h.top.priority[c, j]), rel=1e-5)
                and t == score[window, :, c].argmax()
            )
            seen.add(window)
            for kept, expected in ((h.top.tokens, tokens), (h.top.g, g[:, c]), (h.top.a, a[:, c])):
                assert np.allclose(kept[c, j, around], expected.reshape(WINDOWS, T)[window], rtol=1e-4, atol=1e-5)
                assert not kept[c, j, : C - t].any() and not kept[c, j, C - t + T :].any()
        assert len(seen) == min(5, np.isfinite(best).sum())


def position_of(h, c: int, j: int) -> int:
    """Of a random example, as the first two tokens of a window say its number."""
    t = int(h.random.t[c, j])
    first, second = h.random.tokens[c, j, C - t : C - t + 2].tolist()
    return (first * 45 + second) * T + t


def test_random_examples_fire_and_differ(case, slow):
    _, _, g, _, live = slow
    h = harvest.harvest(*case, live, 10**6, 12, seed=1)
    for c in range(len(live)):
        drawn = [position_of(h, c, j) for j in range(int(h.random.priority[c].isfinite().sum()))]
        assert len(set(drawn)) == len(drawn) == min(12, (g[:, c] > 0).sum())
        assert all(g[p, c] > 0 for p in drawn)


def test_the_reservoir_is_even_over_the_stream(case):
    """Everything fires everywhere: 12 examples of 51 subcomponents in 10 passes fall evenly on 1,200 positions in several batches."""
    run, corpus = case
    run.ci_fn.constant = 1.0
    drawn = np.zeros(WINDOWS * T)
    for seed in range(10):
        h = harvest.harvest(run, corpus, np.arange(1, 52), 10**6, 12, seed)
        for c, j in itertools.product(range(51), range(12)):
            drawn[position_of(h, c, j)] += 1
    expected = drawn.sum() / len(drawn)
    chi2 = ((drawn - expected) ** 2 / expected).sum() / len(drawn)  # mean 1, standard deviation sqrt(2 / 1200) = 0.04
    assert expected == 5.1 and 0.84 < chi2 < 1.16


def test_recall_and_pmi_against_their_definitions(case, slow):
    tokens, predicted, g, _, live = slow
    h, N = harvest.harvest(*case, live, 10**6, 2, seed=1), len(tokens)
    for counts, total, of in ((h.input, h.input_total, tokens), (h.predicted, h.predicted_total, predicted)):
        for by in ("recall", "pmi"):
            table = harvest.token_table(counts, h.fires, total, N, by)
            for c in range(len(live)):
                on, rows = g[:, c] > 0, []
                for token in set(of[on].tolist()):
                    both = int((on & (of == token)).sum())
                    if by == "recall" or both >= min(5, on.sum() / 10):
                        pmi = math.log2((both / N) / (on.mean() * (of == token).mean()))
                        rows.append({"token": token, "count": both, "recall": both / on.sum(), "pmi": pmi})
                rows.sort(key=lambda row: -row[by])
                kept = table["count"][c] > 0
                assert kept.sum() == min(harvest.TOP, len(rows))
                assert np.allclose(table[by][c][kept], [row[by] for row in rows[: harvest.TOP]])
                of_token = {row["token"]: row for row in rows}
                for i in np.flatnonzero(kept):
                    row = of_token[table["token"][c, i]]
                    assert (
                        table["count"][c, i] == row["count"]
                        and table["recall"][c, i] == pytest.approx(row["recall"])
                        and table["pmi"][c, i] == pytest.approx(row["pmi"])
                    )


def test_coactive_by_hand_and_by_brute_force(case, slow):
    # Two matrices of two: 0 fires at {0, 1, 2}, 1 at {0, 1}, 2 at {2, 3}, 3 never.
    together = np.array([[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]])
    place, overlap = harvest.coactive(together, together.diagonal(), np.array([0, 0, 1, 1]), 2)
    assert place[0, :, 0].tolist() == [1, 2] and overlap[0, :, 0].tolist() == [2 / 3, 1 / 4]
    assert place[1, :, 0].tolist() == [0, -1] and (place[:, :, 1:] == -1).all() and (place[3] == -1).all()
    _, _, g, _, live = slow
    run, corpus = case
    h, L = harvest.harvest(run, corpus, live, 10**6, 2, seed=1), run.decomposition.L
    matrix = np.repeat(np.arange(L), [len(c) for c in harvest.columns_of(live, run.decomposition.C)])
    place, overlap = harvest.coactive(h.together, h.fires, matrix, L)
    on = g > 0
    for c, l in itertools.product(range(len(live)), range(L)):
        found = {int(i): o for i, o in zip(place[c, l], overlap[c, l]) if i >= 0}
        expected = {
            i: (on[:, c] & on[:, i]).sum() / (on[:, c] | on[:, i]).sum()
            for i in np.flatnonzero(matrix == l)
            if i != c and (on[:, c] & on[:, i]).any()
        }
        assert found == pytest.approx(expected)


def test_norms_of_heads_and_promoted_tokens(case, slow):
    run, corpus = case
    D, live = run.decomposition, slow[4]
    columns = harvest.columns_of(live, D.C)
    whole, heads = harvest.norms(run, columns)
    owner = [(name, int(c)) for name, numbers in zip(D.names, columns) for c in numbers]
    mean_a = np.linspace(-2, 2, len(live))
    token, logits = harvest.promoted(run, columns, mean_a, 0.5)
    for i, (name, c) in enumerate(owner):
        U, V = D.U[name][:, c].detach(), D.V[name][:, c].detach()
        assert whole[i] == pytest.approx(torch.linalg.matrix_norm(torch.outer(U, V)).item(), rel=1e-5)
        if ".attn." in name:
            piece = torch.outer(U[:8], V) if not name.endswith(".o") else torch.outer(U, V[:8])
            assert heads[i, 0] == pytest.approx(torch.linalg.matrix_norm(piece).item(), rel=1e-5)
            assert (heads[i] ** 2).sum() == pytest.approx(whole[i] ** 2, rel=1e-5)
        if name.endswith((".o", ".down")):
            added = (D.target.embed.weight.detach() @ U) / U.norm() * mean_a[i] * 0.5
            added = (added - added.mean()).tolist()
            assert logits[i, 0].tolist() == pytest.approx(sorted(added, reverse=True)[:10], rel=1e-4, abs=1e-6)
            assert logits[i, 1].tolist() == pytest.approx(sorted(added)[:10], rel=1e-4, abs=1e-6)
            assert [added[t] for t in token[i, 0]] == pytest.approx(logits[i, 0].tolist(), rel=1e-4, abs=1e-6)
        else:
            assert not logits[i].any()


def test_rms_is_of_the_last_residual(case):
    """The unembedding reads rms_norm(x): with it and RMS(x) the logits of the target come out."""
    run, corpus = case
    seen, target = [], run.decomposition.target
    hook = target.blocks[-1].register_forward_hook(lambda block, args, y: seen.append(y))
    target(torch.from_numpy(corpus.tokens["val"].reshape(WINDOWS, T).astype(np.int64)))
    hook.remove()
    h = harvest.harvest(run, corpus, live_of(run, corpus), 10**6, 2, seed=1)
    assert h.rms_inverse == pytest.approx((1 / seen[0].square().mean(-1).sqrt()).mean().item(), rel=1e-4)


def test_prompt_masks_are_those_of_the_evaluation(case):
    run, corpus = case
    tokens = corpus.tokens["val"][:6].tolist()
    look, D = interpret.look_at_prompt(run, tokens, seed=0), run.decomposition
    x = torch.tensor([tokens])
    output, g = run.importances(x)
    rounded = D(x, torch.cat(((g > 0).float(), torch.zeros(1, 6, D.L)), -1)).softmax(-1)[0]
    assert look["token"].shape == look["p"].shape == (6, 4, 5) and (look["kl"][:, 0] < 1e-6).all()
    assert np.allclose(look["p"][:, 0], output.softmax(-1)[0].topk(5).values.detach(), atol=1e-5)
    assert (
        np.allclose(look["p"][:, 1], rounded.topk(5).values.detach(), atol=1e-5)
        and (look["token"][:, 1, 0] == rounded.argmax(-1).numpy()).all()
    )
    kl = (output.softmax(-1)[0] * (output.log_softmax(-1)[0] - rounded.log())).sum(-1)
    assert np.allclose(look["kl"][:, 1], kl.detach(), atol=1e-4)
    assert look["kl"][:, 3].mean() > look["kl"][:, 2].mean(), "masks that were searched for cost more than random ones"


# ---------------------------------------------------------------------------------------------------------------------
# The page and the labels


def unpack(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """What is in the page, by its own format and without pack's code."""
    text = path.read_text(encoding="utf-8").rpartition('id="data">')[2].partition("<")[0]
    raw = gzip.decompress(base64.b64decode(text))
    end = 8 + int.from_bytes(raw[:8], "little")
    page = json.loads(raw[8:end])
    return page, {name: np.frombuffer(raw, dtype, size, end + at) for name, (dtype, at, size) in page["arrays"].items()}


def settings(**changes) -> interpret.Config:
    return interpret.Config(**(dict(run="", tokens=10**6, examples=10, val_prompts=2) | changes))


def test_page_holds_the_harvest(case, slow, capsys):
    tokens, _, g, a, live = slow
    run, corpus = case
    path = interpret.report(run, corpus, settings())
    assert f"open {path}" in capsys.readouterr().out and path == run.folder / "report.html"
    html = path.read_text()
    assert html.count("</script>") == 2 and "://" not in html.replace("http://www.w3.org/2000/svg", ""), (
        "no address but the name of SVG"
    )
    page, arrays = unpack(path)
    assert page["N"] == len(tokens) and (arrays["live"] == live).all() and (arrays["fires"] == (g > 0).sum(0)).all()
    assert np.allclose(arrays["mean_g"], g.mean(0), rtol=1e-3) and np.allclose(
        arrays["largest_a"], abs(a).max(0), rtol=1e-3
    )
    assert [m["live"] for m in page["matrices"]] == [len(c) for c in harvest.columns_of(live, run.decomposition.C)]
    assert sum(m["l0"] for m in page["matrices"]) == pytest.approx(
        evaluation.mean_importances(run, corpus, evaluation.Config("", windows=20))[1].sum().item()
    )
    assert (
        page["tokens"][:8]
        == ["</script>", "<img src=x onerror=alert(1)>", "&amp;", "😀", "␇", "⟨202E⟩", "⟨200B⟩", "שלום"]
        and page["tokens"][10] == "⏎       "
    )
    kept = arrays["random_g"].reshape(len(live), 10, -1)[:, 0, C]
    assert (kept > 0).all(), "what fires is never rounded to 0"
    assert len(page["prompts"]) == 2 and arrays["prompt_n"].sum() == len(arrays["prompt_c"]) == len(arrays["prompt_g"])


def test_tokens_that_are_no_text():
    assert interpret.visible(b"\xe2\x80") == "\\xe2\\x80" and interpret.visible(b"a\tb\x00\x7f\r") == "a⇥b␀␡␍"
    assert interpret.visible("é שלום 😀 \xa0".encode()) == "é שלום 😀 ⟨00A0⟩"


def test_labels_go_out_and_come_back(case):
    run, corpus = case
    path = interpret.report(run, corpus, settings())
    file = path.parent / "labels.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 51 and all(row["label"] == "" for row in rows)
    first = rows[0]
    assert first["name"] == "0.attn.q:1" and first["matrix"] == "blocks.0.attn.q" and 0 < first["density"] < 1, (
        "number 0 is dead"
    )
    assert all("«" in text for row in rows for text in row["top"] + row["random"])
    assert {"input_by_recall", "input_by_pmi", "predicted_by_recall", "predicted_by_pmi"} <= set(first)
    assert [("promotes" in row) for row in rows] == [
        row["name"].split(":")[0].endswith((".o", ".down")) for row in rows
    ]

    rows[3]["label"] = "a name </script> &"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match="holds labels: give --labels="):
        interpret.report(run, corpus, settings())
    interpret.report(run, corpus, settings(labels=str(file)))
    assert unpack(path)[0]["labels"] == {"3": "a name </script> &"}
    again = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert again == rows


@pytest.fixture
def in_home(home, monkeypatch, tmp_path):  # noqa: F811
    """A run folder of decompose.py, one whose every z is below 0, and files of labels."""
    if not (home / "looked").exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "PGD_STEPS", (2,))
            decompose.main(config(out="looked"))
        checkpoint = torch.load(home / "looked/checkpoint.pt", weights_only=True)
        last = [name for name, p in checkpoint["vpd"]["ci_fn"].items() if p.shape == (72,)][-1]
        checkpoint["vpd"]["ci_fn"][last].fill_(-1e6)
        (home / "dead").mkdir()
        torch.save(checkpoint, home / "dead/checkpoint.pt")
        (home / "looked/metrics.json").unlink()
        (home / "nobody.jsonl").write_text('{"name": "7.mlp.up:3", "label": "x"}\n')
        (home / "torn.jsonl").write_text('{"name": "0.mlp.up:3", "la')
    return home


BAD = [
    (["nowhere"], "run folder 'nowhere' does not exist"),
    (["text"], "holds no checkpoint.pt"),
    (["target"], "checkpoint of kind 'target'"),
    (["dead"], "dead: no live subcomponent: none of 72 has a mean g above 1e-06 over 32 validation tokens"),
    (["looked", "--prompt=x", "--prompt=" + "def f(self): " * 16], "tokens: the context is 16"),
    (["looked", "--prompt="], "prompt='' has no tokens"),
    (["looked", "--labels=nobody.jsonl"], "'7.mlp.up:3' is no live subcomponent of this run"),
    (["looked", "--labels=torn.jsonl"], "labels=torn.jsonl: line 1 is not"),
    (["looked", "--labels=none.jsonl"], "labels=none.jsonl does not exist"),
    (["looked", "--tokens=0"], "tokens=0"),
    (["looked", "--val_prompts=-1"], "val_prompts=-1"),
    (["looked", "--examples=300"], "examples=300: at most 255"),
    (["looked", "--promt=x"], "did you mean --prompt"),
]


@pytest.mark.parametrize("args, message", BAD, ids=[" ".join(args)[:40] for args, _ in BAD])
def test_bad_input_ends_in_one_line(in_home, args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["interpret.py", *args])
    with pytest.raises(SystemExit) as stop:
        run_script(interpret.main, interpret.Config, interpret.__doc__)
    error = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message in error and stop.value.code != 0
    assert len(error.strip().splitlines()) == 1


def test_command_with_two_prompts_and_a_folder(in_home, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "interpret.py",
            "looked",
            "--tokens=200",
            "--prompt=x = (",
            "--prompt=self",
            "--val_prompts=1",
            "--out=seen/here",
        ],
    )
    run_script(interpret.main, interpret.Config, interpret.__doc__)
    page, arrays = unpack(in_home / "seen/here/report.html")
    assert "open seen/here/report.html" in capsys.readouterr().out
    assert (
        [prompt["own"] for prompt in page["prompts"]] == [True, True, False]
        and page["metrics"] is None
        and page["N"] == 208
    )
    assert "".join(page["tokens"][t] for t in page["prompts"][0]["tokens"]) == "x = ("


def test_a_run_is_opened_with_the_tokens_it_was_made_of(in_home, monkeypatch):
    checkpoint = torch.load(in_home / "looked/checkpoint.pt", weights_only=True)
    checkpoint["config"]["max_tokens"] = 1234
    (in_home / "limited").mkdir()
    torch.save(checkpoint, in_home / "limited/checkpoint.pt")
    asked, load = [], data.load
    monkeypatch.setattr(
        data, "load", lambda dataset, folder, max_tokens=0: asked.append(max_tokens) or load(dataset, folder)
    )
    cluster.open_run("limited", "", "cpu")
    assert asked == [1234]


def test_decompose_ends_with_the_report(in_home, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "PGD_STEPS", (2,))
        decompose.main(config(out="reported", report_tokens=64))
    assert "open reported/report.html" in capsys.readouterr().out
    assert unpack(in_home / "reported/report.html")[0]["N"] == 64
    assert not (in_home / "looked/report.html").exists(), "report_tokens=0 makes none"


# ---------------------------------------------------------------------------------------------------------------------
# In a real browser


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium that logs its console and every request; skipped where there is none."""
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium is not installed: pip install -r requirements.txt"
    )
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    ):
        options.add_argument("--" + flag)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_argument("--window-size=1200,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


class Reader:
    """Someone at the page, with a mouse and a keyboard."""

    def __init__(self, chrome, path: Path) -> None:
        self.chrome, self.url = chrome, path.resolve().as_uri()
        chrome.get(self.url)
        self.wait("D && document.querySelector('section')")

    def js(self, expression: str):
        return self.chrome.execute_script(f"return {expression}")

    def wait(self, expression: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.chrome, 20).until(lambda _: self.js(expression), f"never: {expression}")

    def find(self, css: str):
        return self.chrome.find_element("css selector", css)

    def press(self, keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.chrome).send_keys(keys).perform()

    def opened(self, name: str) -> None:
        self.wait(f"document.querySelector('h1').textContent === {json.dumps(name)}")

    @property
    def text(self) -> str:
        return self.js("document.getElementById('main').textContent")

    def quiet(self) -> None:
        """No message in the console, no request but for the file, no markup out of a token."""
        assert self.chrome.get_log("browser") == []
        messages = [json.loads(entry["message"])["message"] for entry in self.chrome.get_log("performance")]
        sent = [
            m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"
        ]  # some by the browser's own start page
        assert {r["request"]["url"].partition("#")[0] for r in sent if not r["documentURL"].startswith("chrome")} == {
            self.url
        }
        assert self.js("performance.getEntriesByType('resource').length") == 0
        assert self.js("document.querySelectorAll('img, iframe, link, main script').length") == 0


@pytest.fixture
def reader(browser, case):
    run, corpus = case
    names = interpret.live_names(run, live_of(run, corpus))
    labels = run.folder / "names.jsonl"
    labels.write_text(json.dumps({"name": names[7], "label": "a </script> label"}))
    return Reader(browser, interpret.report(run, corpus, settings(labels=str(labels)))), names


def test_page_by_search_click_and_keyboard(reader):
    page, names = reader
    assert "51 of 52" in page.text and all(f"{layer}.mlp.up" in page.text for layer in (0, 1))
    page.press("/")
    page.press("שלום")
    page.wait("document.getElementById('count').textContent.includes('for “שלום”')")
    rows = page.chrome.find_elements("css selector", ".list tbody tr")
    assert 0 < len(rows) < 51 and page.js("location.hash") == "#list"
    first = rows[0].find_element("css selector", "a").text
    rows[0].find_element("css selector", "a").click()
    page.opened(first)
    assert page.js("location.hash") == "#" + first and "שלום" in page.text
    page.press("j")
    page.wait(f"location.hash !== '#{first}'")
    second = page.js("here()")
    page.opened(second)
    page.press("k")
    page.opened(first)
    page.chrome.back()
    page.opened(second)
    page.press("l")
    page.wait("document.querySelector('.list')")
    page.press("jj")
    from selenium.webdriver.common.keys import Keys

    page.press(Keys.ENTER)
    page.opened(second)
    link = page.find(".chip")
    name = page.js("document.querySelector('.chip').hash.slice(1)")
    assert name in names
    page.chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", link)
    link.click()
    page.opened(name)
    page.chrome.get(page.url + "#" + names[7])
    page.wait("document.getElementById('label')?.textContent === 'a </script> label'")
    page.chrome.get(page.url + "#9.mlp.up:1")
    page.opened("Not in this report")
    page.press("o")
    page.opened(page.js("D.run"))
    page.quiet()


def test_unpleasant_tokens_are_shown_letter_by_letter(reader, case):
    page, names = reader
    shown = [interpret.visible(token.encode()) for token in NASTY]
    for name in names[:12]:
        page.chrome.get(page.url + "#" + name)
        page.opened(name)
        tokens = page.js("[...document.querySelectorAll('.text span')].map(span => span.textContent)")
        assert set(tokens) <= {*shown, *(f"w{i}" for i in range(49))}
        assert page.js(
            "[...document.querySelectorAll('.text span')].every(span => getComputedStyle(span).unicodeBidi === 'isolate' && !span.children.length)"
        )
        seen = set(tokens) if name == names[0] else seen | set(tokens)
    assert (
        set(shown) <= seen
        and "</script>" in seen
        and "שלום" in seen
        and "␇" in seen
        and "⟨202E⟩" in seen
        and "😀" in seen
    )
    page.quiet()


def test_both_numbers_of_a_token_under_the_pointer(reader, case, slow):
    from selenium.webdriver import ActionChains

    page, names = reader
    tokens, _, g, a, live = slow
    page.chrome.get(page.url + "#" + names[0])
    page.opened(names[0])
    best = int(np.where(g[:, 0] > 0, g[:, 0] * abs(a[:, 0]), -1).argmax())
    ActionChains(page.chrome).move_to_element(page.find(".text .centre")).perform()
    page.wait("!document.getElementById('tip').hidden")
    said = page.find("#tip").text.replace("−", "-").split()
    assert said[0] == "g" and float(said[1]) == pytest.approx(float(g[best, 0]), abs=0.006)
    assert said[3] == "activation" and float(said[4]) == pytest.approx(
        float(a[best, 0]), abs=0.005 + float(abs(a[:, 0]).max()) / 127
    )
    assert page.find(".example").get_attribute("aria-label").startswith("g ")


def test_prompts_and_narrow_and_dark(reader):
    from selenium.webdriver.common.keys import Keys

    page, _ = reader
    page.press("p")
    page.opened("Prompts")
    page.press(Keys.ARROW_LEFT)
    page.wait("location.hash === '#prompt:0@6'")
    assert [mode in page.text for mode in interpret.MODES] == [True] * 4 and "At position 6" in page.text
    chip = page.js("document.querySelector('a.chip').hash")
    page.find("a.chip").click()
    page.opened(chip[1:])
    page.chrome.back()
    page.opened("Prompts")
    assert page.js("location.hash") == "#prompt:0@6"
    light = page.js("getComputedStyle(document.body).backgroundColor")
    page.chrome.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    assert page.js("getComputedStyle(document.body).backgroundColor") != light
    page.chrome.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    for view in ("", "list", "prompt:0", chip[1:]):
        page.chrome.execute_script(f"location.hash = {json.dumps(view)}")
        page.wait(f"shownHash === {json.dumps(view)}")
        assert page.js("document.documentElement.scrollWidth") <= 360, f"{view!r} is wider than the phone"
    page.quiet()
