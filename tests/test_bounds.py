"""A launch in which every address is looked at, in this process and in one of its own."""

import sys

import pytest
import torch

from labutils import runtime
from labutils.analysis import bounds

import triton  # isort: skip  after labutils, which switches its interpreter on
import triton.language as tl  # isort: skip


@triton.jit
def copy_rows_kernel(x_ptr, y_ptr, row_stride, n_columns, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    at = tl.program_id(0) * row_stride + offs
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=offs < n_columns), mask=offs < n_columns)


@pytest.mark.parametrize("interpreted", [pytest.param(True, marks=pytest.mark.skipif(not runtime.interpreted,
                         reason="kernels are compiled in this process")), False])  # fmt: skip
def test_a_read_past_the_end_is_told_with_its_program(monkeypatch, interpreted):
    monkeypatch.setattr(runtime, "interpreted", interpreted)  # False: in a process of its own
    x = torch.randn(4, 10, device=runtime.device)
    wrong = bounds.out_of_bounds(copy_rows_kernel, (4,), x, torch.empty_like(x), 10, 12, BLOCK=16)
    assert "copy_rows_kernel" in wrong and "(3, 0, 0)" in wrong and "`x`" in wrong and "8 bytes after" in wrong
    if interpreted:
        assert bounds.out_of_bounds(copy_rows_kernel, (4,), x, torch.empty_like(x), 10, 10, BLOCK=16) is None


@pytest.fixture
def apart(monkeypatch):
    """Launches in a process of their own, which the test begins without."""
    monkeypatch.setattr(runtime, "interpreted", False)
    monkeypatch.setattr(bounds, "_child", None)
    yield
    if bounds._child is not None:
        bounds._child.kill()
        bounds._child.wait()


def launch(**constants):
    x = torch.zeros(1, 10)
    return bounds.out_of_bounds(copy_rows_kernel, (1,), x, torch.empty_like(x), 10, 10, **constants)


def test_one_process_does_all_launches_also_after_one_that_fails(apart):
    assert launch(BLOCK=16) is None
    child = bounds._child
    with pytest.raises(RuntimeError, match=r"in its own process:\n(.|\n)*BLOCK"):
        launch()  # without its constant
    assert launch(BLOCK=16) is None
    assert bounds._child is child


def test_a_process_that_ends_is_an_error_and_the_next_launch_starts_another(apart, monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such interpreter\n", encoding="utf-8")
    broken.chmod(0o755)
    with monkeypatch.context() as context:
        context.setattr(sys, "executable", str(broken))
        with pytest.raises(RuntimeError, match="the process of the launch ended:\nno such interpreter"):
            launch(BLOCK=16)
    assert bounds._child is None
    assert launch(BLOCK=16) is None
    bounds._child.kill()
    bounds._child.wait()
    assert launch(BLOCK=16) is None
