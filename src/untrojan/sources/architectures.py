"""The networks that published backdoored models are, and small ones of every kind.

Each takes images `(N, channels, H, W)` and gives logits `(N, classes)`. Parameters have the names under which such
models are published, so that their checkpoints load.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from untrojan.errors import ConfigError


class SmallVGG(nn.Sequential):
    """Six 3x3 convolutions with BatchNorm and ELU, and one linear layer, for 32x32 images.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.

    Example:
        >>> SmallVGG(classes=43)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 43])
    """

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        layers: list[nn.Module] = []
        before = channels
        for width, dropout in ((32, 0.3), (64, 0.4), (128, 0.4)):
            for planes in (before, width):
                layers += [nn.Conv2d(planes, width, 3, padding=1), nn.BatchNorm2d(width), nn.ELU()]
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
            before = width
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(before * 4 * 4, classes)


class WRN16(nn.Module):
    """Wide residual network of depth 16 and width 1 (Zagoruyko and Komodakis), for images of 8x8 or more.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.

    References:
        Zagoruyko, Komodakis: Wide Residual Networks. arXiv 1605.07146.

    Example:
        >>> WRN16()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = _conv3(channels, 16)
        self.block1 = _WideStage(16, 16, stride=1)
        self.block2 = _WideStage(16, 32, stride=2)
        self.block3 = _WideStage(32, 64, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, channels, H, W)` to logits `(N, classes)`."""
        maps = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(torch.relu(self.bn1(maps)).mean(dim=(2, 3)))


class _WideStage(nn.Module):
    def __init__(self, planes: int, width: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(_WideBlock(planes, width, stride), _WideBlock(width, width, 1))

    def forward(self, maps: Tensor) -> Tensor:
        return self.layer(maps)


class _Preactivated(nn.Module):
    """Two convolutions, each after its normalization, and a way around them, which each network names otherwise."""

    def __init__(self, planes: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv1 = _conv3(planes, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = _conv3(width, width)

    def _added(self, maps: Tensor, shortcut: nn.Module | None) -> Tensor:
        active = torch.relu(self.bn1(maps))
        around = maps if shortcut is None else shortcut(active)
        return around + self.conv2(torch.relu(self.bn2(self.conv1(active))))


class _WideBlock(_Preactivated):
    def __init__(self, planes: int, width: int, stride: int) -> None:
        super().__init__(planes, width, stride)
        self.convShortcut = None if planes == width else nn.Conv2d(planes, width, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        return self._added(maps, self.convShortcut)


class ResNet18(nn.Module):
    """ResNet-18 with the stem for small images: a 3x3 convolution and no pooling.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.
        width: Maps of the first stage, at least 1; each of the other three doubles them.

    References:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. arXiv 1512.03385.

    Example:
        >>> ResNet18()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    depths: tuple[int, ...] = (2, 2, 2, 2)

    def __init__(self, classes: int = 10, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.conv1 = _conv3(channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(_Block, width, self.depths)
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, channels, H, W)` to logits `(N, classes)`."""
        maps = torch.relu(self.bn1(self.conv1(images)))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return self.linear(maps.mean(dim=(2, 3)))


class ResNet34(ResNet18):
    """ResNet-34 with the stem for small images; arguments and parts are those of :class:`ResNet18`.

    Example:
        >>> ResNet34(width=4)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    depths = (3, 4, 6, 3)


class ResNet20(nn.Module):
    """The residual network of depth 20 that was made for CIFAR-10, with shortcuts that have nothing to learn.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.
        width: Maps of the first of three stages, at least 1; each of the other two doubles them.

    References:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. arXiv 1512.03385.

    Example:
        >>> ResNet20()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self, classes: int = 10, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.conv1 = _conv3(channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3 = _stages(_PaddedBlock, width, (3, 3, 3))
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, channels, H, W)` to logits `(N, classes)`."""
        maps = torch.relu(self.bn1(self.conv1(images)))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        return self.linear(maps.mean(dim=(2, 3)))


