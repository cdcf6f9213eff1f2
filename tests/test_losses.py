import math

import pytest
import torch
from torch import nn

import cost
import losses
from ci_fn import CITransformer, lower_leaky, upper_leaky
from losses import Adversary, mask
from model import Decomposition

close = torch.testing.assert_close


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed))


# ---------------------------------------------------------------------------------------------------------------------
# A. Masks


def test_mask_by_hand():
    g = torch.tensor([[0.0, 0.5, 1.0], [0.2, 0.8, 0.0]])  # C = 3
    r = torch.tensor([[0.5, 0.5, 0.5, 0.3], [1.0, 0.0, 0.25, 0.9]])  # and L = 1
    # 0 + 1 * 0.5, 0.5 + 0.5 * 0.5, 1 + 0 | r;   0.2 + 0.8 * 1, 0.8 + 0.2 * 0, 0 + 1 * 0.25 | r
    close(mask(g, r), torch.tensor([[0.5, 0.75, 1.0, 0.3], [1.0, 0.8, 0.25, 0.9]]))


def test_mask_gradients_by_hand():
    g, r = torch.tensor([[0.2, 0.7]], requires_grad=True), torch.tensor([[0.4, 0.1, 0.6]], requires_grad=True)
    mask(g, r).sum().backward()
    close(g.grad, torch.tensor([[0.6, 0.9]]))  # dm/dg = 1 - r
    close(r.grad, torch.tensor([[0.8, 0.3, 1.0]]))  # dm/dr = 1 - g, and 1 for the Delta


def test_important_subcomponents_are_never_masked():
    assert torch.equal(mask(torch.ones(2, 3, 5), rand(2, 3, 6))[..., :5], torch.ones(2, 3, 5))


def test_mask_lies_between_g_and_1():
    g, m = rand(4, 5, 6, seed=1), mask(rand(4, 5, 6, seed=1), rand(4, 5, 8))[..., :6]
    assert (m >= g - 1e-6).all() and (m <= 1 + 1e-6).all()


@pytest.mark.parametrize("shape", [(2, 4, 7, 8), (2, 1, 1, 8), (1, 4, 7, 8), (4, 7, 8), (8,)])
def test_mask_broadcasts_sources(shape):
    g, r = rand(4, 7, 6, seed=1), rand(*shape)
    full = r.expand(torch.broadcast_shapes(r.shape, (4, 7, 8)))
    assert mask(g, r).shape == full.shape
    close(mask(g, r), torch.cat([g + (1 - g) * full[..., :6], full[..., 6:]], -1))


def test_sources_are_uniform():
    r = losses.sample_sources((100, 400), generator())
    assert torch.histc(r, bins=4, min=0, max=1).div(r.numel()).tolist() == pytest.approx([0.25] * 4, abs=0.01)


@pytest.fixture(scope="module")
def routing():
    return losses.sample_routing((200, 300), 4, generator())  # L = 4 at 60,000 positions


def test_routing_masks_k_matrices_with_k_uniform(routing):
    assert (routing.shape, routing.dtype) == ((200, 300, 4), torch.bool)
    k = routing.sum(-1)
    assert [(k == n).float().mean().item() for n in range(5)] == pytest.approx([0, 0.25, 0.25, 0.25, 0.25], abs=0.01)


@pytest.mark.parametrize("k, subsets", [(1, 4), (2, 6), (3, 4)])
def test_every_subset_of_k_matrices_is_equally_likely(routing, k, subsets):
    chosen, counts = routing[routing.sum(-1) == k].unique(dim=0, return_counts=True)
    assert len(chosen) == subsets
    assert (counts / counts.sum()).tolist() == pytest.approx([1 / subsets] * subsets, abs=0.015)


