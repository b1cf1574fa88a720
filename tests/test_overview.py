"""The README's figure and its table of speeds are those of the stored results."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from notebook_format import ROOT
from PIL import Image

import figure
import overview
from labutils import benchmark

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_s_figure_was_drawn_from_the_tables_that_are_stored():
    drawn = benchmark.RESULTS / "nvidia_h200" / figure.NAME
    assert f"({drawn.relative_to(ROOT)})" in README and "python tools/figure.py" in README
    with Image.open(drawn) as image:
        drawn_from = image.text[figure.KEY]
    assert drawn_from == figure.source("nvidia_h200"), "draw it again: python tools/figure.py"


def test_the_command_draws_it(tmp_path, capsys):
    out = tmp_path / "new" / "x.png"
    assert figure.run(["--out", str(out), "--head-dim", "64", "--full"]) == 0 and str(out) in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.text[figure.KEY] == figure.source("nvidia_h200", head_dim=64, causal=False)
        assert image.text[figure.KEY] != figure.source("nvidia_h200") and image.width > 1000
    assert not plt.get_fignums()


def test_what_cannot_be_drawn_says_why(tmp_path, capsys):
    assert figure.run(["--gpu", "no_such_gpu"]) == 2 and "nvidia_h200" in capsys.readouterr().err
    assert figure.run(["--head-dim", "7"]) == 2 and "head dimension 7" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert figure.run(["--out", str(tmp_path / "file" / "x.png")]) == 2 and "file" in capsys.readouterr().err
    attention, ladder = benchmark.reference_results(), benchmark.reference_results(table="ladder")
    with pytest.raises(ValueError, match="choose one head_dim"):
        overview.plot_overview(attention, ladder)
    one = attention[(attention["head_dim"] == 64) & attention["causal"]]
    with pytest.raises(ValueError, match="no rows of 7B"):
        overview.plot_overview(one, ladder, model="7B")
    with pytest.raises(ValueError, match="choose one cap_gib"):
        overview.plot_overview(one, pd.concat([ladder, ladder.assign(cap_gib=8.0)]))


def test_the_cap_of_the_ladder_stands_in_the_title():
    attention, ladder = benchmark.reference_results(), benchmark.reference_results(table="ladder")
    one = attention[(attention["head_dim"] == 64) & attention["causal"]]
    for cap, title in ((ladder["cap_gib"].iloc[0], "within 16 GB"), (24e9 / 2**30, "within 24 GB")):
        axes = overview.plot_overview(one, ladder.assign(cap_gib=cap)).axes
        assert any(title in ax.get_title(loc="left") for ax in axes)


def test_the_readme_s_speeds_are_the_stored_ones():
    """Each cell of the table: the geometric mean of FlashAttention-2's time over an implementation's."""
    rows = benchmark.reference_results(dtype="float16")
    rows = rows[rows["seqlen"].isin([1024, 4096, 16384]) & (rows["status"] == "ok")]
    ms = rows.pivot(index=["pass", "head_dim", "causal", "seqlen"], columns="impl", values="ms")
    speed = np.exp(np.log(ms.rdiv(ms["sdpa_flash"], axis=0)).groupby("pass").mean())
    names = {"this lab's kernels": "triton_v2", "FlexAttention, compiled": "flex", "cuDNN": "sdpa_cudnn",
             "flash-attn 2.8.3": "flash_attn"}  # fmt: skip
    for label, impl in names.items():
        fwd, bwd = re.search(rf"^\| {re.escape(label)}.*?\| ([\d.]+) \| ([\d.]+) \|$", README, re.M).groups()
        assert (fwd, bwd) == tuple(f"{speed.loc[which, impl]:.2f}" for which in ("fwd", "bwd")), label
