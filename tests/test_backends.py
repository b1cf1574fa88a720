"""labutils.attention.backends: what an entry claims, and that a new backend is one entry in one file."""

import subprocess
import sys

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from labutils import analysis, benchmark, plotting, runtime
from labutils.analysis import prediction
from labutils.attention import backends, probing, reference
from labutils.attention.backends import BACKENDS, FEATURES, Backend, Unsupported, name_in_tables
from labutils.benchmark import environment
from labutils.commands import bench, train
from labutils.machine import chips
from labutils.training.attention_used import _attention_of

RUNNABLE = [name for name, backend in BACKENDS.items() if backend.load]
ON_CPU = runtime.device.type == "cpu"


# --- what the entries claim -------------------------------------------------------------------------------


def here(name):
    """The entry, if it runs on this machine; else the test is skipped."""
    for trial in probing.trials():
        if trial.name == name and not trial.available:
            pytest.skip(trial.reason)
    return BACKENDS[name]


def draw(n_q, n_k, heads, heads_kv, head_dim=64):
    dtype = torch.float32 if ON_CPU else torch.float16
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, n_q, heads, head_dim), (1, n_k, heads_kv, head_dim), (1, n_k, heads_kv, head_dim))
    return [torch.randn(shape, generator=generator).to(runtime.device, dtype) for shape in shapes]


@pytest.mark.parametrize("name", [name for name in RUNNABLE if "gqa" in BACKENDS[name].can])
def test_shared_heads_are_as_the_entry_says(name):
    q, k, v = draw(24, 24, 4, 2)
    out = here(name).function(q, k, v, causal=True)
    reference.check_attention(out, q, k, v, causal=True, factor=3).raise_if_failed()


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_causal_mask_over_more_keys_is_as_the_entry_says(name):
    q, k, v = draw(16, 40, 2, 2)
    backend = here(name)
    if "bottom_right" in backend.can:
        out = backend.function(q, k, v, causal=True)
        reference.check_attention(out, q, k, v, causal=True, factor=3).raise_if_failed()
    else:
        with pytest.raises(Unsupported, match="bottom right"):
            backend.function(q, k, v, causal=True)


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_backward_pass_is_as_the_entry_says(name):
    q, k, v = (t.requires_grad_() for t in draw(16, 16, 2, 2))
    backend = here(name)
    if backend.backward:
        backend.function(q, k, v).sum().backward()
        assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v))
    else:
        with pytest.raises((Unsupported, NotImplementedError)):
            backend.function(q, k, v)


@pytest.mark.parametrize("name", ["triton_v1", "triton_v2"])
def test_the_largest_head_dimension_is_as_the_entry_says(name):
    backend = here(name)
    largest = backend.largest_head_dim
    q, k, v = draw(4, 4, 1, 1, largest)
    reference.check_attention(backend.function(q, k, v), q, k, v, factor=3).raise_if_failed()
    with pytest.raises(ValueError, match=f"support 1 to {largest}\\."):
        backend.function(*draw(4, 4, 1, 1, largest + 1))


def test_entries_are_consistent():
    for name, backend in BACKENDS.items():
        assert backend.name == name and backend.title and backend.label and backend.marker
        assert backend.can <= set(FEATURES) and backend.forward_only <= backend.can
        assert backend.lacks_on_cpu <= backend.can and (backend.on_cpu or not backend.lacks_on_cpu)
        assert backend.lowest_capability is None or backend.lowest_capability in chips.GPUS
        assert all(hasattr(torch, dtype) for dtype in backend.dtypes)
        assert bool(backend.call) == (backend.load is not None) or not backend.advised
        if backend.sdp_backend:
            assert hasattr(torch.nn.attention.SDPBackend, backend.sdp_backend)
    operators = [operator for backend in BACKENDS.values() for operator in backend.operators]
    named = [backend.transformers for backend in BACKENDS.values() if backend.transformers]
    assert len(set(operators)) == len(operators) and len(set(named)) == len(named)


def test_what_is_only_drawn_cannot_be_called():
    assert list(benchmark.IMPLEMENTATIONS) == RUNNABLE and "notebook_v1" not in benchmark.IMPLEMENTATIONS
    with pytest.raises(KeyError):
        benchmark.IMPLEMENTATIONS["notebook_v1"]
    with pytest.raises(Unsupported, match="name for figures"):
        BACKENDS["notebook_v1"].function  # noqa: B018
    assert plotting.LABELS["notebook_v1"] == "v1 of this notebook"


