"""model.py -- the FiTv2 backbone and DoD around it. Section 3.2, appendix A.1, Eqs. 5 and 8-10.

The backbone is a diffusion transformer (DiT) with 2-D rotary positions, normalised queries and
keys, a SwiGLU feed-forward network and AdaLN-LoRA modulation. It maps a noisy latent x_t, its time
t and its class y to the velocity v = x_1 - x_0 of the rectified flow (flow.py). All that DoD adds
is one more summand in the condition c: the visual prior e_s, one vector for each token, or in its
place the learned sample token S.

Time runs from data to noise: t = 0 is data, t = 1 is noise.

Shapes: B images, C channels, H x W latent, p patch size, T = (H/p)(W/p) tokens, d width, r LoRA
rank, K classes (index K is the null class of classifier-free guidance).

    python model.py      # Table 1, Table 4's compute column (ours and the paper's), our budget
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lem import LEM, Patches, patchify


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
    # One angle for each token and channel pair: (side * side, head_dim / 2).
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
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, T, d_k)

        # Queries and keys go through LayerNorm and rotation together, which halves the number of
        # kernels. Both run in fp32 under autocast; the attention kernel wants the values' dtype.
        q, k = rotate(layer_norm(qkv[:2]), cos, sin).to(qkv.dtype)
        attended = F.scaled_dot_product_attention(q, k, qkv[2])  # (B, heads, T, d_k)
        return self.proj(attended.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Eq. 8: FFN(x) = (SiLU(x W_1) ⊗ (x W_2)) W_3.

    CHOICE: the hidden width, which the paper leaves open, is 8d/3: the three matrices then hold as
    many parameters as the usual two of width 4d (Shazeer, 2020).
    DEVIATION: Eq. 8 prints no biases; FiTv2 has them.
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
    """All that fixes the shapes of the parameters, and the default guidance scale.

    Raises UserError for sizes that do not fit together.
    """

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
    prior_from: str = "lem"  # "patches": no compression, what section 1 warns of

    def __post_init__(self):
        if self.prior_from not in ("lem", "patches"):
            raise UserError(f"prior_from is {self.prior_from!r}; it must be 'lem' or 'patches'")

        # A checkpoint's config comes from outside, so numbers are checked to be numbers.
        for name, value in vars(self).items():
            if name in ("cfg", "prior_from"):
                continue
            low = 0 if name == "N" else 1
            if type(value) is not int or value < low:
                raise UserError(f"{name} is {value!r}; it must be a whole number, at least {low}")
        if type(self.cfg) not in (int, float) or not self.cfg >= 1:
            raise UserError(f"cfg is {self.cfg!r}; it must be at least 1 (1 = no guidance)")

        if self.latent_size % self.p:
            raise UserError(
                f"latent size {self.latent_size} is not a multiple of the patch size {self.p}; "
                "change --image-size or --patch-size"
            )
        # 2-D RoPE takes a head's channels in fours: a pair for the row, a pair for the column. The
        # 2-D PE takes a token's channels in fours: sine and cosine of the row and of the column.
        multiples = [("d", self.d, 4 * self.heads)]
        if self.N:
            multiples.append(("d_l", self.d_l, self.lem_heads))
            multiples.append(("d_l", self.d_l, 4))
            multiples.append(("d_e", self.d_e, 4))
        for name, width, unit in multiples:
            if width % unit:
                raise UserError(f"{name} is {width}; it must be a multiple of {unit}")

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
    # CHOICE: not in the paper. The same geometry, 16 times smaller: as many numbers in a latent
    # token as in a patch (16), and an eighth as many latent tokens as patches.
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

    This S^i is not the sample token S of Eq. 5: the paper uses the letter twice. W^g is shared by
    all blocks, and W^g c arrives as `global_S`; each block adds its own low-rank part.
    beta shifts, gamma scales, alpha gates. DEVIATION: Eq. 10 omits the SiLU on c (and, as the paper
    says itself, the biases).
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
        self.grad_checkpoint = False  # activation checkpointing of the backbone's blocks

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
        if config.N and config.prior_from == "patches":
            self.lem = Patches(config.latent_channels, config.p, d)
            self.prior_mlp = nn.Identity()
        elif config.N:
            self.lem = LEM(
                config.latent_size, config.latent_channels, config.p, config.d_l, config.lem_heads,
                config.encoder_depth, config.decoder_depth, config.N, config.d_e,
            )  # fmt: skip
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
        """The label that stands for "no class"."""
        return self.config.num_classes

    def visual_prior(self, z0: torch.Tensor) -> torch.Tensor:
        """e_s = LEM(z_0) of Eq. 5, brought to the backbone's width: (B, C, H, W) -> (B, T, d).

        It does not depend on t: compute it once a stage, not once an evaluation. From here on, e_s
        means this one, of the backbone's width.
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

        x_t (B, C, H, W); t (B,) in [0, 1]; y (B,) in 0 .. K, where K is the null class; e_s
        (B, T, d) -> (B, C, H, W). With S, c is one vector for each image, and the modulations are
        computed once for each image; with e_s, c is one vector for each token. Blocks broadcast.
        """
        c = self.label(y)[:, None] + self.time(t)  # e_c + e_t: (B, 1, d)
        if self.config.N and e_s is None:
            c = c + self.S  # (B, 1, d)
        elif self.config.N:
            c = c + e_s  # (B, T, d)

        # Every block reads SiLU(c). Under autocast it is cast here, once, and not in each block.
        silu_c = F.silu(c)
        global_S = self.W_g(silu_c)  # (B, 1 or T, 6d)
        silu_c = silu_c.to(global_S.dtype)

        x = self.patch_embed(patchify(x_t, self.config.p))  # (B, T, d)
        x = x.to(self.patch_embed.weight.dtype)  # the residual stream is fp32, under autocast too

        # Activation checkpointing keeps only the input of each block and computes the rest again in
        # the backward pass.
        for block in self.blocks:
            inputs = (x, silu_c, global_S, self.cos, self.sin)
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
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
    lem = 0
    if config.N:
        lem = sum(p.numel() for p in model.lem.parameters())
    return sum(p.numel() for p in model.parameters()) - lem, lem


def count_macs(config: Config) -> dict[str, int]:
    """Table 4's unit: multiply-accumulates of the linear layers, for one image.

    PyTorch's own counter watches one call of a model without memory.
      s          one evaluation with c for each image (S in place of a prior)
      e_s        one evaluation with c for each token and, as the paper counts, the prior's MLP
      prior_mlp  that MLP alone: we run it once a stage
      lem        LEM, once a stage
      attention  left out of all these: Q K^T and the product with V, in each evaluation
      lem_attention   the same in LEM
    """
    # One image. On the meta device tensors have shapes but no memory.
    with torch.device("meta"):
        model = DoD(config)
        x = torch.empty(1, config.latent_channels, config.latent_size, config.latent_size)
        t = torch.ones(1)
        y = torch.zeros(1, dtype=torch.long)

    def count(function, *inputs):
        """-> the result of the call, its MACs in linear layers, its MACs in attention."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            result = function(*inputs)
        flops = dict(counter.get_flop_counts().get("Global", {}))
        linear = flops.pop(torch.ops.aten.addmm, 0)
        return result, linear // 2, sum(flops.values()) // 2  # two operations a MAC

    # Stage 1, then LEM and its MLP, then a later stage. `e_l` is LEM's output, of width d_l.
    counts = {}
    _, counts["s"], counts["attention"] = count(model, x, t, y)
    counts["lem_attention"] = 0
    if config.N:
        e_l, counts["lem"], counts["lem_attention"] = count(model.lem, x)
        e_s, counts["prior_mlp"], _ = count(model.prior_mlp, e_l)
        _, evaluation, _ = count(model, x, t, y, e_s)
        counts["e_s"] = evaluation + counts["prior_mlp"]
    return counts


