"""A small world whose truth is known: stories (open) and problems (closed), drawn anew with a seed.

A story is a draw from a long-tailed distribution, of which every part is known:

    reef story : bruno has a tapir that is teal .

Given the topic the name and the animal are Zipf draws (the r-th most frequent has a probability
proportional to 1 / r), ranked by an order of each topic's own; the colour is one given the animal.
So all stories have the same entropy given the topic, H(names) + H(animals) + H(colours).

A problem has one right answer, and the way to it is part of the document, as in a trace: turns, the
heading after each, and the last one as the answer, in a word that stands nowhere else.

    problem one right two left three around four straight path one east two north three south
    four south end southward .
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlp.process.files import make_folder, new_folder, write_new
from rlp.world.folder import make_model_config, make_tokenizer
from rlp.world.problems import CLOSE, HEADINGS, MARKS, OPEN, TURNS, computed, echo, headings_after

TOPICS = tuple(
    "reef farm moon port mine wood lake road hill fort cave isle dune fair mill bog".split()
)
NAMES = tuple(
    "abel bruno cleo dora edna fritz gus hilde igor jana klara lutz mona nils olga pavel quinn rita"
    " sven tilda ugo vera wanda yves".split()
)
ANIMALS = tuple(
    "adder bison crane dingo eland finch gecko hyena ibis jackal koala lemur moose newt otter"
    " panda".split()
)
COLOURS = tuple("amber beige coral drab ebony fawn grey hazel".split())
NUM_TURNS = 4
ANSWERS = tuple(f"{heading}ward" for heading in HEADINGS)
_OTHERS = ("story", ":", "has", "a", "that", "is", ".", "problem", "path", "end")
VOCABULARY = (
    *("<pad>", "<unk>", "<eos>", OPEN, CLOSE),
    *(*_OTHERS, *TOPICS, *NAMES, *ANIMALS, *COLOURS, *MARKS[:NUM_TURNS], *TURNS, *HEADINGS),
    *ANSWERS,
)

HELD_OUT_PROBLEMS = 64
"""Of 4^4 questions."""


def zipf(count: int) -> np.ndarray:
    """[count]: probabilities proportional to 1 / rank."""
    weights = 1 / np.arange(1, count + 1)
    return weights / weights.sum()


def entropy(probabilities: np.ndarray) -> float:
    """Nats."""
    return float(-(probabilities * np.log(probabilities)).sum())


STORY_ENTROPY = sum(entropy(zipf(len(words))) for words in (NAMES, ANIMALS, COLOURS))
"""Of a story given its topic, nats."""


@dataclass(frozen=True, slots=True)
class Story:
    topic: str
    name: str
    animal: str
    colour: str

    @property
    def text(self) -> str:
        return f"{story_prompt(self.topic)} {self.name} has a {self.animal} that is {self.colour} ."


def story_prompt(topic: str) -> str:
    return f"{topic} story :"


class Truth:
    """The distribution that real documents are drawn from, of one seed."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"truth {seed}")

        def orders(givens: tuple[str, ...], words: tuple[str, ...]) -> dict[str, list[str]]:
            return {given: rng.sample(words, len(words)) for given in givens}

        self.names, self.animals = orders(TOPICS, NAMES), orders(TOPICS, ANIMALS)
        self.colours = orders(ANIMALS, COLOURS)
        questions = list(range(4**NUM_TURNS))
        rng.shuffle(questions)
        self.held_out_questions = questions[:HELD_OUT_PROBLEMS]
        self.questions = questions[HELD_OUT_PROBLEMS:]

    def story(self, topic: str, rng: random.Random) -> Story:
        """One draw."""
        name, animal = _draw(self.names[topic], rng), _draw(self.animals[topic], rng)
        return Story(topic, name, animal, _draw(self.colours[animal], rng))

    def logprob(self, story: Story) -> float:
        """Of a story given its topic, nats."""
        parts = (
            (self.names[story.topic], story.name),
            (self.animals[story.topic], story.animal),
            (self.colours[story.animal], story.colour),
        )
        return sum(math.log(zipf(len(order))[order.index(word)]) for order, word in parts)

    def name_probabilities(self) -> np.ndarray:
        """[topics, names] in the order of `TOPICS` and `NAMES`."""
        share = zipf(len(NAMES))
        return np.array([[share[self.names[t].index(name)] for name in NAMES] for t in TOPICS])

    def documents(self, count: int, rng: random.Random) -> Iterator[str]:
        """Real documents: stories of each topic and problems by turns, half of each."""
        for number in range(count // 2):
            yield self.story(TOPICS[number % len(TOPICS)], rng).text
            yield problem_text(rng.choice(self.questions))


def _draw(order: list[str], rng: random.Random) -> str:
    return rng.choices(order, zipf(len(order)).tolist())[0]


# Problems


def turns_of(question: int) -> list[int]:
    """Its index written in base 4, lowest digit first."""
    return [question // 4**u % 4 for u in range(NUM_TURNS)]


def question_text(question: int) -> str:
    return " ".join(["problem", *echo(turns_of(question)), "path"])


def answer_of(question: int) -> str:
    return ANSWERS[headings_after(turns_of(question))[-1]]


def problem_text(question: int) -> str:
    path = computed(turns_of(question))
    return " ".join([question_text(question), *path, "end", answer_of(question), "."])


RIGHT_PROBLEMS = frozenset(problem_text(question) for question in range(4**NUM_TURNS))
"""All there are: every other document that begins as a problem is wrong."""


# Files


def prompts_to_generate() -> list[dict]:
    """As many of each kind: topics, and the first two turns of a problem, which the model goes on
    with by itself."""
    stories = [{"prompt": story_prompt(topic), "kind": "open"} for topic in TOPICS]
    begun = [[MARKS[0], one, MARKS[1], two] for one in TURNS for two in TURNS]
    problems = [{"prompt": " ".join(["problem", *words]), "kind": "closed"} for words in begun]
    return [*stories, *problems]


def prompts_to_read(truth: Truth) -> list[dict]:
    """The panel of the reading: all topics, and held-out questions with their answers."""
    stories = [{"prompt": story_prompt(topic), "kind": "open"} for topic in TOPICS]
    return stories + [
        {"prompt": question_text(question), "kind": "closed", "answer": answer_of(question)}
        for question in truth.held_out_questions
    ]


def write_world(out: Path, seed: int, *, base: int, rounds: int, documents: int) -> None:
    """A folder with all that a seed is run on: base_train, held_out, a block of real documents for
    each round, prompts, tokenizer, and the config of a model.

    Args:
        base: documents that the base is trained on.
        rounds, documents: blocks of real documents, and the size of each.
    """
    truth = Truth(seed)
    rng = random.Random(f"documents {seed}")
    held_out = [truth.story(topic, rng).text for topic in TOPICS for _ in range(16)]
    held_out += [problem_text(question) for question in truth.held_out_questions]
    files = {
        "base_train": truth.documents(base, rng),
        "held_out": held_out,
        **{f"real_{n}": truth.documents(documents, rng) for n in range(1, rounds + 1)},
    }
    rows = {name: [{"text": text} for text in texts] for name, texts in files.items()}
    rows |= {"generate": prompts_to_generate(), "read": prompts_to_read(truth)}
    make_folder(out.parent, exist_ok=True)
    with new_folder(out, point="world.before_rename") as folder:
        for name, lines in rows.items():
            content = "".join(json.dumps(line) + "\n" for line in lines).encode()
            write_new(folder / f"{name}.jsonl", content, point="world.torn_file")
        make_tokenizer(VOCABULARY).save_pretrained(folder / "tokenizer")
        make_model_config(VOCABULARY).to_json_file(folder / "model_config.json", use_diff=False)
