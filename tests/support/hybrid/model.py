"""The test family in plain PyTorch: one sequence at a time, from its first token, nothing of the package in it."""

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-6
_WIDE = (4, 2, 16, 16, 16, 1e4, None, None, 16**-0.5)
_LOCAL = (2, 1, 32, 24, 16, 500.0, 16, 4.0, 0.25)
_UNTURNED = (2, 1, 32, 24, 0, 1.0, None, None, 0.25)
# Heads, kv_heads, size of keys, of values and of what is rotated, base, window, softcap, scale.
ATTENTION = {"wide": _WIDE, "local": _LOCAL, "sandwich": _LOCAL, "parallel": _WIDE, "scaled": _UNTURNED}
TOP_K = 2
LIMIT = 0.75  # of gates and ups of experts with biases


class PlainModel:
    """weights: the tensors of a checkpoint by name. layers: the kind of each."""

    def __init__(self, weights: dict[str, Tensor], layers: tuple[str, ...]) -> None:
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.layers = layers

    def logits(self, ids: Tensor) -> Tensor:
        """[S, vocabulary] of a sequence [S]."""
        x = self.weights["model.embedding"][ids]
        for i, kind in enumerate(self.layers):
            own = {k.removeprefix(f"model.layers.{i}."): v for k, v in self.weights.items() if f".layers.{i}." in k}
            normed = _norm(x, own["attention_norm.weight"])
            mixer = {"recurrent": _recurrence, "latent": _latent}.get(kind)
            y = mixer(normed, own) if mixer else _attention(normed, own, kind)
            if kind == "parallel":
                x = x + y + _dense(normed, own)
            elif kind == "sandwich":
                x = x + _norm(y, 1 + own["attention_post_norm.weight"])
                y = _sparse(_norm(x, own["feed_forward_norm.weight"]), own)
                x = x + _norm(y, 1 + own["feed_forward_post_norm.weight"])
            else:
                x = x + y
                normed = _norm(x, own["feed_forward_norm.weight"])
                x = x + (_dense(normed, own) if kind == "recurrent" else _sparse(normed, own))
        return _norm(x, self.weights["model.norm.weight"]) @ self.weights["model.head"].T


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * gain


def _linear(x: Tensor, own: dict[str, Tensor], name: str) -> Tensor:
    y = x @ own[f"{name}.weight"].T
    return y + own[f"{name}.bias"] if f"{name}.bias" in own else y


def _attention(x: Tensor, own: dict[str, Tensor], kind: str) -> Tensor:
    heads, kv_heads, dim, value_dim, rotated, base, window, softcap, scale = ATTENTION[kind]
    length = len(x)
    q, k, v = (
        _linear(x, own, f"attention.{name}").view(length, count, size)
        for name, count, size in (("q", heads, dim), ("k", kv_heads, dim), ("v", kv_heads, value_dim))
    )
    if "attention.q_norm.weight" in own:
        q, k = _norm(q, own["attention.q_norm.weight"]), _norm(k, own["attention.k_norm.weight"])
    if kind == "scaled":
        q = q * _growth(length)
    angle = torch.arange(length)[:, None] * base ** -(torch.arange(0, rotated, 2) / rotated).double()
    q, k = (_rotated(t, angle) for t in (q, k))
    y = torch.empty(length, heads, value_dim, dtype=torch.float64)
    for head in range(heads):
        own_head = head // (heads // kv_heads)
        for t in range(length):
            first = 0 if window is None else max(0, t - window + 1)
            scores = k[first : t + 1, own_head] @ q[t, head] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if "attention.sinks" in own:
                scores = torch.cat([scores, own["attention.sinks"][head, None]])
            y[t, head] = torch.softmax(scores, 0)[: t + 1 - first] @ v[first : t + 1, own_head]
    return _linear(y.flatten(1), own, "attention.out")


def _latent(x: Tensor, own: dict[str, Tensor]) -> Tensor:
    """With the keys and values of each head, as the method is explained."""
    length, heads, nope, rotated, latent = len(x), 4, 8, 16, 32
    q = _norm(_linear(x, own, "attention.q_down"), own["attention.q_norm.weight"])
    q = _linear(q, own, "attention.q_up").view(length, heads, nope + rotated) * _growth(length)
    c, turned = _linear(x, own, "attention.kv_down").split([latent, rotated], 1)
    c = _norm(c, own["attention.kv_norm.weight"])
    angle = torch.arange(length)[:, None] * 500.0 ** -(torch.arange(0, rotated, 2) / rotated).double()
    q = torch.cat([q[..., :nope], _rotated(q[..., nope:], angle)], -1)
    own_keys = torch.einsum("tc,hcn->thn", c, own["attention.key_up"])
    k = torch.cat([own_keys, _rotated(turned[:, None], angle).expand(-1, heads, -1)], -1)
    v = torch.einsum("tc,hvc->thv", c, own["attention.value_up"])
    scores = torch.einsum("thd,shd->hts", q, k) * (nope + rotated) ** -0.5
    shares = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
    return _linear(torch.einsum("hts,shv->thv", shares, v).flatten(1), own, "attention.out")


def _growth(length: int) -> Tensor:
    """The factor on queries by place, [S, 1, 1]."""
    return (1 + 0.5 * torch.log(1 + torch.floor((torch.arange(length) + 1) / 8)))[:, None, None]


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    half = angle.shape[1]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)


def _recurrence(x: Tensor, own: dict[str, Tensor]) -> Tensor:
    inner, a = _linear(x, own, "attention.inner"), own["attention.decay"]
    h, y = torch.zeros_like(a), []
    for row in inner:
        h = a * h + (1 - a) * row
        y.append(h)
    return _linear(torch.stack(y) * F.silu(_linear(x, own, "attention.gate")), own, "attention.out")


def _dense(x: Tensor, own: dict[str, Tensor]) -> Tensor:
    inner = F.silu(_linear(x, own, "feed_forward.gate")) * _linear(x, own, "feed_forward.up")
    return _linear(inner, own, "feed_forward.down")


def _sparse(x: Tensor, own: dict[str, Tensor]) -> Tensor:
    shares = torch.softmax(_linear(x, own, "feed_forward.router"), -1)
    y, biased = torch.zeros_like(x), "feed_forward.down_bias" in own
    for t, row in enumerate(x):
        weights, chosen = shares[t].topk(TOP_K)
        for weight, expert in zip(weights / weights.sum(), chosen, strict=True):
            inner = own["feed_forward.gate_up"][expert] @ row
            if biased:
                gate, up = (inner + own["feed_forward.gate_up_bias"][expert]).chunk(2)
                gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
                y[t] += weight * own["feed_forward.down_bias"][expert]
                inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            else:
                gate, up = inner.chunk(2)
                inner = F.silu(gate) * up
            y[t] += weight * (own["feed_forward.down"][expert] @ inner)
    return y
