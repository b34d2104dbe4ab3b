"""The documentation does what it says: its Python blocks run, and the files and names that it points to exist.

A fenced block in docs/*.md says in its first line where it runs: ``python cpu`` (a doctest session, run here), ``python
gpu`` (the same, with the marker gpu), ``python sketch`` (a fragment that must only compile); ``continued`` goes on with
the names of the block before it. A pointer into the code is written ``engine/batch.py::build_batch``: a file, counted
from the repository, cupyinfer/, rawkernels/, tests/ or docs/, and a name in it.
"""

from __future__ import annotations

import ast
import doctest
import importlib.util
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import pytest

from cupyinfer import env
from cupyinfer.config import EngineConfig
from cupyinfer.model.families import FAMILIES
from cupyinfer.model.presets import PRESETS
from cupyinfer.ops.attention import HEAD_DIMS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FOLDERS = (ROOT, ROOT / "cupyinfer", ROOT / "rawkernels", ROOT / "tests", DOCS)
PAGES = sorted(DOCS.glob("*.md"))
WRITTEN = ("README.md", "architecture.md", "kernels.md", "life-of-a-request.md", "models.md", "toolkit.md")
MEASURED = ("gpu-report.md", "performance-log.md")  # written where a GPU is; a checkout may be without them
KINDS = ("cpu", "gpu", "sketch")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_POINTER = re.compile(r"`([\w./-]*[\w-]\.(?:py|cu|cuh|svg|md|toml))(?:::([\w.]+))?`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass
class Block:
    """Python of one page, with ``line`` empty lines before it so that failures name lines of the page."""

    page: str
    line: int
    kind: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    found: list[Block] = []
    opened: Block | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if opened is not None:
            if line.startswith("```"):
                opened = None
            else:
                opened.source += line + "\n"
        elif line.startswith("```python"):
            kind, *more = line.removeprefix("```python").split() or [""]
            if more == ["continued"]:
                opened = found[-1]
                assert opened.kind == kind, f"{page.name}:{number} goes on with a block of another kind"
                opened.source += "\n" * (number - opened.line - opened.source.count("\n"))
            else:
                opened = Block(page.name, number, " ".join([kind, *more]), "")
                found.append(opened)
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of_kind(kind: str) -> list:
    return [pytest.param(block, id=block.name) for block in BLOCKS if block.kind == kind]


def run(block: Block) -> None:
    names = {"__name__": "docs"}
    session = doctest.DocTestParser().get_doctest(block.source, names, block.page, block.page, block.line)
    assert session.examples, f"{block.name} runs nothing: write it with >>>"
    report: list[str] = []
    doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(session, out=report.append)
    if report:
        pytest.fail("".join(report), pytrace=False)


def test_every_block_says_where_it_runs():
    assert {block.kind for block in BLOCKS} == set(KINDS), [b.name for b in BLOCKS if b.kind not in KINDS]


@pytest.mark.parametrize("block", of_kind("cpu"))
def test_on_the_cpu(block):
    run(block)


@pytest.mark.gpu
@pytest.mark.parametrize("block", of_kind("gpu"))
def test_on_the_gpu(block):
    run(block)


@pytest.mark.parametrize("block", of_kind("gpu"))
def test_gpu_blocks_compile(block):
    examples = doctest.DocTestParser().get_examples(block.source)
    assert examples, f"{block.name} runs nothing: write it with >>>"
    for example in examples:
        compile(example.source, block.name, "exec")


@pytest.mark.parametrize("block", of_kind("sketch"))
def test_sketches_compile(block):
    compile(block.source, block.name, "exec")


# --- pointers and links ---------------------------------------------------------------------------------------------
def find_file(path: str) -> Path | None:
    return next((folder / path for folder in FOLDERS if (folder / path).is_file()), None)


@cache
def names_in(file: Path) -> set[str]:
    """Dotted names that a Python file defines; every word of any other file."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return set(re.findall(r"\w+", text))
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
                visit(node.body if isinstance(node, ast.ClassDef) else [], f"{prefix}{node.name}.")
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))

    visit(ast.parse(text).body, "")
    return found


@pytest.mark.parametrize("name", WRITTEN)
def test_pointers_lead_somewhere(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    for path, member in _POINTER.findall(text):
        file = find_file(path)
        assert file is not None, f"{name} names {path}, which does not exist"
        assert not member or member in names_in(file), f"{name}: {path} has no {member}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in _LINK.findall(text):
        if target.startswith(("http:", "https:")) or target in MEASURED:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


# --- nothing is left out --------------------------------------------------------------------------------------------
def missing(page: str, words) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return [word for word in words if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)]


def test_the_index_lists_every_page():
    assert not missing("README.md", [p.name for p in PAGES if p.name != "README.md"])


def test_the_tour_visits_every_kernel_file():
    root = ROOT / "rawkernels"
    assert not missing("kernels.md", [p.relative_to(root).as_posix() for p in root.rglob("*.cu*")])


def test_every_setting_and_variable_is_described():
    assert not missing("architecture.md", [f.name for f in fields(EngineConfig)] + [v.name for v in env.VARIABLES])


def test_every_room_is_described():
    spec = importlib.util.spec_from_file_location("import_rules", ROOT / "tests" / "test_imports.py")
    assert spec is not None and spec.loader is not None
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    assert not missing("architecture.md", [f"`{room}`" for room in rules.MAY_IMPORT])


def test_every_family_preset_and_head_dim_is_described():
    assert not missing("models.md", [*FAMILIES, *(f"dummy:{name}" for name in PRESETS), *map(str, HEAD_DIMS)])
