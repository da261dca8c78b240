"""Plants faults in copies of the tree, one at a time, and demands that the tests find each.

    PYTHONPATH=tests python -m mutants.run [--jobs N] [words of a name ...]

Prints the list; exits with 1 if a fault survives, cannot be planted or does not compile, or if the
tests fail without any. A fault called equivalent is listed with its reason and must survive.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import (
    amx_mutants,
    arm_mutants,
    cuda_mutants,
    divergence_mutants,
    triton_mutants,
)
from mutants.mutant import Mutant

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COPIED = ("csrc", "ghosted_fast", "kernels", "tests", "pyproject.toml", "setup.py")
LEFT_OUT = shutil.ignore_patterns("*.so", "__pycache__", ".*")
PACKAGE_OF_KERNELS = Path("kernels") / "ghosted_triton"
FAILED_TESTS, PASSED = 1, 0


def all_mutants() -> list[Mutant]:
    """Return the mutants of every list that is there."""
    lists = (amx_mutants, arm_mutants, cuda_mutants, divergence_mutants, triton_mutants)
    return [mutant for each in lists for mutant in each.MUTANTS]


def copy_tree(to: Path) -> None:
    """Copy what the tests need, and put the kernels where the package has them installed."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=LEFT_OUT)
        elif source.exists():
            shutil.copy(source, to / name)
    if (to / PACKAGE_OF_KERNELS).is_dir():
        (to / "ghosted_fast" / "kernels").symlink_to(to / PACKAGE_OF_KERNELS)


def run_tests(tree: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run pytest in a copy of the tree, on its own sources."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "tests")]),
        "GHOSTED_FAST_NATIVE": "0",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command,
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def judge(mutant: Mutant) -> tuple[str, str]:
    """Return the verdict on a mutant, and what a reader should know of it."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        path = tree / mutant.file
        text = path.read_text()
        if (found := text.count(mutant.old)) != 1:
            return "BROKEN", f"its text occurs {found} times in {mutant.file}"
        path.write_text(text.replace(mutant.old, mutant.new))
        done = run_tests(tree, mutant.tests)
    output = done.stdout + done.stderr
    if "does not compile" in output:
        return "BROKEN", output[output.index("does not compile") :][:500]
    if done.returncode == PASSED:
        return ("equivalent", mutant.equivalent) if mutant.equivalent else ("SURVIVED", "")
    crashed = done.returncode < 0  # the emulation aborts where it finds a fault
    if not crashed and (done.returncode != FAILED_TESTS or " skipped" in output.splitlines()[-1]):
        return "BROKEN", output[-500:]
    if mutant.equivalent:
        return "BROKEN", "called equivalent, but a test tells"
    return "caught", ""


def check_without_faults(mutants: list[Mutant], pool: ThreadPoolExecutor) -> str:
    """Return why the mutants' tests fail on the tree as it is; empty if they pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        different = sorted({mutant.tests for mutant in mutants})
        runs = pool.map(lambda tests: run_tests(Path(folder), tests), different)
        for tests, done in zip(different, runs, strict=True):
            if done.returncode != PASSED or " skipped" in done.stdout.splitlines()[-1]:
                return f"{' '.join(tests)}:\n{done.stdout[-2000:]}{done.stderr[-500:]}"
    return ""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Judge the mutants that are asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("words", nargs="*", help="only mutants whose name has one of these")
    options = parser.parse_args()
    mutants = [
        mutant
        for mutant in all_mutants()
        if not options.words or any(word in mutant.name for word in options.words)
    ]
    start = time.monotonic()
    counts: dict[str, int] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        if problem := check_without_faults(mutants, pool):
            say(f"the tests fail without any fault:\n{problem}")
            return 1
        for mutant, (verdict, remark) in zip(mutants, pool.map(judge, mutants), strict=True):
            counts[verdict] = counts.get(verdict, 0) + 1
            say(f"{verdict:<10} {Path(mutant.file).name:<18} {mutant.name}")
            if remark:
                say(f"{'':<10} {remark}")
    seconds = time.monotonic() - start
    say(", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + f"; {seconds:.0f} s")
    return 0 if set(counts) <= {"caught", "equivalent"} else 1


if __name__ == "__main__":
    sys.exit(main())
