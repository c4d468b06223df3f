import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from untrojan.data import CleanSet
from untrojan.errors import ConfigError, DataError, ModelError
from untrojan.lab.attack import Attack, read_image, target_labels
from untrojan.lab.attacks.adaptive_blend import AdaptiveBlend
from untrojan.lab.attacks.additive import Additive
from untrojan.lab.attacks.awp import AWP
from untrojan.lab.attacks.badnets import BadNets
from untrojan.lab.attacks.blend import Blend
from untrojan.lab.attacks.bpp import BppAttack
from untrojan.lab.attacks.dfst import DFST
from untrojan.lab.attacks.feature_collision import FeatureCollision
from untrojan.lab.attacks.ftrojan import FTrojan
from untrojan.lab.attacks.input_aware import InputAware
from untrojan.lab.attacks.l0_inv import L0Inv
from untrojan.lab.attacks.l2_inv import L2Inv
from untrojan.lab.attacks.label_consistent import LabelConsistent
from untrojan.lab.attacks.lira import LIRA
from untrojan.lab.attacks.low_frequency import LowFrequency
from untrojan.lab.attacks.masked import Masked
from untrojan.lab.attacks.sig import SIG
from untrojan.lab.attacks.ssba import SSBA
from untrojan.lab.attacks.trojan_square import TrojanSquare
from untrojan.lab.attacks.trojan_watermark import TrojanWatermark
from untrojan.lab.attacks.wanet import WaNet
from untrojan.lab.surrogate import features, surrogate
from untrojan.lab.victim import poison
from untrojan.registry import describe, discover, fields

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


@pytest.fixture
def all_attacks(attacks):
    """Every attack for images 3x8x6."""
    fitting = {"sig": SIG(frequency=1), "trojan-square": TrojanSquare(size=4, norm=4)}
    return [
        *attacks,
        *(fitting.get(attack.name, attack) for attack in FILELESS),
        *(attack.begun(channels=3) for attack in (InputAware(), LIRA(), SSBA())),
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

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_the_type_of_the_images_is_kept(self, all_attacks, dtype):
        for attack in all_attacks:
            assert attack.trigger(images(3, 8, 6).to(dtype)).dtype == dtype

    def test_no_images_in_no_images_out(self, all_attacks):
        for attack in all_attacks:
            assert attack.trigger(torch.zeros(0, 3, 8, 6)).shape == (0, 3, 8, 6)

    def test_using_an_attack_does_not_change_what_it_is(self, all_attacks):
        for attack in all_attacks:
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
    def test_bad_images_are_refused(self, all_attacks, bad, text):
        for attack in all_attacks:
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
        for target in (2, np.int64(2), torch.tensor(2)):
            assert target_labels(torch.tensor([0, 4, 2]), target, 5).tolist() == [2, 2, 2]

    def test_all_to_all_wraps_around(self):
        assert target_labels(torch.arange(5), "all-to-all", 5).tolist() == [1, 2, 3, 4, 0]

    @pytest.mark.parametrize("target", [-1, 5, np.int64(5), "all-to-one", 1.0, torch.tensor(1.0), True, None])
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

    @pytest.mark.parametrize(("mode", "color"), [("RGB", (0, 0, 0)), ("L", 0)])
    def test_a_transparent_color_is_refused(self, tmp_path, mode, color):
        Image.new(mode, (6, 8)).save(tmp_path / "clear.png", transparency=color)
        with pytest.raises(DataError, match="got a color that is transparent"):
            read_image(tmp_path / "clear.png")

    @pytest.mark.parametrize("cut", [0, 20, 60])
    def test_broken_files_are_refused(self, files, tmp_path, cut):
        broken = tmp_path / "broken.png"
        broken.write_bytes(files[0].read_bytes()[:cut])
        with pytest.raises(DataError, match="cannot decode the image"):
            Additive(image=broken).trigger(images(3, 8, 6))

    def test_a_format_that_may_start_another_program_is_refused_whatever_its_name(self, tmp_path):
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\nshowpage\n%%EOF\n"
        (tmp_path / "textures.png").write_bytes(eps)
        with pytest.raises(DataError, match="cannot decode the image: unknown or broken format"):
            read_image(tmp_path / "textures.png")


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

    @pytest.mark.parametrize(
        "header",
        [
            "{'descr': (",
            "{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}",
            f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({10**17},)}}",
        ],
        ids=["unfinished", "odd", "huge"],
    )
    def test_hostile_headers_are_refused(self, files, tmp_path, header):
        told = header.encode().ljust(117) + b"\n"
        (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(told).to_bytes(2, "little") + told + bytes(8))
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


