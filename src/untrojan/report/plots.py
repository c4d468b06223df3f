"""The charts of the report: bokeh documents in JSON, which the page draws in its own colors."""

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

from bokeh.core.properties import value
from bokeh.embed import json_item
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    LinearAxis,
    NoOverlap,
    NumeralTickFormatter,
    PlainText,
    Range1d,
    ResetTool,
    Span,
    WheelZoomTool,
)
from bokeh.models.tickers import AdaptiveTicker
from bokeh.plotting import figure
from bokeh.themes import Theme

from untrojan.errors import visible
from untrojan.record import CurvePoint, Record, RunRecord, UnlearningRun

_VARIABLES = (
    "ink",
    "muted",
    "line",
    "panel",
    "accent",
    "bad",
    "run-0",
    "run-1",
    "run-2",
    "run-3",
    "run-4",
    "run-5",
)
COLORS = {f"#{number:06x}": name for number, name in enumerate(_VARIABLES, start=1)}
"""Stand-in colors: the page replaces each by the CSS variable of this name, once per color scheme."""

_INK, _MUTED, _LINE, _PANEL, _ACCENT, _BAD, *_RUNS = COLORS
_DASHES = ("solid", "dashed", "dotted")
_MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex")
_BARS = 15
_BINS = 20
_FONT = "system-ui, sans-serif"
_THEME = Theme(
    json={
        "attrs": {
            "Plot": {
                "background_fill_color": _PANEL,
                "border_fill_color": _PANEL,
                "outline_line_color": None,
                "toolbar_location": "above",
                "min_border": 4,
                "min_border_right": 14,
                "sizing_mode": "stretch_width",
            },
            "Axis": {
                "axis_line_color": _LINE,
                "major_tick_line_color": _LINE,
                "minor_tick_line_color": None,
                "major_label_text_color": _MUTED,
                "major_label_text_font": _FONT,
                "major_label_text_font_size": "12px",
                "axis_label_text_color": _MUTED,
                "axis_label_text_font": _FONT,
                "axis_label_text_font_size": "12px",
                "axis_label_text_font_style": "normal",
            },
            "Grid": {"grid_line_color": _LINE, "grid_line_alpha": 0.6},
            "Text": {"background_fill_color": _PANEL},
            "Toolbar": {"logo": None, "stylesheets": [".bk-divider { display: none; }"]},
        }
    }
)


def figures(record: RunRecord) -> dict[str, Any]:
    """The charts that this record has data for, by name, in the form that `Bokeh.embed.embed_item` takes."""
    charts: dict[str, figure] = {}
    diagnosis = record.diagnosis
    if diagnosis.reaches:
        charts["reaches"] = _reaches(record)
    if diagnosis.targets:
        charts |= {"patches": _patches(record)} if diagnosis.patches else {"shares": _shares(record)}
    if any(run.trace for run in diagnosis.runs):
        charts["forgetting"] = _traces(diagnosis.runs, "clean accuracy", [_accuracies(run) for run in diagnosis.runs])
        charts["surviving"] = _traces(diagnosis.runs, "share of its top label", [_top(run) for run in diagnosis.runs])
    if isinstance(record, Record) and record.selection is not None and record.selection.curve:
        charts["pruning"] = _pruning(record)
    if isinstance(record, Record) and any(layer.values for layer in record.layers):
        charts["masks"] = _masks(record)
    return {name: _item(name, chart) for name, chart in charts.items()}


def _item(name: str, chart: figure) -> Any:
    """Number the models by chart, where bokeh numbers them by process, so that a record gives one page."""
    numbers: dict[str, str] = {}

    def renumber(part: dict[str, Any]) -> dict[str, Any]:
        for key in ("id", "root_id"):
            if isinstance(part.get(key), str):
                part[key] = numbers.setdefault(part[key], f"{name}-{len(numbers)}")
        return part

    return json.loads(json.dumps(json_item(chart, theme=_THEME)), object_hook=renumber)


