"""What is wrong with the environment, in words: a line for each SFT_* variable that can't be used.

pydantic says what it found; here it becomes `SFT_LORA__R=0: must be at least 1`, unknown names are compared with the
known ones, and values that may be secret stay out.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel, ValidationError

PREFIX = "SFT_"
DELIMITER = "__"

Groups = Mapping[str, type[BaseModel] | None]  # the groups of settings by name; None: a setting that stands alone


def known_names(groups: Groups) -> list[str]:
    """Return the variables of all groups and fields, `SFT_LORA`, `SFT_LORA__R` ..."""
    names = []
    for group, group_class in groups.items():
        names.append(_variable(group))
        names += [_variable(group, field) for field in group_class.model_fields] if group_class else []
    return names


def setting_names(groups: Groups) -> list[str]:
    """Return the variables of single settings, without those of whole groups."""
    of_groups = {_variable(name) for name, group_class in groups.items() if group_class}
    return [name for name in known_names(groups) if name not in of_groups]


def _variable(*parts: str) -> str:
    return PREFIX + DELIMITER.join(parts).upper()


def _nearest(name: str, groups: Groups) -> str:
    """Return ", did you mean ...?" for a misspelt variable, or nothing; a forgotten group counts as a misspelling."""
    known = known_names(groups)
    by_field = {other.split(DELIMITER)[-1]: other for other in reversed(known) if DELIMITER in other}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    last = name.removeprefix(PREFIX).split(DELIMITER)[-1]
    near_field = [by_field[field] for field in difflib.get_close_matches(last, by_field, n=1, cutoff=0.7)]
    candidates = near_field + near if DELIMITER not in name else near + near_field
    return f", did you mean {candidates[0]}?" if candidates else ""


def unknown_names(environment: Mapping[str, str], groups: Groups) -> list[str]:
    """Return a line for each SFT_ variable that nothing reads, with the nearest known one."""
    # Values are not shown: a misspelt name may well be a misplaced secret.
    known = set(known_names(groups))
    names = sorted(name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known)
    return [f"{name}: unknown setting{_nearest(name.upper(), groups)}" for name in names]


def broken_groups(environment: Mapping[str, str], groups: Groups) -> dict[str, str]:
    """Return the variables of whole groups that don't hold a JSON object, and why not."""
    variables = {_variable(group) for group, group_class in groups.items() if group_class}
    broken: dict[str, str] = {}
    for name, value in environment.items():
        if name.upper() not in variables or not value:
            continue
        try:
            tree = json.loads(value)
        except json.JSONDecodeError as error:
            broken[name] = f"must be one JSON object: {error.msg} at column {error.colno}"
            continue
        if not isinstance(tree, dict):
            broken[name] = f'must be one JSON object, such as {{"field": value}}, not {type(tree).__name__}'
    return broken


def describe(error: ValidationError, environment: Mapping[str, str], groups: Groups) -> list[str]:
    """Turn pydantic's errors into lines `SFT_LORA__R=0: must be at least 1`, one for each variable."""
    reasons: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        location = [str(part) for part in problem["loc"]]
        name = _variable(*location[:2])
        kind = problem["type"]
        if kind == "missing":  # a field, or a group of which nothing is set
            group = cast(type[BaseModel], groups[location[0]])  # what stands alone has a default
            fields = location[1:] or [field for field, info in group.model_fields.items() if info.is_required()]
            for field in fields:
                reasons[_variable(location[0], field)] = [f"must be set ({group.model_fields[field].description})"]
        elif kind == "extra_forbidden":
            if not _is_set(name, environment) and not _is_set_below(name, environment):  # else `unknown_names` said so
                reasons[name] = [f"unknown setting{_nearest(name, groups)}"]
        elif not (isinstance(problem["input"], dict) and _is_set_below(name, environment)):  # SFT_LORA__R__X: likewise
            shown = _show(problem["input"], problem["msg"])
            reasons.setdefault(name + shown, []).append(_reason(kind, problem["msg"], problem.get("ctx", {})))
    return [f"{name}: {_join_reasons(why)}" for name, why in reasons.items()]


def _is_set(name: str, environment: Mapping[str, str]) -> bool:
    return any(other.upper() == name for other in environment)


def _is_set_below(name: str, environment: Mapping[str, str]) -> bool:
    return any(other.upper().startswith(name + DELIMITER) for other in environment)


def _show(value: object, message: str) -> str:
    """Return "=value", without what may be secret: a query string is where presigned URLs have their signature."""
    if "credentials" in message or isinstance(value, dict):
        return ""
    text = str(value)
    return f"={text.split('?', 1)[0]}?..." if "://" in text and "?" in text else f"={text}"


def _join_reasons(reasons: list[str]) -> str:
    """Join what the members of a union ask for: `must be at least 1 or auto`."""
    first, *others = sorted(reasons)
    return " or ".join([first, *(other.removeprefix("must be ") for other in others)])


def _format_number(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


def _reason(kind: str, message: str, context: Mapping[str, Any]) -> str:
    """Say what a value must be, in words that fit behind the variable's name."""
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("more than", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("less than", "lt"),
    }
    if kind in bounds:
        words, key = bounds[kind]
        return f"must be {words} {_format_number(context[key])}"
    if kind == "literal_error":
        return f"must be {context['expected']}".replace("'", "")
    if kind in ("int_parsing", "int_type", "int_from_float"):
        return "must be a whole number"
    if kind in ("float_parsing", "float_type", "finite_number"):
        return "must be a number"
    if kind in ("bool_parsing", "bool_type"):
        return "must be true or false"
    return message.removeprefix("Value error, ")
