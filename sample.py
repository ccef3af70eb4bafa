"""sample.py -- multi-stage sampling, its codec, checkpoints, grids and sets. Section 3.2, Fig. 3a.

    stage 1   z_0^1 from noise, given the class                           Eq. 5, i = 1: S, no prior
    stage i   z_0^i from fresh noise, given the class and LEM(z_0^(i-1))  Eq. 5, i > 1; guided

Each stage is a complete run of the same model from t = 1 (noise) to t = 0 (data). The noise of an
image is a function of (seed, image number, stage), and the solver treats each image alone. So image
n is the same for any batch size and any number of GPUs, up to floating-point order.

Shapes: B images, C channels, H x W latent, K classes; pictures: uint8 (B, channels, rows, columns).

    python sample.py                                       # letters, from the weights in assets/
    python sample.py --ckpt out/letters/ckpt.pt --classes A-J --stages 3 --out grid.png
    python sample.py --prior mine.png,yours.png --out variations.png
    torchrun --nproc-per-node 8 sample.py --ckpt ckpt.pt --npz samples.npz      # 50,000, for FID
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from flow import dopri5, euler, guide
from model import Config, DoD, UserError

# -------------------------------------------------------------------- multi-stage sampling: Fig. 3a


def noise(shape: tuple[int, ...], seed: int, numbers: range, stage: int) -> torch.Tensor:
    """z_1^i: standard normal (len(numbers), *shape); image n is a function of (seed, n, stage).

    `stage` counts from 0, as i - 1. NumPy draws on the CPU: the noise is the same on any device.
    """
    images = []
    for n in numbers:
        # The 2 keeps these streams apart from the others of a seed: 0 and 1 in train.py, 3 below.
        rng = np.random.default_rng((seed, 2, n, stage))
        images.append(rng.standard_normal(shape, np.float32))
    return torch.from_numpy(np.stack(images))


def sample_stage(
    model: DoD,
    z1: torch.Tensor,
    y: torch.Tensor,
    e_s: torch.Tensor | None,
    w: float,
    guide_on: str = "both",
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    solver: str = "dopri5",
    steps: int = 50,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One stage of Fig. 3a, Eq. 4: noise z1 (B, C, H, W) -> sample z0, of the same shape.

    y (B,) classes; e_s (B, T, d) visual prior, or None (S). With guidance, w > 1, an evaluation
    runs the network twice, and the unconditional branch has one condition vector for each image,
    which is cheaper. Also returns the evaluations of each image and how many were guided, (B,).
    """
    # CHOICE: the paper does not say what the unconditional branch drops. Ours drops both class and
    # prior, v_u = v(null class, S); with guide_on = "prior" the prior alone, v_u = v(class, S).
    y_u = torch.full_like(y, model.null_class)
    if guide_on == "prior" and e_s is not None:
        y_u = y
    guided = torch.zeros_like(y)

    def velocity(x, t, rows):
        # RK45 drops images that have finished: `rows` are those that are left.
        e_s_left = None if e_s is None else e_s[rows]
        v = model(x, t, y[rows], e_s_left).to(x.dtype)  # v_c, the conditional branch
        if w == 1:
            return v

        # All images are guided or, with an interval of times (Kynkäänniemi et al., 2024), those
        # inside it; for the others one evaluation is enough. Only an interval waits for the GPU.
        inside = torch.arange(len(x), device=x.device)
        if interval != (0.0, 1.0):
            inside = inside[(interval[0] <= t) & (t <= interval[1])]
        if len(inside):
            v_u = model(x[inside], t[inside], y_u[rows[inside]]).to(x.dtype)
            v[inside] = guide(v[inside], v_u, w, channels)
            guided[rows[inside]] += 1
        return v

    # Section 3.3 samples with dopri5; Table 4, which counts compute, with Euler's method.
    if solver == "euler":
        z0, nfe = euler(velocity, z1, steps)
    else:
        z0, nfe = dopri5(velocity, z1)
    return z0, nfe, guided


