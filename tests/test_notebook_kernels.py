"""The kernels that notebook 02 writes, taken from its cells: against the oracle, and compiled for real GPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labutils import runtime
from labutils.attention.reference import causal_mask, check_attention, check_gradients, judge

NOTEBOOK = Path(__file__).resolve().parent.parent / "02-FlashAttention_Demo.ipynb"
KERNELS = ("kernel-first", "kernel-v1", "kernel-v2", "kernel-dkdv", "kernel-dq")
WRAPPERS = ("wrapper-first", "wrapper-v1", "wrapper-v2", "wrapper-backward", "wrapper-autograd")
DTYPES = [torch.float32, torch.float16]
if runtime.capability is None or runtime.capability >= (8, 0):
    DTYPES.append(torch.bfloat16)


def cell(tag):
    """Source of the one cell with a tag."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    found = ["".join(c["source"]) for c in cells if tag in c["metadata"].get("tags", [])]
    assert len(found) == 1, f"{NOTEBOOK.name} must have one cell with the tag {tag!r}, and has {len(found)}"
    return found[0]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """The tagged cells as a module; in a file, since Triton reads the source of a kernel from there."""
    path = tmp_path_factory.mktemp("notebook") / "notebook_kernels.py"
    path.write_text("\n\n\n".join(map(cell, ("imports", *KERNELS, *WRAPPERS))), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("notebook_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(batch, n, heads, head_dim, dtype, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(3, batch, n, heads, head_dim, generator=generator) * spread
    return [t.to(runtime.device, dtype) for t in qkv]


def check(notebook, q, k, v, **kwargs):
    check_attention(notebook.notebook_v1(q, k, v, **kwargs), q, k, v, **kwargs).raise_if_failed()
    out, lse = notebook.notebook_v2(q, k, v, return_lse=True, **kwargs)
    assert out.dtype == q.dtype
    check_attention(out, q, k, v, lse=lse, **kwargs).raise_if_failed()


def check_backward(notebook, q, k, v, **kwargs):
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = notebook.notebook_flash(*leaves, **kwargs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad(out, leaves, dout)
    for gradient, verdict in zip(gradients, check_gradients(gradients, dout, q, k, v, **kwargs), strict=True):
        assert gradient.dtype == q.dtype
        verdict.raise_if_failed()
    return gradients


@pytest.mark.parametrize("tag", ["imports", *KERNELS, *WRAPPERS])
def test_tagged_cells_exist(tag):
    assert cell(tag)


def test_every_line_that_v1_does_not_have_is_marked_new():
    def lines(tag):
        source = cell(tag).replace("flash_v2_kernel", "flash_v1_kernel")
        split = [line.partition("#") for line in source.splitlines()]
        return [(code.strip(), comment.strip()) for code, _, comment in split if code.strip()]

    of_v1, of_v2 = (Counter(code for code, _ in lines(tag)) for tag in ("kernel-v1", "kernel-v2"))
    marked = Counter(code for code, comment in lines("kernel-v2") if comment.startswith("New"))
    assert marked == of_v2 - of_v1


@pytest.mark.parametrize("columns", [1, 7, 64, 100])
def test_softmax(notebook, columns):
    x = torch.randn(5, columns).to(runtime.device)
    y = notebook.triton_softmax(x)
    judge(y, x.double().softmax(-1), x.softmax(-1), name="y").raise_if_failed()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 15, 128, 131, 200])
def test_lengths_and_dtypes(notebook, n, dtype, causal):
    check(notebook, *make(1, n, 2, 32, dtype), causal=causal)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_head_dimensions(notebook, head_dim):
    check(notebook, *make(1, 140, 1, head_dim, torch.float16), causal=True)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch=st.integers(1, 3),
    n=st.integers(1, 150),
    heads=st.integers(1, 3),
    causal=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([None, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_odd_shapes(notebook, batch, n, heads, causal, dtype, scale, seed):
    check(notebook, *make(batch, n, heads, 16, dtype, seed), causal=causal, softmax_scale=scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 15, 131])
def test_backward_at_odd_lengths(notebook, n, dtype, causal):
    check_backward(notebook, *make(2, n, 2, 32, dtype), causal=causal)


@pytest.mark.parametrize("head_dim", [16, 128])
def test_backward_head_dimensions_scale_and_strided_gradients(notebook, head_dim):
    q, k, v = make(1, 70, 2, head_dim, torch.float16)
    check_backward(notebook, q, k, v, causal=True, softmax_scale=0.2)
    o, lse = notebook.notebook_v2(q, k, v, return_lse=True)
    dout = torch.randn(1, 2, 70, head_dim).to(q).transpose(1, 2)
    direct = notebook.notebook_backward(dout.contiguous(), q, k, v, o, lse)
    by_autograd = torch.autograd.grad(
        notebook.notebook_flash(*(t.requires_grad_() for t in (q, k, v))), (q, k, v), dout
    )
    assert all(torch.equal(a, b) for a, b in zip(direct, by_autograd, strict=True))


def test_backward_of_large_scores_is_finite(notebook):
    check_backward(notebook, *make(1, 70, 1, 32, torch.float16, spread=8.0), causal=True)


def test_the_backward_refuses_grouped_heads(notebook):
    q, k, v = make(1, 20, 2, 16, torch.float32)
    with pytest.raises(NotImplementedError, match="one shape"):
        notebook.notebook_flash(q, k[:, :, :1], v[:, :, :1])


def test_large_scores_do_not_overflow(notebook):
    check(notebook, *make(1, 70, 1, 32, torch.float16, spread=8.0), causal=True)


def test_the_mask_that_v2_uses(notebook):
    n = 64
    zero, identity = torch.zeros(1, n, 1, n), torch.eye(n)[None, :, None]
    seen = notebook.notebook_v2(*(t.to(runtime.device) for t in (zero, zero, identity)), causal=True)[0, :, 0] > 0
    assert torch.equal(seen.cpu(), causal_mask(n, n))


def test_wrong_layouts_are_refused(notebook):
    q, k, v = make(1, 20, 2, 16, torch.float32)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    for attention in (notebook.notebook_v1, notebook.notebook_v2):
        with pytest.raises(AssertionError):
            attention(strided, k, v)
        with pytest.raises(AssertionError):
            attention(q, k[:, :10], v[:, :10])


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1000, 1024, 2048])
def test_long_sequences(notebook, n, dtype, causal):
    q, k, v = make(2, n, 4, 64, dtype)
    runs = []
    for _ in range(5):  # a missing barrier shows now and then
        check(notebook, q, k, v, causal=causal)
        runs.append(notebook.notebook_v1(q, k, v, causal=causal))
    assert all(torch.equal(runs[0], run) for run in runs[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_backward_of_long_sequences_is_the_same_every_time(notebook, head_dim, dtype, causal):
    first, second = (check_backward(notebook, *make(2, 1000, 4, head_dim, dtype), causal=causal) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# The interpreter accepts what a compile rejects, so the cells are compiled as well, for GPUs that need not be there:
# (architecture, dtype, D, BLOCK_M, BLOCK_N, causal).
COMPILE = """
import importlib.util, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = importlib.util.spec_from_file_location("kernels", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
assert not hasattr(kernels.softmax_kernel, "interpreted"), "this is the interpreter"

def compile(kernel, arch, constants, dtype):
    pointers = {"o_ptr": "*fp32" if "m_ptr" in kernel.arg_names else dtype}
    pointers |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "do_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), dtype)
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name, "*fp32")
            attrs[(i,)] = [["tt.divisibility", 16]]  # what a launch with PyTorch's tensors tells the compiler
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, "num_stages": 2})
    assert compiled.asm["cubin"]
    return [kernel.__name__, arch, compiled.metadata.shared, "mma" in compiled.asm["ptx"]]

results = [compile(kernels.softmax_kernel, arch, {"BLOCK": 128}, "*fp32") for arch in (80, 90)]
targets = json.loads(sys.argv[2])
for kernel, of in ((kernels.flash_v1_kernel, targets), (kernels.flash_v2_kernel, targets),
                   (kernels.dkdv_kernel, targets[1:]), (kernels.dq_kernel, targets[1:])):
    for arch, dtype, block, causal in of:
        constants = {"D": 64, "BLOCK_M": block, "BLOCK_N": block, "CAUSAL": causal}
        results.append(compile(kernel, arch, constants, dtype))
print(json.dumps(results))
"""
TARGETS = [(80, "*bf16", 64, True), (80, "*fp32", 32, False), (90, "*fp16", 64, True)]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may use


def test_kernels_compile_for_real_gpus(tmp_path):
    module = tmp_path / "kernels.py"
    header = "import triton\nimport triton.language as tl\n"
    module.write_text(header + "\n\n\n".join(map(cell, KERNELS)), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(module), json.dumps(TARGETS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 2 + 2 * len(TARGETS) + 2 * len(TARGETS[1:])
    for name, arch, shared, _ in results:
        assert shared <= SHARED_MEMORY[arch], f"{name} needs {shared} bytes of shared memory on sm_{arch}"
    of_attention = [mma for *_, mma in results[2:]]
    on_tensor_cores = [dtype != "*fp32" for _, dtype, *_ in (*TARGETS, *TARGETS, *TARGETS[1:], *TARGETS[1:])]
    assert of_attention == on_tensor_cores
