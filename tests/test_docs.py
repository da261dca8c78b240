"""The pages are what their program writes, their links lead somewhere, and the README is short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "benchmarks" / "results" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(r"<!-- begin: ([\w-]+) -->\n.*?<!-- end: \1 -->", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"""\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)\"""")


def words_of(page: Path) -> str:
    return CODE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return what a page's headings are called in links."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings}


@pytest.mark.slow
def test_what_is_generated_is_up_to_date() -> None:
    command = [sys.executable, "-m", "docs.generate", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for match in LINK.finditer(words_of(page)):
        link = match[1] or match[2]
        if re.match(r"\w+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_linked_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {match[1] for match in LINK.finditer(words_of(index))}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md", "api.md"}
    assert not pages - linked


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1200


def test_no_table_of_figures_is_written_by_hand_in_the_readme() -> None:
    text = BLOCK.sub("", (ROOT / "README.md").read_text(encoding="utf-8"))
    rows = [line for line in CODE.sub("", text).splitlines() if line.startswith("|")]
    assert not [row for row in rows if re.search(r"\d", row)]


def test_families_that_count_are_served_or_refused_with_a_reason() -> None:
    from docs.generate.engines import COUNTED, architecture
    from ghosted_fast.export import gguf
    from ghosted_fast.serving import vllm

    kinds = {kind for group in COUNTED.values() for kind in group}
    served = {*vllm.NATIVE, *vllm.THROUGH_TRANSFORMERS}
    assert {architecture(kind) for kind in kinds} <= served | set(vllm.REFUSED)
    assert not served & set(vllm.REFUSED)
    assert set(vllm.NOTES) | set(vllm.WHOLE) <= set(vllm.NATIVE)
    assert kinds <= set(gguf.FAMILIES) | set(gguf.REFUSED)
    assert not set(gguf.FAMILIES) & set(gguf.REFUSED)
