"""Answers drawn of a checkpoint: by keys, onto the disk, and on from where it stopped."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from rlp.cli import main
from rlp.config import ConfigError
from rlp.post.diversity import variety_of
from rlp.post.diversity_drawing import Drawing, draw_answers, written
from rlp.post.diversity_samples import Prompt, how_drawn, read_samples
from rlp.sampling.draw import nucleus
from tests.tiny_models import word_tokenizer

PROMPTS = [
    Prompt("w1 w2 w3", "open", category="some"),
    Prompt("w4", "open", tokens=3),
    Prompt("w5 w6 w7 w8", "open", samples=4),
    Prompt("w9 w10", "closed", ("w11",)),
    Prompt("w12 w13", "open"),  # drawn beside the first
]
DRAWING = Drawing(
    open_samples=3, closed_samples=2, tokens=6, frame="{prompt}", temperature=0.8, rows=4
)


def texts(path: Path) -> dict[tuple[str, str, int], str]:
    """Of each answer its text, by model, prompt and number."""
    lines = map(json.loads, path.read_text().splitlines())
    return {(one["model"], one["prompt"], one["sample"]): one["text"] for one in lines}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, model_folder) -> Path:
    """All answers, drawn at once."""
    path = tmp_path_factory.mktemp("drawn") / "samples.jsonl"
    draw_answers(str(model_folder), PROMPTS, DRAWING, path, name="m")
    return path


@pytest.fixture(scope="module")
def other_model(tmp_path_factory, model_folder) -> Path:
    """The same folder with one weight moved by what changes no draw."""
    folder = tmp_path_factory.mktemp("other")
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    first = sorted(weights)[0]
    weights[first].view(-1)[0] += 1e-6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_every_prompt_has_its_answers_and_lines_say_how(drawn):
    samples = read_samples(drawn)
    assert len(texts(drawn)) == len(samples) == 3 + 3 + 4 + 2 + 3
    assert len(set(texts(drawn).values())) > 5
    how = how_drawn(samples)["m"]
    assert (how["temperature"], how["top_p"], how["format"]) == (0.8, 0.9, "raw")
    assert {sample.prompt for sample in samples} == {
        replace(p, tokens=None, samples=None) for p in PROMPTS
    }
    assert all(
        line["tokens_drawn"] <= (3 if line["prompt"] == "w4" else 6)
        for line in map(json.loads, drawn.read_text().splitlines())
    )


def test_an_answer_depends_on_prompt_seed_number_and_weights_alone(tmp_path, model_folder, drawn):
    """In another order, beside other prompts, in other batches, and as one of more answers."""
    path = tmp_path / "samples.jsonl"
    for prompt, samples in zip(reversed(PROMPTS), (4, 3, 9, 3, 5)):
        other = replace(DRAWING, open_samples=samples, closed_samples=samples, rows=samples + 5)
        draw_answers(str(model_folder), [prompt], other, path, name="m")
    assert texts(path).items() >= texts(drawn).items()

    again = tmp_path / "seed.jsonl"
    draw_answers(str(model_folder), PROMPTS, replace(DRAWING, seed=1), again, name="m")
    assert texts(again) != texts(drawn)


def test_models_that_hardly_differ_draw_independently(tmp_path, other_model, drawn):
    """The same noise for both would make their answers one, and inter no mean over pairs of
    independent ones."""
    path = tmp_path / "samples.jsonl"
    draw_answers(str(other_model), PROMPTS, DRAWING, path, name="m")
    same = [texts(path)[key] == text for key, text in texts(drawn).items()]
    assert sum(same) < len(same) / 2


def test_an_interrupted_drawing_ends_with_the_same_answers(tmp_path, model_folder, drawn):
    """Cut at any byte: what is whole is kept, a torn line goes, the rest is drawn."""
    content = drawn.read_bytes()
    first = content.index(b"\n") + 1
    for end in (0, first - 1, first, first + 1, len(content) // 2, len(content) - 1):
        path = tmp_path / f"{end}.jsonl"
        path.write_bytes(content[:end])
        draw_answers(str(model_folder), PROMPTS, DRAWING, path, name="m", tell=lambda text: None)
        assert texts(path) == texts(drawn)
        assert path.read_bytes().startswith(content[: content[:end].rfind(b"\n") + 1])


def test_a_finished_drawing_draws_nothing(drawn, model_folder):
    before, told = drawn.read_bytes(), []
    draw_answers(str(model_folder), PROMPTS, DRAWING, drawn, name="m", tell=told.append)
    assert drawn.read_bytes() == before and "m's answers to 5 prompts already" in told[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 1.0}, "drawn with temperature 0.8, and is asked for with 1.0"),
        ({"seed": 3}, "drawn with seed 0, and is asked for with 3"),
        ({"frame": "Q {prompt}"}, "drawn with frame '{prompt}'"),
    ],
)
def test_other_settings_are_not_mixed_in(drawn, model_folder, change, message):
    before = drawn.read_bytes()
    with pytest.raises(ConfigError, match=message):
        draw_answers(str(model_folder), PROMPTS, replace(DRAWING, **change), drawn, name="m")
    assert drawn.read_bytes() == before


def test_other_weights_are_not_mixed_in(drawn, other_model):
    with pytest.raises(ConfigError, match="drawn with weights"):
        draw_answers(str(other_model), PROMPTS, DRAWING, drawn, name="m")


def test_a_thought_of_the_models_own_stands_in_its_line(tmp_path, model_folder):
    path = tmp_path / "samples.jsonl"
    drawing = replace(DRAWING, thinks=True, thought_tokens=5)
    draw_answers(str(model_folder), PROMPTS[:2], drawing, path)
    thoughts = [sample.text for sample in read_samples(path, field="thought")]
    assert len(thoughts) == 6 and any(thoughts)


def test_variety_of_a_checkpoint_is_one_call(tmp_path, model_folder):
    found = variety_of(
        str(model_folder), PROMPTS, samples=tmp_path / "samples.jsonl", drawing=DRAWING
    )
    assert found["open"]["prompts"] == 4 and found["open"]["inter"] is None
    assert 0 <= found["open"]["intra"] <= 1 and found["closed"]["accuracy"] in (0, 0.5, 1)


def test_the_command_draws_of_several_models_and_measures(
    tmp_path, model_folder, other_model, capsys
):
    panel = tmp_path / "panel.jsonl"
    lines = [{"prompt": one.text, "kind": "open", "tokens": 4} for one in PROMPTS]
    panel.write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples, out = tmp_path / "samples.jsonl", tmp_path / "out.json"
    arguments = ["diversity", str(model_folder), str(other_model), "--names", "one,two"]
    arguments += ["--prompts", str(panel), "--samples", str(samples), "--json", str(out)]
    assert main([*arguments, "--open-samples", "2", "--frame", "{prompt}", "--device", "cpu"]) == 0
    found = json.loads(out.read_text())
    assert found["open"]["texts"] == 2 * 2 * 5
    assert found["open"]["matrix"]["one"]["two"] == found["open"]["inter"]
    assert found["settings"]["drawn"]["two"]["temperature"] == 1
    assert "one: drawn with seed 0, temperature 1.0, top_p 0.9" in capsys.readouterr().out


def test_a_prompt_is_written_as_the_format_says():
    tokenizer = word_tokenizer()
    assert written("w1", Drawing(), tokenizer) == "Question: w1\nAnswer:"
    with pytest.raises(ConfigError, match="Write --format raw"):
        written("w1", Drawing(format="chat"), tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    assert written("w1", Drawing(format="chat"), tokenizer) == "[w1]>"


# Top-p


def kept(probabilities: list[float], top_p: float, temperature: float = 1.0) -> list[bool]:
    logits = torch.tensor([probabilities], dtype=torch.float64).log().float() * temperature
    return torch.isfinite(nucleus(logits, temperature, top_p))[0].tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_nucleus_is_the_fewest_tokens_that_hold_the_mass(temperature: float):
    """At the sampling temperature; the token that reaches it belongs to it."""
    shares = [0.1, 0.45, 0.05, 0.4]
    assert kept(shares, 0.44, temperature) == [False, True, False, False]
    assert kept(shares, 0.46, temperature) == [False, True, False, True]
    assert kept(shares, 0.90, temperature) == [True, True, False, True]
    assert kept(shares, 1.0, temperature) == [True] * 4


def test_equally_probable_tokens_stay_together_and_logits_as_they_are():
    assert kept([0.25] * 4, 0.3) == [True] * 4
    logits = torch.randn(3, 4000, generator=torch.manual_seed(0)) * 3
    for row, cut in zip(logits, nucleus(logits, 1.5, 0.8)):
        inside = torch.isfinite(cut)
        assert_close(cut[inside], row[inside], rtol=0, atol=0)
        mass = (row / 1.5).softmax(dim=0)
        assert mass[inside].sum() >= 0.8 > mass[inside].sum() - mass[inside].min()


def test_a_nucleus_of_a_flat_distribution_is_looked_for_in_all_of_it():
    """Where the most probable tokens that are looked at first hold too little."""
    logits = torch.linspace(0, 0.1, 5000)[None]
    assert int(torch.isfinite(nucleus(logits, 1.0, 0.9)).sum()) > 4000
