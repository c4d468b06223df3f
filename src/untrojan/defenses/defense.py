"""The base of every defense, and what a defense gives back."""

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple, final

import torch
from pydantic import Field
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.defenses.checks import (
    FEW_JUDGES,
    keeps_accuracy,
    keeps_answers,
    losses,
    resists_changes,
    resists_patches,
    resists_perturbation,
)
from untrojan.device import device_of, running_on
from untrojan.errors import ConfigError, ModelError, NoEffectWarning, UnreliableWarning
from untrojan.mask import Mask
from untrojan.model import accuracy_of, copied, correct, logits, require, require_kinds
from untrojan.progress import overall, timing
from untrojan.randomness import seeded
from untrojan.record import Accuracy, Check, Diagnosis, Layer, MethodInfo, Rate, Record, Selection, Status
from untrojan.registry import config, describe
from untrojan.run import choosing, clean_info, collected, environment, model_info, peak_memory, tensors_of
from untrojan.scanners.tainted import tainted
from untrojan.scanners.triggers import TriggerScanner
from untrojan.sources.files import Checkpoint, save_state, state_sha256, unprefixed
from untrojan.sources.undo import save_changes
from untrojan.speed import faster, lay_out, layout_of
from untrojan.writing import RECORD, REPORT, sha256, staged, write_atomic

REPAIRED, CHANGES = "repaired.safetensors", "changes.safetensors"


class Outcome(NamedTuple):
    """What the author of a defense returns from `_repair`.

    Attributes:
        model: The repaired network, of the same architecture.
        before: Which clean images the original gets right: bool `(n,)`.
        after: The same images for the repaired network.
        held_out: Whether nothing was fitted on the images that `after` was measured on.
        checks: What the method itself asks of a repaired model, beside what is asked of all.
        selection: How the method chose how much to change, when it has such a choice.
        mask: The method's scores, one per unit.
        kept: Ones where a unit was kept, zeros where it was pruned.
    """

    model: nn.Module
    before: Tensor
    after: Tensor
    held_out: bool
    checks: list[Check] = []  # noqa: RUF012
    selection: Selection | None = None
    mask: Mask | None = None
    kept: Mask | None = None


@dataclasses.dataclass(frozen=True)
class Repair:
    """A repaired model and the record of how it came about.

    Attributes:
        model: The network: same class, same state-dict keys; the original object is untouched.
        record: Everything about the run; see :class:`untrojan.record.Record`.
    """

    model: nn.Module = dataclasses.field(repr=False)
    record: Record = dataclasses.field(repr=False)
    _parent: Mapping[str, Tensor] = dataclasses.field(repr=False)
    _child: Mapping[str, Tensor] = dataclasses.field(repr=False)

    def __repr__(self) -> str:
        return f"Repair({self.record.status}: {self.record.reason})"

    def report(self, path: str | Path) -> None:
        """Write the report as one HTML page that needs no network."""
        from untrojan.report import render

        write_atomic(Path(path), render(self.record).encode())

    def save(self, folder: str | Path, force: bool = False) -> None:
        """Write `repaired.safetensors`, `changes.safetensors`, `report.html` and `record.json`.

        The folder appears whole: everything is written beside it first. In a folder that exists, it is written inside,
        and the four files are moved into place one by one, the record last.

        Args:
            folder: Where to; made if it is not there.
            force: Replace these four files when the folder holds something already.

        Raises:
            ConfigError: The folder is not empty and `force` is not set.
            OSError: It cannot be written.
        """
        with staged(folder, force) as made:
            save_state(made / REPAIRED, self._child, {"untrojan": self.record.status})
            save_changes(made / CHANGES, self._parent, self._child)
            saved = dataclasses.replace(self, record=self._with_file(sha256((made / REPAIRED).read_bytes())))
            saved.report(made / REPORT)
            write_atomic(made / RECORD, saved.record.to_json().encode())

    def _with_file(self, file_sha256: str) -> Record:
        repaired = self.record.repaired.model_copy(update={"path": REPAIRED, "sha256": file_sha256})
        return self.record.model_copy(update={"repaired": repaired})


