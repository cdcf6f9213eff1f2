"""The report: every number against a slow computation over all tokens, bad input, labels, the page in a browser."""

import base64
import csv
import dataclasses
import gzip
import io
import itertools
import json
import math
import shutil
import sys
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import torch
from reader import Reader
from tiny import config, one_line
from torch import nn

import cost
import data
import decompose
import eval as evaluation
import tokenise
from flags import UserError
from model import GPT, Decomposition, GPTConfig, rms_norm
from run import run_script
from studies import harvest, report
from studies.page import smallest, visible

T, WINDOWS, K = 8, 150, 12  # several batches; examples of each kind
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
]
NASTY += ["\n" + 7 * " ", "{{data}}", "<!--", "'\"\\"]


class Gamma(nn.Module):
    """Stands in for the CI function: each z a fixed direction of the inputs, or any constant."""

    def __init__(self, d_in: int, n: int, constant: float | None = None) -> None:
        super().__init__()
        W = torch.randn(d_in, n, generator=torch.Generator().manual_seed(3)) / d_in**0.5
        self.W, self.constant = nn.Parameter(W), constant

    def forward(self, inputs):
        z = torch.cat([rms_norm(x) for x in inputs], -1) @ self.W - 0.8
        z[..., 0] = -1  # one is dead
        return z if self.constant is None else torch.full_like(z, self.constant)


@pytest.fixture(autouse=True)
def counted_once(request, monkeypatch):
    """What a window takes of memory need not be counted in every test: it takes longer than most of them."""
    if "count" not in request.keywords:
        monkeypatch.setattr(cost, "counted", lambda make, **options: [cost.Cost(0, 10**6, 0, 0)])


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A run of random weights on 150 windows of random text, in a vocabulary of unpleasant tokens: Run, Corpus."""
    generator = torch.Generator().manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=50, context=8, n_layer=2, n_head=2, d_model=16, d_mlp=32))
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.4, generator=generator)
    counts = {"*.q": 3, "*.up": 7, "*": 4}  # 52 in all
    decomposition = Decomposition(gpt, counts, torch.Generator().manual_seed(2), ends_in="hidden")
    words = NASTY + [f"w{i}" for i in range(49 - len(NASTY))]
    text = torch.randint(0, 49, (WINDOWS, T), generator=torch.Generator().manual_seed(4)).numpy().astype(np.uint16)
    text[:, 0], text[:, 1] = np.arange(WINDOWS) // 45, np.arange(WINDOWS) % 45  # a window's number
    encoding = tokenise.bpe_encoding([w.encode() for w in words])
    corpus = data.Corpus("nasty", {"train": text.ravel(), "val": text.ravel()}, encoding, "")
    gamma = Gamma(sum(V.shape[0] for V in decomposition.V.values()), sum(decomposition.C.values()))
    settings = dataclasses.asdict(decompose.Config(T=T, eval_windows=20, out="nasty"))
    return evaluation.Run(tmp_path_factory.mktemp("nasty"), settings, {}, decomposition, gamma), corpus


@pytest.fixture(scope="module")
def live(case):
    """The columns that eval.py calls live, [n]."""
    run, corpus = case
    windows = evaluation.validation_windows(corpus, 20, T, 0)
    mean_g, _ = evaluation.mean_importances([run.importances(windows[:, :-1])[1]])
    return np.flatnonzero(mean_g > evaluation.ALIVE)


@pytest.fixture(scope="module")
def all_tokens(case, live):
    """tokens, predicted [N]; g, a [N, n], of every window of the text, one at a time."""
    (run, corpus), decomposition = case, case[0].decomposition
    owner = [(i, name, c) for i, (name, count) in enumerate(decomposition.C.items()) for c in range(count)]
    tokens, predicted, g, a = [], [], [], []
    for window in corpus.tokens["val"].reshape(-1, T):
        x = torch.from_numpy(window.astype(np.int64))[None]
        _, inputs = decomposition.target_pass(x)
        tokens += x[0].tolist()
        predicted += decomposition.target(x)[0].argmax(-1).tolist()
        g.append(run.ci_fn(inputs)[0].clamp(0, 1)[:, live].detach())
        along = [
            decomposition.U[name][:, c].norm() * (inputs[l][0] @ decomposition.V[name][:, c])
            for l, name, c in (owner[i] for i in live)
        ]
        a.append(torch.stack(along, -1).detach())
    return np.array(tokens), np.array(predicted), torch.cat(g).numpy(), torch.cat(a).numpy()


@pytest.fixture(scope="module")
def harvested(case, live):
    """Of the whole text, its pairs counted in three parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harvest, "PAIRS_EVERY", 512)
        return harvest.harvest(*case, live, 10**6, K, seed=1)


# ---------------------------------------------------------------------------------------------------------------------
# The harvest


def test_harvest_against_all_tokens_at_once(harvested, all_tokens, live):
    (tokens, predicted, g, a), h, N = all_tokens, harvested, WINDOWS * T
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
    assert (h.input_total == np.bincount(tokens, minlength=50)).all()
    assert (h.predicted_total == np.bincount(predicted, minlength=50)).all()


