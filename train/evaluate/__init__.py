"""Evaluation of frozen encoders: ``python -m train.evaluate``."""
