"""train.py -- end-to-end training of DoD: the step, the data, the run. Sections 3.3 and 4.1.

Backbone and LEM learn together, from real pictures alone: in training, a picture's own latent is
its visual prior, and a share p_s of each batch gets the sample token S instead.

Everything random is a function of (seed, step): it is drawn for the global batch, and each rank
takes its share. So the number of GPUs and --grad-accum change a result by rounding only, and a
resumed run needs no generator's state: on a CPU it equals an uninterrupted one bit for bit.

    python train.py                                    # DoD-Ti on grey letters; minutes on a CPU
    python train.py --prior-from patches               # the same without LEM: it copies its prior
    python train.py --data pictures/ --image-size 32   # yours: a folder of pictures for each class
    torchrun --nproc-per-node 8 train.py --data imagenet/train --model DoD-B \\
        --vae stabilityai/sd-vae-ft-ema --cache latents
"""

import argparse
import copy
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from flow import keeps_prior, logit_normal, rectified_flow_loss
from lem import ViTBlock
from model import CONFIGS, Block, Config, DoD, UserError
from sample import (
    Codec, Parser, at_least, claim_folder, draw_grid, fit_picture, generate, load_checkpoint,
    load_codec, locked, nonempty, open_picture, pick_device, process_group, processes, replacing,
    run_command, wait,
)  # fmt: skip

# ------------------------------------------------------------------- one step: sections 3.3 and 4.1


def draw_noise(seed, step, batch_size, config, class_dropout, generator):
    """All that is random about the images of a step, for the global batch, on the training device.

    -> x1 (B, C, H, W) noise; eps (B, C, H, W) for the VAE's posterior; t (B,) times; dropped (B,):
    which images lose their class. A function of (seed, step): the generator is seeded anew.
    """
    # SeedSequence turns (seed, step) into one number that is unrelated to that of the next step.
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    generator.manual_seed(int(state[0]))
    device = generator.device
    shape = (batch_size, config.latent_channels, config.latent_size, config.latent_size)

    # Drawn for the global batch, whatever share of it this rank has: all ranks draw the same.
    x1 = torch.randn(shape, generator=generator, device=device)
    eps = torch.randn(shape, generator=generator, device=device)
    t = logit_normal(batch_size, generator, device)  # Eq. 11

    # CHOICE: a class is dropped with probability 0.1, whether or not the prior is; the paper names
    # neither number nor rule.
    dropped = torch.rand(batch_size, generator=generator, device=device) < class_dropout
    return x1, eps, t, dropped


def training_step(
    network, ema, optimizer, scaler, batch, keep, step, dtype=None, ema_decay=0.999
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of this rank -> the loss of each image (b,) and the norm of the gradient ().

    network: a DoD, possibly inside DistributedDataParallel; batch: x0, x1 (b, C, H, W) latents and
    noise, t, y (b,) times and classes; keep[i]: which images of micro-batch i keep their prior, as
    indices; dtype: that of autocast, or None. Nothing in it waits for the GPU.
    """
    x0, x1, t, y = batch
    size = len(x0) // len(keep)  # of a micro-batch
    losses = []
    optimizer.zero_grad(set_to_none=True)
    for i, rows in enumerate(keep):
        micro = slice(i * size, (i + 1) * size)

        # The gradients of the micro-batches add up. DistributedDataParallel averages them over the
        # ranks once a step, in the last one.
        network.require_backward_grad_sync = i == len(keep) - 1

        # Eq. 3 trains backbone and LEM together: the prior of a picture is its own latent.
        with torch.autocast(x0.device.type, dtype, enabled=dtype is not None):
            loss = rectified_flow_loss(network, x0[micro], y[micro], x1[micro], t[micro], rows)

        # Divided by the number of micro-batches, their sum is the mean over the whole batch.
        scaler.scale(loss.mean() / len(keep)).backward()
        losses.append(loss.detach())

    # CHOICE: the gradient is clipped to norm 1; the paper names no clip. With fp16, the scaler
    # skips a step whose gradient has overflowed.
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()

    # What is sampled from, and reported, is the moving average of the weights.
    update_ema(ema, network, step, ema_decay)
    return torch.cat(losses), norm


def prepare_batch(x, y, share, step, args, config, codec, generator) -> tuple:
    """What training_step needs of this rank's images: x0, x1 (b, C, H, W), t, y (b,).

    x uint8 pictures (b, channels, rows, columns), or the cached moments of their latents
    (b, 2, C, H, W); y (b,) classes; share: this rank's part of the global batch, a slice.
    """
    device = generator.device
    x = x.to(device, non_blocking=True)
    y = y.to(device, non_blocking=True)

    # This rank's share of the global batch's noise, times and dropped classes.
    draws = draw_noise(args.seed, step, args.batch_size, config, args.class_dropout, generator)
    x1, eps, t, dropped = [draw[share] for draw in draws]
    y = torch.where(dropped, config.num_classes, y)  # the null class

    # CHOICE: latents are samples of the VAE's posterior, as in SiT, and not its means.
    if x.dtype == torch.uint8:
        x0 = codec.encode(x, eps)
    else:  # cached moments: mean and standard deviation
        x0 = x[:, 0] + x[:, 1] * eps
    return x0, x1, t, y


@torch.no_grad()
def update_ema(ema: DoD, network, step: int, decay: float = 0.999) -> None:
    """ema <- decay ema + (1 - decay) weights, in fp32 (section 4.1).

    CHOICE: step n uses min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten.
    The paper prints a decay of 0.999; SiT's and FiTv2's code has 0.9999.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)


# -------------------------------------------------------------------------------------- the letters

# 22 typefaces for text among those that come with matplotlib.
TYPEFACES = """
    DejaVuSans DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Oblique DejaVuSans-Bold
    DejaVuSans-BoldOblique DejaVuSansMono-Bold DejaVuSansMono-BoldOblique DejaVuSerif
    DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerif-BoldItalic STIXGeneral STIXGeneralBol
    STIXGeneralItalic STIXGeneralBolIta cmb10 cmmi10 cmr10 cmss10 cmti10 cmtt10
""".split()
LETTERS = "ABCDEFGHIJ"
LUMINANCE = np.array([0.299, 0.587, 0.114])


