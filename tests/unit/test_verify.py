"""`sft-job verify`: whatever is wrong with a slot is named with its file, and a slot that is whole is said to be."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from small_training import make_small_plan, save_llama, train_here

from job.accept import name_base_model
from job.adapter_file import find_odd_tensors, read_shapes
from job.errors import ConfigError, DataError, NotFoundError
from job.handover import NewTokenInput
from job.outcome import Progress
from job.plan import TrainPlan
from job.settings_runtime import RuntimeSettings
from job.verify import verify

PlanFor = Callable[..., TrainPlan]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def list_slot(slot: Path, plan: TrainPlan) -> None:
    """Write the manifest of what lies there now."""
    files = [
        {
            "path": path.relative_to(slot).as_posix(),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(slot.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    ]
    base = {"id": plan.model_id, "revision": plan.model_revision}
    manifest = {"run_id": "abc", "plan": plan.model_dump(mode="json"), "base_model": base, "files": files}
    (slot / "manifest.json").write_text(json.dumps(manifest))


def configure(slot: Path, **changes: object) -> None:
    (slot / CONFIG).write_text(json.dumps(json.loads((slot / CONFIG).read_text()) | changes))


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is trained once."""
    return tmp_path_factory.mktemp("once")


@pytest.fixture
def published(plan_for: PlanFor, once: Path, tmp_path: Path) -> tuple[Path, TrainPlan]:
    """A slot with a trained adapter, whose base model is nowhere, and its plan."""
    plan = make_small_plan(plan_for, TRAIN__MAX_STEPS=1).model_copy(update={"model_id": "/nowhere/model"})
    if not (once / "run").exists():
        train_here(plan, save_llama(once / "base", tied=True), once / "run")
    slot = shutil.copytree(once / "run" / "adapter", tmp_path / "slot")
    configure(slot, base_model_name_or_path="/nowhere/model", revision=None)
    (slot / "merged").mkdir()
    (slot / "merged" / "model.safetensors").write_bytes(b"large")
    list_slot(slot, plan)
    return slot, plan


def look(slot: Path, tmp_path: Path) -> str:
    return verify(str(slot), RuntimeSettings(work_dir=tmp_path / "work"), Progress())


