"""Checkpoints are data: what is read, what is refused and why."""

import collections
import contextlib
import copy
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Payload
from torch import nn

from untrojan.errors import ConfigError, ModelError, UnsafeFileError
from untrojan.sources import load
from untrojan.sources.files import Checkpoint, save_state, state_sha256

SHARED = Path(__file__).parents[2] / "shared"


class TinyNet(nn.Module):
    def __init__(self, classes=3, channels=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2, 3)
        self.bn = nn.BatchNorm2d(2)
        self.fc = nn.Linear(2, classes)


class Shadowed:
    def __reduce__(self):
        return collections.OrderedDict, (), {"items": 3, "get": 3}, None, iter([("a", torch.zeros(1))])


def same(a, b):
    return state_sha256(a) == state_sha256(b)


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def safetensors_bytes(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.fixture
def state():
    torch.manual_seed(0)
    return TinyNet().state_dict()


# Reading


@pytest.mark.parametrize("wrap", [(), ("state_dict",), ("net",), ("model",), ("model_state_dict",), ("model", "net")])
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict_is_found_under_its_wrappers(tmp_path, state, wrap, zipped):
    content = state
    for key in reversed(wrap):
        content = {key: content, "epoch": 3, "args": {"lr": 0.1}, "note": "x", "best": [1.0]}
    file = saved(tmp_path / "any.name", content, _use_new_zipfile_serialization=zipped)
    checkpoint = Checkpoint.read(file)
    assert same(checkpoint.tensors, state)
    assert ".".join(wrap) in checkpoint.container


def test_optimizer_state_beside_the_weights_is_ignored(tmp_path, state):
    net = TinyNet()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.fc(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    file = saved(tmp_path / "a.tar", {"state_dict": state, "optimizer": optimizer.state_dict(), "model": "resnet"})
    assert same(Checkpoint.read(file).tensors, state)


def test_kind_follows_from_content_not_from_the_name(tmp_path, state):
    save_state(tmp_path / "a.pth", state)
    saved(tmp_path / "b.safetensors", state)
    saved(tmp_path / "c.bin", state, _use_new_zipfile_serialization=False)
    found = [Checkpoint.read(tmp_path / name) for name in ("a.pth", "b.safetensors", "c.bin")]
    assert [checkpoint.container for checkpoint in found] == [
        "safetensors",
        "torch zip",
        "torch legacy pickle",
    ]
    assert all(same(checkpoint.tensors, state) for checkpoint in found)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_common_prefix_is_removed(tmp_path, state, prefix):
    file = saved(tmp_path / "a.pt", {prefix + name: value for name, value in state.items()})
    assert Checkpoint.read(file).tensors.keys() == state.keys()


def test_a_very_long_prefix_is_removed_too(tmp_path):
    save_state(tmp_path / "a.safetensors", {"module." * 3000 + "a": torch.zeros(1)})
    assert Checkpoint.read(tmp_path / "a.safetensors").tensors.keys() == {"a"}


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: nn.ModuleDict({"_orig_mod": net})])
def test_a_wrapped_network_takes_the_weights_too(tmp_path, state, wrap):
    wrapped = wrap(TinyNet())
    assert Checkpoint.read(saved(tmp_path / "a.pt", state)).into(wrapped) is wrapped
    assert same({name.partition(".")[2]: value for name, value in wrapped.state_dict().items()}, state)
    assert same(Checkpoint.read(saved(tmp_path / "b.pt", wrapped.state_dict())).into(TinyNet()).state_dict(), state)


def test_prefix_of_some_names_stays(tmp_path):
    file = saved(tmp_path / "a.pt", {"module.a": torch.zeros(1), "b": torch.zeros(1)})
    assert Checkpoint.read(file).tensors.keys() == {"module.a", "b"}


def test_parameters_come_as_plain_tensors(tmp_path):
    file = saved(tmp_path / "a.pt", dict(TinyNet().named_parameters()))
    assert not any(tensor.requires_grad for tensor in Checkpoint.read(file).tensors.values())


def test_two_state_dicts_in_a_file_are_not_chosen_between(tmp_path, state):
    file = saved(tmp_path / "a.pt", {"model": state, "net": state})
    with pytest.raises(ModelError, match="2 state dicts, under model and net"):
        Checkpoint.read(file)


