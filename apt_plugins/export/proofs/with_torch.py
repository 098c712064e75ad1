"""Computes plain weights by the formulas of their documentation, in fp32 on the CPU.

Shapes: T tokens, D d_model, H query heads, K key and value heads, R the width of a head, F hidden
units, E experts.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from child import Runtime, main


class Plain(Runtime):
    def __init__(self, target: str, settings: dict[str, Any]) -> None:
        super().__init__()
        import safetensors.torch
        import tokenizers
        import torch

        self.torch = torch
        self.versions = {each.__name__: each.__version__ for each in (torch, tokenizers)}
        folder = Path(target)
        self.shape = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.weights: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            for name, tensor in safetensors.torch.load_file(file).items():
                self.weights[name] = tensor.float()
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.cos, self.sin = self.rope_tables()

    def rope_tables(self) -> tuple[Any, Any]:
        """[max_seq_len, R/2] each."""
        torch, rope = self.torch, self.shape["rope"]
        frequencies = torch.tensor(rope["frequencies"], dtype=torch.float64)
        places = torch.arange(self.shape["max_seq_len"], dtype=torch.float64)
        angles = places[:, None] * frequencies
        return (rope["gain"] * angles.cos()).float(), (rope["gain"] * angles.sin()).float()

    def norm(self, x: Any, name: str) -> Any:
        mean = x.square().mean(-1, keepdim=True)
        return x * (mean + self.shape["norm_eps"]).rsqrt() * self.weights[name]

    def turned(self, x: Any, start: int) -> Any:
        """x [T, heads, R] at the places from ``start`` on."""
        first, second = x.chunk(2, -1)
        places = slice(start, start + len(x))
        cos, sin = self.cos[places, None], self.sin[places, None]
        return self.torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def attention(self, x: Any, place: str, cache: dict[str, Any]) -> Any:
        shape, weights = self.shape, self.weights
        heads, kv_heads, width = shape["num_heads"], shape["num_kv_heads"], shape["head_dim"]
        q = (x @ weights[f"{place}.q"].T).view(len(x), heads, width)
        k = (x @ weights[f"{place}.k"].T).view(len(x), kv_heads, width)
        v = (x @ weights[f"{place}.v"].T).view(len(x), kv_heads, width)
        if shape["qk_norm"]:
            q, k = self.norm(q, f"{place}.q_norm"), self.norm(k, f"{place}.k_norm")
        before = cache.get(place)
        start = 0 if before is None else len(before[0])
        q, k = self.turned(q, start), self.turned(k, start)
        if before is not None:
            k, v = self.torch.cat([before[0], k]), self.torch.cat([before[1], v])
        cache[place] = k, v
        k, v = (each.repeat_interleave(heads // kv_heads, 1) for each in (k, v))
        scores = self.torch.einsum("thr,shr->hts", q, k) / math.sqrt(width)
        future = self.torch.ones(len(x), len(k), dtype=self.torch.bool).triu(start + 1)
        shares = scores.masked_fill(future, float("-inf")).softmax(-1)
        mixed = self.torch.einsum("hts,shr->thr", shares, v).flatten(1)
        return mixed @ weights[f"{place}.out"].T

    def ffn(self, x: Any, place: str) -> Any:
        gate, up, down = (self.weights[f"{place}.{name}"] for name in ("gate", "up", "down"))
        silu = self.torch.nn.functional.silu
        if not self.shape["num_experts"]:
            return (silu(x @ gate.T) * (x @ up.T)) @ down.T
        scores = (x @ self.weights[f"{place}.router"].T).softmax(-1)
        shares, chosen = scores.topk(self.shape["experts_per_token"], -1)
        if self.shape["renormalised"]:
            shares = shares / shares.sum(-1, keepdim=True)
        y = self.torch.zeros_like(x)
        for token in range(len(x)):
            for share, expert in zip(shares[token], chosen[token].tolist(), strict=True):
                hidden = silu(gate[expert] @ x[token]) * (up[expert] @ x[token])
                y[token] += share * (down[expert] @ hidden)
        return y

    def forward(self, ids: list[int], stream: bool) -> tuple[Any, list[Any]]:
        return self.after(ids, {})

    def after(self, ids: list[int], cache: dict[str, Any]) -> tuple[Any, list[Any]]:
        """The logits and streams of ``ids`` after those whose keys and values ``cache`` has."""
        x, streams = self.weights["embedding"][ids], []
        for number in range(self.shape["num_layers"]):
            place = f"blocks.{number}"
            normed = self.norm(x, f"{place}.attention_norm")
            x = x + self.attention(normed, f"{place}.attention", cache)
            x = x + self.ffn(self.norm(x, f"{place}.ffn_norm"), f"{place}.ffn")
            streams.append(x.numpy())
        head = self.weights["embedding" if self.shape["tied"] else "head"]
        return (self.norm(x, "final_norm") @ head.T).numpy(), streams

    def greedy(self, ids: list[int], count: int) -> list[int]:
        cache: dict[str, Any] = {}
        found, fed = [], ids
        for _ in range(count):
            found.append(int(self.after(fed, cache)[0][-1].argmax()))
            fed = found[-1:]
        return found

    def encode(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text).ids
        return found


if __name__ == "__main__":
    main(Plain)
