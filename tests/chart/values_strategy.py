"""Hypothesis strategies out of a JSON Schema: for what occurs in the settings of values.schema.json, and no more."""

from typing import Any

import jsonschema
from hypothesis import strategies as st

# Where YAML, Go templates, JSON, the kubelet and shells each see something special.
ODD = (
    "'\"\n\t\r\\ ",
    "$(SFT_MODEL) $$ $ $(NAME $((x)) ${x}",
    "{{ .Values.image }} {{- x -}} {% generation %}{# #}",
    "---\nkind: Secret\n...",
    "- a: &b !!int 3 # *c",
    "多久會收到商品🦙\u2028\u0085\ufeff\x7f\x00",
    "</script>&amp;",
    "1e3",
    "yes",
    "null",
    "~",
    " leading and trailing ",
    "%s %d %!v",
)
Schema = dict[str, Any]


def values_of(schema: Schema | bool) -> st.SearchStrategy[Any]:
    """Return a strategy for what a schema accepts: with `not` and patterns by drawing again."""
    if isinstance(schema, bool):  # anything
        return st.text(max_size=8) | st.integers(-9, 9)
    drawn = _draw(schema)
    if {"not", "pattern"} & schema.keys():
        is_valid = jsonschema.Draft202012Validator(schema).is_valid
        return drawn.filter(is_valid)
    return drawn


def _draw(schema: Schema) -> st.SearchStrategy[Any]:
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return st.one_of([values_of(choice) for choice in schema[union]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return st.one_of([_OF_TYPE[kind](schema) for kind in kinds])


def _strings(schema: Schema) -> st.SearchStrategy[str]:
    texts = st.lists(st.sampled_from(ODD) | st.text(max_size=8), min_size=1, max_size=3).map("".join)
    paths = st.text("abc/*{}run_id[0].-", min_size=1, max_size=12)
    schemes, endings = st.sampled_from(["s3://", "hf://datasets/", "hf://o/", "/", ""]), st.sampled_from(["", ".jsonl"])
    uris = st.builds("{}{}{}".format, schemes, paths, endings)
    least = schema.get("minLength", 0)
    drawn = (texts | uris).filter(lambda text: len(text) >= least)
    return drawn | st.from_regex(schema["pattern"], fullmatch=True) if "pattern" in schema else drawn


def _integers(schema: Schema) -> st.SearchStrategy[int]:
    low, high = schema.get("minimum", -(2**53)), schema.get("maximum", 2**53)
    return st.sampled_from([low, high]) | st.integers(low, high)


def _numbers(schema: Schema) -> st.SearchStrategy[float]:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    floats = st.floats(
        low,
        high,
        exclude_min="exclusiveMinimum" in schema,
        exclude_max="exclusiveMaximum" in schema,
        allow_nan=False,
        allow_infinity=False,
    )
    if "not" in schema:  # whole from 1 on, and floats seldom are
        return floats | st.integers(1, int(high))
    return floats


def _arrays(schema: Schema) -> st.SearchStrategy[list[Any]]:
    return st.lists(values_of(schema["items"]), min_size=schema.get("minItems", 0), max_size=3)


def _objects(schema: Schema) -> st.SearchStrategy[dict[str, Any]]:
    if "properties" not in schema:
        names = st.text(min_size=1, max_size=8) | st.sampled_from(ODD)
        return st.dictionaries(names, values_of(schema["additionalProperties"]), max_size=3)
    required = set(schema.get("required", ()))
    parts = {name: values_of(part) for name, part in schema["properties"].items()}
    return st.fixed_dictionaries(
        {name: part for name, part in parts.items() if name in required},
        optional={name: part for name, part in parts.items() if name not in required},
    )


_OF_TYPE = {
    "string": _strings,
    "integer": _integers,
    "number": _numbers,
    "boolean": lambda schema: st.booleans(),
    "null": lambda schema: st.none(),
    "array": _arrays,
    "object": _objects,
}
