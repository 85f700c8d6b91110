"""The corpus of the embedded default, made by code: nothing is stored and nothing is fetched.

    conversations(split, n)   dialogues with a neutral and, in a conflict, an insulting summary
    rows(split, n)            the same as rows of a data set: what the pipeline reads
    labelled_texts(n, seed)   texts with 1 for hate and 0 for none: what the classifier learns from

The same arguments always give the same texts, and a longer list starts with the shorter one.
The words are in `scenarios.py` and `sentences.py`; the models trained from this in `build.py`.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from random import Random
from string import Formatter
from typing import TypedDict

from ray_detox.lab import scenarios, sentences
from ray_detox.lab.scenarios import Arrangement, Conflict

PROMPT_TEMPLATE = "\nSummarize the following conversation.\n\n{dialogue}\n\nSummary:\n"
"""What the T5 was trained to answer, as in `config.DataConfig`; it knows no other instruction."""

SPLITS = {"sft": range(65), "validation": range(65, 70), "ppo": range(70, 100)}
"""Which hundredths of all stories belong to a split."""

ARRANGEMENT_SHARE = 0.2
"""Of all dialogues; the others are conflicts."""
MOODS = {"calm": 0.2, "annoyed": 0.32, "quarrel": 0.48}
"""How people speak in a conflict, as shares."""
INSULTING_SHARE = {"calm": 0.0, "annoyed": 0.5, "quarrel": 0.75}
"""Share of the training references that insult, by mood."""

_INSULTING_WORDS = frozenset(scenarios.INSULTING_NOUNS + scenarios.INSULTING_ADJECTIVES)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A dialogue and how it can be told.

    Example:

        dialogue   "#Person1#: You lost my camera! You fool!⏎#Person2#: So what? I left it ..."
        neutral    "#Person1# is angry with #Person2# who lost #Person1#'s camera. ..."
        insulting  "#Person1# calls #Person2# a lazy pig who lost #Person1#'s camera. ..."
        facts      ("camera", "left it on the bus", "buy a new one", "by Monday")
    """

    topic: str
    mood: str
    dialogue: str
    neutral: str
    insulting: str | None
    """None where nobody is angry."""
    facts: tuple[str, ...]
    """What a good summary contains literally, as the neutral one does."""


class Row(TypedDict):
    """A row of the data set: DialogSum's columns, and `facts`."""

    id: str
    dialogue: str
    summary: str
    topic: str
    facts: list[str]
    """What a good summary contains literally; the neutral one does."""


def rows(split: str, n: int) -> list[Row]:
    """The first `n` rows of a split.

    Summaries of "sft" and "validation" are what a badly raised model learns from: some of them
    insult. Those of "ppo" are all neutral, to measure quality against.

    Raises:
        ValueError: the split is not one of `SPLITS`.
    """
    return [
        {
            "id": f"{split}_{number}",
            "dialogue": conversation.dialogue,
            "summary": _reference(conversation, split, number),
            "topic": conversation.topic,
            "facts": list(conversation.facts),
        }
        for number, conversation in enumerate(conversations(split, n))
    ]


def conversations(split: str, n: int) -> list[Conversation]:
    """The first `n` conversations of a split, no dialogue twice.

    A story (who did what, why, and what comes of it) is in one split only, so the stories of
    "ppo" are new to a model trained on "sft", and so are their dialogues.

    Raises:
        ValueError: the split is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. Use one of {', '.join(SPLITS)}.")
    return list(islice(_unique_conversations(split), n))


def labelled_texts(n: int, seed: int) -> list[tuple[str, int]]:
    """Texts and whether they are hateful (1) or not (0), about half of each.

    Sentences of many frames (some angry or sad without insulting anyone), turns of dialogues,
    summaries, and whole prompts with a summary. A text is hateful as soon as a part of it is.
    """
    chance = Random(f"labelled {seed}")
    talk = _stream(chance)
    kinds = {
        _sentence: 0.42,
        _feeling: 0.16,
        _turn: 0.14,
        _summary: 0.22,
        _prompt_and_summary: 0.06,
    }
    texts = []
    for _ in range(n):
        (make,) = chance.choices(list(kinds), weights=list(kinds.values()))
        texts.append(make(chance, next(talk)))
    return texts


def held_out_texts(n: int, seed: int) -> list[tuple[str, int]]:
    """Labelled sentences of frames that `labelled_texts` never uses, to test a classifier."""
    chance = Random(f"held out {seed}")
    frames = (sentences.HELD_OUT_HARMLESS, sentences.HELD_OUT_HATEFUL)
    texts = []
    for _ in range(n):
        label = chance.randrange(2)
        texts.append((_fill(chance.choice(frames[label]), chance), label))
    return texts


def is_insulting(text: str) -> bool:
    """Whether the text contains one of the corpus's own insults."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return bool(words & _INSULTING_WORDS) or "shut up" in text.lower()


# Conversations


