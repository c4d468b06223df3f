"""auto: recover triggers of the suspected label, teach the model to ignore them, and look again."""

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from untrojan.data import CleanSet
from untrojan.defenses.checks import faint, reachable
from untrojan.defenses.tuning import Tuning
from untrojan.defenses.views import FEW_IMAGES, mixed, shifted, varied
from untrojan.device import new_generator
from untrojan.errors import UnreliableWarning
from untrojan.fit import fit
from untrojan.progress import overall, stage
from untrojan.record import Comparison, Diagnosis
from untrojan.registry import config
from untrojan.run import chose
from untrojan.scanners.aim import Aim
from untrojan.scanners.changes import AT_ONCE, BATCH, STEPS, against_others, of_each_kind
from untrojan.scanners.inversion import Perturbation, bounded
from untrojan.scanners.patches import BoxDraws, Patches, pinpoint, search, strengths
from untrojan.scanners.reach import patched
from untrojan.speed import faster, folded

DECAY = 0.95
CLIP = 5.0
LEAST_SHARE = 0.05
CHANGED = 0.75
PERTURBED = 0.25
FEW_PIXELS = 0.005
FURTHER = 0.3
DISTRACTED = 0.35
REMEMBERED = 0.01
LONGEST = 1.5
OTHER_PATTERN = 0.5
VARIED = 0.5
ALWAYS = 4
DRAWN = 2
JUDGED = 64
FAINTEST = 0.7
TOLD_EVERY = 8
TINY = 1e-9


