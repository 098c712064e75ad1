"""Seeds as pure functions of the position: nothing else decides what is drawn."""

from __future__ import annotations

import torch

from apt_core.modeling.init import seed_of


def seed_model_generator(device: torch.device, seed: int, step: int, micro: int, rank: int) -> None:
    """Seed the generator that the model's dropout draws from, and no other, for a micro-batch."""
    seed = seed_of(seed, f"step/{step}/{micro}/{rank}")
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
