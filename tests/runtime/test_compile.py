"""Every .cu file compiles for every supported architecture; NVRTC needs no GPU."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import cupyinfer.bench.roofline
import cupyinfer.ops
from cupyinfer.runtime import kernels
from cupyinfer.runtime.kernels import SOURCES, compile_options, read_source, source_root

for _module in pkgutil.iter_modules(cupyinfer.ops.__path__):
    importlib.import_module(f"cupyinfer.ops.{_module.name}")

nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed")
try:
    nvrtc.getVersion()
except Exception as error:  # the library behind the binding is missing
    pytest.skip(f"NVRTC is not installed ({error}); pip install -e '.[test]' brings it", allow_module_level=True)

ARCHITECTURES = ("80", "89", "90", "100", "120")


def compile_for(path: str, macros: dict, arch: str, result: str = "getCUBIN", target: str = "") -> bytes:
    options = (target or f"-arch=sm_{arch}", *compile_options(path, tuple((k, str(v)) for k, v in macros.items())))
    program = nvrtc.createProgram(read_source(path), path, (), ())
    try:
        nvrtc.compileProgram(program, options)
    except Exception:
        pytest.fail(f"{path} {macros} sm_{arch}:\n{nvrtc.getProgramLog(program)}")
    return getattr(nvrtc, result)(program)


def test_every_file_is_declared():
    on_disk = {str(p.relative_to(source_root())) for p in source_root().rglob("*.cu")}
    assert on_disk == set(SOURCES)


@pytest.mark.parametrize("path", sorted(SOURCES))
def test_all_variants_compile_for_hopper(path):
    for macros in SOURCES[path].combinations():
        cubin = compile_for(path, macros, "90")
        for entry in SOURCES[path].entries:
            assert entry.encode() in cubin, f"{path} lacks the kernel {entry}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("path", sorted(SOURCES))
def test_compiles_for_every_architecture(path, arch):
    every = SOURCES[path].combinations()
    for macros in (every[0], every[-1]):
        assert compile_for(path, macros, arch)


@pytest.mark.parametrize("path", sorted(p for p in SOURCES if SOURCES[p].overlaps))
def test_every_overlapping_kernel_waits(path):
    """The compiled code of each kernel that may start early has both instructions of common/overlap.cuh."""
    ptx = compile_for(path, SOURCES[path].combinations()[-1], "90", "getPTX", "-arch=compute_90")
    bodies = ptx.decode().split(".entry ")[1:]
    assert len(bodies) == len(SOURCES[path].entries)
    for body in bodies:
        assert "griddepcontrol.wait" in body and "griddepcontrol.launch_dependents" in body, body[:60]


def test_an_undeclared_entry_is_refused():
    source = next(iter(SOURCES.values()))
    with pytest.raises(kernels.DeviceError, match="has no kernel"):
        kernels.get(source, "no_such_kernel")