@config
class Auto(Tuning):
    """Recover triggers of the suspected label, teach the model to ignore them, and look again, round by round.

    Each round searches the model as it then is for what still sends images to the label: small patches of full opacity,
    at any place, and changes of the whole image. From the patches found it climbs to those with which the model is
    surest of the label, often the very trigger. Then the model is trained to give, on images that carry what any round
    found, the output that the original gives on the same images without it, and on clean images the output of the
    original. A patch is the one of six that works best on the image and the model as it is: four are the surest ones
    of all rounds that still work best, the others are drawn anew; what works is varied and remembered. The learning
    rate falls from round to round. Running statistics and dropout stay as they are, and the weights delivered are a
    moving average.

    Where the scan recovered a patch, or nothing while patches reach most images, three quarters of the images carry a
    patch and the others a perturbation of few pixels. Where it recovered anything else, where a perturbation reaches
    more images than patches do, or where a warp reaches much further into the label than into others, the trigger may
    be spread over the image. Then a quarter of the images carry a patch and the others a universal perturbation, a warp
    or a recoloring, most of them of the kind that reaches further into the label than into others. These go on climbing
    while the model learns, so that it never learns to ignore just one, half of the images have another image or noise
    laid over them too, and the learning rate falls less.

    Where the scan found several labels, their triggers are searched apart and unlearned in turns. Where it found a
    trigger with a target for every class, images of each class are led to the target of theirs instead, by patches and
    perturbations of few pixels.

    All rounds are done, whatever they cost: `budget` decides whether the result passes the check of its accuracy, and
    chooses nothing.

    The original serves as teacher throughout, also on images that are shifted, mirrored and, where the trigger is not
    spread, mixed, so that few clean images suffice to keep the accuracy; no label is needed for that, and a mirrored
    sign does no harm. Where there are fewer than a hundred, half of them are zoomed, recolored and pasted together too,
    but for those that carry a change of the whole image, which that would hide, and the patches beside them.

    Attributes:
        rounds: How often triggers are searched for and unlearned.
        steps: Updates per round and label.
        search_steps: Batches of 64 stamped images per search for patches.
        lr: Learning rate of SGD with momentum 0.9, above 0: twice as much at first, a quarter in the end; where the
            trigger may be spread, or has a target for every class, 2.7 times as much at first, and as much in the end.
        batch_size: Clean images per step, drawn with replacement; as many others carry a trigger.
        augment: How images are varied in training: `none`, or `crop-flip`, a shift by up to an eighth of the shorter
            side and a mirror image now and then, labelled by the original.

    Needs:
        Clean images.

    Cost:
        With the defaults about 700,000 F per label found, whatever the number of images, 1,400 F per image with 500, F
        being one image through the network once: per update 4 F for each of 128 images and 1 F for each of 288 stamped
        ones that are tried; per round 2 F for each of 9,600 stamped images in the search for patches and 3,840 in those
        for changes, and 1 F for each of up to 30,000 on which patches are compared; before all that 65,000 F to compare
        labels, unless the scan did.

    Example:
        >>> from untrojan.record import Diagnosis, Target
        >>> from untrojan.sources.nets import build
        >>> clean = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> found = Diagnosis(verdict="found", rule="given", targets=[Target(label=7, score=1)], runs=[])
        >>> Auto(rounds=1, steps=2, search_steps=5).repair(build("digits-cnn"), clean, found).record.method.name
        'auto'

    References:
        The project's own, with ideas from I-BAU, Neural Cleanse and universal adversarial training.

        Zeng, Chen, Park, Mao, Jin, Jia: Adversarial unlearning of backdoors via implicit hypergradient, ICLR 2022,
        arXiv:2110.03735, for unlearning what an inner search finds.

        Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao: Neural Cleanse: identifying and mitigating backdoor attacks in
        neural networks, IEEE S&P 2019, for unlearning with recovered triggers.

        Shafahi, Najibi, Xu, Dickerson, Davis, Goldstein: Universal adversarial training, AAAI 2020, arXiv:1811.11304,
        for changes that climb while the model learns.

    Deviations:
        * In universal adversarial training, the changes that climb lead away from every label.
        * `crop-flip`, the default here, shifts images by up to an eighth of their side.
    """

    name: ClassVar[str] = "auto"

    rounds: int = Field(default=6, ge=1)
    steps: int = Field(default=64, ge=1)
    search_steps: int = Field(default=150, ge=1)
    lr: float = Field(default=2e-3, gt=0)
    batch_size: int = Field(default=64, ge=2)
    augment: Literal["none", "crop-flip"] = "crop-flip"

    def tune(self, model: nn.Module, clean: CleanSet, held: CleanSet, diagnosis: Diagnosis, seed: int) -> nn.Module:
        """Search and unlearn in turns."""
        aims = reachable(diagnosis, clean)
        if not aims:
            warnings.warn(UnreliableWarning("there is no label to search triggers for"), stacklevel=2)
            return model
        generator = new_generator(seed)
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        average = AveragedModel(model.eval(), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        teacher, student = folded(teacher, clean), faster(model, clean)
        triggers: list[_Triggers] = []
        for aim in aims:
            local = patched(diagnosis, aim.label)
            norm = (1 if local else 2) * faint(diagnosis, clean)
            triggers.append(_Triggers(aim, clean.shape, norm, generator))
            if aim.label is not None:
                reached = [each for each in diagnosis.comparisons if each.label == aim.label]
                triggers[-1].weigh(reached or against_others(model, clean, aim.label, norm, generator), local)
        chose(
            "labels whose triggers may be spread over the image", [each.aim.label for each in triggers if each.spread]
        )
        with overall(self.name, total=self.rounds) as advance:
            for number in range(1, self.rounds + 1):
                detail = f"round {number}/{self.rounds}"
                searched = folded(student, clean)
                for each in triggers:
                    each.look(searched, clean, self.search_steps, detail)
                self._unlearn(student, teacher, average, clean, triggers, 1 - number / self.rounds, detail)
                advance()
        return average.module

    def _unlearn(
        self,
        student: nn.Module,
        teacher: nn.Module,
        average: AveragedModel,
        clean: CleanSet,
        triggers: "Sequence[_Triggers]",
        left: float,
        detail: str,
    ) -> None:
        """Train for one round, with a share of `left` of the rounds after it."""
        generator, in_turn = triggers[0].generator, cycle(triggers)
        spread = any(each.spread for each in triggers)
        stays_high = spread or any(each.aim.label is None for each in triggers)
        lr = self.lr * (2 * left + (1 if stays_high else 0.25))

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                wanted = teacher(images)
            plain, carriers = images.chunk(2)
            own = wanted.argmax(1)[len(plain) :]
            of_one = next(in_turn)
            if of_one.spread:
                of_one.climb_one(student, carriers, own)
            carriers = of_one.put_on(carriers, own, student)
            out = student(torch.cat([plain, carriers]))
            return 2 * functional.kl_div(
                out.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"
            ), out

        augment = shifted if self.augment == "crop-flip" else None

        steps = self.steps * len(triggers)

        def views() -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in clean.draws(2 * self.batch_size, steps, generator, augment):
                if len(clean) < FEW_IMAGES:
                    plain, carriers = images.chunk(2)
                    plain = varied(plain, generator)
                    images = torch.cat([plain, carriers if spread else varied(carriers, generator)])
                yield images if spread else mixed(images, generator), labels

        of_this_round = views()
        fit(
            list(student.parameters()),
            step,
            lambda: islice(of_this_round, TOLD_EVERY),
            partial(torch.optim.SGD, lr=lr, momentum=0.9),
            epochs=math.ceil(steps / TOLD_EVERY),
            name="unlearn triggers",
            detail=detail,
            buffers=list(average.module.parameters()),
            clip=CLIP,
            project=lambda: average.update_parameters(student),
        )


class _Triggers:
    """What all rounds found for one label, and how strong each of it still is."""

    def __init__(self, aim: Aim, shape: tuple[int, int, int], norm: float, generator: torch.Generator) -> None:
        self.aim = aim
        self.generator = generator
        self.boxes = BoxDraws(*shape[1:], generator)
        self.patches = Patches.none(shape)
        self.now = torch.zeros(0)
        self.pinned: list[Tensor] = []
        self.always = torch.zeros(0, dtype=torch.int64)
        self.changes = of_each_kind(shape, norm, generator)
        self.shares = torch.zeros(len(self.changes))
        self.spread = False
        self.faint: list[Perturbation] = []
        self.surest: Patches | None = None

    def weigh(self, reached: Sequence[Comparison], local: bool) -> None:
        """Decide whether the trigger may be spread over the image, and then on how many images to put each kind.

        What sends as many images to some other label is no sign of a backdoor, and to unlearn it costs accuracy.
        """
        further = {each.kind: each.further for each in reached}
        kinds = torch.tensor([*further.values()]).clamp(min=0) + LEAST_SHARE
        self.spread = not local or further["warp"] > FURTHER
        self.shares = CHANGED * kinds / kinds.sum()

    def look(self, student: nn.Module, clean: CleanSet, steps: int, detail: str) -> None:
        """Search what still sends images there, and choose what is shown next."""
        found = search(student, clean, self.aim, self.generator, self.patches, steps, detail)
        self.surest = pinpoint(student, clean, self.aim, found, self.generator, self.surest, detail)
        self.add(found, self.surest)
        self.choose(student, clean)
        if self.spread:
            self.climb_anew(student, clean, detail)
        else:
            few = FEW_PIXELS * clean.images[0].numel()
            self.faint.append(bounded(student, clean, self.aim, few, self.generator))

    def climb_anew(self, student: nn.Module, clean: CleanSet, detail: str) -> None:
        """Begin anew with half of the changes of each kind, and move all of them some steps."""
        for each in self.changes:
            each.begin(torch.rand(AT_ONCE, generator=self.generator) < 0.5)
        with stage("search changes", total=STEPS, detail=detail) as advance:
            for images, own in self.aim.others(clean).draws(BATCH, STEPS, self.generator):
                for each in self.changes:
                    each.climb(student, images, own, self.aim)
                advance()

    def climb_one(self, student: nn.Module, images: Tensor, own: Tensor) -> None:
        """Move the changes of one kind, drawn at random, a step further."""
        kind = int(torch.randint(len(self.changes), (1,), generator=self.generator))
        self.changes[kind].climb(student, images, own, self.aim)

    def add(self, found: Patches, surest: Patches) -> None:
        """Add what a search found, and the patches with which the network is surest."""
        rows = len(self.patches.boxes) + len(found.boxes)
        self.pinned.append(rows + torch.arange(len(surest.boxes)))
        found = found.added(surest.keys, torch.ones(len(surest.boxes)))
        self.patches = self.patches.joined(found)
        self.now = torch.cat([self.now, found.strength])

    def choose(self, student: nn.Module, clean: CleanSet) -> None:
        """Choose what is tried on every image: the surest patches of different patterns that work best now.

        Half of them are of the first round, because that searched the original, and what it climbed to may be the very
        trigger, which the network would fall for again if it were not shown.
        """
        shown = self.aim.others(clean).some(JUDGED, self.generator)
        _, pattern = self.patches.patterns.unique(dim=0, return_inverse=True)
        first, *later = self.pinned
        chosen: dict[int, int] = {}
        for rows, most in ((first, ALWAYS // 2 if later else ALWAYS), (torch.cat([first[:0], *later]), ALWAYS)):
            pinned = self.patches.at(self.patches.keys[rows])
            pinned = pinned._replace(strength=strengths(student, shown, self.aim, pinned))
            for row in rows[pinned.weights.argsort(descending=True)].tolist():
                if len(chosen) < most:
                    chosen.setdefault(int(pattern[self.patches.which[row]]), row)
        self.always = torch.tensor([*chosen.values()])

    def put_on(self, images: Tensor, own: Tensor, student: nn.Module) -> Tensor:
        """Give each image a perturbation of few pixels or a change of the whole, or else the best of a few patches."""
        if not self.spread:
            split = int(PERTURBED * len(images))
            return torch.cat([self._perturbed(images[:split]), self._patched(images[split:], own[split:], student)])
        ends = (len(images) * self.shares.cumsum(0)).round().long()
        *parts, rest = images.tensor_split(ends.tolist())
        put = [each.put_on(part, 0.5, LONGEST) for each, part in zip(self.changes, parts, strict=True)]
        rest = self._patched(rest, own[len(images) - len(rest) :], student)
        return _distracted(torch.cat([*put, rest]), images, self.generator)

    def _perturbed(self, images: Tensor) -> Tensor:
        values = torch.stack([each.values for each in self.faint])
        chosen = values[torch.randint(len(values), (len(images),), generator=self.generator)]
        length = LONGEST * torch.rand(len(images), 1, 1, 1, generator=self.generator)
        return (images + length * chosen).clamp(0, 1)

    def _patched(self, images: Tensor, own: Tensor, student: nn.Module) -> Tensor:
        if not len(images):
            return images
        known = self.patches
        weights = self.now**2 + REMEMBERED * known.strength**2 + TINY
        count = len(images)
        fixed = self.always.repeat_interleave(count)
        rows = torch.cat([fixed, torch.multinomial(weights, DRAWN * count, True, generator=self.generator)])
        varied = torch.rand(len(rows), generator=self.generator) < VARIED
        varied[: len(fixed)] = False
        keys = known.keys[rows]
        keys[varied, :4] = self.boxes.varied(keys[varied, :4])
        other = varied & (torch.rand(len(rows), generator=self.generator) < OTHER_PATTERN)
        keys[other, 4] = torch.randint(len(known.patterns), (int(other.sum()),), generator=self.generator)
        tried = known.at(keys)
        stamped = tried.stamp(images.repeat(len(rows) // count, 1, 1, 1), torch.arange(len(rows)))
        with torch.no_grad():
            out = student(stamped)
        own = own.repeat(len(rows) // count)
        there = self.aim.there(own)
        strength = self.aim.probability(out, own).masked_fill(there, 0)
        self._update(rows[~varied & ~there], strength[~varied & ~there])
        new = varied & (strength > 0.5)
        self.patches = known.added(keys[new], strength[new])
        self.now = torch.cat([self.now, strength[new]])
        best = strength.view(-1, count).argmax(0) * count + torch.arange(count)
        opacity = 1 - FAINTEST * torch.rand(count, 1, 1, 1, generator=self.generator)
        opacity[torch.rand(count, generator=self.generator) < 0.5] = 1
        return torch.lerp(images, stamped[best], opacity)

    def _update(self, rows: Tensor, strength: Tensor) -> None:
        """Move what is known of each patch half of the way to the mean of what its tries gave."""
        tries = rows.bincount(minlength=len(self.now))
        mean = rows.bincount(strength, minlength=len(self.now)) / tries.clamp(min=1)
        self.now = torch.where(tries > 0, (self.now + mean) / 2, self.now)


def _distracted(images: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images with up to a third of another image, or of noise of any scale, laid over."""
    count = len(images)
    over = others[torch.randperm(len(others), generator=generator)[:count]]
    for row in (torch.rand(count, generator=generator) < 0.5).nonzero().flatten().tolist():
        over[row] = _noise(images.shape[1:], generator)
    share = DISTRACTED * torch.rand(count, 1, 1, 1, generator=generator)
    share = share * (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    return torch.lerp(images, over, share)


def _noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform noise on a grid that may be as coarse as one cell, enlarged to an image `(C, H, W)`."""
    finest = int(math.log2(min(shape[1:])))
    cells = 2 ** int(torch.randint(0, 1 + finest, (1,), generator=generator))
    drawn = torch.rand(1, shape[0], cells, cells, generator=generator)
    return functional.interpolate(drawn, size=shape[1:], mode="bilinear")[0]
