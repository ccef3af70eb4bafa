"""flow.py -- rectified flow: the path, the loss, guidance and two ODE solvers. Eqs. 1-4 and 11.

A rectified flow (Liu et al., 2023) joins each data point x_0 to a noise point x_1 by a straight
line and learns the mean velocity v of all lines that pass through (x_t, t). Sampling follows v from
noise back to data. Time: t = 0 is data, t = 1 is noise, so the solvers run from 1 down to 0.
Shapes: B images; (B, ...) are their latents (B, C, H, W), or points of any dimension.

    python flow.py      # a 2-D flow of known velocity: its paths, and both solvers' errors
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # f(x, t, rows) -> dx/dt, see euler

# ----------------------------------------------------------------------- training: Eqs. 1, 3 and 11


def expand(t: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), so that t broadcasts over x (B, ...)."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """Eq. 1: x_t = alpha_t x_0 + beta_t x_1, for rectified flow alpha_t = 1 - t and beta_t = t.

    x0, x1 (B, ...) data and noise; t (B,) in [0, 1] -> x_t (B, ...). Its velocity is x_1 - x_0.
    For example, x_0 = 2, x_1 = -1 and t = 0.25 give x_t = 1.25, moving with v = -3.
    """
    t = expand(t, x0)
    return (1 - t) * x0 + t * x1


def logit_normal(n: int, generator: torch.Generator | None = None, device="cpu") -> Tensor:
    """Eq. 11: n times t = sigmoid(u), u ~ N(0, 1) -> (n,) in (0, 1), most of them near the middle.

    DEVIATION: Eq. 11 prints t = log(u / (1 - u)), the logit. That is the inverse of the sigmoid and
    not even defined for most normal u; "t is logit-normal" means that the logit of t is normal.
    """
    u = torch.randn(n, generator=generator, device=device)
    return u.sigmoid()


def keeps_prior(n: int, p_s: float) -> Tensor:
    """Which of the n positions of a batch keep their prior -> (n,) booleans, round(p_s n) of them
    False: their images get the sample token S instead (section 3.3). p_s in [0, 1].

    DEVIATION: the paper drops each image's prior with probability p_s; we drop exactly that share
    of a batch, always at the same positions. So LEM's batch always has the same size, and nothing
    waits for a GPU to count it. Which image lands on such a position is random all the same, for
    they are shuffled. Every contiguous part of a batch drops its share p_s, to within one image.
    """
    # The first i positions drop round(i p_s) images; position i drops one where that count grows.
    dropped_before = torch.tensor([round(i * p_s) for i in range(n + 1)])
    return dropped_before[1:] == dropped_before[:-1]


def rectified_flow_loss(
    model: nn.Module, x0: Tensor, y: Tensor, x1: Tensor, t: Tensor, with_prior: Tensor
) -> Tensor:
    """Eq. 3: |(x_1 - x_0) - v(x_t, t)|^2 of each image -> (B,), in fp32.

    x0, x1 (B, C, H, W) data and noise; y (B,) classes; t (B,) times in [0, 1]; with_prior (k,) the
    indices of the images that keep their prior. `model` is model.py's DoD, or FiTv2 if with_prior
    is empty. DistributedDataParallel may wrap its forward(); S and LEM are then in `module`.
    CHOICE: the square is averaged over an image's elements, not summed.

    Why this gives the velocity of the flow: many lines from data to noise pass through one x_t, and
    the network cannot know which of them it is on. A squared error is least at the mean, so the
    minimiser is v(x, t) = E[x_1 - x_0 | x_t = x], the mean velocity of all lines through x. Points
    that follow this mean have the same distribution at each t as points on the lines."""
    x_t = interpolate(x0, x1, t)  # Eq. 1, (B, C, H, W)

    # Section 3.3: an image of `with_prior` sees LEM of its own clean latent, any other image the
    # sample token S. LEM runs only where it is used, the backbone once on the whole batch. If no
    # image keeps its prior, e_s = None means S for all: one condition for each image, cheaper.
    e_s = None
    if len(with_prior):
        dod = getattr(model, "module", model)
        e_s = dod.S.expand(len(x0), dod.config.num_tokens, -1)  # (B, T, d)
        e_s = e_s.index_copy(0, with_prior, dod.visual_prior(x0[with_prior]).to(e_s.dtype))

    v = model(x_t, t, y, e_s)  # the velocity that the network predicts

    # Under autocast the network answers in bf16; the loss is computed in fp32.
    return ((x1 - x0) - v.float()).square().flatten(1).mean(1)


# --------------------------------------------------------------------------- sampling: Eqs. 2 and 4


def guide(v_c: Tensor, v_u: Tensor, w: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, 2021): v = v_u + w (v_c - v_u).

    v_c sees the condition, v_u does not; both (b, C, ...) -> v, of the same shape. w = 1 is no
    guidance; v_u = 1, v_c = 2 and w = 3 give v = 4. Raises ValueError if w < 1.
    CHOICE: all channels are guided alike; SiT's and FiTv2's code guides three of a latent's four.
    """
    if not w >= 1:
        raise ValueError(f"guidance w = {w}; it must be at least 1 (1 = off)")
    return v_u + w * (v_c - v_u)


