r"""train.py -- end-to-end training of DoD: the step, the run, the data. Sections 3.3 and 4.1.

Backbone and LEM learn together, from real images alone: in training, an image's own latent is its
visual prior, and a share p_s of each batch gets the sample token S instead.

Why are perfect priors enough, when stage 2 will get generated ones? Section 3.3 assumes that the
semantics of an image, which pass LEM's bottleneck, are similar in both: flaws of a generated image
are details, which do not pass. Without a bottleneck (--prior-from patches) they do, and are copied.

Everything random is a function of (seed, step), drawn for the global batch. So the number of
GPUs changes a result by rounding only, and a resumed run, on a CPU, equals an unbroken one exactly.

    python train.py                                             # DoD-Ti on letters, on a CPU
    python train.py --prior-from patches --out out/patches      # without LEM: it copies its prior
    python train.py --data images/ --image-size 32              # yours: a folder for each class
    torchrun --nproc-per-node 8 train.py --data imagenet/train --model DoD-B \
        --vae stabilityai/sd-vae-ft-ema --cache latents
"""

import argparse
import copy
import hashlib
import itertools
import json
import mmap
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
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
    Codec, Parser, at_least, draw_grid, generate, load_checkpoint, load_codec, open_image,
    pick_device, process_group, processes, replacing, run_command, wait,
)  # fmt: skip

CLASS_DROPOUT = 0.1  # CHOICE: the paper names no number; this one is DiT's and SiT's

# ------------------------------------------------------------------- one step: sections 3.3 and 4.1


def draw_noise(seed: int, step: int, batch_size: int, config: Config, generator: torch.Generator):
    """Draws a step's noise, times and dropped classes, on the generator's device.
    -> x1 (B, C, H, W) noise; eps (B, C, H, W) for the VAE's posterior; t (B,) times; dropped (B,):
    which images lose their class. A function of (seed, step): the generator is seeded anew.
    """
    # SeedSequence turns (seed, step) into one number that is unrelated to that of the next step.
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    generator.manual_seed(int(state[0]))
    device = generator.device
    shape = (batch_size, config.latent_channels, config.latent_size, config.latent_size)

    # Drawn for the global batch, whatever share of it this rank has: all ranks draw the same. An
    # image loses its class whether or not it loses its prior.
    x1 = torch.randn(shape, generator=generator, device=device)
    eps = torch.randn(shape, generator=generator, device=device)
    t = logit_normal(batch_size, generator, device)  # Eq. 11
    dropped = torch.rand(batch_size, generator=generator, device=device) < CLASS_DROPOUT
    return x1, eps, t, dropped


def to_latents(x: torch.Tensor, eps: torch.Tensor | None, codec: Codec) -> torch.Tensor:
    """uint8 images (b, channels, rows, columns), or cached moments of latents (b, 2, C, H, W)
    -> latents (b, C, H, W): samples of the VAE's posterior by the normal eps, without it its mean.

    CHOICE: training takes samples, as SiT does; the paper does not say.
    """
    if x.dtype == torch.uint8:
        return codec.encode(x, eps)
    return x[:, 0] if eps is None else x[:, 0] + x[:, 1] * eps


def training_step(
    network, ema, optimizer, batch, keep, step, bf16=False, ema_decay=0.999
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of this rank -> its mean loss (); the sums of the losses of the images with their
    prior and of those with S (2,); the norm of the gradient ().
    network: a DoD, possibly inside DistributedDataParallel; batch: x0, x1 (b, C, H, W) latents and
    noise, t, y (b,) times and classes; keep[i]: which images of this rank's micro-batch i keep
    their prior, as indices. Nothing in it waits for the GPU.
    """
    x0, x1, t, y = batch
    size = len(x0) // len(keep)  # of a micro-batch
    total = torch.zeros((), device=x0.device)
    halves = torch.zeros(2, device=x0.device)
    optimizer.zero_grad(set_to_none=True)
    for i, rows in enumerate(keep):
        micro = slice(i * size, (i + 1) * size)

        # The gradients of the micro-batches add up. DistributedDataParallel averages them over the
        # ranks once a step, in the last one.
        network.require_backward_grad_sync = i == len(keep) - 1

        # Eq. 3 trains backbone and LEM together: the prior of an image is its own latent.
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=bf16):
            loss = rectified_flow_loss(network, x0[micro], y[micro], x1[micro], t[micro], rows)

        # The gap between the two halves of the batch is what the prior is worth.
        with_prior = loss.detach()[rows].sum()
        halves += torch.stack([with_prior, loss.detach().sum() - with_prior])

        # Divided by the number of micro-batches, their sum is the mean over the whole batch.
        loss = loss.mean() / len(keep)
        loss.backward()  # adds to the gradients of the earlier micro-batches
        total += loss.detach()

    # CHOICE: the gradient is clipped to norm 1; the paper names no clip.
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()  # AdamW

    # What is sampled from, and reported, is the moving average of the weights.
    update_ema(ema, network, step, ema_decay)
    return total, halves, norm


@torch.no_grad()
def update_ema(ema: DoD, network, step: int, decay: float = 0.999) -> None:
    """ema <- decay ema + (1 - decay) weights, in fp32 (section 4.1).

    CHOICE: step n uses min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten.
    The paper prints a decay of 0.999; SiT's and FiTv2's code has 0.9999.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)


