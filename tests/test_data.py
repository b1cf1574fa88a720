"""labutils.gpt2.data: the texts are real and disjoint, the tokenizer is lossless, packing loses only the tail."""

import itertools

import pytest
import torch

from labutils import runtime, training
from labutils.gpt2 import data, models


@pytest.fixture(scope="module")
def reference():
    return data.python_reference()


@pytest.fixture(scope="module")
def tokenizer(reference):
    return data.train_tokenizer(reference, vocab_size=1024)


def test_reference_is_long_and_no_paragraph_stands_in_two_documents(reference):
    from pydoc_data.topics import topics

    assert len(reference) > 30 and min(map(len, reference)) >= 500
    assert sum(map(len, reference)) > 0.6 * sum(map(len, topics.values()))
    assert reference == data.python_reference()
    owner: dict[str, int] = {}
    for index, text in enumerate(reference):
        for paragraph in (p.strip() for p in text.split("\n\n")):
            if len(paragraph) >= 80:
                assert owner.setdefault(paragraph, index) == index


def test_sources_are_whole_files_in_a_fixed_order():
    sources = data.python_sources(max_total=2_000_000)
    assert sources == data.python_sources(max_total=2_000_000)
    assert 1_000_000 < sum(map(len, sources)) <= 2_000_000
    assert len(set(sources)) == len(sources) and all(sources)
    import abc

    with open(abc.__file__, encoding="utf-8") as file:
        assert file.read() in sources


def test_sources_honour_the_minimal_length():
    long = data.python_sources(min_characters=100_000)
    assert long and min(map(len, long)) >= 100_000


def test_sources_say_when_nothing_fits():
    with pytest.raises(FileNotFoundError, match="relax the limits"):
        data.python_sources(min_characters=10**9)


def test_split_is_by_document_disjoint_and_repeatable(reference):
    train, held_out = data.split(reference, 0.1)
    assert (train, held_out) == data.split(reference, 0.1)
    assert data.split(reference, 0.1, seed=1)[1] != held_out
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(reference)
    assert [text for text in reference if text in set(train)] == train
    share = sum(map(len, held_out)) / sum(map(len, reference))
    assert 0.1 <= share < 0.3


@pytest.mark.parametrize("documents", [["a", "b"], ["a" * 1000, "b"], ["b", "a" * 1000]])
def test_split_leaves_both_sides_something(documents):
    train, held_out = data.split(documents, 0.1)
    assert train and held_out


def test_split_holds_out_the_small_document_beside_a_huge_one():
    assert data.split(["a" * 1000, "b" * 150], 0.1) == (["a" * 1000], ["b" * 150])


@pytest.mark.parametrize(
    "documents, share, message",
    [
        (["a"], 0.1, "two documents"),
        (["a", "a", "b"], 0.1, "equal"),
        (["a", "b"], 1.0, "share"),
        (["a", "b"], 0.0, "share"),
    ],
)
def test_split_refuses(documents, share, message):
    with pytest.raises(ValueError, match=message):
        data.split(documents, share)


@pytest.mark.parametrize("text", ["for i in x:\n\treturn é 漢字 🙂\n", "<|endoftext|> is text", "\x00\x7f", ""])
def test_tokenizer_gives_every_text_back(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id(data.END_OF_TEXT) not in ids


def test_tokenizer_is_repeatable_and_compresses(reference, tokenizer):
    again = data.train_tokenizer(reference, vocab_size=1024)
    assert again.to_str() == tokenizer.to_str()
    assert tokenizer.get_vocab_size() == 1024
    assert tokenizer.token_to_id(data.END_OF_TEXT) == 0
    assert data.pack(reference, tokenizer, 512)[1].characters_per_token > 2.5


def test_tokenizer_refuses_bad_input():
    with pytest.raises(ValueError, match="at least 257"):
        data.train_tokenizer(["text"], vocab_size=256)
    with pytest.raises(ValueError, match="no text"):
        data.train_tokenizer([""])


@pytest.mark.parametrize("seqlen", [2, 7, 100, 2048])
def test_pack_loses_only_the_tail(reference, tokenizer, seqlen):
    documents = reference[:5]
    sequences, stats = data.pack(documents, tokenizer, seqlen)
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
    tokenizer = data.train_tokenizer(["ab"], vocab_size=257)
    sequences, stats = data.pack(["abc", "de"], tokenizer, 3)
    a, b, c, d, e = (tokenizer.token_to_id(x) for x in "abcde")
    assert sequences.tolist() == [[a, b, c], [0, d, e]]
    assert (stats.tokens, stats.dropped_tokens, stats.characters_per_token) == (7, 1, 1.0)
    assert "the last 1 tokens" in str(stats)


def test_pack_refuses_bad_input(tokenizer):
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match="fewer than one sequence of 512"):
        data.pack(["short"], tokenizer, 512)
    with pytest.raises(ValueError, match="at least 2"):
        data.pack(["short"], tokenizer, 1)
    with pytest.raises(ValueError, match="no entry"):
        data.pack(["short"], Tokenizer(models.BPE()), 2)


