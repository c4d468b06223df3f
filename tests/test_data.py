"""Clean sets: what they accept, how they are read from every kind of source, and how subsets are drawn."""

import io
import json
import pickle
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from untrojan.augmentation import crop, crop_flip
from untrojan.data import CleanSet
from untrojan.errors import ConfigError, DataError, UnsafeFileError

SHARED = Path(__file__).parents[2] / "shared"
NAMES = ["ant", "bee", "cat"]


def made(count=12, classes=3, size=8, channels=3, seed=0):
    """Distinct uint8 images (N, C, H, W) and labels 0, 1, 2, 0, 1, 2 …"""
    shape = (count, channels, size, size)
    images = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return torch.from_numpy(images), torch.arange(count) % classes


def labeled(labels):
    """A clean set with these labels; every image shows its own row number."""
    rows = torch.arange(len(labels))
    images = torch.stack([rows % 256, rows // 256], 1).to(torch.uint8)[:, :, None, None]
    return CleanSet(images, torch.as_tensor(labels))


def rows_of(clean):
    """The row numbers that :func:`labeled` drew into the images."""
    return (clean.images[:, 0, 0, 0].long() + 256 * clean.images[:, 1, 0, 0].long()).tolist()


def pil(image):
    array = image.numpy()
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_parquet(path, cells, labels, *, columns=("image", "label"), features=None, group=1000):
    cells = [{"bytes": cell, "path": None} if isinstance(cell, bytes) else cell for cell in cells]
    table = pa.table({columns[0]: cells, columns[1]: labels})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)
    return path


def class_label(names=NAMES):
    return {"names": names, "_type": "ClassLabel"}


def hugging_face(images, labels):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict(
        {"image": [pil(image) for image in images], "label": labels.tolist()}, features=features
    )


@pytest.fixture(autouse=True)
def _quiet_hub():
    datasets.disable_progress_bars()


@pytest.fixture
def source(request, tmp_path):
    """The same twelve images in order of class, as the kind of source that the test names."""
    images, labels = made()
    order = labels.argsort(stable=True)
    images, labels = images[order], labels[order]
    cells = [encoded(pil(image)) for image in images]
    path = tmp_path / "source"
    if request.param == "parquet":
        features = {"image": {"_type": "Image"}, "label": class_label()}
        return write_parquet(tmp_path / "source.parquet", cells, labels.tolist(), features=features, group=5)
    if request.param == "shards":
        path.mkdir()
        for part, rows in enumerate((slice(0, 7), slice(7, 12))):
            write_parquet(path / f"train-0000{part}-of-00002.parquet", cells[rows], labels[rows].tolist())
        write_parquet(path / "test-00000-of-00001.parquet", cells[:1], [0])
        return path
    if request.param == "saved":
        hugging_face(images, labels).save_to_disk(path)
    if request.param == "saved splits":
        held = {"train": hugging_face(images, labels), "test": hugging_face(images[:1], labels[:1])}
        datasets.DatasetDict(held).save_to_disk(path)
    if request.param == "folder":
        for row, (cell, label) in enumerate(zip(cells, labels, strict=True)):
            folder = path / NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row:02}.png").write_bytes(cell)
    if request.param == "npz":
        path = tmp_path / "source.npz"
        np.savez(path, images=images.numpy().transpose(0, 2, 3, 1), labels=labels.numpy())
    return path


KINDS = ["parquet", "shards", "saved", "saved splits", "folder", "npz"]


