"""A config is read strictly: what is unknown, impossible or malformed is refused with the key, the
value and the rule."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlp.config import Config, ConfigError, known_keys, load_config, to_yaml
from tests import REPOSITORY
from tests.source_files import is_made

BASE = (
    "run: {dir: runs/x}\nmodel: {path: somewhere}\ndata: {train: [x.jsonl]}\nbudget: {steps: 1}\n"
)
LEAVES = [key for key in known_keys() if "." in key]


def read(folder: Path, *overrides: str, text: str = BASE) -> Config:
    path = folder / "config.yaml"
    path.write_text(text)
    return load_config(path, list(overrides))


def refusal(folder: Path, *overrides: str, text: str = BASE) -> str:
    """The message that a config is refused with."""
    with pytest.raises(ConfigError) as refused:
        read(folder, *overrides, text=text)
    return str(refused.value)


TWINS = [
    {"thought.top_p", "thought.top_k"},
    {"optim.beta1", "optim.beta2"},
    {"objective.kl_weight", "objective.lm_weight"},
]
"""Keys one letter apart: a mistake in that letter may have meant either."""


# What the reader sees of a typing mistake: the last letter forgotten, two letters swapped, one
# doubled.
@pytest.mark.parametrize("key", LEAVES)
def test_a_misspelt_key_is_refused_with_the_right_one(tmp_path: Path, key: str):
    section, _, name = key.partition(".")
    for wrong in (name[:-1], name[1] + name[0] + name[2:], name + name[-1]):
        if f"{section}.{wrong}" in LEAVES:
            continue
        message = refusal(tmp_path, f"{section}.{wrong}=1")
        meant = [other for other in LEAVES if other == key or {other, key} in TWINS]
        assert message in [
            f"command line: unknown config key {section}.{wrong}. Did you mean {other}?"
            for other in meant
        ]


@pytest.mark.parametrize("key", LEAVES)
def test_a_key_without_its_section_is_refused_with_the_full_one(tmp_path: Path, key: str):
    """`learning_rate: 1e-6` at the top of a file means optim.learning_rate."""
    name = key.partition(".")[2]
    if name in [section for section in known_keys() if "." not in section]:
        return
    message = refusal(tmp_path, text=BASE + f"{name}: 1\n")
    assert f"unknown config key {name}." in message
    assert key in re.findall(r"\w+\.\w+", message.partition("Did you mean")[2])


def test_a_key_in_another_section_is_found(tmp_path: Path):
    assert refusal(tmp_path, "thought.horizon=3").endswith("Did you mean target.horizon?")
    assert refusal(tmp_path, "thought.sampling_rows=3").endswith("Its name is sampling.slots.")
    assert refusal(tmp_path, text=BASE + "optm: {learning_rate: 1e-6}\n").endswith(
        "Did you mean optim.learning_rate?"
    )


def test_a_misspelt_section_is_refused_with_the_right_one(tmp_path: Path):
    assert refusal(tmp_path, text=BASE + "tought: {}\n").endswith("Did you mean thought?")


def test_a_key_like_no_other_is_answered_with_what_there_is(tmp_path: Path):
    """Never with a wrong guess: `lr` resembles beta1 more than learning_rate."""
    message = refusal(tmp_path, "optim.lr=3")
    assert "Did you mean" not in message and "optim.learning_rate" in message
    assert "The sections are run, model, data" in refusal(tmp_path, "zzz=3")


def test_the_message_says_where_an_unknown_key_stands(tmp_path: Path):
    assert refusal(tmp_path, "thought.group_sise=3").startswith("command line:")
    assert refusal(tmp_path, text=BASE + "thought: {group_sise: 3}\n").startswith(
        str(tmp_path / "config.yaml")
    )


IMPOSSIBLE = [  # (overrides, the key that is named, the value that is shown, a part of the rule)
    ("run.seed=-1", "run.seed", "-1", "at least 0"),
    ("run.seed=18446744073709551616", "run.seed", "18446744073709551616", "below 2 ** 63"),
    ("run.resume=''", "run.resume", "''", "never, auto or the path"),
    ("model.init=zeros", "model.init", "'zeros'", "one of pretrained, random"),
    ("model.attention=fast", "model.attention", "'fast'", "one of auto, sdpa"),
    ("data.train=[]", "data.train", "[]", "at least one file"),
    ("engine.logprob_form=fused", "engine.logprob_form", "'fused'", "one of auto, plain, chunked"),
    ("engine.layout=rows", "engine.layout", "'rows'", "one of auto, repeated, tree"),
    ("optim.thoughts_per_forward=0", "optim.thoughts_per_forward", "0", "at least 1"),
    ("optim.updates_per_rollout=0", "optim.updates_per_rollout", "0", "at least 1"),
    ("data.format=xlsx", "data.format", "'xlsx'", "one of auto, jsonl"),
    ("data.max_document_tokens=1", "data.max_document_tokens", "1", "at least 2"),
    ("data.delimiter=ab", "data.delimiter", "ab", "one ASCII character"),
    ("data.delimiter='\"'", "data.delimiter", '"', "one ASCII character"),
    ("data.max_bad_fraction=1.5", "data.max_bad_fraction", "1.5", "from 0 to 1"),
    ("data.max_bad_fraction=-0.1", "data.max_bad_fraction", "-0.1", "from 0 to 1"),
    ("data.max_bad_fraction=.nan", "data.max_bad_fraction", "nan", "from 0 to 1"),
    ("data.template=text", "data.template", "'text'", "at least one field"),
    ("data.template='{'", "data.template", "'{'", "at least one field"),
    ("data.template='{{text}}'", "data.template", "'{{text}}'", "at least one field"),
    ("data.template='{}'", "data.template", "'{}'", "at least one field"),
    ("data.template='{text!r}'", "data.template", "'{text!r}'", "nothing else in them"),
    ("data.template='{text:>9}'", "data.template", "'{text:>9}'", "nothing else in them"),
    ("position.per_document=0", "position.per_document", "0", "or all"),
    ("position.per_document=some", "position.per_document", "'some'", "or all"),
    ("position.selector=random", "position.selector", "'random'", "one of uniform, marker"),
    ("position.selector=marker", "position.marker", "None", "only with it"),
    ("position.marker='Answer:'", "position.marker", "'Answer:'", "only with it"),
    ("position.min_prefix_tokens=0", "position.min_prefix_tokens", "0", "at least 1"),
    ("thought.group_size=1", "thought.group_size", "1", "eq. 7"),
    ("thought.max_thought_tokens=0", "thought.max_thought_tokens", "0", "at least 1"),
    ("thought.temperature=0", "thought.temperature", "0.0", "above 0"),
    ("thought.temperature=-1", "thought.temperature", "-1.0", "above 0"),
    ("thought.temperature=.inf", "thought.temperature", "inf", "finite"),
    ("thought.temperature=.nan", "thought.temperature", "nan", "above 0"),
    ("thought.open_marker=''", "thought.open_marker", "''", "empty"),
    ("thought.close_marker=''", "thought.close_marker", "''", "empty"),
    ("sampling.slots=0", "sampling.slots", "0", "at least 1"),
    ("thought.top_p=0.9", "thought.top_p", "0.9", "write thought.top_p=1.0"),
    ("thought.top_k=50", "thought.top_k", "50", "write thought.top_k=0"),
    ("target.horizon=0", "target.horizon", "0", "at least 1"),
    ("target.temperature=0", "target.temperature", "0.0", "above 0"),
    ("objective.policy_weight=-1", "objective.policy_weight", "-1.0", "at least 0"),
    ("objective.lm_weight=-0.1", "objective.lm_weight", "-0.1", "at least 0"),
    ("objective.lm_weight=.inf", "objective.lm_weight", "inf", "finite"),
    ("objective.kl_weight=.nan", "objective.kl_weight", "nan", "at least 0"),
    (
        "objective.policy_weight=0 objective.lm_weight=0",
        "objective",
        "[0.0, 0.0, 0.0, 0.0]",
        "a weight above 0",
    ),
    ("objective.clip_low=1", "objective.clip_low", "1.0", "1 - clip_low"),
    ("objective.clip_high=-0.2", "objective.clip_high", "-0.2", "at least 0"),
    ("baseline.kind=mean", "baseline.kind", "'mean'", "one of ema, frozen, self, none"),
    ("baseline.ema_decay=1", "baseline.ema_decay", "1.0", "below 1"),
    ("baseline.every_n_steps=0", "baseline.every_n_steps", "0", "at least 1"),
    ("optim.batch_size=0", "optim.batch_size", "0", "at least 1"),
    ("optim.micro_batch_size=0", "optim.micro_batch_size", "0", "at least 1"),
    ("optim.learning_rate=-1e-6", "optim.learning_rate", "-1e-06", "at least 0"),
    ("optim.learning_rate=.inf", "optim.learning_rate", "inf", "finite"),
    ("optim.schedule=step", "optim.schedule", "'step'", "one of constant, cosine, linear"),
    ("optim.warmup_steps=-1", "optim.warmup_steps", "-1", "at least 0"),
    ("optim.final_fraction=2", "optim.final_fraction", "2.0", "from 0 to 1"),
    ("optim.beta1=1", "optim.beta1", "1.0", "below 1"),
    ("optim.beta2=-0.1", "optim.beta2", "-0.1", "at least 0"),
    ("optim.epsilon=0", "optim.epsilon", "0.0", "above 0"),
    ("optim.weight_decay=-1", "optim.weight_decay", "-1.0", "at least 0"),
    ("optim.grad_clip=-1", "optim.grad_clip", "-1.0", "at least 0"),
    ("engine.zero_stage=4", "engine.zero_stage", "4", "0, 1, 2 or 3"),
    ("engine.dtype=float16", "engine.dtype", "'float16'", "one of auto, float32, bfloat16"),
    ("engine.generation=vllm", "engine.generation", "'vllm'", "one of gathered, synced"),
    (
        "engine.zero_stage=0 engine.dtype=bfloat16",
        "engine.zero_stage",
        "0",
        "write engine.zero_stage=1",
    ),
    (
        "engine.zero_stage=0 engine.offload_optimizer=true",
        "engine.offload_optimizer",
        "True",
        "at least 1",
    ),
    (
        "budget.steps=null",
        "budget",
        "'steps': None",
        "at least one of steps, tokens, flops, paper_flops, seconds",
    ),
    ("budget.steps=0", "budget.steps", "0", "above 0"),
    ("budget.tokens=-5", "budget.tokens", "-5", "above 0"),
    ("budget.flops=.inf", "budget.flops", "inf", "finite"),
    ("evaluation.panel_positions=0", "evaluation.panel_positions", "0", "at least 1"),
    ("evaluation.thoughts_per_position=0", "evaluation.thoughts_per_position", "0", "at least 1"),
    ("evaluation.every_n_steps=-1", "evaluation.every_n_steps", "-1", "at least 0"),
    ("evaluation.batch_size=0", "evaluation.batch_size", "0", "at least 1"),
    ("checkpoint.every_n_steps=-1", "checkpoint.every_n_steps", "-1", "at least 0"),
    ("checkpoint.keep=0", "checkpoint.keep", "0", "at least 1"),
    ("logging.every_n_steps=0", "logging.every_n_steps", "0", "at least 1"),
    ("logging.thoughts=-1", "logging.thoughts", "-1", "at least 0"),
    ("logging.wandb=always", "logging.wandb", "'always'", "one of disabled, offline, online"),
    (
        "data.max_document_tokens=8 target.horizon=8",
        "data.max_document_tokens",
        "8",
        "position.min_prefix_tokens + target.horizon = 9",
    ),
    (
        "data.max_document_tokens=8 position.min_prefix_tokens=8",
        "data.max_document_tokens",
        "8",
        "= 9",
    ),
]


@pytest.mark.parametrize(
    "overrides, key, value, rule", IMPOSSIBLE, ids=[row[0] for row in IMPOSSIBLE]
)
def test_an_impossible_value_is_refused_by_key_value_and_rule(
    tmp_path: Path, overrides: str, key: str, value: str, rule: str
):
    """Each rule stands where the field is defined; its message starts with the key and ends with
    the value."""
    message = refusal(tmp_path, *overrides.split(" "))
    assert message.startswith(f"{key} ") and rule in message, message
    assert value in message.rpartition(", got ")[2], message


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1.5",
        "thought.group_size=true",
        "thought.group_size=four",
        "position.per_document=true",
        "position.per_document=1.5",
        "data.shuffle=maybe",
        "budget.steps=1e3",
        "data.train=x.jsonl",
        "optim.schedule=[cosine]",
        "run.dir=",
    ],
)
def test_a_value_of_another_type_is_refused_with_its_key(tmp_path: Path, override: str):
    assert override.partition("=")[0] in refusal(tmp_path, override)


@pytest.mark.parametrize(
    "overrides",
    [
        "thought.group_size=2",
        "position.per_document=all",
        "position.selector=marker position.marker='Answer:'",
        "data.max_document_tokens=2",
        "objective.clip_low=0",
        "optim.learning_rate=0",
        "optim.grad_clip=0",
        "budget.steps=null budget.flops=1e18",
        "engine.zero_stage=0 engine.dtype=float32",
        "engine.zero_stage=1 engine.dtype=bfloat16",
        "data.max_bad_fraction=0",
        "data.max_bad_fraction=1",
        "run.seed=0",
    ],
)
def test_the_last_possible_value_is_accepted(tmp_path: Path, overrides: str):
    read(tmp_path, *overrides.split(" "))


def test_a_number_in_scientific_notation_is_a_number(tmp_path: Path):
    """YAML 1.1 reads 1e-5 as text; here it is a float, in the file and on the command line."""
    assert read(tmp_path, "optim.learning_rate=1e-5").optim.learning_rate == 0.00001
    assert (
        read(tmp_path, text=BASE + "optim: {learning_rate: 1e-5}\n").optim.learning_rate == 0.00001
    )
    assert read(tmp_path, "budget.flops=3e18").budget.flops == 3e18


@pytest.mark.parametrize("graph", ["on", "off", "auto"])
def test_on_and_off_are_words(tmp_path: Path, graph: str):
    """YAML reads them as true and false, in a file, an override and a resolved config."""
    in_a_file = read(tmp_path, text=BASE + f"sampling: {{graph: {graph}}}\n")
    config = read(tmp_path, f"sampling.graph={graph}")
    assert in_a_file.sampling.graph == config.sampling.graph == graph
    assert read(tmp_path, text=to_yaml(config)).sampling.graph == graph


def test_overrides_win_over_the_file_and_the_last_over_the_first(tmp_path: Path):
    text = BASE + "thought: {group_size: 3, temperature: 0.5}\n"
    config = read(
        tmp_path,
        "thought.group_size=8",
        "thought.group_size=9",
        "data.train=[a.jsonl, b.jsonl]",
        "data.template='{q}: {a}'",
        "model.tokenizer=null",
        text=text,
    )
    assert (config.thought.group_size, config.thought.temperature) == (9, 0.5)
    assert config.data.train == ["a.jsonl", "b.jsonl"]
    assert config.data.template == "{q}: {a}"
    assert config.model.tokenizer is None
    assert read(tmp_path, text=text).thought.group_size == 3


@pytest.mark.parametrize("override", ["thought.group_size", "nonsense", ""])
def test_an_override_without_a_value_is_refused(tmp_path: Path, override: str):
    assert "Write section.key=value, such as thought.group_size=8" in refusal(tmp_path, override)


@pytest.mark.parametrize(
    "override", ["data.template={text} and more", "data.template={", "data.train=[a"]
)
def test_an_override_that_is_no_yaml_is_refused_with_quotes_to_write(tmp_path: Path, override: str):
    """Braces are YAML's own: without quotes they do not reach the config."""
    message = refusal(tmp_path, override)
    assert override in message and "in quotes" in message


