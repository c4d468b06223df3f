"""Images become pictures of the same pixels."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from untrojan.pictures import png


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_pixels_are_those_of_the_image(channels, kind):
    image = torch.randint(256, (channels, 4, 6), dtype=torch.uint8)
    shown = pixels(png(image if kind == "uint8" else image / 255))
    expected = image.movedim(0, -1) if channels == 3 else image[0]
    assert np.array_equal(shown, expected.numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_opacity_is_the_fourth_channel(channels):
    opacity = torch.tensor([[[0.0, 1.0], [0.2, 0.6]]])
    shown = pixels(png(torch.rand(channels, 2, 2), opacity))
    assert shown.shape == (2, 2, 4)
    assert shown[..., 3].tolist() == [[0, 255], [51, 153]]
