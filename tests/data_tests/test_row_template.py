"""What a user's template makes of rows, where its marks stand in the text, and what it may not do."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.shaping import row_template, template_language
from job.data.shaping.row_template import compile_template
from job.data.shaping.shapes import LossOn, PlainExample, RowError, RowOptions, find_format, to_example
from job.errors import ConfigError

MARKED = "Q: {{ question }}\nA: {% generation %}{{ answer }}{% endgeneration %}"


def fill_in(source: str, values: dict[str, Any], loss_on: LossOn = "auto") -> PlainExample:
    row_format = find_format(compile_template(source).fields, "a.jsonl", RowOptions(loss_on, template=source))
    example = to_example(values, row_format, has_template=True)
    assert isinstance(example, PlainExample)
    return example


def marked(source: str, values: dict[str, Any], loss_on: LossOn = "auto") -> list[str]:
    example = fill_in(source, values, loss_on)
    return [example.text[start:end] for start, end in example.spans]


def test_the_text_is_what_was_asked_for() -> None:
    source = "### 指令: {{ question }}\n\n### 回應: {% generation %}{{ answer }}{% endgeneration %}\n"
    example = fill_in(source, {"question": "你好嗎? ", "answer": "很好😀"})
    assert example == PlainExample("### 指令: 你好嗎? \n\n### 回應: 很好😀", ((23, 26),))


def test_rows_are_text_and_never_template() -> None:
    values = {"question": "{% generation %}x{% endgeneration %}{{ answer }}<b>&", "answer": "{{ question }}\r\n"}
    example = fill_in(MARKED, values)
    assert example.text == f"Q: {values['question']}\nA: {values['answer']}"
    assert marked(MARKED, values) == [values["answer"]]


def test_marks_in_loops_and_conditions() -> None:
    source = (
        "{% for turn in turns %}{% if turn.who == 'you' %}<{{ turn.text }}>"
        "{% else %}{% generation %}{{ loop.index }}:{{ turn['text'] }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    turns = [{"who": who, "text": text} for who, text in zip(["you", "me"] * 3, "甲乙丙😀é\u0301", strict=False)]
    example = fill_in(source, {"turns": turns})
    assert example.text == "<甲>2:乙<丙>4:😀<é>6:\u0301"
    assert marked(source, {"turns": turns}) == ["2:乙", "4:😀", "6:\u0301"]
    assert marked(source, {"turns": turns}, "assistant") == ["2:乙", "4:😀", "6:\u0301"]
    assert marked(source, {"turns": turns}, "completion") == ["6:\u0301"]
    assert marked(source, {"turns": turns}, "all") == [example.text]


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
answers = any_text.filter(lambda text: text.strip())


@given(st.lists(st.tuples(any_text, answers), min_size=1, max_size=5))
def test_marks_hold_the_answers_whatever_the_text(pairs: list[tuple[str, str]]) -> None:
    source = "{% for t in turns %}{{ t[0] }}{% generation %}{{ t[1] }}{% endgeneration %} {% endfor %}"
    values = {"turns": [list(pair) for pair in pairs]}
    assert marked(source, values) == [answer for _, answer in pairs]
    assert fill_in(source, values).text == " ".join(question + answer for question, answer in pairs)


@given(any_text, answers)
def test_plain_fields_are_kept_to_the_character(question: str, answer: str) -> None:
    example = fill_in(MARKED, {"question": question, "answer": answer})
    assert example.text == f"Q: {question}\nA: {answer}"
    assert example.spans == ((len(example.text) - len(answer), len(example.text)),)


def test_all_needs_no_marks_and_learns_what_follows_them() -> None:
    assert fill_in("{{ a }}, {{ b }}", {"a": "x", "b": "y"}, "all") == PlainExample("x, y", ((0, 4),))
    assert fill_in(f"{MARKED} END", {"question": "a", "answer": "b"}, "all").text == "Q: a\nA: b END"


@pytest.mark.parametrize(
    ("expression", "values", "text"),
    [
        ("{{ a }}", {"a": 3}, "3"),
        ("{{ a }}", {"a": 1.5}, "1.5"),
        ("{{ a.b['c'] }}", {"a": {"b": {"c": "x"}}}, "x"),
        ("{{ a['items'] }}", {"a": {"items": "x"}}, "x"),
        ("{{ a.items }}", {"a": {"items": "x"}}, "x"),
        ("{{ a[-1] }}", {"a": ["x", "y"]}, "y"),
        ("{{ a[:2] }}", {"a": "xyz"}, "xy"),
        ("{{ a|trim|upper ~ 1 }}", {"a": " x "}, "X1"),
        ("{{ a|tojson }}", {"a": {"b": ["é", None]}}, '{"b": ["é", null]}'),
        ("{% if a %}{{ a }}{% else %}none{% endif %}", {"a": None}, "none"),
        ("{{ a or 'none' }}", {"a": None}, "none"),
        ("{{ a if a is string else 'none' }}", {"a": 3}, "none"),
        ("{% if a is defined %}{{ a }}{% else %}none{% endif %}", {}, "none"),
        ("{{ a|default('none') }}", {}, "none"),
        ("{{ a.b|default('none') }}", {"a": {}}, "none"),
        ("{% set a = a|trim %}{{ a }}", {"a": " x"}, "x"),
        ("{{ a|length }}", {"a": ["x", "y"]}, "2"),
        ("{% for x in a %}{{ x }}{% if not loop.last %}, {% endif %}{% endfor %}", {"a": ["x", "y"]}, "x, y"),
        ("{% for x in a if x %}{{ x }}{% endfor %}", {"a": ["x", "", "y"]}, "xy"),
        ("{% raw %}{{ a }}{% endraw %}{# a remark #}", {"a": ""}, "{{ a }}"),
    ],
)
def test_what_a_template_can_do(expression: str, values: dict[str, Any], text: str) -> None:
    assert fill_in(f"{{% generation %}}{expression}{{% endgeneration %}}", values).text == text


@pytest.mark.parametrize(
    ("expression", "values", "reason"),
    [
        ("{{ a }}", {}, "the template's field `a` is missing"),
        ("{{ a }}", {"a": None}, "the template's field `a` is null"),
        ("{{ a|trim }}", {"a": None}, "the template's field `a` is null"),
        ("{{ a|tojson }}", {"a": None}, "the template's field `a` is null"),
        ("{{ a|tojson }}", {}, "the template's field `a` is missing"),
        ("{{ 'x' ~ a }}", {"a": None}, "the template's field `a` is null"),
        ("{{ a|default('') }}", {"a": None}, "the template's field `a` is null"),
        ("{{ a.b }}", {"a": {}}, "the template's field `a.b` is missing"),
        ("{{ a.b }}", {"a": {"b": None}}, "the template's field `a.b` is null"),
        ("{{ a.b }}", {"a": None}, "the template's field `a.b` is missing"),
        ("{{ a.b.c }}", {"a": {}}, "the template's field `a.b.c` is missing"),
        ("{{ a[0]['b'] }}", {"a": []}, "the template's field `a[0]['b']` is missing"),
        ("{{ a }}", {"a": ["x"]}, "the template's field `a` is a list, not text"),
        ("{{ a }}", {"a": {}}, "the template's field `a` is an object, not text"),
        ("{{ a }}", {"a": True}, "the template's field `a` is a boolean, not text"),
        ("{{ a }}", {"a": float("nan")}, "the template's field `a` is NaN, not text"),
        ("{{ '\\ud800' }}", {}, "the template's expression on line 1 holds half of a surrogate pair"),
        ("{{ a }}", {"a": "x\ud800"}, "the template's field `a` holds half of a surrogate pair at character 2"),
        ("{{ a }}", {"a": "\udfff"}, "the template's field `a` holds half of a surrogate pair at character 1"),
        ("{{ a|tojson }}", {"a": ["\udfff"]}, "the template's field `a` holds half of a surrogate pair"),
        ("{{ a|tojson }}", {"a": float("nan")}, "the template can't be filled in: Out of range float values"),
        ("{{ a or b }}", {"a": None, "b": None}, "the template's expression on line 1 is null"),
        ("{% for x in a %}{% endfor %}", {"a": None}, "the template's field `a` is null"),
        ("{% for x in a %}{% endfor %}", {}, "the template's field `a` is missing"),
        ("{% for x in a %}{% endfor %}", {"a": "xyz"}, "the template's field `a` is a string, not a list"),
        ("{% for x in a %}{{ x }}{% endfor %}", {"a": [None]}, "the template's field `x` is null"),
        ("{% if a %}{% endif %}", {}, "the template can't be filled in: the field `a` is missing"),
        ("{% if a < 3 %}{% endif %}", {"a": "x"}, "the template can't be filled in: '<' not supported"),
        ("{{ a }}", {"a": " "}, "the answer that the template marks is empty"),
    ],
)
def test_rows_that_do_not_fit(expression: str, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        fill_in(f"{{% generation %}}{expression}{{% endgeneration %}}", values)
    assert caught.value.reason.startswith(reason)


def test_every_answer_must_be_there() -> None:
    source = "{% for x in a %}{% generation %}{{ x }}{% endgeneration %}{% endfor %}"
    with pytest.raises(RowError, match="the template marks no answer in it"):
        fill_in(source, {"a": []})
    with pytest.raises(RowError, match="the answer that the template marks is empty"):
        fill_in(source, {"a": ["x", " ", "y"]})
    with pytest.raises(RowError, match="the template makes an empty text of it"):
        fill_in(source, {"a": []}, "all")


def test_nothing_follows_the_last_answer_of_a_row() -> None:
    source = (
        "{% for x in a %}{{ x.q }}{% if x.a %}{% generation %}{{ x.a }}{% endgeneration %}\n{% endif %}{% endfor %}"
    )
    assert fill_in(source, {"a": [{"q": "1", "a": "2"}]}).text == "12"
    with pytest.raises(RowError, match="text after the last answer"):
        fill_in(source, {"a": [{"q": "1", "a": "2"}, {"q": "3", "a": None}]})


@pytest.mark.parametrize(
    ("after", "line"),
    [
        (" END", 2),
        ("\n\n\nEND", 5),
        (" \n{{ question }}", 3),
        ("{{ question }}", 2),
        ("{% if question %}{% endif %}.", 2),
    ],
)
def test_nothing_follows_the_last_mark_of_a_template(after: str, line: int) -> None:
    with pytest.raises(ConfigError) as caught:
        fill_in(MARKED + after, {})
    assert caught.value.message.startswith(f"SFT_DATA__TEMPLATE, line {line}: text after {{% endgeneration %}}")


@pytest.mark.parametrize("loss_on", ["auto", "completion", "assistant"])
def test_a_template_must_mark_what_is_learned(loss_on: LossOn) -> None:
    with pytest.raises(ConfigError) as caught:
        fill_in("{{ a }}", {}, loss_on)
    assert caught.value.message == f"SFT_DATA__TEMPLATE marks nothing to learn, and SFT_DATA__LOSS_ON is {loss_on}"
    assert "{% generation %}{{ answer }}{% endgeneration %}" in caught.value.hint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{{ b", "line 2: unexpected end of template"),
        ("{% if a %}", "line 1: Unexpected end of template"),
        ("{% generation %}{{ a }}", "line 1: Unexpected end of template"),
        ("a\n\n{% endgeneration %}", "line 3: Encountered unknown tag 'endgeneration'"),
        ("{% generation %}{% generation %}{% endgeneration %}{% endgeneration %}", "line 1: {% generation %} within"),
        (
            "{% generation %}{% if a %}{% generation %}{% endgeneration %}{% endif %}{% endgeneration %}",
            "line 1: {% gen",
        ),
        ("{{ a|nonsense }}", "line 1: row templates have no filter `nonsense`"),
        ("{% if false %}{{ a|nonsense }}{% endif %}", "line 1: row templates have no filter `nonsense`"),
        ("{{ a is odd }}", "line 1: row templates have no test `odd`"),
        ("{{ self }}", "line 1: row templates have no `self`"),
        ("\udc80", "'utf-8' codec can't encode character"),
        ("\ud800x", "'utf-8' codec can't encode character"),
    ],
)
def test_faults_of_a_template(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^SFT_DATA__TEMPLATE[, ]") as caught:
        compile_template(source)
    assert message in caught.value.message


ATTACKS = [
    "{{ ''.__class__ }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ x|attr('__class__') }}",
    "{{ x|map('upper') }}",
    "{{ x|string|format('a') }}",
    "{{ x.format(1) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ x * 10000000000 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ x + x }}",
    "{{ range(10**9) }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ lipsum.__globals__['os'] }}{{ lipsum() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner() }}",
    "{{ namespace(a=1) }}",
    "{{ dict(a=1) }}",
    "{{ self.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% from 'os' import system %}",
    "{% extends 'base' %}",
    "{% block a %}{% endblock %}",
    "{% macro a() %}{{ caller() }}{% endmacro %}",
    "{% call x() %}{% endcall %}",
    "{% filter upper %}a{% endfilter %}",
    "{% set x %}a{% endset %}",
    "{% set x.y = 1 %}",
    "{% with y = 1 %}{% endwith %}",
    "{% autoescape true %}{% endautoescape %}",
    "{% for i in x recursive %}{{ loop(i) }}{% endfor %}",
    "{% for i in x %}{{ loop.changed(i) }}{% endfor %}",
    "{{ {'a': 1} }}",
    "{{ (1, 2) }}",
    "{% debug %}",
    "{% do x %}",
    "{{ " + "(" * 5_000 + "x" + ")" * 5_000 + " }}",
    "{% if x %}" + "{% elif x %}" * 20_000 + "{% endif %}",
    "{% if x %}" * 150 + "{% endif %}" * 150,
    "{{ x" + ".x" * 250 + " }}",
    "{{ " + "not " * 2_000 + "x }}",
    "{% for i in x %}" * 30 + "{% endfor %}" * 30,
    "{{ " + "9" * 5_000 + " }}",
]


@pytest.mark.parametrize("source", ATTACKS, ids=lambda source: source[:40])
def test_what_a_template_may_not_do(source: str) -> None:
    with pytest.raises(ConfigError, match=r"^SFT_DATA__TEMPLATE[, ]"):
        compile_template(source)


@pytest.mark.parametrize(
    "expression",
    [
        "x.__class__",
        "x['__class__']",
        "x.upper",
        "x.__class__.__mro__",
        "y.append",
        "y.__len__",
        "z.items",
        "z.keys",
        "z['__class__']",
        "z.__class__.__init__",
        "n.real",
    ],
)
def test_keys_are_not_attributes(expression: str) -> None:
    source = f"{{% generation %}}{{{{ {expression} }}}}{{% endgeneration %}}"
    with pytest.raises(RowError, match="is missing"):
        fill_in(source, {"x": "a", "y": [], "z": {}, "n": 1})


@pytest.mark.parametrize("field", ["__class__", "_iterable", "cycle", "changed", "previtem", "depth"])
def test_of_a_loop_only_its_place_is_seen(field: str) -> None:
    source = f"{{% for x in a %}}{{% generation %}}{{{{ loop.{field} }}}}{{% endgeneration %}}{{% endfor %}}"
    with pytest.raises(RowError, match=f"`loop.{field}` is missing"):
        fill_in(source, {"a": ["x"]})


def test_loops_and_texts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{% for x in a %}{% for y in a %}{% for z in a %}{% endfor %}{% endfor %}{% endfor %}{{ a[0] }}"
    assert fill_in(source, {"a": ["x"] * 10}, "all").text == "x"
    with pytest.raises(RowError, match="loops take more than 100,000 steps"):
        fill_in(source, {"a": ["x"] * 1_000}, "all")
    # Each row has all the steps again.
    assert fill_in(source, {"a": ["x"] * 40}, "all").text == "x"
    assert fill_in(source, {"a": ["x"] * 40}, "all").text == "x"

    monkeypatch.setattr(row_template, "MAX_CHARACTERS", 100)
    monkeypatch.setattr(template_language, "MAX_TEXT_CHARACTERS", 100)
    with pytest.raises(RowError, match="the template makes more than 100 characters of it"):
        fill_in("{{ a }}{{ a }}", {"a": "x" * 60}, "all")
    doubling = "".join("{% set a = a ~ a %}" for _ in range(100))
    with pytest.raises(RowError, match="`a` is longer than 100 characters"):
        fill_in(doubling + "{{ a }}", {"a": "x"}, "all")


def test_lists_of_a_row_are_not_changed() -> None:
    values = {"a": ["x", "y"]}
    fill_in("{% set a = a[:1] %}{{ a[0] }}", values, "all")
    assert values == {"a": ["x", "y"]}


def test_a_template_is_compiled_once() -> None:
    assert compile_template(MARKED) is compile_template(MARKED)