@torch.no_grad()
def generate(
    model: DoD,
    y: torch.Tensor,
    stages: int = 2,
    cfg: float | list[float] | None = None,
    guide_on: str = "both",
    cfg_channels: int | None = None,
    cfg_interval: tuple[float, float] = (0.0, 1.0),
    solver: str = "dopri5",
    steps: int = 50,
    seed: int = 0,
    start: int = 0,
    prior: torch.Tensor | None = None,
    batch_size: int = 256,
    progress: bool = False,
    nfe: list | None = None,
) -> list[torch.Tensor]:
    """Multi-stage sampling (section 3.2): classes y (B,) -> [z_0^1, ..., z_0^stages], (B, C, H, W).

    cfg           guidance scale w >= 1: one for each stage, or one number for all stages that have
                  a prior (the others then use 1, which is off); None: the model's own
    guide_on      what the unconditional branch drops: "both" class and prior, or the "prior" alone;
                  where there is no prior, always the class
    cfg_channels  guide the first channels only; None: all
    cfg_interval  guide only at times t inside (low, high)
    solver        "dopri5" (adaptive, image by image) or "euler" (`steps` steps)
    seed, start   image b is image number start + b of this seed
    prior         (B, C, H, W) latents that take the place of a previous stage's samples in stage 1
    nfe           a list; each stage appends (B, 2): evaluations of each image, and how many of them
                  were guided
    Raises UserError for a guidance scale below 1, a wrong number of scales, a prior without LEM or
    class guidance of a model with a single class; FloatingPointError if a sample is not finite.
    """
    config = model.config

    # Section 3.3: no guidance in the first stage, strong guidance wherever there is a prior.
    w = config.cfg if cfg is None else cfg
    if not isinstance(w, list):
        w = [w] * stages
        if prior is None:
            w[0] = 1.0
    if (stages > 1 or prior is not None) and not config.N:
        raise UserError("this model is a plain FiTv2 without LEM: it has stage 1 only")
    if len(w) != stages or not all(scale >= 1 for scale in w):
        raise UserError(f"guidance {w} for {stages} stages; each stage needs one w >= 1 (1: off)")

    # With a single class there is nothing to drop but the prior.
    if config.num_classes == 1:
        guide_on = "prior"
        if prior is None and w[0] > 1:
            raise UserError("this model knows one class only: stage 1 has nothing to be guided by")

    # Images go through all stages in groups of batch_size.
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    samples = [[] for _ in range(stages)]
    evaluations = [[] for _ in range(stages)]
    hidden = None if progress else True  # None: shown on a terminal only
    bar = tqdm(total=len(y) * stages, desc="sampling", disable=hidden, leave=False)
    for offset in range(0, len(y), batch_size):
        group = slice(offset, offset + batch_size)
        numbers = range(start + offset, start + offset + len(y[group]))
        z0 = None if prior is None else prior[group].to(y.device)

        # Fig. 3a: what a stage has drawn becomes the visual prior of the next one. The noise is
        # fresh in each stage, so nothing but e_s passes from one to the next.
        for i in range(stages):
            z1 = noise(shape, seed, numbers, i).to(y.device)
            e_s = None if z0 is None else model.visual_prior(z0)  # once a stage
            z0, spent, guided = sample_stage(
                model, z1, y[group], e_s, w[i], guide_on, cfg_channels, cfg_interval, solver, steps
            )

            # Kept for the caller: every stage's samples, and what they cost.
            samples[i].append(z0)
            evaluations[i].append(torch.stack([spent, guided.cpu()], dim=1))
            bar.update(len(z0))

        # A sample that is not finite spoils its later stages, so looking at the last is enough.
        if not torch.isfinite(z0).all():
            raise FloatingPointError("a sample is not finite; the weights or the guidance are off")
    bar.close()

    # For each stage, the groups are joined again.
    if nfe is not None:
        nfe.extend(torch.cat(parts) for parts in evaluations)
    return [torch.cat(parts) for parts in samples]


# -------------------------------------------------------------------------------------------- grids


