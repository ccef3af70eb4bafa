"""evaluate.py -- FID, sFID, IS, precision, recall, rFID, PSNR, SSIM and linear probe. Section 4.1.

The formulas behind Fig. 4 and Tables 2 to 5 come first. Inception was trained on ImageNet; for
images below 64 pixels a small CNN takes its place, trained on the run's training images. Its FID is
on a scale of its own.

Samples are compared with held-out images. Choose w by the FID against training images; report the
one against held-out images. The first row of a table has training images in place of samples: it
is the level to aim for. Images are uint8 (n, channels, height, width); D features, K classes.

    python evaluate.py stages                   # Fig. 4, right, for the run in out/letters
    python evaluate.py reconstruct              # Fig. 4, left: held-out images as priors
    python evaluate.py probe                    # Table 2, right: the class in LEM's tokens
    python evaluate.py cost a.json b.json       # Fig. 2, left: FID over training images (--over)
    python evaluate.py samples --ref VIRTUAL_imagenet256_labeled.npz --samples samples.npz
"""

import argparse
import hashlib
import json
import subprocess
import sys
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

from model import UserError, count_macs, stage_macs
from sample import (
    SETTINGS, Parser, add_sampling_flags, at_least, draw_grid, generate, load_checkpoint,
    load_codec, load_image, load_model, pick_device, processes, refuse_existing, replacing,
    run_command,
)  # fmt: skip
from train import Labelled, load_data

# What the FID of a method depends on, besides w; the first four and w are the x-axes of `cost`.
SETTING = "images classes N steps prior_from p_s lr interval depth d cfg_channels".split()

# ------------------------------------------------------------------------------------- the formulas


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) and covariance (D, D) of features (n, D), in float64, with ddof = 1."""
    x = features.double()
    return x.mean(0), torch.cov(x.T)


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """FID (Heusel et al., 2017): |mu1 - mu2|² + tr S1 + tr S2 - 2 tr (S1 S2)^1/2, in float64.

    S1 S2 has the same eigenvalues as A S2 A, where A = S1^1/2, and that matrix is symmetric: two
    symmetric eigendecompositions are exact and fast where scipy.linalg.sqrtm is neither.
    mu (D,), sigma (D, D), tensors or arrays.
    """
    given = [torch.as_tensor(x, dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = given

    # A = S1^1/2, then the square roots of the eigenvalues of A S2 A. Rounding may leave eigenvalues
    # just below 0.
    values, V = torch.linalg.eigh(sigma1)  # sigma1 = V diag(values) V^T
    A = V * values.clamp(min=0).sqrt() @ V.T
    values = torch.linalg.eigvalsh(A @ sigma2 @ A)
    trace = values.clamp(min=0).sqrt().sum()  # tr (S1 S2)^1/2
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()


def inception_score(probs, splits: int = 10) -> tuple[float, float]:
    """IS (Salimans et al., 2016): exp(mean over x of KL(p(y|x) | p(y))), from 1 to K.

    probs (n, K): each image's p(y|x); `splits` contiguous parts, each with its own p(y) -> mean
    and standard deviation over the parts.
    """
    scores = []
    for p in torch.as_tensor(probs).double().tensor_split(splits):
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # with 0 log 0 = 0
        scores.append(divergence.sum(1).mean().exp().item())  # e^KL of this part
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019) of features (m, D) and (n, D).

    Precision: the share of fakes inside the ball of any real image; a ball reaches to the k-th
    nearest neighbour of its centre in its own set, border included. Recall: the reverse.
    CHOICE: fp32, where guided-diffusion's code computes distances in fp16 if they are finite.
    """
    real = torch.as_tensor(real, dtype=torch.float32)
    fake = torch.as_tensor(fake, dtype=torch.float32)

    def covered(points, centres):
        """The share of points inside any ball, in blocks of 128 MB."""
        rows = max(1, 2**25 // len(centres))  # (rows, m) distances at a time

        # The radius of each centre's ball. k + 1, since the nearest neighbour of all is itself.
        distances = (torch.cdist(block, centres) for block in centres.split(rows))
        radii = torch.cat([d.kthvalue(k + 1).values for d in distances])  # (m,)
        inside = [(torch.cdist(block, centres) <= radii).any(1) for block in points.split(rows)]
        return torch.cat(inside).double().mean().item()

    return covered(fake, real), covered(real, fake)


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """10 log10(255² / mean (a - b)²), dB: uint8 images -> (n,); infinite for equal ones."""
    return 10 * (255**2 / (a.double() - b.double()).square().flatten(1).mean(1)).log10()


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004), uint8 images -> (n,), at most 1: the mean of

    (2 mu_a mu_b + c1)(2 cov + c2) / ((mu_a² + mu_b² + c1)(var_a + var_b + c2)), c1 = (0.01 · 255)²,
    c2 = (0.03 · 255)², over the channels and the places of an 11 x 11 Gaussian window, sigma 1.5,
    that lie inside; the window weights the moments. Images must have 11 x 11 pixels or more.
    """
    a = a.double()
    b = b.double()

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


def linear_probe(x, y, x_test, y_test, decay: float = 1e-4) -> float:
    """Top-1 on (x_test, y_test), in [0, 1], of BatchNorm without affine + Linear fitted to (x, y).

    x (n, D) features, y (n,) classes. BatchNorm of all n scales each feature to mean 0, variance 1.
    CHOICE: the loss is cross-entropy + decay/2 |W|²; so it has a minimum even where the classes can
    be separated, and L-BFGS finds it.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # scikit-learn minimises |W|²/2 + C times the sum, not the mean, of the cross-entropies.
    regression = LogisticRegression(C=1 / (decay * len(x)), max_iter=2000)
    model = make_pipeline(StandardScaler(), regression)
    return model.fit(x.double().cpu(), y).score(x_test.double().cpu(), y_test)


