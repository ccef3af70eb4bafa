r"""train.py -- end-to-end training of DoD: the step, the loop, the data. Sections 3.3 and 4.1.

Backbone and LEM learn together, from real images alone. In training the visual prior of an image
is LEM of its own latent, and a share p_s of each batch sees the sample token S instead. Section 3.3
assumes that only semantics pass LEM's bottleneck, and that they are alike in real and in generated
images. (What really passes is whatever lowers the loss most.)

What is random in a step is a function of (seed, step), drawn for the global batch. So the number of
GPUs changes a result by rounding only, and a resumed run, on a CPU, equals an unbroken one exactly.

    python train.py                                             # DoD-Ti on letters, on a CPU
    python train.py --prior-from patches --out out/patches      # without LEM: it copies its prior
    python train.py --data images/ --image-size 32              # yours: a folder for each class
    torchrun --nproc-per-node 8 train.py --data imagenet/train --model DoD-B \
        --vae stabilityai/sd-vae-ft-ema --cache latents --compile
"""

import argparse
import copy
import hashlib
import json
import math
import os
import signal
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from flow import keeps_prior, logit_normal, rectified_flow_loss
from lem import ViTBlock
from model import CONFIGS, Block, Config, UserError, build_model, training_flops
from sample import (
    FLIP_STREAM, ORDER_STREAM, Codec, Parser, barrier, bounded, image_files, load_checkpoint,
    load_codec, open_image, pick_device, process_group, rank_and_world_size, replacing,
    run_command, save_checkpoint, shuffled_order,
)  # fmt: skip

CLASS_DROPOUT = 0.1  # CHOICE: the paper names no number; DiT, SiT and FiTv2 have this one

# ------------------------------------------------------------------- one step: sections 3.3 and 4.1


