"""What runs cost by count: memory, computation, bytes, and the least time that these take on a GPU.

    python -m bench.plan                  # 67M, 1B and 8B targets; five minutes on a CPU core, the first half a minute
    python -m bench.plan --targets=67M    # 100 GB with memory_budget=1, on 2 GPUs; 74 GB with 0, on one; 3 and 7 days
    python -m bench.plan --step=paper4    # the parts of one step: FLOPs, bytes, and the floor on an H100 and an H200
    python -m bench.plan --scales=hour,gpu,published    # the hours of each scale, its target's too, on one GPU

67M is the published run. 1B and 8B take its settings and batch, with C, Gamma's width and its depth in the published
proportion to those of the target. Everything is counted on fake tensors (cost.py), of eager steps in bf16. On n
GPUs each takes 1/n of the rows; of Gamma's 16 bytes a parameter (itself, its gradient, two moments) all but 1/n are
subtracted, as --shard=True divides them. The target, U and V are whole on each: it is they that keep 8B from fitting.

Left out: the unit of Gamma that runs, which is whole for that time (in 1B at most 2.6B parameters); messages; what
torch.compile saves; the evaluation at the end of a run.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

import cost
import decompose
import flags
import run
import train_target
from bench import step as bench
from flags import UserError
from model import GPT, GPTConfig

TARGETS = {
    "67M": GPTConfig(50_257, 512, n_layer=4, n_head=6, d_model=768, d_mlp=3072),
    "1B": GPTConfig(50_257, 512, n_layer=18, n_head=16, d_model=2048, d_mlp=8192),
    "8B": GPTConfig(50_257, 512, n_layer=32, n_head=32, d_model=4096, d_mlp=22_528),
}
# What the data sheets say (SXM): dense bf16 FLOP/s and bytes/s. Nothing runs faster than this.
SHEETS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
VOCABULARY = 50_257  # GPT-2's, in which sets of the hub are tokenised


@dataclass(frozen=True)
class Config:
    targets: str = ",".join(TARGETS)
    step: Literal["", *bench.SIZES] = ""  # count the parts of a step of this size of bench.step instead
    scales: str = ""  # or what these scales cost, as in hour,gpu,published
    gpu_memory: float = 80e9  # bytes
    gpu_flops: float = cost.GPU_FLOPS  # that a GPU reaches a second, in bf16
    gpu_bytes: float = cost.GPU_BYTES  # that it reads and writes a second

    def __post_init__(self) -> None:
        flags.require(self, "above 0", "gpu_memory", "gpu_flops", "gpu_bytes")
        if not set(self.targets.split(",")) <= set(TARGETS):
            raise UserError(f"targets={self.targets!r}: must be some of {','.join(TARGETS)}")
        if self.scales and not set(self.scales.split(",")) <= set(decompose.SCALES):
            raise UserError(f"scales={self.scales!r}: must be some of {','.join(decompose.SCALES)}")


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


# ---------------------------------------------------------------------------------------------------------------------
# A step


@dataclass(frozen=True)
class Part:
    """A part of a step by itself. `state`: the bytes of [B, T, C], of sources and of weights that it cannot avoid."""

    cost: cost.Cost
    state: int

    def floor(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Seconds, were all that is between two matrix products one kernel, and every tensor read and written once."""
        return self.cost.seconds(flops_per_s, bytes_per_s, products=True) + self.state / bytes_per_s


def passes(vpd: decompose.VPD) -> dict[str, int]:
    """The least bytes of each part of a step on top of its matrix products, in the order of bench.step.parts.

    A pass reads or writes a tensor once. [B, T, C] is in fp32 but for z, of which half a pass is written and read.
    """
    ascended = (
        4 * vpd.adversary.r.numel() if vpd.adversary else 0
    )  # bytes of r, of each of its moments, of its gradient
    B = vpd.adversary.r.shape[1] if vpd.adversary else 0
    of_g = ascended // max(1, B) * vpd.config.B
    of_stochastic = of_g // (1 + vpd.halves)
    ascent = 1 + 2 * 3  # its gradient, and r and two moments, each read and written
    weights = 4 * sum(weight.numel() for weight in vpd.learning)
    return {
        "target and Gamma": round(5.5 * of_g),  # z read, g and g_upper written; both gradients and z read, z's written
        "inner ascents": (vpd.config.n_adv - 1) * (2 + 2 + 1 + ascent) * ascended,  # g and r twice; the gradient of r
        "two reconstructions": (2 + 2 + 2) * ascended + (1 + 2 + 2 + 2) * of_stochastic,  # r drawn; g's gradient added
        "penalties": 3 * of_g,  # g_upper read twice, its gradient written
        "updates": ascent * (ascended + weights),  # AdamW has as much to read and write as the ascent
    }


def counted_step(settings: decompose.Config, gpt: GPTConfig) -> tuple[cost.Cost, dict[str, Part]]:
    """A step in bf16, and its parts: what is counted, and the least that they take."""
    least = {}

    def make() -> Iterator[Callable[[], object]]:
        vpd, _ = decompose.build(settings, {"gpt": asdict(gpt), "model": GPT(gpt).state_dict()}, torch.device("cpu"))
        x = torch.zeros((settings.B, settings.T), dtype=torch.long)
        yield lambda: vpd.train_step(x)
        parts = bench.parts(vpd, x)  # only now, as the parts hold tensors that a step has not
        least.update(zip(parts, passes(vpd).values(), strict=True))
        yield from parts.values()

    whole, *parts = cost.counted(make, bf16=True)
    return whole, {name: Part(part, least[name]) for name, part in zip(least, parts)}


