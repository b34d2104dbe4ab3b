"""The machine: devices, kernel sources and launches, memory, CUDA graphs, timing."""
