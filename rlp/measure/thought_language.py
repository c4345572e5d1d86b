"""The language of thoughts while they are trained: script shares and switches, by their tokens.

The letters of most tokens are known from the vocabulary (`TokenScripts`), so a thought is not
decoded for this. A token that does not say alone what it contributes, because it is a piece of a
character or has letters of several families, makes its thought be read from its text instead: the
numbers are those of `rlp.measure.language` on the decoded thought.

Dimensions
    M  positions;  G  thoughts per position;  L  thought tokens;  S  families of scripts
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlp.measure.language import letters_of
from rlp.measure.thought_statistics import TokenScripts, inside_lengths, thought_lengths
from rlp.model.thoughts import Thoughts
from rlp.process.tally import Tally


@dataclass(frozen=True, slots=True)
class Languages:
    """What the letters of thoughts say of their language."""

    letters: Tensor
    """[M, G] int64."""
    purity: Tensor
    """[M, G] float64, share of the most frequent family of scripts; 1 without letters."""
    switches: Tensor
    """[M, G] int64, neighbouring letters of different families."""
    share: Tensor | None
    """[M, G] float64, share of the target script; 1 without letters. None where there is no
    target."""


@dataclass(frozen=True, slots=True)
class ThoughtLanguage:
    """Measures thoughts that are in the memory of the host."""

    tokenizer: PreTrainedTokenizerBase
    scripts: TokenScripts
    """In the memory of the host."""
    target: str | None
    """The script that thoughts are to be written in."""
    close_tokens: int
    """Of the close marker, which belongs to no thought."""

    def of(self, thoughts: Thoughts) -> Languages:
        """The language of each thought, without its close marker."""
        lengths = thought_lengths(thoughts, self.close_tokens)
        inside = inside_lengths(thoughts.tokens, lengths)
        letters = self.scripts.letters[thoughts.tokens] * inside
        family = self.scripts.script[thoughts.tokens] * (letters > 0)
        count = letters.sum(dim=-1)
        by_family = letters.new_zeros(*count.shape, len(self.scripts.names))
        largest = by_family.scatter_add(-1, family, letters).amax(dim=-1)
        target = self.scripts.in_target
        in_target = None if target is None else (target[thoughts.tokens] * inside).sum(dim=-1)
        found = Languages(
            count, _share(largest, count), _switches(family), _share_or_none(in_target, count)
        )
        unsure = (self.scripts.unsure[thoughts.tokens] & inside).any(dim=-1)
        self._read(found, thoughts.tokens, lengths, unsure)
        return found

    def _read(self, found: Languages, tokens: Tensor, lengths: Tensor, unsure: Tensor) -> None:
        """Put in place what the texts of some thoughts say."""
        places = unsure.nonzero().tolist()
        rows = [tokens[m, g, : lengths[m, g]].tolist() for m, g in places]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True) if rows else []
        for (m, g), text in zip(places, texts):
            letters = letters_of(text)
            found.letters[m, g] = letters.letters
            found.purity[m, g] = letters.purity
            found.switches[m, g] = letters.switches
            if found.share is not None:
                found.share[m, g] = letters.share(self.target)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """1 where there is nothing to have a share of."""
    return torch.where(whole > 0, part.double() / whole.clamp(min=1), 1.0)


def _share_or_none(part: Tensor | None, whole: Tensor) -> Tensor | None:
    return None if part is None else _share(part, whole)


def _switches(family: Tensor) -> Tensor:
    """[..., L] families of tokens, 0 where a token has no letters -> [...] how often the next
    token with letters is of another."""
    index = torch.arange(family.shape[-1]).expand_as(family)
    last = torch.where(family > 0, index, -1).cummax(dim=-1).values  # up to and with this token
    before = last[..., :-1]
    previous = family.gather(-1, before.clamp(min=0))
    here = family[..., 1:]
    return ((here > 0) & (before >= 0) & (here != previous)).sum(dim=-1)


def watch_language(tally: Tally, found: Languages) -> None:
    """Purity, mixing and switches of the thoughts that have letters."""
    has_letters = found.letters > 0
    tally.add("thought/script_purity_frac", found.purity[has_letters])
    tally.add("thought/mixed_scripts_frac", found.switches[has_letters] > 0)
    tally.add("thought/script_switches", found.switches[has_letters])
    if found.share is not None:
        tally.add("thought/target_script_frac", found.share[has_letters])
