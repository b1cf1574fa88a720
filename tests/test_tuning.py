"""Tuning: what is chosen, how it is kept and read again, and that kernels then use it. Timings here are made up."""

import contextlib
import gc
import json
import types
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from labutils import runtime
from labutils.__main__ import main
from labutils.attention import interface
from labutils.attention.kernels import launch, launch_config, launch_table, tuned_table
from labutils.attention.kernels.launch import pick_config
from labutils.attention.kernels.launch_config import LaunchConfig, Place
from labutils.attention.kernels.tuned_table import Tuned, TunedFor
from labutils.attention.tuning import candidates
from labutils.attention.tuning.candidates import Compiled, best_by_resources
from labutils.attention.tuning.compiled import Resources
from labutils.attention.tuning.search import Row, contenders, decide, tune
from labutils.benchmark import environment, launches
from labutils.benchmark.environment import differences
from labutils.benchmark.timing import Timing
from labutils.commands import tune as command
from labutils.machine import chips

CUDA = torch.device("cuda", 0)
PLACE = Place("forward", 128, True, "16 bit")
SHIPPED = launch_table.shipped(PLACE, (8, 6))
GPU = TunedFor("Some GPU", (8, 6), "3.7.1")
CONFIGS = [SHIPPED, LaunchConfig(128, 32, 8, 2), LaunchConfig(128, 64, 8, 2), LaunchConfig(32, 64, 4, 3)]
ON_CPU = pytest.mark.skipif(not runtime.interpreted, reason="about a machine without a GPU; this one has one")


def row(config, *rounds, spread=0.0, reason=""):
    """A row whose rounds have these times at both sizes."""
    return Row(PLACE, config, reason, rounds=[[ms, 4 * ms] for ms in rounds], spreads=[spread] * len(rounds))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A user's table in a folder of its own, and a GPU to use it on."""
    file = tmp_path / "deep" / "table.json"
    monkeypatch.setenv(tuned_table.VARIABLE, str(file))
    monkeypatch.setattr(launch, "_capability", lambda index: GPU.capability)
    monkeypatch.setattr(TunedFor, "here", staticmethod(lambda index=0: GPU))
    forget()
    yield file
    forget()


def forget():
    """What a new process would not know."""
    launch._picked.cache_clear()
    tuned_table.tuned_here.cache_clear()


def picked(kernel="forward", head_dim=128, dtype=torch.float16, causal=True, device=CUDA):
    return pick_config(kernel, head_dim, dtype, causal, device, longest=1024)


# ------------------------------------------------------------------------------------------------------------
# Choosing
# ------------------------------------------------------------------------------------------------------------


def test_a_row_takes_sizes_and_rounds_together():
    one = Row(PLACE, SHIPPED)
    for ms in (1.0, 1.2, 1.1):
        one.add([Timing(ms, 0.01 * ms), Timing(4 * ms, 0.08 * ms)])
    assert one.ms == pytest.approx(2 * 1.1)
    assert one.spread == pytest.approx(0.02 + 0.2 / 1.1)  # of the wider size, and what the rounds range over
    again = Row.of(json.loads(json.dumps(one.as_dict())))
    assert again == one


@pytest.mark.parametrize(
    ("faster", "spread", "replaced"), [(1.10, 0.02, True), (1.10, 0.12, False), (1.01, 0.0, True), (0.9, 0.0, False)]
)
def test_the_shipped_entry_stays_unless_a_candidate_beats_it_by_more_than_the_spread(faster, spread, replaced):
    for wide in (0, 1):  # whichever of the two has that spread
        rows = [
            row(SHIPPED, 1.0, 1.0, spread=spread if wide == 0 else 0.0),
            row(CONFIGS[1], 1 / faster, 1 / faster, spread=spread if wide == 1 else 0.0),
            row(CONFIGS[2], 2.0),
        ]
        found = decide(rows)
        assert found.replaced == replaced
        assert found.best is rows[1 if faster > 1 else 0]
        stays = "the shipped entry is the fastest" if faster < 1 else "the shipped entry stays"
        assert ("it takes its place" if replaced else stays) in str(found)


def test_a_shipped_entry_that_does_not_run_is_replaced_and_one_round_wins_nothing():
    rows = [row(SHIPPED, reason="RuntimeError: too large"), row(CONFIGS[1], 1.0, 1.0), row(CONFIGS[2], 0.9)]
    found = decide(rows)
    assert found.replaced and found.best is rows[1] and "too large" in str(found)
    with pytest.raises(RuntimeError, match="no candidate runs here. The shipped entry: RuntimeError: too large"):
        decide(rows[:1])


