"""Dictionaries that stand for a target's MLPs: SAE, per-layer and cross-layer transcoders; how they learn; their files.

    plt, = train([Settings("plt", D=512, k=12)], target, batch)    # batch(step): tokens [B, T]
    save(plt, folder); plt = load(folder); plt.W_dec[l]            # [D, d_model], rows of norm 1

  A. Selection       BatchTopK in training; one fixed threshold afterwards
  B. Dictionaries    PLT, SAE, CLT under their equations
  C. Replaced MLPs   the forward pass where MLPs are answered by something else
  D. Training        local MSE or KL of the whole model; auxiliary loss for dead latents; unit decoder rows
  E. Files           those of SAELens for an SAE, of circuit-tracer for transcoders

In all of it x_l [..., d] is the normed input of MLP l and y_l its output, n MLPs in order, D latents each. Methods:
Bussmann et al. 2024 (BatchTopK), Gao et al. 2024 (auxiliary loss), Dunefsky et al. 2024 (transcoders), Ameisen et al.
2025 (cross-layer transcoders). Left out: skip connections, other activations, decoders of attention.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cost
from flags import UserError, require
from losses import HiddenKL
from model import GPT, MLP
from run import progress_bar, written
from train_target import cosine

# ---------------------------------------------------------------------------------------------------------------------
# A. Selection


def kth_largest(values: Tensor, k: int) -> float:
    """The k-th largest of all numbers, 1 <= k <= their count. On a CPU numpy's selection is 8 times torch's speed."""
    values = values.detach().flatten()
    if values.device.type == "cpu":
        return float(np.partition(values.numpy(), len(values) - k)[len(values) - k])
    return values.topk(k, sorted=False).values.min().item()


def batch_topk(z: Tensor, k: int) -> tuple[Tensor, float]:
    """h = BatchTopK(relu(z)): of z [..., D] at N positions the k N largest stay, if they are positive; the rest is 0.

    Exactly min(k N, positive ones) are not 0; of equal ones at the edge the first stay. N = 1 is TopK. The choice has
    no gradient. Also the edge: the smallest that stays, 0 if all positive ones do. UserError if k is above D.
    """
    if k > z.shape[-1]:
        raise UserError(f"k={k}: must be at most the {z.shape[-1]} latents")
    most = k * z[..., 0].numel()
    edge = max(kth_largest(z, most), 0.0)
    h = F.threshold(z, below(edge, z), 0.0)  # relu and selection at once, in both directions
    if edge > 0 and (excess := int(h.detach().count_nonzero()) - most) > 0:
        last = (h.detach().flatten() == edge).nonzero()[-excess:, 0]
        h = h.flatten().index_fill(0, last, 0.0).view(z.shape)
    return h, edge


def below(edge: float, like: Tensor) -> float:
    """The next number of this type towards 0: "above" it means "the edge or more", where that is positive."""
    return torch.nextafter(torch.tensor(edge, dtype=like.dtype), torch.zeros((), dtype=like.dtype)).item()


# ---------------------------------------------------------------------------------------------------------------------
# B. Dictionaries


@dataclass(frozen=True)
class Settings:
    """What a trained dictionary follows from, beside target and text."""

    kind: Literal["sae", "plt", "clt"] = "plt"
    D: int = 512  # latents of each layer
    k: int = 12  # latents that stay at a position, mean over the batch
    mode: Literal["local", "error-propagating", "clean-input", "single-layer"] = "local"  # what it learns from
    lr: float = 3e-3  # at its highest; 3 % warm-up, cosine to a tenth
    steps: int = 700
    B: int = 32  # sequences a step
    T: int = 64  # tokens a sequence
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "above 0", "D", "k", "lr", "steps", "B", "T")
        require(self, "0 or above", "seed")
        if self.k > self.D:
            raise UserError(f"k={self.k}: must be at most the D={self.D} latents")

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.mode}-D{self.D}-k{self.k}-lr{self.lr:g}-steps{self.steps}-seed{self.seed}"


class PLT(nn.Module):
    """Per-layer transcoders: MLP l, by D latents that read its input and write its output.

        z_l = x_l W_enc_l + b_enc_l      h_l = BatchTopK(relu(z_l))      y^_l = h_l W_dec_l + b_dec_l

    W_enc n x [d, D], b_enc n x [D], W_dec n x [D, d], b_dec n x [d]; threshold [n], see `codes`. W_enc begins as
    Kaiming's uniform, W_dec as its transpose with rows of norm 1, biases as 0.
    """

    reads: Literal["x", "y"] = "x"  # which of the two the encoder sees

    def __init__(self, n: int, d: int, settings: Settings, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.n, self.settings, D = n, settings, settings.D
        bound = (6 / d) ** 0.5
        self.W_enc = nn.ParameterList((2 * torch.rand(d, D, generator=generator) - 1) * bound for _ in range(n))
        self.b_enc = nn.ParameterList(torch.zeros(D) for _ in range(n))
        self.W_dec = nn.ParameterList(F.normalize(W.detach().T, dim=-1).contiguous() for W in self.W_enc)
        self.b_dec = nn.ParameterList(torch.zeros(d) for _ in range(n))
        self.register_buffer("threshold", torch.zeros(n))

    def encode(self, l: int, x: Tensor) -> Tensor:
        """z_l [..., D]."""
        return F.linear(x, self.W_enc[l].T, self.b_enc[l])

    def codes(self, l: int, x: Tensor, batch: bool = False) -> Tensor:
        """h_l [..., D] after training: z_l where it is above the fixed threshold, else 0.

        The threshold is the mean over the last 100 training batches of the smallest that stayed. With `batch` BatchTopK
        chooses, as in training: then what a position keeps depends on the others.
        """
        z = self.encode(l, x)
        return batch_topk(z, self.settings.k)[0] if batch else F.threshold(z, self.threshold[l].item(), 0.0)

    def decode(self, l: int, hs: list[Tensor]) -> Tensor:
        """y^_l [..., d] of the codes of layers 0 to l at least."""
        return hs[l] @ self.W_dec[l] + self.b_dec[l]

    def own_decoder(self, l: int) -> Tensor:
        """The rows that write to layer l's own output, [D, d]."""
        return self.W_dec[l]


