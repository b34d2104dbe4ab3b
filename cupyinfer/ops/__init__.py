"""Ops: one file per family. Each file has, in this order: contract, NumPy reference, CUDA launcher, public function."""
