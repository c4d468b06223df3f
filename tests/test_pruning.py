"""The rules that say how many units to prune."""

from typing import ClassVar

import pytest
import torch
from tiny import DEFENSES, GIVEN, QUICK, Returns, backdoored, build, make_clean
from torch import nn

from untrojan.data import CleanSet
from untrojan.defenses import pruning
from untrojan.defenses.checks import surrogates
from untrojan.defenses.defense import Defense
from untrojan.defenses.pruning import Pruning
from untrojan.errors import UnreliableWarning
from untrojan.mask import Mask
from untrojan.record import Diagnosis, Target
from untrojan.registry import config

pytestmark = pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")

NOBODY = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])


@config
class InOrder(Pruning):
    """Scores neurons by their place in the network."""

    name: ClassVar[str] = "in-order"

    def score(self, model, clean, seed, detail=""):
        ones = Mask.ones(model, self.unit)
        places = iter(torch.arange(ones.total) / ones.total)
        return ones.map(lambda value: torch.stack([next(places) for _ in value]))


@pytest.fixture
def own_checks(monkeypatch, no_checks):
    monkeypatch.setattr(Defense, "_checks", lambda self, model, outcome, *_: outcome.checks)


def pruned(model):
    return sum(int((value == 0).sum()) for name, value in model.state_dict().items() if name.endswith("weight"))


def falls_by(monkeypatch, *shares):
    """Have recovered triggers reach so far after none, one, two, ... neurons are pruned."""
    reach = [lambda net: shares[min(pruned(net), len(shares) - 1)], lambda net: 0.0]
    monkeypatch.setattr(pruning, "surrogates", lambda *_: reach)


def check_of(repair):
    (check,) = [each for each in repair.record.checks if each.name == "disarms recovered triggers"]
    return check


@pytest.mark.usefixtures("own_checks")
def test_surrogate_stops_at_the_first_cut_that_disarms_recovered_triggers(monkeypatch):
    falls_by(monkeypatch, 1.0, 0.9, 0.5, 0.1, 0.0)
    repair = InOrder(select="surrogate", budget=0.99).repair(build("batchnorm"), make_clean(), GIVEN)
    selection = repair.record.selection
    assert (repair.record.units_changed, selection.curve[selection.chosen].pruned) == (3, 3)
    measured = [point.surrogate for point in selection.curve]
    assert measured == [0.9, 0.5, 0.1] + [None] * (len(measured) - 3)
    assert selection.rule.startswith("surrogate: ")
    assert check_of(repair).passed


@pytest.mark.usefixtures("own_checks")
def test_surrogate_that_never_disarms_prunes_what_the_budget_allows_and_says_so(monkeypatch):
    falls_by(monkeypatch, 1.0, 0.7)
    most = InOrder(budget=0.99).repair(build("batchnorm"), make_clean(), GIVEN)
    repair = InOrder(select="surrogate", budget=0.99).repair(build("batchnorm"), make_clean(), GIVEN)
    assert repair.record.units_changed == most.record.units_changed > 3
    assert (repair.record.status, check_of(repair).passed) == ("failed", False)
    assert "send 70% of the images" in repair.record.reason
    assert not any(check.name == "disarms recovered triggers" for check in most.record.checks)


@pytest.mark.usefixtures("own_checks")
def test_surrogate_keeps_to_the_budget(monkeypatch):
    falls_by(monkeypatch, *[1.0] * 6, 0.0)
    net, clean = build("batchnorm"), make_clean()
    allowed = InOrder().repair(net, clean, GIVEN).record.units_changed
    repair = InOrder(select="surrogate").repair(net, clean, GIVEN)
    assert repair.record.units_changed == min(allowed, 6)


@pytest.mark.usefixtures("own_checks")
def test_surrogate_without_a_suspected_label_is_the_budget():
    with pytest.warns(UnreliableWarning, match="the budget alone says how much to prune"):
        repair = InOrder(select="surrogate", budget=0.99).repair(build("batchnorm"), make_clean(), NOBODY)
    plain = InOrder(budget=0.99).repair(build("batchnorm"), make_clean(), NOBODY)
    assert repair.record.units_changed == plain.record.units_changed
    assert all(point.surrogate is None for point in repair.record.selection.curve)


def test_surrogates_tell_what_is_left_of_a_backdoor():
    net, clean = backdoored(3)
    few = clean.take(torch.arange(64))
    made = surrogates(net, few, Diagnosis(verdict="found", rule="", targets=[Target(label=3, score=1)], runs=[]), 0)
    assert len(made) == 2
    assert all(success(net) > 0.8 for success in made)
    never = Returns(lambda images: net(images) - 1e6 * nn.functional.one_hot(torch.tensor(3), net(images).shape[1]))
    assert [success(never) for success in made] == [0, 0]
    assert surrogates(net, few, NOBODY, 0) == []


@pytest.mark.usefixtures("no_checks")
@pytest.mark.parametrize("name", ["rnp", "anp", "bnp"])
def test_scores_are_judged_on_images_that_they_were_not_learned_on(name, monkeypatch):
    clean, learned, judged = make_clean(24), [], []
    cls = DEFENSES[name]
    method = cls(**{"folds": 3, **{field: 1 for field in ("iterations",) if hasattr(cls, field)}})
    score, sweep = cls.score, pruning.sweep

    def places(images: CleanSet) -> set[int]:
        return {next(i for i, one in enumerate(clean.images) if torch.equal(one, image)) for image in images.images}

    def spy(self, model, images, *rest):
        learned.append(places(images))
        return score(self, model, images, *rest)

    def swept(model, parts, cuts):
        judged.extend(places(part.clean) for part in parts)
        return sweep(model, parts, cuts)

    monkeypatch.setattr(cls, "score", spy)
    monkeypatch.setattr(pruning, "sweep", swept)
    method.repair(build("batchnorm"), clean, GIVEN)
    everything = set(range(24))
    assert learned[0] == everything
    assert [one & other for one, other in zip(learned[1:], judged, strict=True)] == [set()] * 3
    assert [one | other for one, other in zip(learned[1:], judged, strict=True)] == [everything] * 3
    assert sorted(place for part in judged for place in part) == sorted(everything)


@pytest.mark.usefixtures("no_checks")
@pytest.mark.parametrize("name", ["rnp", "anp", "bnp", "clp"])
@pytest.mark.parametrize("zero_bias", [False, True])
def test_the_bias_of_a_pruned_channel_stays_or_goes_as_asked(name, zero_bias):
    net = build("batchnorm")
    fields = {key: value for key, value in QUICK[name].items() if key != "count"}
    repair = DEFENSES[name](**fields | {"count": 4, "zero_bias": zero_bias}).repair(net, make_clean(), GIVEN)
    before, after = net.state_dict(), repair.model.state_dict()
    cut = {each.name: each.changed for each in repair.record.layers if each.changed}
    assert sum(map(len, cut.values())) == 4
    for layer, places in cut.items():
        assert (after[f"{layer}.weight"][places] == 0).all()
        kept = torch.zeros(len(places)) if zero_bias else before[f"{layer}.bias"][places]
        assert torch.equal(after[f"{layer}.bias"][places], kept)


def test_published_clp_alone_takes_the_bias():
    prunings = {name: cls for name, cls in DEFENSES.items() if issubclass(cls, Pruning)}
    assert {name: cls().zero_bias for name, cls in prunings.items()} == {
        "anp": False,
        "bnp": False,
        "clp": True,
        "rnp": False,
    }
