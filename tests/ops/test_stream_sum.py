"""stream_sum is torch's own sum, and whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ghosted_fast.ops import stream_sum

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 5, 7)], ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden, residual = torch.randn(2, *shape).to(dtype)
    total = stream_sum(hidden, residual)
    assert torch.equal(total, hidden + residual)
    strided = stream_sum(hidden.mT.contiguous().mT, residual)
    assert torch.equal(strided, total)


def test_opcheck() -> None:
    operator = torch.ops.ghosted_fast.stream_sum.default
    torch.library.opcheck(operator, (torch.randn(3, 4), torch.randn(3, 4)))


def test_a_compiler_leaves_it_whole() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def step(hidden: Tensor, residual: Tensor) -> Tensor:
        return stream_sum(hidden * 2, residual) + 1

    hidden, residual = torch.randn(2, 3, 4)
    run = torch.compile(step, fullgraph=True, backend=keep)
    assert torch.equal(run(hidden, residual), step(hidden, residual))
    (graph,) = graphs
    assert torch.ops.ghosted_fast.stream_sum.default in {node.target for node in graph.graph.nodes}
