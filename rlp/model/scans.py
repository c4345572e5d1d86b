"""State-space and linear-attention layers: the packages that run them fast on a GPU, and what one
of them holds where they are written out in plain torch.

transformers takes the functions of a package where it can be imported, and else its own, which
write out in float32 what a fused scan keeps in registers:

    Mamba-2    every pair of tokens of a chunk, for each head, and both projections of the state
               for each head though their groups share them
    Mamba      the state after each token

Letters
    heads, head, state, chunk: numbers of Mamba-2's config;  width: channels of a Mamba layer
"""

import importlib

from torch import nn

FLOAT32_BYTES = 4

DISTRIBUTIONS = {
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "fla": "flash-linear-attention",
}
"""What pip installs, by what is imported."""


def is_scan(module: nn.Module) -> bool:
    """Whether a module is such a layer: it has the decay of its state by name."""
    return "A_log" in dict(module.named_parameters(recurse=False))


def scan_elements(module: nn.Module) -> int | None:
    """Numbers in the recurrent state of one layer; None where they are not known."""
    if module.A_log.dim() == 2:
        return module.A_log.numel()
    attributes = vars(module)
    for names in (
        ("num_heads", "head_dim", "ssm_state_size"),
        ("num_v_heads", "head_k_dim", "head_v_dim"),
    ):
        if all(name in attributes for name in names):
            return attributes[names[0]] * attributes[names[1]] * attributes[names[2]]
    return None


def scan_packages(module: nn.Module) -> tuple[str, ...]:
    """What a layer needs to import for its fast functions."""
    is_mamba = module.A_log.dim() == 2 or "ssm_state_size" in vars(module)
    return ("causal_conv1d", "mamba_ssm" if is_mamba else "fla")


def plain_scan_bytes(module: nn.Module) -> int:
    """Bytes per token position that one layer holds at its peak, forward and backward, in plain
    torch; 0 where that is not known.

        Mamba-2    4 bytes x heads x (4 chunk + 8 state + 16 head)
        Mamba      4 bytes x width x (8 state + 8)

    The factors count the float32 tensors that are alive together: for transformers 5.23 this is
    1.0 to 1.3 times the largest sum over forward and backward pass (tests/model/test_scans.py).
    """
    attributes = vars(module)
    if module.A_log.dim() == 2:
        return FLOAT32_BYTES * (8 * module.A_log.numel() + 8 * module.A_log.shape[0])
    if any(name not in attributes for name in ("head_dim", "ssm_state_size", "chunk_size")):
        return 0
    of_a_head = (
        4 * attributes["chunk_size"]
        + 8 * attributes["ssm_state_size"]
        + 16 * attributes["head_dim"]
    )
    return FLOAT32_BYTES * module.A_log.numel() * of_a_head


def missing_packages(packages: tuple[str, ...]) -> dict[str, Exception]:
    """Which of them can not be imported, and why: transformers does without these."""
    missing = {}
    for package in packages:
        try:
            importlib.import_module(package)
        except Exception as error:  # of any type: what an extension built for another torch raises
            missing[package] = error
    return missing


def how_to_install(packages: tuple[str, ...]) -> str:
    """The command that brings packages, by the names that they are imported by."""
    names = [DISTRIBUTIONS[package] for package in packages]
    return f"pip install --no-build-isolation {' '.join(names)}"
