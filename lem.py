"""lem.py -- the Latent Embedding Module: where the visual prior comes from. Section 3.2, Eqs. 6-7.

An image that conditions its own generation must not say too much. If the diffusion model were
handed the whole latent, it would simply copy it. LEM is the bottleneck between the two: its encoder
reads all patches of a latent z_0 and writes what matters into N short vectors; its decoder unfolds
those vectors into one condition vector for each patch, which the backbone (model.py), after an
MLP, adds to its class and time embeddings.

    z_0 (B, C, H, W) --encode, Eq. 6--> L_hat (B, N, d_e) --decode, Eq. 7--> (B, T, d_l)

Both halves are plain vision transformers (Dosovitskiy et al., 2020). There is no reconstruction
loss: only the gradient of the rectified-flow loss (flow.py) teaches LEM what is worth keeping.

Shapes: B images, C channels, H x W latent, p patch size, T = (H/p)(W/p) tokens (Eq. 4 has another
T, the number of sampling steps), d_l width of LEM, N latent tokens of d_e numbers each.

    python lem.py        # shapes and compression for the paper's DoD-B
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def patchify(x: torch.Tensor, p: int) -> torch.Tensor:
    """Cuts latents (B, C, H, W) into T = (H/p)(W/p) patches, row by row -> (B, T, p * p * C)."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // p, p, W // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/p, p, p, C)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(x: torch.Tensor, p: int) -> torch.Tensor:
    """The inverse of patchify for square latents: (B, T, p * p * C) -> (B, C, H, W), H = W."""
    side = round(x.shape[1] ** 0.5)  # H/p = W/p
    x = x.unflatten(-1, (p, p, -1)).unflatten(1, (side, side))  # (B, H/p, W/p, p, p, C)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, H/p, p, W/p, p)
    return x.flatten(4, 5).flatten(2, 3)


