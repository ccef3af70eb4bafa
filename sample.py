"""sample.py -- multi-stage sampling; its codec, checkpoints, grids and sets. Section 3.2, Fig. 3a.

    stage 1   z_0^1 from noise, given the class                           Eq. 5, i = 1: S, no prior
    stage i   z_0^i from fresh noise, given the class and LEM(z_0^(i-1))  Eq. 5, i > 1; guided

Each stage is a complete run of the same model from t = 1 (noise) to t = 0 (data). The noise is a
function of (seed, image number, stage), and the solver treats each image alone. So image n is the
same for any batch size and any number of GPUs, up to floating-point order.

Shapes: B images, C channels, H x W latent, K classes; images: uint8 (B, channels, rows, columns).

    python sample.py                                       # letters, from the weights in assets/
    python sample.py --ckpt out/letters/ckpt.pt --classes A-J --stages 3 --out grid.png
    python sample.py --prior mine.png,yours.png --out variations.png
    torchrun --nproc-per-node 8 sample.py --ckpt ckpt.pt --npz samples.npz      # 50,000, for FID
"""

import json
import math
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from flow import dopri5, euler, guide
from model import Config, DoD, UserError

# -------------------------------------------------------------------- multi-stage sampling: Fig. 3a

# One seed serves several streams of random numbers. These keep them apart; train.py has 0 and 1.
NOISE_STREAM = 2
LABEL_STREAM = 3


def noise(shape: tuple[int, ...], seed: int, numbers: range, stage: int) -> torch.Tensor:
    """z_1^i: standard normal (len(numbers), *shape); image n is a function of (seed, n, stage).
    `stage` counts from 0, as i - 1. NumPy draws on the CPU: the noise is the same on any device.
    """
    rngs = [np.random.default_rng((seed, NOISE_STREAM, n, stage)) for n in numbers]
    return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))


def sample_stage(
    model, z1, y, e_s, w, guide_on, cfg_channels, interval, solver, steps
) -> tuple[torch.Tensor, torch.Tensor]:
    """One stage of Fig. 3a, Eq. 4: noise z1 (B, C, H, W) -> z0, of the same shape, and nfe (B,).
    y (B,) classes; e_s (B, T, d) visual prior, or None (S); w guidance scale; the rest as in
    generate(). nfe counts evaluations of the velocity; a guided one runs the network twice.
    """
    if interval is not None and solver != "euler":
        raise UserError("an interval of times is for --solver euler")
    # CHOICE: the paper does not say what the unconditional branch drops. Ours drops both class and
    # prior, v_u = v(null class, S); with guide_on = "prior" the prior alone, v_u = v(class, S).
    y_u = torch.full_like(y, model.null_class)  # (B,)
    if guide_on == "prior" and e_s is not None:
        y_u = y

    def velocity(x, t, rows):
        # Outside the interval, prior and guidance are off. Euler's times are the same for all rows.
        if interval is not None and not interval[0] <= t[0] <= interval[1]:
            return model(x, t, y[rows]).to(x.dtype)

        # RK45 drops images that have finished: `rows` are those that are left.
        e_s_left = None if e_s is None else e_s[rows]
        v_c = model(x, t, y[rows], e_s_left).to(x.dtype)  # the conditional branch
        if w == 1:
            return v_c
        v_u = model(x, t, y_u[rows]).to(x.dtype)  # the unconditional branch, with S
        return guide(v_c, v_u, w, cfg_channels)

    # Section 3.3 samples with dopri5; Table 4, which counts compute, with Euler's method.
    if solver == "euler":
        return euler(velocity, z1, steps)
    return dopri5(velocity, z1)


