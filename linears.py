"""Which `nn.Linear` of a module are decomposed, how their calls are answered, and what is refused.

  A. Choice    glob patterns over the names of the layers
  B. Answers   F.linear(x, W, b) of a chosen W is answered by a function instead; any other use of W is refused

model.py is built on it. It knows nothing of the method; who reads the code for that can leave it out.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from flags import UserError

# ---------------------------------------------------------------------------------------------------------------------
# A. Choice


def match_linears(target: nn.Module, C: Mapping[str, int]) -> dict[str, int]:
    """{module name: C_l} of every nn.Linear that a pattern matches, in the target's own order. UserError: see above."""
    linears = [name for name, module in target.named_modules() if isinstance(module, nn.Linear)]
    for pattern, count in C.items():
        if type(count) is not int or count < 1:
            raise UserError(f"C={count} for {pattern!r}: must be a whole number, at least 1")
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise UserError(f"pattern {pattern!r} matches no nn.Linear; there are: {', '.join(linears) or 'none'}")
    if not C:
        raise UserError("C is empty: it must name at least one nn.Linear")
    matches = {name: [count for pattern, count in C.items() if fnmatchcase(name, pattern)] for name in linears}
    return {name: counts[0] for name, counts in matches.items() if counts}


def key_of(name: str) -> str:
    """A module's name as part of a parameter's, which has no dots: "blocks.0.attn.q" to "blocks/0/attn/q"."""
    return name.replace("%", "%25").replace("/", "%2F").replace(".", "/")


def largest_sides(target: nn.Module) -> dict[str, int]:
    """{name: max(d_in, d_out)} of every nn.Linear, for --C=auto: at the rank of W, the smaller side, or above."""
    return {name: max(part.weight.shape) for name, part in target.named_modules() if isinstance(part, nn.Linear)}


def first_block(names: list[str]) -> int:
    """The first of the blocks that these are in: 1 of blocks.1.mlp.up and blocks.3.attn.q; 0 if one is in no block."""
    parts = [name.split(".") for name in names]
    return min(int(part[1]) if part[0] == "blocks" and part[1].isdecimal() else 0 for part in parts)


# ---------------------------------------------------------------------------------------------------------------------
# B. Answers


def memory(tensor: Tensor) -> int:
    """A key that a tensor shares with its views; compiled code has no such thing, and only sorts out parameters."""
    try:
        return isinstance(tensor, nn.Parameter) if torch.compiler.is_compiling() else tensor.untyped_storage()._cdata
    except RuntimeError:  # sparse, or inside torch.func
        return id(tensor)


class LinearsAnswered(TorchFunctionMode):
    """Inside this context answer(l, x, Wx, b) replaces Wx = F.linear(x, W, b) for the W of each layers[l].

    With `search`, UserError if W, or (unless compiled) a view of it, reaches anything else: no mask could ablate it.
    """

    def __init__(self, names: list[str], layers: list[nn.Linear], answer: Callable[..., Tensor], search: bool) -> None:
        super().__init__()
        self.names, self.weights, self.answer = names, [layer.weight for layer in layers], answer
        self.applied, self.stored = [0] * len(names), {}  # {memory: the l of the weights in it}
        for l, W in enumerate(self.weights if search else []):
            self.stored.setdefault(memory(W), []).append(l)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.linear:
            x, weight, bias = (lambda input, weight, bias=None: (input, weight, bias))(*args, **(kwargs or {}))
            for l, W in enumerate(self.weights):
                if weight is W:
                    self.applied[l] += 1
                    self.refuse_weights((x, bias), func)
                    return self.answer(l, x, out, bias)
        if self.stored and not isinstance(out, (bool, int, str, torch.Size, torch.dtype, torch.device, torch.layout)):
            self.refuse_weights((*args, *(kwargs or {}).values()), func)
        return out

    def refuse_weights(self, args: tuple | list, func: Callable) -> None:
        for a in args if self.stored else ():
            if isinstance(a, (tuple, list)):
                self.refuse_weights(a, func)
            for l in self.stored.get(memory(a), ()) if isinstance(a, Tensor) else ():
                W, at = self.weights[l], Tensor.storage_offset  # in a memory that may hold more
                if a is W or not torch.compiler.is_compiling() and at(a) - W.numel() < at(W) < at(a) + a.numel():
                    raise UserError(f"{self.names[l]} cannot be decomposed: {resolve_name(func)} uses its weight too")


def refuse_unlike(name: str, x: Tensor, m: Tensor, routing: Tensor | None, U: Tensor) -> None:
    """UserError unless m and routing broadcast to the positions of a layer's input x, and x, m and U have one type."""
    for masks in (m,) if routing is None else (m, routing):
        n, N = masks.shape[-2::-1], x.shape[-2::-1]  # from the last position axis on
        if n != N and (len(n) > len(N) or any(n_i not in (1, N_i) for n_i, N_i in zip(n, N))):
            raise UserError(f"{name}: masks {tuple(masks.shape)} do not fit its input {tuple(x.shape)}")
    if not (x.dtype == m.dtype == U.dtype or torch.is_autocast_enabled(x.device.type)):
        raise UserError(f"{name}: input {x.dtype}, m {m.dtype}, U {U.dtype}: use target.float(), or torch.autocast")


def refuse_weights_of(names: list[str], layers: list[nn.Linear], target: nn.Module) -> None:
    """UserError if a layer's weight is not a parameter of that layer alone, or can be used where nobody sees it."""
    scripts = [module for module in target.modules() if isinstance(module, torch.jit.ScriptModule)]
    scripted, owner = {memory(weight) for module in scripts for weight in module.parameters()}, {}
    for name, layer in zip(names, layers):
        W = layer._parameters.get("weight")
        if W is None or isinstance(W, nn.UninitializedParameter) or W.is_meta and not torch.empty(0).is_meta:
            why = "no parameter but made anew in each pass (weight_norm?)" if W is None else "without values yet"
            raise UserError(f"{name} cannot be decomposed: its weight is {why}")
        if memory(W) in scripted:
            raise UserError(f"{name} cannot be decomposed: TorchScript uses its weight, unseen")
        if (first := owner.setdefault((memory(W), W.storage_offset()), name)) != name:
            raise UserError(f"{name} and {first} share one weight: decompose only one of them")