def angles_2d(rows: int, columns: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The angles of RoPE and PE, position / 10000^(k/n) for k = 0 .. n-1: by row, and by column.

    -> two tensors (rows * columns, n), float64, in patchify's order. Sine-cosine embeddings
    (Vaswani et al., 2017) and rotary ones (Su et al., 2024; model.py) share these angles.
    """
    frequencies = 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return row.reshape(-1, 1) * frequencies, column.reshape(-1, 1) * frequencies


def sincos_2d(dim: int, rows: int, columns: int) -> torch.Tensor:
    """PE of Eqs. 6-7, the fixed 2-D sine-cosine position embedding -> (rows * columns, dim).

    CHOICE: the first half of the channels encodes the row, the second half the column; in MAE's and
    DiT's code the column comes first. `dim` must be a multiple of 4.
    """
    row, column = angles_2d(rows, columns, dim // 4)
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1).float()


class ViTBlock(nn.Module):
    """Pre-norm block of the original ViT: self-attention, then a GELU MLP four times as wide.

    CHOICE: epsilon is 1e-6 and there is no dropout; the paper says "standard vision transformers".
    """

    def __init__(self, d_l: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(d_l, eps=1e-6)
        self.qkv = nn.Linear(d_l, 3 * d_l)
        self.proj = nn.Linear(d_l, d_l)
        self.norm2 = nn.LayerNorm(d_l, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(d_l, 4 * d_l), nn.GELU(), nn.Linear(4 * d_l, d_l))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, d_l) -> (B, n, d_l) for a sequence of any length n."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, n, d_l / heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = attended.transpose(1, 2).flatten(2)  # (B, n, d_l)
        x = x + self.proj(attended)
        return x + self.mlp(self.norm2(x))


class LEM(nn.Module):
    """Latent Embedding Module: compresses z_0 into N x d_e numbers and unfolds them again.

    Eq. 6:  L_hat = Enc((e_p + PE) ⊕ L)        e_p: embedded patches of z_0, L: N learned tokens
    Eq. 7:  e_s   = Dec((M + PE) ⊕ L_hat)      M: one mask token; e_s: here without model.py's MLP

    The defaults are those of DoD-B (Table 1; for N and d_e see sections 4.2 and 3.3).
    latent_size is H = W, a multiple of p; d_l and d_e are multiples of 4, d_l also of heads.
    """

    def __init__(
        self, latent_size: int = 32, latent_channels: int = 4, p: int = 2, d_l: int = 768,
        heads: int = 12, encoder_depth: int = 8, decoder_depth: int = 4, N: int = 32, d_e: int = 16,
    ):  # fmt: skip
        super().__init__()
        side = latent_size // p
        self.p = p
        self.num_tokens = side * side

        # The encoder of Eq. 6. Its last layer is the bottleneck: d_l numbers become d_e.
        self.patch_embed = nn.Linear(p * p * latent_channels, d_l)
        self.latent_tokens = nn.Parameter(torch.randn(N, d_l) * 0.02)  # L
        self.encoder = nn.Sequential(*[ViTBlock(d_l, heads) for _ in range(encoder_depth)])
        # CHOICE: a LayerNorm ends encoder and decoder, as in ViT; the paper shows neither.
        self.encoder_norm = nn.LayerNorm(d_l, eps=1e-6)
        self.to_d_e = nn.Linear(d_l, d_e)

        # The decoder of Eq. 7. Its first layer brings the d_e numbers back to d_l.
        self.mask_token = nn.Parameter(torch.randn(d_e) * 0.02)  # M, shared by all patches
        self.from_d_e = nn.Linear(d_e, d_l)
        self.decoder = nn.Sequential(*[ViTBlock(d_l, heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(d_l, eps=1e-6)
        # CHOICE: LEM ends in a linear layer that the paper does not mention; Table 1's 86 M and
        # Table 4's 24.6 GFLOPs include it.
        self.head = nn.Linear(d_l, d_l)

        # The frozen PE in both widths. It is computed, so it is neither learned nor saved.
        self.register_buffer("pos_encoder", sincos_2d(d_l, side, side), persistent=False)
        self.register_buffer("pos_decoder", sincos_2d(d_e, side, side), persistent=False)

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Eq. 6, L_hat = Enc((e_p + PE) ⊕ L): (B, C, H, W) latents -> (B, N, d_e) latent tokens."""
        patches = self.patch_embed(patchify(z, self.p)) + self.pos_encoder  # (B, T, d_l)
        tokens = self.latent_tokens.expand(len(z), -1, -1).to(patches.dtype)  # (B, N, d_l)
        x = self.encoder(torch.cat([patches, tokens], dim=1))  # (B, T + N, d_l)

        # Only the latent tokens leave the encoder. What they do not hold is lost.
        x = x[:, self.num_tokens :]  # (B, N, d_l)
        return self.to_d_e(self.encoder_norm(x))

    def decode(self, l_hat: torch.Tensor) -> torch.Tensor:
        """Eq. 7, e_s = Dec((M + PE) ⊕ L_hat): (B, N, d_e) latent tokens -> (B, T, d_l)."""
        mask = (self.mask_token + self.pos_decoder).expand(len(l_hat), -1, -1)  # (B, T, d_e)
        x = self.from_d_e(torch.cat([mask.to(l_hat.dtype), l_hat], dim=1))  # (B, T + N, d_l)

        # Under autocast the linear layer above answers in bf16. Blocks add to their input, and
        # sums of many small terms need fp32, the type of the weights and so of the mask.
        x = self.decoder(x.to(mask.dtype))

        # Only the patches leave the decoder: one condition vector for each token of the backbone.
        x = x[:, : self.num_tokens]  # (B, T, d_l)
        return self.head(self.decoder_norm(x))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """LEM(z_0) of Eq. 5: latents (B, C, H, W) -> (B, T, d_l), one condition vector a patch."""
        return self.decode(self.encode(z))


class Patches(nn.Module):
    """What LEM replaces: "directly using the generated latents as conditions" (section 1).

    Every patch reaches the backbone whole, so the model learns to copy its prior, and stage 2 only
    repeats stage 1 (`train.py --prior-from patches`). As with LEM, the output has width d_l and the
    backbone's MLP follows. latent_channels is C, p the side of a patch.
    """

    def __init__(self, latent_channels: int, p: int, d_l: int):
        super().__init__()
        self.p = p
        self.embed = nn.Linear(p * p * latent_channels, d_l)

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) -> their patches (B, T, p * p * C): nothing is left out."""
        return patchify(z, self.p)

    def decode(self, l_hat: torch.Tensor) -> torch.Tensor:
        """What `encode` returned -> (B, T, d_l)."""
        return self.embed(l_hat)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) -> (B, T, d_l)."""
        return self.decode(self.encode(z))


class Means(Patches):
    """A bottleneck that learns nothing: the mean of each patch, that is, the latent shrunk by p.
    It passes T * C numbers. `--prior-from means` asks whether a bottleneck must be learned."""

    def __init__(self, latent_channels: int, p: int, d_l: int):
        super().__init__(latent_channels, 1, d_l)  # to the linear layer, a mean is a 1 x 1 patch
        self.p = p

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) -> the mean of each patch (B, T, C)."""
        return F.avg_pool2d(z, self.p).flatten(2).transpose(1, 2).contiguous()


def main() -> None:
    """Follows one latent of DoD-B through the bottleneck and prints the shapes."""
    lem = LEM()
    z = torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        l_hat = lem.encode(z)
        e_s = lem.decode(l_hat)
    parameters = sum(p.numel() for p in lem.parameters())
    print(f"Latent Embedding Module of DoD-B: {parameters / 1e6:.2f} M parameters (Table 1: 86)")
    print(f"  z_0    {tuple(z.shape)!s:18} {z.numel():7,} numbers   a 256 x 256 image's latent")
    print(f"  L_hat  {tuple(l_hat.shape)!s:18} {l_hat.numel():7,} numbers   Eq. 6: all that passes")
    print(f"  e_s    {tuple(e_s.shape)!s:18} {e_s.numel():7,} numbers   Eq. 7: a vector per patch")
    print(f"  compression {z.numel() // l_hat.numel()} : 1")


if __name__ == "__main__":
    main()
