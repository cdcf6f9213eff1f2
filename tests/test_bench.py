"""bench.step: its sizes, what it prints, and the memory that it measures; the naive step. Times are never asserted."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import as_flags, one_line

import cost
import decompose
import flags
import losses
import model
import run
from bench import step as bench
from bench.naive import NaiveVPD
from model import GPTConfig


def subcomponents(settings: decompose.Config) -> int:
    """Of one layer of the target: every pattern of C matches one of its matrices."""
    return sum(flags.parse_counts("C", settings.C).values())


def test_sizes_are_the_published_ones():
    settings, gpt = bench.sizes(bench.Config("paper4"))
    assert gpt == GPTConfig(vocab_size=50_277, context=512, n_layer=4, n_head=6, d_model=768, d_mlp=3072)
    assert 4 * subcomponents(settings) == 38_912
    gamma = (settings.d_ci, settings.n_layer_ci, settings.n_head_ci, settings.d_mlp_ci)
    assert (settings.B, settings.T, *gamma) == (64, 512, 2048, 8, 16, 8192)
    settings, gpt = bench.sizes(bench.Config("default"))
    assert (settings, gpt) == (decompose.Config(), GPTConfig())


def test_scale_and_factor_widen_a_size():
    settings, gpt = bench.sizes(bench.Config(scale=0.5, memory_budget=0.25), C_factor=4)
    assert gpt == GPTConfig(512, 64, 2, 4, 32, 128)
    assert settings.C == "*.q=128,*.k=128,*.v=170,*.o=170,*.up=496,*.down=524"  # half of the width, twice the C
    assert (settings.d_ci, settings.d_mlp_ci, settings.memory_budget) == (64, 256, 0.25)


def test_json_of_a_scaled_size(monkeypatch, capfd):
    """One line; the FLOPs are those that the method needs: recomputation takes time but does not raise the MFU."""
    small = dict(size="pile2", scale=0.02, B=2, T=8, steps=1, compile=False, memory_budget=0.0)
    monkeypatch.setattr(sys, "argv", ["bench.step", *as_flags(small), "--json"])
    run.run_script(bench.main, bench.Config, bench.__doc__)
    (line,) = capfd.readouterr().out.splitlines()
    m = json.loads(line)
    assert m["tokens_per_s"] == pytest.approx(2 * 8 / m["step_s"])
    assert m["mfu"] == pytest.approx(m["flops"] / m["step_s"] / m["matmul_flops_per_s"])
    assert m["times_as_fast"] > 0 and len(m["parts"]) == 5 and not m["compile"]
    assert 0 < m["peak_bytes"] < m["naive_peak_bytes"]  # the naive step holds logits [2, 8, 1006] several times
    settings, gpt = bench.sizes(bench.Config(**small | {"memory_budget": 1.0}))
    step, _ = cost.counted(lambda: decompose.trial(settings, gpt, torch.device("cpu")), again=False)
    assert m["flops"] == step.flops

    printed = bench.text(m)
    assert "pile2: 2 x 8 tokens a step" in printed and "step, eager" in printed and "times as fast" in printed
    assert printed.count("% of a step") == 5


def test_peak_counts_what_is_held_at_a_time():
    def call() -> None:
        for _ in range(3):
            torch.empty(1000)  # 4,000 bytes, freed before the next
        a, b = torch.empty(1000), torch.empty(500)
        del a, b

    assert bench.peak_bytes(call, torch.device("cpu")) == 6000


def test_sweep_writes_its_figure(tmp_path, capsys, monkeypatch):
    """At once, twice and four times the size in C, T and B; what `measure` would find is made up."""

    def made_up(config, settings, gpt, compiled, device) -> dict:
        assert not config.naive and gpt.context == settings.T
        m = {"C": 2 * subcomponents(settings), "T": settings.T, "B": settings.B}
        return m | {"step_s": 0.01, "peak_bytes": 10**6, "matmul_flops_per_s": 1e9}

    monkeypatch.setattr(bench, "measure", made_up)
    bench.main(bench.Config(sweep=f"{tmp_path}/scaling.png"))
    lines = [line.partition(":")[0].replace(",", "") for line in capsys.readouterr().out.splitlines()]
    of_C = [f"C = {C} T = 64 B = 4" for C in (1616, 3232, 6464)]
    of_T = [f"C = 1616 T = {T} B = 4" for T in (64, 128, 256)]
    of_B = [f"C = 1616 T = 64 B = {B}" for B in (4, 8, 16)]
    assert lines[:9] == of_C + of_T + of_B and len(lines) == 10
    assert (tmp_path / "scaling.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--size=huge", "--size=huge: must be 'default', 'pile2', 'paper4'"),
        ("--scale=0", "scale=0.0: must be above 0"),
        ("--scale=1e9", "scale=1000000000.0: must be at most 4"),
        ("--B=-1", "B=-1: must be 0 or above"),
        ("--memory_budget=2", "memory_budget=2.0: must be between 0 and 1"),
        ("--memory_budget=half", "--memory_budget=half: must be a number or 'auto'"),
    ],
)
def test_bad_input_ends_in_one_line(flag, message):
    assert message in one_line(bench, flag)


def test_the_naive_step_shares_nothing_that_it_is_to_check(decomposition, tokens, monkeypatch):
    """Masks, draws, divergences, losses, the sources' Adam and the masked pass of the fast step are all broken."""

    def broken(*args, **kwargs):
        raise AssertionError("used by the naive step")

    fast = ["mask", "sample_sources", "sample_routing", "kl_divergence", "HiddenKL", "power_sums", "adam_ascent"]
    fast += ["reconstruction", "importance_minimality", "frequency_minimality", "faithfulness", "Adversary"]
    for name in fast:
        monkeypatch.setattr(losses, name, broken)
    monkeypatch.setattr(model, "masked_product", broken)
    monkeypatch.setattr(model.LinearsAnswered, "__torch_function__", broken)
    ci_fn = decompose.CITransformer([16] * 5 + [32] + [16] * 5 + [32], 52, 16, 1, 2, 16)
    naive = NaiveVPD(decomposition, ci_fn, decompose.Config(), tuple(tokens.shape), torch.device("cpu"))
    assert naive.train_step(tokens)["total"] > 0


def test_bench_does_not_need_the_tests():
    for path in Path(bench.__file__).parent.glob("*.py"):
        assert not {"from tests", "import tests"} & {line[:12].rstrip() for line in path.read_text().splitlines()}