def test_layerwise_routing_masks_all_matrices_or_one_alone():
    routing = losses.sample_layerwise_routing((200, 300), 4, generator())
    assert (routing.shape, routing.dtype) == ((200, 300, 4), torch.bool)
    chosen, counts = routing.flatten(0, 1).unique(dim=0, return_counts=True)
    share = {tuple(row): n.item() / 60_000 for row, n in zip(chosen.tolist(), counts)}
    assert share.pop((True,) * 4) == pytest.approx(1 / 2, abs=0.01) and len(share) == 4
    assert all(sum(row) == 1 for row in share) and [*share.values()] == pytest.approx([1 / 8] * 4, abs=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# B. Divergence


def test_kl_by_hand():
    p = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [0.1, 0.2, 0.7]])
    q = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.1, 0.2, 0.7]])
    # Row 1: 1/2 ln(3/2) + 1/2 ln(3/4) = ln 3 - 3/2 ln 2; row 2: 0. (Turned round it would be 5/3 ln 2 - ln 3.)
    expected = (math.log(3) - 1.5 * math.log(2)) / 2
    logits = p.log() + 3, q.log() - 5  # up to a constant
    assert losses.kl_divergence(*logits).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("D", [losses.kl_divergence, losses.HiddenKL(torch.eye(2).bfloat16())], ids=["plain", "hidden"])
def test_kl_is_computed_in_fp32(D):
    p, q = (
        torch.tensor([[8.0, 8.0]]),
        torch.tensor([[8.0, 8.0625]]),
    )  # bf16 numbers, but their log-probabilities are not
    # KL(1/2, 1/2 || 1 / (1 + e^d), e^d / (1 + e^d)) = ln cosh(d / 2), at d = 1/16
    assert D(p.bfloat16(), q.bfloat16()).item() == pytest.approx(math.log(math.cosh(1 / 32)), rel=1e-3)


def test_kl_of_equal_logits_is_zero():
    logits = 20 * rand(2, 3, 7)
    assert losses.kl_divergence(logits, logits).item() == 0


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])  # of 12 positions: one by one, a last part of 2, all, more than all
def test_hidden_kl_is_the_kl_of_the_logits(chunk):
    unembedding, h_p = rand(50, 7, seed=1), 3 * rand(3, 4, 7, seed=2)
    h_q, same = ((3 * rand(3, 4, 7, seed=3)).requires_grad_() for _ in range(2))
    D = losses.HiddenKL(unembedding, chunk)(h_p, h_q)
    plain = losses.kl_divergence(h_p @ unembedding.T, same @ unembedding.T)
    (2 * D).backward()
    (2 * plain).backward()
    close(D, plain)
    close(h_q.grad, same.grad)
    assert plain > 0.1 and same.grad.norm() > 0.1


def test_hidden_kl_of_sequences_of_one_token_and_without_a_sequence_axis():
    unembedding, h_p, h_q = rand(50, 7, seed=1), 3 * rand(6, 7, seed=2), 3 * rand(6, 7, seed=3)
    D = losses.HiddenKL(unembedding, 4)
    assert D(h_p, h_q).item() == D(h_p[:, None], h_q[:, None]).item()


def test_hidden_kl_gives_the_target_no_gradient():
    unembedding, h_p, h_q = (
        rand(50, 7, seed=1),
        rand(4, 7, seed=2).requires_grad_(),
        rand(4, 7, seed=3).requires_grad_(),
    )
    losses.HiddenKL(unembedding)(h_p, h_q).backward()
    assert h_p.grad is None and h_q.grad.any()


def test_hidden_kl_holds_no_logits():
    """Of 400 positions and a vocabulary of 500 it holds the chunk's 20 x 500 a few times, not 400 x 500."""
    unembedding, h_p, h_q = rand(500, 8), rand(400, 8, seed=1), rand(400, 8, seed=2).requires_grad_()
    with cost.Watch() as chunked:
        losses.HiddenKL(unembedding, chunk=20)(h_p, h_q).backward()
    with cost.Watch() as whole:
        losses.kl_divergence(h_p @ unembedding.T, h_q @ unembedding.T).backward()
    assert chunked.most < 4 * 400 * 500 < whole.most


def test_mse_by_hand():
    target, masked = torch.tensor([[1.0, 2, 3], [0, 0, 0]]), torch.tensor([[1.0, 0, 3], [0, 1, -1]])
    assert losses.mse(target, masked).item() == pytest.approx((4 + 1 + 1) / 6)


# ---------------------------------------------------------------------------------------------------------------------
# C. The five losses


def linears(*weights, UV):
    """A decomposition, C_l = 1, of a chain of linear layers with these weights, where every entry of U and V is UV."""
    layers = [nn.Linear(len(W[0]), len(W), bias=False) for W in weights]
    f = Decomposition(nn.Sequential(*layers), 1)
    for layer, W in zip(layers, weights):
        layer.weight.data = torch.tensor(W, dtype=torch.float32)
    for p in f.subcomponents():
        nn.init.constant_(p, UV)
    return f


