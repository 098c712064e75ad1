"""Exports a session's model: judges it, writes it, has it proven, puts it in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from apt_core import AptError, ConfigError, Problem, __version__
from apt_core.files import write_atomically
from apt_core.inference.chat import FORMATS, ChatFormat, format_called, format_of
from apt_core.modeling.placement import num_threads
from apt_core.modeling.plain import drop_beyond, plain_model
from apt_core.providers import ExporterProvider, ExportJob, PlainModel, Proof
from apt_core.requirements import unmet
from apt_core.runs import Session
from apt_core.runs.folder import now
from apt_plugins.export.card import card_of
from apt_plugins.export.certificate import (
    CARD,
    Certificate,
    Dropped,
    Measured,
    Origin,
    Rounding,
    hashes_of,
)
from apt_plugins.export.comparing import Comparison, compare
from apt_plugins.export.origin import folder_of
from apt_plugins.export.own_answers import OwnAnswers, RoundedAnswers
from apt_plugins.export.questions import Questions, questions_for
from apt_plugins.export.rounding import cost_of_rounding
from apt_plugins.export.runtimes import answered
from apt_plugins.export.settings import EXTRAS
from apt_plugins.export.staging import check_outside, check_target, staged
from apt_plugins.export.tokenizers import chat_template_of

Tell = Callable[[str], None]


def _nobody(what: str) -> None:
    pass


class HeldOut(Protocol):
    """Held-out text of a run."""

    def prompts(self) -> Sequence[Sequence[int]]:
        """Some of its documents, as ids; empty where there are none."""

    def bits_per_byte(self, session: Session) -> tuple[float, str]:
        """The score of a session's model on it, and what the text is."""


@dataclass(frozen=True)
class Order:
    """What is to be exported where: the exporter called ``target`` with its ``options``, into
    ``output``, which ``force`` lets replace an earlier export; without the parts that ``drop``
    names. ``unproven``: also where the target's runtime is not installed. ``chat_format`` names
    what conversations become. ``origin`` is what the certificate says of the run."""

    target: str
    output: Path
    origin: Origin
    options: Mapping[str, Any] = field(default_factory=dict)
    drop: Sequence[str] = ()
    chat_format: str = "auto"
    unproven: bool = False
    force: bool = False


def exporter_of(session: Session, target: str, options: Mapping[str, Any]) -> ExporterProvider:
    """The exporter of this name with its options. Raises ConfigError for an unknown one, for one
    whose packages are not installed, and for options that it does not have."""
    problem = session.registry.known.check_name("exporter", target, key="--to")
    if problem is not None:
        raise ConfigError(problem)
    spec = session.registry.spec("exporter", target)
    if missing := unmet(spec.requires):
        brought = _brought_by(EXTRAS.get(target) if spec.plugin == "export" else None)
        raise ConfigError(f"{target} cannot be written here: {'; '.join(missing)}{brought}", "--to")
    if options and spec.config is None:
        raise ConfigError(
            Problem(f"{target} has no settings", f"--option {name}") for name in sorted(options)
        )
    prefix = f"exporter:{target}."
    try:
        found = session.registry.get("exporter", target, dict(options), fallback=False)
    except ConfigError as error:
        raise ConfigError(
            Problem(
                each.message,
                f"--option {each.key.removeprefix(prefix)}" if each.key else "--option",
                hint=each.hint,
            )
            for each in error.problems
        ) from None
    if not isinstance(found, ExporterProvider):
        kind = type(found).__name__
        raise AptError(
            f"exporter:{target} (plugin {spec.plugin}) is a {kind}, not an ExporterProvider"
        )
    return found


def plain_form(session: Session, exporter: ExporterProvider) -> PlainModel:
    """The plain form of the session's model, for ``exporter``. Raises ConfigError with everything
    that stands against the export."""
    problems: list[Problem] = []
    try:
        plain = plain_model(session.model, session.tokenizer.vocab_size, exporter.holds)
    except ConfigError as error:
        raise ConfigError(error.problems) from None
    problems += exporter.check(plain.shape, session.tokenizer)
    if problems:
        raise ConfigError(problems)
    return plain


def chat_format_for(session: Session, name: str) -> ChatFormat:
    """The format of this name; ``auto`` is the one in which ``apt-chat`` talks with the model, but
    no dialogue, which no model was trained on. Raises ConfigError for an unknown one."""
    if name != "auto":
        return format_called(name)
    found = format_of(session)
    return FORMATS["template"] if found is FORMATS["dialogue"] else found


def why_unproven(exporter: ExporterProvider) -> str:
    """Why an export cannot be proven here; empty where it can."""
    proof = exporter.proof
    if proof is None:
        return "nothing is known that runs such an export"
    if missing := unmet(proof.requires):
        return f"{proof.runtime} cannot run it here: {'; '.join(missing)}{_brought_by(proof.extra)}"
    return ""


def _brought_by(extra: str | None) -> str:
    return f'; pip install "apt-kernel[{extra}]" brings all that is needed' if extra else ""


