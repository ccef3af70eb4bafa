"""evaluate.py -- FID, sFID, IS, precision, recall, rFID, PSNR, SSIM and linear probe. Section 4.1.

The formulas behind Fig. 4 and Tables 2 to 5 come first. FID compares features of Inception, which
was trained on ImageNet; for images below 64 pixels, those of a small classifier that is trained on
the run's own images, on a scale of its own. Choose w by the FID against training images, and report
the one against held-out images. The first row of a table is the level to aim for: in it, training
images take the place of samples.

Images are uint8 (n, channels, height, width); D features, K classes.

    python evaluate.py stages                    # Fig. 4, right, for the run in out/letters
    python evaluate.py reconstruct               # Fig. 4, left: held-out images are the priors
    python evaluate.py probe                     # Table 2, right: the class in LEM's tokens
    python evaluate.py samples --ref VIRTUAL_imagenet256_labeled.npz --samples samples.npz
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from model import FiTv2, UserError
from sample import (
    SHIPPED, Codec, Parser, Sampler, bounded, generate, load_checkpoint, load_codec, load_image,
    load_model, pick_device, rank_and_world_size, refuse_existing, replacing, run_command,
)  # fmt: skip
from train import Labelled, ensure_cache, load_data

Array = torch.Tensor | np.ndarray

# ------------------------------------------------------------------------------------- the formulas


def statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) and covariance (D, D) of features (n, D), in float64, with ddof = 1."""
    x = features.cpu().double()  # MPS has no float64
    return x.mean(0), torch.cov(x.T)


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """FID (Heusel et al., 2017): |mu1 - mu2|² + tr S1 + tr S2 - 2 tr (S1 S2)^1/2, in float64.

    S1 S2 has the same eigenvalues as A S2 A, where A = S1^1/2, and that matrix is symmetric: two
    symmetric eigendecompositions are exact and fast where scipy.linalg.sqrtm is neither.
    Means mu (D,), covariances sigma (D, D)."""
    given = [torch.as_tensor(x).cpu().double() for x in (mu1, sigma1, mu2, sigma2)]  # not on MPS
    mu1, sigma1, mu2, sigma2 = given

    # A = S1^1/2, then the square roots of the eigenvalues of A S2 A. Rounding may leave eigenvalues
    # just below 0.
    values, V = torch.linalg.eigh(sigma1)  # sigma1 = V diag(values) V^T
    A = V * values.clamp(min=0).sqrt() @ V.T
    values = torch.linalg.eigvalsh(A @ sigma2 @ A)
    trace = values.clamp(min=0).sqrt().sum()  # tr (S1 S2)^1/2
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()