class TestConstructor:
    def test_names_that_utf_8_cannot_hold(self):
        images, labels = made()
        clean = CleanSet(images, labels, ["caf\udce9", "b", "c"], "caf\udce9")
        assert (clean.class_names[0], clean.path) == ("caf\\udce9", "caf\\udce9")

    def test_keeps_uint8(self):
        images, labels = made()
        clean = CleanSet(images, labels.int(), NAMES, "here")
        assert clean.images.dtype == torch.uint8
        assert clean.labels.dtype == torch.int64
        assert (len(clean), clean.shape, clean.num_classes) == (12, (3, 8, 8), 3)
        assert (clean.counts, clean.class_names, clean.path) == ([4, 4, 4], tuple(NAMES), "here")
        assert repr(clean) == "CleanSet(12 images 3x8x8, 3 classes)"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_floats_on_the_8_bit_grid_become_uint8(self, dtype):
        grid = torch.arange(256).to(dtype).div(255).reshape(1, 1, 16, 16)
        clean = CleanSet(grid, torch.tensor([0]))
        assert torch.equal(clean.images.flatten(), torch.arange(256, dtype=torch.uint8))
        assert torch.equal(clean.floats(), grid.float())

    def test_other_floats_stay_floats(self):
        images = torch.rand(4, 3, 8, 8)
        clean = CleanSet(images, torch.zeros(4, dtype=torch.int64))
        assert clean.images.dtype == torch.float32
        assert torch.equal(clean.floats(), images)

    def test_rounding_beyond_the_range_is_forgiven(self):
        clean = CleanSet(torch.tensor([[[[1 + 1e-7, 0.3]]]]), torch.tensor([0]))
        assert clean.floats().max() == 1

    def test_does_not_share_memory_with_the_caller(self):
        images, labels = made()
        clean = CleanSet(images, labels)
        before = clean.sha256
        images.zero_()
        labels.zero_()
        clean.floats().zero_()
        for batch, _ in clean.batches(5):
            batch.zero_()
        assert CleanSet(clean.images, clean.labels).sha256 == before

    def test_is_frozen(self):
        with pytest.raises(AttributeError):
            CleanSet(*made()).labels = torch.zeros(12)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.linspace(-2.1, 2.6, 12).reshape(1, 3, 2, 2), r"\[0, 1\], got -2.1 to 2.6; .*Normalize"),
            (torch.linspace(0, 255, 12).reshape(1, 3, 2, 2), r"\[0, 1\], got 0 to 255; divide"),
            (torch.full((1, 3, 2, 2), torch.nan), "NaN"),
            (torch.full((1, 3, 2, 2), torch.inf), "infinite"),
            (torch.zeros(1, 2, 2), r"\(N, C, H, W\), got shape \(1, 2, 2\)"),
            (torch.zeros(2, 0, 2, 2), r"images as \(N, C, H, W\)"),
            (torch.zeros(1, 3, 2, 2, dtype=torch.int64), "uint8 or floating point, got torch.int64"),
            (np.zeros((1, 3, 2, 2)), "expected images as a tensor, got ndarray; .* CleanSet.of, or .*torch.from_numpy"),
        ],
    )
    def test_refuses_images(self, images, message):
        with pytest.raises(DataError, match=message):
            CleanSet(images, torch.zeros(len(images), dtype=torch.int64))

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.tensor([0, 1, 2]), "got 2 images, 3 labels"),
            (torch.tensor([[0], [1]]), r"\(N,\), got shape \(2, 1\)"),
            (torch.tensor([0.0, 1.0]), "whole numbers, got torch.float32"),
            (torch.tensor([0.0, torch.nan]), "whole numbers"),
            (torch.tensor([True, False]), "whole numbers, got torch.bool"),
            (np.array([0, 1]), "labels as a tensor, got ndarray; .* CleanSet.of, or .*torch.from_numpy"),
            ([0, 1], "labels as a tensor, got list"),
            (torch.tensor([0, -1]), "got -1 to 0"),
            (torch.tensor([0, 10**12]), "got 0 to 1000000000000"),
        ],
    )
    def test_refuses_labels(self, labels, message):
        images = torch.zeros(2, 3, 4, 4)
        with pytest.raises(DataError, match=f"^expected .*{message}"):
            CleanSet(images, labels)
        with pytest.raises(DataError, match=f"^here: expected .*{message}"):
            CleanSet(images, labels, path="here")

    def test_class_names_count_as_classes(self):
        clean = CleanSet(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), ("a", "b", "c"))
        assert (clean.num_classes, clean.counts) == (3, [1, 1, 0])

    def test_sha256_tells_content_apart(self):
        images, labels = made()
        changed = images.clone()
        changed[0, 0, 0, 0] ^= 1
        same = CleanSet(images, labels).sha256
        assert CleanSet(images.float() / 255, labels).sha256 == same
        assert CleanSet(changed, labels).sha256 != same
        assert CleanSet(images, labels.flip(0)).sha256 != same
        assert CleanSet(images.reshape(12, 1, 8, 24), labels).sha256 != same


class TestBatches:
    def test_serves_everything_once_in_order(self):
        images, labels = made()
        served = list(CleanSet(images, labels).batches(5))
        assert [len(batch) for batch, _ in served] == [5, 5, 2]
        assert torch.equal(torch.cat([batch for batch, _ in served]), images.float() / 255)
        assert torch.equal(torch.cat([each for _, each in served]), labels)

    def test_a_generator_shuffles_reproducibly(self):
        clean = labeled(range(50))

        def order(generator):
            return torch.cat([labels for _, labels in clean.batches(8, generator)]).tolist()

        generator = torch.Generator().manual_seed(1)
        first, second = order(generator), order(generator)
        assert first == order(torch.Generator().manual_seed(1))
        assert sorted(first) == sorted(second) == list(range(50))
        assert first != second

    def test_augments_each_batch(self):
        clean = CleanSet(*made())
        served = clean.batches(6, torch.Generator().manual_seed(0), lambda images, _: 1 - images)
        plain = clean.batches(6, torch.Generator().manual_seed(0))
        for (batch, labels), (reference, expected) in zip(served, plain, strict=True):
            assert torch.equal(batch, 1 - reference)
            assert torch.equal(labels, expected)

    def test_refuses(self):
        with pytest.raises(ConfigError, match="at least 1, got 0"):
            CleanSet(*made()).batches(0)
        with pytest.raises(ConfigError, match="generator"):
            CleanSet(*made()).batches(4, augment=crop)


