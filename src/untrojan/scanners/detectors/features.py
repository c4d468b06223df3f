"""What goes into the last layer, for all samples of a label at once."""

import tempfile
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from untrojan.errors import ModelError
from untrojan.mask import products
from untrojan.model import tapped
from untrojan.scanners.suspects import Suspects


def score_by_label(
    model: nn.Module, suspects: Suspects, batch_size: int, detail: str, score: Callable[[Tensor], Tensor]
) -> Tensor:
    """Score samples by their features among those of the same label.

    Features are what goes into the last convolution or linear layer. They are held in a temporary file, and in memory
    for one label at a time.

    Args:
        model: The network, in evaluation mode.
        suspects: The samples.
        batch_size: Samples per forward pass.
        detail: What is being done, for progress.
        score: From the features `(n, d)` of the samples of one label to their scores `(n,)`.

    Returns:
        Scores `(N,)`.

    Raises:
        ModelError: The network has no such layer, or a feature is NaN or infinite.
    """
    last = products(model)[-1:]
    if not last:
        raise ModelError(f"{detail} compares what goes into the last linear layer, and the network has none")

    def features(images: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad(), tapped(model, last, "input") as seen:
            model(images)
        if not seen[last[0]]:
            raise ModelError(f"{detail} compares what goes into the last linear layer, and {last[0]} is not used")
        return seen[last[0]][-1].flatten(1).float()

    with tempfile.TemporaryFile() as file:
        width = 0
        for part in suspects.each(features, batch_size, detail):
            if not torch.isfinite(part).all():
                raise ModelError(f"{detail}: the model gives NaN or infinity on the samples")
            width = part.shape[1]
            file.write(part.contiguous().cpu().numpy().data)
        file.flush()
        held = np.memmap(file, np.float32, "r", shape=(len(suspects), width))
        scores = torch.empty(len(suspects))
        for label in suspects.labels.unique():
            rows = (suspects.labels == label).nonzero().flatten()
            scores[rows] = score(torch.as_tensor(held[rows.cpu().numpy()])).float()
    return scores
