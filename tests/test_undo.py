"""A repair can be undone bit for bit, and a change file that was harmed is noticed."""

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import GIVEN, Payload, build, make_clean
from torch import nn

from untrojan.cli import run
from untrojan.defenses.defense import REPAIRED
from untrojan.defenses.fine_tuning import FineTuning
from untrojan.errors import RecordError
from untrojan.sources import load
from untrojan.sources.files import Checkpoint, save_state, state_sha256, unprefixed
from untrojan.sources.undo import restore, save_changes

BITS = st.sampled_from([0x00000000, 0x80000000, 0x7FC00000, 0x7FC00001, 0xFFC12345, 0x7F800001, 0x3F800000])


def floats(bits):
    return torch.tensor(np.array(bits, dtype=np.uint32).view(np.int32)).view(torch.float32)


@pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")
@pytest.mark.usefixtures("no_checks")
@pytest.mark.parametrize("from_file", [False, True])
def test_the_repair_of_a_wrapped_network_is_undone(tmp_path, from_file):
    net, clean = nn.DataParallel(build("batchnorm")), make_clean()
    save_state(tmp_path / "net.safetensors", net.state_dict())
    source = Checkpoint.read(tmp_path / "net.safetensors") if from_file else None
    repair = FineTuning(epochs=2).repair(net, clean, GIVEN, source=source)
    repair.save(tmp_path / "run")
    assert repair.record.values_changed
    again = load(tmp_path / "run" / REPAIRED, nn.DataParallel(build("batchnorm", seed=1)))
    assert state_sha256(again.state_dict()) == state_sha256(repair.model.state_dict())
    assert run(["restore", str(tmp_path / "run"), "--out", str(tmp_path / "original.safetensors")]) == 0
    original = Checkpoint.read(tmp_path / "original.safetensors").tensors
    assert state_sha256(original) == state_sha256(unprefixed(net.state_dict()))


@settings(max_examples=100, deadline=None)
@given(
    before=st.lists(BITS, min_size=40, max_size=40),
    edits=st.dictionaries(st.integers(0, 39), BITS),
    count=st.integers(0, 3),
    half=st.booleans(),
)
def test_restoring_gives_the_parent_bit_for_bit(tmp_path_factory, before, edits, count, half):
    path = tmp_path_factory.mktemp("changes") / "changes.safetensors"
    after = [edits.get(place, bits) for place, bits in enumerate(before)]
    parent = {"w:x": floats(before).reshape(4, 10), "count": torch.tensor(0), "none": torch.zeros(0)}
    child = {"w:x": floats(after).reshape(4, 10), "count": torch.tensor(count), "none": torch.zeros(0)}
    if half:
        parent["w:x"], child["w:x"] = parent["w:x"].view(torch.bfloat16), child["w:x"].view(torch.bfloat16)
    kept = state_sha256(child)
    save_changes(path, parent, child)
    restored = restore(child, path)
    assert state_sha256(restored) == state_sha256(parent)
    assert list(restored) == list(child)
    assert state_sha256(child) == kept
    assert all(restored[name].data_ptr() != child[name].data_ptr() for name in ("w:x", "count"))


def changed(folder, places, numel=100):
    parent = {"w": torch.arange(1.0, numel + 1).reshape(2, -1), "same": torch.ones(3)}
    child = {name: value.clone() for name, value in parent.items()}
    child["w"].view(-1)[:places] = 0
    save_changes(folder / "changes.safetensors", parent, child)
    return parent, child, safetensors.torch.load_file(folder / "changes.safetensors")


def test_few_changes_are_written_as_positions(tmp_path):
    _, _, entries = changed(tmp_path, places=3)
    assert entries["index:w"].equal(torch.tensor([0, 1, 2], dtype=torch.int32))
    assert entries["values:w"].equal(torch.tensor([1.0, 2.0, 3.0]))
    assert len(entries) == 2


def test_many_changes_are_written_whole(tmp_path):
    parent, _, entries = changed(tmp_path, places=60)
    assert list(entries) == ["full:w"]
    assert entries["full:w"].equal(parent["w"])


def test_no_change_writes_no_values(tmp_path):
    parent, child, entries = changed(tmp_path, places=0)
    assert not entries
    assert state_sha256(restore(child, tmp_path / "changes.safetensors")) == state_sha256(parent)


def test_change_file_says_what_it_is(tmp_path):
    parent, child, _ = changed(tmp_path, places=3)
    with safetensors.safe_open(tmp_path / "changes.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "untrojan-changes",
            "version": "1",
            "parent": state_sha256(parent),
            "child": state_sha256(child),
        }


def test_another_model_is_not_restored(tmp_path):
    parent, _, _ = changed(tmp_path, places=3)
    with pytest.raises(RecordError, match="belongs to another model"):
        restore(parent, tmp_path / "changes.safetensors")


@pytest.mark.parametrize(
    "harm",
    [
        lambda entries: entries["values:w"].zero_(),
        lambda entries: entries["index:w"].add_(1),
        lambda entries: entries["index:w"].add_(1000),
        lambda entries: entries.pop("values:w"),
        lambda entries: entries.pop("index:w"),
        lambda entries: entries.update({"values:w": torch.zeros(9)}),
        lambda entries: entries.update({"values:w": torch.zeros(3, dtype=torch.float64)}),
        lambda entries: entries.update({"index:w": torch.tensor([0.0, 1.0, 7.0])}),
        lambda entries: entries.update({"full:w": torch.zeros(1)}),
    ],
)
def test_harmed_change_file_is_noticed(tmp_path, harm):
    parent, child, entries = changed(tmp_path, places=3)
    metadata = {"format": "untrojan-changes", "version": "1"}
    metadata |= {"parent": state_sha256(parent), "child": state_sha256(child)}
    harm(entries)
    save_state(tmp_path / "changes.safetensors", entries, metadata)
    with pytest.raises(RecordError, match="is damaged"):
        restore(child, tmp_path / "changes.safetensors")


def test_cut_missing_and_other_files_are_not_change_files(tmp_path):
    _, child, _ = changed(tmp_path, places=3)
    file = tmp_path / "changes.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(RecordError, match="damaged"):
        restore(child, file)
    with pytest.raises(RecordError, match="No such file"):
        restore(child, tmp_path / "absent")
    save_state(file, child)
    with pytest.raises(RecordError, match="is not a change file"):
        restore(child, file)
    save_state(file, child, {"format": "untrojan-changes", "version": "2"})
    with pytest.raises(RecordError, match="version 2; this untrojan reads version 1"):
        restore(child, file)
    torch.save({"a": Payload("true")}, file)
    with pytest.raises(RecordError, match="damaged"):
        restore(child, file)


def test_changes_need_the_same_names_shapes_and_types(tmp_path):
    parent = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}
    child = {"a": torch.zeros(3), "b": torch.zeros(2).half(), "d": torch.zeros(2)}
    with pytest.raises(RecordError, match="differ in a, b, c, d"):
        save_changes(tmp_path / "changes.safetensors", parent, child)