@torch.no_grad()
def generate(
    model: DoD,
    y: torch.Tensor,
    stages: int = 2,
    cfg: float | list[float] | None = None,
    guide_on: str = "both",
    cfg_channels: int | None = None,
    interval: tuple[float, float] | None = None,
    solver: str = "dopri5",
    steps: int = 50,
    seed: int = 0,
    start: int = 0,
    prior: torch.Tensor | None = None,
    batch_size: int = 256,
    first_stage: int = 0,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Multi-stage sampling (section 3.2): classes y (B,) -> [z_0^1, z_0^2, ...], [nfe, nfe, ...],
    for each stage its samples (B, C, H, W) and the evaluations of each image (B,).

    cfg           guidance scale w >= 1: one for each stage, or one number for all stages that have
                  a prior (the others then use 1, which is off); None: the model's own
    guide_on      what the unconditional branch drops: "both" class and prior, or the "prior" alone,
                  where there is one
    cfg_channels  guide the first channels only; None: all
    interval      prior and guidance act at times low <= t <= high only, elsewhere S, unguided; in
                  stage 1 the guidance interval of Kynkäänniemi et al. (2024). None: at all times.
                  Euler only: RK45 would stumble over the jumps of v
    solver        "dopri5" (adaptive, image by image) or "euler" (`steps` steps)
    seed, start   image b is image number start + b of this seed
    prior         (B, C, H, W) latents that take the place of a previous stage's samples in stage 1
    first_stage   how many stages came before the prior: the noise of a stage depends on its number

    Why a prior needs a large w (section 3.3): v_c - v_u is what class and prior change. x_t already
    shows much of them, so they change v only a little; w > 1 exaggerates that, and leads to images
    that match. Raises UserError for what the model cannot do."""
    config = model.config
    # Section 3.3: no guidance in the first stage, strong guidance wherever there is a prior.
    w = config.cfg if cfg is None else cfg
    if not isinstance(w, list):
        w = [w] * stages
        if prior is None:
            w[0] = 1.0
    if len(w) != stages or not all(scale >= 1 for scale in w):
        raise UserError(f"guidance {w} for {stages} stages; each stage needs one w >= 1 (1: off)")
    if (stages > 1 or prior is not None) and not config.N:
        raise UserError("this model is a plain FiTv2 without LEM: it has stage 1 only")
    if config.num_classes == 1 and prior is None and w[0] > 1:
        raise UserError("this model is unconditional: in stage 1 there is nothing to guide by")

    # Images go through all stages in groups of batch_size.
    shape = (config.latent_channels, config.latent_size, config.latent_size)  # (C, H, W)
    samples = [[] for _ in range(stages)]
    nfe = [[] for _ in range(stages)]
    for offset in tqdm(range(0, len(y), batch_size), "sampling", leave=False, disable=None):
        group = slice(offset, offset + batch_size)
        numbers = range(start + offset, start + offset + len(y[group]))
        z0 = None if prior is None else prior[group].to(y.device)

        # Fig. 3a: what a stage has drawn becomes the visual prior of the next one. The noise is
        # fresh in each stage, so nothing but e_s passes from one to the next.
        for i in range(stages):
            z1 = noise(shape, seed, numbers, first_stage + i).to(y.device)
            e_s = None if z0 is None else model.visual_prior(z0)  # (B, T, d), once a stage
            z0, spent = sample_stage(
                model, z1, y[group], e_s, w[i], guide_on, cfg_channels, interval, solver, steps
            )
            samples[i].append(z0)
            nfe[i].append(spent)

        # A sample that is not finite spoils its later stages, so looking at the last is enough.
        if not torch.isfinite(z0).all():
            raise FloatingPointError("a sample is not finite; the weights or the guidance are off")
    return [torch.cat(parts) for parts in samples], [torch.cat(parts) for parts in nfe]


# -------------------------------------------------------------------------------------------- grids


def draw_grid(out: Path | str, blocks: list[tuple[str, torch.Tensor]], titles: list[str]) -> None:
    """Writes images as in Fig. 5: labelled blocks of rows, a block a stage, a column a title.

    blocks: (label, uint8 (n, channels, rows, columns)), n a multiple of len(titles), row by row.
    Small images are enlarged, without smoothing, by a whole factor to at least 64 pixels.
    """
    # A cell is an enlarged image with a margin of 4 pixels.
    height, width = blocks[0][1].shape[-2:]
    zoom = max(1, math.ceil(64 / width))  # a whole factor
    cell_width = width * zoom + 4
    cell_height = height * zoom + 4
    font = ImageFont.load_default(size=max(12, min(24, cell_height // 5)))

    # Labels stand left of the images, titles above them; a gap of 12 pixels ends each block.
    lines = "\n".join(label for label, _ in blocks).split("\n")
    left = 16 + round(max(font.getlength(line) for line in lines))
    top = 36  # room for the titles
    rows = sum(len(images) // len(titles) for _, images in blocks)
    size = (left + len(titles) * cell_width, top + rows * cell_height + 12 * len(blocks))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((left + (column + 0.5) * cell_width, top / 2), title, "black", font, anchor="mm")

    for label, images in blocks:
        draw.multiline_text((8, top), label, "black", font)
        for i, image in enumerate(images.cpu()):
            row, column = divmod(i, len(titles))
            rgb = image.expand(3, -1, -1).permute(1, 2, 0)  # (rows, columns, 3), also of grey ones
            tile = Image.fromarray(rgb.numpy())
            tile = tile.resize((width * zoom, height * zoom), Image.NEAREST)
            canvas.paste(tile, (left + column * cell_width, top + row * cell_height))
        top += len(images) // len(titles) * cell_height + 12
    with replacing(out) as temporary:
        canvas.save(temporary)
    print(f"wrote {out}")


# ------------------------------------------------------------------------------- images <-> latents


def load_image(path: str | Path, channels: int) -> Image.Image:
    """An image file -> grey for 1 channel, RGB for 3. Raises UserError that names a broken one."""
    try:
        with Image.open(path) as image:
            image.load()  # reads the pixels, and so finds what is broken
    except Exception as error:  # Pillow raises a dozen kinds for broken files
        raise UserError(f"{path} is not a readable image ({error})") from None

    # What is transparent becomes white, and 16-bit grey, which convert() would clip, becomes 8-bit.
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.array(image) // 257).astype(np.uint8))
    return image.convert({1: "L", 3: "RGB"}[channels])


def open_image(path: str, size: int, channels: int) -> torch.Tensor:
    """An image file -> uint8 (channels, size, size): the square in the middle, as ADM cuts it to
    within half a pixel, resized bicubically. ADM halves large images first, which softens them."""
    # ADM resizes the shorter side to `size`, then cuts the longer one: here, in source pixels.
    image = load_image(path, channels)
    scale = min(image.size) / size  # source pixels for each pixel
    left, top = ((round(side / scale) - size) // 2 * scale for side in image.size)
    box = (left, top, left + size * scale, top + size * scale)
    pixels = np.array(image.resize((size, size), Image.BICUBIC, box))
    return torch.from_numpy(pixels).reshape(size, size, channels).permute(2, 0, 1).contiguous()


class Codec:
    """Images <-> latents. This one works in pixel space: the latent is the image in [-1, 1]."""

    name = "none"  # what checkpoints call it
    scale = 1.0  # the factor that latents are multiplied with

    def latent_shape(self, channels: int, size: int) -> tuple[int, int]:
        """Channels and side of the latents of square images. UserError if they do not fit."""
        return channels, size

    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (B, channels, height, width) -> mean and standard deviation, both (B, C, H, W), of
        the latent's distribution given the image, in fp32."""
        mean = images.float() / 127.5 - 1
        return mean, torch.zeros_like(mean)  # in pixel space an image has exactly one latent

    def encode(self, images: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """The mean, or with standard normal eps (B, C, H, W) a sample of that distribution."""
        mean, std = self.moments(images)
        return mean if eps is None else mean + std * eps

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """float (B, C, H, W) -> uint8 (B, channels, height, width); the inverse of encode."""
        # 128 = 127.5 + 0.5, which rounds, since byte() truncates.
        return (127.5 * latents.float() + 128).clamp(0, 255).byte()


class VAE(Codec):
    """Stable Diffusion's VAE (section 3.3), diffusers' AutoencoderKL, in fp32.

    256 x 256 x 3 images <-> 32 x 32 x 4 latents, multiplied by the VAE's own scaling factor.
    CHOICE: the paper does not say which version of the VAE; the README's recipe uses ft-EMA.
    """

    def __init__(self, name: str, device: torch.device):
        from diffusers import AutoencoderKL

        try:
            vae = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False)
        except OSError as error:
            raise UserError(f"--vae {name} is no folder, nor found on the hub ({error})") from None
        self.name = name
        self.scale = float(vae.config.scaling_factor)  # 0.18215 for the VAE of the paper
        self.shift = float(vae.config.get("shift_factor") or 0)
        self.channels = vae.config.latent_channels
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)  # all levels but one halve
        self.vae = vae.to(device).eval().requires_grad_(False)

    def latent_shape(self, channels: int, size: int) -> tuple[int, int]:
        if channels != 3 or size % self.factor:
            need = f"3 channels and a multiple of {self.factor} pixels"
            raise UserError(f"--vae {self.name} needs {need}, not {channels} and {size}")
        return self.channels, size // self.factor

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The scaling factor brings latents to a standard deviation near 1, that of the noise.
        posterior = self.vae.encode(images.to(self.vae.device) / 127.5 - 1).latent_dist
        return self.scale * (posterior.mean - self.shift), self.scale * posterior.std

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = []
        for part in latents.to(self.vae.device).split(32):  # decoding takes much memory
            images.append(super().decode(self.vae.decode(part / self.scale + self.shift).sample))
        return torch.cat(images)


