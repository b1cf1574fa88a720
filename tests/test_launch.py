"""A launch done again: Triton's own launcher gets what it would have made of the tensors itself. No GPU is needed."""

from types import SimpleNamespace

import pytest
import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from labutils.kernels import flash_v2, flash_v2_backward, launch_table, prepared
from labutils.kernels.launch import LaunchConfig, Launched, describe

SIGNATURE = {
    "q_ptr": "*fp16", "k": "tensordesc<fp16[1, 1, 64, 32]>", "v": "tensordesc<fp16[1, 1, 64, 32]>", "o_ptr": "*fp16",
    "mask_ptr": "constexpr", "H": "i32", "scale": "fp32", "D": "constexpr",
}  # fmt: skip
ABOUT = [
    {"swizzle": 2, "elem_size": 2, "elem_type": 6, "block_size": [1, 1, 64, 32], "fp4_padded": False} for _ in range(2)
]
GRID, STREAM = (5, 1, 1), 77


@pytest.fixture
def gpu(monkeypatch):
    """Triton's driver without one: it notes the tensor maps that it makes, and what is launched."""
    made, launched = [], []

    def make(address, *rest):
        made.append(address)
        return ("map", address, *map(str, rest))

    utils = SimpleNamespace(fill_tma_descriptor=make, fill_tma_descriptor_tiled=make)  # 3.6, 3.7
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: STREAM, utils=utils)
    monkeypatch.setattr(driver, "_active", active)

    def kernel(about=ABOUT):
        run = object.__new__(nvidia.CudaLauncher)  # as its constructor leaves it, without compiling C
        zeros = (
            "num_ctas",
            "global_scratch_size",
            "global_scratch_align",
            "profile_scratch_size",
            "profile_scratch_align",
            "launch_cooperative_grid",
            "launch_pdl",
            "arg_annotations",
            "kernel_signature",
        )
        for name in zeros:
            setattr(run, name, 0)
        run.launch = nvidia.wrap_handle_tensordesc(lambda *args: launched.append(args), SIGNATURE, about)
        return SimpleNamespace(run=run, function=11, packed_metadata=(4, 1, 0), launch_metadata=lambda *args: args,
                               metadata=SimpleNamespace(tensordesc_meta=about))  # fmt: skip

    return SimpleNamespace(kernel=kernel, made=made, launched=launched)


def arguments(seed=0):
    q, k, v, o = torch.randn(4, 2, 96, 3, 32).half().unbind()
    return q, describe(k, 64, 32), describe(v, 64, 32), o, None, 3, 0.125, 32


def addresses(arguments):
    return [getattr(argument, "base", argument).data_ptr() for argument in arguments[:4]]


def as_numbers(args):
    """Arguments as they reach the kernel: a tensor is its address."""
    if isinstance(args, (list, tuple)) and not (args and args[0] == "map"):
        return [as_numbers(argument) for argument in args]
    return args.data_ptr() if isinstance(args, torch.Tensor) else args


def flat(args):
    for argument in args:
        yield from flat(argument) if isinstance(argument, (list, tuple)) else (argument,)


@pytest.mark.parametrize("about", [ABOUT, None], ids=["copy engine", "none"])
def test_again_gives_the_launcher_what_triton_gives_it(gpu, about):
    kernel, first, second = gpu.kernel(about), arguments(), arguments()
    again = Launched(kernel, GRID, first).again
    for some in (first, second, first):
        again(*addresses(some))
        kernel.run(*GRID, STREAM, kernel.function, kernel.packed_metadata, None, None, None, *some)
        ours, tritons = gpu.launched[-2:]
        assert as_numbers(ours) == as_numbers(tritons)
    assert as_numbers(gpu.launched[0]) != as_numbers(gpu.launched[2])


def test_a_tensor_map_is_made_once_for_an_address(gpu):
    first, second = arguments(), arguments()
    launched = Launched(gpu.kernel(), GRID, first)
    before = len(gpu.made)
    for _ in range(3):
        launched.again(*addresses(first))
    assert len(gpu.made) == before
    for _ in range(3):
        launched.again(*addresses(second))
    assert gpu.made[before:] == addresses(second)[1:3]