def test_file_without_tensors_lists_its_keys(tmp_path):
    file = saved(tmp_path / "a.pt", {"epoch": 3, "encoder": {"w": torch.zeros(1)}})
    with pytest.raises(ModelError, match="no tensors by name; at its top are: epoch, encoder"):
        Checkpoint.read(file)


def test_empty_state_dict_is_named_so(tmp_path):
    with pytest.raises(ModelError, match="at its top are: nothing"):
        Checkpoint.read(saved(tmp_path / "a.pt", {}))


def test_file_with_something_else_than_names(tmp_path):
    with pytest.raises(ModelError, match="holds a list; expected a state dict"):
        Checkpoint.read(saved(tmp_path / "a.pt", [torch.zeros(1)]))


def test_dict_that_contains_itself_is_read(tmp_path, state):
    content = {"a": torch.zeros(1)}
    content["model"] = content
    assert Checkpoint.read(saved(tmp_path / "a.pt", content)).tensors.keys() == {"a"}


def test_dict_with_shadowed_methods_is_read(tmp_path):
    assert Checkpoint.read(saved(tmp_path / "a.pt", Shadowed())).tensors.keys() == {"a"}


def test_hash_is_that_of_the_file(tmp_path, state):
    import hashlib

    file = saved(tmp_path / "a.pt", state)
    assert Checkpoint.read(file).sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


# Hostile pickles


@pytest.mark.parametrize(
    "write",
    [
        lambda content, file: torch.save(content, file),
        lambda content, file: torch.save(content, file, _use_new_zipfile_serialization=False),
        lambda content, file: torch.save(content, file, pickle_protocol=4),
        *[
            lambda content, file, protocol=protocol: Path(file).write_bytes(pickle.dumps(content, protocol))
            for protocol in range(6)
        ],
    ],
)
def test_payload_is_named_and_never_run(tmp_path, write):
    bait = tmp_path / "bait"
    file = tmp_path / "a.pt"
    write({"a": 1, "b": Payload(f"touch {bait}")}, file)
    with pytest.raises(UnsafeFileError, match=rf"asks for ({os.name}|os)\.system\n.*convert") as caught:
        Checkpoint.read(file)
    assert "weights_only=False" in str(caught.value)
    assert not bait.exists()


def test_payload_in_a_pickle_that_breaks_off_is_still_named(tmp_path):
    file = tmp_path / "a.pt"
    file.write_bytes(pickle.dumps(Payload("true"), 2)[:-1] + b"\xff broken")
    with pytest.raises(UnsafeFileError, match="system"):
        Checkpoint.read(file)


def test_names_allowed_elsewhere_in_the_process_stay_refused(tmp_path):
    file = saved(tmp_path / "a.pt", {"a": torch.zeros(1), "b": Payload("true")})
    with torch.serialization.safe_globals([os.system]), pytest.raises(UnsafeFileError, match="system"):
        Checkpoint.read(file)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_pickled_module_is_refused_by_its_class(tmp_path, zipped):
    file = saved(tmp_path / "a.pt", TinyNet(), _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeFileError, match=r"asks for \S*test_files\.TinyNet, .*Conv2d"):
        Checkpoint.read(file)


def test_numpy_values_are_refused_by_name(tmp_path, state):
    file = saved(tmp_path / "a.pt", {"model": state, "acc": np.float64(0.5), "history": np.zeros(2)})
    with pytest.raises(UnsafeFileError, match=r"multiarray\.scalar.*multiarray\._reconstruct"):
        Checkpoint.read(file)


def test_names_from_the_file_cannot_write_to_the_terminal(tmp_path):
    file = tmp_path / "a.pt"
    file.write_bytes(b"\x80\x02cevil\x1b[2J\nname\n.")
    with pytest.raises(UnsafeFileError) as caught:
        Checkpoint.read(file)
    assert "\x1b" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_not_opened(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)), tmp_path / "a.pt")
    with pytest.raises(UnsafeFileError, match="TorchScript archive"):
        Checkpoint.read(tmp_path / "a.pt")


