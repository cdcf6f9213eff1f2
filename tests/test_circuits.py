"""Circuits: behaviours by brute force, the rule for a price, graph files against their schema, the page in use."""

import base64
import dataclasses
import gzip
import json
import re
import shutil

import numpy as np
import pytest
import torch
from reader import Reader
from test_attribution import BELOW, made
from test_report import Gamma
from tiny import one_line

import cost
import data
import decompose
import eval as evaluation
import tokenise
from flags import UserError
from studies import behaviours, circuits, importances, report
from studies.behaviours import (
    Group,
    brackets,
    chosen_groups,
    groups_of,
    hidden_without_attention,
    induction,
    prompts_of,
)
from studies.circuits import Config, delta_share, graph_of, influences, spearman

T, WINDOWS = 8, 40
WORDS = ["(", ")", "[", "]", "{", "}", "</script>", '"', "\n   ", "שלום", " self"]
WORDS += list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM")  # a text of single bytes can be encoded
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    monkeypatch.setattr(cost, "counted", lambda make, **options: [cost.Cost(0, 10**6, 0, 0)])


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A run of random weights whose text is the target's own, where it is sure of itself: Run, Corpus."""
    f = made(BELOW).float()
    x = torch.randint(0, 49, (WINDOWS, 1), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for _ in range(T - 1):  # greedy text, so that the target is right
            x = torch.cat((x, (f.f(x)[:, -1] @ f.target.unembedding.T).argmax(-1, keepdim=True)), 1)
    text = x.numpy().astype(np.uint16).ravel()
    encoding = tokenise.bpe_encoding([w.encode() for w in WORDS])
    corpus = data.Corpus("own", {"train": text, "val": text}, encoding, "")
    gamma = Gamma(sum(V.shape[0] for V in f.V.values()), sum(f.C.values()))
    settings = dataclasses.asdict(decompose.Config(T=T, eval_windows=8, out="own"))
    return evaluation.Run(tmp_path_factory.mktemp("own"), settings, {}, f, gamma), corpus


def config(run, **changes) -> Config:
    usual = dict(run=str(run.folder), steps=3, windows=16, groups=1, prompts=2, length=4, coefficients="0.01,1")
    return Config(**usual | dict(attribution_windows=4) | changes)


@pytest.fixture(scope="module")
def written(case):
    """The study, then the report, of the case: the folder of the run."""
    run, corpus = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "counted", lambda make, **options: [cost.Cost(0, 10**6, 0, 0)])
        patch.setattr(circuits, "open_run", lambda *args, **options: case)
        patch.setattr(behaviours, "SURE", 0.02)
        patch.setattr(importances, "DRAWS", 2)
        patch.setattr(importances, "JUDGES", {"adversarial": (2, 1.0, 1), "adversarial_20": (3, 0.1, 2)})
        (run.folder / "checkpoint.pt").touch()
        report.report(run, corpus, report.Config(str(run.folder), tokens=64, examples=2, val_prompts=1))
        circuits.main(config(run))
        report.report(run, corpus, report.Config(str(run.folder), tokens=64, examples=2, val_prompts=1))
    return run.folder


# ---------------------------------------------------------------------------------------------------------------------
# Behaviours


def test_no_attention_at_a_position_is_no_attention_anywhere(case):
    run, _ = case
    x = torch.randint(0, 49, (2, T), generator=torch.Generator().manual_seed(1))
    found = hidden_without_attention(run, x)
    for t in range(T):  # at t alone, by hand

        def silent_at_t(module, args, y, t=t):
            y = y.clone()
            y[:, t] = 0
            return y

        hooks = [block.attn.register_forward_hook(silent_at_t) for block in run.decomposition.target.blocks]
        close(found[:, t], run.decomposition.f(x)[:, t].detach())
        for hook in hooks:
            hook.remove()
    assert not torch.equal(found, run.decomposition.f(x))  # and nothing stays behind


