"""Edges against central differences, sums that must be exact, whole derivatives, gauge; all in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
from model import GPT, Decomposition, GPTConfig
from studies.attribution import (
    ablations,
    dataset_attributions,
    edges,
    influence,
    leaf_pass,
    output_direction,
    strongest,
    total_gradients,
)

close = torch.testing.assert_close
T = 6
KINDS = ("q", "k", "v", "o", "up", "down")
BELOW = {"*.q": 3, "*.up": 7, "*": 4}  # C below the rank of each matrix
ABOVE = {"*.attn.*": 18, "*": 20}  # and above it (16)


def made(C) -> Decomposition:
    generator = torch.Generator().manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=50, context=8, n_layer=2, n_head=2, d_model=16, d_mlp=32))
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.4, generator=generator)
    return Decomposition(gpt, C, torch.Generator().manual_seed(2), ends_in="hidden").double()


@pytest.fixture(params=[BELOW, ABOVE], ids=["C below rank", "C above rank"])
def f(request):
    return made(request.param)


@pytest.fixture
def tokens():
    return torch.randint(0, 49, (T,), generator=torch.Generator().manual_seed(1))


def first_columns(f) -> list[int]:
    return np.cumsum([0, *f.C.values()]).tolist()


def some_nodes(f, each: int = 2) -> torch.Tensor:
    """`each` subcomponents of every matrix at every position, [N, 2]: (t, column)."""
    first = first_columns(f)
    return torch.tensor([(t, first[l] + c) for l in range(f.L) for c in range(each) for t in range(T)])


def every_node(f) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(T), torch.arange(sum(f.C.values())))


def of(f, nodes) -> tuple[list[int], list[str], list[int]]:
    """Block, kind ("q", ...) and position of each node."""
    l = np.searchsorted(first_columns(f), nodes[:, 1].numpy(), side="right") - 1
    names = [f.names[i].split(".") for i in l]
    return [int(n[1]) for n in names], [n[-1] for n in names], nodes[:, 0].tolist()


OUTPUTS = torch.tensor([(T - 1, 7), (T - 1, 11), (2, 7)])

# ---------------------------------------------------------------------------------------------------------------------
# T1: values


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("through", [True, False])
def test_the_leaf_pass_gives_the_target_itself(f, tokens, frozen, through):
    p = leaf_pass(f, tokens[None], frozen, through)
    expected, inputs = f.target_pass(tokens[None])
    close(p.hidden.detach(), expected, rtol=0, atol=1e-12)
    ones = torch.ones(1, T, sum(f.C.values()) + f.L, dtype=torch.float64)
    close(f(tokens[None], ones).detach(), expected, rtol=0, atol=1e-12)
    for l, name in enumerate(f.names):
        close(p.a[l].detach(), (inputs[l] @ f.V[name]).detach(), rtol=0, atol=1e-12)
        assert torch.equal(p.a[l], p.leaf[l])
        close(p.delta[l].detach(), (inputs[l] @ f.Delta(name).T).detach(), rtol=0, atol=1e-11)
    assert all(parameter.grad is None for parameter in f.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# T2: edges


def clamped(f, tokens, base, moved: dict, frozen: bool):
    """All a, and the last hidden state, with every leaf held at its value but for moved: {(l, t, c): by how much}.

    Written without leaf_pass: each matrix answers with U a + Delta x of the base pass.
    """
    a = [None] * f.L
    e, leaf, delta, factors = base

    def answer(l, x, Wx, bias):
        a[l] = x @ f.V[f.names[l]]
        held = leaf[l].clone()
        for (l2, t, c), h in moved.items():
            if l2 == l:
                held[0, t, c] += h
        return held @ f.U[f.names[l]].T + delta[l]

    norms, rms = iter(factors), model.rms_norm
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(model, "rms_norm", lambda x: x * next(norms) if frozen else rms(x))
        hidden = f.answered(tokens[None], answer, search=False)
    return torch.cat(a, -1)[0], hidden[0]


def base_of(f, tokens):
    """Leaves and norms' factors of the unmasked target."""
    factors, rms = [], model.rms_norm

    def rms_norm(x):
        factors.append((x.square().mean(-1, keepdim=True) + 1e-6).rsqrt())
        return rms(x)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(model, "rms_norm", rms_norm)
        _, inputs = f.target_pass(tokens[None])
        leaf = [x @ f.V[name] for x, name in zip(inputs, f.names)]
        delta = [x @ f.Delta(name).T for x, name in zip(inputs, f.names)]
    return f.target.embed(tokens[None]), leaf, delta, factors


