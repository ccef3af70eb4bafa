"""sample.py -- multi-stage sampling: the method, and the command that draws with it. Section 3.2.

    stage 1   z_0^1 from noise, given the class                           Eq. 5, i = 1: S, no prior
    stage i   z_0^i from fresh noise, given the class and LEM(z_0^(i-1))  Eq. 5, i > 1; guided

Each stage is a complete run of the same model from t = 1 (noise) to t = 0 (data). Image n is the
same for any batch size and any number of GPUs: its noise is a function of (seed, n, stage), and the
solver treats each image alone. Only rounding differs, by up to 2e-3 in latents of RK45 in fp32.

Shapes: B images, C channels, H x W latent, T tokens; images: uint8 (B, channels, rows, columns).

    python sample.py                                   # letters, from the weights in assets/
    python sample.py --path --classes H                # an H on its way from noise to data
    python sample.py --prior mine.png,yours.png        # your images as priors
    torchrun --nproc-per-node 8 sample.py --ckpt ckpt.pt --npz samples.npz      # 50,000, for FID
"""

import argparse
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from flow import dopri5, euler, guide
from model import Config, DoD, FiTv2, UserError, build_model

# -------------------------------------------------------------------- multi-stage sampling: Fig. 3a


@dataclass(frozen=True)
class Sampler:
    """How stages are sampled, and where their path is kept."""

    solver: str = "dopri5"  # RK45 (section 3.3), or "euler": Euler's method (Table 4)
    steps: int = 50  # Euler's steps in each stage; RK45 chooses its own
    seed: int = 0  # the noise of image n is a function of (seed, n, stage)
    first_stage: int = 0  # stages done before: generate() begins with the noise of the next one
    path: list | None = None  # each evaluation appends (x_t, x_0), the x_0 to which v points


