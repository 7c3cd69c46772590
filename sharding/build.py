"""Images into verified, equal, shuffled WebDataset shards.

    python -m sharding.build --out /data/shards                    # ILSVRC/imagenet-1k, train
    python -m sharding.build --dataset demo --out data/demo        # generated images, no network

Stopped or killed at any point, the same command continues and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sharding.encode import BadImageError, Policy, encode
from sharding.engine import Engine, in_process, processes
from sharding.finish import TAIL_READY, finish, write_quarantine
from sharding.manifest import MANIFEST_FILE, QUARANTINE_FILE, Manifest, ShardError
from sharding.part import Job, Record, record_name, write_part
from sharding.plan import Part, plan_parts
from sharding.source import Source, SourceError, SourceSpec, open_source
from sharding.storage import STATE, Directory

OPTIONS_FILE = f"{STATE}/options.json"
_OURS = re.compile(r"\.build/|lane-\d+/[^/]+\.(tar|idx)$|(manifest\.json|index\.arrow|quarantine\.jsonl)$")


class BuildError(ValueError):
    """The build cannot start or go on; the message says what to do."""


@dataclass(frozen=True)
class Layout:
    """How samples are laid out. Recorded in the manifest."""

    lanes: int = 8
    shard_mb: float = 256  # target size, in 10^6 bytes
    seed: int = 0


def build(
    spec: SourceSpec,
    out: Directory,
    layout: Layout,
    policy: Policy,
    *,
    engine: Engine = in_process,
    max_quarantine: float = 0.01,
    progress: Progress | None = None,
) -> Manifest:
    """Build, or finish building, the shards of one data set in `out`.

    Raises:
        SourceError: the data cannot be opened.
        BuildError: foreign files, changed options, or more than `max_quarantine` (a fraction) refused images.
    """
    options = {"source": asdict(spec), "policy": asdict(policy), "layout": asdict(layout)}
    if (built := _check_out(out, options)) is not None:
        return built
    source = open_source(spec)
    job = Job(source, policy, out, prefix=re.sub(r"\W.*", "", spec.split) or "data")
    samples_per_shard = _samples_per_shard(source, policy, layout)
    parts = plan_parts(len(source), layout.lanes, samples_per_shard, layout.seed)
    out.write(OPTIONS_FILE, json.dumps(options).encode())
    records = _records(job, parts, engine, progress, limit=max_quarantine * len(source))
    manifest = finish(job, records, samples_per_shard, engine, source=asdict(spec), layout=asdict(layout))
    out.remove_state()
    return manifest


def _check_out(out: Directory, options: dict[str, Any]) -> Manifest | None:
    """The manifest when these very shards are built already; refuses an output made of anything else."""
    sizes = out.sizes()
    if foreign := sorted(name for name in sizes if not _OURS.match(name)):
        raise BuildError(f"{out}: holds files of others, such as {foreign[0]!r}; choose an empty --out")
    if MANIFEST_FILE in sizes:
        manifest = Manifest.load(out)
        before = {"source": manifest.source, "policy": manifest.policy, "layout": manifest.layout}
    elif OPTIONS_FILE in sizes:
        manifest, before = None, json.loads(out.read(OPTIONS_FILE))
    elif any(not name.startswith(STATE) for name in sizes):
        raise BuildError(f"{out}: holds shards without a manifest or a build to continue; choose an empty --out")
    else:
        return None
    for group, values in options.items():
        for name, value in values.items():
            if before[group].get(name) != value:
                raise BuildError(
                    f"{out}: was started with --{name.replace('_', '-')} {before[group].get(name)}, "
                    f"now it is {value}; repeat the first command, or choose another --out"
                )
    return manifest


def _samples_per_shard(source: Source, policy: Policy, layout: Layout) -> int:
    """From the mean size of evenly spaced images: as they are, or as the policy re-encodes them."""
    if len(source) == 0:
        raise BuildError("the data set is empty")
    mean = source.mean_bytes() if policy.short_side is None else _mean_encoded_bytes(source, policy)
    return max(1, round(layout.shard_mb * 1e6 / (mean + 2048)))  # two headers, a label, padding


def _mean_encoded_bytes(source: Source, policy: Policy, num_probes: int = 64) -> float:
    sizes = []
    for row in range(0, len(source), max(1, len(source) // num_probes)):
        try:
            sizes.append(len(encode(source.read(row)[0], policy).data))
        except BadImageError:
            continue
    return sum(sizes) / len(sizes) if sizes else source.mean_bytes()


def _records(job: Job, parts: Sequence[Part], engine: Engine, progress: Progress | None, limit: float) -> list[Record]:
    """The records of all parts, in order; writes the parts that have none yet."""
    records: dict[str, Record] = {}
    sizes = job.out.sizes()
    levelling = TAIL_READY in sizes
    for part in parts:
        name = record_name(part)
        if name in sizes:
            record = Record.from_bytes(job.out.read(name))
            if levelling or sizes.get(record.shard.path) == record.shard.num_bytes:
                records[name] = record
    todo = [part for part in parts if record_name(part) not in records]
    names = {(part.lane, part.number): record_name(part) for part in parts}
    for part, record in _progress(_write(job, todo, engine), parts, records, progress):
        records[names[part.lane, part.number]] = record
        if sum(len(r.quarantined) for r in records.values()) > limit:
            _too_many(job, list(records.values()), sum(len(p.rows) for p in parts), limit)
    return [records[record_name(part)] for part in parts]


def _write(job: Job, parts: Sequence[Part], engine: Engine) -> Iterator[tuple[Part, Record]]:
    yield from engine(_write_named, job, parts)


def _write_named(job: Job, part: Part) -> tuple[Part, Record]:
    return part, write_part(job, part)


def _progress(
    results: Iterator[tuple[Part, Record]],
    parts: Sequence[Part],
    done: dict[str, Record],
    progress: Progress | None,
) -> Iterator[tuple[Part, Record]]:
    """Pass results on, showing images done and the speed of this run."""
    if progress is None:
        yield from results
        return
    start, images, num_bytes = time.perf_counter(), 0, 0
    before = sum(r.shard.num_samples + len(r.quarantined) for r in done.values())
    bar = progress.add_task("sharding", total=sum(len(p.rows) for p in parts), completed=before, speed="")
    for part, record in results:
        images, num_bytes = images + len(part.rows), num_bytes + record.source_bytes
        seconds = time.perf_counter() - start
        speed = f"{images / seconds:.0f} images/s, {num_bytes / 1e6 / seconds:.0f} MB/s"
        progress.update(bar, completed=before + images, speed=speed)
        yield part, record


def _too_many(job: Job, records: list[Record], num_rows: int, limit: float) -> None:
    write_quarantine(job.out, records)
    refused = [q for r in records for q in r.quarantined]
    raise BuildError(
        f"{len(refused)} of {num_rows} images cannot be used, more than the {limit:.0f} that "
        f"--max-quarantine allows. Reasons so far are in {job.out}/{QUARANTINE_FILE}, "
        f"the first: {refused[0]['key']}: {refused[0]['reason']}. "
        "If they may be left out, run again with a larger --max-quarantine"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sharding.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    spec, layout, policy = SourceSpec(), Layout(), Policy()
    add = parser.add_argument
    add("--dataset", default=spec.dataset, help="hub id, local folder, or 'demo' (default: %(default)s)")
    add("--out", required=True, help="directory to write; continues an unfinished one")
    add("--config", help="configuration of the data set")
    add("--split", default=spec.split, help="default: %(default)s")
    add("--revision", help="of the data set on the hub")
    add("--image-column", help="default: the only image column")
    add("--label-column", help="default: the only class label column, if any")
    add("--lanes", type=int, default=layout.lanes, help="equal groups of shards (default: %(default)s)")
    add("--shard-mb", type=float, default=layout.shard_mb, help="target size (default: %(default)s)")
    add("--seed", type=int, default=layout.seed, help="of the shuffle (default: %(default)s)")
    add("--short-side", type=int, help="re-encode larger images to this many pixels")
    add(
        "--quality",
        type=int,
        default=policy.quality,
        help="JPEG quality with --short-side (default: %(default)s)",
    )
    add(
        "--max-pixels",
        type=int,
        default=policy.max_pixels,
        help="refuse larger images (default: %(default)s)",
    )
    add(
        "--max-quarantine",
        type=float,
        default=0.01,
        help="fraction of unusable images to accept (default: 0.01)",
    )
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    args = parser.parse_args(argv)
    _check_ranges(parser, args)
    return args


def _check_ranges(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name, low, high in [
        ("lanes", 1, 10_000),
        ("shard_mb", 0.001, 100_000),
        ("seed", 0, 2**63),
        ("short_side", 8, 100_000),
        ("quality", 1, 100),
        ("max_pixels", 1, 2**40),
        ("max_quarantine", 0, 1),
        ("workers", 1, 10_000),
    ]:
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")


def _report(manifest: Manifest, out: Directory, seconds: float) -> str:
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    lines = [
        f"{out}: {manifest.num_samples} images in {len(manifest.shards)} shards, {num_bytes / 1e6:.1f} MB, "
        f"{manifest.num_lanes} lanes of {manifest.num_samples_per_lane}, {len(manifest.class_names)} classes",
        f"read {manifest.num_read}, quarantined {manifest.num_quarantined}, surplus {manifest.num_surplus}, "
        f"changed {manifest.changes or 'none'}",
        f"fingerprint {manifest.fingerprint}, {seconds:.1f} s ({manifest.num_read / seconds:.0f} images/s)",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    spec = SourceSpec(args.dataset, args.config, args.split, args.revision, args.image_column, args.label_column)
    layout = Layout(args.lanes, args.shard_mb, args.seed)
    policy = Policy(args.short_side, args.quality, max_pixels=args.max_pixels)
    engine = in_process if args.workers == 1 else processes(args.workers)
    out = Directory.at(args.out)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    start = time.perf_counter()
    try:
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            manifest = build(
                spec,
                out,
                layout,
                policy,
                engine=engine,
                max_quarantine=args.max_quarantine,
                progress=progress,
            )
    except (BuildError, ShardError, SourceError, OSError) as error:
        print(f"sharding.build: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sharding.build: stopped; the same command continues {out}", file=sys.stderr)
        return 130
    print(_report(manifest, out, time.perf_counter() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
