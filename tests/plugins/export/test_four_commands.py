"""From a folder of text to a GGUF that says in llama.cpp what the run says here."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.optional import optional

optional("gguf", "what writes GGUF is not installed")
optional("xllamacpp", "what runs the exports is not installed")

from apt_core.cli import generate, train
from apt_core.cli.run_command import run_command
from apt_core.testing.tiny import TEXT
from apt_plugins.export import command

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[3]
SCRIPT = (ROOT / "examples" / "text_to_gguf.sh").read_text("utf-8")
COMMANDS = [line for line in SCRIPT.splitlines() if line and not line.startswith(("#", "set "))]
SMALL = {
    "--model.vocab_size": "300",
    "--model.d_model": "32",
    "--model.num_heads": "2",
    "--model.num_layers": "1",
    "--model.d_ff": "64",
    "--model.max_seq_len": "64",
    "--training.max_steps": "60",
    "--training.learning_rate": "0.002",
    "--training.warmup_steps": "5",
    "--hardware.num_threads": "1",
}
"""What makes the run a matter of seconds."""

PROMPT, TOKENS = "The", 40

ANSWER = """
import json, sys
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, prompt, tokens = sys.argv[1:]
parameters.warmup = False
server, settings = xllamacpp.Server(parameters), {"n_predict": int(tokens), "temperature": 0}
text = server.handle_completions({"prompt": prompt, **settings})["choices"][0]["text"]
messages = [{"role": "user", "content": prompt}]
said = server.handle_chat_completions({"messages": messages, **settings})["choices"][0]["message"]
json.dump([text, said["content"]], open("answer.json", "w"))
"""
"""llama.cpp's own server, with its own settings."""


def test_llama_cpp_says_what_apt_generate_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one.txt", "two.txt"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(TEXT * 3)

    def ran(app: object, name: str, *words: object) -> str:
        capfd.readouterr()
        code = run_command(app, name, [*map(str, words)])
        out, err = capfd.readouterr()
        assert code == 0, err
        return out

    install, training, export, create = map(shlex.split, COMMANDS)
    assert install[:2] == ["pip", "install"] and "[gguf]" in install[2]
    ran(train.app, *training, *(word for pair in SMALL.items() for word in pair))
    ran(command.app, *export)
    said = ran(
        generate.app,
        "apt-generate",
        *("runs/mine", PROMPT, "--max-new-tokens", TOKENS, "--temperature", 0, "--json"),
    )
    assert create[:2] == ["ollama", "create"] and create[3] == "-f"
    modelfile = Path(create[4])
    [source] = re.findall(r"^FROM (\S+)$", modelfile.read_text("utf-8"), re.M)
    arguments = [str(modelfile.parent / source), PROMPT, str(TOKENS)]
    # Threads that spin keep a busy machine's CPU from each other.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    subprocess.run([sys.executable, "-c", ANSWER, *arguments], check=True)
    answer, in_chat = json.loads((tmp_path / "answer.json").read_text())
    assert answer == json.loads(said)["text"] and len(answer) > TOKENS
    assert in_chat == answer
    certificate = json.loads((modelfile.parent / "certificate.json").read_text())
    assert certificate["proven"] and certificate["prompts_of_held_out_text"] == 16


def test_the_guide_has_the_commands_of_the_example() -> None:
    guide = (ROOT / "docs" / "export.md").read_text("utf-8")
    section = guide.partition("## In four commands")[2].partition("\n## ")[0]
    assert re.findall(r"^    \$ (.+)$", section, re.M) == COMMANDS
