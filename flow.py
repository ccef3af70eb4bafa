"""flow.py -- rectified flow: the path, the loss, guidance and two ODE solvers. Eqs. 1-4 and 11.

A rectified flow (Liu et al., 2023) joins each data point x_0 to a noise point x_1 by a straight
line and learns the mean velocity v of the lines that pass through (x_t, t). Sampling follows v from
noise back to data. Time: t = 0 is data, t = 1 is noise, so the solvers run from 1 to 0.

The solvers know neither images nor networks. They take any `f(x, t, rows) -> dx/dt`:
    x (b, ...) states, t (b,) times, rows (b,) which of the B states these are
because with a step size per image, images finish at different times and leave the batch.

    python flow.py      # 2-D flow, exact velocity: trajectories, error against cost
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def expand(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ..., 1), to multiply x (B, ...)."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


# ------------------------------------------------------------------------- training, Eqs. 1, 3, 11


def interpolate(x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Eq. 1: x_t = alpha_t x_0 + beta_t x_1, rectified flow's alpha_t = 1 - t and beta_t = t.

    x0, x1 (B, ...) data and noise; t (B,) in [0, 1] -> x_t (B, ...). Its velocity is x_1 - x_0.
    """
    t = expand(t, x0)
    return (1 - t) * x0 + t * x1


def logit_normal(n: int, rng: np.random.Generator | None = None) -> torch.Tensor:
    """Eq. 11: n times t = sigmoid(u), u ~ N(0, 1), in (0, 1): most of them near the middle.

    DEVIATION: Eq. 11 prints t = log(u / (1 - u)), the logit: sigmoid's inverse, and not defined for
    most normal u. "t is logit-normal" means that the logit of t is normal.
    """
    u = (rng or np.random.default_rng()).standard_normal(n, dtype=np.float32)
    return torch.from_numpy(u).sigmoid()


def keeps_prior(n: int, p_s: float) -> list[bool]:
    """Which of n positions in a batch keep their prior; exactly round(p_s n) get S (section 3.3).

    CHOICE: the paper drops each image's prior with probability p_s; we drop exactly that share.
    Batches are pieces of a random permutation, so fixed positions are a random subset of the
    images. They are spread evenly: each contiguous part of a batch (a process's share) drops its
    p_s too, to within one image.
    """
    return [round((i + 1) * p_s) == round(i * p_s) for i in range(n)]


def rectified_flow_loss(model, x0, y, x1, t, keep: list[bool]) -> torch.Tensor:
    """Eq. 3: |(x_1 - x_0) - v(x_t, t)|^2 -> (B,), in fp32. CHOICE: the mean over an image's
    elements, not their sum.

    x0, x1 (B, C, H, W) data and noise; y (B,) classes; t (B,) times; keep: keeps_prior(B, p_s).
    The images that keep their prior see LEM of their own clean latent x0; the others see S. The two
    groups pass the backbone apart: LEM runs only where it is used, and where S stands in, the
    backbone is cheaper (DoD.forward).
    """
    x_t, v = interpolate(x0, x1, t), x1 - x0
    loss = torch.zeros(len(x0), device=x0.device)
    for group in (True, False):
        rows = [i for i, kept in enumerate(keep) if kept == group]
        if not rows:
            continue
        rows = torch.tensor(rows).to(x0.device, non_blocking=True)  # without waiting for the GPU
        e_s = model.visual_prior(x0[rows]) if group else None
        error = v[rows] - model(x_t[rows], t[rows], y[rows], e_s).float()
        loss = loss.index_add(0, rows, error.square().flatten(1).mean(1))
    return loss


def naive_loss(model, x0, y, x1, t, keep: list[bool]) -> torch.Tensor:
    """The same numbers as first written down: LEM on every image, c per token everywhere.

    What rectified_flow_loss is tested and timed against.
    """
    e_s = model.visual_prior(x0)
    keep = torch.tensor(keep, device=x0.device)[:, None, None]
    v = model(interpolate(x0, x1, t), t, y, torch.where(keep, e_s, model.S.to(e_s.dtype)))
    return (x1 - x0 - v.float()).square().flatten(1).mean(1)


# ----------------------------------------------------------------------------- sampling, Eqs. 2, 4


