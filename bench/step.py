"""How long a training step of decompose.py takes, what it needs, and how near that is to what the device can do.

    python -m bench.step                                        # the default run's size; two minutes on 2 CPU cores, mostly compiling
    python -m bench.step --B=16                                 # the same with 16 sequences a step
    python -m bench.step --B=16 --memory_budget=0.5             # in two thirds of the memory
    python -m bench.step --size=paper4                          # the published size, for a GPU
    python -m bench.step --size=paper4 --scale=0.06 --B=2 --T=64    # the same shapes, small enough for a laptop
    python -m bench.step --sweep=assets/scaling.png             # step and memory against C, T and B

Our step, the naive one (tests/naive.py) and a matrix product are timed in turn, round by round, so that a busy machine slows
all of them alike. MFU, the model FLOP utilisation, is the FLOPs that the method needs (estimate.step_flops, whatever our step
really does) over time and the rate of the matrix product, bf16 on a GPU and fp32 on a CPU. Memory is the peak of what a step
allocates on top of parameters, optimiser and sources. Target and tokens are random: the time does not depend on them.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import decompose
import eval as evaluation
import train_target
from bench import estimate
from model import GPT, GPTConfig
from run import autocast, pick_device, run_script


@dataclass(frozen=True)
class Config:
    size: Literal["default", "pile2", "paper4"] = "default"  # that of the default run, of scale gpu, of scale published
    steps: int = 20  # timed rounds, after 3 to warm up
    compile: bool | Literal["auto"] = "auto"  # auto: where a compiler works
    memory_budget: float = 1.0  # as in decompose.py
    naive: bool = True  # time and measure the naive step as well
    B: int = 0  # sequences a step; 0: that of the size
    T: int = 0  # tokens a sequence; 0: that of the size
    scale: float = 1.0  # factor on widths, C and the vocabulary
    sweep: str = ""  # write this figure instead: step and memory at once, twice and four times the size in C, T and B
    json: bool = False  # print one line of JSON and nothing else
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        decompose.require(self, "above 0", "steps", "scale")
        decompose.require(self, "0 or above", "B", "T")


def sizes(config: Config, C_factor: float = 1.0) -> tuple[decompose.Config, GPTConfig]:
    """The settings of the decomposition and the shape of its target, `scale` times as wide; C_factor is one more on C alone."""
    name = {"default": "laptop", "pile2": "gpu", "paper4": "published"}[config.size]
    run = replace(decompose.Config(), **decompose.SCALES[name])
    target = replace(train_target.Config(), **train_target.SCALES[name])

    def wide(n: int, multiple_of: int = 1) -> int:
        return max(1, round(n * config.scale / multiple_of)) * multiple_of

    run = replace(
        run, B=config.B or run.B, T=config.T or run.T, compile=False, device=config.device, memory_budget=config.memory_budget,
        C=",".join(f"{pattern}={max(1, round(wide(C) * C_factor))}" for pattern, C in decompose.parse_C(run.C).items()),
        d_ci=wide(run.d_ci, 2 * run.n_head_ci), d_mlp_ci=wide(run.d_mlp_ci),
    )  # fmt: skip
    vocab = 1024 if config.size == "default" else 50_277
    return run, GPTConfig(
        wide(vocab), run.T, target.n_layer, target.n_head, wide(target.d_model, 2 * target.n_head), wide(target.d_mlp)
    )


def build(run: decompose.Config, gpt: GPTConfig, device: torch.device) -> decompose.VPD:
    return decompose.build(run, {"gpt": asdict(gpt), "model": GPT(gpt).state_dict()}, device)[0]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that `call` holds at a time of what it allocates."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def matmul(device: torch.device) -> tuple[Callable[[], object], float]:
    """A matrix product that runs at the device's rate, and its FLOPs."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return lambda: a @ b, 2 * n**3


