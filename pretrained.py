"""Models that we have not trained: a causal language model of the Hugging Face hub, or of a folder, as the target.

    python decompose.py --target=hf:EleutherAI/pythia-14m --dataset=my_texts/
    python decompose.py --target=path/to/model --dataset=my_texts/    # a folder with config.json and safetensors

  A. Loading      through transformers: no remote code, no pickles; what cannot be a target is refused in one line
  B. Conversion   Conv1D and fused matrices become nn.Linear; the parts of a block get our names: blocks.3.attn.q
  C. Pretrained   the model with the face of model.GPT: hidden state, unembedding, blocks
  D. Checkpoint   what a run keeps of it

It needs `pip install transformers`; nothing else does. Left out: models with an encoder; quantised weights; the <bos>
that some models expect before a text, as windows of text begin anywhere.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import load_into
from flags import UserError
from tokenise import FastTokenizer, explained

SMALL = 10**8  # bytes of weights up to which a run keeps those of a local folder; of others it keeps a digest
EVERY_CONTEXT = 2**31  # of a model that says nothing of the longest sequence it takes

# ---------------------------------------------------------------------------------------------------------------------
# A. Loading


def is_pretrained(target: str) -> bool:
    """Whether --target is "hf:<id>", or a folder whose config.json names a model_type, as those of our runs do not."""
    if target.startswith("hf:"):
        return True
    try:
        config = json.loads((Path(target) / "config.json").read_text(encoding="utf-8")) if target else None
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def name_of(target: str) -> str:
    """Of its run folders: "pythia-14m-"; of a target of ours ""."""
    return f"{Path(place_of(target)).name}-" if is_pretrained(target) else ""


def library(target: str) -> Any:
    """transformers, silent. UserError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"target={target}: a model of another library needs `pip install transformers`") from error
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    return transformers


def place_of(target: str) -> str:
    """What transformers calls it: the id on the hub, or the path. UserError where one could be taken for the other."""
    place = target.removeprefix("hf:")
    if place != target and (not place or Path(place).exists()):
        what = f"there is a folder {place!r} here: name that without hf:" if place else "write hf:<id>"
        raise UserError(f"target={target}: {what}")
    return place if place != target else str(Path(target).absolute())


def unreadable(target: str, what: str) -> tuple[str, str]:
    """The problem and the remedy where something of a model cannot be read."""
    if not target.startswith("hf:"):
        return f"target={target}: its {what} cannot be read", "it must be a folder as save_pretrained writes it"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    remedy = "set HF_HOME to a cache that holds it, HF_ENDPOINT to a mirror, or give the path of a local copy"
    return f"target={target}: its {what} cannot be read from {endpoint}", remedy


def commit_of(target: str) -> str:
    """The commit of a model on the hub that is read now, 40 hex digits; "" of a folder."""
    if not target.startswith("hf:"):
        return ""
    with explained(*unreadable(target, "config.json")):
        path = library(target).utils.cached_file(place_of(target), "config.json")
    return Path(path).parent.name  # of the cache: .../snapshots/<commit>/config.json


def read_config(target: str, revision: str | None = None) -> Any:
    """The configuration of a model. UserError if it cannot be had, or is not that of a causal, unquantised one."""
    transformers, place = library(target), place_of(target)
    with explained(*unreadable(target, "config.json")):
        config = transformers.AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    names = [name for name in config.architectures or ("CausalLM",)]
    if config.is_encoder_decoder or not any(mark in name for name in names for mark in ("CausalLM", "LMHead")):
        raise UserError(f"target={target}: {', '.join(names)} is no causal language model: it has no next token to say")
    if quantised := getattr(config, "quantization_config", None):
        method = dict(quantised).get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise UserError(f"target={target}: its weights are quantised ({method}): name the model that they were made of")
    return config


def read_model(target: str, dtype: str, config: Any, revision: str | None = None) -> "Pretrained":
    """The model, with weights of this type, on the CPU. UserError if it has none, or not all, in safetensors."""
    auto = library(target).AutoModelForCausalLM
    with explained(*unreadable(target, "weights, in safetensors,")):
        model, found = auto.from_pretrained(
            place_of(target), config=config, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True,
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"target={target}: its files lack {len(missing)} weights, as {missing[0]}")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"target={target}: {name} is not finite")
    return checked(target, model)


