"""test_dod.py -- one test or more for each equation, table and promise. Run: python -m pytest -q

The expected values are exact where they can be: closed forms, identities, SciPy, PyTorch's own
modules. Tests are named after what the paper says; the README's map lists them by equation.
"""

import argparse
import ast
import copy
import errno
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.integrate import solve_ivp
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import flow
import lem
import model
import sample
import train
from model import CONFIGS, Config, DoD, UserError

HERE = Path(__file__).parent
README = HERE / "README.md"
PROGRAMS = {f"{x.__name__}.py": x for x in (lem, flow, model, sample, train, evaluate)}

# A model small enough for every test: T = 16 tokens, patches of 2 * 2 * 3 = 12 numbers.
TINY = Config(
    depth=2, d=32, heads=2, r=4, encoder_depth=1, decoder_depth=1, d_l=16, lem_heads=2, N=3, d_e=8,
    p=2, latent_size=8, latent_channels=3, num_classes=5,
)  # fmt: skip
NONE = torch.tensor([], dtype=torch.long)  # `keep` when no image of the batch keeps its prior
HALF = torch.tensor([0, 3, 4])  # `keep` when three images of batch() keep theirs


def awake(config: Config = TINY, seed: int = 0) -> DoD:
    """A DoD whose zero-initialised layers are not zero, so that every input matters."""
    torch.manual_seed(seed)
    dod = DoD(config)
    for p in dod.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return dod.eval()


def batch(n: int = 6, config: Config = TINY, seed: int = 0):
    """-> data x0 and noise x1 (n, C, H, W), classes y (n,), times t (n,)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, config.latent_channels, config.latent_size, config.latent_size)
    x0 = torch.randn(shape, generator=generator)
    x1 = torch.randn(shape, generator=generator)
    y = torch.arange(n) % config.num_classes
    t = torch.rand(n, generator=generator)
    return x0, x1, y, t


def close(a, b, tolerance: float = 1e-5) -> bool:
    """Whether two tensors or numbers agree within an absolute plus a relative tolerance."""
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)


def run(module, *argv) -> int:
    """A script's command in this process -> its exit status."""
    # A training run catches signals. Without their old handlers Ctrl-C could not end pytest.
    handlers = {number: signal.getsignal(number) for number in train.SIGNALS}
    before = sys.argv
    sys.argv = [f"{module.__name__}.py", *map(str, argv)]
    try:
        sample.run_command(module.main)
        return 0
    except SystemExit as leave:
        return leave.code
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(n: int, script: str, *argv, **settings) -> subprocess.Popen:
    """Starts a script under torchrun, n ranks with one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={n}", HERE / script, *map(str, argv)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **settings)


def torchrun(n: int, script: str, *argv) -> subprocess.CompletedProcess:
    """A script on n processes of this machine -> how it ended, and what it printed."""
    pipe = subprocess.PIPE
    with start(n, script, *argv, stdout=pipe, stderr=pipe, text=True) as process:
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """A folder with a tiny VAE of random weights, kl, with a shift and a scale."""
    diffusers = pytest.importorskip("diffusers")
    out = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16], norm_num_groups=4, latent_channels=4, scaling_factor=3.0,
        shift_factor=0.5,
    ).save_pretrained(out / "kl")  # fmt: skip
    return out


# ----------------------------------------------------------------- Eqs. 1, 3, 11: the training loss


def reference_loss(model, x0, y, x1, t, keep) -> torch.Tensor:
    """Reference implementation: same values, slower. Eq. 3, as section 3.3 describes it -> (B,)."""
    time = t[:, None, None, None]
    x_t = (1 - time) * x0 + time * x1  # Eq. 1

    # LEM reads every image. Then S replaces its output for all images but those in `keep`.
    e_s = None
    if model.config.N:
        keeps = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
        keeps[keep] = True
        e_s = torch.where(keeps[:, None, None], model.visual_prior(x0), model.S)  # (B, T, d)

    v = model(x_t, t, y, e_s)
    return (x1 - x0 - v.float()).square().mean(dim=(1, 2, 3))


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel on a GPU: all but views, which move no data."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.count += 1
        return function(*args, **(kwargs or {}))


def linear_macs(function, *inputs) -> int:
    """Multiply-accumulates of the linear layers in one call, as PyTorch's own counter sees them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_flop_counts()["Global"][torch.ops.aten.addmm] // 2


def test_eq1_the_path_joins_data_and_noise_at_constant_velocity():
    x0, x1, _, t = batch()
    assert torch.equal(flow.interpolate(x0, x1, torch.zeros(6)), x0)
    assert torch.equal(flow.interpolate(x0, x1, torch.ones(6)), x1)

    # From any time t to t + 1/4 an image moves by a quarter of x_1 - x_0.
    moved = flow.interpolate(x0, x1, t + 0.25) - flow.interpolate(x0, x1, t)
    assert close(4 * moved, x1 - x0)


def test_eq3_each_image_sees_its_own_prior_or_the_sample_token():
    dod = awake()
    x0, x1, y, t = batch(7)
    keep = torch.tensor([0, 3, 4, 6])
    loss = flow.rectified_flow_loss(dod, x0, y, x1, t, keep)

    # The model alone, on one image after another.
    for i in range(7):
        one = slice(i, i + 1)
        e_s = None
        if i in keep:
            e_s = dod.visual_prior(x0[one])
        v = dod(flow.interpolate(x0[one], x1[one], t[one]), t[one], y[one], e_s)
        assert close(loss[i], (x1[one] - x0[one] - v).square().mean())


@pytest.mark.parametrize("keep", [NONE, HALF, torch.arange(6)], ids=["none", "half", "all"])
def test_eq3_equals_the_reference_in_loss_and_gradients_and_runs_lem_only_where_it_is_used(keep):
    # A forward and a backward pass of the same model on the same batch.
    x0, x1, y, t = batch()
    ours = awake()
    with Launches() as our_launches:
        loss = flow.rectified_flow_loss(ours, x0, y, x1, t, keep)
        loss.mean().backward()

    # A small model on a GPU is as slow as its kernel launches: ours needs no more of them.
    with Launches() as their_launches:
        reference_loss(awake(), x0, y, x1, t, keep).mean().backward()
    assert 0 < our_launches.count <= their_launches.count

    # With activation checkpointing the backward pass runs each block again, and changes nothing.
    theirs = awake()
    theirs.grad_checkpoint = True
    runs = []
    theirs.blocks[0].register_forward_pre_hook(lambda *inputs: runs.append(inputs))
    their_loss = reference_loss(theirs, x0, y, x1, t, keep)
    their_loss.mean().backward()
    assert len(runs) == 2
    assert close(loss, their_loss)

    # Without any prior, LEM has no gradient here and a zero one in the reference. Where both kinds
    # of images are, gradients reach every part of the backbone and of LEM.
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        assert close(p.grad, q.grad)
        assert len(keep) != 3 or p.grad.abs().sum() > 0

    # Without any prior, c is one vector for each image, which costs less.
    macs = model.training_macs(TINY)
    expected = {0: model.count_macs(TINY)["s"], 3: macs["ours"], 6: macs["naive"]}
    measured = linear_macs(flow.rectified_flow_loss, ours, x0, y, x1, t, keep)
    assert measured == 6 * expected[len(keep)]


def test_eq3_under_autocast_the_residual_stream_and_the_loss_stay_fp32():
    dod = awake()
    x0, x1, y, t = batch()
    streams = []
    for block in (*dod.lem.encoder, *dod.lem.decoder, *dod.blocks):
        block.register_forward_pre_hook(lambda block, inputs: streams.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = flow.rectified_flow_loss(dod, x0, y, x1, t, HALF)
    assert streams == [torch.float32] * 4
    assert loss.dtype == torch.float32
    assert close(loss, reference_loss(dod, x0, y, x1, t, HALF), 0.05)


def test_eq11_times_are_logit_normal():
    t = flow.logit_normal(200_000, torch.Generator().manual_seed(0)).double()
    assert 0 < t.min() and t.max() < 1
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    assert close(t.quantile(quantiles), torch.special.ndtri(quantiles).sigmoid(), 4e-3)


@pytest.mark.parametrize("p_s", [0, 0.25, 0.5, 0.9, 1])
def test_section_3_3_exactly_p_s_of_a_batch_lose_their_prior(p_s):
    for n in (1, 5, 8, 63, 256):
        keep = flow.keeps_prior(n, p_s)
        assert len(keep) == n
        assert n - sum(keep) == round(p_s * n)

        # So does every contiguous share of it, to within one image.
        for part in (keep[: n // 2], keep[n // 3 :]):
            dropped = len(part) - sum(part)
            assert abs(dropped - p_s * len(part)) <= 1


# -------------------------------------------------------------- Eqs. 2, 4: guidance and the solvers


def oscillator(x, t, rows=None):
    """dx/dt = A x + sin(5 t): smooth, and stiff enough to make steps differ between images."""
    A = torch.tensor([[0.0, 3.0], [-3.0, -0.5]], dtype=x.dtype)
    return x @ A.T + torch.sin(5 * t)[:, None]


def jolt(x, t, rows=None):
    """Stands still down to t = 0.5, then decays fast: steps are rejected."""
    return 60 * x * torch.sigmoid(300 * (0.5 - t))[:, None]


def test_guidance_is_off_at_1_linear_in_w_and_refused_below_1():
    v_c, v_u = torch.randn(2, 4, 5, 2, 2)
    guided = flow.guide(v_c, v_u, 5.5)
    assert close(guided, 5.5 * v_c - 4.5 * v_u)
    assert close(flow.guide(v_c, v_u, 1), v_c)
    for w in (0.99, float("nan")):
        with pytest.raises(ValueError, match="at least 1"):
            flow.guide(v_c, v_u, w)

    # With `channels` the first ones are guided, and the others are those of v_c.
    first_three = torch.cat([guided[:, :3], v_c[:, 3:]], dim=1)
    assert torch.equal(flow.guide(v_c, v_u, 5.5, channels=3), first_three)


def test_eq2_and_eq4_euler_is_exact_on_straight_paths_and_counts_its_evaluations():
    x0, x1, _, _ = batch()
    times = []

    def straight(x, t, rows):
        times.append(t)
        return (x1 - x0)[rows]

    found, nfe = flow.euler(straight, x1, 10)
    assert close(found, x0)
    assert nfe.tolist() == [10] * 6

    # Eq. 4's times tau are uniform, from 1 down to 1 / 10, and the same for all images.
    tau = torch.arange(10, 0, -1) / 10
    assert close(torch.stack(times), tau[:, None].expand(10, 6))

    # Each step starts where the last one ended: of dx/dt = x, it takes a tenth of what is left.
    assert close(flow.euler(lambda x, t, rows: x, x1, 10)[0], x1 * 0.9**10)


def test_eq4_rk45_equals_scipy_for_each_image_in_result_and_evaluations():
    x1 = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x1[3] = 0  # takes another branch of Hairer's first step
    sit = {"rtol": 1e-3, "atol": 1e-6}  # SiT's tolerances are the default
    for f in (oscillator, jolt):
        # SciPy solves for one image, from t = 1 down to 0 as we do.
        def scipy_f(t, x, f=f):
            return f(torch.tensor(x)[None], torch.tensor([t]), None)[0].numpy()

        for tolerances in ({}, {"rtol": 1e-7, "atol": 1e-9}):
            x0, nfe = flow.dopri5(f, x1, **tolerances)
            for i in range(8):
                scipy = solve_ivp(scipy_f, (1, 0), x1[i].numpy(), "RK45", **sit | tolerances)
                assert nfe[i] == scipy.nfev
                assert close(x0[i], scipy.y[:, -1], 1e-7)


def test_eq4_rk45_is_of_order_five_and_its_error_estimate_too():
    x1 = torch.ones(1, 2, dtype=torch.float64)
    exact, _ = flow.dopri5(oscillator, x1, 1e-13, 1e-13)

    # Errors at t = 0, and estimated errors of the first step, for ever shorter steps.
    errors = []
    estimates = []
    for n in (16, 32, 64):
        # n steps of equal length, each of which starts with the last slope of the one before.
        h = torch.full((1,), 1 / n, dtype=torch.float64)
        x = x1
        k = oscillator(x, torch.ones_like(h))
        for i in range(n):
            x, estimate, k = flow.rk45_step(oscillator, x, 1 - i * h, h, k, None)
            if i == 0:
                estimates.append(estimate.norm().item())
        errors.append((x - exact).norm().item())

    # Steps half as long: 2^5 times less error in the end, 2^5 times less estimated for one step.
    assert 4.7 < math.log2(errors[0] / errors[1]) < 5.5
    assert 4.7 < math.log2(errors[1] / errors[2]) < 5.5
    assert 4.7 < math.log2(estimates[1] / estimates[2]) < 5.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eq4_rk45_does_not_depend_on_the_batch_and_stays_within_0_and_1(dtype):
    x1 = torch.randn(6, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x1 *= torch.arange(1, 7)[:, None] ** 2
    noise = x1.clone()
    times = []

    def f(x, t, rows):
        assert t.dtype == dtype
        times.extend(t.tolist())
        return oscillator(x, t).sin() * (1 + rows[:, None])

    # Images need different numbers of evaluations; one that has finished is not evaluated again.
    x0, nfe = flow.dopri5(f, x1)
    assert (min(times), max(times)) == (0, 1)
    assert len(nfe.unique()) > 1
    assert len(times) == nfe.sum()

    # The last three images alone. The caller's noise is left as it was.
    alone, alone_nfe = flow.dopri5(lambda x, t, rows: f(x, t, rows + 3), x1[3:])
    assert close(alone, x0[3:], 1e-4)
    assert torch.equal(alone_nfe, nfe[3:])
    assert torch.equal(x1, noise)


@pytest.mark.parametrize("limit", [0.5, 1, 2])
def test_eq4_rk45_stops_when_the_velocity_is_not_finite_or_the_step_vanishes(limit):
    # Infinite at late times, at all but the first evaluation, or at every one.
    def breaks(x, t, rows):
        return torch.where(t[:, None] >= limit, x, torch.inf)

    # No step is short enough where the square of the velocity overflows.
    x1 = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="velocity is not finite near t = [01]"):
        flow.dopri5(breaks, x1)
    with pytest.raises(FloatingPointError, match="step is too small at t = 1"):
        flow.dopri5(lambda x, t, rows: torch.full_like(x, 1e200), x1)


def test_eq3_the_demonstration_s_velocity_is_the_exact_minimiser():
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, -2.0]], dtype=torch.float64)
    x = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0.05, 0.95, 20, dtype=torch.float64)

    # Tweedie's formula says v = -(x + t grad log p_t(x)) / (1 - t), where p_t is the mixture of the
    # Gaussians N((1 - t) c_m, (1 - t)^2 sigma^2 + t^2).
    variance = (1 - t) ** 2 * 0.3**2 + t**2
    means = (1 - t)[:, None, None] * centres  # (20, 3, 2)
    squares = (x[:, None] - means).square().sum(-1)
    log_p = torch.logsumexp(-squares / (2 * variance[:, None]), dim=1)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    expected = -(x + t[:, None] * score) / (1 - t)[:, None]
    assert close(flow.mixture_velocity(centres, 0.3)(x, t, None), expected, 1e-9)


def test_the_flow_command_draws_a_picture(tmp_path, monkeypatch):
    # Of nine points instead of 512.
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda n, *rest, **how: randn(9, *rest, **how))
    flow.main(["--out", str(tmp_path / "new folder/flow.png")])
    assert (tmp_path / "new folder/flow.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------- Eqs. 5-10: the visual prior and the backbone


@pytest.mark.parametrize("stage", [1, 2])
def test_eq5_first_stage_uses_the_sample_token_and_later_ones_a_prior_for_each_token(stage):
    dod = awake()
    x0, x_t, y, t = batch()

    # Time enters unscaled, as cosines and then sines.
    angle = t[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    e_t = dod.time.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))[:, None]
    e_s = None
    c = dod.label(y)[:, None] + e_t + dod.S  # (B, 1, d)
    if stage == 2:
        e_s = dod.prior_mlp(dod.lem(x0))
        c = dod.label(y)[:, None] + e_t + e_s  # (B, T, d)
        assert torch.equal(dod.visual_prior(x0), e_s)

    # All that c does, it does through the modulations: W^g c, each block's own, the last layer's.
    silu_c = F.silu(c)
    cos, sin = model.rope_2d(16, 4)
    x = dod.patch_embed(lem.patchify(x_t, 2))
    for block in dod.blocks:
        x = block(x, silu_c, dod.W_g(silu_c), cos, sin)
    shift, scale = dod.final.adaln(silu_c).chunk(2, dim=-1)
    x = dod.final.linear(F.layer_norm(x, [32], eps=1e-6) * (1 + scale) + shift)
    v = dod(x_t, t, y, e_s)
    assert close(v, dod.unpatchify(x))

    # The gradient reaches S in stage 1 and LEM in later stages, never both.
    v.sum().backward()
    assert (dod.S.grad is None) == (stage == 2)
    assert (dod.lem.mask_token.grad is None) == (stage == 1)


def test_eq6_eq7_are_the_written_out_formulas():
    dod = awake()
    x0, _, _, _ = batch()

    # Eq. 6: L_hat = Enc((e_p + PE) ⊕ L), of which the latent tokens are kept.
    e_p = dod.lem.patch_embed(lem.patchify(x0, 2))
    L = dod.lem.latent_tokens.expand(6, -1, -1)
    x = dod.lem.encoder(torch.cat([e_p + lem.sincos_2d(16, 4, 4), L], dim=1))
    l_hat = dod.lem.to_d_e(dod.lem.encoder_norm(x))[:, 16:]
    assert l_hat.shape == (6, TINY.N, TINY.d_e)
    assert close(dod.lem.encode(x0), l_hat)

    # Eq. 7: e_s = Dec((M + PE) ⊕ L_hat), of which the patches are kept.
    M = dod.lem.mask_token.expand(6, 16, -1)
    x = torch.cat([M + lem.sincos_2d(8, 4, 4), l_hat], dim=1)
    x = dod.lem.decoder(dod.lem.from_d_e(x))
    e_l = dod.lem.head(dod.lem.decoder_norm(x))[:, :16]
    assert close(dod.lem(x0), e_l)


def test_eq7_without_positions_all_patches_would_be_alike():
    # M is one token, repeated for every patch: only PE tells the patches apart.
    dod = awake()
    x0, _, _, _ = batch()
    assert dod.lem(x0).std(1).min() > 0
    dod.lem.pos_decoder.zero_()
    assert dod.lem(x0).std(1).max() < 1e-5


def test_eq6_eq7_positions_are_frozen_sines_and_cosines():
    # Of the row, then of the column, in a grid of 3 x 5.
    w = 10000.0 ** (-np.arange(4) / 4)
    for i, pe in enumerate(lem.sincos_2d(16, 3, 5)):
        row, column = divmod(i, 5)
        expected = [np.sin(row * w), np.cos(row * w), np.sin(column * w), np.cos(column * w)]
        assert np.allclose(pe, np.concatenate(expected), atol=1e-6)

    # A model's state is its parameters: positions, RoPE's too, are neither trained nor saved.
    assert list(DoD(TINY).state_dict()) == [name for name, _ in DoD(TINY).named_parameters()]


def test_eq6_eq7_the_blocks_are_those_of_a_standard_vision_transformer():
    # PyTorch's own pre-norm block is given our weights, in the order of its parameters.
    ours = awake().lem.encoder[0]
    settings = {"batch_first": True, "norm_first": True}
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", 1e-6, **settings)
    layers = [ours.qkv, ours.proj, ours.mlp[0], ours.mlp[2], ours.norm1, ours.norm2]
    parameters = [p for layer in layers for p in layer.parameters()]
    for p, q in zip(theirs.parameters(), parameters, strict=True):
        p.data = q.data
    x = torch.randn(2, 7, 16)
    assert close(ours(x), theirs(x))


def test_eq8_swiglu_is_the_written_out_formula():
    ffn = model.SwiGLU(12)
    x = torch.randn(5, 12)
    gate = x @ ffn.W_1.weight.T + ffn.W_1.bias
    value = x @ ffn.W_2.weight.T + ffn.W_2.bias
    assert gate.shape == (5, 32)  # 8d/3 wide
    expected = (gate * gate.sigmoid() * value) @ ffn.W_3.weight.T + ffn.W_3.bias
    assert close(ffn(x), expected)