@pytest.fixture
def one_by_one():
    """W = 2, U = V = 1, so Delta = 1 and W' = m + m_Delta."""
    return linears([[2]], UV=1)


def test_faithfulness_by_hand():
    f = linears([[1, 2, 0], [0, 1, 1]], UV=0)
    f.U["0"].data = torch.tensor([[1.0], [0]])
    f.V["0"].data = torch.tensor([[1.0], [1], [0]])
    # U V^T = [[1, 1, 0], [0, 0, 0]], so Delta = [[0, 1, 0], [0, 1, 1]]: three ones of six.
    loss = losses.faithfulness(f)
    assert loss.item() == pytest.approx(3 / 6)
    loss.backward()  # dL/dU = -2/6 Delta V, and Delta V = [1, 1]
    close(f.U["0"].grad, torch.tensor([[-1 / 3], [-1 / 3]]))


def test_faithfulness_is_a_mean_over_weights_not_over_matrices():
    f = linears([[1, 1, 1], [1, 1, 1]], [[3, 3]], UV=0)
    assert losses.faithfulness(f).item() == pytest.approx((6 * 1 + 2 * 9) / 8)  # the mean of means would be (1 + 9) / 2


@pytest.mark.parametrize("positions", [(2,), (1, 2), (2, 1)])
def test_power_sums_by_hand(positions):
    g = torch.tensor([[0.25, 1.0, 0.0], [0.25, 0.0, 0.25]]).view(*positions, 3)
    # p = 1/2: square roots [[0.5, 1, 0], [0.5, 0, 0.5]], a sum for each of the C = 3 columns
    close(losses.power_sums(g, 0.5), torch.tensor([1, 1, 0.5]), atol=1e-5, rtol=0)


def test_power_sums_gradient_by_hand():
    g = torch.tensor([[0.25, 1.0], [4.0, 1.0]], requires_grad=True)
    losses.power_sums(g, torch.tensor(0.5)).backward(torch.tensor([1.0, 10.0]))
    close(g.grad, torch.tensor([[1.0, 5.0], [0.25, 5.0]]))  # p g^(p - 1) = 1 / (2 sqrt g)


def test_power_sums_are_of_fp32():
    s = losses.power_sums(torch.ones(1001, 1, dtype=torch.bfloat16), 0.7)  # bf16 would go from 1000 to 1004
    assert s.dtype == torch.float32 and s.item() == pytest.approx(1001, abs=0.01)


def test_minimality_by_hand():
    s = torch.tensor([1, 1, 0.5])  # of n = 2 positions, as above
    assert losses.importance_minimality(s, 2).item() == pytest.approx(2.5 / 2)
    frequency = (1 * math.log2(2) + 1 * math.log2(2) + 0.5 * math.log2(1.5)) / 2
    assert losses.frequency_minimality(s, 2).item() == pytest.approx(frequency)


def importance_and_frequency(g, p):
    """Both minimality losses of g [B, T, C], as a step makes them."""
    s, n = losses.power_sums(g, p), g.shape[0] * g.shape[1]
    return losses.importance_minimality(s, n), losses.frequency_minimality(s, n)


def test_minimality_has_a_finite_gradient_at_zero():
    g = torch.zeros(2, 3, 4, requires_grad=True)
    for loss in importance_and_frequency(g, 0.4):
        (grad,) = torch.autograd.grad(loss, g, retain_graph=True)
        assert grad.isfinite().all()


def test_frequency_prefers_two_rare_subcomponents_to_one_frequent():
    one, two = torch.zeros(1, 8, 2), torch.zeros(1, 8, 2)
    one[:, :4, 0] = 1  # on at half the positions
    two[:, :2, 0] = two[:, 2:4, 1] = 1  # each on at a quarter
    (importance_one, frequency_one), (importance_two, frequency_two) = (
        importance_and_frequency(g, 2.0) for g in (one, two)
    )
    assert frequency_one.item() == pytest.approx(4 * math.log2(5) / 8)
    assert frequency_two.item() == pytest.approx(2 * 2 * math.log2(3) / 8)
    assert importance_one.item() == pytest.approx(importance_two.item())


