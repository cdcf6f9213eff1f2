"""Train the target f(x | W), the language model that decompose.py will take apart (paper, "The language model that we
decomposed").

    python train_target.py             # the default target: under a minute on 2 CPU cores, validation CE about 3.5 nats
    python train_target.py --resume=out/target-stdlib    # go on after Ctrl-C, a crash or a power cut

Writes out/target-<dataset>/ with config.json, metrics.jsonl (validation CE against tokens, from which eval.py reads how
much pretraining compute a decomposition recovers), state.pt while it trains, sample.txt, and checkpoint.pt at the end.
A target of other settings gets them behind its name, as in out/target-stdlib-T32. decompose.py calls this by itself.

  A. Settings
  B. Training
  C. A trained target, for decompose.py and the readers of a run
"""

import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import canaries
import checkpoints
import data
import distributed
import flags
import pretrained
import run
from flags import UserError
from model import GPT, GPTConfig
from tokenise import hub_set

# ---------------------------------------------------------------------------------------------------------------------
# A. Settings

Scale = Literal["", "tiny", "laptop", "hour", "gpu", "published"]


def settings_of(scales: dict[str, dict], dataset: str, scale: Scale) -> dict:
    """The settings of a scale; without one that of the dataset: an hour of a GPU for a set from the hub, else a laptop.

    A set of the hub is never downloaded whole unasked: 20M tokens where the scale names no number.
    """
    scale = scale or ("hour" if hub_set(dataset) else "laptop")
    return {"scale": scale} | ({"max_tokens": 20_000_000} if hub_set(dataset) else {}) | scales[scale]


@dataclass(frozen=True)
class Config:
    scale: Scale = ""  # settings to start from: tiny, laptop, hour, gpu, published; default by dataset
    dataset: str = "stdlib"  # or pile, simplestories, tinystories, hf:<id>[:column], or a file or folder of text
    max_tokens: int = 0  # of the dataset, from its beginning; 0: all of it
    data_dir: str = "data"  # where token files are kept
    out: str = ""  # run folder; default out/target-<dataset>, with what differs from the scale's settings behind it
    resume: str = ""  # run folder of an unfinished run to go on with; settings not given are read from it
    seed: int = 0  # of initialisation and batches
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    # The model
    n_layer: int = 2  # blocks
    n_head: int = 4  # attention heads
    d_model: int = 64  # width of the residual stream
    d_mlp: int = 256  # neurons of an MLP
    T: int = 64  # context, tokens
    # The training
    steps: int = 1500  # of the optimiser
    B: int = 32  # sequences a step
    lr: float = 3e-3  # at its highest; cosine to a tenth
    warmup: float = 0.05  # share of the steps
    adam_betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest norm of the gradient
    # Validation
    val_every: int = 50  # steps
    val_windows: int = 64  # sequences of T tokens
    save_every: int = 500  # steps
    # Planted strings
    canaries: str = ""  # doses of random and, behind a +, natural canaries, as in 0,16,64,256+64: see canaries.py

    def __post_init__(self) -> None:
        flags.require(self, "above 0", "T", "steps", "B", "lr", "clip", "val_every", "val_windows", "save_every")
        flags.require(self, "0 or above", "seed", "max_tokens")
        flags.require(self, "between 0 and 1", "warmup")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise UserError(f"adam_betas={self.adam_betas}: both must be in [0, 1)")
        canaries.parse_doses("canaries", self.canaries)
        GPTConfig(1, self.T, self.n_layer, self.n_head, self.d_model, self.d_mlp)  # refuses what is no model

    def defaults(self) -> "Config":
        """What flags are put on top of: the settings of the run to resume, or those of the scale."""
        if self.resume:
            return checkpoints.resumed_settings(Path(self.resume), "target in training", Config)
        return Config(**settings_of(SCALES, self.dataset, self.scale))


# What differs from the settings above. Widths and heads of `gpu` and `published` are the paper's and the authors'; the
# rate and the budget (about 20 tokens a parameter) are ours. `hour` is 8 minutes of an H100 by count.
GPU = dict(
    n_layer=2, n_head=6, d_model=768, d_mlp=3072, T=512, steps=32_000, B=64, lr=1e-3, warmup=0.02, val_every=500,
    save_every=2000, max_tokens=10**9,
)  # fmt: skip
SCALES = {
    "tiny": dict(n_layer=2, n_head=2, d_model=16, d_mlp=32, T=16, steps=40, B=4, val_every=10, val_windows=8),
    "laptop": {},
    "hour": GPU | dict(n_head=8, d_model=512, d_mlp=2048, T=256, steps=12_000, B=96, max_tokens=3 * 10**8),
    "gpu": GPU,
    "published": GPU | dict(n_layer=4, steps=41_000, max_tokens=15 * 10**8),
}

# What may change when a run is resumed. With `steps`, the learning rate is then that of a run of the new length.
MAY_CHANGE = ("steps", "save_every", "data_dir", "device", "resume")


