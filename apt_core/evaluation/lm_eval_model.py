"""APT as a model of lm-evaluation-harness, whose tasks score it as ``apt-eval`` does its own.

Imported where such tasks are asked for alone: importing the harness takes seconds, and its list of
tasks half a minute.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from apt_core.error_text import one_line
from apt_core.errors import AptError, ConfigError, Problem, did_you_mean
from apt_core.evaluation.found import Asking
from apt_core.evaluation.intervals import RESAMPLES, Z
from apt_core.evaluation.likelihood import (
    Stretch,
    default_stride,
    encode_pair,
    encode_text,
    precision_of,
    predict,
)
from apt_core.evaluation.metrics import Figure
from apt_core.inference.engine import Engine
from apt_core.runs.session import Session
from apt_core.types import GenerationRequest

FEWSHOT_SEED = 1234
"""The harness's own default, by which examples in prompts are drawn."""

MAX_NEW_TOKENS = 256
"""Where a task does not say how long a continuation may be."""


class SessionModel(LM):
    """The model of a session, as the harness asks it: with the windows, the encoding of pairs and
    the engine of :mod:`apt_core.evaluation`."""

    def __init__(self, session: Session, asking: Asking) -> None:
        super().__init__()
        self._session, self._asking = session, asking

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, in nats, and whether each of
        its tokens is the most likely one."""
        encode, tokenizer = encode_pair, self._session.tokenizer
        predicted = self._predict([encode(tokenizer, *request.args) for request in requests])
        return [(-float(each.losses.sum()), bool(each.likeliest.all())) for each in predicted]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """The log-likelihood of each text, by sliding windows."""
        tokenizer = self._session.tokenizer
        predicted = self._predict([encode_text(tokenizer, request.args[0]) for request in requests])
        return [-float(each.losses.sum()) for each in predicted]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The continuation of each context, up to the first of the texts that end it."""
        engine = Engine(self._session, max_batch=self._asking.batch_size)
        results = engine.run([_request(*request.args) for request in requests])
        return [result.text for result in results]

    def _predict(self, stretches: Sequence[Stretch]) -> Any:
        return predict(
            self._session,
            stretches,
            stride=self._asking.stride,
            batch_size=self._asking.batch_size,
            advance=self._asking.advance,
        )


def _request(context: str, settings: Mapping[str, Any]) -> GenerationRequest:
    until = settings.get("until") or ()
    stop = [until] if isinstance(until, str) else until
    sampled = bool(settings.get("do_sample", settings.get("temperature", 0.0) > 0))
    return GenerationRequest(
        context,
        max_new_tokens=int(
            settings.get("max_gen_toks") or settings.get("max_new_tokens") or MAX_NEW_TOKENS
        ),
        temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
        top_k=int(settings.get("top_k", 0)) if sampled else 0,
        top_p=float(settings.get("top_p", 1.0)) if sampled else 1.0,
        stop=tuple(text for text in stop if text),
    )


class HarnessTasks:
    """The tasks of the harness called ``names``: those in the folders ``include`` where these have
    all of them, which is quick; else also its own.

    Raises ConfigError for unknown ones.
    """

    def __init__(self, names: Sequence[str], include: Sequence[Path]) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        for folder in include:
            if not folder.is_dir():
                raise ConfigError("there is no such folder", "--include-path", str(folder))
        self.names, folders = list(names), [str(folder) for folder in include]
        self._manager = TaskManager(include_path=folders, include_defaults=False)
        if not set(names) <= set(self._manager.all_tasks):
            self._manager = TaskManager(include_path=folders)
        known = self._manager.all_tasks
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ConfigError(
                Problem(f"there is no task {name!r}", "--lm-eval", hint=did_you_mean(name, known))
                for name in unknown
            )

    def score(
        self, session: Session, asking: Asking, limit: int | None
    ) -> Iterator[tuple[str, dict[str, Figure], dict[str, Any]]]:
        """Each task that was scored with its figures and what ``scores.json`` says of them beside.

        Raises ConfigError where the harness cannot load a task or score by it.
        """
        began = time.monotonic()
        # Its bootstrap would start processes.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        try:
            loaded = self._manager.load(self.names)
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
            found = evaluate(
                SessionModel(session, asking),
                loaded,
                limit=limit,
                log_samples=False,
                bootstrap_iters=RESAMPLES,
            )
        except AptError:
            raise
        except Exception as error:
            raise ConfigError(
                f"lm-eval cannot score by {', '.join(self.names)}: {one_line(error)}",
                "--lm-eval",
                hint="data from the hub need a network; --include-path names folders of own tasks",
            ) from error
        context = session.config.model.max_seq_len
        for name, values in found["results"].items():
            samples = found.get("n-samples", {}).get(name, {})
            yield (
                name,
                dict(_figures(values)),
                {
                    "asked": {
                        "lm_eval": version("lm_eval"),
                        "version": found.get("versions", {}).get(name),
                        "num_fewshot": found.get("n-shot", {}).get(name),
                    },
                    "items": int(samples.get("effective") or 0),
                    "total": int(samples.get("original") or 0),
                    "precision": precision_of(session),
                    "batch_size": asking.batch_size,
                    "context": context,
                    "stride": asking.stride or default_stride(context),
                    "seconds": round(time.monotonic() - began, 3),
                },
            )


def _figures(values: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """The metrics of a task. The harness calls them ``metric,filter``, with a ``metric_stderr``
    where it has one: then the interval is that of a normal distribution."""
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if not isinstance(value, int | float) or metric.endswith("_stderr") or not filtered:
            continue
        name = metric if filtered == "none" else f"{metric}/{filtered}"
        error = values.get(f"{metric}_stderr,{filtered}")
        if isinstance(error, int | float):
            half = Z * error
            yield name, Figure(float(value), value - half, value + half, "normal")
        else:
            yield name, Figure(float(value))
