"""The loop, the step, and what a run keeps."""
