"""Training the target: folders, schedules, resuming, and what decompose.py finds or trains."""

import dataclasses
import json
import math
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import TINY_TARGET, tensors

import checkpoints
import data
import decompose
import flags
import run
import train_target
from flags import UserError
from model import GPT, GPTConfig
from train_target import build_target, cosine, default_folder, find_or_train, generate, next_token_ce, validation_ce

CPU = torch.device("cpu")


def config(**changes):
    return train_target.Config(**(dict(dataset="text") | TINY_TARGET | changes))


# ---------------------------------------------------------------------------------------------------------------------
# A. Settings


def named(args: str) -> str:
    """The default folder of this command line, where the corpus is called `words`."""
    corpus = data.Corpus("words", {}, None, "")
    return default_folder(flags.read_flags(train_target.Config, None, args.split()), corpus).as_posix()


@pytest.mark.parametrize(
    "args, folder",
    [
        ("", "out/target-words"),
        ("--T=64 --seed=0", "out/target-words"),  # the usual values
        ("--T=32", "out/target-words-T32"),
        ("--seed=3", "out/target-words-seed3"),
        ("--seed=3 --T=32 --lr=1e-4", "out/target-words-seed3-T32-lr0.0001"),
        ("--adam_betas 0.5 0.9", "out/target-words-adam_betas_0.5_0.9_"),
        ("--scale=laptop", "out/target-words"),  # that of stdlib
        ("--scale=tiny", "out/target-words-tiny"),
        ("--scale=tiny --T=8", "out/target-words-tiny-T8"),
        ("--scale=published", "out/target-words-published"),
        ("--dataset=pile", "out/target-words"),
        ("--dataset=pile --scale=hour", "out/target-words"),  # that of a set of the hub
        ("--dataset=pile --scale=laptop", "out/target-words-laptop"),
        # Where it runs and how often it saves make no other target; the tokens are in the name of the corpus
        ("--device=cpu --data_dir=elsewhere --save_every=7 --max_tokens=1000", "out/target-words"),
        ("--out=mine", "out/target-words"),
    ],
)
def test_default_folder(args, folder):
    assert named(args) == folder


def test_settings_of_a_scale():
    assert train_target.Config().defaults() == train_target.Config(scale="laptop")
    pile = train_target.Config(dataset="pile").defaults()
    assert (pile.scale, pile.d_model, pile.max_tokens) == ("hour", 512, 3 * 10**8)
    assert train_target.Config(dataset="pile", scale="tiny").defaults().max_tokens == 20_000_000  # never all, unasked
    assert train_target.Config(scale="published").defaults().n_layer == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(T=0), "T=0: must be above 0"),
        (dict(lr=math.nan), "lr=nan: must be above 0"),
        (dict(clip=math.inf), "clip=inf: must be above 0"),
        (dict(warmup=-0.1), "warmup=-0.1: must be between 0 and 1"),
        (dict(adam_betas=(0.9, 1.0)), r"adam_betas=\(0.9, 1.0\): both must be in"),
        (dict(adam_betas=(math.nan, 0.9)), "both must be in"),
        (dict(n_layer=0), "n_layer=0: must be "),
        (dict(d_model=12, n_head=4), "d_model=12: RoPE needs a multiple of 2"),
    ],
)
def test_settings_refused(changes, message):
    with pytest.raises(UserError, match=message):
        train_target.Config(**changes)


# ---------------------------------------------------------------------------------------------------------------------
# B. Training


def test_cosine_by_hand():
    # 10 of 111 steps rise: 1/11, 2/11, ...; then from 1 at step 10 to 0.1 at step 110, half way at step 60
    rise = [cosine(step, 111, 10 / 111) for step in range(11)]
    assert rise == pytest.approx([i / 11 for i in range(1, 12)])
    assert [cosine(step, 111, 10 / 111) for step in (10, 60, 110)] == pytest.approx([1, 0.55, 0.1])
    # Without a rise; down to 0; a quarter of the way (1 + cos(pi / 4)) / 2; one step alone
    assert [cosine(step, 101, floor=0.0) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    assert cosine(25, 101, floor=0.0) == pytest.approx((1 + 0.5**0.5) / 2)
    assert cosine(0, 1) == 1 and cosine(500, 101) == pytest.approx(0.1)


def test_next_token_ce_by_hand():
    probability = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]])  # [B, T, vocab] = [1, 2, 3]
    ce = next_token_ce(probability.log() + 3, torch.tensor([[1, 2]]))
    assert ce.item() == pytest.approx(-(math.log(0.25) + math.log(0.8)) / 2)


