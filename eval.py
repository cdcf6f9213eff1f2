"""Evaluate a decomposition on held-out text: the table, metrics.json, figures and generations.

    python eval.py out/vpd-stdlib                        # under a minute on 2 CPU cores; decompose.py ends with it
    python eval.py out/vpd-stdlib --against=out/other    # draws its curves beside those of another, evaluated, run
    python eval.py out/vpd-stdlib --adv_steps=20,40,80,160,320,640,1280    # stronger and stronger adversaries

  A. Run          a run folder, ready to use
  B. Masks        one set of masks a mode; the adversary that judges
  C. Numbers      `evaluate`: one function a quantity, all in nats a token or counts a position
  D. Table
  E. Figures      arrays in, a PNG in <run>/figures out; generations.txt

Left out: probes of particular behaviours; any number that needs more than one run.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoints
import cost
import data
import flags
import run
import share
from ci_fn import CITransformer, lower_leaky
from flags import UserError
from losses import BETAS, HiddenKL, faithfulness, kl_divergence, logits_of, mask, reconstruction, sample_sources
from model import Decomposition
from train_target import build_target, check_vocabulary, generate, next_token_ce

ALIVE = 1e-6  # a subcomponent is live if its mean g over the evaluation text is above this
STARTS = 3  # of the adversary: one start alone scatters by a tenth of its KL
R_VALUES = [i / 10 for i in range(11)]
MODES = ("unmasked", "stochastic", "stochastic_no_delta", "ci", "rounded_0.0", "rounded_0.1", "rounded_0.5")
MODES += ("random", "zero")


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py
    data_dir: str = ""  # where token files are kept; default as in the run
    windows: int = 64  # validation sequences
    batch: int = 0  # sequences at a time, 0: as many as memory allows; changes no number but by rounding
    adv_steps: str = "20,80"  # steps of the adversary, whose sources all windows share; published: 20 to 320
    against: str = ""  # run folder of an evaluated run, to draw beside this one in figures/ablations.png
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        flags.require(self, "above 0", "windows")
        flags.require(self, "0 or above", "batch", "seed")
        self.steps_of_adversary()

    def steps_of_adversary(self) -> list[int]:
        return parse_steps("adv_steps", self.adv_steps)


def parse_steps(name: str, text: str) -> list[int]:
    """ "20,80" to [20, 80]. UserError, with the flag's name, for anything else."""
    try:
        steps = [int(n) for n in text.split(",")]
    except ValueError:
        steps = [0]
    if not all(0 < n < 2**63 for n in steps):
        raise UserError(f"{name}={text!r}: must be whole numbers above 0, as in 20,80")
    return steps


# ---------------------------------------------------------------------------------------------------------------------
# A. Run

Batch = tuple[Tensor, Tensor, Tensor]  # x [B, T], f(x | W), g [B, T, C]


