"""A scheduled regulariser: rewards uncertain predictions (Pereyra et al. 2017), less and less.

apt-train -p tiny_debug --plugin examples/confidence_penalty.py \
    --schedules.confidence_weight '{start: 0.1, end: 0, by: step, until: 2000}'
"""

from __future__ import annotations

from apt_core import PluginInfo, SectionSpec, hookimpl

PLUGIN = PluginInfo(summary="subtracts the entropy of predictions from the loss", version="1.0.0")


@hookimpl
def apt_register_config():
    return [SectionSpec(schedule_params=("confidence_weight",))]


@hookimpl
def apt_loss_terms(trainer, output):
    weight = trainer.param("confidence_weight", default=0.05)
    if not weight:
        return None
    log_p = output.logits.float().log_softmax(-1)
    return {"negative_entropy": weight * (log_p.exp() * log_p).sum(-1).mean()}