def test_exported_program_is_not_opened(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("archive/archive_format", "pt2")
        archive.writestr("archive/models/model.json", "{}")
    with pytest.raises(ModelError, match=r"torch\.export archive"):
        Checkpoint.read(tmp_path / "a.pt2")


# Damaged and other files


def damaged(tmp_path):
    zipped, legacy, safe = (tmp_path / name for name in ("z", "l", "s"))
    saved(zipped, {"a": torch.zeros(99)})
    saved(legacy, {"a": torch.zeros(99)}, _use_new_zipfile_serialization=False)
    save_state(safe, {"a": torch.zeros(99)})
    npz, squeezed = io.BytesIO(), io.BytesIO()
    np.savez(npz, a=np.zeros(3))
    with zipfile.ZipFile(zipped) as source, zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return {
        "empty": (b"", "the file is empty"),
        "random": (np.random.default_rng(0).bytes(5000), "neither a safetensors file nor a torch file"),
        "text": (b"<html>404</html>", "neither a safetensors file nor a torch file"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "cut zip": (zipped.read_bytes()[:-200], "cut short"),
        "cut legacy": (legacy.read_bytes()[:-50], "damaged"),
        "cut legacy pickle": (legacy.read_bytes()[:100], "damaged"),
        "cut safetensors": (safe.read_bytes()[:-50], "damaged"),
        "cut safetensors header": (safe.read_bytes()[:20], "damaged"),
        "plain pickle": (pickle.dumps({"a": 1}, 2), "damaged or made by something else"),
        "npz": (npz.getvalue(), r"zip archive that torch\.save did not write"),
        "compressed": (squeezed.getvalue(), "entries are compressed"),
        "header too long": (struct.pack("<Q", 2**31) + b"{}", "damaged"),
        "aliased": (safetensors_bytes({"a": one, "b": one}, b"\0\0\0\0"), "damaged"),
        "shape lies": (safetensors_bytes({"a": one | {"shape": [2**40]}}, b"\0\0\0\0"), "damaged"),
        "offsets lie": (safetensors_bytes({"a": one | {"data_offsets": [0, 400]}}, b"\0\0\0\0"), "damaged"),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "random",
        "text",
        "pointer",
        "cut zip",
        "cut legacy",
        "cut legacy pickle",
        "cut safetensors",
        "cut safetensors header",
        "plain pickle",
        "npz",
        "compressed",
        "header too long",
        "aliased",
        "shape lies",
        "offsets lie",
    ],
)
def test_damaged_file_is_one_line_with_path_and_cause(tmp_path, kind):
    data, cause = damaged(tmp_path)[kind]
    file = tmp_path / "bad.pt"
    file.write_bytes(data)
    with pytest.raises(ModelError, match=cause) as caught:
        Checkpoint.read(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_raise_anything_but_ours(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flipped")
    kind = data.draw(st.sampled_from(["zip", "legacy", "safetensors"]))
    file = folder / "a"
    if kind == "safetensors":
        save_state(file, {"a": torch.ones(3)})
    else:
        saved(file, {"a": torch.ones(3)}, _use_new_zipfile_serialization=kind == "zip")
    content = bytearray(file.read_bytes())
    for place, value in data.draw(
        st.dictionaries(st.integers(0, len(content) - 1), st.integers(0, 255), max_size=4)
    ).items():
        content[place] = value
    file.write_bytes(bytes(content))
    with contextlib.suppress(ModelError, UnsafeFileError):
        Checkpoint.read(file)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ModelError, match=r"absent\.pt: No such file"):
        Checkpoint.read(tmp_path / "absent.pt")
    with pytest.raises(ModelError, match="Is a directory"):
        Checkpoint.read(tmp_path)
    with pytest.raises(ModelError, match="null byte"):
        Checkpoint.read("a\0b")


def test_file_without_permission(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ModelError, match=r"a\.pt: Permission denied"):
        Checkpoint.read(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.zeros(3, dtype=torch.complex64), "not dense and real: a "),
    ],
)
def test_odd_tensors_are_refused(tmp_path, make, word):
    file = saved(tmp_path / "a.pt", {"a": make()})
    with pytest.raises(ModelError, match=word):
        Checkpoint.read(file)


def test_tensor_that_claims_more_than_the_file_holds(tmp_path):
    file = saved(tmp_path / "a.pt", {"a": torch.zeros(1).expand(10**12)})
    with pytest.raises(ModelError, match="larger than the file: a"):
        Checkpoint.read(file)


# Into a network


def test_into_fills_the_network_and_turns_training_off(tmp_path, state):
    net = TinyNet().train()
    assert Checkpoint.read(saved(tmp_path / "a.pt", state)).into(net) is net
    assert not net.training
    assert same(net.state_dict(), state)


