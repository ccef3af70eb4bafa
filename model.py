"""model.py -- the FiTv2 backbone and DoD around it. Section 3.2, appendix A.1, Eqs. 5 and 8-10.

The backbone is a diffusion transformer (DiT) with 2-D rotary positions, normalised queries and
keys, a SwiGLU feed-forward network and AdaLN-LoRA modulation. It maps a noisy latent x_t, its time
t and its class y to the velocity v = x_1 - x_0 of the rectified flow (flow.py). All that DoD adds
is one more summand in the condition c: the visual prior e_s, one vector for each token, or in its
place the learned sample token S.

Time runs from data to noise: t = 0 is data, t = 1 is noise.
Shapes: B images, C channels, H x W latent, p patch size, T = (H/p)(W/p) tokens (not Eq. 4's number
of steps), d width, r LoRA rank, K classes (index K is the null class of guidance).

    python model.py      # Table 1, Table 4's compute column (ours and the paper's), our budget
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lem import LEM, Means, Patches, patchify


class UserError(Exception):
    """A mistake that the user can mend. Says what was got, what is allowed, what to do."""


# --------------------------------------------------------------------------------- the leaves: A.1


def rope_2d(head_dim: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """2-D RoPE tables (appendix A.1) -> cos, sin, each (side * side, head_dim / 2).

    The first half of a head's channel pairs turns with the token's row, the second half with its
    column, at the frequencies 10000^(-2k / (head_dim / 2)).
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
    """LayerNorm over the last dimension, without a learned scale or shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """AdaLN: x (B, T, d); shift and scale (B, 1, d), one for each image, or (B, T, d)."""
    return layer_norm(x) * (1 + scale) + shift


class Attention(nn.Module):
    """Eq. 9: Softmax(1/sqrt(d_k) LN(Q) LN(K)^T) V in each head, with 2-D RoPE after the LayerNorms.

    DEVIATION: the paper prints 1/d_k; FiTv2's scale, like every transformer's, is 1/sqrt(d_k).
    CHOICE: LN(Q) and LN(K) have no learned scale or shift, and RoPE comes after them, as in FiTv2.
    """

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
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
    """Eq. 8: FFN(x) = (SiLU(x W_1) ⊗ (x W_2)) W_3, with matrices of its own (Eq. 10 has others).

    CHOICE: the hidden width, which the paper leaves open, is 8d/3: the three matrices then hold as
    many parameters as the usual two of width 4d (Shazeer, 2020).
    DEVIATION: we add biases, as FiTv2 does; Eq. 8 prints none.
    """

    def __init__(self, d: int):
        super().__init__()
        hidden = int(8 * d / 3)
        self.W_1 = nn.Linear(d, hidden)
        self.W_2 = nn.Linear(d, hidden)
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


# ------------------------------------------------------------------------------- blocks and config


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
    cfg: float = 5.5  # default guidance scale of stages with a prior, section 4.2 and Table 5
    prior_from: str = "lem"  # or "patches", "means": what lem.py compares LEM with

    def __post_init__(self):
        if self.latent_size % self.p:
            sizes = f"latent size {self.latent_size} is not a multiple of patch size {self.p}"
            raise UserError(f"{sizes}; change --image-size or --patch-size")
        # 2-D RoPE takes a head's channels in fours: a pair for the row, a pair for the column. The
        # 2-D PE takes a token's channels in fours: sine and cosine of the row and of the column.
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
    "DoD-XL": Config(depth=28, d=1152, heads=16, r=288, cfg=3.5),  # with DoD-B's LEM
    # The baselines of Tables 4 and 5: no visual prior, deeper.
    "FiTv2-B": Config(depth=15, d=768, heads=12, r=192, N=0),
    "FiTv2-XL": Config(depth=36, d=1152, heads=16, r=288, N=0),
    # CHOICE: not in the paper. The same geometry in miniature: T = 16 tokens instead of 256;
    # d_e = p * p * C and N = T / 8, as in DoD-B.
    "DoD-Ti": Config(
        depth=4, d=128, heads=4, r=32, encoder_depth=2, decoder_depth=1, d_l=128, lem_heads=4,
        N=2, d_e=16, p=4, latent_size=16, latent_channels=1, num_classes=10, cfg=2,
    ),
    "FiTv2-Ti": Config(
        depth=5, d=128, heads=4, r=32, N=0, p=4, latent_size=16, latent_channels=1,
        num_classes=10, cfg=2,
    ),
}  # fmt: skip


class Block(nn.Module):
    """A FiTv2 block: attention and SwiGLU, each modulated before and gated after by AdaLN-LoRA.

    Eq. 10:  S^i = W^g c + W_2^i W_1^i c = [beta_1, beta_2, gamma_1, gamma_2, alpha_1, alpha_2]

    Here c is all of Eq. 5's condition; Eq. 10 prints FiTv2's, class and time only (c + t). Nor is
    S^i the sample token S of Eq. 5, and W_1, W_2 are not SwiGLU's: the paper uses these letters
    twice. W^g is shared by all blocks, and W^g c arrives as `global_S`; each block adds its own
    low-rank part. beta shifts, gamma scales, alpha gates.
    DEVIATION: Eq. 10 omits the SiLU on c (and, as the paper says itself, the biases).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.attention = Attention(config.d, config.heads)
        self.ffn = SwiGLU(config.d)
        self.W_1 = nn.Linear(config.d, config.r)
        self.W_2 = nn.Linear(config.r, 6 * config.d)

    def forward(self, x, silu_c, global_S, cos, sin):
        """x (B, T, d); silu_c (B, 1 or T, d); global_S (B, 1 or T, 6d) -> (B, T, d)."""
        S_i = global_S + self.W_2(self.W_1(silu_c))
        beta_1, beta_2, gamma_1, gamma_2, alpha_1, alpha_2 = S_i.chunk(6, dim=-1)
        x = x + alpha_1 * self.attention(modulate(x, beta_1, gamma_1), cos, sin)
        return x + alpha_2 * self.ffn(modulate(x, beta_2, gamma_2))


