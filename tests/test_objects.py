"""Overlap against brute force, planted intruders, entropies by hand."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from studies import objects
from studies.objects import (
    Objects,
    compare,
    contexts,
    cosines,
    entropy,
    firings,
    interpretability,
    intruders,
    mmcs,
    reading,
    similarity,
    splitting,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_cosines_by_a_loop():
    A, B = ([torch.randn(n, 3, generator=generator(n)), torch.randn(n, 5, generator=generator(9 + n))] for n in (4, 6))
    found = cosines(A, B)
    for a in range(4):
        for b in range(6):
            product = F.cosine_similarity(A[0][a], B[0][b], 0) * F.cosine_similarity(A[1][a], B[1][b], 0)
            assert found[a, b].item() == pytest.approx(product.item(), abs=1e-6)
    assert torch.equal(cosines(A, B, unsigned=True), found.abs())


def test_splitting_against_brute_force():
    A, B = torch.randn(30, 6, generator=generator(1)), torch.randn(20, 6, generator=generator(2))
    for a, b, same in ((A, B, False), (A, A, True)):
        many = 0
        for i in range(len(a)):
            matches = [j for j in range(len(b)) if not (same and i == j) and F.cosine_similarity(a[i], b[j], 0) > 0.5]
            many += len(matches) > 1
        assert splitting(cosines([a], [b]), same) == pytest.approx(many / len(a))
        assert 0 < many < len(a)


def test_mmcs_with_itself_is_1():
    A = torch.randn(30, 5, generator=generator())
    assert mmcs(cosines([A], [A])) == pytest.approx(1)
    assert mmcs(torch.tensor([[0.1, 0.3], [0.9, -1.0]])) == pytest.approx(0.6)


def made(reads, writes, fires, gauge=False) -> Objects:
    vectors = {"output": [[writes]], "input": [[reads]], "rank-one": [[reads, writes]]}
    return Objects(vectors, gauge, sp.csc_matrix(fires), [f"0:{i}" for i in range(fires.shape[1])])


def test_compare_says_what_the_spaces_say():
    torch.manual_seed(0)
    reads, writes = torch.randn(40, 64), torch.randn(40, 64)
    twice = lambda v: torch.cat((v, v))
    none = np.zeros((4, 40), bool)
    A = made(reads, writes, none)
    B = made(torch.randn(80, 64), twice(writes), np.zeros((4, 80), bool))
    found = compare(A, B, 80, generator())
    assert found["output"]["split"] == 1 and found["output"]["mmcs_equal"] == pytest.approx(1)
    assert found["input"]["split"] == 0 and found["input"]["mmcs"] < 0.5 and found["rank-one"]["split"] == 0
    assert found["output"]["mmcs_null"] < 0.5 and found["output"]["split_null"] == 0
    assert compare(A, B, 5, generator())["output"]["mmcs_equal"] < found["output"]["mmcs"]
    flipped = made(-reads, -writes, none, gauge=True)  # the same subcomponents
    same = compare(made(reads, writes, none, gauge=True), flipped, 40, generator())
    assert all(same[space]["mmcs"] == pytest.approx(1) for space in objects.SPACES)
    itself = compare(A, A, 40, generator())
    assert itself["output"]["split"] == 0 and itself["output"]["mmcs"] == pytest.approx(1)


def test_contexts_and_similarity_by_hand():
    tokens, following, before = contexts(torch.tensor([[5, 6, 7, 6], [8, 8, 8, 8]]))
    assert tokens.tolist() == [5, 6, 7, 8, 8, 8] and following.tolist() == [6, 7, 6, 8, 8, 8]
    assert before[2].tolist() == [6, 5] + [-1] * 6 and before[0].tolist() == [-1] * 8
    pad = [-1] * 5
    before = np.array([[1, 2, 3, *pad], [1, 9, 9, *pad], [4, 2, 2, *pad]])
    found = similarity(np.array([7, 7, 8]), before)
    # 0 and 1: same token, same previous, 1 of 3 and 1 of 3; 0 and 2: 1 of 3 and 2 of 3; 1 and 2: nothing
    assert found[0, 1] == pytest.approx(1 + 0.5 + (1 / 3 + 1 / 3) / 2)
    assert found[0, 2] == pytest.approx((1 / 3 + 2 / 3) / 2) and found[1, 2] == 0
    assert np.array_equal(found, found.T)


def planted(random: bool) -> tuple[sp.csc_matrix, torch.Tensor]:
    """40 objects over 20 tokens in 200 windows of 17: two fire at each token, or, if random, anywhere as often."""
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 20, (200, 17))
    at = windows[:, :-1].ravel()
    fires = np.stack([(at == c % 20) for c in range(40)], 1)
    if random:
        fires = rng.permuted(fires, axis=0)
    return sp.csc_matrix(fires), torch.from_numpy(windows)


def test_the_rule_finds_planted_intruders_and_is_at_chance_on_noise():
    rng = np.random.default_rng(1)
    found = intruders(*planted(False), rng)
    assert found.mean() > 0.9 or np.median(found) == 1
    assert abs(intruders(*planted(True), rng).mean() - 0.2) < 0.06


def test_too_few_firings_are_left_out():
    fires, windows = planted(False)
    rare = sp.lil_matrix(fires)
    own = fires.indices[fires.indptr[3] : fires.indptr[4]]
    rare[own[objects.SAMPLES - 1 :], 3] = False
    found = intruders(sp.csc_matrix(rare), windows, np.random.default_rng(0))
    assert np.isnan(found[3]) and np.isfinite(np.delete(found, 3)).all()


def test_entropy_in_bits():
    assert entropy(np.array([1, 1, 2, 2])) == 1 and entropy(np.array([3, 3])) == 0
    assert entropy(np.arange(32)) == 5


def test_interpretability_of_objects_that_are_tokens(monkeypatch):
    fires, windows = planted(False)
    monkeypatch.setattr(objects, "BAND", (0.0, 1.0))
    found = interpretability(made(torch.ones(40, 2), torch.ones(40, 2), fires.toarray()), windows, 0)
    assert found["entropy"] == 0 and 3 < found["entropy_next"] < 4.33 and found["objects"] == found["objects_all"] == 40
    assert found["density"] == pytest.approx(1 / 20, rel=0.01)
    monkeypatch.setattr(objects, "BAND", (0.9, 1.0))
    assert interpretability(made(torch.ones(40, 2), torch.ones(40, 2), fires.toarray()), windows, 0)["objects"] == 0


def test_firings_leave_out_the_last_position_of_a_window():
    x = torch.tensor([[1, 2, 0], [0, 3, 1]])
    fires, mean = firings(lambda x: torch.stack((x.float(), x.float() - 2), -1), x, 1)
    assert fires.toarray().tolist() == [[True, False], [True, False], [False, False], [True, True]]
    assert mean.tolist() == [6 / 4, -2 / 4]


def test_reading_material_hides_and_keeps_the_origin(monkeypatch):
    class Corpus:
        class encoding:
            decode = staticmethod(lambda ids: "".join(f"<{i}>" for i in ids))

    monkeypatch.setattr(objects, "BAND", (0.0, 1.0))
    fires, windows = planted(False)
    methods = {name: made(torch.ones(40, 2), torch.ones(40, 2), fires.toarray()) for name in ("one", "two")}
    text, key = reading(methods, windows, Corpus, 0)
    assert [row["object"] for row in key] == list(range(1, 31)) and "one" not in text and "two" not in text
    assert sum(row["method"] == "one" for row in key) == 15
    assert {row["method"] for row in key[:8]} == {"one", "two"}  # shuffled
    for row, part in zip(key, text.split("object ")[1:]):
        token = int(row["name"].partition(":")[2]) % 20
        assert part.count(f"«<{token}>»") == objects.SHOWN == part.count("«")