@pytest.mark.parametrize("frozen", [True, False])
def test_every_edge_is_a_central_difference(f, tokens, frozen):
    nodes, base, first = some_nodes(f), base_of(f, tokens), first_columns(f)
    found = edges(f, tokens, nodes, OUTPUTS, frozen, at_a_time=13)
    assert found.shape == (len(nodes) + 3, len(nodes) + T + f.L * T)
    h, directions = 1e-5, output_direction(f, OUTPUTS[:, 1])
    for s in range(0, len(nodes), 7):  # every 7th source, against all targets
        t, column = nodes[s].tolist()
        l = int(np.searchsorted(first, column, side="right")) - 1
        at, values = (l, t, column - first[l]), []
        for sign in (1, -1):
            a, hidden = clamped(f, tokens, base, {at: sign * h}, frozen)
            values.append(torch.cat((a[nodes[:, 0], nodes[:, 1]], (hidden[OUTPUTS[:, 0]] * directions).sum(-1))))
        expected = (values[0] - values[1]) / (2 * h) * base[1][l][0, t, column - first[l]]
        close(found[:, s], expected.detach(), rtol=1e-6, atol=1e-8)


def allowed(source, target) -> bool:
    """Whether (block, kind, t) may have an edge to another; "e" is the embedding, "y" the output."""
    (b, kind, t), (b2, kind2, t2) = source, target
    if t > t2:
        return False
    if kind in ("e", "o", "down") and kind2 in ("q", "k", "v", "up", "y"):
        earlier = kind == "e" or kind2 == "y" or b < b2 or (b == b2 and kind == "o" and kind2 == "up")
        return t == t2 and earlier
    same = kind == "q" and kind2 == "o" or kind == "up" and kind2 == "down"
    return b == b2 and (same and t == t2 or kind in ("k", "v") and kind2 == "o")


def test_edges_are_where_topology_allows_and_nowhere_else(f, tokens):
    nodes = some_nodes(f)
    found = edges(f, tokens, nodes, OUTPUTS)
    targets = [*zip(*of(f, nodes)), *((9, "y", t) for t, _ in OUTPUTS.tolist())]
    sources = targets[: len(nodes)] + [(-1, "e", t) for t in range(T)]
    sources += [(int(name.split(".")[1]), name.split(".")[-1], t) for name in f.names for t in range(T)]
    for i, target in enumerate(targets):
        for j, source in enumerate(sources):
            # Of one position alone the softmax is 1, and nothing moves it.
            saturated = target[1] == "o" and target[2] == 0 and source[1] in ("q", "k")
            if not allowed(source, target):
                assert found[i, j] == 0, (source, target)
            else:
                assert (found[i, j].abs() > 1e-12) == (not saturated), (source, target)


def test_parts_change_no_edge(f, tokens):
    nodes = some_nodes(f)
    close(edges(f, tokens, nodes, OUTPUTS, at_a_time=5), edges(f, tokens, nodes, OUTPUTS, at_a_time=500))


# ---------------------------------------------------------------------------------------------------------------------
# T3: all paths


