"""Computes what ``exporter:numpy`` has written."""

from __future__ import annotations

import os
import signal

import numpy as np

from apt_plugins.export.proofs.child import Runtime, main


class Numpy(Runtime):
    def __init__(self, target, settings):
        super().__init__()
        if settings["fault"] == "crash":
            raise RuntimeError("this file has no sense at all")
        if settings["fault"] == "orphaned":
            os.kill(os.getppid(), signal.SIGKILL)
        self.w = dict(np.load(f"{target}/model.npz"))
        self.layers, self.heads, self.kv_heads = map(int, self.w["numbers"][:3])
        self.theta, self.eps = self.w["numbers"][3:]
        self.versions = {"numpy": np.__version__}

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name]

    def turned(self, x):
        half = x.shape[-1] // 2
        frequencies = self.theta ** (-np.arange(half) / half)
        angles = (np.arange(len(x))[:, None] * frequencies)[:, None]
        cos, sin = np.cos(angles), np.sin(angles)
        one, other = x[..., :half], x[..., half:]
        return np.concatenate([one * cos - other * sin, other * cos + one * sin], -1)

    def block(self, x, n):
        normed = self.norm(x, f"{n}.n1weight")
        q, k, v = ((normed @ self.w[f"{n}.{name}"].T) for name in "qkv")
        q = self.turned(q.reshape(len(x), self.heads, -1))
        k = self.turned(k.reshape(len(x), self.kv_heads, -1))
        v = v.reshape(len(x), self.kv_heads, -1)
        k, v = (each.repeat(self.heads // self.kv_heads, 1) for each in (k, v))
        scores = np.einsum("thr,shr->hts", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shr->thr", shares, v).reshape(len(x), -1) @ self.w[f"{n}.out"].T
        normed = self.norm(x, f"{n}.n2weight")
        gate = normed @ self.w[f"{n}.fgate"].T
        hidden = gate / (1 + np.exp(-gate)) * (normed @ self.w[f"{n}.fup"].T)
        return x + hidden @ self.w[f"{n}.fdown"].T

    def forward(self, ids, stream):
        x, streams = self.w["embedding"][ids].astype(np.float64), []
        for number in range(self.layers):
            x = self.block(x, number)
            streams.append(x)
        return self.norm(x, "final_norm") @ self.w["head"].T, streams

    def greedy(self, ids, count):
        found = list(ids)
        for _ in range(count):
            found.append(int(self.forward(found, False)[0][-1].argmax()))
        return found[len(ids) :]


if __name__ == "__main__":
    main(Numpy)
