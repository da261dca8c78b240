"""The parts of the day, in order: what each runs, and how long it should take.

Expected times are computed from sizes and from what compilation takes elsewhere; none was measured.
A part is stopped after `LIMIT` seconds. Nothing is fetched.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 480
MODEL_PARTS = ("speed", "graphs", "calibration", "fit", "sweep")
_GPU_TESTS = (
    "tests/ops",
    "tests/ghosted_triton/test_gpu.py",
    "tests/test_cuda_build.py",
    "tests/test_pipeline_on_devices.py",
    "tests/swept/test_on_device.py",
)
# Without torch's cache of memory, which hides what is out of bounds; so without CUDA graphs.
_SANITIZED = (
    "(test_values and 300-136 and bfloat16 and (any or none)) or test_bad_token_is_named "
    "or (test_ghost_apply and 300 and 64)"
)
_CASE_SECONDS = 8.0
_SOME_PASSED = r"\b[1-9]\d* passed"


@dataclass(frozen=True)
class Setting:
    """Where the parts run.

    Attributes:
        device: "cuda"; "cpu" tries the parts out.
        shape: Of the model and the operators: "8b" or "tiny".
        folder: For logs and results.
    """

    device: str
    shape: str
    folder: Path


@dataclass(frozen=True)
class Command:
    """What a part runs.

    Attributes:
        words: The program and its arguments.
        environment: Variables that are set for it.
        must_say: Pattern that its output holds if it did its work; "" for none.
    """

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    must_say: str = ""


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: What it is called, also its files.
        about: What it shows, in a few words.
        seconds: How long it should take on an H100.
        command: Makes its command.
        program: A program that is needed and may be absent; "" for none.
    """

    name: str
    about: str
    seconds: int
    command: Callable[[Setting], Command]
    program: str = ""


def result_file(name: str, setting: Setting) -> Path:
    """Return the file of the figures that a part has measured."""
    return setting.folder / f"{name}.json"


def _python(*words: str) -> list[str]:
    return [sys.executable, *words]


def _build(setting: Setting) -> Command:
    doctor = _python("-m", "ghosted_fast", "doctor", "--json")
    if setting.device == "cpu":
        return Command(doctor)
    install = "pip install --quiet --no-index --no-deps --no-build-isolation -e ."
    chosen = {"GHOSTED_FAST_BUILD": "cuda"}
    script = f"set -e; {shlex.quote(sys.executable)} -m {install}; {shlex.join(doctor)}"
    return Command(["bash", "-c", script], chosen, '"kind": "cuda"')


def _pytest(*words: str) -> list[str]:
    return _python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *words)


def _tests(setting: Setting) -> Command:
    side_by_side = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    words = _pytest(*side_by_side, "--durations=10", *_GPU_TESTS)
    return Command(words, must_say=_SOME_PASSED if setting.device == "cuda" else "")


def _sanitizer(tool: str, setting: Setting) -> Command:
    words = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    words += _pytest("tests/ops/test_gram_update_cuda.py", "tests/ghosted_triton/test_gpu.py")
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Command([*words, "-k", _SANITIZED], environment, _SOME_PASSED)


def _counters(setting: Setting) -> Command:
    words = ["ncu", "--clock-control", "none", "-k", "regex:gram_tiles|ghost_", "-c", "12"]
    words += ["--set", "basic", *_pytest("tests/ops/test_gram_update_cuda.py", "-k", "bitwise")]
    return Command(words, must_say=_SOME_PASSED)


def _operator(
    operator: str,
    name: str,
    widths: Sequence[int],
    rows: Sequence[int],
    dtype: str,
    setting: Setting,
) -> Command:
    """Return the library's own benchmark: checked, in CUDA graphs, with weights in turn."""
    seconds = _CASE_SECONDS
    if setting.shape == "tiny":
        widths, rows, seconds = (64,), rows and (16,), 0.05
    words = _python("-m", "ghosted_fast", "bench-ops", "--device", setting.device)
    words += ["--operator", operator, "--seconds", str(seconds), "--quiet", "--overwrite"]
    words += ["--json-file", str(result_file(name, setting))]
    for width in widths:
        words += ["--width", str(width)]
    for count in rows:
        words += ["--rows", str(count)]
    return Command([*words, "--dtype", dtype] if rows else words)


def _model(name: str, setting: Setting) -> Command:
    words = _python(str(ROOT / "benchmarks" / "gpu_day.py"), "--model-part", name)
    words += ["--device", setting.device, "--shape", setting.shape]
    return Command([*words, "--output", str(setting.folder)], {"HF_HUB_OFFLINE": "1"})


def _sanitizers() -> list[Part]:
    seconds = {"memcheck": 110, "racecheck": 120, "synccheck": 90, "initcheck": 110}
    about = "the compiled kernels and Triton's under compute-sanitizer"
    return [
        Part(tool, about, expected, partial(_sanitizer, tool), "compute-sanitizer")
        for tool, expected in seconds.items()
    ]


def _operators() -> list[Part]:
    def part(
        name: str,
        about: str,
        expected: int,
        widths: Sequence[int],
        rows: Sequence[int],
        dtype: str = "bf16",
    ) -> Part:
        operator = "_".join(name.split("_")[:2])
        return Part(name, about, expected, partial(_operator, operator, name, widths, rows, dtype))

    return [
        part("ghost_apply_decode", "1 and 16 rows", 180, (2048, 4096), (1, 16)),
        part("ghost_apply_prefill", "512 and 4096 rows", 180, (2048, 4096), (512, 4096)),
        part("gram_update_fold", "sums of 1024 tokens", 200, (2048, 4096), (1024,)),
        part("gram_update_batch", "of 8192 tokens", 300, (576, 2048, 4096), (8192,)),
        part("gram_update_fp16", "of fp16 activations", 150, (4096,), (8192,), "fp16"),
        part("gram_update_fp32", "of fp32 activations", 150, (4096,), (8192,), "fp32"),
        part("ghost_solve", "the solve, torch's own", 60, (2048, 4096), ()),
    ]


def _models() -> list[Part]:
    about = {
        "speed": ("prefill and decode, eager: dense, pruned, ghosted", 300),
        "graphs": ("prefill and a decode step of each in a CUDA graph", 240),
        "calibration": ("the pass over text against bare layers, and its memory", 240),
        "fit": ("a ghost from text to model, with a correction", 300),
        "sweep": ("the same of a model that stays in its files, and its memory", 300),
    }
    return [
        Part(name, text, seconds, partial(_model, name)) for name, (text, seconds) in about.items()
    ]


def parts() -> list[Part]:
    """Return all parts, in the order in which they run: what proves before what measures."""
    return [
        Part("build", "the extension with its CUDA kernels, for this device", 150, _build),
        Part("tests", "all tests that want a GPU", 240, _tests),
        *_sanitizers(),
        *_operators(),
        *_models(),
        Part("counters", "what ncu counts in the kernels", 150, _counters, "ncu"),
    ]