def test_a_harvest_does_not_depend_on_what_memory_allows(case, harvested, live, monkeypatch):
    """One window at a time, and few columns of logits, as with very many subcomponents."""
    run, corpus = case
    monkeypatch.setattr(evaluation.Run, "batches", lambda self, windows: list(windows.split(7)))
    monkeypatch.setattr(harvest, "AT_A_TIME", 100)
    h = harvest.harvest(run, corpus, live, 10**6, K, seed=1)
    for name in ("fires", "together", "histogram_g", "input_total", "predicted_total"):
        assert (getattr(h, name) == getattr(harvested, name)).all(), name
    assert (h.input != harvested.input).nnz == 0 and (h.predicted != harvested.predicted).nnz == 0
    assert h.rms_inverse == pytest.approx(harvested.rms_inverse)
    assert torch.allclose(h.top.priority, harvested.top.priority, rtol=1e-5)
    mean_a, columns = h.sum_a / h.fires, harvest.columns_of(live, run.decomposition.C)
    parts = harvest.promoted(run, columns, mean_a, 0.5)
    monkeypatch.undo()
    for found, expected in zip(parts, harvest.promoted(run, columns, mean_a, 0.5)):
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_top_examples_are_the_best_of_every_window(harvested, all_tokens, live):
    (tokens, _, g, a), h = all_tokens, harvested
    score = np.where(g > 0, g * abs(a), -np.inf).reshape(WINDOWS, T, -1)
    for c in range(len(live)):
        best, seen = score[..., c].max(1), set()
        assert np.allclose(h.top.priority[c], np.sort(best)[::-1][:K], rtol=1e-5)
        for j in range(int(h.top.priority[c].isfinite().sum())):
            t = int(h.top.t[c, j])
            around = slice(C - t, C - t + T)  # where the window lies within the example: all of it, as it is short
            first, second = h.top.tokens[c, j, around][:2].tolist()
            window = first * 45 + second  # equal scores may come in any order
            assert best[window] == pytest.approx(float(h.top.priority[c, j]), rel=1e-5)
            assert t == score[window, :, c].argmax()
            seen.add(window)
            for kept, expected in ((h.top.tokens, tokens), (h.top.g, g[:, c]), (h.top.a, a[:, c])):
                assert np.allclose(kept[c, j, around], expected.reshape(WINDOWS, T)[window], rtol=1e-4, atol=1e-5)
                assert not kept[c, j, : C - t].any() and not kept[c, j, C - t + T :].any()
        assert len(seen) == min(K, np.isfinite(best).sum())


def position_of(h, c: int, j: int) -> int:
    """Of a random example, as the first two tokens of a window say its number."""
    t = int(h.random.t[c, j])
    first, second = h.random.tokens[c, j, C - t : C - t + 2].tolist()
    return (first * 45 + second) * T + t


def test_random_examples_fire_and_differ(harvested, all_tokens, live):
    g, h = all_tokens[2], harvested
    for c in range(len(live)):
        drawn = [position_of(h, c, j) for j in range(int(h.random.priority[c].isfinite().sum()))]
        assert len(set(drawn)) == len(drawn) == min(K, (g[:, c] > 0).sum())
        assert all(g[p, c] > 0 for p in drawn)


def test_the_reservoir_is_even_over_the_stream(case):
    """Everything fires everywhere: 12 examples of 51 in 10 passes fall evenly on 1,200 positions in several batches."""
    run, corpus = case
    run = dataclasses.replace(run, ci_fn=Gamma(*run.ci_fn.W.shape, constant=1.0))
    drawn = np.zeros(WINDOWS * T)
    for seed in range(10):
        h = harvest.harvest(run, corpus, np.arange(1, 52), 10**6, K, seed)
        for c, j in itertools.product(range(51), range(K)):
            drawn[position_of(h, c, j)] += 1
    expected = drawn.sum() / len(drawn)
    chi2 = ((drawn - expected) ** 2 / expected).sum() / len(drawn)  # mean 1, standard deviation sqrt(2 / 1200) = 0.04
    assert expected == 5.1 and 0.84 < chi2 < 1.16


def test_recall_and_pmi_against_their_definitions(harvested, all_tokens, live):
    (tokens, predicted, g, _), h, N = all_tokens, harvested, WINDOWS * T
    for counts, total, of in ((h.input, h.input_total, tokens), (h.predicted, h.predicted_total, predicted)):
        share = np.bincount(of, minlength=50) / N
        for by, c in itertools.product(("recall", "pmi"), range(len(live))):
            table = harvest.token_table(counts[c], h.fires[[c]], total, N, by)
            on, rows = g[:, c] > 0, {}
            for token in set(of[on].tolist()):
                both = int((on & (of == token)).sum())
                if by == "recall" or both >= min(5, on.sum() / 10):
                    pmi = math.log2((both / N) / (on.mean() * share[token]))
                    rows[token] = {"count": both, "recall": both / on.sum(), "pmi": pmi}
            kept = table["count"][0] > 0
            assert kept.sum() == min(harvest.TOP, len(rows))
            best = sorted((row[by] for row in rows.values()), reverse=True)
            assert np.allclose(table[by][0][kept], best[: harvest.TOP])
            for i in np.flatnonzero(kept):
                found = {name: table[name][0, i] for name in ("count", "recall", "pmi")}
                assert found == pytest.approx(rows[table["token"][0, i]])


