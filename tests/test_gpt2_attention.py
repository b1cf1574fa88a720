"""labutils.gpt2.attention: GPT-2 on our kernels computes what eager computes, and refuses what it cannot do."""

import copy

import pytest
import torch
from small_gpt2 import make, tokens

from labutils import runtime
from labutils.attention.reference import judge
from labutils.gpt2 import attention as gpt2_attention
from labutils.gpt2 import models

DEVICE = runtime.device
LOW_DTYPES = [torch.float32, torch.bfloat16]


def like(model, attention, dtype=None):
    """The same weights with another attention and dtype."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = attention
    other = type(model)(config).to(DEVICE).eval()
    other.load_state_dict(model.state_dict())
    return other.to(dtype) if dtype else other


def trio(dtype):
    """(ours, eager in the same dtype, eager in float64), all with the same weights."""
    ours = make().to(dtype)
    return ours, like(ours, "eager", dtype), like(ours, "eager").double()


# --- equal to eager -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_logits_obey_the_2x_rule(dtype):
    ids = tokens(2, 45)
    with torch.no_grad():
        out, low, ref = (model(ids).logits for model in trio(dtype))
    assert out.dtype == dtype
    judge(out, ref, low, name="logits").raise_if_failed()


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_gradients_obey_the_rule(dtype):
    ids = tokens(1, 45)
    gradients = []
    for model in trio(dtype):
        model.train()  # dropout is 0 by construction
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    out, low, ref = gradients
    assert len(out) == len(ref) > 20
    for name in ref:
        judge(out[name], ref[name], low[name], factor=3.0, name=name).raise_if_failed()
    assert ref["transformer.h.0.attn.c_attn.weight"].abs().max() > 0


def test_the_kernel_is_what_runs(monkeypatch):
    calls = []
    real = gpt2_attention.flash_attn_func

    def spy(q, k, v, *options):
        calls.append((tuple(q.shape), q.is_contiguous(), options))
        return real(q, k, v, *options)

    monkeypatch.setattr(gpt2_attention, "flash_attn_func", spy)
    with torch.no_grad():
        make()(tokens(2, 20), use_cache=False)
        assert len(calls) == 2  # one per layer
        shape, contiguous, options = calls[0]
        assert shape == (2, 20, 2, 16) and not contiguous  # views of the fused projection, never copied
        assert options == (0.0, 16**-0.5, True)  # dropout_p, softmax_scale, causal
        like(make(), "eager")(tokens(2, 20))
    assert len(calls) == 2


def test_generation_runs_on_the_decoding_kernel(monkeypatch):
    queries = []
    real = gpt2_attention.flash_attn_with_kvcache

    def spy(q, k, v, **options):
        queries.append((q.shape[1], options["cache_leftpad"] is not None))
        return real(q, k, v, **options)

    monkeypatch.setattr(gpt2_attention, "flash_attn_with_kvcache", spy)
    ids = tokens(2, 9)
    options = dict(do_sample=False, max_new_tokens=3, pad_token_id=0)
    make().generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert queries == [(1, False)] * 4  # two layers, for each token after the first, which the prompt's pass gives
    queries.clear()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    make().generate(ids, attention_mask=mask, **options)
    assert queries == [(1, True)] * 4


def test_scale_of_the_config_is_obeyed():
    ours = make(scale_attn_by_inverse_layer_idx=True)
    ids = tokens(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, like(ours, "eager")(ids).logits)
        plain = make()
        assert not torch.allclose(plain(ids).logits, ours(ids).logits)


# --- padding ------------------------------------------------------------------------------------------------


def padded_batch(side, lengths=(13, 20), width=20):
    ids = tokens(len(lengths), width)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1 if side == "left" else 0
        if side == "right":
            mask[row, :length] = 1
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    return ids, mask, position_ids


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_and_gradients(side, dtype):
    ids, mask, position_ids = padded_batch(side)
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":  # the first real token must not be predicted from a padded one
        first = mask.argmax(1)
        labels[torch.arange(len(ids), device=DEVICE), first] = -100
    results = []
    for model in trio(dtype):
        out = model(ids, attention_mask=mask, position_ids=position_ids, labels=labels)
        out.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((out.logits[mask.bool()], gradients))
    (out, d_out), (low, d_low), (ref, d_ref) = results
    judge(out, ref, low, name="logits").raise_if_failed()
    for name in d_ref:
        judge(d_out[name], d_ref[name], d_low[name], factor=3.0, name=name).raise_if_failed()


def test_padding_changes_nothing_for_the_tokens():
    ids, mask, position_ids = padded_batch("left")
    model = make()
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=position_ids).logits
        for row in range(len(ids)):
            alone = model(ids[row : row + 1, mask[row].bool()]).logits
            torch.testing.assert_close(logits[row, mask[row].bool()], alone[0])
        assert not torch.allclose(logits[0], model(ids).logits[0])  # or the mask could have been dropped


def test_attention_of_padded_rows_is_zero_and_holes_are_exact():
    torch.manual_seed(0)
    layer = make().transformer.h[0].attn
    q, k, v = (torch.randn(2, 2, 9, 16, device=DEVICE) for _ in range(3))
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    mask[0, [0, 1, 4]] = False  # padding on the left and a hole
    mask[1] = False  # a sequence of nothing
    out, weights = gpt2_attention.attention_forward(layer, q, k, v, mask, scaling=0.25)
    assert weights is None and out.shape == (2, 9, 2, 16)
    assert (out[~mask] == 0).all()
    visible = mask[:, None, None, :] & torch.ones(9, 9, device=DEVICE).tril().bool()
    ref = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=0.25)
    torch.testing.assert_close(out[mask], ref.transpose(1, 2)[mask])


def test_mask_of_ones_is_no_mask():
    assert gpt2_attention.padding_mask(2, 5, 5, attention_mask=torch.ones(2, 5, dtype=torch.bool)).keep is None
    assert gpt2_attention.padding_mask(2, 5, 5).keep is None


def test_bidirectional_model():
    """Decoder weights with config.is_causal=False: transformers then asks for it call by call."""
    model, ids = make(is_causal=False), tokens(1, 12)
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(logits, like(model, "eager")(ids).logits)
        assert not torch.allclose(logits, make()(ids).logits)


def test_bidirectional_attention_with_padded_keys():
    torch.manual_seed(0)
    layer = torch.nn.Module()
    layer.is_causal = False
    q, k, v = (torch.randn(2, 2, n, 16, device=DEVICE) for n in (5, 9, 9))
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    mask[0, 6:] = False
    out, _ = gpt2_attention.attention_forward(layer, q, k, v, mask)
    ref = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    torch.testing.assert_close(out, ref.transpose(1, 2))


# --- cache and generation -----------------------------------------------------------------------------------


def greedy(model, ids, **options):
    options = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0} | options
    return model.generate(ids, **options)[:, ids.shape[1] :]


def lively():
    """Weights so large that attention decides the next token; as initialised, GPT-2 repeats the last one."""
    model = make(initializer_range=0.5)
    assert len(set(greedy(like(model, "eager"), tokens(1, 9), max_new_tokens=8)[0].tolist())) > 2
    return model


def test_generation_with_cache_equals_without():
    model, ids = lively(), tokens(1, 9)
    everything = torch.ones_like(ids)
    with_cache = greedy(model, ids, attention_mask=everything, use_cache=True)
    assert torch.equal(with_cache, greedy(model, ids, attention_mask=everything, use_cache=False))
    assert torch.equal(with_cache, greedy(like(model, "eager"), ids, attention_mask=everything))


def test_left_padded_generation_equals_one_by_one():
    model = lively()
    ids, mask, _ = padded_batch("left", lengths=(9, 12), width=12)
    together = greedy(model, ids, attention_mask=mask)
    assert torch.equal(together, greedy(like(model, "eager"), ids, attention_mask=mask))
    alone = ids[:1, mask[0].bool()]
    assert torch.equal(together[:1], greedy(model, alone, attention_mask=torch.ones_like(alone)))


def test_chunk_against_a_cache_is_aligned_bottom_right():
    model, ids = make(), tokens(1, 16)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :9], use_cache=True)
        chunk = model(ids[:, 9:15], past_key_values=first.past_key_values, use_cache=True)
        last = model(ids[:, 15:], past_key_values=chunk.past_key_values)
    together = torch.cat([first.logits, chunk.logits, last.logits], dim=1)
    torch.testing.assert_close(together, whole)


def test_chunk_against_a_cache_with_left_padding():
    model = make()
    ids, mask, position_ids = padded_batch("left", lengths=(9, 12), width=12)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=position_ids).logits
        first = model(ids[:, :7], attention_mask=mask[:, :7], position_ids=position_ids[:, :7], use_cache=True)
        cache = first.past_key_values
        rest = model(ids[:, 7:], attention_mask=mask, position_ids=position_ids[:, 7:], past_key_values=cache)
    together = torch.cat([first.logits, rest.logits], dim=1)
    torch.testing.assert_close(together[mask.bool()], whole[mask.bool()])


def test_static_cache_whose_last_slots_are_empty():
    from transformers import StaticCache

    model, ids = make(), tokens(1, 12)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        first = model(ids[:, :8], past_key_values=cache, use_cache=True).logits
        rest = model(ids[:, 8:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(torch.cat([first, rest], dim=1), model(ids).logits)


def test_generation_with_a_static_cache():
    model, ids = lively(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ours = greedy(model, ids, attention_mask=mask, cache_implementation="static")
    assert torch.equal(ours, greedy(like(model, "eager"), ids, attention_mask=mask))


@pytest.mark.parametrize("cache", [False, True], ids=["without cache", "with cache"])
def test_compiled_models(cache):
    """F22: without a cache, the compiled model blamed packed sequences that nobody had passed."""
    model, ids = make(n_layer=1), tokens(1, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=cache).logits, like(model, "eager")(ids).logits)
        if DEVICE.type == "cpu":  # a failed assertion on a GPU ends the process
            restart = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
            with pytest.raises(RuntimeError, match="packed sequences"):
                compiled(ids, position_ids=restart, use_cache=cache)


def test_dropout_of_attention_is_at_work_in_training_alone():
    model, ids = make(attn_pdrop=0.5), tokens(1, 12)
    logits = []
    with torch.no_grad():
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            logits.append(model.train()(ids).logits)
        torch.testing.assert_close(model.eval()(ids).logits, make()(ids).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


# --- what is refused ----------------------------------------------------------------------------------------


RESTART = [[0, 1, 2, 0, 1, 2]]
FOUR_WAYS = {
    "without cache": {"use_cache": False},
    "with cache, the default": {},
    "mask of ones": {"attention_mask": torch.ones(1, 6)},
    "mask with padding": {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])},
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("way", FOUR_WAYS)
def test_packed_positions_are_refused(way, training):
    """F4: with a cache or a mask, the second document saw the first."""
    model = make().train(training)
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in FOUR_WAYS[way].items()}
    with pytest.raises(NotImplementedError, match="packed sequences"):
        model(tokens(1, 6), position_ids=torch.tensor(RESTART, device=DEVICE), **options)


def test_packed_positions_are_refused_by_the_first_version():
    """F4, for labutils_v1."""
    gpt2_attention.register_first_version()
    with pytest.raises(NotImplementedError, match="packed sequences"):
        make("labutils_v1")(tokens(1, 6), position_ids=torch.tensor(RESTART, device=DEVICE))


def borders(*ends):
    starts = torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)
    longest = int(starts.diff().max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def test_borders_together_with_padding_are_refused():
    """F3: the borders were ignored as soon as the mask had a zero."""
    model, ids, mask = make(), tokens(1, 6), torch.ones(1, 6, device=DEVICE)
    model(ids, attention_mask=mask, **borders(3, 6))
    mask[0, 5] = 0
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q and cu_seq_lens_k came together with an attention"):
        model(ids, attention_mask=mask, **borders(3, 6))


def test_borders_count_also_where_there_are_fewer_queries_than_keys():
    """F3's sibling: with fewer queries than keys, the decoding kernel ignored the borders."""
    torch.manual_seed(0)
    layer = make().transformer.h[0].attn
    q, k = torch.randn(1, 2, 4, 16, device=DEVICE), torch.randn(1, 2, 6, 16, device=DEVICE)
    few = {"cu_seq_lens_q": borders(2, 4)["cu_seq_lens_q"], "max_length_q": 2}
    with torch.no_grad():
        out, _ = gpt2_attention.attention_forward(layer, q, k, k, None, **(borders(3, 6) | few))
        second, _ = gpt2_attention.attention_forward(layer, q[:, :, 2:], k[:, :, 3:], k[:, :, 3:], None)
    torch.testing.assert_close(out[:, 2:], second)


