"""Nouns, verbs, adjectives and names of the acceptability corpus, with their inflection.

Every third word of each list belongs to the validation split, the others to train. No word is in two lists.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

_VALIDATION_EVERY = 3
_SIBILANTS = ("s", "x", "z", "ch", "sh")


@dataclass(frozen=True)
class Lexicon:
    """Lemmas by their role in a sentence; all nouns and verbs are regular.

    Attributes:
        people: nouns for people of any gender.
        males: nouns for men and boys; singular only, like the next five lists.
        females: nouns for women and girls.
        male_names: names of men.
        female_names: names of women.
        male_kin: male relations, for possessives.
        female_kin: female relations, for possessives.
        things: countable objects that can be handled.
        adjectives: predicates of people.
        actions: intransitive verbs of people.
        encounters: transitive verbs between people.
        attitudes: transitive verbs that may be reflexive.
        handlings: transitive verbs with a thing as object.
        reports: verbs that take a that-clause or an indirect question.
    """

    people: tuple[str, ...]
    males: tuple[str, ...]
    females: tuple[str, ...]
    male_names: tuple[str, ...]
    female_names: tuple[str, ...]
    male_kin: tuple[str, ...]
    female_kin: tuple[str, ...]
    things: tuple[str, ...]
    adjectives: tuple[str, ...]
    actions: tuple[str, ...]
    encounters: tuple[str, ...]
    attitudes: tuple[str, ...]
    handlings: tuple[str, ...]
    reports: tuple[str, ...]


def with_s(word: str) -> str:
    """Return the plural of a noun or the third person singular of a verb: vase -> vases, cry -> cries."""
    if word.endswith(_SIBILANTS):
        return word + "es"
    return word[:-1] + "ies" if _ends_in_consonant_y(word) else word + "s"


def with_ed(verb: str) -> str:
    """Return the past tense and past participle of a verb: greet -> greeted, cry -> cried."""
    if verb.endswith("e"):
        return verb + "d"
    return verb[:-1] + "ied" if _ends_in_consonant_y(verb) else verb + "ed"


def _ends_in_consonant_y(word: str) -> bool:
    return word.endswith("y") and word[-2] not in "aeiou"


def words(split: Literal["train", "validation"]) -> Lexicon:
    """Return the words of a split."""
    first = _VALIDATION_EVERY - 1
    parts = {}
    for field in fields(WORDS):
        every = getattr(WORDS, field.name)
        validation = every[first::_VALIDATION_EVERY]
        parts[field.name] = validation if split == "validation" else tuple(w for w in every if w not in validation)
    return Lexicon(**parts)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Left out on purpose: nouns that are also verbs (cook, judge), verbs that double a consonant (admit), and nouns whose
# gender is only a stereotype (nurse).
WORDS = Lexicon(
    people=_listed("""
        author senator teacher lawyer doctor farmer banker baker painter dancer driver editor engineer gardener
        journalist librarian mayor minister musician neighbor officer carpenter plumber poet professor programmer
        reporter sailor scientist sculptor singer soldier student surgeon tourist translator visitor writer architect
        athlete biologist chemist composer dentist designer detective director drummer manager merchant miner pianist
        photographer politician president prisoner publisher researcher runner scholar swimmer trader violinist
        customer colleague consultant accountant cyclist hunter lecturer hiker diplomat economist historian
        electrician mechanic magician novelist orphan passenger physicist therapist technician worker
    """),
    males=_listed("""
        man boy king prince duke emperor baron gentleman waiter monk groom fisherman salesman policeman businessman
        congressman widower wizard schoolboy nobleman sportsman spokesman chairman cowboy craftsman milkman
        postman cameraman clergyman horseman
    """),
    females=_listed("""
        woman girl queen princess duchess empress baroness lady waitress nun bride actress saleswoman policewoman
        businesswoman congresswoman widow witch schoolgirl noblewoman sportswoman spokeswoman chairwoman cowgirl
        heiress hostess ballerina countess priestess stewardess
    """),
    male_names=_listed("""
        John Robert Michael William David Richard Joseph Daniel Matthew Anthony Donald Steven Paul Andrew Kenneth
        George Edward Brian Ronald Timothy Jason Jeffrey Gary Eric Jonathan Larry Benjamin Samuel Gregory Patrick
        Peter Walter Henry
    """),
    female_names=_listed("""
        Mary Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy Betty Margaret Sandra
        Helen Donna Carol Ruth Sharon Michelle Laura Deborah Rebecca Amanda Melissa Stephanie Anna Emma Julia
        Catherine Christine Martha
    """),
    male_kin=_listed("""
        father brother son uncle nephew grandfather grandson husband stepfather stepbrother stepson godfather
        boyfriend landlord godson
    """),
    female_kin=_listed("""
        mother sister daughter aunt niece grandmother granddaughter wife stepmother stepsister stepdaughter godmother
        girlfriend landlady goddaughter
    """),
    things=_listed("""
        letter painting kite map car book chair table lamp bicycle camera clock coat computer curtain desk document
        guitar hammer jacket kettle ladder mirror necklace newspaper piano picture pillow plate portrait printer radio
        ring sofa statue suitcase sweater telephone toy truck umbrella vase violin wallet boat basket bottle box carpet
        candle coin contract diary drum engine envelope flag helmet jewel magazine manuscript medal motorcycle parcel
        postcard puzzle sculpture telescope tent ticket blanket bracelet
    """),
    adjectives=_listed("""
        tired happy angry hungry nervous proud honest polite famous rich lonely brave clever lazy curious jealous
        careful cheerful generous grateful humble loyal patient rude selfish sincere stubborn talented wise friendly
        gentle confident anxious busy sad shy thirsty sleepy young tall strong reliable
    """),
    actions=_listed("""
        laugh smile dance cough sneeze cry whisper shout cheat complain yawn sigh snore hesitate resign faint blink
        giggle shiver wander vanish stumble protest apologize retire relax gamble whistle frown blush stutter struggle
        surrender misbehave succeed escape scream tremble grumble exercise confess daydream collapse disagree cooperate
        improvise meditate pray
    """),
    encounters=_listed("""
        greet visit interview follow invite hire thank welcome help watch recognize warn question punish rescue phone
        accompany approach assist avoid challenge chase consult contact encourage entertain ignore join miss nominate
        obey oppose pursue reward tolerate tutor trick push assault employ train supervise
    """),
    attitudes=_listed("""
        admire praise blame criticize defend injure embarrass amuse surprise distract hate trust respect insult
        humiliate introduce disguise harm protect exhaust pity doubt love mock deceive disappoint scratch
        reproach congratulate comfort convince console despise dislike endanger flatter motivate poison promote
        reassure ridicule wound
    """),
    handlings=_listed("""
        purchase borrow examine inspect photograph display deliver collect damage remove replace misplace
        receive request donate sketch label carry store select auction locate weigh touch clean restore rent
        measure order unpack acquire reserve repair destroy polish mail lift conceal repaint
    """),
    reports=_listed("""
        guess discover reveal explain learn realize remember announce report predict recall mention disclose confirm
        notice indicate specify determine clarify note
    """),
)
