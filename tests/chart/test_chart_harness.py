"""What the other tests of the chart rest on: the kubelet's expansion of variables, as its own tests have it."""

import pytest
from helm_chart import expand, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(VAR_A)", "A"),
        ("___$(VAR_B)___", "___B___"),
        ("$(VAR_A)-$(VAR_A)", "A-A"),
        ("$$(VAR_A)_$(VAR_A)", "$(VAR_A)_A"),
        ("$$$(VAR_A)", "$A"),
        ("$$$$(VAR_A)", "$$(VAR_A)"),
        ("$(VAR_NONE)", "$(VAR_NONE)"),
        ("$VAR_A", "$VAR_A"),
        ("$", "$"),
        ("foo$", "foo$"),
        ("$$", "$"),
        ("$(VAR_A", "$(VAR_A"),
        ("$)", "$)"),
        ("$()", "$()"),
    ],
)
def test_variables_become_what_the_kubelet_makes_of_them(text: str, expected: str) -> None:
    assert expand(text, {"VAR_A": "A", "VAR_B": "B"}) == expected


def test_a_key_that_stands_twice_is_found() -> None:
    with pytest.raises(AssertionError, match="twice"):
        parse("a: {b: 1, c: 2, b: 3}")
