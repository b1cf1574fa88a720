"""labutils.gpt2.packing: the tokenizer is lossless, packing loses only the tail, batches show every sequence."""

import itertools

import pytest
import torch

from labutils.gpt2 import packing, texts


@pytest.fixture(scope="module")
def reference():
    return texts.python_reference()


@pytest.fixture(scope="module")
def tokenizer(reference):
    return packing.train_tokenizer(reference, vocab_size=1024)


@pytest.mark.parametrize("text", ["for i in x:\n\treturn é 漢字 🙂\n", "<|endoftext|> is text", "\x00\x7f", ""])
def test_tokenizer_gives_every_text_back(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id(packing.END_OF_TEXT) not in ids


def test_tokenizer_is_repeatable_and_compresses(reference, tokenizer):
    again = packing.train_tokenizer(reference, vocab_size=1024)
    assert again.to_str() == tokenizer.to_str()
    assert tokenizer.get_vocab_size() == 1024
    assert tokenizer.token_to_id(packing.END_OF_TEXT) == 0
    assert packing.pack(reference, tokenizer, 512)[1].characters_per_token > 2.5


def test_tokenizer_refuses_bad_input():
    with pytest.raises(ValueError, match="at least 257"):
        packing.train_tokenizer(["text"], vocab_size=256)
    with pytest.raises(ValueError, match="no text"):
        packing.train_tokenizer([""])


@pytest.mark.parametrize("seqlen", [2, 7, 100, 2048])
def test_pack_loses_only_the_tail(reference, tokenizer, seqlen):
    documents = reference[:5]
    sequences, stats = packing.pack(documents, tokenizer, seqlen)
    assert sequences.dtype == torch.int64
    assert sequences.shape == (stats.sequences, seqlen) and stats.seqlen == seqlen
    assert 0 <= stats.dropped_tokens < seqlen
    assert stats.tokens == sequences.numel() + stats.dropped_tokens
    assert stats.documents == 5 and stats.characters == sum(map(len, documents))
    # The stream decodes to the documents, one end-of-text token between them, up to the dropped tail.
    whole = [i for text in documents for i in [*tokenizer.encode(text).ids, 0]]
    assert sequences.flatten().tolist() == whole[: sequences.numel()]
    assert len(whole) == stats.tokens


def test_pack_stats_say_what_was_dropped():
    tokenizer = packing.train_tokenizer(["ab"], vocab_size=257)
    sequences, stats = packing.pack(["abc", "de"], tokenizer, 3)
    a, b, c, d, e = (tokenizer.token_to_id(x) for x in "abcde")
    assert sequences.tolist() == [[a, b, c], [0, d, e]]
    assert (stats.tokens, stats.dropped_tokens, stats.characters_per_token) == (7, 1, 1.0)
    assert "the last 1 tokens" in str(stats)


def test_pack_refuses_bad_input(tokenizer):
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match="fewer than one sequence of 512"):
        packing.pack(["short"], tokenizer, 512)
    with pytest.raises(ValueError, match="at least 2"):
        packing.pack(["short"], tokenizer, 1)
    with pytest.raises(ValueError, match="no entry"):
        packing.pack(["short"], Tokenizer(models.BPE()), 2)


def test_batches_show_every_sequence_once_per_pass():
    sequences = torch.arange(10).view(5, 2)
    drawn = torch.cat(list(itertools.islice(packing.batches(sequences, 2), 5)))
    assert drawn.shape == (10, 2)
    assert sorted(drawn[:5, 0].tolist()) == sorted(drawn[5:, 0].tolist()) == [0, 2, 4, 6, 8]
    again = torch.cat(list(itertools.islice(packing.batches(sequences, 2), 5)))
    assert torch.equal(drawn, again)
    other = torch.cat(list(itertools.islice(packing.batches(sequences, 2, seed=1), 5)))
    assert not torch.equal(drawn, other)


def test_batches_refuse_bad_input_at_once():
    with pytest.raises(ValueError, match="S >= 1"):
        packing.batches(torch.empty(0, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="batch_size"):
        packing.batches(torch.zeros(2, 8, dtype=torch.int64), 0)


def test_borders_begin_documents_and_rows():
    tokens = torch.tensor([[5, 0, 7, 8], [0, 3, 4, 0]])
    assert packing.document_borders(tokens, 0).tolist() == [0, 2, 4, 5, 8]
    assert packing.document_borders(tokens, 0).dtype == torch.int32
    assert packing.document_positions(tokens, 0).tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    with pytest.raises(ValueError, match="B, N"):
        packing.document_borders(tokens[0], 0)


def test_batches_that_are_cut_have_the_same_tokens():
    sequences = torch.arange(24).view(3, 8)
    whole, cut = packing.batches(sequences, 2, seed=4), packing.batches(sequences, 2, seed=4, cut=4)
    for _ in range(4):
        one, other = next(whole), next(cut)
        assert other.shape == (4, 4) and torch.equal(one.view(-1), other.view(-1))
    with pytest.raises(ValueError, match="pieces of 3"):
        packing.batches(sequences, 2, cut=3)
