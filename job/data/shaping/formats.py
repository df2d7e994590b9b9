"""Columns of a file -> the format of its rows: which shape they have, or the user's template of them.

A shape fits when the file has all of its required columns. A shape drops another whose columns are some of its own,
and columns that the user renames settle what is meant; two that still fit are an error, for a guess that is wrong
trains on the wrong column. Other columns are ignored.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from job.data.shaping.examples import LossOn, RowOptions
from job.errors import ConfigError, DataError

if TYPE_CHECKING:
    from job.data.shaping.row_template import RowTemplate

Shape = Literal[
    "text",
    "messages",
    "conversations",
    "prompt/completion",
    "prompt/response",
    "instruction/output",
    "instruction/response",
    "question/answer",
    "question/response",
    "query/response",
    "problem/solution",
    "user/assistant",
    "input/output",
    "template",
]


class Columns(NamedTuple):
    """The columns of a shape, by their names after renaming. Of two required ones, the second is the answer."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ("system",)


COLUMNS: dict[Shape, Columns] = {
    "text": Columns(("text",), ()),
    "messages": Columns(("messages",), ("system", "tools")),
    "conversations": Columns(("conversations",), ("system", "tools")),
    "prompt/completion": Columns(("prompt", "completion"), ("system", "tools")),
    "prompt/response": Columns(("prompt", "response")),
    "instruction/output": Columns(("instruction", "output"), ("input", "system")),
    "instruction/response": Columns(("instruction", "response"), ("input", "system")),
    "question/answer": Columns(("question", "answer")),
    "question/response": Columns(("question", "response")),
    "query/response": Columns(("query", "response")),
    "problem/solution": Columns(("problem", "solution")),
    "user/assistant": Columns(("user", "assistant")),
    "input/output": Columns(("input", "output")),
}


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the rows of one file become examples; plain values, so that it can be sent to another process."""

    shape: Shape
    options: RowOptions
    columns: tuple[str, ...] = ()  # those in use, by their names after renaming

    def describe(self) -> str:
        """Return the shape and the columns it was recognised from, in words."""
        found = {wanted: name for name, wanted in self.options.columns.items()}
        shown = [
            f"`{column}`" if found.get(column, column) == column else f"`{found[column]}` as `{column}`"
            for column in self.columns
        ]
        if not shown:
            return self.shape
        return f"{self.shape}, from the column{'s' if len(shown) > 1 else ''} {_join(shown)}"


def find_format(columns: Iterable[str], name: str, options: RowOptions) -> RowFormat:
    """Return how the rows of the file `name` are read, from the columns that its first rows have.

    Raises ConfigError when the options contradict themselves or the shape, and DataError when no shape has these
    columns, more than one has, or a column that the options name isn't there.
    """
    check_options(options)
    found = set(columns)
    _check_renamed(found, name, options)
    renamed = set(rename(dict.fromkeys(found), options.columns))
    if options.template is not None:
        fields = load_template(options.template).fields
        _check_fields(fields, renamed, name)
        return RowFormat("template", options, tuple(sorted(fields)))
    shape = _choose_shape(renamed, name, options)
    check_loss_on(shape, options.loss_on, name)
    used = COLUMNS[shape]
    return RowFormat(shape, options, (*used.required, *(column for column in used.optional if column in renamed)))


def check_options(options: RowOptions) -> None:
    """Raise ConfigError for what is wrong with the options whatever the data is: two columns that are renamed to one,
    or a template that can't be used."""
    by_wanted: dict[str, str] = {}
    for found, wanted in options.columns.items():
        if wanted in by_wanted:
            raise ConfigError(
                f"SFT_DATA__COLUMNS={_to_json(options.columns)}: both `{by_wanted[wanted]}` and `{found}` would become "
                f"`{wanted}`",
                hint="name one column for each",
            )
        by_wanted[wanted] = found
    if options.template is not None:
        load_template(options.template).check_loss_on(options.loss_on)


def load_template(source: str) -> "RowTemplate":
    """Return the user's template, compiled once. Raises ConfigError when it can't be used."""
    # Jinja is imported only by those who have a template.
    from job.data.shaping.row_template import compile_template

    return compile_template(source)


def check_loss_on(shape: Shape, loss_on: LossOn, name: str) -> None:
    """Raise ConfigError when `loss_on` asks for answers in rows that have none."""
    if shape == "text" and loss_on in ("completion", "assistant"):
        raise ConfigError(
            f"SFT_DATA__LOSS_ON={loss_on}: the rows of {name} are plain text, without an answer in them",
            hint="use auto or all, or give prompt and completion columns",
        )


