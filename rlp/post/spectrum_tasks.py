"""Tasks whose answers are draws from a known distribution: urns, coins, dice, numbers, days,
months, primes.

A family holds H distributions of the O options, for each of X inputs, and a prior over them. A task
is one of the H. Its description z either tells which one it is, and then the right prediction is
that distribution; or it does not, and then what is right after k pairs is Bayes' rule:

    p(y | x, x_1, y_1 ... x_k, y_k) = sum_h w_h p_h(y | x),    w_h ~ prior_h prod_i p_h(y_i | x_i)

Everything is a function of a seed and a number, by keys: no task depends on those before it.

Dimensions
    H  distributions of a family;  X  inputs;  O  options
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlp.config import ConfigError
from rlp.data.noise import SPECTRUM_NOISE, keyed_noise

Pair = tuple[int, int]
"""Number of the input, number of the option that was drawn."""


@dataclass(frozen=True, slots=True)
class Family:
    """Tasks of one kind: what may be drawn, and how likely each distribution of it is."""

    name: str
    options: tuple[str, ...]
    """[O], the valid outputs."""
    description: str
    """Of a task that does not tell which distribution it has."""
    descriptions: tuple[str, ...]
    """[H], of tasks that do."""
    shares: np.ndarray
    """[H, X, O] float64; sums to 1 over the options."""
    prior: np.ndarray
    """[H] float64, sums to 1."""
    inputs: tuple[str, ...] = ("",)
    """[X]; a task without inputs has one, which is empty."""

    def __post_init__(self) -> None:
        shape = (len(self.descriptions), len(self.inputs), len(self.options))
        sums = self.shares.sum(axis=-1)
        if (
            self.shares.shape != shape
            or self.prior.shape != shape[:1]
            or not np.allclose(sums, 1)
            or not np.isclose(self.prior.sum(), 1)
            or (self.shares < 0).any()
            or (self.prior < 0).any()
        ):
            raise ValueError(
                f"family {self.name}: expected shares {shape} and prior {shape[:1]}, each a"
                f" distribution, got {self.shares.shape} and {self.prior.shape}."
            )

    def predictive(self, history: Sequence[Pair], given: int) -> np.ndarray:
        """[O]: Bayes' prediction of the next output for an input, after these pairs.

        Raises:
            ValueError: no distribution of the family could have drawn them.
        """
        from scipy.special import logsumexp

        with np.errstate(divide="ignore"):
            log_weight, log_shares = np.log(self.prior), np.log(self.shares)
        for seen, drawn in history:
            log_weight = log_weight + log_shares[:, seen, drawn]
        total = logsumexp(log_weight)
        if not np.isfinite(total):
            raise ValueError(f"family {self.name}: none of its distributions draws {history}.")
        return np.exp(log_weight - total) @ self.shares[:, given]


@dataclass(frozen=True, slots=True)
class Task:
    """One distribution of a family, told or not."""

    family: Family
    which: int
    """Of the H."""
    is_told: bool
    """Whether the description says which."""

    @property
    def description(self) -> str:
        """z."""
        return self.family.descriptions[self.which] if self.is_told else self.family.description

    def draw(self, count: int, noise: np.random.Generator) -> list[Pair]:
        """Pairs: inputs evenly at random, outputs as the distribution has them."""
        inputs = noise.integers(len(self.family.inputs), size=count)
        shares = self.family.shares[self.which]
        return [(int(x), int(noise.choice(len(shares[x]), p=shares[x]))) for x in inputs]

    def modes(self, count: int, noise: np.random.Generator) -> list[Pair]:
        """Pairs of the same inputs with the most likely output, the first of equals."""
        inputs = noise.integers(len(self.family.inputs), size=count)
        best = self.family.shares[self.which].argmax(axis=1)
        return [(int(x), int(best[x])) for x in inputs]

    def predictive(self, history: Sequence[Pair], given: int) -> np.ndarray:
        """[O]: what a reader who knows the family can say best of the next output."""
        if self.is_told:
            return self.family.shares[self.which, given]
        return self.family.predictive(history, given)

    def texts(self, pairs: Sequence[Pair]) -> list[tuple[str, str]]:
        """Inputs and outputs in words."""
        return [(self.family.inputs[x], self.family.options[y]) for x, y in pairs]


# Families

COLOURS = ("red", "blue", "green", "black", "white", "yellow")
BALLS, COLOURS_IN_URN = 8, 3
TENTHS = tuple(range(1, 10))
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
PRIMES = tuple(n for n in range(2, 100) if all(n % d for d in range(2, n)))


def urn(noise: np.random.Generator) -> Family:
    """Eight balls of three of six colours, each at least once, all 21 fillings equally likely;
    drawn and put back. The colours are the noise's."""
    chosen = sorted(noise.choice(len(COLOURS), size=COLOURS_IN_URN, replace=False))
    colours = tuple(COLOURS[index] for index in chosen)
    fillings = [
        filling
        for filling in itertools.product(range(1, BALLS), repeat=COLOURS_IN_URN)
        if sum(filling) == BALLS
    ]
    told = [_listed([f"{n} {c}" for n, c in zip(one, colours)]) for one in fillings]
    behind = "A ball is drawn at random and put back."
    return _family(
        "urn",
        colours,
        f"An urn holds balls that are {_listed(colours, 'or')}. {behind}",
        [f"An urn holds {text} balls. {behind}" for text in told],
        np.array(fillings)[:, None] / BALLS,
    )


