"""A frontier, not a point: recipes side by side, each at three weights of sparsity, several seeds, in the same minutes.

    python -m bench.frontier --minutes=8 --recipe='paper=--recipe=paper' --recipe='wide=--B=8' --flags='--data_dir=data'

A recipe is a name and flags of decompose.py. Each runs at `factors` times its own beta_imp, with each seed, as an
ordinary run folder below --out; what is finished there is not run again, and Ctrl-C loses at most the steps since the
last save. With --minutes the first run of a recipe finds the steps that fit, and its others take as many. A run is
judged on windows that no rate was chosen on, and on a second set, which says how much a set matters.

Prints the noise first, then every point, then each recipe at equal L0: KL interpolated between its points, both on log
scales, of each seed by itself. Writes <out>/frontier.json and frontier.png. A recipe takes 9 times the minutes.
"""

import json
import math
import shlex
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import checkpoints
import cost
import data
import decompose
import eval as evaluation
import flags
import run
from flags import UserError, require

KLS = ("rounded", "stochastic", "adversarial")
L0S = {"l0": "L0: subcomponents with g > 0 a position", "l0_above_0.1": "L0: subcomponents with g > 0.1 a position"}
ADV_STEPS = 20  # of the judging adversary, as published
OURS = ("out", "resume", "seed")  # settings that a recipe may not have
# Settings that make no other decomposition
FREE = {"out", "resume", "minutes", "data_dir", "device", "compile", "graph", "memory_budget", "log_every"}
FREE |= {"save_every", "eval_every", "eval_windows", "report_tokens", "wandb"}


@dataclass(frozen=True)
class Config:
    recipe: tuple[str, ...] = ()  # 'NAME=flags of decompose.py', may be given several times; none: the default alone
    flags: str = ""  # of decompose.py, for all recipes
    minutes: float = 0.0  # of each decomposition; 0: the steps of the recipe
    factors: str = "0.7,1,1.4"  # on the recipe's beta_imp
    seeds: str = "0,1,2"
    at_l0: float = 33.8  # where recipes are compared
    windows: int = 64  # validation sequences of each of the two sets
    window_seed: int = 1  # of the first set, and one more of the second; rates were chosen on 0
    out: str = "out/frontier"  # folder of the runs and of frontier.json and frontier.png
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        require(self, "above 0", "windows", "at_l0")
        require(self, "0 or above", "window_seed", "minutes")
        numbers(self, "factors", float, 0.0)
        numbers(self, "seeds", int, -1)


def numbers(config: Config, name: str, kind: type, above: float) -> list:
    """'0.7,1,1.4' to [0.7, 1.0, 1.4]. UserError for anything else, and for one that is there twice."""
    try:
        values = [kind(part) for part in getattr(config, name).split(",")]
    except ValueError:
        values = []
    if not values or not all(above < value < 2**63 for value in values) or len(set(values)) < len(values):
        example = "0.7,1,1.4" if kind is float else "0,1,2"
        raise UserError(f"{name}={getattr(config, name)!r}: must be different numbers, as in {example}")
    return values


# ---------------------------------------------------------------------------------------------------------------------
# A. Runs


def recipes(config: Config) -> dict[str, decompose.Config]:
    """The settings of each recipe, by its name. UserError for a flag that decompose.py does not know, or of OURS."""
    found = {}
    for text in config.recipe or ("default=",):
        name, equals, own = text.partition("=")
        if not equals or not name or not all(c.isalnum() or c in "-_." for c in name) or name in found:
            raise UserError(
                f"recipe={text!r}: must be NAME=flags, each name once, of letters, digits, '-', '_' and '.'"
            )
        try:
            args = shlex.split(f"{config.flags} {own}")
            settings = flags.read_flags(decompose.Config, None, args)
        except ValueError as error:
            raise UserError(f"recipe={text!r}: {error}") from error
        for flag in OURS:
            if any(arg.partition("=")[0] == f"--{flag}" for arg in args):
                raise UserError(f"recipe={text!r}: --{flag} is not a recipe's to say")
        if settings.beta_imp == 0:
            raise UserError(f"recipe={text!r}: beta_imp=0: there is nothing to vary")
        minutes = config.minutes or settings.minutes
        found[name] = replace(settings, minutes=minutes, report_tokens=0, device=config.device)
    return found


def saved_settings(folder: Path) -> dict | None:
    """Of a decomposition that saved something there: its settings, and the `step` it is at."""
    if not (folder / "checkpoint.pt").exists():
        return None
    checkpoint = checkpoints.load_checkpoint(folder / "checkpoint.pt", "decomposition")
    return dict(checkpoint["config"]) | {"step": checkpoint["step"]}


