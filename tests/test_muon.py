import pytest
import torch

from muon import Muon, orthogonalised


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(6, 6), (5, 7), (9, 4), (4, 40), (40, 4), (1, 5)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    G = torch.randn(shape, generator=generator())
    O, (U, _, Vh) = orthogonalised(G, steps=5), torch.linalg.svd(G, full_matrices=False)
    s = U.T @ O @ Vh.T
    assert torch.allclose(s, torch.diag(s.diagonal()), atol=1e-4)
    assert s.diagonal().min() > 0.6 and s.diagonal().max() < 1.25


def test_a_wide_matrix_in_its_smaller_space_gives_the_same():
    wide = torch.randn(8, 17, generator=generator())  # more than twice as wide as high: its own branch
    padded = torch.cat((wide, torch.zeros(9, 17)))  # zero rows change neither the others nor the norm
    assert torch.allclose(orthogonalised(wide, 5), orthogonalised(padded, 5)[:8], atol=1e-5)


def test_a_zero_gradient_moves_nothing():
    assert torch.equal(orthogonalised(torch.zeros(3, 4), 5), torch.zeros(3, 4))


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (5, 30)])
def test_five_steps_are_those_of_torch_but_for_its_bf16(shape):
    W = torch.randn(shape, generator=generator())
    ours, theirs = torch.nn.Parameter(W.clone()), torch.nn.Parameter(W.clone())
    muon = Muon([ours], lr=0.1, steps=5)
    torchs = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        ours.grad = torch.randn(shape, generator=generator(step))
        theirs.grad = ours.grad.clone()
        muon.step(), torchs.step()
    assert (ours - theirs).norm() < 0.02 * (ours - W).norm()


def test_it_goes_on_from_its_saved_state():
    grads = torch.randn(6, 3, 4, generator=generator())

    def steps(W, muon, grads):
        for grad in grads:
            W.grad = grad.clone()
            muon.step()

    W, V = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    whole, first = Muon([W], lr=0.1), Muon([V], lr=0.1)
    steps(W, whole, grads), steps(V, first, grads[:3])
    second = Muon([V], lr=0.3)
    second.load_state_dict(first.state_dict())
    steps(V, second, grads[3:])
    assert torch.equal(W, V)
