"""A loss term: keeps the normaliser of the softmax near one; a schedule may change its weight.

apt-train -p tiny_debug --plugin examples/z_loss.py \
    --schedules.enable_z_loss_at_step 100 --schedules.z_loss_weight '{start: 0, end: 1e-3}'
"""

from __future__ import annotations

from apt_core import PluginInfo, SectionSpec, hookimpl

PLUGIN = PluginInfo(summary="penalises large logits (PaLM's z-loss)", version="1.0.0")


@hookimpl
def apt_register_config():
    return [SectionSpec(schedule_params=("z_loss_weight",))]


@hookimpl
def apt_loss_terms(trainer, output):
    weight = trainer.param("z_loss_weight", default=1e-4)
    log_z = output.logits.float().logsumexp(-1)
    return {"z": weight * log_z.square().mean()}