def check_same(folder: Path, settings: decompose.Config) -> None:
    """UserError if a run of other settings lies there. Its steps may be any where they follow from minutes."""
    for name, value in (saved_settings(folder) or {}).items():
        wanted = getattr(settings, name, value)
        differs = name not in FREE and wanted != value and not (name == "steps" and settings.minutes)
        if differs or name == "minutes" and settings.minutes and value not in (0, wanted):
            raise UserError(
                f"{folder} is a run of {name}={value}, not {wanted}: give the recipe another name, or --out"
            )


def finish(folder: Path, settings: decompose.Config) -> None:
    """Run it, or go on with it; what is finished is left as it is."""
    saved = saved_settings(folder)
    if saved and saved["step"] >= saved["steps"]:
        return
    if saved or (folder / "config.json").exists():
        resumed = decompose.Config(resume=str(folder)).defaults()
        decompose.train(replace(resumed, data_dir=settings.data_dir, device=settings.device))
        return
    if settings.minutes:  # another run of the recipe may have found the steps already, which are those of all
        others = [saved_settings(path) for path in sorted(folder.parent.glob("x*-seed*"))]
        steps = [of["steps"] for of in others if of and of["minutes"] == settings.minutes]
        if steps:
            device = run.pick_device(settings.device)
            compiled = run.wants_compile(settings.compile, device, settings.steps, settings.minutes)
            settings = replace(settings, minutes=0.0, steps=steps[0], compile=compiled)
    decompose.train(replace(settings, out=str(folder)))


# ---------------------------------------------------------------------------------------------------------------------
# B. Numbers


def judged(opened: evaluation.Run, corpus: data.Corpus, windows: int, seed: int) -> dict:
    """L0 by both thresholds, KL in nats a token: rounded (g > 0), random masks, and the adversary of each start."""
    decomposition, generator = opened.decomposition, torch.Generator(opened.device).manual_seed(seed)
    x = evaluation.validation_windows(corpus, windows, opened.config["T"], seed)
    batches, _ = evaluation.of_windows(opened, x)
    found = {name: evaluation.l0_above(at, [g for _, _, g in batches]) for name, at in zip(L0S, (0.0, 0.1))}
    for name, mode in (("rounded", "rounded_0.0"), ("stochastic", "stochastic")):
        kls = []
        for x, target_hidden, g in batches:
            with torch.no_grad():
                hidden = decomposition(x, evaluation.masks(mode, g, decomposition.L, generator))
                kls.append(opened.kl(target_hidden, hidden).item() * len(x) / windows)
        found[name] = sum(kls)
    starts = [
        evaluation.adversarial_sources(decomposition, batches, ADV_STEPS, generator, opened.kl)[1]
        for _ in range(evaluation.STARTS)
    ]
    return found | {"adversarial": statistics.mean(starts), "starts": starts}


def point(folder: Path, config: Config, settings: decompose.Config) -> dict:
    """What is known of a finished run; kept in its folder, and measured anew when the run or the windows change."""
    opened, corpus = evaluation.open_run(folder, settings.data_dir, config.device)
    asked = {"run_mark": opened.mark, "windows": config.windows, "window_seed": config.window_seed}
    path = folder / "frontier.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["asked"] == asked:
            return stored["point"]
    except (OSError, ValueError, LookupError, TypeError):
        pass
    first, second = (judged(opened, corpus, config.windows, config.window_seed + i) for i in (0, 1))
    steps = opened.checkpoint["config"]["steps"]
    found = first | {"second": second, "steps": steps, "seconds": opened.checkpoint["seconds"]}
    found["flops"] = steps * flops_of_a_step(opened)
    run.write_text(path, json.dumps({"asked": asked, "point": found}, indent=2) + "\n")
    return found


def flops_of_a_step(opened: evaluation.Run) -> int:
    """Counted by cost.py, without recomputation; the warm-up on faithfulness is not in it."""
    settings = replace(checkpoints.settings(decompose.Config, opened.checkpoint["config"]), memory_budget=1.0)
    shape = decompose.shape_of(opened.checkpoint["target"])
    return cost.counted(lambda: decompose.trial(settings, shape, torch.device("cpu")))[0].flops


def at_l0(points: list[dict], l0: float, kl: str) -> float | None:
    """KL at this L0 on the line through a seed's points, log KL against log L0; None beyond them."""
    line = sorted((math.log(p["l0"]), math.log(p[kl])) for p in points if p["l0"] > 0 and p[kl] > 0)
    for (x0, y0), (x1, y1) in zip(line, line[1:]):
        if x0 <= math.log(l0) <= x1:
            return math.exp(y0 + (y1 - y0) * (math.log(l0) - x0) / max(x1 - x0, 1e-12))
    return None