def test_some_borders_without_the_others_are_refused():
    """F3's sibling: cu_seq_lens_k without cu_seq_lens_q was ignored."""
    with pytest.raises(ValueError, match="only cu_seq_lens_k came"):
        make()(tokens(1, 6), cu_seq_lens_k=borders(3, 6)["cu_seq_lens_k"])


def test_four_dimensional_masks_are_refused():
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool, device=DEVICE)
    with pytest.raises(NotImplementedError, match="padding mask"):
        make()(tokens(1, 6), attention_mask=mask)


def test_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="one entry each"):
        make()(tokens(1, 6), attention_mask=torch.ones(1, 8, device=DEVICE))


def test_output_attentions_is_refused():
    with pytest.raises(NotImplementedError, match="eager"):
        make()(tokens(1, 6), output_attentions=True)
    make()(tokens(1, 6), output_hidden_states=True)


UNKNOWN = [
    "sliding_window",
    "softcap",
    "s_aux",
    "position_bias",
    "indices",
    "block_indices",
    "sinks",
    "cache",
    "seq_idx",
]


@pytest.mark.parametrize("argument", UNKNOWN)
@pytest.mark.parametrize("function", ["attention_forward", "_first_version"])
def test_arguments_that_change_the_result_are_refused(function, argument):
    """F2: a keyword that was not on a list of five was ignored."""
    layer = make().transformer.h[0].attn
    q = torch.randn(1, 2, 4, 16, device=DEVICE)
    with pytest.raises(NotImplementedError, match=rf"has no {argument},.*eager"):
        getattr(gpt2_attention, function)(layer, q, q, q, None, **{argument: torch.zeros(4)})


