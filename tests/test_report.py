"""The report: every variant of a record gives a whole, safe, self-contained page that a browser draws."""

import base64
import io
import json
import random
import re
from functools import cache
from html.parser import HTMLParser

import jsonschema
import pytest
from browser import opened
from PIL import Image
from sarif_schema import SCHEMA
from tiny import DEFENSES, GIVEN, QUICK, build, make_clean

from untrojan.defenses.outliers import Outliers
from untrojan.defenses.pruning import Pruning
from untrojan.record import (
    Accuracy,
    Calibration,
    Check,
    CleanInfo,
    Comparison,
    CurvePoint,
    Diagnosis,
    Layer,
    MethodInfo,
    ModelInfo,
    Patch,
    Rate,
    Reach,
    Record,
    ScanRecord,
    Selection,
    Target,
    Trigger,
    UnlearningPoint,
    UnlearningRun,
    Verdict,
)
from untrojan.report import evidence, finding, render
from untrojan.report.sarif import sarif

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SECTIONS = ["verdict", "before-after", "target", "pruning", "masks", "settings", "reproduce", "limits"]
SECTIONS_OF_A_SCAN = ["verdict", "target", "settings", "reproduce", "limits"]
SARIF_SYNTAX = "[safe](https://example.org) {0} \\ \n\u202e"
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&\"' $$x$$ \u202e"


def unlearning_run(seed: int, target: int, classes: int) -> UnlearningRun:
    rng = random.Random(seed)
    trace = []
    for epoch in range(1, 6):
        top = 1 / classes + (0.86 - 0.03 * seed - 1 / classes) * ((epoch - 1) / 4) ** 1.5
        rest = [rng.random() for _ in range(classes)]
        rest[target] = 0.0
        shares = [(1 - top) * share / sum(rest) for share in rest]
        shares[target] = top
        trace.append(UnlearningPoint(epoch=epoch, accuracy=0.93 - 0.19 * (epoch - 1) + 0.02 * seed, shares=shares))
    return UnlearningRun(
        seed=seed,
        view="noise" if seed % 2 else "plain",
        images=400,
        reached=True,
        label=target,
        share=trace[-1].shares[target],
        trace=trace,
    )


def diagnosis(verdict: Verdict, runs: list[UnlearningRun]) -> Diagnosis:
    """As the scan writes it: every class is a target, with its mean share at the ends of the runs."""
    columns = enumerate(zip(*(run.trace[-1].shares for run in runs), strict=True))
    scores = {label: sum(column) / len(runs) for label, column in columns}
    return Diagnosis(
        verdict=verdict,
        rule="found: every run came down to the floor and one class holds 50% of the predictions or more",
        targets=[
            Target(label=label, score=scores[label]) for label in sorted(scores, key=scores.__getitem__, reverse=True)
        ],
        runs=runs,
    )


def curve(layers: list[Layer]) -> list[CurvePoint]:
    points = []
    for number in range(20):
        threshold = number * 0.05
        drop = 0.002 * number + (0.9 * (threshold - 0.55) ** 2 * 4.4 if threshold > 0.55 else 0.0)
        points.append(
            CurvePoint(
                threshold=threshold,
                pruned=sum(value <= threshold for layer in layers for value in layer.values),
                accuracy=0.912 - drop,
                drop=drop,
                drop_low=drop - 0.01 - 0.02 * drop,
                drop_high=drop + 0.014 + 0.05 * drop,
            )
        )
    return points


def layers(names: list[str], widths: list[int]) -> list[Layer]:
    rng = random.Random(7)
    made = []
    for depth, (name, width) in enumerate(zip(names, widths, strict=True)):
        values = [1.0 if rng.random() < 0.4 else max(0.0, 1 - rng.expovariate(9)) for _ in range(width)]
        for unit in rng.sample(range(width), depth * 3):
            values[unit] = rng.random() * 0.4
        made.append(Layer(name=name, values=values, changed=[i for i, value in enumerate(values) if value <= 0.45]))
    return made


