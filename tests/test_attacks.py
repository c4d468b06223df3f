import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from untrojan.errors import ConfigError, DataError
from untrojan.lab.attack import Attack, read_image, target_labels
from untrojan.lab.attacks.additive import Additive
from untrojan.lab.attacks.badnets import BadNets
from untrojan.lab.attacks.masked import Masked
from untrojan.registry import describe

SHARED = Path(__file__).parents[2] / "shared" / "checkpoints" / "triggers"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no published triggers in {SHARED}")


def images(channels=3, height=32, width=32, count=5):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def files(tmp_path):
    """A random RGB pattern and a random mask for 8x6 images, as files and as arrays."""
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 256, (8, 6, 3), dtype=np.uint8)
    mask = rng.random((3, 8, 6))
    Image.fromarray(pattern).save(tmp_path / "pattern.png")
    np.save(tmp_path / "mask.npy", mask)
    return tmp_path / "pattern.png", tmp_path / "mask.npy", pattern, mask


@pytest.fixture
def attacks(files):
    image, mask, _, _ = files
    return [
        BadNets(),
        BadNets(pattern="grid", value=0.5),
        Additive(image=image),
        Masked(image=image, mask=mask),
    ]


def looped(before, change):
    """What comes out when `change(value, channel, row, column)` is applied pixel by pixel and clipped."""
    after = before.clone()
    for n, c, i, j in np.ndindex(*before.shape):
        after[n, c, i, j] = min(max(change(before[n, c, i, j].item(), c, i, j), 0.0), 1.0)
    return after


class TestContract:
    def test_triggers_are_deterministic_saturate_and_leave_the_input_alone(self, attacks):
        for attack in attacks:
            for before in (images(3, 8, 6), torch.zeros(2, 3, 8, 6), torch.ones(2, 3, 8, 6)):
                kept = before.clone()
                after = attack.trigger(before)
                assert torch.equal(before, kept)
                assert torch.equal(after, attack.trigger(before))
                assert after.shape == before.shape
                assert after.min() >= 0
                assert after.max() <= 1
                assert not torch.equal(after, before) or before.min() == 1

    def test_each_image_is_triggered_by_itself(self, attacks):
        before = images(3, 8, 6)
        for attack in attacks:
            assert torch.equal(attack.trigger(before), torch.cat([attack.trigger(one[None]) for one in before]))

    def test_the_type_of_the_images_is_kept(self, attacks):
        for attack in attacks:
            assert attack.trigger(images(3, 8, 6).double()).dtype == torch.float64

    def test_no_images_in_no_images_out(self, attacks):
        for attack in attacks:
            assert attack.trigger(torch.zeros(0, 3, 8, 6)).shape == (0, 3, 8, 6)

    def test_using_an_attack_does_not_change_what_it_is(self, attacks):
        for attack in attacks:
            told, copy = describe(attack), pickle.loads(pickle.dumps(attack))
            attack.trigger(images(3, 8, 6))
            assert describe(attack) == told
            assert attack == copy

    @pytest.mark.parametrize(
        ("bad", "text"),
        [
            (torch.zeros(3, 8, 6), r"got \(3, 8, 6\) torch.float32"),
            (torch.zeros(1, 3, 8, 6, dtype=torch.uint8), r"got \(1, 3, 8, 6\) torch.uint8"),
            (torch.full((1, 3, 8, 6), 255.0), "got 255 to 255"),
            (torch.full((1, 3, 8, 6), -0.1), "got -0.1 to -0.1"),
            (torch.full((1, 3, 8, 6), torch.nan), "got nan to nan"),
            ([[0.5]], "got list"),
        ],
    )
    def test_bad_images_are_refused(self, attacks, bad, text):
        for attack in attacks:
            with pytest.raises(DataError, match=text):
                attack.trigger(bad)

    @pytest.mark.parametrize(
        ("result", "text"),
        [
            (lambda x: x + 2, r"images from author in \[0, 1\], got 2 to 2"),
            (lambda x: x[..., :1], r"that went in, \(1, 3, 8, 6\) torch.float32, got \(1, 3, 8, 1\)"),
            (lambda x: x.double(), "torch.float64"),
            (lambda x: None, "images from author .* got NoneType"),
        ],
    )
    def test_what_an_author_returns_is_checked(self, result, text):
        class Author(Attack):
            name = "author"

            def _trigger(self, images):
                return result(images)

        with pytest.raises(DataError, match=text):
            Author().trigger(torch.zeros(1, 3, 8, 6))

    def test_an_author_may_write_to_the_images(self):
        class Author(Attack):
            name = "author"

            def _trigger(self, images):
                return images.fill_(1)

        before = torch.zeros(1, 3, 8, 6)
        assert Author().trigger(before).min() == 1
        assert before.max() == 0