def test_every_mismatch_is_listed_at_once(tmp_path, state):
    state["extra"] = torch.zeros(1)
    del state["bn.running_var"]
    state["fc.weight"], state["fc.bias"] = torch.zeros(43, 2), torch.zeros(43)
    state["conv.bias"] = torch.zeros(2, dtype=torch.int32)
    state["bn.weight"][0] = torch.nan
    net = TinyNet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        Checkpoint.read(saved(tmp_path / "a.pt", state)).into(net)
    assert str(caught.value).splitlines()[1:] == [
        "  1 missing in the file:",
        "    bn.running_var",
        "  1 unknown to the network:",
        "    extra",
        "  2 of another shape:",
        "    fc.weight: the network has 3x2, the file 43x2",
        "    fc.bias: the network has 3, the file 43",
        "  1 of another type:",
        "    conv.bias: the network has torch.float32, the file torch.int32",
        "  1 with NaN or infinite values:",
        "    bn.weight",
        "hint: the file has 43 classes; the net was built with 3",
    ]
    assert same(net.state_dict(), before)


def test_long_lists_are_cut(tmp_path):
    file = saved(tmp_path / "a.pt", {f"layer{i:02}": torch.zeros(1) for i in range(32)})
    with pytest.raises(ModelError) as caught:
        Checkpoint.read(file).into(TinyNet())
    text = str(caught.value)
    assert "32 unknown to the network" in text
    assert "layer19\n    and 12 more" in text
    assert "layer20" not in text
    assert text.endswith("hint: not one name agrees; the file is of another architecture")


def test_other_channels_are_hinted_at(tmp_path):
    file = saved(tmp_path / "a.pt", TinyNet(channels=3).state_dict())
    with pytest.raises(ModelError, match="hint: the file takes 3 channels; the net was built with 1"):
        Checkpoint.read(file).into(TinyNet())


def test_missing_batch_counter_is_tolerated(tmp_path, state):
    del state["bn.num_batches_tracked"]
    net = Checkpoint.read(saved(tmp_path / "a.pt", state)).into(TinyNet())
    assert net.fc.weight.equal(state["fc.weight"])


