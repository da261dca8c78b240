"""Operators of other codes made ghosted models: how they are read, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.errors import ArgumentError, SourceError
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.surgery.adopt.from_operators import import_ghosts
from ghosted_fast.surgery.adopt.operator_files import operators_of_gaps, read_operators
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model

SIZE = 32
REMOVED, GAPS = [1, 2, 4], [(1, 3), (4, 5)]
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2e-3}


def operator(seed: int = 0) -> Tensor:
    """Return W = I + M [d, d], fp64."""
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    return torch.eye(SIZE, dtype=torch.float64) + 0.3 * change / SIZE**0.5


@contextmanager
def standing_in(dense: Any, maps: dict[tuple[int, int], Tensor]) -> Iterator[None]:
    """Let W x in fp64 be what the layers of each gap return, by hooks on the dense model."""
    layers, entering, handles = decoder_layers(dense), {}, []

    def enter(start: int) -> Any:
        return lambda _, args: entering.__setitem__(start, args[0])

    def leave(start: int, matrix: Tensor) -> Any:
        return lambda _, __, y: (entering[start].double() @ matrix.T).to(y.dtype)

    for (start, stop), matrix in maps.items():
        handles.append(layers[start].register_forward_pre_hook(enter(start)))
        handles.append(layers[stop - 1].register_forward_hook(leave(start, matrix)))
    with torch.no_grad():
        yield
    for handle in handles:
        handle.remove()


def expected_logits(dense: Any, maps: dict[tuple[int, int], Tensor]) -> Tensor:
    with standing_in(dense, maps):
        output: Tensor = dense(random_tokens(2, 7), use_cache=False).logits
    return output


@torch.no_grad()
def logits(model: Any) -> Tensor:
    output: Tensor = model(random_tokens(2, 7)).logits
    return output


def stored(matrix: Tensor, form: str, layout: str) -> Tensor:
    """Return W as a code would store it."""
    if form == "delta":
        matrix = matrix - torch.eye(SIZE, dtype=matrix.dtype)
    return matrix.T.contiguous() if layout == "in-out" else matrix


def calm_model() -> Any:
    """Return a model whose layers change a token little, and in a way that is half linear."""
    model = tiny_model("opt")
    decoder = model.model.decoder
    with torch.no_grad():
        decoder.embed_tokens.weight.mul_(8.0)
        for layer in decoder.layers:
            layer.self_attn.out_proj.weight.mul_(0.2)
    return model


def fitted(dense: Any, gap: tuple[int, int]) -> Tensor:
    """Return the least-squares W [out, in] of a gap, fp64."""
    states: dict[int, Tensor] = {}
    layers = decoder_layers(dense)
    handles = [
        layers[gap[0]].register_forward_pre_hook(lambda _, args: states.update({0: args[0]})),
        layers[gap[1] - 1].register_forward_hook(lambda _, __, y: states.update({1: y})),
    ]
    with torch.no_grad():
        dense(random_tokens(16, 100, seed=5), use_cache=False)
    for handle in handles:
        handle.remove()
    x, y = (states[i].flatten(0, 1).double() for i in (0, 1))
    return torch.linalg.lstsq(x, y).solution.T


@pytest.mark.slow
@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("layout", ["out-in", "in-out"])
@pytest.mark.parametrize("form", ["full", "delta"])
def test_outputs_agree(form: Any, layout: Any, dtype: torch.dtype, kept: torch.dtype) -> None:
    dense = tiny_model("llama", dtype=dtype)
    given = {start: stored(operator(start), form, layout).to(kept) for start, _ in GAPS}
    smaller, report = import_ghosts(dense, given, REMOVED, form=form, layout=layout)
    assert (report.form, report.layout, report.distances) == (form, layout, {})
    assert report.keys == [["1"], ["4"]]
    maps = {}
    for index, (start, stop) in enumerate(GAPS):
        exact = given[start].double().T if layout == "in-out" else given[start].double()
        if form == "delta":
            exact = exact + torch.eye(SIZE, dtype=torch.float64)
        maps[start, stop] = exact
        ghost = decoder_layers(smaller)[index].ghost
        x = torch.randn(100, SIZE).to(dtype)
        with torch.no_grad():
            assert relative_rms(ghost(x), x.double() @ exact.T) <= BOUNDS[dtype]
    error = relative_rms(logits(smaller), expected_logits(dense, maps))
    assert error < (1e-5 if dtype == torch.float32 else 3e-2)
    assert len(decoder_layers(smaller)) == 3
    assert len(decoder_layers(dense)) == 6


@pytest.mark.parametrize("layout", ["out-in", "in-out"])
@pytest.mark.parametrize("form", ["full", "delta"])
def test_how_operators_are_meant_is_measured(form: str, layout: str) -> None:
    dense = calm_model()
    given = [stored(fitted(dense, gap), form, layout).float() for gap in GAPS]
    _, report = import_ghosts(dense, given, REMOVED)
    assert (report.form, report.layout) == (form, layout)
    assert len(report.distances) == 4
    apart = [
        import_ghosts(dense, [matrix], range(*gap))[1].distances
        for matrix, gap in zip(given, GAPS, strict=True)
    ]
    for text, distance in report.distances.items():
        assert abs(distance**2 / (apart[0][text] * apart[1][text]) - 1) < 1e-6
    _, told = import_ghosts(dense, given, REMOVED, layout=layout)  # type: ignore[arg-type]
    assert told.form == form
    assert len(told.distances) == 2


def test_what_cannot_be_told_is_asked() -> None:
    dense = tiny_model("llama")
    with pytest.raises(ArgumentError, match=r"distances y = .*: tell the .*(form|layout)"):
        import_ghosts(dense, [operator(1), operator(4)], REMOVED)


def test_a_symmetric_operator_has_one_layout() -> None:
    dense = calm_model()
    matrix = fitted(dense, (1, 3))
    _, report = import_ghosts(dense, [(matrix + matrix.T) / 2], [1, 2])
    assert (report.form, report.layout) == ("full", "out-in")
    assert len(report.distances) == 2


def test_one_operator_for_each_removed_layer() -> None:
    dense = tiny_model("llama")
    given = {f"patch_{rank}": operator(layer) for rank, layer in enumerate(REMOVED)}
    smaller, report = import_ghosts(dense, given, REMOVED, form="full", layout="out-in")
    assert report.keys == [["patch_0", "patch_1"], ["patch_2"]]
    maps = {(1, 3): operator(2) @ operator(1), (4, 5): operator(4)}
    assert relative_rms(logits(smaller), expected_logits(dense, maps)) < 1e-5


def test_a_state_dict_of_the_whole_model_saves_and_loads(tmp_path: Path) -> None:
    """The published code keeps its operators as children of the layers that it hooks."""
    dense = tiny_model("llama")
    state = {**dense.state_dict(), "model.layers.0.ghosted_layer.weight": operator(1).T.float(),
             "model.layers.0.ghosted_layer.bias": torch.full((SIZE,), 0.5)}  # fmt: skip
    torch.save(state, tmp_path / "pruned.pt")
    smaller, _ = import_ghosts(dense, tmp_path / "pruned.pt", [1, 2], form="full", layout="in-out")
    save_model(smaller, tmp_path / "smaller")
    with pytest.raises(ArgumentError, match="pass overwrite=True"):
        save_model(smaller, tmp_path / "smaller")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    ghost = loaded.model.layers[0].ghost
    assert relative_rms(ghost.weight, operator(1) - torch.eye(SIZE)) < 1e-6
    assert torch.equal(ghost.bias, torch.full((SIZE,), 0.5))
    assert torch.equal(logits(loaded), logits(smaller))
    card = (tmp_path / "smaller" / "README.md").read_text(encoding="utf-8")
    assert "fitted by another code, and imported" in card
    with pytest.raises(SourceError, match="is a ghosted model already"):
        read_operators(tmp_path / "smaller")
    with pytest.raises(ArgumentError, match="expected the dense model"):
        import_ghosts(loaded, [operator()], [1])


def test_gaps_at_both_ends() -> None:
    dense = tiny_model("llama")
    given = {"first": operator(1), "last": operator(2)}
    with pytest.raises(ArgumentError, match=r"first removed layers \(0, 5\), .* or 0 to 1, got"):
        import_ghosts(dense, given, [0, 5], form="full", layout="out-in")
    smaller, _ = import_ghosts(dense, list(given.values()), [0, 5], form="full", layout="out-in")
    maps = {(0, 1): operator(1), (5, 6): operator(2)}
    assert relative_rms(logits(smaller), expected_logits(dense, maps)) < 1e-5


@pytest.mark.parametrize(
    "keys",
    [
        ["0", "1"],
        ["g1.weight", "g2.weight"],
        ["start_3", "start_7"],
        ["3-6", "7-8"],
        ["layers.2.w", "layers.6.w"],
        ["model.layers.2.ghosted_layer.weight", "model.layers.3.ghosted_layer.weight"],
        ["layers.3.ghosted_layer_0.weight", "layers.4.ghosted_layer_1.weight"],
        ["end 6", "end 8"],
    ],
)
def test_ways_to_number_gaps(keys: list[str]) -> None:
    tensors = {keys[1]: operator(1), keys[0]: operator(0)}
    found = operators_of_gaps(tensors, SIZE, [(3, 6), (7, 8)])
    assert [[item.key for item in group] for group in found] == [[keys[0]], [keys[1]]]


def test_a_single_operator_is_not_put_where_its_path_denies_it() -> None:
    for key in ("w", "llama3_w", "ghosts.0.weight", "layers.2.w", "layers.3.w", "3"):
        assert operators_of_gaps({key: operator()}, SIZE, [(3, 6)])[0][0].key == key
    with pytest.raises(ArgumentError, match=r"layers \(3\), the layers beside .* 'layers.9.w'"):
        operators_of_gaps({"layers.9.w": operator()}, SIZE, [(3, 6)])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"3": operator()},
            r"gaps \[\(3, 6\), \(7, 8\)\], or .* the 4 removed layers, got 1: '3'",
        ),
        ({}, "got 0: none"),
        ({"3": operator(), "9": operator()}, r"first removed layers \(3, 7\), .* 0 to 1, got"),
        ({"a": operator(), "b": operator()}, "keys whose numbers tell the places"),
        ({"0.1": operator(), "1.0": operator()}, "whose numbers tell two"),
        ({"3": operator(), "7": operator()[:8, :8]}, r"\[32, 32\].*got '7' \[8, 8\], which is no"),
        ({"3": operator(), "7": operator(), "scale": torch.ones(SIZE)}, r"got 'scale' \[32\]"),
        ({"3": operator(), "7": operator() / 0.0}, "NaN or infinity in '7'"),
        ({"3": operator(), "7": operator().to(torch.int8)}, "got '7' torch.int8"),
    ],
)
def test_what_does_not_fit_is_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        operators_of_gaps(tensors, SIZE, [(3, 6), (7, 8)])


def test_arguments_are_checked() -> None:
    dense = tiny_model("llama")
    with pytest.raises(ArgumentError, match="expected form to be auto, full or delta, got 'W'"):
        import_ghosts(dense, [operator()], [1], form="W")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="expected layout to be auto, out-in or in-out"):
        import_ghosts(dense, [operator()], [1], layout="T")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"expected layers in 0..5"):
        import_ghosts(dense, [operator()], [6])
    with pytest.raises(TypeError, match="operators as tensors, got float"):
        import_ghosts(dense, [1.0], [1])  # type: ignore[list-item]


def test_files_of_every_kind(tmp_path: Path) -> None:
    matrix = operator().float()
    torch.save(matrix, tmp_path / "bare.pt")
    assert list(read_operators(tmp_path / "bare.pt")) == [""]
    torch.save(
        {"ghosts": {(3, 6): matrix, 7: torch.nn.Parameter(matrix)}, "n": 2}, tmp_path / "a.pth"
    )
    assert list(read_operators(tmp_path / "a.pth")) == ["ghosts.3-6", "ghosts.7"]
    torch.save([matrix, matrix], tmp_path / "list.bin")
    assert list(read_operators(tmp_path / "list.bin")) == ["0", "1"]
    save_file({"w": matrix}, tmp_path / "w.safetensors")
    assert torch.equal(read_operators(tmp_path / "w.safetensors")["w"], matrix)


def test_files_of_a_folder(tmp_path: Path) -> None:
    for folder, key in (("apart", "weight"), ("joined", None)):
        (tmp_path / folder).mkdir()
        for gap in (3, 7):
            name = tmp_path / folder / f"gap_{gap}.safetensors"
            save_file({key or f"w{gap}": operator().float()}, name)
    (tmp_path / "apart" / "notes.txt").write_text("not a tensor")
    (tmp_path / "apart" / "config.json").write_text("not JSON either")
    assert list(read_operators(tmp_path / "apart")) == ["gap_3.weight", "gap_7.weight"]
    assert list(read_operators(tmp_path / "joined")) == ["w3", "w7"]
    torch.save(operator(), tmp_path / "joined" / "x_9.pt")
    assert list(read_operators(tmp_path / "joined")) == ["gap_3.w3", "gap_7.w7", "x_9"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no file or folder of operators"):
        read_operators(tmp_path / "nothing")
    with pytest.raises(SourceError, match="found none"):
        read_operators(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(SourceError, match=r"file, got 'text.txt'"):
        read_operators(tmp_path / "text.txt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(SourceError, match=r"as tensors .*: save a dict of plain tensors"):
        read_operators(tmp_path / "module.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"12345")
    with pytest.raises(SourceError, match=r"cannot read 'cut.safetensors'"):
        read_operators(tmp_path / "cut.safetensors")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(SourceError, match=r"expected tensors in 'empty.pt', found none"):
        read_operators(tmp_path / "empty.pt")
