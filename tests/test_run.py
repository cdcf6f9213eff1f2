"""run.py alone, without a method: how a script ends, devices, files that are whole at every moment, Ctrl-C."""

import contextlib
import dataclasses
import errno
import importlib.machinery
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoints
import distributed
import run
import train_target
from flags import UserError

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# A. The script


@dataclasses.dataclass(frozen=True)
class Config:
    folder: str  # a positional argument
    steps: int = 10


@pytest.mark.parametrize("module, typed", [("studies.report", "-m studies.report"), ("toys.__main__", "-m toys")])
def test_a_module_is_called_as_it_was_typed(monkeypatch, module, typed):
    spec = importlib.machinery.ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec, raising=False)
    monkeypatch.setattr(sys, "argv", ["/some/where/report.py", "out/a", "--prompt=two words"])
    assert run.command() == f"{typed} out/a '--prompt=two words'"


def script(monkeypatch, main, *args):
    """`python tried.py somewhere *args` in this process."""
    monkeypatch.setattr(sys, "argv", ["tried.py", "somewhere", *args])
    run.run_script(main, Config, None)


def test_main_gets_the_config(monkeypatch):
    got = []
    script(monkeypatch, got.append, "--steps=3")
    assert got == [Config("somewhere", steps=3)]


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("T=9: too long\n   for this target"), "error: T=9: too long for this target"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.txt"), "error: [Errno 2] No such file: 'x.txt'"),
        (PermissionError(errno.EACCES, "Permission denied", "x.txt"), "error: [Errno 13] Permission denied: 'x.txt'"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: [Errno 28] No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "out of GPU memory, try a smaller B, T or C (CUDA out"),
        (KeyboardInterrupt(), "interrupted: what was saved before is whole"),
    ],
)
def test_what_the_user_can_mend_ends_in_one_line(monkeypatch, error, line):
    def main(config):
        raise error

    with pytest.raises(SystemExit) as stop:
        script(monkeypatch, main)
    assert line in stop.value.code and len(stop.value.code.splitlines()) == 1


def shape_bug():
    torch.ones(2, 3) @ torch.ones(2, 3)


def unpacking_bug():
    a, b = 1, 2, 3  # noqa: F841


def socket_bug():
    raise OSError("broken pipe between two of our own processes")


@pytest.mark.parametrize("bug, kind", [(shape_bug, RuntimeError), (unpacking_bug, ValueError), (socket_bug, OSError)])
def test_a_bug_keeps_its_traceback(monkeypatch, bug, kind):
    with pytest.raises(kind) as error:
        script(monkeypatch, lambda config: bug())
    assert error.traceback[-1].name == bug.__name__


# ---------------------------------------------------------------------------------------------------------------------
# B. Device


def test_devices():
    assert run.pick_device("cpu") == CPU
    assert run.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("abacus", "", "cuda:99", "meta"):
        with pytest.raises(UserError, match=f"^device={name}: cannot be used here"):
            run.pick_device(name)


def test_a_cpu_computes_in_fp32():
    with run.autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert not run.bf16(CPU)


def test_processes_share_a_batch(monkeypatch):
    assert run.check_processes(3, False) == 1
    with pytest.raises(UserError, match="shard=True: one process"):
        run.check_processes(4, True)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    assert run.check_processes(4, True) == 2
    with pytest.raises(UserError, match="B=3: must be a multiple of the 2 processes"):
        run.check_processes(3, False)


LONG = 10**6


