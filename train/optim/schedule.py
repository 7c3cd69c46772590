"""Learning rates and other values that move during a run, as pure functions of how far it is."""

import math
from collections.abc import Sequence


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int, peak: float, final: float = 0.0) -> float:
    """Linear from ``peak / warmup_steps`` to ``peak`` over the warm-up, then a half cosine down to ``final``.

    SGDR's shape (Loshchilov & Hutter, 2017) as SimCLR uses it; ``step`` counts updates from 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return cosine(min(1.0, progress), peak, final)


def scaled_peak(base: float, global_batch_size: int, scaling: str) -> float:
    """The peak learning rate: ``base * B / 256`` (linear) or ``base * sqrt(B)`` (SimCLR, appendix B.1)."""
    return base * global_batch_size / 256 if scaling == "linear" else base * math.sqrt(global_batch_size)


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` at progress 0 to ``end`` at 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def stairs(progress: float, start: float, milestones: Sequence[float]) -> float:
    """``start`` divided by 10 at each of the ``milestones`` of progress."""
    return start * 0.1 ** sum(progress >= milestone for milestone in milestones)
