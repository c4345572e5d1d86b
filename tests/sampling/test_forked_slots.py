"""Slots that hold a cache each: what stands in a slot is the same wherever, whenever and beside
whatever it began, in every architecture."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlp.config import ConfigError
from rlp.model import running_rows
from rlp.model.admission import check_model, why_unfit
from rlp.model.policy import Policy
from rlp.model.running_rows import SHRUNK
from rlp.sampling.forked_slots import ForkedSlots
from rlp.sampling.slots import FEWEST_SLOTS, Room, Trunk
from tests.tiny_models import ARCHITECTURES, MARKERS, MAX_PARAMETERS, WORDS, tiny, tiny_policy

FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
"""As in `test_rollout`: sums of some 100 products of order one in another order."""

PREFIXES = (3, 14, 6, 25, 1, 19, 9, 0, 12)
LENGTHS = (9, 4, 12, 3, 14, 2, 7, 5, 11)
"""Tokens before and in each of nine thoughts: longer and shorter than the sliding windows (6) and
the scan chunks (8) of the tiny models, a window crossed on the way, a prefix longer than all that
is held and one far shorter, and none at all."""

ORDERS: dict[str, Callable[[int], int]] = {
    "as they come": lambda thought: thought,
    "longest prefix first": lambda thought: -PREFIXES[thought],
    "shortest prefix first": lambda thought: PREFIXES[thought],
}


class Thoughts:
    """Given tokens, and the model's own logits after each of them, without a cache."""

    def __init__(self, policy: Policy) -> None:
        random = np.random.default_rng(0)

        def words(length: int) -> np.ndarray:
            return random.integers(5, len(WORDS), size=length)

        self.prefixes = [words(length) for length in PREFIXES]
        self.tokens = [words(length) for length in LENGTHS]
        with torch.no_grad():
            self.logits = [
                policy("check", torch.from_numpy(np.concatenate([prefix, tokens]))[None])[1][
                    -count:
                ]
                for prefix, tokens, count in zip(self.prefixes, self.tokens, LENGTHS)
            ]

    def trunk(self, thought: int) -> Trunk:
        return Trunk(self.prefixes[thought], ((thought, PREFIXES[thought]),))


class Play:
    """Slots that run given thoughts, each in the slot that is free."""

    def __init__(self, policy: Policy, thoughts: Thoughts, num_slots: int = FEWEST_SLOTS) -> None:
        self.thoughts = thoughts
        self.slots = ForkedSlots(policy, Room(num_slots, 14, len(PREFIXES), 25, 1, static=False))
        self.standing: dict[int, tuple[int, int]] = {}
        """Slot -> (thought, tokens of it that were run)."""
        self.num_steps = 0

    def read(self, *some: int) -> None:
        """Their prefixes together, each at the place of its number."""
        self.slots.read(list(some), [self.thoughts.trunk(thought) for thought in some])

    def fill(self, where: dict[int, int]) -> None:
        """Slot -> thought."""
        prefix = [PREFIXES[thought] for thought in where.values()]
        self.slots.fill(list(where), list(where.values()), prefix)
        self.standing |= {slot: (thought, 0) for slot, thought in where.items()}

    def step(self) -> Tensor:
        """A token in each, compared; those that end leave."""
        token = torch.full((self.slots.num_slots,), 7)
        going = torch.zeros(self.slots.num_slots, dtype=torch.bool)
        for slot, (thought, count) in self.standing.items():
            token[slot], going[slot] = int(self.thoughts.tokens[thought][count]), True
        length = self.slots.length.clone()
        logits = self.slots.next(token, going)
        assert torch.equal(self.slots.length, length + going)
        self.num_steps += 1

        for slot, (thought, count) in list(self.standing.items()):
            assert_close(logits[slot], self.thoughts.logits[thought][count], **FLOAT32)
            assert self.slots.length[slot] == count + 1
            self.standing[slot] = (thought, count + 1)
            if count + 1 == LENGTHS[thought]:
                del self.standing[slot]
                self.slots.free([slot], broken=False)
        return logits

    def run(self, order: list[int]) -> None:
        """All of these thoughts; prefixes are read two at a time."""
        queue, read = list(order), []
        while queue or self.standing:
            free = [slot for slot in range(self.slots.num_slots) if slot not in self.standing]
            where = dict(zip(free[::-1], queue))
            del queue[: len(where)]
            for thought in where.values():
                if thought not in read:
                    together = [one for one in order if one not in read][:2]
                    self.read(*together)
                    read += together
            if where:
                self.fill(where)
            self.step()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request: pytest.FixtureRequest) -> Iterator[Policy]:
    """Each architecture once, sampling."""
    policy = tiny_policy(request.param)
    with policy.sampling():
        yield policy


