"""requirements.lock: exact versions within the ranges, whole, and named by every result."""

import hashlib
import importlib.metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from conftest import ROOT
from tools.results import collect

RANGES = ("requirements.txt", "requirements-dev.txt")


def locked():
    """{package: version}."""
    found = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, _, version = line.partition("==")
        assert canonicalize_name(name) not in found, f"{name} stands there twice"
        found[canonicalize_name(name)] = Version(version)
    return found


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]


def outside(found, wanted):
    """The requirements that {package: version} does not fulfil, as text."""
    return [
        str(requirement)
        for requirement in wanted
        if canonicalize_name(requirement.name) not in found
        or found[canonicalize_name(requirement.name)] not in requirement.specifier
    ]


@pytest.mark.parametrize("name", RANGES)
def test_the_lock_is_within_the_ranges(name):
    wanted = requirements(name)
    assert len(wanted) >= 10
    assert outside(locked(), wanted) == []


def test_a_version_outside_of_its_range_is_found():
    wanted = [Requirement("torch>=2.8,<3"), Requirement("numpy>=1.26,<3"), Requirement("tqdm>=4")]
    found = {"torch": Version("3.0"), "numpy": Version("2.1")}
    assert outside(found, wanted) == ["torch<3,>=2.8", "tqdm>=4"]


def test_versions_are_exact_and_for_any_machine():
    for name, version in locked().items():
        assert version.local is None, f"{name}=={version} is one machine's build"


def test_what_the_locked_packages_need_is_locked_too():
    """As far as they are installed here in the locked version."""
    found = locked()
    looked_at = 0
    for name, version in found.items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(installed.version.partition("+")[0]) != version:
            continue
        looked_at += 1
        for text in installed.requires or []:
            needed = Requirement(text)
            applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
            if not applies or needed.name == "setuptools":  # pip freeze leaves it out
                continue
            if needed.name.startswith(("nvidia-", "cuda-", "triton")):  # torch's, on a GPU alone
                continue
            assert outside(found, [needed]) == [], f"{name} needs {text}"
    if looked_at == 0:
        pytest.skip("no package is installed here in the locked version")


def test_a_result_names_the_lock_and_what_differs_from_it(monkeypatch):
    lock = ROOT / "requirements.lock"
    told = collect.lock()
    assert told["sha256"] == hashlib.sha256(lock.read_bytes()).hexdigest()
    real = importlib.metadata.version

    def pretended(name):
        if name == "numpy":
            return "1.0"
        if name == "tqdm":
            raise importlib.metadata.PackageNotFoundError
        if name == "torch":
            return str(locked()["torch"]) + "+cu128"
        return real(name)

    monkeypatch.setattr(collect.importlib.metadata, "version", pretended)
    differing = collect.lock()["differing"]
    assert differing["numpy"] == "1.0"
    assert "tqdm" not in differing and "torch" not in differing
