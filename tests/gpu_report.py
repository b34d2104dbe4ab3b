"""Run the GPU tests and compute-sanitizer on this machine and write the summary kept in docs/gpu-report.md.

    python tests/gpu_report.py --commit $(git rev-parse --short HEAD) --out docs/gpu-report.md

Parts: every test marked ``gpu``; then memcheck and racecheck over each op's tests against its reference, one process
an op, several at once.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTED = re.compile(r"^.*\b\d+ (?:passed|failed|error).* in [\d.:]+.*$", re.MULTILINE)
VERDICT = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: .*$", re.MULTILINE)


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *arguments]


def run(command: list[str], log: Path, timeout: float) -> tuple[str, float]:
    """(the whole output, seconds); the output is also kept in ``log``."""
    start = time.perf_counter()
    with log.open("w") as sink:
        try:
            subprocess.run(command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            sink.write(f"\nstopped after {timeout:.0f} s\n")
    return log.read_text(errors="replace"), time.perf_counter() - start


def last(pattern: re.Pattern[str], output: str) -> str:
    found = pattern.findall(output)
    return found[-1].strip(" =") if found else "no summary"


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


def cases_by_op() -> dict[str, list[str]]:
    """Test ids of the kernel tests of each op."""
    sys.path.insert(0, str(ROOT))
    from tests.ops.test_contracts import CASES

    result: dict[str, list[str]] = {}
    for case in CASES:
        node = f"tests/ops/test_contracts.py::test_kernel_against_reference[{case.id}]"
        result.setdefault(case.values[0].name, []).append(node)
    return result


def sanitize(tool: str, check: str, logs: Path, timeout: float) -> Iterator[tuple[str, str, str]]:
    """(op, the tool's verdict, pytest's summary) of every op."""
    # CuPy's pool hands out parts of large chunks: without it the tool sees every array's true bounds.
    os.environ["CUPYINFER_TEST_NO_POOL"] = "1"
    jobs = cases_by_op()

    def one(op: str) -> tuple[str, str, str]:
        command = [tool, "--tool", check, "--error-exitcode", "9", *pytest_command(*jobs[op])]
        output, _ = run(command, logs / f"{check}-{op}.log", timeout)
        return op, last(VERDICT, output), last(TESTED, output)

    with ThreadPoolExecutor(max_workers=8) as pool:
        yield from pool.map(one, jobs)


def sanitizer_row(tool: str, check: str, logs: Path, timeout: float) -> str:
    rows = list(sanitize(tool, check, logs, timeout))
    passed = sum(int(n) for _, _, tests in rows for n in re.findall(r"(\d+) passed", tests))
    clean = [op for op, verdict, tests in rows if re.search(r"SUMMARY: 0 ", verdict) and "failed" not in tests]
    bad = [f"{op}: {verdict}, {tests}" for op, verdict, tests in rows if op not in clean]
    text = f"{len(clean)} of {len(rows)} ops clean, {passed} kernel tests passed under it"
    return f"| compute-sanitizer {check} | {text}{'; ' + '; '.join(bad) if bad else ''} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, default=Path("."), help="folder for the full logs")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for the tests, and for one op's check")
    parser.add_argument("--checks", default="memcheck,racecheck", help="of compute-sanitizer; empty: none")
    parser.add_argument("--workers", type=int, default=0, help="run the tests in so many processes (pytest-xdist)")
    parser.add_argument("--skip-tests", action="store_true")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    lines = ["# GPU test report", "", "Written by `tests/gpu_report.py`.", "", "| what | result |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in {"commit": args.commit, **machine()}.items()]
    if not args.skip_tests:
        parallel = ["-n", str(args.workers)] if args.workers else []
        output, _ = run(pytest_command(*parallel), args.logs / "gpu-tests.log", args.timeout)
        lines.append(f"| `{' '.join(['python -m pytest -m gpu', *parallel])}` | {last(TESTED, output)} |")
    tool = shutil.which("compute-sanitizer")
    if tool is None and args.checks:
        lines.append("| compute-sanitizer | not installed |")
    for check in args.checks.split(",") if tool and args.checks else ():
        lines.append(sanitizer_row(tool, check, args.logs, args.timeout))
        print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