def export(
    session: Session,
    order: Order,
    *,
    text: Callable[[], HeldOut] | None = None,
    tell: Tell = _nobody,
) -> Certificate:
    """Export the model of ``session``, which is changed where parts are dropped.

    ``text`` gives held-out text; without it prompts are of texts of our own, and nothing can be
    dropped.

    Raises ConfigError for what cannot be exported or proven, AptError where the export cannot be
    written or does not compute what the run's model does: nothing is left of it then.
    """
    check_target(order.output, force=order.force)
    if session.checkpoint is not None:
        check_outside(order.output, folder_of(session))
    exporter = exporter_of(session, order.target, order.options)
    chat_format = chat_format_for(session, order.chat_format)
    reason = why_unproven(exporter)
    if reason and not order.unproven:
        hint = "--unproven exports it without a proof"
        raise ConfigError(f"the export would be unproven: {reason}", "--to", hint=hint)
    held_out = None
    if order.drop:
        held_out = _opened(text, tell)
    dropped = _dropped(session, order.drop, held_out, tell)
    plain = plain_form(session, exporter)
    with staged(order.output, force=order.force) as (folder, publish):
        tokenizer, name = session.tokenizer, session.config.name
        template = chat_template_of(chat_format, tokenizer)
        job = ExportJob(folder, plain, tokenizer, name, template, tell)
        exporter.write(job)
        certificate = Certificate(
            target=order.target,
            options=dict(order.options),
            origin=order.origin,
            apt=__version__,
            time=now(),
            proven=not reason,
            unproven=reason,
            chat_format=chat_format.name,
            dropped=dropped,
            files=hashes_of(folder),
        )
        if not reason:
            proof = exporter.proof
            assert proof is not None
            held_out = held_out or (_opened(text, tell) if text is not None else None)
            prompts = () if held_out is None else held_out.prompts()
            questions = questions_for(plain.shape, tokenizer, prompts, chat_format)
            proven = prove(session, exporter, plain, folder, questions, tell, chat_format)
            comparison = proven.comparison
            certificate = certified(certificate, proof, proven, questions)
            if comparison.faults:
                raise AptError(f"{order.target}: {refusal(comparison)}; nothing is left of it")
        certificate.write(folder)
        usage = exporter.usage(order.output.name)
        write_atomically(folder / CARD, card_of(session, certificate, plain.shape, usage))
        publish()
    return certificate


@dataclass(frozen=True)
class Proven:
    """The ``comparison`` of an export with the session's model, or with what the export has rounded
    it to and what that costs, and the ``versions`` of the packages that ran it."""

    comparison: Comparison
    versions: Mapping[str, str]
    rounding: Rounding | None = None


def prove(
    session: Session,
    exporter: ExporterProvider,
    plain: PlainModel,
    folder: Path,
    questions: Questions,
    tell: Tell = _nobody,
    chat_format: ChatFormat = FORMATS["template"],
) -> Proven:
    """Run the export in ``folder`` of the session's model, in ``plain`` form, by its program.
    Raises RuntimeFailed where that fails."""
    proof = exporter.proof
    assert proof is not None
    if proof.normal_form is not None:
        questions = questions.normalized(proof.normal_form)
    threads = num_threads(session.config)
    with answered(proof, [(folder, questions)], tell, threads=threads) as [foreign]:
        own, rounding = OwnAnswers(session, chat_format), None
        stored = exporter.stored(plain)
        if stored is not None:
            tell("comparing the model with what the export rounds it to")
            rounded = RoundedAnswers(session, stored, chat_format)
            own, rounding = rounded, cost_of_rounding(own, rounded, questions)
        found = compare(own, foreign, questions, proof.tolerance, tell, share=proof.share)
        return Proven(found, foreign.versions, rounding)


def refusal(comparison: Comparison) -> str:
    """What speaks against an export, in words."""
    return "the export is not what the run's model is: " + "; ".join(comparison.faults)


def certified(
    certificate: Certificate,
    proof: Proof,
    proven: Proven,
    questions: Questions,
) -> Certificate:
    """``certificate`` with what was proven."""
    comparison = proven.comparison
    blocks = [comparison.blocks[number] for number in sorted(comparison.blocks)]
    return certificate.model_copy(
        update={
            "runtime": proof.runtime,
            "versions": dict(proven.versions),
            "tolerance": comparison.tolerance,
            "share": comparison.share,
            "rounding": proven.rounding,
            "logits": _measured(comparison.logits),
            "places": comparison.places,
            "blocks": [_measured(block) for block in blocks],
            "prompts": comparison.prompts,
            "prompts_of_held_out_text": questions.held_out,
            "tokens": comparison.tokens,
            "equal_tokens": comparison.equal_tokens,
            "ties": comparison.ties,
            "texts": comparison.encoded,
            "equal_texts": comparison.encoded - len(comparison.not_encoded),
            "ends_equal": comparison.ends_equal,
        }
    )


def _measured(difference: Any) -> Measured:
    return Measured(absolute=difference.absolute, relative=difference.relative)


def _dropped(
    session: Session,
    names: Sequence[str],
    text: HeldOut | None,
    tell: Tell,
) -> Dropped | None:
    """Take out of the session's model what ``names`` call, and measure what that costs."""
    if not names:
        return None
    assert text is not None
    tell("scoring the model")
    before, by = text.bits_per_byte(session)
    parts = drop_beyond(session.model, names)
    tell(f"scoring the model without {', '.join(parts)}")
    after, _ = text.bits_per_byte(session)
    return Dropped(parts=parts, bits_per_byte_before=before, bits_per_byte_after=after, text=by)


def _opened(text: Callable[[], HeldOut] | None, tell: Tell) -> HeldOut:
    assert text is not None
    tell("reading held-out text")
    return text()