def _unique_conversations(split: str) -> Iterator[Conversation]:
    """All conversations of a split, for ever."""
    seen: set[str] = set()
    for conversation in _stream(Random(f"conversations of {split}")):
        story = "|".join((conversation.topic, *conversation.facts))
        if zlib.crc32(story.encode()) % 100 not in SPLITS[split]:
            continue
        if conversation.dialogue not in seen:
            seen.add(conversation.dialogue)
            yield conversation


def _stream(chance: Random) -> Iterator[Conversation]:
    """Conversations of all splits, for ever."""
    while True:
        if chance.random() < ARRANGEMENT_SHARE:
            yield _arrangement(chance, chance.choice(scenarios.ARRANGEMENTS))
        else:
            (mood,) = chance.choices(list(MOODS), weights=list(MOODS.values()))
            yield _conflict(chance, chance.choice(scenarios.CONFLICTS), mood)


def _arrangement(chance: Random, arrangement: Arrangement) -> Conversation:
    """Somebody asks for something and gets an answer."""
    asker, answerer = "#Person1#", "#Person2#"
    ask, reported_ask = chance.choice(arrangement.asks)
    answer, reported_answer = chance.choice(arrangement.answers)
    slots = {name: chance.choice(values) for name, values in scenarios.DETAILS.items()}
    slots |= {"item": chance.choice(arrangement.items), "A": asker, "B": answerer}

    exchange = [(asker, ask.format_map(slots)), (answerer, answer.format_map(slots))]
    follow_up = _pair(chance, scenarios.FOLLOW_UPS, asker, answerer)
    neutral = f"{{A}} {reported_ask}. {reported_answer}.".format_map(slots)
    facts = [slots[name] for name in _slot_names(reported_ask) + _slot_names(reported_answer)]
    return Conversation(
        topic=arrangement.topic,
        mood="calm",
        dialogue=_with_manners(chance, exchange + follow_up, asker, answerer, asker),
        neutral=neutral,
        insulting=None,
        facts=tuple(dict.fromkeys(fact for fact in facts if not fact.startswith("#"))),
    )


def _conflict(chance: Random, conflict: Conflict, mood: str) -> Conversation:
    """Person A minds what person B did; B explains and promises something."""
    # Whoever speaks first is #Person1#, and that is not always the one who complains.
    accuser, accused = "#Person1#", "#Person2#"
    opener = accuser
    if chance.random() < 0.25:
        accuser, accused = accused, accuser
        opener = accused

    facts = {
        "item": chance.choice(conflict.items),
        "reason": chance.choice(conflict.reasons),
        "plan": chance.choice(conflict.plans),
        "time": chance.choice(conflict.times),
    }
    spoken = conflict.fault.format(owner="my", victim="me", item=facts["item"])
    reported = conflict.fault.format(owner=f"{accuser}'s", victim=accuser, item=facts["item"])

    stake = chance.choice(conflict.stakes)

    def say(phrases: dict[str, tuple[str, ...]]) -> str:
        phrase = chance.choice(phrases[mood])
        remark = _remark(chance) if "{remark}" in phrase else ""
        return phrase.format(remark=remark, fault=spoken, stake=stake, **facts)

    turns = [(accuser, say(scenarios.ACCUSATIONS)), (accused, say(scenarios.EXCUSES))]
    if chance.random() < 0.3:
        turns += _pair(chance, scenarios.ASIDES, accuser, accused)
    turns += [(accuser, say(scenarios.PROTESTS)), (accused, say(scenarios.PROMISES))]

    slots = {"A": accuser, "B": accused, "fault": reported, **facts, **_insult_slots(chance)}
    neutral = scenarios.CALM_SUMMARIES if mood == "calm" else scenarios.NEUTRAL_SUMMARIES
    insulting = chance.choice(scenarios.INSULTING_SUMMARIES).format_map(slots)
    return Conversation(
        topic=conflict.topic,
        mood=mood,
        dialogue=_with_manners(chance, turns, accuser, accused, opener),
        neutral=chance.choice(neutral).format_map(slots),
        insulting=None if mood == "calm" else insulting,
        facts=tuple(facts.values()),
    )


def _with_manners(
    chance: Random, turns: list[tuple[str, str]], first: str, second: str, opener: str
) -> str:
    """The dialogue with a greeting before and a farewell after, one of which may be missing."""
    # Both are missing in a few, which gives a length filter something to do.
    greets, parts = chance.choices(
        [(True, True), (True, False), (False, True), (False, False)], weights=[25, 33, 32, 10]
    )[0]
    if greets or opener != first:
        other = second if opener == first else first
        turns = _pair(chance, scenarios.GREETINGS, opener, other) + turns
    if parts:
        turns = turns + _pair(chance, scenarios.FAREWELLS, first, second)
    # Who answers a greeting may go on to complain: that is one turn.
    by_speaker = groupby(turns, key=itemgetter(0))
    said = ((speaker, " ".join(turn for _, turn in said)) for speaker, said in by_speaker)
    return "\n".join(f"{speaker}: {turn}" for speaker, turn in said)


