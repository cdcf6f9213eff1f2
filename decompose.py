"""VPD: decompose a trained language model into rank-one subcomponents (paper, "Method").

    python decompose.py                            # the standard library's source text, under 10 minutes on 2 CPU cores
    python decompose.py --beta_adv=0               # without the adversary: the paper's central claim, in one command
    python decompose.py --resume=out/vpd-stdlib    # go on after Ctrl-C, a crash or a power cut
    torchrun --standalone --nproc_per_node=2 decompose.py    # two processes, the losses of one; --shard=True divides Gamma

Trains the target first if there is none. Writes a run folder with config.json, metrics.jsonl (a line a logged step),
checkpoint.pt, through eval.py metrics.json, figures/ and generations.txt, and through studies/report.py report.html.

  A. Settings
  B. VPD         one step of the method: everything else in this file is set-up, logging and saving
  C. The run

Left out: mixed datasets, early stopping.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import data
import distributed
import eval as evaluation
import losses
import train_target
from ci_fn import CITransformer, lower_leaky, upper_leaky
from model import Decomposition, GPTConfig
from run import (
    autocast,
    check_unchanged,
    cut_log,
    interruptible,
    load_checkpoint,
    log_line,
    pick_device,
    progress_bar,
    resumed_settings,
    run_script,
    save,
    write_config,
)  # fmt: skip
from train_target import build_target, check_resumable, check_vocabulary, cosine

# ---------------------------------------------------------------------------------------------------------------------
# A. Settings


TIMED = 10  # steps that are timed, after as many untimed ones, to say how long the run will take
CPU_COMPILE_PAYS = 5_500  # steps from which torch.compile, under two minutes at the default size, is earned back (python -m bench.step)


@dataclass(frozen=True)
class Method:
    """What the method itself has to be told, whatever it decomposes: decompose.py and toy.py share it."""

    # Coefficients of the five losses, in the order of the paper's sum
    beta_adv: float = 0.5  # adversarial reconstruction
    beta_stoch: float = 1.0  # stochastic reconstruction
    beta_imp: float = 3.3e-3  # importance minimality
    beta_freq: float = (
        3.3e-4  # frequency minimality; its logarithm sums over the batch, so it weighs more in a larger one
    )
    beta_delta: float = 1e5  # faithfulness
    p_start: float = 2.0  # the power p of both minimality terms falls linearly over the run
    p_end: float = 0.4
    S: int = 1  # samples of r in each reconstruction loss
    leak: float = 0.01  # slope of the lower sigmoid's gradient below 0 and of the upper sigmoid above 1
    # The adversary
    n_adv: int = 3  # Adam updates of r a step: n_adv - 1 before the losses, the last from their backward pass
    adv_lr: float = 0.02  # constant after its warm-up
    adv_warmup: float = 0.025  # share of the steps
    adv_scope: Literal["position", "batch"] = "position"  # a source per position, or one that the batch shares
    adv_routing: Literal["all", "subset"] = "all"  # matrices that the adversary masks at a position
    # Training
    steps: int = 8000  # of the main loop
    B: int = 2  # sequences a step, of all processes together
    accumulate: int = (
        1  # parts that a process takes its sequences in, one after the other, when memory is short: the same losses
    )
    lr: float = 3e-3  # of U, V and Gamma
    lr_warmup: float = 0.03  # share of the steps
    lr_end: float = 0.01  # share of lr that its cosine ends at
    clip: float = 0.01  # largest norm of the gradient of U and V
    faith_steps: int = 400  # warm-up on faithfulness alone
    faith_lr: float = 1e-2
    seed: int = 0  # of initialisation, batches, masks and sources
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        require(self, "above 0", "S", "n_adv", "B", "accumulate", "steps", "lr", "adv_lr", "clip", "p_start", "p_end")
        require(
            self,
            "0 or above",
            "seed",
            "beta_adv",
            "beta_stoch",
            "beta_imp",
            "beta_freq",
            "beta_delta",
            "faith_steps",
            "leak",
            "adv_warmup",
            "lr_warmup",
            "lr_end",
        )
        if self.accumulate > 1 and self.adv_scope == "batch":
            raise ValueError(
                f"accumulate={self.accumulate}: sources that the batch shares (adv_scope=batch) ascend on all of it at once; use adv_scope=position"
            )
        if self.B % self.accumulate:
            raise ValueError(f"B={self.B}: must be a multiple of accumulate={self.accumulate}")


def require(config: object, what: Literal["above 0", "0 or above"], *names: str) -> None:
    """ValueError, with the name and the value, unless each of these numbers is what it must be."""
    for name in names:
        value = getattr(config, name)
        if not (value > 0 if what == "above 0" else value >= 0):
            raise ValueError(f"{name}={value}: must be {what}")


@dataclass(frozen=True)
class Config(Method):
    scale: train_target.Scale = ""  # settings to start from: tiny, laptop, gpu, published; default that of the dataset
    dataset: str = "stdlib"  # 'stdlib', 'pile', 'simplestories', 'tinystories', 'hf:<id>[:column]', or the path of a file or folder of text
    max_tokens: int = 0  # of the dataset, from its beginning; 0: all of it
    data_dir: str = "data"  # where token files are kept
    target: str = ""  # run folder of train_target.py; default out/target-<dataset>, trained first if it is not there
    out: str = ""  # run folder; default out/vpd-<dataset>, with a number behind it if that is taken
    resume: str = ""  # run folder of an unfinished run to go on with; settings not given are read from it
    compile: bool | Literal["auto"] = (
        "auto"  # torch.compile; auto: on a GPU, or for a long run on a CPU, where a compiler works
    )
    memory_budget: float = (
        1.0  # share of the activations that a compiled step keeps for its backward pass; the rest is computed again
    )
    T: int = 64  # tokens a sequence
    # Subcomponents of each matrix: glob pattern over the names of the nn.Linear layers = count; the first match counts
    C: str = "*.q=42,*.k=42,*.v=85,*.o=85,*.up=256,*.down=298"
    # Gamma
    d_ci: int = 128  # width of its residual stream
    n_layer_ci: int = 2  # blocks
    n_head_ci: int = 4
    d_mlp_ci: int = 512
    shard: bool = False  # divide Gamma, its gradient and its moments over the processes of torchrun; the target, U and V stay whole
    # Logging and evaluation
    log_every: int = 20  # steps
    save_every: int = 1000  # steps
    eval_windows: int = 64  # validation sequences of T tokens
    report_tokens: int = 131_072  # of validation text, that report.html is made of at the end; 0: no report
    wandb: str = ""  # project of Weights & Biases to mirror metrics.jsonl in; WANDB_MODE=offline is honoured

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "above 0", "d_ci", "n_head_ci", "d_mlp_ci", "T", "log_every", "save_every", "eval_windows")
        require(self, "0 or above", "n_layer_ci", "max_tokens", "report_tokens")
        if not 0 <= self.memory_budget <= 1:
            raise ValueError(f"memory_budget={self.memory_budget}: must lie between 0 and 1")
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"wandb={self.wandb}: wandb is not installed; pip install wandb, or leave the flag out: metrics.jsonl has the same numbers"
            )
        parse_C(self.C)

    def defaults(self) -> "Config":
        """What flags are put on top of: the settings of the run to resume, or those of the scale."""
        if self.resume:
            return resumed_settings(Path(self.resume), "checkpoint.pt", "decomposition", Config)
        return Config(**train_target.settings_of(SCALES, self.dataset, self.scale))


# What differs from the settings above. `published` is the paper's 4-layer run, `gpu` the authors' 2-layer configuration, with
# the published value where that is silent; the blocks, heads and MLP of its Gamma are ours, in the published proportions.
PUBLISHED = dict(
    beta_adv=0.5, beta_stoch=0.5, beta_imp=2e-4, beta_freq=1e-4, beta_delta=1e7, n_adv=3, adv_lr=0.01,
    steps=400_000, B=64, T=512, lr=5e-5, lr_warmup=0.0, lr_end=0.1, clip=0.01, faith_steps=400, faith_lr=1e-3,
    C="*.q=512,*.k=512,*.v=1024,*.o=1024,*.up=3072,*.down=3584", d_ci=2048, n_layer_ci=8, n_head_ci=16, d_mlp_ci=8192,
    log_every=100, save_every=2000, max_tokens=15 * 10**8,
)  # fmt: skip
SCALES = {
    "tiny": dict(steps=40, T=16, C="*=6", d_ci=16, n_head_ci=2, d_mlp_ci=16, faith_steps=20, log_every=5, save_every=10, eval_windows=2, report_tokens=512, compile=False),
    "laptop": {},
    "gpu": PUBLISHED | dict(
        beta_imp=5e-4, beta_freq=5e-5, beta_delta=1e6, lr=1e-4, C="*.q=512,*.k=256,*.v=1024,*.o=1024,*.up=4096,*.down=3072",
        d_ci=1024, n_layer_ci=4, d_mlp_ci=4096, max_tokens=10**9,
    ),
    "published": PUBLISHED,
}  # fmt: skip


# Settings that may change when a run is resumed. `steps` is one of them, but not without effect: p and the learning rates are
# from then on those of a run of the new length. The device is checked apart.
MAY_CHANGE = (
    "steps",
    "log_every",
    "save_every",
    "eval_windows",
    "report_tokens",
    "wandb",
    "data_dir",
    "device",
    "resume",
)


def parse_C(text: str) -> dict[str, int]:
    """'*.q=42,*.k=42' to {pattern: count}. ValueError for anything else."""
    counts = {}
    for pair in text.split(","):
        pattern, equals, count = pair.partition("=")
        if not equals or not count.strip().lstrip("-").isdigit():
            raise ValueError(f"C={text!r}: {pair!r} is not PATTERN=COUNT, as in '*.q=42,*.up=256'")
        if counts.setdefault(pattern.strip(), int(count)) != int(count):
            raise ValueError(f"C={text!r} gives {pattern!r} two counts")
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# B. The method


class VPD:
    """The state of a decomposition in training, and one step of it.

    decomposition, ci_fn (Gamma): the two things that learn. positions: the shape [B, T] of the positions of this process's
    batch, for the adversary's sources. divergence: D of the reconstruction losses. compiled: torch.compile the heavy functions.
    """

    def __init__(
        self,
        decomposition: Decomposition,
        ci_fn: nn.Module,
        config: Method,
        positions: tuple[int, ...],
        device: torch.device,
        divergence: Callable[[Tensor, Tensor], Tensor] = losses.kl_divergence,
        compiled: bool = False,
    ) -> None:
        self.decomposition, self.ci_fn, self.config, self.device, self.divergence = (
            decomposition,
            ci_fn,
            config,
            device,
            divergence,
        )
        # Each process draws from a stream of its own.
        seed = (
            config.seed
            if distributed.rank() == 0
            else int(np.random.SeedSequence([config.seed, distributed.rank()]).generate_state(1)[0])
        )
        self.generator = torch.Generator(device).manual_seed(seed)
        n_sources = sum(decomposition.C.values()) + decomposition.L
        self.adversary = losses.Adversary(positions, n_sources, self.generator, config.S, config.adv_scope)
        self.learning = [*decomposition.subcomponents(), *ci_fn.parameters()]
        self.replicated = [p for p in self.learning if not isinstance(p, DTensor)]
        sharded = [
            p for p in self.learning if isinstance(p, DTensor)
        ]  # Gamma's, or none; a fused update takes one kind at a time
        groups = [{"params": group} for group in (self.replicated, sharded) if group]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0, fused=True)
        self.step = 0

        options = None
        if device.type == "cpu":
            keep_freed_memory()
            options = {
                "cpp_wrapper": True
            }  # a small step is a thousand calls of microseconds: C++ makes them, not Python
        maybe_compile = (lambda f: torch.compile(f, dynamic=False, options=options)) if compiled else (lambda f: f)
        self.importances = maybe_compile(self.importances)
        self.reconstruction = maybe_compile(losses.reconstruction)
        self.minimality = maybe_compile(losses.minimality)
        self.faithfulness = maybe_compile(losses.faithfulness)
        self.adam_ascent = maybe_compile(losses.adam_ascent)

    def warm_up(self) -> float:
        """U and V alone descend the faithfulness loss; returns its last value."""
        optimizer = torch.optim.AdamW(
            self.decomposition.subcomponents(), lr=self.config.faith_lr, weight_decay=0.0, fused=True
        )
        loss = losses.faithfulness(self.decomposition)
        for _ in range(self.config.faith_steps):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss = losses.faithfulness(self.decomposition)
        distributed.broadcast_([p.data for p in self.decomposition.subcomponents()])
        return loss.item()

    def schedule(self) -> tuple[Tensor, float]:
        """The power p and the adversary's learning rate of this step; the optimiser's is set."""
        c = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * cosine(self.step, c.steps, c.lr_warmup, c.lr_end)
        p = c.p_start + (c.p_end - c.p_start) * self.step / max(1, c.steps - 1)
        return torch.full((), p, device=self.device), c.adv_lr * min(
            1.0, (self.step + 1) / (c.adv_warmup * c.steps + 1)
        )

    def importances(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f(x | W), without a gradient, and the causal importances g_lower and g_upper [B, T, C] in fp32."""
        target_output, inputs = self.decomposition.target_pass(x)
        z = self.ci_fn(inputs).float()
        return target_output, lower_leaky(z, self.config.leak), upper_leaky(z, self.config.leak)

    def train_step(self, x: Tensor) -> dict[str, Tensor]:
        """One step on this process's part x [B, T, ...] of a batch: the losses of the whole batch before their coefficients, as tensors, and L_VPD as `total`."""
        c = self.config
        p, adv_lr = self.schedule()

        # The batch comes in one part, unless several processes share it or memory is short (`accumulate`).
        n_parts, rows, whole = c.accumulate * distributed.world(), [], None
        if n_parts > 1:
            s = self.batch_power_sums(x, p) if c.accumulate > 1 else None
            whole = distributed.summed if s is None else lambda s_of_part: s

        # -------------------------------------------------------------------------------------------------------------
        self.optimizer.zero_grad()
        for x, adversary in zip(x.chunk(c.accumulate), self.adversary.parts(c.accumulate)):
            with autocast(self.device):
                target_output, g, g_upper = self.importances(x)
            leaf = (
                g.detach().requires_grad_()
            )  # gathers dL/dg of the reconstructions, so that Gamma has one backward pass
            terms = {}

            # The adversary ascends n_adv - 1 times on this batch: gradients for r alone. Then its loss descends, and the same
            # backward pass has r's gradient for the last ascent. Each loss goes backward as soon as it is there: that frees
            # its activations for the next.
            if c.beta_adv > 0:
                # A tensor for `all` too: one shape of call, one graph to compile.
                routing = torch.ones((c.S, *g.shape[:-1], self.decomposition.L), dtype=torch.bool, device=self.device)
                if c.adv_routing == "subset":
                    routing = losses.sample_routing((c.S, *g.shape[:-1]), self.decomposition.L, self.generator)

                def adversarial(r: Tensor, g: Tensor, frozen: bool) -> Tensor:
                    with autocast(self.device):
                        return losses.adversarial_reconstruction(
                            self.decomposition,
                            x,
                            target_output,
                            g,
                            r,
                            routing,
                            self.divergence,
                            frozen,
                            self.reconstruction,
                        )

                for _ in range(c.n_adv - 1):
                    grad_r = adversary.gradient(lambda r: adversarial(r, g.detach(), frozen=True) / n_parts)
                    adversary.ascend(grad_r, adv_lr, self.adam_ascent)
                r = adversary.r.detach().requires_grad_()
                loss = adversarial(r, leaf, frozen=False)
                (c.beta_adv * loss / n_parts).backward()
                adversary.ascend(r.grad / c.beta_adv, adv_lr, self.adam_ascent)
                terms["adversarial"] = c.beta_adv, loss.detach()
                del loss, r

            if c.beta_stoch > 0:
                with autocast(self.device):
                    loss = losses.stochastic_reconstruction(
                        self.decomposition,
                        x,
                        target_output,
                        leaf,
                        self.generator,
                        c.S,
                        self.divergence,
                        self.reconstruction,
                    )
                (c.beta_stoch * loss / n_parts).backward()
                terms["stochastic"] = c.beta_stoch, loss.detach()

            # The penalties, and with them all that Gamma learns from.
            importance, frequency = self.minimality(g_upper, p, whole, n_parts)
            penalties = {"importance": (c.beta_imp, importance), "frequency": (c.beta_freq, frequency)}
            penalties["faithfulness"] = (
                c.beta_delta,
                self.faithfulness(self.decomposition),
            )  # in fp32: Delta^2 is far below bf16's steps
            grad_g = torch.zeros_like(g) if leaf.grad is None else leaf.grad
            torch.autograd.backward(
                [sum(beta * loss for beta, loss in penalties.values()) / n_parts, g], [None, grad_g]
            )
            terms |= penalties

            total = sum(beta * loss.detach() for beta, loss in terms.values())
            rows.append(
                {name: loss.detach() for name, (_, loss) in terms.items()}
                | {"total": total, "l0": (leaf.detach() > 0).sum(-1).float().mean()}
            )

        self.adversary.count.copy_(adversary.count)  # each part ascended as often
        distributed.sum_([parameter.grad for parameter in self.replicated])  # a sharded one's is summed already
        nn.utils.clip_grad_norm_(self.decomposition.subcomponents(), c.clip)
        self.optimizer.step()
        # -------------------------------------------------------------------------------------------------------------

        self.step += 1
        values = torch.stack([torch.stack(list(row.values())) for row in rows]).sum(0) / n_parts
        return dict(zip(rows[0], distributed.summed(values))) | {"p": p}

    @torch.no_grad()
    def batch_power_sums(self, x: Tensor, p: Tensor) -> Tensor:
        """s_c of the whole batch, [C], in a pass of its own: the frequency term of one part has to know the others' sums."""
        s = torch.zeros(sum(self.decomposition.C.values()), device=self.device)
        for part in x.chunk(self.config.accumulate):
            with autocast(self.device):
                s += losses.power_sums(self.importances(part)[2], p)
        return distributed.summed(s)

    def state_dict(self) -> dict:
        """What a run goes on from, in the first process that of all of them: to be called by all."""
        adversary = self.adversary.state_dict()
        if not self.adversary.shared:
            adversary |= {name: torch.cat(distributed.gathered(adversary[name]), 1) for name in ("r", "mom1", "mom2")}
        optimizer = distributed.whole(self.optimizer.state_dict())
        optimizer["param_groups"] = [
            optimizer["param_groups"][0] | {"params": list(range(len(self.learning)))}
        ]  # one, sharded or not
        return {
            "step": self.step,
            "decomposition": self.decomposition.subcomponents_state(),
            "ci_fn": distributed.whole(self.ci_fn.state_dict()),
            "optimizer": optimizer,
            "adversary": adversary,
            "generators": distributed.gathered(self.generator.get_state()),
        }

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.decomposition.load_subcomponents(state["decomposition"])
        self.ci_fn.load_state_dict(
            {name: distributed.part_of(state["ci_fn"][name], p) for name, p in self.ci_fn.state_dict().items()}
        )
        moments = {
            i: {name: distributed.part_of(value, self.learning[i]) for name, value in of_parameter.items()}
            for i, of_parameter in state["optimizer"]["state"].items()
        }
        (group,) = state["optimizer"]["param_groups"]
        groups = [group | {"params": own["params"]} for own in self.optimizer.state_dict()["param_groups"]]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        adversary = dict(state["adversary"])
        if not self.adversary.shared:
            adversary |= {
                name: adversary[name].chunk(distributed.world(), 1)[distributed.rank()]
                for name in ("r", "mom1", "mom2")
            }
        self.adversary.load_state_dict(adversary)
        self.generator.set_state(state["generators"][distributed.rank()])


