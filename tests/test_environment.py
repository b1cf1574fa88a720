"""labutils.benchmark.environment: what it says of machines that are not here, and what it finds on the one that is."""

import dataclasses
import json
import re
import warnings

import notebook_format
import pytest
import torch

from labutils import runtime
from labutils.attention import probing, reference
from labutils.attention.backends import BACKENDS
from labutils.benchmark import environment


@pytest.fixture(autouse=True)
def _nothing_remembered():
    probing._try.cache_clear()
    environment._driver.cache_clear()
    yield
    probing._try.cache_clear()
    environment._driver.cache_clear()


TRIED = [backend.name for backend in BACKENDS.values() if backend.load and backend.tried]
FLASH = [name for name in TRIED if BACKENDS[name].flash]


def put(monkeypatch, runners):
    """Functions in the place of backends' own, by name."""
    for name, runner in runners.items():
        entry = dataclasses.replace(BACKENDS[name], load=lambda runner=runner: runner, load_to_try=None)
        monkeypatch.setitem(BACKENDS, name, entry)


def right(q, k, v):
    return reference.naive_attention(q, k, v)


def refuse(*told, error="No available kernel. Aborting execution."):
    """A backend of SDPA that cannot run: PyTorch warns of the reasons, then raises."""

    def attention(q, k, v):
        for text in told:
            warnings.warn(text, UserWarning, stacklevel=1)
        raise RuntimeError(error)

    return attention


