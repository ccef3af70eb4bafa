"""model.py -- the FiTv2 backbone and DoD around it. Section 3.2, appendix A.1, Eqs. 5 and 8-10.

The backbone is a diffusion transformer (DiT) with 2-D rotary positions, normalised queries and
keys, a SwiGLU feed-forward and AdaLN-LoRA modulation. It maps a noisy latent x_t, its time t and
its class y to the velocity v = x_1 - x_0 of the rectified flow (flow.py). All that DoD adds is one
more summand in the condition c: the visual prior e_s, one vector per token, or in its place the
learned sample token S.

Time runs from data to noise: t = 0 is data, t = 1 is noise.

Shapes: B images, C channels, H x W latent, p patch size, T = (H/p)(W/p) tokens, d width, r LoRA
rank, K classes (index K is the null class of classifier-free guidance).

    python model.py      # Table 1 and the compute columns of Table 4, ours beside the paper's
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lem import LEM, patchify


class UserError(Exception):
    """Something the user can mend. The message says what was got, what is allowed, what to do."""


@dataclass(frozen=True)
class Config:
    """Everything that fixes the parameters' shapes, and the default guidance. Raises UserError on
    sizes that do not fit."""

    depth: int = 12  # backbone layers, Table 1
    d: int = 768  # backbone hidden size, Table 1
    heads: int = 12  # backbone heads, Table 1
    r: int = 192  # AdaLN-LoRA rank, Eq. 10; CHOICE: d / 4 as in FiTv2
    encoder_depth: int = 8  # LEM encoder layers, Table 1 ("8 + 4")
    decoder_depth: int = 4  # LEM decoder layers, Table 1
    d_l: int = 768  # LEM hidden size, Table 1
    lem_heads: int = 12  # LEM heads, Table 1
    N: int = 32  # latent tokens, section 4.2 and Table 2; 0 builds the bare backbone (FiTv2)
    d_e: int = 16  # width of a latent token, section 3.3
    p: int = 2  # patch size of backbone and LEM, section 3.3
    latent_size: int = 32  # H = W; 32 for ImageNet-256 behind Stable Diffusion's VAE
    latent_channels: int = 4  # C; 4 for that VAE
    num_classes: int = 1000  # K
    cfg: float = 5.5  # default guidance of stages with a prior, section 4.2 and Table 5

    def __post_init__(self):
        names = "depth d heads r p latent_size latent_channels num_classes cfg".split()
        names += "encoder_depth decoder_depth d_l lem_heads d_e".split() if self.N else []
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.latent_size % self.p:
            raise UserError(
                f"latent size {self.latent_size} is not a multiple of the patch size {self.p}; "
                "change --image-size or --patch-size"
            )
        # 2-D RoPE wants the channels of each head in fours, the 2-D PE those of a token.
        widths = [("d", self.d, 4 * self.heads)]
        widths += [("d_l", self.d_l, self.lem_heads), ("d_l", self.d_l, 4)] if self.N else []
        widths += [("d_e", self.d_e, 4)] if self.N else []
        for name, width, unit in widths:
            if width % unit:
                raise UserError(f"{name} is {width}; it must be a multiple of {unit}")
        if self.N < 0:
            raise UserError(f"N is {self.N}; it must be 0 (no LEM) or more")

    @property
    def num_tokens(self) -> int:
        """T, the sequence length of the backbone."""
        return (self.latent_size // self.p) ** 2


CONFIGS: dict[str, Config] = {
    # Table 1.
    "DoD-S": Config(depth=12, d=384, heads=6, r=96, d_l=384, lem_heads=6),
    "DoD-B": Config(depth=12, d=768, heads=12, r=192),
    "DoD-XL": Config(depth=28, d=1152, heads=16, r=288, cfg=3.5),  # with DoD-B's LEM
    # The baselines of Tables 4 and 5: no visual prior, deeper.
    "FiTv2-B": Config(depth=15, d=768, heads=12, r=192, N=0),
    "FiTv2-XL": Config(depth=36, d=1152, heads=16, r=288, N=0),
    # CHOICE: not in the paper. Small enough to train on a CPU while you read.
    "DoD-Ti": Config(
        depth=4, d=128, heads=4, r=32, encoder_depth=2, decoder_depth=1, d_l=128, lem_heads=4, N=4,
        d_e=8, p=4, latent_size=16, latent_channels=3, num_classes=10,
    ),
    "FiTv2-Ti": Config(
        depth=5, d=128, heads=4, r=32, N=0, p=4, latent_size=16, latent_channels=3, num_classes=10
    ),
}  # fmt: skip


# -------------------------------------------------------------------------------------- the leaves


def rope_2d(head_dim: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """2-D RoPE tables (appendix A.1) -> cos, sin, each (side * side, head_dim / 2).

    The first half of a head's channel pairs turns with the token's row, the second with its column,
    at the frequencies 10000^(-2k / (head_dim / 2)).
    """
    quarter = head_dim // 4
    w = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angle = torch.cat([row.reshape(-1, 1) * w, column.reshape(-1, 1) * w], dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns each channel pair (x_2k, x_2k+1) of (..., T, head_dim) by its token's angle."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (..., T, head_dim / 2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last dimension, without scale or shift: AdaLN brings those, Eq. 10."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """AdaLN: x (B, T, d); shift and scale (B, 1, d), per image, or (B, T, d), per token."""
    return layer_norm(x) * (1 + scale) + shift


class Attention(nn.Module):
    """Eq. 9: Softmax(1/sqrt(d_k) LN(Q) LN(K)^T) V per head, with 2-D RoPE after the LayerNorms.

    DEVIATION: the paper prints 1/d_k; FiTv2's scale, as every transformer's, is 1/sqrt(d_k).
    CHOICE: its LN has no learned scale or shift, and RoPE comes after it.
    """

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, heads, d_k)
        qk, v = qkv.permute(2, 0, 3, 1, 4).split([2, 1])  # (2 or 1, B, heads, T, d_k)
        (q, k), v = rotate(layer_norm(qk), cos, sin).to(v.dtype), v[0]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Eq. 8: FFN(x) = (SiLU(x W_1) ⊗ (x W_2)) W_3.

    CHOICE: the hidden width, which the paper leaves open, is 8d/3: three matrices then hold as many
    parameters as the usual two of width 4d (Shazeer, 2020).
    DEVIATION: Eq. 8 prints no biases; FiTv2 has them.
    """

    def __init__(self, d: int):
        super().__init__()
        hidden = int(8 * d / 3)
        self.W_1, self.W_2 = nn.Linear(d, hidden), nn.Linear(d, hidden)
        self.W_3 = nn.Linear(hidden, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d)."""
        return self.W_3(F.silu(self.W_1(x)) * self.W_2(x))


class TimeEmbedding(nn.Module):
    """e_t: times t in [0, 1] (B,) -> (B, 1, d). 128 cosines, 128 sines, Linear, SiLU, Linear."""

    def __init__(self, d: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        # CHOICE: t enters as it is, in [0, 1], not scaled to DDPM's 0 .. 1000 (SiT does the same).
        w = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angle = t[:, None] * w.to(t)  # (B, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))[:, None]


class Block(nn.Module):
    """A FiTv2 block: attention and SwiGLU, each modulated before and gated after by AdaLN-LoRA.

    Eq. 10:  S^i = W^g c + W_2^i W_1^i c = [beta_1, beta_2, gamma_1, gamma_2, alpha_1, alpha_2]

    W^g is shared by all blocks and comes in as `global_S`; the block adds its own low-rank part.
    beta shifts, gamma scales, alpha gates. DEVIATION: Eq. 10 omits the SiLU on c.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.attention, self.ffn = Attention(config.d, config.heads), SwiGLU(config.d)
        self.W_1, self.W_2 = nn.Linear(config.d, config.r), nn.Linear(config.r, 6 * config.d)

    def forward(self, x, silu_c, global_S, cos, sin):
        """x (B, T, d); silu_c (B, 1 or T, d); global_S (B, 1 or T, 6d) -> (B, T, d)."""
        S_i = global_S + self.W_2(self.W_1(silu_c))
        beta_1, beta_2, gamma_1, gamma_2, alpha_1, alpha_2 = S_i.chunk(6, dim=-1)
        x = x + alpha_1 * self.attention(modulate(x, beta_1, gamma_1), cos, sin)
        return x + alpha_2 * self.ffn(modulate(x, beta_2, gamma_2))


