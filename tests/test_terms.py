"""studies/terms.py: the clustered order, the counts by hand, the command on two tiny runs."""

import json
import shutil

import numpy as np
import pytest
from tiny import one_line

from studies import terms


def test_clustered_order_puts_groups_together():
    """Three planted groups, shuffled: the members of each are neighbours, and every row is there once."""
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat([0, 1, 2], 5))
    X = np.eye(3)[group] + 0.1 * rng.random((15, 3))
    order = terms.clustered_order(X)
    assert sorted(order) == list(range(15))
    assert sum(a != b for a, b in zip(group[order][1:], group[order][:-1])) == 2


def test_clustered_order_joins_by_mean_cosine():
    """By hand: 0 and 1 are the nearest; 3 is nearer to 2 (cos 0.8) than to them."""
    X = np.array([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0], [0.6, 0.8]])
    assert terms.clustered_order(X) in ([0, 1, 2, 3], [2, 3, 0, 1], [0, 1, 3, 2], [3, 2, 0, 1])
    assert terms.clustered_order(np.zeros((1, 4))) == [0]


def test_summary_by_hand():
    g = np.array([[1.0, 0.0, 0.5, 0.0], [0.2, 0.0, 0.0, 0.0], [0.1, 0.3, 0.0, 0.0], [0.9, 0.0, 0.0, 0.0]])
    assert terms.summary(g) == {
        "l0": 1.5, "ever_on": 3, "bias_like": 1, "bias_like_of_ever": 1 / 3, "bias_like_of_l0": 1 / 1.5,
        "on_where_ever": 0.5,
    }  # fmt: skip
    assert terms.summary(np.zeros((4, 2)))["bias_like_of_l0"] == 0


def test_the_command(home, whole, monkeypatch, capsys):
    for name in "terms-a", "terms-b":
        shutil.copytree(whole, home / name)
    said = capsys.readouterr()
    terms.main(terms.Config(("terms-a", "terms-b"), windows=4, shown=20))
    said = capsys.readouterr().out
    found = json.loads((home / "terms-b/terms.json").read_text())
    a, b = (found["runs"][name] for name in ("terms-a", "terms-b"))
    assert a == b and found["positions"] == 4 * 16 and f"{a['l0']:.1f}" in said
    assert (home / "terms-b/figures/terms.png").stat().st_size > 10_000 and not (home / "terms-a/terms.json").exists()


@pytest.mark.parametrize(
    "args, said", [(["nowhere"], "run folder 'nowhere' does not exist"), ([], "runs: give at least one run folder")]
)
def test_bad_input_is_one_line(home, args, said, monkeypatch):
    assert said in one_line(terms, *args)
