"""labutils.gpt2.models: sizes are GPT-2's, weights are random or trained, and the model says which."""

import pytest
import torch
from small_gpt2 import make, tokens

from labutils import runtime
from labutils.gpt2 import models, rope


@pytest.mark.parametrize("size, parameters", [("124M", 124_439_808), ("355M", 354_823_168)])
def test_sizes_are_gpt2s(size, parameters):
    with torch.device("meta"):
        model = models.gpt2(size, attention="sdpa")
    assert model.num_parameters() == parameters
    assert (model.config.attn_pdrop, model.config.resid_pdrop, model.config.embd_pdrop) == (0.0, 0.0, 0.0)


def test_overrides_and_the_same_weights_for_the_same_seed():
    model = make("sdpa", resid_pdrop=0.2, n_positions=128)
    assert model.config.resid_pdrop == 0.2 and model.transformer.wpe.weight.shape == (128, 32)
    assert model.config._attn_implementation == "sdpa" and model.config.eos_token_id is None
    other = make("eager", n_positions=128)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_unknown_size_and_unknown_attention():
    with pytest.raises(ValueError, match="124M, 355M"):
        models.gpt2("125M")
    with pytest.raises(ValueError, match="attn_implementation"):
        models.gpt2("nano", attention="no_such_attention")


def test_load_gpt2_from_a_saved_model(tmp_path):
    saved = make("eager", attn_pdrop=0.1)
    saved.save_pretrained(tmp_path)
    loaded = models.load_gpt2(tmp_path).to(runtime.device)
    assert loaded.config._attn_implementation == "labutils"
    assert loaded.config.attn_pdrop == 0.0 and not loaded.training
    ids = tokens(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, saved(ids).logits)


@pytest.mark.parametrize("attention", ["labutils", "sdpa"])
def test_a_rotary_model_is_saved_and_loaded_with_the_same_logits(attention, tmp_path):
    """F10: the table of positions was random after loading, and two loads differed."""
    saved = rope.use_rope(make("sdpa", initializer_range=0.3), base=500.0)
    saved.save_pretrained(tmp_path)
    loaded = models.load_gpt2(tmp_path, attention=attention).to(runtime.device)
    assert loaded.config.lab_rope_base == 500.0
    ids = tokens(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, saved(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert models.load_gpt2(tmp_path / "again", attention=attention).config.lab_rope_base == 500.0


def test_a_configuration_with_rotary_positions_makes_a_rotary_model():
    """F10: the field was stored and ignored, and the loss took the model for a rotary one."""
    model, ids = make("sdpa", lab_rope_base=500.0, initializer_range=0.3), tokens(1, 12)
    same = rope.use_rope(make("sdpa", initializer_range=0.3), base=500.0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, same(ids).logits)


def test_a_saved_model_without_some_weights_is_refused(tmp_path):
    """F10: whatever the files lack was random, and two loads differed."""
    from safetensors.torch import load_file, save_file

    make("sdpa").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.wpe.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 of .*transformer\.wpe\.weight"):
        models.load_gpt2(tmp_path)


def test_the_loss_of_the_model_comes_without_a_warning(capfd, tmp_path):
    make("sdpa").save_pretrained(tmp_path)
    for model in (make("sdpa"), models.load_gpt2(tmp_path, attention="sdpa").to(runtime.device)):
        model(tokens(1, 8), labels=tokens(1, 8))
    captured = capfd.readouterr()
    assert "loss_type" not in captured.out + captured.err


def test_load_gpt2_says_what_is_missing(monkeypatch, tmp_path):
    from transformers import GPT2LMHeadModel

    def unreachable(*args, **options):
        raise OSError("no connection, no cache")

    with pytest.raises(FileNotFoundError, match="Connect to the internet once"):
        models.load_gpt2(tmp_path)
    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", unreachable)
    with pytest.raises(FileNotFoundError, match=r"no connection, no cache.*labutils.gpt2.models.gpt2\(\)"):
        models.load_gpt2("gpt2")


def test_trained_weights_where_they_can_be_had(monkeypatch):
    asked = []

    def load(name, **options):
        asked.append((name, options.get("local_files_only", False)))
        if options.get("local_files_only") or not reachable:
            raise FileNotFoundError(name)
        return make("eager")

    monkeypatch.setattr(models, "load_gpt2", load)
    monkeypatch.setattr(models, "_why_no_hub", lambda name, seconds: None if reachable else "no connection")
    reachable = True
    assert models.gpt2_trained_or_not("355M")[1] == "gpt2-medium: trained weights, from the hub"
    assert asked == [("gpt2-medium", True), ("gpt2-medium", False)]
    reachable = False
    model, says = models.gpt2_trained_or_not("124M", otherwise="nano")
    assert "random weights" in says and "no connection" in says and "nano" in says
    assert model.config.lab_size == "nano" and not model.training
    with pytest.raises(ValueError, match="124M, 355M"):
        models.gpt2_trained_or_not("nano")


def test_an_offline_hub_is_not_asked():
    assert models._why_no_hub("gpt2", 1.0) == "HF_HUB_OFFLINE is set"  # as in all tests
