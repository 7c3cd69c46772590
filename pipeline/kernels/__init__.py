"""Pixels to pixels, exactly: twins for CPU (Numba) and GPU (Triton)."""