def default_folder(config: Config, corpus: data.Corpus) -> Path:
    """out/target-<corpus>, then the scale where it is not the dataset's own, then each setting that differs."""
    usual, own = (Config(dataset=config.dataset, scale=scale).defaults() for scale in (config.scale, ""))
    changed = {name: value for name, value in asdict(config).items() if value != getattr(usual, name)}
    for name in ("scale", "dataset", "max_tokens", "data_dir", "out", "resume", "device", "save_every"):
        changed.pop(name, None)  # these make no other target
    parts = [usual.scale] * (usual.scale != own.scale) + [f"{name}{value}" for name, value in changed.items()]
    return Path("-".join([f"out/target-{corpus.name}", *(re.sub(r"[^\w.]+", "_", part) for part in parts)]))


# ---------------------------------------------------------------------------------------------------------------------
# B. Training


def cosine(step: int, steps: int, warmup: float = 0.0, floor: float = 0.1) -> float:
    """Factor on the learning rate: a linear rise over the first `warmup` share of the steps, a cosine to `floor`."""
    n_warmup = warmup * steps
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    progress = (step - n_warmup) / max(1.0, steps - 1 - n_warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def next_token_ce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token in nats, mean over all positions."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def train_step(target: GPT, optimizer: torch.optim.Optimizer, tokens: Tensor, clip: float) -> Tensor:
    """One step on windows [B, T + 1], at the rate that is set; the CE, with its gradient's norm clipped."""
    with run.autocast(tokens.device):
        loss = next_token_ce(target(tokens[:, :-1]), tokens[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(target.parameters(), clip)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def validation_ce(target: GPT, corpus: data.Corpus, windows: int, device: torch.device) -> float:
    """Mean CE over `windows` validation windows, always the same: nats a token."""
    total = torch.zeros((), device=device)
    for i in range(0, windows, 32):
        tokens = corpus.batch("val", i, min(32, windows - i), target.config.context).to(device)
        with run.autocast(device):
            total += next_token_ce(target(tokens[:, :-1]), tokens[:, 1:]) * len(tokens)
    return total.item() / windows


@run.claims()
def main(config: Config) -> Path:
    """Train and save a target; returns its run folder."""
    began, folder = time.time(), Path(config.resume)
    if (
        distributed.world() == 1 < int(os.environ.get("WORLD_SIZE", "1"))
    ):  # the first process of decompose.py may come here
        raise UserError("train_target.py runs in one process: start it without torchrun")
    if config.resume:
        if (folder / "checkpoint.pt").exists():
            print(f"target: {folder} is finished")
            return folder
        checkpoints.check_unchanged(config, saved := config.defaults(), MAY_CHANGE)
        if config.canaries and config.steps != saved.steps:
            raise UserError(f"steps={config.steps}: canaries are spread over {saved.steps} steps, which cannot change")
    device, state = run.pick_device(config.device), None
    if config.resume:
        run.claim(folder)
        if (folder / "state.pt").exists():
            state = checkpoints.load_checkpoint(folder / "state.pt", "target in training")
    load = lambda: data.load(config.dataset, config.data_dir, config.max_tokens)
    corpus = data.of_run(folder, state, config.data_dir) if state else load()
    corpus.refuse_shorter(config.T)
    if state:
        checkpoints.check_resumable(config, state, device)
    elif not config.resume:
        folder = run.new_folder(config.out or str(default_folder(config, corpus)))

    torch.manual_seed(config.seed)
    gpt = GPTConfig(corpus.vocab_size, config.T, config.n_layer, config.n_head, config.d_model, config.d_mlp)
    target = GPT(gpt).to(device)
    optimizer = torch.optim.Adam(target.parameters(), lr=config.lr, betas=config.adam_betas, fused=True)
    first = 0
    if state:
        with checkpoints.built_from(folder / "state.pt"):
            checkpoints.load_into(target, state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first, began = state["step"], began - state["seconds"]
    run.write_config(folder, config, device)
    planted = canaries.make(corpus, config.canaries, config.seed)
    doses = [canary.dose for canary in planted]
    schedule = canaries.Schedule(planted, doses, config.steps, config.B, config.T, config.seed) if planted else None
    size = sum(weight.numel() for weight in target.parameters())
    print(f"target: {size:,} parameters, {config.steps} steps of {config.B} x {config.T} tokens, on {device}")

    log = run.Log(folder, first + 1)  # a row is numbered by the steps done
    with run.interruptible() as interrupted:
        for step in (bar := run.progress_bar(first, config.steps, "target")):
            tokens = corpus.batch("train", step, config.B, config.T, config.seed)
            tokens = run.sent(schedule.plant(tokens, step) if schedule else tokens, device)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * cosine(step, config.steps, config.warmup)
            loss = train_step(target, optimizer, tokens, config.clip)

            last, stop = step == config.steps - 1, interrupted()
            logging, saving = last or step % config.val_every == 0, last or stop or (step + 1) % config.save_every == 0
            if logging or saving:
                run.refuse_non_finite({"step": step, "train": loss.item()}, list(target.parameters()), str(config.lr))
            if logging:
                row = {"step": step + 1, "tokens": (step + 1) * config.B * config.T, "train_ce": loss.item()}
                row["val_ce"] = validation_ce(target, corpus, config.val_windows, device)
                log(row)
                bar.set_postfix({name: f"{row[name]:.3f}" for name in ("train_ce", "val_ce")}, refresh=False)
            if saving:
                state = {"config": asdict(config), "device": device.type, "processes": 1, "step": step + 1}
                state |= corpus.of_checkpoint()
                state |= {"model": target.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoints.save(folder / "state.pt", "target in training", state | {"seconds": time.time() - began})
            if stop and not last:
                bar.close()
                print(f"interrupted after step {step}, saved: go on with\n    python train_target.py --resume={folder}")
                sys.exit(130)

    prompt = corpus.batch("val", 0, 1, config.T)[:, : max(1, config.T // 4)].to(device)
    generator = torch.Generator(device).manual_seed(config.seed)
    sample = corpus.encoding.decode(generate(target, prompt, 2 * config.T, config.T, generator)[0].tolist())
    run.write_text(folder / "sample.txt", sample)
    rows, seconds = run.read_log(folder), time.time() - began
    curve = [[row["tokens"], row["val_ce"]] for row in rows]  # eval.py reads pretraining compute recovered from it
    trained = {"config": asdict(config), "gpt": asdict(gpt), "model": target.state_dict(), "curve": curve}
    trained |= {"vocabulary": corpus.vocabulary, "seconds": seconds} | corpus.of_checkpoint()
    checkpoints.save(folder / "checkpoint.pt", "target", trained)
    (folder / "state.pt").unlink(missing_ok=True)  # only now that the target is whole
    about = f"after {rows[-1]['tokens']:,} tokens, {seconds:.0f} s; saved in {folder}"
    print(f"target: validation CE {rows[-1]['val_ce']:.4f} nats a token {about}")
    print("a sample of its text:\n" + "\n".join("    | " + line for line in sample.splitlines()))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# C. A trained target


@torch.no_grad()
def generate(f: Callable[[Tensor], Tensor], tokens: Tensor, n: int, context: int, generator: torch.Generator) -> Tensor:
    """`tokens` [1, T] and n more, drawn one after the other from softmax(f(the last `context` of them))."""
    for _ in range(n):
        probability = f(tokens[:, -context:])[:, -1].float().softmax(-1)  # [1, vocab]
        tokens = torch.cat((tokens, torch.multinomial(probability, 1, generator=generator)), 1)
    return tokens


def build_target(checkpoint: dict) -> GPT | pretrained.Pretrained:
    """The trained target of a checkpoint of this script, or of pretrained.py."""
    if "pretrained" in checkpoint:
        return pretrained.build(checkpoint)
    target = GPT(checkpoints.settings(GPTConfig, checkpoint["gpt"]))
    checkpoints.load_into(target, checkpoint["model"])
    return target


def check_vocabulary(folder: str | Path, checkpoint: dict, corpus: data.Corpus) -> None:
    """UserError if the target of `checkpoint` was trained on other tokens than the corpus has."""
    if checkpoint["vocabulary"] != corpus.vocabulary:
        what = f"another vocabulary than {corpus.name} has here"
        raise UserError(f"{folder}: its target was trained with {what}: train a target anew, or name its dataset")


def find_or_train(config: Any, corpus: data.Corpus) -> dict:
    """The checkpoint of the target that a Config of decompose.py asks for. UserError if it does not fit.

    Without `config.target` it is the one of the usual settings, trained first, or to its end, if it is not there.
    """
    if pretrained.is_pretrained(config.target):
        return pretrained.checkpoint(config.target, config.dtype, config.T) | {"vocabulary": corpus.vocabulary}
    folder = Path(config.target)
    if not config.target:
        same = {name: getattr(config, name) for name in ("dataset", "max_tokens", "data_dir", "device", "T")}
        wanted = replace(Config(scale=config.scale, dataset=config.dataset).defaults(), **same)
        folder = default_folder(wanted, corpus)
        if not (folder / "checkpoint.pt").exists():
            with run.claims():
                run.claim(folder, wait=True)  # another process may be training it
                if not (folder / "checkpoint.pt").exists():
                    main(replace(wanted, resume=str(folder) if (folder / "config.json").exists() else ""))
    checkpoint = checkpoints.load_checkpoint(folder / "checkpoint.pt", "target")
    context = checkpoint["gpt"]["context"]
    if config.T > context:
        raise UserError(f"T={config.T}: the context of the target in {folder} is {context} tokens: give a smaller T")
    check_vocabulary(folder, checkpoint, corpus)
    return checkpoint


if __name__ == "__main__":
    run.run_script(main, Config, __doc__)