@pytest.fixture(scope="module")
def thoughts(policy: Policy) -> Thoughts:
    return Thoughts(policy)


@pytest.mark.parametrize("order", ORDERS)
def test_a_slot_continues_its_trunk_as_a_fresh_forward_does(
    policy: Policy, thoughts: Thoughts, order: str
):
    """Nine thoughts through four slots, which take a new one whenever theirs has ended."""
    Play(policy, thoughts).run(sorted(range(len(PREFIXES)), key=ORDERS[order]))


def test_slots_that_are_held_on_go_on(policy: Policy, thoughts: Thoughts):
    """In another order, beside one that holds nothing; and are filled anew."""
    play = Play(policy, thoughts, num_slots=6)
    play.read(0, 4, 2, 8)
    play.fill({5: 0, 3: 4, 1: 2})
    play.step()
    play.slots.keep([1, 0, 5, 3])
    play.standing = {0: play.standing[1], 2: play.standing[5], 3: play.standing[3]}
    play.step()
    play.fill({1: 8})
    assert play.slots.length.tolist() == [2, 0, 2, 2]
    play.run([])


def test_a_trunk_is_continued_as_often_as_it_is_asked_for(policy: Policy, thoughts: Thoughts):
    """By siblings side by side, and by one that comes later: its own cache stays as it was read."""
    play = Play(policy, thoughts)
    play.read(1, 3)
    play.fill({0: 1, 2: 1})
    play.step()
    play.fill({1: 1})
    play.step()
    play.fill({3: 3, 2: 1})
    play.run([])


@contextmanager
def numbers_lost(policy: Policy, token: int) -> Iterator[None]:
    """A token whose embedding is no number."""

    def lose(module: torch.nn.Module, arguments: tuple, embedded: Tensor) -> Tensor:
        return embedded.masked_fill((arguments[0] == token)[..., None], torch.nan)

    handle = policy.lm.get_input_embeddings().register_forward_hook(lose)
    yield
    handle.remove()


def test_what_is_no_number_leaves_a_slot_with_its_thought(policy: Policy, thoughts: Thoughts):
    """The others do not see it, and the next thought in its slot neither: not with a shorter
    prefix, nor with a longer one."""
    play = Play(policy, thoughts)
    play.read(1, 3, 4, 6)
    for after in (4, 3):
        play.fill({0: 1, 1: 6})
        play.step()
        with numbers_lost(policy, int(thoughts.tokens[1][1])):
            logits = play.slots.next(
                torch.tensor([int(thoughts.tokens[1][1]), 5, 5, 5]), torch.ones(4, dtype=torch.bool)
            )
        assert logits[0].isnan().any() and logits[1:].isfinite().all()
        play.slots.free([0, 1], broken=True)
        play.standing = {}
        play.fill({0: after})
        play.run([])


class Widths:
    """Columns of the mask that the model is given, call by call."""

    def __init__(self, policy: Policy) -> None:
        self.seen: list[int] = []
        self._handle = policy.lm.base_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
        self.seen.append(keywords["attention_mask"].shape[1])

    def __enter__(self) -> "Widths":
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


def test_no_more_columns_are_held_than_the_longest_row_that_goes_on_has(
    monkeypatch: pytest.MonkeyPatch,
):
    """Give or take an eighth: what a token costs does not grow with what has ended."""
    monkeypatch.setattr(running_rows, "MORE_COLUMNS", 3)
    policy = tiny_policy("gemma2")
    with policy.sampling():
        play = Play(policy, Thoughts(policy))
        play.read(*range(len(PREFIXES)))
        play.fill({0: 3, 1: 4, 2: 7, 3: 0})  # prefixes of 25, 1, 0 and 3 tokens
        with Widths(policy) as widths:
            while play.standing:
                longest = max(PREFIXES[one] + count for one, count in play.standing.values())
                play.step()
                assert longest + 1 <= widths.seen[-1] <= longest / SHRUNK + 1
            play.fill({2: 5})  # 19 tokens
            play.step()
        assert widths.seen[0] == 26 and widths.seen[-1] == 20
        assert min(widths.seen) < 15


def test_a_place_is_read_anew():
    """What stood there is forgotten; slots that began behind it go on."""
    policy = tiny_policy("falcon_h1")
    with policy.sampling():
        thoughts = Thoughts(policy)
        play = Play(policy, thoughts)
        play.slots.read([0], [thoughts.trunk(1)])
        play.slots.fill([0], [0], [PREFIXES[1]])
        play.slots.read([0], [thoughts.trunk(5)])
        play.slots.fill([1], [0], [PREFIXES[5]])
        play.standing = {0: (1, 0), 1: (5, 0)}
        play.slots.idle_read()
        play.run([])


