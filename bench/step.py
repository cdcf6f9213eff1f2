"""How long a training step of decompose.py takes, what it needs, and how near that is to what the device can do.

    python -m bench.step                                # the default run's size; two minutes, mostly compiling
    python -m bench.step --B=16 --memory_budget=0       # 16 sequences a step, activations computed again
    python -m bench.step --size=paper4                  # published, for a GPU; a laptop: --scale=0.06 --B=2 --T=64
    python -m bench.step --sweep=assets/scaling.png     # step and memory against C, T and B

Our step, its parts, the naive step (bench/naive.py) and a matrix product are timed in turn, round by round, so that a
busy machine slows all alike. MFU, the model FLOP utilisation: the FLOPs that the method needs (cost.py, without
recomputation) over the time and the rate of the matrix product, bf16 on a GPU and fp32 on a CPU. Memory: the most that
a step holds on top of parameters, moments and sources. Target and tokens are random: time does not depend on them.
"""

import contextlib
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import cost
import decompose
import eval as evaluation
import flags
import losses
import run
import train_target
from bench.naive import NaiveVPD
from model import GPT, GPTConfig

SIZES = {"default": "laptop", "pile2": "gpu", "paper4": "published"}  # and the scale that each is of


@dataclass(frozen=True)
class Config:
    size: Literal["default", "pile2", "paper4"] = "default"  # that of the default run, of scale gpu, of scale published
    steps: int = 20  # timed rounds, after 3 to warm up
    compile: bool | Literal["auto"] = "auto"  # auto: where a compiler works
    memory_budget: float | Literal["auto"] = "auto"  # as in decompose.py; auto: that of the size
    graph: bool | Literal["auto"] = "auto"  # replay a step as a CUDA graph; auto: as decompose.py does it
    naive: bool = True  # time and measure the naive step as well
    shares: bool = True  # time the parts of a step as well; they need more memory than the step
    B: int = 0  # sequences a step; 0: that of the size
    T: int = 0  # tokens a sequence; 0: that of the size
    scale: float = 1.0  # factor on widths, C and the vocabulary, at most 4
    sweep: str = ""  # write this figure instead: step and memory at once, twice and four times the size in C, T and B
    json: bool = False  # print one line of JSON and nothing else
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        flags.require(self, "above 0", "steps", "scale")
        flags.require(self, "0 or above", "B", "T")
        if self.memory_budget != "auto":
            flags.require(self, "between 0 and 1", "memory_budget")
        if self.scale > 4:
            raise flags.UserError(f"scale={self.scale}: must be at most 4")


def sizes(config: Config, C_factor: float = 1.0) -> tuple[decompose.Config, GPTConfig]:
    """The settings of the run and the shape of its target, `scale` times as wide; C_factor is one more on C alone."""
    name = SIZES[config.size]
    settings, target = decompose.Config(**decompose.SCALES[name]), train_target.Config(**train_target.SCALES[name])

    def wide(n: int, multiple_of: int = 1, factor: float = config.scale) -> int:
        return max(1, round(n * factor / multiple_of)) * multiple_of

    settings = replace(
        settings, B=config.B or settings.B, T=config.T or settings.T,
        memory_budget=settings.memory_budget if config.memory_budget == "auto" else config.memory_budget,
        C=re.sub(r"(?<==)\d+", lambda C: str(wide(int(C[0]), factor=config.scale * C_factor)), settings.C),
        d_ci=wide(settings.d_ci, 2 * settings.n_head_ci), d_mlp_ci=wide(settings.d_mlp_ci),
    )  # fmt: skip
    vocab, d_model = wide(1024 if config.size == "default" else 50_277), wide(target.d_model, 2 * target.n_head)
    return settings, GPTConfig(vocab, settings.T, target.n_layer, target.n_head, d_model, wide(target.d_mlp))


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
    events = profile.profiler.kineto_results.events()
    return max(itertools.accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0))


