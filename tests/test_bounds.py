"""A launch in which every address is looked at, in this process and in one of its own."""

import subprocess

import pytest
import torch

from labutils import bounds, runtime

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


def test_a_launch_that_fails_for_another_reason_is_an_error(monkeypatch):
    monkeypatch.setattr(runtime, "interpreted", False)
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="ValueError: no such constant")
    monkeypatch.setattr(subprocess, "run", lambda *a, **kw: failed)
    with pytest.raises(RuntimeError, match="in its own process:\nValueError: no such constant"):
        bounds.out_of_bounds(copy_rows_kernel, (1,), torch.zeros(1))
