"""What a frame of planes shows, and what becomes of the shards that hold such frames."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.testing import assert_array_equal
from PIL import Image

from sharding.encode import BadImageError, Policy, encode
from sharding.inspect import main as inspect
from sharding.manifest import Index, Manifest, ShardSet, open_shards
from sharding.planes import Plane, encode_planes, frame_size, open_image, split_planes, to_rgb
from sharding.verify import main as verify
from tests.sharding.conftest import build_shards, encoded, files, jpeg, picture, write_parquet

SIDES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 33]
POLICY = Policy(short_side=40, decode_free=True)


def noise(height: int, width: int) -> Plane:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width), np.uint8)


def decoded_alone(plane: Plane) -> Plane:
    """A plane as a JPEG of quality 100 brings it back: its quantisation, all ones, is the same for all components."""
    return simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(plane[..., None], 100, "GRAY"), "GRAY")[..., 0]


def halved(side: int) -> int:
    return (side + 1) // 2


@pytest.mark.parametrize("height", SIDES)
@pytest.mark.parametrize("width", SIDES)
def test_pixels_are_those_that_libjpeg_turbo_shows_of_the_same_planes(height: int, width: int) -> None:
    """Coded as whole blocks, which leaves nothing to the encoder's padding; then the header gets the image's size."""
    padded_height, padded_width = -(-height // 16) * 16, -(-width // 16) * 16
    half = padded_height // 2, padded_width // 2
    planes = noise(padded_height, padded_width), noise(*half), 255 - noise(*half)[::-1]
    coded = simplejpeg.encode_jpeg_yuv_planes(*map(np.ascontiguousarray, planes), 100)
    sizes = [side.to_bytes(2, "big") for side in (padded_height, padded_width, height, width)]
    coded = coded.replace(b"\x08" + sizes[0] + sizes[1] + b"\x03", b"\x08" + sizes[2] + sizes[3] + b"\x03", 1)
    luma, cb, cr = map(decoded_alone, map(np.ascontiguousarray, planes))
    chroma = np.s_[: halved(height), : halved(width)]
    found = to_rgb(luma[:height, :width], cb[chroma], cr[chroma])
    assert_array_equal(found, simplejpeg.decode_jpeg(coded))
    assert_array_equal(found, np.asarray(Image.open(io.BytesIO(coded)).convert("RGB")))


def test_planes_are_jfifs_and_chroma_the_mean_of_what_it_covers() -> None:
    pixels = np.stack([noise(5, 7), noise(5, 8)[:, :7], noise(5, 9)[:, :7]], axis=-1)
    luma, *chroma = split_planes(np.frombuffer(encode_planes(pixels), np.uint8), 5, 7)
    red, green, blue = np.moveaxis(pixels.astype(float), -1, 0)
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    assert np.abs(luma - y).max() <= 0.51
    for plane, full in zip(chroma, (128 + (blue - y) / 1.772, 128 + (red - y) / 1.402), strict=True):
        assert plane.shape == (3, 4)
        for row, column in np.ndindex(3, 4):
            covered = full[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert abs(plane[row, column] - covered.mean()) <= 0.51


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (5, 1), (6, 9)])
def test_a_grey_image_comes_back_as_it_was(size: tuple[int, int]) -> None:
    grey = noise(*size)
    assert_array_equal(np.asarray(open_image(encode_planes(grey))), np.repeat(grey[..., None], 3, axis=-1))


def test_a_frame_is_a_video_of_one_picture_to_other_programs(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    pixels = np.asarray(picture(3, 48, 64))
    (tmp_path / "frame.y4m").write_bytes(encode_planes(pixels))
    video = cv2.VideoCapture(str(tmp_path / "frame.y4m"))
    found, shown = video.read()
    assert found
    assert not video.read()[0]
    assert np.abs(shown[..., ::-1].astype(int) - pixels).mean() < 3  # by a conversion of their own


@pytest.mark.parametrize(
    ("change", "size"),
    [
        (lambda data: data[:-1], (6, 9)),
        (lambda data: data + b"\0", (6, 9)),
        (lambda data: data, (9, 6)),
        (lambda data: data.replace(b"C420jpeg", b"C420mpg2"), (6, 9)),
        (lambda data: data[:0], (6, 9)),
    ],
)
def test_what_is_no_frame_of_the_size_is_refused(change, size) -> None:  # type: ignore[no-untyped-def]
    data = np.frombuffer(change(encode_planes(noise(6, 9))), np.uint8)
    with pytest.raises(ValueError, match=r"of a frame of \d x \d pixels, found \d+ that begin with"):
        split_planes(data, *size)


def test_a_frame_knows_its_size() -> None:
    assert frame_size(encode_planes(noise(6, 9))) == (6, 9)
    with pytest.raises(ValueError, match="expected a frame of YUV4MPEG2, found"):
        frame_size(jpeg(0))


def test_every_image_becomes_planes_of_its_pixels() -> None:
    large, small, grey = picture(1, 80, 101), picture(2, 33, 64), picture(3, 20, 20).convert("L")
    turned = Image.Exif()
    turned[0x0112] = 6
    cases = {
        encoded(large, "PNG"): np.asarray(large.resize((50, 40), Image.Resampling.BICUBIC)),
        encoded(small, "PNG"): np.asarray(small),
        encoded(grey): np.asarray(Image.open(io.BytesIO(encoded(grey)))),
        encoded(small, exif=turned): np.rot90(np.asarray(Image.open(io.BytesIO(encoded(small)))), -1),
        jpeg(4): simplejpeg.decode_jpeg(encode(jpeg(4), Policy(short_side=48)).data),  # not larger, so kept
    }
    for data, pixels in cases.items():
        policy = Policy(short_side=48, decode_free=True) if data == jpeg(4) else POLICY
        image = encode(data, policy)
        assert image.data == encode_planes(np.ascontiguousarray(pixels))
        assert (image.height, image.width) == pixels.shape[:2]
        assert image.change
    with pytest.raises(BadImageError, match="Premature end"):
        encode(jpeg(5)[:-30], POLICY)
    with pytest.raises(BadImageError, match="format not supported: planes of decode-free shards"):
        encode(encode_planes(noise(6, 9)), POLICY)


@pytest.fixture(scope="module")
def decode_free(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """24 images, three of them refused, so that lanes are levelled."""
    folder = tmp_path_factory.mktemp("decode-free")
    images = [jpeg(number) if number % 8 else jpeg(number)[:-30] for number in range(24)]
    source = write_parquet(folder / "source", images, [number % 3 for number in range(24)])
    build_shards(source, folder / "out", lanes=2, policy=POLICY, max_quarantine=0.2)
    return open_shards(folder / "out")


def stored(shards: ShardSet) -> list[tuple[bytes, int]]:
    index = shards.index
    paths = [shards.manifest.shards[number].path for number in index.shard]
    starts = zip(paths, index.offset.tolist(), index.size.tolist(), strict=True)
    images = [shards.directory.read(path, start, start + size) for path, start, size in starts]
    return list(zip(images, index.label.tolist(), strict=True))


def test_shards_hold_the_planes_of_the_source(decode_free: ShardSet) -> None:
    index = decode_free.index
    assert decode_free.manifest.is_decode_free
    assert len(index) == 20
    for row, (data, label) in enumerate(stored(decode_free)):
        number = int(index.source_row[row])
        assert data == encode(jpeg(number), POLICY).data
        assert label == number % 3
        assert frame_size(data) == (index.height[row], index.width[row]) == (40, 53)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves archives open
def test_webdataset_and_dali_read_the_bytes(decode_free: ShardSet) -> None:
    import webdataset
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    tars = [str(decode_free.root / shard.path) for shard in decode_free.manifest.shards]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [(sample["y4m"], int(sample["cls"])) for sample in samples] == stored(decode_free)
    indices = [tar.removesuffix(".tar") + ".idx" for tar in tars]
    pipeline = Pipeline(batch_size=len(samples), num_threads=1, device_id=None)
    with pipeline:
        reader: Any = fn.readers.webdataset(paths=tars, index_paths=indices, ext=["y4m", "cls"])
        pipeline.set_outputs(*reader)
    pipeline.build()
    outputs: Any = pipeline.run()
    frames, labels = outputs
    assert [(bytes(frames.at(i)), int(bytes(labels.at(i)))) for i in range(len(labels))] == stored(decode_free)


@pytest.mark.parametrize("damage", ["pixel", "header", "archive", "index.arrow", "dali index"])
def test_damage_is_named_and_repaired(
    decode_free: ShardSet, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(decode_free.root, root)
    index, shards = Index.load(root), Manifest.load(root).shards
    path, start = root / shards[index.shard[7]].path, int(index.offset[7])
    if damage in ("pixel", "header"):
        with path.open("r+b") as file:
            file.seek(start + (int(index.size[7]) - 5 if damage == "pixel" else 0))
            file.write(b"?")
    else:
        {"archive": path, "dali index": path.with_suffix(".idx")}.get(damage, root / damage).unlink()
    assert verify([str(root), "--workers", "1"]) == 1
    named = {"pixel": "its checksum is not the index's", "header": "begin with b'\\?UV4MPEG2"}.get(damage, "is missing")
    sample = f"sample {index.source_row[7]:08d}: .*" if damage in ("pixel", "header") else ""
    assert re.search(sample + named, capsys.readouterr().out)
    assert verify([str(root), "--repair", "--decode", "--workers", "1"]) == 0
    assert files(root) == files(decode_free.root)


def test_the_contact_sheet_shows_the_images(decode_free: ShardSet, tmp_path: Path) -> None:
    assert inspect([str(decode_free.root), "--out", str(tmp_path)]) == 0
    sheet = np.asarray(Image.open(tmp_path / "contact-sheet.png"))
    shown = np.asarray(open_image(stored(decode_free)[0][0]))
    assert np.abs(sheet[:95, :126].astype(float).mean(axis=(0, 1)) - shown.mean(axis=(0, 1))).max() < 3