def test_the_registry_is_read_without_torch():
    code = (
        "import sys; sys.argv = ['-m']; from labutils.attention.backends import BACKENDS, IMPLEMENTATIONS; "
        "print(len(BACKENDS), len(IMPLEMENTATIONS), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(BACKENDS)), str(len(RUNNABLE)), "False"]


def test_a_function_is_made_once():
    assert benchmark.IMPLEMENTATIONS["naive"] is benchmark.IMPLEMENTATIONS["naive"] is BACKENDS["naive"].function


def test_a_package_that_is_missing_is_said_when_it_is_called(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it fails
    attention = backends._load_flash_attn()
    with pytest.raises(Unsupported, match="flash-attn package cannot be imported"):
        attention(*draw(4, 4, 1, 1))


@pytest.mark.parametrize(
    ("transformers", "ours"),
    [("eager", "naive"), ("sdpa", "sdpa"), ("flash_attention_2", "flash_attn"), ("labutils", "triton_v2"),
     ("labutils_v1", "triton_v1"), ("flex_attention", "flex_attention")],
)  # fmt: skip
def test_names_of_transformers(transformers, ours):
    assert name_in_tables(transformers) == ours


# --- a new backend is one entry ---------------------------------------------------------------------------


@pytest.fixture
def invented(monkeypatch):
    """A backend that no file of labutils names."""

    def attention(q, k, v, *, causal=False, softmax_scale=None):
        return reference.naive_attention(q, k, v, causal=causal, softmax_scale=softmax_scale)

    entry = Backend(
        name="invented", title="an invented kernel", label="invented, as drawn", color="#123456", marker="8",
        load=lambda: attention, call="invented.attention(...)", transformers="invented_attention",
        flash=True, row_programs=True, io_model="v1", advised=True,
        can=frozenset({"window", "score_mod"}), on_cpu="compiled", operators=("invented::attention",),
    )  # fmt: skip
    monkeypatch.setitem(BACKENDS, "invented", entry)
    return entry


def test_check_tries_a_new_backend(invented):
    [trial] = [trial for trial in probing.trials() if trial.name == "invented"]
    assert trial.available and trial.runs_on == ("cpu" if ON_CPU else "gpu")
    assert (
        "an invented kernel  " in environment.report() and "an invented kernel" in environment.report().splitlines()[-1]
    )
    assert environment.report_as_dict()["backends"][-1]["name"] == "invented"


def test_bench_and_sweep_measure_a_new_backend(invented, capsys):
    table = benchmark.sweep(["invented"], [16], heads=1, head_dim=16, seconds_per_point=0.01, warm_up=0, progress=False)
    assert list(table["status"]) == ["ok"] and table["max_error"][0] < 1e-2
    assert bench.parser().parse_args(["--impls", "invented"]).impls == ["invented"]
    assert "invented" in bench._swept(on_gpu=True) and "invented" in bench._swept(on_gpu=False)
    with pytest.raises(SystemExit):
        bench.parser().parse_args(["--help"])
    assert "tiled_v2, invented" in " ".join(capsys.readouterr().out.split())


def test_figures_draw_a_new_backend(invented):
    look = plotting.style.look_of("invented")
    assert (look["color"], look["marker"], look["label"]) == ("#123456", "8", "invented, as drawn")
    assert plotting.COLORS["invented"] == "#123456" and dict(plotting.LABELS)["invented"] == "invented, as drawn"
    stored = benchmark.reference_results().query(
        "`pass` == 'fwd' and head_dim == 64 and not causal and impl == 'naive'"
    )
    figure = plotting.plot_time(stored.assign(impl="invented"))
    drawn = {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}
    assert drawn["invented, as drawn"] == "#123456"
    plt.close(figure)
    renamed = pd.DataFrame({"ms": [1.0]}, index=["invented"]).rename(index=plotting.LABELS)  # as the notebooks do
    assert list(renamed.index) == ["invented, as drawn"]


def test_advice_weighs_a_new_backend(invented):
    asked = dict(seqlen=4096, head_dim=64, capability=chips.HOPPER)
    found = analysis.recommend(**asked, available=["invented"])
    assert found.impl == "invented" and found.call == "invented.attention(...)" and "do not know" in found.reasons[0]
    with pytest.raises(ValueError, match="invented: it has no paged"):
        analysis.recommend(**asked, features=["paged"], available=["invented"])
    known = analysis.recommend(**asked, features=["score_mod"])
    assert known.impl == "flex" and known.otherwise[-1] == "invented"  # what the rules rank comes first
    assert analysis.recommend(**asked | {"capability": None}, available=["invented"]).impl == "invented"


def test_the_model_predicts_a_new_backend(invented):
    rows = prediction.stored_predictions().query("impl == 'triton_v2' and split == 'fit' and `pass` == 'fwd'")
    gpu = prediction.Gpu.stored()
    fits = prediction.fit(rows.assign(impl="invented"), gpu)
    assert {key[0] for key in fits} == {"invented"}
    assert not prediction.predict(fits, rows.assign(impl="invented"), gpu).empty


def test_the_roofline_counts_the_traffic_of_a_new_backend_by_its_model(invented):
    stored = benchmark.reference_results().query("impl == 'triton_v1'")
    ceilings = analysis.stored_ceilings()
    as_v1, as_invented = (
        analysis.roofline_points(stored.assign(impl=name), ceilings) for name in ("triton_v1", "invented")
    )
    assert (as_v1["model_bytes"] == as_invented["model_bytes"]).all()


def test_training_finds_a_new_backend(invented):
    assert _attention_of({"invented::attention": 3, "aten::_softmax": 2}) == {"invented": 3, "naive": 2}
    assert train._described("invented") == "an invented kernel"
    assert name_in_tables("invented_attention") == "invented"
