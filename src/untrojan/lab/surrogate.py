"""A clean network of the attacker's own, for attacks that look for images by one."""

from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.lab.victim import train
from untrojan.mask import products
from untrojan.model import require_logits, tapped
from untrojan.randomness import seeded
from untrojan.sources.nets import build


def surrogate(clean: CleanSet, net: str, epochs: int, seed: int) -> nn.Module:
    """Train a network on clean images.

    Args:
        clean: What to train on.
        net: Architecture as for :func:`untrojan.sources.nets.build`, without arguments; it takes `classes` and
            `channels`.
        epochs: Passes over the images, at least 1.
        seed: Decides the initial weights and the order of the images, at least 0.

    Returns:
        The network in evaluation mode; its parameters want no gradients.

    Raises:
        ModelError: The network cannot take the images.

    Example:
        >>> import torch
        >>> clean = CleanSet(torch.rand(8, 1, 8, 8), torch.arange(8) % 2)
        >>> surrogate(clean, "digits-cnn", epochs=1, seed=0)(clean.floats()).shape
        torch.Size([8, 2])
    """
    with seeded(seed):
        untrained = build(f"{net}:classes={clean.num_classes},channels={clean.shape[0]}")
    require_logits(untrained, clean, f"{net}, the attacker's own network: ")
    return train(untrained, clean, epochs, seed).requires_grad_(False)


def features(net: nn.Module, images: Tensor) -> Tensor:
    """Give what goes into the last convolution or linear layer of a network.

    Args:
        net: The network.
        images: Images `(N, C, H, W)`.

    Returns:
        Features `(N, d)`, attached to the graph.

    Example:
        >>> import torch
        >>> features(build("digits-cnn"), torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 64])
    """
    last = products(net)[-1]
    with tapped(net, [last], "input") as seen:
        net(images)
    return seen[last][-1].flatten(1)
