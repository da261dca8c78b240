"""Let an installed torchvision be imported where its compiled operators cannot be loaded.

PyPI has the build for CUDA alone, whose operators do not load beside torch's CPU build. vLLM's
classes that read pictures import its image functions, which need none of them; what declares the
operators' shapes at import does. A .pth file gives every process of this environment an empty
module in its place, and torchvision's own files stay as they are.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

EMPTY = (  # one line: a .pth file runs each by itself
    'import sys, types; name = "torchvision._meta_registrations"; '
    "sys.modules[name] = types.ModuleType(name)\n"
)

if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
    path = Path(sysconfig.get_path("purelib"), "torchvision_without_operators.pth")
    path.write_text(EMPTY)
subprocess.run([sys.executable, "-c", "import torchvision"], check=True)