def load_codec(name: str, device: torch.device | str = "cpu") -> Codec:
    """The codec that --vae or a checkpoint names; "none" is pixel space. Raises UserError."""
    return Codec() if name == "none" else VAE(name, torch.device(device))


# ------------------------------------------------------------------ checkpoints, files, processes

SHIPPED = Path(__file__).parent / "assets/letters.pt"  # EMA weights trained on letters


def load_checkpoint(path: Path | str) -> dict:
    """ckpt.pt or a milestone of train.py: a plain dict of tensors, numbers, strings and lists. A
    pickle that carries code is refused. Raises UserError that names the file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if checkpoint["format"] != "dod-3":
            raise ValueError
    except Exception as error:  # no such file, a bad zip, a bad pickle, code in a pickle, ...
        reason = type(error).__name__
        raise UserError(f"{path} is not a checkpoint of this train.py ({reason})") from None
    return checkpoint | {"path": str(path)}


def load_model(checkpoint: dict, device: torch.device | str = "cpu") -> DoD:
    """The EMA model of a checkpoint, ready to sample from, in fp32. Raises UserError."""
    try:
        model = DoD(Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["ema"])
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{checkpoint['path']}: weights and config do not fit ({error})") from None
    return model.to(device).eval()


def refuse_existing(path: str, suffix: str | None = None) -> None:
    """Nothing that the user names is overwritten. Checked before any work; raises UserError."""
    if Path(path).exists():
        raise UserError(f"{path} exists; give another name, or remove it")
    if suffix and Path(path).suffix != suffix:
        raise UserError(f"{path} should end in {suffix}")


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yields a temporary name; what is written there takes the place of `path`, whole or never."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".dod-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the content reaches the disk before the name does
        os.replace(temporary, path)  # atomic
    finally:
        temporary.unlink(missing_ok=True)


def processes() -> tuple[int, int]:
    """This process's rank and the number of ranks: torchrun's RANK and WORLD_SIZE, else 0 and 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the other ranks, if there are any: through NCCL between GPUs, else through gloo."""
    if processes()[1] > 1:
        gpu = device if device.type == "cuda" else None
        # The timeout leaves rank 0 the time to draw and to save, while the others wait.
        hours = timedelta(hours=2)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=hours, device_id=gpu)
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
    """The device of that name; "auto" is the GPU, if any, and with torchrun each rank's own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name} is not available here; try --device cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL uses the current device
    # cuDNN would round convolutions to TF32, and so shift what the VAE decodes, and FID.
    torch.backends.cudnn.allow_tf32 = False
    return device


