"""A thinker as lm-evaluation-harness knows a model."""

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from rlp.compare.thinker import Reply, Thinker

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM


def thinking_lm(thinker: Thinker, *, answer_tokens: int | None = None) -> "LM":
    """The thinker as a model of lm_eval, for `lm_eval.evaluator.evaluate` or for `run_benchmark`.

    A request that comes k times is answered k times, with other thoughts. `replies` holds what the
    last call saw, request by request.
    `loglikelihood_rolling` never thinks: a text's perplexity has no place where a thought would
    stand.

    Args:
        answer_tokens: longest answer; None: as the request says, or 256 as in lm_eval.
    """
    from lm_eval.api.model import LM

    class ThinkingLM(LM):
        """See `thinking_lm`."""

        def __init__(self) -> None:
            super().__init__()
            self.replies: list[Reply] = []

        def generate_until(
            self, requests: list["Instance"], disable_tqdm: bool = True
        ) -> list[str]:
            self.replies = _answer(thinker, requests, answer_tokens)
            return [reply.answer for reply in self.replies]

        def loglikelihood(
            self, requests: list["Instance"], disable_tqdm: bool = True
        ) -> list[tuple[float, bool]]:
            pairs = [_split(thinker, *request.args) for request in requests]
            scored = thinker.scores(pairs, _sample_numbers(requests))
            self.replies = [reply for _, _, reply in scored]
            return [(logprob, greedy) for logprob, greedy, _ in scored]

        def loglikelihood_rolling(
            self, requests: list["Instance"], disable_tqdm: bool = True
        ) -> list[float]:
            silent = thinker.without_thoughts()
            return [_text_logprob(silent, request.args[0]) for request in requests]

    return ThinkingLM()


def _answer(thinker: Thinker, requests: list["Instance"], answer_tokens: int | None) -> list[Reply]:
    """The reply to each request; those with the same settings are answered together."""
    groups: dict[tuple, list[int]] = {}
    for index, request in enumerate(requests):
        settings = request.args[1]
        until = settings.get("until") or []
        until = (until,) if isinstance(until, str) else tuple(until)
        longest = answer_tokens or settings.get("max_gen_toks") or 256
        groups.setdefault((longest, until), []).append(index)

    sample = _sample_numbers(requests)
    replies: list[Reply | None] = [None] * len(requests)
    for (longest, until), members in groups.items():
        answered = thinker.replies(
            [requests[index].args[0] for index in members],
            max(sample[index] for index in members) + 1,
            until=list(until),
            answer_tokens=longest,
        )
        for index, of_prompt in zip(members, answered):
            replies[index] = of_prompt[sample[index]]
    return replies


def _text_logprob(silent: Thinker, text: str) -> float:
    """Nats of a whole text, in windows as lm_eval cuts them."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows = get_rolling_token_windows(
        token_list=silent.encode(text).tolist(),
        prefix_token=silent.first_token,
        max_seq_len=(silent.context_tokens or 2049) - 1,
        context_len=1,
    )
    pairs = []
    for window in windows:
        context, continuation = make_disjoint_window(window)
        pairs.append((np.array(context, dtype=np.int64), np.array(continuation, dtype=np.int64)))
    return sum(logprob for logprob, _, _ in silent.scores(pairs, [0] * len(pairs)))


def _sample_numbers(requests: list["Instance"]) -> list[int]:
    """How often each request came before: lm_eval repeats the same object."""
    seen: Counter[int] = Counter()
    numbers = []
    for request in requests:
        numbers.append(seen[id(request)])
        seen[id(request)] += 1
    return numbers


def _split(thinker: Thinker, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of both, split where the context's tokens end; white space between them belongs to the
    continuation, as in lm_eval."""
    kept = context.rstrip()
    whole = thinker.encode(context + continuation)
    if kept:
        head = thinker.encode(kept)
        return head, whole[len(head) :]
    if whole[0] == thinker.first_token and len(whole) > 1:
        whole = whole[1:]
    return np.array([thinker.first_token]), whole
