"""Seeds as pure functions of the position: nothing else decides what is drawn."""

from __future__ import annotations

import hashlib

import torch


def seed_model_generator(device: torch.device, seed: int) -> None:
    """Seed the generator that the model's dropout draws from, and no other."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def mix_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts, the same on every platform."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