def spread(values: list[float]) -> float:
    """Standard deviation over seeds; 0 of one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def noise(points: list[dict]) -> dict[str, dict[str, float]]:
    """Of each measure, as a share of it: sd over seeds, sd over starts, difference of the two sets; means over runs."""
    groups: dict[tuple, list[dict]] = {}
    for p in points:
        groups.setdefault((p["recipe"], p["factor"]), []).append(p)
    found = {}
    for name in (*L0S, *KLS):
        relative = lambda deviation, values: deviation / max(statistics.mean(values), 1e-12)
        seeds = [[p[name] for p in of] for of in groups.values() if len(of) > 1]
        sets = [abs(p[name] - p["second"][name]) / max(p[name], 1e-12) for p in points]
        found[name] = {"sets": statistics.mean(sets)}
        if seeds:
            found[name]["seeds"] = statistics.mean(relative(spread(of), of) for of in seeds)
        if name == "adversarial":
            found[name]["starts"] = statistics.mean(relative(spread(p["starts"]), p["starts"]) for p in points)
    return found


def compared(points: list[dict], l0: float) -> dict[str, dict[str, list[float | None]]]:
    """{recipe: {KL: of each seed, at this L0}}."""
    found: dict[str, dict] = {}
    for recipe in dict.fromkeys(p["recipe"] for p in points):
        of = [p for p in points if p["recipe"] == recipe]
        seeds = [[p for p in of if p["seed"] == seed] for seed in sorted({p["seed"] for p in points})]
        found[recipe] = {kl: [at_l0(one, l0, kl) for one in seeds] for kl in KLS}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# C. Table and figure


def mean_and_spread(values: list[float], form: str) -> str:
    return f"{statistics.mean(values):{form}}" + (f" ± {spread(values):{form}}" if len(values) > 1 else "")


def table(points: list[dict], failed: list[dict], l0: float) -> str:
    """Markdown: the noise, every point, the recipes at equal L0."""
    lines = ["Noise of each measure, in per cent of it (means over runs):", ""]
    lines += ["| | sd over seeds | sd over 3 starts | between two sets of windows |", "|---|---|---|---|"]
    for name, of in noise(points).items():
        shares = [f"{of[kind]:.1%}" if kind in of else "" for kind in ("seeds", "starts", "sets")]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    lines += ["", "Mean ± standard deviation over seeds, KL in nats a token:", ""]
    lines.append(
        "| recipe | β_imp × | seeds | L0, g > 0 | g > 0.1 | KL rounded | random | adversarial | steps | s | PFLOP |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for recipe, factor in dict.fromkeys((p["recipe"], p["factor"]) for p in points):
        of = [p for p in points if (p["recipe"], p["factor"]) == (recipe, factor)]
        cells = [recipe, f"{factor:g}", ", ".join(str(p["seed"]) for p in of)]
        cells += [mean_and_spread([p[name] for p in of], ".1f") for name in L0S]
        cells += [mean_and_spread([p[name] for p in of], ".3f") for name in KLS]
        means = {name: statistics.mean(p[name] for p in of) for name in ("steps", "seconds", "flops")}
        cells += [f"{means['steps']:,.0f}", f"{means['seconds']:,.0f}", f"{means['flops'] / 1e15:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"At L0 {l0:g} (g > 0), between the points, against the first recipe:", ""]
    lines += ["| recipe | seeds | KL rounded | random | adversarial |", "|---|---|---|---|---|"]
    found = compared(points, l0)
    base = next(iter(found.values()), {})
    for recipe, of in found.items():
        cells = []
        for kl, values in of.items():
            inside = [value for value in values if value is not None]
            both = [pair for pair in zip(values, base[kl]) if None not in pair]  # of seeds that both recipes have there
            cells.append(mean_and_spread(inside, ".3f") if inside else "beyond its points")
            if both and of is not base:
                ours, first = (statistics.mean(side) for side in zip(*both))
                cells[-1] += f" ({ours / max(first, 1e-12) - 1:+.0%})"
        seeds = {sum(value is not None for value in values) for values in of.values()}
        lines.append(f"| {recipe} | {'/'.join(map(str, sorted(seeds)))} of {len(values)} | {' | '.join(cells)} |")
    lines += [f"\nfailed: {f['recipe']} × {f['factor']:g}, seed {f['seed']}: {f['error']}" for f in failed]
    return "\n".join(lines)


def draw(points: list[dict], l0: float, path: Path) -> None:
    """KL against L0 by either threshold: a faint line a seed, a strong one for their mean."""
    figure, axes = evaluation.subplots(2, 3, (12, 7.5))
    from matplotlib.ticker import LogLocator, NullLocator

    recipes = list(dict.fromkeys(p["recipe"] for p in points))
    colours = ["#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f"]
    markers = "os^Dv<>P"
    for row, (x, label) in zip(axes, L0S.items()):
        for ax, kl in zip(row, KLS):
            for i, recipe in enumerate(recipes):
                of, colour = [p for p in points if p["recipe"] == recipe], colours[i % len(colours)]
                for seed in sorted({p["seed"] for p in of}):
                    one = sorted((p[x], p[kl]) for p in of if p["seed"] == seed)
                    ax.plot(*zip(*one), color=colour, lw=0.7, alpha=0.45)
                groups = [[p for p in of if p["factor"] == f] for f in sorted({p["factor"] for p in of})]
                means = sorted(tuple(statistics.mean(p[name] for p in g) for name in (x, kl)) for g in groups)
                seconds = statistics.mean(p["seconds"] for p in of)
                named = f"{recipe}: {seconds:,.0f} s, {statistics.mean(p['flops'] for p in of) / 1e15:.3g} PFLOP"
                marker = markers[i // len(colours) % len(markers)]
                ax.plot(*zip(*means), marker + "-", color=colour, lw=1.8, ms=6, label=named)
            if x == "l0" and min(p[x] for p in points) <= l0 <= max(p[x] for p in points):
                ax.axvline(l0, color="#7f7f7f", lw=0.8, ls=":")
            for axis, name in (("x", x), ("y", kl)):
                if min(p[name] for p in points) > 0:
                    getattr(ax, f"set_{axis}scale")("log")
                    own = getattr(ax, f"{axis}axis")
                    own.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), numticks=20))
                    own.set_major_formatter("{x:.3g}")
                    own.set_minor_locator(NullLocator())
            ax.tick_params(which="both", labelsize=7)
            ax.set(xlabel=label, ylabel="KL(target ‖ masked), nats a token")
            ax.set_title({"rounded": "rounded: m = 1 where g > 0", "stochastic": "random masks"}.get(
                kl, f"adversarial, {ADV_STEPS} steps, mean of {evaluation.STARTS} starts"))  # fmt: skip
    axes[0, 0].legend(fontsize=8)
    evaluation.save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------


@run.claims()
def main(config: Config) -> None:
    out, points, failed, jobs = Path(config.out), [], [], []
    for seed in numbers(config, "seeds", int, -1):  # all recipes of a seed, then the next: an early end compares, too
        for factor in numbers(config, "factors", float, 0.0):
            for name, settings in recipes(config).items():
                settings = replace(settings, beta_imp=factor * settings.beta_imp, seed=seed)
                about = {"recipe": name, "factor": factor, "seed": seed, "beta_imp": settings.beta_imp}
                jobs.append((out / name / f"x{factor:g}-seed{seed}", settings, about))
    run.claim(out)
    for folder, settings, _ in jobs:
        check_same(folder, settings)
    for i, (folder, settings, about) in enumerate(jobs, 1):
        print(f"frontier: {i} of {len(jobs)}: {folder}", flush=True)
        try:
            finish(folder, settings)
            points.append(point(folder, config, settings) | about)
        except UserError as error:  # a recipe that diverges is an answer, too
            print(f"frontier: {folder} failed: {error}", flush=True)
            failed.append(about | {"error": str(error)})
            continue
        found = "  ".join(f"{kl} {points[-1][kl]:.3f}" for kl in ("l0", *KLS))
        print(f"frontier: {folder}: {found}", flush=True)
    if not points:
        raise UserError(f"out={out}: no run is finished: {failed[0]['error']}")
    points.sort(key=lambda p: [job[2]["recipe"] for job in jobs].index(p["recipe"]))  # recipe by recipe
    content = {"config": asdict(config), "points": points, "failed": failed, "noise": noise(points)}
    content[f"at_l0_{config.at_l0:g}"] = compared(points, config.at_l0)
    run.write_text(out / "frontier.json", json.dumps(content, indent=2) + "\n")
    draw(points, config.at_l0, out / "frontier.png")
    print(table(points, failed, config.at_l0) + f"\n\nwritten: {out}/frontier.json, {out}/frontier.png")


if __name__ == "__main__":
    run.run_script(main, Config, __doc__)