def inception_score(probs: Array, splits: int = 10) -> tuple[float, float]:
    """IS (Salimans et al., 2016): exp(mean over x of KL(p(y|x) | p(y))), from 1 to K.

    probs (n, K): each image's p(y|x); `splits` contiguous parts, each with its own p(y) -> mean
    and standard deviation over the parts. Raises UserError for fewer images than parts."""
    if len(probs) < splits:
        raise UserError(f"the IS of {splits} parts needs as many images, not {len(probs)}")
    scores = []
    for p in torch.as_tensor(probs).cpu().double().tensor_split(splits):
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # with 0 log 0 = 0
        scores.append(divergence.sum(1).mean().exp().item())  # e^KL of this part
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: Array, fake: Array, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019) of features (m, D) and (n, D).

    Precision: the share of fakes inside the ball of any real image; a ball reaches to the k-th
    nearest neighbour of its centre in its own set, border included. Recall: the reverse.
    Raises UserError for sets of k images or fewer.
    CHOICE: fp32, where guided-diffusion's code computes distances in fp16 if they are finite."""
    real = torch.as_tensor(real, dtype=torch.float32)
    fake = torch.as_tensor(fake, dtype=torch.float32)
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall need {k + 1} images or more in each of the two sets")

    def covered(points, centres):
        """The share of points inside any ball, in blocks of 128 MB."""
        rows = max(1, 2**25 // len(centres))  # (rows, m) distances at a time

        # The radius of each centre's ball. k + 1, since the nearest neighbour of all is itself.
        distances = (torch.cdist(block, centres) for block in centres.split(rows))
        radii = torch.cat([d.kthvalue(k + 1).values for d in distances])  # (m,)
        inside = [(torch.cdist(block, centres) <= radii).any(1) for block in points.split(rows)]
        return torch.cat(inside).cpu().double().mean().item()

    return covered(fake, real), covered(real, fake)


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """10 log10(255² / mean (a - b)²), dB: uint8 images -> (n,); infinite for equal ones."""
    error = (a.cpu().double() - b.cpu().double()).square().flatten(1).mean(1)
    return 10 * (255**2 / error).log10()


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004), uint8 images -> (n,), at most 1: the mean of

    (2 mu_a mu_b + c1)(2 cov + c2) / ((mu_a² + mu_b² + c1)(var_a + var_b + c2)), c1 = (0.01 · 255)²,
    c2 = (0.03 · 255)², over the channels and the places of an 11 x 11 Gaussian window, sigma 1.5,
    that lie inside; the window weights the moments. Raises RuntimeError below 11 x 11 pixels."""
    a = a.cpu().double()
    b = b.cpu().double()

    # The window is g times its transpose; softmax brings the sum of its weights to 1.
    g = (-torch.arange(-5, 6).double().square() / (2 * 1.5**2)).softmax(0)  # (11,)

    def mean(x):
        """The window's mean at each place: (n, C, H, W) -> (n, C * places)."""
        x = F.conv2d(x.flatten(0, 1)[:, None], g.view(1, 1, -1, 1))
        return F.conv2d(x, g.view(1, 1, 1, -1)).view(len(a), -1)

    # Weighted moments at each place, then the formula.
    mu_a = mean(a)
    mu_b = mean(b)
    var_a = mean(a * a) - mu_a**2
    var_b = mean(b * b) - mu_b**2
    cov = mean(a * b) - mu_a * mu_b
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    luminance = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(1)  # (n,)


def linear_probe(x: Array, y: Array, x_test: Array, y_test: Array, decay: float = 1e-4) -> float:
    """Top-1 on (x_test, y_test), in [0, 1], of a linear layer fitted to (x, y): features (n, D),
    each scaled to mean 0 and variance 1, as BatchNorm of all n would do, and classes (n,).
    CHOICE: the loss is cross-entropy + decay/2 |W|²; so it has a minimum even where the classes can
    be separated, and L-BFGS finds it."""
    from sklearn import linear_model, pipeline, preprocessing

    # scikit-learn minimises |W|²/2 + C times the sum, not the mean, of the cross-entropies.
    regression = linear_model.LogisticRegression(C=1 / (decay * len(x)), max_iter=2000)
    fitted = pipeline.make_pipeline(preprocessing.StandardScaler(), regression)
    fitted.fit(torch.as_tensor(x).cpu().double(), y)
    return fitted.score(torch.as_tensor(x_test).cpu().double(), y_test)


def spread(one: torch.Tensor, again: torch.Tensor, y: torch.Tensor) -> float:
    """How free a prior leaves its image. Features (n, D) of two images of each of n priors, from
    different noise -> mean distance between images of one prior, divided by that between images of
    different priors and the same class y (n,). 0: the prior fixes the image; 1: it fixes nothing.
    Models with different numbers of classes cannot be compared. NaN: no two share a class."""
    distances = torch.cdist(one.cpu().double(), again.cpu().double())  # (n, n)
    same_class = y[:, None] == y
    same_class.fill_diagonal_(False)  # but not of one prior
    return (distances.diagonal().mean() / distances[same_class].mean()).item()


# ------------------------------------------------------------------------------------- the features

# A network maps uint8 (b, channels, height, width) to pooled features (b, D), logits (b, K) and
# spatial features (b, D') or None.


