"""The pairs that the lab was tested with, pyproject's bounds, the pins in tools/tested.txt and README's commands agree.

And `check` names a pair of PyTorch and Triton that was not tested.
"""

import importlib.metadata
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement  # pytest brings packaging along
from packaging.utils import canonicalize_name

from labutils.__main__ import main
from labutils.benchmark import environment
from labutils.machine import versions

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_TESTED = ("2.14.0", "3.7.0")

DIRECT = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]]


def pins():
    """Name -> version in tools/tested.txt."""
    lines = (ROOT / "tools" / "tested.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def needed():
    """Names of all packages that the lab and its tests need here, and of those that these need."""
    found, waiting = set(), list(DIRECT)
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), {"", *requirement.extras}
        if (name, *sorted(extras)) in found:
            continue
        found.add((name, *sorted(extras)))
        for text in importlib.metadata.distribution(name).requires or []:
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(further)
    return {name for name, *_ in found}


# -- pairs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", ["", "+cpu", "+cu130"])
def test_a_tested_pair_is_silent(build):
    for pair in versions.TESTED:
        assert versions.untested(pair.torch + build, pair.triton) is None


@pytest.mark.parametrize("pair", [NOT_TESTED, ("2.11.0", "3.9.0"), ("2.13.0.dev1", "3.7.1"), ("2.13.1+cpu", "3.7.1")])
def test_an_untested_pair_is_named(pair):
    told = versions.untested(*pair)
    assert told.startswith(f"torch {pair[0]} with triton {pair[1]}: not a pair that the lab was tested with")
    assert "2.13.0 with 3.7.1 (whole suite, no GPU)" in told


def test_no_triton_is_no_tested_pair():
    assert "triton missing" in versions.untested("2.13.0", None)


@pytest.mark.parametrize(("pair", "silent"), [(NOT_TESTED, False), (("2.11.0+cu130", "3.6.0"), True)])
def test_check_tells_so(monkeypatch, capsys, pair, silent):
    machine = replace(environment.environment(), torch=pair[0], triton=pair[1])
    monkeypatch.setattr(environment, "environment", lambda: machine)
    assert main(["check"]) == 0
    printed = capsys.readouterr().out
    assert main(["check", "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)["untested_versions"]
    if silent:
        assert "tested" not in printed and stored is None
    else:
        assert re.search(r"^  \[ \] tested versions +torch 2\.14\.0 with triton 3\.7\.0: not a pair", printed, re.M)
        assert stored in printed


# -- bounds and pins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_bounds_admit_what_was_tested_and_nothing_beyond(name):
    (bounds,) = (requirement.specifier for requirement in DIRECT if requirement.name == name)
    tested = [getattr(pair, name) for pair in versions.TESTED]
    assert all(bounds.contains(version) for version in tested)
    minors = [int(version.split(".")[1]) for version in tested]
    major = tested[0].split(".")[0]
    assert not bounds.contains(f"{major}.{min(minors) - 1}.99"), "older than any that was tested"
    assert not bounds.contains(f"{major}.{max(minors) + 1}.0"), "newer than any that was tested"


def test_what_the_lab_names_is_pinned_within_its_bounds():
    pinned = pins()
    for requirement in DIRECT:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_what_the_lab_needs_is_pinned():
    pinned = pins()
    try:
        names = needed()
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f"not all of the lab's requirements are installed here: {error}")
    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
    others = [name for name in sorted(installed) if name in pinned and installed[name] != pinned[name]]
    if others:
        pytest.skip(f"installed without tools/tested.txt: other versions of {', '.join(others)}, which may need others")
    for_cuda = re.compile(r"nvidia-|cuda-")  # what PyTorch's build for CUDA brings along
    missing = [f"{name}=={installed[name]}" for name in sorted(names - set(pinned)) if not for_cuda.match(name)]
    assert not missing, f"add to tools/tested.txt: {', '.join(missing)}"


def test_pins_are_plain_versions():
    for line in (ROOT / "tools" / "tested.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\d.]+(\.?post\d+)?", line), line


def test_the_pinned_pair_ran_the_whole_suite():
    pinned = pins()
    assert (pinned["torch"], pinned["triton"], versions.SUITE) in {(p.torch, p.triton, p.ran) for p in versions.TESTED}


def test_commands_of_the_readme_install_the_pins():
    blocks = re.findall(r"^```bash\n(.*?)\n```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if "python3 -m venv" in line]
    assert len(lines) == 2 and all(line.count(" -c tools/tested.txt ") == 1 for line in lines)
    (tests,) = (line for line in lines if "pytest" in line)
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == tests
