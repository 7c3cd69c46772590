"""Pretraining and evaluation of image encoders."""
