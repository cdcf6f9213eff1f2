"""Steering: patterns against the text itself, sampling against train_target, the frontier by hand, a whole run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny import one_line

from eval import open_run
from flags import UserError
from studies import steer, weights
from studies.steer import Config, Vector, begins_next, best_rates, continued, matches
from train_target import generate

close = torch.testing.assert_close
LETTER = rb"[aeiou]r"
QUICK = dict(windows=24, prompts=6)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def opened(whole):
    return open_run(whole, device="cpu")


@pytest.fixture
def few(monkeypatch):
    for name, value in dict(CONCEPTS={"letters": LETTER, "never": rb"\x00"}, FEWEST=2, DRAWS=20).items():
        monkeypatch.setattr(steer, name, value)
    monkeypatch.setattr(steer, "STRENGTHS", (0.5, 2.0))


@pytest.fixture
def seen(opened, few):
    return steer.see(*opened, Config(("whole",), **QUICK), lambda n: None)


# ---------------------------------------------------------------------------------------------------------------------
# Concepts


def test_a_match_is_where_its_first_byte_is(opened):
    _, corpus = opened
    tokens = corpus.encoding.encode_ordinary('for x in 0x1f: """é"""\n    test_a = b\'\' or B\'\' or 0xg')
    text = corpus.encoding.decode_bytes(tokens)
    for pattern, n in ((rb'"""', 2), (rb"\btest_\w", 1), (rb"\b0x[0-9a-fA-F]|\bb['\"]", 2), (rb"\xa9", 1)):
        found = matches(corpus, tokens, pattern)
        assert len(found) == n
        for t, match in zip(found, re.finditer(pattern, text)):
            before = len(corpus.encoding.decode_bytes(tokens[:t]))
            assert before <= match.start() < before + len(corpus.encoding.decode_single_token_bytes(tokens[t]))
    assert matches(corpus, [], LETTER) == []


def test_labels_are_one_token_ahead(opened):
    _, corpus = opened
    x = corpus.batch("val", 0, 3, 16)
    found = begins_next(corpus, x, LETTER)
    assert found.shape == (3, 16) and found.any()
    for b in range(3):
        assert (found[b].nonzero()[:, 0] + 1).tolist() == sorted(
            {t for t in matches(corpus, x[b].tolist(), LETTER) if t}
        )


def test_the_concept_counts_behind_the_prompt_alone(opened):
    _, corpus = opened
    er, space = corpus.encoding.encode_ordinary("er"), corpus.encoding.encode_ordinary(" ")
    rows = torch.tensor([er + space * 4, space * 4 + er, space * (4 + len(er))])
    assert steer.has_concept(corpus, rows, len(er), LETTER).tolist() == [0.0, 1.0, 0.0]


# ---------------------------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize("block", [0, 1])
def test_without_a_vector_it_is_ordinary_sampling(gpt, tokens, block):
    found = continued(gpt, tokens[:1, :3], 4, block, torch.zeros(16), generator())
    assert torch.equal(found, generate(gpt, tokens[:1, :3], 4, 8, generator()))


def test_the_vector_is_added_where_tokens_are_written(gpt, tokens):
    behind, plain = [], gpt.blocks[0](gpt.embed(tokens))
    added = torch.randn(16, generator=generator())
    with gpt.blocks[1].register_forward_pre_hook(lambda block, args: behind.append(args[0])):
        text = continued(gpt, tokens[:, :5], 2, 0, added, generator())
    assert [len(x[0]) for x in behind] == [5, 6] and torch.equal(text[:, :5], tokens[:, :5])
    for x in behind:
        close(x[:, :4], plain[:, :4])
        close(x[:, 4], plain[:, 4] + added)
    close(behind[1][:, 5], gpt.blocks[0](gpt.embed(text[:, :6]))[:, 5] + added)
    assert not gpt.blocks[0]._forward_hooks


def test_a_long_push_along_a_tokens_direction_says_it(gpt, tokens):
    token = int(gpt.unembedding.norm(dim=1).argmax())
    u = weights.direction_of(gpt.unembedding, token)
    assert weights.said_at_most(gpt.unembedding, u, token) > 0.99
    text = continued(gpt, tokens[:, :3], 4, 1, 1e4 * u, generator())
    assert (text[:, 3:] == token).all()


def test_ce_of_what_was_written(gpt, tokens):
    log_p = gpt(tokens).log_softmax(-1)
    expected = [-sum(log_p[b, t - 1, tokens[b, t]] for t in range(3, 8)) / 5 for b in range(3)]
    close(steer.ce_of(gpt, tokens, 3), torch.stack(expected).detach())


def test_the_frontier_by_hand():
    rate, ce = torch.tensor([[0.1], [0.5], [0.3], [0.9]]).double(), torch.tensor([[3.0], [3.5], [4.0], [6.0]]).double()
    found = best_rates(rate, ce, torch.tensor([0.0, 0.25, 0.5, 1.0, 2.5, 3.0, 9.0]).double())[:, 0]
    close(found, torch.tensor([0.1, 0.3, 0.5, 0.5, 0.75, 0.9, 0.9]).double())
    cheaper = best_rates(rate, torch.tensor([[3.0], [2.0], [4.0], [6.0]]).double(), torch.tensor([0.0]).double())
    assert cheaper.item() == pytest.approx(0.5)  # a text may also become cheaper
    many = best_rates(rate.repeat(1, 3), ce.repeat(1, 3), torch.linspace(0, 4, 9).double())
    assert (many[1:] >= many[:-1]).all() and torch.equal(many[:, 0], many[:, 2])


# ---------------------------------------------------------------------------------------------------------------------
# Vectors and the run


