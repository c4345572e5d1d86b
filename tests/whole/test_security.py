"""One attack for each promise of `docs/threat_model.md`: what a stranger wrote runs nothing, reads
nothing else, and hides nothing."""

import ast
import json
import os
import pickle
import re
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from rlp import train as program
from rlp.cli import main as rlp_command
from rlp.compare.answers import same_answer
from rlp.compare.tasks import Benchmark, load_benchmarks, load_tasks
from rlp.config import (
    BudgetConfig,
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RunConfig,
    load_config,
    without_secrets,
)
from rlp.data.errors import DataError
from rlp.data.sources import open_rows
from rlp.model.loading import load_policy
from rlp.model.tokenizer import open_tokenizer
from rlp.process.environment import environment
from rlp.process.exit_codes import DONE
from tests import REPOSITORY
from tests.data.reading import GOOD, Reader, write
from tests.measure.run_folders import make_run
from tests.source_files import PROGRAM
from tests.tiny_models import tiny_policy, word_tokenizer
from tests.training import TINY
from tests.whole.strangers import BASE

pytestmark = pytest.mark.usefixtures("unpacked")


TOKEN = "hf_" + "aBcD1234" * 4
"""What an access token of the Hub looks like."""

# --- Models.


class Attack:
    """A model folder with something in it that, were it run, would leave a mark."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder / "model", folder / "mark"
        tiny_policy().lm.save_pretrained(self.folder)
        word_tokenizer().save_pretrained(self.folder)

    def change(self, name: str, **values: object) -> None:
        path = self.folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def write_code(self) -> None:
        (self.folder / "evil.py").write_text(
            f"open({str(self.mark)!r}, 'w').close()\nfrom transformers import *\nclass"
            " C(Qwen3Config): pass\nclass M(Qwen3ForCausalLM): pass\nclass"
            " T(PreTrainedTokenizerFast): pass\n"
        )

    def write_pickle(self, name: str) -> None:
        mark = self.mark

        class Payload:
            def __reduce__(self) -> tuple:
                return os.system, (f"touch {mark}",)

        (self.folder / name).write_bytes(pickle.dumps(Payload()))

    def load(self) -> None:
        config = Config(
            run=RunConfig(dir="x"),
            model=ModelConfig(path=str(self.folder)),
            data=DataConfig(train=["x"]),
            budget=BudgetConfig(steps=1),
            engine=EngineConfig(layout="repeated"),
        )
        load_policy(config, *open_tokenizer(config), torch.float32, torch.device("cpu"))


@pytest.fixture
def attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attack:
    monkeypatch.setattr(
        "builtins.input", lambda prompt="": "y"
    )  # transformers asks, and somebody may say yes
    return Attack(tmp_path)


def test_code_in_a_model_folder_is_not_run(attack: Attack):
    """With a known architecture its own code is left alone; with an unknown one the model is
    refused."""
    attack.write_code()
    attack.change(
        "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    )
    attack.change("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    attack.load()
    attack.change("config.json", model_type="evil")
    with pytest.raises(ConfigError, match="contains custom code"):
        attack.load()
    assert not attack.mark.exists()


def test_a_model_of_pickles_is_refused_unopened(attack: Attack):
    """In the place of safetensors, and named by an index of safetensors."""
    (attack.folder / "model.safetensors").unlink()
    attack.write_pickle("pytorch_model.bin")
    with pytest.raises(
        ConfigError, match="could not be loaded: Error no file named model.safetensors"
    ):
        attack.load()
    (attack.folder / "model.safetensors.index.json").write_text(
        json.dumps(
            {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "pytorch_model.bin"}}
        )
    )
    with pytest.raises(
        ConfigError,
        match="names 'pytorch_model.bin'; expected safetensors files in the same folder",
    ):
        attack.load()
    assert not attack.mark.exists()


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", b"[1]"),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "qwen3", "hidden_size": "x"}'),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"["),
        ("model.safetensors", b"\xff" * 99),
        ("model.safetensors", b""),
        ("model.safetensors.index.json", b"[]"),
    ],
)
def test_a_damaged_model_folder_is_one_message(attack: Attack, name: str, content: bytes):
    if name == "model.safetensors.index.json":
        (attack.folder / "model.safetensors").unlink()
    (attack.folder / name).write_bytes(content)
    with pytest.raises(
        ConfigError,
        match=r"model\.(path|tokenizer): .*Write a folder that holds a Hugging Face model",
    ):
        attack.load()


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_load_says_that_remote_code_is_off(path: Path):
    """Where nothing is said, transformers asks on the terminal whether to run it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("from_pretrained", "from_config")
            and path.parent == REPOSITORY / "rlp"
        ):
            assert any(
                word.arg == "trust_remote_code" and ast.unparse(word.value) == "False"
                for word in node.keywords
            ), f"{path}, line {node.lineno}"


