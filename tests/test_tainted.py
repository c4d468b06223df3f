"""Clean images that carry the trigger are told from those of their class, and no repair learns from them."""

import pytest
import torch
from tiny import Snapshot
from torch import nn

from untrojan.data import CleanSet
from untrojan.defenses.fine_tuning import FineTuning
from untrojan.errors import UnreliableWarning
from untrojan.record import Diagnosis, Rate, Target, Trigger
from untrojan.scanners.tainted import tainted

SQUARE = 9
PLACE = [2, 2, SQUARE, SQUARE]


class Bands(nn.Module):
    """Says which of the first bands of two rows is bright, or 1 where a square is white."""

    def __init__(self, classes=3):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.classes = classes

    def forward(self, images):
        bands = images[:, 0, : 2 * self.classes].unflatten(1, (self.classes, 2)).mean((2, 3))
        square = images[:, 0, SQUARE : SQUARE + 2, SQUARE : SQUARE + 2].mean((1, 2))
        return self.scale * bands + 200 * (square - 0.8).clamp(min=0)[:, None] * torch.arange(self.classes).eq(1)


def found(*places, label=1):
    known = {"what": "a patch", "success": Rate.of(9, 9), "picture": "", "examples": ""}
    trigger = Trigger(label=label, kind="patch", places=list(places), **known)
    targets = [Target(label=label, score=2)]
    return Diagnosis(verdict="found", rule="told", targets=targets, runs=[], triggers=[trigger])


def poisoned(count, classes=3):
    """Images for `Bands`, of which the last few of class 0 carry the square and are labelled 1."""
    labels = torch.arange(60) % classes
    images = 0.2 * torch.rand(60, 1, 16, 16)
    for row, label in enumerate(labels.tolist()):
        images[row, 0, 2 * label : 2 * label + 2] += 0.7
    rows = (labels == 0).nonzero().flatten()[len(labels) // classes - count :]
    images[rows, :, SQUARE : SQUARE + 2, SQUARE : SQUARE + 2] = 1
    labels[rows] = 1
    return CleanSet(images, labels), rows


@pytest.mark.parametrize("count", [2, 5])
def test_poisoned_images_are_told(count):
    clean, rows = poisoned(count)
    doubtful = tainted(Bands(), clean, found(PLACE), seed=0)
    assert doubtful.nonzero().flatten().tolist() == rows.tolist()


def test_one_of_several_places_suffices():
    clean, rows = poisoned(3)
    doubtful = tainted(Bands(), clean, found([2, 2, 5, 5], PLACE), seed=0)
    assert doubtful.nonzero().flatten().tolist() == rows.tolist()


@pytest.mark.parametrize(
    "diagnosis",
    [found(), found([2, 2, 5, 5]), found(PLACE, label=0), Diagnosis(verdict="found", rule="", targets=[], runs=[])],
    ids=["no place", "another place", "another label", "no trigger"],
)
def test_without_the_place_nobody_is_accused(diagnosis):
    clean, _ = poisoned(3)
    assert not tainted(Bands(), clean, diagnosis, seed=0).any()


def test_a_single_one_may_be_chance():
    clean, _ = poisoned(1)
    assert not tainted(Bands(), clean, found(PLACE), seed=0).any()


def test_clean_images_are_not_accused():
    assert not tainted(Bands(), poisoned(0)[0], found(PLACE), seed=0).any()


def test_places_that_hide_what_images_show_are_not_used():
    """The first rows are what the network looks at, so to cover them as well tells nothing."""
    clean, _ = poisoned(3)
    assert not tainted(Bands(), clean, found([12, 16, 0, 0]), seed=0).any()


def test_of_two_classes_nothing_can_be_told():
    clean, _ = poisoned(3, classes=2)
    assert not tainted(Bands(2), clean, found(PLACE), seed=0).any()


def test_a_class_is_never_left_without_images():
    clean, rows = poisoned(3)
    kept = torch.cat([(clean.labels == 0).nonzero().flatten(), rows])
    assert not tainted(Bands(), clean.take(kept), found(PLACE), seed=0).any()


def test_the_model_stays():
    clean, _ = poisoned(3)
    net = Bands().train()
    before = Snapshot(net)
    tainted(net, clean, found(PLACE), seed=0)
    before.assert_same()


@pytest.mark.usefixtures("short_searches")
def test_a_repair_leaves_them_out_and_says_so():
    clean, _ = poisoned(5)
    with pytest.warns(UnreliableWarning, match="5 of the 60 clean images lose their label .* are left out"):
        record = FineTuning(epochs=1, hold_out=0).repair(Bands(), clean, found(PLACE)).record
    assert record.before.accuracy.total == 55
    assert record.clean.images == 60
    assert any("may be poisoned" in text for text in record.warnings)
