"""A trigger from the model alone: one perturbation that sends every image where it is to go."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.device import new_generator
from untrojan.fit import fit
from untrojan.model import evaluating
from untrojan.pictures import png
from untrojan.scanners.aim import Aim
from untrojan.speed import folded

FIRST_NORM = 2.0
GROWTH = 1.5
ENOUGH = 0.9
ROUNDS = 14
EPOCHS = 20
IMAGES = 200
BATCH = 25
SHORT_BATCH = 64
SHORT_STEPS = 60
RATES = {"l1": 0.05, "l2": 0.02}

Ball = Literal["l1", "l2"]


class Perturbation(NamedTuple):
    """A universal perturbation `(C, H, W)`, added to images and clipped to [0, 1]."""

    values: Tensor
    norm: float

    def __str__(self) -> str:
        return f"a perturbation of all pixels with an l2 norm of {float(self.values.norm()):.2g}"

    def add(self, images: Tensor) -> Tensor:
        """Add it to images `(N, C, H, W)`, clipped to [0, 1]."""
        return (images + self.values).clamp(0, 1)

    @property
    def amplified(self) -> Tensor:
        """The perturbation as an image, amplified to the full range around gray."""
        return 0.5 + self.values / (2 * self.values.abs().max().clamp(min=1e-9))

    def picture(self) -> str:
        """The perturbation as a PNG in base64, amplified."""
        return png(self.amplified)

    def success(self, model: nn.Module, clean: CleanSet, aim: Aim) -> float:
        """Share of the images that the perturbation sends there."""
        return aim.share(model, clean, self.add)


def universal(model: nn.Module, clean: CleanSet, aim: Aim, seed: int) -> Perturbation:
    """Find one small perturbation that sends most images where they are to go.

    Its l1 norm, in units of the full pixel range, grows from a small one until the perturbation reaches 90 % of the
    images, so that what comes out is about as small as that takes. On a model with a backdoor there it uses the
    backdoor; on a clean one it is larger.

    Args:
        model: The network; it is not changed.
        clean: Images to find it on, with at least one of another class.
        aim: Where to send them.
        seed: Decides the order of the images.

    Returns:
        The perturbation, and its l1 norm. At the largest norm tried it may still reach fewer images.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> images = CleanSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> found = universal(net, images, Aim(1), seed=0)
        >>> found.success(net, images, Aim(1)) >= 0.9
        True

    References:
        Moosavi-Dezfooli et al.: Universal adversarial perturbations, CVPR 2017, arXiv:1610.08401.
        Wang et al.: Neural Cleanse, IEEE S&P 2019.
    """
    generator = new_generator(seed)
    others = aim.others(clean)
    shown = others.some(IMAGES, generator)
    found, quick = Perturbation(torch.zeros(clean.shape), FIRST_NORM), folded(model, clean)
    for number in range(ROUNDS):
        found = Perturbation(found.values, FIRST_NORM * GROWTH**number)
        _improve(found, quick, lambda: shown.batches(BATCH, generator), aim, EPOCHS)
        if found.success(quick, others, aim) >= ENOUGH:
            break
    return found


def bounded(
    model: nn.Module,
    clean: CleanSet,
    aim: Aim,
    norm: float,
    generator: torch.Generator,
    ball: Ball = "l1",
    steps: int = SHORT_STEPS,
) -> Perturbation:
    """Find the perturbation of a given norm that sends most images where they are to go, in a short search.

    Args:
        model: The network; it is not changed.
        clean: Images to find it on, with at least one of another class.
        aim: Where to send them.
        norm: In units of the full pixel range.
        generator: Decides the order of the images.
        ball: Which norm: "l1" gives few pixels that change much, "l2" many that change little.
        steps: Batches of 64 images.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> images = CleanSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> bounded(net, images, Aim(1), 3.0, torch.Generator().manual_seed(0)).values.abs().sum() <= 3.001
        tensor(True)
    """
    found = Perturbation(torch.zeros(clean.shape), norm)
    others = aim.others(clean)
    _improve(found, folded(model, clean), lambda: others.draws(SHORT_BATCH, steps, generator), aim, epochs=1, ball=ball)
    return found


def _improve(
    found: Perturbation,
    model: nn.Module,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    aim: Aim,
    epochs: int,
    ball: Ball = "l1",
) -> None:
    """Change a perturbation in place, within the ball of its norm."""
    values = found.values

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = model((images + values).clamp(0, 1))
        return aim.loss(out, labels), out

    with evaluating(model):
        fit(
            [values],
            step,
            batches,
            partial(torch.optim.Adam, lr=RATES[ball]),
            epochs,
            name="invert",
            detail=f"{ball} norm {found.norm:g}",
            project=lambda: values.copy_(BALLS[ball](values, found.norm)),
            stop=lambda epoch: aim.reached(epoch) > ENOUGH,
        )
    values.requires_grad_(False)


def _onto_l1_ball(values: Tensor, norm: float) -> Tensor:
    """The nearest point whose absolute values sum to at most `norm`; small values become 0, NaN and infinity stay."""
    sizes = values.abs().flatten()
    if sizes.sum() <= norm or not sizes.isfinite().all():
        return values
    ordered = sizes.sort(descending=True).values
    excess = (ordered.cumsum(0) - norm) / torch.arange(1, len(ordered) + 1)
    cut = excess[ordered > excess][-1]
    return values.sign() * (values.abs() - cut).clamp(min=0)


def _onto_l2_ball(values: Tensor, norm: float) -> Tensor:
    return values * (norm / values.norm().clamp(min=norm))


BALLS: dict[Ball, Callable[[Tensor, float], Tensor]] = {"l1": _onto_l1_ball, "l2": _onto_l2_ball}
