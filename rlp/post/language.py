"""The language of thoughts as a reward function of TRL's trainers."""

from collections.abc import Callable

from rlp.config import require_script
from rlp.measure.language import letters_of, thought_of
from rlp.post.traces import CLOSE, OPEN


def language_reward(
    script: str,
    *,
    weight: float = 1.0,
    open_marker: str = OPEN,
    close_marker: str = CLOSE,
    decode: Callable[[list[int]], str] | None = None,
) -> Callable[..., list[float]]:
    """lambda * share of a script, in the letters of each completion's thought.

    For `reward_funcs` of TRL's GRPOTrainer: it adds up with the others, as r + lambda * share.

    The thought is what stands before the close marker, after the open one where the prompt does not
    end with it. A thought without letters has a share of 1.

    Args:
        script: such as latin; a name of `rlp.writing.SCRIPTS`.
        weight: lambda; 0 turns it off.
        decode: of the tokenizer, where a marker is a special token: TRL leaves those out of the
            texts that it hands over, and without its end a thought is read with the answer.

    Raises:
        ConfigError: there is no such script.
    """
    require_script("script", script)

    def script_share(
        completions: list, completion_ids: list[list[int]] | None = None, **_: object
    ) -> list[float]:
        texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
        if decode is not None:
            texts = [decode(ids) for ids in completion_ids]
        thoughts = (thought_of(text, open_marker, close_marker) for text in texts)
        return [weight * letters_of(thought).share(script) for thought in thoughts]

    return script_share