@lru_cache(maxsize=4096)
def typeface(face: str, height: int) -> ImageFont.FreeTypeFont:
    """A typeface of matplotlib's, `height` pixels high."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{face}.ttf", height)


def draw_letter(i: int, size: int, channels: int) -> Image.Image:
    """Letter number i, a function of i alone -> a picture of size x size pixels, grey or RGB.

    The class is the letter. Its typeface, height, place, tilt (up to 20 degrees) and the two greys
    or colours are what only a visual prior can tell. Drawn four times too large, then box-filtered.
    """
    rng = np.random.default_rng((2411, i))  # 2411: any number
    letter = LETTERS[i % 10]
    big = 4 * size

    # Black on white: typeface, height, place, tilt.
    font = typeface(TYPEFACES[rng.integers(22)], round(big * rng.uniform(0.75, 1.05)))
    # Its bounding box is centred, then moved by up to 5% in each direction.
    box = np.reshape(font.getbbox(letter), (2, 2))
    corner = (big - box.sum(0)) / 2 + rng.uniform(-0.05, 0.05, 2) * big
    ink = Image.new("L", (big, big))
    ImageDraw.Draw(ink).text(tuple(corner), letter, 255, font)
    ink = ink.rotate(rng.uniform(-20, 20), Image.BICUBIC).resize((size, size), Image.BOX)

    # Two greys or colours with a contrast of at least a third of the scale.
    # Pairs are drawn until one has it; colours are compared by their luminance.
    weights = LUMINANCE if channels == 3 else np.ones(1)
    front = back = np.zeros(channels)
    while abs((front - back) @ weights) < 85:
        front, back = rng.uniform(0, 255, (2, channels))
    picture = back + np.asarray(ink)[:, :, None] / 255 * (front - back)  # (size, size, channels)
    return Image.fromarray(picture.round().astype(np.uint8).squeeze())


# ---------------------------------------------------------------------------------------- data sets


class Pictures(Dataset):
    """Labelled pictures: the i-th is source(rows[i]), made uint8 (channels, size, size).

    Item (i, flipped) -> the picture, mirrored if flipped, and its class. Kept in memory if all of
    them together take less than 1 GiB.
    """

    def __init__(self, classes: list[str], labels, source: Callable, rows, size, channels):
        self.classes = classes
        self.labels = np.asarray(labels)[rows]
        self.source = source
        self.rows = rows
        self.size = size
        self.channels = channels
        self.in_memory = len(rows) * channels * size**2 < 2**30
        self.seen = {}

    def __len__(self) -> int:
        return len(self.rows)

    # The sampler decides about flips, not the data set: so they are a function of (seed, step).
    def __getitem__(self, item: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        i, flipped = item
        picture = self.seen.get(i)
        if picture is None:
            picture = fit_picture(self.source(int(self.rows[i])), self.size, self.channels)
            if self.in_memory:
                self.seen[i] = picture
        if flipped:
            picture = picture.flip(-1)
        return picture, int(self.labels[i])


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def scan_folder(root: Path) -> tuple[list[str], list[int], list[Path]]:
    """A folder of pictures -> names of the classes, class and file of each picture.

    Each folder directly in it is a class, with all pictures below; without such folders, the folder
    itself is the only class. Hidden files and folders do not count. Prints what it left out in
    those folders. Raises UserError.
    """
    if not root.is_dir():
        raise UserError(f"--data {root} is no folder, nor one of {', '.join(DATA)}")

    # The classes, sorted: a file system lists folders in any order, and the checkpoint keeps this
    # one.
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))

    # The pictures of each. Setting `inner` tells os.walk where to go next, and in which order.
    labels = []
    files = []
    left_out = Counter()
    if names:
        left_out["beside the class folders"] = sum(p.is_file() for p in root.glob("[!.]*"))
    for k, class_name in enumerate(names or ["."]):
        for folder, inner, found in os.walk(root / class_name, followlinks=True):
            inner[:] = sorted(entry for entry in inner if not entry.startswith("."))
            for file in sorted(found):
                suffix = Path(file).suffix.lower()
                if suffix not in SUFFIXES or file.startswith("."):
                    left_out[suffix or file] += 1
                    continue
                labels.append(k)
                files.append(Path(folder) / file)

    # The user hears of files that are no pictures, GIFs for example. No class may be empty.
    left_out = +left_out  # without the zeros
    if left_out and processes()[0] == 0:
        kinds = ", ".join(f"{n} {kind}" for kind, n in left_out.most_common(5))
        print(f"--data {root}: left out {kinds}; pictures end in {' '.join(SUFFIXES)}")
    empty = set(range(len(names))) - set(labels)
    if not files or empty:
        where = root / names[min(empty)] if empty and files else root
        raise UserError(f"there are no pictures in {where}; pictures end in {' '.join(SUFFIXES)}")
    return names or ["pictures"], labels, files


def load_data(data: str, size: int, channels: int, held_out: float):
    """-> training pictures, held-out pictures (the share `held_out`, at most 5,000), fingerprint.

    data: letters, digits, or a folder of pictures. The split depends on the data alone, not on
    --seed. The fingerprint tells whether a later command sees the same data: names and sizes of all
    files, and the content of at most 127 of them. Raises UserError for data that cannot be used.
    """
    # Class names, the class of each picture, and a function from its number to the picture.
    files = []
    if data == "letters":
        classes = list(LETTERS)
        labels = np.arange(25_000) % 10
        source = partial(draw_letter, size=size, channels=channels)
    elif data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()  # 1,797 scans of 8 x 8 pixels, 0 .. 16
        classes = [str(k) for k in range(10)]
        labels = digits.target
        source = [Image.fromarray(np.uint8(scan * 255 / 16)) for scan in digits.images].__getitem__
    else:
        classes, labels, files = scan_folder(Path(data))
        source = partial(open_numbered, files)

    # The fingerprint. Reading a sample of the files is enough to notice another data set of the
    # same names; reading all of ImageNet would take far too long.
    digest = hashlib.sha256(json.dumps([classes, list(map(int, labels))]).encode())
    for file in files:
        digest.update(f"{file.relative_to(data)} {file.stat().st_size}\n".encode())
    for file in files[:: max(1, len(files) // 64)]:
        digest.update(file.read_bytes())

    # The split: the first pictures of a fixed permutation are held out.
    order = np.random.default_rng(0).permutation(len(labels))
    cut = min(round(held_out * len(labels)), 5000)
    if cut == len(labels):
        raise UserError(f"--held-out {held_out} leaves none of {cut} pictures to train on")
    held = Pictures(classes, labels, source, order[:cut], size, channels)
    rest = Pictures(classes, labels, source, order[cut:], size, channels)
    return rest, held, digest.hexdigest()


def open_numbered(files: list[Path], i: int) -> Image.Image:
    """The picture in file number i. Not a lambda: workers need a function that can be pickled."""
    return open_picture(files[i])


# ------------------------------------------------------------------------------------- latent cache


class Latents(Dataset):
    """Cached latents, in shards of SHARD pictures: (n, 2 flips, 2 moments, C, H, W), fp16.

    The moments are the mean and standard deviation of the VAE's posterior, from which each epoch
    draws anew.
    Item (i, flipped) -> moments (2, C, H, W) and class of picture i.
    """

    SHARD = 8192  # 268 MB for 256 x 256 pictures

    def __init__(self, files: list[Path], labels: np.ndarray):
        self.files = files
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        i, flipped = item
        moments = open_shard(self.files[i // self.SHARD])[i % self.SHARD, int(flipped)]
        return torch.from_numpy(moments.astype(np.float32)), int(self.labels[i])


@lru_cache(maxsize=256)  # each worker opens its own: a pickled memory map would be the whole file
def open_shard(file: Path) -> np.ndarray:
    """A shard, memory-mapped. Raises UserError if it is damaged."""
    try:
        return np.load(file, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"--cache: {file} is damaged ({error}); remove it") from None


def open_cache(
    folder: Path, pictures: Pictures, fingerprint: str, codec: Codec, workers: int
) -> Latents:
    """--cache: the latents of these pictures in `folder`; missing shards are encoded first.

    Each rank encodes its share of them. A shard appears whole, so a run that was killed goes on
    with the next one. Raises UserError for a folder of other latents and for a damaged shard.
    """
    # The shards, and the note that says what they were made of.
    rank, ranks = processes()
    channels, side = codec.latent_shape(pictures.channels, pictures.size)
    starts = range(0, len(pictures), Latents.SHARD)
    files = [folder / f"{k:05}.npy" for k in range(len(starts))]
    about = {
        "vae": codec.fingerprint,
        "scaling_factor": codec.scale,
        "image_size": pictures.size,
        "count": len(pictures),
        "fingerprint": fingerprint,
    }

    # Another command may share the cache, but not while it is being filled.
    with locked(folder):
        if rank == 0:
            claim_folder(folder / "meta.json", about)
        wait()
        missing = [k for k, file in enumerate(files) if not file.exists()]
        wait()  # every rank has looked before any of them begins to write
        if missing and rank == 0:
            size = len(pictures) * 2 * 2 * channels * side**2 * 2  # flips, moments, bytes of fp16
            free = shutil.disk_usage(folder).free
            print(
                f"encoding {len(missing)} of {len(files)} shards of latents in {folder}; ", end=""
            )
            print(f"all take {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", flush=True)

        # Ranks take turns: with 8 of them, this one encodes every eighth of the missing shards.
        for k in tqdm(missing[rank::ranks], unit="shard", disable=rank > 0 or not missing):
            numbers = range(starts[k], min(starts[k] + Latents.SHARD, len(pictures)))
            with replacing(files[k]) as temporary:
                np.save(temporary, encode_shard(pictures, numbers, codec, workers))
        wait()

    # The header of a shard says what it holds; looking at it costs nothing.
    for file, start in zip(files, starts, strict=True):
        shape = (min(Latents.SHARD, len(pictures) - start), 2, 2, channels, side, side)
        found = open_shard(file)
        if found.shape != shape or found.dtype != np.float16:
            raise UserError(f"--cache: {file} holds {found.shape}, not {shape}; remove it")
    return Latents(files, pictures.labels)


def encode_shard(pictures: Pictures, numbers: range, codec: Codec, workers: int) -> np.ndarray:
    """Pictures and their mirror images -> (n, 2 flips, 2 moments, C, H, W), fp16."""
    # Mirrored here and not by the loader, so that each file is read only once.
    items = [(i, False) for i in numbers]
    moments = []
    for images, _ in DataLoader(pictures, batch_size=64, sampler=items, num_workers=workers):
        as_is = torch.stack(codec.moments(images), dim=1)  # (b, 2, C, H, W)
        mirrored = torch.stack(codec.moments(images.flip(-1)), dim=1)
        moments.append(torch.stack([as_is, mirrored], dim=1).half().cpu().numpy())
    return np.concatenate(moments)


# ---------------------------------------------------------------------- which images, on which rank


def batches(count: int, batch_size: int, seed: int, flip: bool, steps: range) -> Iterator[list]:
    """The items (picture number, flipped) of the global batch, step after step.

    Step n takes places (n - 1) B to n B - 1 of an endless sequence of permutations; that of epoch e
    is a function of (seed, e). CHOICE: pictures are mirrored with probability 0.5, by (seed, step).
    """

    # Two, because a batch may begin in one epoch and end in the next.
    @lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, 1, epoch)).permutation(count)

    for step in steps:
        places = range((step - 1) * batch_size, step * batch_size)
        numbers = [int(permutation(place // count)[place % count]) for place in places]
        flipped = np.random.default_rng((seed, 0, step)).random(batch_size) < 0.5
        yield [(i, flip and bool(f)) for i, f in zip(numbers, flipped, strict=True)]


def divide_batch(batch_size: int, p_s: float, accum: int) -> tuple[slice, list[list[int]], bool]:
    """How the global batch is divided: a contiguous share for a rank, in `accum` micro-batches.

    -> this rank's share; keep[i]: which images of its micro-batch i keep their prior; and whether
    some rank has a micro-batch without such an image. Raises UserError.
    """
    # Every micro-batch, on whatever rank, has the same size.
    rank, ranks = processes()
    size = batch_size // (ranks * accum)
    if size * ranks * accum != batch_size:
        what = (
            f"--batch-size {batch_size} is not divisible by {ranks} ranks x {accum} micro-batches"
        )
        raise UserError(f"{what} (--grad-accum); change one of them")

    # Who keeps the prior is decided for the global batch: S and LEM must both be trained.
    kept = keeps_prior(batch_size, p_s)
    if 0 < p_s < 1 and len(set(kept)) == 1:
        raise UserError(
            f"--p-s {p_s} of --batch-size {batch_size} is all or none; raise the latter"
        )

    # Indices count from the start of each micro-batch. All ranks work out the whole list: DDP
    # must know on every rank whether LEM goes unused on any.
    starts = range(0, batch_size, size)
    keep = [[i for i in range(size) if kept[start + i]] for start in starts]
    share = slice(rank * accum * size, (rank + 1) * accum * size)
    return share, keep[rank * accum : (rank + 1) * accum], not all(keep)


# -------------------------------------------------------------------------------------- checkpoints

# The flags on which the result of a run depends. A resumed run has to repeat them.
RECORDED = """
    image_size channels held_out batch_size lr warmup p_s class_dropout flip seed precision
    ema_decay init
