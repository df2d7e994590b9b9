"""The part of Jinja that row templates are written in.

Fields of the row and keys of its objects, `if`, `for` over lists, `set`, a few filters and tests, and marks around what
is learned. Whatever isn't listed here is refused when the template is read: no calls, no attributes, no other
templates, no arithmetic. Values are checked where they become text, so that a null is never written as `None`. Jinja's
own sandbox stands behind all that.
"""

import json
from collections.abc import Callable
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, UndefinedError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import missing
from jinja2.visitor import NodeTransformer

from job.data.shaping.cells import check_unicode, describe_type, number_text
from job.data.shaping.examples import RowError

# Pieces of output. They are halves of surrogate pairs, which are refused in a row's text and in the template's own.
START_MARK, END_MARK = "\ud800", "\udfff"
LOOP_STEPS = "loop steps"  # a name that no template can write
MAX_LOOP_STEPS = 100_000
MAX_TEXT_CHARACTERS = 10_000_000
MAX_DEPTH = 50  # Jinja folds constants in a time that grows with the third power of it

TEXT_FILTERS = ("lower", "trim", "upper")
VALUE_FILTERS = ("length", "tojson")
KNOWN_FILTERS = ("default", *VALUE_FILTERS, *TEXT_FILTERS)
KNOWN_TESTS = ("boolean", "defined", "mapping", "none", "number", "string", "undefined")
LOOP_FIELDS = ("first", "index", "index0", "last", "length")
KNOWN_NODES = (
    *(nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign),
    *(nodes.Name, nodes.Const, nodes.List, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Neg),
    *(nodes.Filter, nodes.Keyword, nodes.Test, nodes.Compare, nodes.Operand),
    *(nodes.And, nodes.Or, nodes.Not, nodes.CondExpr, nodes.Concat),
)
_FIELDS = (nodes.Name, nodes.Getattr, nodes.Getitem)
# The filters behind the checks, under names that no template can write.
_AS_TEXT, _AS_VALUE, _AS_LIST = "as text", "as value", "as list"


class LoopSteps:
    """How many steps the loops of one row have taken, so that loops within loops can't run for ever."""

    def __init__(self) -> None:
        self._taken = 0

    def add(self, steps: int) -> None:
        """Count steps. Raises RowError when they are too many."""
        self._taken += steps
        if self._taken > MAX_LOOP_STEPS:
            raise RowError(f"the template's loops take more than {MAX_LOOP_STEPS:,} steps")


class Language(ImmutableSandboxedEnvironment):
    """Jinja with nothing but what row templates may use."""

    def __init__(self) -> None:
        super().__init__(undefined=_Missing, extensions=[_Marks])
        self.globals.clear()
        self.tests = {name: TESTS[name] for name in KNOWN_TESTS}
        self.filters: dict[str, Callable[..., Any]] = {name: FILTERS[name] for name in KNOWN_FILTERS}
        self.filters |= {"tojson": _to_json, _AS_TEXT: _as_text, _AS_VALUE: _as_value, _AS_LIST: _as_list}

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return a key of an object, or a field of a loop; never an attribute."""
        if isinstance(obj, LoopContext) and attribute in LOOP_FIELDS:
            return super().getattr(obj, attribute)
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return a key of an object or an item of a list; undefined where there is none."""
        if isinstance(obj, dict) and isinstance(argument, str) and argument in obj:
            return obj[argument]
        if isinstance(obj, list) and isinstance(argument, int) and -len(obj) <= argument < len(obj):
            return obj[argument]
        return obj if isinstance(obj, Undefined) else self.undefined(name=str(argument))


class _Missing(StrictUndefined):
    """A field that isn't there: any use of it but the test `defined` is an error that names it."""

    def __init__(
        self,
        hint: str | None = None,
        obj: Any = missing,
        name: str | None = None,
        exc: type[UndefinedError] = UndefinedError,
    ) -> None:
        super().__init__(hint or f"the field `{name}` is missing", obj, name, exc)


class _Marks(Extension):
    """`{% generation %}` and `{% endgeneration %}`, written to the output as pieces of their own."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own name and type)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands between two marks, and pieces of output before and after it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        if any(has_marks(node) for node in body):
            parser.fail("{% generation %} within {% generation %}", line)
        return [_make_piece(START_MARK, line), *body, _make_piece(END_MARK, parser.stream.current.lineno)]


def check_syntax(tree: nodes.Node, *, depth: int = 0, line: int = 1) -> None:
    """Raise TemplateSyntaxError for what row templates don't have, and UnicodeEncodeError for halves of characters."""
    for node in tree.iter_child_nodes():
        line = node.lineno or line  # some nodes have none
        if depth == MAX_DEPTH:
            raise TemplateSyntaxError(f"nested more than {MAX_DEPTH} deep", line)
        _check_node(node, line)
        check_syntax(node, depth=depth + 1, line=line)


