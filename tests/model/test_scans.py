"""State-space layers without the packages that are made for them: what they hold, and what is said
of it."""

import importlib
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, MambaConfig, NemotronHConfig, PretrainedConfig

from rlp.measure.plan_text import render_plan
from rlp.model.scans import how_to_install, is_scan, missing_packages
from rlp.model.shapes import ModelShapes, model_shapes
from rlp.run import checks, opening
from rlp.run.checks import slow_scans
from tests.measure.small_plans import SHAPES, parts, plan_of, small_run
from tests.tiny_models import architecture
from tests.training import open_run, tiny_config

GPU = torch.device("cuda")


class LargestSum(TorchDispatchMode):
    """Bytes of all tensors that were made inside and are alive together, at most."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self.num_bytes = 0

    def __torch_dispatch__(self, operator, kinds, arguments=(), named=None):
        made = operator(*arguments, **(named or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._alive.pop, storage._cdata, None)
                    self.num_bytes = max(self.num_bytes, sum(self._alive.values()))
        return made


def nemotron(heads: int, head: int, state: int, chunk: int) -> PretrainedConfig:
    return NemotronHConfig(
        hidden_size=64,
        hybrid_override_pattern="M",
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        mamba_num_heads=heads,
        mamba_head_dim=head,
        ssm_state_size=state,
        chunk_size=chunk,
        n_groups=2,
        vocab_size=97,
    )


def mamba(width: int, state: int) -> PretrainedConfig:
    return MambaConfig(
        hidden_size=width, state_size=state, num_hidden_layers=1, vocab_size=97, expand=2
    )


@pytest.mark.parametrize(
    "config, tokens",
    [
        (nemotron(8, 16, 16, 128), 256),
        (nemotron(8, 64, 16, 64), 256),
        (nemotron(8, 16, 64, 64), 256),
        (nemotron(16, 32, 32, 64), 256),
        (mamba(32, 8), 64),
        (mamba(64, 16), 64),
    ],
    ids=("chunks", "heads", "states", "all", "mamba", "mamba, wider"),
)
def test_a_plain_scan_is_planned_from_above(config: PretrainedConfig, tokens: int) -> None:
    """One layer, forward and backward, in the numbers of a GPU's run."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    (layer,) = (module for module in model.modules() if is_scan(module))
    hidden = torch.zeros(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with LargestSum() as held:
        layer(hidden).sum().backward()

    shapes = model_shapes(config)
    planned = tokens * (shapes.plain_scan_bytes + 2 * shapes.layer_activation_elements)
    assert 1 <= planned / held.num_bytes <= 1.4


def test_a_plain_scan_by_hand() -> None:
    """128 heads of 80 with a state of 128 and chunks of 128, as Nemotron Nano 12B has."""
    config = nemotron(128, 80, 128, 128)
    assert model_shapes(config).plain_scan_bytes == 4 * 128 * (4 * 128 + 8 * 128 + 16 * 80)
    assert model_shapes(mamba(32, 8)).plain_scan_bytes == 4 * 64 * (8 * 8 + 8)
    assert model_shapes(architecture("qwen3")).plain_scan_bytes == 0


def with_scans() -> ModelShapes:
    """The shapes of the small plans with four state-space layers of 1,000 bytes a token."""
    names = SHAPES.__slots__
    values = {name: getattr(SHAPES, name) for name in names}
    more = {
        "scan_layers": 4,
        "plain_scan_bytes": 1000,
        "scan_packages": ("causal_conv1d", "mamba_ssm"),
    }
    return ModelShapes(**values | more)


def test_without_the_packages_the_plan_counts_what_scans_hold(tmp_path: Path) -> None:
    """Three rows of 17 tokens in the update, and while sampling six contexts of nine; one layer at
    a time where activations are made again."""
    config, shapes = small_run(tmp_path), with_scans()
    ready = plan_of(config, shapes=shapes)
    lacking = plan_of(config, shapes=shapes, missing_packages=("mamba_ssm",))
    grown = {
        when: lacking.bytes_during(when) - ready.bytes_during(when)
        for when in ("update", "sampling", "always")
    }
    again = small_run(tmp_path, "engine.activation_checkpointing=true")
    one = parts(again, shapes=shapes, missing_packages=("mamba_ssm",))
    assert grown == {"update": 4 * 51_000, "sampling": 2 * 9_000, "always": 0}
    assert one["state-space scans in plain torch"] == 51_000
    assert plan_of(config, device_bytes=None, shapes=shapes).plain_scans


def test_the_plan_says_what_the_packages_save(tmp_path: Path) -> None:
    ready, lacking, attention_only = (
        render_plan(plan_of(small_run(tmp_path), shapes=shapes, missing_packages=missing))
        for shapes, missing in (
            (with_scans(), ()),
            (with_scans(), ("mamba_ssm",)),
            (SHAPES, ()),
        )
    )
    assert "without causal-conv1d and mamba-ssm" in ready
    assert "without causal-conv1d" not in lacking and "plain torch [update]" in lacking
    assert "plain torch" not in attention_only


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make stand-ins for packages: whole ones, and ones that were built for another torch."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(**sources: str) -> None:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()

    return make


BROKEN = "raise OSError('undefined symbol: _ZN3c10')"


def test_a_start_on_a_gpu_warns_of_missing_packages(tmp_path: Path, packages) -> None:
    """Absent or built for another torch, for transformers it is the same."""
    shapes, plan = with_scans(), plan_of(small_run(tmp_path), shapes=with_scans())
    packages(mamba_ssm="")
    absent = slow_scans(shapes, GPU, plan)
    assert "No module named 'causal_conv1d'" in absent
    assert "pip install --no-build-isolation causal-conv1d`" in absent and "51 kB each" in absent
    packages(causal_conv1d=BROKEN)
    assert "undefined symbol" in slow_scans(shapes, GPU, plan)
    packages(causal_conv1d="")
    assert slow_scans(shapes, GPU, plan) is None


def test_nobody_else_is_warned(tmp_path: Path, packages) -> None:
    packages(mamba_ssm=BROKEN, causal_conv1d=BROKEN)
    plan = plan_of(small_run(tmp_path))
    assert slow_scans(with_scans(), torch.device("cpu"), plan) is None
    assert slow_scans(SHAPES, GPU, plan) is None
    assert missing_packages(()) == {}


def test_a_command_installs_what_is_missing() -> None:
    names = tuple(sorted({"fla", "mamba_ssm", "causal_conv1d"}))
    assert how_to_install(names).endswith("causal-conv1d flash-linear-attention mamba-ssm")


def test_the_run_says_it(tmp_path, model_folder, corpus, ranks, monkeypatch, capsys) -> None:
    asked = []

    def warn(shapes: ModelShapes, device: torch.device, plan: object) -> str:
        asked.append((shapes.scan_packages, device.type))
        return "WARNING: slow"

    monkeypatch.setattr(opening, "slow_scans", warn)
    run = open_run(tiny_config(tmp_path / "run", model_folder, corpus), ranks)
    run.log.close()
    assert asked == [((), "cpu")] and "WARNING: slow" in capsys.readouterr().out


def test_here_the_plan_asks_for_the_packages(tmp_path: Path, monkeypatch) -> None:
    """On a GPU; a CPU never has them."""
    opened = types.SimpleNamespace(
        setup=types.SimpleNamespace(shapes=with_scans()),
        layout="repeated",
        format_tokens=checks.FormatTokens(),
    )
    memory = types.SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(checks, "missing_packages", lambda packages: dict.fromkeys(packages))
    ranks = types.SimpleNamespace(device=GPU, world_size=2)
    plan = checks.plan_here(small_run(tmp_path), opened, ranks, (torch.bfloat16, "so"))
    assert plan.plain_scans
