"""Writes what an image holds, of Debian and of Python, as a CycloneDX document to stdout: `sbom.py docker IMAGE`.

Both lists come from the image itself, by dpkg and by the metadata of the installed packages.
"""

import json
import subprocess
import sys
from collections.abc import Iterator

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

_LIST_PYTHON = """
import importlib.metadata, json
packages = [found.metadata for found in importlib.metadata.distributions()]
print(json.dumps([[item["Name"], item["Version"], item["License-Expression"]] for item in packages]))
"""
_DPKG_FORMAT = r"${binary:Package}\t${Version}\t${Architecture}\n"


def main(docker: str, image: str) -> None:
    """Print the document of an image, its components sorted by name."""
    name, _, version = image.rpartition(":")
    whole = Component(type=ComponentType.CONTAINER, name=name, version=version, bom_ref=image)
    bom = Bom(components=[*_debian_packages(docker, image), *_python_packages(docker, image)])
    bom.metadata.component = whole
    bom.register_dependency(whole, bom.components)
    print(JsonV1Dot6(bom).output_as_string(indent=2))


def _debian_packages(docker: str, image: str) -> Iterator[Component]:
    for line in _run(docker, image, "dpkg-query", "--show", f"--showformat={_DPKG_FORMAT}").splitlines():
        name, version, architecture = line.split("\t")
        name = name.partition(":")[0]  # dpkg writes libc6:amd64
        purl = PackageURL("deb", "debian", name, version, {"arch": architecture})
        yield Component(name=name, version=version, purl=purl, bom_ref=str(purl))


def _python_packages(docker: str, image: str) -> Iterator[Component]:
    for name, version, expression in json.loads(_run(docker, image, "python", "-c", _LIST_PYTHON)):
        purl = PackageURL("pypi", None, name, version)
        licenses = [LicenseFactory().make_from_string(expression)] if expression else []
        yield Component(name=name, version=version, purl=purl, bom_ref=str(purl), licenses=licenses)


def _run(docker: str, image: str, program: str, *arguments: str) -> str:
    command = [docker, "run", "--rm", "--network", "none", "--entrypoint", program, image, *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    main(*sys.argv[1:])
