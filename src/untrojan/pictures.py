"""Images as PNG, for records and pages."""

import base64
import io

import torch
from PIL import Image
from torch import Tensor


def png(image: Tensor, opacity: Tensor | None = None) -> str:
    """Write an image as a PNG in base64.

    Args:
        image: `(C, H, W)`, uint8 or float in [0, 1]; one channel is gray, three are RGB, and of any other number, which
            has no color, the first is shown in gray.
        opacity: `(1, H, W)` in [0, 1]; without it the picture has no transparent parts.

    Example:
        >>> png(torch.zeros(3, 2, 2))[:5]
        'iVBOR'
    """
    planes = image if len(image) == 3 else image[:1]
    if opacity is not None:
        planes = torch.cat([_bytes(planes).expand(3, -1, -1), _bytes(opacity)])
    pixels = _bytes(planes).movedim(0, -1).contiguous().cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _bytes(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.uint8) if image.is_floating_point() else image