class TestTargets:
    def test_all_to_one(self):
        assert target_labels(torch.tensor([0, 4, 2]), 2, 5).tolist() == [2, 2, 2]

    def test_all_to_all_wraps_around(self):
        assert target_labels(torch.arange(5), "all-to-all", 5).tolist() == [1, 2, 3, 4, 0]

    @pytest.mark.parametrize("target", [-1, 5, "all-to-one", 1.0])
    def test_what_is_no_target_is_refused(self, target):
        with pytest.raises(ConfigError, match='expected target "all-to-all" or a class from 0 to 4, got'):
            target_labels(torch.arange(5), target, 5)


class TestBadNets:
    def test_defaults_are_the_white_square_of_backdoorbench(self):
        before = images()
        expected = looped(before, lambda x, c, i, j: 1.0 if 29 <= i <= 31 and 29 <= j <= 31 else x)
        assert torch.equal(BadNets().trigger(before), expected)

    def test_the_square_of_ibau(self):
        before = images()
        after = BadNets(size=4, row=27, col=27).trigger(before)
        expected = looped(before, lambda x, c, i, j: 1.0 if i in (27, 28, 29, 30) and j in (27, 28, 29, 30) else x)
        assert torch.equal(after, expected)

    def test_the_grid_of_rnp_and_abl(self):
        before = images()
        white = {(29, 31), (30, 30), (31, 29), (31, 31)}
        expected = looped(before, lambda x, c, i, j: float((i, j) in white) if i >= 29 and j >= 29 else x)
        assert torch.equal(BadNets(pattern="grid").trigger(before), expected)

    def test_rows_and_columns_are_not_mixed_up(self):
        after = BadNets(size=1, row=0, col=2, value=0.25).trigger(torch.zeros(1, 1, 2, 4))
        assert after[0, 0].tolist() == [[0, 0, 0.25, 0], [0, 0, 0, 0]]

    def test_the_grid_has_one_size(self):
        with pytest.raises(ConfigError, match="expected size 3 with the grid, got 4"):
            BadNets(pattern="grid", size=4)

    @pytest.mark.parametrize("place", [{"row": 6}, {"col": 4}, {"size": 9}, {"size": 7}])
    def test_a_patch_outside_of_the_image_is_refused(self, place):
        with pytest.raises(DataError, match="inside of the 8x6 image"):
            BadNets(**place).trigger(images(3, 8, 6))


class TestAdditive:
    def test_adds_and_clips(self, files):
        image, _, pattern, _ = files
        before = images(3, 8, 6)
        expected = looped(before, lambda x, c, i, j: x + pattern[i, j, c] / 255)
        torch.testing.assert_close(Additive(image=image).trigger(before), expected)

    def test_gray_patterns_are_for_gray_images(self, tmp_path):
        Image.new("L", (6, 8), 51).save(tmp_path / "gray.png")
        attack = Additive(image=tmp_path / "gray.png")
        torch.testing.assert_close(attack.trigger(torch.zeros(1, 1, 8, 6)), torch.full((1, 1, 8, 6), 0.2))
        with pytest.raises(DataError, match=r"\(C, H, W\) = \(3, 8, 6\), got \(1, 8, 6\)"):
            attack.trigger(images(3, 8, 6))

    def test_another_size_is_refused(self, files):
        with pytest.raises(DataError, match=r"\(C, H, W\) = \(3, 6, 8\), got \(3, 8, 6\)"):
            Additive(image=files[0]).trigger(images(3, 6, 8))

    def test_transparency_is_refused(self, tmp_path):
        Image.new("RGBA", (6, 8)).save(tmp_path / "clear.png")
        with pytest.raises(DataError, match="transparency, got mode RGBA"):
            read_image(tmp_path / "clear.png")

    @pytest.mark.parametrize("cut", [0, 20, 60])
    def test_broken_files_are_refused(self, files, tmp_path, cut):
        broken = tmp_path / "broken.png"
        broken.write_bytes(files[0].read_bytes()[:cut])
        with pytest.raises(DataError, match="expected an image in"):
            Additive(image=broken).trigger(images(3, 8, 6))