@config
class Defense(ABC):
    """Base of every defense; subclasses are each a :func:`~untrojan.registry.config` with a `name`.

    Authors write :meth:`_repair`, which gets a copy of the model, a diagnosis and a seeded random state. Everything
    that is common to all defenses is done here, once. Most derive from :class:`~untrojan.defenses.pruning.Pruning` or
    :class:`~untrojan.defenses.tuning.Tuning` instead.

    Attributes:
        budget: Accepted loss of clean accuracy, as a fraction, in (0, 1).
    """

    name: ClassVar[str]
    data_free: ClassVar[bool] = False

    budget: float = Field(default=0.02, gt=0, lt=1)

    @final
    def repair(
        self,
        model: nn.Module,
        clean: CleanSet,
        diagnosis: Diagnosis | None = None,
        seed: int = 0,
        source: Checkpoint | None = None,
    ) -> Repair:
        """Repair a model.

        Args:
            model: Any network from images `(N, C, H, W)` in [0, 1] to logits `(N, K)`; it is not changed.
            clean: Clean images with their true labels, at least one of each class. Those that carry a trigger of a
                suspected label are left out, with a warning. A method that is `data_free` also takes a set without
                images; nothing can be verified then.
            diagnosis: What a scan found; without it the model is scanned first.
            seed: Same seed, same repair, on a GPU up to rounding; the caller's random state is left alone.
            source: The file the model came from, for the record, and for its keys and types when saving.

        Returns:
            The repaired model with its record. Whether it may be called repaired is `record.status`.

        Raises:
            ModelError: The model cannot be used, or the method left it unusable.
            DataError: The images do not fit the model.
            ConfigError: The diagnosis suspects a label, or has targets for classes, or the method asks for a unit or
                layer, that the model does not have; or the seed is negative.
        """
        require_kinds(model, clean)
        device = device_of(model)
        clean = clean.to(device)
        with collected() as caught, choosing() as choices, timing() as seconds, running_on(device), seeded(seed):
            if len(clean) or not self.data_free:
                require(copied(model), clean)
            doubt = ""
            if diagnosis is None:
                diagnosis = _look(model, clean, seed)
            elif len(clean):
                _require_known(diagnosis, clean)
                _, doubt = accuracy_of(copied(model), clean)
            trusted = _trusted(copied(model), clean, diagnosis, seed)
            outcome = (
                _unchanged(copied(model), trusted)
                if diagnosis.cleared
                else self._repair(_to_repair(model, trusted), trusted, diagnosis, seed)
            )
            _put_back(outcome.model, model)
            parent, child = _states(model, outcome.model, source)
            if source is not None:
                _round_as_saved(outcome.model, child)
            # Logits that are not finite raise here.
            classes = logits(outcome.model, clean).shape[1] if len(clean) else None
            changed = state_sha256(parent) != state_sha256(child)
            checks = self._checks(copied(model), outcome, trusted, diagnosis, seed) if changed else outcome.checks
            status, reason = _status(diagnosis, checks, changed, doubt)
            if status == "failed" and not changed:
                warnings.warn(NoEffectWarning(f"{self.name} changed nothing: {reason}"), stacklevel=2)
        record = Record(
            status=status,
            reason=reason,
            method=MethodInfo(name=self.name, fields=describe(self)),
            seed=seed,
            model=model_info(model, parent, classes, source),
            clean=clean_info(clean, classes),
            diagnosis=diagnosis,
            choices=choices,
            selection=outcome.selection,
            before=_accuracy(outcome.before, outcome.held_out),
            after=_accuracy(outcome.after, outcome.held_out),
            checks=checks,
            units_changed=outcome.kept.pruned if outcome.kept else 0,
            units_total=outcome.mask.total if outcome.mask else 0,
            values_changed=sum(int((child[name] != value).sum()) for name, value in parent.items()),
            layers=_layers(outcome.mask, outcome.kept),
            repaired=model_info(outcome.model, child, classes, None),
            seconds=seconds,
            peak_memory_bytes=peak_memory(device),
            environment=environment(device),
            warnings=caught,
        )
        return Repair(outcome.model, record, parent, child)

    @abstractmethod
    def _repair(self, model: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int) -> Outcome:
        """Repair a copy of the model, with the random state seeded."""

    def _checks(
        self, model: nn.Module, outcome: Outcome, clean: CleanSet, diagnosis: Diagnosis, seed: int
    ) -> list[Check]:
        """What the method asks and what is asked of all; the dear checks only where those before them pass."""
        if not len(clean):
            text = "there are no clean images to verify the result on"
            return [*outcome.checks, Check(name="is verified", passed=False, detail=text)]
        judged = losses(outcome.before, outcome.after)
        everywhere = losses(correct(model, clean), correct(outcome.model, clean))
        checks = [keeps_accuracy(judged, everywhere, self.budget, outcome.held_out), *outcome.checks]
        hardly_right = float(outcome.before.double().mean()) < 0.5
        if not outcome.held_out or len(judged) < FEW_JUDGES or hardly_right:
            checks += keeps_answers(model, outcome.model, clean, diagnosis, seed)
        # all-to-all backdoors are told by patches alone
        of_one_target = (resists_perturbation, resists_patches, resists_changes)
        dear = (resists_patches,) if diagnosis.all_to_all else of_one_target
        with overall("check the result", total=len(dear)) as advance:
            for resists in dear:
                if all(check.passed for check in checks):
                    checks.append(resists(model, outcome.model, clean, diagnosis, seed))
                advance()
        return checks


def _require_known(diagnosis: Diagnosis, clean: CleanSet) -> None:
    """Raise where a given diagnosis speaks of labels that the model, by those of its images, does not have."""
    classes = int(clean.labels.max()) + 1
    targets = [each.targets for each in diagnosis.triggers if each.targets]
    labels = [*diagnosis.suspects, *(label for each in targets for label in each)]
    wrong = [f"suspects label {label}" for label in labels if not 0 <= label < classes]
    wrong += [f"has targets for {len(each)} classes" for each in targets if len(each) != classes]
    if wrong:
        text = f"the diagnosis {wrong[0]}, but the model has {classes} classes, 0 to {classes - 1}"
        raise ConfigError(f"{text}: expected the diagnosis of a scan of this model")


