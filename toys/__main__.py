"""Toys with known answers: decompose one, and check that its mechanisms were found (paper: canonical decompositions of
the toys of the APD and SPD papers).

    python -m toys tms_5-2                      # half a minute on 2 CPU cores; every check passes
    python -m toys tms_5-2 --method=spd         # the predecessor: no adversary, no frequency term
    python -m toys tms_5-2 --method=apd         # the oldest method: attributions and top-k (toys/apd.py)
    python -m toys ping_pong --beta_freq=0 --beta_imp=3e-3    # without the frequency term, as sparse
    python -m toys resid_mlp1 --help            # a toy's own settings

Trains the target (toys/targets.py), decomposes it with the VPD of decompose.py, prints the checks (toys/checks.py) and
writes out/toy-<name>-<method>-<seed>/ with metrics.json, config.json, checkpoint.pt and toy.png. docs/toys.md says what
to expect of each toy.

Left out: training on several seeds at once.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import checkpoints
import flags
import losses
import run
from ci_fn import CITransformer
from decompose import VPD, Method
from flags import UserError
from model import Decomposition
from toys import apd, checks, figures
from toys.answer import start_from_answer
from toys.gamma import CIMLPs, CISharedMLP
from toys.targets import TOYS, InductionHead, train

# ---------------------------------------------------------------------------------------------------------------------
# Settings

# What the toys share; the defaults of Method are those of a language model.
SHARED = dict(steps=3000, lr_warmup=0.0, lr_end=0.0, clip=1.0, faith_steps=200, beta_delta=1.0, adv_lr=0.05, p_end=1.0)
SHARED |= dict(halves=False, muon=0.0)
# TMS 5-2: in two dimensions any two features can share a subcomponent. docs/toys.md says what keeps them apart.
TMS_SMALL = dict(C=50, B=256, lr=1e-2, beta_adv=0.1, beta_imp=1e-4, beta_freq=1e-3, ci_spread=20.0, ci_bias=-1.0)
TMS_LARGE = dict(C=200, B=256, lr=3e-3, beta_adv=0.5, beta_imp=1e-5, beta_freq=2e-4, restarts=3)
# Residual MLPs: a Gamma that sees V_c^T x alone keeps mlp_in's subcomponents apart. The frequency term is off, as it
# costs a dense matrix most. And p does not fall: a piece of a dense matrix, here and in 40-10-id, then pays little
# where it matters little.
RESID = dict(ci="mlp", hidden=16, C=100, B=256, lr=1e-2, beta_adv=0.2, beta_freq=0.0)
VPD_PRESETS = {
    "tms_5-2": TMS_SMALL,
    "tms_5-2-id": TMS_SMALL | dict(lr=2e-2, beta_adv=0.2, restarts=3),
    "tms_40-10": TMS_LARGE,
    "tms_40-10-id": TMS_LARGE | dict(steps=12_000, lr=5e-3, beta_imp=2e-4, beta_freq=5.5e-5, p_end=2.5, restarts=1),
    "resid_mlp1": RESID | dict(steps=12_000, beta_imp=5e-6, p_end=2.2),
    "resid_mlp2": RESID | dict(beta_imp=2e-5, p_end=2.0, C=400, hidden=8, from_inputs="mlp_in.*"),
    "resid_mlp3": RESID | dict(steps=6000, beta_imp=2e-5, p_end=2.0, C=102),
    # It starts with Delta = W and small subcomponents, each important on a few inputs of its own, that grow where they
    # are wanted: the faithfulness warm-up would write into all of them what the circuits have in common.
    "ping_pong": dict(
        C=800, B=64, steps=5000, lr=3e-3, faith_steps=0, U_scale=0.1, leak=1e-3, beta_adv=0.5, beta_imp=1e-5,
        beta_freq=1e-3, hidden=1024, ci_spread=100.0, ci_bias=-30.0,
    ),
    "induction": dict(
        C=32, B=32, steps=5000, lr=3e-3, beta_adv=0.5, beta_imp=5e-3, beta_freq=5e-4, p_end=0.5, beta_delta=1e3,
        ci="transformer", hidden=64,
    ),
}  # fmt: skip
# The predecessor with its authors' importance coefficient, p, C and learning rate, and their two stochastic losses (all
# matrices, and each alone), drawn as one of twice the weight. It differs from theirs in its batch (theirs: 1024 to
# 4096), steps (10,000 to 200,000), a cosine for every toy, and a clipped gradient.
SPD = dict(beta_adv=0.0, beta_freq=0.0, B=1024, steps=10_000, ci="mlp", hidden=16)
SPD |= dict(beta_stoch=2.0, stoch_routing="layerwise")
SPD_PRESETS = {
    "tms_5-2": dict(C=20, lr=1e-3, beta_imp=3e-3, p_start=1.0, p_end=1.0),
    "tms_5-2-id": dict(C=20, lr=1e-3, beta_imp=3e-3, p_start=1.0, p_end=1.0),
    "tms_40-10": dict(C=200, lr=1e-3, beta_imp=1e-4, p_start=2.0, p_end=2.0),
    "tms_40-10-id": dict(C=200, lr=1e-3, beta_imp=1e-4, p_start=2.0, p_end=2.0),
    "resid_mlp1": dict(C=100, lr=2e-3, beta_imp=1e-5, p_start=2.0, p_end=2.0),
    "resid_mlp2": dict(C=400, lr=1e-3, beta_imp=1e-5, p_start=2.0, p_end=2.0),
    "resid_mlp3": dict(C=500, lr=1e-3, beta_imp=5e-6, p_start=2.0, p_end=2.0, hidden=128),
    "ping_pong": dict(C=200, lr=3e-3, beta_imp=3e-3, p_start=1.0, p_end=1.0),  # not theirs
    "induction": dict(C=32, lr=1e-3, beta_imp=1e-2, p_start=1.0, p_end=1.0, B=64),  # theirs is stale
}


@dataclass(frozen=True)
class Config(Method):
    # tms_5-2, tms_5-2-id, tms_40-10, tms_40-10-id, resid_mlp1, resid_mlp2, resid_mlp3, ping_pong or induction
    toy: tyro.conf.Positional[str] = "tms_5-2"
    # spd: no adversary, no frequency term, an MLP for each subcomponent; apd: see --method=apd --help
    method: Literal["vpd", "spd"] = "vpd"
    C: int = 20  # subcomponents of each matrix
    # Gamma: one MLP over all matrices, an MLP for each subcomponent, or as for language
    ci: Literal["shared", "mlp", "transformer"] = "shared"
    hidden: int = 128  # width of Gamma's hidden layer or of its residual stream
    ci_spread: float = 1.0  # scale of the shared Gamma's last layer at the start
    ci_bias: float = 0.0  # and its bias
    from_answer: bool = False  # start at the known answer, to see whether the loss keeps it; no warm-up, no from_inputs
    restarts: int = 1  # decompositions to make; the one of least loss is kept
    U_scale: float = 1.0  # on the initial U
    from_inputs: str = ""  # matrices, as a glob pattern, whose subcomponents start as what W does to an input
    out: str = ""  # run folder; default out/toy-<toy>-<method>-<seed>, with a number behind it if that is taken

    def __post_init__(self) -> None:
        super().__post_init__()
        flags.require(self, "above 0", "C", "hidden", "restarts", "U_scale")
        flags.require(self, "0 or above", "ci_spread")
        if not abs(self.ci_bias) < 2**63:
            raise UserError(f"ci_bias={self.ci_bias}: must be a number of magnitude below 2^63")
        if self.device not in ("auto", "cpu"):
            raise UserError(f"device={self.device}: toys run on the CPU, where they take minutes")
        if self.toy not in TOYS:
            raise UserError(f"unknown toy {self.toy!r}: there are {', '.join(TOYS)}")
        for beta in ("beta_adv", "beta_freq"):
            if self.method == "spd" and getattr(self, beta):
                raise UserError(f"method=spd contradicts {beta}={getattr(self, beta)}: SPD has no such loss")
        ci, spread, bias = self.ci, self.ci_spread, self.ci_bias
        if ci != "shared" and (spread, bias) != (1.0, 0.0):
            raise UserError(f"ci={ci} contradicts ci_spread={spread} or ci_bias={bias}: they are for the shared Gamma")
        if self.from_answer and self.toy == "induction":
            raise UserError("from_answer=True contradicts toy=induction: it has no known answer")
        if ci == "transformer" and self.toy != "induction":
            raise UserError(f"ci=transformer contradicts toy={self.toy}: its inputs have no sequence axis")
        if ci == "transformer" and self.hidden % 8:
            raise UserError(f"hidden={self.hidden}: with ci=transformer a multiple of 8")


def preset(toy: str, method: Literal["vpd", "spd"]) -> Config:
    """The settings that a toy is decomposed with. UserError for an unknown name."""
    given = SPD | SPD_PRESETS.get(toy, {}) if method == "spd" else VPD_PRESETS.get(toy, {})
    return Config(toy=toy, method=method, **(SHARED | given))


def named_method() -> str:
    """What follows --method on the command line, before it is read: the methods have flags of their own."""
    pairs = [arg.split("=", 1) for arg in sys.argv if "=" in arg] + [*zip(sys.argv, sys.argv[1:])]
    return dict(map(tuple, pairs)).get("--method", "vpd")


def defaults() -> Config | apd.Config:
    """The preset of the toy and the method that the command line names, so that --help shows it and flags change it."""
    named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    late = [arg for arg in sys.argv[2:] if arg in TOYS]
    if late and not named:
        raise UserError(f"{late[0]}: the name of the toy comes first")
    name, method = sys.argv[1] if named else "tms_5-2", named_method()
    return apd.preset(name) if method == "apd" else preset(name, "spd" if method == "spd" else "vpd")


# ---------------------------------------------------------------------------------------------------------------------
# The run


@torch.no_grad()
def start_from_inputs(decomposition: Decomposition, pattern: str, x: Tensor) -> None:
    """V_c = a_c, an input of the matrix of length 1, and U_c = W a_c, times what brings U V^T nearest to W.

    So a subcomponent starts with the mechanisms of one input, and not with a little of all. x: inputs of the target.
    UserError if the pattern matches no matrix.
    """
    if not any(fnmatchcase(name, pattern) for name in decomposition.names):
        raise UserError(f"from_inputs={pattern!r} matches none of {', '.join(decomposition.names)}")
    for name, a in zip(decomposition.names, decomposition.target_pass(x)[1]):
        if fnmatchcase(name, pattern):
            W, a = decomposition.W(name), a.flatten(0, -2)
            V = F.normalize(a[a.norm(dim=-1) > 0][: decomposition.C[name]], dim=-1).T
            U = W @ V
            nearest = (U @ V.T * W).sum() / (U @ V.T).square().sum()
            even = (nearest * U.norm(dim=0)).sqrt()  # U_c and V_c of one length
            decomposition.U[name][:, : V.shape[1]] = nearest * U / even
            decomposition.V[name][:, : V.shape[1]] = even * V


def build(config: Config, target: nn.Module) -> VPD:
    """A VPD of a toy at its initialisation: the Decomposition, losses and step of decompose.py."""
    torch.manual_seed(config.seed)
    induction = isinstance(target, InductionHead)
    decomposition = Decomposition(target, {"layers.*" if induction else "*": config.C})
    for U in decomposition.U.values():
        U.data *= config.U_scale
    if config.from_inputs:
        inputs = target.batch(4 * config.C, torch.Generator().manual_seed(config.seed + 4_000_000))
        start_from_inputs(decomposition, config.from_inputs, inputs)
    d_ins, C = [V.shape[0] for V in decomposition.V.values()], sum(decomposition.C.values())
    if config.ci == "mlp":
        ci_fn = CIMLPs([*decomposition.V.values()], config.hidden)
    elif config.ci == "shared":
        ci_fn = CISharedMLP(d_ins, C, config.hidden, config.ci_spread, config.ci_bias)
    else:
        ci_fn = CITransformer(d_ins, C, config.hidden, n_layer=2, n_head=4, d_mlp=4 * config.hidden)
    positions, divergence = ((target.T,), losses.kl_divergence) if induction else ((), losses.mse)
    return VPD(decomposition, ci_fn, config, (config.B, *positions), torch.device("cpu"), divergence)


def decompose(config: Config, target: nn.Module) -> VPD:
    """The VPD with the least loss, mean over its last tenth of the steps, of `restarts` that see the same data.

    Subcomponents that serve several mechanisms are local minima of the loss, which knows nothing of the answer.
    """
    best, least, last_tenth = None, math.inf, min(int(0.9 * config.steps), config.steps - 1)
    for restart in range(config.restarts):
        vpd = build(replace(config, seed=config.seed + 1000 * restart), target)
        generator, loss = torch.Generator().manual_seed(config.seed + 1), torch.zeros(())
        if config.from_answer:
            start_from_answer(vpd, config.B, generator)
        else:
            vpd.warm_up()
        what = f"decompose {restart + 1}/{config.restarts}"
        for step in (bar := run.progress_bar(0, config.steps, what)):
            row = vpd.train_step(target.batch(config.B, generator))
            if step >= last_tenth:
                loss += row["total"] / (config.steps - last_tenth)
            if step % 100 == 0 or step == config.steps - 1:
                row = {"step": step} | {name: value.item() for name, value in row.items()}
                run.refuse_non_finite(row, vpd.learning, str(config.lr))
                bar.set_postfix({name: f"{row[name]:.2e}" for name in ("total", "l0")}, refresh=False)
        print(f"{what}: loss {loss.item():.6f}")
        if best is None or loss.item() < least:
            best, least = vpd, loss.item()
    return best


def main(config: Config | apd.Config) -> None:
    torch.set_num_threads(1)  # these matrices are small: a second thread costs more than it gives
    folder = run.new_folder(config.out, Path(f"out/toy-{config.toy}-{config.method}-{config.seed}"))
    folder.mkdir(parents=True, exist_ok=True)

    began = time.time()
    target = train(TOYS[config.toy], config.seed)
    trained = time.time()
    vpd = apd.decompose(config, target) if config.method == "apd" else decompose(config, target)
    seconds = {"target": trained - began, "decompose": time.time() - trained}

    title, ablations, alphas = f"{config.toy}, {config.method}, seed {config.seed}", {}, []
    if config.method == "apd":
        found = apd.feature_checks(config, vpd)
        figures.plot(apd.matrices(config, vpd, target.probes()), folder / "toy.png", title)
    elif config.toy == "induction":
        ablations = checks.induction_ablations(vpd, config.seed)
        found = checks.induction_checks(vpd, config.seed, ablations)
        figures.plot_induction(ablations, folder / "toy.png", title)
        print(figures.ablation_table(ablations))
    else:
        found = checks.feature_checks(vpd, config.seed)
        figures.plot(checks.matrices(vpd, target.probes()), folder / "toy.png", title)
        alphas = checks.known_clusterings(vpd, config.seed)
        at = ", ".join(map(str, alphas)) or "none"
        print(f"cluster.py groups the live subcomponents as they belong together at alpha = {at}")
    metrics = {"checks": [asdict(c) for c in found], "ablations": ablations, "alphas": alphas, "seconds": seconds}
    content = {"config": asdict(config), "target": target.state_dict(), "vpd": vpd.state_dict()}
    checkpoints.save(folder / "checkpoint.pt", "toy", content)
    run.write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    run.write_config(folder, config, torch.device("cpu"))

    print(figures.table(config.toy, found))
    judged = [check.ok for check in found if check.ok is not None]
    times = f"target {seconds['target']:.0f} s, decomposition {seconds['decompose']:.0f} s"
    print(f"{sum(judged)} of {len(judged)} checks pass; {times}; saved in {folder}")


if __name__ == "__main__":
    run.run_script(main, apd.Config if named_method() == "apd" else Config, __doc__, defaults)
