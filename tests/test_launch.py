"""Launching again: Triton's own launcher gets what it would have made of the tensors itself. No GPU is needed."""

from types import SimpleNamespace

import pytest
import torch
import triton
from triton import knobs
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from labutils.attention import checks, fast_path
from labutils.attention.kernels import flash_decode, flash_v2, flash_v2_backward, launch_config
from labutils.attention.kernels.launch import Launch, describe
from labutils.attention.kernels.launch_config import LaunchConfig
from labutils.attention.kernels.options import Cache, Options
from labutils.attention.kernels.replay import Replay

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

    def kernel(about=ABOUT):  # an empty list if the GPU has no copy engine
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
            "gsan_enabled",  # from Triton 3.8 on
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


def of_the_kernel(args, count):
    """Of what a launcher is given, the kernel's own arguments: one tuple in Triton 3.7, the last ones in 3.6."""
    return args[-1] if isinstance(args[-1], tuple) else args[-count:]


def flat(args):
    for argument in args:
        yield from flat(argument) if isinstance(argument, (list, tuple)) else (argument,)


def replay_of(kernel, arguments):
    """A replay of a launch with these arguments."""
    names = [f"argument_{i}" for i in range(len(arguments))]
    return Replay(Launch(kernel, names, GRID, tuple(arguments), {}))


@pytest.mark.parametrize("about", [ABOUT, []], ids=["copy engine", "none"])
def test_again_gives_the_launcher_what_triton_gives_it(gpu, about):
    kernel, first, second = gpu.kernel(about), arguments(), arguments()
    again = replay_of(kernel, first).again
    for some in (first, second, first):
        again(*addresses(some))
        kernel.run(*GRID, STREAM, kernel.function, kernel.packed_metadata, None, None, None, *some)
        ours, tritons = gpu.launched[-2:]
        assert as_numbers(ours) == as_numbers(tritons)
    assert as_numbers(gpu.launched[0]) != as_numbers(gpu.launched[2])


def test_a_tensor_map_is_made_once_for_an_address(gpu):
    first, second = arguments(), arguments()
    launched = replay_of(gpu.kernel(), first)
    before = len(gpu.made)
    for _ in range(3):
        launched.again(*addresses(first))
    assert len(gpu.made) == before
    for _ in range(3):
        launched.again(*addresses(second))
    assert gpu.made[before:] == addresses(second)[1:3]


def test_addresses_that_are_not_given_stay(gpu):
    first, second = arguments(), arguments()
    launched = replay_of(gpu.kernel(), first)
    launched.again(*addresses(second)[:1])
    launched.again(addresses(second)[0], *addresses(first)[1:])
    assert gpu.launched[0] == gpu.launched[1]
    launched.again()
    assert addresses(first)[0] in list(flat(as_numbers(gpu.launched[2])))


def test_another_grid_and_other_numbers(gpu):
    """Numbers stand where they are told to, for this launch alone."""
    kernel, tensor = gpu.kernel([]), torch.zeros(3)
    kernel.run.launch = lambda *args: gpu.launched.append(args)
    launched = replay_of(kernel, (tensor, 2, 30, 40, 0.5))
    launched.again(grid=(9, 1, 1), place=2, numbers=(31, 41))
    launched.again()
    for args, grid, numbers in zip(gpu.launched, [(9, 1, 1), GRID], [(31, 41), (30, 40)], strict=True):
        assert args[:3] == grid and of_the_kernel(args, 5) == (tensor.data_ptr(), 2, *numbers, 0.5)


def test_triton_s_profilers_are_told(gpu, monkeypatch):
    launched = replay_of(gpu.kernel(), arguments())
    launched.again()
    hooks = knobs.HookChain()
    hooks.add(lambda about: None)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hooks)
    launched.again()
    without, with_hook = gpu.launched
    assert hooks in with_hook and hooks not in without
    assert (GRID, STREAM) in with_hook and (GRID, STREAM) not in without