def test_eq9_attention_is_the_written_out_formula_with_the_scale_1_over_sqrt_d_k():
    attention = model.Attention(16, 2)
    x = torch.randn(3, 9, 16) * 100
    q, k, v = attention.qkv(x).reshape(3, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)

    # RoPE: a pair of channels is a complex number. Half of them turn by w row, half by w column.
    w = 10000.0 ** (-torch.arange(2) / 2)
    places = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # (9, 2)
    turn = torch.exp(1j * (places[:, :, None] * w).flatten(1))  # (9, 4)

    def rope(x):
        pairs = torch.view_as_complex(F.layer_norm(x, [8], eps=1e-6).unflatten(-1, (4, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2)

    # The pairs are neighbours: channels 2k and 2k + 1.
    rotated = model.rotate(F.layer_norm(q, [8], eps=1e-6), *model.rope_2d(8, 3))
    assert close(rotated, rope(q))

    # LN bounds |q| and |k| by sqrt(d_k), and so the logits by sqrt(d_k) = sqrt(8).
    logits = rope(q) @ rope(k).transpose(-1, -2) / math.sqrt(8)
    assert logits.abs().max() <= math.sqrt(8) + 1e-4
    attended = (logits.softmax(-1) @ v).transpose(1, 2).reshape(3, 9, 16)
    assert close(attention(x, *model.rope_2d(8, 3)), attention.proj(attended), 1e-3)


def test_eq10_modulation_is_a_shared_part_plus_a_block_s_part_of_rank_r():
    dod = awake()
    x = torch.randn(40, 16, 32)
    silu_c = torch.randn(40, 1, 32)
    global_S = torch.randn(40, 1, 192)
    block = dod.blocks[0]
    own = block.W_2(block.W_1(silu_c))
    assert torch.linalg.matrix_rank((own - own.mean(0))[:, 0], rtol=1e-4) == TINY.r

    # The order is shifts, scales, gates, each for attention and then for the feed-forward network.
    S = (global_S + own).unflatten(-1, (6, 32))
    beta_1, beta_2, gamma_1, gamma_2, alpha_1, alpha_2 = S.unbind(2)
    normed = F.layer_norm(x, [32], eps=1e-6)
    h = x + alpha_1 * block.attention(normed * (1 + gamma_1) + beta_1, dod.cos, dod.sin)
    normed = F.layer_norm(h, [32], eps=1e-6)
    expected = h + alpha_2 * block.ffn(normed * (1 + gamma_2) + beta_2)
    assert close(block(x, silu_c, global_S, dod.cos, dod.sin), expected, 1e-4)


def test_a_new_model_says_v_0_and_has_no_modulation_yet():
    torch.manual_seed(0)
    dod = DoD(replace(TINY, d=512, N=64, d_e=512, num_classes=500))
    x0, x_t, y, t = batch()
    assert dod(x_t, t, y, dod.visual_prior(x0)).abs().max() == 0

    # Modulations and the last layer are zero, the other linear layers Xavier-uniform, biases zero.
    zero = {dod.W_g, dod.final.adaln, dod.final.linear, *(block.W_2 for block in dod.blocks)}
    for layer in dod.modules():
        if isinstance(layer, torch.nn.Linear):
            bound = 0
            if layer not in zero:
                bound = math.sqrt(6 / sum(layer.weight.shape))
            assert 0.9 * bound <= layer.weight.abs().max() <= bound
            assert layer.bias.abs().max() == 0

    # The class table, S, L and M come from N(0, 0.02). The null class has the table's last row.
    for table in (dod.label.weight, dod.S, dod.lem.latent_tokens, dod.lem.mask_token):
        assert abs(table.std() / 0.02 - 1) < 0.1
    assert len(dod.label.weight) == dod.null_class + 1 == 501


# ------------------------------------------------------------------- Tables 1 and 4, configurations


def test_table1_parameters(capsys):
    model.print_table_1()
    pattern = r"(\S+) +ours +([\d.]+) +([\d.]+) +([\d.]+)\n +paper +(\d+) +(\d+) +(\d+)\n"
    rows = re.findall(pattern, capsys.readouterr().out)
    assert [row[0] for row in rows] == ["DoD-S", "DoD-B", "DoD-XL", "FiTv2-B", "FiTv2-XL"]
    for row in rows:
        numbers = [round(float(n)) for n in row[1:]]
        assert numbers[:3] == numbers[3:]

    # The architecture that reproduces all of them, to the second digit of a million.
    millions = {row[0]: (float(row[1]), float(row[2])) for row in rows}
    assert millions["DoD-S"] == (26.53, 21.47)
    assert millions["DoD-B"] == (104.96, 85.71)
    assert millions["DoD-XL"] == (527.13, 85.71)
    assert millions["FiTv2-B"] == (128.15, 0)
    assert millions["FiTv2-XL"] == (671.05, 0)
    assert CONFIGS["DoD-B"] == Config()

    # They are counted without memory; a real model has as many.
    built = sum(p.numel() for p in DoD(TINY).parameters())
    assert sum(model.count_parameters(TINY)) == built


def test_section_4_2_dod_ti_is_the_paper_s_geometry_in_miniature():
    # A latent token has as many numbers as a patch, and there are T / 8 of them, as in DoD-B.
    paper = CONFIGS["DoD-B"]
    tiny = CONFIGS["DoD-Ti"]
    for config in (paper, tiny):
        assert config.d_e == config.p**2 * config.latent_channels == 16
        assert config.num_tokens == 8 * config.N
    assert (tiny.depth, tiny.d, tiny.heads, tiny.r) == (4, 128, 4, 32)
    assert (tiny.encoder_depth, tiny.decoder_depth, tiny.d_l, tiny.lem_heads) == (2, 1, 128, 4)
    assert (tiny.latent_size, tiny.num_classes, tiny.cfg) == (16, 10, 2)

    # The baseline has one layer more, in place of LEM.
    fit = CONFIGS["FiTv2-Ti"]
    assert replace(tiny, depth=5, N=0) == replace(
        fit, encoder_depth=2, decoder_depth=1, d_l=128, lem_heads=4
    )


def test_table4_compute(capsys):
    # No row of the table costs more than in the paper.
    model.print_table_4()
    table = re.findall(r"^  (\S.*?)  +([\d.]+) +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.M)
    assert len(table) == 12
    for _, paper, ours, with_attention in table:
        assert 0.8 * float(paper) < float(ours) <= float(paper)
        assert 1.03 < float(with_attention) / float(ours) < 1.07
    ours = {name: float(ours) for name, _, ours, _ in table}
    assert ours["LEM"] == 24.6  # the paper: 24.6
    assert ours["DoD-B, one evaluation, c per token"] == 26.4  # the paper: 26.5
    assert ours["FiTv2-B-G, 240 steps"] == pytest.approx(13104, rel=0.004)


def test_table4_counts_what_a_stage_really_runs():
    counts = model.count_macs(TINY)
    dod = awake()
    x0, x_t, y, t = batch(1)

    # A stage of 5 evaluations, of which 2 are guided.
    def stage(has_prior):
        e_s = None
        if has_prior:
            e_s = dod.visual_prior(x0)
        for _ in range(5):
            dod(x_t, t, y, e_s)
        for _ in range(2):
            dod(x_t, t, y)

    for has_prior in (False, True):
        parts = model.stage_parts(5, 2, has_prior)
        assert linear_macs(stage, has_prior) == sum(n * counts[part] for part, n in parts.items())

    # Section 3.3: training costs a quarter less than written naively. Attention: 12 blocks on 256
    # tokens, and 12 of LEM on 256 + 32 for half of the images.
    macs = model.training_macs(CONFIGS["DoD-B"])
    assert round(macs["ours"] / 1e9, 2) == 38.59
    assert round(macs["naive"] / 1e9, 2) == 51.05
    assert macs["attention"] == 12 * 2 * 256**2 * 768 + 12 * 2 * 288**2 * 768 / 2
    assert model.training_macs(CONFIGS["DoD-B"], p_s=0)["ours"] == macs["naive"]
    quarter = model.training_macs(CONFIGS["DoD-B"], p_s=0.25)
    assert quarter["ours"] == (macs["ours"] + macs["naive"]) / 2
    attention = 12 * 2 * 256**2 * 768 + 0.75 * 12 * 2 * 288**2 * 768
    assert quarter["attention"] == attention


def test_any_size_channels_and_classes_work():
    config = replace(TINY, latent_size=10, latent_channels=1, num_classes=1, p=5)
    x, _, y, t = batch(2, config)
    dod = awake(config)
    assert dod(x, t, y, dod.visual_prior(x)).shape == x.shape

    # Patches are cut row by row, pixels before channels, and put back in their places.
    x, _, _, _ = batch()
    patches = lem.patchify(x, 2)
    second_row_second_column = x[:, :, 2:4, 2:4].permute(0, 2, 3, 1)
    assert torch.equal(patches[:, 5], second_row_second_column.flatten(1))
    assert torch.equal(DoD(TINY).unpatchify(patches), x)


def test_configs_that_do_not_fit_are_refused_by_name():
    # Each of 36's two heads has 18 channels; RoPE needs fours.
    for field, wrong in (
        ("depth", 0), ("depth", True), ("d", 32.0), ("d", 36), ("r", None), ("N", -1), ("d_l", 18),
        ("d_e", 6), ("cfg", 0.99), ("cfg", float("nan")), ("prior_from", "vae"),
    ):  # fmt: skip
        with pytest.raises(model.UserError, match=f"^{field} is .* must be"):
            replace(TINY, **{field: wrong})
    with pytest.raises(model.UserError, match="^latent size 9 is not a multiple of the patch"):
        replace(TINY, latent_size=9)

    # The guidance scales of section 4.2 and Table 5.
    assert CONFIGS["DoD-S"].cfg == CONFIGS["DoD-B"].cfg == 5.5
    assert CONFIGS["DoD-XL"].cfg == 3.5


def test_section_1_a_prior_of_patches_passes_everything_on_and_fitv2_has_none():
    # A token's e_s is a linear function of its own patch, which is what training adapts.
    dod = awake(replace(TINY, prior_from="patches"))

    # Its only linear layer has 12 inputs for each of the 16 tokens, and no MLP follows it.
    macs = model.count_macs(dod.config)
    assert macs["lem"] == 16 * 12 * TINY.d
    assert macs["prior_mlp"] == 0

    x0, x1, y, t = batch()
    weight = dod.lem.embed.weight
    e_s = lem.patchify(x0, 2) @ weight.T + dod.lem.embed.bias
    assert close(dod.visual_prior(x0), e_s)
    assert model.count_parameters(dod.config)[1] == 12 * 32 + 32
    flow.rectified_flow_loss(dod, x0, y, x1, t, HALF).mean().backward()
    assert weight.grad.abs().min() > 0

    # In a plain FiTv2, LEM's sizes do not matter.
    fit = awake(replace(TINY, N=0, d_e=6))
    loss = flow.rectified_flow_loss(fit, x0, y, x1, t, NONE)
    assert close(loss, reference_loss(fit, x0, y, x1, t, NONE))
    assert model.count_parameters(fit.config)[1] == 0
    with pytest.raises(model.UserError, match="stage 1 only"):
        fit.visual_prior(x0)


# --------------------------------------------------------- training: the step, sections 3.3 and 4.1

QUICK = ["--data", "digits", "--batch-size", "8", "--log-every", "2", "--device", "cpu"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished run of six steps on the digits."""
    out = tmp_path_factory.mktemp("run") / "digits"
    assert run(train, *QUICK, "--steps", 6, "--out", out) == 0
    return out


@pytest.fixture
def before_step(monkeypatch) -> Callable:
    """before_step(f): each step of the runs to come first calls f(step, what it was given)."""
    take = train.training_step

    def install(watch: Callable) -> None:
        def watched(network, ema, optimizer, scaler, batch, keep, step, *rest):
            rate = optimizer.param_groups[0]["lr"]
            given = Namespace(network=network, batch=list(batch), keep=keep, lr=rate, rest=rest)
            watch(step, given)
            return take(network, ema, optimizer, scaler, given.batch, keep, step, *rest)

        monkeypatch.setattr(train, "training_step", watched)

    return install


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Runs leave an empty samples.png: drawing it would take longer than the few steps."""
    monkeypatch.setattr(train, "draw_samples", lambda *rest: rest[-1].touch())


def helpers_of(dod: DoD, lr: float = 0.0, fp16: bool = False):
    """What a training step needs beside the model: EMA, AdamW, gradient scaler."""
    ema = copy.deepcopy(dod).requires_grad_(False)
    optimizer = torch.optim.AdamW(dod.parameters(), lr, weight_decay=0)
    return ema, optimizer, torch.amp.GradScaler("cpu", enabled=fp16)


def flat(dod: DoD, what: str = "data") -> torch.Tensor:
    """All weights of a model, or all gradients (what = "grad"), in one vector."""
    return torch.cat([getattr(p, what).detach().flatten() for p in dod.parameters()])


def records_of(out: Path) -> list[dict]:
    """The log of a run."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def saved(out: Path) -> dict:
    """The checkpoint of a run."""
    return sample.load_checkpoint(out / "ckpt.pt")


def files_in(folder: Path) -> set[str]:
    """The names of all files in a folder, hidden ones too."""
    return {file.name for file in folder.iterdir()}


def error_of(capfd) -> str:
    """The one line of error on stderr since the last look."""
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    return line


def test_section_4_1_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    dod = DoD(TINY)
    x0, x1, y, t = batch(8)
    keep = [torch.tensor([0, 3, 4, 6])]

    # The first loss is that of v = 0; its gradient, here far too long, is clipped to norm 1. At
    # rate 0 the second step is the first one again: no gradient is left over.
    helpers = helpers_of(dod)
    given = (100 * x0, 100 * x1, t, y)
    losses, norm = train.training_step(dod, *helpers, given, keep, 1)
    assert close(losses, 1e4 * (x1 - x0).square().mean(dim=(1, 2, 3)))
    assert norm > 10 and close(flat(dod, "grad").norm(), 1.0, 1e-3)
    assert train.training_step(dod, *helpers, given, keep, 2)[1] == norm

    # A hundred and fifty steps on the same images, noises and times.
    helpers = helpers_of(dod, lr=3e-3)
    history = []
    for step in range(1, 151):
        losses, _ = train.training_step(dod, *helpers, (x0, x1, t, y), keep, step)
        history.append(losses.mean().item())
    assert np.mean(history[-5:]) < history[0] / 10

    # Each step ends with the EMA's.
    before = flat(helpers[0])
    train.training_step(dod, *helpers, (x0, x1, t, y), keep, 5, ema_decay=0.3)
    assert close(flat(helpers[0]), 0.3 * before + 0.7 * flat(dod), 1e-6)


def test_section_4_1_ema_is_the_written_out_average_with_warm_up():
    # Early on the decay is (1 + n) / (10 + n), 6 / 15 at step 5.
    ema = awake(seed=1).requires_grad_(False)
    dod = awake(seed=2)
    before = flat(ema)
    train.update_ema(ema, dod, 5)
    assert close(flat(ema), 6 / 15 * before + 9 / 15 * flat(dod), 1e-6)

    # Later it is the paper's 0.999.
    before = flat(ema)
    train.update_ema(ema, dod, 10**6)
    assert close(flat(ema), 0.999 * before + 0.001 * flat(dod), 1e-7)


def test_section_4_1_samples_come_from_the_ema_and_the_optimizer_is_the_paper_s(trained):
    # What sample.py loads is the EMA, which is not the weights themselves.
    found = saved(trained)
    weights = sample.load_model(found).state_dict()
    assert all(torch.equal(weights[key], found["ema"][key]) for key in weights)
    assert not torch.equal(found["ema"]["W_g.weight"], found["model"]["W_g.weight"])

    # AdamW without weight decay; for the paper's sizes its constant rate and its batch.
    group = found["optimizer"]["param_groups"][0]
    assert group["betas"] == (0.9, 0.999)
    assert group["weight_decay"] == 0 and group["decoupled_weight_decay"]
    args = train.parse(["--model", "DoD-XL"])
    assert (args.lr, args.warmup, args.batch_size) == (1e-4, 0, 256)
    assert (args.ema_decay, args.p_s, args.class_dropout) == (0.999, 0.5, 0.1)


def test_gradients_are_the_same_in_micro_batches_checkpointed_compiled_and_near_in_bf16_and_fp16(
    monkeypatch,
):
    # Everything of torch.compile but the C++ compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    # Each case is the same model and batch; only the way to the gradient differs.
    x0, x1, y, t = batch(8)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    gradients = {}
    streams = []
    for case in ("plain", "accum", "checkpoint", "compile", "bf16", "fp16"):
        dod = awake().train()
        dod.grad_checkpoint = case in ("checkpoint", "compile")
        if case == "compile":
            train.compile_blocks(dod, torch.device("cpu"))
        for block in (*dod.blocks, *dod.lem.encoder, *dod.lem.decoder):
            assert (block._compiled_call_impl is not None) == (case == "compile")
            block.register_forward_hook(lambda block, inputs, out: streams.append((inputs[0], out)))

        # One step on the same batch, in which every fourth image loses its prior.
        accum = {"accum": 4}.get(case, 1)
        _, keep, _ = train.divide_batch(8, 0.25, accum)
        keep = [torch.tensor(rows) for rows in keep]
        helpers = helpers_of(dod, fp16=case == "fp16")
        given = (x0, x1, t, y)
        losses, norm = train.training_step(dod, *helpers, given, keep, 1, dtypes.get(case))
        assert losses.shape == (8,) and losses.dtype == torch.float32
        clipped = flat(dod, "grad")
        assert close(clipped.norm(), min(norm.item(), 1.0), 1e-3)
        gradients[case] = clipped * max(norm, 1)  # as it was before the clip

    # The residual stream is fp32 in all of them.
    assert all(x.dtype == out.dtype == torch.float32 for x, out in streams)
    tolerances = dict(accum=1e-5, checkpoint=1e-6, compile=1e-5, bf16=0.05, fp16=0.01)
    for case, tolerance in tolerances.items():
        error = (gradients[case] - gradients["plain"]).norm() / gradients["plain"].norm()
        assert error < tolerance, (case, error)
        assert (error > 1e-4) == (case in dtypes), (case, error)


def test_fp16_skips_a_step_whose_gradient_overflows_and_auto_is_what_the_device_can(monkeypatch):
    # A loss beyond fp16's range: even at rate 1 no weight moves, and the loss is scaled less.
    dod = awake()
    before = flat(dod)
    ema, optimizer, scaler = helpers_of(dod, lr=1.0, fp16=True)
    x0, x1, y, t = batch(2)
    keep = [torch.tensor([0])]
    given = (x0, 1e9 * x1, t, y)
    train.training_step(dod, ema, optimizer, scaler, given, keep, 1, torch.float16)
    assert torch.equal(flat(dod), before) and torch.equal(flat(ema), before)
    assert scaler.get_scale() == 2**15  # half of what it was

    # --precision auto: a T4 has no bf16; a CPU stays with fp32.
    for answer, precision in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda answer=answer, **how: answer)
        assert train.resolve_precision("auto", torch.device("cuda")) == precision
    assert train.resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert train.resolve_precision("bf16", torch.device("cpu")) == "bf16"


def test_noise_times_and_dropped_classes_are_a_function_of_seed_and_step_and_independent():
    # The generator's state before a step does not matter, its seed and number do.
    config = replace(TINY, latent_size=2, latent_channels=1)
    generator = torch.Generator()
    draws = train.draw_noise(7, 3, 20_000, config, 0.2, generator)
    again = train.draw_noise(7, 3, 20_000, config, 0.2, generator)
    assert all(map(torch.equal, draws, again))
    for seed, step in ((8, 3), (7, 4), (3, 7)):
        others = train.draw_noise(seed, step, 20_000, config, 0.2, generator)
        assert not any(map(torch.equal, draws, others))

    # Standard normal x1 and eps and Eq. 11's times, each number independent of the others.
    x1, eps, t, dropped = draws
    assert x1.shape == eps.shape == (20_000, 1, 2, 2)
    numbers = torch.cat([x1.flatten(1), eps.flatten(1), t.logit()[:, None]], dim=1)
    assert numbers.mean(0).abs().max() < 0.03
    assert (numbers.T.cov() - torch.eye(9)).abs().max() < 0.04

    # A class drops with the probability given, whether or not its image keeps the prior.
    keep = torch.tensor(flow.keeps_prior(20_000, 0.5))
    for group in (dropped, dropped[keep], dropped[~keep], dropped[t < 0.4]):
        assert abs(group.double().mean() - 0.2) < 0.015


def test_each_step_of_a_run_gets_its_pictures_noise_times_classes_and_rate(
    before_step, no_pictures, monkeypatch, tmp_path
):
    # A run with all flags that concern a step, of which every step is watched.
    steps = []
    weights = []

    def watch(step, given):
        steps.append(given)
        weights.append(flat(given.network))

    before_step(watch)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flags = ["--steps", 3, "--seed", 4, "--flip", "--class-dropout", 0.5, "--p-s", 0.25]
    flags += ["--lr", 0.01, "--warmup", 2, "--ema-decay", 0.5, "--precision", "bf16"]
    assert run(train, *QUICK, *flags, "--compile", "--grad-checkpoint", "--out", tmp_path) == 0

    # What each step should have been given, put together by hand.
    pictures, _, _ = train.load_data("digits", 8, 1, 0.1)
    batches = train.batches(len(pictures), 8, 4, True, range(1, 4))
    for step, given, items in zip((1, 2, 3), steps, batches, strict=True):
        x1, _, t, dropped = train.draw_noise(
            4, step, 8, given.network.config, 0.5, torch.Generator()
        )
        images = torch.stack([pictures[item][0] for item in items])
        y = torch.tensor([pictures[item][1] for item in items])
        y[dropped] = 10  # the null class
        assert all(map(torch.equal, given.batch, (images / 127.5 - 1, x1, t, y)))
        assert [rows.tolist() for rows in given.keep] == train.divide_batch(8, 0.25, 1)[1]
        assert given.rest == (torch.bfloat16, 0.5)

    # The first weights are a function of the seed.
    torch.manual_seed(4)
    assert torch.equal(weights[0], flat(DoD(steps[0].network.config)))

    # The rate warms up; the network, of 4 blocks and LEM's 3, is as the flags say.
    assert [given.lr for given in steps] == [0.005, 0.01, 0.01]
    dod = steps[0].network
    assert dod.grad_checkpoint
    assert sum(block._compiled_call_impl is not None for block in dod.modules()) == 7


def test_batches_are_seeded_permutations_flipped_by_seed_and_step_and_start_anywhere():
    # Ten batches of four are four epochs of ten pictures, each in an order of its own.
    whole = list(train.batches(10, 4, 7, True, range(1, 11)))
    numbers, flips = zip(*sum(whole, []), strict=True)
    for epoch in range(4):
        assert sorted(numbers[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert numbers[:10] != numbers[10:20]

    # They may start anywhere, and another seed is another order with other flips.
    assert list(train.batches(10, 4, 7, True, range(7, 11))) == whole[6:]
    others = sum(train.batches(10, 4, 8, True, range(1, 11)), [])
    other_numbers, other_flips = zip(*others, strict=True)
    assert other_numbers != numbers and other_flips != flips

    # Half of the pictures are mirrored, others at each step; none without --flip.
    _, first = zip(*next(train.batches(9, 4000, 7, True, range(1, 2))), strict=True)
    _, second = zip(*next(train.batches(9, 4000, 7, True, range(2, 3))), strict=True)
    _, never = zip(*next(train.batches(9, 4000, 7, False, range(1, 2))), strict=True)
    assert first != second and abs(np.mean(first + second) - 0.5) < 0.02
    assert not any(never)

    # A batch may be larger than the data set.
    wide = [i for i, _ in next(train.batches(3, 8, 7, True, range(1, 2)))]
    assert sorted(wide[:3]) == sorted(wide[3:6]) == [0, 1, 2]


@pytest.mark.parametrize("batch_size, p_s", [(24, 0.25), (24, 0.75), (7, 0.5), (24, 0), (24, 1)])
def test_section_3_3_ranks_and_micro_batches_share_the_batch_and_its_priors(
    batch_size, p_s, monkeypatch
):
    positions = list(range(batch_size))
    kept = flow.keeps_prior(batch_size, p_s)
    divisions = [(1, 1), (1, 4), (2, 1), (3, 2), (2, 4), (7, 1)]
    for ranks, accum in [(n, k) for n, k in divisions if batch_size % (n * k) == 0]:
        covered = []
        keeping = []
        lonely = []
        answers = set()
        for rank in range(ranks):
            monkeypatch.setattr(train, "processes", lambda rank=rank, n=ranks: (rank, n))
            share, keep, some_without_prior = train.divide_batch(batch_size, p_s, accum)
            covered += positions[share]
            answers.add(some_without_prior)
            for i, rows in enumerate(keep):
                first = share.start + i * (batch_size // ranks // accum)
                keeping += [first + row for row in rows]
                lonely.append(not rows)
        # Together they are the whole batch and its priors, and agree whether a part has none.
        assert covered == positions
        assert keeping == [i for i in positions if kept[i]]
        assert answers == {any(lonely)}


def test_batches_that_cannot_be_divided_are_refused(monkeypatch, tmp_path, capfd):
    # S and LEM must both be trained, and every micro-batch has the same size.
    for batch_size, p_s in ((1, 0.5), (8, 0.01), (8, 0.99)):
        with pytest.raises(model.UserError, match="is all or none; raise the latter"):
            train.divide_batch(batch_size, p_s, 1)
    monkeypatch.setattr(train, "processes", lambda: (0, 3))
    with pytest.raises(model.UserError, match="8 is not divisible by 3 ranks x 2 micro-batches"):
        train.divide_batch(8, 0.5, 2)
    monkeypatch.setattr(train, "processes", lambda: (0, 9999))
    assert run(train, *QUICK, "--out", tmp_path) == 2
    assert "9999 ranks for 1617 pictures; start fewer" in error_of(capfd)


# ------------------------------------------------------------- training: stopping, resuming, ranks


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_resuming_equals_never_having_stopped_bit_for_bit(
    number, trained, tmp_path, before_step, no_pictures, capfd
):
    # A signal during step 3, as from Ctrl-C: another process sends it, and the loader's worker
    # gets it, too.
    def interrupt(step, given):
        if step == 3:
            workers = [worker.pid for worker in multiprocessing.active_children()]
            subprocess.run(["kill", f"-{int(number)}", *map(str, [*workers, os.getpid()])])
            time.sleep(0.3)

    # The step is finished and saved.
    before_step(interrupt)
    flags = [*QUICK, "--steps", 6, "--out", tmp_path, "--workers", 1]
    assert run(train, *flags) == 130
    printed = capfd.readouterr()
    assert "settings: " in printed.out and ", seed 0, " in printed.out
    assert "stopped after step 3; the same command with --resume continues" in printed.out
    assert "Traceback" not in printed.err
    assert saved(tmp_path)["step"] == 3
    assert files_in(tmp_path) == {"ckpt.pt", "log.jsonl", ".lock"}

    # A kill may have left the log ahead of the checkpoint, and lines that are no records.
    ahead = json.dumps(records_of(tmp_path)[-1] | {"step": 5})
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write(f'{ahead}\n{{"step": 3, "loss": 9}}\n{{"step": 3')
    before_step(lambda step, given: None)
    assert run(train, *flags, "--resume") == 0
    assert "settings: " not in capfd.readouterr().out

    # Weights, EMA, AdamW's moments and the log are those of the run that never stopped.
    found = saved(tmp_path)
    whole = saved(trained)
    for part in ("model", "ema"):
        assert all(torch.equal(found[part][key], value) for key, value in whole[part].items())
    for key, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(found["optimizer"]["state"][key][k], state[k]) for k in state)
    records = records_of(tmp_path)
    assert [record["step"] for record in records] == [2, 3, 4, 6]
    for key in ("held_out_loss", "grad_norm"):
        assert records[-1][key] == records_of(trained)[-1][key]


def test_a_resumed_run_must_be_the_run_that_was_started(trained, tmp_path, monkeypatch):
    # What a run is, as its checkpoint records it; any change is refused by name.
    path = trained / "ckpt.pt"
    about = saved(trained)
    for key in ("model", "ema", "optimizer", "scaler"):
        del about[key]
    recorded = "image_size channels held_out batch_size lr warmup p_s class_dropout flip seed"
    for key in f"{recorded} precision ema_decay init".split():
        assert key in about
        words = f"--{key.replace('_', '-')} was .*, now other; repeat the flags"
        with pytest.raises(model.UserError, match=words):
            train.resume(path, {}, about | {key: "other"})
    for key in ("classes", "fingerprint"):
        with pytest.raises(model.UserError, match="are not those it was trained on"):
            train.resume(path, {}, about | {key: "other"})
    with pytest.raises(model.UserError, match="--d was 128, now 256"):
        train.resume(path, {}, about | {"config": about["config"] | {"d": 256}})

    # A checkpoint whose parts do not fit the run is refused as well.
    found = saved(trained)
    found["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    del found["scaler"]
    torch.save(found, tmp_path / "ckpt.pt")
    dod = DoD(Config(**about["config"]))
    optimizer = torch.optim.AdamW(dod.parameters())
    for key, part in (("optimizer", optimizer), ("scaler", torch.amp.GradScaler("cpu"))):
        with pytest.raises(model.UserError, match=f"{key} is damaged"):
            train.resume(tmp_path / "ckpt.pt", {key: part}, about)

    # The data may have moved, and another default guidance concerns sampling only.
    moved = about | {"data": "elsewhere", "config": about["config"] | {"cfg": 7.0}}
    assert train.resume(path, {"optimizer": optimizer}, moved) == 6
    assert about["precision"] == "fp32"  # what "auto" has become, not "auto"

    # Two machines whose --out is not shared. The other rank's part of the reduction is its step.
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    for file, other in ((path, 0), (path, 9), (tmp_path / "none", 6)):
        theirs = torch.tensor([other, -other])
        larger = lambda mine, how, theirs=theirs: mine.copy_(torch.maximum(mine, theirs))  # noqa: E731
        monkeypatch.setattr(train.dist, "all_reduce", larger)
        with pytest.raises(model.UserError, match=f"not all ranks see the same {file}"):
            train.resume(file, {"model": DoD(TINY)}, about)


def test_ranks_agree_on_a_signal_at_every_tenth_step(monkeypatch):
    # Alone, a run stops at once.
    cpu = torch.device("cpu")
    assert train.agree_to_stop(7, [15], cpu) and not train.agree_to_stop(7, [], cpu)

    # With other ranks, it is enough that one of them has caught a signal.
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    for others in (0, 1):
        monkeypatch.setattr(train.dist, "all_reduce", lambda count, n=others: count.add_(n))
        assert train.agree_to_stop(10, [], cpu) == (others > 0)
        assert train.agree_to_stop(20, [15], cpu) and not train.agree_to_stop(7, [15], cpu)


@pytest.mark.parametrize("p_s", [0.25, 0.75])
def test_two_ranks_or_micro_batches_train_as_one_process_does(p_s, no_pictures, tmp_path):
    # Of the micro-batches of 2, one keeps every prior at p_s = 0.25, and two keep none at 0.75.
    flags = [*QUICK, "--p-s", p_s, "--log-every", 4, "--seed", 5]
    assert run(train, *flags, "--steps", 4, "--out", tmp_path / "one") == 0
    accum = ["--steps", 4, "--grad-accum", 4, "--out", tmp_path / "accum"]
    assert run(train, *flags, *accum) == 0

    # Two ranks start by themselves, or take over what one process has begun.
    ranks = ["--steps", 4, "--grad-accum", 2, "--out", tmp_path / "two"]
    if p_s == 0.25:
        assert run(train, *flags, "--steps", 2, "--out", tmp_path / "two") == 0
        ranks.append("--resume")
    ended = torchrun(2, "train.py", *flags, *ranks)
    assert ended.returncode == 0, ended.stderr

    # AdamW moves a weight by up to 7e-5 in these steps; the differences are those of rounding.
    one = saved(tmp_path / "one")
    for other in (saved(tmp_path / "accum"), saved(tmp_path / "two")):
        for part in ("model", "ema"):
            for key, weights in one[part].items():
                assert torch.allclose(other[part][key], weights, atol=5e-7), key
    record = records_of(tmp_path / "two")[-1]
    for key in ("loss", "loss_by_time", "grad_norm", "held_out_loss"):
        if p_s == 0.75 or key == "held_out_loss":
            assert record[key] == pytest.approx(records_of(tmp_path / "one")[-1][key], rel=1e-4)
    assert files_in(tmp_path / "two") == {*train.WRITTEN, ".lock"}


def test_a_rank_that_fails_ends_all_and_its_message_comes_first(tmp_path):
    # One of four pictures is damaged: in each epoch, one of the two ranks meets it.
    for file in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / file)
    (tmp_path / "b/2.png").write_bytes(b"no picture")
    flags = ["--data", tmp_path, "--image-size", 8, "--held-out", 0, "--device", "cpu"]
    flags += ["--batch-size", 2, "--steps", 50, "--out", tmp_path.with_name("out")]
    ended = torchrun(2, "train.py", *flags)

    # Both have ended, and the first line of error is that of the rank that met it.
    assert ended.returncode
    first = next(line for line in ended.stderr.splitlines() if "train.py: error: " in line)
    assert "b/2.png is not a readable picture" in first
    assert 'train.py", line' not in ended.stderr  # no traceback of ours; torchrun shows its own


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_stops_all_ranks_soon_and_saves(number, tmp_path):
    # A run that would not end, save or log by itself.
    flags = [*QUICK, "--steps", 10**6, "--workers", 1, "--log-every", 10**6]
    flags += ["--save-every", 10**6, "--out", tmp_path / "a"]
    err = tmp_path / "err"
    with err.open("wb") as file, start(2, "train.py", *flags, stdout=file, stderr=file) as process:
        # Until the progress bar has left zero.
        while process.poll() is None and not re.search(r" [1-9]\d*/", err.read_text()):
            time.sleep(0.1)
        began = time.time()
        process.send_signal(number)
        process.wait()

    # It has saved the step that it says it has finished.
    assert time.time() - began < 25  # torchrun would kill the ranks after 30 s
    step = saved(tmp_path / "a")["step"]
    printed, words, _ = err.read_text().partition(f"stopped after step {step};")
    assert words and step % 10 == 0
    assert "Traceback" not in printed  # torchrun's own comes afterwards


def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bytes(no_pictures, tmp_path):
    kills = int(os.environ.get("DOD_KILLS", 2))
    flags = [*QUICK, "--steps", 12, "--save-every", 1]
    assert run(train, *flags, "--out", tmp_path / "whole") == 0
    out = tmp_path / "killed"
    log = out / "log.jsonl"
    command = [sys.executable, HERE / "train.py", *map(str, flags), "--out", out, "--resume"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    moments = np.random.default_rng()
    steps = []
    for kill in range(kills):
        # The first kill is one of the earliest possible: the log has just appeared.
        before = 0
        delay = 0.0
        if kill:
            before = log.stat().st_mtime_ns
            delay = moments.uniform(0, 1)
        with subprocess.Popen(command, **quiet) as process:
            # Until it is about to train: then the log is written anew.
            while not log.exists() or log.stat().st_mtime_ns == before:
                assert process.poll() is None
                time.sleep(0.001)
            time.sleep(delay)
            process.kill()
        if (out / "ckpt.pt").exists():
            steps.append(saved(out)["step"])  # always whole
    assert run(train, *flags, "--out", out, "--resume") == 0

    # Weights, EMA and AdamW's moments, byte for byte; nothing else is left.
    contents = []
    for folder in (tmp_path / "whole", out):
        with zipfile.ZipFile(folder / "ckpt.pt") as file:
            names = [name for name in file.namelist() if "/data/" in name]
            contents.append({name: file.read(name) for name in names})
    whole, killed = contents
    print(f"{kills} kills, checkpoints found at steps {steps}; same bytes: {whole == killed}")
    assert whole == killed and len(whole) > 300
    assert files_in(out) == {*train.WRITTEN, ".lock"}


# --------------------------------------------------------------- training: what a run leaves behind


def test_a_run_leaves_checkpoint_log_pictures_and_the_held_out_loss(trained):
    # Samples: ten classes across, a row for each of four pictures in the real block and 3 stages.
    assert files_in(trained) == {*train.WRITTEN, ".lock"}
    with Image.open(trained / "samples.png") as picture:
        assert picture.width > 10 * 64 and picture.height > 4 * 4 * 64
    records = records_of(trained)
    assert [record["step"] for record in records] == [2, 4, 6]
    assert records[0]["images_per_s"] > 0 and 0 <= records[0]["waiting_for_data"] <= 1

    # With a checkpoint comes the loss of its EMA on held-out pictures, at fixed noise and times.
    assert ["held_out_loss" in record for record in records] == [False, False, True]
    ema = sample.load_model(saved(trained))
    _, held_out, _ = train.load_data("digits", 8, 1, 0.1)
    given = Namespace(device="cpu", seed=0, p_s=0.5)
    parts = train.held_out_batch(held_out, sample.Codec(), given, ema.config)
    assert records[-1]["held_out_loss"] == pytest.approx(train.held_out_loss(ema, parts))

    # It is Eq. 3 with class and prior; seen with weights that make use of both.
    dod = awake(ema.config)
    x1, _, t, _ = train.draw_noise(0, 0, 180, ema.config, 0, torch.Generator())
    images = torch.stack([held_out[i, False][0] for i in range(180)])
    keep = torch.tensor(flow.keeps_prior(180, 0.5)).nonzero().squeeze(1)
    y = torch.tensor(held_out.labels)
    losses = flow.rectified_flow_loss(dod, images / 127.5 - 1, y, x1, t, keep)
    assert train.held_out_loss(dod, parts) == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_log_averages_over_its_steps_and_stops_at_the_first_one_that_is_not_finite():
    # Two steps of two images, one image in each quarter of the times.
    t = torch.tensor([0.1, 0.6])
    one = torch.tensor(1.0)
    pending = [
        (7, t, torch.tensor([1.0, 2.0]), one),
        (8, t + 0.3, torch.tensor([4.0, 5.0]), 2 * one),
    ]
    record = train.summarise(pending, overflow_is_fine=False)
    assert record == {"step": 8, "loss": 3, "loss_by_time": [1, 4, 2, 5], "grad_norm": 1.5}
    record = train.summarise(pending[:1], overflow_is_fine=False)
    assert record["loss"] == 1.5 and record["loss_by_time"] == [1, None, 2, None]

    # A gradient that is not finite stops the run, but for fp16, whose scaler has skipped that step.
    pending.append((9, t, torch.ones(2), torch.tensor(math.inf)))
    with pytest.raises(FloatingPointError, match="step 9"):
        train.summarise(pending, overflow_is_fine=False)
    assert train.summarise(pending, overflow_is_fine=True)["grad_norm"] == 1.5
    pending.append((10, t, torch.tensor([1, math.nan]), one))
    with pytest.raises(FloatingPointError, match="step 10"):
        train.summarise(pending, overflow_is_fine=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, before_step, capfd
):
    # The data of step 7 are not numbers; the log looks at it in step 8.
    def poison(step, given):
        if step == 7:
            given.batch[0] = given.batch[0] * math.nan

    before_step(poison)
    flags = ["--steps", 9, "--save-every", 4, "--log-every", 4, "--out", tmp_path]
    assert run(train, *QUICK, *flags) == 2
    error = error_of(capfd)
    assert "the loss of step 7 (or its gradient) is not finite" in error
    assert f"the last good checkpoint is {tmp_path}/ckpt.pt" in error
    assert saved(tmp_path)["step"] == 4


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    parts = {"model": DoD(TINY)}
    train.save_checkpoint(path, parts, {}, 1)
    good = path.read_bytes()

    # The system lets no file grow beyond a limit: writing fails at once, or near the end.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (9999, len(good) - 9999):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(model.UserError, match="cannot write .*; what was there is kept"):
                train.save_checkpoint(path, parts, {}, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]


def test_an_old_run_stays_unless_overwritten_and_then_goes_first(
    trained, tmp_path, before_step, capfd
):
    # Neither flag, both flags, or a milestone without ckpt.pt: nothing is touched.
    shutil.copytree(trained, tmp_path / "a")
    old = [*QUICK, "--steps", 6, "--out", tmp_path / "a"]
    assert run(train, *old) == 2
    assert "ckpt.pt exists; --resume continues a run" in error_of(capfd)
    assert run(train, *old, "--resume", "--overwrite") == 2
    assert "--resume excludes --overwrite" in error_of(capfd)
    assert (tmp_path / "a/ckpt.pt").read_bytes() == (trained / "ckpt.pt").read_bytes()
    (tmp_path / "b").mkdir()
    shutil.copy(trained / "ckpt.pt", tmp_path / "b/ckpt-0000006.pt")
    other = [*QUICK, "--steps", 1, "--out", tmp_path / "b"]
    assert run(train, *other, "--resume") == 2
    assert "copy a milestone there" in error_of(capfd)

    # Another program's file of that name stays.
    torch.save({"weights": torch.ones(3)}, tmp_path / "b/ckpt.pt")
    foreign = (tmp_path / "b/ckpt.pt").read_bytes()
    assert run(train, *other, "--overwrite") == 2
    assert "is not a checkpoint of this train.py" in error_of(capfd)
    assert (tmp_path / "b/ckpt.pt").read_bytes() == foreign

    # With --overwrite, too, the old run goes only when no flag of the new one is wrong.
    assert run(train, *old, "--overwrite", "--grad-accum", 3) == 2
    assert "is not divisible by" in error_of(capfd)
    assert (tmp_path / "a/ckpt.pt").read_bytes() == (trained / "ckpt.pt").read_bytes()

    # Then it goes first, with its milestones: killed in its first step, the new run leaves a
    # checkpoint of its own.
    shutil.copy(trained / "ckpt.pt", tmp_path / "a/ckpt-0000006.pt")

    class Killed(BaseException):
        pass

    def kill(step, given):
        raise Killed

    before_step(kill)
    with pytest.raises(Killed):
        run(train, *old, "--overwrite")
    assert saved(tmp_path / "a")["step"] == 0
    assert records_of(tmp_path / "a") == []
    assert not (tmp_path / "a/ckpt-0000006.pt").exists()


def test_resuming_before_the_first_save_keeps_the_milestones(trained, no_pictures, tmp_path):
    # With --keep-every below --save-every, a kill can leave milestones beside the first checkpoint.
    torch.save(saved(trained) | {"step": 0}, tmp_path / "ckpt.pt")
    shutil.copy(trained / "ckpt.pt", tmp_path / "ckpt-0000009.pt")
    assert run(train, *QUICK, "--steps", 1, "--resume", "--out", tmp_path) == 0
    assert saved(tmp_path)["step"] == 1
    assert (tmp_path / "ckpt-0000009.pt").exists()


def test_the_second_of_two_runs_in_one_folder_is_refused(tmp_path, capfd):
    with sample.locked(tmp_path):
        assert run(train, *QUICK, "--steps", 1, "--out", tmp_path) == 2
    assert f"{tmp_path} is in use by another command" in error_of(capfd)
    assert files_in(tmp_path) == {".lock"}


def test_a_killed_worker_of_the_loader_ends_the_run_in_one_line(tmp_path, before_step, capfd):
    # As the system does when memory runs out. Torch may notice in the middle of a step.
    def kill(step, given):
        for worker in multiprocessing.active_children():
            worker.kill()

    before_step(kill)
    assert run(train, *QUICK, "--steps", 99, "--workers", 1, "--out", tmp_path) == 2
    error = error_of(capfd)
    assert "DataLoader worker" in error and "is there enough memory?" in error


def test_tensorboard_is_behind_a_flag_and_optional(no_pictures, tmp_path, monkeypatch, capfd):
    # Without the package, a line says what to install.
    flags = [*QUICK, "--steps", 4, "--tensorboard"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert run(train, *flags, "--out", tmp_path / "a") == 2
    assert "pip install tensorboard" in error_of(capfd)

    # With it, the board shows what the log holds.
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(train, *flags, "--out", tmp_path / "b") == 0
    board = reader.EventAccumulator(str(tmp_path / "b/tensorboard")).Reload()
    found = [(scalar.step, scalar.value) for scalar in board.Scalars("loss")]
    records = records_of(tmp_path / "b")
    assert found == [(record["step"], pytest.approx(record["loss"])) for record in records]


def test_milestones_grids_on_the_way_and_fine_tuning_from_another_run(
    trained, no_pictures, tmp_path, capsys
):
    # Milestones are checkpoints of their own.
    flags = [*QUICK, "--steps", 5, "--keep-every", 2, "--sample-every", 4]
    assert run(train, *flags, "--out", tmp_path / "a") == 0
    others = {"ckpt-0000002.pt", "ckpt-0000004.pt", "samples-0000004.png", ".lock"}
    assert files_in(tmp_path / "a") == {*train.WRITTEN} | others
    assert sample.load_checkpoint(tmp_path / "a/ckpt-0000002.pt")["step"] == 2

    # 12 x 12 pictures of three other classes: all but the class table fits. At rate 0 it stays so.
    for k in range(30):
        (tmp_path / f"data/{k % 3}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 12), 9 * k).save(tmp_path / f"data/{k % 3}/{k}.png")
    flags = ["--data", tmp_path / "data", "--image-size", 12, "--channels", 1, "--patch-size", 2]
    flags += ["--batch-size", 2, "--lr", 0, "--device", "cpu", "--out", tmp_path / "b"]
    flags += ["--init", trained / "ckpt.pt"]
    capsys.readouterr()
    assert run(train, *flags, "--steps", 1) == 0
    assert "fresh weights: label.weight\n" in capsys.readouterr().out
    after = saved(tmp_path / "b")["model"]
    for key, weights in saved(trained)["ema"].items():
        assert key == "label.weight" or torch.equal(after[key], weights)

    # Resumed, the run goes on from its own weights.
    assert run(train, *flags, "--resume", "--steps", 2) == 0
    assert torch.equal(saved(tmp_path / "b")["model"]["label.weight"], after["label.weight"])


def test_prior_from_patches_and_the_plain_backbone_train_without_lem(no_pictures, tmp_path, capfd):
    # S is there, LEM is not, and the ablation is a run of its own.
    flags = [*QUICK, "--steps", 1, "--out", tmp_path / "patches"]
    assert run(train, *flags, "--prior-from", "patches") == 0
    found = saved(tmp_path / "patches")["model"]
    assert "S" in found and not any("encoder" in key for key in found)
    assert run(train, *flags, "--resume") == 2
    assert "--prior-from was patches, now lem" in error_of(capfd)

    # FiTv2: nobody has a prior.
    assert run(train, *QUICK, "--steps", 1, "--model", "FiTv2-Ti", "--out", tmp_path / "plain") == 0
    found = saved(tmp_path / "plain")
    assert found["p_s"] == 1 and "S" not in found["model"]


# ----------------------------------------------------------------------- training: data and latents


def test_letters_are_a_function_of_their_number_and_held_out_ones_are_others():
    # A letter is training or held out, and drawn alike by anybody who asks for it.
    pictures, held_out, _ = train.load_data("letters", 16, 1, 0.1)
    again, _, _ = train.load_data("letters", 16, 1, 0.1)
    assert len(held_out) == 2_500
    assert sorted([*pictures.rows, *held_out.rows]) == list(range(25_000))
    images = torch.stack([pictures[i, False][0] for i in range(60)])
    assert torch.equal(images, torch.stack([again[i, False][0] for i in range(60)]))
    assert images.shape == (60, 1, 16, 16) and len(images.unique(dim=0)) == 60

    # The class is the letter, and a flipped picture its mirror image.
    assert pictures.classes == list("ABCDEFGHIJ")
    for i, number in enumerate(pictures.rows[:60]):
        image, k = pictures[i, True]
        assert k == number % 10
        assert np.array_equal(image[0].flip(-1), train.draw_letter(number, 16, 1))

    # Grey by default, coloured with --channels 3; ink and paper differ by a third of the scale.
    assert train.parse([]).data == "letters" and train.parse([]).channels == 1
    coloured = np.stack([train.draw_letter(i, 32, 3) for i in range(40)])
    assert coloured.shape == (40, 32, 32, 3) and np.ptp(coloured, axis=3).mean() > 30
    for contrast in (coloured @ train.LUMINANCE, images.squeeze().numpy()):
        assert np.ptp(contrast, axis=(1, 2)).min() > 80


def test_digits_are_the_scans_of_scikit_learn_in_their_classes():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    # No two scans are the same, so a scan tells its class.
    truth = {}
    for scan, k in zip(digits.images, digits.target, strict=True):
        truth[np.uint8(scan * 255 / 16).tobytes()] = k
    pictures, held_out, _ = train.load_data("digits", 8, 1, 0.2)
    assert len(pictures) == 1438 and len(held_out) == 359
    for part in (pictures, held_out):
        for image, k in (part[i, False] for i in range(len(part))):
            assert truth[image.numpy().tobytes()] == k


def odd_pictures(folder: Path) -> None:
    """Two classes of grey, palette, CMYK, RGBA, 1-pixel, 16-bit and EXIF-rotated pictures."""
    # fmt: off
    modes = {
        "a/grey.png": ("L", 40, 9), "a/palette.PNG": ("P", 9, 30), "b/dot.bmp": ("RGB", 1, 1),
        "a/deep grey.png": ("I;16", 12, 20), "b/deep/cmyk.JPEG": ("CMYK", 64, 64),
        "b/alpha.webp": ("RGBA", 5, 7), "b/.hidden/x.png": ("L", 9, 9), ".c/x.png": ("L", 9, 9),
    }
    # fmt: on
    for file, (mode, *size) in modes.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size).save(folder / file)

    # The left half is black; EXIF says that the picture is to be shown turned by 90 degrees.
    turned = Image.new("RGB", (8, 4), "white")
    turned.paste("black", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "a/turned.png", exif=exif)


def test_folders_of_odd_pictures_are_read_and_the_rest_is_named(tmp_path, capfd):
    # Two classes; pictures that move are left out and named, hidden files and folders are not read.
    odd_pictures(tmp_path)
    for k in range(2):
        Image.new("L", (9, 9)).save(tmp_path / f"a/moving {k}.gif")
    (tmp_path / "b/._dot.bmp").write_bytes(b"a hidden file")
    pictures, _, fingerprint = train.load_data(str(tmp_path), 8, 3, 0)
    assert "left out 2 .gif" in capfd.readouterr().out
    assert pictures.classes == ["a", "b"] and sorted(pictures.labels) == [0] * 4 + [1] * 3
    assert {pictures[i, False][0].shape for i in range(7)} == {(3, 8, 8)}
    image = sample.fit_picture(sample.open_picture(tmp_path / "a/turned.png"), 4, 1)
    assert image[0, 0].max() < 99 and image[0, -1].min() > 150  # black is on top now

    # The fingerprint tells other content, even of the same size and name.
    Image.new("RGB", (1, 1), "white").save(tmp_path / "b/dot.bmp")
    assert train.load_data(str(tmp_path), 8, 3, 0)[2] != fingerprint

    # A class without pictures is a mistake.
    (tmp_path / "empty").mkdir()
    with pytest.raises(model.UserError, match="there are no pictures in .*/empty; pictures end in"):
        train.load_data(str(tmp_path), 8, 3, 0)


def test_one_folder_is_one_class_trained_and_guided_without_it(tmp_path, before_step):
    # Nine pictures, no folders among them.
    (tmp_path / "faces").mkdir()
    for k in range(9):
        Image.new("L", (9, 9), 25 * k).save(tmp_path / f"faces/{k}.png")
    classes = []
    before_step(lambda step, given: classes.extend(given.batch[3].tolist()))
    flags = ["--data", tmp_path / "faces", "--image-size", 8, "--batch-size", 8, "--steps", 4]
    assert run(train, *flags, "--device", "cpu", "--out", tmp_path / "out") == 0
    assert classes == [0] * 32  # never the null class
    found = saved(tmp_path / "out")
    assert len(found["classes"]) == 1 and found["class_dropout"] == 0

    # What guides is the prior alone. The null class, which nobody has trained, has no part in it.
    dod = awake(Config(**found["config"]))
    settings = dict(y=torch.zeros(3, dtype=torch.long), solver="euler", steps=2)
    guided = sample.generate(dod, cfg=3.0, **settings)[1]
    assert not close(guided, sample.generate(dod, cfg=1.0, **settings)[1])
    dod.label.weight.data[dod.null_class] = 99.0
    assert torch.equal(guided, sample.generate(dod, cfg=3.0, **settings)[1])
    flags = ["--ckpt", tmp_path / "out/ckpt.pt", "--solver", "euler", "--steps", 2]
    assert run(sample, *flags, "--device", "cpu", "--out", tmp_path / "more.png") == 0


def test_cached_latents_are_both_flips_posteriors_and_train_as_encoding_does(
    vae, tmp_path, before_step, no_pictures, monkeypatch, capfd
):
    # The same run twice, without and with --cache.
    odd_pictures(tmp_path / "data")
    monkeypatch.setattr(train.Latents, "SHARD", 4)
    latents = []
    before_step(lambda step, given: latents.append(given.batch[0]))
    cache = tmp_path / "cache"
    flags = ["--data", tmp_path / "data", "--vae", vae / "kl", "--image-size", 16, "--steps", 3]
    flags += ["--batch-size", 4, "--log-every", 1, "--held-out", 0, "--device", "cpu"]
    assert run(train, *flags, "--out", tmp_path / "a") == 0
    assert "standard deviation" in capfd.readouterr().err  # random weights: latents far from 1
    cached = [*flags, "--cache", cache]
    assert run(train, *cached, "--out", tmp_path / "b", "--workers", 1) == 0
    assert "encoding 2 of 2 shards" in capfd.readouterr().out

    # The same latents, flipped and drawn from the posterior alike, up to the rounding to fp16.
    for encoded, stored in zip(latents[:3], latents[3:], strict=True):
        assert encoded.shape == (4, 4, 8, 8) and close(encoded, stored, 0.02)

    # A shard holds mean and standard deviation of each picture and of its mirror image.
    codec = sample.load_codec(str(vae / "kl"))
    pictures, _, _ = train.load_data(str(tmp_path / "data"), 16, 3, 0)
    images = torch.stack([pictures[i, False][0] for i in range(7)])
    shards = sorted(cache.glob("*.npy"))
    stored = torch.from_numpy(np.concatenate([np.load(shard) for shard in shards])).float()
    for flip, views in enumerate((images, images.flip(-1))):
        for k, moment in enumerate(codec.moments(views)):
            assert close(stored[:, flip, k], moment, 1e-2)

    # The cache is opened again, wherever the VAE is now, and refused for any other latents.
    stamp = shards[0].stat().st_mtime_ns
    shutil.copytree(vae / "kl", tmp_path / "moved")
    assert run(train, *cached, "--vae", tmp_path / "moved", "--out", tmp_path / "c") == 0
    assert shards[0].stat().st_mtime_ns == stamp
    with torch.no_grad():
        codec.vae.encoder.conv_in.weight += 1
    codec.vae.save_pretrained(tmp_path / "other")
    shutil.copytree(tmp_path / "data", tmp_path / "data 2")
    Image.new("L", (40, 9), 99).save(tmp_path / "data 2/a/grey.png")
    capfd.readouterr()
    for words, changed in (
        ("no meta.json of ours", ["--cache", tmp_path / "data"]),
        ("another vae", ["--vae", tmp_path / "other"]),
        ("another image_size", ["--image-size", 32]),
        ("another count", ["--held-out", 0.3]),
        ("another fingerprint", ["--data", tmp_path / "data 2"]),
    ):
        assert run(train, *cached, *changed, "--out", tmp_path / "d") == 2
        assert words in error_of(capfd)


def test_a_cache_is_encoded_by_all_ranks_and_only_where_shards_are_missing(
    vae, tmp_path, monkeypatch
):
    # 150 letters in three shards, and a count of what is encoded.
    monkeypatch.setattr(train.Latents, "SHARD", 64)
    pictures, _, fingerprint = train.load_data("letters", 16, 3, 0)
    pictures.rows = pictures.rows[:150]
    pictures.labels = pictures.labels[:150]
    codec = sample.load_codec(str(vae / "kl"))
    encoded = []
    moments = codec.moments
    monkeypatch.setattr(codec, "moments", lambda x: encoded.append(len(x)) or moments(x))
    rest = (pictures, fingerprint, codec, 0)
    whole = train.open_cache(tmp_path / "whole", *rest)

    # The second of two ranks encodes the second shard alone; the first one is the other rank's.
    shared = tmp_path / "shared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "processes", lambda: (1, 2))
        with pytest.raises(model.UserError, match="00000.npy"):
            train.open_cache(shared, *rest)
    assert files_in(shared) == {"00001.npy", ".lock"}

    # Later, only what is missing is encoded: two shards, each picture and its mirror image.
    shutil.copy(tmp_path / "whole/meta.json", shared)
    encoded.clear()
    latents = train.open_cache(shared, *rest)
    assert encoded == [64, 64, 22, 22]
    assert files_in(shared) == {"00000.npy", "00001.npy", "00002.npy", "meta.json", ".lock"}

    # Both caches hold the same; a loader's worker gets the names of the shards, not their content.
    assert len(latents) == 150 and len(pickle.dumps(latents)) < 9999
    for item in itertools.product((0, 63, 64, 149), (False, True)):
        image, k = pictures[item]
        stored, label = latents[item]
        assert label == k and torch.equal(stored, whole[item][0])
        assert close(stored, torch.cat(moments(image[None])), 1e-2)

    # Shards of another shape or type, or cut off, are refused by name.
    shard = shared / "00002.npy"
    good = np.load(shard)
    for wrong in (good[:21], good.astype(np.float32)):
        train.open_shard.cache_clear()
        np.save(shard, wrong)
        with pytest.raises(model.UserError, match="00002.npy holds .*, not .*; remove it"):
            train.open_cache(shared, *rest)
    train.open_shard.cache_clear()
    shard.write_bytes((tmp_path / "whole/00002.npy").read_bytes()[:999])
    with pytest.raises(model.UserError, match="00002.npy is damaged"):
        train.open_cache(shared, *rest)


# ------------------------------------------------------------------ multi-stage sampling: Fig. 3a


def test_noise_is_normal_and_a_function_of_seed_number_and_stage():
    # Mean 0, standard deviation 1: of 10,000 numbers, within three standard errors.
    z = sample.noise((50, 50), 1, range(4), 0)
    assert abs(z.mean()) < 0.03
    assert abs(z.std() - 1) < 0.03

    # It does not depend on the other images, and is another one for another number, seed or stage.
    assert torch.equal(z[2:3], sample.noise((50, 50), 1, range(2, 3), 0))
    assert not close(z[0], z[1], 0.5)
    for seed, stage in ((2, 0), (1, 1)):
        assert not close(z, sample.noise((50, 50), seed, range(4), stage), 0.5)


def test_fig3a_each_stage_is_guided_by_the_stage_before():
    # A model that takes notes of its evaluations, and of what LEM is given and when.
    dod = awake()
    y = torch.tensor([1, 4])
    priors = []
    calls = []
    forward = dod.forward
    visual_prior = dod.visual_prior

    def recording_forward(x, t, y, e_s=None):
        calls.append((y, e_s))
        return forward(x, t, y, e_s)

    def recording_visual_prior(z):
        priors.append((len(calls), z))
        return visual_prior(z)

    dod.forward = recording_forward
    dod.visual_prior = recording_visual_prior
    nfe = []
    z = sample.generate(dod, y, 3, [1.0, 2.0, 2.0], solver="euler", steps=2, nfe=nfe)

    # LEM runs once a stage, on the samples of the stage before: after 2 evaluations in stage 1,
    # which is unguided, and after 2 x 2 more in stage 2.
    assert [at for at, _ in priors] == [2, 6]
    assert torch.equal(priors[0][1], z[0])
    assert torch.equal(priors[1][1], z[1])
    assert [stage.tolist() for stage in nfe] == [[[2, 0]] * 2, [[2, 2]] * 2, [[2, 2]] * 2]

    # Stage 1 sees the class and S. In stage 2 the conditional branch sees class and prior, the
    # unconditional one neither.
    e_1 = calls[0][1]
    y_c, e_c = calls[2]
    y_u, e_u = calls[3]
    assert e_1 is None and e_u is None
    assert torch.equal(y_c, y) and torch.equal(e_c, visual_prior(z[0]))
    assert y_u.tolist() == [dod.null_class] * 2

    # Without a prior there is only the class to drop, even if the prior alone should be.
    calls.clear()
    sample.generate(dod, y, 1, [2.0], "prior", solver="euler", steps=1)
    assert calls[1][0].tolist() == [dod.null_class] * 2


def test_section_3_3_stage_1_is_unguided_and_the_later_stages_have_the_model_s_scale(monkeypatch):
    # Only the guidance scale and the noise of each stage matter here; nothing is sampled.
    seen = []

    def recorded(dod, z1, y, e_s, w, *rest):
        seen.append((w, z1))
        return z1, y, y

    # The model's own scale; another one with a prior from outside, for stage 1, too.
    monkeypatch.setattr(sample, "sample_stage", recorded)
    y = torch.tensor([0, 1])
    sample.generate(awake(), y, 3)
    sample.generate(awake(), y, 3, 4.0, prior=torch.zeros(2, 3, 8, 8))
    assert [w for w, _ in seen] == [1, 5.5, 5.5, 4, 4, 4]

    # Each stage has fresh noise, of the image's number, and a scale of its own, at least 1.
    assert torch.equal(seen[1][1], sample.noise((3, 8, 8), 0, range(2), 1))
    for wrong in ([1.0, 0.5], [1.0, 2.0, 3.0]):
        with pytest.raises(UserError, match="each stage needs"):
            sample.generate(awake(), y, 2, wrong)


@torch.no_grad()
def test_guidance_acts_on_the_chosen_channels_inside_the_interval_and_costs_nothing_outside():
    # One stage of two images, whose classes and priors differ.
    dod = awake()
    z1 = sample.noise((3, 8, 8), 0, range(2), 0)
    y = torch.tensor([0, 3])
    e_s = dod.visual_prior(z1.flip(0))
    go = partial(sample.sample_stage, dod, z1, y, e_s, solver="euler")

    # Two Euler steps, at t = 1 and 0.5. Only the first is guided, in its first two channels.
    z0, nfe, guided = go(3.0, "prior", 2, (0.6, 1.0), steps=2)
    v_c = dod(z1, torch.ones(2), y, e_s)
    v_u = dod(z1, torch.ones(2), y)
    v = torch.cat([v_u + 3 * (v_c - v_u), v_c], dim=1)[:, [0, 1, 5]]
    half = z1 - v / 2
    assert close(z0, half - dod(half, torch.full((2,), 0.5), y, e_s) / 2)
    assert nfe.tolist() == [2, 2] and guided.tolist() == [1, 1]

    # Four steps, at t = 1, 0.75, 0.5 and 0.25: borders belong to the interval.
    assert go(3.0, interval=(0.5, 0.75), steps=4)[2].tolist() == [2, 2]
    outside, _, guided = go(3.0, interval=(0.3, 0.4), steps=4)
    unguided, _, _ = go(1.0, steps=4)
    assert guided.tolist() == [0, 0] and torch.equal(outside, unguided)


def test_models_of_one_class_or_without_lem_refuse_what_they_cannot_do():
    # With one class, guidance drops the prior alone; stage 1 has nothing to be guided by.
    y = torch.zeros(2, dtype=torch.long)
    go = partial(sample.generate, awake(replace(TINY, num_classes=1)), y, solver="euler", steps=2)
    assert torch.equal(go(2, 3.0, "both")[1], go(2, 3.0, "prior")[1])
    with pytest.raises(UserError, match="one class only"):
        go(1, [2.0])

    # A plain FiTv2 has stage 1 only.
    with pytest.raises(UserError, match="stage 1 only"):
        sample.generate(awake(replace(TINY, N=0)), y, 2)


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_an_image_does_not_depend_on_its_batch_and_must_be_finite(solver, monkeypatch):
    # In double precision: in single, rounding may tip RK45 into other steps.
    noise = sample.noise
    monkeypatch.setattr(sample, "noise", lambda *key: noise(*key).double())
    dod = awake().double()

    # Guided inside an interval, so that an evaluation deals with each image in its own way.
    y = torch.arange(5)
    go = partial(sample.generate, dod, stages=2, solver=solver, steps=4, seed=3)
    go = partial(go, guide_on="prior", cfg_interval=(0.2, 0.7))

    # All at once, and the last three in batches of two: the same images at the same cost.
    costs = [[], []]
    together = go(y, nfe=costs[0])
    last = go(y[2:], nfe=costs[1], start=2, batch_size=2)
    for stage in (0, 1):
        assert close(together[stage][2:], last[stage], 1e-6)
        assert torch.equal(costs[0][stage][2:], costs[1][stage])

    # RK45 notices by itself; Euler's result is looked at after the last stage.
    dod.final.linear.bias.data[0] = float("inf")
    with pytest.raises(FloatingPointError, match="not finite"):
        go(y)


# ----------------------------------------------------------------- grids, pictures and latents


def test_figs_1_and_5_a_grid_has_a_block_a_stage_and_a_column_a_class():
    # Constant pictures of 8 x 8 pixels: two rows of two in the first block, one in the second.
    greys = torch.tensor([10, 20, 30, 40], dtype=torch.uint8)
    first = greys.reshape(4, 1, 1, 1).repeat(1, 1, 8, 8)
    first[0, 0, 0, 0] = 255
    second = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    grid = sample.draw_grid([("stage 1", first), ("stage 2", second)], ["A", "too long" * 9])

    # Cells of 64 + 4 pixels begin at the right border, less two columns, and 36 pixels below the
    # top; 12 pixels lie between the blocks.
    left = grid.width - 2 * 68
    assert grid.height == 36 + 3 * 68 + 2 * 12
    for x, y, grey in ((63, 99, 10), (131, 99, 20), (32, 136, 30), (0, 184, 200), (0, 183, 255)):
        assert grid.getpixel((left + x, y)) == (grey, grey, grey)

    # Without smoothing, a white pixel becomes 8 x 8 pixels.
    assert (np.asarray(grid.crop((left, 36, left + 64, 100))) == 255).sum() == 3 * 8 * 8


def test_pictures_are_halved_and_resized_as_adm_does(tmp_path, monkeypatch):
    # For square pictures, against ADM's own recipe (guided-diffusion's center_crop_arr).
    pixels = np.random.default_rng(0).integers(0, 256, (70, 70, 3), np.uint8)
    picture = Image.fromarray(pixels)
    expected = np.array(picture.resize((35, 35), Image.BOX).resize((18, 18), Image.BICUBIC))
    found = sample.fit_picture(picture, 18, 3)
    assert torch.equal(found, torch.from_numpy(expected).permute(2, 0, 1))

    # Of others, the square in the middle: of red, green and red only green is left, or grey if one
    # channel is wanted (green is 0.587 of white).
    stripes = Image.new("RGB", (40, 10), "red")
    stripes.paste("lime", (15, 0, 25, 10))
    for turned in (stripes, stripes.transpose(Image.ROTATE_90)):
        lime = sample.fit_picture(turned, 5, 3).flatten(1)
        assert lime.unique(dim=1).squeeze().tolist() == [0, 255, 0]
    assert sample.fit_picture(stripes, 5, 1).unique().tolist() == [150]

    # A file is turned as its EXIF data says, 6 means a quarter turn, and may have 16 bits.
    exif = Image.Exif()
    exif[0x0112] = 6
    stripes.save(tmp_path / "turned.png", exif=exif)
    assert sample.open_picture(tmp_path / "turned.png").size == (10, 40)
    Image.fromarray(np.full((6, 6), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert np.unique(sample.open_picture(tmp_path / "deep.png")).tolist() == [128]

    # A long, thin one is never made large: it is cut before it is resized.
    sizes = []
    resize = Image.Image.resize

    def recording(image, size, *rest):
        sizes.append(image.size)
        return resize(image, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", recording)
    sample.fit_picture(Image.new("L", (5000, 1)), 16, 1)
    assert sizes == [(1, 1)]


def test_pixels_survive_the_codec():
    # All 256 values; the latent is certain, so noise for its posterior changes nothing.
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    z = sample.Codec().encode(images, torch.ones(1, 1, 16, 16))
    assert z.min() == -1 and z.max() == 1
    assert torch.equal(sample.Codec().decode(z), images)
    assert sample.Codec().decode(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_section_3_3_latents_are_posterior_samples_scaled_as_the_vae_says(vae):
    # 40 pictures at once here, 32 at a time there.
    codec = sample.load_codec(str(vae / "kl"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)
    eps = torch.randn(40, 4, 8, 8, generator=generator)
    posterior = codec.vae.encode(images / 127.5 - 1).latent_dist
    expected = 3 * (posterior.mean + posterior.std * eps - 0.5)
    assert close(codec.encode(images, eps), expected, 1e-4)
    assert close(codec.encode(images), 3 * (posterior.mean - 0.5), 1e-4)

    # Decoding undoes the scale; rounding may tip a pixel to its neighbour. It is in true fp32, even
    # inside autocast: bf16 would round most pixels to another value.
    pixels = codec.vae.decode(expected / 3 + 0.5).sample
    with torch.autocast("cpu", torch.bfloat16):
        wrong = codec.decode(expected).int() - (127.5 * pixels + 128).clamp(0, 255).int()
    assert wrong.abs().max() <= 1
    assert (wrong != 0).double().mean() < 0.01

    # Two levels halve the side once. Only RGB pictures of an even side fit.
    assert codec.latent_shape(3, 16) == (4, 8)
    for channels, size in ((1, 16), (3, 17)):
        with pytest.raises(UserError, match="multiple of 2 pixels"):
            codec.latent_shape(channels, size)


def test_a_vae_that_cannot_be_loaded_or_does_not_fit_is_named_in_one_line(
    vae, tmp_path, monkeypatch, caplog
):
    # A folder whose scale is no number. The library adds no lines of its own.
    odd = shutil.copytree(vae / "kl", tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"scaling_factor": "abc"}))
    with pytest.raises(UserError, match="abc"):
        sample.load_codec(str(odd))
    assert not caplog.records

    # A VAE that moved is named by --vae; it must make the latents that the model knows.
    here = str(vae / "kl")
    known = sample.load_codec(here).fingerprint
    saved = {"codec": "gone", "channels": 3, "image_size": 16, "vae": known}
    saved["config"] = {"latent_channels": 4, "latent_size": 8}
    pixels = {"config": {"latent_channels": 3, "latent_size": 16}}
    device = torch.device("cpu")
    assert sample.codec_of(saved, here, device).name == here
    for entries, name, words in (
        (saved, None, "no such folder.*--vae says where"),
        (saved | pixels, here, "another latent space"),  # latents of another shape
        (saved | pixels, "none", "another latent space"),  # of the right shape, but from a VAE
        (saved | {"vae": "0" * 64}, here, "another latent space"),  # or from another VAE
    ):
        with pytest.raises(UserError, match=words):
            sample.codec_of(entries, name, device)

    # Without a network the answer comes at once, not after the library's many retries.
    def no_network(*args, **rest):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", None)
    with pytest.raises(UserError, match="VAE no-such/vae cannot be loaded .no route to host"):
        sample.load_codec("no-such/vae")


# ------------------------------------------------------------------------- checkpoints and sets


class Code:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("entry, change, words", [
    ("format", lambda old: "dod-1", "format is not"),
    ("fingerprint", lambda old: None, "'fingerprint' is missing"),
    ("classes", lambda old: old[:3], "class names"),
    ("config", lambda old: old | {"depth": 4.0}, "depth is 4.0"),
    ("config", lambda old: old | {"depth": 10**9}, "more layers"),
    ("config", lambda old: old | {"decoder_depth": 10**9}, "more layers"),
    ("config", lambda old: old | {"latent_size": 10**6}, ""),
    ("ema", lambda old: dict(list(old.items())[1:]), "Missing key"),
    ("ema", lambda old: old | {"more": torch.ones(3)}, "Unexpected key"),
    ("ema", lambda old: old | {"S": torch.ones(1, 1, 3)}, "size mismatch for S"),
    ("ema", lambda old: old | {"S": torch.ones(1, 1, 128).to_sparse()}, "weights"),
])  # fmt: skip
def test_a_checkpoint_is_checked_whole_before_it_is_used(entry, change, words, trained, tmp_path):
    # One thing is changed in a good checkpoint. The message names the file and that thing.
    saved = sample.load_checkpoint(trained / "ckpt.pt")
    saved[entry] = change(saved[entry])
    bad = tmp_path / "bad.pt"
    torch.save(saved, bad)
    with pytest.raises(UserError, match="bad.pt is not a checkpoint") as caught:
        sample.load_checkpoint(bad)
    assert words in str(caught.value)


def test_labels_of_a_set_are_random_by_number_or_balanced():
    assert [sample.class_of_picture(n, [3, 5], "balanced", 0) for n in range(4)] == [3, 5, 3, 5]
    chosen = [sample.class_of_picture(n, [3, 5], "random", 0) for n in range(1000)]
    assert abs(chosen.count(3) - 500) < 80
    assert chosen != [sample.class_of_picture(n, [3, 5], "random", 1) for n in range(1000)]


SET = ["--device", "cpu", "--solver", "euler", "--steps", 2, "--seed", 7, "--batch-size", 4]


def test_a_set_of_samples_is_pictures_that_depend_on_their_number_alone(trained, tmp_path):
    flags = ["--ckpt", trained / "ckpt.pt", *SET, "--number", 9]
    assert run(sample, *flags, "--npz", tmp_path / "one.npz") == 0

    # The .npz is what guided-diffusion's evaluator reads, with a note of what it was made of.
    y = [sample.class_of_picture(n, list(range(10)), "random", 7) for n in range(9)]
    with np.load(tmp_path / "one.npz") as file:
        images = file["arr_0"]
        note = json.loads(str(file["about"]))
        assert file["arr_1"].tolist() == y
    assert images.shape == (9, 8, 8, 3) and images.dtype == np.uint8
    assert (note["seed"], note["cfg"], note["labels"]) == (7, [1.0, 2.0], "random")

    # Pictures 6 to 8, drawn by hand: stage 2, in grey, under their own numbers.
    dod = sample.load_model(sample.load_checkpoint(trained / "ckpt.pt"))
    last = torch.tensor(y[6:])
    z0 = sample.generate(dod, last, 2, solver="euler", steps=2, seed=7, start=6)[-1]
    assert (sample.Codec().decode(z0)[:, 0].numpy() == images[6:, :, :, 0]).all()

    # Two ranks draw the same files: a PNG file for each picture, and the note.
    names = [f"{n:06}-{k}.png" for n, k in enumerate(y)] + ["about.json"]
    ended = torchrun(2, "sample.py", *flags, "--png-dir", tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    for folder in ("one", "two"):
        assert sorted(file.name for file in (tmp_path / folder).glob("[!.]*")) == names
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_set_goes_on_after_a_kill_and_refuses_what_would_not_be_the_same_set(
    trained, tmp_path, monkeypatch, capfd
):
    # The command is killed before its third chunk of two pictures.
    flags = [*SET, "--num", 9, "--batch-size", 2, "--npz", tmp_path / "a.npz"]
    go = partial(run, sample, "--ckpt", trained / "ckpt.pt", *flags)
    generate = sample.generate
    starts = []

    def dies(*args, start, **rest):
        starts.append(start)
        if len(starts) == 3:
            raise KeyboardInterrupt
        return generate(*args, start=start, **rest)

    monkeypatch.setattr(sample, "generate", dies)
    assert go() == 130
    assert not (tmp_path / "a.npz").exists()

    # Refused: a second command in the same folder, another seed, other weights, a damaged note.
    def refused(words, *more):
        assert go(*more) == 2
        assert words in capfd.readouterr().err

    with sample.locked(tmp_path / "a"):
        refused("a is in use by another command")
    refused("another seed", "--seed", 1, "--overwrite")
    saved = sample.load_checkpoint(trained / "ckpt.pt")
    saved["ema"] = {key: value + 1 for key, value in saved["ema"].items()}
    torch.save(saved, tmp_path / "other.pt")
    refused("another weights", "--ckpt", tmp_path / "other.pt")
    note = tmp_path / "a/about.json"
    whole = note.read_text()
    note.write_text("[]")
    refused("about.json is damaged")

    # The same command goes on where it was, and draws a picture that is gone again, as it was.
    note.write_text(whole)
    assert go() == 0
    assert starts == [0, 2, 4, 4, 6, 8]
    gone = next((tmp_path / "a").glob("000005-*.png"))
    content = gone.read_bytes()
    gone.unlink()
    assert go("--overwrite") == 0
    assert gone.read_bytes() == content and starts[6:] == [4]

    # The second of two ranks draws every second chunk.
    monkeypatch.setattr(sample, "processes", lambda: (1, 2))
    monkeypatch.setattr(sample, "process_group", nullcontext)
    assert go("--npz", tmp_path / "b.npz") == 0
    assert starts[7:] == [2, 6]


def test_classes_are_names_numbers_and_ranges():
    # A name goes before a number, and a whole name before a range.
    wild = ["cat", "sea-lion", "1", "dog"]
    assert sample.parse_classes("sea-lion,1, cat-1,3", wild) == [1, 2, 0, 1, 2, 3]
    for wrong in ("cow", "4", "dog-cat", ""):
        with pytest.raises(UserError, match="is unknown; there are cat"):
            sample.parse_classes(wrong, wild)


def test_the_sample_command_is_repeatable_takes_priors_and_exports_its_weights(
    trained, tmp_path, monkeypatch
):
    # Six steps teach a model little: here every weight matters.
    monkeypatch.chdir(tmp_path)
    saved = sample.load_checkpoint(trained / "ckpt.pt")
    saved["ema"] = awake(Config(**saved["config"])).state_dict()
    torch.save(saved, "ckpt.pt")
    go = partial(run, sample, "--ckpt", "ckpt.pt", *SET)
    for out in ("a.png", "b.png"):
        assert go("--classes", "0-2,9", "--per-class", 2, "--out", out) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()

    # The EMA weights alone, in half precision, are enough to sample from.
    assert go("--export", "small.pt") == 0
    small = sample.load_checkpoint("small.pt")
    assert small["ema"]["S"].dtype == torch.float16
    assert set(saved) - set(small) == {"model", "optimizer", "scaler"}

    # Three priors down, three classes across; in each row the encoded prior comes first.
    blocks = []
    monkeypatch.setattr(sample, "draw", lambda args, *rest: blocks.append(rest))
    Image.new("L", (8, 8), 255).save("white.png")
    Image.new("L", (9, 5), 0).save("black.png")
    priors = ["--prior", "white.png,black.png,white.png", "--cfg", 3]
    assert go("--ckpt", "small.pt", "--classes", "1-3", *priors) == 0
    [(label, images)], titles, nfe = blocks[0]
    assert titles == ["prior", "1", "2", "3"] and label == "w = 3"
    assert images[0].unique().tolist() == [255] and images[4].unique().tolist() == [0]
    assert [cost.tolist() for cost in nfe] == [[[2, 2]] * 3] * 3

    # Down a column the noise is the same: equal priors give equal rows.
    assert torch.equal(images[8:], images[:4])
    assert not torch.equal(images[5:8], images[1:4])


# ----------------------------------------------------------------------------- files and errors


def test_a_file_takes_its_place_whole_or_not_at_all(tmp_path):
    # An error of the system names the file that the user knows, and leaves what was there.
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    with pytest.raises(UserError, match=f"cannot write {mine}: Read-only file system") as caught:
        with sample.replacing(mine) as temporary:
            temporary.write_text("half")
            raise OSError(errno.EROFS, "Read-only file system", str(temporary))
    assert temporary.name not in str(caught.value)
    assert mine.read_text() == "mine" and not temporary.exists()

    # Otherwise folders are made and the file replaced.
    for target in (mine, tmp_path / "new/folder/file.txt"):
        with sample.replacing(target) as temporary:
            temporary.write_text("ours")
        assert target.read_text() == "ours"


def test_errors_of_the_user_are_told_from_bugs(monkeypatch, capsys):
    def end_by(error):
        def fails():
            raise error

        sample.run_command(fails)

    # Ranks end at once, without waiting for each other.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(f"at once, with {status}"))
    for error, line in (
        (MemoryError("no room"), "error: out of memory (no room); lower --batch-size"),
        (OSError("memory.png: no such file"), "error: memory.png: no such file"),
        (UserError("In a worker:\nmodel.UserError: a.png\nis broken"), "error: a.png is b"),
        (RuntimeError("gloo: timed out"), "another rank has ended"),
    ):
        with pytest.raises(SystemExit, match="at once, with 2"):
            end_by(error)
        (printed,) = capsys.readouterr().err.splitlines()
        assert line in printed

    # A bug keeps its traceback.
    with pytest.raises(RuntimeError, match="shapes"):
        end_by(RuntimeError("shapes of memory bank and reconnected graph differ"))


# What a user might have lying about. Nothing of it may change, whatever goes wrong.
BELONGINGS = """
    mine.png mine.npz pair.png foreign/thesis.txt foreign/000000-0.png foreign/ckpt.pt
    old/log.jsonl old/samples.png milestone/ckpt-0000002.pt broken/b/bad.png
""".split()

SHORT = {
    "TRAIN": "train --data digits --batch-size 8 --steps 20 --device cpu",
    "SAMPLE": "sample --ckpt R/ckpt.pt --device cpu --solver euler --steps 2",
    "SAMPLES": "evaluate samples --features classifier --ckpt R/ckpt.pt --ref mine.npz --samples",
    "PROBE": "evaluate probe --ckpt R/ckpt.pt --num 50",
}


@pytest.fixture(scope="session")
def belongings(trained, tmp_path_factory) -> tuple[Path, dict[Path, bytes]]:
    """A folder of a user's files, with the run R, and the content of each file."""
    root = tmp_path_factory.mktemp("user")
    shutil.copytree(trained, root / "R")
    for name in BELONGINGS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")

    # Checkpoints: cut off, with code in it, and one whose VAE has moved.
    whole = (trained / "ckpt.pt").read_bytes()
    (root / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save(Code(), root / "code.pt")
    moved = {"codec": "./gone", "vae": "that of another latent space"}
    torch.save(sample.load_checkpoint(trained / "ckpt.pt") | moved, root / "moved.pt")
    files = [path for path in root.rglob("*") if path.is_file()]
    return root, {path.relative_to(root): path.read_bytes() for path in files}


@pytest.mark.parametrize("argv, message", [
    # What exists is kept.
    ("SAMPLE --npz foreign.npz --num 4", "foreign has files, but no about.json of ours"),
    ("SAMPLE --out mine.png", "mine.png exists"),
    ("TRAIN --out R", "R/ckpt.pt exists; --resume continues a run"),
    ("TRAIN --out old --resume", "old/log.jsonl exists, but no old/ckpt.pt"),
    ("TRAIN --out milestone --resume", "milestone/ckpt-0000002.pt exists, but no milestone/ckpt"),
    ("TRAIN --out foreign --overwrite", "foreign/ckpt.pt is not a whole checkpoint"),
    ("train --data . --out new", "--out new lies inside --data ."),
    ("flow --out mine.png", "mine.png exists"),
    ("flow --out a.xyz", "try a.xyz.png"),
    ("evaluate stages --ckpt R/ckpt.pt --out pair", "pair.png exists"),
    # A run stays what it was; every share of a batch has its sense.
    ("TRAIN --out R --resume --init moved.pt", "--init was None, now moved.pt"),
    ("TRAIN --out new --batch-size 1", "--p-s 0.5 of --batch-size 1 is all or none"),
    # Files are checked before they are used.
    ("SAMPLE --ckpt cut.pt", "cut.pt is not a whole checkpoint"),
    ("SAMPLE --ckpt code.pt", "code.pt is not a whole checkpoint"),
    ("SAMPLE --ckpt moved.pt", "--vae says where the checkpoint's VAE is now"),
    ("PROBE --data nowhere", "--data says where the training pictures are now"),
    ("PROBE --data letters", "--data letters are not those R/ckpt.pt was trained on"),
    ("SAMPLE --prior mine.png --out new.png", "mine.png is not a readable picture"),
    ("SAMPLES mine.npz --out new", "mine.npz"),
    ("SAMPLES . --out new", "mine.npz"),
    ("TRAIN --data broken --out new", "broken/b/bad.png is not a readable picture"),
    # Flags.
    ("SAMPLE --prior mine.png --stages 2 --out new.png", "--stages has no effect with --prior"),
    ("sample --prior mine.png --per-class 2", "--per-class has no effect with --prior"),
    ("sample --prior mine.png --cfg-stage1 2", "--cfg-stage1 has no effect with --prior"),
    ("sample --prior mine.png --npz new.npz", "--prior has no effect for a set"),
    ("sample --per-class 2 --png-dir new", "--per-class has no effect for a set"),
    ("sample --num 9 --out new.png", "--num has no effect without --npz"),
    ("sample --labels random --out new.png", "--labels has no effect without --npz"),
    ("sample --steps 9 --out new.png", "--steps has no effect on RK45"),
    ("SAMPLE --npz=", "the name is empty"),
    ("SAMPLE --device meta", "device meta is not available"),
    ("evaluate stages --ckpt=", "the name is empty"),
    ("evaluate stages --out=", "the name is empty"),
    ("PROBE --num 1", "1: must be at least 4"),
    ("PROBE --out /", "/"),
])  # fmt: skip
def test_faults_end_in_one_line_and_nothing_of_the_user_s_is_lost(
    argv, message, belongings, tmp_path, monkeypatch, capfd
):
    # Links to the user's files, in a folder that this case has for itself.
    root, contents = belongings
    shutil.copytree(root, tmp_path, dirs_exist_ok=True, copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    short, _, rest = argv.partition(" ")
    monkeypatch.setattr(evaluate, "fit", lambda *args: None)  # whatever the classifier knows
    module, *flags = f"{SHORT.get(short, short)} {rest}".split()
    assert run(PROGRAMS[f"{module}.py"], *flags) == 2

    # One line, but for the progress bar of a run that had begun.
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line and "step/s" not in line]
    assert len(lines) == 1, lines
    assert re.match(rf"{module}\.py( \w+)?: error: ", lines[0]) and message in lines[0], lines

    # No code of theirs ran, and every file is as it was.
    assert not Path("executed").exists()
    for path, content in contents.items():
        assert path.read_bytes() == content, path


def test_a_file_that_appears_while_ours_is_made_is_kept(trained, tmp_path, monkeypatch, capfd):
    # It appears after the check at the start, before the picture is written.
    out = tmp_path / "mine.png"
    draw_grid = sample.draw_grid

    def meanwhile(*args):
        out.write_text("theirs")
        return draw_grid(*args)

    monkeypatch.setattr(sample, "draw_grid", meanwhile)
    assert run(sample, "--ckpt", trained / "ckpt.pt", *SET, "--stages", 1, "--out", out) == 2
    assert "mine.png has appeared meanwhile" in capfd.readouterr().err
    assert out.read_text() == "theirs"


def test_a_run_leaves_other_files_alone_and_reads_over_damaged_lines_of_its_log(
    trained, tmp_path, monkeypatch
):
    # A finished run, beside a file whose name looks like a temporary one.
    monkeypatch.setattr(train, "draw_samples", lambda *args: None)
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    notes = tmp_path / ".notes.tmp.txt"
    notes.write_text("mine")

    # What does not parse, or is no record, is dropped; the other lines stay.
    log = tmp_path / "log.jsonl"
    log.write_text('no json\n[]\n{"step": "x"}\n' + log.read_text() + '{"st')
    assert run(train, *QUICK, "--steps", 7, "--out", tmp_path, "--resume") == 0
    kept = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert kept == [2, 4, 6, 7]
    assert notes.read_text() == "mine"


def test_renamed_added_and_exchanged_pictures_have_another_fingerprint(tmp_path):
    # The same two classes of two pictures, five times.
    folders = [tmp_path / str(i) for i in range(5)]
    for folder in folders:
        for name in ("b/0", "b/1", "c/0", "c/1"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 40 * int(name[-1])).save(folder / f"{name}.png")

    # A class of another name, a picture more, other content of the same length.
    (folders[2] / "b").rename(folders[2] / "z")
    shutil.copy(folders[3] / "c/0.png", folders[3] / "c/9.png")
    content = (folders[4] / "c/0.png").read_bytes()
    (folders[4] / "c/0.png").write_bytes(content[:-1] + b"x")
    found = [train.load_data(str(folder), 8, 1, 0.1)[2] for folder in folders]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_compile_without_a_compiler_is_said_in_one_line(tmp_path, monkeypatch, capfd):
    def no_compiler(function):
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert run(train, *QUICK, "--steps", 1, "--compile", "--out", tmp_path) == 2
    assert capfd.readouterr().err.strip().endswith("--compile does not work here: no C++ compiler")


# ------------------------------------------------------------------------ section 4.1: the metrics


def test_fid_in_closed_form_where_covariances_are_equal_or_commute():
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.standard_normal((2, 20))
    x = rng.standard_normal((20, 40))
    S = x @ x.T / 20
    fid = evaluate.frechet_distance

    # Where one covariance is a multiple of the other, the trace is (a - b)² tr S.
    apart = ((mu1 - mu2) ** 2).sum()
    assert fid(mu1, 9 * S, mu2, 4 * S) == pytest.approx(apart + S.trace(), rel=1e-12)

    # One basis, two spectra, both of them with zeros: covariances that commute and are singular.
    V = np.linalg.eigh(S)[1]
    a, b = rng.uniform(0, 3, (2, 20))
    a[:5] = 0
    b[3:9] = 0
    expected = apart + ((a**0.5 - b**0.5) ** 2).sum()
    assert fid(mu1, V * a @ V.T, mu2, V * b @ V.T) == pytest.approx(expected, rel=1e-7)

    # Where an eigenvalue is 0, the square root of a rounding error is left: some 1e-8.
    assert abs(fid(mu1, V * a @ V.T, mu1, V * a @ V.T)) < 1e-6

    # Others: the formula as the paper of FID prints it, with SciPy's square root of a matrix. FID
    # is symmetric, the way to compute it is not.
    S2 = np.diag(a + 1)
    expected = apart + np.trace(S + S2 - 2 * sqrtm(S @ S2).real)
    assert fid(mu1, S, mu2, S2) == pytest.approx(expected, rel=1e-9)
    assert fid(mu2, S2, mu1, S) == pytest.approx(expected, rel=1e-9)


def thin(images: torch.Tensor) -> tuple:
    """Stands in for Inception: a few pixels as 3 pooled features, 4 logits, 2 spatial features."""
    x = images.float().flatten(1)
    return x[:, 10:13], x[:, 3:7] / 9, x[:, 20:22]


def test_fid_moments_grow_by_blocks_of_1024_pictures_and_without_cancellation(monkeypatch):
    # The product of 2048 x 2048 is what takes time: one for 1,024 pictures, not for each batch.
    added = record(monkeypatch, "add_rows")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1100, 1, 5, 5), generator=generator, dtype=torch.uint8)
    found = evaluate.measure(images, thin, "x")
    assert [tuple(x.shape) for (_, x), *_ in added] == [(1024, 3), (1024, 2), (76, 3), (76, 2)]

    # The statistics are those of all pictures together.
    pool, logits, spatial = thin(images)
    assert torch.equal(found.pool, pool)
    assert torch.equal(found.logits, logits)
    for (mu, sigma), x in ((found.fid, pool), (found.sfid, spatial)):
        assert np.allclose(mu, x.double().mean(0), rtol=1e-12)
        assert np.allclose(sigma, np.cov(x.double().T), rtol=1e-12)

    # Means a million times the spread: a sum of squares would lose everything.
    x = pool.double() / 256 + 1e6
    moments = (0, 0, 0)
    for part in x.split(77):
        moments = evaluate.add_rows(moments, part)
    assert np.allclose(moments[2] / 1099, np.cov(x.T), rtol=1e-8)  # ddof = 1


def test_is_of_sure_and_clueless_classifiers_and_of_torch_fidelity():
    # Ten classes, each certain, are worth 10; a classifier that knows nothing is worth 1.
    score = evaluate.inception_score
    sure = torch.eye(10).repeat_interleave(30, 0)
    assert score(sure, 1) == pytest.approx((10, 0), abs=1e-12)
    assert score(sure, 2) == pytest.approx((5, 0), abs=1e-12)  # five classes in each split
    assert score(torch.full((50, 8), 1 / 8)) == pytest.approx((1, 0), abs=1e-12)

    # Torch-fidelity's function agrees, mean and standard deviation.
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * torch.randn(100, 12, generator=torch.Generator().manual_seed(0))
    theirs = fidelity.isc_features_to_metric(logits, splits=5, shuffle=False)
    assert score(logits.double().softmax(1), 5) == pytest.approx((*theirs.values(),), rel=1e-12)


def test_precision_and_recall_against_a_loop_ties_and_blocks_included():
    rng = np.random.default_rng(3)

    def covered(points, centres, k):
        """Whole numbers, so the squared distances are exact."""
        reach = []
        for i, centre in enumerate(centres):
            squares = ((np.delete(centres, i, 0) - centre) ** 2).sum(1)
            reach.append(np.partition(squares, k - 1)[k - 1])
        return np.mean([(((p - centres) ** 2).sum(1) <= reach).any() for p in points])

    # Few different points: full of ties. The default is k = 3.
    real = rng.integers(0, 9, (70, 2))
    fake = rng.integers(3, 14, (50, 2))
    for k, settings in ((1, {"k": 1}), (3, {})):
        truth = (covered(fake, real, k), covered(real, fake, k))
        assert evaluate.precision_recall(real, fake, **settings) == pytest.approx(truth, abs=1e-12)

    # So many that they take two blocks: a grid of 81 x 81, in which the third neighbour is 1 away.
    # Of the columns 77 to 86, the first five are as near.
    real = rng.permutation(np.argwhere(np.ones((81, 81))))
    fake = np.argwhere(np.ones((10, 81))) + [77, 0]
    assert evaluate.precision_recall(real, fake)[0] == 0.5


def test_psnr_and_ssim_against_their_definitions():
    # An error of 1 everywhere, and none at all.
    rng = np.random.default_rng(4)
    a = rng.integers(0, 255, (1, 1, 20, 17)).astype(np.uint8)
    x = torch.from_numpy(a).expand(2, 3, -1, -1)
    assert evaluate.psnr(x, x + 1).tolist() == pytest.approx([20 * np.log10(255)] * 2)
    assert evaluate.psnr(x, x).isinf().all()
    assert evaluate.ssim(x, x).tolist() == [1, 1]

    def blur(z):
        """SciPy's Gaussian window of 11 pixels, less what the border touches."""
        return gaussian_filter(z[0, 0].astype(float), 1.5, truncate=3.5)[5:-5, 5:-5]

    # Eq. 13 of Wang et al. (2004), for one channel. Of three, one is as before: their mean.
    b = (a + rng.integers(-20, 20, a.shape)).clip(0, 255)
    mean_a = blur(a)
    mean_b = blur(b)
    variances = blur(a * 1.0 * a) - mean_a**2 + blur(b * b) - mean_b**2
    top = (2 * mean_a * mean_b + 2.55**2) * (2 * (blur(a * b) - mean_a * mean_b) + 7.65**2)
    one = (top / (mean_a**2 + mean_b**2 + 2.55**2) / (variances + 7.65**2)).mean()
    y = torch.from_numpy(b.astype(np.uint8)).expand(2, 3, -1, -1).clone()
    y[1, 0] = x[1, 0]
    assert evaluate.ssim(x, y).tolist() == pytest.approx([one, (2 * one + 1) / 3], rel=1e-10)


@pytest.mark.filterwarnings("error")  # scikit-learn warns of a fit that did not converge
def test_table2_the_linear_probe_converges_and_is_blind_to_scale():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(4000) % 2
    x, x_test = torch.randn(2, 4000, 5, generator=generator) + 0.5 * y[:, None]

    # Bayes' accuracy for two normal distributions whose means are sqrt(5)/2 apart.
    best = torch.distributions.Normal(0, 1).cdf(torch.tensor(0.25 * 5**0.5))
    found = evaluate.linear_probe(x, y, x_test, y)
    assert abs(found - best) < 0.015

    # Features of any scale and mean do as well: BatchNorm takes them away.
    scale = torch.tensor([1e-2, 1, 10, 1e3, 1e4])
    shift = torch.tensor([0, 5, -300, 1e4, 0])
    moved = evaluate.linear_probe(x * scale + shift, y, x_test * scale + shift, y)
    assert moved == pytest.approx(found, abs=2e-3)

    # The class is the small difference of two features: too strong a decay would miss it.
    twins = torch.randn(2, 4000, 1, generator=generator) * torch.ones(2)
    twins[:, :, 1] += 0.2 * y
    assert evaluate.linear_probe(twins[0], y, twins[1], y) > 0.99


def test_metrics_refuse_what_they_cannot_compare():
    images = torch.zeros(5, 3, 12, 12, dtype=torch.uint8)
    half = torch.full((4, 2), 0.5)
    mu = half[0]
    sigma = half[:2]
    for words, function, *inputs in (
        ("uint8", evaluate.psnr, images, images.float()),
        ("uint8", evaluate.ssim, images, images[:, :1]),
        ("uint8", evaluate.ssim, images[:, :1], images),
        ("uint8", evaluate.measure, images.float(), thin, "x"),
        ("shapes", evaluate.frechet_distance, mu, sigma, mu, torch.eye(3)),
        ("all finite", evaluate.frechet_distance, mu, sigma * torch.nan, mu, sigma),
        ("0 to 3 are NaN", evaluate.add_rows, (0, 0, 0), half * torch.nan),
        ("1 pictures; at least 2", evaluate.measure, images[:1], thin, "x"),
        ("at least 4 pictures", evaluate.precision_recall, half, half[:3]),
        ("of one width", evaluate.precision_recall, half, half[:, :1]),
        ("in 10 parts: one is empty", evaluate.inception_score, half),
        ("or NaN", evaluate.inception_score, half * torch.nan, 1),
    ):
        with pytest.raises(model.UserError, match=words):
            function(*inputs)


def test_comparing_shuffles_for_the_is_and_warns_of_too_few_pictures(monkeypatch):
    # 10,000 sure pictures in order of class: each of the two parts of 5,000 would have five.
    # Precision and recall are not in question here, and slow for so many.
    monkeypatch.setattr(evaluate, "precision_recall", lambda real, fake: (0.25, 0.5))
    logits = 99 * torch.eye(10).repeat_interleave(1000, 0)
    pool = torch.rand(10_000, 2, generator=torch.Generator().manual_seed(0))
    real = evaluate.Measured((), (pool.mean(0), pool.T.cov()), (), pool[:100], logits)
    fake = real._replace(pool=pool)
    columns = evaluate.compare(real, fake)
    assert 9.9 < columns["is"] < 10
    assert columns["is_std"] > 0
    assert evaluate.compare(real, fake) == columns  # the shuffle has a seed of its own
    assert list(columns) == ["fid", "is", "is_std", "precision", "recall"]
    assert (columns["precision"], columns["recall"]) == (0.25, 0.5)

    # Fewer pictures than features, on either side.
    few = fake._replace(pool=pool[:1], logits=logits[:1])
    for pair in ((few, fake), (fake, few)):
        with pytest.warns(UserWarning, match="for 2 features: too few"):
            evaluate.compare(*pair)


# ----------------------------------------------------------------------- section 4.1: the features


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A file of random weights for torch-fidelity's Inception, made without a download."""
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        network = library.FeatureExtractorInceptionV3
        patch.setattr(library, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = network("inception", ["2048"])

    # The library leaves its weights empty.
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)

    # A large bias: IS must leave it out.
    for p in network.fc.parameters():
        torch.nn.init.normal_(p, std=3)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path)
    return str(path)


def test_inception_agrees_with_torch_fidelity_and_sfid_reads_the_right_channels(weights):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 12, 16), generator=generator, dtype=torch.uint8)
    images[1] = images[1, :1]  # a grey picture is one with three equal channels
    network, facts = evaluate.inception(weights, torch.device("cpu"))
    assert facts == {"features": "inception", "weights": weights}
    pool, logits, spatial = network(images)
    assert torch.allclose(network(images[1:, :1])[0], pool[1:], atol=1e-5)

    # The library's own features, and what its layer Mixed_6d.branch1x1 puts out.
    theirs = fidelity.FeatureExtractorInceptionV3("inception", ["2048", "logits"], weights)
    seen = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *a: seen.append(a[2]))
    their_pool, their_logits = theirs(images)
    assert torch.equal(pool, their_pool)
    assert torch.allclose(logits + theirs.fc.bias, their_logits, atol=1e-4)

    # Seven channels of 17 x 17, channels last, after the ReLU.
    assert seen[0].min() == 0
    assert torch.equal(spatial, seen[0][:, :7].permute(0, 2, 3, 1).reshape(2, 2023))