def test_only_what_is_near_the_best_is_timed_again():
    rows = [row(SHIPPED, 2.0), row(CONFIGS[1], 1.0), row(CONFIGS[2], 1.09), row(CONFIGS[3], 1.2)]
    assert contenders(rows) == rows[:3]
    assert contenders([row(SHIPPED, reason="wrong")]) == []


# ------------------------------------------------------------------------------------------------------------
# Tuning, with made-up times
# ------------------------------------------------------------------------------------------------------------


def cost(registers=128, spilled=0, shared_kib=40, capability=(8, 6), config=SHIPPED):
    return Resources("flash_v2._forward_kernel", capability, {}, config.num_warps, config.num_stages,
                     shared_kib * 1024, 0, registers, spilled)  # fmt: skip


class Made:
    """An experiment of made-up times. It counts its calls, and is interrupted before the one of a number."""

    times_of = dict(zip(CONFIGS, (1.0, 0.5, 0.4, 0.8)))
    wrong = CONFIGS[2]

    def __init__(self, interrupt_at=None):
        self.checked, self.timed, self.interrupt_at = [], [], interrupt_at

    def check(self, config):
        self.checked.append(config)
        if config == self.wrong:
            raise AssertionError("out: WRONG")

    def times(self, config):
        if len(self.timed) == self.interrupt_at:
            raise KeyboardInterrupt
        self.timed.append(config)
        ms = self.times_of[config]
        return [Timing(ms, 0.01 * ms), Timing(4 * ms, 0.01 * ms)]


def compile_all(place, *args, **kwargs):
    return [Compiled(config, cost(config=config), "") for config in CONFIGS]


def test_a_wrong_candidate_never_wins_and_the_winner_is_kept():
    tuned, made, steps = Tuned(), Made(), []
    tune([PLACE], tuned, lambda place: made, compile_all, rounds=3, advance=steps.append)
    assert tuned.finished and sum(steps) == len(CONFIGS)
    assert tuned.entries == {PLACE: CONFIGS[1]}
    assert made.checked == CONFIGS  # each before its first time, and once
    assert made.timed == [SHIPPED, CONFIGS[1], CONFIGS[3]] + [SHIPPED, CONFIGS[1]] * 2
    reasons = [stored["reason"] for stored in tuned.measured]
    assert reasons == ["", "", "AssertionError: out: WRONG", ""]


def test_what_does_not_compile_well_is_not_run():
    made = Made()
    found = compile_all(PLACE)
    found[1] = Compiled(CONFIGS[1], cost(spilled=200), "spills 200 bytes a thread")
    tune([PLACE], tuned := Tuned(), lambda place: made, lambda place: found)
    assert CONFIGS[1] not in made.checked and tuned.entries == {PLACE: CONFIGS[3]}


@pytest.mark.parametrize("calls", range(7))
def test_an_interrupt_loses_nothing(calls, tmp_path):
    file = tmp_path / "table.json"
    tables = {GPU: Tuned()}

    def save():
        tuned_table.write(file, tables)

    first = Made(interrupt_at=calls)
    with pytest.raises(KeyboardInterrupt):
        tune([PLACE], tables[GPU], lambda place: first, compile_all, save=save)
    tables = tuned_table.read(file)  # what another process finds
    assert not tables[GPU].finished and tables[GPU].entries == {}
    second = Made()
    tune([PLACE], tables[GPU], lambda place: second, lambda place: pytest.fail("compiled twice"), save=save)
    whole = Made()
    tune([PLACE], Tuned(), lambda place: whole, compile_all)
    assert first.timed + second.timed == whole.timed
    assert tuned_table.read(file)[GPU].entries == {PLACE: CONFIGS[1]} and tuned_table.read(file)[GPU].finished


# ------------------------------------------------------------------------------------------------------------
# Keeping and using
# ------------------------------------------------------------------------------------------------------------


def store(file, gpu=GPU, entries=None):
    tuned_table.write(file, {gpu: Tuned({PLACE: CONFIGS[1]} if entries is None else entries, {}, [], True)})
    forget()


