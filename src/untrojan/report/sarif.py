"""A scan as SARIF 2.1.0, the format in which code scanning services take findings.

A finding is about the weights: it says nothing about whether the file does harm when it is opened.
"""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from untrojan.errors import visible
from untrojan.record import ScanRecord
from untrojan.report import evidence, finding

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_RULES = {
    "found": ("backdoor-found", "error", "There is evidence of a backdoor in the weights."),
    "inconclusive": (
        "backdoor-inconclusive",
        "warning",
        "It could not be told whether there is a backdoor in the weights.",
    ),
}
_LITERAL = str.maketrans({"\\": "\\\\", "[": "\\[", "]": "\\]", "{": "{{", "}": "}}"})


def sarif(record: ScanRecord) -> str:
    """Write a scan as a SARIF log with one run: one result, or none where no backdoor was found.

    Args:
        record: What the scan left behind. Nothing else is read, and the same record gives the same log.

    Returns:
        Indented JSON in ASCII with a newline at the end.
    """
    log = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [_run(record)]}
    return json.dumps(log, indent=2) + "\n"


def _run(record: ScanRecord) -> dict[str, Any]:
    version = record.environment.get("untrojan", "")
    return {
        "tool": {"driver": {"name": "untrojan", "semanticVersion": version, "rules": _rules()}},
        "invocations": [_invocation(record)],
        "artifacts": _artifacts(record),
        "results": _results(record),
        "properties": {
            "verdict": record.diagnosis.verdict,
            **_measured(record),
            "method": record.method.model_dump(mode="json"),
            "seed": record.seed,
            "stateSha256": record.model.state_sha256,
        },
    }


def _measured(record: ScanRecord) -> dict[str, Any]:
    told = record.diagnosis.model_dump(mode="json", include={"accuracy", "calibration"})
    return {name: value for name, value in told.items() if value is not None}


def _rules() -> list[dict[str, Any]]:
    return [
        {"id": name, "shortDescription": {"text": text}, "defaultConfiguration": {"level": level}}
        for name, level, text in _RULES.values()
    ]


def _invocation(record: ScanRecord) -> dict[str, Any]:
    command = {"commandLine": record.command} if record.command else {}
    return {
        "executionSuccessful": True,
        "toolExecutionNotifications": [
            {"level": "warning", "message": _message(warning)} for warning in record.warnings
        ],
        **command,
    }


def _artifacts(record: ScanRecord) -> list[dict[str, Any]]:
    if record.model.path is None:
        return []
    hashes = {"hashes": {"sha-256": record.model.sha256}} if record.model.sha256 else {}
    return [{"location": {"uri": _uri(record.model.path)}, "roles": ["analysisTarget"], **hashes}]


def _results(record: ScanRecord) -> list[dict[str, Any]]:
    verdict = record.diagnosis.verdict
    if verdict not in _RULES:
        return []
    rule, level, _ = _RULES[verdict]
    return [
        {
            "ruleId": rule,
            "ruleIndex": list(_RULES).index(verdict),
            "level": level,
            "message": _message(f"{finding(record)}. {evidence(record)}"),
            "locations": [
                {"physicalLocation": {"artifactLocation": artifact["location"] | {"index": index}}}
                for index, artifact in enumerate(_artifacts(record))
            ],
            "properties": {
                "rule": record.diagnosis.rule,
                "scores": {record.label(target.label): target.score for target in record.diagnosis.targets},
                "triggers": [
                    {
                        "label": None if each.label is None else record.label(each.label),
                        "targets": list(map(record.label, each.targets)),
                        "trigger": each.what,
                        "success": each.success.value,
                    }
                    for each in record.diagnosis.triggers
                ],
            },
        }
    ]


def _message(text: str) -> dict[str, str]:
    """A message that reads as the text does: `[text](uri)` would be a link in it, and `{0}` a placeholder."""
    return {"text": visible(text).translate(_LITERAL)}


def _uri(path: str) -> str:
    return Path(path).as_uri() if Path(path).is_absolute() else quote(Path(path).as_posix())
