"""The acceptability corpus: balanced, without duplicates, and nothing but structure that tells the label."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch

from sparsegrad_lab.tasks.acceptability import PARADIGMS, PHENOMENA, Choices, capacity, generate
from sparsegrad_lab.tasks.lexicon import WORDS, Lexicon, with_ed, with_s, words

Rows = list[dict[str, Any]]

# Every word that both splits may use.
CLOSED_CLASS = {
    *("the", "no", "any", "which", "what", "who", "that", "and", "but", "before", "after", "because", "while"),
    *("near", "behind", "beside", "next", "to", "in", "front", "of", "across", "from"),
    *("is", "are", "was", "were", "has", "have", "did", "would", "could", "might", "should"),
    *("himself", "herself", "themselves", "ever"),
}


def tokens(sentence: str) -> list[str]:
    """Lower-cased words and marks; the possessive 's is a word."""
    for mark in ("'s", ",", ".", "?"):
        sentence = sentence.replace(mark, f" {mark}")
    return sentence.lower().split()


def small(lexicon: Lexicon, count: int) -> Lexicon:
    return Lexicon(**{name: listed[:count] for name, listed in asdict(lexicon).items()})


def every_pair(name: str, lexicon: Lexicon) -> list[tuple[str, str]]:
    return [PARADIGMS[name](Choices(number), lexicon) for number in range(capacity(PARADIGMS[name], lexicon))]


@pytest.fixture(scope="module")
def corpus() -> dict[str, Rows]:
    return generate()


def test_default_corpus_to_the_byte(corpus: dict[str, Rows]) -> None:
    """Python hashes strings differently in each process, so an order taken from a set would not survive this."""
    digest = hashlib.sha256(json.dumps(corpus).encode()).hexdigest()
    assert digest == "f5f04e609782f22e8dfd8bfb79b9fc28ef171203c237c5b029db2bab275e1b72"


def test_rows(corpus: dict[str, Rows]) -> None:
    assert {split: len(rows) for split, rows in corpus.items()} == {"train": 4000, "validation": 800}
    for row in corpus["train"] + corpus["validation"]:
        assert list(row) == ["sentence", "label", "phenomenon", "pair"]
        assert [type(value) for value in row.values()] == [str, int, str, int]


