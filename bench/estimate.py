"""What a decomposition costs, before it is begun: parameters, memory by part, floating-point operations.

    python -m bench.estimate                 # the published scale, and targets of 1B and 8B parameters: memory, GPUs, days
    python -m bench.estimate --gpu_memory=141e9 --gpu_flops=400e12

decompose.py prints the estimate of its own run and refuses one that cannot fit, naming the flags that would make it fit.
Models are built without memory (torch's meta device), so parameters are counted and not computed. Activations are a count of
the tensors that the step keeps, for eager mode; a compiled step keeps fewer. Left out: the evaluation, the target's training.
"""

import os
from dataclasses import dataclass, replace

import torch

import decompose
from ci_fn import CITransformer
from losses import HiddenKL
from model import GPT, GPTConfig, match_linears
from run import run_script

GB = 1e9


@dataclass(frozen=True)
class Cost:
    """Of a run: `parameters` by part; `memory` in bytes by part, of one process at its peak; `flops` of a step of the whole
    batch."""

    subcomponents: int
    parameters: dict[str, int]
    memory: dict[str, float]
    flops: float

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())


def cost(
    config: "decompose.Config", gpt: GPTConfig, processes: int = 1, half: bool = False, sharded: bool = False
) -> Cost:
    """half: bf16 autocast, as on a GPU. sharded: the target, U, V, Gamma and their optimiser divided over the processes, as the
    plan below supposes; decompose.py divides Gamma and its optimiser alone, where config.shard says so."""
    with torch.device("meta"):
        target = GPT(gpt)
        C = match_linears(target, decompose.parse_C(config.C))
        shapes = [(*target.get_submodule(name).weight.shape, C_l) for name, C_l in C.items()]  # (d_out, d_in, C_l)
        total_C, D = sum(C.values()), sum(d_in for _, d_in, _ in shapes)
        ci_fn = CITransformer(
            [d_in for _, d_in, _ in shapes], total_C, config.d_ci, config.n_layer_ci, config.n_head_ci, config.d_mlp_ci
        )
    sizes = {
        "target": sum(p.numel() for p in target.parameters()),
        "U, V": sum((d_out + d_in) * C_l for d_out, d_in, C_l in shapes),
        "Gamma": sum(p.numel() for p in ci_fn.parameters()),
    }

    # Memory, bytes. Parameters are fp32; those that learn have a gradient and two moments of the same size.
    a = 2 if half else 4  # of an activation
    mine = config.B // processes * config.T * config.S  # positions of this process
    at_once = mine / config.accumulate  # of them in one part
    n_sources = total_C + len(shapes)
    d_outs, vocab = sum(d_out for d_out, _, _ in shapes), gpt.vocab_size
    n_recon = (config.beta_adv > 0) + (config.beta_stoch > 0)
    gamma_activations = 2 * D + config.n_layer_ci * (14 * config.d_ci + 3 * config.d_mlp_ci)
    shards = processes if sharded else 1
    gamma_shards = processes if sharded or config.shard else 1
    sources = 0 if config.beta_adv == 0 else 3 * 4 * n_sources * (mine if config.adv_scope == "position" else 1)
    memory = {
        "target": 4 * sizes["target"] / shards,
        "U, V": 16 * sizes["U, V"] / shards,
        "Gamma": 16 * sizes["Gamma"] / gamma_shards,
        "sources": sources,
        # r's gradient, and the temporaries of its Adam
        "sources' update": 4 * 4 * n_sources * at_once if sources else 0,
        # z, g, g_upper and its powers, twice over (forward and backward); the blocks
        "Gamma's activations": at_once / config.S * (8 * 4 * total_C + a * gamma_activations),
        # a reconstruction keeps m, m - m_Delta, x V and their product; W x, y and the inputs of every matrix; one at a time
        "masked passes": at_once * (n_recon > 0) * ((3 * 4 + 2 * a) * total_C + a * (4 * d_outs + 2 * D)),
        # of one chunk of positions: logits of target and masked model, their log-softmax and what is made of it in fp32
        "logits": min(at_once, HiddenKL.CHUNK) * vocab * (2 * a + 5 * 4),
    }
    if gamma_shards > 1:
        # A unit that runs is whole: parameters, gradients, and these in fp32 to be summed. The masked passes' tensors are gone by then.
        unit = max(sum(p.numel() for p in unit.parameters()) for unit in ci_fn.units())
        memory["Gamma"] += max(0, (2 * a + 4) * unit - memory["masked passes"] - memory["logits"])
    return Cost(total_C, sizes, memory, step_flops(config, gpt, sizes, shapes))


