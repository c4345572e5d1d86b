"""What a part from outside gave, looked at before it is used."""

from torch import Tensor

from rlp.process.outside import Part


def require_tensor(part: Part, values: object, shape: list[int], letters: str) -> Tensor:
    """The float32 tensor that a part gave, without gradient.

    Args:
        letters: the shape in the letters of its docstring, such as `[M, G]`.

    Raises:
        PartError: it is no tensor, has another shape, or holds a value that is not finite.
    """
    expected = f"a finite tensor of shape {shape} ({letters})"
    if not isinstance(values, Tensor):
        raise part.refuse(type(values).__name__, expected)
    if list(values.shape) != shape:
        raise part.refuse(f"a tensor of shape {list(values.shape)}", expected)
    values = values.detach().float()
    bad = values[~values.isfinite()]
    if len(bad):
        raise part.refuse(f"{len(bad)} of {values.numel()} values {bad[0].item()}", expected)
    return values
