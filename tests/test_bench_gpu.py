"""bench.gpu: its clock, its tables, every part at a tiny size on the CPU. Times are never asserted."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import one_line

from bench import gpu
from bench import step as bench
from flags import UserError

CPU = torch.device("cpu")


def tiny(tmp_path, **changes) -> gpu.Config:
    return gpu.Config(**dict(tiny=True, device="cpu", out=str(tmp_path), dataset="text") | changes)


# ---------------------------------------------------------------------------------------------------------------------
# Every part


@pytest.mark.parametrize("task", ["eager pile2", "both default", "largest pile2", "profile default", "evaluation"])
def test_a_task_at_a_tiny_size(task, home, tmp_path):
    m = gpu.TASKS[task].call(tiny(tmp_path), CPU)
    if task in ("eager pile2", "both default"):
        assert m["size"] == task.split()[1] and m["step_s"] > 0 and m["parts"] == {} and "naive_step_s" not in m
        assert m["peak_bytes"] == pytest.approx(m["counted_peak_bytes"], rel=0.15)
    elif task == "largest pile2":
        assert m["largest_B"] == 16 and list(m["bytes"]) == [2, 4, 8, 16] and m["too_large_B"] == 0
    elif task == "profile default":
        assert m["kernels"] > 1000 and len(m["top"]) == 10 and m["top"][0][2] >= m["top"][9][2] > 0
    else:
        assert m["evaluation_s"] > 0 and m["report_s"] > 0 and 0 < m["l0"] < m["live"]
        assert (tmp_path / "made-up/report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["naive paper4", "run", "tests"])
def test_a_longer_task_at_a_tiny_size(task, home, tmp_path, monkeypatch):
    m = gpu.TASKS[task].call(tiny(tmp_path), CPU)
    if task == "naive paper4":
        assert m["B"] == 2 and len(m["parts"]) == 5 and m["times_as_fast"] > 0
    elif task == "run":
        assert (m["target_steps"], m["steps"], m["C"]) == (3, 3, 72)
        assert {"stochastic", "rounded_0.0"} <= m["kl"].keys() and Path(m["run"], "metrics.json").exists()
    elif not torch.cuda.is_available():
        assert len(m["tests"]) > 9
        assert {(a["outcome"], "there is no GPU here" in a["message"]) for a in m["tests"].values()} == {
            ("skipped", True)
        }


@pytest.mark.slow
def test_the_command_at_a_tiny_size(home, tmp_path, monkeypatch, capsys):
    """A process for the task, its log, its line in results.jsonl, results.md."""
    monkeypatch.setattr(gpu, "TASKS", {"profile default": gpu.TASKS["profile default"]})
    gpu.main(tiny(tmp_path, parts="e", minutes=3.0))
    assert "profile default: done" in capsys.readouterr().out
    found = gpu.read(tmp_path / "results.jsonl")["profile default"]
    assert found["part"] == "e" and "'--task=profile default'" in found["command"] and len(found["top"]) == 10
    assert "ten most expensive kernels of `default`" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "profile-default.log").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "text.jsonl").write_text("{}")
    with pytest.raises(UserError, match="is neither empty nor of bench.gpu"):
        gpu.main(tiny(tmp_path, minutes=0.001))
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# The clock


def script(tmp_path, monkeypatch, text: str) -> None:
    """Takes the place of the Python that a task is started with."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


@pytest.mark.parametrize(
    "text, error",
    [
        ('echo "$@" > args', ""),
        ("echo one; echo 'CUDA error: two' >&2; exit 3", "exit code 3: CUDA error: two"),
        ("sleep 600 & sleep 600", "stopped after 0 s"),
    ],
)
def test_a_task_that_fails_or_hangs_ends(text, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script(tmp_path, monkeypatch, text)
    assert gpu.attempt(tiny(tmp_path), "step paper4", 0.3 if "sleep" in text else 30.0) == error
    if not error:
        args = Path("args").read_text()
        assert (
            "-m bench.gpu" in args and "--task=step paper4" in args and "--minutes=0.5" in args and "fill" not in args
        )


def test_parts_share_the_time_and_what_had_none_is_tried_at_the_end(tmp_path, monkeypatch):
    """Of 100 s part b has 60 and part e what is then left."""
    now, given = [0.0], []

    def attempt(config, task, seconds) -> str:
        given.append((task, round(seconds)))
        now[0] += 50.0 if task == "b1" and len(given) == 1 else 10.0
        return "exit code 1: it broke" if task == "b1" else ""

    tasks = {"b1": gpu.Task("b", 60, None), "b2": gpu.Task("b", 60, None), "e1": gpu.Task("e", 60, None)}
    monkeypatch.setattr(gpu, "TASKS", tasks)
    monkeypatch.setattr(gpu, "SHARE", {"b": 6.0, "e": 4.0})
    monkeypatch.setattr(gpu, "attempt", attempt)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "LEAST", 15.0)
    gpu.everything(tiny(tmp_path, parts="b,e", minutes=100 / 60, tiny=False))
    assert given == [("b1", 60), ("e1", 50), ("b2", 40)]  # after 50 s b has 10 left: its b2 waits for what e leaves
    found = gpu.read(tmp_path / "results.jsonl")
    assert found["b1"]["error"] == "exit code 1: it broke" and "b2" not in found  # it is the process that writes b2


def test_what_had_no_time_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "attempt", lambda *args: pytest.fail("began without time"))
    gpu.everything(tiny(tmp_path, parts="e", minutes=0.01, tiny=False))
    assert {m["error"] for m in gpu.read(tmp_path / "results.jsonl").values()} == {"no time was left"}