def test_coactive_by_hand_and_by_brute_force(case, harvested, all_tokens, live):
    # Two matrices of two: 0 fires at {0, 1, 2}, 1 at {0, 1}, 2 at {2, 3}, 3 never.
    together = np.array([[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]])
    place, overlap = harvest.coactive(together, together.diagonal(), np.array([0, 0, 1, 1]), 2)
    assert place[0, :, 0].tolist() == [1, 2] and overlap[0, :, 0].tolist() == [2 / 3, 1 / 4]
    assert place[1, :, 0].tolist() == [0, -1] and (place[:, :, 1:] == -1).all() and (place[3] == -1).all()
    decomposition, h, on = case[0].decomposition, harvested, all_tokens[2] > 0
    L = decomposition.L
    matrix = np.repeat(np.arange(L), [len(c) for c in harvest.columns_of(live, decomposition.C)])
    place, overlap = harvest.coactive(h.together, h.fires, matrix, L)
    both, either = on.T.astype(int) @ on, (on[:, :, None] | on[:, None]).sum(0)
    for c, l in itertools.product(range(len(live)), range(L)):
        found = {int(i): o for i, o in zip(place[c, l], overlap[c, l]) if i >= 0}
        others = [i for i in np.flatnonzero(matrix == l) if i != c and both[c, i]]
        assert found == pytest.approx({i: both[c, i] / either[c, i] for i in others})


def test_norms_of_heads_and_promoted_tokens(case, live):
    run, _ = case
    decomposition = run.decomposition
    columns = harvest.columns_of(live, decomposition.C)
    whole, heads = harvest.norms(run, columns)
    owner = [(name, int(c)) for name, numbers in zip(decomposition.names, columns) for c in numbers]
    mean_a = np.linspace(-2, 2, len(live))
    token, logits = harvest.promoted(run, columns, mean_a, 0.5)
    for i, (name, c) in enumerate(owner):
        U, V = decomposition.U[name][:, c].detach(), decomposition.V[name][:, c].detach()
        assert whole[i] == pytest.approx(torch.linalg.matrix_norm(torch.outer(U, V)).item(), rel=1e-5)
        if ".attn." in name:
            piece = torch.outer(U[:8], V) if not name.endswith(".o") else torch.outer(U, V[:8])
            assert heads[i, 0] == pytest.approx(torch.linalg.matrix_norm(piece).item(), rel=1e-5)
            assert (heads[i] ** 2).sum() == pytest.approx(whole[i] ** 2, rel=1e-5)
        if name.endswith((".o", ".down")):
            added = (decomposition.target.embed.weight.detach() @ U) / U.norm() * mean_a[i] * 0.5
            added = (added - added.mean()).tolist()
            assert logits[i, 0].tolist() == pytest.approx(sorted(added, reverse=True)[:10], rel=1e-4, abs=1e-6)
            assert logits[i, 1].tolist() == pytest.approx(sorted(added)[:10], rel=1e-4, abs=1e-6)
            assert [added[t] for t in token[i, 0]] == pytest.approx(logits[i, 0].tolist(), rel=1e-4, abs=1e-6)
        else:
            assert not logits[i].any()


def test_rms_is_of_the_last_residual(case, harvested):
    """The unembedding reads rms_norm(x): with it and RMS(x) the logits of the target come out."""
    run, corpus = case
    seen, target = [], run.decomposition.target
    with target.blocks[-1].register_forward_hook(lambda block, args, y: seen.append(y)):
        target(torch.from_numpy(corpus.tokens["val"].reshape(WINDOWS, T).astype(np.int64)))
    assert harvested.rms_inverse == pytest.approx((1 / seen[0].square().mean(-1).sqrt()).mean().item(), rel=1e-4)


def test_prompt_masks_are_those_of_the_evaluation(case):
    run, corpus = case
    tokens = corpus.tokens["val"][:6].tolist()
    look, decomposition, x = report.look_at_prompt(run, tokens, seed=0), run.decomposition, torch.tensor([tokens])
    _, g, _ = run.importances(x)
    log_p = decomposition.target(x).log_softmax(-1)[0]
    rounded_m = torch.cat(((g > 0).float(), torch.zeros(1, 6, decomposition.L)), -1)
    rounded = run.logits(decomposition(x, rounded_m)).softmax(-1)[0].detach()
    assert look["token"].shape == look["p"].shape == (6, 4, 5) and (look["kl"][:, 0] < 1e-6).all()
    assert np.allclose(look["p"][:, 0], log_p.exp().topk(5).values.detach(), atol=1e-5)
    assert np.allclose(look["p"][:, 1], rounded.topk(5).values, atol=1e-5)
    assert (look["token"][:, 1, 0] == rounded.argmax(-1).numpy()).all()
    kl = (log_p.exp() * (log_p - rounded.log())).sum(-1)
    assert np.allclose(look["kl"][:, 1], kl.detach(), atol=1e-4)
    assert look["kl"][:, 3].mean() > look["kl"][:, 2].mean(), "masks that were searched for cost more than random ones"
    dense = np.zeros((6, 52), np.float32)
    dense[np.repeat(np.arange(6), look["n"]), look["c"]] = look["g"]
    assert (dense == g[0].numpy()).all()