@torch.no_grad()
def generate(
    model: FiTv2 | DoD, y: Tensor, stages: int = 2, w: float | list[float] | None = None,
    sampler: Sampler = Sampler(), start: int = 0, prior: Tensor | None = None, batch_size: int = 256
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Multi-stage sampling (section 3.2): classes y (B,) -> [z_0^1, z_0^2, ...], [nfe, nfe, ...],
    for each stage its samples (B, C, H, W) and the evaluations of v for each image (B,).

    w: guidance scales >= 1 (1 is off), a list with one for each stage; one number is for all stages
    that have a prior, and None is the model's own. Image b is number start + b of the seed. prior:
    (B, C, H, W) latents that take the place of a previous stage's samples in stage 1. Raises
    UserError for what the model cannot do, FloatingPointError if RK45 meets an infinite v."""
    # Section 3.3: no guidance in the first stage, strong guidance wherever there is a prior.
    config = model.config
    if not isinstance(w, list):
        w = [config.w if w is None else w] * stages
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
            z1 = stage_noise(shape, sampler.seed, numbers, sampler.first_stage + i).to(y.device)
            e_s = None if z0 is None else model.visual_prior(z0)  # (B, T, d), once a stage
            z0, spent = sample_stage(model, z1, y[group], e_s, w[i], sampler)
            samples[i].append(z0)
            nfe[i].append(spent)
    return [torch.cat(parts) for parts in samples], [torch.cat(parts) for parts in nfe]


# A seed serves four streams of NumPy's random numbers, kept apart by these; two are train.py's.
FLIP_STREAM, ORDER_STREAM, NOISE_STREAM, LABEL_STREAM = range(4)


def stage_noise(shape: tuple[int, ...], seed: int, numbers: range, stage: int) -> Tensor:
    """z_1^i: standard normal (len(numbers), *shape); image n is a function of (seed, n, stage), the
    same on any device. `stage` counts from 0, as i - 1."""
    rngs = [np.random.default_rng((seed, NOISE_STREAM, n, stage)) for n in numbers]
    return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))


def sample_stage(
    model: FiTv2 | DoD, z1: Tensor, y: Tensor, e_s: Tensor | None, w: float, sampler: Sampler
) -> tuple[Tensor, Tensor]:
    """One stage of Fig. 3a, Eq. 4: noise z1 (B, C, H, W) -> z0, of the same shape, and nfe (B,).
    y (B,) classes; e_s (B, T, d) visual prior, or None (S); w guidance scale. nfe counts the
    evaluations of v; a guided one runs the network twice. Raises ValueError for w < 1,
    FloatingPointError if RK45 meets a v that is not finite."""
    # CHOICE: the paper does not say what the unconditional branch drops. Ours drops both class and
    # prior: v_u = v(null class, S).
    null = torch.full_like(y, model.null_class)  # (B,)

    def velocity(x, t, rows):
        # RK45 drops images that have finished: x (b, C, H, W), t and `rows` (b,) are what is left.
        e_s_left = None if e_s is None else e_s[rows]
        v = model(x, t, y[rows], e_s_left).to(x.dtype)  # the conditional branch
        if w != 1:
            v_u = model(x, t, null[rows]).to(x.dtype)  # the unconditional branch, with S
            v = guide(v, v_u, w)  # v_u + w (v_c - v_u)
        if sampler.path is not None:
            sampler.path.append((x, x - t.view(-1, 1, 1, 1) * v))  # Eq. 1: x_0 = x_t - t v
        return v

    # Section 3.3 samples with dopri5; Table 4, which counts compute, with Euler's method.
    if sampler.solver == "euler":
        return euler(velocity, z1, sampler.steps)
    return dopri5(velocity, z1)


# --------------------------------------------------------- the command: what it draws, its flags


def main() -> None:
    """Reads the flags, loads the model and draws what they ask for."""
    args = parse(sys.argv[1:])
    if rank_and_world_size()[1] > 1 and not args.npz:
        raise UserError("only --npz uses several processes; start this without torchrun")
    if args.out:
        refuse_existing(args.out, ".png")
    args.out = args.out or Path("out/samples.png")  # which is replaced

    # The model, its codec, and how to sample.
    device = pick_device(args.device)
    if args.precision == "tf32":
        torch.set_float32_matmul_precision("high")  # not of convolutions, those of the VAE
    checkpoint = load_checkpoint(args.ckpt)  # on the CPU
    model = load_model(checkpoint, device)
    codec = load_codec(args.vae or checkpoint["codec"], device, checkpoint)
    sampler = Sampler("euler" if args.steps else "dopri5", args.steps or 50, args.seed)

    # The classes, and the guidance of each stage: section 3.3 leaves stage 1 unguided.
    names = checkpoint["classes"]  # with --class-groups, the groups' names
    default = range(len(names) if args.npz else min(10, len(names)))
    args.classes = parse_classes(args.classes, names) if args.classes else [*default]
    stages = args.stages or (2 if model.config.N else 1)
    if args.cfg and stages == 1:
        raise UserError("--cfg is for stages with a prior; --cfg-stage1 guides stage 1")
    args.w = [args.cfg_stage1 or 1.0] + [args.cfg or model.config.w] * (stages - 1)

    given = (args, checkpoint, model, codec, sampler)
    if args.npz:
        with process_group(torch.device("cpu")):  # ranks share files, not tensors: gloo will do
            sample_set(*given)
    elif args.path:
        draw_path(*given)
    else:
        draw_samples(*given)


def draw_samples(args, checkpoint: dict, model: FiTv2 | DoD, codec: "Codec", sampler: Sampler):
    """Draws one seed's samples, a column for each class, in blocks of rows: stage 1; stage 1
    guided, nobody's prior; each later stage or, below an image of --prior, what it leads to."""
    y = torch.tensor(args.classes * (args.per_class or 4), device=model.device)
    draw = partial(generate, model, y, sampler=sampler, batch_size=args.batch_size)
    samples, _ = draw(1, [1.0]) if args.prior else draw(len(args.w), [1.0, *args.w[1:]])
    blocks = [("class\nw = 1", codec.decode(samples[0]))]

    # What a prior adds shows only beside the same model guided by its class. A model of one class
    # has no such guidance. CHOICE: w = 2 is best for assets/letters.pt; the paper has w = 1.
    w = args.cfg_stage1 or (2.0 if model.config.num_classes > 1 else 1.0)
    if w > 1:
        (z0,), _ = draw(1, [w])
        blocks.append((f"class, guided\nw = {w:g}", codec.decode(z0)))

    w = args.w[-1]
    for i, z0 in enumerate(samples[1:], 2):
        blocks.append((f"class and prior,\nguided: stage {i}\nw = {w:g}", codec.decode(z0)))
    for path in args.prior.split(",") if args.prior else []:
        image = open_image(path, checkpoint["image_size"], checkpoint["channels"])[None]
        prior = codec.encode(image).expand(len(y), -1, -1, -1)
        (z0,), _ = draw(1, [w], prior=prior)
        rows = [image.expand(len(args.classes), -1, -1, -1), codec.decode(z0).cpu()]
        blocks.append((f"class and prior\n{Path(path).name},\nw = {w:g}", torch.cat(rows)))
    draw_grid(args.out, blocks, [checkpoint["classes"][k] for k in args.classes])


def draw_path(args, checkpoint: dict, model: FiTv2 | DoD, codec: "Codec", sampler: Sampler) -> None:
    """Draws one image of the first class on its way, at the Euler steps of each stage: a row of
    x_t, and a row of the x_0 to which the velocity points from there."""
    steps = args.steps or 10
    path = []
    sampler = replace(sampler, solver="euler", steps=steps, path=path)
    y = torch.tensor(args.classes[:1], device=model.device)
    generate(model, y, len(args.w), args.w, sampler)
    blocks = []
    for i, w in enumerate(args.w):
        x_t, x_0 = zip(*path[i * steps : (i + 1) * steps], strict=True)  # each (1, C, H, W)
        for what, states in (("x_t", x_t), ("predicted x_0", x_0)):
            blocks.append((f"stage {i + 1}, w = {w:g}\n{what}", codec.decode(torch.cat(states))))
    draw_grid(args.out, blocks, [f"t = {1 - k / steps:.3g}" for k in range(steps)])


def sample_set(args, checkpoint: dict, model: FiTv2 | DoD, codec: "Codec", sampler: Sampler):
    """Draws --npz FILE.npz, images of the last stage for guided-diffusion's evaluator: arr_0 uint8
    (n, H, W, 3), arr_1 their classes; and a folder FILE of NUMBER-CLASS.png. Image n is a function
    of (seed, n). With --prior-data, its image shuffled_order(count)[n] is prior n, and gives the
    class; if it is the run's unchanged folder, held-out images come first. The folder FILE-priors
    gets the priors. Raises UserError if --prior-data has other classes."""
    if args.prior_data:
        names, files, labels = image_files(args.prior_data)
        if names != checkpoint["classes"]:
            raise UserError(f"--prior-data {args.prior_data} has other classes than {args.ckpt}")
        order = shuffled_order(len(files))[: args.number]
        y = [labels[i] for i in order]
    else:
        # CHOICE: the classes are random, as with SiT, FiTv2, DiT and ADM. The same number of each
        # class probably gives a lower FID.
        rngs = [np.random.default_rng((args.seed, LABEL_STREAM, n)) for n in range(args.number)]
        y = [args.classes[rng.integers(len(args.classes))] for rng in rngs]
    w = args.w[-1:] if args.prior_data else args.w  # given priors take one stage
    pictures = [f"{n:06}-{k}.png" for n, k in enumerate(y)]

    rank, ranks = rank_and_world_size()
    folder = args.npz.with_suffix("")
    priors = args.npz.with_name(f"{folder.name}-priors")
    if rank == 0:
        for path, suffix in ((args.npz, ".npz"), (folder, None), (priors, None)):
            refuse_existing(path, suffix)
    barrier()  # rank 0 has looked before any rank begins to write

    def save(images: Tensor, where: Path, chunk: range) -> None:
        where.mkdir(parents=True, exist_ok=True)
        for n, image in zip(chunk, images.cpu().expand(-1, 3, -1, -1), strict=True):  # RGB
            to_pil_image(image).save(where / pictures[n], compress_level=1)

    side = checkpoint["image_size"]
    prior = None
    chunks = [range(len(y))[i : i + args.batch_size] for i in range(0, len(y), args.batch_size)]
    for chunk in tqdm(chunks[rank::ranks], unit="chunk", disable=rank > 0):
        if args.prior_data:
            opened = [open_image(files[order[n]], side, checkpoint["channels"]) for n in chunk]
            images = torch.stack(opened)
            prior = codec.encode(images)
        labels = torch.tensor([y[n] for n in chunk], device=model.device)
        samples, nfe = generate(model, labels, len(w), w, sampler, chunk.start, prior, len(chunk))
        save(codec.decode(samples[-1]), folder, chunk)
        if args.prior_data:
            save(images, priors, chunk)
    barrier()  # until all files are there

    # The folder says how it was made. The .npz is made from its files, image by image: 50,000 of
    # 256 x 256 take 9.8 GB of memory.
    if rank == 0:
        facts = vars(args) | {"step": checkpoint["step"], "number": len(y), "w": w}
        evaluations = nfe[-1].double().mean().item()  # of v, last stage, rank 0's last chunk
        facts |= {"sampler": asdict(sampler), "evaluations": evaluations}
        (folder / "about.json").write_text(json.dumps(facts, indent=1, default=str))
        images = np.empty((len(y), side, side, 3), np.uint8)
        for i, picture in enumerate(pictures):
            images[i] = Image.open(folder / picture)
        with replacing(args.npz) as temporary:
            np.savez(temporary, arr_0=images, arr_1=np.array(y))
        print(f"wrote {len(y)} images to {args.npz} and {folder}")


# Defaults are shown in --help, and flags may not be abbreviated.
show_defaults = argparse.ArgumentDefaultsHelpFormatter
Parser = partial(argparse.ArgumentParser, formatter_class=show_defaults, allow_abbrev=False)


def bounded(kind: type, low: float, high: float = math.inf) -> Callable:
    """An argparse type: a finite number of `kind`, low <= number <= high."""

    def number(text: str):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text}: must lie between {low:g} and {high:g}")
        return value

    return number


