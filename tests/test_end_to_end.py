"""Scan and `auto` on real images, with nothing stubbed and no label given."""

from pathlib import Path

import pytest
import torch
from tiny import digits, train

from untrojan import CleanSet, load
from untrojan.defenses.auto import Auto
from untrojan.scanners.triggers import TriggerScanner
from untrojan.sources import nets

SHARED = Path(__file__).parents[2] / "shared"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no published checkpoints in {SHARED}")
def test_a_published_backdoor_is_found_and_shown():
    """With fewer images and steps than the defaults, so that it takes no minutes; the trigger is a square of 4x4."""
    model = load(SHARED / "checkpoints/ibau-cifar10-badnets-t8.pth", net="small-vgg:classes=10")
    clean = CleanSet.load(SHARED / "data/cifar10/train-lossless.parquet", samples=100)
    found = TriggerScanner(runs=2, search_steps=20, refine_steps=40).scan(model, clean)
    assert (found.verdict, found.found) == ("found", [8])
    [trigger] = found.triggers
    assert (trigger.label, trigger.kind) == (8, "patch")
    assert trigger.success.value > 0.8


@pytest.mark.slow
def test_a_clean_model_comes_out_bit_for_bit():
    order = torch.randperm(len(digits()), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = train(nets.build("digits-cnn"), digits().take(order[:1200]), epochs=12, lr=0.1, batch_size=64)
    repair = Auto().repair(model, digits().take(order[1200:1500]))
    assert (repair.record.status, repair.record.values_changed) == ("nothing_to_repair", 0)
    assert repair.record.diagnosis.verdict == "not_found"
    assert all(torch.equal(value, repair.model.state_dict()[name]) for name, value in model.state_dict().items())