def draw_grid(blocks: list[tuple[str, torch.Tensor]], titles: list[str]) -> Image.Image:
    """Pictures in labelled blocks of rows, as in Fig. 5: a block for each stage, a column a title.

    blocks: (label, uint8 (n, channels, rows, columns)), n a multiple of len(titles), row by row.
    Small pictures are enlarged, without smoothing, by a whole factor to at least 64 pixels.
    """
    # Sizes: a cell is an enlarged picture with a margin of 4 pixels.
    height, width = blocks[0][1].shape[-2:]
    zoom = max(1, math.ceil(64 / width))
    cell_width = width * zoom + 4
    cell_height = height * zoom + 4
    font = ImageFont.load_default(size=max(12, min(24, cell_height // 5)))

    # The labels stand left of the pictures; the longest of their lines fixes that margin.
    lines = "\n".join(label for label, _ in blocks).split("\n")
    left = 16 + round(max(font.getlength(line) for line in lines))
    top = 36

    # The titles stand above them, and a gap of 12 pixels ends each block.
    rows = sum(len(images) // len(titles) for _, images in blocks)
    size = (left + len(titles) * cell_width, top + rows * cell_height + 12 * len(blocks))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)

    # Titles above the columns, cut to their width.
    for column, title in enumerate(titles):
        while font.getlength(title) > cell_width:
            title = title[:-1]
        draw.text((left + (column + 0.5) * cell_width, top / 2), title, "black", font, anchor="mm")

    # The blocks, each with its label beside it.
    for label, images in blocks:
        draw.multiline_text((8, top), label, "black", font)
        for i, image in enumerate(images.cpu()):
            row, column = divmod(i, len(titles))
            rgb = image.expand(3, -1, -1).permute(1, 2, 0)  # grey becomes RGB
            tile = Image.fromarray(rgb.numpy())
            tile = tile.resize((width * zoom, height * zoom), Image.NEAREST)
            canvas.paste(tile, (left + column * cell_width, top + row * cell_height))
        top += len(images) // len(titles) * cell_height + 12
    return canvas


# ----------------------------------------------------------------------------- pictures <-> latents


def open_picture(path: Path) -> Image.Image:
    """A picture file -> the picture. Raises UserError that names an unreadable one.

    CHOICE: it is turned as its EXIF data says; ADM's code does not look at them.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I;16"):  # 16-bit grey, which convert() would clip at 255
            image = Image.fromarray((np.array(image) // 257).astype(np.uint8))
        return image
    except Exception as error:  # Pillow raises a dozen kinds for broken files
        raise UserError(f"{path} is not a readable picture ({error})") from None


def fit_picture(image: Image.Image, size: int, channels: int) -> torch.Tensor:
    """-> uint8 (channels, size, size), grey for 1 channel, RGB for 3: the square in the middle.

    Like ADM, halves the picture by a box filter while it is at least twice too large, then resizes
    it bicubically. CHOICE: it is cropped before resizing and not after, which saves the memory that
    a long, thin picture would need.
    """
    # The square in the middle, grey or RGB.
    mode = {1: "L", 3: "RGB"}[channels]
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).convert(mode)

    # Halving ends below twice the wanted size; bicubic resizing does the rest.
    while image.width >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    image = image.resize((size, size), Image.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).reshape(size, size, channels)
    return pixels.permute(2, 0, 1).contiguous()


class Codec:
    """Pictures <-> latents. This one works in pixel space: the latent is the picture in [-1, 1]."""

    name = "none"
    fingerprint = "none"  # of the latent space, wherever the VAE's files are
    scale = 1.0

    def latent_shape(self, channels: int, size: int) -> tuple[int, int]:
        """Channels and side of the latents of square pictures. UserError if they do not fit."""
        return channels, size

    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (B, channels, height, width) -> mean and standard deviation, both (B, C, H, W), of
        the latent's distribution given the picture, in fp32."""
        mean = images.float() / 127.5 - 1

        # In pixel space a picture has exactly one latent: nothing is left to chance.
        return mean, torch.zeros_like(mean)

    def encode(self, images: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """The mean, or with standard normal eps (B, C, H, W) a sample of that distribution."""
        mean, std = self.moments(images)
        if eps is None:
            return mean
        return mean + std * eps

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """float (B, C, H, W) -> uint8 (B, channels, height, width); the inverse of encode."""
        # 128 = 127.5 + 0.5: byte() cuts off the fraction, and the half makes it round.
        return (127.5 * latents.float() + 128).clamp(0, 255).byte()


class VAE(Codec):
    """Stable Diffusion's VAE (section 3.3), diffusers' AutoencoderKL, 32 pictures at a time.

    256 x 256 x 3 pictures <-> 32 x 32 x 4 latents, multiplied by the VAE's own scaling factor.
    CHOICE: the paper does not say which version of the VAE; the README's recipe uses ft-EMA.
    CHOICE: on a GPU pictures are encoded in bf16; latents are decoded in true fp32, as in SiT.
    """

    def __init__(self, name: str, device: torch.device):
        self.name = name
        # A folder is known by its full path, so that a checkpoint finds it from anywhere. Without
        # such a folder, only OWNER/NAME can be the name of a VAE on the hub.
        if Path(name).is_dir():
            self.name = str(Path(name).resolve())
        elif name.count("/") != 1 or name.startswith((".", "/")):
            raise UserError(f"--vae {name}: there is no such folder; save_pretrained makes one")

        # Everything that can go wrong here is the user's to mend: package, network, name, files.
        try:
            import diffusers

            diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
            if not Path(name).is_dir():
                self.find_on_the_hub(name)
            vae = diffusers.AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False)
            self.scale = float(vae.config.scaling_factor)
            self.shift = float(vae.config.get("shift_factor") or 0)
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            advice = "give a name on the Hugging Face Hub or a folder made by save_pretrained"
            raise UserError(f"VAE {name} cannot be loaded ({reason}); {advice}") from None

        # The encoder defines the latent space, and its first layer identifies the encoder.
        # (ft-EMA and ft-MSE share the encoder; only their decoders differ.)
        weights = vae.encoder.conv_in.weight.detach().numpy().tobytes()
        self.fingerprint = hashlib.sha256(weights).hexdigest()
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.channels = vae.config.latent_channels
        # Every level of the VAE but the last one halves height and width.
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @staticmethod
    def find_on_the_hub(name: str) -> None:
        """Raises OSError at once, without the hub's many retries, if the hub is out of reach."""
        from huggingface_hub import constants, try_to_load_from_cache

        # Whatever is in the cache needs no network.
        if try_to_load_from_cache(name, "config.json") is None:
            urllib.request.urlopen(f"{constants.ENDPOINT}/{name}", timeout=10).close()

    def latent_shape(self, channels: int, size: int) -> tuple[int, int]:
        if channels != 3 or size % self.factor:
            need = f"3 channels and a multiple of {self.factor} pixels"
            raise UserError(f"{channels} channels of {size} pixels; VAE {self.name} needs {need}")
        return self.channels, size // self.factor

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The scaling factor brings latents to a standard deviation near 1, that of the noise.
        means = []
        stds = []
        device = self.vae.device
        for part in images.split(32):
            pixels = part.to(device) / 127.5 - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                posterior = self.vae.encode(pixels).latent_dist
            means.append(self.scale * (posterior.mean.float() - self.shift))
            stds.append(self.scale * posterior.std.float())
        return torch.cat(means), torch.cat(stds)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pictures = []
        for part in latents.split(32):
            with true_fp32(self.vae.device):
                z = part.to(self.vae.device).float() / self.scale + self.shift
                pictures.append(super().decode(self.vae.decode(z).sample))
        return torch.cat(pictures)


@contextmanager
def true_fp32(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 inside: for networks whose output is measured or looked at."""
    # TF32 has two switches: one for matrix products, one for cuDNN's convolutions.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    no_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    try:
        with torch.autocast(device.type, enabled=False), no_tf32:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def load_codec(name: str, device: torch.device | str = "cpu") -> Codec:
    """The codec that --vae or a checkpoint names; "none" is pixel space. Raises UserError."""
    if name == "none":
        return Codec()
    return VAE(name, torch.device(device))


def codec_of(checkpoint: dict, vae: str | None, device: torch.device) -> Codec:
    """The codec of a checkpoint, or the one that --vae names. UserError if latents do not fit."""
    try:
        codec = load_codec(vae or checkpoint["codec"], device)
        shape = codec.latent_shape(checkpoint["channels"], checkpoint["image_size"])
    except UserError as error:
        raise UserError(f"{error}; --vae says where the checkpoint's VAE is now") from None

    # Latents of another VAE may have the same shape and mean something else, so its fingerprint
    # must agree as well.
    config = checkpoint["config"]
    wanted = (config["latent_channels"], config["latent_size"])
    if shape != wanted or codec.fingerprint != checkpoint.get("vae", "none"):
        trained = (
            f"trained on latents of {checkpoint['codec']}, {wanted[0]} x {wanted[1]} x {wanted[1]}"
        )
        raise UserError(f"the model was {trained}; --vae {codec.name} has another latent space")
    return codec


# -------------------------------------------------------------------------------------- checkpoints

SHIPPED = Path(__file__).parent / "assets/letters.pt"  # EMA weights trained on letters

# The entries that every checkpoint has, and their types. train.py adds what resuming needs.
ENTRIES = {"step": int, "ema": dict, "config": dict, "classes": list, "codec": str}
ENTRIES |= {"image_size": int, "channels": int, "data": str, "fingerprint": str, "held_out": float}
# What sampling can do without; exported weights leave it out.
TRAINING_ONLY = ("model", "optimizer", "scaler")


def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint of train.py: a plain dict of tensors, numbers, strings and lists.

    weights_only=True: a pickle that carries code is refused, and nothing in it runs. Everything
    that is used is checked here, before it is used. Raises UserError that names file and reason.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; train.py makes one") from None
    except Exception as error:  # a folder, a bad zip, a bad pickle, code in a pickle, ...
        raise UserError(f"{path} is not a whole checkpoint: {type(error).__name__}") from None
    try:
        check_checkpoint(checkpoint)
    except (UserError, TypeError) as error:
        raise UserError(f"{path} is not a checkpoint of this train.py: {error}") from None
    return checkpoint


def check_checkpoint(checkpoint: dict) -> None:
    """Raises UserError or TypeError with the first thing that is wrong in a checkpoint."""
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != "dod-2":
        raise UserError('its format is not "dod-2"')
    for name, kind in ENTRIES.items():
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"its entry {name!r} is missing, or not a {kind.__name__}")

    # Config refuses sizes that do not fit together. A damaged file may still ask for more than
    # any memory holds, here in tokens and further down in layers.
    config = Config(**checkpoint["config"])
    if [type(name) for name in checkpoint["classes"]] != [str] * config.num_classes:
        raise UserError(f"its class names are not {config.num_classes} strings")
    if checkpoint["step"] < 0 or config.num_tokens > 2**16:
        raise UserError(f"its step is {checkpoint['step']}, its tokens are {config.num_tokens}")

    weights = checkpoint["ema"]
    if config.depth + config.encoder_depth + config.decoder_depth > 100 + len(weights):
        raise UserError("its config has more layers than there are weights")
    for name, x in weights.items():
        dense = isinstance(x, torch.Tensor) and x.layout == torch.strided
        if not (dense and x.is_floating_point()):
            raise UserError(f"its weights {name!r} are not a dense tensor of real numbers")

    # The weights must fit the config. A model on the meta device has shapes, but takes no memory.
    try:
        with torch.device("meta"):
            model = DoD(config)
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"its weights do not fit its config ({str(error)[:200]})") from None


def export(args: argparse.Namespace, checkpoint: dict) -> None:
    """--export: the EMA weights alone, in fp16, with all that sampling and evaluating need."""
    small = {key: value for key, value in checkpoint.items() if key not in TRAINING_ONLY}
    # fp16 halves the file; load_model copies it into fp32 weights again.
    small["ema"] = {key: weights.half() for key, weights in checkpoint["ema"].items()}
    with replacing(args.export, args.overwrite) as temporary:
        torch.save(small, temporary)
    print(f"wrote {args.export}: {Path(args.export).stat().st_size / 1e6:.1f} MB")


def load_model(checkpoint: dict, device: torch.device | str = "cpu") -> DoD:
    """The EMA model of a checkpoint, ready to sample from, in fp32."""
    model = DoD(Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["ema"])
    # Its weights keep requiring gradients: autocast casts such weights once, others at every use.
    return model.to(device).eval()


# -------------------------------------------------------------------------- samples by the thousand


def class_of_picture(n: int, classes: list[int], how: str, seed: int) -> int:
    """The class of picture n of a set: each class in turn, or a random one by (seed, n).

    CHOICE: sets have random labels unless told otherwise, as with SiT, FiTv2, DiT and ADM. The same
    number of each class probably gives a lower FID.
    """
    # Known from n alone, so that ranks and interrupted runs agree on it without a list.
    if how == "balanced":
        return classes[n % len(classes)]
    return classes[np.random.default_rng((seed, 3, n)).integers(len(classes))]


def sample_set(args, model: DoD, codec: Codec, about: dict, settings: dict) -> None:
    """--num pictures of the last stage -> a folder of files NUMBER-CLASS.png and, with --npz, one
    file for guided-diffusion's evaluator: arr_0 uint8 (n, H, W, 3), arr_1 the classes.

    Chunks of --batch-size consecutive numbers are shared by the ranks. Files appear whole, and a
    chunk is skipped if all of its files exist, so an interrupted set continues where it stopped.
    about: all that the pictures depend on; settings: generate's.
    """
    rank, ranks = processes()
    folder = Path(args.png_dir or args.npz.removesuffix(".npz"))
    with locked(folder):
        if rank == 0:
            claim_folder(folder / "about.json", about)
        wait()

        # A chunk is missing unless all of its files exist. Every rank must see the same list, so
        # none writes before all have looked.
        y = [class_of_picture(n, about["classes"], args.labels, args.seed) for n in range(args.num)]
        files = [folder / f"{n:06}-{k}.png" for n, k in enumerate(y)]
        starts = range(0, args.num, args.batch_size)
        chunks = [range(n, min(n + args.batch_size, args.num)) for n in starts]
        missing = [chunk for chunk in chunks if not all(files[n].exists() for n in chunk)]
        wait()

        # This rank's share of the missing chunks.
        for chunk in tqdm(missing[rank::ranks], unit="chunk", disable=rank > 0):
            classes = torch.tensor(y[chunk.start : chunk.stop], device=model.cos.device)
            z0 = generate(model, classes, **settings, start=chunk.start, batch_size=len(chunk))[-1]
            images = codec.decode(z0).expand(-1, 3, -1, -1)  # grey becomes RGB
            for n, pixels in zip(chunk, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                with replacing(files[n]) as temporary:
                    Image.fromarray(pixels).save(temporary)
        wait()

        # The .npz is made from the files: 50,000 pictures of 256 x 256 are 9.8 GB in memory.
        if rank == 0 and args.npz:
            images = np.stack([np.asarray(Image.open(file)) for file in files])
            with replacing(args.npz, args.overwrite) as temporary:
                np.savez(temporary, arr_0=images, arr_1=np.array(y), about=json.dumps(about))
        if rank == 0:
            written = str(folder)
            if args.npz:
                written += f" and {args.npz}"
            print(f"wrote {args.num} pictures to {written}")
        wait()


# -------------------------------------------------------------------------------------------- files

LOCK = ".lock"


def may_write(path: Path | str, suffixes: tuple[str, ...], overwrite: bool) -> Path:
    """Decides, in one place, whether a file that the user named may be written. Raises UserError.

    Never in the place of a folder, and in the place of a file only with --overwrite.
    """
    # A wrong suffix would end in another library's error, after all the work.
    path = Path(path)
    if path.suffix not in suffixes:
        raise UserError(f"{path} does not end in {' or '.join(suffixes)}; try {path}{suffixes[0]}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give another name")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give another name, or --overwrite to replace it")
    return path


@contextmanager
def replacing(path: Path | str, overwrite: bool = True) -> Iterator[Path]:
    """Yields a temporary name; what is written there takes the place of `path` if all goes well.

    Raises UserError if it cannot be written, say because the disk is full; an earlier `path` is
    then intact. Without `overwrite`, a `path` that has appeared in the meantime stays.
    """
    path = Path(path)
    temporary = path.with_name(f".dod-{path.name}")  # what a kill has left there is replaced, too
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {path.parent}: {error.strerror}") from None
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the content reaches the disk before the name does
        if not overwrite:
            path.touch(exist_ok=False)  # reserves the name, unless somebody else has taken it
        os.replace(temporary, path)
    except FileExistsError:
        raise UserError(f"{path} has appeared meanwhile and is kept; see {temporary}") from None
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        # torch names the source file of its writer in such an error; without it, this is a bug.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; what was there is kept") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one command at a time in a folder; the system lifts the lock even after a kill -9.

    Of several ranks, rank 0 holds it for all. Raises UserError.
    """
    if processes()[0] > 0:
        yield
        return

    # The lock belongs to an open file, which is why it needs no cleaning up.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another command; give another name") from None
        except OSError:
            pass  # a file system without locks
        yield


def claim_folder(note: Path, about: dict) -> None:
    """Marks an empty folder as ours by a note, or checks that its note says the same as `about`.

    The note says what the other files were made of: it is written first and stays, and a folder
    with files but without it is not ours. Raises UserError.
    """
    # A new set or cache: only in a folder without other files.
    folder = note.parent
    about = json.loads(json.dumps(about))  # as it reads when it comes back from the file
    if not note.exists():
        if any(not file.name.startswith(".") for file in folder.iterdir()):
            raise UserError(f"{folder} has files, but no {note.name} of ours; give another name")
        with replacing(note) as temporary:
            temporary.write_text(json.dumps(about, indent=1))
        return

    # One that goes on: everything it depends on must be as it was.
    try:
        then = dict(**json.loads(note.read_text()))  # TypeError unless it is an object
    except (ValueError, TypeError):
        raise UserError(f"{note} is damaged; remove {folder}, or give another name") from None
    for key, value in about.items():
        if then.get(key) != value:
            advice = "repeat the first flags, remove it, or give another name"
            raise UserError(f"{folder} was made with another {key}; {advice}")


# --------------------------------------------------------------------------- processes and devices


def processes() -> tuple[int, int]:
    """This process's rank and the number of ranks: torchrun's RANK and WORLD_SIZE, else 0 and 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the other ranks, if there are any: through NCCL between GPUs, else through gloo.

    If a rank fails, torchrun ends all of them, so no rank waits for a dead one. The timeout can be
    long, and rank 0 may take its time to save or to draw.
    """
    if processes()[1] > 1:
        gpu = device if device.type == "cuda" else None
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1), device_id=gpu)
    yield

    # Not in a `finally`: after an error there is nobody to wait for.
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def wait() -> None:
    """Waits for the other ranks, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. Raises UserError.

    Each of torchrun's ranks on a machine takes a GPU of its own.
    """
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"

    # Putting a tensor there is the only sure test. Devices that we do not know are refused.
    try:
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name} is not available here; try --device cpu") from None
    if device.type == "cuda":
        # NCCL's collectives use the current device, whatever device the tensors of a model are on.
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    return device


def run_command(main: Callable[[], None]) -> None:
    """Runs a script's main(). What the user can mend becomes one line on stderr and exit status 2.

    Anything else is a bug and keeps its traceback.
    """
    # UserError speaks for itself. A loader's worker sends its errors as text with a traceback.
    rank, ranks = processes()
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, FloatingPointError) as error:
        message = str(error).rpartition("UserError: ")[2].strip()  # also from a loader's worker
    except (MemoryError, torch.OutOfMemoryError) as error:
        less = "lower --batch-size; in training, raise --grad-accum or use --grad-checkpoint"
        message = f"out of memory ({str(error)[:200]}); {less}"
    except (dist.DistError, RuntimeError) as error:
        # When a rank ends, the collectives of the others fail. A RuntimeError of any other kind
        # is a bug.
        message = "another rank has ended; its own message says why"
        if "DataLoader worker" in str(error):  # raised wherever the main process happens to be
            message = f"{error}; is there enough memory? In training, --resume continues the run"
        elif ranks == 1 or not any(word in str(error) for word in ("gloo", "by peer", "NCCL")):
            raise

    # One line, even where torch's own message has many.
    sys.stdout.flush()
    script = Path(sys.argv[0]).name
    where = f"rank {rank}: " if rank else ""
    print(f"{script}: error: {where}{' '.join(message.split())}", file=sys.stderr, flush=True)
    if ranks > 1:
        os._exit(2)  # at once: an orderly exit might wait for the other ranks
    sys.exit(2)


