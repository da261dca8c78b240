"""The page of all results: it holds every row, needs nothing else, and shows what is asked for."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import Any

import pytest
from support.html_balance import Balance

from docs.generate.explorer import explore_page
from docs.generate.results import RESULTS
from ghosted_fast.facts import named_layers

Row = tuple[str, ...]


class Rows(HTMLParser):
    """Collects the table's rows and the form's options."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, str]] = []
        self.cells: list[list[str]] = []
        self.bars: list[float] = []
        self.options: dict[str, list[str]] = {}
        self._select = ""
        self._in_row = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = dict(attrs)
        if tag == "tr" and "data-model" in found:
            self.rows.append(found)
            self.cells.append([])
            self._in_row = True
        elif tag == "i":
            self.bars.append(float(found["style"].removeprefix("width: ").rstrip("%")))
        elif tag == "select":
            self._select = found["name"]
            self.options[self._select] = []
        elif tag == "option":
            self.options[self._select].append(found["value"])

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self._in_row = False

    def handle_data(self, data: str) -> None:
        if self._in_row and data.strip():
            self.cells[-1].append(data.strip())


def expected() -> list[Row]:
    """Return model, size, text and what the cells say of every row, from the results."""
    found = []
    for folder in ("smollm2", "gemma3"):
        path = RESULTS / "recovery" / folder / "results.json"
        grid = json.loads(path.read_text(encoding="utf-8"))
        for row in grid["rows"]:
            for text, dense in grid["dense"]["perplexity"].items():
                if row["perplexity"] is not None:
                    ratio = row["perplexity"][text]["value"] / dense["value"]
                    pair = f"{row['criterion']} + {row['recovery']}"
                    model, size = grid["about"]["model"], str(row["remove"])
                    small = f"{model} without {named_layers(row['removed'])}, {text}"
                    seconds = sum(row["seconds"][part] for part in ("select", "recover"))
                    cost = f"{seconds:,.0f}", f"{row['peak_memory'] / 1e9:.1f} GB"
                    found.append((model, size, text, pair, small, f"{ratio:.2f}x", *cost))
    return found


def test_every_row_is_there_and_can_be_filtered_for() -> None:
    page = Rows()
    page.feed(explore_page())
    shown = [
        (row["data-model"], row["data-size"], row["data-text"], *cells)
        for row, cells in zip(page.rows, page.cells, strict=True)
    ]
    assert sorted(shown) == sorted(expected()) and len(shown) > 300
    for place, name in enumerate(("model", "size", "text")):
        assert set(page.options[name]) == {"", *(row[place] for row in expected())}
    ours = {cells[0] for row, cells in zip(page.rows, page.cells, strict=True) if "class" in row}
    assert "ghost + ghost + corrections" in ours and "streamline + ghost-paper" not in ours


def test_the_best_stand_first_and_bars_are_as_long_as_what_is_lost() -> None:
    page = Rows()
    page.feed(explore_page())
    groups: dict[Row, list[float]] = {}
    for row, cells, bar in zip(page.rows, page.cells, page.bars, strict=True):
        value = float(cells[2].rstrip("x"))
        groups.setdefault((row["data-model"], row["data-size"], row["data-text"]), []).append(value)
        # Full at 4x; the perplexity is shown to 0.01, the bar to one hundredth of its length.
        assert bar == pytest.approx(100 * min(math.log(value) / math.log(4.0), 1.0), abs=0.9)
    assert len(groups) > 10
    assert all(values == sorted(values) for values in groups.values())


def test_it_is_whole_and_needs_nothing_else() -> None:
    page = explore_page()
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert not re.findall(r"""\b(?:src|href)=|url\(|@import|https?://""", page)
    assert '<meta name="viewport" content="width=device-width' in page
    assert "prefers-color-scheme: dark" in page and "max-width: 40rem" in page


# What the script asks of a browser, and no more.
BROWSER = """
const element = (data) => ({ dataset: data, hidden: false });
const rows = ROWS.map(element), output = {}, listeners = {};
const selects = Object.entries(OPTIONS).map(([name, values]) =>
  ({ name, value: FIRST[name], options: values.map((value) => ({ value })) }));
const elements = [...selects, { name: "" }];
for (const item of selects) elements[item.name] = item;
const form = { elements, addEventListener: (kind, call) => { listeners[kind] = call; } };
globalThis.document = {
  querySelector: (name) => ({ form, output })[name], querySelectorAll: () => rows };
globalThis.location = { hash: HASH };
globalThis.history = { replaceState: (a, b, hash) => { location.hash = hash; } };
eval(SCRIPT);
for (const [name, value] of CHANGES) {
  elements[name].value = value;
  listeners.input({ target: elements[name] });
}
const seen = rows.map((row, index) => [row, index]).filter(([row]) => !row.hidden);
console.log(JSON.stringify([seen.map(([_, index]) => index), output.textContent, location.hash]));
"""


def shown(changes: list[tuple[str, str]], place: str = "") -> tuple[list[dict], str, str]:
    """Run the page's script, make changes in its form, and return the rows that are left."""
    page, source = Rows(), explore_page()
    page.feed(source)
    data = [{key[5:]: row[key] for key in row if key.startswith("data-")} for row in page.rows]
    first = re.findall(r'<select name="(\w+)">.*?value="([^"]+)" selected', source)
    names = {
        "ROWS": data, "OPTIONS": page.options, "FIRST": dict(first), "HASH": place,
        "SCRIPT": re.findall(r"<script>(.*?)</script>", source, re.DOTALL)[0], "CHANGES": changes,
    }  # fmt: skip
    program = "".join(f"const {key} = {json.dumps(value)};\n" for key, value in names.items())
    done = subprocess.run(
        ["node", "-e", program + BROWSER], capture_output=True, text=True, check=True
    )
    indices, said, end = json.loads(done.stdout)
    return [data[index] for index in indices], said, end


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script")
@pytest.mark.parametrize(
    ("changes", "place", "kept"),
    [
        ([], "", {"model": "SmolLM2-135M-Instruct", "size": "5", "text": "Wikipedia"}),
        ([("text", "")], "", {"model": "SmolLM2-135M-Instruct", "size": "5"}),
        # Gemma lost no five layers: the model that was chosen stays, the number gives way.
        ([("model", "Gemma 3 270M")], "", {"model": "Gemma 3 270M", "text": "Wikipedia"}),
        ([("size", ""), ("text", ""), ("model", "")], "", {}),
        ([], "#model=Gemma+3+270M&size=4&text=stories&other=1",
         {"model": "Gemma 3 270M", "size": "4", "text": "stories"}),
        ([], "#size=99", {"model": "SmolLM2-135M-Instruct", "size": "5", "text": "Wikipedia"}),
    ],
)  # fmt: skip
def test_the_script_shows_what_is_asked_for(
    changes: list[tuple[str, str]], place: str, kept: dict[str, str]
) -> None:
    rows, said, end = shown(changes, place)
    wanted = [
        row
        for row in expected()
        if all(dict(zip(("model", "size", "text"), row, strict=False))[k] == v
               for k, v in kept.items())
    ]  # fmt: skip
    assert len(rows) == len(wanted) > 0
    assert all(row[key] == value for row in rows for key, value in kept.items())
    assert said == f"{len(wanted)} of {len(expected())} rows"
    assert shown([], end)[0] == rows  # a link to what is shown
