"""train.py -- data sets and end-to-end training of DoD. Sections 3.3 and 4.1.

Backbone and LEM learn together, from real pictures alone: in training, a picture's own latent is
its visual prior, and a share p_s of each batch gets the sample token S instead.

What is random in step n (order, flips, noise, times, dropped classes) is a function of (seed, n).
A resumed run needs no generator state, then; on a CPU it equals an uninterrupted one bit for bit.

    python train.py                                    # DoD-Ti, coloured letters; minutes on a CPU
    python train.py --data digits                      # handwritten digits, part of scikit-learn
    python train.py --data pictures/ --image-size 32   # yours: a folder of pictures for each class
    python train.py --model DoD-B --batch-size 8 --benchmark
"""

import argparse
import copy
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from flow import keeps_prior, logit_normal, naive_loss, rectified_flow_loss
from model import CONFIGS, Config, DoD, UserError, count_macs
from sample import (
    Parser, at_least, draw_grid, fit_picture, generate, load_checkpoint, load_codec,
    open_picture, pick_device, replacing, run_command,
)  # fmt: skip

# --------------------------------------------------------------------------------------- data sets


class Pictures(Dataset):
    """Labelled pictures: the i-th is source(rows[i]), made uint8 (channels, size, size)."""

    def __init__(self, classes: list[str], labels, source: Callable, rows, size, channels):
        self.classes, self.labels, self.rows = classes, np.asarray(labels)[rows], rows
        self.source, self.size, self.channels = source, size, channels
        self.keep = len(rows) * channels * size**2 < 2**30  # in memory, if less than 1 GiB
        self.seen = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        picture = self.seen.get(i)
        if picture is None:
            picture = fit_picture(self.source(int(self.rows[i])), self.size, self.channels)
            if self.keep:
                self.seen[i] = picture
        return picture, int(self.labels[i])