# ------------------------------------------------------------------------------------------ command


class Parser(argparse.ArgumentParser):
    """Strict argparse: defaults in --help, no abbreviated flags, one-line errors, exit status 2."""

    def __init__(self, **settings):
        settings |= {"allow_abbrev": False}
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **settings)

    def error(self, message: str):
        # argparse would print the usage of all flags first, and the message would drown in it.
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least(kind: type, low: float, high: float = math.inf) -> Callable:
    """An argparse type: a finite number of `kind`, low <= number <= high."""

    def number(text: str):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            limit = f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low:g}{limit}")
        return value

    number.__name__ = kind.__name__  # for argparse's own message, "invalid int value"
    return number


def scales(text: str) -> list[float]:
    """An argparse type: guidance scales, each at least 1, with commas between them."""
    return [at_least(float, 1)(word) for word in text.split(",")]


def times(text: str) -> tuple[float, float]:
    """An argparse type: LOW,HIGH with 0 <= LOW < HIGH <= 1."""
    low, high = (at_least(float, 0, 1)(word) for word in text.split(","))
    if low >= high:
        raise argparse.ArgumentTypeError(f"{text}: LOW must be below HIGH")
    return low, high


def nonempty(text: str) -> str:
    """An argparse type: the name of a file, a folder or anything else, but not an empty one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def parse_classes(text: str, names: list[str]) -> list[int]:
    """ "A-J", "0-9", "cat,dog", "207,360", "A-C,F" -> class numbers; names go before numbers."""

    def number(word: str) -> int | None:
        if word in names:
            return names.index(word)
        if word.isdecimal() and int(word) < len(names):
            return int(word)
        return None

    # Each word is a class or, if it is not, a range of classes.
    chosen = []
    for word in text.split(","):
        word = word.strip()
        first = number(word)
        last = first
        if first is None:
            low, _, high = word.partition("-")
            first = number(low)
            last = number(high)
        if first is None or last is None or first > last:
            known = ", ".join(names[:12]) + ", ..." * (len(names) > 12)
            advice = "give names, numbers or ranges like 0-3, with commas between them"
            raise UserError(f"class {word!r} is unknown; there are {known}; {advice}")
        chosen += range(first, last + 1)
    return chosen


def add_sampling_flags(parser: Parser) -> None:
    """The flags of sampling that sample.py and evaluate.py share."""
    add = parser.add_argument
    drops = "what the unconditional branch drops: class and prior, or the prior alone"
    add("--guide-on", choices=["both", "prior"], default="both", help=drops)
    add("--cfg-channels", type=at_least(int, 1), help="guide the first channels only; None: all")
    add("--cfg-interval", type=times, default=(0.0, 1.0), help="guide at times LOW,HIGH only")
    add("--seed", type=at_least(int, 0, 2**63), default=0, help="the same seed, the same pictures")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--vae", type=nonempty, help="where the checkpoint's VAE is now; None: where it was")
    add("--overwrite", action="store_true", help="replace files that exist")


# Of flags that do not always have an effect.
DEFAULTS = {"per_class": 4, "cfg_stage1": 1.0, "num": 50_000, "labels": "random", "steps": 50}
# The flags that generate() takes as they are.
SETTINGS = ["guide_on", "cfg_channels", "cfg_interval", "solver", "steps", "seed"]


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags. Where a default is None, the help says what that stands for."""
    parser = Parser(description="Samples from a checkpoint, stage by stage: a picture, or a set.")
    add = parser.add_argument
    natural = at_least(int, 1)

    # What is drawn, and by which model.
    add("--ckpt", type=nonempty, default=str(SHIPPED), help="checkpoint of train.py")
    add("--classes", type=nonempty, help="A-J, 0-9 or cat,dog; None: the first ten, in sets all")
    add("--per-class", type=natural, help="pictures of each class, rows of a block; None: 4")
    add("--stages", type=natural, help="1: no prior; None: 3, in sets 2, without LEM 1")
    add("--cfg", type=scales, help="guidance scales of stages 2, 3, ...; None: the model's own")
    add("--cfg-stage1", type=at_least(float, 1), help="guidance scale of stage 1; None: 1, off")

    # How it is drawn. bf16 rounds v too coarsely for RK45, whose error estimate then sees noise.
    add("--solver", choices=["dopri5", "euler"], default="dopri5", help="RK45 or Euler's method")
    add("--steps", type=natural, help="Euler steps in each stage; None: 50")
    add("--prior", type=nonempty, help="your pictures, a.png,b.png: priors down, classes across")
    add("--batch-size", type=natural, default=256, help="pictures sampled at a time")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: faster, for Euler")

    # Where it goes: one picture, a set, or the weights. torchrun takes --num for an abbreviation
    # of one of its own flags, hence --number.
    add("--out", type=nonempty, default="samples.png", help="picture to write")
    add(
        "--npz", type=nonempty, help="a set instead, also with torchrun: FILE.npz and a folder FILE"
    )
    add("--png-dir", type=nonempty, help="a set instead: its folder of PNG files")
    add("--export", type=nonempty, help="instead of sampling, write the EMA weights alone: FILE.pt")
    add("--num", "--number", type=natural, help="pictures in a set; None: 50000")
    add("--labels", choices=["random", "balanced"], help="classes in a set; None: random")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)

    # A set of samples, or a single picture? Most of what follows depends on it.
    args.as_set = bool(args.npz or args.png_dir)
    return args