class TestAugmentation:
    @pytest.mark.parametrize("augment", [crop, crop_flip])
    def test_shows_only_windows_of_the_padded_image(self, augment):
        images = torch.rand(40, 3, 6, 5)
        before = images.clone()
        changed = augment(images, torch.Generator().manual_seed(0))
        assert torch.equal(images, before)
        assert changed.shape == images.shape
        padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
        seen = set()
        for image, result in zip(padded, changed, strict=True):
            windows = {(y, x, 0): image[:, y : y + 6, x : x + 5] for y in range(9) for x in range(9)}
            if augment is crop_flip:
                windows |= {(y, x, 1): window.flip(2) for (y, x, _), window in list(windows.items())}
            matches = [place for place, window in windows.items() if torch.equal(window, result)]
            assert matches
            seen.add(matches[0])
        assert len(seen) > 20
        assert {flip for *_, flip in seen} == ({0, 1} if augment is crop_flip else {0})

    @pytest.mark.parametrize("augment", [crop, crop_flip])
    def test_is_reproducible_and_leaves_the_global_generator_alone(self, augment):
        images, state = torch.rand(9, 1, 8, 8), torch.get_rng_state()
        first = augment(images, torch.Generator().manual_seed(3))
        assert torch.equal(first, augment(images, torch.Generator().manual_seed(3)))
        assert torch.equal(torch.get_rng_state(), state)


class TestTake:
    def test_by_position_and_by_mask(self):
        clean = CleanSet(*made(), tuple(NAMES), "here")
        part = clean.take([5, 0])
        assert part.labels.tolist() == [2, 0]
        assert torch.equal(part.images, clean.images[[5, 0]])
        assert (part.class_names, part.path) == (clean.class_names, clean.path)
        assert clean.take(clean.labels == 1).counts == [0, 4, 0]

    @pytest.mark.parametrize(("count", "got"), [(1, 1), (5, 5), (99, 12)])
    def test_some_are_drawn_once(self, count, got):
        clean = CleanSet(torch.rand(12, 1, 2, 2), torch.arange(12))
        one, other = (clean.some(count, torch.Generator().manual_seed(seed)) for seed in (3, 3))
        assert len(one) == len(set(one.labels.tolist())) == got
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, clean.images[one.labels])

    def test_refuses_nothing(self):
        with pytest.raises(DataError, match="at least one image"):
            CleanSet(*made()).take([])


many_labels = st.lists(st.integers(0, 6), min_size=2, max_size=120)


class TestSplit:
    @given(many_labels, st.floats(0.01, 0.99), st.integers(0, 5))
    @settings(max_examples=60, deadline=None)
    def test_is_stratified_disjoint_and_reproducible(self, labels, fraction, seed):
        clean = labeled(labels)
        fit, held = clean.split(fraction, seed)
        assert sorted(rows_of(fit) + rows_of(held)) == list(range(len(labels)))
        assert rows_of(fit) == sorted(rows_of(fit))
        assert rows_of(clean.split(fraction, seed)[1]) == rows_of(held)
        assert len(held) == min(max(round(fraction * len(labels)), 1), len(labels) - 1)
        share = len(held) / len(labels)
        for label in set(labels):
            quota = share * labels.count(label)
            assert abs(int((held.labels == label).sum()) - quota) < 1 + 1e-9

    def test_seeds_differ(self):
        clean = labeled([0, 1] * 50)
        assert rows_of(clean.split(0.5, 0)[1]) != rows_of(clean.split(0.5, 1)[1])

    def test_refuses(self):
        with pytest.raises(DataError, match="at least two images"):
            labeled([0]).split(0.5, 0)
        for fraction in (0.0, 1.0, -1.0, float("nan")):
            with pytest.raises(ConfigError, match="fraction"):
                labeled([0, 1]).split(fraction, 0)


