"""apt-train from outside: fallbacks, bad input, the plan, the run's folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from apt_core.cli.run_command import run_command
from apt_core.cli.train import app

SHORT = ("--training.max_steps", "3")


def flash_attn_is_usable() -> bool:
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return False
    return True


without_flash = pytest.mark.skipif(flash_attn_is_usable(), reason="flash-attn works here")


@without_flash
def test_flash_v2_falls_back_and_says_so_everywhere(apt_train):
    run = apt_train(*SHORT, "--model.attention_name", "flash_v2")
    assert run.code == 0, run.err
    line = "attention: flash_v2 not usable (flash-attn is not installed"
    assert line in run.out and "using tva_default" in run.out
    assert line in (run.folder / "log.txt").read_text(encoding="utf-8")
    for manifest in (run.manifest, json.loads((run.checkpoints[-1] / "manifest.json").read_text())):
        row = next(row for row in manifest["providers"] if row["kind"] == "attention")
        assert (row["asked"], row["used"]) == ("flash_v2", "tva_default")
        assert "flash-attn is not installed" in row["reason"]
    assert "attention:tva_default (asked: flash_v2" in run.out


@without_flash
def test_a_fallback_does_not_change_the_model(apt_train):
    asked = apt_train(*SHORT, "--model.attention_name", "flash_v2", name="flash")
    plain = apt_train(*SHORT, name="plain")
    assert asked.same_weights(plain)


@without_flash
def test_strict_refuses_a_fallback(apt_train):
    run = apt_train(*SHORT, "--model.attention_name", "flash_v2", "--strict")
    assert run.code == 2
    assert "flash_v2 not usable" in run.err and "--strict" in run.err
    assert not run.folder.exists()


def test_the_run_folder(apt_train):
    run = apt_train(*SHORT)
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        "profile.yaml", "manifest.json", "metrics.jsonl", "events.jsonl", "log.txt", "checkpoints",
    }  # fmt: skip
    inside = {path.name for path in run.checkpoints[-1].iterdir()}
    assert inside == {
        "model.safetensors", "optimizer.safetensors", "plugins.safetensors", "state.json",
        "profile.yaml", "manifest.json", "evaluation.json",
    }  # fmt: skip
    assert {"versions", "providers", "plugins", "figures", "status", "data"} <= set(run.manifest)
    assert {"val_loss", "val_ppl", "val_bpb"} <= set(run.metrics[0])
    assert run.metrics[0]["step"] == 0
    assert yaml.safe_load((run.folder / "profile.yaml").read_text())["name"] == "tiny_run"


def test_five_mistakes_are_reported_at_once(apt_train, profile):
    data = yaml.safe_load(profile.read_text(encoding="utf-8"))
    data["model"].update({"d_fff": 3, "num_heads": 3})
    data["training"]["batch_size"] = "many"
    data["plugins"] = ["no_such_plugin"]
    data["schedules"] = {"enable_moe_at_epoch": 2}
    profile.write_text(yaml.safe_dump(data), encoding="utf-8")
    run = apt_train()
    assert run.code == 2
    assert "5 problems" in run.err
    for part in (
        "did you mean 'd_ff'?", "num_heads", "training.batch_size", "no_such_plugin",
        "enable_moe_at_epoch", "tiny.yaml:",
    ):  # fmt: skip
        assert part in run.err
    assert "Traceback" not in run.err
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stric",), "did you mean '--strict'?"),
        (("--model.d_modle", "3"), "did you mean 'd_model'?"),
        (("--set", "nonsense"), "nonsense"),
        (("--model.d_model",), "it needs a value"),
        (("stray",), "unexpected argument 'stray'"),
        (("--resume", "--resume-from", "x"), "exclude each other"),
        (("--json",), "--dry-run"),
        (("--plugin", "no_such_plugin"), "no such plugin"),
        (("--plugin", "no_such.py"), "there is no file no_such.py"),
        (("--model.attention_name", "tva_defualt"), "did you mean 'tva_default'?"),
        (("--model.tva.r", "64"), "model.tva"),
        (("--model.d_model", "-4"), "model.d_model"),
        (("--hardware.device", "abacus"), "hardware.device"),
    ],
)
def test_bad_input_exits_2_with_a_message(apt_train, arguments, message):
    run = apt_train(*arguments)
    assert run.code == 2
    assert message in run.err
    assert "Traceback" not in run.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA works here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_device_that_is_not_there_falls_back_and_strict_refuses_it(apt_train, capsys, device):
    run = apt_train(*SHORT, "--hardware.device", device)
    assert run.code == 0, run.err
    assert f"hardware.device: {device} not usable" in run.out
    assert run.manifest["device"] == "cpu"
    for name, arguments in (("strict", ()), ("plan", ("--dry-run",))):
        strict = apt_train("--hardware.device", device, "--strict", *arguments, name=name)
        assert strict.code == 2
        assert device in strict.err


def test_a_value_that_a_layer_refuses_is_bad_input(apt_train, tmp_path):
    plugin = tmp_path / "picky.py"
    plugin.write_text(
        "from apt_core import ProviderSpec, hookimpl\n"
        "from apt_core.modeling.layers.ffn import SwiGLUProvider\n\n"
        "class Picky(SwiGLUProvider):\n"
        "    def create_layer(self, d_model, d_ff, dropout=0.0):\n"
        "        if d_ff == 33:\n            raise ValueError('model.d_ff: 33 is not for me')\n"
        "        return super().create_layer(d_model, d_ff, dropout)\n\n"
        "@hookimpl\ndef apt_register_providers():\n"
        "    return [ProviderSpec('ffn', 'picky', Picky)]\n"
    )
    arguments = ("--plugin", str(plugin), "--model.ffn_name", "picky", "--model.d_ff", "33")
    for more in ((), ("--dry-run",)):
        run = apt_train(*arguments, *more)
        assert run.code == 2
        assert "33 is not for me" in run.err and "plugin picky" in run.err


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("[{name: PLUGIN, prio: 3}]", "plugins[0].prio: unknown key"),
        ("[{name: PLUGIN, on_failure: requierd}]", "plugins[0].on_failure"),
        ("[{name: PLUGIN, priority: 300}]", "plugins[0].priority"),
        ("[{priority: 3}]", "plugins[0]"),
        ("[PLUGIN, 3]", "plugin 3: no such plugin"),
        ("[PLUGIN, []]", "plugins[1]"),
    ],
)
def test_a_mistake_in_the_list_of_plugins_is_reported(
    apt_train, profile, tmp_path, listed, message
):
    plugin = tmp_path / "fine.py"
    plugin.write_text("from apt_core import hookimpl\n\n@hookimpl\ndef on_step_end(): pass\n")
    with profile.open("a", encoding="utf-8") as file:
        file.write(f"plugins: {listed.replace('PLUGIN', str(plugin))}\n")
    run = apt_train(*SHORT)
    assert run.code == 2
    assert message in run.err


def test_the_resolved_profile_lists_the_plugins_that_took_effect(apt_train, profile, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            "from apt_core import hookimpl\n\n@hookimpl\ndef on_step_end(): pass\n"
        )
    with profile.open("a", encoding="utf-8") as file:
        file.write(f"plugins: [{{name: {tmp_path / 'one.py'}, priority: 7}}]\n")
    run = apt_train(*SHORT, "--plugin", str(tmp_path / "two.py"))
    resolved = yaml.safe_load((run.folder / "profile.yaml").read_text(encoding="utf-8"))
    one, two = resolved["plugins"]
    assert one == {"name": str(tmp_path / "one.py"), "priority": 7}
    assert two == str(tmp_path / "two.py")


def test_the_json_of_a_plan_is_pure_whatever_plugins_print(profile, tmp_path, capsys):
    plugin = tmp_path / "chatty.py"
    plugin.write_text(
        "from apt_core import hookimpl\nprint('loaded')\n\n"
        "@hookimpl\ndef apt_configure(config):\n    print('configured')\n"
    )
    arguments = ["-p", str(profile), "--plugin", str(plugin), "--dry-run", "--json"]
    assert run_command(app, "apt-train", arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["profile"] == "tiny_run"
    assert "configured" in captured.err


def test_a_plan_refuses_a_vocabulary_that_is_too_small(apt_train):
    run = apt_train("--dry-run", "--model.vocab_size", "10")
    assert run.code == 2
    assert "model.vocab_size" in run.err


def test_a_plan_needs_no_data_file_and_says_that_it_is_missing(apt_train):
    run = apt_train("--dry-run", "--data.train_path", "nowhere.txt")
    assert run.code == 0
    assert "nowhere.txt" in run.out


@pytest.mark.usefixtures("forked")
def test_a_reader_that_goes_away_does_not_end_the_run(profile, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "apt_core", "train", "-p", str(profile), "--output"]
    reader, writer = os.pipe()
    os.close(reader)  # before the first line, so that no line can be written
    with open(writer, "w") as stdout:
        done = subprocess.run(
            [*command, str(folder), "--training.max_steps", "3"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=stdout,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "manifest.json").read_text())["status"] == "finished"


def test_a_console_of_another_encoding_does_not_end_the_run(profile, tmp_path):
    folder = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable, "-m", "apt_core", "train", "-p", str(profile), "--output", str(folder),
            *SHORT, "--set", "name=Größe 空",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"Gr\\xf6\\xdfe" in done.stdout


def test_a_missing_data_file_names_the_key(apt_train):
    run = apt_train("--data.train_path", "nowhere.txt")
    assert run.code == 2
    assert "data.train_path" in run.err and "nowhere.txt" in run.err


def test_debug_shows_the_traceback(apt_train):
    run = apt_train("--data.train_path", "nowhere.txt", "--debug")
    assert run.code == 2
    assert "Traceback" in run.err


def test_the_plan_as_json(capsys, profile):
    code = run_command(app, "apt-train", ["-p", str(profile), "--dry-run", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert code == 0
    assert {"providers", "plugins", "inactive_keys", "stages"} <= set(plan)
    stage = plan["stages"][0]
    assert {"name", "epoch", "params_total", "params_active"} <= set(stage)
    assert stage["params_total"] > 1000


def test_the_plan_counts_what_training_builds(apt_train, capsys, profile):
    run = apt_train(*SHORT)
    total = sum(tensor.numel() for tensor in run.weights().values())
    run_command(app, "apt-train", ["-p", str(profile), "--dry-run", "--json"])
    assert json.loads(capsys.readouterr().out)["stages"][0]["params_total"] == total


@pytest.mark.parametrize("name", ["tiny_debug", "base"])
def test_shipped_profiles_have_a_plan(capsys, name):
    assert run_command(app, "apt-train", ["-p", name, "--dry-run"]) == 0
    assert "attention" in capsys.readouterr().out


def test_tiny_debug_runs_strictly(tmp_path, capsys):
    code = run_command(
        app,
        "apt-train",
        ["-p", "tiny_debug", "--strict", "--output", str(tmp_path / "run"), "--set",
         "training.max_steps=2", "--evaluation.eval_batches", "1"],
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err


def test_without_output_the_checkpoints_go_to_the_profiles_folder(
    tmp_path, monkeypatch, capsys, profile
):
    monkeypatch.chdir(tmp_path)
    arguments = ["-p", str(profile), "--training.checkpoint_dir", "elsewhere"]
    assert run_command(app, "apt-train", [*arguments, *SHORT]) == 0
    assert run_command(app, "apt-train", [*arguments, *SHORT]) == 0
    runs = sorted((tmp_path / "runs" / "tiny_run").iterdir())
    kept = sorted((tmp_path / "elsewhere").iterdir())
    assert [f"tiny_run-{path.name}" for path in runs] == [path.name for path in kept]
    assert len(runs) == 2
    capsys.readouterr()
    assert run_command(app, "apt-train", [*arguments, *SHORT, "--resume"]) == 0
    assert f"resuming {runs[-1].relative_to(tmp_path)}" in capsys.readouterr().out


def test_non_ascii_text_survives(apt_train, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("汉字かな한글🙂é " * 200, encoding="utf-8")
    run = apt_train(*SHORT, "--evaluation.sample_prompt", "汉🙂")
    assert run.code == 0, run.err
    assert "汉🙂" in run.out
    assert "汉🙂" in (run.folder / "profile.yaml").read_text(encoding="utf-8")


def test_the_plan_shows_when_a_plugin_becomes_enabled(capsys, profile, tmp_path):
    late = tmp_path / "late.py"
    late.write_text("from apt_core import hookimpl\n\n@hookimpl\ndef on_step_end(): pass\n")
    arguments = [
        "-p",
        str(profile),
        "--plugin",
        str(late),
        "--set",
        "schedules.enable_late_at_epoch=2",
    ]
    assert run_command(app, "apt-train", [*arguments, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["state"]) for row in plan["plugins"]] == [("late", "dormant")]
    assert [(stage["name"], stage["epoch"]) for stage in plan["stages"]] == [
        ("start", 1),
        ("enable late", 2),
    ]


def test_what_is_printed_and_logged_holds_no_sequence_for_a_terminal(
    apt_train, tmp_path, monkeypatch
):
    """Neither of a plugin nor, where colours are forced in a pipe, of a display that redraws."""
    plugin = tmp_path / "raises.py"
    plugin.write_text(
        "from apt_core import hookimpl\n\n\n@hookimpl\ndef on_training_start():\n"
        "    raise ValueError('\\x1b]0;a title\\x07 \\udcff')\n"
    )
    done = apt_train("--plugin", str(plugin), "--training.max_steps=2")
    log = (done.folder / "log.txt").read_text(encoding="utf-8")
    for text in (done.out, log):
        assert r"ValueError: \x1b]0;a title" in text
        assert not set(text) & {"\x1b", "\x07"}
    monkeypatch.setenv("FORCE_COLOR", "1")
    forced = apt_train("--training.max_steps=2", name="forced")
    assert "step 2/2" in forced.out
    assert "\x1b[2K" not in forced.out
