"""How to read `Loader.stats`: totals since the start, of one process.

wait_seconds      `next` took in all. Over the elapsed time: the share that training stands still for data; near 0
                  the network is the limit. Three parts of it are told apart:
plan_seconds      drawing ids, crops and factors; about a millisecond a batch
copy_seconds      normalising, casting, and starting the copy to the device (on a CPU: doing all of it)
queue_occupancy   share of the prefetched batches that were ready when `next` was called, a mean from 0 to 1: at 1
                  the loader is ahead, at 0 every batch is waited for
num_threads       that the loader was given; what follows is summed over them, so that divided by ``num_threads``
                  and the elapsed time it is the share of the threads' time. `dali` has so many for reading, for
                  decoding and for the views each; there the shares can add up to more than 1
read_seconds      reading encoded images; some 0.03 ms each from the page cache, more: the disk is waited for
decode_seconds    decoding, reading included. DALI's threads cannot be asked: of `dali` it is the time that its
                  driving thread waits for them, all of which decode meanwhile, times their number
geometry_seconds  cutting, resizing and mirroring the views; not measured on a GPU, where it overlaps with training
photometric_seconds  jitter, grey, blur and solarize; likewise
replaced_samples  that could not be decoded; the log names each
fetch_seconds     copying shards to the cache, summed over its own threads, and fetched_bytes: how much it was
"""

from collections.abc import Mapping

Stats = Mapping[str, float]

# Below this share of the time spent in `next`, faster data would not make training noticeably faster.
_NO_WAIT = 0.02


def difference(after: Stats, before: Stats) -> dict[str, float]:
    """What was spent between two calls of `Loader.stats`."""
    means = ("queue_occupancy", "num_threads")
    return {name: value if name in means else value - before.get(name, 0.0) for name, value in after.items()}


def bound(spent: Stats, seconds: float) -> str:
    """What limits a run that ``spent`` this (see `difference`) in ``seconds``, as one line to print."""
    waiting = spent["wait_seconds"] / seconds
    if waiting < _NO_WAIT:
        return f"bound by the train step: {waiting:.1%} of the time is spent waiting for data"
    own = (spent["plan_seconds"] + spent["copy_seconds"]) / spent["wait_seconds"]
    if own > 0.5:
        return f"bound by the loader ({waiting:.0%} of the time), in its own thread: planning, normalising and copying"
    name, share = max(thread_shares(spent, seconds).items(), key=lambda item: item[1])
    return f"bound by the loader ({waiting:.0%} of the time), whose threads spend most of theirs ({share:.0%}) {name}"


def thread_shares(spent: Stats, seconds: float) -> dict[str, float]:
    """Shares of the loader threads' time, by what they did; ``idle`` is what is left of it."""
    available = spent["num_threads"] * seconds
    reading = spent.get("read_seconds", 0.0)
    busy = {
        "reading": reading,
        "decoding": max(0.0, spent.get("decode_seconds", 0.0) - reading),
        "resizing": spent.get("geometry_seconds", 0.0),
        "changing colours": spent.get("photometric_seconds", 0.0),
    }
    shares = {name: value / available for name, value in busy.items()}
    return {**shares, "idle": max(0.0, 1 - sum(shares.values()))}