""".split()


def save_checkpoint(path: Path, parts: dict, about: dict, step: int) -> None:
    """Writes a plain dict of all that sampling and resuming need, under another name, then renames.

    parts: model, ema, optimizer, scaler. Raises UserError if it cannot be written (say, the disk is
    full); an earlier checkpoint is then intact.
    """
    states = {key: part.state_dict() for key, part in parts.items()}
    with replacing(path) as temporary:
        torch.save({"format": "dod-2", "step": step, **about, **states}, temporary)


def resume(path: Path, parts: dict, about: dict) -> int:
    """Loads a checkpoint into the parts of a run -> its step; 0 if there is none.

    Raises UserError if it is that of another run, damaged, or not the same for all ranks.
    """
    # Ranks on several machines may each see a file of their own.
    saved = load_checkpoint(path) if path.exists() else {"step": 0}
    if dist.is_initialized():
        device = parts["model"].cos.device
        # The largest step plus the largest -step is 0 if, and only if, all steps are equal.
        steps = torch.tensor([saved["step"], -saved["step"]], device=device)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        if steps.sum() != 0:
            raise UserError(f"not all ranks see the same {path}; give them one --out to share")
    if not path.exists():
        return 0

    # A resumed run must be the run that was started: compare every setting its result depends on.
    # Data and VAE may have moved: their fingerprints are compared. cfg is for sampling only.
    now = about | about["config"]
    then = saved | saved["config"]
    for key, value in now.items():
        if key not in ("data", "codec", "config", "cfg") and then.get(key) != value:
            was = f"--{key.replace('_', '-')} was {then.get(key)}, now {value}"
            if key in ("fingerprint", "classes"):
                was = "the pictures of --data are not those it was trained on"
            if key == "vae":
                was = "--vae is not the one it was trained with"
            raise UserError(f"cannot resume {path}: {was}; repeat the flags of the first run")

    # Model, EMA, optimizer and scaler go on exactly where they were.
    for key, part in parts.items():
        try:
            part.load_state_dict(saved[key])
        except Exception as error:  # missing, of another shape, not a state at all
            raise UserError(f"cannot resume {path}: {key} is damaged ({error})") from None

    # PyTorch does not compare AdamW's moments with the weights that they belong to.
    for weights, moments in parts["optimizer"].state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in moments or moments[key].shape != weights.shape:
                raise UserError(f"cannot resume {path}: optimizer is damaged ({key})")
    return saved["step"]


def initialize_from(path: str, model: DoD) -> None:
    """--init: the EMA weights of another run, where name and shape agree. Says what stays fresh."""
    saved = load_checkpoint(path)["ema"]
    own = model.state_dict()
    # Another number of classes, say, leaves the class table as it was drawn and keeps the rest.
    fitting = {key: v for key, v in saved.items() if key in own and v.shape == own[key].shape}
    if not fitting:
        raise UserError(f"--init {path}: no tensor fits this model; choose its --model")
    model.load_state_dict(own | fitting)
    fresh = ", ".join(key for key in own if key not in fitting) or "nothing"
    if processes()[0] == 0:
        print(f"--init {path}: fresh weights: {fresh}")


# -------------------------------------------------------------------------------- log and pictures


def summarise(pending: list[tuple], overflow_is_fine: bool) -> dict:
    """A log record of the last steps, over all ranks: loss, loss by quarter of t, gradient norm.

    pending: (step, t (b,), loss (b,), norm ()) of each. They are read here and not in each step, so
    that a GPU need not wait. Raises FloatingPointError naming the first step that is not finite.
    """
    steps, t, losses, norms = zip(*pending, strict=True)
    device = t[0].device
    t = torch.stack(t).cpu().double()
    losses = torch.stack(losses).cpu().double()
    norms = torch.stack(norms).cpu().double()

    # A gradient in fp16 may overflow: the scaler skips that step. A loss must always be finite.
    for step, loss, norm in zip(steps, losses, norms, strict=True):
        if not (loss.isfinite().all() and (overflow_is_fine or norm.isfinite())):
            raise FloatingPointError(f"the loss of step {step} (or its gradient) is not finite")

    # Sums and counts by quarter of t, added up over the ranks.
    quarter = (4 * t.flatten()).long().clamp(max=3)
    sums = torch.zeros(4).double().index_add(0, quarter, losses.flatten())
    totals = torch.stack([sums, quarter.bincount(minlength=4)])
    if dist.is_initialized():
        totals = totals.to(device)
        dist.all_reduce(totals)
    sums, counts = totals.tolist()
    return {
        "step": steps[-1],
        "loss": sum(sums) / sum(counts),
        "loss_by_time": [s / n if n else None for s, n in zip(sums, counts, strict=True)],
        "grad_norm": norms[norms.isfinite()].mean().item(),
    }


def held_out_batch(pictures: Pictures, codec: Codec, args, config: Config) -> list | None:
    """Up to 512 held-out pictures with fixed noise and times, as lists of 64; None without them."""
    count = min(512, len(pictures))
    if not count:
        return None
    device = pick_device(args.device)
    # Training begins with step 1, so the draws of step 0 are free. No class is dropped.
    draws = draw_noise(args.seed, 0, count, config, 0, torch.Generator(device))
    x1, eps, t, _ = draws
    images = torch.stack([pictures[i, False][0] for i in range(count)]).to(device)
    y = torch.tensor(pictures.labels[:count], device=device)
    keep = torch.tensor(keeps_prior(count, args.p_s), device=device)
    # Five tensors, cut into pieces of 64 images -> for each piece, its five tensors.
    parts = [part.split(64) for part in (codec.encode(images, eps), y, x1, t, keep)]
    return list(zip(*parts, strict=True))


@torch.no_grad()
def held_out_loss(ema: DoD, batch: list) -> float:
    """Eq. 3 of the EMA model on held-out pictures: rises when the model begins to overfit."""
    losses = []
    for x0, y, x1, t, keep in batch:
        losses.append(rectified_flow_loss(ema, x0, y, x1, t, keep.nonzero().squeeze(1)))
    return torch.cat(losses).mean().item()


def read_log(path: Path) -> list[dict]:
    """The whole records of a log; a line that a kill has cut off does not count."""
    records = []
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
            # Adding 0 fails for all that is no number, and a record needs four losses by time.
            record["step"] += 0
            record["loss"] += 0
            record["loss_by_time"][3]
        except (ValueError, TypeError, LookupError):
            continue
        records.append(record)
    return records


def open_log(path: Path, step: int, tensorboard: bool) -> Callable[[dict], None]:
    """log.jsonl -> a function that writes a record; for rank 0 alone.

    Records after `step` are cut off: those steps will come again. Raises UserError.
    """
    board = None
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard: first, pip install tensorboard") from None
        board = SummaryWriter(path.with_name("tensorboard"), purge_step=step + 1)

    # The run may have logged steps after its last checkpoint: they will be taken again.
    records = [record for record in read_log(path) if record["step"] <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    file = path.open("a", buffering=1)

    def write(record: dict) -> None:
        file.write(json.dumps(record) + "\n")
        # TensorBoard draws numbers only; the list of losses by time stays in log.jsonl.
        for key, value in record.items():
            if board and isinstance(value, float):
                board.add_scalar(key, value, record["step"])
                board.flush()

    return write


def plot_log(log: Path, out: Path) -> None:
    """Draws the loss of log.jsonl, in all, by quarter of t, and on held-out pictures."""
    from matplotlib.figure import Figure

    records = read_log(log)
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()

    # Thin: the loss by quarter of t. It depends on t far more than on the progress of training,
    # so the mean over all t, in black, hides much.
    for k in range(4):
        losses = [record["loss_by_time"][k] for record in records]
        axes.plot(steps, losses, linewidth=0.7, label=f"{k / 4:g} ≤ t < {(k + 1) / 4:g}")
    axes.plot(steps, [record["loss"] for record in records], "k", label="all t")

    # Dashed: held-out pictures, measured only where a checkpoint was saved.
    held_out = [record for record in records if "held_out_loss" in record]
    steps = [record["step"] for record in held_out]
    axes.plot(
        steps, [record["held_out_loss"] for record in held_out], "ro--", label="held out, EMA"
    )
    axes.set(title="Loss, Eq. 3", xlabel="step", yscale="log")
    axes.legend()
    with replacing(out) as temporary:
        figure.savefig(temporary, dpi=100)


def draw_samples(ema: DoD, codec: Codec, pictures: Pictures, seed: int, out: Path) -> None:
    """Draws real pictures of up to ten classes, then stages 1 to 3, always from the same noise."""
    shown = np.unique(pictures.labels)[:10].tolist()
    rows = 4

    # A column for each class; one with fewer pictures than rows shows some of them again.
    real = []
    for row in range(rows):
        for k in shown:
            of_class = np.flatnonzero(pictures.labels == k)
            real.append(pictures[int(of_class[row % len(of_class)]), False][0])

    # Nothing but the weights changes from one such picture of a run to the next.
    y = torch.tensor(shown * rows, device=ema.cos.device)
    stages = 3 if ema.config.N else 1
    blocks = [("real", torch.stack(real))]
    for i, z0 in enumerate(generate(ema, y, stages, seed=seed, progress=True)):
        w = ema.config.cfg if i else 1
        blocks.append((f"stage {i + 1}\nw = {w:g}", codec.decode(z0)))
    with replacing(out) as temporary:
        draw_grid(blocks, [pictures.classes[k] for k in shown]).save(temporary)


# ------------------------------------------------------------------------------------------ signals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def catch_signals() -> list[int]:
    """Ctrl-C, SIGTERM and SIGHUP only leave a note in the list: no step is left half done."""
    caught = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: caught.append(number))
    return caught


def ignore_signals(worker: int) -> None:
    """For the loader's workers: a signal for the run must not end them before the run has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def agree_to_stop(step: int, caught: list[int], device: torch.device) -> bool:
    """Whether a signal has reached any rank. The ranks agree on it at every tenth step: soon enough
    for torchrun, which kills them after 30 s, and seldom enough not to slow the GPUs down."""
    if not dist.is_initialized():
        return bool(caught)
    if step % 10:
        return False
    count = torch.tensor(len(caught), device=device)
    dist.all_reduce(count)
    return count.item() > 0


