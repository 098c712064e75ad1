"""``check_plugin`` finds what is wrong with a plugin, and only that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from apt_core.testing import check_plugin

if TYPE_CHECKING:
    from tests.testing.conftest import WritePlugin

OBSERVER = "@hookimpl\ndef on_step_end(step, loss, trainer):\n    {body}\n"
ATTENTION = """\
class Layer(nn.Module):
    def __init__(self, d_model, num_heads, max_seq_len=16, position=None, **others):
        super().__init__()
        self.mix = nn.Linear(d_model, d_model, bias=False)
        self.calls = 0

    def forward(self, x, *, mask=None, positions=None, cache=None):
        T = x.shape[1]
        if cache is not None:
            x = cache.append(x[:, None], x[:, None])[0][:, 0]
        seen = torch.ones(T, x.shape[1], dtype=torch.bool).tril(x.shape[1] - T)
        if mask is not None:
            seen = seen & mask
        {body}


class Mine:
    def __init__(self, config):
        pass

    def create_layer(self, d_model, num_heads, **options):
        return Layer(d_model, num_heads, **options)


@hookimpl
def apt_register_providers():
    return [ProviderSpec("attention", "mine", Mine)]
"""
MEAN = "weights = seen.float() / seen.sum(-1, keepdim=True)"
FFN = """\
class Layer(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)

    def forward(self, x):
        {body}


class Mine:
    def __init__(self, config):
        pass

    def create_layer(self, d_model, d_ff, dropout=0.0):
        return Layer(d_model, d_ff)


@hookimpl
def apt_register_providers():
    return [ProviderSpec("ffn", "mine", Mine)]
