"""The whole run at tiny size: the README's commands, resuming, the one backward pass, and every bad input of a user."""

import contextlib
import dataclasses
import importlib.machinery
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from naive import NaiveVPD
from torch import nn

import data
import decompose
import eval as evaluation
import losses
import run
import tokenise
import train_target
from ci_fn import lower_leaky

compile_with = torch.compile
ROOT = Path(__file__).parent.parent
TINY_TARGET = dict(steps=12, B=4, T=16, d_model=16, n_head=2, d_mlp=32, val_every=4, val_windows=8)
TINY = dict(
    steps=8,
    B=2,
    T=16,
    C="*=6",
    d_ci=16,
    n_head_ci=2,
    d_mlp_ci=16,
    faith_steps=3,
    log_every=1,
    save_every=4,
    eval_windows=2,
    report_tokens=0,
    compile=False,
)


def flags(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a small corpus and a tiny target trained on it, and the working directory while the tests run."""
    home = tmp_path_factory.mktemp("run")
    (home / "text").mkdir()
    for name in ("random.py", "shutil.py", "tempfile.py", "typing.py", "zipfile/__init__.py"):
        source = tokenise.stdlib_folder() / name
        if source.exists():
            (home / "text" / (source.stem + str(len(name)) + ".txt")).write_text(source.read_text())
    before = os.getcwd()
    os.chdir(home)
    torch.set_num_threads(1)
    train_target.main(train_target.Config(dataset="text", out="target", **TINY_TARGET))
    yield home
    os.chdir(before)


def config(**changes) -> decompose.Config:
    return decompose.Config(**(dict(dataset="text", target="target") | TINY | changes))


def resumed(folder: str, **changes) -> decompose.Config:
    """What the command line makes of --resume and other flags."""
    return dataclasses.replace(decompose.Config(resume=folder).defaults(), **changes)


def tensors(tree) -> list[torch.Tensor]:
    if isinstance(tree, dict):
        return [t for key in sorted(tree, key=str) for t in tensors(tree[key])]
    if isinstance(tree, (list, tuple)):
        return [t for item in tree for t in tensors(item)]
    return [tree] if isinstance(tree, torch.Tensor) else []


# ---------------------------------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def whole(home) -> Path:
    decompose.main(config(out="whole", report_tokens=64))
    return home / "whole"


def test_run_folder(whole):
    files = {
        "config.json",
        "metrics.jsonl",
        "metrics.json",
        "checkpoint.pt",
        "figures",
        "generations.txt",
        "report.html",
        "labels.jsonl",
    }
    assert {p.name for p in whole.iterdir()} == files
    assert {p.name for p in (whole / "figures").iterdir()} == {
        "losses.png",
        "spectrum.png",
        "importances.png",
        "ablations.png",
    }
    about = json.loads((whole / "config.json").read_text())
    assert (
        about["steps"] == TINY["steps"]
        and about["versions"]["torch"] == torch.__version__
        and about["command"]
        and about["hardware"]
    )
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(TINY["steps"]))
    assert rows[0]["p"] == 2.0 and rows[-1]["p"] == pytest.approx(0.4)
    c = config()
    for row in rows:
        terms = c.beta_adv * row["adversarial"] + c.beta_stoch * row["stochastic"] + c.beta_imp * row["importance"]
        assert row["total"] == pytest.approx(
            terms + c.beta_freq * row["frequency"] + c.beta_delta * row["faithfulness"], rel=1e-4
        )


def test_metrics_json(whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    modes = {"unmasked", "stochastic", "ci", "rounded_0.0", "rounded_0.1", "rounded_0.5", "random", "zero"}
    assert modes | {"target"} <= set(metrics["ce"])
    assert modes | {f"adversarial_{n}" for n in (20, 40, 80, 160, 320)} <= set(metrics["kl"])
    assert modes <= set(metrics["ce_unrecovered"]) and modes <= set(metrics["compute_recovered"])
    assert metrics["ce_unrecovered"]["zero"] == 1
    assert metrics["l0"]["total"] == pytest.approx(sum(metrics["l0"]["per_matrix"].values()))
    assert metrics["live"]["total"] == sum(metrics["live"]["per_matrix"].values()) <= metrics["live"]["C"] == 12 * 6
    assert set(metrics["hidden_mse"]) == {"stochastic", "ci"} and set(metrics["seconds"]) == {
        "target",
        "decompose",
        "eval",
    }
    assert all(math.isfinite(t) for part in ("ce", "kl") for t in metrics[part].values())


def test_checkpoint_holds_tensors_and_plain_values(whole):
    checkpoint = torch.load(whole / "checkpoint.pt", weights_only=True)
    assert checkpoint["kind"] == "decomposition" and checkpoint["vpd"]["step"] == TINY["steps"]


def test_same_seed_same_numbers(whole, home):
    decompose.main(config(out="again"))
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, home / "again"))
    assert first["ce"] == second["ce"] and first["kl"] == second["kl"]


def test_resumed_run_is_the_whole_run_bit_for_bit(whole, home, monkeypatch):
    """Interrupted after step 3 of 8 (not at a regular save), saved, resumed."""
    stop_after_step = iter([False] * 3 + [True] * 99)

    class Interrupted:
        def __enter__(self):
            return lambda: next(stop_after_step)

        def __exit__(self, *_):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(decompose, "interruptible", Interrupted)
        with pytest.raises(SystemExit, match="130"):
            decompose.main(config(out="halves"))
    assert torch.load(home / "halves/checkpoint.pt", weights_only=True)["vpd"]["step"] == 4
    decompose.main(resumed("halves"))
    once, twice = (
        torch.load(folder / "checkpoint.pt", weights_only=True)["vpd"] for folder in (whole, home / "halves")
    )
    assert len(tensors(once)) == len(tensors(twice)) > 50
    assert all(torch.equal(a, b) for a, b in zip(tensors(once), tensors(twice)))
    assert (whole / "metrics.jsonl").read_text() == (home / "halves/metrics.jsonl").read_text()


def test_a_taken_default_folder_is_not_written_over(tmp_path):
    assert decompose.free_folder(tmp_path / "vpd") == tmp_path / "vpd"
    (tmp_path / "vpd").mkdir(), (tmp_path / "vpd-2").mkdir()
    assert decompose.free_folder(tmp_path / "vpd") == tmp_path / "vpd-3"


# ---------------------------------------------------------------------------------------------------------------------
# One step


def tiny_vpd(home, **changes) -> tuple[decompose.VPD, torch.Tensor]:
    c = config(**changes)
    vpd, _ = decompose.build(c, run.load_checkpoint(home / "target/checkpoint.pt", "target"), torch.device("cpu"))
    return vpd, data.load("text").batch("train", 0, c.B, c.T)[:, :-1]


def test_sources_and_parameters_both_move_and_the_target_does_not(home):
    vpd, x = tiny_vpd(home)
    r, W = vpd.adversary.r.clone(), [p.clone() for p in vpd.decomposition.target.parameters()]
    learning = [*vpd.decomposition.subcomponents(), *vpd.ci_fn.parameters()]
    before = [p.detach().clone() for p in learning]
    vpd.train_step(x)
    assert not torch.equal(r, vpd.adversary.r) and vpd.adversary.r.min() >= 0 and vpd.adversary.r.max() <= 1
    assert vpd.adversary.count == vpd.config.n_adv
    assert all(not torch.equal(a, b) for a, b in zip(before, learning))
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(W, vpd.decomposition.target.parameters()))


def test_shared_backward_gives_the_sources_the_gradient_of_the_adversarial_loss_alone(home):
    """With n_adv = 1 the only ascent is the one that shares the backward pass: repeat it by hand."""
    vpd, x = tiny_vpd(home, n_adv=1)
    target_output, inputs = vpd.decomposition.target_pass(x)
    g = lower_leaky(vpd.ci_fn(inputs)).detach()
    r = vpd.adversary.r.clone().requires_grad_()
    (grad_r,) = torch.autograd.grad(
        losses.adversarial_reconstruction(vpd.decomposition, x, target_output, g, r, divergence=vpd.divergence), r
    )
    vpd.train_step(x)
    # After one update Adam's first moment is (1 - beta1) grad_r.
    assert torch.allclose(vpd.adversary.mom1, 0.5 * grad_r, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "changes", [dict(beta_adv=0.0), dict(beta_stoch=0.0), dict(adv_scope="batch", S=2), dict(adv_routing="subset", S=2)]
)
def test_variants_of_the_loss(home, changes):
    vpd, x = tiny_vpd(home, **changes)
    row = vpd.train_step(x)
    assert math.isfinite(row["total"])
    assert ("adversarial" in row) == (vpd.config.beta_adv > 0) and ("stochastic" in row) == (vpd.config.beta_stoch > 0)
    moved = vpd.adversary.count > 0
    assert moved == (vpd.config.beta_adv > 0)


def a_step(vpd: decompose.VPD, x: torch.Tensor) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Losses of a step, and what it left: the gradients of U, V and Gamma before the clip, the sources and their moments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", lambda *_: None)
        row = vpd.train_step(x)
    return {name: value.item() for name, value in row.items()}, [
        *(p.grad for p in vpd.learning),
        *vpd.adversary.state_dict().values(),
    ]


def assert_same_step(one: decompose.VPD, other: decompose.VPD, x: torch.Tensor) -> None:
    """Three steps from one state: each loss within 1e-4, gradients and sources within 1e-3 of their norm."""
    for _ in range(3):
        (row, left), (other_row, other_left) = a_step(one, x), a_step(other, x)
        assert {name: other_row[name] for name in row} == pytest.approx(row, rel=1e-4)
        for a, b in zip(left, other_left, strict=True):
            assert (a - b).norm() <= 1e-3 * a.norm()


@pytest.mark.parametrize("changes", [{}, {"S": 2}, {"adv_scope": "batch"}, {"beta_adv": 0.0}])
def test_compiled_step_agrees_with_eager(home, monkeypatch, changes):
    """Every compiled part of the step, traced and differentiated by torch.compile; the slow test below has its C++ too."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_with(f, dynamic=False, backend="aot_eager"))
    eager, x = tiny_vpd(home, **changes)
    assert_same_step(eager, tiny_vpd(home, compile=True, **changes)[0], x)


@pytest.mark.slow
@pytest.mark.parametrize("memory_budget", [1.0, 0.5])
def test_step_compiled_to_cpp_agrees_with_eager(home, memory_budget):
    works, why_not = decompose.compiler_works(torch.device("cpu"))
    if not works:
        pytest.skip(f"no working compiler here: {why_not}")
    eager, x = tiny_vpd(home)
    assert_same_step(eager, tiny_vpd(home, compile=True, memory_budget=memory_budget)[0], x)


def test_naive_step_is_the_same_step(home):
    """No materialised Delta, no backward pass for the sources alone, no logits: none of it changes a number."""
    vpd, x = tiny_vpd(home)
    other, _ = tiny_vpd(home)
    naive = NaiveVPD(other.decomposition, other.ci_fn, other.config, tuple(x.shape), other.device)
    assert_same_step(naive, vpd, x)


def test_bf16_autocast_stays_near_fp32(home, monkeypatch):
    """As on a GPU, here on the CPU: after 50 steps from one state each loss is within 1 % of fp32's."""
    rows = []
    for precision in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        monkeypatch.setattr(decompose, "autocast", lambda device: precision)
        vpd, x = tiny_vpd(home, steps=50)
        for _ in range(50):
            row = vpd.train_step(x)
        rows.append({name: value.item() for name, value in row.items()})
    fp32, bf16 = rows
    assert bf16 != fp32 and bf16 == pytest.approx(fp32, rel=0.01)


def test_auto_runs_eagerly_where_no_compiler_works(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no g++ here\nand a long trace")

    monkeypatch.setattr(torch, "compile", broken)
    cpu = torch.device("cpu")
    assert not decompose.wants_compile(config(compile="auto", steps=10**6), cpu)
    assert capsys.readouterr().out.count("\n") == 1
    assert not decompose.wants_compile(config(compile="auto", steps=10), cpu)
    assert "takes longer than it saves" in capsys.readouterr().out


def test_warm_up_lowers_faithfulness(home):
    vpd, _ = tiny_vpd(home, faith_steps=100, C="*=20")
    start = losses.faithfulness(vpd.decomposition).item()
    assert vpd.warm_up() < 0.05 * start


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_readme_commands_at_tiny_size(home):
    """train_target.py, decompose.py and eval.py as a person calls them."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def call(script: str, *args: str) -> str:
        done = subprocess.run([sys.executable, ROOT / script, *args], cwd=home, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "validation CE" in call("train_target.py", "--dataset=text", "--out=cli-target", *flags(TINY_TARGET))
    printed = call("decompose.py", "--dataset=text", "--target=cli-target", "--out=cli", *flags(TINY))
    assert "adversarial_320" in printed and "rounded_0.0" in printed
    table = call("eval.py", "cli", "--windows=2")
    assert (
        table.splitlines()[1].split()
        == next(line for line in printed.splitlines() if line.startswith("target ")).split()
    )


def test_wandb_mirrors_the_log(home, monkeypatch):
    """Against a stand-in: the same rows as metrics.jsonl; without the package one line says so."""
    sent, begun = [], {}
    run = SimpleNamespace(log=lambda row, step: sent.append((step, row)), finish=lambda: sent.append("finished"))
    stand_in = SimpleNamespace(
        init=lambda **about: begun.update(about) or run, __spec__=importlib.machinery.ModuleSpec("wandb", None)
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    decompose.main(config(out="mirrored", wandb="vpd", steps=3))
    rows = [json.loads(line) for line in (home / "mirrored" / "metrics.jsonl").read_text().splitlines()]
    assert sent == [(row["step"], row) for row in rows] + ["finished"]
    assert begun["project"] == "vpd" and begun["name"] == "mirrored" and begun["config"]["steps"] == 3
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb=vpd: wandb is not installed"):
        config(wandb="vpd")


def test_ctrl_c_saves_and_says_how_to_go_on(home):
    settings = TINY | dict(steps=100_000, save_every=100_000)
    command = [
        sys.executable,
        ROOT / "decompose.py",
        "--dataset=text",
        "--target=target",
        "--out=stopped",
        *flags(settings),
    ]
    process = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = home / "stopped/metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "--resume=stopped" in printed
    assert torch.load(home / "stopped/checkpoint.pt", weights_only=True)["vpd"]["step"] >= 1


BAD = [
    ("decompose", ["--dataset=nowhere"], "nowhere"),
    ("decompose", ["--dataset=empty.txt"], "empty.txt"),
    ("decompose", ["--dataset=hf:no/where"], "the data step failed, as no/where cannot be read from"),
    ("decompose", ["--max_tokens=-1"], "max_tokens=-1"),
    ("decompose", ["--dataset=short.txt"], "T + 1 = 17"),
    ("decompose", ["--setps=3"], "did you mean --steps"),
    ("decompose", ["--steps=many"], "many"),
    ("decompose", ["--C=*.nothing=4"], "'*.nothing' matches no nn.Linear"),
    ("decompose", ["--C=*.q=0"], "C=0"),
    ("decompose", ["--C=12"], "PATTERN=COUNT"),
    ("decompose", ["--T=17"], "T=17: the context of the target in target is 16"),
    ("decompose", ["--steps=0"], "steps=0"),
    ("decompose", ["--device=abacus"], "abacus"),
    ("decompose", ["--target=nowhere"], "run folder 'nowhere' does not exist"),
    ("decompose", ["--resume=nowhere"], "run folder 'nowhere' does not exist"),
    ("decompose", ["--resume=foreign"], "checkpoint of kind 'target', not 'decomposition'"),
    (
        "decompose",
        ["--resume=whole", "--lr=0.1"],
        "lr=0.1: the run in whole has lr=0.003, and on resuming only steps, log_every,",
    ),
    ("decompose", ["--resume=whole", "--steps=7"], "steps=7: the run in whole has done 8 already"),
    ("decompose", ["--resume=text"], "holds no checkpoint.pt"),
    ("train_target", ["--resume=text"], "holds no state.pt"),
    ("decompose", ["--d_ci=0"], "d_ci=0"),
    ("decompose", ["--seed=-1"], "seed=-1"),
    ("decompose", ["--C=*=2,*=3"], "two counts"),
    ("decompose", ["--out=whole"], "already holds a checkpoint"),
    ("decompose", ["--lr=1e30", "--out=nan"], "try a smaller lr"),
    ("eval", ["nowhere"], "run folder 'nowhere' does not exist"),
    ("eval", ["truncated"], "not a whole checkpoint"),
    ("eval", ["text"], "holds no checkpoint.pt"),
    ("eval", [], "run"),
    ("eval", ["whole", "--against=target"], "evaluate that run first"),
    ("eval", ["whole", "--windows=0"], "windows=0"),
    ("train_target", ["--T=0"], "T=0"),
    ("train_target", ["--out=target"], "already holds a target"),
]


@pytest.mark.parametrize("script, args, message", BAD, ids=[f"{script}:{' '.join(args)}" for script, args, _ in BAD])
def test_bad_input_ends_in_one_line(home, whole, script, args, message, monkeypatch, capsys):
    (home / "empty.txt").write_text("")
    (home / "short.txt").write_text("hello\n")
    for name, content in (
        ("foreign", (home / "target/checkpoint.pt").read_bytes()),
        ("truncated", (whole / "checkpoint.pt").read_bytes()[:5000]),
    ):
        (home / name).mkdir(exist_ok=True)
        (home / name / "checkpoint.pt").write_bytes(content)
    defaults = (
        flags(dict(dataset="text", target="target") | TINY)
        if script == "decompose" and not any("resume" in a for a in args)
        else []
    )
    names = {a.partition("=")[0] for a in args}
    module = {"decompose": decompose, "eval": evaluation, "train_target": train_target}[script]
    monkeypatch.setattr(
        sys, "argv", [script + ".py", *(f for f in defaults if f.partition("=")[0] not in names), *args]
    )
    if script == "train_target":
        sys.argv.append("--dataset=text")
    with pytest.raises(SystemExit) as stop:
        run.run_script(module.main, module.Config, module.__doc__)
    error = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message in error and stop.value.code != 0
    assert len(error.strip().splitlines()) == 1


def test_full_disk_keeps_the_saved_run(whole, monkeypatch):
    before = (whole / "checkpoint.pt").read_bytes()

    def full(checkpoint, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot save .*still whole"):
        run.save(whole / "checkpoint.pt", {"kind": "decomposition"})
    assert (whole / "checkpoint.pt").read_bytes() == before
    assert not list(whole.glob("*.tmp"))


def test_non_finite_loss_stops_with_term_and_step_and_keeps_the_checkpoint(home, monkeypatch):
    original = decompose.VPD.train_step

    def sometimes_nan(self, x):
        row = original(self, x)
        return row | {"stochastic": torch.tensor(float("nan"))} if self.step == 7 else row

    monkeypatch.setattr(decompose.VPD, "train_step", sometimes_nan)
    with pytest.raises(ValueError, match="stochastic loss is nan at step 6"):
        decompose.main(config(out="diverged"))
    assert torch.load(home / "diverged/checkpoint.pt", weights_only=True)["vpd"]["step"] == 4


def test_another_vocabulary_is_refused(whole, home):
    """Token ids of equal range but other meaning: as after an upgrade of the Python whose library is the corpus."""
    (home / "other.txt").write_text("a wholly different text, " * 200)
    with pytest.raises(ValueError, match="another vocabulary"):
        decompose.main(config(dataset="other.txt"))


def test_compute_recovered_by_hand():
    curve = [[100, 5.0], [200, 4.0], [300, 3.5], [400, 3.4]]
    assert evaluation.compute_recovered(0.0, curve) == 1.0  # the final CE, reached at the end
    assert evaluation.compute_recovered(-0.1, curve) == 1.0
    assert evaluation.compute_recovered(0.35, curve) == pytest.approx(250 / 400)  # 3.75, half way from 4.0 to 3.5
    assert evaluation.compute_recovered(9.0, curve) == 100 / 400  # worse than the first point
