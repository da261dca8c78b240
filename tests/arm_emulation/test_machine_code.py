"""What the cross compiler makes of the inner loops for Arm, read from the machine code."""

from __future__ import annotations

import pytest
from support.arm_machine_code import Loop, loops_of
from support.arm_toolchain import KERNELS, build, missing_tools, object_of
from support.cpu_paths import ARM_PATHS, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_tools()), reason=missing_tools()),
]


@pytest.fixture(scope="module")
def loops() -> dict[str, list[Loop]]:
    """The innermost loops of each path."""
    found = {}
    for path in ARM_PATHS:
        found[path] = loops_of(object_of(KERNELS / f"path_{path}.cpp"))
    return found


# The table of docs/performance.md: in which function, products, their operands, how many in one
# round, and the vectors loaded for them.
@pytest.mark.parametrize(
    ("path", "function", "product", "operands", "count", "loads"),
    [
        ("neonbf16", "gram_block", "bfmmla", r"v\d+\.4s", 16, 8),
        ("neonbf16", "gemm_strip", "bfmmla", r"v\d+\.4s", 16, 8),
        ("neonbf16", "apply_few_packed", "bfdot", r".*\.2h\[", 16, 17),
        ("neonbf16", "apply_few_packed", "bfdot", r".*\.2h\[", 16, 5),
        ("neonbf16", "apply_byte_block", "smmla", "", 16, 12),
        ("neon", "gram_block", "fmla", r"v\d+\.4s.*\.s\[", 16, 4),
        ("neon", "gemm_strip", "fmla", r"v\d+\.4s.*\.s\[", 16, 4),
        ("neon", "solve", "fmla", r"v\d+\.2d.*\.d\[", 16, 6),
    ],
)
def test_inner_loops(
    loops: dict[str, list[Loop]],
    path: str,
    function: str,
    product: str,
    operands: str,
    count: int,
    loads: int,
) -> None:
    candidates = [loop for loop in loops[path] if loop.count(product, operands) == count]
    there = [loop for loop in candidates if function in loop.function]
    fitting = [loop for loop in there if loop.vector_loads() == loads]
    assert fitting, f"loads of the loops with so many: {[loop.vector_loads() for loop in there]}"
    assert not [loop.spills() for loop in fitting if loop.spills()]


def test_the_roof_is_measured_with_the_same_products() -> None:
    source = ROOT / "ghosted_fast" / "bench_ops" / "roof.cpp"
    for architecture, name in (("armv8.2-a+bf16", "bfmmla"), ("armv8-a", "fmla")):
        flags = ["-O3", f"-march={architecture}", "-fPIC", "-c"]
        made = build(f"roof_{architecture}.o", [source], flags)
        assert 20 in {loop.count(name) for loop in loops_of(made)}