def total_by_autograd(f, tokens, y: int) -> torch.Tensor:
    """a d output / d a by an additive 0 at each a: ordinary autograd, [T, C]."""
    zeros = [torch.zeros(1, T, n, dtype=torch.float64, requires_grad=True) for n in f.C.values()]
    a = [None] * f.L

    def answer(l, x, Wx, bias):
        a[l] = (x @ f.V[f.names[l]]).detach()
        return Wx + zeros[l] @ f.U[f.names[l]].T.detach()

    hidden = f.answered(tokens[None], answer, search=False)
    E = f.target.unembedding
    output = hidden[0, -1] @ (E[y] - E.mean(0))
    return torch.cat([(grad * a)[0] for grad, a in zip(torch.autograd.grad(output, zeros), a)], -1)


def test_all_paths_add_up_to_the_whole_derivative(f, tokens):
    """(I - J)^-1 of the direct derivatives, through Delta, is autograd's derivative; and that is d output / d m."""
    nodes, y = every_node(f), 7
    weight = edges(f, tokens, nodes, torch.tensor([(T - 1, y)]), frozen=False, through=True)
    a = torch.cat(leaf_pass(f, tokens[None]).a, -1)[0][nodes[:, 0], nodes[:, 1]].detach()
    derivative = weight[:, : len(nodes)] / a
    J, out = derivative[:-1], derivative[-1]
    total = torch.linalg.solve((torch.eye(len(nodes), dtype=torch.float64) - J).T, out)
    expected = total_by_autograd(f, tokens, y)
    close((total * a).view(T, -1), expected, rtol=1e-6, atol=1e-9)
    found = total_gradients(f, tokens, y)
    assert found.shape == (T, sum(f.C.values()) + f.L)
    close(found[:, : -f.L], expected, rtol=1e-8, atol=1e-10)


def test_an_ablation_is_a_mask_of_0(f, tokens):
    C, y = sum(f.C.values()), 7
    nodes = torch.tensor([(0, 1), (T - 1, C - 1), (3, C + 2)])
    logit, p = ablations(f, tokens, nodes, y, at_a_time=2)
    for i, (t, c) in enumerate(nodes.tolist()):
        m = torch.ones(1, T, C + f.L, dtype=torch.float64)
        m[0, t, c] = 0
        logits = f.target.unembedding @ f(tokens[None], m)[0, -1]
        close(logit[i], (logits[y] - logits.mean()).detach())
        close(p[i], logits.softmax(-1)[y].detach())