def step_flops(
    config: "decompose.Config", gpt: GPTConfig, sizes: dict[str, int], shapes: list[tuple[int, int, int]]
) -> float:
    """Multiplications and additions in the matrix products of a step, all processes together."""
    T, positions = config.T, config.B * config.T
    attention = 4 * T * gpt.d_model * gpt.n_layer  # q k^T and its product with v, of one position
    target = 2 * sizes["target"] + attention  # the tied embedding counts once, as the unembedding
    masked = target + 2 * sizes["U, V"]  # x W^T, and U ((m - m_Delta) * V^T x)
    backward = masked + attention  # of the activations; twice the products of attention
    inner = (config.n_adv - 1) * (masked + backward) if config.beta_adv > 0 else 0
    n_recon = (config.beta_adv > 0) + (config.beta_stoch > 0)
    recon = n_recon * (masked + backward + 2 * sizes["U, V"])  # and the gradients of U and V
    gamma = 3 * (2 * sizes["Gamma"] + 4 * T * config.d_ci * config.n_layer_ci)
    first_pass = target + gamma / 3 if config.accumulate > 1 else 0
    faithfulness = (
        3 * 2 * sum(d_out * d_in * C_l for d_out, d_in, C_l in shapes)
    )  # U V^T and its two gradients, once a step
    return positions * (target + config.S * (inner + recon) + gamma + first_pass) + faithfulness


def available_memory(device: torch.device) -> float:
    """Bytes that a process can have: free on the GPU; on a CPU what Linux says is available, elsewhere all there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def remedies(config: "decompose.Config", gpt: GPTConfig, room: float, processes: int, half: bool) -> list[str]:
    """Flags each of which, alone, makes the run fit into `room` bytes a process."""
    divisors = [n for n in range(2, config.B // processes + 1) if config.B % (n * processes) == 0]
    tries = [("accumulate", n) for n in divisors if config.adv_scope == "position"]
    tries += [("B", config.B // n) for n in divisors]
    tries += [("adv_scope", "batch")] if config.accumulate == 1 else []
    tries += [("shard", True)] if processes > 1 else []
    found = {}
    for name, value in tries:
        changed = replace(config, **{name: value} | ({"accumulate": 1} if name == "B" else {}))
        if name not in found and cost(changed, gpt, processes, half).total_memory <= room:
            found[name] = f"--{name}={value}"
    return list(found.values())


def report(config: "decompose.Config", gpt: GPTConfig, device: torch.device, processes: int, half: bool) -> None:
    """Print the estimate of a run. ValueError if it needs more memory than there is, with the flags that would help."""
    c = cost(config, gpt, processes, half)
    room = available_memory(device) / (processes if device.type == "cpu" else 1)
    print(
        f"estimate: {c.subcomponents:,} subcomponents; parameters: "
        + ", ".join(f"{name} {n / 1e6:,.1f}M" for name, n in c.parameters.items())
    )
    print(
        f"estimate: memory {c.total_memory / GB:.2f} of {room / GB:.1f} GB free: "
        + ", ".join(f"{name} {n / GB:.2f}" for name, n in c.memory.items())
    )
    tokens = config.B * config.T
    print(
        f"estimate: {c.flops / tokens / 1e9:.3g} GFLOP a token, {c.flops / 1e12:.3g} TFLOP a step, {c.flops * config.steps:.2g} FLOP in {config.steps:,} steps"
    )
    if c.total_memory > room:
        flags = remedies(config, gpt, room, processes, half)
        help = (
            f"it would fit with {' or '.join(flags)}"
            if flags
            else "no smaller batch would fit either: decompose fewer matrices (--C), a smaller Gamma (--d_ci), or use torchrun on more GPUs with --shard=True"
        )
        raise ValueError(
            f"the run needs about {c.total_memory / GB:.1f} GB and {room / GB:.1f} GB are free on {device}: {help}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The plan for larger targets


def plan(gpt: GPTConfig) -> "decompose.Config":
    """The published setting, with C, Gamma and its depth in the published proportion to the target's width and depth."""
    published = replace(decompose.Config(), **decompose.SCALES["published"])
    d = gpt.d_model / 768
    C = ",".join(
        f"{pattern}={round(C_l * d * (gpt.d_mlp / 4 / gpt.d_model if pattern in ('*.up', '*.down') else 1))}"
        for pattern, C_l in decompose.parse_C(published.C).items()
    )
    d_ci = 32 * round(2048 * d / 32)
    return replace(published, C=C, d_ci=d_ci, n_layer_ci=2 * gpt.n_layer, d_mlp_ci=4 * d_ci)