def test_batches_show_every_sequence_once_per_pass():
    sequences = torch.arange(10).view(5, 2)
    drawn = torch.cat(list(itertools.islice(data.batches(sequences, 2), 5)))
    assert drawn.shape == (10, 2)
    assert sorted(drawn[:5, 0].tolist()) == sorted(drawn[5:, 0].tolist()) == [0, 2, 4, 6, 8]
    again = torch.cat(list(itertools.islice(data.batches(sequences, 2), 5)))
    assert torch.equal(drawn, again)
    other = torch.cat(list(itertools.islice(data.batches(sequences, 2, seed=1), 5)))
    assert not torch.equal(drawn, other)


def test_batches_refuse_bad_input_at_once():
    with pytest.raises(ValueError, match="S >= 1"):
        data.batches(torch.empty(0, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="batch_size"):
        data.batches(torch.zeros(2, 8, dtype=torch.int64), 0)


# --- dialogues, and documents kept apart ----------------------------------------------------------------------


def test_sessions_are_dialogues_of_their_own():
    sessions = data.python_sessions(("numpy",), min_characters=2000)
    assert len(sessions) > 10 and all(text.startswith(">>> ") and len(text) >= 2000 for text in sessions)
    turns = sum(text.count("\n>>> ") for text in sessions)
    assert turns > 1000
    assert len(set(sessions)) == len(sessions)
    # no session reads on behind the docstring that it stands in
    replies = [line for text in sessions for line in text.splitlines() if not line.startswith((">>> ", "... "))]
    assert not any('"""' in line or line.lstrip().startswith(("def ", "return _wrapfunc")) for line in replies)
    with pytest.raises(FileNotFoundError, match="not installed"):
        data.python_sessions(("no_such_package",))
    with pytest.raises(FileNotFoundError, match="no session"):
        data.python_sessions(("numpy",), min_characters=10**9)


def test_borders_begin_documents_and_rows():
    tokens = torch.tensor([[5, 0, 7, 8], [0, 3, 4, 0]])
    assert data.document_borders(tokens, 0).tolist() == [0, 2, 4, 5, 8]
    assert data.document_borders(tokens, 0).dtype == torch.int32
    assert data.document_positions(tokens, 0).tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    with pytest.raises(ValueError, match="B, N"):
        data.document_borders(tokens[0], 0)


@pytest.mark.parametrize(("attention", "rope"), [("labutils", True), ("sdpa", False), ("sdpa", True), ("eager", False)])
def test_documents_kept_apart_lose_what_each_loses_alone(attention, rope):
    torch.manual_seed(0)
    tokens = torch.randint(1, 50, (2, 40))
    tokens[0, 10] = tokens[1, 7] = 0
    model = models.gpt2("nano", n_positions=64, vocab_size=50, attention=attention, initializer_range=0.3)
    model = (rope.use_rope(model) if rope else model).to(runtime.device)
    tokens = tokens.to(runtime.device)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in tokens[:, None]:
            ends = data.document_borders(row, 0).tolist()
            for begin, end in zip(ends[:-1], ends[1:], strict=True):
                total += models.language_model_loss(model, row[:, begin:end]).item() * (end - begin - 1)
                count += end - begin - 1
        apart = models.language_model_loss(model, tokens, end_of_text=0).item()
        chunked = models.language_model_loss(model, tokens, end_of_text=0, chunked_loss=7).item()
        mixed = models.language_model_loss(model, tokens).item()
    assert apart == pytest.approx(total / count, rel=1e-3) == chunked
    assert abs(mixed - apart) > 1e-2
    assert training.evaluate(model, tokens.split(1), end_of_text=0, autocast_dtype=None) == pytest.approx(
        apart, rel=1e-3
    )


def test_batches_that_are_cut_have_the_same_tokens():
    sequences = torch.arange(24).view(3, 8)
    whole, cut = data.batches(sequences, 2, seed=4), data.batches(sequences, 2, seed=4, cut=4)
    for _ in range(4):
        one, other = next(whole), next(cut)
        assert other.shape == (4, 4) and torch.equal(one.view(-1), other.view(-1))
    with pytest.raises(ValueError, match="pieces of 3"):
        data.batches(sequences, 2, cut=3)