def test_addresses_that_are_not_given_stay(gpu):
    first, second = arguments(), arguments()
    launched = Launched(gpu.kernel(), GRID, first)
    launched.again(*addresses(second)[:1])
    launched.again(addresses(second)[0], *addresses(first)[1:])
    assert gpu.launched[0] == gpu.launched[1]
    launched.again()
    assert addresses(first)[0] in list(flat(as_numbers(gpu.launched[2])))


def test_triton_s_profilers_are_told(gpu, monkeypatch):
    launched = Launched(gpu.kernel(), GRID, arguments())
    launched.again()
    hooks = knobs.HookChain()
    hooks.add(lambda about: None)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hooks)
    launched.again()
    without, with_hook = gpu.launched
    assert hooks in with_hook and hooks not in without
    assert (GRID, STREAM) in with_hook and (GRID, STREAM) not in without


def test_a_form_gives_new_outputs_to_the_same_launch(monkeypatch):
    given = []
    out = torch.zeros(2, 96, 3, 32).half()
    lse = torch.zeros(2, 3, 96)
    launched = SimpleNamespace(again=lambda *addresses: given.append(addresses))
    monkeypatch.setattr(flash_v2, "start", lambda q, k, v, options: (out, lse, lambda: launched))
    form = prepared._Form(flash_v2.Options(0.125))
    q, k, v = torch.randn(3, 2, 3, 96, 32).half().transpose(2, 3).unbind()  # not contiguous: out is, all the same
    assert form.forward(q, k, v) == (out, lse) and given == []
    new_out, new_lse = form.forward(k, v, q)
    assert given == [(k.data_ptr(), v.data_ptr(), q.data_ptr(), new_out.data_ptr(), new_lse.data_ptr())]
    for new, old in ((new_out, out), (new_lse, lse)):
        assert (new.shape, new.stride(), new.dtype) == (old.shape, old.stride(), old.dtype)
        assert new.data_ptr() != old.data_ptr()


def test_a_form_gives_new_gradients_to_the_same_launches(monkeypatch):
    """Addresses are what `again` gets, in the order of the kernels' pointers; another layout is another backward."""
    given = []
    q, k, v, out, dout = torch.randn(5, 2, 96, 3, 32).half().unbind()
    lse, per_row = torch.zeros(2, 3, 96), torch.zeros(2, 2, 3, 160)

    def launched(name):
        return lambda: SimpleNamespace(again=lambda *addresses: given.append((name, addresses)))

    started = []

    def start(*args):
        started.append(args)
        return tuple(t.clone() for t in (q, k, v)), {name: launched(name) for name in ("dq", "dkdv")}, per_row

    monkeypatch.setattr(flash_v2_backward, "start", start)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    form = prepared._Form(flash_v2.Options(0.125))
    form.backward(dout, q, k, v, out, lse, None)
    assert len(started) == 1 and given == []
    gradients = form.backward(out, v, k, q, dout, lse, None)
    assert len(started) == 1 and all(g.shape == q.shape and g.is_contiguous() for g in gradients)
    first, second = dict(given)["dq"], dict(given)["dkdv"]
    dq, dk, dv = (g.data_ptr() for g in gradients)
    assert first[:6] == (v.data_ptr(), k.data_ptr(), q.data_ptr(), dout.data_ptr(), out.data_ptr(), lse.data_ptr())
    lse2, delta = first[6:8]
    assert delta - lse2 == 4 * 2 * 3 * 160 and first[8:] == (dq,)
    assert second == (v.data_ptr(), k.data_ptr(), q.data_ptr(), out.data_ptr(), lse2, delta, dk, dv)
    form.backward(dout, q, k, v, out, lse, None)
    form.backward(dout[:1, :1, :1, :1].expand(out.shape), q, k, v, out, lse, None)
    assert len(started) == 2 and len(given) == 4


