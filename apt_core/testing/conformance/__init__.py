"""Checks of the promises that every provider of a kind must keep; one module per kind.

>>> from apt_core.modeling.layers import RMSNormProvider
>>> [check.name for check in checks_of("norm", RMSNormProvider())][:3]
['builds', 'shape', 'gradients']
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from apt_core.testing.conformance.attention import attention_checks
from apt_core.testing.conformance.backbone import backbone_checks
from apt_core.testing.conformance.checks import Check, LeftOut, running_on
from apt_core.testing.conformance.exporter import exporter_checks
from apt_core.testing.conformance.ffn import ffn_checks
from apt_core.testing.conformance.lr_schedule import lr_schedule_checks
from apt_core.testing.conformance.norm import norm_checks
from apt_core.testing.conformance.optimizer import optimizer_checks
from apt_core.testing.conformance.position import position_checks
from apt_core.testing.conformance.task import task_checks
from apt_core.testing.conformance.tokenizer import tokenizer_checks

CHECKS: dict[str, Callable[[Any], list[Check]]] = {
    "attention": attention_checks,
    "ffn": ffn_checks,
    "norm": norm_checks,
    "position": position_checks,
    "backbone": backbone_checks,
    "tokenizer": tokenizer_checks,
    "optimizer": optimizer_checks,
    "lr_schedule": lr_schedule_checks,
    "task": task_checks,
    "exporter": exporter_checks,
}


def checks_of(kind: str, provider: Any, device: str = "cpu") -> list[Check]:
    """The checks of ``provider`` of kind ``kind``, which run on ``device``; empty for a kind
    without checks.

    Nothing is built before a check runs. The first check is ``builds``; if it fails, others fail
    too.
    """
    checks = CHECKS[kind](provider) if kind in CHECKS else []
    return [replace(check, run=partial(_run_on, device, check)) for check in checks]


def _run_on(device: str, check: Check) -> None:
    with running_on(device):
        check.run()


__all__ = ["CHECKS", "Check", "LeftOut", "checks_of"]
