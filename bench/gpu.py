"""The tables of docs/speed.md that a GPU fills, in one command.

    python -m bench.gpu --minutes=25                       # all parts; results in out/gpu as soon as they are there
    python -m bench.gpu --minutes=9 --parts=a,b            # some; results of earlier calls stay
    python -m bench.gpu --fill=out/gpu/results.jsonl       # write what was measured into docs/speed.md
    python -m bench.gpu --tiny=True --minutes=5            # every part at a tiny size, on a CPU too

  a  the tests marked `gpu`: the step on a GPU is that of the CPU, also in bf16, compiled and resumed
  b  a step of `paper4`, `pile2`, `default`: time, MFU, memory, shares of its parts, naive step, largest batch
  c  the evaluation and the report at the size of `paper4`
  d  `--scale=gpu` on local text: the target for 3 minutes, the decomposition for 8, its table and report
  e  a profile of one step: kernels, gaps, the ten most expensive

Each task is a process of its own with a time limit, so that none can spoil the next. A part that is early leaves its
time to the others, and what a part had no time for is tried again at the end. Writes <out>/results.jsonl (a line a
task; the last one of a name counts), results.md and a log of each task.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import checkpoints
import data
import decompose
import eval as evaluation
import flags
import run
import train_target
from bench import plan
from bench import step as bench
from bench.naive import NaiveVPD
from flags import UserError
from model import GPT, GPTConfig

SHARE = {"a": 3.0, "b": 9.0, "c": 2.0, "d": 9.5, "e": 1.5}  # of the minutes, of all parts
TARGET_MINUTES, DECOMPOSE_MINUTES, AFTERWARDS = 3.0, 8.0, 1.5  # of part d, where there is time for that
LEAST = 20.0  # seconds: a task is not begun with less
BEGIN, END = "<!-- bench.gpu --fill writes from here -->", "<!-- to here -->"  # in docs/speed.md
NOT_YET = "not measured yet"


@dataclass(frozen=True)
class Config:
    minutes: float = 25.0  # of all parts together
    parts: str = "a,b,c,d,e"  # in this order
    out: str = "out/gpu"  # folder of the results
    fill: str = ""  # write the tables of this results.jsonl into `docs`, and do nothing else
    docs: str = "docs/speed.md"
    tiny: bool = False  # tiny sizes, on any device
    dataset: str = "stdlib"  # local text of part d
    data_dir: str = "data"  # where token files are kept
    task: str = ""  # do this task in this process: how each of them is started
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        flags.require(self, "above 0", "minutes")
        if not set(self.parts.split(",")) <= set(SHARE):
            raise UserError(f"parts={self.parts!r}: must be some of {','.join(SHARE)}, as in a,b")
        if self.task and self.task not in TASKS:
            raise UserError(f"task={self.task!r}: must be one of {', '.join(TASKS)}")


# ---------------------------------------------------------------------------------------------------------------------
# A. Tests


def tests(config: Config, device: torch.device) -> dict:
    """Outcome of each test marked `gpu`, its seconds, why it failed or was skipped, and how far off it was."""
    xml, root = Path(config.out).absolute() / "tests.xml", Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-q", f"--junitxml={xml}"]
    subprocess.run(command, cwd=root)
    found = {}
    for case in ET.parse(xml).iter("testcase"):
        bad = next((child for kind in ("failure", "error", "skipped") for child in case.iter(kind)), None)
        about = {"outcome": "passed" if bad is None else bad.tag, "seconds": float(case.get("time", 0))}
        about |= {} if bad is None else {"message": bad.get("message", "").splitlines()[0][:300]}
        found[case.get("name")] = about | {p.get("name"): p.get("value") for p in case.iter("property")}
    return {"tests": found}


# ---------------------------------------------------------------------------------------------------------------------
# B. A step


def sized(config: Config, size: str, **changes) -> bench.Config:
    """The size, or with --tiny one like it that takes a CPU no time."""
    small = dict(scale=0.02, B=2, T=8, steps=2) if config.tiny else {}
    return bench.Config(**dict(size=size, naive=False, shares=False, device=config.device) | small | changes)


# How decompose.py takes a step of a size on a GPU, when --compile and --graph are `auto`: (compiled, replayed).
AS_RUN = {"default": (False, True), "pile2": (True, False), "paper4": (True, False)}


def timed(size: str, config: Config, device: torch.device, how: tuple[bool, bool] | None = None, **changes) -> dict:
    """What bench.step measures, of a step that is taken as decompose.py does it, or as `how` says."""
    compiled, graphed = AS_RUN[size] if how is None else how
    b = sized(config, size, **changes)
    return bench.measure(b, *bench.sizes(b), compiled and not config.tiny, device, graphed and device.type == "cuda")


def beside_naive(size: str, config: Config, device: torch.device) -> dict:
    """The naive step beside ours, and the parts of ours, at the largest batch of B, B/2, ... where all of it fits."""
    b = sized(config, size)
    settings, gpt = bench.sizes(b)
    for B in (settings.B >> i for i in range(settings.B.bit_length())):
        try:
            c = replace(settings, B=B)
            checkpoint = {"gpt": asdict(gpt), "model": GPT(gpt).state_dict()}
            x = torch.zeros((B, c.T), dtype=torch.long, device=device)
            (ours, _), (other, _) = (decompose.build(c, checkpoint, device) for _ in range(2))
            naive = NaiveVPD(other.decomposition, other.ci_fn, c, (B, c.T), device)
            with_parts = torch.empty((6, *ours.adversary.r.shape), device=device)  # what they hold more than a step
            ours.train_step(x), naive.train_step(x)
            break
        except torch.OutOfMemoryError:
            pass
        finally:
            ours = other = naive = with_parts = None  # noqa: F841
            free()
    return timed(size, config, device, naive=True, shares=True, B=B)


def largest_batch(size: str, config: Config, device: torch.device) -> dict:
    """The largest batch of a compiled step that ran, from the size's own up; the first one that did not."""
    b, fitted, failed = sized(config, size), {}, 0
    settings, gpt = bench.sizes(b)
    B, all_of_it = settings.B, torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    while len(fitted) < 4 and B > max(fitted, default=0) and B != failed:
        try:
            c = replace(settings, B=B)
            vpd, _ = decompose.build(
                c, {"gpt": asdict(gpt), "model": GPT(gpt).state_dict()}, device, compiled=not config.tiny
            )
            x = torch.zeros((B, c.T), dtype=torch.long, device=device)
            peak = max(bench.peak_bytes(lambda: vpd.train_step(x), device) for _ in range(2))
            held = torch.cuda.memory_allocated(device) if all_of_it else 0
            fitted[B] = held + peak
            B = max(B + 1, int(0.97 * B * all_of_it / fitted[B]) // 4 * 4) if all_of_it else 2 * B
        except torch.OutOfMemoryError:
            failed = B
            B = (B + max(fitted, default=0)) // 8 * 4  # half way, a multiple of 4
        finally:
            vpd = x = None
            torch.compiler.reset()
            free()
    return {"size": size, "T": settings.T, "largest_B": max(fitted, default=0), "bytes": fitted, "too_large_B": failed}


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# C. Evaluation


def made_up_corpus(vocab: int, n: int) -> data.Corpus:
    """n tokens of validation text, drawn with weights 1/1, 1/2, ...; a vocabulary of bytes and of pairs of them."""
    ranks = {bytes([i]): i for i in range(256)} | {bytes(divmod(i, 256)): 256 + i for i in range(vocab - 256)}
    encoding = tiktoken.Encoding("made up", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    rng, p = np.random.default_rng(0), 1 / np.arange(1, vocab + 1)
    tokens = rng.choice(vocab, n, p=p / p.sum()).astype(np.uint16)
    return data.Corpus("made-up", {"train": tokens, "val": tokens}, encoding, "made up")


@torch.no_grad()
def made_up_run(folder: Path, settings: decompose.Config, gpt: GPTConfig, corpus: data.Corpus, device) -> Any:
    """An untrained run whose Gamma is as sparse as the published one: 26 % live, at 0.1 to 10 % of positions each."""
    vpd, _ = decompose.build(settings, {"gpt": asdict(gpt), "model": GPT(gpt).state_dict()}, device)
    z = vpd.ci_fn(vpd.decomposition.target_pass(corpus.batch("val", 0, 4, settings.T)[:, :-1].to(device))[1])
    z, generator = z.flatten(0, 1).float(), torch.Generator().manual_seed(0)
    share = 10 ** (-1 - 2 * torch.rand(z.shape[1], generator=generator))
    at = (share * len(z)).long().to(device)
    threshold = torch.cat([one.sort(0, descending=True).values.gather(0, at[None, i : i + one.shape[1]])[0]
                           for i, one in zip(range(0, z.shape[1], 1024), z.split(1024, 1))])  # fmt: skip
    dead = (torch.rand(z.shape[1], generator=generator) > 0.26).to(device)
    vpd.ci_fn.out.bias -= threshold + 1e9 * dead
    checkpoint = {"target": {"seconds": 0.0, "curve": [[1, 10.0], [2, 9.0]]}, "seconds": 0.0}
    return evaluation.Run(folder, asdict(settings), checkpoint, vpd.decomposition, vpd.ci_fn)


def evaluated(config: Config, device: torch.device) -> dict:
    """Seconds and peak memory of eval.py's numbers on 64 windows and of the report on 131,072 tokens."""
    from studies import report  # as decompose.py does

    settings, gpt = bench.sizes(sized(config, "paper4"))
    settings = replace(settings, eval_windows=2 if config.tiny else settings.eval_windows)
    gpt = replace(gpt, vocab_size=max(300, gpt.vocab_size))
    folder = Path(config.out) / "made-up"
    folder.mkdir(parents=True, exist_ok=True)
    corpus = made_up_corpus(gpt.vocab_size, 2_000 if config.tiny else 400_000)
    opened, m = made_up_run(folder, settings, gpt, corpus, device), {"size": "paper4"}
    steps = "1" if config.tiny else "20,80"
    for name, call in {
        "evaluation": lambda: evaluation.evaluate(
            opened, corpus, evaluation.Config("", windows=settings.eval_windows, adv_steps=steps)
        ),
        "report": lambda: report.report(
            opened, corpus, report.Config("", tokens=64 if config.tiny else settings.report_tokens, out=str(folder))
        ),
    }.items():
        result: list = []
        m[f"{name}_s"] = bench.seconds(lambda: result.append(call()), device)
        if device.type == "cuda":
            m[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        if name == "evaluation":
            m |= {"live": result[0][0]["live"]["total"], "l0": result[0][0]["l0"]["total"]}
        record(config, "evaluation", m)  # the report may take longer than there is time
    return m


# ---------------------------------------------------------------------------------------------------------------------
# D. A run


def minutes_of_d(config: Config) -> tuple[float, float]:
    """Of the target and of the decomposition, in what this task may take: both of them, their ends included."""
    share = min(1.0, max(0.0, config.minutes - AFTERWARDS) / (TARGET_MINUTES + DECOMPOSE_MINUTES))
    return share * TARGET_MINUTES, share * DECOMPOSE_MINUTES


def whole_run(config: Config, device: torch.device) -> dict:
    """A target of scale `gpu`, as many steps as end in its minutes, and its decomposition."""
    scale, out = "tiny" if config.tiny else "gpu", Path(config.out) / f"run-{time.strftime('%m%d-%H%M%S')}"
    of_target, of_decomposition = minutes_of_d(config)
    where = dict(dataset=config.dataset, data_dir=config.data_dir, device=config.device)
    target = train_target.Config(**where, scale=scale, **train_target.SCALES[scale])
    few, more = (1, 2) if config.tiny else (20, 80)
    trial = lambda n: train_target.main(replace(target, steps=n, out=str(out / f"trial-{n}")))
    data.load(config.dataset, config.data_dir, target.max_tokens)  # tokenised before anything is timed
    began = [bench.seconds(lambda n=n: trial(n), device) for n in (few, more)]
    a_step = max(1e-4, (began[1] - began[0]) / (more - few))
    steps = 3 if config.tiny else max(1, int(60 * of_target / a_step))
    folder = train_target.main(replace(target, steps=steps, out=str(out / "target")))
    seconds = checkpoints.load_checkpoint(folder / "checkpoint.pt", "target")["seconds"]
    m = {"target_steps": steps, "target_s": seconds, "target_val_ce": run.read_log(folder)[-1]["val_ce"]}
    m |= {"scale": scale, "run": str(out / "vpd")}
    record(config, "run", m)
    c = decompose.Config(**where, scale=scale, **decompose.SCALES[scale])
    c = replace(c, target=str(folder), out=str(out / "vpd"), minutes=0.0 if config.tiny else of_decomposition)
    decompose.main(replace(c, steps=3) if config.tiny else c)
    metrics = json.loads((out / "vpd" / "metrics.json").read_text())
    settings = json.loads((out / "vpd" / "config.json").read_text())
    m |= {"steps": settings["steps"], "decompose_s": metrics["seconds"]["decompose"]}
    m |= {"eval_s": metrics["seconds"]["eval"]}
    m |= {"l0": metrics["l0"]["total"], "live": metrics["live"]["total"], "C": metrics["live"]["C"]}
    return m | {"kl": metrics["kl"], "ce": metrics["ce"], "report": (out / "vpd" / "report.html").exists()}


# ---------------------------------------------------------------------------------------------------------------------
# E. A profile


def kernels(spans: list[tuple[str, float, float]]) -> dict:
    """Of (name, begin, end): how many, the time that any runs, the gaps between them, the ten most expensive names."""
    total, busy, end = {}, 0.0, -float("inf")
    for name, b, e in sorted(spans, key=lambda span: span[1:]):
        busy += max(0.0, e - max(b, end))
        end = max(end, e)
        calls, time_of = total.get(name, (0, 0.0))
        total[name] = calls + 1, time_of + e - b
    first = min((b for _, b, _ in spans), default=0.0)
    top = sorted(total.items(), key=lambda item: -item[1][1])[:10]
    gaps = end - first - busy if spans else 0.0
    return {"kernels": len(spans), "names": len(total), "busy": busy, "gaps": gaps, "top": [[n, *of] for n, of in top]}


def profiled(size: str, config: Config, device: torch.device) -> dict:
    """One step as decompose.py takes it: its kernels, in ms; on a CPU its operations, each without those inside it."""
    settings, gpt = bench.sizes(sized(config, size))
    checkpoint = {"gpt": asdict(gpt), "model": GPT(gpt).state_dict()}
    (compiled, graphed), on_gpu = AS_RUN[size], device.type == "cuda"
    vpd, _ = decompose.build(settings, checkpoint, device, compiled and not config.tiny, graphed and on_gpu)
    x = torch.zeros((settings.B, settings.T), dtype=torch.long, device=device)
    for _ in range(3):
        vpd.train_step(x)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        bench.seconds(lambda: vpd.train_step(x), device)
    events = [e for e in found.events() if (e.device_type == DeviceType.CUDA) == on_gpu]
    leaves = [e for e in events if on_gpu or not e.cpu_children]
    spans = [(e.name, e.time_range.start / 1e3, e.time_range.end / 1e3) for e in leaves]
    return {"size": size, "B": settings.B, "T": settings.T} | kernels(spans)


# ---------------------------------------------------------------------------------------------------------------------
# F. One after the other


@dataclass(frozen=True)
class Task:
    part: str
    seconds: float  # at most
    call: Callable[[Config, torch.device], dict]


# By value: what is first is done first.
TASKS = {"tests": Task("a", 420, tests)}
for _size in ("paper4", "pile2", "default"):
    TASKS[f"step {_size}"] = Task("b", 240, partial(timed, _size))
for _size in ("paper4", "pile2", "default"):
    TASKS[f"naive {_size}"] = Task("b", 240, partial(beside_naive, _size))
    TASKS[f"eager {_size}"] = Task("b", 120, partial(timed, _size, how=(False, False)))
TASKS["both default"] = Task("b", 240, partial(timed, "default", how=(True, True)))
for _size in ("paper4", "pile2"):
    TASKS[f"largest {_size}"] = Task("b", 300, partial(largest_batch, _size))
TASKS["evaluation"] = Task("c", 300, evaluated)
TASKS["run"] = Task("d", 60 * (TARGET_MINUTES + DECOMPOSE_MINUTES + 2 * AFTERWARDS), whole_run)
TASKS |= {f"profile {_size}": Task("e", 200, partial(profiled, _size)) for _size in ("paper4", "default")}


def record(config: Config, task: str, values: dict) -> None:
    """A line of results.jsonl, on the disk at once; then results.md, of all lines."""
    about = {"part": TASKS[task].part, "task": task, "command": run.command(), "torch": torch.__version__}
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    path = Path(config.out) / "results.jsonl"
    with open(path, "a") as file:
        file.write(json.dumps(about | values) + "\n")
        file.flush()
        os.fsync(file.fileno())
    run.write_text(path.with_suffix(".md"), tables(read(path)) + "\n")


def read(path: Path) -> dict[str, dict]:
    """The last result of each task; one that failed does not replace what was measured before. UserError if foreign."""
    found: dict[str, dict] = {}
    try:
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if "error" not in row or "error" in found.get(row["task"], {"error": ""}):
                found[row["task"]] = row
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no results.jsonl of bench.gpu ({type(error).__name__}: {error})") from error
    return found


def attempt(config: Config, task: str, seconds: float) -> str:
    """The task in a process of its own, for so many seconds at most; "" or why it failed."""
    root = Path(__file__).parent.parent
    log, child = Path(config.out) / f"{task.replace(' ', '-')}.log", replace(config, task=task, minutes=seconds / 60)
    args = [f"--{name}={value}" for name, value in asdict(child).items() if value != ""]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu", *args], stdout=file, stderr=file, start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.getenv("PYTHONPATH")]))},
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
                process.wait()
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return "" if code == 0 else f"stopped after {seconds:.0f} s" if code is None else f"exit code {code}: {said[:300]}"


def everything(config: Config) -> None:
    """All tasks of the parts, by the clock."""
    folder = Path(config.out)
    if folder.exists() and any(folder.iterdir()) and not (folder / "results.jsonl").exists():
        raise UserError(f"out={folder} is neither empty nor of bench.gpu: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the task that runs ends too
    parts, began = config.parts.split(","), time.monotonic()
    end = began + 60 * config.minutes
    by = dict(zip(parts, np.cumsum([SHARE[part] for part in parts]) / sum(SHARE[part] for part in parts)))
    late = []
    for last_round in (False, True):
        for task in late if last_round else [t for part in parts for t in TASKS if TASKS[t].part == part]:
            until = end if last_round else began + 60 * config.minutes * by[TASKS[task].part]
            left = min(TASKS[task].seconds, until - time.monotonic())
            if left < (1 if config.tiny else LEAST):
                if last_round:
                    record(config, task, {"error": "no time was left"})
                    print(f"{task}: no time was left", flush=True)
                else:
                    late.append(task)
                continue
            started = time.monotonic()
            error = attempt(config, task, left)
            took = time.monotonic() - started
            if error:
                record(config, task, {"error": error, "seconds": took})
            print(f"{task}: {error or 'done'}, {took:.0f} s", flush=True)
    print(f"written: {config.out}/results.jsonl, {config.out}/results.md")


# ---------------------------------------------------------------------------------------------------------------------
# G. Tables


def step_rows(found: dict[str, dict], counts: dict[str, str]) -> list[str]:
    """Markdown of part b; counts: a text a size."""
    columns = ["size", "ms a step (compiled and replayed; eager)", "tokens/s", "MFU"]
    columns += ["peak GB: launched (eager), counted eager", "naive: our speed, our memory", "largest batch"]
    lines = [f"| {' | '.join(columns + ['counted'] * bool(counts))} |"]
    lines.append("|---" * (7 + bool(counts)) + "|")
    GB = lambda m: f"{(m['held_bytes'] + m['peak_bytes']) / 1e9:.3g}"
    for size in bench.SIZES:
        step, naive, eager, both, largest = (
            row if (row := found.get(f"{kind} {size}", {"error": NOT_YET})) and "error" not in row else None
            for kind in ("step", "naive", "eager", "both", "largest")
        )
        ms = lambda m: f"{1e3 * m['step_s']:.3g}" if m else "–"
        cells = [NOT_YET, "", "", "", "", ""]
        if step:
            cells[0] = f"{ms(step)} ({ms(both)}; {ms(eager)})"
            cells[1] = f"{step['tokens_per_s']:,.0f}"
            cells[2] = f"{step['mfu']:.0%}" if step["mfu"] >= 0.01 else "below 1%"
            counted = (step["held_bytes"] + step["counted_peak_bytes"]) / 1e9
            cells[3] = f"{GB(step)} ({GB(eager) if eager else '–'}), {counted:.3g}"
        if naive:
            share = f"{naive['peak_bytes'] / naive['naive_peak_bytes']:.0%}"
            cells[4] = f"{naive['times_as_fast']:.1f} ×, {share}, at {naive['B']} × {naive['T']}"
        if largest:
            cells[5] = f"{largest['largest_B']} × {largest['T']}"
        lines.append("| " + " | ".join([f"`{size}`", *cells, *([counts[size]] if counts else [])]) + " |")
    return lines


def shares_rows(found: dict[str, dict]) -> list[str]:
    measured = {size: m for size in bench.SIZES if (m := found.get(f"naive {size}", {})).get("parts")}
    if not measured:
        return []
    lines = ["", "| part of a step | " + " | ".join(f"`{size}`" for size in measured) + " |"]
    lines.append("|---" * (1 + len(measured)) + "|")
    for i, name in enumerate(next(iter(measured.values()))["parts"]):
        shares = (f"{list(m['parts'].values())[i] / m['step_s']:.0%}" for m in measured.values())
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return lines


def other_rows(found: dict[str, dict]) -> list[str]:
    """Parts a, c, d and e, a line each."""

    def said(task: str, text: Callable[[dict], str]) -> str:
        m = found.get(task, {"error": NOT_YET})
        return m["error"] if "error" in m else text(m)

    def of_tests(m: dict) -> str:
        outcomes = [about["outcome"] for about in m["tests"].values()]
        bad = [f"{n}: {about.get('message', '')}" for n, about in m["tests"].items() if about["outcome"] != "passed"]
        return "; ".join([f"{outcomes.count('passed')} of {len(outcomes)} passed", *bad])

    def of_run(m: dict) -> str:
        target = f"target: {m['target_steps']:,} steps in {m['target_s']:.0f} s, CE {m['target_val_ce']:.3f}"
        if "steps" not in m:
            return f"{target}; decomposition: {NOT_YET}"
        kl = ", ".join(f"{mode} {m['kl'][mode]:.3f}" for mode in ("stochastic", "rounded_0.0"))
        return f"{target}; {m['steps']:,} steps in {m['decompose_s']:.0f} s, L0 {m['l0']:.1f} of {m['C']:,}, KL {kl}"

    def of_profile(m: dict) -> str:
        return f"{m['kernels']:,} kernels, {m['busy']:.1f} ms of them and {m['gaps']:.1f} ms of gaps"

    rows = {
        "tests marked `gpu`": said("tests", of_tests),
        "evaluation and report, `paper4`": said(
            "evaluation", lambda m: f"{m['evaluation_s']:.0f} s, {m['report_s']:.0f} s" if "report_s" in m
            else f"{m['evaluation_s']:.0f} s, {NOT_YET}",
        ),
        "a run of `--scale=gpu`": said("run", of_run),
        **{f"profile, `{size}`": said(f"profile {size}", of_profile) for size in ("paper4", "default")},
    }  # fmt: skip
    lines = ["", "| | |", "|---|---|", *(f"| {name} | {text.replace('|', '/')} |" for name, text in rows.items())]
    off = {name: about["off"] for name, about in found.get("tests", {}).get("tests", {}).items() if "off" in about}
    if off:
        lines += ["", "| test | relative difference |", "|---|---|"]
        lines += [f"| {name.removeprefix('test_').replace('_', ' ')} | {by} |" for name, by in off.items()]
    for size in ("paper4", "default"):
        if "top" in (m := found.get(f"profile {size}", {})):
            lines += ["", f"| ten most expensive kernels of `{size}` | calls | ms |", "|---|---|---|"]
            lines += [f"| `{name.replace('|', '/')[:80]}` | {calls} | {ms:.2f} |" for name, calls, ms in m["top"]]
    return lines


def tables(found: dict[str, dict], counts: dict[str, str] | None = None) -> str:
    where = [", PyTorch ".join(of) for of in sorted({(m["gpu"], m["torch"]) for m in found.values() if "gpu" in m})]
    where = [f"{'; '.join(where)}; n = 1.", ""] if where else []
    return "\n".join([*where, *step_rows(found, counts or {}), *shares_rows(found), *other_rows(found)])


def counted_sizes() -> dict[str, str]:
    """A step of each size by count, for the table: what it needs, and the floor (bench/plan.py)."""
    found = {}
    for size in bench.SIZES:
        print(f"counting a step of {size} ...", file=sys.stderr)
        settings, gpt = bench.sizes(bench.Config(size))
        whole, parts = plan.counted_step(settings, gpt)
        floors = [1e3 * sum(part.floor(*rates) for part in parts.values()) for rates in plan.SHEETS.values()]
        floors = ", ".join(f"{ms:.3g}" for ms in floors)
        memory = f"{(whole.held + whole.peak) / 1e9:.3g} GB, {whole.flops / 1e12:.3g} TFLOP"
        found[size] = f"{memory}; at least {floors} ms ({', '.join(plan.SHEETS)})"
    return found


def fill(config: Config) -> None:
    """The tables of results.jsonl, with the counts beside them, between the marks of docs/speed.md."""
    found, docs = read(Path(config.fill)), Path(config.docs)
    try:
        text = docs.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"docs={config.docs}: cannot be read ({error.strerror})") from error
    if not 0 <= text.find(BEGIN) < text.find(END):
        raise UserError(f"docs={config.docs}: has no {BEGIN!r} before a {END!r}")
    before, _, after = text.partition(BEGIN)
    run.write_text(docs, f"{before}{BEGIN}\n\n{tables(found, counted_sizes())}\n\n{END}{after.partition(END)[2]}")
    print(f"written: {docs}")


def main(config: Config) -> None:
    if config.fill:
        return fill(config)
    device = run.pick_device(config.device)
    if device.type != "cuda" and not config.tiny:
        raise UserError("there is no GPU here: --tiny=True runs every part at a tiny size on a CPU")
    if not config.task:
        return everything(config)
    record(config, config.task, TASKS[config.task].call(config, device))


if __name__ == "__main__":
    run.run_script(main, Config, __doc__)
