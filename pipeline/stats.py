"""What a loader spent its time on."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Stats:
    """Totals since the start, of one process. Sums and differences are taken field by field; every backend has all
    fields, and leaves at 0 what it does not measure.

    Over ``seconds``, the first group are shares of the main thread's time; over ``thread_seconds``, the second are
    shares of the loader's threads' time. `dali` has so many threads for reading, for decoding and for the views each:
    there the shares can add up to more than 1.
    """

    seconds: float = 0.0  # since the loader was made
    wait_seconds: float = 0.0  # `next` took in all: near 0 of `seconds` the network is the limit; it has two parts:
    plan_seconds: float = 0.0  # drawing ids, crops and factors; about a millisecond a batch
    copy_seconds: float = 0.0  # normalising, casting, starting the copy to the device (on a CPU: doing all of it)

    thread_seconds: float = 0.0  # `seconds`, times the threads that the loader was given
    read_seconds: float = 0.0  # encoded images; some 0.03 ms each from the page cache, more: the disk is waited for
    decode_seconds: float = 0.0  # reading included; of `dali`, all its threads while the driving one waits for them
    geometry_seconds: float = 0.0  # cutting, resizing, mirroring; not measured on a GPU, which trains meanwhile
    photometric_seconds: float = 0.0  # jitter, grey, blur and solarize; likewise

    num_batches: int = 0  # delivered
    num_prefetched: int = 0  # batches in the making, summed over the calls of `next`
    num_ready: int = 0  # those of them that were ready; as many as that: the loader is ahead; 0: each is waited for
    replaced_samples: int = 0  # that could not be decoded, or are left out; the log names each
    fetch_seconds: float = 0.0  # copying shards to the cache, summed over its own threads
    fetched_bytes: int = 0  # how much that was

    def __add__(self, other: "Stats") -> "Stats":
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: "Stats") -> "Stats":
        return Stats(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


def thread_shares(spent: Stats) -> dict[str, float]:
    """Shares of the loader threads' time, by what they did; ``idle`` is what is left of it."""
    busy = {
        "reading": spent.read_seconds,
        "decoding": max(0.0, spent.decode_seconds - spent.read_seconds),
        "resizing": spent.geometry_seconds,
        "changing colours": spent.photometric_seconds,
    }
    shares = {name: seconds / spent.thread_seconds for name, seconds in busy.items()}
    return {**shares, "idle": max(0.0, 1 - sum(shares.values()))}