def inception(path: str | None, device: torch.device) -> Callable:
    """The Inception-v3 of published FIDs: TensorFlow's weights and resize to 299, 1008 logits; in
    fp32. pool 2048; logits without bias; spatial, for sFID (Nash et al., 2021): the first 7
    channels of Mixed_6d, 17 x 17, channels last. Raises UserError without the weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    try:
        if path:
            torch.load(path, weights_only=True)  # refuses code, which the library would run
        outputs = ["2048", "logits_unbiased"]
        network = library.FeatureExtractorInceptionV3("inception", outputs, path).to(device)
    except Exception as error:
        what = f"no weights of Inception: {path or library.URL_INCEPTION_V3}"
        raise UserError(f"{what}; see --inception ({error})") from None

    # The library returns no spatial features: a hook reads them on their way through the network.
    spatial = []
    network.Mixed_6d.register_forward_hook(lambda module, inputs, x: spatial.append(x[:, :7]))

    def features(images):
        pool, logits = network(images.to(device).expand(-1, 3, -1, -1))
        return pool, logits, spatial.pop().permute(0, 2, 3, 1).flatten(1)  # (b, 17 * 17 * 7)

    return features


def build_classifier(size: int, channels: int, classes: int) -> nn.Sequential:
    """Three convolutions of 32, 64 and 64 channels, an average, a linear layer: images (b,
    channels, size, size) in [-1, 1] -> logits (b, classes)."""
    # Images of more than 32 pixels are averaged down first, which keeps it fast on a CPU.
    layers = [nn.AdaptiveAvgPool2d(min(size, 32))]
    for before, after in ((channels, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2, ceil_mode=True)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    return nn.Sequential(*layers)


def train_classifier(network: nn.Module, images: Array, y: Array, steps: int = 500) -> None:
    """Fits the classifier to uint8 images (n, channels, size, size) and classes y (n,), on a CPU.
    CHOICE: each image gets noise of up to 24 of 255 grey levels; without this noise the features
    react more to faint noise than to scrambled letters."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in tqdm(range(steps), "training the classifier", leave=False, disable=None):
        batch = torch.randint(len(images), (128,))  # numbers of images
        level = 24 * torch.rand(128, 1, 1, 1)  # of the noise, one for each image
        noise = level * torch.randn(128, *images.shape[1:])
        optimizer.zero_grad()
        F.cross_entropy(network((images[batch] + noise) / 127.5 - 1), y[batch]).backward()
        optimizer.step()
    torch.set_num_threads(threads)


def classifier(checkpoint: dict, training: Labelled) -> tuple[Callable, str]:
    """The network for small images, trained once and kept under out/ -> network, hash of weights.
    CHOICE: it learns the original classes, so that --class-groups leaves FID on the same scale, and
    runs on the CPU. Raises UserError for images of one class."""
    classes = len(training.original_classes)
    if classes < 2:
        raise UserError("images of one class have no classifier; use --features inception")

    # The same weights, batches and noise each time: only FIDs by the same network can be compared.
    # The name of the file says what it learned.
    torch.manual_seed(0)
    network = build_classifier(checkpoint["image_size"], checkpoint["channels"], classes)
    key = repr([checkpoint[name] for name in ("fingerprint", "image_size", "channels", "held_out")])
    file = Path(f"out/classifier-{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt")
    shipped = SHIPPED.with_name(file.name)  # since another CPU would learn another
    file = shipped if shipped.exists() else file
    if file.exists():
        network.load_state_dict(torch.load(file, weights_only=True))
    else:
        images, _, original_labels = take_images(training, 10_000)
        train_classifier(network, images, original_labels)
        with replacing(file) as temporary:
            torch.save(network.state_dict(), temporary)
    network.eval()  # BatchNorm uses its running statistics
    weights = b"".join(value.numpy().tobytes() for value in network.state_dict().values())

    # The last layer gives the logits; what goes into it are the pooled features.
    def features(images):
        pool = network[:-1](images.float() / 127.5 - 1)
        return pool, network[-1](pool), None

    return features, hashlib.sha256(weights).hexdigest()[:12]


# ---------------------------------------------------------------------------------- sets of images