# ---------------------------------------------------------------------------------------------------------------------
# The page and the labels


def unpack(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """What is in the page, by its own format and without pack's code."""
    text = path.read_text(encoding="utf-8").rpartition('id="data">')[2].partition("<")[0]
    raw = gzip.decompress(base64.b64decode(text))
    end = 8 + int.from_bytes(raw[:8], "little")
    page = json.loads(raw[8:end])
    return page, {name: np.frombuffer(raw, dtype, size, end + at) for name, (dtype, at, size) in page["arrays"].items()}


def settings(**changes) -> report.Config:
    return report.Config(**(dict(run="", tokens=10**6, examples=10, val_prompts=2) | changes))


LABEL = "a </script> label"


@pytest.fixture(scope="module")
def reported(case, live):
    """The page of the case, with a label of its subcomponent 7, and the names of all."""
    run, corpus = case
    names, labels = report.names_of(run, live), run.folder / "names.jsonl"
    labels.write_text(json.dumps({"name": names[7], "label": LABEL, "by": "Ada"}))
    return report.report(run, corpus, settings(labels=str(labels))), names


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_page_holds_the_harvest(case, reported, all_tokens, live):
    (tokens, _, g, a), (run, _), (path, _) = all_tokens, case, reported
    assert path == run.folder / "report.html"
    html = path.read_text(encoding="utf-8")
    assert html.count("</script>") == 2
    assert "://" not in html.replace("http://www.w3.org/2000/svg", ""), "no address but the name of SVG"
    page, arrays = unpack(path)
    assert page["N"] == len(tokens) and (arrays["live"] == live).all() and (arrays["fires"] == (g > 0).sum(0)).all()
    assert np.allclose(arrays["mean_g"], g.mean(0), rtol=1e-3)
    assert np.allclose(arrays["largest_a"], abs(a).max(0), rtol=1e-3)
    assert [m["live"] for m in page["matrices"]] == [len(c) for c in harvest.columns_of(live, run.decomposition.C)]
    hidden = ["</script>", "<img src=x onerror=alert(1)>", "&amp;", "😀", "␇", "⟨202E⟩", "⟨200B⟩", "שלום"]
    assert page["tokens"][:8] == hidden and page["tokens"][10] == "⏎       "
    kept = arrays["random_g"].reshape(len(live), 10, -1)[:, 0, C]
    assert (kept > 0).all(), "what fires is never rounded to 0"
    assert len(page["prompts"]) == 2 and arrays["prompt_n"].sum() == len(arrays["prompt_c"]) == len(arrays["prompt_g"])


def test_the_live_ones_are_those_of_the_evaluation(case, whole, monkeypatch):
    """To the last one, however many windows memory allows at a time; and the log has the steps of training alone."""
    run, corpus = case
    windows = evaluation.validation_windows(corpus, 20, T, 0)
    expected = evaluation.mean_importances([run.importances(windows[:, :-1])[1]])
    for found, values in zip(report.evaluated_importances(run, corpus), expected):
        assert (found == values).all()
    monkeypatch.setattr(evaluation.Run, "batches", lambda self, windows: list(windows.split(3)))
    for found, values in zip(report.evaluated_importances(run, corpus), expected):
        assert torch.allclose(found, values, rtol=1e-6)

    page, _ = unpack(whole / "report.html")
    metrics = json.loads((whole / "metrics.json").read_text())
    assert page["run"] == page["folder"] == "whole"  # the second for the command that edits a subcomponent
    assert page["metrics"] == metrics and sum(m["live"] for m in page["matrices"]) == metrics["live"]["total"]
    assert sum(m["l0"] for m in page["matrices"]) == pytest.approx(metrics["l0"]["total"])
    assert page["log"]["step"] == list(range(8)) and len(page["log"]["l0"]) == 8 and page["N"] == 64


def test_tokens_that_are_no_text():
    assert visible(b"\xe2\x80") == "\\xe2\\x80" and visible(b"a\tb\x00\x7f\r") == "a⇥b␀␡␍"
    assert visible("é שלום 😀 \xa0".encode()) == "é שלום 😀 ⟨00A0⟩"


def test_numbers_are_packed_in_the_smallest_type_that_holds_them():
    for values, dtype in (([], "uint8"), ([0, 255], "uint8"), ([256], "uint16"), ([2**16], "uint32"), ([-1], "int8")):
        assert smallest(np.array(values, int)).dtype == dtype
    for values, dtype in (([-1, 127], "int8"), ([-1, 128], "int16"), ([-1, 70_000], "int32")):
        packed = smallest(np.array(values))
        assert packed.dtype == dtype and packed.tolist() == values
    x = np.array([1 / 3, -2e5, 0, 1e-9])
    assert smallest(x).dtype == "float32" and np.allclose(smallest(x), x, rtol=2.0**-12, atol=0)


def test_labels_go_out_and_come_back(case, reported, tmp_path):
    (run, corpus), (path, names) = case, reported
    rows = rows_of(path.parent / "labels.jsonl")
    assert [row["name"] for row in rows] == names and names[0] == "0.attn.q:1", "number 0 is dead"
    assert [row["label"] for row in rows] == [LABEL if name == names[7] else "" for name in names]
    assert rows[0]["matrix"] == "blocks.0.attn.q" and 0 < rows[0]["density"] < 1
    assert all("«" in text for row in rows for text in row["top"] + row["random"])
    assert {"input_by_recall", "input_by_pmi", "predicted_by_recall", "predicted_by_pmi"} <= set(rows[0])
    writes = [row["name"].split(":")[0].endswith((".o", ".down")) for row in rows]
    assert [("promotes" in row) for row in rows] == writes
    assert unpack(path)[0]["labels"] == {"7": LABEL}
    assert rows[7]["by"] == "Ada", "what else somebody wrote is kept"

    rows[3]["label"] = "another"
    labels = tmp_path / "labels.jsonl"
    labels.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")  # as some editors write it
    report.report(run, corpus, settings(labels=str(labels), out=str(tmp_path)))
    assert unpack(tmp_path / "report.html")[0]["labels"] == {"3": "another", "7": LABEL}
    assert rows_of(labels) == rows


def test_nothing_written_by_hand_is_lost(case, reported, tmp_path, monkeypatch):
    """Neither labels that --labels does not bring, nor a page of somebody else, nor what is written meanwhile."""
    (run, corpus), (_, names) = case, reported
    labels, other, page = tmp_path / "labels.jsonl", tmp_path / "other.jsonl", tmp_path / "report.html"
    short = settings(tokens=8, val_prompts=0, out=str(tmp_path))

    def refused(file: Path, text: str, message: str, **changes) -> None:
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=message):
            report.report(run, corpus, dataclasses.replace(short, **changes))
        assert file.read_bytes() == text.encode("latin-1")

    def row(**said) -> str:
        return json.dumps({"name": names[0]} | said)

    with monkeypatch.context() as patch:
        patch.setattr(harvest, "harvest", lambda *args: pytest.fail("it is said before the work"))
        other.write_text(json.dumps({"name": names[1], "label": "b"}))
        for said in ({"label": "a"}, {"label": "", "why": "a note"}):
            refused(labels, row(**said), "holds labels: give --labels=")
            refused(labels, row(**said), "holds labels: give --labels=", labels=str(other))
        refused(labels, row(label="a") + "\n" + row(label="b"), "line 2: .* has a label already", labels=str(labels))
        refused(labels, row(label="?").replace("?", "é"), "is not UTF-8", labels=str(labels))
        refused(labels, "name;label\n" + names[0] + ";a\n", "holds labels: give --labels=")
        labels.write_text(row(label="  "))  # is none
        refused(page, "<h1>My notes</h1>", "is no report")
        refused(
            page, (Path(report.__file__).parent / "report.html").read_text().encode().decode("latin-1"), "is no report"
        )
        page.unlink()

    def meanwhile(*args):
        labels.write_text(row(label="written meanwhile"))
        return harvested_now(*args)

    harvested_now = harvest.harvest
    monkeypatch.setattr(harvest, "harvest", meanwhile)
    with pytest.raises(UserError, match="holds labels"):
        report.report(run, corpus, short)
    assert labels.read_text() == row(label="written meanwhile") and not page.exists()


