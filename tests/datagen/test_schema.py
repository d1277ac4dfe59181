"""Replies as JSON: what the schema says is checked, what cannot be checked is refused when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.datagen.parse import Reject
from llavakit.datagen.schema import fault, load, read
from llavakit.errors import ConfigError

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "people": {"type": "integer"},
        "place": {"enum": ["in", "out"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
    },
    "required": ["people"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("text", ['{"people": 2}', '```json\n{"people": 2}\n```', 'Here it is:\n```\n{"people": 2}\n```\n'])
def test_json_is_found(text: str) -> None:
    assert read(text, SCHEMA) == {"people": 2}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("two people", "no_json"),
        ('{"people": NaN}', "no_json"),
        ('{"people": 2} {"people": 3}', "no_json"),
        ("[" * 100_000, "no_json"),
        ("[2]", "wrong_json"),
        ("{}", "wrong_json"),
        ('{"people": "2"}', "wrong_json"),
        ('{"people": true}', "wrong_json"),
        ('{"people": 2, "place": "on"}', "wrong_json"),
        ('{"people": 2, "dogs": 1}', "wrong_json"),
        ('{"people": 2, "tags": ["a", 1]}', "wrong_json"),
        ('{"people": 2, "tags": ["a", "b", "c"]}', "wrong_json"),
    ],
)
def test_other_replies_are_rejected(text: str, code: str) -> None:
    found = read(text, SCHEMA)
    assert isinstance(found, Reject)
    assert found.code == code


VALUES = st.recursive(st.none() | st.booleans() | st.integers(), lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=5)


@settings(max_examples=40, deadline=None)
@given(VALUES)
def test_an_empty_schema_takes_anything(value: Any) -> None:
    assert fault(value, {}) is None
    assert read(json.dumps(value), {}) == value


def test_a_schema_that_says_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert load(path) == SCHEMA
    for bad in ({"pattern": "a+"}, {"type": "date"}, {"properties": {"a": {"minimum": 1}}}, {"items": []}, {"required": "a"}, []):
        path.write_text(json.dumps(bad))
        with pytest.raises(ConfigError, match=r"schema\.json"):
            load(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="no JSON"):
        load(path)
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "none.json")
