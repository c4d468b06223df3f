"""Flags: reasons not to rely on the result of a cell.

Every rule is one function here, and its docstring says what it asks. It looks at what the cell recorded and gives a
sentence with the numbers, or `None`. `docs/benchmark.md` lists them.
"""

from collections.abc import Callable

from untrojan.lab.attack import Attack, Target
from untrojan.lab.cell import Flag, Outcome
from untrojan.lab.evaluate import why_missed
from untrojan.record import Rate

PRECISION = 0.05

Rule = Callable[[Outcome, Attack | None, Target | None], str | None]


def attack_missed(outcome: Outcome, attack: Attack | None, target: Target | None) -> str | None:
    """The attack did not take: ASR before repair is below 90 % (70 % if clean-label) or twice that without trigger."""
    if attack is None or outcome.before.asr is None or outcome.before.asr.value is None:
        return None
    missed = why_missed(outcome.before, attack)
    return missed and f"before the repair {missed}"


def target_counted(outcome: Outcome, attack: Attack | None, target: Target | None) -> str | None:
    """The target class is counted: ASR is over images whose true label is the target, which flatters the attack."""
    asr = outcome.after.asr
    if asr is None or not isinstance(target, int):
        return None
    others = outcome.test.images - outcome.test.per_class[target]
    return f"ASR is over {asr.total} images, {others} have another label" if asr.total != others else None


def one_class(outcome: Outcome, attack: Attack | None, target: Target | None) -> str | None:
    """The repaired model collapsed: one class gets more than half of the clean test images that are not of it."""
    predicted, per_class = outcome.after.predicted, outcome.test.per_class
    label = max(range(len(predicted)), key=predicted.__getitem__)
    images = outcome.test.images
    share, true = predicted[label] / images, per_class[label] / images
    if share <= (1 + true) / 2:
        return None
    return f"{share:.1%} of the clean test images get label {label}, which {true:.1%} of them have"


def clean_in_test(outcome: Outcome, attack: Attack | None, target: Target | None) -> str | None:
    """Clean images are test images too, pixel for pixel, so that the defense saw what it is measured on."""
    count = outcome.clean_in_test
    return f"{count} of {outcome.clean.images} clean images are among the test images" if count else None


def unchanged(outcome: Outcome, attack: Attack | None, target: Target | None) -> str | None:
    """The repaired model equals the original in every value."""
    return None if outcome.values_changed else "the repaired model equals the original"


def too_few(outcome: Outcome, attack: Attack | None, target: Target | None) -> str | None:
    """There are too few test images: ACC, ASR or RA is known no better than to ± 5 points at 95 %."""
    rates = {"ACC": outcome.after.acc, "ASR": outcome.after.asr, "RA": outcome.after.ra}
    wide = [f"{name} ± {_half(rate):.1%}" for name, rate in rates.items() if rate and _half(rate) > PRECISION]
    return f"{', '.join(wide)} at 95 %, expected at most ± {PRECISION:.0%}" if wide else None


FLAGS: dict[str, Rule] = {
    "attack-missed": attack_missed,
    "target-counted": target_counted,
    "one-class": one_class,
    "clean-in-test": clean_in_test,
    "unchanged": unchanged,
    "too-few-images": too_few,
}
"""Every rule by the name that records have."""


def raised(outcome: Outcome, attack: Attack | None, target: Target | None) -> list[Flag]:
    """Apply every rule.

    Args:
        outcome: What the cell recorded.
        attack: The attack that was planted, if any.
        target: What its attacker wants.

    Returns:
        The flags that are up, in the order of :data:`FLAGS`.
    """
    details = {name: rule(outcome, attack, target) for name, rule in FLAGS.items()}
    return [Flag(name=name, detail=detail) for name, detail in details.items() if detail]


def _half(rate: Rate) -> float:
    """Half the width of the interval; 1 where nothing was measured."""
    return 1.0 if rate.low is None or rate.high is None else (rate.high - rate.low) / 2
