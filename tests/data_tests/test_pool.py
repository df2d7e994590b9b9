"""Several processes: the same result as one, the same errors, and nothing left of them however it ends."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from job.data import Encoders, RowOptions, SourceFile, TokenizedData, load_tokenizer, tokenize_files
from job.data import pool as pool_module
from job.data.reading import rows as rows_module
from job.errors import ERROR_BY_CODE, DataError, JobError, ResourcesError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(autouse=True)
def _always_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "WORKER_MIN_BYTES", 1)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.data.reading.lines.CHUNK_BYTES", 2_000)
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", 2_000)


def write_rows(path: Path, rows: list[Any]) -> SourceFile:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceFile(path, path.name, path.name)


def make_rows(count: int) -> list[Any]:
    """Rows of very different lengths, some of them bad in each way that there is."""
    rows: list[Any] = []
    for number in range(count):
        turns = [
            {"role": "user", "content": f"question {number} \u4f60\u597d"},
            {"role": "assistant", "content": "word " * (number * 37 % 101 + 1)},
        ]
        rows.append({"messages": turns})
    rows[count // 2] = 3
    rows[count // 3] = {"messages": []}
    rows[count // 4] = {"other": 1}
    return rows


def prepare(files: list[SourceFile], tokenizer: Any, folder: Path, processes: int, report: Any = None) -> TokenizedData:
    with Encoders(processes) as encoders:
        return tokenize_files(
            files,
            tokenizer,
            RowOptions(),
            folder=folder,
            encoders=encoders,
            report=report or (lambda rows, size_bytes: None),
        )


@pytest.mark.usefixtures("small_chunks")
def test_the_number_of_processes_changes_nothing(tmp_path: Path, tokenizer: Any) -> None:
    pairs = [{"prompt": "q", "completion": str(number)} for number in range(200)]
    files = [
        write_rows(tmp_path / "a.jsonl", make_rows(300)),
        write_rows(tmp_path / "b.json", pairs),
        write_rows(tmp_path / "c.jsonl", make_rows(300)[::-1]),
    ]
    one, three = (prepare(files, tokenizer, tmp_path / str(count), count) for count in (1, 3))
    assert one.rows_per_file == (297, 200, 297)
    assert one.path.read_bytes() == three.path.read_bytes()
    assert one.bad_rows_path.read_bytes() == three.bad_rows_path.read_bytes()
    assert one.bad_rows == 6
    for name, value in vars(one).items():
        other = vars(three)[name]
        if isinstance(value, np.ndarray):
            assert np.array_equal(value, other), name
        elif not isinstance(value, Path):
            assert value == other, name
    assert workers_of(psutil.Process()) == []


def test_workers_are_started_early_and_kept_for_the_next_data_set(tmp_path: Path, tokenizer: Any) -> None:
    first = write_rows(tmp_path / "first.jsonl", make_rows(300))
    second = write_rows(tmp_path / "second.jsonl", make_rows(200)[::-1])
    with Encoders(2) as encoders:
        encoders.start(1)
        assert workers_of(psutil.Process()) == []  # so little is done at once
        encoders.start(first.path.stat().st_size)
        started = [worker.process.pid for worker in encoders._workers]
        assert len(started) == 2
        results = []
        for number, file in enumerate((first, second)):
            tokenizer.chat_template = f"{{{{- '' }}}}{number}" + tokenizer.chat_template
            alone = prepare([file], tokenizer, tmp_path / f"alone-{number}", 1)
            folder = tmp_path / f"shared-{number}"
            data = tokenize_files(
                [file], tokenizer, RowOptions(), folder=folder, encoders=encoders, report=lambda *_: None
            )
            assert {worker.pid for worker in workers_of(psutil.Process())} == set(started)
            results.append((alone.path.read_bytes(), data.path.read_bytes()))
    assert all(alone == shared for alone, shared in results)
    assert workers_of(psutil.Process()) == []


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.usefixtures("small_chunks")
def test_an_error_in_a_worker_is_the_parents(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' }}"
        "{% if message['role'] != 'assistant' or loop.last %}{{ message['content'] }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    rows = [{"messages": turns}] * 100 + [{"messages": turns * 2}] * 100
    with pytest.raises(DataError, match=r"^a\.jsonl:101: messages\[1\]: the chat template rewrites") as caught:
        prepare([write_rows(tmp_path / "a.jsonl", rows)], tokenizer, tmp_path / "out", 2)
    assert "SFT_DATA__LOSS_ON=completion" in caught.value.hint
    assert workers_of(psutil.Process()) == []
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("error", ERROR_BY_CODE.values())
def test_errors_survive_being_sent(error: type[JobError]) -> None:
    sent = error("what", hint="remedy")
    sent.step = 3
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is error
    assert (str(received), received.message, received.hint, received.step) == ("what", "what", "remedy", 3)


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_worker_is_named(tmp_path: Path, tokenizer: Any) -> None:
    killed: list[int] = []

    def kill_one(rows: int, size_bytes: int) -> None:
        if not killed:
            worker = workers_of(psutil.Process())[0]
            killed.append(worker.pid)
            worker.kill()

    with pytest.raises(ResourcesError, match="a process that tokenized was killed, most likely because memory"):
        prepare([write_rows(tmp_path / "a.jsonl", make_rows(2_000))], tokenizer, tmp_path / "out", 2, kill_one)
    assert killed
    assert workers_of(psutil.Process()) == []
    assert list((tmp_path / "out").iterdir()) == []


class _StopError(BaseException):
    pass


@pytest.mark.usefixtures("small_chunks")
def test_a_stop_leaves_no_worker(tmp_path: Path, tokenizer: Any) -> None:
    def stop(rows: int, size_bytes: int) -> None:
        assert len(workers_of(psutil.Process())) == 2
        raise _StopError

    with pytest.raises(_StopError):
        prepare([write_rows(tmp_path / "a.jsonl", make_rows(500))], tokenizer, tmp_path / "out", 2, stop)
    assert workers_of(psutil.Process()) == []
    assert list((tmp_path / "out").iterdir()) == []


SCRIPT = """
import signal
import sys
from pathlib import Path
from job.data import Encoders, RowOptions, SourceFile, load_tokenizer, tokenize_files

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    rows, tokenizer, folder = map(Path, sys.argv[1:])
    with Encoders(2) as encoders:
        tokenize_files(
            [SourceFile(rows, rows.name, "")],
            load_tokenizer(tokenizer),
            RowOptions(),
            folder=folder,
            encoders=encoders,
            report=lambda rows, size_bytes: print(rows, flush=True),
        )
