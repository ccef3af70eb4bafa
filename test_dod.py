"""test_dod.py -- one test or more for each equation, table and promise. Run: python -m pytest -q

The expected values come from closed forms, identities, SciPy and other libraries."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import active_children, forkserver
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import integrate, linalg, ndimage
from scipy.spatial.distance import cdist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing import start_processes
from torch.nn.utils import get_total_norm, parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import flow
import lem
import model
import sample
import train
from model import CONFIGS, Config, DoD, FiTv2, UserError, build_model
from sample import Sampler

# A model small enough for every test: T = 16 tokens, patches of 2 * 2 * 3 = 12 numbers.
TINY = Config(
    depth=2, d=32, heads=2, r=4, encoder_depth=1, decoder_depth=1, d_l=16, lem_heads=2, N=3, d_e=8,
    p=2, latent_size=8, latent_channels=3, num_classes=5,
)  # fmt: skip
# The flags of a run of six steps on letters of 8 x 8 pixels, and those of a set of samples.
QUICK = "--image-size 8 --batch-size 8 --steps 6 --held-out 0.002 --log-every 2 --save-every 3"
QUICK = [*QUICK.split(), "--device", "cpu"]
SET = ["--device", "cpu", "--steps", 2, "--seed", 7, "--batch-size", 4]
EULER = Sampler("euler", 2, seed=7)  # what SET asks for
# Threads do not help small models, and disturb each other on a busy machine.
torch.set_num_threads(1)  # in this process
os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}  # for those that tests start
# A batch: data and noise (6, 3, 8, 8), classes and times (6,).
X0, X1 = torch.randn(2, 6, 3, 8, 8, generator=torch.manual_seed(0))
Y = torch.arange(6) % 5
TIMES = torch.rand(6)
HALF = torch.tensor([0, 3, 4])  # `with_prior` if three of its images keep theirs
TRAINING, HELD_OUT, _ = train.load_data("letters", 16, 1, 0.1)
PIXELS = sample.Codec()  # without a VAE: the latent is the image itself
PLOT = Mock()  # stands in for train.plot_log, which takes a third of a second


def awake(config: Config = TINY) -> DoD:
    """A DoD whose zero-initialised layers are not zero, so that every input matters."""
    torch.manual_seed(0)
    dod = build_model(config)
    for p in dod.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return dod.eval()


def close(a, b, tolerance: float = 1e-5) -> bool:
    """Whether two tensors or numbers agree within an absolute plus a relative tolerance."""
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------- Eqs. 1-4, 11: the rectified flow


def test_eq1_the_path_joins_data_and_noise_at_constant_velocity():
    # PyTorch's lerp; at t = 0 it is x_0. Then the examples of two docstrings.
    assert close(flow.interpolate(X0, X1, TIMES), X0.lerp(X1, TIMES.view(6, 1, 1, 1)), 2e-6)
    assert torch.equal(flow.interpolate(X0, X1, torch.zeros(6)), X0)
    point = flow.interpolate(*torch.tensor([[2.0], [-1.0], [0.25]]))
    assert point.item() == 1.25 and flow.guide(v_c=2.0, v_u=1.0, w=3.0) == 4


@pytest.mark.parametrize("with_prior", [HALF[:0], HALF, torch.arange(6)], ids=len)
def test_eq3_each_image_sees_its_own_prior_or_the_sample_token(with_prior):
    dod = awake()
    loss = flow.rectified_flow_loss(dod, X0, Y, X1, TIMES, with_prior)

    # The model alone, on one image after another: losses, and gradients of all its parts.
    alone = []
    for i in range(6):
        e_s = dod.visual_prior(X0[[i]]) if i in with_prior else None
        v = dod(flow.interpolate(X0[[i]], X1[[i]], TIMES[[i]]), TIMES[[i]], Y[[i]], e_s)
        alone.append((X1[[i]] - X0[[i]] - v).square().mean())
    assert close(loss, torch.stack(alone))
    gradients = partial(torch.autograd.grad, inputs=[*dod.parameters()], materialize_grads=True)
    torch.testing.assert_close(gradients(loss.sum()), gradients(sum(alone)), rtol=1e-4, atol=1e-4)


def test_eq3_under_autocast_the_residual_stream_and_the_loss_stay_fp32():
    dod = awake()
    streams = []
    for block in (*dod.lem.encoder, *dod.lem.decoder, *dod.blocks):
        block.register_forward_pre_hook(lambda block, inputs: streams.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = flow.rectified_flow_loss(dod, X0, Y, X1, TIMES, HALF)
    assert [*streams, loss.dtype] == [torch.float32] * 5
    assert close(loss, flow.rectified_flow_loss(dod, X0, Y, X1, TIMES, HALF), 0.05)

    # AdaLN adds 1 to a scale that bf16 would round away.
    scale = torch.tensor(0.0035, dtype=torch.bfloat16)
    assert close(model.adaln(X0, 0 * scale, scale), model.layer_norm(X0) * 1.0035)


def test_eq11_noise_logit_normal_t_and_dropped_classes_are_a_function_of_seed_and_step():
    # What the generator drew before does not matter; seed and step do.
    config = replace(TINY, latent_size=2, latent_channels=1)
    draw = partial(train.draw_noise, batch_size=200_000, config=config, generator=torch.Generator())
    draws = draw(7, 3)
    assert all(map(torch.equal, draws, draw(7, 3)))
    for key in ((8, 3), (7, 4), (3, 7)):
        assert not any(map(torch.equal, draws, draw(*key)))

    # Standard normal x1 and eps and Eq. 11's times, all independent. Classes drop at every t.
    x1, eps, t, dropped = draws
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    assert close(t.double().quantile(quantiles), torch.special.ndtri(quantiles).sigmoid(), 4e-3)
    numbers = torch.cat([x1.flatten(1), eps.flatten(1), t.logit()[:, None]], dim=1)
    assert (numbers.T.cov() - torch.eye(9)).abs().max() < 0.04 and numbers.mean(0).norm() < 0.05
    assert abs(dropped[t < 0.4].double().mean() - 0.1) < 0.012


@pytest.mark.parametrize("p_s", [0, 0.25, 0.5, 0.9, 1])
def test_section_3_3_exactly_p_s_of_a_batch_and_of_each_share_lose_their_prior(p_s):
    for n in (1, 5, 8, 63, 256):
        kept = flow.keeps_prior(n, p_s)
        assert (kept.dtype, len(kept), kept.sum()) == (torch.bool, n, n - round(p_s * n))
        share = kept[n // 3 : n // 2]
        assert abs(share.sum() - (1 - p_s) * len(share)) <= 1


def test_eq2_and_eq4_euler_is_exact_on_straight_paths_and_counts_its_evaluations():
    # Eq. 4's times tau are uniform, from 1 down to 1 / 10, and the same for all images.
    straight = Mock(side_effect=lambda x, t, rows: (X1 - X0)[rows])
    found, nfe = flow.euler(straight, X1, 10)
    assert close(found, X0) and nfe.tolist() == [10] * 6
    times = torch.stack([call.args[1] for call in straight.mock_calls], dim=1)
    assert close(times, torch.arange(10, 0, -1).expand(6, 10) / 10)

    # Each step starts where the last one ended: of dx/dt = x, it takes a tenth of what is left.
    assert close(flow.euler(lambda x, t, rows: x, X1, 10)[0], X1 * 0.9**10)
    for wrong in (partial(flow.euler, straight, X1, 0), partial(flow.guide, X0, X1, 0.99)):
        with pytest.raises(ValueError, match="at least 1"):
            wrong()


def test_eq4_rk45_equals_scipy_for_each_image_in_result_and_evaluations():
    A = torch.tensor([[0.0, 3.0], [-3.0, -0.5]], dtype=torch.float64)
    velocities = [
        # dx/dt = A x + sin(5 t): smooth, and stiffer in some images (rows) than in others.
        lambda x, t, rows: (x @ A.T + torch.sin(5 * t)[:, None]) * (1 + rows[:, None] / 4),
        # Stands still down to t = 0.5, then decays fast: steps are rejected.
        lambda x, t, rows: 60 * x * torch.sigmoid(300 * (0.5 - t))[:, None],
        # So slow that a first step could leave [0, 1], and not finite below t = 0.
        lambda x, t, rows: x * t.sqrt()[:, None] / 1000,
        # Its own input, here the noise itself, which must not change.
        lambda x, t, rows: x,
    ]
    x1 = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x1[3] = 0  # takes another branch of Hairer's first step
    noise = x1.clone()

    # SciPy solves for one image, from t = 1 down to 0. Its defaults are RK45 and SiT's tolerances.
    def scipy_f(t, x, f, i):
        return f(torch.tensor(x)[None], torch.tensor([t]), torch.tensor([i]))[0].numpy()

    for f in velocities:
        x0, nfe = flow.dopri5(f, x1)
        assert torch.equal(x1, noise)
        for i in range(8):
            scipy = integrate.solve_ivp(scipy_f, (1, 0), x1[i].numpy(), args=(f, i))
            assert nfe[i] == scipy.nfev
            assert close(x0[i], scipy.y[:, -1], 1e-7)

    # It stops at a velocity that is infinite at late times, at all but the first one, or always.
    for limit in (0.5, 1, 2):
        with pytest.raises(FloatingPointError, match="velocity is not finite near t = [01]"):
            flow.dopri5(lambda x, t, rows, s=limit: x.where(t[:, None] >= s, torch.inf), x1)


# ---------------------------------- Eqs. 5-10, Tables 1 and 4: the visual prior and the backbone


@pytest.mark.parametrize("stage", [1, 2])
def test_eq5_first_stage_uses_the_sample_token_and_later_ones_a_prior_for_each_token(stage):
    # Time enters unscaled, as cosines and then sines. S is alike for all tokens.
    dod = awake()
    angle = TIMES[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    e_t = dod.time.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))
    prior = dod.visual_prior(X0) if stage == 2 else None
    e_s = dod.prior_mlp(dod.lem(X0)) if stage == 2 else dod.S.expand(6, 16, -1)
    assert {type(dod.time.mlp[1]), type(dod.prior_mlp[1])} == {torch.nn.SiLU}
    silu_c = F.silu((dod.label.weight[Y] + e_t)[:, None] + e_s)

    # All that c does, it does through the modulations: W^g c, each block's own, the last layer's.
    x = dod.patch_embed(lem.patchify(X1, 2))
    for block in dod.blocks:
        x = block(x, silu_c, dod.W_g(silu_c), *model.rope_2d(16, 4))
    shift, scale = dod.final.adaln(silu_c).chunk(2, dim=-1)
    x = dod.final.linear(F.layer_norm(x, [32], eps=1e-6) * (1 + scale) + shift)
    assert close(dod(X1, TIMES, Y, prior), lem.unpatchify(x, 2))

    # FiTv2 has the same backbone and the condition e_c + e_t: that of a DoD with S = 0.
    plain = build_model(replace(TINY, N=0))
    assert type(plain) is FiTv2 and type(dod) is DoD
    plain.load_state_dict(dod.state_dict(), strict=False)
    dod.S.data.zero_()
    assert torch.equal(plain(X1, TIMES, Y), dod(X1, TIMES, Y))
    assert build_model(replace(TINY, num_classes=1)).null_class == 0  # with one, none is dropped


def test_eq6_the_encoder_is_the_written_out_formula_with_vit_blocks():
    dod = awake(replace(TINY, heads=4, encoder_depth=3, decoder_depth=2))
    assert (len(dod.lem.encoder), len(dod.lem.decoder)) == (3, 2)
    assert [block.heads for block in (*dod.lem.encoder, *dod.lem.decoder)] == [2] * 5

    # L_hat = Enc((e_p + PE) ⊕ L), of which the latent tokens are kept.
    e_p = dod.lem.patch_embed(lem.patchify(X0, 2))
    L = dod.lem.latent_tokens.expand(6, -1, -1)
    x = dod.lem.encoder(torch.cat([e_p + lem.sincos_2d(16, 4, 4), L], dim=1))
    l_hat = dod.lem.to_d_e(dod.lem.encoder_norm(x))[:, 16:]
    assert close(dod.lem.encode(X0), l_hat)

    # The blocks are ViT's: PyTorch's pre-norm block is given our weights, in its own order.
    ours = dod.lem.encoder[0]
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", 1e-6, True, True)
    layers = [ours.qkv, ours.proj, ours.mlp[0], ours.mlp[2], ours.norm1, ours.norm2]
    for p, q in zip(theirs.parameters(), torch.nn.ModuleList(layers).parameters(), strict=True):
        p.data = q.data
    assert close(ours(e_p), theirs(e_p))

    # PE: sines and cosines of the row, then of the column, in a grid of 3 x 5.
    w = 10000.0 ** (-torch.arange(4) / 4)
    row, column = torch.cartesian_prod(torch.arange(3), torch.arange(5)).T[:, :, None] * w
    pe = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
    assert close(lem.sincos_2d(16, 3, 5), pe)


def test_eq7_the_decoder_is_the_written_out_formula():
    # e_s = Dec((M + PE) ⊕ L_hat), of which the patches are kept.
    dod = awake(replace(TINY, decoder_depth=2))
    M = dod.lem.mask_token.expand(6, 16, -1)
    x = torch.cat([M + lem.sincos_2d(8, 4, 4), dod.lem.encode(X0)], dim=1)
    x = dod.lem.decoder(dod.lem.from_d_e(x))
    assert close(dod.lem(X0), dod.lem.head(dod.lem.decoder_norm(x))[:, :16])


def test_eq8_swiglu_is_the_written_out_formula():
    ffn = model.SwiGLU(12)
    x = torch.randn(5, 12)
    gate = x @ ffn.W_1.weight.T + ffn.W_1.bias
    value = x @ ffn.W_2.weight.T + ffn.W_2.bias
    expected = (gate * gate.sigmoid() * value) @ ffn.W_3.weight.T + ffn.W_3.bias
    assert close(ffn(x), expected)
    assert len(model.SwiGLU(10).W_1.weight) == 26  # of 8/3 d = 26.7


def test_eq9_attention_is_the_written_out_formula_with_2_d_rope():
    attention = model.Attention(16, 2)
    x = torch.randn(3, 9, 16) * 100
    qkv = attention.qkv(x).reshape(3, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)

    # RoPE: a pair of channels is a complex number. Half of them turn by w row, half by w column.
    w = 10000.0 ** (-torch.arange(2) / 2)
    places = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # (9, 2)
    turn = torch.exp(1j * (places[:, :, None] * w).flatten(1))  # (9, 4)

    # The pairs are neighbours: channels 2k and 2k + 1.
    pairs = torch.view_as_complex(F.layer_norm(qkv[:2], [8], eps=1e-6).unflatten(-1, (4, 2)))
    q, k = torch.view_as_real(pairs * turn).flatten(-2)
    logits = q @ k.transpose(-1, -2) / math.sqrt(8)
    attended = (logits.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(3, 9, 16)
    assert close(attention(x, *model.rope_2d(8, 3)), attention.proj(attended), 1e-3)


def test_eq10_modulation_is_a_shared_part_plus_a_block_s_own():
    dod = awake()
    block = dod.blocks[0]
    x = torch.randn(4, 16, 32) / 1000  # so small that the LayerNorm's epsilon counts
    silu_c = torch.randn(4, 1, 32)
    global_S = torch.randn(4, 1, 192)

    # The order is shifts, scales, gates, each for attention and then for the feed-forward network.
    S = (global_S + block.W_2(block.W_1(silu_c))).unflatten(-1, (6, 32))
    beta_1, beta_2, gamma_1, gamma_2, alpha_1, alpha_2 = S.unbind(2)
    norm = partial(F.layer_norm, normalized_shape=[32], eps=1e-6)
    h = x + alpha_1 * block.attention(norm(x) * (1 + gamma_1) + beta_1, dod.cos, dod.sin)
    expected = h + alpha_2 * block.ffn(norm(h) * (1 + gamma_2) + beta_2)
    assert close(block(x, silu_c, global_S, dod.cos, dod.sin), expected, 1e-4)


def test_a_new_model_starts_at_v_0_without_modulation():
    torch.manual_seed(0)
    dod = build_model(replace(TINY, d=512, N=64, d_e=512, num_classes=500))

    # Modulations, last layer and biases are zero, other linear layers Xavier, tables N(0, 0.02).
    zero = {dod.W_g, dod.final.adaln, dod.final.linear, *(block.W_2 for block in dod.blocks)}
    for layer in dod.modules():
        if isinstance(layer, torch.nn.Linear):
            bound = math.sqrt(6 / sum(layer.weight.shape)) * (layer not in zero)
            assert 0.9 * bound <= layer.weight.abs().max() <= bound
            assert layer.bias.abs().max() == 0
    for table in (dod.label.weight, dod.S, dod.lem.latent_tokens, dod.lem.mask_token):
        assert abs(table.std() / 0.02 - 1) < 0.1


def test_table1_parameters_heads_and_guidance_scales():
    # In millions: the backbone's and LEM's. The paper rounds them to 27 + 21, 105 + 86 and so on.
    names = "DoD-S DoD-B DoD-XL FiTv2-B FiTv2-XL DoD-Ti FiTv2-Ti"
    configs = [CONFIGS[name] for name in names.split()]
    counts = torch.tensor([model.count_parameters(config) for config in configs]).T / 1e6
    backbone = [26.53, 104.96, 527.13, 128.15, 671.05, 1.13, 1.32]
    paper = [backbone, [21.47, 85.71, 85.71, 0, 0, 0.62, 0]]
    assert (counts - torch.tensor(paper)).abs().max() < 0.006

    # Heads are not seen in these numbers, nor are defaults and section 4.2's guidance scales.
    assert [config.heads for config in configs] == [6, 12, 16, 12, 16, 4, 4]
    assert [config.lem_heads for config in (*configs[:3], configs[5])] == [6, 12, 12, 4]
    assert [config.w for config in configs[:3]] == [5.5, 5.5, 3.5]
    assert CONFIGS["DoD-B"] == Config()


def test_table4_compute_and_what_a_stage_really_runs(capsys):
    # No row of the table costs more than in the paper.
    model.print_table_4()
    table = re.findall(r"^  .*\S  +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert len(table) == 12 and table[:2] == [("24.6", "24.6"), ("26.5", "26.4")]
    assert all(0.8 * float(paper) < float(ours) <= float(paper) for paper, ours in table)

    # A stage of two evaluations with c for each token, and one with c for each image.
    dod = awake()
    with torch.no_grad(), FlopCounterMode(display=False) as stage:
        e_s = dod.visual_prior(X0)
        for prior in (e_s, e_s, None):
            dod(X1, TIMES, Y, prior)

    # In training LEM runs only for the images that keep their prior (section 3.3).
    with torch.no_grad(), FlopCounterMode(display=False) as loss:
        flow.rectified_flow_loss(dod, X0, Y, X1, TIMES, HALF)
    macs = model.count_macs(TINY)
    addmm = [mode.get_flop_counts()["Global"][torch.ops.aten.addmm] for mode in (stage, loss)]
    assert addmm[0] == 2 * 6 * model.stage_macs(macs, per_token=2, per_image=1)
    assert addmm[1] == 2 * (3 * (macs["lem"] + macs["prior_mlp"]) + 6 * macs["e_s"])


def test_section_1_patches_pass_everything_on_and_means_a_mean():
    # Patches are cut row by row, pixels before channels, and put back in their places.
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(lem.patchify(x, 2)[:, 5], x[:, :, 2:, 4:].permute(0, 2, 3, 1).flatten(1))
    patches = lem.patchify(X0, 2)
    assert torch.equal(lem.unpatchify(patches, 2), X0)

    # What LEM would return is a linear function of a token's own patch, or of its pixels' mean.
    means = patches.unflatten(-1, (4, 3)).mean(2)
    for prior_from, passed in (("patches", patches), ("means", means)):
        dod = awake(replace(TINY, prior_from=prior_from))
        e_l = passed @ dod.lem.embed.weight.T + dod.lem.embed.bias
        assert close(dod.visual_prior(X0), dod.prior_mlp(e_l))


def test_the_demonstrations_run(monkeypatch, capsys):
    flow.main()
    lem.main()

    # DoD-B: a step is 3 passes of 2 (38.6 + 2.0) GFLOP; 190.67 M parameters take 20 bytes each.
    monkeypatch.setattr(model, "CONFIGS", {"DoD-B": CONFIGS["DoD-B"]})
    model.print_table_1()
    assert re.search(r"85.71 M(.|\n)*DoD-B .* 243.4 +62.3 +3.81\n", capsys.readouterr().out)
    assert 1e8 < train.matmul_rate(torch.device("cpu"), bf16=False) < 1e14  # run() patches it


def run(module, *argv) -> int:
    """A script's command in this process -> its exit status."""
    sys_argv = patch.object(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    with sys_argv, patch.multiple(train, plot_log=PLOT, matmul_rate=lambda *given: 1e12):
        try:
            return sample.run_command(module.main) or 0
        except SystemExit as leave:
            return leave.code
        finally:  # a training run catches signals, and Ctrl-C should end pytest
            train.on_signals(handler=signal.default_int_handler)


def work(rank: int, name: str, argv: tuple, ranks: str, port: str) -> None:
    """All that a process of launch() does."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": ranks, "MASTER_PORT": port}
    sys.exit(run(sys.modules[name], *argv))


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch) -> None:
    """Runs each test in a folder of its own, and starts the process that launch() forks from."""
    forkserver.set_forkserver_preload(["test_dod"])
    forkserver.ensure_running()  # once, before the first test leaves this file's folder
    monkeypatch.chdir(tmp_path)


def launch(module, *argv, ranks: int = 1) -> list:
    """Starts a script in processes of their own, with the variables that torchrun sets."""
    given = (module.__name__, argv, str(ranks), str(get_free_port()))
    return start_processes(work, given, ranks, False, True, "forkserver").processes


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> str:
    """The folder of a tiny VAE of random weights, with a scale and a shift."""
    out = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    pytest.importorskip("diffusers").AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16], norm_num_groups=4, latent_channels=4, scaling_factor=3.0,
        shift_factor=0.5,
    ).save_pretrained(out)  # fmt: skip
    return str(out)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("run") / "a"
    assert run(train, *QUICK, "--keep-every", 3, "--out", out) == 0
    return out


def awaken(path: Path, out: Path, **changes) -> Path:
    """Writes a checkpoint again, with a changed config and weights that let all inputs matter."""
    saved = sample.load_checkpoint(path)
    config = Config(**saved["config"] | changes)
    torch.save(saved | {"config": asdict(config), "ema": awake(config).state_dict()}, out)
    return out


@pytest.fixture(scope="session")
def colours(vae, tmp_path_factory) -> Path:
    """A folder with a finished run on colour images, their `data` and their latents' `cache`."""
    home = tmp_path_factory.mktemp("colours")
    flags = ["--data", folder(home / "data", 16), "--vae", vae, "--cache", home / "cache"]
    flags += ["--image-size", 16, "--held-out", 0.3, "--steps", 1, "--out", home / "run"]
    assert run(train, *QUICK, *flags) == 0
    return home


def before_step(monkeypatch, f) -> None:
    """Each step of the runs to come first calls f(step, what it was given)."""
    training_step = train.training_step

    def watched(network, ema, optimizer, batch, with_prior, step, *rest):
        lr = [group["lr"] for group in optimizer.param_groups]
        given = Namespace(network=network, batch=list(batch), rows=with_prior, lr=lr, rest=rest)
        given.weights = parameters_to_vector(network.parameters())  # a copy
        f(step, given)
        return training_step(network, ema, optimizer, given.batch, with_prior, step, *rest)

    monkeypatch.setattr(train, "training_step", watched)


def folder(path: Path, side: int = 8) -> Path:
    """A folder of 20 random colour images in the classes a to e."""
    rng = np.random.default_rng(0)
    for k in range(20):
        file = path / "abcde"[k % 5] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(file)
    return path


def records_of(out: Path, *keys: str) -> list[list]:
    """Some columns of a run's log."""
    lines = (out / "log.jsonl").read_text().splitlines()
    return [[json.loads(line).get(key) for key in keys] for line in lines]


def test_section_4_1_one_batch_can_be_learned_by_heart():
    # The first loss is that of v = 0. Its gradient is clipped, and none is left over in step 2.
    torch.manual_seed(0)
    dod = build_model(TINY)
    ema = build_model(TINY).requires_grad_(False)
    step = partial(train.training_step, dod, ema, with_prior=HALF)
    still = torch.optim.AdamW(dod.parameters(), 0.0, weight_decay=0)
    *found, norm = step(still, (100 * X0, 100 * X1, TIMES, Y), step=1)
    losses = 1e4 * (X1 - X0).square().flatten(1).mean(1)
    kept = losses[HALF].sum()
    assert close(torch.stack(found), torch.stack([losses.mean(), kept, losses.sum() - kept]))
    assert norm > 10 and close(get_total_norm(p.grad for p in dod.parameters()), 1.0, 1e-3)
    assert step(still, (100 * X0, 100 * X1, TIMES, Y), step=2)[3] == norm

    # A hundred steps on the same images, noises and times.
    optimizer = torch.optim.AdamW(dod.parameters(), 3e-3, weight_decay=0)
    for n in range(1, 101):
        loss = step(optimizer, (X0, X1, TIMES, Y), step=n)[0]
    assert loss < (X1 - X0).square().mean() / 10

    # In bf16 the loss is nearly that in fp32, and not the same.
    loss = step(still, (X0, X1, TIMES, Y), step=151)[0]
    rounded = step(still, (X0, X1, TIMES, Y), step=151, bf16=True)[0]
    assert 0 < abs(rounded - loss) < 0.05

    # Each step ends with the EMA's, whose decay is (1 + n) / (10 + n) early on.
    for n, decay, effective in ((5, 0.999, 6 / 15), (10**6, 0.3, 0.3)):
        before = parameters_to_vector(ema.parameters())
        step(optimizer, (X0, X1, TIMES, Y), step=n, ema_decay=decay)
        expected = before.lerp(parameters_to_vector(dod.parameters()), 1 - effective)
        assert close(parameters_to_vector(ema.parameters()), expected, 1e-6)


def test_each_step_of_a_run_gets_its_images_noise_times_classes_and_rate(monkeypatch, tmp_path):
    # A run over more than three epochs of 15 images, with all flags that concern a step.
    steps = []
    before_step(monkeypatch, lambda step, given: steps.append(given))
    data = folder(tmp_path / "data")
    flags = "--held-out 0.25 --seed 4 --class-groups 2 --p-s 0.25 --lr 0.01 --lem-lr-factor 0.5"
    flags += " --warmup 2 --ema-decay 0.5 --precision bf16"
    assert run(train, *QUICK, *flags.split(), "--data", data, "--out", tmp_path / "out") == 0
    assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"

    # What each step should have been given, put together by hand. Images are mirrored by default.
    images, held_out, _ = train.load_data(str(data), 8, 3, 0.25, 2)
    files = sorted(map(str, data.rglob("*.png")))
    assert held_out.members + images.members == [*np.random.default_rng(0).permutation(files)]
    assert (images.classes, images.original_classes) == (["a-c", "d-e"], [*"abcde"])

    def read(data, numbers, flips):
        """-> latents and the model's classes of some images."""
        files = [Path(data.members[i]) for i in numbers]
        pixels = np.array([Image.open(file) for file in files])
        pixels[flips] = pixels[flips, :, ::-1]
        y = torch.tensor(["abcde".index(file.parent.name) * 2 // 5 for file in files])
        return torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1, y

    orders = [np.random.default_rng((4, 1, epoch)).permutation(15) for epoch in range(4)]
    kept = flow.keeps_prior(8, 0.25).nonzero().squeeze(1)
    for step, given in enumerate(steps, 1):
        numbers = np.concatenate(orders)[8 * step - 8 : 8 * step]
        x0, y = read(images, numbers, np.random.default_rng((4, 0, step)).random(8) < 0.5)
        config = given.network.config
        x1, _, t, dropped = train.draw_noise(4, step, 8, config, torch.Generator())
        expected = (x0, x1, t, y.where(~dropped, 2))  # 2: the null class
        assert all(map(torch.equal, given.batch, expected))
        assert torch.equal(given.rows, kept) and given.rest == (True, 0.5)

    # The rates warm up, LEM's and its MLP's at half of the other; the seed gives the first weights.
    assert [given.lr for given in steps] == [[0.005, 0.0025], *[[0.01, 0.005]] * 5]
    torch.manual_seed(4)
    assert torch.equal(steps[0].weights, parameters_to_vector(build_model(config).parameters()))

    # The held-out loss, also in parts: EMA weights, fp32, the noise of step 0, no class dropped.
    saved = sample.load_checkpoint(tmp_path / "out/ckpt.pt")
    own = [n for n, _ in given.network.named_parameters() if n.startswith(("lem", "prior_mlp"))]
    assert len(saved["optimizer"]["param_groups"][1]["params"]) == len(own)
    x0, y = read(held_out, range(5), [False] * 5)
    x1, _, t, _ = train.draw_noise(4, 0, 5, config, torch.Generator())
    kept = flow.keeps_prior(5, 0.25)
    losses = flow.rectified_flow_loss(sample.load_model(saved), x0, y, x1, t, torch.where(kept)[0])
    expected = [losses.mean(), losses[kept].mean(), losses[~kept].mean()]
    keys = ("held_out_loss", "held_out_loss_prior", "held_out_loss_S")
    assert records_of(tmp_path / "out", *keys)[-1] == pytest.approx(torch.stack(expected).tolist())

    # In training, six images of a batch have their prior and two have S.
    keys = ("loss", "loss_prior", "loss_S", "images_per_s", "matmul_share")
    loss, with_prior, with_S, images_per_s, share = records_of(tmp_path / "out", *keys)[1]
    assert 8 * loss == pytest.approx(6 * with_prior + 2 * with_S)
    assert share == pytest.approx(images_per_s * model.training_flops(config, 0.25) / 1e12)


def test_a_run_stopped_or_killed_and_resumed_ends_with_the_same_bytes(tmp_path, monkeypatch):
    # Workers ignore SIGTERM; the run saves step 3 and ends. No second run may write there.
    flags = [*QUICK, "--steps", "8", "--save-every", "1", "--out"]
    assert run(train, *flags, tmp_path / "whole") == 0
    out = tmp_path / "killed"
    flags += [str(out), "--resume"]

    def disturb(step, given):
        for worker in active_children():
            worker.terminate()
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(OSError, match="could not be acquired"), train.lock(out):
                pass

    before_step(monkeypatch, disturb)
    assert run(train, *flags, "--workers", 1) == 130
    assert sample.load_checkpoint(out / "ckpt.pt")["step"] == 3

    # A kill or a full disk may have left the log ahead of the checkpoint, and damaged lines.
    log = out / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "loss": 9}\n\0\0{"st\n3\n{"step": 3')

    # Processes are killed after training has begun.
    for delay in np.random.default_rng().uniform(0, 0.4, 2):
        before = log.stat().st_mtime_ns
        (process,) = launch(train, *flags)
        while process.is_alive() and log.stat().st_mtime_ns == before:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()  # SIGKILL
        process.join()
        sample.load_checkpoint(out / "ckpt.pt")  # it is whole, always
    assert run(train, *flags) == 0
    assert [file.name for file in out.glob(".*")] == [".dod-lock"]

    # Both runs ended alike, bit for bit: weights, EMA, AdamW's moments and the log.
    ends = []
    for one in (out, tmp_path / "whole"):
        with zipfile.ZipFile(one / "ckpt.pt") as file:
            end = [file.read(name) for name in sorted(file.namelist()) if "/data/" in name]
        ends.append(end + records_of(one, "step", "loss", "loss_S", "grad_norm", "held_out_loss"))
    assert ends[0] == ends[1]


def test_two_ranks_train_as_one_process_does_and_stop_at_a_signal(vae):
    # Two ranks, which encode a cache of 20 images together; their run would not end by itself.
    flags = [*QUICK, "--data", folder(Path("data"), 16), "--vae", vae, "--image-size", 16]
    flags += ["--p-s", 0.25, "--log-every", 1, "--save-every", 10**6, "--cache"]
    log = Path("two/log.jsonl")
    first, second = launch(train, *flags, "cache 2", "--steps", 10**6, "--out", "two", ranks=2)
    while first.is_alive() and not (log.exists() and log.read_text()):
        time.sleep(0.01)
    second.terminate()  # SIGTERM; both vote
    first.join(60)
    second.join(60)
    assert (first.exitcode, second.exitcode) == (130, 130)
    step = sample.load_checkpoint("two/ckpt.pt")["step"]
    assert step >= 10

    # One process, and one that goes on with what the two have begun, differ from them by rounding.
    flags += ["cache 1", "--steps", step + 1, "--out"]
    assert run(train, *flags, "one") == 0
    assert run(train, *flags, "two", "--resume") == 0
    keys = ("step", "loss", "loss_prior", "loss_S", "grad_norm", "lr", "held_out_loss_S")
    found, expected = (np.array(records_of(Path(out), *keys), float) for out in ("two", "one"))
    assert np.allclose(found, expected, rtol=0.01, equal_nan=True)


def test_nothing_bad_takes_the_place_of_a_checkpoint(monkeypatch, tmp_path, capfd):
    # The data of step 5 are not numbers; the log looks at it in step 6.
    before_step(monkeypatch, lambda step, given: step == 5 and given.batch[0].fill_(math.nan))
    assert run(train, *QUICK, "--out", tmp_path) == 2
    assert "the loss of step 5 (or its gradient) is not finite" in capfd.readouterr().err
    assert sample.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 3

    # A finite loss may have a gradient that is not.
    with pytest.raises(FloatingPointError, match="step 7 "):
        train.after_interval(None, 7, [torch.tensor([0, 0, 0, math.inf])], 0, 0, True, False)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_finished_is_saved_before_an_error_ends_a_run(workers, tmp_path, capfd):
    # The first image of step 2 is unreadable; step 1 is saved.
    data = folder(tmp_path / "data")
    flags = [*QUICK, "--data", data, "--held-out", 0.25, "--workers", workers, "--out"]
    images, _, _ = train.load_data(str(data), 8, 3, 0.25)
    file = Path(images.members[np.random.default_rng((0, 1, 0)).permutation(15)[8]])
    file.write_text("no image")
    assert run(train, *flags, tmp_path / "a") == 2
    assert f"{file} is not a readable image" in capfd.readouterr().err
    assert sample.load_checkpoint(tmp_path / "a/ckpt.pt")["step"] == 1
    assert not active_children()

    # But not if step 1 had a loss that is not finite.
    with patch.object(train, "training_step", return_value=torch.full((4,), math.nan)):
        assert run(train, *flags, tmp_path / "nan") == 2
    assert sample.load_checkpoint(tmp_path / "nan/ckpt.pt")["step"] == 0

    # It is removed, and the run goes on; an error in the held-out loss comes after step 3 is saved.
    file.unlink()
    with patch.object(train, "held_out_loss", Mock(side_effect=UserError("odd"))):
        assert run(train, *flags, tmp_path / "a", "--resume") == 2
    assert "files of --data were added, removed" in capfd.readouterr().out
    assert sample.load_checkpoint(tmp_path / "a/ckpt.pt")["step"] == 3

    # A broken held-out image is noticed before anything is written.
    _, held_out, _ = train.load_data(str(data), 8, 3, 0.25)
    Path(held_out.members[0]).write_text("no image")
    assert run(train, *flags, tmp_path / "b") == 2
    assert not (tmp_path / "b/ckpt.pt").exists()


def test_a_run_leaves_ema_weights_to_sample_from_and_a_log(trained):
    # Held-out images are looked at when a checkpoint is saved. FiTv2's log has no halves.
    keys = ("step", "held_out_loss", "loss_prior", "loss_S", "held_out_loss_prior")
    log = records_of(trained, *keys)
    assert [(record[0], record[1] is None) for record in log] == [(2, 1), (3, 0), (4, 1), (6, 0)]
    assert run(train, *QUICK, "--latent-tokens", 0, "--steps", 2, "--out", "fit") == 0
    assert records_of(Path("fit"), *keys)[-1].count(None) == 3
    assert PLOT.call_args.args == (Path("fit/log.jsonl"), Path("fit/loss.png"))
    for out in (trained, Path("fit")):
        train.plot_log(out / "log.jsonl", Path("loss.png"))
    assert sample.load_checkpoint("fit/ckpt.pt")["step"] == 2  # the last, saved always

    # A milestone is sampled from like ckpt.pt. The image of the default name is replaced.
    grids = []
    for name in ("ema-0000003.pt", "ema-0000006.pt", "ckpt.pt"):
        assert run(sample, "--ckpt", trained / name, *SET, "--per-class", 1) == 0
        grids.append(Path("out/samples.png").read_bytes())
    assert grids[0] != grids[1] == grids[2]

    # AdamW without weight decay; for the paper's sizes section 4.1's rate, batch and shares.
    assert "model" not in sample.load_checkpoint(trained / "ema-0000006.pt")
    found = sample.load_checkpoint(trained / "ckpt.pt")
    assert not torch.equal(found["ema"]["W_g.weight"], found["model"]["W_g.weight"])
    group = found["optimizer"]["param_groups"][0]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0)
    args = train.parse(["--model", "DoD-XL", "--vae", "any"])
    names = "lr lem_lr_factor beta2 warmup batch_size ema_decay p_s w image_size".split()
    assert [vars(args)[name] for name in names] == [1e-4, 1, 0.999, 0, 256, 0.999, 0.5, 3.5, 256]


def test_a_resumed_run_is_the_run_that_was_started(trained, monkeypatch, capfd):
    # Every flag on which the result depends is compared, and the VAE.
    monkeypatch.setattr(train, "build", lambda *given: (None, {}))
    changes = "image-size=12 channels=3 held-out=0.1 batch-size=16 lr=1 warmup=1 lem-lr-factor=0.7"
    changes += " p-s=0.25 flip seed=1 precision=bf16 ema-decay=0.5 patch-size=2 latent-tokens=4"
    changes += " prior-from=means class-groups=2 beta2=0.9"
    for change in changes.split():
        assert run(train, *QUICK, "--out", trained, "--resume", f"--{change}") == 2, change
        assert "cannot resume" in capfd.readouterr().err, change
    saved = sample.load_checkpoint(trained / "ckpt.pt")
    torch.save({key: saved[key] for key in saved.keys() - {"beta2"}}, "old.pt")  # before --beta2
    with pytest.raises(UserError, match="shift was 0.0, now 0.5"):
        train.resume("old.pt", {}, saved | {"beta2": 0.999, "shift": 0.5})


def test_nodes_must_share_the_folders_of_a_run(trained, colours, vae, capfd):
    # This rank alone finds a checkpoint, or no cache; the others' answers stay train.py's zeros.
    ranks = {"is_initialized": lambda: True, "get_world_size": lambda: 2, "barrier": Mock()}
    cached = ["--data", colours / "data", "--vae", vae, "--image-size", 16, "--cache", "latents"]
    with patch.multiple(torch.distributed, all_gather_object=list.append, **ranks):
        for flags, name in (["--resume", "--out", trained], trained), (cached, "latents"):
            assert run(train, *QUICK, *flags) == 2
            assert f"the nodes do not share {name}; " in capfd.readouterr().err


def test_a_line_says_what_the_prior_is_worth_and_warns_of_a_dead_lem():
    # The warning comes below 1%, once the warm-up is over and a tenth of the steps are done.
    args = Namespace(warmup=30, steps=500)
    line = train.worth_of_prior({"step": 31, "loss_S": 0.27, "loss_prior": 0.187}, args)
    assert line == "step 31: the prior lowers the loss by 0.083 (31%)"
    cases = [(51, 30, 0.9901, True), (51, 30, 0.98, False), (49, 30, 1, False), (60, 60, 1, False)]
    for step, warmup, loss, warns in cases:
        args.warmup = warmup
        line = train.worth_of_prior({"step": step, "loss_S": 1, "loss_prior": loss}, args)
        assert ("LEM learns nothing; try a lower --lr" in line) == warns


def test_letters_are_a_function_of_their_number_and_held_out_ones_are_others():
    # A letter is training or held out, and drawn alike by anybody who asks for it.
    assert sorted(TRAINING.members + HELD_OUT.members) == list(range(25_000))
    assert len(HELD_OUT) == 2500 and len(train.load_data("letters", 16, 1, 0.5)[1]) == 5000
    images = torch.stack([TRAINING[i, False][0] for i in range(200)])
    train.draw_letter.cache_clear()
    assert torch.equal(images[150], TRAINING[150, False][0])


def test_images_are_cropped_as_adm_does_and_read_as_they_are_meant():
    # guided-diffusion's center_crop_arr. The last image's camera lay on its side.
    rng = np.random.default_rng(0)
    for size, turned in ((256, 401), False), ((521, 188), False), ((99, 60), True):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if turned else 1  # orientation: turn by 90 degrees, clockwise
        image.save("a.png", exif=exif)  # without loss
        image = image.transpose(Image.ROTATE_270) if turned else image
        while min(*image.size) >= 2 * 64:
            image = image.resize(tuple(x // 2 for x in image.size), Image.BOX)
        scale = 64 / min(*image.size)
        image = image.resize(tuple(round(x * scale) for x in image.size), Image.BICUBIC)
        y, x = ((side - 64) // 2 for side in np.array(image).shape[:2])
        expected = np.array(image)[y : y + 64, x : x + 64]
        assert np.array_equal(sample.open_image("a.png", 64, 3).permute(1, 2, 0), expected)

    # Black ink on the left; what is transparent, on the right, is black as well.
    ink = Image.new("RGBA", (8, 8))
    ink.paste("black", (0, 0, 4, 8))
    ink.convert("P").save("a.png")
    assert sample.open_image("a.png", 8, 3).tolist() == [[[0] * 4 + [255] * 4] * 8] * 3

    # 16-bit grey k is k / 257 in 8 bits. The range of floats is not known.
    grey = np.arange(64).reshape(8, 8) * 4
    for pixels in (257 * grey, 257 * grey + 256):  # the latter is just below the next grey
        Image.fromarray(pixels.astype(np.uint16)).save("a.png")
        assert np.array_equal(sample.open_image("a.png", 8, 1)[0], grey)
    for pixels in (np.ones((8, 8), np.float32), np.full((8, 8), 70_000, np.int32)):
        Image.fromarray(pixels).save("a.tif")
        with pytest.raises(UserError, match="a.tif has pixels of unknown range"):
            sample.open_image("a.tif", 8, 1)


def test_a_cache_trains_as_encoding_does_without_the_images(vae, monkeypatch, tmp_path, capfd):
    # A run without a cache; and a cache that is interrupted before its mirrored images.
    x0 = []
    before_step(monkeypatch, lambda step, given: x0.append(given.batch[0]))
    data = folder(tmp_path / "data", 16)
    flags = [*QUICK, "--data", data, "--vae", vae, "--image-size", 16, "--held-out", 0.1]
    assert run(train, *flags, "--out", tmp_path / "a") == 0
    flags += ["--cache", tmp_path / "cache"]
    with patch.object(sample.Codec, "moments", side_effect=[None]), pytest.raises(StopIteration):
        run(train, *flags, "--out", tmp_path / "b")
    assert not (tmp_path / "cache/latents.fp16").exists()
    with train.lock(tmp_path / "cache"):  # as another run does that encodes
        assert run(train, *flags, "--out", tmp_path / "b") == 2

    # Encoded, then read when the images are gone: the same latents, up to the rounding to fp16.
    assert run(train, *flags, "--steps", 1, "--out", tmp_path / "c") == 0
    data.rename(tmp_path / "moved")
    assert run(train, *flags, "--out", tmp_path / "d") == 0
    assert len(x0) == 6 + 1 + 6 and all(close(x0[i], x0[7 + i], 0.02) for i in range(6))

    # Latents of other images, another size or another VAE are refused.
    other = shutil.copytree(vae, tmp_path / "other")
    for key, value in (("data", "letters"), ("image-size", 32), ("vae", other)):
        assert run(train, *flags, f"--{key}", value, "--out", tmp_path / "e") == 2
        assert f"was made with {key.replace('-', '_')} " in capfd.readouterr().err
    os.truncate(tmp_path / "cache/latents.fp16", 99)
    assert run(train, *flags, "--out", tmp_path / "e") == 2


def test_section_3_3_latents_are_posterior_samples_scaled_as_the_vae_says(vae):
    # 40 images at once here, 32 at a time there.
    codec = sample.load_codec(vae)
    dod = awake(replace(TINY, latent_channels=4))  # which seeds what is drawn next
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    x1, eps, t, _ = train.draw_noise(0, 0, 40, dod.config, torch.Generator())
    posterior = codec.vae.encode(images / 127.5 - 1).latent_dist
    expected = 3 * (posterior.mean + posterior.std * eps - 0.5)
    assert close(codec.encode(images, eps), expected, 1e-4)
    assert close(codec.encode(images), 3 * (posterior.mean - 0.5), 1e-4)

    # The held-out loss uses them.
    given = Namespace(held_out=[(image, 0) for image in images], codec=codec, modules={"ema": dod})
    given.args = Namespace(seed=0, p_s=0.5)
    rows = flow.keeps_prior(40, 0.5).nonzero().squeeze(1)
    loss = flow.rectified_flow_loss(dod, expected, torch.zeros(40).long(), x1, t, rows).mean()
    assert close(train.held_out_loss(given)["held_out_loss"], loss, 1e-3)

    # Decoding undoes scale and shift.
    pixels = codec.vae.decode(expected / 3 + 0.5).sample
    wrong = codec.decode(expected).int() - (127.5 * pixels + 128).clamp(0, 255).int()
    assert wrong.abs().max() <= 1 and (wrong != 0).double().mean() < 0.01

    # A VAE without some of its weights is refused: the library would leave them random.
    del codec.vae.decoder
    codec.vae.save_pretrained("half")
    with pytest.raises(UserError, match="lacks weights, such as decoder."):
        sample.load_codec("half")


@torch.no_grad()
@pytest.mark.parametrize("given, w", [
    ({}, [1, 5.5, 5.5]),  # section 3.3: unguided in stage 1, then the model's own scale
    ({"w": 4.0, "prior": X0[:3]}, [4, 4, 4]),
    ({"w": [3.0, 1.0, 2.0]}, [3, 1, 2]),
    ({"w": 3.0}, [1, 3, 3]),
])  # fmt: skip
def test_fig3a_each_stage_is_guided_by_the_stage_before(given, w):
    # The network, which a guided evaluation runs twice, and LEM, once a stage, count their runs.
    dod = awake()
    y = torch.tensor([1, 4, 0])
    count = Mock(return_value=None)
    dod.register_forward_hook(count)
    dod.lem.register_forward_hook(count)
    samples, nfe = sample.generate(dod, y, 3, **given, sampler=EULER, start=5)
    assert [n.tolist() for n in nfe] == [[2] * 3] * 3
    runs = sum(2 if scale == 1 else 4 for scale in w) + (3 if "prior" in given else 2)
    assert count.call_count == runs

    # Fig. 3a and section 3.3 written out: three stages of two Euler steps.
    prior = given.get("prior")
    for i in range(3):
        x = sample.stage_noise((3, 8, 8), 7, range(5, 8), i)
        e_s = None if prior is None else dod.visual_prior(prior)
        for t in (torch.full((3,), 1.0), torch.full((3,), 0.5)):
            v_u = dod(x, t, torch.full((3,), dod.null_class))  # neither class nor prior
            x = x - (v_u + w[i] * (dod(x, t, y, e_s) - v_u)) / 2
        assert close(samples[i], x, 1e-4)
        prior = x


def test_an_image_is_a_function_of_seed_and_number(monkeypatch):
    # The noise is normal, and another one for another seed, number or stage.
    draw = sample.stage_noise
    z = draw((50, 50), 1, range(4), 0)
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    for key in ((2, range(4), 0), (1, range(1, 5), 0), (1, range(4), 1)):
        assert not close(z, draw((50, 50), *key), 0.5)

    # All at once, and the last three in batches of two: the same images, in double precision.
    monkeypatch.setattr(sample, "stage_noise", lambda *key: draw(*key).double())
    dod = awake().double()
    y = torch.arange(5)
    together, _ = sample.generate(dod, y, prior=X0[:5].double())
    last, _ = sample.generate(dod, y[2:], prior=X0[2:5].double(), start=2, batch_size=2)
    assert all(close(a[2:], b, 1e-6) for a, b in zip(together, last, strict=True))

    # Refused: guidance by the only class, FiTv2's second stage, latents that would become black.
    for config, words in ({"num_classes": 1}, "nothing to guide by"), ({"N": 0}, "stage 1 only"):
        with pytest.raises(UserError, match=words):
            sample.generate(awake(replace(TINY, **config)), y, w=[2.0, 2.0])
    with pytest.raises(FloatingPointError, match="not finite"):
        PIXELS.decode(torch.tensor([0.5, math.nan]).view(2, 1, 1, 1))


def set_of(path: Path, *flags) -> tuple[torch.Tensor, np.ndarray]:
    """Draws a set of samples -> its images, uint8 (n, 3, rows, columns), and classes."""
    assert run(sample, *flags, "--npz", path) == 0
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2), arrays["arr_1"]


def drawn(ckpt: Path, y, w: list, codec=PIXELS, **given) -> torch.Tensor:
    """What a set with the flags SET should hold: uint8 (n, 3, rows, columns)."""
    dod = sample.load_model(sample.load_checkpoint(ckpt))
    samples, _ = sample.generate(dod, torch.as_tensor(y), len(w), w, EULER, **given)
    return codec.decode(samples[-1]).expand(-1, 3, -1, -1)


def test_a_set_of_samples_is_images_that_depend_on_their_number_alone(trained, tmp_path):
    # Nine images in one process, and in two, of a model with a scale of its own.
    ckpt = awaken(trained / "ckpt.pt", Path("awake.pt"), w=3.5)
    flags = ["--ckpt", ckpt, *SET, "--classes", "B,D,C", "--number"]
    images, y = set_of(tmp_path / "one.npz", *flags, 9)
    for process in launch(sample, *flags, 9, "--npz", tmp_path / "two.npz", ranks=2):
        process.join(60)
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert not torch.backends.cudnn.allow_tf32

    # They are those of stage 2, at the model's own scale. Labels have a stream of their own.
    assert y.tolist() == [[1, 3, 2][np.random.default_rng((7, 3, n)).integers(3)] for n in range(9)]
    assert torch.equal(images, drawn(ckpt, y, [1.0, 3.5]))
    images, _ = set_of(tmp_path / "stage1.npz", *flags, 5, "--stages", 1, "--cfg-stage1", 4)
    assert torch.equal(images, drawn(ckpt, y[:5], [4.0]))


def test_fig4_real_images_are_priors_of_a_set(colours, tmp_path):
    # Image n has the prior and the class of image number order[n]; held-out images come first.
    ckpt = awaken(colours / "run/ckpt.pt", tmp_path / "awake.pt", w=3.0)
    flags = ["--ckpt", ckpt, *SET, "--prior-data", colours / "data", "--number", 18]
    images, y = set_of(tmp_path / "a.npz", *flags)
    files = sorted(colours.glob("data/*/*.png"))
    pixels = np.array([Image.open(file) for file in sorted((tmp_path / "a-priors").iterdir())])
    order = np.random.default_rng(0).permutation(20)[:18]
    assert np.array_equal(pixels, [np.array(Image.open(files[i])) for i in order])
    assert y.tolist() == [i // 4 for i in order]
    assert json.loads((tmp_path / "a/about.json").read_text())["number"] == 18

    # One stage with the mean of the VAE's posterior as a prior, at the model's own scale.
    codec = sample.load_codec(sample.load_checkpoint(ckpt)["codec"])
    prior = codec.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    expected = drawn(ckpt, y, [3.0], codec, prior=prior).int()
    assert abs(images - expected).max() <= 1


def test_the_grid_is_fair_and_a_path_leads_from_noise_to_sample(trained, tmp_path, monkeypatch):
    ckpt = awaken(trained / "ckpt.pt", Path("awake.pt"), w=3.5)
    grids = []
    monkeypatch.setattr(sample, "draw_grid", lambda *grid: grids.append(grid))
    flags = ["--ckpt", ckpt, *SET, "--classes", "C,A", "--per-class", 1]
    assert run(sample, *flags, "--stages", 3) == 0
    expected = [[1.0], [2.0], [1.0, 3.5], [1.0, 3.5, 3.5]]
    for (label, images), w in zip(grids[0][1], expected, strict=True):
        assert f"w = {w[-1]:g}" in label
        assert torch.equal(images, drawn(ckpt, [2, 0], w)[:, :1])

    # Given priors: each is the first row of its block, below those of stage 1.
    paths = [folder(tmp_path) / name for name in ("a/0.png", "b/1.png")]
    assert run(sample, *flags, "--prior", f"{paths[0]},{paths[1]}", "--cfg", 4) == 0
    for (_, images), path in zip(grids[1][1][2:], paths, strict=True):
        image = sample.open_image(path, 8, 1).expand(2, -1, -1, -1)
        expected = drawn(ckpt, [2, 0], [4.0], prior=PIXELS.encode(image))[:, :1]
        assert torch.equal(images, torch.cat([image, expected]))

    # RK45 is the default (section 3.3); --path takes ten steps.
    monkeypatch.setattr(sample, "draw_samples", lambda *given: grids.append(given[-1]))
    assert run(sample, "--ckpt", ckpt, "--device", "cpu") == 0 and grids[2] == Sampler()
    assert run(sample, "--ckpt", ckpt, "--device", "cpu", "--path") == 0
    assert grids[-1][2][::9] == ["t = 1", "t = 0.1"]

    # The Euler steps of each of two stages: a row of x_t and a row of predicted x_0.
    assert run(sample, *flags[:-2], "--path") == 0
    _, blocks, titles = grids[-1]
    assert titles == ["t = 1", "t = 0.5"] and len(blocks) == 4
    for i in range(2):
        (_, x_t), (_, x_0) = blocks[2 * i : 2 * i + 2]
        assert torch.equal(x_t[:1], PIXELS.decode(sample.stage_noise((1, 8, 8), 7, range(1), i)))
        expected = drawn(ckpt, [2], [1.0, 3.5][: i + 1])[:, :1].int()
        assert abs(x_0[-1:] - expected).max() <= 1


@pytest.mark.parametrize("argv, words", [
    ("train --data data --held-out 0.9", "lower --held-out"),
    ("train --data hidden", "0.png is hidden"),
    ("train --data nowhere", "No such file or directory: 'nowhere'"),
    ("train --device cuda:99", "device cuda:99 is not available here"),
    ("train --cache latents", "without --vae there are none"),
    ("train --p-s 0", "--p-s 0.0 leaves S without an image"),
    ("train --out .", ". has files already"),
    ("sample --number 9 --npz data.npz", "data exists already; give another name"),
    ("sample --number 9 --npz b.npz", "b-priors exists already; give another name"),
    ("sample --npz a.npz --prior-data data", "has other classes than"),
    ("sample --number 9", "add --npz FILE.npz"),
    ("sample --path --per-class 2", "--per-class is for grids"),
    ("sample --number 9 --npz a.txt", "a.txt should end in .npz"),
    ("sample --classes a", "class 'a' is unknown"),
    ("sample --prior a.png --stages 2", "given priors take one stage"),
    ("sample --vae {vae}", "another scale or shift than"),
    ("sample --ckpt one.pt --number 9 --npz a.npz --cfg-stage1 2", "nothing to guide by"),
    ("sample --ckpt code.pt", "code.pt is no checkpoint"),
    ("sample --stages 1 --cfg 2", "--cfg-stage1 guides stage 1"),
    ("sample --out data/a/0.png", "data/a/0.png exists"),
    ("evaluate stages --ckpt ckpt.pt --out taken.json", "taken.json exists"),
    ("evaluate stages --ckpt other.pt", "does not have the images"),
    ("evaluate samples --ref short.npz --samples good.npz", "is not a complete .npz"),
    ("evaluate samples --ref good.npz --samples float.npz", "not float64 (5, 9, 9, 3)"),
    ("evaluate samples --ref good.npz --samples few.npz", "few.npz has 3 images"),
    ("evaluate samples --ref good.npz --samples large.npz --paired", "of one size"),
])  # fmt: skip
def test_mistakes_end_in_one_line(argv, words, trained, vae, capfd):
    # Images, also hidden ones; a finished run; a checkpoint with code, and one of other images.
    folder(Path("data"))
    shutil.copytree("data/a", "hidden/.a")
    Path("b-priors").mkdir()
    Path("taken.json").touch()
    saved = sample.load_checkpoint(trained / "ema-0000006.pt")
    torch.save(saved, "ckpt.pt")
    torch.save(saved | {"code": Namespace()}, "code.pt")
    torch.save(saved | {"fingerprint": "x"}, "other.pt")
    awaken(Path("ckpt.pt"), Path("one.pt"), num_classes=1)
    pixels = np.zeros((5, 9, 9, 3), np.uint8)
    arrays = {"good": pixels, "float": pixels + 0.5, "few": pixels[:3], "large": pixels[:, 1:]}
    for name, array in arrays.items():
        np.savez(f"{name}.npz", arr_0=array)
    Path("short.npz").write_bytes(Path("good.npz").read_bytes()[:900])
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*.*[!k]")}  # but locks

    # One line of error, exit status 2, and no traceback. Nothing is written.
    module, *flags = argv.format(vae=vae).split()
    first = {"train": QUICK, "sample": ["--ckpt", "ckpt.pt"], "evaluate": []}[module]
    assert run(sys.modules[module], *first, *flags) == 2
    (line,) = re.findall(".*(?:error: |Trace).*", capfd.readouterr().err)
    assert line.startswith(f"{module}.py: error: ") and words in line
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*.*[!k]")} == before


class NeverWaits(TorchDispatchMode):
    """Fails where data move between devices. Fake tensors refuse .item() and the like."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {x.device for x in (*args, result) if isinstance(x, torch.Tensor)}
        assert "copy" not in str(function) or len(devices) == 1, function
        return result


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch without CUDA traces nothing")
def test_a_step_and_euler_s_method_never_wait_for_a_gpu(monkeypatch):
    # Traced without a GPU, so without autograd's backward pass, and without the optimizer.
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    with FakeTensorMode(), torch.device("cuda"):
        dod = build_model(TINY)
        x = torch.empty(8, 3, 8, 8)
        y = torch.arange(8)
        for p in dod.parameters():
            p.grad = torch.empty_like(p)

    with FakeTensorMode(allow_non_fake_inputs=True), NeverWaits(), torch.no_grad():
        loss = train.training_step(dod, dod, Mock(), (x, x, x[:, 0, 0, 0], y), y[:2], 1)
        z0, _ = sample.sample_stage(dod, x, y, dod.visual_prior(x), 2.0, Sampler("euler", 3))
    assert loss.device.type == z0.device.type == "cuda"


# ------------------------------------------- section 4.1, Fig. 4, Tables 2-5: metrics and commands


def test_fid_against_scipy_where_one_covariance_is_singular():
    rng = np.random.default_rng(0)
    V = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    S1 = V * np.append(np.zeros(5), rng.uniform(0, 3, 15)) @ V.T
    mu1 = rng.standard_normal(20) + 30

    # The formula as it is printed. The moments are in float64, with ddof = 1.
    x = torch.randn(30, 20) + 30
    S2 = np.cov(x.double().T)
    expected = ((mu1 - x.double().mean(0).numpy()) ** 2).sum()
    expected += np.trace(S1 + S2 - 2 * linalg.sqrtm(S1 @ S2).real)
    found = evaluate.frechet_distance(mu1, S1, *evaluate.statistics(x))
    assert found == pytest.approx(expected, rel=1e-8)


def test_precision_and_recall_are_the_written_out_shares():
    def covered(points, centres):
        radii = np.partition(cdist(centres, centres), 3)[:, 3]  # the nearest is the centre itself
        return (cdist(points, centres) <= radii).any(1).mean()

    # Whole numbers have exact distances, and here many equal ones. So many take two blocks.
    rng = np.random.default_rng(3)
    real = rng.integers(0, 99, (5900, 2))
    fake = rng.integers(30, 110, (50, 2))
    expected = (covered(fake, real), covered(real, fake))
    assert evaluate.precision_recall(real, fake) == pytest.approx(expected)


def test_psnr_and_ssim_are_the_written_out_formulas():
    # Eq. 13 of Wang et al. (2004), in dark images, with SciPy's Gaussian window of 11 pixels. What
    # the border touches is left out at the end. Of two channels one is the same in both.
    blur = partial(ndimage.gaussian_filter, sigma=1.5, truncate=3.5)
    a, b = np.random.default_rng(4).integers(0, 30, (2, 20, 17)).astype(float)
    variances = blur(a * a) - blur(a) ** 2 + blur(b * b) - blur(b) ** 2
    top = (2 * blur(a) * blur(b) + 2.55**2) * (2 * (blur(a * b) - blur(a) * blur(b)) + 7.65**2)
    one = (top / (blur(a) ** 2 + blur(b) ** 2 + 2.55**2) / (variances + 7.65**2))[5:-5, 5:-5].mean()
    x, y = torch.from_numpy(np.array([[[a, a]], [[a, b]]])).byte()
    assert evaluate.ssim(x, y).item() == pytest.approx((1 + one) / 2, rel=1e-10)
    error = ((a - b) ** 2).mean() / 2
    assert evaluate.psnr(x, y).item() == pytest.approx(10 * np.log10(255**2 / error))


def test_table2_the_linear_probe_is_at_the_minimum_and_blind_to_scale():
    library = pytest.importorskip("sklearn.linear_model")
    y = torch.arange(600) % 3
    x, x_test = torch.randn(2, 600, 3) + 1.5 * torch.eye(3)[y]
    scale = torch.tensor([1e-2, 1, 1e3])
    fitted = library.LogisticRegression()
    with patch.object(library, "LogisticRegression", fitted.set_params):
        found = evaluate.linear_probe(x * scale + 5, y, x_test[:500] * scale + 5, y[:500], 0.1)

    # At the minimum of cross-entropy + decay/2 |W|² the gradient with respect to W is zero.
    x, x_test = ((z - x.mean(0)).double() / x.std(0, correction=0) for z in (x, x_test))
    error = torch.from_numpy(fitted.predict_proba(x)) - torch.eye(3)[y]
    assert close(error.T @ x / 600, -0.1 * torch.from_numpy(fitted.coef_), 1e-3)
    assert found == fitted.score(x_test[:500], y[:500]) > 0.6


def test_comparing_shuffles_for_the_is_which_equals_torch_fidelity_s(monkeypatch):
    # 10,000 sure images of ten classes score 10; unshuffled, each part would hold five classes.
    monkeypatch.setattr(evaluate, "precision_recall", lambda real, fake: (len(real), len(fake)))
    logits = 999 * torch.eye(10).repeat_interleave(1000, 0)
    real = evaluate.Features(torch.rand(100, 2), None, torch.rand(100, 3))
    fake = evaluate.Features(torch.rand(10_000, 2), logits, torch.rand(10_000, 3) ** 2)
    columns = evaluate.compare(real, fake)
    assert 9.9 < columns["is"] < 10 and columns["is_std"] > 0
    assert (columns["precision"], columns["recall"]) == (100, 10_000)
    for key, a, b in (("fid", real.pool, fake.pool), ("sfid", real.spatial, fake.spatial)):
        moments = (*evaluate.statistics(a), *evaluate.statistics(b))
        assert columns[key] == evaluate.frechet_distance(*moments)

    library = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * torch.randn(100, 12)
    theirs = library.isc_features_to_metric(logits, splits=10, shuffle=False)
    assert evaluate.inception_score(logits.softmax(1)) == pytest.approx((*theirs.values(),), 1e-5)


@pytest.fixture
def letters_ckpt():
    """The shipped checkpoint, awakened. The classifier sees 300 images in 10 steps."""
    take = evaluate.take_images
    few = Mock(side_effect=lambda data, n, start=0: take(data, min(n, 300), start))
    quick = Mock(side_effect=partial(evaluate.train_classifier, steps=10))
    with patch.multiple(evaluate, take_images=few, train_classifier=quick, SHIPPED=Path("none")):
        yield awaken(sample.SHIPPED, Path("awake.pt"))


def rows_of(command: str, *argv) -> list[dict]:
    """Runs a command of evaluate.py, given as one types it -> the rows of its report."""
    assert run(evaluate, *command.split(), *argv) == 0
    return json.loads(Path(f"out/{command.split()[0]}.json").read_text())["rows"]


def test_the_classifier_is_reproducible_kept_and_trained_under_noise(letters_ckpt):
    # It is trained twice, whatever random numbers were drawn before.
    saved = sample.load_checkpoint(letters_ckpt)
    evaluate.classifier(saved, TRAINING)
    (file,) = Path("out").glob("classifier-*.pt")
    before = file.rename("before.pt").read_bytes()
    torch.manual_seed(1)
    evaluate.classifier(saved, TRAINING)
    assert file.read_bytes() == before

    # It has learned training images. It is read back, in a form that does not depend on the batch.
    images, _, y = evaluate.take_images(TRAINING, 300)
    network, *learned = evaluate.train_classifier.call_args.args
    assert all(map(torch.equal, learned, (images, y)))
    look, _ = evaluate.classifier(saved, TRAINING)
    assert close(look(images)[1], network.eval()(images / 127.5 - 1), 1e-4)

    # Other images have another one.
    for count, change in enumerate(({"held_out": 0.2}, {"image_size": 8}, {"fingerprint": "x"}), 3):
        evaluate.classifier(saved | change, TRAINING)
        assert evaluate.train_classifier.call_count == count

    # It learns under noise of 0 to 24 grey levels.
    network = Mock(wraps=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 2)))
    images = torch.full((9, 1, 16, 16), 51, dtype=torch.uint8)
    evaluate.train_classifier(network, images, torch.zeros(9, dtype=torch.long), steps=20)
    pixels = torch.cat([call.args[0] for call in network.call_args_list]).flatten(1) * 127.5
    levels = pixels.std(1)  # one for each image, uniform
    assert levels.min() < 1 and 11 < levels.mean() < 13 and 23 < levels.max() < 28
    assert levels[:128].std() > 4  # also within a batch
    assert (pixels.mean() + 127.5 - 51).abs() < 1


def test_fig4_stages_has_its_rows_and_reconstruct_sees_the_held_out_images(letters_ckpt):
    # Section 3.3: no guidance in stage 1, which is the same for all scales and so listed once.
    rows = rows_of("stages --num 70 --steps 2 --cfg 1 3 --cfg-stage1 2 --ckpt", letters_ckpt)
    later = [("stage 2", 1), ("stage 3", 1), ("stage 2", 3), ("stage 3", 3)]
    expected = [("training images", None), ("stage 1", 1), *later, ("stage 1", 2)]
    assert [(row.pop("what"), row.get("w")) for row in rows] == expected

    # The first row: training images of the second half, not those that the classifier learned.
    learned = evaluate.train_classifier.call_args.args[1]
    assert torch.equal(learned, evaluate.take_images(TRAINING, 300)[0])
    saved = sample.load_checkpoint(letters_ckpt)
    network, _ = evaluate.classifier(saved, TRAINING)
    look = partial(evaluate.measure, network=network, what="x")
    images, y, _ = evaluate.take_images(HELD_OUT, 70)
    real = look(images)
    other = look([TRAINING[i, False][0] for i in range(11_250, 11_320)])
    assert rows[0] == pytest.approx(evaluate.compare(real, other))

    # Stage 3 at w = 3: its prior is stage 2. Its spread: the same priors, another seed's noise.
    dod = sample.load_model(saved)
    z0, _ = sample.generate(dod, y, 3, [1.0, 3.0, 3.0], Sampler("euler", 2))
    again, _ = sample.generate(dod, y, 1, [3.0], Sampler("euler", 2, seed=1), prior=z0[1])
    fake, again = (look(PIXELS.decode(z)) for z in (z0[2], again[0]))
    expected = evaluate.compare(real, fake) | {"w": 3, "evaluations": 2}
    expected |= {"fid_training": evaluate.compare(other, fake)["fid"]}
    distances = cdist(fake.pool, again.pool)
    same_class = (y[:, None] == y).numpy() & ~np.eye(70, dtype=bool)
    expected |= {"spread": np.diag(distances).mean() / distances[same_class].mean()}
    assert rows[5] == pytest.approx(expected, rel=1e-5)

    # The report says how it came about, without weights.
    found = json.loads(Path("out/stages.json").read_text())
    assert found["commit"] and found["network_hash"] and found["checkpoint"]["fingerprint"]
    assert (found["torch"], found["numpy"]) == (torch.__version__, np.__version__)
    assert not found["checkpoint"].keys() & {"ema", "model", "optimizer"}

    # The priors of reconstructions are the held-out images.
    _, row = rows_of("reconstruct --num 70 --steps 4 --cfg 2 --seed 3 --ckpt", letters_ckpt)
    sampler = Sampler("euler", 4, seed=3)
    (z0,), _ = sample.generate(dod, y, 1, [2.0], sampler, prior=PIXELS.encode(images))
    for key, metric in (("psnr", evaluate.psnr), ("ssim", evaluate.ssim)):
        assert close(row[key], metric(images, PIXELS.decode(z0)).mean().item())


@pytest.mark.parametrize("K, N, expected", [
    (1, 2, ["stage 1", "stage 2"]),
    (2, 2, ["stage 1", "stage 2", "stage 1"]),
    (10, 0, ["FiTv2", "FiTv2"]),
])  # fmt: skip
def test_fig4_stages_of_merged_classes_and_of_fitv2(K, N, expected, letters_ckpt, monkeypatch):
    monkeypatch.setattr(evaluate, "generate", Mock(wraps=sample.generate))
    more = ["--stages", 2] if N else []  # FiTv2 has stage 1 only
    ckpt = awaken(letters_ckpt, Path("changed.pt"), num_classes=K, N=N)
    rows = rows_of("stages --num 70 --steps 1 --cfg 2 --cfg-stage1 3 --ckpt", ckpt, *more)
    assert [row["what"] for row in rows[1:]] == expected

    # Class k belongs to the model's class k K // n, but the classifier knows all classes.
    _, _, y = evaluate.take_images(HELD_OUT, 70)
    assert all(torch.equal(call.args[1], y * K // 10) for call in evaluate.generate.mock_calls)
    assert evaluate.train_classifier.call_args.args[2].max() == 9


def test_table2_the_probe_reads_images_or_the_cache_of_the_run(colours, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "linear_probe", lambda *given: seen.append(given) or 0.5)
    for where in ([], ["--cache", colours / "cache"]):
        rows_of("probe", "--ckpt", colours / "run/ckpt.pt", *where)

    # The latent tokens of 14 training images and of 6 held-out ones: their means, then all of them.
    saved = sample.load_checkpoint(colours / "run/ckpt.pt")
    codec = sample.load_codec(saved["codec"])
    training, held_out, _ = train.load_data(saved["data"], 16, 3, 0.3)
    for part, i in ((training, 0), (held_out, 2)):
        images = torch.stack([part[k, False][0] for k in range(len(part))])
        l_hat = sample.load_model(saved).lem.encode(codec.encode(images))
        for mean, everything in (seen[:2], seen[2:]):
            assert close(mean[i], l_hat.mean(1), 0.01)
            assert close(everything[i], l_hat.flatten(1), 0.01)
            assert [*mean[i + 1]] == [*everything[i + 1]] == [*part.original_labels]

    # The cache of another VAE is refused, and none is made.
    about = Path(shutil.copytree(colours / "cache", "other")) / "about.json"
    about.write_text(about.read_text().replace('"shift": 0.5', '"shift": 0.7'))
    for cache in ("other", "typo"):
        assert run(evaluate, "probe", "--ckpt", colours / "run/ckpt.pt", "--cache", cache) == 2
    assert not Path("typo").exists()


def test_the_readme_s_commands_parse_and_the_lines_that_it_names_are_right():
    home = Path(train.__file__).parent
    text = (home / "README.md").read_text()
    named = re.findall(r"(\w+\.py):(\d+) (\w+)", text)
    assert len(named) > 9
    for file, line, name in named:
        found = (home / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf" *(def|class) {name}\b", found), f"{file}:{line} is {found}"

    # The shell runs every block, with commands that only print themselves; two milestones exist.
    stubs = """set -eu; mkdir -p out/train; touch out/train/ema-0{1,2}00000.pt
        pip() { :; }; srun() { shift 3; "$@"; }; scontrol() { echo node; }
        python() { echo python "$@"; }; torchrun() { echo torchrun "$@"; }
        SLURM_NNODES=1 SLURM_CPUS_ON_NODE=8 SLURM_JOB_ID=7 SLURM_JOB_NODELIST=node\n"""
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    printed = subprocess.check_output(["bash", "-c", stubs + blocks], text=True)
    commands = re.findall(r"^.*?\b(train|sample|evaluate)\.py *(.*)", printed, re.MULTILINE)
    assert len(commands) > 19 and {name for name, _ in commands} == {"train", "sample", "evaluate"}

    # Their flags exist, and none would take a milestone's place.
    for script, flags in commands:
        args = sys.modules[script].parse(flags.split())
        if getattr(args, "npz", None):
            assert not args.npz.exists() and not args.npz.with_suffix("").exists()


def test_inception_is_torch_fidelity_s_and_sfid_reads_7_channels_of_mixed_6d(tmp_path):
    # Random weights for the library's network, which leaves them empty, and large biases.
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network = library.FeatureExtractorInceptionV3
    with patch.multiple(network, load_state_dict=Mock()), patch.object(torch, "load"):
        theirs = network("inception", ["2048", "logits"], "none")
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5 if p.dim() == 4 else 1)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")

    # The library's features, those of its layer Mixed_6d.branch1x1, and logits without bias.
    images = torch.randint(0, 256, (2, 1, 12, 16), dtype=torch.uint8)  # grey: channels are equal
    seen = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *a: seen.append(a[2][:, :7]))
    pool, logits = theirs(images.repeat(1, 3, 1, 1))
    ours = evaluate.inception(str(tmp_path / "weights.pth"), torch.device("cpu"))(images)
    assert close(ours[0], pool, 1e-4)
    assert close(ours[1] + theirs.fc.bias, logits, 1e-3)
    assert close(ours[2], seen[0].permute(0, 2, 3, 1).reshape(2, 2023), 1e-4)


def test_table5_samples_are_compared_with_images_and_moments(monkeypatch):
    def thin(images):
        """Stands in for Inception: a few pixels as pooled features, logits, spatial features."""
        x = images.float().flatten(1)
        return x[:, :3], x[:, 3:7] / 9, x[:, 7:9]

    # The moments of a reference count, not those of its images. The samples are a folder.
    monkeypatch.setattr(evaluate, "inception", lambda *given: thin)
    images = np.random.default_rng(0).integers(0, 256, (18, 12, 12, 3), np.uint8)
    mu = {"mu": np.zeros(3), "sigma": np.eye(3)}
    mu_s = {"mu_s": np.ones(2), "sigma_s": 2 * np.eye(2)}
    np.savez("ref.npz", arr_0=images[9:], **mu, **mu_s)
    Path("fakes/below").mkdir(parents=True)
    for i in range(9):
        Image.fromarray(images[i]).save(f"fakes/below/{i}.PNG")
    shutil.copytree("fakes/below", "fakes/.hidden")
    (row,) = rows_of("samples", "--ref", "ref.npz", "--samples", "fakes", "--paired")
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    fake, real = (evaluate.Features(*thin(part)) for part in (x[:9], x[9:]))
    expected = evaluate.compare(real, fake) | {"what": "fakes"}
    expected["fid"] = evaluate.frechet_distance(*mu.values(), *evaluate.statistics(fake.pool))
    expected["sfid"] = evaluate.frechet_distance(*mu_s.values(), *evaluate.statistics(fake.spatial))
    expected["psnr"] = evaluate.psnr(x[:9], x[9:]).mean().item()
    expected["ssim"] = evaluate.ssim(x[:9], x[9:]).mean().item()
    assert row == pytest.approx(expected)

    # A reference may be moments alone.
    np.savez("moments.npz", **mu)
    (row,) = rows_of("samples", "--ref", "moments.npz", "--samples", "fakes")
    assert row == pytest.approx({"what": "fakes", "fid": expected["fid"]})

    # Images of several sizes have no features in common.
    with pytest.raises(UserError, match="images of one size"):
        evaluate.measure([x[0], x[0, :, 1:]], thin, "mixed")


def test_the_shipped_weights_show_the_paper_s_effect(monkeypatch):
    # The shipped classifier, which made the latest reports, judges 200 samples of each stage.
    saved = sample.load_checkpoint(sample.SHIPPED)
    monkeypatch.setattr(evaluate, "train_classifier", None)  # no other one is trained
    judge, found_hash = evaluate.classifier(saved, TRAINING)
    report = Path(__file__).parent / "assets/reports/groups1-fitv2-1-10000.json"
    assert json.loads(report.read_text())["network_hash"] == found_hash
    y = torch.arange(200) % 10
    samples, _ = sample.generate(sample.load_model(saved), y, 2, sampler=Sampler("euler", 10))
    seen = [judge(PIXELS.decode(z0))[1].argmax(1) for z0 in samples]
    recognised = [(found == y).double().mean().item() for found in seen]
    assert recognised[1] > max(0.6, 1.15 * recognised[0])
