"""Run the GPU tests and compute-sanitizer on this machine and write the summary kept in docs/gpu-report.md.

    python tests/gpu_report.py --commit $(git rev-parse --short HEAD) --out docs/gpu-report.md

Three parts: every test marked ``gpu``; memcheck and racecheck over the op tests (each kernel against its reference).
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OP_TESTS = ["tests/ops/test_contracts.py", "-k", "kernel_against_reference"]


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *arguments]


def run(command: list[str], log: Path, timeout: float) -> tuple[str, float]:
    """(last line of the output, seconds); the whole output goes to ``log``."""
    start = time.perf_counter()
    # CuPy's pool hands out parts of large chunks: without it compute-sanitizer sees every array's true bounds.
    with log.open("w") as sink:
        try:
            subprocess.run(command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            sink.write(f"\nstopped after {timeout:.0f} s\n")
    return log.read_text(errors="replace").strip(), time.perf_counter() - start


def summary_line(output: str, pattern: str) -> str:
    found = re.findall(pattern, output, re.MULTILINE)
    return found[-1].strip(" =") if found else "no summary: " + output[-200:].replace("\n", " ")


def machine() -> dict[str, str]:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    driver, runtime = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    rows = {
        "GPU": f"{properties['name'].decode()}, {properties['multiProcessorCount']} SMs",
        "driver / CUDA runtime": f"{driver // 1000}.{driver % 1000 // 10} / {runtime // 1000}.{runtime % 1000 // 10}",
        "Python": platform.python_version(),
    }
    for package in ("numpy", "cupy-cuda12x", "cupy-cuda13x", "nvmath-python", "torch", "transformers"):
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            continue
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, default=Path("."), help="folder for the full logs")
    parser.add_argument("--sanitizer-timeout", type=float, default=240, help="seconds for each of the two tools")
    parser.add_argument("--skip-tests", action="store_true")
    args = parser.parse_args()
    lines = ["# GPU test report", "", "Written by `tests/gpu_report.py`.", "", "| what | result |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in {"commit": args.commit, **machine()}.items()]
    if not args.skip_tests:
        output, seconds = run(pytest_command("--durations=8"), args.logs / "gpu-tests.log", 580)
        tests = summary_line(output, r"^.*\b(?:passed|failed|error).* in [\d.:]+.*$")
        lines.append(f"| `python -m pytest -m gpu` | {tests} ({seconds:.0f} s) |")
    tool = shutil.which("compute-sanitizer")
    os.environ["CUPYINFER_TEST_NO_POOL"] = "1"
    for check in ("memcheck", "racecheck") if tool else ():
        command = [tool, "--tool", check, "--error-exitcode", "9", *pytest_command(*OP_TESTS)]
        output, seconds = run(command, args.logs / f"{check}.log", args.sanitizer_timeout)
        verdict = summary_line(output, r"^=+ (?:ERROR|RACECHECK) SUMMARY.*$")
        tests = summary_line(output, r"^.*\b(?:passed|failed|error).* in [\d.:]+.*$")
        lines.append(f"| compute-sanitizer {check} over the op tests | {verdict}; {tests} |")
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
