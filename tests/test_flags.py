"""Flags: every rule is up where it must be, and only there."""

from pathlib import Path

import pytest

from untrojan.lab.attacks.badnets import BadNets
from untrojan.lab.attacks.sig import SIG
from untrojan.lab.cell import Outcome
from untrojan.lab.evaluate import Scores
from untrojan.lab.flags import FLAGS, raised
from untrojan.record import CleanInfo, Rate

DOCS = Path(__file__).parents[1] / "docs" / "benchmark.md"
IMAGES = 2000


def scores(acc=0.9, asr=0.95, ra=0.04, predicted=(600, 500, 500, 400), others=1500, target=1, plain=0.02):
    return Scores(
        acc=Rate.of(round(acc * IMAGES), IMAGES),
        asr=Rate.of(round(asr * others), others),
        asr_without_trigger=Rate.of(round(plain * others), others),
        ra=Rate.of(round(ra * others), others),
        images=IMAGES,
        images_sha256="0",
        predicted=list(predicted),
        target=target,
    )


def outcome(before=None, after=None, **changes):
    images = CleanInfo(sha256="0", images=IMAGES, shape=(1, 8, 8), per_class=[500] * 4)
    given = {
        "verdict": "found",
        "suspect": 1,
        "status": "repaired",
        "reason": "it passes",
        "checks": [],
        "units_changed": 0,
        "units_total": 0,
        "values_changed": 7,
        "before": before or scores(),
        "after": after or scores(asr=0.02, ra=0.9),
        "clean": images.model_copy(update={"images": 100}),
        "test": images,
        "clean_in_test": 0,
        "stages": {},
        "repair_seconds": 1.0,
        "measure_seconds": 1.0,
        "scan_seconds": 1.0,
        "total_seconds": 1.0,
        "peak_memory_bytes": 1,
        "environment": {},
        "warnings": [],
    }
    return Outcome(**given | changes)


def up(made, attack=None, target=1):
    return {flag.name: flag.detail for flag in raised(made, attack or BadNets(), target)}


def test_nothing_is_up_where_all_is_well():
    assert up(outcome()) == {}


@pytest.mark.parametrize(
    ("attack", "target", "acc", "asr", "plain", "missed"),
    [
        (BadNets(), 1, 0.9, 0.9, 0.02, False),
        (BadNets(), 1, 0.9, 0.89, 0.02, True),
        (SIG(), 1, 0.9, 0.7, 0.02, False),
        (SIG(), 1, 0.9, 0.69, 0.02, True),
        (BadNets(), "all-to-all", 0.8, 0.73, 0.02, False),
        (BadNets(), "all-to-all", 0.8, 0.71, 0.02, True),
        (BadNets(), 1, 0.5, 1.0, 0.5, False),
        (BadNets(), 1, 0.5, 1.0, 0.51, True),
    ],
)
def test_an_attack_must_have_taken(attack, target, acc, asr, plain, missed):
    others = IMAGES if target == "all-to-all" else 1500
    before = scores(acc=acc, asr=asr, others=others, target=target, plain=plain)
    made = outcome(before, scores(asr=0.0, others=others, target=target))
    assert ("attack-missed" in up(made, attack, target)) == missed


def test_a_model_without_an_attack_has_none_that_could_miss():
    plain = scores().model_copy(update={"asr": None, "ra": None})
    assert raised(outcome(plain, plain), None, None) == []


@pytest.mark.parametrize(("others", "counted"), [(1500, False), (2000, True)])
def test_images_of_the_target_class_do_not_count(others, counted):
    assert ("target-counted" in up(outcome(after=scores(asr=0.0, others=others)))) == counted


def test_all_to_all_counts_every_image():
    assert "target-counted" not in up(outcome(after=scores(asr=0.0, others=2000)), target="all-to-all")


@pytest.mark.parametrize(("largest", "collapsed"), [(1250, False), (1251, True)])
def test_one_class_must_not_take_all(largest, collapsed):
    flags = up(outcome(after=scores(asr=0.0, predicted=(2000 - largest, largest, 0, 0))))
    assert ("one-class" in flags) == collapsed
    if collapsed:
        assert "label 1, which 25.0% of them have" in flags["one-class"]


def test_clean_images_must_not_be_test_images():
    assert up(outcome(clean_in_test=3)) == {"clean-in-test": "3 of 100 clean images are among the test images"}


def test_a_repair_must_change_something():
    assert list(up(outcome(values_changed=0))) == ["unchanged"]


@pytest.mark.parametrize(("others", "few"), [(400, False), (300, True), (0, True)])
def test_there_must_be_enough_images(others, few):
    after = scores(asr=0.5, ra=0.5, others=others)
    flags = up(outcome(after=after))
    assert ("too-few-images" in flags) == few
    if few:
        assert flags["too-few-images"].startswith("ASR ± ")
        assert "ACC" not in flags["too-few-images"]


def test_every_flag_is_documented():
    page = DOCS.read_text("utf-8")
    for name, rule in FLAGS.items():
        assert f"| `{name}` | {rule.__doc__.splitlines()[0]} |" in page