def parse_classes(text: str, names: list[str]) -> list[int]:
    """ "cat,dog", or where no class has that name "207,360" -> numbers. UserError if unknown."""
    known = {str(k): k for k in range(len(names))} | {name: k for k, name in enumerate(names)}
    for word in text.split(","):
        if word not in known:
            raise UserError(f"class {word!r} is unknown; there are {', '.join(names[:20])} ...")
    return [known[word] for word in text.split(",")]


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags. Raises UserError for mistakes that would go unnoticed."""
    parser = Parser(description=__doc__.splitlines()[0])
    natural = bounded(int, 1)
    scale = bounded(float, 1)
    add = parser.add_argument
    add("--ckpt", default=str(SHIPPED), help="checkpoint of train.py")
    add("--classes", help="names or numbers, with commas; None: the first ten, in a set all")
    add("--stages", type=natural, help="None: 2; without LEM: 1")
    add("--cfg", type=scale, help="guidance with a prior; None: the model's own")
    add("--cfg-stage1", type=scale, help="class guidance; None: off; 2nd block of a grid: 2")
    add("--steps", type=natural, help="Euler steps in each stage; None: RK45, but 10 for --path")
    add("--batch-size", type=natural, default=256, help="images sampled at a time")
    add("--precision", choices=["fp32", "tf32"], default="fp32", help="tf32: faster, on NVIDIA")
    add("--per-class", type=natural, help="rows of each block of a grid; None: 4")
    add("--out", type=Path, help="image to write; None: out/samples.png, which is replaced")
    add("--seed", type=bounded(int, 0), default=0, help="the same seed draws the same images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--vae", help="where the checkpoint's VAE is now, if it has moved")

    # Instead of a grid. (torchrun would take --num for one of its own flags, hence --number.)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--path", action="store_true", help="one image of the first class, on its way to data")
    add("--prior", help="a.png,b.png: a block for each of your images, which is its prior")
    add("--npz", type=Path, help="FILE.npz: a set of samples, with a folder FILE; also by torchrun")
    add = parser.add_argument_group("sets of samples (--npz)").add_argument
    add("--number", type=natural, default=50_000, help="images in the set, at most all priors")
    add("--prior-data", type=Path, help="priors: images in a folder for each class")

    args = parser.parse_args(argv)
    if not args.npz and (args.prior_data or args.number != parser.get_default("number")):
        raise UserError("--number and --prior-data are for sets of samples: add --npz FILE.npz")
    if args.npz and args.out:
        raise UserError("--out is for a single picture; --npz names the files of a set")
    if args.per_class and (args.npz or args.path):
        raise UserError("--per-class is for grids, which --npz and --path do not draw")
    replaced = args.stages or args.classes or args.cfg_stage1
    if (args.prior and args.stages) or (args.prior_data and replaced):
        raise UserError("given priors take one stage, guided by --cfg; --prior-data gives classes")
    return args


# ------------------------------------------------------------------------------------------ images


def draw_grid(out: Path, blocks: list[tuple[str, Tensor]], titles: list[str]) -> None:
    """Writes images as in Fig. 5: labelled blocks of rows, a column for each title. blocks: (label,
    uint8 (n, channels, rows, columns)), row by row. Images below 64 pixels are enlarged."""
    grids = []
    factor = max(1, math.ceil(64 / blocks[0][1].shape[-1]))
    for _, images in blocks:
        images = images.cpu().repeat_interleave(factor, -2).repeat_interleave(factor, -1)
        grids.append(make_grid(images, nrow=len(titles), padding=4, pad_value=255))

    # Labels stand left of the images, titles above them.
    cell = (grids[0].shape[-1] - 4) // len(titles)  # an image and its margin
    font = ImageFont.load_default(size=max(12, min(24, cell // 5)))
    lines = "\n".join(label for label, _ in blocks).split("\n")
    left = 16 + round(max(font.getlength(line) for line in lines))
    top = 36  # room for the titles
    height = top + sum(grid.shape[1] + 8 for grid in grids)
    canvas = Image.new("RGB", (left + grids[0].shape[-1], height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((left + (column + 0.5) * cell, top / 2), title, "black", font, anchor="mm")
    for (label, _), grid in zip(blocks, grids, strict=True):
        draw.multiline_text((8, top), label, "black", font)
        canvas.paste(to_pil_image(grid), (left, top))
        top += grid.shape[1] + 8
    with replacing(out) as temporary:
        canvas.save(temporary)
    print(f"wrote {out}")


def image_files(folder: Path | str) -> tuple[list[str], list[str], list[int]]:
    """A folder that has a folder for each class -> the names of the classes, the image files, the
    class of each. Raises FileNotFoundError without images, UserError for those that are hidden."""
    root = str(Path(folder))  # without a slash at its end
    found = ImageFolder(root)
    files = [file for file, _ in found.samples]
    for file in files:
        if f"{os.sep}." in file[len(root) :]:  # .ipynb_checkpoints would become a class
            raise UserError(f"{file} is hidden; remove it from the images")
    return found.classes, files, found.targets


def load_image(path: str | Path, channels: int) -> Image.Image:
    """An image file -> grey for 1 channel, RGB for 3, upright. Raises UserError that names the file
    if it is broken, or has pixels of unknown range."""
    try:
        with Image.open(path) as image:
            image.load()  # reads the pixels, and so finds what is broken
            # CHOICE: cameras store which side is up. ADM's code ignores it.
            ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # Pillow raises a dozen kinds for broken files
        raise UserError(f"{path} is not a readable image ({error})") from None

    # What is transparent becomes white, and 16-bit grey, which convert() would clip, becomes 8-bit.
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode[0] in "IF":
        pixels = np.array(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise UserError(f"{path} has pixels of unknown range; save it with 8 or 16 bits")
        image = Image.fromarray((pixels // 257).astype(np.uint8))  # 65535 = 257 * 255
    return image.convert({1: "L", 3: "RGB"}[channels])


def open_image(path: str | Path, size: int, channels: int) -> Tensor:
    """An image file -> uint8 (channels, size, size): the square in its middle, cut exactly as by
    ADM's center_crop_arr (guided-diffusion). Raises UserError for an unreadable file."""
    # The shorter side is halved while it is twice too long, then resized to `size`.
    image = load_image(path, channels)
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.BOX)
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    left, top = [(side - size) // 2 for side in image.size]
    return pil_to_tensor(image.crop((left, top, left + size, top + size)))


class Codec:
    """Images <-> latents: Stable Diffusion's VAE (section 3.3), diffusers' AutoencoderKL,
    256 x 256 x 3 <-> 32 x 32 x 4. With vae = None the latent is the image itself, in [-1, 1].
    CHOICE: it is ft-EMA's (README), in fp32 (in training TF32), and training takes samples."""

    def __init__(self, name: str = "none", vae: nn.Module | None = None):
        self.name = name
        self.vae = vae
        # What the VAE encodes is multiplied by `scale`, after `shift` has been subtracted.
        self.scale = float(vae.config.scaling_factor) if vae else 1.0  # 0.18215 for the paper's VAE
        self.shift = float(vae.config.get("shift_factor") or 0) if vae else 0.0

    def latent_shape(self, channels: int, size: int) -> tuple[int, int]:
        """Channels and side of the latents of square images. UserError if they do not fit."""
        if self.vae is None:
            return channels, size
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)  # all levels but one halve
        if channels != 3 or size % factor:
            raise UserError(f"--vae {self.name} needs 3 channels and a multiple of {factor} pixels")
        return self.vae.config.latent_channels, size // factor

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Images, uint8 (B, channels, height, width), or their moments from a cache -> (B, 2, C, H,
        W), mean and deviation of the latent's distribution given the image, in fp32."""
        if images.dtype != torch.uint8:
            return images
        if self.vae is None:  # an image has exactly one latent
            mean = images.float() / 127.5 - 1
            return torch.stack([mean, torch.zeros_like(mean)], dim=1)
        moments = []
        for part in images.split(32):  # encoding takes much memory
            posterior = self.vae.encode(part.to(self.vae.device) / 127.5 - 1).latent_dist
            moments.append(torch.stack([posterior.mean - self.shift, posterior.std], dim=1))
        # The scaling factor brings latents to a standard deviation near 1, that of the noise.
        return self.scale * torch.cat(moments)

    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor:
        """The mean, or with standard normal eps (B, C, H, W) a sample of that distribution."""
        mean, std = self.moments(images).unbind(1)
        return mean if eps is None else mean + std * eps

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> uint8 (B, channels, height, width), the inverse of encode. Raises
        FloatingPointError for latents that are not finite, which would become black pixels."""
        images = []
        for part in latents.split(32):  # decoding takes much memory
            if self.vae is not None:
                part = self.vae.decode(part.to(self.vae.device) / self.scale + self.shift).sample
            if not torch.isfinite(part).all():
                raise FloatingPointError("an image is not finite; are the weights damaged?")
            # 128 = 127.5 + 0.5, which rounds, since byte() truncates.
            images.append((127.5 * part.float() + 128).clamp(0, 255).byte())
        return torch.cat(images)


def load_codec(name: str, device: torch.device | str = "cpu", trained: dict | None = None) -> Codec:
    """The codec that --vae names: "none", a folder, or a name on the hub. UserError if a VAE is not
    whole, or has another scale or shift than the checkpoint `trained`, whose VAE may have moved."""
    vae = None
    if name != "none":
        from diffusers import AutoencoderKL

        options = {"low_cpu_mem_usage": False, "output_loading_info": True}
        try:
            vae, found = AutoencoderKL.from_pretrained(name, **options)
        except OSError as error:
            raise UserError(f"--vae {name} is no folder, nor found on the hub ({error})") from None
        if found["missing_keys"]:
            raise UserError(f"--vae {name} lacks weights, such as {found['missing_keys'][0]}")
        vae = vae.to(device).eval().requires_grad_(False)
    codec = Codec(name, vae)
    if trained and (codec.scale, codec.shift) != (trained["scale"], trained["shift"]):
        raise UserError(f"--vae {name} has another scale or shift than the VAE of the checkpoint")
    return codec


# ------------------------------------------------------------------ checkpoints, files, processes

SHIPPED = Path(__file__).parent / "assets/letters.pt"  # EMA weights trained on letters


def load_checkpoint(path: Path | str) -> dict:
    """ckpt.pt or a milestone of train.py: a plain dict of tensors, numbers, strings and lists. A
    pickle that carries code is refused. Raises UserError that names the file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        version = checkpoint["format"]
    except Exception as error:  # no such file, a bad zip, a bad pickle, code in a pickle, ...
        raise UserError(f"{path} is no checkpoint of train.py: {type(error).__name__}") from None
    if version != "dod-4":
        raise UserError(f"{path} has the format {version} of another version; here it is dod-4")
    return checkpoint


