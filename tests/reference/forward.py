"""Slow float64 twins of the methods with forward passes, on a network of tanh layers, in NumPy: no hooks, no autograd."""

from __future__ import annotations

import numpy as np

from tests.reference.merging import regmean


def through(layers, deltas, h):
    """h after every layer W + D: rows are samples."""
    for (W, b), D in zip(layers, deltas, strict=True):
        h = np.tanh(h @ (W + D).T + b)
    return h


def regmean_pp(layers, D, inputs, w, alpha):
    """Layer by layer: task t's inputs come through the layers merged so far."""
    merged = []
    for i in range(len(layers)):
        seen = [through(layers[:i], merged, x) for x in inputs]
        merged.append(regmean([d[i] for d in D], w, [h.T @ h for h in seen], alpha, 1e-6))
    return merged


def featcal(layers, D, anchor, inputs, w, own, pull, ranks):
    """Layer by layer, each regressed on the inputs that the fitted layers below give, cut by an SVD of D S^(1/2)."""
    fitted = []
    for i, ((W, _), rank) in enumerate(zip(layers, ranks, strict=True)):
        S, G = pull * np.eye(W.shape[1]), pull * anchor[i]
        for d, x, weight in zip(D, inputs, w, strict=True):
            merged, mine = through(layers[:i], fitted, x), through(layers[:i], d[:i], x)
            mixed = own * mine + (1 - own) * merged
            size = np.linalg.norm(merged.T @ merged)
            S += weight * merged.T @ merged / size
            G += weight * (mixed @ (W + d[i]).T - merged @ W.T).T @ merged / size
        values, vectors = np.linalg.eigh(S)
        root = vectors * np.sqrt(values) @ vectors.T
        U, s, Vt = np.linalg.svd(G @ np.linalg.inv(S) @ root)
        fitted.append(U[:, :rank] * s[:rank] @ Vt[:rank] @ np.linalg.inv(root))
    return fitted


def entropy(layers, heads, D, inputs, weights):
    """Sum over tasks of the mean entropy of softmax(head(h)); weights are (task, layer)."""
    deltas = [sum(weights[t, i] * D[t][i] for t in range(len(D))) for i in range(len(layers))]
    total = 0.0
    for (W, b), x in zip(heads, inputs, strict=True):
        z = through(layers, deltas, x) @ W.T + b
        z = z - z.max(1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
        total += -(np.exp(log_p) * log_p).sum(1).mean()
    return total


def adamerging(layers, heads, D, batches, init, rate, steps, layerwise=True):
    """Adam on gradients by central differences; batches[t][step % n]."""
    weights = np.full((len(D), len(layers) if layerwise else 1), init)
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    spread = lambda w: np.broadcast_to(w, (len(D), len(layers)))  # noqa: E731
    for step in range(1, steps + 1):
        inputs = [b[(step - 1) % len(b)] for b in batches]
        gradient = np.zeros_like(weights)
        for place in np.ndindex(weights.shape):
            e = np.zeros_like(weights)
            e[place] = 1e-5
            higher = entropy(layers, heads, D, inputs, spread(weights + e))
            gradient[place] = (higher - entropy(layers, heads, D, inputs, spread(weights - e))) / 2e-5
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weights = weights - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return spread(weights)
