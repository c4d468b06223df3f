"""The report: one self-contained HTML page per record, for a person to read and for a machine to take apart.

The page works offline and fetches nothing: a content security policy with the hashes of its own scripts lets
the browser run these and no others. Everything in a record is untrusted text and is escaped.
"""

import base64
import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from untrojan.errors import visible
from untrojan.record import EXPLAINED, CleanInfo, CurvePoint, Diagnosis, ModelInfo, Rate, Record, RunRecord, Trigger

if TYPE_CHECKING:
    from jinja2 import Template

NAMED = 12
_HERE = Path(__file__).parent
_BADGES = {
    "found": ("bad", "✕", "Found"),
    "not_found": ("good", "✓", "Not found"),
    "inconclusive": ("warn", "?", "Inconclusive"),
}
_PICTURES = {
    "patch": "The chessboard shows through where images stay as they are",
    "perturbation": "It is amplified here; gray is no change",
    "warp": "Here it warps a chessboard",
    "recoloring": "Here it recolors ramps from black to each channel and to white",
}


def render(record: RunRecord) -> str:
    """Write the report on one run: what was found, what was changed, what it cost, and how to run it again.

    Args:
        record: What a repair or a scan left behind. Nothing else is read, and the same record gives the same page.

    Returns:
        One HTML page of about 1.5 MB that needs no network.

    Example:
        >>> from pathlib import Path
        >>> record = Record.load("repaired.record.json")  # doctest: +SKIP
        >>> Path("report.html").write_text(render(record), encoding="utf-8")  # doctest: +SKIP
    """
    from bokeh.resources import Resources
    from markupsafe import Markup

    from untrojan.report.plots import COLORS, figures

    plots = figures(record)
    scripts = ["\n".join(Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw)] if plots else []
    scripts.append(_read("page.js"))
    filters = {"label": record.label, "picture": _PICTURES.__getitem__, "where_to": partial(_where_to, record)}
    return template("page.html.jinja", **filters).render(
        record=record,
        scripts=[Markup(script) for script in scripts],
        hashes=[csp_hash(script) for script in scripts],
        plots=plots.keys(),
        plots_json=Markup(inside_script(json.dumps({"colors": COLORS, "figures": plots}))),
        record_json=Markup(inside_script(record.to_json())),
        verdict=_verdict(record),
        badge=_badge(record),
        suspects=record.diagnosis.suspects,
        evidence=evidence(record),
        alarms=_alarms(record),
        chosen=_chosen(record),
        settings=_settings(record),
        explained=EXPLAINED,
    )


