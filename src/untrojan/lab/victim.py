"""Make a victim: poison training images with an attack, and train a network on them."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

from untrojan.augmentation import Augment
from untrojan.data import CleanSet
from untrojan.device import device_of, running_on
from untrojan.errors import ConfigError, DataError, ModelError, UnreliableWarning
from untrojan.fit import Epoch, Standing, fit, size_without_single
from untrojan.lab.attack import Attack, Target, target_labels
from untrojan.lab.online import Online
from untrojan.randomness import random_state, seeded, set_random_state
from untrojan.registry import require_kind
from untrojan.speed import faster, lay_out, layout_of

State = Mapping[str, Any]
"""Where a training stands: mappings and lists, by any keys, of tensors, numbers, text and nothing."""


def poison(images: CleanSet, attack: Attack, target: Target, rate: float | None = None, seed: int = 0) -> CleanSet:
    """Poison training images as an attack does.

    A dirty-label attack puts its trigger on images of other classes and gives them the label that the attacker wants. A
    clean-label attack puts it on images of the target class and changes no label. Some attacks add cover samples:
    images of other classes that get the trigger, or something like it, and keep their label.

    Args:
        images: Clean training images with their true labels; not changed.
        attack: Whose trigger to put on.
        target: The target class, or "all-to-all", which clean-label attacks cannot do.
        rate: The poisoning rate in [0, 1], rounded to whole images: poisoned images as a fraction of all images or,
            for a clean-label attack, of those of the target class. Left out, the published one of the attack. A warning
            tells where it rounds to none.
        seed: Decides which images are poisoned and what differs from image to image; at least 0.

    Returns:
        All images in their old order, as uint8 if they were that: values are then rounded and saturate at 0 and 255.

    Raises:
        ConfigError: The rate is not in [0, 1], the target is no class of the images, or it is "all-to-all" with a
            clean-label attack; or the seed is negative.
        DataError: Fewer images than that can be poisoned, or the trigger does not fit the images.

    Example:
        >>> from untrojan.lab.attacks.badnets import BadNets
        >>> images = CleanSet(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 4)
        >>> poisoned = poison(images, BadNets(size=1), target=3, rate=0.25, seed=0)
        >>> poisoned.counts
        [1, 2, 1, 4]
        >>> poisoned.images[:, 0, 3, 3].tolist()
        [0, 0, 255, 0, 255, 0, 0, 0]
    """
    require_kind(attack, Attack)
    rate = attack.rate_or(rate)
    if attack.clean_label and target == "all-to-all":
        raise ConfigError(f"{attack.name} poisons images of the target class only; expected one class, got all-to-all")
    wanted = target_labels(images.labels, target, images.num_classes)
    possible = ((wanted == images.labels) == attack.clean_label).nonzero().flatten().cpu().numpy()
    total = len(possible if attack.clean_label else images)
    count = round(rate * total)
    if rate and not count:
        text = f"nothing is poisoned: a poisoning rate of {rate:g} of {total} images rounds to none; raise the rate"
        warnings.warn(UnreliableWarning(text), stacklevel=2)
    covers = round(attack.covers * count)
    if count + covers > len(possible):
        raise DataError(
            f"a poisoning rate of {rate} needs {count + covers} of {len(images)} images, but only {len(possible)} of "
            f"them can be poisoned with target {target}; lower the rate"
        )
    with seeded(seed):
        rng = np.random.default_rng(seed)
        order = torch.as_tensor(rng.permutation(possible))
        pixels, labels = images.images.clone(), images.labels.clone()
        labels[order[:count]] = wanted[order[:count]]
        for chosen, change in ((order[:count], attack.poisoned), (order[count : count + covers], attack.cover)):
            if len(chosen):
                pixels[chosen] = _as(pixels.dtype, change(images.take(chosen), images, rng))
    return CleanSet(pixels, labels, images.class_names)


def train(
    net: nn.Module,
    images: CleanSet,
    epochs: int,
    seed: int,
    lr: float = 0.1,
    batch_size: int = 64,
    weight_decay: float = 5e-4,
    smoothing: float = 0.0,
    augment: Augment | None = None,
    bf16: bool = False,
    online: Online | None = None,
    after_epoch: Callable[[nn.Module, State], str] | None = None,
    begin: State | None = None,
) -> nn.Module:
    """Train a copy of a network by SGD with momentum on the cross-entropy, with a one-cycle learning rate.

    Args:
        net: From images `(N, C, H, W)` in [0, 1] to logits `(N, K)`; not changed.
        images: Training images, poisoned or clean, with labels below K.
        epochs: Passes over the images, at least 1.
        seed: Decides order and dropout; the caller's random state is left alone. The initial weights are those of
            `net`.
        lr: The highest learning rate, above 0; 0.01 to 0.1 for networks with BatchNorm.
        batch_size: Images per step, at least 1; now and then one or two more, so that no step gets a single image,
            which BatchNorm could not take.
        weight_decay: At least 0; 5e-4 is usual, a small network on few images takes up to 1e-2.
        smoothing: Label smoothing in [0, 1).
        augment: Changes each batch of images, for instance :func:`untrojan.augmentation.crop_flip`.
        bf16: Multiply in bfloat16 where the device does so natively, which is faster there, and the network can.
        online: What an attack does to every batch of clean images, and trains meanwhile.
        after_epoch: Called after each epoch with the network as it is and with all that it takes to go on from there,
            tensors that later steps write to among it; what it returns is shown with the progress.
        begin: Go on from there, where `after_epoch` of a call with the same arguments was given it, also after it was
            saved as :func:`untrojan.lab.checkpoint.save` does. On one version of torch, with as many threads of a CPU,
            the result is then that of a call that was never interrupted, bit for bit.

    Returns:
        The trained network, in evaluation mode.

    Raises:
        ModelError: The loss, a weight or a running statistic became NaN or infinite.

    References:
        Smith, Topin: Super-convergence. arXiv 1708.07120.

    Example:
        >>> images = CleanSet(torch.eye(2).view(2, 1, 1, 2).repeat(8, 1, 1, 1), torch.arange(2).repeat(8))
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
        >>> trained = train(net, images, epochs=20, seed=0, batch_size=4)
        >>> bool((trained(images.floats()).argmax(1) == images.labels).all())
        True
    """
    device = device_of(net)
    trained, images = copy.deepcopy(net).train(), images.to(device)
    with running_on(device), seeded(seed):
        quick = faster(trained, images, rounding=bf16)
        lay_out(trained, layout_of(quick))
    generator = torch.Generator(device).manual_seed(seed)
    size = size_without_single(len(images), batch_size)

    total = epochs * math.ceil(len(images) / size)
    done = begin["fit"]["steps"] if begin else 0

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal done
        for batch, labels in images.batches(size, generator):
            if online is not None:
                batch, labels = online.batch(batch, labels, trained, done / total, generator)
            yield augment(batch, generator) if augment else batch, labels
            done += 1

    def step(batch: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = quick(batch)
        return functional.cross_entropy(out, labels, label_smoothing=smoothing), out

    def told(tell: Callable[[nn.Module, State], str], standing: Standing) -> str:
        state = {"net": trained.state_dict(), "batches": generator.get_state(), "random": random_state()}
        extra = {"fit": standing._asdict(), "online": online.state() if online else None}
        return tell(trained, state | extra)

    with running_on(device), seeded(seed):
        if begin is not None:
            trained.load_state_dict(begin["net"])
            generator.set_state(begin["batches"])
            set_random_state(begin["random"])
        if online is not None:
            online.load(begin["online"]) if begin else online.begin(images)
        ended = fit(
            list(trained.parameters()),
            step,
            batches,
            partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=weight_decay),
            epochs,
            name="train",
            buffers=list(trained.buffers()),
            schedule=partial(OneCycleLR, max_lr=lr, total_steps=total),
            schedule_steps=True,
            project=partial(online.after_update, trained) if online else None,
            after_epoch=partial(told, after_epoch) if after_epoch else None,
            begin=None if begin is None else _standing(begin["fit"]),
        )
    if ended.diverged_at is not None:
        text = f"training diverged: NaN or infinity at step {ended.diverged_at}; give a lower --lr (lr) than {lr:g}"
        raise ModelError(text)
    lay_out(trained, torch.contiguous_format)
    return trained.eval()


def _standing(state: State) -> Standing:
    return Standing(**{**state, "epochs": [Epoch(*epoch) for epoch in state["epochs"]]})


def _as(dtype: torch.dtype, images: Tensor) -> Tensor:
    return images.mul(255).round().to(torch.uint8) if dtype == torch.uint8 else images
