"""``cupyinfer doctor``: what this machine has, what is missing, and the command that fixes it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cupyinfer
from cupyinfer import env
from cupyinfer.cli.probe import PROBES, Finding
from cupyinfer.demo import demo_model_path
from cupyinfer.errors import CheckpointError, ConfigError, invalid

PROBE_SECONDS = 30.0
PACKAGES = ("numpy", "ml_dtypes", "tokenizers", "jinja2", "rich")  # without these nothing runs
CUDA_NEEDS = ("gpu", "driver", "cupy", "nvrtc", "cublas")
TITLES = {
    "python": "Python",
    "packages": "Python packages",
    "os": "Operating system",
    "gpu": "GPU",
    "driver": "NVIDIA driver",
    "cupy": "CuPy",
    "nvrtc": "NVRTC (kernel compiler)",
    "headers": "CUDA headers",
    "cublas": "cuBLAS",
    "cublaslt": "cuBLASLt",
    "nccl": "NCCL",
    "mpi": "MPI library",
    "launcher": "MPI launcher",
    "compiler": "C++ compiler",
    "cache": "Disk caches",
    "demo": "Demo model",
}
FIXES = {
    "python": "install Python 3.10 to 3.13",
    "packages": "pip install --upgrade cupyinfer",
    "gpu": "needs an NVIDIA GPU and its driver; without one everything runs on the CPU",
    "driver": "install the NVIDIA driver 525 or later: https://www.nvidia.com/drivers",
    "cupy": "pip install cupy-cuda{cuda}x",
    "nvrtc": "pip install 'cupy-cuda{cuda}x[ctk]'",
    "headers": "pip install 'cupy-cuda{cuda}x[ctk]'",
    "cublas": "pip install 'cupy-cuda{cuda}x[ctk]'",
    "cublaslt": "pip install 'cupy-cuda{cuda}x[ctk]'",
    "nccl": "pip install nvidia-nccl-cu{cuda}",
    "mpi": "pip install mpich   (or the cluster's own: module load openmpi; apt install libopenmpi3)",
    "launcher": "pip install mpich   (or the cluster's own: module load openmpi; apt install openmpi-bin)",
    "compiler": "apt install g++   (or dnf install gcc-c++; xcode-select --install)",
    "cache": "set CUPYINFER_CACHE_DIR and CUPY_CACHE_DIR to folders that you may write to",
    "demo": "pip install --force-reinstall cupyinfer, or give --model",
}


@dataclass(frozen=True)
class Row:
    """One line of the table. ``needed``: it was asked for, so its absence makes the exit code non-zero."""

    name: str
    ok: bool
    detail: str
    needed: bool = False
    fix: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show what this machine has for cupyinfer, what is missing, and the command that fixes it."
    parser.epilog = (
        "Exit code: 0 when everything that was asked for is there, 1 when something is missing.\n\n"
        "examples:\n"
        "  cupyinfer doctor\n"
        "  cupyinfer doctor --device cuda          is this machine ready to run on its GPU?\n"
        "  cupyinfer doctor --require nccl,mpi     ... and on several?"
    )
    parser.add_argument("--require", metavar="NAMES", default="", help=f"comma-separated: {','.join(TITLES)}")
    parser.add_argument("--device", help=f"auto, cpu or cuda; cuda requires {','.join(CUDA_NEEDS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    needed = required_names(args.require, args.device)
    rows = examine(needed)
    missing = [row for row in rows if row.needed and not row.ok]
    variables, bad_variable = environment()
    if args.json:
        print(json.dumps({"ok": not missing, "rows": [asdict(r) for r in rows], "environment": variables}))
    else:
        print_table(rows, variables)
        wrong = ", ".join(row.name for row in missing)
        print(f"\nMissing, though asked for: {wrong}" if missing else "\nEverything that was asked for is there.")
    return 1 if missing or bad_variable else 0


def required_names(require: str, device: str | None) -> set[str]:
    """Names of rows that must be ok. Raises ConfigError for an unknown name or device."""
    names = {name.strip().lower() for name in require.split(",") if name.strip()}
    for name in sorted(names - set(TITLES)):
        raise invalid("--require", name, ", ".join(TITLES))
    if device is None:
        try:
            device = env.DEVICE.get()
        except ConfigError:  # shown among the environment variables
            device = "auto"
    kind = device.partition(":")[0]
    if kind not in ("auto", "cpu", "cuda"):
        raise invalid("--device", device, "auto, cpu, cuda, cuda:N")
    return names | {"python", "packages"} | (set(CUDA_NEEDS) if kind == "cuda" else set())


def examine(needed: set[str]) -> list[Row]:
    """Every row of the table, in order."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        probed = dict(zip(PROBES, pool.map(probe, PROBES), strict=True))
    found = probed | {name: _guarded(check) for name, check in LOCAL.items()}
    cuda = 13 if int(found["cupy"].get("cuda", 0)) >= 13000 else 12
    return [_row(name, found[name], name in needed, cuda) for name in TITLES]


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # doctor must get to the end on the strangest machine
        return {"ok": False, "detail": f"could not be examined: {error}"}


