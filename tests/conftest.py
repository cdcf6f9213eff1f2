"""What the tests share: a tiny target f(x | W), a batch, and its decomposition."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported: no test may use the network
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402

from model import GPT, Decomposition, GPTConfig  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def gpt():
    """A GPT whose weights are far larger than at initialisation, so that every matrix matters to the logits."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, context=8, n_layer=2, n_head=2, d_model=16, d_mlp=32))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4, generator=generator)
    return model


@pytest.fixture
def tokens():
    """[B, T] = [3, 8], every id below 49: token 49 never occurs."""
    return torch.randint(0, 49, (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def decomposition(gpt):
    """All L = 12 matrices, C = 2 * (3 + 4 + 4 + 4 + 7 + 4) = 52."""
    return Decomposition(gpt, {"*.q": 3, "*.up": 7, "*": 4}, torch.Generator().manual_seed(2))
