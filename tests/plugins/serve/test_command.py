"""``apt-serve``: one process, its signals, and what it refuses to begin with."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server's library is not installed")

from apt_core.cli.run_command import run_command
from apt_core.inference import generate
from apt_core.runs import open_run
from apt_core.testing import tiny_run
from apt_core.types import GenerationRequest
from apt_plugins.serve.access import host_name, is_loopback
from apt_plugins.serve.command import app

ROOT = Path(__file__).parents[3]
SECONDS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "run"
    tiny_run(steps=2, overrides={"evaluation.sample_tokens": 0}, output=folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run_command(app, "apt-serve", [*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_run_is_served_until_a_signal(run: Path, forked: None) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "APT_API_KEY": "sesame-1"}
    code = "from apt_plugins.serve.command import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"serving tiny_run, step 2: (http://127\.0\.0\.1:\d+)\n", line)
        assert found, (line, process.poll())
        body = json.dumps({"prompt": "The é", "seed": 3, "max_tokens": 9}).encode()
        request = urllib.request.Request(
            f"{found[1]}/v1/completions?x=secret", body,
            {"Content-Type": "application/json", "Authorization": "Bearer sesame-1"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            text = json.load(response)["choices"][0]["text"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 143
        errors = process.stderr.read()
    finally:
        process.kill()
        process.wait()
    expected = generate(open_run(run), GenerationRequest("The é", seed=3, max_new_tokens=9))
    assert text == expected.text
    (log,) = errors.splitlines()
    assert re.fullmatch(r"127\.0\.0\.1 POST /v1/completions 200 \d+\.\d\d s, 6 \+ 9 tokens", log)


def test_what_it_does_not_begin_with(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("APT_API_KEY", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is in use" in refused(capsys, run, "--port", port)
    said = refused(capsys, run, "--host", "0.0.0.0", "--format", "nix", "--port", 0)
    assert "a key is needed" in said and "APT_API_KEY" in said and "no format 'nix'" in said
    for key in ("", "two words", "é"):
        assert "--api-key" in refused(capsys, run, "--port", 0, "--api-key", key)
    assert "no address" in refused(capsys, run, "--host", "a.name.invalid")
    assert "cannot listen" in refused(capsys, run, "--host", "192.0.2.1", "--api-key", "k")
    assert "99" in refused(capsys, run, "--port", 0, "--step", 99)
    assert "nowhere" in refused(capsys, "nowhere/at-all", "--port", 0)
    monkeypatch.delitem(sys.modules, "apt_plugins.serve.http_server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert refused(capsys, run).endswith('not installed (pip install "apt-kernel[serve]")\n')


def test_help_needs_neither_torch_nor_a_server() -> None:
    code = (
        "import sys, apt_plugins.serve.command; "
        "sys.exit(bool({'torch', 'numpy', 'starlette', 'uvicorn'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_names_of_this_machine() -> None:
    assert [host_name(each) for each in ("A:1", "[::1]:80", "::1", "", "a")] == [
        "a", "::1", "::1", "", "a",
    ]  # fmt: skip
    assert is_loopback("127.3.2.1") and is_loopback("::1")
    assert not is_loopback("0.0.0.0") and not is_loopback("a")


def test_a_key_that_belongs_to_no_plugin_of_the_run_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, run, "--port", 0, "--set", "model.voting.k=5")
    assert "model.voting" in told
