"""Which form is taken, what each refuses, and what it costs to have them."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlp_kernels
from rlp_kernels import CUDA_FORMS, FORMS, MAX_PLAIN_BYTES, choose_form, token_logprobs
from tests.kernels.rows import make_inputs


def test_auto_is_plain_while_the_logits_are_small_and_chunked_beyond():
    """110 rows x 151,936 words x 4 bytes is the last that fits 64 MiB; a bf16 head's float32 copy
    counts too."""
    assert MAX_PLAIN_BYTES == 64 * 2**20
    assert choose_form(110, 151_936, width=1024, dtype=torch.float32) == "plain"
    assert choose_form(111, 151_936, width=1024, dtype=torch.float32) == "chunked"
    assert choose_form(1, 151_936, width=1024, dtype=torch.bfloat16) == "chunked"
    hidden, head, target, rows = make_inputs(dtype=torch.float32)
    auto = token_logprobs(hidden, head, target, **rows)
    assert torch.equal(auto, token_logprobs(hidden, head, target, **rows, form="plain"))


def test_on_a_gpu_auto_takes_the_table_and_on_a_cpu_never_triton(monkeypatch):
    """Exact dtypes have no tensor cores to gain from, and stay chunked; so does everything while no
    form is measured on a GPU."""
    assert CUDA_FORMS == ((0, "chunked"),)
    monkeypatch.setattr(rlp_kernels, "CUDA_FORMS", ((2048, "folded"), (0, "triton")))
    assert set(FORMS) == {"plain", "chunked", "triton", "folded"}
    shape = {"vocabulary": 151_936, "width": 2048}
    for num_rows in (1, 2047, 2048, 65_536):
        on_gpu = choose_form(num_rows, **shape, dtype=torch.bfloat16, device="cuda")
        assert on_gpu == ("folded" if num_rows >= 2048 else "triton")
        assert choose_form(num_rows, **shape, dtype=torch.bfloat16) == "chunked"
    assert choose_form(65_536, **shape, dtype=torch.float32, device="cuda") == "chunked"
    assert choose_form(4, 64, width=8, dtype=torch.bfloat16, device="cuda") == "plain"


@pytest.mark.parametrize("form", ["triton", "folded"])
def test_a_form_of_triton_without_triton_says_what_to_write(form, monkeypatch):
    for module in ("rlp_kernels.triton_form", "rlp_kernels.folded"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    hidden, head, target, rows = make_inputs(dtype=torch.float32)
    with pytest.raises(ImportError, match="pip install triton, or write form='chunked'"):
        token_logprobs(hidden, head, target, **rows, form=form)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets, and takes CPU tensors"
)
@pytest.mark.parametrize("form", ["triton", "folded"])
def test_a_form_of_triton_refuses_cpu_tensors_unless_it_interprets(form):
    pytest.importorskip("triton", reason="Triton is not installed")
    hidden, head, target, rows = make_inputs(dtype=torch.float32)
    with pytest.raises(
        ValueError, match="runs on CUDA tensors, and hidden is on cpu: write form='chunked'"
    ):
        token_logprobs(hidden, head, target, **rows, form=form)


def test_importing_the_package_imports_no_triton():
    """It costs a second, and a CPU never takes its forms."""
    code = "import sys, rlp_kernels; print('triton' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(rlp_kernels.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "False", done.stderr


def refused(match, **changes):
    hidden, head, target, rows = make_inputs(dtype=torch.float32)
    arguments = {"hidden": hidden, "head": head, "target": target} | rows | changes
    with pytest.raises(ValueError, match=match):
        token_logprobs(**arguments)


def test_a_target_equal_to_the_excluded_token_is_refused_by_row():
    _, _, target, rows = make_inputs()
    excluded = rows["excluded"].clone()
    excluded[6] = target[6]
    refused("target is the excluded token.*Row 6 of 10", excluded=excluded)


def test_tokens_outside_the_vocabulary_are_refused():
    """A tile loop would never meet such a target, and would return a plausible number."""
    refused(r"target must be in \[0, 23\).*Row 0 of 10 has target 23", target=torch.full((10,), 23))
    refused(r"excluded must be -1 or in \[0, 23\)", excluded=torch.full((10,), -100))


def test_temperatures_that_are_not_positive_and_finite_are_refused():
    for value in (0.0, -1.0, math.inf, math.nan):
        refused("positive and finite", inverse_temperature=torch.full((10,), value))
    refused("gets no gradient", inverse_temperature=torch.ones(10, requires_grad=True))


def test_wrong_shapes_and_dtypes_are_refused_by_name():
    refused(r"head must be \[V, D\], got \[0\].*ZeRO-3", head=torch.empty(0))
    refused(
        r"hidden must be \[N, D\] with head's D = 6, got \[2, 5, 6\]", hidden=torch.zeros(2, 5, 6)
    )
    refused("share a floating dtype", hidden=torch.zeros(10, 6, dtype=torch.bfloat16))
    refused(r"target must be \[10\] torch.int64", target=torch.zeros(9, dtype=torch.int64))
    refused(
        r"excluded must be \[10\] torch.int64", excluded=torch.full((10,), -1, dtype=torch.int32)
    )
    refused(
        r"inverse_temperature must be \[10\] torch.float32",
        inverse_temperature=torch.ones(10).bfloat16(),
    )
    refused("softcap must be positive", softcap=-30.0)
    refused("form must be one of auto, plain, chunked, triton, folded, got 'fused'", form="fused")


PEAK_MEMORY = """
import torch
from rlp_kernels import token_argmax, token_entropy, token_logprobs

def peak_bytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def run(num_rows, vocabulary):
    hidden = torch.randn(num_rows, 16, requires_grad=True)
    head = torch.randn(vocabulary, 16, requires_grad=True)
    target = torch.zeros(num_rows, dtype=torch.int64)
    excluded = torch.full((num_rows,), -1)
    inverse_temperature = torch.ones(num_rows)
    rows = dict(inverse_temperature=inverse_temperature, excluded=excluded, softcap=30.0)
    token_logprobs(hidden, head, target, **rows, form="auto").sum().backward()
    token_entropy(hidden, head, **rows)
    token_argmax(hidden, head, excluded=excluded)

run(8, 64)  # libraries load their buffers here
before = peak_bytes()
run(512, 151_936)
print(peak_bytes() - before)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads the peak from /proc/self/status"
)
def test_the_logits_are_never_in_memory_whole():
    """512 rows of 151,936 words are 311 MB of float32 logits; forward and backward stay under half
    of that.

    They take 84 MB, and 1,334 MB in the plain form: the head and its gradient are 20 MB, a tile is
    8 MB. A fresh process is measured by its own high-water mark: ru_maxrss would begin at the
    parent's.
    """
    environment = os.environ | {
        "PYTHONPATH": str(Path(rlp_kernels.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150e6, f"peak grew by {int(done.stdout) / 1e6:.0f} MB"
