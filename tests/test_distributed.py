"""However a batch is divided over processes, the step is that of one process on all of it.

Random numbers are dealt by the row of the batch that they are for, so that each division draws the same ones.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY, as_flags, config, tensors

import checkpoints
import data
import decompose
import distributed
import eval as evaluation
import losses
from flags import UserError

CPU = torch.device("cpu")
STEPS = 20
B = 4
REAL_ROUTING = losses.sample_routing
VARIANTS = [
    (False, {}),
    (True, {}),
    (True, {"adv_scope": "batch"}),
    (True, {"adv_scope": "sequence", "halves": False}),  # two rows each, so that Deal tells them from shared sources
    (True, {"adv_routing": "subset", "S": 2}),
]
VARIANTS += [
    (False, {"shard": True}),
    (True, {"shard": True, "d_mlp_ci": 15}),
]  # (double precision, settings); 15: uneven parts
VARIANTS += [(True, {"shard": True, "memory_budget": 0.0}), (True, {"beta_adv": 0.0})]
VARIANTS += [
    (True, {"adv_scope": "sequence", "adv_fresh": 0.5, "halves": False}),
    (True, {"muon": 0.0, "halves": False}),
    (True, {"shard": True, "muon": 0.0, "clip_ci": 1e-3}),
]


class Deal:
    """Takes the place of losses.sample_sources and losses.sample_routing: what a row gets depends on the row alone.

    Rows are numbered through the run, as many a call as all processes ask for. This process asks for its own in order.
    """

    def __init__(self, monkeypatch=None) -> None:
        self.asked = {}
        set_ = monkeypatch.setattr if monkeypatch else setattr
        set_(losses, "sample_sources", self.sources)
        set_(losses, "sample_routing", self.routing)

    def rows(self, kind: int, n: int) -> list[torch.Generator]:
        generators = []
        begin = self.asked.get(kind, 0)
        for i in range(begin, begin + n):
            row = i // n * n * distributed.world() + distributed.rank() * n + i % n
            generators.append(torch.Generator().manual_seed(3 * row + kind))
        self.asked[kind] = begin + n
        return generators

    def sources(self, shape, generator):
        if shape[1:3] == (1, 1):  # shared by the batch: drawn once, of no row
            return torch.rand(shape, generator=torch.Generator().manual_seed(distributed.rank()))
        return torch.stack([torch.rand((shape[0], *shape[2:]), generator=row) for row in self.rows(0, shape[1])], 1)

    def routing(self, shape, L, generator):
        return torch.stack([REAL_ROUTING((shape[0], *shape[2:]), L, row) for row in self.rows(1, shape[1])], 1)


@contextlib.contextmanager
def precision(double: bool):
    """In double precision, `.float()` included, what is left of a difference is no rounding that Adam has blown up."""
    real = torch.Tensor.float
    if double:
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.Tensor.float = real


def trained(folder: Path, short: bool = False, **changes) -> tuple[list[dict], dict]:
    """The losses of STEPS steps, and U, V, Gamma and the sources after them (in the first process).

    short: with a short evaluation, as --eval_every makes one, at the end.
    """
    c = config(B=B, steps=STEPS, beta_freq=0.05, lr=1e-3, **changes)
    vpd, _ = decompose.build(
        c, checkpoints.load_checkpoint(folder / "target/checkpoint.pt", "target"), torch.device("cpu")
    )
    vpd.warm_up()
    corpus = data.load("text")
    rows = [vpd.train_step(distributed.rows(corpus.batch("train", step, B, c.T)[:, :-1])) for step in range(STEPS)]
    if short:
        assert evaluation.short(vpd.decomposition, vpd.ci_fn, corpus, c, 2)["val_kl_stochastic"] >= 0
    state = vpd.state_dict()
    return [{name: value.item() for name, value in row.items()} for row in rows], {
        "U, V": torch.cat([p.flatten() for p in state["decomposition"].values()]),
        "Gamma": torch.cat([p.flatten() for p in state["ci_fn"].values()]),
    } | {name: state["adversary"][name].flatten() for name in ("r", "count") if state["adversary"]}


def agree(one, other, tolerance: float, losses_alone: bool = False) -> None:
    (rows, state), (other_rows, other_state) = one, other
    assert len(rows) == len(other_rows) == STEPS
    for step, (a, b) in enumerate(zip(rows, other_rows)):
        norm, other_norm = a.pop("grad_ci"), b.pop("grad_ci")
        assert b == pytest.approx(a, rel=tolerance, abs=tolerance), step
        assert other_norm == pytest.approx(norm, rel=max(1e-3, tolerance)), step  # a jump of the masks' slopes moves it
    for name in () if losses_alone else state:
        assert torch.allclose(state[name], other_state[name], rtol=0, atol=tolerance), (
            name,
            (state[name] - other_state[name]).abs().max(),
        )


CHILD = """
import torch
torch.set_num_threads(1)
import decompose, distributed, losses, run
from pathlib import Path
from test_distributed import VARIANTS, Deal, precision, trained
distributed.start("cpu")
results = []
for double, changes in VARIANTS:
    Deal()
    with precision(double):
        results.append(trained(Path("."), **changes))
