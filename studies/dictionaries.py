"""Do a run's subcomponents explain more of the MLPs than dictionary latents do, at equal sparsity and equal cost?

    python -m studies.dictionaries out/vpd-stdlib                                  # 6 minutes on 2 CPU cores
    python -m studies.dictionaries out/vpd-stdlib out/more-imp out/spd --full      # hours; goes on where it was stopped

SAEs, per-layer (PLT) and cross-layer transcoders (CLT) learn on the run's own target and text, then stand beside it.
The other runs, of the same target, make VPD a curve: other beta_imp, other seeds, SPD. Learning rates are chosen on
half A of the validation windows; all that is reported is of half B. Writes <run>/dictionaries/: a folder for each
dictionary, results.json, frontier.png, objects.png, and reading.txt with reading_key.json, for a blind reader.

  A. Passes        what a method puts in the place of the MLPs, and how many parameters it needs for that
  B. Protocols     CE under error-propagating, clean-input and single-layer replacement
  C. Faithfulness  Jacobians; the worst choice of what else is switched on
  D. Budgets, training
  E. Table, figures
  F. The run

studies/objects.py compares single objects: splitting, agreement across seeds, intruders, entropies, reading material.

Left out: attention, which only VPD decomposes; labels by a language model; MOLTs.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import cost
import data
import decompose
from eval import Run, open_run, parse_steps, save_figure, subplots
from flags import UserError, require
from losses import mask, sample_sources
from model import GPT, GPTConfig
from run import claim, command, keep_freed_memory, run_script, write_text
from studies.dictionary import (
    KINDS,
    PLT,
    Settings,
    clean_outputs,
    error_propagating,
    flops_a_token,
    load,
    mlps_answered,
    mlps_of,
    save,
    substituted,
    target_pass,
    train,
)
from studies.harvest import random_windows, window_starts
from studies.objects import (
    BAND,
    EXAMPLES,
    SPACES,
    compare,
    dictionary_objects,
    interpretability,
    mlp_columns,
    reading,
    vpd_objects,
)

PROTOCOLS = ("error-propagating", "clean-input", "single-layer")
AXES = ("module", "mlp", "parameters")
THRESHOLDS = (0.0, 0.1, 0.5)  # of VPD's g
NEURONS = (8, 16, 32, 64, 128)  # the k largest neurons of an MLP, as a reference


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...]  # run folders of decompose.py, of one target; the dictionaries are the first one's
    full: bool = False  # also equal FLOPs, end-to-end training, four times the latents, more rates, a second seed
    kinds: str = "sae,plt,clt"  # which dictionaries
    D: int = 512  # latents of each MLP
    k: str = "6,12,30"  # latents that stay at a position; most comparisons are made at the middle one
    lr: str = ""  # rates to choose from on half A; default 3e-2, with --full 1e-2,3e-2,1e-1
    steps: int = 0  # of 2,048 tokens; 0: as many tokens as the first run was trained on
    windows: int = 128  # validation sequences in each half
    tokens: int = 65_536  # of validation text, on which firings are counted
    adv_steps: int = 20  # sign-ascent steps of the adversary
    starts: int = 2  # of the adversary
    seed: int = 0
    data_dir: str = ""  # where token files are kept; default as in the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs=(): name at least one run folder")
        require(self, "above 0", "D", "windows", "tokens", "adv_steps", "starts")
        require(self, "0 or above", "steps", "seed")
        if unknown := set(self.kinds.split(",")) - KINDS.keys():
            raise UserError(f"kinds={self.kinds!r}: {min(unknown)!r} is none of {', '.join(KINDS)}")
        for k in self.ks():
            if k > self.D:
                raise UserError(f"k={self.k!r}: {k} is above the D={self.D} latents")
        self.rates()

    def ks(self) -> list[int]:
        return sorted(set(parse_steps("k", self.k)))

    def middle(self) -> int:
        return self.ks()[len(self.ks()) // 2]

    def rates(self) -> list[float]:
        text = self.lr or ("1e-2,3e-2,1e-1" if self.full else "3e-2")
        try:
            rates = [float(rate) for rate in text.split(",")]
        except ValueError:
            rates = [0.0]
        if not all(0 < rate < 1 for rate in rates):
            raise UserError(f"lr={self.lr!r}: must be numbers between 0 and 1, as in 1e-3,3e-3")
        return sorted(set(rates))


# ---------------------------------------------------------------------------------------------------------------------
# A. Passes: y^_l of clean inputs, the hidden state where all MLPs are replaced, and L0


@dataclass
class Part:
    """Some windows: tokens x [B, T], next tokens y, f(x | W), x_l and y_l of every MLP, g of each run."""

    x: Tensor
    y: Tensor
    hidden: Tensor
    xs: list[Tensor]
    ys: list[Tensor]
    g: dict[str, Tensor]  # {run: [B, T, C]}


@dataclass
class Passes:
    """outputs n x [B, T, d]: y^_l of clean inputs; hidden [B, T, d]: errors propagating; l0: see `size`."""

    outputs: list[Tensor]
    hidden: Tensor
    l0: list[float]


def dictionary_passes(target: GPT, dictionary: PLT, part: Part, batch: bool = False) -> Passes:
    """l0 [n]: latents that stay, of clean inputs. batch: BatchTopK over the part and not the fixed threshold."""
    codes = partial(dictionary.codes, batch=batch)
    outputs, hs = clean_outputs(dictionary, part.ys if dictionary.reads == "y" else part.xs, codes)
    hidden, _ = error_propagating(target, dictionary, part.x, codes)
    return Passes(outputs, hidden, [(h > 0).sum(-1).float().mean().item() for h in hs])


def routing(run: Run, places: list[tuple[int, int]]) -> Tensor:
    """bool [L]: these matrices are masked, the rest keep W."""
    masked = torch.zeros(run.decomposition.L, dtype=torch.bool, device=run.device)
    masked[[l for pair in places for l in pair]] = True
    return masked


def vpd_passes(run: Run, part: Part, m: Tensor) -> Passes:
    """Of masks m [B, T, C + L], of which only the MLPs' count. l0 [2 n]: m > 0 of up and down of each MLP."""
    places, mlps, outputs = mlp_columns(run), mlps_of(run.decomposition.target), []
    for pair, mlp in zip(places, mlps):
        hook = mlp.register_forward_hook(lambda mlp, args, y: outputs.append(y))
        try:  # alone, it reads the target's own stream: this is the masked MLP of its clean input
            run.decomposition(part.x, m, routing(run, [pair]))
        finally:
            hook.remove()
    hidden = run.decomposition(part.x, m, routing(run, places))
    of_matrices = [
        (of > 0).sum(-1).float().mean().item()
        for of in m.split([*run.decomposition.C.values()] + [run.decomposition.L], -1)
    ]
    return Passes(outputs, hidden, [of_matrices[l] for pair in places for l in pair])