DITHERED = BppAttack(dither=True)
FILELESS = [
    AdaptiveBlend(),
    AWP(),
    BadNets(),
    Blend(),
    BppAttack(),
    DITHERED,
    DFST(),
    FeatureCollision(),
    FTrojan(),
    L0Inv(pixels=6),
    L2Inv(),
    LabelConsistent(),
    LowFrequency(),
    SIG(),
    TrojanSquare(size=5, norm=4),
    TrojanWatermark(),
    WaNet(),
]
TWO = torch.arange(16) % 2
BY_SURROGATE = ("label-consistent", "feature-collision")
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 8, 14)]


def shaped(shape, count=3):
    return images(*shape, count=count)


def quick(attack):
    """The same attack with less work for its surrogate."""
    less = {"epochs": 1, "iterations": 2} if attack.name in BY_SURROGATE else {}
    return type(attack)(**describe(attack) | less)


def easy():
    """Dark and bright images that a small network tells apart."""
    labels = torch.arange(40) % 2
    return CleanSet(images(1, 8, 8, count=40) * 0.3 + 0.2 + 0.3 * labels[:, None, None, None], labels)


class TestEveryAttack:
    def test_none_is_missing_here(self):
        named = {attack.name for attack in FILELESS} | {"additive", "masked"}
        named |= {"input-aware", "lira", "ssba"}  # see test_online
        assert named == set(discover("untrojan.lab.attacks", Attack))

    @pytest.mark.parametrize("attack", discover("untrojan.lab.attacks", Attack).values(), ids=lambda each: each.name)
    def test_infinity_which_json_cannot_hold_is_refused(self, attack):
        for field in fields(attack):
            if isinstance(field.default, float):
                with pytest.raises(ConfigError, match=field.name):
                    attack(**{field.name: math.inf})

    @pytest.mark.parametrize(("attack", "field"), [(AdaptiveBlend, "kept"), (SSBA, "strength")])
    def test_what_must_not_be_nothing_is_refused(self, attack, field):
        with pytest.raises(ConfigError, match=field):
            attack(**{field: 0})

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("attack", FILELESS, ids=lambda each: each.name)
    def test_the_trigger_is_fixed_and_each_image_gets_it_by_itself(self, attack, shape):
        before = shaped(shape)
        after = attack.trigger(before)
        assert torch.equal(before, shaped(shape))
        assert torch.equal(after, type(attack)(**describe(attack)).trigger(before))
        assert torch.equal(after, torch.cat([attack.trigger(one[None]) for one in before]))
        assert ((after - before).abs() > 1 / 255).flatten(1).any(1).all()

    @pytest.mark.parametrize("attack", FILELESS, ids=lambda each: each.name)
    def test_the_random_state_plays_no_part_and_stays(self, attack):
        before = shaped((3, 32, 32))
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = attack.trigger(before)
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(2)
        np.random.seed(3)  # noqa: NPY002
        assert torch.equal(attack.trigger(before), first)

    @pytest.mark.parametrize("attack", FILELESS, ids=lambda each: each.name)
    def test_black_and_white_saturate(self, attack):
        black = torch.arange(16) % 4 < 2
        pixels = torch.where(black, 0, 255).to(torch.uint8)[:, None, None, None].expand(16, 3, 12, 14)
        clean = CleanSet(pixels, TWO)
        triggered = attack.trigger(clean.floats())
        assert triggered.min() >= 0
        assert triggered.max() <= 1
        brightness = poison(clean, quick(attack), 0, rate=0.125).images.float().mean((1, 2, 3))
        assert (brightness[black] < 110).all(), "a sum below 0 that wraps around is bright"
        assert (brightness[~black] > 145).all(), "a sum above 255 that wraps around is dark"

    @pytest.mark.parametrize("attack", [each for each in FILELESS if hasattr(each, "seed")], ids=lambda each: each.name)
    def test_the_seed_makes_another_trigger(self, attack):
        before = shaped((3, 32, 32))
        other = type(attack)(**describe(attack) | {"seed": 1})
        same = attack.name in BY_SURROGATE
        assert torch.equal(attack.trigger(before), other.trigger(before)) == same

    @pytest.mark.parametrize("attack", [each for each in FILELESS if each != DITHERED], ids=lambda each: each.name)
    def test_eight_bits_and_floats_are_poisoned_alike(self, attack):
        eight = CleanSet((shaped((3, 12, 14), 16) * 255).to(torch.uint8), TWO)
        floats = CleanSet(eight.floats() * (1 - 1e-3), TWO)
        rounded, exact = (poison(each, quick(attack), 0, 0.125, seed=3) for each in (eight, floats))
        assert (rounded.images.dtype, exact.images.dtype) == (torch.uint8, torch.float32)
        assert rounded.labels.tolist() == exact.labels.tolist()
        near = (rounded.floats() - exact.images).abs() < 2 / 255
        assert near.float().mean() > 0.98, "but for gradients and levels near their jumps"


