"""Documents out of Hugging Face datasets: local ones of every form, and what is said of others."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apt_core.data.loading import named_sources, source_of
from apt_core.data.sources.rows import RowFaults
from apt_core.errors import ConfigError
from apt_core.kernel import boot
from apt_core.providers.dataset import DataSection
from apt_core.testing import TINY_PROFILE
from apt_plugins.data_hf.settings import HfSettings
from tests.optional import optional

datasets = optional("datasets", 'needs pip install "apt-kernel[data_hf]"')

TEXTS = [f"text {number}" for number in range(300)]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")


def hf(path, section=None, **settings):
    from apt_plugins.data_hf.source import HfSource

    provider = HfSource(settings)
    provider.data_section = DataSection.model_validate({"train_path": path, **(section or {})})
    return provider


def texts(path, section=None, **settings):
    return [document.text for document in hf(path, section, **settings).documents()]


def message(path, section=None, **settings):
    with pytest.raises(ConfigError) as caught:
        texts(path, section, **settings)
    (problem,) = caught.value.problems
    return str(problem)


def write(path, *rows):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def saved():
    """A folder of two splits, the first of three shards."""
    rows = datasets.Dataset.from_dict({"text": TEXTS, "other": range(300)})
    held = datasets.Dataset.from_dict({"text": ["held out"], "other": [1]})
    datasets.DatasetDict(train=rows, test=held).save_to_disk(
        "saved", num_shards={"train": 3, "test": 1}
    )
    return "saved"


def test_a_saved_dataset_is_read_shard_by_shard_in_its_order(saved):
    found = list(hf(saved).documents())
    assert [document.text for document in found] == TEXTS
    assert texts("saved/train") == TEXTS
    assert texts(saved, split="test") == ["held out"]
    assert hf(saved).held_out() is None
    assert [each.text for each in hf(saved, val_split="test").held_out()] == ["held out"]
    other = hf(saved, {"val_path": "saved/test"}).held_out()
    assert [each.text for each in other] == ["held out"]


@pytest.mark.parametrize("streaming", [True, False])
def test_data_files_and_folders_are_read_as_they_are(streaming):
    for number in range(3):
        write(f"folder/part-{number}.jsonl", *({"text": t} for t in TEXTS[number::3]))
    ordered = [t for number in range(3) for t in TEXTS[number::3]]
    assert texts("folder", streaming=streaming) == ordered
    assert texts("folder/*.jsonl", streaming=streaming) == ordered
    assert texts([f"folder/part-{n}.jsonl" for n in range(3)], streaming=streaming) == ordered
    last = list(hf("folder").documents())[-1]
    assert last.where == "folder:train, shard 2, row 100"

    datasets.Dataset.from_dict({"body": TEXTS}).to_parquet("a.parquet")
    assert texts("a.parquet", {"columns": {"text": "body"}}, streaming=streaming) == TEXTS
    Path("a.tsv").write_text("text\tn\nfirst\t1\nsecond\t2\n")
    assert texts("a.tsv", streaming=streaming) == ["first", "second"]
    Path("a.txt").write_text("first\nsecond\n")
    assert texts("a.txt", streaming=streaming) == ["first", "second"]


def test_every_form_of_document_is_read():
    write(
        "a.jsonl",
        {"question": "2 + 2 =", "answer": "4", "topic": 1},
        {"question": "3 + 3 =", "answer": "6", "topic": 2},
    )
    columns = {"prompt": "question", "response": "answer", "key": "topic"}
    found = list(hf("a.jsonl", {"columns": columns}).documents())
    assert [document.parts for document in found] == [("2 + 2 =", "4"), ("3 + 3 =", "6")]
    assert [document.key for document in found] == ["1", "2"]
    write("b.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    (talk,) = hf("b.jsonl").documents()
    assert talk.messages[0].content == "hi"


def test_what_is_not_there_is_said_with_what_is(saved):
    assert "there is no split 'trian'; there are 'train', 'test' (did you mean 'train'?)" in (
        message(saved, split="trian")
    )
    assert message(saved, split="trian").startswith("saved: data_hf.split: ")
    with pytest.raises(ConfigError, match=r"data_hf.val_split: there is no split 'dev'"):
        list(hf(saved, val_split="dev").held_out())
    assert "it has 'text', 'other'" in message(saved, {"columns": {"text": "body"}})
    assert "there is no file or folder 'none.jsonl'" in message(["none.jsonl", "b.jsonl"])
    assert "no file or folder './none'" in message("./none")
    assert message(None).startswith("data.train_path: no dataset is named")

    os.makedirs("several")
    write("several/a.jsonl", {"text": "a"})
    write("several/b.jsonl", {"text": "b"})
    Path("several/README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n- config_name: two\n"
        "  data_files: b.jsonl\n---\n"
    )
    assert texts("several", config="two") == ["b"]
    for wrong in ({"config": "three"}, {}):
        said = message("several", **wrong)
        assert said.startswith("several: data_hf.config: ") and "one" in said and "two" in said
    os.makedirs("empty")
    assert "holds no data files" in message("empty")


def test_rows_that_are_no_documents_and_files_that_are_damaged_are_errors():
    write("a.jsonl", {"text": "a"}, {"text": None}, {"text": "c"})
    assert message("a.jsonl").startswith("a.jsonl:train, row 2: data.train_path: has no 'text'")
    Path("b.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "cannot be read on" in message("b.jsonl")
    rows = datasets.Dataset.from_dict({"text": TEXTS})

    def lost():
        yield from rows
        raise OSError("the network is gone")

    stream = datasets.IterableDataset.from_generator(lost)
    source = hf("owner/name")
    with pytest.raises(ConfigError, match=r"row 2\d\d: .*cannot be read on: .*network is gone"):
        list(source._records(stream, RowFaults("owner/name:train")))
    Path("c.parquet").write_bytes(b"PAR1 and no more")
    assert "c.parquet" in message("c.parquet")


class Explodes:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_nothing_that_is_read_runs_code():
    code = "from pathlib import Path\nPath('ran').touch()\n"
    os.makedirs("scripted")
    Path("scripted/scripted.py").write_text(code)
    write("scripted/a.jsonl", {"text": "a"})
    Path("script.py").write_text(code)
    Path("a.pkl").write_bytes(pickle.dumps(Explodes()))
    os.makedirs("pickled")
    shutil.copy("a.pkl", "pickled/train.pkl")
    assert "nothing that is read may run code" in message("script.py")
    assert "nothing that is read may run code" in message("scripted/scripted.py")
    assert "one format is read at a time" in message("a.pkl")
    assert "pickled" in message("pickled")
    assert "is a format, not a dataset" in message("pandas")
    try:
        assert texts("scripted") == ["a"]
    except ConfigError as error:
        assert "run code" in str(error)
    assert not os.path.exists("ran")


def test_other_formats_are_refused():
    import io
    import tarfile

    with tarfile.open("a.tar", "w") as archive:
        info = tarfile.TarInfo("0.txt")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"a"))
    os.makedirs("tars")
    shutil.move("a.tar", "tars/a.tar")
    assert "is of the format 'webdataset', which is not read" in message("tars")


def test_a_dataset_on_the_hub_tells_why_it_cannot_be_read(monkeypatch):
    raised = {
        "gated": datasets.exceptions.DatasetNotFoundError(
            "Dataset 'owner/name' is a gated dataset on the Hub. Visit the page to ask for access."
        ),
        "there is no such dataset": datasets.exceptions.DatasetNotFoundError(
            "Dataset 'owner/name' doesn't exist on the Hub or cannot be accessed."
        ),
        "the hub cannot be reached": ConnectionError("Couldn't reach 'owner/name' on the Hub"),
        "nothing that is read may run code": RuntimeError(
            "Dataset scripts are no longer supported, but found name.py"
        ),
    }
    raised["there is no such revision"] = datasets.exceptions.DatasetNotFoundError(
        "Revision 'v1' doesn't exist for dataset 'owner/name' on the Hub."
    )
    for said, error in raised.items():

        def refuse(path, config, *, revision, error=error):
            assert (path, config, revision) == ("owner/name", "en", "v1")
            raise error

        monkeypatch.setattr("datasets.load_dataset_builder", refuse)
        assert said in message("owner/name", config="en", revision="v1")


def test_no_network_is_said(monkeypatch):
    from apt_plugins.data_hf.loading import Opening

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = message("owner/name")
    assert said.startswith("owner/name: data.train_path: the hub cannot be reached")
    with pytest.raises(ConfigError, match="the hub cannot be reached"):
        hf("owner/name").fingerprint()
    httpx = pytest.importorskip(_client())
    refused = httpx.ConnectError("Name or service not known")
    with pytest.raises(ConfigError, match="the hub cannot be reached: Name or service"):
        Opening("owner/name", HfSettings(), "data.train_path", "data_hf")._explain(refused)


def _client():
    """The module of the client that huggingface_hub raises errors of."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1].__module__.partition(".")[0]


