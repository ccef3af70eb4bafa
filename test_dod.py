"""test_dod.py -- one test or more per equation, table and promise. Run: python -m pytest -q

The truths are exact where they can be: closed forms, identities, SciPy. Tests are named after what
the paper says; the README's map lists them beside the equations.
"""

import itertools
import json
import math
import pickle
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
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
from torch.utils.data import Subset, default_collate

import evaluate
import flow
import lem
import model
import sample
import train
from model import CONFIGS, Config, DoD

HERE = Path(__file__).parent
TINY = Config(
    depth=2, d=32, heads=2, r=4, encoder_depth=1, decoder_depth=1, d_l=16, lem_heads=2, N=3, d_e=8,
    p=2, latent_size=8, latent_channels=3, num_classes=5,
)  # fmt: skip


def awake(config: Config = TINY, seed: int = 0) -> DoD:
    """A DoD whose zero-initialised layers are not zero, so that every input matters."""
    torch.manual_seed(seed)
    dod = DoD(config)
    for p in dod.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return dod.eval()


def batch(n: int = 6, config: Config = TINY, seed: int = 0):
    """-> x0, x1 (n, C, H, W), y, t (n,)."""
    g = torch.Generator().manual_seed(seed)
    shape = (n, config.latent_channels, config.latent_size, config.latent_size)
    x0, x1 = torch.randn(2, *shape, generator=g)
    return x0, x1, torch.arange(n) % config.num_classes, torch.rand(n, generator=g)


def close(a, b, tolerance: float = 1e-5) -> bool:
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)


def torchrun(n: int, script: str, *argv) -> subprocess.CompletedProcess:
    """A script on n processes of this machine, each with one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={n}", HERE / script, *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def run(module, *argv: str) -> int:
    """A script's command in this process -> its exit status."""
    before, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, argv)]
    try:
        sample.run_command(module.main)
        return 0
    except SystemExit as leave:
        return leave.code
    finally:
        sys.argv = before


# ------------------------------------------------------------------ Eqs. 1-4, 11: rectified flow


def test_eq1_the_path_joins_data_and_noise_at_constant_velocity():
    x0, x1, _, t = batch()
    assert torch.equal(flow.interpolate(x0, x1, torch.zeros(6)), x0)
    assert torch.equal(flow.interpolate(x0, x1, torch.ones(6)), x1)
    step = flow.interpolate(x0, x1, t + 0.25) - flow.interpolate(x0, x1, t)
    assert close(step / 0.25, x1 - x0)


def test_eq2_and_eq4_euler_is_exact_on_straight_paths_and_counts_its_evaluations():
    x0, x1, _, _ = batch()
    for steps in (1, 3, 10):
        found, nfe = flow.euler(lambda x, t, rows: (x1 - x0)[rows], x1, steps)
        assert close(found, x0) and nfe.tolist() == [steps] * 6
    with pytest.raises(ValueError, match="at least 1"):
        flow.euler(lambda x, t, rows: x, x1, 0)


def test_eq3_the_loss_is_zero_for_the_true_velocity_and_known_for_none():
    x0, x1, y, t = batch(4000)
    truth = lambda x_t, t, y, e_s: (x1 - x0) * 1  # noqa: E731
    assert flow.rectified_flow_loss(truth, x0, y, x1, t, [False] * 4000).max() == 0
    # A fresh DoD says v = 0: the loss is |x_1 - x_0|^2, on average 1 + |x_0|^2 = 2 here.
    loss = flow.rectified_flow_loss(DoD(TINY), x0[:6], y[:6], x1[:6], t[:6], [True, False] * 3)
    assert close(loss, (x1 - x0)[:6].square().flatten(1).mean(1))
    nothing = lambda x_t, t, y, e_s: torch.zeros_like(x_t)  # noqa: E731
    assert abs(flow.rectified_flow_loss(nothing, x0, y, x1, t, [False] * 4000).mean() - 2) < 0.02


def test_eq3_each_image_sees_its_own_prior_or_the_sample_token():
    dod, (x0, x1, y, t), keep = awake(), batch(7), [True, False, False, True, True, False, True]
    loss = flow.rectified_flow_loss(dod, x0, y, x1, t, keep)
    assert close(loss, flow.naive_loss(dod, x0, y, x1, t, keep))
    for i, kept in enumerate(keep):
        e_s = dod.visual_prior(x0[i : i + 1]) if kept else None
        v = dod(flow.interpolate(x0, x1, t)[i : i + 1], t[i : i + 1], y[i : i + 1], e_s)
        assert close(loss[i], (x1[i] - x0[i] - v[0]).square().mean())


def oscillator(x, t, rows=None):
    """dx/dt = A x + sin(5 t): smooth, and stiff enough to make steps differ between images."""
    A = torch.tensor([[0.0, 3.0], [-3.0, -0.5]], dtype=x.dtype)
    return x @ A.T + torch.sin(5 * t)[:, None]


def test_eq4_rk45_reaches_closed_forms():
    x1 = torch.randn(5, 3, 2, dtype=torch.float64)
    for f, exact in [
        (lambda x, t, rows: x, x1 * math.exp(-1)),
        (lambda x, t, rows: 3 * t[:, None, None] ** 2 + 0 * x, x1 - 1),
        (lambda x, t, rows: x.square() * 0 + (x1[rows] - 1), torch.ones_like(x1)),
    ]:
        assert close(flow.dopri5(f, x1, 1e-9, 1e-9)[0], exact, 1e-7)


def test_eq4_rk45_equals_scipy_for_each_image_in_result_and_evaluations():
    x1 = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x1[3] = 0  # takes another branch of Hairer's first step
    ring = flow.mixture_velocity(torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=torch.float64), 0.1)
    jolt = lambda x, t, rows: 60 * x * torch.sigmoid(300 * (0.5 - t))[:, None]  # noqa: E731
    for f in (oscillator, ring, jolt):
        for rtol, atol in ((1e-3, 1e-6), (1e-7, 1e-9)):
            x0, nfe = flow.dopri5(f, x1, rtol, atol)
            for i in range(8):
                g = lambda t, x: f(torch.tensor(x)[None], torch.tensor([t]), None)[0].numpy()  # noqa: E731, B023
                scipy = solve_ivp(g, (1, 0), x1[i].numpy(), "RK45", rtol=rtol, atol=atol)
                assert scipy.nfev == nfe[i]
                assert np.abs(scipy.y[:, -1] - x0[i].numpy()).max() < 1e-7


def test_eq4_rk45_is_of_order_five_and_its_error_estimate_too():
    errors, estimates = [], []
    x1, rows = torch.ones(1, 2, dtype=torch.float64), torch.arange(1)
    exact, _ = flow.dopri5(oscillator, x1, 1e-13, 1e-13)
    for n in (16, 32, 64):
        x, t, h = x1, torch.ones(1, dtype=torch.float64), torch.full((1,), 1 / n).double()
        k = oscillator(x, t)
        for i in range(n):
            x, estimate, k = flow.rk45_step(oscillator, x, t - i * h, h, k, rows)
            if i == 0:
                estimates.append(estimate.norm().item())
        errors.append((x - exact).norm().item())
    assert 4.7 < math.log2(errors[0] / errors[1]) < 5.5 > math.log2(errors[1] / errors[2]) > 4.7
    assert 4.7 < math.log2(estimates[1] / estimates[2]) < 5.5  # of one step: O(h^5)


def test_eq4_rk45_does_not_depend_on_the_batch_and_stays_within_0_and_1():
    x1 = torch.randn(6, 2, dtype=torch.float64) * torch.arange(1, 7)[:, None] ** 2
    seen = []

    def f(x, t, rows):
        seen.append(t)
        return oscillator(x, t).sin() * (1 + rows[:, None])

    x0, nfe = flow.dopri5(f, x1)
    assert torch.cat(seen).min() == 0 and torch.cat(seen).max() == 1 and nfe.unique().numel() > 1
    for i in range(6):
        alone, n = flow.dopri5(lambda x, t, rows, i=i: f(x, t, rows + i), x1[i : i + 1])
        assert close(alone[0], x0[i], 1e-12) and n == nfe[i]


def test_eq4_solvers_stop_when_the_velocity_is_not_finite_or_the_step_vanishes():
    x1 = torch.ones(2, 3, dtype=torch.float64)
    for solver in (flow.dopri5, lambda f, x: flow.euler(f, x, 9)):
        with pytest.raises(FloatingPointError, match="not finite"):
            solver(lambda x, t, rows: x / (t > 0.5)[:, None], x1)
    rng = np.random.default_rng(0)
    with pytest.raises(FloatingPointError, match="too small"):
        flow.dopri5(lambda x, t, rows: torch.from_numpy(rng.normal(size=x.shape) * 1e30), x1)
    for dtype, huge in ((torch.float32, 1e25), (torch.float64, 1e200)):  # squares overflow
        with pytest.raises(FloatingPointError):
            flow.dopri5(lambda x, t, rows, huge=huge: torch.full_like(x, huge), x1.to(dtype))


def test_eq11_times_are_logit_normal():
    t = flow.logit_normal(200_000, np.random.default_rng(0)).double()
    assert 0 < t.min() and t.max() < 1
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    expected = torch.special.ndtri(quantiles).sigmoid()
    assert close(t.quantile(quantiles), expected, 4e-3)