def parts(vpd: decompose.VPD, x: Tensor) -> dict[str, Callable[[], object]]:
    """The parts of a step by themselves, each with its backward pass; together about a step."""
    c, f = vpd.config, vpd.decomposition
    with autocast(vpd.device):
        target_output, g, g_upper = (t.detach() for t in vpd.importances(x))
    g.requires_grad_(), g_upper.requires_grad_()
    p, adv_lr = vpd.schedule()
    routing = torch.ones((c.S, *g.shape[:-1], f.L), dtype=torch.bool, device=vpd.device)
    r_stoch, r_grad = torch.rand_like(vpd.adversary.r), torch.rand_like(vpd.adversary.r)

    def gamma() -> None:
        with autocast(vpd.device):
            _, *gs = vpd.importances(x)
        torch.autograd.backward(gs, [g.detach(), g_upper.detach()])

    def inner() -> None:
        def adversarial(r: Tensor) -> Tensor:
            return vpd.reconstruction(f, x, target_output, g.detach(), r, routing, vpd.divergence, True)

        with autocast(vpd.device):
            for _ in range(c.n_adv - 1):
                vpd.adversary.ascend(vpd.adversary.gradient(adversarial), adv_lr, vpd.adam_ascent)

    def reconstructions() -> None:
        for r in (vpd.adversary.r.detach().requires_grad_(), r_stoch):
            with autocast(vpd.device):
                loss = vpd.reconstruction(f, x, target_output, g, r, routing, vpd.divergence, False)
            loss.backward()

    def updates() -> None:
        vpd.adversary.ascend(r_grad, adv_lr, vpd.adam_ascent)
        nn.utils.clip_grad_norm_(f.subcomponents(), c.clip)
        vpd.optimizer.step()
        vpd.optimizer.zero_grad()

    return {
        "target pass and Gamma": gamma,
        f"{c.n_adv - 1} inner ascents": inner,
        "two reconstructions": reconstructions,
        "two minimalities": lambda: sum(vpd.minimality(g_upper, p, None, 1)).backward(),
        "faithfulness": lambda: vpd.faithfulness(f).backward(),
        "updates": updates,
    }


def measure(config: Config, run: decompose.Config, gpt: GPTConfig, device: torch.device) -> dict:
    """What --json prints: seconds (medians over the rounds; spread_s: least and most), bytes, FLOPs."""
    from tests.naive import NaiveVPD

    x = torch.randint(0, gpt.vocab_size, (run.B, run.T), device=device)
    vpd = build(run, gpt, device)
    product, product_flops = matmul(device)
    calls = {"step": lambda: vpd.train_step(x), "matmul": product}
    if config.naive:
        other = build(replace(run, compile=False), gpt, device)
        naive = NaiveVPD(other.decomposition, other.ci_fn, run, (run.B, run.T), device)
        calls["naive"] = lambda: naive.train_step(x)
    first = sum(seconds(calls["step"], device) for _ in range(3))
    peak = {name: peak_bytes(calls[name], device) for name in calls}
    calls |= (of_a_step := parts(vpd, x))
    for call in calls.values():  # warm up
        for _ in range(3):
            seconds(call, device)
    rounds = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(config.steps)]
    times = {name: [row[name] for row in rounds] for name in calls}
    median = {name: statistics.median(t) for name, t in times.items()}

    flops, rate, step_s = estimate.cost(run, gpt).flops, product_flops / median["matmul"], median["step"]
    m = {
        "size": config.size,
        "B": run.B,
        "T": run.T,
        "scale": config.scale,
        "device": str(device),
        "compile": run.compile,
        "first_three_s": first,
    }
    m |= {
        "step_s": step_s,
        "spread_s": [min(times["step"]), max(times["step"])],
        "tokens_per_s": run.B * run.T / step_s,
        "peak_bytes": peak["step"],
    }
    m |= {
        "flops": flops,
        "matmul_flops_per_s": rate,
        "mfu": flops / step_s / rate,
        "parts": {name: median[name] for name in of_a_step},
    }
    if config.naive:
        m |= {
            "naive_step_s": median["naive"],
            "naive_peak_bytes": peak["naive"],
            "naive_mfu": flops / median["naive"] / rate,
        }
        m |= {"times_as_fast": statistics.median(row["naive"] / row["step"] for row in rounds)}
    return m