def _row(name: str, finding: Finding, needed: bool, cuda: int) -> Row:
    fix = "" if finding["ok"] else finding.get("fix", FIXES.get(name, "")).format(cuda=cuda)
    return Row(name, bool(finding["ok"]), finding["detail"], needed, fix)


def probe(name: str) -> Finding:
    """Run one probe in a process of its own: a library that hangs or crashes there is a finding, not our end."""
    folder = str(Path(cupyinfer.__file__).parents[1])
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "cupyinfer.cli.probe", name]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
        return json.loads(done.stdout.decode(errors="replace").strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"ok": False, "detail": f"gave no answer within {PROBE_SECONDS:.0f} s"}
    except (ValueError, IndexError):
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
        return {"ok": False, "detail": f"the probe ended with code {done.returncode}: {last[:120]}".rstrip(": ")}
    except OSError as error:
        return {"ok": False, "detail": f"the probe could not be started: {error}"}


# --- parts that need no process of their own ------------------------------------------------------------------------
def _python() -> Finding:
    ok = (3, 10) <= sys.version_info[:2] <= (3, 13)
    return {"ok": ok, "detail": f"{platform.python_version()} ({sys.executable})"}


def _packages() -> Finding:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return {"ok": False, "detail": f"missing: {', '.join(missing)}", "fix": f"pip install {' '.join(missing)}"}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return {"ok": True, "detail": ", ".join([f"cupyinfer {cupyinfer.__version__}", *versions])}


def _system() -> Finding:
    return {"ok": True, "detail": f"{platform.platform()}, {os.cpu_count()} CPUs"}


def _launcher() -> Finding:
    """The first of mpirun, mpiexec and srun that is there, and which launcher started this process, if one did."""
    found = []
    for name in ("mpirun", "mpiexec", "srun"):
        path = shutil.which(name)
        if path:
            found.append(f"{name}: {_first_line([path, '--version']) or path}")
    started = {"OMPI_COMM_WORLD_SIZE": "Open MPI", "PMI_SIZE": "MPICH (PMI)", "SLURM_STEP_ID": "Slurm (srun)"}
    by = [launcher for variable, launcher in started.items() if variable in os.environ]
    note = f"; this process was started by {by[0]}" if by else ""
    return {"ok": bool(found), "detail": (found[0] if found else "no mpirun, mpiexec or srun on PATH") + note}


def _compiler() -> Finding:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        path = shutil.which(name)
        if path:
            return {"ok": True, "detail": _first_line([path, "--version"]) or path}
    return {"ok": False, "detail": "no g++, clang++ or c++ on PATH (only the kernel simulator needs one)"}


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout or done.stderr).decode(errors="replace").strip().splitlines()
    return lines[0].strip() if lines else ""


def _cache() -> Finding:
    ours = env.CACHE_DIR.get()
    theirs = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    bad = [str(folder) for folder in (ours, theirs) if not _writable(folder)]
    return {"ok": not bad, "detail": f"not writable: {', '.join(bad)}" if bad else f"{ours}, {theirs}"}


def _writable(folder: Path) -> bool:
    """Whether files can be made in ``folder``, or, when it does not exist yet, in the nearest folder above it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _demo() -> Finding:
    try:
        return {"ok": True, "detail": str(demo_model_path())}
    except CheckpointError as error:
        return {"ok": False, "detail": str(error)}


LOCAL: dict[str, Callable[[], Finding]] = {
    "python": _python,
    "packages": _packages,
    "os": _system,
    "launcher": _launcher,
    "compiler": _compiler,
    "cache": _cache,
    "demo": _demo,
}


# --- output ---------------------------------------------------------------------------------------------------------
def environment() -> tuple[list[dict[str, Any]], bool]:
    """The environment variables cupyinfer reads, and whether one of them holds a value that is not allowed."""
    rows, bad = [], False
    for variable in env.VARIABLES:
        try:
            value, problem = str(variable.get()), ""
        except ConfigError as error:
            value, problem, bad = os.environ.get(variable.name, ""), str(error), True
        given = bool(os.environ.get(variable.name))
        rows.append({"name": variable.name, "value": value, "set": given, "help": variable.help, "problem": problem})
    return rows, bad


def print_table(rows: list[Row], variables: list[dict[str, Any]]) -> None:
    width = max(map(len, TITLES.values()))
    for row in rows:
        state = "ok" if row.ok else "MISSING" if row.needed else "missing"
        print(f"{TITLES[row.name]:<{width}}  {state:<7}  {row.detail}")
        if row.fix:
            print(f"{'':<{width}}           fix: {row.fix}")
    print("\nEnvironment variables")
    for variable in variables:
        value = variable["value"] + ("" if variable["set"] else " (default)")
        print(f"  {variable['name']:<{width - 2}}  {value:<28}  {variable['problem'] or variable['help']}")