def test_a_known_call_gives_new_outputs_to_the_same_launch(monkeypatch):
    given = []
    out = torch.zeros(2, 96, 3, 32).half()
    lse = torch.zeros(2, 3, 96)
    launched = object()
    monkeypatch.setattr(flash_v2, "launch_forward", lambda q, k, v, options: (out, lse, launched))
    replays = {launched: SimpleNamespace(again=lambda *addresses: given.append(addresses))}
    monkeypatch.setattr(fast_path, "Replay", replays.get)
    call = fast_path.KnownCall(Options(0.125))
    q, k, v = torch.randn(3, 2, 3, 96, 32).half().transpose(2, 3).unbind()  # not contiguous: out is, all the same
    for _ in range(2):
        assert call.replay is None
        assert call.output(q, k, v) == (out, lse) and given == []
    new_out, new_lse = call.output(k, v, q)
    assert given == [(k.data_ptr(), v.data_ptr(), q.data_ptr(), new_out.data_ptr(), new_lse.data_ptr())]
    for new, old in ((new_out, out), (new_lse, lse)):
        assert (new.shape, new.stride(), new.dtype) == (old.shape, old.stride(), old.dtype)
        assert new.data_ptr() != old.data_ptr()


def test_a_known_call_gives_new_gradients_to_the_same_launches(monkeypatch):
    """`again` gets addresses in the order of the kernels' pointers; tensors of another layout get another backward."""
    given = []
    q, k, v, out, dout = torch.randn(5, 2, 96, 3, 32).half().unbind()
    lse, per_row = torch.zeros(2, 3, 96), torch.zeros(2, 2, 3, 160)

    def replay(name):
        return SimpleNamespace(again=lambda *addresses: given.append((name, addresses)))

    started = []

    def start(*args):
        started.append(args)
        return tuple(t.clone() for t in (q, k, v)), {name: name for name in ("dq", "dkdv")}, per_row

    monkeypatch.setattr(flash_v2_backward, "launch_backward", start)
    monkeypatch.setattr(fast_path, "Replay", replay)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    call = fast_path.KnownCall(Options(0.125))
    call.gradients(dout, None, q, k, v, out, lse)
    assert len(started) == 1 and given == []
    gradients = call.gradients(out, None, v, k, q, dout, lse)
    assert len(started) == 1 and all(g.shape == q.shape and g.is_contiguous() for g in gradients)
    first, second = dict(given)["dq"], dict(given)["dkdv"]
    dq, dk, dv = (g.data_ptr() for g in gradients)
    assert first[:6] == (v.data_ptr(), k.data_ptr(), q.data_ptr(), dout.data_ptr(), out.data_ptr(), lse.data_ptr())
    lse2, delta = first[6:8]
    assert delta - lse2 == 4 * 2 * 3 * 160 and first[8:] == (dq,)
    assert second == (v.data_ptr(), k.data_ptr(), q.data_ptr(), out.data_ptr(), lse2, delta, dk, dv)
    call.gradients(dout, None, q, k, v, out, lse)
    call.gradients(dout[:1, :1, :1, :1].expand(out.shape), None, q, k, v, out, lse)
    assert len(started) == 2 and len(given) == 4


def test_a_backward_of_another_kind_is_not_on_the_fast_path(monkeypatch):
    q, k, v, out, dout = torch.randn(5, 2, 96, 3, 32).half().unbind()
    lse, launched = torch.zeros(2, 3, 96), []
    monkeypatch.setattr(flash_v2_backward, "launch_backward", lambda *args, dlse: [launched.append(dlse)])
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    call = fast_path.KnownCall(Options(0.125))
    call.gradients(dout, lse, q, k, v, out, lse)
    odd = torch.zeros(dout.numel() + 1).half()[1:].view(dout.shape)  # 2 bytes off
    call.gradients(odd, None, q, k, v, out, lse)
    assert launched == [lse, None] and call.backwards == {}


