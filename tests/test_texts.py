"""labutils.gpt2.texts: the texts are real and long, no two of them are equal, and a split leaks nothing."""

import pytest

from labutils.gpt2 import texts


@pytest.fixture(scope="module")
def reference():
    return texts.python_reference()


def test_reference_is_long_and_no_paragraph_stands_in_two_documents(reference):
    from pydoc_data.topics import topics

    assert len(reference) > 30 and min(map(len, reference)) >= 500
    assert sum(map(len, reference)) > 0.6 * sum(map(len, topics.values()))
    assert reference == texts.python_reference()
    owner: dict[str, int] = {}
    for index, text in enumerate(reference):
        for paragraph in (p.strip() for p in text.split("\n\n")):
            if len(paragraph) >= 80:
                assert owner.setdefault(paragraph, index) == index


def test_sources_are_whole_files_in_a_fixed_order():
    sources = texts.python_sources(max_total=2_000_000)
    assert sources == texts.python_sources(max_total=2_000_000)
    assert 1_000_000 < sum(map(len, sources)) <= 2_000_000
    assert len(set(sources)) == len(sources) and all(sources)
    import abc

    with open(abc.__file__, encoding="utf-8") as file:
        assert file.read() in sources


def test_sources_honour_the_minimal_length():
    long = texts.python_sources(min_characters=100_000)
    assert long and min(map(len, long)) >= 100_000


def test_sources_say_when_nothing_fits():
    with pytest.raises(FileNotFoundError, match="relax the limits"):
        texts.python_sources(min_characters=10**9)


def test_split_is_by_document_disjoint_and_repeatable(reference):
    train, held_out = texts.split(reference, 0.1)
    assert (train, held_out) == texts.split(reference, 0.1)
    assert texts.split(reference, 0.1, seed=1)[1] != held_out
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(reference)
    assert [text for text in reference if text in set(train)] == train
    share = sum(map(len, held_out)) / sum(map(len, reference))
    assert 0.1 <= share < 0.3


@pytest.mark.parametrize("documents", [["a", "b"], ["a" * 1000, "b"], ["b", "a" * 1000]])
def test_split_leaves_both_sides_something(documents):
    train, held_out = texts.split(documents, 0.1)
    assert train and held_out


def test_split_holds_out_the_small_document_beside_a_huge_one():
    assert texts.split(["a" * 1000, "b" * 150], 0.1) == (["a" * 1000], ["b" * 150])


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
        texts.split(documents, share)


def test_sessions_are_dialogues_of_their_own():
    sessions = texts.python_sessions(("numpy",), min_characters=2000)
    assert len(sessions) > 10 and all(text.startswith(">>> ") and len(text) >= 2000 for text in sessions)
    turns = sum(text.count("\n>>> ") for text in sessions)
    assert turns > 1000
    assert len(set(sessions)) == len(sessions)
    # no session reads on behind the docstring that it stands in
    replies = [line for text in sessions for line in text.splitlines() if not line.startswith((">>> ", "... "))]
    assert not any('"""' in line or line.lstrip().startswith(("def ", "return _wrapfunc")) for line in replies)
    with pytest.raises(FileNotFoundError, match="not installed"):
        texts.python_sessions(("no_such_package",))
    with pytest.raises(FileNotFoundError, match="no session"):
        texts.python_sessions(("numpy",), min_characters=10**9)
