"""Post-hoc importances: where they begin, that rows are independent, what the adversary moves, a planted circuit."""

import pytest
import torch
from test_attribution import ABOVE, BELOW, T, made

from losses import mask, sample_sources
from studies.importances import VARIANTS, ascend, ce_at_end, judge, kl_at_end, largest, post_hoc

close = torch.testing.assert_close
R = 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(
    params=[pytest.param(BELOW, id="C below rank"), pytest.param(ABOVE, id="C above rank", marks=pytest.mark.slow)]
)
def f(request):
    return made(request.param)


@pytest.fixture
def case(f):
    """x [R, T], y [R], z [R, T, C] of which a third is below 0 and some are above 1, coefficients [R]."""
    x = torch.randint(0, 49, (R, T), generator=generator(1))
    z = torch.rand(R, T, sum(f.C.values()), generator=generator(2), dtype=torch.float64) * 2 - 0.7
    return x, torch.tensor([7, 3, 7]), z, torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)


def run(f, case, variant, steps, rows=slice(None), **changes):
    x, y, z, coefficient = (part[rows] for part in case)
    coefficient = changes.pop("coefficient", coefficient)
    return post_hoc(f, x, ce_at_end(f, y), z, coefficient, variant, steps, generator(), **changes)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def test_losses_are_of_the_last_position(f, case):
    x, y, _, _ = case
    hidden = f.f(x)
    logits = (hidden[:, -1] @ f.target.unembedding.T).detach()
    close(ce_at_end(f, y)(hidden).detach(), -logits.log_softmax(-1)[torch.arange(R), y])
    twice = ce_at_end(f, y)(hidden.repeat(2, 1, 1)).detach()
    close(twice, ce_at_end(f, y)(hidden).detach().repeat(2))
    close(kl_at_end(f, hidden)(hidden).detach(), torch.zeros(R, dtype=torch.float64))
    other = hidden.flip(0)
    log_p, log_q = logits.log_softmax(-1), logits.flip(0).log_softmax(-1)
    close(kl_at_end(f, hidden)(other).detach(), (log_p.exp() * (log_p - log_q)).sum(-1))


