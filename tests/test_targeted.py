"""Targeted runs: --prompts, the step on two streams, what readers make of it, and studies/targeted.py."""

import json
from pathlib import Path

import pytest
import torch
from tiny import config, one_line, resumed, tensors

import data
import decompose
import eval as evaluation
import losses
import share
from flags import UserError
from studies import export, targeted

SETTINGS = dict(prompts="prompts.jsonl", beta_delta=0.0, faith_steps=0, halves=False, B=4)


def write_prompts(n: int) -> None:
    rows = [json.dumps({"text": f"def test_{i}(self):\n    self.assertEqual({i}, {i * i})\n"}) for i in range(n)]
    Path("prompts.jsonl").write_text("\n".join(rows * 2))


@pytest.fixture
def run_of_prompts(home):
    """A tiny targeted run, on 30 prompts."""
    if not Path("targeted").exists():
        write_prompts(30)
        decompose.main(config(out="targeted", **SETTINGS))
    return home / "targeted"


def test_pinned_Deltas():
    r = torch.rand(2, 4, 3, 7)
    before, pinned = r.clone(), losses.pin_Deltas(r, 2)
    assert torch.equal(pinned[:, 1::2, :, 5:], torch.ones(2, 2, 3, 2))
    assert torch.equal(pinned[:, 0::2], before[:, 0::2]) and torch.equal(pinned[..., :5], before[..., :5])
    g = torch.rand(4, 3, 5)
    assert torch.equal(losses.mask(g, pinned)[:, 1::2, :, 5:], torch.ones(2, 2, 3, 2))  # m_Delta = r = 1


def test_the_step_is_the_losses_of_two_streams(gpt, tokens):
    """Against passes written out: the adversary sees the prompts alone, random masks see both, Delta = 1 elsewhere."""
    method = decompose.Method(B=4, steps=1, halves=False, beta_delta=0.0, n_adv=1, adv_routing="subset")
    x, f = torch.cat((tokens, tokens[:1] + 1)), decompose.Decomposition(gpt, 3)
    gamma = decompose.CITransformer([V.shape[0] for V in f.V.values()], 36, 8, 1, 2, 8)
    vpd = decompose.VPD(f, gamma, method, x.shape, torch.device("cpu"), targeted=True)
    r, generator = vpd.adversary.r.clone(), torch.Generator()
    assert r.shape == (1, 2, 8, 48)
    generator.set_state(vpd.generator.get_state())
    with torch.no_grad():
        output, g, _ = vpd.importances(x)
        routing = losses.sample_routing((1, 2, 8), 12, generator)[0]
        adversarial = losses.kl_divergence(output[0::2], f(x[0::2], losses.mask(g[0::2], r[0]), routing))
        u = losses.sample_sources((1, 4, 8, 48), generator)[0]
        routing = losses.sample_routing((1, 4, 8), 12, generator)[0]
        m = losses.mask(g, u)
        m[1::2, :, 36:] = 1
        stochastic = losses.kl_divergence(output, f(x, m, routing))
    row = vpd.train_step(x)
    assert row["adversarial"].item() == pytest.approx(adversarial.item(), rel=1e-6)
    assert row["stochastic"].item() == pytest.approx(stochastic.item(), rel=1e-6)


def test_a_batch_is_prompts_and_text_in_turn(home):
    corpus = data.load("text")
    write_prompts(30)
    texts, c = data.texts("prompts.jsonl", corpus, 16), config(**SETTINGS)
    rows = data.batch_of(texts, 3, c)
    assert (
        torch.equal(rows[0::2], texts[0].batch("train", 3, 2, 16))
        and texts[0].name == "prompts-text-" + corpus.name[5:]
    )
    assert torch.equal(rows[1::2], corpus.batch("train", 3, 2, 16))
    assert torch.equal(data.batch_of([corpus], 3, c), corpus.batch("train", 3, 4, 16))  # the default run's
    decoded = {split: corpus.encoding.decode(texts[0].tokens[split].tolist()) for split in ("train", "val")}
    of = {split: {part for part in text.split("<|endoftext|>") if part} for split, text in decoded.items()}
    assert len(of["train"]) == 28 and {t[:10] for t in of["val"]} == {"def test_0", "def test_2"}  # 0 and 20
    assert not of["train"] & of["val"]


def test_few_prompts_are_repeated_and_are_validation_text_too(home, tmp_path, capsys):
    (tmp_path / "two.jsonl").write_text('{"text": "import a"}\n{"text": "import b"}\n')
    found = data.read_prompts(str(tmp_path / "two.jsonl"), data.load("text"), 50)
    assert len(found.tokens["val"]) == 102 and (found.tokens["val"] == found.tokens["train"]).all()
    assert "2 different ones are too few to hold any out" in capsys.readouterr().out
    assert found.batch("val", 0, 2, 50).shape == (2, 51)


