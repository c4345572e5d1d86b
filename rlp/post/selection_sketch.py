"""Gradients of single documents, projected as they are made: one batched backward, no gradient of
a weight.

The gradient of a linear layer's weight over a document is a sum of outer products of what the
tokens bring in and what comes back,

    G = sum_t delta_t a_t^T,        [out, in]

and its projection adds each entry, with a sign, to one of d places:

    phi[(h(o) + k(i)) mod d] += u(o) v(i) G[o, i],        u, v in {-1, +1}

summed over layers. Signs and places of a layer are drawn from the seed and the layer's name; they
are out + in numbers, so the sign of each of the model's weights is made when it is met and none is
stored. Two entries meet in a place with probability 1 / d and with a sign of mean 0, so

    E <phi(G), phi(G')> = <G, G'>,        error ~ |G| |G'| / sqrt(d)

as with a dense matrix of signs, which would take d multiplications for every weight of the model.
This one (TensorSketch: Pham and Pagh, KDD 2013) is a circular convolution of the two vectors,

    phi = sum_t F^-1( F(places of u delta_t) * F(places of v a_t) ),

so a token costs two transforms of length d where the layer's own forward and backward cost
6 in out: where the layer is small, G itself is made, and its entries are added up.

Weights of linear layers are covered, but for the LM head and the embeddings, which say which words
a document has and are most of a small model; biases and norms are not.

Dimensions
    R  documents of a batch;  T  tokens, padded on the right;  d  places
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlp.data.documents import Document

LONGEST = 256
"""Tokens per row from which a layer's own size no longer decides how it is projected: a matrix of
in x out entries is made up to in x out = d x min(T, LONGEST)."""


@dataclass(frozen=True, slots=True)
class Side:
    """Where the coordinates of one side of a layer go."""

    place: Tensor
    """[n] int64, in 0 .. d - 1. No two agree while n <= d; beyond they are spread evenly."""
    sign: Tensor
    """[n] float32, -1 or 1."""

    @classmethod
    def drawn(cls, key: str, count: int, dimensions: int, device: torch.device) -> "Side":
        """A function of the key alone, on any machine."""
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        bits = np.random.Philox(key=int.from_bytes(digest, "little"))
        sign = bits.random_raw(count) >> np.uint64(63)
        rounds = -(-count // dimensions)
        order = [np.argsort(bits.random_raw(dimensions), kind="stable") for _ in range(rounds)]
        place = np.concatenate(order)[:count]
        signs = torch.from_numpy(1 - 2 * sign.astype(np.float32))
        return cls(torch.from_numpy(place).to(device), signs.to(device))

    def spread(self, values: Tensor, dimensions: int) -> Tensor:
        """[..., n] -> [..., d]."""
        out = values.new_zeros(*values.shape[:-1], dimensions)
        return out.index_add_(-1, self.place, values * self.sign)


class Projection:
    """phi of a batch of documents, layer by layer."""

    def __init__(self, dimensions: int, seed: int) -> None:
        self.dimensions, self.seed = dimensions, seed
        self._sides: dict[str, tuple[Side, Side]] = {}
        self._sum: Tensor | None = None
        self._spectrum: Tensor | None = None

    def sides(self, layer: str, outputs: int, inputs: int, device: torch.device) -> tuple:
        """(outgoing, incoming) of a layer."""
        if layer not in self._sides:
            self._sides[layer] = (
                Side.drawn(f"{self.seed} {layer} out", outputs, self.dimensions, device),
                Side.drawn(f"{self.seed} {layer} in", inputs, self.dimensions, device),
            )
        return self._sides[layer]

    def add(self, layer: str, brought: Tensor, returned: Tensor) -> None:
        """Add one layer's part.

        Args:
            brought: [R, T, in], what the tokens brought in.
            returned: [R, T, out], the gradient of what they gave.
        """
        brought, returned = brought.float(), returned.float()
        if self._sum is None:
            self._sum = brought.new_zeros(len(brought), self.dimensions)
            self._spectrum = torch.fft.rfft(self._sum)
        tokens, inputs = brought.shape[1:]
        outgoing, incoming = self.sides(layer, returned.shape[-1], inputs, brought.device)
        if inputs * returned.shape[-1] <= self.dimensions * min(tokens, LONGEST):
            gradient = torch.einsum("rto,rti->roi", returned, brought)
            gradient *= outgoing.sign[:, None] * incoming.sign
            place = (outgoing.place[:, None] + incoming.place) % self.dimensions
            self._sum.index_add_(1, place.flatten(), gradient.flatten(1))
            return
        one = torch.fft.rfft(outgoing.spread(returned, self.dimensions))
        other = torch.fft.rfft(incoming.spread(brought, self.dimensions))
        self._spectrum += (one * other).sum(dim=1)

    def taken(self) -> Tensor:
        """[R, d] float32, the sum over the layers added since the last call."""
        total = self._sum + torch.fft.irfft(self._spectrum, n=self.dimensions)
        self._sum = self._spectrum = None
        return total


def linear_layers(lm: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers whose weights are covered, by name."""
    head = lm.get_output_embeddings()
    return {
        name: module
        for name, module in lm.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


@contextmanager
def projecting(lm: PreTrainedModel, projection: Projection) -> Iterator[None]:
    """While this lasts a backward through the model adds to a projection, and makes no gradient of
    any weight."""
    wanted = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    was_training = lm.training

    def watch(name: str, module: nn.Module):
        def hook(_, given: tuple, output: Tensor) -> None:
            brought = given[0].detach()
            output.register_hook(lambda returned: projection.add(name, brought, returned))

        return module.register_forward_hook(hook)

    # Nothing else has a gradient, so it has to begin where the documents come in.
    hooks = [
        lm.get_input_embeddings().register_forward_hook(
            lambda _, given, output: output.detach().requires_grad_()
        )
    ]
    hooks += [watch(name, module) for name, module in linear_layers(lm).items()]
    for parameter in wanted:
        parameter.requires_grad_(False)
    lm.eval()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
        lm.train(was_training)


def projected_gradients(
    lm: PreTrainedModel, documents: Sequence[Document], projection: Projection
) -> Tensor:
    """[R, d] float32: phi of the gradient of the sum of log p over a document's predicted tokens,
    not yet of unit length. To be called within `projecting`.

    Args:
        documents: with at least two tokens each; the loss mask says which are predicted.
    """
    longest = max(len(document.tokens) for document in documents)
    tokens = torch.zeros(len(documents), longest, dtype=torch.int64)
    counts = torch.zeros(len(documents), longest - 1, dtype=torch.bool)
    for row, document in enumerate(documents):
        length = len(document.tokens)
        tokens[row, :length] = torch.from_numpy(document.tokens)
        counts[row, : length - 1] = torch.from_numpy(document.predicted)

    device = lm.get_input_embeddings().weight.device
    tokens, counts = tokens.to(device), counts.to(device)
    # The model is causal: padding on the right is seen by no token that counts.
    logits = lm(input_ids=tokens, use_cache=False).logits[:, :-1][counts].float()
    torch.nn.functional.cross_entropy(
        logits, tokens[:, 1:][counts], reduction="sum"
    ).neg().backward()
    return projection.taken()