# ---------------------------------------------------------------------------------------------------------------------
# Post hoc


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_begins_at_gamma_bit_for_bit(f, case, variant):
    assert torch.equal(run(f, case, variant, 0), case[2].clamp(0, 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_not_alive_stays_at_0_and_no_weight_moves(f, case, variant):
    before = [p.clone() for p in f.parameters()]
    g = run(f, case, variant, 5, lr=0.3)
    assert (g[case[2] <= 0] == 0).all() and g.min() >= 0 and g.max() <= 1
    assert (g != case[2].clamp(0, 1)).any() and not g.requires_grad
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(f.parameters(), before))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_as_if_alone(f, case, variant):
    together = run(f, case, variant, 5, lr=0.1)
    for i in range(R):
        close(run(f, case, variant, 5, slice(i, i + 1), lr=0.1)[0], together[i], rtol=0, atol=1e-9)


def test_without_a_price_the_loss_of_ci_falls(f, case):
    x, y, _, _ = case
    loss = ce_at_end(f, y)
    at = lambda g: loss(f(x, torch.nn.functional.pad(g, (0, f.L)))).detach()
    free = run(f, case, "ci", 30, coefficient=torch.zeros(R, dtype=torch.float64))
    assert (at(free) < at(run(f, case, "ci", 0))).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_high_price_empties_the_circuit_and_a_higher_one_never_fills_it(f, case, variant):
    z = case[2].clamp(max=1)
    dear = torch.full((R,), 1e4, dtype=torch.float64)
    assert not run(f, (case[0], case[1], z, dear), variant, 60, lr=0.05).any()


def test_the_floor_changes_no_circuit(f, case, monkeypatch):
    """At FLOOR 1e-3 or 1e-4 in the power the same nodes are left."""
    found = []
    for floor in (1e-3, 1e-4):
        monkeypatch.setattr("studies.importances.FLOOR", floor)
        found.append((run(f, case, "ci", 60, lr=0.05) > 0).sum((1, 2)).double())
    assert (found[0] - found[1]).abs().max() <= 0.05 * found[0].max()


# ---------------------------------------------------------------------------------------------------------------------
# Adversary and judges


def test_the_ascent_raises_its_loss_and_moves_only_what_is_alive(f, case):
    x, y, z, _ = case
    alive, g, n = z > 0, z.clamp(0, 1), z.shape[-1]
    start = sample_sources((R, T, n + f.L), generator(3)).double()
    r, met = ascend(f, x, ce_at_end(f, y), g, alive, start.clone(), 20, 0.1)
    assert met.shape == (21, R) and (met[-1] > met[0]).all() and r.min() >= 0 and r.max() <= 1
    moved = r != start
    assert not moved[..., n:].any() and not moved[..., :n][~alive].any() and moved[..., :n][alive].any()
    close(met[-1], ce_at_end(f, y)(f(x, mask(g, r))).detach())
    close(met[0], ce_at_end(f, y)(f(x, mask(g, start))).detach())


def test_judges_of_everything_and_of_nothing(f, case):
    x, y, z, _ = case
    everything = torch.ones_like(z)
    found = judge(f, x, y, everything, everything > 0, generator())
    _, inputs = f.target_pass(x)
    p = lambda hidden: (hidden[:, -1] @ f.target.unembedding.T).softmax(-1)[torch.arange(R), y].detach()
    close(found["ci"], p(f(x, torch.cat((everything, torch.zeros(R, T, f.L).double()), -1))))
    for name in ("adversarial", "adversarial_20"):  # nothing but Delta is left to draw
        assert found[name].shape == (R,) and (found[name] > 0).all()
    nothing = judge(f, x, y, 0 * everything, everything > 0, generator())
    close(nothing["ci"], p(f(x, torch.zeros(R, T, z.shape[-1] + f.L).double())))
    assert (nothing["adversarial_20"] < nothing["stochastic"]).all()


def test_the_judge_of_20_steps_is_at_least_as_hard(f, case):
    x, y, z, _ = case
    found = judge(f, x, y, 0.2 * z.clamp(0, 1), z > 0, generator())
    assert (found["adversarial_20"] <= found["adversarial"] * 1.01).all()
    assert (found["adversarial"] < found["stochastic"]).all()


def test_the_largest_are_taken_of_what_is_alive():
    score = torch.tensor([[[3.0, 1.0], [2.0, 5.0]], [[1.0, 2.0], [3.0, 4.0]]])
    alive = torch.tensor([[[True, True], [True, False]], [[True, True], [True, True]]])
    found = largest(score, alive, torch.tensor([2, 9]))
    assert found.tolist() == [[[1, 0], [1, 0]], [[1, 1], [1, 1]]]


# ---------------------------------------------------------------------------------------------------------------------
# T8: a planted circuit


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_planted_circuit_is_found_exactly(variant):
    """Token 1 at position 2, moved by 0.v:5 there and 0.o:5 at the end, says 7; all else is alive, and does nothing."""
    f, at = made(ABOVE), 2
    Q, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator(4), dtype=torch.float64))
    with torch.no_grad():
        f.target.embed.weight[:] = torch.randn(50, 4, generator=generator(5), dtype=torch.float64) @ Q[:, 8:12].T
        f.target.embed.weight[1], f.target.embed.weight[7] = 8 * Q[:, 0], 12 * Q[:, 4]
        for name in f.names:
            f.W(name).zero_(), f.U[name].zero_()
        for name, to, fro in (("blocks.0.attn.v", 1, 0), ("blocks.0.attn.o", 4, 1)):
            f.U[name][:, 5], f.V[name][:, 5] = 4 * Q[:, to], Q[:, fro]
            f.W(name)[:] = torch.outer(4 * Q[:, to], Q[:, fro])
    x = torch.full((1, T), 20)
    x[0, at] = 1
    p = (f.f(x)[0, -1] @ f.target.unembedding.T).softmax(-1)[7]
    assert p > 0.9
    y, first = torch.tensor([7]), dict(zip(f.names, [0, *torch.tensor([*f.C.values()]).cumsum(0).tolist()]))
    z = torch.ones(1, T, sum(f.C.values()), dtype=torch.float64)
    g = post_hoc(f, x, ce_at_end(f, y), z, torch.tensor([0.1]).double(), variant, 200, generator(), lr=0.03)
    planted = {(at, first["blocks.0.attn.v"] + 5), (T - 1, first["blocks.0.attn.o"] + 5)}
    assert set(map(tuple, (g[0] > 0).nonzero().tolist())) == planted
