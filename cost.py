"""What a call costs, counted and not modelled: it runs on fake tensors, which have shapes and types but no memory.

Nothing is allocated: a laptop counts a step of the published size, 74 GB, in 6 seconds, one of the default size in 2.
decompose.py begins with the `report` on its run; `python -m bench.plan` is about larger ones. Left out: what a kernel
holds inside itself, the allocator's rounding, messages between processes, and what torch.compile changes.
"""

import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import distributed
import run

# What an H100 reaches a second. Assumptions, not measurements: 40 % of its peak in bf16, 75 % of its bandwidth.
GPU_FLOPS, GPU_BYTES = 400e12, 2.5e12

# FLOPs by operation. torch has no formula for attention on a CPU: it is that of the same kernel on a GPU.
FORMULAS, aten, FLASH = dict(flop_registry), torch.ops.aten, "_scaled_dot_product_flash_attention"
for end in ("", "_backward"):
    FORMULAS[getattr(aten, f"{FLASH}_for_cpu{end}")] = FORMULAS[getattr(aten, FLASH + end)]
tensors = lambda tree: [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Cost:
    held: int  # bytes that are alive all the while: parameters, moments
    peak: int  # bytes, the most on top of them
    flops: int  # of matrix products and attention
    moved: int  # bytes read and written
    calls: tuple[tuple[int, int], ...] = field(default=(), compare=False, repr=False)  # both, of each operation

    def seconds(self, flops_per_s: float, bytes_per_s: float, products: bool = False) -> float:
        """Of its operations, or of its products, one after the other: each by the slower of computing and moving."""
        calls = [(flops, moved) for flops, moved in self.calls if flops or not products]
        return sum(max(flops / flops_per_s, moved / bytes_per_s) for flops, moved in calls)


class Watch(TorchDispatchMode):
    """Sees every operation, and follows every storage from the operation that makes it to its end."""

    alive = least = most = 0

    def __init__(self) -> None:
        super().__init__()
        self.storages, self.calls = {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # asked so often that it took a third of the time
            return args[0].fake_device
        out = func(*args, **(kwargs := kwargs or {}))
        if not func.is_view:
            made = tensors(out)
            new = [self.follow(tensor.untyped_storage()) for tensor in made]
            if out is None:  # a fused optimiser, say, returns nothing and changes what it is given
                made = [t for arg, a in zip(func._schema.arguments, args) if arg.is_write for t in tensors(a)]
            flops = moved = 0
            if any(new) or func._schema.is_mutable:  # otherwise it is a view by another name
                moved = sum(t.numel() * t.element_size() for t in [*tensors(args), *made])
            if func._overloadpacket in FORMULAS:
                flops = FORMULAS[func._overloadpacket](*args, **kwargs, out_val=out)
            self.calls.append((flops, moved))
        return out

    def follow(self, storage: torch.UntypedStorage) -> bool:
        key, size = storage._cdata, storage.nbytes()
        if new := key not in self.storages:
            self.storages[key] = weakref.ref(storage, lambda _: self.end(key, size))
            self.alive += size
            self.most = max(self.most, self.alive)
        return new

    def end(self, key: int, size: int) -> None:
        del self.storages[key]
        self.alive -= size
        self.least = min(self.least, self.alive)


def counted(make: Callable[[], Iterable[Callable[[], object]]], bf16: bool = False, again: bool = True) -> list[Cost]:
    """The cost of each call that make() returns, in a process by itself. torch's random state stays as it was.

    make: builds all that the calls need, on the CPU. bf16: as on a GPU that computes in bf16. again: a call is made
    twice and the second time counts, as an optimiser has its moments only then.
    """
    costs, watch, alone = [], Watch(), mock.patch.object(distributed, "world", lambda: 1)
    # All is on the CPU already, and `to` would swap each parameter for a fake one that something else refers to.
    stays = mock.patch.object(nn.Module, "to", lambda module, device: module)
    with torch.random.fork_rng([]), mock.patch.object(run, "bf16", lambda device: bf16), alone, stays:
        with FakeTensorMode(allow_non_fake_inputs=True), watch:
            for call in make():
                for _ in range(1 + again):
                    watch.least, watch.most, watch.calls = watch.alive, watch.alive, []
                    call()
                flops, moved = map(sum, zip(*watch.calls, (0, 0)))
                costs.append(Cost(watch.least, watch.most - watch.least, flops, moved, tuple(watch.calls)))
    return costs


def available_memory(device: torch.device) -> int:
    """Bytes that a process can have: free on the GPU; on a CPU what Linux says is available, elsewhere all there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # Windows has no sysconf: 8 GB then
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 10**9


def report(trial: Callable, config, device: torch.device, processes: int) -> int:
    """Print what a run costs each process, and which flags would help if that is more memory than is free; the bytes.

    trial(config): the calls of a run with these settings, a step first, for the config.B rows of one process."""
    half, room, GB = run.bf16(device), available_memory(device) // (processes if device.type == "cpu" else 1), 1e9
    costs, tokens = counted(lambda: trial(config), half), config.B * config.T
    step, need = costs[0], max(cost.held + cost.peak for cost in costs)
    print(f"cost: {need / GB:.4g} GB of memory, {step.held / GB:.4g} of it before a step; {room / GB:.4g} GB are free")
    print(f"cost: {step.flops / tokens / 1e9:.4g} GFLOP a token; {step.moved / GB:.4g} GB read and written a step")
    if device.type == "cuda":
        days = config.steps * max(step.flops / GPU_FLOPS, step.moved / GPU_BYTES) / 86_400
        rates = f"{GPU_FLOPS / 1e12:g} TFLOP and {GPU_BYTES / 1e12:g} TB a second, as we assume of an H100"
        print(f"cost: {days:.1f} days for {config.steps:,} eager steps on a GPU that reaches {rates}")
    if need > room:
        print("cost: WARNING: more than is free, with all of Gamma in each process; counting what would help ...")
        helps = {}
        for name, value in [("memory_budget", 0.0), *(("B", config.B >> n) for n in range(1, config.B.bit_length()))]:
            if name not in helps:
                costs = counted(lambda: trial(replace(config, **{name: value})), half)
                if max(cost.held + cost.peak for cost in costs) <= room:
                    helps[name] = f"--{name}={value * processes if name == 'B' else value}"
        none = "neither memory_budget=0 nor a smaller B is enough: decompose with a smaller --C or --d_ci"
        print(f"cost: it would fit with {' or '.join(helps.values())}" if helps else f"cost: {none}")
    return need
