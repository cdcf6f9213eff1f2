"""What a run is: how a script starts and ends, its device, its folder with settings and log, Ctrl-C, the progress bar.

  A. script    flags in, one line for what the user can mend
  B. device    which one, and in which precision
  C. folder    files that are whole at every moment; one writer; config.json, metrics.jsonl
  D. the loop  Ctrl-C between two steps, the bar

Every script ends with `run_script(main, Config, __doc__)`. Nothing in this file knows the method.
"""

import contextlib
import ctypes
import errno
import importlib.util
import itertools
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

import distributed
from flags import UserError, read_flags, script

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

# ---------------------------------------------------------------------------------------------------------------------
# A. The script


def run_script(
    main: Callable[[Any], Any], Config: type, doc: str | None, defaults: Callable[[], Any] | None = None
) -> None:
    """Read the flags and run `main`. A UserError, or what the file system refuses, ends in one line and exit code 1.

    defaults: gives the Config that the flags change, where its defaults depend on the command line itself.
    """
    try:
        with claims(), lasting_output():
            main(read_flags(Config, doc, sys.argv[1:], defaults))
    except UserError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of GPU memory, try a smaller B, T or C ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        sys.exit("interrupted: what was saved before is whole")


class Lasting:
    """A stream to which nothing more is written once its reader, or the terminal, is gone."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.gone = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.unless_gone(self.stream.write, text) or 0

    def flush(self) -> None:
        self.unless_gone(self.stream.flush)

    def unless_gone(self, method: Callable, *args) -> Any:
        if not self.gone:
            try:
                return method(*args)
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):
                    raise
                self.gone = True


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, no run ends because of what it prints: a character that cannot be shown, or nobody who reads."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    with contextlib.redirect_stdout(output := Lasting(sys.stdout)):
        yield
    if output.gone:  # what is still in its buffer would fail when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.stream.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# B. Device


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one. UserError for a device that torch does not know or this machine lacks."""
    # Before a GPU is used: what is freed there then serves requests of any size. The published step needs that.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=name).item()
        device = torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device={name}: cannot be used here ({str(error).splitlines()[0]})") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are the current one's
    return device


def check_processes(B: int, shard: bool) -> int:
    """The number of processes. UserError if they cannot share a batch of B rows, or if one would shard Gamma."""
    n = distributed.world()
    if B % n:
        raise UserError(f"B={B}: must be a multiple of the {n} processes")
    if shard and n == 1:
        raise UserError("shard=True: one process has nothing to divide Gamma over; start several with torchrun")
    return n


