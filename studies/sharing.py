"""For how many positions at once can one choice of masks break the model, and does it break other text too?

    python -m studies.sharing out/vpd-stdlib                     # 5 minutes on one CPU core
    python -m studies.sharing out/vpd-stdlib out/no-adversary    # two runs side by side in one figure
    python -m studies.sharing out/s0 out/s1 out/s2               # runs that differ in their seed alone: their mean

The draft asks that f(x | W'(x, r)) keep to the target for all r. Its published text lets the adversary choose one r for
a whole batch, to find systematic flaws and not the noise that a source tuned to one input can add up. Here it chooses
one r for 1 position, 8, a sequence, 8 sequences, all; each r then masks other text. A flaw of the decomposition costs
as much there. Noise costs no more there than masks that nobody chose: r = 0, or a coin for every source.

It writes <run>/sharing.json for each run, and figures/sharing.png into the first: a panel for each recipe, with the
mean over its seeds and a faint line for each. A run whose sharing.json has the same weights and settings is not
measured again.

  A. Adversary    sources that some positions share; their KL on the text they were chosen on, and on other text
  B. Numbers      one run: every sharing, and what r = 0, random r and ablating everything cost
  C. Table, figure
  D. The run

Left out: stronger and stronger adversaries in the published scope, one r for all: `eval.py --adv_steps=20,...,1280`.
"""

import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
import decompose
from eval import (
    Batch,
    Run,
    load_run,
    masks,
    of_windows,
    open_run,
    parse_steps,
    save_figure,
    subplots,
    validation_windows,
)
from flags import UserError, require
from losses import kl_divergence, mask, reconstruction, sample_sources
from model import Decomposition
from run import command, pick_device, run_script, write_text
from share import located

# ---------------------------------------------------------------------------------------------------------------------
# A. The adversary

Divergence = Callable[[Tensor, Tensor], Tensor]


