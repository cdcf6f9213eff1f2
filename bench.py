"""Time one step of decompose.py at the default size, eager and compiled.

    python bench.py              # about a minute and a half on 2 CPU cores, most of it compilation
    python bench.py --help

Prints the median and the range of the seconds a step, tokens a second, and what compilation cost before the first step.
The target and the tokens are random: the time of a step does not depend on them. Left out: data, logging, evaluation.
"""

import statistics
import time
from dataclasses import asdict, dataclass

import torch

import decompose
from model import GPT, GPTConfig
from train_target import pick_device, run_script


@dataclass(frozen=True)
class Config:
    steps: int = 40  # timed steps of each variant, after 3 to warm up
    B: int = decompose.Config.B  # sequences a step
    T: int = decompose.Config.T  # tokens a sequence
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        if min(self.steps, self.B, self.T) < 1:
            raise ValueError(f"steps={self.steps}, B={self.B}, T={self.T}: must be at least 1")


def step_seconds(config: Config, compiled: bool) -> tuple[list[float], float]:
    """Seconds of each timed step, and of the first three together, compilation included."""
    device = pick_device(config.device)
    target = GPT(GPTConfig(context=config.T))
    checkpoint = {"gpt": asdict(target.config), "model": target.state_dict()}
    vpd, _ = decompose.build(decompose.Config(B=config.B, T=config.T, compile=compiled), checkpoint, device)
    x = torch.randint(0, target.config.vocab_size, (config.B, config.T), device=device)
    seconds = []
    for _ in range(3 + config.steps):
        began = time.perf_counter()
        vpd.train_step(x)["total"].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return seconds[3:], sum(seconds[:3])


def main(config: Config) -> None:
    print(f"{config.B} x {config.T} tokens a step, {config.steps} steps, {torch.get_num_threads()} threads, {pick_device(config.device)}")
    for name, compiled in (("eager", False), ("compiled", True)):
        seconds, first = step_seconds(config, compiled)
        median = statistics.median(seconds)
        tokens = config.B * config.T / median
        print(f"{name:9s} {median * 1e3:7.1f} ms a step ({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f}), {tokens:,.0f} tokens/s; first three steps {first:.1f} s")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