def bf16(device: torch.device) -> bool:
    """Whether to compute in bf16 here: on a GPU that has it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 autocast where `bf16` says so; elsewhere nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16(device))


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same on the device. To a GPU from pinned memory, as the host would wait there for the GPU otherwise."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


COMPILING_PAYS = 3_000  # steps of the default run on a CPU that earn back the minutes that compiling takes
COMPILING_PAYS_MINUTES = 6.0  # and what they take


def wants_compile(
    wanted: bool | Literal["auto"], device: torch.device, steps: int, minutes: float = 0.0, graphed: bool = False
) -> bool:
    """--compile resolved: `auto` compiles large steps on a GPU, or a long run on a CPU, if a compiler works.

    A line says why. minutes: of a run that is measured in them, and not in steps. graphed: what `wants_graph` said; a
    replayed step is fast without a compiler.
    """
    if wanted is False or wanted == "auto" and graphed:
        return False
    short = minutes < COMPILING_PAYS_MINUTES if minutes else steps < COMPILING_PAYS
    if wanted == "auto" and device.type == "cpu" and short:
        print("compile: off, compiling would take longer than it saves in so short a run; --compile=True forces it")
        return False
    try:
        torch.compile(lambda x: x.sin() + x)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler surfaces as one of many types
        why = (str(error).splitlines() or [type(error).__name__])[0]
        if wanted is True:
            raise UserError(f"compile=True: no working compiler here ({why})") from error
        print(f"compile: no working compiler ({why}): running eagerly, slower but the same")
        return False
    print("compile: on, the first step takes a minute or two")
    return True


def compiled(function: Callable, recomputes: bool = False) -> Callable:
    """torch.compile for one shape. On a CPU, where a small step is a thousand short calls, C++ makes them.

    recomputes: the function recomputes attention in its backward pass, which that C++ cannot (PyTorch 2.13).
    """
    if torch.cuda.is_available():
        return torch.compile(function, dynamic=False)
    keep_freed_memory()
    return torch.compile(function, dynamic=False, options=None if recomputes else {"cpp_wrapper": True})


GRAPHED_SHARE = 0.1  # of a GPU's memory: a replayed step keeps what it needs for itself, also between two steps


def can_graph(wanted: bool | Literal["auto"], device: torch.device, processes: int) -> bool:
    """Whether a step can be replayed here. UserError if it is wanted and cannot be."""
    possible = device.type == "cuda" and processes == 1
    if wanted is True and not possible:
        raise UserError("graph=True: a step is replayed on one GPU, in one process")
    return possible


def wants_graph(wanted: bool | Literal["auto"], device: torch.device, processes: int, step_bytes: int) -> bool:
    """--graph resolved: `auto` replays small steps on one GPU, which otherwise wait for the host to launch kernels."""
    if not can_graph(wanted, device, processes) or wanted is False:
        return False
    if wanted == "auto" and step_bytes >= GRAPHED_SHARE * torch.cuda.get_device_properties(device).total_memory:
        return False
    print("graph: on, from its third call a step is replayed as one CUDA graph; --graph=False launches every kernel")
    return True


class Graphed:
    """A function of tensors on a GPU, replayed as a CUDA graph: all its kernels at once, without a line of Python.

    The function must do the same in every call, read nothing back and use tensors that stay where they are. It is
    called twice, then recorded. What a replay returns, and the gradients it leaves, are written over by the next one:
    nobody else may replace a gradient, as `zero_grad` does. generator: what it draws from.
    """

    def __init__(self, function: Callable[..., Any], generator: torch.Generator) -> None:
        self.function, self.generator, self.calls = function, generator, 0
        self.stream = torch.cuda.Stream(generator.device)
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, *args: torch.Tensor) -> Any:
        self.calls += 1
        if self.calls <= 2:  # on the stream that records: what autograd keeps between calls belongs to a stream
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                found = self.function(*args)
            torch.cuda.current_stream().wait_stream(self.stream)
            return found
        if self.calls == 3:
            self.args = [arg.clone() for arg in args]
            self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.found = self.function(*self.args)
        for mine, arg in zip(self.args, args):
            mine.copy_(arg)
        self.graph.replay()
        return self.found


def keep_freed_memory() -> None:
    """Ask glibc, where that is the C library, to keep what a step frees for the next one.

    Handing it back and getting it anew costs 5 to 10 % of a step on a CPU in page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most it takes


# ---------------------------------------------------------------------------------------------------------------------
# C. The folder


def settle(path: Path) -> None:
    """Wait until the file, or the list of names in a folder, is on the disk and would survive a power cut."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():  # Windows opens no folder
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the file system name the file; of a full disk they do not by themselves."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` when the block ends well: `path` is whole, old or new, always."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            yield temporary
            settle(temporary)  # before the rename, or a power cut could leave the new name on an empty file
            os.replace(temporary, path)
            settle(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """The file, whole or not at all, in UTF-8."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


LOCK = ".lock"  # in a folder that is being written; it holds who does
claimed: dict[Path, int] = {}  # the locks of this process: their paths and open files