def _look(model: nn.Module, clean: CleanSet, seed: int) -> Diagnosis:
    if len(clean):
        return TriggerScanner().scan(model, clean, seed)
    return Diagnosis(verdict="inconclusive", rule="there were no clean images to scan with", targets=[], runs=[])


def _trusted(model: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int) -> CleanSet:
    """The clean images without those that carry a trigger, of which a warning tells."""
    doubtful = tainted(model, clean, diagnosis, seed)
    if not doubtful.any():
        return clean
    text = (
        f"{int(doubtful.sum())} of the {len(clean)} clean images hold something that gives other images their label:"
        " they may be poisoned, and are left out"
    )
    warnings.warn(UnreliableWarning(text), stacklevel=3)
    return clean.take(~doubtful)


def _unchanged(model: nn.Module, clean: CleanSet) -> Outcome:
    right = correct(model, clean)
    return Outcome(model, right, right, held_out=True)


def _to_repair(model: nn.Module, clean: CleanSet) -> nn.Module:
    """A copy that may be changed, on a CPU with its weights laid out so that it takes less time."""
    changeable = copied(model)
    if len(clean) and device_of(model).type == "cpu":
        lay_out(changeable, layout_of(faster(copied(model), clean, rounding=False)))
    return changeable


def _put_back(model: nn.Module, original: nn.Module) -> None:
    """Give every part the training flag and every parameter the `requires_grad` that it had, and the usual layout."""
    flags = {name: module.training for name, module in original.named_modules()}
    for name, module in model.named_modules():
        module.training = flags.get(name, module.training)
    grads = {name: parameter.requires_grad for name, parameter in original.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(grads.get(name, parameter.requires_grad)).grad = None
    lay_out(model, torch.contiguous_format)


def _status(diagnosis: Diagnosis, checks: list[Check], changed: bool, doubt: str) -> tuple[Status, str]:
    if diagnosis.cleared and (doubt or diagnosis.verdict != "not_found"):
        return "inconclusive", f"no backdoor was found, but {doubt or 'the scan is in doubt'}; the model is unchanged"
    if diagnosis.cleared:
        return "nothing_to_repair", "no backdoor was found, and the model is unchanged"
    failed = [check.detail for check in checks if not check.passed]
    if failed:
        return "failed", "; ".join(failed)
    if not changed:
        return "failed", "the method changed nothing"
    passes = f"the model passes all {len(checks)} checks"
    if diagnosis.verdict == "inconclusive":
        return "inconclusive", f"{passes}, but these look at what the scan suspects, and it was inconclusive"
    if doubt:
        return "inconclusive", f"{passes}, but {doubt}"
    return "repaired", passes


def _states(
    model: nn.Module, repaired: nn.Module, source: Checkpoint | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of both state dicts as they are saved: with the keys and types of the source, where there is one.

    What the repair left alone keeps the very value of the source, which may be of a finer type than the network's.
    """
    before, after = tensors_of(model), tensors_of(repaired)
    if {name: value.shape for name, value in before.items()} != {name: value.shape for name, value in after.items()}:
        raise ModelError("the method changed the architecture: expected the same state-dict keys and shapes")
    if source is None:
        return _copies(before), _copies(after)
    before, after = unprefixed(before), unprefixed(after)
    finest = {name: _finest(before[name], value) for name, value in source.tensors.items()}
    return finest, {
        name: torch.where(after[name].cpu() == before[name].cpu(), value, after[name].cpu().to(value.dtype))
        for name, value in finest.items()
    }


def _round_as_saved(model: nn.Module, child: Mapping[str, Tensor]) -> None:
    """Give a network the values that its file will hold, which may be of a coarser type, so that these are judged."""
    own = unprefixed(tensors_of(model))
    for name, saved in child.items():
        if not torch.equal(own[name].cpu(), saved.to(own[name].dtype)):
            own[name].copy_(saved)


def _finest(value: Tensor, original: Tensor) -> Tensor:
    """The value in the type of the file, digit for digit where it is what the file holds."""
    value = value.cpu()
    return torch.where(original.to(value.dtype) == value, original, value.to(original.dtype))


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to("cpu", copy=True) for name, value in state.items()}


def _accuracy(correct: Tensor, held_out: bool) -> Accuracy:
    return Accuracy(accuracy=Rate.of(int(correct.sum()), correct.numel()), held_out=held_out)


def _layers(mask: Mask | None, kept: Mask | None) -> list[Layer]:
    if mask is None or kept is None:
        return []
    return [
        Layer(
            name=name.removesuffix(".weight"),
            values=value.flatten().tolist(),
            changed=(kept.values[name] == 0).flatten().nonzero().flatten().tolist(),
        )
        for name, value in mask.values.items()
    ]
