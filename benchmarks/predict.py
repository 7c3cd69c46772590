"""Past this machine: weak scaling on many GPUs by a model, whose assumptions are printed with its figures.

A step on W processes takes that of a single one, and what its messages take over a link with a latency a for each of
log2(W) hops and a bandwidth B in and out of each process: (W - 1) m / B for m bytes gathered from each rank, and again
to return their gradients; 2 (W - 1) / W m / B for m bytes reduced. BatchNorm's statistics are gathered forward and
reduced backward, embeddings are gathered and returned: that is waited for. Averaging gradients hides behind the
backward pass on GPUs but not on CPUs: of two thirds of the step, which is assumed. Over several pieces of a batch only
the last hides it. Post-local SGD averages weights, a teacher's too, after the update, behind nothing; that its groups
are of one process is assumed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.measure import Rate, Results
from benchmarks.report import show

_WORLD_SIZES = (8, 64, 512, 4096)
_EVERY = 4


@dataclass(frozen=True)
class Link:
    latency_seconds: float
    bytes_per_second: float

    def __str__(self) -> str:
        return f"{1e6 * self.latency_seconds:.3g} us a hop, {self.bytes_per_second / 1e9:.3g} GB/s"

    def gather(self, size: int, num_bytes: float, messages: float) -> float:
        """Seconds of ``messages`` all-gathers of together ``num_bytes`` of each of ``size`` processes."""
        return messages * self.latency_seconds * math.log2(size) + (size - 1) * num_bytes / self.bytes_per_second

    def reduce(self, size: int, num_bytes: float, messages: float) -> float:
        """Likewise of all-reduces, there and back."""
        ring = 2 * (size - 1) / size * num_bytes / self.bytes_per_second
        return messages * 2 * self.latency_seconds * math.log2(size) + ring


def step_seconds(
    single: float,
    sent: Mapping[str, float],
    link: Link,
    size: int,
    overlap: float,
    *,
    gradient_share: float = 1,
    batchnorm_share: float = 1,
    every: float = 1,
) -> float:
    """The model: ``single`` is the step of one process, ``sent`` what `benchmarks.rank` counted of its messages,
    ``overlap`` the share of the step that hides averaging; the other shares are of the bytes of gradients and of
    BatchNorm's messages. Of ``every`` so many steps, or pieces of a batch, one averages: seconds of each on average."""
    norms, norm_bytes = (batchnorm_share * sent[f"batchnorm_{what}"] / 2 for what in ("messages", "bytes"))
    rows, row_bytes = (sent[f"gather_{what}"] / 2 for what in ("messages", "bytes"))
    waited = link.gather(size, norm_bytes, norms) + link.reduce(size, norm_bytes, norms)
    waited += 2 * link.gather(size, row_bytes, rows)
    gradients = link.reduce(size, gradient_share * sent["gradient_bytes"], 1)
    return single + waited + max(0.0, gradients - overlap * single) / every


def predict(results: Results, link: Link) -> None:
    """Print efficiencies at `_WORLD_SIZES` over an assumed link, and the model's step against what was measured."""
    overlap = 2 / 3 if torch.cuda.is_available() else 0.0
    sent = {name: value.mean for name, value in results["weak 1"].items()}
    single = sent["batch"] / sent["step"]
    weights = sent["weight_bytes"] / sent["gradient_bytes"]
    variants: dict[str, dict[str, float]] = {
        "fp32 gradients": {},
        "bf16 gradients": {"gradient_share": 0.5},
        f"accumulated over {_EVERY} pieces": {"every": _EVERY},
        f"weights averaged every {_EVERY} steps": {"every": _EVERY, "overlap": 0, "gradient_share": weights},
        "local BatchNorm": {"batchnorm_share": 0},
    }
    rows = []
    for name, variant in variants.items():
        of = {"overlap": overlap, **variant}
        rows.append([name, *(f"{single / step_seconds(single, sent, link, n, **of):.3f}" for n in _WORLD_SIZES)])
    assumed = (
        f"PREDICTED efficiency of weak scaling. Measured: a step of {1000 * single:.4g} ms. Assumed: {link}, "
        f"equally fast ranks, averaging {sent['gradient_bytes'] / 1e6:.3g} MB hides behind {overlap:.0%} of the step"
    )
    show(assumed, ["", *(f"{size} GPUs" for size in _WORLD_SIZES)], rows)
    for name, turn in results.items():
        if "apart" in turn:
            model, whole = modelled(turn, overlap), turn["batch"].ratio(turn["step"])
            print(f"{name}: {model} s a step predicted, {whole} measured; ratio {model.ratio(whole).decided()}")


def modelled(turn: Mapping[str, Rate], overlap: float) -> Rate:
    """Seconds a step by the model, with the step apart and the link as messages alone have shown them, by round."""
    seconds, size = [], round(turn["size"].mean)
    for values in zip(*(rate.rounds for rate in turn.values()), strict=True):
        sent = dict(zip(turn, values, strict=True))
        alone = max(sent["gradient_seconds"] - sent["latency_seconds"], 1e-9)
        bandwidth = 2 * (size - 1) / size * sent["gradient_bytes"] / alone
        link = Link(sent["latency_seconds"] / (2 * math.log2(size)), bandwidth)
        seconds.append(step_seconds(sent["batch"] / sent["apart"], sent, link, size, overlap))
    return Rate(tuple(seconds))
