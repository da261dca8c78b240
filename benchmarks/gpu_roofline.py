"""Print docs/gpu-roofline.md: bytes, flops, occupancy and bound of each GPU kernel, on paper.

Nothing here is measured. Peaks are those of the makers' data sheets (dense); registers come from
the kernels' machine code, which the tests read and hold to limits.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from rich.console import Console

REGISTERS_PER_SM = 65536
REGISTER_GRANULE = 256  # per warp
RESERVED_SHARED = 1024  # per block


@dataclass(frozen=True)
class Gpu:
    """One accelerator: multiprocessors, shared memory of each in bytes, TF/s in bf16, TB/s."""

    name: str
    capability: int
    multiprocessors: int
    shared: int
    tflops: float
    tbps: float


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: warps of a block, and registers and shared bytes by capability."""

    name: str
    warps: int
    registers: dict[int, int]
    shared: dict[int, int]


GPUS = (
    Gpu("A100 80 GB", 80, 108, 167936, 312.0, 2.04),
    Gpu("H100 SXM", 90, 132, 233472, 989.0, 3.35),
    Gpu("B200", 100, 148, 233472, 2250.0, 8.0),
)


def tile_bytes(rows: int, columns: int, depth: int, stages: int, column_bytes: int = 2) -> int:
    """Return the shared memory of a product's pipeline."""
    return stages * depth * (2 * rows + column_bytes * columns)


KERNELS = (
    Kernel(
        "`ghost_apply` decode, bf16 (Triton)",
        4,
        {80: 64, 90: 48, 100: 48},
        {80: tile_bytes(16, 64, 128, 4), **{c: tile_bytes(16, 64, 64, 5) for c in (90, 100)}},
    ),
    Kernel(
        "`ghost_apply` decode, int8 (Triton)",
        8,
        {80: 74, 90: 75, 100: 75},
        {c: tile_bytes(16, 128, 128, 4, 1) for c in (80, 90, 100)},
    ),
    Kernel(
        "`ghost_apply` prefill, bf16 (Triton)",
        8,
        {80: 174, 90: 106, 100: 148},
        {80: tile_bytes(128, 128, 64, 3), **{c: tile_bytes(128, 128, 64, 4) for c in (90, 100)}},
    ),
    Kernel(
        "`gram_update`, one product (CUDA C++)",
        8,
        {80: 196, 90: 200, 100: 199},
        dict.fromkeys((80, 90, 100), 52224),
    ),
    Kernel(
        "`gram_update`, exact (Triton)",
        8,
        {80: 172, 90: 150, 100: 128},
        {80: tile_bytes(128, 128, 16, 4), **{c: tile_bytes(128, 64, 64, 3) for c in (90, 100)}},
    ),
)


def occupancy(gpu: Gpu, kernel: Kernel) -> tuple[int, str]:
    """Return the blocks that a multiprocessor holds at once, and what limits them."""
    registers = -(-kernel.registers[gpu.capability] * 32 // REGISTER_GRANULE) * REGISTER_GRANULE
    limits = {
        "registers": REGISTERS_PER_SM // registers // kernel.warps,
        "shared memory": gpu.shared // (kernel.shared[gpu.capability] + RESERVED_SHARED),
        "warps": 64 // kernel.warps,
    }
    limit = min(limits, key=limits.__getitem__)
    return limits[limit], limit


def bound(gpu: Gpu, num_bytes: float, flops: float) -> str:
    """Return the least time in microseconds, and which roof it is."""
    memory, compute = num_bytes / gpu.tbps / 1e6, flops / gpu.tflops / 1e6
    return f"{max(memory, compute):.1f} ({'memory' if memory > compute else 'compute'})"


def apply_work(size: int, rows: int, weight_bytes: int) -> tuple[float, float]:
    """Return bytes and flops of `ghost_apply`: the weight once, x and y."""
    return size**2 * weight_bytes + 4.0 * rows * size, 2.0 * rows * size**2


def gram_work(size: int, tokens: int) -> tuple[float, float]:
    """Return bytes and flops of G and C from exact bf16 rows: x, y, and the fp64 sums twice."""
    return 4.0 * tokens * size + 24.0 * size**2, 3.0 * tokens * size**2


def main() -> None:
    """Print the page."""
    out = Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False).print
    out("# The GPU kernels on paper\n")
    out("**Computed, never measured**: no kernel of this library has run on a GPU yet. This page")
    out("is the output of `python benchmarks/gpu_roofline.py`; on a machine that has one,")
    out("`ghosted-fast bench-ops --device cuda` measures.\n")
    out("## Occupancy\n")
    out("Blocks per multiprocessor and what limits them, from the registers of the machine code")
    out("(the tests hold them to limits: nothing spills, no stack) and the shared memory of the")
    out("pipelines.\n")
    names = " | ".join(f"{gpu.name} (sm_{gpu.capability})" for gpu in GPUS)
    out(f"| kernel | warps | {names} |")
    out("|---" * (2 + len(GPUS)) + "|")
    for kernel in KERNELS:
        cells = []
        for gpu in GPUS:
            blocks, limit = occupancy(gpu, kernel)
            share = blocks * kernel.warps / 64
            cells.append(
                f"{kernel.registers[gpu.capability]} registers, "
                f"{kernel.shared[gpu.capability] / 1024:.0f} KiB: {blocks} at once, "
                f"{share:.0%} ({limit})"
            )
        out(f"| {kernel.name} | {kernel.warps} | " + " | ".join(cells) + " |")
    out("\n## The bound: max(flops / peak, bytes / bandwidth), in microseconds\n")
    peaks = ", ".join(f"{g.name} {g.tflops:g} TF/s and {g.tbps:g} TB/s" for g in GPUS)
    out(f"Dense bf16 peaks and memory bandwidth of the data sheets: {peaks}.\n")
    out("| operator | shape | MB | GF | " + " | ".join(gpu.name for gpu in GPUS) + " |")
    out("|---" * (4 + len(GPUS)) + "|")
    rows = [
        ("`ghost_apply` " + name, f"d={size}, {tokens} rows", apply_work(size, tokens, width))
        for name, width in (("bf16", 2), ("int8", 1))
        for size in (2048, 4096, 8192)
        for tokens in (1, 16, 512, 4096)
        if width == 2 or tokens <= 16
    ]
    rows += [
        ("`gram_update` G and C", f"d={size}, {tokens} tokens", gram_work(size, tokens))
        for size in (2048, 4096, 8192)
        for tokens in (2048, 8192)
    ]
    for name, shape, (num_bytes, flops) in rows:
        bounds = " | ".join(bound(gpu, num_bytes, flops) for gpu in GPUS)
        out(f"| {name} | {shape} | {num_bytes / 1e6:.1f} | {flops / 1e9:.2f} | {bounds} |")
    out("\nWhat the page leaves out: the launch (a few microseconds, more than a decode step at")
    out(
        "d = 2048 takes; a CUDA graph hides it), partial sums of the decode kernel (at most 2.5% of"
    )
    out(
        "the bytes of the weights), and the several products that inexact weights or fp32 rows need"
    )
    out("(3 or 6 in place of one). The tiles of G on the diagonal make its work 0.516 of a product")
    out("at d = 4096, not 0.5; G and C together take 0.758 of two.")


if __name__ == "__main__":
    main()
