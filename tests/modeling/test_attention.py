"""Every attention of the core against its formula, and what each of them promises."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from apt_core.modeling import document_mask, document_positions, padding_mask, padding_positions

B, T, D, H = 2, 6, 32, 4
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def tokens(length=T, batch=B):
    return torch.randn(batch, length, D, dtype=torch.float64)


def turned(vector, place, theta=10_000.0):
    """RoPE of one vector: number i of R/2 complex ones, times e^(1j * place * theta^(-2i/R))."""
    half = len(vector) // 2
    turns = [cmath.exp(1j * place * theta ** (-2 * i / len(vector))) for i in range(half)]
    result = torch.complex(vector[:half], vector[half:]) * torch.tensor(turns, dtype=torch.cdouble)
    return torch.cat([result.real, result.imag])


def rms_normed(vector, eps):
    return vector / (vector.square().mean() + eps).sqrt()


def softmax_attention(p, x, kv_heads, mask=None, places=None):
    """One token, head and key at a time: MHA, GQA, MQA and TVA by definition, [B, T, D].

    ``p`` are parameters by name, ``mask`` [B, H, T, T] narrows causality, and ``places`` [B, T] are
    the positions of RoPE, or None without it.
    """
    d_h = D // H
    compress = p.get("compress", torch.eye(d_h, dtype=x.dtype))
    lift = p.get("lift", torch.eye(d_h, dtype=x.dtype))
    rank = len(compress)
    w_q, w_k, w_v = (
        rows.split(d_h) for rows in p["qkv_weight"].split([D, kv_heads * d_h, kv_heads * d_h])
    )

    def directed(vector, norm, b, t):
        if norm in p:
            vector = rms_normed(vector, 1e-8) * p[norm]
        return vector if places is None else turned(vector, int(places[b, t]))

    result = []
    for b in range(len(x)):
        keys = [
            [directed(compress @ (w @ token), "k_norm.weight", b, t) for w in w_k]
            for t, token in enumerate(x[b])
        ]
        values = [[compress @ (w @ token) for w in w_v] for token in x[b]]
        for t, token in enumerate(x[b]):
            heads = []
            for h in range(H):
                group = h * kv_heads // H
                query = directed(compress @ (w_q[h] @ token), "q_norm.weight", b, t)
                seen = [s for s in range(t + 1) if mask is None or mask[b, h, t, s]]
                odds = [torch.exp(query @ keys[s][group] / math.sqrt(rank)) for s in seen]
                mixed = torch.zeros(rank, dtype=x.dtype)
                for odd, s in zip(odds, seen, strict=True):
                    mixed = mixed + odd / sum(odds) * values[s][group]
                heads.append(lift @ mixed)
            result.append(p["out_weight"] @ torch.cat(heads))
    return torch.stack(result).view_as(x)


def compensator(p, x):
    """The normal compensator, one token and one direction at a time, [B, T, D]."""
    raw = p["compensator.basis"]
    basis = []
    for column in raw.T:
        for other in basis:
            column = column - (column @ other) * other
        basis.append(column / column.norm())
    m = len(basis)
    width = math.sqrt(m / (2 * D * (D + 2)))
    theta = math.sqrt(1 - m / D) + width * p["compensator.threshold"][0]
    result = []
    for token in x.reshape(-1, D):
        n = rms_normed(token, 1e-6)
        normal = n
        for q in basis:
            normal = normal - (n @ q) * q
        inside = sum((n @ q) ** 2 for q in basis)
        eps = torch.sqrt(1 - inside / (n @ n))
        opened = torch.sigmoid((eps - theta) / width)
        y = torch.zeros(D, dtype=x.dtype)
        for s, direction in enumerate(p["compensator.out_weight"]):
            chosen = torch.sigmoid(
                n @ p["compensator.gate_weight"][s] + p["compensator.gate_bias"][s]
            )
            y = y + opened * chosen * (normal @ p["compensator.normal_weight"][s]) * direction
        result.append(y)
    return torch.stack(result).view_as(x)


def tva(p, x, kv_heads, mask, places):
    y = softmax_attention(p, x, kv_heads, mask, places)
    return y + compensator(p, x) if "compensator.basis" in p else y


FORMULAS = {"mha": softmax_attention, "tva_default": tva}


def test_every_attention_of_the_core_is_in_the_table_and_has_a_formula(shelf, proven_names):
    names = {name for kind, name in shelf.known if kind == "attention"}
    assert names == proven_names == FORMULAS.keys()


def hidden_key():
    mask = torch.ones(B, 1, 1, T, dtype=torch.bool)
    mask[1, ..., 2] = False
    return mask


def blind_token():
    mask = torch.rand(B, H, T, T) < 0.7
    mask[0, :, 3] = False
    return mask


PLACES = torch.tensor([[0, 1, 2, 0, 1, 2], [3, 4, 5, 9, 10, 11]])


@pytest.mark.parametrize(
    ("mask", "positions", "rope"),
    [
        (None, None, True),
        (None, None, False),
        (None, PLACES, True),
        (hidden_key, PLACES[1], True),
        (blind_token, PLACES, True),
    ],
    ids=["plain", "without rope", "places", "hidden key", "mask per head, one token blind"],
)
def test_the_layer_equals_its_formula_token_by_token(attention, mask, positions, rope):
    layer = attention.layer(rope=rope)
    mask = None if mask is None else mask()
    theirs = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x = tokens().requires_grad_()
    theirs["x"] = x.detach().clone().requires_grad_()
    places = torch.arange(T) if positions is None else positions
    expected = FORMULAS[attention.name](
        theirs,
        theirs["x"],
        attention.num_kv_heads or H,
        None if mask is None else mask.expand(B, H, T, T),
        places.expand(B, T) if rope else None,
    )
    y = layer(x, mask=mask, positions=positions)
    torch.testing.assert_close(y, expected, **EXACT)
    ours = {"x": x, **dict(layer.named_parameters())}
    direction = torch.randn_like(y)
    wanted = torch.autograd.grad(expected, list(theirs.values()), direction)
    for (name, value), gradient in zip(theirs.items(), wanted, strict=True):
        (got,) = torch.autograd.grad(y, ours[name], direction, retain_graph=True)
        assert value.shape == got.shape
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(got, gradient, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("masked", [False, True])
def test_no_gradient_reaches_a_later_token(attention, masked):
    layer, x = attention.layer(), tokens(9).requires_grad_()
    mask = torch.ones(B, 1, 9, 9, dtype=torch.bool) if masked else None
    y = layer(x, mask=mask)
    for t in range(9):
        (gradient,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert gradient[:, t + 1 :].abs().sum() == 0
        assert (gradient[:, : t + 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 5], [3, 1, 5], [8, 1]], ids=str)
def test_feeding_a_sequence_in_pieces_gives_the_whole(attention, pieces):
    layer, x = attention.layer(), tokens(9)
    cache = layer.create_cache(9)
    with torch.no_grad():
        parts = [layer(part, cache=cache) for part in x.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), **EXACT)
    assert cache.length == 9


def test_a_cache_serves_masks_and_positions_too(attention):
    layer, x = attention.layer(), tokens(9)
    is_token = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    mask, positions = padding_mask(is_token), padding_positions(is_token)
    cache, parts = layer.create_cache(9), []
    with torch.no_grad():
        for start, end in ((0, 4), (4, 5), (5, 8), (8, 9)):
            seen = {"mask": mask[..., :end], "positions": positions[:, start:end]}
            parts.append(layer(x[:, start:end], cache=cache, **seen))
    whole = layer(x, mask=mask, positions=positions)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **EXACT)


def test_packed_documents_give_what_each_gives_alone(attention):
    layer, x = attention.layer(), tokens(9)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [7, 7, 7, 7, 7, 7, 3, 3, 3]])
    packed = layer(x, mask=document_mask(documents), positions=document_positions(documents))
    for row, ends in enumerate([(3, 5, 9), (6, 9)]):
        for start, end in zip((0, *ends), ends, strict=False):
            alone = layer(x[row : row + 1, start:end])
            torch.testing.assert_close(packed[row : row + 1, start:end], alone, **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_text_gives_what_it_gives_alone(attention, side):
    layer, x = attention.layer(), tokens(9)
    is_token = torch.ones(B, 9, dtype=torch.bool)
    kept = slice(4, 9) if side == "left" else slice(0, 5)
    is_token[1] = False
    is_token[1, kept] = True
    padded = layer(x, mask=padding_mask(is_token), positions=padding_positions(is_token))
    torch.testing.assert_close(padded[:1], layer(x[:1]), **EXACT)
    torch.testing.assert_close(padded[1:, kept], layer(x[1:, kept]), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_sees_nothing_gets_nothing_from_the_others(attention, dtype):
    layer, x = attention.layer(dtype=dtype), tokens().to(dtype).requires_grad_()
    mask = torch.ones(B, 1, T, T, dtype=torch.bool)
    mask[0, 0, 3] = mask[1] = False
    y = layer(x, mask=mask)
    own = layer.compensator(x) if attention.settings.get("s") else torch.zeros_like(x)
    torch.testing.assert_close(y[0, 3], own[0, 3], rtol=0, atol=0)
    torch.testing.assert_close(y[1], own[1], rtol=0, atol=0)
    y.square().sum().backward()
    for name, value in [("x", x), *layer.named_parameters()]:
        assert value.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("dtype", "autocast", "size"),
    [(torch.float32, False, 4), (torch.bfloat16, False, 2), (torch.float32, True, 2)],
)
def test_a_cache_takes_the_bytes_that_the_provider_tells(attention, dtype, autocast, size):
    layer = attention.layer(dtype=dtype)
    cache = layer.create_cache(16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        layer(tokens().to(dtype), cache=cache)
    told = attention.provider().kv_cache_bytes(
        D, H, 16, num_kv_heads=attention.num_kv_heads, bytes_per_value=size
    )
    assert cache.nbytes == B * told


def test_dropout_acts_in_training_alone(attention):
    layer, x = attention.layer(dropout=0.5), tokens()
    whole = attention.layer()(x)
    torch.testing.assert_close(layer.eval()(x), whole, rtol=0, atol=0)
    first, second = layer.train()(x), layer(x)
    assert not torch.allclose(first, second, atol=1e-3)
    assert not torch.allclose(first, whole, atol=1e-3)


def test_attention_depends_on_distance_alone(attention):
    layer, x = attention.layer(), tokens()
    places = torch.arange(T)
    torch.testing.assert_close(layer(x), layer(x, positions=places + 5), **EXACT)
    assert not torch.allclose(layer(x), layer(x, positions=places * 2), atol=1e-3)


def test_bf16_autocast_stays_near_fp32(attention, autocast_errors):
    layer = attention.layer(64, dtype=torch.float32, max_seq_len=64)
    of_output, of_gradients = autocast_errors(layer, torch.randn(2, 64, 64))
    # Seen: at most 0.0086 and 0.0109, four to six roundings to bf16's 8 bits in a row. Nothing
    # rounded at all would be no test.
    assert 0.001 < of_output < 0.02
    assert max(of_gradients.values()) < 0.025, of_gradients


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.zeros(T, T), r"mask is boolean .* not torch.float32"),
        (torch.ones(T, T, dtype=torch.int64), r"mask is boolean .* not torch.int64"),
        (
            torch.ones(T, T + 1, dtype=torch.bool),
            r"shape \[6, 7\] .* \[2, 4, 6, 6\]: give \[T, S\]",
        ),
        (torch.ones(B, T, T, dtype=torch.bool), r"shape \[2, 6, 6\] does not broadcast"),
        (torch.ones(3, 1, T, T, dtype=torch.bool), r"shape \[3, 1, 6, 6\] does not broadcast"),
        (torch.ones(1, B, 1, T, T, dtype=torch.bool), r"shape \[1, 2, 1, 6, 6\] does not"),
    ],
)
def test_a_mask_that_cannot_be_meant_is_refused(attention, mask, said):
    with pytest.raises(ValueError, match=said):
        attention.layer()(tokens(), mask=mask)


@pytest.mark.parametrize("shape", [(), (1,), (T,), (1, T), (B, 1, 1, T)])
def test_one_query_takes_a_mask_of_any_form(attention, shape):
    layer, x = attention.layer(), tokens()
    cache, mask = layer.create_cache(T), torch.ones(shape, dtype=torch.bool)
    with torch.no_grad():
        layer(x[:, :-1], cache=cache)
        last = layer(x[:, -1:], mask=mask, cache=cache)
    torch.testing.assert_close(last, layer(x)[:, -1:], **EXACT)


def test_a_mask_must_cover_what_the_cache_holds(attention):
    layer = attention.layer()
    cache = layer.create_cache(16)
    with torch.no_grad():
        layer(tokens(), cache=cache)
        with pytest.raises(ValueError, match=r"shape \[6, 6\] .* \[2, 4, 6, 12\]"):
            layer(tokens(), cache=cache, mask=torch.ones(T, T, dtype=torch.bool))


def test_a_sequence_that_is_too_long_names_the_setting(attention):
    layer = attention.layer(max_seq_len=8)
    said = r"9 tokens is longer than model.max_seq_len 8: shorten it or raise the setting"
    with pytest.raises(ValueError, match=said):
        layer(tokens(9))
    cache = layer.create_cache(16)
    with torch.no_grad():
        layer(tokens(5), cache=cache)
        with pytest.raises(ValueError, match=said):
            layer(tokens(4), cache=cache)
        assert layer(tokens(3), cache=cache).shape == (B, 3, D)


def test_a_full_cache_says_so_and_stays_as_it_was(attention):
    layer, x = attention.layer(), tokens(8)
    cache = layer.create_cache(8)
    with torch.no_grad():
        first = layer(x[:, :5], cache=cache)
        with pytest.raises(ValueError, match="cache for 8 tokens cannot hold 9: create a longer"):
            layer(tokens(4), cache=cache)
        rest = layer(x[:, 5:], cache=cache)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), layer(x), **EXACT)


@pytest.mark.parametrize(
    ("sizes", "kv_heads", "said"),
    [
        (
            (30, 4),
            None,
            "model.d_model 30 is not divisible by model.num_heads 4: choose a multiple",
        ),
        ((32, 0), None, "model.d_model 32 is not divisible by model.num_heads 0"),
        ((0, 4), None, "model.d_model 0 is not divisible"),
        (
            (32, 4),
            3,
            "model.num_heads 4 is not divisible by model.num_kv_heads 3: choose a divisor",
        ),
        ((32, 4), 8, "model.num_heads 4 is not divisible by model.num_kv_heads 8"),
        ((32, 4), 0, "model.num_heads 4 is not divisible by model.num_kv_heads 0"),
    ],
)
@pytest.mark.parametrize("name", ["mha", "tva_default"])
def test_heads_that_do_not_divide_are_refused_when_built(attention_of, name, sizes, kv_heads, said):
    with pytest.raises(ValueError, match=said):
        attention_of(name, num_kv_heads=kv_heads).layer(*sizes)


@pytest.mark.parametrize(
    ("name", "settings", "sizes"),
    [
        ("mha", {}, (12, 4)),
        ("tva_default", {"rank": 3}, (32, 4)),
        ("tva_default", {"r": 4}, (48, 4)),
    ],
)
def test_an_odd_width_cannot_be_turned_and_needs_no_turning(attention_of, name, settings, sizes):
    odd = attention_of(name, settings)
    said = r"head width 3 is odd: choose an even width .*model.tva.r or .rank.* model.position_name"
    with pytest.raises(ValueError, match=said):
        odd.layer(*sizes)
    layer = odd.layer(*sizes, rope=False)
    assert layer(torch.randn(1, 3, sizes[0], dtype=torch.float64)).shape == (1, 3, sizes[0])


@pytest.mark.parametrize("key", ["qk_nrom", "r"])
def test_an_unknown_setting_of_mha_is_refused(attention_of, key):
    with pytest.raises(ValueError, match=rf"model.mha.{key}: unknown key"):
        attention_of("mha", {key: True}).layer()
