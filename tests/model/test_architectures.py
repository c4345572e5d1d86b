"""Every causal language model that transformers can build: a tiny one of each either makes a step
or is refused with one sentence.

Takes minutes: `make test-all`.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlp.config import ConfigError
from rlp.process.exit_codes import DONE
from tests.tiny_models import MAX_PARAMETERS, tiny
from tests.training import tiny_config, train


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_causal_language_model_makes_a_step_or_is_refused_with_a_sentence(
    tmp_path: Path, tokenizer, corpus: Path, ranks, name: str
):
    """And where it is refused there is no run folder."""
    try:
        config = tiny(name)
        with torch.device("meta"):
            parameters = sum(
                p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()
            )
    except Exception as error:  # of any type: what a config of these fields lacks
        pytest.skip(f"no tiny {name}: {error}")
    if parameters > MAX_PARAMETERS:
        pytest.skip(f"no tiny {name}: {parameters:,} parameters")
    config.save_pretrained(tmp_path / "model")
    # Beside a config of Qwen2, transformers opens any tokenizer as Qwen2's own.
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run = tiny_config(
        tmp_path / "run",
        tmp_path / "model",
        corpus,
        model__tokenizer=tmp_path / "tokenizer",
        model__init="random",
        budget__steps=1,
        data__max_document_tokens=32,
    )
    try:
        assert train(run, ranks) == DONE
    except ConfigError as refusal:
        print(name, refusal)
        assert "\n" not in str(refusal) and str(refusal).startswith(
            ("model.path: ", "model.tokenizer: ")
        )
        assert not (tmp_path / "run").exists()