class FinalLayer(nn.Module):
    """Last AdaLN, then each token -> its patch of the velocity: (B, T, d) -> (B, T, p * p * C).

    CHOICE: this AdaLN has full rank, like DiT's; the paper describes those of the blocks only.
    """

    def __init__(self, d: int, out: int):
        super().__init__()
        self.adaln = nn.Linear(d, 2 * d)
        self.linear = nn.Linear(d, out)

    def forward(self, x: torch.Tensor, silu_c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaln(silu_c).chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


# ------------------------------------------------------------------------------- the model: Eq. 5


class DoD(nn.Module):
    """The backbone F of Eq. 4, the condition c of Eq. 5 and LEM. With config.N = 0: plain FiTv2."""

    def __init__(self, config: Config):
        super().__init__()
        d = config.d
        patch = config.p**2 * config.latent_channels
        self.config = config

        # The backbone.
        self.patch_embed = nn.Linear(patch, d)
        self.time = TimeEmbedding(d)
        self.label = nn.Embedding(config.num_classes + 1, d)  # the last row is the null class
        self.W_g = nn.Linear(d, 6 * d)  # the global AdaLN of Eq. 10
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.final = FinalLayer(d, patch)
        cos, sin = rope_2d(d // config.heads, config.latent_size // config.p)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

        # What DoD adds: the sample token S, LEM, and the layers that carry e_s into the backbone.
        if config.N:
            self.S = nn.Parameter(torch.randn(1, 1, d) * 0.02)
        if config.N and config.prior_from != "lem":
            bottleneck = {"patches": Patches, "means": Means}[config.prior_from]
            self.lem = bottleneck(config.latent_channels, config.p, config.d_l)
        elif config.N:
            self.lem = LEM(
                config.latent_size, config.latent_channels, config.p, config.d_l, config.lem_heads,
                config.encoder_depth, config.decoder_depth, config.N, config.d_e,
            )  # fmt: skip
        if config.N:
            # CHOICE: the paper does not say how e_s gets from width d_l to d. With this two-layer
            # MLP, counted with the backbone, Table 1's 105 M and 527 M come out.
            self.prior_mlp = nn.Sequential(nn.Linear(config.d_l, d), nn.SiLU(), nn.Linear(d, d))
        self.initialize()

    def initialize(self) -> None:
        """Xavier-uniform linears, zero biases, N(0, 0.02) for the class table (as for S, L and M).

        Zeros in all modulations and in the last layer: each block of the backbone starts as the
        identity, and v ≡ 0. CHOICE: as in DiT, except for the time MLP, which starts from
        N(0, 0.02) there.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.label.weight, std=0.02)
        nn.init.zeros_(self.W_g.weight)
        for block in self.blocks:
            nn.init.zeros_(block.W_2.weight)
        nn.init.zeros_(self.final.adaln.weight)
        nn.init.zeros_(self.final.linear.weight)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class". With K = 1 there is nothing to drop, and it is the
        one class: class dropout then has no effect, and guidance acts on the prior alone."""
        return self.config.num_classes if self.config.num_classes > 1 else 0

    def visual_prior(self, z0: torch.Tensor) -> torch.Tensor:
        """e_s = LEM(z_0) of Eq. 5, brought to the backbone's width: (B, C, H, W) -> (B, T, d).

        It does not depend on t: compute it once a stage, not once an evaluation.
        """
        return self.prior_mlp(self.lem(z0))

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor, e_s: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The velocity v of Eq. 2 at (x_t, t), given class y and prior e_s.

        Eq. 5:  c = e_c + e_t + S   (stage 1: no prior, e_s=None)
                c = e_c + e_t + e_s (later stages)

        x_t (B, C, H, W); t (B,) in [0, 1]; y (B,) in 0 .. K, where K is the null class; e_s
        (B, T, d) -> (B, C, H, W). With S, c is one vector for each image, and the modulations are
        computed once for each image; with e_s, c is one vector for each token. Blocks broadcast.

        One image through DoD-B in stage 2, without the batch dimension:
            x_t  4 x 32 x 32  ->  patches of 2 x 2: 256 x 16  ->  tokens: 256 x 768
            z_0  4 x 32 x 32  ->  L_hat 32 x 16  ->  LEM's output 256 x 768  ->  e_s 256 x 768
            c    1 x 768 (class) + 1 x 768 (time) + 256 x 768 (prior) = 256 x 768
            S^i  256 x 4608: six modulations of 768 for each token, in each of the 12 blocks
            v    256 x 768  ->  256 x 16  ->  4 x 32 x 32
        """
        c = self.label(y)[:, None] + self.time(t)  # e_c + e_t: (B, 1, d)
        if self.config.N and e_s is None:
            c = c + self.S  # (B, 1, d)
        elif self.config.N:
            c = c + e_s  # (B, T, d)

        # Every block reads SiLU(c). Under autocast it is cast to bf16 here, once.
        silu_c = F.silu(c)
        global_S = self.W_g(silu_c)  # (B, 1 or T, 6d)
        silu_c = silu_c.to(global_S.dtype)

        x = self.patch_embed(patchify(x_t, self.config.p))  # (B, T, d)
        x = x.to(self.patch_embed.weight.dtype)  # blocks add to x in fp32, under autocast too
        for block in self.blocks:
            x = block(x, silu_c, global_S, self.cos, self.sin)
        return self.unpatchify(self.final(x, silu_c))

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of patchify: (B, T, p * p * C) -> (B, C, H, W)."""
        p = self.config.p
        side = self.config.latent_size // p
        x = x.reshape(len(x), side, side, p, p, self.config.latent_channels)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, side, p, side, p)
        return x.flatten(4, 5).flatten(2, 3)


# ---------------------------------------------------------------------------------- Tables 1 and 4


def count_parameters(config: Config) -> tuple[int, int]:
    """Table 1's last column: trainable parameters of (backbone, LEM)."""
    with torch.device("meta"):  # shapes without memory
        model = DoD(config)
    lem = sum(p.numel() for name, p in model.named_parameters() if name.startswith("lem."))
    return sum(p.numel() for p in model.parameters()) - lem, lem


def count_macs(config: Config, attention: bool = False) -> dict[str, int]:
    """Table 4's unit, which the paper calls FLOPs: multiply-accumulates of the linear layers, for
    one image, as PyTorch's own counter sees them in one call of a model without memory.

      s          one evaluation with c for each image (S in place of a prior)
      e_s        one evaluation with c for each token and, as the paper counts, the prior's MLP
      prior_mlp  that MLP alone: we run it once a stage
      lem        LEM, once a stage
    With `attention`, Q K^T and the product with V are counted, too; the paper leaves them out.
    """
    with torch.device("meta"):
        model = DoD(config)
        x = torch.empty(1, config.latent_channels, config.latent_size, config.latent_size)
        t = torch.ones(1)
        y = torch.zeros(1, dtype=torch.long)

    def count(function, *inputs):
        """-> the result of the call, and its multiply-accumulates."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            result = function(*inputs)
        flops = counter.get_flop_counts().get("Global", {})
        counted = sum(flops.values()) if attention else flops.get(torch.ops.aten.addmm, 0)
        return result, counted // 2  # two operations a multiply-accumulate

    # Stage 1, then LEM (whose output, of width d_l, is e_l) and its MLP, then a later stage.
    macs = {}
    _, macs["s"] = count(model, x, t, y)
    if config.N:
        e_l, macs["lem"] = count(model.lem, x)
        e_s, macs["prior_mlp"] = count(model.prior_mlp, e_l)
        _, evaluation = count(model, x, t, y, e_s)
        macs["e_s"] = evaluation + macs["prior_mlp"]
    return macs


def stage_macs(macs: dict[str, int], with_prior: float, without: float) -> float:
    """Multiply-accumulates of one stage of sampling; macs: those of count_macs.

    The network runs `with_prior` times with c for each token, and `without` times with c for each
    image, as the unconditional branch always does. LEM and the prior's MLP run once a stage.
    """
    total = without * macs["s"]
    if with_prior:
        total += macs["lem"] + macs["prior_mlp"]
        total += with_prior * (macs["e_s"] - macs["prior_mlp"])
    return total


def print_table_1() -> None:
    """Table 1 (FiTv2-B's count: Wang et al., 2024), and the cost of training by arithmetic: a step
    is three forward passes, attention included; half of the images run LEM. Memory: five fp32
    numbers a parameter (weight, gradient, EMA, AdamW's two moments), and no activations."""
    paper = {"DoD-S": "27 + 21", "DoD-B": "105 + 86", "DoD-XL": "527 + 86"}
    paper |= {"FiTv2-B": "128", "FiTv2-XL": "671"}
    print("Table 1: parameters, M                   | training: GFLOP   EFLOP,     GB")
    print("           backbone     LEM       paper  |       an image   1M x 256   held")
    for name, config in CONFIGS.items():
        backbone, lem = count_parameters(config)
        macs = count_macs(config, attention=True)
        forward = macs["s"]
        if config.N:
            forward = macs["e_s"] + (macs["lem"] - macs["prior_mlp"]) / 2
        flops = 3 * 2 * forward  # a multiply-accumulate is two operations
        print(
            f"{name:9}{backbone / 1e6:10.2f}{lem / 1e6:8.2f}{paper.get(name, '-'):>12}  |", end=""
        )
        print(f"{flops / 1e9:15.4g}{flops * 256e6 / 1e18:11.3g}{20e-9 * (backbone + lem):7.2f}")


def print_table_4() -> None:
    """Table 4's compute column. A guided step of stage 2 costs the paper 2 x 26.5, here less."""
    dod = count_macs(CONFIGS["DoD-B"])
    fit = count_macs(CONFIGS["FiTv2-B"])
    rows = [  # what, the paper's figure, ours
        ("LEM", 24.6, dod["lem"]),
        ("DoD-B, one evaluation, c per token", 26.5, dod["e_s"]),
        ("DoD-B, one evaluation, c per image", 26.5, dod["s"]),
        ("FiTv2-B, one evaluation", 27.3, fit["s"]),
    ]
    # Upper and lower half of the table: n steps in each of DoD's stages, 2 n for the baseline.
    for n, paper in ((30, (1638, 3276, 795, 2409.6)), (120, (6552, 13104, 3180, 9564.6))):
        stage_1 = stage_macs(dod, with_prior=0, without=n)
        stage_2 = stage_macs(dod, with_prior=n, without=n)  # guided: both branches in each step
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