def claim(folder: Path, beside: bool = False, wait: bool = False) -> None:
    """Make the folder, if need be, and be its only writer, until the block of `claims` around this ends.

    beside: the lock lies beside the folder, which is then not made. wait: for another process to be done with it.
    UserError if another one writes to it. The lock is the system's, so that it ends with its process, however that
    ends; a line says so when a file is left of one that is gone.
    """
    lock = (folder.with_name(folder.name + LOCK) if beside else folder / LOCK).absolute()
    if lock in claimed:
        return
    told = False
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # another process has just removed the empty folder
        got = lock_file(handle)
        owner = os.read(handle, 1000).decode("utf-8", "replace").strip() if got or os.name != "nt" else "another one"
        with contextlib.suppress(FileNotFoundError):
            if got and os.path.samestat(os.fstat(handle), os.stat(lock)):
                break
        os.close(handle)  # another process has it, or has just removed it
        if not got and not wait:
            raise UserError(f"{folder} is being written by {owner}: wait until it is done, or name another folder")
        if not got and not told:
            print(f"{folder} is being written by {owner}: waiting until it is done")
            told = True
        time.sleep(0.2)
    if owner:
        print(f"{folder}: {owner}, which was writing there, is gone: going on in its place")
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {platform.node()}, since {time.ctime()}".encode(), 0)
    claimed[lock] = handle


def lock_file(handle: int) -> bool:
    """Whether this process now holds the file alone. Where a file system knows no locks nobody is kept out."""
    try:
        if fcntl is None:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
    return True


@contextlib.contextmanager
def claims() -> Iterator[None]:
    """What is claimed inside is free again afterwards; also a decorator."""
    before = set(claimed)
    try:
        yield
    finally:
        for lock in set(claimed) - before:
            lock.unlink(missing_ok=True)
            os.close(claimed.pop(lock))
            with contextlib.suppress(OSError):  # it is not empty, as it should be
                lock.parent.rmdir()


def entries(folder: Path) -> list[str]:
    """What is in the folder, beside a lock."""
    return [path.name for path in folder.iterdir() if path.name != LOCK]