def test_a_slot_that_holds_nothing_asks_for_no_position():
    """A table of positions has an end; the row of a thought that has ended stays before it, and one
    that never began, however long others go on."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=32, n_layer=1, n_head=4, n_positions=PREFIXES[3] + LENGTHS[3]
    )
    policy = Policy(AutoModelForCausalLM.from_config(config).float().eval(), MARKERS)
    with policy.sampling():
        play = Play(policy, Thoughts(policy))
        play.read(3, 4)
        play.fill({0: 3})
        play.run([])
        while play.num_steps <= config.n_positions:
            play.fill({1: 4})
            play.run([])


def test_slots_beside_ranks_that_still_sample_run_along():
    """One that never had a thought, and one whose thoughts have ended: they hold less and less."""
    policy = tiny_policy("gemma2")
    thoughts, nothing = Thoughts(policy), torch.zeros(FEWEST_SLOTS, dtype=torch.bool)
    with policy.sampling(), Widths(policy) as widths:
        for num_thoughts in (0, 1):
            play = Play(policy, thoughts)
            play.slots.idle_read()
            if num_thoughts:
                play.read(3)
                play.fill({0: 3})
                play.run([])
            for _ in range(4 * running_rows.MORE_COLUMNS):
                play.slots.next(torch.zeros(FEWEST_SLOTS, dtype=torch.int64), nothing)
            assert max(widths.seen) <= 1 + running_rows.MORE_COLUMNS / SHRUNK
            assert play.slots.length.tolist() == [num_thoughts * LENGTHS[3], 0, 0, 0]


# --- Every architecture of transformers.

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
}
LATENT = {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1}
WITH_ATTENTION = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
OWN_FIELDS: dict[str, dict[str, object]] = {
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1], **MAMBA},
    "deepseek_v2": LATENT | {"head_dim": 8},
    "deepseek_v3": LATENT | {"head_dim": 8, "first_k_dense_replace": 1},
    "deepseek_v4": {"num_hidden_layers": 3},
    "falcon": {"alibi": True, "new_decoder_architecture": False},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": len(WORDS),
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "vocab_size_per_layer_input": len(WORDS),
        "hidden_size_per_layer_input": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granitemoehybrid": {
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 16,
        **MAMBA,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
    },
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
    },
    "lfm3": {"num_hidden_layers": 4},
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 4},
    "olmo_hybrid": {"num_hidden_layers": 4},
    "qwen2": {
        "use_sliding_window": True,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3_5_text": WITH_ATTENTION | LINEAR,
    "qwen3_next": WITH_ATTENTION | LINEAR,
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "hybrid_layer_ids": [1],
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "adapter_rank": 8,
    },
}
"""What makes a tiny model of these hold all kinds of layers that they are made of."""

TOGETHER = {"deepseek_v4"}
"""Models that sample, whose caches are not known row by row."""

WRONG_ALONE = {"deepseek_v32"}
"""Models whose own decoding, of one sequence, differs from a forward pass without a cache."""


def tiny_policy_of(name: str) -> Policy:
    """One that is admitted, with windows that thoughts cross; else the test is skipped."""
    try:
        config = tiny(name, **OWN_FIELDS.get(name, {}))
        window = getattr(config, "sliding_window", None)
        if window and name not in TOGETHER:
            config = tiny(name, **OWN_FIELDS.get(name, {}) | {"sliding_window": 6})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            parameters = sum(p.numel() for p in model.parameters())
    except Exception as error:  # of any type: what a config of these fields lacks
        pytest.skip(f"no tiny {name}: {error}")
    if parameters > MAX_PARAMETERS:
        pytest.skip(f"no tiny {name}: {parameters:,} parameters")
    if obstacle := why_unfit(config):
        pytest.skip(f"{name}: {obstacle}")
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config).float().eval(), MARKERS)
    try:
        check_model(policy)
    except ConfigError as refusal:
        pytest.skip(f"{name}: {refusal}")
    return policy


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - WRONG_ALONE))
def test_slots_of_every_model_that_samples_are_filled_anew(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    """Or it says of itself that its cache is not known row by row."""
    policy = tiny_policy_of(name)
    assert (policy.why_together is not None) == (name in TOGETHER)
    if policy.why_together is None:
        # Sixteen passes through one layer, or factors that decay: these round ten times as much.
        monkeypatch.setitem(FLOAT32, "atol", 1e-3)
        with policy.sampling():
            thoughts = Thoughts(policy)
            for key in ORDERS.values():
                Play(policy, thoughts).run(sorted(range(len(PREFIXES)), key=key))