def spread(first: torch.Tensor, second: torch.Tensor, y: torch.Tensor) -> float:
    """How free a prior leaves its image. Features (n, D) of two images of each of n priors, from
    different noise -> mean distance between images of one prior, divided by that between images of
    different priors and the same class y (n,). 0: the prior fixes the image; 1: it fixes nothing.
    """
    distances = torch.cdist(first.double(), second.double())  # (n, n)
    others = y[:, None] == y  # pairs of one class,
    others.fill_diagonal_(False)  # but not of one prior
    return (distances.diagonal().mean() / distances[others].mean()).item()


# ------------------------------------------------------------------------------------- the features

# A network maps uint8 (b, channels, height, width) to pooled features (b, D), logits (b, K) and
# spatial features (b, D') or None.


def inception(path: str | None, device: torch.device) -> Callable:
    """The Inception-v3 of published FIDs: TensorFlow's weights and resize to 299, 1008 logits; in
    fp32. pool 2048; logits without bias; spatial, for sFID (Nash et al., 2021): the first 7
    channels of Mixed_6d, 17 x 17, channels last. Raises UserError without the weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    file = path or f"{torch.hub.get_dir()}/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    try:
        if not path:  # downloads it unless it is there
            torch.hub.load_state_dict_from_url(library.URL_INCEPTION_V3, weights_only=True)
        torch.load(file, weights_only=True)  # refuses code, which the library would run
        outputs = ["2048", "logits_unbiased"]
        network = library.FeatureExtractorInceptionV3("inception", outputs, file).to(device)
    except Exception as error:
        raise UserError(f"put Inception's {file} there, or use --inception ({error})") from None

    # The library returns no spatial features: a hook reads them on their way through the network.
    spatial = []
    network.Mixed_6d.register_forward_hook(lambda module, inputs, x: spatial.append(x[:, :7]))

    def features(images):
        pool, logits = network(images.to(device).expand(-1, 3, -1, -1))
        return pool, logits, spatial.pop().permute(0, 2, 3, 1).flatten(1)  # (b, 17 * 17 * 7)

    return features


def build_classifier(size: int, channels: int, classes: int) -> nn.Sequential:
    """Three convolutions of 32, 64 and 64 channels, an average, a linear layer."""
    # Images of more than 32 pixels are averaged down first, which keeps it fast on a CPU.
    layers = [nn.AdaptiveAvgPool2d(min(size, 32))]
    for before, after in ((channels, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2, ceil_mode=True)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    return nn.Sequential(*layers)


def fit(network: nn.Sequential, images: torch.Tensor, y: torch.Tensor, steps: int = 500) -> None:
    """Trains the classifier within a minute, in one thread. CHOICE: on images with up to 24 of 255
    grey levels of noise, or its features react more to faint noise than to scrambled letters."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in tqdm(range(steps), "training the classifier", leave=False, disable=None):
        # Each image has its own level of noise.
        batch = torch.randint(len(images), (128,))  # (128,)
        noise = 24 * torch.rand(128, 1, 1, 1) * torch.randn(128, *images.shape[1:])
        optimizer.zero_grad()
        F.cross_entropy(network((images[batch] + noise) / 127.5 - 1), y[batch]).backward()
        optimizer.step()
    torch.set_num_threads(threads)