@torch.no_grad()
def euler(f: Velocity, x1: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Eq. 4 with tau_i = i / steps: x <- x - v(x, tau) / steps, from t = 1 to t = 0.
    f(x, t, rows) -> velocities (B, ...) at states x (B, ...) and times t (B,); `rows` (B,) are the
    numbers of these images in the batch, here all of them. x1 (B, ...) noise -> x0 (B, ...) and the
    evaluations of f for each image (B,), which are `steps`. Raises ValueError if steps < 1.
    CHOICE: the grid of times is uniform; SiT's `num_steps` counts its points, not its steps.
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
# The last row of the matrix holds the weights of order 5, so the last slope of a step is the first
# one of the next step ("first same as last", FSAL). ERROR_WEIGHTS, the differences of the weights
# of both orders, turn the slopes of a step into an estimate of its error.
NODES = [0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1]
MATRIX = [
    [],
    [1 / 5],
    [3 / 40, 9 / 40],
    [44 / 45, -56 / 15, 32 / 9],
    [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
    [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
]
ERROR_WEIGHTS = [-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40]


def finite(v: Tensor, t: Tensor) -> Tensor:
    """v itself. Raises FloatingPointError if it is not finite: no step size would mend that."""
    if not torch.isfinite(v).all():
        raise FloatingPointError(f"the velocity is not finite near t = {t.min().item():.4f}")
    return v


def rk45_step(
    f: Velocity, x: Tensor, t: Tensor, h: Tensor, k1: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One Dormand-Prince step of x (b, ...), of length h (b,) down from t (b,), given k1 = f(x, t).
    -> x_new of order 5, its estimated error, and f(x_new, t - h), all (b, ...). 6 evaluations.
    """
    # Seven slopes. Each is taken at a point that the earlier ones lead to; the last is x_new.
    h_x = expand(h, x).to(x)
    k = [k1]
    for c, row in zip(NODES[1:], MATRIX[1:], strict=True):
        slope = sum(a * k_j for a, k_j in zip(row, k, strict=True))
        x_new = x - h_x * slope
        t_new = (t - c * h).to(x)
        k.append(finite(f(x_new, t_new, rows), t_new))

    # The difference between the results of order 5 and of order 4. Only its size will matter.
    error = h_x * sum(e * k_j for e, k_j in zip(ERROR_WEIGHTS, k, strict=True))
    return x_new, error, k[-1]


def rms(x: Tensor) -> Tensor:
    """Root mean square of each image alone: (b, ...) -> (b,), in double precision, on the CPU."""
    return x.flatten(1).cpu().double().square().mean(1).sqrt()  # some GPUs have no doubles


def first_step(
    f: Velocity, x: Tensor, t: Tensor, k1: Tensor, rows: Tensor, rtol: float, atol: float
) -> Tensor:
    """-> the length h (b,) of the first step from x (b, ...) at t (b,), given k1 = f(x, t).
    Hairer, Norsett & Wanner, Solving ODEs I, II.4: the error is about h^5 times a derivative of v,
    whose size is guessed from v and from its change over a tiny step.
    """
    # The tiny step: an Euler step of this length changes x by 1%. If x or v vanishes, 1e-6.
    scale = atol + rtol * x.abs()
    size = rms(x / scale)
    speed = rms(k1 / scale)
    tiny = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed)
    tiny = torch.minimum(tiny, t)

    # That step reveals how fast v changes.
    t_new = (t - tiny).to(x)
    k2 = finite(f(x - expand(tiny, x).to(x) * k1, t_new, rows), t_new)
    acceleration = rms((k2 - k1) / scale) / tiny

    # A step of this length errs by about 1% of the tolerance.
    h = (0.01 / torch.maximum(speed, acceleration)) ** 0.2
    standstill = (speed <= 1e-15) & (acceleration <= 1e-15)
    h = torch.where(standstill, (tiny * 1e-3).clamp(min=1e-6), h)
    return torch.minimum(100 * tiny, h).minimum(t)


@torch.no_grad()
def dopri5(
    f: Velocity, x1: Tensor, rtol: float = 1e-3, atol: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Eq. 4 with Dormand and Prince's adaptive Runge-Kutta method, from t = 1 to exactly t = 0.

    x1 (B, ...) noise -> x0 (B, ...) and the evaluations of f spent on each image (B,).
    f: as in euler, for the images still running. rtol, atol: a step's error, relative and absolute.

    Every image has its own time and step size, as if it were alone: an image whose step is rejected
    tries again while the others advance, and an image that has finished leaves the batch. So the
    result is that of SciPy's `RK45` for each image alone (the same norm and factors).
    DEVIATION: the paper says "dopri5, same as SiT". The tolerances are SiT's and FiTv2's. But their
    solver has one step size for a batch and its unconditional half, never shrinks it after a
    success, and interpolates at t = 0.

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
        # 1. The last step is cut so that it ends at t = 0. A much smaller one would not change t.
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


def mixture_velocity(centres: Tensor, sigma: float) -> Velocity:
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
    generator = torch.Generator().manual_seed(0)
    x1 = torch.randn(512, 2, dtype=torch.float64, generator=generator)
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

    # Right: the error that remains after a number of evaluations.
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
    for axes in (paths, costs):
        axes.legend()

    out = Path("out/flow.png")
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=100)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
