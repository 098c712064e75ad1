"""Models that transformers makes with random weights become runs that compute the same."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="weights are torch's")
from tests.optional import optional

transformers = optional("transformers", "the models to import: pip install apt-kernel[test]")
optional("tokenizers", "their tokenizer: pip install apt-kernel[data]")

import torch
from safetensors.torch import load_file, save_file

from apt_core import GenerationRequest, hookimpl
from apt_core.cli.eval import app as eval_app
from apt_core.cli.generate import app as generate_app
from apt_core.cli.run_command import run_command
from apt_core.cli.train import app as train_app
from apt_core.config import Override
from apt_core.data.tokenizers.hf import HFTokenizer
from apt_core.errors import AptError, ConfigError
from apt_core.inference import Engine
from apt_core.kernel import boot
from apt_core.modeling.layers.rope import rotary_frequencies
from apt_core.modeling.plain import plain_model
from apt_core.modeling.to_tva import Heads, converted
from apt_core.plugin_manager import PluginManager
from apt_core.providers.position import RoPEScaling, RoPESettings
from apt_core.runs import Session, open_run
from apt_core.runs.metrics import read_metrics
from apt_core.testing import tiny_session
from apt_core.training import Trainer
from apt_plugins.export.hf import HFExporter
from apt_plugins.hf_import.asked import Asked
from apt_plugins.hf_import.command import app
from apt_plugins.hf_import.importing import import_folder
from apt_plugins.hf_import.placing import require_free, staged
from tests.plugins.export.conftest import job_of

CONTEXT, VOCAB = 48, 260
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied, one key head, linear": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0},
        },
    ),
    "llama, width 6, llama3": (
        "Llama",
        {
            "num_key_value_heads": 4,
            "head_dim": 6,
            "rms_norm_eps": 0.01,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 500.0,
            },
        },
    ),
    "llama, dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "mistral, a window of the context, yarn": (
        "Mistral",
        {"sliding_window": CONTEXT, "rope_parameters": {**YARN, "rope_theta": 1e4}},
    ),
    "qwen3, tied, 3 heads of width 10, yarn by mscale": (
        "Qwen3",
        {
            "tie_word_embeddings": True,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "rms_norm_eps": 0.02,
            "rope_parameters": {
                **YARN, "rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False
            },
        },
    ),
}  # fmt: skip
SETTINGS = {
    "data.max_length": 24,
    "training.batch_size": 4,
    "training.max_steps": 20,
    "training.learning_rate": 0.003,
    "training.scale_lr_by_width": False,
    "training.lr_schedule_name": "constant",
    "training.warmup_steps": 0,
    "training.mixed_precision": False,
    "training.log_every_steps": 1,
    "evaluation.sample_tokens": 0,
    "evaluation.eval_freq": 0,
    "hardware.device": "cpu",
}
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def made_model(family: str, changes: dict[str, Any]) -> Any:
    """A model of transformers whose weights, norms too, are random."""
    torch.manual_seed(0)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **ids, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
    return model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"Line {n}: {n} apples and {n * 7 % 13} pears, 字é {n % 5}.\n" for n in range(250)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as transformers saves it."""
    made = tmp_path_factory.mktemp("hf") / "llama"
    made_model("Llama", {}).save_pretrained(made)
    save_tokenizer(made)
    return made


@pytest.fixture
def asked(folder: Path, text: Path, tmp_path: Path) -> Asked:
    given = {"data.train_path": str(text), **SETTINGS}
    overrides = [Override(tuple(key.split(".")), value, "--set") for key, value in given.items()]
    return Asked(folder, tmp_path / "run", overrides=overrides)


def with_set(asked: Asked, **settings: Any) -> Asked:
    more = [Override(tuple(k.split("__")), v, f"--set {k}") for k, v in settings.items()]
    return replace(asked, overrides=[*asked.overrides, *more])


class Watching:
    """Keeps the batches of a run."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    @hookimpl
    def on_step_start(self, batch: Any) -> None:
        self.batches.append(batch)


def trained_by_theirs(model: Any, batches: list[Any]) -> list[float]:
    """The losses of a loop of transformers' own over ``batches``."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    settings = boot({}).config.training
    optimizer = torch.optim.AdamW(groups, lr=0.003, betas=settings.betas, eps=settings.eps)
    model.train()
    losses = []
    for (batch,) in batches:
        logits = model(batch.input_ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("family", "changes"), MODELS.values(), ids=MODELS)