def test_compile_where_no_compiler_works(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here\nand a long trace")

    monkeypatch.setattr(torch, "compile", broken)
    assert run.wants_compile("auto", CPU, LONG) is False
    printed = capsys.readouterr().out
    assert printed == "compile: no working compiler (no compiler here): running eagerly, slower but the same\n"
    with pytest.raises(UserError, match=r"^compile=True: no working compiler here \(no compiler here\)$"):
        run.wants_compile(True, CPU, LONG)


def test_compile_where_a_compiler_says_nothing(monkeypatch, capsys):
    def silent(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(torch, "compile", silent)
    assert run.wants_compile("auto", CPU, LONG) is False
    assert "(AssertionError)" in capsys.readouterr().out


def test_compile_where_it_works(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    assert run.wants_compile("auto", CPU, LONG) is True and run.wants_compile(True, CPU, 1) is True
    assert capsys.readouterr().out == 2 * "compile: on, the first step takes a minute or two\n"
    assert run.wants_compile("auto", CPU, 10) is False
    assert "takes longer than it saves" in capsys.readouterr().out.replace("would take", "takes")
    assert run.wants_compile(False, CPU, LONG) is False and capsys.readouterr().out == ""
    assert run.wants_compile("auto", CPU, 10, minutes=60.0) is True  # the steps are not known yet
    assert run.wants_compile("auto", CPU, LONG, minutes=1.0) is False


def test_compile_on_a_gpu(monkeypatch):
    """Large steps always, replayed ones never unasked."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda x: x)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(*shape))
    gpu = torch.device("cuda")
    assert run.wants_compile("auto", gpu, 10) is True
    assert run.wants_compile("auto", gpu, LONG, graphed=True) is False
    assert run.wants_compile(True, gpu, 10, graphed=True) is True


def test_a_small_step_on_one_gpu_is_replayed(monkeypatch, capsys):
    of_80_GB = type("Properties", (), {"total_memory": 80 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: of_80_GB)
    gpu, small, large = torch.device("cuda"), 10**9, 10**10
    assert run.wants_graph("auto", gpu, 1, small) is True and run.wants_graph("auto", gpu, 1, large) is False
    assert run.wants_graph("auto", gpu, 2, small) is False and run.wants_graph("auto", CPU, 1, small) is False
    assert run.wants_graph(True, gpu, 1, large) is True and run.wants_graph(False, gpu, 1, small) is False
    for device, processes in ((CPU, 1), (gpu, 2)):
        with pytest.raises(UserError, match="^graph=True: a step is replayed on one GPU, in one process$"):
            run.wants_graph(True, device, processes, small)
    assert capsys.readouterr().out.count("graph: on") == 2


class Clock:
    """Time that goes by only in steps of these seconds, the last of which is that of all further ones."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.steps, self.seconds = 1000.0, 0, seconds

    def __call__(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += self.seconds[min(self.steps, len(self.seconds) - 1)]
        self.steps += 1


def test_steps_that_fit_into_minutes(capsys):
    """A first step of 60 s compiles. 10 of 0.25 s say that a fiftieth of 5 minutes has room for 24: they decide."""
    clock = Clock(60.0, 0.25)
    n = run.steps_that_fit(5, 990.0, clock.step, clock)  # 10 s are gone before
    assert clock.steps == 3 + 10 + 24 and clock.now == 1000 + 60 + 36 * 0.25
    assert n == (300 - (10 + 60 + 9)) / 0.25
    for _ in range(n):
        clock.step()
    assert clock.now == 990 + 300
    assert capsys.readouterr().out == "minutes: 250.0 ms a step: 884 steps in what is left of 5 minutes\n"


def test_a_long_step_is_timed_ten_times():
    clock = Clock(8.0)
    assert run.steps_that_fit(60, 1000.0, clock.step, clock) == (3600 - 13 * 8) / 8 and clock.steps == 13


def test_steps_are_not_timed_for_long():
    clock = Clock(0.5)
    assert run.steps_that_fit(10**4, 1000.0, clock.step, clock) == 6 * 10**5 / 0.5 - 53 and clock.steps == 3 + 10 + 40


def test_not_one_step_fits():
    clock = Clock(60.0, 2.0)
    refused = r"^minutes=1.4: not one step fits: 84.0 s are gone on .*, and a step takes 2000.0 ms$"
    with pytest.raises(UserError, match=refused):
        run.steps_that_fit(1.4, 1000.0, clock.step, clock)


# ---------------------------------------------------------------------------------------------------------------------
# C. The folder


def test_a_power_cut_before_the_rename_leaves_the_old_file_whole(tmp_path, monkeypatch):
    """The new bytes are settled on the disk before they get the name, and the name after it."""
    events = []
    real_replace, real_fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), real_replace(a, b)))
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("settle"), real_fsync(handle)))
    checkpoints.save(tmp_path / "checkpoint.pt", "target", {"value": 1})
    assert events == ["settle", "rename", "settle"]

    def power_cut(a, b):
        raise SystemError("dark")

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(SystemError):
        checkpoints.save(tmp_path / "checkpoint.pt", "target", {"value": 2})
    assert checkpoints.load_checkpoint(tmp_path / "checkpoint.pt", "target")["value"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_an_error_while_writing_leaves_the_old_file_whole(tmp_path):
    run.write_text(tmp_path / "a.txt", "old: é")
    with pytest.raises(ZeroDivisionError), run.written(tmp_path / "a.txt") as temporary:
        temporary.write_text("half of the n")
        1 / 0
    assert (tmp_path / "a.txt").read_bytes() == "old: é".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_files_are_written_where_a_folder_cannot_be_opened(tmp_path, monkeypatch):
    """As on Windows. A file that cannot be opened is another matter."""
    real_open = os.open

    def open_file(path, flags, *args, **kwargs):
        if Path(path).is_dir() or Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, flags, *args, **kwargs)

    (tmp_path / "locked").write_text("")
    monkeypatch.setattr(os, "open", open_file)
    run.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    run.settle(tmp_path)
    with pytest.raises(PermissionError):
        run.settle(tmp_path / "locked")


