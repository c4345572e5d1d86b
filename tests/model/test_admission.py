"""Any causal language model is trained rightly, or refused with a sentence before a run folder is
there."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from rlp.compare.arms import write_arm
from rlp.config import Config, ConfigError
from rlp.data.positions import Positions
from rlp.model import cached_rows
from rlp.model.admission import check_model, context_limit, why_unfit, why_unsound
from rlp.model.layout import repeated_layout, sequence_parts, tree_layout
from rlp.model.markers import Markers
from rlp.model.policy import Policy
from rlp.model.setup import PanelSetup, RunSetup
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.process.exit_codes import DONE
from rlp.process.run_folder import open_run_folder
from rlp.trainer import Trainer
from tests.tiny_models import ARCHITECTURES, WORDS, architecture, random_documents, tiny_policy
from tests.training import tiny_config, train

MARKERS = Markers(open=(2,), close=(3,))
WIDTHS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
}
COMMON = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}


def config_of(name: str, **fields: object) -> PretrainedConfig:
    """A tiny architecture of any name; only the fields that it has are given to it."""
    cls = CONFIG_MAPPING[name]
    known = {**cls().to_dict(), **cls.attribute_map}
    return cls(**{key: value for key, value in (COMMON | WIDTHS).items() if key in known} | fields)


def policy_of(config: PretrainedConfig) -> Policy:
    torch.manual_seed(0)
    return Policy(AutoModelForCausalLM.from_config(config).float(), MARKERS)


def written(folder: Path, config: PretrainedConfig, tokenizer: object) -> Path:
    """A folder with the config of a model, to be initialized at random, and a tokenizer."""
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- Noise.

NOISY = {
    "phimoe": {
        "num_local_experts": 4
    },  # jitter of input and router, and experts drawn by lot, all on by default
    "mixtral": {"num_local_experts": 4, "router_jitter_noise": 0.2},
    "opt": {"layerdrop": 0.5, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "biogpt": {"layerdrop": 0.5},
    "xglm": {"layerdrop": 0.5, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    "gpt2": {"resid_pdrop": 0.3, "attn_pdrop": 0.3, "n_embd": 32, "n_layer": 2, "n_head": 4},
}
TOKENS = torch.arange(5, 45)[None]


@pytest.mark.parametrize("name", NOISY)
def test_a_model_in_training_draws_nothing_by_chance(name: str):
    """Whatever the noise is called: trainer and sampler are one policy. Without `Policy.train` four
    draw layers or experts by lot."""
    policy = policy_of(config_of(name, **NOISY[name]))
    policy.eval()
    expected = policy.lm(input_ids=TOKENS).logits
    policy.train()
    assert policy.training
    before = torch.get_rng_state()
    for _ in range(8):
        assert torch.equal(policy.lm(input_ids=TOKENS).logits, expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert why_unsound(policy) is None


@pytest.mark.parametrize("name", ["qwen3", "phimoe"])
def test_activation_checkpointing_recomputes_and_changes_no_gradient(name: str):
    """In training mode the layers recompute, so that less is kept; their noise stays off."""
    config = config_of(name, **NOISY[name]) if name in NOISY else architecture(name)
    kept, gradients = [], []
    for checkpointing in (False, True):
        policy = policy_of(config)
        if checkpointing:
            policy.lm.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        policy.train()
        kept.append(0)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = (
                policy.lm.base_model(input_ids=TOKENS, use_cache=False)
                .last_hidden_state.square()
                .sum()
            )
        loss.backward()
        gradients.append(
            {
                key: parameter.grad
                for key, parameter in policy.lm.named_parameters()
                if parameter.grad is not None
            }
        )
    assert kept[1] < kept[0] / 4
    torch.testing.assert_close(gradients[1], gradients[0])


class Noisy(nn.Module):
    """A layer of a model with noise behind it that no mode turns off."""

    def __init__(self, layer: nn.Module, noise: object) -> None:
        super().__init__()
        self.layer, self.noise = layer, noise

    def forward(self, *arguments: object, **words: object) -> torch.Tensor:
        return self.layer(*arguments, **words) * self.noise()


PRIVATE = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "noise, refusal",
    [
        (lambda: 1 + 1e-9 * torch.rand(()), "draws random numbers"),
        (lambda: 1 + 1e-9 * random.random(), "draws random numbers"),
        (lambda: 1 + 1e-9 * np.random.uniform(), "draws random numbers"),
        (lambda: 1 + torch.rand((), generator=PRIVATE), "differ"),
    ],
)
def test_noise_that_no_mode_turns_off_is_found_however_small_and_changes_no_random_state(
    noise: object, refusal: str
):
    """The proof looks at what is drawn, so noise below rounding, and a layer that is dropped once
    in a thousand passes, are found too."""
    policy = tiny_policy()
    policy.lm.model.layers[1].mlp = Noisy(policy.lm.model.layers[1].mlp, noise)
    policy.train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    assert refusal in why_unsound(policy)
    assert policy.training
    assert (
        torch.equal(torch.get_rng_state(), states[0])
        and random.getstate() == states[1]
        and np.random.get_state()[1].tobytes() == states[2]
    )
    with pytest.raises(ConfigError, match=r"model.path: Qwen3ForCausalLM can not be trained: "):
        check_model(policy)


def test_what_one_rank_finds_all_ranks_refuse():
    with pytest.raises(ConfigError, match="can not be trained: another rank"):
        check_model(tiny_policy(), agree=lambda refusal: refusal or "another rank saw it")


# --- Logits and caches.


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_architectures_here_are_sound(name: str):
    assert why_unfit(architecture(name)) is None
    assert why_unsound(tiny_policy(name)) is None


def test_logits_that_are_transformed_otherwise_are_found():
    """By a factor that the config does not name."""
    scaled = tiny_policy()
    scaled.logit_scale = 1.1
    assert "`_logit_transform` in rlp/model/policy.py" in why_unsound(scaled)


def test_a_cache_whose_fork_mixes_rows_is_found(monkeypatch: pytest.MonkeyPatch):
    """Both rows of the cache hold a prefix; taken for each other they continue the wrong one."""
    policy = tiny_policy()
    assert why_unsound(policy) is None
    fork = Policy.fork
    monkeypatch.setattr(
        Policy, "fork", lambda self, cache, index: fork(self, cache, index.flip(0) * 0)
    )
    assert "forked" in why_unsound(policy)


XLSTM = {
    "hidden_size": 128,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "num_blocks": 2,
    "vocab_size": len(WORDS),
}
UNFIT = {
    "rwkv": ({}, "takes no cache"),
    "openai-gpt": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, "takes no cache"),
    "llama4_text": (
        {"intermediate_size_mlp": 64, "num_local_experts": 2, "head_dim": 8},
        "no body that runs without the LM head",
    ),
    "xlstm": (XLSTM, "cache .xLSTMCache. can not be forked"),
    "minimax": ({"num_local_experts": 4, "head_dim": 8}, "cache .MiniMaxCache. can not be forked"),
    "bert": ({}, "gives no cache back"),
    "recurrent_gemma": (
        {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 8, "lru_width": 32},
        "gives no cache back",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_without_what_rlp_needs_is_refused_before_a_folder_is_made(
    tmp_path: Path, tokenizer, corpus: Path, name: str
):
    fields, missing = UNFIT[name]
    model = written(tmp_path / "model", config_of(name, **fields), tokenizer)
    config = tiny_config(tmp_path / "run", model, corpus, model__init="random")
    with pytest.raises(
        ConfigError, match=rf"model.path: {name.replace('-', '.')} can not be trained: .*{missing}"
    ):
        RunSetup(config, warn=print)
    assert not (tmp_path / "run").exists()


# --- The longest sequence.


def format_of(
    *, instruction: int = 0, open_marker: int = 1, close: int = 1, horizon: int = 1
) -> ThoughtFormat:
    return ThoughtFormat(
        markers=Markers(open=tuple(range(2, 2 + open_marker)), close=(3,) * close),
        instruction=(7,) * instruction,
        begin=None,
        temperature=1.0,
        target_temperature=1.0,
        horizon=horizon,
    )


@pytest.mark.parametrize(
    "thought_format", [format_of(), format_of(instruction=3, open_marker=2, close=2, horizon=4)]
)
def test_the_longest_sequence_is_that_of_the_layouts(thought_format: ThoughtFormat):
    """A position at the end of the longest document, and a thought that the budget ends."""
    documents, budget = random_documents([9]), 6
    at = 9 - thought_format.horizon
    positions = Positions(
        document=np.array([0]), position=np.array([at]), target=documents[0].tokens[None, at:]
    )
    whole = torch.ones(1, 2, budget, dtype=torch.bool)
    thoughts = Thoughts(
        whole.long() * 9,
        whole,
        whole.float() * 0,
        whole.float() * 0,
        truncated=torch.ones(1, 2, dtype=torch.bool),
    )
    longest = sum(sequence_parts(thought_format, 9, budget).values())
    wanted = {"lm": True, "no_think": True, "device": torch.device("cpu")}
    assert (
        repeated_layout(documents, positions, thoughts, thought_format, **wanted).tokens.shape[1]
        == longest
    )
    assert (
        int(tree_layout(documents, positions, thoughts, thought_format, **wanted).position.max())
        + 1
        == longest
    )
    assert repeated_layout(
        documents, None, None, thought_format, **wanted | {"no_think": False}
    ).tokens.shape[1] == sum(sequence_parts(thought_format, 9, None).values())


def limited(tmp_path: Path, tokenizer: object, corpus: Path, **overrides: object) -> Config:
    """A run of a GPT-NeoX that reads 32 positions."""
    config = config_of("gpt_neox", max_position_embeddings=32)
    return tiny_config(
        tmp_path / "run",
        written(tmp_path / "model", config, tokenizer),
        corpus,
        model__init="random",
        **overrides,
    )


def test_settings_beyond_what_the_model_reads_are_refused_with_settings_that_fit(
    tmp_path: Path, tokenizer, corpus: Path, ranks
):
    """30 + 1 + 5 + 1 - 1 tokens are 4 too many; in a plan as at the start; either advice is
    taken."""
    beyond = limited(tmp_path, tokenizer, corpus, data__max_document_tokens=30)
    words = (
        r"longest sequence has 36 tokens \(document 30 \+ open marker 1 \+ thought 5 \+ close"
        r" marker 1 \+ last target \(not read\) -1\), and the model reads at most 32 "
        r"\(max_position_embeddings in its config.json\). Write data.max_document_tokens=26 or"
        r" thought.max_thought_tokens=1. Its positions are rotary"
    )
    with pytest.raises(ConfigError, match=words):
        Trainer(beyond, ranks=ranks).plan()
    with pytest.raises(ConfigError, match=words):
        PanelSetup(beyond, warn=print)
    for fitting in (
        {"data__max_document_tokens": 26},
        {"data__max_document_tokens": 30, "thought__max_thought_tokens": 1},
    ):
        RunSetup(limited(tmp_path, tokenizer, corpus, **fitting), warn=print)
    with pytest.raises(
        ConfigError,
        match=(
            r"Write smaller values of data.max_document_tokens and thought.max_thought_tokens:"
            r" together 136 less"
        ),
    ):
        RunSetup(
            limited(
                tmp_path,
                tokenizer,
                corpus,
                data__max_document_tokens=100,
                thought__max_thought_tokens=67,
            ),
            warn=print,
        )


def test_without_thoughts_the_document_alone_has_to_fit(tmp_path: Path, tokenizer, corpus: Path):
    """And with a held-out panel, on which thoughts are sampled, it does not."""
    plain = {"objective__policy_weight": 0.0, "objective__lm_weight": 1.0}
    RunSetup(
        limited(tmp_path, tokenizer, corpus, **plain, data__max_document_tokens=32), warn=print
    )
    with pytest.raises(ConfigError, match="Write data.max_document_tokens=32. "):
        RunSetup(
            limited(tmp_path, tokenizer, corpus, **plain, data__max_document_tokens=33), warn=print
        )
    with pytest.raises(ConfigError, match="longest sequence has 38 tokens"):
        RunSetup(
            limited(
                tmp_path,
                tokenizer,
                corpus,
                **plain,
                data__max_document_tokens=32,
                data__held_out=json.dumps([str(corpus)]),
            ),
            warn=print,
        )


@pytest.mark.parametrize(
    "name, fields, limit",
    [
        ("gpt2", {"n_positions": 64}, (64, "n_positions", False)),
        (
            "opt",
            {"max_position_embeddings": 64, "ffn_dim": 64},
            (64, "max_position_embeddings", False),
        ),
        ("mpt", {"max_seq_len": 64}, (64, "max_seq_len", False)),
        ("llama", {"max_position_embeddings": 64}, (64, "max_position_embeddings", True)),
        (
            "llama",
            {
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "rope_theta": 1e4,
                },
            },
            (256, "max_position_embeddings", True),
        ),
        (
            "mistral",
            {"max_position_embeddings": 64, "sliding_window": 8},
            (64, "max_position_embeddings", True),
        ),
        ("mamba", {}, None),
        ("recurrent_gemma", {}, None),
        ("bloom", {}, None),
    ],
)
def test_the_limit_is_the_one_that_the_config_names(name: str, fields: dict, limit: tuple | None):
    """By its own key. Rope scaling raises it; a sliding window is none."""
    found = context_limit(config_of(name, **fields))
    assert (found and (found.tokens, found.key, found.rotary)) == limit


# --- What can not be counted.

EXPERTS = "transformer.blocks.*.ffn.experts.mlp.w1"
DBRX = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 4096,
    "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
    "ffn_config": {
        "ffn_hidden_size": 16,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_jitter_eps": 0.1,
    },
}


def test_a_model_whose_flops_are_not_all_known_runs_and_is_not_matched_by_them(
    tmp_path: Path, tokenizer, corpus: Path, ranks
):
    """DBRX: its plan, ledger and summary name what they leave out; a run is matched by tokens and
    not by FLOPs."""
    model = written(tmp_path / "model", config_of("dbrx", **DBRX), tokenizer)
    config = tiny_config(tmp_path / "run", model, corpus, model__init="random", budget__steps=1)
    assert (
        f"counted without {EXPERTS}, whose cost is not known" in Trainer(config, ranks=ranks).plan()
    )
    assert train(config, ranks) == DONE
    for name in ("ledger.json", "summary.json"):
        assert EXPERTS in json.loads((tmp_path / "run" / name).read_text())["counted_without"]
    run = open_run_folder(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"counted without transformer.*Write --by tokens or --by seconds"
    ):
        write_arm(run, "cpt", "flops", tmp_path / "flops.yaml", None, [])
    write_arm(run, "cpt", "tokens", tmp_path / "tokens.yaml", None, [])


# --- Configs and folders that are none.


@pytest.mark.parametrize(
    "name, fields, words",
    [
        ("llama", {"num_attention_heads": 0}, "has num_attention_heads=0; expected at least 1"),
        ("qwen3", {"num_hidden_layers": 0}, "has num_hidden_layers=0; expected at least 1"),
        ("qwen3", {"hidden_size": -32}, "has hidden_size=-32; expected at least 1"),
        (
            "qwen3",
            {"max_position_embeddings": 0},
            "has max_position_embeddings=0; expected at least 1",
        ),
        (
            "qwen3",
            {"num_key_value_heads": 3},
            "has num_attention_heads=4 and num_key_value_heads=3",
        ),
        ("qwen3", {"vocab_size": 20}, "48 tokens, but the embedding of .* has 20 rows"),
        (
            "qwen3",
            {"num_attention_heads": "four"},
            "describes no model: .*'num_attention_heads' expected int, got str",
        ),
        (
            "gpt_neox",
            {"num_attention_heads": 5},
            "describes no model: .*not divisible by the number of attention heads",
        ),
    ],
)
def test_impossible_numbers_in_a_config_are_named(
    tmp_path: Path, tokenizer, corpus: Path, name: str, fields: dict, words: str
):
    """As they stand in the file: transformers itself divides by some of them."""
    model = written(tmp_path / "model", architecture(name), tokenizer)
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ConfigError, match=rf"^model.(path|tokenizer): .*{words}"):
        RunSetup(tiny_config(tmp_path / "run", model, corpus, model__init="random"), warn=print)


def test_a_folder_without_a_part_is_told_by_that_part(tmp_path: Path, tokenizer, corpus: Path):
    """No tokenizer, no config, no folder, and a folder where a file should be."""
    model = written(tmp_path / "model", architecture("qwen3"), tokenizer)
    (alone := tmp_path / "alone").mkdir()

    def refused(words: str, path: Path = model, **overrides: object) -> None:
        with pytest.raises(ConfigError, match=words):
            RunSetup(
                tiny_config(tmp_path / "run", path, corpus, model__init="random", **overrides),
                warn=print,
            )

    refused(r"model.path: no config.json in '.*alone'", alone)
    architecture("qwen3").save_pretrained(alone)
    refused(
        r"model.tokenizer: '.*alone' holds a model's config and no tokenizer \(none of"
        r" .*tokenizer.json.*Write model.tokenizer=",
        alone,
    )
    RunSetup(
        tiny_config(
            tmp_path / "run", alone, corpus, model__init="random", model__tokenizer=str(model)
        ),
        warn=print,
    )
    refused("model.path: there is no file or folder '.*nowhere'", tmp_path / "nowhere")
    refused(
        "model.tokenizer: there is no file or folder '.*nowhere'",
        model__tokenizer=str(tmp_path / "nowhere"),
    )
    refused(
        "thought.instruction_file: no file at '.*alone', which is a folder",
        thought__instruction_file=str(alone),
    )


# --- A bias of the head.


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_with_a_bias_trains_alike_whole_and_sharded(
    tmp_path: Path, tokenizer, corpus: Path, ranks, tied: bool
):
    """Phi: its bias is gathered with its head, moves in the update, and is exported."""
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)
    policy = policy_of(
        config_of(
            "phi", initializer_range=0.3, max_position_embeddings=4096, tie_word_embeddings=tied
        )
    )
    policy.lm.save_pretrained(model)
    biases = []
    for stage in (0, 3):
        run = tiny_config(
            tmp_path / f"run{stage}",
            model,
            corpus,
            budget__steps=2,
            engine__zero_stage=stage,
            engine__logprob_form="chunked",
        )
        assert train(run, ranks) == DONE
        biases.append(
            AutoModelForCausalLM.from_pretrained(tmp_path / f"run{stage}" / "export")
            .get_output_embeddings()
            .bias.detach()
        )
    torch.testing.assert_close(biases[1], biases[0], rtol=1e-4, atol=1e-4)
    assert (biases[0] - policy.head_bias.detach()).abs().max() > 1e-3


# --- What can not be begun row by row.


def test_a_run_whose_thoughts_begin_together_says_so_once(
    tmp_path: Path, tokenizer, corpus: Path, ranks, capsys, monkeypatch: pytest.MonkeyPatch
):
    """And makes its steps."""
    monkeypatch.delitem(cached_rows.KNOWN, DynamicLayer)
    model = written(tmp_path / "model", config_of("phi"), tokenizer)
    run = tiny_config(
        tmp_path / "run",
        model,
        corpus,
        model__init="random",
        budget__steps=1,
        data__max_document_tokens=32,
    )
    assert train(run, ranks) == DONE
    said = (
        "thoughts are sampled in whole blocks, none begins before all have ended: its cache holds"
        " a DynamicLayer, which is not known row by row"
    )
    assert capsys.readouterr().out.count(said) == 1
