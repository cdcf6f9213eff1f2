"""VPD: decompose a trained language model into rank-one subcomponents (paper, "Method").

    python decompose.py                            # the standard library's source text, under 10 minutes on 2 CPU cores
    python decompose.py --beta_adv=0               # without the adversary: the paper's central claim, in one command
    python decompose.py --resume=out/vpd-stdlib    # go on after Ctrl-C, a crash or a power cut
    python decompose.py --prompts=mine.jsonl       # only what these prompts need (docs/targeted.md)
    torchrun --standalone --nproc_per_node=2 decompose.py    # two processes, the losses of one; --shard divides Gamma

Trains the target first if there is none. Writes a run folder with config.json, metrics.jsonl (a line a logged step),
checkpoint.pt (U, V, Gamma, target: what every reader opens) and state.pt (to go on from). Ends with eval.py's
metrics.json, figures/ and generations.txt, and with studies/report.py's report.html.

  A. Settings    the paper's table of hyperparameters
  B. VPD         one step of the method, between two rulers
  C. The run
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import canaries
import checkpoints
import cost
import data
import distributed
import eval as evaluation
import losses
import pretrained
import run
import train_target
from ci_fn import CITransformer, lower_leaky, upper_leaky
from flags import UserError, parse_counts, require
from linears import largest_sides
from model import GPT, Decomposition, GPTConfig, each
from muon import Muon
from train_target import Scale, cosine

# ---------------------------------------------------------------------------------------------------------------------
# A. Settings


@dataclass(frozen=True)
class Method:
    """What the method itself has to be told, whatever it decomposes: decompose.py and the toys share it."""

    beta_adv: float = 0.5  # adversarial reconstruction
    beta_stoch: float = 1.0  # stochastic reconstruction
    beta_imp: float = 3e-3  # importance minimality
    beta_freq: float = 3e-4  # frequency minimality; its logarithm sums over the batch: it weighs more in a larger one
    beta_delta: float = 1e5  # faithfulness
    p_start: float = 2.0  # the power p of both minimality terms goes linearly from here
    p_end: float = 0.4  # to here over the run
    S: int = 1  # samples of r in each reconstruction loss
    leak: float = 0.01  # slope of the lower sigmoid's gradient below 0 and of the upper sigmoid above 1
    # The adversary
    n_adv: int = 3  # Adam updates of r a step: n_adv - 1 before the losses, the last from their backward pass
    adv_lr: float = 0.02  # constant after its warm-up
    adv_warmup: float = 0.025  # share of the steps
    adv_scope: Literal["position", "sequence", "batch"] = "position"  # whose each source is
    adv_fresh: float = 0.0  # size of sign steps, n_adv - 1 of them, from sources drawn anew each step; 0: as above
    adv_routing: Literal["all", "subset"] = "all"  # matrices that the adversary masks at a position
    stoch_routing: Literal["subset", "layerwise"] = "subset"  # and the random masks; layerwise: SPD's, all or one alone
    halves: bool = True  # every other sequence is the adversary's, the rest random masks'; else all are of both
    # Training
    steps: int = 5800  # of the main loop
    B: int = 4  # sequences a step, of all processes together
    lr: float = 3e-3  # of U, V and Gamma
    muon: float = 4.0  # U and V learn with Muon, at this many times lr; 0: with AdamW, as Gamma does
    lr_warmup: float = 0.03  # share of the steps
    lr_end: float = 0.01  # share of lr that its cosine ends at
    clip: float = 0.01  # largest norm of the gradient of U and V
    clip_ci: float = 0.0  # largest norm of the gradient of Gamma, which is logged as grad_ci; 0: any
    faith_steps: int = 400  # warm-up on faithfulness alone
    faith_lr: float = 1e-2  # of that warm-up
    seed: int = 0  # of initialisation, batches, masks and sources
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        require(self, "above 0", "S", "n_adv", "B", "steps", "lr", "adv_lr", "clip", "p_start", "p_end", "faith_lr")
        require(self, "0 or above", "seed", "muon", "clip_ci", "adv_fresh", "faith_steps", *losses.BETAS.values())
        require(self, "between 0 and 1", "leak", "adv_warmup", "lr_warmup", "lr_end")
        if self.beta_adv == self.beta_stoch == 0:
            raise UserError("beta_adv=0 and beta_stoch=0: without a reconstruction loss nothing is ever important")


@dataclass(frozen=True)
class Config(Method):
    scale: Scale = ""  # settings to start from: tiny, laptop, hour, gpu, published; default that of the dataset
    recipe: Literal["", "paper"] = ""  # paper: both losses on every sequence, AdamW for U and V, and their settings
    dataset: str = "stdlib"  # or pile, simplestories, tinystories, hf:<id>[:column], or a file or folder of text
    max_tokens: int = 0  # of the dataset, from its beginning; 0: all of it
    prompts: str = ""  # a targeted run: file or folder of text that half of each batch is; only what it needs is found
    data_dir: str = "data"  # where token files are kept
    # Run folder of train_target.py; default out/target-<dataset>, trained first if it is not there. Or a model of
    # transformers: hf:<id>, or a folder with its config.json and safetensors
    target: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights of such a model; U, V and Gamma are in float32
    out: str = ""  # run folder; default out/vpd-<dataset>, with a number behind it if that is taken
    resume: str = ""  # run folder of an unfinished run to go on with; settings not given are read from it
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto: large steps on a GPU, long runs on a CPU
    minutes: float = 0.0  # the steps are those that end so long after the target is there; evaluation is not counted
    graph: bool | Literal["auto"] = "auto"  # replay a step as a CUDA graph; auto: small steps, on one GPU
    memory_budget: float = 1.0  # share of the matrices and of Gamma's blocks that keep activations; the rest recompute
    T: int = 64  # tokens a sequence
    canaries: bool = True  # of a target that was trained on canaries: plant them here too, at the same rate
    # Subcomponents of each matrix: glob pattern over the names of the nn.Linear layers = count; the first match counts.
    # auto: max(d_in, d_out) of every one, the default for another model
    C: str = "*.q=64,*.k=64,*.v=85,*.o=85,*.up=248,*.down=262"
    # Gamma
    d_ci: int = 128  # width of its residual stream
    n_layer_ci: int = 2  # blocks
    n_head_ci: int = 4  # attention heads
    d_mlp_ci: int = 512  # neurons of an MLP
    shard: bool = False  # divide Gamma, its gradient and its moments over the processes; the target, U and V stay whole
    # Logging and evaluation
    log_every: int = 20  # steps
    save_every: int = 1000  # steps
    eval_every: int = 0  # steps between short evaluations, whose numbers go into metrics.jsonl; 0: none
    eval_windows: int = 64  # validation sequences of T tokens, of the table at the end
    report_tokens: int = 131_072  # of validation text, that report.html is made of at the end; 0: no report
    wandb: str = ""  # project of Weights & Biases to mirror metrics.jsonl in; WANDB_MODE=offline is honoured

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "above 0", "d_ci", "n_head_ci", "d_mlp_ci", "T", "log_every", "save_every", "eval_windows")
        require(self, "0 or above", "n_layer_ci", "max_tokens", "eval_every", "report_tokens", "minutes")
        require(self, "between 0 and 1", "memory_budget")
        run.check_wandb(self.wandb)
        if self.C != "auto":
            parse_counts("C", self.C)

    def defaults(self) -> "Config":
        """What flags are put on top of: the settings of the run to resume, or those of the scale."""
        if self.resume:
            return checkpoints.resumed_settings(Path(self.resume), "decomposition in training", Config)
        settings = (PAPER if self.recipe else {}) | train_target.settings_of(SCALES, self.dataset, self.scale)
        settings |= {"C": "auto"} if pretrained.is_pretrained(self.target) else {}
        return Config(recipe=self.recipe, **settings | (TARGETED if self.prompts else {}))


# The paper's recipe at the size of the default run. What differs for a scale goes on top.
PAPER = dict(muon=0.0, halves=False, B=2, steps=8000, beta_imp=3.3e-3, beta_freq=3.3e-4)
# Of a targeted run: Delta keeps what the prompts do not need, so that nothing may push it to 0.
TARGETED = dict(beta_delta=0.0, faith_steps=0, halves=False)
# What differs from the settings above. `published` is the paper's 4-layer run; `gpu` is the authors' 2-layer
# configuration, with the published value where that is silent; blocks, heads and MLP of its Gamma are ours. `hour` ends
# in an hour on one H100 by count, its target's training included; its rates are guesses, as nobody has run it.
PUBLISHED = dict(
    beta_adv=0.5, beta_stoch=0.5, beta_imp=2e-4, beta_freq=1e-4, beta_delta=1e7, n_adv=3, adv_lr=0.01, halves=False,
    steps=400_000, B=64, T=512, lr=5e-5, muon=0.0, lr_warmup=0.0, lr_end=0.1, clip=0.01, faith_steps=400, faith_lr=1e-3,
    C="*.q=512,*.k=512,*.v=1024,*.o=1024,*.up=3072,*.down=3584", d_ci=2048, n_layer_ci=8, n_head_ci=16, d_mlp_ci=8192,
    log_every=100, save_every=2000, eval_every=10_000, max_tokens=15 * 10**8, memory_budget=0.0,
)  # fmt: skip
GPU = PUBLISHED | dict(
    beta_imp=5e-4, beta_freq=5e-5, beta_delta=1e6, lr=1e-4, d_ci=1024, n_layer_ci=4, d_mlp_ci=4096,
    C="*.q=512,*.k=256,*.v=1024,*.o=1024,*.up=4096,*.down=3072", max_tokens=10**9, memory_budget=1.0,
)  # fmt: skip
SCALES = {
    "tiny": dict(
        steps=40, T=16, C="*=6", d_ci=16, n_head_ci=2, d_mlp_ci=16, faith_steps=20, log_every=5, save_every=10,
        eval_windows=2, report_tokens=512, compile=False,
    ),
    "laptop": {},
    "hour": GPU | dict(
        muon=4.0, halves=True, steps=24_000, B=32, T=256, lr=5e-4, d_ci=768, n_head_ci=12, d_mlp_ci=3072,
        C="*.q=512,*.k=512,*.v=640,*.o=640,*.up=2048,*.down=2048", eval_every=4000, max_tokens=3 * 10**8,
    ),
    "gpu": GPU,
    "published": PUBLISHED,
}  # fmt: skip


# What may change when a run is resumed. With `steps`, p and the rates are then those of a run of the new length.
MAY_CHANGE = ("steps", "log_every", "save_every", "eval_every", "eval_windows", "report_tokens", "wandb", "data_dir")
MAY_CHANGE += ("device", "compile", "graph", "memory_budget", "resume")

# ---------------------------------------------------------------------------------------------------------------------
# B. The method


class VPD:
    """The state of a decomposition in training, and one step of it.

    decomposition, ci_fn (Gamma): the two things that learn. positions: shape [B, T] of this process's part of a batch.
    divergence: D of the reconstruction losses. compiled: torch.compile the heavy functions. graphed: replay what a
    step computes as a CUDA graph. targeted: the sequences 0, 2, ... are prompts, which the adversary attacks; the
    others are other text, see losses.pin_Deltas.
    """

    def __init__(
        self, decomposition: Decomposition, ci_fn: nn.Module, config: Method, positions: tuple[int, ...],
        device: torch.device, divergence: Callable[[Tensor, Tensor], Tensor] = losses.kl_divergence,
        compiled: bool = False, targeted: bool = False, graphed: bool = False,
    ) -> None:  # fmt: skip
        self.decomposition, self.ci_fn, self.config, self.device = decomposition, ci_fn, config, device
        self.divergence, self.step = divergence, 0
        self.bf16 = run.bf16(device) or decomposition.layers[0].weight.dtype == torch.bfloat16
        self.generator = torch.Generator(device).manual_seed(distributed.own_seed(config.seed))
        self.halves = config.halves and positions[0] % 2 == 0 and config.beta_adv > 0 and config.beta_stoch > 0
        self.adversary, self.targeted = None, targeted
        if config.beta_adv > 0:
            n_sources = sum(decomposition.C.values()) + decomposition.L
            attacked = (positions[0] // (1 + (self.halves or targeted)), *positions[1:])
            of_run = dict(S=config.S, scope=config.adv_scope, fresh=config.adv_fresh)
            self.adversary = losses.Adversary(attacked, n_sources, self.generator, **of_run)
        self.learning = [*decomposition.subcomponents(), *ci_fn.parameters()]
        self.muon = Muon(decomposition.subcomponents(), config.lr) if config.muon else None
        self.with_adam = [*ci_fn.parameters()] if self.muon else self.learning
        groups = distributed.groups(self.with_adam)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0, fused=True)
        self.rates = {self.optimizer: config.lr} | ({self.muon: config.muon * config.lr} if self.muon else {})
        if compiled:
            self.importances = run.compiled(self.importances, recomputes=decomposition.memory_budget < 1)
            self.reconstruction, self.penalties = run.compiled(self.reconstruction), run.compiled(self.penalties)
            if self.adversary:
                self.adversary.update = run.compiled(losses.adam_ascent)
        if graphed:
            self.losses_and_gradients = run.Graphed(self.losses_and_gradients, self.generator)

    def enter(self, x: Tensor) -> Tensor:
        """x, or what the target makes of it before the first block with a decomposed matrix: the same in every pass."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.decomposition.enter(x)

    def importances(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f(x | W), without a gradient; causal importances g = g_lower and g_upper, [B, T, C] in fp32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            target_output, inputs = self.decomposition.target_pass(x)
            z = self.ci_fn(inputs).float()
        return target_output, lower_leaky(z, self.config.leak), upper_leaky(z, self.config.leak)

    def reconstruction(self, x, target_output, g, r, routing=None, frozen=False) -> Tensor:
        """losses.reconstruction, with this divergence and in the precision of this device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return losses.reconstruction(self.decomposition, x, target_output, g, r, routing, self.divergence, frozen)

    def penalties(self, g_upper: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both minimalities, of the whole batch of all processes, and faithfulness; in fp32."""
        n = distributed.world() * g_upper[..., 0].numel()
        s = distributed.batch_sum(losses.power_sums(g_upper, p))
        minimality = losses.importance_minimality(s, n), losses.frequency_minimality(s, n)
        return *minimality, losses.faithfulness(self.decomposition)

    def warm_up(self) -> float:
        """U and V alone descend the faithfulness loss; returns its last value."""
        U_V = self.decomposition.subcomponents()
        optimizer = torch.optim.AdamW(U_V, lr=self.config.faith_lr, weight_decay=0.0, fused=True)
        for _ in range(self.config.faith_steps):
            optimizer.zero_grad()
            losses.faithfulness(self.decomposition).backward()
            optimizer.step()
        distributed.broadcast_([weight.data for weight in U_V])
        return losses.faithfulness(self.decomposition).item()

    def schedule(self) -> tuple[Tensor, Tensor]:
        """The power p and the adversary's learning rate of this step; the optimisers' are set."""
        c = self.config
        for optimizer, lr in self.rates.items():
            for group in optimizer.param_groups:
                group["lr"] = lr * cosine(self.step, c.steps, c.lr_warmup, c.lr_end)
        p = c.p_start + (c.p_end - c.p_start) * self.step / max(1, c.steps - 1)
        warm = min(1.0, (self.step + 1) / (c.adv_warmup * c.steps + 1))
        return tuple(torch.full((), value, device=self.device) for value in (p, c.adv_lr * warm))

    def losses_and_gradients(self, x: Tensor, p: Tensor, adv_lr: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The losses on rows x [B, T, ...], unweighted, and g. U, V and Gamma get gradients; the sources ascend."""
        c, row = self.config, {}
        # -------------------------------------------------------------------------------------------------------------
        for optimizer in self.rates:
            optimizer.zero_grad()
        x = self.enter(x)
        target_output, g, g_upper = self.importances(x)
        leaf = g.detach().requires_grad_()  # gathers dL/dg of both reconstructions, so that Gamma has one backward pass
        first = second = [x, target_output, leaf]  # what each reconstruction loss is of
        if self.targeted:
            first = [each(lambda rows: rows[0::2], part) for part in first]
        elif self.halves:
            first, second = ([each(lambda rows: rows[i::2], part) for part in first] for i in (0, 1))
        shape, L = (c.S, *second[2].shape[:-1]), self.decomposition.L

        if self.adversary:
            fixed = [first[0], *(part.detach() for part in first[1:])]
            at = c.S, *first[2].shape[:-1]
            routing = losses.sample_routing(at, L, self.generator) if c.adv_routing == "subset" else None

            def of_r(r: Tensor) -> Tensor:
                return self.reconstruction(*fixed, r, routing, frozen=True)

            self.adversary.begin_step()
            for _ in range(c.n_adv - 1):  # r alone ascends, on this batch
                self.adversary.ascend(self.adversary.gradient(of_r), adv_lr)
            r = self.adversary.r.detach().requires_grad_()
            loss = self.reconstruction(*first, r, routing)
            (c.beta_adv * loss).backward()  # U, V and Gamma descend,
            self.adversary.ascend(r.grad, adv_lr, c.beta_adv)  # and r ascends on the same pass
            row["adversarial"] = loss.detach()
            del r, loss  # and with them the gradient of r

        if c.beta_stoch > 0:
            r = losses.sample_sources((*shape, g.shape[-1] + L), self.generator)
            r = losses.pin_Deltas(r, L) if self.targeted else r
            layerwise = c.stoch_routing == "layerwise"
            sample = losses.sample_layerwise_routing if layerwise else losses.sample_routing
            routing = sample(shape, L, self.generator)
            row["stochastic"] = self.reconstruction(*second, r, routing)
            (c.beta_stoch * row["stochastic"]).backward()
            del r

        row["importance"], row["frequency"], row["faithfulness"] = self.penalties(g_upper, p)
        penalties = c.beta_imp * row["importance"] + c.beta_freq * row["frequency"] + c.beta_delta * row["faithfulness"]
        torch.autograd.backward([penalties, g], [None, leaf.grad])  # g gets the gradient that leaf has gathered
        # -------------------------------------------------------------------------------------------------------------
        return {name: loss.detach() for name, loss in row.items()}, g.detach()

    def train_step(self, x: Tensor) -> dict[str, Tensor]:
        """One step on this process's rows x [B, T, ...]; the batch's losses, unweighted, and total, grad_ci, l0, p."""
        c, (p, adv_lr) = self.config, self.schedule()
        row, g = self.losses_and_gradients(x, p, adv_lr)
        distributed.average_gradients_(self.learning)
        nn.utils.clip_grad_norm_(self.decomposition.subcomponents(), c.clip)
        grad_ci = distributed.clip_(list(self.ci_fn.parameters()), c.clip_ci or torch.inf)
        for optimizer in self.rates:
            optimizer.step()
        self.step += 1
        total = sum(getattr(c, losses.BETAS[name]) * loss for name, loss in row.items())
        row = row | {"total": total, "grad_ci": grad_ci, "l0": (g > 0).sum(-1).float().mean()}
        return dict(zip(row, distributed.mean(torch.stack([*row.values()])))) | {"p": p}

    def state_dict(self) -> dict:
        """What a run goes on from, in the first process that of all of them: to be called by all."""
        return {
            "step": self.step,
            "decomposition": self.decomposition.subcomponents_state(),
            "ci_fn": distributed.whole(self.ci_fn.state_dict()),
            "optimizer": distributed.optimizer_state(self.optimizer),
            "muon": self.muon.state_dict() if self.muon else {},
            "adversary": self.adversary.state_dict() if self.adversary else {},
            "generators": distributed.gathered(self.generator.get_state()),
        }

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.decomposition.load_subcomponents(state["decomposition"])
        self.ci_fn.load_state_dict(distributed.parts_of(state["ci_fn"], self.ci_fn.state_dict()))
        distributed.load_optimizer_state(self.optimizer, self.with_adam, state["optimizer"])
        if self.muon:
            self.muon.load_state_dict(state["muon"])
        if self.adversary:
            self.adversary.load_state_dict(state["adversary"])
        self.generator.set_state(state["generators"][distributed.rank()])


# ---------------------------------------------------------------------------------------------------------------------
# C. The run


def build(
    config: Config, target_checkpoint: dict, device: torch.device, compiled: bool = False, graphed: bool = False
) -> tuple[VPD, dict]:
    """A VPD at its initialisation, a function of config.seed, and the arguments that its Gamma was made with."""
    torch.manual_seed(config.seed)
    target = train_target.build_target(target_checkpoint)
    C = largest_sides(target) if config.C == "auto" else parse_counts("C", config.C)
    decomposition = Decomposition(target, C, None, "hidden", config.memory_budget).to(device)
    gamma = {"d_ins": [V.shape[0] for V in decomposition.V.values()], "C": sum(decomposition.C.values())}
    gamma |= {"d_ci": config.d_ci, "n_layer": config.n_layer_ci, "n_head": config.n_head_ci, "d_mlp": config.d_mlp_ci}
    ci_fn = CITransformer(**gamma, memory_budget=config.memory_budget)
    ci_fn = distributed.shard(ci_fn, ci_fn.units(), device, run.bf16(device)) if config.shard else ci_fn.to(device)
    positions = config.B // distributed.world(), config.T
    divergence = losses.HiddenKL(target.unembedding, bias=target.unembedding_bias, softcap=target.softcap)
    targeted = bool(config.prompts)
    return VPD(decomposition, ci_fn, config, positions, device, divergence, compiled, targeted, graphed), gamma


def shape_of(target_checkpoint: dict) -> GPTConfig | dict:
    """All that `trial` has to know of a target."""
    other = target_checkpoint.get("pretrained")
    return GPTConfig(**target_checkpoint["gpt"]) if other is None else other


def trial(
    config: Config, shape: GPTConfig | dict, device: torch.device, compiled: bool = False
) -> list[Callable[[], object]]:
    """What an untrained run of these sizes does, to be counted or timed: a step, and a window of the evaluation.

    shape: of a target of ours, or what pretrained.py knows about another.
    """
    ours = isinstance(shape, GPTConfig)
    untrained = {"gpt": asdict(shape), "model": GPT(shape).state_dict()} if ours else pretrained.untrained(shape)
    vpd, _ = build(config, untrained, device, compiled)
    x = torch.randint(0, vpd.decomposition.target.config.vocab_size, (config.B, config.T), device=device)
    opened = evaluation.Run(Path(), asdict(config), {}, vpd.decomposition, vpd.ci_fn)
    return [lambda: vpd.train_step(x), opened.one_window]


def train(config: Config) -> Path | None:
    """Decompose, saving on the way; the run folder, in the first process. What training held is free afterwards."""
    # Settings, processes, device
    saved, folder = None, Path(config.resume)
    if config.resume:
        checkpoints.check_unchanged(config, config.defaults(), MAY_CHANGE)
    device = run.pick_device(distributed.start(config.device))
    processes, first = run.check_processes(config.B, config.shard), distributed.rank() == 0  # the first one writes
    run.can_graph(config.graph, device, processes)
    for name, value in (TARGETED if config.prompts else {}).items():
        if (found := getattr(config, name)) != value:
            raise UserError(f"{name}={found} contradicts prompts={config.prompts}: a targeted run has {name}={value}")
    if config.prompts and config.B // processes % 2:
        raise UserError(f"B={config.B}: with --prompts a multiple of 2 x {processes} processes")
    if config.halves and config.B % 2 == 0 and config.B // processes % 2:
        raise UserError(f"B={config.B}: must be a multiple of 2 x {processes} processes, or --halves=False")
    if config.resume:
        if first:
            run.claim(folder)
        if (folder / "state.pt").exists() or (folder / "checkpoint.pt").exists():  # else it ended before its first save
            saved = checkpoints.load_checkpoint(folder / "state.pt", "decomposition in training")

    # Text and target
    with distributed.first_process_first():  # it tokenises the text and trains the target, if they are not there
        own = lambda: pretrained.encoding_of(config.target)
        load = lambda: data.load(config.dataset, config.data_dir, config.max_tokens, own())
        corpus = data.of_run(folder, saved, config.data_dir) if saved else load()
        corpus.refuse_shorter(config.T)
        texts = data.texts(config.prompts, corpus, config.T, saved)  # of which a batch is drawn, row by row in turn
        if saved:
            checkpoints.check_resumable(config, saved, device)
        elif first and not config.resume:
            folder = run.new_folder(config.out, Path(f"out/vpd-{pretrained.name_of(config.target)}{corpus.name}"))
        target_checkpoint = saved["target"] if saved else train_target.find_or_train(config, corpus)
    began = time.time() - (saved["seconds"] if saved else 0)

    # The decomposition, once it is said what it will cost
    step_bytes = 0
    if first:
        shape, alone = shape_of(target_checkpoint), replace(config, B=config.B // processes, shard=False)
        step_bytes = cost.report(lambda changed: trial(changed, shape, torch.device("cpu")), alone, device, processes)
    compile, graph = config.compile, config.graph
    if compile == "auto" and "pretrained" in target_checkpoint:
        print("compile: off, nobody has tried it on models of transformers; --compile=True does")
        compile = False
    if graph == "auto" and "pretrained" in target_checkpoint:
        graph = False  # nobody has tried it, either
    graphed = run.wants_graph(graph, device, processes, step_bytes)
    compiled = run.wants_compile(compile, device, config.steps, config.minutes, graphed)
    vpd, gamma = build(config, target_checkpoint, device, compiled, graphed)
    print(f"decompose: {vpd.decomposition.L} matrices into {gamma['C']:,} subcomponents, on {device}, to {folder}")
    if start := vpd.decomposition.start:
        print(f"decompose: nothing of the first {start} blocks: they run once a step, and not in each of its passes")
    run.write_config(folder, config, device)
    if saved:
        with checkpoints.built_from(folder / "state.pt"):
            vpd.load_state_dict(saved["vpd"])
    else:
        print(f"decompose: faithfulness {vpd.warm_up():.2e} after a warm-up of {config.faith_steps} steps")
    schedule = None  # of canaries; the steps that are timed need none

    def rows() -> Tensor:
        """This process's rows [B, T] of the next step's batch."""
        batch = data.batch_of(texts, vpd.step, config)
        batch = schedule.plant(batch, vpd.step) if schedule else batch
        return run.sent(distributed.rows(batch[:, :-1]), device)

    if config.minutes and not saved:
        before = distributed.shared(vpd.state_dict())  # the steps that are timed leave no trace
        steps = run.steps_that_fit(config.minutes, began, lambda: vpd.train_step(rows())["total"].item())
        vpd.load_state_dict(before)
        vpd.config = config = replace(config, steps=steps)
        run.write_config(folder, config, device)
    if config.canaries:
        schedule = canaries.of_stream(target_checkpoint, corpus, config.steps, config.B, config.T, config.seed)
        if schedule and saved and config.steps != (steps := saved["config"]["steps"]):
            raise UserError(f"steps={config.steps}: canaries are spread over {steps} steps, which cannot change")
    about = {"config": asdict(config), "C": vpd.decomposition.C, "gamma": gamma, "target": target_checkpoint}
    about |= {"device": device.type, "processes": processes} | corpus.of_checkpoint()
    about |= {"prompts": texts[0].as_tensors()} if config.prompts else {}

    # The loop
    with run.interruptible() as interrupted, run.Log(folder, vpd.step, config) as log:
        for step in (bar := run.progress_bar(vpd.step, config.steps, "decompose")):
            row = vpd.train_step(rows())
            last, stop = step == config.steps - 1, distributed.any_of(interrupted())
            logging, saving = last or step % config.log_every == 0, last or stop or (step + 1) % config.save_every == 0
            if logging or saving:
                row = {"step": step} | {name: value.item() for name, value in row.items()}
                run.refuse_non_finite(row, vpd.learning, f"{config.lr}; {folder} keeps what was saved before")
                bar.set_postfix({name: f"{row[name]:.3g}" for name in ("total", "l0")}, refresh=False)
            if logging:
                log(row)
            if config.eval_every and (step + 1) % config.eval_every == 0:
                log({"step": step} | evaluation.short(vpd.decomposition, vpd.ci_fn, texts[0], config))
            if saving:
                state = vpd.state_dict()
                about |= {"step": vpd.step, "seconds": time.time() - began}
                if first:  # state.pt has the optimiser and the sources too, which nobody reads but a resumed run
                    read = {name: state[name] for name in ("decomposition", "ci_fn")}
                    checkpoints.save(folder / "checkpoint.pt", "decomposition", about | read)
                    checkpoints.save(folder / "state.pt", "decomposition in training", about | {"vpd": state})
            if stop and not last:
                bar.close()
                print(f"interrupted after step {step}, saved: go on with\n    python decompose.py --resume={folder}")
                sys.exit(130)
    distributed.stop()
    if graphed:
        del vpd.losses_and_gradients  # a graph holds the step, and the step its graph
    if compiled:
        torch.compiler.reset()  # its caches hold the step
    return folder if first else None


@run.claims()
def main(config: Config) -> None:
    folder = train(config)
    if folder:
        opened, corpus = evaluation.open_run(str(folder), config.data_dir, config.device)
        metrics = evaluation.report(opened, corpus, evaluation.Config(str(folder), windows=config.eval_windows))
        if config.report_tokens and metrics["live"]["total"]:
            from studies import report  # here, as everything before works without it

            labels = next(map(str, folder.glob("labels.jsonl")), "")  # of a run that was resumed: written by hand
            report.report(opened, corpus, report.Config(str(folder), tokens=config.report_tokens, labels=labels))


if __name__ == "__main__":
    run.run_script(main, Config, __doc__)