def test_groups_by_hand(case, monkeypatch):
    run, corpus = case
    monkeypatch.setattr(behaviours, "SURE", 0.1)
    windows, expected = corpus.batch("val", 0, 12, T, 0), {}
    for window in windows:
        p = run.logits(run.decomposition.f(window[None, :-1]))[0].softmax(-1)
        without = run.logits(hidden_without_attention(run, window[None, :-1]))[0].softmax(-1)
        for t in range(T):
            y = int(window[t + 1])
            if int(p[t].argmax()) == y and p[t, y] >= 0.1:
                expected.setdefault((int(window[t]), y), []).append((p[t, y].item(), without[t, y].item()))
    groups = groups_of(run, windows)
    assert {(g.current, g.predicted): g.n for g in groups} == {pair: len(of) for pair, of in expected.items()}
    assert len(groups) > 3 and [g.n for g in groups] == sorted((g.n for g in groups), reverse=True)
    for g in groups:
        p, without = map(np.mean, zip(*expected[g.current, g.predicted]))
        assert g.p == pytest.approx(p, rel=1e-5) and g.p_without == pytest.approx(without, rel=1e-5)
        assert g.kind == ("contextual" if without <= p / 2 else "bigram")


def test_groups_are_chosen_by_count_and_no_token_twice():
    of = [Group(1, 2, 9, 0.8, 0.1), Group(3, 2, 8, 0.8, 0.1), Group(1, 5, 7, 0.8, 0.1), Group(4, 6, 6, 0.8, 0.1)]
    of += [Group(4, 7, 5, 0.8, 0.8), Group(8, 9, 4, 0.8, 0.8)]
    assert chosen_groups(of, 2) == [of[0], of[3], of[5]]


def test_prompts_are_cut_and_still_right(case, monkeypatch):
    run, corpus = case
    monkeypatch.setattr(behaviours, "SURE", 0.02)
    windows = corpus.batch("val", 1, 16, T, 0)
    prompts = [p for g in groups_of(run, windows)[:6] for p in prompts_of(run, g, windows, 4, 3)]
    assert prompts and len({tuple(p.tokens) for p in prompts}) == len(prompts)
    for p in prompts:
        q = run.logits(run.decomposition.f(torch.tensor([p.tokens]))[0, -1]).softmax(-1)
        assert len(p.tokens) == 4 and int(q.argmax()) == p.y and q.max().item() == pytest.approx(p.p)
        assert any([*p.tokens, p.y] == w[i : i + 5] for w in windows.tolist() for i in range(T - 3))


def test_brackets_and_induction_of_a_target_that_has_neither(case):
    run, corpus = case
    first, second = induction(run, corpus.batch("val", 0, 16, T, 0), 0, sequences=256)
    assert abs(first - second) < 1.0
    ids = [WORDS.index(w) for w in "()[]{}"]
    windows = torch.tensor([[ids[0], 20, ids[1]], [ids[2], ids[0], ids[3]], [ids[4], 20, ids[5]]])
    found = brackets(run, corpus, windows)  # the second closes what is not the last to open
    assert found["pairs"] == 4 and 0 <= found["moved"] <= 1
    gaps = []
    for k in (0, 4):
        for j in {0, 2, 4} - {k}:
            before, after = run.logits(run.decomposition.f(torch.tensor([[ids[k], 20], [ids[j], 20]]))[:, -1])
            gaps.append(((before - after)[ids[k + 1]] - (before - after)[ids[j + 1]]).item())
    assert found["mean"] == pytest.approx(np.mean(gaps), rel=1e-4)
    assert brackets(run, corpus, torch.tensor([[20, 21]])) is None


# ---------------------------------------------------------------------------------------------------------------------
# One circuit


def test_the_highest_price_that_keeps_half_is_chosen():
    p = torch.tensor([[0.9, 0.5, 0.1], [0.3, 0.2, 0.35], [0.9, 0.1, 0.8]])
    assert circuits.chosen_price({"adversarial": p}, torch.tensor([0.8, 0.8, 0.8])).tolist() == [1, 2, 2]


def test_spearman_is_of_ranks():
    a = torch.tensor([1.0, 5, 2, 9])
    assert spearman(a, a.exp()) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)
    assert spearman(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 3, 2])) == pytest.approx(0.5)
    assert spearman(a[:2], a[:2]) is None


@pytest.fixture(scope="module")
def graph(case):
    run, corpus = case
    x = torch.tensor([3, 7, 12, 20])
    nodes = torch.cartesian_prod(torch.arange(4), torch.arange(0, 52, 3))
    return graph_of(run, x, 5, nodes)


