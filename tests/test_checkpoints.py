"""checkpoints.py: what is read back, what is refused, what may change when a run is resumed."""

import dataclasses
import errno
import re
from pathlib import Path

import pytest
import torch

import checkpoints
import decompose
import run
import train_target
from flags import UserError

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "run" / "checkpoint.pt"
    path.parent.mkdir()
    checkpoints.save(
        path, "target", {"model": {"W": torch.arange(3.0)}, "lr": 0.5, "betas": (1, 2), "curve": [[1, 2.0]]}
    )
    return path


def test_a_checkpoint_is_read_back(saved):
    checkpoint = checkpoints.load_checkpoint(saved, "target")
    assert torch.equal(checkpoint.pop("model")["W"], torch.arange(3.0))
    assert checkpoint == {
        "kind": "target",
        "format": checkpoints.FORMAT,
        "lr": 0.5,
        "betas": (1, 2),
        "curve": [[1, 2.0]],
    }


def refusal(path, kind="target"):
    with pytest.raises(UserError) as error:
        checkpoints.load_checkpoint(path, kind)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_a_checkpoint_that_is_not_there(saved):
    assert refusal(saved.parent.parent / "nowhere/checkpoint.pt").endswith("nowhere' does not exist")
    assert refusal(saved / "checkpoint.pt").endswith("checkpoint.pt' does not exist")  # a file is no folder
    assert refusal(saved.parent / "state.pt") == f"run folder {str(saved.parent)!r} holds no state.pt"


def test_a_checkpoint_of_another_kind(saved):
    message = f"{saved} is a checkpoint of kind 'target', not 'decomposition'"
    assert refusal(saved, "decomposition") == message
    torch.save(torch.ones(3), saved)
    assert refusal(saved) == f"{saved} is a checkpoint of kind None, not 'target'"


@pytest.mark.parametrize(
    "number, advice", [(-1, "an older version of this code: make it anew"), (1, "a newer version")]
)
def test_a_checkpoint_of_another_format(saved, monkeypatch, number, advice):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", checkpoints.FORMAT + number)
        checkpoints.save(saved, "target", {})
    assert f"{saved} has format {checkpoints.FORMAT + number}, not {checkpoints.FORMAT}: it is of {advice}" in refusal(
        saved
    )


def test_a_checkpoint_from_before_there_was_a_format_is_an_older_one(saved):
    torch.save({"kind": "target", "model": {}}, saved)
    assert "has format 0" in refusal(saved) and "an older version of this code" in refusal(saved)


class Foreign:
    pass


@pytest.mark.parametrize("size", [0, 1, 100, -100, -1])
def test_a_checkpoint_that_is_cut_off(saved, size):
    saved.write_bytes(saved.read_bytes()[:size])
    assert refusal(saved).startswith(f"{saved} is not a whole checkpoint (")


@pytest.mark.parametrize("content", [b"\n\n\n", b"some text", b"\x80\x04garbage", bytes(1000)])
def test_a_file_that_is_no_checkpoint(saved, content):
    saved.write_bytes(content)
    assert refusal(saved).startswith(f"{saved} is not a whole checkpoint (")


def test_a_checkpoint_with_code_in_it_is_not_run(saved):
    torch.save({"kind": "target", "format": checkpoints.FORMAT, "model": Foreign()}, saved)
    assert refusal(saved).startswith(f"{saved} is not a whole checkpoint (")