def train(args: argparse.Namespace) -> None:
    """The whole run: data, model, steps; at the end, images of the loss and of samples."""
    rank, _ = processes()
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high")  # on a GPU, TF32 for what autocast leaves in fp32
    bf16 = args.precision == "bf16"

    # Data, the model that fits it, and this rank's share of each batch.
    codec = load_codec(args.vae, device)
    training, held_out, fingerprint = open_data(args, codec)
    groups = group_classes(training.classes, args.class_groups)
    channels, side = codec.latent_shape(args.channels, args.image_size)
    config = replace(
        CONFIGS[args.model], p=args.patch_size, N=args.latent_tokens, latent_size=side,
        latent_channels=channels, num_classes=len(groups), cfg=args.cfg, prior_from=args.prior_from,
    )  # fmt: skip
    share, keep = divide_batch(args.batch_size, args.p_s, args.grad_accum, bool(config.N))
    keep = [rows.to(device) for rows in keep]  # now, since each copy would wait for the GPU

    # What checkpoints say of the run, besides its weights.
    about = {key: getattr(args, key) for key in RECORDED} | {"data": args.data, "classes": groups}
    about |= {"fingerprint": fingerprint, "codec": codec.name, "scale": codec.scale}
    about["config"] = asdict(config)

    # Model, EMA and optimizer: new, or as they were in the checkpoint of this very run.
    model, ema, optimizer, network = build(args, config, device)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    out = Path(args.out)
    ckpt = out / "ckpt.pt"
    done = resume(ckpt, parts, about) if ckpt.exists() else 0

    # Rank 0 speaks for all: on the screen, in the log, in the checkpoints.
    if rank == 0:
        print(f"{args.model}, {len(training)} images in {len(groups)} classes, step {done}")
        if not done:
            save_checkpoint(ckpt, about, 0, parts)
        cut_log(out / "log.jsonl", done)

    # The loader carries images (or cached moments) and classes of this rank's share only.
    items = batches(len(training), args.batch_size, args.seed, args.flip, done + 1)
    loader = DataLoader(
        training, batch_sampler=(batch[share] for batch in items), num_workers=args.workers,
        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
    )  # fmt: skip
    loaded = iter(loader)

    # From here on, Ctrl-C and SIGTERM only leave a note: no step is left half done.
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, frame: caught.append(signum))

    generator = torch.Generator(device)
    stop = False
    pending = []  # step, loss and gradient norm of the steps since the last record
    began = time.time()
    waited = 0.0
    steps = range(done + 1, args.steps + 1)
    try:
        for step in tqdm(steps, initial=done, total=args.steps, mininterval=1, disable=rank > 0):
            # The time spent waiting here tells whether the loader keeps up with the device.
            asked = time.time()
            x, y = next(loaded)
            waited += time.time() - asked
            x = x.to(device, non_blocking=True)
            y = y.to(device, non_blocking=True)

            # Noise, times and dropped classes are drawn for the global batch: this is our share.
            draws = draw_noise(args.seed, step, args.batch_size, config, generator)
            x1, eps, t, dropped = [draw[share] for draw in draws]
            x0 = to_latents(x, eps, codec)
            # --class-groups K: class k of n is the model's class k K // n.
            y = y * config.num_classes // len(training.classes)
            y = torch.where(dropped, model.null_class, y)
            if step == done + 1 and codec.name != "none" and not 0.5 < x0.std() < 2:
                print(f"warning: latents have std {x0.std():.3g}, not 1: is scaling_factor right?")

            # Section 4.1: a constant rate, here after --warmup steps of linear growth, if any.
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * min(1, step / max(1, args.warmup))
            loss, halves, norm = training_step(
                network, ema, optimizer, (x0, x1, t, y), keep, step, bf16, args.ema_decay
            )
            pending.append((step, loss, halves, norm))

            # Several ranks vote at every tenth step only, for a vote waits for the GPU.
            stop = bool(caught) and not dist.is_initialized()
            if dist.is_initialized() and step % 10 == 0:
                stop = sum_over_ranks(torch.tensor(len(caught), device=device)).item() > 0

            # Now and then: log, save, draw. Only then need the GPU have finished.
            save = stop or step == args.steps or step % args.save_every == 0
            milestone = args.keep_every > 0 and step % args.keep_every == 0
            if not (save or milestone or step % args.log_every == 0):
                continue

            # Nothing is written after a loss that is not finite: the last good checkpoint stays.
            record = summarise(pending, args.batch_size, args.p_s if config.N else None, ckpt)
            record["lr"] = optimizer.param_groups[0]["lr"]
            seconds = time.time() - began
            record["images_per_s"] = len(pending) * args.batch_size / seconds
            record["waiting_for_data"] = waited / seconds  # a share of the time

            # A milestone has all that sampling needs, ckpt.pt what resuming needs as well.
            if rank == 0:
                if save and len(held_out):
                    record |= held_out_loss(ema, held_out, codec, args)
                with open(out / "log.jsonl", "a") as log:
                    log.write(json.dumps(record) + "\n")
                if milestone:
                    save_checkpoint(out / f"ema-{step:07}.pt", about, step, {"ema": ema})
                    draw_samples(ema, codec, training, args.seed, out / f"samples-{step:07}.png")
                if save:
                    save_checkpoint(ckpt, about, step, parts)
            if stop:
                break

            # The next interval. Saving and drawing do not count in its images per second.
            pending = []
            began = time.time()
            waited = 0.0
    finally:
        # Workers ignore the SIGTERM by which Python would end them, also after an error.
        getattr(loaded, "_shutdown_workers", list)()

    wait()  # until rank 0 has saved: a rank that ends makes torchrun end the others
    if stop:
        print(f"stopped after step {step}; the same command with --resume continues")
        sys.exit(130)  # as a program ended by Ctrl-C
    if rank == 0:
        plot_log(out / "log.jsonl", out / "loss.png")
        draw_samples(ema, codec, training, args.seed, out / "samples.png")
        print(f"next: python sample.py --ckpt {ckpt}, python evaluate.py stages --ckpt {ckpt}")


