import copy
import math
import os
import re
import shutil
import subprocess
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import cost
import losses
import model
from flags import UserError
from model import GPT, Attention, Decomposition, GPTConfig, masked_product, rms_norm, rope

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
    with pytest.raises(UserError, match=r"m is torch.float32 \(3, 8, 63\): it must be torch.float32 \[..., 64\]"):
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
        ({"*.q": 0}, "C=0 for '[*].q': must be a whole number, at least 1"),
        (True, "C=True for '[*]': must be a whole number"),
        ({"*.q": 2, "*.k": 3.0}, "C=3.0 for '[*].k': must be a whole number"),
        (math.nan, "C=nan for '[*]': must be a whole number"),
        (None, "C=None for '[*]': must be a whole number"),
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


def passes(f, x):
    """The target's pass, and the masked one without a target's before it."""
    return [lambda: f.target_pass(x), lambda: f(x, torch.ones(sum(f.C.values()) + f.L))]


def assert_refused(target, x, message, C=2):
    for i in range(2):
        with pytest.raises(UserError, match=message) as error:
            passes(Decomposition(target, C), x)[i]()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, n", [("first", 2), ("second", 0)])
def test_a_matrix_that_is_not_applied_exactly_once_is_refused(name, n):
    message = f"{name} cannot be decomposed: the target applies it {n} times in a pass"
    assert_refused(Twice(), torch.ones(4, 3), message, {name: 2})
    f = Decomposition(Twice(), {name: 2})
    f.searched = True  # also when other uses are no longer searched for
    with pytest.raises(UserError, match=message):
        f(torch.ones(4, 3), torch.ones(3))


class Uses(nn.Module):
    """Applies `layer`, whose weight lies in the middle of a larger storage, and does something more, `use`."""

    def __init__(self, use):
        super().__init__()
        self.layer, self.other, self.use = nn.Linear(3, 3), nn.Linear(3, 3), use
        flat = torch.randn(30)
        self.before, W, self.after = flat[:9].view(3, 3), flat[9:18].view(3, 3), flat[18:27].view(3, 3)
        self.layer.weight = nn.Parameter(W)
        self.view, self.data, self.row = W.T, self.layer.weight.data, self.layer.weight[2].detach()  # made outside

    def forward(self, x):
        y = self.layer(x)
        self.use(self, x, self.layer.weight)
        return y


USES = {
    "matmul": lambda self, x, W: x @ W,
    "transpose": lambda self, x, W: W.T,
    "cast": lambda self, x, W: W.to(x.dtype),
    "float": lambda self, x, W: W.float(),
    "detach": lambda self, x, W: W.detach(),
    "cat": lambda self, x, W: torch.cat([x, W]),
    "stack": lambda self, x, W: torch.stack((W, W)),
    "keyword": lambda self, x, W: torch.matmul(x, other=W),
    "in place": lambda self, x, W: W.add_(0.0),
    "assigned": lambda self, x, W: W.__setitem__(0, 0.0),
    "several results": lambda self, x, W: torch.linalg.svd(W),
    "iterated": lambda self, x, W: list(W),
    "numbers": lambda self, x, W: W.tolist(),
    "embedding": lambda self, x, W: F.embedding(torch.tensor([1]), W),
    "operator": lambda self, x, W: torch.ops.aten.linear(x, W),
    "input of a linear": lambda self, x, W: F.linear(W, self.other.weight),
    "bias of a linear": lambda self, x, W: F.linear(x, self.other.weight, W[0]),
    "weight and view": lambda self, x, W: F.linear(x, self.view),
    "old view": lambda self, x, W: x @ self.view,
    "old data": lambda self, x, W: self.data * 1,
    "old row as a bias": lambda self, x, W: F.linear(x, self.other.weight, self.row),
    "bilinear": lambda self, x, W: F.bilinear(x, x, self.view[None]),
}


@pytest.mark.parametrize("use", USES)
def test_a_weight_that_is_used_otherwise_is_refused(use):
    with torch.no_grad():
        target = Uses(USES[use])
        assert_refused(
            target, torch.ones(4, 3), "^layer cannot be decomposed: [a-z].* uses its weight too$", {"layer": 2}
        )
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = Uses(USES[use] if use not in ("numbers", "iterated") else USES["cast"])
            assert_refused(fake, torch.ones(4, 3), "^layer cannot be decomposed: ", {"layer": 2})