def test_minimalities_add_up_to_the_fused_form():
    g, p, beta_imp, beta_freq = rand(3, 5, 7), 0.7, 2.0, 0.6
    importance, frequency = importance_and_frequency(g, p)
    s = g.pow(p).sum((0, 1))
    fused = (s * (1 + beta_freq / beta_imp * torch.log2(1 + s))).sum() / (3 * 5)
    close(beta_imp * importance + beta_freq * frequency, beta_imp * fused)


def test_reconstruction_by_hand(one_by_one):
    x, g = torch.tensor([[3.0]]), torch.tensor([[0.5]])
    r = torch.tensor([[[0.5, 0.25]], [[1.0, 1.0]]])  # S = 2: m = 0.75 and m_Delta = 0.25, so W' = 1; then W' = 2 = W
    loss = losses.reconstruction(one_by_one, x, one_by_one(x), g, r, divergence=losses.mse)
    assert loss.item() == pytest.approx(((6 - 3) ** 2 + 0) / 2)


def test_reconstruction_routes(one_by_one):
    x, g, r = torch.tensor([[3.0], [3.0]]), torch.zeros(2, 1), torch.zeros(1, 2, 2)  # W' = 0
    routing = torch.tensor([[[True], [False]]])
    loss = losses.reconstruction(one_by_one, x, one_by_one(x), g, r, routing, losses.mse)
    assert loss.item() == pytest.approx((36 + 0) / 2)


def stochastic(f, x, target_output, g, generator, divergence=losses.kl_divergence):
    """The stochastic reconstruction loss of g [B, T, C], S = 1: r and routing drawn as a step draws them."""
    shape = 1, *g.shape[:-1]
    r = losses.sample_sources((*shape, g.shape[-1] + f.L), generator)
    routing = losses.sample_routing(shape, f.L, generator)
    return losses.reconstruction(f, x, target_output, g, r, routing, divergence)


def test_stochastic_reconstruction_of_two_matrices_in_expectation():
    # Two 1x1 matrices, W = U V^T = 1 and g = 0: a masked matrix multiplies by r. With x = 1, one masked matrix (k = 1,
    # half of the time) costs E(1 - r)^2 = 1/3, two cost E(1 - r1 r2)^2 = 1 - 2/4 + 1/9 = 11/18: 17/36 on average.
    f, x = linears([[1]], [[1]], UV=1), torch.ones(200, 150, 1)
    loss = stochastic(f, x, x, torch.zeros(200, 150, 2), generator(), losses.mse)
    assert loss.item() == pytest.approx(17 / 36, abs=0.01)


def test_layerwise_routing_is_the_sum_of_both_losses_of_spd():
    """Twice the loss, against D with all three matrices masked plus the mean of D with each alone, by brute force."""
    f, rows = linears([[2.0]], [[-1.0]], [[0.5]], UV=1), 40_000
    x, g, r = torch.ones(rows, 1), torch.zeros(rows, 3), torch.tensor([0.3, 0.6, 0.9, 0.5, 0.2, 0.1]).expand(1, rows, 6)

    def D(*masked):
        routing = torch.tensor([l in masked for l in range(3)]).expand(1, rows, 3)
        return losses.reconstruction(f, x, f(x), g, r, routing, losses.mse).item()

    routing = losses.sample_layerwise_routing((1, rows), 3, generator())
    drawn = losses.reconstruction(f, x, f(x), g, r, routing, losses.mse).item()
    assert 2 * drawn == pytest.approx(D(0, 1, 2) + (D(0) + D(1) + D(2)) / 3, rel=0.02)
    assert D(0, 1, 2) != pytest.approx(D(0), rel=0.1)