def test_validation_ce_is_the_mean_over_all_windows(home):
    """Of 40 windows, more than are taken at a time and not a multiple of it."""
    corpus, target = (
        data.load("text"),
        build_target(checkpoints.load_checkpoint(home / "target/checkpoint.pt", "target")),
    )
    for name, weight in target.named_parameters():
        weight.data *= 1 if "embed" in name else 30
    windows = torch.cat([corpus.batch("val", 0, 32, 16), corpus.batch("val", 32, 8, 16)])
    expected = F.cross_entropy(target(windows[:, :-1]).mT, windows[:, 1:]).item()
    assert validation_ce(target, corpus, 40, CPU) == pytest.approx(expected, rel=1e-6)


def test_what_a_finished_target_leaves(home):
    folder = home / "target"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", "config.json", "metrics.jsonl", "sample.txt"]
    checkpoint, rows = checkpoints.load_checkpoint(folder / "checkpoint.pt", "target"), run.read_log(folder)
    assert [row["step"] for row in rows] == [1, 5, 9, 12]  # steps done: every 4, and the last
    assert [row["tokens"] for row in rows] == [64, 5 * 64, 9 * 64, 12 * 64]  # B T = 64 a step
    assert checkpoint["curve"] == [[row["tokens"], row["val_ce"]] for row in rows]
    windows = data.load("text").batch("val", 0, TINY_TARGET["val_windows"], 16)
    logits = build_target(checkpoint)(windows[:, :-1])
    assert rows[-1]["val_ce"] == pytest.approx(F.cross_entropy(logits.mT, windows[:, 1:]).item(), rel=1e-6)
    assert checkpoint["vocabulary"] == data.load("text").vocabulary


def test_it_learns(tmp_path, monkeypatch):
    """Ten tokens that follow each other in a circle: after 50 steps it knows which comes next, and goes on so."""
    tokens = np.arange(1000, dtype=np.uint16) % 10
    encoding = SimpleNamespace(n_vocab=10, decode=lambda ids: " ".join(map(str, ids)))
    corpus = data.Corpus("circle", {"train": tokens, "val": tokens}, encoding, "ten")
    monkeypatch.setattr(data, "load", lambda *_: corpus)
    folder = train_target.main(config(steps=50, lr=2e-2, val_every=50, out=str(tmp_path / "circle")))
    first, *_, last = run.read_log(folder)
    assert first["train_ce"] == pytest.approx(math.log(10), abs=0.1) and last["val_ce"] < 0.1
    sample = [int(token) for token in (folder / "sample.txt").read_text().split()]
    follows = [(b - a) % 10 == 1 for a, b in zip(sample, sample[1:])]
    assert len(sample) == 4 + 32 and sum(follows) > 30


def test_same_seed_same_target_and_another_seed_another(home, tmp_path):
    again = train_target.main(config(out=str(tmp_path / "again")))
    other = train_target.main(config(out=str(tmp_path / "other"), seed=1))
    first, again, other = (
        checkpoints.load_checkpoint(folder / "checkpoint.pt", "target")["model"]
        for folder in (home / "target", again, other)
    )
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(tensors(first), tensors(other), strict=True))


class Interrupted:
    """Ctrl-C after the fifth step, in place of run.interruptible."""

    def __enter__(self):
        steps = iter([False] * 4 + [True])
        return lambda: next(steps)

    def __exit__(self, *_):
        pass


def resume(folder, **changes):
    return train_target.main(dataclasses.replace(train_target.Config(resume=str(folder)).defaults(), **changes))


