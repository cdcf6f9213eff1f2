"""bench.py: its sizes, what it prints, and the memory that it measures. Times themselves are never asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import estimate
from bench import step as bench
from model import GPTConfig

ROOT = Path(__file__).parent.parent


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "bench.step", *flags], cwd=ROOT, capture_output=True, text=True)


def test_sizes_are_the_published_ones():
    run, gpt = bench.sizes(bench.Config("paper4"))
    assert gpt == GPTConfig(vocab_size=50_277, context=512, n_layer=4, n_head=6, d_model=768, d_mlp=3072)
    assert estimate.cost(run, gpt).subcomponents == 38_912
    assert (run.B, run.T, run.d_ci, run.n_layer_ci, run.n_head_ci, run.d_mlp_ci) == (64, 512, 2048, 8, 16, 8192)
    run, gpt = bench.sizes(bench.Config("default"))
    assert gpt == GPTConfig() and estimate.cost(run, gpt).subcomponents == 1616 and (run.B, run.T) == (2, 64)


def test_json_of_a_scaled_size():
    done = run("--size=pile2", "--scale=0.02", "--B=2", "--T=8", "--steps=2", "--compile=False", "--json=True")
    m = json.loads(done.stdout)
    assert len(done.stdout.splitlines()) == 1
    assert {"step_s", "tokens_per_s", "peak_bytes", "mfu", "parts"} <= m.keys() and len(m["parts"]) == 6
    assert m["tokens_per_s"] == pytest.approx(2 * 8 / m["step_s"])
    assert m["mfu"] == pytest.approx(m["flops"] / m["step_s"] / m["matmul_flops_per_s"])
    assert m["flops"] == estimate.cost(*bench.sizes(bench.Config("pile2", scale=0.02, B=2, T=8))).flops
    assert 0 < m["peak_bytes"] < m["naive_peak_bytes"]  # the naive step holds logits [2, 8, 1006] several times


def test_peak_counts_what_is_held_at_a_time():
    def call() -> None:
        for _ in range(3):
            torch.empty(1000)  # 4,000 bytes, freed before the next
        a, b = torch.empty(1000), torch.empty(500)
        del a, b

    assert bench.peak_bytes(call, torch.device("cpu")) == 6000


def test_sweep_writes_its_figure(tmp_path):
    done = run("--scale=0.1", "--B=1", "--T=4", "--steps=1", "--compile=False", f"--sweep={tmp_path}/scaling.png")
    assert done.stdout.count(" ms, ") == 9 and (tmp_path / "scaling.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "flag, message",
    [("--size=huge", "size"), ("--scale=0", "scale=0.0: must be above 0"), ("--B=-1", "B=-1: must be 0 or above")],
)
def test_bad_input_ends_in_one_line(flag, message):
    done = run(flag)
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: ")
        and message in done.stderr
        and done.stderr.count("\n") == 1
    )
