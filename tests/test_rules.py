"""Simple rules: planted ones are found, noise is not explained, and what is fitted is not what is judged."""

import json
import shutil
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from tiny import one_line

import eval as evaluation
import run
from studies import harvest, rules

VOCAB, WINDOWS, T = 30, 200, 16
TOKENS = [b"\n", b"\n    ", b"    ", b"\t", b" ", b"x", b" def", b"pass\n", b"):\n  "]


def planted(*fires) -> rules.Positions:
    """Positions of random values, and firings [WINDOWS, T] that are functions of them."""
    rng = np.random.default_rng(0)
    sizes = [VOCAB, VOCAB + 1, VOCAB, 5, 9, T]
    values = [rng.integers(size, size=(WINDOWS, T)) for size in sizes[:-1]]
    values.append(np.broadcast_to(np.arange(T), (WINDOWS, T)))
    values[1] = np.concatenate((np.full((WINDOWS, 1), VOCAB), values[0][:, :-1]), 1)
    columns = [np.asarray(fire(values, rng)).ravel() for fire in fires]
    names = [[f"{rule} {i}" for i in range(size)] for rule, size in zip(rules.RULES, sizes)]
    return rules.Positions(values, sizes, names, sp.csr_matrix(np.stack(columns, 1)).astype(np.int32))


def test_planted_rules_are_found_whole():
    positions = planted(
        lambda v, rng: v[0] == 7,
        lambda v, rng: np.isin(v[1], (3, 4)),
        lambda v, rng: v[2] == 11,
        lambda v, rng: v[3] == 2,
        lambda v, rng: v[4] == 8,
        lambda v, rng: v[5] == 0,
    )
    found = rules.rules(positions, list("abcdef"), 19, 0)
    rows = list(found["subcomponents"].values())
    assert [row["rule"] for row in rows[:5]] == list(rules.RULES[:5])
    assert rows[5]["rule"] in ("position", "previous token")  # which is none at position 0
    assert [row["score"] for row in rows] == [1.0] * 6 == [row["fitted"] for row in rows]
    assert [row["n_values"] for row in rows] == [1, 2, 1, 1, 1, 1]
    assert rows[0]["values"] == ["token 7"] and set(rows[1]["values"]) == {"previous token 3", "previous token 4"}
    assert found["share_explained"] == 1.0 and found["mean_score"] == 1.0 and found["fire_too_rarely"] == 0
    assert found["mean_above_null"] == pytest.approx(1 - np.mean([row["null_mean"] for row in rows])) and all(
        row["null_95"] < 0.5 for row in rows
    )
    fires = positions.fires.toarray().reshape(2, -1, 6).sum(1)
    assert [row["fires"] for row in rows] == fires.T.tolist()


def test_random_firings_are_explained_one_in_twenty():
    """Of 300 of frequencies from 1 to 50 %: 5 % of them, give or take three standard deviations."""
    positions = planted(*(lambda v, rng, f=f: rng.random((WINDOWS, T)) < f for f in np.geomspace(0.01, 0.5, 300)))
    found = rules.rules(positions, [str(i) for i in range(300)], 39, 1)
    assert found["share_explained"] < 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5
    assert abs(found["mean_above_null"]) < 0.01


