"""Models that an operator was folded into: no more than a model of transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from ghosted_fast.recovery.patches import fit_patches, put_patches
from ghosted_fast.testing import tiny_model
from support.padded_text import padded_batches


def check_saved_and_loaded(recovery: str, family: str, folder: Path) -> None:
    """Fold a recovery into a tiny model, and have transformers alone save it and load it again."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(family)
    patches = fit_patches(model, padded_batches(), [(recovery, (2, 4))])
    smaller = put_patches(model, [2, 3], list(patches.values()))
    smaller.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = padded_batches(1)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, smaller(ids).logits)
    assert loaded.config.model_type == family and loaded.config.num_hidden_layers == 4