def rounded(run: Run, g: Tensor, threshold: float) -> Tensor:
    """m = 1 where g is above the threshold, else 0; no Delta: [B, T, C + L]."""
    return F.pad((g > threshold).to(g), (0, run.decomposition.L))


def neuron_passes(target: GPT, part: Part, k: int) -> Passes:
    """At a position the k neurons of each MLP with the largest |activation| x ||column of down||; the rest are 0."""
    mlps = mlps_of(target)

    def answer(l: int, x: Tensor) -> Tensor:
        h = F.gelu(mlps[l].up(x))
        largest = (h.abs() * mlps[l].down.weight.norm(dim=0)).topk(k, -1).indices
        return mlps[l].down(torch.zeros_like(h).scatter(-1, largest, h.gather(-1, largest)))

    outputs = [answer(l, x) for l, x in enumerate(part.xs)]
    with mlps_answered(target, answer):
        return Passes(outputs, target.hidden(part.x), [float(k)] * len(mlps))


def size(kind: str, l0: list[float], d: int, d_mlp: int) -> dict[str, float]:
    """The three axes. module: L0 of an encoder, or of a matrix, mean; mlp: of what an MLP's output needs, mean over
    MLPs; parameters: that are active at a token, biases left out.

    l0: of each MLP; for vpd of up and down of each in turn. In a CLT n - i outputs need latent i of n, so it counts
    (n - i) / n for each MLP, and has d + (n - i) d parameters. An SAE's MLP is not counted, though it runs.
    """
    n = len(l0) // 2 if kind == "vpd" else len(l0)
    if kind == "vpd":
        return {"module": sum(l0) / len(l0), "mlp": sum(l0) / n, "parameters": sum(l0) * (d + d_mlp)}
    outputs = [n - i if kind == "clt" else 1 for i in range(n)]
    needed = sum(count * m for count, m in zip(l0, outputs))
    return {"module": sum(l0) / n, "mlp": needed / n, "parameters": sum(l0) * d + needed * d}


# ---------------------------------------------------------------------------------------------------------------------
# B. Protocols


def ce_of(run: Run, part: Part, passes: Passes) -> dict[str, float]:
    """CE of the next tokens under each protocol, nats a token; single-layer: the mean over MLPs."""
    target = run.decomposition.target
    hiddens = {"error-propagating": [passes.hidden]}
    hiddens["clean-input"] = [substituted(target, part.x, dict(enumerate(passes.outputs)))]
    hiddens["single-layer"] = [substituted(target, part.x, {l: y}) for l, y in enumerate(passes.outputs)]
    return {name: float(np.mean([run.ce(h, part.y).item() for h in of])) for name, of in hiddens.items()}


