"""Write the sentences of the task `acceptability`, a corpus in the manner of BLiMP.

    python benchmarks/acceptability_grammar.py src/sparsegrad_lab/tasks/acceptability.json.gz

A grammar makes minimal pairs of one acceptable and one unacceptable sentence. There are sixteen paradigms in four
families: agreement, reflexives, islands, negative polarity items. Both sentences of a pair have the same words in
another order:

    The poet near the senators is tired.            *The senators near the poet is tired.
    No student who the teacher greeted has ever ... *The student who no teacher greeted has ever ...

Word counts and length therefore do not predict the label: any bag-of-words classifier gets exactly one sentence of each
pair right. Only sentence structure predicts it. The splits share no nouns, verbs, adjectives or names (see
`acceptability_words`), so the structure must generalize to new words.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from acceptability_words import Lexicon, with_ed, with_s, words

_T = TypeVar("_T")

_PREPOSITIONS = ("near", "behind", "beside", "next to", "in front of", "across from")
_COMPLEMENTIZERS = ("who", "that")
_CONJUNCTIONS = ("before", "after", "because", "while")
_MODALS = ("would", "could", "might", "should")


@dataclass(frozen=True)
class Sentence:
    """One row of the corpus.

    Attributes:
        sentence: the sentence.
        label: 1 if acceptable, else 0.
        phenomenon: name of the paradigm, one of `PHENOMENA`; the part before the first underscore is the family.
        pair: number of the minimal pair, unique across splits.
    """

    sentence: str
    label: int
    phenomenon: str
    pair: int


class Choices:
    """Decode a number into a sequence of choices (mixed radix: one digit per choice).

    A paradigm always makes choices of the same sizes. Each number below the product of these sizes then stands for one
    combination of choices, so distinct numbers give distinct sentences.

    Attributes:
        size: product of the sizes of the choices made so far.
    """

    def __init__(self, number: int) -> None:
        self._rest = number
        self.size = 1

    def pick(self, options: Sequence[_T]) -> _T:
        """Return one option."""
        self.size *= len(options)
        self._rest, digit = divmod(self._rest, len(options))
        return options[digit]

    def sample(self, options: Sequence[_T], count: int) -> list[_T]:
        """Return `count` different options."""
        left = list(options)
        picked = []
        for _ in range(count):
            position = self.pick(range(len(left)))
            picked.append(left.pop(position))
        return picked

    def flag(self) -> bool:
        """Return True or False."""
        return self.pick((False, True))


Paradigm = Callable[[Choices, Lexicon], tuple[str, str]]
"""Returns the acceptable and the unacceptable sentence of a pair, in lower case."""


# Parts that several paradigms use. A modifier is a template with the head noun {0} and the inner noun phrase {1}.
# Verbs of relative clauses are in the past tense: it agrees with every subject, so each pair breaks one rule only.


def _noun(noun: str, plural: bool) -> str:
    return with_s(noun) if plural else noun


def _prepositional() -> list[str]:
    return [f"{{0}} {preposition} {{1}}" for preposition in _PREPOSITIONS]


def _relative(lexicon: Lexicon) -> list[str]:
    """Return object relatives, {0} who {1} greeted, and subject relatives, {0} who greeted {1}."""
    pasts = [with_ed(verb) for verb in lexicon.encounters]
    objects = [f"{{0}} {that} {{1}} {past}" for that in _COMPLEMENTIZERS for past in pasts]
    subjects = [f"{{0}} {that} {past} {{1}}" for that in _COMPLEMENTIZERS for past in pasts]
    return objects + subjects


def _predicates(lexicon: Lexicon) -> list[tuple[str, str]]:
    """Return pairs of a singular and a plural predicate."""
    present = [(with_s(verb), verb) for verb in lexicon.actions]
    perfect = [(f"has {with_ed(verb)}", f"have {with_ed(verb)}") for verb in lexicon.actions]
    states = [(f"is {adjective}", f"are {adjective}") for adjective in lexicon.adjectives]
    past_states = [(f"was {adjective}", f"were {adjective}") for adjective in lexicon.adjectives]
    return present + perfect + states + past_states


def _have(plural: bool) -> str:
    return "have" if plural else "has"


# Agreement: the verb agrees with the head of the subject, not with the nearest noun.


def _agreement(choices: Choices, lexicon: Lexicon, templates: Sequence[str], ending: str = "") -> tuple[str, str]:
    """Return a head with an attractor of the other number; the unacceptable sentence swaps the two."""
    template = choices.pick(templates)
    head, attractor = choices.sample(lexicon.people, 2)
    plural = choices.flag()
    predicate = choices.pick(_predicates(lexicon))[plural]
    phrases = f"the {_noun(head, plural)}", f"the {_noun(attractor, not plural)}"
    return (
        f"{template.format(*phrases)}{ending} {predicate}.",
        f"{template.format(*reversed(phrases))}{ending} {predicate}.",
    )


def _agreement_prepositional(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """The poet near the senators is tired. *The senators near the poet is tired."""
    return _agreement(choices, lexicon, _prepositional())


def _agreement_relative(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """The poet who the senators greeted is tired. *The senators who the poet greeted is tired."""
    return _agreement(choices, lexicon, _relative(lexicon))


def _agreement_nested(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """The poet near the senators who greeted the doctor is tired. *The senators near the poet who … is tired.

    The noun next to the verb is singular in both sentences.
    """
    that = choices.pick(_COMPLEMENTIZERS)
    verb = choices.pick(lexicon.encounters)
    # From other lists than the head: the sizes of the choices stay the same, and no noun occurs twice.
    nearest = choices.pick(lexicon.males + lexicon.females)
    return _agreement(choices, lexicon, _prepositional(), f" {that} {with_ed(verb)} the {nearest}")


def _agreement_conjuncts(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """The poet near the mayor is sad, and the doctors near the bakers are shy. *The poet … are …, and … is ….

    The number of the attractors is random.
    """
    heads = choices.sample(lexicon.people, 4)
    first_plural = choices.flag()
    template = choices.pick(_prepositional())
    subjects = []
    for head, attractor, plural in zip(heads[:2], heads[2:], (first_plural, not first_plural), strict=True):
        subjects.append(template.format(f"the {_noun(head, plural)}", f"the {_noun(attractor, choices.flag())}"))
    forms = choices.pick((("is", "are"), ("was", "were")))
    states = choices.sample(lexicon.adjectives, 2)

    def clauses(first: str, second: str) -> str:
        return f"{subjects[0]} {first} {states[0]}, and {subjects[1]} {second} {states[1]}."

    right = forms[first_plural], forms[not first_plural]
    return clauses(*right), clauses(*reversed(right))


# Reflexives: the antecedent is the subject of the same clause, not a noun inside that subject or of an outer clause.
# Singular nouns have a gender, because "themselves" may refer to one person of unknown gender.


def _reflexive_number(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """The nun who the doctors greeted blamed herself. *The doctors who the nun greeted blamed herself."""
    template = choices.pick(_prepositional() + _relative(lexicon))
    one = choices.pick(lexicon.males + lexicon.females)
    several = with_s(choices.pick(lexicon.people))
    verb = with_ed(choices.pick(lexicon.attitudes))
    phrases = f"the {one}", f"the {several}"
    reflexive = "himself" if one in lexicon.males else "herself"
    if choices.flag():
        phrases, reflexive = (phrases[1], phrases[0]), "themselves"
    return (
        f"{template.format(*phrases)} {verb} {reflexive}.",
        f"{template.format(*reversed(phrases))} {verb} {reflexive}.",
    )


def _man_and_woman(choices: Choices, men: Sequence[str], women: Sequence[str]) -> tuple[str, str, str]:
    """Return a man and a woman in random order, and the reflexive of the first."""
    man, woman = choices.pick(men), choices.pick(women)
    return (woman, man, "herself") if choices.flag() else (man, woman, "himself")


def _reflexive_gender(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """The king who the nun greeted blamed himself. *The nun who the king greeted blamed himself."""
    template = choices.pick(_prepositional() + _relative(lexicon))
    antecedent, other, reflexive = _man_and_woman(choices, lexicon.males, lexicon.females)
    verb = with_ed(choices.pick(lexicon.attitudes))
    phrases = f"the {antecedent}", f"the {other}"
    return (
        f"{template.format(*phrases)} {verb} {reflexive}.",
        f"{template.format(*reversed(phrases))} {verb} {reflexive}.",
    )


def _reflexive_clause(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """The king guessed that Mary blamed herself. *Mary guessed that the king blamed herself."""
    men = [f"the {noun}" for noun in lexicon.males] + list(lexicon.male_names)
    women = [f"the {noun}" for noun in lexicon.females] + list(lexicon.female_names)
    antecedent, other, reflexive = _man_and_woman(choices, men, women)
    report = with_ed(choices.pick(lexicon.reports))
    verb = with_ed(choices.pick(lexicon.attitudes))
    return (
        f"{other} {report} that {antecedent} {verb} {reflexive}.",
        f"{antecedent} {report} that {other} {verb} {reflexive}.",
    )


def _reflexive_possessor(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """Mary's uncle blamed himself, and John's niece praised herself. *Mary's uncle blamed herself, and … himself.

    The gender of the possessors is random.
    """
    names = choices.sample(lexicon.male_names + lexicon.female_names, 2)
    first, second, reflexive = _man_and_woman(choices, lexicon.male_kin, lexicon.female_kin)
    verbs = [with_ed(verb) for verb in choices.sample(lexicon.attitudes, 2)]
    other = "herself" if reflexive == "himself" else "himself"

    def clauses(one: str, two: str) -> str:
        return f"{names[0]}'s {first} {verbs[0]} {one}, and {names[1]}'s {second} {verbs[1]} {two}."

    return clauses(reflexive, other), clauses(other, reflexive)


# Islands: a question word needs a gap, and the gap must not be inside a relative clause, an adjunct clause or an
# indirect question. In the unacceptable sentence the verb outside the island already has an object.


def _island_wh(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """The poet guessed who might recall what the mayor would mail. *The poet guessed what the mayor … who …"""
    outer, inner = choices.sample(lexicon.people, 2)
    outer, inner = _noun(outer, choices.flag()), _noun(inner, choices.flag())
    report, verb = choices.sample(lexicon.reports, 2)
    first, second = choices.pick(_MODALS), choices.pick(_MODALS)
    handling = choices.pick(lexicon.handlings)
    start = f"the {outer} {with_ed(report)}"
    return (
        f"{start} who {first} {verb} what the {inner} {second} {handling}.",
        f"{start} what the {inner} {first} {verb} who {second} {handling}.",
    )


def _island_subject(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """Which vase did the poet who borrowed the lamp clean? *Which vase did the poet who borrowed clean the lamp?"""
    things = [_noun(thing, choices.flag()) for thing in choices.sample(lexicon.things, 2)]
    person = _noun(choices.pick(lexicon.people), choices.flag())
    that = choices.pick(_COMPLEMENTIZERS)
    inner, outer = choices.sample(lexicon.handlings, 2)
    start = f"which {things[0]} did the {person} {that} {with_ed(inner)}"
    return f"{start} the {things[1]} {outer}?", f"{start} {outer} the {things[1]}?"


def _island_object(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """Which poet did the mayor who hired the doctor visit? *Which poet did the mayor visit the doctor who hired?"""
    people = [_noun(person, choices.flag()) for person in choices.sample(lexicon.people, 3)]
    that = choices.pick(_COMPLEMENTIZERS)
    inner, outer = choices.sample(lexicon.encounters, 2)
    start = f"which {people[0]} did the {people[1]}"
    return (
        f"{start} {that} {with_ed(inner)} the {people[2]} {outer}?",
        f"{start} {outer} the {people[2]} {that} {with_ed(inner)}?",
    )


def _island_adjunct(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """Which vase did the poet clean before the mayor mailed the lamp? *Which … clean the lamp before …?"""
    things = [_noun(thing, choices.flag()) for thing in choices.sample(lexicon.things, 2)]
    people = [_noun(person, choices.flag()) for person in choices.sample(lexicon.people, 2)]
    outer, inner = choices.sample(lexicon.handlings, 2)
    start = f"which {things[0]} did the {people[0]} {outer}"
    adjunct = f"{choices.pick(_CONJUNCTIONS)} the {people[1]} {with_ed(inner)}"
    return f"{start} {adjunct} the {things[1]}?", f"{start} the {things[1]} {adjunct}?"


# Negative polarity items: "ever" and "any" must be in the scope of a negation.


def _npi_subject(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """No poet who the mayor greeted has ever resigned. *The poet who no mayor greeted has ever resigned."""
    template = choices.pick(_relative(lexicon))
    head, other = choices.sample(lexicon.people, 2)
    plural = choices.flag()
    head, other = _noun(head, plural), _noun(other, choices.flag())
    predicate = f"{_have(plural)} ever {with_ed(choices.pick(lexicon.actions))}"
    return (
        f"{template.format(f'no {head}', f'the {other}')} {predicate}.",
        f"{template.format(f'the {head}', f'no {other}')} {predicate}.",
    )


def _npi_embedded(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """The poet who no mayor has ever greeted has resigned. *The poet who no mayor has greeted has ever resigned."""
    head, other = choices.sample(lexicon.people, 2)
    plural, other_plural = choices.flag(), choices.flag()
    that = choices.pick(_COMPLEMENTIZERS)
    start = f"the {_noun(head, plural)} {that} no {_noun(other, other_plural)} {_have(other_plural)}"
    met, did = with_ed(choices.pick(lexicon.encounters)), with_ed(choices.pick(lexicon.actions))
    return f"{start} ever {met} {_have(plural)} {did}.", f"{start} {met} {_have(plural)} ever {did}."


def _npi_clauses(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """The poet has smiled, but no mayor has ever resigned. *No poet has smiled, but the mayor has ever resigned."""
    plurals = choices.flag(), choices.flag()
    people = choices.sample(lexicon.people, 2)
    heads = [_noun(person, plural) for person, plural in zip(people, plurals, strict=True)]
    actions = [with_ed(verb) for verb in choices.sample(lexicon.actions, 2)]
    but = choices.pick(("and", "but"))

    def clauses(first: str, second: str) -> str:
        return (
            f"{first} {heads[0]} {_have(plurals[0])} {actions[0]}, "
            f"{but} {second} {heads[1]} {_have(plurals[1])} ever {actions[1]}."
        )

    return clauses("the", "no"), clauses("no", "the")


def _npi_any(choices: Choices, lexicon: Lexicon) -> tuple[str, str]:
    """No poet who the mayor greeted mailed any books. *The poet who no mayor greeted mailed any books."""
    template = choices.pick(_relative(lexicon))
    head, other = (_noun(person, choices.flag()) for person in choices.sample(lexicon.people, 2))
    predicate = f"{with_ed(choices.pick(lexicon.handlings))} any {with_s(choices.pick(lexicon.things))}"
    return (
        f"{template.format(f'no {head}', f'the {other}')} {predicate}.",
        f"{template.format(f'the {head}', f'no {other}')} {predicate}.",
    )


PARADIGMS: dict[str, Paradigm] = {
    "agreement_prepositional": _agreement_prepositional,
    "agreement_relative": _agreement_relative,
    "agreement_nested": _agreement_nested,
    "agreement_conjuncts": _agreement_conjuncts,
    "reflexive_number": _reflexive_number,
    "reflexive_gender": _reflexive_gender,
    "reflexive_clause": _reflexive_clause,
    "reflexive_possessor": _reflexive_possessor,
    "island_wh": _island_wh,
    "island_subject": _island_subject,
    "island_object": _island_object,
    "island_adjunct": _island_adjunct,
    "npi_subject": _npi_subject,
    "npi_embedded": _npi_embedded,
    "npi_clauses": _npi_clauses,
    "npi_any": _npi_any,
}

PHENOMENA: tuple[str, ...] = tuple(PARADIGMS)
"""Names of the paradigms, four per family."""


def generate(n_train: int = 4000, n_validation: int = 800, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Return the corpus: half of each split is acceptable, and no sentence occurs twice.

    Both sentences of a pair are in the same split. The number of pairs per paradigm differs by at most one. The rows
    depend on the arguments only, not on the platform; the validation rows do not depend on `n_train`.

    Args:
        n_train: number of training sentences; even.
        n_validation: number of validation sentences; even.
        seed: selects the sentences and their order.

    Returns:
        `{"train": rows, "validation": rows}`; each row has the fields of `Sentence`.
    """
    source = random.Random(seed)
    train_seed, validation_seed = (int(source.random() * 2**53) for _ in range(2))
    return {
        "train": _split(n_train // 2, words("train"), train_seed, first_pair=0),
        "validation": _split(n_validation // 2, words("validation"), validation_seed, first_pair=n_train // 2),
    }


def capacity(paradigm: Paradigm, lexicon: Lexicon) -> int:
    """Return the number of different pairs of a paradigm."""
    choices = Choices(0)
    paradigm(choices, lexicon)
    return choices.size


def _split(pairs: int, lexicon: Lexicon, seed: int, first_pair: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    each, more = divmod(pairs, len(PHENOMENA))
    rows: list[Sentence] = []
    for place, (name, paradigm) in enumerate(PARADIGMS.items()):
        for number in _draw(rng, capacity(paradigm, lexicon), each + (place < more)):
            pair = first_pair + len(rows) // 2
            good, bad = paradigm(Choices(number), lexicon)
            rows += [Sentence(_capitalised(good), 1, name, pair), Sentence(_capitalised(bad), 0, name, pair)]
    return [asdict(rows[position]) for position in _draw(rng, len(rows), len(rows))]


def _draw(rng: random.Random, below: int, count: int) -> list[int]:
    """Return `count` different numbers below `below`: a Fisher-Yates shuffle that stops early.

    Uses `random()` only, whose values Python guarantees for a given seed.
    """
    moved: dict[int, int] = {}
    drawn = []
    for place in range(count):
        other = place + int(rng.random() * (below - place))
        drawn.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return drawn


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


if __name__ == "__main__":
    # mtime=0: the same sentences give the same file.
    Path(sys.argv[1]).write_bytes(gzip.compress(json.dumps(generate()).encode(), mtime=0))