def test_a_resumed_target_is_the_whole_one_bit_for_bit(home, tmp_path, monkeypatch, capsys):
    """Interrupted after 5 of 12 steps, between two rows of the log, saved, resumed."""
    folder = tmp_path / "halves"
    with monkeypatch.context() as patch:
        patch.setattr(run, "interruptible", Interrupted)
        with pytest.raises(SystemExit, match="130"):
            train_target.main(config(out=str(folder)))
    assert f"--resume={folder}" in capsys.readouterr().out
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "metrics.jsonl", "state.pt"]
    assert checkpoints.load_checkpoint(folder / "state.pt", "target in training")["step"] == 5
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 9, "tokens": 576, "train_ce": 0.0, "val_ce": 0.0}\n{"step": 12, "tok')  # and a power cut
    assert resume(folder) == folder
    once, twice = (checkpoints.load_checkpoint(f / "checkpoint.pt", "target") for f in (home / "target", folder))
    assert all(torch.equal(a, b) for a, b in zip(tensors(once["model"]), tensors(twice["model"]), strict=True))
    assert once["curve"] == twice["curve"]
    for name in ("metrics.jsonl", "sample.txt"):
        assert (home / "target" / name).read_text() == (folder / name).read_text()
    assert not (folder / "state.pt").exists()


def test_what_may_change_when_a_target_is_resumed(tmp_path, home, monkeypatch, capsys):
    folder = tmp_path / "halves"
    with monkeypatch.context() as patch:
        patch.setattr(run, "interruptible", Interrupted)
        with pytest.raises(SystemExit):
            train_target.main(config(out=str(folder)))
    before = {p: p.read_bytes() for p in folder.iterdir()}
    changes = [dict(lr=0.1), dict(B=2), dict(T=8), dict(seed=1), dict(val_every=3), dict(val_windows=2), dict(d_mlp=8)]
    for changed in changes:
        ((name, value),) = changed.items()
        with pytest.raises(UserError, match=f"^{name}={value}: the run in .* has {name}=.* may change"):
            resume(folder, **changed)
    with pytest.raises(UserError, match="steps=4: the run in .* has done 5 already"):
        resume(folder, steps=4)
    assert before == {p: p.read_bytes() for p in folder.iterdir()}
    resume(folder, steps=7, save_every=2)
    assert "7 steps, not 12: from step 5 on" in capsys.readouterr().out
    assert checkpoints.load_checkpoint(folder / "checkpoint.pt", "target")["curve"][-1][0] == 7 * 64


def test_a_finished_target_is_not_trained_again(home, capsys):
    before = {p: p.read_bytes() for p in (home / "target").iterdir()}
    resume("target", steps=99)
    assert "target: target is finished" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in (home / "target").iterdir()}