def test_the_fingerprint_is_that_of_the_content(saved):
    first = hf(saved).fingerprint()
    assert first == hf(saved).fingerprint() == hf(saved, streaming=False).fingerprint()
    assert first != hf(saved, split="test").fingerprint()
    assert first != hf(saved, {"columns": {"text": "other"}}).fingerprint()
    changed = datasets.Dataset.from_dict({"text": ["x"], "other": [1]})
    changed.save_to_disk("saved/test")
    assert first != hf(saved).fingerprint()
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert hf("owner/name", revision=commit).fingerprint()


def test_a_profile_names_the_source_alone_and_in_a_mixture(saved):
    alone = {"loader": "hf_datasets", "train_path": saved}
    kernel = boot({**TINY_PROFILE, "data": alone, "data_hf": {"split": "test"}})
    ((_, section),) = named_sources(kernel)
    assert [each.text for each in source_of(kernel, section).documents()] == ["held out"]

    item = {**alone, "name": "rows", "settings": {"split": "test"}}
    mixture = [item, {"name": "docs", "source": "pydoc"}]
    kernel = boot({**TINY_PROFILE, "data": {"mixture": mixture}})
    (_, rows), _ = named_sources(kernel)
    assert [each.text for each in source_of(kernel, rows).documents()] == ["held out"]

    mixture[0] = {"name": "rows", "loader": "hf_datasets", "settings": {"splitt": "test"}}
    with pytest.raises(ConfigError) as caught:
        boot({**TINY_PROFILE, "data": {"mixture": mixture}})
    assert [problem.key for problem in caught.value.problems] == [
        "data.mixture[0].settings.splitt",
        "data.mixture[0].train_path",
    ]


def test_a_listing_does_not_import_datasets():
    code = "import sys; import apt_plugins.data_hf.plugin; print('datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
