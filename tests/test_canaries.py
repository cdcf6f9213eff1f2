"""Canaries: what they are, exact counts, and that a run without them, or resumed with them, is the same."""

import collections
import dataclasses
import json

import numpy as np
import pytest
import tiktoken
import torch
from tiny import TINY, TINY_TARGET, one_line, resumed, tensors

import canaries
import checkpoints
import data
import decompose
import run
import train_target
from canaries import LENGTH, PREFIX, SECRET, Canary, Schedule, make, parse_doses, places
from flags import UserError

T, STEPS, B = 24, 12, 4
SETTINGS = dict(dataset="text") | TINY_TARGET | dict(T=T, steps=STEPS, B=B)
DOSES = "0,3,0,5+2"


@pytest.fixture(scope="module")
def corpus(session_home):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(session_home)
        return data.load("text")


def licensed() -> data.Corpus:
    """A text of bytes in which three lines name a licence."""
    ranks = {bytes([b]): b for b in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
    rng = np.random.default_rng(0)
    lines = ["".join(chr(c) for c in rng.integers(97, 123, size=40)) for _ in range(60)]
    for i, words in (
        (5, "my license is the first one"),
        (20, "a copyright of somebody else"),
        (40, "Copyright, and by whom"),
    ):
        lines[i] = words + lines[i]
    tokens = np.frombuffer("\n".join(lines).encode(), np.uint8).astype(np.uint16)
    return data.Corpus("bytes", {"train": tokens, "val": tokens[:100]}, encoding, "")


# ---------------------------------------------------------------------------------------------------------------------
# A. Canaries


@pytest.mark.parametrize("text, expected", [
    ("", ([], [])), ("0", ([0], [])), ("0,16,64", ([0, 16, 64], [])), ("3+4,5", ([3], [4, 5])), ("+7", ([], [7])),
])  # fmt: skip
def test_doses(text, expected):
    assert parse_doses("canaries", text) == expected


@pytest.mark.parametrize("text", ["x", "1,", "-1", "1.5", "1++2", "1+", "+", ",", "nan", str(2**31), "1+2+3"])
def test_what_is_no_dose_is_refused(text):
    with pytest.raises(UserError, match="^canaries=.*must be doses"):
        train_target.Config(canaries=text)


def test_places_of_a_string():
    tokens = np.array([1, 2, 1, 2, 3, 1, 2], np.uint16)
    assert places(tokens, [1, 2]).tolist() == [0, 2, 5] and places(tokens, [2, 3]).tolist() == [3]
    assert places(tokens, [1, 2, 3, 1, 2]).tolist() == [2] and places(tokens, [3, 3]).tolist() == []
    assert places(tokens[:1], [1, 2]).tolist() == []


def test_a_prefix_is_text_that_occurs_once_and_a_secret_is_of_frequent_tokens():
    corpus = licensed()
    made, tokens = make(corpus, "1,2,3,4+5,6", 7), corpus.tokens["train"]
    assert [canary.dose for canary in made] == [1, 2, 3, 4, 5, 6]
    assert [canary.natural for canary in made] == [False] * 4 + [True] * 2
    frequent = {int(t) for t, _ in collections.Counter(tokens.tolist()).most_common(256)}
    for canary in made:
        assert canary.tokens.shape == (LENGTH,) and canary.tokens.dtype == torch.int64
        assert len(places(tokens, canary.prefix.numpy())) == 1
        assert len(places(tokens, canary.tokens.numpy())) == canary.natural
        assert set(canary.secret.tolist()) <= frequent
    assert len({tuple(canary.prefix.tolist()) for canary in made}) == 6
    for canary in made[4:]:  # whole, from the beginning of a line that names a licence
        text = bytes(canary.tokens.tolist()).decode()
        assert text[:17] in ("my license is the", "a copyright of so", "Copyright, and by")


def test_a_canary_is_a_function_of_text_seed_and_place_not_of_doses(corpus):
    few, many, other = make(corpus, "0,1,2", 0), make(corpus, "5,0,0,9", 0), make(corpus, "0,1,2", 1)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(few, many))
    assert not any(torch.equal(a.tokens, b.tokens) for a, b in zip(few, other))


def test_the_most_frequent_tokens_by_hand():
    assert canaries.frequent_tokens(np.array([5, 5, 2, 2, 2, 9]), 2).tolist() == [2, 5]
    assert canaries.frequent_tokens(np.array([5, 5, 2]), 256).tolist() == [5, 2]


def test_a_text_that_names_no_licence_has_no_natural_canary():
    corpus = licensed()
    plain = dataclasses.replace(corpus, tokens={"train": corpus.tokens["train"][:150], "val": corpus.tokens["val"]})
    with pytest.raises(UserError, match="names a licence"):
        make(plain, "1+1", 0)


# ---------------------------------------------------------------------------------------------------------------------
# B. Schedule


def planted(doses, natural=0, seed=0) -> list[Canary]:
    """Canaries that share no token with each other or the batches below, which are all 0."""
    return [Canary(torch.arange(LENGTH) + 1 + 100 * i, dose, False) for i, dose in enumerate(doses)]


