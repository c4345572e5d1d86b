"""The kernels of a draw go through the compiler for an H100, which takes no GPU."""

import pytest

TYPES = {"uniform": "*fp64", "token": "*i64", "temperature": "fp32"}
POINTERS = ("maximum", "mass", "moment", "logits", "logprob", "entropy")
SIZES = {"TILE": 1024, "TILES": 256}


@pytest.mark.parametrize("name", ["tile_kernel", "pick_kernel"])
def test_a_kernel_compiles_for_sm_90(name, tmp_path, monkeypatch):
    """At V 151,936: 149 tiles of 1024 words."""
    triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from rlp_kernels import triton_draw

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_draw, name)
    types = TYPES | dict.fromkeys(POINTERS, "*fp32")
    signature = {
        argument: "constexpr" if argument in SIZES else types.get(argument, "i32")
        for argument in kernel.arg_names
    }
    sizes = {argument: size for argument, size in SIZES.items() if argument in signature}
    source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=sizes)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    assert "sm_90" in compiled.asm["ptx"] and compiled.asm["cubin"]