@pytest.mark.parametrize("reason", [None, "No space left on device"])
def test_a_full_disk_keeps_the_earlier_file_and_claims_none_that_is_not_there(saved, monkeypatch, reason):
    before = saved.read_bytes()

    def full(checkpoint, file):
        file.write(b"half")
        try:
            raise OSError(errno.ENOSPC, reason) if reason else ValueError
        except (OSError, ValueError):  # torch hides what the disk says behind an error of its own
            raise RuntimeError("unexpected pos 704 vs 598\nand a long trace")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError) as error:
        checkpoints.save(saved, "target", {})
    why = f"({reason or 'unexpected pos 704 vs 598'})"
    assert str(error.value) == f"cannot save {saved} {why}; an earlier checkpoint.pt there is still whole"
    assert saved.read_bytes() == before
    with pytest.raises(UserError) as error:
        checkpoints.save(saved.parent / "state.pt", "target", {})
    assert str(error.value) == f"cannot save {saved.parent / 'state.pt'} {why}"
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_is_named_with_the_file(tmp_path):
    with pytest.raises(OSError) as error, run.written(tmp_path / "metrics.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(error.value) == f"[Errno 28] No space left on device: '{tmp_path}/metrics.json'"


def test_what_a_checkpoint_lacks_is_named(saved):
    checkpoints.save(saved, "target", {"config": {"leak": 0.01, "deep": {"a": 1}}, "step": 3})
    checkpoint = checkpoints.load_checkpoint(saved, "target")
    assert checkpoint["config"]["deep"]["a"] == 1
    for look_up, name in [
        (lambda: checkpoint["C"], "C"),
        (lambda: checkpoint["config"]["T"], "config.T"),
        (lambda: checkpoint["config"]["deep"]["b"], "config.deep.b"),
    ]:
        with pytest.raises(UserError) as error:
            look_up()
        assert str(error.value) == f"{saved} is not whole: it lacks {name!r}"
    checkpoints.save(saved, "target", {"config": checkpoint["config"]})  # what was read can be written again
    assert checkpoints.load_checkpoint(saved, "target")["config"] == {"leak": 0.01, "deep": {"a": 1}}


def test_a_folder_that_is_gone_is_one_line(saved):
    with pytest.raises(UserError, match="cannot save"):
        checkpoints.save(saved.parent / "gone" / "state.pt", "target", {})


@dataclasses.dataclass(frozen=True)
class Resumed:
    lr: float = 0.5
    adam_betas: tuple[float, float] = (0.9, 0.95)
    steps: int = 8
    device: str = "auto"
    resume: str = "out/a"


def test_settings_of_the_last_save_go_before_those_of_config_json(tmp_path):
    run.write_config(tmp_path, Resumed(lr=0.1, steps=9), CPU)
    kind = "target in training"
    config = checkpoints.resumed_settings(tmp_path, kind, Resumed)
    assert config == Resumed(lr=0.1, steps=9, resume=str(tmp_path)) and isinstance(config.adam_betas, tuple)
    checkpoints.save(tmp_path / "state.pt", kind, {"config": dataclasses.asdict(Resumed(lr=0.2))})
    assert checkpoints.resumed_settings(tmp_path, kind, Resumed) == Resumed(lr=0.2, resume=str(tmp_path))


def test_settings_of_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no state.pt"):
        checkpoints.resumed_settings(tmp_path, "target in training", Resumed)
    with pytest.raises(UserError, match="does not exist"):
        checkpoints.resumed_settings(tmp_path / "nowhere", "target in training", Resumed)
    checkpoints.save(tmp_path / "state.pt", "decomposition in training", {"config": {}})
    with pytest.raises(UserError, match="of kind 'decomposition in training', not 'target in training'"):
        checkpoints.resumed_settings(tmp_path, "target in training", Resumed)


@pytest.mark.parametrize("begun, other", [(train_target, decompose), (decompose, train_target)])
def test_a_run_of_the_other_script_that_ended_before_its_first_save_is_refused(tmp_path, begun, other):
    run.write_config(tmp_path, begun.Config(), CPU)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        other.Config(resume=str(tmp_path)).defaults()


def test_settings_that_may_change_and_those_that_may_not():
    may_change = ("steps", "device")
    checkpoints.check_unchanged(Resumed(), Resumed(), may_change)
    checkpoints.check_unchanged(Resumed(steps=9, device="cpu"), Resumed(), may_change)
    for changed, message in [
        (dict(lr=0.1), "lr=0.1: the run in out/a has lr=0.5, and on resuming only steps, device may change"),
        (dict(adam_betas=(0.5, 0.5)), r"adam_betas=\(0.5, 0.5\): the run in out/a has adam_betas=\(0.9, 0.95\)"),
    ]:
        with pytest.raises(UserError, match="^" + message):
            checkpoints.check_unchanged(Resumed(steps=9, **changed), Resumed(), may_change)


STATE = {"device": "cpu", "processes": 1, "step": 4, "config": {"steps": 8}}


def test_a_run_that_can_go_on(capsys):
    checkpoints.check_resumable(Resumed(), STATE, CPU)
    assert capsys.readouterr().out == ""
    checkpoints.check_resumable(Resumed(steps=4), STATE, CPU)
    checkpoints.check_resumable(Resumed(steps=2000), STATE, CPU)
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[2].partition(":")[0] for line in printed] == [" 4 steps, not 8", " 2,000 steps, not 8"]


@pytest.mark.parametrize(
    "state, message",
    [
        ({"device": "cuda"}, "resume=out/a: that run was on cuda, and its numbers cannot go on on cpu"),
        ({"processes": 2}, "resume=out/a: that run had 2 processes, and its random numbers cannot go on in 1"),
        ({"step": 9, "config": {"steps": 20}}, "steps=8: the run in out/a has done 9 already"),
    ],
)
def test_a_run_that_cannot_go_on(state, message):
    with pytest.raises(UserError) as error:
        checkpoints.check_resumable(Resumed(), STATE | state, CPU)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "name, value", [("steps", 2.5), ("lr", "fast"), ("adam_betas", 3), ("dataset", None), ("seed", True)]
)
def test_a_setting_of_another_type_is_named(name, value):
    saved = dataclasses.asdict(train_target.Config()) | {name: value}
    with (
        pytest.raises(UserError, match=rf"x.pt is not whole \(TypeError: {name} is {value!r}\)"),
        checkpoints.built_from(Path("x.pt")),
    ):
        checkpoints.settings(train_target.Config, saved)
    assert (
        checkpoints.settings(train_target.Config, saved | {name: getattr(train_target.Config(), name)})
        == train_target.Config()
    )
