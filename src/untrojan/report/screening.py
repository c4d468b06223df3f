"""The page of a screening: the most suspicious images, for a person to look at.

As the report of a repair, it works offline, fetches nothing, and takes everything in the record for untrusted text. It
has no script.
"""

from torch import Tensor

from untrojan.pictures import png
from untrojan.report import finding, image_rows, model_rows, run_tables, template
from untrojan.scanners.samples import ScreeningRecord

_VERDICTS = {
    "found": ("bad", "✕", "Backdoor found in the model"),
    "not_found": ("good", "✓", "No backdoor found in the model"),
    "inconclusive": ("warn", "?", "The scan of the model was inconclusive"),
}


def render(record: ScreeningRecord, images: Tensor) -> str:
    """Write the page on one screening.

    Args:
        record: What the screening left behind.
        images: The images of `record.top`, in that order: uint8 or float in [0, 1], `(n, C, H, W)`.

    Returns:
        One HTML page that needs no network.
    """
    return template("screening.html.jinja", label=record.label).render(
        record=record,
        badge=_VERDICTS[record.diagnosis.verdict],
        finding=finding(record),
        shown=list(zip(record.top, map(png, images), strict=True)),
        labels=_counts(record),
        settings=_settings(record),
    )


def _counts(record: ScreeningRecord) -> dict[int, int]:
    """How many of the samples on the page have each label, most first."""
    labels = [sample.label for sample in record.top]
    return {label: labels.count(label) for label in sorted(set(labels), key=lambda each: (-labels.count(each), each))}


def _settings(record: ScreeningRecord) -> dict[str, dict[str, object]]:
    return {
        **{f"Detector {each.name}": each.fields for each in (record.method, *record.others)},
        "Model": {**model_rows(record.model), "seed": record.seed},
        "Samples": image_rows(record.suspects),
        "Clean images": image_rows(record.clean),
        **run_tables(record),
    }
