"""The step on a GPU against the CPU's, in bf16, compiled, resumed. `python -m bench.gpu --parts=a` runs those of a GPU.

Each test runs on the CPU too, where it says that the test itself is right.
"""

import copy
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

import cost
import decompose
import losses
import muon
import run
from bench import step as bench
from model import GPT, GPTConfig

GPU = pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
CPU = torch.device("cpu")
on_each = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
slow_on_cpu = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)]
)

SETTINGS = decompose.Config(
    B=4, T=16, C="*=24", d_ci=32, n_layer_ci=1, n_head_ci=2, d_mlp_ci=64, steps=50, lr=1e-3, adv_warmup=0.0
)
TARGET = GPTConfig(vocab_size=128, context=16, n_layer=2, n_head=2, d_model=32, d_mlp=64)


def built(device: str, compiled: bool = False, graphed: bool = False, **changes) -> decompose.VPD:
    """A VPD of a target whose weights are large, so that every matrix matters; the same on every device."""
    torch.manual_seed(0)
    target = GPT(TARGET)
    for weight in target.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    checkpoint = {"gpt": asdict(TARGET), "model": target.state_dict()}
    vpd, _ = decompose.build(replace(SETTINGS, **changes), checkpoint, torch.device(device), compiled, graphed)
    vpd.divergence.chunk = 24  # three chunks of the 64 positions
    return vpd


def batch(step: int, device: str) -> Tensor:
    return torch.randint(0, 128, (4, 16), generator=torch.Generator().manual_seed(step)).to(device)


def losses_of(vpd: decompose.VPD, steps: int) -> Tensor:
    """[steps, losses], in float64 on the CPU."""
    rows = [vpd.train_step(batch(step, vpd.device)) for step in range(steps)]
    return torch.stack([torch.stack([row[name] for name in losses.BETAS]) for row in rows]).double().cpu()


def off(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return ((found.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm()).item()


@on_each
def test_a_step_in_fp32_is_that_of_the_cpu(device, monkeypatch, record_property):
    """Losses and gradients, from the same weights, sources and draws."""
    monkeypatch.setattr(run, "bf16", lambda device: False)
    found, vpds = [], [built(on) for on in ("cpu", device)]
    for on, vpd in zip(("cpu", device), vpds):
        generator = torch.Generator().manual_seed(3)
        drawn = lambda shape, _, on=on, generator=generator: torch.rand(shape, generator=generator).to(on)
        routed = lambda shape, L, _, drawn=drawn: drawn((*shape, L), None) < 0.5
        monkeypatch.setattr(losses, "sample_sources", drawn)
        monkeypatch.setattr(losses, "sample_routing", routed)
        vpd.adversary.r.copy_(drawn(vpd.adversary.r.shape, None))
        row = losses_of(vpd, 1)
        found.append((row, torch.cat([weight.grad.flatten() for weight in vpd.learning]), vpd.adversary.r))
    far = [off(there, here) for here, there in zip(*found)]
    record_property("off", "losses {:.1e}, gradients {:.1e}, sources {:.1e}".format(*far))
    assert far[0] < 1e-5 and far[1] < 1e-4 and far[2] < 1e-3


@on_each
def test_losses_in_bf16_are_within_1_percent(device, monkeypatch, record_property):
    """Of each loss, mean over 50 steps; over 10 on a CPU, for which bf16 is slow."""
    means, steps = [], 50 if device == "cuda" else 10
    for bf16 in (False, True):
        monkeypatch.setattr(run, "bf16", lambda device, bf16=bf16: bf16)
        means.append(losses_of(built(device), steps).mean(0))
    far = ((means[1] - means[0]) / means[0]).abs()
    record_property("off", ", ".join(f"{name} {value:.1e}" for name, value in zip(losses.BETAS, far.tolist())))
    assert (far < 0.01).all() and far.max() > 0


@slow_on_cpu
@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_compiled_steps_in_bf16_are_the_eager_ones(device, budget, monkeypatch, record_property):
    """Of each loss over 5 steps, with the divergence in chunks; they differ by the rounding of what is fused."""
    monkeypatch.setattr(run, "bf16", lambda device: True)
    torch.compiler.reset()
    eager, compiled = (losses_of(built(device, compiled, memory_budget=budget), 5) for compiled in (False, True))
    far = ((compiled - eager) / eager).abs().max(0).values
    record_property("off", ", ".join(f"{name} {value:.1e}" for name, value in zip(losses.BETAS, far.tolist())))
    assert (far < 0.02).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("changes", [{}, dict(halves=False, muon=0.0), dict(adv_fresh=0.5), dict(adv_routing="subset")])
def test_a_replayed_step_is_the_launched_one(changes, record_property):
    """Losses of 12 steps and the weights after them; and it goes on from a state that is loaded."""
    found = []
    for graphed in (False, True):
        vpd = built("cuda", graphed=graphed, **changes)
        row = losses_of(vpd, 12)
        found.append((row, torch.cat([weight.detach().flatten() for weight in vpd.learning])))
        assert graphed == isinstance(vpd.losses_and_gradients, run.Graphed)
    far = [off(there, here) for here, there in zip(*found)]
    record_property("off", "losses {:.1e}, weights {:.1e}".format(*far))
    assert max(far) < 1e-4
    state = copy.deepcopy(vpd.state_dict())
    expected = losses_of(vpd, 3)
    vpd.load_state_dict(state)
    assert off(losses_of(vpd, 3), expected) < 1e-4


@on_each
@pytest.mark.parametrize("changes", [{}, dict(halves=True, muon=4.0)], ids=["", "halves and Muon"])
def test_a_resumed_run_goes_on_as_it_would_have(device, changes, record_property):
    """2 + 2 steps against 4: bit for bit on a CPU; on a GPU it is said how far off."""
    whole = built(device, **changes)
    expected = losses_of(whole, 4)
    first, second = built(device, **changes), built(device, seed=5, **changes)
    losses_of(first, 2)
    second.load_state_dict(first.state_dict())
    rows = [second.train_step(batch(step, device)) for step in (2, 3)]
    found = torch.stack([torch.stack([row[name] for name in losses.BETAS]) for row in rows]).double().cpu()
    weights = [torch.cat([weight.detach().flatten() for weight in vpd.learning]) for vpd in (second, whole)]
    far = off(found, expected[2:]), off(*weights)
    record_property("off", "losses {:.1e}, weights {:.1e}".format(*far))
    assert far == (0, 0) if device == "cpu" else max(far) < 1e-4


@on_each
def test_fused_adamw_is_the_plain_one(device):
    shapes, after = ((64, 48), (48,), (1, 1)), []
    for fused in (True, False):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
        optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0, fused=fused)
        for _ in range(10):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator).to(device)
            optimizer.step()
        after.append(torch.cat([weight.detach().flatten() for weight in weights]))
    assert off(*after) < 1e-6


