"""sample.py -- multi-stage sampling, with its codec, checkpoints, grids. Section 3.2, Fig. 3a.

    stage 1   z_0^1 from noise, given the class                           Eq. 5, i = 1: S, no prior
    stage i   z_0^i from fresh noise, given the class and LEM(z_0^(i-1))  Eq. 5, i > 1; guided

Each stage is a complete run of the same model from t = 1 (noise) to t = 0 (data). An image's noise
is a function of (seed, image number, stage), and the solver treats each image alone: a number is
the same picture in any batch and on any number of processes, up to floating-point order.

Shapes: B images, C channels, H x W latent, K classes; pictures: uint8 (B, channels, rows, columns).

    python sample.py --ckpt out/letters/ckpt.pt --classes A-J --stages 3 --out grid.png
    python sample.py --ckpt out/letters/ckpt.pt --prior picture.png --out variations.png
    torchrun --nproc-per-node 8 sample.py --ckpt ckpt.pt --npz samples.npz    # 50,000
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import time
import zipfile
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

# ------------------------------------------------------------------------------ commands and files


class Parser(argparse.ArgumentParser):
    """Strict argparse: defaults in --help, no abbreviated flags, one-line errors, exit status 2."""

    def __init__(self, description: str):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least(kind: type, low: float, high: float = float("inf")) -> Callable:
    """An argparse type: a finite number of `kind`, low <= number <= high."""

    def number(text: str):
        value = kind(text)
        if not (low <= value <= high and abs(value) < float("inf")):
            to = f" and at most {high:g}" if high < float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low:g}{to}")
        return value

    number.__name__ = kind.__name__
    return number


def run_command(main: Callable[[], None]) -> None:
    """Runs a script's main(). What the user can mend becomes one line on stderr, exit status 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        message, (rank, size) = explain(error), processes()
        if not message:
            raise
        sys.stdout.flush()
        where = f"process {rank}: " if rank else ""
        print(f"{Path(sys.argv[0]).name}: error: {where}{message}", file=sys.stderr, flush=True)
        if size > 1:
            os._exit(2)  # at once: an orderly exit might wait for the other processes
        sys.exit(2)


def explain(error: Exception) -> str | None:
    """What the user can mend, in a line; None for a bug of ours."""
    text = " ".join(str(error).rpartition("UserError: ")[2].split())  # also of a loader's process
    if isinstance(error, MemoryError) or re.search("(out of|allocate) memory", text):
        less = "lower --batch-size; in training, raise --grad-accum or use --grad-checkpoint"
        return f"out of memory ({text[:300]}); {less}"
    if not isinstance(error, RuntimeError) or "UserError: " in str(error):
        return text
    if isinstance(error, dist.DistError) or "gloo" in text or "by peer" in text:
        return f"{text[:300]} (perhaps another process has ended)"
    return None


def remove_remains(folder: Path) -> None:
    """Removes what `replacing` left in a folder of ours when it was killed."""
    for file in Path(folder).glob(".*.tmp.*"):
        file.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name; what is written there takes the place of `path` if all goes well.

    Raises UserError if it cannot be written, say to a full disk; an earlier `path` is then intact.
    """
    path, mine = Path(path), f"{processes()[0]}-{os.getpid()}"  # on a shared disk too
    temporary = path.with_name(f".{path.stem}.{mine}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before the name is
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        if "CUDA" in str(error):
            raise
        what = f"could not write {path} ({error}); what was there is kept"
        raise UserError(f"{what}; is there room?") from None
    finally:
        temporary.unlink(missing_ok=True)


def compare_note(note: Path, about: dict) -> None:
    """Raises UserError if the note of an earlier run is there, and damaged or of another run."""
    try:
        then = json.loads(note.read_text()) if note.exists() else about
    except ValueError:
        raise UserError(f"{note} is damaged; remove {note.parent}") from None
    differ = [key for key in about if then.get(key) != about[key]]
    if differ:
        advice = "repeat its flags, remove it or give another name"
        raise UserError(f"{note.parent} is of another {differ[0]}; {advice}")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises UserError when `path` is a folder, or exists and may not be replaced."""
    if Path(path).is_dir() or (Path(path).exists() and not overwrite):
        raise UserError(f"{path} exists; give another name, or --overwrite to replace a file")


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA where there is one, else Apple's MPS, else the CPU. Each of torchrun's
    processes on a machine takes a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if name == "cpu" and torch.backends.mps.is_available() else name
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name} is not available here; try --device cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    return device


