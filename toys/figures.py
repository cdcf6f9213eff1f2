"""The checks of a toy as a table beside what was published, and its figure, toy.png."""

from pathlib import Path

import numpy as np

from eval import save_figure, subplots
from toys.checks import Ablations, Check, Matrix, live, permute_identity, piece_cosines

# MMCS and ML2R of linear1 as published, mean and sd over seeds: SPD, APD. APD fails on the identity toys.
PUBLISHED = {
    ("tms_5-2", "MMCS of columns"): ("1.000 ± 0.000", "0.998 ± 0.000"),
    ("tms_5-2", "ML2R of columns"): ("0.993 ± 0.002", "0.893 ± 0.004"),
    ("tms_40-10", "MMCS of columns"): ("1.000 ± 0.000", "0.996 ± 0.003"),
    ("tms_40-10", "ML2R of columns"): ("1.010 ± 0.007", "0.935 ± 0.001"),
    ("tms_5-2-id", "MMCS of columns"): ("1.000 ± 0.000", "fails"),
    ("tms_5-2-id", "ML2R of columns"): ("0.992 ± 0.010", "fails"),
    ("tms_40-10-id", "MMCS of columns"): ("1.000 ± 0.000", "fails"),
    ("tms_40-10-id", "ML2R of columns"): ("1.031 ± 0.001", "fails"),
}


def table(toy: str, checks: list[Check]) -> str:
    """The checks, one a line."""
    row = "{:<26} {:<12} {:>10}  {:<18} {:<5} {:<15} {}".format
    lines = [row("check", "matrix", "value", "expected", "", "SPD, published", "APD, published")]
    for c in checks:
        verdict = {None: "", True: "pass", False: "FAIL"}[c.ok]
        published = PUBLISHED.get((toy, c.name), ("", ""))
        lines.append(row(c.name, c.matrix, f"{c.value:.4g}", c.expected, verdict, *published).rstrip())
    return "\n".join(lines)


def ablation_table(ablations: Ablations) -> str:
    lines = [f"{'':<26} {'accuracy':>10} {'m attends to S before':>22} {'last S attends to m':>20}"]
    return "\n".join(lines + [f"{what:<26} {a:>10.3f} {p:>22.3f} {i:>20.3f}" for what, (a, p, i) in ablations.items()])


def plot(found: list[Matrix], path: Path, title: str) -> None:
    """A row for each matrix: what is in W, what was recovered of it, and the causal importances on the probes.

    Pieces are shown as columns of what they write. A right answer has the same picture twice and a diagonal, or for a
    dense matrix n full columns.
    """
    figure, axes = subplots(len(found), 3, (11, 2.9 * len(found)), squeeze=False)
    for row, matrix in zip(axes, found):
        U, V, g, n = matrix.U, matrix.V, matrix.g_probes, matrix.n
        if matrix.dense:
            inside, g = live(g), g[:, g.sum(0).argsort(descending=True)]
            known, seen = matrix.W, U[:, inside] @ V[:, inside].T
            titles, xlabel = ["W", f"sum of its {int(inside.sum())} live subcomponents"], "input"
        else:
            (u, v), g = matrix.pieces, permute_identity(g)
            best = piece_cosines(U, V, (u, v)).argmax(1)
            known, seen = u * v.norm(dim=0), U[:, best] * (V[:, best] * v / v.norm(dim=0)).sum(0)
            titles, xlabel = ["known pieces U_c |V_c|", "the best subcomponent of each"], "mechanism"
        top = known.abs().max().item()
        signed = dict(cmap="RdBu", vmin=-top, vmax=top), xlabel, "output"
        share = dict(cmap="Greys", vmin=0, vmax=1), "subcomponent, ordered", "probe: one mechanism on"
        panels = zip(row, (known, seen, g[:, : n + max(3, n // 4)]), (signed, signed, share))
        for title_of, (ax, values, (colours, xlabel, ylabel)) in zip([*titles, "causal importance g"], panels):
            image = ax.imshow(values.numpy(), aspect="auto", interpolation="nearest", **colours)
            ax.set(title=f"{matrix.name}: {title_of}", xlabel=xlabel, ylabel=ylabel)
            ax.locator_params(integer=True)
            if values is not known:
                figure.colorbar(image, ax=ax)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_induction(ablations: Ablations, path: Path, title: str) -> None:
    """Accuracy and the two attentions with each whole matrix ablated."""
    rows = {what.removeprefix("without "): values for what, values in ablations.items() if ":" not in what}
    figure, ax = subplots(1, 1, (9, 4))
    labels = "accuracy", "layer 0: m attends to the S before it", "layer 1: the last S attends to m"
    at = np.arange(len(rows))
    for i, (label, colour) in enumerate(zip(labels, ("#000000", "#0072b2", "#d55e00"))):
        ax.bar(at + 0.27 * (i - 1), [values[i] for values in rows.values()], 0.25, label=label, color=colour)
    ax.set_xticks(at, rows, rotation=30)
    ax.set(ylabel="share", xlabel="subcomponents ablated", title=title, ylim=(0, 1.25))
    ax.legend(ncols=3, fontsize=8)
    save_figure(figure, path)