def _figure(height: int, x: str, y: str | None, **ranges: Range1d) -> figure:
    chart = figure(height=height, x_axis_label=x, y_axis_label=y, tools=[], **ranges)  # pyright: ignore[reportArgumentType]
    drag = BoxZoomTool()
    chart.add_tools(drag, WheelZoomTool(), ResetTool())
    chart.xaxis.major_label_policy = NoOverlap(min_distance=8)
    chart.toolbar.active_drag = drag
    chart.toolbar.active_scroll = None
    return chart


def _hover(
    chart: figure,
    renderers: list[Any],
    tooltips: list[tuple[str, str]],
    mode: Literal["mouse", "vline"] = "mouse",
) -> None:
    chart.add_tools(HoverTool(renderers=renderers, tooltips=tooltips, mode=mode))


def _name_rows(chart: figure, names: Sequence[str]) -> None:
    """Put untrusted names beside the rows, from the top; as plain text, for TeX makes bokeh fetch MathJax."""
    chart.y_range = Range1d(start=len(names) - 0.5, end=-0.5)
    chart.yaxis.ticker = FixedTicker(ticks=list(range(len(names))))
    chart.yaxis.major_label_overrides = {row: PlainText(text=name) for row, name in enumerate(names)}
    chart.yaxis.major_label_text_color = _INK
    chart.yaxis.major_tick_line_color = None
    chart.ygrid.visible = False


def _class_names(record: RunRecord, labels: Sequence[int]) -> list[str]:
    names = record.class_names
    return [f"{label} {visible(names[label])}" if label < len(names) else str(label) for label in labels]


def _bars(what: str, source: ColumnDataSource, threshold: float, x_range: Range1d) -> tuple[figure, Any]:
    """Draw one bar per row of `name`, `value`, `text` and `color`, with a line at the threshold."""
    names = [str(name) for name in source.data["name"]]
    source.add(list(range(len(names))), "row")
    source.add([max(value, 0) for value in source.data["value"]], "end")
    chart = _figure(84 + 24 * len(names), what, None, x_range=x_range)
    _name_rows(chart, [name if len(name) <= 18 else f"{name[:17]}…" for name in names])
    bars = chart.hbar(y="row", right="value", height=0.7, color="color", source=source)
    chart.text(
        "end", "row", "text", source=source, x_offset=6, text_baseline="middle", text_color=_INK,
        text_font=value(_FONT), text_font_size="12px",
    )  # fmt: skip
    line = Span(location=threshold, dimension="height", line_color=_MUTED, line_dash="dotted", level="underlay")
    chart.add_layout(line)
    return chart, bars


def _patches(record: RunRecord) -> figure:
    compared = {patch: -patch.index for patch in record.diagnosis.patches if patch.index is not None}
    patches = sorted(compared, key=compared.__getitem__, reverse=True)[:_BARS]
    away = [compared[patch] for patch in patches]
    source = ColumnDataSource(
        {
            "name": _class_names(record, [patch.label for patch in patches]),
            "value": away,
            "text": [f"{patch.size:,.1f} pixels" for patch in patches],
            "color": [_BAD if patch.too_small else _ACCENT for patch in patches],
            "success": [f"{100 * patch.success:.1f}%" for patch in patches],
        }
    )
    low, high = min(0.0, *away), max(2.0, *away)
    x_range = Range1d(start=low - 0.05 * (high - low), end=high + 0.42 * (high - low))
    chart, bars = _bars("robust deviations below the median", source, 2.0, x_range)
    tooltips = [
        ("label", "@name"),
        ("below the median", "@value{0.00}"),
        ("replaces", "@text"),
        ("success", "@success"),
    ]
    _hover(chart, [bars], tooltips)
    return chart


def _reaches(record: RunRecord) -> figure:
    reaches = sorted(record.diagnosis.reaches, key=lambda reach: (-reach.far, reach.label))[:_BARS]
    far, suspects = [reach.far for reach in reaches], record.diagnosis.suspects
    source = ColumnDataSource(
        {
            "name": _class_names(record, [reach.label for reach in reaches]),
            "value": far,
            "text": [f"{reach.far:.2f}" for reach in reaches],
            "color": [_BAD if reach.label in suspects else _ACCENT for reach in reaches],
            "patches": [f"{100 * reach.mean:.1f}%" for reach in reaches],
            "faint": [f"{100 * reach.faint:.1f}%" for reach in reaches],
        }
    )
    chart, bars = _bars(
        "reach, in multiples of what is too far", source, 1.0, Range1d(start=0, end=max(1.2, *far) * 1.2)
    )
    _hover(chart, [bars], [("label", "@name"), ("patches", "@patches"), ("perturbation", "@faint")])
    return chart


