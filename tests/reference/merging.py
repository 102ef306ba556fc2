"""Slow float64 twins of the merging methods, written from the papers on dense deltas, in NumPy."""

from __future__ import annotations

import numpy as np

TINY = 1e-9


def combination(D, c):
    return sum(ci * Di for ci, Di in zip(c, D, strict=True))


def linear(D, w):
    return combination(D, np.array(w) / sum(w))


def task_arithmetic(D, w):
    return combination(D, w)


def svd(D, w, rank):
    U, S, Vt = np.linalg.svd(combination(D, w))
    return (U[:, :rank] * S[:rank]) @ Vt[:rank] if rank < len(S) else combination(D, w)


def trim(D, density):
    """The ceil(density n) largest magnitudes of a task over everything it has."""
    flat = np.sort(np.abs(np.concatenate([d.ravel() for d in D])))
    bound = flat[len(flat) - int(np.ceil(density * len(flat)))]
    return [np.where(np.abs(d) >= bound, d, 0.0) for d in D]


def elect(D, w):
    out = np.zeros_like(D[0])
    for i in np.ndindex(out.shape):
        values = [(wi * d[i], abs(wi)) for wi, d in zip(w, D, strict=True) if wi * d[i] != 0]
        sign = 1 if sum(v for v, _ in values) >= 0 else -1
        agreeing = [(v, m) for v, m in values if v * sign > 0]
        out[i] = sum(v for v, _ in agreeing) / sum(m for _, m in agreeing) if agreeing else 0.0
    return out


def ties(D, w, density):
    return elect([trim([d], density)[0] for d in D], w)


def breadcrumbs(D, w, density, gamma):
    out = np.zeros_like(D[0])
    for d, wi in zip(D, w, strict=True):
        n = d.size
        descending = np.sort(np.abs(d).ravel())[::-1]
        high = descending[min(n - 1, int(np.floor(gamma * n)))]
        low = descending[min(n, int(np.ceil(min(1.0, density + gamma) * n))) - 1]
        out += wi * np.where((np.abs(d) <= high) & (np.abs(d) >= low), d, 0.0)
    return out


def sparse_arithmetic(D, w, density, gamma):
    """Largest and smallest magnitudes dropped by their place in the order, L1 norms restored, signs elected, signed mean."""
    kept = []
    for d in D:
        n, flat = d.size, d.flatten()
        left = int(density * n)
        bottom = max(0, n - left - int(gamma * n))
        mask = np.zeros(n)
        mask[np.argsort(np.abs(flat), kind="stable")[bottom : bottom + left]] = 1
        part = flat * mask
        kept.append((part * (np.abs(flat).sum() / np.abs(part).sum() if left else 1)).reshape(d.shape))
    scaled = [p * c for p, c in zip(kept, w, strict=True)]
    sign = np.where(sum(scaled) >= 0, 1, -1)
    agree = [np.sign(s) == sign for s in scaled]
    divisor = sum(c * a for a, c in zip(agree, w, strict=True))
    return sum(s * a for s, a in zip(scaled, agree, strict=True)) / np.where(divisor == 0, 1, divisor)


def sce(D, w, density):
    if len(D) == 1:
        return w[0] * D[0]
    D = [wi * d for wi, d in zip(w, D, strict=True)]
    variance = np.var(np.stack(D), axis=0)
    bound = np.sort(variance.ravel())[::-1][int(np.ceil(density * variance.size)) - 1]
    D = [np.where(variance >= bound, d, 0.0) for d in D]
    energy = np.array([(d**2).sum() for d in D])
    return elect(D, energy / energy.sum()) if energy.sum() > 0 else np.zeros_like(D[0])


def emr(D, w):
    D = [wi * d for wi, d in zip(w, D, strict=True)]
    total = sum(D)
    out = np.zeros_like(total)
    for i in np.ndindex(out.shape):
        sign = 1 if total[i] > 0 else -1
        out[i] = sign * max([abs(d[i]) for d in D if d[i] * sign > 0], default=0.0)
    return out


def nonzero(S):
    return int((S[0] * TINY < S).sum()) if S[0] > 0 else 0


def tsv(D, w):
    U, S, V = [], [], []
    for d, wi in zip(D, w, strict=True):
        u, s, vt = np.linalg.svd(d, full_matrices=False)
        k = nonzero(s)
        U, S, V = [*U, u[:, :k]], [*S, wi * s[:k]], [*V, vt[:k].T]
    return isometry(np.hstack(U)) @ np.diag(np.concatenate(S)) @ isometry(np.hstack(V)).T


def isometry(M):
    U, S, Vt = np.linalg.svd(M, full_matrices=False)
    k = nonzero(S)
    return U[:, :k] @ Vt[:k]


def iso_c(D, w):
    U, S, Vt = np.linalg.svd(combination(D, w), full_matrices=False)
    k = nonzero(S)
    return S[:k].mean() * U[:, :k] @ Vt[:k]


