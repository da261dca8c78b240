"""Faults in the path of AMX."""

from __future__ import annotations

from mutants.mutant import Mutant

_FOLDER = "csrc/cpu/kernels/amx"
_TESTS = ("tests/amx_emulation/test_emulated_amx.py", "-k", "values_and_memory")


def _fault(name: str, file: str, old: str, new: str) -> Mutant:
    return Mutant(name, f"{_FOLDER}/{file}", old, new, _TESTS)


MUTANTS = (
    # Tiles.
    _fault("tiles never released", "tiles.h", "~Tiles() { tile_release(); }", "~Tiles() {}"),
    _fault(
        "tiles never configured",
        "tiles.h",
        "explicit Tiles(const TileConfig& config) { tile_configure(config); }",
        "explicit Tiles(const TileConfig&) {}",
    ),
    _fault(
        "configuration of the calls before kept",
        "ghost_stream.h",
        "  const TileConfig config = stream_tiles(rows, steps);",
        "  static const TileConfig config = stream_tiles(rows, steps);",
    ),
    _fault(
        "last inputs of a panel as a whole tile",
        "ghost_stream.h",
        "config.set(3, steps.rest, kAmxRowBytes);",
        "config.set(3, kAmxRows, kAmxRowBytes);",
    ),
    _fault(
        "second chain dropped",
        "ghost_stream.h",
        "load(sum + v) + load(sums[1] + row * kPanel + v)",
        "load(sum + v)",
    ),
    # Order and places.
    _fault(
        "pairs in the wrong order on one side",
        "gram_pack.h",
        "store_parts<kParts>(even, odd,",
        "store_parts<kParts>(kParts == 3 ? odd : even, kParts == 3 ? even : odd,",
    ),
    _fault(
        "left tiles not transposed",
        "gram_pack.h",
        "  transpose_16(pairs, to);\n",
        "  std::memcpy(to, pairs, kAmxDwords * sizeof(float));\n",
    ),
    _fault(
        "one step of a slab left out",
        "gram_pack.h",
        "return (tokens + kStepTokens - 1) / kStepTokens;",
        "return max64(1, tokens / kStepTokens);",
    ),
    _fault(
        "one tile further in the right pair",
        "gram_rows.h",
        "right + kParts * kHalfDwords, kAmxRowBytes",
        "right + kParts * kHalfDwords + kAmxDwords, kAmxRowBytes",
    ),
    _fault(
        "wrong tile multiplied",
        "gram_rows.h",
        "      tile_dot<1, 4, 7>();",
        "      tile_dot<1, 5, 7>();",
    ),
    _fault(
        "one tile further in the rows",
        "ghost_block.h",
        "product.lower = product.upper + product.steps * kRowTile;",
        "product.lower = product.upper + (product.steps - 1) * kRowTile;",
    ),
    _fault(
        "one row less between the tiles that are read in place",
        "ghost_block.h",
        "product.lower = product.upper + kAmxRows * size;",
        "product.lower = product.upper + (kAmxRows - 1) * size;",
    ),
    _fault(
        "panels over their end not copied",
        "ghost_block.h",
        "panels.panel_stride % kAmxDwords != 0",
        "false",
    ),
    # A weight as it lies.
    _fault(
        "the last step of an odd count left out",
        "ghost_unpacked.h",
        "for (; step < whole; ++step) {",
        "for (; step + 1 < whole; ++step) {",
    ),
    _fault(
        "even and odd steps with the same rows",
        "ghost_unpacked.h",
        "add_step<kGroups, 1>(x, step + 1);",
        "add_step<kGroups, 1>(x, step);",
    ),
    _fault(
        "second sum of a single group dropped",
        "ghost_unpacked.h",
        "load(sums + i) + load(sums + kAmxDwords + i)",
        "load(sums + i)",
    ),
    _fault(
        "last outputs read beyond the weight",
        "widened_tiles.h",
        "return min64(panel * kPanel, size - kPanel);",
        "return panel * kPanel;",
    ),
    _fault(
        "last outputs taken from those before",
        "ghost_unpacked.h",
        "by_row + row % kAmxRows * kPanel + out - first);",
        "by_row + row % kAmxRows * kPanel);",
    ),
    _fault(
        "last inputs left out where they are no whole tile",
        "ghost_unpacked.h",
        "  if (size % kTileInputs != 0) {\n",
        "  if (false) {\n",
    ),
    _fault(
        "last inputs beside those of the next row",
        "ghost_unpacked.h",
        "TileCopy(rows_ + input, size_, kPanel, size_ - input)",
        "TileCopy(rows_ + input, size_, kPanel, kTileInputs)",
    ),
    _fault(
        "rows beyond the last written",
        "ghost_unpacked.h",
        "row < min64(rows, (group + 1) * kAmxRows)",
        "row < (group + 1) * kAmxRows",
    ),
    _fault(
        "more groups of rows than there are kernels for",
        "ghost_unpacked.h",
        "      return apply_unpacked_groups<6, Weight>(epilogue, threads);",
        "      return apply_unpacked_groups<5, Weight>(epilogue, threads);",
    ),
    _fault(
        "int8 written over the tile that is wanted next",
        "widened_tiles.h",
        "kHeld = kAhead + 1;",
        "kHeld = kAhead;",
    ),
    _fault(
        "the first of two int8 written twice",
        "widened_tiles.h",
        "  const __m512i odd = _mm512_srai_epi32(words, 16);",
        "  const __m512i odd = even;",
    ),
    _fault(
        "int8 beyond the last inputs read",
        "widened_tiles.h",
        "static_cast<size_t>(min64(kTileInputs, inputs))",
        "static_cast<size_t>(kTileInputs)",
    ),
    _fault(
        "the panels after the first widened from its rows",
        "widened_tiles.h",
        "weight_ + first_output(size_, panel_) * size_;",
        "weight_ + first_output(size_, 0) * size_;",
    ),
    _fault(
        "rows beyond the last copied",
        "ghost_stream.h",
        "row < min64(kAmxRows, rows); ++row",
        "row < kAmxRows; ++row",
    ),
    # Digits.
    _fault(
        "digits in the wrong order",
        "../digits.h",
        "for (int64_t digit = kDigits - 1; digit >= 0; --digit) {",
        "for (int64_t digit = 0; digit < kDigits; ++digit) {",
    ),
    _fault(
        "second chain of int8 dropped",
        "ghost_int8.h",
        "(VecI)load(stored[0] + i) + (VecI)load(stored[1] + i)",
        "(VecI)load(stored[0] + i)",
    ),
    _fault(
        "end of the int8 weight not copied",
        "ghost_int8.h",
        "if (rows == kAmxRows && count == kByteInputs) return",
        "if (count == kByteInputs) return",
    ),
    # Sums.
    _fault(
        "sums of a row shared with the row before",
        "gram_rows.h",
        "float* sums = memory_ + (turn_ ^= 1) *",
        "float* sums = memory_ + (turn_ & 0) *",
    ),
    _fault(
        "upper triangle written",
        "gram_rows.h",
        "group_.is_gram ? first_row - column + 1 : into_.columns",
        "into_.columns",
    ),
    _fault(
        "the last rows under way forgotten",
        "gram_rows.h",
        "    flush();\n  }\n\n private:",
        "  }\n\n private:",
    ),
    _fault(
        "two parts in place of three", "gram_update.h", "&add_group<kSplitParts>;", "&add_group<2>;"
    ),
    _fault(
        "sums of the earlier passes dropped",
        "ghost_block.h",
        "const TileTurn turn{former_, pass == 0 ? nullptr : sums};",
        "const TileTurn turn{former_, nullptr};",
    ),
    _fault(
        "outputs of the last rows forgotten",
        "ghost_block.h",
        "    pending_.finish_rows(epilogue_, 0, 2 * kAmxRows);\n",
        "",
    ),
)
