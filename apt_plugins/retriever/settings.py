"""The section ``retriever`` of the profile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from apt_core import Inactive, Problem
from apt_core.profile_paths import found_path
from apt_core.sections import Count, Fraction, Name, Section, Size

if TYPE_CHECKING:
    from apt_core.config import Config

SECTION = "retriever"

Folder = Annotated[Name, AfterValidator(found_path)]


class KnnSettings(Section):
    """``retriever.knn``: next tokens by the nearest places of the folder's text (kNN-LM)."""

    weight: Fraction = Field(
        default=0.25, description="λ of p = λ·p_kNN + (1 - λ)·p; 0 is the model alone."
    )
    k: Annotated[int, Field(ge=1, le=2**16)] = Field(
        default=16, description="How many nearest places of the text have a say."
    )
    temperature: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=0.1,
        description="T of the places' weights, softmax(-d / T), where d is the mean squared "
        "difference of the hidden states.",
    )
    max_tokens: Count = Field(
        default=2**18,
        description="The most places that are kept; each takes 4 bytes for each of d_model.",
    )


class RetrieverSettings(Section):
    """``retriever``: what is searched, how, and how much of it goes into a prompt."""

    folder: Folder | None = Field(
        default=None, description="The folder (or file) of text; required."
    )
    search: Name = Field(
        default="fused",
        description="Provider of the search: fused (exact and bm25 by their ranks), exact, bm25, "
        "faiss.",
    )
    embedder: Literal["hashing", "minilm"] = Field(
        default="hashing",
        description="What makes vectors of text: hashing (hashed words and character n-grams, "
        "needs nothing) or minilm (a sentence encoder).",
    )
    k: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=4, description="The most passages in a prompt; 0 leaves prompts alone."
    )
    max_tokens: Size = Field(
        default=512,
        description="The most tokens of passages in a prompt; what the context has no room for is "
        "left out, too.",
    )
    chunk_chars: Annotated[int, Field(ge=20, le=2**20)] = Field(
        default=600, description="The most characters of a passage."
    )
    overlap_chars: Annotated[int, Field(ge=0, le=2**20)] = Field(
        default=100,
        description="Up to so many characters at the end of a passage, in whole lines, also begin "
        "the next one.",
    )
    index: Name | None = Field(
        default=None, description="The folder of indexes. Default: within APT's cache."
    )
    knn: KnnSettings | None = Field(
        default=None, description="Mixes predictions with those of the text; without it, not."
    )


def settings_of(config: Config) -> RetrieverSettings:
    """The section of a profile that was loaded with the plugin."""
    settings = config.section(SECTION)
    assert isinstance(settings, RetrieverSettings)
    return settings


def contradictions(config: Config) -> Iterator[Problem]:
    """Problems that concern more than one key, or what is there."""
    settings = settings_of(config)
    if settings.folder is None:
        hint = "--set retriever.folder=FOLDER, or leave the plugin out"
        yield Problem("nothing is to be searched", key="retriever.folder", hint=hint)
    elif not os.path.exists(settings.folder):
        yield Problem(f"there is no {settings.folder}", key="retriever.folder")
    if settings.overlap_chars > settings.chunk_chars // 2:
        yield Problem(
            f"is {settings.overlap_chars}, more than half a passage of {settings.chunk_chars}",
            key="retriever.overlap_chars",
            hint="lower it, or raise retriever.chunk_chars",
        )


def inactive(config: Config) -> Iterator[Inactive]:
    """Keys that other keys leave without an effect."""
    settings = settings_of(config)
    if not settings.k:
        because = ("retriever.k",)
        for key in ("search", "embedder", "max_tokens"):
            yield Inactive(f"retriever.{key}", "prompts are left alone", because)
    elif settings.search == "bm25":
        because = ("retriever.search",)
        yield Inactive("retriever.embedder", "bm25 compares words, not vectors", because)
    if settings.knn is not None and not settings.knn.weight:
        for key in ("k", "temperature", "max_tokens"):
            because = ("retriever.knn.weight",)
            yield Inactive(f"retriever.knn.{key}", "the model alone predicts", because)