def test_features_are_computed_in_true_fp32(weights, monkeypatch):
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network, _ = evaluate.inception(weights, torch.device("cpu"))
    seen = []

    def state():
        matmul = torch.get_float32_matmul_precision()
        return matmul, torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu")

    def forward(self, x):
        seen.append(state())
        raise ZeroDivisionError

    # What a GPU and sampling in bf16 would have set is off inside, and back again afterwards,
    # whatever happens.
    monkeypatch.setattr(library.FeatureExtractorInceptionV3, "forward", forward)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.bfloat16), torch.backends.cudnn.flags(allow_tf32=True):
        with pytest.raises(ZeroDivisionError):
            network(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
        seen.append(state())
    torch.set_float32_matmul_precision(before)
    assert seen == [("highest", False, False), ("high", True, True)]


def test_grey_and_colour_become_each_other():
    # Every grey level survives the way there and back. Red has Pillow's luminance, 0.299.
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    colour = evaluate.as_channels(grey, 3)
    assert torch.equal(colour, grey.repeat(1, 3, 1, 1))
    assert torch.equal(evaluate.as_channels(colour, 1), grey)
    red = torch.tensor([200, 0, 0], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert evaluate.as_channels(red, 1).item() == 60


def random_ckpt(path: Path, config: Config, **entries) -> Path:
    """A checkpoint of random weights, as of a run on scikit-learn's 8 x 8 digits."""
    saved = {"format": "dod-2", "step": 7, "p_s": 0.25, "codec": "none", "data": "digits"}
    saved |= {"image_size": 8, "channels": 1, "held_out": 0.1} | entries
    data = [saved[key] for key in ("data", "image_size", "channels", "held_out")]
    training, _, fingerprint = train.load_data(*data)
    K = len(training.classes)
    config = replace(config, depth=1, latent_size=8, latent_channels=1, num_classes=K)
    saved |= {"fingerprint": fingerprint, "classes": training.classes}
    torch.save(saved | {"config": asdict(config), "ema": awake(config).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    return random_ckpt(tmp_path_factory.mktemp("run") / "ckpt.pt", CONFIGS["DoD-Ti"])


@pytest.fixture
def quick_fit(monkeypatch) -> None:
    """The classifier is trained for a few steps only."""
    monkeypatch.setattr(evaluate, "fit", partial(evaluate.fit, steps=10))


def test_the_classifier_is_the_same_bytes_each_time_and_mends_a_damaged_file(
    ckpt, tmp_path, quick_fit, monkeypatch, capsys
):
    # It is kept beside the checkpoint. Neither seed, nor threads, nor a damaged file change it.
    fitted = record(monkeypatch, "fit")
    training, _, _ = train.load_data("digits", 8, 1, 0.1)
    saved = sample.load_checkpoint(ckpt)
    go = partial(evaluate.classifier, tmp_path / "ckpt.pt", saved, training)
    network, _ = go()
    file = next(tmp_path.glob("classifier-*.pt"))
    before = file.read_bytes()
    file.write_bytes(before[: len(before) // 2])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    torch.manual_seed(1)
    go()
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert file.read_bytes() == before

    # The next command finds it there. Colour pictures, like those of an .npz, are seen in grey.
    again, _ = go()
    images, _ = evaluate.first(training, 100)
    pool, logits, spatial = network(images)
    assert (pool.shape, logits.shape, spatial) == ((100, 64), (100, 10), None)
    assert torch.equal(again(images.expand(-1, 3, -1, -1))[0], pool)
    assert torch.allclose(again(images[:1])[0], pool[:1], atol=1e-4)  # alone or not
    assert len(fitted) == 2

    # Other training pictures mean another file.
    for change in ({"fingerprint": "other"}, {"held_out": 0.2}):
        evaluate.classifier(tmp_path / "ckpt.pt", saved | change, training)
    assert len(list(tmp_path.glob("classifier-*.pt"))) == 3

    # Where it cannot be written (here a folder has its name), it is used all the same.
    file.unlink()
    file.mkdir()
    again, _ = go()
    assert torch.equal(again(images)[0], pool)
    assert "the classifier is not kept: cannot write" in capsys.readouterr().out


# ------------------------------------------------------------- Fig. 4 and Tables 2-5: the commands


def record(monkeypatch, name: str) -> list:
    """Watches a function of evaluate.py -> its calls: (arguments, named arguments, result)."""
    calls = []
    original = getattr(evaluate, name)

    def watched(*args, **named):
        result = original(*args, **named)
        calls.append((args, named, result))
        return result

    monkeypatch.setattr(evaluate, name, watched)
    return calls


FLOOR = ("training pictures", None)


def rows_of(path: Path) -> dict:
    """The rows of a report, by what they are and their guidance."""
    return {(row["what"], row.get("guidance")): row for row in json.loads(path.read_text())["rows"]}


def error_line(capsys, *argv) -> str:
    """The last line that evaluate.py prints when it ends in an error, without progress bars."""
    capsys.readouterr()
    assert run(evaluate, *argv) == 2
    line = capsys.readouterr().err.replace("\r", "\n").strip().split("\n")[-1]
    assert line.startswith("evaluate.py")
    return line


def test_fig4_stages_reports_floor_stages_and_class_guidance(ckpt, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "fit", partial(evaluate.fit, steps=150))
    sampled = record(monkeypatch, "generate")
    measured = record(monkeypatch, "measure")
    flags = ["--num", 100, "--steps", 2, "--cfg", "2,5.5", "--cfg-stage1", "1.5"]
    assert run(evaluate, "stages", "--ckpt", ckpt, *flags) == 0
    out = ckpt.with_name("stages.json")
    rows = rows_of(out)

    # Section 3.3: no guidance in stage 1, which is the same for all scales and so listed once.
    later = [(f"stage {i}", w) for w in (2, 5.5) for i in (2, 3)]
    assert list(rows) == [FLOOR, ("stage 1", 1), *later, ("stage 1", 1.5)]
    assert [named["cfg"] for _, named, _ in sampled] == [[1, 2, 2], [1, 5.5, 5.5], [1.5]]

    # Samples have the classes of the held-out pictures that they are compared with. The floor:
    # as many training pictures of the second half in the place of samples.
    training, held_out, fingerprint = train.load_data("digits", 8, 1, 0.1)
    images, y = evaluate.first(held_out, 100)
    assert torch.equal(measured[0][0][0], images)
    assert all(torch.equal(args[1], y) for args, *_ in sampled)
    half = torch.stack([training[i, False][0] for i in range(808, 908)])
    assert torch.equal(measured[1][0][0], half)
    assert rows[FLOOR]["fid"] < rows["stage 1", 1]["fid"] / 2
    assert rows[FLOOR]["recognised"] > 0.9

    # Beside the FID there is that against the training pictures.
    seen = [result for *_, result in measured]
    taken = (seen[2].logits.argmax(1) == y).double().mean().item()
    expected = {"fid": evaluate.frechet_distance(*seen[0].fid, *seen[2].fid)}
    expected |= {"fid_training": evaluate.frechet_distance(*seen[1].fid, *seen[2].fid)}
    expected |= {"recognised": taken, "evaluations": 2}
    assert {key: rows["stage 1", 1][key] for key in expected} == pytest.approx(expected)

    # The report says what made it, and there are two pictures. It does not call this FID-50K.
    found = json.loads(out.read_text())
    assert len(found["rows"]) == len(rows)
    expected = {
        "command": "stages", "features": "classifier", "count": 100, "ckpt": str(ckpt), "seed": 0,
        "reference": "held-out pictures", "reference_count": 100, "solver": "euler", "steps": 2,
        "cfg": [2, 5.5], "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }  # fmt: skip
    assert found | expected == found
    about = found["checkpoint"]
    assert about | {"step": 7, "p_s": 0.25, "fingerprint": fingerprint} == about
    assert "ema" not in about
    for suffix in (".png", ".pictures.png"):
        assert Image.open(ckpt.with_name(f"stages{suffix}")).width > 500
    printed = capsys.readouterr().out
    assert "100 pictures against 100 of held-out" in printed
    assert "FID-50K" not in printed


def test_fig2_cost_takes_each_method_at_its_best_scale_by_training_pictures(tmp_path, capsys):
    def write(name, step, config, rows):
        saved = {"step": step, "batch_size": 64, "p_s": 0.25, "config": asdict(config)}
        saved["fingerprint"] = "digits" if name == "other" else "letters"
        found = {"command": "stages", "ckpt": f"out/{name}/ckpt.pt", "checkpoint": saved}
        floor = {"what": "training pictures", "fid": 0.5}
        keys = ("what", "guidance", "fid_training", "fid", "gflops")
        found["rows"] = [floor, *(dict(zip(keys, row, strict=True)) for row in rows)]
        path = tmp_path / f"{name}-{step}.json"
        path.write_text(json.dumps(found))
        return path

    # The last of the reports is the one with the fewest images.
    fit = replace(TINY, N=0)
    reports = [
        write("a", 20, TINY, [("stage 1", 1, 9, 8, 1), ("stage 2", 2, 3, 1, 3)]),
        write("b", 10, fit, [("stage 1", 1, 9, 9, 1), ("stage 1", 3, 4, 4, 2)]),
        write("a", 10, TINY, [("stage 2", 2, 5, 4, 3), ("stage 2", 3, 4, 5, 3)]),
    ]
    out = tmp_path / "found.json"
    (tmp_path / "found.pictures.png").touch()  # cost writes no such file, so it may be there
    assert run(evaluate, "cost", *reports, "--out", out) == 0
    rows = json.loads(out.read_text())["rows"]
    found = [tuple(row[key] for key in ("what", "images", "guidance", "fid")) for row in rows]
    assert found == [
        ("a stage 1", 1280, 1, 8),
        ("a stage 2", 640, 3, 5),
        ("a stage 2", 1280, 2, 1),
        ("b stage 1", 640, 1, 9),
        ("b class guidance", 640, 3, 4),
    ]

    # Operations: forward and backward are three passes, of two operations for each MAC.
    for row, config in ((rows[1], TINY), (rows[3], fit)):
        macs = model.training_macs(config, 0.25)
        flops = 6 * 640 * (macs["ours"] + macs["attention"])
        assert row["tflops"] == pytest.approx(flops / 1e12)
    assert Image.open(tmp_path / "found.png").width > 500

    # Other pictures have another classifier: their FIDs do not belong into the same figure.
    capsys.readouterr()
    other = write("other", 10, TINY, [("stage 1", 1, 9, 8, 1)])
    assert run(evaluate, "cost", *reports, other, "--out", tmp_path / "new.json") == 2
    assert "are about different pictures" in capsys.readouterr().err

    # Not a report, or not one of stages. Neither report nor figure is replaced unasked.
    for text in ("", "[1]", "{}", '{"command": "probe"}'):
        (tmp_path / "other.json").write_text(text)
        assert run(evaluate, "cost", tmp_path / "other.json", "--out", tmp_path / "new.json") == 2
        assert "is no report of" in capsys.readouterr().err
    out.unlink()
    assert run(evaluate, "cost", *reports, "--out", out) == 2
    assert "found.png exists" in capsys.readouterr().err


def test_table4_compute_of_a_stage_has_that_of_the_stages_before(monkeypatch):
    def generate(model, y, stages, cfg, nfe, **rest):
        """Like RK45, evaluates two images differently often: 30 times on average."""
        for w in cfg:
            counts = torch.tensor([[29, 29], [31, 31]])
            counts[:, 1] *= w > 1  # how many of them were guided
            nfe.append(counts)
        return [y] * stages

    # All that the compute depends on, without weights.
    monkeypatch.setattr(evaluate, "generate", generate)
    args = Namespace(guide_on="both", cfg_channels=None, cfg_interval=None)
    vars(args).update(solver="dopri5", steps=1, seed=0, batch_size=9)
    dod = Namespace(config=CONFIGS["DoD-B"], cos=torch.ones(1))
    parts = Namespace(model=dod, codec=sample.Codec())
    y = torch.ones(2)

    # What model.py prints, no more than the paper's 795 and 2409.6. A real picture as the prior:
    # stage 2 without stage 1.
    found = [row["gflops"] for row, _ in evaluate.follow(args, parts, y, [1, 5.5])]
    assert found == pytest.approx([653.0, 2114.8], abs=0.06)
    row, _ = next(evaluate.follow(args, parts, y, [5.5], y))
    assert row["gflops"] == pytest.approx(2114.8 - 653.0, abs=0.1)


def test_fig4_reconstruct_and_table2_probe_report_their_columns(
    ckpt, quick_fit, monkeypatch, capsys
):
    sampled = record(monkeypatch, "generate")
    flags = ["--num", 40, "--steps", 4, "--cfg", "1,5.5", "--cfg-interval", "0.3,0.8"]
    with pytest.warns(UserWarning, match="40 and 40 pictures for 64 features"):
        assert run(evaluate, "reconstruct", "--ckpt", ckpt, *flags) == 0
    rows = rows_of(ckpt.with_name("reconstruct.json"))
    guided = rows["reconstruction", 5.5]
    plain = rows["reconstruction", 1]
    assert list(rows)[0] == FLOOR
    assert "rFID" in capsys.readouterr().out

    # Pictures of 8 pixels have no SSIM, whose window has 11.
    assert 0 < plain["psnr"] < 30
    assert "ssim" not in plain

    # Euler evaluates at 1, 0.75, 0.5 and 0.25; two of these times are inside the interval.
    s = model.count_macs(replace(CONFIGS["DoD-Ti"], depth=1, latent_size=8))["s"] / 1e9
    assert guided["evaluations"] == plain["evaluations"] == 4
    assert guided["gflops"] == pytest.approx(plain["gflops"] + 2 * s)

    # The priors are the held-out pictures, and each keeps its class.
    training, held_out, _ = train.load_data("digits", 8, 1, 0.1)
    images, y = evaluate.first(held_out, 40)
    assert torch.equal(sampled[0][0][1], y)
    assert torch.equal(sampled[0][1]["prior"], sample.Codec().encode(images))

    # The probe reads the mean of LEM's tokens, then all of them. Even those of a random LEM tell
    # digits better than chance, 0.1.
    probed = record(monkeypatch, "linear_probe")
    assert run(evaluate, "probe", "--ckpt", ckpt, "--num", 150) == 0
    mean, everything = json.loads(ckpt.with_name("probe.json").read_text())["rows"]
    assert (mean["what"], everything["what"]) == ("mean of N tokens", "all N tokens")
    assert 0.15 < mean["top1"] < everything["top1"] < 1
    lem = sample.load_model(sample.load_checkpoint(ckpt)).lem
    for data, place in ((training, 0), (held_out, 2)):
        images, y = evaluate.first(data, 150)
        l_hat = lem.encode(sample.Codec().encode(images))  # (150, N, d_e)
        assert torch.allclose(probed[0][0][place], l_hat.mean(1), atol=1e-5)
        assert torch.allclose(probed[1][0][place], l_hat.flatten(1), atol=1e-5)
        assert torch.equal(probed[1][0][place + 1], y)


def test_a_plain_fitv2_has_stage_1_and_its_class_guidance(ckpt, quick_fit, monkeypatch, capsys):
    sampled = record(monkeypatch, "generate")

    # --cfg is for stages with a prior, of which there are none.
    fitv2 = random_ckpt(ckpt.with_name("fitv2.pt"), CONFIGS["FiTv2-Ti"])
    out = ckpt.with_name("fitv2.json")
    flags = ["--ckpt", fitv2, "--num", 70, "--out", out]
    guidance = ["--steps", 1, "--cfg", "2,3", "--cfg-stage1", "2"]
    assert run(evaluate, "stages", *flags, *guidance) == 0
    assert list(rows_of(out)) == [FLOOR, ("stage 1", 1), ("stage 1", 2)]
    assert [named["cfg"] for _, named, _ in sampled] == [[1], [2]]

    # There is no LEM that could take a prior or be probed. A report is not written over unasked.
    for command in ("reconstruct", "probe"):
        assert "LEM" in error_line(capsys, command, *flags, "--overwrite")
    assert "--overwrite" in error_line(capsys, "stages", *flags)


def test_a_run_that_held_nothing_out_is_compared_with_training_pictures(
    tmp_path, quick_fit, monkeypatch, capsys
):
    # More pictures are asked for than half of the 1,797.
    none = random_ckpt(tmp_path / "ckpt.pt", CONFIGS["DoD-Ti"], held_out=0.0)
    measured = record(monkeypatch, "measure")
    flags = ["--num", 1000, "--steps", 1, "--stages", 1, "--cfg-stage1", "none"]
    assert run(evaluate, "stages", "--ckpt", none, *flags) == 0

    # The report says so. Reference and floor are two halves, without a picture in common.
    assert json.loads((tmp_path / "stages.json").read_text())["reference"] == "training pictures"
    training, _, _ = train.load_data("digits", 8, 1, 0.0)
    every = torch.stack([training[i, False][0] for i in range(1797)])
    assert torch.equal(measured[0][0][0], every[:898])
    assert torch.equal(measured[1][0][0], every[898:1796])

    # A probe needs pictures that LEM has not seen.
    assert "0 pictures, at least 4 are needed" in error_line(capsys, "probe", "--ckpt", none)


def test_a_set_of_one_class_has_stages_but_neither_class_guidance_nor_a_probe(
    tmp_path, quick_fit, capsys
):
    # A folder of 20 pictures, half of which are held out.
    cats = tmp_path / "cats"
    cats.mkdir()
    for i in range(20):
        Image.new("L", (8, 8), 12 * i).save(cats / f"{i}.png")
    entries = {"data": str(cats), "held_out": 0.5}
    one = random_ckpt(tmp_path / "ckpt.pt", CONFIGS["DoD-Ti"], **entries)
    flags = ["stages", "--ckpt", one, "--steps", 1, "--cfg", 2]
    assert "--cfg-stage1 none" in error_line(capsys, *flags)
    assert "of one class" in error_line(capsys, "probe", "--ckpt", one)

    # The pictures have moved: --data says where to. Stages are guided by the prior alone.
    flags += ["--cfg-stage1", "none", "--data", cats.rename(tmp_path / "moved")]
    with pytest.warns(UserWarning, match="pictures for 64 features: too few"):
        assert run(evaluate, *flags) == 0
    stages = [("stage 1", 1), ("stage 2", 2), ("stage 3", 2)]
    assert list(rows_of(tmp_path / "stages.json"))[1:] == stages


def test_a_vae_that_has_moved_is_named_by_its_flag(ckpt, monkeypatch, capsys):
    moved = random_ckpt(ckpt.with_name("moved.pt"), CONFIGS["DoD-Ti"], codec="./gone", vae="known")
    flags = ["probe", "--ckpt", moved, "--num", 40, "--out", moved.with_suffix(".json")]
    assert "--vae says where" in error_line(capsys, *flags)

    # A stand-in for Stable Diffusion's VAE, in the place that the flag names.
    class Moved(sample.Codec):
        name = "here"
        fingerprint = "known"

    monkeypatch.setattr(sample, "VAE", lambda name, device: {"here": Moved()}[name])
    assert run(evaluate, *flags, "--vae", "here") == 0


def write_npz(path: Path, images: torch.Tensor, **moments) -> Path:
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **moments)
    return path


def test_samples_reads_npz_and_folders_alike_and_colour_for_grey(ckpt, tmp_path, quick_fit, capsys):
    # sample.py writes a set twice: an .npz and a folder, both of grey pictures in RGB.
    flags = ["--num", 70, "--solver", "euler", "--steps", 1, "--seed", 5]
    npz = tmp_path / "set.npz"
    assert run(sample, "--ckpt", ckpt, "--npz", npz, *flags) == 0
    _, held_out, _ = train.load_data("digits", 8, 1, 0.1)
    real, _ = evaluate.first(held_out, 99)
    ref = write_npz(tmp_path / "ref.npz", real)

    # A third time as grey files of another kind, in a folder, beside a hidden one.
    (tmp_path / "other/below").mkdir(parents=True)
    (tmp_path / "other/.thumbs").mkdir()
    (tmp_path / "other/.thumbs/a.png").write_bytes(b"no picture")
    for i, picture in enumerate(np.load(npz)["arr_0"]):
        Image.fromarray(picture).convert("L").save(tmp_path / f"other/below/{i:03}.PNG")

    # All are read in colour, and the reports agree in all their columns.
    assert {picture.shape for picture in evaluate.read_pictures(tmp_path / "other")} == {(3, 8, 8)}
    reports = []
    for path in (npz, tmp_path / "set", tmp_path / "other"):
        flags = ["--features", "auto", "--ckpt", ckpt, "--out", tmp_path / f"{path.name}.json"]
        assert run(evaluate, "samples", "--ref", ref, "--samples", path, *flags) == 0
        reports.append(json.loads((tmp_path / f"{path.name}.json").read_text()))
        assert reports[-1]["rows"][0].pop("what") == path.name
        assert (reports[-1]["count"], reports[-1]["reference_count"]) == (70, 99)
    for report in reports[1:]:
        assert report["rows"][0] == pytest.approx(reports[0]["rows"][0], rel=1e-6)

    # What sample.py says of a set is in the report: labels, guidance, seed, ...
    assert capsys.readouterr().out.count("random labels") == 2
    about = reports[0]["samples_about"]
    assert about | {"labels": "random", "seed": 5, "cfg": [1, 2], "step": 7} == about
    assert [report["samples_about"] for report in reports[1:]] == [about, {}]


def stand_in(monkeypatch, weights: Path) -> None:
    facts = {"features": "inception", "weights": weights}
    monkeypatch.setattr(evaluate, "inception", lambda *a: (thin, dict(facts)))


def test_samples_takes_the_moments_of_a_whole_set(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randint(0, 256, (2, 9, 3, 5, 5), generator=generator, dtype=torch.uint8)
    npz = write_npz(tmp_path / "fake.npz", fake)
    stand_in(monkeypatch, npz)

    # Moments of another set than arr_0, one of them written by a big-endian machine.
    moments = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.ones(2, ">f8")}
    ref = write_npz(tmp_path / "ref.npz", real, sigma_s=np.eye(2), **moments)
    flags = ["samples", "--ref", ref, "--samples", npz, "--overwrite"]
    assert run(evaluate, *flags) == 0
    found = json.loads((tmp_path / "fake.json").read_text())
    assert found["whole_set"] is True

    # FID and sFID are against those moments. Precision and recall compare pictures.
    measured = evaluate.measure(fake, thin, "x")
    fid = evaluate.frechet_distance(np.zeros(3), np.eye(3), *measured.fid)
    sfid = evaluate.frechet_distance(np.ones(2), np.eye(2), *measured.sfid)
    row = found["rows"][0]
    assert (row["fid"], row["sfid"]) == pytest.approx((fid, sfid), rel=1e-12)
    pairs = evaluate.precision_recall(evaluate.measure(real, thin, "x").pool, measured.pool)
    assert (row["precision"], row["recall"]) == pairs

    # Three of the four arrays are not moments of a set.
    write_npz(ref, real, **moments)
    for more, whole in (([], False), (["--ref-is-training-set"], True)):
        assert run(evaluate, *flags, *more) == 0
        found = json.loads((tmp_path / "fake.json").read_text())
        assert found["whole_set"] is whole


def test_fid_50k_is_the_name_of_50000_samples_against_a_whole_set_only(tmp_path, capsys):
    facts = {"features": "inception", "count": 50_000, "whole_set": True}
    facts |= {"reference": "x.npz", "reference_count": 9}

    def title(**changes):
        args = Namespace(out=tmp_path / "x.json", command="samples", overwrite=True)
        evaluate.report(args, [{"what": "x", "fid": 2}], facts | changes)
        return capsys.readouterr().out.split("\n")[1].strip()

    # Everything has to be right.
    assert title() == "FID-50K"
    for wrong in ({"count": 49_999}, {"whole_set": False}, {"features": "classifier"}):
        assert title(**wrong) == "FID"


def test_auto_features_are_inceptions_from_64_pixels_on(ckpt, monkeypatch):
    monkeypatch.setattr(evaluate, "classifier", lambda *a: "classifier")
    monkeypatch.setattr(evaluate, "inception", lambda *a: "inception")
    args = Namespace(features="auto", inception=None, device="cpu", ckpt=ckpt)
    for size, kind in ((63, "classifier"), (64, "inception")):
        parts = Namespace(saved={"image_size": size}, training=None)
        assert evaluate.load_network(args, parts) == kind
    assert evaluate.load_network(args, None) == "inception"


def test_commands_name_what_is_wrong_with_a_file_or_flag_in_one_line(
    ckpt, tmp_path, quick_fit, monkeypatch, capsys
):
    # Sets of many kinds; a folder of two sizes and one with a broken picture; weights with code.
    images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    good = write_npz(tmp_path / "good.npz", images)
    write_npz(tmp_path / "float.npz", images.float())
    write_npz(tmp_path / "large.npz", torch.zeros(5, 1, 9, 9, dtype=torch.uint8))
    write_npz(tmp_path / "two.npz", images.expand(-1, 2, -1, -1))
    np.savez(tmp_path / "flat.npz", arr_0=np.zeros((5, 8), np.uint8))
    np.savez(tmp_path / "words.npz", arr_0=np.full((5, 8, 8, 3), "x"))
    np.savez(tmp_path / "big.npz", arr_0=np.zeros((5, 8, 8, 3), ">i2"))
    np.savez(tmp_path / "object.npz", arr_0=np.full((5, 8, 8, 3), None))
    np.savez(tmp_path / "no.npz", images=np.zeros(3))
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    for name in ("mixed/8.png", "mixed/9.png", "broken/8.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (int(name[-5]), int(name[-5]))).save(tmp_path / name)
    (tmp_path / "broken/7.jpeg").write_bytes(b"no picture")
    (tmp_path / "code.pth").write_bytes(f"cbuiltins\nopen\n(V{tmp_path}/ran\nVw\ntR.".encode())

    # Each error is one line with these words, and nothing is written.
    samples = ["samples", "--ref", good, "--out", tmp_path / "x.json", "--samples"]
    for name, words in (
        ("mixed", "(3, 9, 9)"), ("broken", "7.jpeg"), ("no.npz", "arr_0"), ("bad.npz", "bad.npz"),
        ("float.npz", "float32"), ("large.npz", "(1, 9, 9)"), ("words.npz", "<U1"),
        ("big.npz", ">i2"), ("object.npz", "Object arrays"), ("two.npz", "(5, 8, 8, 2)"),
        ("flat.npz", "(5, 8)"),
    ):  # fmt: skip
        flags = ["--features", "classifier", "--ckpt", ckpt]
        assert words in error_line(capsys, *samples, tmp_path / name, *flags)
    for name in ("nowhere", "code.pth"):
        inception = ["--inception", tmp_path / name]
        assert "weights-inception-2015" in error_line(capsys, *samples, good, *inception)
    assert "--ckpt" in error_line(capsys, *samples, good, "--features", "classifier")

    # Moments that are no numbers, or not of the features' width.
    stand_in(monkeypatch, good)
    for mu in (np.full(3, "x"), np.full(3, None), np.zeros(4), np.full(3, np.nan)):
        moments = {"mu": mu, "sigma": np.eye(3), "mu_s": np.ones(2), "sigma_s": np.eye(2)}
        write_npz(tmp_path / "ref.npz", images, **moments)
        error_line(capsys, *samples, good, "--ref", tmp_path / "ref.npz")
    assert not (tmp_path / "x.json").exists()
    assert not (tmp_path / "ran").exists()


def test_a_report_s_name_ends_in_json_whatever_it_looks_like(ckpt, tmp_path):
    flags = ["probe", "--ckpt", ckpt, "--num", 40]
    assert run(evaluate, *flags, "--out", tmp_path / "x-2.5") == 0
    assert [file.name for file in tmp_path.iterdir()] == ["x-2.5.json"]


# ------------------------------------------------------------------- a GPU's path, without a GPU


class NeverWaits(TorchDispatchMode):
    """Fails where an operation makes the host wait for a GPU, or moves data between devices.

    Reading a number (`.item()`, `if tensor:`) and sizes that depend on data (`nonzero`) wait.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        assert "local_scalar_dense" not in name, f"{name} waits for the GPU"
        assert "nonzero" not in name, f"{name} waits for the GPU"
        if "copy" in name:
            tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
            devices = {x.device.type for x in tensors}
            assert len(devices) == 1, f"{name} moves data between {devices}"
        return result


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors on "cuda" without memory, on a machine without a GPU; autocast takes it for real."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this PyTorch is built without CUDA")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **flags: True)
    with FakeTensorMode():
        yield


def fake_batch(n: int) -> tuple:
    """-> x0, x1 (n, C, H, W), t, y (n,) on the fake GPU."""
    shape = (n, TINY.latent_channels, TINY.latent_size, TINY.latent_size)
    x0 = torch.empty(shape, device="cuda")
    x1 = torch.empty(shape, device="cuda")
    t = torch.empty(n, device="cuda")
    y = torch.empty(n, dtype=torch.long, device="cuda")
    return x0, x1, t, y


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_training_step_stays_on_the_gpu_and_never_waits_for_it(dtype, fake_gpu, monkeypatch):
    with torch.device("cuda"):
        dod = DoD(TINY)
        ema = DoD(TINY).requires_grad_(False)
    optimizer = torch.optim.AdamW(dod.parameters(), 1e-4, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    assert scaler.is_enabled() == (dtype == torch.float16)

    # PyTorch's engine cannot run backwards without a real GPU; it reads no values in any case.
    def backward(loss):
        assert loss.device.type == "cuda"
        for p in dod.parameters():
            p.grad = torch.empty_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)

    # Two micro-batches, with which a prior is kept decided beforehand; then the second step, whose
    # optimizer state exists already.
    keep = [torch.empty(2, dtype=torch.long, device="cuda") for _ in range(2)]
    for step in (1, 2):
        with NeverWaits():
            losses, norm = train.training_step(
                dod, ema, optimizer, scaler, fake_batch(8), keep, step, dtype
            )
    assert losses.device.type == "cuda"
    assert norm.device.type == "cuda"
    assert losses.dtype == torch.float32


def test_the_backward_pass_reads_no_values_either():
    # On the CPU this time, where the engine runs: no operation of a real step reads a number.
    torch.manual_seed(0)
    dod = DoD(TINY)
    optimizer = torch.optim.AdamW(dod.parameters(), 1e-4, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    x0 = torch.randn(4, TINY.latent_channels, TINY.latent_size, TINY.latent_size)
    batch_ = (x0, torch.randn_like(x0), torch.rand(4), torch.arange(4))
    with NeverWaits():
        train.training_step(dod, DoD(TINY), optimizer, scaler, batch_, [torch.tensor([0, 2])], 1)


def test_sampling_by_euler_stays_on_the_gpu_and_never_waits_for_it(fake_gpu):
    with torch.device("cuda"):
        dod = DoD(TINY)
    x0, z1, _, y = fake_batch(4)
    with torch.no_grad(), NeverWaits():
        e_s = dod.visual_prior(x0)
        z0, _, guided = sample.sample_stage(dod, z1, y, e_s, 2.0, solver="euler", steps=3)
    assert z0.device.type == "cuda"
    assert guided.device.type == "cuda"


# ------------------------------------------------------------------------- the weights in the box


def test_the_shipped_weights_are_what_the_readme_s_command_made_and_show_the_paper_s_effect():
    # Small enough for a repository, readable without running code, and they say what they are.
    assert sample.SHIPPED.stat().st_size < 4e6
    checkpoint = sample.load_checkpoint(sample.SHIPPED)
    assert checkpoint["step"] == 5000
    assert checkpoint["seed"] == 0
    assert Config(**checkpoint["config"]) == CONFIGS["DoD-Ti"]
    assert not set(sample.TRAINING_ONLY) & set(checkpoint)
    assert "OMP_NUM_THREADS=1 python train.py --steps 20000 --keep-every 1250" in README.read_text()

    # A classifier of real letters judges 200 samples of each stage.
    training, _, fingerprint = train.load_data("letters", 16, 1, 0.1)
    assert checkpoint["fingerprint"] == fingerprint
    judge = evaluate.build_classifier(16, 1, 10)
    images, y = evaluate.first(training, 3000)
    evaluate.fit(judge, images, y, steps=150)
    judge.eval()
    y = torch.arange(200) % 10
    samples = sample.generate(sample.load_model(checkpoint), y, 2, solver="euler", steps=10)
    recognised = []
    for z0 in samples:
        pictures = sample.Codec().decode(z0).float() / 127.5 - 1
        recognised.append((judge(pictures).argmax(1) == y).double().mean().item())
    assert recognised[1] > 0.6
    assert recognised[1] >= 1.15 * recognised[0]


# ------------------------------------------------------------------ the README keeps its word


@pytest.mark.parametrize("script", [train, sample])
def test_torchrun_leaves_every_flag_to_the_script(script, capsys):
    from torch.distributed.run import get_args_parser

    # Every flag that --help names.
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    flags = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    assert len(flags) > 20

    # torchrun would refuse an ambiguous abbreviation of its own flags. --num is one, of --nproc...
    # and --nnodes; therefore --number says the same.
    for flag in flags - {"--num"}:
        argv = [f"{script.__name__}.py", flag]
        assert get_args_parser().parse_args(argv).training_script_args == [flag]


def test_every_command_of_the_readme_parses():
    # Commands in code blocks and in prose; "..." stands for flags that are left out.
    launch = r"(?:python|torchrun[^\n`]*?) (train|sample|evaluate)\.py([^\n`#&]*)"
    commands = re.findall(launch, README.read_text())
    assert len(commands) > 8
    assert len({script for script, _ in commands}) == 3
    for script, flags in commands:
        if flags.strip() and "..." not in flags:
            PROGRAMS[f"{script}.py"].parse(flags.split())


def test_the_readme_s_code_blocks_open_and_close_at_the_beginning_of_a_line():
    # A fence behind text does not open a block, and would turn all that follows inside out.
    text = README.read_text()
    assert text.count("```") == len(re.findall(r"^```\w*$", text, re.MULTILINE))
    assert text.count("```") % 2 == 0


def test_every_row_of_the_readme_s_map_exists():
    # Each function, class and test that a row names exists.
    table = README.read_text().split("## Paper → code → test")[1].split("\n## ")[0]
    rows = re.findall(r"^(?:Eq|Table|Fig|Sec).*", table, re.MULTILINE)
    assert len(rows) > 11
    tests = Path(__file__).read_text()
    for row in rows:
        for file, name in re.findall(r"`(\w+\.py)` `([\w.]+)`", row):
            last = name.split(".")[-1]
            assert re.search(rf"(def|class) {last}\b", (HERE / file).read_text()), (file, name)
        for test in re.findall(r"`(test_\w+)`", row):
            assert f"def {test}(" in tests, test

    # Each equation is in the map, and cited in the code that computes it.
    source = "".join((HERE / file).read_text() for file in PROGRAMS)
    for number in range(1, 12):
        assert any(row.startswith(f"Eq. {number},") for row in rows), number
        assert re.search(rf"Eqs?\. (\d+(,| and|-) ?)*{number}\b", source), number


def test_the_readme_lists_every_choice_and_deviation_of_the_code():
    # A mark belongs to the top-level class, function or constant that holds it or comes next.
    marks = Counter()
    for file in PROGRAMS:
        lines = (HERE / file).read_text().splitlines()
        statements = ast.parse("\n".join(lines)).body
        for number, line in enumerate(lines, start=1):
            for kind in re.findall(r"\b(CHOICE|DEVIATION):", line):
                holder = next(node for node in statements if node.end_lineno >= number)
                name = re.match(r"(?:def |class )?(\w+)", lines[holder.lineno - 1]).group(1)
                marks[file, name, kind] += 1
    assert sum(marks.values()) > 30

    # The README has a line for each of them, below the name of its file: - `name` CHOICE: text
    section = README.read_text().split("## Deviations and choices")[1].split("\n## ")[0]
    listed = Counter()
    for line in section.splitlines():
        if heading := re.fullmatch(r"`(\w+\.py)`", line):
            file = heading.group(1)
        if entry := re.match(r"- `(\w+)` (CHOICE|DEVIATION): \S", line):
            listed[file, entry.group(1), entry.group(2)] += 1
    assert listed == marks


# --------------------------------------------------------------------- python test_dod.py: speed


def timed(function, device: torch.device) -> float:
    """Seconds of one call, with a GPU's work finished."""
    began = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def benchmark_training(args, device: torch.device) -> None:
    """Our step, the reference step and a large matrix product, in turn; medians of five.

    In turn, so that a disturbance hits them all alike. GMACs are Table 4's: linear layers, forward,
    for one image; a training step costs three times that.
    """
    config = CONFIGS[args.model]
    B = args.batch_size
    shape = (B, config.latent_channels, config.latent_size, config.latent_size)
    torch.manual_seed(0)
    dod = DoD(config).to(device)
    ema = DoD(config).to(device).requires_grad_(False)
    optimizer = torch.optim.AdamW(dod.parameters(), 1e-4, fused=True)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if args.compile:
        train.compile_blocks(dod, device)
    x0 = torch.randn(shape, device=device)
    x1 = torch.randn(shape, device=device)
    y = torch.arange(B, device=device) % config.num_classes
    batch_ = (x0, x1, flow.logit_normal(B, device=device), y)
    kept = [i for i, keeps in enumerate(flow.keeps_prior(B, 0.5)) if keeps and config.N]
    keep = [torch.tensor(kept, dtype=torch.long, device=device)]

    def step() -> None:
        train.training_step(dod, ema, optimizer, scaler, batch_, keep, 1, dtype)

    def reference_step() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "rectified_flow_loss", reference_loss)
            step()

    side = 3072 if device.type == "cpu" else 8192
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    calls = {"ours": step, "matrix": lambda: matrix @ matrix}
    if config.N:
        calls["reference"] = reference_step
    times = {name: [] for name in calls}
    for _ in range(6):
        for name, call in calls.items():
            times[name].append(timed(call, device))
    times = {name: np.array(seconds[1:]) for name, seconds in times.items()}  # the first warms up

    # What a device achieves on its best case is the measure of the share.
    rate = 2 * side**3 / np.median(times["matrix"])
    print(f"{args.model}, batch {B}, {args.precision}, {device}; medians of 5")
    print(f"matrix product {side} x {side}: {rate / 1e9:.0f} GFLOP/s, the whole of 'share'")
    macs = model.training_macs(config)
    for name, key in (("ours", "ours"), ("reference", "naive")):
        if name in times:
            seconds = np.median(times[name])
            flops = 3 * 2 * macs[key] * B / seconds
            print(f"{name:10}{seconds:8.3f} s/step {B / seconds:9.2f} images/s ", end="")
            print(f"{macs[key] / 1e9:8.4g} GMACs/image   share {flops / rate:.0%}")
    if config.N:
        ratio = np.median(times["ours"] / times["reference"])
        print(f"ours / reference: {ratio:.3f} of the time, ", end="")
        print(f"{macs['ours'] / macs['naive']:.3f} of the GMACs")
    if device.type == "cuda":
        print(f"memory: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")


def benchmark_sampling(args, device: torch.device) -> None:
    """Images/s through two stages with both solvers, of a model with random weights."""
    config = CONFIGS[args.model]
    dod = DoD(config).to(device).eval()
    y = torch.arange(args.batch_size, device=device) % config.num_classes
    stages = 2 if config.N else 1
    for solver in ("euler", "dopri5"):
        nfe = []

        def draw(solver=solver, nfe=nfe):
            sample.generate(dod, y, stages, solver=solver, steps=20, nfe=nfe)

        seconds = timed(draw, device)
        spent = ", ".join(f"{n[:, 0].double().mean():.1f}" for n in nfe)
        print(f"{solver:8}{args.batch_size / seconds:9.2f} images/s, {stages} stages; ", end="")
        print(f"evaluations per picture: {spent}")


def benchmark_frechet() -> None:
    """frechet_distance against the route through scipy.linalg.sqrtm, for 2048 features, in turn."""
    rng = np.random.default_rng(0)
    mu1 = rng.standard_normal(2048)
    mu2 = rng.standard_normal(2048)
    sigma1 = np.cov(rng.standard_normal((4096, 2048)).T)
    sigma2 = np.cov(rng.standard_normal((4096, 2048)).T)
    ours = []
    theirs = []
    for _ in range(3):
        began = time.perf_counter()
        distance = evaluate.frechet_distance(mu1, sigma1, mu2, sigma2)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        root = sqrtm(sigma1 @ sigma2).real
        reference = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
        theirs.append(time.perf_counter() - began)
    print(
        f"Fréchet distance: {np.median(ours):.2f} s; by sqrtm {np.median(theirs):.2f} s, ", end=""
    )
    print(f"{np.median(theirs) / np.median(ours):.1f} times as long; ", end="")
    print(f"relative difference {abs(distance / reference - 1):.0e}")


def main() -> None:
    """Times the training step, sampling and the Fréchet distance."""
    parser = sample.Parser(description=main.__doc__)
    parser.add_argument("--model", choices=CONFIGS, default="DoD-Ti", help="preset")
    parser.add_argument("--batch-size", type=sample.at_least(int, 2), default=64, help="images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    precisions = ["auto", "fp32", "bf16", "fp16"]
    parser.add_argument("--precision", choices=precisions, default="auto", help="of autocast")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    args = parser.parse_args(sys.argv[1:])
    device = sample.pick_device(args.device)
    args.precision = train.resolve_precision(args.precision, device)
    benchmark_training(args, device)
    benchmark_sampling(args, device)
    benchmark_frechet()


if __name__ == "__main__":
    sample.run_command(main)
