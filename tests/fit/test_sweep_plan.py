"""What a sweep takes, computed before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.swept_models import ask_for_a_tied_head, saved

from ghosted_fast.errors import CalibrationError
from ghosted_fast.fit.sweep.correcting import Correcting
from ghosted_fast.fit.sweep.heats import Heats, heat_ends
from ghosted_fast.fit.sweep.plan import (
    PROGRAM_BYTES,
    Work,
    plan_sweep,
    resident_bytes,
)
from ghosted_fast.fit.sweep.shape import Shape
from ghosted_fast.fit.sweep.tokens import held_out_tokens, tokens_of
from ghosted_fast.fit.sweep.trying import Trying
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.options import GhostOptions
from ghosted_fast.testing import random_tokens
from ghosted_fast.text.batches import Batch, iterate_batches

OPTIONS, CPU = GhostOptions(), torch.device("cpu")
BIG = Shape(
    hidden_size=4096,
    num_layers=32,
    vocabulary=128256,
    itemsize=2,
    layer_bytes=436_000_000,
    layer_parameters=218_000_000,
    all_bytes=16_000_000_000,
    beside=(1_050_000_000, 1_050_000_000),
    on_device=(436_000_000, 0),
)
WORK = Work(
    tokens=32768,
    batch_tokens=4096,
    row_tokens=512,
    heats=Heats((8192,)),
    candidates=25,
    length=8,
    statistics=26,
    boundaries=33,
)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_sizes_are_those_of_the_model(tmp_path: Path, family: str) -> None:
    model = saved(tmp_path, family, torch.bfloat16)
    shape = Shape.of(open_unloaded(tmp_path))
    layers = Decoder.of(model).layers
    parts = [sum(weight.nbytes for weight in layer.parameters()) for layer in layers]
    assert shape.layer_bytes == max(parts) * (2 if family == "mixtral" else 1)
    assert shape.layer_parameters == max(parts) // 2
    every = sum(p.nbytes for p in model.parameters())
    assert shape.all_bytes == every
    head = model.get_output_embeddings().weight.nbytes
    embedding = model.get_input_embeddings().weight.nbytes
    beside = every - sum(parts)
    assert shape.beside == (beside - head, beside - embedding)


def test_two_values_are_counted_as_two_whatever_the_configuration_ties(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    expected = Shape.of(open_unloaded(tmp_path))
    ask_for_a_tied_head(tmp_path)
    assert Shape.of(open_unloaded(tmp_path)) == expected


def test_weights_of_two_names_are_counted_once(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.config.save_pretrained(tmp_path)
    for path in tmp_path.glob("model*"):
        path.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    shape = Shape.of(open_unloaded(tmp_path))
    assert shape.all_bytes == sum(p.nbytes for p in model.parameters())
    beside = shape.all_bytes - 6 * shape.layer_bytes
    assert shape.beside == (beside, beside)


def test_an_8b_is_swept_within_7_gigabytes() -> None:
    plan = plan_sweep(BIG, WORK, OPTIONS, 7 * 10**9)
    assert plan.memory_bytes < 4 * 10**9
    assert plan.prefetch
    state = 32768 * 4096 * 2
    # Of 25 candidates those below a layer stay in files until all are above.
    assert plan.disk_bytes == 33 * state + 2 * 25 * 8192 * 4096 * 2
    in_memory = plan_sweep(BIG, WORK, OPTIONS, 20 * 10**9)
    more = in_memory.memory_bytes - plan.memory_bytes
    assert more == 33 * state + 26 * 8192 * 4096 * 2
    assert plan.read_bytes == pytest.approx(BIG.all_bytes + 1_050_000_000)
    assert plan.resident_bytes == resident_bytes(BIG, WORK, OPTIONS) > BIG.all_bytes
    assert 5e14 < plan.operations < 5e15


def test_a_device_has_two_layers_and_the_host_the_states() -> None:
    plan = plan_sweep(BIG, WORK, OPTIONS, 20 * 10**9, device_memory=7 * 10**9)
    batch = 4096 * 4096 * 2
    assert plan.prefetch and plan.disk_bytes == 0
    plain = plan_sweep(BIG, WORK, OPTIONS, 7 * 10**9)
    assert plan.device_bytes == pytest.approx(plain.memory_bytes, rel=0.3)
    without = plan_sweep(
        replace(BIG, on_device=(0, 0)), WORK, OPTIONS, 10**11, device_memory=10**10
    )
    assert plan.device_bytes - without.device_bytes == 2 * 436_000_000
    made = replace(BIG, on_device=(436_000_000, 3 * 10**9))
    converted = plan_sweep(made, WORK, OPTIONS, 10**11, device_memory=10**10)
    assert converted.device_bytes - plan.device_bytes > 10**9
    # A layer in page-locked memory, what stands beside layers, the program, some batches.
    host = PROGRAM_BYTES + (1 << 29) + 1_050_000_000 + 7 * batch
    states = plan_sweep(BIG, WORK, OPTIONS, 10**11).memory_bytes - plain.memory_bytes
    assert states > 10**10 and plan.memory_bytes == host + states
    on_disk = plan_sweep(BIG, WORK, OPTIONS, 3 * 10**9, device_memory=7 * 10**9)
    assert (on_disk.memory_bytes, on_disk.disk_bytes) == (host, plain.disk_bytes)
    one = plan_sweep(BIG, WORK, OPTIONS, 3 * 10**9, device_memory=plan.device_bytes - 1)
    assert not one.prefetch and plan.device_bytes - one.device_bytes == 436_000_000


def test_states_stay_in_memory_where_they_fit_and_are_not_asked_elsewhere() -> None:
    plan = plan_sweep(BIG, WORK, OPTIONS, 20 * 10**9)
    assert plan.disk_bytes == 0
    assert plan.memory_bytes > 10**10
    assert plan_sweep(BIG, WORK, OPTIONS, 20 * 10**9, on_disk=True).disk_bytes > 10**10


def test_the_next_layer_waits_where_two_do_not_fit() -> None:
    shape = replace(BIG, layer_bytes=3 * 10**9)
    assert not plan_sweep(shape, WORK, OPTIONS, 5 * 10**9).prefetch
    with pytest.raises(CalibrationError, match=r"largest layer has 3\.0 GB"):
        plan_sweep(shape, WORK, OPTIONS, 3 * 10**9)


def test_states_that_are_kept_between_gaps_are_counted() -> None:
    one = replace(WORK, candidates=0, heats=Heats((0,)), statistics=3)
    three = replace(one, in_sequence=3)
    state = 32768 * 4096 * 2
    assert resident_bytes(BIG, three, OPTIONS) - resident_bytes(BIG, one, OPTIONS) == 2 * state
    one, three = (replace(work, tokens=10 * work.tokens) for work in (one, three))
    more = resident_bytes(BIG, three, OPTIONS) - resident_bytes(BIG, one, OPTIONS)
    assert more == 1 << 31, "what does not fit begins at the bottom again"
    one, three = (plan_sweep(BIG, work, OPTIONS, 7 * 10**9) for work in (one, three))
    assert three.disk_bytes - one.disk_bytes == 3 * 10 * state


def test_corrections_are_counted() -> None:
    correcting = Correcting(
        steps=8, ghosts=1, layers=24, tokens=8192, judged=4096, pass_tokens=1024
    )
    work = replace(WORK, correcting=correcting)
    plain, plan = (plan_sweep(BIG, item, OPTIONS, 7 * 10**9) for item in (WORK, work))
    state, square = 4096 * 2, 4096 * 4096
    # What enters each layer, the ghost's output, and gradients below and above a layer; the steps.
    assert plan.disk_bytes - plain.disk_bytes == 8192 * 27 * state + 3 * square * (2 + 8)
    layer = (BIG.all_bytes - BIG.beside[0]) // 32
    assert min(layer, BIG.layer_bytes) == BIG.layer_bytes
    each = 4 * 24 * BIG.layer_bytes + 4 * 1_050_000_000
    assert plan.correction_bytes == each
    assert plan.read_bytes - plain.read_bytes == 8 * each
    assert (plain.corrections, plan.corrections) == (0, 8)
    assert plan.resident_bytes == plain.resident_bytes
    # Two layers, twelve matrices, and three times what a pass takes where nothing is kept.
    vectors = 4 + BIG.layer_parameters / square
    most = 2 * BIG.layer_bytes + 12 * 8 * square + 3 * int(1024 * state * vectors)
    assert plan.memory_bytes >= PROGRAM_BYTES + most
    assert plan.memory_bytes < 5 * 10**9
    assert 1.5 < plan.operations / plain.operations < 4
    two = replace(work, correcting=replace(correcting, ghosts=2))
    more = plan_sweep(BIG, two, OPTIONS, 7 * 10**9)
    assert more.memory_bytes > plan.memory_bytes and more.disk_bytes > plan.disk_bytes
    with pytest.raises(CalibrationError, match="make no corrections"):
        plan_sweep(BIG, work, OPTIONS, plain.memory_bytes - 1)


def test_numbers_that_are_tried_are_counted() -> None:
    ways = ((1,), (1, 2), (1, 2, 4, 3), (1, 2, 4, 8, 6, 7))
    trying = Trying(ways, every_interval=True, in_pieces=False, tokens=32768, heats=WORK.heats)
    chosen = replace(WORK, candidates=0, heats=Heats((0,)), statistics=1)
    work = replace(chosen, trying=trying)
    plain, plan = (plan_sweep(BIG, item, OPTIONS, 7 * 10**9) for item in (chosen, work))
    state, square = 4096 * 2, 4096 * 4096
    # All 32 intervals of one layer ride.
    assert plan.disk_bytes - plain.disk_bytes == 2 * 32 * 8192 * state
    kept = sum(32 - count for count in ways[-1])
    assert plan.read_bytes - plain.read_bytes == kept * BIG.layer_bytes + 6 * 1_050_000_000
    assert (plain.numbers_tried, plan.numbers_tried) == (0, 6)
    candidates = sum(33 - count for count in ways[-1])
    riding = sum((33 - count) * (32 - count) / 2 for count in ways[-1]) * 8192
    expected = 2.0 * BIG.layer_parameters * riding + 2.0 * 128256 * 4096 * 8192 * candidates
    expected += 4.0 * square * 32768 * candidates + 20.0 * square * 4096 * candidates
    assert plan.operations - plain.operations == pytest.approx(expected)
    assert plan.memory_bytes >= PROGRAM_BYTES + BIG.beside[1] + 2 * 512 * 128256 * 2
    pieces = replace(trying, every_interval=False, in_pieces=True)
    plan = plan_sweep(BIG, replace(chosen, trying=pieces), OPTIONS, 7 * 10**9)
    assert plan.disk_bytes - plain.disk_bytes == 2 * 8192 * state + 3 * 32768 * state
    text = sum((32 - count) * 32768 for count in ways[-1] if count > 1)
    layers = 2.0 * BIG.layer_parameters * (text + kept * 8192)
    assert layers < plan.operations - plain.operations < 1.3 * layers


def test_layers_between_gaps_are_read_again() -> None:
    one = replace(WORK, candidates=0, heats=Heats((0,)), statistics=3)
    plans = [plan_sweep(BIG, replace(one, in_sequence=gaps), OPTIONS, 7 * 10**9) for gaps in (1, 3)]
    assert plans[1].read_bytes - plans[0].read_bytes == (32 - 3) * BIG.layer_bytes


def test_a_solve_of_a_correction_is_counted() -> None:
    """In a model of small layers and few words it is what takes the most."""
    small = replace(BIG, layer_bytes=1, layer_parameters=1, vocabulary=10, beside=(1, 1))
    correcting = Correcting(steps=1, ghosts=1, layers=1, tokens=8, judged=8, pass_tokens=8)
    few = {"tokens": 8, "batch_tokens": 8, "row_tokens": 8, "candidates": 0}
    work = replace(WORK, **few, statistics=0, correcting=correcting)
    square, two_folds = 8 * 4096 * 4096, GhostOptions(folds=2)
    with_it = plan_sweep(small, work, two_folds, 7 * 10**9)
    assert with_it.memory_bytes >= PROGRAM_BYTES + (12 + 8) * square
    without = replace(work, correcting=None)
    assert plan_sweep(small, without, two_folds, 7 * 10**9).memory_bytes < with_it.memory_bytes


def test_tokens_of_steps_and_of_judges() -> None:
    mask = torch.ones(4, 48, dtype=torch.int64)
    mask[:, :24] = 0
    padded = list(iterate_batches([{"input_ids": random_tokens(4, 48), "attention_mask": mask}]))
    assert tokens_of(padded, 48) == 2 * 48
    assert tokens_of(padded, 10**6) == 4 * 48
    assert held_out_tokens(padded) == 24
    empty = torch.empty(9, 32, dtype=torch.int64, device="meta")
    assert tokens_of([Batch(empty, empty)], 100) == 4 * 32
    assert held_out_tokens([Batch(empty, empty)]) == 2 * 32
    assert tokens_of([], 10) == held_out_tokens([]) == 0


def test_work_is_counted() -> None:
    batches = list(iterate_batches([random_tokens(4, 48), random_tokens(2, 64)]))
    shape = replace(BIG, num_layers=6)
    heats = Heats((64, 64))
    chosen = Work.of(batches, shape, 2, heats)
    assert (chosen.tokens, chosen.batch_tokens, chosen.row_tokens) == (320, 192, 64)
    assert (chosen.candidates, chosen.statistics, chosen.heats) == (5, 6, heats)
    assert chosen.in_sequence == 1
    assert Work.of(batches, shape, 2, heats, 3, in_sequence=True).in_sequence == 1
    assert Work.of(batches, shape, None, heats, 3, in_sequence=True).in_sequence == 3
    given = Work.of(batches, shape, None, heats, gaps=3)
    assert given.in_sequence == 1
    assert (given.candidates, given.statistics) == (0, 3)


def test_heats_are_counted() -> None:
    one, three = WORK, replace(WORK, heats=Heats((512, 1536, 6144)))
    plans = [plan_sweep(BIG, work, OPTIONS, 7 * 10**9) for work in (one, three)]
    # Each reads the 24 layers above the lowest gap and the head again.
    assert plans[1].read_bytes - plans[0].read_bytes == 2 * (24 * BIG.layer_bytes + BIG.beside[1])
    assert plans[1].disk_bytes == plans[0].disk_bytes
    assert plans[1].memory_bytes == plans[0].memory_bytes
    # 25 candidates, about 6 and 3 of them.
    spared = 25 * 8192 - (25 * 512 + 6 * 1536 + 3 * 6144)
    each = 2.0 * BIG.layer_parameters * 24 / 2 + 2.0 * 128256 * 4096
    assert plans[0].operations - plans[1].operations == pytest.approx(spared * each)
    ways = ((1,), (1, 2))
    trying = Trying(ways, every_interval=True, in_pieces=False, tokens=32768, heats=three.heats)
    chosen = replace(WORK, candidates=0, trying=trying)
    plan = plan_sweep(BIG, chosen, OPTIONS, 7 * 10**9)
    without = plan_sweep(BIG, replace(chosen, trying=None), OPTIONS, 7 * 10**9)
    kept = 3 * (31 + 30) * BIG.layer_bytes + 3 * 2 * BIG.beside[1]
    assert plan.read_bytes - without.read_bytes == kept


def test_heats_of_a_text() -> None:
    batches = [Batch(*2 * [torch.empty(8, 512, dtype=torch.int64, device="meta")])] * 8
    assert Heats.of(batches, 8192, CPU) == Heats((512, 512, 1024, 2048, 4096))
    assert Heats.of(batches, 8192, None) == Heats((8192,))
    assert Heats.of(batches, 256, CPU) == Heats((512,))
    assert Heats.of(batches, 1024, CPU) == Heats((512, 512))
    assert Heats.of(batches, 6144, CPU) == Heats((512, 512, 1024, 2048, 2048))
    assert Heats.of(batches, 8192, torch.device("cuda")) == Heats((8192,))
    assert Heats.of([], 8192, CPU) == Heats((0,))
    # Two sequences of 200 tokens have 256 that are predicted.
    assert heat_ends([200] * 17, CPU) == [2, 4, 8, 17]
    assert heat_ends([0, 1, 300], CPU) == [3]
