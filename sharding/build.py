"""Images into verified, equal, shuffled WebDataset shards.

    python -m sharding.build --out /data/shards                    # ILSVRC/imagenet-1k, train
    python -m sharding.build --dataset demo --out data/demo        # generated images, no network

Stopped or killed at any point, the same command continues and ends with the same bytes.
"""

import contextlib
import errno
import json
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from sharding.arguments import Layout, parse
from sharding.command import UserError, command, say
from sharding.encode import BadImageError, Policy, encode
from sharding.engine import Engine, in_process, processes
from sharding.finish import TAIL_READY, finish, write_quarantine
from sharding.manifest import MANIFEST_COPY, MANIFEST_FILE, QUARANTINE_FILE, Manifest
from sharding.part import BuildContext, PartRecord, record_name, write_part
from sharding.plan import Part, plan_parts
from sharding.progress import bar, track
from sharding.select import is_part, select
from sharding.source import Source, SourceSpec, is_hub_id, open_source, peek_source
from sharding.storage import STATE, Directory

OPTIONS_FILE = f"{STATE}/options.json"
_OURS = re.compile(r"\.build/|lane-\d+/[^/]+\.(tar|idx)$|(manifest(\.copy)?\.json|index\.arrow|quarantine\.jsonl)$")
_OVERHEAD_BYTES = 2048  # of a sample in an archive: two headers, a label, padding
_PROCESS_BYTES = 104e6  # anonymous memory, measured
_ROW_BYTES = 93  # of the main process while it assembles the index, measured at 14 million rows