def test_arguments_that_change_nothing_pass():
    """F2: what models always pass, and what is switched off."""
    layer = make().transformer.h[0].attn
    q = torch.randn(1, 2, 4, 16, device=DEVICE)
    plain, _ = gpt2_attention.attention_forward(layer, q, q, q, None)
    off = {"softcap": None, "indices": None, "output_attentions": False, "sparse": False}
    known = {"position_ids": torch.arange(4, device=DEVICE)[None], "deterministic": True, "num_items_in_batch": 3}
    same, _ = gpt2_attention.attention_forward(layer, q, q, q, None, **off, **known)
    assert torch.equal(plain, same)


def bloom(attention, seed=0):
    from transformers import BloomConfig, BloomForCausalLM

    gpt2_attention.register_attention()
    torch.manual_seed(seed)
    config = BloomConfig(vocab_size=60, hidden_size=32, n_layer=1, n_head=2)
    config._attn_implementation = attention
    return BloomForCausalLM(config).to(DEVICE).eval()


def test_a_model_with_attention_of_its_own_is_refused_when_it_is_made():
    """F1: Bloom makes its mask with our mask function and never calls our attention: it saw the future."""
    with pytest.raises(ValueError, match="BloomForCausalLM does not support attn_implementation='labutils'"):
        bloom("labutils")
    bloom("eager")