def test_a_rule_that_fits_noise_scores_low_where_it_was_not_fitted():
    """Firings of each half at a token of its own."""

    def fire(v, rng):
        return np.where(np.arange(WINDOWS)[:, None] < WINDOWS // 2, v[0] == 3, v[0] == 4)

    (row,) = rules.rules(planted(fire), ["c"], 19, 0)["subcomponents"].values()
    assert row["fitted"] == 1.0 and row["score"] == 0.0 and not row["explained"]


def test_bursts_are_no_rule():
    """A subcomponent that fires on half of the windows, everywhere in them: the null has the same bursts."""
    found = rules.rules(planted(lambda v, rng: (rng.random((WINDOWS, 1)) < 0.5) & np.ones(T, bool)), ["c"], 39, 0)
    assert not found["subcomponents"]["c"]["explained"]


def test_fit_and_judge_by_hand():
    """Values a, b, c at 4, 2 and 10 positions; it fires at 3, 2 and 1 of them, and at 1 of a fourth that has 50.

    In order of rate b, a, c: F1 = 4 / (2 + 7), 10 / (6 + 7), 12 / (16 + 7), 14 / (66 + 7). Elsewhere, at 6 of 10 b and
    a and 2 others: 12 / (10 + 8).
    """
    counts, total = sp.csr_matrix(np.array([[3, 2, 1, 1], [0, 0, 0, 0]])), np.array([4, 2, 10, 50])
    chosen, score = rules.fit(counts, total, np.array([7, 0]))
    assert score == pytest.approx([10 / 13, 0]) and chosen.toarray().tolist() == [[3, 2, 0, 0], [0, 0, 0, 0]]
    other = sp.csr_matrix(np.array([[5, 1, 2, 0], [1, 0, 0, 0]]))
    assert rules.judge(chosen, other, np.array([7, 3, 9, 9]), np.array([8, 1])) == pytest.approx([12 / 18, 0])


def test_one_meeting_is_less_than_many():
    """Rates 1 of 1 and 9 of 10: the second enters first."""
    counts = sp.csr_matrix(np.array([[1, 9]]))
    chosen, score = rules.fit(counts, np.array([1, 10]), np.array([9 + 91]))
    assert chosen.toarray().tolist() == [[1, 9]]  # both, as many firings are left
    chosen, score = rules.fit(counts, np.array([1, 1000]), np.array([1]))
    assert chosen.toarray().tolist() == [[1, 0]]


@pytest.mark.parametrize(
    "token, expected",
    [(b"\n", "newline"), (b"  \n\n", "newline"), (b"\n   ", "newline + indentation"), (b" ", "space")]
    + [(b"   ", "indentation"), (b"\t", "indentation"), (b"self", "lower"), (b" self", "space + lower")]
    + [(b"ERR", "UPPER"), (b"Error", "Capital"), (b" I", "space + UPPER"), (b"assertI", "mIxed"), (b"42", "digits")]
    + [(b"__", "underscores"), (b"a_1", "word with _ or digits"), (b"):", "punctuation"), (b".x", "mixed")]
    + [(b"\n##", "newline + punctuation"), (b"\xe2", "punctuation"), ("é".encode(), "lower")],
)
def test_character_class(token, expected):
    assert rules.character_class(token) == expected


def test_indentation():
    """The level so far, token by token; unknown before the first line begins."""
    text = [b"x", b" ", b"\n    ", b"    ", b"x", b"    ", b"pass\n", b"\t", b" def", b"):\n  ", b"x", b"\n", b"x"]
    x = np.array([[TOKENS.index(token) for token in text]])
    unknown = rules.MOST_COLUMNS + 1
    levels = rules.indentation(x, TOKENS)[0].tolist()
    assert levels == [unknown, unknown, 4, 8, 8, 8, 0, 4, 5, 2, 2, 0, 0]
    deep = rules.indentation(np.array([[1] + [2] * 20]), TOKENS)
    assert deep.max() == rules.MOST_COLUMNS


def test_elsewhere_keeps_windows_together():
    at = rules.elsewhere(50, T, np.random.default_rng(0))
    assert sorted(at.ravel()) == list(range(50 * T))
    assert ((at // T) == (at // T)[:, :1]).all() and ((np.diff(at % T, axis=1) - 1) % T == 0).all()


def test_a_run(whole, tmp_path, capsys, monkeypatch):
    """The command: its file, its words; what it looked at is what the model saw; twice the same."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    monkeypatch.setattr(sys, "argv", ["rules", str(folder), "--tokens=512", "--shuffles=19"])
    run.run_script(rules.main, rules.Config, rules.__doc__)
    found, printed = json.loads((folder / "rules.json").read_text()), capsys.readouterr().out
    opened, corpus = evaluation.open_run(folder)
    live = harvest.live_columns(opened, harvest.evaluated_importances(opened, corpus)[0])
    assert list(found["subcomponents"]) == harvest.names_of(opened, live)
    assert (found["run_mark"], found["tokens"], found["live"]) == (opened.mark, 512, len(live))
    assert f"{found['share_explained']:.1%} of {len(live)} live subcomponents" in printed
    for row in found["subcomponents"].values():
        assert row["rule"] in rules.RULES and 0 <= row["score"] <= 1 and len(row["values"]) <= rules.SHOWN
    main = (folder / "rules.json").read_text()
    run.run_script(rules.main, rules.Config, rules.__doc__)
    assert (folder / "rules.json").read_text() == main

    positions = rules.look(opened, corpus, live, 512, 0)
    x = harvest.random_windows(corpus, 16, 512, 0)
    hidden, g, _ = opened.importances(x)
    assert positions.fires.shape == (512, len(live)) and len(positions.values) == len(rules.RULES)
    assert (positions.fires.toarray() == (g[..., live].flatten(0, 1).numpy() > 0)).all()
    assert (positions.values[0] == x.numpy()).all() and (positions.values[1][:, 1:] == x.numpy()[:, :-1]).all()
    assert (positions.values[2] == opened.logits(hidden).argmax(-1).numpy()).all()
    for values, size, names in zip(positions.values, positions.sizes, positions.names):
        assert values.shape == (32, 16) and 0 <= values.min() and values.max() < size == len(names)


def test_bad_input_ends_in_one_line(whole, tmp_path):
    assert "shuffles=5: must be 19 to 10,000" in one_line(rules, str(whole), "--shuffles=5")
    assert "tokens=20: 2 windows of 16 tokens: there must be 4" in one_line(rules, str(whole), "--tokens=20")
    assert "does not exist" in one_line(rules, str(tmp_path / "none"))
    shutil.copytree(whole, tmp_path / "dead")
    checkpoint = torch.load(tmp_path / "dead/checkpoint.pt", weights_only=True)
    checkpoint["ci_fn"]["out.bias"] -= 1000
    torch.save(checkpoint, tmp_path / "dead/checkpoint.pt")
    assert "no live subcomponent: none of 72" in one_line(rules, str(tmp_path / "dead"))
