"""A stream onto local disk, in bounded memory, so that a global shuffle can reach every row.

Segments are Arrow stream files, each with the stream's state after it, so an interrupted download goes on
where its last whole segment ended.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import xxhash
from rich.progress import Progress

from sharding.progress import track
from sharding.storage import Directory

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from sharding.source import SourceSpec

SEGMENT_BYTES = 256_000_000  # of encoded images, at least
_BATCH_ROWS = 64  # held in memory at a time
_COMPLETE = "complete.json"


def spool_folder(spec: "SourceSpec", cache: Path | None) -> Path:
    """Where the stream of `spec` is kept."""
    import datasets

    name = xxhash.xxh3_64_hexdigest(json.dumps(asdict(spec)).encode())
    return (cache or Path(datasets.config.HF_DATASETS_CACHE)) / "parallax-spool" / name


def spool(
    stream: "IterableDataset", spec: "SourceSpec", cache: Path | None, progress: Progress | None = None
) -> "Dataset":
    """The stream as a memory-mapped data set; downloads what is not there yet."""
    from datasets import Dataset, concatenate_datasets

    folder = Directory.at(spool_folder(spec, cache))
    with folder.lock():
        if not folder.exists(_COMPLETE):
            _download(stream.with_format("arrow"), folder, progress)
            folder.write(_COMPLETE, b"{}\n")
    if not (segments := _segments(folder)):
        raise ValueError("the stream is empty")
    return concatenate_datasets([Dataset.from_file(str(folder.local_path(f"{s}.arrow"))) for s in segments])


def discard_spool(spec: "SourceSpec", cache: Path | None) -> None:
    shutil.rmtree(spool_folder(spec, cache), ignore_errors=True)


def _segments(folder: Directory) -> list[str]:
    """Names of whole segments, in order."""
    return sorted(n.removesuffix(".json") for n in folder.sizes() if n.startswith("segment-") and n.endswith(".json"))


def _download(stream: "IterableDataset", folder: Directory, progress: Progress | None) -> None:
    """Write the rest of the stream as segments."""
    if segments := _segments(folder):
        stream.load_state_dict(json.loads(folder.read(f"{segments[-1]}.json")))
    schema, number = stream.features.arrow_schema, len(segments)
    batches = stream.iter(batch_size=_BATCH_ROWS)
    tables = track(batches, progress, "streaming", size=lambda table: (len(table), table.nbytes))
    table = next(tables, None)
    while table is not None:
        name, num_bytes = f"segment-{number:06d}", 0
        with folder.publish(f"{name}.arrow") as path, pa.ipc.new_stream(path, schema) as writer:
            while table is not None and num_bytes < SEGMENT_BYTES:
                writer.write_table(table.cast(schema))
                num_bytes += table.nbytes
                state = stream.state_dict()
                table = next(tables, None)
        folder.write(f"{name}.json", json.dumps(state).encode())
        number += 1