def test_a_subclass_of_such_a_model_is_refused_too():
    """F1: wherever its class was written."""
    from transformers import BloomConfig, BloomForCausalLM

    class Mine(BloomForCausalLM):
        pass

    config = BloomConfig(vocab_size=60, hidden_size=32, n_layer=1, n_head=2)
    config._attn_implementation = gpt2_attention.register_attention()
    with pytest.raises(ValueError, match="Mine does not support"):
        Mine(config)


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_with_attention_of_its_own_is_refused_when_it_runs(padded, monkeypatch):
    """F1: a model whose source nobody can read, as from a notebook, ends at its first use of the mask."""
    monkeypatch.setattr(gpt2_attention, "_has_attention_of_its_own", lambda model_class: False)
    mask = torch.ones(1, 8, dtype=torch.long, device=DEVICE)
    mask[0, :2] = 0 if padded else 1
    with pytest.raises(NotImplementedError, match="uses the attention mask itself"):
        bloom("labutils")(torch.arange(8, device=DEVICE)[None], attention_mask=mask)


USES = {
    "added": lambda mask, x: x + mask,
    "added at the left": lambda mask, x: mask + x,
    "sdpa": lambda mask, x: torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask),
    "sliced": lambda mask, x: mask[:, :, :, :4],
    "where": lambda mask, x: torch.where(mask, x, x),
    "compared": lambda mask, x: mask == 0,
    "inverted": lambda mask, x: 1.0 - mask,
    "truth": lambda mask, x: bool(mask),
    "dtype": lambda mask, x: mask.dtype,
    "method": lambda mask, x: mask.masked_fill(x, 0),
    "dense": lambda mask, x: mask.to_dense(),
}


