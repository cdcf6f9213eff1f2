"""Several processes as one run: torchrun starts them, each has its own rows of every batch, and together they take the
step that one process would take on all of them.

    torchrun --standalone --nproc_per_node=2 decompose.py      # NCCL between GPUs, gloo between CPUs

Nothing here knows the method. In a process on its own, without torchrun, every function but `shard` changes nothing.
"""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh


def start(device: str) -> str:
    """Join the other processes, if torchrun started several, and name this one's device. Only the first one prints."""
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


def own_seed(seed: int) -> int:
    """The seed itself in the first process, and a different stream in each of the others."""
    return seed if rank() == 0 else int(np.random.SeedSequence([seed, rank()]).generate_state(1)[0])


def rows(x: Tensor, dim: int = 0) -> Tensor:
    """This process's share of a batch, whose size B along `dim` is a multiple of the number of processes."""
    return x.chunk(world(), dim)[rank()]


@torch.compiler.disable
def average_(tensors: list[Tensor]) -> None:
    """Each tensor becomes, in place, its mean over the processes, the same bits in all of them."""
    if world() > 1:
        for tensor, pending in [(tensor, dist.all_reduce(tensor, async_op=True)) for tensor in tensors]:
            pending.wait()
            tensor /= world()


def mean(tensor: Tensor) -> Tensor:
    """The mean over the processes, in a new tensor and without a gradient."""
    total = tensor.detach().clone()
    average_([total])
    return total


def batch_sum(tensor: Tensor) -> Tensor:
    """The sum over the processes of a sum over one's own rows of the batch.

    Its gradient is one's own times the number of processes: right once the processes' gradients are averaged.
    """
    return tensor if world() == 1 else world() * (mean(tensor) + tensor - tensor.detach())


def average_gradients_(parameters: list[Tensor]) -> None:
    """Each gradient becomes its mean over the processes; those of sharded parameters are that already."""
    average_([parameter.grad for parameter in parameters if not isinstance(parameter, DTensor)])


def clip_(parameters: list[Tensor], largest: float) -> Tensor:
    """Scale the gradients so that their common norm, sharded or not, is at most `largest`; the norm that it was."""
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if largest < torch.inf:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_((largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if world() == 1 else mean(torch.tensor(float(flag))).item() > 0


def broadcast_(tensors: list[Tensor]) -> None:
    """Each tensor becomes, in place, the first process's."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def shared(content: Any) -> Any:
    """The first process's tensors and plain values in all processes, as if read from a file: copies, on the CPU."""
    buffer = io.BytesIO()
    if rank() == 0:
        torch.save(content, buffer)
    whole = [buffer.getvalue()]
    if world() > 1:
        dist.broadcast_object_list(whole, src=0)
    return torch.load(io.BytesIO(whole[0]), "cpu", weights_only=True)


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
    """The module on the device, its parameters divided over the processes; a unit's are whole only while it runs.

    half: whole in bf16, for autocast, which would otherwise keep bf16 copies of all units until the backward pass. A
    backward pass leaves in each part its gradient averaged over the processes: it is not to be averaged again.
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
        unit.set_gradient_divide_factor(float(world()))  # the mean over the processes,
        unit.set_force_sum_reduction_for_comms(True)  # by way of the sum, the only reduction that gloo has
    return module


def groups(parameters: list[Tensor]) -> list[dict]:
    """Parameter groups of an optimiser: a fused update takes whole or sharded parameters, not both at a time."""
    divided = [[p for p in parameters if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    return [{"params": group} for group in divided if group]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor in parts; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(state: dict | Tensor) -> dict | Tensor:
    """A state dict with its parts made whole in the first process, in its memory and not the GPU's. Called by all."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if rank() == 0 else local(state)
    return state


def parts_of(state: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's part of each whole tensor, where the one in `like` is in parts; elsewhere the tensor."""
    return {name: part_of(state[name], like[name]) for name in like}


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict:
    """Its state dict, whole and with one group, as if nothing had been sharded: to be called by all."""
    state = whole(optimizer.state_dict())
    order = [i for group in state["param_groups"] for i in group["params"]]
    return state | {"param_groups": [state["param_groups"][0] | {"params": sorted(order)}]}


def load_optimizer_state(optimizer: torch.optim.Optimizer, parameters: list[Tensor], state: dict) -> None:
    """The inverse of `optimizer_state`; parameters in the order in which the optimiser's groups were given them."""
    moments = {
        i: {name: part_of(value, parameters[i]) for name, value in of_one.items()}
        for i, of_one in state["state"].items()
    }
    (group,) = state["param_groups"]
    own = [group | {"params": own["params"]} for own in optimizer.state_dict()["param_groups"]]
    optimizer.load_state_dict({"state": moments, "param_groups": own})
