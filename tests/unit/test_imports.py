"""Which module may import what: one way only, heavy libraries where they belong, the environment in few hands."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODULES = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "job").rglob("*.py"))}
MAX_LINES = 320
READS_ENVIRONMENT = {
    "job/hardware.py",  # CUDA_VISIBLE_DEVICES
    "job/launch_command.py",  # what workers inherit
    "job/log.py",  # values to redact
    "job/nodes/node.py",  # JOB_COMPLETION_INDEX
    "job/report/svg.py",  # MPLBACKEND
    "job/settings.py",
    "job/train/worker.py",  # RANK
}


def imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def importers(*packages: str) -> set[str]:
    """Return the modules that import any of these packages, at their top or in a function."""
    return {
        module
        for module, path in MODULES.items()
        if any(is_within(name, packages) for name in imported_names(ast.parse(path.read_text())))
    }


def test_the_search_finds_imports() -> None:
    assert "job/train/model.py" in importers("torch")  # from torch import nn
    assert "job/train/worker.py" in importers("torch")  # within a function
    assert len(MODULES) > 30


def test_torch_is_the_workers() -> None:
    assert {module for module in importers("torch") if not module.startswith("job/train/")} == set()


def test_a_worker_begins_without_numpys_threads() -> None:
    """SIGTERM ends a process that has a thread from before the signal was blocked."""
    look = "import sys, job.train.worker; sys.exit('numpy' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], cwd=ROOT, check=False).returncode == 0


def test_charts_are_the_reports() -> None:
    assert {module for module in importers("matplotlib") if not module.startswith("job/report/")} == set()


def test_each_store_has_its_library_to_itself() -> None:
    of_s3 = importers("boto3", "botocore", "obstore", "s3transfer")
    assert {module for module in of_s3 if not module.startswith("job/storage/s3")} == set()
    assert {m for m in importers("huggingface_hub") if not m.startswith("job/storage/hub")} == set()


def test_imports_point_one_way() -> None:
    assert importers("job.__main__") == set()
    assert importers("job.train") <= {m for m in MODULES if m.startswith("job/train/")}
    assert {m for m in importers("job.storage", "job.train") if m.startswith("job/data/")} == set()
    settings = [module for module in MODULES if module.startswith("job/settings")]
    for leaf in ("job/cgroup.py", "job/errors.py", "job/hardware.py", "job/log.py", *settings):
        inner = {name for name in imported_names(ast.parse(MODULES[leaf].read_text())) if is_within(name, ("job",))}
        allowed = ("job.cgroup", "job.errors", *(module.removesuffix(".py").replace("/", ".") for module in settings))
        assert {name for name in inner if not is_within(name, allowed)} == set()
    for module in (m for m in MODULES if m.startswith(("job/data/", "job/storage/"))):
        inner = {name for name in imported_names(ast.parse(MODULES[module].read_text())) if is_within(name, ("job",))}
        allowed = ("job.errors", "job.log", "/".join(module.split("/")[:2]).replace("/", "."))
        assert {name for name in inner if not is_within(name, allowed)} == set()


def test_the_environment_is_read_in_few_places() -> None:
    readers = set()
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        if reads_environment(tree):
            readers.add(module)
    assert {module for module in readers if not module.startswith("job/storage/")} == READS_ENVIRONMENT


def reads_environment(tree: ast.AST) -> bool:
    """Say whether a module names os.environ or os.getenv."""
    attributes = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    return not {"os.environ", "os.environb", "os.getenv"}.isdisjoint(attributes | set(imported_names(tree)))


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_two(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= MAX_LINES
