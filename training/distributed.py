"""The processes that torchrun starts: joining them, sharing work out, gathering, who prints."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank_and_world() -> tuple[int, int]:
    """The number of this process among those of torchrun, and how many there are; (0, 1) without."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


def join_processes(device: torch.device) -> torch.device:
    """Join the processes that torchrun started, if it did; the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def leave_processes() -> None:
    """Part from the other processes, if there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process do what is inside, which may write files that the others then find.

    Where it fails the others go on, to fail by themselves: what is wrong is said, not that it is gone.
    """
    rank, world = rank_and_world()
    if rank > 0:
        dist.barrier()
    try:
        yield
    finally:
        if rank == 0 and world > 1:
            dist.barrier()


@contextmanager
def silent_unless_first() -> Iterator[None]:
    """Print nothing in any but the first process of torchrun."""
    if int(os.environ.get("RANK", "0")) == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def shard(count: int, size: int) -> list[range]:
    """The batches of range(count) that this process computes, one for each round of `gather`.

    Their bounds do not depend on the number of processes. When the batches run out in the last round,
    the last one is computed by several.
    """
    rank, world = rank_and_world()
    batches = [range(i, min(i + size, count)) for i in range(0, count, size)]
    return [batches[min(i + rank, len(batches) - 1)] for i in range(0, len(batches), world)]


def gather(results: Iterable[Tensor], count: int, size: int) -> Iterator[Tensor]:
    """The results (B, …) for all batches in order, from those that each process has for its own."""
    _, world = rank_and_world()
    done = 0
    for result in results:
        parts = [result]
        if world > 1:
            padded = result.new_zeros(size, *result.shape[1:])
            padded[: len(result)] = result
            raw = padded.view(torch.uint8)  # gloo knows no bfloat16
            raws = [torch.empty_like(raw) for _ in range(world)]
            dist.all_gather(raws, raw)
            parts = [part.view(result.dtype) for part in raws]
        for part in parts:
            yield part[: max(0, min(size, count - done))]
            done += size


def from_first(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` as the first process has it, on the CPU."""
    if rank_and_world()[1] == 1:
        return tensor.cpu()
    there = tensor.to(device).contiguous()
    dist.broadcast(there, 0)
    return there.cpu()


def gather_with_gradient(x: Tensor) -> tuple[Tensor, int]:
    """`x` (n, …) of all processes one after the other, and where this one's begins.

    The gradient of each part is the sum of those that all processes have for it.
    """
    if rank_and_world()[1] == 1:
        return x, 0
    rank, world = rank_and_world()
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(world)]
    dist.all_gather(counts, torch.full_like(counts[0], len(x)))
    sizes = [int(count) for count in counts]
    return _Gathered.apply(x, sizes, rank), sum(sizes[:rank])


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, sizes: list[int], rank: int) -> Tensor:
        ctx.part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.part], None, None


def share_weights(model: nn.Module, device: torch.device) -> None:
    """Give the model the weights that the first process has."""
    if rank_and_world()[1] > 1:
        model.load_state_dict({k: from_first(v, device) for k, v in model.state_dict().items()})


def share_buffers(model: nn.Module, device: torch.device) -> None:
    """Give the model the buffers that the first process has: batch normalizations of each saw other images."""
    for buffer in model.buffers() if rank_and_world()[1] > 1 else ():
        buffer.copy_(from_first(buffer, device))


def sum_over_processes(parameters: Sequence[Tensor], counts: Tensor) -> Tensor:
    """Sum gradients over the processes, in place, in one message with counts (n,); -> their sums."""
    if rank_and_world()[1] == 1:
        return counts
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    message = torch.cat([*(g.flatten() for g in gradients), counts])
    dist.all_reduce(message)
    *sums, counts = message.split([*(g.numel() for g in gradients), len(counts)])
    for gradient, total in zip(gradients, sums):
        gradient.copy_(total.view_as(gradient))
    return counts