def read_tokenizer(target: str, vocab_size: int, revision: str | None = None) -> FastTokenizer:
    """The tokenizer of a model with vocab_size logits. UserError if it has none, or none that ends a text."""
    transformers, place = library(target), place_of(target)
    with explained(*unreadable(target, "tokenizer")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(f"target={target}: it has no fast tokenizer, tokenizer.json, and others are not read")
    if (end := tokenizer.eos_token_id) is None:
        raise UserError(f"target={target}: its tokenizer has no end-of-text token (eos_token) to end documents with")
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise UserError(f"target={target}: its tokenizer has the token {largest}, the model {vocab_size} of them")
    encoding = FastTokenizer(tokenizer.backend_tokenizer.to_str(), end, vocab_size)
    if not encoding.encode_ordinary("text"):  # without files the library makes an empty one, and says nothing
        raise UserError(f"target={target}: its tokenizer makes no tokens of text: is there a tokenizer.json?")
    return encoding


# ---------------------------------------------------------------------------------------------------------------------
# B. Conversion

# How the parts of a block are called in other libraries, and here. A part of another name keeps it.
HOUSE = {"self_attn": "attn", "attention": "attn", "attn": "attn", "mlp": "mlp", "fc1": "up", "fc2": "down"}
ATTN = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o", "c_proj": "o", "dense": "o"}
MLP = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "c_fc": "up", "c_proj": "down", "fc1": "up"}
MLP |= {"fc2": "down", "fc_in": "up", "fc_out": "down", "dense_h_to_4h": "up", "dense_4h_to_h": "down"}


class Fused(nn.Module):
    """Several matrices where a model had one: y = [y_1, y_2, ...], laid out as the model had it.

    heads: 1 if the one's rows were those of the first matrix, then the second's, ...; or they came so head by head.
    """

    def __init__(self, fused: nn.Linear, sizes: dict[str, int], heads: int) -> None:
        super().__init__()
        self.heads, self.parts = heads, list(sizes)

        def split(rows: Tensor) -> list[Tensor]:  # [heads * sum of sizes, ...] to [heads * size, ...] each
            return [part.flatten(0, 1) for part in rows.unflatten(0, (heads, -1)).split(list(sizes.values()), 1)]

        biases = [None] * len(sizes) if fused.bias is None else split(fused.bias)
        for name, W, b in zip(sizes, split(fused.weight), biases):
            self.add_module(name, linear(W, b))

    def named(self) -> dict[str, nn.Module]:
        return {name: self.get_submodule(name) for name in self.parts}

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x).unflatten(-1, (self.heads, -1)) for part in self.named().values()], -1).flatten(-2)


def linear(W: Tensor, b: Tensor | None) -> nn.Linear:
    """An nn.Linear with a copy of these, W [d_out, d_in]."""
    layer = nn.Linear(W.shape[1], W.shape[0], b is not None, device="meta")
    layer.weight = nn.Parameter(W.detach().clone(memory_format=torch.contiguous_format))
    if b is not None:
        layer.bias = nn.Parameter(b.detach().clone(memory_format=torch.contiguous_format))
    return layer


def fused_parts(config: Any) -> dict[str, tuple[dict[str, int], int]]:
    """{name of a fused matrix: (rows of each of its parts, of a head or of all, heads)} by the model_type."""
    d, n_head, d_head = config.hidden_size, config.num_attention_heads, head_width(config)
    d_kv = d_head * (getattr(config, "num_key_value_heads", None) or n_head)
    return {
        "gpt2": {"c_attn": ({"q": d, "k": d, "v": d}, 1)},
        "gpt_neox": {"query_key_value": ({"q": d_head, "k": d_head, "v": d_head}, n_head)},
        "phi3": {
            "qkv_proj": ({"q": n_head * d_head, "k": d_kv, "v": d_kv}, 1),
            "gate_up_proj": (dict.fromkeys(("gate", "up"), getattr(config, "intermediate_size", 0)), 1),
        },
    }.get(config.model_type, {})


