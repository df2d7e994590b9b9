"""How fast files go from S3 and to S3: `make bench-storage`.

The job's own storage, s5cmd, and boto3's own transfer move the same files to and from one real S3 server, in turns:
one object of 1 GiB, and 2,000 of 64 KiB. Each try is a process of its own, timed from the first request to the last,
for s5cmd with its start, which takes some 20 ms; what botocore takes to start, 0.1 s once in a process, is not counted.
The client's CPU seconds are told beside the rate, for client and server share the machine's cores. "unsynced" is the
job without a sync of each file, as the others have none: what waiting for the disk costs.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from job_cli import job_environment
from seaweed import SeaweedFS

RESULTS = Path(__file__).parent / "results" / "storage.md"
BIG_BYTES = 2**30
SMALL_BYTES = 64 * 2**10
SMALL_FILES = 2_000
CASES = {"big": "1 GiB in one object", "small": f"{SMALL_FILES:,} objects of 64 KiB"}
DIRECTIONS = ("download", "upload")
CLIENTS = ("job", "unsynced", "s5cmd", "boto3")
NOTES = """
The job compares what it downloads with the checksum that is stored with the object (here CRC-32 of the large one's
parts, as boto3 has uploaded it), or else with the ETag's MD5, and syncs the files to the disk before it calls them
done ("unsynced": no file is); what it uploads carries SHA-256 for the server to verify. boto3 uploads with its default
checksum, and verifies it on downloads that come in one answer. What s5cmd verifies was not examined. Neither s5cmd nor
boto3 waits for the disk.
"""


@dataclass(frozen=True)
class Took:
    """One try: wall time, and the CPU time of the client."""

    seconds: float
    cpu_s: float


# -- the clients, each in a process of its own -------------------------------------------------------------------------


def open_job(direction: str, folder: Path, uri: str) -> Callable[[], object]:
    """Return what moves them by what the job itself calls."""
    from job.storage import open_folder

    store = open_folder(uri, setting="SFT_DATA__URI")
    if direction == "download":
        return lambda: store.fetch(store.find(), folder, lambda _: None)
    return lambda: store.put_all([(path, path.name) for path in sorted(folder.iterdir())])


def open_unsynced(direction: str, folder: Path, uri: str) -> Callable[[], object]:
    """Return the same, without a sync of each file."""
    import job.storage.transfer

    job.storage.transfer.sync = lambda _: None
    return open_job(direction, folder, uri)


def open_boto3(direction: str, folder: Path, uri: str) -> Callable[[], object]:
    """Return what moves them by boto3's transfer manager with its defaults: 10 threads, parts of 8 MiB."""
    import boto3
    from boto3.s3.transfer import TransferConfig, create_transfer_manager
    from botocore.config import Config

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = boto3.session.Session().client("s3", config=Config(s3={"addressing_style": "path"}))

    def move() -> None:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        with create_transfer_manager(client, TransferConfig()) as manager:
            if direction == "download":
                keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
                futures = [manager.download(bucket, key, str(folder / key.removeprefix(prefix))) for key in keys]
            else:
                futures = [manager.upload(str(path), bucket, prefix + path.name) for path in folder.iterdir()]
            for future in futures:
                future.result()

    return move


def run_in_process(client: str, direction: str, folder: Path, uri: str) -> None:
    """Be the process of one try, and print what it took."""
    import boto3.s3.transfer  # noqa: F401 - what is imported is no transfer

    import job.storage.s3  # noqa: F401

    open_client = {"job": open_job, "unsynced": open_unsynced, "boto3": open_boto3}[client]
    move = open_client(direction, folder, uri)
    get_memory(folder)
    began_s, began_cpu_s = time.monotonic(), _cpu_s(resource.RUSAGE_SELF)
    move()
    print(json.dumps([time.monotonic() - began_s, _cpu_s(resource.RUSAGE_SELF) - began_cpu_s]))


