"""The wheel carries the kernels and the demo model; pyproject.toml, README.md and .ci/run agree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from standins import write_text_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LICENSE = "LICENSE-CPython.txt"
SOURCES = ("cupyinfer", "rawkernels", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md")


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory) -> Path:
    """A copy of what a wheel is made of, with a stand-in for the demo model."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "demo_model"))
        else:
            shutil.copy(source, tree / name)
    model = tree / "tutorials" / "demo_model" / "model"
    model.mkdir(parents=True)
    shutil.copy(ROOT / "tutorials" / "demo_model" / LICENSE, model.parent / LICENSE)
    write_text_files(model)
    (model / "config.json").write_text("{}")
    return tree


def build_wheel(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheels", "."]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel_names(source_tree) -> set[str]:
    done = build_wheel(source_tree)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source_tree / "wheels").glob("cupyinfer-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_carries_every_kernel_source(wheel_names):
    on_disk = {f"cupyinfer/{p.relative_to(ROOT)}" for p in (ROOT / "rawkernels").rglob("*.cu*")}
    assert len(on_disk) > 3
    assert {n for n in wheel_names if n.endswith((".cu", ".cuh"))} == {p.replace("\\", "/") for p in on_disk}


def test_wheel_carries_the_demo_model(wheel_names):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert f"cupyinfer/demo_model/{name}" in wheel_names


def test_wheel_carries_the_licence_of_the_demo_models_data(wheel_names):
    assert any(n.endswith(f".dist-info/licenses/tutorials/demo_model/{LICENSE}") for n in wheel_names)


def test_wheel_carries_every_module_and_nothing_else(wheel_names):
    modules = {str(p.relative_to(ROOT)).replace("\\", "/") for p in (ROOT / "cupyinfer").rglob("*.py")}
    modules = {m for m in modules if not m.startswith(("cupyinfer/rawkernels", "cupyinfer/demo_model"))}
    assert {n for n in wheel_names if n.endswith(".py")} == modules
    assert not {n for n in wheel_names if n.split("/")[0] not in ("cupyinfer",) and ".dist-info/" not in n}


def test_a_wheel_without_the_demo_model_is_refused(source_tree, tmp_path):
    tree = shutil.copytree(source_tree, tmp_path / "tree", ignore=shutil.ignore_patterns("model", "build", "wheels"))
    done = build_wheel(tree)
    assert done.returncode != 0
    assert "tutorials/demo_model/model/ is missing" in done.stdout + done.stderr


def test_every_folder_of_the_package_is_a_package():
    folders = {p.parent for p in (ROOT / "cupyinfer").rglob("*.py")}
    assert [str(f) for f in folders if not (f / "__init__.py").is_file()] == []


def test_required_packages_and_extras():
    required = {re.split(r"[>=<;\[ ]", d)[0] for d in PROJECT["dependencies"]}
    assert {"cupy-cuda12x", "numpy", "mpi4py"} <= required
    assert {"ctk", "hub", "test", "jupyter", "mpi", "docs", "dev"} <= set(PROJECT["optional-dependencies"])
    assert PROJECT["requires-python"] == ">=3.10,<3.14"


def test_nothing_asks_for_the_name_of_the_cupy_distribution():
    """In place beside a CuPy for CUDA 13, whose distribution has another name."""
    for file in (ROOT / "cupyinfer").rglob("*.py"):
        assert not re.search(r"version\(.cupy", file.read_text(encoding="utf-8")), file


def commands(what: str) -> list[str]:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("python3 -m venv") and what in line]


def test_readme_has_one_line_for_the_main_job_and_one_for_the_tests():
    assert len(commands("cupyinfer generate")) == 1
    assert len(commands("pytest")) == 1


def test_ci_takes_the_test_line_from_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -E '([^']+)' README.md", script)
    assert pattern is not None
    found = [x for x in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if re.search(pattern[1], x)]
    assert found == commands("pytest")
