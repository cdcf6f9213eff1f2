import copy
import math
import os
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import cost
import model
from model import GPT, Attention, Decomposition, GPTConfig, masked_product, rms_norm, rope
from run import UserError

close = torch.testing.assert_close


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# A. The target


@pytest.mark.parametrize("t", [1, 4, 7])
def test_gpt_is_causal(gpt, tokens, t):
    changed = tokens.clone()
    changed[:, t] = 49
    difference = (gpt(changed) - gpt(tokens)).abs().amax(-1)  # [B, T]
    assert difference[:, :t].max() < 1e-5
    assert difference[:, t:].min() > 1e-3


def test_too_many_tokens_for_the_context(gpt):
    with pytest.raises(UserError, match="T=9 tokens: the target's context is 8"):
        gpt(torch.zeros(1, 9, dtype=torch.long))


def test_unembedding_is_tied(gpt, tokens):
    logits = gpt(tokens)
    with torch.no_grad():
        gpt.embed.weight[49] *= 3  # a token that never occurs in the input
    close(gpt(tokens), logits * torch.tensor([1.0] * 49 + [3.0]))


def test_gpt_parameter_count(gpt):
    # Embedding, then per block q, k, v, o and up, down, all without biases.
    assert sum(p.numel() for p in gpt.parameters()) == 50 * 16 + 2 * (4 * 16 * 16 + 2 * 16 * 32)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n_layer": 0}, "n_layer=0: must be above 0"),
        ({"d_model": 12, "n_head": 4}, "d_model=12: .* multiple of 2 [*] n_head=8"),
    ],
)
def test_gpt_config_refuses(settings, message):
    with pytest.raises(UserError, match=message):
        GPTConfig(**settings)


def test_rms_norm_by_hand():
    x = torch.tensor([[3.0, 4, 0, 0], [0, 0, 0, 0]])  # RMS = 5 / 2, and no division by zero
    close(rms_norm(x), torch.tensor([[1.2, 1.6, 0, 0], [0, 0, 0, 0]]))


def test_rope_by_hand():
    # d = 4: the pairs (0, 2) and (1, 3) turn by 1 and by 10,000^(-1/2) = 0.01 radians a position.
    x = torch.tensor([1.0, 1, 0, 0]).expand(1, 1, 3, 4)
    expected = [[math.cos(t), math.cos(0.01 * t), math.sin(t), math.sin(0.01 * t)] for t in range(3)]
    close(rope(x)[0, 0], torch.tensor(expected))


def test_rope_products_depend_on_the_distance_alone():
    q, k = (torch.randn(8, generator=torch.Generator().manual_seed(seed)).expand(1, 1, 6, 8) for seed in (0, 1))
    scores = (rope(q) @ rope(k).mT)[0, 0]  # [T, T]
    close(scores[1:, 1:], scores[:-1, :-1])
    assert scores[0].std() > 0.1


def test_attention_with_equal_scores_averages_the_past():
    torch.manual_seed(0)
    attention = Attention(d_model=8, n_head=2, causal=True)
    nn.init.zeros_(attention.q.weight)
    x = torch.randn(2, 5, 8)
    past = torch.stack([(x[:, : t + 1] @ attention.v.weight.T).mean(1) for t in range(5)], 1)
    close(attention(x), past @ attention.o.weight.T)


# ---------------------------------------------------------------------------------------------------------------------
# B. Identities of the masked twin


def test_masked_product_by_hand():
    U, V = torch.tensor([[1.0, 0], [1, 2]]), torch.tensor([[1.0, 0], [0, 1]])  # U_1 V_1^T = [[1, 0], [1, 0]]
    W = torch.tensor([[1.0, 0], [0, 1]])  # Delta = W - [[1, 0], [1, 2]] = [[0, 0], [-1, -1]]
    m, m_Delta = torch.tensor([0.5, 1]), torch.tensor([0.25])
    # W' = 0.5 [[1, 0], [1, 0]] + [[0, 0], [0, 2]] + 0.25 [[0, 0], [-1, -1]] = [[0.5, 0], [0.25, 1.75]]
    x = torch.tensor([1.0, 2])
    close(masked_product(x, W @ x, m, m_Delta, U, V), torch.tensor([0.5, 3.75]))


def overwritten(decomposition, m, chosen=None):
    """f(x | W') for m [C + L], made apart: a copy of the target with weights sum_c U_c m_c V_c^T + m_Delta Delta."""
    twin = copy.deepcopy(decomposition.target)
    start, n_C = 0, sum(decomposition.C.values())
    with torch.no_grad():
        for i, (name, C) in enumerate(decomposition.C.items()):
            U, V, W = decomposition.U[name], decomposition.V[name], twin.get_submodule(name).weight
            U_m = U * m[start : start + C]
            if chosen is None or i in chosen:
                W.copy_(U_m @ V.T + m[n_C + i] * (W - U @ V.T))
            start += C
    return twin