class SAE(PLT):
    """Sparse autoencoder of an MLP's output: a PLT with x := y. The MLP has to run for it to read anything."""

    reads = "y"


class CLT(PLT):
    """Cross-layer transcoder: the encoders of a PLT; a latent of layer i writes to every layer j >= i.

        y^_j = sum_{i <= j} h_i W_dec_{i -> j} + b_dec_j

    W_dec n x [D, n - i, d], where W_dec[i][:, j - i] is W_dec_{i -> j}; each of these rows has norm 1.
    """

    def __init__(self, n: int, d: int, settings: Settings, generator: torch.Generator | None = None) -> None:
        super().__init__(n, d, settings, generator)
        self.W_dec = nn.ParameterList(W.detach()[:, None].repeat(1, n - i, 1) for i, W in enumerate(self.W_dec))

    def decode(self, l: int, hs: list[Tensor]) -> Tensor:
        return sum(hs[i] @ self.W_dec[i][:, l - i] for i in range(l + 1)) + self.b_dec[l]

    def own_decoder(self, l: int) -> Tensor:
        return self.W_dec[l][:, 0]


KINDS = {"sae": SAE, "plt": PLT, "clt": CLT}


def new(settings: Settings, target: GPT) -> PLT:
    """A dictionary at its initialisation, a function of settings.seed. UserError if the target has no MLPs."""
    d, device = target.config.d_model, target.unembedding.device
    generator = torch.Generator().manual_seed(settings.seed)
    return KINDS[settings.kind](len(mlps_of(target)), d, settings, generator).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# C. Replaced MLPs

Codes = Callable[[int, Tensor], Tensor]  # (l, what MLP l's encoder reads) to h_l


def mlps_of(target: nn.Module) -> list[MLP]:
    """The target's MLPs in order. UserError if it has none."""
    mlps = [module for module in target.modules() if isinstance(module, MLP)]
    if not mlps:
        raise UserError("the target has no MLP: there is nothing for a dictionary to stand for")
    return mlps


def original(mlp: MLP, x: Tensor) -> Tensor:
    """y of x, while `mlps_answered` stands in its place."""
    return type(mlp).forward(mlp, x)