def build(
    spec: SourceSpec,
    out: Directory,
    layout: Layout,
    policy: Policy,
    *,
    engine: Engine = in_process,
    max_quarantine: float = 0.01,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Build, or finish building, the shards of one data set in ``out``.

    Raises UserError when the data cannot be opened, for foreign files, changed options or data, a different build at
    work, or more than ``max_quarantine`` (a fraction) refused images.
    """
    options = {"source": asdict(spec), "policy": asdict(policy), "layout": asdict(layout)}
    if (manifest := _check_out(out, options)) is None:
        source = select(open_source(spec, cache), spec, layout.seed)
        context = BuildContext(source, policy, out, prefix=re.sub(r"\W.*", "", spec.split) or "data")
        if source.no_labels:
            say("sharding.build", source.no_labels)
        with out.lock():
            samples_per_shard = _start_or_continue(context, layout, options)
            parts = plan_parts(len(source), layout.lanes, samples_per_shard, layout.seed)
            records = _records(context, parts, engine, progress, limit=max_quarantine * len(source))
            origin = {**options["source"], "num_rows": len(source), "hub_commit": source.revision}
            manifest = finish(context, records, samples_per_shard, engine, source=origin, layout=options["layout"])
    else:
        say("sharding.build", f"{out}: already complete, nothing to do")
    out.remove_state()
    return manifest


def _check_out(out: Directory, options: dict[str, dict[str, Any]]) -> Manifest | None:
    """The manifest when these very shards are built already; refuses an output made of anything else."""
    if out.is_local and out.local_path().is_file():
        raise UserError(f"{out}: is a file; --out is a directory")
    sizes = out.sizes()
    if foreign := sorted(name for name in sizes if not _OURS.match(name)):
        raise UserError(f"{out}: holds files of others, such as {foreign[0]!r}; choose an empty --out")
    if MANIFEST_FILE in sizes or (MANIFEST_COPY in sizes and OPTIONS_FILE not in sizes):
        manifest = Manifest.load(out)
        before = {"source": manifest.source, "policy": manifest.policy, "layout": manifest.layout}
        _refuse_changes(out, before, options)
        return manifest
    if OPTIONS_FILE in sizes:
        _refuse_changes(out, json.loads(out.read(OPTIONS_FILE)), options)
    elif any(not name.startswith(STATE) for name in sizes):
        raise UserError(
            f"{out}: holds shards without a manifest or a build to continue; "
            "the same command with an empty --out makes the same files again, its manifest.json among them"
        )
    return None


def _refuse_changes(out: Directory, before: dict[str, Any], now: dict[str, dict[str, Any]]) -> None:
    for group, values in now.items():
        for name, value in values.items():
            if (old := before[group].get(name)) != value:
                what = f"data whose {name} is" if group == "data" else f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{out}: was started with {what} {old}, now it is {value}; "
                    "repeat the first command on the same data, or choose another --out"
                )


def _start_or_continue(context: BuildContext, layout: Layout, options: dict[str, dict[str, Any]]) -> int:
    """Note down options and data, or see that they are those of the first run. Returns the samples per shard."""
    source, out = context.source, context.out
    if len(source) < layout.lanes:
        raise UserError(f"{len(source)} images cannot fill {layout.lanes} equal lanes: choose a smaller --lanes")
    mean_bytes, digest = source.probe()
    samples_per_shard = _samples_per_shard(source, context.policy, layout, mean_bytes)
    data = {
        "number of rows": len(source),
        "checksum of evenly spaced rows": digest,
        "number of rows per shard": samples_per_shard,
    }
    if out.exists(OPTIONS_FILE):
        _refuse_changes(out, json.loads(out.read(OPTIONS_FILE)), {**options, "data": data})
    else:
        out.write(OPTIONS_FILE, json.dumps({**options, "data": data}).encode())
    return samples_per_shard


def _samples_per_shard(source: Source, policy: Policy, layout: Layout, mean_bytes: float) -> int:
    """From the mean size of evenly spaced images: as they are, or as the policy re-encodes them."""
    mean = mean_bytes if policy.short_side is None else _try_out(source, policy)[0] or mean_bytes
    return max(1, round(layout.shard_mb * 1e6 / (mean + _OVERHEAD_BYTES)))


def _try_out(source: Source, policy: Policy, num_probes: int = 64) -> tuple[float, float]:
    """Mean bytes in the shards (0: none of them is usable) and seconds of one core, of evenly spaced images."""
    sizes, start = [], time.perf_counter()
    rows = range(0, len(source), max(1, len(source) // num_probes))
    for row in rows:
        with contextlib.suppress(BadImageError):
            sizes.append(len(encode(source.read(row)[0], policy).data))
    return sum(sizes) / max(1, len(sizes)), (time.perf_counter() - start) / max(1, len(rows))


def _records(
    context: BuildContext, parts: Sequence[Part], engine: Engine, progress: Progress | None, limit: float
) -> list[PartRecord]:
    """The records of all parts, in order; writes the parts that have none yet."""
    records = _finished(context.out, parts)
    todo = [part for part in parts if record_name(part) not in records]
    written: Iterator[tuple[str, PartRecord]] = track(
        engine(write_part, context, todo),
        progress,
        "sharding",
        total=len(context.source),
        done=len(context.source) - sum(len(part.rows) for part in todo),
        size=lambda result: (result[1].num_rows, result[1].source_bytes),
    )
    num_quarantined = sum(len(record.quarantined) for record in records.values())
    for name, record in [] if num_quarantined > limit else written:
        records[name] = record
        num_quarantined += len(record.quarantined)
        if num_quarantined > limit:
            break
    _check_yield(context, list(records.values()), num_quarantined, limit, max(part.lane for part in parts) + 1)
    return [records[record_name(part)] for part in parts]


def _finished(out: Directory, parts: Sequence[Part]) -> dict[str, PartRecord]:
    """Records, by name, of the parts that are done. Once shards are being levelled, all are."""
    sizes = out.sizes()
    found = {name: PartRecord.from_bytes(out.read(name)) for part in parts if (name := record_name(part)) in sizes}
    done = TAIL_READY in sizes
    return {name: r for name, r in found.items() if done or sizes.get(r.shard.path) == r.shard.num_bytes}


def _check_yield(
    context: BuildContext, records: list[PartRecord], num_quarantined: int, limit: float, num_lanes: int
) -> None:
    """Refuses to go on with too many unusable images, or with fewer usable ones than lanes; says why they are."""
    out, num_rows = context.out, len(context.source)
    if num_quarantined > limit:
        first = next(q for record in records for q in record.quarantined)
        write_quarantine(out, records)
        raise UserError(
            f"{num_quarantined} of {num_rows} images cannot be used, more than the {limit:.0f} that --max-quarantine "
            f"allows. Reasons so far are in {out}/{QUARANTINE_FILE}; the first is {first['key']}: {first['reason']}. "
            "If they may be left out, run again with a larger --max-quarantine"
        )
    if (num_samples := num_rows - num_quarantined) < num_lanes:
        write_quarantine(out, records)
        raise UserError(
            f"only {num_samples} of {num_rows} images can be used, fewer than --lanes; "
            f"the reasons are in {out}/{QUARANTINE_FILE}"
        )


def _report(manifest: Manifest, out: Directory, seconds: float) -> str:
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    changed = ", ".join(f"{count} {change}" for change, count in manifest.changes.items()) or "none"
    return (
        f"{out}: {manifest.num_samples} images in {len(manifest.shards)} shards, {num_bytes / 1e6:.1f} MB, "
        f"{manifest.num_lanes} lanes of {manifest.num_samples_per_lane}, {len(manifest.class_names)} classes\n"
        f"read {manifest.num_read}, quarantined {manifest.num_quarantined}, surplus {manifest.num_surplus}, "
        f"changed: {changed}\nfingerprint {manifest.fingerprint}, {seconds:.1f} s"
    )


def _explain(error: Exception, out: Directory) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{out}: no space left on the disk; free some, then the same command continues"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"{out}: cannot be written, its file system is read-only; choose a different --out"
    if isinstance(error, BrokenProcessPool):
        return f"a worker process was killed (out of memory? try fewer --workers); the same command continues {out}"
    return str(error)


@command("sharding.build")
def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(__doc__, arguments)
    folders = [f"{args.out}/{spec.split}" for spec in args.specs] if args.specs[1:] else [args.out]
    builds = list(zip(args.specs, map(Directory.at, folders), strict=True))
    for spec, out in [] if args.dry_run else builds[1:]:
        if not out.exists(MANIFEST_FILE):  # what is wrong with it is said before the first, which may take hours
            select(open_source(spec, args.cache), spec, args.layout.seed)
    for spec, out in builds:
        print(_dry_run(spec, out, args) if args.dry_run else _run(spec, out, args))
    return 0


def _dry_run(spec: SourceSpec, out: Directory, args: Namespace) -> str:
    """What the build will need, from a few images."""
    if is_hub_id(spec.dataset) and spec.split.isidentifier() and not is_part(spec):
        source, num_images = peek_source(spec, args.cache)
    else:
        source = select(open_source(spec, args.cache), spec, args.layout.seed)
        num_images = len(source)
    size, seconds = _try_out(source, args.policy)
    num_bytes = num_images * (size + _OVERHEAD_BYTES)
    num_shards = args.lanes * max(1, round(num_bytes / args.lanes / args.shard_mb / 1e6))
    memory = (args.workers + 1) * _PROCESS_BYTES + num_images * _ROW_BYTES
    downloads = ""
    if is_hub_id(spec.dataset):
        cached = 2 * num_images * source.probe()[0]
        downloads = f", and {cached / 1e9:,.1f} GB of downloads until they are built"
    return (
        f"{out}: {num_images:,} images of {len(source.class_names):,} classes, about {size / 1e3:,.0f} kB each\n"
        f"disk: {num_bytes / 1e9:,.1f} GB in about {num_shards:,} shards{downloads}\n"
        f"time: {num_images * seconds / args.workers / 60:,.1f} minutes with {args.workers} workers, if the source is "
        f"read as fast as now\nmemory: {memory / 1e9:,.1f} GB"
    )


def _run(spec: SourceSpec, out: Directory, args: Namespace) -> str:
    start = time.perf_counter()
    try:
        with bar() as progress:
            manifest = build(
                spec,
                out,
                args.layout,
                args.policy,
                engine=processes(args.workers),
                max_quarantine=args.max_quarantine,
                cache=args.cache,
                progress=progress,
            )
    except (OSError, BrokenProcessPool) as error:
        raise UserError(_explain(error, out)) from None
    except KeyboardInterrupt:
        say("sharding.build", f"the same command continues {out}")
        raise
    return _report(manifest, out, time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