def make(classes: int = 10, **changes: object) -> Record:
    """A plausible record of a repaired model; `changes` replace whole parts."""
    names = [*CIFAR, *(f"class number {number}" for number in range(10, classes))]
    masks = layers([f"features.{i}.bn.weight" for i in range(6)], [32, 32, 64, 64, 128, 128])
    model = ModelInfo(
        path="models/vgg-badnets.safetensors",
        sha256="1f" * 32,
        state_sha256="2e" * 32,
        net="untrojan.lab.nets:small_vgg",
        architecture="SmallVGG",
        parameters=287_178,
        classes=classes,
    )
    fields: dict[str, object] = {
        "method": MethodInfo(
            name="rnp",
            fields={"unlearn_lr": 0.01, "floor": 0.2, "recover_epochs": 20, "zero_bias": True},
        ),
        "status": "repaired",
        "reason": "3 of 3 unlearning runs ended on label 8; pruning 48 units keeps accuracy in its budget.",
        "seed": 0,
        "model": model,
        "clean": CleanInfo(
            path="data/clean", sha256="3d" * 32, images=500, shape=(3, 32, 32),
            per_class=[500 // classes] * classes, class_names=names,
        ),
        "diagnosis": diagnosis("found", [unlearning_run(seed, 8, classes) for seed in range(3)]),
        "selection": Selection(
            rule="budget: the largest threshold whose upper bound of the drop is at most 2 points",
            chosen=9,
            curve=curve(masks),
        ),
        "before": Accuracy(accuracy=Rate.of(228, 250)),
        "after": Accuracy(accuracy=Rate.of(224, 250)),
        "checks": [
            Check(name="accuracy within budget", passed=True, detail="drop 1.6 points, budget 2.0"),
            Check(name="target label does not survive unlearning", passed=True, detail="label 8: 83% to 14%"),
            Check(name="same architecture and keys", passed=True, detail="42 tensors"),
        ],
        "units_changed": sum(len(layer.changed) for layer in masks),
        "units_total": 448,
        "values_changed": 1448,
        "layers": masks,
        "repaired": model.model_copy(update={"path": "models/vgg.repaired.safetensors", "sha256": "4c" * 32}),
        "seconds": {"unlearn": 41.25, "recover": 18.5, "select": 9.75},
        "peak_memory_bytes": 911_000_000,
        "environment": {"untrojan": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "threads": "2"},
        "command": "untrojan repair models/vgg-badnets.safetensors --net nets:small_vgg --clean data/clean",
    }  # fmt: skip
    return Record.model_validate(fields | changes)


def clean_model() -> Record:
    return make(
        status="nothing_to_repair",
        reason="The unlearning runs ended on three different labels.",
        diagnosis=diagnosis("not_found", [unlearning_run(seed, label, 10) for seed, label in enumerate((3, 5, 1))]),
        selection=None,
        checks=[],
        layers=[],
        units_changed=0,
        after=Accuracy(accuracy=Rate.of(228, 250)),
        command=None,
    )


def not_held_out() -> Record:
    """One image per class: the method was fitted on the images that measure it."""
    return make(
        before=Accuracy(accuracy=Rate.of(10, 10), held_out=False),
        after=Accuracy(accuracy=Rate.of(9, 10), held_out=False),
    )


def failed() -> Record:
    record = make()
    assert record.selection is not None
    assert record.diagnosis is not None
    return make(
        status="failed",
        reason="no point of the curve stays within the budget",
        selection=record.selection.model_copy(update={"chosen": None}),
        diagnosis=record.diagnosis.model_copy(update={"verdict": "inconclusive"}),
        checks=[Check(name="accuracy within budget", passed=False, detail="drop 9.3 points, budget 2.0")],
        layers=[layer.model_copy(update={"changed": []}) for layer in record.layers],
        units_changed=0,
        after=Accuracy(accuracy=Rate.of(0, 0)),
        warnings=[
            "run 2 did not reach the accuracy floor",
            "the hold-out has fewer than 10 images of 3 classes",
        ],
    )


def deep() -> Record:
    names = [f"encoder.layer{1 + i // 20}.{i // 2}.bn{1 + i % 2}.weight" for i in range(60)]
    return make(classes=200, layers=layers(names, [180] * 60), units_total=60 * 180)


def hostile() -> Record:
    record = make()
    return make(
        reason=HOSTILE,
        command=HOSTILE,
        warnings=[HOSTILE],
        model=record.model.model_copy(update={"path": HOSTILE, "architecture": HOSTILE}),
        clean=record.clean.model_copy(update={"class_names": [HOSTILE] * 10, "path": HOSTILE}),
        method=MethodInfo(name=HOSTILE, fields={HOSTILE: HOSTILE}),
        checks=[Check(name=HOSTILE, passed=True, detail=HOSTILE)],
        layers=[Layer(name=HOSTILE, values=[0.0, 1.0], changed=[0])],
        environment={HOSTILE: HOSTILE},
        seconds={HOSTILE: 1.0},
    )


def patches(sizes: list[float], small: tuple[int, ...] = (), missed: tuple[int, ...] = ()) -> Diagnosis:
    """As the neural-cleanse scanner writes it."""
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 200)).save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    made = [
        Patch(
            label=label,
            size=size,
            success=0.99,
            index=None if label in missed else (size - 40) / 10,
            too_small=label in small,
            picture=picture if label in small else None,
        )
        for label, size in enumerate(sizes)
    ]
    away = {patch.label: -patch.index for patch in made if patch.index is not None}
    return Diagnosis(
        verdict="found" if small else "inconclusive" if missed else "not_found",
        rule="found: an anomaly index below -2",
        targets=[Target(label=label, score=away[label]) for label in sorted(away, key=away.__getitem__, reverse=True)],
        runs=[],
        patches=made,
    )