def test_stochastic_reconstruction_is_a_function_of_the_generator(decomposition, gpt, tokens):
    arguments = decomposition, tokens, gpt(tokens), rand(3, 8, 52)
    first, again, other = (stochastic(*arguments, generator(seed)).item() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("shape", [(3, 3, 8, 64), (3, 1, 1, 64)])
def test_S_samples_are_averaged(decomposition, gpt, tokens, shape):
    g, r, routing = rand(3, 8, 52, seed=1), rand(*shape), losses.sample_routing((3, 3, 8), 12, generator())
    together = losses.reconstruction(decomposition, tokens, gpt(tokens), g, r, routing)
    alone = [
        losses.reconstruction(decomposition, tokens, gpt(tokens), g, r[s : s + 1], routing[s : s + 1]) for s in range(3)
    ]
    close(together, sum(alone) / 3)


def test_without_routing_every_matrix_is_masked(decomposition, gpt, tokens):
    g, r = rand(3, 8, 52, seed=1), rand(1, 3, 8, 64)
    everywhere = torch.ones(1, 3, 8, 12, dtype=torch.bool)
    loss = losses.reconstruction(decomposition, tokens, gpt(tokens), g, r)
    assert torch.equal(loss, losses.reconstruction(decomposition, tokens, gpt(tokens), g, r, everywhere))
    assert loss.item() > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Where gradients flow


@pytest.fixture
def step(decomposition, tokens):
    """The five losses of one step by name, and the one that r alone ascends; everything that could learn from them."""
    torch.manual_seed(0)
    target_output, inputs = decomposition.target_pass(tokens)
    gamma = CITransformer([x.shape[-1] for x in inputs], 52, d_ci=16, n_layer=1, n_head=2, d_mlp=16)
    nn.init.constant_(gamma.out.bias, 0.5)
    z = gamma(inputs)
    g, r = lower_leaky(z), rand(1, 3, 8, 64).requires_grad_()
    importance, frequency = importance_and_frequency(upper_leaky(z), 0.9)
    terms = {
        "adversarial": losses.reconstruction(decomposition, tokens, target_output, g, r),
        "frozen": losses.reconstruction(decomposition, tokens, target_output, g.detach(), r, frozen=True),
        "stochastic": stochastic(decomposition, tokens, target_output, g, generator()),
        "importance": importance,
        "frequency": frequency,
        "faithfulness": losses.faithfulness(decomposition),
    }
    f = decomposition
    learners = {
        "U": f.U.values(),
        "V": f.V.values(),
        "Gamma": gamma.parameters(),
        "r": [r],
        "target": f.target.parameters(),
    }
    return terms, {name: list(group) for name, group in learners.items()}


@pytest.mark.parametrize(
    "loss, expected",
    [
        ("adversarial", {"U", "V", "Gamma", "r"}),
        ("frozen", {"r"}),
        ("stochastic", {"U", "V", "Gamma"}),
        ("importance", {"Gamma"}),
        ("frequency", {"Gamma"}),
        ("faithfulness", {"U", "V"}),
    ],
)
def test_which_parameters_learn_from_a_loss(step, loss, expected):
    terms, learners = step
    terms[loss].backward()
    moved = {name: [p.grad is not None and bool(p.grad.any()) for p in group] for name, group in learners.items()}
    assert moved == {name: [name in expected] * len(group) for name, group in learners.items()}


def test_r_ascends_alone_by_the_gradient_of_the_whole_pass(step):
    terms, learners = step
    whole, frozen = (torch.autograd.grad(terms[name], learners["r"])[0] for name in ("adversarial", "frozen"))
    close(whole, frozen)


def test_one_backward_serves_descent_and_ascent(step):
    terms, learners = step
    (r,) = learners["r"]
    (alone,) = torch.autograd.grad(0.5 * terms["adversarial"], r, retain_graph=True)
    (0.5 * terms["adversarial"] + terms["stochastic"] + terms["frequency"] + 10 * terms["faithfulness"]).backward()
    close(r.grad, alone)


# ---------------------------------------------------------------------------------------------------------------------
# D. The adversary


def test_ascent_is_torchs_adam_uphill_and_a_clamp():
    adversary = Adversary((4, 5), 6, generator())
    expected = adversary.r.clone().requires_grad_()
    adam = torch.optim.Adam([expected], betas=(0.5, 0.99), eps=1e-8, maximize=True)
    for step in range(8):
        grad_r = torch.randn(expected.shape, generator=generator(step)) * 10.0 ** (step - 5)
        lr = 0.02 * (step + 1)  # its warm-up
        adversary.ascend(grad_r, torch.tensor(lr))
        expected.grad, adam.param_groups[0]["lr"] = grad_r.clone(), lr
        adam.step()
        expected.data.clamp_(0, 1)
        close(adversary.r, expected.data)
    assert 0.0 in expected and 1.0 in expected  # the clamp had something to do


@pytest.mark.parametrize(
    "positions, scope, shape",
    [
        ((4, 5), "position", (2, 4, 5, 6)),
        ((4, 5), "sequence", (2, 4, 1, 6)),
        ((4, 5), "batch", (2, 1, 1, 6)),
        ((4,), "position", (2, 4, 6)),
        ((4,), "sequence", (2, 4, 6)),
        ((4,), "batch", (2, 1, 6)),
    ],
)
def test_scope_gives_the_shape_of_r(positions, scope, shape):
    assert Adversary(positions, 6, generator(), S=2, scope=scope).r.shape == shape


def test_gradient_by_hand(one_by_one):
    adversary, x, g = Adversary((1,), 2, generator()), torch.tensor([[3.0]]), torch.tensor([[0.5]])
    adversary.r.copy_(torch.tensor([0.5, 0.25]))
    # L = (6 - 3 W')^2 at W' = (0.5 + 0.5 r) + r_Delta = 1: dL/dW' = -6 * 3 = -18; dW'/dr = 0.5, dW'/dr_Delta = 1.
    target_output = one_by_one(x)
    grad_r = adversary.gradient(
        lambda r: losses.reconstruction(one_by_one, x, target_output, g, r, divergence=losses.mse)
    )
    close(grad_r, torch.tensor([[[-9.0, -18.0]]]))


@pytest.mark.parametrize("fresh", [0.0, 0.1])
@pytest.mark.parametrize("scope", ["position", "sequence", "batch"])
def test_ascent_raises_the_loss_within_bounds_and_moves_nothing_else(decomposition, gpt, tokens, scope, fresh):
    g = rand(3, 8, 52, seed=1).requires_grad_()
    adversary = Adversary((3, 8), 64, generator(), scope=scope, fresh=fresh)

    def loss(r):
        return losses.reconstruction(decomposition, tokens, gpt(tokens), g, r)

    start = loss(adversary.r).item()
    for _ in range(10):
        adversary.ascend(adversary.gradient(loss), torch.tensor(0.1))
        assert adversary.r.min() >= 0 and adversary.r.max() <= 1
    assert loss(adversary.r).item() > 1.2 * start
    assert all(p.grad is None for p in (*decomposition.subcomponents(), g, adversary.r))


def test_fresh_sources_are_drawn_anew_each_step_and_take_sign_steps():
    of_all, fresh = generator(7), Adversary((4, 5), 6, generator(7), fresh=0.75)
    drawn = losses.sample_sources((1, 4, 5, 6), of_all)
    assert torch.equal(fresh.r, drawn)
    for _ in range(2):
        fresh.begin_step()
        drawn = losses.sample_sources((1, 4, 5, 6), of_all)
        assert torch.equal(fresh.r, drawn)
        grad_r = torch.randn(drawn.shape, generator=generator(1))
        fresh.ascend(grad_r, torch.tensor(0.1))  # whose rate is of no effect
        close(fresh.r, (drawn + 0.75 * grad_r.sign()).clamp(0, 1))
    persistent = Adversary((4, 5), 6, generator(7))
    before = persistent.r.clone()
    persistent.begin_step()
    assert torch.equal(persistent.r, before)


def test_adversary_goes_on_from_its_saved_state():
    ours, other = Adversary((4, 5), 6, generator(0)), Adversary((4, 5), 6, generator(1))
    grads = [torch.randn(ours.r.shape, generator=generator(i)) for i in range(4)]
    for grad_r in grads[:2]:
        ours.ascend(grad_r, torch.tensor(0.05))
    other.load_state_dict(ours.state_dict())
    for grad_r in grads[2:]:
        ours.ascend(grad_r, torch.tensor(0.05))
        other.ascend(grad_r, torch.tensor(0.05))
    assert torch.equal(other.r, ours.r)


def test_the_ascent_takes_the_gradient_of_beta_times_the_loss():
    after = []
    for beta in (1.0, 0.3):
        adversary = Adversary((2, 3), 5, torch.Generator().manual_seed(0))
        grad_r = torch.randn(adversary.r.shape, generator=torch.Generator().manual_seed(1))
        adversary.ascend(beta * grad_r, torch.tensor(0.05), beta)
        after.append(adversary.r)
    assert torch.allclose(*after, rtol=0, atol=1e-6)


def test_sources_of_another_shape_are_refused():
    adversary = losses.Adversary((2, 5), 8, torch.Generator())
    other = losses.Adversary((2, 5), 8, torch.Generator(), scope="batch").state_dict()
    with pytest.raises(ValueError, match=r"the adversary's r has shape \[1, 1, 1, 8\], not \[1, 2, 5, 8\]"):
        adversary.load_state_dict(other)
