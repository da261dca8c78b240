"""The processes that `torchrun` started: they make a group, share the work, and leave alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from ghosted_fast import _env
from ghosted_fast.cli._shared.verb import usage_error


@contextmanager
def process_group(timeout_s: int, device: str) -> Iterator[bool]:
    """Join the processes that `torchrun` started, for a block that all run; alone, do nothing.

    Each process computes on the GPU of its `LOCAL_RANK`, if on any.

    Args:
        timeout_s: How long the others are waited for.
        device: What `--device` says.

    Yields:
        Whether this is the first process, which alone writes and prints.

    Raises:
        typer.BadParameter: The device is one GPU for all, or there are fewer GPUs than processes.
        RankError: Another process failed, or is gone.
    """
    launch = _env.launched()
    if launch is None:
        yield True
        return
    import torch
    import torch.distributed as dist

    from ghosted_fast import distributed

    backend = "gloo"
    if device.startswith("cuda:"):
        raise usage_error(
            f"expected auto, cpu or cuda with several processes, each of which takes the GPU of "
            f"its number on the machine, got {device!r}",
            "--device",
        )
    if device in ("auto", "cuda") and torch.cuda.is_available():
        if launch.local_rank >= torch.cuda.device_count():
            raise usage_error(
                f"expected a GPU for each process, got {torch.cuda.device_count()} GPUs and a "
                f"process of number {launch.local_rank}: start fewer (--nproc-per-node)",
                "--device",
            )
        torch.cuda.set_device(launch.local_rank)
        if dist.is_nccl_available():
            backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        with distributed.failing_together():
            yield launch.rank == 0
    finally:
        dist.destroy_process_group()