def reaching(*far: float, known: int = 0, kind: str = "patch") -> Diagnosis:
    """As the triggers scanner writes it."""
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 200)).save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    top = max(range(len(far)), key=far.__getitem__)
    found = far[top] >= 1
    trigger = Trigger(
        label=top, kind=kind, what=f"a {kind} of some kind", success=Rate.of(97, 100), picture=picture, examples=picture
    )
    return Diagnosis(
        verdict="found" if found else "not_found",
        rule="found: triggers reach too far into a label",
        targets=[
            Target(label=label, score=far[label]) for label in sorted(range(len(far)), key=lambda each: -far[each])
        ],
        runs=make(classes=len(far)).diagnosis.runs,
        reaches=[
            Reach(label=label, sizes=[4, 16], shares=[each / 4, each / 2], norm=1.0, faint=each / 8, far=each)
            for label, each in enumerate(far)
        ],
        triggers=[trigger] if found else [],
        calibration=Calibration(score=far[top], as_high=Rate.of(0, known), false_alarms=Rate.of(0, known)),
    )


TWO = reaching(1.5, 0.1, 1.3, *[0.1] * 7)
TWO = TWO.model_copy(update={"triggers": [TWO.triggers[0].model_copy(update={"label": label}) for label in (0, 2)]})
ALL_TO_ALL = reaching(1.5, *[0.1] * 9)
ALL_TO_ALL.triggers[0] = ALL_TO_ALL.triggers[0].model_copy(update={"label": None, "targets": [1, 2, *range(2, 10)]})
COMPARED = reaching(0.2, *[0.1] * 9).model_copy(
    update={
        "comparisons": [
            Comparison(label=0, kind="perturbation", share=1, elsewhere=0),
            Comparison(label=0, kind="warp", share=0.4, elsewhere=0.3),
            Comparison(label=1, kind="warp", share=0.9, elsewhere=0.4),
        ]
    }
)
REACHED = reaching(0.2, 0.1, 0.3, 0.1, 0.2, 0.1, 0.2, 0.1, 1.75, 0.1, known=20)

FOUND = patches([41, 43.5, 39, 38, 42, 40, 44, 37, 3.25, 40], small=(8,))
CLEARED = patches([41, 43.5, 39, 38, 42, 40, 44, 37, 35, 40])


def scanned(evidence: Diagnosis | None = None, **changes: object) -> ScanRecord:
    """A plausible record of a scan."""
    record = make()
    fields = {name: getattr(record, name) for name in ScanRecord.model_fields if name != "kind"}
    fields |= {"diagnosis": evidence or record.diagnosis, "command": "untrojan scan models/vgg-badnets.safetensors"}
    return ScanRecord.model_validate(fields | changes)


def hostile_scan() -> ScanRecord:
    record = hostile()
    bad = [patch.model_copy(update={"picture": HOSTILE}) for patch in FOUND.patches]
    worse = dict.fromkeys(("what", "picture", "examples"), HOSTILE)
    triggers = [REACHED.triggers[0].model_copy(update=worse)]
    return scanned(
        REACHED.model_copy(update={"patches": bad, "triggers": triggers, "rule": HOSTILE}),
        model=record.model,
        clean=record.clean,
        method=record.method,
        command=HOSTILE,
        warnings=[HOSTILE],
    )


VARIANTS = {
    "repaired": make,
    "nothing_to_repair": clean_model,
    "not_held_out": not_held_out,
    "failed": failed,
    "no_images": lambda: make(diagnosis=Diagnosis(verdict="inconclusive", rule="no images", targets=[], runs=[])),
    "classes_43": lambda: make(classes=43),
    "deep": deep,
    "hostile": hostile,
    "patches": lambda: make(diagnosis=FOUND),
    "reached": lambda: make(diagnosis=REACHED),
    "scan": scanned,
    "scan_reached": lambda: scanned(REACHED),
    "scan_faint": lambda: scanned(reaching(*[0.1] * 42, 1.2, kind="perturbation")),
    "scan_unreached": lambda: scanned(reaching(0.2, 0.1, 0.3, 0.1, 0.2, 0.1, 0.2, 0.1, 0.75, 0.1, known=20)),
    "scan_cleared": lambda: scanned(CLEARED),
    "scan_patches": lambda: scanned(FOUND),
    "scan_missed": lambda: scanned(patches([41, 43], missed=(0, 1))),
    "scan_hostile": hostile_scan,
}
CHARTS = {
    "patches": {"patches", "pruning", "masks"},
    "scan": {"shares", "forgetting", "surviving"},
    "scan_cleared": {"patches"},
    "scan_patches": {"patches"},
    "scan_missed": set(),
    "reached": {"reaches", "shares", "forgetting", "surviving", "pruning", "masks"},
    "scan_reached": {"reaches", "shares", "forgetting", "surviving"},
    "scan_faint": {"reaches", "shares", "forgetting", "surviving"},
    "scan_unreached": {"reaches", "shares", "forgetting", "surviving"},
    "scan_hostile": {"reaches", "patches", "forgetting", "surviving"},
    "repaired": {"shares", "forgetting", "surviving", "pruning", "masks"},
    "nothing_to_repair": {"shares", "forgetting", "surviving"},
    "not_held_out": {"shares", "forgetting", "surviving", "pruning", "masks"},
    "failed": {"shares", "forgetting", "surviving", "pruning", "masks"},
    "no_images": {"pruning", "masks"},
    "classes_43": {"shares", "forgetting", "surviving", "pruning", "masks"},
    "deep": {"shares", "forgetting", "surviving", "pruning", "masks"},
    "hostile": {"shares", "forgetting", "surviving", "pruning", "masks"},
}