AN_ADDRESS = 2**20  # larger than any size or stride here; where Python is no PIE, the heap begins not far above


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_a_replayed_backward_gives_the_kernels_what_a_launch_gives_them(gpu, monkeypatch, tma):
    """Every argument by its name, for both kernels: tensors where they belong, all else as it was."""
    names = {flash_v2_backward._dq_kernel: "dq", flash_v2_backward._dkdv_kernel: "dkdv"}

    def launch(kernel, grid, config, *args, **constants):
        constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        named = dict(zip(kernel.arg_names, args, strict=False)) | constants
        fake = gpu.kernel([])
        fake.run.launch = nvidia.wrap_handle_tensordesc(  # what a descriptor becomes where there is no copy engine
            lambda *args: gpu.launched.append((names[kernel], args)),
            {n: f"tensordesc<fp16{list(a.block_shape)}>" if hasattr(a, "base") else "" for n, a in named.items()},
            [],
        )
        arguments = [named[name] for name in kernel.arg_names]
        fake.run(*grid, 1, 1, STREAM, fake.function, fake.packed_metadata, None, None, None, *arguments)
        return Launch(fake, kernel.arg_names, (*grid, 1, 1), args, constants)

    monkeypatch.setattr(flash_v2_backward, "launch", launch)
    monkeypatch.setattr(flash_v2_backward, "pick_config", lambda *_, **__: LaunchConfig(64, 32, tma=tma))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    call = fast_path.KnownCall(Options(0.125, window_right=0))

    def launches(seed):
        q, k, v, out, dout = torch.randn(5, 2, 3, 96, 32, generator=torch.Generator().manual_seed(seed)).half()
        given = [t.transpose(1, 2) for t in (q, k, v, out, dout)] + [torch.zeros(2, 3, 96)]
        gpu.launched.clear()
        gradients = call.gradients(given[4], None, *given[:4], given[5])
        known = {t.data_ptr(): name for name, t in zip(("q", "k", "v", "o", "do", "lse"), given, strict=True)}
        known |= {t.data_ptr(): name for name, t in zip(("dq", "dk", "dv"), gradients, strict=True)}
        seen = {name: list(flat(as_numbers(args))) for name, args in gpu.launched}
        first = 8 + next(i for i, value in enumerate(seen["dq"][8:]) if known.get(value) == "lse")
        inner = [value for value in seen["dq"][first + 1 :] if isinstance(value, int) and value > AN_ADDRESS][:2]
        known |= dict(zip(inner, ("lse2", "delta"), strict=True))
        return {name: [known.get(value, value) for value in values] for name, values in seen.items()}

    launched, again, once_more = launches(0), launches(1), launches(2)
    assert set(launched) == {"dq", "dkdv"} and len(call.backwards) == 1
    assert launched == again == once_more
    for name, wanted in (("dq", "q k v o do lse lse2 delta dq"), ("dkdv", "q k v do lse2 delta dk dv")):
        assert [value for value in launched[name] if value in wanted.split()] == wanted.split()
        assert not any(isinstance(value, int) and value > AN_ADDRESS for value in launched[name])  # all are known


NOT_SPECIALISED = ("N_Q", "N_K", "N_NEW", "SPLITS")


def compiled_for(names, args):
    """What Triton makes of the arguments: calls that differ in this need another kernel."""
    return [
        native_specialize_impl(BaseBackend, arg, False, name not in NOT_SPECIALISED, name not in NOT_SPECIALISED)
        for name, arg in zip(names, args, strict=True)
    ]


@pytest.fixture
def decodings(gpu, monkeypatch):
    """Notes (kernel, what it was compiled for, grid, arguments by name) of each launch; splits as if for a GPU."""

    def launch(kernel, grid, config, *args, **constants):
        constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        constants = {name: size for name, size in constants.items() if name in kernel.arg_names}
        named = dict(zip(kernel.arg_names, args, strict=False)) | constants
        arguments = [named[name] for name in kernel.arg_names]
        what = (
            kernel.__name__,
            config.num_warps,
            config.num_stages,
            compiled_for(kernel.arg_names, arguments),
            constants,
        )

        def note(*args):
            own = as_numbers(of_the_kernel(args, len(kernel.arg_names)))
            gpu.launched.append((what, args[:3], dict(zip(kernel.arg_names, own, strict=True))))

        fake = gpu.kernel([])
        fake.run.launch = note
        fake.run(*grid, 1, 1, STREAM, fake.function, fake.packed_metadata, None, None, None, *arguments)
        return Launch(fake, kernel.arg_names, (*grid, 1, 1), args, constants)

    monkeypatch.setattr(flash_decode, "launch", launch)
    monkeypatch.setattr(flash_decode, "pick_config", lambda *_, **__: LaunchConfig(16, 16, 4, 3))
    monkeypatch.setattr(flash_decode, "choose_splits", lambda programs, tiles, slots: max(1, min(tiles - 1, 128)))
    monkeypatch.setattr(fast_path, "_known", {})
    return gpu.launched