class TestMasked:
    def test_fades_adds_and_clips(self, files):
        image, mask, pattern, weights = files
        before = images(3, 8, 6)
        expected = looped(before, lambda x, c, i, j: x * (1 - weights[c, i, j]) + pattern[i, j, c] / 255)
        torch.testing.assert_close(Masked(image=image, mask=mask).trigger(before), expected)

    def test_layouts_mean_the_same(self, files, tmp_path):
        image, mask, _, weights = files
        np.save(tmp_path / "hwc.npy", weights.transpose(1, 2, 0))
        before = images(3, 8, 6)
        expected = Masked(image=image, mask=mask).trigger(before)
        assert torch.equal(Masked(image=image, mask=tmp_path / "hwc.npy").trigger(before), expected)

    def test_one_layer_covers_all_channels(self, files, tmp_path):
        image, _, _, weights = files
        layer = (weights[0] > 0.5).astype(np.uint8)
        np.save(tmp_path / "hw.npy", layer)
        np.save(tmp_path / "bool.npy", layer.astype(bool))
        np.save(tmp_path / "chw.npy", np.stack([layer] * 3).astype(np.float64))
        Image.fromarray(layer * 255).save(tmp_path / "gray.png")
        Image.fromarray(np.stack([layer * 255] * 3, axis=2)).save(tmp_path / "rgb.png")
        masks = ("hw.npy", "bool.npy", "chw.npy", "gray.png", "rgb.png")
        results = [Masked(image=image, mask=tmp_path / name).trigger(images(3, 8, 6)) for name in masks]
        assert all(torch.equal(result, results[0]) for result in results)

    @pytest.mark.parametrize(
        ("values", "text"),
        [
            (np.zeros((6, 8)), r"layout HW, CHW or HWC .* got \(6, 8\)"),
            (np.zeros((2, 8, 6)), r"got \(2, 8, 6\)"),
            (np.full((8, 6), 255), r"\[0, 1\]"),
            (np.full((8, 6), np.nan), r"\[0, 1\]"),
            (np.full((8, 6), "x"), "<U1"),
            (np.full((8, 6), None), "allow_pickle=False"),
        ],
    )
    def test_masks_that_do_not_fit_are_refused(self, files, tmp_path, values, text):
        np.save(tmp_path / "bad.npy", values)
        with pytest.raises(DataError, match=text):
            Masked(image=files[0], mask=tmp_path / "bad.npy").trigger(images(3, 8, 6))

    def test_other_files_named_npy_are_refused(self, files, tmp_path):
        for content in (b"", b"PK\x03\x04", files[1].read_bytes()[:-8], pickle.dumps({})):
            (tmp_path / "bad.npy").write_bytes(content)
            with pytest.raises(DataError, match="expected an array of numbers"):
                Masked(image=files[0], mask=tmp_path / "bad.npy").trigger(images(3, 8, 6))


@needs_shared
@pytest.mark.parametrize("name", ["trojan_sq", "trojan_wm"])
def test_published_additive_triggers(name):
    path = SHARED / f"{name}.png"
    before = images()
    pattern = np.asarray(Image.open(path)).astype(np.float32)
    expected = np.clip(before.numpy() + pattern.transpose(2, 0, 1) / 255, 0, 1)
    torch.testing.assert_close(Additive(image=path).trigger(before), torch.from_numpy(expected))


@needs_shared
def test_published_l0_trigger_replaces_nine_pixels():
    before = images()
    after = Masked(image=SHARED / "l0_inv.png", mask=SHARED / "l0_inv_mask.npy").trigger(before)
    changed = (after != before).any(1).any(0).nonzero().tolist()
    assert changed == [[31, column] for column in range(23, 32)]
    assert torch.equal(after[:, :, 31, 23:], after[:1, :, 31, 23:].expand(5, 3, 9))