# -------------------------------------------------------------------------------------------- a run

WRITTEN = ("ckpt.pt", "log.jsonl", "loss.png", "samples.png")
MILESTONES = "ckpt-*.pt"


def claim_run(args: argparse.Namespace, ckpt: Path) -> None:
    """Whether --out may be used, decided before anything in it is touched. Raises UserError."""
    # Whatever a run writes may be an earlier run's, or the user's own: neither is replaced unasked.
    there = [ckpt.with_name(file) for file in WRITTEN if ckpt.with_name(file).exists()]
    there += sorted(ckpt.parent.glob(MILESTONES))
    if args.resume and args.overwrite:
        raise UserError("--resume excludes --overwrite; leave out one")
    if there and not (args.resume or args.overwrite):
        how = "--resume continues a run, --overwrite starts again; or give another --out"
        raise UserError(f"{there[0]} exists; {how}")

    # Resuming without a checkpoint would silently start from step 0 and wipe the log.
    if there and args.resume and not ckpt.exists():
        how = "copy a milestone there, or start again in another --out"
        raise UserError(f"--resume: {there[0]} exists, but no {ckpt}; {how}")

    # Another program's file of such a name stays: what is no checkpoint of ours ends the command.
    for file in there:
        if args.overwrite and file.suffix == ".pt":
            load_checkpoint(file)