def draw_noise(
    seed: int, step: int, batch_size: int, config: Config, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws what is random in a step, a function of (seed, step), on the generator's device.
    -> x1 (B, C, H, W) noise; eps (B, C, H, W) normal, for the VAE's posterior; t (B,) times;
    dropped (B,): which images lose their class. CHOICE: independently of losing their prior."""
    # SeedSequence turns (seed, step) into one number that is unrelated to that of the next step.
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    generator.manual_seed(int(state[0]))
    device = generator.device
    shape = (batch_size, config.latent_channels, config.latent_size, config.latent_size)
    x1 = torch.randn(shape, generator=generator, device=device)
    eps = torch.randn(shape, generator=generator, device=device)
    t = logit_normal(batch_size, generator, device)  # Eq. 11
    dropped = torch.rand(batch_size, generator=generator, device=device) < CLASS_DROPOUT
    return x1, eps, t, dropped


def training_step(
    network: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple,
    with_prior: Tensor, step: int, bf16: bool = False, ema_decay: float = 0.999,
) -> Tensor:  # fmt: skip
    """One training step of this rank. It never synchronises with the GPU.

    network: DoD or FiTv2, possibly inside DistributedDataParallel; batch: x0, x1 (b, C, H, W) data
    and noise, t (b,) times, y (b,) classes; with_prior (k,): which images keep their prior, as
    indices (empty for FiTv2). Returns (4,): the mean loss; the sums of the losses with a prior and
    with S, whose gap is what the prior is worth; the norm of the gradient before it is clipped."""
    # Eq. 3 trains backbone and LEM together: the prior of an image is its own latent.
    x0, x1, t, y = batch
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=bf16):
        losses = rectified_flow_loss(network, x0, y, x1, t, with_prior)

    # DistributedDataParallel averages the gradients over the ranks.
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()

    # CHOICE: the gradient is clipped to norm 1, as FiTv2's configuration says; the paper does not.
    norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()

    # What is sampled from, and reported, is a moving average of the weights, in fp32 (section 4.1).
    # CHOICE: step n uses min(decay, (1 + n) / (10 + n)), so that the start is soon forgotten. The
    # paper prints a decay of 0.999; SiT's and FiTv2's code has 0.9999.
    decay = min(ema_decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for average, weight in zip(ema.parameters(), network.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)

    losses = losses.detach()
    sum_with_prior = losses[with_prior].sum()
    return torch.stack([losses.mean(), sum_with_prior, losses.sum() - sum_with_prior, norm])


# ---------------------------------------------------------------------------------------- the loop


def train(args: argparse.Namespace) -> None:
    """The training loop (section 4.1), from the step after the last checkpoint to --steps."""
    run = Run(args)
    model, ema, optimizer = [run.modules[name] for name in ("model", "ema", "optimizer")]
    rank, ranks = rank_and_world_size()
    generator = torch.Generator(args.device)
    images = iter(run.loader)

    # From here on, Ctrl-C and SIGTERM only leave a note: no step is left half done.
    signals = []
    on_signals(handler=lambda number, frame: signals.append(number))

    results = []  # of the steps since the last record in the log
    done = run.steps.start - 1
    bar = tqdm(run.steps, initial=done, total=args.steps, mininterval=1, disable=rank > 0)
    try:
        for step in bar:
            if not results:  # an interval begins
                began = time.time()
                waited = 0.0  # seconds

            # This rank's images, or what a cache has of them, and classes. Waiting for them counts
            # if the device has nothing left to do after it, so waiting_share is an upper bound.
            asked = time.time()
            try:
                x, y = next(images)
            except Exception as error:
                # The rank that failed saves the finished steps first: all have the same weights.
                if all(result.isfinite().all() for result in results):
                    save_checkpoint(args.out / "ckpt.pt", run.facts, step - 1, run.modules)
                # A traceback would keep the loader's workers alive; the error's text quotes theirs.
                raise (error.with_traceback(None) if args.workers else error) from None
            if args.device.type != "cuda" or torch.cuda.current_stream().query():
                waited += time.time() - asked

            # Noise, times and dropped classes are drawn for the global batch: this is our share.
            draws = draw_noise(args.seed, step, args.batch_size, model.config, generator)
            x1, eps, t, dropped = [draw[run.share] for draw in draws]
            x0 = run.codec.encode(x.to(args.device, non_blocking=True), eps)
            y = torch.where(dropped, model.null_class, y.to(args.device, non_blocking=True))

            # Section 4.1: a constant rate, here after --warmup steps of linear growth, if any.
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * min(1, step / max(1, args.warmup))
            rest = (run.with_prior, step, args.precision == "bf16", args.ema_decay)
            results.append(training_step(run.network, ema, optimizer, (x0, x1, t, y), *rest))

            # Several ranks vote at every tenth step only, for a vote waits for the GPU.
            stop = bool(signals) and ranks == 1
            if ranks > 1 and step % 10 == 0:
                votes = torch.tensor(len(signals), device=args.device)
                dist.all_reduce(votes)
                stop = votes.item() > 0

            # Now and then: log, save. Only then need the GPU have finished.
            save = stop or step == args.steps or step % args.save_every == 0
            milestone = args.keep_every > 0 and step % args.keep_every == 0
            if save or milestone or step % args.log_every == 0:
                after_interval(run, step, results, began, waited, save, milestone)
                results = []
            if stop:
                barrier()  # until rank 0 has saved: a rank that ends makes torchrun end the others
                print(f"stopped after step {step}; the same command with --resume continues")
                sys.exit(130)  # as a program ended by Ctrl-C
    finally:
        # Workers ignore the SIGTERM by which Python would end them, so they are shut down here.
        del images

    if rank == 0:
        plot_log(args.out / "log.jsonl", args.out / "loss.png")
        print(f"next: python sample.py (or evaluate.py stages) --ckpt {args.out}/ckpt.pt")


def after_interval(
    run: "Run", step: int, results: list, began: float, waited: float, save: bool, milestone: bool
) -> None:
    """Checks and logs an interval of steps; where due, saves a checkpoint (to resume from) and a
    milestone (to sample from). results: of training_step; began: when it began; waited: for images,
    in s. Raises FloatingPointError that names the first step whose loss is not finite."""
    # The means over all ranks. They are read only here, not in each step: reading waits for a GPU.
    rank, ranks = rank_and_world_size()
    table = torch.stack(results, dim=1)  # (4, steps)
    if ranks > 1:
        dist.all_reduce(table)
    table /= ranks
    bad = (~table.isfinite().all(0)).nonzero()
    if len(bad):
        bad_step = step - len(results) + 1 + int(bad[0])
        fault = f"the loss of step {bad_step} (or its gradient) is not finite"
        raise FloatingPointError(f"{fault}; ckpt.pt is from before; a lower --lr needs a new run")
    loss, sum_prior, sum_S, norm = table.mean(1).tolist()
    seconds = time.time() - began  # by now a GPU has finished these steps
    if rank > 0:
        return

    # The sums become means over all images with their prior and over all with S.
    args = run.args
    record = {"step": step, "loss": loss}
    if args.latent_tokens:
        number_S = round(args.p_s * args.batch_size)
        record["loss_prior"] = sum_prior * ranks / (args.batch_size - number_S)
        record["loss_S"] = sum_S * ranks / number_S
    record |= {"grad_norm": norm, "lr": run.modules["optimizer"].param_groups[0]["lr"]}

    # The share of its time that rank 0 waited for images; FLOP/s as a share of a matrix product's.
    rate = matmul_rate(args.device, args.precision == "bf16")
    images_per_s = len(results) * args.batch_size / seconds
    flops = images_per_s * training_flops(run.modules["ema"].config, args.p_s)  # in a second
    record |= {"images_per_s": images_per_s, "seconds": seconds, "waiting_share": waited / seconds}
    record |= {"matmul_rate": rate, "matmul_share": flops / ranks / rate}
    record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30  # 0 without CUDA

    # The held-out loss belongs to the record. Should it fail, the steps are saved all the same.
    # ckpt.pt comes last: whatever a kill leaves out before it, the resumed run does again.
    try:
        if save and run.held_out:
            record |= held_out_loss(run)
    finally:
        with open(args.out / "log.jsonl", "a") as log:
            log.write(json.dumps(record) + "\n")
        if milestone:
            ema = {"ema": run.modules["ema"]}
            save_checkpoint(args.out / f"ema-{step:07}.pt", run.facts, step, ema)
        if save:
            save_checkpoint(args.out / "ckpt.pt", run.facts, step, run.modules)
    if save and "loss_S" in record:
        tqdm.write(worth_of_prior(record, args))


# --------------------------------------------------------------------------------- setting a run up


class Run:
    """What the loop works with: all new, or as it was in the checkpoint. UserError for mistakes."""

    def __init__(self, args: argparse.Namespace):
        # CHOICE: on a GPU, training computes in bf16, as in FiTv2's configuration (--precision),
        # and in TF32 what autocast leaves in fp32. The VAE, too: in true fp32, encoding would take
        # several times as long as the step. evaluate.py is in fp32, and sample.py by default.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True

        # This rank's share of each batch, the data, and the shapes that fit them. An unreadable
        # held-out image would end the run half-way, so all are read now; 256 suffice for a loss.
        self.args = args
        self.share, self.with_prior = divide_batch(args)  # a slice; indices, see training_step()
        self.codec = load_codec(args.vae, args.device)
        if args.cache:
            ensure_cache(args, self.codec)
        given = (args.image_size, args.channels, args.held_out, args.class_groups, args.cache)
        training, held_out, fingerprint = load_data(args.data, *given)
        self.held_out = [held_out[i, False] for i in range(min(256, len(held_out)))]
        channels, side = self.codec.latent_shape(args.channels, args.image_size)
        K = len(training.classes)
        config = replace(
            CONFIGS[args.model], p=args.patch_size, N=args.latent_tokens, latent_size=side,
            latent_channels=channels, num_classes=K, w=args.w, prior_from=args.prior_from,
        )  # fmt: skip

        # Model, EMA and optimizer: new, or as they were in the checkpoint of this very run. The
        # facts are what a checkpoint says besides their states.
        facts = {name: getattr(args, name) for name in RECORDED}
        facts |= {"data": args.data, "classes": training.classes, "fingerprint": fingerprint}
        facts |= {"codec": self.codec.name, "scale": self.codec.scale, "shift": self.codec.shift}
        self.facts = facts | {"config": asdict(config)}
        self.network, self.modules = build(args, config)  # what is called; what is saved
        done = resume(args.out / "ckpt.pt", self.modules, self.facts) if args.resume else 0
        require_shared(args.out, done)
        if rank_and_world_size()[0] == 0:
            print(f"{args.model}, {len(training)} images in {K} classes, step {done}")
            if not done:
                save_checkpoint(args.out / "ckpt.pt", self.facts, 0, self.modules)
            clean_log(args.out / "log.jsonl", done)

        # The loader carries images (or cached moments) and classes of this rank's share only.
        self.steps = range(done + 1, args.steps + 1)  # those to come
        all_batches = batches(len(training), args.batch_size, args.seed, args.flip, self.steps)
        share = self.share  # with self in the generator, run and loader would hold each other
        self.loader = DataLoader(
            training, batch_sampler=(x[share] for x in all_batches), num_workers=args.workers,
            pin_memory=args.device.type == "cuda", worker_init_fn=on_signals,
        )  # fmt: skip


def build(args: argparse.Namespace, config: Config) -> tuple[nn.Module, dict]:
    """-> the network with its first weights, and by name its model, ema and optimizer. The network
    is what training calls: the model, with several ranks inside of DistributedDataParallel (DDP).

    S and LEM are used outside of DDP's forward(), and their gradients are averaged over the ranks
    all the same: its hooks sit on the parameters. CHOICE: AdamW's betas are 0.9 and --beta2, for
    the paper's sizes 0.999 as in FiTv2's configuration; weight decay, 0, is that of section 4.1."""
    torch.manual_seed(args.seed)
    model = build_model(config).to(args.device)
    ema = copy.deepcopy(model).requires_grad_(False)

    # CHOICE: LEM and the prior's MLP, group 1, can learn at a rate of their own; the paper has one.
    groups = [{"params": [], "peak_lr": rate} for rate in (args.lr, args.lr * args.lem_lr_factor)]
    for name, weight in model.named_parameters():
        groups[name.startswith(("lem.", "prior_mlp."))]["params"].append(weight)
    groups = groups if config.N else groups[:1]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, args.beta2), weight_decay=0, fused=True)

    # Compiled block by block, so that the weights keep their names.
    for module in model.modules():
        if args.compile and isinstance(module, (Block, ViTBlock)):
            module.compile(dynamic=False)

    network = model
    if rank_and_world_size()[1] > 1:
        # DDP would cut compiled blocks into smaller ones; its documentation names no public switch.
        torch._dynamo.config.optimize_ddp = False
        network = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        network.broadcast_buffers = False  # they are constants, which need no exchange
    return network, {"model": model, "ema": ema, "optimizer": optimizer}


@lru_cache
def matmul_rate(device: torch.device, bf16: bool) -> float:
    """FLOP/s of a product of two large matrices, measured once: the most a step can hope for."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else None)
    seconds = timeit.repeat(lambda: (matrix @ matrix)[0, 0].item(), number=1)  # waits for the GPU
    return 2 * side**3 / min(seconds)


def on_signals(worker: int = 0, handler: Callable = signal.SIG_IGN) -> None:
    """Sets what Ctrl-C and SIGTERM do. The loader's workers ignore them: their run ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


# ---------------------------------------------------------------- batches, images and their latents


def batches(count: int, batch_size: int, seed: int, flip: bool, steps: range) -> Iterator[list]:
    """Yields the items (image number, flipped) of the global batch of each step. The order of the
    `count` images is a function of (seed, epoch). CHOICE: a batch may span two epochs, so that none
    is smaller; with `flip`, images are mirrored with probability 0.5, by (seed, step)."""

    @lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, ORDER_STREAM, epoch)).permutation(count)

    for step in steps:
        places = range((step - 1) * batch_size, step * batch_size)
        numbers = [int(permutation(place // count)[place % count]) for place in places]
        flipped = np.random.default_rng((seed, FLIP_STREAM, step)).random(batch_size) < 0.5
        yield [(i, flip and bool(f)) for i, f in zip(numbers, flipped, strict=True)]


def divide_batch(args: argparse.Namespace) -> tuple[slice, Tensor]:
    """-> this rank's contiguous share of the global batch; which images of it keep their prior, as
    indices on the device. Raises UserError where S or LEM would go untrained."""
    rank, ranks = rank_and_world_size()
    if args.batch_size % ranks:
        raise UserError(f"--batch-size {args.batch_size} is not divisible by {ranks} ranks")

    # Which images keep their prior is decided for the global batch. FiTv2 has no priors.
    keeps = keeps_prior(args.batch_size, args.p_s if args.latent_tokens else 1).view(ranks, -1)
    if args.latent_tokens and (keeps.all() or not keeps.any(dim=1).all()):
        fault = f"--p-s {args.p_s} leaves S without an image, or LEM in one of {ranks} ranks"
        raise UserError(f"{fault}; raise --batch-size, or choose 0 < p_s < 1")
    size = args.batch_size // ranks
    return slice(rank * size, (rank + 1) * size), keeps[rank].nonzero().squeeze(1).to(args.device)


# 22 typefaces for text among those that come with matplotlib.
TYPEFACES = """
    DejaVuSans DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Oblique DejaVuSans-Bold
    DejaVuSans-BoldOblique DejaVuSansMono-Bold DejaVuSansMono-BoldOblique DejaVuSerif
    DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerif-BoldItalic STIXGeneral STIXGeneralBol
    STIXGeneralItalic STIXGeneralBolIta cmb10 cmmi10 cmr10 cmss10 cmti10 cmtt10
""".split()
LETTERS = "ABCDEFGHIJ"


@lru_cache(maxsize=25_000)
def draw_letter(i: int, size: int, channels: int) -> Tensor:
    """Letter number i, a function of i alone -> grey, uint8 (channels, size, size). The class is
    the letter. Its typeface, height, place, tilt (up to 20 degrees) and the two greys are what only
    a visual prior can tell. Drawn four times too large, box-filtered."""
    import matplotlib

    rng = np.random.default_rng((2411, i))  # 2411: any number
    letter = LETTERS[i % 10]
    big = 4 * size  # of the drawing, before it is filtered

    # White on black. The letter's bounding box is centred, then moved by up to 5% each way.
    face = f"{matplotlib.get_data_path()}/fonts/ttf/{TYPEFACES[rng.integers(22)]}.ttf"
    font = ImageFont.truetype(face, round(big * rng.uniform(0.75, 1.05)))
    box = np.reshape(font.getbbox(letter), (2, 2))
    corner = (big - box.sum(0)) / 2 + rng.uniform(-0.05, 0.05, 2) * big
    ink = Image.new("L", (big, big))
    ImageDraw.Draw(ink).text(tuple(corner), letter, 255, font)
    ink = ink.rotate(rng.uniform(-20, 20), Image.BICUBIC).resize((size, size), Image.BOX)

    # Two greys, drawn until they differ by a third of the scale or more.
    front = back = 0.0
    while abs(front - back) < 85:
        front, back = rng.uniform(0, 255, 2)
    image = back + np.asarray(ink) / 255 * (front - back)  # (size, size)
    return torch.from_numpy(image.round().astype(np.uint8)).repeat(channels, 1, 1)


class Labelled(Dataset):
    """Images, or cached latents, with their classes: the original ones, and those that the model
    knows. With --class-groups K, class k of n is the model's class k K // n."""

    def __init__(self, classes: list, labels: list, members: Sequence, load: Callable, K: int):
        """classes: their names; labels (n,): the class of each member; load(member) reads it.
        Raises UserError if there are fewer than K classes."""
        if K > len(classes):
            raise UserError(f"--class-groups {K}: there are only {len(classes)} classes")
        self.original_classes = classes
        self.original_labels = np.array(labels, np.int64)
        self.members = members
        self.load = load

        # The groups of classes. Each is named after its first class and its last, like A-E.
        group_of = np.arange(len(classes)) * K // len(classes)
        self.labels = group_of[self.original_labels]
        ends = [np.flatnonzero(group_of == k)[[0, -1]] for k in range(K)]
        self.classes = ["-".join(dict.fromkeys(classes[i] for i in pair)) for pair in ends]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        """(i, flipped) -> a uint8 image (channels, size, size) or the moments of its latent, fp32
        (2, C, H, W); the model's class. Raises UserError that names an unreadable image."""
        i, flipped = item
        x = self.load(self.members[i])
        if x.dtype != torch.uint8:  # the moments of an image and of its mirror image
            x = x[int(flipped)].float()
        elif flipped:
            x = x.flip(-1)
        return x, int(self.labels[i])


def load_data(
    data: str, size: int, channels: int, held_out: float, class_groups: int = 0, cache: str = ""
) -> tuple[Labelled, Labelled, str]:
    """--data, or --cache if it is given -> training images, held-out images, and a fingerprint,
    which tells by names whether a later command sees the same classes and files. Both sets are in
    random order, the same for any --seed. Raises UserError or FileNotFoundError for an unusable
    folder, and UserError for a class that has no image left to train on.
    CHOICE: a tenth of the images, at most 5,000, is held out by default; the paper names none."""
    if cache:
        about = json.loads((Path(cache) / "about.json").read_text())
        classes, labels, fingerprint = [about[key] for key in ("classes", "labels", "fingerprint")]
        members = range(len(labels))  # their order is random already
        load = partial(read_latents, file=Path(cache) / "latents.fp16", shape=about["shape"])
    else:
        names = ""
        if data == "letters":
            classes = list(LETTERS)
            members = range(25_000)
            labels = [i % 10 for i in members]
            load = partial(draw_letter, size=size, channels=channels)
        else:
            classes, members, labels = image_files(data)
            names = "".join(f"{os.path.relpath(file, data)}\n" for file in members)
            load = partial(open_image, size=size, channels=channels)
        fingerprint = hashlib.sha256((json.dumps([classes, labels]) + names).encode()).hexdigest()
        order = shuffled_order(len(members)).tolist()
        labels = [labels[i] for i in order]
        members = [members[i] for i in order]

    cut = min(round(held_out * len(labels)), 5000)
    untrained = set(range(len(classes))) - set(labels[cut:])
    if untrained:
        raise UserError(f"class {classes[min(untrained)]} has no training image; lower --held-out")
    K = class_groups or len(classes)
    training = Labelled(classes, labels[cut:], members[cut:], load, K)
    return training, Labelled(classes, labels[:cut], members[:cut], load, K), fingerprint


open_file = lru_cache(os.open)  # so each process opens the file once


def read_latents(i: int, file: Path, shape: list[int]) -> Tensor:
    """The moments of image i and of its mirror image: fp16 (2 flips, 2 moments, C, H, W)."""
    # pread takes the place as an argument: workers may share the file, and nothing is mapped.
    size = 2 * math.prod(shape)  # bytes
    record = os.pread(open_file(file, os.O_RDONLY), size, i * size)
    return torch.frombuffer(bytearray(record), dtype=torch.float16).view(shape)


def encode_cache(file: Path, args: argparse.Namespace, codec: Codec, settings: dict) -> None:
    """Encodes all images of --data into a file of fp16, (n, 2 flips, 2 moments, C, H, W): mean and
    standard deviation of the VAE's posterior, from which each step draws anew. Each rank encodes a
    contiguous part. The file gets its name when it is complete. UserError for unreadable images.
    CHOICE: fp16; what it rounds away is far below the deviation."""
    rank, ranks = rank_and_world_size()
    images, _, fingerprint = load_data(args.data, args.image_size, args.channels, held_out=0)
    channels, side = codec.latent_shape(args.channels, args.image_size)
    shape = (2, 2, channels, side, side)
    share = range(len(images) * rank // ranks, len(images) * (rank + 1) // ranks)

    # Rank 0 writes what tells one cache from another, and an empty file for the latents. (In a
    # memory map, two nodes would undo each other's part of a page.)
    path = file.with_name(f".dod0-{file.name}")  # the name that replacing() gives rank 0
    with replacing(file) if rank == 0 else nullcontext():
        if rank == 0:
            about = settings | {"made": time.ctime(), "shape": shape, "fingerprint": fingerprint}
            about |= {"classes": images.classes, "labels": images.labels.tolist()}
            about["bytes"] = 2 * len(images) * math.prod(shape)
            file.with_name("about.json").write_text(json.dumps(about))
            path.write_bytes(b"")
        barrier()

        # This rank's part. Images are mirrored here, so that each file is read only once.
        items = [(i, False) for i in share]
        loader = DataLoader(images, batch_size=64, sampler=items, num_workers=args.workers)
        with open(path, "rb+") as latents:
            latents.seek(share.start * 2 * math.prod(shape))  # two bytes a number
            for x, _ in tqdm(loader, "encoding", disable=rank > 0):
                moments = torch.stack([codec.moments(x), codec.moments(x.flip(-1))], dim=1)
                latents.write(moments.half().cpu().numpy())
            latents.flush()
            os.fsync(latents.fileno())
        barrier()  # all parts are written
    barrier()  # the file has its name


def ensure_cache(args: argparse.Namespace, codec: Codec) -> None:
    """Makes the --cache if it is missing, and checks it. Raises UserError for one that was made
    otherwise. Once it is there, the images are not needed any more."""
    file = Path(args.cache) / "latents.fp16"
    settings = {"data": str(Path(args.data).resolve()), "image_size": args.image_size}
    settings |= {"vae": codec.name, "scale": codec.scale, "shift": codec.shift}
    missing = not file.exists()
    require_shared(file.parent, missing)
    if missing:
        with lock(file.parent):
            encode_cache(file, args, codec, settings)

    # Latents of other data, by another VAE or cut short would silently train another model.
    settings["bytes"] = file.stat().st_size
    old = json.loads(file.with_name("about.json").read_text())
    for key, value in settings.items():
        if old.get(key) != value:
            raise UserError(f"--cache {args.cache} was made with {key} {old.get(key)}, not {value}")
    print(f"--cache has {len(old['labels'])} images, {len(old['classes'])} classes, {old['made']}")


# -------------------------------------------------------------------------- checkpoints and the log

# The flags, besides those in Config, on which a run's result depends: a resumed run repeats them.
RECORDED = "image_size channels held_out batch_size lr lem_lr_factor warmup p_s flip seed".split()
RECORDED += ["precision", "ema_decay", "beta2"]


def lock(folder: Path) -> FileLock | nullcontext:
    """Keeps two runs from writing into one folder: entering raises OSError if another one holds it.
    Rank 0 holds it for all. (Where flock is not implemented, remove .dod-lock after a kill.)"""
    rank, _ = rank_and_world_size()
    return FileLock(folder / ".dod-lock", timeout=0) if rank == 0 else nullcontext()


def require_shared(folder: Path, found: int) -> None:
    """Waits until all ranks have looked into a folder, before one of them writes there. Raises
    UserError unless all have found the same, as they do in a file system that the nodes share."""
    if dist.is_initialized():
        answers = [0] * dist.get_world_size()
        dist.all_gather_object(answers, found)
        if len(set(answers)) > 1:
            raise UserError(f"the nodes do not share {folder}; put it on a shared file system")


def resume(path: Path, modules: dict, facts: dict) -> int:
    """Loads a checkpoint into a run's modules -> its step. UserError if it is another run's."""
    # Every setting on which the result depends is compared. Without --cache, data and VAE may move.
    saved = load_checkpoint(path)
    before = {"beta2": 0.999} | saved | saved["config"]  # older checkpoints name no beta2
    free = ("data", "codec", "config", "w", "fingerprint")
    for key, value in (facts | facts["config"]).items():
        if key not in free and before.get(key) != value:
            raise UserError(f"cannot resume {path}: {key} was {before.get(key)}, now {value}")

    # A broken image may have been removed since: the run goes on, and says what that means.
    if saved["fingerprint"] != facts["fingerprint"]:
        print("warning: files of --data were added, removed or renamed since: held-out images now")
        print("include some that the model has trained on, so losses and FIDs will be too low")
    for name, module in modules.items():
        module.load_state_dict(saved[name])
    return saved["step"]


@torch.no_grad()
def held_out_loss(run: Run) -> dict[str, float]:
    """Eq. 3 on held-out images, with the noise and times of step 0 and no class dropped: the mean,
    and for DoD those of the images with their prior and with S. Overfitting makes it rise."""
    x, y = default_collate(run.held_out)
    ema = run.modules["ema"]
    x1, eps, t, _ = draw_noise(run.args.seed, 0, len(x), ema.config, torch.Generator(ema.device))
    x0 = run.codec.encode(x.to(ema.device), eps)
    keeps = keeps_prior(len(x), run.args.p_s if ema.config.N else 1).to(ema.device)
    losses = rectified_flow_loss(ema, x0, y.to(ema.device), x1, t, keeps.nonzero().squeeze(1))
    found = {"held_out_loss": losses.mean().item()}
    if 0 < keeps.sum() < len(x):
        found["held_out_loss_prior"] = losses[keeps].mean().item()
        found["held_out_loss_S"] = losses[~keeps].mean().item()
    return found


def worth_of_prior(record: dict, args: argparse.Namespace) -> str:
    """Says how far a prior lowers the loss and, after the start of a run, warns below 1%: then LEM
    gives all images the same prior. (A LEM that stopped learning at 20% got no warning.)"""
    gap = record["loss_S"] - record["loss_prior"]
    share = gap / record["loss_S"]
    line = f"step {record['step']}: the prior lowers the loss by {gap:.3f} ({share:.0%})"
    started = record["step"] > args.warmup and record["step"] >= args.steps / 10
    if started and share < 0.01:
        line += "\nwarning: LEM learns nothing; try a lower --lr, --lem-lr-factor, or more --warmup"
    return line


def clean_log(path: Path, done: int) -> None:
    """Drops records after step `done`, which come again, and lines that a kill has damaged."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(kept))


def plot_log(log: Path, out: Path) -> None:
    """Draws the losses of log.jsonl: for DoD with and without a prior, for FiTv2 of all images."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in log.read_text().splitlines()]
    axes = Figure(figsize=(7, 4), layout="tight").subplots()
    names = {"loss": "all images"}
    halves = [(x["step"], x["loss_S"], x["loss_prior"]) for x in records if "loss_S" in x]
    if halves:
        names = {"loss_S": "images with the token S", "loss_prior": "images with their prior"}
        axes.fill_between(*np.transpose(halves), alpha=0.2, label="what the prior is worth")
    for i, (key, name) in enumerate(names.items()):
        for what, column, style in (("training", key, "-"), ("held out", f"held_out_{key}", "--.")):
            points = [(x["step"], x[column]) for x in records if column in x]
            axes.plot(*np.reshape(points, (-1, 2)).T, style, color=f"C{i}", label=f"{what}, {name}")
    axes.set(xlabel="training step", ylabel="loss (Eq. 3): mean squared error of v", yscale="log")
    axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")  # 0.1, not 10^-1
    axes.legend()
    axes.figure.savefig(out, dpi=100)


# ------------------------------------------------------------------------------------------ command

# Defaults that depend on --data, --vae and --model. FOLDER_DATA serves any folder of images. w, the
# guidance scale, is that of section 4.2 with --vae, and for the letters the best of a scan.
LETTER_DATA = dict(image_size=16, channels=1, patch_size=4, flip=False, w=3.0)
FOLDER_DATA = dict(image_size=32, channels=3, patch_size=4, flip=True, w=3.5)
VAE_DATA = dict(image_size=256, channels=3, patch_size=2, flip=True, w=5.5)  # with --vae
# CHOICE: DoD-Ti learns at 20 times the paper's rate, after a warm-up, and LEM at a quarter of that.
# With ten classes and one rate, the gap (loss with S minus loss with a prior) was 0.046 to 0.063
# after 2,500 steps; with a quarter, 0.082 to 0.092, but unguided stage 1 got worse. A beta2 of 0.95
# (gap 0.089 to 0.093) made up for that; it helps FiTv2, too. Without a warm-up LEM died.
SMALL = dict(batch_size=64, lr=2e-3, warmup=300, steps=2500, save_every=500)
SMALL |= dict(lem_lr_factor=0.25, beta2=0.95)
# Batch size and rate are those of section 4.1, the 400,000 steps those of section 4.2.
# CHOICE: no warm-up, for the paper says that the rate is constant; FiTv2's code has one (--warmup).
PAPER = dict(batch_size=256, lr=1e-4, warmup=0, steps=400_000, save_every=10_000)
PAPER |= dict(lem_lr_factor=1.0, beta2=0.999)


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags. Those without a default here get it below, to suit data and model."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.epilog = "Most defaults of None are replaced to suit --data, --vae and --model."
    switch = argparse.BooleanOptionalAction
    share = bounded(float, 0, 1)
    natural = bounded(int, 1)
    count = bounded(int, 0)
    add = parser.add_argument
    add("--data", default="letters", help="letters, or a folder that has a folder for each class")
    add("--vae", default="none", help="Stable Diffusion's: its name on the hub, or a folder")
    add("--cache", help="folder for the latents of --vae, which are encoded once")
    add("--model", default="DoD-Ti", choices=CONFIGS, help="preset; those named -Ti suit a CPU")
    add("--out", type=Path, help="folder of the run; default: out/ and the name of the data")
    add("--resume", action=switch, default=False, help="continue the run in --out, if there is one")

    # Shapes. Their defaults come from --data and --model.
    add("--image-size", type=natural, help="pixels; images are cropped and resized")
    add("--channels", type=int, choices=[1, 3], help="1: grey, 3: RGB")
    add("--patch-size", type=natural, help="p, in pixels; with --vae, in the latent")
    add("--latent-tokens", type=count, help="N, Table 2; 0: no LEM (FiTv2)")
    add("--prior-from", choices=["lem", "patches", "means"], default="lem", help="see lem.py")
    add("--class-groups", type=natural, help="K: merge neighbouring classes; 1: unconditional")
    add("--flip", action=switch, help="mirror images at random")
    add("--held-out", type=bounded(float, 0, 0.9), default=0.1, help="share, at most 5000 images")

    # The training itself, sections 3.3 and 4.1.
    add("--steps", type=natural, help="training steps")
    add("--batch-size", type=natural, help="images in a step, of all ranks together")
    add("--lr", type=bounded(float, 0), help="AdamW's constant learning rate")
    add("--lem-lr-factor", type=bounded(float, 0), help="rate of LEM and its MLP, relative to --lr")
    add("--beta2", type=bounded(float, 0, 0.999999), help="AdamW's second beta")
    add("--warmup", type=count, help="steps over which the rate grows at first")
    add("--ema-decay", type=share, default=0.999, help="decay of the averaged weights")
    add("--p-s", type=share, default=0.5, help="share of a batch that gets S for a prior, Table 3")
    add("--seed", type=bounded(int, 0, 2**63 - 1), default=0, help="same seed: same run")
    add("--precision", choices=["fp32", "bf16"], help="of autocast; default: bf16 on CUDA")
    add("--compile", action=switch, default=False, help="compile the blocks by torch.compile")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--workers", type=count, default=0, help="processes that load images, for each rank")

    # What it leaves behind.
    add("--log-every", type=natural, default=50, help="steps between records in log.jsonl")
    add("--save-every", type=natural, help="steps between checkpoints")
    add("--keep-every", type=count, default=0, help="steps between milestones, which are kept")
    args = parser.parse_args(argv)

    # Defaults that suit the data, then those that suit the model. What the user gives stays.
    defaults = LETTER_DATA if args.data == "letters" else FOLDER_DATA
    if args.vae != "none":
        defaults = VAE_DATA
    preset = CONFIGS[args.model]
    sizes = SMALL if args.model.endswith("-Ti") else PAPER | dict(patch_size=preset.p, w=preset.w)
    parser.set_defaults(**defaults | sizes, latent_tokens=preset.N)
    parser.set_defaults(out=Path("out") / Path(args.data).resolve().name)
    return parser.parse_args(argv)


def main() -> None:
    """Makes sure that --out is free, joins the other ranks, and trains."""
    args = parse(sys.argv[1:])
    args.device = pick_device(args.device)
    args.precision = args.precision or ("bf16" if args.device.type == "cuda" else "fp32")
    if args.cache and args.vae == "none":
        raise UserError("--cache keeps latents; without --vae there are none")
    if rank_and_world_size()[0] > 0:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all

    # Nothing that is there is overwritten. Hidden files are what a kill leaves of our own.
    with process_group(args.device), lock(args.out):
        args.resume = args.resume and (args.out / "ckpt.pt").exists()
        if rank_and_world_size()[0] == 0 and not args.resume and any(args.out.glob("[!.]*")):
            raise UserError(f"{args.out} has files already; give another --out, or --resume it")
        train(args)


if __name__ == "__main__":
    run_command(main)
