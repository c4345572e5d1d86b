"""A double of the vLLM engine: requests in, one token of each a step, weights by name."""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from rlp.model.policy import Policy
from rlp.sampling.vllm_engine import Answer, Request


class VllmDouble:
    """Runs a model of its own, untied as vLLM's is, on the weights that it is handed. Like vLLM it
    draws by seed and place in the thought, runs `slots` requests side by side, answers whichever
    ends first, and knows what it has run of a prompt before."""

    def __init__(self, policy: Policy, *, slots: int = 3) -> None:
        self.twin = deepcopy(policy)
        lm = self.twin.lm
        if lm.get_output_embeddings().weight is lm.get_input_embeddings().weight:
            lm.get_output_embeddings().weight = nn.Parameter(policy.head.detach().clone())
        self.reset = True
        """Whether the weights are dummies before the first are handed over."""
        self.slots = slots
        self.awake, self.wakes, self.temperatures = False, 0, set()
        self._waiting: list[tuple[Request, dict, list[int], list[float]]] = []
        self._seen: set[tuple[int, ...]] = set()
        for p in self.twin.lm.parameters():
            p.detach().normal_(generator=torch.Generator().manual_seed(0))

    def wake(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        assert not self.awake and not self._waiting
        own = dict(self.twin.lm.named_parameters())
        given = [(name, value) for name, value in weights if name in own]
        for name, value in given:
            own[name].detach().copy_(value)
        self.lacking = own.keys() - {name for name, _ in given}
        self.awake, self.wakes = True, self.wakes + 1
        self._seen.clear()

    def add(
        self, request: Request, *, temperature: float, max_tokens: int, stop: tuple[int, ...]
    ) -> None:
        assert self.awake and 0 <= request.seed < 2**63
        self.temperatures.add(temperature)
        options = {"temperature": temperature, "max_tokens": max_tokens, "stop": stop}
        self._waiting.append((request, options, [], []))

    def is_busy(self) -> bool:
        return len(self._waiting) > 0

    @torch.no_grad()
    def step(self) -> list[Answer]:
        assert self.awake
        ended = []
        for entry in reversed(self._waiting[: self.slots]):  # the last of them answers first
            request, options, tokens, logprobs = entry
            prompt = tuple(request.prompt.tolist())
            row = torch.tensor([[*prompt, *tokens]])
            logits = self.twin.lm(input_ids=row).logits[0, -1] / options["temperature"]
            generator = torch.Generator().manual_seed((request.seed + len(tokens)) % 2**63)
            tokens.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
            logprobs.append(float(logits.log_softmax(0)[tokens[-1]]))
            if tokens[-1] in options["stop"] or len(tokens) == options["max_tokens"]:
                cached = len(prompt) - 1 if prompt in self._seen else 0
                self._seen.add(prompt)
                ended.append(Answer(request.number, tokens, logprobs, cached))
                self._waiting.remove(entry)
        return ended

    def sleep(self) -> None:
        self._waiting.clear()
        self.awake = False
