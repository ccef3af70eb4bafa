"""model.py -- the FiTv2 backbone, and DoD, which adds a visual prior. Section 3.2, Eqs. 5, 8-10.

FiTv2 (appendix A.1) is a diffusion transformer (DiT) with 2-D rotary positions, normalised queries
and keys, a SwiGLU feed-forward network and AdaLN-LoRA modulation. It maps a noisy latent x_t, its
time t (0 is data, 1 is noise) and its class y to the velocity v = x_1 - x_0 of flow.py. All that
DoD adds is a term in the condition c: the visual prior e_s of an earlier image, one vector for
each token, or in its place the learned sample token S. See `class DoD`.

Shapes: B images, C channels, H x W latent, p patch size, T = (H/p)(W/p) tokens (not Eq. 4's number
of steps), d width, r LoRA rank, K classes (index K is the null class; for K = 1 see null_class).

    python model.py      # Table 1, Table 4's compute column, and the budget of training
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lem import LEM, Means, Patches, angles_2d, patchify, unpatchify


class UserError(Exception):
    """An error that the user can fix. It says what was given, what is allowed and what to do."""


def rope_2d(head_dim: int, side: int) -> tuple[Tensor, Tensor]:
    """2-D RoPE tables (appendix A.1; Su et al., 2024) -> cos, sin, each (side * side, head_dim/2).
    The first half of a head's channel pairs turns with the token's row, the second half with its
    column. CHOICE: FiTv2's base of 10000."""
    angle = torch.cat(angles_2d(side, side, head_dim // 4), dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each channel pair (x_2k, x_2k+1) of (..., T, head_dim) by its token's angle."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (..., T, head_dim / 2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension, without a learned scale or shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN, LN(x) (1 + scale) + shift: x (B, T, d); shift, scale (B, 1, d) or (B, T, d).
    The sum 1 + scale is computed in fp32, for bf16 would round away a scale below 0.004."""
    normed = layer_norm(x)  # in fp32, under autocast too
    return normed * (1 + scale.to(normed.dtype)) + shift


class Attention(nn.Module):
    """Eq. 9: Softmax(1/sqrt(d_k) LN(Q) LN(K)^T) V in each head, with 2-D RoPE after the LayerNorms.

    LN(Q) and LN(K) have fixed lengths, so no logit can grow without bound and spoil a softmax.
    DEVIATION: the paper prints 1/d_k; FiTv2's scale, like every transformer's, is 1/sqrt(d_k).
    CHOICE: LN(Q) and LN(K) have no learned scale or shift, and RoPE comes after them, as in FiTv2.
    """

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, heads, d_k)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, d_k)

        # Under autocast, LayerNorm and rotation run in fp32; the attention kernel wants the dtype
        # of the values.
        q = rotate(layer_norm(q), cos, sin).to(v.dtype)
        k = rotate(layer_norm(k), cos, sin).to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, d_k)
        return self.proj(attended.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Eq. 8: FFN(x) = (SiLU(x W_1) ⊗ (x W_2)) W_3. These W_1 and W_2 are not those of Eq. 10.

    CHOICE: the hidden width is 8d/3, so that the three matrices hold as many parameters as the
    usual two of width 4d (Shazeer, 2020). DEVIATION: Eq. 8 prints no biases; FiTv2 has them."""

    def __init__(self, d: int):
        super().__init__()
        hidden = int(8 * d / 3)
        self.W_1 = nn.Linear(d, hidden)
        self.W_2 = nn.Linear(d, hidden)
        self.W_3 = nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self.W_3(F.silu(self.W_1(x)) * self.W_2(x))


class TimeEmbedding(nn.Module):
    """e_t: 128 cosines and 128 sines of the time, then Linear, SiLU, Linear, as in DiT."""

    def __init__(self, d: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, t: Tensor) -> Tensor:
        """Times t (B,) in [0, 1] -> (B, 1, d)."""
        # CHOICE: t enters as it is, in [0, 1], not scaled to DDPM's 0 .. 1000 (SiT does the same).
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angle = t[:, None] * frequencies.to(t)  # (B, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))[:, None]


@dataclass(frozen=True)
class Config:
    """All shapes, and the default guidance scale. Raises UserError for sizes that do not fit."""

    depth: int = 12  # backbone layers, Table 1
    d: int = 768  # backbone hidden size, Table 1
    heads: int = 12  # backbone heads, Table 1
    r: int = 192  # AdaLN-LoRA rank, Eq. 10; CHOICE: d / 4, as in FiTv2
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
    w: float = 5.5  # default guidance scale of stages with a prior, section 4.2 and Table 5
    prior_from: str = "lem"  # or "patches", "means": what lem.py compares LEM with

    def __post_init__(self):
        if self.latent_size % self.p:
            sizes = f"latent size {self.latent_size} is not a multiple of patch size {self.p}"
            raise UserError(f"{sizes}; change --image-size or --patch-size")
        # RoPE and PE need channels in fours: two for the row, two for the column.
        if self.d % (4 * self.heads) or (self.N and self.d_e % 4):
            sizes = f"d is {self.d} with {self.heads} heads, d_e is {self.d_e}"
            raise UserError(f"{sizes}; d / heads and d_e must be multiples of 4")

    @property
    def num_tokens(self) -> int:
        """T, the sequence length of the backbone."""
        return (self.latent_size // self.p) ** 2


CONFIGS: dict[str, Config] = {
    # Table 1.
    "DoD-S": Config(depth=12, d=384, heads=6, r=96, d_l=384, lem_heads=6),
    "DoD-B": Config(depth=12, d=768, heads=12, r=192),
    "DoD-XL": Config(depth=28, d=1152, heads=16, r=288, w=3.5),  # with DoD-B's LEM
    # The baselines of Tables 4 and 5: no visual prior, deeper.
    "FiTv2-B": Config(depth=15, d=768, heads=12, r=192, N=0),
    "FiTv2-XL": Config(depth=36, d=1152, heads=16, r=288, N=0),
    # CHOICE: not in the paper. DoD-B's geometry in miniature: T = 16, d_e = p * p * C, N = T / 8.
    "DoD-Ti": Config(
        depth=4, d=128, heads=4, r=32, encoder_depth=2, decoder_depth=1, d_l=128, lem_heads=4,
        N=2, d_e=16, p=4, latent_size=16, latent_channels=1, num_classes=10, w=3,
    ),
    "FiTv2-Ti": Config(
        depth=5, d=128, heads=4, r=32, N=0, p=4, latent_size=16, latent_channels=1,
        num_classes=10,
    ),
}  # fmt: skip


class Block(nn.Module):
    """A FiTv2 block: attention, then SwiGLU. By AdaLN-LoRA, c changes their input and output:

    Eq. 10:  S^i = W^g c + W_2^i W_1^i c = [beta_1, beta_2, gamma_1, gamma_2, alpha_1, alpha_2]

    beta shifts and gamma scales an input, alpha gates an output: with alpha = 0 a block is the
    identity. All blocks share W^g, and W^g c arrives as `modulation`; each adds a low-rank part of
    its own. c is Eq. 5's. S^i is not the sample token S: the paper uses the letter twice.
    DEVIATION: Eq. 10 omits the SiLU on c (and, as the paper says itself, the biases).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.attention = Attention(config.d, config.heads)
        self.ffn = SwiGLU(config.d)
        self.W_1 = nn.Linear(config.d, config.r)
        self.W_2 = nn.Linear(config.r, 6 * config.d)

    def forward(
        self, x: Tensor, silu_c: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """x (B, T, d); silu_c (B, 1 or T, d); modulation (B, 1 or T, 6d) -> (B, T, d)."""
        modulation = modulation + self.W_2(self.W_1(silu_c))  # S^i of Eq. 10
        beta_1, beta_2, gamma_1, gamma_2, alpha_1, alpha_2 = modulation.chunk(6, dim=-1)
        x = x + alpha_1 * self.attention(adaln(x, beta_1, gamma_1), cos, sin)
        return x + alpha_2 * self.ffn(adaln(x, beta_2, gamma_2))


class FinalLayer(nn.Module):
    """The last AdaLN, then one linear layer from each token to its patch of the velocity.
    CHOICE: this AdaLN has full rank, like DiT's; the paper describes those of the blocks only."""

    def __init__(self, d: int, out: int):
        super().__init__()
        self.adaln = nn.Linear(d, 2 * d)
        self.linear = nn.Linear(d, out)

    def forward(self, x: Tensor, silu_c: Tensor) -> Tensor:
        """x (B, T, d); silu_c (B, 1 or T, d) -> (B, T, p * p * C)."""
        shift, scale = self.adaln(silu_c).chunk(2, dim=-1)
        return self.linear(adaln(x, shift, scale))


# --------------------------------------------------------------------------- the backbone: FiTv2


class FiTv2(nn.Module):
    """The backbone F of Eq. 4, a diffusion transformer with the condition c = e_c + e_t."""

    def __init__(self, config: Config):
        super().__init__()
        d = config.d
        patch = config.p**2 * config.latent_channels
        self.config = config
        self.patch_embed = nn.Linear(patch, d)
        self.time = TimeEmbedding(d)
        self.label = nn.Embedding(config.num_classes + 1, d)  # the last row is the null class
        self.W_g = nn.Linear(d, 6 * d)  # the global AdaLN of Eq. 10
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.final = FinalLayer(d, patch)
        cos, sin = rope_2d(d // config.heads, config.latent_size // config.p)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.cos.device

    @property
    def null_class(self) -> int:
        """The label that stands for "no class". CHOICE: with one class, it is that class itself, so
        class dropout changes nothing, and guidance acts on the prior alone."""
        return self.config.num_classes if self.config.num_classes > 1 else 0

    def condition(self, t: Tensor, y: Tensor, e_s: Tensor | None) -> Tensor:
        """FiTv2's condition c = e_c + e_t -> (B, 1, d). It knows no prior: e_s must be None."""
        assert e_s is None, "a plain FiTv2 takes no visual prior"
        return self.label(y)[:, None] + self.time(t)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, e_s: Tensor | None = None) -> Tensor:
        """The velocity v of Eq. 2 at (x_t, t), given class y and, in DoD, the prior e_s.
        x_t (B, C, H, W); t (B,) in [0, 1]; y (B,) in 0 .. K, where K is the null class; e_s
        (B, T, d) -> (B, C, H, W). c is one vector for each image, or with e_s one for each token.

        One image through DoD-B in stage 2, without the batch dimension:
            x_t  4 x 32 x 32  ->  patches of 2 x 2: 256 x 16  ->  tokens: 256 x 768
            z_0  4 x 32 x 32  ->  L_hat 32 x 16  ->  LEM's output 256 x 768  ->  e_s 256 x 768
            c    1 x 768 (class) + 1 x 768 (time) + 256 x 768 (prior) = 256 x 768
            S^i  256 x 4608: six modulations of 768 for each token, in each of the 12 blocks
            v    256 x 768  ->  256 x 16  ->  4 x 32 x 32
        """
        # Every block reads SiLU(c). Under autocast it is cast to bf16 here, once.
        silu_c = F.silu(self.condition(t, y, e_s))  # (B, 1 or T, d)
        modulation = self.W_g(silu_c)  # (B, 1 or T, 6d)
        silu_c = silu_c.to(modulation.dtype)

        x = self.patch_embed(patchify(x_t, self.config.p))  # (B, T, d)
        x = x.to(self.patch_embed.weight.dtype)  # blocks add to x in fp32, under autocast too
        for block in self.blocks:
            x = block(x, silu_c, modulation, self.cos, self.sin)  # (B, T, d)
        v = self.final(x, silu_c)  # (B, T, p * p * C)
        return unpatchify(v, self.config.p)  # (B, C, H, W)


# ------------------------------------------------------------------- what DoD adds to it: Eq. 5


class DoD(FiTv2):
    """Diffusion on Diffusion: a FiTv2 that can also be told what an earlier image looked like.

    Eq. 5:  c = e_c + e_t + S    in stage 1, where there is no earlier image
            c = e_c + e_t + e_s  in later stages, e_s = MLP(LEM(z_0)), z_0 of the stage before
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.S = nn.Parameter(torch.randn(1, 1, config.d) * 0.02)  # sample token: replaces a prior

        # The bottleneck through which the earlier image is seen: LEM or an alternative.
        others = {"patches": Patches, "means": Means}
        if config.prior_from in others:
            self.lem = others[config.prior_from](config.latent_channels, config.p, config.d_l)
        else:
            self.lem = LEM(
                config.latent_size, config.latent_channels, config.p, config.d_l, config.lem_heads,
                config.encoder_depth, config.decoder_depth, config.N, config.d_e,
            )  # fmt: skip

        # CHOICE: the paper does not say how e_s gets from width d_l to d. With this MLP, counted
        # with the backbone, Table 1's 105 M and 527 M come out. S, of width d, replaces its output.
        self.prior_mlp = nn.Sequential(
            nn.Linear(config.d_l, config.d), nn.SiLU(), nn.Linear(config.d, config.d)
        )

    def visual_prior(self, z0: Tensor) -> Tensor:
        """e_s = MLP(LEM(z_0)), LEM's output brought from width d_l to d: (B, C, H, W) -> (B, T, d).
        It does not depend on t: compute it once per stage, not once per evaluation."""
        return self.prior_mlp(self.lem(z0))

    def condition(self, t: Tensor, y: Tensor, e_s: Tensor | None) -> Tensor:
        """Eq. 5 -> c, (B, 1, d) with S where e_s is None, and (B, T, d) with e_s (B, T, d)."""
        c = super().condition(t, y, None)  # e_c + e_t, (B, 1, d)
        if e_s is None:
            return c + self.S
        return c + e_s


def build_model(config: Config) -> FiTv2 | DoD:
    """A new model with its initial weights: DoD, or FiTv2 if the config has no latent tokens.

    Zeros in all modulations and in the last layer make each block of the backbone the identity and
    v = 0, so that training starts from a calm state. CHOICE: as in DiT, Xavier-uniform linears and
    N(0, 0.02) for tables and tokens; unlike DiT's, the time MLP is Xavier-uniform, too.
    """
    model = DoD(config) if config.N else FiTv2(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.label.weight, std=0.02)
    nn.init.zeros_(model.W_g.weight)
    for block in model.blocks:
        nn.init.zeros_(block.W_2.weight)
    nn.init.zeros_(model.final.adaln.weight)
    nn.init.zeros_(model.final.linear.weight)
    return model


# ---------------------------------------------------------------------------------- Tables 1 and 4


def count_parameters(config: Config) -> tuple[int, int]:
    """Table 1's last column: the numbers of trainable parameters of the backbone and of LEM."""
    with torch.device("meta"):  # shapes, no data
        model = build_model(config)
    lem = sum(p.numel() for name, p in model.named_parameters() if name.startswith("lem."))
    return sum(p.numel() for p in model.parameters()) - lem, lem


def count_macs(config: Config, attention: bool = False) -> dict[str, int]:
    """Table 4's unit, which the paper calls FLOPs: multiply-accumulates of the linear layers, for
    one image, as PyTorch's own counter finds them in one call of a model on the meta device.

      s          one evaluation with c for each image (S, or no prior at all)
      e_s        one evaluation with c for each token
      prior_mlp  the prior's MLP, which we run once per stage (the paper: once per evaluation)
      lem        LEM, once per stage
    With `attention`, Q K^T and the product with V are counted, too; the paper leaves them out.
    """
    with torch.device("meta"):
        model = build_model(config)
        x = torch.empty(1, config.latent_channels, config.latent_size, config.latent_size)
        t = torch.ones(1)
        y = torch.zeros(1, dtype=torch.long)

    def count(function, *inputs):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            result = function(*inputs)
        flops = counter.get_flop_counts().get("Global", {})
        counted = sum(flops.values()) if attention else flops.get(torch.ops.aten.addmm, 0)
        return result, counted // 2  # two operations a multiply-accumulate

    # Stage 1; then LEM, whose output of width d_l is e_l, its MLP, and a later stage.
    macs = {}
    _, macs["s"] = count(model, x, t, y)
    if config.N:
        e_l, macs["lem"] = count(model.lem, x)
        e_s, macs["prior_mlp"] = count(model.prior_mlp, e_l)
        _, macs["e_s"] = count(model, x, t, y, e_s)
    return macs


def stage_macs(macs: dict[str, int], per_token: float, per_image: float) -> float:
    """Multiply-accumulates of one stage of sampling, given those of count_macs. The network runs
    `per_token` times with c for each token, and `per_image` times with c for each image, as the
    unconditional branch always does. LEM and the prior's MLP run once per stage."""
    total = per_image * macs["s"]
    if per_token:
        total += macs["lem"] + macs["prior_mlp"] + per_token * macs["e_s"]
    return total


@lru_cache  # counting takes a second
def training_flops(config: Config, p_s: float = 0.5) -> float:
    """Operations, two for each multiply-accumulate, of training on one image, attention included.
    The backward pass costs twice the forward pass; LEM runs for the share 1 - p_s of the images."""
    macs = count_macs(config, attention=True)
    forward = macs["s"]
    if config.N:
        forward = macs["e_s"] + (1 - p_s) * (macs["lem"] + macs["prior_mlp"])
    return 3 * 2 * forward


def print_table_1() -> None:
    """Prints Table 1 and the cost of training: operations, and the memory of five fp32 numbers a
    parameter (weight, gradient, EMA, AdamW's two moments). FiTv2-B's count: Wang et al., 2024."""
    paper = {"DoD-S": "27 + 21", "DoD-B": "105 + 86", "DoD-XL": "527 + 86"}
    paper |= {"FiTv2-B": "128", "FiTv2-XL": "671"}
    print("Table 1: parameters, M                   | training: GFLOP   EFLOP,     GB")
    print("           backbone     LEM       paper  |       an image   1M x 256   held")
    for name, config in CONFIGS.items():
        backbone, lem = count_parameters(config)
        flops = training_flops(config)
        counts = f"{backbone / 1e6:10.2f}{lem / 1e6:8.2f}{paper.get(name, '-'):>12}"
        cost = f"{flops / 1e9:15.4g}{flops * 256e6 / 1e18:11.3g}{20e-9 * (backbone + lem):7.2f}"
        print(f"{name:9}{counts}  |{cost}")


def print_table_4() -> None:
    """Prints Table 4's compute. CHOICE: the unconditional branch has one condition for each image,
    and the prior's MLP runs once a stage, so a guided step costs less than the paper's 2 x 26.5."""
    dod = count_macs(CONFIGS["DoD-B"])
    fit = count_macs(CONFIGS["FiTv2-B"])
    rows = [  # what, the paper's figure, ours
        ("LEM", 24.6, dod["lem"]),
        ("DoD-B, one evaluation, c per token", 26.5, dod["e_s"] + dod["prior_mlp"]),
        ("DoD-B, one evaluation, c per image", 26.5, dod["s"]),
        ("FiTv2-B, one evaluation", 27.3, fit["s"]),
    ]
    # Both halves of the table: n steps in each of DoD's stages, 2 n for the baseline.
    for n, paper in ((30, (1638, 3276, 795, 2409.6)), (120, (6552, 13104, 3180, 9564.6))):
        stage_1 = stage_macs(dod, per_token=0, per_image=n)
        stage_2 = stage_macs(dod, per_token=n, per_image=n)  # guided: both branches in each step
        rows += [
            (f"FiTv2-B, {2 * n} steps", paper[0], 2 * n * fit["s"]),
            (f"FiTv2-B-G, {2 * n} steps", paper[1], 2 * 2 * n * fit["s"]),
            (f"DoD-B (S1), {n} steps", paper[2], stage_1),
            (f"DoD-B-G (S2), {n} + {n} steps", paper[3], stage_1 + stage_2),
        ]
    print("\nTable 4: 10^9 multiply-accumulates        paper      ours")
    for what, paper, macs in rows:
        print(f"  {what:38}{paper:8.1f}{macs / 1e9:10.1f}")


if __name__ == "__main__":
    print_table_1()
    print_table_4()
