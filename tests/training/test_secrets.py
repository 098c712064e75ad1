"""Secrets of a profile are used by the plugin that they are for, and stand nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from apt_core import ConfigError, PluginInfo, SectionSpec, hookimpl
from apt_core.config import Config, json_schema
from apt_core.declarations import declared_by
from apt_core.discovery import installed_plugins
from apt_core.kernel import boot
from apt_core.plugin_manager import PluginManager
from apt_core.secrets import MASK, is_secret_name, mask_urls, redact, without_secrets, words_of
from apt_core.testing import TINY_PROFILE

UPLOADER = """\
import os
from pydantic import BaseModel, SecretStr, field_validator
from apt_core import PluginInfo, SectionSpec, hookimpl

PLUGIN = PluginInfo(observer=True)

class Proxy(BaseModel):
    pin: SecretStr | None = None

class Settings(BaseModel):
    api_key: str = ""
    project: str = "one"
    pins: list[SecretStr] = []
    proxy: Proxy = Proxy()
    by_name: dict[str, SecretStr] = {}
    url: str = ""
    headers: dict[str, str] = {}
    pad_token: str = "<pad>"
    max_tokens: int = 5
    from_outside: SecretStr = SecretStr(os.environ.get("UPLOADER", ""))
    token: str = os.environ.get("UPLOADER", "")

    @field_validator("api_key")
    @classmethod
    def is_key(cls, value):
        if not value.startswith("sk-"):
            raise ValueError(f"{value} is no key")
        return value

@hookimpl
def apt_register_config():
    return [SectionSpec("uploader", Settings)]

@hookimpl
def on_training_start(trainer):
    own = trainer.config.section("uploader")
    with open(os.environ["SEEN"], "a") as file:
        print(own.api_key, own.proxy.pin.get_secret_value(), own.token, file=file)
    raise RuntimeError(f"401 for {own.api_key} ({own.proxy.pin.get_secret_value()}) at {own.url}")
"""

SECRETS = {
    "api_key": "sk-0123456789",
    "pins": ["pin-of-one", "pin-of-two"],
    "proxy": {"pin": "pin-of-proxy"},
    "by_name": {"ann": "pin-of-ann"},
    "url": "postgres://ann:pass-of-ann@host/db?signature=signed-by-ann",
    "headers": {"Authorization": "Bearer of-bad-news"},
}
TOLD = words_of(
    "sk-0123456789 pin-of-one pin-of-two pin-of-proxy pin-of-ann pass-of-ann signed-by-ann "
    "of-bad-news outside-secret"
)


@pytest.fixture
def uploader(profile, tmp_path, monkeypatch) -> Path:
    """A profile with the secrets of a plugin."""
    monkeypatch.setenv("UPLOADER", "outside-secret")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    (tmp_path / "uploader.py").write_text(UPLOADER)
    path = tmp_path / "uploading.yaml"
    mine = {"extends": str(profile), "plugins": ["./uploader.py"], "uploader": SECRETS}
    mine["training"] = {"max_steps": 4, "save_every_steps": 2, "log_every_steps": 1}
    path.write_text(yaml.safe_dump(mine))
    return path


def told_in(folder: Path, *texts: str) -> list[str]:
    """Which secrets stand in a run's files or in texts."""
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    everything = b"\0".join([*files, *(text.encode() for text in texts)])
    return [secret for secret in TOLD if secret.encode() in everything]


