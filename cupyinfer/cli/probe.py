"""Looks at one part of the machine and prints what it found as a line of JSON: ``python -m cupyinfer.cli.probe NAME``.

``cupyinfer doctor`` starts one such process for each part, because a broken driver, CUDA library or MPI installation
can hang or kill the process that loads it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

Finding = dict[str, Any]  # ok: bool, detail: text, and more that the doctor uses


def gpu() -> Finding:
    """GPUs as the driver reports them; asks libcuda directly, so CuPy need not be there."""
    from cupyinfer.runtime.device import gpu_count

    count, why = gpu_count()
    if not count:
        return {"ok": False, "detail": why}
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    driver = ctypes.CDLL(library)
    return {"ok": True, "detail": "; ".join(_describe_gpu(driver, i) for i in range(count)), "count": count}


def _describe_gpu(driver: Any, index: int) -> str:
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
    major, minor, processors = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    for attribute, value in ((75, major), (76, minor), (16, processors)):  # CU_DEVICE_ATTRIBUTE_*
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    size = f"{memory.value / 2**30:.0f} GiB, {processors.value} SMs, sm_{major.value}{minor.value}"
    return f"{index}: {name.value.decode()} ({size})"


def driver() -> Finding:
    """Version of the NVIDIA driver, and the newest CUDA it runs."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return {"ok": False, "detail": f"{library} was not found"}
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    text = f"runs CUDA up to {_cuda_version(version.value)}"
    return {"ok": version.value >= 12000, "detail": f"{_driver_version()}{text}", "cuda": version.value}


def _driver_version() -> str:
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            return f"{text.value.decode()}, "
    except OSError:
        pass
    return ""


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def cupy() -> Finding:
    """CuPy, and on a GPU whether it computes."""
    import cupy as module

    from cupyinfer.runtime.device import gpu_count

    runtime = module.cuda.runtime.runtimeGetVersion()
    found = {"ok": True, "detail": f"{module.__version__} for CUDA {_cuda_version(runtime)}", "cuda": runtime}
    if gpu_count()[0]:
        total = int((module.arange(1000, dtype=module.float32) + 1).sum())  # compiles kernels and runs them
        found |= {"ok": total == 500500, "detail": f"{found['detail']}, computes"}
    return found


def nvrtc() -> Finding:
    """CUDA's run-time compiler: compiles a kernel, which needs no GPU."""
    from cupy_backends.cuda.libs import nvrtc as library

    major, minor = library.getVersion()
    program = library.createProgram('extern "C" __global__ void f() {}', "probe.cu", (), ())
    library.compileProgram(program, ("-arch=sm_80",))
    return {"ok": bool(library.getCUBIN(program)), "detail": f"{major}.{minor}, compiles"}


def headers() -> Finding:
    """The toolkit's headers (cuda_fp16.h), which CuPy's own kernels include. Ours include none."""
    for folder in _header_folders():
        if (folder / "cuda_fp16.h").is_file():
            return {"ok": True, "detail": str(folder)}
    return {"ok": False, "detail": "cuda_fp16.h was not found"}


def _header_folders() -> list[Path]:
    roots = [Path(os.environ[name]) / "include" for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)]
    try:
        from cuda import pathfinder

        found = pathfinder.find_nvidia_header_directory("cudart")
        roots += [Path(found)] if found else []
    except (ImportError, AttributeError):
        pass
    return [*roots, Path("/usr/local/cuda/include")]


def cublas() -> Finding:
    from cupy_backends.cuda.libs import cublas as library

    from cupyinfer.runtime.device import gpu_count

    if not gpu_count()[0]:
        return {"ok": True, "detail": "loads"}
    from cupy.cuda import device

    number = library.getVersion(device.get_cublas_handle())
    return {"ok": True, "detail": f"{number // 10000}.{number // 100 % 100}.{number % 100}"}


def cublaslt() -> Finding:
    """cuBLASLt: tuned GEMM algorithms. It comes with cuBLAS."""
    from cupyinfer.runtime.device import gpu_count

    if not gpu_count()[0]:
        return cublas()
    from cupy.cuda import device

    from cupyinfer.runtime.cublas import loaded_library

    device.get_cublas_handle()  # loads both libraries
    version = loaded_library("cublasLt").cublasLtGetVersion
    version.restype = ctypes.c_size_t
    number = version()
    return {"ok": True, "detail": f"{number // 10000}.{number // 100 % 100}.{number % 100}"}


def nccl() -> Finding:
    """Collectives between GPUs. Needed for more than one GPU."""
    from cupy_backends.cuda.libs import nccl as library

    number = library.get_version()
    return {"ok": True, "detail": f"{number // 10000}.{number // 100 % 100}.{number % 100}"}


def mpi() -> Finding:
    """The MPI library that mpi4py finds. It is loaded but not initialised: that could wait for other ranks."""
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    lines = MPI.Get_library_version().replace("\0", "").strip().splitlines()
    return {"ok": True, "detail": f"{lines[0].strip()} (mpi4py {mpi4py.__version__})"}


PROBES = {f.__name__: f for f in (gpu, driver, cupy, nvrtc, headers, cublas, cublaslt, nccl, mpi)}


def main() -> int:
    try:
        found = PROBES[sys.argv[1]]()
    except Exception as error:  # whatever a broken library raises is the finding
        lines = str(error).strip().splitlines() or [type(error).__name__]
        found = {"ok": False, "detail": lines[0][:160]}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