def test_a_weight_in_its_own_linear_as_input_or_bias_is_refused():
    for own in (lambda self, x: F.linear(self.weight, self.weight), lambda self, x: F.linear(x, self.weight, self.row)):
        layer = type("Own", (nn.Linear,), {"forward": own})(3, 3)
        layer.row = layer.weight.data[0]
        assert_refused(nn.Sequential(layer), torch.ones(4, 3), "^0 cannot be decomposed: .*linear uses its weight too$")


def test_what_uses_no_values_of_a_weight_is_allowed():
    def ask(self, x, W):
        x = x.to(W.dtype).to(W.device).reshape(-1, W.shape[-1]) * W.size(0) * W.requires_grad * W.is_contiguous()
        return x @ self.before + x @ self.after + len(W) + W.dim() + W.numel()  # neighbours in one storage

    target = Uses(ask)
    target.layer.forward = lambda x: F.linear(input=x, weight=target.layer.weight, bias=target.layer.bias)
    f, x = Decomposition(target, {"layer": 2}), torch.ones(4, 3)
    for run in passes(f, x):
        run()
    close(f(x, torch.ones(3)), target(x))


def test_other_uses_are_searched_for_by_each_target_pass_and_the_first_masked_one():
    """As the search takes a while. A later masked pass follows a target pass on the same input."""
    target = Uses(lambda self, x, W: x @ W if x.sum() > 100 else None)
    f, m = Decomposition(target, {"layer": 2}), torch.ones(3)
    small, large = torch.ones(4, 3), torch.full((4, 3), 50.0)
    f(small, m)
    assert f.searched
    f(large, m)
    with pytest.raises(UserError, match="layer cannot be decomposed: torch.Tensor.matmul uses its weight too"):
        f.target_pass(large)


def test_a_weight_that_is_used_otherwise_is_refused_in_compiled_code():
    target = Uses(lambda self, x, W: x @ W)
    for run in passes(Decomposition(target, {"layer": 2}), torch.ones(4, 3)):
        with pytest.raises(UserError, match="^layer cannot be decomposed: "):
            torch.compile(run, backend="eager")()


def test_compiled_passes_are_not_compiled_anew(tokens):
    """For other tensors in the same places, after steps of U and V, and after an eager pass."""
    gpt = GPT(GPTConfig(vocab_size=50, context=8, n_layer=1, n_head=2, d_model=16, d_mlp=32))
    f = Decomposition(gpt, 3)
    target_pass = torch.compile(f.target_pass, backend="eager", dynamic=False)
    masked_pass = torch.compile(f, backend="eager", dynamic=False)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for i in range(4):
            x, m = (tokens + i) % 50, rand(3, 8, 24, seed=i)
            output, masked = target_pass(x)[0], masked_pass(x, m)
            if i > 1:
                close(output, f.target_pass(x)[0])
                close(masked, f(x, m))
            for p in f.subcomponents():
                p += 0.1


@pytest.mark.parametrize("memory_budget", [1.0, 0.0])
def test_target_pass_and_masked_pass_break_no_graph(tokens, memory_budget):
    gpt = GPT(GPTConfig(vocab_size=50, context=8, n_layer=1, n_head=2, d_model=16, d_mlp=32))
    f, m = Decomposition(gpt, {"*": 3}, memory_budget=memory_budget), rand(3, 8, 24)
    for run in (f.target_pass, lambda x: f(x, m, m[..., -6:] < 0.5), lambda x: losses.faithfulness(f)):
        explained = torch._dynamo.explain(run)(tokens)
        assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def weight_normed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


class Multiplies(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


@pytest.mark.parametrize(
    "layer, message",
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "weight is no parameter but made anew"),
        (lambda: weight_normed(nn.Linear(3, 3)), "weight is no parameter but made anew"),
        (lambda: prune.random_unstructured(nn.Linear(3, 3), "weight", 2), "weight is no parameter but made anew"),
        (lambda: nn.LazyLinear(3), "weight is without values yet"),
        (lambda: nn.Linear(3, 3, device="meta"), "weight is without values yet"),
        (lambda: Multiplies(3, 3), "torch.Tensor.T.__get__ uses its weight too"),
    ],
)
def test_layers_that_cannot_be_masked(layer, message):
    target = nn.Sequential(layer())
    with pytest.raises(UserError, match=f"^0 cannot be decomposed: (its )?{message}"):
        Decomposition(target, 2).target_pass(torch.ones(4, 3))


def test_multi_head_attention_is_refused():
    target = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert_refused(
        target, torch.ones(2, 5, 8), "^self_attn.out_proj cannot be decomposed: .*multi_head_attention_forward"
    )
    for run in passes(Decomposition(target, {"linear*": 3}), torch.ones(2, 5, 8)):
        run()