class PreActResNet18(nn.Module):
    """ResNet-18 with activation before convolution and, as in backdoor benchmarks, no BatchNorm at its end.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.

    References:
        He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks. arXiv 1603.05027.

    Example:
        >>> PreActResNet18()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = _conv3(channels, 64)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(_PreActBlock, 64, (2, 2, 2, 2))
        self.linear = nn.Linear(512, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, channels, H, W)` to logits `(N, classes)`."""
        maps = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))
        return self.linear(maps.mean(dim=(2, 3)))


class _Block(nn.Module):
    def __init__(self, planes: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3(planes, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential() if planes == width else self._shortcut(planes, width, stride)

    def _shortcut(self, planes: int, width: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(planes, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(maps)))))
        return torch.relu(inner + self.shortcut(maps))


class _PaddedBlock(_Block):
    def _shortcut(self, planes: int, width: int, stride: int) -> nn.Module:
        return _Padded(width - planes, stride)


class _Padded(nn.Module):
    """Leaves out pixels, and adds maps of zeros, half of them in front."""

    def __init__(self, added: int, stride: int) -> None:
        super().__init__()
        self.added = added
        self.stride = stride

    def forward(self, maps: Tensor) -> Tensor:
        front = self.added // 2
        fewer = maps[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(fewer, (0, 0, 0, 0, front, self.added - front))


class _PreActBlock(_Preactivated):
    def __init__(self, planes: int, width: int, stride: int) -> None:
        super().__init__(planes, width, stride)
        self.shortcut = None if planes == width else nn.Sequential(nn.Conv2d(planes, width, 1, stride, bias=False))

    def forward(self, maps: Tensor) -> Tensor:
        return self._added(maps, self.shortcut)


class VGG16(nn.Sequential):
    """VGG-16 with BatchNorm and a single linear layer, for images of 32x32 or more.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.

    References:
        Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition.
        arXiv 1409.1556.

    Example:
        >>> VGG16().eval()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    depths: tuple[int, ...] = (2, 2, 3, 3, 3)

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        layers: list[nn.Module] = []
        before = channels
        for width, depth in zip((64, 128, 256, 512, 512), self.depths, strict=True):
            for planes in (before, *[width] * (depth - 1)):
                layers += [nn.Conv2d(planes, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            layers.append(nn.MaxPool2d(2))
            before = width
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(before, classes)


class VGG19(VGG16):
    """VGG-19 with BatchNorm; arguments and parts are those of :class:`VGG16`.

    Example:
        >>> VGG19().eval()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    depths = (2, 2, 4, 4, 4)


class MobileNetV2(nn.Module):
    """MobileNetV2 with strides for images of 32x32: it halves the size three times.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.

    References:
        Sandler et al.: MobileNetV2: Inverted residuals and linear bottlenecks, CVPR 2018, arXiv 1801.04381.

    Example:
        >>> MobileNetV2().eval()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = _conv3(channels, 32)
        self.bn1 = nn.BatchNorm2d(32)
        layers: list[nn.Module] = []
        before = 32
        for expansion, width, depth, stride in _MOBILE:
            for number in range(depth):
                layers.append(_Inverted(before, width, expansion, 1 if number else stride))
                before = width
        self.layers = nn.Sequential(*layers)
        self.conv2 = nn.Conv2d(before, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, channels, H, W)` to logits `(N, classes)`."""
        maps = self.layers(torch.relu(self.bn1(self.conv1(images))))
        return self.linear(torch.relu(self.bn2(self.conv2(maps))).mean(dim=(2, 3)))


_MOBILE = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, width, depth and stride of each stage."""


class _Inverted(nn.Module):
    def __init__(self, planes: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        inside = expansion * planes
        self.conv1 = nn.Conv2d(planes, inside, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv2 = nn.Conv2d(inside, inside, 3, stride, padding=1, groups=inside, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.shortcut = None
        if stride == 1:
            change = [nn.Conv2d(planes, width, 1, bias=False), nn.BatchNorm2d(width)] if planes != width else []
            self.shortcut = nn.Sequential(*change)

    def forward(self, maps: Tensor) -> Tensor:
        inner = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(maps))))))
        out = self.bn3(self.conv3(inner))
        return out if self.shortcut is None else out + self.shortcut(maps)


class SmallViT(nn.Module):
    """A small vision transformer: six blocks of width 128 with four heads, and the mean of all patches at its end.

    Where a patch is counts as much as what it shows from the start, so that few images and plain SGD suffice.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.
        size: Height and width of the images, at least 1; others are refused.
        patch: Height and width of a patch; `size` is a multiple of it.

    Raises:
        ConfigError: The size is no multiple of the patch.

    References:
        Dosovitskiy et al.: An image is worth 16x16 words: Transformers for image recognition at scale, ICLR 2021,
        arXiv 2010.11929.
        Beyer, Zhai, Kolesnikov: Better plain ViT baselines for ImageNet-1k. arXiv 2205.01580.

    Example:
        >>> SmallViT()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self, classes: int = 10, channels: int = 3, size: int = 32, patch: int = 4) -> None:
        if size % patch:
            raise ConfigError(f"expected a size that is a multiple of the patch, got size {size} and patch {patch}")
        super().__init__()
        width, depth = 128, 6
        self.patch_embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(_Transformer(width, heads=4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, channels, size, size)` to logits `(N, classes)`."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(patches + self.pos_embed)).mean(1))


class _Transformer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(tokens)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.proj(seen)
        return tokens + self.mlp(self.norm2(tokens))


class SmallConvNeXt(nn.Module):
    """A small ConvNeXt: three stages of two blocks, 48, 96 and 192 maps wide, without layer scale, for 32x32 images.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.

    References:
        Liu et al.: A ConvNet for the 2020s, CVPR 2022, arXiv 2201.03545.

    Example:
        >>> SmallConvNeXt()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(channels, 48, 2, stride=2), _ChannelNorm(48), _ConvNeXt(48), _ConvNeXt(48)]
        for width in (96, 192):
            stages += [_ChannelNorm(width // 2), nn.Conv2d(width // 2, width, 2, stride=2)]
            stages += [_ConvNeXt(width), _ConvNeXt(width)]
        self.features = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(192)
        self.head = nn.Linear(192, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, channels, H, W)` to logits `(N, classes)`."""
        return self.head(self.norm(self.features(images).mean(dim=(2, 3))))


class _ConvNeXt(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.mlp(self.norm(self.dwconv(maps).movedim(1, 3))).movedim(3, 1)


class _ChannelNorm(nn.LayerNorm):
    """Normalizes maps `(N, C, H, W)` over their channels."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, 3)).movedim(3, 1)


class DigitsCNN(nn.Sequential):
    """Three small convolutions with BatchNorm, for 8x8 images of handwritten digits; trains in seconds.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.

    Example:
        >>> DigitsCNN()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        layers: list[nn.Module] = []
        for planes, width in ((channels, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(planes, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        super().__init__()
        self.features = nn.Sequential(*layers[:6], nn.MaxPool2d(2), *layers[6:])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(64, classes)


def _conv3(planes: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(planes, width, 3, stride, padding=1, bias=False)


def _stages(
    block: Callable[[int, int, int], nn.Module], width: int, depths: tuple[int, ...]
) -> Iterator[nn.Sequential]:
    """Stages of as many blocks; each but the first halves the size and doubles the maps."""
    before, stride = width, 1
    for depth in depths:
        yield nn.Sequential(block(before, width, stride), *(block(width, width, 1) for _ in range(depth - 1)))
        before, width, stride = width, 2 * width, 2
