"""train.py -- data sets, latent cache and end-to-end training of DoD. Sections 3.3 and 4.1.

Backbone and LEM learn together, from real pictures alone: in training, a picture's own latent is
its visual prior, and a share p_s of each batch gets the sample token S instead.

All that is random about an image in training (order, flip, noises, time, dropped class) is a
function of (seed, step, position in the global batch). So neither the number of processes nor
--grad-accum changes what is computed, and a resumed run needs no generator's state: on a CPU it
equals an uninterrupted one bit for bit.

    python train.py                                    # DoD-Ti, coloured letters; minutes on a CPU
    python train.py --data digits                      # handwritten digits, part of scikit-learn
    python train.py --data pictures/ --image-size 32   # yours: a folder of pictures for each class
    python train.py --model DoD-B --batch-size 8 --benchmark
    torchrun --nproc-per-node 8 train.py --data imagenet/train --model DoD-B \\
        --vae stabilityai/sd-vae-ft-ema --cache latents/
"""

import argparse
import copy
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from flow import keeps_prior, logit_normal, naive_loss, rectified_flow_loss
from lem import ViTBlock
from model import CONFIGS, Block, Config, DoD, UserError, count_macs
from sample import (
    Codec, Parser, at_least, compare_note, draw_grid, fit_picture, generate, load_checkpoint,
    load_codec, open_picture, pick_device, process_group, processes, remove_remains, replacing,
    run_command, wait,
)  # fmt: skip

# --------------------------------------------------------------------------------------- data sets


class Pictures(Dataset):
    """Labelled pictures: the i-th is source(rows[i]), made uint8 (channels, size, size)."""

    def __init__(self, classes: list[str], labels, source: Callable, rows, size, channels):
        self.classes, self.labels, self.rows = classes, np.asarray(labels)[rows], rows
        self.source, self.size, self.channels = source, size, channels
        self.in_memory = len(rows) * channels * size**2 < 2**30  # less than 1 GiB
        self.seen = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        picture = self.seen.get(i)
        if picture is None:
            picture = fit_picture(self.source(int(self.rows[i])), self.size, self.channels)
            if self.in_memory:
                self.seen[i] = picture
        return picture, int(self.labels[i])

    def view(self, i: int, flipped: bool) -> tuple[torch.Tensor, int]:
        picture, y = self[i]
        return picture.flip(-1) if flipped else picture, y


# The letters' typefaces: the 22 for text among those that ship with matplotlib.
TYPEFACES = """
    DejaVuSans DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Oblique DejaVuSans-Bold
    DejaVuSans-BoldOblique DejaVuSansMono-Bold DejaVuSansMono-BoldOblique DejaVuSerif
    DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerif-BoldItalic STIXGeneral STIXGeneralBol
    STIXGeneralItalic STIXGeneralBolIta cmb10 cmmi10 cmr10 cmss10 cmti10 cmtt10
""".split()
LETTERS, BRIGHTNESS = "ABCDEFGHIJ", np.array([0.299, 0.587, 0.114])