class TestFolds:
    @given(many_labels, st.integers(2, 6), st.integers(0, 5))
    @settings(max_examples=60, deadline=None)
    def test_hold_every_image_out_once(self, labels, count, seed):
        clean = labeled(labels)
        if count > len(labels):
            with pytest.raises(DataError, match=f"at least {count} images, got {len(labels)}"):
                clean.folds(count, seed)
            return
        folds = clean.folds(count, seed)
        assert len(folds) == count
        assert sorted(row for _, held in folds for row in rows_of(held)) == list(range(len(labels)))
        for fit, held in folds:
            assert sorted(rows_of(fit) + rows_of(held)) == list(range(len(labels)))
            assert len(held) in (len(labels) // count, -(-len(labels) // count))
            for label in set(labels):
                whole = labels.count(label)
                assert int((held.labels == label).sum()) in (whole // count, -(-whole // count))
        again = clean.folds(count, seed)
        assert [rows_of(held) for _, held in again] == [rows_of(held) for _, held in folds]

    def test_refuses_one_fold(self):
        with pytest.raises(ConfigError, match="at least 2 folds"):
            labeled([0, 1]).folds(1, 0)


class TestSubset:
    @given(many_labels, st.integers(1, 130), st.integers(0, 5))
    @settings(max_examples=80, deadline=None)
    def test_samples_are_as_even_as_the_classes_allow(self, labels, samples, seed):
        clean = labeled(labels)
        if samples > len(labels) or samples < len(set(labels)):
            with pytest.raises(DataError):
                CleanSet.of(clean, samples=samples, seed=seed)
            return
        drawn = CleanSet.of(clean, samples=samples, seed=seed)
        assert len(drawn) == samples
        rows = rows_of(drawn)
        assert rows == sorted(set(rows))
        assert drawn.labels.tolist() == [labels[row] for row in rows]
        assert rows == rows_of(CleanSet.of(clean, samples=samples, seed=seed))
        taken = {label: drawn.labels.tolist().count(label) for label in set(labels)}
        largest = max(taken.values())
        for label, count in taken.items():
            assert count >= largest - 1 or count == labels.count(label)

    @given(many_labels, st.integers(1, 4), st.integers(0, 5))
    @settings(max_examples=60, deadline=None)
    def test_samples_per_class_are_exact(self, labels, count, seed):
        short = [label for label in sorted(set(labels)) if labels.count(label) < count]
        clean = labeled(labels)
        if short:
            with pytest.raises(DataError, match=r"class [0-6] has [1-3]$"):
                CleanSet.of(clean, samples_per_class=count, seed=seed)
            return
        drawn = CleanSet.of(clean, samples_per_class=count, seed=seed)
        assert drawn.counts == [count if label in labels else 0 for label in range(max(labels) + 1)]

    def test_the_seed_chooses_images_and_remainder(self):
        clean = labeled([0, 1, 2] * 30)
        drawn = [CleanSet.of(clean, samples=10, seed=seed) for seed in range(20)]
        assert len({tuple(rows_of(each)) for each in drawn}) == 20
        assert {each.counts.index(4) for each in drawn} == {0, 1, 2}

    def test_does_not_depend_on_how_classes_are_interleaved(self):
        images, labels = made(60)
        order = labels.argsort(stable=True)
        mixed = CleanSet.of((images, labels), samples=31, seed=4)
        grouped = CleanSet.of((images[order], labels[order]), samples=31, seed=4)
        assert {image.numpy().tobytes() for image in mixed.images} == {
            image.numpy().tobytes() for image in grouped.images
        }

    def test_messages(self):
        clean = labeled(list(range(43)) * 2)
        with pytest.raises(DataError, match="43 classes need at least 43 samples, got 42"):
            CleanSet.of(clean, samples=42)
        with pytest.raises(DataError, match="87 samples were asked for, there are 86 images"):
            CleanSet.of(clean, samples=87)
        few = labeled([0, 0, 1])
        with pytest.raises(DataError, match="class 1 has 1"):
            CleanSet.of(few, samples_per_class=2)
        with pytest.raises(DataError, match=r"class 1 \(bee\) has 1"):
            CleanSet.of(CleanSet(few.images, few.labels, tuple(NAMES)), samples_per_class=2)

    @pytest.mark.parametrize(
        "wanted", [{"samples": 0}, {"samples_per_class": -1}, {"samples": 3, "samples_per_class": 1}]
    )
    def test_refuses_before_reading(self, wanted):
        with pytest.raises(ConfigError):
            CleanSet.load("no/such/file.npz", **wanted)
        with pytest.raises(ConfigError):
            CleanSet.of(labeled([0, 1]), **wanted)


class TestEverySource:
    @pytest.mark.parametrize("source", KINDS, indirect=True)
    def test_loads_the_same_images(self, source):
        images, labels = made()
        order = labels.argsort(stable=True)
        clean = CleanSet.load(source)
        assert clean.images.dtype == torch.uint8
        assert torch.equal(clean.images, images[order])
        assert torch.equal(clean.labels, labels[order])
        assert clean.path == str(source)

    @pytest.mark.parametrize("source", KINDS, indirect=True)
    def test_draws_the_same_subset(self, source):
        images, labels = made()
        order = labels.argsort(stable=True)
        expected = CleanSet.of((images[order], labels[order]), samples=7, seed=3)
        assert CleanSet.load(str(source), samples=7, seed=3).sha256 == expected.sha256
        assert CleanSet.load(source, samples_per_class=1).counts == [1, 1, 1]

    @pytest.mark.parametrize("source", KINDS, indirect=True)
    def test_too_few_images_are_told_with_the_path(self, source):
        with pytest.raises(DataError, match=f"^{re.escape(str(source))}: 13 samples were asked for"):
            CleanSet.load(source, samples=13)

    @pytest.mark.parametrize("source", ["parquet", "saved", "saved splits", "folder"], indirect=True)
    def test_knows_class_names(self, source):
        assert CleanSet.load(source).class_names == tuple(NAMES)

    @pytest.mark.parametrize(
        "missing", ["none", "none/", "none.npz", "./none", "../none", "/none", "a/b/c", "a/none.tar.gz", "here/none"]
    )
    def test_nothing_there(self, tmp_path, monkeypatch, missing):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
        Path("here").mkdir()
        with pytest.raises(DataError, match=rf"no such file or folder: {re.escape(missing)}; a Hub id would be owner/"):
            CleanSet.load(missing)

    def test_unknown_kind(self, tmp_path):
        (tmp_path / "images.pt").write_bytes(pickle.dumps([1]))
        with pytest.raises(DataError, match=r"expected a .parquet or .npz file.*images.pt"):
            CleanSet.load(tmp_path / "images.pt")


class TestParquet:
    def cells(self, count=4):
        images, labels = made(count)
        return [encoded(pil(image)) for image in images], labels.tolist()

    @pytest.mark.parametrize("columns", [("img", "fine_label"), ("image", "labels")])
    def test_usual_column_names(self, tmp_path, columns):
        path = write_parquet(tmp_path / "a.parquet", *self.cells(), columns=columns)
        assert len(CleanSet.load(path)) == 4

    def test_columns_by_feature(self, tmp_path):
        features = {"photo": {"_type": "Image"}, "animal": class_label(), "odd": [{"_type": "Value"}]}
        path = write_parquet(tmp_path / "a.parquet", *self.cells(), columns=("photo", "animal"), features=features)
        assert CleanSet.load(path).class_names == tuple(NAMES)

    def test_names_the_columns_when_none_fits(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet", *self.cells(), columns=("photo", "label"))
        with pytest.raises(DataError, match="image or img, got photo, label"):
            CleanSet.load(path)

    def test_plain_bytes_without_a_struct(self, tmp_path):
        cells, labels = self.cells()
        pq.write_table(pa.table({"image": cells, "label": labels}), tmp_path / "a.parquet")
        assert len(CleanSet.load(tmp_path / "a.parquet")) == 4

    def test_only_chosen_images_are_decoded(self, tmp_path):
        cells, labels = self.cells(6)
        clean = CleanSet.load(write_parquet(tmp_path / "a.parquet", cells, labels), samples=3, seed=1)
        wanted = {image.numpy().tobytes() for image in clean.images}
        images = made(6)[0]
        kept = [
            cell if image.numpy().tobytes() in wanted else b"broken" for cell, image in zip(cells, images, strict=True)
        ]
        path = write_parquet(tmp_path / "b.parquet", kept, labels, group=2)
        assert CleanSet.load(path, samples=3, seed=1).sha256 == clean.sha256

    def test_broken_metadata_is_ignored(self, tmp_path):
        cells, labels = self.cells()
        for text in ("{", "[]", '{"info": null}', '{"info": {"features": {"label": {"names": 3}}}}'):
            table = pa.table({"image": cells, "label": labels}).replace_schema_metadata({"huggingface": text})
            pq.write_table(table, tmp_path / "a.parquet")
            assert CleanSet.load(tmp_path / "a.parquet").class_names is None

    @pytest.mark.parametrize(
        ("cell", "message"),
        [
            (b"not an image", "row 1: cannot decode the image"),
            (encoded(pil(made()[0][0]))[:60], "row 1: cannot decode the image"),
            ({"bytes": None, "path": "gone.png"}, "row 1: expected"),
        ],
    )
    def test_names_the_broken_row(self, tmp_path, cell, message):
        cells, labels = self.cells()
        cells[1] = cell
        with pytest.raises(DataError, match=f"a.parquet {message}"):
            CleanSet.load(write_parquet(tmp_path / "a.parquet", cells, labels))

    def test_a_row_that_names_a_file_of_this_machine_is_refused(self, tmp_path):
        cells, labels = self.cells()
        (tmp_path / "private.png").write_bytes(cells[1])
        cells[1] = {"bytes": None, "path": str(tmp_path / "private.png")}
        with pytest.raises(DataError, match=r"a\.parquet row 1: expected an encoded image, got no bytes"):
            CleanSet.load(write_parquet(tmp_path / "a.parquet", cells, labels))

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([0, 1, 2, None], "1 of 4 rows have no label"),
            (["a", "b", "c", "d"], "array of numbers"),
            ([0.0, 1.0, 2.0, float("nan")], "whole numbers"),
            ([0, 1, 2, -1], "got -1 to 2"),
        ],
    )
    def test_refuses_labels(self, tmp_path, labels, message):
        path = write_parquet(tmp_path / "a.parquet", self.cells()[0], labels)
        with pytest.raises(DataError, match=f"^{re.escape(str(path))}: .*{message}"):
            CleanSet.load(path)

    def test_no_rows(self, tmp_path):
        pq.write_table(
            pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}),
            tmp_path / "a.parquet",
        )
        with pytest.raises(DataError, match="holds no images"):
            CleanSet.load(tmp_path / "a.parquet")

    def test_not_parquet(self, tmp_path):
        (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nonsense")
        with pytest.raises(DataError, match=r"cannot read .*a.parquet"):
            CleanSet.load(tmp_path / "a.parquet")

    def test_shards_of_any_name_are_joined(self, tmp_path):
        cells, labels = self.cells()
        write_parquet(tmp_path / "a.parquet", cells, labels)
        write_parquet(tmp_path / "b.parquet", cells, labels)
        assert len(CleanSet.load(tmp_path)) == 8

    @pytest.mark.parametrize(
        ("train", "test"),
        [
            ("train-00000-of-00001-a09b74b3ef9c3b56", "test-00000-of-00001-0f5c2a31d9be7aef"),
            ("cifar10-train", "cifar10-test"),
        ],
    )
    def test_train_is_told_from_test_however_shards_are_named(self, tmp_path, train, test):
        cells, labels = self.cells()
        write_parquet(tmp_path / f"{train}.parquet", cells, labels)
        write_parquet(tmp_path / f"{test}.parquet", cells[:1], labels[:1])
        assert len(CleanSet.load(tmp_path)) == len(cells)

    def test_splits_without_train(self, tmp_path):
        cells, labels = self.cells()
        write_parquet(tmp_path / "test-0.parquet", cells, labels)
        write_parquet(tmp_path / "validation-0.parquet", cells, labels)
        with pytest.raises(DataError, match="split named train, got test, validation"):
            CleanSet.load(tmp_path)

    def test_shards_that_name_classes_differently(self, tmp_path):
        cells, labels = self.cells()
        for name, names in (("a", NAMES), ("b", NAMES[::-1])):
            write_parquet(tmp_path / f"{name}.parquet", cells, labels, features={"label": class_label(names)})
        with pytest.raises(DataError, match="do not agree on the class names"):
            CleanSet.load(tmp_path)


class TestImages:
    """What single images may look like, shown on image folders."""

    def folder(self, path, *images):
        (path / "only").mkdir()
        for number, (image, kind, options) in enumerate(images):
            suffix = {"JPEG": "JPG"}.get(kind, kind).lower()
            image.save(path / "only" / f"{number}.{suffix}", kind, **options)
        return path

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "PPM", "GIF"])
    def test_formats(self, tmp_path, kind):
        folder = self.folder(tmp_path, (Image.new("RGB", (5, 4), (250, 10, 10)), kind, {}))
        clean = CleanSet.load(folder)
        assert clean.shape == (3, 4, 5)
        assert (clean.floats().mean((0, 2, 3)) - torch.tensor([250, 10, 10]) / 255).abs().max() < 0.03

    @pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("P", 3), ("1", 1)])
    def test_modes(self, tmp_path, mode, channels):
        image = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
        clean = CleanSet.load(self.folder(tmp_path, (image, "PNG", {})))
        assert clean.shape == (channels, 4, 4)
        assert clean.images.unique().tolist() == [255]

    @pytest.mark.parametrize(
        ("mode", "kind", "options"),
        [
            ("RGBA", "PNG", {}),
            ("LA", "PNG", {}),
            ("I;16", "PNG", {}),
            ("CMYK", "JPEG", {}),
            ("P", "PNG", {"transparency": 0}),
        ],
    )
    def test_refuses_modes(self, tmp_path, mode, kind, options):
        folder = self.folder(tmp_path, (Image.new(mode, (4, 4)), kind, options))
        with pytest.raises(DataError, match=rf"only/0\.\w+: expected an RGB or grayscale .* mode {mode}; convert"):
            CleanSet.load(folder)

    @pytest.mark.parametrize(
        ("other", "size"), [(Image.new("RGB", (7, 6)), "3x6x7"), (Image.new("L", (5, 4)), "1x4x5")]
    )
    def test_refuses_mixed_images(self, tmp_path, other, size):
        folder = self.folder(tmp_path, (Image.new("RGB", (5, 4)), "PNG", {}), (other, "PNG", {}))
        with pytest.raises(DataError, match=f"0.png with 3x4x5 .*1.png with {size}"):
            CleanSet.load(folder)

    @pytest.mark.parametrize("limit", [10, 20])
    def test_decompression_bomb(self, tmp_path, monkeypatch, limit):
        folder = self.folder(tmp_path, (Image.new("L", (6, 5)), "PNG", {}))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=r"0.png: cannot decode the image: .*bomb"):
            CleanSet.load(folder)

    def test_ignores_hidden_and_other_files(self, tmp_path):
        self.folder(tmp_path, (Image.new("L", (4, 4)), "PNG", {}))
        (tmp_path / ".cache").mkdir()
        (tmp_path / "readme.txt").write_text("hello")
        (tmp_path / "only" / "notes.txt").write_text("hello")
        (tmp_path / "only" / "._0.png").write_bytes(b"hello")
        clean = CleanSet.load(tmp_path)
        assert (len(clean), clean.class_names) == (1, ("only",))

    def test_empty_class(self, tmp_path):
        self.folder(tmp_path, (Image.new("L", (4, 4)), "PNG", {}))
        (tmp_path / "void").mkdir()
        with pytest.raises(DataError, match="void: the class folder holds no image"):
            CleanSet.load(tmp_path)

    def test_no_class(self, tmp_path):
        with pytest.raises(DataError, match="one subfolder of images per class"):
            CleanSet.load(tmp_path)


