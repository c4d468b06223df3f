"""The parts of SARIF 2.1.0 that untrojan writes, as a JSON schema.

Written after the OASIS standard (section 3, "File format") because no package on PyPI ships the official schema. An
object takes the properties that the standard defines for it and no others.
"""

from typing import Any

LEVEL = {"enum": ["none", "note", "warning", "error"]}
TEXT = {"type": "string"}
INDEX = {"type": "integer", "minimum": -1}
BAG = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True, "items": TEXT}}}
STRINGS = {"type": "object", "additionalProperties": TEXT}


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/definitions/{name}"}


def many(items: dict[str, Any], unique: bool = False) -> dict[str, Any]:
    return {"type": "array", "items": items, "uniqueItems": unique}


def an_object(required: tuple[str, ...] = (), **properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": {**properties, "properties": BAG},
    }


SCHEMA = {
    "$schema": "http://json-schema.org/draft-04/schema#",
    **an_object(
        ("version", "runs"),
        **{"$schema": {"type": "string", "format": "uri"}},
        version={"enum": ["2.1.0"]},
        runs=many(ref("run")),
    ),
    "definitions": {
        "run": an_object(
            ("tool",),
            tool=an_object(("driver",), driver=ref("toolComponent")),
            invocations=many(ref("invocation")),
            artifacts=many(ref("artifact"), unique=True),
            results=many(ref("result")),
        ),
        "toolComponent": an_object(
            ("name",),
            name=TEXT,
            version=TEXT,
            semanticVersion=TEXT,
            informationUri={"type": "string", "format": "uri"},
            rules=many(ref("reportingDescriptor"), unique=True),
        ),
        "reportingDescriptor": an_object(
            ("id",),
            id=TEXT,
            name=TEXT,
            shortDescription=ref("multiformatMessageString"),
            fullDescription=ref("multiformatMessageString"),
            help=ref("multiformatMessageString"),
            defaultConfiguration=an_object(enabled={"type": "boolean"}, level=LEVEL),
        ),
        "multiformatMessageString": an_object(("text",), text=TEXT, markdown=TEXT),
        "message": {
            **an_object(text=TEXT, markdown=TEXT, id=TEXT, arguments=many(TEXT)),
            "anyOf": [{"required": ["text"]}, {"required": ["id"]}],
        },
        "invocation": an_object(
            ("executionSuccessful",),
            executionSuccessful={"type": "boolean"},
            commandLine=TEXT,
            exitCode={"type": "integer"},
            toolExecutionNotifications=many(ref("notification")),
        ),
        "notification": an_object(("message",), message=ref("message"), level=LEVEL),
        "artifact": an_object(
            location=ref("artifactLocation"),
            roles=many({"enum": ["analysisTarget", "resultFile", "modified", "unmodified"]}, unique=True),
            length=INDEX,
            hashes=STRINGS,
        ),
        "artifactLocation": an_object(uri={"type": "string", "format": "uri-reference"}, uriBaseId=TEXT, index=INDEX),
        "result": an_object(
            ("message",),
            ruleId=TEXT,
            ruleIndex=INDEX,
            kind={"enum": ["notApplicable", "pass", "fail", "review", "open", "informational"]},
            level=LEVEL,
            message=ref("message"),
            locations=many(ref("location")),
            partialFingerprints=STRINGS,
        ),
        "location": an_object(physicalLocation=ref("physicalLocation"), message=ref("message")),
        "physicalLocation": {
            **an_object(artifactLocation=ref("artifactLocation")),
            "required": ["artifactLocation"],
        },
    },
}