def test_a_tuned_entry_goes_before_the_shipped_one(table):
    store(table)
    assert picked() == CONFIGS[1] and picked().source == str(table)
    assert picked(head_dim=65) == picked(head_dim=128, dtype=torch.bfloat16) == CONFIGS[1]
    for d, causal in ((64, False), (64, True), (128, False)):  # the others are as they were
        config = picked(head_dim=d, causal=causal)
        assert config == launch_table.shipped(Place("forward", d, causal, "16 bit"), GPU.capability)
        assert not config.source
    assert picked(dtype=torch.float32) == launch_table.shipped(PLACE._replace(dtype="float32"), GPU.capability)
    # What stands for a GPU that is not here does not ask this one's user.
    assert picked(device=torch.device("meta")) == SHIPPED
    assert picked(device=torch.device("cpu")) == LaunchConfig(128, 128)


def test_decoding_has_one_entry_for_both_masks(table):
    store(table, entries={Place("decode", 64, None, "16 bit"): LaunchConfig(16, 32, 4, 2)})
    assert {picked("decode", 64, causal=causal) for causal in (False, True)} == {LaunchConfig(16, 32, 4, 2)}


def test_the_table_is_read_once_in_a_process(table, monkeypatch):
    store(table)
    picked()
    monkeypatch.setattr(tuned_table, "read", lambda file: pytest.fail("read again"))
    assert picked() is picked() and picked(causal=False) is not None


def test_none_means_the_shipped_entries(table, monkeypatch):
    store(table)
    monkeypatch.setenv(tuned_table.VARIABLE, "none")
    forget()
    assert picked() == SHIPPED and tuned_table.path() is None


@pytest.mark.parametrize(
    "other", [GPU._replace(name="Other GPU"), GPU._replace(triton="3.6.0"), GPU._replace(capability=(8, 9))]
)
def test_a_table_of_another_gpu_or_triton_is_refused_with_one_message(table, other):
    store(table, other)
    with pytest.warns(UserWarning, match="are not used: this is Some GPU .8.6., triton 3.7.1") as told:
        assert picked() == SHIPPED
    assert len(told) == 1 and str(other) in str(told[0].message) and "labutils tune" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picked(causal=False) is not None


def damaged():
    good = {"kernel": "forward", "head_dim": 128, "causal": True, "dtype": "16 bit",
            "config": {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2, "tma": False}}  # fmt: skip
    table = {"gpu": "Some GPU", "capability": [8, 6], "triton": "3.7.1", "environment": {}, "measured": [],
             "finished": True}  # fmt: skip
    yield "not JSON", "{"
    yield "no table", "[]"
    yield "other format", json.dumps({"format": 2, "tables": []})
    yield "no finished", json.dumps({"format": 1, "tables": [{k: v for k, v in table.items() if k != "finished"}]})
    changes = {
        "no such kernel": {"kernel": "sideways"},
        "no such head dimension": {"head_dim": 96},
        "no such mask": {"causal": None},
        "no such dtype": {"dtype": "float8"},
    } | {
        f"{key} = {value!r}": {"config": good["config"] | {key: value}}
        for key, value in (
            ("block_m", 48), ("block_m", 8), ("block_n", 64.0), ("num_warps", 0), ("num_warps", 64),
            ("num_stages", "2"), ("tma", 1), ("colour", 3),
        )
    }  # fmt: skip
    for name, change in changes.items():
        yield name, json.dumps({"format": 1, "tables": [table | {"entries": [good | change]}]})


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in damaged()])
def test_a_damaged_table_is_an_error_with_a_remedy(table, text):
    table.parent.mkdir()
    table.write_text(text)
    with pytest.raises(RuntimeError, match="no table of launch configurations that can be used") as raised:
        picked()
    remedy = "name another file with LABUTILS_LAUNCH_TABLE" if text == "[]" else "labutils tune --reset"
    assert str(table) in str(raised.value) and remedy in str(raised.value)


def test_a_file_that_was_named_must_be_there(table, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="which is not there: unset it, or write that file"):
        picked()
    monkeypatch.delenv(tuned_table.VARIABLE)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    forget()
    assert tuned_table.path() == tmp_path / "labutils" / "launch_table.json"
    assert picked() == SHIPPED


class TooLarge:
    """Stands for a kernel that this GPU cannot launch."""

    arg_names = ("q_ptr", "BLOCK_M", "BLOCK_N")

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            raise OutOfResources(200_000, 101_376, "shared memory")

        return run


