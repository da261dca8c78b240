"""`stream_sum`: the sum of the two parts of a hidden state, which a compiler leaves whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ghosted_fast.ops._define import NAMESPACE, library

# An operator of its own, which a compiler leaves whole. vLLM's linear layers on the processor write
# into an empty tensor, and inductor (torch 2.13) may move a fused read of it before the write where
# what is read is an output of the graph, as it is at the end of a pipeline's stage.
library.define("stream_sum(Tensor hidden, Tensor residual) -> Tensor")
library.impl("stream_sum", torch.add, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::stream_sum", torch.add, lib=library)
_operator = torch.ops.ghosted_fast.stream_sum.default


def stream_sum(hidden: Tensor, residual: Tensor) -> Tensor:
    """Return hidden + residual, as torch adds them.

    Args:
        hidden: One part of the hidden state, any shape.
        residual: The other part, of the same shape.

    Returns:
        Their sum, of the same shape.
    """
    total: Tensor = _operator(hidden, residual)
    return total
