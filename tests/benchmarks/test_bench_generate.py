"""The generation benchmark's gate: it passes the right model and stops at a wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.benchmark_module import load_benchmark
from support.tiny_text import TEXT, save_tiny_model

from ghosted_fast.assets.downloads import DemoAssets
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import random_tokens, tiny_model
from ghosted_fast.text import loading


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_benchmark("bench_generate", monkeypatch)
    monkeypatch.setattr(module, "REMOVED", (2, 3))
    return module


def random_ghost(norm_eps: float | None, seed: int = 0) -> GhostLinear:
    ghost = GhostLinear(32, bias=True, norm_eps=norm_eps, first_state=True)
    generator = torch.Generator().manual_seed(seed)
    for parameter in ghost.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)
    return ghost.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
@pytest.mark.parametrize("removed", [(2, 3), (4, 5)], ids=["middle", "end"])
def test_gate(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    norm_eps: float | None,
    removed: tuple[int, int],
) -> None:
    monkeypatch.setattr(bench, "REMOVED", removed)
    dense, tokens = tiny_model("llama"), random_tokens(2, 24)
    ghosted = remove_layers(dense, removed, [random_ghost(norm_eps)])
    errors = bench.gate(dense, ghosted, tokens, "float32")
    assert 0 <= max(errors.values()) < 1e-5
    wrong = remove_layers(dense, [1, 2], [random_ghost(norm_eps)])
    with pytest.raises(RuntimeError, match=r"error_to_composition in float32 is .*, above 1e-04"):
        bench.gate(dense, wrong, tokens, "float32")


def test_bytes_and_flops_of_a_step(bench: ModuleType) -> None:
    model = tiny_model("llama", 2)
    embedding = model.get_input_embeddings().weight
    assert not model.config.tie_word_embeddings
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert bench.decode_bytes(model, 3) == total - embedding.nbytes + 3 * 32 * 4
    model.lm_head.weight = embedding
    assert bench.decode_bytes(model, 3) == total - embedding.nbytes
    per_layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    assert bench.linear_parameters(model) == 2 * per_layer + embedding.numel()


def test_rows(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, output = tmp_path / "texts.jsonl", tmp_path / "results" / "rows.jsonl"
    texts.write_text("".join(json.dumps({"0": TEXT}) + "\n" for _ in range(60)))
    assets = DemoAssets(save_tiny_model(tmp_path / "tiny"), texts, texts)
    monkeypatch.setattr(bench, "fetch_demo_assets", lambda: assets)
    monkeypatch.setattr(
        bench,
        "measure_roofs",
        lambda: {"memory": 1e10, "bf16": 1e11, "fp32": 1e11, "fp64": 5e10},
    )
    monkeypatch.setattr(bench, "CALIBRATION_TOKENS", 1024)
    monkeypatch.setattr(bench, "GATE_TOKENS", 24)
    monkeypatch.setattr(
        bench, "token_batches", lambda *args: loading.token_batches(*args, sequence_length=32)
    )
    command = ["bench_generate", "--dtype", "float32", "--prompt-length", "8", "--new-tokens", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--seconds", "0.2", "--output", str(output)])
    bench.main()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["model"], row["layers"]) for row in rows] == [
        ("dense", 6),
        ("pruned", 4),
        ("ghosted", 4),
    ]
    assert rows[0]["decode_ratio"] is None and rows[2]["decode_ratio"]["low"] > 0
    for row in rows:
        assert row["error_to_composition"] <= 1e-4
        assert row["decode_roof_share"] > 0
        assert "processor" in row["machine"]
