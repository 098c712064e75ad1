"""The objective: what its terms are, to whom their gradients go, and in how little memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from apt_core.data.packing.rows import IGNORED
from apt_core.plugin_manager import PluginManager
from apt_core.registry import Registry
from apt_plugins.align import plugin
from apt_plugins.align.divergence import divergence_sum
from apt_plugins.align.objective import BistateProvider, info_nce

TERMS = ("kl", "info_nce")


def naive_divergence(live, stable, counts):
    live, stable = (logits.double().log_softmax(-1) for logits in (live, stable))
    return (stable.exp() * (stable - live)).sum(-1)[counts].sum()


def contrast_by_hand(live, stable, counts, vein, tau):
    """One token at a time, in plain Python."""

    def states(hidden):
        reads = [(vein.T @ row).tolist() for row in hidden.flatten(0, 1)]
        return [[x / math.hypot(*read) for x in read] for read in reads]

    a, s = states(live.detach()), states(stable.detach())
    rows = [n for n, counted in enumerate(counts.tolist()) if counted]
    total = 0.0
    for row in rows:
        scores = {
            other: sum(x * y for x, y in zip(a[row], s[other], strict=True)) / tau for other in rows
        }
        total += math.log(sum(math.exp(score) for score in scores.values())) - scores[row]
    return total / len(rows)


def test_kl_of_equal_states_is_0_and_the_contrast_is_finite(two_states):
    live, _, targets, vein = two_states(torch.float32)
    terms = BistateProvider().terms(live, live, targets, vein=vein)
    assert terms["kl"].item() == 0
    assert 0 < terms["info_nce"].item() < math.log(10)
    (gradient,) = torch.autograd.grad(terms["kl"], live.logits)
    assert gradient.abs().max() == 0


def test_terms_are_what_the_formula_says(two_states):
    live, stable, targets, vein = two_states()
    counts = (targets != IGNORED).flatten()
    settings = {"alpha": 0.7, "beta": 0.3, "tau_align": 0.5}
    terms = BistateProvider(settings).terms(live, stable, targets, vein=vein)
    divergence = F.kl_div(
        live.logits.log_softmax(-1).flatten(0, 1)[counts],
        stable.logits.softmax(-1).flatten(0, 1)[counts],
        reduction="batchmean",
    )
    contrast = contrast_by_hand(live.hidden, stable.hidden, counts, vein, 0.5)
    assert terms["kl"].item() == pytest.approx(0.7 * divergence.item(), rel=1e-12)
    assert terms["info_nce"].item() == pytest.approx(0.3 * contrast, rel=1e-12)


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("name", TERMS)
def test_the_stable_state_gets_a_gradient_only_where_both_are_pulled(two_states, name, mutual):
    live, stable, targets, vein = two_states()
    vein.requires_grad_()
    term = BistateProvider().terms(live, stable, targets, vein=vein, mutual=mutual)[name]
    term.backward()
    field = "logits" if name == "kl" else "hidden"
    assert getattr(live, field).grad.abs().sum() > 0
    assert (getattr(stable, field).grad is not None) == mutual
    assert vein.grad is None


def test_mutual_terms_do_not_tell_the_states_apart(two_states):
    live, stable, targets, vein = two_states()
    one = BistateProvider().terms(live, stable, targets, vein=vein, mutual=True)
    other = BistateProvider().terms(stable, live, targets, vein=vein, mutual=True)
    for name in TERMS:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=0)
    there = BistateProvider().terms(live, stable, targets, vein=vein)
    back = BistateProvider().terms(stable, live, targets, vein=vein)
    for name in TERMS:
        torch.testing.assert_close(one[name], (there[name] + back[name]) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_divergence_in_chunks_is_the_divergence_in_value_and_gradients(two_states, rows):
    live, stable, targets, _ = two_states()
    live, stable = (output.logits.flatten(0, 1) for output in (live, stable))
    counts = (targets != IGNORED).flatten()
    chunked = divergence_sum(live, stable, counts, chunk_elements=rows * live.shape[-1])
    expected = naive_divergence(live, stable, counts)
    torch.testing.assert_close(chunked, expected, rtol=1e-13, atol=0)
    gradients = torch.autograd.grad(3 * chunked, (live, stable))
    naive = torch.autograd.grad(3 * expected, (live, stable))
    torch.testing.assert_close(gradients, naive, rtol=1e-12, atol=1e-15)
    assert gradients[0][~counts].abs().max() == gradients[1][~counts].abs().max() == 0


def test_objective_passes_gradcheck(two_states):
    live, stable, targets, vein = two_states(length=5, vocab=4)

    def terms(*tensors):
        states = [type(live)(*tensors[:2]), type(live)(*tensors[2:])]
        return tuple(BistateProvider().terms(*states, targets, vein=vein, mutual=True).values())

    inputs = (live.logits, live.hidden, stable.logits, stable.hidden)
    assert torch.autograd.gradcheck(terms, inputs)


def test_bf16_outputs_are_compared_in_fp32(two_states):
    live, stable, targets, vein = two_states(torch.bfloat16)
    terms = BistateProvider().terms(live, stable, targets, vein=vein)
    wide = [type(live)(o.logits.detach().double(), o.hidden.detach().double())
            for o in (live, stable)]  # fmt: skip
    expected = BistateProvider().terms(*wide, targets, vein=vein)
    for name in TERMS:
        assert terms[name].dtype == torch.float32
        assert terms[name].item() == pytest.approx(expected[name].item(), rel=1e-5)
    sum(terms.values()).backward()
    assert live.logits.grad.dtype == live.hidden.grad.dtype == torch.bfloat16


def test_probabilities_do_not_all_exist_at_once():
    """Of the size of all the logits, nothing is made but the gradient."""
    tokens, vocab, rows = 64, 32, 4

    made = []

    class LargeOnes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            is_new = not function.is_view and not function._schema.is_mutable
            if is_new and isinstance(result, torch.Tensor) and result.numel() > rows * vocab:
                made.append(function.name())
            return result

    live, stable = (torch.randn(tokens, vocab, requires_grad=grad) for grad in (True, False))
    with LargeOnes():
        divergence_sum(live, stable, torch.ones(tokens), chunk_elements=rows * vocab).backward()
    assert made == ["aten::empty_like"]


def test_what_does_not_count_changes_nothing(two_states):
    live, stable, targets, vein = two_states()
    ignored = (targets == IGNORED).unsqueeze(-1)
    other = type(live)(
        live.logits.masked_fill(ignored, 9.0), live.hidden.masked_fill(ignored, -5.0)
    )
    before = BistateProvider().terms(live, stable, targets, vein=vein)
    after = BistateProvider().terms(other, stable, targets, vein=vein)
    assert {name: term.item() for name, term in before.items()} == {
        name: term.item() for name, term in after.items()
    }


def test_a_micro_batch_without_targets_gives_zeros_and_no_nan(two_states):
    live, stable, targets, vein = two_states()
    terms = BistateProvider().terms(live, stable, torch.full_like(targets, IGNORED), vein=vein)
    assert [term.item() for term in terms.values()] == [0, 0]
    sum(terms.values()).backward()
    assert live.logits.grad.abs().max() == live.hidden.grad.abs().max() == 0


def test_the_contrast_takes_a_bounded_number_of_tokens_evenly(two_states):
    live, stable, targets, vein = two_states(batch=3, length=8)
    counts = (targets != IGNORED).flatten()
    few = info_nce(live.hidden, stable.hidden, counts, vein, 0.2, max_tokens=6)
    places = counts.nonzero().flatten()
    taken = places[torch.arange(6) * len(places) // 6]
    picked = [hidden.flatten(0, 1)[taken].unsqueeze(0) for hidden in (live.hidden, stable.hidden)]
    expected = info_nce(*picked, counts[taken], vein, 0.2)
    assert few.item() == expected.item()
    assert few.item() != info_nce(live.hidden, stable.hidden, counts, vein, 0.2).item()


@pytest.mark.parametrize("length", [8, 30])
def test_padding_leaves_the_tokens_of_the_contrast_as_they_are(two_states, length):
    """Whether fewer tokens count than are taken, as many, or more."""
    live, stable, targets, vein = two_states(batch=3, length=8)
    counts = targets != IGNORED
    number = int(counts.sum())

    def padded(hidden):
        return F.pad(hidden, (0, 0, 0, length))

    for most in (number - 7, number, number + 2):
        few = info_nce(
            live.hidden, stable.hidden, counts.flatten(), vein, 0.2, max_tokens=most, mutual=True
        )
        wide = F.pad(counts, (0, length)).flatten()
        hidden = padded(live.hidden), padded(stable.hidden)
        again = info_nce(*hidden, wide, vein, 0.2, max_tokens=most, mutual=True)
        assert again.item() == pytest.approx(few.item(), rel=1e-12)
        gradients = [
            torch.autograd.grad(term, [live.hidden, stable.hidden], retain_graph=True)
            for term in (few, again)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_only_the_span_of_the_vein_matters(two_states):
    live, stable, targets, vein = two_states()
    turned = vein @ torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    before, after = (
        BistateProvider().terms(live, stable, targets, vein=basis)["info_nce"].item()
        for basis in (vein, turned)
    )
    assert before == pytest.approx(after, rel=1e-12)


def test_a_contrast_without_a_vein_is_refused_with_the_remedy(two_states):
    live, stable, targets, vein = two_states()
    with pytest.raises(ValueError, match=r"model\.bistate\.beta.*set model\.tva\.s to 1"):
        BistateProvider().terms(live, stable, targets)
    assert list(BistateProvider({"beta": 0.0}).terms(live, stable, targets)) == ["kl"]
    assert list(BistateProvider({"alpha": 0.0}).terms(live, stable, targets, vein=vein)) == [
        "info_nce"
    ]


def test_the_registry_builds_the_objective_in_a_plain_script(strict_registry):
    provider = strict_registry.get("align", "bistate_default", {"alpha": 0.5})
    assert provider.settings.alpha == 0.5
    assert not provider.validate_config({"alpah": 0.5})


@pytest.fixture
def strict_registry():
    manager = PluginManager()
    manager.register(plugin, "align")
    return Registry(manager)