def cells(rows: list[list[str]], delimiter: str) -> str:
    """What a spreadsheet saves: a line each, with the ends of Windows, in quotes where they are needed."""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue()


HAND = {"label": 'a; "b", é\u2028c', "by": "Ada"}  # what a person wrote of 0.mlp.up:3; 0.mlp.up:4 is still to do
LINES = [{"name": "0.mlp.up:3", "density": 0.5, "top": ["x,\ny"]} | HAND, {"name": "0.mlp.up:4", "label": "", "by": ""}]
TABLE = [["name", "top", "label", "by"], ["0.mlp.up:3", "['x,\ny']", *HAND.values()], ["0.mlp.up:4", "", "", ""]]
JSON = "".join(json.dumps(row) + "\n" for row in LINES)
SAVED = {
    "as it was": JSON,
    "byte order mark, lines of Windows": "\ufeff" + JSON.replace("\n", "\r\n"),
    "blank lines": "\n" + JSON.replace("\n", "\n \n\n"),
    "compact": "".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n" for row in LINES),
    "null": JSON.replace('"label": ""', '"label": null'),
    "twice": JSON + JSON.replace(HAND["by"], "Ada"),
} | {
    f"{what} {delimiter!r}": "\ufeff" + cells(rows, delimiter)
    for delimiter in ",;\t"
    for what, rows in (
        ("cells", [[json.dumps(row)] for row in LINES]), ("table", TABLE),
        ("wide table", [[*row, "", ""] for row in TABLE] + [[""] * 6]),
    )
}  # fmt: skip


@pytest.mark.parametrize("how", SAVED)
def test_labels_of_other_tools_are_read(tmp_path, how):
    path = tmp_path / "labels"
    path.write_bytes(SAVED[how].encode())
    assert report.read_labels(path) == {"0.mlp.up:3": HAND}