def refuse_ignored(args: argparse.Namespace) -> None:
    """Raises UserError for flags that have no effect on what is asked for."""
    if args.as_set:
        where = "for a set"
        ignored = ["per_class", "prior"]
    elif args.prior:  # a single stage, whose priors are the user's own pictures
        where = "with --prior"
        ignored = ["per_class", "stages", "cfg_stage1", "num", "labels"]
    else:
        where = "without --npz or --png-dir"
        ignored = ["num", "labels"]
    for name in ignored:
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} has no effect {where}; leave it out")
    if args.steps and args.solver == "dopri5":
        raise UserError("--steps has no effect on RK45, which chooses its own; add --solver euler")


def check(args: argparse.Namespace) -> None:
    """Fills in defaults. Raises UserError for flags that contradict each other or the files."""
    if processes()[1] > 1 and not args.as_set:
        raise UserError("several ranks are for sets of samples: --npz or --png-dir")
    if args.prior and args.cfg and len(args.cfg) > 1:
        raise UserError("--prior takes one guidance scale --cfg")
    refuse_ignored(args)
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)

    # May it be written? Decided before any work is done.
    if args.export:
        may_write(args.export, (".pt",), args.overwrite)
    elif args.npz:
        may_write(args.npz, (".npz",), args.overwrite)
    elif not args.as_set:
        may_write(args.out, (".png", ".jpg", ".webp"), args.overwrite)


