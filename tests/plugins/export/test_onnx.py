"""``exporter:onnx``: what ONNX Runtime makes of its folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.optional import optional

onnx = optional("onnx", 'needs pip install "apt-kernel[export]"')
onnxruntime = optional("onnxruntime", "what runs the exports is not installed")

from apt_core.modeling.plain import plain_model
from apt_core.runs import Session
from apt_plugins.export.comparing import Comparison
from apt_plugins.export.onnx.exporter import (
    TENSORS,
    WITH_CACHES,
    WITHOUT_CACHES,
    ONNXExporter,
    write_graphs,
)
from tests.plugins.export.conftest import MODELS, Certify


@pytest.fixture(scope="module")
def comparisons(certify: Certify) -> dict[str, Comparison]:
    return certify(ONNXExporter())


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_computes_and_encodes_the_same_by_both_graphs(
    comparisons: dict[str, Comparison], name: str
) -> None:
    found = comparisons[name]
    assert found.faults == []
    assert found.logits.absolute <= 2e-5 and found.places > 400
    assert len(found.blocks) == 2 and all(each.relative < 1e-5 for each in found.blocks.values())
    assert found.tokens == found.equal_tokens and found.prompts == 20 and not found.ties
    assert found.encoded > 80 and found.ends_equal


def test_a_fault_of_one_graph_alone_is_caught(certify: Certify) -> None:
    def with_caches_behind(folder: Path) -> None:
        """New keys and values before those of the caches, in the second layer."""
        model = onnx.load(folder / WITH_CACHES, load_external_data=False)
        for node in model.graph.node:
            if node.output[0].startswith("present.1."):
                node.input[:] = reversed(node.input)
        (folder / WITH_CACHES).write_bytes(model.SerializeToString())

    name = "gqa, llama3 RoPE, bpe"
    found = certify(ONNXExporter(), [name], with_caches_behind, num_prompts=8)[name]
    assert "block 1 is the first that differs" in found.faults[0]
    assert not any(WITHOUT_CACHES in fault for fault in found.faults)


@pytest.fixture(scope="module")
def folder(models: dict[str, Session], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of the model with experts."""
    folder = tmp_path_factory.mktemp("graphs")
    write_graphs(plain_model(models["experts, yarn"].model), folder)
    return folder


def opened(folder: Path, name: str) -> Any:
    return onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])


def test_padding_on_either_side_changes_nothing_else(folder: Path) -> None:
    """Texts of several lengths in one batch, and what is generated after them."""
    plain, cached = opened(folder, WITHOUT_CACHES), opened(folder, WITH_CACHES)
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, 250, size=length) for length in (1, 2, 5, 30)]
    alone = [
        plain.run(["logits"], {"input_ids": text[None], "attention_mask": np.ones_like(text)[None]})
        for text in texts
    ]
    for left in (True, False):
        ids, mask = np.zeros((4, 30), dtype=np.int64), np.zeros((4, 30), dtype=np.int64)
        for row, text in enumerate(texts):
            place = slice(30 - len(text), 30) if left else slice(0, len(text))
            ids[row, place], mask[row, place] = text, 1
        together = plain.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
        assert np.isfinite(together).all()
        for row, (text, (logits,)) in enumerate(zip(texts, alone, strict=True)):
            own = together[row][mask[row] == 1]
            np.testing.assert_allclose(own, logits[0], atol=1e-5, err_msg=f"{left} {len(text)}")
        if not left:
            continue
        shapes = {each.name: each.shape for each in cached.get_inputs()}
        past = {
            name: np.zeros((4, shape[1], 0, shape[3]), dtype=np.float32)
            for name, shape in shapes.items()
            if name.startswith("past_key_values.")
        }
        inputs = {"input_ids": ids, "attention_mask": mask, **past}
        first, *caches = cached.run(None, inputs)
        np.testing.assert_allclose(first, together, atol=1e-5)
        new = first[:, -1:].argmax(-1)
        inputs = {
            "input_ids": new,
            "attention_mask": np.pad(mask, ((0, 0), (0, 1)), constant_values=1),
        }
        second = cached.run(["logits"], inputs | dict(zip(past, caches, strict=True)))[0]
        for row, text in enumerate(texts):
            longer = np.append(text, new[row])[None]
            inputs = {"input_ids": longer, "attention_mask": np.ones_like(longer)}
            logits = plain.run(["logits"], inputs)[0]
            np.testing.assert_allclose(second[row, 0], logits[0, -1], atol=1e-5)


def test_both_graphs_are_valid_small_and_share_one_file_of_tensors(folder: Path) -> None:
    """Whatever the size of the model: nothing in a graph has that of a layer, so that the 2 GB
    which a graph may have are no limit."""
    names, places = set(), []
    for name in (WITH_CACHES, WITHOUT_CACHES):
        onnx.checker.check_model(folder / name, full_check=True)
        graph = onnx.load(folder / name, load_external_data=False).graph
        names |= {
            axis.dim_param for each in graph.input for axis in each.type.tensor_type.shape.dim
        }
        inline = [each for each in graph.initializer if not each.external_data]
        assert max(each.ByteSize() for each in inline) < 100
        data = [
            (each.name, *((field.key, field.value) for field in each.external_data))
            for each in graph.initializer
            if each.external_data
        ]
        assert all(fields[1] == ("location", TENSORS) for fields in data)
        places.append(sorted(data))
    assert places[0] == places[1] and len(places[0]) > 20
    lengths = {"sequence_length", "past_sequence_length", "total_sequence_length"}
    assert names - {""} == {"batch_size"} | lengths


def test_a_text_beyond_the_context_is_an_error(folder: Path) -> None:
    ids = np.zeros((1, 41), dtype=np.int64)
    with pytest.raises(Exception, match="indices element out of data bounds"):
        opened(folder, WITHOUT_CACHES).run(
            ["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        )