@pytest.mark.parametrize("p_s", [0, 0.25, 0.5, 0.75, 0.9, 1])
def test_section_3_3_exactly_p_s_of_a_batch_lose_their_prior(p_s):
    for n in (1, 2, 5, 8, 63, 64, 256):
        keep = flow.keeps_prior(n, p_s)
        assert len(keep) == n and n - sum(keep) == round(p_s * n)
        for part in (keep[: n // 2], keep[n // 3 :]):  # so does every contiguous share of it
            assert abs((len(part) - sum(part)) - p_s * len(part)) <= 1


def test_guidance_is_off_at_1_linear_in_w_and_refused_below_1():
    v_c, v_u = torch.randn(2, 4, 3, 2, 2)
    assert close(flow.guide(v_c, v_u, 1), v_c)
    assert close(flow.guide(v_c, v_u, 5.5), 5.5 * v_c - 4.5 * v_u)
    for w in (0.99, -1, float("nan")):
        with pytest.raises(ValueError, match="at least 1"):
            flow.guide(v_c, v_u, w)


# ------------------------------------------------------------------ Eqs. 5-10: the model


def test_eq5_first_stage_uses_the_sample_token():
    dod, (_, x_t, y, t) = awake(), batch()
    no_prior = dod(x_t, t, y)
    S = dod.S.expand(6, TINY.num_tokens, -1)
    assert close(no_prior, dod(x_t, t, y, S))  # c per image equals c per token
    assert close(no_prior, dod(x_t, t, y, dod.S.expand(6, 1, -1)))
    no_prior.sum().backward()
    assert dod.S.grad.abs().sum() > 0 and dod.lem.mask_token.grad is None
    dod.S.data += 1
    assert not close(no_prior, dod(x_t, t, y))
    e_s = dod.visual_prior(x_t)
    with_prior = dod(x_t, t, y, e_s)
    dod.S.data += 1
    assert torch.equal(with_prior, dod(x_t, t, y, e_s))  # with a prior S plays no part


def test_eq5_the_prior_conditions_each_token_and_class_and_time_matter():
    dod, (x0, x_t, y, t) = awake(), batch()
    e_s = dod.visual_prior(x0)
    assert e_s.shape == (6, TINY.num_tokens, TINY.d)
    v = dod(x_t, t, y, e_s)
    others = [dod(x_t, t, y, e_s.roll(1, 1)), dod(x_t, t, y.roll(1), e_s), dod(x_t, t / 2, y, e_s)]
    assert not any(close(v, other) for other in others)
    assert v.shape == x_t.shape and len(dod.label.weight) == TINY.num_classes + 1


def test_eq6_eq7_all_that_passes_is_n_times_d_e_numbers():
    dod, (x0, _, _, _) = awake(), batch()
    l_hat = dod.lem.encode(x0)
    assert l_hat.shape == (6, TINY.N, TINY.d_e)
    dod.lem.encode = lambda z: l_hat  # whatever the picture, equal tokens give an equal prior
    assert torch.equal(dod.visual_prior(x0), dod.visual_prior(x0.flip(0)))


def test_eq6_eq7_gradients_reach_every_part_of_lem():
    dod, (x0, x1, y, t) = awake(), batch()
    flow.rectified_flow_loss(dod, x0, y, x1, t, flow.keeps_prior(6, 0.5)).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dod.parameters())


def test_eq6_eq7_positions_are_frozen_sines_and_cosines():
    pe = lem.sincos_2d(16, 3, 5)
    for row in range(3):
        for column in range(5):
            w = 10000.0 ** (-np.arange(4) / 4)
            expected = [f(i * w) for i in (row, column) for f in (np.sin, np.cos)]
            assert np.allclose(pe[row * 5 + column], np.concatenate(expected), atol=1e-6)
    names = [name for name, _ in DoD(TINY).named_parameters()]
    assert not any("pos_" in name for name in [*names, *DoD(TINY).state_dict()])
    with pytest.raises(ValueError, match="multiple of 4"):
        lem.sincos_2d(6, 2, 2)


def test_eq6_the_encoder_knows_where_a_patch_is_and_gives_out_the_latent_tokens():
    enc, (x0, _, _, _) = awake().lem, batch()
    moved = x0.roll(TINY.p, -1)  # the same patches elsewhere
    assert not close(enc.encode(x0), enc.encode(moved), 1e-3)
    enc.pos_encoder.zero_()
    assert close(enc.encode(x0), enc.encode(moved))
    enc.encoder = torch.nn.Identity()  # without attention the tokens L learn nothing of the patches
    L_hat = enc.to_d_e(enc.encoder_norm(enc.latent_tokens))
    assert close(enc.encode(x0), L_hat.expand(6, -1, -1))


def test_eq7_without_positions_all_patches_would_be_alike():
    dod, (x0, _, _, _) = awake(), batch()
    assert dod.lem(x0).std(1).min() > 0
    dod.lem.pos_decoder.zero_()
    assert dod.lem(x0).std(1).max() < 1e-5


def test_eq8_swiglu_is_the_written_out_formula():
    ffn, x = model.SwiGLU(12), torch.randn(5, 12)
    (W, b), (V, c), (U, d) = ((m.weight, m.bias) for m in (ffn.W_1, ffn.W_2, ffn.W_3))
    gate = x @ W.T + b
    assert W.shape == (32, 12)
    assert close(ffn(x), (gate * gate.sigmoid() * (x @ V.T + c)) @ U.T + d)


def test_eq9_attention_is_the_written_out_formula_with_the_scale_1_over_sqrt_d_k():
    attention, x = model.Attention(16, 2), torch.randn(3, 9, 16) * 100
    cos, sin = model.rope_2d(8, 3)
    q, k, v = attention.qkv(x).reshape(3, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = (model.rotate(F.layer_norm(u, [8], eps=1e-6), cos, sin) for u in (q, k))
    logits = q @ k.transpose(-1, -2) / math.sqrt(8)
    assert logits.abs().max() <= math.sqrt(8) + 1e-4  # LN bounds |q| and |k| by sqrt(d_k)
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(3, 9, 16)
    assert close(attention(x, cos, sin), attention.proj(out), 1e-3)


def test_eq9_rope_depends_on_relative_rows_and_columns_only():
    cos, sin = model.rope_2d(16, 6)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 36, 16)
    dots = (model.rotate(q, cos, sin) @ model.rotate(k, cos, sin).transpose(-1, -2))[0, 0]
    dots = dots.reshape(6, 6, 6, 6)  # (row, column) of q, (row, column) of k
    assert close(dots[0, 0, 2, 1], dots[3, 4, 5, 5]) and close(dots[4, 2, 1, 3], dots[5, 1, 2, 2])
    rows, columns = cos.reshape(6, 6, 2, 4).unbind(2)  # half of the channel pairs each
    w = 10000.0 ** (-torch.arange(4) / 4)
    assert close(rows, (torch.arange(6)[:, None] * w).cos()[:, None].expand(6, 6, 4))
    assert close(columns, rows.transpose(0, 1))
    assert close(model.rotate(q, cos, sin).norm(dim=-1), q.norm(dim=-1))


def test_eq10_modulation_is_a_shared_part_plus_a_block_s_part_of_rank_r():
    dod, seen = awake(), []
    for block in dod.blocks:
        block.register_forward_hook(lambda b, inputs, _: seen.append((b, inputs)))
    _, x_t, y, t = batch(40)
    dod(x_t, t, y)
    (first, (_, silu_c, global_S, *_)), (second, inputs) = seen
    assert inputs[2] is global_S and close(global_S, dod.W_g(silu_c))  # W^g c, computed once
    for block in (first, second):
        own = block.W_2(block.W_1(silu_c))[:, 0] - block.W_2.bias
        own = own - own.mean(0)
        assert torch.linalg.matrix_rank(own, rtol=1e-4) <= TINY.r < 40
    assert not close(first.W_2.weight, second.W_2.weight)


def test_eq10_the_order_is_shifts_scales_gates():
    block, d = model.Block(TINY), TINY.d
    x, cos_sin = torch.randn(2, 16, d), model.rope_2d(16, 4)
    S = torch.randn(2, 1, 6 * d)
    beta_1, beta_2, gamma_1, gamma_2, alpha_1, alpha_2 = S.reshape(2, 1, 6, d).unbind(2)
    for p in (*block.W_1.parameters(), *block.W_2.parameters()):
        p.data.zero_()
    norm = lambda u: F.layer_norm(u, [d], eps=1e-6)  # noqa: E731
    h = x + alpha_1 * block.attention(norm(x) * (1 + gamma_1) + beta_1, *cos_sin)
    expected = h + alpha_2 * block.ffn(norm(h) * (1 + gamma_2) + beta_2)
    assert close(block(x, torch.zeros(2, 1, d), S, *cos_sin), expected, 1e-4)


def test_table1_parameters():
    paper = {"DoD-S": (27, 21), "DoD-B": (105, 86), "DoD-XL": (527, 86)}
    paper |= {"FiTv2-B": (128, 0), "FiTv2-XL": (671, 0)}
    for name, expected in paper.items():
        assert tuple(round(n / 1e6) for n in model.count_parameters(CONFIGS[name])) == expected
    built = sum(p.numel() for p in DoD(TINY).parameters())
    assert sum(model.count_parameters(TINY)) == built


def test_table4_compute():
    giga = {name: n / 1e9 for name, n in model.count_macs(CONFIGS["DoD-B"]).items()}
    assert round(giga["lem"], 1) == 24.6 and round(giga["e_s"], 1) == 26.4
    assert round(giga["s"], 1) == 21.8
    evaluations = 30 * giga["s"] + 30 * (giga["s"] + giga["e_s"] - giga["prior_mlp"])
    assert evaluations + giga["lem"] + giga["prior_mlp"] <= 2116  # the paper: 2409.6
    assert abs(model.count_macs(CONFIGS["FiTv2-B"])["s"] / 1e9 - 27.3) < 0.1


def test_any_size_channels_and_classes_work_and_bad_sizes_are_refused():
    for size, channels, classes, p in ((4, 1, 2, 1), (12, 5, 3, 4), (10, 3, 1, 5)):
        config = replace(TINY, latent_size=size, latent_channels=channels, num_classes=classes, p=p)
        x, _, y, t = batch(2, config)
        dod = awake(config)
        assert dod(x, t, y, dod.visual_prior(x)).shape == x.shape
        assert torch.equal(dod.unpatchify(lem.patchify(x, p)), x)
    for wrong in (dict(p=3), dict(depth=0), dict(heads=3), dict(d_e=6), dict(lem_heads=5)):
        with pytest.raises(model.UserError):
            replace(TINY, **wrong)
    fit = DoD(replace(TINY, N=0))
    with pytest.raises(model.UserError, match="stage 1 only"):
        fit.visual_prior(batch()[0])


# ------------------------------------------------------------------ training, sections 3.3 and 4.1

QUICK = ["--data", "digits", "--batch-size", "8", "--log-every", "2", "--device", "cpu"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished run of six steps on the digits."""
    out = tmp_path_factory.mktemp("run") / "digits"
    assert run(train, *QUICK, "--steps", 6, "--out", out) == 0
    return out


def small_run(**flags) -> train.Run:
    args = train.parse(QUICK)
    vars(args).update(flags)
    return train.Run(args, TINY)


def test_section_4_1_ema_is_the_written_out_average_with_warm_up():
    ema, dod = awake(seed=1), awake(seed=2)
    a, b = ema.W_g.weight.clone(), dod.W_g.weight
    train.ema_update(ema, dod, 5)
    assert close(ema.W_g.weight, 6 / 15 * a + 9 / 15 * b)
    a = ema.W_g.weight.clone()
    train.ema_update(ema, dod, 10**6)
    assert close(ema.W_g.weight, 0.999 * a + 0.001 * b, 1e-7)


def test_classes_drop_at_their_rate_independently_of_the_prior_and_pictures_flip():
    args = train.parse([*QUICK, "--class-dropout", "0.1", "--flip"])
    ramp = Image.fromarray(np.arange(8, dtype=np.uint8)[None].repeat(8, 0))
    pictures = train.Pictures(["a"], [0], lambda i: ramp, [0], 8, 3)
    examples = train.Examples(pictures, args, TINY)
    images, eps, x1, y, t = default_collate([examples[3, i, 0] for i in range(4000)])
    dropped, keep = y == TINY.num_classes, torch.tensor(flow.keeps_prior(4000, 0.5))
    for group in (dropped, dropped[keep], dropped[~keep]):
        assert abs(group.double().mean() - 0.1) < 0.02
    flipped = images[:, 0, 0, 0] == 7
    assert abs(flipped.double().mean() - 0.5) < 0.03 and 0 < t.min() and t.max() < 1
    for noise in (x1, eps):
        assert abs(noise.std() - 1) < 0.01 and abs(noise.mean()) < 0.01
    assert abs((x1 * eps).mean()) < 0.01
    assert all(map(torch.equal, examples[3, 5, 0][:3], (images[5], eps[5], x1[5])))
    assert not torch.equal(x1[5], examples[4, 5, 0][2])  # a function of (seed, step, position)


def test_batches_are_seeded_permutations_and_start_anywhere():
    whole = list(train.batches(10, 4, 7, range(1, 11)))
    assert [item[:2] for item in whole[2]] == [(3, position) for position in range(4)]
    seen = [i for items in whole for _, _, i in items]
    assert all(sorted(seen[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))
    assert seen[:10] != seen[10:20] and list(train.batches(10, 4, 7, range(7, 11))) == whole[6:]
    wide = [i for _, _, i in next(train.batches(3, 8, 7, range(1, 2)))]
    assert sorted(wide[:3]) == [0, 1, 2]  # a batch beyond the data set


def test_one_batch_can_be_learned_by_heart():
    run, (x0, x1, y, t) = small_run(lr=3e-3, warmup=10), batch(8)
    given = lambda scale: (scale * torch.stack([x0, 0 * x0], 1), x1, scale * x1, y, t)  # noqa: E731
    _, norm = run.step(1, *given(100))  # a gradient that must be clipped to length 1
    clipped = torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm()
    assert norm > 10 and close(clipped, 1.0, 1e-3)
    losses = [run.step(n, *given(1))[0].mean().item() for n in range(1, 300)]
    assert np.mean(losses[-5:]) < losses[0] / 10
    before = run.ema.W_g.weight.clone()
    run.step(5, *given(1))  # each step ends with the EMA's
    assert close(run.ema.W_g.weight, before.lerp(run.model.W_g.weight, 9 / 15))
    assert run.optimizer.param_groups[0]["lr"] == 3e-3 * 5 / 10  # warming up


def test_gradients_are_the_same_in_micro_batches_checkpointed_compiled_and_near_in_bf16_and_fp16(
    monkeypatch,
):
    traced = partial(torch.compile, backend="eager")  # all but the C++ compiler
    monkeypatch.setattr(torch, "compile", traced)
    (x0, x1, y, t), gradients, streams = batch(8), {}, []
    cases = {"plain": {}, "accum": dict(grad_accum=4), "checkpoint": dict(grad_checkpoint=True)}
    cases |= {"compile": dict(compile=True, grad_checkpoint=True)}
    cases |= {"bf16": dict(precision="bf16"), "fp16": dict(precision="fp16")}
    for name, flags in cases.items():
        run = small_run(p_s=0.25, **flags)
        run.model.load_state_dict(awake().state_dict())
        compiled = [m for m in run.model.modules() if m._compiled_call_impl]
        assert len(compiled) == (4 if name == "compile" else 0)  # 2 blocks, 2 of LEM
        for block in (*run.model.blocks, *run.model.lem.encoder, *run.model.lem.decoder):
            block.register_forward_hook(lambda b, inputs, out: streams.append((inputs[0], out)))
        loss, norm = run.step(1, torch.stack([x0, 0 * x0], 1), x1, x1, y, t)
        assert loss.shape == (8,) and loss.dtype == torch.float32
        clipped = torch.cat([p.grad.flatten() for p in run.model.parameters()])
        gradients[name] = clipped * max(norm, 1)
    assert all(x.dtype == torch.float32 for pair in streams for x in pair)  # the residual stream
    tolerances = dict(accum=1e-5, checkpoint=1e-6, compile=1e-5, bf16=0.05, fp16=0.01)
    for name, tolerance in tolerances.items():
        error = (gradients[name] - gradients["plain"]).norm() / gradients["plain"].norm()
        assert error < tolerance and (error > 1e-4) == (name in ("bf16", "fp16")), (name, error)


def test_resuming_equals_never_having_stopped_bit_for_bit(trained, tmp_path, monkeypatch):
    whole = sample.load_checkpoint(trained / "ckpt.pt")
    step = train.Run.step

    def interrupted(self, n, *rest):  # Ctrl-C during step 3: it is finished and saved
        if n == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, n, *rest)

    monkeypatch.setattr(train.Run, "step", interrupted)
    assert run(train, *QUICK, "--steps", 6, "--out", tmp_path) == 130
    monkeypatch.undo()
    assert sample.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 3
    assert not list(tmp_path.glob(".*"))  # no temporary file is left
    assert run(train, *QUICK, "--steps", 6, "--out", tmp_path, "--resume") == 0
    parts = sample.load_checkpoint(tmp_path / "ckpt.pt")
    for part in ("model", "ema"):
        assert all(torch.equal(parts[part][name], whole[part][name]) for name in whole[part])
    for name, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(parts["optimizer"]["state"][name][k], state[k]) for k in state)
    logs = [(out / "log.jsonl").read_text().splitlines() for out in (trained, tmp_path)]
    assert [json.loads(line)["step"] for line in logs[1]] == [2, 3, 4, 6]
    assert json.loads(logs[0][-1])["grad_norm"] == json.loads(logs[1][-1])["grad_norm"]


def test_two_processes_or_micro_batches_train_as_one_process_does(tmp_path):
    # p_s = 0.25 of 8: one of the two processes' micro-batches of 2 keeps every prior.
    flags = [*QUICK, "--p-s", 0.25, "--steps", 3, "--log-every", 3, "--seed", 5]
    assert run(train, *flags, "--out", tmp_path / "1") == 0
    assert run(train, *flags, "--out", tmp_path / "accum", "--grad-accum", 4) == 0
    ended = torchrun(2, "train.py", *flags, "--out", tmp_path / "2", "--grad-accum", 2)
    assert ended.returncode == 0, ended.stderr
    one, *others = (sample.load_checkpoint(tmp_path / k / "ckpt.pt") for k in ("1", "accum", "2"))
    for other in others:
        for part in ("model", "ema"):
            for name, weights in one[part].items():  # lr 2e-3: AdamW moves each by up to 2e-5
                assert torch.allclose(other[part][name], weights, atol=2e-7), name
    records = [json.loads((tmp_path / k / "log.jsonl").read_text()) for k in ("1", "2")]
    for key in ("loss", "loss_by_time", "grad_norm"):
        assert records[0][key] == pytest.approx(records[1][key], rel=1e-4)
    assert {p.name for p in (tmp_path / "2").iterdir()} == {*train.WRITTEN}  # process 0 alone wrote
    more = [*flags[:-2], "--seed", 5, "--steps", 4, "--resume"]
    ended = torchrun(2, "train.py", *more, "--out", tmp_path / "1")
    assert ended.returncode == 0, ended.stderr
    assert sample.load_checkpoint(tmp_path / "1/ckpt.pt")["step"] == 4


def test_when_one_process_fails_all_end_and_its_message_comes_first(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "b/2.png").write_bytes(b"no picture")
    flags = ["--data", tmp_path, "--image-size", 8, "--held-out", 0, "--device", "cpu"]
    flags += ["--batch-size", 2, "--steps", 50, "--out", tmp_path / "out"]
    began = time.time()
    ended = torchrun(2, "train.py", *flags)
    assert ended.returncode and time.time() - began < 60
    error = next(line for line in ended.stderr.splitlines() if "train.py: error: " in line)
    assert "b/2.png is not a readable picture" in error
    assert 'train.py", line' not in ended.stderr  # no traceback of ours; torchrun shows its own


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_stops_all_processes_soon_and_saves(number, tmp_path):
    flags = [*QUICK, "--steps", 10**6, "--workers", 1, "--log-every", 10**6]
    flags += ["--save-every", 10**6, "--out", tmp_path / "a"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [HERE / "train.py", *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(command, env=env, stdout=err, stderr=err)
    while process.poll() is None and not re.search(r" [1-9]\d*/", (tmp_path / "err").read_text()):
        time.sleep(0.1)  # until it trains
    began = time.time()
    process.send_signal(number)
    process.wait()
    text = (tmp_path / "err").read_text()
    assert time.time() - began < 25 and "Traceback" not in text.split("stopped after step")[0]
    step = sample.load_checkpoint(tmp_path / "a/ckpt.pt")["step"]
    assert step % 10 == 0 and f"stopped after step {step};" in text


def test_more_processes_than_pictures_are_refused(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(train, "processes", lambda: (0, 9999))
    assert run(train, *QUICK, "--out", tmp_path) == 2
    assert "9999 processes for 1617 pictures; start fewer" in capfd.readouterr().err


def test_processes_that_see_different_checkpoints_do_not_resume(trained, tmp_path):
    # As on two machines whose --out is not shared: the same command in two folders.
    command = [sys.executable, HERE / "train.py", *map(str, QUICK), "--steps", "9", "--resume"]
    (tmp_path / "1/a").mkdir(parents=True)
    (tmp_path / "1/a/ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    (tmp_path / "0").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [
        subprocess.Popen(
            [*command, "--out", "a"], cwd=tmp_path / rank, env={**env, "RANK": rank},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert all("not all processes see the same" in error for error in errors)


KILLS = int(os.environ.get("DOD_KILLS", 2))


def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bytes(tmp_path):
    flags = [*QUICK, "--steps", 40, "--save-every", 1, "--latent-tokens", 2]
    command = [sys.executable, HERE / "train.py", *map(str, flags), "--out"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run([*command, tmp_path / "whole"], check=True, **quiet)
    out, moments, steps = tmp_path / "killed", np.random.default_rng(), []
    for _ in range(KILLS):
        process = subprocess.Popen([*command, out, "--resume"], **quiet)
        log = out / "log.jsonl"
        before = log.stat().st_mtime_ns if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
            time.sleep(0.01)  # until it trains
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (out / "ckpt.pt").exists():
            steps.append(sample.load_checkpoint(out / "ckpt.pt")["step"])  # always whole
    (out / ".ckpt.1.tmp.pt").write_bytes(b"of a kill while it was written")
    subprocess.run([*command, out, "--resume"], check=True, **quiet)
    files = (zipfile.ZipFile(tmp_path / k / "ckpt.pt") for k in ("whole", "killed"))
    whole, killed = ({n: f.read(n) for n in f.namelist() if "/data/" in n} for f in files)
    print(f"{KILLS} kills, checkpoints found at steps {steps}; same bytes: {whole == killed}")
    assert whole == killed and len(whole) > 300  # of weights, EMA, AdamW's moments
    assert {p.name for p in out.iterdir()} == {*train.WRITTEN}  # no remains


def test_section_4_1_samples_come_from_the_ema_and_the_optimiser_is_the_paper_s(trained):
    saved = sample.load_checkpoint(trained / "ckpt.pt")
    weights = sample.load_model(saved).state_dict()
    assert all(torch.equal(weights[name], saved["ema"][name]) for name in weights)
    assert not torch.equal(saved["ema"]["W_g.weight"], saved["model"]["W_g.weight"])
    group = saved["optimizer"]["param_groups"][0]
    assert group["betas"] == (0.9, 0.999) and group["weight_decay"] == 0
    assert train.parse(["--model", "DoD-XL"]).lr == 1e-4
    assert train.parse(["--model", "DoD-XL"]).batch_size == 256


def test_a_run_leaves_checkpoint_log_and_pictures(trained):
    assert {p.name for p in trained.iterdir()} == {
        "ckpt.pt", "log.jsonl", "loss.png", "samples.png",
    }  # fmt: skip
    record = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 6 and len(record["loss_by_time"]) == 4 and record["images_per_s"] > 0
    with Image.open(trained / "samples.png") as picture:
        assert picture.width > 10 * 64 and picture.height > 4 * 4 * 64


def test_letters_are_a_function_of_their_number_and_held_out_ones_are_others():
    pictures, held_out = train.load_data("letters", 16, 3, 0.1)
    assert len(pictures) == 22_500 and len(held_out) == 2_500
    images = torch.stack([pictures[i][0] for i in range(60)])
    again = torch.stack([train.load_data("letters", 16, 3, 0.1)[0][i][0] for i in range(60)])
    assert torch.equal(images, again) and len(images.unique(dim=0)) == 60
    assert np.array(train.draw_letter(7, 32)).shape == (32, 32, 3)
    assert np.bincount(pictures.labels).min() > 2_000
    a, b = (train.load_data("digits", 8, 1, 0.2)[k] for k in (0, 1))
    assert len(a) + len(b) == 1797 and len(b) == 359 and a[0][0].shape == (1, 8, 8)


def odd_pictures(folder: Path) -> None:
    """Two classes of grey, palette, CMYK, RGBA, 1-pixel, 16-bit and EXIF-rotated pictures."""
    odd = {"a/grey.png": ("L", 40, 9), "a/palette.PNG": ("P", 9, 30), "b/dot.bmp": ("RGB", 1, 1)}
    odd |= {"b/deep/cmyk.JPEG": ("CMYK", 64, 64), "b/alpha.webp": ("RGBA", 5, 7)}
    odd |= {"a/deep grey.png": ("I;16", 12, 20)}
    for name, (mode, *size) in odd.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size).save(folder / name)
    turned, exif = Image.new("RGB", (8, 4), "white"), Image.Exif()
    turned.paste("black", (0, 0, 4, 4))
    exif[0x0112] = 6  # EXIF: to be shown turned by 90 degrees
    turned.save(folder / "a/turned.png", exif=exif)


def test_folders_of_odd_pictures_are_read(tmp_path):
    odd_pictures(tmp_path)
    pictures, _ = train.load_data(str(tmp_path), 8, 3, 0)
    assert pictures.classes == ["a", "b"] and sorted(pictures.labels) == [0] * 4 + [1] * 3
    assert {pictures[i][0].shape for i in range(7)} == {(3, 8, 8)}
    image = sample.fit_picture(sample.open_picture(tmp_path / "a/turned.png"), 4, 1)
    assert image[0, 0].max() < 99 and image[0, -1].min() > 150  # black is on top now


def test_cached_latents_are_both_flips_posteriors_and_train_as_encoding_does(
    vae, tmp_path, monkeypatch, capfd
):
    odd_pictures(tmp_path / "data")
    monkeypatch.setattr(train.Latents, "PART", 64)
    flags = ["--data", tmp_path / "data", "--vae", vae / "kl", "--image-size", 16]
    flags += ["--batch-size", 4, "--steps", 2, "--log-every", 1, "--held-out", 0, "--device", "cpu"]
    cache, step, seen = tmp_path / "cache", train.Run.step, []
    monkeypatch.setattr(train.Run, "step", lambda *a: seen.append(a) or step(*a))
    assert run(train, *flags, "--out", tmp_path / "a") == 0
    assert "standard deviation" in capfd.readouterr().err  # random weights: latents far from 1
    assert run(train, *flags, "--out", tmp_path / "b", "--cache", cache, "--workers", 1) == 0
    assert "GB" in capfd.readouterr().out  # said before it starts
    logs = [(tmp_path / k / "log.jsonl").read_text().splitlines() for k in "ab"]
    first, second = (json.loads(lines[0]) for lines in logs)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-2)  # fp16, the same draws
    codec = sample.load_codec(str(vae / "kl"))
    (parts,), (pictures, _) = cache.glob("*.npy"), train.load_data(str(tmp_path / "data"), 16, 3, 0)
    images = torch.stack([pictures[i][0] for i in range(7)])
    for flip, x in enumerate((images, images.flip(-1))):
        for k, moment in enumerate(codec.moments(x)):
            assert close(torch.from_numpy(np.load(parts)[:, flip, k]).float(), moment, 1e-2)
    x, eps = seen[-1][2:4]
    assert x.shape == (4, 2, 4, 8, 8) and close(  # step uses mean + std eps
        seen[0][0].codec.encode(seen[0][2], eps), x[:, 0] + x[:, 1] * eps, 0.05
    ) == (seen[0][1] == seen[-1][1])
    stamp = parts.stat().st_mtime_ns
    assert run(train, *flags, "--out", tmp_path / "c", "--cache", cache, "--seed", 1) == 0
    assert parts.stat().st_mtime_ns == stamp  # opened, not made again
    moved = [*flags[:3], vae / "tiny", *flags[4:]]
    for wrong, words in (
        ([*flags, "--cache", tmp_path / "data"], "no meta.json"),
        ([*moved, "--cache", cache], "another vae"),
        ([*flags, "--cache", cache, "--held-out", 0.3], "another count"),
    ):
        assert run(train, *wrong, "--out", tmp_path / "d") == 2
        assert words in capfd.readouterr().err.splitlines()[-1]
    np.save(parts, np.roll(np.load(parts), 1, axis=0))
    assert run(train, *flags, "--out", tmp_path / "d", "--cache", cache) == 2
    assert "of another picture or VAE" in capfd.readouterr().err
    parts.write_bytes(parts.read_bytes()[:999])
    assert run(train, *flags, "--out", tmp_path / "d", "--cache", cache) == 2
    assert "damaged" in capfd.readouterr().err


def test_a_cache_is_encoded_by_all_processes_and_only_where_parts_are_missing(
    vae, tmp_path, monkeypatch
):
    pictures, _ = train.load_data("letters", 16, 3, 0)
    pictures.rows, pictures.labels = pictures.rows[:150], pictures.labels[:150]
    codec, encoded = sample.load_codec(str(vae / "kl")), []
    moments = codec.moments
    codec.moments = lambda x: encoded.append(len(x)) or moments(x)
    monkeypatch.setattr(train.Latents, "PART", 64)
    whole = train.open_cache(tmp_path / "whole", pictures, codec, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "processes", lambda: (1, 2))
        with pytest.raises(model.UserError, match="00000.npy"):  # that is process 0's
            train.open_cache(tmp_path / "shared", pictures, codec, 0)
        assert [file.name for file in (tmp_path / "shared").glob("*.npy")] == ["00001.npy"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.shutil, "disk_usage", lambda folder: Namespace(free=9999))
        with pytest.raises(model.UserError, match="make room"):
            train.open_cache(tmp_path / "none", pictures, codec, 0)
        assert not [*(tmp_path / "none").iterdir()]
    encoded.clear()
    (tmp_path / "shared/.00002.0-7.tmp.npy").write_bytes(b"of a kill")
    shared = train.open_cache(tmp_path / "shared", pictures, codec, 0)
    assert encoded == [1, 64, 64, 22, 22, 1, 1, 1]  # its size; two parts, both flips; the check
    assert len(shared) == 150 and len(shared.files) == 3
    assert len([*(tmp_path / "shared").iterdir()]) == 4  # with meta.json, no remains
    assert len(pickle.dumps(shared)) < 9999  # a loader's process gets the names, not the latents
    for i in (0, 63, 64, 149):
        for flipped in (False, True):
            assert torch.equal(whole.view(i, flipped)[0], shared.view(i, flipped)[0])
        image = pictures[i][0][None]
        for flipped, x in ((False, image), (True, image.flip(-1))):
            truth = torch.cat(moments(x))
            assert close(whole.view(i, flipped)[0], truth, 1e-2) and not close(
                truth, torch.cat(moments(x.flip(-1)))
            )


def test_tensorboard_is_behind_a_flag_and_optional(tmp_path, monkeypatch, capfd):
    flags = [*QUICK, "--steps", 4, "--tensorboard"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert run(train, *flags, "--out", tmp_path / "a") == 2
        assert "pip install tensorboard" in capfd.readouterr().err
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(train, *flags, "--out", tmp_path / "b") == 0
    board = board.EventAccumulator(str(tmp_path / "b/tensorboard")).Reload()
    records = [json.loads(line) for line in (tmp_path / "b/log.jsonl").read_text().splitlines()]
    found = [(s.step, s.value) for s in board.Scalars("loss")]
    assert found == [(r["step"], pytest.approx(r["loss"])) for r in records] and len(found) == 2


def test_milestones_and_grids_on_the_way_and_fine_tuning_from_a_run(trained, tmp_path, capsys):
    flags = [*QUICK, "--steps", 4, "--keep-every", 2, "--sample-every", 2, "--workers", 1]
    assert run(train, *flags, "--out", tmp_path / "a") == 0
    names = {p.name for p in (tmp_path / "a").iterdir()}
    kept = {"ckpt-0000002.pt", "ckpt-0000004.pt", "samples-0000002.png"}
    assert names == {*train.WRITTEN} | kept
    assert sample.load_checkpoint(tmp_path / "a/ckpt-0000002.pt")["step"] == 2
    records = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert len(records[1]["evaluations"]) == 3 and 0 <= records[0]["waiting_for_data"] <= 1
    assert records[0]["memory_gib"] > 0.1
    # 12 x 12 pictures, other classes: all but the class table fits.
    for k in range(30):
        (tmp_path / f"data/{k % 3}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 12), 9 * k).save(tmp_path / f"data/{k % 3}/{k}.png")
    flags = ["--data", tmp_path / "data", "--image-size", 12, "--channels", 1, "--patch-size", 2]
    flags += [
        "--steps",
        1,
        "--batch-size",
        2,
        "--lr",
        0,
        "--device",
        "cpu",
        "--out",
        tmp_path / "b",
    ]
    assert run(train, *flags, "--init", trained / "ckpt.pt") == 0
    assert "fresh weights: label.weight\n" in capsys.readouterr().out
    before, after = (sample.load_checkpoint(p / "ckpt.pt") for p in (trained, tmp_path / "b"))
    assert all(
        torch.equal(after["model"][name], weights)
        for name, weights in before["ema"].items()
        if name != "label.weight"
    )
    more = [*flags, "--init", trained / "ckpt.pt", "--resume", "--steps", 2]
    assert run(train, *more) == 0
    assert "fresh weights: nothing\n" in capsys.readouterr().out  # the run's own, not --init's
    assert sample.load_checkpoint(tmp_path / "b/ckpt.pt")["step"] == 2


def test_benchmarks_of_the_training_step_print_both_steps_and_their_ratio(monkeypatch, capsys):
    monkeypatch.setitem(CONFIGS, "DoD-S", TINY)
    assert run(train, "--model", "DoD-S", "--batch-size", 4, "--benchmark", "--device", "cpu") == 0
    out = capsys.readouterr().out
    macs = model.count_macs(TINY)
    whole, ours = macs["lem"] + macs["e_s"], (macs["lem"] + macs["e_s"] + macs["s"]) / 2
    assert f"{ours / whole:.3f} of the GMACs" in out and "GFLOP/s, the whole" in out


# ------------------------------------------------------------------ sampling


def test_pixels_survive_the_codec():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    codec = sample.load_codec("none")
    z = codec.encode(images)
    assert z.min() == -1 and z.max() == 1 and torch.equal(codec.decode(z), images)
    assert codec.decode(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """Folders of two tiny VAEs with random weights: kl, with a shift and a scale, and tiny."""
    diffusers, out = pytest.importorskip("diffusers"), tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    kinds = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    diffusers.AutoencoderKL(
        down_block_types=kinds[0], up_block_types=kinds[1], block_out_channels=[8, 16],
        norm_num_groups=4, latent_channels=4, scaling_factor=3.0, shift_factor=0.5,
    ).save_pretrained(out / "kl")  # fmt: skip
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8],
        num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1],
    ).save_pretrained(out / "tiny")  # fmt: skip
    return out


def test_section_3_3_latents_are_posterior_samples_scaled_as_the_vae_says(vae):
    codec, g = sample.load_codec(str(vae / "kl")), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=g, dtype=torch.uint8)
    eps = torch.randn(40, 4, 8, 8, generator=g)
    posterior = codec.vae.encode(images / 127.5 - 1).latent_dist  # in one pass, not 32 at a time
    expected = 3 * (posterior.mean - 0.5 + posterior.std * eps)
    assert close(codec.encode(images, eps), expected, 1e-4) and posterior.std.min() > 0.1
    assert close(codec.encode(images), 3 * (posterior.mean - 0.5), 1e-4)
    pixels = codec.vae.decode(expected / 3 + 0.5).sample
    wrong = codec.decode(expected).int() - (127.5 * pixels + 128).clamp(0, 255).int()
    assert wrong.abs().max() <= 1 and (wrong != 0).double().mean() < 0.01  # rounding
    assert codec.latent_shape(3, 16) == (4, 8)
    for channels, size in ((1, 16), (3, 17)):
        with pytest.raises(model.UserError, match="multiple of 2 pixels"):
            codec.latent_shape(channels, size)
    (vae / "bare").mkdir()
    (vae / "bare/config.json").write_bytes((vae / "kl/config.json").read_bytes())
    with pytest.raises(model.UserError, match="bare cannot be loaded"):  # no weights
        sample.load_codec(str(vae / "bare"))
    tiny = sample.load_codec(str(vae / "tiny"))
    mean, std = tiny.moments(images)
    assert close(mean, tiny.vae.encode(images / 127.5 - 1).latents, 1e-4) and std.max() == 0
    assert tiny.latent_shape(3, 16) == (4, 8) and tiny.decode(mean).shape == images.shape


def test_noise_is_normal_and_a_function_of_seed_number_and_stage():
    z = sample.noise((50, 50), 1, range(4), 0)
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    assert torch.equal(z[2:3], sample.noise((50, 50), 1, range(2, 3), 0))
    others = [sample.noise((50, 50), *k)[0] for k in ((2, range(1), 0), (1, range(1), 1))]
    assert all(not torch.equal(z[0], other) for other in [*z[1:], *others])


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_an_image_does_not_depend_on_its_batch(solver, monkeypatch):
    # In double precision: in single, rounding may tip RK45 into other steps.
    noise, dod, y, nfe = sample.noise, awake().double(), torch.arange(5), [[], [], []]
    monkeypatch.setattr(sample, "noise", lambda *a: noise(*a).double())
    go = partial(sample.generate, dod, stages=2, solver=solver, steps=4, seed=3)
    together, parts = go(y, nfe=nfe[0]), go(y, nfe=nfe[1], batch_size=2)
    last = go(y[3:], nfe=nfe[2], start=3)
    for stage in (0, 1):
        assert close(together[stage], parts[stage], 1e-9)
        assert close(together[stage][3:], last[stage], 1e-9)
        assert torch.equal(nfe[0][stage], nfe[1][stage]) and len(nfe[0][stage]) == 5
    assert solver == "dopri5" or nfe[0][0].tolist() == [4] * 5
    assert not close(together[0][0], sample.generate(dod, y[:1], 1, seed=4)[0][0])


def test_fig3a_each_stage_is_guided_by_the_stage_before(monkeypatch):
    dod, y, calls = awake(), torch.tensor([1, 4]), []
    forward, visual_prior = dod.forward, dod.visual_prior
    dod.forward = lambda x, t, y, e_s=None: calls.append((y, e_s)) or forward(x, t, y, e_s)
    dod.visual_prior = lambda z: calls.append(z) or visual_prior(z)
    z = sample.generate(dod, y, 3, [1, 2, 2], solver="euler", steps=2)
    # Stage 1 is unguided: one evaluation a step, with S. Then LEM once, and two evaluations a step.
    assert [isinstance(c, tuple) for c in calls] == [True] * 2 + ([False] + [True] * 4) * 2
    assert torch.equal(calls[2], z[0]) and torch.equal(calls[7], z[1])
    assert all(e_s is None for _, e_s in calls[:2])
    (y_c, e_s), (y_u, nothing) = calls[3:5]
    assert torch.equal(y_c, y) and torch.equal(e_s, visual_prior(z[0]))
    assert y_u.tolist() == [5, 5] and nothing is None
    calls.clear()
    sample.generate(dod, y, 1, [2.0], "prior", "euler", 1, prior=z[0])
    assert calls[2][0].tolist() == [1, 4] and calls[2][1] is None  # the prior alone is left out
    seen = []
    stage = lambda model, z1, y, e_s, w, *rest: seen.append((z1, w)) or (z1, y)  # noqa: E731
    monkeypatch.setattr(sample, "sample_stage", stage)
    sample.generate(dod, y, 2, 4.0)  # one number: for the stages that have a prior
    assert [w for _, w in seen] == [1, 4] and not close(seen[0][0], seen[1][0])  # fresh noise
    with pytest.raises(model.UserError, match="each stage"):
        sample.generate(dod, y, 2, [1.0, 0.5])


def test_classes_are_names_numbers_and_ranges():
    letters, wild = list("ABCDEFGHIJ"), ["cat", "sea-lion", "7", "dog"]
    assert sample.parse_classes("A-C, J,3", letters) == [0, 1, 2, 9, 3]
    assert sample.parse_classes("sea-lion,7,cat-7,0-1", wild) == [1, 2, 0, 1, 2, 0, 1]
    for wrong in ("K", "10", "C-A", "", "-1", "A,,B"):
        with pytest.raises(model.UserError, match="unknown"):
            sample.parse_classes(wrong, letters)


def test_the_sample_command_is_repeatable_and_takes_a_picture_as_prior(trained, tmp_path):
    flags = ["--ckpt", trained / "ckpt.pt", "--solver", "euler", "--steps", 2, "--per-class", 2]
    for out in ("a.png", "b.png"):
        more = ["--classes", "0-2,9", "--stages", 3, "--out", tmp_path / out]
        assert run(sample, *flags, *more) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    prior = ["--prior", tmp_path / "a.png", "--cfg", "1,3", "--out", tmp_path / "c.png"]
    assert run(sample, *flags, *prior) == 0
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width < picture.height  # two columns; a block for the picture and each w


def test_a_set_of_samples_is_an_npz_of_pictures_that_depend_on_their_number_alone(
    trained, tmp_path
):
    flags = ["--ckpt", trained / "ckpt.pt", "--solver", "euler", "--steps", 2, "--number", 23]
    flags += ["--batch-size", 4, "--seed", 7, "--device", "cpu"]
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    assert run(sample, *flags, "--npz", one, "--png-dir", tmp_path / "png") == 0
    ended = torchrun(2, "sample.py", *flags, "--npz", two)
    assert ended.returncode == 0, ended.stderr
    with np.load(one) as a, np.load(two) as b:
        images, y = a["arr_0"], a["arr_1"]
        assert (images == b["arr_0"]).all() and (y == b["arr_1"]).all()
    assert images.shape == (23, 8, 8, 3) and images.dtype == np.uint8 and one.stat().st_size > 0
    assert y.tolist() == [n % 10 for n in range(23)]
    saved = sample.load_checkpoint(trained / "ckpt.pt")
    dod, last = sample.load_model(saved), torch.tensor(y[20:])
    z0 = sample.generate(dod, last, 2, solver="euler", steps=2, seed=7, start=20)[-1]
    assert (sample.Codec().decode(z0)[:, 0].numpy() == images[20:, :, :, 0]).all()
    names = sorted(p.name for p in (tmp_path / "png").iterdir())
    assert len(names) == 23 and names[13] == "000013-3.png"
    with Image.open(tmp_path / "png" / names[13]) as picture:
        assert (np.array(picture) == images[13]).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.npz", "png", "two.npz"]
    chosen = [sample.label(n, [3, 5], "random", 0) for n in range(1000)]
    assert abs(chosen.count(3) - 500) < 80 and chosen.count(3) + chosen.count(5) == 1000
    assert chosen[7:9] == [sample.label(n, [3, 5], "random", 0) for n in (7, 8)]


def test_a_set_of_samples_goes_on_after_a_kill_and_refuses_other_settings(
    trained, tmp_path, monkeypatch, capfd
):
    flags = ["--ckpt", trained / "ckpt.pt", "--solver", "euler", "--num", 9, "--batch-size", 2]
    flags += ["--stages", 1, "--npz", tmp_path / "a.npz", "--png-dir", tmp_path / "png"]
    generate, starts = sample.generate, []

    def dies(*args, start, **rest):
        starts.append(start)
        if len(starts) == 3:
            raise KeyboardInterrupt
        return generate(*args, start=start, **rest)

    monkeypatch.setattr(sample, "generate", dies)
    (tmp_path / "a.npz.parts").mkdir()  # as if killed at once
    assert run(sample, *flags) == 130 and not (tmp_path / "a.npz").exists()
    assert run(sample, *flags, "--seed", 1) == 2
    assert "another seed" in capfd.readouterr().err
    saved = sample.load_checkpoint(trained / "ckpt.pt")
    saved["ema"] = {name: x + 1 for name, x in saved["ema"].items()}
    torch.save(saved, tmp_path / "other.pt")
    assert run(sample, "--ckpt", tmp_path / "other.pt", *flags[2:]) == 2
    assert "another weights" in capfd.readouterr().err
    (tmp_path / "other.pt").unlink()
    note = tmp_path / "a.npz.parts/how.json"
    whole = note.read_text()
    note.write_text(whole[:9])
    assert run(sample, *flags) == 2 and "how.json is damaged" in capfd.readouterr().err
    note.write_text(whole)
    (tmp_path / "png").mkdir()
    (tmp_path / "png/.000001-1.0-7.tmp.png").write_bytes(b"of a kill")
    assert run(sample, *flags) == 0
    assert starts == [0, 2, 4, 4, 6, 8]  # what was done is not done again
    with np.load(tmp_path / "a.npz") as found:
        assert found["arr_0"].shape == (9, 8, 8, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "png"]
    assert len([*(tmp_path / "png").iterdir()]) == 9  # no remains


def test_the_sampling_benchmark_reports_both_solvers(trained, capsys):
    flags = ["--ckpt", trained / "ckpt.pt", "--benchmark", "--batch-size", 3, "--steps", 2]
    assert run(sample, *flags, "--precision", "bf16") == 0
    euler, dopri5 = capsys.readouterr().out.splitlines()[1:]
    assert re.match(r"euler +[\d.]+ images/s .*: 2\.0, 2\.0$", euler)
    assert re.match(r"dopri5 +[\d.]+ images/s .*: [\d.]+, [\d.]+$", dopri5)


# ------------------------------------------------------------------ what users get wrong


class Code:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("argv, message", [
    ("train --data nowhere", "nowhere"),
    ("train --data empty", "class"),
    ("train --data hollow", "b"),
    ("train --data single", "at least 2"),
    ("train --data broken --batch-size 4", "broken/b/bad.png"),
    ("train --data mnist", "network"),
    ("train --data digits --patch-size 3", "multiple of the patch size 3"),
    ("train --model DoD-M", "DoD-M"),
    ("train --p-s 1.5", "at most 1"),
    ("train --step 3", "unrecognized"),
    ("train --data digits --out RUN", "exists"),
    ("train --data digits --batch-size 8 --out RUN --resume --lr 1", "lr was 0.002, now 1"),
    ("train --data digits --out file/below", "file"),
    ("train --data digits --device cuda:99", "device"),
    ("train --data digits --resume --overwrite", "exclude"),
    ("train --data digits --out RUN --resume --batch-size 8 --latent-tokens 3", "N was 4, now 3"),
    ("train --data", "expected one argument"),
    ("sample --ckpt RUN/ckpt.pt --out a.xyz", "a.xyz.png"),
    ("sample --ckpt RUN/ckpt.pt --classes=", "unknown"),
    ("sample --ckpt none.pt", "no checkpoint none.pt"),
    ("sample --ckpt cut.pt", "cut.pt"),
    ("sample --ckpt text.pt", "text.pt"),
    ("sample --ckpt code.pt", "code.pt"),
    ("sample --ckpt other.pt", "other.pt is not a (whole) checkpoint"),
    ("sample --ckpt RUN/ckpt.pt --classes cat", "'cat' is unknown"),
    ("sample --ckpt RUN/ckpt.pt --cfg 0.5", "at least 1"),
    ("sample --ckpt RUN/ckpt.pt --cfg x", "--cfg"),
    ("sample --ckpt RUN/ckpt.pt --cfg 2,3 --stages 2", "2 values for 1 stages"),
    ("sample --ckpt RUN/ckpt.pt --steps 9", "--solver euler"),
    ("sample --ckpt RUN/ckpt.pt --device meta", "not available"),
    ("sample --ckpt RUN/ckpt.pt --steps -3", "at least 1"),
    ("sample --ckpt RUN/ckpt.pt --prior text.pt", "not a readable picture"),
    ("sample --ckpt RUN/ckpt.pt --out mine.png", "exists"),
    ("sample --ckpt RUN/ckpt.pt --npz file", "file.npz"),
    ("sample --ckpt RUN/ckpt.pt --npz a.npz --prior a.png", "exclude"),
    ("sample --ckpt RUN/ckpt.pt --png-dir broken", "not empty"),
    ("sample --ckpt RUN/ckpt.pt --npz a.npz --num 0", "at least 1"),
    ("sample --ckpt RUN/ckpt.pt --npz a.npz --classes 3-12", "unknown"),
    ("train --data broken --vae single", "single cannot be loaded"),
    ("train --data digits --vae no-such/vae", "folder made by save_pretrained"),
    ("train --data digits --cache here", "without --vae"),
    ("train --data digits --batch-size 9 --grad-accum 2", "not divisible by 1 processes x 2"),
    ("train --data digits --init text.pt", "text.pt"),
])  # fmt: skip
def test_user_errors_end_in_one_line(argv, message, trained, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no network, at once
    for name in ("empty", "hollow/a", "hollow/b", "single/a", "broken/a", "broken/b"):
        Path(name).mkdir(parents=True)
    for name in ("hollow/a/1.png", "single/a/1.png", "broken/a/1.png"):
        Image.new("RGB", (9, 9)).save(name)
    whole = (trained / "ckpt.pt").read_bytes()
    Path("broken/b/bad.png").write_bytes(whole[:99])
    Path("file").write_text("mine")
    Path("mine.png").write_text("mine")
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    Path("text.pt").write_text("text")
    Path("code.pt").write_bytes(pickle.dumps(Code()))
    other = {"format": "dod-1", "ema": {}, "classes": [], "config": {"width": 8}}
    torch.save(other, "other.pt")
    before = {p: p.read_bytes() for p in [*tmp_path.rglob("*"), *trained.iterdir()] if p.is_file()}
    module, *flags = argv.replace("RUN", str(trained)).split()
    assert run(globals()[module], *flags) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"{module}.py: error: ") and message in error
    assert all(p.read_bytes() == content for p, content in before.items())
    assert not Path("executed").exists() and not Path("samples.png").exists()


@pytest.mark.parametrize("error, printed", [
    (MemoryError(), "out of memory"),
    (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory (CUDA out of mem"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "lower --batch-size"),
    (OSError("memory.png: no such file"), "error: memory.png: no such file"),
    (RuntimeError("UserError: Connectionless/a.png is broken"), "error: Connectionless/a.png is"),
    (RuntimeError("gloo: Connection closed by peer [::1]"), "closed by peer [::1] (perhaps"),
    (RuntimeError("shapes of memory bank and reconnected graph differ"), None),
])  # fmt: skip
def test_errors_are_told_apart(error, printed, monkeypatch, capsys):
    def fails():
        raise error

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit if printed else RuntimeError) as caught:
        sample.run_command(fails)
    assert printed is None or (caught.value.code == 2 and printed in capsys.readouterr().err)


def test_a_data_set_is_downloaded_by_one_process_after_another(monkeypatch):
    order, data = [], Namespace(classes=list("ab"), targets=[0, 1] * 9)
    loads = lambda folder, download: order.append("loads") or data  # noqa: E731
    monkeypatch.setattr("torchvision.datasets.MNIST", loads)
    monkeypatch.setattr(train, "processes", lambda: (1, 3))
    monkeypatch.setattr(train, "wait", lambda: order.append("waits"))
    assert len(train.load_data("mnist", 28, 1, 0)[0]) == 18
    assert order == ["waits", "loads", "waits", "waits"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, monkeypatch, capfd
):
    loss = flow.rectified_flow_loss
    count = itertools.count(1)
    bad = lambda *a: loss(*a) / (next(count) != 7)  # noqa: E731
    monkeypatch.setattr(train.Run.step, "__defaults__", (bad,))
    flags = ["--steps", 9, "--save-every", 4, "--log-every", 4, "--out", tmp_path]
    assert run(train, *QUICK, *flags) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "the loss of step 7 (or its gradient) is not finite" in error and "ckpt.pt" in error
    assert sample.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 4


def test_a_finite_loss_with_a_gradient_that_is_not_stops_the_run_too():
    loss, t = torch.ones(2), torch.ones(2) / 2
    steps = [(7, t, loss, torch.tensor(1.0)), (8, t, loss, torch.tensor(float("nan")))]
    assert train.summarise(small_run(), steps[:1], 1.0, 0.5)["grad_norm"] == 1
    with pytest.raises(FloatingPointError, match="step 8"):
        train.summarise(small_run(), steps, 1.0, 0.5)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    path, run = tmp_path / "ckpt.pt", small_run()
    train.save_checkpoint(path, run, 1, {})
    good, save = path.read_bytes(), torch.save

    def full(what, where):
        save(what, where)
        raise RuntimeError("PytorchStreamWriter failed writing file: no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(model.UserError, match="no space left"):
        train.save_checkpoint(path, run, 2, {})
    assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------ section 4.1: the metrics


def covariance(rng, D: int, rank: int) -> np.ndarray:
    x = rng.standard_normal((D, rank))
    return x @ x.T / D


def test_fid_in_closed_form_where_covariances_are_equal_or_commute():
    rng = np.random.default_rng(0)
    (mu1, mu2), S = rng.standard_normal((2, 20)), covariance(rng, 20, 40)
    fid = evaluate.frechet_distance
    apart = ((mu1 - mu2) ** 2).sum()
    assert fid(mu1, S, mu2, S) == pytest.approx(apart, rel=1e-12)
    assert fid(mu1, 9 * S, mu2, 4 * S) == pytest.approx(apart + S.trace(), rel=1e-12)
    V, (a, b) = np.linalg.eigh(S)[1], rng.uniform(0, 3, (2, 20))  # one basis, two spectra
    a[:5] = b[3:9] = 0  # both singular
    S, R = V * a @ V.T, V * b @ V.T
    assert fid(mu1, S, mu2, R) == pytest.approx(apart + ((a**0.5 - b**0.5) ** 2).sum(), rel=1e-7)
    assert abs(fid(mu1, S, mu1, S)) < 1e-12  # not so if rounding passed for eigenvalues


def test_fid_agrees_with_scipys_square_root_of_a_matrix_in_either_order():
    rng = np.random.default_rng(1)
    mu1, mu2 = rng.standard_normal((2, 50))
    S1, S2 = (covariance(rng, 50, rank) for rank in (99, 60))
    truth = ((mu1 - mu2) ** 2).sum() + np.trace(S1 + S2 - 2 * sqrtm(S1 @ S2).real)
    low = covariance(rng, 50, 7)  # of fewer samples than features
    for S, R, expected in ((S1, S2, truth), (low, S2, None)):
        forth, back = (evaluate.frechet_distance(*x) for x in ((mu1, S, mu2, R), (mu2, R, mu1, S)))
        assert forth == pytest.approx(back, rel=1e-7) and np.isfinite(forth)
        assert expected is None or forth == pytest.approx(expected, rel=1e-9)


def test_fid_moments_stream_without_cancellation():
    x, moments = np.random.default_rng(2).standard_normal((1000, 6)) * range(1, 7) + 1e6, (0, 0, 0)
    for part in torch.from_numpy(x).split(77):
        moments = evaluate.add_rows(moments, part)
    assert moments[0] == 1000 and np.allclose(moments[1], x.mean(0), rtol=1e-14)
    assert np.allclose(moments[2] / 999, np.cov(x.T), rtol=1e-8)  # ddof = 1


def test_is_of_sure_and_clueless_classifiers_and_of_torch_fidelity():
    sure = torch.eye(10).repeat(30, 1)
    assert evaluate.inception_score(sure) == pytest.approx((10, 0), abs=1e-12)
    assert evaluate.inception_score(torch.full((50, 8), 1 / 8)) == pytest.approx((1, 0), abs=1e-12)
    in_order = sure[sure.argmax(1).argsort()]  # each of ten splits has one class
    assert evaluate.inception_score(in_order) == pytest.approx((1, 0), abs=1e-12)
    assert evaluate.inception_score(in_order, [150]) == pytest.approx((5, 0), abs=1e-12)
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * torch.randn(100, 12, generator=torch.Generator().manual_seed(0))
    theirs = fidelity.isc_features_to_metric(logits, splits=5, shuffle=False)
    ours = evaluate.inception_score(logits.double().softmax(1), 5)
    assert ours == pytest.approx((*theirs.values(),), rel=1e-12)


def test_precision_and_recall_against_a_loop_ties_and_blocks_included():
    rng = np.random.default_rng(3)

    def covered(points, centres, k):
        reach = []
        for i, centre in enumerate(centres):
            squares = ((np.delete(centres, i, 0) - centre) ** 2).sum(1)  # whole numbers: exact
            reach.append(np.partition(squares, k - 1)[k - 1])
        return np.mean([(((p - centres) ** 2).sum(1) <= reach).any() for p in points])

    real, fake = rng.integers(0, 9, (70, 2)), rng.integers(3, 14, (50, 2))  # full of ties
    for k in (1, 3, 5):
        truth = covered(fake, real, k), covered(real, fake, k)
        assert evaluate.precision_recall(real, fake, k) == pytest.approx(truth, abs=1e-12)
    assert evaluate.precision_recall(real, real) == (1, 1)
    assert evaluate.precision_recall(real, fake + 1000) == (0, 0)
    sizes = 6500, 5300  # two blocks
    many, some = (torch.from_numpy(rng.integers(0, 400, (n, 2))) for n in sizes)
    assert evaluate.precision_recall(many, some)[0] == covered(some.numpy(), many.numpy(), 3)


def test_psnr_and_ssim_against_their_definitions():
    rng = np.random.default_rng(4)
    a = rng.integers(0, 255, (2, 3, 20, 17)).astype(np.uint8)
    b = (a + rng.integers(-20, 20, a.shape)).clip(0, 255).astype(np.uint8)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    assert evaluate.psnr(x, x + 1).tolist() == pytest.approx([20 * np.log10(255)] * 2)
    assert evaluate.psnr(x, x).isinf().all() and evaluate.ssim(x, x).tolist() == [1, 1]

    def truth(a, b):  # of one channel: SciPy's Gaussian, less what the border touches
        blur = lambda z: gaussian_filter(z, 1.5, truncate=3.5)[5:-5, 5:-5]  # noqa: E731
        a, b, c1, c2 = a.astype(float), b.astype(float), 2.55**2, 7.65**2
        m, n = blur(a), blur(b)
        v, w, c = blur(a * a) - m * m, blur(b * b) - n * n, blur(a * b) - m * n
        return ((2 * m * n + c1) * (2 * c + c2) / (m * m + n * n + c1) / (v + w + c2)).mean()

    expected = [np.mean([*map(truth, *pair)]) for pair in zip(a, b, strict=True)]
    assert evaluate.ssim(x, y).tolist() == pytest.approx(expected, rel=1e-10)


def test_table2_the_linear_probe_converges_and_is_blind_to_scale():
    g, y = torch.Generator().manual_seed(0), torch.arange(4000) % 2
    x, x_test = (torch.randn(4000, 5, generator=g) + 0.5 * y[:, None] for _ in range(2))
    best = torch.distributions.Normal(0, 1).cdf(torch.tensor(0.25 * 5**0.5))  # Bayes' accuracy
    found = evaluate.linear_probe(x, y, x_test, y)
    assert abs(found - best) < 0.015
    scale, shift = torch.tensor([1e-2, 1, 10, 1e3, 1e4]), torch.tensor([0, 5, -300, 1e4, 0])
    moved = evaluate.linear_probe(x * scale + shift, y, x_test * scale + shift, y)
    assert moved == pytest.approx(found, abs=2e-3)


# ------------------------------------------------------------------ the features and the commands


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
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    for p in network.fc.parameters():
        torch.nn.init.normal_(p, std=3)  # IS must leave out the bias
    torch.save(network.state_dict(), path := tmp_path_factory.mktemp("i") / "inception.pth")
    return str(path)


def test_inception_agrees_with_torch_fidelity_and_sfid_reads_the_right_channels(weights):
    fidelity = pytest.importorskip("torch_fidelity")
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randint(0, 256, (2, 7, 3, 12, 16), generator=g, dtype=torch.uint8)
    fake = fake // 2 + fake.float().mean((1, 2, 3), keepdim=True).byte()  # another distribution
    network, _ = evaluate.inception(weights, torch.device("cpu"))
    pool, logits, spatial = network(real)
    theirs, seen = fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3, []
    theirs = theirs("inception", ["2048", "logits"], weights)
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *a: seen.append(a[2].numpy()))
    their_pool, their_logits = theirs(real)
    assert torch.equal(pool, their_pool)
    assert torch.allclose(logits + theirs.fc.bias, their_logits, atol=1e-4)
    assert spatial.shape == (7, 2023) and seen[0].min() == 0  # after the ReLU
    for row, column, channel in ((0, 0, 0), (3, 16, 6), (16, 1, 4)):  # channels last
        place = (row * 17 + column) * 7 + channel
        assert (spatial[:, place].numpy() == seen[0][:, channel, row, column]).all()
    with pytest.warns(UserWarning, match="7 and 7 pictures for 2048 features"):
        ours = evaluate.compare(*(evaluate.measure(x, network, "x") for x in (real, fake)))
    theirs = fidelity.calculate_metrics(
        input1=Subset(fake, range(7)), input2=Subset(real, range(7)), fid=True, isc=True,
        isc_splits=1, cuda=False,
        feature_extractor_weights_path=weights, cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def random_ckpt(path: Path, config: Config, held_out: float = 0.1) -> Path:
    """A checkpoint for the 8 x 8 digits, with random weights."""
    torch.manual_seed(0)
    config = replace(config, depth=1, p=4, latent_size=8, latent_channels=1)
    about = {"format": "dod-1", "step": 7, "data": "digits", "image_size": 8, "channels": 1}
    about |= {
        "held_out": held_out,
        "classes": [str(k) for k in range(10)],
        "codec": "none",
        "p_s": 0.25,
    }
    dod = DoD(config)
    for p in dod.parameters():  # no layer stays zero
        p.data += 0.1 * torch.randn_like(p)
    torch.save(about | {"config": asdict(config), "ema": dod.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    return random_ckpt(tmp_path_factory.mktemp("run") / "ckpt.pt", replace(CONFIGS["DoD-Ti"], N=2))


def rows_of(path: Path) -> dict:
    """The rows of a report, by what they are and their guidance."""
    return {(r["what"], r.get("guidance")): r for r in json.loads(path.read_text())["rows"]}


def test_fig4_stages_reports_floor_stages_and_class_guidance(ckpt, capsys):
    assert run(evaluate, "stages", "--ckpt", ckpt, "--num", 150, "--steps", 2) == 0
    out = ckpt.with_name("stages.json")
    found, rows = json.loads(out.read_text()), rows_of(out)
    stages = [("stage 1", 1), ("stage 2", 5.5), ("stage 3", 5.5)]  # section 3.3: no guidance in 1
    guided = [("stage 1", w) for w in (1.5, 2, 3, 4)]
    assert [*rows] == [("training pictures", None), *stages, *guided]
    floor = rows["training pictures", None]
    assert floor["fid"] < 10 < rows["stage 1", 1]["fid"] and floor["recognised"] > 0.98
    assert rows["stage 2", 5.5]["evaluations"] == 2
    expected = dict(features="classifier", count=150, reference="held-out pictures", seed=0,
                    reference_count=150, ckpt=str(ckpt), solver="euler", steps=2, guide_on="both",
                    cfg_stage1=[1.5, 2, 3, 4], against="held-out")  # fmt: skip
    assert expected.items() <= {k: v for k, v in found.items() if k in expected}.items()
    run_of = found["checkpoint"]
    assert (run_of["step"], run_of["p_s"], run_of["config"]["N"]) == (7, 0.25, 2)
    assert run_of["config"]["depth"] == 1 and "ema" not in run_of
    assert len(found["weights_sha256"]) == len(found["reference_sha256"]) == 64
    assert found["versions"]["torch"] == torch.__version__
    assert all(Image.open(ckpt.with_name(f"stages{s}.png")).size for s in ("", ".pictures"))
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("stage 3", "150 held-out pictures", "FID "))
    assert "FID-50K" not in printed
    args = Namespace(out=ckpt.with_name("x"), command="samples")
    for count, title in ((50_000, "FID-50K"), (49_999, "FID")):
        evaluate.report(args, [{"fid": 2, "what": ""}], {"features": "inception", "count": count})
        assert capsys.readouterr().out.split()[0] == title
    before = ckpt.with_name("stages.json").stat()
    assert run(evaluate, "stages", "--ckpt", ckpt) == 2 and "--overwrite" in capsys.readouterr().err
    assert ckpt.with_name("stages.json").stat() == before


def test_fig4_stages_scans_guidance_against_training_pictures(ckpt, monkeypatch, tmp_path, capsys):
    given, measured, out = [], [], tmp_path / "scan.json"
    monkeypatch.setattr(sample, "generate", lambda *a, f=sample.generate: given.append(a) or f(*a))
    watch = lambda *a, f=evaluate.measure: measured.append(a[0]) or f(*a)  # noqa: E731
    monkeypatch.setattr(evaluate, "measure", watch)
    flags = ["--num", 70, "--steps", 1, "--out", out, "--against", "training"]
    flags += ["--cfg", "2,3.5", "--stages", 2, "--cfg-stage1", "none"]
    assert run(evaluate, "stages", "--ckpt", ckpt, *flags) == 0
    stages = [("stage 1", 1), ("stage 2", 2), ("stage 2", 3.5)]
    assert [*rows_of(out)] == [("training pictures", None), *stages]
    assert json.loads(out.read_text())["reference"] == "training pictures"
    training, _ = evaluate.train.load_data("digits", 8, 1, 0.1)
    images, y = default_collate([training[i] for i in range(809, 879)])  # of 1617; the second half
    assert torch.equal(measured[0], images) and torch.equal(given[0][1], y)
    assert torch.equal(measured[1], evaluate.first(training, 70)[0])  # the floor: of the first
    dod = replace(CONFIGS["DoD-Ti"], N=2)
    flags, none = [*flags, "--overwrite"], random_ckpt(tmp_path / "none.pt", dod, held_out=0)
    assert run(evaluate, "stages", "--ckpt", none, *flags) == 0  # a run that held none out
    assert run(evaluate, "probe", "--ckpt", none) == 2
    assert "--held-out leaves more" in capsys.readouterr().err


def test_a_plain_fitv2_has_stage_1_and_its_class_guidance(ckpt, capsys):
    fitv2 = random_ckpt(ckpt.with_name("fitv2.pt"), CONFIGS["FiTv2-Ti"])
    flags, out = ["--ckpt", fitv2, "--num", 70, "--steps", 1], ckpt.with_name("fitv2.json")
    guidance = ["--cfg", "2,3", "--cfg-stage1", "2"]
    assert run(evaluate, "stages", *flags, *guidance, "--out", out) == 0
    rows = rows_of(out)
    assert [*rows] == [("training pictures", None), ("stage 1", 1), ("stage 1", 2)]
    assert rows["stage 1", 2]["gflops"] == 2 * rows["stage 1", 1]["gflops"] > 0
    for command in ("reconstruct", "probe"):
        flags = flags if command == "reconstruct" else flags[:2]
        assert run(evaluate, command, *flags) == 2 and "LEM" in capsys.readouterr().err


@pytest.mark.parametrize("size, n, paper, ours", [
    ("DoD-B", 30, {(0, 1): 795, (1, 5.5): 2409.6}, {(0, 1): 653.0, (1, 5.5): 2114.8}),
    ("FiTv2-B", 240, {(0, 1): 6552, (0, 1.5): 13104}, {(0, 1): 6529.5, (0, 1.5): 13059.1}),
])  # fmt: skip
def test_table4_compute_of_a_stage_has_that_of_the_stages_before(size, n, paper, ours, monkeypatch):
    def generate(model, y, stages, cfg, *rest):
        rest[-1].extend([torch.tensor([n - 1, n + 1])] * stages)  # as RK45: on average n
        return [y] * stages

    monkeypatch.setattr(sample, "generate", generate)
    codec = sample.Codec()
    codec.decode = lambda latents: latents
    args = Namespace(guide_on="both", solver="dopri5", steps=1, seed=0, batch_size=9)
    dod, y = Namespace(config=CONFIGS[size], cos=torch.ones(1)), torch.ones(2)
    plans = [(1.0, 5.5)] if size == "DoD-B" else [(1.0,), (1.5,)]
    rows = [row for row, _ in evaluate.follow(plans, args, dod, codec, y, None)]
    found = {(int(row["what"][-1]) - 1, row["guidance"]): row["gflops"] for row in rows}
    assert found == pytest.approx(ours, abs=0.06)  # what model.py prints
    assert all(found[key] <= paper[key] for key in paper)
    if size == "DoD-B":  # a real picture as the prior: stage 2 without stage 1
        (row, _), = evaluate.follow([(5.5,)], args, dod, codec, y, y)  # fmt: skip
        assert row["gflops"] == pytest.approx(ours[1, 5.5] - ours[0, 1], abs=0.1)


def test_fig4_reconstruct_and_table2_probe_report_their_columns(ckpt, monkeypatch):
    given = []
    monkeypatch.setattr(sample, "generate", lambda *a, f=sample.generate: given.append(a) or f(*a))
    with pytest.warns(UserWarning, match="40 and 40 pictures for 64 features"):
        flags = ["--num", 40, "--steps", 1, "--cfg", "1,5.5"]
        assert run(evaluate, "reconstruct", "--ckpt", ckpt, *flags) == 0
    rows = json.loads(ckpt.with_name("reconstruct.json").read_text())["rows"][1:]
    assert [row["guidance"] for row in rows] == [1, 5.5]
    assert all(0 < row["psnr"] < 30 and row["ssim"] is None for row in rows)  # 8 < 11 pixels
    images, y = evaluate.first(evaluate.train.load_data("digits", 8, 1, 0.1)[1], 40)  # held out
    assert len(given) == 2 and torch.equal(given[0][1], y)
    assert torch.equal(given[0][9], sample.Codec().encode(images))
    assert run(evaluate, "probe", "--ckpt", ckpt) == 0
    found = json.loads(ckpt.with_name("probe.json").read_text())
    assert (found["checkpoint"]["config"]["N"], found["count"]) == (2, 180)
    assert all(0.15 < row["top1"] < 1 for row in found["rows"])  # even a random LEM beats chance


def test_the_classifier_is_the_same_bytes_each_time_and_mends_a_damaged_file(ckpt):
    training, held_out = evaluate.train.load_data("digits", 8, 1, 0.1)
    saved = sample.load_checkpoint(ckpt)
    network, facts = evaluate.classifier(ckpt, saved, training)
    file = Path(facts["weights"])
    before = file.read_bytes()
    file.write_bytes(before[: len(before) // 2])
    again, _ = evaluate.classifier(ckpt, saved, training)
    assert file.read_bytes() == before
    images, y = evaluate.first(held_out, 180)
    assert (again(images)[1].argmax(1) == y).double().mean() > 0.95
    assert torch.equal(again(images)[0], network(images)[0])


def write_npz(path: Path, images: torch.Tensor, **moments) -> Path:
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **moments)
    return path


def test_samples_reads_npz_and_folders_alike_and_moments_of_a_whole_set(
    ckpt, tmp_path, monkeypatch
):
    training, held_out = evaluate.train.load_data("digits", 8, 1, 0.1)
    (real, _), (fake, _) = evaluate.first(held_out, 99), evaluate.first(training, 80)
    ref, npz = write_npz(tmp_path / "ref.npz", real), write_npz(tmp_path / "a.npz", fake)
    for i, image in enumerate(fake):
        file = tmp_path / f"b/{i % 3}/{i:03}.{'PNG' if i % 2 else 'bmp'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(file)
    (tmp_path / "b/.hidden.png").write_bytes(b"no picture")
    network, _ = evaluate.classifier(ckpt, sample.load_checkpoint(ckpt), training)
    truth = evaluate.compare(*(evaluate.measure(x, network, "x") for x in (real, fake)))
    for path in (npz, tmp_path / "b"):
        flags = ["--features", "classifier", "--ckpt", ckpt, "--overwrite"]
        assert run(evaluate, "samples", "--ref", ref, "--samples", path, *flags) == 0
        found = json.loads(path.with_suffix(".json").read_text())
        assert (found["count"], found["reference_count"]) == (80, 99)
        assert found["rows"][0].pop("what") == path.name
        assert found["rows"][0] == pytest.approx(truth, rel=1e-6)

    def inception(images):  # stands in for Inception's 2048 and 2023 features
        x = images.double().flatten(1)
        return x[:, 10:13], x[:, :4], x[:, 20:22]

    facts = {"features": "inception", "weights": npz}
    monkeypatch.setattr(evaluate, "inception", lambda *a: (inception, facts))
    moments = (np.zeros(3), np.eye(3)), (np.ones(2), np.eye(2))
    (mu, sigma), (mu_s, sigma_s) = moments
    write_npz(ref, real, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    flags = ["--ref", ref, "--samples", npz, "--out", tmp_path / "c.json"]
    assert run(evaluate, "samples", *flags) == 0
    row = json.loads((tmp_path / "c.json").read_text())["rows"][0]
    measured = evaluate.measure(fake, inception, "f")
    assert row["fid"] == evaluate.frechet_distance(*moments[0], *measured.fid)
    assert row["sfid"] == evaluate.frechet_distance(*moments[1], *measured.sfid)


def test_metrics_refuse_what_they_cannot_compare_and_warn_of_sorted_classes():
    a, half = torch.zeros(5, 3, 12, 12, dtype=torch.uint8), torch.full((4, 2), 0.5)
    features = lambda x: (x.float().flatten(1)[:, :2], x.float().flatten(1)[:, :3], None)  # noqa: E731
    reference = evaluate.measure(a, features, "a")
    measure = lambda a, b: evaluate.measure(b, features, "b", reference)  # noqa: E731
    for b in (a[:, :, 1:], a.float(), a[:, :1]):  # another size, floats, grey
        for compare in (evaluate.psnr, evaluate.ssim, measure):
            with pytest.raises(model.UserError, match="uint8"):
                compare(a, b)
    fid, mu, sigma = evaluate.frechet_distance, half[0], half[:2]
    for words, call in {
        "NaN": lambda: evaluate.measure(a, lambda x: (half * torch.nan, x, None), "a"),
        "at least 4 pictures": lambda: evaluate.precision_recall(half[:3], half),
        "empty or NaN": lambda: evaluate.inception_score(half, splits=10),
        "shapes": lambda: fid(mu, sigma, mu, torch.eye(3)),
        "finite": lambda: fid(mu, sigma * torch.nan, mu, sigma),
    }.items():
        with pytest.raises(model.UserError, match=words):
            call()
    g, logits = torch.Generator().manual_seed(0), 9 * torch.eye(10).repeat(100, 1)
    pool = torch.rand(1000, 2, generator=g)
    real = evaluate.Measured((), "", (pool.mean(0), pool.T.cov()), (), pool, logits)
    evaluate.compare(real, real._replace(logits=logits[torch.randperm(1000, generator=g)]))
    with pytest.warns(UserWarning, match="order of class"):
        evaluate.compare(real, real._replace(logits=logits[logits.argmax(1).argsort()]))


def test_commands_name_what_is_wrong_with_a_file_or_flag_in_one_line(ckpt, tmp_path, capsys):
    images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    good = write_npz(tmp_path / "good.npz", images)
    write_npz(tmp_path / "rgb.npz", images.expand(-1, 3, -1, -1))
    write_npz(tmp_path / "float.npz", images.float())
    np.savez(tmp_path / "no.npz", images=np.zeros(3))
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    for name, sizes in {"two": (8, 9), "empty": (), "broken": (8,)}.items():
        (tmp_path / name).mkdir()
        for size in sizes:
            Image.new("L", (size, size)).save(tmp_path / name / f"{size}.png")
    (tmp_path / "broken" / "7.jpeg").write_bytes(b"no picture")
    (tmp_path / "code.pth").write_bytes(f"cbuiltins\nopen\n(V{tmp_path}/ran\nVw\ntR.".encode())
    flags = ["samples", "--ref", good, "--out", tmp_path / "x.json"]
    classifier = ["--features", "classifier", "--ckpt", ckpt]
    for name, words, more in (
        ("two", "(1, 9, 9)", classifier), ("empty", "0 pictures", classifier),
        ("broken", "7.jpeg", classifier), ("no.npz", "arr_0", classifier),
        ("bad.npz", "bad.npz", classifier), ("rgb.npz", "(3, 8, 8)", classifier),
        ("float.npz", "float32", classifier), ("nowhere.npz", "nowhere.npz", classifier),
        ("good.npz", "weights-inception-2015", ["--inception", tmp_path / "nowhere"]),
        ("good.npz", "--inception PATH", ["--inception", tmp_path / "bad.npz"]),
        ("good.npz", "code.pth", ["--inception", tmp_path / "code.pth"]),
        ("good.npz", "--ckpt", ["--features", "classifier"]),
        ("good.npz", "--steps", ["--steps", "3"]),
    ):  # fmt: skip
        assert run(evaluate, *flags, "--samples", tmp_path / name, *more) == 2
        error = capsys.readouterr().err.replace("\r", "\n").strip().split("\n")[-1]
        assert error.startswith("evaluate.py") and words in error, error
    assert run(evaluate, "stagse") == run(evaluate) == 2
    assert not (tmp_path / "x.json").exists() and not (tmp_path / "ran").exists()


# ------------------------------------------------------------------ the README keeps its word


@pytest.mark.parametrize("script", [train, sample])
def test_torchrun_leaves_every_flag_to_the_script(script, capsys):
    from torch.distributed.run import get_args_parser

    with pytest.raises(SystemExit):
        script.parse(["--help"])
    flags = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out)) - {"--num"}
    assert len(flags) > 20
    for flag in flags:  # an ambiguous abbreviation of torchrun's own would be refused
        assert get_args_parser().parse_args([f"{script.__name__}.py", flag]).training_script_args


def test_every_command_of_the_readme_parses():
    text = (HERE / "README.md").read_text()
    launch = r"(?:python|torchrun[^\n`]*?) (train|sample|evaluate)\.py([^\n`#&]*)"
    commands = re.findall(launch, text)
    assert len(commands) > 8 and len({script for script, _ in commands}) == 3
    for script, flags in commands:
        if flags.strip() and "..." not in flags:  # not in prose
            globals()[script].parse(flags.split())


def test_every_row_of_the_readme_s_map_exists():
    rows = re.findall(r"^\| (?:Eq|Table|Fig|Sec).*", (HERE / "README.md").read_text(), re.MULTILINE)
    source = {path.name: path.read_text() for path in HERE.glob("*.py")}
    assert len(rows) > 11
    for row in rows:
        for file, name in re.findall(r"`(\w+\.py)` `([\w.]+)`", row):
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source[file]), (file, name)
        for test in re.findall(r"`(test_\w+)`", row):
            assert f"def {test}(" in source["test_dod.py"], test
    for number in range(1, 12):  # each equation is cited where it is computed, and in the map
        assert any(row.startswith(f"| Eq. {number},") for row in rows)
        assert any(
            f"Eq. {number}" in code for name, code in source.items() if name != "test_dod.py"
        )