def classifier(saved: dict, training: Labelled) -> Callable:
    """For small images: a CNN fitted to the checkpoint's training images, and kept under out/. It
    always learns the original classes, so that --class-groups leaves FID on the same scale, and
    runs on the CPU, with or without a GPU. Raises UserError for data of one class."""
    if len(training.classes) < 2:
        raise UserError("images of one class have no classifier; use --features inception")

    # The same weights, batches and noise each time: a FID means something only beside others of
    # the same network. The name of the file says what it learned.
    torch.manual_seed(0)
    network = build_classifier(saved["image_size"], saved["channels"], len(training.classes))
    key = repr([saved[name] for name in ("fingerprint", "image_size", "channels", "held_out")])
    file = Path(f"out/classifier-{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt")
    if file.exists():
        network.load_state_dict(torch.load(file, weights_only=True))
    else:
        fit(network, *first(training, 10_000))
        with replacing(file) as temporary:
            torch.save(network.state_dict(), temporary)
    network.eval()  # BatchNorm uses its running statistics

    # The last layer gives the logits; what goes into it are the pooled features.
    def features(images):
        pool = network[:-1](images.float() / 127.5 - 1)
        return pool, network[-1](pool), None

    return features


# ---------------------------------------------------------------------------------- sets of images


def first(data: Labelled, n: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """n images of a data set, whose order is random: uint8 (n, channels, size, size), y (n,)."""
    items = [data[i, False] for i in range(start, min(start + n, len(data)))]
    if len(items) < 4:
        raise UserError(f"{len(items)} images, at least 4 are needed; see train.py --held-out")
    return torch.stack([image for image, _ in items]), torch.tensor([y for _, y in items])


def read_images(path: Path) -> Iterator[torch.Tensor]:
    """Yields a folder's images, or those of an .npz (arr_0): uint8 (channels, height, width).
    Raises UserError that names an unreadable one."""
    # One image at a time: a folder of 50,000 does not have to fit into memory.
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in IMG_EXTENSIONS and file.name[0] != ".":
                yield pil_to_tensor(load_image(file, 3))
        return

    # The layout of guided-diffusion's files, and of those that sample.py --npz writes.
    yield from torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)


@dataclass
class Features:
    """What a network makes of n images."""

    pool: torch.Tensor  # (n, D), fp32
    logits: torch.Tensor  # (n, K)
    spatial: torch.Tensor | None  # (n, D')


@torch.no_grad()
def measure(images: Iterable, network: Callable, what: str) -> Features:
    """Passes images through a network, 64 at a time. what: their name in messages. Raises UserError
    unless there are any, all of one size."""
    parts = []
    shapes = set()
    images = iter(tqdm(images, f"features of {what}", leave=False, disable=None))
    while batch := list(islice(images, 64)):
        shapes |= {image.shape for image in batch}
        if len(shapes) == 1:
            parts.append(network(torch.stack(batch)))
    if len(shapes) != 1:
        raise UserError(f"{what}: images of one size are needed, not of {len(shapes)}")
    pool, logits, spatial = zip(*parts, strict=True)
    spatial = torch.cat(spatial).cpu() if spatial[0] is not None else None
    return Features(torch.cat(pool).cpu(), torch.cat(logits).cpu(), spatial)