# --------------------------------------------------------------------------------------- processes


def processes() -> tuple[int, int]:
    """This process's number and their count: torchrun's RANK and WORLD_SIZE, else 0 and 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the other processes, if there are any: by NCCL between GPUs, else by gloo. If one
    fails, torchrun ends them all; so they may wait long for a slower one's share of the work."""
    if processes()[1] > 1:
        gpu = device if device.type == "cuda" else None
        backend, patience = ("nccl", timedelta(hours=2)) if gpu else ("gloo", timedelta(days=1))
        dist.init_process_group(backend, timeout=patience, device_id=gpu)
    yield
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def wait() -> None:
    """Waits for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------- pictures <-> latents


def open_picture(path: Path) -> Image.Image:
    """A picture file, turned as its EXIF says (ADM does not). UserError names an unreadable one."""
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file)
    except Exception as error:  # Pillow raises a dozen kinds for broken files
        raise UserError(f"{path} is not a readable picture ({error})") from None


def fit_picture(image: Image.Image, size: int, channels: int) -> torch.Tensor:
    """-> uint8 (channels, size, size), grey for 1 channel, RGB for 3; resized and centre-cropped.

    As ADM does: halved by a box filter while at least twice too large, then bicubic, then cropped.
    """
    if image.mode.startswith("I;16"):  # 16-bit grey, which convert() would clip at 255
        image = Image.fromarray((np.array(image) // 257).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).reshape(size, size, channels).permute(2, 0, 1).contiguous()


class Codec:
    """Pictures <-> latents. This one works in pixel space: the latent is the picture in [-1, 1]."""

    name, scale = "none", 1.0

    def latent_shape(self, channels: int, size: int) -> tuple[int, int]:
        """Channels and side of the latents of square pictures. UserError if they do not fit."""
        return channels, size

    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (B, channels, height, width) -> mean and standard deviation, (B, C, H, W), of the
        latent's distribution given the picture, in fp32."""
        mean = images.float() / 127.5 - 1
        return mean, torch.zeros_like(mean)

    def encode(self, images: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """The mean, or with standard normal eps (B, C, H, W) a sample of that distribution."""
        mean, std = self.moments(images)
        return mean if eps is None else mean + std * eps

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """float (B, C, H, W) -> uint8 (B, channels, height, width); inverse of encode."""
        return (127.5 * latents.float() + 128).clamp(0, 255).byte()


class VAE(Codec):
    """Stable Diffusion's VAE (section 3.3), of diffusers: AutoencoderKL, or AutoencoderTiny, whose
    posterior is a point. 256 x 256 x 3 pictures -> 32 x 32 x 4 latents, 32 pictures at a time, on a
    GPU in bf16. CHOICE: which of its versions the paper does not say; the README's is ft-EMA."""

    def __init__(self, name: str, device: torch.device):
        self.name = str(Path(name).absolute()) if Path(name).is_dir() else name
        try:
            import diffusers

            config = diffusers.AutoencoderKL.load_config(name)
            kind = {"AutoencoderTiny": diffusers.AutoencoderTiny}
            kind = kind.get(config["_class_name"], diffusers.AutoencoderKL)
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            vae = kind.from_pretrained(name, torch_dtype=dtype, low_cpu_mem_usage=False)
        except Exception as error:  # no package, no network, no such name, no weights in the folder
            reason = " ".join(str(error).split())[:120]
            advice = "give a name on the Hugging Face Hub or a folder made by save_pretrained"
            raise UserError(f"VAE {name} cannot be loaded ({reason}); {advice}") from None
        self.vae, config = vae.to(device).eval().requires_grad_(False), vae.config
        self.scale, self.shift = config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
        self.channels = config.latent_channels
        blocks = getattr(config, "encoder_block_out_channels", None) or config.block_out_channels
        self.factor = 2 ** (len(blocks) - 1)

    def latent_shape(self, channels: int, size: int) -> tuple[int, int]:
        if channels != 3 or size % self.factor:
            need = f"3 channels and a multiple of {self.factor} pixels"
            raise UserError(f"{channels} channels of {size} pixels; VAE {self.name} needs {need}")
        return self.channels, size // self.factor

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means, stds = [], []
        for part in images.split(32):
            found = self.vae.encode((part.to(self.vae.device) / 127.5 - 1).to(self.vae.dtype))
            point = hasattr(found, "latents")
            mean = (found.latents if point else found.latent_dist.mean).float()
            std = torch.zeros_like(mean) if point else found.latent_dist.std.float()
            means.append(self.scale * (mean - self.shift))
            stds.append(self.scale * std)
        return torch.cat(means), torch.cat(stds)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        parts = (part.to(self.vae.device, self.vae.dtype) for part in latents.split(32))
        images = (self.vae.decode(part / self.scale + self.shift).sample for part in parts)
        return torch.cat([super(VAE, self).decode(part) for part in images])


def load_codec(name: str, device: torch.device | str = "cpu") -> Codec:
    """The codec that --vae or a checkpoint names; 'none' is pixel space. Raises UserError."""
    return Codec() if name == "none" else VAE(name, torch.device(device))


# ------------------------------------------------------------------------------------- checkpoints


def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint of train.py: a plain dict of tensors, numbers, strings and lists.

    weights_only=True: a pickle that carries code is refused, and nothing in it runs. Raises
    UserError if the file is missing, truncated or something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if checkpoint["format"] != "dod-1" or not {"ema", "classes"} <= {*checkpoint}:
            raise ValueError
        Config(**checkpoint["config"])
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; train.py makes one") from None
    except Exception as error:  # a bad zip, a bad pickle, code in a pickle, no such key, ...
        kind = type(error).__name__
        raise UserError(f"{path} is not a (whole) checkpoint of train.py: {kind}") from None
    return checkpoint


def load_model(checkpoint: dict, device: torch.device | str = "cpu") -> DoD:
    """The EMA model of a checkpoint, ready to sample from."""
    model = DoD(Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["ema"])
    return model.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------- multi-stage sampling


def noise(shape: tuple[int, ...], seed: int, numbers: range, stage: int) -> torch.Tensor:
    """z_1^i: standard normal (len(numbers), *shape), image n's a function of (seed, n, stage)."""
    # 2 keeps these streams of a seed apart from the others: 0 and 1 in train.py, 3 in label().
    rngs = [np.random.default_rng((seed, 2, n, stage)) for n in numbers]
    return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))


