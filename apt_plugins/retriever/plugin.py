"""Registers the providers of kind ``retrieval``, and puts what they find into generations."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from apt_core import PluginInfo, ProviderSpec, SectionSpec, hookimpl
from apt_plugins.retriever.settings import (
    SECTION,
    RetrieverSettings,
    contradictions,
    inactive,
    settings_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from apt_core import GenerationRequest, RewrittenPrompt
    from apt_plugins.retriever.index import Index
    from apt_plugins.retriever.knn import Datastore

PLUGIN = PluginInfo(
    summary="passages of a folder of text for prompts, and kNN predictions from it",
    version="1.0.0",
)

log = logging.getLogger("apt.retriever")

PROVIDERS = (
    ("exact", "ExactSearch", "cosine of vectors, compared one by one", ()),
    ("bm25", "BM25Search", "BM25 of words, by bm25s", ("bm25s>=0.2.6",)),
    ("fused", "FusedSearch", "exact and bm25, fused by their ranks", ("bm25s>=0.2.6",)),
    ("faiss", "FaissSearch", "cosine of vectors, by faiss's flat index", ("faiss-cpu>=1.8",)),
)


class Plugin:
    """What one run has opened: its index, the search over it, and datastores by session."""

    def __init__(self) -> None:
        self._index: Index | None = None
        self._search: Any = None
        self._datastores: WeakKeyDictionary[Any, Datastore] = WeakKeyDictionary()

    @hookimpl
    def apt_register_config(self) -> list[SectionSpec]:
        return [
            SectionSpec(
                SECTION,
                RetrieverSettings,
                inactive=inactive,
                check=contradictions,
                names={"search": "retrieval"},
            )
        ]

    @hookimpl
    def apt_register_providers(self) -> list[ProviderSpec]:
        return [
            ProviderSpec(
                kind="retrieval",
                name=name,
                factory=f"apt_plugins.retriever.search:{factory}",
                version="1.0.0",
                summary=summary,
                requires=requires,
                config=RetrieverSettings,
                section=SECTION,
                default=name == "exact",
            )
            for name, factory, summary, requires in PROVIDERS
        ]

    @hookimpl
    def apt_rewrite_prompt(
        self, request: GenerationRequest, session: Any
    ) -> RewrittenPrompt | None:
        settings = settings_of(session.config)
        if not settings.k:
            return None
        from apt_core.providers.documents import Document
        from apt_plugins.retriever.prompt import question_of, with_passages

        question = question_of(request)
        if not question.strip():
            return None
        chunks = self._searched(session).search(question, settings.k)
        tokenizer, prompt = session.tokenizer, request.prompt
        document = (
            Document(text=prompt) if isinstance(prompt, str) else Document(messages=tuple(prompt))
        )
        room = session.config.model.max_seq_len - request.max_new_tokens
        room -= len(tokenizer.encode_prompt(document))
        found = with_passages(
            request,
            [chunk for chunk in chunks if chunk.score > 0],
            min(room, settings.max_tokens),
            lambda text: len(tokenizer.encode(text)),
        )
        taken = 0 if found is None else len(found.sources)
        log.info("%d passages were found, %d are in the prompt", len(chunks), taken)
        return found

    @hookimpl
    def apt_logits_processors(self, session: Any) -> list[Callable[..., Any]]:
        knn = settings_of(session.config).knn
        if knn is None or not knn.weight:
            return []
        from apt_plugins.retriever.knn import datastore_of, processor_of

        if session not in self._datastores:
            self._datastores[session] = datastore_of(session, self._opened(session), knn)
        return [processor_of(session, self._datastores[session], knn)]

    def _searched(self, session: Any) -> Any:
        """The provider that searches the folder as it was when it was first asked for."""
        if self._search is None:
            index = self._opened(session)
            provider = session.registry.get("retrieval", settings_of(session.config).search)
            attach = getattr(provider, "attach", None)
            if attach is not None:
                attach(index)
            else:  # one of another plugin
                numbers = range(len(index.passages))
                provider.build(
                    list(index.passages.texts()), [index.passages.place(n) for n in numbers]
                )
            index.forget_others()
            self._search = provider
        return self._search

    def _opened(self, session: Any) -> Index:
        if self._index is None:
            from apt_plugins.retriever.index import Index

            self._index = Index(settings_of(session.config))
        return self._index
