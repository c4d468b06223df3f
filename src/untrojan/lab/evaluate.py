"""Measure a model on clean and on triggered images: ACC, ASR, RA and DER."""

import math
from collections.abc import Callable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.device import device_of, running_on
from untrojan.errors import DataError, ModelError, RecordError
from untrojan.lab.attack import Attack, Target, known_target, require_together, target_labels
from untrojan.lab.learned import Learned
from untrojan.model import classes_of, logits, require_kinds, require_logits
from untrojan.progress import stage
from untrojan.record import MethodInfo, Rate
from untrojan.registry import describe
from untrojan.sources.files import state_sha256


class Scores(BaseModel):
    """How a model does on one set of images.

    What was not asked for or does not exist is `None`, and so is the value of a rate over no images.

    Attributes:
        acc: Clean accuracy, over all images.
        acc_without_target: Clean accuracy over the images whose true class is not the target, which is what
            RNP reports; `None` for all-to-all.
        asr: Attack success rate: triggered images that get the label the attacker wants. Images of the target
            class are left out, so that all-to-all counts every image.
        asr_without_trigger: How many of the same images get that label without the trigger.
        asr_all: Attack success rate with images of the target class, as AWM and I-BAU report it, which is higher where
            these keep their label; `None` for all-to-all.
        ra: Robust accuracy: triggered images that get their true label, over the same images as `asr`, so
            that ASR + RA ≤ 1.
        der: Defense effectiveness rating against an earlier measurement, in [0, 1]; see :func:`der`.
        attack: The attack and all its fields.
        attack_sha256: Hash of the tensors of a trigger that was learned.
        target: The target class, or "all-to-all".
        images: How many images the set has.
        images_sha256: Which images these were.
        predicted: How many of the clean images get each label, in label order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    acc: Rate
    acc_without_target: Rate | None = None
    asr: Rate | None = None
    asr_without_trigger: Rate | None = None
    asr_all: Rate | None = None
    ra: Rate | None = None
    der: float | None = None
    attack: MethodInfo | None = None
    attack_sha256: str | None = None
    target: Target | None = None
    images: int
    images_sha256: str
    predicted: list[int] = Field(default_factory=list)


def evaluate(
    model: nn.Module,
    images_set: CleanSet,
    attack: Attack | None = None,
    target: Target | None = None,
    before: Scores | None = None,
    batch_size: int = 100,
) -> Scores:
    """Measure a model on clean images and, where an attack is given, on the same images with its trigger.

    The model runs in evaluation mode without gradients; afterwards every part has its own mode back.

    Args:
        model: From images `(N, C, H, W)` in [0, 1] to logits `(N, K)`.
        images_set: Clean test images with their true labels.
        attack: Whose trigger to put on; needs `target`.
        target: What the attacker wants: a class from 0 to K-1, or "all-to-all".
        before: Scores of the model before its repair, from the same images, attack and target; adds DER.
        batch_size: Images per forward pass; has no influence on the result beyond rounding.

    Returns:
        The scores.

    Raises:
        ConfigError: Only one of `attack` and `target` was given, the first is no attack or the second no class of the
            model, or the batch size is below 1.
        DataError: There are no images, the trigger does not fit them, or a label is no class of the model.
        ModelError: The model cannot take the images, or does not give finite logits `(N, K)` with K ≥ 2.
        RecordError: `before` was measured on other images, or with another attack or target.

    Example:
        >>> import torch
        >>> from untrojan.lab.attacks.badnets import BadNets
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> images = CleanSet(torch.zeros(4, 1, 2, 2), torch.tensor([0, 0, 1, 1]))
        >>> scores = evaluate(net, images, BadNets(size=1), target=1)
        >>> scores.acc.value, scores.asr.total
        (0.5, 2)
    """
    require_kinds(model, images_set)
    require_together(attack, target)
    info = None if attack is None else MethodInfo(name=attack.name, fields=describe(attack))
    learned = attack.network(images_set.shape[0]).state_dict() if isinstance(attack, Learned) else None
    trigger = state_sha256(learned) if learned else None
    if before is not None:
        _require_same(before, info, trigger, target, images_set.sha256)
    classes = require_measurable(model, images_set)
    device = device_of(model)
    images_set = images_set.to(device)
    labels = images_set.labels
    passes = 1 if attack is None else 2
    batches = math.ceil(len(images_set) / max(batch_size, 1))
    with running_on(device), stage("evaluate", total=passes * batches) as advance:
        out = logits(_Watched(model, None, advance), images_set, batch_size)
        said = out.argmax(1)
        right = said == labels
        scores = Scores(
            acc=_rate(right),
            images=len(images_set),
            images_sha256=images_set.sha256,
            predicted=torch.bincount(said, minlength=classes).tolist(),
        )
        if attack is None or target is None:
            return scores
        target = known_target(target, classes)
        wanted = target_labels(labels, target, classes)
        triggered = logits(_Watched(model, attack, advance), images_set, batch_size).argmax(1)

    counted = wanted != labels
    scores = scores.model_copy(
        update={
            "acc_without_target": None if target == "all-to-all" else _rate(right[counted]),
            "asr": _rate((triggered == wanted)[counted]),
            "asr_without_trigger": _rate((said == wanted)[counted]),
            "asr_all": None if target == "all-to-all" else _rate(triggered == wanted),
            "ra": _rate((triggered == labels)[counted]),
            "attack": info,
            "attack_sha256": trigger,
            "target": target,
        }
    )
    return scores if before is None else scores.model_copy(update={"der": der(before, scores)})


def require_measurable(model: nn.Module, images: CleanSet) -> int:
    """Raise where :func:`evaluate` could not measure a model on images; give the number of its classes.

    Raises:
        DataError: There are no images, or a label is no class of the model.
        ModelError: The model cannot take the images, or does not give finite logits `(N, K)` with K ≥ 2.
    """
    if not len(images):
        raise DataError("expected at least one image to measure the model on, got none")
    require_logits(model, images)
    classes, highest = classes_of(model, images), int(images.labels.max())
    if classes < 2:
        raise ModelError(f"expected logits (N, K) with K >= 2 from the model, got shape {(len(images), classes)}")
    if highest >= classes:
        raise DataError(f"expected labels from 0 to {classes - 1}, the model's classes, got label {highest}")
    return classes


def why_missed(scores: Scores, attack: Attack) -> str | None:
    """Say why an attack did not take, `None` where it did: its success rate is at least 0.9, or 0.7 if clean-label.

    For all-to-all it is that share of the clean accuracy, for a trigger cannot turn an image that is not recognized. It
    is also at least twice what it is without the trigger: a model that gives everything the label wanted has no
    backdoor.

    Args:
        scores: What the victim scores; those of earlier records, without `asr_without_trigger`, are not asked for that.
        attack: What was planted in it.
    """
    asr, plain = _share(scores.asr), _share(scores.asr_without_trigger)
    least = attack.bar * (_share(scores.acc) if scores.target == "all-to-all" else 1.0)
    if asr < least:
        of = f", {attack.bar:.0%} of the clean accuracy" if scores.target == "all-to-all" else ""
        return f"ASR is {asr:.1%}, expected at least {least:.1%}{of}"
    if asr < 2 * plain:
        return f"ASR is {asr:.1%}, but {plain:.1%} without the trigger too, expected at most half of that"
    return None


def _share(rate: Rate | None) -> float:
    return (rate and rate.value) or 0.0


def der(before: Scores, after: Scores) -> float | None:
    """Rate a defense by what it took from the attack and what it cost: BackdoorBench's DER.

    `½ [max(0, ASR before - ASR after) - max(0, ACC before - ACC after) + 1]`: 1 is a backdoor removed for
    free, ½ is no change, and less than ½ is a loss of accuracy that bought too little.

    Args:
        before: Scores of the model before its repair.
        after: Scores of the model after it, from the same images, attack and target.

    Returns:
        A rating in [0, 1], or `None` where there is no attack success rate.

    Raises:
        RecordError: The two were not measured on the same images with the same attack and target.

    Deviations:
        BackdoorBench's array functions add the accuracy term, so that a loss raises the rating; here it is
        subtracted.

    References:
        Wu et al.: BackdoorBench, NeurIPS 2022, arXiv:2206.12654.
        Zhu et al.: Enhancing fine-tuning based backdoor defense with sharpness-aware minimization, ICCV 2023,
        arXiv:2304.11823.
    """
    _require_same(before, after.attack, after.attack_sha256, after.target, after.images_sha256)
    rates = (before.acc, before.asr, after.acc, after.asr)
    acc_before, asr_before, acc_after, asr_after = (None if rate is None else rate.value for rate in rates)
    if acc_before is None or asr_before is None or acc_after is None or asr_after is None:
        return None
    return (max(0.0, asr_before - asr_after) - max(0.0, acc_before - acc_after) + 1) / 2


class _Watched(nn.Module):
    """A model behind a trigger, if there is one, that tells after every batch."""

    def __init__(self, model: nn.Module, attack: Attack | None, advance: Callable[[], None]) -> None:
        super().__init__()
        self._model = model
        self._attack = attack
        self._advance = advance

    def forward(self, images: Tensor) -> Tensor:
        out = self._model(images if self._attack is None else self._attack.trigger(images))
        self._advance()
        return out


def _require_same(
    before: Scores, attack: MethodInfo | None, trigger: str | None, target: Target | None, images_sha256: str
) -> None:
    for what, was, now in (
        ("attack", before.attack, attack),
        ("trigger", before.attack_sha256, trigger),
        ("target", before.target, target),
        ("images", before.images_sha256, images_sha256),
    ):
        if was != now:
            raise RecordError(f"expected the same {what} before and after, got {was} and {now}; measure both alike")


def _rate(hits: Tensor) -> Rate:
    return Rate.of(int(hits.sum()), hits.numel())