def test_a_whole_slot(published: tuple[Path, TrainPlan], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert look(published[0], tmp_path) == f"run abc is whole at {published[0]}"
    said = capsys.readouterr().out
    assert "every file is there, with the sha256 that the manifest lists" in said
    assert "whether it loads was not tried: its base model isn't at hand: SFT_MODEL__ID=/nowhere/model" in said
    assert list((tmp_path / "work").iterdir()) == []


def corrupt(slot: Path, name: str) -> None:
    content = bytearray((slot / name).read_bytes())
    content[len(content) // 2] ^= 1
    (slot / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda slot: corrupt(slot, WEIGHTS), f"{WEIGHTS}: has sha256"),
        (lambda slot: corrupt(slot, "merged/model.safetensors"), "merged/model.safetensors: has sha256"),
        (lambda slot: (slot / CONFIG).unlink(), f"{CONFIG}: is missing"),
        (lambda slot: (slot / WEIGHTS).write_bytes(b"short"), f"{WEIGHTS}: has 5 bytes, and the manifest lists"),
    ],
)
def test_damage_names_its_file(
    published: tuple[Path, TrainPlan],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    slot, _ = published
    damage(slot)
    with pytest.raises(DataError, match=rf"1 of what was published is damaged: {said.split(':', maxsplit=1)[0]}$"):
        look(slot, tmp_path)
    assert f"\n  {said}" in capsys.readouterr().out


def test_pickles_of_this_run_are_damage_and_others_are_named(
    published: tuple[Path, TrainPlan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slot, _ = published
    (slot / "training_args.bin").write_bytes(b"")
    look(slot, tmp_path)
    assert "\n  training_args.bin: is a pickle, and not of this run: don't load it\n" in capsys.readouterr().out
    manifest = json.loads((slot / "manifest.json").read_text())
    manifest["files"].append({"path": "training_args.bin", "sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0})
    (slot / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"is damaged: training_args\.bin$"):
        look(slot, tmp_path)


def test_a_work_folder_that_cannot_be_used_is_a_wrong_setting(
    published: tuple[Path, TrainPlan], tmp_path: Path
) -> None:
    (tmp_path / "work").write_text("a file")
    with pytest.raises(ConfigError, match="SFT_RUNTIME__WORK_DIR="):
        look(published[0], tmp_path)


def edit_weights(slot: Path, change: Callable[[dict[str, Any]], None]) -> None:
    weights = load_file(slot / WEIGHTS)
    change(weights)
    save_file(weights, slot / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda slot: configure(slot, lora_alpha=1), f"{CONFIG}: lora_alpha is 1, and it was trained with 32"),
        (
            lambda slot: configure(slot, base_model_name_or_path="org/other"),
            f"{CONFIG}: base_model_name_or_path is org/other, and it was trained with /nowhere/model",
        ),
        (lambda slot: (slot / CONFIG).write_text("{"), f"{CONFIG}: can't be read"),
        (lambda slot: (slot / CONFIG).unlink(), f"{CONFIG}: isn't listed by the manifest"),
        (
            lambda slot: edit_weights(slot, lambda weights: weights.pop(f"{Q_PROJ}.lora_B.weight")),
            f"{WEIGHTS}: no B for {Q_PROJ}",
        ),
        (
            lambda slot: configure(slot, target_modules=["q_proj", "lm_head"]),
            f"{WEIGHTS}: no LoRA for lm_head",
        ),
        (
            lambda slot: configure(slot, modules_to_save=["embed_tokens"], trainable_token_indices={"lm_head": [1]}),
            f"{WEIGHTS}: no weights of embed_tokens; no rows for the 1 new tokens of lm_head",
        ),
        (lambda slot: (slot / WEIGHTS).write_bytes(b"\xff" * 20), f"{WEIGHTS}: isn't a safetensors file that is whole"),
    ],
)
def test_a_slot_whose_adapter_was_wrong_from_the_beginning(
    published: tuple[Path, TrainPlan],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    slot, plan = published
    damage(slot)
    list_slot(slot, plan)
    with pytest.raises(DataError, match="is damaged"):
        look(slot, tmp_path)
    assert f"\n  {said}" in capsys.readouterr().out


def test_no_manifest_and_one_that_is_none(published: tuple[Path, TrainPlan], tmp_path: Path) -> None:
    slot, plan = published
    for content in ("{", "{}", '{"run_id": "a", "files": []}'):
        (slot / "manifest.json").write_text(content)
        with pytest.raises(DataError, match=r"is damaged: manifest\.json"):
            look(slot, tmp_path)
    list_slot(slot, plan)
    manifest = (slot / "manifest.json").read_text()
    (slot / "manifest.json").write_text(manifest.replace(f'"{CONFIG}"', f'"../{CONFIG}"'))
    with pytest.raises(DataError, match=r"is damaged: manifest\.json"):
        look(slot, tmp_path)
    (slot / "manifest.json").unlink()
    with pytest.raises(NotFoundError, match=r"there is no manifest\.json"):
        look(slot, tmp_path)


@pytest.mark.parametrize(
    ("settings", "tied", "new_tokens"),
    [
        ({"LORA__DORA": "true"}, True, [NewTokenInput(id=100, piece_ids=[11])]),
        ({"LORA__DORA": "true"}, False, [NewTokenInput(id=100, piece_ids=[11])]),
        ({"LORA__MODULES_TO_SAVE": "embed_tokens,lm_head"}, True, []),
        ({"LORA__MODULES_TO_SAVE": "lm_head", "LORA__TARGET_MODULES": "model.layers.1.self_attn.q_proj"}, False, []),
        ({"LORA__TARGET_MODULES": "q_proj,lm_head", "LORA__R": "1"}, False, []),
    ],
    ids=str,
)
def test_every_kind_of_adapter_has_what_it_promises(
    plan_for: PlanFor, tmp_path: Path, settings: dict[str, str], tied: bool, new_tokens: list[NewTokenInput]
) -> None:
    plan, root = make_small_plan(plan_for, TRAIN__MAX_STEPS=1, **settings), tmp_path / "run"
    train_here(
        plan, save_llama(tmp_path / "base", tied=tied), root, new_tokens=new_tokens, vocabulary=100 + len(new_tokens)
    )
    config = json.loads((root / "adapter" / CONFIG).read_text())
    shapes = read_shapes(root / "adapter" / WEIGHTS)
    assert shapes == {name: list(weight.shape) for name, weight in load_file(root / "adapter" / WEIGHTS).items()}
    assert find_odd_tensors(config, shapes) == []
    assert find_odd_tensors(config | {"r": 7}, shapes) != []
    assert find_odd_tensors(config, {name: shapes[name] for name in shapes if "lora_A" not in name}) != []


def write_file(path: Path, header: object, data: bytes) -> Path:
    content = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ([], b""),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"123"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12341234"),
        ({"a": {"dtype": "F32"}}, b""),
        ({"a": 1}, b""),
    ],
)
def test_a_file_that_is_not_whole_is_no_safetensors_file(tmp_path: Path, header: object, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"it |list"):
        read_shapes(write_file(tmp_path / "file", header, data))


def test_a_base_model_is_loaded_onto_where_it_is_at_hand(
    plan_for: PlanFor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_llama(tmp_path / "base", tied=True)
    plan = partial(make_small_plan, plan_for)(TRAIN__MAX_STEPS=1).model_copy(update={"model_id": str(base)})
    train_here(plan, base, tmp_path / "run")
    slot = (tmp_path / "run" / "adapter").rename(tmp_path / "slot")
    configure(slot, base_model_name_or_path=name_base_model(str(base), plan.model_revision)[0], revision=None)
    list_slot(slot, plan)
    look(slot, tmp_path)
    assert f"was not tried: the base model at {base} is another one now" in capsys.readouterr().out