def test_readers_open_the_prompts(run_of_prompts, tmp_path):
    opened, prompts = evaluation.open_run("targeted")
    assert prompts.name.startswith("prompts-") and opened.config["prompts"] == "prompts.jsonl"
    text = prompts.encoding.decode(prompts.tokens["val"].tolist())
    assert text.startswith("def test_0(self):\n    self.assertEqual(0, 0)\n<|endoftext|>")
    Path("prompts.jsonl").unlink()  # the run holds them
    assert evaluation.open_run("targeted")[1].digest == prompts.digest
    export.main(export.Config("targeted", str(tmp_path / "sent")))
    assert evaluation.open_run(tmp_path / "sent")[1].digest == prompts.digest
    assert share.read(tmp_path / "sent")["prompts"]["val"].dtype == torch.int32


def test_resumed_it_is_the_run_that_was_not_interrupted(run_of_prompts, monkeypatch):
    write_prompts(30)
    calls = iter([False] * 3 + [True] * 9)
    with monkeypatch.context() as patch:
        patch.setattr(decompose.run, "interruptible", lambda: Stops(calls))
        with pytest.raises(SystemExit):
            decompose.train(config(out="targeted-half", **SETTINGS))
    Path("prompts.jsonl").unlink()
    decompose.train(resumed("targeted-half"))
    one, two = (torch.load(f"{f}/state.pt", weights_only=True)["vpd"] for f in ("targeted", "targeted-half"))
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two)))


class Stops:
    def __init__(self, calls):
        self.calls = calls

    def __enter__(self):
        return lambda: next(self.calls)

    def __exit__(self, *_):
        pass


def test_the_study(run_of_prompts, capsys):
    targeted.main(targeted.Config("targeted", windows=2, adv_steps=1))
    found = json.loads(Path("targeted", "targeted.json").read_text())
    run, prompts = evaluation.open_run("targeted")
    assert found["run_mark"] == run.mark
    (batch,), _ = evaluation.of_windows(run, evaluation.validation_windows(prompts, 2, 16, 0))
    x, hidden, g = batch
    with torch.no_grad():
        by_hand = {
            "important ones alone": evaluation.masks("ci", g, 12, torch.Generator()),
            "all subcomponents cut": torch.cat((torch.zeros_like(g), torch.ones(2, 16, 12)), -1),
            "everything cut": torch.zeros(2, 16, g.shape[-1] + 12),
        }
        for kind, m in by_hand.items():
            assert found["prompts"][kind] == pytest.approx(run.kl(hidden, run.decomposition(x, m)).item(), rel=1e-5)
    assert found["prompts"]["L0"] == pytest.approx((g > 0).float().sum(-1).mean().item(), rel=1e-5)
    m = targeted.masks_of("random masks, Delta whole", g, 12, torch.Generator())
    assert bool((m[..., -12:] == 1).all()) and bool((m[..., :-12] >= g).all())
    assert "important ones alone" in capsys.readouterr().out


def test_bad_input_is_one_line(whole, run_of_prompts, tmp_path):
    assert "not a targeted run: it was made without --prompts" in one_line(targeted, "whole")
    common = ["--scale=tiny", "--dataset=text", "--target=target"]
    assert "beta_delta=1.0 contradicts prompts=x: a targeted run has beta_delta=0.0" in one_line(
        decompose, *common, "--prompts=x", "--beta_delta=1", "--T=16"
    )
    assert "B=3: with --prompts a multiple of 2 x 1" in one_line(decompose, *common, "--prompts=x", "--B=3")
    assert "dataset 'nowhere' does not exist" in one_line(decompose, *common, "--prompts=nowhere")
    with pytest.raises(UserError, match="must be a file or a folder of text, not a set of the hub"):
        data.read_prompts("pile", data.load("text"), 16)
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    with pytest.raises(UserError, match="holds token ids, not text"):
        data.read_prompts(str(tmp_path / "ids.jsonl"), data.load("text"), 16)


def test_the_flag_brings_its_settings():
    of_flags, without = (decompose.Config(scale="tiny", prompts=prompts).defaults() for prompts in ("x", ""))
    changed = {name for name, value in vars(of_flags).items() if value != getattr(without, name)}
    assert changed == set(decompose.TARGETED) == {"beta_delta", "faith_steps", "halves"}
    assert {name: getattr(of_flags, name) for name in changed} == decompose.TARGETED