@dataclass(frozen=True)
class Run:
    """A run of decompose.py. `config`: its settings; `checkpoint`: all that was saved.

    f(x | W) and f(x | W') are last hidden states [B, T, d_model] here, so that logits are only held a chunk at a time.
    """

    folder: Path
    config: dict
    checkpoint: dict
    decomposition: Decomposition
    ci_fn: nn.Module

    @property
    def device(self) -> torch.device:
        return self.unembedding.device

    @property
    def unembedding(self) -> Tensor:
        return self.decomposition.target.unembedding

    @property
    def mark(self) -> str:
        """16 hex digits of U, V and Gamma. What is computed from them is written with it, as a folder may train on."""
        digest = hashlib.sha256()
        for weight in (*self.decomposition.subcomponents(), *self.ci_fn.state_dict().values()):
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def importances(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """f(x | W) [B, T, d_model], g_lower [B, T, C] and the inputs L x [B, T, d_in] of tokens x [B, T]."""
        target_hidden, inputs = self.decomposition.target_pass(x)
        return target_hidden, lower_leaky(self.ci_fn(inputs).float(), self.config["leak"]), inputs

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d_model] to [..., vocab]."""
        target = self.decomposition.target
        return logits_of(hidden, target.unembedding, target.unembedding_bias, target.softcap)

    def kl(self, target_hidden: Tensor, masked_hidden: Tensor) -> Tensor:
        """KL(target || masked), nats a token."""
        target = self.decomposition.target
        divergence = HiddenKL(target.unembedding, bias=target.unembedding_bias, softcap=target.softcap)
        return divergence(target_hidden, masked_hidden)

    def ce(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the next tokens [B, T], nats a token."""
        sums = [
            next_token_ce(self.logits(h)[None], y) * len(y)
            for h, y in zip(hidden.flatten(0, 1).split(2048), labels.flatten().split(2048))
        ]
        return torch.stack(sums).sum() / labels.numel()

    @torch.enable_grad()
    def one_window(self) -> None:
        """The largest pass of an evaluation, on one window: forward and backward for the adversary's sources."""
        x = self.decomposition.enter(torch.zeros((1, self.config["T"]), dtype=torch.long, device=self.device))
        target_hidden, g, _ = self.importances(x)
        r = g.new_zeros((1, 1, 1, g.shape[-1] + self.decomposition.L), requires_grad=True)
        reconstruction(self.decomposition, x, target_hidden, g, r, None, self.kl, frozen=True).backward()

    def batches(self, windows: Tensor, at_a_time: int = 0) -> list[Tensor]:
        """Windows [N, T + 1] on the device, in as few parts as memory allows, or `at_a_time`."""
        if not at_a_time:
            (window,) = cost.counted(lambda: [self.one_window], again=False)
            fit = cost.available_memory(self.device) // (2 * window.peak)
            at_a_time = max(1, min(len(windows), fit))
        return list(windows.to(self.device).split(at_a_time))


def load_run(folder: str | Path, device: torch.device) -> Run:
    """A run folder, or an export (share.py), in a folder or at hf:<id>. UserError if it is not there or not whole."""
    folder = share.located(folder)
    path = folder / (share.CONFIG if share.is_export(folder) else "checkpoint.pt")
    checkpoint = share.read(folder) if share.is_export(folder) else checkpoints.load_checkpoint(path, "decomposition")
    ours = "pretrained" not in checkpoint["target"]  # of another model its own errors say what is wrong
    with checkpoints.built_from(path) if ours else contextlib.nullcontext():
        target = build_target(checkpoint["target"]).float()  # whatever --dtype it had in training
    with checkpoints.built_from(path):
        decomposition = Decomposition(target, checkpoint["C"], ends_in="hidden")
        decomposition.load_subcomponents(checkpoint["decomposition"])
        ci_fn = CITransformer(**checkpoint["gamma"])
        checkpoints.load_into(ci_fn, checkpoint["ci_fn"])
    return Run(folder, checkpoint["config"], checkpoint, decomposition.to(device), ci_fn.to(device))


def open_run(
    folder: str | Path, data_dir: str = "", device: str = "auto", ours: bool = False
) -> tuple[Run, data.Corpus]:
    """A run and its text, which for a targeted run is its prompts.

    ours: the caller knows the parts of model.GPT, as its normalisation without weights, and can read no other target.
    UserError as in `load_run` and `data.of_run`, or if the text has another vocabulary.
    """
    opened = load_run(folder, run.pick_device(device))
    if ours and "pretrained" in opened.checkpoint["target"]:
        model = opened.checkpoint["target"]["pretrained"]["target"]
        raise UserError(f"{folder} is of {model}: {flags.script()} knows the parts of targets of train_target.py only")
    corpus = data.of_run(folder, opened.checkpoint, data_dir)
    check_vocabulary(folder, opened.checkpoint["target"], corpus)
    return opened, data.of_prompts(opened.checkpoint, corpus) if "prompts" in opened.checkpoint else corpus


def validation_windows(corpus: data.Corpus, n: int, T: int, seed: int) -> Tensor:
    """n random windows of the validation text, drawn all at once: int64 [n, T + 1]."""
    return corpus.batch("val", 0, n, T, seed)


# ---------------------------------------------------------------------------------------------------------------------
# B. Masks


