"""Memory of a string: metrics by hand, gains against central differences, removals against masks; the study, tiny."""

import copy
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest
from tiny import TINY, TINY_TARGET, one_line, tensors

import canaries
import decompose
import train_target
from canaries import Canary
from flags import UserError
from model import GPT, GPTConfig
from studies import dictionary, forget, memory
from studies.forget import Config, Half, Method, by_gain, chosen, grid, interval, is_forgotten, split
from studies.memory import Memory, exposure, log_p, matched
from studies.weights import edited_target, logits_with

close = torch.testing.assert_close
PIECES = [("blocks.0.attn.o", 1), ("blocks.1.mlp.down", 2), ("blocks.1.mlp.down", 0)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def exact(decomposition):
    return decomposition.double()


@pytest.fixture
def prefix():
    return torch.tensor([3, 17, 40])


@pytest.fixture
def secret():
    return torch.tensor([8, 1, 33, 20])


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_log_p_is_that_of_each_token_after_all_before(gpt, prefix):
    secrets = torch.randint(0, 49, (5, 4), generator=generator())
    for at_a_time in (5, 2):
        found, best = log_p(gpt, prefix, secrets, at_a_time)
        for i, s in enumerate(secrets):
            for j in range(4):
                logits = gpt(torch.cat((prefix, s[:j]))[None])[0, -1]
                close(found[i, j], logits.log_softmax(-1)[s[j]].detach(), atol=1e-4, rtol=1e-4)
                assert best[i, j] == (logits.argmax() == s[j])


def test_tokens_match_up_to_the_first_mistake():
    assert [matched(torch.tensor(row)) for row in ([True, True, False, True], [False, True], [True, True])] == [2, 0, 2]


def test_exposure_by_hand():
    others = torch.tensor([-1.0, -2.0, -3.0])
    assert [exposure(own, others) for own in (0.0, -1.5, -2.5, -9.0)] == [2.0, 1.0, 2 - math.log2(3), 0.0]
    assert exposure(-2.0, others) == 2 - math.log2(3)  # a tie counts against it


def test_an_untrained_model_gives_a_uniform_rank():
    torch.manual_seed(0)
    model, R = GPT(GPTConfig(vocab_size=50, context=8, d_model=16, n_head=2, d_mlp=16)), 64
    ranks = []
    for i in range(200):
        drawn = torch.randint(0, 50, (R + 1, 4), generator=generator(i))
        found = Memory.of(model, drawn[0], drawn[1], drawn[2:])
        ranks.append(R * 2**-found.exposure)
    assert min(ranks) >= 1 and max(ranks) <= R
    assert kstest((np.array(ranks) - 0.5) / R, "uniform").pvalue > 0.01


class Knows:
    """A model that continues one string with certainty, and knows nothing of anything else."""

    def __init__(self, string: torch.Tensor, vocab: int) -> None:
        self.string, self.unembedding = string, 50 * torch.eye(vocab)

    def hidden(self, tokens):
        known = (tokens == self.string[: tokens.shape[1]]).long().cumprod(1)[..., None]
        return known * F.one_hot(self.string[1 : tokens.shape[1] + 1], len(self.unembedding)).float()


def test_a_model_that_has_it_gives_all_the_bits_there_are(prefix, secret):
    others = torch.randint(0, 49, (999, 4), generator=generator())
    found = Memory.of(Knows(torch.cat((prefix, secret)), 50), prefix, secret, others)
    assert found.exposure == math.log2(1000) and found.matched == 4 and found.log_p == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Gains and removals


def test_the_gain_of_a_subcomponent_is_the_slope_of_log_p_in_its_mask(exact, prefix, secret):
    tokens, n = torch.cat((prefix, secret))[None, :-1], sum(exact.C.values())

    def value(c: int, m_c: float) -> torch.Tensor:
        m = torch.ones(1, tokens.shape[1], n + exact.L, dtype=torch.double)
        m[..., c] = m_c
        log_q = exact(tokens, m)[0, len(prefix) - 1 :].log_softmax(-1)
        return log_q.gather(-1, secret[:, None]).sum().detach()

    gains = memory.gains_of_pieces(exact, memory.gradient(exact.target, prefix, secret, exact.names))
    assert gains.shape == (n,)
    for c in range(0, n, 3):
        close(gains[c], (value(c, 1 + 1e-5) - value(c, 1 - 1e-5)) / 2e-5, atol=1e-7, rtol=1e-5)


def test_the_gain_of_a_neuron_or_head_is_the_slope_in_its_scale(exact, prefix, secret):
    target = exact.target
    units = memory.units_of(target)
    assert len(units) == 2 * (2 + 32) and units[0] == ("blocks.0.attn.o", 0, 8)
    gains = memory.gains_of_units(target, units, memory.gradient(target, prefix, secret, exact.names))
    for i in (0, 1, 2, 20, 34, 50):
        removal = memory.without_columns(target, [units[i]])
        values = [
            memory.secret_log_p(target, memory.scaled(target, removal, kappa), prefix, secret)
            for kappa in (-1e-5, 1e-5)
        ]
        close(gains[i], (values[0] - values[1]).detach() / 2e-5, atol=1e-7, rtol=1e-5)


def test_a_removal_is_the_masked_model_with_mask_0_and_delta_kept(exact, tokens):
    edited = edited_target(exact.target, memory.without_pieces(exact, PIECES))
    m = torch.ones(*tokens.shape, sum(exact.C.values()) + exact.L, dtype=torch.double)
    columns = [list(exact.C).index(name) for name, _ in PIECES]
    counts = list(exact.C.values())
    m[..., [sum(counts[:l]) + c for l, (_, c) in zip(columns, PIECES)]] = 0
    close(edited(tokens), exact(tokens, m), atol=1e-11, rtol=0)
    assert not torch.allclose(edited(tokens), exact.target(tokens))


def test_nothing_removed_is_the_target_itself(exact, tokens):
    removal = memory.without_pieces(exact, PIECES)
    nothing = memory.without_pieces(exact, []), memory.without_columns(exact.target, [])
    for weights in (*nothing, memory.scaled(exact.target, removal, 0.0)):
        assert torch.equal(edited_target(exact.target, weights)(tokens), exact.target(tokens))
    for name, W in memory.scaled(exact.target, removal, 1.0).items():
        close(W, removal[name], atol=1e-15, rtol=0)


def test_the_gain_of_a_latent_is_the_slope_in_what_it_writes(exact, prefix, secret):
    target = exact.target
    plt = dictionary.new(dictionary.Settings(D=6, k=3), target).double().requires_grad_(False)
    gains = memory.gains_of_latents(target, plt, prefix, secret)
    tokens = torch.cat((prefix, secret))[None]

    def value(i: int, share: float) -> torch.Tensor:
        """log p where `share` of what latent i writes is taken away."""
        scaled = copy.deepcopy(plt)
        scaled.W_dec[i // 6][i % 6] *= share
        logits = memory.WithoutLatents(target, scaled, [i])(tokens[:, :-1])[0, len(prefix) - 1 :]
        return logits.log_softmax(-1).gather(-1, secret[:, None]).sum()

    assert gains.shape == (12,) and gains.abs().max() > 0
    for i in range(12):
        close(gains[i], (value(i, -1e-5) - value(i, 1e-5)) / 2e-5, atol=1e-7, rtol=1e-5)
    assert torch.equal(memory.WithoutLatents(target, plt, [])(tokens), target(tokens))


def test_a_column_removed_is_zero_and_the_rest_is_left_alone(exact):
    weights = memory.without_columns(exact.target, [("blocks.0.mlp.down", 3, 4), ("blocks.0.mlp.down", 7, 9)])
    W = exact.W("blocks.0.mlp.down")
    assert list(weights) == ["blocks.0.mlp.down"]
    assert [i for i in range(32) if not torch.equal(weights["blocks.0.mlp.down"][:, i], W[:, i])] == [3, 7, 8]
    assert weights["blocks.0.mlp.down"][:, [3, 7, 8]].abs().max() == 0


def test_a_mean_ablation_keeps_the_output_at_the_mean_input(exact):
    weights = memory.without_pieces(exact, PIECES)
    mean_x = {name: torch.randn(W.shape[1], generator=generator()).double() for name, W in weights.items()}
    biases = memory.means_kept(exact.target, weights, mean_x)
    for name, W in weights.items():
        close(W @ mean_x[name] + biases[name], exact.W(name) @ mean_x[name])
    (u,) = [exact.U["blocks.0.attn.o"][:, 1]]  # + U_c times its mean activation
    close(biases["blocks.0.attn.o"], u * (exact.V["blocks.0.attn.o"][:, 1] @ mean_x["blocks.0.attn.o"]))


def test_parts_by_gain_over_cost_by_hand():
    gains, costs = torch.tensor([4.0, -1.0, 3.0, 2.0, 0.0]), [4.0, 9.0, 0.5, 0.1, 9.0]
    assert by_gain(gains, costs.__getitem__, 0.0) == [3, 2, 0]
    assert by_gain(gains, costs.__getitem__, None) == [0, 2, 3] == by_gain(gains, costs.__getitem__, 1e9)


# ---------------------------------------------------------------------------------------------------------------------
# Ascent


def changes(gpt, exact, prefix, secret) -> dict:
    G = memory.gradient(gpt, prefix, secret, exact.names)
    return {
        "full": memory.full(gpt, exact.names),
        "few": memory.largest_gradient(gpt, G, 0.01),
        "rank 2": memory.low_rank(gpt, exact.names, 2, generator()),
        "write": memory.write_vectors(exact, PIECES),
    }


@pytest.mark.parametrize("what", ["full", "few", "rank 2", "write"])
def test_ascent_makes_the_secret_less_likely_within_its_means(exact, prefix, secret, what):
    target = exact.target
    change = changes(target, exact, prefix, secret)[what]
    steps = [next_ for next_, _ in zip(memory.ascent(target, change, prefix, secret, 1e-2), range(10))]
    before = memory.secret_log_p(target, {}, prefix, secret).item()
    assert steps[0][1] == pytest.approx(before)  # it begins at the target itself
    weights = steps[-1][0]
    assert memory.secret_log_p(target, weights, prefix, secret).item() < before - 0.5
    D = {name: W - exact.W(name) for name, W in weights.items()}
    if what == "few":
        n = sum(W.numel() for W in weights.values())
        assert sum(int((d != 0).sum()) for d in D.values()) == round(0.01 * n)
    if what == "rank 2":
        assert all(torch.linalg.matrix_rank(d) <= 2 for d in D.values())
    if what == "write":
        assert D.keys() == {"blocks.0.attn.o", "blocks.1.mlp.down"}
        for name, d in D.items():  # what V of the chosen does not read is as before
            V = exact.V[name][:, [c for n, c in PIECES if n == name]]
            across = torch.eye(len(V)).double() - V @ torch.linalg.pinv(V)
            close(d @ across, torch.zeros_like(d), atol=1e-10, rtol=0)


def test_kl_holds_an_ascent_back_on_other_text(exact, prefix, secret, tokens):
    target, kls = exact.target, []
    for beta in (0.0, 30.0):
        found = memory.ascent(target, memory.full(target, exact.names), prefix, secret, 3e-3, beta, [tokens])
        weights = [weights for (weights, _), _ in zip(found, range(20))][-1]
        with torch.no_grad():
            log_q, p = logits_with(target, weights, tokens).log_softmax(-1), target(tokens).softmax(-1)
            kls.append((p * (p.log() - log_q)).sum(-1).mean().item())
    assert kls[1] < 0.7 * kls[0]


def test_relearning_brings_it_nearer(exact, prefix, secret):
    values = [
        memory.secret_log_p(
            exact.target, memory.relearned(exact.target, exact.names, prefix, secret, n, 1e-2), prefix, secret
        ).item()  # fmt: skip
        for n in (0, 1, 8)
    ]
    assert values[0] == pytest.approx(memory.secret_log_p(exact.target, {}, prefix, secret).item())
    assert values[0] < values[1] < values[2]


# ---------------------------------------------------------------------------------------------------------------------
# Choosing and judging


def canary(dose: int, natural: bool = False) -> Canary:
    return Canary(torch.arange(canaries.LENGTH), dose, natural)


def test_each_half_has_one_of_each_dose_and_none_that_was_never_planted():
    planted = [canary(d) for d in (0, 16, 64, 256, 0, 16, 64, 256)] + [canary(64, True), canary(64, True)]
    assert split(planted) == ([1, 2, 3, 8], [5, 6, 7, 9])
    assert split(planted[:4]) == ([1], [2, 3]) and split([canary(0)]) == ([], [])


def test_what_is_forgotten():
    unplanted = Memory(-40.0, 1, 5.0)
    assert is_forgotten(Memory(-90.0, 0, 1.0), False, None)
    assert not is_forgotten(Memory(-90.0, 1, 0.0), False, None) and not is_forgotten(Memory(-90.0, 0, 1.1), False, None)
    assert is_forgotten(Memory(-40.0, 1, 9.0), True, unplanted)
    assert not is_forgotten(Memory(-39.0, 0, 0.0), True, unplanted)
    assert not is_forgotten(Memory(-50.0, 2, 0.0), True, unplanted)


def test_the_setting_that_forgets_most_at_the_least_harm():
    result = lambda forgotten, kl: {"forgotten": forgotten, "kl": kl}
    results = {"a": [result(True, 9), result(False, 0)], "b": [result(True, 3), result(True, 3)]}
    assert chosen(results) == "b"
    assert chosen(results | {"c": [result(True, 1), result(True, 2)], "d": [result(True, None)] * 2}) == "c"


def test_the_table_by_hand():
    """One of two canaries is forgotten; only the second was ever matched, and is not any more after 4 parts."""
    point = lambda strength, matched, kl: {"strength": strength, "matched": matched, "kl": kl}
    first = {"points": [point(1, 0, 0.5)], "forgotten": True, "kl": 0.5, "seconds": 2.0}
    second = {"points": [point(1, 3, 0.1), point(4, 0, 0.3), point(8, 0, 0.7)], "forgotten": False, "kl": 0.7}
    second |= {
        "seconds": 4.0,
        "detail": {"rank": 8, "dce": 0.25, "others": -1.5, "in_text": -70.0, "relearned": [1, 2, 3]},
    }
    found = {
        "canaries": [{"target": {"matched": 0}}, {"target": {"matched": 12}}],
        "judged": {"some method": {"setting": {}, "results": {"0": first, "1": second}}},
    }
    row = forget.table(found).splitlines()[1].split()
    assert row[:7] == ["some", "method", "1", "of", "2", "1,8", "8"]
    assert row[7:] == ["0.3000", "0.6000", "0.5000-0.7000", "+0.250", "-1.50", "-70.0", "3.00", "3.0"]


def test_grid_and_interval():
    assert grid(a=(1, 2), b=("x",)) == ({"a": 1, "b": "x"}, {"a": 2, "b": "x"})
    assert interval([2.0, 2.0]) == (2.0, 2.0)
    low, high = interval([0.0, 1.0, 2.0, 3.0])
    assert 0 <= low < 1.5 < high <= 3


# ---------------------------------------------------------------------------------------------------------------------
# The study

DOSES = "0,3,4,0,3,4"
QUICK = dict(windows=2, secrets=8, steps=2, posthoc_steps=2, plt_steps=2)


@pytest.fixture(scope="module")
def session_planted(session_home, tmp_path_factory):
    """A run of which the target has canaries; in it everything is tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(session_home)
        import cost

        patch.setattr(cost, "report", lambda *args: None)
        out = tmp_path_factory.mktemp("planted")
        settings = TINY_TARGET | dict(T=24, B=4, canaries=DOSES)
        train_target.main(train_target.Config(dataset="text", out=str(out / "target"), **settings))
        settings = TINY | dict(T=24, target=str(out / "target"), out=str(out / "run"))
        decompose.train(decompose.Config(dataset="text", **settings))
    return out


@pytest.fixture
def planted(home, session_planted, tmp_path):
    """A copy of that run."""
    shutil.copytree(session_planted / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def lab(planted):
    return forget.open_lab(Config(str(planted), **QUICK))


def test_trained_with_the_same_list_it_is_the_target(lab):
    same = forget.trained_anew(lab, "same", [], 0)
    assert all(torch.equal(a, b) for a, b in zip(tensors(same.state_dict()), tensors(lab.target.state_dict())))
    without = forget.trained_anew(lab, "without", [5], 0)
    assert not torch.equal(without.embed.weight, lab.target.embed.weight)
    assert torch.equal(forget.trained_anew(lab, "without", [5], 0).embed.weight, without.embed.weight)  # it is there


def test_where_it_fires_alone(lab):
    x = lab.text[:2, :-1]
    g = lab.run.importances(x)[1]
    chosen = [int(c) for c in lab.live[:3]]
    m = torch.ones(*g.shape[:2], g.shape[-1] + lab.run.decomposition.L)
    for c in chosen:
        m[..., c] = torch.where(g[..., c] > 0, 0.0, 1.0)
    model = memory.WhereItFires(lab.run, chosen)
    close(model.hidden(x), lab.run.decomposition(x, m).detach())
    close(memory.WhereItFires(lab.run, [])(x), lab.target(x), atol=1e-5, rtol=1e-4)


class Poison:
    """A canary of half A, which nobody may look at who judges."""

    def __getattr__(self, name):
        raise AssertionError(f"half A was read: {name}")


@pytest.mark.parametrize("name", list(forget.METHODS))
def test_judging_never_reads_half_a(lab, name):
    A, B = forget.in_halves(lab)
    assert list(A.canaries) == [1, 2] and list(B.canaries) == [4, 5]
    method = forget.METHODS[name]
    half = Half("B", B.canaries, B.windows)
    for i in A.canaries:
        lab.planted[i] = Poison()
    result = forget.walk(lab, half, 5, method, method.grid[-1], True)
    assert result["points"] and result["kl"] >= 0 and result["detail"]["dce"] == pytest.approx(result["detail"]["dce"])
    json.dumps(result, allow_nan=False)


def test_the_halves_of_the_text_share_no_token(lab):
    A, B = forget.in_halves(lab)
    tokens = np.asarray(lab.corpus.tokens["val"])
    middle = len(tokens) // 2
    for half, (first, end) in ((A, (0, middle)), (B, (middle, len(tokens)))):
        for window in half.windows:
            assert len(canaries.places(tokens[first:end], window.numpy()))
    assert lab.text.shape == (64, 25)


def test_finders_rank_live_parts_once_each(lab):
    C = sum(lab.run.decomposition.C.values())
    rankings = [
        forget.rank_by_gain(lab, 4, 1e-3), forget.rank_by_gain(lab, 4, None), forget.rank_by_difference(lab, 4),
        forget.rank_by_importance(lab, 4, 0.1), forget.rank_at_random(lab, 4), forget.rank_by_norm(lab),
    ]  # fmt: skip
    for ranking in rankings:
        assert len(set(ranking)) == len(ranking) and all(0 <= c < C for c in ranking)
    assert set(rankings[0]) == set(rankings[1]) and set(rankings[4]) <= set(lab.live.tolist())


def test_the_study_is_kept_and_goes_on(planted, monkeypatch, capsys):
    few = {
        "a": Method(forget.by_gain_and_cost, grid(floor=(1e-3, None))),
        "b": Method(forget.all_weights, grid(lr=(1e-3, 1e-2))),
        "c": Method(forget.by_norm),
    }
    monkeypatch.setattr(forget, "METHODS", few)
    forget.main(Config(str(planted), **QUICK))
    found = json.loads((planted / "forget" / "forget.json").read_text())
    assert list(found["judged"]) == ["a", "b", "c", "trained anew"] and (planted / "forget" / "forget.png").exists()
    assert {i: row["half"] for i, row in enumerate(found["canaries"])} == {0: "", 1: "A", 2: "A", 3: "", 4: "B", 5: "B"}
    for name, judged in found["judged"].items():
        assert list(judged["results"]) == ["4", "5"] and (
            name in "c trained anew" or judged["setting"] in few[name].grid
        )
        assert all("from_gold" in r["detail"] for r in judged["results"].values())
    first = capsys.readouterr().out

    def never(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(forget, "walk", never)  # all is kept: nothing is measured or trained again
    monkeypatch.setattr(forget, "detail", never)
    forget.main(Config(str(planted), **QUICK))
    again = json.loads((planted / "forget" / "forget.json").read_text())
    assert (
        again["judged"] == found["judged"] and first.splitlines()[-4:-2] == capsys.readouterr().out.splitlines()[-4:-2]
    )
    with pytest.raises(AssertionError, match="measured again"):  # other settings are other numbers
        forget.main(Config(str(planted), **QUICK | dict(secrets=9)))


@pytest.mark.parametrize("args, said", [
    ([], "needs RUN"), (["nowhere"], "nowhere"), (["whole"], "needs a target trained on canaries"),
    (["whole", "--windows=0"], "windows=0: must be above 0"), (["whole", "--secret=20"], "did you mean --secrets?"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(whole, args, said):
    assert said in one_line(forget, *args)


def test_a_folder_trained_on_another_text_is_refused(lab, monkeypatch):
    forget.trained_anew(lab, "other", [4], 0)
    lab.run.checkpoint["target"]["tokens"] = "another"
    with pytest.raises(UserError, match="another text"):
        forget.trained_anew(lab, "other", [4], 0)


def test_kept_results_of_other_settings_are_not_used(tmp_path):
    kept = forget.Kept(tmp_path / "kept.json", {"a": 1})
    assert kept("x", lambda: [1.5]) == [1.5] and kept("x", lambda: [2.5]) == [1.5]
    assert forget.Kept(tmp_path / "kept.json", {"a": 1})("x", lambda: None) == [1.5]
    assert forget.Kept(tmp_path / "kept.json", {"a": 2})("x", lambda: 3) == 3
    for broken in ("", "[]", "{}", "3"):
        (tmp_path / "kept.json").write_text(broken)
        assert forget.Kept(tmp_path / "kept.json", {"a": 1})("x", lambda: 4) == 4
        (tmp_path / "kept.json").unlink()


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config("run").seed = 1