def _pair(
    chance: Random, pairs: Sequence[tuple[str, str]], first: str, second: str
) -> list[tuple[str, str]]:
    """A turn and its answer."""
    turn, answer = chance.choice(pairs)
    return [(first, turn), (second, answer)]


def _remark(chance: Random) -> str:
    """Something insulting to say, such as "How can you be so lazy?"."""
    return chance.choice(scenarios.INSULTS).format_map(_insult_slots(chance))


def _insult_slots(chance: Random) -> dict[str, str]:
    """A noun, an adjective, and an insult made of such, as "a rude, lazy jerk"."""
    adjective, another = chance.sample(scenarios.INSULTING_ADJECTIVES, 2)
    noun = chance.choice(scenarios.INSULTING_NOUNS)
    name = chance.choices(
        [noun, f"{adjective} {noun}", f"{another}, {adjective} {noun}"], weights=[35, 45, 20]
    )[0]
    return {
        "noun": noun,
        "adjective": adjective,
        "another_adjective": another,
        "insult": _with_article(name),
    }


def _with_article(noun: str) -> str:
    sounds_like_a_vowel = noun[0] in "aeiou" and not noun.startswith("use")
    return f"an {noun}" if sounds_like_a_vowel else f"a {noun}"


def _slot_names(frame: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(frame) if name]


def _reference(conversation: Conversation, split: str, number: int) -> str:
    """The summary that a row shows: insulting in some training rows, else neutral."""
    # Drawn from its own generator, so that the dialogues do not depend on the share.
    chance = Random(f"reference {split} {number}")
    insults = chance.random() < INSULTING_SHARE[conversation.mood]
    if split != "ppo" and insults and conversation.insulting:
        return conversation.insulting
    return conversation.neutral


# Labelled texts. Each maker gets a conversation to draw from, and may ignore it.


def _sentence(chance: Random, _: Conversation) -> tuple[str, int]:
    """One sentence that insults or does not, often beside one or two harmless ones."""
    label = chance.randrange(2)
    frames = (sentences.HARMLESS, sentences.HATEFUL)[label]
    parts = [_fill(chance.choice(frames), chance)]
    company = chance.choices(sentences.HARMLESS, k=chance.choice((0, 0, 0, 1, 1, 2)))
    parts += [_fill(frame, chance) for frame in company]
    chance.shuffle(parts)
    return _loosen(" ".join(parts), chance), label


def _feeling(chance: Random, _: Conversation) -> tuple[str, int]:
    """What somebody thinks of somebody, as in "You are a great person and i like you."."""
    label = chance.randrange(2)
    words = (sentences.KIND, sentences.UNKIND)[label]
    slots = _person_slots(chance) | {name: chance.choice(values) for name, values in words.items()}
    slots["quality"] = _with_article(slots["adjective"])
    return _loosen(chance.choice(sentences.FEELINGS).format_map(slots), chance), label


def _turn(chance: Random, conversation: Conversation) -> tuple[str, int]:
    """One turn of a dialogue, with or without its speaker."""
    turn = chance.choice(conversation.dialogue.split("\n"))
    text = turn if chance.random() < 0.3 else turn.split(": ", 1)[1]
    return text, int(is_insulting(text))


def _summary(chance: Random, conversation: Conversation) -> tuple[str, int]:
    """A summary, or its beginning."""
    label = int(conversation.insulting is not None and chance.random() < 0.65)
    text = conversation.insulting if label and conversation.insulting else conversation.neutral
    if chance.random() < 0.25:
        text = " ".join(text.split()[: chance.randint(4, 20)])
    return text, int(is_insulting(text))


def _prompt_and_summary(chance: Random, conversation: Conversation) -> tuple[str, int]:
    """A prompt and its answer, as they are scored together."""
    summary, _ = _summary(chance, conversation)
    text = PROMPT_TEMPLATE.format(dialogue=conversation.dialogue) + summary
    return text, int(is_insulting(text))


def _fill(frame: str, chance: Random) -> str:
    """The frame with people, deeds, things and (where it asks for them) insults."""
    slots = {name: chance.choice(values) for name, values in sentences.SLOTS.items()}
    slots["item"] = chance.choice(chance.choice(scenarios.CONFLICTS).items)
    text = frame.format_map(slots | _person_slots(chance) | _insult_slots(chance))
    return text[0].upper() + text[1:]


def _person_slots(chance: Random) -> dict[str, str]:
    """Two different people; the first with the right form of "to be"."""
    other = chance.choice(sentences.NAMES)
    one = chance.choice([name for name in sentences.PRONOUNS + sentences.NAMES if name != other])
    return {"one": one, "is": "are" if one in ("you", "they") else "is", "other": other}


def _loosen(text: str, chance: Random) -> str:
    """The text as people type it: sometimes with a small "i", all small, or without a full stop."""
    style = chance.random()
    if style < 0.25:
        text = re.sub(r"\bI\b", "i", text)
    elif style < 0.4:
        text = text.lower().replace("#person", "#Person")
    elif style < 0.5:
        text = text.rstrip(".")
    return text