"""


def start_script(tmp_path: Path, tokenizer_folder: Path) -> subprocess.Popen[str]:
    """Start tokenising some 20 MB, in a process group of its own, and wait for the first chunk."""
    write_rows(tmp_path / "a.jsonl", make_rows(1_000) * 60)
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "a.jsonl", tokenizer_folder, tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(processes, timeout=30)
    assert left == []


def test_workers_die_with_a_killed_parent(tmp_path: Path, tokenizer_folder: Path) -> None:
    with start_script(tmp_path, tokenizer_folder) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(workers_of(psutil.Process(process.pid))) == 2
        process.kill()
        wait_until_gone(children)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    # What is left over is not taken for a result.
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".unfinished"]


def test_a_signal_to_the_whole_group_is_the_parents_alone(tmp_path: Path, tokenizer_folder: Path) -> None:
    with start_script(tmp_path, tokenizer_folder) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C on a terminal does
        wait_until_gone(children)
        assert process.stderr is not None
        errors = process.stderr.read()
    assert errors.count("Traceback") == 1  # this script's own; the job has a handler
    assert errors.strip().endswith("KeyboardInterrupt")
    assert list((tmp_path / "out").iterdir()) == []


MEMORY_SCRIPT = """
import resource
import sys
from pathlib import Path
from job.data import Encoders, RowOptions, SourceFile, load_tokenizer, tokenize_files

if __name__ == "__main__":
    tokenizer = load_tokenizer(Path(sys.argv[1]))
    for rows in map(Path, sys.argv[2:]):
        with Encoders(2) as encoders:
            data = tokenize_files(
                [SourceFile(rows, rows.name, rows.name)],
                tokenizer,
                RowOptions(),
                folder=rows.with_suffix(".out"),
                encoders=encoders,
                report=lambda rows, size_bytes: None,
            )
        print(data.rows_read, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_the_parents_memory_does_not_grow_with_the_data(tmp_path: Path, tokenizer_folder: Path) -> None:
    # Nearly all rows are bad, so that it is quick: the parent gets as much of a bad row as of a good one.
    good, bad = b'{"text": "good"}\n', b'{"text": 3, "padding": "%s"}\n' % (b"x" * 2_000)
    (tmp_path / "small.jsonl").write_bytes(good + bad * 3_000)
    (tmp_path / "large.jsonl").write_bytes(good + bad * 40_000)
    (tmp_path / "script.py").write_text(MEMORY_SCRIPT)
    command = [sys.executable, "script.py", str(tokenizer_folder), "small.jsonl", "large.jsonl"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    (small_rows, small_kib), (large_rows, large_kib) = (map(int, line.split()) for line in output.splitlines())
    assert (small_rows, large_rows) == (3_001, 40_001)
    assert large_kib - small_kib < 20_000  # the file has 80 MB