@slow_on_cpu
def test_the_compiled_ascent_is_the_eager_one(device):
    """adam_ascent in one kernel; the sources stay in [0, 1]."""
    after, lr = [], torch.tensor(0.1, device=device)
    for update in (losses.adam_ascent, run.compiled(losses.adam_ascent)):
        generator = torch.Generator(device).manual_seed(0)
        adversary = losses.Adversary((3, 5), 40, generator)
        adversary.update = update
        for _ in range(5):
            adversary.ascend(torch.randn(adversary.r.shape, generator=generator, device=device), lr, 0.5)
        assert adversary.r.min() >= 0 and adversary.r.max() <= 1
        after.append(torch.cat([adversary.r, adversary.mom1, adversary.mom2]))
    assert off(*after) < 1e-6


@on_each
def test_muon_in_bf16_is_near_that_in_fp32(device, monkeypatch, record_property):
    found, G = [], torch.randn(96, 40, generator=torch.Generator().manual_seed(0)).to(device)
    for bf16 in (True, False):
        monkeypatch.setattr(run, "bf16", lambda device, bf16=bf16: bf16)
        found.append(muon.orthogonalised(G, 3))
    record_property("off", f"{off(*found):.1e}")
    assert off(*found) < 0.05


@on_each
def test_a_batch_that_is_sent_arrives(device):
    x = batch(0, "cpu")
    there = [run.sent(x + i, torch.device(device)) for i in range(50)]
    assert all(t.device.type == device and torch.equal(t.cpu(), x + i) for i, t in enumerate(there))


@on_each
def test_nothing_is_read_back_in_a_step(device):
    """On a GPU, where the host would wait for it: torch raises then."""
    vpd, x = built(device), batch(0, device)
    vpd.train_step(x)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        vpd.train_step(x)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@on_each
@pytest.mark.parametrize("size", ["pile2", "paper4"])
def test_the_peak_is_the_counted_one(device, size, record_property):
    """Of an eager step, within 15 %; at a size where a GPU's allocator rounds little."""
    scale, B, T = (0.02, 2, 16) if device == "cpu" else (0.5, 8, 256)
    settings, gpt = bench.sizes(bench.Config(size, scale=scale, B=B, T=T))
    half, device = run.bf16(torch.device(device)), torch.device(device)
    (counted,) = cost.counted(lambda: decompose.trial(settings, gpt, CPU)[:1], half)
    vpd, _ = decompose.build(settings, {"gpt": asdict(gpt), "model": GPT(gpt).state_dict()}, device)
    x = torch.zeros((B, T), dtype=torch.long, device=device)
    vpd.train_step(x), vpd.optimizer.zero_grad()
    measured = bench.peak_bytes(lambda: vpd.train_step(x), device)
    record_property("off", f"{measured / counted.peak - 1:+.1%}")
    assert measured == pytest.approx(counted.peak, rel=0.15)