NO_LABELS = [
    ('{"name": "a", "label": 3}', "line 1 is not"),
    ('{"name": "a", "label": 0}', "line 1 is not"),
    ('{"name": "a", "label": ["x"]}', "line 1 is not"),
    ('\r\n{"name": 3, "label": "x"}', "line 2 is not"),
    ('{"name": "a"}', "line 1 is not"),
    ('["a", "x"]', "line 1 is not"),
    (json.dumps(LINES, indent=2), "line 1 is not"),
    ("[" * 10**5, "line 1 is not"),
    ('{"name": "a", "label": "\\ud83d"}', "line 1 is not"),  # half an emoji, that no file can hold
    (JSON.encode("utf-16"), "is not UTF-8"),
    (JSON.encode("utf-16-le"), "line 1 is not"),
    (json.dumps({"name": "a", "label": "é"}, ensure_ascii=False).encode("latin-1"), "is not UTF-8"),
    ("name,label\na,x\nb,hello, world\n", "line 3 is not"),  # two cells where there is one column
    ("subcomponent,meaning\na,x\n", 'line 1 is not {"name": "...", "label": "..."}, and the file is no table with'),
    ('{"name": "a", "label": "x"}\n{"name": "a", "label": "y"}', "line 2: a has a label already"),
    ("name\tlabel\na\tx\na\ty\n", "line 3: a has a label already"),
]


@pytest.mark.parametrize("text, message", NO_LABELS, ids=[str(text)[:30] for text, _ in NO_LABELS])
def test_what_is_no_labels_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "labels"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as refused:
        report.read_labels(path)
    assert str(refused.value).startswith(f"labels={path}") and message in str(refused.value)


def test_labels_of_what_is_not_live_are_kept(case, reported, tmp_path, capsys):
    """0.attn.q:0 never fires. A label of it, in a table, is neither shown nor lost, and a second page keeps it too."""
    (run, corpus), (_, names) = case, reported
    labels = tmp_path / "labels.jsonl"
    labels.write_text(f"name;label;by\n0.attn.q:0;gone;Ada\n{names[2]};here;\n")
    short = settings(tokens=8, val_prompts=0, out=str(tmp_path), labels=str(labels))
    for _ in range(2):
        report.report(run, corpus, short)
        assert f"labels: 1 of subcomponents that are not live are kept in {labels}" in capsys.readouterr().out
        rows = rows_of(labels)
        assert [row["name"] for row in rows] == [*names, "0.attn.q:0"] and rows[2]["label"] == "here"
        assert rows[-1] == {"name": "0.attn.q:0", "label": "gone", "by": "Ada"}
        assert unpack(tmp_path / "report.html")[0]["labels"] == {"2": "here"}
    with pytest.raises(UserError, match="holds labels: give --labels="):
        report.report(run, corpus, dataclasses.replace(short, labels=""))


def test_files_of_another_training_are_left_out(case, live, tmp_path, capsys):
    """And broken ones; each with a line. Those of this training are shown."""
    run, _ = case
    run = dataclasses.replace(run, folder=tmp_path)
    clusters = {"run_mark": run.mark, "alpha": 1, "tau": 0.1, "components": [
        {"rank": 1, "fill": 1.0, "frequency": 0.5, "members": {"blocks.0.attn.q": [1]}}]}  # fmt: skip
    metrics = {"run_mark": run.mark, "constant_r": {}, "adv_steps": [], "kl": {}}
    mean_g = torch.zeros(52).index_fill(0, torch.from_numpy(live), 1.0)

    def page(clusters: str, metrics: str) -> tuple[tuple, str]:
        (tmp_path / "clusters.json").write_text(clusters)
        (tmp_path / "metrics.json").write_text(metrics)
        found, arrays = report.of_the_run(run, mean_g, mean_g)
        return (found["clusters"] and found["clusters"]["alpha"], found["metrics"], arrays["cluster"].max()), printed()

    def printed() -> list[str]:
        return capsys.readouterr().out.splitlines()

    assert page(json.dumps(clusters), json.dumps(metrics)) == ((1, metrics, 0), [])
    other = {"run_mark": "0" * 16}
    found, lines = page(json.dumps(clusters | other), json.dumps(metrics | other))
    assert found == (None, None, -1) and lines == [
        f"report: the page is without {name}: {tmp_path / name} is of an earlier training or code than the checkpoint "
        f"beside it: run {script} again"
        for name, script in (("metrics.json", "eval.py"), ("clusters.json", "cluster.py"))
    ]  # fmt: skip
    for broken in ("", "{", "[]", "3", "{}", json.dumps({"components": 3, "kl": []})):
        found, lines = page(broken, broken)
        assert found == (None, None, -1) and len(lines) == 2