def rename(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row's values by the names that are wanted. A column that is renamed replaces one of that name."""
    replaced = {*columns, *columns.values()}
    kept = {column: value for column, value in values.items() if column not in replaced}
    return kept | {wanted: values[found] for found, wanted in columns.items() if found in values}


def _check_renamed(found: set[str], name: str, options: RowOptions) -> None:
    for column in options.columns:
        if column not in found:
            raise DataError(
                f"{name}: SFT_DATA__COLUMNS renames `{column}`, but the columns are {_quote(found)}",
                hint=_did_you_mean(column, found) or "give a column that is there",
            )


def _check_fields(fields: frozenset[str], columns: set[str], name: str) -> None:
    for field in sorted(fields - columns):
        raise DataError(
            f"{name}: SFT_DATA__TEMPLATE uses the field `{field}`, but the columns are {_quote(columns)}",
            hint=_did_you_mean(field, columns) or "use a column that is there, or rename one by SFT_DATA__COLUMNS",
        )


def _choose_shape(renamed: set[str], name: str, options: RowOptions) -> Shape:
    fitting = [shape for shape, wanted in COLUMNS.items() if renamed.issuperset(wanted.required)]
    targets = set(options.columns.values())
    meant = [shape for shape in fitting if targets.issuperset(COLUMNS[shape].required)]
    candidates = meant or fitting
    best = [shape for shape in candidates if not any(_is_part(shape, other) for other in candidates)]
    if len(best) == 1:
        return best[0]
    raise _ambiguous(best, name, options) if best else _unknown(renamed, name, options)


def _is_part(shape: Shape, other: Shape) -> bool:
    """Say whether the columns of `shape` are some of those of `other`, but not all."""
    return {*COLUMNS[shape].required, *COLUMNS[shape].optional} < {*COLUMNS[other].required, *COLUMNS[other].optional}


def _ambiguous(fitting: list[Shape], name: str, options: RowOptions) -> DataError:
    sources = {wanted: found for found, wanted in options.columns.items()}
    example = {sources.get(column, column): column for column in COLUMNS[fitting[0]].required}
    shown = "; ".join(f"{shape} (columns {_quote_all(shape)})" for shape in fitting)
    return DataError(
        f"{name}: the columns fit more than one shape: {shown}",
        hint=f"choose one by naming its columns, such as SFT_DATA__COLUMNS='{_to_json(example)}' for {fitting[0]}",
    )


def _unknown(renamed: set[str], name: str, options: RowOptions) -> DataError:
    known = "; ".join(_quote_all(shape) for shape in COLUMNS)
    guess = _guess_renaming(renamed, options.columns)
    meant = f"is SFT_DATA__COLUMNS='{_to_json(guess)}' what you mean? " if guess else ""
    return DataError(
        f"{name}: no known shape has the columns found: {_quote(renamed)}",
        hint=f'{meant}rename columns by SFT_DATA__COLUMNS=\'{{"found": "wanted"}}\', or say by SFT_DATA__TEMPLATE '
        f"how a row reads. Known are {known}",
    )


def _guess_renaming(renamed: set[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Return the renaming after which some shape would fit, where names are nearly right; else nothing."""
    sources = {wanted: found for found, wanted in columns.items()}
    for wanted in COLUMNS.values():
        matches = [column if column in renamed else _find_near(column, renamed) for column in wanted.required]
        if None not in matches and len(set(matches)) == len(matches):
            pairs = zip(matches, wanted.required, strict=True)
            return {sources.get(match, match): column for match, column in pairs if match is not None}
    return {}


def _find_near(name: str, names: Iterable[str]) -> str | None:
    by_lower = {other.lower(): other for other in sorted(names)}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.75)
    return by_lower[near[0]] if near else None


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = _find_near(name, names)
    return f"did you mean `{near}`?" if near else ""


def _quote_all(shape: Shape) -> str:
    return _join([f"`{column}`" for column in COLUMNS[shape].required])


def _quote(columns: set[str]) -> str:
    return ", ".join(f"`{column}`" for column in sorted(columns)) or "none"


def _join(items: list[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _to_json(value: Mapping[str, str]) -> str:
    return json.dumps(dict(value), ensure_ascii=False)
