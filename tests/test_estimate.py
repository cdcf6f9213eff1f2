"""The estimate against what it estimates, and the settings of the scales."""

import json
from dataclasses import asdict, fields, replace

import pytest
import torch
from test_decompose import home  # noqa: F401  (home is a fixture)
from torch.utils.flop_counter import FlopCounterMode

import decompose
import run
import train_target
from bench import estimate
from model import GPT, GPTConfig

SMALL = GPTConfig(vocab_size=300, context=32, n_layer=2, n_head=4, d_model=64, d_mlp=128)


def small(**changes) -> decompose.Config:
    return decompose.Config(**dict(B=4, T=32, compile=False) | changes)


def build(config: decompose.Config) -> decompose.VPD:
    return decompose.build(config, {"gpt": asdict(SMALL), "model": GPT(SMALL).state_dict()}, torch.device("cpu"))[0]


def test_parameters_are_those_of_the_run():
    c, vpd = estimate.cost(small(), SMALL), build(small())
    assert c.parameters["target"] == sum(p.numel() for p in vpd.decomposition.target.parameters())
    assert c.parameters["U, V"] == sum(p.numel() for p in vpd.decomposition.subcomponents())
    assert c.parameters["Gamma"] == sum(p.numel() for p in vpd.ci_fn.parameters())
    assert c.memory["sources"] == 3 * 4 * vpd.adversary.r.numel()


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"beta_adv": 0.0}, {"S": 2, "n_adv": 1}])
def test_flops_are_those_that_torch_counts(changes):
    vpd = build(small(**changes))
    with FlopCounterMode(display=False) as counter:
        vpd.train_step(torch.randint(0, 300, (4, 32)))
    assert estimate.cost(small(**changes), SMALL).flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_published_flops():
    """About 7 GFLOP a token, as was found for the 4-layer run."""
    config = replace(decompose.Config(), **decompose.SCALES["published"])
    c = estimate.cost(config, estimate.TARGETS["67M"])
    assert c.flops / (64 * 512) == pytest.approx(7e9, rel=0.1)
    assert c.subcomponents == 38_912
    assert c.memory["sources"] == pytest.approx(15.3e9, rel=0.01)


def test_parts_and_processes_need_less_memory_each():
    whole = estimate.cost(small(), SMALL)
    half = estimate.cost(small(accumulate=2), SMALL)
    assert (
        half.memory["masked passes"] == whole.memory["masked passes"] / 2
        and half.memory["sources"] == whole.memory["sources"]
    )
    shared = estimate.cost(small(), SMALL, processes=2)
    assert shared.memory["sources"] == whole.memory["sources"] / 2 and shared.memory["Gamma"] == whole.memory["Gamma"]
    sharded = estimate.cost(small(shard=True), SMALL, processes=2)
    assert sharded.memory == shared.memory | {"Gamma": whole.memory["Gamma"] / 2}
    # With hardly a batch it is a block that counts, 12 d_ci^2 weights and 5 d_ci biases: itself, its gradient, and that again
    few = dict(B=2, T=1, d_ci=512, d_mlp_ci=2048, C="*.q=4", shard=True)
    memory = estimate.cost(small(**few), SMALL, processes=2).memory
    held = estimate.cost(small(**few | {"shard": False}), SMALL).memory["Gamma"] / 2
    assert memory["Gamma"] + memory["masked passes"] + memory["logits"] == held + 12 * (12 * 512**2 + 5 * 512)


def test_what_cannot_fit_is_refused_with_the_flags_that_help(monkeypatch, capsys):
    needs = [estimate.cost(small(B=8, accumulate=n), SMALL).total_memory for n in (1, 2, 4)]
    monkeypatch.setattr(estimate, "available_memory", lambda device: needs[2] * 1.001)
    with pytest.raises(ValueError, match="it would fit with --accumulate=4 or --B="):
        estimate.report(small(B=8), SMALL, torch.device("cpu"), 1, half=False)
    assert "GFLOP a token" in capsys.readouterr().out
    estimate.report(small(B=8, accumulate=4), SMALL, torch.device("cpu"), 1, half=False)  # and it does
    monkeypatch.setattr(
        estimate,
        "available_memory",
        lambda device: 2 * estimate.cost(small(B=2, shard=True), SMALL, processes=2).total_memory,
    )
    with pytest.raises(ValueError, match="it would fit with --shard=True$"):
        estimate.report(small(B=2), SMALL, torch.device("cpu"), 2, half=False)
    monkeypatch.setattr(estimate, "available_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="no smaller batch would fit either"):
        estimate.report(small(B=8), SMALL, torch.device("cpu"), 1, half=False)


@pytest.mark.parametrize("script", [decompose, train_target])
def test_scales_are_whole_settings_and_follow_the_dataset(script):
    for scale in script.SCALES:
        script.Config(scale=scale, **script.SCALES[scale])
        assert set(script.SCALES[scale]) <= {f.name for f in fields(script.Config)}
    for dataset, scale in {"stdlib": "laptop", "pile": "gpu", "hf:owner/set": "gpu"}.items():
        assert script.Config(dataset=dataset).defaults() == script.Config(scale=scale, **script.SCALES[scale])
    assert script.Config(dataset="pile", scale="laptop").defaults().max_tokens == 20_000_000
    assert script.Config(dataset="pile", scale="published").defaults().max_tokens == 15 * 10**8


@pytest.mark.slow
def test_a_file_of_the_piles_shape_to_the_table_at_scale_tiny(home, monkeypatch, capsys):
    """`python decompose.py --dataset=<.jsonl.zst> --scale=tiny`, target and all; a flag goes on top of the scale."""
    import zstandard

    rows = "".join(
        json.dumps({"text": f"{i} is the square of {i**0.5:.3f}.\n" * 4, "meta": {"pile_set_name": "Pile-CC"}}) + "\n"
        for i in range(300)
    )
    (home / "shard.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    monkeypatch.setattr(
        "sys.argv",
        ["decompose.py", "--dataset=shard.jsonl.zst", "--scale=tiny", "--max_tokens=5000", "--steps=30", "--out=tiny"],
    )
    run.run_script(decompose.main, decompose.Config, None)
    printed = capsys.readouterr().out
    assert "adversarial_320" in printed and "s a step on this device" in printed
    saved = json.loads((home / "tiny/config.json").read_text())
    assert (saved["scale"], saved["T"], saved["steps"], saved["C"]) == ("tiny", 16, 30, "*=6")
    assert (next((home / "out").glob("target-shard-*-tiny")) / "checkpoint.pt").exists()
