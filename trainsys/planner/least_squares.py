"""Robust least squares: Levenberg-Marquardt with numeric derivatives, for tens of parameters and thousands of rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainsys.planner.cases import Array

HUBER = 2.0


def levenberg(
    residual: Callable[[Array], Array], x0: Array, robust: int, steps: int = 25, tol: float = 1e-3
) -> Array:
    """Minimise from ``x0`` the sum of squares of ``residual(x)``, in units of noise. Of the first ``robust`` of them
    Huber's loss (1964) is taken: beyond two it grows linearly, so that outliers pull no harder.

    A step is that of least squares in which these are weighted by their pull (Holland and Welsch 1977): it lowers
    the loss however far away they are, where squares of square roots would be overshot to the other side.
    """

    def loss(r: Array) -> float:
        size = np.abs(r[:robust])
        near = np.minimum(size, HUBER)
        return float(np.sum(2.0 * near * size - near**2) + r[robust:] @ r[robust:])

    x, lam = x0.copy(), 1e-2
    r = residual(x)
    cost = loss(r)
    for _ in range(steps):
        h = 1e-3
        jac = np.stack([(residual(x + h * e) - r) / h for e in np.eye(len(x))], axis=1)
        pull = np.ones(len(r))
        pull[:robust] = HUBER / np.maximum(np.abs(r[:robust]), HUBER)
        weighted = jac * pull[:, None]
        a, g = jac.T @ weighted, weighted.T @ r
        for _ in range(6):
            dx = np.clip(-np.linalg.solve(a + lam * np.diag(np.diag(a)), g), -0.5, 0.5)
            r_new = residual(x + dx)
            new = loss(r_new)
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