# --- Configs.


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/object/new:os.system ['touch {}']",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_a_config_runs_no_code(tmp_path: Path, tag: str):
    """In a value, in place of the file, and on the command line."""
    mark = tmp_path / "mark"
    path = write(tmp_path / "config.yaml", json.dumps(BASE).encode())
    for text in (f"run: {{dir: {tag.format(mark)}}}\n", tag.format(mark)):
        with pytest.raises(ConfigError, match="is not a YAML config"):
            load_config(write(tmp_path / "evil.yaml", text.encode()))
    with pytest.raises(ConfigError, match="has no YAML value"):
        load_config(path, [f"run.dir={tag.format(mark)}"])
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:PLANTED}",
        "${oc.env:PLANTED,x}",
        "a ${oc.decode:${oc.env:PLANTED}} b",
        "\\${oc.env:PLANTED}",
        "${run.seed}",
    ],
)
def test_a_config_reads_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str):
    """What it says goes into the run folder and the report; interpolation could put a secret
    there."""
    monkeypatch.setenv("PLANTED", "a planted value")
    for source in ({"model": {"path": value}}, {"data": {"train": [value]}}, {value: 1}):
        path = write(tmp_path / "config.yaml", json.dumps(BASE | source).encode())
        with pytest.raises(ConfigError, match="interpolation is not read here") as refused:
            load_config(path)
        assert "a planted value" not in str(refused.value)
    path = write(tmp_path / "config.yaml", json.dumps(BASE).encode())
    with pytest.raises(ConfigError, match="interpolation is not read here"):
        load_config(path, [f"model.path={value}"])


def test_a_report_reads_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run folder may be a stranger's, and the page made from it goes back to them."""
    monkeypatch.setenv("PLANTED", "a planted value")
    run = make_run(tmp_path / "run", steps=0)
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("path: tiny", "path: ${oc.env:PLANTED}")
    )
    assert rlp_command(["report", str(run)]) == 3
    assert not (run / "report.html").exists()


def test_a_config_made_to_exhaust_the_machine_is_refused_at_once(tmp_path: Path):
    """Nine lines that stand for ten to the ninth values; brackets that end the C library's stack,
    and the process; two megabytes."""
    lines = [
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)),
    ]
    start = time.process_time()
    for text in ("\n".join(lines), "[" * 100_000, "- " * 100_000, "x: " + "y" * 2**21):
        with pytest.raises(ConfigError, match="is not a YAML config"):
            load_config(write(tmp_path / "config.yaml", text.encode()))
    with pytest.raises(ConfigError, match="has no YAML value: nested more than 100 levels deep"):
        load_config(
            write(tmp_path / "config.yaml", json.dumps(BASE).encode()),
            ["data.train=" + "[" * 100_000],
        )
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    "name", ["a\0b", "a\nb", "a\x1b[31mb", "a\rb", "a\u202eb", "\ud800", "a\x7f"]
)
def test_a_run_folder_has_a_name_that_can_be_printed(name: str):
    """A NUL, a line end, an escape, a reversal of the writing direction, half of a character."""
    with pytest.raises(ConfigError):
        load_config(BASE | {"run": {"dir": name}})


@pytest.mark.parametrize(
    "key", ["run.resume", "model.path", "model.tokenizer", "thought.instruction_file"]
)
def test_no_path_holds_a_nul(key: str):
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError, match="holds a NUL"):
        load_config(BASE | {section: BASE.get(section, {}) | {name: "a\0b"}})


# --- Benchmarks.

PAYLOADS = [
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{% endfor %}",
    "{{ question | attr('x') }}",
    "{{ question.__class__ }}",
    "{# x #}",
    "{{question}} {{ 7 * 7 }}",
    "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
    "{{",
    "{{ question or cycler() }}",
]
"""In Jinja, which lm-evaluation-harness fills templates with, the first and the seventh run a
command."""


@pytest.mark.parametrize("key", ["prompt", "reference"])
@pytest.mark.parametrize("template", PAYLOADS)
def test_a_benchmark_holds_no_template_but_fields(tmp_path: Path, key: str, template: str):
    path = write(
        tmp_path / "b.yaml",
        json.dumps(
            {
                "benchmarks": {
                    "a": {"data": "x.jsonl", key: template.replace("MARK", str(tmp_path / "mark"))}
                }
            }
        ).encode(),
    )
    with pytest.raises(ConfigError, match=rf"benchmarks\.a: {key} is text with {{{{field}}}}"):
        load_benchmarks(path)