def take_images(data: Labelled, count: int, start: int = 0) -> tuple[torch.Tensor, ...]:
    """Takes up to `count` images of a data set, whose order is random, from number `start` on
    -> uint8 (n, channels, size, size), the model's classes (n,), the original classes (n,). Raises
    UserError if there are fewer than 4, or if one is unreadable."""
    numbers = range(start, min(start + count, len(data)))
    if len(numbers) < 4:
        raise UserError(f"{len(numbers)} images, at least 4 are needed; see train.py --held-out")
    images, labels = zip(*[data[i, False] for i in numbers], strict=True)
    original_labels = torch.from_numpy(data.original_labels[numbers.start : numbers.stop])
    return torch.stack(images), torch.tensor(labels), original_labels


def open_images(path: Path) -> tuple[list[Path] | np.ndarray, dict[str, np.ndarray]]:
    """A folder of images, not hidden ones, or an .npz like guided-diffusion's -> what read_images
    reads, and an .npz's moments, if any: mu, sigma, mu_s, sigma_s. UserError names the fault."""
    moments = {}
    if path.is_dir():
        files = (file for file in path.rglob("*") if "/." not in f"/{file.relative_to(path)}")
        items = sorted(file for file in files if file.suffix.lower() in IMG_EXTENSIONS)
    else:
        try:
            with np.load(path) as file:
                moments = dict(file)
        except Exception as error:  # no such file, a text, a zip cut short, a pickle, ...
            what = "is not a complete .npz; was it cut short, or is it a Git LFS pointer?"
            raise UserError(f"{path} {what} ({error})") from None
        items = moments.pop("arr_0", [])
    if len(items) < 4 and (len(items) or not {"mu", "sigma"} <= moments.keys()):
        raise UserError(f"{path} has {len(items)} images (arr_0) and no mu and sigma; 4 are needed")
    if isinstance(items, np.ndarray) and (items.dtype != np.uint8 or items.shape[3:] != (3,)):
        found = f"{items.dtype} {items.shape}"
        raise UserError(f"{path}: arr_0 should be uint8 (n, height, width, 3), not {found}")
    return items, moments


def read_images(items: list[Path] | np.ndarray) -> Iterator[torch.Tensor]:
    """Yields uint8 (3, height, width), one image at a time: a folder of 50,000 does not have to fit
    into memory. Raises UserError that names an unreadable file."""
    for item in items:
        if isinstance(item, Path):
            yield pil_to_tensor(load_image(item, 3))
        else:
            yield torch.from_numpy(item).permute(2, 0, 1)


def in_batches(items: Iterable) -> Iterator[list]:
    """Yields lists of 64 items; the last may be shorter."""
    items = iter(items)
    while batch := list(islice(items, 64)):  # an empty list ends it
        yield batch


@dataclass
class Features:
    """What a network makes of n images."""

    pool: torch.Tensor  # (n, D), fp32
    logits: torch.Tensor  # (n, K)
    spatial: torch.Tensor | None  # (n, D')


@torch.no_grad()
def measure(images: Iterable, network: Callable, what: str) -> Features:
    """Passes images through a network, 64 at a time. what: their name in messages. Raises UserError
    unless they have one size."""
    parts = []
    shapes = set()
    for batch in in_batches(tqdm(images, f"features of {what}", leave=False, disable=None)):
        shapes |= {tuple(image.shape) for image in batch}
        if len(shapes) > 1:
            raise UserError(f"{what}: images of one size are needed, not {sorted(shapes)}")
        parts.append(network(torch.stack(batch)))
    pool, logits, spatial = zip(*parts, strict=True)
    spatial = torch.cat(spatial).cpu() if spatial[0] is not None else None
    return Features(torch.cat(pool).cpu(), torch.cat(logits).cpu(), spatial)