@pytest.mark.parametrize("use", USES)
def test_nobody_but_us_can_use_the_mask(use):
    """F1: every use that models make of a mask."""
    with pytest.raises(NotImplementedError, match="uses the attention mask itself"):
        USES[use](gpt2_attention.padding_mask(1, 4, 4), torch.zeros(1, 1, 4, 4))


def test_a_mask_for_another_number_of_keys_is_refused():
    """F1's sibling: a model that adds or drops keys after it made its mask."""
    layer = make().transformer.h[0].attn
    q = torch.randn(1, 2, 4, 16, device=DEVICE)
    with pytest.raises(ValueError, match="4 queries and 6 keys"):
        gpt2_attention.attention_forward(layer, q, q, q, gpt2_attention.padding_mask(1, 4, 6, q_offset=2))


def test_the_rule_of_the_mask_counts_and_not_the_layers():
    """F1's sibling: standard attention obeys only the mask, whatever the layer says of itself."""
    from transformers.masking_utils import bidirectional_mask_function

    layer = make().transformer.h[0].attn  # causal
    q = torch.randn(1, 2, 6, 16, device=DEVICE)
    mask = gpt2_attention.padding_mask(1, 6, 6, mask_function=bidirectional_mask_function)
    out, _ = gpt2_attention.attention_forward(layer, q, q, q, mask)
    ref = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(out, ref.transpose(1, 2))


def test_sliding_window_masks_are_refused():
    from transformers.masking_utils import sliding_window_causal_mask_function

    with pytest.raises(NotImplementedError, match="window"):
        gpt2_attention.padding_mask(1, 8, 8, mask_function=sliding_window_causal_mask_function(4))


@pytest.mark.parametrize("name", ["lab_flash", "sdpa", "eager", "flash_attention_2", "a/b"])
def test_names_that_mean_something_else_are_refused(name):
    with pytest.raises(ValueError, match="choose a name"):
        gpt2_attention.register_attention(name)


def test_registering_twice_and_under_another_name():
    assert gpt2_attention.register_attention() == gpt2_attention.register_attention() == "labutils"
    assert gpt2_attention.register_attention("ours") == "ours"
    model, ids = make(), tokens(1, 8)
    with torch.no_grad():
        assert torch.equal(make("ours")(ids).logits, model(ids).logits)


def test_use_flash_attn_of_the_config_does_nothing():
    """A trap in many tutorials: the field is stored, and the attention stays what it was."""
    from transformers import GPT2Config, GPT2LMHeadModel

    plain = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2))
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, use_flash_attn=True)
    assert config.use_flash_attn is True
    assert GPT2LMHeadModel(config).config._attn_implementation == plain.config._attn_implementation == "sdpa"


# --- FlashAttention-1 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_version_in_a_model(dtype):
    """The attention that is measured as v1 computes what eager computes, forward and backward."""
    gpt2_attention.register_first_version()
    model = models.gpt2("nano", n_positions=32, vocab_size=61, attention="eager").to(runtime.device)
    ids = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(0)).to(runtime.device)
    results = []
    for attention, kind in (("labutils_v1", dtype), ("eager", dtype), ("eager", torch.float64)):
        model.to(kind).set_attn_implementation(attention)
        model.zero_grad()
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        results.append((out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (out, d_out), (low, d_low), (ref, d_ref) = results
    judge(out, ref, low, name="logits").raise_if_failed()
    for name in d_ref:
        judge(d_out[name], d_ref[name], d_low[name], factor=3.0, name=name).raise_if_failed()


def test_positions_without_values_are_not_read():
    """A rehearsal runs the model on tensors without data (`training.rehearsal`)."""
    with torch._subclasses.FakeTensorMode():
        positions, q = torch.arange(8)[None], torch.empty(1, 8, 2, 16)
        gpt2_attention._refuse_restarts(positions, q, None, None)
