"""Executors of a view plan, one file each."""