def sample_stage(model, z1, y, e_s, w, guide_on, solver, steps):
    """One stage of Fig. 3a, Eq. 4: noise z1 -> sample z0 (B, C, H, W), evaluations per image (B,).

    y (B,) classes; e_s (B, T, d) visual prior, or None (S). With guidance w > 1 an evaluation runs
    the network twice, each half with its cheapest modulation: v_c = v(class, e_s), and v_u = v(null
    class, S). CHOICE: the paper does not say what v_u lacks; with guide_on = "prior" it keeps the
    class, v(class, S).
    """
    y_u = y if guide_on == "prior" and e_s is not None else torch.full_like(y, model.null_class)

    def velocity(x, t, rows):
        v_c = model(x, t, y[rows], None if e_s is None else e_s[rows]).to(x.dtype)
        return v_c if w == 1 else guide(v_c, model(x, t, y_u[rows]).to(x.dtype), w)

    return euler(velocity, z1, steps) if solver == "euler" else dopri5(velocity, z1)


@torch.no_grad()
def generate(
    model: DoD,
    y: torch.Tensor,
    stages: int = 2,
    cfg: float | list[float] | None = None,
    guide_on: str = "both",
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

    cfg          guidance w >= 1: one per stage, or one number for all that have a prior (others:
                 1); None: the model's
    guide_on     "both": the unguided half lacks class and prior; "prior": it keeps the class
    solver       "dopri5" (adaptive, image by image) or "euler" (`steps` steps)
    seed, start  image b is image number start + b of this seed
    prior        (B, C, H, W) latents that serve stage 1 as a previous stage's samples
    nfe          a list; each stage appends its evaluations per image (B,)
    Raises UserError for a guidance below 1 or not one per stage, and for priors without a LEM.
    """
    config = model.config
    w = config.cfg if cfg is None else cfg
    if not isinstance(w, (list, tuple)):
        w = [1.0 if i == 0 and prior is None else w for i in range(stages)]
    if (stages > 1 or prior is not None) and not config.N:
        raise UserError("this model is a plain FiTv2 without LEM: it has stage 1 only")
    if len(w) != stages or min(w) < 1:
        raise UserError(f"guidance {w} for {stages} stages; each stage needs one w >= 1 (1: off)")
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    samples, evaluations = ([[] for _ in w] for _ in range(2))
    with tqdm(total=len(y) * stages, desc="sampling", disable=not progress, leave=False) as bar:
        for first in range(0, len(y), batch_size):
            rows = slice(first, first + batch_size)
            z0, b = None if prior is None else prior[rows].to(y.device), len(y[rows])
            for i in range(stages):
                z1 = noise(shape, seed, range(start + first, start + first + b), i).to(y.device)
                e_s = None if z0 is None else model.visual_prior(z0)  # once per stage
                z0, n = sample_stage(model, z1, y[rows], e_s, w[i], guide_on, solver, steps)
                samples[i].append(z0)
                evaluations[i].append(n)
                bar.update(b)
    if nfe is not None:
        nfe.extend(torch.cat(n) for n in evaluations)
    return [torch.cat(z0) for z0 in samples]


# ------------------------------------------------------------------------------------------- grids


def draw_grid(blocks: list[tuple[str, torch.Tensor]], titles: list[str]) -> Image.Image:
    """Pictures in labelled blocks of rows, as in Fig. 5: a block per stage, a column per title.

    blocks: (label, uint8 (n, channels, rows, columns)), n a multiple of len(titles), row by row.
    Small pictures are enlarged, without smoothing, by a whole factor to at least 64 pixels.
    """
    height, width = blocks[0][1].shape[-2:]
    zoom = max(1, -(-64 // width))
    cell_w, cell_h = width * zoom + 4, height * zoom + 4
    font = ImageFont.load_default(size=max(12, min(24, cell_h // 5)))
    words = [line for label, _ in blocks for line in label.split("\n")]
    left, top = 16 + round(max(font.getlength(line) for line in words)), 36
    heights = [len(images) // len(titles) * cell_h + 12 for _, images in blocks]
    canvas = Image.new("RGB", (left + len(titles) * cell_w, top + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        fitting = next(k for k in range(len(title), -1, -1) if font.getlength(title[:k]) <= cell_w)
        place = (left + (column + 0.5) * cell_w, top / 2)
        draw.text(place, title[:fitting], "black", font, anchor="mm")
    for (label, images), block_height in zip(blocks, heights, strict=True):
        draw.multiline_text((8, top), label, "black", font)
        for i, image in enumerate(images.cpu()):
            tile = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
            tile = tile.resize((width * zoom, height * zoom), Image.NEAREST)
            row, column = divmod(i, len(titles))
            canvas.paste(tile, (left + column * cell_w, top + row * cell_h))
        top += block_height
    return canvas


# ---------------------------------------------------------------------------- samples by thousands


def sample_set(args, model: DoD, codec: Codec, classes: list[int], settings: dict) -> None:
    """--num pictures of the last stage -> --npz, as guided-diffusion's evaluator reads it (arr_0
    uint8 (n, H, W, 3), arr_1 labels), and --png-dir, files NUMBER-CLASS.png.

    Chunks of --batch-size consecutive numbers are shared by the processes. Each appears whole in a
    folder beside the output, so a run that was killed goes on with what is missing; and the result
    does not depend on the number of processes. settings: generate's.
    """
    (rank, size), b = processes(), args.batch_size
    parts = Path(f"{args.npz or args.png_dir}.parts")
    how, note = describe(args, model, codec, classes, settings), parts / "how.json"
    compare_note(note, how)
    starts = range(0, args.num, b)
    files = {first: parts / f"{first:06}.npy" for first in starts}
    missing = [first for first in starts if not files[first].exists()]
    wait()  # all have looked before one begins to write
    if rank == 0 and args.png_dir:
        remove_remains(args.png_dir)
    wait()
    with replacing(note) as temporary:
        temporary.write_text(json.dumps(how))
    y = torch.tensor([label(n, classes, args.labels, args.seed) for n in range(args.num)])
    with tqdm(total=args.num, unit="picture", disable=rank > 0) as bar:
        bar.update(max(0, args.num - len(missing) * b))  # done by an earlier run
        for first in missing[rank::size]:
            rows = y[first : first + b].to(model.cos.device)
            z0 = generate(model, rows, **settings, start=first, batch_size=b)[-1]
            images = codec.decode(z0).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)  # grey -> RGB
            with replacing(files[first]) as temporary, temporary.open("wb") as stream:
                np.save(stream, images.cpu().numpy())
            bar.update(min(b * size, args.num - bar.n))
    wait()
    for first in starts[rank::size] if args.png_dir else ():
        for n, pixels in enumerate(np.load(files[first]), start=first):
            with replacing(Path(args.png_dir) / f"{n:06}-{y[n]}.png") as temporary:
                Image.fromarray(pixels).save(temporary)
    wait()
    if rank == 0:
        if args.npz:
            write_npz(parts / "whole.npz", [*files.values()], y.numpy())
            os.replace(parts / "whole.npz", args.npz)
        shutil.rmtree(parts)
        print(f"wrote {args.num} pictures to {args.npz or args.png_dir}")


def describe(args, model: DoD, codec: Codec, classes: list[int], settings: dict) -> dict:
    """All that a set of samples depends on."""
    weights = b"".join(p.flatten()[:999].cpu().numpy().tobytes() for p in model.parameters())
    how = settings | {"num": args.num, "batch_size": args.batch_size, "labels": args.labels}
    how |= {"classes": classes, "codec": codec.name, "precision": args.precision}
    return how | {"weights": hashlib.sha256(weights).hexdigest()}


def label(n: int, classes: list[int], how: str, seed: int) -> int:
    """The class of picture n: each in turn, or random by (seed, n)."""
    rng = np.random.default_rng((seed, 3, n))
    return classes[n % len(classes) if how == "balanced" else rng.integers(len(classes))]


def write_npz(path: Path, files: list[Path], y: np.ndarray) -> None:
    """Joins .npy files into arr_0 of an .npz, one at a time: 50,000 pictures are 9.8 GB."""
    first = np.load(files[0], mmap_mode="r")
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(y), *first.shape[1:])}
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for file in files:
                stream.write(np.load(file).tobytes())
        with archive.open("arr_1.npy", "w") as stream:
            np.save(stream, y)


def benchmark(args, model: DoD, classes: list[int], settings: dict) -> None:
    """Prints images/s of all stages, for both solvers: medians of 3 batches after a first one."""
    y = torch.tensor([classes[n % len(classes)] for n in range(args.batch_size)])
    print(f"{settings['stages']} stages, w = {settings['cfg']}, {len(y)} pictures at a time")
    for solver in ("euler", "dopri5"):
        times, case = [], settings | {"solver": solver, "batch_size": len(y)}
        for _ in range(4):
            began, nfe = time.perf_counter(), []
            generate(model, y.to(model.cos.device), **case, nfe=nfe)[-1].cpu()  # waits for a GPU
            times.append(time.perf_counter() - began)
        spent = ", ".join(f"{n.double().mean():.1f}" for n in nfe)
        rate = len(y) / np.median(times[1:])
        print(f"{solver:8}{rate:9.2f} images/s   evaluations per picture and stage: {spent}")


# -------------------------------------------------------------------------------- the command


def parse_classes(text: str, names: list[str]) -> list[int]:
    """'A-J', '0-9', 'cat,dog', '207,360', 'A-C,F' -> class numbers; a name goes before a number."""

    def number(word: str) -> int | None:
        if word in names:
            return names.index(word)
        return int(word) if word.isdecimal() and int(word) < len(names) else None

    chosen = []
    for word in (word.strip() for word in text.split(",")):
        cuts = [i for i, letter in enumerate(word) if letter == "-"]
        spans = [(word, word)] + [(word[:i], word[i + 1 :]) for i in cuts]
        spans = [(number(first), number(last)) for first, last in spans]
        span = next((s for s in spans if None not in s and s[0] <= s[1]), None)
        if span is None:
            known = ", ".join(names[:12]) + ", ..." * (len(names) > 12)
            advice = "give names, numbers, ranges like 0-3, with commas between"
            raise UserError(f"class {word!r} is unknown; there are {known}; {advice}")
        chosen += range(span[0], span[1] + 1)
    return chosen


def scales(text: str) -> list[float]:
    """An argparse type: guidance scales, each at least 1, with commas between."""
    return [at_least(float, 1)(word) for word in text.split(",")]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("Samples from a checkpoint, stage by stage, into a labelled picture or a set.")
    add, natural, switch = parser.add_argument, at_least(int, 1), argparse.BooleanOptionalAction
    # fmt: off
    add("--ckpt", required=True, help="checkpoint of train.py")
    add("--classes", help="names, numbers, ranges: A-J or 0-9 or cat,dog; unset: ten, in sets all")
    add("--per-class", type=natural, default=4, help="pictures of each class")
    add("--stages", type=natural, help="1: no prior; unset: 2, without LEM 1")
    add("--cfg", type=scales, help="w of stages 2, 3, ..., of --prior's blocks; unset: the model's")
    add("--cfg-stage1", type=at_least(float, 1), default=1.0, help="of stage 1; 1: off")
    add("--guide-on", choices=["both", "prior"], default="both", help="what v_u lacks")
    add("--solver", choices=["dopri5", "euler"], default="dopri5", help="RK45 or Euler's method")
    add("--steps", type=natural, help="Euler steps per stage; unset: 50")
    add("--prior", help="a picture of yours as the visual prior: variations of it")
    add("--seed", type=at_least(int, 0, 2**63), default=0, help="same seed, same pictures")
    add("--batch-size", type=natural, default=256, help="pictures at a time")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: faster, for Euler")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--vae", help="where the checkpoint's VAE is now; unset: where it was")
    add("--out", default="samples.png", help="picture to write")
    add("--npz", help="a set instead: file for guided-diffusion's evaluator; also with torchrun")
    add("--png-dir", help="a set instead: folder for PNG files; also with torchrun")
    add("--num", "--number", type=natural, default=50_000, help="pictures of a set")
    add("--labels", choices=["balanced", "random"], default="balanced", help="classes of a set")
    add("--overwrite", action=switch, default=False, help="replace --out, --npz")
    add("--benchmark", action="store_true", help="images/s of --batch-size pictures")
    # fmt: on
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for flags that contradict each other or the files that are there."""
    many = args.npz or args.png_dir
    if processes()[1] > 1 and not many:
        raise UserError("several processes are for sets of samples: --npz, --png-dir")
    if many and (args.prior or args.benchmark):
        raise UserError("--npz and --png-dir exclude --prior and --benchmark")
    if args.steps and args.solver != "euler" and not args.benchmark:
        raise UserError("--steps is for --solver euler; dopri5 finds its own steps")
    if not many and Path(args.out).suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--out {args.out} does not end as a picture does; try {args.out}.png")
    if args.npz and Path(args.npz).suffix != ".npz":
        raise UserError(f"--npz {args.npz} does not end in .npz; try {args.npz}.npz")
    if args.npz or not (many or args.benchmark):
        refuse_existing(args.npz or args.out, args.overwrite)
    if args.png_dir and Path(args.png_dir).exists() and any(Path(args.png_dir).iterdir()):
        if not Path(f"{args.npz or args.png_dir}.parts").exists():
            raise UserError(f"--png-dir {args.png_dir} is not empty; give another folder")


