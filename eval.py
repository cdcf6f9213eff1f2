"""Evaluate a decomposition on held-out text: the table, metrics.json, figures and generations.

    python eval.py out/vpd-stdlib                          # a minute or two on 2 CPU cores; decompose.py does it at its end
    python eval.py out/vpd-stdlib --against=out/other      # and draws its curves beside those of another, evaluated, run

  A. Run          a run folder, ready to use
  B. Masks        one set of masks a mode
  C. Numbers      `evaluate`: one function a quantity, all in nats a token or counts a position
  D. Table
  E. Figures      arrays in, a PNG in <run>/figures out; generations.txt

Left out: probes of particular behaviours; any number that needs more than one run.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
from ci_fn import CITransformer, lower_leaky
from losses import faithfulness, kl_divergence, mask, reconstruction, sample_sources
from model import Decomposition, generate
from run import load_checkpoint, pick_device, read_log, run_script, written
from train_target import build_target, check_vocabulary, next_token_ce

ALIVE = 1e-6  # a subcomponent is live if its mean g over the evaluation text is above this
PGD_STEPS = (20, 40, 80, 160, 320)
R_VALUES = [i / 10 for i in range(11)]
MODES = (
    "unmasked",
    "stochastic",
    "stochastic_no_delta",
    "ci",
    "rounded_0.0",
    "rounded_0.1",
    "rounded_0.5",
    "random",
    "zero",
)


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py
    data_dir: str = ""  # where token files are kept; default as in the run
    windows: int = 64  # validation sequences
    batch: int = 64  # sequences at a time; the adversary's sources are shared by a batch
    against: str = ""  # run folder of an evaluated run, to draw beside this one in figures/ablations.png
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        if min(self.windows, self.batch) < 1 or self.seed < 0:
            raise ValueError(
                f"windows={self.windows}, batch={self.batch}: must be at least 1, and seed={self.seed} not negative"
            )


# ---------------------------------------------------------------------------------------------------------------------
# A. Run


@dataclass(frozen=True)
class Run:
    """A finished or interrupted run of decompose.py. `config`: its settings; `checkpoint`: all that was saved."""

    folder: Path
    config: dict
    checkpoint: dict
    decomposition: Decomposition
    ci_fn: CITransformer

    def importances_and_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """f(x | W) [B, T, vocab], the causal importances g_lower [B, T, C] of tokens x [B, T], and L x [B, T, d_in]; no gradients."""
        with torch.no_grad():
            target_output, inputs = self.decomposition.target_pass(x)
            return target_output, lower_leaky(self.ci_fn(inputs), self.config["leak"]), inputs

    def importances(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first two of these."""
        return self.importances_and_inputs(x)[:2]


def load_run(folder: str | Path, device: torch.device) -> Run:
    """A run folder of decompose.py. FileNotFoundError or ValueError if it is not there, broken or foreign."""
    checkpoint = load_checkpoint(Path(folder) / "checkpoint.pt", "decomposition")
    decomposition = Decomposition(build_target(checkpoint["target"]), checkpoint["C"])
    decomposition.load_subcomponents(checkpoint["vpd"]["decomposition"])
    ci_fn = CITransformer(**checkpoint["ci_fn"])
    ci_fn.load_state_dict(checkpoint["vpd"]["ci_fn"])
    return Run(Path(folder), checkpoint["config"], checkpoint, decomposition.to(device), ci_fn.to(device))


# ---------------------------------------------------------------------------------------------------------------------
# B. Masks


