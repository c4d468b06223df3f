"""The default scan: search small triggers into every label, and tell by how far they reach."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.device import new_generator
from untrojan.model import logits
from untrojan.pictures import png
from untrojan.progress import AtMost, whole
from untrojan.record import Diagnosis, Rate, Reach, Trigger, TriggerKind
from untrojan.registry import config
from untrojan.scanners import unlearning
from untrojan.scanners.aim import Aim
from untrojan.scanners.changes import Change, compare, with_others
from untrojan.scanners.inversion import Perturbation, bounded
from untrojan.scanners.patches import HardPatch, Patches, least_area, measured, search, smallest
from untrojan.scanners.reach import FAR, MOST, by_faint, by_patches, how_far, judge, scores_of, standing_out, targets_of
from untrojan.scanners.scanner import Scanner
from untrojan.scanners.unlearning import Unlearning
from untrojan.speed import folded

T = TypeVar("T")

HELD_OUT = 0.3
SIZES = (1, 1.5, 2.25, 3, 4)
STRONGEST = 32
LEADERS = 3
FEW_LABELS = 10
EXAMPLES = 8
FEW_IMAGES = 64
FAINT = 0.018
FAINTEST_SHARE = 0.04
DOUBLINGS = 3
HALVINGS = 3
FAINT_STEPS = 20, 60
OF_EACH = 2
OF_ALL = 12


@config
class TriggerScanner(Unlearning, Scanner):
    """Search small triggers into every label, see which class survives unlearning, and compare the labels.

    A patch of a few pixels, of full opacity and at any place, sends most images to the target of a backdoor whose
    trigger is a small patch, and a faint perturbation does where the trigger is spread over the image. In a clean model
    neither sends many to any label. How many is measured on images that the search did not see, and that the model
    gives another label without a trigger. What is faint is told by the labels themselves: a perturbation that sends
    hardly any images to half of them is made stronger. Where perturbations alone send most images to a label, and not
    many fewer to another, they are made fainter until one label stands out; where none does, the verdict is
    inconclusive.

    Slight warps and recolorings are searched for the most suspicious labels and a few others. A warp that sends most
    images to a label, and far fewer to the others, counts as a patch does. Where a patch is not what reaches the label
    that is found, a warp or recoloring that stands out is the trigger shown. A recoloring alone is no sign: brighter
    images are airplanes to clean models. Triggers of yet other kinds can still show when clean images are unlearned: if
    many predictions are left to the label that is most suspicious, and triggers reach about half as far into it as is
    too far, the verdict is inconclusive. What survives is no sign by itself, for clean models collapse into one class,
    too.

    Where patches reach no label too far, those of up to a quarter of the sides are searched that send images away from
    their own label. If one sends most images of each class, on average, to a label of their own, the backdoor is
    all-to-all, with a target for every class: the trigger shown then has no label. Classes count of which two images
    are held out, which takes seven images of each; these have to be more than half of all, with twelve held-out images.

    Attributes:
        runs: How many unlearning runs, each on its own seed; every second one with noise.
        search_steps: Batches of 64 images that the search for patches takes per label with up to ten labels; with more
            it takes fewer, but at least half of that, and as many again for the half of the labels whose patches work
            best on the images that it searched on.
        refine_steps: Batches of another search for each of the three labels that are reached furthest, and for the one
            that is then most suspicious when what survives unlearning counts too.

    Needs:
        Clean images.

    Cost:
        3 F per clean image, epoch and unlearning run, and 128 F per step of a search, F being one image through the
        network once. A search for perturbations has 20 steps per label, up to seven times, and 60 for each of the
        three, up to four times. Whole-image changes take 11,000 F for each of six labels.

    Example:
        >>> clean = CleanSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> quick = TriggerScanner(runs=2, unlearn_epochs=1, search_steps=2, refine_steps=2)
        >>> found = quick.scan(net, clean)
        >>> len(found.runs), all(0 <= reach.faint <= 1 for reach in found.reaches)
        (2, True)

    References:
        Li et al.: Reconstructive neuron pruning for backdoor defense, ICML 2023, arXiv:2305.14876.

        Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao: Neural Cleanse: identifying and mitigating backdoor attacks in
        neural networks, IEEE S&P 2019, whose masks the patches replace.

    Deviations:
        * This is the project's own method: the one paper has the unlearning, the other the idea to search a trigger
          for every label and to compare the labels.
        * Triggers are bounded in size or strength and judged by how many held-out images they send to the label, where
          Neural Cleanse asks for nearly all of the images that it searches on and judges by the size.
    """

    name: ClassVar[str] = "triggers"

    runs: int = Field(default=4, ge=1)
    search_steps: int = Field(default=40, ge=1)
    refine_steps: int = Field(default=100, ge=1)

    def _scan(self, model: nn.Module, clean: CleanSet, seed: int) -> Diagnosis:
        runs = self.survey(model, clean, seed, self.runs)
        out = logits(model, clean)
        classes = out.shape[1]
        as_said = CleanSet(clean.images, out.argmax(1))
        look = _Look(model, *_halves(as_said, seed), classes, seed)
        look.widely(self._steps(classes))
        look.stronger()
        unlearned = unlearning.diagnose(runs)
        survived = {target.label: target.score for target in unlearned.targets}
        look.again(self.refine_steps, survived)
        suspects = [*look.leaders(), *(target.label for target in unlearned.targets[:1])]
        look.for_changes([label for label in suspects if label in look.labels])
        look.fainter()
        reaches = look.reaches()
        named = targets_of(reaches, survived)
        triggers = [] if look.is_patched() else look.all_to_all(self.refine_steps)
        triggers = triggers or [look.trigger(label) for label in named]
        comparisons = [change.comparison for change in look.changes]
        calibrated = _clean_models() if self == TriggerScanner() else ()
        return judge(unlearned, reaches, triggers, comparisons, calibrated)

    def _steps(self, classes: int) -> int:
        return max(math.ceil(self.search_steps / 2), min(self.search_steps, self.search_steps * FEW_LABELS // classes))


@cache
def _clean_models() -> list[float]:
    """The furthest reach in each model that is known to be clean; written by `benchmarks/scan.py`."""
    return json.loads(files("untrojan.scanners").joinpath("clean_models.json").read_text())


def faintest(shape: tuple[int, int, int]) -> float:
    """The l2 norm of the faintest perturbation that is searched in images `(C, H, W)`."""
    return FAINT * math.sqrt(math.prod(shape))


class _Look:
    """What has been found for each label so far."""

    def __init__(self, model: nn.Module, shown: CleanSet, held: CleanSet, classes: int, seed: int) -> None:
        self.model = model
        self.quick = folded(model, shown)
        self.shown = shown
        self.held = held
        self.classes = classes
        self.few = held.some(FEW_IMAGES, new_generator(seed))
        self.labels = [label for label in range(classes) if (shown.labels != label).any()]
        self.generator = new_generator(seed)
        self.sizes = [math.floor(size * least_area(*held.shape[1:])) for size in SIZES]
        self.norm = faintest(held.shape)
        self.shares = {label: [0.0] * len(SIZES) for label in self.labels}
        self.strength = dict.fromkeys(self.labels, 0.0)
        self.faint = dict.fromkeys(self.labels, 0.0)
        self.patches: dict[int, Patches] = {}
        self.perturbations: dict[int, Perturbation] = {}
        self.changes: list[Change] = []

    def widely(self, steps: int) -> None:
        """Search for every label; with many, patches twice for those that are more promising."""
        with whole("search triggers", total=len(self.labels)) as advance:
            for label in self.labels:
                self.for_patches(label, steps)
                self.for_perturbation(label, FAINT_STEPS[0])
                advance()
        if len(self.labels) <= FEW_LABELS:
            return
        promising = self.promising()
        with whole("search more patches", total=len(promising)) as advance:
            for label in promising:
                self.for_patches(label, steps, again=True)
                advance()

    def stronger(self) -> None:
        """Make perturbations stronger that send hardly any images to half of the labels."""
        with whole("search stronger ones", total=AtMost(DOUBLINGS)) as advance:
            for _ in range(DOUBLINGS):
                if statistics.median(self.faint.values()) >= FAINTEST_SHARE:
                    break
                self._scale(2)
                advance()

    def again(self, steps: int, survived: Mapping[int, float]) -> None:
        """Search closely for the labels reached furthest, and then for the most suspicious one if it is another."""
        leaders = self.leaders()
        with whole("refine triggers", total=LEADERS + 1) as advance:
            for label in leaders:
                self.closely(label, steps)
                advance()
            scores = scores_of(self.reaches(), survived)
            first = max(scores, key=scores.__getitem__)
            if first not in leaders:
                self.closely(first, steps)
            advance()

    def fainter(self) -> None:
        """Make perturbations fainter that send most images to a label, where no patch does, and many to another.

        Where no label stands out then, what was found before stays.
        """
        before = self.norm, dict(self.faint), self.perturbations
        with whole("search fainter ones", total=AtMost(HALVINGS)) as advance:
            for _ in range(HALVINGS):
                if not self._is_crowded():
                    break
                self._scale(0.5)
                for label in self.leaders():
                    self.for_perturbation(label, FAINT_STEPS[1], closely=True)
                advance()
        if max(self.faint.values()) < MOST:
            self.norm, self.faint, self.perturbations = before

    def _scale(self, factor: float) -> None:
        self.norm *= factor
        for label in self.labels:
            self.for_perturbation(label, FAINT_STEPS[0])

    def is_patched(self) -> bool:
        """Whether patches reach a label too far."""
        return any(by_patches(shares) >= 1 for shares in self.shares.values())

    def _is_crowded(self) -> bool:
        first = max(self.faint, key=self.faint.__getitem__)
        return not self.is_patched() and self.faint[first] >= MOST and by_faint(first, self.faint) < 1

    def for_patches(self, label: int, steps: int, again: bool = False, closely: bool = False) -> None:
        """Search patches for a label, near what was found before; searched again, the better result counts."""
        patches = search(self.quick, self.shown, Aim(label), self.generator, self.patches.get(label), steps)
        best = measured(*self._judged(closely), Aim(label), patches, self.sizes[-1])
        shares = [max((each.success for each in best if each.area <= size), default=0.0) for size in self.sizes]
        before = self.shares[label] if again else shares
        self.shares[label] = [*map(max, before, shares)]
        self.strength[label] = float(patches.strength.topk(min(STRONGEST, len(patches.strength))).values.mean())
        self.patches = self._leading({**self.patches, label: patches})

    def promising(self) -> list[int]:
        """The half of the labels whose patches work best on the images that they were searched on."""
        return sorted(self.labels, key=lambda label: -self.strength[label])[: len(self.labels) // 2]

    def for_perturbation(self, label: int, steps: int, closely: bool = False) -> None:
        """Search a perturbation for a label."""
        found = bounded(self.quick, self.shown, Aim(label), self.norm, self.generator, "l2", steps)
        self.faint[label] = found.success(*self._judged(closely), Aim(label))
        self.perturbations = self._leading({**self.perturbations, label: found})

    def closely(self, label: int, steps: int) -> None:
        """Search patches and a perturbation for a label once more, for longer, and measure on all held-out images."""
        self.for_patches(label, steps, closely=True)
        self.for_perturbation(label, FAINT_STEPS[1], closely=True)

    def _judged(self, closely: bool) -> tuple[nn.Module, CleanSet]:
        """What tells how far triggers reach: the network and all held-out images, or the quick one and few of them."""
        return (self.model, self.held) if closely else (self.quick, self.few)

    def for_changes(self, suspects: Sequence[int]) -> None:
        """Search changes of the whole image for the labels that are suspected and a few others."""
        labels = with_others(suspects, self.shown, self.generator)
        self.changes = compare(self.quick, self.shown, self.held, labels, self.norm, self.generator)

    def leaders(self) -> list[int]:
        """The labels that triggers reach furthest into, whether or not they stand out."""
        return sorted(self.labels, key=self._near, reverse=True)[:LEADERS]

    def reaches(self) -> list[Reach]:
        """How far triggers reach into each label by the last search for it, the furthest first."""
        all_of = [
            Reach(
                label=label,
                sizes=self.sizes,
                shares=self.shares[label],
                norm=self.norm,
                faint=self.faint[label],
                far=self._far(label),
            )
            for label in self.labels
        ]
        return sorted(all_of, key=lambda reach: -reach.far)

    def all_to_all(self, steps: int) -> list[Trigger]:
        """The smallest patch that sends most images of each class to a label of their own, if there is one."""
        counts = self.held.labels.bincount(minlength=self.classes)
        judged = counts >= OF_EACH
        if self.held is self.shown or judged.sum() <= self.classes / 2 or counts[judged].sum() < OF_ALL:
            return []
        away = Aim(None)
        patches = search(self.quick, self.shown, away, self.generator, steps=steps)
        for patch in measured(self.quick, self.held, away, patches):
            if patch.success < FAR:
                continue
            targets = self._targets(patch)
            own = self._moved(patch, self.held).gather(1, targets[:, None])[:, 0]
            if own[judged].mean() >= MOST:
                aim = Aim(None, tuple(targets.tolist()))
                return [self._patch(aim, patch._replace(success=patch.success_on(self.model, self.held, aim)))]
        return []

    def _targets(self, patch: HardPatch) -> Tensor:
        """The label to which a patch sends most images of each class; the class itself where it sends more of another.

        Large patches move images of networks without a backdoor, too, but those of most classes to the same few labels.
        """
        moved = self._moved(patch, self.shown)
        most, target = moved.max(1)
        classes = torch.arange(self.classes)
        return target.where((most > 0) & (moved.argmax(0)[target] == classes), classes)

    def _moved(self, patch: HardPatch, images: CleanSet) -> Tensor:
        """The share of the images of each class that a patch sends to each other label: `(K, K)`."""
        out = logits(self.model, CleanSet(patch.stamp(images.floats()), images.labels))
        told = out.isfinite().all(1)
        moved = torch.zeros(self.classes, self.classes)
        moved.index_put_((images.labels[told], out[told].argmax(1)), torch.ones(int(told.sum())), accumulate=True)
        return moved.fill_diagonal_(0) / images.labels.bincount(minlength=self.classes).clamp(min=1)[:, None]

    def trigger(self, label: int) -> Trigger:
        """What reaches furthest: the smallest patch that sends 95 % of held-out images there, or the best change."""
        aim, change = Aim(label), self._change(label)
        if by_patches(self.shares[label]) >= max(1, self.faint[label] / MOST):
            return self._patch(aim, smallest(self.model, self.held, aim, self.patches[label]))
        if change is not None:
            share = aim.share(self.model, self.held, change.add)
            return self._told(aim, change.comparison.kind, str(change), share, change.add, change.picture())
        found = self.perturbations[label]
        return self._told(aim, "perturbation", str(found), self.faint[label], found.add, found.picture())

    def _patch(self, aim: Aim, found: HardPatch) -> Trigger:
        return self._told(aim, "patch", str(found), found.success, found.stamp, found.picture(self.held.shape))

    def _told(
        self,
        aim: Aim,
        kind: TriggerKind,
        what: str,
        share: float,
        change: Callable[[Tensor], Tensor],
        picture: str,
    ) -> Trigger:
        others = aim.others(self.held)
        shown = others.take(torch.linspace(0, len(others) - 1, min(EXAMPLES, len(others))).long()).floats()
        return Trigger(
            label=aim.label,
            targets=list(aim.targets),
            kind=kind,
            what=what,
            success=Rate.of(round(share * len(others)), len(others)),
            picture=picture,
            examples=png(_tiled(shown, change(shown))),
        )

    def _change(self, label: int) -> Change | None:
        """The warp or recoloring that stands out most, unless a perturbation does and goes further."""
        faint = by_faint(label, self.faint) >= 1
        of_label = [change for change in self.changes if change.comparison.label == label]
        able = [each for each in of_label if (faint if each.comparison.kind == "perturbation" else _stands_out(each))]
        first = max(able, key=lambda change: change.comparison.further, default=None)
        return None if first is None or first.comparison.kind == "perturbation" else first

    def _leading(self, found: dict[int, T]) -> dict[int, T]:
        """Keep what may still be needed, for with many labels and large images it adds up."""
        leaders = self.leaders()
        return {label: each for label, each in found.items() if label in leaders or self._near(label) >= 1}

    def _near(self, label: int) -> float:
        return max(self.faint[label] / MOST, self._far(label))

    def _far(self, label: int) -> float:
        return how_far(label, self.shares[label], self.faint, [change.comparison for change in self.changes])


def _stands_out(change: Change) -> bool:
    """Whether a change sends most images to a label, and far fewer to others."""
    return standing_out(change.comparison.share, change.comparison.further) >= 1


def _tiled(*rows: Tensor) -> Tensor:
    """Rows of images `(n, C, H, W)` as one, with a white line after each."""
    return torch.cat([torch.cat([*functional.pad(images, (0, 1, 0, 1), value=1.0)], 2) for images in rows], 1)


def _halves(clean: CleanSet, seed: int) -> tuple[CleanSet, CleanSet]:
    """Images to search on and others to measure on, or twice all where one of them would hold a single label."""
    shown, held = clean.split(HELD_OUT, seed)
    both = all(len(each.labels.unique()) > 1 for each in (shown, held))
    return (shown, held) if both else (clean, clean)