# ---------------------------------------------------------------------------------------------------------------------
# C. The run


def keep_freed_memory() -> None:
    """Ask glibc, where that is the C library, to keep what a step frees for the next one: handing it back and getting it anew
    costs 5 to 10 % of a step on a CPU in page faults."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most it takes


def wants_compile(config: Config, device: torch.device) -> bool:
    """--compile resolved: `auto` compiles where that pays and a compiler works, and says so in a line where it does not."""
    if config.compile is False:
        return False
    if config.compile is True:
        works, why_not = compiler_works(device)
        if not works:
            raise ValueError(f"compile=True: no working compiler here ({why_not})")
        return True
    if device.type == "cpu" and config.steps < CPU_COMPILE_PAYS:
        print(
            f"compile: off, as compiling for a CPU takes longer than it saves in under {CPU_COMPILE_PAYS:,} steps; --compile=True forces it"
        )
        return False
    works, why_not = compiler_works(device)
    print(
        "compile: on, the first step takes a minute or two"
        if works
        else f"compile: no working compiler ({why_not}): running eagerly, slower but the same"
    )
    return works


def compiler_works(device: torch.device) -> tuple[bool, str]:
    """Whether torch.compile works here, and why not."""
    try:
        torch.compile(lambda x: x.sin() + x)(torch.ones(8, device=device))
        return True, ""
    except Exception as error:  # a missing compiler surfaces as one of many types
        return False, (str(error).splitlines() or [type(error).__name__])[0]


def free_folder(wanted: Path) -> Path:
    """`wanted`, or where it is taken wanted-2, wanted-3, …: an earlier run is never written over."""
    folder, n = wanted, 1
    while folder.exists():
        n += 1
        folder = wanted.with_name(f"{wanted.name}-{n}")
    return folder


def target_of(config: Config, corpus: data.Corpus) -> dict:
    """The checkpoint of the target to decompose, which is trained first if there is none. ValueError if it does not fit."""
    folder = Path(config.target or train_target.default_folder(config.dataset, config.scale, corpus))
    if not config.target and not (folder / "checkpoint.pt").exists():
        same = {name: getattr(config, name) for name in ("dataset", "max_tokens", "data_dir", "device", "T")}
        usual = train_target.Config(scale=config.scale, dataset=config.dataset).defaults()
        train_target.main(
            dataclasses.replace(usual, **same, resume=str(folder) if (folder / "state.pt").exists() else "")
        )
    checkpoint = load_checkpoint(folder / "checkpoint.pt", "target")
    context = checkpoint["gpt"]["context"]
    if config.T > context:
        raise ValueError(
            f"T={config.T}: the context of the target in {folder} is {context} tokens; train another with train_target.py --T={config.T} --out=..."
        )
    check_vocabulary(folder, checkpoint, corpus)
    return checkpoint


def build(config: Config, target_checkpoint: dict, device: torch.device) -> tuple[VPD, dict]:
    """A VPD at its initialisation, a function of config.seed, and the arguments that its Gamma was made with."""
    torch.manual_seed(config.seed)
    target = build_target(target_checkpoint)
    decomposition = Decomposition(target, parse_C(config.C), hidden=True).to(device)
    gamma = {"d_ins": [V.shape[0] for V in decomposition.V.values()], "C": sum(decomposition.C.values())}
    gamma |= {"d_ci": config.d_ci, "n_layer": config.n_layer_ci, "n_head": config.n_head_ci, "d_mlp": config.d_mlp_ci}
    ci_fn = CITransformer(**gamma)
    half = not isinstance(autocast(device), contextlib.nullcontext)
    ci_fn = distributed.shard(ci_fn, ci_fn.units(), device, half) if config.shard else ci_fn.to(device)
    torch._functorch.config.activation_memory_budget = config.memory_budget  # for all that is compiled from here on
    return VPD(
        decomposition,
        ci_fn,
        config,
        (config.B // distributed.world(), config.T),
        device,
        losses.HiddenKL(target.unembedding),
        wants_compile(config, device),
    ), gamma


def main(config: Config) -> None:
    resumed = None
    if config.resume:
        folder = Path(config.resume)
        check_unchanged(config, config.defaults(), MAY_CHANGE)
        if (folder / "checkpoint.pt").exists():  # otherwise it ended before its first save, and begins anew
            resumed = load_checkpoint(folder / "checkpoint.pt", "decomposition")
    elif config.out and (Path(config.out) / "checkpoint.pt").exists():
        raise ValueError(
            f"out={config.out} already holds a checkpoint: give another folder, or go on with --resume={config.out}"
        )
    device = pick_device(distributed.start(config.device))
    if config.B % (config.accumulate * distributed.world()):
        raise ValueError(
            f"B={config.B}: must be a multiple of accumulate={config.accumulate} times {distributed.world()} processes"
        )
    if resumed and resumed["processes"] != distributed.world():
        raise ValueError(
            f"resume={folder}: that run had {resumed['processes']} processes, and its random numbers cannot go on in {distributed.world()}"
        )
    if config.shard and distributed.world() == 1:
        raise ValueError(
            "shard=True: one process has nothing to divide Gamma over; start several with torchrun --nproc_per_node=N, or leave shard out"
        )
    with distributed.first_process_first():  # it tokenises the text and trains the target, if they are not there
        corpus = data.load(config.dataset, config.data_dir, config.max_tokens)
        if resumed:
            check_vocabulary(folder, resumed["target"], corpus)
            check_resumable(config, resumed | {"step": resumed["vpd"]["step"]}, corpus, device)
        for split in ("train", "val"):
            corpus.batch(split, 0, 1, config.T)  # too short a text ends here
        target_checkpoint = resumed["target"] if resumed else target_of(config, corpus)
    began = time.time() - (resumed["seconds"] if resumed else 0)
    from bench import estimate  # here, as it reads this file's settings

    estimate.report(
        config,
        GPTConfig(**target_checkpoint["gpt"]),
        device,
        distributed.world(),
        half=not isinstance(autocast(device), contextlib.nullcontext),
    )
    vpd, gamma = build(config, target_checkpoint, device)
    print(f"decompose: {vpd.decomposition.L} matrices into {gamma['C']:,} subcomponents, on {device}")

    if not config.resume:
        folder = Path(config.out) if config.out else free_folder(Path(f"out/vpd-{corpus.name}"))
    first = distributed.rank() == 0  # the process that writes
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, config, device)
    if resumed:
        vpd.load_state_dict(resumed["vpd"])
    else:
        print(
            f"decompose: faithfulness {vpd.warm_up():.2e} after a warm-up of {config.faith_steps} steps; run folder {folder}"
        )
    mirror = None
    if first:
        cut_log(folder, vpd.step)
        if config.wandb:
            import wandb

            mirror = wandb.init(project=config.wandb, name=folder.name, dir=folder, config=asdict(config))

    def save_run() -> None:
        if distributed.any_of(not all(distributed.local(p).isfinite().all() for p in vpd.learning)):
            raise ValueError(
                f"U, V or Gamma is not finite after step {vpd.step - 1}: try a smaller lr than {config.lr}; {folder} keeps what was saved before"
            )
        run = {"kind": "decomposition", "config": asdict(config), "C": vpd.decomposition.C, "ci_fn": gamma}
        run |= {
            "target": target_checkpoint,
            "device": device.type,
            "processes": distributed.world(),
            "corpus": corpus.digest(),
        }
        run |= {"vpd": vpd.state_dict(), "seconds": time.time() - began}
        if first:
            save(folder / "checkpoint.pt", run)

    with interruptible() as interrupted:
        bar, begun = progress_bar(vpd.step, config.steps, "decompose"), vpd.step
        began_timing = 0.0
        for step in bar:
            x = corpus.batch("train", step, config.B, config.T, config.seed)[:, :-1]
            losses_of_step = vpd.train_step(distributed.rows(x).to(device))

            if step - begun in (TIMED, 2 * TIMED):
                losses_of_step["total"].item()  # waits for the device
                began_timing, before = time.perf_counter(), began_timing
                if step - begun == 2 * TIMED:
                    seconds = (began_timing - before) / TIMED
                    bar.write(
                        f"estimate: {seconds:.3g} s a step on this device, {seconds * (config.steps - step) / 3600:.2g} hours for the {config.steps - step:,} steps left"
                    )

            last, stop = step == config.steps - 1, distributed.any_of(interrupted())
            saving = last or stop or (step + 1) % config.save_every == 0
            if saving or step % config.log_every == 0:
                row = {"step": step} | {name: value.item() for name, value in losses_of_step.items()}
                bad = [name for name, value in row.items() if not math.isfinite(value)]
                if bad:
                    raise ValueError(
                        f"the {bad[0]} loss is {row[bad[0]]} at step {step}: try a smaller lr than {config.lr}; {folder} keeps what was saved before"
                    )
                if first and (last or step % config.log_every == 0):
                    log_line(folder, row)
                    if mirror:
                        mirror.log(row, step=step)
                bar.set_postfix(
                    {name: f"{row[name]:.3g}" for name in ("adversarial", "stochastic", "l0") if name in row},
                    refresh=False,
                )
            if saving:
                save_run()
            if stop and not last:
                bar.close()
                print(f"interrupted after step {step}, saved: go on with\n    python decompose.py --resume={folder}")
                sys.exit(130)

    distributed.stop()
    if mirror:
        mirror.finish()
    if first:
        run = evaluation.load_run(folder, device)
        metrics = evaluation.report(run, evaluation.Config(str(folder), windows=config.eval_windows))
        if config.report_tokens and metrics["live"]["total"]:
            from studies import report  # here, as everything before works without it

            report.report(run, corpus, report.Config(str(folder), tokens=config.report_tokens))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