def compare(real: Features, fake: Features) -> dict[str, float]:
    """The columns of Tables 4 and 5; IS as in OpenAI's evaluator, in parts of 5,000 images."""
    # A covariance of fewer images than features is singular, and FID comes out too high.
    n, D = fake.pool.shape  # images, features
    if min(n, len(real.pool)) < D:
        print(f"warning: {len(real.pool)} and {n} images are too few for {D} features: FID is off")
    columns = {"fid": frechet_distance(*moments(real.pool), *moments(fake.pool))}
    if fake.spatial is not None:
        columns["sfid"] = frechet_distance(*moments(real.spatial), *moments(fake.spatial))

    # Samples in order of class would cap the IS, which looks at one part at a time: always shuffle.
    probs = fake.logits.double().softmax(1)[np.random.default_rng(0).permutation(n)]
    score, deviation = inception_score(probs, max(1, round(n / 5000)))
    precision, recall = precision_recall(real.pool, fake.pool)
    return columns | {"is": score, "is_std": deviation, "precision": precision, "recall": recall}


# ------------------------------------------------------------------------------------- the commands


class Run:
    """--ckpt, with the images it was trained on. Raises UserError if those have changed."""

    def __init__(self, args: argparse.Namespace):
        saved = load_checkpoint(args.ckpt)
        self.device = pick_device(args.device)
        self.model = load_model(saved, self.device)
        self.codec = load_codec(saved["codec"], self.device)

        # The same images, split in the same way; they may have moved.
        data = args.data or saved["data"]
        found = load_data(data, saved["image_size"], saved["channels"], saved["held_out"])
        self.training, self.held_out, fingerprint = found
        if fingerprint != saved["fingerprint"]:
            raise UserError(f"--data {data} has not the images that {args.ckpt} was trained on")

        # --class-groups: class k of these belongs to the model's class k K // n.
        self.n = len(self.training.classes)
        self.K = self.model.config.num_classes
        weights = ("ema", "model", "optimizer")
        self.saved = {key: value for key, value in saved.items() if key not in weights}

    def start_table(self, args: argparse.Namespace) -> None:
        """Chooses network and held-out images, and makes the first row, in which training images
        take the place of samples. They give each later row a second FID, by which w is chosen."""
        small = self.saved["image_size"] < 64
        args.features = args.features or ("classifier" if small else "inception")
        if args.features == "classifier":
            self.network = classifier(self.saved, self.training)
        else:
            self.network = inception(args.inception, self.device)
        self.settings = {name: getattr(args, name) for name in [*SETTINGS, "batch_size"]}
        self.real, self.y = first(self.held_out, args.num)  # (n, channels, size, size), (n,)
        self.told = self.y.to(self.device) * self.K // self.n  # the classes as the model knows them
        self.measured = measure(self.real, self.network, "held-out images")
        # Not those at the beginning, which the classifier has learned.
        images, y = first(self.training, len(self.y), start=len(self.training) // 2)
        self.rows = []
        self.blocks = [("real", self.real[:10])]
        self.other = self.add({"what": "training images"}, images, y)

    def add(self, row: dict, images: torch.Tensor, y: torch.Tensor) -> Features:
        """Measures images of classes y and adds their row. "recognised" is the share that the
        classifier takes for their class, where the model was told that class."""
        fake = measure(images, self.network, row["what"])
        row |= compare(self.measured, fake)
        if self.K == self.n == fake.logits.shape[1]:
            row["recognised"] = (fake.logits.argmax(1) == y).double().mean().item()
        if self.rows:  # all but the training images themselves
            row["fid_training"] = frechet_distance(*moments(self.other.pool), *moments(fake.pool))
            self.blocks.append((f"{row['what']}\nw = {row['w']:g}", images[:10]))
        self.rows.append(row)
        return fake


def sample_rows(args, run: Run, cfg: list[float], prior=None, before=0, gflops=0.0) -> Iterator:
    """Samples with these guidance scales, of the classes of the held-out images -> for each stage,
    its row, its images, its latents. evaluations: of v; a guided one runs the network twice.
    gflops: Table 4's unit, 10^9 multiply-accumulates of linear layers, stages before included:
    `before` stages of that many `gflops` have drawn the prior."""
    settings = run.settings | {"first_stage": before}
    latents, nfe = generate(run.model, run.told, len(cfg), cfg, prior=prior, **settings)

    # Outside --interval an evaluation runs the network once, with S.
    times = torch.arange(1, args.steps + 1) / args.steps
    low, high = args.interval or (0, 1)
    outside = ((times < low) | (times > high)).sum().item()  # Euler steps, one evaluation each
    macs = count_macs(run.model.config)
    for i, z0 in enumerate(latents):
        evaluations = nfe[i].double().mean().item()
        inside = evaluations - outside
        unconditional = inside if cfg[i] > 1 else 0  # the second branch of guidance
        with_prior = inside if i or prior is not None else 0
        macs_of_stage = stage_macs(macs, with_prior, evaluations - with_prior + unconditional)
        gflops += macs_of_stage / 1e9
        row = {"what": f"stage {before + i + 1}", "w": cfg[i], "evaluations": evaluations}
        yield row | {"gflops": gflops}, run.codec.decode(z0).cpu(), z0


def stages(args: argparse.Namespace) -> None:
    """Fig. 4, right: FID of each stage over the guidance scale, and of class guidance alone."""
    run = Run(args)
    run.start_table(args)
    later = (args.stages or (3 if run.model.config.N else 1)) - 1

    # Section 3.3 leaves stage 1 unguided. It is drawn once, as the prior of all later stages.
    ((first, images, z0_first),) = sample_rows(args, run, [1.0])
    run.add(first, images, run.y)
    for w in args.cfg if later else []:
        prior = z0_first
        plan = [w] * later
        for row, images, z0 in sample_rows(args, run, plan, prior, 1, first["gflops"]):
            fake = run.add(row, images, run.y)
            row["spread"] = spread_of(run, fake, w, prior)
            prior = z0  # of the next stage

    # The baseline that stage 2 has to beat: the same model, guided by the class alone.
    for w in args.cfg_stage1 if run.K > 1 else []:
        ((row, images, _),) = sample_rows(args, run, [w])
        run.add(row, images, run.y)
    finish(args, run)


def spread_of(run: Run, fake: Features, w: float, prior: torch.Tensor) -> float:
    """The spread of a stage, from its first 200 priors drawn once more, with other noise."""
    settings = run.settings | {"seed": run.settings["seed"] + 1}
    samples, _ = generate(run.model, run.told[:200], 1, [w], prior=prior[:200], **settings)
    again = measure(run.codec.decode(samples[0]).cpu(), run.network, "fresh noise").pool
    return spread(fake.pool[:200], again, run.told[:200].cpu())


def reconstruct(args: argparse.Namespace) -> None:
    """Fig. 4, left, and Tables 2-3: held-out images are the priors of their reconstructions."""
    # CHOICE: the prior is the mean of the VAE's posterior, not a sample.
    run = Run(args)
    run.start_table(args)
    prior = torch.cat([run.codec.encode(x.to(run.device)) for x in run.real.split(64)])

    # Sampling starts from noise, so all that PSNR and SSIM find beyond the class came through LEM.
    for w in args.cfg:
        for row, images, _ in sample_rows(args, run, [w], prior):
            row["what"] = "reconstruction"  # so its FID is the rFID
            row["psnr"] = psnr(run.real, images).mean().item()  # averaged over images
            if images.shape[-1] > 10:  # the window of SSIM has 11 x 11 pixels
                pairs = zip(run.real.split(64), images.split(64), strict=True)
                row["ssim"] = torch.cat([ssim(a, b) for a, b in pairs]).mean().item()
            run.add(row, images, run.y)
    finish(args, run)


def samples(args: argparse.Namespace) -> None:
    """Table 5: --samples against --ref, each a folder of images or guided-diffusion's .npz."""
    ref = Path(args.ref)
    path = Path(args.samples)
    network = inception(args.inception, pick_device(args.device))
    fake = measure(read_images(path), network, path.name)
    row = {"what": path.name}

    # The reference may hold the moments of a whole data set, and images that are a part of it.
    arrays = {} if ref.is_dir() else np.load(ref)
    if ref.is_dir() or "arr_0" in arrays:
        row |= compare(measure(read_images(ref), network, ref.name), fake)
    else:
        print(f"{ref} holds moments and no images: FID alone")
    for key, mu, sigma in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if mu in arrays:
            features = fake.pool if key == "fid" else fake.spatial
            row[key] = frechet_distance(arrays[mu], arrays[sigma], *moments(features))

    facts = {"features": "inception", "count": len(fake.pool)}
    about = Path(args.samples.removesuffix(".npz")) / "about.json"  # of a set of sample.py's
    if about.exists():
        facts["samples_about"] = json.loads(about.read_text())
    report(args, [row], facts)


@torch.no_grad()
def probe(args: argparse.Namespace) -> None:
    """Table 2, right: linear probes of LEM's latent tokens, top-1 on held-out images. CHOICE: of
    their mean and of all of them; the paper does not say how it pools them."""
    run = Run(args)
    if not run.model.config.N or run.n < 2:
        raise UserError(f"{args.ckpt} is a plain FiTv2 or knows one class: it has no LEM to probe")

    def tokens(data):
        images, y = first(data, args.num)
        z0 = [run.codec.encode(part.to(run.device)) for part in images.split(64)]
        return torch.cat([run.model.lem.encode(part) for part in z0]), y  # (n, N, d_e)

    # Fitted to training images, judged by held-out ones.
    l_hat, y = tokens(run.training)
    l_hat_test, y_test = tokens(run.held_out)
    mean = linear_probe(l_hat.mean(1), y, l_hat_test.mean(1), y_test)
    all_tokens = linear_probe(l_hat.flatten(1), y, l_hat_test.flatten(1), y_test)
    rows = [{"what": "mean of N tokens", "top1": mean}, {"what": "all tokens", "top1": all_tokens}]
    report(args, rows, {"count": len(y_test), "checkpoint": run.saved})


def cost(args: argparse.Namespace) -> None:
    """Fig. 2, left: FID over training images (or --over another axis), from reports of `stages`.
    Each run counts at its best w by FID against training images; seeds are averaged."""
    reports = []
    for path in args.reports:
        found = json.loads(Path(path).read_text())
        if found.get("command") != "stages":
            raise UserError(f"{path} is not a report of `evaluate.py stages`")
        found |= found["checkpoint"] | found["checkpoint"]["config"]
        found["images"] = found["step"] * found["batch_size"]  # seen in training
        found["classes"] = found["num_classes"]  # those that the model knows, in place of names
        reports.append(found)

    # FIDs by another classifier, or of another number of images, do not belong into one figure.
    facts = ["features", "count", "solver", "fingerprint", "image_size", "channels", "held_out"]
    differ = [key for key in facts if any(x.get(key) != reports[0].get(key) for x in reports)]
    if differ:
        raise UserError(f"the reports differ in {', '.join(differ)}: they make no common figure")

    # A curve for each method, each setting of it, and what guides it: in stage 1 the class alone.
    scans = {}  # (curve, x) -> seed -> [(FID against training images, FID, w)]
    for found in reports:
        method = "DoD" if found["N"] else "FiTv2"
        alike = [other for other in reports if (other["N"] > 0) == (found["N"] > 0)]
        setting = ""
        for key in SETTING:
            if key != args.over and any(other.get(key) != found.get(key) for other in alike):
                setting += f", {key} {found.get(key)}"
        for row in found["rows"][1:]:  # after the training images
            guide = "class" if row["what"] == "stage 1" else found["guide_on"]
            guided = f", guided by {guide}" * (row["w"] > 1)
            point = (f"{method} {row['what']}{guided}{setting}", (found | row)[args.over])
            scan = scans.setdefault(point, {}).setdefault(found["seed"], [])
            scan.append((row["fid_training"], row["fid"], row["w"]))

    rows = []
    for (name, x), seeds in sorted(scans.items()):
        best = np.array([min(scan) for scan in seeds.values()])  # (seeds, 3)
        row = {"what": name, args.over: x, "w": best[:, 2].mean(), "fid": best[:, 1].mean()}
        row["fid_std"] = best[:, 1].std(ddof=min(1, len(best) - 1))
        rows.append(row | {"seeds": len(best)})
    draw_curves(args.out.with_suffix(".png"), rows, args.over, reports[0]["rows"][0]["fid"])
    report(args, rows, {})


def report(args: argparse.Namespace, rows: list[dict], facts: dict) -> None:
    """Prints the rows as a table and writes them to --out as JSON, with every flag and fact."""
    columns = dict.fromkeys(key for row in rows for key in row if key not in ("what", "is_std"))
    print(" " * 60 + "".join(f"{key:>13}" for key in columns))
    for row in rows:
        cells = [f"{row[key]:13.4g}" if key in row else " " * 13 for key in columns]
        print(f"{row['what']:60}" + "".join(cells))

    # The report: enough to say, a year later, how each number came about.
    facts["versions"] = {"torch": torch.__version__, "numpy": np.__version__}
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    facts["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    found = vars(args) | facts | {"rows": rows}
    found.pop("function")
    with replacing(args.out) as temporary:
        temporary.write_text(json.dumps(found, indent=1, default=str))
    print(f"wrote {args.out}")


def finish(args: argparse.Namespace, run: Run) -> None:
    """What `stages` and `reconstruct` leave: the curves, some images, the report."""
    draw_curves(args.out.with_suffix(".png"), run.rows[1:], "w", run.rows[0]["fid"])
    names = [run.training.classes[k] for k in run.y[:10]]
    draw_grid(args.out.with_suffix(".images.png"), run.blocks, names)
    report(args, run.rows, {"count": len(run.y), "checkpoint": run.saved})


def draw_curves(out: Path, rows: list[dict], over: str, floor: float) -> None:
    """Draws FID over another column of the rows, a curve for each `what`; the floor is dotted."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7, 5), layout="constrained").subplots()
    for name in dict.fromkeys(row["what"] for row in rows):
        points = [row for row in rows if row["what"] == name]
        points = sorted((row[over], row["fid"], row.get("fid_std", 0)) for row in points)
        axes.errorbar(*zip(*points, strict=True), marker="o", capsize=3, label=name)
    axes.axhline(floor, color="black", linestyle=":", label="real images")
    axes.set(xscale="log", yscale="log", xlabel=over, ylabel="FID")
    ticks = sorted({row[over] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,.9g}" for tick in ticks])
    axes.yaxis.set_major_formatter("{x:g}")  # 10, not 10^1
    axes.figure.legend(loc="outside lower center")
    with replacing(out) as temporary:
        axes.figure.savefig(temporary, dpi=120)


# ------------------------------------------------------------------------------------------ command


def scales(text: str) -> list[float]:
    """An argparse type: guidance scales, each at least 1, with commas between them; or none."""
    return [] if text == "none" else [at_least(float, 1)(word) for word in text.split(",")]


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags: a subparser for each command, which is the function of that name."""
    parser = Parser()
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    natural = at_least(int, 1)
    for function in (stages, reconstruct, samples, probe, cost):
        summary = function.__doc__.splitlines()[0]
        command = commands.add_parser(function.__name__, help=summary)
        command.set_defaults(function=function)
        add = command.add_argument
        add("--out", help="JSON report; default: out/COMMAND.json, which is replaced")
        if function == cost:
            add("reports", nargs="+", help="reports of `stages`, of any runs and steps")
            add("--over", choices=[*SETTING[:4], "w"], default="images", help="the x-axis")
        if function in (stages, reconstruct, probe):
            add("--ckpt", default="out/letters/ckpt.pt", help="checkpoint of train.py")
            add("--data", help="where its training images are now; default: where they were")
        if function in (stages, reconstruct):
            add("--features", choices=["inception", "classifier"], help="default: by image size")
            add("--num", type=at_least(int, 4), default=1000, help="images, at most those held out")
            add("--cfg", type=scales, default="1,1.5,2,3.5,5.5", help="guidance with a prior")
            add("--solver", choices=["euler", "dopri5"], default="euler", help="Euler or RK45")
            add("--steps", type=natural, default=20, help="Euler steps in each stage")
            add("--batch-size", type=natural, default=64, help="images at a time")
            add_sampling_flags(command)
        if function == stages:
            add("--stages", type=natural, help="default: 3, without LEM 1")
            add("--cfg-stage1", type=scales, default="1.5,2,3,4", help="class guidance, or none")
        if function == probe:
            add("--num", type=at_least(int, 4), default=10_000, help="images of each set")
        if function == samples:
            add("--ref", required=True, help="folder of images or .npz")
            add("--samples", required=True, help="folder of images or .npz")
        if function in (stages, reconstruct, samples):
            add("--inception", help="file of Inception's weights; default: downloaded")
        if function in (samples, probe):
            add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    return parser.parse_args(argv)


def main() -> None:
    """Settles where the report goes, before any work is done, and runs the command."""
    args = parse(sys.argv[1:])
    if processes()[1] > 1:
        raise UserError("evaluate.py runs in one process: start it without torchrun")
    if args.out:
        refuse_existing(args.out, ".json")
        refuse_existing(args.out.removesuffix("json") + "png")
    args.out = Path(args.out or f"out/{args.command}.json")
    args.function(args)


if __name__ == "__main__":
    run_command(main)