def template(name: str, **filters: Callable[..., str]) -> "Template":
    """Open a page template, with filters of its own; text from the record is escaped in it, and made visible."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "sentence": _sentence,
        "percent": _percent,
        "points": _points,
        "interval": _interval,
        "size": _size,
        **filters,
    }
    environment.globals["style"] = Markup(_read("page.css"))
    return environment.get_template(name)


def finding(record: RunRecord) -> str:
    """What the scan found, in a few words."""
    diagnosis = record.diagnosis
    if diagnosis.verdict == "not_found":
        return "No backdoor found"
    suspect = diagnosis.suspect
    if diagnosis.all_to_all:
        found = "Backdoor found" if diagnosis.verdict == "found" else "Inconclusive; a backdoor is suspected"
        return f"{found}, with a target for every class and no single one"
    if diagnosis.verdict == "found":
        labels = diagnosis.found
        named = f": target label{'s' if len(labels) > 1 else ''} {', '.join(map(record.label, labels))}"
        return f"Backdoor found{named if labels else ''}"
    if suspect is None:
        return "The scan for a backdoor was inconclusive"
    if isinstance(record, Record):
        return f"Backdoor suspected in label {record.label(suspect)}"
    return f"Inconclusive; the most suspicious label is {record.label(suspect)}"


def evidence(record: RunRecord) -> str:
    """What the verdict stands on, in a few sentences."""
    diagnosis = record.diagnosis
    if diagnosis.patches:
        texts = [_evidence_of_patches(record)]
    else:
        texts = [_evidence_of_reaches(record)] if diagnosis.reaches else []
        texts.append(_evidence_of_unlearning(record))
    if (right := diagnosis.accuracy) is not None:
        images = f"{right.count} of {right.total} clean images (95% interval {_interval(right)})"
        texts.insert(0, f"The model is right on {images}.")
    return " ".join(texts)


def _evidence_of_reaches(record: RunRecord) -> str:
    first, *others = sorted(record.diagnosis.reaches, key=lambda reach: -reach.far)
    text = (
        f"Triggers reach furthest into label {record.label(first.label)}, {first.far:.2f} times what is too far"
        + (f"; the next label has {others[0].far:.2f}." if others else ".")
        + f" Patches send {_percent(first.mean)} of the other images there on average over sizes up to "
        f"{first.sizes[-1]} pixels and {_percent(first.shares[-1])} with the largest, a faint perturbation "
        f"{_percent(first.faint)}."
    )
    slight = [each for each in record.diagnosis.comparisons if each.kind != "perturbation"]
    if slight:
        best = max(slight, key=lambda each: each.further)
        text += (
            f" Of slight warps and recolorings, a {best.kind} into label {record.label(best.label)} stands out most: "
            f"it sends {_percent(best.share)} of the images there, and at most {_percent(best.elsewhere)} to another "
            "label that was tried."
        )
    shown = [
        f"{each.what.capitalize()} sends {_percent(each.success.value)} of the images that it was tried on to "
        f"{_where_to(record, each)}."
        for each in record.diagnosis.triggers
    ]
    return " ".join([*shown, text] if record.diagnosis.all_to_all else [text, *shown])


def _where_to(record: RunRecord, trigger: Trigger) -> str:
    """Where a trigger sends images, as a person reads it."""
    if trigger.label is None:
        pairs = [(label, target) for label, target in enumerate(trigger.targets) if target != label]
        named = [f"{record.label(label)} to {record.label(target)}" for label, target in pairs[:NAMED]]
        told = ", ".join([*named, *([f"{len(pairs) - NAMED} more"] if len(pairs) > NAMED else [])])
        return f"a label of their own for each class{f' ({told})' if told else ''}"
    return f"label {record.label(trigger.label)}"


def _evidence_of_unlearning(record: RunRecord) -> str:
    diagnosis = record.diagnosis
    if not diagnosis.runs:
        return "There is no evidence in the record."
    traces = [run.trace for run in diagnosis.runs if run.trace]
    if not traces or not diagnosis.targets:
        return "Unlearning left the numbers at once and says nothing."
    suspect, runs = diagnosis.suspect, len(diagnosis.runs)
    ended = f"{_agreement(diagnosis, suspect)} of {runs} unlearning runs ended on"
    if suspect is None:
        ended = f"At most {ended} the same label"
    else:
        share = math.fsum(trace[-1].shares[suspect] for trace in traces) / len(traces)
        ended += f" label {record.label(suspect)}, which holds {_percent(share)} of the predictions there on average"
    reached = sum(run.reached for run in diagnosis.runs)
    return f"{ended}; {reached} of {runs} forgot enough to reach the accuracy floor."


def _alarms(record: RunRecord) -> str:
    calibration = record.diagnosis.calibration
    if calibration is None or not calibration.false_alarms.total:
        return "How often this scan raises a false alarm has not been measured for these settings."
    alarms, high = calibration.false_alarms, calibration.as_high
    return (
        f"With these settings the scan named a label of {alarms.count} of {alarms.total} models without a backdoor "
        f"(95% interval {_interval(alarms)}), which were in view when its limits were set; triggers reached as far as "
        f"here in {high.count or 'none'} of them."
    )


def _evidence_of_patches(record: RunRecord) -> str:
    diagnosis = record.diagnosis
    labels, missed = len(diagnosis.patches), len(diagnosis.patches) - len(diagnosis.targets)
    if missed and not any(patch.too_small for patch in diagnosis.patches):
        return f"For {missed} of {labels} labels no patch was found that sends enough images there."
    if labels <= 2:
        return f"Among the patches of {labels} labels none can stand out."
    first = diagnosis.targets[0]
    size = next(patch.size for patch in diagnosis.patches if patch.label == first.label)
    return (
        f"The patch that sends images to label {record.label(first.label)} replaces {size:.1f} pixels; that is "
        f"{first.score:.1f} robust standard deviations below the median of the labels."
    )


def _verdict(record: RunRecord) -> str:
    if not isinstance(record, Record):
        return f"{finding(record)}."
    repaired = record.status == "repaired"
    found = finding(record) + (". The model " if repaired else "; the ")
    if repaired:
        return found + "was repaired."
    if record.status == "nothing_to_repair" or record.diagnosis.cleared:
        return found + "model is unchanged."
    if record.status == "inconclusive":
        return found + "repair passed its checks."
    if all(check.passed for check in record.checks):
        return found + "model could not be repaired."
    return found + "repair did not pass its checks."


def _badge(record: RunRecord) -> tuple[str, str, str]:
    """Tone, mark and words of the outcome: three ways to see it, so that none relies on color alone."""
    if not isinstance(record, Record):
        return _BADGES[record.diagnosis.verdict]
    if record.status == "failed":
        return "bad", "✕", "Not repaired"
    if record.status == "repaired":
        return "good", "✓", "Repaired"
    if record.status == "inconclusive":
        return _BADGES["inconclusive"]
    if record.diagnosis.verdict == "not_found":
        return "good", "✓", "Nothing to repair"
    return "warn", "?", "Not repaired"


def _agreement(diagnosis: Diagnosis, suspect: int | None) -> int:
    """How many unlearning runs ended on the suspect, or without one on the label most of them ended on."""
    ends = [run.label for run in diagnosis.runs]
    return max(map(ends.count, ends), default=0) if suspect is None else ends.count(suspect)


def _chosen(record: RunRecord) -> CurvePoint | None:
    selection = record.selection if isinstance(record, Record) else None
    return None if selection is None or selection.chosen is None else selection.curve[selection.chosen]


def _settings(record: RunRecord) -> dict[str, dict[str, object]]:
    """The settings tables by title; a value of `None` is a dash on the page."""
    choices = record.choices if isinstance(record, Record) else {}
    return {
        "Method": {"method": record.method.name, **record.method.fields, "seed": record.seed},
        **({"Chosen by the method": {name: _in_words(choice) for name, choice in choices.items()}} if choices else {}),
        "Model": {**model_rows(record.model), **_written(record)},
        "Clean images": {**image_rows(record.clean), "images per class": _spread(record.clean.per_class)},
        **run_tables(record),
    }


def _in_words(choice: JsonValue) -> object:
    if isinstance(choice, dict):
        return "; ".join(f"{name}: {_in_words(each)}" for name, each in choice.items()) or "none"
    if isinstance(choice, list):
        return ", ".join(str(_in_words(each)) for each in choice) or "none"
    return f"{choice:.4g}" if isinstance(choice, float) else choice


def model_rows(model: ModelInfo) -> dict[str, object]:
    """What a settings table says of a model."""
    return {
        "file": model.path,
        "SHA-256 of the file": model.sha256,
        "SHA-256 of the tensors": model.state_sha256,
        "network": model.net,
        "architecture": model.architecture,
        "parameters": f"{model.parameters:,}",
        "classes": model.classes,
    }


def image_rows(images: CleanInfo) -> dict[str, object]:
    """What a settings table says of a set of images."""
    return {
        "source": images.path,
        "SHA-256": images.sha256,
        "images": f"{images.images:,}",
        "shape (channels, height, width)": " x ".join(map(str, images.shape)),
    }


def run_tables(record: RunRecord) -> dict[str, dict[str, object]]:
    """The settings tables on where a run took place and what it took."""
    return {
        "Environment": {**record.environment},
        "Time and memory": {
            **{stage: f"{seconds:,.1f} s" for stage, seconds in record.seconds.items()},
            "peak memory": _size(record.peak_memory_bytes),
        },
    }


def _written(record: RunRecord) -> dict[str, object]:
    if not isinstance(record, Record):
        return {}
    return {
        "file written": record.repaired.path,
        "SHA-256 of the file written": record.repaired.sha256,
        "SHA-256 of the tensors written": record.repaired.state_sha256,
    }


def _spread(counts: list[int]) -> str:
    if not counts:
        return "none"
    low, high = min(counts), max(counts)
    spread = str(low) if low == high else f"{low} to {high}"
    missing = counts.count(0)
    return f"{spread}; {missing} of {len(counts)} classes have none" if missing else spread


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f}%"


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:.1f}".replace("-", "\N{MINUS SIGN}")


def _interval(rate: Rate) -> str:
    return f"{_percent(rate.low)} to {_percent(rate.high)}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def inside_script(text: str) -> str:
    """JSON that cannot end the script element it stands in, whatever its strings hold."""
    return text.replace("<", "\\u003c")


def csp_hash(script: str) -> str:
    """What a content security policy must hold for the browser to run a script of the page."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'"
