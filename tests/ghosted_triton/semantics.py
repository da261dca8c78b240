"""Plugin for the checks under `python -m ttsem.sanitize pytest`.

There the tensors say that they are on a GPU, and no stream of it is being captured.
"""

from __future__ import annotations

import torch
from ghosted_triton.checkout import use_kernels_of_this_checkout

torch.cuda.is_current_stream_capturing = lambda: False
use_kernels_of_this_checkout()