def test_two_weights_in_one_memory_are_refused():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = nn.Parameter(tied[0].weight.T)
    with pytest.raises(UserError, match="1 and 0 share one weight"):
        Decomposition(tied, 2)
    assert_refused(tied, torch.ones(4, 3), "^1 cannot be decomposed: .*linear uses its weight too", {"1": 2})


def test_a_module_under_two_names_is_one_layer():
    target = nn.Sequential(nn.Linear(3, 3))
    target.again = target[0]  # and called twice
    assert Decomposition(nn.Sequential(*target[:1]), 2).names == ["0"]
    assert_refused(target, torch.ones(4, 3), "^0 cannot be decomposed: the target applies it 2 times")


# ---------------------------------------------------------------------------------------------------------------------
# The call's own bias, parameters that are replaced, names, train mode


def test_the_bias_is_that_of_the_call(linear):
    layer, x, m = linear.target[0], torch.randn(2, 6, 5), rand(2, 6, 4)
    without = einsum_masked(linear, x, m) - layer.bias
    for bias in (None, torch.arange(4.0)):
        layer.forward = lambda x: F.linear(x, layer.weight, bias)
        close(linear(x, m), without if bias is None else without + bias)


def replaced(linear):
    state = {name: torch.randn_like(value) for name, value in linear.state_dict().items()}
    other = Decomposition(nn.Sequential(nn.Linear(5, 4)), 3)
    other.load_state_dict(state)
    return state, other


def test_assigned_parameters_are_used(linear):
    x, m = torch.randn(2, 6, 5), rand(2, 6, 4)
    state, other = replaced(linear)
    linear.load_state_dict(state, assign=True)
    assert torch.equal(linear(x, m), other(x, m)) and torch.equal(linear.Delta("0"), other.Delta("0"))
    assert linear.U["0"] is linear.subcomponents()[0] and torch.equal(linear.V["0"], state["V:0"])
    linear(x, m).sum().backward()
    assert linear.U["0"].grad is not None and linear.target[0].weight.grad is None


def test_functional_call_uses_what_it_is_given(linear):
    x, m = torch.randn(2, 6, 5), rand(2, 6, 4)
    before, (state, other) = linear(x, m), replaced(linear)
    assert torch.equal(torch.func.functional_call(linear, state, (x, m)), other(x, m))
    assert torch.equal(linear(x, m), before)
    each = torch.func.vmap(lambda x, m: torch.func.functional_call(linear, state, (x, m)))(x, m)
    close(each, other(x, m))


def test_swapped_parameters_are_used(linear):
    x, m = torch.randn(2, 6, 5).double(), rand(2, 6, 4).double()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        linear.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert linear.U["0"].dtype == torch.float64
    close(linear(x, m), einsum_masked(linear, x, m))


def test_parameter_names_are_injective_and_the_usual_ones_as_ever(decomposition):
    assert [name for name in decomposition.subcomponents_state() if "blocks.0.attn.q".replace(".", "/") in name] == [
        "U:blocks/0/attn/q",
        "V:blocks/0/attn/q",
    ]
    target = nn.Module()
    target.x = nn.Module()
    target.x.add_module("a", nn.Linear(3, 3))
    for name in ("x/a", "x%2Fa", "x%a"):
        target.add_module(name, nn.Linear(3, 3))
    f = Decomposition(target, 2)
    assert f.names == ["x.a", "x/a", "x%2Fa", "x%a"]
    assert [*f.subcomponents_state()][::2] == ["U:x/a", "U:x%2Fa", "U:x%252Fa", "U:x%25a"]
    assert len({id(U) for U in f.U.values()}) == 4


def test_train_leaves_the_target_in_eval_mode():
    f = Decomposition(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4)), 3)
    x = torch.randn(2, 5, 8)
    before = f(x)
    assert f.train() is f and f.training and not any(module.training for module in f.target.modules())
    assert torch.equal(f(x), before)
    assert not f.eval().training


# ---------------------------------------------------------------------------------------------------------------------
# Types and shapes of masks


def test_a_bf16_target_is_refused_with_advice():
    target, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).bfloat16(), torch.randn(2, 5, 8).bfloat16()
    f, m = Decomposition(target, 3), rand(2, 5, 8)
    f.target_pass(x)
    message = r"^0: input torch.bfloat16, m torch.float32, U torch.float32: use target.float\(\), or torch.autocast$"
    with pytest.raises(UserError, match=message):
        f(x, m)
    with torch.autocast("cpu", torch.bfloat16):
        assert f(x, m).shape == (2, 5, 4)
    f.bfloat16()
    assert f(x, m.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(UserError, match="m torch.float32, U torch.bfloat16"):
        f(x, m)
    f.float()
    assert f(x.float(), m).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.int64])