def get_memory(folder: Path) -> None:
    """Have free memory at hand for the pages of the files that are written to a folder.

    A virtual machine gives free memory back to its host after a moment, and to get it again takes longer than to write
    to it: this hit whoever came after a pause, by a factor of three.
    """
    with tempfile.TemporaryFile(dir=folder.parent) as file:
        for _ in range(3 * BIG_BYTES // 2**24):  # with once as much, it still was missing now and then
            file.write(bytes(2**24))


def _cpu_s(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


# -- rounds ------------------------------------------------------------------------------------------------------------


def run_client(client: str, direction: str, folder: Path, uri: str, environment: dict[str, str]) -> Took:
    """Move everything once by one client."""
    os.sync()  # what the one before has left to be written is not this one's
    if client == "s5cmd":
        source, target = (f"{uri}*", f"{folder}/") if direction == "download" else (f"{folder}/", uri)
        command = [str(Path(sys.executable).parent / "s5cmd"), "--endpoint-url", environment["AWS_ENDPOINT_URL_S3"]]
        get_memory(folder)
        began_s, began_cpu_s = time.monotonic(), _cpu_s(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, "--log", "error", "cp", source, target], env=environment, check=True)
        return Took(time.monotonic() - began_s, _cpu_s(resource.RUSAGE_CHILDREN) - began_cpu_s)
    ended = subprocess.run(
        [sys.executable, __file__, "--client", client, direction, str(folder), uri],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    return Took(*json.loads(ended.stdout))


def measure(
    server: SeaweedFS, case: str, scratch: Path, rounds: int, clients: list[str]
) -> dict[tuple[str, str], list[Took]]:
    """Return what each round took, by direction and client; what arrives is compared with what was sent."""
    environment = job_environment(scratch) | server.environment()
    source = scratch / "source"
    make_files(case, source)
    uploaders = [name for name in clients if name != "unsynced"]
    found = defaultdict(list)
    for number in range(rounds):
        bucket = f"{case}-{number}"
        with closing(server.client()) as client:
            client.create_bucket(Bucket=bucket)
        turn = clients[number % len(clients) :] + clients[: number % len(clients)]
        for name in sorted(uploaders, key=turn.index):
            found["upload", name].append(run_client(name, "upload", source, f"s3://{bucket}/{name}/", environment))
        for name in turn:
            target = scratch / f"target-{number}-{name}"
            target.mkdir()
            # All download the same objects: those that boto3 has uploaded, as most have who use a job like this.
            uri = f"s3://{bucket}/{uploaders[-1]}/"
            found["download", name].append(run_client(name, "download", target, uri, environment))
            check_files(source, target)
            if case == "big":
                shutil.rmtree(target)
        delete_bucket(server, bucket)
    # Not before: where many files were deleted within a minute, ext4 takes longer to make new ones.
    for folder in [source, *scratch.glob("target-*")]:
        shutil.rmtree(folder)
    return found


def make_files(case: str, folder: Path) -> None:
    """Write the files of a case."""
    folder.mkdir()
    if case == "big":
        with (folder / "big.bin").open("wb") as file:
            for _ in range(BIG_BYTES // 2**24):
                file.write(os.urandom(2**24))
        return
    for number in range(SMALL_FILES):
        (folder / f"{number:05}.bin").write_bytes(os.urandom(SMALL_BYTES))


def check_files(source: Path, target: Path) -> None:
    """End the benchmark unless two folders hold the same."""
    if subprocess.run(["diff", "-rq", source, target], check=False).returncode != 0:
        raise SystemExit(f"{target} is not {source}")


def delete_bucket(server: SeaweedFS, bucket: str) -> None:
    """Remove a bucket with its objects, whose space this server then frees at once."""
    with closing(server.client()) as client:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            keys = [{"Key": item["Key"]} for item in page.get("Contents", [])]
            if keys:
                client.delete_objects(Bucket=bucket, Delete={"Objects": keys})  # type: ignore[typeddict-item]
        client.delete_bucket(Bucket=bucket)


def tabulate(case: str, found: dict[tuple[str, str], list[Took]], clients: list[str]) -> list[str]:
    """Return the rows of the table for a case."""
    size_mb = (BIG_BYTES if case == "big" else SMALL_FILES * SMALL_BYTES) / 1e6
    rows = []
    for direction in DIRECTIONS:
        for client in clients:
            tries = found[direction, client]
            if not tries:
                continue
            rates = [size_mb / one.seconds for one in tries]
            ratio = "1"
            if client != "s5cmd" and "s5cmd" in clients:
                pairs = zip(found[direction, "s5cmd"], tries, strict=True)
                ratio = f"{statistics.median(other.seconds / one.seconds for other, one in pairs):.2f}"
            cpu_s = statistics.median(one.cpu_s for one in tries)
            rows.append(
                f"| {CASES[case]} | {direction} | {client} | {statistics.median(rates):.0f} | "
                f"{min(rates):.0f} to {max(rates):.0f} | {ratio} | {cpu_s:.1f} |"
            )
    return rows


def main() -> None:
    """Measure, print a table, and write it beside the other results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--clients", nargs="*", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--folder", type=Path, help="where there is room for 11 GB")
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        client, direction, folder, uri = arguments.client
        run_in_process(client, direction, Path(folder), uri)
        return
    table = [
        "| files | direction | client | MB/s, median | of all rounds | ratio to s5cmd | client's CPU s |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="sft-job-bench-") as name:
        scratch = Path(name)
        with SeaweedFS(scratch / "store") as server:
            for case in arguments.cases:
                found = measure(server, case, scratch, arguments.rounds, arguments.clients)
                table += tabulate(case, found, arguments.clients)
    text = "\n".join(table)
    print(text)
    if arguments.cases == list(CASES) and arguments.clients == list(CLIENTS):
        head = f"`make bench-storage`: {arguments.rounds} rounds in turns, {os.cpu_count()} cores for client and server"
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(f"{head}; the ratio is the median of those of each round.\n\n{text}\n{NOTES}")


if __name__ == "__main__":
    main()
