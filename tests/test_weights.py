"""Edits of weights: each against the decomposition, a closed form or a number by hand, in float64."""

import json

import pytest
import torch

import data
import train_target
from checkpoints import load_checkpoint
from eval import open_run
from flags import UserError
from model import rms_norm
from run import is_run_folder
from studies import weights
from studies.harvest import evaluated_importances, live_columns, names_of
from studies.weights import Push, bootstrap, costs, edited_target, rank_one, regions, removed, resampled, rewritten
from train_target import build_target

close = torch.testing.assert_close
PIECES = [("blocks.0.attn.o", 1), ("blocks.1.mlp.down", 2), ("blocks.1.mlp.down", 0)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def exact(decomposition):
    """The decomposition in float64; its Deltas are far from 0."""
    return decomposition.double()


@pytest.fixture
def write(exact):
    return {piece: torch.randn(16, generator=generator(i)).double() for i, piece in enumerate(PIECES)}


def ones(exact, tokens):
    return torch.ones(*tokens.shape, sum(exact.C.values()) + exact.L, dtype=torch.double)


# ---------------------------------------------------------------------------------------------------------------------
# Edits by subcomponents


def test_a_rewritten_subcomponent_is_a_change_of_rank_one(exact):
    name, c = piece = PIECES[1]
    u = torch.randn(16, generator=generator()).double()
    change = rewritten(exact, {piece: u})[name] - exact.W(name)
    close(change, torch.outer(u - exact.U[name][:, c], exact.V[name][:, c]), atol=1e-14, rtol=0)
    assert torch.linalg.matrix_rank(change) == 1
    x = torch.randn(5, 32, generator=generator()).double()
    V = exact.V[name][:, c]
    x -= torch.outer(x @ V, V) / V.square().sum()  # V^T x = 0
    close(x @ change.T, torch.zeros(5, 16).double(), atol=1e-13, rtol=0)


def test_the_edited_target_is_the_decomposition_with_these_columns(exact, write, tokens):
    """Masks all 1, and Delta that of the weights before: if U changed first, Delta would undo the edit."""
    edited = edited_target(exact.target, rewritten(exact, write))
    Deltas = {name: exact.Delta(name).detach() for name in exact.names}  # before
    for (name, c), u in write.items():
        exact.U[name].data[:, c] = u
    for name in exact.names:
        exact.target.get_submodule(name).weight.data = (exact.U[name] @ exact.V[name].T + Deltas[name]).detach()
    close(edited(tokens), exact(tokens, ones(exact, tokens)).detach(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_a_factor_is_a_mask_of_the_masked_model(exact, tokens, factor):
    m = ones(exact, tokens)
    for piece in PIECES:
        m[..., weights.column_of(exact, piece)] = factor
    edited = edited_target(exact.target, rewritten(exact, dict.fromkeys(PIECES, factor)))
    close(edited(tokens), exact(tokens, m).detach(), atol=1e-10, rtol=0)
    if factor == 0:
        for name, W in removed(exact, PIECES).items():
            assert torch.equal(W, edited.get_submodule(name).weight)


def test_no_change_is_no_change(exact, tokens):
    same = rewritten(exact, {piece: exact.U[piece[0]][:, piece[1]] for piece in PIECES})
    assert all(torch.equal(W, exact.W(name)) for name, W in same.items())
    assert rewritten(exact, {}) == removed(exact, []) == {}
    assert torch.equal(edited_target(exact.target, same)(tokens), exact.target(tokens))


def test_an_edit_leaves_the_target_alone(exact, write, tokens):
    before = exact.target(tokens)
    edited_target(exact.target, rewritten(exact, write), {"blocks.1.mlp.down": torch.ones(16).double()})
    assert torch.equal(exact.target(tokens), before)


def test_behind_the_last_matrix_there_is_only_a_norm(exact, write, tokens):
    target, (name, c) = exact.target, PIECES[1]
    _, inputs = exact.target_pass(tokens)
    x = target.embed(tokens)
    for block in target.blocks:
        x = block(x)
    a = inputs[exact.names.index(name)] @ exact.V[name][:, c]
    x = x + a[..., None] * (write[PIECES[1]] - exact.U[name][:, c])
    edited = edited_target(target, rewritten(exact, {PIECES[1]: write[PIECES[1]]}))
    close(edited(tokens), (rms_norm(x) @ target.unembedding.T).detach(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("s", [3.0, -0.2])
def test_the_length_and_sign_of_v_change_no_edit(exact, tokens, s):
    """U s and V / s are the same subcomponent: a push gives the same W'."""
    name, c = PIECES[1]
    x, E_y = exact.target_pass(tokens)[1][exact.names.index(name)].flatten(0, 1), exact.target.unembedding[7]
    residual = torch.randn(len(x), 16, generator=generator()).double()

    def edit():
        a = x @ exact.V[name][:, c]
        return rewritten(exact, {PIECES[1]: Push.of(a, residual).write(E_y, 3.0)})[name], a

    before, a = edit()
    exact.U[name].data[:, c] *= s
    exact.V[name].data[:, c] /= s
    after, _ = edit()
    close(after, before, atol=1e-10, rtol=0)
    kept = a * a.mean().sign()
    push = Push.of(a, residual).write(E_y, 3.0)  # of positive mean, it adds push * rms along E_y on average
    mean = (kept.mean() / a.abs().mean()) * 3.0 * residual.square().mean(-1).sqrt().mean()
    close((a[:, None] * push).mean(0) @ E_y / E_y.norm(), mean, atol=1e-10, rtol=0)


def test_a_push_by_hand():
    push = Push.of(torch.tensor([-1.0, -3.0]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert push == Push(-1.0, 2.0, pytest.approx(12.5**0.5 / 2))
    close(Push(-1.0, 2.0, 5.0).write(torch.tensor([0.0, 9.0]), 4.0), torch.tensor([0.0, -10.0]))
    with pytest.raises(UserError, match="fires nowhere"):
        Push.of(torch.zeros(0), torch.zeros(0, 2))


def test_rank_one():
    W, u, v = torch.eye(2), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    assert rank_one(W, u, v).tolist() == [[4, 0], [6, 1]]
    assert rank_one(W, u, v, old=torch.tensor([1.0, 0.0])).tolist() == [[1, 0], [6, 1]]


def test_a_bias_is_added_at_every_position(exact, tokens):
    bias = torch.randn(16, generator=generator()).double()
    edited = edited_target(exact.target, {}, {"blocks.1.mlp.down": bias})
    x = exact.target.embed(tokens)
    for block in exact.target.blocks:
        x = block(x)
    close(edited(tokens), (rms_norm(x + bias) @ exact.target.unembedding.T).detach(), atol=1e-12, rtol=0)


def test_what_is_not_finite_is_no_target(exact):
    name = "blocks.1.mlp.down"
    with pytest.raises(UserError, match="1.mlp.down is not finite"):
        edited_target(exact.target, {name: exact.W(name) * float("nan")})


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


def test_a_lora_begins_at_the_target_and_descends(exact, tokens):
    names = ["blocks.0.attn.q", "blocks.1.mlp.down"]
    W, seen = {name: exact.W(name) for name in names}, []

    def loss(new, step):
        assert step == len(seen)
        seen.append((weights.logits_with(exact.target, new, tokens).log_softmax(-1)[..., 5]).mean().neg())
        return seen[-1]

    nothing = weights.train_lora(W, loss, 0, 1e-2, generator())
    assert all(torch.equal(change, torch.zeros_like(W[name])) for name, change in nothing.items())
    for rank in (1, 3):
        seen.clear()
        change = weights.train_lora(W, loss, 20, 1e-2, generator(), rank)
        close(seen[0], exact.target(tokens).log_softmax(-1)[..., 5].mean().neg())
        assert seen[-1] < seen[0] - 0.1
        assert [int(torch.linalg.matrix_rank(change[name])) for name in names] == [rank] * 2
        after = edited_target(exact.target, {name: W[name] + change[name] for name in names})(tokens)
        assert after.log_softmax(-1)[..., 5].mean() > -seen[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Reads


def test_correlation_against_numpy():
    x, fires = torch.randn(50, 3, generator=generator()), torch.rand(50, generator=generator(1)) < 0.3
    x[:, 2] = 4.0
    expected = torch.stack([x[:, i].double() for i in range(2)] + [fires.double()])
    close(weights.correlation(x, fires)[:2], torch.corrcoef(expected)[2, :2])
    assert weights.correlation(x, fires)[2] == 0 and not weights.correlation(x, fires & False).any()


def test_difference_of_means():
    x = torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 5.0], [2.0, 5.0]]).double()
    fires = torch.tensor([True, True, False, False])
    assert weights.difference_of_means(x, fires).tolist() == [1.0, -4.0]
    x, fires = torch.randn(400, 2, generator=generator()).double(), torch.arange(400) < 200
    x = x @ torch.tensor([[1.0, 0.9], [0.0, 0.3]]).double()  # the second feature follows the first
    x[fires] += torch.tensor([0.0, 1.0])
    plain, whitened = (weights.difference_of_means(x, fires, ridge) for ridge in (None, 1e-6))
    d = weights.correlation(torch.stack((x @ plain, x @ whitened), 1), fires)
    assert d[1] > d[0] + 0.2


# ---------------------------------------------------------------------------------------------------------------------
# Costs


def test_regions_by_hand():
    fires = torch.tensor([[0, 0, 0, 1, 0, 0, 0], [0] * 7, [1, 0, 0, 0, 0, 0, 1]]).bool()
    found = regions(fires, 2)
    assert torch.equal(found["firing"], fires) and found["all"].all()
    assert found["around"].int().tolist() == [[0, 1, 1, 0, 1, 1, 0], [0] * 7, [0, 1, 1, 0, 1, 1, 0]]
    assert found["elsewhere"].int().tolist() == [[1, 0, 0, 0, 0, 0, 1], [1] * 7, [0, 0, 0, 1, 0, 0, 0]]
    assert torch.equal(sum(part.int() for name, part in found.items() if name != "all"), torch.ones(3, 7).int())


def test_costs_by_hand():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    found = costs(p.log()[None] + 3, q.log()[None] - 1, torch.tensor([0]), token=2)
    two = torch.tensor(2.0).log().item()
    close(found["kl"], torch.tensor([0.25 * two]))
    close(found["reverse"], torch.tensor([0.25 * two]))
    close(found["ce"], torch.tensor([two]))
    close(found["p"], torch.tensor([0.5]))
    assert "p" not in costs(p.log()[None], q.log()[None], torch.tensor([0]))


def test_costs_of_nothing_are_0_and_of_anything_not_below(exact, write):
    target, x = exact.target.float(), torch.randint(0, 49, (5, 9), generator=generator())
    same = weights.costs_on(target, edited_target(target, {}), x)
    assert all(torch.equal(value, torch.zeros(5, 8)) for value in same.values())
    edited = edited_target(target, {name: W.float() for name, W in rewritten(exact, write).items()})
    whole, parts = (weights.costs_on(target, edited, x, 3, n) for n in (5, 2))
    for what, value in whole.items():
        assert value.shape == (5, 8) and (what == "ce" or (value >= 0).all())
        close(parts[what], value, atol=1e-5, rtol=1e-5)
    close(whole["p"], edited(x[:, :-1]).softmax(-1)[..., 3])


def test_bootstrap():
    values, region = torch.tensor([[1.0, 5], [3, 7], [2, 2]]), torch.tensor([[1, 0], [1, 1], [0, 0]]).bool()
    draws = torch.tensor([[1.0, 1, 1], [2, 1, 0], [0, 0, 3]]).double()
    found = bootstrap(values, region, draws)
    assert found[0] == weights.mean_over(values, region) == 11 / 3 and found[1] == 12 / 4 and found[2].isnan()
    draws = resampled(30, 500, generator())
    assert draws.shape == (501, 30) and (draws[0] == 1).all() and (draws.sum(1) == 30).all()
    x = torch.randn(30, 1, generator=generator(1))
    spread = bootstrap(x, torch.ones(30, 1).bool(), draws)[1:].std()
    assert spread == pytest.approx((x.std(correction=0) / 30**0.5).item(), rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# A run: names, halves, a saved target


@pytest.fixture
def opened(whole):
    return open_run(whole, device="cpu")


def test_names(opened):
    run, _ = opened
    mean_g = evaluated_importances(run, opened[1])[0]
    live = names_of(run, live_columns(run, mean_g))
    assert [weights.name_of(piece) for piece in weights.pieces_named(run, mean_g, live)] == live
    assert weights.pieces_named(run, mean_g, ["blocks." + live[0]]) == weights.pieces_named(run, mean_g, [live[0]])
    every = names_of(run, torch.arange(len(mean_g)).numpy())
    for column, name in enumerate(every):
        if name in live:
            assert weights.column_of(run.decomposition, weights.pieces_named(run, mean_g, [name])[0]) == column
    mean_g = mean_g.clone()
    mean_g[every.index(live[0])] = 0
    for name, said in ((live[0], "is dead"), ("1.mlp.down:999", "is no subcomponent"), ("1.mpl.down:0", "1.mlp.down:")):
        with pytest.raises(UserError, match=said) as refused:
            weights.pieces_named(run, mean_g, [name])
        assert name in str(refused.value) and "live ones near it: " in str(refused.value)
    with pytest.raises(UserError, match="named twice"):
        weights.pieces_named(run, mean_g, [live[1], "blocks." + live[1]])


def test_nearest():
    live = ["0.mlp.up:3", "1.mlp.down:2", "1.mlp.down:9", "1.mlp.down:12", "1.mlp.down:40"]
    assert weights.nearest("1.mlp.down:10", live, 2) == ["1.mlp.down:9", "1.mlp.down:12"]
    assert weights.nearest("mlp.up:1", live) == ["0.mlp.up:3"]
    assert weights.nearest("", live) and weights.nearest("1.mlp.down:" + "9" * 5000, live)


def test_a_token_is_one_token(opened):
    corpus = opened[1]
    assert all(weights.token_named(corpus, corpus.encoding.decode([i])) == i for i in (40, 300))
    for text in ("", "xyzzy plugh"):
        with pytest.raises(UserError, match=f"token={text!r} is not one token but"):
            weights.token_named(corpus, text)


def test_halves_share_no_position():
    corpus = data.Corpus("", {"train": None, "val": torch.arange(1001).numpy().astype("uint16")}, None, "")
    A, B = weights.halves(corpus, 10, 1000)
    assert A.shape == (49, 11) and B.shape == (50, 11)
    assert (A[:, 1:] - A[:, :-1] == 1).all() and A.max() < 500 <= B.min()
    for half in (A, B):
        assert half[:, :-1].unique().numel() == half[:, :-1].numel()
    few = weights.halves(corpus, 10, 7)[1]
    assert torch.equal(few, B[:7]) and not torch.equal(weights.halves(corpus, 10, 7, seed=1)[1], few)
    with pytest.raises(UserError, match="half of its validation text"):
        weights.halves(corpus, 501, 7)


def test_where_it_fires(opened):
    run, corpus = opened
    x = weights.halves(corpus, 16, 5)[1][:, :-1]
    fires, a = weights.firing(run, x, PIECES, 2)
    _, g, inputs = run.importances(x)
    assert fires.shape == a.shape == (5, 16, 3)
    for i, (name, c) in enumerate(PIECES):
        assert torch.equal(fires[..., i], g[..., weights.column_of(run.decomposition, (name, c))] > 0)
        l = run.decomposition.names.index(name)
        close(a[..., i], inputs[l] @ run.decomposition.V[name][:, c].detach(), atol=1e-5, rtol=1e-5)


def test_a_saved_target_is_a_target(opened, tmp_path):
    run, corpus = opened
    new = rewritten(run.decomposition, {PIECES[0]: 3.0})
    folder = weights.save_target(tmp_path / "edited", run, new)
    checkpoint = load_checkpoint(folder / "checkpoint.pt", "target")
    x = corpus.batch("val", 0, 2, 16)
    assert torch.equal(build_target(checkpoint)(x[:, :-1]), edited_target(run.decomposition.target, new)(x[:, :-1]))
    assert is_run_folder(folder) and not list(folder.glob("*.lock"))
    del run.checkpoint["target"]["config"]["val_every"]  # as if there had been no such setting then
    older = weights.save_target(tmp_path / "older", run, new)
    assert json.loads((older / "config.json").read_text())["val_every"] == train_target.Config.val_every
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        weights.save_target(folder, run, {})
    assert (folder / "checkpoint.pt").read_bytes() == before
