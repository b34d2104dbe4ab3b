"""Weights, families (config and weight-name maps), layers, decoder."""
