"""Train the target f(x | W), the language model that decompose.py will take apart (paper, "The language model that we
decomposed").

    python train_target.py             # the default target: under a minute on 2 CPU cores, validation CE about 3.5 nats
    python train_target.py --resume=out/target-stdlib    # go on after Ctrl-C, a crash or a power cut
    python train_target.py --help

Writes out/target-<dataset>/ with config.json, metrics.jsonl (validation CE against tokens, from which eval.py reads how
much pretraining compute a decomposition recovers), state.pt while it trains, sample.txt, and checkpoint.pt at the end.
decompose.py calls this by itself.

  A. Settings
  B. Training
"""

import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

import data
import distributed
from model import GPT, GPTConfig, generate
from run import (
    autocast,
    check_unchanged,
    cut_log,
    interruptible,
    load_checkpoint,
    log_line,
    pick_device,
    progress_bar,
    read_log,
    resumed_settings,
    run_script,
    save,
    write_config,
)  # fmt: skip
from tokenise import hub_set

# ---------------------------------------------------------------------------------------------------------------------
# A. Settings


Scale = Literal["", "tiny", "laptop", "gpu", "published"]


def scale_of(dataset: str, scale: Scale = "") -> Scale:
    """The scale itself, or where none is named that of the dataset: one GPU for a set from the hub, else a laptop."""
    return scale or ("gpu" if hub_set(dataset) else "laptop")


def settings_of(scales: dict[str, dict], dataset: str, scale: Scale) -> dict:
    """The settings of a scale. A set of the hub is never downloaded whole unasked: 20M tokens where the scale names no number."""
    scale = scale_of(dataset, scale)
    return {"scale": scale} | ({"max_tokens": 20_000_000} if hub_set(dataset) else {}) | scales[scale]