@torch.no_grad()
def measure(run: Run, parts: list[Part], kind: str, passes_of: Callable[[Part], Passes]) -> dict:
    """CE - CE of the target under each protocol, MSE of y^_l over the mean square of y_l, L0, and the three axes."""
    n, found, c = sum(len(part.x) for part in parts), [], run.decomposition.target.config
    for part in parts:
        passes, target_ce = passes_of(part), run.ce(part.hidden, part.y).item()
        delta = {name: ce - target_ce for name, ce in ce_of(run, part, passes).items()}
        off = sum(F.mse_loss(output, y).item() for output, y in zip(passes.outputs, part.ys))
        unexplained = off / sum(y.square().mean().item() for y in part.ys)
        found.append((len(part.x) / n, np.array([*delta.values(), unexplained, *passes.l0])))
    *delta, unexplained = (mean := sum(weight * values for weight, values in found))[:4].tolist()
    l0 = mean[4:].tolist()
    return {"delta_ce": dict(zip(PROTOCOLS, delta)), "unexplained": unexplained, "l0": l0} | size(
        kind, l0, c.d_model, c.d_mlp
    )


# ---------------------------------------------------------------------------------------------------------------------
# C. Faithfulness


def gelu_slope(z: Tensor) -> Tensor:
    """d GELU(z) / d z = Phi(z) + z phi(z)."""
    return 0.5 * (1 + torch.erf(z / 2**0.5)) + z * torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5


