"""Vision features: equal to the live tower in any company, computed once, shared, and never read when damaged."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.template import Forked
from trainer.common.errors import DataError
from trainer.data import feature_store, features
from trainer.data.batches import Pixels
from trainer.data.feature_store import Store
from trainer.data.features import FORWARD_BATCH, Features, compute_or_open, default_folder, key_of
from trainer.model.base import Base, encode_images, load_base

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> Base:
    torch.set_num_threads(1)
    return load_base(str(tiny_checkpoint), dtype=torch.float32, device=CPU)


@pytest.fixture
def pixels(base: Base) -> Pixels:
    return Pixels(base.processor.image_processor)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of noise, more than two forward passes of them and no whole number of passes."""
    folder = tmp_path_factory.mktemp("images")
    g = torch.Generator().manual_seed(0)
    paths = []
    for number in range(2 * FORWARD_BATCH + 5):
        noise = torch.randint(0, 256, (80, 90, 3), generator=g, dtype=torch.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(noise.numpy()).save(paths[-1])
    return paths


Open = Callable[..., Features]


@pytest.fixture
def opened(tmp_path: Path, base: Base, pixels: Pixels) -> Open:
    """`opened(images)`: with the store in the test's folder."""

    def call(paths: list[Path], **options: Any) -> Features:
        return compute_or_open(tmp_path / "store", options.pop("base", base), paths, pixels, **options)

    return call


def all_of(found: Features, paths: list[Path]) -> torch.Tensor:
    return found.take(torch.tensor([found.index(path) for path in paths]))


def segments(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("store/*/segment-*.bin"))


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_are_the_towers_output(
    dtype: torch.dtype, tiny_checkpoint: Path, tmp_path: Path, images: list[Path]
) -> None:
    base = load_base(str(tiny_checkpoint), dtype=dtype, device=CPU)
    pixels = Pixels(base.processor.image_processor)
    found = compute_or_open(tmp_path, base, images, pixels)
    batch = torch.stack([pixels(path) for path in images[:FORWARD_BATCH]])
    live = encode_images(base.model, batch)
    taken = all_of(found, images[:FORWARD_BATCH])
    assert taken.dtype == dtype and torch.equal(taken, live)
    assert not torch.equal(taken[0], taken[1])
    assert found.shape == tuple(live.shape[1:])
    assert found.nbytes == len(images) * live[0].numel() * dtype.itemsize
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*.bin")) == found.nbytes
    again = compute_or_open(tmp_path, base, images, pixels)
    assert torch.equal(all_of(again, images), all_of(found, images))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_company(
    dtype: torch.dtype, tiny_checkpoint: Path, tmp_path: Path, images: list[Path]
) -> None:
    base = load_base(str(tiny_checkpoint), dtype=dtype, device=CPU)
    pixels = Pixels(base.processor.image_processor)
    whole = compute_or_open(tmp_path / "whole", base, images, pixels)
    for number, company in enumerate(([images[20]], images[18:23], images[::-1])):
        other = compute_or_open(tmp_path / str(number), base, company, pixels)
        assert other.computed == len(company)
        assert torch.equal(all_of(other, [images[20]]), all_of(whole, [images[20]]))


def test_every_pass_has_the_same_size(
    opened: Open, images: list[Path], monkeypatch: pytest.MonkeyPatch, base: Base
) -> None:
    sizes = []

    def encode(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        sizes.append((len(pixel_values), model.vision_model.training))
        return encode_images(model, pixel_values)

    monkeypatch.setattr(features, "encode_images", encode)
    base.model.train()
    try:
        opened(images)
        assert base.model.vision_model.training, "the mode is given back"
    finally:
        base.model.eval()
    assert sizes == [(FORWARD_BATCH, False)] * 3


def test_only_what_is_missing_is_computed(opened: Open, images: list[Path], tmp_path: Path) -> None:
    first = opened(images[:10])
    assert (first.computed, first.reused) == (10, 0)
    before = {file: file.stat().st_mtime_ns for file in segments(tmp_path)}
    steps: list[tuple[int, int]] = []
    more = opened(images[5:30], progress=lambda done, total: steps.append((done, total)))
    assert (more.computed, more.reused) == (20, 5)
    assert steps == [(5, 25), (21, 25), (25, 25)]
    assert {file: file.stat().st_mtime_ns for file in before} == before, "a segment never changes"
    again = opened(images[:30], progress=lambda *_: pytest.fail("nothing to report"))
    assert (again.computed, again.reused) == (0, 30)
    assert torch.equal(all_of(again, images[5:30]), all_of(more, images[5:30]))
    assert torch.equal(all_of(again, images[:10]), all_of(first, images[:10]))


def test_equal_bytes_share_a_row(opened: Open, images: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.png"
    shutil.copy(images[0], copy)
    found = opened([images[0], images[1], copy, images[0]])
    assert found.computed == 2
    assert found.index(copy) == found.index(images[0]) != found.index(images[1])
    with pytest.raises(KeyError):
        found.index(images[2])


def test_take_repeats_and_reorders(opened: Open, images: list[Path]) -> None:
    found = opened(images[:20])
    rows = torch.tensor([3, 0, 3, 19])
    assert torch.equal(found.take(rows), torch.stack([found.take(row[None])[0] for row in rows]))


def test_a_change_to_what_was_taken_reaches_neither_store_nor_others(opened: Open, images: list[Path]) -> None:
    found = opened(images[:2])
    before = found.take(torch.tensor([0])).clone()
    found.take(torch.tensor([0])).zero_()
    assert torch.equal(found.take(torch.tensor([0])), before)
    assert opened(images[:2]).computed == 0


def test_the_key_follows_all_that_decides_the_bits(
    base: Base, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = base.processor.image_processor
    key = key_of(base, processor)
    assert json.loads(json.dumps(key)) == key
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_checkpoint, moved)
    assert key_of(load_base(str(moved), dtype=torch.float32, device=CPU), processor) == key
    half = load_base(str(tiny_checkpoint), dtype=torch.float16, device=CPU)
    assert key_of(half, processor)["dtype"] == "torch.float16" and key_of(half, processor)["weights"] != key["weights"]
    changed = load_base(str(tiny_checkpoint), dtype=torch.float32, device=CPU)
    with torch.no_grad():
        changed.model.language_projection.weight[0, 0] += 1
    assert key_of(changed, processor) == key, "only the vision tower counts"
    with torch.no_grad():
        changed.model.vision_model.encoder.layers[0].mlp.fc1.weight[-1, -1] += 1e-3
    assert key_of(changed, processor) != key
    other = type(processor).from_dict({**processor.to_dict(), "image_mean": [0.5, 0.5, 0.5]})
    assert key_of(base, other) != key
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert key_of(base, processor) != key


def test_another_model_has_its_own_store(opened: Open, images: list[Path], tiny_checkpoint: Path) -> None:
    first = opened(images[:3])
    changed = load_base(str(tiny_checkpoint), dtype=torch.float32, device=CPU)
    with torch.no_grad():
        changed.model.vision_model.post_layernorm.weight.mul_(2)
    second = opened(images[:3], base=changed)
    assert second.computed == 3
    assert not torch.equal(all_of(first, images[:3]), all_of(second, images[:3]))
    assert opened(images[:3]).computed == 0


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def _flip_in_the_rows(file: Path) -> None:
    flip(file, file.stat().st_size // 2)


def _garble_the_index(file: Path) -> None:
    file.with_suffix(".json").write_text("{")


def _index_of_another_kind(file: Path) -> None:
    file.with_suffix(".json").write_text('["segment"]')


def _wrong_checksum(file: Path) -> None:
    index = json.loads(file.with_suffix(".json").read_text())
    index["images"][1][1] ^= 1
    file.with_suffix(".json").write_text(json.dumps(index))


def _wrong_shape(file: Path) -> None:
    index = json.loads(file.with_suffix(".json").read_text())
    index["shape"] = index["shape"][::-1]
    file.with_suffix(".json").write_text(json.dumps(index))


def _lose_the_index(file: Path) -> None:
    file.with_suffix(".json").unlink()


@pytest.mark.parametrize(
    ("damage", "computed"),
    [
        (_cut, 6),
        (_lengthen, 6),
        (Path.unlink, 6),
        (_flip_in_the_rows, 1),
        (_garble_the_index, 6),
        (_index_of_another_kind, 6),
        (_wrong_checksum, 1),
        (_wrong_shape, 6),
        (_lose_the_index, 6),
    ],
)
def test_damage_is_found_and_mended(
    damage: Callable[[Path], None],
    computed: int,
    opened: Open,
    images: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = all_of(opened(images[:6]), images[:6]).clone()
    opened(images[6:9])  # another segment, which stays
    damage(segments(tmp_path)[0])
    with caplog.at_level(logging.WARNING):
        mended = opened(images[:9])
    assert mended.computed == computed
    assert any("computed again" in record.message for record in caplog.records)
    assert torch.equal(all_of(mended, images[:6]), whole)
    # A damaged segment is gone; one with a damaged row stays for its other rows.
    assert len(list(tmp_path.glob("store/*/segment-*.json"))) == (2 if computed == 6 else 3)
    caplog.clear()
    assert opened(images[:9]).computed == 0
    assert not caplog.records


def test_an_open_store_outlives_its_repair(opened: Open, images: list[Path], tmp_path: Path) -> None:
    held = opened(images[:6])
    before = all_of(held, images[:6]).clone()
    segments(tmp_path)[0].with_suffix(".json").write_text("")
    opened(images[:6])
    assert torch.equal(all_of(held, images[:6]), before)


def test_segments_are_closed_at_their_size(
    opened: Open, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "SEGMENT_BYTES", 1)
    whole = all_of(opened(images), images)
    assert len(segments(tmp_path)) == 3
    assert torch.equal(all_of(opened(images), images), whole)


def test_a_bad_image_leaves_nothing_half_written(
    opened: Open, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: Pixels
) -> None:
    monkeypatch.setattr(feature_store, "SEGMENT_BYTES", 1)
    bad = tmp_path / "bad.png"
    bad.write_bytes(images[0].read_bytes()[:500])
    paths = [*images[:FORWARD_BATCH], bad]
    with pytest.raises(DataError, match=r"bad\.png: the image is truncated") as ours:
        opened(paths)
    with pytest.raises(DataError) as theirs:
        pixels(bad)
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(DataError, match="the image is missing"):
        opened([tmp_path / "none.png"])
    monkeypatch.undo()
    with pytest.raises(DataError, match="truncated"):
        opened([*images, bad])
    assert not list(tmp_path.glob("store/*/writing-*")), "the open segment goes"
    assert opened(images[:FORWARD_BATCH]).computed == 0, "what had been finished stays"


def test_an_image_that_changes_meanwhile_is_refused(
    opened: Open, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "changing.png"
    shutil.copy(images[0], path)
    monkeypatch.setattr(features, "_digest_of", lambda _: hashlib.sha256(b"before").hexdigest())
    with pytest.raises(DataError, match="was changed while"):
        opened([path])


def test_room_on_the_disk_is_checked_before(
    opened: Open, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    monkeypatch.setattr(features, "encode_images", lambda *_: pytest.fail("computed without room"))
    with pytest.raises(DataError, match=r"1\.0 MB are free.*LORA_SEARCH_CACHE.*cache_features=false"):
        opened(images)


def test_disk_use_is_stated(opened: Open, images: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = opened(images)
    assert f"{found.nbytes / 1e6:.1f} MB in" in caplog.records[0].message


def test_a_full_disk_is_said(
    opened: Open, images: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    opened(images[:1])
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match=r"No space left on device.*LORA_SEARCH_CACHE"):
        opened(images)
    assert not list(tmp_path.glob("store/*/writing-*.bin"))


def test_a_folder_that_cannot_be_made_is_said(base: Base, pixels: Pixels, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        compute_or_open(tmp_path / "file", base, images, pixels)


PROCESS = """
import sys, time
from pathlib import Path
import torch
from trainer.data import features
from trainer.model import base as model
from trainer.data.batches import Pixels
torch.set_num_threads(1)
checkpoint, store, images, marks = map(Path, sys.argv[1:5])
plain = features.encode_images
def encode(model, pixel_values):
    marks.open("a").write("pass\\n")
    time.sleep(float(sys.argv[5]))
    return plain(model, pixel_values)
features.encode_images = encode
base = model.load_base(str(checkpoint), dtype=torch.float32, device=torch.device("cpu"))
paths = sorted(images.glob("*.png"))
found = features.compute_or_open(store, base, paths, Pixels(base.processor.image_processor))
print(found.computed, found.reused, float(found.take(torch.arange(len(paths))).double().sum()).hex())
"""


def start(checkpoint: Path, store: Path, images: list[Path], marks: Path, slow: float) -> Forked:
    arguments = [str(checkpoint), str(store), str(images[0].parent), str(marks), str(slow)]
    return Forked([sys.executable, "-c", PROCESS, *arguments], stdout=subprocess.PIPE)


def test_of_several_processes_one_computes(tiny_checkpoint: Path, tmp_path: Path, images: list[Path]) -> None:
    marks = tmp_path / "marks"
    processes = [start(tiny_checkpoint, tmp_path / "store", images, marks, 0.7) for _ in range(2)]
    results = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(int(result[0]) for result in results) == [0, len(images)]
    assert len({result[2] for result in results}) == 1
    assert marks.read_text().count("pass") == 3


def test_a_killed_process_leaves_nothing_that_counts(
    tiny_checkpoint: Path, tmp_path: Path, images: list[Path], opened: Open
) -> None:
    marks = tmp_path / "marks"
    process = start(tiny_checkpoint, tmp_path / "store", images, marks, 0.3)
    try:
        deadline = time.monotonic() + 120
        while not (marks.exists() and marks.read_text().count("pass") == 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate(60)
    assert list(tmp_path.glob("store/*/writing-*.bin")), "killed in the middle"
    found = opened(images)
    assert found.computed == len(images)
    assert not list(tmp_path.glob("store/*/writing-*"))
    assert opened(images).computed == 0


def test_rows_without_an_index_are_removed(opened: Open, images: list[Path], tmp_path: Path) -> None:
    """A process killed between the two renames."""
    opened(images[:2])
    orphan = segments(tmp_path)[0].with_name("segment-000007.bin")
    orphan.write_bytes(b"rows")
    temporary = orphan.with_name("writing-000009.bin")
    temporary.write_bytes(b"rows")
    opened(images[:3])
    assert not orphan.exists() and not temporary.exists()


def test_waiting_is_reported(opened: Open, images: list[Path], tmp_path: Path) -> None:
    opened(images[:2])
    store = Store(segments(tmp_path)[0].parent, (1, 1), torch.float32)
    calls = []
    with store.locked(waiting=lambda: None):

        def waiting(done: int, total: int) -> None:
            calls.append((done, total))
            raise InterruptedError

        with pytest.raises(InterruptedError):
            opened(images[:3], progress=waiting)
    assert calls == [(2, 3)]
    assert opened(images[:3]).computed == 1


def test_the_table_on_a_device_holds_the_rows(opened: Open, images: list[Path]) -> None:
    found = opened(images)
    assert found._table is None, "memory mapped on CPU"
    table = features._upload(found._rows, CPU)
    assert torch.equal(table, found.take(torch.arange(len(images))))


def test_the_default_folder_is_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "features"


@pytest.mark.gpu
@pytest.mark.parametrize("fraction", [0.3, 0.0])
def test_on_a_gpu(
    fraction: float, tiny_checkpoint: Path, tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "RESIDENT_FRACTION", fraction)
    base = load_base(str(tiny_checkpoint), dtype=torch.float32, device=torch.device("cuda"))
    pixels = Pixels(base.processor.image_processor)
    found = compute_or_open(tmp_path / "a", base, images, pixels)
    assert (found._table is not None) == (fraction > 0)
    batch = torch.stack([pixels(path) for path in images[:FORWARD_BATCH]]).cuda()
    taken = all_of(found, images)
    assert taken.device.type == "cuda"
    assert torch.equal(taken[:FORWARD_BATCH], encode_images(base.model, batch))
    for number, company in enumerate(([images[20]], images[::-1])):
        other = compute_or_open(tmp_path / str(number), base, company, pixels)
        assert torch.equal(all_of(other, [images[20]])[0], taken[20])