def test_influences_go_back_to_embeddings_and_deltas(graph):
    """In a graph of every node they add up to 1 over what nothing drives; a dropped node has none."""
    N = len(graph.nodes)
    keep = torch.ones(N, dtype=torch.bool)
    found = influences(graph, keep)
    driven = graph.weight[:N].abs().sum(1) > 0
    assert found.min() >= 0 and found.max() <= 1 + 1e-5
    assert found[N:].sum() + found[:N][~driven].sum() == pytest.approx(1, rel=1e-4)
    keep[::2] = False
    fewer = influences(graph, keep)
    assert (fewer[:N][~keep] == 0).all() and fewer[N:].sum() == pytest.approx(1, rel=1e-4)
    assert 0 < delta_share(graph, keep, 12) < 1


def test_columns_of_a_node_are_three_different_numbers(case, graph):
    run, _ = case
    hidden = run.decomposition.f(torch.tensor([graph.tokens]))[0, -1]
    E = run.unembedding
    for n in (0, 10, len(graph.nodes) - 1):
        m = torch.ones(1, 4, 52 + 12)
        m[0, *graph.nodes[n]] = 0
        cut = run.decomposition(torch.tensor([graph.tokens]), m)[0, -1]
        expected = ((cut - hidden) @ (E[5] - E.mean(0))).item()
        assert graph.ablation[n].item() == pytest.approx(expected, abs=1e-4)
    assert not torch.allclose(-graph.total, graph.ablation)


# ---------------------------------------------------------------------------------------------------------------------
# Graph files

