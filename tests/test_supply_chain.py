"""The bill of materials, and the comparison of vendored files with their publishers' packages."""

import base64
import hashlib
import importlib.metadata
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from scripts import supply_chain


@pytest.fixture(scope="module")
def bill():
    return supply_chain.sbom()


def test_the_bill_names_every_package_once_with_its_version(bill):
    refs = [component["bom-ref"] for component in bill["components"]]

    assert len(set(refs)) == len(refs)
    assert f"pkg:pypi/torch@{importlib.metadata.version('torch')}" in refs
    assert "pkg:npm/uplot@1.6.32" in refs
    assert bill["metadata"]["component"]["name"] == "ray-detox"
    assert bill["metadata"]["component"]["bom-ref"] not in refs
    assert json.loads(json.dumps(bill)) == bill


def test_the_bill_tells_what_the_package_needs_from_tools(bill):
    scopes = {component["name"]: component["scope"] for component in bill["components"]}

    # aiohttp-cors comes with the extra `default` of ray only.
    assert {scopes[name] for name in ("torch", "ray", "aiohttp-cors", "uplot")} == {"required"}
    assert {scopes[name] for name in ("pytest", "ruff", "mypy")} == {"optional"}


def test_every_dependency_is_a_component(bill):
    refs = {component["bom-ref"] for component in bill["components"]}
    refs.add(bill["metadata"]["component"]["bom-ref"])

    for each in bill["dependencies"]:
        assert {each["ref"], *each["dependsOn"]} <= refs


def test_equal_content_has_an_equal_bill(bill):
    assert supply_chain.sbom() == bill


def test_every_vendored_library_has_the_hash_of_its_package():
    for library in supply_chain.manifest(supply_chain.VENDOR):
        assert len(supply_chain._from_integrity(library["integrity"])) == 64
        assert library["published"].keys() == library["files"].keys()


# ---- vendored files --------------------------------------------------------------------------

BASE = b"export default class Diff {}\n"
ARRAY = b"import Diff from './base.js';\nexport const one = 1;\nexport function f() {}\n"
JOINED = "// Where it is from.\nclass Diff {}\nconst one = 1;\nexport function f() {}\n"


@pytest.fixture
def vendored(tmp_path):
    """A vendored library and its package; `vendored(**files)` compares with changed files."""

    def compare(joined=JOINED, licence="Free.", array=ARRAY):
        folder = tmp_path / "vendor"
        folder.mkdir(exist_ok=True)
        package = tmp_path / "lib-1.0.tgz"
        _pack(package, {"base.js": BASE, "array.js": ARRAY, "LICENSE": b"Free."})
        integrity = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
        library = {
            "name": "lib",
            "version": "1.0",
            "integrity": f"sha512-{integrity}",
            "published": {"lib.js": ["base.js", "array.js"], "lib.LICENSE": ["LICENSE"]},
            "edits": [
                ["^export default (?=class )", ""],
                ["^import .*\n", ""],
                ["^export (?=const )", ""],
            ],
            "files": {"lib.js": "", "lib.LICENSE": ""},
        }
        (folder / "MANIFEST.json").write_text(json.dumps([library]))
        (folder / "lib.js").write_text(joined)
        (folder / "lib.LICENSE").write_text(licence)
        if array != ARRAY:
            _pack(package, {"base.js": BASE, "array.js": array, "LICENSE": b"Free."})
        return supply_chain.differences(tmp_path, folder)

    return compare


def _pack(file, contents):
    with tarfile.open(file, "w:gz") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_files_that_are_the_publishers_differ_in_nothing(vendored):
    assert vendored() == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"joined": JOINED.replace("1", "2")},
            "lib.js is not base.js and array.js of lib-1.0.tgz.",
        ),
        ({"joined": f"fetch('//evil');\n{JOINED}"}, "lib.js is not base.js and array.js"),
        ({"joined": f"{JOINED}fetch('//evil');\n"}, "lib.js is not base.js and array.js"),
        ({"licence": "Free!"}, "lib.LICENSE is not LICENSE of lib-1.0.tgz."),
        ({"array": ARRAY + b"more"}, "lib-1.0.tgz is not the package whose hash MANIFEST.json"),
    ],
)
def test_a_file_that_was_changed_is_named(vendored, change, sentence):
    (found,) = vendored(**change)

    assert found.startswith(sentence)


def test_a_package_that_is_missing_is_named(tmp_path):
    found = supply_chain.differences(tmp_path)

    assert [line.endswith(".tgz is missing.") for line in found] == [True, True]


def test_the_libraries_of_the_page_are_those_of_their_publishers():
    packages = os.environ.get("RAY_DETOX_PACKAGES")
    if packages is None:
        pytest.skip("needs the packages of scripts/test_tools.sh (RAY_DETOX_PACKAGES)")

    assert supply_chain.differences(Path(packages)) == []
