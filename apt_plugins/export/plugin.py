"""Exporters to other programs, for ``apt-export``."""

from __future__ import annotations

from apt_core import PluginInfo, ProviderSpec, hookimpl
from apt_plugins.export.settings import FolderSettings, GGUFSettings

PLUGIN = PluginInfo(
    summary="apt-export: takes a model to other programs, with a certificate that it is the same",
    version="1.0.0",
)


@hookimpl
def apt_register_providers() -> list[ProviderSpec]:
    return [
        ProviderSpec(
            kind="exporter",
            name="hf",
            factory="apt_plugins.export.hf:HFExporter",
            version="1.0.0",
            summary="a folder of Hugging Face: Llama, Qwen3, Mixtral, Qwen3-MoE",
            config=FolderSettings,
        ),
        ProviderSpec(
            kind="exporter",
            name="onnx",
            factory="apt_plugins.export.onnx.exporter:ONNXExporter",
            version="1.0.0",
            summary="a folder for ONNX Runtime: a graph with caches, one without",
            requires=("onnx>=1.16",),
        ),
        ProviderSpec(
            kind="exporter",
            name="gguf",
            factory="apt_plugins.export.gguf.exporter:GGUFExporter",
            version="1.0.0",
            summary="a GGUF for llama.cpp, with a Modelfile for Ollama",
            requires=("gguf>=0.17",),
            config=GGUFSettings,
        ),
        ProviderSpec(
            kind="exporter",
            name="safetensors",
            factory="apt_plugins.export.plain_weights:PlainWeightsExporter",
            version="1.0.0",
            summary="the weights of the plain form by their plain names",
            config=FolderSettings,
        ),
    ]