def test_a_folder_that_holds_something_is_refused(home, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        train_target.main(config(out=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    monkeypatch.setattr(train_target, "default_folder", lambda *_: tmp_path)  # the default one, too, is not replaced
    with pytest.raises(UserError, match="is not an empty folder"):
        train_target.main(config())
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_too_short_a_text_ends_before_a_folder_is_made(home, tmp_path):
    (tmp_path / "short.txt").write_text("hello\n")
    with pytest.raises(UserError, match=r"T \+ 1 = 17"):
        train_target.main(
            config(dataset=str(tmp_path / "short.txt"), data_dir=str(tmp_path), out=str(tmp_path / "out"))
        )
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(home, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="train_target.py runs in one process: start it without torchrun"):
        train_target.main(config(out=str(tmp_path / "two")))
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("every", [dict(val_every=1), dict(val_every=100, save_every=1)], ids=["logged", "saved"])
def test_a_loss_that_is_not_finite_is_never_saved(home, tmp_path, every):
    with pytest.raises(UserError, match="try a smaller lr than 1e[+]18"):
        train_target.main(config(lr=1e18, out=str(tmp_path / "nan"), **every))
    assert not (tmp_path / "nan/checkpoint.pt").exists()
    if (tmp_path / "nan/state.pt").exists():
        state = checkpoints.load_checkpoint(tmp_path / "nan/state.pt", "target in training")
        assert all(weight.isfinite().all() for weight in tensors(state["model"]))


# ---------------------------------------------------------------------------------------------------------------------
# C. A trained target


def test_generate_draws_from_the_last_context_tokens():
    def f(tokens):  # surely the successor of the first token in view
        return 1e4 * F.one_hot((tokens[:, :1] + 1) % 50, 50).expand(-1, tokens.shape[1], -1)

    # Views: 3 | 3 4 | 3 4 4 | 4 4 4 | 4 4 5
    generated = generate(f, torch.tensor([[3]]), 5, context=3, generator=torch.Generator().manual_seed(0))
    assert generated.tolist() == [[3, 4, 4, 4, 5, 5]]


def test_generate_draws_in_proportion():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(1, 1, 3)
    drawn = generate(lambda tokens: logits, torch.tensor([[0]]), 3000, 1, torch.Generator().manual_seed(0))[0, 1:]
    assert (torch.bincount(drawn) / 3000).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_a_target_is_built_from_its_checkpoint():
    torch.manual_seed(0)
    shape = dict(vocab_size=50, context=8, n_layer=1, n_head=2, d_model=16, d_mlp=32)
    gpt, x = GPT(GPTConfig(**shape)), torch.arange(8)[None]
    assert torch.equal(build_target({"gpt": shape, "model": gpt.state_dict()})(x), gpt(x))


def vpd(**changes):
    """Settings of decompose.py at scale tiny, but 12 steps of its target are enough."""
    return decompose.Config(**(dict(scale="tiny", dataset="text", T=16) | changes))


@pytest.fixture
def elsewhere(home, tmp_path, monkeypatch):
    """An empty working directory, from which text and tokens are seen; the target of scale tiny takes 12 steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train_target.SCALES, "tiny", TINY_TARGET | dict(save_every=5))
    for name in ("text", "data"):
        (tmp_path / name).symlink_to(home / name)
    return tmp_path


def test_a_target_is_found_or_trained(home, elsewhere, capsys):
    corpus = data.load("text")
    checkpoint = find_or_train(vpd(), corpus)
    folder = elsewhere / f"out/target-{corpus.name}-tiny"
    assert "12 steps of 4 x 16 tokens" in capsys.readouterr().out and (folder / "checkpoint.pt").exists()
    whole = checkpoints.load_checkpoint(home / "target/checkpoint.pt", "target")
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole["model"]), tensors(checkpoint["model"]), strict=True))
    again = find_or_train(vpd(seed=7, B=5, lr=0.1), corpus)  # settings of the decomposition alone
    assert capsys.readouterr().out == "" and again["curve"] == checkpoint["curve"]
    assert [p.name for p in (elsewhere / "out").iterdir()] == [folder.name]


def test_an_unfinished_target_is_finished(home, elsewhere, monkeypatch):
    """Its training stopped half way: the same command goes on with it."""
    log = run.Log.__call__

    def power_cut(self, row):
        if row["step"] > 8:
            raise SystemError("dark")
        log(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(run.Log, "__call__", power_cut)
        with pytest.raises(SystemError):
            find_or_train(vpd(), data.load("text"))
    corpus = data.load("text")
    state = elsewhere / f"out/target-{corpus.name}-tiny/state.pt"
    assert checkpoints.load_checkpoint(state, "target in training")["step"] == 5
    checkpoint = find_or_train(vpd(), corpus)
    whole = checkpoints.load_checkpoint(home / "target/checkpoint.pt", "target")
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole["model"]), tensors(checkpoint["model"]), strict=True))
    assert checkpoint["curve"] == whole["curve"] and not state.exists()


def test_a_target_that_stopped_before_its_first_save_begins_anew(home, elsewhere, monkeypatch):
    monkeypatch.setattr(train_target.GPT, "hidden", lambda self, tokens: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        find_or_train(vpd(), data.load("text"))
    monkeypatch.undo()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setitem(train_target.SCALES, "tiny", TINY_TARGET)
    corpus = data.load("text")
    folder = elsewhere / f"out/target-{corpus.name}-tiny"
    assert [p.name for p in folder.iterdir() if p.suffix == ".pt"] == [] and (folder / "config.json").exists()
    assert find_or_train(vpd(), corpus)["curve"][-1][0] == 12 * 64


def test_another_T_is_another_target(home, elsewhere):
    corpus = data.load("text")
    assert find_or_train(vpd(T=8), corpus)["gpt"]["context"] == 8
    assert [p.name for p in (elsewhere / "out").iterdir()] == [f"target-{corpus.name}-tiny-T8"]


def test_a_target_that_is_named_must_fit(home):
    corpus = data.load("text")
    assert find_or_train(vpd(target="target"), corpus)["gpt"]["context"] == 16
    assert find_or_train(vpd(target="target", T=3), corpus)["gpt"]["context"] == 16  # shorter sequences are seen often
    with pytest.raises(UserError, match="T=17: the context of the target in target is 16 tokens: give a smaller T"):
        find_or_train(vpd(target="target", T=17), corpus)
    with pytest.raises(UserError, match="run folder 'nowhere' does not exist"):
        find_or_train(vpd(target="nowhere"), corpus)


def test_another_vocabulary_is_refused(home):
    """Token ids of equal range but other meaning: as after an upgrade of the Python whose library is the corpus."""
    other = dataclasses.replace(data.load("text"), name="library", vocabulary="f00")
    with pytest.raises(UserError, match="^target: .* another vocabulary than library has here"):
        find_or_train(vpd(target="target"), other)


def test_config_json_of_a_target(home):
    about = json.loads((home / "target/config.json").read_text())
    assert about["dataset"] == "text" and about["steps"] == 12 and about["adam_betas"] == [0.9, 0.95]


def test_a_target_that_another_process_trains_is_waited_for(home, elsewhere, held):
    corpus = data.load("text")
    folder, found = elsewhere / f"out/target-{corpus.name}-tiny", []
    with held(folder):
        waits = threading.Thread(target=lambda: found.append(find_or_train(vpd(), corpus)))
        waits.start()
        time.sleep(0.5)
        assert not found and [path.name for path in folder.iterdir()] == [run.LOCK]
        shutil.copy(home / "target/checkpoint.pt", folder)  # as the other one does at its end
        (folder / run.LOCK).unlink()
    waits.join(10)
    assert found[0]["curve"] == checkpoints.load_checkpoint(home / "target/checkpoint.pt", "target")["curve"]