def test_by_first_order_a_small_mask_does_what_the_total_gradient_says(f, tokens):
    y, h, C = 7, 1e-6, sum(f.C.values())
    found = total_gradients(f, tokens, y)
    for t, c in ((0, 2), (3, C // 2), (T - 1, C - 1), (4, C + 5)):
        outputs = []
        for sign in (1, -1):
            m = torch.ones(1, T, C + f.L, dtype=torch.float64)
            m[0, t, c] += sign * h
            outputs.append(f(tokens[None], m)[0, -1] @ output_direction(f, torch.tensor(y)))
        close((outputs[0] - outputs[1]).detach() / (2 * h), found[t, c], rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# T4, T5: sums over all sources


def sums(f, tokens, frozen):
    """Of every target the sum over all sources of a kind, its value, its block, kind and position."""
    nodes = every_node(f)
    weight = edges(f, tokens, nodes, OUTPUTS, frozen)
    p = leaf_pass(f, tokens[None])
    a = torch.cat(p.a, -1)[0][nodes[:, 0], nodes[:, 1]].detach()
    y = (p.hidden[0][OUTPUTS[:, 0]] * output_direction(f, OUTPUTS[:, 1])).sum(-1).detach()
    kinds = of(f, nodes)[1] + ["e"] * T + [name.split(".")[-1] for name in f.names for _ in range(T)]
    by_kind = {kind: weight[:, [k == kind for k in kinds]].sum(1) for kind in (*KINDS, "e")}
    return weight.sum(1), by_kind, torch.cat((a, y)), np.array(of(f, nodes)[1] + ["y"] * 3)


READERS = ["q", "k", "v", "up", "y"]


def test_with_norms_frozen_all_sources_add_up_to_the_value(f, tokens):
    total, _, value, kind = sums(f, tokens, frozen=True)
    readers = np.isin(kind, READERS)
    close(total[readers], value[readers], rtol=1e-9, atol=1e-10)


def test_with_norms_live_all_sources_cancel(f, tokens):
    total, _, value, kind = sums(f, tokens, frozen=False)
    readers = np.isin(kind, READERS)
    assert total[readers].abs().max() < 1e-4 * value[readers].abs().max()
    assert total[readers].abs().max() > 0  # eps / (ms + eps) of the value is left


def test_sums_into_o_by_values_and_by_scores(f, tokens):
    _, by_kind, value, kind = sums(f, tokens, frozen=True)
    o = kind == "o"
    close(by_kind["v"][o], value[o], rtol=1e-9, atol=1e-10)
    close(by_kind["q"][o], by_kind["k"][o], rtol=1e-8, atol=1e-9)
    assert by_kind["q"][o].abs().max() > 0.01


def test_sums_into_down_are_of_the_slope_of_gelu(f, tokens):
    _, by_kind, value, kind = sums(f, tokens, frozen=True)
    _, inputs = f.target_pass(tokens[None])
    nodes = every_node(f)
    for l, name in enumerate(f.names):
        if name.endswith("down"):
            h = (inputs[l - 1] @ f.W(f.names[l - 1]).T)[0].detach().requires_grad_()
            (slope,) = torch.autograd.grad(F.gelu(h).sum(), h)
            expected = ((slope * h) @ f.V[name]).detach()  # [T, C_l]
            first = first_columns(f)[l]
            here = (nodes[:, 1] >= first) & (nodes[:, 1] < first + f.C[name])
            close(by_kind["up"][: len(nodes)][here].view(T, -1), expected, rtol=1e-9, atol=1e-10)
            assert (expected - value[: len(nodes)][here].view(T, -1)).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# T6: gauge


@pytest.mark.parametrize("s", [2.5, -1.0])
def test_a_gauge_scales_incoming_edges_alone(f, tokens, s):
    """U_c times s and V_c by s: edges out of c stay, those into it are divided by s."""
    nodes, l, c = some_nodes(f), 8, 1  # 1.attn.v
    before = edges(f, tokens, nodes, OUTPUTS)
    with torch.no_grad():
        f.U[f.names[l]][:, c] *= s
        f.V[f.names[l]][:, c] /= s
    after = edges(f, tokens, nodes, OUTPUTS)
    into = torch.cat((nodes[:, 1] == first_columns(f)[l] + c, torch.zeros(3, dtype=torch.bool)))
    close(after[~into], before[~into], rtol=1e-9, atol=1e-11)
    close(after[into], before[into] / s, rtol=1e-9, atol=1e-11)
    assert before[into].abs().max() > 0.01 and before[:, : len(nodes)][:, into[:-3]].abs().max() > 0.01


def test_attributions_over_text_against_edges_and_under_a_gauge(f):
    """A sums the edges of every prompt times g of the source; no gauge changes it, of |a| not even a sign."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 49, (3, T), generator=generator)
    g = (torch.rand(3, T, sum(f.C.values()), generator=generator, dtype=torch.float64) - 0.3).clamp(0, 1)
    first = first_columns(f)
    live = np.array([first[l] + c for l in range(f.L) for c in (0, 2)])
    nodes = torch.cartesian_prod(torch.arange(T), torch.from_numpy(live))
    batches = [(x[:2], g[:2]), (x[2:], g[2:])]
    for absolute in (False, True):
        found, expected, squares = dataset_attributions(f, batches, live, absolute), 0, 0
        for tokens, of_g in zip(x, g):
            a = torch.cat(leaf_pass(f, tokens[None]).a, -1)[0].detach()[:, live]  # [T, n]
            weight = edges(f, tokens, nodes, OUTPUTS[:0])[:, : len(nodes)].view(T, len(live), T, len(live))
            sign = a.sign() if absolute else torch.ones_like(a)
            expected = expected + torch.einsum("tcsd,tc,sd->dc", weight, sign, of_g[:, live])
            squares = squares + a.square().sum(0)
        expected = expected / (g[..., live].sum((0, 1))[:, None] * (squares / (3 * T)).sqrt())
        close(found.double(), expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        f.U[f.names[6]][:, 2] *= -3.0
        f.V[f.names[6]][:, 2] /= -3.0
    close(dataset_attributions(f, batches, live), found, rtol=1e-4, atol=1e-6)


def test_the_strongest_of_each_target():
    A = torch.tensor([[0.0, 0.5, -2.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])  # source, target
    place, value = strongest(A, 2)
    assert place.tolist() == [[-1, -1], [0, -1], [0, 1]]
    assert value.tolist() == [[0, 0], [0.5, 0], [-2, 1]]
    assert strongest(A, 5)[0].shape == (3, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Influence, and T8: a planted circuit


def test_influence_adds_up_over_all_paths():
    """Two nodes 0 -> 1 -> output, an embedding into each: by hand."""
    weight = torch.tensor([[0, 0, 2, 0.0], [3, 0, 0, -1.0], [1, -4, 0, 0]])  # targets 0, 1, output; sources 0, 1, e, e'
    found = influence(weight, 2, torch.tensor([0.5]), torch.tensor([0, 1]))
    close(found, torch.tensor([0.5 * (0.2 + 0.8 * 0.75), 0.5 * 0.8, 0.5 * (0.2 + 0.6), 0.5 * 0.8 * 0.25]))


def test_a_planted_path_is_the_only_one(tokens):
    """Weights by hand: embedding -> 0.v -> 0.o -> 1.up -> 1.down -> output along one direction, all else orthogonal."""
    f = made(ABOVE)
    generator = torch.Generator().manual_seed(4)
    Q, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))
    path = {
        "blocks.0.attn.v": (1, 0),
        "blocks.0.attn.o": (2, 1),
        "blocks.1.mlp.up": (3, 2),
        "blocks.1.mlp.down": (4, 3),
    }
    with torch.no_grad():
        f.target.embed.weight[:] = torch.randn(50, 1, generator=generator, dtype=torch.float64) * Q[:, 0]
        f.target.embed.weight[7] += 3 * Q[:, 4]  # what the path writes is token 7
        for name in f.names:
            f.W(name).zero_()
            f.U[name].zero_(), f.V[name].zero_()
            if name in path:
                to, fro = path[name]
                out = torch.zeros(f.W(name).shape[0], dtype=torch.float64)
                out[:16] = Q[:, to]
                inp = torch.zeros(f.W(name).shape[1], dtype=torch.float64)
                inp[:16] = Q[:, fro]
                f.U[name][:, 5], f.V[name][:, 5] = 2 * out, inp
                f.W(name)[:] = torch.outer(2 * out, inp)
    tokens = tokens.clamp(min=8)
    nodes, first = some_nodes(f, 7), first_columns(f)
    found = edges(f, tokens, nodes, torch.tensor([(T - 1, 7)]))
    planted = {first[f.names.index(name)] + 5: i for i, name in enumerate(path)}
    stage = lambda n: planted.get(nodes[n, 1].item(), None)
    on = {(i, j) for i, j in (found[:, : len(nodes)].abs() > 1e-9).nonzero().tolist()}
    for i, j in on:
        assert stage(j) is not None and (i == len(nodes) or stage(i) == stage(j) + 1)
    for t in range(T):
        into_o = next(n for n in range(len(nodes)) if stage(n) == 1 and nodes[n, 0] == T - 1)
        from_v = next(n for n in range(len(nodes)) if stage(n) == 0 and nodes[n, 0] == t)
        assert (into_o, from_v) in on
    assert any(i == len(nodes) for i, _ in on)
    close(found[:, len(nodes) + T :], torch.zeros_like(found[:, len(nodes) + T :]), atol=1e-9, rtol=0)  # no Delta