@lru_cache(maxsize=4096)
def typeface(name: str, height: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", height)


def draw_letter(i: int, size: int) -> Image.Image:
    """Letter number i, a function of i alone -> an RGB picture of size x size pixels.

    The class tells the letter. Its typeface, height, place, tilt (up to 20 degrees) and two colours
    are left for a visual prior to tell. Drawn four times too large, then box-filtered.
    """
    rng, big, letter = np.random.default_rng((2411, i)), 4 * size, LETTERS[i % 10]  # 2411: any
    font = typeface(TYPEFACES[rng.integers(22)], round(big * rng.uniform(0.75, 1.05)))
    box = np.reshape(font.getbbox(letter), (2, 2))
    corner = (big - box.sum(0)) / 2 + rng.uniform(-0.05, 0.05, 2) * big
    ink = Image.new("L", (big, big))
    ImageDraw.Draw(ink).text(tuple(corner), letter, 255, font)
    ink = ink.rotate(rng.uniform(-20, 20), Image.BICUBIC).resize((size, size), Image.BOX)
    front = back = np.zeros(3)
    while abs((front - back) @ BRIGHTNESS) < 85:  # a contrast of a third of the scale
        front, back = rng.uniform(0, 255, (2, 3))
    picture = back + np.asarray(ink)[:, :, None] / 255 * (front - back)  # (size, size, 3)
    return Image.fromarray(picture.round().astype(np.uint8))


def picture_of(data, i: int) -> Image.Image:
    return data[i][0]


def torchvision_data(name: str):
    """CIFAR-10, MNIST (downloaded into data/ on first use) or a folder of class folders."""
    from torchvision import datasets

    known = {"cifar10": datasets.CIFAR10, "mnist": datasets.MNIST}
    try:
        if name in known:
            return known[name]("data", download=True)
        return datasets.ImageFolder(name, loader=open_picture)
    except Exception as error:  # no such folder, no pictures in it; and whatever urllib raises
        advice = "it must be a folder that holds a folder of pictures for each class"
        if name in known:
            advice = "the data set is not in data/ and cannot be downloaded; is there a network?"
        raise UserError(f"--data {name}: {error}; {advice}") from None


def load_data(name: str, size: int, channels: int, held_out: float) -> tuple[Pictures, Pictures]:
    """-> training pictures and held-out pictures (the share `held_out`, at most 5,000).

    name: letters, digits, cifar10, mnist, or a folder with one folder of pictures per class. The
    split depends on the data alone, not on --seed. Raises UserError for data that cannot be used.
    """
    if name == "letters":
        classes, labels = list(LETTERS), np.arange(25_000) % 10
        source = partial(draw_letter, size=size)
    elif name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()  # 1,797 scans of 8 x 8 pixels, 0 .. 16
        classes, labels = [str(k) for k in range(10)], digits.target
        source = [Image.fromarray(np.uint8(scan * 255 / 16)) for scan in digits.images].__getitem__
    else:
        rank, count = processes()
        for turn in range(count) if name in DATA else [rank]:  # the first one may download it
            if turn == rank:
                data = torchvision_data(name)
            wait()
        classes, labels, source = data.classes, data.targets, partial(picture_of, data)
    if len(classes) < 2:
        raise UserError(f"--data {name} has the one class {classes[0]!r}; at least 2 are needed")
    order = np.random.default_rng(0).permutation(len(labels))
    order = np.split(order, [min(round(held_out * len(labels)), 5000)])
    if not len(order[1]):
        raise UserError(f"--held-out {held_out} leaves none of {len(labels)} pictures to train on")
    held, rest = (Pictures(classes, labels, source, rows, size, channels) for rows in order)
    return rest, held


# ----------------------------------------------------------------------------------- latent cache


class Latents(Dataset):
    """Cached latents, in files of PART pictures each: (n, 2 flips, 2 moments, C, H, W), fp16.

    The moments are mean and standard deviation of the VAE's posterior: each use draws from it anew.
    """

    PART = 8192  # 268 MB for 256 x 256 pictures

    def __init__(self, files: list[Path], labels: np.ndarray):
        self.labels, self.files = labels, files

    def __len__(self) -> int:
        return len(self.labels)

    def view(self, i: int, flipped: bool) -> tuple[torch.Tensor, int]:
        """Mean and standard deviation (2, C, H, W) of picture i's posterior, and its class."""
        moments = mapped(self.files[i // self.PART])[i % self.PART, int(flipped)]
        return torch.from_numpy(moments.astype(np.float32)), int(self.labels[i])


@lru_cache(maxsize=256)  # in each process for itself: pickled, a map would be the whole file
def mapped(file: Path) -> np.ndarray:
    """A .npy file, memory-mapped."""
    return np.load(file, mmap_mode="r")


def open_cache(folder: Path, pictures: Pictures, codec: Codec, workers: int) -> Latents:
    """--cache: the latents of these pictures in `folder`, encoded first where parts are missing.

    meta.json says what they were made of, 00000.npy and so on are the parts. Every process encodes
    its share of the missing ones; a part appears whole, so a run that was killed goes on with the
    next. Raises UserError for a folder of other data, and for too small a disk.
    """
    rank, size = processes()
    labels = hashlib.sha256(pictures.labels.tobytes()).hexdigest()
    about = {"vae": codec.name, "scaling_factor": codec.scale, "count": len(pictures)}
    about |= {"image_size": pictures.size, "classes": pictures.classes, "labels": labels}
    meta = folder / "meta.json"
    compare_note(meta, about)
    if not meta.exists() and any(folder.glob("[!.]*")):
        raise UserError(f"--cache {folder} has files, but no meta.json; give another folder")
    files = [folder / f"{k:05}.npy" for k in range(-(-len(pictures) // Latents.PART))]
    missing = [k for k, file in enumerate(files) if not file.exists()]
    wait()  # all have looked before one begins to write
    if rank == 0:
        remove_remains(folder)
    wait()
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        one, free = codec.encode(pictures[0][0][None]).nbytes, shutil.disk_usage(folder).free
        count = min(len(missing) * Latents.PART, len(pictures))
        need = 2 * one * count  # 2 flips x 2 moments, half of fp32 each
        sizes = f"{need / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free"
        if need > free:
            raise UserError(f"the latents need {sizes}; make room or give another --cache")
        if rank == 0:
            print(f"encoding {len(missing)} parts of the latents: {sizes}", flush=True)
        with replacing(meta) as temporary:
            temporary.write_text(json.dumps(about))
        encode_parts({k: files[k] for k in missing[rank::size]}, pictures, codec, workers)
        wait()
    for first, file in zip(range(0, len(pictures), Latents.PART), files, strict=True):
        try:
            if len(np.load(file, mmap_mode="r")) != min(Latents.PART, len(pictures) - first):
                raise ValueError("too few latents, or too many")
        except (OSError, ValueError) as error:
            raise UserError(f"--cache: {file} is damaged ({error}); remove it") from None
    latents = Latents(files, pictures.labels)
    for i in {0, len(pictures) // 2, len(pictures) - 1}:  # the same pictures, the same weights?
        mean, _ = codec.moments(pictures[i][0][None])
        if (mean[0].cpu() - latents.view(i, False)[0][0]).abs().mean() > 0.05:
            raise UserError(f"--cache {folder}: latent {i} is of another picture or VAE; remove it")
    return latents


def encode_parts(files: dict[int, Path], pictures: Pictures, codec: Codec, workers: int) -> None:
    """Writes part k of the latents to files[k], for each k."""
    n, total, batch = Latents.PART, len(pictures), 64  # a divisor of PART
    spans = [range(k * n, min((k + 1) * n, total)) for k in files]
    subset = Subset(pictures, [i for span in spans for i in span])
    loader = iter(DataLoader(subset, batch, num_workers=workers))
    for file, span in zip(tqdm(files.values(), unit="part", disable=None), spans, strict=True):
        rows = []
        for images, _ in islice(loader, -(-len(span) // batch)):
            flips = [torch.stack(codec.moments(x), 1).cpu() for x in (images, images.flip(-1))]
            rows.append(torch.stack(flips, 1).half().numpy())  # (b, 2 flips, 2, C, H, W)
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, np.concatenate(rows))


# --------------------------------------------------------------------------------- random examples


class Examples(Dataset):
    """All that the loss needs of one image of one step. Item (step, position, i), of picture i:

    picture uint8 (channels, size, size) or cached moments (2, C, H, W), flipped or not; eps
    (C, H, W), for the posterior; x1 (C, H, W); y (); t (). Random by (seed, step, position).
    CHOICE: classes are dropped with probability 0.1, whether or not the prior is (keeps_prior), and
    pictures mirrored with 0.5; the paper names neither.
    """

    def __init__(self, data: Pictures | Latents, args: argparse.Namespace, config: Config):
        self.data, self.args, self.null_class = data, args, config.num_classes
        self.shape = (config.latent_channels, config.latent_size, config.latent_size)

    def __getitem__(self, item: tuple[int, int, int]):
        step, position, i = item
        rng = np.random.default_rng((self.args.seed, 0, step, position))
        flipped, unclassed = rng.random(2) < (0.5 * self.args.flip, self.args.class_dropout)
        eps, x1 = torch.from_numpy(rng.standard_normal((2, *self.shape), np.float32))
        x, y = self.data.view(i, flipped)
        return x, eps, x1, self.null_class if unclassed else y, logit_normal(1, rng)[0]


def batches(size: int, batch_size: int, seed: int, steps: range) -> Iterator[list[tuple]]:
    """The items (step, position, picture number) of each step n: places (n - 1) B to n B - 1 of an
    endless row of permutations, the e-th of which is a function of (seed, e)."""

    @lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, 1, epoch)).permutation(size)

    for step in steps:
        places = range((step - 1) * batch_size, step * batch_size)
        numbers = [int(permutation(i // size)[i % size]) for i in places]
        yield [(step, position, i) for position, i in enumerate(numbers)]


# ------------------------------------------------------------------------------------------- a run


class Objective(nn.Module):
    """The loss as one forward pass: what DistributedDataParallel wants to wrap."""

    def __init__(self, model: DoD):
        super().__init__()
        self.model = model

    def forward(self, loss_function: Callable, *parts) -> torch.Tensor:
        return loss_function(self.model, *parts)


class Run:
    """Model, EMA and optimiser of a training run, and this process's share of each batch.

    The first weights are a function of --seed. Raises UserError for a batch that cannot be shared.
    """

    def __init__(self, args: argparse.Namespace, config: Config, codec: Codec | None = None):
        self.args, self.config, self.codec = args, config, codec or load_codec("none")
        self.device, (self.rank, self.processes) = pick_device(args.device), processes()
        self.share_batch()
        torch.manual_seed(args.seed)
        self.model = DoD(config).to(self.device)
        self.model.grad_checkpoint = args.grad_checkpoint
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(  # section 4.1; CHOICE: betas, the usual ones
            self.model.parameters(), args.lr, betas=(0.9, 0.999), weight_decay=0, fused=True
        )
        self.set_precision()
        if args.compile:
            torch._dynamo.config.optimize_ddp = False  # it would cut graphs that are small already
            for module in self.model.modules():  # block by block: the weights keep their names
                if isinstance(module, (Block, ViTBlock)):
                    module.compile(dynamic=False)
        self.objective = Objective(self.model)
        if self.processes > 1:
            self.objective = nn.parallel.DistributedDataParallel(
                self.objective, gradient_as_bucket_view=True,
                find_unused_parameters=self.some_unused,
            )  # fmt: skip

    def share_batch(self) -> None:
        """--batch-size is that of all processes: each takes a contiguous share and, for
        --grad-accum, cuts it into micro-batches. keep: in each of mine, who keeps the prior."""
        B, accum = self.args.batch_size, self.args.grad_accum
        if B % (self.processes * accum):
            what = f"--batch-size {B} is not divisible by {self.processes} processes x {accum}"
            raise UserError(f"{what} micro-batches (--grad-accum); change one of them")
        micro = B // (self.processes * accum)
        keep = keeps_prior(B, self.args.p_s)
        keep = [keep[i : i + micro] for i in range(0, B, micro)]
        self.share = slice(self.rank * micro * accum, (self.rank + 1) * micro * accum)
        self.keep = keep[self.rank * accum : (self.rank + 1) * accum]
        # Where a whole micro-batch keeps (or lacks) the prior, S (or LEM) gets no gradient there.
        self.some_unused = bool(self.config.N) and any(all(k) or not any(k) for k in keep)

    def set_precision(self) -> None:
        """--precision; auto: on CUDA bf16, or fp16 where that is missing; else fp32. Weights,
        residual stream, LayerNorms, softmax statistics and loss are fp32 in each."""
        name, cuda = self.args.precision, self.device.type == "cuda"
        if name == "auto":
            bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
            name = "bf16" if bf16 else "fp16" if cuda else "fp32"
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=name == "fp16")

    def step(self, step: int, x, eps, x1, y, t, loss_function=rectified_flow_loss):
        """Loss, gradient, AdamW, EMA -> loss of each of my images (b,), norm of the gradient ().

        x: uint8 pictures or cached moments (b, 2, C, H, W); eps, x1 (b, C, H, W); y, t (b,).
        """
        x0 = self.latents(x, eps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * min(1, step / max(1, self.args.warmup))
        self.optimizer.zero_grad(set_to_none=True)
        losses, last = [], len(self.keep) - 1
        parts = zip(*(part.chunk(last + 1) for part in (x0, y, x1, t)), self.keep, strict=True)
        for i, micro_batch in enumerate(parts):
            shared = self.processes > 1 and i < last  # gradients are averaged once, at the end
            with self.objective.no_sync() if shared else nullcontext():
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    loss = self.objective(loss_function, *micro_batch)
                self.scaler.scale(loss.mean() / (last + 1)).backward()
            losses.append(loss.detach())
        self.scaler.unscale_(self.optimizer)
        # CHOICE: clipped at 1; the paper names no clip.
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)  # with fp16, not if the gradient overflowed
        self.scaler.update()
        ema_update(self.ema, self.model, step)
        return torch.cat(losses), norm

    def latents(self, x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """uint8 pictures or cached moments (b, 2, C, H, W) -> samples of their posterior."""
        if x.dtype == torch.uint8:
            return self.codec.encode(x, eps)
        return x[:, 0] + x[:, 1] * eps

    def memory(self) -> float:
        """The most memory that this process has held, GiB: on the GPU, else altogether."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@torch.no_grad()
def ema_update(ema: DoD, model: DoD, step: int) -> None:
    """ema <- decay ema + (1 - decay) model, in fp32, decay 0.999 (section 4.1).

    CHOICE: step n uses min(0.999, (1 + n) / (10 + n)), so that the random start is soon forgotten.
    """
    decay = min(0.999, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


PARTS = "model", "ema", "optimizer", "scaler"


def save_checkpoint(path: Path, run: Run, step: int, about: dict) -> None:
    """Writes a plain dict of all that sampling and resuming need, under another name, then renames.

    Raises UserError if it cannot be written (disk full); an earlier checkpoint is then intact.
    """
    state = {part: getattr(run, part).state_dict() for part in PARTS}
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save({"format": "dod-1", "step": step, **about, **state}, file)


def resume(path: Path, run: Run, about: dict) -> int:
    """Loads a checkpoint into `run` -> its step; 0 if there is none.

    Raises UserError if it is of another run, or not the same one for all processes.
    """
    saved = load_checkpoint(path) if path.exists() else None
    step = saved["step"] if saved else 0
    if run.processes > 1:
        steps = torch.tensor([step, -step], device=run.device)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        if steps.sum() != 0:
            raise UserError(f"not all processes see the same {path}; give them one --out to share")
    if not saved:
        return 0
    free = {"config": None, "cfg": None}  # guidance is for sampling only
    then, now = ({**facts, **facts["config"], **free} for facts in (saved, about))
    differ = [f"{k} was {then.get(k)}, now {now[k]}" for k in now if now[k] != then.get(k)]
    if differ:
        raise UserError(f"cannot resume {path}: {differ[0]}; repeat the flags of the first run")
    for part in PARTS:
        getattr(run, part).load_state_dict(saved[part])
    return step


def initialise(path: Path, run: Run) -> str:
    """--init: the EMA weights of another run, where name and shape agree -> what stays fresh."""
    saved, own = load_checkpoint(path)["ema"], run.model.state_dict()
    fitting = {k: v for k, v in saved.items() if k in own and v.shape == own[k].shape}
    if not fitting:
        raise UserError(f"--init {path}: no tensor fits this model; choose its --model")
    for model in (run.model, run.ema):
        model.load_state_dict(own | fitting)
    return ", ".join(name for name in own if name not in fitting) or "nothing"


# ----------------------------------------------------------------------------------------- the log


def summarise(run: Run, pending: list[tuple], began: float, waited: float) -> dict:
    """A log record of the last steps, of all processes: loss, loss by quarter of t, and the rest.

    pending: (step, t (b,), loss (b,), norm ()) of each. Read here, not in each step, so that a GPU
    need not wait. began: time.time() before them; waited: seconds that they waited for data. Raises
    FloatingPointError naming the first step whose loss is not finite.
    """
    steps, t, losses, norms = zip(*pending, strict=True)
    t, losses, norms = (torch.stack(parts).cpu().double() for parts in (t, losses, norms))
    seconds = time.time() - began  # now the GPU has done them
    overflow_is_fine = run.scaler.is_enabled()  # fp16 skips such a step and scales down
    for step, loss, norm in zip(steps, losses, norms, strict=True):
        if not (loss.isfinite().all() and (overflow_is_fine or norm.isfinite())):
            raise FloatingPointError(f"the loss of step {step} (or its gradient) is not finite")
    quarter = (4 * t.flatten()).long().clamp(max=3)
    sums = torch.zeros(4).double().index_add(0, quarter, losses.flatten())
    totals = torch.cat([sums, quarter.bincount(minlength=4)])
    if run.processes > 1:
        dist.all_reduce(totals := totals.to(run.device))
    sums, counts = totals[:4].tolist(), totals[4:].tolist()
    return {
        "step": steps[-1],
        "loss": sum(sums) / sum(counts),
        "loss_by_time": [s / n if n else None for s, n in zip(sums, counts, strict=True)],
        "grad_norm": norms[norms.isfinite()].mean().item(),
        "images_per_s": sum(counts) / seconds,
        "waiting_for_data": waited / seconds,  # a share
        "memory_gib": run.memory(),
    }


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM only leave a note in the list, so that no step is left half done."""
    caught, signals = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(s, lambda number, frame: caught.append(number)) for s in signals]
    try:
        yield caught
    finally:
        for s, handler in zip(signals, before, strict=True):
            signal.signal(s, handler)


def outlive_signals(worker: int) -> None:
    """The same for a loader's process: it must not end before the step does. Ctrl-C passes it by;
    SIGTERM, which also ends it when all is done, does so after 10 s."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(10))


def agree_to_stop(run: Run, step: int, caught: list[int]) -> bool:
    """Whether a signal has reached any process. Several agree on it at every tenth step: soon
    enough for torchrun, which kills what is left of them after 30 s."""
    if run.processes == 1:
        return bool(caught)
    if step % 10:
        return False
    count = torch.tensor(len(caught), device=run.device)
    dist.all_reduce(count)
    return count.item() > 0


class Log:
    """log.jsonl and, with --tensorboard, TensorBoard's files; for process 0 alone.

    Records after `step` are cut off: those steps will come again.
    """

    def __init__(self, path: Path, step: int, tensorboard: bool):
        records, self.board = path.read_text().splitlines() if step and path.exists() else [], None
        whole = (r for r in records if r.endswith("}") and json.loads(r)["step"] <= step)
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{r}\n" for r in whole))
        self.file = path.open("a", buffering=1)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: first, pip install tensorboard") from None
            self.board = SummaryWriter(path.with_name("tensorboard"), purge_step=step + 1)

    def write(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")
        for name, value in record.items() if self.board else ():
            for k, v in enumerate(value) if isinstance(value, list) else (("", value),):
                if v is not None:
                    self.board.add_scalar(f"{name}/{k}".rstrip("/"), v, record["step"])
        if self.board:
            self.board.flush()


def run_steps(run: Run, data: Pictures | Latents, pictures, done: int, ckpt: Path, about: dict):
    """Steps done + 1 to --steps, or until a signal comes; logs and saves -> the last step done."""
    args, pending, step, first = run.args, [], done, run.rank == 0
    items = batches(len(data), args.batch_size, args.seed, range(done + 1, args.steps + 1))
    loader = iter(DataLoader(
        Examples(data, args, run.config), batch_sampler=(batch[run.share] for batch in items),
        num_workers=args.workers, pin_memory=run.device.type == "cuda",
        worker_init_fn=outlive_signals,
    ))  # fmt: skip
    log = Log(ckpt.with_name("log.jsonl"), done, args.tensorboard) if first else None
    bar = tqdm(initial=done, total=args.steps, unit="step", mininterval=1, disable=not first)
    began, waited = time.time(), 0.0
    with deferred_signals() as caught, bar:
        while step < args.steps:
            asked, step = time.time(), step + 1
            x, eps, x1, y, t = next(loader)
            waited += time.time() - asked
            if step == done + 1 and first:
                check_scale(run, x, eps)
            batch = (part.to(run.device, non_blocking=True) for part in (x, eps, x1, y, t))
            pending.append((step, t, *run.step(step, *batch)))
            bar.update()

            last, stop = step == args.steps, agree_to_stop(run, step, caught)
            every = args.log_every, args.save_every, args.keep_every, args.sample_every
            log_now, save, keep, draw = (n > 0 and step % n == 0 for n in every)
            if not (log_now or save or keep or draw or last or stop):
                continue
            record = summarise(run, pending, began, waited)
            if first:
                log.write(record)
                rate = f"{record['images_per_s']:.0f} images/s"
                bar.set_postfix_str(f"loss {record['loss']:.4f}, {rate}")
                if keep:  # first: a run killed in between repeats this step
                    save_checkpoint(ckpt.with_name(f"ckpt-{step:07}.pt"), run, step, about)
                if save or last or stop:
                    save_checkpoint(ckpt, run, step, about)
                if draw and not (last or stop):
                    spent = draw_samples(run, pictures, ckpt.with_name(f"samples-{step:07}.png"))
                    log.write({"step": step, "evaluations": spent})
            if stop:
                break
            pending, began, waited = [], time.time(), 0.0
    return step


def check_scale(run: Run, x: torch.Tensor, eps: torch.Tensor) -> None:
    """Warns if a VAE's latents are far from standard deviation 1, as the noise has it."""
    std = run.latents(x.to(run.device), eps.to(run.device)).std().item()
    if run.codec.name != "none" and not 0.5 < std < 2:
        what = f"latents have a standard deviation of {std:.3g}, not about 1; is scaling_factor in"
        print(f"warning: {what} the config.json of {run.codec.name} right?", file=sys.stderr)


WRITTEN = "ckpt.pt", "log.jsonl", "loss.png", "samples.png"
# The flags that a checkpoint records. A resumed run has to repeat them: its result depends on them.
RECORDED = (
    "data image_size channels held_out batch_size lr warmup p_s class_dropout flip seed precision"
).split()


def train(args) -> None:
    """The whole run: data, model, steps; at the end, pictures of the loss and of samples."""
    ckpt, (rank, size) = Path(args.out) / "ckpt.pt", processes()
    if args.resume and args.overwrite:
        raise UserError("--resume excludes --overwrite; leave out one")
    if args.cache and args.vae == "none":
        raise UserError("--cache keeps latents; without --vae there are none")
    there = [ckpt.with_name(f) for f in WRITTEN if ckpt.with_name(f).exists()]
    if there and not (args.resume or args.overwrite):
        how = "--resume continues a run, --overwrite starts again; or give another --out"
        raise UserError(f"{there[0]} exists; {how}")
    pictures, held_out = load_data(args.data, args.image_size, args.channels, args.held_out)
    if len(pictures) < size:
        raise UserError(f"{size} processes for {len(pictures)} pictures; start fewer")
    codec = load_codec(args.vae, pick_device(args.device))
    channels, latent_size = codec.latent_shape(args.channels, args.image_size)
    config = replace(
        CONFIGS[args.model], p=args.patch_size, N=args.latent_tokens, latent_size=latent_size,
        latent_channels=channels, num_classes=len(pictures.classes), cfg=args.cfg,
    )  # fmt: skip
    data = pictures
    if args.cache:
        data = open_cache(Path(args.cache), pictures, codec, args.workers)
    run = Run(args, config, codec)
    about = {name: getattr(args, name) for name in RECORDED}
    about |= {"classes": pictures.classes, "pictures": len(pictures)}
    about |= {"codec": codec.name, "config": asdict(config)}
    done = resume(ckpt, run, about) if args.resume else 0
    fresh = "nothing" if done else initialise(Path(args.init), run) if args.init else "all"
    if rank == 0:
        remove_remains(ckpt.parent)
        weights = sum(p.numel() for p in run.model.parameters()) / 1e6
        print(f"{args.model}: {weights:.2f} M parameters, {config.num_tokens} tokens, ", end="")
        print(f"{size} x {run.device.type}; {len(pictures)} pictures in ", end="")
        print(f"{len(pictures.classes)} classes, {len(held_out)} held out; fresh weights: {fresh}")
    try:
        done = run_steps(run, data, pictures, done, ckpt, about)
    except FloatingPointError as error:
        kept = f"the last good checkpoint is {ckpt}" if ckpt.exists() else "nothing was saved yet"
        raise UserError(f"{error}; {kept}; a lower --lr may help") from None
    if done < args.steps:
        if rank == 0:
            print(f"stopped after step {done}; the same command with --resume continues")
        wait()  # until it is saved: a process that ends makes torchrun end the others
        sys.exit(130)
    if rank == 0:
        finish(run, pictures, ckpt)


def finish(run: Run, pictures: Pictures, ckpt: Path) -> None:
    """Draws the loss and samples, and says what can be done next."""
    plot_log(ckpt.with_name("log.jsonl"), ckpt.with_name("loss.png"))
    draw_samples(run, pictures, ckpt.with_name("samples.png"))
    print(f"wrote {', '.join(WRITTEN)} into {ckpt.parent}. Next:")
    print(f"  python sample.py --ckpt {ckpt} --seed 1 --out more.png")
    if run.config.N:
        print(f"  python sample.py --ckpt {ckpt} --prior YOUR_PICTURE.png --out variations.png")
        print(f"  python evaluate.py stages --cfg-stage1 none --ckpt {ckpt}    # FID of each stage")


def plot_log(log: Path, out: Path) -> None:
    """Draws the loss of log.jsonl, in all and by quarter of t."""
    from matplotlib.figure import Figure

    records = [r for r in map(json.loads, log.read_text().splitlines()) if "loss" in r]
    steps, figure = [r["step"] for r in records], Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    for k in range(4):
        losses = [r["loss_by_time"][k] for r in records]
        axes.plot(steps, losses, linewidth=0.7, label=f"{k / 4:g} ≤ t < {(k + 1) / 4:g}")
    axes.plot(steps, [r["loss"] for r in records], "k", label="all t")
    axes.set(title="Loss, Eq. 3", xlabel="step", yscale="log")
    axes.legend()
    with replacing(out) as temporary:
        figure.savefig(temporary, dpi=100)


def draw_samples(run: Run, pictures: Pictures, out: Path, rows: int = 4) -> list[float]:
    """Draws real pictures of (up to) ten classes, then the EMA model's samples of stages 1 to 3,
    from the same noise each time -> evaluations per picture and stage."""
    shown = np.unique(pictures.labels)[:10].tolist()
    real = [np.resize(np.flatnonzero(pictures.labels == k), rows) for k in shown]  # may repeat
    real = torch.stack([pictures[column[row]][0] for row in range(rows) for column in real])
    y, stages, nfe = torch.tensor(shown * rows, device=run.device), 3 if run.config.N else 1, []
    samples = generate(run.ema, y, stages, seed=run.args.seed, progress=True, nfe=nfe)
    blocks = [("real", real)]
    for i, z0 in enumerate(samples):
        blocks.append((f"stage {i + 1}\nw = {run.config.cfg if i else 1:g}", run.codec.decode(z0)))
    with replacing(out) as temporary:
        draw_grid(blocks, [pictures.classes[k] for k in shown]).save(temporary)
    return [n.double().mean().item() for n in nfe]


# ------------------------------------------------------------------------------------------- speed


def benchmark(args) -> None:
    """Times our step against the naive one and against the device's own large matrix product.

    GMACs are those of Table 4: linear layers, one forward pass, per image; a training step costs
    three. The calls take turns, so that a disturbance hits all; medians of five are printed. Under
    torchrun, images/s are those of all processes, the matrix product that of one.
    """
    config, B = CONFIGS[args.model], args.batch_size
    if not config.N:
        raise UserError(f"{args.model} has no prior to be benchmarked; choose a DoD model")
    run, macs, share = Run(args, config), count_macs(config), sum(keeps_prior(B, args.p_s)) / B
    with_prior = macs["lem"] + macs["e_s"]
    cost = {"ours": share * with_prior + (1 - share) * macs["s"], "naive": with_prior}
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    b, randn = B // run.processes, partial(torch.randn, device=run.device)
    batch = randn(b, 2, *shape), randn(b, *shape), randn(b, *shape), torch.arange(b) % 10
    batch = [part.to(run.device) for part in (*batch, logit_normal(b))]
    side = 8192 if run.device.type == "cuda" else 3072
    matrix = torch.randn(side, side, device=run.device, dtype=run.dtype)
    calls = {
        "ours": lambda: run.step(1, *batch),
        "naive": lambda: run.step(1, *batch, naive_loss),
        "matrix": lambda: matrix @ matrix,
    }
    times = {name: [] for name in calls}
    for name in [*calls] * 6:
        began = time.perf_counter()
        calls[name]()
        if run.device.type != "cpu":
            torch.accelerator.synchronize()
        times[name].append(time.perf_counter() - began)
    if run.rank > 0:
        return
    median = {name: np.median(times[name][1:]) for name in calls}  # the first warms up
    peak = 2 * side**3 / median["matrix"]
    print(f"{args.model}, batch {B}, {run.processes} x {run.device}, {matrix.dtype}; medians of 5")
    print(f"matrix product {side} x {side}: {peak / 1e9:.0f} GFLOP/s, the whole of 'share'")
    for name, count in cost.items():
        flops = 3 * 2 * count * b / median[name]
        print(
            f"{name:6}{median[name]:8.3f} s/step {B / median[name]:9.2f} images/s "
            f"{count / 1e9:7.2f} GMACs/image {flops / 1e9:9.0f} GFLOP/s   share {flops / peak:.0%}"
        )
    ratio = np.median(np.divide(times["ours"][1:], times["naive"][1:]))
    print(f"ours / naive: {ratio:.3f} of the time, {cost['ours'] / cost['naive']:.3f} of the GMACs")
    days = 1e6 * 256 / (B / median["ours"]) / 86400
    print(f"memory {run.memory():.1f} GiB; the paper's 1M steps of 256: {days:,.0f} days like this")


# ------------------------------------------------------------------------------------- the command

# fmt: off
DATA = {  # what --data changes in the defaults; a folder of pictures is as CIFAR-10
    # cfg of the letters: the best of a scan against training pictures, not held-out ones
    "letters": dict(image_size=16, channels=3, patch_size=4, flip=False, cfg=2.5),
    "digits": dict(image_size=8, channels=1, patch_size=2, flip=False, cfg=2),
    "mnist": dict(image_size=28, channels=1, patch_size=7, flip=False, cfg=2),
    "cifar10": dict(image_size=32, channels=3, patch_size=4, flip=True, cfg=3.5),
}
IMAGENET = dict(image_size=256, channels=3, patch_size=2, flip=True, cfg=5.5)  # with --vae
# CHOICE: DoD-Ti learns at 20 times the paper's rate. Without the warm-up LEM then died in our runs:
# e_s became the same for all pictures, and the loss with a prior the same as without.
SMALL = dict(batch_size=64, lr=2e-3, warmup=300, steps=2500, save_every=1000)
PAPER = dict(batch_size=256, lr=1e-4, warmup=0, steps=400_000, save_every=10_000)  # section 4.1


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags; the defaults depend on --data, --vae, --model; --help shows those in force."""
    parser = Parser("Trains DoD. The defaults shown are those for this --data, --vae and --model.")
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    share, natural, count = at_least(float, 0, 1), at_least(int, 1), at_least(int, 0)
    add("--data", default="letters", help="letters, digits, mnist, cifar10 or a folder of folders")
    add("--vae", default="none", help="Stable Diffusion's, of diffusers: hub name or folder")
    add("--cache", help="folder for latents, encoded once, with --vae")
    add("--model", default="DoD-Ti", choices=CONFIGS, help="preset; -Ti are for a CPU")
    add("--out", help="folder of the run")
    add("--resume", action=switch, default=False, help="continue the run in --out, if any")
    add("--overwrite", action=switch, default=False, help="replace the run in --out")
    add("--init", help="checkpoint whose EMA weights to start from, where they fit")
    add("--image-size", type=natural, help="pixels; pictures are resized and centre-cropped")
    add("--channels", type=int, choices=[1, 3], help="1: grey, 3: RGB")
    add("--patch-size", type=natural, help="p, pixels or places of the latent")
    add("--latent-tokens", type=count, help="N, Table 2; 0: no LEM (FiTv2)")
    add("--flip", action=switch, help="mirror pictures at random")
    add("--held-out", type=at_least(float, 0, 0.9), default=0.1, help="share, up to 5000")
    add("--steps", type=natural, help="training steps")
    add("--batch-size", type=natural, help="pictures per step, of all processes together")
    add("--grad-accum", type=natural, default=1, help="micro-batches of a step, in turn")
    add("--lr", type=at_least(float, 0), help="AdamW's constant learning rate")
    add("--warmup", type=count, help="steps over which the rate first grows")
    add("--p-s", type=share, default=0.5, help="share of a batch that gets S for a prior, Table 3")
    add("--class-dropout", type=share, default=0.1, help="probability of the null class")
    add("--cfg", type=at_least(float, 1), help="the model's guidance where sampling names none")
    add("--seed", type=at_least(int, 0, 2**63), default=0, help="same seed, same run")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="autocast; auto: bf16 or fp16 on CUDA, else fp32")
    add("--compile", action=switch, default=False, help="torch.compile")
    add("--grad-checkpoint", action=switch, default=False, help="less memory, a third slower")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--workers", type=count, default=0, help="processes that load pictures, for each process")
    add("--log-every", type=natural, default=50, help="steps between records in log.jsonl")
    add("--save-every", type=natural, help="steps between checkpoints")
    add("--keep-every", type=count, default=0, help="steps between those kept; 0: the newest only")
    add("--sample-every", type=count, default=0, help="steps between sample grids; 0: at the end")
    add("--tensorboard", action=switch, default=False, help="log there too, if installed")
    add("--benchmark", action="store_true", help="time the training step, nothing else")
    # fmt: on
    first, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    data, model, preset = first.data, first.model, CONFIGS[first.model]
    parser.set_defaults(**DATA.get(data, DATA["cifar10"]), out=f"out/{Path(data).resolve().name}")
    parser.set_defaults(**(SMALL if model.endswith("-Ti") else PAPER), latent_tokens=preset.N)
    if first.vae != "none":
        parser.set_defaults(**IMAGENET)
    if not model.endswith("-Ti"):
        parser.set_defaults(patch_size=preset.p, cfg=preset.cfg)
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    args.p_s = args.p_s if args.latent_tokens else 1.0  # without LEM nobody has a prior
    with process_group(pick_device(args.device)):
        benchmark(args) if args.benchmark else train(args)


if __name__ == "__main__":
    run_command(main)