def test_rules_of_this_training_are_on_the_page(case, live, tmp_path, capsys):
    run, _ = case
    run = dataclasses.replace(run, folder=tmp_path)
    names, mean_g = report.names_of(run, live), torch.zeros(52).index_fill(0, torch.from_numpy(live), 1.0)
    row = {"rule": "token", "values": list("abcdef"), "n_values": 9, "score": 0.75, "null_95": 0.125}
    found = {"run_mark": run.mark, "share_explained": 0.5, "mean_score": 0.25, "subcomponents": {names[0]: row}}
    rules = lambda: report.of_the_run(run, mean_g, mean_g)[0]["rules"]
    assert rules() is None
    (tmp_path / "rules.json").write_text(json.dumps(found))
    assert rules() == {"share": 0.5, "score": 0.25, "of": {names[0]: ["token: a, b, c, d, …", 0.75, 0.125]}}
    assert capsys.readouterr().out == ""
    other = json.dumps(found | {"run_mark": "0" * 16})
    for text, why in ((other, "is of an earlier training"), ("[]", "is not whole"), ("{", "is not a whole"),
                      (json.dumps(found | {"subcomponents": 3}), "is not a whole rules.json")):  # fmt: skip
        (tmp_path / "rules.json").write_text(text)
        assert rules() is None and why.replace("not whole", "not a whole") in capsys.readouterr().out


@pytest.fixture
def in_home(home, whole):
    """Beside `whole`: `bare-run`, its checkpoint alone, `dead-run`, whose every z is below 0, and labels."""
    if not (home / "dead-run").exists():
        checkpoint = torch.load(whole / "checkpoint.pt", weights_only=True)
        for folder in ("bare-run", "dead-run"):
            (home / folder).mkdir()
            torch.save(checkpoint, home / folder / "checkpoint.pt")
            checkpoint["ci_fn"]["out.bias"].fill_(-1e6)
        (home / "nobody.jsonl").write_text('{"name": "7.mlp.up:3", "label": "x"}\n')
        (home / "case.jsonl").write_text('{"name": "1.MLP.Up:3", "label": "x"}\n')
        (home / "torn.jsonl").write_text('{"name": "0.mlp.up:3", "la')
    return home


BAD = [
    (["nowhere"], "run folder 'nowhere' does not exist"),
    (["text"], "holds no checkpoint.pt"),
    (["target"], "checkpoint of kind 'target'"),
    (["dead-run"], "dead-run: no live subcomponent: none of 72 has a mean g above 1e-06 over 32 validation tokens"),
    (["bare-run", "--prompt=x", "--prompt=" + "def f(self): " * 16], "tokens: the context is 16"),
    (["bare-run", "--prompt="], "prompt='' has no tokens"),
    (["bare-run", "--labels=nobody.jsonl"], "'7.mlp.up:3' is no subcomponent of this run; names are like"),
    (["bare-run", "--labels=case.jsonl"], "'1.MLP.Up:3' is no subcomponent of this run; names are like 1.mlp.up:3"),
    (["bare-run", "--labels=torn.jsonl"], "labels=torn.jsonl: line 1 is not"),
    (["bare-run", "--labels=none.jsonl"], "labels=none.jsonl does not exist"),
    (["bare-run", "--tokens=0"], "tokens=0"),
    (["bare-run", "--val_prompts=-1"], "val_prompts=-1"),
    (["bare-run", "--examples=300"], "examples=300: at most 255"),
    (["bare-run", "--promt=x"], "did you mean --prompt"),
]


@pytest.mark.parametrize("args, message", BAD, ids=[" ".join(args)[:40] for args, _ in BAD])
def test_bad_input_ends_in_one_line(in_home, args, message):
    assert message in one_line(report, *args)


@pytest.mark.count
def test_command_with_two_prompts_and_a_folder(in_home, monkeypatch, capsys):
    flags = ["--tokens=200", "--prompt=x = (", "--prompt=self", "--val_prompts=1", "--out=seen/here"]
    monkeypatch.setattr(sys, "argv", ["report.py", "bare-run", *flags])
    run_script(report.main, report.Config, report.__doc__)
    assert "open seen/here/report.html" in capsys.readouterr().out
    page, arrays = unpack(in_home / "seen/here/report.html")
    assert [prompt["own"] for prompt in page["prompts"]] == [True, True, False]
    assert page["metrics"] is None and page["N"] == 208
    assert "".join(page["tokens"][t] for t in page["prompts"][0]["tokens"]) == "x = ("


def test_a_run_is_opened_with_the_tokens_it_was_made_of(in_home, monkeypatch):
    checkpoint = torch.load(in_home / "bare-run/checkpoint.pt", weights_only=True)
    checkpoint["config"]["max_tokens"], checkpoint["tokens_folder"] = 1234, "gone"
    (in_home / "limited").mkdir()
    torch.save(checkpoint, in_home / "limited/checkpoint.pt")
    asked, load = [], data.load
    monkeypatch.setattr(data, "load", lambda dataset, folder, n=0, own=None: asked.append(n) or load(dataset, folder))
    evaluation.open_run("limited", "", "cpu")
    assert asked == [1234]


def test_decompose_ends_with_the_report(in_home, whole, monkeypatch, capsys):
    assert unpack(whole / "report.html")[0]["N"] == 64
    (in_home / "ends-with-report").mkdir()
    shutil.copy(whole / "checkpoint.pt", "ends-with-report")
    monkeypatch.setattr(decompose, "train", lambda config: Path("ends-with-report"))
    for live, tokens in ((3, 0), (0, 64), (3, 64)):
        monkeypatch.setattr(evaluation, "report", lambda *args: {"live": {"total": live}})
        decompose.main(config(report_tokens=tokens))
        made = bool(live and tokens)  # report_tokens=0 makes none, and without a live subcomponent there is none
        assert Path("ends-with-report/report.html").exists() == made
        assert ("open ends-with-report/report.html" in capsys.readouterr().out) == made