def test_a_tuned_entry_that_no_longer_fits_says_what_to_do(table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    tensor = types.SimpleNamespace(device=CUDA)
    with pytest.raises(RuntimeError, match="too small for LaunchConfig.*pass a `config` with smaller blocks"):
        launch.launch(TooLarge(), (1,), SHIPPED, tensor)
    store(table)
    with pytest.raises(RuntimeError, match="too small for LaunchConfig.*labutils tune --reset") as raised:
        launch.launch(TooLarge(), (1,), picked(), tensor)
    assert str(table) in str(raised.value)


def test_measurements_say_that_a_tuned_entry_was_in_force(table, monkeypatch):
    with monkeypatch.context() as without:
        without.setenv(tuned_table.VARIABLE, "none")
        shipped = environment.environment()
    assert shipped.launch_table is None and "launch_table" not in shipped.as_dict()
    store(table)
    first = environment._launch_table()
    store(table, entries={PLACE: CONFIGS[3]})
    second = environment._launch_table()
    assert first.startswith("1 tuned entries, ") and first != second
    tuned = replace(shipped, launch_table=second)
    assert differences(shipped.as_dict(), tuned.as_dict()) == [f"launch_table: None, now {second}"]
    monkeypatch.setattr(environment, "environment", lambda: tuned)
    assert second in environment.report()


# ------------------------------------------------------------------------------------------------------------
# Candidates
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", chips.GPUS, ids=lambda c: f"{c[0]}.{c[1]}")
def test_candidates_begin_with_the_shipped_entry(capability):
    found = candidates.places(capability=capability)
    assert {place.kernel for place in found} == set(launch_config.KERNELS)
    for place in found:
        tuned_table._check_place(place)
        configs = candidates.candidates(place, capability)
        assert configs[0] == launch_table.shipped(place, capability)
        assert 3 <= len(configs) == len(set(configs)) <= 60
        for config in configs:
            tuned_table._check_config(place, config)
        assert not any(config.tma for config in configs) or (capability >= (9, 0) and place.dtype == "16 bit")


def test_what_the_compiler_says_sorts_candidates_out():
    configs = [SHIPPED, LaunchConfig(128, 128, 8, 4)]
    told = []
    fits, too_large = candidates.compile_candidates(PLACE, (8, 6), configs, done=told.append)
    assert sum(told) == 2 and [fits.config, too_large.config] == configs
    assert fits.reason == "" and fits.resources.blocks_per_sm >= 1
    assert too_large.reason.startswith("too large: ") and "of 99 KiB" in too_large.reason


def test_reasons():
    assert candidates._reason(cost()) == ""
    assert candidates._reason(cost(spilled=64)) == "" and "spills 65" in candidates._reason(cost(spilled=65))
    assert "too large: 100 of 99 KiB" in candidates._reason(cost(shared_kib=100))


def test_the_best_by_resources():
    def one(m, n, warps, registers, shared_kib, spilled=0, reason="", stages=2):
        config = LaunchConfig(m, n, warps, stages)
        return Compiled(config, cost(registers, spilled, shared_kib, config=config), reason)

    alone, two, small = one(128, 128, 8, 250, 90), one(128, 64, 4, 250, 48), one(64, 64, 4, 128, 24)
    assert best_by_resources([alone, two, small]) == two.config  # two share a multiprocessor; its tile is larger
    assert best_by_resources([alone, one(128, 64, 4, 250, 48, spilled=8)]) == alone.config
    assert best_by_resources([one(64, 64, 4, 128, 24, stages=2), one(64, 64, 4, 128, 24, stages=3)]).num_stages == 3
    assert best_by_resources([one(64, 64, 4, 128, 24, reason="spills")]) is None


# ------------------------------------------------------------------------------------------------------------
# The experiment
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", launch_config.DTYPE_CLASSES)
def test_without_a_gpu_there_is_no_experiment(dtype, monkeypatch):
    monkeypatch.setattr(runtime, "capability", None)
    with pytest.raises(RuntimeError, match="no GPU here"):
        launches.OnGpu(Place("forward", 64, True, dtype))


@ON_CPU
@pytest.mark.parametrize("kernel", launch_config.KERNELS)
def test_the_check_finds_a_wrong_result(kernel, monkeypatch):
    monkeypatch.setattr(runtime, "capability", (8, 6))
    monkeypatch.setattr(launches, "CHECKED_LENGTH", 21)
    place = Place(kernel, 64, None if kernel in launch_config.ONE_FOR_BOTH_MASKS else True, "float32")
    experiment = launches.OnGpu(place)
    experiment.check(LaunchConfig(16, 32))
    module = {"v1": launches.flash_v1, "forward": launches.flash_v2, "decode": launches.flash_decode}.get(kernel)
    if module is None:
        right = launches.flash_v2_backward.backward

        def wrong(*args, **kwargs):
            dq, dk, dv = right(*args, **kwargs)
            return (dq * 1.01, dk, dv) if kernel == "dq" else (dq, dk, dv * 1.01)

        monkeypatch.setattr(launches.flash_v2_backward, "backward", wrong)
    else:
        name = "decode" if kernel == "decode" else "forward"
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: tuple(t * 1.01 for t in function(*a, **k)))
    with pytest.raises(AssertionError, match="WRONG"):
        experiment.check(LaunchConfig(16, 32))