def masks(mode: str, g: Tensor, L: int, generator: torch.Generator) -> Tensor:
    """Masks m [B, T, C + L] of a mode, for causal importances g [B, T, C]. The Deltas' are 0 but for `stochastic`."""
    # A window at a time: a GPU's generator gives other numbers when one draw is split, as windows may be.
    u = torch.stack([sample_sources((*g.shape[1:-1], g.shape[-1] + L), generator) for _ in g])
    no_Delta = torch.zeros_like(u[..., :L])
    if mode == "stochastic":
        return mask(g, u)
    if mode.startswith("rounded_"):
        m = (g > float(mode.removeprefix("rounded_"))).to(g)
    else:
        m = {
            "unmasked": torch.ones_like(g),
            "stochastic_no_delta": mask(g, u[..., : g.shape[-1]]),
            "ci": g,
            "random": u[..., : g.shape[-1]],
            "zero": torch.zeros_like(g),
        }[mode]
    return torch.cat((m, no_Delta), -1)


def adversarial_sources(
    decomposition: Decomposition, batches: list[Batch], n_steps: int, generator: torch.Generator,
    divergence: Callable[[Tensor, Tensor], Tensor] = kl_divergence,
) -> tuple[Tensor, float, float]:  # fmt: skip
    """Sources r [1, ..., 1, C + L] that all batches share, after n_steps of sign ascent on the divergence from U(0, 1).

    Steps of 2 / n_steps, clamped to [0, 1]: each source can cross its range twice (published: 20 steps of 0.1). Also
    returns the divergence there, and the largest met on the way.
    """
    g, n, met = batches[0][2], sum(len(g) for _, _, g in batches), []
    r = sample_sources((*[1] * g.dim(), g.shape[-1] + decomposition.L), generator)
    for step in range(n_steps + 1):
        r, grad_r, value = r.requires_grad_(), torch.zeros_like(r), 0.0
        for x, target_output, g in batches:
            loss = reconstruction(decomposition, x, target_output, g, r, None, divergence, frozen=True) * (len(g) / n)
            value += loss.item()
            if step < n_steps:
                grad_r += torch.autograd.grad(loss, r)[0]
        met.append(value)
        r = (r.detach() + 2 / n_steps * grad_r.sign()).clamp(0, 1)
    return r, met[-1], max(met)


# ---------------------------------------------------------------------------------------------------------------------
# C. Numbers


@torch.no_grad()
def hidden_mse(decomposition: Decomposition, x: Tensor, m: Tensor) -> Tensor:
    """Squared error of every decomposed matrix's output in f(x | W'(m)) against f(x | W), mean over all elements."""
    outputs: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda layer, args, y: outputs.append(y)) for layer in decomposition.layers]
    try:
        decomposition(x)
        decomposition(x, m)
    finally:
        for hook in hooks:
            hook.remove()
    L = decomposition.L
    error = sum((a - b).square().sum() for a, b in zip(outputs[:L], outputs[L:]))
    return error / sum(y.numel() for y in outputs[:L])


def compute_recovered(ce_gap: float, curve: list[list[float]]) -> float:
    """Share of the target's training after which its validation CE lay `ce_gap` nats above its final one, in [0, 1].

    curve: [tokens, validation CE] over training. The gap is taken, not the CE, as the curve may be of other windows.
    """
    tokens, ce = np.array(curve).T
    level = ce[-1] + max(0.0, ce_gap)
    i = int(np.argmax(ce <= level))  # the first point at or below the level
    if i == 0:
        return float(tokens[0] / tokens[-1])
    between = (ce[i - 1] - level) / (ce[i - 1] - ce[i])
    return float((tokens[i - 1] + between * (tokens[i] - tokens[i - 1])) / tokens[-1])