def mlp_jacobians(up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    """dy/dx [N, d, d] of down(GELU(up(x))) at x [N, d]; up [d_mlp, d], down [d, d_mlp], or [N, ...] of both."""
    z = (up @ x[:, :, None])[..., 0]  # [N, d_mlp]
    return (down * gelu_slope(z)[:, None, :]) @ up


def masked_weights(run: Run, l: int, m: Tensor) -> Tensor:
    """W'(m) of matrix l at each position, [N, d_out, d_in], of masks m [N, C + L]."""
    decomposition, name = run.decomposition, run.decomposition.names[l]
    of_l = m.split([*decomposition.C.values(), decomposition.L], -1)[l]
    U, V, Delta = decomposition.U[name], decomposition.V[name], decomposition.Delta(name)
    return (U * of_l[:, None, :]) @ V.T + m[:, -decomposition.L + l, None, None] * Delta


def vpd_jacobians(run: Run, m: Tensor, xs: list[Tensor]) -> list[Tensor]:
    """Of every masked MLP at x_l [N, d], under masks m [N, C + L], which are held fixed."""
    pairs = mlp_columns(run)
    return [
        mlp_jacobians(masked_weights(run, up, m), masked_weights(run, down, m), x) for (up, down), x in zip(pairs, xs)
    ]


def dictionary_jacobians(dictionary: PLT, xs: list[Tensor], ys: list[Tensor], true: list[Tensor]) -> list[Tensor]:
    """dy^_l/dx_l [N, d, d], which latents stay held fixed; of a CLT what layer l itself gives to it."""
    found = []
    for l, x in enumerate(ys if dictionary.reads == "y" else xs):
        on = (dictionary.codes(l, x) > 0).to(x)  # [N, D]
        J = (dictionary.own_decoder(l).T * on[:, None, :]) @ dictionary.W_enc[l].T
        found.append(J @ true[l] if dictionary.reads == "y" else J)
    return found


def mean_cosine(A: list[Tensor], B: list[Tensor]) -> float:
    """Of Jacobians, n x [N, d, d] each: cosine of all their entries, mean over positions and MLPs; 0 for a zero one."""
    return torch.stack([F.cosine_similarity(a.flatten(1), b.flatten(1)).mean() for a, b in zip(A, B)]).mean().item()


@torch.no_grad()
def jacobian_cosines(
    run: Run, parts: list[Part], runs: dict[str, Run], dictionaries: dict[str, PLT], n: int, seed: int
) -> dict[str, float]:
    """Cosine of the replaced MLPs' Jacobians with the true ones, at n random positions of the parts."""
    at = torch.from_numpy(np.random.default_rng(seed).permutation(sum(part.x.numel() for part in parts))[:n])
    pick = lambda of: torch.cat([of(part).flatten(0, 1).cpu() for part in parts])[at].to(run.device)
    mlps = mlps_of(run.decomposition.target)
    xs, ys = ([pick(lambda part: getattr(part, name)[l]) for l in range(len(mlps))] for name in ("xs", "ys"))
    true = [mlp_jacobians(mlp.up.weight, mlp.down.weight, x) for mlp, x in zip(mlps, xs)]
    generator = torch.Generator(run.device).manual_seed(seed)
    found = {}
    for name, other in runs.items():
        g = pick(lambda part: part.g[name])
        random = sample_sources((*g.shape[:-1], g.shape[-1] + other.decomposition.L), generator)
        for what, m in (("g > 0", rounded(other, g, 0.0)), ("r ~ U(0, 1)", mask(g, random))):
            found[f"{name}, {what}"] = mean_cosine(vpd_jacobians(other, m, xs), true)
    for name, dictionary in dictionaries.items():
        found[name] = mean_cosine(dictionary_jacobians(dictionary, xs, ys, true), true)
    return found


def ascend(
    kls: list[Callable[[Tensor], Tensor]],
    n: int,
    steps: int,
    starts: int,
    generator: torch.Generator,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Sources r [n] that all windows share, in sign-ascent steps of 2 / steps from U(0, 1), as in eval.py.

    kls: of each part in turn, r to its share of the mean KL. start, kl: before and after, mean over starts; largest:
    the largest met on the way of any start.
    """
    met = []
    for _ in range(starts):
        r, of_start = sample_sources((n,), generator), []
        for step in range(steps + 1):
            r, grad, value = r.requires_grad_(), torch.zeros_like(r), 0.0
            for kl in kls:
                loss = kl(r)
                value += loss.item()
                if step < steps:
                    grad += torch.autograd.grad(loss, r)[0]
            of_start.append(value)
            r = (r.detach() + 2 / steps * grad.sign()).clamp(0, 1)
            tick()
        met.append(of_start)
    met = np.array(met)
    return {"start": met[:, 0].mean(), "kl": met[:, -1].mean(), "largest": met.max()}


def kl_with_unselected(run: Run, dictionary: PLT, part: Part, share: float, r: Tensor) -> Tensor:
    """share x KL(target || replaced) where r [n D] of each activation is added back wherever it was not chosen.

    h + r (relu(z) - h), errors propagating: the closest that a dictionary has to m = g + (1 - g) r, and not the same
    claim, as the target is no value of r.
    """
    of_layers = r.view(dictionary.n, -1)

    def codes(l: int, x: Tensor) -> Tensor:
        z = dictionary.encode(l, x)
        h = F.threshold(z, dictionary.threshold[l].item(), 0.0)
        return h + of_layers[l] * (F.relu(z) - h)

    return share * run.kl(part.hidden, error_propagating(run.decomposition.target, dictionary, part.x, codes)[0])


def kl_with_masks(run: Run, g: Tensor, part: Part, share: float, r: Tensor) -> Tensor:
    """share x KL(target || masked) with m = g + (1 - g) r in the MLPs, attention as it is; r [C + L]."""
    m = mask(g, r)
    return share * run.kl(part.hidden, run.decomposition(part.x, m, routing(run, mlp_columns(run)), frozen=True))


# ---------------------------------------------------------------------------------------------------------------------
# D. Budgets, training

SEQUENCES = 32  # a step: 2,048 tokens at T = 64
BUDGETS = ("equal tokens", "equal FLOPs")


def cost_of(run: Run) -> dict[str, float]:
    """What the run's training took: tokens, and FLOPs of matrix products and attention, counted on one step."""
    config = settings_of(run)
    gpt, cpu = GPTConfig(**run.checkpoint["target"]["gpt"]), torch.device("cpu")
    step = cost.counted(lambda: decompose.trial(config, gpt, cpu)[:1])[0]
    steps = run.checkpoint["step"]
    return {"tokens": steps * config.B * config.T, "flops": float(steps * step.flops)}


def score(run: Run, dictionary: PLT, parts: list[Part]) -> float:
    """What it learnt to minimise, on these parts: MSE of y^_l; else CE in its own mode."""
    found = measure(
        run, parts, dictionary.settings.kind, lambda part: dictionary_passes(run.decomposition.target, dictionary, part)
    )
    mode = dictionary.settings.mode
    return found["unexplained"] if mode == "local" else found["delta_ce"][mode]


class Library:
    """The dictionaries in a folder. What is there is not trained again; what is asked for together, learns together."""

    def __init__(self, folder: Path, run: Run, corpus: data.Corpus) -> None:
        self.folder, self.run, self.corpus = folder, run, corpus
        self.target, self.trained = run.decomposition.target, 0

    def get(self, wanted: list[Settings]) -> list[PLT]:
        missing = [s for s in wanted if not (self.folder / s.name / "settings.json").exists()]
        for steps in sorted({s.steps for s in missing}):
            for seed in sorted({s.seed for s in missing}):
                group = [s for s in missing if (s.steps, s.seed) == (steps, seed)]
                if group:
                    self.learn(group)
        return [load(self.folder / s.name).to(self.run.device) for s in wanted]

    def learn(self, group: list[Settings]) -> None:
        s = group[0]
        batch = lambda step: self.corpus.batch("train", step, s.B, s.T, s.seed)[:, :-1].to(self.run.device)
        name = f"{s.kind} {s.mode} D {s.D} x {len(group)}"
        for dictionary in train(group, self.target, batch, name):
            save(dictionary, self.folder / dictionary.settings.name)
            self.trained += 1


def tuned(library: Library, config: Config, first: Settings, parts: list[Part]) -> tuple[Settings, dict[str, float]]:
    """The settings with the rate that does best on half A, and the score of each rate."""
    wanted = [replace(first, lr=lr) for lr in config.rates()]
    if len(wanted) == 1:
        return wanted[0], {}
    scores = [score(library.run, dictionary, parts) for dictionary in library.get(wanted)]
    return wanted[int(np.argmin(scores))], {f"{s.lr:g}": value for s, value in zip(wanted, scores)}


def trained(library: Library, config: Config, spent: dict[str, float], half_A: list[Part]) -> tuple[list[dict], dict]:
    """Every dictionary of this tier, [{label, budget, dictionary}], and the scores by which rates were chosen.

    The first tier learns locally, for equal tokens. --full adds end-to-end modes, equal FLOPs, D x 4 and another seed.
    """
    T, target, found, scores = library.run.config["T"], library.target, [], {}
    steps = config.steps or max(1, round(spent["tokens"] / (SEQUENCES * T)))
    modes = [(kind, "local") for kind in KINDS]
    if config.full:
        modes += [(kind, mode) for mode in ("error-propagating", "clean-input") for kind in ("plt", "clt")]
        modes.append(("plt", "single-layer"))
    modes = [(kind, mode) for kind, mode in modes if kind in config.kinds.split(",")]
    bests = []
    for kind, mode in modes:
        first = Settings(kind, config.D, config.middle(), mode, 1e-3, steps, SEQUENCES, T, config.seed)
        best, scores[f"{kind} {mode}"] = tuned(library, config, first, half_A)
        bests.append(best)
        same = [replace(best, k=k) for k in config.ks()]
        found += [{"label": f"{kind} {mode}", "budget": "equal tokens", "of": d} for d in library.get(same)]
    for best in bests if config.full else ():
        if best.mode == "local":
            wider, other = replace(best, D=4 * best.D), replace(best, seed=best.seed + 1)
            for s, label in ((other, f"seed {other.seed}"), (wider, f"D {wider.D}")):
                (dictionary,) = library.get([s])
                found.append({"label": f"{s.kind} {s.mode}, {label}", "budget": "equal tokens", "of": dictionary})
    for best in sorted(bests, key=lambda s: (s.kind != "plt", s.mode != "local")) if config.full else ():
        longer = max(1, round(spent["flops"] / (flops_a_token(best, target) * SEQUENCES * T)))
        for k in sorted(config.ks(), key=lambda k: k != config.middle()):
            (dictionary,) = library.get([replace(best, k=k, steps=longer)])
            found.append({"label": f"{best.kind} {best.mode}", "budget": "equal FLOPs", "of": dictionary})
    return found, scores


# ---------------------------------------------------------------------------------------------------------------------
# E. Table and figures


def table(found: dict) -> str:
    """results.json for a person: CE - CE of the target, nats a token; L0; the rest by method."""
    head = f"{'':34s} {'budget':>12s} {'L0 module':>9s} {'per MLP':>8s} {'parameters':>10s}"
    lines = [head + "".join(f" {name:>17s}" for name in PROTOCOLS) + f" {'batch top-k':>12s}"]
    for row in found["curve"]:
        sizes = f"{row['module']:9.2f} {row['mlp']:8.2f} {row['parameters']:10.0f}"
        delta = "".join(f" {row['delta_ce'][name]:17.4f}" for name in PROTOCOLS)
        batch = f" {row['batch']['error-propagating']:12.4f}" if "batch" in row else ""
        lines.append(f"{row['name']:34s} {row['budget']:>12s} {sizes}{delta}{batch}")
    lines += ["", "cosine of the replaced MLPs' Jacobians with the true ones"]
    lines += [f"  {name:50s} {value:8.3f}" for name, value in found["jacobian"].items()]
    lines += [
        "",
        "KL under what an adversary switches on, one choice for all windows: random, after its steps, largest met",
    ]
    for name, row in found["adversary"].items():
        lines.append(f"  {name:50s} {row['start']:8.3f} {row['kl']:8.3f} {row['largest']:8.3f}")
    lines += [
        "",
        "objects with more than one match above 0.5, %, and MMCS; in brackets for random directions; live per module",
    ]
    for row in found["objects"]:
        what = f"{row['of']} in {'itself' if row['of'] == row['in'] else row['in']}"
        parts = []
        for space in SPACES:
            v = row[space]
            parts.append(f"{space} {100 * v['split']:.1f} ({100 * v['split_null']:.1f})")
            if row["of"] != row["in"]:
                parts[-1] += f", {v['mmcs_equal']:.3f} ({v['mmcs_equal_null']:.3f})"
        lines.append(f"  {what:60s} {'; '.join(parts)}; live {row['live'][0]:.0f}, {row['live'][1]:.0f}")
    band, chance = f"{BAND[0]:.1%} to {BAND[1]:.0%} of positions", f"chance {1 / (EXAMPLES + 1):.0%}"
    lines += ["", f"objects that fire at {band}: intruders found, {chance}; entropies of token and next token"]
    for name, row in found["interpretability"].items():
        bits = f"{row['entropy']:5.2f} {row['entropy_next']:5.2f} bits"
        lines.append(
            f"  {name:50s} {row['intruder']:6.1%} {bits} {row['objects']:5d} objects, density {row['density']:.2%}"
        )
    return "\n".join(lines)


COLOURS = {
    "sae": "#009e73",
    "plt": "#d55e00",
    "clt": "#e69f00",
    "vpd": "#000000",
    "spd": "#7f7f7f",
    "neurons": "#56b4e9",
}
STYLES = {"local": "-", "error-propagating": "--", "clean-input": ":", "single-layer": "-."}
STYLES_OF_G = {0.0: "-", 0.1: "--", 0.5: ":"}  # of VPD's lines
AXIS_NAMES = {"module": "L0 a module", "mlp": "L0 an MLP", "parameters": "active parameters a token"}


def plot_frontier(rows: list[dict], path: Path) -> None:
    """CE - CE of the target against the three axes, a row of panels a protocol, a line a method and budget."""
    from matplotlib.ticker import LogLocator

    figure, axes = subplots(3, 3, (15, 12), sharey="row")
    lines = list(dict.fromkeys(row["line"] for row in rows))
    for protocol, of_protocol in zip(PROTOCOLS, axes):
        for axis, ax in zip(AXES, of_protocol):
            for line in lines:
                drawn = sorted((row for row in rows if row["line"] == line), key=lambda row: row[axis])
                kind, thick = drawn[0]["kind"], drawn[0]["budget"] == "equal FLOPs"
                x, y = [row[axis] for row in drawn], [row["delta_ce"][protocol] for row in drawn]
                style = drawn[0].get("style") or STYLES.get(drawn[0].get("mode"), "-")
                ax.plot(x, y, f"o{style}", color=COLOURS[kind], ms=4 + 2 * thick, lw=1.2 + thick, label=line)
            ax.set(xscale="log", xlabel=AXIS_NAMES[axis], title=protocol)
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:,.0f}")
            ax.xaxis.set_minor_formatter("")
            if all(value > 0 for drawn in ax.lines for value in drawn.get_ydata()):
                ax.set_yscale("log")
            ax.grid(color="#eeeeee", lw=0.6)
        of_protocol[0].set_ylabel("CE − CE of the target, nats a token")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)


