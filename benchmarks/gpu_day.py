"""All that a GPU is wanted for, by one command: `make gpu`.

    python benchmarks/gpu_day.py --dry-run                   lists the parts and their times
    python benchmarks/gpu_day.py                             runs those that are not done yet
    python benchmarks/gpu_day.py --only speed graphs         these, unless they are done
    python benchmarks/gpu_day.py --again tests               this, once more
    python benchmarks/gpu_day.py --device cpu --shape tiny   tries the parts out without a GPU

Each part is a process of at most 8 minutes. How it ended, its log and its figures stay in the
folder, and `gpu_day.json` and `gpu_day.md` there are written anew after each. Nothing is fetched:
the environment needs torch for CUDA, nvcc, this package's requirements and pytest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpu.page import PAGE_FILE, table, write_page
from gpu.plan import LIMIT, MODEL_PARTS, Setting, parts
from gpu.running import ABSENT, DONE, chosen, run_part, state_of
from rich.console import Console

FOLDER = Path("build") / "gpu_day"


def dry_run(setting: Setting) -> list[str]:
    """Return the parts as a table, and how long those take that are not done."""
    lines, left = [], 0
    for part in parts():
        status = state_of(part, setting)["status"]
        left += 0 if status == DONE else part.seconds
        lines.append([part.name, part.about, part.seconds, status])
    shown = table(["part", "shows", "expected seconds", "state"], lines)
    total = f"About {left / 60:.0f} minutes are left; a part is stopped after {LIMIT / 60:.0f}."
    return [*shown, total]


def check_device(device: str) -> None:
    """Raise unless torch has the device.

    Raises:
        SystemExit: It has not; says what to do.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "expected a CUDA device that torch can use, got none: --device cpu --shape tiny tries "
            "the parts out, --dry-run lists them"
        )


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="list the parts, run none")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="run these alone")
    parser.add_argument("--again", nargs="+", default=[], metavar="PART", help="though done")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--shape", choices=("8b", "tiny"), default="8b", help="default: 8b")
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"folder (default: {FOLDER})")
    parser.add_argument("--model-part", choices=MODEL_PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the parts, or one of those of the model in this process."""
    given, console = arguments(), Console(highlight=False, soft_wrap=True)
    setting = Setting(given.device, given.shape, given.output.resolve())
    if given.dry_run:
        console.print("\n".join(dry_run(setting)), markup=False)
        return
    check_device(given.device)
    if given.model_part:
        from gpu.models import run_model_part

        run_model_part(given.model_part, setting)
        return
    known, failed = parts(), []
    for part in chosen(known, setting, given.only, given.again):
        console.print(f"{part.name}: {part.about}, about {part.seconds} s", markup=False)
        state = run_part(part, setting)
        console.print(f"  {state['status']}, {state['seconds']:.0f} s", markup=False)
        if state["status"] not in (DONE, ABSENT):
            failed.append(part.name)
        write_page(known, setting)
    write_page(known, setting)
    console.print(f"{setting.folder / PAGE_FILE}", markup=False)
    if failed:
        sys.exit(f"not done: {', '.join(failed)}; their logs are in {setting.folder / 'logs'}")


if __name__ == "__main__":
    main()