def aligned(shape, dtype=torch.float16, off=0):
    """Zeros `off` bytes behind an address that is a multiple of 16."""
    memory = torch.zeros(shape.numel() * dtype.itemsize + 32, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + off
    return memory[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def rows_first(n, heads, head_dim, dtype=torch.float16, off=0):
    """A cache as models make it for each token anew: (B, H_kv, N, D) in memory."""
    return aligned(torch.Size((2, heads, n, head_dim)), dtype, off).transpose(1, 2)


def heads_first(n, heads, head_dim, dtype=torch.float16, off=0):
    return aligned(torch.Size((2, n, heads, head_dim)), dtype, off)


PLAIN = dict(options=(0.125, True, (-1, -1), 0.0), head_dim=16, n_q=1, splits=0)
DECODINGS = {
    "a cache made anew for each token": PLAIN,
    "its strides now and then multiples of 16": PLAIN | dict(head_dim=5),
    "rows before heads": PLAIN | dict(cache=heads_first),
    "a large cache that fills": PLAIN | dict(cache=heads_first, capacity=400),
    "dimensions apart": PLAIN | dict(cache=lambda *args, **kwargs: rows_first(*args, **kwargs).mT.contiguous().mT),
    "three queries": PLAIN | dict(n_q=3),
    "a window": PLAIN | dict(n_q=3, options=(0.125, True, (20, 0), 0.0)),
    "softcap and scale": PLAIN | dict(options=(0.5, False, (-1, -1), 3.0)),
    "splits as asked for": PLAIN | dict(splits=7),
    "one part": PLAIN | dict(splits=1),
    "k misaligned": PLAIN | dict(off_k=4),
    "v misaligned": PLAIN | dict(off_v=2),
    "q misaligned": PLAIN | dict(off_q=8),
    "float32": PLAIN | dict(dtype=torch.float32),
    "one head": PLAIN | dict(heads=1),
}


def decoding_of(case, n):
    case = dict(heads=2, dtype=torch.float16, cache=rows_first, off_q=0, off_k=0, off_v=0, capacity=n) | case
    heads, head_dim, dtype = case["heads"], case["head_dim"], case["dtype"]
    q = aligned(torch.Size((2, case["n_q"], 2 * heads, head_dim)), dtype, case["off_q"])
    k, v = (case["cache"](case["capacity"], heads, head_dim, dtype, off=case[off]) for off in ("off_k", "off_v"))
    scale, causal, window, softcap = case["options"]
    options = Options(scale, *checks.window(window, causal), checks.cap(softcap))
    return q, k, v, options, case["options"], case["splits"]


def test_the_fast_path_of_decoding_launches_what_decode_launches(decodings):
    """For growing lengths and all kinds of calls in turn: kernel, what it was compiled for, grid, every argument."""

    def launches(run, *known):
        decodings.clear()
        out, lse = run()
        known = {t.data_ptr(): name for t, name in zip((*known, out, lse), ("q", "k", "v", "out", "lse"), strict=True)}
        seen = []
        for what, grid, named in decodings:
            for name, value in named.items():
                if isinstance(value, int) and value > AN_ADDRESS:
                    named[name] = known.setdefault(value, name)  # the parts: by what the first kernel calls them
            seen.append((what, grid, named))
        return seen, [(t.shape, t.stride(), t.dtype) for t in (out, lse)]

    def through_fast_path(q, k, v, n, splits, key, options):
        return fast_path.known_decoding(q, k, v, n, splits, key, lambda: options).decode(q, k, v, n)

    replayed = 0
    for n in (*range(1, 40), 255, 256, 257, 300, 302, 304, 37, 5):
        for name, case in DECODINGS.items():
            q, k, v, options, key, splits = decoding_of(case, n)
            cache = Cache(None, n)
            launched = launches(lambda: flash_decode.decode(q, k, v, cache, options, splits=splits), q, k, v)  # noqa: B023
            before = sum(len(known.replays) for known in fast_path._known.values())
            ours = launches(lambda: through_fast_path(q, k, v, n, splits, key, options), q, k, v)  # noqa: B023
            assert ours == launched, f"{name}, {n} keys"
            replayed += before == sum(len(known.replays) for known in fast_path._known.values())
    layouts = sum("cache" in case for case in DECODINGS.values())
    assert len(fast_path._known) == len(DECODINGS) - layouts  # the cache's layout in memory is not part of the key
    assert replayed > 0.8 * 46 * len(DECODINGS)


def test_sizes_of_grids_and_blocks_are_triton_s():
    for n in (1, 2, 3, 15, 16, 17, 1000, 2**20 + 1):
        assert launch_config.next_power_of_2(n) == triton.next_power_of_2(n)
        assert [launch_config.cdiv(n, block) for block in (16, 64)] == [triton.cdiv(n, block) for block in (16, 64)]
    assert launch_config.cdiv(0, 16) == 0
