"""The exit codes are those of the design."""

from job.errors import ERROR_BY_CODE, EXIT_CODES, KUBERNETES_ACTION, JobError

# As in DESIGN.md: a change here changes what clusters do with a pod.
DESIGN = {
    0: ("ok", "Complete"),
    65: ("data", "FailJob"),
    66: ("no_input", "FailJob"),
    69: ("unavailable", "retry, counted"),
    70: ("internal", "retry, counted"),
    71: ("resources", "FailJob"),
    75: ("preempted", "retry, not counted"),
    77: ("denied", "FailJob"),
    78: ("config", "FailJob"),
    80: ("diverged", "FailJob"),
}


def test_the_table_is_the_designs() -> None:
    assert {row.code: (row.name, KUBERNETES_ACTION[row.retry]) for row in EXIT_CODES} == DESIGN
    assert len(EXIT_CODES) == len(DESIGN)
    assert 1 not in {row.code for row in EXIT_CODES}


def test_every_error_has_a_row_of_its_own() -> None:
    errors = JobError.__subclasses__()
    assert len({error.exit_code for error in errors}) == len(errors)
    assert {error.exit_code for error in errors} == {row for row in EXIT_CODES if row.code != 0}
    assert {error.exit_code.code: error for error in errors} == ERROR_BY_CODE
    for error in errors:  # ERROR_BY_CODE doesn't know these, so they must end as their parents do
        assert all(child.exit_code is error.exit_code for child in error.__subclasses__())
