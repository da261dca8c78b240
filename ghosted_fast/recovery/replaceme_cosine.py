"""ReplaceMe by its cosine objective: the map of `replaceme`, found by gradient steps.

    T = argmin mean over tokens of 1 - cos(T m, t)        t = y - x_a = y - x + m

m is what the MLP of the last kept layer adds, x_a the stream that it is added to. As in the
published code: T begins as the identity, in fp32; Adam at a rate of 1e-4, ten times through all
attended tokens, 1024 of them a step, in an order that is drawn anew each time (here by a seed). Its
default objective is this one, of T m alone, and not that of x_a + T m. It is the one recovery that
takes gradient steps; no parameter of the model is trained.

All tokens' m and t are held, in the model's dtype, in the processor's memory.

Source: Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block
Linearization", arXiv 2505.02819, the cosine distance, and its code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast.errors import ArgumentError, SolveError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.recovery.collector import Patch
from ghosted_fast.recovery.replaceme import MlpMapCollector
from ghosted_fast.statistics.sample import Interval, Sample

RATE, ROUNDS, TOKENS = 1e-4, 10, 1024


class ReplaceMeCosineCollector(MlpMapCollector):
    """All tokens' m and t, in the order of the text."""

    name = "replaceme-cosine"

    def __init__(self, decoder: Decoder, gap: Interval) -> None:
        super().__init__(decoder, gap)
        if distributed.count() > 1:
            raise ArgumentError(
                f"expected one process for the recovery {self.name!r}, got {distributed.count()}: "
                "its steps go through all tokens in turn; start it without torchrun, or use "
                "another recovery"
            )
        self._device = decoder.device
        self._outputs: list[Tensor] = []
        self._targets: list[Tensor] = []

    def update(self, sample: Sample) -> None:
        """Keep the attended tokens of a batch."""
        assert sample.mlp_output is not None
        m, x, y = (
            states[sample.attended].double() for states in (sample.mlp_output, sample.x, sample.y)
        )
        self._outputs.append(m.to("cpu", sample.x.dtype))
        self._targets.append((y - x + m).to("cpu", sample.x.dtype))

    def sums(self) -> list[Tensor]:
        """Return nothing: one process sees all."""
        return []

    def patch(self) -> Patch:
        """Return the map."""
        outputs, targets = torch.cat(self._outputs), torch.cat(self._targets)
        self._outputs, self._targets = [], []
        found = cosine_map(outputs, targets, self._device)
        if not bool(torch.isfinite(found).all()):
            raise SolveError(
                "expected a map of finite numbers, got NaN or infinity: an MLP's output or its "
                "target is zero for some token; use another recovery"
            )
        return Patch(mlp_map=found - torch.eye(len(found), dtype=found.dtype, device=found.device))


@torch.inference_mode(False)
def cosine_map(outputs: Tensor, targets: Tensor, device: torch.device) -> Tensor:
    """Return T [d, d] fp64, [out, in], on a device.

    Args:
        outputs: m [tokens, d].
        targets: t [tokens, d].
        device: Where the steps are taken.
    """
    size = outputs.shape[1]
    weight = torch.eye(size, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=RATE)
    draw = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(ROUNDS):
            for rows in torch.randperm(len(outputs), generator=draw).split(TOKENS):
                m, t = (states[rows].to(device, torch.float32) for states in (outputs, targets))
                mapped = m @ weight.mT
                mapped = mapped / mapped.norm(dim=1, keepdim=True)
                t = t / t.norm(dim=1, keepdim=True)
                optimizer.zero_grad()
                (1.0 - (mapped * t).sum(1).mean()).backward()
                optimizer.step()
    return weight.detach().double()