def coin(noise: np.random.Generator) -> Family:
    """Heads with probability 0.1, 0.2 ... 0.9, each equally likely."""
    return _family(
        "coin",
        ("heads", "tails"),
        "A coin that may be bent is tossed.",
        [f"A coin that shows heads with probability 0.{tenth} is tossed." for tenth in TENTHS],
        np.array([[[t / 10, 1 - t / 10]] for t in TENTHS]),
    )


def coins(noise: np.random.Generator) -> Family:
    """Two coins, each with heads at 0.1, 0.3 ... 0.9; the input names the one that is tossed."""
    both = list(itertools.product(TENTHS[::2], repeat=2))
    behind = "The one that is named is tossed."
    return _family(
        "coins",
        ("heads", "tails"),
        f"Two coins may be bent. {behind}",
        [
            f"Of two coins the first shows heads with probability 0.{one}, the second with"
            f" 0.{other}. {behind}"
            for one, other in both
        ],
        np.array([[[t / 10, 1 - t / 10] for t in pair] for pair in both]),
        ("first", "second"),
    )


def die(noise: np.random.Generator) -> Family:
    """Fair, or with one face half of the time and the others equally often: seven dice, equally
    likely."""
    faces = tuple(str(face) for face in range(1, 7))
    loaded = np.where(np.eye(6) == 1, 0.5, 0.1)
    return _family(
        "die",
        faces,
        "A die that may be loaded is rolled.",
        [
            "A fair die is rolled.",
            *(
                f"A die that is loaded is rolled. It shows {face} half of the time."
                for face in faces
            ),
        ],
        np.concatenate([np.full((1, 6), 1 / 6), loaded])[:, None],
    )


def numbers_10(noise: np.random.Generator) -> Family:
    """From 1 to 10: all, low, high, odd or even ones, evenly."""
    return _parts(
        "numbers_10",
        "A random number of some kind, from 1 to 10.",
        {
            "A random number from 1 to 10.": range(1, 11),
            "A random number from 1 to 5.": range(1, 6),
            "A random number from 6 to 10.": range(6, 11),
            "A random odd number from 1 to 10.": range(1, 11, 2),
            "A random even number from 1 to 10.": range(2, 11, 2),
        },
    )


