"""Time studies/report.py with many live subcomponents: seconds, megabytes of the page, peak memory.

    OMP_NUM_THREADS=1 python -m bench.report out/vpd-stdlib

The run gives the target and the text. U, V and the causal importances are synthetic: as many subcomponents as asked for, spread
over its matrices, each important where a random direction of the target's activations is in its highest 0.1 to 10 % of tokens, about 2 % in the mean.
"""

import resource
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from cluster import open_run
from model import Decomposition, rms_norm
from run import run_script
from studies import report as interpret


class Gamma(nn.Module):
    """inputs, L x [B, T, d_in], to z [B, T, C]: above 0 at the share of positions that each subcomponent was given."""

    def __init__(self, inputs: list[torch.Tensor], C: int, generator: torch.Generator) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(sum(x.shape[-1] for x in inputs), C, generator=generator) / 10)
        share = 10 ** (-1 - 2 * torch.rand(C, generator=generator))
        z = self.seen(inputs).flatten(0, 1).sort(0, descending=True).values
        self.threshold = nn.Parameter(z.gather(0, (share * len(z)).long()[None])[0])

    def seen(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([rms_norm(x) for x in inputs], -1) @ self.W

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return self.seen(inputs) - self.threshold


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py
    live: str = "1000,10000"  # subcomponents
    tokens: int = 131_072  # of validation text
    keep: str = ""  # folder for the pages; default none is kept

    def __post_init__(self) -> None:
        if not all(n.isdigit() and int(n) > 0 for n in self.live.split(",")):
            raise ValueError(f"live={self.live!r}: must be whole numbers, as in 1000,10000")


@torch.no_grad()
def main(config: Config) -> None:
    run, corpus = open_run(config.run, "", "cpu")
    for live in map(int, config.live.split(",")):
        generator = torch.Generator().manual_seed(0)
        L, target = run.decomposition.L, run.decomposition.target
        counts = [live // L + (l < live % L) for l in range(L)]
        D = Decomposition(target, dict(zip(run.decomposition.names, counts)), generator)
        _, inputs = D.target_pass(corpus.batch("val", 0, 64, run.config["T"])[:, :-1])
        with tempfile.TemporaryDirectory() as folder:
            out = Path(config.keep or folder) / str(live)
            synthetic = replace(run, folder=Path(folder), decomposition=D, ci_fn=Gamma(inputs, live, generator))
            began, busy = time.time(), time.process_time()
            with torch.enable_grad():
                path = interpret.report(synthetic, corpus, interpret.Config("", tokens=config.tokens, out=str(out)))
            seconds, busy, gigabytes = (
                time.time() - began,
                time.process_time() - busy,
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            )
            print(
                f"{live:6,d} subcomponents: {seconds:6.1f} s, {busy:6.1f} s of CPU, {path.stat().st_size / 1e6:5.1f} MB, peak memory {gigabytes:.2f} GiB"
            )


if __name__ == "__main__":
    run_script(main, Config, __doc__)
