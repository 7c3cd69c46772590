"""Online: from shards to batches of augmented views."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.loader import Loader

__all__ = ["Loader"]


def __getattr__(name: str) -> Any:
    """`Loader`, once it is asked for: it imports torch, which order and plan do without."""
    if name != "Loader":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.loader import Loader

    return Loader