def compare(real: Features, fake: Features) -> dict[str, float]:
    """The columns of Tables 4 and 5: FID, sFID, IS, precision and recall."""
    # A covariance of fewer images than features is singular, and FID comes out too high.
    n, D = fake.pool.shape  # images, features
    if min(n, len(real.pool)) < D:
        print(f"warning: {len(real.pool)} and {n} images are too few for {D} features: FID is off")
    columns = {"fid": frechet_distance(*statistics(real.pool), *statistics(fake.pool))}
    if fake.spatial is not None:
        columns["sfid"] = frechet_distance(*statistics(real.spatial), *statistics(fake.spatial))

    # CHOICE: OpenAI's evaluator takes parts of 5,000 images in the order of the file. Here images
    # are shuffled, since a part of a set in order of class would lack most classes. Parts are of
    # equal size, as near to 5,000 as possible.
    probs = fake.logits.double().softmax(1)[np.random.default_rng(0).permutation(n)]
    score, deviation = inception_score(probs, max(1, round(n / 5000)))
    precision, recall = precision_recall(real.pool, fake.pool)
    return columns | {"is": score, "is_std": deviation, "precision": precision, "recall": recall}


def compare_pairs(real: Iterable, copies: Iterable) -> dict[str, float]:
    """PSNR in dB and SSIM between image i of one set and image i of the other, their means over i.
    64 pairs at a time: in double precision, a large set takes much memory."""
    found = {"psnr": [], "ssim": []}
    for pair in zip(in_batches(real), in_batches(copies), strict=True):
        a, b = map(torch.stack, pair)
        found["psnr"].append(psnr(a, b))
        if min(a.shape[2:]) > 10:  # the window of SSIM has 11 x 11 pixels
            found["ssim"].append(ssim(a, b))
    return {key: torch.cat(parts).mean().item() for key, parts in found.items() if parts}


# ------------------------------------------------------------------------------------- the commands


def open_run(args: argparse.Namespace, needs_lem: bool) -> tuple:
    """Opens --ckpt -> checkpoint, model, codec, training images, held-out images. Raises UserError
    for other images than the run's own, and for a plain FiTv2 where LEM is needed."""
    checkpoint = load_checkpoint(args.ckpt)
    model = load_model(checkpoint, pick_device(args.device))
    if needs_lem and not model.config.N:
        raise UserError(f"{args.ckpt} is a plain FiTv2: it has no LEM, and stage 1 only")
    codec = load_codec(args.vae or checkpoint["codec"], model.device, checkpoint)

    # The same images, split and grouped in the same way; they may have moved.
    data = args.data or checkpoint["data"]
    settings = [checkpoint[name] for name in ("image_size", "channels", "held_out")]
    cache = getattr(args, "cache", None)
    if cache:
        (Path(cache) / "latents.fp16").stat()  # FileNotFoundError: nothing is encoded here
        facts = checkpoint | {"data": data, "cache": cache, "workers": 0}
        ensure_cache(argparse.Namespace(**facts), codec)
    training, held_out, fingerprint = load_data(data, *settings, model.config.num_classes, cache)
    if fingerprint != checkpoint["fingerprint"]:
        raise UserError(f"{data} does not have the images of the run of {args.ckpt}")
    # Reports and figures need what the checkpoint says of itself, but not its weights.
    about = {key: checkpoint[key] for key in checkpoint.keys() - {"ema", "model", "optimizer"}}
    return about, model, codec, training, held_out


@dataclass
class Evaluation:
    """A model, and the n held-out images that its samples are compared with."""

    args: argparse.Namespace
    checkpoint: dict  # what it says of itself, without weights
    model: FiTv2  # or DoD
    codec: Codec
    images: torch.Tensor  # held out, uint8 (n, channels, size, size)
    labels: torch.Tensor  # (n,) their classes, as the model knows them
    network: Callable  # Inception or the classifier
    held_out: Features  # of the held-out images
    training: Features  # of as many training images
    rows: list[dict]  # of the report


