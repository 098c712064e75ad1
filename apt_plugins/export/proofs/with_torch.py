"""Computes plain weights by the formulas of their documentation, in fp32 on the CPU.

Shapes: B texts, T tokens, S tokens with those before them, D d_model, H query heads, K key and
value heads, R the width of a head, F hidden units, E experts.
"""

import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from child import Runtime, main, padded


class Texts:
    """Texts that are computed together, with their keys and values. ``mask`` has 1 where their
    first ids are no padding."""

    def __init__(self, torch: Any, mask: list[list[int]]) -> None:
        self._torch, self._mask = torch, torch.tensor(mask)
        self._cache: dict[str, Any] = {}
        self._length = 0

    def go_on(self, count: int) -> None:
        """``count`` ids follow: their ``places`` [B, T], and what each does not see [B, T, S]."""
        torch, start = self._torch, self._length
        self._length = start + count
        ones = torch.ones(len(self._mask), max(0, self._length - self._mask.shape[1]))
        mask = torch.cat([self._mask, ones.long()], 1)[:, : self._length]
        self.places = (mask.cumsum(1) - 1).clamp_min(0)[:, start:]
        future = torch.ones(count, self._length, dtype=torch.bool).triu(start + 1)
        # Padding sees itself, so that it has no row of nothing.
        own = torch.eye(self._length, dtype=torch.bool)[start:]
        self.unseen = future | ((mask == 0)[:, None] & ~own)

    def extended(self, place: str, keys: Any, values: Any) -> tuple[Any, Any]:
        """The keys and values [B, S, K, R] of a layer with those that follow."""
        before = self._cache.get(place)
        if before is not None:
            keys, values = (
                self._torch.cat(pair, 1) for pair in zip(before, (keys, values), strict=True)
            )
        self._cache[place] = keys, values
        return keys, values


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

    def turned(self, x: Any, places: Any) -> Any:
        """x [B, T, heads, R] at ``places`` [B, T]."""
        first, second = x.chunk(2, -1)
        cos, sin = self.cos[places][:, :, None], self.sin[places][:, :, None]
        return self.torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def attention(self, x: Any, place: str, texts: "Texts") -> Any:
        shape, weights = self.shape, self.weights
        heads, kv_heads, width = shape["num_heads"], shape["num_kv_heads"], shape["head_dim"]
        q = (x @ weights[f"{place}.q"].T).unflatten(-1, (heads, width))
        k = (x @ weights[f"{place}.k"].T).unflatten(-1, (kv_heads, width))
        v = (x @ weights[f"{place}.v"].T).unflatten(-1, (kv_heads, width))
        if shape["qk_norm"]:
            q, k = self.norm(q, f"{place}.q_norm"), self.norm(k, f"{place}.k_norm")
        q, k = self.turned(q, texts.places), self.turned(k, texts.places)
        k, v = texts.extended(place, k, v)
        k, v = (each.repeat_interleave(heads // kv_heads, 2) for each in (k, v))
        scores = self.torch.einsum("bthr,bshr->bhts", q, k) / math.sqrt(width)
        shares = scores.masked_fill(texts.unseen[:, None], float("-inf")).softmax(-1)
        mixed = self.torch.einsum("bhts,bshr->bthr", shares, v).flatten(2)
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
        for text, token in itertools.product(range(len(x)), range(x.shape[1])):
            to, one = y[text, token], x[text, token]
            for share, expert in zip(
                shares[text, token], chosen[text, token].tolist(), strict=True
            ):
                hidden = silu(gate[expert] @ one) * (up[expert] @ one)
                to += share * (down[expert] @ hidden)
        return y

    def forward(self, ids: list[int], stream: bool) -> tuple[Any, list[Any] | None]:
        texts = Texts(self.torch, [[1] * len(ids)])
        logits, streams = self.after(texts, [ids], last=not stream)
        return logits[0], [each[0] for each in streams] if stream else None

    def after(
        self, texts: "Texts", ids: list[list[int]], *, last: bool = False
    ) -> tuple[Any, list[Any]]:
        """The logits [B, T, V], or those of the ``last`` place [B, 1, V], and streams [B, T, D] of
        ``ids``, with which ``texts`` go on."""
        texts.go_on(len(ids[0]))
        x, streams = self.weights["embedding"][self.torch.tensor(ids)], []
        for number in range(self.shape["num_layers"]):
            place = f"blocks.{number}"
            normed = self.norm(x, f"{place}.attention_norm")
            x = x + self.attention(normed, f"{place}.attention", texts)
            x = x + self.ffn(self.norm(x, f"{place}.ffn_norm"), f"{place}.ffn")
            streams.append(x.numpy())
        if last:
            x = x[:, -1:]
        head = self.weights["embedding" if self.shape["tied"] else "head"]
        return (self.norm(x, "final_norm") @ head.T).numpy(), streams

    def greedy_together(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        new, mask = padded(prompts)
        texts, found = Texts(self.torch, mask), [list[int]() for _ in prompts]
        for _ in range(count):
            new = self.after(texts, new, last=True)[0].argmax(-1).tolist()
            for tokens, token in zip(found, new, strict=True):
                tokens += token
        return found

    def encode(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text).ids
        return found

    def encode_all(self, texts: list[str]) -> list[list[int] | None]:
        return [list(each.ids) for each in self.tokenizer.encode_batch(texts)]


if __name__ == "__main__":
    main(Plain)