class TestNpz:
    @pytest.mark.parametrize("names", [("images", "labels"), ("x", "y"), ("image", "label")])
    @pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 3, 1)])
    def test_names_and_layouts(self, tmp_path, names, layout):
        images, labels = made()
        np.savez_compressed(
            tmp_path / "a.npz", **{names[0]: images.numpy().transpose(layout), names[1]: labels.numpy()}
        )
        assert torch.equal(CleanSet.load(tmp_path / "a.npz").images, images)

    def test_gray_images_need_no_axis_of_channels(self, tmp_path):
        images, labels = made(channels=1)
        np.savez(tmp_path / "a.npz", x=images[:, 0], y=labels)
        assert torch.equal(CleanSet.load(tmp_path / "a.npz").images, images)
        assert torch.equal(CleanSet.of((images[:, 0].numpy(), labels)).images, images)

    def test_floats_in_foreign_byte_order(self, tmp_path):
        images, labels = made()
        np.savez(tmp_path / "a.npz", x=(images.numpy() / 255).astype(">f8"), y=labels.numpy().astype(">u2"))
        assert torch.equal(CleanSet.load(tmp_path / "a.npz", samples=12).images, images)

    @pytest.mark.parametrize("name", ["images", "labels"])
    def test_never_unpickles(self, tmp_path, name):
        class Bomb:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        images, labels = made()
        arrays = {"images": images.numpy(), "labels": labels.numpy(), name: np.array([Bomb()] * 12)}
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(UnsafeFileError, match="pickled objects"):
            CleanSet.load(tmp_path / "a.npz")
        (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(DataError, match="not an npz archive"):
            CleanSet.load(tmp_path / "b.npz")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            (
                {"pictures": np.zeros(3), "labels": np.zeros(3)},
                "or image and label, got pictures, labels",
            ),
            ({"x": np.zeros((3, 4, 4, 3), np.uint8), "y": np.zeros(2, int)}, "got 3 images, 2 labels"),
            ({"x": np.zeros((3, 4, 4, 3), np.uint8), "y": np.zeros((3, 1), int)}, r"got shape \(3, 1\)"),
            ({"x": np.zeros((3, 4, 4, 3), np.uint8), "y": np.array(["a"] * 3)}, "array of numbers"),
            ({"x": np.zeros((3, 16)), "y": np.zeros(3, int)}, r"\(N, H, W\), got \(3, 16\)"),
            ({"x": np.float32(1), "y": np.zeros(3, int)}, r"\(N, H, W\), got \(\)"),
            ({"x": np.full((3, 4, 4, 3), -2.0), "y": np.zeros(3, int)}, "Normalize"),
        ],
    )
    def test_refuses(self, tmp_path, arrays, message):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(DataError, match=rf"^{re.escape(str(tmp_path))}/a\.npz: .*{message}"):
            CleanSet.load(tmp_path / "a.npz")


