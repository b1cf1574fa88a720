"""What all tests share: labutils imported first, the `gpu` marker, seeds, the environment of notebooks."""

import functools
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

# Two test processes share the cores; threads that wait for one another on a core that is taken spin in vain.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# Before anything can import triton: on a machine without a GPU this switches its interpreter on.
from labutils import runtime
from labutils.commands.lab import environment_for_kernels

import pytest  # isort: skip
import torch  # isort: skip

ROOT = Path(__file__).resolve().parent.parent

# No test may need the network; a download that somebody slips in fails at once, here as in the notebooks'
# kernels.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What somebody has tuned on this machine is not what is tested; notebooks inherit this.
os.environ["LABUTILS_LAUNCH_TABLE"] = "none"

if importlib.util.find_spec("hypothesis"):  # the notebooks can be executed without it
    from hypothesis import settings

    # The interpreter's first call is slow, so no deadline. In CI the same examples each time: a failure there
    # is the change's own; elsewhere new ones each time, to find more.
    settings.register_profile("lab", deadline=None, print_blob=True)
    settings.register_profile("ci", settings.get_profile("lab"), derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "lab")


def pytest_configure(config: pytest.Config) -> None:
    """Files are handed to processes as they are collected: xdist would begin with those of many tests.

    A notebook is one test, and the longest; last of all, it would leave the other processes waiting.
    """
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where the lab uses none."""
    if runtime.device.type == "cuda":
        return
    wish = os.environ.get("LABUTILS_DEVICE")
    reason = "needs a CUDA GPU, and " + (
        f"LABUTILS_DEVICE={wish} forbids it" if wish else "this machine has none that the lab can use"
    )
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Runs a notebook with the environment that JupyterLab would give it, as somebody who has solved nothing."""
    if not getattr(item, "nbmake", False):
        return (yield)
    ours, theirs = dict(os.environ), environment_for_kernels()
    os.environ.clear()
    os.environ.update(theirs)
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "progress.json"
        os.environ["LABUTILS_STATE"] = str(state)
        item.runtest = functools.partial(_run_as_shipped, item.runtest, Path(item.filename).name, state)
        try:
            return (yield)
        finally:
            os.environ.clear()
            os.environ.update(ours)


def files_in(checkout: Path) -> set[Path]:
    """What lies in a checkout and below its labutils, apart from what is hidden and what Python compiles."""
    inside = (path for path in (checkout / "labutils").rglob("*") if "__pycache__" not in path.parts)
    return {path for path in checkout.iterdir() if not path.name.startswith(".")} | set(inside)


def _run_as_shipped(run: Callable[[], None], notebook: str, state: Path) -> None:
    """Executes a notebook, and fails unless it leaves no file here and each of its checks has run and found a stub."""
    from labutils import exercises

    before = files_in(ROOT)
    run()
    made = sorted(str(path.relative_to(ROOT)) for path in files_in(ROOT) - before)
    if "LABUTILS_SAVE_RESULTS" not in os.environ:  # it may name a folder here
        assert not made, f"a checkout may be read-only, and {notebook} made {', '.join(made)}"
    found = json.loads(state.read_text(encoding="utf-8"))["exercises"] if state.is_file() else {}
    results = {name: found.get(name, {}).get("last", "its check did not run") for name in exercises.names(notebook[:2])}
    unexpected = {name: result for name, result in results.items() if result != "not yet"}
    assert not unexpected, f"as shipped, every exercise of {notebook} must be 'not yet': {unexpected}"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same seed, whichever ran before it."""
    torch.manual_seed(0)