def resolve_precision(precision: str, device: torch.device) -> str:
    """auto: on CUDA bf16, or fp16 where that is missing (as on a T4); else fp32.

    Weights, residual stream, LayerNorms, softmax statistics and loss are fp32 in each. CHOICE: the
    paper does not say in which precision it was trained.
    """
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def compile_blocks(model: DoD, device: torch.device) -> None:
    """--compile: block by block, so that the weights keep their names. UserError if it cannot."""
    # Compilation is lazy. This trial shows at once, and not in the middle of the first step, that
    # a compiler is missing.
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except Exception as error:  # no C++ compiler, no Triton
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--compile does not work here: {reason}") from None
    torch._dynamo.config.optimize_ddp = False  # it would cut graphs that are small already
    for module in model.modules():
        if isinstance(module, (Block, ViTBlock)):
            module.compile(dynamic=False)


def fit_config(args: argparse.Namespace, classes: int, codec: Codec) -> Config:
    """The preset of --model, adapted to the data and the flags.

    Also sets --class-dropout and --p-s where they can have one value only.
    """
    channels, latent_size = codec.latent_shape(args.channels, args.image_size)
    config = replace(
        CONFIGS[args.model], p=args.patch_size, N=args.latent_tokens, latent_size=latent_size,
        latent_channels=channels, num_classes=classes, cfg=args.cfg, prior_from=args.prior_from,
    )  # fmt: skip
    if classes == 1:
        args.class_dropout = 0.0  # unconditional: there is no class to drop
    if not config.N:
        args.p_s = 1.0  # FiTv2: nobody has a prior
    return config