# ---------------------------------------------------------------------- which images, on which rank


def batches(count: int, batch_size: int, seed: int, flip: bool, first: int) -> Iterator[list]:
    """The items (image number, flipped) of the global batch, step after step from step `first` on.
    The order is reshuffled every epoch, by (seed, epoch); a batch may span two epochs. CHOICE: with
    `flip`, images are mirrored with probability 0.5, by (seed, step)."""

    @lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, 1, epoch)).permutation(count)

    for step in itertools.count(first):
        places = range((step - 1) * batch_size, step * batch_size)
        numbers = [int(permutation(place // count)[place % count]) for place in places]
        flipped = np.random.default_rng((seed, 0, step)).random(batch_size) < 0.5
        yield [(i, flip and bool(f)) for i, f in zip(numbers, flipped, strict=True)]


def divide_batch(batch_size: int, p_s: float, accum: int, has_lem: bool) -> tuple[slice, list]:
    """How the global batch is divided: a contiguous share for a rank, in `accum` micro-batches.
    -> this rank's share; which images of each micro-batch keep their prior, as indices. UserError
    where S or LEM would go untrained."""
    # Every micro-batch, on whatever rank, has the same size.
    rank, ranks = processes()
    size = batch_size // (ranks * accum)
    if size * ranks * accum != batch_size:
        what = f"{ranks} ranks x {accum} micro-batches (--grad-accum)"
        raise UserError(f"--batch-size {batch_size} is not divisible by {what}")

    # Who keeps the prior is decided for the global batch. FiTv2 has none.
    kept = torch.tensor(keeps_prior(batch_size, p_s if has_lem else 1)).view(ranks, accum, size)
    if has_lem and (kept.all() or not kept.any(dim=2).all()):
        what = f"--p-s {p_s} leaves S without an image, or LEM in a micro-batch of {size}"
        raise UserError(f"{what}; raise --batch-size, lower --grad-accum, or choose 0 < p_s < 1")
    share = slice(rank * accum * size, (rank + 1) * accum * size)
    return share, [rows.nonzero().squeeze(1) for rows in kept[rank]]


# ---------------------------------------------------------------------------------------- data sets

# 22 typefaces for text among those that come with matplotlib.
TYPEFACES = """
    DejaVuSans DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Oblique DejaVuSans-Bold
    DejaVuSans-BoldOblique DejaVuSansMono-Bold DejaVuSansMono-BoldOblique DejaVuSerif
    DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerif-BoldItalic STIXGeneral STIXGeneralBol
    STIXGeneralItalic STIXGeneralBolIta cmb10 cmmi10 cmr10 cmss10 cmti10 cmtt10
""".split()
LETTERS = "ABCDEFGHIJ"


@lru_cache(maxsize=4096)
def typeface(face: str, height: int) -> ImageFont.FreeTypeFont:
    """A typeface of matplotlib's, `height` pixels high."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{face}.ttf", height)


@lru_cache(maxsize=25_000)
def draw_letter(i: int, size: int, channels: int) -> torch.Tensor:
    """Letter number i, a function of i alone -> uint8 (channels, size, size), grey or RGB.
    The class is the letter. Its typeface, height, place, tilt (up to 20 degrees) and the two greys
    or colours are what only a visual prior can tell. Drawn four times too large, box-filtered."""
    rng = np.random.default_rng((2411, i))  # 2411: any number
    letter = LETTERS[i % 10]
    big = 4 * size  # of the drawing, before it is filtered

    # White on black: typeface, height, place, tilt.
    font = typeface(TYPEFACES[rng.integers(22)], round(big * rng.uniform(0.75, 1.05)))
    # Its bounding box is centred, then moved by up to 5% in each direction.
    box = np.reshape(font.getbbox(letter), (2, 2))
    corner = (big - box.sum(0)) / 2 + rng.uniform(-0.05, 0.05, 2) * big
    ink = Image.new("L", (big, big))
    ImageDraw.Draw(ink).text(tuple(corner), letter, 255, font)
    ink = ink.rotate(rng.uniform(-20, 20), Image.BICUBIC).resize((size, size), Image.BOX)

    # Two greys or colours, drawn until their contrast, in luminance, is a third of the scale.
    weights = np.array([0.299, 0.587, 0.114]) if channels == 3 else np.ones(1)
    front = back = np.zeros(channels)
    while abs((front - back) @ weights) < 85:
        front, back = rng.uniform(0, 255, (2, channels))
    image = back + np.asarray(ink)[:, :, None] / 255 * (front - back)  # (size, size, channels)
    return torch.from_numpy(image.round().astype(np.uint8)).permute(2, 0, 1).contiguous()


class Labelled(Dataset):
    """Labelled images, or cached latents: item (i, flipped) -> uint8 image or moments, and class.
    The set consists of some `rows` of `members`, and load(member) reads one. The sampler decides
    about flips, so that they are a function of (seed, step)."""

    def __init__(self, classes: list[str], labels, members, load: Callable, rows: np.ndarray):
        self.classes = classes
        self.labels = np.asarray(labels)[rows]
        self.members = members
        self.load = load
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        i, flipped = item
        x = self.load(self.members[self.rows[i]])
        if isinstance(x, np.ndarray):  # cached moments of the image and of its mirror image
            x = torch.from_numpy(x[int(flipped)].astype(np.float32))
        elif flipped:
            x = x.flip(-1)
        return x, int(self.labels[i])


def read_data(data: str, size: int, channels: int) -> tuple[list, str]:
    """--data -> [class names, the class of each member, the members, how to load one], all but the
    rows of a Labelled; and a fingerprint, which tells by names whether a later command sees the
    same classes and files. Raises UserError or FileNotFoundError for an unusable folder."""
    if data == "letters":
        labels = [i % 10 for i in range(25_000)]
        digest = hashlib.sha256(json.dumps([list(LETTERS), labels]).encode())
        load = partial(draw_letter, size=size, channels=channels)
        return [list(LETTERS), labels, range(25_000), load], digest.hexdigest()

    # A folder with a folder for each class. No file is opened, nor its size looked up.
    from torchvision.datasets import ImageFolder

    if not Path(data).is_dir():
        raise UserError(f"--data {data} is neither letters nor a folder")
    folder = ImageFolder(data)
    files = [file for file, _ in folder.samples]
    digest = hashlib.sha256(json.dumps([folder.classes, folder.targets]).encode())
    for file in files:
        digest.update(f"{Path(file).relative_to(data)}\n".encode())
    load = partial(open_image, size=size, channels=channels)
    return [folder.classes, folder.targets, files, load], digest.hexdigest()


def split(everything: list, held_out: float) -> tuple[Labelled, Labelled]:
    """What read_data returns -> training set and held-out set: a share of all, at most 5,000, the
    same for any --seed. Raises UserError for a class that has no image left to train on."""
    classes, labels, *_ = everything
    order = np.random.default_rng(0).permutation(len(labels))
    cut = min(round(held_out * len(labels)), 5000)
    training = Labelled(*everything, order[cut:])
    untrained = set(range(len(classes))) - set(training.labels.tolist())
    if untrained:
        raise UserError(f"class {classes[min(untrained)]} has no training image; lower --held-out")
    return training, Labelled(*everything, order[:cut])


def load_data(data: str, size: int, channels: int, held_out: float) -> tuple:
    """-> training images, held-out images, fingerprint: see read_data and split."""
    everything, fingerprint = read_data(data, size, channels)
    return *split(everything, held_out), fingerprint


# ------------------------------------------------------------------------------------- latent cache

# Each worker opens its own memory map: a pickled one would be the whole file.
open_latents = lru_cache(maxsize=1)(partial(np.load, mmap_mode="r"))


def read_latents(file: Path, i: int) -> np.ndarray:
    """The moments of image i and of its mirror image: (2 flips, 2 moments, C, H, W), fp16."""
    latents = open_latents(file)
    latents._mmap.madvise(mmap.MADV_RANDOM)  # reads are random: the system should not read ahead
    return latents[i]


def encode_cache(file: Path, args: argparse.Namespace, codec: Codec, settings: dict) -> None:
    """Encodes all images of --data into latents.npy, (n, 2 flips, 2 moments, C, H, W) in fp16:
    mean and standard deviation of the VAE's posterior, from which each step draws anew. Each rank
    encodes a contiguous part. The file gets its name when it is complete."""
    rank, ranks = processes()
    everything, fingerprint = read_data(args.data, args.image_size, args.channels)
    images = Labelled(*everything, np.arange(len(everything[1])))
    n = len(images)
    temporary = file.with_name(".dod-latents.npy")

    # Rank 0 makes the file. Its pages take up space only later, so the disk is looked at now.
    if rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        channels, side = codec.latent_shape(args.channels, args.image_size)
        np.lib.format.open_memmap(temporary, "w+", np.float16, (n, 2, 2, channels, side, side))
        size = temporary.stat().st_size
        if shutil.disk_usage(file.parent).free < size:
            raise UserError(f"--cache needs {size / 1e9:.2f} GB, more than {file.parent} has free")
    wait()

    # This rank's part. Images are mirrored here, so that each file is read only once.
    latents = np.lib.format.open_memmap(temporary, "r+")
    items = [(i, False) for i in range(rank * n // ranks, (rank + 1) * n // ranks)]
    loader = DataLoader(images, batch_size=64, sampler=items, num_workers=args.workers)
    for k, (x, _) in enumerate(tqdm(loader, "encoding", disable=rank > 0)):
        place = items[64 * k][0]
        for flipped, view in enumerate([x, x.flip(-1)]):
            moments = torch.stack(codec.moments(view), dim=1)  # (b, 2, C, H, W)
            latents[place : place + len(x), flipped] = moments.half().cpu().numpy()
    latents.flush()
    wait()

    # What else training needs, and what tells one cache from another.
    if rank == 0:
        note = {"classes": images.classes, "labels": images.labels.tolist()}
        note |= {"fingerprint": fingerprint} | settings
        file.with_name("about.json").write_text(json.dumps(note))
        temporary.replace(file)
    wait()


def open_data(args: argparse.Namespace, codec: Codec) -> tuple[Labelled, Labelled, str]:
    """Training set, held-out set and fingerprint, of the images of --data or of their --cache. A
    full cache needs neither the images nor a look at their folder. Raises UserError."""
    if not args.cache:
        return load_data(args.data, args.image_size, args.channels, args.held_out)
    file = Path(args.cache) / "latents.npy"
    settings = {"data": str(Path(args.data).resolve()), "image_size": args.image_size}
    settings |= {"vae": codec.name, "scale": codec.scale}
    missing = not file.exists()
    wait()  # all ranks have looked before one of them begins to write
    if missing:
        encode_cache(file, args, codec, settings)

    # Latents of another data set, VAE or size would silently train another model.
    note = json.loads(file.with_name("about.json").read_text())
    for key, value in settings.items():
        if note[key] != value:
            raise UserError(f"--cache {args.cache} was made with {key} {note[key]}, not {value}")
    members = range(len(note["labels"]))
    everything = [note["classes"], note["labels"], members, partial(read_latents, file)]
    return *split(everything, args.held_out), note["fingerprint"]


# -------------------------------------------------------------------------------------- checkpoints

# The flags on which the result of a run depends. A resumed run has to repeat them.
RECORDED = """
    image_size channels held_out batch_size lr lem_lr_factor warmup p_s flip seed precision
    ema_decay
""".split()


def save_checkpoint(path: Path, about: dict, step: int, parts: dict) -> None:
    """Writes a checkpoint, whole or not at all. parts: ema and, for resuming, model, optimizer."""
    states = {key: part.state_dict() for key, part in parts.items()}
    with replacing(path) as temporary:
        torch.save({"format": "dod-3", "step": step, **about, **states}, temporary)


def resume(path: Path, parts: dict, about: dict) -> int:
    """Loads a checkpoint into the parts of a run -> its step. UserError if it is another run's."""
    # Compare every setting its result depends on. Data and VAE may have moved.
    saved = load_checkpoint(path)
    then = saved | saved["config"]
    free = ("data", "codec", "config", "cfg", "fingerprint")
    for key, value in (about | about["config"]).items():
        if key not in free and then.get(key) != value:
            raise UserError(f"cannot resume {path}: {key} was {then.get(key)}, now {value}")

    # A broken image may have been mended or removed since: the run goes on, and says so.
    if saved["fingerprint"] != about["fingerprint"]:
        print("files of --data were added, removed or renamed: others are held out from now on")
    for key, part in parts.items():
        part.load_state_dict(saved[key])
    return saved["step"]


def group_classes(names: list[str], K: int | None) -> list[str]:
    """--class-groups K: class k of n belongs to group k K // n -> the groups' names, like A-E."""
    K = K or len(names)
    if K > len(names):
        raise UserError(f"--class-groups {K}: there are only {len(names)} classes")
    groups = [[] for _ in range(K)]
    for k, name in enumerate(names):
        groups[k * K // len(names)].append(name)
    return ["-".join(dict.fromkeys([group[0], group[-1]])) for group in groups]


def build(args: argparse.Namespace, config: Config, device: torch.device) -> tuple:
    """-> model, its EMA, optimizer and network of a new run. The network is what training calls:
    the model, with --compile compiled, and with several ranks inside of DistributedDataParallel.

    CHOICE: AdamW's betas are the usual 0.9 and 0.999; section 4.1 names rate and weight decay.
    """
    torch.manual_seed(args.seed)
    model = DoD(config)
    # --init: another run's EMA weights, but where shapes differ, as with other classes.
    if args.init:
        saved = load_checkpoint(args.init)["ema"]
        own = model.state_dict()
        fitting = {key: v for key, v in saved.items() if key in own and v.shape == own[key].shape}
        model.load_state_dict(own | fitting)
        print(f"--init: fresh weights: {', '.join(own.keys() - fitting.keys()) or 'none'}")

    # The average starts as a copy of the weights; it is never trained itself.
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    # LEM and the MLP behind it may learn at a rate of their own.
    groups = []
    for own, lr in ((False, args.lr), (True, args.lr * args.lem_lr_factor)):
        named = model.named_parameters()
        part = [p for name, p in named if name.startswith(("lem.", "prior_mlp.")) == own]
        groups += [{"params": part, "lr": lr, "peak_lr": lr}] if part else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0, fused=True)

    # Compiled block by block, so that the weights keep their names.
    blocks = [module for module in model.modules() if isinstance(module, (Block, ViTBlock))]
    if args.compile:
        for block in blocks:
            block.compile(dynamic=False)
    if processes()[1] == 1:
        return model, ema, optimizer, model

    # Gradients are averaged over the ranks. The buffers are constants, which need no exchange.
    torch._dynamo.config.optimize_ddp = False  # it would cut graphs that are small already
    model._ddp_params_and_buffers_to_ignore = [name for name, _ in model.named_buffers()]
    return model, ema, optimizer, DistributedDataParallel(model, gradient_as_bucket_view=True)


# ---------------------------------------------------------------------------------- log and signals


def summarise(pending: list[tuple], batch_size: int, p_s: float | None, ckpt: Path) -> dict:
    """A log record of the last steps, over all ranks. pending: (step, loss (), halves (2,), norm
    ()) of each, read here and not in each step, so that a GPU need not wait; p_s: None without LEM.
    Raises FloatingPointError that names the first step that is not finite."""
    losses = sum_over_ranks(torch.stack([loss for _, loss, _, _ in pending])) / processes()[1]
    halves = sum_over_ranks(torch.stack([halves for _, _, halves, _ in pending])).mean(0)
    norms = torch.stack([norm for _, _, _, norm in pending])
    bad = (~(losses + norms).isfinite()).nonzero()
    if len(bad):
        what = f"the loss of step {pending[bad[0]][0]} (or its gradient) is not finite"
        raise FloatingPointError(f"{what}; {ckpt} is the last good one; try a lower --lr")
    record = {"step": pending[-1][0], "loss": losses.mean().item()}
    if p_s is not None:
        without = round(p_s * batch_size)  # the images with S, in each step
        record["loss_prior"] = halves[0].item() / (batch_size - without)
        record["loss_S"] = halves[1].item() / without
    return record | {"grad_norm": norms.mean().item()}


@torch.no_grad()
def held_out_loss(ema: DoD, held_out: Labelled, codec: Codec, args: argparse.Namespace) -> dict:
    """Eq. 3 of the EMA model on up to 256 held-out images, with the same noise and times each time,
    those of step 0, and no class dropped. It rises when the model begins to overfit."""
    device = ema.cos.device
    items = [held_out[i, False] for i in range(min(256, len(held_out)))]
    generator = torch.Generator(device)
    x1, eps, t, _ = draw_noise(args.seed, 0, len(items), ema.config, generator)
    x0 = to_latents(torch.stack([x for x, _ in items]).to(device), eps, codec)
    y = torch.tensor([k for _, k in items], device=device)
    y = y * ema.config.num_classes // len(held_out.classes)
    kept = torch.tensor(keeps_prior(len(items), args.p_s if ema.config.N else 1), device=device)
    losses = rectified_flow_loss(ema, x0, y, x1, t, kept.nonzero().squeeze(1))
    found = {"held_out_loss": losses.mean().item()}
    if ema.config.N:
        found["held_out_loss_prior"] = losses[kept].mean().item()
        found["held_out_loss_S"] = losses[~kept].mean().item()
    return found


def cut_log(path: Path, step: int) -> None:
    """Drops the records after the checkpoint's step: those steps will come again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # a kill may cut off the last one
    with replacing(path) as temporary:
        temporary.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))


def plot_log(log: Path, out: Path) -> None:
    """Draws the loss of log.jsonl, in training and on held-out images."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    for key in ("loss", "held_out_loss"):
        points = [(record["step"], record[key]) for record in records if key in record]
        axes.plot(*np.reshape(points, (-1, 2)).T, label=key)
    axes.set(title="Eq. 3", xlabel="step", yscale="log")
    axes.legend()
    figure.savefig(out, dpi=100)


def draw_samples(ema: DoD, codec: Codec, data: Labelled, seed: int, out: Path) -> None:
    """Draws real images of up to ten classes, then stages 1 to 3, always from the same noise."""
    # Four rows of them; a class with fewer images shows some again.
    shown = np.unique(data.labels)[:10].tolist()
    members = [np.resize(np.flatnonzero(data.labels == k), 4) for k in shown]
    real = torch.stack([data[i, False][0] for i in np.transpose(members).flatten()])
    blocks = [("real", codec.decode(to_latents(real.to(ema.cos.device), None, codec)))]

    # Nothing but the weights changes from one such file of a run to the next.
    y = torch.tensor(shown * 4, device=ema.cos.device) * ema.config.num_classes // len(data.classes)
    samples, _ = generate(ema, y, stages=3 if ema.config.N else 1, seed=seed)
    for i, z0 in enumerate(samples):
        blocks.append((f"stage {i + 1}", codec.decode(z0)))
    draw_grid(out, blocks, [data.classes[k] for k in shown])


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Adds up what each rank has, if there are several."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def ignore_signals(worker: int) -> None:
    """For the loader's workers: a signal for the run must not end them before the run has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------ command

# Defaults that depend on --data, --vae and --model. FOLDER serves any folder of images. cfg of the
# letters: the best of a scan against training images, not held-out ones.
LETTER_DATA = dict(image_size=16, channels=1, patch_size=4, flip=False, cfg=2.0)
FOLDER = dict(image_size=32, channels=3, patch_size=4, flip=True, cfg=3.5)
IMAGENET = dict(image_size=256, channels=3, patch_size=2, flip=True, cfg=5.5)  # with --vae
# CHOICE: DoD-Ti learns at 20 times the paper's rate, after a warm-up. Without the warm-up LEM died
# in our runs: e_s became the same for all images, and the loss with a prior the same as without.
SMALL = dict(batch_size=64, lr=2e-3, lem_lr_factor=1.0, warmup=300, steps=2500, save_every=500)
# Batch size and rate are those of section 4.1, the 400,000 steps those of section 4.2.
# CHOICE: no warm-up, for the paper says that the rate is constant; FiTv2's code has one (--warmup).
PAPER = dict(batch_size=256, lr=1e-4, lem_lr_factor=1.0, warmup=0, steps=400_000, save_every=10_000)


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags. Those without a default here get it from the tables above."""
    parser = Parser(epilog="Default None: what suits --data, --vae and --model, else nothing.")
    switch = argparse.BooleanOptionalAction
    share = at_least(float, 0, 1)
    natural = at_least(int, 1)
    count = at_least(int, 0)
    # fmt: off
    add = parser.add_argument
    add("--data", default="letters", help="letters, or a folder with one for each class")
    add("--vae", default="none", help="Stable Diffusion's: name on the hub, or folder")
    add("--cache", help="folder for the latents of --vae, encoded once")
    add("--model", default="DoD-Ti", choices=CONFIGS, help="preset; -Ti are for a CPU")
    add("--out", help="folder of the run; default: out/ and the name of the data")
    add("--resume", action=switch, default=False, help="continue the run in --out, if there is one")
    add("--init", help="checkpoint whose EMA weights to start from, where they fit")

    # Shapes. Their defaults come from --data and --model.
    add("--image-size", type=natural, help="pixels; images are cropped and resized")
    add("--channels", type=int, choices=[1, 3], help="1: grey, 3: RGB")
    add("--patch-size", type=natural, help="p, in pixels; with --vae, in the latent")
    add("--latent-tokens", type=count, help="N, Table 2; 0: no LEM (FiTv2)")
    add("--prior-from", choices=["lem", "patches", "means"], default="lem", help="see lem.py")
    add("--class-groups", type=natural, help="merge neighbouring classes; 1: unconditional")
    add("--flip", action=switch, help="mirror images at random")
    add("--held-out", type=at_least(float, 0, 0.9), default=0.1, help="share, up to 5000 images")

    # The training itself, sections 3.3 and 4.1.
    add("--steps", type=natural, help="training steps")
    add("--batch-size", type=natural, help="images a step, of all ranks together")
    add("--grad-accum", type=natural, default=1, help="micro-batches of a step, one after another")
    add("--lr", type=at_least(float, 0), help="AdamW's constant learning rate")
    add("--lem-lr-factor", type=at_least(float, 0), help="LEM's rate, as a multiple of --lr")
    add("--warmup", type=count, help="first steps, over which the rate grows")
    add("--ema-decay", type=share, default=0.999, help="of the weights that are sampled from")
    add("--p-s", type=share, default=0.5, help="share of a batch that gets S for a prior, Table 3")
    add("--seed", type=count, default=0, help="the same seed, the same run")
    add("--precision", choices=["fp32", "bf16"], help="of autocast; default: bf16 on CUDA")
    add("--compile", action=switch, default=False, help="torch.compile")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--workers", type=count, default=0, help="processes that load images, for each rank")

    # What it leaves behind.
    add("--log-every", type=natural, default=50, help="steps between records in log.jsonl")
    add("--save-every", type=natural, help="steps between checkpoints")
    add("--keep-every", type=count, default=0, help="steps between milestones and their samples")
    # fmt: on
    args = parser.parse_args(argv)

    # The most specific tables come last, and what the user gives overrides them all.
    preset = CONFIGS[args.model]
    small = args.model.endswith("-Ti")
    defaults = LETTER_DATA if args.data == "letters" else FOLDER
    if args.vae != "none":
        defaults = IMAGENET
    defaults = defaults | (SMALL if small else PAPER | dict(patch_size=preset.p, cfg=preset.cfg))
    defaults |= dict(latent_tokens=preset.N, out=f"out/{Path(args.data).resolve().name}")
    given = {key: value for key, value in vars(args).items() if value is not None}
    return argparse.Namespace(**vars(args) | defaults | given)


def main() -> None:
    """Makes sure that --out is free, joins the other ranks, and trains."""
    args = parse(sys.argv[1:])
    device = pick_device(args.device)
    if not args.precision:
        args.precision = "bf16" if device.type == "cuda" else "fp32"
    if args.cache and args.vae == "none":
        raise UserError("--cache keeps latents; without --vae there are none")

    # Nothing that is there is overwritten. Hidden files are what a kill leaves of our own.
    out = Path(args.out)
    if args.resume and (out / "ckpt.pt").exists():
        args.init = None  # its weights have been superseded
    elif processes()[0] == 0 and any(out.glob("[!.]*")):
        raise UserError(f"{out} has files already; give another --out, or --resume its run")
    if processes()[0] > 0:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    with process_group(device):
        train(args)


if __name__ == "__main__":
    run_command(main)
