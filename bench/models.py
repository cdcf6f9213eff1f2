"""What a step of decompose.py costs on models that others have trained: memory and time, counted from their sizes.

    python -m bench.models                               # every model, at the default run's 4 x 64 tokens a step
    python -m bench.models --models=gpt2 --C='*.10.mlp.*=3072'    # two matrices of one block

The models are built from their published sizes on fake tensors (cost.py): nothing is downloaded, nothing allocated.
Time is FLOPs over the rate of a matrix product on one core here, the fastest of 50, and so a lower bound. It needs
`pip install transformers`. Left out: measured times; a GPU.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

import cost
import decompose
import pretrained
from flags import UserError, parse_counts, require
from run import run_script

SIZES = {  # (class of the configuration, what differs from its defaults)
    "pythia-14m": ("GPTNeoXConfig", dict(
        vocab_size=50_304, hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4)),
    "pythia-70m": ("GPTNeoXConfig", dict(
        vocab_size=50_304, hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8)),
    "gpt2": ("GPT2Config", dict()),
    "Qwen2.5-0.5B": ("Qwen2Config", dict(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True)),
    "Qwen3-0.6B": ("Qwen3Config", dict(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)),
    "Llama-3.2-1B": ("LlamaConfig", dict(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True)),
    "gemma-2-2b": ("Gemma2Config", dict(
        vocab_size=256_000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256)),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    models: str = ",".join(SIZES)
    C: str = "auto"  # as in decompose.py
    B: int = decompose.Config.B  # sequences a step
    T: int = decompose.Config.T  # tokens a sequence
    memory_budget: float = 1.0  # as in decompose.py
    muon: float = decompose.Config.muon  # as in decompose.py; 0: without its steps

    def __post_init__(self) -> None:
        require(self, "above 0", "B", "T")
        require(self, "0 or above", "muon")
        require(self, "between 0 and 1", "memory_budget")
        if self.C != "auto":
            parse_counts("C", self.C)
        if not set(self.models.split(",")) <= set(SIZES):
            raise UserError(f"models={self.models!r}: must be some of {','.join(SIZES)}")


def shape_of(name: str) -> dict[str, Any]:
    """What pretrained.py knows about a model of these sizes, untrained."""
    kind, sizes = SIZES[name]
    config = getattr(pretrained.library(name), kind)(**sizes)
    return {"target": name, "dtype": "float32", "config": pretrained.as_text(config), "revision": "", "digest": ""}


def counted(name: str, config: Config) -> tuple[cost.Cost, dict[str, int]]:
    """A step on it; and how many matrices, subcomponents and weights there are."""
    settings = decompose.Config(C=config.C, muon=config.muon, memory_budget=config.memory_budget)
    settings = replace(settings, B=config.B, T=config.T)
    found, shape = {}, pretrained.untrained(shape_of(name))

    def make() -> list:
        vpd, gamma = decompose.build(settings, shape, torch.device("cpu"))
        target = vpd.decomposition.target
        found.update(weights=sum(W.numel() for W in target.parameters()), L=vpd.decomposition.L, C=gamma["C"])
        x = torch.zeros((config.B, config.T), dtype=torch.long)
        return [lambda: vpd.train_step(x)]

    return cost.counted(make)[0], found


def rate(n: int = 512, tries: int = 50) -> float:
    """FLOPs a second of an n x n matrix product on one core: the fastest of some, whatever else the machine does."""
    threads, seconds, a = torch.get_num_threads(), [], torch.randn(n, n)
    torch.set_num_threads(1)
    for _ in range(tries):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return 2 * n**3 / min(seconds)


def main(config: Config) -> None:
    flops_s = rate()
    row = "{:14s} {:>8} {:>8} {:>9} {:>9} {:>9} {:>12} {:>10}".format
    print(f"{config.B} x {config.T} tokens a step, C={config.C}; a matrix product reaches {flops_s / 1e9:.0f} GFLOP/s")
    print(row("model", "weights", "matrices", "C", "GB before", "GB at peak", "GFLOP/token", "s a step"))
    for name in config.models.split(","):
        step, n = counted(name, config)
        memory = f"{step.held / 1e9:.2f}", f"{(step.held + step.peak) / 1e9:.2f}"
        work = f"{step.flops / config.B / config.T / 1e9:.2f}", f"{step.flops / flops_s:.2f}"
        print(row(name, f"{n['weights'] / 1e6:,.0f}M", n["L"], f"{n['C']:,}", *memory, *work), flush=True)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