@ON_CPU
@pytest.mark.parametrize("kernel", ["forward", "dq"])
def test_what_is_launched_again_is_still_there(kernel, monkeypatch):
    monkeypatch.setattr(runtime, "capability", (8, 6))
    monkeypatch.setattr(launches.OnGpu, "_shape", lambda self, n: (1, 32, 1, 16))
    launched = []

    def start(*args):
        """Of a kernel that writes to a tensor of its own."""
        tensor = torch.zeros(3)
        gone = weakref.ref(tensor)
        launched.append(gone)

        launch = types.SimpleNamespace(holds=tensor)
        return (None, None, launch) if kernel == "forward" else ((None,) * 3, {kernel: launch}, None)

    module = launches.flash_v2 if kernel == "forward" else launches.flash_v2_backward
    monkeypatch.setattr(module, "launch_forward" if kernel == "forward" else "launch_backward", start)
    monkeypatch.setattr(launches, "Replay", lambda launch: types.SimpleNamespace(again=lambda: None))
    experiment = launches.OnGpu(Place(kernel, 64, True, "float32"))
    calls = [experiment._launch(LaunchConfig(16, 16), n) for n in (32, 64)]
    gc.collect()
    assert [gone() is None for gone in launched] == [False, False]
    assert [call() for call in calls] == [None, None]
    del calls
    gc.collect()
    assert [gone() is None for gone in launched] == [True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", launch_config.KERNELS)
def test_an_experiment_on_this_gpu(kernel):
    place = Place(kernel, 64, None if kernel in launch_config.ONE_FOR_BOTH_MASKS else True, "16 bit")
    experiment = launches.OnGpu(place, seconds=0.01)
    config = launch_table.shipped(place, runtime.capability)
    experiment.check(config)
    timings = experiment.times(config)
    assert timings and all(timing.median_ms > 0 for timing in timings)


@pytest.mark.gpu
def test_a_call_uses_the_tuned_entry(tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    place = Place("forward", 64, True, "16 bit")
    monkeypatch.setenv(tuned_table.VARIABLE, str(file))
    store(file, TunedFor.here(), {place: LaunchConfig(256, 256, 4, 8)})
    try:
        q = torch.randn(1, 77, 3, 64, device=runtime.device, dtype=torch.float16)
        with pytest.raises(RuntimeError, match="labutils tune --reset"):
            interface.flash_attn_func(q, q, q, causal=True)
    finally:
        forget()


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(table, monkeypatch):
    """A GPU whose times are made up; the experiment that the command will use."""
    monkeypatch.setattr(runtime, "capability", GPU.capability)
    monkeypatch.setattr(candidates, "compile_candidates", compile_all)
    monkeypatch.setattr(candidates, "candidates", lambda place, capability: CONFIGS)
    made = Made()
    monkeypatch.setattr(launches, "OnGpu", lambda place, seconds: made)
    return made


ONE = ["tune", "--kernels", "forward", "--head-dims", "128"]


def test_the_command_tunes_and_shows_and_resets(gpu, table, capsys):
    assert main(ONE) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 configurations are faster" in printed and str(table) in printed
    assert printed.count("it takes its place") == 2
    assert main(["tune", "--show"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in shown if line.startswith("  forward, D up to 128,") and "16 bit" in line] == [
        "tuned"
    ] * 2
    assert sum(line.endswith("shipped") for line in shown) > 10
    forget()
    assert picked() == CONFIGS[1]
    assert main(["tune", "--reset"]) == 0 and not table.exists()
    assert main(["tune", "--reset"]) == 0 and "There is no table" in capsys.readouterr().out


def test_the_command_goes_on_after_an_interrupt(gpu, table, capsys):
    gpu.interrupt_at = 8  # of the second of two places
    assert main(ONE) == command.INTERRUPTED
    assert "--resume measures the rest" in capsys.readouterr().out
    assert len(tuned_table.read(table)[GPU].entries) == 1
    assert main(ONE) == 2
    assert "go on with --resume, or remove it with --reset" in capsys.readouterr().err
    gpu.interrupt_at = None
    assert main([*ONE, "--resume"]) == 0
    assert len(gpu.timed) == 14  # seven each, none twice
    assert len(tuned_table.read(table)[GPU].entries) == 2
    assert main([*ONE, "--resume"]) == 0 and len(gpu.timed) == 14  # nothing was left


def test_what_was_begun_elsewhere_is_not_gone_on_with(gpu, table, capsys):
    gpu.interrupt_at = 3
    main(ONE)
    tables = tuned_table.read(table)
    tables[GPU].environment["driver"] = "1.0"
    tuned_table.write(table, tables)
    assert main([*ONE, "--resume"]) == 2
    assert "another environment (driver: 1.0, now" in capsys.readouterr().err


def test_tuning_anew_forgets_the_old_times_and_keeps_other_entries(gpu, table):
    other = TunedFor("Other GPU", (9, 0), "3.6.0")
    tuned_table.write(table, {other: Tuned({PLACE: CONFIGS[3]}, {}, [], True)})
    assert main(ONE) == 0 and main(ONE) == 0
    assert len(gpu.timed) == 28
    tables = tuned_table.read(table)
    assert tables[other].entries == {PLACE: CONFIGS[3]} and len(tables[GPU].measured) == 2 * len(CONFIGS)


def test_the_command_lists_what_the_compiler_says(gpu, capsys):
    assert main([*ONE, "--compile-only", "--capability", "8.9"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("compute capability 8.9 (RTX 4090, L4)") == 2
    assert "registers" in printed and "occupancy" in printed and " *" in printed and ">" in printed


def test_a_damaged_table_ends_the_command_with_a_remedy(gpu, table, capsys):
    table.parent.mkdir()
    table.write_text("{")
    for arguments in (ONE, ["tune", "--show"]):
        assert main(arguments) == 1
        assert "--reset" in capsys.readouterr().err
    assert main(["tune", "--reset"]) == 0 and main(ONE) == 0


@ON_CPU
def test_without_a_gpu_the_command_names_cause_and_remedy(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(tuned_table.VARIABLE, str(tmp_path / "table.json"))
    assert main(["tune"]) == 1
    assert "there is no GPU to time kernels on" in capsys.readouterr().err
    assert main(["tune", "--compile-only"]) == 1
    assert "--capability 8.6" in capsys.readouterr().err
    assert main(["tune", "--show"]) == 0 and "interpreter" in capsys.readouterr().out
    assert main(["tune", "--show", "--capability", "12.0"]) == 0
    shown = capsys.readouterr().out
    assert "RTX" not in shown and shown.count("shipped\n") >= 20
    assert not (tmp_path / "table.json").exists()


def test_bad_arguments_are_named(monkeypatch, capsys):
    assert main(["tune", "--capability", "8.6"]) == 2
    assert main(["tune", "--show", "--capability", "8.7"]) == 2
    assert "8.7 nothing is known: 7.5, 8.0" in capsys.readouterr().err
    monkeypatch.setattr(runtime, "capability", (8, 6))
    assert main(["tune"]) == 2 and "LABUTILS_LAUNCH_TABLE=none says" in capsys.readouterr().err
    for bad in (["--kernels", "all"], ["--head-dims", "96,x"], ["--rounds", "0"], ["--show", "--reset"]):
        with pytest.raises(SystemExit):
            command.parser().parse_args(bad)


def test_the_lists_of_the_help_are_those_of_the_table():
    assert command.KERNELS == launch_config.KERNELS and command.HEAD_DIMS == launch_config.HEAD_DIMS
    assert tuple(command.DTYPES.values()) == launch_config.DTYPE_CLASSES