def draw(args, blocks: list[tuple[str, torch.Tensor]], titles: list[str], nfe: list) -> None:
    """Writes --out and says what it cost."""
    with replacing(args.out, args.overwrite) as temporary:
        draw_grid(blocks, titles).save(temporary)

    # One mean for each call that appended to nfe: each stage of a grid, each row of a matrix.
    spent = ", ".join(f"{n[:, 0].double().mean():.1f}" for n in nfe)
    print(f"wrote {args.out}; evaluations per picture: {spent}")


def sample_grid(args, model, codec, names, classes, settings) -> None:
    """Draws a block of pictures for each stage, a column for each class."""
    y = torch.tensor(classes * args.per_class, device=model.cos.device)
    titles = [names[k] for k in classes]
    # Classes lie side by side. The pictures of a single class do, too, instead of in a column.
    if len(classes) == 1:
        titles *= args.per_class
    nfe = []
    samples = generate(model, y, **settings, batch_size=args.batch_size, progress=True, nfe=nfe)
    blocks = []
    for i, z0 in enumerate(samples):
        blocks.append((f"stage {i + 1}\nw = {settings['cfg'][i]:g}", codec.decode(z0)))
    draw(args, blocks, titles, nfe)


def sample_priors(args, model, codec, names, classes, settings, pictures) -> None:
    """Draws a matrix, the user's pictures as priors down and classes across.

    Each column has the same noise throughout, so down a column only the prior changes.
    """
    y = torch.tensor(classes, device=model.cos.device)

    # One stage, but one that has a prior, so it is guided like a later stage.
    settings = settings | {"stages": 1, "cfg": args.cfg or [model.config.cfg]}
    nfe = []
    lines = []
    for picture in pictures:
        # The same prior for every class; `start` stays 0, so every row has the same noise.
        z0 = codec.encode(picture[None].to(y.device))  # (1, C, H, W)
        prior = z0.expand(len(y), -1, -1, -1)
        sample = generate(model, y, **settings, batch_size=args.batch_size, prior=prior, nfe=nfe)[0]
        lines.append(torch.cat([codec.decode(z0), codec.decode(sample)]))
    blocks = [(f"w = {settings['cfg'][0]:g}", torch.cat(lines))]
    draw(args, blocks, ["prior", *(names[k] for k in classes)], nfe)