def test_without_masks_it_is_the_target(decomposition, gpt, tokens):
    assert torch.equal(decomposition(tokens), gpt(tokens))


def test_all_masks_one_give_the_target(decomposition, gpt, tokens):
    assert torch.equal(decomposition(tokens, torch.ones(3, 8, 52 + 12)), gpt(tokens))


def test_it_can_end_in_the_last_hidden_state(decomposition, gpt, tokens):
    ends = Decomposition(gpt, {"*.q": 3, "*.up": 7, "*": 4}, torch.Generator().manual_seed(2), ends_in="hidden")
    m = rand(3, 8, 64)
    for hidden, logits in [
        (ends(tokens), gpt(tokens)),
        (ends.target_pass(tokens)[0], gpt(tokens)),
        (ends(tokens, m), decomposition(tokens, m)),
    ]:
        assert hidden.shape == (3, 8, 16)
        close(hidden @ gpt.embed.weight.T, logits)
    assert all(torch.equal(*xs) for xs in zip(ends.target_pass(tokens)[1], decomposition.target_pass(tokens)[1]))


@pytest.mark.parametrize("m_Deltas", [torch.zeros(12), torch.ones(12), rand(12, seed=1)], ids=["0", "1", "own"])
def test_constant_masks_give_the_model_with_weights_W_prime(decomposition, tokens, m_Deltas):
    m = torch.cat([rand(52), m_Deltas])
    close(decomposition(tokens, m.expand(3, 8, 64)), overwritten(decomposition, m)(tokens), atol=1e-4, rtol=1e-4)


def test_masks_broadcast_over_batch_and_positions(decomposition, tokens):
    m = rand(64)
    close(decomposition(tokens, m.expand(1, 1, 64)), decomposition(tokens, m.expand(3, 8, 64)))


@pytest.fixture
def linear():
    """One nn.Linear with bias, d_in 5, d_out 4, C = 3."""
    torch.manual_seed(0)
    return Decomposition(nn.Sequential(nn.Linear(5, 4)), 3)


def einsum_masked(linear, x, m):
    U, V, Delta, bias = linear.U["0"], linear.V["0"], linear.Delta("0"), linear.target[0].bias
    return (
        torch.einsum("oc,btc,ic,bti->bto", U, m[..., :3], V, x)
        + torch.einsum("bt,oi,bti->bto", m[..., 3], Delta, x)
        + bias
    )


def test_masks_differ_by_position_and_the_bias_stays(linear):
    x, m = torch.randn(2, 6, 5), rand(2, 6, 4)
    close(linear(x, m), einsum_masked(linear, x, m))


def test_routing_chooses_per_position(linear):
    x, m, routing = torch.randn(2, 6, 5), rand(2, 6, 4), rand(2, 6, 1, seed=1) < 0.5
    expected = torch.where(
        routing, einsum_masked(linear, x, m), F.linear(x, linear.target[0].weight, linear.target[0].bias)
    )
    close(linear(x, m, routing), expected)


def test_routing_nowhere_is_the_target(decomposition, gpt, tokens):
    assert torch.equal(decomposition(tokens, rand(3, 8, 64), torch.zeros(3, 8, 12, dtype=torch.bool)), gpt(tokens))


def test_routing_everywhere_is_no_routing(decomposition, tokens):
    m = rand(3, 8, 64)
    assert torch.equal(decomposition(tokens, m, torch.ones(3, 8, 12, dtype=torch.bool)), decomposition(tokens, m))


def test_routing_chooses_matrices(decomposition, tokens):
    m, chosen = rand(64), [0, 3, 4, 11]
    routing = torch.zeros(3, 8, 12, dtype=torch.bool)
    routing[..., chosen] = True
    routed = decomposition(tokens, m.expand(3, 8, 64), routing)
    close(routed, overwritten(decomposition, m, chosen)(tokens), atol=1e-4, rtol=1e-4)


