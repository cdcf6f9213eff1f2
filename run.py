"""What a run is: its flags, its device, its folder with settings, log and checkpoints, Ctrl-C and the progress bar.

Every script here begins with `run_script(main, Config, __doc__)`. Nothing in this file knows the method.
"""

import contextlib
import difflib
import io
import itertools
import json
import math
import os
import pickle
import platform
import shlex
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

import distributed


def settle(path: Path) -> None:
    """Wait until the file, or the list of names in a folder, is on the disk and would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` when the block ends well: at every moment `path` is whole, old or new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        settle(temporary)  # before the rename, or a power cut could leave the new name on an empty file
        os.replace(temporary, path)
        settle(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def run_script(
    main: Callable[[Any], None], Config: type, doc: str | None, defaults: Callable[[], Any] | None = None
) -> None:
    """Read the flags, run `main`; a user's mistake (ValueError, OSError) ends with one line on stderr and exit code 1.

    defaults: gives the Config that the flags change, where its defaults depend on the command line itself.
    """
    import tyro

    # Flag conversion off: booleans are written --compile=False, never --no-compile. Append: a flag for a list is given once an item.
    style = (tyro.conf.FlagConversionOff, tyro.conf.PositionalRequiredArgs, tyro.conf.UseAppendAction)
    said = io.StringIO()
    try:

        def parse(**default) -> tuple[Any, list[str]]:
            with contextlib.redirect_stderr(said):
                return tyro.cli(
                    Config, description=doc, config=style, use_underscores=True, return_unknown_args=True, **default
                )

        try:
            config, unknown = parse(**({"default": defaults()} if defaults else {}))
            if hasattr(config, "defaults"):  # the flags go on top of the settings of the run that is resumed
                config, unknown = parse(default=config.defaults())
        except SystemExit as stop:
            if not stop.code:
                raise  # --help
            box = [
                line.strip("\u2502 ") for line in said.getvalue().splitlines()[1:]
            ]  # its first paragraph says what is wrong
            text = " ".join(itertools.takewhile(lambda line: not line.startswith(("\u2500", "\u2570")), box))
            raise ValueError(f"{text}; --help lists the flags") from stop
        if unknown:
            flags = ["--" + field.name for field in fields(Config)]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            raise ValueError(
                f"unknown flag {unknown[0]!r}" + (f": did you mean {near[0]}?" if near else "; --help lists the flags")
            )
        main(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of GPU memory, try a smaller B, T or C ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        sys.exit("interrupted: what was saved before is whole")


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one. ValueError for a device that torch does not know or this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={name}: cannot be used here ({str(error).splitlines()[0]})") from error


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 autocast on a GPU that has it; elsewhere nothing."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16) if bf16 else contextlib.nullcontext()


def save(path: Path, checkpoint: dict) -> None:
    """Save tensors and plain values. OSError, with the old file whole, if it cannot be written."""
    try:
        with written(path) as temporary:
            torch.save(checkpoint, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise OSError(
            f"cannot save {path} ({str(error).splitlines()[0]}); an earlier {path.name} there is still whole"
        ) from error


def load_checkpoint(path: Path, kind: Literal["target", "target in training", "decomposition"]) -> dict:
    """A checkpoint of train_target.py or decompose.py. FileNotFoundError, or ValueError for a broken or foreign file."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"run folder {str(path.parent)!r} does not exist")
    if not path.is_file():
        raise FileNotFoundError(f"run folder {str(path.parent)!r} holds no {path.name}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a whole checkpoint ({str(error).splitlines()[0]})") from error
    found = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
    if found != kind:
        raise ValueError(f"{path} is a checkpoint of kind {found!r}, not {kind!r}")
    return checkpoint


def write_config(folder: Path, config: Any, device: torch.device) -> None:
    """config.json: every setting, the command, versions, and the hardware by its name."""
    about = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "hardware": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version()}
        | {p: metadata.version(p) for p in ("torch", "numpy", "tiktoken")},
    }
    with written(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(asdict(config) | about, indent=2) + "\n")


def resumed_settings(
    folder: Path, file: str, kind: Literal["target in training", "decomposition"], Config: type
) -> Any:
    """The settings of the run to go on with: from its last save, or, if it ended before the first, from config.json."""
    if not (folder / file).exists() and (folder / "config.json").exists():
        saved = json.loads((folder / "config.json").read_text())
    else:
        saved = load_checkpoint(folder / file, kind)["config"]
    values = {f.name: saved[f.name] for f in fields(Config) if f.name in saved}
    return Config(
        **{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()} | {"resume": str(folder)}
    )


def check_unchanged(config: Any, saved: Any, may_change: tuple[str, ...]) -> None:
    """ValueError if a setting other than these differs from the saved run's, as it would be neither run then."""
    for name, value in asdict(saved).items():
        now = getattr(config, name)
        if now != value and name not in may_change:
            raise ValueError(
                f"{name}={now}: the run in {config.resume} has {name}={value}, and on resuming only {', '.join(may_change)} may change"
            )


def log_line(folder: Path, row: dict[str, float]) -> None:
    """Append one flat object to metrics.jsonl. It is on the disk before any checkpoint that counts it as written."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def cut_log(folder: Path, steps: int) -> None:
    """Leave in metrics.jsonl the rows before `steps`, those that the checkpoint knows of."""
    rows = read_log(folder, steps) if (folder / "metrics.jsonl").exists() else []
    with written(folder / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_log(folder: Path, steps: float = math.inf) -> list[dict[str, float]]:
    """The rows of metrics.jsonl before `steps`; a last line that a crash cut short is left out."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if row["step"] < steps]


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C or SIGTERM only makes the function it gives return True, so that a step is never cut in half.

    A second Ctrl-C raises.
    """
    hit = False

    def on_signal(number, frame):
        nonlocal hit
        if hit and number == signal.SIGINT:
            raise KeyboardInterrupt
        hit = True

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: hit
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress_bar(start: int, steps: int, name: str) -> tqdm:
    """A bar with the time left; in a log file a line every half minute."""
    disable = distributed.rank() > 0
    return tqdm(
        range(start, steps),
        disable=disable,
        initial=start,
        total=steps,
        desc=name,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    )