def choose_stages(args: argparse.Namespace, config: Config) -> tuple[int, list[float]]:
    """-> the number of stages, and the guidance scale of each of them. Raises UserError."""
    # As many as --stages says; else 3 for a look, 2 for a score (section 4.2), 1 without LEM.
    stages = args.stages or (2 if args.as_set else 3)
    if not config.N and not args.stages:
        stages = 1

    # Stage 1 has a scale of its own. --cfg lists those of stages 2, 3, ..., and the last one
    # listed serves all that follow.
    cfg = args.cfg or [config.cfg]
    if args.cfg and not args.prior and len(cfg) > stages - 1:
        raise UserError(f"--cfg has {len(cfg)} values for {stages - 1} stages with a prior")
    return stages, [args.cfg_stage1, *cfg, *cfg[-1:] * stages][:stages]


def main() -> None:
    """Reads the flags, loads the model and draws a grid, a matrix of priors, or a set."""
    args = parse(sys.argv[1:])
    check(args)
    checkpoint = load_checkpoint(args.ckpt)
    if args.export:
        return export(args, checkpoint)
    device = pick_device(args.device)
    model = load_model(checkpoint, device)
    codec = codec_of(checkpoint, args.vae, device)

    # What generate() is told: flags as they are, and the plan of the stages.
    stages, cfg = choose_stages(args, model.config)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"stages": stages, "cfg": cfg}

    # Classes: a set has all of them, a picture the first ten.
    names = checkpoint["classes"]
    classes = list(range(len(names)))
    if args.classes:
        classes = parse_classes(args.classes, names)
    elif not args.as_set:
        classes = classes[:10]

    # Ranks share files, not tensors, so gloo will do.
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    with process_group(torch.device("cpu")), bf16:
        if args.as_set:
            # All that a set depends on: the note that travels with it. The class table stands
            # for the weights, because every step of training changes it.
            weights = model.label.weight.detach().cpu().numpy().tobytes()
            about = settings | {
                "labels": args.labels,
                "classes": classes,
                "precision": args.precision,
                "codec": codec.name,
                "step": checkpoint["step"],
                "weights": hashlib.sha256(weights).hexdigest(),
            }
            sample_set(args, model, codec, about, settings)
        elif args.prior:
            size = (checkpoint["image_size"], checkpoint["channels"])
            pictures = [fit_picture(open_picture(path), *size) for path in args.prior.split(",")]
            sample_priors(args, model, codec, names, classes, settings, pictures)
        else:
            sample_grid(args, model, codec, names, classes, settings)


if __name__ == "__main__":
    run_command(main)
