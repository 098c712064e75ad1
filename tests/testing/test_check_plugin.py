"""``check_plugin`` finds what is wrong with a plugin, and only that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from apt_core import ConfigError
from apt_core.cli.hooks import app
from apt_core.cli.run_command import run_command
from apt_core.defaults import core_providers
from apt_core.testing import check_plugin

if TYPE_CHECKING:
    from tests.testing.conftest import WritePlugin

pytestmark = pytest.mark.long

OBSERVER = "@hookimpl\ndef on_step_end(step, loss, trainer):\n    {body}\n"
ATTENTION = """\
class Layer(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.mix = nn.Linear(d_model, d_model)

    def forward(self, x):
        return self.mix(x).cumsum(1)


class Mine:
    def __init__(self, config):
        pass

    def create_layer(self, d_model, num_heads, **options):
        return Layer(d_model)


@hookimpl
def apt_register_providers():
    return [ProviderSpec("attention", "mine", Mine)]
"""
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


SHIFT = """
@hookimpl
def apt_transform_model(model):
    from apt_core.modeling import Carried, ModelTransform

    class Shift(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.shift = inner, nn.Parameter(torch.empty(model.d_model))

        def init_parameter(self, name, tensor, generator, *, num_layers):
            tensor.zero_()
            return True

        def forward(self, x):
            return self.inner(x) + self.shift

    ffn = model.blocks[0].ffn
    names = [name for name, _ in ffn.named_parameters()]
    model.blocks[0].ffn = Shift(ffn)
    origins = {f"blocks.0.ffn.inner.{n}": Carried(f"blocks.0.ffn.{n}") for n in names}
    return ModelTransform(model, origins)
"""


def test_a_plugin_that_changes_the_model_need_not_leave_the_weights_alone(
    write: WritePlugin,
) -> None:
    findings = check_plugin(write(SHIFT))
    assert [(finding.check, finding.ok) for finding in findings] == [
        ("loads", True),
        ("trains", True),
    ]


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
    assert findings["ffn:mine"].result == "left out"
    assert "no-such-package" in findings["ffn:mine"].detail
    assert "ffn:mine, shape" not in findings


# What a layer must do


def test_a_good_feed_forward_passes_every_check(write: WritePlugin) -> None:
    findings = check_plugin(write(FFN.format(body="return self.down(self.up(x).relu())")))
    results = {finding.check: finding.result for finding in findings}
    assert set(results.values()) == {"ok", "left out"}
    left_out = [name for name, result in results.items() if result == "left out"]
    assert left_out == ["ffn:mine, flops", "ffn:mine, plain form"]
    assert results["ffn:mine, token-wise"] == results["ffn:mine, trains"] == "ok"


def test_a_feed_forward_that_mixes_tokens_is_told_where(write: WritePlugin) -> None:
    found = failed(write(FFN.format(body="return self.down(self.up(x).cumsum(1))")))
    detail = "the output at [1, 3] depends on the input at [1, 0]"
    assert found == {"ffn:mine, token-wise": detail}


def test_an_attention_that_forgets_the_mask_names_the_argument(write: WritePlugin) -> None:
    found = failed(write(ATTENTION))
    assert "unexpected keyword argument 'mask'" in found["attention:mine, mask"]
    assert "unexpected keyword argument" in found["attention:mine, trains"]


CHUNKED = """\
from apt_core import SectionSpec
from apt_core.config import Section


class Settings(Section):
    chunk: int = {chunk}


class Layer(nn.Module):
    def __init__(self, d_model, d_ff, chunk):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)
        self.chunk = chunk

    def forward(self, x):
        y = self.down(self.up(x).relu())
        return y + y[:, self.chunk :].sum(1, keepdim=True) if x.ndim == 3 else y


class Mine:
    def __init__(self, config):
        self.config = config

    def create_layer(self, d_model, d_ff, dropout=0.0):
        return Layer(d_model, d_ff, self.config.chunk)


@hookimpl
def apt_register_config():
    return [SectionSpec("mine", Settings)]


@hookimpl
def apt_register_providers():
    return [ProviderSpec("ffn", "mine", Mine, config=Settings, section="mine")]
"""


def test_a_provider_is_checked_with_the_settings_that_are_given(
    write: WritePlugin, folder: Path
) -> None:
    """And on texts that are longer than they say."""
    plugin = write(CHUNKED.format(chunk=600))
    findings = {finding.check: finding for finding in check_plugin(plugin)}
    assert all(finding.ok for finding in findings.values())
    assert "longer than chunk 600" in findings["ffn:mine, long settings"].detail
    (folder / "mine.yaml").write_text(
        "name: mine\nplugins: [mine.py]\nmodel: {d_model: 16, num_heads: 2, num_layers: 1, "
        "d_ff: 32, vocab_size: 256, max_seq_len: 16}\nmine: {chunk: 70}\n"
    )
    found = {f.check: f for f in check_plugin(plugin, profile=folder / "mine.yaml")}
    assert [name for name, finding in found.items() if not finding.ok] == ["ffn:mine, token-wise"]
    assert "ffn:mine, long settings" not in found and found["ffn:mine, trains"].ok
    both = {"profile": folder / "mine.yaml", "overrides": {"mine.chunk": 600}}
    assert all(finding.ok for finding in check_plugin(plugin, **both))
    with pytest.raises(ConfigError, match="did you mean 'chunk'"):
        check_plugin(plugin, overrides={"mine.chunks": 5})


def test_settings_are_given_to_the_command(write: WritePlugin, capsys: Any) -> None:
    plugin = write(CHUNKED.format(chunk=600))
    assert (
        run_command(app, "apt-hooks", ["check", plugin, "--set", "mine.chunk=5", "--nproc", "1"])
        == 1
    )
    assert "ffn:mine, token-wise" in capsys.readouterr().out
    assert run_command(app, "apt-hooks", ["check", plugin, "--set", "mine.chunk=x"]) == 2


@pytest.mark.parametrize(
    ("plugin", "key", "value"),
    [("growth", "growth.num_layers", 3), ("to_tva", "model.attention_name", "mha")],
)
def test_settings_that_a_plugin_cannot_do_without_are_given_to_every_run(
    plugin: str, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def differences(plugins: Any, overrides: dict[str, Any]) -> dict[str, str]:
        given.append(overrides)
        return {"ddp": ""}

    monkeypatch.setattr("apt_core.testing.check.differences", differences)
    findings = check_plugin(plugin, overrides={key: value}, processes=2)
    assert [f.result for f in findings] == ["ok"] * len(findings), findings
    (overrides,) = given
    section, _, last = key.rpartition(".")
    assert overrides.get(key, overrides.get(section, {}).get(last)) == value
    assert ("model.tva.s" in overrides) == (plugin == "growth")


def test_what_cannot_be_built_is_one_failure_and_not_one_of_every_check(
    write: WritePlugin,
) -> None:
    source = FFN.format(body="return x").replace("nn.Linear(d_model, d_ff)", "nn.Linear(d_modl)")
    found = failed(write(source))
    assert found == {"ffn:mine, builds": "NameError: name 'd_modl' is not defined"}


def test_a_kind_without_checks_is_named(write: WritePlugin) -> None:
    plugin = write(
        "class Mine:\n    def __init__(self, config):\n        pass\n\n"
        "@hookimpl\ndef apt_register_providers():\n"
        "    return [ProviderSpec('retrieval', 'mine', Mine)]\n"
    )
    findings = {finding.check: finding for finding in check_plugin(plugin)}
    found = findings["retrieval:mine, behaviour"]
    assert (found.ok, found.result) == (True, "left out")
    assert found.detail == "there are no checks of what a provider of kind retrieval does"


# The core


def test_a_provider_of_the_core_is_checked_by_its_name() -> None:
    findings = check_plugin("norm:rmsnorm")
    assert findings[0].check == "norm:rmsnorm, builds"
    assert findings[-1].check == "norm:rmsnorm, trains"
    assert {finding.result for finding in findings} == {"ok"}


def test_a_name_that_the_core_has_not_is_told_those_that_it_has() -> None:
    (finding,) = check_plugin("norm:mine")
    assert not finding.ok and "norm:rmsnorm" in finding.detail


def test_core_stands_for_all_of_its_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt_core.testing.check.tiny_run", lambda *plugins, **options: None)
    monkeypatch.setattr("apt_core.testing.conformance.checks_of", lambda kind, provider: [])
    checked = {finding.check.partition(",")[0] for finding in check_plugin("core")}
    assert checked == {spec.key for spec in core_providers("0")}


# Resumes, and two processes

STEPS = """\
class Plugin:
    def __init__(self):
        self.steps = 0

    @hookimpl
    def on_step_end(self):
        self.steps += 1
"""
HANDS_OVER = """
    @hookimpl
    def apt_state_dict(self):
        return {"steps": self.steps, "n": torch.tensor(self.steps)}

    @hookimpl
    def apt_load_state_dict(self, state):
        self.steps = BACK
"""
FADES = """
    @hookimpl
    def apt_loss_terms(self, output):
        return {"z": 0.1 / (1 + self.steps) * output.logits.square().mean()}
"""
IN_A_MODULE = """\
steps = [0]

@hookimpl
def on_step_end():
    steps[0] += 1

@hookimpl
def on_training_end():
    steps[0] = 0

@hookimpl
def apt_state_dict():
    return {"steps": steps[0]}

@hookimpl
def apt_load_state_dict(state):
    steps[0] = state["steps"]
"""


def test_what_a_resume_would_lose_is_found(
    write: WritePlugin, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = STEPS + HANDS_OVER
    good = write(source.replace("BACK", "state['steps']"), "good")
    findings = {finding.check: finding for finding in check_plugin(good)}
    assert findings["resumes"].ok and all(finding.ok for finding in findings.values())
    found = failed(write(source.replace("BACK", "0"), "forgets"))
    assert found.keys() == {"resumes"}
    assert '"steps": 3' in found["resumes"] and '"steps": 6' in found["resumes"]
    found = failed(write(STEPS + FADES, "fades"))
    assert found == {"resumes": "a run that is resumed after step 3 has other weights after step 6"}
    # Of a module, which keeps what earlier runs have left in it.
    monkeypatch.syspath_prepend(folder)
    write(IN_A_MODULE, "in_a_module")
    assert failed("in_a_module") == {}


def test_state_in_the_modules_of_a_plugin_is_found(
    write: WritePlugin, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = (
        ", which all runs of a process share: keep it on self, in a class that the module calls "
        "Plugin, or behind functools.cache if it depends on the arguments alone"
    )
    *_, found = check_plugin(write(IN_A_MODULE, "mine"))
    assert (found.check, found.result) == ("state in modules", "warning")
    assert found.detail == f"a run changes apt_plugin_mine.steps{share}"
    (folder / "helper_of_mine.py").write_text("last = {}\n")
    beside = (
        "@hookimpl\ndef on_step_end(step, trainer):\n"
        "    import helper_of_mine\n    helper_of_mine.last[trainer] = step\n"
    )
    monkeypatch.syspath_prepend(folder)
    *_, found = check_plugin(write(beside, "with_helper"))
    assert (found.result, found.ok) == ("warning", True)
    assert found.detail == f"a run changes helper_of_mine.last{share}"
    assert [f for f in check_plugin(write(STEPS, "good")) if f.result != "ok"] == []


@pytest.mark.usefixtures("forked")
def test_what_two_processes_would_train_otherwise_is_found(write: WritePlugin) -> None:
    """What each adds to its own loss counts, and what one alone adds is not the run's."""
    plugin = write(
        "@hookimpl\ndef apt_loss_terms(trainer, output):\n"
        "    return {'z': (1 - trainer.rank) * output.logits.square().mean()}\n"
    )
    found = {finding.check: finding for finding in check_plugin(plugin, processes=2)}
    assert found["trains"].ok and list(found)[2:] == ["two processes, ddp", "two processes, fsdp"]
    for name in list(found)[2:]:
        assert not found[name].ok
        assert "in one process of the same micro-batches" in found[name].detail