# The letters' typefaces: the 22 for text among those that ship with matplotlib.
TYPEFACES = [
    *[f"DejaVu{face}{style}" for face in ("Sans", "SansMono") for style in ("", "-Oblique")],
    *[f"DejaVu{face}-Bold{style}" for face in ("Sans", "SansMono") for style in ("", "Oblique")],
    *[f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")],
    *[f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")],
    *["cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"],
]
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
    rng, big, letter = np.random.default_rng((2411, i)), 4 * size, LETTERS[i % 10]
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
        data = torchvision_data(name)
        classes, labels, source = data.classes, data.targets, partial(picture_of, data)
    if len(classes) < 2:
        raise UserError(f"--data {name} has the one class {classes[0]!r}; at least 2 are needed")
    order = np.random.default_rng(0).permutation(len(labels))
    order = np.split(order, [min(round(held_out * len(labels)), 5000)])
    if not len(order[1]):
        raise UserError(f"--held-out {held_out} leaves none of {len(labels)} pictures to train on")
    held, rest = (Pictures(classes, labels, source, rows, size, channels) for rows in order)
    return rest, held


class Examples(Dataset):
    """All that the loss needs of image number `position` of step `step`: the item (step, position,
    i) is picture i, flipped or not, eps (C, H, W) for the codec, x1 (C, H, W), y () and t ()."""

    def __init__(self, pictures: Pictures, args: argparse.Namespace, config: Config):
        self.pictures, self.args, self.null_class = pictures, args, config.num_classes
        self.shape = (config.latent_channels, config.latent_size, config.latent_size)

    def __getitem__(self, item: tuple[int, int, int]):
        step, position, i = item
        rng, (picture, y) = (
            np.random.default_rng((self.args.seed, 0, step, position)),
            self.pictures[i],
        )
        flipped, unclassed = rng.random(2) < (0.5 * self.args.flip, self.args.class_dropout)
        eps, x1 = torch.from_numpy(rng.standard_normal((2, *self.shape), np.float32))
        t = logit_normal(1, rng)[0]
        return (
            picture.flip(-1) if flipped else picture,
            eps,
            x1,
            self.null_class if unclassed else y,
            t,
        )


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


class Run:
    """Model, EMA and optimiser of a training run. The first weights are a function of --seed."""

    def __init__(self, args: argparse.Namespace, config: Config):
        self.args, self.config, self.codec = args, config, load_codec("none")
        self.device = pick_device(args.device)
        auto = "bf16" if self.device.type == "cuda" else "fp32"
        self.bf16 = (auto if args.precision == "auto" else args.precision) == "bf16"
        torch.manual_seed(args.seed)
        self.model = DoD(config).to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(  # section 4.1
            self.model.parameters(), args.lr, betas=(0.9, 0.999), weight_decay=0, fused=True
        )
        if args.compile:
            self.model.compile()  # in place: the weights keep their names
            if config.N:  # reached through visual_prior, not through forward
                self.model.lem.compile()
                self.model.prior_mlp.compile()

    def step(self, step: int, x0, x1, y, t, loss_function=rectified_flow_loss):
        """Loss, gradient, AdamW, EMA -> loss of each image (B,), norm of the gradient ()."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = loss_function(self.model, x0, y, x1, t, keeps_prior(len(y), self.args.p_s))
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * min(1, step / max(1, self.args.warmup))
        self.optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        # CHOICE: clipped at 1, and classes dropped with probability 0.1; the paper names neither.
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        ema_update(self.ema, self.model, step)
        return loss.detach(), norm


@torch.no_grad()
def ema_update(ema: DoD, model: DoD, step: int) -> None:
    """ema <- decay ema + (1 - decay) model, in fp32, decay 0.999 (section 4.1).

    CHOICE: step n uses min(0.999, (1 + n) / (10 + n)), so that the random start is soon forgotten.
    """
    decay = min(0.999, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def save_checkpoint(path: Path, run: Run, step: int, about: dict) -> None:
    """Writes a plain dict of all that sampling and resuming need, under another name, then renames.

    Raises UserError if it cannot be written (disk full); an earlier checkpoint is then intact.
    """
    state = {part: getattr(run, part).state_dict() for part in ("model", "ema", "optimizer")}
    try:
        with replacing(path) as temporary:
            torch.save({"format": "dod-1", "step": step, **about, **state}, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        kept = "an earlier checkpoint is kept; make room, then --resume"
        raise UserError(f"could not write {path} ({error}); {kept}") from None


def resume(path: Path, run: Run, about: dict) -> int:
    """Loads a checkpoint into `run` -> its step. Raises UserError if it is of another run."""
    saved = load_checkpoint(path)
    for name, now in about.items():
        then = saved.get(name)
        if name == "config":  # its fields one by one; guidance is for sampling only
            differ = [k for k in now if now[k] != then.get(k) and k not in ("cfg", "guide_on")]
            then, now = ([each.get(k) for k in differ] for each in (then, now))
            name = f"the model's {', '.join(differ)}"
        if then != now:
            was = f"{name} was {then}, now {now}"
            raise UserError(f"cannot resume {path}: {was}; repeat the flags of the first run")
    for part in ("model", "ema", "optimizer"):
        getattr(run, part).load_state_dict(saved[part])
    return saved["step"]


# ----------------------------------------------------------------------------------------- the log


def open_log(path: Path, step: int):
    """log.jsonl, to append to. Records after `step` are cut off: those steps will come again."""
    records = path.read_text().splitlines() if step and path.exists() else []
    with replacing(path) as temporary:
        temporary.write_text(
            "".join(f"{r}\n" for r in records if r.endswith("}") and json.loads(r)["step"] <= step)
        )
    return path.open("a", buffering=1)


def summarise(pending: list[tuple], seconds: float) -> dict:
    """A log record of the last steps: loss, loss by quarter of t, gradient norm, images/s.

    pending: (step, loss (B,), t (B,), norm ()) of each. Read here, not in each step, so that a GPU
    need not wait. Raises FloatingPointError naming the first step whose loss is not finite.
    """
    steps, losses, t, norms = zip(*pending, strict=True)
    losses, t = torch.stack(losses).double().cpu(), torch.stack(t).cpu()
    for step, loss, norm in zip(steps, losses, norms, strict=True):
        if not (loss.isfinite().all() and norm.isfinite()):
            raise FloatingPointError(f"the loss of step {step} (or its gradient) is not finite")
    quarters = [losses[(k / 4 <= t) & (t < (k + 1) / 4)] for k in range(4)]
    return {
        "step": steps[-1],
        "loss": losses.mean().item(),
        "loss_by_time": [q.mean().item() if len(q) else None for q in quarters],
        "grad_norm": torch.stack(norms).mean().item(),
        "images_per_s": losses.numel() / seconds,
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


def run_steps(run: Run, pictures: Pictures, done: int, ckpt: Path, about: dict) -> int:
    """Steps done + 1 to --steps, or until a signal comes; logs and saves -> the last step done."""
    args, pending, since, step = run.args, [], time.time(), done
    loader = DataLoader(
        Examples(pictures, args, run.config),
        batch_sampler=batches(
            len(pictures), args.batch_size, args.seed, range(done + 1, args.steps + 1)
        ),
        num_workers=args.workers,
    )
    with (
        deferred_signals() as caught,
        open_log(ckpt.with_name("log.jsonl"), done) as log,
        tqdm(loader, initial=done, total=args.steps, unit="step", mininterval=1) as bar,
    ):
        for step, parts in enumerate(bar, start=done + 1):
            images, eps, x1, y, t = (part.to(run.device) for part in parts)
            x0 = run.codec.encode(images)
            loss, norm = run.step(step, x0, x1, y, t)
            pending.append((step, loss, t, norm))

            last = step == args.steps or bool(caught)
            save = last or step % args.save_every == 0
            if save or step % args.log_every == 0:
                record = summarise(pending, time.time() - since)
                log.write(json.dumps(record) + "\n")
                pending, since = [], time.time()
                rate = f"{record['images_per_s']:.0f} images/s"
                bar.set_postfix_str(f"loss {record['loss']:.4f}, {rate}")
            if save:
                save_checkpoint(ckpt, run, step, about)
            if last:
                break
    return step


WRITTEN = "ckpt.pt", "log.jsonl", "loss.png", "samples.png"
# The flags that a checkpoint records. A resumed run has to repeat them: its result depends on them.
RECORDED = (
    "data image_size channels held_out batch_size lr warmup p_s class_dropout flip seed precision"
).split()


def train(args) -> None:
    """The whole run: data, model, steps; at the end, pictures of the loss and of samples."""
    ckpt = Path(args.out) / "ckpt.pt"
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one")
    there = [ckpt.with_name(f) for f in WRITTEN if ckpt.with_name(f).exists()]
    if there and not (args.resume or args.overwrite):
        how = "--resume continues a run, --overwrite starts again; or give another --out"
        raise UserError(f"{there[0]} exists; {how}")
    pictures, held_out = load_data(args.data, args.image_size, args.channels, args.held_out)
    config = replace(
        CONFIGS[args.model], p=args.patch_size, N=args.latent_tokens, latent_size=args.image_size,
        latent_channels=args.channels, num_classes=len(pictures.classes), cfg=args.cfg,
    )  # fmt: skip
    run = Run(args, config)
    about = {name: getattr(args, name) for name in RECORDED}
    about |= {
        "classes": pictures.classes,
        "pictures": len(pictures),
        "codec": run.codec.name,
        "config": asdict(config),
    }
    done = resume(ckpt, run, about) if args.resume else 0
    size = sum(p.numel() for p in run.model.parameters()) / 1e6
    print(
        f"{args.model}: {size:.2f} M parameters, {run.config.num_tokens} tokens, {run.device}; "
        f"{len(pictures)} pictures in {len(pictures.classes)} classes, {len(held_out)} held out"
    )
    try:
        done = run_steps(run, pictures, done, ckpt, about)
    except FloatingPointError as error:
        kept = f"the last good checkpoint is {ckpt}" if ckpt.exists() else "nothing was saved yet"
        raise UserError(f"{error}; {kept}; a lower --lr may help") from None
    if done < args.steps:
        print(f"stopped after step {done}; the same command with --resume continues")
        sys.exit(130)
    plot_log(ckpt.with_name("log.jsonl"), ckpt.with_name("loss.png"))
    draw_samples(run, pictures, ckpt.with_name("samples.png"))
    print(f"wrote {', '.join(WRITTEN)} into {ckpt.parent}. Next:")
    print(f"  python sample.py --ckpt {ckpt} --seed 1 --out more.png")
    if config.N:
        print(f"  python sample.py --ckpt {ckpt} --prior YOUR_PICTURE.png --out variations.png")
        print(f"  python evaluate.py stages --ckpt {ckpt}")


def plot_log(log: Path, out: Path) -> None:
    """Draws the loss of log.jsonl, in all and by quarter of t."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [r["step"] for r in records]
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    for k in range(4):
        losses = [r["loss_by_time"][k] for r in records]
        axes.plot(steps, losses, linewidth=0.7, label=f"{k / 4:g} ≤ t < {(k + 1) / 4:g}")
    axes.plot(steps, [r["loss"] for r in records], "k", label="all t")
    axes.set(title="Loss, Eq. 3", xlabel="step", yscale="log")
    axes.legend()
    with replacing(out) as temporary:
        figure.savefig(temporary, dpi=100)


def draw_samples(run: Run, pictures: Pictures, out: Path, rows: int = 4) -> None:
    """Draws real pictures of (up to) ten classes, then the EMA model's samples of stages 1 to 3."""
    shown = np.unique(pictures.labels)[:10].tolist()
    real = [np.resize(np.flatnonzero(pictures.labels == k), rows) for k in shown]  # may repeat
    real = torch.stack([pictures[column[row]][0] for row in range(rows) for column in real])
    y = torch.tensor(shown * rows, device=run.device)
    blocks, stages = [("real", real)], 3 if run.config.N else 1
    for i, z0 in enumerate(generate(run.ema, y, stages, seed=run.args.seed, progress=True)):
        blocks.append((f"stage {i + 1}\nw = {run.config.cfg if i else 1:g}", run.codec.decode(z0)))
    with replacing(out) as temporary:
        draw_grid(blocks, [pictures.classes[k] for k in shown]).save(temporary)


# ------------------------------------------------------------------------------------------- speed


def benchmark(args) -> None:
    """Times our step against the naive one and against the device's own large matrix product.

    GMACs are those of Table 4: linear layers, one forward pass, per image; a training step costs
    three. The calls take turns, so that a disturbance hits all; medians of five are printed.
    """
    config, B, rng = CONFIGS[args.model], args.batch_size, np.random.default_rng(0)
    if not config.N:
        raise UserError(f"{args.model} has no prior to be benchmarked; choose a DoD model")
    run, macs, share = Run(args, config), count_macs(config), sum(keeps_prior(B, args.p_s)) / B
    with_prior = macs["lem"] + macs["e_s"]
    cost = {"ours": share * with_prior + (1 - share) * macs["s"], "naive": with_prior}
    shape = (2, B, config.latent_channels, config.latent_size, config.latent_size)
    x0, x1 = torch.from_numpy(rng.standard_normal(shape, np.float32)).to(run.device)
    y, t = torch.arange(B, device=run.device) % 10, logit_normal(B, rng).to(run.device)
    side = 8192 if run.device.type == "cuda" else 3072
    matrix = torch.randn(side, side, device=run.device, dtype=torch.bfloat16 if run.bf16 else None)
    calls = {
        "ours": lambda: run.step(1, x0, x1, y, t),
        "naive": lambda: run.step(1, x0, x1, y, t, naive_loss),
        "matrix": lambda: matrix @ matrix,
    }
    times = {name: [] for name in calls}
    for name in [*calls] * 6:
        began = time.perf_counter()
        calls[name]()
        if run.device.type != "cpu":
            getattr(torch, run.device.type).synchronize()
        times[name].append(time.perf_counter() - began)
    median = {name: np.median(times[name][1:]) for name in calls}  # the first warms up
    peak = 2 * side**3 / median["matrix"]
    print(f"{args.model}, batch {B}, {run.device}, {matrix.dtype}; medians of 5")
    print(f"matrix product {side} x {side}: {peak / 1e9:.0f} GFLOP/s, the whole of 'share'")
    for name, count in cost.items():
        flops = 3 * 2 * count * B / median[name]
        print(
            f"{name:6}{median[name]:8.3f} s/step {B / median[name]:9.2f} images/s "
            f"{count / 1e9:7.2f} GMACs/image {flops / 1e9:9.0f} GFLOP/s   share {flops / peak:.0%}"
        )
    ratio = np.median(np.divide(times["ours"][1:], times["naive"][1:]))
    print(f"ours / naive: {ratio:.3f} of the time, {cost['ours'] / cost['naive']:.3f} of the GMACs")


# ------------------------------------------------------------------------------------- the command

# fmt: off
DATA = {  # what --data changes in the defaults; a folder of pictures is as CIFAR-10
    "letters": dict(image_size=16, channels=3, patch_size=4, flip=False, cfg=3.5),
    "digits": dict(image_size=8, channels=1, patch_size=2, flip=False, cfg=2),
    "mnist": dict(image_size=28, channels=1, patch_size=7, flip=False, cfg=2),
    "cifar10": dict(image_size=32, channels=3, patch_size=4, flip=True, cfg=3.5),
}
# CHOICE: DoD-Ti learns at 20 times the paper's rate. Without the warm-up LEM then died in our runs:
# e_s became the same for all pictures, and the loss with a prior the same as without.
SMALL = dict(batch_size=64, lr=2e-3, warmup=300, steps=2500)
PAPER = dict(batch_size=256, lr=1e-4, warmup=0, steps=400_000)  # section 4.1


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags; the defaults depend on --data and --model, and --help shows those in force."""
    parser = Parser("Trains DoD. The defaults shown are those for the given --data and --model.")
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    share, natural = at_least(float, 0, 1), at_least(int, 1)
    add("--data", default="letters", help="letters, digits, mnist, cifar10 or a folder of folders")
    add("--model", default="DoD-Ti", choices=CONFIGS, help="preset; DoD-Ti is for a CPU")
    add("--out", help="folder of the run")
    add("--resume", action=switch, default=False, help="continue the run in --out")
    add("--overwrite", action=switch, default=False, help="replace the run in --out")
    add("--image-size", type=natural, help="pixels; pictures are resized and centre-cropped")
    add("--channels", type=int, choices=[1, 3], help="1: grey, 3: RGB")
    add("--patch-size", type=natural, help="p, pixels")
    add("--latent-tokens", type=at_least(int, 0), help="N, Table 2; 0: no LEM (FiTv2)")
    add("--flip", action=switch, help="mirror pictures at random")
    add("--held-out", type=at_least(float, 0, 0.9), default=0.1, help="share, up to 5000")
    add("--steps", type=natural, help="training steps")
    add("--batch-size", type=natural, help="pictures per step")
    add("--lr", type=at_least(float, 0), help="AdamW's constant learning rate")
    add("--warmup", type=at_least(int, 0), help="steps over which the rate first grows")
    add("--p-s", type=share, default=0.5, help="share of a batch that gets S for a prior, Table 3")
    add("--class-dropout", type=share, default=0.1, help="probability of the null class")
    add("--cfg", type=at_least(float, 1), help="the model's guidance where sampling names none")
    add("--seed", type=at_least(int, 0, 2**63), default=0, help="same seed, same run")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA")
    add("--compile", action=switch, default=False, help="torch.compile")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--workers", type=at_least(int, 0), default=0, help="processes that load pictures")
    add("--log-every", type=natural, default=50, help="steps between records in log.jsonl")
    add("--save-every", type=natural, default=1000, help="steps between checkpoints")
    add("--benchmark", action="store_true", help="time the training step, nothing else")
    # fmt: on
    first, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    data, model = first.data, first.model
    parser.set_defaults(**DATA.get(data, DATA["cifar10"]), out=f"out/{Path(data).resolve().name}")
    preset = CONFIGS[model]
    parser.set_defaults(**(SMALL if model.endswith("-Ti") else PAPER), latent_tokens=preset.N)
    if not model.endswith("-Ti"):
        parser.set_defaults(patch_size=preset.p, cfg=preset.cfg)
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    args.p_s = args.p_s if args.latent_tokens else 1.0  # without LEM nobody has a prior
    benchmark(args) if args.benchmark else train(args)


if __name__ == "__main__":
    run_command(main)