def matmul(device: torch.device) -> tuple[Callable[[], object], float]:
    """A matrix product that runs at the device's rate, and its FLOPs."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return lambda: a @ b, 2 * n**3


def parts(vpd: decompose.VPD, x: Tensor) -> dict[str, Callable[[], object]]:
    """The parts of a step by themselves, in its order, each with its backward pass; together about a step."""
    c, f, adversary, (p, adv_lr) = vpd.config, vpd.decomposition, vpd.adversary, vpd.schedule()
    target_output, g, g_upper = (t.detach() for t in vpd.importances(x))
    leaf, g_upper = g.clone().requires_grad_(), g_upper.requires_grad_()
    first = second = [x, target_output, leaf]
    if vpd.halves:
        first, second = ([part[i::2] for part in first] for i in (0, 1))
    routing, fixed = losses.sample_routing((c.S, *second[0].shape), f.L, vpd.generator), [a.detach() for a in first]
    r_stoch, grad_r = torch.rand_like(adversary.r), torch.rand_like(adversary.r)

    def target_and_gamma() -> None:
        for optimizer in vpd.rates:
            optimizer.zero_grad()
        torch.autograd.backward(vpd.importances(x)[1:], [torch.ones_like(g)] * 2)

    def inner() -> None:
        of_r = lambda r: vpd.reconstruction(*fixed, r, None, frozen=True)
        for _ in range(c.n_adv - 1):
            adversary.ascend(adversary.gradient(of_r), adv_lr)

    def reconstructions() -> None:
        vpd.reconstruction(*first, adversary.r.detach().requires_grad_(), None).backward()
        vpd.reconstruction(*second, r_stoch, routing).backward()

    def updates() -> None:
        adversary.ascend(grad_r, adv_lr)
        nn.utils.clip_grad_norm_(f.subcomponents(), c.clip)
        for optimizer in vpd.rates:
            optimizer.step()

    return {
        "target and Gamma": target_and_gamma,
        f"{c.n_adv - 1} inner ascents": inner,
        "two reconstructions": reconstructions,
        "penalties": lambda: sum(vpd.penalties(g_upper, p)).backward(),
        "updates": updates,
    }


def as_run(config: Config, settings: decompose.Config, gpt: GPTConfig, device: torch.device) -> tuple[bool, bool]:
    """Whether to compile and to replay a step: what is asked, or what decompose.py would do."""
    step_bytes = 0
    if run.can_graph(config.graph, device, 1) and config.graph == "auto":
        (step,) = cost.counted(lambda: decompose.trial(settings, gpt, torch.device("cpu"))[:1], run.bf16(device))
        step_bytes = step.held + step.peak
    graphed = run.wants_graph(config.graph, device, 1, step_bytes)
    return run.wants_compile(config.compile, device, run.COMPILING_PAYS, 0.0, graphed), graphed


def measure(
    config: Config, settings: decompose.Config, gpt: GPTConfig, compiled: bool, device: torch.device, graphed=False
) -> dict:
    """What --json prints: seconds (medians over the rounds; spread_s: least and most), bytes, FLOPs.

    The peak of a replayed step is that of its second call, which is launched.
    """
    B, T, plain = settings.B, settings.T, replace(settings, memory_budget=1.0)
    both = [plain] if settings == plain else [plain, settings]
    checkpoint = {"gpt": asdict(gpt), "model": GPT(gpt).state_dict()}
    x = torch.randint(0, gpt.vocab_size, (B, T), device=device)
    steps = {"step": decompose.build(settings, checkpoint, device, compiled, graphed)[0]}
    if config.naive:
        other, _ = decompose.build(plain, checkpoint, device)
        steps["naive"] = NaiveVPD(other.decomposition, other.ci_fn, plain, (B, T), device)

    calls = {name: lambda one=one: one.train_step(x) for name, one in steps.items()}
    first, peak = {name: seconds(call, device) for name, call in calls.items()}, {}
    for name, one in steps.items():  # in their second calls, as a graph is recorded in the third
        one.optimizer.zero_grad()  # the gradients that a step makes are counted with it
        peak[name] = peak_bytes(calls[name], device)
    calls["matmul"], product_flops = matmul(device)
    calls |= (of_a_step := parts(steps["step"], x) if config.shares and not graphed else {})  # whose gradients stay
    for one in calls.values():  # warm up
        for _ in range(3):
            seconds(one, device)
    rounds = [{name: seconds(one, device) for name, one in calls.items()} for _ in range(config.steps)]
    median = {name: statistics.median(row[name] for row in rounds) for name in calls}

    one = [cost.counted(lambda: decompose.trial(c, gpt, torch.device("cpu"))[:1], run.bf16(device))[0] for c in both]
    flops, counted = one[0].flops, one[-1]
    rate, step_s, times = product_flops / median["matmul"], median["step"], [row["step"] for row in rounds]
    m = {"size": config.size, "B": B, "T": T, "C": sum(steps["step"].decomposition.C.values()), "scale": config.scale}
    m |= {"held_bytes": counted.held, "counted_peak_bytes": counted.peak, "graph": graphed}
    m |= {"memory_budget": settings.memory_budget, "device": str(device), "compile": compiled, "first_s": first["step"]}
    m |= {"step_s": step_s, "spread_s": [min(times), max(times)], "tokens_per_s": B * T / step_s}
    m |= {"peak_bytes": peak["step"], "flops": flops, "matmul_flops_per_s": rate, "mfu": flops / step_s / rate}
    m["parts"] = {name: median[name] for name in of_a_step}
    if config.naive:
        m |= {"naive_step_s": median["naive"], "naive_peak_bytes": peak["naive"]}
        m["naive_mfu"] = flops / median["naive"] / rate
        m["times_as_fast"] = statistics.median(row["naive"] / row["step"] for row in rounds)
    return m


def text(m: dict) -> str:
    def line(name: str, seconds: float, mfu: float, peak: int, more: str) -> str:
        tokens_s = m["B"] * m["T"] / seconds
        return f"{name:24s} {1e3 * seconds:8.1f} {tokens_s:10,.0f} {mfu:7.1%} {peak / 1e6:9.1f}   ({more})"

    ours = "{:.1f} to {:.1f} ms".format(*(1e3 * s for s in m["spread_s"])) + f"; the first {m['first_s']:.1f} s"
    how = f"step, {'compiled' if m['compile'] else 'eager'}" + ", replayed" * m["graph"]
    lines = [
        f"{m['size']}: {m['B']} x {m['T']} tokens a step, {m['flops'] / 1e9:.4g} GFLOP; {m['device']}, "
        f"{torch.get_num_threads()} threads, a matrix product reaches {m['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s",
        f"{'':24s} {'ms':>8s} {'tokens/s':>10s} {'MFU':>7s} {'peak MB':>9s}",
        line(how, m["step_s"], m["mfu"], m["peak_bytes"], ours),
    ]
    if "naive_step_s" in m:
        less = f"{m['times_as_fast']:.2f} times as fast, in {m['peak_bytes'] / m['naive_peak_bytes']:.0%} of the memory"
        naive = (m[f"naive_{name}"] for name in ("step_s", "mfu", "peak_bytes"))
        lines.append(line("naive step, eager", *naive, "ours: " + less))
    parts = [f"  {name:22s} {1e3 * t:8.1f} {t / m['step_s']:27.0%} of a step" for name, t in m["parts"].items()]
    counted = f"peak by count, of an eager step: {m['counted_peak_bytes'] / 1e6:.1f} MB, on top of "
    counted += f"{m['held_bytes'] / 1e6:.1f} MB of weights, moments and sources"
    return "\n".join([*lines, counted, *(["parts, each by itself:"] if parts else []), *parts])


def sweep(config: Config, compiled: bool, device: torch.device) -> None:
    """The figure of --sweep: a step at once, twice and four times the size in C, T and B, the others as they are."""
    settings, _ = sizes(config)
    figure, axes = evaluation.subplots(1, 2, (9, 4))
    for name, colour in (("C", "#d55e00"), ("T", "#0072b2"), ("B", "#009e73")):
        rows = []
        for n in (1, 2, 4):
            bigger = config if name == "C" else replace(config, **{name: n * getattr(settings, name)})
            m = measure(replace(config, naive=False), *sizes(bigger, n if name == "C" else 1), compiled, device)
            took = f"{1e3 * m['step_s']:.1f} ms, {m['peak_bytes'] / 1e6:.1f} MB"
            print(f"C = {m['C']:,}, T = {m['T']}, B = {m['B']}: {took}", flush=True)
            rows.append((m["step_s"] * m["matmul_flops_per_s"], m["peak_bytes"], m[name]))  # a busy machine cancels out
        for i, ax in enumerate(axes):
            label = f"{name} = {rows[0][2]:,} × factor"
            ax.plot((1, 2, 4), [row[i] / rows[0][i] for row in rows], "o-", color=colour, label=label)
    ticks = dict(xticks=(1, 2, 4), xticklabels="124", yticks=(1, 2, 4), yticklabels="124")
    for ax, title in zip(axes, ("time of a step, in matrix products", "peak memory of a step")):
        ax.plot((1, 2, 4), (1, 2, 4), "--", color="#7f7f7f", label="linear")
        ax.set(xscale="log", yscale="log", **ticks, xlabel="factor", ylabel="relative to factor 1", title=title)
        ax.minorticks_off()
        ax.legend(fontsize=8)
    evaluation.save_figure(figure, Path(config.sweep))
    print(f"written: {config.sweep}")


def main(config: Config) -> None:
    device, (settings, gpt) = run.pick_device(config.device), sizes(config)
    wanted = config.compile is True if config.sweep else config.compile  # nine sizes would be compiled nine times
    with contextlib.redirect_stdout(sys.stderr):
        compiled, graphed = as_run(replace(config, compile=wanted), settings, gpt, device)
    if config.sweep:
        return sweep(config, compiled, device)
    print((json.dumps if config.json else text)(measure(config, settings, gpt, compiled, device, graphed)))


if __name__ == "__main__":
    run.run_script(main, Config, __doc__)
