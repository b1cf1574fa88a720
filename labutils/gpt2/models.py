"""GPT-2 in its four sizes and two small ones: made with random weights, or loaded with trained ones.

`gpt2` makes a model from its configuration and needs no network. `load_gpt2` reads trained weights from a folder, from
the cache on this machine or from the Hugging Face hub. `gpt2_trained_or_not` takes what this machine can get.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from labutils.gpt2.attention import register_attention
from labutils.gpt2.rope import use_rope

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

GPT2_SIZES: dict[str, tuple[int, int, int]] = {
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
    "tiny": (2, 2, 128),
    "nano": (2, 2, 32),
}
"""Layers, heads and width. The first four are Radford et al. 2019, table 2, named by today's parameter counts. The last
two are small enough for two CPU cores and for Triton's interpreter."""

HUB_NAMES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}
"""The names of the sizes on the Hugging Face hub."""

ONE_GELU = {"activation_function": "gelu_pytorch_tanh"}
"""Configuration fields that make GPT-2's GELU one operation, which keeps only its input for the backward pass.
By default transformers computes it in several operations."""


def gpt2(
    size: str = "124M",
    *,
    n_positions: int = 1024,
    vocab_size: int = 50257,
    attention: str = "labutils",
    **overrides: Any,
) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, made from its configuration: nothing is downloaded.

    Weights come from torch's global generator. Call `torch.manual_seed` first, and two models that differ only in
    `attention` have equal weights. The model is on the CPU, in float32, in training mode.

    Args:
        size: a key of `GPT2_SIZES`: "124M", "355M", "774M", "1558M"; "tiny" (2 layers, width 128) and "nano" (2 layers,
            width 32) for a CPU.
        n_positions: longest sequence, N.
        vocab_size: entries of the tokenizer.
        attention: "labutils" (our kernels), "sdpa", "eager" (standard attention), or another registered name.
        overrides: further `GPT2Config` fields. Dropout (`attn_pdrop`, `resid_pdrop`, `embd_pdrop`) is 0 by default,
            because comparisons of losses and gradients need it. `lab_rope_base` gives the model rotary positions, as
            `labutils.gpt2.rope.use_rope` does.

    Raises:
        ValueError: an unknown size, or an `attention` that transformers does not know.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    if size not in GPT2_SIZES:
        raise ValueError(f"size must be one of {', '.join(GPT2_SIZES)}; got {size!r}")
    layers, heads, width = GPT2_SIZES[size]
    fields = {
        "n_layer": layers,
        "n_head": heads,
        "n_embd": width,
        "n_positions": n_positions,
        "vocab_size": vocab_size,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "lab_size": size,  # the name of this model in tables
    }
    if vocab_size != 50257:  # GPT-2's end-of-text, 50256, belongs to its own vocabulary
        fields |= {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(**(fields | overrides))
    if attention == "labutils":
        register_attention(attention)
    config._attn_implementation = attention
    return _finished(GPT2LMHeadModel(config))


def load_gpt2(name: str | Path = "gpt2", *, attention: str = "labutils", **overrides: Any) -> GPT2LMHeadModel:
    """GPT-2 with its trained weights, from the Hugging Face hub, its cache on this machine, or a folder.

    Args:
        name: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", or a folder that `save_pretrained` wrote.
        attention: as in `gpt2`.
        overrides: config fields to change. Attention dropout is 0 by default. The other dropouts stay as trained: 0.1,
            active only in training mode.

    Returns:
        The model on the CPU, in evaluation mode. If it was saved with rotary positions, it has them again.

    Raises:
        ValueError: the files lack weights of the model. transformers would make random ones.
        FileNotFoundError: the weights are not in the folder or the cache, and the hub cannot be reached. (transformers
            tries the hub for half a minute; HF_HUB_OFFLINE=1 in the environment avoids that.)
    """
    from transformers import GPT2LMHeadModel

    if attention == "labutils":
        register_attention(attention)
    overrides = {"attn_pdrop": 0.0} | overrides
    try:
        model, report = GPT2LMHeadModel.from_pretrained(
            name, attn_implementation=attention, output_loading_info=True, **overrides
        )
    except OSError as error:
        raise FileNotFoundError(
            f"{str(name)!r} is not a folder with a saved model, and neither the Hugging Face cache of this "
            f"machine nor the hub gave it ({str(error).splitlines()[0]}). Connect to the internet once (the files stay "
            "in the cache), name a folder, or use labutils.gpt2.models.gpt2(): the same model with random weights"
        ) from error
    # The table of positions is not saved with a rotary model, which does not use it.
    table = {"transformer.wpe.weight"} if getattr(model.config, "lab_rope_base", None) is not None else set()
    missing = sorted(set(report["missing_keys"]) - table)
    if missing:
        raise ValueError(
            f"the files of {str(name)!r} lack {len(missing)} of the model's weights, the first is {missing[0]!r}: they "
            "would be random. Name a folder that save_pretrained wrote from a complete GPT-2 language model"
        )
    return _finished(model)


def gpt2_trained_or_not(
    size: str = "124M", *, otherwise: str | None = None, attention: str = "labutils", seconds: float = 3.0
) -> tuple[GPT2LMHeadModel, str]:
    """GPT-2 with its trained weights if this machine has them or can download them, else with random weights.

    The cache of this machine is tried first, then the hub, which sends 0.5 GB for 124M. HF_HUB_OFFLINE=1 in the
    environment forbids the hub.

    Args:
        size: a key of `HUB_NAMES`.
        otherwise: the size of the model with random weights, a key of `GPT2_SIZES`; by default `size`.
        attention: as in `gpt2`.
        seconds: how long to wait for the hub's first answer.

    Returns:
        The model, on the CPU, in evaluation mode, and a sentence that says which weights it has and why.

    Raises:
        ValueError: a size that the hub does not have.
    """
    if size not in HUB_NAMES:
        raise ValueError(f"size must be one of {', '.join(HUB_NAMES)}; got {size!r}")
    name = HUB_NAMES[size]
    try:
        return load_gpt2(name, attention=attention, local_files_only=True), f"{name}: trained weights, from the cache"
    except FileNotFoundError:
        reason = _why_no_hub(name, seconds)
    why = f"not in this machine's cache, and the hub was not reached ({reason})"
    if reason is None:
        try:
            return load_gpt2(name, attention=attention), f"{name}: trained weights, from the hub"
        except FileNotFoundError as error:  # a lost connection, a full disk
            why = f"not to be had from the hub, which answered ({str(error.__cause__ or error).splitlines()[0]})"
    made = otherwise or size
    return gpt2(made, attention=attention).eval(), f"{name} is {why}: random weights, from the configuration of {made}"


def _why_no_hub(name: str, seconds: float) -> str | None:
    """Why the hub does not answer for this model; None if it does."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=seconds)
    except Exception as error:  # the network, a proxy or the hub may fail in any way: there are no weights
        return type(error).__name__
    return None


def _finished(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Sets the loss, and gives the model the rotary positions that its configuration asks for."""
    # transformers guesses the loss from the class's name. For GPT-2 the guess fails, and it warns before it takes this.
    model.loss_type = "ForCausalLM"
    base = getattr(model.config, "lab_rope_base", None)
    if base is None:
        return model
    model.config.lab_rope_base = None  # the model has no rotary positions yet
    return use_rope(model, base)