def new_folder(out: str, usual: Path | None = None) -> Path:
    """The folder of a new run, claimed: `out`, in which nothing may be yet, or without it `usual`, usual-2, ..."""
    if out:
        folder = Path(out)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"out={out} is not an empty folder: give another one")
        claim(folder)
        if entries(folder):
            unfinished = (folder / "state.pt").exists() or not (folder / "checkpoint.pt").exists()
            go_on = f", or go on with --resume={out}" if (folder / "config.json").exists() and unfinished else ""
            raise UserError(f"out={out} is not an empty folder: give another one{go_on}")
        return folder
    for n in itertools.count(1):
        folder = usual if n == 1 else usual.with_name(f"{usual.name}-{n}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)  # by one of two processes only
            claim(folder)
            return folder


def is_run_folder(folder: Path) -> bool:
    """Whether `write_config` has written there."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"command", "commit", "hardware", "versions"} <= config.keys()


def write_config(folder: Path, config: Any, device: torch.device) -> None:
    """The folder, and in it config.json: every setting, command, commit, versions, the hardware by its name.

    By the first process alone.
    """
    if distributed.rank() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(commit, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""  # no git
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    about = {
        "command": command(),
        "commit": commit,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "versions": {"python": platform.python_version()}
        | {p: metadata.version(p) for p in ("torch", "numpy", "tiktoken")},
    }
    write_text(folder / "config.json", json.dumps(asdict(config) | about, indent=2) + "\n")


def command() -> str:
    """The command line of this process, without the path of the script."""
    return f"{script()} {shlex.join(sys.argv[1:])}".strip()


def check_wandb(project: str) -> None:
    """UserError if a run is to be mirrored and cannot be."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(f"wandb={project}: wandb is not installed; metrics.jsonl has the same numbers")


class Log:
    """metrics.jsonl of a run in the first process, from `step` on, and its mirror; a context manager.

    A row is a flat object. It is on the disk before any checkpoint that counts it as written.
    """

    def __init__(self, folder: Path, step: int, config: Any = None) -> None:
        self.path, self.mirror = folder / "metrics.jsonl", None
        self.writes = distributed.rank() == 0
        if self.writes:
            rows = read_log(folder, step) if self.path.exists() else []  # those that the checkpoint knows of
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        if self.writes and getattr(config, "wandb", ""):
            import wandb

            self.mirror = wandb.init(project=config.wandb, name=folder.name, dir=folder, config=asdict(config))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        if self.mirror:
            self.mirror.finish()

    def __call__(self, row: dict[str, float]) -> None:
        if self.writes:
            with naming(self.path), open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        if self.mirror:
            self.mirror.log(row, step=row["step"])


def read_log(folder: Path, steps: float = math.inf) -> list[dict[str, float]]:
    """The rows of metrics.jsonl before `steps`; a last line that a crash cut short is left out."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if row["step"] < steps]


# ---------------------------------------------------------------------------------------------------------------------
# D. The loop


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C, SIGTERM or SIGHUP only makes the function it gives return True: no step is ever cut in half.

    A second Ctrl-C raises. SIGHUP is what a closed terminal sends; under nohup it is ignored as before.
    """
    hit = False

    def on_signal(number, frame):
        nonlocal hit
        if hit and number == signal.SIGINT:
            raise KeyboardInterrupt
        hit = True

    heard = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        heard.append(signal.SIGHUP)
    before = {number: signal.signal(number, on_signal) for number in heard}
    try:
        yield lambda: hit
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse_non_finite(row: dict[str, float], learning: list[torch.Tensor], lr: str) -> None:
    """UserError if a loss, or a weight that learns, is not finite: nothing of it is saved. Called by all processes."""
    bad = [f"the {name} loss is {value}" for name, value in row.items() if not math.isfinite(value)]
    if distributed.any_of(not all(distributed.local(weight).isfinite().all() for weight in learning)):
        bad.append("a weight is not finite")
    if bad:
        raise UserError(f"{bad[0]} at step {row['step']}: try a smaller lr than {lr}")


TIMED = 10  # steps at least that are timed for --minutes
TIMED_SHARE = 0.02  # of the minutes, for which steps are timed,
TIMED_SECONDS = 20.0  # but no longer than this


def steps_that_fit(
    minutes: float, began: float, step: Callable[[], object], clock: Callable[[], float] = time.time
) -> int:
    """The steps that end `minutes` after `began`, for --minutes: by the mean time of some, the first of which compile.

    step: takes one and waits for its end. In several processes the first one decides. UserError if not one fits.
    """

    def seconds(n: int) -> float:
        start = clock()
        for _ in range(n):
            step()
        return distributed.shared((clock() - start) / n)

    seconds(3)  # compiles, and fills caches
    a_step = max(seconds(TIMED), 1e-9)  # a clock may stand still for so long
    if (more := int(min(TIMED_SHARE * 60 * minutes, TIMED_SECONDS) / a_step)) > TIMED:
        a_step = seconds(more)
    gone = distributed.shared(clock() - began)
    n = min(int((60 * minutes - gone) / a_step), 2**62)
    if n < 1:
        raise UserError(
            f"minutes={minutes:g}: not one step fits: {gone:.1f} s are gone on warming up, compiling and measuring, "
            f"and a step takes {1e3 * a_step:.1f} ms"
        )
    print(f"minutes: {1e3 * a_step:.1f} ms a step: {n:,} steps in what is left of {minutes:g} minutes")
    return n


def progress_bar(start: int, steps: int, name: str) -> tqdm:
    """A bar with the time left; in a log file a line every half minute."""
    often = 0.5 if sys.stderr.isatty() else 30
    return tqdm(
        range(start, steps), disable=distributed.rank() > 0, initial=start, total=steps, desc=name, mininterval=often,
        dynamic_ncols=True,
    )  # fmt: skip
