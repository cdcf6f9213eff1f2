"""Time studies/report.py with many live subcomponents: seconds, megabytes of the page, peak memory.

    OMP_NUM_THREADS=1 python -m bench.report out/vpd-stdlib    # 3 minutes of CPU, nearly all for 10,000

The run gives the target and the text. U, V and the causal importances are synthetic: as many subcomponents as asked
for, spread over its matrices. Each is important where a random direction of the target's activations is in its highest
0.1 to 10 % of tokens, about 2 % in the mean.
"""

import resource
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from eval import open_run
from flags import UserError, require
from model import Decomposition, rms_norm
from run import run_script
from studies import report


class Gamma(nn.Module):
    """inputs, L x [B, T, d_in], to z [B, T, C]: above 0 at the share of positions that each subcomponent was given."""

    def __init__(self, inputs: list[Tensor], C: int, generator: torch.Generator) -> None:
        super().__init__()
        self.W, self.threshold = torch.randn(sum(x.shape[-1] for x in inputs), C, generator=generator) / 10, 0.0
        share = 10 ** (-1 - 2 * torch.rand(C, generator=generator))
        z = self(inputs).flatten(0, 1).sort(0, descending=True).values
        self.threshold = z.gather(0, (share * len(z)).long()[None])[0]

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return torch.cat([rms_norm(x) for x in inputs], -1) @ self.W - self.threshold


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py
    live: str = "1000,10000"  # subcomponents
    tokens: int = 131_072  # of validation text
    keep: str = ""  # folder for the pages; default none is kept

    def __post_init__(self) -> None:
        require(self, "above 0", "tokens")
        if not all(n.isdecimal() and 0 < int(n) < 10**9 for n in self.live.split(",")):
            raise UserError(f"live={self.live!r}: must be whole numbers, as in 1000,10000")


def main(config: Config) -> None:
    run, corpus = open_run(config.run, device="cpu")
    names, target, generator = run.decomposition.names, run.decomposition.target, torch.Generator().manual_seed(0)
    for live in map(int, config.live.split(",")):
        C = {name: live // len(names) + (l < live % len(names)) for l, name in enumerate(names)}
        decomposition = Decomposition(target, {name: n for name, n in C.items() if n}, generator, "hidden")
        _, inputs = decomposition.target_pass(corpus.batch("val", 0, 64, run.config["T"])[:, :-1])
        gamma = Gamma(inputs, live, generator)
        with tempfile.TemporaryDirectory() as folder:
            synthetic = replace(run, folder=Path(folder), decomposition=decomposition, ci_fn=gamma)
            asked = report.Config("", tokens=config.tokens, out=str(Path(config.keep or folder) / str(live)))
            began, busy = time.time(), time.process_time()
            size = report.report(synthetic, corpus, asked).stat().st_size / 1e6
        seconds, busy = time.time() - began, time.process_time() - busy
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{live:6,d}: {seconds:6.1f} s, {busy:6.1f} s of CPU, {size:5.1f} MB, peak memory {memory:.2f} GiB")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