@contextmanager
def mlps_answered(target: nn.Module, answer: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Inside, answer(l, x_l) takes the place of MLP l. Afterwards nothing is left of it."""
    mlps = mlps_of(target)
    try:
        for l, mlp in enumerate(mlps):
            mlp.forward = partial(answer, l)
        yield
    finally:
        for mlp in mlps:
            mlp.__dict__.pop("forward", None)


@torch.no_grad()
def target_pass(target: GPT, tokens: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """f(x | W)'s last hidden state [B, T, d], and x_l, y_l of every MLP, n x [B, T, d] each. No gradient."""
    mlps, xs, ys = mlps_of(target), [], []

    def seen(l: int, x: Tensor) -> Tensor:
        xs.append(x)
        ys.append(original(mlps[l], x))
        return ys[-1]

    with mlps_answered(target, seen):
        return target.hidden(tokens), xs, ys


def substituted(target: GPT, tokens: Tensor, outputs: dict[int, Tensor]) -> Tensor:
    """Last hidden state [B, T, d] where MLP l gives outputs[l] [B, T, d], whatever it reads; the others are as ever."""
    mlps = mlps_of(target)
    with mlps_answered(target, lambda l, x: outputs[l] if l in outputs else original(mlps[l], x)):
        return target.hidden(tokens)


def clean_outputs(dictionary: PLT, read: list[Tensor], codes: Codes | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """y^_l and h_l of every layer, of what the encoders read in the target itself: xs, or an SAE's ys."""
    codes = codes or dictionary.codes
    hs = [codes(l, x) for l, x in enumerate(read)]
    return [dictionary.decode(l, hs) for l in range(dictionary.n)], hs


def error_propagating(
    target: GPT, dictionary: PLT, tokens: Tensor, codes: Codes | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Last hidden state [B, T, d] where y^_l replaces every MLP and each reads the replaced stream; and the h_l."""
    codes, mlps, hs = codes or dictionary.codes, mlps_of(target), []

    def answer(l: int, x: Tensor) -> Tensor:
        hs.append(codes(l, original(mlps[l], x) if dictionary.reads == "y" else x))
        return dictionary.decode(l, hs)

    with mlps_answered(target, answer):
        return target.hidden(tokens), hs


# ---------------------------------------------------------------------------------------------------------------------
# D. Training

DEAD_AFTER = 50  # batches without a firing
AUX, AUX_LATENTS = 1 / 32, 512  # weight of the auxiliary loss; dead latents that rebuild one position's residual
ADAM_BETAS, CLIP, WARMUP, LR_END = (0.9, 0.99), 1.0, 0.03, 0.1
REMEMBERED = 100  # batches that the threshold is a mean over


def auxiliary(dictionary: PLT, l: int, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    """MSE of the residual y_l - y^_l, without its gradient, rebuilt by the most active dead latents; 0 without any.

    x [..., d] is what the encoder reads; dead bool [D]. The dense activations of at most AUX_LATENTS dead latents a
    position, through the layer's own decoder, without b_dec. Gradients to dead latents alone.
    """
    if not dead.any():
        return residual.new_zeros(())
    a = F.relu(F.linear(x, dictionary.W_enc[l].T[dead], dictionary.b_enc[l][dead]))  # [..., dead]
    if a.shape[-1] > AUX_LATENTS:
        a = a * torch.zeros_like(a).scatter(-1, a.topk(AUX_LATENTS, -1).indices, 1.0)
    return F.mse_loss(a @ dictionary.own_decoder(l)[dead], residual.detach())


@torch.no_grad()
def remove_parallel(W: Tensor) -> None:
    """Take out of W's gradient what would change the norm of its rows, which have norm 1."""
    W.grad -= (W.grad * W).sum(-1, keepdim=True) * W


class Training:
    """A dictionary in training: its optimiser, which latents are dead, and one step."""

    def __init__(self, settings: Settings, target: GPT) -> None:
        self.settings, self.target, self.dictionary = settings, target, new(settings, target)
        self.kl, self.count = HiddenKL(target.unembedding), 0
        self.idle = torch.zeros(self.dictionary.n, settings.D, dtype=torch.long, device=target.unembedding.device)
        self.optimizer = torch.optim.Adam(self.dictionary.parameters(), betas=ADAM_BETAS, fused=True)

    def codes(self, l: int, x: Tensor) -> Tensor:
        """BatchTopK; on the way it counts who fires and takes the threshold along."""
        h, edge = batch_topk(self.dictionary.encode(l, x), self.settings.k)
        with torch.no_grad():
            fired = h.flatten(0, -2).amax(0) > 0
            self.idle[l] = (self.idle[l] + 1).masked_fill(fired, 0)
            threshold = self.dictionary.threshold
            threshold[l] += (below(edge, h) - threshold[l]) / min(self.count + 1, REMEMBERED)
        return h

    def reconstruction(self, tokens: Tensor, hidden: Tensor, outputs: list[Tensor] | None, ys: list[Tensor]) -> Tensor:
        """The loss but for its auxiliary part; outputs: y^_l of clean inputs, None in the error-propagating mode.

        local: MSE, mean over elements and layers. Else KL(target || replaced), mean over positions, in nats.
        PAPER: the released code divides this KL by the sequences of a batch, which makes it T times as large.
        """
        mode, target = self.settings.mode, self.target
        if mode == "local":
            return sum(F.mse_loss(output, y) for output, y in zip(outputs, ys)) / len(ys)
        if mode == "error-propagating":
            return self.kl(hidden, error_propagating(target, self.dictionary, tokens, self.codes)[0])
        if mode == "clean-input":
            return self.kl(hidden, substituted(target, tokens, dict(enumerate(outputs))))
        return sum(self.kl(hidden, substituted(target, tokens, {l: output})) for l, output in enumerate(outputs))

    def step(self, tokens: Tensor, hidden: Tensor, xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        """One step on tokens [B, T] and what `target_pass` says of them; the reconstruction loss before it."""
        dictionary, s = self.dictionary, self.settings
        read, outputs = ys if dictionary.reads == "y" else xs, None
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * cosine(self.count, s.steps, WARMUP, LR_END)
        # -------------------------------------------------------------------------------------------------------------
        self.optimizer.zero_grad()
        dead = self.idle >= DEAD_AFTER
        if s.mode != "error-propagating":
            outputs, _ = clean_outputs(dictionary, read, self.codes)
        loss = self.reconstruction(tokens, hidden, outputs, ys)
        total = loss
        if dead.any():  # the residual is that of clean inputs in every mode
            if outputs is None:
                with torch.no_grad():
                    outputs, _ = clean_outputs(dictionary, read, partial(dictionary.codes, batch=True))
            auxes = [auxiliary(dictionary, l, read[l], ys[l] - outputs[l], dead[l]) for l in range(dictionary.n)]
            total = loss + AUX * sum(auxes) / dictionary.n
        total.backward()
        for W in dictionary.W_dec:
            remove_parallel(W)
        nn.utils.clip_grad_norm_(dictionary.parameters(), CLIP)
        self.optimizer.step()
        with torch.no_grad():
            for W in dictionary.W_dec:
                W.copy_(F.normalize(W, dim=-1))
        # -------------------------------------------------------------------------------------------------------------
        self.count += 1
        return loss.detach()


def train(
    settings: list[Settings], target: GPT, batch: Callable[[int], Tensor], name: str = "dictionaries"
) -> list[PLT]:
    """Dictionaries of these settings, which share their number of steps and, step by step, one pass of the target.

    target: frozen here. batch(step): tokens [B, T] on its device. UserError if k is above D, a target has no MLPs, or
    a loss is not finite.
    """
    target.requires_grad_(False)
    trainings, (steps,) = [Training(s, target) for s in settings], {s.steps for s in settings}
    for step in (bar := progress_bar(0, steps, name)):
        tokens = batch(step)
        seen = target_pass(target, tokens)
        losses = [training.step(tokens, *seen) for training in trainings]
        if step % 50 == 0 or step == steps - 1:
            for training, loss in zip(trainings, losses):
                if not loss.isfinite():
                    s = training.settings
                    raise UserError(
                        f"{s.name}: the loss is {loss.item()} at step {step}: try a smaller lr than {s.lr:g}"
                    )
            bar.set_postfix(loss=f"{losses[0].item():.4g}", refresh=False)
    return [training.dictionary.requires_grad_(False) for training in trainings]


def flops_a_token(settings: Settings, target: GPT) -> float:
    """FLOPs of matrix products and attention in a training step without dead latents, a token: counted on one window.

    The target's own pass is in it, as for a decomposition.
    """
    tokens = torch.zeros((1, settings.T), dtype=torch.long, device=target.unembedding.device)
    with cost.Watch() as watch:
        Training(settings, target).step(tokens, *target_pass(target, tokens))
    return sum(flops for flops, _ in watch.calls) / settings.T


# ---------------------------------------------------------------------------------------------------------------------
# E. Files


def save(dictionary: PLT, folder: Path) -> None:
    """settings.json, and the weights as the users of such dictionaries load them.

    An SAE: layer_<l>/cfg.json and sae_weights.safetensors, of SAELens (6.x, architecture "jumprelu": what is above the
    threshold). A PLT: layer_<l>.safetensors, of circuit-tracer's TranscoderSet. A CLT: W_enc_<l>.safetensors and
    W_dec_<l>.safetensors, of circuit-tracer's CrossLayerTranscoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = dictionary.settings.kind
    for l in range(dictionary.n):
        W_enc, b_enc, W_dec, b_dec = (
            getattr(dictionary, name)[l].detach().cpu() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
        )
        threshold = dictionary.threshold[l].cpu().repeat(len(b_enc))  # [D]: in the files each latent has its own
        if kind == "sae":
            (folder / f"layer_{l}").mkdir(exist_ok=True)
            of_file = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
            write_tensors(folder / f"layer_{l}" / "sae_weights.safetensors", of_file)
            write_json(folder / f"layer_{l}" / "cfg.json", saelens_config(l, *W_enc.shape))
        elif kind == "plt":
            of_file = {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
            of_file["activation_function.threshold"] = threshold
            write_tensors(folder / f"layer_{l}.safetensors", of_file)
        else:
            of_file = {"W_enc": W_enc.T, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
            write_tensors(folder / f"W_enc_{l}.safetensors", {f"{name}_{l}": W for name, W in of_file.items()})
            write_tensors(folder / f"W_dec_{l}.safetensors", {f"W_dec_{l}": W_dec})
    write_json(folder / "settings.json", asdict(dictionary.settings))  # last: where it is, all is


def load(folder: Path) -> PLT:
    """What `save` wrote, on the CPU and frozen. UserError if it is not there or not whole."""
    from safetensors import SafetensorError

    try:
        settings = Settings(**json.loads((folder / "settings.json").read_text(encoding="utf-8")))
        layers = {"sae": saelens_layers, "plt": plt_layers, "clt": clt_layers}[settings.kind](folder)
        dictionary = KINDS[settings.kind](len(layers), len(layers[0]["b_dec"]), settings)
        with torch.no_grad():
            for l, layer in enumerate(layers):
                for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
                    own = getattr(dictionary, name)[l]
                    if own.shape != layer[name].shape:
                        raise ValueError(f"{name} of layer {l} is {list(layer[name].shape)}, not {list(own.shape)}")
                    own.copy_(layer[name])
                dictionary.threshold[l] = layer["threshold"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise UserError(f"{folder} holds no whole dictionary ({type(error).__name__}: {error})") from error
    return dictionary.requires_grad_(False)


def saelens_config(l: int, d: int, D: int) -> dict:
    """cfg.json of SAELens for the SAE of MLP l."""
    about = {"hook_name": f"blocks.{l}.hook_mlp_out", "hook_head_index": None, "prepend_bos": False}
    return {
        "d_in": d, "d_sae": D, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False,
        "normalize_activations": "none", "reshape_activations": "none", "metadata": about, "architecture": "jumprelu",
    }  # fmt: skip


def saelens_layers(folder: Path) -> list[dict[str, Tensor]]:
    """Weights of layer_<l>/sae_weights.safetensors, for every l. ValueError for a cfg.json that says otherwise."""
    from safetensors.torch import load_file

    layers = []
    for l in range(len(list(folder.glob("layer_*")))):
        config = json.loads((folder / f"layer_{l}" / "cfg.json").read_text(encoding="utf-8"))
        if config["architecture"] != "jumprelu" or config["apply_b_dec_to_input"]:
            raise ValueError(f"layer_{l}/cfg.json is not of a jumprelu SAE whose b_dec stays out of its input")
        layers.append(load_file(folder / f"layer_{l}" / "sae_weights.safetensors"))
    return layers


def plt_layers(folder: Path) -> list[dict[str, Tensor]]:
    """Weights of layer_<l>.safetensors, for every l."""
    from safetensors.torch import load_file

    layers = [load_file(folder / f"layer_{l}.safetensors") for l in range(len(list(folder.glob("layer_*"))))]
    return [w | {"W_enc": w["W_enc"].T, "threshold": w["activation_function.threshold"]} for w in layers]


def clt_layers(folder: Path) -> list[dict[str, Tensor]]:
    """Weights of W_enc_<l>.safetensors and W_dec_<l>.safetensors, for every l."""
    from safetensors.torch import load_file

    layers = []
    for l in range(len(list(folder.glob("W_enc_*")))):
        found = load_file(folder / f"W_enc_{l}.safetensors") | load_file(folder / f"W_dec_{l}.safetensors")
        w = {name: found[f"{name}_{l}"] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
        layers.append(w | {"W_enc": w["W_enc"].T})
    return layers


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with written(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def write_json(path: Path, content: dict) -> None:
    with written(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