def test_what_a_row_of_a_benchmark_holds_is_text_and_no_template(tmp_path: Path):
    """In the question, in the answer and in the examples shown before it: lm_eval gets finished
    text."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    mark = tmp_path / "mark"
    attack = PAYLOADS[0].replace("MARK", str(mark))
    rows = [
        {"question": attack, "answer": attack, "prompt": "{{answer}}"},
        {"question": "{{answer}}", "answer": "[" * 5000 + "]", "prompt": 1},
    ]
    path = write(tmp_path / "x.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    benchmark = Benchmark(
        data=str(path),
        examples=str(path),
        shots=1,
        prompt="{{prompt or question}} {{question}} }}",
        reference="{{ answer }}",
    )
    (task,) = load_tasks({"a": benchmark})["a"]
    task.build_all_requests()
    prompts = [instance.args[0] for instance in task.instances]
    assert (
        prompts[0].endswith(f"{{{{answer}}}} {attack} }}}}")
        and prompts[1].endswith("1 {{answer}} }}")
        and prompts[1].count(attack) == 2
    )
    assert [task.doc_to_target(instance.doc) for instance in task.instances] == [
        attack,
        "[" * 5000 + "]",
    ]
    assert not mark.exists()


@pytest.mark.parametrize(
    "row, complaint",
    [
        ({"question": None}, "no such field"),
        ({"other": 1}, "no such field"),
        ({"question": ["x"]}, "a list"),
        ({"question": {"a": 1}}, "a dict"),
    ],
)
def test_a_row_without_a_question_is_said_with_its_line(tmp_path: Path, row: dict, complaint: str):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    path = write(
        tmp_path / "x.jsonl", b'{"question": "q", "answer": 1}\n\n' + json.dumps(row).encode()
    )
    with pytest.raises(DataError, match=rf"x\.jsonl:3: no text \({{{{question}}}}: {complaint}"):
        load_tasks({"a": Benchmark(data=str(path))})


def test_a_task_is_a_name_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A task file of lm_eval may name Python functions, which would be loaded. Its index is that of
    one folder here: the whole takes half a minute."""
    tasks = pytest.importorskip(
        "lm_eval.tasks", reason="lm-evaluation-harness is not installed (extra eval)"
    )
    folder = Path(tasks.__file__).parent / "gsm8k"
    monkeypatch.setattr(
        tasks,
        "TaskManager",
        lambda include_defaults, make=tasks.TaskManager: make(
            include_defaults=False, include_path=folder
        ),
    )
    assert tasks.TaskManager(include_defaults=True).all_tasks
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w').close()\ndef f(doc): return ''\n"
    )
    task = write(
        tmp_path / "evil.yaml",
        b"task: evil\ndataset_path: json\ndoc_to_text: !function evil.f\ndoc_to_target:"
        b" ''\ntest_split: test\n",
    )
    for name in (str(task), str(tmp_path), "evil", "evil.yaml"):
        with pytest.raises(ConfigError, match="lm_eval has no task"):
            load_tasks({"a": Benchmark(task=name)})
    with pytest.raises(ConfigError, match="is not a YAML config"):
        load_benchmarks(task.rename(tmp_path / "b.yaml"))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "@x",
        "json",
        "text@x",
        "..",
        "../x",
        "/etc",
        "{tmp}",
        "hf://datasets/x/y",
        "http://example.org/x",
        "a/b/c",
        "buckets/x",
        "x\n",
        "-",
        "zip://a::b",
        "evil.py",
        "a/evil.py",
    ],
)
def test_a_hub_name_is_no_path(tmp_path: Path, name: str):
    """`datasets` takes a folder, an address or the name of one of its readers in the same place."""
    write(tmp_path / "x.jsonl", GOOD)
    name = name.format(tmp=tmp_path) if "{" in name else name
    with pytest.raises(DataError, match="is no name of a Hub data set"):
        open_rows([f"hub:{name}"], DataConfig(train=["x"]), "train", "data.train")


def test_no_answer_and_no_reference_is_run(tmp_path: Path):
    """Symbolic mathematics reads text by evaluating it, where it lets it."""
    pytest.importorskip("math_verify", reason="math-verify is not installed (extra eval)")
    mark = tmp_path / "mark"
    attack = f"__import__('os').system('touch {mark}')"
    for text in (
        attack,
        f"${attack}$",
        f"\\boxed{{{attack}}}",
        f"#### {attack}",
        f"\\boxed{{\\text{{{attack}}}}}",
        f"1 + {attack}",
        f"x = {attack}",
    ):
        for answer, reference in ((text, "18"), ("18", text), (text + "1", text)):
            with suppress(Exception):
                same_answer(answer, reference)
    assert not mark.exists()


# --- Secrets.