def masks(mode: str, g: Tensor, L: int, generator: torch.Generator) -> Tensor:
    """Masks m [B, T, C + L] of a mode of the table, for causal importances g [B, T, C]. The Deltas' are 0 but for `stochastic`."""
    u = sample_sources((*g.shape[:-1], g.shape[-1] + L), generator)
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
    decomposition: Decomposition, x: Tensor, target_output: Tensor, g: Tensor, n_steps: int, generator: torch.Generator,
    divergence: Callable[[Tensor, Tensor], Tensor] = kl_divergence,
) -> Tensor:  # fmt: skip
    """Sources r [1, 1, 1, C + L] that one batch shares, after n_steps of sign ascent on the divergence from r ~ U(0, 1).

    Steps of 2 / n_steps, clamped to [0, 1]: each source can cross its range twice (published: 20 steps of 0.1).
    """
    r = sample_sources((*[1] * g.dim(), g.shape[-1] + decomposition.L), generator)
    for _ in range(n_steps):
        r.requires_grad_()
        (grad_r,) = torch.autograd.grad(
            reconstruction(decomposition, x, target_output, g, r, None, divergence, frozen=True), r
        )
        r = (r.detach() + 2 / n_steps * grad_r.sign()).clamp(0, 1)
    return r


# ---------------------------------------------------------------------------------------------------------------------
# C. Numbers


@torch.no_grad()
def hidden_mse(decomposition: Decomposition, x: Tensor, m: Tensor) -> Tensor:
    """Squared error between the outputs of every decomposed matrix in f(x | W'(m)) and in f(x | W), mean over all elements."""
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


