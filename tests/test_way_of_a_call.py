"""From flash_attn_func to the kernel: few calls, few files, no two functions of one name, on every way there is."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import labutils
from labutils import runtime
from labutils.attention import fast_path, interface, operators
from labutils.attention.kernels import flash_decode, flash_v2, flash_v2_backward

PACKAGE = str(Path(labutils.__file__).parent)
MOST_CALLS, MOST_FILES = 6, 4


def frames_of_labutils():
    """(file, function) of each call of labutils that is under way, the outermost first."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            found.append((Path(frame.f_code.co_filename).name, frame.f_code.co_name))
        frame = frame.f_back
    return found[::-1]


@pytest.fixture
def ways(monkeypatch):
    """The calls under way whenever a kernel is launched, or would be launched again."""
    seen = []
    for module in (flash_v2, flash_v2_backward, flash_decode):

        def launch(*args, real=module.launch, **constants):
            seen.append([*frames_of_labutils(), ("launch.py", "launch")])
            return real(*args, **constants)

        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(fast_path, "_known", {})
    return seen


def make():
    return [torch.randn(1, 20, 2, 16, device=runtime.device, requires_grad=True) for _ in range(3)]


def attention(**options):
    return lambda q, k, v: interface.flash_attn_func(q, k, v, causal=True, **options).sum().backward()


def packed(q, k, v):
    starts = torch.tensor([0, 8, 20], dtype=torch.int32, device=runtime.device)
    interface.flash_attn_varlen_func(q[0], k[0], v[0], starts, starts, 12, 12).sum().backward()


def cache(**options):
    return lambda q, k, v: interface.flash_attn_with_kvcache(q.detach()[:, :1], k.detach(), v.detach(), **options)


CALLS = {
    "plain": attention(),
    "with slopes": attention(alibi_slopes=torch.ones(2, device=runtime.device)),
    "packed": packed,
    "a cache": cache(cache_seqlens=9),
    "a cache with lengths": cache(cache_seqlens=torch.tensor([9], dtype=torch.int32, device=runtime.device)),
}


@pytest.mark.parametrize("fast", [False, True], ids=["as the machine has it", "fast path"])
@pytest.mark.parametrize("call", CALLS)
def test_the_way_is_short(call, fast, ways, monkeypatch):
    if fast and runtime.interpreted:  # on a GPU it applies anyway
        monkeypatch.setattr(fast_path, "applies", lambda *tensors: True)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: runtime.device.index, raising=False)
    CALLS[call](*make())
    assert len(ways) == (1 if "cache" in call else 3)  # forward; and with its gradients, dQ's kernel and dK/dV's
    for way in ways:
        assert len(way) <= MOST_CALLS and len({file for file, _ in way}) <= MOST_FILES, way
        assert len({name for _, name in way}) == len(way), way


def test_the_way_of_a_replay_is_shorter(monkeypatch):
    seen = []
    monkeypatch.setattr(fast_path, "applies", lambda *tensors: True)
    monkeypatch.setattr(fast_path, "_known", {})
    again = SimpleNamespace(again=lambda *addresses: seen.append([*frames_of_labutils(), ("replay.py", "again")]))
    monkeypatch.setattr(fast_path, "Replay", lambda launch: again)
    monkeypatch.setattr(
        flash_v2, "launch_forward", lambda q, k, v, options: (torch.empty_like(q), q[..., 0].transpose(1, 2), object())
    )
    q, k, v = make()
    for _ in range(3):
        interface.flash_attn_func(q, k, v)
    [way] = seen
    assert [file for file, _ in way] == ["interface.py"] * 3 + ["fast_path.py", "replay.py"]


def test_one_autograd_function_serves_all():
    """Kernels, operators and interface: the derivative is put together in one place.

    The second class of the interface says that there is none; a third one, for torch.func, is made from the first.
    """
    found = []
    for path in Path(PACKAGE, "attention").rglob("*.py"):
        text = path.read_text()
        found += [path.name] * (text.count("autograd.Function)") + text.count("register_autograd("))
    assert found == ["interface.py"] * 2
    assert issubclass(interface._TransformedFlashAttention, interface._FlashAttention)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        interface._WithoutDerivative.backward(SimpleNamespace(operator=operators.flash_attention_backward))
    calls = Path(interface.__file__).read_text().count("(operators.flash_attention_backward)(")
    assert calls == 1, "what the backward saves is handed to the operator in one place"