def of_positions(r: Tensor, rows: int, columns: int, b: Tensor) -> Tensor:
    """r [N / rows, T / columns, C + L] to [len(b), T, C + L]: position t of window b has r[b // rows, t // columns]."""
    r = r.index_select(0, b // rows)[:, :, None]  # [len(b), T / columns, 1, C + L]
    return r.expand(-1, -1, columns, -1).flatten(1, 2)


def kl_of_windows(
    decomposition: Decomposition, batches: list[Batch], r: Tensor, rows: int, columns: int, divergence: Divergence
) -> Iterator[Tensor]:
    """Of each part in turn: the KL of every window, [B], under sources r that rows x columns positions share."""

    def of_each(target_output: Tensor, masked_output: Tensor) -> Tensor:
        return torch.stack([divergence(*pair) for pair in zip(target_output, masked_output)])

    start = 0
    for x, target_output, g in batches:
        b = torch.arange(start, start := start + len(x), device=x.device)
        shared = of_positions(r, rows, columns, b)[None]
        yield reconstruction(decomposition, x, target_output, g, shared, None, of_each, frozen=True)


def shared_sources(
    decomposition: Decomposition, batches: list[Batch], rows: int, columns: int, n_steps: int,
    generator: torch.Generator, divergence: Divergence = kl_divergence, tick: Callable[[int], object] = lambda n: None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sources r [N / rows, T / columns, C + L] that rows x columns positions share, after n_steps of sign ascent.

    As `eval.adversarial_sources`, where all N x T share one: from U(0, 1), in steps of 2 / n_steps, clamped to [0, 1].
    Sets of `rows` windows do not touch each other. Within a window sources do, through attention: they ascend its KL
    together. Also returns the KL of every window at every step, [n_steps + 1, N]. tick(n): n windows are done.
    """
    N, T = sum(len(x) for x, _, _ in batches), batches[0][0].shape[1]
    r, met = sample_sources((N // rows, T // columns, batches[0][2].shape[-1] + decomposition.L), generator), []
    for step in range(n_steps + 1):
        r, grad_r, kls = r.requires_grad_(), torch.zeros_like(r), []
        for kl in kl_of_windows(decomposition, batches, r, rows, columns, divergence):
            kls.append(kl.detach())
            if step < n_steps:
                grad_r += torch.autograd.grad(kl.sum(), r)[0]
            tick(len(kl))
        met.append(torch.cat(kls))
        r = r.detach()
        if step < n_steps:
            r = (r + 2 / n_steps * grad_r.sign()).clamp(0, 1)
    return r, torch.stack(met)


def largest_met(met: list[Tensor], rows: int) -> float:
    """The worst that an adversary met: of each set of `rows` windows over all steps and starts; the mean over sets.

    met: of each start, the KL of every window at every step, [n_steps + 1, N].
    """
    of_sets = torch.stack(met).unflatten(-1, (-1, rows)).mean(-1)  # [starts, n_steps + 1, N / rows]
    return of_sets.amax((0, 1)).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# B. Numbers

FEW, SETS = 16, 4  # fewer windows are enough where several sets of them climb apart: 16 of one, 4 of more


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...]  # run folders of decompose.py
    windows: int = 64  # validation sequences, a multiple of 8; the first 16 or 32 where not all share one r
    steps: str = "20,80"  # steps of sign ascent
    more: str = "320"  # more steps, from one start, where a sequence or more share an r; empty: none
    starts: int = 3  # of the adversary
    seed: int = 0
    batch: int = 0  # sequences at a time, 0: as many as memory allows; changes no number but by rounding
    data_dir: str = ""  # where token files are kept; default as in each run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs=(): name at least one run folder")
        require(self, "above 0", "windows", "starts")
        require(self, "0 or above", "batch", "seed")
        if self.windows > 8 and self.windows % 8:
            raise UserError(f"windows={self.windows}: must be a multiple of 8, as sets of 8 share an r")
        self.ascents(True)

    def ascents(self, sequence: bool) -> dict[int, int]:
        """{steps: starts} of a sharing; sequence: whether a sequence or more share an r."""
        more = parse_steps("more", self.more) if self.more and sequence else []
        steps = dict.fromkeys(parse_steps("steps", self.steps), self.starts)
        return steps | {n: 1 for n in more if n not in steps}


def sharings(windows: int, T: int) -> list[tuple[int, int]]:
    """(rows, columns) that share one r: a position, 8 (or the most below that divide T), a sequence, 8, all windows."""
    eight = max(n for n in range(1, 9) if T % n == 0)
    return list(dict.fromkeys([(1, 1), (1, eight), (1, T), (min(8, windows), T), (windows, T)]))


def first(batches: list[Batch], n: int) -> list[Batch]:
    """The first n windows of them."""
    taken = []
    for batch in batches:
        if n > 0:
            taken.append(tuple(part[:n] for part in batch))
        n -= len(batch[0])
    return taken


@torch.no_grad()
def prices(run: Run, batches: list[Batch], generator: torch.Generator) -> dict[str, float]:
    """KL of masks that nobody chose: {what: nats a token}. Random r are independent at every position."""
    L, n = run.decomposition.L, sum(len(x) for x, _, _ in batches)

    def coin(g: Tensor) -> Tensor:
        return mask(g, sample_sources((*g.shape[:-1], g.shape[-1] + L), generator).round())

    kinds = {
        "r = 0": lambda g: masks("ci", g, L, generator),
        "rounded": lambda g: masks("rounded_0.0", g, L, generator),
        "r ~ U(0, 1)": lambda g: masks("stochastic", g, L, generator),
        "r = 0 or 1 by a coin": coin,
        "everything ablated": lambda g: masks("zero", g, L, generator),
    }
    return {
        what: sum(run.kl(hidden, run.decomposition(x, m(g))).item() * len(x) / n for x, hidden, g in batches)
        for what, m in kinds.items()
    }


def measure(run: Run, corpus: data.Corpus, config: Config) -> dict:
    """sharing.json: KL in nats a token by the positions that share one r.

    Of each sharing and number of steps: start, kl: before and after the ascent, mean over starts; largest: by
    `largest_met`; other_text: of the sources after the ascent, on as many other windows, at the same places in them.
    """
    began, T = time.time(), run.config["T"]
    # Other text: the next draw of validation windows, which may overlap with the first by chance.
    drawn = (
        validation_windows(corpus, config.windows, T, config.seed),
        corpus.batch("val", 1, config.windows, T, config.seed),
    )
    batches, other = (of_windows(run, windows, config.batch)[0] for windows in drawn)
    costs = prices(run, batches, torch.Generator(run.device).manual_seed(config.seed))
    rows_of_table, work = [], []
    for rows, columns in sharings(config.windows, T):
        n = config.windows if rows == config.windows else min(config.windows, max(FEW, SETS * rows))
        work += [(rows, columns, n, *ascent) for ascent in config.ascents(columns == T).items()]
    total = sum(n * (steps + 2) * starts for _, _, n, steps, starts in work)
    bar = tqdm(total=total, desc="sharing", unit="window", mininterval=1, leave=False)
    for rows, columns, n, steps, starts in work:
        generator = torch.Generator(run.device).manual_seed(config.seed)
        here, there, met, transferred = first(batches, n), first(other, n), [], []
        for _ in range(starts):
            r, kl = shared_sources(run.decomposition, here, rows, columns, steps, generator, run.kl, bar.update)
            with torch.no_grad():
                transferred += kl_of_windows(run.decomposition, there, r, rows, columns, run.kl)
            met.append(kl)
            bar.update(n)
        rows_of_table.append({
            "positions": rows * columns, "windows": n, "steps": steps, "starts": starts,
            "start": torch.stack(met)[:, 0].mean().item(), "kl": torch.stack(met)[:, -1].mean().item(),
            "largest": largest_met(met, rows), "other_text": torch.cat(transferred).mean().item(),
        })  # fmt: skip
    bar.close()
    found = {"T": T, "prices": costs, "sharing": rows_of_table, "seconds": time.time() - began}
    return settings(run, config) | {"command": command()} | found


# ---------------------------------------------------------------------------------------------------------------------
# C. Table and figure


def table(found: dict) -> str:
    """The numbers of sharing.json for a person: nats a token."""
    lines = [f"KL(target ‖ masked) in nats a token, {found['windows']} windows of {found['T']} tokens"]
    lines += [f"  {what:24s} {kl:9.4f}" for what, kl in found["prices"].items()]
    head = ("one r for", "windows", "steps", "starts", "random r", "ascended", "largest met", "on other text")
    lines += ["", "{:>14s} {:>8s} {:>6s} {:>7s} {:>9s} {:>9s} {:>12s} {:>14s}".format(*head)]
    last = 0
    for row in found["sharing"]:
        n = row["positions"]
        who = "" if n == last else f"{n:,} position" + "s" * (n > 1)
        counts = f"{row['windows']:8d} {row['steps']:6d} {row['starts']:7d}"
        kl = f"{row['start']:9.4f} {row['kl']:9.4f} {row['largest']:12.4f} {row['other_text']:14.4f}"
        lines.append(f"{who:>14s} {counts} {kl}")
        last = n
    return "\n".join(lines)


def over_seeds(of: list[dict]) -> str:
    """Mean ± standard deviation of several runs' numbers, for a person."""
    both = lambda values: f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    lines = [f"  {what:24s} {both([found['prices'][what] for found in of])}" for what in of[0]["prices"]]
    row = "{:>14} {:>6} {:>18} {:>18} {:>18}".format
    lines += ["", row("one r for", "steps", "ascended", "largest met", "on other text")]
    for rows in zip(*(found["sharing"] for found in of)):
        kls = [both([row[what] for row in rows]) for what in ("kl", "largest", "other_text")]
        lines.append(row(f"{rows[0]['positions']:,}", rows[0]["steps"], *kls))
    return "\n".join(lines)


COLOURS = ("#56b4e9", "#0072b2", "#000000", "#d55e00", "#009e73", "#cc79a7")  # of numbers of steps


def plot_sharing(recipes: dict[str, list[dict]], path: Path) -> None:
    """KL against the positions that share one r, a panel a recipe. recipes: {label: the sharing.json of each seed}."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = subplots(1, len(recipes), (5.2 * len(recipes) + 1, 5), sharey=True, squeeze=False)
    for ax, (label, of) in zip(axes[0], recipes.items()):
        found, T, drawn = of[0], of[0]["T"], of[0]["sharing"]
        of_steps = dict(zip(dict.fromkeys(row["steps"] for row in drawn), COLOURS * len(drawn)))
        for what, style in (("largest", "o-"), ("other_text", "o--")):
            for steps, colour in of_steps.items():
                rows = [row for row in drawn if row["steps"] == steps]
                x, starts = [row["positions"] for row in rows], rows[0]["starts"]
                seeds = [[row[what] for row in one["sharing"] if row["steps"] == steps] for one in of]
                y = [statistics.mean(values) for values in zip(*seeds)]
                for one in seeds if len(of) > 1 else []:
                    ax.plot(x, one, style[1:], color=colour, lw=0.6, alpha=0.5)
                said = f"largest met, {starts} start" + "s" * (starts > 1) if what == "largest" else "on other text"
                ax.plot(x, y, style, color=colour, ms=4, lw=1.4, label=f"{steps} steps: {said}")
        for what, style in (("everything ablated", "-"), ("r = 0", "-."), ("r = 0 or 1 by a coin", ":")):
            ax.axhline(statistics.mean(one["prices"][what] for one in of), color="#7f7f7f", lw=1, ls=style, label=what)
        names = {found["windows"] * T: f"all {found['windows']}\nsequences", 8 * T: "8\nsequences", T: "one\nsequence"}
        ticks = sorted({row["positions"] for row in drawn})
        ax.set(xscale="log", title=label, xlabel="positions that share one r")
        ax.set_xticks(ticks, [f"{n:,}\n{names.get(n, '')}" for n in ticks])
        ax.set_xticks([], minor=True)
        if any(max(line.get_ydata()) > 0 for line in ax.lines):  # else a log axis has nothing to show
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.grid(axis="y", color="#eeeeee", lw=0.6)
    axes[0, 0].set_ylabel("KL(target ‖ masked), nats a token")
    of_lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*of_lines, loc="outside lower center", ncols=3, fontsize=8, handlelength=4)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# D. The run


def settings(run: Run, config: Config) -> dict:
    """What the numbers of sharing.json follow from."""
    chosen = {name: getattr(config, name) for name in ("windows", "steps", "more", "starts", "seed")}
    return {"run_mark": run.mark} | chosen


def measured(path: Path, wanted: dict) -> dict | None:
    """sharing.json, if it is there, whole, and of these settings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found | wanted == found and {"T", "prices", "sharing"} <= found.keys() else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def recipe(run: Run) -> str:
    """What the runs of a recipe have in common: the target, and all settings but the seed and those of the machine."""
    own = {*decompose.MAY_CHANGE, "seed", "out", "target"} - {"steps"}
    weights = hashlib.sha256()
    for W in run.decomposition.target.state_dict().values():
        weights.update(W.cpu().contiguous().view(torch.uint8).numpy())
    return weights.hexdigest() + json.dumps({n: value for n, value in sorted(run.config.items()) if n not in own})


def titled(labels: list[str]) -> str:
    others = len(labels) - 1
    return labels[0] + (f" and {others} more seed{'s' * (others > 1)}: their mean" if others else "")


def main(config: Config) -> None:
    opened = {}
    for folder in dict.fromkeys(map(located, config.runs)):  # all of them, before the minutes that the first may take
        run, corpus = load_run(folder, pick_device(config.device)), None
        if (found := measured(folder / "sharing.json", settings(run, config))) is None:
            run, corpus = open_run(folder, config.data_dir, config.device)
        opened[str(folder)] = run, corpus, found
    recipes: dict[tuple, dict[str, dict]] = {}
    copies = Counter()
    for label, (run, corpus, found) in opened.items():
        path = run.folder / "sharing.json"
        if found is None:
            found = measure(run, corpus, config)
            write_text(path, json.dumps(found, indent=2) + "\n")
            print(f"\n{label}: {found['seconds']:.0f} s; written: {path}")
        else:
            print(f"\n{label}: as measured before; to do so again, delete {path}")
        print(table(found))
        copies[which := (recipe(run), run.config["seed"])] += 1  # a copy is no seed more
        recipes.setdefault((which[0], copies[which]), {})[label] = found
    several = {titled([*of]): [*of.values()] for of in recipes.values()}  # each begins with a folder of its own
    for title, of in several.items():
        if len(of) > 1:
            print(f"\n{title}, ± standard deviation\n{over_seeds(of)}")
    figure = Path(next(iter(opened))) / "figures" / "sharing.png"
    plot_sharing(several, figure)
    print(f"\nwritten: {figure}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
