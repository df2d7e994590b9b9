"""How fast data is prepared, and in how much memory: `make bench-data`.

For each size, conversations are put into a real S3 server and `sft-job check` prepares them in a process of its own,
whose memory and that of its workers is read from the kernel. Then a sample is tokenised in turns by the job and by the
bare `tokenizers` library, which gets finished texts and returns no more than its own encodings.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from base_model import get_tiny_model
from job_cli import job_environment, start_job
from seaweed import SeaweedFS

from job.data import Encoders, RowOptions, SourceFile, load_tokenizer, tokenize_files

BUCKET = "bench"
ROUNDS = 3
BATCH_ROWS = 1_000
SAMPLE_INTERVAL_S = 0.1
SENTENCES = 20_000
WORDS = (
    "order delivery parcel refund invoice customer address account password payment card shop opening holiday summer "
    "winter jacket shoes size colour blue green price discount voucher weekend morning evening tomorrow yesterday "
    "quickly slowly carefully because although therefore however perhaps certainly please thank sorry help answer "
    "question problem solution device charger battery screen keyboard warranty repair receipt exchange return store "
    "city street number twelve forty seventeen first second the a this that these which who where when how why is are "
    "was were will can could should would may must have has had do does did not and or but if then with without for "
    "from into over under between before after during again always never often sometimes I you we they it my your our"
)


@dataclass(frozen=True)
class Measured:
    """One size: what was read, how long it took from the first row to the last, and the most memory."""

    size_mb: int
    rows: int
    size_bytes: int
    seconds: float
    parent_mib: float
    workers: int
    worker_mib: float  # of the largest


def make_rows(size_bytes: int) -> Iterator[bytes]:
    """Yield JSON lines of conversations with some 150 to 300 tokens, always the same ones."""
    generator = random.Random(7)
    words = WORDS.split()
    sentences = [" ".join(generator.choices(words, k=generator.randint(8, 16))) + "." for _ in range(SENTENCES)]
    made_bytes = 0
    while made_bytes < size_bytes:
        messages = []
        for turn in range(generator.choice((2, 2, 4))):
            content = " ".join(generator.choices(sentences, k=generator.randint(3, 6)))
            messages.append({"role": "assistant" if turn % 2 else "user", "content": content})
        line = json.dumps({"messages": messages}).encode() + b"\n"
        made_bytes += len(line)
        yield line


def write_rows(path: Path, size_bytes: int) -> int:
    """Write them to a file; return their number."""
    rows = 0
    with path.open("wb") as file:
        for line in make_rows(size_bytes):
            file.write(line)
            rows += 1
    return rows


# -- memory and rows a second ------------------------------------------------------------------------------------------


def measure_check(server: SeaweedFS, size_mb: int, scratch: Path) -> Measured:
    """Put a data set of `size_mb` MB into the store and let `sft-job check` prepare it."""
    source = scratch / "rows.jsonl"
    rows = write_rows(source, size_mb * 1_000_000)
    size_bytes = source.stat().st_size
    key = f"rows-{size_mb}.jsonl"
    client = server.client()
    client.upload_file(str(source), BUCKET, key)
    source.unlink()
    environment = job_environment(
        scratch, MODEL__ID=get_tiny_model(), DATA__URI=f"s3://{BUCKET}/{key}", OUTPUT__URI=f"s3://{BUCKET}/out"
    )
    environment |= server.environment()
    seconds, peaks = _follow(environment)
    client.delete_object(Bucket=BUCKET, Key=key)
    client.close()
    shutil.rmtree(scratch / "work")
    parent, *workers = peaks
    return Measured(size_mb, rows, size_bytes, seconds, parent, len(workers), max(workers, default=0.0))


def _follow(environment: dict[str, str]) -> tuple[float, list[float]]:
    """Run the job; return the seconds of its tokenizing, and the peak MiB of the job and of each worker."""
    began_s = ended_s = 0.0
    output = []
    with start_job(environment, "check") as process:
        peaks = _Peaks(process.pid)
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if "== tokenizing" in line:
                began_s = time.monotonic()
            elif "the plan:" in line:
                ended_s = time.monotonic()
        peaks.stop()
    if process.returncode != 0:
        raise SystemExit("".join(output))
    return ended_s - began_s, peaks.read()


class _Peaks(threading.Thread):
    """Reads, until it is stopped, the most memory that a process and its children have ever held."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        self._parent = psutil.Process(pid)
        self._peaks_kib: dict[int, int] = {pid: 0}
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_INTERVAL_S):
            try:
                workers = [child for child in self._parent.children() if "spawn_main" in " ".join(child.cmdline())]
            except psutil.NoSuchProcess:
                continue
            for process in (self._parent, *workers):
                self._peaks_kib[process.pid] = max(self._peaks_kib.get(process.pid, 0), _peak_kib(process.pid))

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def read(self) -> list[float]:
        """Return the peaks in MiB, the parent's first."""
        return [kib / 1024 for kib in self._peaks_kib.values()]