REQUIRED = {
    "": {"metadata", "qParams", "nodes", "links"},
    "metadata": {"slug", "scan", "prompt_tokens", "prompt"},
    "node": {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"},
    "link": {"source", "target", "weight"},
}
VIEWER = {"transcoder_list", "node_threshold", "schema_version"}  # what circuit-tracer's models ask for besides


def check(graph: dict) -> None:
    """The required lists of Neuronpedia's schema 1.0.0, and what circuit-tracer's viewer trips over."""
    assert REQUIRED[""] <= graph.keys() and REQUIRED["metadata"] | VIEWER <= graph["metadata"].keys()
    assert not graph["metadata"]["scan"].startswith("custom-")
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(ids) == len(set(ids)) and len(graph["metadata"]["prompt_tokens"]) > 0
    for node in graph["nodes"]:
        assert REQUIRED["node"] <= node.keys() and isinstance(node["layer"], str)
        assert node["layer"] == "E" or node["layer"].isdecimal()
        assert 0 <= node["ctx_idx"] < len(graph["metadata"]["prompt_tokens"]) and 0 <= node["influence"] <= 1
        if node["feature_type"] == "logit":
            assert re.fullmatch(r'Output "[^"]*" \(p=\d\.\d{3}\)', node["clerp"])
        if node["feature_type"] == "mlp reconstruction error":
            assert node["feature"] < 0
    for link in graph["links"]:
        assert REQUIRED["link"] <= link.keys() and {link["source"], link["target"]} <= set(ids) and link["weight"] != 0


def test_graph_files_are_of_the_format(written):
    files = sorted((written / "circuits").glob("graph-[0-9]*.json"))
    assert files
    metadata = json.loads((written / "circuits/graph-metadata.json").read_text())["graphs"]
    for file, known in zip(files, metadata):
        graph = json.loads(file.read_text())
        check(graph)
        assert graph["metadata"] == known and known["slug"] == file.stem
        kinds = [node["feature_type"] for node in graph["nodes"]]
        assert kinds.count("embedding") == len(known["prompt_tokens"]) == 4 and "logit" in kinds
        assert [node["is_target_logit"] for node in graph["nodes"] if node["feature_type"] == "logit"][0]


def test_links_are_the_edges(case, graph):
    run, corpus = case
    g = (torch.arange(len(graph.nodes)) % 3 > 0).float()
    file = circuits.graph_json(run, corpus, graph, g, {"0.attn.q:0": 'a "name"'}, "x")
    check(file)
    rows = torch.cat((g > 0, torch.ones(len(graph.outputs), dtype=torch.bool)))
    columns = torch.cat((g > 0, torch.ones(graph.weight.shape[1] - len(g), dtype=torch.bool)))
    kept = graph.weight[rows][:, columns]
    assert len(file["links"]) == int((kept != 0).sum())
    assert sum(link["weight"] for link in file["links"]) == pytest.approx(kept.sum().item(), rel=1e-3, abs=1e-3)
    assert json.loads(json.dumps(file)) == file


# ---------------------------------------------------------------------------------------------------------------------
# The study


def test_the_study_writes_what_it_says(case, written):
    run, _ = case
    found = json.loads((written / "circuits/circuits.json").read_text())
    assert found["run_mark"] == run.mark and found["prices"] == [0.01, 1.0]
    P = len(found["prompts"])
    for name in circuits.STYLES:
        for values in found["scores"][name].values():
            assert np.array(values).shape == (P, 1 if name == "gamma" else 2)
    scores = found["scores"]
    for name in ("rounded", "gradient", "random"):  # at equal node count
        assert scores[name]["nodes"] == scores["adversarial"]["nodes"]
    for prompt in found["prompts"]:
        assert prompt["nodes"] == sum(prompt["per_matrix"].values()) and len(prompt["strongest"]) <= 10
    for name in ("circuits.html", "sizes.png", "graph-1.png", "importances.pt"):
        assert (written / "circuits" / name).stat().st_size > 1000


def test_the_same_settings_are_not_fitted_again(case, written, monkeypatch, capsys):
    run, corpus = case
    monkeypatch.setattr(behaviours, "SURE", 0.02)
    _, prompts = circuits.behaviours(run, corpus, config(run))
    path = written / "circuits/importances.pt"
    monkeypatch.setattr(circuits, "fit", lambda *args: pytest.fail("fitted again"))
    again = circuits.fitted(run, prompts, config(run), path)
    assert "as fitted before" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(cost, "counted", lambda make, **options: [cost.Cost(0, 10**6, 0, 0)])
    anew = circuits.fit(run, prompts, config(run))
    assert all(torch.equal(again.g[v], anew.g[v]) for v in circuits.VARIANTS)
    monkeypatch.setattr(circuits, "fit", lambda *args: anew)
    circuits.fitted(run, prompts, config(run, steps=2), written / "other.pt")
    assert "as fitted before" not in capsys.readouterr().out


def test_the_loss_of_the_whole_prediction_fits_other_importances(case):
    run, corpus = case
    prompts = [behaviours.Prompt([3, 7, 12, 20], 5, 0.5, "own")]
    of_token, of_all = (circuits.fit(run, prompts, config(run, loss=loss)) for loss in ("ce", "kl"))
    for variant in circuits.VARIANTS:
        assert of_all.g[variant].shape == (1, 2, 4, 52)
        assert (of_all.g[variant] != of_token.g[variant]).any()
        assert not (of_all.g[variant] * (of_all.z <= 0)[:, None]).any()


def test_what_drives_what_is_on_the_report(case, written):
    run, _ = case
    found = json.loads((written / "attributions.json").read_text())
    assert found["run_mark"] == run.mark
    for name, of in found["subcomponents"].items():
        for other, value in of["driven_by"]:
            assert other in found["subcomponents"] and value != 0
        values = [abs(v) for _, v in of["drives"]]
        assert values == sorted(values, reverse=True) and len(values) <= 10
    packed = gzip.decompress(
        base64.b64decode((written / "report.html").read_text().rpartition('id="data">')[2].split("<")[0])
    )
    page = json.loads(packed[8 : 8 + int.from_bytes(packed[:8], "little")])
    assert page["attributed"] == 4


def test_attributions_that_do_not_fit_are_left_out_with_a_line(case, tmp_path, capsys):
    run, names = dataclasses.replace(case[0], folder=tmp_path), ["0.attn.q:0"]
    read = lambda: report.beside(run, "attributions.json", lambda: report.read_attributions(run, names))
    assert read() is None
    of = {"0.attn.q:0": {"driven_by": [], "drives": []}}
    good = {"run_mark": run.mark, "windows": 4, "subcomponents": of}
    (tmp_path / "attributions.json").write_text(json.dumps(good))
    assert read()[0] == 4 and capsys.readouterr().out == ""
    for bad, why in (
        (good | {"run_mark": "x"}, "is of an earlier training"),
        (good | {"subcomponents": {}}, "is not a whole"),
        ({"run_mark": run.mark}, "is not a whole"),
    ):
        (tmp_path / "attributions.json").write_text(json.dumps(bad))
        assert read() is None and why in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("text, token, message", [
    ("w" * 9, "", "has 9 tokens: the context is 8"),
    ("(", "wx", "is 2 tokens: it must be one"),
    ("(", None, "the target says"),
])  # fmt: skip
def test_a_prompt_that_cannot_be_asked_about(case, text, token, message):
    run, corpus = case
    if token is None:  # what the target would not say
        p = run.logits(run.decomposition.f(torch.tensor([[0]]))[0, -1])
        token = WORDS[int(p.argmin())]
    with pytest.raises(UserError, match=message):
        circuits.own_prompt(run, corpus, text, token)


def test_nothing_live_and_nothing_right_end_in_one_line(home, whole):
    shutil.copytree(whole, home / "dead-circuits")
    checkpoint = torch.load(whole / "checkpoint.pt", weights_only=True)
    checkpoint["ci_fn"]["out.bias"].fill_(-1e6)
    torch.save(checkpoint, home / "dead-circuits/checkpoint.pt")
    assert "no live subcomponent" in one_line(circuits, "dead-circuits")
    assert "no prediction of p >= 0.5" in one_line(circuits, "whole", "--windows=1")
    assert "target_token='x': give a prompt with it" in one_line(circuits, "whole", "--target_token=x")
    assert "must be numbers above 0" in one_line(circuits, "whole", "--coefficients=1,x")
    assert "length=17: the context is 16" in one_line(circuits, "whole", "--length=17")


# ---------------------------------------------------------------------------------------------------------------------
# In a real browser


@pytest.fixture
def page(browser, written):
    return Reader(browser, written / "circuits/circuits.html")


def test_page_by_click_slider_and_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    found = lambda: page.js("document.getElementById('count').textContent")
    sight = page.find("#sight").text
    assert all(word in sight for word in ("target", "m = g", "random", "adversarial", "20 steps", "nodes"))
    before = found()
    page.press("j")
    page.wait("document.getElementById('chosen')")
    first = page.js("location.hash")
    assert page.js("document.querySelectorAll('.node.here').length") == 1 and "In: what drives it here" in page.text
    page.press("j")
    page.wait(f"location.hash !== {json.dumps(first)}")
    page.press(Keys.ESCAPE)
    page.wait("!document.getElementById('chosen')")
    page.chrome.execute_script("document.querySelector('.node[data-id^=n]').dispatchEvent(new Event('click'))")
    page.wait("document.getElementById('chosen')")
    assert page.js("document.querySelector('#main a[href*=\"report.html#\"]') !== null")
    page.chrome.execute_script(
        "const s = document.getElementById('least-nodes'); s.value = 100; s.dispatchEvent(new Event('input'))"
    )
    assert found() != before
    page.press("v")
    page.wait("document.querySelector('#variants [aria-pressed=true]').textContent === 'stochastic'")
    page.press("]")
    page.press("[")
    page.wait("document.querySelectorAll('#prices [aria-pressed=true]').length === 1")
    page.press(Keys.ARROW_RIGHT)
    page.wait("location.hash.startsWith('#1/') || D.prompts.length === 1")
    page.quiet()


@pytest.mark.parametrize("stray", ["%", "9/x/7/n3", "0/ci/1/n99999", "__proto__/1"])
def test_an_address_that_is_nothing_shows_a_prompt(page, stray):
    page.open(stray)
    assert "Nodes by influence" in page.text
    page.quiet()


def test_page_is_narrow_and_dark(page):
    light = page.js("getComputedStyle(document.body).backgroundColor")
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert page.js("getComputedStyle(document.body).backgroundColor") != light
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    page.press("j")
    page.wait("document.getElementById('chosen')")
    assert page.js("document.documentElement.scrollWidth") <= 360
    page.quiet()
    page.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_report_shows_what_drives_what(browser, written):
    page = Reader(browser, written / "report.html")
    page.press("j")
    page.wait("document.getElementById('drivers')")
    link = page.js("document.querySelector('#drivers a').hash.slice(1)")
    page.chrome.execute_script("document.querySelector('#drivers a').click()")
    page.opened(link)
    page.quiet()
