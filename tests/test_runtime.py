"""The decision that comes before all others: GPU or interpreter, and that the interpreter is right."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from labutils import runtime

WITHOUT_GPU = {"LABUTILS_DEVICE": "cpu"}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LABUTILS_DEVICE")}
    code = textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", code], env=env | environment, capture_output=True, text=True, timeout=300
    )


def test_import_is_light():
    result = run_python(
        """
        import sys
        import labutils
        heavy = {"transformers", "matplotlib", "pandas", "tokenizers", "IPython"} & set(sys.modules)
        assert not heavy, heavy
        """
    )
    assert result.returncode == 0, result.stderr


def test_interpreter_is_switched_on_whatever_comes_next():
    result = run_python(
        """
        from labutils import runtime
        import triton, triton.language as tl
        assert runtime.interpreted and runtime.device.type == "cpu" and runtime.dtype.itemsize == 4
        assert triton.knobs.runtime.interpret
        assert type(tl.max).__name__ == "InterpretedFunction"
        """,
        **WITHOUT_GPU,
    )
    assert result.returncode == 0, result.stderr


def test_triton_imported_first_is_an_error_that_says_restart():
    result = run_python("import triton, labutils", **WITHOUT_GPU)
    assert result.returncode != 0
    assert "Restart the kernel" in result.stderr and "import labutils first" in result.stderr
    assert "set TRITON_INTERPRET=1 in its environment" in result.stderr  # F38


def test_import_whatever_the_default_device_is():
    """F20: as if a model is built without memory, and imports its attention on the way."""
    result = run_python(
        """
        import torch
        torch.set_default_device("meta")
        from labutils import flash_attn_func, runtime
        q = torch.ones(1, 4, 1, 16, device=runtime.device)
        assert flash_attn_func(q, q, q).allclose(q)
        """,
        **WITHOUT_GPU,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not runtime.interpreted, reason="needs the interpreter")
@pytest.mark.parametrize("default", ["meta", "cuda"])
def test_self_test_whatever_the_default_device_is(default):
    """F20."""
    from labutils.machine import interpreter

    with torch.device(default):
        interpreter.self_test()


@pytest.mark.parametrize("on", ["1", "true", "ON"])
def test_triton_imported_first_with_its_interpreter_on_is_fine(on):
    result = run_python("import triton, labutils", TRITON_INTERPRET=on)
    assert result.returncode == 0, result.stderr


def test_unknown_device_is_refused():
    result = run_python("import labutils", LABUTILS_DEVICE="tpu")
    assert result.returncode != 0 and "LABUTILS_DEVICE='tpu'" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_an_error():
    result = run_python("import labutils", LABUTILS_DEVICE="cuda")
    assert result.returncode != 0 and "torch.cuda.is_available() is False" in result.stderr


def test_a_gpu_that_is_too_old_is_warned_of_and_refused_where_one_is_asked_for(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("LABUTILS_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.warns(UserWarning, match=r"Tesla V100 has .* 7\.0.*7\.5 or higher: the lab runs on the CPU"):
        assert runtime._cuda_capability() is None
    monkeypatch.setenv("LABUTILS_DEVICE", "cuda")
    with pytest.raises(RuntimeError, match=r"LABUTILS_DEVICE=cuda was asked for, but Tesla V100.*Unset it"):
        runtime._cuda_capability()


@pytest.mark.parametrize(
    "left_out", ["_mend_arithmetic", "_mend_casts", "_mend_reductions", "_patch_language_once_per_launch"]
)
def test_self_test_notices_each_missing_fix(left_out):
    result = run_python(
        f"""
        import os
        os.environ["TRITON_INTERPRET"] = "1"
        import sys, types
        # `labutils/__init__.py` runs the self-test at once: import the submodule from a bare package instead
        package = types.ModuleType("labutils")
        package.__path__ = [{os.path.dirname(os.path.dirname(runtime.__file__))!r}]
        sys.modules["labutils"] = package
        from labutils.machine import interpreter
        setattr(interpreter, {left_out!r}, lambda *a: None)
        interpreter.install()
        try:
            interpreter.self_test()
        except RuntimeError as error:
            assert "does not compute what it should" in str(error), error
            print("noticed")
        """
    )
    assert result.returncode == 0, result.stderr
    if left_out == "_patch_language_once_per_launch":
        assert "noticed" not in result.stdout  # a matter of speed alone: without it everything is still right
    else:
        assert "noticed" in result.stdout


def test_default_dtype_follows_the_capability():
    assert runtime.default_dtype(None) == torch.float32
    assert runtime.default_dtype((7, 5)) == torch.float16
    assert runtime.default_dtype((8, 0)) == runtime.default_dtype((9, 0)) == torch.bfloat16


@pytest.mark.parametrize(("tier", "expected"), [("cpu", 1), ("gpu", 2), ("large_gpu", 3)])
def test_choose(monkeypatch, tier, expected):
    monkeypatch.setattr(runtime, "_tier", lambda: tier)
    assert runtime.choose(cpu=1, gpu=2, large_gpu=3) == expected


def test_choose_falls_back_to_the_gpu_value(monkeypatch):
    monkeypatch.setattr(runtime, "_tier", lambda: "large_gpu")
    assert runtime.choose(cpu=1, gpu=2) == 2


def test_sizes_grow_with_the_machine_and_are_never_empty(monkeypatch):
    wanted = [2**i for i in range(8, 16)]
    monkeypatch.setattr(runtime, "interpreted", True)
    monkeypatch.setattr(runtime, "_tier", lambda: "cpu")
    interpreter = runtime.sizes(wanted, heads=8, through="triton")
    cpu = runtime.sizes(wanted, heads=8)
    monkeypatch.setattr(runtime, "interpreted", False)
    monkeypatch.setattr(runtime, "_tier", lambda: "large_gpu")
    gpu = runtime.sizes(wanted, heads=8)
    assert wanted[:1] <= interpreter < cpu < gpu
    assert runtime.sizes([1 << 30], heads=1 << 10) == [1 << 30]
    assert runtime.sizes([512, 128, 128]) == [128, 512]


@pytest.mark.parametrize("arguments", [dict(wanted=[]), dict(wanted=[128], through="magic")])
def test_sizes_refuses_nonsense(arguments):
    with pytest.raises(ValueError):
        runtime.sizes(**arguments)


def test_seed_repeats():
    first = torch.randn(4, device=runtime.device, generator=runtime.seed(3))
    second = torch.randn(4, device=runtime.device, generator=runtime.seed(3))
    assert torch.equal(first, second)


def test_summary_names_machine_and_mode():
    line = runtime.summary()
    assert runtime.machine in line and ("interpreter" in line) == runtime.interpreted and "\n" not in line