def grid(args, model, codec, names, classes, settings, prior: torch.Tensor | None) -> None:
    """Draws --out: a block of pictures for each stage, or of variations of a prior for each w."""
    device, began, nfe, blocks = model.cos.device, time.time(), [], []
    y = torch.tensor(classes * args.per_class, device=device)
    titles = [names[k] for k in classes] * (args.per_class if len(classes) == 1 else 1)
    rest = dict(batch_size=args.batch_size, progress=True, nfe=nfe)
    if prior is None:
        samples = generate(model, y, **settings, **rest)
        labels = [f"stage {i + 1}\nw = {w:g}" for i, w in enumerate(settings["cfg"])]
    else:
        z0 = codec.encode(prior[None].to(device)).expand(len(y), -1, -1, -1)
        blocks, labels, samples = [("yours", codec.decode(z0[: len(titles)]))], [], []
        for w in args.cfg or [model.config.cfg]:
            case = settings | {"stages": 1, "cfg": [w]}
            samples += generate(model, y, **case, **rest, prior=z0)
            labels.append(f"w = {w:g}")
    blocks += [(text, codec.decode(z)) for text, z in zip(labels, samples, strict=True)]
    with replacing(args.out) as temporary:
        draw_grid(blocks, titles).save(temporary)
    spent = ", ".join(f"{n.double().mean():.1f}" for n in nfe)
    print(f"wrote {args.out}: {len(y)} pictures per block in {time.time() - began:.1f} s")
    print(f"evaluations per picture: {spent}")