def mean_importances(gs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Over all positions of g [B, T, C] in parts: mean g and the share with g > 0, of every subcomponent, [C] each.

    A subcomponent is live if the first is above ALIVE; L0 is the sum of the second.
    """
    n = sum(len(g) for g in gs)
    mean_g = sum(g.mean((0, 1)) * len(g) for g in gs) / n
    l0 = sum((g > 0).float().mean((0, 1)) * len(g) for g in gs) / n
    return mean_g.cpu(), l0.cpu()


def l0_above(threshold: float, gs: list[Tensor]) -> float:
    """L0 of the subcomponents with g above a threshold, a position, of g [B, T, C] in parts."""
    return sum((g > threshold).sum().item() for g in gs) / sum(g[..., 0].numel() for g in gs)


def of_windows(opened: Run, windows: Tensor, at_a_time: int = 0) -> tuple[list[Batch], list[Tensor]]:
    """(x, f(x | W), g) and the next tokens [B, T] of windows [N, T + 1], in parts. x: tokens, or what `enter` makes."""
    parts = opened.batches(windows, at_a_time)
    xs = [opened.decomposition.enter(part[:, :-1]) for part in parts]
    return [(x, *opened.importances(x)[:2]) for x in xs], [part[:, 1:] for part in parts]


def short(decomposition: Decomposition, ci_fn: nn.Module, corpus: data.Corpus, config, n: int = 8) -> dict[str, float]:
    """A run in training, on n fixed windows: L0, live, KL stochastic, rounded (g > 0), adversarial (20 steps).

    A window at a time, and in the precision of the training, as memory is short there and a sharded Gamma is in bf16.
    """
    opened = Run(Path(), asdict(config), {}, decomposition, ci_fn)
    generator = torch.Generator(opened.device).manual_seed(0)
    half = run.bf16(opened.device) or decomposition.layers[0].weight.dtype == torch.bfloat16
    with torch.autocast(opened.device.type, torch.bfloat16, enabled=half):
        batches, _ = of_windows(opened, validation_windows(corpus, n, config.T, 0), 1)
        mean_g, l0 = mean_importances([g for _, _, g in batches])
        row = {"val_l0": l0.sum().item(), "val_live": int((mean_g > ALIVE).sum())}
        for name, mode in (("stochastic", "stochastic"), ("rounded", "rounded_0.0")):
            with torch.no_grad():
                masked = [decomposition(x, masks(mode, g, decomposition.L, generator)) for x, _, g in batches]
                kl = [opened.kl(target_hidden, hidden) for (_, target_hidden, _), hidden in zip(batches, masked)]
            row[f"val_kl_{name}"] = sum(kl).item() / n
        row["val_kl_adversarial"] = adversarial_sources(decomposition, batches, 20, generator, opened.kl)[1]
    return row


def evaluate(opened: Run, corpus: data.Corpus, config: Config) -> tuple[dict, dict[str, np.ndarray]]:
    """All numbers of the table: metrics, as metrics.json holds them, and the mean g [C_l] of every matrix.

    Means are over all positions of the validation windows. `constant_r` is the CE where every source, the Deltas' too,
    has one value r: from m = g at r = 0 to the target itself at r = 1. `adversarial_n`: mean over STARTS of the KL
    after n steps, the published number; `adversarial_n_largest`: the largest KL met on the way of any of them.
    """
    began, decomposition, L = time.time(), opened.decomposition, opened.decomposition.L
    adv_steps, counts = config.steps_of_adversary(), list(decomposition.C.values())
    generator = torch.Generator(opened.device).manual_seed(config.seed)
    windows = validation_windows(corpus, config.windows, opened.config["T"], config.seed)
    batches, labels = of_windows(opened, windows, config.batch)
    passes = 1 + len(MODES) + len(R_VALUES) + STARTS * sum(adv_steps)
    bar = tqdm(total=passes, desc="evaluate", unit="pass", mininterval=1, leave=False)

    @torch.no_grad()
    def means(of: Callable[[Tensor, Tensor, Tensor, Tensor], dict[str, Tensor]]) -> dict[str, float]:
        """Of the means over one part that of(x, f(x | W), g, next tokens) gives, the means over all parts."""
        found: dict[str, float] = {}
        for batch, y in zip(batches, labels):
            for name, value in of(*batch, y).items():
                found[name] = found.get(name, 0.0) + value.item() * len(y) / len(windows)
        bar.update()
        return found

    def in_mode(mode: str, x: Tensor, target_hidden: Tensor, g: Tensor, y: Tensor) -> dict[str, Tensor]:
        m = masks(mode, g, L, generator)
        hidden = decomposition(x, m)
        mse = {"mse": hidden_mse(decomposition, x, m)} if mode in ("stochastic", "ci") else {}
        return {"ce": opened.ce(hidden, y), "kl": opened.kl(target_hidden, hidden)} | mse

    def at_r(r: float, x: Tensor, target_hidden: Tensor, g: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"ce": opened.ce(decomposition(x, mask(g, g.new_full((g.shape[-1] + L,), r))), y)}

    of_target = means(lambda x, target_hidden, g, y: {"ce": opened.ce(target_hidden, y)})
    found = {mode: means(partial(in_mode, mode)) for mode in MODES}
    ce = {"target": of_target["ce"]} | {mode: found[mode]["ce"] for mode in MODES}
    kl = {mode: found[mode]["kl"] for mode in MODES}
    for n in adv_steps:
        met = []
        for _ in range(STARTS):
            met.append(adversarial_sources(decomposition, batches, n, generator, opened.kl)[1:])
            bar.update(n)
        last, largest = zip(*met)
        kl |= {f"adversarial_{n}": sum(last) / STARTS, f"adversarial_{n}_largest": max(largest)}
    constant_r = {"r": R_VALUES, "ce": [means(partial(at_r, r))["ce"] for r in R_VALUES]}
    bar.close()

    mean_g, l0 = mean_importances([g for _, _, g in batches])
    live, gap = mean_g > ALIVE, {mode: ce[mode] - ce["target"] for mode in MODES}

    def per_matrix(values: Tensor) -> dict[str, float]:
        return {name: part.sum().item() for name, part in zip(decomposition.names, values.split(counts))}

    target = opened.checkpoint["target"]
    metrics = {
        "run_mark": opened.mark,
        "windows": config.windows,
        "seed": config.seed,
        "ce": ce,
        "kl": kl,
        "adv_steps": adv_steps,
        # Without a gap there is nothing to recover: queries and keys, say, where T = 1.
        "ce_unrecovered": {mode: gap[mode] / gap["zero"] if gap["zero"] else 0.0 for mode in MODES},
        # Only where the target's training is known
        "compute_recovered": {mode: compute_recovered(gap[mode], target["curve"]) for mode in MODES if target["curve"]},
        "l0": {"total": l0.sum().item(), "per_matrix": per_matrix(l0)},
        "l0_above_0.1": l0_above(0.1, [g for _, _, g in batches]),
        "live": {"total": live.sum().item(), "per_matrix": per_matrix(live), "C": sum(counts)},
        "faithfulness": faithfulness(decomposition).item(),
        "hidden_mse": {mode: found[mode]["mse"] for mode in MODES if "mse" in found[mode]},
        "constant_r": constant_r,
        "seconds": {
            "target": target["seconds"],
            "decompose": opened.checkpoint["seconds"],
            "eval": time.time() - began,
        },
    }
    return metrics, dict(zip(decomposition.names, (part.numpy() for part in mean_g.split(counts))))


def check_mark(path: Path, found: dict, mark: str, script: str) -> None:
    """UserError unless what `script` wrote to `path`, in a run's folder, was computed from the weights of this mark."""
    if found.get("run_mark") != mark:
        raise UserError(f"{path} is of an earlier training or code than the checkpoint beside it: run {script} again")


def read_metrics(folder: str | Path, mark: str = "") -> dict:
    """metrics.json of an evaluated run. UserError if it is not there, not whole or, if a mark is given, of another."""
    path = share.located(folder) / "metrics.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: evaluate that run first")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        metrics["constant_r"], [metrics["kl"][f"adversarial_{n}_largest"] for n in metrics["adv_steps"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a whole metrics.json of eval.py ({type(error).__name__}: {error})") from error
    if mark:
        check_mark(path, metrics, mark, "eval.py")
    return metrics


def logged_steps(folder: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl but for those of short evaluations, which have other numbers; none if it cannot be read."""
    try:
        return [row for row in run.read_log(folder) if {"total", "l0", "p"} <= row.keys()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


# ---------------------------------------------------------------------------------------------------------------------
# D. Table


def layer_of(name: str) -> str:
    """ "blocks.0.attn.q" to "blocks.0"."""
    return ".".join(name.split(".")[:2])


def table(metrics: dict, C: dict[str, int]) -> str:
    """The numbers of metrics.json for a person: nats a token, L0 in subcomponents a position."""
    lines = [f"{'':20s} {'CE':>8s} {'KL':>9s} {'CE unrecovered':>15s} {'compute recovered':>18s}"]
    lines.append(f"{'target':20s} {metrics['ce']['target']:8.4f}")
    for mode in MODES:
        numbers = f"{metrics['ce'][mode]:8.4f} {metrics['kl'][mode]:9.4f} {metrics['ce_unrecovered'][mode]:15.2%}"
        if mode in metrics["compute_recovered"]:
            numbers += f" {metrics['compute_recovered'][mode]:18.1%}"
        lines.append(f"{mode:20s} {numbers}")
    for n in metrics["adv_steps"]:
        last, largest = metrics["kl"][f"adversarial_{n}"], metrics["kl"][f"adversarial_{n}_largest"]
        lines.append(f"{f'adversarial_{n}':20s} {'':8s} {last:9.4f}   largest met {largest:.4f}")
    l0, live = metrics["l0"]["per_matrix"], metrics["live"]["per_matrix"]
    lines += ["", f"{'':20s} {'C':>8s} {'live':>9s} {'L0':>15s}"]
    layers = list(dict.fromkeys(map(layer_of, C)))
    groups = {name: [name] for name in C} | {
        layer: [name for name in C if layer_of(name) == layer] for layer in layers if 1 < len(layers) < len(C)
    }
    for what, inside in groups.items():
        sums = [sum(of[name] for name in inside) for of in (C, live, l0)]
        lines.append("{:20s} {:8d} {:9d} {:15.2f}".format(what, *sums))
    lines.append(
        f"{'total':20s} {metrics['live']['C']:8d} {metrics['live']['total']:9d} {metrics['l0']['total']:15.2f}"
    )
    lines.append(f"{'total, g > 0.1':20s} {'':18s} {metrics['l0_above_0.1']:15.2f}")
    mse = ", ".join(f"{mode} {value:.4f}" for mode, value in metrics["hidden_mse"].items())
    lines += ["", f"faithfulness {metrics['faithfulness']:.2e}   hidden MSE {mse}"]
    lines.append("seconds: " + ", ".join(f"{part} {value:.0f}" for part, value in metrics["seconds"].items()))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# E. Figures

COLOURS = {  # of the losses, and of the kinds of matrices
    "adversarial": "#d55e00", "stochastic": "#0072b2", "importance": "#009e73", "frequency": "#e69f00",
    "faithfulness": "#7f7f7f", "total": "#000000",
    "q": "#0072b2", "k": "#56b4e9", "v": "#009e73", "o": "#e69f00", "up": "#d55e00", "down": "#cc79a7",
}  # fmt: skip


def subplots(rows: int, columns: int, size: tuple[float, float], **options):
    """matplotlib's (figure, axes), drawn without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)


def save_figure(figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    path.parent.mkdir(exist_ok=True)
    with run.written(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight", format="png")
    plt.close(figure)


def plot_losses(rows: list[dict], betas: dict[str, float], path: Path) -> None:
    """Each loss times its coefficient, as it enters L_VPD, and L0 and p, over the steps of training."""
    figure, (ax, ax_l0) = subplots(1, 2, (11, 4))
    steps = [row["step"] for row in rows]
    for name, beta in (betas | {"total": 1.0}).items():
        if name in rows[0]:
            label = name if name == "total" else f"{beta:g} × {name}"
            ax.plot(steps, [beta * row[name] for row in rows], color=COLOURS.get(name), lw=1.2, label=label)
    ax.set(xlabel="step", ylabel="loss × coefficient", yscale="log", title="Losses")
    ax.set_ylim(top=8 * ax.get_ylim()[1])  # room for the legend
    ax.legend(fontsize=8, loc="upper right", ncols=2)
    ax_l0.plot(steps, [row["l0"] for row in rows], color="#000000", label="L0")
    ax_l0.set(xlabel="step", ylabel="L0: subcomponents with g > 0 a position", yscale="log", title="L0 and the power p")
    ax_p = ax_l0.twinx()
    ax_p.plot(steps, [row["p"] for row in rows], color="#d55e00", ls="--", label="p")
    ax_p.set_ylabel("p", color="#d55e00")
    save_figure(figure, path)


def plot_spectrum(mean_g: dict[str, np.ndarray], path: Path) -> None:
    """Sorted mean causal importance of every matrix; left of its dot a subcomponent is live."""
    layers = list(dict.fromkeys(map(layer_of, mean_g)))
    figure, axes = subplots(1, len(layers), (5 * len(layers) + 1, 4), sharey=True, squeeze=False)
    floor = 1e-9
    for name, values in mean_g.items():
        kind, values, n = name.rpartition(".")[2], np.sort(values)[::-1], int((values > ALIVE).sum())
        ax, label = axes[0, layers.index(layer_of(name))], f"{kind}: {n} of {len(values)} live"
        shown = np.maximum(values, floor)
        (line,) = ax.plot(np.arange(1, len(values) + 1), shown, color=COLOURS.get(kind), lw=1.3, label=label)
        if n:
            ax.plot(n, values[n - 1], "o", color=line.get_color(), ms=5)
    for ax, layer in zip(axes[0], layers):
        ax.axhline(ALIVE, color="#7f7f7f", lw=0.8, ls=":")
        ax.set(xlabel="subcomponent, sorted", yscale="log", ylim=(floor / 2, 2), title=layer)
        ax.legend(fontsize=8, loc="upper right")
    axes[0, 0].set_ylabel(f"mean causal importance g (dotted: {ALIVE:g})")
    save_figure(figure, path)


def plot_importances(g: np.ndarray, tokens: list[str], path: Path) -> None:
    """Causal importances g [T, C] of one text: subcomponents above 0.1 somewhere, in hierarchically clustered order."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    g = g[:, g.max(0) > 0.1].T  # [subcomponents, T]
    if len(g) > 2:
        g = g[leaves_list(linkage(g, "average", metric="cosine"))]
    figure, ax = subplots(1, 1, (0.17 * g.shape[1] + 1, 7))
    shown = g if len(g) else np.zeros((1, len(tokens)))
    image = ax.imshow(shown, aspect="auto", cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=6, family="monospace")
    ax.set(xlabel="position t: its token", ylabel="subcomponent, by hierarchical clustering")
    ax.set_title(f"Causal importances of {len(g)} subcomponents on a validation text")
    figure.colorbar(image, ax=ax, label="g", fraction=0.025, pad=0.01)
    save_figure(figure, path)


def plot_ablations(runs: dict[str, dict], path: Path) -> None:
    """How well g says what can be ablated: KL against the adversary's steps, and CE against one constant source r.

    runs: {label: metrics.json}. The paper's condition holds where both curves stay near the target's.
    """
    figure, (ax_kl, ax_r) = subplots(1, 2, (11, 4))
    for (label, metrics), colour in zip(runs.items(), ("#d55e00", "#0072b2")):
        steps, kl = metrics["adv_steps"], metrics["kl"]
        largest = [kl[f"adversarial_{n}_largest"] for n in steps]
        ax_kl.plot(steps, largest, "o-", color=colour, label=f"{label}: adversarial r, largest of {STARTS} starts")
        ax_kl.axhline(kl["stochastic"], color=colour, lw=1, ls=":", label=f"{label}: r ~ U(0, 1)")
        ax_r.plot(metrics["constant_r"]["r"], metrics["constant_r"]["ce"], "o-", color=colour, label=label)
    above_0 = any(max(line.get_ydata()) > 0 for line in ax_kl.lines)  # else a log axis has nothing to show
    ax_kl.set(xscale="log", yscale="log" if above_0 else "linear", xlabel="sign-ascent steps of the adversary")
    ax_kl.set(ylabel="KL(target ‖ masked), nats a token", title="Sources chosen by an adversary")
    ticks = sorted({n for metrics in runs.values() for n in metrics["adv_steps"]})
    ax_kl.set_xticks(ticks, map(str, ticks))
    ax_kl.set_xticks([], minor=True)
    ax_kl.set_ylim(top=2 * ax_kl.get_ylim()[1])  # room for the legend
    ax_r.axhline(metrics["ce"]["target"], color="#7f7f7f", lw=1, ls="--", label="target")
    ax_r.set(xlabel="r, the same for every subcomponent and Delta", ylabel="CE, nats a token")
    ax_r.set_title("One constant source: m = g + (1 − g) r")
    for ax in (ax_kl, ax_r):
        ax.legend(fontsize=8)
    save_figure(figure, path)


def generations(opened: Run, corpus: data.Corpus, seed: int, n_tokens: int = 64, width: int = 44) -> str:
    """Continuations of one validation prompt under several modes, side by side, all with the same random numbers."""
    T, decomposition = opened.config["T"], opened.decomposition
    prompt = corpus.batch("val", 1, 1, T, seed)[:, : max(1, T // 2)].to(opened.device)
    columns = []
    for mode in ("target", "stochastic", "rounded_0.0", "zero"):
        mask_generator = torch.Generator(opened.device).manual_seed(seed)

        def f(tokens: Tensor) -> Tensor:
            hidden, g, _ = opened.importances(tokens)
            if mode != "target":
                hidden = decomposition(tokens, masks(mode, g, decomposition.L, mask_generator))
            return opened.logits(hidden)

        generator = torch.Generator(opened.device).manual_seed(seed)
        text = corpus.encoding.decode(generate(f, prompt, n_tokens, T, generator)[0, prompt.shape[1] :].tolist())
        wrapped = (
            line[i : i + width] for line in text.expandtabs(4).splitlines() for i in range(0, max(1, len(line)), width)
        )
        lines = ["".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line) for line in wrapped]
        columns.append([mode, "-" * width, *lines])
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns))
    side_by_side = "\n".join(" | ".join(f"{cell:{width}s}" for cell in row).rstrip() for row in rows)
    return f"prompt:\n{corpus.encoding.decode(prompt[0].tolist())}\n\n{side_by_side}\n"


def report(opened: Run, corpus: data.Corpus, config: Config) -> dict:
    """Evaluate a run, print the table, write metrics.json, figures/*.png and generations.txt; returns the metrics."""
    against = {}
    if config.against and share.located(config.against) != opened.folder:
        against = {config.against: read_metrics(config.against)}
    metrics, mean_g = evaluate(opened, corpus, config)
    run.write_text(opened.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(table(metrics, opened.decomposition.C))

    figures, c = opened.folder / "figures", opened.config
    betas = {name: c.get(beta, 0.0) for name, beta in BETAS.items()}
    if rows := logged_steps(opened.folder):
        plot_losses(rows, betas, figures / "losses.png")
    else:
        print(f"losses.png: not drawn, as {opened.folder}/metrics.jsonl holds no step of the training")
    plot_spectrum(mean_g, figures / "spectrum.png")
    x = validation_windows(corpus, 1, c["T"], config.seed)[:, :-1]
    g = opened.importances(x.to(opened.device))[1][0].float().cpu().numpy()
    tokens = [repr(corpus.encoding.decode([t]).replace(" ", "·"))[1:-1] for t in x[0].tolist()]
    plot_importances(g, [t if len(t) < 12 else t[:11] + "…" for t in tokens], figures / "importances.png")
    plot_ablations({str(opened.folder): metrics} | against, figures / "ablations.png")
    run.write_text(opened.folder / "generations.txt", generations(opened, corpus, config.seed))
    print(f"written: {opened.folder}/metrics.json, {figures}/*.png, {opened.folder}/generations.txt")
    return metrics


def main(config: Config) -> None:
    report(*open_run(config.run, config.data_dir, config.device), config)


if __name__ == "__main__":
    run.run_script(main, Config, __doc__)
