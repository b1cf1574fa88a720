"""The registration with transformers over its architectures: equal to standard attention, or refused.

Always a few of each kind; with LABUTILS_ALL_MODELS=1 in the environment all that can be built small.
"""

import os

import all_models
import pytest

from labutils.gpt2 import attention

EXPECTED = {
    ("causal", "Llama"): "right",  # grouped heads, rotary positions
    ("causal", "GPTNeoX"): "right",
    ("causal", "OPT"): "right",  # positions counted by the mask
    ("causal", "Bloom"): "refused",  # attention code of its own
    ("causal", "Gemma2"): "refused",  # windows
    ("masked", "Bert"): "right",
    ("seq2seq", "Bart"): "right",  # attention across
    ("seq2seq", "T5"): "refused",  # a position bias
}


def chosen():
    """(kind, configuration's class, what must come out or None)."""
    for kind, mapping in all_models.KINDS.items():
        for config_class in mapping:
            name = config_class.__name__.removesuffix("Config")
            if (kind, name) in EXPECTED or os.environ.get("LABUTILS_ALL_MODELS") == "1":
                yield pytest.param(kind, config_class, EXPECTED.get((kind, name)), id=f"{kind}-{name}")


@pytest.mark.parametrize("kind, config_class, expected", chosen())
def test_right_or_refused(kind, config_class, expected):
    """F1, F2, F4: logits, a changed last token, padded rows and packed rows, each as standard attention or refused."""
    attention.register_attention()
    classes = all_models.KINDS[kind][config_class]
    model_class = classes[0] if isinstance(classes, tuple) else classes
    try:
        model = all_models.small_model(config_class, model_class, kind)
    except Exception as error:
        if expected is None:
            pytest.skip(f"cannot be built small: {type(error).__name__}: {str(error)[:100]}")
        raise
    found, _ = all_models.outcome(model, kind)
    assert not [case for case, result in found.items() if result.startswith(("WRONG", "ERROR"))], found
    if expected is not None:
        packed = {case: result for case, result in found.items() if case.startswith("packed")}
        assert all(result.startswith("refused") for result in packed.values()), packed
        assert {result.split(":")[0] for case, result in found.items() if case not in packed} == {expected}, found