@pytest.mark.parametrize(
    "secret",
    [
        TOKEN,
        "ghp_" + "a1B2" * 9,
        "sk-proj-" + "x9" * 20,
        "AKIA" + "A1B2C3D4" * 2,
        "https://me:hunter2@example.org/data.jsonl",
        "eyJhbGciOiJIUzI1NiJ9abc.eyJzdWIi.abc",
    ],
)
def test_a_config_with_a_secret_is_refused_without_repeating_it(tmp_path: Path, secret: str):
    path = write(
        tmp_path / "config.yaml", json.dumps(BASE | {"data": {"train": [secret]}}).encode()
    )
    for overrides, source in (
        ([], path),
        ([f"model.path={secret}"], write(tmp_path / "good.yaml", json.dumps(BASE).encode())),
    ):
        with pytest.raises(
            ConfigError, match="holds an access token or a password.*HF_TOKEN"
        ) as refused:
            load_config(source, overrides)
        assert secret not in str(refused.value) and "hunter2" not in str(refused.value)


def test_ordinary_text_is_no_secret():
    """Paths of caches hold long hexadecimal names; models have long names."""
    for text in (
        "models--Qwen--Qwen3/snapshots/" + "0a1b2c3d" * 5,
        "Qwen/Qwen3-1.7B-Base",
        "https://example.org:8080/x.jsonl",
        "sk-learn",
        "task-with-a-long-name-of-many-words",
        "{question}\n{answer}",
    ):
        assert without_secrets(text) == text


def test_the_search_for_secrets_takes_time_in_proportion_to_a_text():
    """Beginnings of a token, one after another, each of which may go on to the end of the text."""
    start = time.process_time()
    for beginning in ("eyJ-", "eyJ", "hf_", "sk-", "://a:", "AKIA"):
        without_secrets(beginning * (2**18 // len(beginning)))
    assert time.process_time() - start < 10


def test_no_secret_reaches_the_run_folder_or_the_console(
    tmp_path, model_folder, corpus, ranks, monkeypatch, capfd
):
    """Planted in the environment and on the command line; looked for in every file of a finished
    run, and in all that was printed."""
    planted = {
        "HF_TOKEN": TOKEN,
        "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
        "DATABASE_PASSWORD": "correct horse",
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "sys.argv",
        ["train.py", "tiny.yaml", f"--token={TOKEN}", f"--key={planted['WANDB_API_KEY']}"],
    )
    monkeypatch.setattr("rlp.process.ranks.stop_ranks", lambda: None)
    (tmp_path / "tiny.yaml").write_text(
        f"model: {{path: {model_folder}}}\ndata: {{train: [{corpus}], held_out: [{corpus}]}}\nrun:"
        f" {{dir: {tmp_path / 'run'}}}\n"
    )
    assert (
        program.main(
            [
                str(tmp_path / "tiny.yaml"),
                *(f"{key}={value}" for key, value in TINY.items()),
                "budget.steps=1",
                "evaluation.panel_positions=2",
            ]
        )
        == DONE
    )
    printed = "".join(capfd.readouterr())
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert (
        len(files) > 12
        and json.loads((tmp_path / "run" / "environment.json").read_text())["command"].count(
            "[secret]"
        )
        == 2
    )
    for value in planted.values():
        assert value not in printed
        assert not [path for path in files if value.encode() in path.read_bytes()]


def test_the_environment_is_not_recorded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_VARIABLE", "its own value")
    assert "its own value" not in json.dumps(environment(["cpu"]))


# --- Data.


def test_a_parquet_file_can_not_say_how_it_is_to_be_read(tmp_path: Path):
    """`datasets` reads the type of a column from the file, and would open the path or the address
    that an image column holds."""
    image = {"info": {"features": {"text": {"_type": "Image"}}}}
    table = pyarrow.table({"text": ["w1 w2"]}).replace_schema_metadata(
        {"huggingface": json.dumps(image)}
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert Reader([tmp_path / "x.parquet"]).tokens(1) == [[7, 8]]


def test_a_hub_data_set_can_not_say_how_it_is_to_be_read(monkeypatch: pytest.MonkeyPatch):
    """A column of images would have the path or the address opened that it holds."""
    import datasets

    features = datasets.Features({"text": datasets.Image()})
    rows = datasets.Dataset.from_list(
        [{"text": {"path": "/nowhere/x.png", "bytes": None}}], features=features
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: rows)
    with pytest.raises(FileNotFoundError):
        rows[0]
    assert open_rows(["hub:somebody/data"], DataConfig(train=["x"]), "train", "data.train").read(
        0
    ) == {"text": {"path": "/nowhere/x.png", "bytes": None}}


# --- The page.


def test_every_promise_names_a_test_that_exists():
    """`docs/threat_model.md` says who is attacked where; each row has a test, and each test is
    there."""
    page = (REPOSITORY / "docs" / "threat_model.md").read_text()
    written = {
        name
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    promises = [
        line
        for line in page.splitlines()
        if line.startswith("| ") and not line.startswith("| promise")
    ]
    assert len(promises) >= 20
    for line in promises:
        named = re.findall(r"`(test_\w+)`", line)
        assert named and set(named) <= written, line