def _shares(record: RunRecord) -> figure:
    ends = [run.trace[-1].shares for run in record.diagnosis.runs if run.trace]
    mean = {label: math.fsum(column) / len(ends) for label, column in enumerate(zip(*ends, strict=True))}
    scores = mean if record.diagnosis.reaches else mean | {each.label: each.score for each in record.diagnosis.targets}
    shares = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:_BARS]
    labels, suspects = [label for label, _ in shares], record.diagnosis.suspects
    source = ColumnDataSource(
        {
            "name": _class_names(record, labels),
            "value": [share for _, share in shares],
            "text": [f"{100 * share:.1f}%" for _, share in shares],
            "color": [_BAD if label in suspects else _ACCENT for label in labels],
            "runs": [", ".join(f"{100 * run[label]:.1f}%" for run in ends) or "none" for label in labels],
        }
    )
    top = max(share for _, share in shares)
    x_range = Range1d(start=0, end=1.42 * top or 1)
    chart, bars = _bars("mean share of predictions", source, 1 / len(record.diagnosis.targets), x_range)
    chart.xaxis.bounds = (0, 1)
    chart.xaxis.formatter = NumeralTickFormatter(format="0%")
    _hover(chart, [bars], [("label", "@name"), ("mean share", "@text"), ("runs", "@runs")])
    return chart


def _accuracies(run: UnlearningRun) -> list[float]:
    return [point.accuracy for point in run.trace]


def _top(run: UnlearningRun) -> list[float]:
    return [point.shares[run.label] for point in run.trace]


def _traces(runs: list[UnlearningRun], what: str, values: list[list[float]]) -> figure:
    chart = _figure(270, "epoch of unlearning", what, y_range=Range1d(start=0, end=1.03))
    longest = max(values, key=len)
    texts = {
        f"run_{number}": [f"{100 * value:.1f}%" for value in column] + ["ended"] * (len(longest) - len(column))
        for number, column in enumerate(values)
    }
    for number, column in enumerate(values):
        epochs = list(range(1, len(column) + 1))
        color = _RUNS[number % len(_RUNS)]
        chart.line(epochs, column, color=color, line_width=2, line_dash=_DASHES[number % len(_DASHES)])
        chart.scatter(epochs, column, color=color, size=8, marker=_MARKERS[number % len(_MARKERS)])
    source = ColumnDataSource({"epoch": list(range(1, len(longest) + 1)), "value": longest, **texts})
    carrier = chart.line("epoch", "value", source=source, line_alpha=0)
    chart.xaxis.ticker = AdaptiveTicker(min_interval=1, mantissas=[1, 2, 5], num_minor_ticks=0)
    chart.yaxis.formatter = NumeralTickFormatter(format="0%")
    rows = [(f"seed {run.seed}", f"@{text}") for run, text in zip(runs, texts, strict=True)]
    _hover(chart, [carrier], [("epoch", "@epoch"), *rows], mode="vline")
    return chart


