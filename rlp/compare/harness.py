"""The thinking model as lm-evaluation-harness knows one."""

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
from rlp.compare.thinker import Reply, Thinker


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
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class ThinkingLM(LM):
        """See `thinking_lm`."""

        def __init__(self) -> None:
            super().__init__()
            self.replies: list[Reply] = []

        def generate_until(
            self, requests: list["Instance"], disable_tqdm: bool = True
        ) -> list[str]:
            groups: dict[tuple, list[int]] = {}
            for index, request in enumerate(requests):
                settings = request.args[1]
                until = settings.get("until") or []
                longest = answer_tokens or settings.get("max_gen_toks") or 256
                groups.setdefault(
                    (longest, *([until] if isinstance(until, str) else until)), []
                ).append(index)
            sample = _sample_numbers(requests)
            self.replies = [None] * len(requests)
            for (longest, *until), members in groups.items():
                count = max(sample[index] for index in members) + 1
                answered = thinker.replies(
                    [requests[index].args[0] for index in members],
                    count,
                    until=until,
                    answer_tokens=longest,
                )
                for index, replies in zip(members, answered):
                    self.replies[index] = replies[sample[index]]
            return [reply.answer for reply in self.replies]

        def loglikelihood(
            self, requests: list["Instance"], disable_tqdm: bool = True
        ) -> list[tuple[float, bool]]:
            scored = thinker.scores(
                [_split(thinker, *request.args) for request in requests], _sample_numbers(requests)
            )
            self.replies = [reply for _, _, reply in scored]
            return [(logprob, greedy) for logprob, greedy, _ in scored]

        def loglikelihood_rolling(
            self, requests: list["Instance"], disable_tqdm: bool = True
        ) -> list[float]:
            silent, totals = thinker.without_thoughts(), []
            for request in requests:
                windows = map(
                    make_disjoint_window,
                    get_rolling_token_windows(
                        token_list=silent.encode(request.args[0]).tolist(),
                        prefix_token=silent.first_token,
                        max_seq_len=(silent.context_tokens or 2049) - 1,
                        context_len=1,
                    ),
                )
                pairs = [
                    (np.array(context, dtype=np.int64), np.array(continuation, dtype=np.int64))
                    for context, continuation in windows
                ]
                totals.append(
                    sum(logprob for logprob, _, _ in silent.scores(pairs, [0] * len(pairs)))
                )
            return totals

    return ThinkingLM()


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
    whole = thinker.encode(kept + context[len(kept) :] + continuation)
    if not kept:
        return np.array([thinker.first_token]), (
            whole[1:] if whole[0] == thinker.first_token and len(whole) > 1 else whole
        )
    head = thinker.encode(kept)
    return head, whole[len(head) :]