def _peak_kib(pid: int) -> int:
    """Return the high-water mark of a process's resident memory, 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


# -- speed against the bare library ------------------------------------------------------------------------------------


def compare_speed(sample_mb: int, scratch: Path) -> None:
    """Tokenise the same rows by the job and by the library, in turns, and print each round's times and the ratio."""
    tokenizer = load_tokenizer(get_tiny_model())
    source = scratch / "sample.jsonl"
    write_rows(source, sample_mb * 1_000_000)
    with source.open("rb") as file:
        texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in file]
    ratios = []
    print(
        f"\n{len(texts):,} rows, {sample_mb} MB, {psutil.cpu_count()} cores: the job, from file to file with a loaded "
        "tokenizer,\nagainst tokenizers' encode_batch alone, on finished texts; above 1 the job is faster"
    )
    for number in range(1, ROUNDS + 1):
        job_s, tokens = _time_job(source, scratch / f"tokens-{number}")
        bare_s = _time_bare(texts, tokenizer)
        ratios.append(bare_s / job_s)
        print(
            f"round {number}: job {job_s:.1f} s ({tokens / job_s:,.0f} tokens/s), bare {bare_s:.1f} s "
            f"({tokens / bare_s:,.0f} tokens/s), ratio {ratios[-1]:.2f}"
        )
    print(f"median ratio: {statistics.median(ratios):.2f}")


def _time_job(source: Path, folder: Path) -> tuple[float, int]:
    with Encoders(psutil.cpu_count() or 1) as encoders:
        encoders.start(source.stat().st_size)
        tokenizer = load_tokenizer(get_tiny_model())  # while they start, as in a run; what that takes longer counts
        began_s = time.monotonic()
        data = tokenize_files(
            [SourceFile(source, source.name, "")],
            tokenizer,
            RowOptions(),
            folder=folder,
            encoders=encoders,
            report=lambda rows, size_bytes: None,
        )
        seconds = time.monotonic() - began_s
    shutil.rmtree(folder)
    return seconds, int(data.lengths_tokens.sum())


def _time_bare(texts: list[str], tokenizer: Any) -> float:
    backend = tokenizer.backend_tokenizer
    began_s = time.monotonic()
    for start in range(0, len(texts), BATCH_ROWS):
        backend.encode_batch(texts[start : start + BATCH_ROWS], add_special_tokens=False)
    return time.monotonic() - began_s


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 1_000, 3_000], help="of the data sets, in MB")
    parser.add_argument("--sample", type=int, default=150, help="MB for the comparison of speeds")
    parser.add_argument("--folder", type=Path, help="where there is room for five times the largest size")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="sft-job-bench-") as name:
        scratch = Path(name)
        if arguments.sizes:
            with SeaweedFS(scratch / "store") as server:
                client = server.client()
                client.create_bucket(Bucket=BUCKET)
                client.close()
                print(" size MB       rows    rows/s   MB/s  parent MiB  workers x MiB", flush=True)
                for size_mb in arguments.sizes:
                    found = measure_check(server, size_mb, scratch)
                    print(
                        f"{size_mb:8,} {found.rows:10,} {found.rows / found.seconds:9,.0f} "
                        f"{found.size_bytes / 1e6 / found.seconds:6.2f} {found.parent_mib:11.0f} "
                        f"{found.workers:7} x {found.worker_mib:.0f}",
                        flush=True,
                    )
        compare_speed(arguments.sample, scratch)


if __name__ == "__main__":
    main()