def plot_objects(found: dict, path: Path) -> None:
    """Jacobians, adversary, splitting, agreement across seeds, intruders, entropies; grey: null, chance or start."""
    figure, axes = subplots(2, 3, (17, 9))

    def bars(ax, rows: dict[str, tuple[float, float | None]], title: str, log: bool = False) -> None:
        names = list(rows)[::-1]
        ax.barh(names, [rows[name][0] for name in names], color="#0072b2", height=0.6)
        grey = [(i, rows[name][1]) for i, name in enumerate(names) if rows[name][1] is not None]
        ax.plot([value for _, value in grey], [i for i, _ in grey], "|", color="#d55e00", ms=14, mew=2)
        ax.set_title(title, fontsize=10)
        ax.tick_params(axis="y", labelsize=7)
        if log and all(value > 0 for row in rows.values() for value in row):
            ax.set_xscale("log")

    own, pairs = [[row for row in found["objects"] if (row["of"] == row["in"]) == same] for same in (True, False)]
    read = found["interpretability"]
    bars(
        axes[0, 0],
        {name: (value, None) for name, value in found["jacobian"].items()},
        "cosine of Jacobians with the MLPs'",
    )
    worst = {name: (row["largest"], row["start"]) for name, row in found["adversary"].items()}
    bars(axes[0, 1], worst, "KL, worst met by the adversary; mark: random r", log=True)
    split = {
        f"{row['of']}: {space}": (row[space]["split"], row[space]["split_null"]) for row in own for space in SPACES
    }
    bars(axes[0, 2], split, "share with more than one match in itself; mark: random")
    seeds = {
        f"{row['of']} in {row['in']}: {s}": (row[s]["mmcs_equal"], row[s]["mmcs_equal_null"])
        for row in pairs
        for s in SPACES
    }
    bars(axes[1, 0], seeds or {"no second seed": (0.0, None)}, "MMCS; mark: random directions")
    bars(
        axes[1, 1],
        {name: (row["intruder"], 1 / (EXAMPLES + 1)) for name, row in read.items()},
        "intruders found; mark: chance",
    )
    bars(
        axes[1, 2],
        {name: (row["entropy"], row["entropy_next"]) for name, row in read.items()},
        "entropy of the token, bits; mark: of the next",
    )
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# F. The run