def test_toy_without_a_sequence_axis():
    torch.manual_seed(0)
    toy = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    f = Decomposition(toy, {"0": 5, "2": 2})
    x, m = torch.randn(7, 4), rand(7, 5 + 2 + 2)
    close(f(x, m), torch.cat([overwritten(f, m[b])(x[b : b + 1]) for b in range(7)]), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is left behind; gradients


def test_no_masked_forward_disturbs_another(decomposition, gpt, tokens):
    plain, m1, m2 = gpt(tokens), rand(3, 8, 64, seed=1), rand(3, 8, 64, seed=2)
    first = decomposition(tokens, m1)
    decomposition(tokens, m2)
    assert torch.equal(decomposition(tokens, m1), first)
    assert torch.equal(gpt(tokens), plain)


def test_the_target_is_whole_after_a_failed_masked_forward(decomposition, gpt, tokens):
    plain = gpt(tokens)
    with pytest.raises(RuntimeError):
        decomposition(tokens, rand(3, 8, 63))
    assert torch.equal(gpt(tokens), plain)


def test_target_parameters_are_frozen_and_untouched(decomposition, gpt, tokens):
    before = copy.deepcopy(gpt.state_dict())
    decomposition.target_pass(tokens)
    decomposition(tokens, rand(3, 8, 64)).square().sum().backward()
    assert all(torch.equal(before[name], p) for name, p in gpt.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in gpt.parameters())


def gradients(decomposition, tokens, run, **kwargs):
    """Gradients of U, V and m of sum(output^2), as `run` computes the output."""
    m = rand(3, 8, 64).requires_grad_()
    decomposition.zero_grad()
    run(tokens, m, **kwargs).square().sum().backward()
    return [p.grad for p in (*decomposition.subcomponents(), m)]


def test_frozen_keeps_gradients_from_U_and_V_only(decomposition, tokens):
    *of_UV, of_m = gradients(decomposition, tokens, decomposition, frozen=True)
    assert all(grad is None for grad in of_UV)
    close(of_m, gradients(decomposition, tokens, decomposition)[-1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputing_activations_gives_equal_gradients(decomposition, tokens, use_reentrant):
    def recomputing(tokens, m):
        return checkpoint(decomposition, tokens, m, use_reentrant=use_reentrant)

    for grad, expected in zip(
        gradients(decomposition, tokens, recomputing), gradients(decomposition, tokens, decomposition), strict=True
    ):
        close(grad, expected)


@pytest.mark.parametrize("memory_budget, again", [(1.0, 0), (0.5, 6), (0.01, 11), (0.0, 12)])
def test_memory_budget_changes_no_number(decomposition, gpt, tokens, monkeypatch, memory_budget, again):
    """The masked products above the budget, of 12, are computed again in the backward pass: the same bits."""
    products = []

    def counted(*args):
        products.append(args)
        return masked_product(*args)

    monkeypatch.setattr(model, "masked_product", counted)
    short = Decomposition(gpt, decomposition.C, torch.Generator().manual_seed(2), memory_budget=memory_budget)
    expected = gradients(decomposition, tokens, decomposition)
    products.clear()
    grads = gradients(short, tokens, short)
    assert len(products) == 12 + again
    assert all(torch.equal(grad, other) for grad, other in zip(grads, expected, strict=True))
    m = rand(3, 8, 64)
    assert torch.equal(short(tokens, m), decomposition(tokens, m))
    *of_UV, of_m = gradients(short, tokens, short, frozen=True)
    assert all(grad is None for grad in of_UV) and torch.equal(of_m, expected[-1])


def test_a_smaller_memory_budget_holds_less():
    def peak(memory_budget):
        f = Decomposition(nn.Sequential(*(nn.Linear(4, 4) for _ in range(8))), 64, memory_budget=memory_budget)
        with cost.Watch() as watch:
            f(torch.ones(100, 4), torch.ones(100, 8 * 64 + 8)).sum().backward()
        return watch.most

    # A product keeps V^T x and its masked twin, 2 x 64 numbers a position: of 8 all but the one that is computed again.
    assert peak(1.0) - peak(0.0) > 6 * 2 * 64 * 100 * 4
    assert peak(0.0) < peak(0.5) < peak(1.0)


def assert_compiled_agrees(f, x, m, backend, eager, atol=1e-6):
    """f compiled, and an eager twin: output and gradients of U, V and m, from one forward and one backward of each."""
    compiled = torch.compile(f, fullgraph=True, dynamic=False, backend=backend)
    results = []
    for f, run in ((f, compiled), (eager, eager)):
        f.zero_grad()
        m = m.detach().requires_grad_()
        output = run(x, m)
        output.square().sum().backward()
        results.append([output.detach(), m.grad, *(p.grad for p in f.subcomponents())])
    for got, expected in zip(*results, strict=True):
        close(got / expected.abs().max(), expected / expected.abs().max(), atol=atol, rtol=0)


@pytest.mark.parametrize("memory_budget", [1.0, 0.5])
def test_masked_forward_is_one_graph(tokens, memory_budget):
    """With half of the masked products computed again, too: one of two."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=50, context=8, n_layer=1, n_head=2, d_model=16, d_mlp=32))
    one, other = (Decomposition(gpt, {"*.q": 3, "*.down": 4}, memory_budget=budget) for budget in (memory_budget, 1.0))
    other.load_subcomponents(one.subcomponents_state())
    assert_compiled_agrees(one, tokens, rand(3, 8, 9), backend="aot_eager", eager=other)


@pytest.mark.slow
def test_compiled_agrees_with_eager():
    compiler = os.environ.get("CXX", "g++")
    if (
        not shutil.which(compiler)
        or subprocess.run([compiler, "-xc++", "-", "-o", os.devnull], input=b"int main() {}").returncode
    ):
        pytest.skip(f"torch.compile needs a C++ compiler, and {compiler} does not work here")
    torch.manual_seed(0)
    f = Decomposition(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), 5)
    assert_compiled_agrees(f, torch.randn(7, 4), rand(7, 12), backend="inductor", eager=f, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs, choice of matrices, saving


def test_target_pass_returns_output_and_inputs(decomposition, gpt, tokens):
    seen = {}
    for name in decomposition.names:
        gpt.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
    output, inputs = decomposition.target_pass(tokens)
    assert len(inputs) == len(seen) == 12
    assert all(torch.equal(x, seen[name]) for x, name in zip(inputs, decomposition.names))
    assert torch.equal(output, gpt(tokens))


def test_target_pass_output_carries_no_gradient(linear):
    output, _ = linear.target_pass(torch.randn(2, 6, 5, requires_grad=True))
    assert not output.requires_grad


@pytest.mark.parametrize(
    "C, expected",
    [
        ({"blocks.1.mlp.*": 9}, {"blocks.1.mlp.up": 9, "blocks.1.mlp.down": 9}),
        (  # the target's order
            {"*.down": 2, "*.1.attn.q": 3},
            {"blocks.0.mlp.down": 2, "blocks.1.attn.q": 3, "blocks.1.mlp.down": 2},
        ),
        ({"blocks.0.mlp.up": 5, "*.up": 6}, {"blocks.0.mlp.up": 5, "blocks.1.mlp.up": 6}),  # the first match counts
    ],
)
def test_patterns_choose_matrices(gpt, C, expected):
    decomposition = Decomposition(gpt, C)
    assert list(decomposition.C.items()) == list(expected.items())
    shapes = {name: (tuple(U.shape), tuple(decomposition.V[name].shape)) for name, U in decomposition.U.items()}
    linear = gpt.get_submodule
    assert shapes == {
        name: ((linear(name).out_features, n), (linear(name).in_features, n)) for name, n in expected.items()
    }


def test_an_int_chooses_every_linear(gpt):
    assert list(Decomposition(gpt, 6).C.values()) == [6] * 12


@pytest.mark.parametrize(
    "C, message",
    [
        ({"*.q": 3, "*.gate": 4}, "pattern '[*].gate' matches no nn.Linear; there are: blocks.0.attn.q, "),
        ({"*.q": 0}, "C=0 for '[*].q'"),
    ],
)
def test_patterns_refused(gpt, C, message):
    with pytest.raises(UserError, match=message):
        Decomposition(gpt, C)


def test_shared_weights_refused():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(UserError, match="1 and 0 share one weight"):
        Decomposition(tied, 2)


class Twice(nn.Module):
    """Applies its first layer twice and its second never."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.first(self.first(x))


@pytest.mark.parametrize(
    "name, message", [("first", "first is applied more than once"), ("second", "second: never applied by the target")]
)
def test_a_matrix_that_is_not_applied_exactly_once_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        Decomposition(Twice(), {name: 2}).target_pass(torch.ones(4, 3))


def test_initial_scales():
    f = Decomposition(nn.Sequential(nn.Linear(400, 300)), 100, torch.Generator().manual_seed(0))
    assert f.V["0"].std().item() == pytest.approx(400**-0.5, rel=0.02)  # N(0, 1/d_in)
    assert f.U["0"].std().item() == pytest.approx(100**-0.5, rel=0.02)  # N(0, 1/C_l)


def test_subcomponents_survive_saving(decomposition, gpt, tokens, tmp_path):
    torch.save(decomposition.subcomponents_state(), tmp_path / "state.pt")
    other = Decomposition(gpt, {"*.q": 3, "*.up": 7, "*": 4}, torch.Generator().manual_seed(9))
    other.load_subcomponents(torch.load(tmp_path / "state.pt", weights_only=True))
    m = rand(3, 8, 64)
    assert torch.equal(other(tokens, m), decomposition(tokens, m))


def test_saved_state_is_U_and_V_alone(decomposition):
    # Per layer: q 16+16, k, v, o the same, up and down 16+32, each times its C_l.
    expected = 2 * (32 * (3 + 4 + 4 + 4) + 48 * (7 + 4))
    assert sum(p.numel() for p in decomposition.subcomponents_state().values()) == expected
