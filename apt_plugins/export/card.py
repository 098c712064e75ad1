"""The card of an export, ``README.md``: what the model is, what it was trained on, how good it is,
and what was measured of the export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from apt_core import AptError
from apt_core.files import read_file
from apt_core.json_files import MAX_BYTES
from apt_core.printable import printable
from apt_core.providers import PlainShape
from apt_core.runs import Session
from apt_core.runs.resume_check import saved_profile
from apt_core.runs.scores import read_evaluation
from apt_core.runs.task_scores import read_scores
from apt_core.runs.trained_on import data_row
from apt_plugins.export.certificate import CERTIFICATE, Certificate
from apt_plugins.export.origin import folder_of, manifest_of

ELSEWHERE = ("name", "description", "monitoring", "hardware", "debug")
"""Sections of a profile that are not shown."""

SHOWN_VERSIONS = ("apt", "python", "torch", "numpy")


def card_of(session: Session, certificate: Certificate, shape: PlainShape, usage: str) -> str:
    """The text of the card; ``usage`` says how the export is used."""
    front = [*_front_matter(certificate)]
    sections = {
        "Use": [usage] if usage else [],
        "Model": [*_rows(_numbers(shape))],
        "Data": [*_rows(_data(session))],
        "Scores": [*_scores(session)],
        "What was left out": [*_dropped(certificate)],
        "Certificate": [*_certificate(certificate)],
        "Provenance": [*_rows(_provenance(session, certificate))],
        "Profile": [*_profile(session)],
    }
    parts = ["\n".join(front), f"# {session.config.name}"]
    for title, lines in sections.items():
        if lines:
            parts.append(f"## {title}\n\n" + "\n".join(lines))
    return printable("\n\n".join(parts) + "\n")


def _front_matter(certificate: Certificate) -> Iterator[str]:
    """What the Hugging Face Hub reads."""
    yield "---"
    if certificate.target == "hf":
        yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    yield "tags:\n- apt-kernel"
    yield "---"


def _rows(entries: Mapping[str, Any]) -> Iterator[str]:
    """A table of two columns; nothing for no entries."""
    if entries:
        yield "| | |\n|---|---|"
    for name, value in entries.items():
        number = isinstance(value, int) and not isinstance(value, bool)
        yield f"| {name} | {_cell(f'{value:,}' if number else str(value))} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _numbers(shape: PlainShape) -> dict[str, Any]:
    experts: dict[str, Any] = {}
    if shape.num_experts:
        each = f"{shape.experts_per_token} of {shape.num_experts}"
        experts = {"experts for each token": each}
    found: dict[str, Any] = {
        "parameters": parameters_of(shape),
        "layers": shape.num_layers,
        "width": shape.d_model,
        "heads": f"{shape.num_heads}, of width {shape.head_dim}",
        "key and value heads": shape.num_kv_heads,
        "hidden units": shape.d_ff,
        **experts,
        "vocabulary": shape.vocab_size,
        "context": f"{shape.max_seq_len:,} tokens",
        "QK-norm": "yes" if shape.qk_norm else "no",
        "embeddings": "tied" if shape.tied else "untied",
    }
    return found


def parameters_of(shape: PlainShape) -> int:
    """The number of parameters of a plain model."""
    d_model, width = shape.d_model, shape.head_dim
    attention = 2 * d_model * width * (shape.num_heads + shape.num_kv_heads)
    ffn = 3 * d_model * shape.d_ff * max(1, shape.num_experts) + d_model * shape.num_experts
    norms = 2 * d_model + (2 * width if shape.qk_norm else 0)
    matrices = shape.vocab_size * d_model * (1 if shape.tied else 2)
    return matrices + d_model + shape.num_layers * (attention + ffn + norms)


def _data(session: Session) -> dict[str, Any]:
    if session.checkpoint is None:
        return {}
    row = data_row(session.checkpoint)
    names = {
        "description": "text",
        "train_tokens": "tokens",
        "val_tokens": "held-out tokens",
        "sha256": "sha256 of the documents",
    }
    found = {title: row[name] for name, title in names.items() if row.get(name) is not None}
    return {**found, "tokens that were trained on": session.position.tokens}


def _scores(session: Session) -> Iterator[str]:
    """What evaluations of the checkpoint gave."""
    if session.checkpoint is None:
        return
    try:
        evaluated = read_evaluation(session.checkpoint)
        rows = read_scores(folder_of(session))
    except AptError:
        return
    lines = []
    if evaluated is not None:
        lines.append(("held-out text while training", "loss", f"{evaluated.loss:.6g}"))
        lines += [("", name, f"{value:.6g}") for name, value in evaluated.scores.items()]
    for row in rows:
        if row.step != session.position.step:
            continue
        for name, figure in row.metrics.items():
            bounds = ""
            if figure.low is not None and figure.high is not None:
                bounds = f" ({figure.low:.6g} to {figure.high:.6g})"
            lines.append((f"{row.task} ({row.weights})", name, f"{figure.value:.6g}{bounds}"))
    if lines:
        yield "| | | |\n|---|---|---|"
    for line in lines:
        yield f"| {' | '.join(map(_cell, line))} |"


def _dropped(certificate: Certificate) -> Iterator[str]:
    dropped = certificate.dropped
    if dropped is not None:
        yield (
            f"The model was trained with {', '.join(dropped.parts)}, which the target cannot have. "
            f"Without: {dropped.bits_per_byte_after:.4f} bits per byte of {dropped.text}; with: "
            f"{dropped.bits_per_byte_before:.4f}."
        )


def _certificate(certificate: Certificate) -> Iterator[str]:
    if not certificate.proven or certificate.logits is None:
        yield f"**Unproven**: {certificate.unproven}."
        return
    versions = ", ".join(f"{name} {version}" for name, version in certificate.versions.items())
    rounded = certificate.rounding
    own = "the run's model" if rounded is None else "the run's model with the rounded weights"
    yield (
        f"The export was run by {certificate.runtime} in a process without APT, and compared with "
        f"{own}; `{CERTIFICATE}` has all figures.\n"
    )
    at = "" if certificate.share == 1 else f" at {certificate.share:.0%} of the places"
    rounding = {}
    if rounded is not None:
        rounding["loss in nats a token, rounded"] = (
            f"{rounded.loss_after:.4f}; before: {rounded.loss_before:.4f} (divergence "
            f"{rounded.divergence:.2g})"
        )
    yield from _rows(
        {
            "largest difference of logits": f"{certificate.logits.absolute:.2g}, relative "
            f"{certificate.logits.relative:.2g}{at} (allowed: {certificate.tolerance:g})",
            "greedy tokens equal": f"{certificate.equal_tokens:,} of {certificate.tokens:,} after "
            f"{certificate.prompts} prompts",
            **_rounding(certificate),
            "texts encoded alike": f"{certificate.equal_texts} of {certificate.texts}"
            if certificate.texts
            else "the program has no tokenizer",
            **rounding,
            "by": versions,
        }
    )


def _rounding(certificate: Certificate) -> dict[str, str]:
    rounding = certificate.rounding
    if rounding is None:
        return {}
    losses = f"{rounding.loss_before:.4f} before, {rounding.loss_after:.4f} after"
    return {"rounding the weights": f"nats a token: {losses}; the figures above are of after"}


def _provenance(session: Session, certificate: Certificate) -> dict[str, Any]:
    origin, manifest = certificate.origin, manifest_of(session) if session.checkpoint else {}
    versions = manifest.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    plugins = manifest.get("plugins")
    named = [
        " ".join(str(row[key]) for key in ("name", "version") if row.get(key))
        for row in (plugins if isinstance(plugins, list) else ())
        if isinstance(row, dict)
    ]
    found = {
        "profile": origin.profile,
        "step": origin.step,
        "weights": origin.weights,
        "began": manifest.get("started"),
        "ended": manifest.get("ended"),
        "exported": certificate.time,
        "trained by": ", ".join(
            f"{name} {versions[name]}" for name in SHOWN_VERSIONS if name in versions
        ),
        "plugins": ", ".join(named),
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


def _profile(session: Session) -> Iterator[str]:
    """The profile as the checkpoint has it, where secrets are masked; without what says nothing of
    the model, and without the folders of this machine."""
    if session.checkpoint is None:
        return
    try:
        text = read_file(session.checkpoint / "profile.yaml", MAX_BYTES).decode("utf-8")
        profile = saved_profile(text)
    except (OSError, ValueError, AptError):
        return
    kept = {key: value for key, value in profile.items() if key not in ELSEWHERE}
    text = yaml.safe_dump(_without_folders(kept), sort_keys=False, allow_unicode=True)
    yield f"````yaml\n{text.rstrip()}\n````"


def _without_folders(value: Any) -> Any:
    """``value`` with the last name alone of each absolute path."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return f"…/{value.rstrip('/').rpartition('/')[2]}"
    return value
