"""Measurements: loader and step throughput, scaling, parity."""