def numbers_100(noise: np.random.Generator) -> Family:
    """From 1 to 100: all, low, high, odd, even ones or multiples of 10, evenly."""
    return _parts(
        "numbers_100",
        "A random number of some kind, from 1 to 100.",
        {
            "A random number from 1 to 100.": range(1, 101),
            "A random number from 1 to 50.": range(1, 51),
            "A random number from 51 to 100.": range(51, 101),
            "A random odd number from 1 to 100.": range(1, 101, 2),
            "A random even number from 1 to 100.": range(2, 101, 2),
            "A random multiple of 10 from 1 to 100.": range(10, 101, 10),
        },
    )


def weekday(noise: np.random.Generator) -> Family:
    """All days, working days, or those of the weekend, evenly."""
    return _parts(
        "weekday",
        "A random day of some part of the week.",
        {
            "A random day of the week.": DAYS,
            "A random working day.": DAYS[:5],
            "A random day of the weekend.": DAYS[5:],
        },
    )


def month(noise: np.random.Generator) -> Family:
    """All months, or those of a quarter, evenly."""
    quarters = ("first", "second", "third", "last")
    parts = {
        f"A random month of the {name} quarter.": MONTHS[3 * n : 3 * n + 3]
        for n, name in enumerate(quarters)
    }
    told = "A random month of some part of the year."
    return _parts("month", told, {"A random month of the year.": MONTHS} | parts)


def prime(noise: np.random.Generator) -> Family:
    """Primes below 100: all, those below 50, or those above, evenly."""
    return _parts(
        "prime",
        "A random prime number of some kind, below 100.",
        {
            "A random prime number below 100.": PRIMES,
            "A random prime number below 50.": [n for n in PRIMES if n < 50],
            "A random prime number from 50 to 100.": [n for n in PRIMES if n > 50],
        },
    )


FAMILIES: dict[str, Callable[[np.random.Generator], Family]] = {
    make.__name__: make
    for make in (urn, coin, coins, die, numbers_10, numbers_100, weekday, month, prime)
}
"""By name; what a family leaves open, such as the colours of an urn, is drawn."""


def _parts(name: str, description: str, parts: Mapping[str, Sequence[object]]) -> Family:
    """One that draws evenly from a part of its options; the first part is all of them."""
    options = list(next(iter(parts.values())))
    shares = np.array([[[one in part for one in options]] for part in parts.values()], dtype=float)
    shares /= shares.sum(axis=-1, keepdims=True)
    return _family(name, [str(one) for one in options], description, list(parts), shares)


def _family(
    name: str,
    options: Sequence[str],
    description: str,
    descriptions: Sequence[str],
    shares: np.ndarray,
    inputs: tuple[str, ...] = ("",),
) -> Family:
    """One whose distributions are equally likely."""
    count = len(descriptions)
    prior = np.full(count, 1 / count)
    return Family(name, tuple(options), description, tuple(descriptions), shares, prior, inputs)


def _listed(words: Sequence[str], joint: str = "and") -> str:
    """one, another and a third"""
    return f"{', '.join(words[:-1])} {joint} {words[-1]}"


# Drawing tasks


def require_families(where: str, names: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: none, one that there is not, or one twice.
    """
    unknown = [name for name in names if name not in FAMILIES]
    if not names or unknown or len(set(names)) < len(names):
        raise ConfigError(
            f"{where} must be different names among {', '.join(FAMILIES)}, got"
            f" {', '.join(map(str, names)) or 'none'}."
        )


def draw_tasks(
    names: Sequence[str], count: int, *, told: float, seed: int, key: int = 0
) -> Iterator[tuple[Task, np.random.Generator]]:
    """Tasks of these families in turn, and the noise that their pairs are to be drawn with.

    Task n is a function of (names, told, seed, key, n).

    Args:
        told: the share of tasks whose description says which distribution it is.
        key: of different uses of one seed, such as rows to train on and questions to read by.
    """
    for number in range(count):
        noise = keyed_noise(seed=seed, purpose=SPECTRUM_NOISE, document=number, occurrence=key)
        family = FAMILIES[names[number % len(names)]](noise)
        is_told = bool(noise.random() < told)
        yield Task(family, int(noise.choice(len(family.prior), p=family.prior)), is_told), noise
