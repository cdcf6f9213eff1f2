"""Dictionaries: exact counts, unit rows, gradients, protocols, files; a ReLU target's own weights reproduce it."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flags import UserError
from losses import kl_divergence
from model import GPT, MLP, GPTConfig
from studies import dictionary
from studies.dictionary import (
    CLT,
    PLT,
    Settings,
    Training,
    auxiliary,
    batch_topk,
    clean_outputs,
    error_propagating,
    flops_a_token,
    load,
    mlps_of,
    new,
    save,
    substituted,
    target_pass,
    train,
)

close = torch.testing.assert_close
SMALL = dict(D=24, k=3, steps=4, B=3, T=8, lr=1e-2)
MODES = ("local", "error-propagating", "clean-input", "single-layer")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one_layer() -> GPT:
    torch.manual_seed(3)
    return GPT(GPTConfig(vocab_size=50, context=8, n_layer=1, n_head=2, d_model=16, d_mlp=32))


# ---------------------------------------------------------------------------------------------------------------------
# Selection


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("shift", [-3.0, -1.0, 0.0, 2.0])
def test_exactly_the_largest_positive_ones_stay(k, shift):
    z = torch.randn(2, 5, 8, generator=generator(), dtype=torch.float64) + shift
    h, edge = batch_topk(z, k)
    n = min(k * 10, int((z > 0).sum()))
    expected = torch.zeros(80, dtype=torch.float64)
    best = z.flatten().topk(n).indices
    expected[best] = z.flatten()[best]
    assert torch.equal(h.flatten(), expected) and int((h != 0).sum()) == n
    assert edge == (h[h > 0].min().item() if n == k * 10 else 0.0)


def test_of_equal_ones_the_first_stay():
    h, edge = batch_topk(torch.tensor([[1.0, 2.0, 1.0, 1.0], [1.0, 0.0, 0.0, 3.0]]), 2)
    assert h.tolist() == [[1, 2, 1, 0], [0, 0, 0, 3]] and edge == 1


def test_at_one_position_it_is_topk():
    z = torch.randn(1, 20, generator=generator()).abs()
    values, index = z.topk(4)
    assert torch.equal(batch_topk(z, 4)[0], torch.zeros_like(z).scatter(1, index, values))


def test_the_choice_has_no_gradient():
    z = torch.randn(6, 5, generator=generator(), requires_grad=True)
    h, _ = batch_topk(z, 2)
    h.sum().backward()
    assert torch.equal(z.grad, (h > 0).float())


def test_k_above_the_latents_is_refused():
    with pytest.raises(UserError, match="k=6: must be at most the 5 latents"):
        batch_topk(torch.ones(2, 5), 6)
    with pytest.raises(UserError, match="k=6: must be at most the D=5 latents"):
        Settings(k=6, D=5)


@pytest.mark.parametrize("kind", ["sae", "plt", "clt"])
def test_the_threshold_keeps_what_the_batch_that_set_it_kept(gpt, tokens, kind):
    training = Training(Settings(kind, **SMALL), gpt)
    _, xs, ys = target_pass(gpt, tokens)
    for l, x in enumerate(ys if kind == "sae" else xs):
        h = training.codes(l, x)
        assert torch.equal(training.dictionary.codes(l, x), h)
        assert torch.equal(training.dictionary.codes(l, x, batch=True), h)
        alone = training.dictionary.codes(l, x[:1])  # a position sees no other
        assert torch.equal(alone, h[:1])


# ---------------------------------------------------------------------------------------------------------------------
# Dictionaries


def test_equations_by_a_loop(gpt, tokens):
    clt = new(Settings("clt", **SMALL), gpt)
    x = torch.randn(2, 16, generator=generator())
    hs = [F.relu(clt.encode(l, x)) for l in (0, 1)]
    for l in (0, 1):
        z = torch.stack([row @ clt.W_enc[l] + clt.b_enc[l] for row in x])
        close(clt.encode(l, x), z)
    by_hand = hs[0] @ clt.W_dec[0][:, 1] + hs[1] @ clt.W_dec[1][:, 0] + clt.b_dec[1]
    close(clt.decode(1, hs), by_hand)
    close(clt.decode(0, hs), hs[0] @ clt.W_dec[0][:, 0] + clt.b_dec[0])
    assert [tuple(W.shape) for W in clt.W_dec] == [(24, 2, 16), (24, 1, 16)]
    for dictionary_ in (clt, new(Settings("plt", **SMALL), gpt)):
        for W in dictionary_.W_dec:
            close(W.norm(dim=-1), torch.ones(W.shape[:-1]))


@pytest.mark.parametrize("mode", MODES)
def test_a_clt_of_one_layer_is_a_plt_bit_for_bit(tokens, mode):
    target, batch = one_layer(), lambda step: tokens.roll(step, 0)
    plt, clt = (train([Settings(kind, mode=mode, **SMALL)], target, batch)[0] for kind in ("plt", "clt"))
    for (name, a), b in zip(plt.named_parameters(), clt.parameters()):
        assert torch.equal(a, b.view_as(a)), name
    assert torch.equal(plt.threshold, clt.threshold)


# ---------------------------------------------------------------------------------------------------------------------
# Protocols


class ReLUMLP(MLP):
    def forward(self, x):
        return self.down(F.relu(self.up(x)))


def perfect(gpt) -> tuple[GPT, PLT]:
    """A target with ReLU MLPs in float64, and its own weights as a PLT with D = k = d_mlp."""
    for block in gpt.blocks:
        block.mlp.__class__ = ReLUMLP
    gpt.double()
    plt = new(Settings("plt", D=32, k=32), gpt).double()
    for l, mlp in enumerate(mlps_of(gpt)):
        plt.W_enc[l].data, plt.W_dec[l].data = mlp.up.weight.T.clone(), mlp.down.weight.T.clone()
    return gpt, plt


@pytest.mark.parametrize("batch", [False, True])
def test_a_relu_targets_own_weights_reproduce_it_under_every_protocol(gpt, tokens, batch):
    target, plt = perfect(gpt)
    hidden, xs, ys = target_pass(target, tokens)
    outputs, _ = clean_outputs(plt, xs, lambda l, x: plt.codes(l, x, batch))
    for output, y in zip(outputs, ys):
        close(output, y, atol=1e-12, rtol=0)
    close(error_propagating(target, plt, tokens)[0], hidden, atol=1e-12, rtol=0)
    close(substituted(target, tokens, dict(enumerate(outputs))), hidden, atol=1e-12, rtol=0)
    for l, output in enumerate(outputs):
        close(substituted(target, tokens, {l: output}), hidden, atol=1e-12, rtol=0)


def test_one_layer_makes_the_protocols_equal(tokens):
    target = one_layer()
    plt = new(Settings("plt", **SMALL), target)
    _, xs, _ = target_pass(target, tokens)
    outputs, hs = clean_outputs(plt, xs)
    hidden, replaced_hs = error_propagating(target, plt, tokens)
    assert torch.equal(hidden, substituted(target, tokens, {0: outputs[0]})) and torch.equal(hs[0], replaced_hs[0])


@pytest.mark.parametrize("kind", ["sae", "plt"])
def test_a_clean_input_code_never_sees_a_replaced_stream(gpt, tokens, kind):
    made = new(Settings(kind, **SMALL), gpt)
    _, xs, ys = target_pass(gpt, tokens)
    read = ys if kind == "sae" else xs
    clean, replaced = clean_outputs(made, read)[1], error_propagating(gpt, made, tokens)[1]
    made.b_dec[0].data += 1  # another y^_0
    clean_2, replaced_2 = clean_outputs(made, read)[1], error_propagating(gpt, made, tokens)[1]
    assert torch.equal(clean[1], clean_2[1]) and not torch.equal(replaced[1], replaced_2[1])
    assert torch.equal(replaced[0], replaced_2[0])


def test_a_target_pass_is_the_target(gpt, tokens):
    hidden, xs, ys = target_pass(gpt, tokens)
    assert torch.equal(hidden, gpt.hidden(tokens))
    for mlp, x, y in zip(mlps_of(gpt), xs, ys):
        assert torch.equal(mlp(x), y)
    assert torch.equal(substituted(gpt, tokens, {1: ys[1]}), hidden)


def test_nothing_is_left_in_the_target(gpt, tokens):
    before = gpt.hidden(tokens)
    with pytest.raises(ZeroDivisionError), dictionary.mlps_answered(gpt, lambda l, x: 1 / 0):
        gpt.hidden(tokens)
    assert torch.equal(gpt.hidden(tokens), before) and all("forward" not in vars(mlp) for mlp in mlps_of(gpt))


def test_a_target_without_mlps_is_refused():
    with pytest.raises(UserError, match="the target has no MLP"):
        mlps_of(nn.Linear(2, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("kind", ["sae", "plt", "clt"])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_leaves_unit_rows_and_no_gradient_along_them(gpt, tokens, kind, mode):
    gpt.requires_grad_(False)
    training = Training(Settings(kind, mode=mode, **SMALL), gpt)
    before = [W.detach().clone() for W in training.dictionary.W_dec]
    training.step(tokens, *target_pass(gpt, tokens))
    for W, old in zip(training.dictionary.W_dec, before):
        close(W.norm(dim=-1), torch.ones(W.shape[:-1]))
        close((W.grad * old).sum(-1), torch.zeros(W.shape[:-1]), atol=1e-6, rtol=0)
        assert W.grad.abs().max() > 0
    assert all(p.grad is None for p in gpt.parameters())


@pytest.mark.parametrize("mode", MODES[1:])
def test_the_kl_is_a_mean_over_positions(gpt, tokens, mode):
    training = Training(Settings("plt", mode=mode, **SMALL), gpt)
    hidden, xs, ys = target_pass(gpt, tokens)
    outputs, _ = clean_outputs(training.dictionary, xs, training.codes)
    found = training.reconstruction(tokens, hidden, outputs, ys)
    if mode == "error-propagating":
        replaced = [error_propagating(gpt, training.dictionary, tokens, training.codes)[0]]
    elif mode == "clean-input":
        replaced = [substituted(gpt, tokens, dict(enumerate(outputs)))]
    else:
        replaced = [substituted(gpt, tokens, {l: output}) for l, output in enumerate(outputs)]
    close(found, sum(kl_divergence(hidden @ gpt.unembedding.T, h @ gpt.unembedding.T) for h in replaced))


def test_gradients_reach_earlier_codes_through_later_encoders_in_the_error_propagating_mode_alone(gpt, tokens):
    gpt.requires_grad_(False)
    seen = target_pass(gpt, tokens)
    for mode, through in (("error-propagating", True), ("clean-input", False)):
        grads = []
        for scale in (1.0, 0.0):  # y^_1 the same, but not a function of what layer 1 reads
            training = Training(Settings("plt", mode=mode, **SMALL), gpt)
            codes = training.codes
            training.codes = lambda l, x: codes(l, x if l == 0 or scale else x.detach())
            training.step(tokens, *seen)
            grads.append(training.dictionary.W_enc[0].grad)
        assert torch.equal(*grads) != through


def test_the_auxiliary_loss_is_of_dead_latents_alone(gpt, tokens):
    made = new(Settings("clt", **SMALL), gpt)
    _, xs, ys = target_pass(gpt, tokens)
    residual = ys[0] - 1
    assert auxiliary(made, 0, xs[0], residual, torch.zeros(24, dtype=torch.bool)) == 0
    dead = torch.arange(24) % 3 == 0
    loss = auxiliary(made, 0, xs[0], residual, dead)
    a = F.relu(made.encode(0, xs[0]))[..., dead]
    close(loss, (a @ made.W_dec[0][dead, 0] - residual).square().mean())
    loss.backward()
    assert made.W_enc[0].grad[:, ~dead].abs().max() == 0 < made.W_enc[0].grad[:, dead].abs().max()
    assert made.W_dec[0].grad[~dead].abs().max() == 0 and made.W_dec[0].grad[:, 1].abs().max() == 0
    assert made.b_dec[0].grad is None


def test_at_most_so_many_dead_latents_rebuild_a_position(gpt, tokens, monkeypatch):
    monkeypatch.setattr(dictionary, "AUX_LATENTS", 2)
    made = new(Settings("plt", **SMALL), gpt)
    _, xs, ys = target_pass(gpt, tokens)
    values, index = F.relu(made.encode(0, xs[0])).topk(2)
    a = torch.zeros(3, 8, 24).scatter(-1, index, values)
    close(auxiliary(made, 0, xs[0], ys[0], torch.ones(24, dtype=torch.bool)), F.mse_loss(a @ made.W_dec[0], ys[0]))


def test_a_latent_is_dead_after_so_many_batches(gpt, tokens):
    training = Training(Settings("plt", **SMALL), gpt)
    x = target_pass(gpt, tokens)[1][0]
    training.dictionary.b_enc[0].data[:5] = -1e3
    for _ in range(dictionary.DEAD_AFTER):
        training.codes(0, x)
    assert (training.idle[0] >= dictionary.DEAD_AFTER)[:5].all()
    training.dictionary.b_enc[0].data[0] = 1e3
    training.codes(0, x)
    assert training.idle[0, 0] == 0 and training.idle[0, 1] == dictionary.DEAD_AFTER + 1


def test_dead_latents_are_trained(gpt, tokens):
    gpt.requires_grad_(False)
    for mode in MODES:
        training = Training(Settings("plt", mode=mode, **SMALL), gpt)
        training.idle[:, 7] = dictionary.DEAD_AFTER
        for l in (0, 1):
            training.dictionary.b_enc[l].data[7] = -0.5
        training.step(tokens, *target_pass(gpt, tokens))
        assert all(training.dictionary.W_dec[l].grad[7].abs().max() > 0 for l in (0, 1)), mode


@pytest.mark.parametrize("kind", ["sae", "plt", "clt"])
def test_training_learns_and_is_a_function_of_its_seed(gpt, tokens, kind):
    settings = Settings(kind, **SMALL | dict(steps=60, lr=3e-2))
    batch = lambda step: tokens
    _, xs, ys = target_pass(gpt, tokens)
    read = ys if kind == "sae" else xs
    off = lambda d: sum(F.mse_loss(o, y) for o, y in zip(clean_outputs(d, read)[0], ys)).item()
    one, two = (train([settings], gpt, batch)[0] for _ in range(2))
    (other, same) = train([replace(settings, seed=1), settings], gpt, batch)
    assert off(one) < 0.5 * off(new(settings, gpt))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    assert not torch.equal(one.W_enc[0], other.W_enc[0])


def test_a_loss_that_is_not_finite_ends_it(gpt, tokens):
    gpt.blocks[0].mlp.up.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="the loss is nan at step 0: try a smaller lr than 0.01"):
        train([Settings("plt", **SMALL)], gpt, lambda step: tokens)


@pytest.mark.parametrize("kind", ["sae", "plt", "clt"])
@pytest.mark.parametrize("mode", MODES)
def test_flops_against_the_counter_of_torch(gpt, tokens, kind, mode):
    gpt.requires_grad_(False)
    settings, row = Settings(kind, mode=mode, **SMALL), tokens[:1]
    with FlopCounterMode(display=False) as counter:  # which does not know attention on a CPU
        Training(settings, gpt).step(row, *target_pass(gpt, row))
    found = flops_a_token(settings, gpt)
    d, D, d_mlp, T, n = 16, 24, 32, 8, 2
    attention = n * 4 * T * d  # of one pass; the replaced passes go back through the last layer's alone, or both
    assert found * T >= counter.get_total_flops() + attention * T
    if mode == "local":
        assert found * T == counter.get_total_flops() + attention * T
        weights = n * (4 * d * d + 2 * d * d_mlp)
        decoders = {"sae": n, "plt": n, "clt": 3}[kind]
        assert found == 2 * weights + attention + n * 4 * d * D + decoders * 6 * d * D


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("kind", ["sae", "plt", "clt"])
def test_files_give_back_every_bit(gpt, tokens, tmp_path, kind):
    (made,) = train([Settings(kind, **SMALL)], gpt, lambda step: tokens)
    save(made, tmp_path / "there")
    found = load(tmp_path / "there")
    assert type(found) is type(made) and found.settings == made.settings
    assert found.state_dict().keys() == made.state_dict().keys()
    for name, value in made.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    assert not any(p.requires_grad for p in found.parameters())


def test_an_sae_as_saelens_reads_it(gpt, tokens, tmp_path):
    (sae,) = train([Settings("sae", **SMALL)], gpt, lambda step: tokens)
    save(sae, tmp_path)
    y = target_pass(gpt, tokens)[2][1]
    cfg, w = (
        json.loads((tmp_path / "layer_1/cfg.json").read_text()),
        load_file(tmp_path / "layer_1/sae_weights.safetensors"),
    )
    assert (cfg["d_in"], cfg["d_sae"], cfg["architecture"], cfg["apply_b_dec_to_input"]) == (16, 24, "jumprelu", False)
    assert {name: list(v.shape) for name, v in w.items()} == {
        "W_enc": [16, 24], "b_enc": [24], "W_dec": [24, 16], "b_dec": [16], "threshold": [24],
    }  # fmt: skip
    z = y @ w["W_enc"] + w["b_enc"]
    close(F.relu(z) * (z > w["threshold"]) @ w["W_dec"] + w["b_dec"], sae.decode(1, [None, sae.codes(1, y)]))


def test_a_plt_and_a_clt_as_circuit_tracer_reads_them(gpt, tokens, tmp_path):
    x = target_pass(gpt, tokens)[1]
    plt, clt = train([Settings(kind, **SMALL) for kind in ("plt", "clt")], gpt, lambda step: tokens)
    save(plt, tmp_path / "plt")
    w = load_file(tmp_path / "plt/layer_0.safetensors")
    assert w.keys() == {"W_enc", "b_enc", "W_dec", "b_dec", "activation_function.threshold"}
    assert w["W_enc"].shape == w["W_dec"].shape == (24, 16)
    z = F.linear(x[0], w["W_enc"], w["b_enc"])
    close(z * (z > w["activation_function.threshold"]) @ w["W_dec"] + w["b_dec"], plt.decode(0, [plt.codes(0, x[0])]))
    save(clt, tmp_path / "clt")
    assert {p.name for p in (tmp_path / "clt").glob("*.safetensors")} == {
        f"W_{what}_{l}.safetensors" for what in ("enc", "dec") for l in (0, 1)
    }
    hs, total = [], 0
    for i in (0, 1):
        w = load_file(tmp_path / f"clt/W_enc_{i}.safetensors") | load_file(tmp_path / f"clt/W_dec_{i}.safetensors")
        assert w.keys() == {f"{name}_{i}" for name in ("W_enc", "b_enc", "b_dec", "threshold", "W_dec")}
        assert w[f"W_enc_{i}"].shape == (24, 16) and w[f"W_dec_{i}"].shape == (24, 2 - i, 16)
        z = F.linear(x[i], w[f"W_enc_{i}"], w[f"b_enc_{i}"])
        total = total + z * (z > w[f"threshold_{i}"]) @ w[f"W_dec_{i}"][:, 1 - i]
        hs.append(clt.codes(i, x[i]))
    close(total + w["b_dec_1"], clt.decode(1, hs))
    assert isinstance(clt, CLT)


@pytest.mark.parametrize("kind", ["sae", "plt", "clt"])
def test_what_is_not_whole_is_refused(gpt, tmp_path, kind):
    with pytest.raises(UserError, match="holds no whole dictionary"):
        load(tmp_path / "nowhere")
    save(new(Settings(kind, **SMALL), gpt), tmp_path)
    path = sorted(tmp_path.rglob("*.safetensors"))[-1]
    w = load_file(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(UserError, match="holds no whole dictionary"):
        load(tmp_path)
    save_file({name: v[..., :-1].contiguous() for name, v in w.items()}, path)
    with pytest.raises(UserError, match="holds no whole dictionary"):
        load(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="holds no whole dictionary"):
        load(tmp_path)
