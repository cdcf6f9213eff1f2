"""What the decomposition of a 67M, a 1B and an 8B target would cost: memory, computation, GPUs, days.

    python -m bench.plan                  # five minutes on a CPU core: 67M half a minute, 1B 90 s, 8B 3 minutes
    python -m bench.plan --targets=67M    # 109 GB with memory_budget=1, on 2 GPUs; 80 GB with 0, on one; 3 and 7 days

67M is the published run. 1B and 8B take its settings and batch, with C, Gamma's width and its depth in the published
proportion to those of the target. Everything is counted on fake tensors (cost.py), of eager steps in bf16. On n
GPUs each takes 1/n of the rows; of Gamma's 16 bytes a parameter (itself, its gradient, two moments) all but 1/n are
subtracted, as --shard=True divides them. The target, U and V are whole on each: it is they that keep 8B from fitting.

Left out: the unit of Gamma that runs, which is whole for that time (in 1B at most 2.6B parameters); messages.
"""

import sys
from dataclasses import asdict, dataclass, replace

import torch

import cost
import decompose
import flags
import run
from flags import UserError
from model import GPT, GPTConfig

TARGETS = {
    "67M": GPTConfig(50_257, 512, n_layer=4, n_head=6, d_model=768, d_mlp=3072),
    "1B": GPTConfig(50_257, 512, n_layer=18, n_head=16, d_model=2048, d_mlp=8192),
    "8B": GPTConfig(50_257, 512, n_layer=32, n_head=32, d_model=4096, d_mlp=22_528),
}


@dataclass(frozen=True)
class Config:
    targets: str = ",".join(TARGETS)
    gpu_memory: float = 80e9  # bytes
    gpu_flops: float = cost.GPU_FLOPS  # that a GPU reaches a second, in bf16
    gpu_bytes: float = cost.GPU_BYTES  # that it reads and writes a second

    def __post_init__(self) -> None:
        flags.require(self, "above 0", "gpu_memory", "gpu_flops", "gpu_bytes")
        if not set(self.targets.split(",")) <= set(TARGETS):
            raise UserError(f"targets={self.targets!r}: must be some of {','.join(TARGETS)}")


def settings(gpt: GPTConfig) -> decompose.Config:
    """The published settings, with C and Gamma in the published proportion to the target's width and depth."""
    published = decompose.Config(**decompose.SCALES["published"])
    wide, wide_mlp, C = gpt.d_model / 768, gpt.d_mlp / 3072, flags.parse_counts("C", published.C)
    C = {name: round(C_l * (wide_mlp if name in ("*.up", "*.down") else wide)) for name, C_l in C.items()}
    d_ci = 32 * round(2048 * wide / 32)
    gamma = {"d_ci": d_ci, "d_mlp_ci": 4 * d_ci, "n_layer_ci": 2 * gpt.n_layer}
    return replace(published, C=",".join(f"{name}={C_l}" for name, C_l in C.items()), **gamma)


def counted(c: decompose.Config, gpt: GPTConfig, processes: int) -> tuple[cost.Cost, dict[str, int]]:
    """A step of one of the processes, with all of Gamma; and C and the parameters of target, U and V, Gamma."""
    print(f"counting, memory_budget={c.memory_budget:g}, one of {processes} processes ...", file=sys.stderr)
    sizes, c = {}, replace(c, B=c.B // processes)

    def make() -> list:
        vpd, gamma = decompose.build(c, {"gpt": asdict(gpt), "model": GPT(gpt).state_dict()}, torch.device("cpu"))
        f, x = vpd.decomposition, torch.zeros((c.B, c.T), dtype=torch.long)
        parts = {"target": f.target.parameters(), "U, V": f.subcomponents(), "Gamma": vpd.ci_fn.parameters()}
        sizes.update({"C": gamma["C"]} | {name: sum(p.numel() for p in part) for name, part in parts.items()})
        return [lambda: vpd.train_step(x)]

    return cost.counted(make, bf16=True)[0], sizes


def main(config: Config) -> None:
    columns = "target,C,weights,U and V,Gamma,budget,before,peak,GFLOP/token,TFLOP,TB,GPUs,each,days"
    row = "{:>6} {:>9} {:>7} {:>7} {:>8} {:>6} {:>6} {:>6} {:>11} {:>7} {:>6} {:>5} {:>6} {:>6}".format
    print(row(*columns.split(",")))
    for name in config.targets.split(","):
        for budget in (1.0, 0.0):
            gpt, c = TARGETS[name], replace(settings(TARGETS[name]), memory_budget=budget)
            whole, sizes = counted(c, gpt, 1)
            steps = {1: whole}

            def each(n: int) -> float:
                if n not in steps:
                    steps[n], _ = counted(c, gpt, n)
                return steps[n].held + steps[n].peak - 16 * sizes["Gamma"] * (n - 1) / n

            n = 1 if each(1) <= config.gpu_memory else c.B  # a row each: the most GPUs that there can be
            if n > 1 and each(n) <= config.gpu_memory:
                n = next(2**i for i in range(1, 7) if each(2**i) <= config.gpu_memory)
            days = c.steps * max(steps[n].flops / config.gpu_flops, steps[n].moved / config.gpu_bytes) / 86_400
            weights = [f"{sizes[part] / 1e9:.2f}B" for part in ("target", "U, V", "Gamma")]
            memory = [f"{size / 1e9:,.0f}" for size in (whole.held, whole.held + whole.peak)]
            work = [whole.flops / c.B / c.T / 1e9, whole.flops / 1e12, whole.moved / 1e12]
            gpus = [f"{n}" if each(n) <= config.gpu_memory else f">{n}", f"{each(n) / 1e9:,.0f}", f"{days:,.1f}"]
            print(
                row(name, f"{sizes['C']:,}", *weights, budget, *memory, *(f"{x:,.1f}" for x in work), *gpus), flush=True
            )
    print(
        f"\nparameters; GB before a step and at its peak; FLOPs and bytes moved of a step of {c.B} x {c.T} tokens\n"
        f"GPUs: the fewest of {config.gpu_memory / 1e9:g} GB, a power of two, at most one a row; each: GB on each\n"
        f"days: {c.steps:,} eager steps on them, at {config.gpu_flops / 1e12:g} TFLOP/s in bf16 and "
        f"{config.gpu_bytes / 1e12:g} TB/s each, as we assume"
    )


if __name__ == "__main__":
    run.run_script(main, Config, __doc__)
