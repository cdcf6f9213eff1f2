import pytest
import torch

import cost
from ci_fn import CITransformer, lower_leaky, upper_leaky
from flags import UserError
from model import Block

# z: forward value, dL/dz given dL/dg = +1, and given -1, with leak 0.01.
LOWER = [
    (-2, 0, 0, -0.01),
    (-0.5, 0, 0, -0.01),
    (0, 0, 0, -0.01),
    (0.25, 0.25, 1, -1),
    (1, 1, 1, -1),
    (1.5, 1, 0, 0),
    (3, 1, 0, 0),
]
UPPER = [(-2, 0, 0, 0), (-0.5, 0, 0, 0), (0, 0, 1, -1), (0.25, 0.25, 1, -1), (1, 1, 1, -1)]
UPPER += [(1.5, 1.005, 0.01, -0.01), (3, 1.02, 0.01, -0.01)]
TABLE = [(lower_leaky, *row) for row in LOWER] + [(upper_leaky, *row) for row in UPPER]


@pytest.mark.parametrize("sigmoid, at, value, if_plus, if_minus", TABLE)
def test_sigmoid_value_and_gradient(sigmoid, at, value, if_plus, if_minus):
    z = torch.tensor([at, at], dtype=torch.float32, requires_grad=True)
    g = sigmoid(z)
    g.backward(torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(g.detach(), torch.tensor([value, value], dtype=torch.float32))
    torch.testing.assert_close(z.grad, torch.tensor([if_plus, if_minus], dtype=torch.float32))


@pytest.mark.parametrize(
    "sigmoid, at, incoming, expected", [(lower_leaky, -1.0, -2.0, -0.4), (upper_leaky, 2.0, 2.0, 0.4)]
)
def test_gradient_in_the_leak_is_scaled_by_it(sigmoid, at, incoming, expected):
    z = torch.tensor(at, requires_grad=True)
    sigmoid(z, leak=0.2).backward(torch.tensor(incoming))  # 0.2 * 2
    assert z.grad.item() == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------------

d_INS, C = [16, 5, 32], 9


def make(**settings):
    torch.manual_seed(0)
    return CITransformer(d_INS, C, **(dict(d_ci=24, n_layer=2, n_head=3, d_mlp=40) | settings))


@pytest.fixture
def gamma():
    return make()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 6, d_in, generator=generator) for d_in in d_INS]


def test_one_logit_per_position_and_subcomponent(gamma, inputs):
    assert gamma(inputs).shape == (2, 6, C)


@pytest.mark.parametrize("changed, seen", [(5, 0), (0, 5)])
def test_attention_is_bidirectional(gamma, inputs, changed, seen):
    z = gamma(inputs)
    inputs[1][:, changed] += torch.tensor([1.0, -1, 2, 0, 0])
    assert ((gamma(inputs) - z)[:, seen].abs().amax(-1) > 1e-4).all()


def test_sequences_of_a_batch_do_not_mix(gamma, inputs):
    z = gamma(inputs)
    inputs[0][1] += torch.arange(16.0)
    assert torch.equal(gamma(inputs)[0], z[0])


def test_order_of_positions_matters(gamma, inputs):
    assert not torch.allclose(gamma([x.flip(1) for x in inputs]).flip(1), gamma(inputs), atol=1e-4)


@pytest.mark.parametrize("i", range(len(d_INS)))
def test_each_input_is_normalised_on_its_own(gamma, inputs, i):
    z = gamma(inputs)
    inputs[i] = inputs[i] * 7
    torch.testing.assert_close(gamma(inputs), z, atol=1e-5, rtol=1e-5)


def test_parameter_count(gamma):
    D, d_ci, d_mlp = 16 + 5 + 32, 24, 40
    block = 4 * d_ci * d_ci + (d_ci * d_mlp + d_mlp) + (d_mlp * d_ci + d_ci)  # q, k, v, o without bias; up; down
    assert sum(p.numel() for p in gamma.parameters()) == (D * d_ci + d_ci) + 2 * block + (d_ci * C + C)


def test_heads_must_divide_d_ci_into_pairs():
    with pytest.raises(UserError, match="d_ci=20: RoPE needs a multiple of 2 [*] n_head=6"):
        CITransformer(d_INS, C, d_ci=20, n_layer=1, n_head=3, d_mlp=8)


def test_units_are_all_of_it_in_order(gamma):
    parts = [id(p) for unit in gamma.units() for p in unit.parameters()]
    assert parts == [id(p) for p in gamma.parameters()]


def of_a_pass(gamma, inputs, run=None):
    """z and every gradient of sum(z^2), as `run` computes z."""
    gamma.zero_grad()
    z = (gamma if run is None else run)(inputs)  # a compiled module has no truth value
    z.square().sum().backward()
    return [z.detach(), *(p.grad for p in gamma.parameters())]


@pytest.mark.parametrize("memory_budget, again", [(1.0, 0), (0.5, 2), (0.01, 3), (0.0, 4)])
def test_memory_budget_changes_no_number(inputs, monkeypatch, memory_budget, again):
    """The blocks above the budget, of 4, are computed again in the backward pass: the same bits."""
    expected, calls, forward = of_a_pass(make(n_layer=4), inputs), [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda block, x: calls.append(block) or forward(block, x))
    found = of_a_pass(make(n_layer=4, memory_budget=memory_budget), inputs)
    assert len(calls) == 4 + again
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_memory_budget_changes_no_number_compiled(inputs):
    gamma = make(memory_budget=0.5)
    compiled = torch.compile(gamma, fullgraph=True, dynamic=False, backend="aot_eager")
    for a, b in zip(of_a_pass(gamma, inputs, compiled), of_a_pass(make(), inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6 * b.abs().max().item(), rtol=0)


def test_a_smaller_memory_budget_holds_less():
    def peak(memory_budget):
        gamma, inputs = make(n_layer=4, d_mlp=400, memory_budget=memory_budget), [torch.ones(2, 50, d) for d in d_INS]
        with cost.Watch() as watch:
            gamma(inputs).sum().backward()
        return watch.most

    # A block keeps the hidden layer of its MLP before and after the GELU, 400 numbers a position: 3 of 4 need not.
    assert peak(1.0) - peak(0.0) > 3 * 2 * 400 * 100 * 4
    assert peak(0.0) < peak(0.5) < peak(1.0)