"""


def failed(reference: str) -> dict[str, str]:
    """What was found to be wrong: the check and its detail."""
    return {finding.check: finding.detail for finding in check_plugin(reference) if not finding.ok}


def test_a_good_observer_passes(write: WritePlugin) -> None:
    findings = check_plugin(write(OBSERVER.format(body="loss.item()")))
    assert [finding.check for finding in findings] == [
        "loads",
        "trains",
        "leaves the weights alone",
    ]
    assert all(finding.ok for finding in findings)


@pytest.mark.parametrize(
    "body",
    [
        "next(trainer.model.parameters()).data.mul_(1.0001)",
        "trainer.optimizer.param_groups[0]['initial_lr'] *= 2",
    ],
)
def test_an_observer_that_changes_the_weights_is_caught(write: WritePlugin, body: str) -> None:
    assert failed(write(OBSERVER.format(body=body))) == {
        "leaves the weights alone": "the weights differ from a run without the plugin"
    }


def test_an_observer_that_draws_random_numbers_is_not(write: WritePlugin) -> None:
    assert failed(write(OBSERVER.format(body="torch.manual_seed(step), torch.rand(3)"))) == {}


def test_a_hook_that_acts_on_the_weights_may(write: WritePlugin) -> None:
    plugin = write(
        "@hookimpl\ndef apt_loss_terms(output):\n"
        "    return {'z': 1e-2 * output.logits.square().mean()}\n"
    )
    findings = check_plugin(Path(plugin))
    assert [(finding.check, finding.ok) for finding in findings] == [
        ("loads", True),
        ("trains", True),
    ]


@pytest.mark.parametrize(
    ("source", "check", "said"),
    [
        ("import no_such_thing\n", "loads", "No module named 'no_such_thing'"),
        ("@hookimpl\ndef on_step_ends(step): pass\n", "loads", "did you mean 'on_step_end'?"),
        (OBSERVER.format(body="1 / 0"), "trains", "ZeroDivisionError"),
        (
            "@hookimpl\ndef apt_register_providers():\n"
            "    return [ProviderSpec('ffn', 'default', 'x:y')]\n",
            "providers",
            "ffn:default is registered by both 'core' and 'mine'",
        ),
        (
            "@hookimpl\ndef apt_register_providers():\n"
            "    return [ProviderSpec('ffn', 'mine', 'no_such_module:Mine')]\n",
            "ffn:mine",
            "No module named 'no_such_module'",
        ),
    ],
)
def test_a_plugin_that_does_not_work_is_reported_with_the_reason(
    write: WritePlugin, source: str, check: str, said: str
) -> None:
    assert said in failed(write(source))[check]


def test_a_plugin_that_is_not_there_is_reported(folder: Path) -> None:
    assert "there is no file gone.py" in failed("gone.py")["loads"]


def test_a_provider_whose_package_is_missing_is_left_out(write: WritePlugin) -> None:
    source = FFN.format(body="return self.down(self.up(x))")
    plugin = write(source.replace("Mine)]", "Mine, requires=('no-such-package',))]"))
    findings = {finding.check: finding for finding in check_plugin(plugin)}
    assert findings["ffn:mine"].ok and findings["ffn:mine"].detail.startswith("left out: ")
    assert "ffn:mine, shape" not in findings


# What a layer must do


def test_a_causal_attention_passes(write: WritePlugin) -> None:
    assert (
        failed(write(ATTENTION.format(body=f"{MEAN}\n        return weights @ self.mix(x)"))) == {}
    )


@pytest.mark.parametrize(
    ("body", "checks"),
    [
        (
            "return self.mix(x.mean(1, keepdim=True).expand(-1, T, -1))",
            {"causal", "mask", "cache"},
        ),
        (f"seen = torch.ones_like(seen).tril(x.shape[1] - T)\n        {MEAN}\n"
         "        return weights @ self.mix(x)", {"mask"}),
        (f"seen = seen.tril()\n        {MEAN}\n        return weights @ self.mix(x)", {"cache"}),
        (f"{MEAN}\n        return (weights @ self.mix(x))[..., :-1]", {"shape"}),
        (f"{MEAN}\n        return weights @ self.mix(x.detach())", {"gradients", "causal", "mask"}),
        (f"{MEAN}\n        self.calls += 1\n        return weights @ self.mix(x) * self.calls",
         {"deterministic", "mask", "cache"}),
        (f"{MEAN}\n        return weights @ self.mix(x) + torch.rand(())",
         {"deterministic", "mask", "cache", "state dict"}),
    ],
)  # fmt: skip
def test_an_attention_that_breaks_its_contract_is_caught(
    write: WritePlugin, body: str, checks: set[str]
) -> None:
    found = failed(write(ATTENTION.format(body=body)))
    wrong = {check.removeprefix("attention:mine, ") for check in found}
    assert wrong - {"trains"} == checks


def test_an_attention_that_forgets_the_mask_names_the_argument(write: WritePlugin) -> None:
    source = ATTENTION.format(body=f"{MEAN}\n        return weights @ self.mix(x)")
    call = "x, *, mask=None, positions=None, cache=None):"
    found = failed(write(source.replace(call, "x):\n        mask = cache = None")))
    assert "unexpected keyword argument 'mask'" in found["attention:mine, mask"]
    assert "unexpected keyword argument" in found["attention:mine, trains"]


@pytest.mark.parametrize(
    ("body", "checks"),
    [
        ("return self.down(self.up(x).relu())", set()),
        ("return self.down(self.up(x + x.mean(1, keepdim=True)))", {"token-wise"}),
        ("return self.down(self.up(x).cumsum(1))", {"token-wise"}),
        ("return self.up(x)", {"shape"}),
        ("return self.down(self.up(x).detach())", {"gradients"}),
    ],
)
def test_a_feed_forward_that_breaks_its_contract_is_caught(
    write: WritePlugin, body: str, checks: set[str]
) -> None:
    found = failed(write(FFN.format(body=body)))
    assert {f"ffn:mine, {check}" for check in checks} <= found.keys()
    assert bool(found) == bool(checks)