def test_secrets_reach_their_plugin_and_nothing_that_is_written(apt_train, uploader, tmp_path):
    key = "--uploader.api_key=sk-of-the-command-line"
    first = apt_train("--stop-at-step", "2", key, of=uploader)
    assert first.code == 0, first.err
    seen = tmp_path / "seen"
    assert seen.read_text() == "sk-of-the-command-line pin-of-proxy outside-secret\n"
    assert "sk-of-the" not in first.out + first.err
    assert told_in(first.folder, first.out, first.err) == []
    stored = yaml.safe_load((first.checkpoints[-1] / "profile.yaml").read_text())["uploader"]
    assert stored["url"] == f"postgres://ann:{MASK}@host/db?signature={MASK}"
    assert (stored["pad_token"], stored["max_tokens"]) == ("<pad>", 5)
    (failure,) = first.manifest["plugins"][0]["failures"]
    assert failure["error"].startswith(f"RuntimeError: 401 for {MASK} ({MASK}) at postgres://ann:")

    strict = apt_train("--resume", "--strict", key, of=uploader)
    assert strict.code == 1 and f"--uploader.api_key={MASK}" in strict.err.replace("'", "")
    assert "sk-of-the" not in strict.err and told_in(strict.folder, strict.out, strict.err) == []
    seen.unlink()

    # Another key, and another setting of what only observes: both may change, one is told.
    on = apt_train("--resume", "--uploader.project", "two", of=uploader)
    assert on.code == 0, on.err
    assert seen.read_text() == "sk-0123456789 pin-of-proxy outside-secret\n"
    assert "uploader.project differs" in on.out and "uploader.api_key" not in on.out
    assert on.manifest["step"] == 4 and told_in(on.folder, on.out, on.err) == []

    # What a run has stored is no profile to start with: its masks are not handed on.
    again = apt_train(name="again", of=on.folder / "profile.yaml")
    assert again.code == 2 and seen.read_text().count("\n") == 1
    assert "uploader.api_key: is the mask of a secret, not the secret" in again.err
    assert "--uploader.api_key VALUE" in again.err and "uploader.proxy.pin: is the" in again.err


def test_bad_input_does_not_show_secrets(apt_train, uploader):
    bad = (
        "--uploader.api_key=xx-0123456789",
        "--uploader.pins=[{a: pin-of-one}]",
        "--uploader.headers={Authorization: [Bearer of-bad-news]}",
        "--uploader.max_tokens=many",
        "--uploader.project=null",
    )
    wrong = apt_train(*bad, of=uploader)
    assert wrong.code == 2
    assert f"{MASK} is no key" in wrong.err and "the text 'many'" in wrong.err
    assert "0123456789" not in wrong.err
    assert told_in(wrong.folder, wrong.out, wrong.err) == []
    stray = apt_train("uploader.api_key=sk-0123456789", of=uploader)
    assert stray.code == 2 and "unexpected argument" in stray.err and "0123" not in stray.err


def test_a_section_of_what_may_train_is_compared_but_for_its_secrets(apt_train, uploader, tmp_path):
    plugin = tmp_path / "uploader.py"
    plugin.write_text(UPLOADER.replace("observer=True", ""))
    assert apt_train("--stop-at-step", "2", of=uploader).code == 0
    refused = apt_train("--resume", "--uploader.project=two", "--uploader.token=x", of=uploader)
    assert refused.code == 2 and "uploader.project: is 'two'" in refused.err
    assert "uploader.token" not in refused.err


def test_what_observes():
    class Said:
        PLUGIN = PluginInfo(observer=True)

        @hookimpl
        def on_step_end(self, trainer):
            pass

    class Harmless:
        @hookimpl
        def on_metrics(self, metrics):
            pass

    class Unsaid:
        @hookimpl
        def on_step_end(self, trainer):
            pass

    class Lying:
        PLUGIN = PluginInfo(observer=True)

        @hookimpl
        def apt_param_groups(self, model):
            pass

    manager = PluginManager()
    names = [manager.register(plugin()) for plugin in (Said, Harmless, Unsaid)]
    assert [manager.only_observes(name) for name in names] == [True, True, False]
    with pytest.raises(ConfigError, match="an observer cannot implement it"):
        manager.register(Lying())


