"""tour.ipynb runs from top to bottom on a small run, and what is committed of it has outputs and figures.

To make the outputs anew: pip install nbclient ipykernel && jupyter execute --inplace tour.ipynb
"""

import json
from pathlib import Path

import matplotlib
import torch

TOUR = Path(__file__).parent.parent / "tour.ipynb"
CELLS = [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_it_runs_from_top_to_bottom(whole, monkeypatch, capsys):
    monkeypatch.setenv("TOUR_RUN", "whole")
    matplotlib.use("Agg")
    said: dict = {}
    for cell in CELLS:
        lines = [line for line in cell["source"] if not line.startswith("%")]  # %pip, %matplotlib
        exec(compile("".join(lines), cell["id"], "exec"), said)
    printed = capsys.readouterr().out
    for line in ("12 matrices, 72 subcomponents", "adversarial_", "is worth the most", "it fires at", "edited: "):
        assert line in printed
    run, piece = said["run"], (said["full"], int(said["number"]))
    W, U, V = run.decomposition.W(piece[0]), run.decomposition.U[piece[0]], run.decomposition.V[piece[0]]
    removed = W - torch.outer(U[:, piece[1]], V[:, piece[1]])
    assert torch.allclose(said["edited"][piece[0]], removed, atol=1e-6)
    assert said["kl"].max() >= 0 and said["edge"].shape[0] == len(said["nodes"]) + 1


def test_its_outputs_are_committed():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert TOUR.stat().st_size < 300_000
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "CE unrecovered" in text and "nats elsewhere" in text