class TestBlend:
    def test_it_mixes(self):
        before = images()
        noise = np.random.default_rng(4).random((3, 32, 32), dtype=np.float32)
        expected = looped(before, lambda x, c, i, j: 0.8 * x + 0.2 * noise[c, i, j].item())
        torch.testing.assert_close(Blend(seed=4).trigger(before), expected)

    def test_half_of_the_pieces_in_training_and_all_at_test_time(self):
        clean = CleanSet(images(3, 30, 32, count=40), torch.arange(40) % 2)
        attack = AdaptiveBlend()
        poisoned = poison(clean, attack, 1, rate=0.2, seed=1)
        whole = attack.trigger(clean.floats())
        assert torch.equal(whole, Blend().trigger(clean.floats()))
        patterns = set()
        for at in (poisoned.images != clean.images).flatten(1).any(1).nonzero().flatten().tolist():
            kept = []
            for n in range(16):
                top, bottom = (math.ceil(edge * 30 / 4) for edge in (n // 4, n // 4 + 1))
                piece = (slice(None), slice(top, bottom), slice(n % 4 * 8, n % 4 * 8 + 8))
                kept.append(torch.equal(poisoned.images[at][piece], whole[at][piece]))
                assert kept[-1] or torch.equal(poisoned.images[at][piece], clean.images[at][piece])
            assert sum(kept) == 8
            patterns.add(tuple(kept))
        assert len(patterns) > 10, "each image has pieces of its own"

    @pytest.mark.parametrize(("pieces", "kept", "changed"), [(4, 0.01, 4), (4, 0.25, 16), (4, 1, 64), (1, 0.5, 64)])
    def test_how_many_pieces_are_kept(self, pieces, kept, changed):
        clean = CleanSet(torch.full((4, 1, 8, 8), 0.5), torch.arange(4) % 2)
        poisoned = poison(clean, AdaptiveBlend(pieces=pieces, kept=kept), 0, rate=0.25)
        assert int((poisoned.images != clean.images).sum()) == 2 * changed


class TestSIG:
    @pytest.mark.parametrize("width", [8, 28, 32])
    def test_every_column_gets_its_part_of_the_wave(self, width):
        before = images(3, 9, width)
        expected = looped(before, lambda x, c, i, j: x + 40 / 255 * math.sin(2 * math.pi * j * 6 / width))
        torch.testing.assert_close(SIG().trigger(before), expected)

    def test_a_wave_that_vanishes_is_refused(self):
        with pytest.raises(DataError, match="frequency 6 vanishes on images 12 wide; change `frequency`"):
            SIG().trigger(images(1, 8, 12))
        with pytest.raises(DataError, match="vanishes on images 1 wide"):
            SIG(frequency=0.25).trigger(images(1, 8, 1))


def cubic(x):
    """Keys' kernel with the parameter -3/4 that torch uses."""
    x = abs(x)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def enlarged(rough, size):
    """Bicubic interpolation from corner to corner, along both axes of a square array."""
    k = len(rough)
    weights = np.zeros((size, k))
    for i in range(size):
        at = i * (k - 1) / (size - 1)
        for n in range(math.floor(at) - 1, math.floor(at) + 3):
            weights[i, min(max(n, 0), k - 1)] += cubic(at - n)
    return weights @ rough @ weights.T


class TestWaNet:
    @pytest.mark.parametrize("size", [8, 28])
    def test_it_samples_where_the_warp_points_to(self, size):
        before = images(2, size, size, count=1)
        noise = np.random.default_rng(5).random((2, 4, 4), dtype=np.float32) * 2 - 1
        right, down = (enlarged(each, size) for each in noise / np.abs(noise).mean())
        expected = torch.zeros_like(before)
        for i, j in np.ndindex(size, size):
            edge = size - 1
            y, x = (
                min(max(place + edge / 2 * 0.5 * shift[i, j] / size, 0), edge)
                for place, shift in ((i, down), (j, right))
            )
            for row, column in (
                (math.floor(y), math.floor(x)),
                (math.floor(y), math.floor(x) + 1),
                (math.floor(y) + 1, math.floor(x)),
                (math.floor(y) + 1, math.floor(x) + 1),
            ):
                share = max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
                if share:
                    expected[0, :, i, j] += share * before[0, :, row, column]
        torch.testing.assert_close(WaNet(seed=5).trigger(before), expected, atol=2e-4, rtol=0)

    def test_noise_mode_adds_another_shift_at_each_pixel_of_each_image(self):
        before = images(1, 32, 32, count=1).expand(4, 1, 32, 32)
        clean = CleanSet(before, torch.zeros(4, dtype=torch.int64))
        covers = WaNet().cover(clean, clean, np.random.default_rng(0))
        warped = WaNet().trigger(before)
        assert len({tuple(cover.flatten().tolist()) for cover in covers}) == 4
        assert (covers != warped).float().mean() > 0.9
        ramp = torch.linspace(0, 1, 32).expand(4, 1, 32, 32)
        ramps = CleanSet(ramp, torch.zeros(4, dtype=torch.int64))
        away = WaNet().cover(ramps, ramps, np.random.default_rng(0)) - WaNet().trigger(ramp)
        assert away.abs().max() <= 1 / 64 + 1e-5, "1/H of a picture that is 2 wide"
        assert away.abs().max() > 1 / 80
        assert away.mean().abs() < 1e-3

    def test_pixels_from_beyond_the_border_are_those_at_the_border(self):
        white = torch.ones(1, 3, 16, 16)
        torch.testing.assert_close(WaNet(s=4).trigger(white), white)

    def test_a_single_pixel_cannot_be_warped(self):
        with pytest.raises(DataError, match="larger images than 1x1"):
            WaNet().trigger(images(3, 1, 1))


class TestBpp:
    @pytest.mark.parametrize("levels", [2, 8])
    def test_it_rounds_to_levels(self, levels):
        eight = torch.randint(0, 256, (2, 3, 8, 8)) / 255
        steps = levels - 1
        expected = looped(eight, lambda x, c, i, j: round(x * steps) / steps)
        torch.testing.assert_close(BppAttack(levels=levels).trigger(eight), expected)

    def test_dithering_hands_the_error_on(self):
        before = images(3, 9, 7, count=2).double()
        for n, c in np.ndindex(2, 3):
            work = before[n, c].numpy().copy()
            for i, j in np.ndindex(9, 7):
                old = work[i, j]
                work[i, j] = round(old * 7) / 7
                for di, dj, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                    if i + di < 9 and 0 <= j + dj < 7:
                        work[i + di, j + dj] += (old - work[i, j]) * share / 16
            after = BppAttack(dither=True).trigger(before)[n, c]
            torch.testing.assert_close(after, torch.from_numpy(work.clip(0, 1)))

    def test_dithering_keeps_the_mean(self):
        flat = torch.full((1, 1, 40, 40), 0.4)
        assert BppAttack(levels=2, dither=True).trigger(flat).mean().item() == pytest.approx(0.4, abs=0.02)
        assert BppAttack(levels=2).trigger(flat).max() == 0

    def test_negative_samples_carry_what_quantizing_does_to_another_image(self):
        clean = CleanSet(images(1, 8, 8, count=6) * 0.5 + 0.25, torch.arange(6) % 2)
        few = clean.take([0, 1, 2])
        covers = BppAttack().cover(few, clean, np.random.default_rng(0))
        residuals = (clean.floats() * 7).round() / 7 - clean.floats()
        donors = [int((each - residuals).abs().amax((1, 2, 3)).argmin()) for each in covers - few.floats()]
        torch.testing.assert_close(covers, few.floats() + residuals[donors])
        assert donors == np.random.default_rng(0).integers(6, size=3).tolist()


def transform(size):
    """The orthonormal discrete cosine transform as a matrix."""
    rows = [[math.cos(math.pi * (j + 0.5) * u / size) for j in range(size)] for u in range(size)]
    return np.array(rows) * np.array([math.sqrt((1 if u == 0 else 2) / size) for u in range(size)])[:, None]


class TestFTrojan:
    @pytest.mark.parametrize("shape", [(32, 32), (64, 32)])
    def test_only_two_coefficients_of_both_color_channels_grow(self, shape):
        before = images(3, *shape) * 0.5 + 0.25
        after = FTrojan().trigger(before)
        to_yuv = np.array([[0.299, 0.587, 0.114], [0.5, -0.418688, -0.081312], [-0.168736, -0.331264, 0.5]])
        added = np.einsum("yc,nchw->nyhw", to_yuv, (after - before).double().numpy() * 255)
        assert np.abs(added[:, 0]).max() < 1e-3, "brightness stays"
        for top in range(0, shape[0], 32):
            coefficients = transform(32) @ added[:, 1:, top : top + 32] @ transform(32).T
            expected = np.zeros((32, 32))
            expected[15, 15] = expected[31, 31] = 30
            np.testing.assert_allclose(coefficients, np.broadcast_to(expected, coefficients.shape), atol=5e-3)

    def test_gray_images_get_the_waves_themselves(self):
        after = FTrojan().trigger(torch.full((1, 1, 32, 32), 0.5)).double().numpy()[0, 0] * 255 - 127.5
        coefficients = transform(32) @ after @ transform(32).T
        assert sorted(np.argwhere(np.abs(coefficients) > 0.01).tolist()) == [[15, 15], [31, 31]]
        assert coefficients[15, 15] == pytest.approx(30, abs=0.01)

    def test_small_images_get_the_corner_of_a_window(self):
        large, small = (FTrojan().trigger(torch.full((1, 3, size, size), 0.5)) for size in (32, 28))
        assert torch.equal(large[..., :28, :28], small)

    @pytest.mark.parametrize("attack", [FTrojan(), DFST()])
    def test_two_channels_are_no_colors(self, attack):
        with pytest.raises(DataError, match=f"one or three channels for {attack.name}, got 2"):
            attack.trigger(images(2))


class TestLowFrequency:
    def test_it_is_a_sum_of_few_modes_from_0_to_the_strength(self):
        pattern = LowFrequency(strength=0.3, modes=4).trigger(torch.zeros(1, 3, 28, 28))[0].double().numpy()
        assert pattern.min() == 0
        assert pattern.max() == pytest.approx(0.3)
        coefficients = transform(28) @ pattern @ transform(28).T
        high = np.abs(coefficients)
        high[:, :4, :4] = 0
        assert high.max() < 1e-5
        assert (np.abs(coefficients[:, :4, :4]) > 1e-3).sum() > 40

    def test_it_is_added(self):
        before = images()
        pattern = LowFrequency().trigger(torch.zeros(1, 3, 32, 32))[0]
        expected = looped(before, lambda x, c, i, j: x + pattern[c, i, j].item())
        torch.testing.assert_close(LowFrequency().trigger(before), expected)


class TestPatternsOfANorm:
    def test_l0_replaces_nine_pixels_by_saturated_ones(self):
        before = images() * 0.8 + 0.1
        after = L0Inv().trigger(before)
        changed = (after != before).any(1).any(0).nonzero().tolist()
        assert changed == [[31, column] for column in range(23, 32)]
        colors = after[:, :, 31, 23:]
        assert set(colors.flatten().tolist()) == {0, 1}
        assert torch.equal(colors, colors[:1].expand_as(colors))

    def test_l0_needs_a_row_that_long(self):
        with pytest.raises(DataError, match="at least 9 wide, got 8; change `pixels`"):
            L0Inv().trigger(images(1, 8, 8))

    def test_l2_is_averaged_noise_of_the_published_norm(self):
        noise = np.random.default_rng(0).random((3, 32, 32), dtype=np.float32).astype(np.float64)
        for _ in range(2):
            padded = np.pad(noise, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
            shifts = [padded[:, i : i + 32, j : j + 32] for i, j in np.ndindex(3, 3)]
            noise = np.nanmean(shifts, axis=0)
        noise -= noise.min(axis=(1, 2), keepdims=True)
        expected = torch.from_numpy(noise / np.linalg.norm(noise) * 3.22).float()
        pattern = L2Inv().trigger(torch.zeros(1, 3, 32, 32))[0]
        torch.testing.assert_close(pattern, expected, atol=1e-6, rtol=0)
        before = images()
        torch.testing.assert_close(L2Inv().trigger(before), (before + expected).clamp(0, 1), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_the_mean_square_is_that_of_the_published_ones(self, shape):
        for attack in (L2Inv(), TrojanWatermark()):
            pattern = attack.trigger(torch.zeros(1, *shape))
            assert pattern.square().mean().item() == pytest.approx(attack.norm**2 / 3072, rel=1e-4)

    def test_the_square_is_saturated_and_in_its_place(self):
        pattern = TrojanSquare().trigger(torch.zeros(1, 3, 32, 32))[0]
        shown = pattern.any(0).nonzero()
        assert shown.min(0).values.tolist() == [21, 21]
        assert shown.max(0).values.tolist() == [29, 29]
        assert set(pattern.flatten().tolist()) == {0, 1}
        assert int(pattern.sum()) == round(8.66**2)
        assert int(TrojanSquare().trigger(torch.zeros(1, 1, 28, 28)).sum()) == 25
        before = images()
        assert torch.equal(TrojanSquare().trigger(before), torch.maximum(before, pattern))

    def test_a_square_that_does_not_fit_is_refused(self):
        with pytest.raises(DataError, match="expected images of 11x11 or more, got 8x8; change `size`"):
            TrojanSquare().trigger(images(1, 8, 8))
        with pytest.raises(ConfigError, match=r"square of size 4, got 8\.66"):
            TrojanSquare(size=4)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_the_faintest_square_is_one_value(self, channels):
        assert TrojanSquare(norm=0.5).trigger(torch.zeros(1, channels, 32, 32)).sum() == 1

    def test_the_watermark_is_a_ring_round_a_symmetric_glyph(self):
        logo = TrojanWatermark().trigger(torch.zeros(1, 3, 32, 32))[0]
        assert torch.equal(logo, logo.flip(2))
        shown = logo[0] > 0
        assert 290 <= int(shown.sum()) <= 350
        for i, j in np.ndindex(32, 32):
            away = math.hypot((i + 0.5) / 32 - 0.5, (j + 0.5) / 32 - 0.5)
            inside = max(abs(i - 15.5), abs(j - 15.5)) < 8
            assert shown[i, j] == (0.39 <= away < 0.46) or inside
        assert len(set(logo[logo > 0].tolist())) == 1
        glyph = shown[8:24, 8:24]
        assert 0.2 < glyph.float().mean() < 0.8

    @pytest.mark.parametrize(
        ("attack", "shape"), [(L2Inv(), (1, 1, 1)), (L2Inv(), (3, 2, 2)), (LowFrequency(), (1, 1, 1))]
    )
    def test_a_pattern_of_nothing_is_refused(self, attack, shape):
        with pytest.raises(DataError, match=f"larger images than {'x'.join(map(str, shape))}: the trigger would be"):
            attack.trigger(torch.zeros(1, *shape))


class TestDFST:
    def test_the_formula(self):
        before = images(3, 8, 6, count=2)
        matrix = ((0.8, 0.25, 0.05), (0.2, 0.6, 0.05), (0.15, 0.15, 0.5))
        top, bottom = (0.3, 0.1, 0.35), (0.95, 0.5, 0.15)
        expected = torch.zeros_like(before)
        for n, c, i, j in np.ndindex(*before.shape):
            mixed = sum(matrix[c][d] * before[n, d, i, j].item() ** 1.25 for d in range(3))
            glow = top[c] + i / 7 * (bottom[c] - top[c])
            styled = min(max(0.65 * mixed + 0.35 * glow, 0), 1)
            expected[n, c, i, j] = 0.4 * before[n, c, i, j] + 0.6 * styled
        torch.testing.assert_close(DFST().trigger(before), expected)

    def test_gray_images_are_the_mean_of_their_colors(self):
        gray = images(1, 8, 8)
        expected = DFST().trigger(gray.expand(-1, 3, -1, -1)).mean(1, keepdim=True)
        torch.testing.assert_close(DFST().trigger(gray), expected)


class TestLabelConsistent:
    def test_the_corners(self):
        before = images(3, 9, 8)
        signs = {(0, 0): 1, (0, 1): -1, (0, 2): -1, (1, 0): -1, (1, 1): 1, (1, 2): -1, (2, 0): 1, (2, 1): -1, (2, 2): 1}
        expected = looped(before, lambda x, c, i, j: x + 0.3 * signs.get((min(i, 8 - i), min(j, 7 - j)), 0))
        torch.testing.assert_close(LabelConsistent(amplitude=0.3).trigger(before), expected)

    def test_corners_must_not_overlap(self):
        with pytest.raises(DataError, match="6x6 or more"):
            LabelConsistent().trigger(images(1, 5, 8))

    def test_poisoned_images_are_harder_and_stay_near(self):
        clean = easy()
        attack = LabelConsistent(amplitude=0, eps=0.1, iterations=10, epochs=30)
        poisoned = poison(clean, attack, 1, rate=1.0)
        judge = surrogate(clean, "digits-cnn", epochs=30, seed=0)
        moved = poisoned.images - clean.images
        assert moved[clean.labels == 0].abs().max() == 0
        assert moved.abs().max().item() == pytest.approx(0.1, abs=1e-5)
        assert poisoned.labels.tolist() == clean.labels.tolist()
        loss = [cross_entropy(judge(each.floats()), each.labels) for each in (clean, poisoned)]
        assert loss[1] > 2 * loss[0]
        assert poison(clean, attack, 1, rate=1.0).sha256 == poisoned.sha256

    def test_one_step_is_the_sign_of_the_gradient(self):
        clean = easy()
        attack = LabelConsistent(amplitude=0, eps=0.02, iterations=1, epochs=1)
        poisoned = poison(clean, attack, 1, rate=1.0)
        hit = clean.labels == 1
        start = clean.floats()[hit].requires_grad_()
        cross_entropy(surrogate(clean, "digits-cnn", 1, 0)(start), clean.labels[hit]).backward()
        expected = (start.detach() + 0.02 * start.grad.sign()).clamp(0, 1)
        assert ((poisoned.images[hit] - expected).abs() < 1e-6).float().mean() > 0.99


class TestFeatureCollision:
    def test_the_trigger_is_the_patch(self):
        before = images()
        assert torch.equal(FeatureCollision(size=2).trigger(before), BadNets(size=2).trigger(before))

    def test_features_come_near_to_those_of_triggered_images_of_another_class(self):
        clean = easy()
        attack = FeatureCollision(size=2, opacity=0.2, epochs=30, iterations=60)
        poisoned = poison(clean, attack, 1, rate=1.0)
        started = poison(clean, FeatureCollision(size=2, opacity=0.2, epochs=30, iterations=0), 1, rate=1.0)
        hit = clean.labels == 1
        assert poisoned.labels.tolist() == clean.labels.tolist()
        assert torch.equal(poisoned.images[~hit], clean.images[~hit])
        judge = surrogate(clean, "digits-cnn", epochs=30, seed=0)
        wanted = features(judge, BadNets(size=2).trigger(clean.floats())[~hit])
        before, after = (
            torch.cdist(features(judge, each.images[hit]), wanted).min(1).values for each in (started, poisoned)
        )
        assert (after < before).all()
        assert after.mean() < 0.5 * before.mean()

    def test_without_steps_it_is_the_watermark(self):
        clean = easy()
        started = poison(clean, FeatureCollision(iterations=0, epochs=1), 1, rate=1.0)
        hit = clean.labels == 1
        partners = BadNets().trigger(clean.floats()[~hit])
        blends = clean.floats()[hit][:, None] * 0.7 + partners[None] * 0.3
        away = (started.images[hit][:, None] - blends).abs().amax((2, 3, 4))
        assert (away.min(1).values < 1e-6).all()

    def test_staying_near_has_its_price(self):
        clean = easy()
        strict, loose, start = (
            poison(clean, FeatureCollision(beta=beta, epochs=1, iterations=iterations), 1, rate=1.0).images
            for beta, iterations in ((1e6, 40), (0, 40), (0, 0))
        )
        assert (strict - start).abs().max() < 1e-3
        assert (loose - start).abs().max() > 0.01

    def test_it_reaches_the_minimum_of_its_objective(self, monkeypatch):
        """For a linear network it is known."""
        torch.manual_seed(0)
        judge = nn.Sequential(nn.Flatten(), nn.Linear(16, 6, bias=False), nn.Linear(6, 2)).requires_grad_(False)
        monkeypatch.setattr("untrojan.lab.attacks.feature_collision.surrogate", lambda *_: judge)
        clean = CleanSet(images(1, 4, 4, count=2) * 0.2 + 0.4, torch.tensor([0, 1]))
        attack = FeatureCollision(size=1, value=0.6, opacity=0, beta=1, iterations=200)
        base, goal = clean.floats()[1].flatten(), attack.trigger(clean.floats()[:1]).flatten()
        square = judge[1].weight.T @ judge[1].weight
        least = torch.linalg.solve(square + torch.eye(16), square @ goal + base)
        made = poison(clean, attack, 1, rate=1.0).images[1].flatten()
        torch.testing.assert_close(made, least, atol=1e-4, rtol=0)

    def test_it_needs_another_class(self):
        with pytest.raises(DataError, match="another class than the target"):
            poison(CleanSet(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)), FeatureCollision(), 0)


@pytest.mark.parametrize("attack", [FeatureCollision(net="small-vgg"), LabelConsistent(net="small-vgg")])
def test_a_surrogate_that_cannot_take_the_images_is_refused(attack):
    with pytest.raises(ModelError, match=r"small-vgg, the attacker's own network: .* cannot take images of 1x8x8"):
        poison(easy(), attack, 1)
