"""What must be the same on every node is compared, and what differs is named with both values."""

from typing import Any

import pytest

from job.errors import ConfigError, DataError
from job.nodes.identity import name_differences, refuse_differences


def run(*files: tuple[str, str], plan: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    data = [{"setting": "SFT_DATA__URI", "uri": uri, "sha256": sha256 * 16, "weight": 1.0} for uri, sha256 in files]
    return {"values": values, "data": data, "plan": plan or {}}


def test_alike_nodes_pass_wherever_their_files_lie() -> None:
    refuse_differences([run(("/a/x.jsonl", "12ab"), seed=1), run(("/mnt/x.jsonl", "12ab"), seed=1)])


def test_other_data_are_named_with_both_digests() -> None:
    first, other = ("s3://b/train.jsonl", "98fe"), ("s3://b/train.jsonl", "12ab")
    # that the plan differs is a consequence
    runs = [run(first, plan={"steps": 1}), run(first, plan={"steps": 1}), run(other, plan={"steps": 2})]
    with pytest.raises(DataError) as caught:
        refuse_differences(runs)
    assert caught.value.message == (
        "node 2 differs from node 0: SFT_DATA__URI=s3://b/train.jsonl has sha256 12ab12ab12ab12ab..., "
        "node 0's sha256 98fe98fe98fe98fe..."
    )
    assert caught.value.hint


def test_files_that_one_node_lacks_or_has_alone_are_named() -> None:
    with pytest.raises(DataError, match=r"node 1 differs from node 0: its data lack /b\.jsonl"):
        refuse_differences([run(("/a.jsonl", "aa"), ("/b.jsonl", "bb")), run(("/a.jsonl", "aa"))])
    with pytest.raises(DataError, match=r"/b\.jsonl has sha256 .* node 0's data hold no such file"):
        refuse_differences([run(("/a.jsonl", "aa")), run(("/a.jsonl", "aa"), ("/b.jsonl", "bb"))])
    with pytest.raises(DataError, match="its data come in another order"):
        refuse_differences([run(("/a.jsonl", "aa"), ("/b.jsonl", "bb")), run(("/b.jsonl", "bb"), ("/a.jsonl", "aa"))])


def test_settings_and_versions_come_first_and_end_as_wrong_settings() -> None:
    first = run(("/a.jsonl", "aa"), SFT_TRAIN__SEED=1, torch="2.13", only_here=1)
    other = run(("/a.jsonl", "bb"), SFT_TRAIN__SEED=2, torch="2.12")
    with pytest.raises(ConfigError) as caught:
        refuse_differences([first, other])
    seed, torch = "SFT_TRAIN__SEED is 2, node 0's is 1", "torch is 2.12, node 0's is 2.13"
    for said in (seed, torch, "sha256 bbbb", "only_here is nothing"):
        assert said in caught.value.message


def test_a_plan_that_another_machine_leads_to() -> None:
    with pytest.raises(ConfigError, match="node 1 differs from node 0: the plan's processes is 4, node 0's is 2"):
        refuse_differences([run(plan={"the plan's processes": 2}), run(plan={"the plan's processes": 4})])


def test_many_differences_are_cut_short() -> None:
    with pytest.raises(ConfigError, match="and 3 more"):
        refuse_differences([run(**{f"v{n}": 0 for n in range(13)}), run(**{f"v{n}": 1 for n in range(13)})])


def test_prompts_must_be_the_same_everywhere_but_make_no_other_run() -> None:
    first, other = (run(SFT_EVAL__PROMPTS=prompts, SFT_TRAIN__SEED=seed) for prompts, seed in (("a", 1), ("b", 2)))
    with pytest.raises(ConfigError, match="SFT_EVAL__PROMPTS is b, node 0's is a"):
        refuse_differences([first, other])
    assert name_differences(first, other) == ["SFT_TRAIN__SEED is 1, and was 2"]
