"""The library as a backend: your code chooses layers and gathers states, the library fits.

    python examples/own_pruning_code.py --model MODEL --text texts.jsonl --removed 14-18

Hidden states come from transformers here; any source of pairs (x, y) will do. Memory does not grow
with the text: `GramAccumulator` keeps sums.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import ghosted_fast as gf


@torch.inference_mode()
def fit_operator(model: Any, batches: list[torch.Tensor], removed: range) -> gf.GhostSolution:
    """Return the operator for a run of layers that does not hold the last layer.

    Args:
        model: The dense model.
        batches: Token ids [batch, length].
        removed: The layers that are to go.
    """
    gram = gf.GramAccumulator(model.config.hidden_size, folds=4)
    for index, ids in enumerate(batches):
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        weight = torch.ones(ids.shape)
        weight[:, 0] = 0.0  # the first token's state is unlike all others
        gram.update(states[removed.start], states[removed.stop], weight, fold=index % 4)
    return gf.solve_ghost(gram)  # the damping is chosen on held-out folds


def main() -> None:
    """Fit an operator, put it in the place of the layers, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a hub id, a folder or a GGUF file")
    parser.add_argument("--text", required=True, help="text to calibrate on")
    parser.add_argument("--removed", default="14-18", help="first and last layer to remove")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--output", default="own")
    given = parser.parse_args()
    first, last = map(int, given.removed.split("-"))
    removed = range(first, last + 1)

    model, tokenizer = gf.load_model(given.model)
    texts = gf.load_texts(given.text)
    batches = gf.token_batches(tokenizer, texts, given.tokens, given.length, batch_size=1)
    solution = fit_operator(model, batches, removed)
    print(f"held-out error {solution.held_out_error:.3f}, condition {solution.condition:.1e}")

    operators = {first: solution.weight}
    smaller, _ = gf.import_ghosts(model, operators, removed, form="delta", layout="out-in")
    gf.save_model(smaller, given.output, tokenizer)
    for name, item in {"pruned": gf.prune_model(model, removed), "ghosted": smaller}.items():
        print(f"{name:8} perplexity {gf.perplexity(item, batches).value:.2f}")


if __name__ == "__main__":
    main()