@pytest.fixture
def gpu(monkeypatch):
    """Makes this machine look like one with a GPU of the given compute capability."""

    def imitate(capability, flash_attn_version=None, name="NVIDIA Imitation", **runners):
        monkeypatch.setattr(runtime, "device", torch.device("cuda"))
        monkeypatch.setattr(runtime, "capability", capability)
        monkeypatch.setattr(runtime, "interpreted", False)
        monkeypatch.setattr(runtime, "dtype", runtime.default_dtype(capability))
        monkeypatch.setattr(runtime, "memory_gib", 15.77)
        monkeypatch.setattr(environment, "_gpu", lambda: (name, capability))
        monkeypatch.setattr(environment, "_driver", lambda: "580.65.06")
        monkeypatch.setattr(environment.versions, "untested", lambda torch, triton: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        installed = probing.installed_version
        monkeypatch.setattr(
            probing,
            "installed_version",
            lambda package: flash_attn_version if package == "flash-attn" else installed(package),
        )
        generator = torch.Generator().manual_seed(0)
        sample = tuple(torch.randn(1, 16, 1, 16, generator=generator).to(runtime.dtype) for _ in range(3))
        monkeypatch.setattr(probing, "_sample", lambda: sample)
        put(monkeypatch, dict.fromkeys(TRIED, right) | runners)

    return imitate


def rows(lines):
    """What -> ("x" or " ", text) of a block of the report."""
    found = (re.fullmatch(r"  \[(.)\] (.+?)  +(.*)", line) for line in lines[1:])
    return {match[2]: (match[1], match[3]) for match in found}


def by_name():
    return {backend.name: backend for backend in probing.trials()}


# -- GPUs that are not here ----------------------------------------------------------------------------------


def test_hopper_with_everything(gpu, capsys):
    gpu((9, 0), flash_attn_version="2.8.3", name="NVIDIA H200")
    assert all(backend.available and backend.runs_on == "gpu" for backend in probing.trials())
    assert environment.verify_flash_attention(force=True) is True
    printed = capsys.readouterr().out
    facts, checklist = (block.splitlines() for block in printed.split("\n\n")[:2])
    assert facts[0] == "This machine" and checklist[0].startswith("FlashAttention, each backend tried on")
    assert rows(facts)["driver"] == ("x", "580.65.06")
    assert rows(facts)["Triton kernels"] == ("x", "compiled, on the GPU")
    assert list(rows(checklist)) == [
        "GPU", "compute capability", "flash-attn package", "PyTorch SDPA, flash", "PyTorch SDPA, cuDNN",
        "PyTorch SDPA, memory-efficient", "PyTorch SDPA, math", "this lab's Triton v1", "this lab's Triton v2",
        "FlexAttention",
    ]  # fmt: skip
    assert rows(checklist)["GPU"] == ("x", "NVIDIA H200, 15.8 GiB")
    assert rows(checklist)["compute capability"] == ("x", "9.0")
    assert rows(checklist)["flash-attn package"] == ("x", "2.8.3, compiled kernel on the GPU, bfloat16")
    assert (
        printed.rstrip()
        .splitlines()[-1]
        .startswith("Status: FlashAttention runs compiled on this GPU (PyTorch SDPA, flash; PyTorch SDPA, cuDNN; ")
    )
    assert "[ ]" not in printed.replace("[ ] CUDA", "")  # a CPU build of torch has no CUDA to name


def test_ampere_without_the_flash_attn_package(gpu):
    gpu((8, 6))
    found = by_name()
    assert not found["flash_attn"].available
    assert found["flash_attn"].reason == "not installed, and optional: PyTorch's built-in flash kernel is used"
    assert all(backend.available for name, backend in found.items() if name != "flash_attn")
    checklist = rows(environment.report().split("\n\n")[1].splitlines())
    assert checklist["flash-attn package"] == (" ", found["flash_attn"].reason)


def test_no_built_in_kernel_is_promised_where_there_is_none(gpu):
    gpu((7, 5), sdpa_flash=refuse("Flash attention only supports sm80 and later"))
    assert by_name()["flash_attn"].reason == "not installed, and optional"
    checklist = rows(environment.report().split("\n\n")[1].splitlines())
    assert checklist["compute capability"] == (
        "x", "7.5; PyTorch's flash kernel and flash-attn need 8.0 (Ampere)"
    )  # fmt: skip


def test_turing_is_too_old_for_flash_kernels_but_not_for_ours(gpu):
    gpu(
        (7, 5),
        flash_attn_version="2.8.3",
        sdpa_flash=refuse("Flash attention only supports gpu architectures in the range [sm80, sm121]. Got sm75."),
        sdpa_cudnn=refuse("cuDNN Attention only supports sm80 or above"),
        flash_attn=refuse(error="FlashAttention only supports Ampere GPUs or newer."),
    )
    found = by_name()
    for name in ("sdpa_flash", "sdpa_cudnn", "flash_attn"):
        assert not found[name].available
        assert found[name].reason == "needs compute capability 8.0 (Ampere) or higher, this GPU has 7.5"
    for name in ("triton_v1", "triton_v2", "sdpa_efficient", "sdpa_math", "flex"):
        assert found[name].available and "float16" in found[name].reason
    assert environment.verify_flash_attention(force=True, verbose=False) is True  # by Triton


def test_a_gpu_on_which_every_flash_kernel_fails_is_told_so(gpu):
    broken = refuse(error="CUDA error: no kernel image is available for execution on the device")
    gpu((9, 0), **dict.fromkeys(FLASH, broken))
    assert environment.verify_flash_attention(verbose=False) is False
    assert "Status: no FlashAttention kernel compiled for a GPU runs here: none of them ran" in environment.report()
    with pytest.raises(RuntimeError, match="Triton v2: RuntimeError: CUDA error: no kernel image") as caught:
        environment.verify_flash_attention(force=True, verbose=False)
    assert "update the driver" in str(caught.value)


def test_memory_efficient_attention_alone_is_not_flash(gpu):
    gpu((9, 0), **dict.fromkeys(FLASH, refuse()))
    assert by_name()["sdpa_efficient"].available
    assert environment.verify_flash_attention(verbose=False) is False


def test_a_result_that_is_wrong_counts_as_unavailable(gpu):
    gpu(
        (9, 0),
        triton_v2=lambda q, k, v: right(q, k, v) * 1.5,
        sdpa_flash=lambda q, k, v: right(q, k, v) * torch.nan,
    )
    found = by_name()
    assert not found["triton_v2"].available and "its result is wrong: out: WRONG" in found["triton_v2"].reason
    assert not found["sdpa_flash"].available and "NaN" in found["sdpa_flash"].reason


def test_sdpa_reasons_are_condensed_from_the_warnings(gpu):
    gpu(
        (9, 0),
        sdpa_cudnn=refuse(
            "cuDNN attention kernel not used because: (Triggered internally at /pytorch/aten/sdp.cpp:859.)",
            "Flash attention has been runtime disabled. (Triggered internally at /pytorch/aten/sdp.cpp:5.)",
            "cuDNN version 9.1 is too old. (Triggered internally at /pytorch/aten/sdp.cpp:612.)",
            "cuDNN version 9.1 is too old. (Triggered internally at /pytorch/aten/sdp.cpp:612.)",
        ),
    )
    assert by_name()["sdpa_cudnn"].reason == "cuDNN version 9.1 is too old."


def test_flash_attn_built_for_another_torch(gpu):
    def fail(q, k, v):
        raise ImportError("/root/v/lib/python3/site-packages/flash_attn_2_cuda.so: undefined symbol: _ZN3c105Error")

    gpu((9, 0), flash_attn_version="2.7.4", flash_attn=fail)
    reason = by_name()["flash_attn"].reason
    assert reason.startswith(
        "version 2.7.4 is installed but cannot be imported (flash_attn_2_cuda.so: undefined symbol"
    )
    assert "rebuild it" in reason and "/root" not in reason


@pytest.mark.parametrize(
    ("found", "driver", "cuda", "cause", "remedy"),
    [
        (None, None, None, "no NVIDIA GPU found", "Use a machine with an NVIDIA GPU"),
        (None, "580.65", None, "this PyTorch is a CPU build", "Install a CUDA build of PyTorch"),
        (
            None,
            "470.1",
            "13.0",
            "PyTorch's CUDA 13.0 finds no GPU",
            "Update the driver to one that supports CUDA 13.0",
        ),
        (("Tesla V100", (7, 0)), "580.65", "12.6", "Tesla V100 has compute capability 7.0", "Turing"),
        (("NVIDIA T4", (7, 5)), "580.65", "13.0", "LABUTILS_DEVICE=cpu or TRITON_INTERPRET=1", "Unset both"),
    ],
)
def test_force_names_cause_and_remedy_where_no_gpu_is_used(monkeypatch, found, driver, cuda, cause, remedy):
    monkeypatch.setattr(runtime, "device", torch.device("cpu"))
    monkeypatch.setattr(runtime, "interpreted", True)
    monkeypatch.setattr(runtime, "capability", None)
    monkeypatch.setattr(runtime, "dtype", torch.float32)
    monkeypatch.setattr(environment, "_gpu", lambda: found)
    monkeypatch.setattr(environment, "_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    put(monkeypatch, dict.fromkeys(TRIED, right))
    with pytest.raises(RuntimeError) as caught:
        environment.verify_flash_attention(force=True, verbose=False)
    assert str(caught.value).startswith("No FlashAttention kernel compiled for a GPU runs here: ")
    assert cause in str(caught.value) and remedy in str(caught.value)
    assert cause in environment.report()
    assert environment.environment().gpu is None


# -- this machine --------------------------------------------------------------------------------------------


@pytest.mark.skipif(runtime.device.type == "cuda", reason="about a machine whose GPU is not used; this one's is")
def test_without_a_gpu_the_cpu_kernels_and_the_interpreter_run():
    found = by_name()
    assert list(found) == TRIED
    assert {name: b.runs_on for name, b in found.items() if b.available} == {
        "sdpa_flash": "cpu",
        "sdpa_math": "cpu",
        "triton_v1": "interpreter",
        "triton_v2": "interpreter",
    }
    assert "check --compile-flex" in found["flex"].reason
    assert environment.verify_flash_attention(verbose=False) is False


@pytest.mark.gpu
def test_with_a_gpu_a_compiled_flash_kernel_runs():
    found = by_name()
    assert found["triton_v2"].available and found["triton_v2"].runs_on == "gpu", found["triton_v2"].reason
    assert found["sdpa_math"].available, found["sdpa_math"].reason
    if runtime.capability >= (8, 0):
        assert found["sdpa_flash"].available, found["sdpa_flash"].reason
    assert environment.verify_flash_attention(force=True, verbose=False) is True
    machine = environment.environment()
    assert machine.gpu and machine.driver and machine.cuda
    assert machine.capability == runtime.capability


def test_what_is_not_available_says_why():
    for backend in probing.trials():
        assert backend.reason
        assert "\n" not in backend.reason
        assert bool(backend.runs_on) == backend.available


def test_backends_are_tried_once_in_a_process(monkeypatch):
    calls = []
    put(monkeypatch, dict.fromkeys(TRIED, lambda *qkv: calls.append(1) or right(*qkv)))
    first = probing.trials()
    made = len(calls)
    assert made >= 4
    assert probing.trials() == first
    assert len(calls) == made


def test_a_report_moves_no_seed():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    probing.trials()
    assert torch.equal(torch.rand(3), expected)


def test_flex_is_compiled_where_asked_for(monkeypatch):
    put(monkeypatch, {"flex": right})
    (flex,) = (backend for backend in probing.trials(compile_flex=True) if backend.name == "flex")
    assert flex.available
    told = environment.report(compile_flex=True).splitlines()
    assert any(line.startswith("  [x] FlexAttention") for line in told) and "FlexAttention" in told[-1]
    assert "FlexAttention" in environment.report_as_dict(compile_flex=True)["status"]


def test_flex_is_not_compiled_for_the_status_line_of_a_report_without_it(gpu):
    gpu((9, 0), flex=refuse("it was compiled"))
    probing._try.cache_clear()
    told = environment.report(compile_flex=False)
    assert "[ ] FlexAttention                   not tried" in told and "it was compiled" not in told
    assert "FlexAttention" not in told.splitlines()[-1]
    assert probing._try.cache_info().currsize == len(TRIED) - 1  # all but flex were tried


def test_report_is_fit_for_a_notebook():
    text = environment.report()
    assert not notebook_format.MACHINE_PATH.search(text)
    assert not re.search(r"(?<!\w)/\w+/", text)
    assert all(BACKENDS[name].title in text for name in TRIED)
    assert text.splitlines()[-1].startswith("Status: ")


def test_environment_is_json_and_names_versions():
    machine = environment.environment()
    stored = json.loads(json.dumps(machine.as_dict()))
    assert stored["torch"] == torch.__version__
    assert stored["triton"] and stored["transformers"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", stored["date"])
    assert stored["capability"] == (None if machine.capability is None else "{}.{}".format(*machine.capability))


def test_as_dict_is_json():
    stored = json.loads(json.dumps(environment.report_as_dict()))
    assert [backend["name"] for backend in stored["backends"]] == TRIED
    assert stored["status"] == environment.report().splitlines()[-1].removeprefix("Status: ")
    assert bool(stored["cause"]) == bool(stored["remedy"]) == (not stored["compiled_flash_kernels_on_gpu"])
    assert stored["triton_kernels"] == ("interpreter" if runtime.interpreted else "compiled")


# -- small parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "condensed"),
    [
        ("\n  a reason\nand a stack", "a reason"),
        ("", "no message"),
        ("x. (Triggered internally at /pytorch/aten/x.cpp:85.)", "x."),
        ("cannot open '/home/ann/lib/libcudart.so.12': gone", "cannot open 'libcudart.so.12': gone"),
        ("C:\\Users\\ann\\x.dll is missing", "x.dll is missing"),
        ("TFLOP/s and HBM/SRAM stay", "TFLOP/s and HBM/SRAM stay"),
        ("y" * 500, "y" * 217 + "..."),
    ],
)
def test_condense(message, condensed):
    assert probing._condense(message) == condensed


def test_a_program_that_is_missing_fails_or_hangs_is_no_answer():
    assert environment._answer("there-is-no-such-program") is None
    assert environment._answer("false") is None
    assert environment._answer("echo", "580.65.06") == "580.65.06"


def test_git_revision_marks_changed_code(monkeypatch):
    if environment._git_revision() is None:
        pytest.skip("labutils does not run from a git checkout with a commit")
    answers = {"rev-parse": "0123456789ab", "status": ""}
    monkeypatch.setattr(environment, "_answer", lambda *command, cwd: answers[command[1]])
    assert environment._git_revision() == "0123456789ab"
    answers["status"] = " M labutils/machine/runtime.py"
    assert environment._git_revision() == "0123456789ab+changes"
    answers["rev-parse"] = None
    assert environment._git_revision() is None


def test_version_of_what_is_not_installed_is_none():
    assert probing.installed_version("there-is-no-such-package") is None