def context_of(config: Any) -> int:
    """The longest sequence a model takes, in tokens."""
    return getattr(config, "max_position_embeddings", None) or EVERY_CONTEXT


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def convert(block: nn.Module, config: Any) -> None:
    """Conv1D and fused matrices of a block become nn.Linear, and its parts get our names beside their own."""
    fused = fused_parts(config)
    for path, module in list(block.named_modules()):
        parent, _, name = path.rpartition(".")
        if type(module).__name__ == "Conv1D":  # W is [d_in, d_out] there
            module = linear(module.weight.T, module.bias)
            setattr(block.get_submodule(parent), name, module)
        if name in fused:
            setattr(block.get_submodule(parent), name, Fused(module, *fused[name]))
    call_ours(block, HOUSE)
    for part, names in (("attn", ATTN), ("mlp", MLP)):
        if isinstance(inside := getattr(block, part, None), nn.Module):
            call_ours(inside, names)


def call_ours(module: nn.Module, names: dict[str, str]) -> None:
    """Our names come first among the module's children: named_modules() and all that follows it see no others."""
    ours = {}
    for name, child in module.named_children():
        ours |= child.named() if isinstance(child, Fused) else {names.get(name, name): child}
    ours = {name: child for name, child in ours.items() if name not in vars(module)}
    module._modules = {**ours, **module._modules}  # a name that another child has stays that child's


# ---------------------------------------------------------------------------------------------------------------------
# C. Pretrained


@dataclass(frozen=True)
class Shape:
    context: int  # longest sequence, in tokens
    n_head: int
    d_head: int
    vocab_size: int  # logits


class Given(nn.Module):
    """Stands where a block was: keeps what enters it, and gives h instead, or without one the same."""

    def __init__(self, h: Tensor | None = None) -> None:
        super().__init__()
        self.h = h

    def forward(self, x: Tensor, *_, **__) -> Tensor:
        self.h = x if self.h is None else self.h
        return self.h