def halves(corpus: data.Corpus, n: int, T: int, seed: int) -> tuple[Tensor, Tensor]:
    """Half A and half B: n validation windows [n, T + 1] each, which do not overlap but for a last next token.

    UserError if the text has too few.
    """
    tokens = corpus.tokens["val"]
    starts = window_starts(corpus, T, len(tokens), seed)
    starts = starts[starts + T < len(tokens)]
    if len(starts) < 2 * n:
        raise UserError(
            f"windows={n}: the validation text has {len(starts)} windows of {T} tokens, two halves need {2 * n}"
        )
    windows = torch.from_numpy(tokens[starts[: 2 * n, None] + np.arange(T + 1)].astype(np.int64))
    return windows[:n], windows[n:]


def parts_of(run: Run, runs: dict[str, Run], windows: Tensor) -> list[Part]:
    """What every comparison needs of these windows, SEQUENCES at a time."""
    parts = []
    for part in windows.to(run.device).split(SEQUENCES):
        x = part[:, :-1]
        hidden, xs, ys = target_pass(run.decomposition.target, x)
        parts.append(
            Part(x, part[:, 1:], hidden, xs, ys, {name: other.importances(x)[1] for name, other in runs.items()})
        )
    return parts


def open_runs(config: Config) -> tuple[dict[str, Run], data.Corpus]:
    """The runs by the names of their folders. UserError if one has another target or text than the first."""
    runs, texts = {}, []
    for folder in dict.fromkeys(Path(folder) for folder in config.runs):
        run, corpus = open_run(folder, config.data_dir, config.device, ours=True)
        mlp_columns(run)  # refuses what cannot be compared
        runs[folder.name if folder.name not in runs else str(folder)] = run
        texts.append(corpus)
        first = next(iter(runs.values()))
        ours, theirs = (of.decomposition.target.state_dict() for of in (first, run))
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        if not same or corpus.digest != texts[0].digest:
            raise UserError(f"{folder} is a run of another {'text' if same else 'target'} than {first.folder}")
    return runs, texts[0]