def _pruning(record: Record) -> figure:
    assert record.selection is not None
    curve = sorted(record.selection.curve, key=lambda point: point.pruned)
    source = ColumnDataSource(
        {
            "threshold": [point.threshold for point in curve],
            "pruned": [point.pruned for point in curve],
            "accuracy": [point.accuracy for point in curve],
            "drop": [point.drop for point in curve],
            "drop_low": [point.drop_low for point in curve],
            "drop_high": [point.drop_high for point in curve],
            "low": [point.accuracy + point.drop - point.drop_high for point in curve],
            "high": [point.accuracy + point.drop - point.drop_low for point in curve],
        }
    )
    accuracy = "hold-out accuracy" if record.before.held_out else "accuracy"
    chart = _figure(340, "units pruned, lowest scores first", accuracy)
    chart.varea("pruned", "low", "high", source=source, color=_ACCENT, alpha=0.18)
    line = chart.line("pruned", "accuracy", source=source, color=_ACCENT, line_width=2)
    chart.scatter("pruned", "accuracy", source=source, color=_ACCENT, size=6)
    if record.before.accuracy.value is not None:
        before = record.before.accuracy.value
        chart.add_layout(Span(location=before, dimension="width", line_color=_MUTED, line_dash="dashed"))
    if record.selection.chosen is not None:
        _mark_chosen(chart, record.selection.curve[record.selection.chosen])
    chart.yaxis.formatter = NumeralTickFormatter(format="0%")
    tooltips = [
        ("threshold", "@threshold{0.000}"),
        ("units pruned", "@pruned{0,0}"),
        (accuracy, "@accuracy{0.0%}"),
        ("drop", "@drop{0.0%}"),
        ("95% interval of the drop", "@drop_low{0.0%} to @drop_high{0.0%}"),
    ]
    _hover(chart, [line], tooltips, mode="vline")
    return chart


def _mark_chosen(chart: figure, point: CurvePoint) -> None:
    """Circle a point and name it on an axis of its own, above the chart, where nothing can be covered."""
    chart.add_layout(Span(location=point.pruned, dimension="height", line_color=_BAD, line_dash="dotted"))
    chart.scatter([point.pruned], [point.accuracy], color=_PANEL, line_color=_BAD, line_width=3, size=13)
    chart.add_layout(
        LinearAxis(
            ticker=FixedTicker(ticks=[point.pruned]),  # pyright: ignore[reportArgumentType]
            major_label_overrides={point.pruned: "chosen"},
            major_label_text_color=_BAD,
            major_label_text_font_style="bold",
            axis_line_color=None,
            major_tick_line_color=_BAD,
        ),
        "above",
    )


def _masks(record: Record) -> figure:
    layers = [layer for layer in record.layers if layer.values]
    values = [mask for layer in layers for mask in layer.values]
    low, high = min(0.0, *values), max(1.0, *values)
    width = (high - low) / _BINS
    counts: dict[tuple[int, int], list[int]] = {}
    for row, layer in enumerate(layers):
        changed = set(layer.changed)
        for unit, mask in enumerate(layer.values):
            cell = counts.setdefault((row, min(_BINS - 1, int((mask - low) / width))), [0, 0])
            cell[0] += 1
            cell[1] += unit in changed
    most = math.log1p(max(count for count, _ in counts.values()))
    edges = [(low + number * width, low + (number + 1) * width) for _, number in counts]
    source = ColumnDataSource(
        {
            "row": [row for row, _ in counts],
            "center": [(left + right) / 2 for left, right in edges],
            "name": [visible(layers[row].name) for row, _ in counts],
            "range": [f"{left:.2f} to {right:.2f}" for left, right in edges],
            "units": [count for count, _ in counts.values()],
            "changed": [changed for _, changed in counts.values()],
            "color": [_BAD if changed else _ACCENT for _, changed in counts.values()],
            "alpha": [0.25 + 0.75 * math.log1p(count) / most for count, _ in counts.values()],
        }
    )
    row_height = max(14, min(28, 640 // len(layers)))
    chart = _figure(84 + row_height * len(layers), "score", None, x_range=Range1d(start=low, end=high))
    _name_rows(chart, [_end(visible(layer.name), 20) for layer in layers])
    cells = chart.rect(
        "center", "row", 0.94 * width, 0.84, color="color", alpha="alpha", line_color=None, source=source
    )
    if record.selection is not None and record.selection.chosen is not None:
        threshold = record.selection.curve[record.selection.chosen].threshold
        chart.add_layout(Span(location=threshold, dimension="height", line_color=_BAD, line_dash="dotted"))
    tooltips = [
        ("layer", "@name"),
        ("score", "@range"),
        ("units", "@units"),
        ("of them changed", "@changed"),
    ]
    _hover(chart, [cells], tooltips)
    return chart


def _end(name: str, longest: int) -> str:
    """Keep the end of a long name: that is where the names of layers differ."""
    return name if len(name) <= longest else "…" + name[1 - longest :]