def save_checkpoint(path: Path, facts: dict, step: int, modules: dict) -> None:
    """Writes a checkpoint, whole or not at all. modules: ema and, for resuming, model, optimizer.
    Raises UserError if the disk is full."""
    states = {name: module.state_dict() for name, module in modules.items()}
    with replacing(path) as temporary:
        torch.save({"format": "dod-4", "step": step, **facts, **states}, temporary)


def load_model(checkpoint: dict, device: torch.device | str = "cpu") -> FiTv2 | DoD:
    """The EMA model of a checkpoint, ready to sample from, in fp32."""
    model = build_model(Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["ema"])
    return model.to(device).eval()


def shuffled_order(count: int) -> np.ndarray:
    """The order in which `count` images of a data set are split; train.py holds out the first."""
    return np.random.default_rng(0).permutation(count)


def refuse_existing(path: Path | str, suffix: str | None = None) -> None:
    """Nothing that the user names is overwritten. Checked before any work; raises UserError."""
    if Path(path).exists():
        raise UserError(f"{path} exists already; give another name")
    if suffix and Path(path).suffix != suffix:
        raise UserError(f"{path} should end in {suffix}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name, in each rank another one; what is written there takes the place of
    `path`, whole or never. Raises UserError if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".dod{rank_and_world_size()[0]}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the content reaches the disk before the name does
        os.replace(temporary, path)  # atomic
    except (OSError, RuntimeError) as error:
        # torch.save's writer, in inline_container.cc, does not say that the disk is full.
        if "inline_container" not in str(error) and getattr(error, "errno", 0) != errno.ENOSPC:
            raise
        raise UserError(f"could not write {path}, is the disk full? ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks: torchrun's RANK and WORLD_SIZE, else 0 and 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the other ranks, if there are any: through NCCL between GPUs, else through gloo."""
    if rank_and_world_size()[1] > 1:
        gpu = device if device.type == "cuda" else None
        # The timeout leaves rank 0 the time to draw and to save, while the others wait.
        dist.init_process_group("nccl" if gpu else "gloo", None, timedelta(hours=2), device_id=gpu)
    yield
    # Not in a `finally`: after an error there is nobody to wait for.
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for the other ranks, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU, if any, and with torchrun each rank's own. Raises
    UserError if it is not available."""
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
        message = f"out of memory; a lower --batch-size, if there is one, may help ({error})"
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)  # like argparse, for a mistake of the user


if __name__ == "__main__":
    run_command(main)
