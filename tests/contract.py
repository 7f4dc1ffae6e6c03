"""Checks responses and events against an OpenAPI document of the Responses API."""

from functools import cached_property
from pathlib import Path
from typing import Any

import orjson
from jsonschema import Draft202012Validator

Json = dict[str, Any]


class Contract:
    """One OpenAPI file. Validators are made once per schema."""

    def __init__(self, path: Path) -> None:
        self._document: Json = orjson.loads(path.read_bytes())
        self._validators: dict[str, Draft202012Validator] = {}
        answers = self._document["paths"]["/responses"]["post"]["responses"]["200"]["content"]
        self._response: str = answers["application/json"]["schema"]["$ref"]
        self._union: Json = answers["text/event-stream"]["schema"]

    def check_response(self, response: Json) -> None:
        self._check(self._response, response)

    def check_event(self, event: Json) -> None:
        assert event["type"] in self.events, f"{event['type']} is not in the contract"
        self._check(self.events[event["type"]], event)

    @cached_property
    def events(self) -> dict[str, str]:
        """Event type -> reference of its schema."""
        union = self._resolve(self._union["$ref"]) if "$ref" in self._union else self._union
        references = [member["$ref"] for member in union.get("anyOf") or union["oneOf"]]
        kinds = [(self._resolve(reference)["properties"]["type"], reference) for reference in references]
        return {name: reference for kind, reference in kinds for name in kind.get("enum", [kind.get("const")])}

    def _resolve(self, reference: str) -> Json:
        node = self._document
        for key in reference.removeprefix("#/").split("/"):
            node = node[key]
        return node

    def _check(self, reference: str, value: Json) -> None:
        validator = self._validators.get(reference)
        if validator is None:
            schema = {"$ref": reference, "components": self._document["components"]}
            validator = self._validators[reference] = Draft202012Validator(schema)
        errors = [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(value)]
        assert not errors, f"{reference} is broken: {errors[:5]}"