@dataclass(frozen=True)
class Config:
    scale: Scale = (
        ""  # settings to start from: tiny, laptop, gpu (2 layers of 768), published (4); default that of the dataset
    )
    dataset: str = "stdlib"  # 'stdlib', 'pile', 'simplestories', 'tinystories', 'hf:<id>[:column]', or the path of a file or folder of text
    max_tokens: int = 0  # of the dataset, from its beginning; 0: all of it
    data_dir: str = "data"  # where token files are kept
    out: str = ""  # run folder; default out/target-<dataset>
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

    def __post_init__(self) -> None:
        for name in ("T", "steps", "B", "val_every", "val_windows", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("seed", "max_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: must be above 0")

    def defaults(self) -> "Config":
        """What flags are put on top of: the settings of the run to resume, or those of the scale."""
        if self.resume:
            return resumed_settings(Path(self.resume), "state.pt", "target in training", Config)
        return Config(**settings_of(SCALES, self.dataset, self.scale))


# What differs from the settings above. The widths and heads of `gpu` and `published` are the paper's and the authors'; rate and
# budget (about 20 tokens a parameter) are ours.
GPU = dict(
    n_layer=2,
    n_head=6,
    d_model=768,
    d_mlp=3072,
    T=512,
    steps=32_000,
    B=64,
    lr=1e-3,
    warmup=0.02,
    val_every=500,
    save_every=2000,
    max_tokens=10**9,
)
SCALES = {
    "tiny": dict(n_layer=2, n_head=2, d_model=16, d_mlp=32, T=16, steps=40, B=4, val_every=10, val_windows=8),
    "laptop": {},
    "gpu": GPU,
    "published": GPU | dict(n_layer=4, steps=41_000, max_tokens=15 * 10**8),
}


# Settings that may change when a run is resumed. `steps` is one of them, but not without effect: the learning rate is from
# then on that of a run of the new length. The device is checked apart.
MAY_CHANGE = ("steps", "save_every", "data_dir", "device", "resume")


# ---------------------------------------------------------------------------------------------------------------------
# B. Training


def cosine(step: int, steps: int, warmup: float = 0.0, floor: float = 0.1) -> float:
    """Factor on the learning rate: rises linearly over the first `warmup` share of the steps, then cosine from 1 to `floor`."""
    n_warmup = warmup * steps
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    progress = (step - n_warmup) / max(1.0, steps - 1 - n_warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def next_token_ce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token in nats, mean over all positions."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_ce(target: GPT, corpus: data.Corpus, windows: int, device: torch.device) -> float:
    """Mean CE over `windows` validation windows, always the same: nats a token."""
    total = torch.zeros((), device=device)
    for i in range(0, windows, 32):
        tokens = corpus.batch("val", i, min(32, windows - i), target.config.context).to(device)
        with autocast(device):
            total += next_token_ce(target(tokens[:, :-1]), tokens[:, 1:]) * len(tokens)
    return total.item() / windows


def build_target(checkpoint: dict) -> GPT:
    """The trained target of a checkpoint of this script."""
    target = GPT(GPTConfig(**checkpoint["gpt"]))
    target.load_state_dict(checkpoint["model"])
    return target


def check_vocabulary(folder: str | Path, checkpoint: dict, corpus: data.Corpus) -> None:
    """ValueError if the target of `checkpoint` was trained on other tokens than the corpus has."""
    if checkpoint["vocabulary"] != corpus.vocabulary:
        raise ValueError(
            f"{folder}: its target was trained with another vocabulary than {corpus.name} has here: train a target anew, or name its dataset"
        )


def check_resumable(config: Any, saved: dict, corpus: data.Corpus, device: torch.device) -> None:
    """ValueError if a saved run of either script cannot go on here: another kind of device, other tokens, too few steps."""
    if saved["device"] != device.type:
        raise ValueError(
            f"resume={config.resume}: that run was on {saved['device']}, and its numbers cannot go on on {device.type}"
        )
    if saved["corpus"] != corpus.digest():
        raise ValueError(
            f"resume={config.resume}: the tokens of {corpus.name} are not those of that run: its text has changed"
        )
    if config.steps != saved["config"]["steps"]:
        if config.steps < saved["step"]:
            raise ValueError(f"steps={config.steps}: the run in {config.resume} has done {saved['step']} already")
        print(
            f"resume: {config.steps:,} steps, not {saved['config']['steps']:,}: from step {saved['step']:,} on all schedules are those of a run of the new length"
        )


def default_folder(dataset: str, scale: Scale, corpus: data.Corpus) -> Path:
    """out/target-<dataset>, with the scale behind it where it is not the dataset's own."""
    usual = scale_of(dataset, scale) == scale_of(dataset)
    return Path(f"out/target-{corpus.name}" + ("" if usual else f"-{scale}"))


def main(config: Config) -> Path:
    """Train and save a target; returns its run folder."""
    began = time.time()
    if (
        distributed.world() == 1 < int(os.environ.get("WORLD_SIZE", "1"))
    ):  # in a run of decompose.py its first process comes here
        raise ValueError("train_target.py runs in one process: start it without torchrun")
    if config.resume:
        if (Path(config.resume) / "checkpoint.pt").exists():
            print(f"target: {config.resume} is finished")
            return Path(config.resume)
        check_unchanged(config, config.defaults(), MAY_CHANGE)
    device = pick_device(config.device)
    corpus = data.load(config.dataset, config.data_dir, config.max_tokens)
    folder = Path(config.resume or config.out or default_folder(config.dataset, config.scale, corpus))
    if (folder / "checkpoint.pt").exists():
        raise ValueError(f"{folder} already holds a target: give another --out, or remove it")
    if not config.resume and (folder / "state.pt").exists():
        raise ValueError(
            f"{folder} holds an unfinished target: go on with --resume={folder}, give another --out, or remove it"
        )

    torch.manual_seed(config.seed)
    target = GPT(
        GPTConfig(corpus.vocab_size, config.T, config.n_layer, config.n_head, config.d_model, config.d_mlp)
    ).to(device)
    optimizer = torch.optim.Adam(target.parameters(), lr=config.lr, betas=config.adam_betas, fused=True)
    first = 0
    if config.resume and (folder / "state.pt").exists():
        state = load_checkpoint(folder / "state.pt", "target in training")
        check_resumable(config, state, corpus, device)
        target.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, began = state["step"], began - state["seconds"]
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config, device)
    cut_log(folder, first + 1)  # a row is numbered by the steps done
    print(
        f"target: {sum(p.numel() for p in target.parameters()):,} parameters, {config.steps} steps of {config.B} x {config.T} tokens, on {device}"
    )

    with interruptible() as interrupted:
        bar = progress_bar(first, config.steps, "target")
        for step in bar:
            tokens = corpus.batch("train", step, config.B, config.T, config.seed).to(device)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * cosine(step, config.steps, config.warmup)
            with autocast(device):
                loss = next_token_ce(target(tokens[:, :-1]), tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(target.parameters(), config.clip)
            optimizer.step()

            last, stop = step == config.steps - 1, interrupted()
            if step % config.val_every == 0 or last:
                row = {"step": step + 1, "tokens": (step + 1) * config.B * config.T, "train_ce": loss.item()}
                row["val_ce"] = validation_ce(target, corpus, config.val_windows, device)
                if not math.isfinite(row["train_ce"]):
                    raise ValueError(
                        f"the training loss is {row['train_ce']} at step {step}: try a smaller lr than {config.lr}"
                    )
                log_line(folder, row)
                bar.set_postfix(train_ce=f"{row['train_ce']:.3f}", val_ce=f"{row['val_ce']:.3f}", refresh=False)
            if last or stop or (step + 1) % config.save_every == 0:
                state = {
                    "kind": "target in training",
                    "config": asdict(config),
                    "device": device.type,
                    "corpus": corpus.digest(),
                }
                state |= {
                    "model": target.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "seconds": time.time() - began,
                }
                save(folder / "state.pt", state)
            if stop and not last:
                bar.close()
                print(f"interrupted after step {step}, saved: go on with\n    python train_target.py --resume={folder}")
                sys.exit(130)

    seconds, row = time.time() - began, read_log(folder)[-1]
    prompt = corpus.batch("val", 0, 1, config.T)[:, : max(1, config.T // 4)].to(device)
    generator = torch.Generator(device).manual_seed(config.seed)
    sample = corpus.encoding.decode(generate(target, prompt, 2 * config.T, config.T, generator)[0].tolist())
    (folder / "sample.txt").write_text(sample, encoding="utf-8")
    curve = [
        [row["tokens"], row["val_ce"]] for row in read_log(folder)
    ]  # eval.py reads pretraining compute recovered from it
    checkpoint = {
        "kind": "target",
        "config": asdict(config),
        "gpt": asdict(target.config),
        "model": target.state_dict(),
    }
    save(folder / "checkpoint.pt", checkpoint | {"vocabulary": corpus.vocabulary, "curve": curve, "seconds": seconds})
    (folder / "state.pt").unlink(missing_ok=True)  # only now that the target is whole
    print(
        f"target: validation CE {row['val_ce']:.4f} nats a token after {row['tokens']:,} tokens, {seconds:.0f} s; saved in {folder}"
    )
    print("a sample of its text:\n" + "\n".join("    | " + line for line in sample.splitlines()))
    return folder


if __name__ == "__main__":
    run_script(main, Config, __doc__)
