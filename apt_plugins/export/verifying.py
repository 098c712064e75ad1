"""Repeats the proof of an export that was written before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from apt_core import AptError, ConfigError
from apt_core.modeling.plain import drop_beyond
from apt_core.profile_paths import user_path
from apt_core.runs import Session
from apt_core.runs.finding import find_checkpoint
from apt_core.runs.layout import CHECKPOINTS
from apt_plugins.export.certificate import Certificate, changed_files, read_certificate
from apt_plugins.export.exporting import (
    HeldOut,
    Tell,
    certified,
    chat_format_for,
    exporter_of,
    plain_form,
    prove,
    refusal,
    why_unproven,
)
from apt_plugins.export.questions import questions_for


def run_behind(folder: Path, certificate: Certificate, run: str | None) -> tuple[Path, str]:
    """The checkpoint that was exported, of the run that the certificate names or of ``run``, and
    the weights of it. Raises ConfigError if it is not there."""
    origin = certificate.origin
    place = user_path(run) if run else folder / origin.run
    checkpoint = place / CHECKPOINTS / origin.checkpoint
    found = checkpoint if checkpoint.is_dir() else place
    if not found.is_dir():
        raise ConfigError(
            "the run that was exported is not there",
            "RUN",
            str(place),
            f"name it: apt-export --verify {folder} RUN",
        )
    weights = origin.weights
    if weights == "best":  # of a checkpoint that is named
        names = find_checkpoint(found, "RUN", step=origin.step).names
        weights = "average" if "ema" in names else "last"
    return found, weights


def check_plugins(certificate: Certificate, given: Sequence[str]) -> None:
    """Raise ConfigError for plugins with which the run was exported and that are not given: what
    a certificate names is not imported."""
    missing = [name for name in certificate.origin.plugins if name not in given]
    if missing:
        options = " ".join(f"--plugin {name}" for name in missing)
        raise ConfigError("the export was made with other plugins", "--plugin", hint=options)


def verify(
    session: Session,
    folder: Path,
    *,
    text: Callable[[], HeldOut] | None = None,
    tell: Tell = lambda what: None,
) -> Certificate:
    """The certificate of the export in ``folder`` as it would be written now; ``session`` is that
    of the run, and is changed where parts were dropped.

    Raises ConfigError where it cannot be proven here, AptError where files of the export have
    changed or it does not compute what the run's model does.
    """
    certificate = read_certificate(folder)
    if session.position.step != certificate.origin.step:
        message = f"is at step {session.position.step}, the export of {certificate.origin.step}"
        raise ConfigError(message, "RUN", str(session.checkpoint))
    exporter = exporter_of(session, certificate.target, certificate.options)
    if reason := why_unproven(exporter):
        raise ConfigError(f"it cannot be proven here: {reason}", "--verify", str(folder))
    if changed := changed_files(folder, certificate.files):
        raise AptError(
            f"{folder}: files have changed since the export: {', '.join(changed[:5])}"
            + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        )
    if certificate.dropped is not None:
        drop_beyond(session.model, list(certificate.dropped.parts))
    plain = plain_form(session, exporter)
    prompts = () if text is None else text().prompts()
    chat_format = chat_format_for(session, certificate.chat_format)
    questions = questions_for(plain.shape, session.tokenizer, prompts, chat_format)
    proof = exporter.proof
    assert proof is not None
    proven = prove(session, exporter, plain, folder, questions, tell, chat_format)
    if proven.comparison.faults:
        raise AptError(f"{folder}: {refusal(proven.comparison)}")
    found = certified(certificate, proof, proven, questions)
    return found.model_copy(update={"proven": True, "unproven": ""})
