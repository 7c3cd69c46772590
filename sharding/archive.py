"""ILSVRC's original archives, read where they lie: a tar of images, or of one tar a class. Nothing is extracted."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from sharding.command import UserError

if TYPE_CHECKING:
    from datasets import Dataset

ARCHIVES = {
    "train": "ILSVRC2012_img_train.tar",
    "validation": "ILSVRC2012_img_val.tar",
    "val": "ILSVRC2012_img_val.tar",
    "test": "ILSVRC2012_img_test_v10102019.tar",
}


def find_archive(dataset: str, split: str) -> Path | None:
    """The archive itself, or that of the split in a folder; None where there is none.

    Raises UserError for archives of ILSVRC of which none is that of the split.
    """
    path, wanted = Path(dataset), ARCHIVES.get(split, "an archive")
    if path.is_file() and path.name not in ARCHIVES.values():
        return path if path.suffix == ".tar" else None
    found = {file.name: file for file in (path, *(path / name for name in ARCHIVES.values())) if file.is_file()}
    if found and wanted not in found:
        raise UserError(f"{dataset}: expected {wanted} for the split {split!r}, found {', '.join(found)}; see --split")
    return found.get(wanted)


def list_archive(path: Path, cache: str | None) -> "Dataset":
    """Columns ``image`` (where its bytes lie) and ``label`` (WordNet id). Headers are read once, then cached."""
    from datasets import Dataset, Features, Value

    place = {"archive": Value("string"), "offset": Value("int64"), "size": Value("int64"), "path": Value("string")}
    found = path.stat()
    return Dataset.from_generator(
        _images,
        features=Features({"image": place, "label": Value("string")}),
        gen_kwargs={"path": str(path.resolve())},
        fingerprint=xxhash.xxh3_64_hexdigest(f"1 {path.resolve()} {found.st_size} {found.st_mtime_ns}".encode()),
        cache_dir=cache,
    )


def _images(path: str) -> Iterator[dict[str, Any]]:
    def row(member: tarfile.TarInfo, start: int, wnid: str | None) -> dict[str, Any]:
        image = {"archive": path, "offset": start + member.offset_data, "size": member.size, "path": member.name}
        return {"image": image, "label": wnid}

    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.name.endswith(".tar"):
                with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                    yield from (row(m, member.offset_data, Path(member.name).stem) for m in inner if m.isfile())
            elif Path(member.name).suffix.lower() in (".jpeg", ".jpg", ".png"):
                yield row(member, 0, None)
            elif member.isfile():
                raise ValueError(f"{path}: holds {member.name!r}: expected images, or a tar of images for each class")
