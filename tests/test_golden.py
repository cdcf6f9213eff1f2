"""The authors' own code as a witness: three training steps of their released script on a tiny GPT of ours, in float64.

three_steps.npz holds the target, tokens, U, V, Gamma, the sources, every random draw, and, of each step, the losses,
the gradients before the clip and everything that came after. Names and orders are ours. Their RMSNorms inside Gamma use
the machine's epsilon, where ours is 1e-6.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ci_fn
import decompose
import losses
import model
from model import GPT, Decomposition, GPTConfig

GOLDEN = np.load(Path(__file__).parent / "three_steps.npz")


def golden(key: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[key]))


def tree(prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): golden(key) for key in GOLDEN.files if key.startswith(prefix)}


@pytest.fixture
def double(monkeypatch):
    """Everything in float64, `.float()` included."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(torch.float32)


class TheirGamma(ci_fn.CITransformer):
    def forward(self, inputs):
        with pytest.MonkeyPatch.context() as patch:
            for module in (ci_fn, model):
                patch.setattr(
                    module,
                    "rms_norm",
                    lambda x: F.rms_norm(x, x.shape[-1:], eps=golden("config/gamma_norm_eps").item()),
                )
            return super().forward(inputs)


def build() -> decompose.VPD:
    c = {key: value.item() for key, value in tree("config/").items()}
    target = GPT(GPTConfig(c["vocab_size"], c["context"], c["n_layer"], c["n_head"], c["d_model"], c["d_mlp"]))
    target.load_state_dict(tree("target/"))
    names = [str(name) for name in GOLDEN["names"]]
    decomposition = Decomposition(target, dict(zip(names, GOLDEN["C"].tolist())), ends_in="hidden")
    assert decomposition.names == names
    for name in names:
        decomposition.U[name].data.copy_(golden(f"start/U/{name}"))
        decomposition.V[name].data.copy_(golden(f"start/V/{name}"))
    d_ins = [V.shape[0] for V in decomposition.V.values()]
    gamma = TheirGamma(d_ins, int(GOLDEN["C"].sum()), c["d_ci"], c["n_layer_ci"], c["n_head_ci"], c["d_mlp_ci"])
    gamma.load_state_dict(tree("start/gamma/"))
    ours = ("B", "T", "lr", "lr_end", "clip", "n_adv", "adv_lr", "leak", "p_start", "p_end", *losses.BETAS.values())
    config = decompose.Config(steps=c["n_steps"], halves=False, muon=0.0, **{name: c[name] for name in ours})
    divergence = losses.HiddenKL(target.unembedding, chunk=7)
    vpd = decompose.VPD(decomposition, gamma, config, (c["B"], c["T"]), torch.device("cpu"), divergence)
    vpd.adversary.r.copy_(golden("start/r")[None])
    return vpd


def assert_close(ours: torch.Tensor, key: str) -> None:
    assert torch.allclose(ours.detach(), golden(key), rtol=1e-5, atol=1e-7), (key, (ours - golden(key)).abs().max())


def test_three_steps_of_the_authors(double, monkeypatch):
    vpd = build()
    f, gamma = vpd.decomposition, dict(vpd.ci_fn.named_parameters())
    clip = nn.utils.clip_grad_norm_

    for step in range(3):

        def schedule():
            for group in vpd.optimizer.param_groups:
                group["lr"] = golden(f"step{step}/lr").item()
            return golden(f"step{step}/p"), vpd.config.adv_lr  # theirs divides by `steps`, ours by steps - 1

        def clip_checked(parameters, norm):
            for name in f.names:
                assert_close(f.U[name].grad, f"step{step}/grad_U/{name}")
                assert_close(f.V[name].grad, f"step{step}/grad_V/{name}")
            for name, weight in gamma.items():
                assert_close(weight.grad, f"step{step}/grad_gamma/{name}")
            total = clip(parameters, norm)
            assert_close(total, f"step{step}/clip_norm")
            return total

        monkeypatch.setattr(vpd, "schedule", schedule)
        monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip_checked)
        monkeypatch.setattr(losses, "sample_sources", lambda shape, generator: golden(f"step{step}/u").reshape(shape))
        monkeypatch.setattr(
            losses, "sample_routing", lambda shape, L, g: golden(f"step{step}/routing").reshape(*shape, L)
        )
        row = vpd.train_step(golden(f"step{step}/tokens"))

        for name in (*losses.BETAS, "total"):
            assert_close(row[name], f"step{step}/loss/{name}")
        for name in f.names:
            assert_close(f.U[name], f"after{step}/U/{name}")
            assert_close(f.V[name], f"after{step}/V/{name}")
        for name, weight in gamma.items():
            assert_close(weight, f"after{step}/gamma/{name}")
        assert_close(vpd.adversary.r[0], f"after{step}/r")
