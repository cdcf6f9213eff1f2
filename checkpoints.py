"""Checkpoints: tensors and plain values, with a kind and a format number; what may change when a run is resumed.

Whatever is missing or does not fit is a UserError that names the file and the key. Nothing here knows the method.
"""

import contextlib
import json
import pickle
import typing
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

import distributed
from flags import UserError, kinds, script
from run import written

FORMAT = 2  # of checkpoint.pt and state.pt; raised when a reader of the older one would go wrong
Kind = Literal["target", "target in training", "decomposition", "decomposition in training", "toy"]


def save(path: Path, kind: Kind, content: dict) -> None:
    """Save tensors and plain values. UserError, with the old file whole, if it cannot be written."""
    try:
        with written(path) as temporary, open(temporary, "wb") as file:
            torch.save(plain({"kind": kind, "format": FORMAT} | content), file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError, behind which the reason is
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        kept = f"; an earlier {path.name} there is still whole" if path.exists() else ""
        raise UserError(f"cannot save {path} ({reason}){kept}") from error


def plain(content: dict) -> dict:
    """The same without `Saved`, which no other code could load."""
    return {key: plain(value) if isinstance(value, dict) else value for key, value in content.items()}


class Saved(dict):
    """What a checkpoint holds; to look up what is missing is a UserError that names it, at any depth.

    So is a tensor that is not finite, at once.
    """

    def __init__(self, path: Path, content: dict, within: str = "") -> None:
        for key, value in content.items():
            if isinstance(value, dict):
                value = Saved(path, value, f"{within}{key}.")
            elif isinstance(value, torch.Tensor) and not value.isfinite().all():
                raise UserError(f"{path} is not whole: {within}{key} is not finite")
            self[key] = value
        self.path, self.within = path, within

    def __missing__(self, key: str) -> None:
        raise UserError(f"{self.path} is not whole: it lacks {f'{self.within}{key}'!r}")


@contextlib.contextmanager
def built_from(path: Path) -> Iterator[None]:
    """Inside, things are built from a checkpoint: what does not fit there is a UserError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if str(path) in str(error):  # of `Saved`
            raise
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{path} is not whole ({kind}{' '.join(str(error).split())[:300]})") from error


def load_into(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """load_state_dict, with a TypeError for a tensor of another type. float32 and float64 may stand for each other."""
    for name, own in module.state_dict().items():
        types = {own.dtype, state[name].dtype if name in state else own.dtype}
        if len(types) == 2 and types != {torch.float32, torch.float64}:
            raise TypeError(f"{name} is {state[name].dtype}, not {own.dtype}")
    module.load_state_dict(state)


def settings(Config: type, saved: dict) -> Any:
    """The Config that was saved as these values. UserError if one is missing; more than it has are left out.

    TypeError if one is of another type.
    """
    missing = [field.name for field in fields(Config) if field.name not in saved]
    if missing and isinstance(saved, Saved):
        lacks = f"it lacks {f'{saved.within}{missing[0]}'!r}"
        raise UserError(f"{saved.path} is not whole: {lacks}, or it is of another version of this code")
    values = {field.name: saved[field.name] for field in fields(Config)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, annotation in typing.get_type_hints(Config).items():
        if not any(fits(values[name], kind) for kind in kinds(annotation)):
            raise TypeError(f"{name} is {values[name]!r}")
    return Config(**values)


def fits(value: Any, kind: Any) -> bool:
    """Whether a flag of this type can have the value."""
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    return type(value) in {float: (int, float)}.get(kind, (typing.get_origin(kind) or kind,))


def load_checkpoint(path: Path, kind: Kind) -> dict:
    """A file of `save`, its tensors on the CPU. UserError if it is not there, broken, of another kind or format."""
    if not path.parent.is_dir():
        raise UserError(f"run folder {str(path.parent)!r} does not exist")
    if not path.is_file():
        raise UserError(f"run folder {str(path.parent)!r} holds no {path.name}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
        raise UserError(f"{path} is not a whole checkpoint ({str(error).splitlines()[0]})") from error
    found = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
    if found != kind:
        raise UserError(f"{path} is a checkpoint of kind {found!r}, not {kind!r}")
    if not isinstance(checkpoint.get("config", {}), dict):
        raise UserError(f"{path} is not whole: its config is no dictionary")
    number = checkpoint.get("format", 0)
    if number != FORMAT:
        older = isinstance(number, int) and number < FORMAT
        age = "an older version of this code: make it anew" if older else "a newer version of this code: update it"
        raise UserError(f"{path} has format {number}, not {FORMAT}: it is of {age}")
    return Saved(path, checkpoint)


def resumed_settings(folder: Path, kind: Kind, Config: type) -> Any:
    """The settings of the run to go on with: from its last save, or, if it ended before the first, from config.json."""
    path = folder / "config.json"
    if (folder / "state.pt").exists() or not path.exists():
        path = folder / "state.pt"
        saved = load_checkpoint(path, kind)["config"]
    else:
        with built_from(path):
            saved = Saved(path, json.loads(path.read_text(encoding="utf-8")))
        if not {field.name for field in fields(Config)} <= saved.keys():
            raise UserError(f"resume={folder}: the run that began there is not of {script()}")
    with built_from(path):
        return replace(settings(Config, saved), resume=str(folder))


def check_unchanged(config: Any, saved: Any, may_change: tuple[str, ...]) -> None:
    """UserError if a setting other than these differs from the saved run's, as it would be neither run then."""
    for name, value in asdict(saved).items():
        now = getattr(config, name)
        if now != value and name not in may_change:
            raise UserError(
                f"{name}={now}: the run in {config.resume} has {name}={value}, "
                f"and on resuming only {', '.join(may_change)} may change"
            )


def check_resumable(config: Any, saved: dict, device: torch.device) -> None:
    """UserError if a saved run cannot go on here: another kind of device, other processes, too few steps."""
    if saved["device"] != device.type:
        raise UserError(
            f"resume={config.resume}: that run was on {saved['device']}, and its numbers cannot go on on {device.type}"
        )
    if saved["processes"] != distributed.world():
        before = f"resume={config.resume}: that run had {saved['processes']} processes"
        raise UserError(f"{before}, and its random numbers cannot go on in {distributed.world()}")
    if config.steps != saved["config"]["steps"]:
        if config.steps < saved["step"]:
            raise UserError(f"steps={config.steps}: the run in {config.resume} has done {saved['step']} already")
        print(
            f"resume: {config.steps:,} steps, not {saved['config']['steps']:,}: "
            f"from step {saved['step']:,} on all schedules are those of a run of the new length"
        )
