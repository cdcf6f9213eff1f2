"""Several processes as one run: torchrun starts them, each has its own rows of every batch, and together they take the step
that one process would take on all of them.

    torchrun --standalone --nproc_per_node=2 decompose.py      # NCCL between GPUs, gloo between CPUs

Nothing here knows the method. In a process on its own, without torchrun, every function does nothing.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


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
