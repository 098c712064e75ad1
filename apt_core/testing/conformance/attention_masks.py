"""What a mask asks of every attention that takes one: padded rows and packed documents.

Both are also given as document ids, to layers that take these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from apt_core.modeling.masks import (
    document_mask,
    document_positions,
    padding_mask,
    padding_positions,
    takes_documents,
)
from apt_core.testing.conformance.checks import (
    Check,
    LeftOut,
    here,
    refusing,
    require_equal,
    require_finite,
)
from apt_core.testing.conformance.examined_attention import Attention
from apt_core.testing.conformance.layers import leaf, sample


def mask_checks(at: Attention) -> list[Check]:
    return [
        Check("mask", lambda: at.at_lengths(_mask)),
        Check("wrong masks", lambda: _wrong_masks(at)),
        Check("padding", lambda: at.at_lengths(_padding)),
        Check("packed", lambda: at.at_lengths(_packed)),
        Check("documents", lambda: at.at_lengths(_documents)),
    ]


def _mask(at: Attention) -> None:
    """Every form of mask is taken; True changes nothing, and what is False is not seen."""
    at.claims("mask")
    layer, x = at.build(), leaf(at.input())
    T, heads, y = at.length, at.num_heads, layer(x)
    for shape in ((T, T), (2, 1, 1, T), (2, 1, T, T), (2, heads, T, T)):
        mask = here(torch.ones(shape, dtype=torch.bool))
        require_equal(layer(x, mask=mask), y, f"with a mask of True, {list(shape)}")
        assert mask.all(), f"the layer changes the mask {list(shape)} that it is given"
    hidden, last = T - 6, T - 1
    mask = here(torch.ones(T, T, dtype=torch.bool))
    mask[last, hidden] = False
    (grad,) = torch.autograd.grad(layer(x, mask=mask)[:, last].square().sum(), x)
    assert not grad[:, hidden].any(), "what a mask [T, T] hides is seen"
    mask = here(torch.ones(2, 1, 1, T, dtype=torch.bool))
    mask[0, ..., hidden] = False
    masked = layer(x, mask=mask)
    (grad,) = torch.autograd.grad(masked[0, last].square().sum(), x)
    assert not grad[0, hidden].any(), "what a mask [B, 1, 1, T] hides is seen"
    require_equal(masked[1], y[1], "a row of which nothing is masked, beside one with a mask")


def _wrong_masks(at: Attention) -> None:
    """They are refused: taken for another, a mask would hide the wrong tokens in silence."""
    at.claims("mask")
    layer, x, T = at.build(), at.input(), at.length
    with refusing("a mask of floats"):
        layer(x, mask=here(torch.zeros(T, T)))
    for shape in ((T, T + 1), (3, 1, T, T), (T + 1, T), (1, 2, 1, T, T)):
        with refusing(f"a mask {list(shape)} for x [2, {T}, D]"):
            layer(x, mask=here(torch.ones(shape, dtype=torch.bool)))


def _documents(at: Attention) -> None:
    """Document ids keep packed documents and padding apart as a boolean mask does, also where a
    text is fed in pieces, and ids that do not fit are refused."""
    layer, T = at.build(), at.length
    if not takes_documents(layer):
        raise LeftOut("the layer has no takes_documents: it is given a boolean mask")
    _padded_rows(at, lambda is_token: is_token.long() - 1)
    _packed_rows(at, lambda ids: ids)
    _packed_pieces(at)
    for shape in ((2, T + 1), (3, T), (2, 1, 1, T), (T,)):
        with refusing(f"document ids {list(shape)} for x [2, {T}, D]"):
            layer(at.input(), mask=here(torch.zeros(shape, dtype=torch.int64)))


@torch.no_grad()
def _packed_pieces(at: Attention) -> None:
    layer, x, T = at.build(), at.input(), at.length
    if not hasattr(layer, "create_cache"):
        return
    ids = here(torch.tensor([[0] * (T // 2) + [1] * (T - T // 2), [-1] * 2 + [3] * (T - 2)]))
    places, whole = document_positions(ids), layer(x, mask=ids, positions=document_positions(ids))
    cache, outputs, end = layer.create_cache(T), [], 0
    for piece in x.split((3, 1, T // 2 - 2, *[1] * (T - T // 2 - 2)), 1):
        start, end = end, end + piece.shape[1]
        now = places[:, start:end]
        outputs.append(layer(piece, mask=ids[:, :end], positions=now, cache=cache))
    require_equal(torch.cat(outputs, 1), whole, "packed documents, fed in pieces")


def _padding(at: Attention) -> None:
    """Filled up on either side, a row gives what it gives alone, and nothing is NaN."""
    at.claims("mask")
    _padded_rows(at, padding_mask)


def _padded_rows(at: Attention, mask_of: Callable[[Tensor], Tensor]) -> None:
    layer, width = at.build(), at.length
    lengths, places = here(torch.tensor([[width - 5], [width]])), here(torch.arange(width))
    for side, is_token in (
        ("left", places >= width - lengths),
        ("right", places < lengths),
    ):
        x = leaf(at.input(length=width))
        y = layer(x, mask=mask_of(is_token), positions=padding_positions(is_token))
        require_finite(y, f"the output of a row that is filled up on the {side}")
        (grad,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        require_finite(grad, f"the gradient of a row that is filled up on the {side}")
        tokens = is_token[..., None]
        (grad,) = torch.autograd.grad((y * sample(*y.shape) * tokens).sum(), x)
        require_equal(grad * ~tokens, 0 * grad, f"the gradient of filling on the {side}")
        for row in range(2):
            kept = is_token[row]
            _as_alone(
                layer, x, y, grad, row, kept, sample(*y.shape), f"a row filled up on the {side}"
            )


def _packed(at: Attention) -> None:
    """Documents in one row give what each gives in a row of its own."""
    at.claims("mask")
    _packed_rows(at, document_mask)


def _packed_rows(at: Attention, mask_of: Callable[[Tensor], Tensor]) -> None:
    T = at.length
    documents = ((3, T - 3), (1, T - 4, 3))
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in documents]
    ids = here(torch.stack(rows))
    layer, x = at.build(), leaf(at.input(length=ids.shape[1]))
    y = layer(x, mask=mask_of(ids), positions=document_positions(ids))
    cotangent = sample(*y.shape)
    (grad,) = torch.autograd.grad((y * cotangent).sum(), x)
    for row, lengths in enumerate(documents):
        for document in range(len(lengths)):
            kept = ids[row] == document
            _as_alone(layer, x, y, grad, row, kept, cotangent, "a document packed with others")


def _as_alone(
    layer: nn.Module,
    x: Tensor,
    y: Tensor,
    grad: Tensor,
    row: int,
    kept: Tensor,
    cotangent: Tensor,
    what: str,
) -> None:
    """The tokens ``kept`` [T] of a row give alone what they gave in ``y``, gradients too."""
    alone = leaf(x[row : row + 1, kept].detach())
    expected = layer(alone)
    require_equal(y[row : row + 1, kept], expected, what)
    (wanted,) = torch.autograd.grad((expected * cotangent[row : row + 1, kept]).sum(), alone)
    require_equal(grad[row : row + 1, kept], wanted, f"the gradient of {what}")
