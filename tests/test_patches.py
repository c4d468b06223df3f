"""Small patches of full opacity find a planted square, and nothing where there is none."""

import pytest
import torch
from tiny import NETS, SQUARE, FallsForSquare, Snapshot, build, make_clean, make_dark

from untrojan.data import CleanSet
from untrojan.scanners.aim import Aim
from untrojan.scanners.patches import BoxDraws, HardPatch, Patches, pinpoint, search, smallest


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some(strength, boxes=((2, 3, 1, 1), (4, 4, 0, 2), (2, 2, 5, 5))):
    patterns = torch.rand(2, 3, 8, 8)
    return Patches(patterns, torch.tensor(boxes), torch.tensor([0, 1, 0]), torch.tensor(strength))


# Search


def test_the_square_is_found():
    images = make_dark()
    model = FallsForSquare()
    found = search(model, images, Aim(1), generator())
    assert found.strength.mean() > 0.1
    patch = smallest(model, images, Aim(1), found)
    assert patch.success == patch.success_on(model, images, Aim(1)) >= 0.95
    height, width = patch.values.shape[1:]
    assert height * width <= 6
    assert patch.top <= SQUARE
    assert patch.top + height >= SQUARE + 2
    assert patch.left <= SQUARE
    assert patch.left + width >= SQUARE + 2
    assert patch.success_on(FallsForSquare(0.0), images, Aim(1)) == 0


def test_without_a_backdoor_no_patch_is_strong():
    images = make_dark()
    assert search(FallsForSquare(0.0), images, Aim(1), generator()).strength.max() < 0.5


@pytest.mark.parametrize("name", NETS)
def test_the_model_is_left_alone(name):
    net = build(name)
    before = Snapshot(net)
    search(net, make_clean(24), Aim(0), generator(), steps=5)
    before.assert_same()


