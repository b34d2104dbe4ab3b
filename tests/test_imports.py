"""Imports point one way, base <- runtime <- ops <- model <- engine <- api <- command line, and never in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "cupyinfer"
BASE = {"errors", "env", "config", "types", "contract", "outputs", "sampling_params", "demo", "progress", "prompts"}
API = {"api", "live_request"}
TOP = {"cli", "bench", "serve", "viz", "__main__"}
BELOW_API = {"base", "text", "runtime", "ops", "dist", "model", "engine"}
MAY_IMPORT = {  # room -> rooms it may import besides itself
    "base": set(),
    "text": {"base"},
    "sim": {"base"},
    "runtime": {"base", "sim"},
    "ops": {"base", "runtime"},
    "dist": {"base", "runtime"},
    "model": {"base", "runtime", "ops", "dist"},
    "engine": {"base", "runtime", "ops", "dist", "model"},
    "api": BELOW_API,
    "top": {"api", *BELOW_API},
}
TOUCHES_CUPY = ("runtime.", "ops.", "dist.", "model.", "engine.runner", "engine.memory_plan", "bench.", "cli.probe")
NEED_CUPY = ("runtime.kv_pool_cuda",)  # a class derived from one of CuPy's; imported on a GPU only
TOUCHES_MPI = ("dist.", "cli.probe")


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(f): f for f in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    first = module.split(".")[0]
    if first in BASE or not first:
        return "base"
    return "api" if first in API else "top" if first in TOP else first


def imports(tree: ast.AST) -> list[str]:
    """Full names of everything a file imports, inside functions too, except for type checkers only."""
    found = []
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def own_imports(module: str) -> set[str]:
    """Modules of this package that ``module`` imports, as in FILES."""
    names = set()
    for name in imports(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if name.split(".")[0] == "cupyinfer":
            inner = name.removeprefix("cupyinfer").lstrip(".")
            names.add(inner if inner in FILES else inner.rpartition(".")[0])
    return names - {""}


def test_every_file_has_a_room():
    unknown = {room(m) for m in FILES} - set(MAY_IMPORT)
    assert not unknown, f"say in MAY_IMPORT what {unknown} may import"


@pytest.mark.parametrize("module", FILES)
def test_direction(module):
    here = room(module)
    wrong = {m for m in own_imports(module) if room(m) != here and room(m) not in MAY_IMPORT[here]}
    assert not wrong, f"cupyinfer.{module} ({here}) must not import {wrong}"


@pytest.mark.parametrize("module", [m for m in FILES if m.startswith("ops.")])
def test_ops_do_not_import_each_other(module):
    shared = {m for m in own_imports(module) if m.startswith("ops.") and not m.split(".")[1].startswith("_")}
    family = ".".join(module.split(".")[:2])
    assert {m for m in shared if not m.startswith(family)} == set()


def test_no_cycles():
    graph = {m: own_imports(m) - {m} for m in FILES}
    while graph:
        leaves = [m for m, needs in graph.items() if not needs & set(graph)]
        assert leaves, f"these modules import each other in a circle, or from one: {sorted(graph)}"
        for leaf in leaves:
            del graph[leaf]


@pytest.mark.parametrize("module", FILES)
def test_only_some_rooms_touch_the_gpu_or_mpi(module):
    third_party = {name.split(".")[0] for name in imports(ast.parse(FILES[module].read_text(encoding="utf-8")))}
    if not module.startswith(TOUCHES_CUPY):
        assert not third_party & {"cupy", "cupyx", "cupy_backends"}
    if not module.startswith(TOUCHES_MPI):
        assert "mpi4py" not in third_party
    assert not third_party & {"torch", "transformers"}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time; t = time.perf_counter(); import cupyinfer; s = time.perf_counter() - t\n"
        "heavy = {'cupy', 'mpi4py', 'tokenizers', 'numpy', 'rich', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy; print(s)"
    )
    assert min(float(run_python(code)) for _ in range(3)) < 0.3


def test_every_module_imports_without_cupy_mpi_and_friends():
    modules = [f"cupyinfer.{m}".rstrip(".") for m in FILES if m not in ("__main__", *NEED_CUPY)]
    code = (
        "import importlib, sys\n"
        "for name in ('cupy', 'cupyx', 'cupy_backends', 'mpi4py', 'huggingface_hub', 'nvmath', 'cuda', 'matplotlib'):\n"
        "    sys.modules[name] = None  # importing it raises ImportError\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)"
    )
    run_python(code)


def test_public_names_are_there_and_others_raise():
    import cupyinfer

    for name in cupyinfer.__all__:
        assert getattr(cupyinfer, name) is not None
        assert name in dir(cupyinfer)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cupyinfer.nothing