def test_a_backward_of_another_kind_takes_the_long_way(monkeypatch):
    q, k, v, out, dout = torch.randn(5, 2, 96, 3, 32).half().unbind()
    lse, long = torch.zeros(2, 3, 96), []
    monkeypatch.setattr(flash_v2_backward, "backward", lambda *args, dlse: long.append(dlse))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    form = prepared._Form(flash_v2.Options(0.125))
    form.backward(dout, q, k, v, out, lse, lse)
    odd = torch.zeros(dout.numel() + 1).half()[1:].view(dout.shape)  # 2 bytes off
    form.backward(odd, q, k, v, out, lse, None)
    assert long == [lse, None] and form.backwards == {}


AN_ADDRESS = 2**20  # larger than any size or stride here; where Python is no PIE, the heap begins not far above


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_a_backward_done_again_gives_the_kernels_what_the_long_way_gives_them(gpu, monkeypatch, tma):
    """Every argument by its name, for both kernels: tensors where they belong, all else as it was."""
    names = {flash_v2_backward._dq_kernel: "dq", flash_v2_backward._dkdv_kernel: "dkdv"}

    def launch(kernel, grid, config, *args, **constants):
        constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        named = dict(zip(kernel.arg_names, args, strict=False)) | constants
        fake = gpu.kernel(None)
        fake.run.launch = nvidia.wrap_handle_tensordesc(  # what a descriptor becomes where there is no copy engine
            lambda *args: gpu.launched.append((names[kernel], args)),
            {n: f"tensordesc<fp16{list(a.block_shape)}>" if hasattr(a, "base") else "" for n, a in named.items()},
            None,
        )
        arguments = [named[name] for name in kernel.arg_names]
        fake.run(*grid, 1, 1, STREAM, fake.function, fake.packed_metadata, None, None, None, *arguments)
        return lambda: Launched(fake, (*grid, 1, 1), arguments)

    monkeypatch.setattr(flash_v2_backward, "launch", launch)
    monkeypatch.setattr(flash_v2_backward, "pick_config", lambda *_, **__: LaunchConfig(64, 32, tma=tma))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    form = prepared._Form(flash_v2.Options(0.125, (None, 0)))

    def launches(seed):
        q, k, v, out, dout = torch.randn(5, 2, 3, 96, 32, generator=torch.Generator().manual_seed(seed)).half()
        given = [t.transpose(1, 2) for t in (q, k, v, out, dout)] + [torch.zeros(2, 3, 96)]
        gpu.launched.clear()
        gradients = form.backward(given[4], *given[:4], given[5], None)
        known = {t.data_ptr(): name for name, t in zip(("q", "k", "v", "o", "do", "lse"), given, strict=True)}
        known |= {t.data_ptr(): name for name, t in zip(("dq", "dk", "dv"), gradients, strict=True)}
        seen = {name: list(flat(as_numbers(args))) for name, args in gpu.launched}
        first = 8 + next(i for i, value in enumerate(seen["dq"][8:]) if known.get(value) == "lse")
        inner = [value for value in seen["dq"][first + 1 :] if isinstance(value, int) and value > AN_ADDRESS][:2]
        known |= dict(zip(inner, ("lse2", "delta"), strict=True))
        return {name: [known.get(value, value) for value in values] for name, values in seen.items()}

    long, again, once_more = launches(0), launches(1), launches(2)
    assert set(long) == {"dq", "dkdv"} and len(form.backwards) == 1
    assert long == again == once_more
    for name, wanted in (("dq", "q k v o do lse lse2 delta dq"), ("dkdv", "q k v do lse2 delta dk dv")):
        assert [value for value in long[name] if value in wanted.split()] == wanted.split()
        assert not any(isinstance(value, int) and value > AN_ADDRESS for value in long[name])  # no address is unknown


def test_sizes_of_grids_and_blocks_are_triton_s():
    for n in (1, 2, 3, 15, 16, 17, 1000, 2**20 + 1):
        assert launch_table.next_power_of_2(n) == triton.next_power_of_2(n)
        assert [launch_table.cdiv(n, block) for block in (16, 64)] == [triton.cdiv(n, block) for block in (16, 64)]
    assert launch_table.cdiv(0, 16) == 0