def test_a_lazy_network_is_told_what_it_needs(tmp_path, state):
    file = saved(tmp_path / "a.pt", state)
    with pytest.raises(ModelError, match="lazy layers; run it on one batch"):
        Checkpoint.read(file).into(nn.Sequential(nn.Flatten(), nn.LazyLinear(2)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_named(tmp_path, state, value):
    state["fc.bias"][1] = value
    with pytest.raises(ModelError, match=r"1 with NaN or infinite values:\n    fc\.bias"):
        Checkpoint.read(saved(tmp_path / "a.pt", state)).into(TinyNet())


def test_infinity_that_the_network_has_there_too_is_taken(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    net.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    file = saved(tmp_path / "a.pt", net.state_dict())
    assert same(Checkpoint.read(file).into(copy.deepcopy(net)).state_dict(), net.state_dict())
    net.mask.fill_(0)
    with pytest.raises(ModelError, match=r"infinite values:\n    mask"):
        Checkpoint.read(file).into(net)


def test_value_too_large_for_the_network_is_named(tmp_path, state):
    state["fc.bias"] = torch.full((3,), 1e300, dtype=torch.float64)
    with pytest.raises(ModelError, match=r"infinite values:\n    fc\.bias"):
        Checkpoint.read(saved(tmp_path / "a.pt", state)).into(TinyNet())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precision_becomes_the_networks(tmp_path, state, dtype):
    other = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    net = Checkpoint.read(saved(tmp_path / "a.pt", other)).into(TinyNet())
    assert net.fc.weight.dtype == torch.float32
    assert net.fc.weight.equal(other["fc.weight"].float())


# Files that are small and ask for much


def zipped(path, pickled, *copies):
    """A torch file with this pickle, and with more entries that all are the same bytes of it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(1000))
        for name in copies:
            entry = copy.copy(archive.getinfo("archive/data/0"))
            entry.filename = f"archive/data/{name}"
            archive.filelist.append(entry)
    return path


def test_entries_that_share_their_bytes(tmp_path):
    file = zipped(tmp_path / "a.pt", pickle.dumps({}, 2), *range(1, 9))
    with pytest.raises(ModelError, match="its entries claim more than the file holds"):
        Checkpoint.read(file)


@pytest.mark.parametrize("again", [b"h\x01h\x01\x86q\x01", b"h\x012\x86q\x01", b"(h\x01h\x01tq\x01"])
def test_tuples_that_would_take_hours_to_hash(tmp_path, again):
    file = zipped(tmp_path / "a.pt", b"\x80\x02)q\x01" + 60 * again + b"}h\x01K\x01s.")
    with pytest.raises(ModelError, match="holds tuples of more than 100,000 values"):
        Checkpoint.read(file)


def test_bytes_that_double_each_time(tmp_path):
    first = b"\x80\x02c_codecs\nencode\nq\x01h\x01X\x02\0\0\0aaX\x06\0\0\0latin1\x86Rq\x02"
    file = zipped(tmp_path / "a.pt", first + 60 * b"h\x01h\x02X\x09\0\0\0hex_codec\x86Rq\x02" + b"}.")
    with pytest.raises(UnsafeFileError, match=r"asks for _codecs\.encode"):
        Checkpoint.read(file)


def test_tuples_of_any_honest_size_are_fine(tmp_path, state):
    beside = {"sizes": tuple(torch.Size((2, 3)) for _ in range(2000)), "pairs": (((1, 2), 3),) * 500}
    assert same(Checkpoint.read(saved(tmp_path / "a.pt", {"net": state} | beside)).tensors, state)


# Hash and writing


def test_hash_is_that_of_the_weights_whatever_the_container(tmp_path, state):
    save_state(tmp_path / "a.safetensors", state)
    saved(tmp_path / "b.pt", {"net": {f"module.{name}": state[name] for name in reversed(state)}})
    hashes = {state_sha256(Checkpoint.read(tmp_path / name).tensors) for name in ("a.safetensors", "b.pt")}
    assert hashes == {state_sha256(state)}


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.float16)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": -torch.zeros(4)},
        {"a": torch.zeros(4), "b": torch.zeros(0)},
    ],
)
def test_hash_knows_names_types_shapes_and_bits(other):
    assert not same({"a": torch.zeros(4)}, other)


def test_hash_ignores_strides():
    values = torch.arange(6.0).reshape(2, 3)
    assert same({"a": values}, {"a": values.t().contiguous().t()})


def test_saving_clones_shared_and_strided_tensors(tmp_path):
    values = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": values, "tied": values, "t": values.t(), "part": values[0], "none": torch.zeros(0, 3)}
    save_state(tmp_path / "a.safetensors", tensors)
    assert same(Checkpoint.read(tmp_path / "a.safetensors").tensors, tensors)


def test_saving_twice_gives_the_same_bytes(tmp_path, state):
    metadata = {str(i): "é\n" for i in range(9)}
    written = set()
    for _ in range(5):
        save_state(tmp_path / "a.safetensors", state, metadata)
        written.add((tmp_path / "a.safetensors").read_bytes())
    assert len(written) == 1
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == metadata
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_saving_where_nothing_can_be_written(tmp_path, state):
    with pytest.raises(FileNotFoundError):
        save_state(tmp_path / "absent" / "a.safetensors", state)


# Both together


def test_loading_again_normalizes_once(tmp_path):
    net, image = nn.Sequential(nn.Linear(1, 1)), torch.rand(2, 1, 1, 1)
    file = saved(tmp_path / "a.pt", net.state_dict())
    once = load(file, net, (0.5,), (0.25,))(image)
    assert torch.equal(load(file, net, (0.5,), (0.25,))(image), once)
    assert not torch.equal(load(file, net)(image), once)


def test_load_builds_reads_and_normalizes_under_the_same_keys(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    save_state(tmp_path / "a.safetensors", plain.state_dict())
    net = load(tmp_path / "a.safetensors", nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), mean=(0.5,), std=(0.25,))
    images = torch.rand(3, 1, 2, 2)
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert torch.allclose(net(images), plain((images - 0.5) / 0.25))


def test_load_needs_both_mean_and_deviation(tmp_path):
    with pytest.raises(ConfigError, match="both mean and std"):
        load(tmp_path / "a", "digits-cnn", mean=(0.5,))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared checkpoints are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "container", "tensors"),
    [
        ("ibau-cifar10-badnets-t8.pth", "torch zip, under 'net'", 44),
        ("abl-cifar10-grid-t0.tar", "torch legacy pickle, under 'state_dict'", 82),
    ],
)
def test_published_checkpoint_is_read(name, container, tensors):
    checkpoint = Checkpoint.read(SHARED / "checkpoints" / name)
    assert (checkpoint.container, len(checkpoint.tensors)) == (container, tensors)