# ---------------------------------------------------------------------------------------------------------------------
# In a real browser


@pytest.fixture
def reader(browser, reported):
    path, names = reported
    return Reader(browser, path), names


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
    page.go(names[7])
    assert page.js("document.getElementById('label').textContent") == LABEL
    page.press("o")
    page.opened(page.js("D.run"))
    page.quiet()


STRAY = ["%", "%E0%A4%A", "9.mlp.up:1", "list:none", "prompt:9", "prompt:0@x", "__proto__"]


def test_an_address_that_is_nothing_shows_the_overview(reader):
    """Malformed, or not in this report: at the opening of the page and later, where every key still works."""
    page, names = reader
    for stray in STRAY:
        page.open(stray)
        page.opened(page.js("D.run"))
        shown = stray if "%" in stray else urllib.parse.unquote(stray)
        assert f"nothing by the name of “{shown}”" in page.text and "Mean causal importance" in page.text, stray
        page.press("j")
        page.opened(names[0])
        page.chrome.execute_script(f"location.hash = {json.dumps(stray)}")
        page.wait("document.getElementById('missing')")
    page.press("o")
    page.wait("!document.getElementById('missing')")
    page.open("prompt:1@99")  # of a prompt that is there: its last position
    page.opened("Prompts")
    page.quiet()


def test_the_table_of_the_evaluation_is_shown(browser, whole):
    page, m = Reader(browser, whole / "report.html"), json.loads((whole / "metrics.json").read_text())
    rows = page.js("[...document.querySelectorAll('tr')].map(row => [...row.children].map(cell => cell.textContent))")
    rows = {cells[0]: cells[1:] for cells in rows}
    assert rows["target"][0] == f"{m['ce']['target']:.4f}"
    for mode in evaluation.MODES:
        assert rows[mode][:2] == [f"{m['ce'][mode]:.4f}", f"{m['kl'][mode]:.4f}"]
    assert m["adv_steps"] == [20, 80]
    for n in m["adv_steps"]:
        kl = [m["kl"][f"adversarial_{n}"], m["kl"][f"adversarial_{n}_largest"]]
        assert rows[f"adversarial_{n}"][1:3] == [f"{value:.4f}" for value in kl]
    assert page.js("document.querySelectorAll('svg.chart').length") == 2 + 4
    page.quiet()


def test_unpleasant_tokens_are_shown_letter_by_letter(reader):
    page, names = reader
    shown, seen = {visible(token.encode()) for token in NASTY}, set()
    for name in names[:12]:
        page.go(name)
        tokens = page.js("[...document.querySelectorAll('.text span')].map(span => span.textContent)")
        assert set(tokens) <= shown | {f"w{i}" for i in range(49)}
        plain = "getComputedStyle(span).unicodeBidi === 'isolate' && !span.children.length"
        assert page.js(f"[...document.querySelectorAll('.text span')].every(span => {plain})")
        seen |= set(tokens)
    assert shown <= seen and {"</script>", "שלום", "␇", "⟨202E⟩", "😀"} <= seen
    page.quiet()


def test_both_numbers_of_a_token_under_the_pointer(reader, all_tokens):
    from selenium.webdriver import ActionChains

    (page, names), (_, _, g, a) = reader, all_tokens
    page.go(names[0])
    best = int(np.where(g[:, 0] > 0, g[:, 0] * abs(a[:, 0]), -1).argmax())
    ActionChains(page.chrome).move_to_element(page.find(".text .centre")).perform()
    page.wait("!document.getElementById('tip').hidden")
    said = page.find("#tip").text.replace("−", "-").split()
    assert said[0] == "g" and float(said[1]) == pytest.approx(float(g[best, 0]), abs=0.006)
    off = 0.005 + float(abs(a[:, 0]).max()) / 127
    assert said[3] == "activation" and float(said[4]) == pytest.approx(float(a[best, 0]), abs=off)
    assert page.find(".example").get_attribute("aria-label").startswith("g ")


def test_prompts_and_narrow_and_dark(reader):
    from selenium.webdriver.common.keys import Keys

    page, _ = reader
    page.press("p")
    page.opened("Prompts")
    page.press(Keys.ARROW_LEFT)
    page.wait("location.hash === '#prompt:0@6'")
    assert all(mode in page.text for mode in report.MODES) and "At position 6" in page.text
    chip = page.js("document.querySelector('a.chip').hash")
    page.find("a.chip").click()
    page.opened(chip[1:])
    page.chrome.back()
    page.opened("Prompts")
    assert page.js("location.hash") == "#prompt:0@6"
    light = page.js("getComputedStyle(document.body).backgroundColor")
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert page.js("getComputedStyle(document.body).backgroundColor") != light
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    for view in ("", "list", "prompt:0", chip[1:]):
        page.chrome.execute_script(f"location.hash = {json.dumps(view)}")
        page.wait(f"shownHash === {json.dumps(view)}")
        assert page.js("document.documentElement.scrollWidth") <= 360, f"{view!r} is wider than the phone"
    page.quiet()
    page.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
