"""What all tests share: labutils imported first, the `gpu` marker, seeds, the environment of notebooks."""

import importlib.util
import os

# Before anything can import triton: on a machine without a GPU this switches its interpreter on.
from labutils import runtime
from labutils.commands.lab import environment_for_kernels

import pytest  # isort: skip
import torch  # isort: skip

# No test may need the network; a download that somebody slips in fails at once, here as in the notebooks'
# kernels.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if importlib.util.find_spec("hypothesis"):  # the notebooks can be executed without it
    from hypothesis import settings

    # The interpreter's first call is slow, so no deadline. In CI the same examples each time: a failure there
    # is the change's own; elsewhere new ones each time, to find more.
    settings.register_profile("lab", deadline=None, print_blob=True)
    settings.register_profile("ci", settings.get_profile("lab"), derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "lab")


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
    """Runs a notebook with the environment that JupyterLab would give it."""
    if not getattr(item, "nbmake", False):
        return (yield)
    ours = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment_for_kernels())
    try:
        return (yield)
    finally:
        os.environ.clear()
        os.environ.update(ours)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same seed, whichever ran before it."""
    torch.manual_seed(0)