def guide(v_c: torch.Tensor, v_u: torch.Tensor, w: float) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans, 2021): v = v_u + w (v_c - v_u).

    CHOICE: for all channels alike; SiT's code guides three of a latent's four.
    v_c sees the condition, v_u lacks it. w = 1 is no guidance; w < 1 raises ValueError.
    """
    if not w >= 1:
        raise ValueError(f"guidance w = {w}; it must be at least 1 (1 = off)")
    return v_u + w * (v_c - v_u)


@torch.no_grad()
def euler(f: Velocity, x1: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 4 with tau_i = i / steps: x <- x - v(x, tau) / steps, from t = 1 to t = 0.

    x1 (B, ...) noise -> x0 (B, ...) and the evaluations spent on each image (B,): `steps`.
    Raises ValueError for steps < 1, FloatingPointError when f is not finite.
    """
    if steps < 1:
        raise ValueError(f"{steps} Euler steps; at least 1 is needed")
    x, rows = x1, torch.arange(len(x1), device=x1.device)
    for i in range(steps, 0, -1):
        t = torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device)
        x = x - finite(f(x, t, rows), t) / steps
    return x, torch.full((len(x),), steps)


def finite(v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """v itself; raises FloatingPointError if it is not finite: no step size would mend that."""
    if not torch.isfinite(v).all():
        raise FloatingPointError(f"the velocity is not finite near t = {t.min().item():.4f}")
    return v


# RK45, or dopri5: the Runge-Kutta pair of Dormand & Prince (1980), orders 5 and 4. Nodes C, matrix
# A, weights B of order 5, and E = B_hat - B, which turns a step's slopes k into an estimate of its
# error. A's last row is B: the last slope is the next step's first ("first same as last", FSAL).
C = [0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1]
A = [
    [],
    [1 / 5],
    [3 / 40, 9 / 40],
    [44 / 45, -56 / 15, 32 / 9],
    [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
    [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
]
E = [-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40]


def rk45_step(f: Velocity, x, t, h, k1, rows):
    """One Dormand-Prince step of length h (b,) down from t (b,), given k1 = f(x, t); 6 evaluations.

    -> x_new of order 5, its estimated error, and f(x_new, t - h), all (b, ...).
    """
    h_x, k = expand(h, x).to(x), [k1]
    for c, row in zip(C[1:], A[1:], strict=True):
        x_new = x - h_x * sum(a * k_j for a, k_j in zip(row, k, strict=True) if a)
        t_new = (t - c * h).clamp(0, 1).to(x)  # rounding must not leave [0, 1]
        k.append(finite(f(x_new, t_new, rows), t_new))
    return x_new, h_x * sum(e * k_j for e, k_j in zip(E, k, strict=True) if e), k[-1]


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square of each image alone: (b, ...) -> (b,), double precision, on the CPU."""
    x = x.flatten(1) if x.device.type == "mps" else x.flatten(1).double()  # MPS has none
    return x.square().mean(1).sqrt().cpu().double()


def first_step(f: Velocity, x, t, k1, rows, rtol: float, atol: float) -> torch.Tensor:
    """Hairer's first step (Hairer, Norsett & Wanner, Solving ODEs I, II.4): h (b,), 1 evaluation.

    h_0: an Euler step of this length changes x by 1%. It reveals the second derivative, and with it
    h_1: a step of this length, whose error is O(h^5), errs by about 1% of the tolerance.
    """
    scale = atol + rtol * x.abs()
    d0, d1 = rms(x / scale), rms(k1 / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).minimum(t)
    t_new = (t - h0).to(x)
    k2 = finite(f(x - expand(h0, x).to(x) * k1, t_new, rows), t_new)
    d2 = rms((k2 - k1) / scale) / h0
    h1 = (0.01 / torch.maximum(d1, d2)) ** 0.2
    h1 = torch.where((d1 <= 1e-15) & (d2 <= 1e-15), (h0 * 1e-3).clamp(min=1e-6), h1)
    return torch.minimum(100 * h0, h1).minimum(t)


@torch.no_grad()
def dopri5(
    f: Velocity, x1: torch.Tensor, rtol: float = 1e-3, atol: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 4 with Dormand and Prince's adaptive Runge-Kutta method, from t = 1 to exactly t = 0.

    x1 (B, ...) noise -> x0 (B, ...) and the evaluations of f spent on each image (B,).

    Every image has its own time and step size, as if it were alone: an image whose step is rejected
    retries it while the others advance, and a finished image leaves the batch. So the result does
    not depend on the batch, and equals SciPy's `RK45` run on that image (same norm, same factors).
    CHOICE: the paper says "dopri5, same as SiT": so are the tolerances; but SiT's solver shares one
    step size in a batch.

    Raises FloatingPointError when f is not finite or a step gets too small to advance t.
    """
    x, t = x1.clone(), torch.ones(len(x1), dtype=torch.float64)  # the book-keeping is on the CPU
    rows = torch.arange(len(x1))  # the images still running
    k1 = finite(f(x, t.clone().to(x), rows.to(x.device)), t)
    h = first_step(f, x, t, k1, rows.to(x.device), rtol, atol)
    nfe, was_rejected = torch.full_like(rows, 2), torch.zeros_like(rows, dtype=torch.bool)

    while len(rows):
        # 1. The last step is cut to end at t = 0.
        h_now, on_device = torch.minimum(h[rows], t[rows]), rows.to(x.device)
        if not (h_now >= 10 * torch.finfo(t.dtype).eps * t[rows]).all():  # NaN is caught too
            raise FloatingPointError(f"RK45's step is too small at t = {t[rows].min().item():.6f}")

        # 2. One attempt for each running image.
        x_old = x[on_device]
        x_new, error, k_new = rk45_step(f, x_old, t[rows], h_now, k1[on_device], on_device)
        nfe[rows] += 6

        # 3. Its error in units of the tolerance: below 1 the step stands.
        ratio = rms(error / (atol + rtol * torch.maximum(x_old.abs(), x_new.abs())))
        accepted = ratio < 1
        done, stands = rows[accepted], accepted.to(x.device)
        x[done.to(x.device)], k1[done.to(x.device)] = x_new[stands], k_new[stands]
        t[done] -= h_now[accepted]

        # 4. The next step: the error is O(h^5), safety 0.9, and no growth right after a rejection.
        factor = (0.9 * ratio.clamp(min=1e-30) ** -0.2).clamp(0.2, 10)
        h[rows] = h_now * torch.where(was_rejected[rows], factor.clamp(max=1), factor)
        was_rejected[rows] = ~accepted
        rows = rows[t[rows] > 0]
    return x, nfe


# ------------------------------------------------------------------------------- the demonstration


def mixture_velocity(centres: torch.Tensor, sigma: float) -> Velocity:
    """The exact minimiser of Eq. 3, v(x, t) = E[x_1 - x_0 | x_t = x], for a mixture of Gaussians.

    centres (M, 2), standard deviation sigma. Given component m, x_t ~ N((1-t) c_m, s^2) with
    s^2 = (1-t)^2 sigma^2 + t^2, and x_0, x_1 are linear in x; v is their mean over the components.
    """

    def f(x, t, rows):
        t = t[:, None]
        s2 = (1 - t) ** 2 * sigma**2 + t**2  # (b, 1)
        away = x[:, None] - (1 - t)[:, :, None] * centres  # (b, M, 2): x minus the component's mean
        weight = (-away.square().sum(-1) / (2 * s2)).softmax(-1)  # (b, M): P(m | x_t = x)
        v = away * ((t - (1 - t) * sigma**2) / s2)[:, :, None] - centres
        return (weight[:, :, None] * v).sum(1)

    return f


def main(argv: list[str] | None = None) -> None:
    """Draws a 2-D rectified flow and prints both solvers' errors against the evaluations spent."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    help = "picture to write (default: %(default)s)"
    parser.add_argument("--out", default="out/flow.png", help=help)
    out = parser.parse_args(argv).out
    from matplotlib.figure import Figure

    angle = torch.arange(8, dtype=torch.float64) * math.tau / 8
    f = mixture_velocity(torch.stack([angle.cos(), angle.sin()], 1) * 2, sigma=0.1)
    x1 = torch.from_numpy(np.random.default_rng(0).standard_normal((512, 2)))
    exact, _ = dopri5(f, x1, rtol=1e-12, atol=1e-12)
    tolerances = [10**-k for k in range(1, 9)]
    curves = {
        "Euler": [euler(f, x1, steps) for steps in (5, 10, 20, 40, 80, 160, 320)],
        "RK45": [dopri5(f, x1, rtol=tol, atol=tol) for tol in tolerances],
    }
    figure = Figure(figsize=(11, 5), layout="tight")
    left, right = figure.subplots(1, 2)
    path = [x1]
    euler(lambda x, t, rows: (path.append(x), f(x, t, rows))[1], x1, 100)
    path = torch.stack([*path, exact])
    left.plot(path[:, :100, 0], path[:, :100, 1], color="0.8", linewidth=0.6, zorder=0)
    left.scatter(*x1.T, s=4, label="noise, t = 1")
    left.scatter(*exact.T, s=4, label="data, t = 0")
    left.set(title="Eq. 2: following v from noise to data", aspect="equal")
    left.legend()
    print("solver   evaluations per point   mean error")
    for name, runs in curves.items():
        cost = [nfe.double().mean().item() for _, nfe in runs]
        error = [(x - exact).norm(dim=1).mean().item() for x, _ in runs]
        for c, e in zip(cost, error, strict=True):
            print(f"{name:8} {c:21.1f}   {e:10.2e}")
        right.loglog(cost, error, "o-", label=name)
    right.set(title="Error against cost", xlabel="evaluations of v per point", ylabel="mean error")
    right.legend()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