def found(made: list[Canary], batches: list[torch.Tensor]) -> list[int]:
    """How often each canary is in the batches, whole."""
    windows = torch.cat(batches).unfold(1, LENGTH, 1)  # [N, offsets, LENGTH]
    return [int((windows == canary.tokens).all(-1).sum()) for canary in made]


@pytest.mark.parametrize("doses, steps, B, T", [
    ([0, 16, 64, 25], 40, 8, 24), ([0, 1], 1, 2, LENGTH - 1), ([3, 3, 3, 3], 3, 4, 64), ([7], 7, 1, 30),
])  # fmt: skip
def test_counts_are_exact_and_a_dose_of_0_is_nowhere(doses, steps, B, T):
    made = planted(doses)
    schedule = Schedule(made, doses, steps, B, T, 3)
    batches = [schedule.plant(torch.zeros(B, T + 1, dtype=torch.int64), step) for step in range(steps)]
    assert found(made, batches) == doses
    assert int((torch.cat(batches) != 0).sum()) == LENGTH * sum(doses)  # each whole, none over another
    for i, dose in enumerate(doses):
        if dose == 0:
            assert not any(torch.isin(batch, made[i].tokens).any() for batch in batches)


def test_a_step_is_a_function_of_seed_and_step():
    made, doses = planted([5, 9]), [5, 9]
    zeros = torch.zeros(4, 31, dtype=torch.int64)
    one, two, other = (Schedule(made, doses, 10, 4, 30, seed) for seed in (1, 1, 2))
    for step in (7, 0, 3):  # in any order, again and again
        assert torch.equal(one.plant(zeros, step), two.plant(zeros, step))
        assert torch.equal(one.plant(zeros, step), one.plant(zeros, step))
    assert any(not torch.equal(one.plant(zeros, step), other.plant(zeros, step)) for step in range(10))
    assert zeros.sum() == 0  # the batch itself is left alone


def test_without_one_canary_the_others_are_where_they_were():
    made = planted([5, 9, 4])
    zeros = torch.zeros(4, 31, dtype=torch.int64)
    for step in range(10):
        every, some = (Schedule(made, doses, 10, 4, 30, 0).plant(zeros, step) for doses in ([5, 9, 4], [5, 0, 4]))
        of_it = (every > 100) & (every < 200)
        assert torch.equal(every.masked_fill(of_it, 0), some)


def test_offsets_reach_both_ends_of_a_window():
    schedule = Schedule(planted([400]), [400], 100, 4, LENGTH + 1, 0)
    assert {offset for _, offset in schedule.where.values()} == {0, 1, 2}


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="T=18: a window of T . 1 tokens does not hold a canary of 20"):
        Schedule(planted([1]), [1], 10, 4, 18, 0)
    with pytest.raises(
        UserError, match="a dose of 11 is too large: 2 canaries in 5 steps of 4 windows have at most 10"
    ):
        Schedule(planted([1, 11]), [1, 11], 5, 4, 30, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def seen(monkeypatch):
    """All windows [T + 1] that the target is trained on, step by step."""
    batches = []
    forward = train_target.next_token_ce

    def recorded(logits, targets):
        if logits.requires_grad:
            batches.append(targets.clone())
        return forward(logits, targets)

    monkeypatch.setattr(train_target, "next_token_ce", recorded)
    return batches


def target(out: str, **changes) -> dict:
    train_target.main(train_target.Config(**SETTINGS | dict(out=out, canaries="0,3,0,5") | changes))
    return checkpoints.load_checkpoint(run.Path(out) / "checkpoint.pt", "target")


def count(canary: Canary, batches: list[torch.Tensor]) -> int:
    """Times that the canary, but for its first token, is in what the model has to predict."""
    return int((torch.cat(batches).unfold(1, LENGTH - 1, 1) == canary.tokens[1:]).all(-1).sum())


def test_the_target_reads_each_canary_as_often_as_its_dose(home, tmp_path, seen, corpus):
    saved = target(str(tmp_path / "planted"))
    made = canaries.of_target(saved, corpus)
    assert [count(canary, seen) for canary in made] == [0, 3, 0, 5] and len(seen) == STEPS


def test_without_canaries_a_run_is_what_it_was(home, tmp_path, monkeypatch):
    """Nothing of canaries.py but the parsing of '' is called where there are none."""

    def never(*args):
        raise AssertionError("called")

    monkeypatch.setattr(Schedule, "__init__", never)
    monkeypatch.setattr(Schedule, "plant", never)
    plain = target(str(tmp_path / "plain"), canaries="")
    assert canaries.make(data.load("text"), "", 0) == [] and plain["config"]["canaries"] == ""
    torch.manual_seed(0)  # the batches and the training, written out
    corpus, config = data.load("text"), train_target.Config(**SETTINGS)
    model = train_target.GPT(train_target.GPTConfig(**plain["gpt"]))
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=config.adam_betas, fused=True)
    for step in range(STEPS):
        tokens = corpus.batch("train", step, B, T, 0)
        optimizer.param_groups[0]["lr"] = config.lr * train_target.cosine(step, STEPS, config.warmup)
        loss = train_target.next_token_ce(model(tokens[:, :-1]), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain["model"]), tensors(model.state_dict())))