run.bf16 = lambda device: True  # as on a GPU
for shard in (False, True):
    Deal()
    results.append(trained(Path("."), short=True, shard=shard))
if distributed.rank() == 0:
    torch.save(results, "two.pt")
distributed.stop()
"""


def torchrun(home: Path, *command: str) -> str:
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(decompose.__file__).parent)]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command],
        cwd=home,
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_are_one(home, monkeypatch):
    """Losses, and what the updates made of U, V, Gamma and r, over 20 steps: gradients, clip and sums are in them."""
    (home / "child.py").write_text(CHILD)
    torchrun(home, "child.py")
    *two, half, half_sharded = torch.load(home / "two.pt", weights_only=True)
    agree(half, half_sharded, tolerance=1e-6, losses_alone=True)
    for (double, changes), result in zip(VARIANTS, two):
        Deal(monkeypatch)
        with precision(double):
            one = trained(home, **changes | {"shard": False})
        agree(one, result, tolerance=1e-9 if double else 1e-6, losses_alone=not double)


def test_the_frequency_term_of_two_processes_by_hand(monkeypatch):
    """One position and one subcomponent in each, p = 1, g = 1 and 2: s = 3, both terms over 2 positions."""
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "mean", lambda tensor: torch.tensor([1.5]))
    g = [torch.tensor([[[value]]], requires_grad=True) for value in (1.0, 2.0)]
    for of_process in g:
        s = distributed.batch_sum(losses.power_sums(of_process, 1.0))
        importance, frequency = losses.importance_minimality(s, 2), losses.frequency_minimality(s, 2)
        assert importance.item() == pytest.approx(3 / 2)
        assert frequency.item() == pytest.approx(3 * 2 / 2)  # log2(1 + 3) = 2
        (frequency / 2).backward()  # the mean over the two processes
    # d/ds s log2(1 + s) / 2 at 3 is (2 + 3 / (4 ln 2)) / 2, and ds/dg is 1 in either process
    expected = (2 + 0.75 / 0.6931472) / 2
    assert [of_process.grad.item() for of_process in g] == pytest.approx([expected, expected])


def test_processes_draw_from_different_streams(home, monkeypatch):
    drawn = []
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "rank", lambda: rank)
            vpd, _ = decompose.build(
                config(), checkpoints.load_checkpoint(home / "target/checkpoint.pt", "target"), torch.device("cpu")
            )
            drawn.append(
                (vpd.adversary.r, torch.rand(9, generator=vpd.generator), vpd.decomposition.subcomponents()[0].detach())
            )
    assert not torch.equal(drawn[0][0], drawn[1][0]) and not torch.equal(drawn[0][1], drawn[1][1])
    assert torch.equal(drawn[0][2], drawn[1][2])  # the same start


STOPS = """
import decompose, distributed
step = decompose.VPD.train_step
def stops(self, x):
    if self.step == 5:
        distributed.stop()
        raise SystemExit(0)
    return step(self, x)
