"""Which images an evaluation is made on, and how they are seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.plan import Ints
from pipeline.random import CHOICE_STREAM, key_from_seed, permute
from pipeline.views import ViewSpec, preset
from sharding.command import UserError
from sharding.manifest import ShardSet, open_shards


@dataclass(frozen=True)
class Images:
    """The images of one side of an evaluation: ``ids`` of the shards."""

    shards: ShardSet
    ids: Ints

    def describe(self) -> dict[str, Any]:
        where, fingerprint = str(self.shards.directory), self.shards.manifest.fingerprint
        return {"shards": where, "fingerprint": fingerprint, "num_images": len(self.ids)}


def choose_images(train: str, test: str | None, *, labelled: bool = True) -> tuple[Images, Images]:
    """Without test shards every fifth training image is held back, which the sharder's shuffle made a uniform choice.

    Raises `UserError` if test images are training images and, where they are to be ``labelled``, unless all are, with
    the same two classes or more on both sides.
    """
    train_set = open_shards(train)
    test_set = open_shards(test) if test else train_set
    if test and test_set.manifest.fingerprint == train_set.manifest.fingerprint:
        raise UserError(
            f"--test {test}: expected other images than those of {train_set.directory}, found the same, "
            "so that every image would be its own nearest neighbour; leave --test out to hold a part of them back"
        )
    ids, all_ids = (np.arange(shards.manifest.num_samples) for shards in (train_set, test_set))
    if not test:
        ids, all_ids = ids[ids % 5 != 0], ids[ids % 5 == 0]
    chosen = Images(train_set, ids), Images(test_set, all_ids)
    if labelled:
        _check_labels(*chosen)
    return chosen


def choose_fraction(images: Images, fraction: float, seed: int) -> Images:
    """Of each class the first of a shuffle, as many as ``fraction`` says, but one at least. With the same seed a
    smaller fraction takes a part of what a larger one takes."""
    labels, key = images.shards.index.label[images.ids], key_from_seed(seed)
    chosen = []
    for label in np.unique(labels):
        of_class = images.ids[labels == label]
        first = np.arange(max(1, round(fraction * len(of_class))))
        chosen.append(of_class[permute(first, len(of_class), key, CHOICE_STREAM + int(label), 0)])
    return Images(images.shards, np.sort(np.concatenate(chosen)))


def _check_labels(train: Images, test: Images) -> None:
    expected, found = train.shards.manifest.class_names, test.shards.manifest.class_names
    if found != expected:
        raise UserError(
            f"--test {test.shards.directory}: expected the {len(expected)} classes of {train.shards.directory} "
            f"({', '.join(expected[:5])}), found {len(found)} classes ({', '.join(found[:5])}); name the training "
            "images of the same data set with --train"
        )
    for images in (train, test):
        labels = images.shards.index.label[images.ids]
        missing, num_classes = int((labels < 0).sum()), len(np.unique(labels))
        if missing or (num_classes < 2 and images is train):
            raise UserError(
                f"{images.shards.directory}: expected labelled images of 2 classes or more, found {missing} of "
                f"{len(labels)} without a label (a folder with a single class counts as unlabelled) and {num_classes} "
                "in all; name labelled shards with --train and --test"
            )


def enlarged(size: int) -> int:
    """What an image's short side is resized to before the centre crop of ``size``: 256 for 224, as on ImageNet."""
    return round(size * 256 / 224)


def evaluation_view(views: Sequence[ViewSpec], shards: ShardSet) -> ViewSpec:
    """The centre crop to evaluate with, of the largest view's size and interpolation.

    Small images (at least half of them no larger than the view) are resized to its size itself, so that square ones are
    seen whole, as is usual on CIFAR; others are `enlarged`.
    """
    how = _of_largest(views)
    small = np.median(np.minimum(shards.index.height, shards.index.width)) <= how["size"]
    return preset("eval", resize=how["size"] if small else enlarged(how["size"]), **how)[0]


def augmented_view(views: Sequence[ViewSpec]) -> ViewSpec:
    """A random resized crop and a flip, of the largest view's size and interpolation."""
    return preset("supervised", **_of_largest(views))[0]


def _of_largest(views: Sequence[ViewSpec]) -> dict[str, Any]:
    largest = max(views, key=lambda view: view.size)
    return {name: getattr(largest, name) for name in ("size", "interpolation", "mean", "std")}
