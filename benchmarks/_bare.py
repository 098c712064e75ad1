"""The baseline of trainers: nanoGPT's model and a bare training loop, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """nanoGPT's published recipe for a CPU (``config/train_shakespeare_char.py`` with the flags
    that its README gives). ``length`` is in tokens, ``gradient_clip`` a norm."""

    steps: int = 2000
    batch_size: int = 12
    length: int = 64
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_clip: float = 1.0

    def learning_rate_at(self, step: int) -> float:
        """The rate of the step after ``step`` others: a linear warm-up, then half a cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        share = (1 + math.cos(math.pi * progress)) / 2
        return self.min_learning_rate + share * (self.learning_rate - self.min_learning_rate)


def nanogpt_section(num_layers: int, num_heads: int, d_model: int, length: int) -> dict[str, Any]:
    """The section ``model`` of a profile with the parts of :class:`NanoGPT`."""
    return {
        "num_layers": num_layers,
        "num_heads": num_heads,
        "d_model": d_model,
        "d_ff": 4 * d_model,
        "max_seq_len": length,
        "attention_name": "mha",
        "ffn_name": "gelu",
        "norm_name": "layernorm",
        "position_name": "learned",
    }


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Fused AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        fused=True,
    )


def random_windows(
    tokens: Tensor, batch_size: int, length: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 [B, T], at random places of ``tokens``, int64 [N]."""
    starts = torch.randint(len(tokens) - length, (batch_size,), generator=generator).tolist()
    inputs = torch.stack([tokens[start : start + length] for start in starts])
    targets = torch.stack([tokens[start + 1 : start + 1 + length] for start in starts])
    return inputs, targets


def train(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: Callable[[], tuple[Tensor, Tensor]],
    recipe: Recipe,
) -> None:
    """Train for ``recipe.steps`` without logging, checks or evaluation.

    ``batch`` returns a step's inputs and targets, ``loss`` maps them to a 0-d tensor.
    """
    optimizer = adamw(model, recipe)
    parameters = list(model.parameters())
    model.train()
    for step in range(recipe.steps):
        inputs, targets = batch()
        loss(inputs, targets).backward()
        nn.utils.clip_grad_norm_(parameters, recipe.gradient_clip)
        learning_rate = recipe.learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class NanoGPT(nn.Module):
    """nanoGPT's model: learned positions, LayerNorm and linear layers without biases, GELU, a tied
    head, no dropout. Maps ids [B, T], int64, to logits [B, T, V]."""

    def __init__(
        self,
        *,
        vocab_size: int = 256,
        length: int = 64,
        num_layers: int = 4,
        num_heads: int = 4,
        d_model: int = 128,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(length, d_model)
        self.blocks = nn.ModuleList(_Block(d_model, num_heads) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(d_model, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                std = 0.02 / math.sqrt(2 * num_layers) if name.endswith("out.weight") else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.final_norm(x), self.embedding.weight)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats per token."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())


class _Block(nn.Module):
    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(d_model, bias=False)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.attention_out = nn.Linear(d_model, d_model, bias=False)
        self.ffn_norm = nn.LayerNorm(d_model, bias=False)
        self.ffn_in = nn.Linear(d_model, 4 * d_model, bias=False)
        self.ffn_out = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return x + self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(x))))
