"""I-BAU: unlearn the worst universal perturbation, with the gradient that knows how the perturbation follows."""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from untrojan.data import CleanSet
from untrojan.defenses.checks import within
from untrojan.defenses.tuning import Tuning, tangent
from untrojan.device import new_generator
from untrojan.errors import ModelError
from untrojan.fit import fit, learnable
from untrojan.model import correct
from untrojan.progress import overall
from untrojan.record import Diagnosis
from untrojan.registry import config
from untrojan.run import chose


@config
class IBAU(Tuning):
    """Implicit Backdoor Adversarial Unlearning: train against the universal perturbation that hurts most.

    Whatever the trigger is, it is one perturbation that turns many images. Each round first looks for the universal
    perturbation, added to every image, that takes the model farthest from its own predictions (inner problem), then
    trains the weights to give the true labels with that perturbation on some of the images (outer problem). The
    perturbation depends on the weights, so that the gradient of the outer loss has a second part, which comes through
    it: the implicit hyper-gradient, found by iterating the map of one inner gradient step to its fixed point.

    More rounds remove more of a backdoor and cost more clean accuracy. The model delivered is that of the latest round
    whose accuracy on held-out images is within the budget of the original; where no round is, the last one.

    Attributes:
        variant: `fixed` or `released`; see Deviations.
        batch_size: Images per step, at most; fewer where there are less than four batches of them.
        lr: Learning rate of Adam on the weights, above 0; too high a one makes the rounds diverge.
        rounds: Perturbations to find and to train against, one pass over the images each.
        perturb_lr: Learning rate of SGD on the perturbation, above 0.
        penalty: Factor of the squared l2 norm of the perturbation, at least 0.
        iterations: Steps of the fixed-point iteration.
        contraction_lr: Step size of the gradient map that is iterated, above 0.
        share: Share of each batch that the perturbation is put on, in (0, 1].

    Needs:
        Clean images.

    Cost:
        24 F per image and round, 120 F per image: 1 F for the model's own predictions, 2 F for the perturbation, 3 F
        for the outer gradient, and at each step 18 F per image of the first batch, which the implicit part is taken
        on: 2 F for its gradient, 3 F for each of four products with second derivatives as torch computes them, and 4 F
        for the one that reaches the weights. Choosing a round adds 1 F per held-out image and round.

    Example:
        >>> from untrojan.record import Diagnosis
        >>> from untrojan.sources.nets import build
        >>> clean = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> suspicion = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        >>> IBAU(rounds=1).repair(build("digits-cnn"), clean, suspicion).record.method.name
        'i-bau'

    References:
        Zeng, Chen, Park, Mao, Jin, Jia: Adversarial unlearning of backdoors via implicit hypergradient, ICLR 2022,
        arXiv:2110.03735.

    Deviations:
        * The published code delivers the last round, whatever became of its accuracy. Here a round is chosen on
          held-out images.
        * The published code perturbs as many images of a batch as the share gives, rounded down: in batches of less
          than 100 none, and nothing is unlearned. Here at least one is perturbed.
        * Batches are smaller where there are few images, so that few images still mean enough steps.
        * The published code goes through its batches in one order all the time, so that the implicit part is always
          taken on the same first batch, and measures the perturbation there against the true labels. Here batches are
          drawn anew in each pass, and the predictions that the perturbation was searched against, made once per round,
          serve the implicit part too.
        * The paper's formula bounds the norm of the perturbation; the published code only penalizes it, and so does
          this.

        With `variant="released"` the last round is delivered, and the share is rounded down.
    """

    name: ClassVar[str] = "i-bau"

    variant: Literal["fixed", "released"] = "fixed"
    batch_size: int = Field(default=100, ge=2)
    lr: float = Field(default=1e-3, gt=0)
    rounds: int = Field(default=5, ge=1)
    perturb_lr: float = Field(default=10.0, gt=0)
    penalty: float = Field(default=0.001, ge=0)
    iterations: int = Field(default=5, ge=1)
    contraction_lr: float = Field(default=0.1, gt=0)
    share: float = Field(default=0.01, gt=0, le=1)

    def tune(self, model: nn.Module, clean: CleanSet, held: CleanSet, diagnosis: Diagnosis, seed: int) -> nn.Module:
        """Alternate the two problems and keep the round that the rule chooses."""
        generator = new_generator(seed)
        adam = torch.optim.Adam(model.eval().parameters(), lr=self.lr)
        before = float(correct(model, held).double().mean()) if self.variant == "fixed" else 0.0
        kept: tuple[int, nn.Module] | None = None
        done = 0
        with overall(self.name, total=self.rounds) as advance:
            for number in range(1, self.rounds + 1):
                detail = f"{number}/{self.rounds}"
                found = self._perturbation(model, clean, generator, detail)
                if not self._unlearn(model, clean, found, adam, generator, detail):
                    break
                done = number
                if self.variant == "fixed":
                    try:
                        after = float(correct(model, held).double().mean())
                    except ModelError:
                        break
                    if within(before - after, self.budget):
                        kept = number, copy.deepcopy(model)
                advance()
        delivered, model = kept or (done, model)
        chose("round delivered", delivered)
        return model

    def _perturbation(
        self, model: nn.Module, clean: CleanSet, generator: torch.Generator, detail: str
    ) -> "_Perturbation":
        """The inner problem: one pass over the images from zero."""
        values = torch.zeros(clean.shape)
        batches = self._predicted(model, clean, generator)
        images, labels = next(batches)

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            out = model(images + values)
            return self._inner(out, labels, values), out

        fit(
            [values],
            step,
            lambda: chain([(images, labels)], batches),
            partial(torch.optim.SGD, lr=self.perturb_lr),
            1,
            name="perturb",
            detail=detail,
        )
        return _Perturbation(values, images, labels)

    def _predicted(
        self, model: nn.Module, clean: CleanSet, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for images, _ in self.batches(clean, generator):
            with torch.no_grad():
                predicted = model(images).argmax(1)
            yield images, predicted

    def _inner(self, out: Tensor, labels: Tensor, values: Tensor) -> Tensor:
        return self.penalty * values.square().sum() - functional.cross_entropy(out, labels)

    def _unlearn(
        self,
        model: nn.Module,
        clean: CleanSet,
        found: "_Perturbation",
        adam: torch.optim.Adam,
        generator: torch.Generator,
        detail: str,
    ) -> bool:
        """The outer problem: one pass over the images; tells whether it stayed finite."""
        parameters = list(filter(learnable, model.parameters()))

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            out = model(images + self._chosen(len(images), generator) * found.values)
            outer = functional.cross_entropy(out, labels)
            slopes = self._hypergradient(model, parameters, outer, found)
            return tangent(outer, parameters, slopes), out

        done = fit(
            parameters,
            step,
            lambda: self.batches(clean, generator),
            lambda _: adam,
            1,
            name="unlearn the perturbation",
            detail=detail,
            buffers=list(model.buffers()),
        )
        return done.diverged_at is None

    def _chosen(self, count: int, generator: torch.Generator) -> Tensor:
        """Ones for the images of a batch that are perturbed: float `(count, 1, 1, 1)`."""
        number = int(self.share * count) if self.variant == "released" else max(1, round(self.share * count))
        chosen = torch.zeros(count, 1, 1, 1)
        chosen[torch.randperm(count, generator=generator)[:number]] = 1
        return chosen

    def _hypergradient(
        self, model: nn.Module, parameters: Sequence[Tensor], outer: Tensor, found: "_Perturbation"
    ) -> list[Tensor]:
        """The gradient of the outer loss by the weights, directly and through the perturbation."""
        values, images, labels = found
        pull, *direct = grad(outer, [values, *parameters], materialize_grads=True)
        with sdpa_kernel(SDPBackend.MATH):  # the only attention that can be differentiated twice
            inner = self._inner(model(images + values), labels, values)
        (slope,) = grad(inner, values, create_graph=True)
        mapped = values - self.contraction_lr * slope
        summed = pull
        for _ in range(self.iterations - 1):
            (carried,) = grad(mapped, values, summed, retain_graph=True)
            summed = carried + pull
        implicit = grad(mapped, parameters, summed, materialize_grads=True)
        return [one + other for one, other in zip(direct, implicit, strict=True)]


class _Perturbation(NamedTuple):
    """A universal perturbation `(C, H, W)`, and the first batch it was found on with the model's predictions."""

    values: Tensor
    images: Tensor
    labels: Tensor
