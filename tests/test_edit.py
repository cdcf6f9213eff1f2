"""One edit, end to end; the study's parts against closed forms, and its rules by hand."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny import one_line

from checkpoints import load_checkpoint, save
from eval import open_run
from flags import UserError
from studies import edit, weights
from studies.edit import LEVELS, Config, Judge, Line, at_level, push_for, strengths_for, with_interval
from studies.harvest import evaluated_importances, live_columns, names_of
from train_target import build_target

close = torch.testing.assert_close
DOWN = "blocks.1.mlp.down"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def session_sharp(session_whole) -> Path:
    """The tiny run with a longer unembedding: its target, hardly trained, would give every token the same p."""
    folder = session_whole.with_name("sharp")
    shutil.copytree(session_whole, folder)
    checkpoint = load_checkpoint(folder / "checkpoint.pt", "decomposition")
    checkpoint["target"]["model"]["embed.weight"] = 60 * checkpoint["target"]["model"]["embed.weight"]
    save(folder / "checkpoint.pt", "decomposition", checkpoint)
    return folder


@pytest.fixture
def sharp(home, session_sharp) -> str:
    """A folder not to be changed."""
    return "sharp"


@pytest.fixture
def opened(sharp):
    return open_run(sharp, device="cpu")


@pytest.fixture
def live(opened) -> list[weights.Piece]:
    """Of the last matrix of the tiny run."""
    mean_g = evaluated_importances(*opened)[0]
    names = [name for name in names_of(opened[0], live_columns(opened[0], mean_g)) if name.startswith("1.mlp.down:")]
    return weights.pieces_named(opened[0], mean_g, names)


@pytest.fixture
def halves(opened, live):
    return edit.read_halves(*opened, live, Config(("sharp",), windows=40))


# ---------------------------------------------------------------------------------------------------------------------
# One edit


def test_an_edit_is_printed_and_saved(opened, live, halves, home, capsys):
    run, corpus = opened
    name, token = weights.name_of(live[0]), corpus.encoding.decode([300])
    edit.main(Config(("sharp",), (name,), token, push=3.0, windows=40, save="edited"))
    said = capsys.readouterr().out
    u = weights.direction_of(run.unembedding, 300)
    new = weights.rewritten(run.decomposition, {live[0]: halves[0].push_of(0).write(u, 3.0)})
    saved = build_target(load_checkpoint(Path("edited", "checkpoint.pt"), "target"))
    x = corpus.batch("val", 0, 2, 16)
    close(saved(x[:, :-1]), weights.edited_target(run.decomposition.target, new)(x[:, :-1]))
    fires = int(halves[1].fires[..., 0].sum())
    assert f"{name} writes {token!r}, --push=3" in said and f"{name} fires at {fires:,} of 640 positions" in said
    assert said.count("prompt: …") == said.count("before: ") == said.count(" after: ") > 0
    near = halves[1].fires[..., 0].any(1)
    found = weights.costs_on(run.decomposition.target, saved, halves[1].x[near], 300)
    on = halves[1].fires[near, :, 0]
    for what in ("kl", "reverse"):
        assert f"{weights.mean_over(found[what], on):.4f}" in said
    assert f"→ {weights.mean_over(found['p'], on):.4f}" in said
    assert "edited" in one_line(edit, "sharp", f"--subcomponent={name}", "--scale=0", "--save=edited")


def test_a_removed_subcomponent_is_a_mask_of_0(opened, live, capsys):
    run, corpus = opened
    names = [weights.name_of(piece) for piece in live[:2]]
    edit.main(Config(("sharp",), tuple(names), scale=0, windows=40, save="removed"))
    assert f"edit: {names[0]}, {names[1]} times 0" in capsys.readouterr().out
    x = corpus.batch("val", 0, 2, 16)[:, :-1]
    m = torch.ones(2, 16, sum(run.decomposition.C.values()) + run.decomposition.L)
    for piece in live[:2]:
        m[..., weights.column_of(run.decomposition, piece)] = 0
    saved = build_target(load_checkpoint(Path("removed", "checkpoint.pt"), "target"))
    close(saved.hidden(x), run.decomposition(x, m).detach(), atol=1e-4, rtol=1e-4)


def test_a_push_is_found():
    push, p = push_for(lambda push: 1 - math.exp(-push / 10), 0.9)
    assert 0.9 <= p <= 0.91 and p == 1 - math.exp(-push / 10)
    push, p = push_for(lambda push: 0.4 - 1 / (4 + push), 0.9)  # never: 90 % of the most that a row of pushes gives
    assert 0.36 * 0.99 <= p <= 0.37


@pytest.mark.parametrize("args, said", [
    ([], "name at least one run folder"),
    (["nowhere", "--study"], "nowhere"),
    (["sharp", "--subcomponent=1.mlp.down:99", "--scale=0"], "no subcomponent of this run; live ones near it: 1.mlp"),
    (["sharp", "--subcomponent=1.mlp.down:0", "--token=no one says"], "is not one token but"),
    (["sharp", "--subcomponent=1.mlp.down:0"], "scale=1.0: that changes nothing"),
    (["sharp", "--subcomponent=1.mlp.down:0", "--token=a", "--scale=0"], "either a token or a scale"),
    (["sharp", "--subcomponent=1.mlp.down:0", "--scale=0", "--push=2"], "towards which token"),
    (["sharp", "--subcomponent=1.mlp.down:0", "--scale=-1"], "scale=-1.0: must be 0 or above"),
    (["sharp", "--subcomponent=1.mlp.down:0", "--scale=0", "--save=target"], "save=target exists already"),
    (["sharp", "other", "--subcomponent=1.mlp.down:0", "--scale=0"], "belongs to one run"),
    (["sharp", "--study", "--subcomponent=1.mlp.down:0", "--scale=0"], "by rule"),
    (["sharp", "--token=a"], "name what is to be edited"),
    (["sharp", "--study"], "no live one fires at 100 to"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(sharp, args, said):
    assert said in one_line(edit, *args)


def test_a_token_needs_a_matrix_that_writes_to_the_stream(opened):
    mean_g = evaluated_importances(*opened)[0]
    up = next(name for name in names_of(opened[0], live_columns(opened[0], mean_g)) if ".up" in name)
    said = one_line(edit, "sharp", f"--subcomponent={up}", "--token=a")
    assert up in said and "does not write to the residual stream" in said


# ---------------------------------------------------------------------------------------------------------------------
# The study's parts


def test_the_judge_knows_the_edited_model(opened, live, halves):
    """Its closed form against the whole model, weights and bias changed."""
    run, B = opened[0], halves[1]
    line = Line(*(0.3 * torch.randn(16, n, generator=generator(n)) for n in (32, 33)), torch.ones(16))
    line = Line(line.fixed, line.rising[:, :32], line.bias)
    judge = Judge(run, B, 0, torch.arange(20))
    change, bias = line.at(0.7)
    edited = weights.edited_target(run.decomposition.target, {DOWN: run.decomposition.W(DOWN) + change}, {DOWN: bias})
    expected = weights.costs_on(run.decomposition.target, edited, B.x[:20], 5)
    for what, value in judge.costs(line, 0.7, 5).items():
        close(value, expected[what], atol=1e-4, rtol=1e-4)
    assert torch.equal(judge.regions["others"], ~B.fires[:20, :, 0])


def test_the_lines_are_the_edits(opened, live, halves):
    run, A, token = opened[0], halves[0], 300
    W, E = run.decomposition.W(DOWN), run.unembedding.detach()
    u, push = weights.direction_of(E, token), A.push_of(0)
    lines = edit.lines_of(run, A, live, 0, token, 1)
    by_hand = weights.rewritten(run.decomposition, {live[0]: push.write(u, 2.5)})[DOWN] - W
    close(lines["subcomponent"].at(2.5)[0], by_hand, atol=1e-5, rtol=1e-4)
    without = weights.removed(run.decomposition, live[:1])[DOWN] - W
    for method in ("subcomponent", "subcomponent, row of E", "difference of means", "discriminant"):
        close(lines[method].at(0.0)[0], without, atol=1e-6, rtol=1e-4)
    close(lines["subcomponent, added"].at(2.5)[0], by_hand - without, atol=1e-5, rtol=1e-4)
    for method, line in lines.items():
        change, bias = line.at(3.0)
        rank = int(torch.linalg.matrix_rank(change.double(), rtol=1e-4))
        assert rank == (0 if method == "bias" else 2 if method in ("difference of means", "discriminant") else 1), (
            method
        )
        assert bias.any() == (method == "bias")
    rms = A.stream[A.fires[..., 0]].square().mean(-1).sqrt().mean()
    close(lines["bias"].at(3.0)[1], 3 * rms * u)


def test_a_strength_reaches_its_level(opened, live, halves):
    run, A = opened[0], halves[0]
    E, fires = run.unembedding.detach(), A.fires[..., 0]
    token = int((E @ E.T).diagonal().argmax())
    line = edit.lines_of(run, A, live, 0, token, 1)["bias"]
    at = A.stream[fires], A.inputs[fires]
    most = weights.said_at_most(E, line.bias, token)
    judge, strengths = Judge(run, A, 0, torch.arange(40)), strengths_for(line, *at, E, token)
    assert most > LEVELS[-1] and None not in strengths
    for level, strength in zip(LEVELS, strengths):
        p = weights.mean_over(judge.costs(line, strength, token)["p"], fires)
        assert p == pytest.approx(level, abs=0.03)  # STRENGTHS are a factor of 1.5 apart
    nothing = Line(torch.zeros_like(line.fixed), torch.zeros_like(line.fixed), torch.zeros(16))
    assert strengths_for(nothing, *at, E, token) == [None] * len(LEVELS)


def test_costs_between_strengths():
    p = torch.tensor([[0.2, 0.5, 0.1], [0.5, 0.8, 0.2], [0.8, 0.9, 0.3]]).double()
    cost = torch.tensor([[1.0, 1, 1], [2, 3, 2], [4, 4, 3]]).double()
    found = at_level(p, cost, 0.5)
    assert found[:2].tolist() == [2.0, 1.0] and found[2].isnan()
    between = at_level(p, cost, 0.6)[0].item()
    assert between == pytest.approx(2 + 2 * math.log(0.6 / 0.4) / math.log(0.8 / 0.2))
    assert with_interval(found) is None
    assert with_interval(torch.arange(41.0).double()) == [0.0, pytest.approx(1.0), pytest.approx(39.0)]


def test_tokens_and_the_rule(opened, live, halves, monkeypatch):
    monkeypatch.setattr(edit, "SAYABLE", 0.0)
    run, A = opened[0], halves[0]
    p = run.logits(weights.nn.functional.rms_norm(A.stream[A.fires[..., 0]], (16,), eps=1e-6)).softmax(-1).mean(0)
    frequent = torch.bincount(A.x.flatten(), minlength=len(p)).topk(256).indices
    best = frequent[p[frequent].argsort(descending=True)].tolist()
    assert edit.study_tokens(run, A, 0, best[0]) == {"plausible": best[1], "implausible": best[-1]}
    assert edit.study_tokens(run, A, 0, best[1]) == {"plausible": best[0], "implausible": best[-1]}
    x, fires = A.x[:, :-1], A.fires[..., 0]
    token, f1 = edit.rule_token(A, 0)
    scores = {t: 2 * int((fires & (x == t)).sum()) / int(fires.sum() + (x == t).sum()) for t in x.unique().tolist()}
    assert f1 == pytest.approx(max(scores.values())) == pytest.approx(scores[token])


def test_pieces_by_rule(opened, live, halves, monkeypatch):
    run, A = opened[0], halves[0]
    fires = torch.zeros_like(A.fires)
    predicted = run.logits(run.decomposition.f(A.x[:, :-1])).argmax(-1)
    usual, count = predicted.unique(return_counts=True)
    often = int(usual[count.argmax()])
    fires[..., 0] = predicted == often
    fires[..., 1] = True
    made = edit.Text(A.x, fires, A.a, A.stream, A.inputs)
    monkeypatch.setattr(edit, "MOST", 1.0)
    monkeypatch.setattr(edit, "FEWEST", 1)
    assert edit.study_pieces(run, opened[1], made, live, 3) == [(0, often, 1.0)]  # the other one predicts the same
    monkeypatch.setattr(edit, "FEWEST", 10**6)
    with pytest.raises(UserError, match="no live one fires"):
        edit.study_pieces(run, opened[1], made, live, 3)


# ---------------------------------------------------------------------------------------------------------------------
# The study


@pytest.fixture
def easy(monkeypatch):
    """Rules that the tiny run passes, and few draws."""
    for name, value in dict(FEWEST=1, MOST=1.0, DRAWS=20, LAMBDAS=(1.0, 9.0)).items():
        monkeypatch.setattr(edit, name, value)
    for name, value in dict(LEVELS=(0.1, 0.2, 0.4), AT=(0.15, 0.2, 0.3), STRENGTHS=torch.logspace(-2, 4, 19)).items():
        monkeypatch.setattr(edit, name, value)


QUICK = dict(windows=24, pieces=1, steps=5)


def test_choices_do_not_depend_on_half_b(opened, live, halves, easy):
    run, corpus = opened
    (A, B), c = halves, Config(("sharp",), **QUICK)
    other = edit.Text(B.x.flip(0), B.fires.roll(1, 1), B.a, B.stream.flip(0), B.inputs.flip(0))
    found, changed = (edit.measure_pair(run, corpus, A, half, live, 0, 300, c, lambda: None) for half in (B, other))
    for method, of in found["methods"].items():
        for what in of.keys() & {"strengths", "lambdas"}:
            assert changed["methods"][method][what] == of[what]
    assert changed["methods"]["bias"]["p"] != found["methods"]["bias"]["p"]
    assert set(found["methods"]["LoRA, all"]["lambdas"]) <= {1.0, 9.0}


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_left(home, sharp, easy, capsys, monkeypatch):
    for name in ("edit-a", "edit-b"):
        shutil.copytree(sharp, home / name)
    edit.main(Config(("edit-a",), **QUICK))
    path = Path("edit-a", "edit", "study.json")
    found = json.loads(path.read_text())
    assert found["pieces"] == 1 and len(found["pairs"]) == 2 and found["run_mark"] == open_run("edit-a")[0].mark
    assert Path("edit-a", "edit", "edit.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert all(method in said for method in edit.COLOURS) and "at p = 0.15" in said
    of = next(iter(found["pairs"].values()))["methods"]
    assert list(of) == list(edit.COLOURS)
    assert [1.0, 1.0, 1.0] in of["subcomponent"]["kl elsewhere, ratio"]
    cut = home / "edit-b" / "edit" / "study.json"
    cut.parent.mkdir()
    first = dict(list(found["pairs"].items())[:1])
    cut.write_text(json.dumps(found | {"pieces": 0, "pairs": first}))
    edit.main(Config(("edit-b",), **QUICK))
    assert json.loads(cut.read_text())["pairs"] == found["pairs"]
    monkeypatch.setattr(edit, "measure_pair", None)
    edit.main(Config(("edit-b", "edit-a"), **QUICK))
    assert capsys.readouterr().out.count("as measured before") == 2
    for change in (dict(seed=1), dict(windows=25), dict(steps=6)):
        assert (
            weights.begun(path, edit.settings(open_run("edit-a")[0], Config(("edit-a",), **QUICK | change)), "pairs")
            is None
        )
