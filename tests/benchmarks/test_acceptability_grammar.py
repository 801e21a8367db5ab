"""The acceptability grammar: balanced, no duplicates, and only sentence structure predicts the label."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import fields
from importlib.resources import files
from typing import Any

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from acceptability_grammar import PHENOMENA, generate
from acceptability_words import WORDS, Lexicon, with_ed, with_s, words

Rows = list[dict[str, Any]]


# The only words that both splits use.
CLOSED_CLASS = {
    *("the", "no", "any", "which", "what", "who", "that", "and", "but", "before", "after", "because", "while"),
    *("near", "behind", "beside", "next", "to", "in", "front", "of", "across", "from"),
    *("is", "are", "was", "were", "has", "have", "did", "would", "could", "might", "should"),
    *("himself", "herself", "themselves", "ever"),
}


def tokens(sentence: str) -> list[str]:
    """Return lower-cased words and marks; the possessive 's is a word."""
    for mark in ("'s", ",", ".", "?"):
        sentence = sentence.replace(mark, f" {mark}")
    return sentence.lower().split()


@pytest.fixture(scope="module")
def corpus() -> dict[str, Rows]:
    return generate()


def test_the_package_ships_what_the_grammar_generates(corpus: dict[str, Rows]) -> None:
    shipped = gzip.decompress(files("sparsegrad_lab.tasks").joinpath("acceptability.json.gz").read_bytes())
    assert shipped == json.dumps(corpus).encode()


def test_each_pair_has_both_labels_and_the_same_words(corpus: dict[str, Rows]) -> None:
    for rows in corpus.values():
        pairs: dict[int, Rows] = {}
        for row in rows:
            pairs.setdefault(row["pair"], []).append(row)
        for one, other in pairs.values():
            assert {one["label"], other["label"]} == {0, 1}
            assert one["phenomenon"] == other["phenomenon"]
            assert one["sentence"] != other["sentence"]
            assert sorted(tokens(one["sentence"])) == sorted(tokens(other["sentence"]))
        counts = Counter(row["phenomenon"] for row in rows)
        assert counts.keys() == set(PHENOMENA)
        assert max(counts.values()) - min(counts.values()) in (0, 2)


def test_no_sentence_twice() -> None:
    splits = generate(20_000, 6_000, seed=1)
    assert len({row["sentence"].lower() for rows in splits.values() for row in rows}) == 26_000


def accuracy_of_logistic_regression(corpus: dict[str, Rows], words_per_feature: int) -> dict[str, float]:
    counts = CountVectorizer(
        tokenizer=lambda sentence: ["^", *tokens(sentence)], token_pattern=None,
        ngram_range=(words_per_feature, words_per_feature),
    )  # fmt: skip
    x = {split: [row["sentence"] for row in rows] for split, rows in corpus.items()}
    y = {split: [row["label"] for row in rows] for split, rows in corpus.items()}
    counts.fit(x["train"])
    model = LogisticRegression(max_iter=500).fit(counts.transform(x["train"]), y["train"])
    return {split: model.score(counts.transform(x[split]), y[split]) for split in corpus}


def test_a_bag_of_words_is_at_chance(corpus: dict[str, Rows]) -> None:
    accuracy = accuracy_of_logistic_regression(corpus, 1)
    assert accuracy["train"] < 0.55
    assert accuracy["validation"] < 0.55


def test_word_order_predicts_the_label(corpus: dict[str, Rows]) -> None:
    accuracy = accuracy_of_logistic_regression(corpus, 2)
    assert accuracy["train"] > 0.75
    assert accuracy["validation"] > 0.55


def test_splits_share_closed_class_words_only(corpus: dict[str, Rows]) -> None:
    marks = {".", "?", ",", "'s"}
    train, validation = (
        {token for row in corpus[split] for token in tokens(row["sentence"])} for split in ("train", "validation")
    )
    assert train & validation == CLOSED_CLASS | marks


def test_lexicons_are_disjoint_in_every_form() -> None:
    """Also for forms that the default corpus does not contain."""

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


# The labels again, derived from the finished sentences by rules that do not use the grammar's code.


def plural_noun(token: str) -> bool:
    return token in {with_s(noun) for noun in WORDS.people}


def plural_verb(token: str) -> bool:
    return token in {"are", "were", "have", *WORDS.actions}


def agrees(reflexive: str, noun: str) -> bool:
    """Return whether the noun can be the antecedent of the reflexive."""
    if reflexive == "themselves":
        return plural_noun(noun)
    males = WORDS.males + WORDS.male_names + WORDS.male_kin
    females = WORDS.females + WORDS.female_names + WORDS.female_kin
    return noun in {word.lower() for word in (males if reflexive == "himself" else females)}


def finite_verb(clause: list[str]) -> str:
    """Return the finite verb of a final predicate: laughs; is tired; has laughed."""
    return clause[-2] if clause[-2] in ("is", "are", "was", "were", "has", "have") else clause[-1]


def clauses(listed: list[str]) -> list[list[str]]:
    """Split a sentence of two clauses, joined by a comma and a conjunction."""
    comma = listed.index(",")
    return [listed[:comma], listed[comma + 2 :]]


def acceptable(phenomenon: str, listed: list[str]) -> bool:
    """Return the expected label; `listed` has the tokens without the final mark."""
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


def test_the_seed_selects_the_rows() -> None:
    assert generate(64, 32, seed=5) != generate(64, 32, seed=6)
    assert generate(32, 64)["validation"] != generate(32, 64, seed=1)["validation"]