def test_a_settled_file_leaves_no_handle_open(tmp_path, monkeypatch):
    closed = []
    real_close = os.close
    monkeypatch.setattr(os, "close", lambda handle: (closed.append(handle), real_close(handle)))

    def broken(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        run.settle(tmp_path)
    assert len(closed) == 1


@pytest.fixture
def free():
    """What a test claims is free again after it."""
    with run.claims():
        yield


def test_new_folder_by_default_is_the_first_free_number(tmp_path, free):
    usual = tmp_path / "out" / "vpd"
    assert run.new_folder("", usual) == usual
    (tmp_path / "out" / "vpd-3").mkdir()
    for name in ("vpd-2", "vpd-4", "vpd-5"):
        assert run.new_folder("", usual) == tmp_path / "out" / name
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["vpd", "vpd-2", "vpd-3", "vpd-4", "vpd-5"]


def test_a_folder_that_is_named_must_be_empty_or_not_there(tmp_path, free):
    out = tmp_path / "mine"
    assert run.new_folder(str(out)) == out and out.is_dir()
    assert run.new_folder(str(out)) == out
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError) as error:
        run.new_folder(str(out))
    assert str(error.value) == f"out={out} is not an empty folder: give another one"
    with pytest.raises(UserError, match="notes.txt is not an empty folder"):
        run.new_folder(str(out / "notes.txt"))


def test_a_folder_that_nothing_was_written_to_is_gone_again(tmp_path):
    with run.claims():
        run.new_folder(str(tmp_path / "a"))
        (run.new_folder(str(tmp_path / "b")) / "config.json").write_text("{}")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["b", "b/config.json"]


# Claims a folder, says so, and then waits for a line, or goes on with the second argument as a flag of `claim`.
CLAIM = """
import sys; sys.path.insert(0, {code!r})
import flags, run
from pathlib import Path
try:
    with run.claims():
        run.claim(Path(sys.argv[1]), **{{flag: True for flag in sys.argv[2:]}})
        print("mine", flush=True)
        sys.stdin.readline()
except flags.UserError as error:
    print(error, flush=True)
"""


