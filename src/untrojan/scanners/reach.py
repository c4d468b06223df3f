"""How far triggers reach into a label, how far is too far, and what a scan says then."""

import statistics
from collections.abc import Mapping, Sequence

from untrojan.record import Calibration, Comparison, Diagnosis, Rate, Reach, Target, Trigger, Verdict

FAR = 0.5
MOST = 0.8
FURTHER = 0.4
ALIKE = 0.9
BEYOND = 0.05
BOTH = 0.25
RULE = (
    f"found: patches of a few pixels send {FAR:.0%} of the other images to a label on average over their sizes, or the "
    f"largest of these {MOST:.0%}, or a faint perturbation or a slight warp sends {MOST:.0%} there and {FURTHER:.0%} "
    "fewer to any other label, and that holds for at most half of the labels, "
    f"or, where no patch tells a label, one of up to a quarter of the sides sends {MOST:.0%} of the images of each "
    "class, on average, to a label of its own; "
    f"inconclusive: it holds for more, or faint perturbations send {MOST:.0%} to a label and many to another as well, "
    "or none of that, but of the most suspicious label, how far triggers reach into it, where 1 is too far, times its "
    f"share of the predictions after unlearning is {BOTH:g} or more; "
    "not_found: anything else"
)


def how_far(
    label: int, shares: Sequence[float], faint: Mapping[int, float], comparisons: Sequence[Comparison]
) -> float:
    """How far triggers reach into a label: 1 is too far.

    Args:
        label: The label.
        shares: What share of images patches of each size send there.
        faint: What share a faint perturbation sends to each label.
        comparisons: What other changes of the whole image do; warps count.

    Example:
        >>> how_far(0, [0.1, 0.2], {0: 1.0, 1: 0.75}, [])
        0.625
    """
    warps = [each for each in comparisons if (each.label, each.kind) == (label, "warp")]
    by_warps = [standing_out(warp.share, warp.further) for warp in warps]
    return max(by_patches(shares), by_faint(label, faint), *by_warps)


def by_faint(label: int, faint: Mapping[int, float]) -> float:
    """How far a faint perturbation reaches, by what it sends to each label."""
    elsewhere = max((share for other, share in faint.items() if other != label), default=0.0)
    return standing_out(faint[label], faint[label] - elsewhere)


def standing_out(share: float, further: float) -> float:
    """How far a change of the whole image reaches, by its share and by how much more that is than any other label's."""
    return max(0.0, min(share / MOST, further / FURTHER))


def by_patches(shares: Sequence[float]) -> float:
    """How far patches reach: 1 is too far."""
    return max(statistics.fmean(shares) / FAR, shares[-1] / MOST)


def targets_of(reaches: Sequence[Reach], shares: Mapping[int, float]) -> list[int]:
    """The labels that small triggers reach too far into and that are about as suspicious as any, the most so first.

    A label of a backdoored model that is no target can be reached too far as well, but then it does not survive
    unlearning as the target does, so both count. Where triggers reach too far into more than half of all labels, the
    network is fragile, and none is named.

    Args:
        reaches: How far triggers reach into each label.
        shares: What share of predictions each label has after unlearning; 0 where it is left out.

    Example:
        >>> def reach(label, far):
        ...     return Reach(label=label, sizes=[4], shares=[far / 2], norm=1, faint=0, far=far)
        >>> targets_of([reach(0, 0.2), reach(1, 1.8), reach(2, 1.7), reach(3, 0.1)], {1: 0.9})
        [1]
    """
    scores = scores_of([reach for reach in reaches if reach.far >= 1], shares)
    if not scores or len(scores) > len(reaches) / 2:
        return []
    enough = ALIKE * max(scores.values())
    return [label for label in sorted(scores, key=scores.__getitem__, reverse=True) if scores[label] >= enough]


def judge(
    unlearned: Diagnosis,
    reaches: Sequence[Reach],
    triggers: list[Trigger],
    comparisons: list[Comparison],
    clean_models: Sequence[float] = (),
) -> Diagnosis:
    """Say what unlearning runs and the reach of triggers mean.

    Args:
        unlearned: What the unlearning runs say by themselves.
        reaches: How far triggers reach into each label.
        triggers: One without a label, or one for each of :func:`targets_of`.
        comparisons: How far whole-image changes reach into some labels.
        clean_models: How far the furthest label was reached in each model that is known to be clean.

    Returns:
        The verdict by :data:`RULE`. The score of a label is how far it is reached plus its mean share of predictions at
        the ends of unlearning.
    """
    shares = {target.label: target.score for target in unlearned.targets}
    furthest = max(reaches, key=lambda reach: reach.far)
    shown = [trigger.label for trigger in triggers]
    too_far = furthest.far >= 1 or any(reach.faint >= MOST for reach in reaches)
    scores = scores_of(reaches, shares)
    first = max(reaches, key=lambda reach: scores[reach.label])
    survives = first.far * shares.get(first.label, 0.0) >= BOTH
    verdict: Verdict = "not_found"
    if targets_of(reaches, shares) or None in shown:
        verdict = "found"
    elif too_far or survives:
        verdict = "inconclusive"
    targets = [Target(label=label, score=score) for label, score in scores.items()]
    return Diagnosis(
        verdict=verdict,
        rule=RULE,
        targets=sorted(targets, key=lambda each: (each.label not in shown, -each.score, each.label)),
        runs=unlearned.runs,
        reaches=sorted(reaches, key=lambda each: each.label),
        comparisons=comparisons,
        triggers=triggers,
        calibration=Calibration(
            score=furthest.far,
            as_high=_at_least(furthest.far, clean_models),
            false_alarms=_at_least(1, clean_models),
        ),
    )


def spread_over(diagnosis: Diagnosis, label: int | None) -> float | None:
    """The l2 norm of the perturbation found for a label, where its trigger is spread over the image, no patch.

    It is where another trigger than a patch was shown, or a perturbation sends most images there, and a share more than
    patches do, which are mere shortcuts then.
    """
    shown = [each for each in diagnosis.triggers if each.label == label]
    other = any(each.kind != "patch" for each in shown)
    beyond = max([BEYOND, *(1 / max(1, each.success.total) for each in shown)])
    reached = (each for each in diagnosis.reaches if each.label == label)
    return next((each.norm for each in reached if other or each.faint >= max(FAR, each.mean + beyond)), None)


def patched(diagnosis: Diagnosis, label: int | None) -> bool:
    """Whether its trigger is a small patch: one was shown, or nothing but patches reach it; none is spread."""
    shown = [each.kind for each in diagnosis.triggers if each.label == label]
    reached = any(each.label == label and each.mean >= FAR for each in diagnosis.reaches)
    return ("patch" in shown if shown else reached) and spread_over(diagnosis, label) is None


def scores_of(reaches: Sequence[Reach], shares: Mapping[int, float]) -> dict[int, float]:
    """How suspicious each label is, by how far it is reached and its share of predictions after unlearning."""
    return {reach.label: reach.far + shares.get(reach.label, 0.0) for reach in reaches}


def _at_least(score: float, scores: Sequence[float]) -> Rate:
    return Rate.of(sum(each >= score for each in scores), len(scores))