@pytest.mark.parametrize(("n_train", "n_dev"), [(4000, 800), (2, 2), (100, 34)])
def test_balance(n_train: int, n_dev: int) -> None:
    """Classes exactly, paradigms to one pair; a pair is one good and one bad sentence of one paradigm and split."""
    seen: set[int] = set()
    for split, count in (("train", n_train), ("validation", n_dev)):
        rows = generate(n_train, n_dev, seed=3)[split]
        assert len(rows) == count
        pairs: dict[int, Rows] = {}
        for row in rows:
            pairs.setdefault(row["pair"], []).append(row)
        for pair in pairs.values():
            assert sorted(row["label"] for row in pair) == [0, 1]
            assert len({row["phenomenon"] for row in pair}) == 1
        counts = Counter(row["phenomenon"] for row in rows)
        assert max(counts.values()) - min(counts[name] for name in PHENOMENA) in (0, 2)
        assert seen.isdisjoint(pairs)
        seen |= set(pairs)
    assert seen == set(range((n_train + n_dev) // 2))


def test_families() -> None:
    assert Counter(name.partition("_")[0] for name in PHENOMENA) == {
        "agreement": 4,
        "reflexive": 4,
        "island": 4,
        "npi": 4,
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_no_sentence_twice(seed: int) -> None:
    splits = generate(20_000, 6_000, seed)
    sentences = [row["sentence"].lower() for rows in splits.values() for row in rows]
    assert len(set(sentences)) == 26_000


@pytest.mark.parametrize("name", PHENOMENA)
def test_every_choice_gives_another_sentence(name: str) -> None:
    """What the limit on the size, and the absence of duplicates, rest on; all combinations of a few words."""
    pairs = every_pair(name, small(WORDS, 4 if name == "agreement_conjuncts" else 3))
    assert len({sentence for pair in pairs for sentence in pair}) == 2 * len(pairs) > 100


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_words_of_a_pair_are_the_same(corpus: dict[str, Rows], split: str) -> None:
    """Hence neither words nor their counts nor the length, in words or letters, can tell one from the other."""
    pairs: dict[int, list[str]] = {}
    for row in corpus[split]:
        pairs.setdefault(row["pair"], []).append(row["sentence"])
    for one, other in pairs.values():
        assert one != other
        assert sorted(tokens(one)) == sorted(tokens(other))
        assert len(one) == len(other)


def bigrams(sentence: str) -> list[str]:
    listed = ["^", *tokens(sentence)]
    return [f"{one} {two}" for one, two in pairwise(listed)]


def accuracy_of_logistic_regression(splits: dict[str, Rows], features: Callable[[str], list[str]]) -> dict[str, float]:
    """Counts of the features seen in training, a small penalty, all of the data at once."""
    vocabulary = {feature for row in splits["train"] for feature in features(row["sentence"])}
    column = {feature: place for place, feature in enumerate(sorted(vocabulary))}

    def counts(rows: Rows) -> torch.Tensor:
        at = [(i, column[f]) for i, row in enumerate(rows) for f in features(row["sentence"]) if f in column]
        ones = torch.ones(len(at), dtype=torch.float64)
        shape = len(rows), len(column)
        return torch.sparse_coo_tensor(torch.tensor(at).T, ones, shape, check_invariants=True).coalesce()

    x = {split: counts(rows) for split, rows in splits.items()}
    y = {s: torch.tensor([float(row["label"]) for row in rows], dtype=torch.float64) for s, rows in splits.items()}
    weight = torch.zeros(len(column), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def scores(split: str) -> torch.Tensor:
        return (x[split] @ weight[:, None])[:, 0] + bias

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        fit = torch.nn.functional.binary_cross_entropy_with_logits(scores("train"), y["train"])
        value = fit + 1e-3 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return {split: float(((scores(split) > 0) == y[split].bool()).double().mean()) for split in splits}


def test_bag_of_words_is_at_chance(corpus: dict[str, Rows]) -> None:
    accuracy = accuracy_of_logistic_regression(corpus, tokens)
    assert accuracy["train"] < 0.55
    assert accuracy["validation"] < 0.55


def test_order_tells(corpus: dict[str, Rows]) -> None:
    """The same classifier is well above chance as soon as it sees some order: the labels can be learnt from."""
    accuracy = accuracy_of_logistic_regression(corpus, bigrams)
    assert accuracy["train"] > 0.75
    assert accuracy["validation"] > 0.55


def test_splits_share_closed_class_words_only(corpus: dict[str, Rows]) -> None:
    marks = {".", "?", ",", "'s"}
    train, validation = (
        {token for row in corpus[split] for token in tokens(row["sentence"])} for split in ("train", "validation")
    )
    assert train & validation == CLOSED_CLASS | marks


def test_lexicons_are_disjoint_in_every_form() -> None:
    """Also in what the default corpus does not draw, such as a noun's plural that is a verb's third person."""

    def forms(lexicon: Lexicon) -> set[str]:
        listed = [word for field in fields(lexicon) for word in getattr(lexicon, field.name)]
        return {form.lower() for word in listed for form in (word, with_s(word), with_ed(word))}

    assert not forms(words("train")) & forms(words("validation"))
    assert not forms(WORDS) & CLOSED_CLASS
    listed = [word for field in fields(WORDS) for word in getattr(WORDS, field.name)]
    assert [word for word, count in Counter(listed).items() if count > 1] == []


@pytest.mark.parametrize(
    ("word", "s", "ed"),
    [
        ("greet", "greets", "greeted"),
        ("praise", "praises", "praised"),
        ("cry", "cries", "cried"),
        ("obey", "obeys", "obeyed"),
        ("watch", "watches", "watched"),
        ("box", "boxes", "boxed"),
    ],
)
def test_inflection(word: str, s: str, ed: str) -> None:
    assert (with_s(word), with_ed(word)) == (s, ed)


def test_spelling(corpus: dict[str, Rows]) -> None:
    for row in corpus["train"] + corpus["validation"]:
        sentence = row["sentence"]
        assert sentence[0].isupper()
        assert "  " not in sentence
        assert sentence.count("?") + sentence.count(".") == 1
        assert sentence.endswith("?" if sentence.startswith("Which ") else ".")
        listed = [token for token in tokens(sentence) if token not in CLOSED_CLASS | {"'s"}]
        assert len(set(listed)) == len(listed), sentence  # no poet who greeted the poet


# The labels once more, from the finished sentences and by other rules than those that wrote them.


def plural_noun(token: str) -> bool:
    return token in {with_s(noun) for noun in WORDS.people}


def plural_verb(token: str) -> bool:
    return token in {"are", "were", "have", *WORDS.actions}


def agrees(reflexive: str, noun: str) -> bool:
    """Whether the noun can be what the reflexive stands for."""
    if reflexive == "themselves":
        return plural_noun(noun)
    males = WORDS.males + WORDS.male_names + WORDS.male_kin
    females = WORDS.females + WORDS.female_names + WORDS.female_kin
    return noun in {word.lower() for word in (males if reflexive == "himself" else females)}


def finite_verb(clause: list[str]) -> str:
    """The verb of the predicate that ends the clause: laughs; is tired; has laughed."""
    return clause[-2] if clause[-2] in ("is", "are", "was", "were", "has", "have") else clause[-1]


def clauses(listed: list[str]) -> list[list[str]]:
    """Of a sentence of two, joined by a comma and a conjunction."""
    comma = listed.index(",")
    return [listed[:comma], listed[comma + 2 :]]


def acceptable(phenomenon: str, listed: list[str]) -> bool:
    """`listed`: the tokens without the final mark."""
    family, _, kind = phenomenon.partition("_")
    if family == "agreement":
        parts = clauses(listed) if kind == "conjuncts" else [listed]
        return all(plural_noun(part[1]) == plural_verb(finite_verb(part)) for part in parts)
    if kind == "possessor":
        return all(agrees(part[-1], part[2]) for part in clauses(listed))  # mary 's uncle ...
    if kind == "clause":
        return agrees(listed[-1], listed[-3])
    if family == "reflexive":
        return agrees(listed[-1], listed[1])
    if family == "npi":
        if kind == "clauses":
            return clauses(listed)[1][0] == "no"
        if kind == "embedded":
            return listed.index("ever") < max(place for place, token in enumerate(listed) if token in ("has", "have"))
        return listed[0] == "no"
    handled = {with_ed(verb) for verb in WORDS.handlings + WORDS.encounters}
    if kind == "wh":
        return listed.index("who") < listed.index("what")
    # The verb of the relative or adjunct clause has its object: a noun phrase right after it.
    past = next(place for place, token in enumerate(listed) if token in handled)
    return listed[past + 1 : past + 2] == ["the"]


def test_labels_by_other_rules(corpus: dict[str, Rows]) -> None:
    for row in corpus["train"] + corpus["validation"]:
        assert acceptable(row["phenomenon"], tokens(row["sentence"])[:-1]) == bool(row["label"]), row


def test_seed() -> None:
    assert generate(64, 32, seed=5) == generate(64, 32, seed=5)
    for split in ("train", "validation"):
        assert generate(64, 32, seed=5)[split] != generate(64, 32, seed=6)[split]


def test_shuffled(corpus: dict[str, Rows]) -> None:
    """Neither the labels nor the paradigms come in runs."""
    for rows in corpus.values():
        for key, values in (("label", 2), ("phenomenon", 16)):
            repeats = sum(one[key] == two[key] for one, two in pairwise(rows)) / (len(rows) - 1)
            assert repeats == pytest.approx(1 / values, abs=0.06)


def test_validation_does_not_depend_on_the_size_of_train() -> None:
    small_one, large_one = ([row["sentence"] for row in generate(n_train, 64)["validation"]] for n_train in (32, 640))
    assert small_one == large_one


@pytest.mark.parametrize("count", [3, 0, -2, 1])
@pytest.mark.parametrize("name", ["n_train", "n_dev"])
def test_odd_or_empty(name: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected an even number of sentences, at least 2; found {count}"):
        generate(**{name: count})


def limit_with_four_words_a_list(split: Literal["train", "validation"], monkeypatch: pytest.MonkeyPatch) -> int:
    """The grammar made small, so that its limit is one that can be reached."""
    monkeypatch.setattr("sparsegrad_lab.tasks.acceptability.words", lambda split: small(words(split), 4))
    lexicon = small(words(split), 4)
    return 32 * min(capacity(paradigm, lexicon) for paradigm in PARADIGMS.values())


@pytest.mark.parametrize(("name", "split"), [("n_train", "train"), ("n_dev", "validation")])
def test_all_that_the_grammar_has_and_no_more(
    name: str, split: Literal["train", "validation"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit the scarcest paradigm is used up."""
    limit = limit_with_four_words_a_list(split, monkeypatch)
    counts = {"n_train": 2, "n_dev": 2}
    rows = generate(**{**counts, name: limit})[split]
    assert len({row["sentence"] for row in rows}) == limit
    with pytest.raises(ValueError, match=f"{name}: the grammar has {limit} sentences .*; found {limit + 2}"):
        generate(**{**counts, name: limit + 2})


def test_the_grammar_is_large() -> None:
    with pytest.raises(ValueError, match="n_train: the grammar has 44255232 sentences"):
        generate(n_train=10**15)
    with pytest.raises(ValueError, match="n_dev: the grammar has 2370816 sentences"):
        generate(n_dev=10**15)
