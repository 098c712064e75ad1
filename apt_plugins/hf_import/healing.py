"""Makes the run with TVA in place of the folder's attention, and trains what was lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from math import nan
from pathlib import Path

import torch
from torch import Tensor, nn

from apt_core.data.loading import batch_plan, load_data
from apt_core.errors import Interrupted
from apt_core.kernel import Kernel
from apt_core.modeling.calling import forward_batch
from apt_core.modeling.costs import layers_of
from apt_core.modeling.modes import eval_mode
from apt_core.modeling.to_tva import MINIMISED, Heads
from apt_core.training import Trainer
from apt_plugins.hf_import.asked import Asked, Imported
from apt_plugins.hf_import.filling import fill, named_as_ours
from apt_plugins.hf_import.hf_config import HFModel
from apt_plugins.hf_import.hf_weights import HFWeights
from apt_plugins.hf_import.making import made_run
from apt_plugins.hf_import.profile import kernel_of
from apt_plugins.hf_import.to_tva import of_layers

SAMPLE_TOKENS = 2**15
"""The tokens at least by which the inputs of attention are known, where there are so many."""


def convert(
    asked: Asked,
    model: HFModel,
    weights: HFWeights,
    moments: Sequence[Tensor],
    run: Path,
    imported: Imported,
) -> None:
    """Make the run with TVA in place of the folder's attention."""
    assert asked.rank is not None
    kernel = kernel_of(asked, model, asked.rank)
    config = kernel.config
    heads = Heads(
        config.model.num_heads,
        config.model.num_kv_heads or config.model.num_heads,
        model.head_dim,
        config.model.rope,
        config.seq_len,
    )
    lost: list[dict[str, float]] = []
    tensors = of_layers(
        named_as_ours(model, weights),
        moments,
        heads,
        asked.rank,
        width=config.model.d_model // config.model.num_heads,
        seed=config.training.seed,
        lost=lost,
    )
    made = made_run(kernel, run, lambda built: fill(built, tensors))
    imported.parameters = made.parameters
    imported.to_tva = {
        "rank": asked.rank,
        "head_dim": model.head_dim,
        "minimised": MINIMISED,
        "lost": lost,
        "loss_before": imported.loss,
        "loss_after": made.loss,
    }


@torch.no_grad()
def moments_of(kernel: Kernel, trainer: Trainer) -> list[Tensor]:
    """E[x xᵀ] [D, D] of what each attention reads, over the first training windows of the run."""
    sums = [torch.zeros(()) for _ in layers_of(trainer.model)]
    count, tokens = 0, torch.zeros(())

    def note(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0][tokens].float()
            sums[layer] = sums[layer].to(rows.device) + rows.T @ rows

        return hook

    data = load_data(kernel)
    attentions = [block.attention for block in layers_of(trainer.model)]
    handles = [each.register_forward_pre_hook(note(n)) for n, each in enumerate(attentions)]
    try:
        plan = batch_plan(kernel, data, 0, 1)
        with closing(plan), eval_mode(trainer.model):
            for index in range(plan.steps_per_epoch):
                for batch in plan.step(1, index)[0]:
                    moved = batch.to(trainer.device)
                    tokens = moved.token_mask()
                    forward_batch(trainer.model, trainer.model, moved)
                    count += moved.token_count
                if count >= SAMPLE_TOKENS:
                    break
    finally:
        for handle in handles:
            handle.remove()
        data.close()
    return [(each / count).cpu() for each in sums]


def heal(asked: Asked, model: HFModel, imported: Imported) -> None:
    """Take the first steps of the run: what was lost is learned again."""
    kernel = kernel_of(asked, model, asked.rank)
    trainer = Trainer(kernel, output=asked.output, resume=True, stop_at_step=asked.heal_steps)
    result = trainer.fit()
    imported.to_tva |= {
        "heal_steps": result.step,
        "loss_healed": result.figures.get("val_loss", nan),
    }
    if result.exit_code:
        raise Interrupted(result.exit_code - 128)
