"""Decoding by NVIDIA DALI, and rendering on its device."""
