"""How a network takes less time: the order of its numbers in memory, their type, and layers made one."""

import contextlib
import copy
from collections import Counter
from functools import cache

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer
from torch.nn.utils.fusion import fuse_conv_bn_eval

from untrojan.data import CleanSet
from untrojan.device import device_of
from untrojan.fit import learnable
from untrojan.model import Normalize, evaluating

_ALIKE = 0.1
_FOLDED_ALIKE = 0.01


def faster(model: nn.Module, clean: CleanSet, rounding: bool = True) -> nn.Module:
    """Give the same network, sharing its weights, for searches and training that bear rounding to eight bits.

    It runs with the channels last, unless there is a GroupNorm, and, where processor or GPU multiplies bfloat16
    natively, in that type, which takes half the time or less; elsewhere the time saved is less
    (`benchmarks/faster.md`). What is measured in the end is measured on the network itself.

    Args:
        model: The network.
        clean: Two of these images show whether it can run so; one that cannot, for instance because it views the
            output of a convolution in another shape, is given back as it is.
        rounding: Whether bfloat16 will do; if not, only the channels come last.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> clean = CleanSet(torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 0, 1]))
        >>> (faster(net, clean)(clean.floats()) - net(clean.floats())).abs().max() < 0.1
        tensor(True)
    """
    device = device_of(model).type
    if isinstance(model, _Faster) or device not in ("cpu", "cuda"):
        return model
    few = clean.take(range(min(2, len(clean)))).floats()
    quick = _Faster(model, rounding and multiplies_bfloat16(device), few)
    with evaluating(model):
        try:
            shown = few.clone().requires_grad_()
            out = quick(shown)
            torch.autograd.grad(out.sum(), shown)
        except RuntimeError:
            return model
        alike = (out.softmax(1) - model(few.clone()).softmax(1)).abs().max() < _ALIKE
    return quick if alike else model


def layout_of(quick: nn.Module) -> torch.memory_format:
    """Tell how the weights of a network best lie in memory, by what :func:`faster` gave for it.

    A copy shows whether it can run and learn so; one that cannot, for instance because it views the weights of a
    convolution in another shape, or that cannot be copied once it has run, keeps them as they are.

    Example:
        >>> clean = CleanSet(torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 0, 1]))
        >>> layout_of(faster(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2)), clean))
        torch.channels_last
    """
    if not isinstance(quick, _Faster):
        return torch.contiguous_format
    try:
        tried = copy.deepcopy(quick.model)
        for parameter in filter(learnable, tried.parameters()):
            parameter.requires_grad_()
        lay_out(tried, quick.layout)
        with evaluating(tried):
            tried(quick.few).sum().backward()
    except RuntimeError:
        return torch.contiguous_format
    return quick.layout


def lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Lay the weights of convolutions out in memory, in place.

    Where a convolution's weights have the channels last its output has, too, however its input lies. On a CPU that
    takes up to a quarter less time.

    Args:
        model: The network; no value of it changes.
        layout: From :func:`layout_of`, or `torch.contiguous_format` to go back.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> lay_out(net, torch.channels_last)
        >>> net[0].weight.stride()
        (18, 1, 6, 2)
    """
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def folded(model: nn.Module, clean: CleanSet) -> nn.Module:
    """Give the network as it is now in evaluation mode, for searches that leave its weights alone.

    It is :func:`faster`, and BatchNorm is part of the convolution before it, which leaves less to compute.

    Args:
        model: The network. While the copy is used it must not change: where nothing can be folded, for instance because
            the forward pass depends on what the images show, the weights are shared.
        clean: Two of these images show whether the copy gives the same logits.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> clean = CleanSet(torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 0, 1]))
        >>> (folded(net, clean)(clean.floats()) - net(clean.floats())).abs().max() < 0.1
        tensor(True)
    """
    network = model.model if isinstance(model, _Faster) else model
    if any(isinstance(each, nn.BatchNorm2d) for each in network.modules()):
        few = clean.take(range(min(2, len(clean)))).floats()
        # A forward pass that cannot be traced says so by whatever error its own code runs into.
        with evaluating(network), torch.no_grad(), contextlib.suppress(Exception):
            fused, wanted = _fused(network), network(few)
            if (fused(few) - wanted).abs().max() <= _FOLDED_ALIKE * wanted.abs().max():
                model = fused
    return faster(model, clean)


class _Tracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalize) or super().is_leaf_module(m, module_qualified_name)


def _fused(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode, with BatchNorm in the convolution before it where nothing else uses that."""
    copied = copy.deepcopy(network).eval().requires_grad_(False)
    traced = GraphModule(copied, _Tracer().trace(copied))
    modules = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes)
    for node in traced.graph.nodes:
        before, norm = next(iter(node.all_input_nodes), node), modules.get(node.target)
        conv = modules.get(before.target)
        alone = len(before.users) == calls[before.target] == 1
        if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.track_running_stats and alone:
            traced.set_submodule(before.target, fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    # Hooks of the network itself, such as normalization, are not traced.
    for hook in copied._forward_pre_hooks.values():
        traced.register_forward_pre_hook(hook)
    for hook in copied._forward_hooks.values():
        traced.register_forward_hook(hook)
    return traced


class _Faster(nn.Module):
    def __init__(self, model: nn.Module, rounding: bool, few: Tensor) -> None:
        super().__init__()
        self.model = model
        self.rounding = rounding
        self.few = few
        # With the channels last torch 2.13 crashes on a CPU where it is asked for a part of the gradients of GroupNorm.
        grouped = any(isinstance(module, nn.GroupNorm) for module in model.modules())
        self.layout = torch.contiguous_format if grouped else torch.channels_last

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.rounding):
            return self.model(images.contiguous(memory_format=self.layout)).float()


@cache
def multiplies_bfloat16(device: str) -> bool:
    """Tell whether a device, "cpu" or "cuda", multiplies bfloat16 natively."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
