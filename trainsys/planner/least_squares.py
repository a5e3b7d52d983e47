"""Robust least squares: Levenberg-Marquardt with numeric derivatives, for tens of parameters and thousands of rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainsys.planner.cases import Array

HUBER = 2.0


def huber(errors: Array) -> Array:
    """``errors`` in units of their noise such that their squares sum to Huber's loss (1964): beyond two it grows
    linearly, so that outliers pull no harder."""
    size = np.abs(errors)
    out: Array = np.sign(errors) * np.minimum(
        size, np.sqrt(2.0 * HUBER * np.maximum(size, HUBER) - HUBER**2)
    )
    return out


def levenberg(residual: Callable[[Array], Array], x0: Array, steps: int = 25, tol: float = 1e-3) -> Array:
    """Minimise sum(residual(x)^2) from ``x0``."""
    x, lam = x0.copy(), 1e-2
    r = residual(x)
    cost = float(r @ r)
    for _ in range(steps):
        h = 1e-3
        jac = np.stack([(residual(x + h * e) - r) / h for e in np.eye(len(x))], axis=1)
        a, g = jac.T @ jac, jac.T @ r
        for _ in range(6):
            dx = np.clip(-np.linalg.solve(a + lam * np.diag(np.diag(a)), g), -0.5, 0.5)
            r_new = residual(x + dx)
            new = float(r_new @ r_new)
            if new < cost:
                break
            lam *= 6.0
        else:
            return x
        done = cost - new < tol * cost
        x, r, cost, lam = x + dx, r_new, new, max(lam / 5.0, 1e-6)
        if done:
            break
    return x
