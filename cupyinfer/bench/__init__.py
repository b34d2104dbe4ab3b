"""Measurements: the machine's ceilings, decode steps, prefill, and a whole offline workload."""