def test_a_run_computes_and_trains_as_the_model_it_was_made_of(
    family: str, changes: dict[str, Any], asked: Asked, tmp_path: Path
) -> None:
    theirs = made_model(family, changes)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    save_tokenizer(tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    imported = import_folder(replace(asked, folder=tmp_path / "hf"), [].append)
    session = open_run(asked.output, device="cpu")
    ids = torch.randint(0, VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = session.model(ids).logits
        expected = theirs(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert imported.parameters == sum(p.numel() for p in theirs.parameters())
    engine = Engine(session)
    (told,) = engine.run([GenerationRequest("Line 3", max_new_tokens=12, temperature=0.0)])
    prompt = torch.tensor([session.tokenizer.encode("Line 3")])
    answer = theirs.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert list(told.token_ids) == answer[: len(told.token_ids)].tolist() and told.token_ids
    watching, manager = Watching(), PluginManager()
    manager.register(watching, "watching")
    kernel = boot(asked.output / "profile.yaml", manager=manager)
    result = Trainer(kernel, output=asked.output, resume=True).fit()
    assert (result.status, result.step) == ("finished", 20)
    ours = read_metrics(asked.output).series["loss"].values
    reference = trained_by_theirs(theirs, watching.batches)
    assert len(reference) == 20 and reference[0] - reference[-1] > 0.5
    assert ours == pytest.approx(reference, abs=1e-4)


def test_commands_take_an_imported_run_wherever_it_is_moved(
    folder: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    profile = tmp_path / "mine.yaml"
    model = {"d_model": 64, "max_seq_len": 12, "attention_pattern": ["mha"], "ffn_name": "vft"}
    data = {"train_path": str(text), "tokenizer_name": "byte"}
    sections: dict[str, Any] = {"name": "mine", "extends": "base", "model": model, "data": data}
    for key, value in SETTINGS.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    profile.write_text(json.dumps(sections), encoding="utf-8")

    def run(command: Any, name: str, *words: str) -> str:
        code = run_command(command, name, words)
        told = capsys.readouterr()
        assert code == 0, told.err
        return told.out

    told = run(app, "apt-import", str(folder), "-o", "run", "-p", str(profile))
    assert "parameters of LlamaForCausalLM" in told and "apt-chat run" in told
    record = json.loads((tmp_path / "run" / "import.json").read_text(encoding="utf-8"))
    assert record["source"] == str(folder) and [*record["files"]] == ["model.safetensors"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["checkpoint_dir"] == str(tmp_path.resolve() / "run" / "checkpoints")
    assert not (tmp_path / "run" / ".importing").exists()
    at_start = manifest["figures"]["val_loss"]
    shutil.move("run", "moved")
    # Another tokenizer where the run's was, which is not the one that it was trained with.
    Path("run/tokenizer").mkdir(parents=True)
    Path("run/tokenizer/tokenizer.json").write_text("{}", encoding="utf-8")
    resume = ("apt-train", "-p", "moved/profile.yaml", "--output", "moved", "--resume")
    run(train_app, *resume, "--stop-at-step", "8")
    shutil.rmtree("run")
    run(train_app, *resume)
    scores = json.loads(run(eval_app, "apt-eval", "moved", "--device", "cpu", "--json"))
    assert scores["runs"][0]["step"] == 20
    trained = open_run("moved", device="cpu")
    assert trained.position.step == 20 and trained.tokenizer.chat_template == CHAT
    config = open_run("moved", step=0, device="cpu").config
    assert (config.model.mha.head_dim, config.model.max_seq_len, config.seq_len) == (8, 48, 24)
    told = run(generate_app, "apt-generate", "moved", "--prompt", "Line 3", "--max-new-tokens", "4")
    assert told.strip()
    loss = json.loads(Path("moved/manifest.json").read_text(encoding="utf-8"))["figures"]
    assert loss["val_loss"] < at_start - 0.5


# Bad input ---------------------------------------------------------------------------------------


def changed_config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return change


def changed_tensors(**changes: Any) -> Any:
    """Tensors by their names with ``__`` for dots; None leaves one out."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value(tensors) if callable(value) else value
        save_file(tensors, folder / "model.safetensors")

    return change


def indexed(**files: str) -> Any:
    """An index in place of the one file, which is ``one.safetensors``."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        names = dict.fromkeys(load_file(folder / "one.safetensors"), "one.safetensors")
        names |= {name.replace("__", "."): file for name, file in files.items()}
        index = {"weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    return change


def written(name: str, content: bytes | str) -> Any:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def linked(folder: Path) -> None:
    outside = shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(outside)


def more_ids(folder: Path) -> None:
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    found["model"]["vocab"] |= {f"token{n}": 257 + n for n in range(9)}
    path.write_text(json.dumps(found), encoding="utf-8")


def headed(**changes: Any) -> Any:
    """The header of the one file with other values for the final norm."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header["model.norm.weight"] |= changes
        made = json.dumps(header).encode()
        path.write_bytes(len(made).to_bytes(8, "little") + made + data[8 + size :])

    return change


def in_place_of(name: str, make: Any) -> Any:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


Q, DOWN = "model__layers__1__self_attn__q_proj", "model__layers__0__mlp__down_proj"
BAD: dict[str, tuple[Any, list[str]]] = {
    "another architecture": (
        changed_config(architectures=["GemmaForCausalLM"]),
        ["config.json: architectures: a model of 'GemmaForCausalLM' cannot be imported"],
    ),
    "its own code": (
        changed_config(architectures=["Mine"], auto_map={"AutoModel": "mine.Mine"}),
        ["architectures", "code that comes with a model is never run"],
    ),
    "another type": (changed_config(model_type="gemma"), ["model_type: is 'gemma'"]),
    "nonsense of several kinds": (
        changed_config(hidden_size="big", num_hidden_layers=10**9, vocab_size=-1, rms_norm_eps=9e9),
        [
            "4 problems",
            "hidden_size: must be a whole number",
            "num_hidden_layers: must be at most",
            "vocab_size: must be at least",
            "rms_norm_eps: must be at most",
        ],
    ),
    "sizes that are not those of the files": (
        changed_config(hidden_size=2**23, num_hidden_layers=4000),
        ["model.embed_tokens.weight: is [260, 32], config.json asks for [260, 8388608]"],
    ),
    "what layers of a run do not have": (
        changed_config(
            hidden_act="gelu",
            quantization_config={"bits": 4},
            num_key_value_heads=3,
            partial_rotary_factor=0.5,
            rope_parameters={"rope_type": "longrope", "rope_theta": 1e4},
        ),
        ["5 problems", "hidden_act", "quantization_config", "3 does not", "0.5", "'longrope'"],
    ),
    "a scaling without a factor": (
        changed_config(rope_parameters={"rope_type": "llama3", "rope_theta": -1}),
        ["rope_parameters.rope_theta: is -1", "rope_parameters.factor"],
    ),
    "biases": (changed_config(attention_bias=True), ["attention_bias, and there is no bias"]),
    "no JSON": (written("config.json", "{"), ["config.json: cannot be read"]),
    "deep JSON": (written("config.json", "[" * 10**5), ["nested too deep"]),
    "a long number": (written("config.json", "[" + "9" * 5000), ["more than 1,000 digits"]),
    "a list": (written("config.json", "[]"), ["is no JSON object"]),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
    "a truncated file": (truncated, ["model.safetensors: cannot be read"]),
    "a hostile header": (
        written("model.safetensors", b"\xff" * 8 + b"{}"), ["model.safetensors: cannot be read"]
    ),
    "tensors beyond the file": (headed(data_offsets=[0, 2**40]), ["cannot be read", "offset"]),
    "tensors one upon another": (headed(data_offsets=[0, 128]), ["cannot be read", "offset"]),
    "a shape without end": (headed(shape=[2**32, 2**32]), ["model.safetensors: cannot be read"]),
    "a shape below zero": (headed(shape=[-32]), ["model.safetensors: cannot be read"]),
    "an unknown type": (headed(dtype="F4"), ["model.safetensors: cannot be read"]),
    "a pipe": (in_place_of("model.safetensors", os.mkfifo), ["it is a pipe, not a file"]),
    "a folder": (in_place_of("model.safetensors", os.mkdir), ["it is a folder, not a file"]),
    "a pipe of settings": (in_place_of("config.json", os.mkfifo), ["config.json", "is a pipe"]),
    "no text": (written("config.json", "{}".encode("utf-16")), ["config.json: cannot be read"]),
    "ends that are none": (
        written("generation_config.json", '{"eos_token_id": [1e99, -1]}'), ["is no id and no list"]
    ),
    "a pickle": (pickled, ["pytorch_model.bin is a pickle, which could run code"]),
    "a link out of the folder": (linked, ["a link that leads out of its folder"]),
    "files outside the folder": (
        indexed(a="../one.safetensors", b="/etc/passwd", c="x.bin"),
        ["3 problems", "'../one.safetensors' is no file", "'/etc/passwd'", "'x.bin' is no safet"],
    ),
    "names that are none": (
        indexed(
            a="a\0.safetensors", b="model.safetensors.index.json", c=f"{'x' * 5000}.safetensors"
        ),
        ["3 problems", "'a\\x00.safetensors' is no file", "is no safetensors file", "(5,012 char"],
    ),
    "a file that is not there": (indexed(a="two.safetensors"), ["two.safetensors: cannot be read"]),
    "an index that is wrong": (
        indexed(a="one.safetensors"), ["says that it is there, and it is not"]
    ),
    "tensors that do not fit": (
        changed_tensors(
            lm_head__weight=None,
            extra=torch.zeros(2),
            **{
                f"{Q}__weight": torch.zeros(3, 4),
                f"{DOWN}__weight": torch.zeros(32, 40, dtype=torch.int8),
            },
        ),
        [
            "4 problems",
            "lm_head.weight: is missing",
            "extra: is surplus",
            "q_proj.weight: is [3, 4], config.json asks for [32, 32]",
            "down_proj.weight: is of type I8",
        ],
    ),
    "a bias that counts": (
        changed_tensors(**{f"{Q}__bias": torch.ones(32)}), ["q_proj.bias: is a bias"]
    ),
    "weights that are not finite": (
        changed_tensors(**{f"{DOWN}__weight": torch.full((32, 40), torch.nan)}), ["not finite"]
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        ["there is no tokenizer.json in it", "--tokenizer PATH"],
    ),
    "a damaged tokenizer": (written("tokenizer.json", "{}"), ["is no tokenizer.json"]),
    "more tokens than rows": (more_ids, ["vocab_size: is 260, and the tokenizer has 266 ids"]),
}  # fmt: skip


@pytest.mark.parametrize(("change", "told"), BAD.values(), ids=BAD)
def test_what_cannot_be_imported_is_refused_and_leaves_nothing(
    change: Any, told: list[str], asked: Asked, tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(asked.folder, tmp_path / "bad"))
    change(bad)
    with pytest.raises(ConfigError) as refused:
        import_folder(replace(asked, folder=bad), [].append)
    for words in told:
        assert words in str(refused.value)
    assert not asked.output.exists()


def test_what_goes_with_no_run_is_refused(asked: Asked, text: Path, tmp_path: Path) -> None:
    def refusal(asked: Asked) -> str:
        with pytest.raises(ConfigError) as refused:
            import_folder(asked, [].append)
        return str(refused.value)

    assert "DIR: does not exist" in refusal(replace(asked, folder=tmp_path / "none"))
    assert "give the folder" in refusal(replace(asked, folder=text))
    assert "is in use" in refusal(replace(asked, output=text.parent))
    assert "is in use" in refusal(replace(asked, output=text))
    assert "choose an even rank from 2 to 8" in refusal(replace(asked, rank=3))
    assert "there is no such file" in refusal(replace(asked, tokenizer=tmp_path / "none"))
    wider = with_set(asked, model__d_model=64)
    assert "model.d_model: is 64, and the imported model has 32" in refusal(wider)
    nowhere = with_set(replace(asked, rank=3), data__train_path="none.txt")
    assert "2 problems" in refusal(nowhere) and "there is no file" in refusal(nowhere)
    assert not asked.output.exists()


def test_an_import_leaves_another_one_into_its_place_alone_and_removes_what_a_killed_one_left(
    asked: Asked, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    tokenizer = HFTokenizer({"path": str(asked.folder)})
    with staged(place, tokenizer) as run:
        for begin in (lambda: staged(place, tokenizer).__enter__(), lambda: require_free(place)):
            with pytest.raises(ConfigError, match="an import into it is going on"):
                begin()
        assert run.parent.is_dir() and (place / "tokenizer" / "tokenizer.json").is_file()
    shutil.rmtree(place)
    (place / ".importing" / "run").mkdir(parents=True)
    (place / "tokenizer").mkdir()
    require_free(place)
    assert not any(place.iterdir())
    (place / ".importing").mkdir()
    (place / "notes.txt").touch()
    with pytest.raises(ConfigError, match="was killed"):
        require_free(place)
    assert len([*place.iterdir()]) == 2


def test_a_window_is_refused_unless_it_holds_the_context(
    asked: Asked, text: Path, tmp_path: Path
) -> None:
    for name, family, changes in (
        ("mistral", "Mistral", {"sliding_window": 16}),
        (
            "qwen",
            "Qwen3",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        ),
    ):
        made_model(family, changes).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
        given = replace(asked, folder=tmp_path / name, output=tmp_path / f"{name}-run")
        with pytest.raises(ConfigError, match=r"sliding_window: .*--set model.max_seq_len=16"):
            import_folder(given, [].append)
    import_folder(with_set(given, model__max_seq_len=16, data__max_length=16), [].append)
    assert open_run(given.output, device="cpu").config.model.max_seq_len == 16


def test_what_has_no_effect_is_left_out_and_told(asked: Asked, tmp_path: Path) -> None:
    place = Path(shutil.copytree(asked.folder, tmp_path / "odd"))
    changed_config(auto_map={"AutoModel": "evil.Model"}, attention_bias=True)(place)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    zeros = {
        f"model__layers__0__self_attn__{name}__bias": torch.zeros(32 if name in "qo" else 16)
        for name in names
    }
    inverse = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)}
    changed_tensors(**zeros, **inverse)(place)
    (place / "evil.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
    told: list[str] = []
    imported = import_folder(replace(asked, folder=place), told.append)
    assert len(imported.notes) == 5 and "it was not run" in imported.notes[0]
    assert sum("q_proj.bias is zero throughout" in line for line in told) == 1


def test_a_full_disk_leaves_no_run(asked: Asked, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(850_000))
    with pytest.raises(AptError):
        import_folder(replace(asked, output=small_disk / "run"), [].append)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


# TVA ---------------------------------------------------------------------------------------------


def scores_of(q: Any, k: Any, frequencies: Any, distance: int) -> Any:
    """The matrix [D, D] of a head's complex scores at a distance, times the root of its width;
    q and k [R, D]."""
    half = len(q) // 2
    a, b = torch.complex(q[:half], q[half:]), torch.complex(k[:half], k[half:])
    turned = torch.polar(torch.ones_like(frequencies), frequencies * distance)
    return (a.T * turned) @ b.conj()


@pytest.mark.parametrize(("rank", "scaled"), [(8, False), (6, False), (4, True), (2, False)])
def test_tva_takes_the_place_of_attention_with_the_loss_that_it_tells(
    rank: int, scaled: bool
) -> None:
    heads, kv_heads, width, d_model, context = 4, 2, 8, 24, 20
    torch.manual_seed(rank)
    qkv = torch.randn((heads + 2 * kv_heads) * width, d_model, dtype=torch.float64)
    out = torch.randn(d_model, heads * width, dtype=torch.float64)
    sample = torch.randn(400, d_model, dtype=torch.float64) @ torch.randn(d_model, d_model).double()
    moment = sample.T @ sample / 400
    settings = RoPESettings(theta=100.0)
    if scaled:
        changed = RoPEScaling(type="yarn", factor=4.0, original_max_seq_len=16)
        settings = RoPESettings(theta=100.0, scaling=changed)
    sizes = Heads(heads, kv_heads, width, settings, context)
    made = converted(
        qkv, out, None, moment, sizes, rank, width=d_model // heads * 2, seed=0, name="x"
    )
    assert made.parameters["compress"].shape == (rank, 12)
    p = {name: tensor.double() for name, tensor in made.parameters.items()}
    fused = p["compress"] @ p["qkv_weight"].unflatten(0, (-1, 12))  # [N, R, D]
    new_out = p["out_weight"].unflatten(1, (heads, 12)) @ p["lift"]  # [D, H, R]
    old = qkv.unflatten(0, (-1, width))
    old_out = out.unflatten(1, (heads, width))
    lengths, vectors = torch.linalg.eigh(moment)
    root = (vectors * lengths.sqrt()) @ vectors.T
    wide = root.to(torch.complex128)
    theirs, _ = rotary_frequencies(width, settings.theta, settings.scaling)
    ours, _ = rotary_frequencies(rank, settings.theta, settings.scaling)
    change = total = lost = whole = 0.0
    for head in range(heads):
        key = head // 2
        for distance in range(context):
            before = scores_of(old[head], old[heads + key], theirs, distance) / width**0.5
            after = scores_of(fused[head], fused[heads + key], ours, distance) / rank**0.5
            change += float((wide @ (before - after) @ wide).abs().square().sum())
            total += float((wide @ before @ wide).abs().square().sum())
        v, w = old[heads + kv_heads + key], fused[heads + kv_heads + key]
        lost += float(((old_out[:, head] @ v - new_out[:, head] @ w) @ root).square().sum())
        whole += float((old_out[:, head] @ v @ root).square().sum())
    assert made.values_lost == pytest.approx(lost / whole, abs=1e-3)
    if rank == width:
        assert change / total < 1e-9 and abs(made.scores_lost) < 1e-9
    else:
        # Each pair is the best in the place of its own; what they do together is near that.
        assert change / total == pytest.approx(made.scores_lost, rel=0.35)
        assert 0.02 < made.scores_lost < 0.95


def test_a_model_becomes_tva_and_heals(asked: Asked, tmp_path: Path) -> None:
    qwen = tmp_path / "qwen"
    made_model("Qwen3", {"head_dim": 10}).save_pretrained(qwen)
    save_tokenizer(qwen)
    made = import_folder(replace(asked, folder=qwen, rank=4, heal_steps=12), [].append)
    figures = made.to_tva
    assert figures["heal_steps"] == 12 and figures["loss_before"] == made.loss
    assert figures["loss_healed"] < min(figures["loss_after"], made.loss) - 0.3
    assert json.loads((asked.output / "import.json").read_text())["to_tva"] == figures
    session = open_run(asked.output, device="cpu")
    attention = session.model.blocks[0].attention
    assert (session.position.step, attention.rank, attention.head_dim) == (12, 4, 8)
    full = replace(asked, rank=8, output=tmp_path / "full")
    same = import_folder(full, [].append)
    assert same.to_tva["loss_after"] == pytest.approx(same.loss, abs=1e-5)


# Out and in --------------------------------------------------------------------------------------


def exported(session: Session, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    plain = plain_model(session.model, session.tokenizer.vocab_size)
    HFExporter().write(job_of(folder, plain, session.tokenizer))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "settings",
    [
        {"model.tva.s": 0, "model.norm.eps": 1e-5},
        {
            "model.attention_name": "mha",
            "model.mha": {"head_dim": 6, "qk_norm": True, "qk_norm_eps": 1e-5},
            "model.norm.eps": 1e-5,
            "model.num_kv_heads": 1,
            "model.tie_embeddings": False,
            "model.rope.scaling": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 16},
        },
    ],
    ids=["tva", "mha"],
)
def test_export_import_export_is_the_same_to_the_bit(
    settings: dict[str, Any], asked: Asked, tmp_path: Path
) -> None:
    first = exported(tiny_session(overrides=settings), tmp_path / "first")
    made = replace(asked, folder=tmp_path / "first")
    import_folder(with_set(made, data__max_length=16), [].append)
    session = open_run(asked.output, device="cpu")
    special = session.tokenizer.special
    ends = json.loads(first["generation_config.json"])["eos_token_id"]
    assert list(special.ends) == ends and len(ends) > 1
    second = exported(session, tmp_path / "second")
    assert [*first] == [*second] and "model.safetensors" in first
    assert [name for name in first if first[name] != second[name]] == []