def claiming(folder, *flags):
    code = CLAIM.format(code=str(Path(run.__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_one_writer_a_folder(tmp_path):
    folder = tmp_path / "a"
    first = claiming(folder)
    assert first.stdout.readline() == "mine\n"
    owner = f"process {first.pid} on .*, since .*"
    assert re.fullmatch(f"{folder} is being written by {owner}: .*\n", claiming(folder).stdout.readline())
    assert claiming(tmp_path / "b").stdout.readline() == "mine\n"
    waits = claiming(folder, "wait")
    assert re.fullmatch(f"{folder} is being written by {owner}: waiting until it is done\n", waits.stdout.readline())
    first.communicate("\n")
    assert waits.stdout.readline() == "mine\n"
    waits.communicate("\n")
    assert not folder.exists()  # nothing was written


def test_of_a_writer_that_was_killed_the_folder_is_taken_over_with_a_line(tmp_path, free, capsys):
    killed = claiming(tmp_path)
    assert killed.stdout.readline() == "mine\n"
    killed.kill()
    killed.wait()
    run.claim(tmp_path)
    gone = f"{tmp_path}: process {killed.pid} on .*, since .*, which was writing there, is gone: going on in its place"
    assert re.fullmatch(gone + "\n", capsys.readouterr().out)
    assert f"process {os.getpid()} on" in (tmp_path / run.LOCK).read_text()
    assert run.new_folder(str(tmp_path)) == tmp_path  # a lock is not what makes a folder full


def test_a_lock_that_a_reboot_left_whose_number_another_process_has_now(tmp_path, free, capsys):
    (tmp_path / run.LOCK).write_text(f"process {os.getpid()} on here, since yesterday")
    run.claim(tmp_path)
    assert "is gone: going on in its place" in capsys.readouterr().out


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, free, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "no locks")

    monkeypatch.setattr(run.fcntl, "flock", refuse)
    run.claim(tmp_path)


@pytest.mark.parametrize(
    "files, ours",
    [
        ({"config.json": json.dumps({"command": "", "commit": "", "hardware": "", "versions": {}})}, True),
        ({"checkpoint.pt": ""}, False),  # the name alone is many people's
        ({"config.json": json.dumps({"command": ""})}, False),
        ({"config.json": "{"}, False),
        ({"config.json": "[1]"}, False),
        ({}, False),
    ],
)
def test_a_run_folder_is_told_from_others(tmp_path, files, ours):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert run.is_run_folder(tmp_path) == ours


@pytest.mark.parametrize(
    "files, resumable",
    [
        (["config.json"], True),  # it ended before its first save
        (["config.json", "state.pt"], True),  # a target in training
        (["config.json", "state.pt", "checkpoint.pt"], True),  # a decomposition, of which --steps can make more
        (["config.json", "checkpoint.pt"], False),  # a target that is finished
        (["state.pt"], False),  # no run of ours
    ],
)
def test_a_taken_folder_is_offered_to_go_on_with_if_it_is_unfinished(tmp_path, free, files, resumable):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(UserError) as error:
        run.new_folder(str(tmp_path))
    offer = f", or go on with --resume={tmp_path}" if resumable else ""
    assert str(error.value) == f"out={tmp_path} is not an empty folder: give another one{offer}"


def test_config_json(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/train_target.py", "--C=*.q=3", "two words"])
    run.write_config(tmp_path / "a" / "b", train_target.Config(lr=0.5), CPU)
    about = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert about["lr"] == 0.5 and about["adam_betas"] == [0.9, 0.95]
    assert about["command"].endswith("'--C=*.q=3' 'two words'")
    assert about["versions"]["torch"] == torch.__version__ and "CPU" in about["hardware"]
    assert len(about["commit"]) in (0, 40)


def test_config_json_where_there_is_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run.write_config(tmp_path, train_target.Config(), CPU)
    assert json.loads((tmp_path / "config.json").read_text())["commit"] == ""


def test_a_log_is_read_back(tmp_path):
    with run.Log(tmp_path, 0) as log:
        for step in range(3):
            log({"step": step, "total": 1 / (step + 1)})
            assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step + 1  # at once
    rows = [{"step": 0, "total": 1.0}, {"step": 1, "total": 0.5}, {"step": 2, "total": 1 / 3}]
    assert run.read_log(tmp_path) == rows
    assert run.read_log(tmp_path, 2) == rows[:2]


def test_a_resumed_log_drops_later_rows_and_a_torn_line(tmp_path):
    """Rows that no checkpoint knows of are computed again; a short evaluation of the same step goes with them."""
    rows = [{"step": 0}, {"step": 4}, {"step": 4, "val_l0": 1.0}, {"step": 5}, {"step": 9}, {"step": 9, "val_l0": 2.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 10, "tot' + 20 * "\0")  # as a power cut leaves it
    assert run.read_log(tmp_path) == rows
    log = run.Log(tmp_path, 5)
    assert run.read_log(tmp_path) == rows[:3]
    log({"step": 5, "total": 1.0})
    assert run.read_log(tmp_path) == [*rows[:3], {"step": 5, "total": 1.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_the_first_process_writes_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    run.Log(tmp_path, 0)({"step": 0})
    assert not [*tmp_path.iterdir()]


def test_the_log_is_mirrored(tmp_path, monkeypatch):
    """To a stand-in of wandb."""
    sent, begun = [], {}
    mirror = SimpleNamespace(log=lambda row, step: sent.append((step, row)), finish=lambda: sent.append("finished"))
    spec = importlib.machinery.ModuleSpec("wandb", None)
    stand_in = SimpleNamespace(init=lambda **about: begun.update(about) or mirror, __spec__=spec)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    run.check_wandb("vpd")
    config = dataclasses.make_dataclass("Config", ["wandb", "lr"])("vpd", 0.5)
    with pytest.raises(ZeroDivisionError), run.Log(tmp_path / "..", 0, config) as log:
        log({"step": 0, "total": 1.0})
        log({"step": 7, "total": 0.5})
        1 / 0  # it is finished all the same
    assert sent == [(0, {"step": 0, "total": 1.0}), (7, {"step": 7, "total": 0.5}), "finished"]
    assert begun["project"] == "vpd" and begun["config"] == {"wandb": "vpd", "lr": 0.5}


def test_without_wandb_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run.check_wandb("")
    with pytest.raises(UserError, match="wandb=vpd: wandb is not installed; metrics.jsonl has the same numbers"):
        run.check_wandb("vpd")


# ---------------------------------------------------------------------------------------------------------------------
# D. The loop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_only_sets_a_flag(number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with run.interruptible() as interrupted:
        assert interrupted() is False
        signal.raise_signal(number)
        assert interrupted() is True
        signal.raise_signal(signal.SIGTERM)  # as a queue does again and again
        assert interrupted() is True
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_what_nobody_reads_ends_no_run(capfd):
    """As in `decompose.py | head -1`: the reader is gone, and the run goes on to its end."""
    read, write = os.pipe()
    with contextlib.redirect_stdout(open(write, "w")), run.lasting_output():
        print("one", flush=True)
        assert os.read(read, 10) == b"one\n"
        os.close(read)
        for _ in range(10):
            print("two" * 10_000, flush=True)
        assert sys.stdout.gone
    print("here again")
    assert "here again" in capfd.readouterr().out


def test_under_nohup_a_closed_terminal_is_no_end(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with run.interruptible() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_raises_and_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), run.interruptible():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_non_finite_numbers_are_refused():
    weights = [torch.ones(3), torch.ones(2)]
    run.refuse_non_finite({"step": 4, "total": 1.0}, weights, "0.5")
    with pytest.raises(UserError, match="the stochastic loss is nan at step 4: try a smaller lr than 0.5"):
        run.refuse_non_finite({"step": 4, "total": 1.0, "stochastic": math.nan}, weights, "0.5")
    with pytest.raises(UserError, match="the total loss is inf at step 4"):
        run.refuse_non_finite({"step": 4, "total": math.inf}, weights, "0.5")
    weights[1][0] = math.nan
    with pytest.raises(UserError, match="is not finite at step 4"):
        run.refuse_non_finite({"step": 4, "total": 1.0}, weights, "0.5")


def test_the_bar_counts_the_steps_that_are_left(capsys):
    bar = run.progress_bar(3, 8, "decompose")
    assert list(bar) == [3, 4, 5, 6, 7] and bar.total == 8