def is_spd(run: Run) -> bool:
    """Whether the run was trained as SPD: no adversary, no frequency term."""
    return not run.config["beta_adv"] and not run.config["beta_freq"]


def settings_of(run: Run) -> decompose.Config:
    """The settings that the run was trained with; one that is younger than the run has its default."""
    names = {field.name for field in fields(decompose.Config)}
    return decompose.Config(**{name: value for name, value in run.config.items() if name in names})


def recipe(run: Run, *but: str) -> dict:
    """What the run was trained with, but for these settings and those that change no number."""
    config = asdict(settings_of(run))
    names = {field.name for field in fields(decompose.Method)} - {"device", *but}
    return {name: value for name, value in config.items() if name in names} | {"C": config["C"]}


def check_target(home: Path, run: Run) -> None:
    """UserError if the dictionaries there were trained on other MLPs or text; else it notes whose they are."""
    target = sum(w.double().abs().sum().item() for w in run.decomposition.target.state_dict().values())
    mark, path = {"target": f"{target:.12g}", "tokens": run.checkpoint["tokens"]}, home / "target.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != mark:
        raise UserError(f"{home} holds dictionaries of another target or text: move it away")
    write_text(path, json.dumps(mark) + "\n")


def all_of(
    run: Run, runs: dict[str, Run], corpus: data.Corpus, config: Config, found: list[dict], half_B: list[Part]
) -> tuple[dict, str, list[dict]]:
    """results.json without its head, the reading material and its key."""
    target, rows = run.decomposition.target, []
    T, middle = run.config["T"], config.middle()
    chosen = [f for f in found if f["of"].settings.k == middle]
    plain = [f for f in chosen if f["of"].settings.D == config.D and f["of"].settings.seed == config.seed]
    name_of = lambda f: f"{f['label']}, k {f['of'].settings.k}" + (", equal FLOPs" if f["budget"] == BUDGETS[1] else "")
    labels = {name: f"{'SPD' if is_spd(other) else 'VPD'} {name}" for name, other in runs.items()}
    work = len(found) + len(runs) * len(THRESHOLDS) + len(NEURONS) + len(plain) * 2 + len(chosen) + 2 * len(runs)
    bar = tqdm(total=work, desc="compare", mininterval=1, leave=False)

    for name, other in runs.items():
        kind, varied = "spd" if is_spd(other) else "vpd", ("beta_imp", "beta_freq")
        same = kind == "vpd" and recipe(other, *varied) == recipe(run, *varied)
        for threshold in THRESHOLDS:
            of = measure(
                run, half_B, "vpd", lambda part: vpd_passes(other, part, rounded(other, part.g[name], threshold))
            )
            line = f"{'VPD, beta_imp varied' if same else labels[name]}, g > {threshold:g}"
            row = {"name": f"{labels[name]}, g > {threshold:g}", "kind": kind, "budget": "-", "line": line}
            rows.append(row | {"style": STYLES_OF_G[threshold]} | of)
            bar.update()
    for k in NEURONS:
        if k <= target.config.d_mlp:
            of = measure(run, half_B, "neurons", lambda part: neuron_passes(target, part, k))
            rows.append(
                {"name": f"neurons, {k} largest", "kind": "neurons", "line": "largest neurons", "budget": "-"} | of
            )
        bar.update()
    for f in found:
        s = f["of"].settings
        passes = lambda part, batch=False: dictionary_passes(target, f["of"], part, batch)
        of = measure(run, half_B, s.kind, passes)
        of["batch"] = measure(run, half_B, s.kind, partial(passes, batch=True))["delta_ce"]
        row = {"name": f"{f['label']}, k {s.k}", "kind": s.kind, "mode": s.mode, "budget": f["budget"], "k": s.k}
        rows.append(row | {"line": f"{f['label']}, {f['budget']}", "settings": asdict(s)} | of)
        bar.update()

    by_name = {name_of(f): f["of"] for f in plain}
    jacobian = jacobian_cosines(run, half_B, runs, by_name, 256, config.seed)
    jacobian = {
        next((name.replace(n, labels[n], 1) for n in runs if name.startswith(f"{n}, ")), name): v
        for name, v in jacobian.items()
    }
    attacked, adversary = half_B[: max(1, 64 // SEQUENCES)], {}
    n = sum(len(part.x) for part in attacked)
    generator = torch.Generator(run.device)
    for name, other in runs.items():
        kls = [partial(kl_with_masks, other, part.g[name], part, len(part.x) / n) for part in attacked]
        sources = sum(other.decomposition.C.values()) + other.decomposition.L
        adversary[labels[name]] = ascend(
            kls, sources, config.adv_steps, config.starts, generator.manual_seed(config.seed)
        )
        bar.update()
    for name, dictionary in by_name.items():
        kls = [partial(kl_with_unselected, run, dictionary, part, len(part.x) / n) for part in attacked]
        sources = dictionary.n * dictionary.settings.D
        adversary[name] = ascend(kls, sources, config.adv_steps, config.starts, generator.manual_seed(config.seed))
        bar.update()

    windows = random_windows(corpus, T, config.tokens, config.seed).to(run.device)
    objects = {}
    for name, other in runs.items():
        objects[labels[name]] = vpd_objects(other, windows)
        bar.update()
    for f in chosen:
        objects[name_of(f)] = dictionary_objects(run, f["of"], windows)
        bar.update()
    live = {name: [len(of[0]) for of in o.vectors["rank-one"]] for name, o in objects.items()}
    equal = max(1, min(min(counts) for counts in live.values()))
    pairs = [(name, name) for name in objects]
    pairs += [
        (labels[a], labels[b])
        for a in runs
        for b in runs
        if a != b and recipe(runs[a], "seed") == recipe(runs[b], "seed")
    ]
    for a in chosen:
        for b in chosen:
            s, o = (asdict(f["of"].settings) for f in (a, b))
            differ = {name for name in s if s[name] != o[name]}
            if differ == {"seed"} or (differ == {"D"} and s["D"] < o["D"]):
                pairs.append((name_of(a), name_of(b)))
    rng = torch.Generator().manual_seed(config.seed)
    matches = [
        {"of": a, "in": b, "live": [float(np.mean(live[a])), float(np.mean(live[b]))]}
        | compare(objects[a], objects[b], equal, rng)
        for a, b in pairs
    ]
    read = {name: interpretability(o, windows, config.seed) for name, o in objects.items()}
    bar.update()
    bar.close()
    shown = {name: objects[name] for name in [labels[name] for name in runs if other_kind(runs, name)] + list(by_name)}
    text, key = reading(shown, windows, corpus, config.seed)
    results = {
        "curve": rows,
        "jacobian": jacobian,
        "adversary": adversary,
        "equal": equal,
        "objects": matches,
        "interpretability": read,
    }
    return results, text, key


def other_kind(runs: dict[str, Run], name: str) -> bool:
    """Whether it is the first run, or the first SPD one: those that a reader gets to see."""
    return name == next(iter(runs)) or name == next((n for n in runs if is_spd(runs[n])), "")


def main(config: Config) -> None:
    began = time.time()
    keep_freed_memory()
    runs, corpus = open_runs(config)
    run = next(iter(runs.values()))
    run.decomposition.target.requires_grad_(False)
    home, T = run.folder / "dictionaries", run.config["T"]
    windows_A, windows_B = halves(corpus, config.windows, T, config.seed)
    claim(home)
    check_target(home, run)
    spent = cost_of(run)
    library = Library(home, run, corpus)
    found, scores = trained(library, config, spent, parts_of(run, {}, windows_A))
    half_B = parts_of(run, runs, windows_B)
    results, text, key = all_of(run, runs, corpus, config, found, half_B)
    for f in found:
        s = f["of"].settings
        spent[f"flops, {s.kind} {s.mode} D {s.D}, {s.steps} steps"] = (
            flops_a_token(s, run.decomposition.target) * s.steps * s.B * s.T
        )
    ce = sum(run.ce(part.hidden, part.y).item() * len(part.x) for part in half_B) / config.windows
    head = {"run_mark": run.mark, "runs": {name: other.mark for name, other in runs.items()}, "command": command()}
    head |= {"settings": asdict(config), "cost": spent, "rates": scores, "ce_target": ce, "trained": library.trained}
    results = head | results | {"seconds": time.time() - began}
    write_text(home / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(home / "reading.txt", text)
    write_text(home / "reading_key.json", json.dumps(key, indent=2) + "\n")
    plot_frontier(results["curve"], home / "frontier.png")
    plot_objects(results, home / "objects.png")
    print(table(results))
    print(f"\n{results['seconds']:.0f} s, {library.trained} dictionaries trained; written: {home}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