def build(args: argparse.Namespace, config: Config, device: torch.device) -> dict:
    """-> model, ema, optimizer and scaler of a new run. The first weights are a function of --seed.

    CHOICE: AdamW's betas are the usual ones; the paper names rate and weight decay (section 4.1).
    """
    torch.manual_seed(args.seed)
    model = DoD(config).to(device)
    if args.init:
        initialize_from(args.init, model)
    model.grad_checkpoint = args.grad_checkpoint

    # The average starts as a copy of the weights; it is never trained itself.
    ema = copy.deepcopy(model).requires_grad_(False)
    weights = model.parameters()
    optimizer = torch.optim.AdamW(weights, args.lr, (0.9, 0.999), weight_decay=0, fused=True)
    # Only fp16 needs its loss scaled; the scaler of the others does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    return {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}


@dataclass
class Journal:
    """What rank 0 writes into --out: checkpoints, log, pictures. The other ranks have none."""

    args: argparse.Namespace
    ckpt: Path  # the latest checkpoint; everything else lies beside it
    parts: dict  # model, ema, optimizer, scaler
    about: dict  # what checkpoints say of the run
    pictures: Pictures
    held_out: Pictures
    codec: Codec
    # Both made by open(), once the run is known to be ours.
    log: Callable | None = None
    held_out_parts: list | None = None

    def open(self, done: int, config: Config) -> None:
        """Says what the run is, and opens the log after the `done` steps of an earlier one."""
        weights = sum(p.numel() for p in self.parts["model"].parameters()) / 1e6
        print(
            f"{self.args.model}: {weights:.2f} M parameters, {config.num_tokens} tokens; ", end=""
        )
        print(f"{len(self.pictures)} pictures in {config.num_classes} classes, ", end="")
        print(f"{len(self.held_out)} held out")
        if not done:
            settings = sorted(vars(self.args).items())
            print("settings: " + ", ".join(f"{key} {value}" for key, value in settings))

            # The new run has a checkpoint before it has a log: a log without one is not ours. With
            # --overwrite, this is where the old run goes, for no flag can be wrong any more.
            save_checkpoint(self.ckpt, self.parts, self.about, 0)
            if self.args.overwrite:
                for old in self.ckpt.parent.glob(MILESTONES):
                    old.unlink()
        self.log = open_log(self.ckpt.with_name("log.jsonl"), done, self.args.tensorboard)
        self.held_out_parts = held_out_batch(self.held_out, self.codec, self.args, config)

    def record(self, record: dict, due: set[str]) -> None:
        """Logs, saves and draws what is due after record["step"]."""
        step = record["step"]
        ema = self.parts["ema"]
        if "save" in due and self.held_out_parts:
            record["held_out_loss"] = held_out_loss(ema, self.held_out_parts)
        self.log(record)

        # The milestone comes before ckpt.pt: a run killed in between repeats this step.
        if "keep" in due:
            milestone = self.ckpt.with_name(f"ckpt-{step:07}.pt")
            save_checkpoint(milestone, self.parts, self.about, step)
        if "save" in due:
            save_checkpoint(self.ckpt, self.parts, self.about, step)
        if "sample" in due:
            out = self.ckpt.with_name(f"samples-{step:07}.png")
            draw_samples(ema, self.codec, self.pictures, self.args.seed, out)

    def finish(self) -> None:
        """The pictures of a whole run, and what to do with it."""
        ckpt = self.ckpt
        plot_log(ckpt.with_name("log.jsonl"), ckpt.with_name("loss.png"))
        out = ckpt.with_name("samples.png")
        draw_samples(self.parts["ema"], self.codec, self.pictures, self.args.seed, out)
        print(f"wrote {', '.join(WRITTEN)} into {ckpt.parent}. Next:")
        print(f"  python sample.py --ckpt {ckpt} --seed 1 --out more.png")
        print(f"  python evaluate.py stages --ckpt {ckpt}    # FID of each stage")