@pytest.mark.parametrize("content", ["thought: 3\n", "thought:\n", "thought: [1, 2]\n"])
def test_a_section_that_holds_no_keys_is_refused(tmp_path: Path, content: str):
    assert "thought is a section" in refusal(tmp_path, text=BASE + content)


def test_a_dotted_key_in_the_file_is_refused(tmp_path: Path):
    """Dots are for the command line."""
    assert "thought.group_size" in refusal(tmp_path, text=BASE + "thought.group_size: 8\n")


@pytest.mark.parametrize(
    "text, part",
    [
        ("a: [\n", "is not a YAML config"),
        ("\tx: 1\n", "is not a YAML config"),
        (BASE + "run: {seed: 1}\n", "duplicate key run"),
        ("- a\n- b\n", "must hold sections such as `model:` and `data:`, got list"),
        ("!!python/object/apply:os.system ['true']\n", "is not a YAML config"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, part: str):
    message = refusal(tmp_path, text=text)
    assert part in message and str(tmp_path / "config.yaml") in message


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not a YAML config"):
        load_config(path)


@pytest.mark.parametrize("name", ["absent.yaml", ""])
def test_a_missing_file_is_refused_with_what_to_write(tmp_path: Path, name: str):
    """Also where the path is a folder."""
    with pytest.raises(
        ConfigError,
        match=r"no config file at .*Write the path of a YAML file, such as configs/quickstart.yaml",
    ):
        load_config(tmp_path / name)


@pytest.mark.parametrize(
    "text, key",
    [
        ("", "run.dir"),
        (BASE.replace("dir: runs/x", "seed: 1"), "run.dir"),
        (BASE.replace("path: somewhere", "init: random"), "model.path"),
    ],
)
def test_a_needed_value_that_is_missing_is_named(tmp_path: Path, text: str, key: str):
    assert f"{key} has no value. Write {key}=VALUE" in refusal(tmp_path, text=text)


def test_the_resolved_config_reads_back_as_itself(tmp_path: Path):
    """Every key is written out, so a run folder says what ran even after a default changes."""
    config = read(
        tmp_path,
        "optim.learning_rate=1e-5",
        "position.per_document=all",
        'data.template="{question}\\n{answer}"',
        "thought.open_marker='<t: #1>'",
        "budget.flops=1e18",
        "data.held_out=[]",
        "model.tokenizer='null'",
        "run.seed=9223372036854775807",
    )
    text = to_yaml(config)
    assert config.data.template == "{question}\n{answer}" and config.model.tokenizer == "null"
    assert read(tmp_path, text=text) == config
    assert to_yaml(read(tmp_path, text=text)) == text
    for key in LEAVES:
        assert re.search(rf"^  {key.partition('.')[2]}:", text, re.MULTILINE), key


CONFIGS = sorted(
    path
    for path in (REPOSITORY / "configs").glob("*.yaml")
    if not path.stem.startswith("benchmarks")
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_committed_config_loads(path: Path):
    config = load_config(path)
    assert read_back(config) == config


TOLD = [
    path
    for pattern in ("*.md", "*.cff", "Makefile", "configs/*", "docs/**/*", "experiments/**/*")
    for path in sorted(REPOSITORY.glob(pattern))
    if path.suffix in ("", ".md", ".yaml", ".py", ".cff") and path.is_file() and not is_made(path)
]

LEADS_ELSEWHERE = re.compile(
    r"(?<![\w.}])/work/|(?<![\w.])/(?:home|root|mnt|tmp|srv|Users)/|~/|(?<![\w./])\.\./"
)
"""`{stage}/work/` is the folder of a stage."""


def paths_outside(text: str, folder: Path) -> list[str]:
    """Lines of a text in which a path leads out of the repository.

    Args:
        folder: where the paths of the text begin.
    """
    return [
        line
        for line in text.splitlines()
        if (found := LEADS_ELSEWHERE.search(line))
        and not (
            found[0] == "../"
            and (folder / re.match(r"[./\w-]+", line[found.start() :])[0])
            .resolve()
            .is_relative_to(REPOSITORY)
        )
    ]


@pytest.mark.parametrize("path", TOLD, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_config_experiment_or_page_names_a_path_outside_the_repository(path: Path):
    """It would be somebody's own machine. Links of a page begin at the page."""
    assert (
        paths_outside(path.read_text(), path.parent if path.suffix == ".md" else REPOSITORY) == []
    )


def test_the_checker_sees_a_path_outside():
    for text in (
        "data: ../../shared/x.jsonl",
        "see ~/data",
        "at /home/me/x",
        "[x](../../y.md)",
        "{a}/tmp/b",
    ):
        assert paths_outside(text, REPOSITORY / "docs") == [text]
    inside = "[x](../README.md), configs/x.yaml, 1/2, {stage}/work/documents.jsonl"
    assert paths_outside(inside, REPOSITORY / "docs") == []


def read_back(config: Config) -> Config:
    """A config written and read once."""
    return OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(to_yaml(config)))
    )


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem.endswith("_paper")], ids=lambda path: path.stem
)
def test_paper_configs_say_what_the_paper_says(path: Path):
    """Section 9: 16 rollouts, completion length 2048, temperature 0.7, batch 512, learning rate
    1e-6, EMA 0.999, KL 0, one random position."""
    config = load_config(path)
    assert (
        config.thought.group_size,
        config.thought.max_thought_tokens,
        config.thought.temperature,
    ) == (16, 2048, 0.7)
    assert (config.optim.batch_size, config.optim.learning_rate, config.optim.schedule) == (
        512,
        1e-6,
        "constant",
    )
    assert (config.baseline.kind, config.baseline.ema_decay) == ("ema", 0.999)
    assert (
        config.objective.lm_weight,
        config.objective.kl_weight,
        config.objective.predictor_weight,
    ) == (0.0, 0.0, 0.0)
    assert (
        config.position.per_document,
        config.position.selector,
        config.target.horizon,
        config.target.temperature,
    ) == (1, "uniform", 1, 1.0)


def test_one_file_where_a_list_is_expected_is_said_with_its_brackets(tmp_path: Path):
    assert "data.train: must be a list. Write it in brackets, as in data.train=[VALUE]" in refusal(
        tmp_path, "data.train=corpus.jsonl"
    )