def test_vectors_are_of_one_length_and_the_best_tells(opened, seen):
    (run, corpus), (A, prompts) = opened, seen
    assert prompts.shape == (6, 8)
    assert torch.equal(prompts, weights.halves(corpus, 16, 24)[1][:6, :8])
    label = begins_next(corpus, A.x, LETTER).flatten()
    found = steer.vectors(run, corpus, A, label, Config(("whole",), **QUICK))
    for vector in found.values():
        close(vector.added.norm(), A.streams[vector.block].norm(dim=-1).mean())
    score = weights.correlation(A.fires.float(), label)
    often = A.fires.sum(0) >= 2
    best = next(i for i, piece in enumerate(A.pieces) if weights.name_of(piece) == found["subcomponent"].what)
    assert score[best] == score[often].max() == found["subcomponent"].score
    name, c = A.pieces[best]
    sign = A.a[A.fires[:, best], best].mean().sign()
    U = sign * run.decomposition.U[name][:, c].detach()
    close(found["subcomponent"].added / found["subcomponent"].added.norm(), U / U.norm())
    assert found["random subcomponent"].block == found["subcomponent"].block == found["random direction"].block
    stream = run.decomposition.target.embed(A.x[:, :-1])
    for block, of in zip(run.decomposition.target.blocks, A.streams):
        stream = block(stream)
        close(of, stream.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_a_transcoders_best_row(opened, seen, tmp_path):
    dictionary = pytest.importorskip("studies.dictionary")
    (run, corpus), (A, _) = opened, seen
    label = begins_next(corpus, A.x, LETTER).flatten()
    for kind in ("plt", "sae"):
        made = dictionary.new(dictionary.Settings(kind, D=8, k=2), run.decomposition.target)
        dictionary.save(made, tmp_path / kind)
    plt = dictionary.load(tmp_path / "plt")
    found = steer.of_transcoders(str(tmp_path / "plt"), A, label)
    scores = {}
    _, xs, _ = dictionary.target_pass(run.decomposition.target, A.x[:, :-1])
    for l, x in enumerate(xs):
        close(A.inputs[l], x.flatten(0, 1), atol=1e-5, rtol=1e-5)
        fires = plt.codes(l, A.inputs[l]) > 0
        of_layer = weights.correlation(fires.float(), label)
        scores |= {f"{l}:{c}": of_layer[c].item() for c in range(8) if fires[:, c].sum() >= 2}
    assert scores[found.what] == max(scores.values()) == found.score
    l, c = map(int, found.what.split(":"))
    close(found.added, A.scaled(l, plt.W_dec[l][c]))
    with pytest.raises(UserError, match="sae of 2 layers of 16, not plt"):
        steer.of_transcoders(str(tmp_path / "sae"), A, label)


def test_a_run_is_measured_once(home, whole, few, capsys, monkeypatch):
    for name in ("steer-a", "steer-b"):
        shutil.copytree(whole, home / name)
    steer.main(Config(("steer-a",), **QUICK))
    path, said = Path("steer-a", "steer", "steer.json"), capsys.readouterr().out
    found = json.loads(path.read_text())
    assert (
        found["whole"]
        and list(found["concepts"]) == ["letters"]
        and "they begin under 2 times in half A: never" in said
    )
    methods = found["concepts"]["letters"]["methods"]
    assert list(methods) == [method for method in steer.COLOURS if method != "transcoder row"] and all(
        method in said for method in methods
    )
    for row in methods.values():
        assert row["rate"][0] == pytest.approx(found["concepts"]["letters"]["rate"]) and row["gain_area"][0] >= 0
        assert len(row["rate"]) == len(row["ce"]) == 3
    assert path.with_name("steer.png").read_bytes()[:4] == b"\x89PNG"
    other = home / "steer-b" / "steer"
    other.mkdir()
    (other / "steer.json").write_text(json.dumps(found | {"whole": False}))
    monkeypatch.setattr(steer, "measure", None)
    steer.main(Config(("steer-b", "steer-a"), **QUICK))
    assert json.loads((other / "steer.json").read_text())["concepts"] == found["concepts"]
    assert "steer-a: as measured before" in capsys.readouterr().out
    for change in (dict(seed=1), dict(windows=25), dict(prompts=5), dict(dictionary="one")):
        assert (
            weights.begun(path, steer.settings(open_run("steer-a")[0], Config(("a",), **QUICK | change)), "concepts")
            is None
        )


def test_a_vector_that_does_nothing_gains_nothing(opened, few):
    run, corpus = opened
    prompts = corpus.batch("val", 0, 6, 8)[:, :8]
    target, n = run.decomposition.target, 8
    plain = continued(target, prompts, n, 0, torch.zeros(16), generator())
    before = steer.has_concept(corpus, plain, 8, LETTER), steer.ce_of(target, plain, 8)
    nothing = Vector(1, torch.zeros(16), "nothing")
    found = steer.measure(run, corpus, prompts, nothing, LETTER, before, Config(("a",)), lambda: None)
    for gain in (found["gain_area"], found["gain_sold"]):
        assert gain == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)
    assert len(set(found["rate"])) == len(set(found["ce"])) == 1


@pytest.mark.parametrize("args, said", [
    ([], "name at least one run folder"),
    (["nowhere"], "nowhere"),
    (["whole", "--prompts=600"], "prompts=600: at most the 512 windows"),
    (["whole", "--windows=0"], "windows=0: must be above 0"),
    (["whole", "--concept=capitals"], "unknown flag"),
    (["whole", "--windows=4", "--prompts=2"], "no concept begins 20 times"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(whole, args, said):
    assert said in one_line(steer, *args)
