"""flow.py -- rectified flow: the path, the loss, guidance and two ODE solvers. Eqs. 1-4 and 11.

A rectified flow (Liu et al., 2023) joins each data point x_0 to a noise point x_1 by a straight
line and learns the mean velocity v of all lines that pass through (x_t, t). Sampling follows v from
noise back to data. Time: t = 0 is data, t = 1 is noise, so the solvers run from 1 down to 0.

    python flow.py      # a 2-D flow of known velocity: its paths, and both solvers' errors
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch

Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# ----------------------------------------------------------------------- training: Eqs. 1, 3 and 11


def expand(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ..., 1), so that t broadcasts over x (B, ...)."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


def interpolate(x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Eq. 1: x_t = alpha_t x_0 + beta_t x_1, for rectified flow alpha_t = 1 - t and beta_t = t.

    x0, x1 (B, ...) data and noise; t (B,) in [0, 1] -> x_t (B, ...). Its velocity is x_1 - x_0.
    """
    t = expand(t, x0)
    return (1 - t) * x0 + t * x1


def logit_normal(
    n: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Eq. 11: n times t = sigmoid(u), u ~ N(0, 1) -> (n,) in (0, 1), most of them near the middle.

    DEVIATION: Eq. 11 prints t = log(u / (1 - u)), the logit. That is the inverse of the sigmoid and
    not even defined for most normal u; "t is logit-normal" means that the logit of t is normal.
    """
    u = torch.randn(n, generator=generator, device=device)
    return u.sigmoid()


def keeps_prior(n: int, p_s: float) -> list[bool]:
    """Which of the n positions of a batch keep their prior; round(p_s n) get S (section 3.3).

    CHOICE: the paper drops the prior of each image with probability p_s; we drop exactly that share
    of a batch, always at the same positions. The images are shuffled, so which image lands on such
    a position is still random. The positions are spread evenly: every contiguous part of a batch
    (the share of one GPU) drops its own p_s, to within one image.
    """
    # Position i loses its prior where the rounded number of dropped images, i p_s, goes up.
    dropped_before = [round(i * p_s) for i in range(n + 1)]
    return [dropped_before[i + 1] == dropped_before[i] for i in range(n)]


def rectified_flow_loss(model, x0, y, x1, t, keep) -> torch.Tensor:
    """Eq. 3: |(x_1 - x_0) - v(x_t, t)|^2 of each image -> (B,), in fp32.

    x0, x1 (B, C, H, W) data and noise; y (B,) classes; t (B,) times; keep (k,) the rows of the
    batch that keep their prior. `model` is a DoD, possibly inside DistributedDataParallel.
    CHOICE: the square is averaged over an image's elements, not summed.

    Why this gives the velocity of the flow: many lines from data to noise pass through one x_t, and
    the network cannot know which of them it is on. A squared error is least at the mean, so the
    minimiser is v(x, t) = E[x_1 - x_0 | x_t = x], the mean velocity of all lines through x. Points
    that follow this mean have the same distribution at each t as points on the lines.
    """
    # DistributedDataParallel wraps forward() only; S and LEM are reached through its `module`.
    dod = getattr(model, "module", model)
    x_t = interpolate(x0, x1, t)  # Eq. 1, (B, C, H, W)

    # Section 3.3: the images in `keep` see LEM of their own clean latent, the others the sample
    # token S. LEM runs only where it is used, the backbone once on the whole batch. If no image
    # keeps its prior, e_s = None means S for all: one vector c for each image, which is cheaper.
    e_s = None
    if len(keep):
        e_s = dod.S.expand(len(x0), dod.config.num_tokens, -1)  # (B, T, d)
        e_s = e_s.index_copy(0, keep, dod.visual_prior(x0[keep]).to(e_s.dtype))

    v = model(x_t, t, y, e_s)  # the velocity that the network predicts

    # Under autocast the network answers in bf16; the loss is computed in fp32.
    return ((x1 - x0) - v.float()).square().flatten(1).mean(1)


# --------------------------------------------------------------------------- sampling: Eqs. 2 and 4


def guide(
    v_c: torch.Tensor, v_u: torch.Tensor, w: float, channels: int | None = None
) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans, 2021): v = v_u + w (v_c - v_u).

    v_c sees the condition, v_u does not; both (b, C, ...). w = 1 is no guidance; w < 1 raises
    ValueError. CHOICE: all channels are guided alike; with `channels` only the first ones are, and
    the others are those of v_c (SiT's and FiTv2's code guides three of a latent's four).
    """
    if not w >= 1:
        raise ValueError(f"guidance w = {w}; it must be at least 1 (1 = off)")
    v = v_u + w * (v_c - v_u)
    if channels is not None:
        v = torch.cat([v[:, :channels], v_c[:, channels:]], dim=1)
    return v


@torch.no_grad()
def euler(f: Velocity, x1: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 4 with tau_i = i / steps: x <- x - v(x, tau) / steps, from t = 1 to t = 0.

    f: see dopri5. x1 (B, ...) noise -> x0 (B, ...) and the evaluations of f spent on each image
    (B,): `steps`, at least 1. CHOICE: the grid is uniform; SiT's `num_steps` counts its points.
    """
    if steps < 1:
        raise ValueError(f"{steps} Euler steps; at least 1 is needed")
    x = x1
    rows = torch.arange(len(x1), device=x1.device)
    for i in range(steps, 0, -1):
        t = torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device)
        x = x - f(x, t, rows) / steps
    return x, torch.full((len(x),), steps)


# RK45, also called dopri5: the Runge-Kutta pair of Dormand & Prince (1980), of orders 5 and 4.
# C are its nodes, A its matrix. The last row of A holds the weights of order 5, so the last slope
# of a step is the first one of the next step ("first same as last", FSAL). E are the weights of
# order 4 minus those of order 5: they turn the slopes of a step into an estimate of its error.
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


def finite(v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """v itself. Raises FloatingPointError if it is not finite: no step size would mend that."""
    if not torch.isfinite(v).all():
        raise FloatingPointError(f"the velocity is not finite near t = {t.min().item():.4f}")
    return v


def rk45_step(f: Velocity, x, t, h, k1, rows):
    """One Dormand-Prince step of length h (b,) down from t (b,), given k1 = f(x, t).

    -> x_new of order 5, its estimated error, and f(x_new, t - h), all (b, ...). 6 evaluations.
    """
    # Seven slopes. Each is taken at a point that the earlier ones lead to; the last is x_new.
    h_x = expand(h, x).to(x)
    k = [k1]
    for c, row in zip(C[1:], A[1:], strict=True):
        slope = sum(a * k_j for a, k_j in zip(row, k, strict=True))
        x_new = x - h_x * slope
        t_new = (t - c * h).to(x)
        k.append(finite(f(x_new, t_new, rows), t_new))

    # The step goes down in t, so h E k is the result of order 5 minus that of order 4.
    error = h_x * sum(e * k_j for e, k_j in zip(E, k, strict=True))
    return x_new, error, k[-1]


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square of each image alone: (b, ...) -> (b,), in double precision, on the CPU."""
    return x.flatten(1).double().square().mean(1).sqrt().cpu()


def first_step(f: Velocity, x, t, k1, rows, rtol: float, atol: float) -> torch.Tensor:
    """-> the length h (b,) of the first step (Hairer, Norsett & Wanner, Solving ODEs I, II.4)."""
    # h0: an Euler step of this length changes x by 1%.
    scale = atol + rtol * x.abs()
    d0 = rms(x / scale)
    d1 = rms(k1 / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    h0 = torch.minimum(h0, t)

    # That step reveals the second derivative, d2.
    t_new = (t - h0).to(x)
    k2 = finite(f(x - expand(h0, x).to(x) * k1, t_new, rows), t_new)
    d2 = rms((k2 - k1) / scale) / h0

    # h1: a step of this length, whose error is O(h^5), errs by about 1% of the tolerance.
    h1 = (0.01 / torch.maximum(d1, d2)) ** 0.2
    standstill = (d1 <= 1e-15) & (d2 <= 1e-15)
    h1 = torch.where(standstill, (h0 * 1e-3).clamp(min=1e-6), h1)
    return torch.minimum(100 * h0, h1).minimum(t)


@torch.no_grad()
def dopri5(
    f: Velocity, x1: torch.Tensor, rtol: float = 1e-3, atol: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 4 with Dormand and Prince's adaptive Runge-Kutta method, from t = 1 to exactly t = 0.

    x1 (B, ...) noise -> x0 (B, ...) and the evaluations of f spent on each image (B,).

    The solver knows neither images nor networks: f(x, t, rows) -> dx/dt is any function of states
    x (b, ...), times t (b,) and rows (b,), which say which of the B images these are.

    Every image has its own time and step size, as if it were alone: an image whose step is rejected
    tries again while the others advance, and an image that has finished leaves the batch. So the
    result does not depend on the batch, and equals that of SciPy's `RK45` for each image (the same
    norm and factors). DEVIATION: the paper says "dopri5, same as SiT"; the tolerances are SiT's,
    but SiT's solver shares one step size among the images of a batch.

    Raises FloatingPointError if f is not finite or a step becomes too small to advance t.
    """
    # Times and step lengths are kept in double precision, on the CPU. The solver overwrites its
    # tensors in place, so it copies what it passes to f and what f returns.
    device = x1.device
    x = x1.clone()
    t = torch.ones(len(x1), dtype=torch.float64)
    rows = torch.arange(len(x1))  # the images that are still running
    k1 = finite(f(x1, t.clone().to(x), rows.to(device)), t).clone()
    h = first_step(f, x, t, k1, rows.to(device), rtol, atol)
    nfe = torch.full_like(rows, 2)  # k1, and one evaluation in first_step
    was_rejected = torch.zeros_like(rows, dtype=torch.bool)

    while len(rows):
        # 1. The last step is cut so that it ends at t = 0.
        h_now = torch.minimum(h[rows], t[rows])
        if not (h_now >= 10 * torch.finfo(t.dtype).eps * t[rows]).all():
            raise FloatingPointError(f"RK45's step is too small at t = {t[rows].min().item():.6f}")

        # 2. One attempt for each running image.
        running = rows.to(device)
        x_old = x[running]
        x_new, error, k_new = rk45_step(f, x_old, t[rows], h_now, k1[running], running)
        nfe[rows] += 6

        # 3. Its error in units of the tolerance; below 1 the step is accepted.
        ratio = rms(error / (atol + rtol * torch.maximum(x_old.abs(), x_new.abs())))
        accepted = ratio < 1
        advanced = rows[accepted]
        x[advanced.to(device)] = x_new[accepted.to(device)]
        k1[advanced.to(device)] = k_new[accepted.to(device)]
        t[advanced] -= h_now[accepted]

        # 4. The next step: the error is O(h^5), the safety factor 0.9, the change limited to a
        # factor of 0.2 to 10, and there is no growth right after a rejection.
        factor = (0.9 * ratio.clamp(min=1e-30) ** -0.2).clamp(0.2, 10)
        factor = torch.where(was_rejected[rows], factor.clamp(max=1), factor)
        h[rows] = h_now * factor
        was_rejected[rows] = ~accepted
        rows = rows[t[rows] > 0]
    return x, nfe


# -------------------------------------------------------------------------------- the demonstration


def mixture_velocity(centres: torch.Tensor, sigma: float) -> Velocity:
    """The exact minimiser of Eq. 3, v(x, t) = E[x_1 - x_0 | x_t = x], for a mixture of Gaussians.

    centres (M, 2), standard deviation sigma. Given component m, x_t ~ N((1-t) c_m, s^2) with
    s^2 = (1-t)^2 sigma^2 + t^2, and E[x_1 - x_0] is linear in x. v is the mean of these over the
    components, each weighted by P(m | x_t = x).
    """

    def f(x, t, rows):
        t = t[:, None]
        s2 = (1 - t) ** 2 * sigma**2 + t**2  # (b, 1)
        away = x[:, None] - (1 - t)[:, :, None] * centres  # (b, M, 2): x minus the component's mean
        weight = (-away.square().sum(-1) / (2 * s2)).softmax(-1)  # (b, M): P(m | x_t = x)
        v = away * ((t - (1 - t) * sigma**2) / s2)[:, :, None] - centres
        return (weight[:, :, None] * v).sum(1)

    return f


def main() -> None:
    """Draws a 2-D rectified flow and prints both solvers' errors against the evaluations spent."""
    from matplotlib.figure import Figure

    # The data: eight small Gaussians on a circle, so the exact velocity is known. The reference
    # solution has tolerances far below all those compared here.
    angle = torch.arange(8, dtype=torch.float64) * math.tau / 8
    centres = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    f = mixture_velocity(centres, sigma=0.1)
    noise = torch.Generator().manual_seed(0)
    x1 = torch.randn(512, 2, dtype=torch.float64, generator=noise)
    exact, _ = dopri5(f, x1, rtol=1e-12, atol=1e-12)

    # Left: 100 of the points on their way, recorded before each of 100 Euler steps.
    visited = []

    def recording(x, t, rows):
        visited.append(x)
        return f(x, t, rows)

    euler(recording, x1, 100)
    lines = torch.stack([*visited, exact])[:, :100]  # (101, 100, 2)
    figure = Figure(figsize=(11, 5), layout="tight")
    paths, costs = figure.subplots(1, 2)
    paths.plot(lines[..., 0], lines[..., 1], color="0.8", linewidth=0.6, zorder=0)
    paths.scatter(*x1.T, s=4, label="noise, t = 1")
    paths.scatter(*exact.T, s=4, label="data, t = 0")
    paths.set(title="Eq. 2: following v from noise to data", aspect="equal")
    paths.legend()

    # Right: the error that remains after a given number of evaluations, from coarse to fine.
    runs = {
        "Euler": [euler(f, x1, steps) for steps in (5, 10, 20, 40, 80, 160, 320)],
        "RK45": [dopri5(f, x1, rtol=10**-k, atol=10**-k) for k in range(1, 9)],
    }
    print("solver   evaluations per point   mean error")
    for name, results in runs.items():
        cost = [nfe.double().mean().item() for _, nfe in results]
        error = [(x - exact).norm(dim=1).mean().item() for x, _ in results]
        costs.loglog(cost, error, "o-", label=name)
        for c, e in zip(cost, error, strict=True):
            print(f"{name:8} {c:21.1f}   {e:10.2e}")
    costs.set(title="Error against cost", xlabel="evaluations of v per point", ylabel="mean error")
    costs.legend()

    out = Path("out/flow.png")
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=100)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