def start_run(args: argparse.Namespace, needs_lem: bool) -> Evaluation:
    """Measures held-out images and, for the first row, training images in place of samples. Raises
    UserError. CHOICE: the reference is 1,000 held-out images (--num), and samples get their
    classes; the paper has FID-50K and names no labels."""
    checkpoint, model, codec, data, held_out_data = open_run(args, needs_lem)
    images, labels, _ = take_images(held_out_data, args.num)
    # Training images that the classifier has not learned, if there are 20,000 or more.
    others, _, _ = take_images(data, len(labels), start=len(data) // 2)

    args.features = args.features or ("classifier" if images.shape[-1] < 64 else "inception")
    if args.features == "classifier":
        network, args.network_hash = classifier(checkpoint, data)
    else:
        network = inception(args.inception, model.device)
    held_out = measure(images, network, "held-out images")
    training = measure(others, network, "training images")
    rows = [{"what": "training images"} | compare(held_out, training)]
    given = (args, checkpoint, model, codec, images, labels.to(model.device), network)
    return Evaluation(*given, held_out, training, rows)


def draw_stage(
    run: Evaluation, w: float, stage: int = 0, prior: torch.Tensor | None = None
) -> tuple[dict, torch.Tensor, torch.Tensor, Features]:
    """Draws samples of the run's classes, with the noise of `stage`, counted from 0, and adds their
    row -> row, images, latents, features. Choose w by the column fid_training. Column evaluations
    counts those of v; a guided one calls the model twice."""
    # CHOICE: Euler's method, which costs the same for any w; section 3.3 samples by RK45.
    sampler = Sampler("euler", run.args.steps, run.args.seed, first_stage=stage)
    (z0,), (nfe,) = generate(run.model, run.labels, 1, [w], sampler, prior=prior)
    images = run.codec.decode(z0).cpu()
    what = f"stage {stage + 1}" if run.model.config.N else "FiTv2"
    fake = measure(images, run.network, what)
    row = {"what": what, "w": w, "evaluations": nfe.double().mean().item()}
    row |= compare(run.held_out, fake)
    row["fid_training"] = frechet_distance(*statistics(run.training.pool), *statistics(fake.pool))
    run.rows.append(row)
    return row, images, z0, fake


def stages(args: argparse.Namespace) -> None:
    """Fig. 4, right: FID of each stage over the guidance scale, and of class guidance alone."""
    run = start_run(args, needs_lem=(args.stages or 1) > 1)
    count = args.stages or (3 if run.model.config.N else 1)

    # Section 3.3 leaves stage 1 unguided. It is drawn once, and is stage 2's prior for any w.
    _, _, z0_first, _ = draw_stage(run, 1.0)
    other_noise = Sampler("euler", args.steps, args.seed + 1)
    for w in args.cfg if count > 1 else []:
        z0 = z0_first
        for stage in range(1, count):
            prior = z0
            row, _, z0, fake = draw_stage(run, w, stage, prior)

            # Its spread: the first 200 priors once more, with other noise.
            labels = run.labels[:200]
            (again,), _ = generate(run.model, labels, 1, [w], other_noise, prior=prior[:200])
            again = measure(run.codec.decode(again).cpu(), run.network, "fresh noise")
            row["spread"] = spread(fake.pool[:200], again.pool, labels.cpu())

    # What stage 2 has to beat, besides FiTv2: the same model, guided by the class alone.
    for w in args.cfg_stage1 if run.model.config.num_classes > 1 else []:
        draw_stage(run, w)
    plot_and_report(run)


def reconstruct(args: argparse.Namespace) -> None:
    """Fig. 4, left, and Tables 2-3: held-out images are the priors of their reconstructions."""
    # CHOICE: the prior is the mean of the VAE's posterior, not a sample.
    run = start_run(args, needs_lem=True)
    prior = run.codec.encode(run.images.to(run.model.device))

    # Sampling starts from noise, so all that PSNR and SSIM find beyond the class came through LEM.
    for w in args.cfg:
        row, images, _, _ = draw_stage(run, w, prior=prior)
        row["what"] = "reconstruction"  # so its FID is the rFID
        row |= compare_pairs(run.images, images)
    plot_and_report(run)


def samples(args: argparse.Namespace) -> None:
    """Table 5: the images of --samples against those of --ref.
    With --paired, image n of --ref is the prior of image n of --samples, as sample.py --prior-data
    writes them: PSNR and SSIM, and the FID is the rFID."""
    # Files are looked at before the network. A reference may hold the moments of a whole data set.
    fake_items, _ = open_images(Path(args.samples))
    real_items, moments = open_images(Path(args.ref))
    if not len(fake_items):
        raise UserError(f"{args.samples} holds moments and no images")
    sizes = {next(read_images(items)).shape for items in (real_items, fake_items) if len(items)}
    if len(sizes) > 1:
        print("warning: the images of --samples and of --ref have different sizes")
    if args.paired and (len(sizes) > 1 or len(real_items) != len(fake_items)):
        raise UserError("--paired needs equally many images of one size in --samples and --ref")

    network = inception(args.inception, pick_device(args.device))
    fake = measure(read_images(fake_items), network, args.samples)
    row = {"what": Path(args.samples).name}
    if len(real_items):
        row |= compare(measure(read_images(real_items), network, args.ref), fake)
    for key, x, end in (("fid", fake.pool, ""), ("sfid", fake.spatial, "_s")):
        if {"mu" + end, "sigma" + end} <= moments.keys():
            reference = (moments["mu" + end], moments["sigma" + end])
            row[key] = frechet_distance(*reference, *statistics(x))
    if args.paired:
        row |= compare_pairs(read_images(real_items), read_images(fake_items))

    facts = {"features": "inception", "count": len(fake_items), "count_ref": len(real_items)}
    about = Path(args.samples.removesuffix(".npz")) / "about.json"  # of a set of sample.py's
    if about.exists():
        facts["samples_about"] = json.loads(about.read_text())
    report(args, [row], facts)


@torch.no_grad()
def probe(args: argparse.Namespace) -> None:
    """Table 2, right: linear probes of LEM's latent tokens, top-1 on held-out images.
    CHOICE: of their mean and of all of them; the paper does not say how it pools them. Raises
    UserError without LEM or held-out images, for one class, or if --cache is not the run's own."""
    checkpoint, model, codec, training, held_out = open_run(args, needs_lem=True)
    if len(set(training.original_labels[: args.num])) < 2 or not len(held_out):
        raise UserError("the probe needs held-out images, and --num others of two classes or more")

    def tokens(data):
        """-> l_hat (n, N, d_e) of the first --num images, and their original classes (n,)."""
        n = min(args.num, len(data))
        l_hat = []
        for numbers in in_batches(range(n)):  # all at once need not fit into memory
            x = torch.stack([data[i, False][0] for i in numbers])  # images, or cached moments
            z0 = codec.encode(x.to(model.device))  # the mean of the posterior
            l_hat.append(model.lem.encode(z0).cpu())  # Eq. 6
        return torch.cat(l_hat), data.original_labels[:n]  # classes, also of an unconditional model

    # Fitted to training images, judged by held-out ones.
    l_hat, y = tokens(training)
    l_hat_test, y_test = tokens(held_out)
    mean = linear_probe(l_hat.mean(1), y, l_hat_test.mean(1), y_test)
    all_tokens = linear_probe(l_hat.flatten(1), y, l_hat_test.flatten(1), y_test)
    rows = [{"what": "mean of N tokens", "top1": mean}, {"what": "all tokens", "top1": all_tokens}]
    report(args, rows, {"count_training": len(y), "count": len(y_test), "checkpoint": checkpoint})


# --------------------------------------------------------------------------------------- reports


def plot_and_report(run: Evaluation) -> None:
    """What `stages` and `reconstruct` leave: FID over w, a curve for each stage, and the report."""
    import matplotlib.figure

    axes = matplotlib.figure.Figure(figsize=(7, 6), layout="constrained").subplots()
    for what in dict.fromkeys(row["what"] for row in run.rows[1:]):
        points = sorted((row["w"], row["fid"]) for row in run.rows if row["what"] == what)
        axes.plot(*zip(*points, strict=True), "o-", label=what)
    axes.axhline(run.rows[0]["fid"], color="black", linestyle=":", label="training images")
    ylabel = f"FID to {len(run.images)} held-out images, by {run.args.features}"
    axes.set(yscale="log", xlabel="guidance scale w", ylabel=ylabel)
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")  # 10, not 10^1
    axes.legend()
    with replacing(run.args.out.with_suffix(".png")) as temporary:
        axes.figure.savefig(temporary, dpi=120)
    facts = {"count": len(run.images), "solver": "euler", "checkpoint": run.checkpoint}
    report(run.args, run.rows, facts)


def report(args: argparse.Namespace, rows: list[dict], facts: dict) -> None:
    """Prints the rows as a table and writes them to --out as JSON, with every flag and fact: enough
    to say, a year later, how each number came about."""
    columns = dict.fromkeys(key for row in rows for key in row if key not in ("what", "is_std"))
    print(" " * 40 + "".join(f"{key:>13}" for key in columns))
    for row in rows:
        cells = [f"{row[key]:13.4g}" if key in row else " " * 13 for key in columns]
        print(f"{row['what']:40}" + "".join(cells))

    git = f"git -C '{Path(__file__).parent}' describe --always --dirty"
    found = vars(args) | facts | {"commit": subprocess.getoutput(git)}
    found |= {"torch": torch.__version__, "numpy": np.__version__, "rows": rows}
    found.pop("function")
    with replacing(args.out) as temporary:
        temporary.write_text(json.dumps(found, indent=1, default=str))
    print(f"wrote {args.out}")


# ------------------------------------------------------------------------------------------ command


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags: a subparser for each command, which is the function of that name."""
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    natural = bounded(int, 1)
    scales = {"type": bounded(float, 1), "nargs": "*"}  # any number of them, also none
    for function in (stages, reconstruct, samples, probe):
        command = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0])
        command.set_defaults(function=function)
        add = command.add_argument
        add("--out", help="JSON report; default: out/COMMAND.json, which is replaced")
        if function in (stages, reconstruct, probe):
            add("--ckpt", default="out/letters/ckpt.pt", help="checkpoint of train.py")
            add("--data", help="where its training images are now; default: where they were")
            add("--vae", help="where the checkpoint's VAE is now, if it has moved")
        if function in (stages, reconstruct):
            add("--features", choices=["inception", "classifier"], help="default: by image size")
            add("--num", type=bounded(int, 4), default=1000, help="images, at most those held out")
            add("--cfg", **scales, default=[1, 1.5, 2, 3.5, 5.5], help="guidance with a prior")
            add("--steps", type=natural, default=20, help="Euler steps in each stage")
            add("--seed", type=bounded(int, 0), default=0, help="of the noise")
        if function == stages:
            add("--stages", type=natural, help="default: 3, without LEM 1")
            add("--cfg-stage1", **scales, default=[1.5, 2, 3, 4], help="class guidance")
        if function == probe:
            add("--num", type=bounded(int, 4), default=10_000, help="images of each set")
            add("--cache", help="folder of their latents by this --vae; default: none is used")
        if function == samples:
            add("--ref", required=True, help="folder of images or .npz")
            add("--samples", required=True, help="folder of images or .npz")
            add("--paired", action="store_true", help="image n of --ref is image n's prior")
        if function in (stages, reconstruct, samples):
            add("--inception", help="file of Inception's weights; default: downloaded")
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    return parser.parse_args(argv)


def main() -> None:
    """Makes sure that the report can be written, before any work is done, and runs the command."""
    args = parse(sys.argv[1:])
    if rank_and_world_size()[1] > 1:
        raise UserError("evaluate.py runs in one process: start it without torchrun")
    if args.out:  # what the user names is never replaced
        refuse_existing(args.out, ".json")
        refuse_existing(args.out.removesuffix("json") + "png")
    args.out = Path(args.out or f"out/{args.command}.json")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out.parent).close()  # raises OSError if it cannot be written to
    args.function(args)


if __name__ == "__main__":
    run_command(main)