SECRET_NAMES = words_of(
    "api_key apiKey API_KEY wandb_api_key WANDB_API_KEY openai_key secret_access_key token "
    "hf_token accessToken api_tokens password db_password passwd secret client_secret credentials "
    "authorization Authorization auth private_key webhook_url x-api-key notion_token"
)
OTHER_NAMES = words_of(
    "pad_token eos_token mask_token tokenizer_name max_tokens num_tokens sample_tokens tokens "
    "bytes_per_token enable_moe_at_token key sort_key text_key num_keys author keyboard "
    "password_file api_key_env token_id authority secretary passthrough"
)


def test_which_names_are_those_of_secrets():
    assert [name for name in SECRET_NAMES if not is_secret_name(name)] == []
    assert [name for name in OTHER_NAMES if is_secret_name(name)] == []
    installed = installed_plugins()
    sections = [section for name in installed for section in declared_by(name, installed).sections]
    assert len(sections) > 3
    keys, waiting = set(), [json_schema(sections)]
    while waiting:
        part = waiting.pop()
        properties = part.get("properties") if isinstance(part, dict) else None
        keys |= {*properties} if isinstance(properties, dict) else set()
        waiting += (
            part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
        )
    assert len(keys) > 100 and [key for key in keys if is_secret_name(key)] == []


def test_what_of_a_value_is_masked():
    data = {
        "a": {"token": 7, "password": 1234, "use_auth": True, "auth": {"user": "ann", "pin": 1}},
        "b": {"tokens": ["x"], "api_tokens": ["x", None], "secret": {"of": {"all": "x"}}},
        "c": [{"name": "Authorization", "value": "x"}, {"name": "Accept", "value": "x"}],
        "secret_router": {"k": 2, "token": ""},
        "prompt": "say password: x",
    }
    masked = without_secrets(data)
    assert masked == {
        "a": {"token": 7, "password": MASK, "use_auth": True, "auth": {"user": "ann", "pin": 1}},
        "b": {"tokens": ["x"], "api_tokens": [MASK, None], "secret": {"of": {"all": MASK}}},
        "c": [{"name": "Authorization", "value": MASK}, {"name": "Accept", "value": "x"}],
        "secret_router": {"k": 2, "token": ""},
        "prompt": "say password: x",
    }
    assert without_secrets(masked) == masked
    for text, expected in {
        "redis://:open@host:1/0": f"redis://:{MASK}@host:1/0",
        "https://ghp_0123456789abcdefghij@github.com/a": f"https://{MASK}@github.com/a",
        "git clone ssh://git@host/a b": "ssh://git@host/a",
        "http://host:80/a@b": "http://host:80/a@b",
        "git+https://host:80/a@b": "git+https://host:80/a@b",
        "postgresql://ann:o/p?e#n@host/db": f"postgresql://ann:{MASK}@host/db",
        "mysql+pymysql://ann:o@pen@host/db?a=b": f"mysql+pymysql://ann:{MASK}@host/db?a=b",
        "s3://b/a?X-Amz-Signature=12&page=2": f"s3://b/a?X-Amz-Signature={MASK}&page=2",
    }.items():
        assert expected in mask_urls(text)


def test_a_default_from_the_environment_is_not_listed_and_a_config_keeps_its_secrets():
    from pydantic import BaseModel, SecretStr

    class Own(BaseModel):
        pin: SecretStr = SecretStr("pin-of-nobody")
        api_key: str = "key-of-nobody"

    class Plugin:
        @hookimpl
        def apt_register_config(self):
            return [SectionSpec("own", Own)]

    assert "nobody" not in str(json_schema([SectionSpec("own", Own)]))
    manager = PluginManager()
    manager.register(Plugin(), "own")
    config = boot(
        {**TINY_PROFILE, "own": {"pin": "given-pin"}}, manager=manager, files=False
    ).config
    manager = PluginManager()
    manager.register(Plugin(), "own")
    kernel = boot(config.model_copy(update={"plugins": ()}), manager=manager, files=False)
    assert kernel.config.section("own").pin.get_secret_value() == "given-pin"
    assert redact("the given-pin") == f"the {MASK}"
    assert isinstance(kernel.config, Config) and "given-pin" not in kernel.config.to_yaml()