def iso_cts(D, w, common, total):
    W = combination(D, w)
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    total = min(total, len(S))
    own = round((total - int(total * common)) / len(D))
    k = max(0, min(total - own * len(D), nonzero(S)))
    left, values, right = [U[:, :k]], [S[:k]], [Vt[:k].T]
    for d, wi in zip(D, w, strict=True):
        rest = wi * d - U[:, :k] @ (U[:, :k].T @ (wi * d))
        u, s, vt = np.linalg.svd(rest, full_matrices=False)
        n = min(own, nonzero(s) if s[0] > 1e-6 * S[0] else 0)
        left, values, right = [*left, u[:, :n]], [*values, s[:n]], [*right, vt[:n].T]
    return np.concatenate(values).mean() * isometry(np.hstack(left)) @ isometry(np.hstack(right)).T


def knots(D, w, density):
    return in_knots(D, lambda parts: ties(parts, w, density))


def in_knots(D, rule):
    """A rule on the parts S V_t^T of the deltas side by side."""
    U, S, Vt = np.linalg.svd(np.hstack(D), full_matrices=False)
    k = int((1e-5 * S[0] < S).sum())
    return U[:, :k] @ rule(np.split(S[:k, None] * Vt[:k], len(D), axis=1))


def in_core(A, B, rule):
    """A rule on the cores in the basis of the stacked factors' singular vectors."""
    U = np.linalg.svd(np.hstack(B), full_matrices=False)[0]
    V = np.linalg.svd(np.vstack(A), full_matrices=False)[2].T
    return U @ rule([U.T @ b @ a @ V for a, b in zip(A, B, strict=True)]) @ V.T


def core_space(A, B, w, density):
    return in_core(A, B, lambda C: ties(C, w, density))