def stage_parts(evaluations: float, guided: float, has_prior: bool) -> dict[str, float]:
    """How often one stage of sampling runs each part of count_macs.

    evaluations: of the velocity; guided: how many of them run the unconditional branch as well,
    which sees S in place of a prior. Table 4 counts the prior's MLP in every evaluation; here it
    runs once a stage.
    """
    if not has_prior:
        return {"s": evaluations + guided}
    # Each "e_s" contains the prior's MLP: take it out of all of them, and add the one that runs.
    return {"lem": 1, "e_s": evaluations, "prior_mlp": 1 - evaluations, "s": guided}


def training_macs(config: Config, p_s: float = 0.5) -> dict[str, float]:
    """Multiply-accumulates of a training step's forward pass, for one image.

    ours: LEM on the images that keep their prior, a share of 1 - p_s; the backbone with c for each
    token.
    naive: LEM on every image. attention: left out of both.
    """
    macs = count_macs(config)
    if not config.N:
        return {"ours": macs["s"], "naive": macs["s"], "attention": macs["attention"]}
    with_prior = macs["lem"] + macs["prior_mlp"]
    backbone = macs["e_s"] - macs["prior_mlp"]
    return {
        "ours": backbone + (1 - p_s) * with_prior,
        "naive": backbone + with_prior,
        "attention": macs["attention"] + (1 - p_s) * macs["lem_attention"],
    }


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
    dod = count_macs(CONFIGS["DoD-B"])
    fit = count_macs(CONFIGS["FiTv2-B"])
    rows = [  # what, GFLOPs in the paper, ours: whose parts, and how often each of them runs
        ("LEM", 24.6, dod, {"lem": 1}),
        ("DoD-B, one evaluation, c per token", 26.5, dod, {"e_s": 1}),
        ("DoD-B, one evaluation, c per image", 26.5, dod, {"s": 1}),
        ("FiTv2-B, one evaluation", 27.3, fit, {"s": 1}),
    ]
    # Upper and lower half of the table: n steps in each of DoD's stages, 2 n for the baseline.
    for n, paper in ((30, (1638, 3276, 795, 2409.6)), (120, (6552, 13104, 3180, 9564.6))):
        stage_1 = stage_parts(n, 0, has_prior=False)
        stage_2 = stage_parts(n, n, has_prior=True)
        both = stage_2 | {"s": stage_1["s"] + stage_2["s"]}
        rows += [
            (f"FiTv2-B, {2 * n} steps", paper[0], fit, stage_parts(2 * n, 0, has_prior=False)),
            (f"FiTv2-B-G, {2 * n} steps", paper[1], fit, stage_parts(2 * n, 2 * n, False)),
            (f"DoD-B (S1), {n} steps", paper[2], dod, stage_1),
            (f"DoD-B-G (S2), {n} + {n} steps", paper[3], dod, both),
        ]
    print(
        "\nTable 4: compute. GFLOPs as the paper counts them: 10^9 multiply-accumulates of linear"
    )
    print("layers                                     paper      ours    ours with attention")
    # Each row adds up its parts. Attention is not in the paper's figures, so it is shown apart.
    for what, paper, counts, parts in rows:
        linear = sum(times * counts[part] for part, times in parts.items())
        attention = (parts.get("s", 0) + parts.get("e_s", 0)) * counts["attention"]
        attention += parts.get("lem", 0) * counts["lem_attention"]
        print(f"  {what:38}{paper:7.1f}{linear / 1e9:10.1f}{(linear + attention) / 1e9:18.1f}")


def print_budget() -> None:
    """What training costs by arithmetic, attention included: a step is three forward passes, two
    operations a multiply-accumulate. Memory: fp32 weights, gradient, EMA and AdamW's two moments.
    """
    print("\nTraining, by arithmetic, p_s = 0.5: GMACs of linear layers in one forward pass, then")
    print("                    GMACs    naive   GFLOP/image   EFLOP, 1M x 256   GB held   GB saved")
    for name, config in CONFIGS.items():
        macs = training_macs(config)
        # Bytes per parameter: 4 each for weights, gradient, EMA and two moments makes 20; a
        # checkpoint has no gradient, which leaves 16.
        flops = 3 * 2 * (macs["ours"] + macs["attention"])
        parameters = sum(count_parameters(config)) / 1e9
        print(f"  {name:14}{macs['ours'] / 1e9:9.4g}{macs['naive'] / 1e9:9.4g}", end="")
        print(f"{flops / 1e9:14.4g}{flops * 256e6 / 1e18:18.3g}", end="")
        print(f"{20 * parameters:10.2f}{16 * parameters:11.2f}")


if __name__ == "__main__":
    print_table_1()
    print_table_4()
    print_budget()