def run_command(main: Callable[[], None]) -> None:
    """Runs a script's main(). What the user can mend becomes one line on stderr and exit status 2;
    anything else is a bug and keeps its traceback."""
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)  # as a program ended by Ctrl-C
    except (UserError, OSError, FloatingPointError) as error:
        # A loader's worker sends its error as text, with the traceback before it.
        message = str(error).rpartition("UserError: ")[2]
    except (MemoryError, torch.OutOfMemoryError) as error:
        message = f"out of memory; lower --batch-size, or raise train.py's --grad-accum ({error})"
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)  # like argparse, for a mistake of the user


# ------------------------------------------------------------------------------------------ command


def sample_set(args, model: DoD, codec: Codec, classes: list[int], settings: dict) -> None:
    """--npz FILE.npz: images of the last stage in one file for guided-diffusion's evaluator, arr_0
    uint8 (n, H, W, 3) and arr_1 their classes, and in a folder FILE as NUMBER-CLASS.png.
    The ranks take turns in chunks of --batch-size numbers. Image n is a function of (seed, n), so
    after an interruption --start draws the rest into another file. settings: generate's.
    """
    # The folder says of itself what it holds.
    rank, ranks = processes()
    folder = Path(args.npz.removesuffix(".npz"))
    folder.mkdir(parents=True, exist_ok=True)  # whichever rank comes first
    if rank == 0:
        (folder / "about.json").write_text(json.dumps(vars(args) | settings, indent=1))

    # CHOICE: labels are random unless told otherwise, as with SiT, FiTv2, DiT and ADM. The same
    # number of each class probably gives a lower FID.
    numbers = range(args.start, args.start + args.number)
    y = {n: classes[n % len(classes)] for n in numbers}
    if args.labels == "random":
        rngs = {n: np.random.default_rng((args.seed, LABEL_STREAM, n)) for n in numbers}
        y = {n: classes[rng.integers(len(classes))] for n, rng in rngs.items()}

    # This rank's share.
    files = {n: folder / f"{n:06}-{y[n]}.png" for n in numbers}
    chunks = [numbers[i : i + args.batch_size] for i in range(0, len(numbers), args.batch_size)]
    for chunk in tqdm(chunks[rank::ranks], unit="chunk", disable=rank > 0):
        labels = torch.tensor([y[n] for n in chunk], device=model.cos.device)
        samples, _ = generate(model, labels, **settings, start=chunk.start, batch_size=len(chunk))
        images = codec.decode(samples[-1]).expand(-1, 3, -1, -1)  # grey becomes RGB
        for n, pixels in zip(chunk, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            Image.fromarray(pixels).save(files[n], compress_level=1)
    wait()  # until all files are there

    # The .npz is made from the files, image by image: 50,000 of 256 x 256 take 9.8 GB of memory.
    if rank == 0:
        images = np.empty((len(files), *images.shape[2:], 3), np.uint8)  # (n, H, W, 3)
        for i, file in enumerate(files.values()):
            images[i] = Image.open(file)
        with replacing(args.npz) as temporary:
            np.savez(temporary, arr_0=images, arr_1=np.array(list(y.values())))
        print(f"wrote {args.number} images to {args.npz} and {folder}")


# Defaults are shown in --help, and flags may not be abbreviated.
Parser = partial(ArgumentParser, formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False)


def at_least(kind: type, low: float, high: float = math.inf) -> Callable:
    """An argparse type: a finite number of `kind`, low <= number <= high."""

    def number(text: str):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise ArgumentTypeError(f"{text}: must lie between {low:g} and {high:g}")
        return value

    number.__name__ = kind.__name__  # for argparse's own message, "invalid int value"
    return number


def interval(text: str) -> tuple[float, float]:
    """An argparse type: two times LO,HI with 0 <= LO < HI <= 1."""
    low, high = map(float, text.split(","))
    if not 0 <= low < high <= 1:
        raise ArgumentTypeError(f"{text}: LO must be below HI, both between 0 and 1")
    return low, high


def parse_classes(text: str, names: list[str]) -> list[int]:
    """ "cat,dog", "A-J" (single letters), or "207,360" if no name is a number -> class numbers."""
    letters = [name for name in names if len(name) == 1 and name.isalpha()]
    numbers = [] if any(name.isdecimal() for name in names) else list(map(str, range(len(names))))
    chosen = []
    for word in text.split(","):
        first, _, last = word.partition("-")
        if word in names:
            chosen.append(names.index(word))
        elif first in letters and last in letters:
            chosen += [names.index(name) for name in letters if first <= name <= last]
        elif word in numbers:
            chosen.append(int(word))
        else:
            raise UserError(f"class {word!r} is unknown; there are {', '.join(names[:20])} ...")
    return chosen


def add_sampling_flags(parser: ArgumentParser) -> None:
    """The flags of sampling that sample.py and evaluate.py share."""
    add = parser.add_argument
    drops = "what the unconditional branch drops: class and prior, or the prior alone"
    add("--guide-on", choices=["both", "prior"], default="both", help=drops)
    add("--cfg-channels", type=at_least(int, 1), help="guide only the first channels")
    times = "LO,HI: prior and guidance act at these times only; for --solver euler"
    add("--interval", type=interval, help=times)
    add("--seed", type=at_least(int, 0), default=0, help="the same seed, the same images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")


DEFAULT_OUT = "out/samples.png"
# The flags that generate() takes as they are.
SETTINGS = ["guide_on", "cfg_channels", "interval", "solver", "steps", "seed"]


def parse(argv: list[str]) -> Namespace:
    """The flags."""
    parser = Parser()
    natural = at_least(int, 1)
    add = parser.add_argument
    add("--ckpt", default=str(SHIPPED), help="checkpoint of train.py")
    add("--classes", help="names or numbers, or A-J; default: the first ten, in a set all")
    add("--stages", type=natural, help="default: 3, in a set 2, without LEM 1")
    add("--cfg", type=at_least(float, 1), help="guidance with a prior; default: the model's")
    add("--cfg-stage1", type=at_least(float, 1), default=1.0, help="guidance in stage 1; 1 is off")
    add("--solver", choices=["dopri5", "euler"], default="dopri5", help="RK45 or Euler's method")
    add("--steps", type=natural, default=50, help="Euler steps in each stage")
    add("--batch-size", type=natural, default=256, help="images sampled at a time")
    # bf16 rounds v too coarsely for RK45, whose error estimate then sees noise.
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: faster, for Euler")
    add_sampling_flags(parser)

    add = parser.add_argument_group("for a grid of images").add_argument
    add("--per-class", type=natural, default=4, help="images of each class in each stage")
    add("--prior", help="a.png,b.png: your images as priors down, classes across, one stage")
    add("--mix", type=at_least(int, 2), help="so many mixtures of the tokens of two --prior images")
    add("--out", help="image to write; default: out/samples.png, which is replaced")

    # torchrun takes --num for an abbreviation of one of its own flags, hence --number.
    add = parser.add_argument_group("for a set of samples, also with torchrun").add_argument
    add("--npz", help="FILE.npz to write, and a folder FILE of PNG files")
    add("--number", type=natural, default=50_000, help="images in the set")
    add("--start", type=at_least(int, 0), default=0, help="number of the first image")
    add("--labels", choices=["random", "balanced"], default="random", help="classes in the set")
    return parser.parse_args(argv)


@torch.no_grad()
def sample_priors(args, model, codec, checkpoint, classes, settings) -> None:
    """Draws a matrix, the --prior images down and classes across, the same noise in each row. With
    --mix, the rows lead from the latent tokens L_hat of the first prior to those of the second."""
    paths = args.prior.split(",")
    if not model.config.N or (args.mix and len(paths) != 2):
        raise UserError("--prior needs a model with LEM, and --mix two images")
    size = (checkpoint["image_size"], checkpoint["channels"])
    images = torch.stack([open_image(path, *size) for path in paths])

    # What passes the bottleneck: (n, N, d_e), and with --mix (mix, N, d_e). A mixture of tokens is
    # no image that could be shown beside its row.
    y = torch.tensor(classes, device=model.cos.device)
    z0 = codec.encode(images.to(y.device))  # (n, C, H, W)
    l_hat = model.lem.encode(z0)  # Eq. 6
    if args.mix:
        weights = torch.linspace(0, 1, args.mix, device=y.device).view(-1, 1, 1)
        l_hat = torch.lerp(l_hat[:1], l_hat[1:], weights)
        blank = torch.full_like(images[:1], 255).expand(args.mix - 2, -1, -1, -1)
        images = torch.cat([images[:1], blank, images[1:]])

    # One stage for each row: the same prior for every class, the same noise for every prior.
    z1 = noise(z0.shape[1:], settings.pop("seed"), range(len(y)), 0).to(y.device)
    w = args.cfg or model.config.cfg
    names = [checkpoint["classes"][k] for k in classes]
    rows = []
    for tokens, image in zip(l_hat, images, strict=True):
        e_s = model.prior_mlp(model.lem.decode(tokens[None])).expand(len(y), -1, -1)
        sample, _ = sample_stage(model, z1, y, e_s, w, **settings)
        rows.append(torch.cat([image[None], codec.decode(sample).cpu()]))
    draw_grid(args.out or DEFAULT_OUT, [(f"w = {w:g}", torch.cat(rows))], ["prior", *names])


def main() -> None:
    """Reads the flags, loads the model and draws a grid, a matrix of priors, or a set."""
    # Check what would be written before any work is done, on one of the ranks.
    args = parse(sys.argv[1:])
    rank, ranks = processes()
    if args.prior and args.npz or ranks > 1 and not args.npz:
        raise UserError("--npz excludes --prior, and several ranks are for --npz alone")
    if args.npz and rank == 0:
        refuse_existing(args.npz, ".npz")
        refuse_existing(args.npz.removesuffix(".npz"))
    if args.out:
        refuse_existing(args.out, ".png")

    # The model, and the classes to draw.
    checkpoint = load_checkpoint(args.ckpt)  # on the CPU
    device = pick_device(args.device)
    model = load_model(checkpoint, device)
    codec = load_codec(checkpoint["codec"], device)
    names = checkpoint["classes"]  # with --class-groups, the groups' names
    classes = list(range(len(names) if args.npz else min(10, len(names))))
    if args.classes:
        classes = parse_classes(args.classes, names)

    # bf16 autocast wraps the backbone, not the codec.
    if args.precision == "bf16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)

    # The user's own priors take one stage. Else three are worth a look, two a score (section 4.2).
    settings = {name: getattr(args, name) for name in SETTINGS}
    if args.prior:
        return sample_priors(args, model, codec, checkpoint, classes, settings)
    default = 2 if args.npz else 3
    stages = args.stages or (default if model.config.N else 1)
    if args.cfg and stages == 1:
        raise UserError("--cfg is for stages with a prior; --cfg-stage1 guides stage 1")
    later = [args.cfg or model.config.cfg] * (stages - 1)  # all stages with a prior
    settings |= {"stages": stages, "cfg": [args.cfg_stage1, *later]}
    if args.npz:
        with process_group(torch.device("cpu")):  # ranks share files, not tensors: gloo will do
            return sample_set(args, model, codec, classes, settings)

    # A grid: a block of images for each stage, a column for each class.
    y = torch.tensor(classes * args.per_class, device=device)
    samples, nfe = generate(model, y, **settings, batch_size=args.batch_size)
    blocks = []
    for w, z0, n in zip(settings["cfg"], samples, nfe, strict=True):
        blocks.append((f"stage {len(blocks) + 1}\nw = {w:g}", codec.decode(z0)))
        print(f"stage {len(blocks)}: {n.double().mean():.1f} evaluations for each image")
    draw_grid(args.out or DEFAULT_OUT, blocks, [names[k] for k in classes])


if __name__ == "__main__":
    run_command(main)