def mean_importances(run: Run, corpus: data.Corpus, config: Config) -> tuple[Tensor, Tensor]:
    """Over all positions of the validation windows: mean g and the share with g > 0, of every subcomponent, [C] each.

    A subcomponent is live if the first is above ALIVE; L0 is the sum of the second.
    """
    mean_g, l0 = torch.zeros(2, sum(run.decomposition.C.values()))
    for i in range(0, config.windows, config.batch):
        size = min(config.batch, config.windows - i)
        x = corpus.batch("val", i // config.batch, size, run.config["T"], config.seed)[:, :-1]
        _, g = run.importances(x.to(next(run.ci_fn.parameters()).device))
        mean_g += g.mean((0, 1)).cpu() * size / config.windows
        l0 += (g > 0).float().mean((0, 1)).cpu() * size / config.windows
    return mean_g, l0


def evaluate(run: Run, corpus: data.Corpus, config: Config) -> tuple[dict, dict[str, np.ndarray]]:
    """All numbers of the table: metrics, as metrics.json holds them, and the mean g [C_l] of every matrix.

    Means are over all positions of the validation windows; `constant_r` is the CE where every source, the Deltas' too, has
    one value r: from m = g at r = 0 to the target itself at r = 1.
    """
    began = time.time()
    decomposition, device = run.decomposition, next(run.ci_fn.parameters()).device
    T, L, names = run.config["T"], decomposition.L, decomposition.names
    generator = torch.Generator(device).manual_seed(config.seed)
    sizes = [min(config.batch, config.windows - i) for i in range(0, config.windows, config.batch)]
    bar = tqdm(
        total=len(sizes) * (len(MODES) + sum(PGD_STEPS)), desc="evaluate", unit="pass", mininterval=1, leave=False
    )

    rows = []  # one {quantity: mean over the batch} a batch
    mean_g, l0 = mean_importances(run, corpus, config)
    for i, size in enumerate(sizes):
        tokens = corpus.batch("val", i, size, T, config.seed).to(device)
        x, labels = tokens[:, :-1], tokens[:, 1:]
        target_output, g = run.importances(x)
        row = {"ce:target": next_token_ce(target_output, labels)}
        for mode in MODES:
            m = masks(mode, g, L, generator)
            with torch.no_grad():
                output = decomposition(x, m)
            row[f"ce:{mode}"] = next_token_ce(output, labels)
            row[f"kl:{mode}"] = kl_divergence(target_output, output)
            if mode in ("stochastic", "ci"):
                row[f"hidden_mse:{mode}"] = hidden_mse(decomposition, x, m)
            bar.update()
        for n in PGD_STEPS:
            r = adversarial_sources(run.decomposition, x, target_output, g, n, generator)
            with torch.no_grad():
                row[f"kl:adversarial_{n}"] = reconstruction(decomposition, x, target_output, g, r)
            bar.update(n)
        for r in R_VALUES:
            with torch.no_grad():
                row[f"r:{r}"] = next_token_ce(decomposition(x, mask(g, g.new_full((g.shape[-1] + L,), r))), labels)
        rows.append({name: value.item() for name, value in row.items()})
    bar.close()

    mean = {name: sum(row[name] * size for row, size in zip(rows, sizes)) / config.windows for name in rows[0]}

    def group(kind: str) -> dict[str, float]:
        return {name.partition(":")[2]: value for name, value in mean.items() if name.startswith(kind + ":")}

    ce = group("ce")
    gap = {mode: ce[mode] - ce["target"] for mode in MODES}
    curve = run.checkpoint["target"]["curve"]
    counts = list(decomposition.C.values())
    live = mean_g > ALIVE
    metrics = {
        "ce": ce,
        "kl": group("kl"),
        "ce_unrecovered": {mode: gap[mode] / gap["zero"] for mode in MODES},
        "compute_recovered": {mode: compute_recovered(gap[mode], curve) for mode in MODES},
        "l0": {
            "total": l0.sum().item(),
            "per_matrix": {n: part.sum().item() for n, part in zip(names, l0.split(counts))},
        },
        "live": {
            "total": live.sum().item(),
            "per_matrix": {n: part.sum().item() for n, part in zip(names, live.split(counts))},
            "C": sum(counts),
        },
        "faithfulness": faithfulness(decomposition).item(),
        "hidden_mse": group("hidden_mse"),
        "constant_r": {"r": R_VALUES, "ce": list(group("r").values())},
        "seconds": {
            "target": run.checkpoint["target"]["seconds"],
            "decompose": run.checkpoint["seconds"],
            "eval": time.time() - began,
        },
    }
    return metrics, dict(zip(names, (part.numpy() for part in mean_g.split(counts))))


def read_metrics(folder: str | Path) -> dict:
    """metrics.json of an evaluated run. FileNotFoundError, or ValueError if it is not whole."""
    path = Path(folder) / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: evaluate that run first")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        metrics["constant_r"], metrics["kl"][f"adversarial_{PGD_STEPS[-1]}"]
        return metrics
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole metrics.json of eval.py ({type(error).__name__}: {error})") from error


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
        unrecovered, recovered = metrics["ce_unrecovered"][mode], metrics["compute_recovered"][mode]
        lines.append(
            f"{mode:20s} {metrics['ce'][mode]:8.4f} {metrics['kl'][mode]:9.4f} {unrecovered:15.2%} {recovered:18.1%}"
        )
    for n in PGD_STEPS:
        lines.append(f"{f'adversarial_{n}':20s} {'':8s} {metrics['kl'][f'adversarial_{n}']:9.4f}")
    lines += ["", f"{'':20s} {'C':>8s} {'live':>9s} {'L0':>15s}"]
    for name in C:
        lines.append(
            f"{name:20s} {C[name]:8d} {metrics['live']['per_matrix'][name]:9d} {metrics['l0']['per_matrix'][name]:15.2f}"
        )
    layers = list(dict.fromkeys(map(layer_of, C)))
    for layer in layers if 1 < len(layers) < len(C) else []:
        inside = [name for name in C if layer_of(name) == layer]
        l0, live = (sum(metrics[key]["per_matrix"][name] for name in inside) for key in ("l0", "live"))
        lines.append(f"{layer:20s} {sum(C[name] for name in inside):8d} {live:9d} {l0:15.2f}")
    lines.append(
        f"{'total':20s} {metrics['live']['C']:8d} {metrics['live']['total']:9d} {metrics['l0']['total']:15.2f}"
    )
    lines += [
        "",
        f"faithfulness {metrics['faithfulness']:.2e}   hidden MSE "
        + ", ".join(f"{k} {v:.4f}" for k, v in metrics["hidden_mse"].items()),
    ]
    lines.append("seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in metrics["seconds"].items()))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# E. Figures

COLOURS = {  # of the losses, and of the kinds of matrices
    "adversarial": "#d55e00", "stochastic": "#0072b2", "importance": "#009e73", "frequency": "#e69f00", "faithfulness": "#7f7f7f", "total": "#000000",
    "q": "#0072b2", "k": "#56b4e9", "v": "#009e73", "o": "#e69f00", "up": "#d55e00", "down": "#cc79a7",
}  # fmt: skip


def save_figure(figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    path.parent.mkdir(exist_ok=True)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight", format="png")
    plt.close(figure)


def plot_losses(rows: list[dict], coefficients: dict[str, float], path: Path) -> None:
    """Each loss times its coefficient, as it enters L_VPD, and L0 and p, over the steps of training."""
    from matplotlib import pyplot as plt

    figure, (ax, ax_l0) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    for name, beta in (coefficients | {"total": 1.0}).items():
        if name in rows[0]:
            ax.plot(
                steps,
                [beta * row[name] for row in rows],
                color=COLOURS[name],
                lw=1.2,
                label=name if name == "total" else f"{beta:g} × {name}",
            )
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
    from matplotlib import pyplot as plt

    layers = list(dict.fromkeys(map(layer_of, mean_g)))
    figure, axes = plt.subplots(1, len(layers), figsize=(5 * len(layers) + 1, 4), sharey=True, squeeze=False)
    floor = 1e-9
    for ax, layer in zip(axes[0], layers):
        for name, values in mean_g.items():
            if layer_of(name) != layer:
                continue
            kind, values, n = name.rpartition(".")[2], np.sort(values)[::-1], int((values > ALIVE).sum())
            colour = COLOURS.get(kind)
            (line,) = ax.plot(
                np.arange(1, len(values) + 1),
                np.maximum(values, floor),
                color=colour,
                lw=1.3,
                label=f"{kind}: {n} of {len(values)} live",
            )
            if n:
                ax.plot(n, values[n - 1], "o", color=line.get_color(), ms=5)
        ax.axhline(ALIVE, color="#7f7f7f", lw=0.8, ls=":")
        ax.set(xlabel="subcomponent, sorted", yscale="log", ylim=(floor / 2, 2), title=layer)
        ax.legend(fontsize=8, loc="upper right")
    axes[0, 0].set_ylabel(f"mean causal importance g (dotted: {ALIVE:g})")
    save_figure(figure, path)


def plot_importances(g: np.ndarray, tokens: list[str], path: Path) -> None:
    """Causal importances g [T, C] of one text: subcomponents that pass 0.1 somewhere, in the order of hierarchical clustering."""
    from matplotlib import pyplot as plt
    from scipy.cluster.hierarchy import leaves_list, linkage

    g = g[:, g.max(0) > 0.1].T  # [subcomponents, T]
    if len(g) > 2:
        g = g[leaves_list(linkage(g, "average", metric="cosine"))]
    figure, ax = plt.subplots(figsize=(0.17 * g.shape[1] + 1, 7))
    image = ax.imshow(g, aspect="auto", cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=6, family="monospace")
    ax.set(
        xlabel="position t: its token",
        ylabel="subcomponent, by hierarchical clustering",
        title=f"Causal importances of {len(g)} subcomponents on a validation text",
    )
    figure.colorbar(image, ax=ax, label="g", fraction=0.025, pad=0.01)
    save_figure(figure, path)


def plot_ablations(runs: dict[str, dict], path: Path) -> None:
    """How well g says what can be ablated: KL against the adversary's steps, and CE against one constant source value r.

    runs: {label: metrics.json}; the paper's condition holds where both curves stay near the target's.
    """
    from matplotlib import pyplot as plt

    figure, (ax_kl, ax_r) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for (label, metrics), colour in zip(runs.items(), ("#d55e00", "#0072b2")):
        ax_kl.plot(
            PGD_STEPS,
            [metrics["kl"][f"adversarial_{n}"] for n in PGD_STEPS],
            "o-",
            color=colour,
            label=f"{label}: adversarial r",
        )
        ax_kl.axhline(metrics["kl"]["stochastic"], color=colour, lw=1, ls=":", label=f"{label}: r ~ U(0, 1)")
        ax_r.plot(metrics["constant_r"]["r"], metrics["constant_r"]["ce"], "o-", color=colour, label=label)
    ax_kl.set(
        xscale="log",
        yscale="log",
        xlabel="sign-ascent steps of the adversary",
        ylabel="KL(target ‖ masked), nats a token",
        title="Sources chosen by an adversary",
    )
    ax_kl.set_xticks(PGD_STEPS, map(str, PGD_STEPS))
    ax_kl.set_xticks([], minor=True)
    ax_kl.set_ylim(top=2 * ax_kl.get_ylim()[1])  # room for the legend
    ax_r.axhline(metrics["ce"]["target"], color="#7f7f7f", lw=1, ls="--", label="target")
    ax_r.set(
        xlabel="r, the same for every subcomponent and Delta",
        ylabel="CE, nats a token",
        title="One constant source: m = g + (1 − g) r",
    )
    for ax in (ax_kl, ax_r):
        ax.legend(fontsize=8)
    save_figure(figure, path)


def generations(run: Run, corpus: data.Corpus, seed: int, n_tokens: int = 64, width: int = 44) -> str:
    """Continuations of one validation prompt under several modes, side by side, all with the same random numbers."""
    device, T, L = next(run.ci_fn.parameters()).device, run.config["T"], run.decomposition.L
    prompt = corpus.batch("val", 1, 1, T, seed)[:, : max(1, T // 2)].to(device)
    columns = []
    for mode in ("target", "stochastic", "rounded_0.0", "zero"):
        mask_generator = torch.Generator(device).manual_seed(seed)

        def f(tokens: Tensor) -> Tensor:
            output, g = run.importances(tokens)
            return output if mode == "target" else run.decomposition(tokens, masks(mode, g, L, mask_generator))

        ids = generate(f, prompt, n_tokens, T, torch.Generator(device).manual_seed(seed))[0, prompt.shape[1] :]
        text = corpus.encoding.decode(ids.tolist()).expandtabs(4)
        lines = [line[i : i + width] for line in text.splitlines() for i in range(0, max(1, len(line)), width)]
        columns.append(
            [
                mode,
                "-" * width,
                *("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line) for line in lines),
            ]
        )
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns))
    return (
        "prompt:\n"
        + corpus.encoding.decode(prompt[0].tolist())
        + "\n\n"
        + "\n".join(" | ".join(f"{cell:{width}s}" for cell in row).rstrip() for row in rows)
        + "\n"
    )


def report(run: Run, config: Config) -> dict:
    """Evaluate a run, print the table, write metrics.json, figures/*.png and generations.txt; returns the metrics."""
    corpus = data.load(
        run.config["dataset"], config.data_dir or run.config["data_dir"], run.config.get("max_tokens", 0)
    )
    check_vocabulary(run.folder, run.checkpoint["target"], corpus)
    runs = {}
    if config.against and Path(config.against) != run.folder:
        runs[config.against] = read_metrics(config.against)
    metrics, mean_g = evaluate(run, corpus, config)
    runs = {str(run.folder): metrics} | runs
    with written(run.folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(table(metrics, run.decomposition.C))

    import matplotlib

    matplotlib.use("Agg")
    figures, c = run.folder / "figures", run.config
    betas = {
        "adversarial": c["beta_adv"],
        "stochastic": c["beta_stoch"],
        "importance": c["beta_imp"],
        "frequency": c["beta_freq"],
        "faithfulness": c["beta_delta"],
    }
    plot_losses(read_log(run.folder), betas, figures / "losses.png")
    plot_spectrum(mean_g, figures / "spectrum.png")
    x = corpus.batch("val", 0, 1, c["T"], config.seed)[:, :-1]
    _, g = run.importances(x.to(next(run.ci_fn.parameters()).device))
    tokens = [repr(corpus.encoding.decode([t]).replace(" ", "·"))[1:-1] for t in x[0].tolist()]
    plot_importances(
        g[0].float().cpu().numpy(), [t if len(t) < 12 else t[:11] + "…" for t in tokens], figures / "importances.png"
    )
    plot_ablations(runs, figures / "ablations.png")
    with written(run.folder / "generations.txt") as temporary:
        temporary.write_text(generations(run, corpus, config.seed), encoding="utf-8")
    print(f"written: {run.folder}/metrics.json, {figures}/*.png, {run.folder}/generations.txt")
    return metrics


def main(config: Config) -> None:
    report(load_run(config.run, pick_device(config.device)), config)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
