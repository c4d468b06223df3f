import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from untrojan.errors import RecordError
from untrojan.record import (
    SCHEMA_VERSION,
    Accuracy,
    CleanInfo,
    Diagnosis,
    MethodInfo,
    ModelInfo,
    Rate,
    Record,
    ScanRecord,
)

MODEL = ModelInfo(state_sha256="a" * 64, architecture="Net", parameters=10, classes=2)
ACCURACY = Accuracy(accuracy=Rate.of(1, 2))
RECORD = Record(
    status="failed",
    reason="nothing was tried",
    method=MethodInfo(name="rnp", fields={"budget": 0.02, "select": "budget"}),
    seed=0,
    model=MODEL,
    clean=CleanInfo(sha256="b" * 64, images=2, shape=(1, 2, 2), per_class=[1, 1]),
    diagnosis=Diagnosis(verdict="inconclusive", rule="none", targets=[], runs=[]),
    selection=None,
    before=ACCURACY,
    after=ACCURACY,
    checks=[],
    units_changed=0,
    units_total=0,
    values_changed=0,
    layers=[],
    repaired=MODEL,
    seconds={"unlearn": 0.1 + 0.2},
    peak_memory_bytes=1,
    environment={},
)


SCAN = ScanRecord(**{name: getattr(RECORD, name) for name in ScanRecord.model_fields if name != "kind"})


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (1, 10, 0.0179, 0.4042),
        (9, 10, 0.5958, 0.9821),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_rates_of_newcombe_and_others(count, total, low, high):
    rate = Rate.of(count, total)
    assert rate.value == count / total
    assert (rate.low, rate.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


@given(st.integers(1, 10**7).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_interval_holds_the_rate(counts):
    rate = Rate.of(*counts)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.low < rate.high
    mirrored = Rate.of(counts[1] - counts[0], counts[1])
    assert mirrored.low == pytest.approx(1 - rate.high, abs=1e-12)


def test_sure_rates_end_at_the_end():
    assert Rate.of(10, 10).high == 1
    assert Rate.of(0, 10).low == 0


def test_rate_of_nothing():
    assert Rate.of(0, 0) == Rate(count=0, total=0, value=None, low=None, high=None)


def test_round_trip(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(RECORD.to_json())
    assert Record.load(path) == Record.load(str(path)) == RECORD
    assert RECORD.to_json().endswith("}\n")
    assert json.loads(RECORD.to_json())["seconds"]["unlearn"] == 0.1 + 0.2


def test_kinds_of_records_are_told_apart(tmp_path):
    repair, scan = tmp_path / "repair.json", tmp_path / "scan.json"
    repair.write_text(RECORD.to_json())
    scan.write_text(SCAN.to_json())
    assert ScanRecord.load(scan) == SCAN
    assert [json.loads(path.read_text())["kind"] for path in (repair, scan)] == ["repair", "scan"]
    with pytest.raises(RecordError, match=r"scan\.json is not a record of schema 1: kind: Input should be 'repair'"):
        Record.load(scan)
    with pytest.raises(RecordError, match=r"repair\.json is not a record of schema 1: kind: Input should be 'scan'"):
        ScanRecord.load(repair)


def test_records_from_before_patches_read_as_ever(tmp_path):
    old = json.loads(RECORD.to_json())
    del old["diagnosis"]["patches"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert Record.load(tmp_path / "old.json") == RECORD


@pytest.mark.parametrize(
    ("names", "label", "text"),
    [
        (None, 1, "1"),
        (["a", "b"], 1, "1 (b)"),
        (["a"], 1, "1"),
        (["a"], -1, "-1"),
        (["a", "b\nNo backdoor"], 1, r"1 ('b\nNo backdoor')"),
    ],
)
def test_a_label_for_people(names, label, text):
    clean = RECORD.clean.model_copy(update={"class_names": names})
    assert SCAN.model_copy(update={"clean": clean}).label(label) == text


def test_json_is_printable_whatever_a_name_holds():
    names = ["caf\xe9", "\x9b2J\x7f\u202e", "\U0001f600"]
    record = SCAN.model_copy(update={"clean": RECORD.clean.model_copy(update={"class_names": names})})
    text = record.to_json()
    assert (text.isascii(), text.replace("\n", "").isprintable()) == (True, True)
    assert ScanRecord.model_validate_json(text) == record
    assert json.loads(text)["clean"]["class_names"] == names


def changed(**fields):
    return json.dumps(json.loads(RECORD.to_json()) | fields)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not a record of schema 1: the file: Invalid JSON"),
        ("no json", "is not a record of schema 1: the file: Invalid JSON"),
        ("[]", "is not a record of schema 1: the file: Input should be an object"),
        ("{}", "is not a record of schema 1: method: Field required"),
        (changed(color="red"), "is not a record of schema 1: color: Extra inputs are not permitted"),
        (changed(status="fine"), "is not a record of schema 1: status: Input should be 'repaired'"),
        (changed(schema_version="two"), "is not a record of schema 1: schema_version: Input should be a valid integer"),
        (changed(before={"accuracy": {}}), r"before\.accuracy\.count: Field required"),
        (
            changed(schema_version=SCHEMA_VERSION + 1),
            "was written by a newer untrojan: expected schema 1 or older, got 2; update untrojan to read it",
        ),
        (changed(schema_version=99, color="red"), "by a newer untrojan: expected schema 1 or older, got 99"),
        ("\xff", "is not a record of schema 1: the file: Invalid JSON"),
    ],
)
def test_files_that_are_no_record(tmp_path, text, problem):
    path = tmp_path / "record.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecordError, match=problem) as caught:
        Record.load(path)
    assert str(caught.value).startswith(str(path))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecordError, match=r"cannot read record .*none\.json: No such file"):
        Record.load(tmp_path / "none.json")
    with pytest.raises(RecordError, match=r"cannot read record .*: Is a directory"):
        Record.load(tmp_path)