def text(m: dict) -> str:
    ms, mega = 1e3, 1e-6
    lines = [
        f"{m['size']}: {m['B']} x {m['T']} tokens a step, {m['flops'] / 1e9:.4g} GFLOP; {m['device']}, {torch.get_num_threads()} threads, a matrix product reaches {m['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s",
        f"{'':24s} {'ms':>8s} {'tokens/s':>10s} {'MFU':>7s} {'peak MB':>9s}",
        f"{'step, compiled' if m['compile'] else 'step, eager':24s} {m['step_s'] * ms:8.1f} {m['tokens_per_s']:10,.0f} {m['mfu']:7.1%} {m['peak_bytes'] * mega:9.1f}   ({m['spread_s'][0] * ms:.1f} to {m['spread_s'][1] * ms:.1f} ms; the first three {m['first_three_s']:.1f} s)",
    ]
    if "naive_step_s" in m:
        tokens = m["B"] * m["T"] / m["naive_step_s"]
        lines += [
            f"{'naive step, eager':24s} {m['naive_step_s'] * ms:8.1f} {tokens:10,.0f} {m['naive_mfu']:7.1%} {m['naive_peak_bytes'] * mega:9.1f}   (ours is {m['times_as_fast']:.2f} times as fast, with {m['peak_bytes'] / m['naive_peak_bytes']:.0%} of its memory)"
        ]
    lines += [
        "parts, each by itself:",
        *(f"  {name:22s} {t * ms:8.1f} {t / m['step_s']:27.0%} of a step" for name, t in m["parts"].items()),
    ]
    return "\n".join(lines)


def sweep(config: Config, device: torch.device) -> None:
    """The figure of --sweep: a step at once, twice and four times the size in C, T and B, the others as they are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    run, gpt = sizes(config)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for name, colour in (("C", "#d55e00"), ("T", "#0072b2"), ("B", "#009e73")):
        factors, rows = (1, 2, 4), []
        for factor in factors:
            ways = {
                "C": lambda: sizes(config, factor)[0],
                "T": lambda: replace(run, T=factor * run.T),
                "B": lambda: replace(run, B=factor * run.B),
            }
            bigger = replace(ways[name](), compile=config.compile is True)
            m = measure(replace(config, naive=False), bigger, replace(gpt, context=bigger.T), device)
            C = estimate.cost(bigger, gpt).subcomponents
            print(
                f"C = {C:,}, T = {bigger.T}, B = {bigger.B}: {m['step_s'] * 1e3:.1f} ms, {m['peak_bytes'] / 1e6:.1f} MB",
                flush=True,
            )
            rows.append((m["step_s"] * m["matmul_flops_per_s"], m["peak_bytes"]))  # a busy machine cancels out
        for ax, values in zip(axes, zip(*rows)):
            ax.plot(
                factors,
                [value / values[0] for value in values],
                "o-",
                color=colour,
                label=f"{name} = {getattr(run, name, 0) if name != 'C' else estimate.cost(run, gpt).subcomponents:,} × factor",
            )
    for ax, title in zip(axes, ("time of a step, in matrix products", "peak memory of a step")):
        ax.plot(factors, factors, "--", color="#7f7f7f", label="linear")
        ax.set(xscale="log", yscale="log", xlabel="factor", ylabel="relative to factor 1", title=title)
        ax.set_xticks(factors, map(str, factors))
        ax.set_yticks(factors, map(str, factors))
        ax.minorticks_off()
        ax.legend(fontsize=8)
    evaluation.save_figure(figure, Path(config.sweep))
    print(f"written: {config.sweep}")


def main(config: Config) -> None:
    device = pick_device(config.device)
    if config.sweep:
        return sweep(config, device)
    run, gpt = sizes(config)
    works, why_not = decompose.compiler_works(device) if config.compile else (False, "")
    if config.compile is True and not works:
        raise ValueError(f"compile=True: no working compiler here ({why_not})")
    m = measure(config, replace(run, compile=works), gpt, device)
    print(json.dumps(m) if config.json else text(m))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
