"""What does each term of the loss do to the causal importances? The draft's figure on the two minimality losses.

    python decompose.py                                        # both terms: out/vpd-stdlib
    python decompose.py --beta_freq=0 --out=out/importance     # importance minimality alone
    python decompose.py --beta_adv=0 --out=out/no-adversary    # both, without the adversary
    python -m studies.terms out/importance out/vpd-stdlib out/no-adversary    # half a minute

Runs of one target, on the same positions of its validation text. The figure shows g of each run, subcomponents by
positions, both in clustered order: similar rows lie together, and the positions have one order in all runs, that of the
first. Beneath is how often each subcomponent is on. A subcomponent is *bias-like* if it is on at more than 30 % of the
positions. Writes terms.json and figures/terms.png into the last run's folder.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage

from eval import Run, open_run, save_figure, subplots, validation_windows
from flags import UserError, require
from run import command, run_script, write_text

BIAS_LIKE = 0.3  # share of the positions

# ---------------------------------------------------------------------------------------------------------------------
# A. Quantities


def clustered_order(X: np.ndarray) -> list[int]:
    """Rows of X [n, d] so that similar ones lie together: the leaves of a tree of average linkage by cosine."""
    if len(X) < 2:
        return list(range(len(X)))
    return leaves_list(linkage(X + 1e-9, "average", metric="cosine")).tolist()  # the cosine of a row of zeros is none


def importances(run: Run, windows: torch.Tensor) -> np.ndarray:
    """g [positions, C] of all positions of the windows [n, T + 1], in their order."""
    return np.concatenate([run.importances(x[:, :-1])[1].flatten(0, 1).cpu().numpy() for x in run.batches(windows)])


def summary(g: np.ndarray) -> dict[str, float]:
    """Of g [positions, C]: how many are on at a position, ever on, bias-like, and the share of L0 that these are.

    `on_where_ever` is the mean, over those that are ever on, of the share of positions where they are.
    """
    frequency = (g > 0).mean(0)
    ever, bias = frequency > 0, frequency > BIAS_LIKE
    return {
        "l0": float(frequency.sum()), "ever_on": int(ever.sum()), "bias_like": int(bias.sum()),
        "bias_like_of_ever": float(bias.sum() / max(1, ever.sum())),
        "bias_like_of_l0": float(frequency[bias].sum() / max(frequency.sum(), 1e-12)),
        "on_where_ever": float(frequency[ever].mean()) if ever.any() else 0.0,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# B. Figure


def plot_terms(gs: dict[str, np.ndarray], shown: int, path: Path) -> None:
    """Above: g of each run on `shown` positions, those that are on by positions. Beneath: frequencies, sorted."""
    n, positions = len(gs), clustered_order(next(iter(gs.values()))[:shown])
    figure, axes = subplots(2, n, (4 * n, 8.5), squeeze=False, height_ratios=(2, 1))
    grid = axes[1, 0].get_gridspec()
    for ax in axes[1]:
        ax.remove()
    below = figure.add_subplot(grid[1, :])
    for i, (name, g) in enumerate(gs.items()):
        frequency, part, ax = (g > 0).mean(0), g[:shown][positions], axes[0, i]
        part = part[:, (part > 0).any(0)]
        image = ax.imshow(part[:, clustered_order(part.T)].T, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        s = summary(g)
        ax.set(title=f"{name}\nL0 {s['l0']:.1f}, {s['bias_like']} bias-like", xlabel="position, in clustered order")
        ax.set_ylabel("subcomponent, in clustered order" if i == 0 else "")
        below.plot(np.sort(frequency[frequency > 0])[::-1], label=name)
    figure.colorbar(image, ax=list(axes[0]), label="causal importance g")
    below.axhline(BIAS_LIKE, color="grey", linestyle=":", label="bias-like above")
    below.set(
        yscale="log",
        xlabel="subcomponents that are ever on, most frequent first",
        ylabel="share of positions with g > 0",
    )
    below.legend()
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# C. The study


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...]  # run folders of one target
    windows: int = 256  # of validation text, of T tokens, on which frequencies are counted
    shown: int = 512  # positions in the figure
    seed: int = 0  # of the windows
    data_dir: str = ""  # where token files are kept; default as in the runs
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        require(self, "above 0", "windows", "shown")
        require(self, "0 or above", "seed")
        if not self.runs:
            raise UserError("runs: give at least one run folder")


@torch.no_grad()
def main(config: Config) -> None:
    gs, target = {}, None
    for folder in config.runs:
        run, corpus = open_run(folder, config.data_dir, config.device)
        weights = [*run.decomposition.target.state_dict().values()]
        target = target or weights
        if len(weights) != len(target) or not all(map(torch.equal, weights, target)):
            raise UserError(f"{folder} is a run of another target than {config.runs[0]}")
        windows = validation_windows(corpus, config.windows, run.config["T"], config.seed)
        gs[Path(folder).resolve().name] = importances(run, windows)
    rows, n = {name: summary(g) for name, g in gs.items()}, min(map(len, gs.values()))
    about = {"command": command(), "run_mark": run.mark, "positions": n, "bias_like_above": BIAS_LIKE}
    write_text(run.folder / "terms.json", json.dumps(about | {"runs": rows}, indent=2) + "\n")
    plot_terms(gs, min(config.shown, n), run.folder / "figures" / "terms.png")
    print(f"{'run':<20} {'L0':>6} {'ever on':>8} {'bias-like':>10} {'of those':>9} {'of L0':>7} {'mean share':>11}")
    for name, row in rows.items():
        print(
            f"{name:<20} {row['l0']:>6.1f} {row['ever_on']:>8} {row['bias_like']:>10} {row['bias_like_of_ever']:>9.1%} "
            f"{row['bias_like_of_l0']:>7.1%} {row['on_where_ever']:>11.2%}"
        )
    print(f"written: {run.folder}/terms.json and figures/terms.png")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
