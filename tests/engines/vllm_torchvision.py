"""Let an installed torchvision be imported where its compiled operators cannot be loaded.

PyPI has the build for CUDA alone, whose operators do not load beside torch's CPU build. vLLM's
classes that read pictures import its image functions, which need none of them; what declares the
operators' shapes at import does, and is emptied.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

found = find_spec("torchvision")
assert found is not None and found.origin is not None, "expected torchvision to be installed"
if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
    Path(found.origin).with_name("_meta_registrations.py").write_text("")
subprocess.run([sys.executable, "-c", "import torchvision"], check=True)
