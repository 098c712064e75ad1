"""A decoder: keeps the surprise of a text near a target (Mirostat 2, Basu et al. 2021).

apt-generate runs/mine "The" --plugin examples/mirostat.py --set mirostat.surprise=2.5
"""

from __future__ import annotations

import torch
from pydantic import Field

from apt_core import PluginInfo, SectionSpec, hookimpl
from apt_core.config import Section

PLUGIN = PluginInfo(summary="decoding at a constant surprise", version="1.0.0")


class Settings(Section):
    surprise: float = Field(default=3.0, gt=0, description="Bits per token that are aimed at.")
    rate: float = Field(default=0.1, gt=0, le=1, description="How fast the limit follows.")


class Mirostat:
    """Draws among tokens of less surprise than a limit, which follows the target."""

    def __init__(self, settings, seed):
        self.target, self.rate, self.limit = settings.surprise, settings.rate, 2 * settings.surprise
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, input_ids, logits):
        bits = -logits.float().log_softmax(-1).cpu() / torch.log(torch.tensor(2.0))  # [V]
        kept = torch.where(bits <= max(self.limit, float(bits.min())), -bits, -torch.inf)
        token = int(torch.multinomial(torch.exp2(kept), 1, generator=self.generator))
        self.limit -= self.rate * (float(bits[token]) - self.target)
        return token


@hookimpl
def apt_register_config():
    return [SectionSpec("mirostat", Settings)]


@hookimpl
def apt_decoder(request, session):
    return Mirostat(session.config.section("mirostat"), request.seed)
