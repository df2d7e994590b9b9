"""Models built from configurations, for a machine without a network, and the figures that are printed at the end."""

from pathlib import Path

import pytest
from bare_model import save_bare_model

FIGURES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if figures := terminalreporter.config.stash[FIGURES]:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.write_line(figure)


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> list[str]:
    """Lines to print when all tests are done."""
    return request.config.stash[FIGURES]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of 4 million parameters."""
    return save_bare_model(tmp_path_factory.mktemp("small") / "model", tied=True, hidden_size=256, layers=4)


@pytest.fixture(scope="session")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of 0.7 billion parameters, so that weights and activations are what fills the memory."""
    folder = tmp_path_factory.mktemp("large") / "model"
    return save_bare_model(folder, tied=False, hidden_size=2048, layers=16, vocabulary_size=32_000, dtype="bfloat16")


@pytest.fixture(scope="session")
def slot_of_plain_run(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """What a run without any special setting published: the reference for the others."""
    from gpu_training import train

    folder = tmp_path_factory.mktemp("plain")
    train(folder / "run", small_model)
    return folder / "run" / "slot"