def step_table(size: str, settings: decompose.Config, gpt: GPTConfig, flops: int, whole: cost.Cost, parts: dict) -> str:
    """Markdown. flops: those that the method needs, without recomputation."""
    lines = ["| part | TFLOP | GB, eager | GB, at least | ms on H100: eager, floor | ms on H200: eager, floor |"]
    lines.append("|---" * 6 + "|")
    total, rows = dict.fromkeys(SHEETS, (0.0, 0.0)), []
    for name, part in parts.items():
        ms = {gpu: (1e3 * part.cost.seconds(*sheet), 1e3 * part.floor(*sheet)) for gpu, sheet in SHEETS.items()}
        total = {gpu: tuple(map(sum, zip(total[gpu], ms[gpu]))) for gpu in SHEETS}
        least = part.state + sum(moved for flops, moved in part.cost.calls if flops)
        rows.append((name, part.cost.flops, part.cost.moved, least, ms))
    rows.append(("together", *(sum(row[i] for row in rows) for i in (1, 2, 3)), total))
    short = lambda number: f"{number:,.0f}" if number >= 9.95 else f"{number:.2g}"
    for name, *counts, ms in rows:
        numbers = [short(count / unit) for count, unit in zip(counts, (1e12, 1e9, 1e9))]
        lines.append("| " + " | ".join([name, *numbers, *(", ".join(map(short, ms[gpu])) for gpu in SHEETS)]) + " |")
    best = {gpu: flops / (total[gpu][1] / 1e3) / sheet[0] for gpu, sheet in SHEETS.items()}
    about = f"{size}: {settings.B} x {settings.T} tokens, memory_budget={settings.memory_budget:g}, "
    about += f"{whole.held / 1e9:.1f} GB before a step and {(whole.held + whole.peak) / 1e9:.1f} at its peak, eager; "
    about += f"{flops / 1e12:,.1f} TFLOP that the method needs; at the floor "
    return "\n".join([*lines, "", about + ", ".join(f"{share:.0%} of the {gpu}'s peak" for gpu, share in best.items())])


def needed_flops(settings: decompose.Config, gpt: GPTConfig) -> int:
    """FLOPs of a step without recomputation: what an MFU is of."""
    plain = replace(settings, memory_budget=1.0)
    return cost.counted(lambda: decompose.trial(plain, gpt, torch.device("cpu"))[:1], bf16=True)[0].flops


# ---------------------------------------------------------------------------------------------------------------------
# A scale


def counted_target(c: train_target.Config, gpt: GPTConfig) -> cost.Cost:
    """A step of train_target.py, in bf16."""

    def make() -> list:
        target, tokens = GPT(gpt), torch.zeros((c.B, c.T + 1), dtype=torch.long)
        optimizer = torch.optim.Adam(target.parameters(), lr=c.lr, fused=True)
        return [lambda: train_target.train_step(target, optimizer, tokens, c.clip)]

    return cost.counted(make, bf16=True)[0]


def scale_row(scale: str, config: Config) -> dict[str, float]:
    """Hours of the target's training and of the decomposition on one GPU, eager, and GB that the latter takes."""
    c, t = decompose.Config(**decompose.SCALES[scale]), train_target.Config(**train_target.SCALES[scale])
    gpt = GPTConfig(VOCABULARY, t.T, t.n_layer, t.n_head, t.d_model, t.d_mlp)
    target, (whole, parts) = counted_target(t, gpt), counted_step(c, gpt)
    hours = {"target": t.steps * target.seconds(config.gpu_flops, config.gpu_bytes) / 3600}
    hours["eager"] = c.steps * whole.seconds(config.gpu_flops, config.gpu_bytes) / 3600
    hours["floor"] = c.steps * sum(part.floor(config.gpu_flops, config.gpu_bytes) for part in parts.values()) / 3600
    return hours | {"GB": (whole.held + whole.peak) / 1e9, "target_GB": (target.held + target.peak) / 1e9}


def main(config: Config) -> None:
    if config.step:
        settings, gpt = bench.sizes(bench.Config(config.step))
        print(step_table(config.step, settings, gpt, needed_flops(settings, gpt), *counted_step(settings, gpt)))
    elif config.scales:
        print("| scale | target: hours, GB | decomposition: hours eager, at the floor, GB |\n|---|---|---|")
        for scale in config.scales.split(","):
            m = scale_row(scale, config)
            decomposition = f"{m['eager']:,.2f}, {m['floor']:,.2f}, {m['GB']:,.0f}"
            print(f"| `{scale}` | {m['target']:,.2f}, {m['target_GB']:,.0f} | {decomposition} |", flush=True)
        print(f"\nat {config.gpu_flops / 1e12:g} TFLOP/s in bf16 and {config.gpu_bytes / 1e12:g} TB/s, as we assume")
    else:
        plan(config)


# ---------------------------------------------------------------------------------------------------------------------
# Larger targets


def plan(config: Config) -> None:
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
