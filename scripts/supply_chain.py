"""Say what the package is made of, and check that vendored files are those of their publishers.

    python scripts/supply_chain.py sbom [FILE]         CycloneDX JSON of this environment and the page
    python scripts/supply_chain.py vendored [FOLDER]   compare with the packages of `npm pack`

FOLDER has the packages of MANIFEST.json, such as diff-9.0.0.tgz; without it, npm fetches them. Their
hashes are those that MANIFEST.json records.
"""

import base64
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

VENDOR = Path(__file__).resolve().parents[1] / "ray_detox/viewer/static/vendor"
Package = dict[str, Any]


def manifest(vendor: Path) -> list[dict[str, Any]]:
    """Return the vendored libraries as MANIFEST.json lists them."""
    found: list[dict[str, Any]] = json.loads((vendor / "MANIFEST.json").read_text("utf-8"))
    return found


# ---- what it is made of ----------------------------------------------------------------------


def sbom(vendor: Path = VENDOR) -> dict[str, Any]:
    """Return a software bill of materials: CycloneDX 1.6 as JSON values, the same for equal content.

    Packages that the package itself needs have the scope `required`, others of this environment
    (extras, tools for development) `optional`.
    """
    installed = {_name(d.metadata["Name"]): d for d in importlib.metadata.distributions()}
    own = installed.pop("ray-detox")
    needs = {name: _needs(each, installed) for name, each in installed.items()}
    needs["ray-detox"] = _needs(own, installed)
    required, todo = set[str](), ["ray-detox"]
    while todo:
        new = needs[todo.pop()] - required
        required |= new
        todo += new
    libraries = [
        _component(each, "required" if name in required else "optional")
        for name, each in sorted(installed.items())
    ]
    vendored = [
        {
            "type": "library",
            "bom-ref": f"pkg:npm/{each['name']}@{each['version']}",
            "name": each["name"],
            "version": each["version"],
            "purl": f"pkg:npm/{each['name']}@{each['version']}",
            "scope": "required",
            "licenses": [{"license": {"id": each["licence"]}}],
            "hashes": [{"alg": "SHA-512", "content": _from_integrity(each["integrity"]).hex()}],
        }
        for each in manifest(vendor)
    ]
    root = _component(own, None) | {"type": "application"}
    refs = {name: _ref(each) for name, each in {**installed, "ray-detox": own}.items()}
    dependencies: list[dict[str, Any]] = [
        {"ref": refs[name], "dependsOn": sorted(refs[other] for other in needs[name])}
        for name in sorted(needs)
    ]
    root_needs = next(each for each in dependencies if each["ref"] == refs["ray-detox"])
    root_needs["dependsOn"] += [each["bom-ref"] for each in vendored]
    content = {
        "metadata": {"component": root},
        "components": [*libraries, *vendored],
        "dependencies": dependencies,
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        **content,
    }


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _ref(distribution: importlib.metadata.Distribution) -> str:
    return f"pkg:pypi/{_name(distribution.metadata['Name'])}@{distribution.version}"


def _component(distribution: importlib.metadata.Distribution, scope: str | None) -> dict[str, Any]:
    ref = _ref(distribution)
    found = {
        "type": "library",
        "bom-ref": ref,
        "name": distribution.metadata["Name"],
        "version": distribution.version,
        "purl": ref.replace("+", "%2B"),
    }
    licences = distribution.metadata.get_all("License-Expression")
    return (
        found
        | ({"scope": scope} if scope else {})
        | ({"licenses": [{"expression": licences[0]}]} if licences else {})
    )


def _needs(
    distribution: importlib.metadata.Distribution, installed: Package, extras: Iterable[str] = ()
) -> set[str]:
    """Return the installed packages that a package with some extras requires."""
    found = set()
    for each in map(Requirement, distribution.requires or ()):
        name = _name(each.name)
        applies = each.marker is None or any(
            each.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        )
        if applies and name in installed:
            found.add(name)
            if each.extras:
                found |= _needs(installed[name], installed, each.extras)
    return found


# ---- vendored files --------------------------------------------------------------------------


def differences(folder: Path, vendor: Path = VENDOR) -> list[str]:
    """Compare vendored files with the packages of their publishers.

    Args:
        folder: has the packages as `npm pack` names them.
        vendor: folder with MANIFEST.json.

    Returns:
        One sentence for each package or file that is not as recorded.
    """
    found = []
    for library in manifest(vendor):
        file = folder / f"{library['name']}-{library['version']}.tgz"
        if not file.is_file():
            found.append(f"{file} is missing.")
        elif hashlib.sha512(file.read_bytes()).digest() != _from_integrity(library["integrity"]):
            found.append(f"{file.name} is not the package whose hash MANIFEST.json records.")
        else:
            found += _differing_files(library, file, vendor)
    return found


def _differing_files(library: dict[str, Any], package: Path, vendor: Path) -> list[str]:
    found = []
    unknown = library["files"].keys() - library["published"].keys()
    found += [f"{name} names no file of {package.name}." for name in sorted(unknown)]
    with tarfile.open(package) as archive:
        for name, parts in library["published"].items():
            texts = []
            for part in parts:
                member = archive.extractfile(f"package/{part}")
                assert member is not None, f"{part} in {package.name} is not a file"
                texts.append(member.read().decode())
            text = "".join(texts)
            for pattern, replacement in library["edits"] if len(parts) > 1 else ():
                text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
            ours = (vendor / name).read_text("utf-8")
            # A joined file begins with comments that say where it is from.
            head = ours.removesuffix(text) if ours.endswith(text) else None
            if head is None or not all(line.startswith("// ") for line in head.splitlines()):
                found.append(f"{name} is not {' and '.join(parts)} of {package.name}.")
    return found


def _from_integrity(text: str) -> bytes:
    return base64.b64decode(text.removeprefix("sha512-"))


def _fetch(folder: str) -> None:
    names = [f"{each['name']}@{each['version']}" for each in manifest(VENDOR)]
    subprocess.run(["npm", "pack", "--silent", "--ignore-scripts", *names], cwd=folder, check=True)


def main(words: list[str]) -> int:
    match words:
        case ["sbom", *target] if len(target) <= 1:
            text = json.dumps(sbom(), indent=2) + "\n"
            if target:
                Path(target[0]).write_text(text, encoding="utf-8")
            else:
                print(text, end="")
            return 0
        case ["vendored", *folders] if len(folders) <= 1:
            with tempfile.TemporaryDirectory() as temporary:
                if not folders:
                    _fetch(temporary)
                found = differences(Path(folders[0] if folders else temporary))
            print("\n".join(found) or "All vendored files are those of their publishers.")
            return 1 if found else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
