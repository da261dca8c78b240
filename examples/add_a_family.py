"""Teach the library a model family: one record, and all of it works.

    python examples/add_a_family.py

Many families are found without a record: where one list of layers has a norm beside it. A record
says what cannot be seen: which settings depend on a layer's index, and what must be refused.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StableLmConfig

import ghosted_fast as gf
from ghosted_fast.models.families import Family, register_family

RECORD = Family(
    "stablelm",  # config.model_type
    owner="",  # path from model.base_model to the module that holds the layers
    layers="layers",
    final_norm="norm",
    per_layer_lists=(),  # settings with an entry for each layer; they are cut as the layers are
    mlp_output="mlp",  # the module whose output a layer adds last
)


def small_model() -> Any:
    """Return a random model of the family."""
    config = StableLmConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def main() -> None:
    """Register the family, ghost a model of it, save it and load it again."""
    register_family(RECORD)
    model = small_model()
    batches = list(torch.randint(97, (64, 32)).split(8))
    smaller, report = gf.ghost_model(model, batches, removed=[3, 4])
    with tempfile.TemporaryDirectory() as folder:
        gf.save_model(smaller, Path(folder) / "smaller")
        again = AutoModelForCausalLM.from_pretrained(Path(folder) / "smaller")
    ids = batches[0][:1]
    same = torch.equal(again(ids).logits, smaller(ids).logits)
    print(f"{report.family}: {report.num_layers} layers became {again.config.num_hidden_layers}")
    print(f"loaded again: logits {'the same' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