def what_is_due(args: argparse.Namespace, step: int, last: bool) -> set[str]:
    """Which of log, save, keep and sample are due after this step; the last one is always saved."""
    due = {"save"} if last else set()
    for what in ("log", "save", "keep", "sample"):
        every = getattr(args, f"{what}_every")
        if every and step % every == 0:
            due.add(what)
    return due


def distribute(
    args: argparse.Namespace, model: DoD, device: torch.device, some_without_prior: bool
) -> torch.nn.Module:
    """The network to train: compiled with --compile; with several ranks, inside of DDP."""
    if args.compile:
        compile_blocks(model, device)
    if processes()[1] == 1:
        return model

    # Gradients are averaged over the ranks. The buffers are constants. LEM goes unused wherever no
    # image of a micro-batch keeps its prior.
    return DistributedDataParallel(
        model, broadcast_buffers=False, gradient_as_bucket_view=True,
        find_unused_parameters=bool(model.config.N) and some_without_prior,
    )  # fmt: skip


def train(args: argparse.Namespace) -> None:
    """The whole run: data, model, steps; at the end, pictures of the loss and of samples."""
    rank, ranks = processes()
    device = pick_device(args.device)
    args.precision = resolve_precision(args.precision, device)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]

    # Data, and the model that fits it.
    size = (args.image_size, args.channels)
    pictures, held_out, fingerprint = load_data(args.data, *size, args.held_out)
    if len(pictures) < ranks:
        raise UserError(f"{ranks} ranks for {len(pictures)} pictures; start fewer")
    codec = load_codec(args.vae, device)
    config = fit_config(args, len(pictures.classes), codec)
    share, keep, some_without_prior = divide_batch(args.batch_size, args.p_s, args.grad_accum)
    # Moved to the device once: in every step, the copy would have to wait for the GPU.
    keep = [torch.tensor(rows, dtype=torch.long, device=device) for rows in keep]
    data = pictures
    if args.cache:
        data = open_cache(Path(args.cache), pictures, fingerprint, codec, args.workers)

    # What resume() compares, and what sampling and evaluating must know about the run.
    about = {key: getattr(args, key) for key in RECORDED}
    about |= {"data": args.data, "classes": pictures.classes, "fingerprint": fingerprint}
    about |= {"codec": codec.name, "vae": codec.fingerprint, "config": asdict(config)}

    # Model, EMA, optimizer, scaler: new, or as they were in the checkpoint of this very run.
    parts = build(args, config, device)
    ckpt = Path(args.out) / "ckpt.pt"
    done = resume(ckpt, parts, about) if args.resume else 0
    network = distribute(args, parts["model"], device, some_without_prior)

    # The loader carries pictures (or cached moments) and classes of this rank's share only.
    steps = range(done + 1, args.steps + 1)
    items = batches(len(data), args.batch_size, args.seed, args.flip, steps)
    loader = DataLoader(
        data, batch_sampler=(batch[share] for batch in items), num_workers=args.workers,
        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
    )  # fmt: skip

    # Rank 0 speaks for all: on the screen, in the log, in the checkpoints.
    journal = None
    if rank == 0:
        journal = Journal(args, ckpt, parts, about, pictures, held_out, codec)
        journal.open(done, config)

    # From here on a signal no longer ends the process: it is for the loop to look at `caught`.
    generator = torch.Generator(device)
    caught = catch_signals()
    loaded = iter(loader)
    pending = []  # what the next record of the log will be made of
    stop = False
    began = time.time()
    waited = 0.0
    bar = tqdm(initial=done, total=args.steps, unit="step", mininterval=1, disable=rank > 0)
    try:
        for step in steps:
            # The time spent waiting here tells whether the loader keeps up with the device.
            asked = time.time()
            x, y = next(loaded)
            waited += time.time() - asked
            batch = prepare_batch(x, y, share, step, args, config, codec, generator)
            if journal and step == done + 1:
                check_scale(batch[0], codec)

            # Section 4.1: a constant rate, here after --warmup steps of linear growth, if any.
            for group in parts["optimizer"].param_groups:
                group["lr"] = args.lr * min(1, step / max(1, args.warmup))
            losses, norm = training_step(
                network, parts["ema"], parts["optimizer"], parts["scaler"], batch, keep, step,
                dtype, args.ema_decay,
            )  # fmt: skip
            pending.append((step, batch[2], losses, norm))
            bar.update()

            # Now and then: log, save, draw. Only then need the GPU have finished.
            stop = agree_to_stop(step, caught, device)
            due = what_is_due(args, step, last=stop or step == args.steps)
            if not due:
                continue

            # The record is made by all ranks together, and written by rank 0.
            record = summarise(pending, overflow_is_fine=parts["scaler"].is_enabled())
            seconds = time.time() - began
            record["images_per_s"] = len(pending) * args.batch_size / seconds
            record["waiting_for_data"] = waited / seconds  # a share of the time
            if device.type == "cuda":
                record["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            bar.set_postfix_str(f"loss {record['loss']:.4f}")
            if journal:
                journal.record(record, due)
            if stop:
                break

            # The next interval. Saving and drawing do not count in its images per second.
            pending = []
            began = time.time()
            waited = 0.0
    except FloatingPointError as error:
        kept = f"the last good checkpoint is {ckpt}"
        raise UserError(f"{error}; {kept}; a lower --lr may help") from None
    finally:
        bar.close()
        del loaded  # tells the loader's workers to end: they ignore signals

    # Ended early, by a signal. The exit status is that of a program ended by Ctrl-C.
    if stop and step < args.steps:
        if journal:
            print(f"stopped after step {step}; the same command with --resume continues")
        wait()  # until rank 0 has saved: a rank that ends makes torchrun end the others
        sys.exit(130)
    if journal:
        journal.finish()


def check_scale(x0: torch.Tensor, codec: Codec) -> None:
    """Warns if a VAE's latents are far from standard deviation 1, which is that of the noise."""
    std = x0.std().item()
    if codec.name != "none" and not 0.5 < std < 2:
        what = f"latents have a standard deviation of {std:.3g}, not about 1; is scaling_factor in"
        print(f"warning: {what} the config.json of {codec.name} right?", file=sys.stderr)


# ------------------------------------------------------------------------------------------ command

# What --data changes in the defaults. FOLDER serves any folder of pictures.
DATA = {
    # cfg of the letters: the best of a scan against training pictures, not held-out ones
    "letters": dict(image_size=16, channels=1, patch_size=4, flip=False, cfg=2.0),
    "digits": dict(image_size=8, channels=1, patch_size=2, flip=False, cfg=2.0),
}
FOLDER = dict(image_size=32, channels=3, patch_size=4, flip=True, cfg=3.5)
IMAGENET = dict(image_size=256, channels=3, patch_size=2, flip=True, cfg=5.5)  # with --vae
# CHOICE: DoD-Ti learns at 20 times the paper's rate, after a warm-up. Without the warm-up LEM died
# in our runs: e_s became the same for all pictures, and the loss with a prior the same as without.
SMALL = dict(batch_size=64, lr=2e-3, warmup=300, steps=2500, save_every=500)
# Batch size and rate are those of section 4.1, the 400,000 steps those of section 4.2.
# CHOICE: no warm-up, for the paper says that the rate is constant; FiTv2's code has one (--warmup).
PAPER = dict(batch_size=256, lr=1e-4, warmup=0, steps=400_000, save_every=10_000)


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags. Those whose default is None get it from the tables above. Raises UserError."""
    parser = Parser(description="Trains DoD. Defaults of None depend on --data, --vae and --model.")
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    share = at_least(float, 0, 1)
    natural = at_least(int, 1)
    count = at_least(int, 0)
    # fmt: off
    add("--data", type=nonempty, default="letters", help="letters, digits or a folder of pictures")
    add("--vae", type=nonempty, default="none", help="Stable Diffusion's: hub name or folder")
    add("--cache", type=nonempty, help="folder for latents, encoded once, with --vae")

    # The model, and where the run is kept.
    add("--model", default="DoD-Ti", choices=CONFIGS, help="preset; -Ti are for a CPU")
    add("--out", type=nonempty, help="folder of the run; None: out/ and the name of the data")
    add("--resume", action=switch, default=False, help="continue the run in --out, if any")
    add("--overwrite", action=switch, default=False, help="replace the run in --out")
    add("--init", type=nonempty, help="checkpoint whose EMA weights to start from, where they fit")

    # Its shape. What is not given comes from the preset and from the data.
    add("--image-size", type=natural, help="pixels; pictures are cropped and resized")
    add("--channels", type=int, choices=[1, 3], help="1: grey, 3: RGB")
    add("--patch-size", type=natural, help="p, in pixels; with --vae, in the latent")
    add("--latent-tokens", type=count, help="N, Table 2; 0: no LEM (FiTv2)")
    add("--prior-from", choices=["lem", "patches"], default="lem", help="patches: no compression")
    add("--flip", action=switch, help="mirror pictures at random")
    add("--held-out", type=at_least(float, 0, 0.9), default=0.1, help="share, up to 5000 pictures")

    # The training itself, sections 3.3 and 4.1.
    add("--steps", type=natural, help="training steps")
    add("--batch-size", type=natural, help="pictures a step, of all ranks together")
    add("--grad-accum", type=natural, default=1, help="micro-batches of a step, one after another")
    add("--lr", type=at_least(float, 0), help="AdamW's constant learning rate")
    add("--warmup", type=count, help="first steps, over which the rate grows")
    add("--ema-decay", type=share, default=0.999, help="of the weights that are sampled from")
    add("--p-s", type=share, default=0.5, help="share of a batch that gets S for a prior, Table 3")
    add("--class-dropout", type=share, default=0.1, help="probability of the null class")
    add("--cfg", type=at_least(float, 1), help="guidance scale where sampling names none")
    add("--seed", type=at_least(int, 0, 2**63), default=0, help="the same seed, the same run")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of autocast; auto: bf16 or fp16 on CUDA, else fp32")

    # How it is carried out: these change the result by rounding at most.
    add("--compile", action=switch, default=False, help="torch.compile")
    add("--grad-checkpoint", action=switch, default=False, help="less memory, a third slower")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--workers", type=count, default=0, help="processes that load pictures, for each rank")

    # What it leaves behind.
    add("--log-every", type=natural, default=50, help="steps between records in log.jsonl")
    add("--save-every", type=natural, help="steps between checkpoints")
    add("--keep-every", type=count, default=0, help="steps between milestones; 0: none")
    add("--sample-every", type=count, default=0, help="steps between sample grids; 0: none")
    add("--tensorboard", action=switch, default=False, help="log there too, if installed")
    # fmt: on
    args = parser.parse_args(argv)

    # Defaults that depend on other flags. The first table that names a flag decides, so the most
    # specific ones come first.
    small = args.model.endswith("-Ti")
    preset = CONFIGS[args.model]
    tables = [dict(latent_tokens=preset.N, out=f"out/{Path(args.data).resolve().name}")]
    if not small:
        tables.append(dict(patch_size=preset.p, cfg=preset.cfg))
    if args.vae != "none":
        tables.append(IMAGENET)
    tables.append(DATA.get(args.data, FOLDER))
    tables.append(SMALL if small else PAPER)
    for table in tables:
        for key, value in table.items():
            if getattr(args, key) is None:
                setattr(args, key, value)
    if args.cache and args.vae == "none":
        raise UserError("--cache keeps latents; without --vae there are none")
    # A run inside its own data would later find its own grids there, as pictures of one more class.
    if args.data not in DATA and Path(args.out).resolve().is_relative_to(Path(args.data).resolve()):
        raise UserError(f"--out {args.out} lies inside --data {args.data}; give another --out")
    return args


def main() -> None:
    """Joins the other ranks, makes sure that --out is ours alone, and trains."""
    args = parse(sys.argv[1:])
    device = pick_device(args.device)
    with process_group(device), locked(Path(args.out)):
        if processes()[0] == 0:
            claim_run(args, Path(args.out) / "ckpt.pt")
        wait()
        train(args)


if __name__ == "__main__":
    run_command(main)
