"""docs/your-own-model.md does what it says; a module of several inputs is decomposed as one that takes them packed."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import losses
from decompose import VPD, Method
from model import Decomposition
from toys.gamma import CISharedMLP

PAGE = Path(__file__).parent.parent / "docs" / "your-own-model.md"


def test_the_page_runs_and_finds_what_it_says():
    said: dict = {}
    with torch.random.fork_rng():
        for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
            exec(code, said)
    assert len(set(said["which"].tolist())) == 6  # a subcomponent for each input
    for i, c in enumerate(said["which"].tolist()):
        assert (said["V"][:, c].abs().argmax().item(), said["U"][:, c].abs().argmax().item()) == (i, (i + 1) % 6)
    loss_of = said["loss_of"]
    assert loss_of["adversarial"] < loss_of["zero"] / 5 and loss_of["rounded_0.0"] < loss_of["zero"] / 20


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x, gain):
        return gain * self.out(self.inp(x).relu())


class Packed(Two):
    def forward(self, both):
        return super().forward(both[:, :5], both[:, 5:])


@pytest.mark.parametrize("S, halves", [(1, False), (2, False), (2, True)])
def test_several_inputs_are_as_one_that_holds_them(S, halves):
    torch.manual_seed(0)
    two, packed = Two(), Packed()
    packed.load_state_dict(two.state_dict())
    x, gain, rows = torch.randn(6, 5), torch.randn(6, 1), []
    for target, batch in ((two, (x, gain)), (packed, torch.cat((x, gain), 1))):
        torch.manual_seed(1)
        decomposition = Decomposition(target, 7)
        method = Method(S=S, halves=halves, B=6, steps=3, beta_delta=1.0)
        vpd = VPD(decomposition, CISharedMLP([5, 4], 14, 8), method, (6,), torch.device("cpu"), losses.mse)
        rows.append([vpd.train_step(batch) for _ in range(3)])
        rows[-1].append({name: U.detach().clone() for name, U in decomposition.U.items()})
    for one, other in zip(*rows):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_another_shape_of_an_input_is_searched_anew():
    decomposition = Decomposition(Two(), 2)
    x, m = (torch.ones(3, 5), torch.ones(3, 1)), torch.ones(1, 6)
    decomposition(x, m)
    assert decomposition.searched == decomposition.state_of(x)
    assert decomposition.searched != decomposition.state_of((torch.ones(4, 5), torch.ones(4, 1)))