class FinalLayer(nn.Module):
    """Last AdaLN, then each token -> its patch of the velocity: (B, T, d) -> (B, T, p * p * C).

    CHOICE: this AdaLN is of full rank, as DiT's; the paper describes the blocks' alone.
    """

    def __init__(self, d: int, out: int):
        super().__init__()
        self.adaln, self.linear = nn.Linear(d, 2 * d), nn.Linear(d, out)

    def forward(self, x: torch.Tensor, silu_c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaln(silu_c).chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


# --------------------------------------------------------------------------------------- the model


class DoD(nn.Module):
    """The backbone F of Eq. 4, the condition c of Eq. 5 and LEM. With config.N = 0: plain FiTv2."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # training computes each block (not LEM's) again, backward
        d, patch = config.d, config.p**2 * config.latent_channels
        self.patch_embed = nn.Linear(patch, d)
        self.time, self.label = TimeEmbedding(d), nn.Embedding(config.num_classes + 1, d)
        self.W_g = nn.Linear(d, 6 * d)  # the global AdaLN of Eq. 10
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.final = FinalLayer(d, patch)
        cos, sin = rope_2d(d // config.heads, config.latent_size // config.p)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

        if config.N:
            self.S = nn.Parameter(torch.randn(1, 1, d) * 0.02)  # the sample token of Eq. 5
            self.lem = LEM(
                config.latent_size, config.latent_channels, config.p, config.d_l, config.lem_heads,
                config.encoder_depth, config.decoder_depth, config.N, config.d_e,
            )  # fmt: skip
            # CHOICE: the paper does not say how e_s gets from width d_l to d. Table 1's 105 M and
            # 527 M come out with this two-layer MLP, counted with the backbone.
            self.prior_mlp = nn.Sequential(nn.Linear(config.d_l, d), nn.SiLU(), nn.Linear(d, d))
        self.initialize()

    def initialize(self) -> None:
        """Xavier-uniform linears, zero biases, N(0, 0.02) for the class table (as for S, L and M).
        Zeros in all modulations and in the last layer: each backbone block starts as the identity,
        and v ≡ 0. CHOICE: as DiT, but for the time MLP, which there starts from N(0, 0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.label.weight, std=0.02)
        silent = [self.W_g, self.final.adaln, self.final.linear]
        for linear in silent + [block.W_2 for block in self.blocks]:
            nn.init.zeros_(linear.weight)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.config.num_classes

    def visual_prior(self, z0: torch.Tensor) -> torch.Tensor:
        """e_s = LEM(z_0) of Eq. 5, brought to the backbone's width: (B, C, H, W) -> (B, T, d).

        It does not depend on t: compute it once per stage, not once per evaluation. From here on,
        e_s means this one, of the backbone's width.
        """
        if not self.config.N:
            raise UserError("this model is a plain FiTv2 without LEM: it has stage 1 only")
        return self.prior_mlp(self.lem(z0))

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor, e_s: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The velocity v of Eq. 2 at (x_t, t), given class y and prior e_s.

        Eq. 5:  c = e_c + e_t + S   (stage 1: no prior, e_s=None)
                c = e_c + e_t + e_s (later stages)

        x_t (B, C, H, W); t (B,) in [0, 1]; y (B,) in 0 .. K, K the null class; e_s (B, T, d)
        -> (B, C, H, W). With S, c is one vector per image, and so the modulations are computed once
        per image; with e_s, c is one vector per token. The blocks broadcast: one code for both.
        """
        c = self.label(y)[:, None] + self.time(t)  # e_c + e_t: (B, 1, d)
        if self.config.N:
            c = c + (self.S if e_s is None else e_s)  # (B, 1, d) or (B, T, d)
        silu_c = F.silu(c)
        global_S = self.W_g(silu_c)

        x = self.patch_embed(patchify(x_t, self.config.p))  # (B, T, d)
        x = x.to(self.patch_embed.weight.dtype)  # under autocast too the residual stream is fp32
        for block in self.blocks:
            inputs = (x, silu_c, global_S, self.cos, self.sin)
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
        return self.unpatchify(self.final(x, silu_c))

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of patchify: (B, T, p * p * C) -> (B, C, H, W)."""
        p, side = self.config.p, self.config.latent_size // self.config.p
        x = x.reshape(len(x), side, side, p, p, self.config.latent_channels)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


# ---------------------------------------------------------------------------------- Tables 1 and 4


def count_parameters(config: Config) -> tuple[int, int]:
    """Table 1's last column: trainable parameters of (backbone, LEM)."""
    with torch.device("meta"):  # shapes without memory
        model = DoD(config)
    lem = sum(p.numel() for p in model.lem.parameters()) if config.N else 0
    return sum(p.numel() for p in model.parameters()) - lem, lem


def count_macs(config: Config) -> dict[str, int]:
    """Table 4's unit: multiply-accumulates of the linear layers, for one image.

    Counted, not derived: hooks on the Linears of a model without memory add up what a call does.
      s          one evaluation with c per image (S in place of a prior)
      e_s        one evaluation with c per token and, as the paper counts, the prior's MLP
      prior_mlp  that MLP alone: we run it once per stage
      lem        LEM, once per stage
      attention  left out of these: Q K^T and the product with V, per evaluation
      lem_attention   the same for LEM
    """
    macs = 0

    def hook(linear, inputs, output):
        nonlocal macs
        macs += inputs[0].numel() * linear.out_features

    def counted(function, *args):
        nonlocal macs
        macs = 0
        return function(*args), macs

    with torch.device("meta"):
        model = DoD(config)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(hook)
        x = torch.empty(1, config.latent_channels, config.latent_size, config.latent_size)
        t, y = torch.ones(1), torch.zeros(1, dtype=torch.long)
        counts = {"s": counted(model, x, t, y)[1]}
        if config.N:
            e_l, counts["lem"] = counted(model.lem, x)
            e_s, counts["prior_mlp"] = counted(model.prior_mlp, e_l)
            counts["e_s"] = counted(model, x, t, y, e_s)[1] + counts["prior_mlp"]
    T = config.num_tokens
    counts["attention"] = 2 * config.depth * config.d * T**2
    lem_depth = (config.encoder_depth + config.decoder_depth) * bool(config.N)
    counts["lem_attention"] = 2 * lem_depth * config.d_l * (T + config.N) ** 2
    return counts


def stage_parts(evaluations: float, has_prior: bool, guided: bool) -> dict[str, float]:
    """How often one stage of sampling runs each part of count_macs; parts add up over stages.

    Guidance's other half sees S in place of a prior. Table 4 counts the prior's MLP in each of its
    evaluations; here it runs once.
    """
    n = evaluations
    if has_prior:
        return {"lem": 1, "e_s": n, "prior_mlp": 1 - n, "s": n * guided}
    return {"s": n * (1 + guided)}


def print_table_1() -> None:
    """Table 1, with the baselines of Tables 4 and 5 (FiTv2-B's count: Wang et al., 2024)."""
    print("Table 1: parameters, millions        backbone       LEM     total")
    paper = {"DoD-S": (27, 21), "DoD-B": (105, 86), "DoD-XL": (527, 86)}
    paper |= {"FiTv2-B": (128, 0), "FiTv2-XL": (671, 0)}
    for name, config in CONFIGS.items():
        backbone, lem = (n / 1e6 for n in count_parameters(config))
        print(f"  {name:9} ours                 {backbone:12.2f}{lem:10.2f}{backbone + lem:10.2f}")
        if name in paper:
            backbone, lem = paper[name]
            print(f"            paper                {backbone:12}{lem:10}{backbone + lem:10}")


def print_table_4() -> None:
    """Table 4's compute column. A guided step of stage 2 costs the paper 2 x 26.5, here less."""
    dod, fit = count_macs(CONFIGS["DoD-B"]), count_macs(CONFIGS["FiTv2-B"])
    rows = [  # what, GFLOPs in the paper, ours: the model and how often each of its parts runs
        ("LEM", 24.6, dod, {"lem": 1}),
        ("DoD-B, one evaluation, c per token", 26.5, dod, {"e_s": 1}),
        ("DoD-B, one evaluation, c per image", 26.5, dod, {"s": 1}),
        ("FiTv2-B, one evaluation", 27.3, fit, {"s": 1}),
    ]
    for n, paper in ((30, (1638, 3276, 795, 2409.6)), (120, (6552, 13104, 3180, 9564.6))):
        stage_1, stage_2 = stage_parts(n, False, False), stage_parts(n, True, True)
        both = stage_2 | {"s": stage_1["s"] + stage_2["s"]}
        rows += [
            (f"FiTv2-B, {2 * n} steps", paper[0], fit, stage_parts(2 * n, False, False)),
            (f"FiTv2-B-G, {2 * n} steps", paper[1], fit, stage_parts(2 * n, False, True)),
            (f"DoD-B (S1), {n} steps", paper[2], dod, stage_1),
            (f"DoD-B-G (S2), {n} + {n} steps", paper[3], dod, both),
        ]
    print(
        "\nTable 4: compute; GFLOPs, as the paper counts: 10^9 multiply-accumulates, linear layers"
    )
    print("                                          paper      ours    ours with attention")
    for what, paper, counts, parts in rows:
        linear = sum(times * counts[part] for part, times in parts.items())
        attention = (parts.get("s", 0) + parts.get("e_s", 0)) * counts["attention"]
        attention += parts.get("lem", 0) * counts["lem_attention"]
        print(f"  {what:38}{paper:7.1f}{linear / 1e9:10.1f}{(linear + attention) / 1e9:18.1f}")


def print_budget() -> None:
    """What training costs by arithmetic: p_s = 0.5, a step is three forward passes, two operations
    a multiply-accumulate, attention included; fp32 weights, gradient, EMA and AdamW's two moments.
    """
    print("\nTraining, by arithmetic   GFLOP/image   EFLOP, 1M x 256   GB held   GB a checkpoint")
    for name, config in CONFIGS.items():
        n, parameters = count_macs(config), sum(count_parameters(config)) / 1e9
        macs = n["s"] + n["attention"]
        if config.N:
            macs += (n["e_s"] - n["s"] + n["lem"] + n["lem_attention"]) / 2
        flops = 3 * 2 * macs
        print(f"  {name:23}{flops / 1e9:12.4g}{flops * 256e6 / 1e18:18.3g}", end="")
        print(f"{20 * parameters:10.2f}{16 * parameters:18.2f}")


if __name__ == "__main__":
    print_table_1()
    print_table_4()
    print_budget()