class TestSavedAndHub:
    def test_dict_without_train(self, tmp_path):
        held = hugging_face(*made(3))
        datasets.DatasetDict({"dev": held, "test": held}).save_to_disk(tmp_path / "saved")
        with pytest.raises(DataError, match="split named train, got dev, test"):
            CleanSet.load(tmp_path / "saved")

    def test_broken_directory(self, tmp_path):
        (tmp_path / "state.json").write_text("{}")
        with pytest.raises(DataError, match="cannot read"):
            CleanSet.load(tmp_path)

    def test_rearranged_and_formatted(self, tmp_path):
        images, labels = made()
        rows = [11, 3, 4, 8]
        held = hugging_face(images, labels).select(rows).with_format("torch")
        held.save_to_disk(tmp_path / "saved")
        clean = CleanSet.load(tmp_path / "saved")
        assert torch.equal(clean.images, images[rows])
        assert clean.labels.tolist() == labels[rows].tolist()

    def test_hub(self, monkeypatch):
        images, labels = made()
        asked = []

        def load_dataset(name, *, split):
            asked.append((name, split))
            return hugging_face(images, labels)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        clean = CleanSet.load("owner/name.v2", samples=6)
        assert (clean.counts, clean.path, asked) == (
            [2, 2, 2],
            "owner/name.v2",
            [("owner/name.v2", "train")],
        )

    @pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), ValueError("Unknown split")])
    def test_hub_out_of_reach(self, monkeypatch, error):
        def load_dataset(name, *, split):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(DataError, match=r"no such file or folder: owner/name; and .* be reached") as caught:
            CleanSet.load("owner/name")
        assert "\n" not in str(caught.value)