def main() -> None:
    args = parse(sys.argv[1:])
    check(args)
    checkpoint, device = load_checkpoint(args.ckpt), pick_device(args.device)
    model = load_model(checkpoint, device)
    codec = load_codec(args.vae or checkpoint["codec"], device)
    config, names = model.config, [*checkpoint["classes"], ""]  # the last is the null class
    stages = args.stages or (2 if config.N else 1)
    if args.prior is None and len(args.cfg or []) > max(1, stages - 1):
        raise UserError(f"--cfg has {len(args.cfg)} values for {stages - 1} stages with a prior")
    w = args.cfg or [config.cfg]
    settings = {"stages": stages, "cfg": [args.cfg_stage1, *w, *w[-1:] * stages][:stages]}
    settings |= {"guide_on": args.guide_on, "solver": args.solver}
    settings |= {"steps": args.steps or 50, "seed": args.seed}
    many, classes = args.npz or args.png_dir, [*range(config.num_classes)]
    classes = [model.null_class] if args.prior else classes if many else classes[:10]
    if args.classes is not None:
        classes = parse_classes(args.classes, names[:-1])
    prior = args.prior
    if prior is not None:
        prior = fit_picture(open_picture(prior), checkpoint["image_size"], checkpoint["channels"])
    with (
        process_group(torch.device("cpu")),  # they share files, not tensors
        torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"),
    ):
        if many:
            sample_set(args, model, codec, classes, settings)
        elif args.benchmark:
            benchmark(args, model, classes, settings)
        else:
            grid(args, model, codec, names, classes, settings, prior)


if __name__ == "__main__":
    run_command(main)
