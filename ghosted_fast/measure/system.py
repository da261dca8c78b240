"""What a measurement was made with: processor, versions, backends."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
from pathlib import Path

import psutil
import torch

from ghosted_fast.errors import ArgumentError
from ghosted_fast.ops import backend_status

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
_EXTRAS = ("gguf", "accelerate", "pyarrow", "datasets", "matplotlib", "jinja2", "triton")
# What makers call the cores of one family and model, which names such as "AMD EPYC" leave open.
_CORES = {
    ("GenuineIntel", 6): {
        85: "Skylake to Cooper Lake",
        106: "Ice Lake",
        108: "Ice Lake",
        143: "Sapphire Rapids",
        207: "Emerald Rapids",
        173: "Granite Rapids",
        174: "Granite Rapids",
    },
    ("AuthenticAMD", 23): dict.fromkeys(range(0x30, 0x100), "Zen 2"),
    ("AuthenticAMD", 25): dict.fromkeys((*range(0x10, 0x20), *range(0x60, 0xB0)), "Zen 4")
    | dict.fromkeys((*range(0x10), *range(0x20, 0x60)), "Zen 3"),
    ("AuthenticAMD", 26): dict.fromkeys(range(0x100), "Zen 5"),
}
_CPU_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
)


def machine_facts() -> dict[str, str]:
    """Return processor, threads, system and versions as label and value, for tables and reports."""
    facts = {
        "processor": processor_name(),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    facts["ghosted_fast"] = importlib.metadata.version("ghosted_fast")
    facts.update((name, package_version(name)) for name in ("torch", "transformers"))
    usable = [name for name, available, _ in backend_status() if available]
    facts["backends"] = ", ".join(usable)
    return facts


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes held at once since `reset_peak_memory`, or None if unknown.

    On an accelerator they are its tensors, else all of the process that is in memory (Linux).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def device_named(name: str) -> torch.device:
    """Return a device by its name, with its number if it is one of several.

    Raises:
        ArgumentError: It is no device, or not one of this machine.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ArgumentError(f"expected a device of this machine, got {name!r}") from error


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free: of a CUDA device its own, else those of the system."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def package_versions() -> dict[str, str]:
    """Return the version of each required and optional package, or "absent"."""
    return {name: package_version(name) for name in (*_PACKAGES, *_EXTRAS)}


def package_version(name: str) -> str:
    """Return the version of an installed package, or "absent"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def processor_name() -> str:
    """Return what the processor calls itself, with its cores: `Intel Xeon (Emerald Rapids)`."""
    given = _cpuinfo("model name") or platform.processor() or platform.machine()
    name = " ".join(re.sub(r"\((R|TM|tm)\)|\b(Processor|CPU)\b", "", given).split())
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    if family is None or model is None:
        return name
    cores = _CORES.get((_cpuinfo("vendor_id") or "", int(family)), {})
    return f"{name} ({cores.get(int(model), f'family {family}, model {model}')})"


def cpu_features() -> list[str]:
    """Return those of the processor's vector and matrix extensions that matter here."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return [name for name in _CPU_FEATURES if name in flags]


def _cpuinfo(key: str) -> str | None:
    """Return the first value of a key in Linux's own description of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