def test_masks_of_another_type_are_refused(linear, dtype):
    with pytest.raises(UserError, match=f"^0: input torch.float32, m {dtype}, U torch.float32"):
        linear(torch.randn(2, 6, 5), torch.ones(2, 6, 4, dtype=dtype))


def test_everything_in_float64(linear):
    x, m = torch.randn(2, 6, 5).double(), rand(2, 6, 4).double()
    close(linear.double()(x, m), einsum_masked(linear, x, m))


@pytest.mark.parametrize("shape", [(), (1,), (6,), (1, 6), (2, 1), (2, 6)])
def test_masks_and_routing_that_broadcast(linear, shape):
    x, m, routing = torch.randn(2, 6, 5), rand(*shape, 4), rand(*shape, 1, seed=1) < 0.5
    whole = linear(x, m.expand(2, 6, 4), routing.expand(2, 6, 1))
    close(linear(x, m, routing), whole)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1, 2, 6), (3, 2, 6), (6, 2), (5, 6)])
def test_masks_and_routing_that_do_not_broadcast_to_the_input_are_refused(linear, shape):
    x = torch.randn(2, 6, 5)
    for masks in ((rand(*shape, 4),), (rand(2, 6, 4), rand(*shape, 1) < 2)):
        given = re.escape(str(tuple(masks[-1].shape)))
        with pytest.raises(UserError, match=rf"^0: masks {given} do not fit its input \(2, 6, 5\)"):
            linear(x, *masks)
    with pytest.raises(UserError, match=r"^0: masks \(1, 4\) do not fit its input \(5,\)"):
        linear(x[0, 0], rand(1, 4))


@pytest.mark.parametrize(
    "routing, message",
    [
        (torch.ones(2, 6, 1), r"routing is torch.float32 \(2, 6, 1\): it must be torch.bool \[..., 1\]"),
        (torch.ones(2, 6, 2) > 0, r"routing is torch.bool \(2, 6, 2\): it must be torch.bool \[..., 1\]"),
        (torch.tensor(True), r"routing is torch.bool \(\): it must be torch.bool \[..., 1\]"),
    ],
)
def test_routing_of_another_kind_is_refused(linear, routing, message):
    with pytest.raises(UserError, match=message):
        linear(torch.randn(2, 6, 5), rand(4), routing)
    with pytest.raises(UserError, match=r"m is torch.float32 \(\): it must be torch.float32 \[..., 4\]"):
        linear(torch.randn(2, 6, 5), torch.tensor(1.0))


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.layer(x)[:, -1])


def test_layers_at_different_positions_are_refused():
    with pytest.raises(UserError, match=r"^head reads \(4, 3\), layer \(4, 5, 3\): no mask fits both"):
        Decomposition(Last(), 2).target_pass(torch.ones(4, 5, 3))
    with pytest.raises(UserError, match=r"^head: masks \(4, 5, 6\) do not fit its input \(4, 3\)"):
        Decomposition(Last(), 2)(torch.ones(4, 5, 3), torch.ones(4, 5, 6))


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


class Sometimes(nn.Module):
    """Uses its weight a second time for long inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.l(x) + (x @ self.l.weight.T if x.shape[1] > 4 else 0)


def test_another_shape_is_searched_anew():
    decomposition = Decomposition(Sometimes(), 3)
    decomposition(torch.ones(1, 3, 8), torch.zeros(1, 3, 4))
    with pytest.raises(UserError, match="l cannot be decomposed"):
        decomposition(torch.ones(1, 5, 8), torch.zeros(1, 5, 4))


def test_a_weight_that_a_script_uses_is_refused():
    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(3, 3)
            self.j = torch.jit.script(nn.Sequential(self.l))

        def forward(self, x):
            return self.l(x) + self.j(x)

    with pytest.raises(UserError, match="l cannot be decomposed: TorchScript uses its weight"):
        Decomposition(Scripted(), {"l": 2})


def test_no_matrix_at_all_is_refused():
    with pytest.raises(UserError, match="C is empty"):
        Decomposition(nn.Linear(2, 2), {})


def test_routing_without_masks_is_refused(decomposition, tokens):
    with pytest.raises(UserError, match="routing says which matrices are masked"):
        decomposition(tokens, None, torch.ones(3, 8, 12, dtype=torch.bool))