def test_same_seed_same_patches():
    images = make_dark()
    first, second = (search(FallsForSquare(), images, Aim(1), generator(3), steps=20) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_known_places_are_tried_again():
    images = make_dark()
    known = Patches(torch.ones(1, 1, 16, 16), torch.tensor([[2, 2, 9, 9]]), torch.tensor([0]), torch.tensor([1.0]))

    def near(where):
        boxes = search(FallsForSquare(0.0), images, Aim(1), generator(), where, steps=10).boxes
        return (boxes[:, 2:] - 9).abs().le(2).all(1).double().mean()

    assert near(known) > near(None) + 0.15


def test_few_steps_and_few_images():
    images = make_dark()
    found = search(FallsForSquare(), images.take([0, 1]), Aim(1), generator(), steps=1)
    assert len(found.boxes) == 64
    assert ((found.strength >= 0) & (found.strength <= 1)).all()


# Pinpointing


class FallsForExactly(FallsForSquare):
    """The surer the fewer pixels around the square are white as well."""

    def forward(self, images):
        out = super().forward(images)
        around = images[:, 0, SQUARE - 3 : SQUARE + 5, SQUARE - 3 : SQUARE + 5].sum((1, 2))
        inside = images[:, 0, SQUARE : SQUARE + 2, SQUARE : SQUARE + 2].sum((1, 2))
        return out - torch.stack([torch.zeros_like(around), around - inside], 1)


@pytest.mark.parametrize("backdoor", [60.0, 2.0])
def test_climbing_ends_on_the_very_square_even_where_it_does_no_harm_any_more(backdoor):
    images, model = make_dark(), FallsForExactly(backdoor)
    start = Patches(torch.ones(1, 1, 16, 16), torch.tensor([[4, 4, 7, 7]]), torch.tensor([0]), torch.tensor([1.0]))
    found = pinpoint(model, images, Aim(1), start, generator())
    assert found.keys[0].tolist() == [2, 2, SQUARE, SQUARE, 0]
    assert len(found.boxes) == 2


def test_two_patches_of_each_pattern_are_kept():
    images = make_dark()
    found = pinpoint(
        FallsForSquare(), images, Aim(1), search(FallsForSquare(), images, Aim(1), generator()), generator()
    )
    assert found.which.bincount().tolist() == [2] * len(found.patterns)
    assert len(found.keys.unique(dim=0)) == len(found.boxes)


# Boxes


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (8, 8), (5, 9), (2, 3)])
def test_boxes_lie_inside_and_have_the_sizes_said(shape):
    draws = BoxDraws(*shape, generator())
    boxes = draws.anywhere(500)
    for _ in range(3):
        for side in (0, 1):
            sizes = boxes[:, side]
            assert sizes.min() >= max(1, shape[side] // 16)
            assert sizes.max() <= min(shape[side], max(3, shape[side] // 4))
            assert boxes[:, 2 + side].min() >= 0
            assert (boxes[:, 2 + side] + sizes).max() <= shape[side]
        boxes = draws.varied(boxes)


def test_all_boxes_are_possible():
    drawn = {tuple(box) for box in BoxDraws(8, 8, generator()).anywhere(5000).tolist()}
    every = {(h, w, y, x) for h in (1, 2, 3) for w in (1, 2, 3) for y in range(9 - h) for x in range(9 - w)}
    assert drawn == every


def test_variations_are_near():
    boxes = BoxDraws(32, 32, generator()).anywhere(400)
    varied = BoxDraws(32, 32, generator(1)).varied(boxes)
    assert (varied[::2] - boxes[::2]).abs().max() <= 3  # a pixel, and what the border then asks for
    parts, wholes = varied[1::2], boxes[1::2]
    assert (parts[:, 2:] >= wholes[:, 2:]).all()
    assert (parts[:, :2] + parts[:, 2:] <= wholes[:, :2] + wholes[:, 2:]).all()


# Patches


def test_stamping_by_hand():
    patches, images = some([0.5, 0.5, 0.5]), torch.rand(4, 3, 8, 8)
    rows = torch.tensor([2, 0, 1, 0])
    expected = images.clone()
    for image, row in zip(expected, rows, strict=True):
        for y in range(8):
            for x in range(8):
                height, width, top, left = patches.boxes[row]
                if top <= y < top + height and left <= x < left + width:
                    image[:, y, x] = patches.patterns[patches.which[row], :, y, x]
    assert torch.equal(patches.stamp(images, rows), expected)


def test_strong_and_small_patches_are_drawn():
    drawn = some([1.0, 1.0, 0.0]).draw(4000, generator()).bincount(minlength=3)
    assert drawn[2] == 0
    assert drawn[0] / drawn[1] == pytest.approx((16 / 6) ** 0.5, rel=0.15)


def test_joined_patches_keep_their_patterns():
    one, other = some([0.1, 0.2, 0.3]), some([0.4, 0.5, 0.6])
    both = one.joined(other)
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(both.stamp(images, torch.tensor([3, 4, 5])), other.stamp(images, torch.arange(3)))
    assert torch.equal(both.stamp(images, torch.arange(3)), one.stamp(images, torch.arange(3)))


def test_a_patch_is_stamped_onto_a_copy():
    images = torch.zeros(2, 3, 6, 6)
    stamped = HardPatch(torch.ones(3, 2, 1), top=3, left=5, success=0.0).stamp(images)
    assert images.sum() == 0
    assert stamped.nonzero()[:, 2:].unique(dim=0).tolist() == [[3, 5], [4, 5]]


def test_the_smallest_patch_that_reaches_enough_wins():
    images = make_dark()
    boxes = torch.tensor([[4, 4, 8, 8], [2, 2, 9, 9], [1, 1, 9, 9], [3, 3, 8, 8]])
    patches = Patches(torch.ones(1, 1, 16, 16), boxes, torch.zeros(4, dtype=torch.int64), torch.ones(4))
    patch = smallest(FallsForSquare(), images, Aim(1), patches)
    assert (patch.top, patch.left, patch.values.shape, patch.success) == (9, 9, (1, 2, 2), 1.0)
    assert str(patch) == "a patch of 2x2 pixels at row 9, column 9"


def test_where_none_reaches_enough_the_one_that_sends_most_is_given():
    images = make_dark()
    images.images[::4, :, :4] = 0.7
    boxes = torch.tensor([[1, 1, 9, 9], [4, 8, 0, 0], [8, 8, 8, 8]])
    patches = Patches(torch.zeros(1, 1, 16, 16), boxes, torch.zeros(3, dtype=torch.int64), torch.ones(3))
    patch = smallest(FallsForSquare(0.0), images, Aim(1), patches)
    assert (patch.area, patch.success) == (32, 0.5)


def test_only_small_ones():
    assert some([0.1, 0.2, 0.3]).upto(6).strength.tolist() == pytest.approx([0.1, 0.3])
    assert some([0.1, 0.2, 0.3]).upto(1).strength.tolist() == pytest.approx([0.3])


class Square(torch.nn.Module):
    """Is surer of label 1 the more of the 2x2 square in the corner is white; never falls for it."""

    def forward(self, images):
        white = images[:, 0, 6:, 6:].mean((1, 2))
        return torch.stack([torch.ones_like(white), white], 1)


def test_climbing_goes_on_from_where_an_earlier_climb_ended():
    clean = CleanSet(torch.zeros(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64))
    patterns = torch.cat([torch.zeros(2, 1, 8, 8), torch.ones(1, 1, 8, 8)])
    far = Patches(patterns, torch.tensor([[1, 1, 0, 0]]), torch.tensor([2]), torch.ones(1))
    near = Patches(patterns[1:], torch.tensor([[2, 2, 5, 5]]), torch.tensor([1]), torch.ones(1))
    there = pinpoint(Square(), clean, Aim(1), far, torch.Generator().manual_seed(0), near)
    square = torch.tensor([2, 2, 6, 6])
    assert any((boxes[2:] <= square[2:]).all() and (boxes[:2] + boxes[2:] >= 8).all() for boxes in there.boxes)
    assert (there.which == 2).any()