def _check_node(node: nodes.Node, line: int) -> None:
    if type(node) not in KNOWN_NODES:
        raise TemplateSyntaxError(f"row templates have no `{type(node).__name__.lower()}`", line)
    if isinstance(node, nodes.Filter) and node.name not in KNOWN_FILTERS:
        known = ", ".join(KNOWN_FILTERS)
        raise TemplateSyntaxError(f"row templates have no filter `{node.name}`, only {known}", line)
    if isinstance(node, nodes.Test) and node.name not in KNOWN_TESTS:
        known = ", ".join(KNOWN_TESTS)
        raise TemplateSyntaxError(f"row templates have no test `{node.name}`, only {known}", line)
    if isinstance(node, nodes.Name) and node.name == "self":
        # Jinja puts the template itself there, even where the row has such a column.
        raise TemplateSyntaxError("row templates have no `self`", line)
    if isinstance(node, nodes.Getattr | nodes.Getitem) and not isinstance(node.node, _FIELDS):
        raise TemplateSyntaxError("row templates look up keys of fields only", line)
    if isinstance(node, nodes.TemplateData) and node.data not in (START_MARK, END_MARK):
        node.data.encode("utf-8")


def has_marks(tree: nodes.Node) -> bool:
    """Say whether anything in a template is marked."""
    return any(data.data == END_MARK for data in tree.find_all(nodes.TemplateData))


def find_text_after_marks(tree: nodes.Template) -> int | None:
    """Return the line on which something is written after the last mark in any case, or None."""
    marked = [index for index, node in enumerate(tree.body) if has_marks(node)]
    for node in tree.body[marked[-1] + 1 :] if marked else []:
        for child in node.nodes if isinstance(node, nodes.Output) else []:
            if not isinstance(child, nodes.TemplateData):
                return child.lineno
            if child.data.strip():
                blanks = child.data[: len(child.data) - len(child.data.lstrip())]
                return child.lineno + blanks.count("\n")
    return None


def guard_values(tree: nodes.Template) -> nodes.Template:
    """Put a check around each value that becomes text and each list that is looped over, in place."""
    guarded: nodes.Template = _Guard().visit(tree)
    return guarded


class _Guard(NodeTransformer):
    def visit_Output(self, node: nodes.Output) -> nodes.Output:  # noqa: N802 (Jinja's own name)
        self.generic_visit(node)
        node.nodes = [_guard(child, _AS_TEXT) for child in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Concat:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_guard(child, _AS_TEXT) for child in node.nodes]
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        if node.node is not None and node.name in (*TEXT_FILTERS, *VALUE_FILTERS):
            node.node = _guard(node.node, _AS_TEXT if node.name in TEXT_FILTERS else _AS_VALUE)
        return node

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        node.iter = _guard(node.iter, _AS_LIST)
        return node


def _guard(node: nodes.Node, check: str) -> nodes.Expr:
    if isinstance(node, nodes.TemplateData):
        return node
    field = _name_field(node)
    where = f"field `{field}`" if field else f"expression on line {node.lineno}"
    label = nodes.Const(f"the template's {where}", lineno=node.lineno)
    return nodes.Filter(node, check, [label], [], None, None, lineno=node.lineno)


def _name_field(node: nodes.Node | None) -> str:
    """Return the field that an expression comes from, as the template writes it; empty when it comes from several."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Filter):
        return _name_field(node.node)
    if isinstance(node, nodes.Getattr):
        return f"{_name_field(node.node)}.{node.attr}"
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return f"{_name_field(node.node)}[{node.arg.value!r}]"
    return ""


def _as_text(value: Any, label: str) -> str:
    """The check of what is written: text, or a number as its JSON text."""
    _as_value(value, label)
    text = value if isinstance(value, str) else number_text(value)
    if text is None:
        raise RowError(f"{label} is {describe_type(value)}, not text")
    if len(text) > MAX_TEXT_CHARACTERS:
        raise RowError(f"{label} is longer than {MAX_TEXT_CHARACTERS:,} characters")
    check_unicode(text, label)
    return text


def _as_value(value: Any, label: str) -> Any:
    """The check of what is measured or written as JSON: it must be there."""
    if isinstance(value, Undefined):
        raise RowError(f"{label} is missing")
    if value is None:
        raise RowError(f"{label} is null")
    return value


@pass_context
def _as_list(context: Context, value: Any, label: str) -> list[Any]:
    """The check of what is looped over."""
    _as_value(value, label)
    if not isinstance(value, list):
        raise RowError(f"{label} is {describe_type(value)}, not a list")
    context.resolve(LOOP_STEPS).add(len(value))
    return value


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _make_piece(text: str, line: int) -> nodes.Output:
    return nodes.Output([nodes.TemplateData(text, lineno=line)], lineno=line)
