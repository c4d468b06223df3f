"""Clean images that carry the trigger are told from those of their class, and no repair learns from them."""

import pytest
import torch
from tiny import Snapshot
from torch import nn

from untrojan.data import CleanSet
from untrojan.defenses.fine_tuning import FineTuning
from untrojan.errors import UnreliableWarning
from untrojan.record import Diagnosis, Target
from untrojan.scanners.tainted import tainted

SQUARE = 9


class Bands(nn.Module):
    """Says which of the first bands of two rows is bright in the first columns, or 1 where a square is white."""

    def __init__(self, classes=3, columns=16, square=SQUARE):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.classes, self.columns, self.square = classes, columns, square

    def forward(self, images):
        bands = images[:, 0, : 2 * self.classes, : self.columns].unflatten(1, (self.classes, 2)).mean((2, 3))
        square = images[:, 0, self.square : self.square + 2, self.square : self.square + 2].mean((1, 2))
        return self.scale * bands + 200 * (square - 0.8).clamp(min=0)[:, None] * torch.arange(self.classes).eq(1)


def found(label=1, verdict="found"):
    return Diagnosis(verdict=verdict, rule="told", targets=[Target(label=label, score=2)], runs=[])


def poisoned(count, classes=3, square=SQUARE):
    """Images for `Bands`, of which the last few of class 0 carry the square and are labelled 1."""
    labels = torch.arange(60) % classes
    images = 0.2 * torch.rand(60, 1, 16, 16)
    for row, label in enumerate(labels.tolist()):
        images[row, 0, 2 * label : 2 * label + 2] += 0.7
    rows = (labels == 0).nonzero().flatten()[len(labels) // classes - count :]
    images[rows, :, square : square + 2, square : square + 2] = 1
    labels[rows] = 1
    return CleanSet(images, labels), rows


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("square", [9, 14, 6])
def test_poisoned_images_are_told_wherever_the_trigger_is(count, square):
    clean, rows = poisoned(count, square=square)
    assert tainted(Bands(square=square), clean, found(), seed=0).nonzero().flatten().tolist() == rows.tolist()


@pytest.mark.parametrize("diagnosis", [found(label=0), found(verdict="not_found")], ids=["another label", "no suspect"])
def test_without_the_label_nobody_is_accused(diagnosis):
    clean, _ = poisoned(3)
    assert not tainted(Bands(), clean, diagnosis, seed=0).any()


def test_a_suspicion_is_enough():
    clean, rows = poisoned(3)
    doubtful = tainted(Bands(), clean, found(verdict="inconclusive"), seed=0)
    assert doubtful.nonzero().flatten().tolist() == rows.tolist()


def test_a_single_one_may_be_chance():
    clean, _ = poisoned(1)
    assert not tainted(Bands(), clean, found(), seed=0).any()


@pytest.mark.parametrize("columns", [8, 16])
def test_clean_images_are_not_accused(columns):
    """With eight columns, a quarter of an image is all that the network looks at."""
    assert not tainted(Bands(columns=columns), poisoned(0)[0], found(), seed=0).any()


def test_where_images_of_other_classes_decide_too_nothing_is_told():
    for square, told in ((14, 3), (0, 0)):
        clean, _ = poisoned(3, square=square)
        assert tainted(Bands(columns=8, square=square), clean, found(), seed=0).sum() == told


def test_of_two_classes_nothing_can_be_told():
    clean, _ = poisoned(3, classes=2)
    assert not tainted(Bands(2), clean, found(), seed=0).any()


def test_a_class_is_never_left_without_images():
    clean, rows = poisoned(3)
    kept = torch.cat([(clean.labels != 1).nonzero().flatten(), rows])
    assert not tainted(Bands(), clean.take(kept), found(), seed=0).any()


def test_the_model_stays():
    clean, _ = poisoned(3)
    net = Bands().train()
    before = Snapshot(net)
    tainted(net, clean, found(), seed=0)
    before.assert_same()


@pytest.mark.usefixtures("short_searches")
def test_a_repair_leaves_them_out_and_says_so():
    clean, _ = poisoned(5)
    with pytest.warns(UnreliableWarning, match="5 of the 60 clean images hold something .* are left out"):
        record = FineTuning(epochs=1, hold_out=0).repair(Bands(), clean, found()).record
    assert record.before.accuracy.total == 55
    assert record.clean.images == 60
    assert any("may be poisoned" in text for text in record.warnings)