def angle_between(a, b):
    return np.arccos(np.clip((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))


def slerp(D, t):
    a = angle_between(*D)
    if np.cos(a) > 0.9995:
        return (1 - t) * D[0] + t * D[1]
    return (np.sin((1 - t) * a) * D[0] + np.sin(t * a) * D[1]) / np.sin(a)


def spherical_mean(D, w, steps):
    w = np.array(w) / sum(w)
    units = [d / np.linalg.norm(d) for d in D]
    p = combination(units, w)
    p = p / np.linalg.norm(p)
    for _ in range(steps):
        tangent = np.zeros_like(p)
        for wi, u in zip(w, units, strict=True):
            a, across = angle_between(u, p), u - (u * p).sum() * p
            if np.linalg.norm(across) > 1e-12:
                tangent += wi * a * across / np.linalg.norm(across)
        length = np.linalg.norm(tangent)
        if length < 1e-14:
            break
        p = np.cos(length) * p + np.sin(length) * tangent / length
    return p * sum(wi * np.linalg.norm(d) for wi, d in zip(w, D, strict=True))


def fisher(D, w, F, floor):
    F = [wi * np.maximum(f, floor) for wi, f in zip(w, F, strict=True)]
    return sum(f * d for f, d in zip(F, D, strict=True)) / sum(F)


def regmean(D, w, M, alpha, ridge):
    G = []
    for m, wi in zip(M, w, strict=True):
        m = m / np.trace(m)
        G.append(wi * (alpha * m + (1 - alpha) * np.diag(np.diag(m)) + ridge * np.mean(np.diag(m)) * np.eye(len(m))))
    return sum(d @ g for d, g in zip(D, G, strict=True)) @ np.linalg.inv(sum(G))


def kfac_side(m, alpha, ridge):
    m = m / np.trace(m)
    return alpha * m + (1 - alpha) * np.diag(np.diag(m)) + ridge * np.mean(np.diag(m)) * np.eye(len(m))


def mats(D, B, w, G, M, alpha, ridge, solves):
    """The Kronecker system itself, (out in, out in), between the columns of all B_t, then between rows, in turn."""
    parts = [
        wi * np.kron(kfac_side(g, alpha, ridge), kfac_side(m, alpha, ridge)) for g, m, wi in zip(G, M, w, strict=True)
    ]
    F, b = sum(parts), sum(f @ d.ravel() for f, d in zip(parts, D, strict=True))
    out, width = D[0].shape
    span, found = np.linalg.svd(np.hstack(B), full_matrices=False)[0], np.zeros((out, width))
    for turn in range(solves):
        if turn:
            U, S, Vt = np.linalg.svd(found, full_matrices=False)
            k = min(span.shape[1], len(S))
            span = Vt[:k].T if turn % 2 else U[:, :k]
        P = np.kron(np.eye(out), span) if turn % 2 else np.kron(span, np.eye(width))
        found = (P @ np.linalg.solve(P.T @ F @ P, P.T @ b)).reshape(out, width)
    return found


def least_squares(D, w, M):
    """One stacked regression: columns D_u m_t^(1/2), targets D_t m_t^(1/2)."""
    rows, target = [], []
    for t, (m, wt) in enumerate(zip(M, w, strict=True)):
        values, vectors = np.linalg.eigh(m / np.trace(m))
        root = np.sqrt(wt) * (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        rows.append(np.stack([(d @ root).ravel() for d in D], axis=1))
        target.append((D[t] @ root).ravel())
    weights = np.linalg.lstsq(np.vstack(rows), np.concatenate(target), rcond=None)[0]
    return combination(D, weights)


def ssr(A, B, w, M, ridge):
    """One stacked ridge regression: columns z = A m^(1/2), targets those rows of z that are the task's own."""
    z, own, rows = [], [], np.split(np.arange(sum(map(len, A))), np.cumsum([len(a) for a in A])[:-1])
    stacked = np.vstack(A)
    for t, (m, wt) in enumerate(zip(M, w, strict=True)):
        values, vectors = np.linalg.eigh(m / np.trace(m))
        seen = np.sqrt(wt) * stacked @ (vectors * np.sqrt(np.maximum(values, 0)))
        mine = np.zeros_like(seen)
        mine[rows[t]] = seen[rows[t]]
        z, own = [*z, seen], [*own, mine]
    z, own = np.hstack(z), np.hstack(own)
    extra = np.diag(np.sqrt(ridge * (z**2).sum(1)))  # as many more samples, each of one row, that stays what it is
    z, own = np.hstack([z, extra]), np.hstack([own, extra])
    return np.hstack(B) @ np.linalg.lstsq(z.T, own.T, rcond=None)[0].T @ stacked


def swudi(D, w, time=None, strong=None):
    w = np.array(w) * len(w) / sum(w)
    left = sum(wi * d @ d.T @ d / (d**2).sum() for d, wi in zip(D, w, strict=True))
    values, V = np.linalg.eigh(sum(wi * d.T @ d / (d**2).sum() for d, wi in zip(D, w, strict=True)))
    values = np.maximum(values, 0.0)
    roots = np.sqrt(values)
    strong = int(np.ceil(roots.sum() ** 2 / values.sum() - 1e-9)) if strong is None else strong
    f = np.where(np.arange(len(values)) >= len(values) - strong, 1.0, 0.0)
    f = f if time is None else f * (1 - np.exp(-values * time))
    quotient = np.divide(f, values, out=np.zeros_like(f), where=values > 1e-10 * values.max())
    f = np.where(values > 1e-10 * values.max(), f, 0.0)
    total = combination(D, w)
    return total - total @ V @ np.diag(f) @ V.T + left @ V @ np.diag(quotient) @ V.T


def wudi(D, w):
    left = sum(wi * d @ d.T @ d / (d**2).sum() for d, wi in zip(D, w, strict=True))
    right = sum(wi * d.T @ d / (d**2).sum() for d, wi in zip(D, w, strict=True))
    return left @ np.linalg.pinv(right, rcond=1e-10, hermitian=True)


def dropped(D, words, level):
    """DARE given its random words: an entry stays where its word is below the level."""
    return [np.where(word < level, d * 65536 / level, 0.0) for d, word in zip(D, words, strict=True)]


def mag_prune(D, words, density, epsilon):
    out = []
    for d, word in zip(D, words, strict=True):
        kept = np.zeros_like(d)
        for i, row in enumerate(np.abs(d)):
            for k, j in enumerate(np.argsort(row, kind="stable")):
                n = len(row)
                p = density - epsilon / 2 + epsilon * k / (n - 1) if n > 1 else density
                level = max(1, round(p * 65536))
                kept[i, j] = d[i, j] * 65536 / level if word[i, j] < level else 0.0
        out.append(kept)
    return out


def pico_before(A, B):
    A, B = zip(*[(np.linalg.qr(a.T)[0].T, b @ np.linalg.qr(a.T)[1].T) for a, b in zip(A, B, strict=True)], strict=True)
    U, S, _ = np.linalg.svd(np.hstack(B), full_matrices=False)
    share = S**2 / (S**2).sum()
    shrink = np.eye(len(U)) - U @ np.diag(1 - 1 / (1 + (len(B) - 1) * share)) @ U.T
    return [
        shrink @ b @ a * np.linalg.norm(b) / max(np.linalg.norm(shrink @ b), 1e-300) for a, b in zip(A, B, strict=True)
    ]


def svc_after(M, deltas, alpha=0.1):
    """Of dense matrices: each singular value over how many times it holds the tasks' own answers, on average."""
    U, Z, Vt = np.linalg.svd(M, full_matrices=False)
    out = np.zeros_like(M)
    for r in range(np.linalg.matrix_rank(M)):
        answer = U[:, r] @ M
        held = []
        for D in deltas:
            own = U[:, r] @ D
            size = own @ own
            held.append(max(answer @ own / size if size > 1e-12 * (D**2).sum() else 0.0, alpha))
        out += Z[r] / np.mean(held) * np.outer(U[:, r], Vt[r])
    return out


def cut_in_metric(D, seconds, rank):
    """The best D' of a rank by tr((D - D') S (D - D')^T), S the sum of trace-normalised seconds; and the share lost."""
    L = np.linalg.cholesky(sum(s / np.trace(s) for s in seconds))
    U, s, Vt = np.linalg.svd(D @ L, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vt[:rank] @ np.linalg.inv(L), (s[rank:] ** 2).sum() / (s**2).sum()
