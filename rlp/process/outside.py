"""Parts from outside: what a user gives in place of a part of ours, by `package.module:name`.

A reward, a position selector, a baseline and a loss can be replaced. Each is a callable of one
argument; a class is made without arguments first. What it needs beyond what is always there it
says in an attribute `needs`, a tuple of names, so that nothing is computed in vain.

Only the config that a user starts a run with names a part: no file that is read on the way
(a checkpoint, a corpus, a run folder that is looked at) makes this module import anything.
"""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rlp.config import ConfigError


class PartError(ConfigError):
    """A part from outside that can not be used. The message names the part, what came and what was
    expected."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a run that can be replaced, under the name that a checkpoint remembers."""

    key: str
    """Of the config: `reward.kind`."""
    name: str
    """Its value: `information_gain`, or `my_rewards:Surprise`."""
    call: Callable
    needs: tuple[str, ...]
    """What it is computed from beyond what is always there."""

    @property
    def is_outside(self) -> bool:
        """Whether it is none of ours: what it gives is then looked at before it is used."""
        return ":" in self.name

    def __call__(self, given: object) -> object:
        """What the part makes of what it is given.

        Raises:
            PartError: a part from outside raised something; where, and what.
        """
        if not self.is_outside:
            return self.call(given)
        try:
            return self.call(given)
        except Exception as error:
            raise PartError(
                f"{self.key}: {self.name} raised {_told(error)}. Mend it there, or write another"
                f" {self.key}."
            ) from error

    def refuse(self, came: str, expected: str) -> PartError:
        """The error for a result that can not be used."""
        return PartError(f"{self.key}: {self.name} gave {came}; expected {expected}.")


def open_part(
    key: str,
    name: str,
    ours: Mapping[str, Callable[[], Callable]],
    statistics: tuple[str, ...],
    given: Callable | None = None,
) -> Part:
    """The part that a config names, or that a caller hands over.

    Args:
        ours: makers of the parts that come with this program, by name.
        statistics: what a part may need.
        given: an object, function or class in place of what would be imported.

    Raises:
        PartError: its module can not be imported, has no such name, or what stands there is no
            part.
    """
    if given is None and name in ours:
        call = ours[name]()
    else:
        found = _import(key, name) if given is None else given
        call = _made(key, name, found)
    needs = getattr(call, "needs", ())
    if isinstance(needs, str):
        needs = (needs,)
    unknown = [need for need in needs if need not in statistics]
    if unknown:
        raise PartError(
            f"{key}: {name} needs {unknown[0]!r}, which is nothing that a run can give it."
            f" {_did_you_mean(str(unknown[0]), statistics)}"
            f"It may need: {', '.join(statistics) or 'nothing'}."
        )
    return Part(key, name, call, tuple(needs))


def name_of(part: Callable) -> str:
    """`package.module:name` of an object that was handed over, for the checkpoint."""
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}:{named.__qualname__}"


def _import(key: str, name: str) -> object:
    """What stands under `package.module:name`."""
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # a console script has its own folder there, and not the user's
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise PartError(
                f"{key}: {name}: there is no module {missing!r}. It is looked for in {here} and"
                " where Python finds modules: install its package, start the run in the folder of"
                " the file, or write PYTHONPATH=FOLDER before the command."
            ) from error
        raise PartError(f"{key}: importing {module_name} raised {_told(error)}.") from error
    except Exception as error:
        raise PartError(f"{key}: importing {module_name} raised {_told(error)}.") from error

    for word in attribute.split("."):
        if not hasattr(found, word):
            there = [other for other in vars(found) if not other.startswith("_")]
            raise PartError(
                f"{key}: module {module_name} ({getattr(found, '__file__', 'built in')}) has no"
                f" {word!r}. {_did_you_mean(word, there)}"
                f"Write {key}={module_name}:NAME."
            )
        found = getattr(found, word)
    return found


def _made(key: str, name: str, found: object) -> Callable:
    """An object that can be called: a class makes one."""
    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:
            raise PartError(
                f"{key}: {name} is a class, and making one without arguments raised"
                f" {_told(error)}. Give its arguments defaults, or write a function."
            ) from error
    if not callable(found):
        raise PartError(
            f"{key}: {name} is {type(found).__name__}; expected a function of one argument, or a"
            " class whose objects are called with one."
        )
    return found


def _told(error: Exception) -> str:
    """An error in one line: what it is, and the line of the user's file that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if "importlib" not in frame.filename]
    last = theirs[-1] if theirs else None
    where = f" ({os.path.basename(last.filename)}, line {last.lineno})" if last else ""
    words = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {words}{where}" if words else f"{type(error).__name__}{where}"


def _did_you_mean(name: str, known: Mapping | list | tuple) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]!r}? " if near else ""