TARGETS = {
    "67M": GPTConfig(50_257, 512, n_layer=4, n_head=6, d_model=768, d_mlp=3072),
    "1B": GPTConfig(50_257, 512, n_layer=18, n_head=16, d_model=2048, d_mlp=8192),
    "8B": GPTConfig(50_257, 512, n_layer=32, n_head=32, d_model=4096, d_mlp=22_528),
}


@dataclass(frozen=True)
class Config:
    gpu_memory: float = 80e9  # bytes of one GPU
    gpu_flops: float = 400e12  # that it reaches, bf16: about 40 % of an H100's peak; an assumption, not a measurement
    steps: int = 400_000  # of 64 x 512 tokens

    def __post_init__(self) -> None:
        decompose.require(self, "above 0", "gpu_memory", "gpu_flops", "steps")


def main(config: Config) -> None:
    """A table: for each target the fewest GPUs (a power of two) that it would fit on with all parameters divided over them."""
    print(
        f"GPUs of {config.gpu_memory / GB:.0f} GB, {config.gpu_flops / 1e12:.0f} TFLOP/s each; {config.steps:,} steps of 64 x 512 tokens; memory in GB of one GPU"
    )
    print(
        f"{'target':>7s} {'C':>10s} {'U, V':>8s} {'Gamma':>8s} {'GPUs':>5s} {'parts':>5s} {'target':>7s} {'U, V':>7s} {'Gamma':>7s} {'sources':>8s} {'rest':>7s} {'total':>7s} {'GFLOP/token':>12s} {'GPU-days':>9s} {'days':>7s}"
    )
    for name, gpt in TARGETS.items():
        run = plan(gpt)
        fits = [
            (gpus, parts)
            for gpus in (1, 2, 4, 8, 16, 32, 64)
            for parts in (1, 2, 4, 8, 16, 32, 64)
            if 64 % (gpus * parts) == 0
            and cost(replace(run, accumulate=parts), gpt, gpus, half=True, sharded=True).total_memory
            <= config.gpu_memory
        ]
        gpus, parts = fits[0] if fits else (64, 1)
        c = cost(replace(run, accumulate=parts), gpt, gpus, half=True, sharded=True)
        m = c.memory
        rest = c.total_memory - sum(m[part] for part in ("target", "U, V", "Gamma", "sources"))
        days = c.flops * config.steps / config.gpu_flops / 86_400
        print(
            f"{name:>7s} {c.subcomponents:10,d} {c.parameters['U, V'] / 1e9:7.2f}B {c.parameters['Gamma'] / 1e9:7.2f}B {gpus if fits else 'no':>5} {parts:5d} {m['target'] / GB:7.1f} {m['U, V'] / GB:7.1f}"
            f" {m['Gamma'] / GB:7.1f} {m['sources'] / GB:8.1f} {rest / GB:7.1f} {c.total_memory / GB:7.1f} {c.flops / (run.B * run.T) / 1e9:12.1f} {days:9.1f} {days / gpus:7.1f}"
        )


if __name__ == "__main__":
    run_script(main, Config, __doc__)
