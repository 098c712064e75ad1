"""From a folder of text to a GGUF that says in llama.cpp what the run says here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="what writes GGUF is not installed")
pytest.importorskip("xllamacpp", reason="what runs the exports is not installed")

from apt_core.cli import generate, train
from apt_core.cli.run_command import run_command
from apt_core.testing.tiny import TEXT
from apt_plugins.export import command

PROMPT, TOKENS = "The", 40

ANSWER = """
import json, sys
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, prompt, tokens = sys.argv[1:]
parameters.warmup = False
found = xllamacpp.Server(parameters).handle_completions(
    {"prompt": prompt, "n_predict": int(tokens), "temperature": 0}
)
json.dump(found["choices"][0]["text"], open("answer.json", "w"))
"""
"""llama.cpp's own server, with its own settings."""


def test_llama_cpp_says_what_apt_generate_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one.txt", "two.txt"):
        folder = tmp_path / "texts" / name
        folder.parent.mkdir(exist_ok=True)
        folder.write_text(TEXT * 3)
    (tmp_path / "small.yaml").write_text(
        "extends: base\n"
        "model: {d_model: 32, num_heads: 2, num_layers: 1, d_ff: 64, vocab_size: 300,"
        " max_seq_len: 64}\n"
        "data: {train_path: texts, tokenizer_name: bpe}\n"
        "training: {max_steps: 60, learning_rate: 0.002, warmup_steps: 5}\n"
        "hardware: {device: cpu, num_threads: 1}\n"
    )

    def ran(app: object, name: str, *words: object) -> str:
        capfd.readouterr()
        code = run_command(app, name, [*map(str, words)])
        out, err = capfd.readouterr()
        assert code == 0, err
        return out

    ran(train.app, "apt-train", "-p", "small.yaml", "--output", "run")
    ran(command.app, "apt-export", "run", "--to", "gguf", "-o", "small-gguf")
    said = ran(
        generate.app,
        "apt-generate",
        *("run", PROMPT, "--max-new-tokens", TOKENS, "--temperature", 0, "--json"),
    )
    arguments = [str(tmp_path / "small-gguf" / "model.gguf"), PROMPT, str(TOKENS)]
    # Threads that spin keep a busy machine's CPU from each other.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    subprocess.run([sys.executable, "-c", ANSWER, *arguments], check=True)
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer == json.loads(said)["text"] and len(answer) > TOKENS
    certificate = json.loads((tmp_path / "small-gguf" / "certificate.json").read_text())
    assert certificate["proven"] and certificate["prompts_of_held_out_text"] == 16