decompose.VPD.train_step = stops
decompose.main(decompose.Config(dataset='text', target='target', out={halves!r}, **{settings!r}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_torchrun_to_the_table_and_resumed(home, shard):
    """The command, stopped half way: the second half starts from both processes' sources and generators."""
    settings = TINY | dict(B=B, shard=shard, eval_every=3)
    script = str(Path(decompose.__file__))
    whole, halves = f"two-{shard}", f"two-halves-{shard}"
    printed = torchrun(home, script, "--dataset=text", "--target=target", f"--out={whole}", *as_flags(settings))
    assert printed.count("adversarial_80") == 1  # the first process alone prints
    (home / "stops.py").write_text(STOPS.format(halves=halves, settings=settings))
    torchrun(home, "stops.py")
    assert torch.load(home / halves / "checkpoint.pt", weights_only=True)["step"] == 4
    torchrun(home, script, f"--resume={halves}")
    once, twice = (torch.load(home / folder / "state.pt", weights_only=True)["vpd"] for folder in (whole, halves))
    assert once["adversary"]["r"].shape[1] == B // 2 and len(once["generators"]) == 2
    assert all(torch.equal(a, b) for a, b in zip(tensors(once), tensors(twice)))
    assert (home / whole / "metrics.jsonl").read_text() == (home / halves / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="one process has nothing to divide" if shard else "that run had 2 processes"):
        decompose.main(decompose.Config(resume=whole).defaults())
    # Sharded or not, what is saved is the state of a VPD that is not.
    vpd, _ = decompose.build(config(B=B), checkpoints.load_checkpoint(home / "target/checkpoint.pt", "target"), CPU)
    vpd.load_state_dict(once)
    for name, state in vpd.state_dict().items():
        pairs = zip(tensors(state), tensors(once[name]), strict=name != "generators")
        assert name == "generators" or all(torch.equal(a, b) for a, b in pairs)
    assert once["optimizer"]["param_groups"] == vpd.state_dict()["optimizer"]["param_groups"]


MINUTES = """
import decompose, distributed, run
import cost
from tiny import config
cost.report = lambda *args: 0
fit, stop = run.steps_that_fit, distributed.stop
distributed.stop = lambda: None  # four runs, one group of processes
class Clock:
    now = 0.0
    def __call__(self):  # goes faster in the second process, for which not one step would fit
        self.now += 1 + distributed.rank()
        return self.now
run.steps_that_fit = lambda minutes, began, step: fit(minutes, 0.0, step, Clock())
for shard in (False, True):
    for more in (dict(minutes=0.106), dict(steps=13)):
        decompose.train(config(B=4, shard=shard, **more, out=f"{shard}-{'-'.join(more)}"))
stop()
"""


@pytest.mark.slow
def test_two_processes_take_the_steps_that_the_first_finds(home):
    """From the state that they had before ten of them were timed: to the bits of a run of so many steps."""
    (home / "minutes.py").write_text(MINUTES)
    assert torchrun(home, "minutes.py").count("100.0 ms a step: 13 steps in what is left of 0.106 minutes") == 2
    for shard in (False, True):
        found, given = (checkpoints.load_checkpoint(home / f"{shard}-{how}/state.pt", "decomposition in training")
                        for how in ("minutes", "steps"))  # fmt: skip
        assert found["config"]["steps"] == found["vpd"]["step"] == 13
        assert all(torch.equal(a, b) for a, b in zip(tensors(found["vpd"]), tensors(given["vpd"]), strict=True))


POISONED = """
import torch
torch.set_num_threads(1)
import decompose, distributed, flags, run
import cost
from tiny import config
cost.report = lambda *args: 0
step = decompose.VPD.train_step
def poisoned(self, x):
    losses, gamma = step(self, x), [*self.ci_fn.parameters()]
    moments = [self.optimizer.state[p][name] for p in gamma for name in ("exp_avg", "exp_avg_sq")]
    kept = [*gamma, *(p.grad for p in gamma), *moments]
    kept = sum(t.to_local().numel() for t in kept), sum(p.numel() for p in gamma)
    torch.save(kept, f"kept-{distributed.rank()}.pt")
    if distributed.rank() == 1:
        gamma[-1].detach().to_local()[-1] = torch.nan
    return losses
decompose.VPD.train_step = poisoned
try:
    decompose.main(config(B=4, save_every=1, shard=True, out="poisoned"))
except flags.UserError as error:
    open(f"refused-{distributed.rank()}.txt", "w").write(str(error))
distributed.stop()
"""


@pytest.mark.slow
def test_a_sharded_gamma_is_kept_in_halves_and_each_is_looked_at(home):
    """Parameters, gradients and both moments; and what is not finite in one process ends the run in both, unsaved."""
    (home / "poisoned.py").write_text(POISONED)
    torchrun(home, "poisoned.py")
    for rank in (0, 1):
        kept, of = torch.load(home / f"kept-{rank}.pt")
        assert kept == 4 * of / 2
        assert "a weight is not finite at step 0" in (home / f"refused-{rank}.txt").read_text()
    assert not (home / "poisoned/checkpoint.pt").exists()


def test_one_process_cannot_shard(home):
    with pytest.raises(UserError, match="shard=True: one process has nothing to divide"):
        decompose.main(config(out="alone", shard=True))
    assert not (home / "alone").exists()