class StopsAt:
    """Takes the place of run.interruptible: Ctrl-C in this step."""

    def __init__(self, step: int) -> None:
        self.calls = iter([False] * step + [True] * 1000)

    def __enter__(self):
        return lambda: next(self.calls)

    def __exit__(self, *_):
        pass


def test_resumed_it_reads_the_same_batches_and_ends_in_the_same_weights(home, tmp_path, seen, monkeypatch):
    whole, whole_seen = target(str(tmp_path / "whole")), list(seen)
    seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(run, "interruptible", lambda: StopsAt(4))
        with pytest.raises(SystemExit):
            target(str(tmp_path / "cut"))
    config = train_target.Config(resume=str(tmp_path / "cut")).defaults()
    assert config.canaries == "0,3,0,5"
    train_target.main(config)
    again = checkpoints.load_checkpoint(tmp_path / "cut" / "checkpoint.pt", "target")
    assert len(seen) == STEPS and all(torch.equal(a, b) for a, b in zip(seen, whole_seen))
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole["model"]), tensors(again["model"])))


def test_retrained_with_the_same_list_it_is_the_same_and_without_one_canary_another(home, tmp_path):
    first, again, without = (
        target(str(tmp_path / out), canaries=doses)
        for out, doses in (("a", "0,3,0,5"), ("b", "0,3,0,5"), ("c", "0,3,0,0"))
    )
    assert all(torch.equal(a, b) for a, b in zip(tensors(first["model"]), tensors(again["model"])))
    assert not all(torch.equal(a, b) for a, b in zip(tensors(first["model"]), tensors(without["model"])))


def test_on_resuming_the_steps_of_a_run_with_canaries_cannot_change(home, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "interruptible", lambda: StopsAt(2))
    for out, doses in (("with", "0,3"), ("without", "")):
        with pytest.raises(SystemExit):
            target(str(tmp_path / out), canaries=doses)
    assert "steps=20: canaries are spread over 12 steps, which cannot change" in one_line(
        train_target, f"--resume={tmp_path / 'with'}", "--steps=20"
    )
    longer = dataclasses.replace(train_target.Config(resume=str(tmp_path / "without")).defaults(), steps=20)
    with pytest.raises(SystemExit):  # it goes on, and is interrupted again
        train_target.main(longer)


def read_by_decomposition(monkeypatch, **changes) -> list[torch.Tensor]:
    batches = []
    step = decompose.VPD.train_step

    def recorded(vpd, x):
        batches.append(x.clone())
        return step(vpd, x)

    with monkeypatch.context() as patch:
        patch.setattr(decompose.VPD, "train_step", recorded)
        decompose.train(decompose.Config(**(dict(dataset="text") | TINY | dict(T=T, steps=16, B=B) | changes)))
    return batches


def test_the_decomposition_reads_them_at_the_same_rate_or_not_at_all(home, tmp_path, monkeypatch, corpus):
    """16 steps of 4 windows against 12: doses 3 and 5 become 4 and 7."""
    saved = target(str(tmp_path / "target"))
    made, options = canaries.of_target(saved, corpus), dict(target=str(tmp_path / "target"))
    whole = read_by_decomposition(monkeypatch, out=str(tmp_path / "with"), **options)
    inside = [int((torch.cat(whole).unfold(1, LENGTH - 1, 1) == c.tokens[:-1]).all(-1).sum()) for c in made]
    assert inside == [0, 4, 0, 7]
    plain = read_by_decomposition(monkeypatch, out=str(tmp_path / "without"), canaries=False, **options)
    assert all(torch.equal(x, corpus.batch("train", i, B, T, 0)[:, :-1]) for i, x in enumerate(plain))
    with monkeypatch.context() as patch:  # interrupted and resumed: the same batches
        patch.setattr(run, "interruptible", lambda: StopsAt(5))
        with pytest.raises(SystemExit):
            read_by_decomposition(patch, out=str(tmp_path / "cut"), **options)
    config = dataclasses.asdict(resumed(str(tmp_path / "cut")))
    rest = read_by_decomposition(monkeypatch, **config)
    assert len(rest) == 10 and all(torch.equal(a, b) for a, b in zip(rest, whole[6:]))
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["canaries"] is True


def test_a_target_that_knows_no_canaries_has_none(home, corpus):
    saved = checkpoints.load_checkpoint(home / "target" / "checkpoint.pt", "target")
    old = {**saved, "config": {k: v for k, v in saved["config"].items() if k != "canaries"}}
    assert canaries.of_target(old, corpus) == [] and canaries.of_stream(old, corpus, 10, 2, T, 0) is None


def test_the_shape_of_a_canary():
    assert (PREFIX, SECRET, LENGTH) == (8, 12, 20)
    (canary,) = planted([1])
    assert canary.prefix.tolist() == list(range(1, 9)) and canary.secret.tolist() == list(range(9, 21))