class Page(HTMLParser):
    """What a browser would see: elements, ids, the text of each script, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.data: dict[str, str] = {}
        self.texts: list[tuple[str, str]] = []
        self._inside = "body"
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.elements.append((tag, found))
        self.ids += [value for value in [found.get("id")] if value]
        self._inside = (found.get("id") or "") if tag == "script" else tag

    def handle_endtag(self, tag):
        self._inside = "body"

    def handle_data(self, data):
        self.data[self._inside] = self.data.get(self._inside, "") + data
        if self._inside not in ("", "style", "record", "plots"):
            self.texts.append((self._inside, data))

    def text(self) -> str:
        return " ".join(" ".join(text for _, text in self.texts).split())


def page_of(record: Record | ScanRecord) -> str:
    """The page of a record, drawn once."""
    return _drawn(type(record), record.to_json())


@cache
def _drawn(kind: type[Record] | type[ScanRecord], text: str) -> str:
    return render(kind.model_validate_json(text))


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: page_of(record()) for name, record in VARIANTS.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_page_holds_every_section_in_order_and_the_charts_it_has_data_for(pages, name):
    page = Page(pages[name])
    wanted = SECTIONS_OF_A_SCAN if name.startswith("scan") else SECTIONS
    assert [found for found in page.ids if found in SECTIONS] == wanted
    assert len(page.ids) == len(set(page.ids))
    charts = json.loads(page.data["plots"])["figures"]
    assert set(charts) == CHARTS[name]
    assert {found for found in page.ids if found.startswith("plot-")} == {f"plot-{chart}" for chart in charts}


@pytest.mark.parametrize("name", VARIANTS)
def test_page_is_small_and_refers_to_nothing_outside(pages, name):
    page = Page(pages[name])
    assert len(pages[name].encode()) < 5_000_000
    for tag, attributes in page.elements:
        assert not {"srcset", "data", "action", "poster"} & set(attributes)
        assert "src" not in attributes or (tag, attributes["src"][:22]) == ("img", "data:image/png;base64,")
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"url\(|@import|https?:", page.data["style"])
    assert "link" not in {tag for tag, _ in page.elements}
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.split(";")[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_embedded_record_reads_back_as_it_was(pages, name):
    record = VARIANTS[name]()
    assert type(record).model_validate_json(Page(pages[name]).data["record"]) == record


def test_same_record_gives_the_same_page(pages):
    assert render(make()) == pages["repaired"]


@pytest.mark.parametrize(
    ("record", "verdict", "badge"),
    [
        (make(), "Backdoor found: target label 8 (ship). The model was repaired.", "✓ Repaired"),
        (clean_model(), "No backdoor found; the model is unchanged.", "✓ Nothing to repair"),
        (
            failed(),
            "Backdoor suspected in label 8 (ship); the repair did not pass its checks.",
            "✕ Not repaired",
        ),
        (
            make(status="failed", checks=[]),
            "Backdoor found: target label 8 (ship); the model could not be repaired.",
            "✕ Not repaired",
        ),
        (
            make(
                status="nothing_to_repair",
                diagnosis=Diagnosis(verdict="inconclusive", rule="none", targets=[], runs=[]),
            ),
            "The scan for a backdoor was inconclusive; the model is unchanged.",
            "? Not repaired",
        ),
        (
            make(status="inconclusive", diagnosis=make().diagnosis.model_copy(update={"verdict": "inconclusive"})),
            "Backdoor suspected in label 8 (ship); the repair passed its checks.",
            "? Inconclusive",
        ),
        (scanned(), "Backdoor found: target label 8 (ship).", "✕ Found"),
        (scanned(FOUND), "Backdoor found: target label 8 (ship).", "✕ Found"),
        (
            scanned(patches([40, 40, 1, 40, 2], small=(2, 4))),
            "Backdoor found: target labels 2 (bird), 4 (deer).",
            "✕ Found",
        ),
        (
            scanned(ALL_TO_ALL.model_copy(update={"verdict": "inconclusive"})),
            "Inconclusive; a backdoor is suspected, with a target for every class and no single one.",
            "? Inconclusive",
        ),
        (scanned(ALL_TO_ALL), "Backdoor found, with a target for every class and no single one.", "✕ Found"),
        (scanned(CLEARED), "No backdoor found.", "✓ Not found"),
        (
            scanned(patches([40, 41, 30], missed=(0,))),
            "Inconclusive; the most suspicious label is 2 (bird).",
            "? Inconclusive",
        ),
        (scanned(patches([40], missed=(0,))), "The scan for a backdoor was inconclusive.", "? Inconclusive"),
    ],
)
def test_verdict_comes_first_in_one_sentence(record, verdict, badge):
    page = Page(page_of(record))
    assert page.data["h1"].strip() == verdict
    assert badge in page.text()


def test_checks_and_numbers_are_written_for_people(pages):
    text = Page(pages["repaired"]).text()
    assert "91.2%" in text
    assert "228 of 250; 95% interval 87.0% to 94.1%" in text
    assert "It fell by 1.6 percentage points." in text
    assert "No point of the curve stays within the budget." in Page(pages["failed"]).text()
    assert "3 of 3 unlearning runs ended on label 8 (ship)" in text
    assert "seed 1, noise: label 8 (ship)" in text
    assert "At most 1 of 3 unlearning runs ended on the same label" in Page(pages["nothing_to_repair"]).text()
    assert "✓ passed accuracy within budget" in text
    assert "untrojan evaluate" in text
    failing = Page(pages["failed"]).text()
    assert "✕ failed accuracy within budget" in failing
    assert "No point of the curve was acceptable" in failing
    assert "run 2 did not reach the accuracy floor" in failing
    assert "not measured" in failing


def test_images_that_the_method_was_fitted_on_are_not_called_held_out(pages):
    page = Page(pages["not_held_out"])
    text = page.text()
    assert not re.search("held.out", text)
    assert "hold-out" not in text
    assert "hold-out" not in page.data["plots"]
    assert "Accuracy is the share of clean images that get their label, of those that the method was fitted on." in text
    assert "accuracy is measured on 10 that the method was fitted on" in text
    assert "On the images that it was fitted on it keeps" in text
    assert "With 10 images, an accuracy of 100.0% is known only to lie between 72.2% and 100.0%." in text
    held = Page(pages["repaired"])
    assert "250 held out to measure accuracy" in held.text()
    assert "With 250 held-out images, an accuracy" in held.text()
    assert "hold-out accuracy" in held.data["plots"]


def test_what_a_method_chose_is_told_in_words(pages):
    choices = {"maps pruned": {"0": [2, 5], "3": []}, "l1 norm of its mask": 37.32714, "layer": "conv", "rows": []}
    text = Page(render(make(choices=choices))).text()
    assert "Chosen by the method maps pruned 0: 2, 5; 3: none l1 norm of its mask 37.33 layer conv rows none" in text
    assert "Chosen by the method" not in Page(pages["repaired"]).text()


def test_a_method_that_did_not_run_changed_nothing(pages):
    text = Page(pages["nothing_to_repair"]).text()
    assert "Nothing: the method did not run, and the model is as it came." in text
    assert "The method changes weights" not in text


def colors(page: Page, chart: str) -> dict[str, str]:
    """The color of each bar of a chart, by its name."""

    def sources(part):
        if isinstance(part, dict):
            if part.get("name") == "ColumnDataSource":
                yield dict(part["attributes"]["data"]["entries"])
            part = list(part.values())
        if isinstance(part, list):
            for each in part:
                yield from sources(each)

    plots = json.loads(page.data["plots"])
    (source,) = sources(plots["figures"][chart])
    return {name: plots["colors"][color] for name, color in zip(source["name"], source["color"], strict=True)}


@pytest.mark.parametrize("chart", ["reaches", "shares"])
@pytest.mark.parametrize(
    ("diagnosis", "bad", "key"),
    [
        (REACHED, {"8 ship"}, "suspected target"),
        (TWO, {"0 airplane", "2 bird"}, "suspected targets"),
        (ALL_TO_ALL, set(), None),
    ],
    ids=["one", "two", "all-to-all"],
)
def test_charts_mark_the_labels_of_the_verdict(diagnosis, bad, key, chart):
    page = Page(page_of(scanned(diagnosis)))
    assert {name for name, color in colors(page, chart).items() if color == "bad"} == bad
    keys = [text for tag, text in page.texts if tag == "body" and text.startswith("suspected")]
    assert keys == [key] * 2 if key else not keys
    assert page.text().count("other labels") >= 1 if key else "other classes" not in page.text()


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ([1, 2, 2], "each class (0 (airplane) to 1 (automobile), 1 (automobile) to 2 (bird))"),
        ([], "each class (95% interval"),
        ([(label + 1) % 43 for label in range(43)], "10 to 11, 11 to 12, 31 more)"),
    ],
    ids=["three", "unknown", "many"],
)
def test_the_page_says_where_a_trigger_sends_each_class(targets, told):
    diagnosis = ALL_TO_ALL.model_copy(deep=True)
    diagnosis.triggers[0] = diagnosis.triggers[0].model_copy(update={"targets": targets})
    record = scanned(diagnosis)
    assert told in Page(page_of(record)).text()
    (trigger,) = json.loads(sarif(record))["runs"][0]["results"][0]["properties"]["triggers"]
    assert (trigger["label"], trigger["targets"]) == (None, list(map(record.label, targets)))


def test_the_chosen_point_is_named_beside_the_chart_where_it_covers_nothing(pages):
    def chart(name):
        return json.loads(Page(pages[name]).data["plots"])["figures"]["pruning"]["doc"]["roots"][0]["attributes"]

    (axis,) = chart("repaired")["above"]
    chosen = make().selection.curve[9].pruned
    assert axis["attributes"]["ticker"]["attributes"]["ticks"] == [chosen]
    assert axis["attributes"]["major_label_overrides"]["entries"] == [[chosen, "chosen"]]
    assert '"Label"' not in json.dumps(chart("repaired"))
    assert "above" not in chart("failed")


@pytest.mark.parametrize("name", [name for name, method in DEFENSES.items() if issubclass(method, Pruning)])
@pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")
@pytest.mark.usefixtures("no_checks")
def test_the_page_says_what_the_scores_of_the_method_are(name):
    method = DEFENSES[name](**QUICK[name])
    page = Page(page_of(method.repair(build("batchnorm"), make_clean(), GIVEN).record))
    (meaning,) = re.findall(r"A score is (.*?)\.", page.text())
    assert ("standard deviations" in meaning) == issubclass(DEFENSES[name], Outliers)
    assert ("given up" in meaning) == (name in ("anp", "rnp"))
    assert "mask value" not in page.data["plots"]


def test_a_method_from_elsewhere_explains_its_scores_itself(pages):
    assert "A score is explained in the description of the method." in Page(pages["hostile"]).text()


def test_command_can_be_copied_or_is_said_to_be_python(pages):
    page = Page(pages["repaired"])
    assert page.data["pre"].strip() == make().command
    assert "copy" in page.ids
    assert "came from Python" in Page(pages["nothing_to_repair"]).text()
    assert "copy" not in Page(pages["nothing_to_repair"]).ids


@pytest.mark.parametrize("name", ["classes_43", "deep"])
def test_bars_show_the_largest_classes_only(pages, name):
    chart = json.dumps(json.loads(Page(pages[name]).data["plots"])["figures"]["shares"])
    assert "8 ship" in chart
    assert chart.count('"PlainText"') == 15


@pytest.mark.parametrize(("name", "like"), [("hostile", "repaired"), ("scan_hostile", "scan_patches")])
def test_hostile_text_stays_text(pages, name, like):
    page = Page(pages[name])
    plain = Page(pages[like])
    assert [tag for tag, _ in page.elements].count("script") == [tag for tag, _ in plain.elements].count("script")
    assert all(
        attributes["src"].startswith("data:image/png;base64,") for tag, attributes in page.elements if tag == "img"
    )
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert "document.title='owned'" in page.text()


def test_text_that_turns_the_reading_direction_is_spelled_out(pages):
    shown = pages["hostile"].split('<script type="application/json" id="record">')[0]
    assert "\u202e" not in shown
    assert "\\u202e" in shown


def test_charts_survive_a_record_without_numbers():
    point = UnlearningPoint(epoch=1, accuracy=0.0, shares=[0.0, 0.0])
    run = UnlearningRun(seed=0, images=0, reached=False, label=1, share=0.0, trace=[point])
    record = make(
        diagnosis=Diagnosis(verdict="inconclusive", rule="none", targets=[], runs=[run]),
        selection=Selection(rule="none", chosen=0, curve=curve([])[:1]),
        layers=[Layer(name="bn", values=[-3.0, 2.0], changed=[])],
        before=Accuracy(accuracy=Rate.of(0, 0)),
        units_total=0,
        units_changed=0,
    )
    assert "Backdoor" not in Page(page_of(record)).data["h1"]


@pytest.mark.parametrize(
    ("diagnosis", "sentence"),
    [
        (
            make().diagnosis,
            "3 of 3 unlearning runs ended on label 8 (ship), which holds 83.0% of the predictions there on average; "
            "3 of 3 forgot enough to reach the accuracy floor.",
        ),
        (
            clean_model().diagnosis,
            "At most 1 of 3 unlearning runs ended on the same label; 3 of 3 forgot enough to reach the accuracy floor.",
        ),
        (
            Diagnosis(verdict="inconclusive", rule="r", targets=[], runs=make().diagnosis.runs),
            "Unlearning left the numbers at once and says nothing.",
        ),
        (Diagnosis(verdict="inconclusive", rule="r", targets=[], runs=[]), "There is no evidence in the record."),
        (
            REACHED,
            "Triggers reach furthest into label 8 (ship), 1.75 times what is too far; the next label has 0.30. Patches "
            "send 65.6% of the other images there on average over sizes up to 16 pixels and 87.5% with the largest, a "
            "faint perturbation 21.9%. A patch of some kind sends 97.0% of the images that it "
            "was tried on to label 8 (ship). 3 of 3 unlearning runs ended on label 8 (ship), which holds",
        ),
        (
            COMPARED,
            "Triggers reach furthest into label 0 (airplane), 0.20 times what is too far; the next label has 0.10. "
            "Patches send 7.5% of the other images there on average over sizes up to 16 pixels and 10.0% with the "
            "largest, a faint perturbation 2.5%. Of slight warps and recolorings, a warp into label 1 "
            "(automobile) stands out most: it sends 90.0% of the images there, and at most 40.0% to another label that "
            "was tried. ",
        ),
        (
            FOUND,
            "The patch that sends images to label 8 (ship) replaces 3.2 pixels; that is 3.7 robust standard deviations "
            "below the median of the labels.",
        ),
        (
            CLEARED,
            "The patch that sends images to label 8 (ship) replaces 35.0 pixels; that is 0.5 robust standard "
            "deviations below the median of the labels.",
        ),
        (
            FOUND.model_copy(update={"verdict": "inconclusive", "accuracy": Rate.of(3, 40)}),
            "The model is right on 3 of 40 clean images (95% interval 2.6% to 19.9%). The patch that sends images to "
            "label 8 (ship) replaces 3.2 pixels; ",
        ),
        (
            REACHED.model_copy(update={"accuracy": Rate.of(40, 40)}),
            "The model is right on 40 of 40 clean images (95% interval 91.2% to 100.0%). Triggers reach furthest",
        ),
        (
            patches([41, 43, 45], missed=(0, 2)),
            "For 2 of 3 labels no patch was found that sends enough images there.",
        ),
        (
            patches([41, 43]).model_copy(update={"verdict": "inconclusive"}),
            "Among the patches of 2 labels none can stand out.",
        ),
    ],
)
def test_evidence_in_words(diagnosis, sentence):
    assert evidence(scanned(diagnosis)).startswith(sentence)


@pytest.mark.parametrize("record", [scanned(REACHED), make(diagnosis=REACHED)], ids=["scan", "repair"])
def test_every_page_tells_the_evidence(record):
    assert evidence(record) in Page(page_of(record)).text()


@pytest.mark.parametrize("name", VARIANTS)
def test_what_has_not_been_measured_is_said(pages, name):
    text = Page(pages[name]).text()
    unknown = "How often this scan raises a false alarm has not been measured for these settings."
    known = name in {"reached", "scan_reached", "scan_unreached", "scan_hostile"}
    assert text.count("False alarms.") == 1
    assert text.count(unknown) == (0 if known else 2 if name.startswith("scan") else 1)


def test_known_clean_models_say_what_a_score_means(pages):
    named = "the scan named a label of 0 of 20 models without a backdoor (95% interval 0.0% to 16.1%)"
    measured = f"{named}, which were in view when its limits were set"
    for name in ("reached", "scan_reached", "scan_unreached"):
        assert f"{measured}; triggers reached as far as here in none of them." in Page(pages[name]).text()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("patch", "The chessboard shows through"),
        ("perturbation", "It is amplified here"),
        ("warp", "Here it warps a chessboard"),
        ("recoloring", "Here it recolors ramps"),
    ],
)
def test_how_a_trigger_is_pictured(kind, text):
    page = Page(page_of(scanned(reaching(*[0.1] * 8, 1.5, 0.1, kind=kind)))).text()
    assert f"A {kind} of some kind. It sends 97.0% of 100 images" in page
    assert text in page


def test_changes_of_the_whole_image_are_in_a_table(pages):
    page = Page(page_of(scanned(COMPARED))).text()
    assert "Slight changes of the whole image in numbers" in page
    assert re.search(r"1 \(automobile\)\s*warp\s*90.0%\s*40.0%", page)
    assert "Slight changes of the whole image" not in Page(pages["scan_reached"]).text()


def test_a_recovered_trigger_is_shown(pages):
    page = Page(pages["scan_reached"])
    assert [dict(each)["alt"] for tag, each in page.elements if tag == "img"] == [
        "recovered trigger",
        "images without and with the trigger",
    ]
    assert "The trigger recovered for label 8 (ship)" in page.text()
    assert "A patch of some kind. It sends 97.0% of 100 images that the search did not see" in page.text()
    assert "amplified" in Page(pages["scan_faint"]).text()
    assert not [tag for tag, _ in Page(pages["scan_unreached"]).elements if tag == "img"]


def test_a_scan_says_nothing_about_a_repair(pages):
    text = Page(pages["scan_patches"]).text()
    assert "repair" not in text.lower()
    assert "file written" not in text
    assert "-3.67" in text
    assert "99.0%" in text
    assert [tag for tag, _ in Page(pages["scan_patches"]).elements].count("img") == 1
    assert "\N{EN DASH}" in Page(pages["scan_missed"]).text()


# SARIF


def log_of(record: ScanRecord) -> dict:
    log = json.loads(sarif(record))
    jsonschema.Draft4Validator(SCHEMA).validate(log)
    return log


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("scan")])
def test_sarif_keeps_to_the_standard(name):
    log = log_of(VARIANTS[name]())
    assert log["version"] == "2.1.0"
    assert len(log["runs"]) == 1


@pytest.mark.parametrize(
    "broken",
    [
        {"version": "2.0"},
        {"runs": [{}]},
        {"runs": [{"tool": {"driver": {"name": "untrojan"}}, "result": []}]},
        {
            "runs": [
                {"tool": {"driver": {"name": "untrojan"}}, "results": [{"level": "fatal", "message": {"text": ""}}]}
            ]
        },
        {"runs": [{"tool": {"driver": {"name": "untrojan"}}, "artifacts": [{"hashes": {"sha-256": None}}]}]},
    ],
)
def test_the_schema_refuses_what_is_no_sarif(broken):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft4Validator(SCHEMA).validate(json.loads(sarif(scanned())) | broken)


def test_a_finding_in_sarif():
    record = scanned(FOUND, warnings=["few images"])
    run = log_of(record)["runs"][0]
    (result,) = run["results"]
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == ["backdoor-found", "backdoor-inconclusive"]
    assert (result["ruleId"], result["ruleIndex"], result["level"]) == ("backdoor-found", 0, "error")
    assert result["message"]["text"] == f"{finding(record)}. {evidence(record)}"
    place = result["locations"][0]["physicalLocation"]["artifactLocation"]
    assert place == {"uri": "models/vgg-badnets.safetensors", "index": 0}
    assert run["artifacts"][0]["location"]["uri"] == place["uri"]
    assert run["artifacts"][0]["hashes"] == {"sha-256": record.model.sha256}
    assert result["properties"]["scores"]["8 (ship)"] == FOUND.targets[0].score
    assert len(result["properties"]["scores"]) == 10
    assert run["invocations"][0]["commandLine"] == record.command
    assert "accuracy" not in run["properties"]
    assert run["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"] == "few images"


def test_a_class_name_is_neither_a_link_nor_a_placeholder_in_sarif():
    names = [SARIF_SYNTAX] * 10
    record = scanned(FOUND, clean=make().clean.model_copy(update={"class_names": names}), warnings=[SARIF_SYNTAX])
    text = sarif(record)
    assert re.fullmatch(r"[ -~\n]*", text)
    run = log_of(record)["runs"][0]
    warning = run["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"]
    assert warning == "\\[safe\\](https://example.org) {{0}} \\\\ \n\\\\u202e"
    for message in (warning, run["results"][0]["message"]["text"]):
        assert r"\[safe\](https://example.org) {{0}} " in message
        assert not re.search(r"(?<!\\)[\[\]]", message)


def test_no_finding_and_an_open_question_in_sarif():
    cleared = log_of(scanned(CLEARED.model_copy(update={"accuracy": Rate.of(39, 40)})))["runs"][0]
    assert (cleared["results"], cleared["properties"]["verdict"]) == ([], "not_found")
    assert cleared["properties"]["accuracy"] == Rate.of(39, 40).model_dump()
    (result,) = log_of(scanned(patches([40, 41, 30], missed=(0,))))["runs"][0]["results"]
    assert (result["ruleId"], result["ruleIndex"], result["level"]) == ("backdoor-inconclusive", 1, "warning")
    assert list(result["properties"]["scores"]) == ["2 (bird)", "1 (automobile)"]


def test_sarif_of_a_scan_in_python_names_no_file():
    model = make().model.model_copy(update={"path": None, "sha256": None})
    run = log_of(scanned(model=model, command=None))["runs"][0]
    assert run["artifacts"] == run["results"][0]["locations"] == []
    assert "commandLine" not in run["invocations"][0]


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("my models/a#1%.pt", "my%20models/a%231%25.pt"),
        ("c:odd.pt", "c%3Aodd.pt"),
        ("/data/a b.pt", "file:///data/a%20b.pt"),
    ],
)
def test_paths_become_uris(path, uri):
    model = make().model.model_copy(update={"path": path})
    assert log_of(scanned(model=model))["runs"][0]["artifacts"][0]["location"]["uri"] == uri


def test_sarif_speaks_about_the_weights_only():
    assert "malicious" not in sarif(scanned())
    assert "file" not in json.dumps(log_of(scanned())["runs"][0]["tool"])


@pytest.mark.parametrize(
    "name", [name if name in ("repaired", "scan") else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_browser_draws_every_chart_without_an_error(pages, name, tmp_path):
    document, console = opened(pages[name], tmp_path)
    harmless = ("setting log level", "ResizeObserver loop completed")
    console = [line for line in console if not any(message in line for message in harmless)]
    assert console == []
    dom = Page(document)
    assert dom.data["title"] == Page(pages[name]).data["title"]
    drawn = [element for element in dom.elements if "bk-Figure" in (element[1].get("class") or "")]
    assert len(drawn) == len(CHARTS[name])