class Items(Dataset):
    """(image, label) pairs that remember which rows were read."""

    def __init__(self, images, answers, **attributes):
        self.images, self.answers, self.read = images, answers, []
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        self.read.append(row)
        return self.images[row], self.answers[row]


class TestOf:
    def test_clean_set(self):
        clean = CleanSet(*made(), path="here")
        assert CleanSet.of(clean) is clean
        assert CleanSet.of(clean, samples=12) is clean
        assert CleanSet.of(clean, samples_per_class=2).path == "here"

    def test_pairs(self):
        images, labels = made()
        expected = CleanSet(images, labels).sha256
        assert CleanSet.of((images, labels)).sha256 == expected
        assert CleanSet.of((images.numpy(), labels.numpy())).sha256 == expected
        assert CleanSet.of((images.numpy().transpose(0, 2, 3, 1), labels.numpy())).sha256 == expected
        frozen = images.numpy().copy()
        frozen.setflags(write=False)
        assert CleanSet.of((frozen, labels.numpy())).sha256 == expected

    @pytest.mark.parametrize(
        "turn",
        [
            lambda image: image,
            lambda image: image / 255,
            pil,
            lambda image: image.numpy().transpose(1, 2, 0),
        ],
    )
    def test_data_sets(self, turn):
        images, labels = made(600)
        items = Items([turn(image) for image in images], labels.tolist())
        assert CleanSet.of(items).sha256 == CleanSet(images, labels).sha256

    def test_bfloat16(self):
        images, labels = torch.rand(4, 1, 4, 4).bfloat16(), torch.arange(4)
        assert CleanSet.of(TensorDataset(images, labels)).sha256 == CleanSet.of((images, labels)).sha256

    def test_an_image_that_breaks_off_when_it_is_read(self):
        whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
        with pytest.raises(DataError, match="item 0: cannot decode the image"):
            CleanSet.of(Items([Image.open(io.BytesIO(whole[: len(whole) // 2]))], [0]))

    def test_gray_array(self):
        images, labels = made(channels=1)
        assert torch.equal(CleanSet.of(Items(list(images[:, 0].numpy()), labels)).images, images)

    @pytest.mark.parametrize("name", ["targets", "labels"])
    @pytest.mark.parametrize("turn", [torch.Tensor.tolist, torch.Tensor.numpy, lambda labels: labels])
    def test_known_labels_spare_reading(self, name, turn):
        images, labels = made(30)
        items = Items(images, labels, **{name: turn(labels)})
        clean = CleanSet.of(items, samples=6, seed=2)
        assert clean.sha256 == CleanSet.of((images, labels), samples=6, seed=2).sha256
        assert len(items.read) == 6

    @pytest.mark.parametrize("targets", [["a"] * 12, [0, 1], [[0]] * 12, None, 3, "zeros-ones-2", torch.tensor(0)])
    def test_useless_targets(self, targets):
        images, labels = made()
        items = Items(images, labels, targets=targets)
        assert CleanSet.of(items, samples=6).counts == [2, 2, 2]

    def test_labels_come_with_the_images(self):
        images, labels = made()
        items = Items(images, labels + 5, targets=labels)
        assert sorted(CleanSet.of(items, samples=3).labels.tolist()) == [5, 6, 7]

    def test_torch_data_sets_and_loaders(self):
        images, labels = made()
        expected = CleanSet(images, labels).sha256
        plain = TensorDataset(images / 255, labels)
        assert CleanSet.of(plain).sha256 == expected
        assert CleanSet.of(Subset(plain, range(12))).sha256 == expected
        assert CleanSet.of(DataLoader(plain, batch_size=5)).sha256 == expected
        assert CleanSet.of(DataLoader(plain, batch_size=5), samples_per_class=2).counts == [2, 2, 2]

    def test_streams(self):
        images, labels = made()

        class Stream(IterableDataset):
            def __iter__(self):
                return zip(images, labels, strict=True)

        assert CleanSet.of(Stream()).sha256 == CleanSet(images, labels).sha256

    def test_batches_on_and_off_the_8_bit_grid(self):
        images = torch.rand(8, 3, 4, 4)
        images[:4] = (images[:4] * 255).round() / 255
        loader = DataLoader(TensorDataset(images, torch.arange(8)), batch_size=4)
        assert torch.equal(CleanSet.of(loader).floats(), images)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (3, "expected a CleanSet, .* got int"),
            ("cifar10", "expected a CleanSet, .* got str"),
            (made() + made(), "expected a CleanSet"),
            (Items([torch.rand(3, 4, 4)], [0.5]), "item 0: expected .*whole number"),
            (Items([torch.rand(3, 4, 4)], [[0, 1]]), "item 0: expected"),
            (Items([torch.rand(4, 4)], [0]), r"item 0: expected .* got Tensor of shape \(4, 4\)"),
            (Items(["cat.png"], [0]), "item 0: expected .* got str"),
            (Items([torch.rand(3, 4, 4) * 4 - 2], [0]), "Normalize"),
            (Items([Image.new("RGBA", (4, 4))], [0]), "item 0: expected an RGB .* mode RGBA"),
            (Items([torch.rand(3, 4, 4), torch.rand(3, 5, 4)], [0, 1]), "item 0 .* 3x4x4.* item 1 .* 3x5x4"),
            (Items([], []), "at least one image"),
        ],
    )
    def test_refuses(self, data, message):
        with pytest.raises(DataError, match=message):
            CleanSet.of(data)

    def test_sizes_that_change_between_batches(self):
        images = [torch.rand(3, 4, 4)] * 256 + [torch.rand(3, 4, 5)]
        with pytest.raises(DataError, match=r"item 0 with 3x4x4.* item 256 with 3x4x5"):
            CleanSet.of(Items(images, [0] * 257))


needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data sets beside the repository")


@needs_shared
class TestSharedData:
    def test_cifar10(self):
        path = SHARED / "data/cifar10/train-lossless.parquet"
        clean = CleanSet.load(path, samples=500)
        assert (clean.shape, clean.counts) == ((3, 32, 32), [50] * 10)
        assert clean.class_names is not None
        assert clean.class_names[0] == "airplane"
        assert clean.sha256 == CleanSet.load(path, samples=500).sha256
        assert clean.sha256 != CleanSet.load(path, samples=500, seed=1).sha256

    def test_gtsrb(self):
        clean = CleanSet.load(SHARED / "data/gtsrb/train.parquet", samples=430)
        assert (clean.num_classes, clean.counts) == (43, [10] * 43)
        assert CleanSet.load(SHARED / "data/gtsrb/test.parquet", samples_per_class=1).counts == [1] * 43
        with pytest.raises(DataError, match="43 classes need at least 43 samples"):
            CleanSet.load(SHARED / "data/gtsrb/train.parquet", samples=42)


@pytest.mark.parametrize(
    ("names", "order"),
    [(["10", "2", "0"], ["0", "2", "10"]), (["10", "2", "cat"], ["10", "2", "cat"]), (["02", "10"], ["02", "10"])],
)
def test_class_folders_named_by_numbers_are_in_the_order_of_these(tmp_path, names, order):
    for name in names:
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4), len(name)).save(tmp_path / name / "a.png")
    clean = CleanSet.load(tmp_path)
    assert clean.class_names == tuple(order)
    assert [int(image.max()) for image in clean.images] == [len(name) for name in order]