def test_minutes_of_the_run_shrink_together():
    assert gpu.minutes_of_d(gpu.Config(minutes=30.0)) == (3.0, 8.0)
    assert gpu.minutes_of_d(gpu.Config(minutes=7.0)) == pytest.approx((1.5, 4.0))
    assert gpu.minutes_of_d(gpu.Config(minutes=1.0)) == (0.0, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and tables


def test_kernels_by_hand():
    """Two overlap, then a gap of 3: 2 to 6 and 9 to 10."""
    spans = [("a", 9.0, 10.0), ("a", 2.0, 5.0), ("b", 4.0, 6.0)]
    m = gpu.kernels(spans)
    assert m == {"kernels": 3, "names": 2, "busy": 5.0, "gaps": 3.0, "top": [["a", 2, 4.0], ["b", 1, 2.0]]}
    assert gpu.kernels([])["gaps"] == 0.0


MEASURED = {"B": 4, "T": 8, "step_s": 0.05, "tokens_per_s": 12345.6, "mfu": 0.412, "held_bytes": 10**9}
MEASURED |= {"peak_bytes": 3 * 10**9, "counted_peak_bytes": 4 * 10**9, "parts": {}}
NAIVE = {"naive_peak_bytes": 6 * 10**9, "times_as_fast": 3.14, "parts": {"one": 0.01, "two": 0.04}}


def results(path: Path, rows: dict) -> Path:
    path.write_text("".join(json.dumps({"task": task} | row) + "\n" for task, row in rows.items()))
    return path


def test_tables_show_what_was_measured_and_what_was_not(tmp_path):
    path = results(
        tmp_path / "results.jsonl",
        {
            "step pile2": MEASURED | {"gpu": "A GPU", "torch": "2.99"},
            "eager pile2": MEASURED | {"step_s": 0.1, "peak_bytes": 4 * 10**9},
            "naive pile2": MEASURED | NAIVE,
            "both pile2": {"error": "exit code 1"},
            "tests": {
                "tests": {"x": {"outcome": "passed", "off": "1e-3"}, "y": {"outcome": "failure", "message": "no"}}
            },
            "profile default": {"kernels": 3, "busy": 5.0, "gaps": 3.0, "top": [["a|b", 2, 4.0]]},
        },
    )
    lines = gpu.tables(gpu.read(path)).splitlines()
    assert lines[0] == "A GPU, PyTorch 2.99; n = 1."
    assert "| `pile2` | 50 (–; 100) | 12,346 | 41% | 4 (5), 5 | 3.1 ×, 50%, at 4 × 8 |  |" in lines
    assert "| `paper4` | not measured yet |  |  |  |  |  |" in lines
    assert "| one | 20% |" in lines and "| two | 80% |" in lines
    assert "| tests marked `gpu` | 1 of 2 passed; y: no |" in lines and "| x | 1e-3 |" in lines
    assert (
        "| profile, `default` | 3 kernels, 5.0 ms of them and 3.0 ms of gaps |" in lines
        and "| `a/b` | 2 | 4.00 |" in lines
    )
    assert "| a run of `--scale=gpu` | not measured yet |" in lines


def test_a_failure_does_not_replace_what_was_measured(tmp_path):
    path = tmp_path / "results.jsonl"
    rows = [{"error": "first"}, {"step_s": 1}, {"error": "later"}, {"step_s": 2}]
    for n, expected in ((1, {"error": "first"}), (2, {"step_s": 1}), (3, {"step_s": 1}), (4, {"step_s": 2})):
        path.write_text("".join(json.dumps({"task": "step pile2"} | row) + "\n" for row in rows[:n]))
        assert gpu.read(path) == {"step pile2": {"task": "step pile2"} | expected}


def test_fill_replaces_what_is_between_the_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "counted_sizes", lambda: {size: f"counted {size}" for size in bench.SIZES})
    docs, path = tmp_path / "speed.md", results(tmp_path / "results.jsonl", {"step pile2": MEASURED})
    docs.write_text(f"before\n{gpu.BEGIN}\nold\n{gpu.END}\nafter\n")
    for _ in range(2):  # and again
        gpu.main(gpu.Config(fill=str(path), docs=str(docs)))
    text = docs.read_text()
    assert text.startswith(f"before\n{gpu.BEGIN}\n\n| size") and text.endswith(f"|\n\n{gpu.END}\nafter\n")
    assert "old" not in text and "| `pile2` | 50 (–; –) | 12,346 | 41% | 4 (–), 5 |  |  | counted pile2 |" in text


def test_the_docs_have_the_marks():
    text = (Path(gpu.__file__).parent.parent / gpu.Config.docs).read_text()
    assert 0 < text.find(gpu.BEGIN) < text.find(gpu.END)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    "args, message",
    [
        (["--minutes=0"], "minutes=0.0: must be above 0"),
        (["--parts=a,x"], "parts='a,x': must be some of a,b,c,d,e, as in a,b"),
        (["--task=nothing"], "task='nothing': must be one of tests, step paper4"),
        (["--fill=nowhere.jsonl"], "nowhere.jsonl is no results.jsonl of bench.gpu (FileNotFoundError"),
        ([], "there is no GPU here: --tiny=True runs every part at a tiny size on a CPU"),
    ],
)
def test_bad_input_ends_in_one_line(args, message):
    assert message in one_line(gpu, *args)


def test_fill_needs_the_marks(tmp_path):
    path = results(tmp_path / "results.jsonl", {})
    (tmp_path / "docs.md").write_text("nothing")
    with pytest.raises(UserError, match="has no"):
        gpu.fill(gpu.Config(fill=str(path), docs=f"{tmp_path}/docs.md"))
