"""Several processes as one run: torchrun starts them, each has its own rows of every batch, and together they take the step
that one process would take on all of them.

    torchrun --standalone --nproc_per_node=2 decompose.py      # NCCL between GPUs, gloo between CPUs

Nothing here knows the method. In a process on its own, without torchrun, every function but `shard` does nothing.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh


def start(device: str) -> str:
    """Join the other processes, if torchrun started several; the name of this one's device. Only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    on_gpu = device.startswith("cuda") or device == "auto" and torch.cuda.is_available()
    if on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # a day: the others wait while the first one tokenises the text or trains the target
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(days=1))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block before the others do: what it makes there, they find."""
    if rank() > 0:
        dist.barrier()
    yield
    if world() > 1 and rank() == 0:
        dist.barrier()


def rows(x: Tensor) -> Tensor:
    """This process's share of a batch [B, ...], B a multiple of the number of processes."""
    return x.chunk(world())[rank()]


@torch.compiler.disable
def sum_(tensors: list[Tensor]) -> None:
    """Each tensor becomes, in place, its sum over the processes, the same bits in all of them."""
    if world() > 1:
        for pending in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            pending.wait()


@torch.compiler.disable
def summed(tensor: Tensor) -> Tensor:
    """The sum over the processes, in a new tensor and without a gradient."""
    total = tensor.detach().clone()
    sum_([total])
    return total


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if world() == 1 else summed(torch.tensor(float(flag))).item() > 0


def broadcast_(tensors: list[Tensor]) -> None:
    """Each tensor becomes, in place, the first process's."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gathered(tensor: Tensor) -> list[Tensor]:
    """In the first process the tensors of all, in its memory and not the GPU's; elsewhere, or alone, only one's own."""
    if world() == 1:
        return [tensor]
    tensor = tensor.detach().cpu().contiguous()
    all_of_them = [torch.empty_like(tensor) for _ in range(world())] if rank() == 0 else None
    dist.gather(tensor, all_of_them)
    return all_of_them or [tensor]


# ---------------------------------------------------------------------------------------------------------------------
# A module too large for one process: of each parameter, gradient and moment every process keeps a part, a DTensor


def shard(module: nn.Module, units: list[nn.Module], device: torch.device, half: bool) -> nn.Module:
    """The module on the device, its parameters divided over the processes; those of a unit are whole only while it runs.

    half: whole in bf16, for autocast, which would otherwise keep bf16 copies of all units until the backward pass. A backward
    pass leaves in each part its gradient summed over the processes: it is not to be summed again.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here, as it takes half a second

    # It warns of outputs that are views, as those of nn.Linear are: nobody may change them in place, and nobody does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (world(),))
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        if half
        else MixedPrecisionPolicy()
    )
    for unit in [*units, module]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        unit.set_gradient_divide_factor(1.0)  # a sum, not the mean,
        unit.set_force_sum_reduction_for_comms(True)  # by the only reduction that gloo has
    return module


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor in parts; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(state: dict | Tensor) -> dict | Tensor:
    """A state dict with its parts made whole in the first process, in its memory and not the GPU's: to be called by all."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if rank() == 0 else local(state)
    return state


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `like`, of the same shape, is in parts; elsewhere the tensor."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor
