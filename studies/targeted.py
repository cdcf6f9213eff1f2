"""What does a targeted run hold? What its prompts need, and how little it disturbs other text.

    python -m studies.targeted out/targeted    # of a run that was made with --prompts; 20 s on one CPU core

A targeted run (Vigouroux and Sharkey, arXiv 2607.13047) finds the subcomponents that its prompts need; Delta keeps the
rest of the model. So two things must hold, on text that training has not seen:

  on the prompts   the important subcomponents alone, Delta cut to zero, say what the model says
  on other text    with Delta whole, the unimportant subcomponents, and nearly all others, can be ablated

Writes targeted.json into the run's folder.

  A. Numbers    KL(target || masked) in nats a token, of each text and each choice of masks
  B. Table
  C. The run
"""

import json
from dataclasses import dataclass

import torch
from torch import Tensor

import data
from eval import Run, adversarial_sources, mean_importances, of_windows, open_run, validation_windows
from flags import UserError, require
from losses import mask, sample_sources
from run import command, run_script, write_text

# ---------------------------------------------------------------------------------------------------------------------
# A. Numbers

KINDS = {  # masks of the subcomponents and of the Deltas
    "important ones alone": "m = g, Delta cut to zero",
    "random masks, Delta too": "m = g + (1 - g) r with r ~ U(0, 1)",
    "random masks, Delta whole": "the same with m_Delta = 1",
    "all subcomponents cut": "m = 0, m_Delta = 1: what is left is W - U V^T",
    "everything cut": "m = 0, m_Delta = 0",
}


def masks_of(kind: str, g: Tensor, L: int, generator: torch.Generator) -> Tensor:
    """m [B, T, C + L] of one of KINDS, for g [B, T, C]."""
    r = sample_sources((*g.shape[:-1], g.shape[-1] + L), generator)
    whole = "whole" in kind or kind == "all subcomponents cut"
    if kind.startswith("random"):
        m = mask(g, r)
        return torch.cat((m[..., :-L], torch.ones_like(m[..., -L:])), -1) if whole else m
    m_Delta = torch.full_like(r[..., -L:], float(whole))
    return torch.cat((g if kind.startswith("important") else torch.zeros_like(g), m_Delta), -1)


def measure(run: Run, corpus: data.Corpus, windows: int, adv_steps: int, seed: int) -> dict[str, float]:
    """L0, live subcomponents and the KL of each of KINDS, on `windows` validation windows; and of adv_steps of attack.

    The adversary's sources are those of eval.py: all windows share them, and Delta is attacked too.
    """
    generator, L = torch.Generator(run.device).manual_seed(seed), run.decomposition.L
    batches, _ = of_windows(run, validation_windows(corpus, windows, run.config["T"], seed))
    mean_g, l0 = mean_importances([g for _, _, g in batches])
    found = {"L0": l0.sum().item(), "live": int((mean_g > 1e-6).sum())}
    with torch.no_grad():
        for kind in KINDS:
            found[kind] = 0.0
            for x, hidden, g in batches:
                masked = run.decomposition(x, masks_of(kind, g, L, generator))
                found[kind] += run.kl(hidden, masked).item() * len(x) / windows
    _, last, _ = adversarial_sources(run.decomposition, batches, adv_steps, generator, run.kl)
    return found | {f"adversary, {adv_steps} steps": last}


# ---------------------------------------------------------------------------------------------------------------------
# B. Table


def table(prompts: dict[str, float], other: dict[str, float]) -> str:
    """Of both texts side by side, for a person."""
    lines = [f"{'KL in nats a token':28s} {'prompts':>10s} {'other text':>12s}"]
    return "\n".join(lines + [f"{name:28s} {prompts[name]:10.3f} {other[name]:12.3f}" for name in prompts])


# ---------------------------------------------------------------------------------------------------------------------
# C. The run


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py, made with --prompts
    windows: int = 64  # validation windows of each text
    adv_steps: int = 20  # steps of the adversary
    data_dir: str = ""  # where token files are kept; default as in the run
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        require(self, "above 0", "windows", "adv_steps")
        require(self, "0 or above", "seed")


def main(config: Config) -> None:
    run, prompts = open_run(config.run, config.data_dir, config.device)
    if "prompts" not in run.checkpoint:
        raise UserError(f"run={config.run}: not a targeted run: it was made without --prompts")
    other = data.of_run(run.folder, run.checkpoint, config.data_dir)
    found = [measure(run, text, config.windows, config.adv_steps, config.seed) for text in (prompts, other)]
    about = {"command": command(), "run_mark": run.mark, "windows": config.windows, "seed": config.seed}
    path = run.folder / "targeted.json"
    content = about | dict(zip(("prompts", "other_text"), found)) | {"masks": KINDS}
    write_text(path, json.dumps(content, indent=2) + "\n")
    print(table(*found))
    print(f"written: {path}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