def replaced(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """A shallow copy of the module in which the one at `path` is `new`; it shares all else with it."""
    name, _, rest = path.partition(".")
    twin = copy.copy(module)
    twin._modules = module._modules | {name: replaced(module._modules[name], rest, new) if rest else new}
    return twin


class Pretrained(nn.Module):
    """A causal model of transformers as model.GPT is one: tokens [B, T] to next-token logits [B, T, vocab].

    Its embeddings and its unembedding stay whole: the latter is a parameter here and no nn.Linear, tied or not. Every
    nn.Linear is in `blocks`, by the names of ours, in all models that are tested.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        named = [(name, part) for name, part in model.base_model.named_modules() if isinstance(part, nn.ModuleList)]
        self.at, self.blocks = next(((n, of) for n, of in named if len(of) == config.num_hidden_layers), ("", None))
        if self.blocks is None or head is None:
            raise UserError(f"a model of type {config.model_type} has no list of blocks, or no unembedding")
        for block in self.blocks:
            convert(block, config)
        self.base, self.unembedding, self.unembedding_bias = model.base_model, head.weight, head.bias
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.config = Shape(context_of(config), config.num_attention_heads, head_width(config), len(head.weight))
        self.eval()

    def hidden(self, tokens: Tensor) -> Tensor:
        """The last hidden state, normalised, [B, T, d_model]."""
        if tokens.shape[-1] > self.config.context:
            raise UserError(f"T={tokens.shape[-1]} tokens: the target's context is {self.config.context}")
        return self.base(input_ids=tokens, use_cache=False).last_hidden_state

    def enter(self, tokens: Tensor, i: int) -> Tensor:
        """What enters block i, [B, T, d_model]."""
        blocks = [*self.blocks[:i], stop := Given(), *(Given() for _ in self.blocks[i + 1 :])]
        replaced(self.base, self.at, nn.ModuleList(blocks))(input_ids=tokens, use_cache=False)
        return stop.h

    def hidden_from(self, h: Tensor, i: int) -> Tensor:
        """The last hidden state, of what enters block i > 0: the blocks before it are left out."""
        blocks = [Given(h), *(Given() for _ in self.blocks[1:i]), *self.blocks[i:]]
        return replaced(self.base, self.at, nn.ModuleList(blocks))(inputs_embeds=h, use_cache=False).last_hidden_state

    def forward(self, tokens: Tensor) -> Tensor:
        y = F.linear(self.hidden(tokens), self.unembedding, self.unembedding_bias)
        return self.softcap * torch.tanh(y / self.softcap) if self.softcap else y

    @property
    def final_norm(self) -> nn.Module | None:
        """The normalisation between the last block and the unembedding."""
        owner = self.base.get_submodule(self.at.rpartition(".")[0])
        norms = [part for part in owner.children() if "norm" in type(part).__name__.lower()]
        return norms[-1] if norms else None


@torch.no_grad()
def checked(target: str, model: nn.Module) -> Pretrained:
    """The model, converted. UserError unless it says the same then, also from a block on, and reads no later token."""
    model.eval()
    config = model.config.get_text_config()
    x = torch.arange(min(8, config.vocab_size, context_of(config)))[None]
    logits = model(input_ids=x, use_cache=False).logits.float()
    far = lambda a, b, share: (a.float() - b.float()).abs().max() > share * b.float().abs().max()
    ours = Pretrained(model)
    last = len(ours.blocks) - 1
    if far(ours(x), logits, 1e-3):
        raise UserError(f"target={target}: its logits are not those of its last hidden state and unembedding alone")
    if last and far(ours.hidden_from(ours.enter(x, last), last), ours.hidden(x), 1e-3):
        raise UserError(f"target={target}: it is no chain of blocks, each of which reads what the one before it writes")
    other = torch.cat((x[:, :-1], x[:, :1]), 1)
    if far(ours(other)[:, :-1], logits[:, :-1], 1e-2):
        raise UserError(f"target={target}: it is not causal: a later token changes what it says at an earlier one")
    return ours


def not_linear(model: Pretrained) -> list[str]:
    """Matrices of the blocks that no nn.Linear applies: they cannot be masked, and stay whole."""
    masked = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)}
    return [name for name, W in model.blocks.named_parameters() if W.dim() > 1 and id(W) not in masked]


# ---------------------------------------------------------------------------------------------------------------------
# D. Checkpoint


def digest_of(weights: Iterable[Tensor]) -> str:
    """16 hex digits of all weights."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def checkpoint(target: str, dtype: str, T: int) -> dict:
    """What a run keeps of its target: where it is, a digest of its weights; and these, of a folder with up to SMALL.

    UserError if it cannot be a target, or has a context shorter than T.
    """
    revision = commit_of(target)
    config = read_config(target, revision or None)
    if (context := context_of(config.get_text_config())) < T:
        raise UserError(f"T={T}: the context of {target} is {context} tokens: give a smaller T")
    model = read_model(target, dtype, config, revision or None)
    size = sum(W.numel() * W.element_size() for W in model.parameters())
    about = {
        "target": target if target.startswith("hf:") else place_of(target), "dtype": dtype, "config": as_text(config),
        "revision": revision, "digest": digest_of(model.parameters()),
    }  # fmt: skip
    whole = {} if target.startswith("hf:") or size > SMALL else model.state_dict()
    parts = sum(isinstance(part, nn.Linear) for part in model.modules())
    print(f"target: {target}: {size / 1e6:,.1f} MB, {parts} matrices; embeddings and unembedding stay whole")
    if others := not_linear(model):
        print(f"target: {target}: no nn.Linear, and so left whole: {', '.join(others)}")
    return {"pretrained": about, "model": whole, "config": {}, "curve": [], "seconds": 0.0}


def as_text(config: Any) -> str:
    return json.dumps(config.to_dict(), default=str)


def untrained(about: dict) -> dict:
    """The checkpoint of a model of the same sizes with random weights, to be counted or timed."""
    return {"pretrained": about | {"digest": ""}, "model": {}}


def build(checkpoint: dict) -> Pretrained:
    """The model of a checkpoint. UserError if it is not in it, and is gone or another one where it was."""
    about, weights = checkpoint["pretrained"], checkpoint["model"]
    target, dtype = about["target"], about["dtype"]
    transformers = library(target)
    if weights or not about["digest"]:
        config = transformers.AutoConfig.for_model(**json.loads(about["config"]))
        model = Pretrained(transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)))
        if weights:
            load_into(model, weights)
        return model
    revision = about["revision"] or None
    model = read_model(target, dtype, read_config(target, revision), revision)
    if (now := digest_of(model.parameters())) != about["digest"]:
        raise UserError(f"target={target}: its weights are others than those of the run: {now}, not {about['digest']}")
    return model


def encoding_of(target: str, revision: str = "") -> FastTokenizer | None:
    """The model's own tokenizer, as the encoding of its text; None for a target of ours."""
    if not is_pretrained(target):
        return None
    config = read_config(target, revision or None)
    return read_tokenizer(target, config.get_text_config().vocab_size, revision or None)
