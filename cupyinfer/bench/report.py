"""Bench results as a table for people and as JSON for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from cupyinfer.bench.roofline import Roofline
from cupyinfer.bench.workloads import Result


def print_table(title: str, roofline: Roofline, results: list[Result], console: Console) -> None:
    """One row a workload: value, share of the measured roofline, step percentiles in ms."""
    table = Table(title=title)
    for heading in ("workload", "value", "unit", "% of roofline", "step median", "p10", "p90", "p99"):
        table.add_column(heading, justify="left" if heading in ("workload", "unit") else "right")
    for result in results:
        steps = [f"{result.steps[k]:.3f}" if result.steps else "" for k in ("median", "p10", "p90", "p99")]
        table.add_row(result.workload, f"{result.value:,.4g}", result.unit, f"{100 * result.roofline:.1f}", *steps)
    console.print(table)
    bandwidth, flops = _with_prefix(roofline.bandwidth, "B/s"), _with_prefix(roofline.flops, "FLOP/s")
    console.print(f"roofline: {bandwidth} read, {flops}; steps in ms")


def _with_prefix(value: float, unit: str) -> str:
    """3.9e12, "B/s" -> "3.90 TB/s"; a CPU's figures are in giga."""
    return f"{value / 1e12:.2f} T{unit}" if value >= 1e12 else f"{value / 1e9:.1f} G{unit}"


def as_json(machine: dict[str, Any], roofline: Roofline, results: list[Result]) -> dict[str, Any]:
    ceilings = {"bytes_per_second": roofline.bandwidth, "flops_per_second": roofline.flops}
    return {"machine": machine, "roofline": ceilings, "results": [r.as_dict() for r in results]}
