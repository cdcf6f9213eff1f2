"""Sources that some positions share: the layout by hand, the ascent against eval.py's, a planted flaw and noise."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from test_losses import linears
from tiny import one_line

from eval import adversarial_sources, load_run
from losses import kl_divergence, mask, reconstruction, sample_sources
from model import Decomposition
from studies import sharing
from studies.sharing import Config, first, kl_of_windows, largest_met, of_positions, shared_sources, sharings

close = torch.testing.assert_close
C, L, N, T = 52, 12, 4, 8


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch(decomposition):
    """x [4, 8], f(x | W) and importances with a third at 0."""
    x = torch.randint(0, 49, (N, T), generator=generator(1))
    g = (torch.rand(N, T, C, generator=generator(5)) * 1.5 - 0.5).clamp(0, 1)
    return x, decomposition.f(x), g


def parts(batch, size: int) -> list:
    return list(zip(*(part.split(size) for part in batch)))


def kl(decomposition, batches, r, rows, columns) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(list(kl_of_windows(decomposition, batches, r, rows, columns, kl_divergence)))


LAYOUTS = [(1, 1), (1, 4), (1, T), (2, T), (N, T), (2, 2)]

# ---------------------------------------------------------------------------------------------------------------------
# Layout


@pytest.mark.parametrize("rows, columns", LAYOUTS)
def test_position_t_of_window_b_has_the_source_of_its_group(rows, columns):
    r = torch.rand(N // rows, T // columns, 3)
    found = of_positions(r, rows, columns, torch.tensor([1, 2, 3]))
    for i, b in enumerate((1, 2, 3)):
        for t in range(T):
            assert torch.equal(found[i, t], r[b // rows, t // columns])


@pytest.mark.parametrize("rows, columns", LAYOUTS)
def test_the_gradient_of_a_shared_source_is_the_sum_over_its_positions(rows, columns):
    r = torch.rand(N // rows, T // columns, 3, requires_grad=True)
    weight = torch.rand(N, T, 3)
    (grad_r,) = torch.autograd.grad((of_positions(r, rows, columns, torch.arange(N)) * weight).sum(), r)
    close(grad_r, weight.view(N // rows, rows, T // columns, columns, 3).sum((1, 3)))


@pytest.mark.parametrize("windows, T, expected", [
    (64, 64, [(1, 1), (1, 8), (1, 64), (8, 64), (64, 64)]),
    (8, 12, [(1, 1), (1, 6), (1, 12), (8, 12)]),
    (16, 7, [(1, 1), (1, 7), (8, 7), (16, 7)]),
    (2, 26, [(1, 1), (1, 2), (1, 26), (2, 26)]),
    (1, 1, [(1, 1)]),
])  # fmt: skip
def test_sharings_divide_windows_and_positions(windows, T, expected):
    assert sharings(windows, T) == expected
    assert all(windows % rows == 0 and T % columns == 0 for rows, columns in expected)


def test_the_first_windows(batch):
    for n in range(1, N + 1):
        taken = first(parts(batch, 3), n)
        assert all(torch.equal(torch.cat(of), whole[:n]) for of, whole in zip(zip(*taken), batch))


# ---------------------------------------------------------------------------------------------------------------------
# Ascent


@pytest.mark.parametrize("size", [N, 3])
def test_shared_by_all_it_is_the_adversary_of_eval(decomposition, batch, size):
    batches = parts(batch, size)
    r, last, largest = adversarial_sources(decomposition, batches, 5, generator())
    found, met = shared_sources(decomposition, batches, N, T, 5, generator())
    close(found, r[0], atol=1e-6, rtol=0)
    assert met.shape == (6, N)
    assert met[-1].mean().item() == pytest.approx(last, rel=1e-5)
    assert largest_met([met], N) == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize("rows, columns", LAYOUTS)
def test_parts_change_no_number(decomposition, batch, rows, columns):
    whole, met = shared_sources(decomposition, [batch], rows, columns, 4, generator())
    for size in (1, 3):
        r, met_2 = shared_sources(decomposition, parts(batch, size), rows, columns, 4, generator())
        close(r, whole, atol=1e-6, rtol=0)
        close(met_2, met, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows, columns", LAYOUTS)
def test_ascent_stays_in_0_to_1_and_climbs(decomposition, batch, rows, columns):
    r, met = shared_sources(decomposition, [batch], rows, columns, 10, generator())
    assert r.shape == (N // rows, T // columns, C + L) and r.min() >= 0 and r.max() <= 1
    assert met[-1].mean() > 1.5 * met[0].mean()
    assert not r.requires_grad and all(p.grad is None for p in decomposition.parameters())


@pytest.mark.parametrize("rows, columns", LAYOUTS)
def test_without_steps_the_kl_is_that_of_the_random_sources_themselves(decomposition, batch, rows, columns):
    r, (met,) = shared_sources(decomposition, [batch], rows, columns, 0, generator())
    assert torch.equal(r, sample_sources((N // rows, T // columns, C + L), generator()))
    x, target_output, g = batch
    everywhere = torch.stack([torch.stack([r[b // rows, t // columns] for t in range(T)]) for b in range(N)])
    with torch.no_grad():
        masked = decomposition(x, mask(g, everywhere))
    close(met, torch.stack([kl_divergence(target_output[b], masked[b]) for b in range(N)]))
    close(met.mean(), reconstruction(decomposition, x, target_output, g, everywhere[None]).detach())


@pytest.mark.parametrize("rows, columns", LAYOUTS)
def test_on_the_same_text_the_sources_do_what_they_did(decomposition, batch, rows, columns):
    r, met = shared_sources(decomposition, [batch], rows, columns, 3, generator())
    close(kl(decomposition, [batch], r, rows, columns), met[-1])


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, T), (2, T)])
def test_sets_of_windows_do_not_touch_each_other(decomposition, batch, rows, columns):
    """The last window has another target and importances: the sources of other sets climb as before, bit for bit."""
    x, target_output, g = batch
    r, met = shared_sources(decomposition, [batch], rows, columns, 4, generator())
    other = x, torch.cat((target_output[:-1], target_output[:1])), torch.cat((g[:-1], g[:1]))
    r_2, met_2 = shared_sources(decomposition, [other], rows, columns, 4, generator())
    assert torch.equal(r[: N // rows - 1], r_2[: N // rows - 1]) and not torch.equal(r[-1], r_2[-1])
    assert torch.equal(met[:, : N - rows], met_2[:, : N - rows])


def test_without_attention_each_position_climbs_by_itself():
    f = linears([[2.0, -1.0], [1.0, 3.0]], UV=0.5)
    x, g = torch.randn(2, 3, 2, generator=generator(1)), torch.zeros(2, 3, 1)
    target = f.f(x)
    r, _ = shared_sources(f, [(x, target, g)], 1, 1, 4, generator())
    target_2 = target.clone()
    target_2[1, 1] = -target[1, 1]
    r_2, _ = shared_sources(f, [(x, target_2, g)], 1, 1, 4, generator())
    same = (r == r_2).all(-1)
    assert not same[1, 1] and same.sum() == 5


def test_the_largest_met_is_of_each_set_over_steps_and_starts():
    met = [torch.tensor([[1.0, 3, 0, 0], [2, 2, 8, 0]]), torch.tensor([[0.0, 0, 1, 1], [0, 10, 0, 0]])]  # [steps, N]
    assert largest_met(met, 4) == 3  # windows' means: 1, 3; 0.5, 2.5
    assert largest_met(met, 2) == (5 + 4) / 2
    assert largest_met(met, 1) == (2 + 10 + 8 + 1) / 4


# ---------------------------------------------------------------------------------------------------------------------
# A flaw transfers, noise does not


def exact(gpt, extra: torch.Tensor | None = None) -> Decomposition:
    """blocks.*.mlp.down as its singular vectors, so that Delta = 0, and pairs that cancel while their masks are equal.

    extra [d_out, n]: U of n pairs, +U and -U, all with V of random directions.
    """
    n = 0 if extra is None else 2 * extra.shape[1]
    f = Decomposition(gpt, {"*.mlp.down": 16 + n}, generator(2))
    for name in f.names:
        U, S, V = torch.linalg.svd(f.W(name), full_matrices=False)
        U, V = U * S, V.T  # [16, 16], [32, 16]
        if n:
            directions = torch.randn(32, n // 2, generator=generator(3))
            U, V = torch.cat((U, extra, -extra), 1), torch.cat((V, directions, directions), 1)
        f.U[name].data, f.V[name].data = U.contiguous(), V.contiguous()
        close(f.Delta(name), torch.zeros_like(f.W(name)), atol=1e-5, rtol=0)
    return f


def here_and_there(f, g_of_one, rows, columns) -> tuple[float, float, float]:
    """Mean KL at the start, after ascent, and of the same sources on other text; g is the same everywhere."""
    texts = torch.randint(0, 49, (2, N, T), generator=generator(7))
    here, there = ([(x, f.f(x), g_of_one.expand(N, T, -1))] for x in texts)
    r, met = shared_sources(f, here, rows, columns, 10, generator())
    return met[0].mean().item(), met[-1].mean().item(), kl(f, there, r, rows, columns).mean().item()


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, T), (N, T)])
def test_a_flaw_transfers(gpt, rows, columns):
    """The strongest subcomponent of the first matrix is needed everywhere, but its g is 0."""
    f = exact(gpt)
    g = torch.ones(32)
    g[0] = 0
    start, found, elsewhere = here_and_there(f, g, rows, columns)
    assert found > 1.3 * start and elsewhere > 0.7 * found


def test_noise_does_not_transfer(gpt):
    """What is off cancels in the mean: its signs add up only for the positions that they were chosen for."""
    f = exact(gpt, 0.03 * torch.randn(16, 20, generator=generator(4)))
    g = torch.cat((torch.ones(16), torch.zeros(40))).repeat(2)
    x = torch.randint(0, 49, (N, T), generator=generator(8))
    batches = [(x, f.f(x), g.expand(N, T, -1))]
    assert kl(f, batches, torch.zeros(1, 1, 112 + 2), N, T).max() < 1e-6
    _, found, elsewhere = here_and_there(f, g, 1, 1)
    _, found_of_all, _ = here_and_there(f, g, N, T)
    assert elsewhere < 0.25 * found and found_of_all < 0.5 * found


# ---------------------------------------------------------------------------------------------------------------------
# The run

QUICK = dict(windows=16, steps="1,2", more="2,3", starts=2)


@pytest.fixture
def two(home, whole, request) -> list[str]:
    """Two copies of the tiny run, of this test alone."""
    names = [f"sharing-{i}-{request.node.name}" for i in (0, 1)]
    for name in names:
        shutil.copytree(whole, home / name)
    return names


def test_a_run_is_measured(two, capsys):
    sharing.main(Config((two[0],), **QUICK))
    found, printed = json.loads(Path(two[0], "sharing.json").read_text()), capsys.readouterr().out
    run = load_run(two[0], torch.device("cpu"))
    assert found["run_mark"] == run.mark and found["command"] and found["T"] == 16
    assert (found["windows"], found["seed"], found["steps"]) == (16, 0, "1,2")
    rows = [tuple(row[key] for key in ("positions", "windows", "steps", "starts")) for row in found["sharing"]]
    few = [(n, 16, steps, 2) for n in (1, 8) for steps in (1, 2)]
    many = [(n, 16, steps, starts) for n in (16, 128, 256) for steps, starts in ((1, 2), (2, 2), (3, 1))]
    assert rows == few + many
    for row in found["sharing"]:
        assert row["largest"] >= max(row["start"], row["kl"]) * (1 - 1e-5) and row["other_text"] > 0
    # eval.py wrote these, of two windows
    whole = json.loads(Path(two[0], "metrics.json").read_text())["kl"]
    sharing.main(Config((two[1],), windows=2, steps="1", more="", starts=1))
    prices = json.loads(Path(two[1], "sharing.json").read_text())["prices"]
    for what, mode in (("r = 0", "ci"), ("rounded", "rounded_0.0"), ("everything ablated", "zero")):
        assert prices[what] == pytest.approx(whole[mode], rel=1e-4)
    assert "16 positions" in printed and "everything ablated" in printed
    assert Path(two[0], "figures", "sharing.png").read_bytes()[:4] == b"\x89PNG"


def test_several_runs_are_drawn_and_each_is_measured_once(two, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(sharing, "plot_sharing", lambda runs, path: drawn.append((list(runs), str(path))))
    quick = QUICK | dict(windows=1)
    sharing.main(Config((two[1],), **quick))
    before = Path(two[1], "sharing.json").read_text()
    sharing.main(Config((*two, two[1] + "/"), **quick))
    assert Path(two[1], "sharing.json").read_text() == before
    assert drawn[-1] == (two, str(Path(two[0], "figures", "sharing.png")))
    assert capsys.readouterr().out.count("as measured before") == 1
    for change in (dict(seed=1), dict(steps="1"), dict(windows=2), dict(starts=1)):
        run = load_run(two[1], torch.device("cpu"))
        wanted = sharing.settings(run, Config((two[1],), **quick | change))
        assert sharing.measured(Path(two[1], "sharing.json"), wanted) is None
    for broken in ("", "[]", "3", "{}", before[:-20], before.replace("run_mark", "mark")):
        Path(two[1], "sharing.json").write_text(broken)
        assert sharing.measured(Path(two[1], "sharing.json"), sharing.settings(run, Config((two[1],), **quick))) is None


def test_runs_that_differ_in_their_seed_are_one_recipe(two, capsys, monkeypatch):
    """Their mean is drawn and printed; of a copy, or of another setting, there is a panel of its own."""
    drawn, quick = [], QUICK | dict(windows=1)
    monkeypatch.setattr(sharing, "plot_sharing", lambda recipes, path: drawn.append(recipes))

    def change(**settings) -> None:
        checkpoint = torch.load(path := Path(two[1], "checkpoint.pt"))
        checkpoint["config"] |= settings
        torch.save(checkpoint, path)

    change(seed=5, out="elsewhere", data_dir="there")
    sharing.main(Config(tuple(two), **quick))
    (title, of), *others = drawn[-1].items()
    assert others == [] and title == f"{two[0]} and 1 more seed: their mean" and len(of) == 2
    printed = capsys.readouterr().out.splitlines()
    of_all = statistics.mean(found["sharing"][-1]["largest"] for found in of)
    assert any(line.split()[:2] == ["16", "3"] and f"{of_all:.3f} ± " in line for line in printed)
    change(beta_imp=1.0)
    sharing.main(Config(tuple(two), **quick))
    assert [*drawn[-1]] == two and [len(of) for of in drawn[-1].values()] == [1, 1]


def test_decompositions_of_two_targets_are_two_recipes(whole):
    run = load_run(whole, torch.device("cpu"))
    before = sharing.recipe(run)
    with torch.no_grad():
        run.decomposition.target.embed.weight[0, 0] += 1
    assert sharing.recipe(run) != before


def test_the_kl_of_a_figure_may_be_0(tmp_path):
    prices = dict.fromkeys(("r = 0", "r = 0 or 1 by a coin", "everything ablated"), 0.0)
    row = {"positions": 1, "steps": 1, "starts": 1, "largest": 0.0, "other_text": 0.0}
    sharing.plot_sharing({"a": [{"T": 1, "windows": 1, "prices": prices, "sharing": [row]}]}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()


@pytest.mark.parametrize("args, said", [
    ([], "name at least one run folder"),
    (["nowhere"], "nowhere"),
    (["whole", "nowhere"], "nowhere"),
    (["whole", "--windows=12"], "windows=12: must be a multiple of 8"),
    (["whole", "--windows=0"], "windows=0: must be above 0"),
    (["whole", "--steps=20,"], "steps='20,': must be whole numbers above 0"),
    (["whole", "--more=0"], "more='0': must be whole numbers above 0"),
    (["whole", "--starts=0"], "starts=0: must be above 0"),
    (["whole", "--step=20"], "did you mean --steps?"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(whole, args, said):
    assert said in one_line(sharing, *args)
