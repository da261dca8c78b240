"""Which tests one worker of pytest-xdist runs: those that share what takes long to make.

Said by path. xdist 3.8's own mark has no effect under pytest 9.2: it is handed on in a field of the
tests that is no longer read.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

# Folders and files. They share programs that are compiled, folders that are built in, the process
# that ranks are forked from, or a model.
TOGETHER = (
    "tests/amx_emulation",
    "tests/arm_emulation",
    "tests/cli/test_heal_verb.py",
    "tests/cli/test_kills.py",
    "tests/cuda_emulation",
    "tests/cuda_machine_code",
    "tests/deployment/test_quantized_bases.py",
    "tests/distributed",
    "tests/test_cuda_build.py",
    "tests/test_packaging.py",
    "tests/test_real_model.py",
)


def unit_of(nodeid: str) -> str:
    """Return what is sent to a worker at once: a folder or file of `TOGETHER`, or one test."""
    path = nodeid.partition("::")[0]
    for place in TOGETHER:
        if path == place or path.startswith(f"{place}/"):
            return place
    return nodeid


class TogetherScheduling(LoadScopeScheduling):
    """Sends the units that hold most tests first, then single tests in their order."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)
