"""evaluate.py -- FID, sFID, IS, precision, recall, rFID, PSNR, SSIM and linear probe. Section 4.1.

The formulas behind Fig. 4 and Tables 2 to 5 come first. Two things come from libraries: the
Inception network with the weights of all published FIDs (torch-fidelity), and L-BFGS for the probe
(scikit-learn). Inception was trained on ImageNet; for pictures below 64 pixels a small CNN takes
its place, trained on the run's training pictures. Its FID is on a scale of its own.

Samples are compared with held-out pictures. A second FID, against training pictures, is the one by
which a guidance scale may be chosen. The first row of a table is the floor: training pictures in
place of samples.

Pictures are uint8 (n, channels, height, width); D features, K classes.

    python evaluate.py stages                   # Fig. 4, right, for the run in out/letters
    python evaluate.py reconstruct              # Fig. 4, left: held-out pictures as priors
    python evaluate.py probe                    # Table 2, right: the class in LEM's tokens
    python evaluate.py cost a.json b.json       # Fig. 2, left: FID over training images
    python evaluate.py samples --ref VIRTUAL_imagenet256_labeled.npz --samples samples.npz
"""

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from model import Config, DoD, UserError, count_macs, stage_parts, training_macs
from sample import (
    TRAINING_ONLY, Codec, Parser, add_sampling_flags, at_least, codec_of, draw_grid, generate,
    load_checkpoint, load_model, may_write, nonempty, open_picture, pick_device, replacing,
    run_command, scales, true_fp32,
)  # fmt: skip
from train import SUFFIXES, load_data

# ------------------------------------------------------------------------------------- the formulas


def add_rows(moments: tuple, x: torch.Tensor) -> tuple:
    """Updates (n, mu (D,), scatter (D, D)) by a batch x (b, D), in float64 (Chan et al., 1979).

    The scatter matrix is the sum of (x - mu)(x - mu)ᵀ, n - 1 times the covariance (ddof = 1).
    Start from (0, 0, 0). Raises UserError if a feature is NaN or infinite.
    """
    n, mu, scatter = moments
    b = len(x)
    x = x.cpu().double()
    if not x.isfinite().all():
        raise UserError(f"features of pictures {n} to {n + b - 1} are NaN or infinite")

    # The scatter of all = that of the old rows + that of the new ones + that of their two means.
    mean = x.mean(0)
    centred = x - mean
    shift = mean - mu
    scatter = scatter + centred.T @ centred + n * b / (n + b) * shift.outer(shift)
    return n + b, mu + b / (n + b) * shift, scatter


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """FID (Heusel et al., 2017): |mu1 - mu2|² + tr S1 + tr S2 - 2 tr (S1 S2)^1/2, in float64.

    S1 S2 has the same eigenvalues as A S2 A, where A = S1^1/2, and that matrix is symmetric: two
    symmetric eigendecompositions are exact and fast where scipy.linalg.sqrtm is neither.
    mu (D,), sigma (D, D), tensors or arrays. Raises UserError if shapes do not match or a number is
    not finite.
    """
    moments = [torch.as_tensor(x, dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2)]
    D = moments[0].numel()
    shapes = [tuple(x.shape) for x in moments]
    if shapes != [(D,), (D, D)] * 2 or not all(x.isfinite().all() for x in moments):
        raise UserError(f"moments of shapes {shapes}; (D,), (D, D), twice, all finite, are needed")
    mu1, sigma1, mu2, sigma2 = moments

    # A = S1^1/2, then the square roots of the eigenvalues of A S2 A. Rounding may leave eigenvalues
    # just below 0.
    values, V = torch.linalg.eigh(sigma1)
    A = V * values.clamp(min=0).sqrt() @ V.T
    values = torch.linalg.eigvalsh(A @ sigma2 @ A)
    trace = values.clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()


def inception_score(probs, splits: int = 10) -> tuple[float, float]:
    """IS (Salimans et al., 2016): exp(mean over x of KL(p(y|x) | p(y))), from 1 to K.

    probs (n, K): each picture's p(y|x); `splits` contiguous parts, each with its own p(y) -> mean
    and standard deviation over the parts. Raises UserError if a part is empty or not finite.
    """
    # Each part has its own p(y), so each needs samples of all classes: see compare().
    scores = []
    for p in torch.as_tensor(probs).double().tensor_split(splits):
        if not len(p) or not p.isfinite().all():
            raise UserError(f"IS of {len(probs)} pictures in {splits} parts: one is empty or NaN")
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # with 0 log 0 = 0
        scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019) of features (m, D) and (n, D).

    Precision: the share of fakes inside the ball of any real picture; a ball reaches to the k-th
    nearest neighbour of its centre in its own set, border included. Recall: the reverse. fp32, in
    blocks of 128 MB. CHOICE: fp32, where guided-diffusion's code has fp16 distances if finite.
    Raises UserError for sets smaller than k + 1 or widths that differ.
    """
    real = torch.as_tensor(real, dtype=torch.float32)
    fake = torch.as_tensor(fake, dtype=torch.float32)
    if min(len(real), len(fake)) < k + 1 or real.shape[1] != fake.shape[1]:
        got = f"features {tuple(real.shape)} against {tuple(fake.shape)}"
        raise UserError(f"{got}; at least {k + 1} pictures each, of one width, are needed")

    def covered(points, centres):
        """The share of points inside any ball."""
        # The radius of each centre's ball.
        rows = max(1, 2**25 // len(centres))
        radii = []
        for block in centres.split(rows):
            distances = torch.cdist(block, centres)  # (b, number of centres)
            radii.append(distances.kthvalue(k + 1).values)  # + 1: the nearest one is itself
        radii = torch.cat(radii)

        # Is a point inside one of them?
        inside = [(torch.cdist(block, centres) <= radii).any(1) for block in points.split(rows)]
        return torch.cat(inside).double().mean().item()

    return covered(fake, real), covered(real, fake)


def as_doubles(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    """Both in float64. Raises UserError unless they are uint8 pictures of one shape."""
    if a.dtype != torch.uint8 or b.dtype != torch.uint8 or a.shape != b.shape:
        got = f"{a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
        raise UserError(f"{got}; uint8 (n, channels, height, width) of one shape is needed")
    return [a.cpu().double(), b.cpu().double()]


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """10 log10(255² / mean (a - b)²), dB: uint8 pictures -> (n,); infinite for equal ones."""
    a, b = as_doubles(a, b)
    return 10 * (255**2 / (a - b).square().flatten(1).mean(1)).log10()


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004), uint8 pictures -> (n,), at most 1: the mean of

    (2 mu_a mu_b + c1)(2 cov + c2) / ((mu_a² + mu_b² + c1)(var_a + var_b + c2)), c1 = (0.01 · 255)²,
    c2 = (0.03 · 255)², over the channels and the places of an 11 x 11 Gaussian window, sigma 1.5,
    that lie inside; the window weights the moments. Pictures must have 11 x 11 pixels or more.
    """
    a, b = as_doubles(a, b)

    # The window is the product of a column and a row, so two convolutions of 11 weights replace
    # one of 121. softmax brings the sum of the weights to 1.
    g = (-torch.arange(-5, 6).double().square() / (2 * 1.5**2)).softmax(0)

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
    return (luminance * structure).mean(1)


def linear_probe(x, y, x_test, y_test, decay: float = 1e-4) -> float:
    """Top-1 on (x_test, y_test), in [0, 1], of BatchNorm without affine + Linear fitted to (x, y).

    x (n, D) features, y (n,) classes. With x as a single batch, BatchNorm scales each feature to
    mean 0 and variance 1. CHOICE: the loss is cross-entropy + decay/2 |W|²; so it has a minimum
    even where the classes can be separated, and L-BFGS finds it.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    # Test features are scaled by the statistics of the training features, as BatchNorm does.
    scaler = StandardScaler().fit(x.double().cpu())
    x = scaler.transform(x.double().cpu())
    x_test = scaler.transform(x_test.double().cpu())

    # scikit-learn minimises |W|²/2 + C times the sum, not the mean, of the cross-entropies.
    model = LogisticRegression(C=1 / (decay * len(x)), max_iter=2000)
    return model.fit(x, y).score(x_test, y_test)


# ------------------------------------------------------------------------------------- the features

# A network maps uint8 (b, channels, height, width) to pooled features (b, D), logits (b, K) and
# spatial features (b, D') or None. It comes with a dict of what the report says about it.


def inception(path: str | None, device: torch.device) -> tuple[Callable, dict]:
    """The Inception-v3 of published FIDs: TensorFlow's weights and resize to 299, 1008 logits.

    pool 2048; logits without bias; spatial, for sFID (Nash et al., 2021): the first 7 channels of
    Mixed_6d, 17 x 17, channels last. Raises UserError without the library or the weights.
    """
    kept = f"{torch.hub.get_dir()}/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    file = Path(path or kept)
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as library

        if not path:  # downloads it unless it is there
            torch.hub.load_state_dict_from_url(library.URL_INCEPTION_V3, weights_only=True)
        torch.load(file, weights_only=True)  # refuses code in it, which the library would run
        outputs = ["2048", "logits_unbiased"]
        network = library.FeatureExtractorInceptionV3("inception", outputs, str(file)).to(device)
    except Exception as error:
        need = f"torch-fidelity and its {Path(kept).name} there, or at --inception PATH, are needed"
        raise UserError(f"no Inception in {file} ({type(error).__name__}); {need}") from None

    # The library returns no spatial features: a hook reads them on their way through the network.
    spatial = []
    network.Mixed_6d.register_forward_hook(lambda module, inputs, x: spatial.append(x[:, :7]))

    def features(images):
        # Published FIDs are computed in fp32; TF32 or bf16 would shift them.
        with true_fp32(device):
            pool, logits = network(images.to(device).expand(-1, 3, -1, -1))
        return pool, logits, spatial.pop().permute(0, 2, 3, 1).flatten(1)

    return features, {"features": "inception", "weights": str(file)}


def build_classifier(size: int, channels: int, classes: int) -> nn.Sequential:
    """Three convolutions of 32, 64 and 64 channels, an average, a linear layer."""
    # Pictures of more than 32 pixels are averaged down first, which keeps it fast on a CPU.
    layers = [nn.AdaptiveAvgPool2d(min(size, 32))]
    for before, after in ((channels, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2, ceil_mode=True)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    return nn.Sequential(*layers)


def fit(network: nn.Sequential, images: torch.Tensor, y: torch.Tensor, steps: int = 500) -> None:
    """Trains the classifier within a minute. One thread and one seed: the same weights each time.

    CHOICE: on pictures with up to 24 of 255 grey levels of noise; without this noise the features
    react more to faint noise than to scrambled letters.
    """
    # The same start, whatever came before: a FID means something only beside others of the same
    # network.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for layer in network:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()

    # The same batches and noise, from the same seed; each picture has its own level of noise.
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in tqdm(range(steps), desc="training the classifier", leave=False, disable=None):
        batch = torch.randint(len(images), (128,))
        noise = 24 * torch.rand(128, 1, 1, 1) * torch.randn(128, *images.shape[1:])
        optimizer.zero_grad()
        F.cross_entropy(network((images[batch] + noise) / 127.5 - 1), y[batch]).backward()
        optimizer.step()
    torch.set_num_threads(threads)


def classifier(ckpt: Path, saved: dict, training: Dataset) -> tuple[Callable, dict]:
    """For small pictures: a CNN fitted to the checkpoint's training pictures, and kept beside it.

    pool 64; logits of the checkpoint's classes. It runs on the CPU, so it is the same everywhere.
    """
    # The name of the file says what the classifier learned: other pictures, another file.
    key = [saved[entry] for entry in ("fingerprint", "image_size", "channels", "held_out")]
    file = ckpt.with_name(f"classifier-{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}.pt")
    network = build_classifier(saved["image_size"], saved["channels"], len(saved["classes"]))

    # Read it, or train it now and keep it for the next time.
    try:
        network.load_state_dict(torch.load(file, weights_only=True))
    except Exception:  # not there, or damaged
        fit(network, *first(training, 10_000))
        try:
            with replacing(file) as temporary:
                torch.save(network.state_dict(), temporary)
        except UserError as error:  # the run's folder may be read-only
            print(f"the classifier is not kept: {error}")
    network.eval()

    # The last layer gives the logits; what goes into it are the pooled features.
    def features(images):
        images = as_channels(images, saved["channels"])
        pool = network[:-1](images.float() / 127.5 - 1)
        return pool, network[-1](pool), None

    return features, {"features": "classifier"}


def as_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Grey pictures as RGB, or RGB ones as grey, if the number of channels asks for it. uint8."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    # The weights by which Pillow, too, turns colours into grey.
    luminance = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * luminance).sum(1, keepdim=True).round().byte()


# --------------------------------------------------------------------------------- sets of pictures


def first(data: Dataset, n: int) -> list[torch.Tensor]:
    """n pictures of a data set (its order is random): uint8 (n, channels, size, size), y (n,).

    Raises UserError if it has fewer than 4.
    """
    if len(data) < 4:
        raise UserError(f"{len(data)} pictures, at least 4 are needed; see train.py --held-out")
    items = [data[i, False] for i in range(min(n, len(data)))]
    return [torch.stack([image for image, _ in items]), torch.tensor([y for _, y in items])]


def read_pictures(path: Path) -> Iterator[torch.Tensor]:
    """Yields a folder's pictures, or those of an .npz (arr_0): uint8 (channels, height, width).

    Raises UserError that names what is missing, unreadable or of another kind.
    """
    # One picture at a time: a folder of 50,000 does not have to fit into memory.
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.suffix.lower() in SUFFIXES and not hidden:
                pixels = np.array(open_picture(file).convert("RGB"))
                yield torch.from_numpy(pixels).permute(2, 0, 1)
        return

    # The layout of guided-diffusion's files, and of those that sample.py --npz writes.
    pixels = read_arrays(path, ["arr_0"])[0]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
        got = f"arr_0 is {pixels.dtype} {pixels.shape}"
        raise UserError(f"{path}: {got}; uint8 (n, height, width, 3) is needed")
    yield from torch.from_numpy(pixels).permute(0, 3, 1, 2)


def read_arrays(path: Path, keys: list[str]) -> list[np.ndarray]:
    """Arrays of an .npz. Raises UserError if it is none, or does not hold them."""
    try:
        with np.load(path) as file:
            return [file[key] for key in keys]
    except Exception as error:  # NumPy raises many kinds for files that are no .npz
        need = f"a folder of pictures or an .npz with {', '.join(keys)} is needed"
        raise UserError(f"{path}: {error}; {need}") from None


def about_samples(path: Path) -> dict:
    """What sample.py says of a set that it made: seed, guidance, labels, ... Else nothing."""
    # Sets of other programs have no such note, or an unreadable one: that is no error.
    try:
        if path.is_dir():
            return dict(json.loads((path / "about.json").read_text()))
        return dict(json.loads(str(read_arrays(path, ["about"])[0])))
    except (OSError, ValueError, TypeError, UserError):
        return {}


class Measured(NamedTuple):
    """Features and statistics of n pictures."""

    shape: torch.Size  # channels, height, width
    fid: tuple  # mean and covariance of the pooled features
    sfid: tuple  # of the spatial features; () without them
    pool: torch.Tensor  # (n, D), fp32
    logits: torch.Tensor  # (n, K)


@torch.no_grad()
def measure(pictures: Iterable, network: Callable, what: str, like=None) -> Measured:
    """Passes pictures through a network -> their features and statistics.

    what: their name in messages; like: the set they will be compared with. Raises UserError unless
    all are uint8 and of one height and width, those of `like` if it is given.
    """
    shape = like and like.shape
    pools = []
    logits = []
    waiting = [[], []]  # pooled and spatial features that are not in the moments yet
    moments = [(0, 0, 0), (0, 0, 0)]

    def add_waiting(enough: int) -> None:
        """Adds what waits to the moments, if that is `enough` rows."""
        for i, parts in enumerate(waiting):
            if sum(map(len, parts)) >= enough:
                moments[i] = add_rows(moments[i], torch.cat(parts))
                parts.clear()

    # In batches of 64, of any mixture of grey and colour, but of one size.
    pictures = iter(tqdm(pictures, desc=f"features of {what}", leave=False, disable=None))
    while batch := list(islice(pictures, 64)):
        shape = shape or batch[0].shape
        for picture in batch:
            if picture.dtype != torch.uint8 or picture.shape[1:] != shape[1:]:
                got = f"a picture is {picture.dtype} {tuple(picture.shape)}"
                raise UserError(f"{what}: {got}; torch.uint8 {tuple(shape)} is needed")
        images = torch.stack([as_channels(picture[None], shape[0])[0] for picture in batch])
        pool, logit, spatial = network(images)
        pools.append(pool.cpu())
        logits.append(logit.cpu())
        waiting[0].append(pools[-1])
        if spatial is not None:
            waiting[1].append(spatial.cpu())
        add_waiting(1024)  # in large pieces: each one costs a matrix of D x D
    add_waiting(1)  # and what is left

    # From scatter matrices to covariances.
    if moments[0][0] < 2:
        raise UserError(f"{what}: {moments[0][0]} pictures; at least 2 are needed")
    statistics = [(mu, scatter / (n - 1)) if n else () for n, mu, scatter in moments]
    return Measured(shape, *statistics, torch.cat(pools), torch.cat(logits))


def compare(real: Measured, fake: Measured) -> dict[str, float]:
    """The columns of Tables 4 and 5; IS as in OpenAI's evaluator, in parts of 5,000 pictures."""
    # A covariance of fewer pictures than features is singular, and FID comes out too high.
    n, D = fake.pool.shape
    if min(n, len(real.pool)) < D:
        counts = f"{len(real.pool)} and {n} pictures for {D} features"
        warnings.warn(f"{counts}: too few, the covariances are singular, FID is off", stacklevel=2)

    # Samples in order of class would cap the IS, which looks at one part at a time: always shuffle.
    probs = fake.logits.double().softmax(1)[np.random.default_rng(0).permutation(n)]
    score, deviation = inception_score(probs, max(1, round(n / 5000)))

    precision, recall = precision_recall(real.pool, fake.pool)
    columns = {"fid": frechet_distance(*real.fid, *fake.fid)}
    # The classifier gives no spatial features, and thus no sFID.
    if real.sfid and fake.sfid:
        columns["sfid"] = frechet_distance(*real.sfid, *fake.sfid)
    return columns | {"is": score, "is_std": deviation, "precision": precision, "recall": recall}


# ------------------------------------------------------------------------------------- the commands


class Run(NamedTuple):
    """What a command needs of a training run."""

    saved: dict  # what the checkpoint says of it, without weights
    model: DoD
    codec: Codec
    training: Dataset
    held_out: Dataset


def load_run(args: argparse.Namespace) -> Run:
    """--ckpt, with the pictures it was trained on. Raises UserError if those have changed."""
    saved = load_checkpoint(args.ckpt)
    device = pick_device(args.device)
    model = load_model(saved, device)
    codec = codec_of(saved, args.vae, device)

    # The same pictures, split in the same way; they may have moved.
    data = args.data or saved["data"]
    try:
        training, held_out, fingerprint = load_data(
            data, saved["image_size"], saved["channels"], saved["held_out"]
        )
    except UserError as error:
        raise UserError(f"{error}; --data says where the training pictures are now") from None
    if fingerprint != saved["fingerprint"]:
        raise UserError(f"the pictures of --data {data} are not those {args.ckpt} was trained on")

    # What is left of the checkpoint goes into the report, and thus has no tensors.
    saved = {key: v for key, v in saved.items() if key not in ("ema", *TRAINING_ONLY)}
    return Run(saved, model, codec, training, held_out)


def load_network(args: argparse.Namespace, run: Run | None) -> tuple[Callable, dict]:
    """What --features asks for; auto: the classifier if the checkpoint's pictures are small."""
    # Inception would see letters of 16 pixels enlarged to 299, which is nothing it was trained on.
    small = run and run.saved["image_size"] < 64
    if args.features == "inception" or (args.features == "auto" and not small):
        return inception(args.inception, pick_device(args.device))
    if not run:
        raise UserError("--features classifier needs --ckpt, whose training pictures it learns")
    return classifier(Path(args.ckpt), run.saved, run.training)


@dataclass
class Comparison:
    """The rows of a table: sets of pictures against the same real ones; the first is the floor."""

    network: Callable
    facts: dict  # what the report says of the network
    reference: str  # what the real pictures are
    real: torch.Tensor  # (n, channels, size, size)
    y: torch.Tensor  # (n,) their classes
    measured: Measured  # their features
    other: Measured  # those of as many training pictures
    rows: list[dict]
    blocks: list[tuple[str, torch.Tensor]]  # ten pictures of each row

    def add(self, row: dict, images: torch.Tensor) -> None:
        """Measures pictures of the classes y and adds their row."""
        fake = measure(images, self.network, row["what"], self.measured)
        row |= compare(self.measured, fake)
        # The second FID of each row, by which a guidance scale may be chosen.
        row["fid_training"] = frechet_distance(*self.other.fid, *fake.fid)
        if self.facts["features"] == "classifier":
            row["recognised"] = recognised(fake, self.y)
        self.rows.append(row)
        self.blocks.append((f"{row['what']}\nw = {row['guidance']:g}", images[:10].clone()))


def open_comparison(args: argparse.Namespace, run: Run) -> Comparison:
    """Measures the real pictures, and puts the floor into the first row.

    CHOICE: where no picture was held out (--held-out 0), training pictures are the reference, and
    other ones the floor; the report says which it was.
    """
    # The real pictures, which are also the priors of `reconstruct`.
    network, facts = load_network(args, run)
    reference = "held-out pictures"
    pictures = run.held_out
    if len(pictures) < 4:
        reference = "training pictures"
        pictures = run.training
        args.num = min(args.num, len(run.training) // 2)  # the other half is the floor
    real, y = first(pictures, args.num)
    measured = measure(real, network, reference)

    # As many training pictures: the floor, and what a guidance scale may be chosen by. They are
    # taken from the middle on, because the reference may be the first half (--held-out 0).
    middle = len(run.training) // 2
    numbers = range(middle, min(middle + len(y), len(run.training)))
    half = [run.training[i, False] for i in numbers]
    images = torch.stack([image for image, _ in half])
    other = measure(images, network, "training pictures", measured)
    floor = {"what": "training pictures"} | compare(measured, other)
    if facts["features"] == "classifier":
        floor["recognised"] = recognised(other, torch.tensor([label for _, label in half]))

    blocks = [("real", real[:10])]
    return Comparison(network, facts, reference, real, y, measured, other, [floor], blocks)


def recognised(fake: Measured, y: torch.Tensor) -> float:
    """The share of pictures that the classifier takes for their class."""
    return (fake.logits.argmax(1) == y).double().mean().item()


def follow(args, run: Run, y: torch.Tensor, cfg: list[float], prior=None) -> Iterator[tuple]:
    """Samples with these guidance scales -> for each stage, its row and its pictures.

    evaluations: of v; a guided one runs the network twice. gflops: Table 4's compute per picture,
    10^9 multiply-accumulates of the linear layers, including the stages before.
    """
    macs = count_macs(run.model.config)
    nfe = []
    latents = generate(
        run.model, y.to(run.model.cos.device), stages=len(cfg), cfg=cfg, guide_on=args.guide_on,
        cfg_channels=args.cfg_channels, cfg_interval=args.cfg_interval, solver=args.solver,
        steps=args.steps, seed=args.seed, prior=prior, batch_size=args.batch_size, progress=True,
        nfe=nfe,
    )  # fmt: skip

    # A later stage needs all stages before it, so their compute adds up, as in Table 4.
    gflops = 0
    for i, z0 in enumerate(latents):
        evaluations, guided = nfe[i].double().mean(0).tolist()
        parts = stage_parts(evaluations, guided, has_prior=i > 0 or prior is not None)
        gflops += sum(times * macs[part] for part, times in parts.items()) / 1e9
        row = {"what": f"stage {i + 1}", "guidance": cfg[i]}
        row |= {"evaluations": evaluations, "gflops": gflops}
        yield row, run.codec.decode(z0).cpu()


def stages(args: argparse.Namespace) -> None:
    """Fig. 4, right: FID of each stage over the guidance scale; stage 1 under class guidance too.

    Samples have the classes of the held-out pictures that they are compared with.
    """
    run = load_run(args)
    if run.model.config.num_classes == 1 and args.cfg_stage1:
        raise UserError(f"{args.ckpt} knows one class only, no class guidance; --cfg-stage1 none")
    table = open_comparison(args, run)

    # A plan is the guidance scale of each stage: 1, w, w, ... Section 3.3 leaves stage 1 unguided.
    later = (args.stages or (3 if run.model.config.N else 1)) - 1
    plans = [[1.0] + [w] * later for w in args.cfg]
    if not later:
        plans = [[1.0]]
    for i, plan in enumerate(plans):
        for row, images in follow(args, run, table.y, plan):
            if i == 0 or row["what"] != "stage 1":  # which is the same in each plan
                table.add(row, images)

    # The baseline that stage 2 has to beat: the same model, guided by the class alone.
    for w in args.cfg_stage1:
        for row, images in follow(args, run, table.y, [w]):
            table.add(row, images)
    finish(args, run, table)


def reconstruct(args: argparse.Namespace) -> None:
    """Fig. 4, left, and Tables 2-3: held-out pictures are the priors of their reconstructions."""
    run = load_run(args)
    table = open_comparison(args, run)

    # CHOICE: the prior is the mean of the VAE's posterior, not a sample.
    parts = [run.codec.encode(part.to(run.model.cos.device)) for part in table.real.split(64)]
    prior = torch.cat(parts)

    # One stage, which has its prior already. It starts from noise: beyond the class, all that PSNR
    # and SSIM recognise of the picture has come through LEM.
    for w in args.cfg:
        for row, images in follow(args, run, table.y, [w], prior):
            row["what"] = "reconstruction"
            row["psnr"] = psnr(table.real, images).mean().item()
            if min(images.shape[2:]) > 10:  # the window of SSIM has 11 x 11 pixels
                row["ssim"] = ssim(table.real, images).mean().item()
            table.add(row, images)
    finish(args, run, table)


def samples(args: argparse.Namespace) -> None:
    """Table 5: --samples against --ref, each a folder of pictures or guided-diffusion's .npz."""
    run = load_run(args) if args.ckpt else None
    network, facts = load_network(args, run)

    # The reference, with the moments of the whole data set if the file has them.
    ref = Path(args.ref)
    fake_path = Path(args.samples)
    real = measure(read_pictures(ref), network, ref.name)
    whole_set = False
    if ref.is_file() and facts["features"] == "inception":
        keys = ["mu", "sigma", "mu_s", "sigma_s"]
        with np.load(ref) as file:
            whole_set = set(keys) <= set(file.files)
        if whole_set:  # arr_0, a part of the data set, serves precision and recall
            moments = read_arrays(ref, keys)
            if any(array.dtype.kind not in "fiu" for array in moments):
                raise UserError(f"{ref}: {', '.join(keys)} must be arrays of real numbers")
            mu, sigma, mu_s, sigma_s = [array.astype(np.float64) for array in moments]
            real = real._replace(fid=(mu, sigma), sfid=(mu_s, sigma_s))

    # The samples, and what their maker says of them.
    fake = measure(read_pictures(fake_path), network, fake_path.name, real)
    row = {"what": fake_path.resolve().name} | compare(real, fake)
    facts |= {"count": len(fake.pool), "reference": str(ref), "reference_count": len(real.pool)}
    facts |= {"whole_set": whole_set or args.ref_is_training_set}
    facts |= {"samples_about": about_samples(fake_path)}
    report(args, [row], facts)


@torch.no_grad()
def probe(args: argparse.Namespace) -> None:
    """Table 2, right: linear probes of LEM's latent tokens, top-1 on held-out pictures.

    CHOICE: of their mean and of all of them; the paper does not say how it pools them.
    """
    run = load_run(args)
    if not run.model.config.N:
        raise UserError(f"{args.ckpt} is a plain FiTv2: it has no LEM to probe")

    def tokens(data):
        images, y = first(data, args.num)
        parts = []
        for part in images.split(64):
            z0 = run.codec.encode(part.to(run.model.cos.device))
            parts.append(run.model.lem.encode(z0))  # (b, N, d_e)
        return torch.cat(parts), y

    # Fitted to training pictures, judged by held-out ones. The mean is blind to which of the N
    # tokens holds what.
    l_hat, y = tokens(run.training)
    l_hat_test, y_test = tokens(run.held_out)
    if len(y.unique()) < 2:
        raise UserError("all training pictures are of one class: a probe needs two; see --num")
    mean = linear_probe(l_hat.mean(1), y, l_hat_test.mean(1), y_test)
    everything = linear_probe(l_hat.flatten(1), y, l_hat_test.flatten(1), y_test)
    rows = [
        {"what": "mean of N tokens", "top1": mean},
        {"what": "all N tokens", "top1": everything},
    ]
    report(args, rows, {"count": len(y_test), "checkpoint": run.saved})


def cost(args: argparse.Namespace) -> None:
    """Fig. 2, left: FID over training images, from the reports of `stages` on several milestones.

    Each point has the guidance scale whose FID against training pictures is lowest, and shows its
    FID against the reference. tflops: of training until then, 10^12 operations, forward and
    backward, attention included. gflops: of sampling, see follow().
    """
    methods = {}  # name of a run and a method -> its rows, one for each report
    reports = [read_report(path) for path in args.reports]
    floor = reports[0]["rows"][0]["fid"]
    for path, found in zip(args.reports, reports, strict=True):
        # FIDs of different pictures, or of another classifier, do not belong into one figure.
        saved = found["checkpoint"]
        if saved["fingerprint"] != reports[0]["checkpoint"]["fingerprint"]:
            raise UserError(f"{path} and {args.reports[0]} are about different pictures")
        images = saved["step"] * saved["batch_size"]
        macs = training_macs(Config(**saved["config"]), saved["p_s"])
        tflops = 6 * (macs["ours"] + macs["attention"]) * images / 1e12

        # Stage 1 is two methods: without guidance, as in Fig. 3a, and guided by the class alone.
        scans = {}
        for row in found["rows"][1:]:  # after the floor
            guided = row["what"] == "stage 1" and row["guidance"] > 1
            scans.setdefault("class guidance" if guided else row["what"], []).append(row)
        for what, scan in scans.items():
            best = min(scan, key=lambda row: row["fid_training"])
            name = f"{Path(found['ckpt']).parent.name} {what}"
            row = {"what": name, "images": images, "tflops": tflops}
            row |= {key: best[key] for key in ("guidance", "gflops", "fid")}
            methods.setdefault(name, []).append(row)

    # A curve for each method, from few images to many.
    curves = {}
    points = []
    for name, rows in methods.items():
        rows.sort(key=lambda row: row["images"])
        curves[name] = [(row["images"], row["fid"]) for row in rows]
        points += rows
    labels = {"title": "FID at the best w", "xlabel": "training images", "xscale": "log"}
    draw_curves(beside(args.out, ".png"), args.overwrite, curves, floor, labels)
    report(args, points, {"count": len(args.reports)})


def read_report(path: str) -> dict:
    """A report of `stages`. Raises UserError if it is none."""
    try:
        found = json.loads(Path(path).read_text())
        if found["command"] == "stages":
            return found
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path} is no report of `evaluate.py stages`")


# -------------------------------------------------------------------------------------- the reports

TITLES = {"guidance": "w", "gflops": "GFLOPs", "fid": "FID", "fid_training": "(training)"}
TITLES |= {"sfid": "sFID", "is": "IS", "psnr": "PSNR, dB", "ssim": "SSIM", "tflops": "TFLOPs"}


def finish(args: argparse.Namespace, run: Run, table: Comparison) -> None:
    """What `stages` and `reconstruct` leave: the curves, some pictures, the report."""
    write_figures(args, table, run.saved["classes"])
    facts = table.facts | {"count": len(table.y), "checkpoint": run.saved}
    facts |= {"reference": table.reference, "reference_count": len(table.y)}
    report(args, table.rows, facts)


def report(args: argparse.Namespace, rows: list[dict], facts: dict) -> None:
    """Prints the rows as a table and writes them to --out as JSON, with every flag and fact."""
    # What was compared with what.
    if "weights" in facts:
        facts["weights_sha256"] = hashlib.sha256(Path(facts["weights"]).read_bytes()).hexdigest()
    if "features" in facts:
        labels = facts.get("samples_about", {}).get("labels")
        print(f"{facts['count']} pictures against {facts['reference_count']} of ", end="")
        print(f"{facts['reference']}; features: {facts['features']}", end="")
        print(f"; {labels} labels" if labels else "")

    # What may be called FID-50K: 50,000 samples, Inception's features, moments of a whole data set.
    titles = dict(TITLES)
    if facts["count"] == 50_000 and facts.get("features") == "inception" and facts.get("whole_set"):
        titles["fid"] = "FID-50K"
    if args.command == "reconstruct":
        titles["fid"] = "rFID"

    # The table: the columns are those of the last row.
    keys = [key for key in rows[-1] if key not in ("what", "is_std")]
    print(" " * 20 + "".join(f"{titles.get(key, key):>12}" for key in keys))
    for row in rows:
        cells = [f"{row[key]:12.4g}" if key in row else " " * 12 for key in keys]
        print(f"{row['what'][:20]:20}" + "".join(cells))

    # The report: enough to say, a year later, how each number came about.
    facts["versions"] = {"torch": torch.__version__, "numpy": np.__version__}
    with replacing(args.out, args.overwrite) as temporary:
        found = vars(args) | facts | {"rows": rows}
        found.pop("function", None)
        temporary.write_text(json.dumps(found, indent=1, default=str))
    print(f"wrote {args.out}")


def write_figures(args: argparse.Namespace, table: Comparison, classes: list[str]) -> None:
    """A half of Fig. 4 beside --out: FID over w as curves; and some of the pictures."""
    # A curve for each stage; that of stage 1 shows what guidance by the class alone achieves.
    curves = {}
    floor, *rows = table.rows
    for row in sorted(rows, key=lambda row: row["guidance"]):
        curves.setdefault(row["what"], []).append((row["guidance"], row["fid"]))
    labels = {"title": f"FID against {table.reference}", "xlabel": "guidance scale w"}
    draw_curves(beside(args.out, ".png"), args.overwrite, curves, floor["fid"], labels)

    # Both files are named after the report, so that no two reports share a figure.
    with replacing(beside(args.out, ".pictures.png"), args.overwrite) as temporary:
        draw_grid(table.blocks, [classes[k] for k in table.y[:10]]).save(temporary)


def draw_curves(out: Path, overwrite: bool, curves: dict, floor: float, labels: dict) -> None:
    """Draws curves, name -> points (x, FID), over a logarithmic axis; the floor is dotted."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), "o-", label=name)

    # The floor: other real pictures are not at distance 0 either, because the sets are finite.
    axes.axhline(floor, color="black", linestyle=":", label="real pictures")
    axes.set(yscale="log", **labels)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend()
    with replacing(out, overwrite) as temporary:
        figure.savefig(temporary, dpi=120)


def beside(out: Path, suffix: str) -> Path:
    """x.json -> x and suffix."""
    return out.with_name(out.name.removesuffix(".json") + suffix)


# ------------------------------------------------------------------------------------------ command


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags: a subparser for each command, which is the function of that name."""
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    natural = at_least(int, 1)

    # The first line of a docstring is the help of its command.
    def name_command(function: Callable) -> Parser:
        summary = function.__doc__.splitlines()[0]
        command = commands.add_parser(function.__name__, help=summary, description=summary)
        command.set_defaults(function=function)
        return command

    # What the commands have in common that work on a run.
    def add_command(function: Callable, ckpt: str | None) -> Parser:
        command = name_command(function)
        command.add_argument("--ckpt", type=nonempty, default=ckpt, help="checkpoint of train.py")
        command.add_argument("--data", type=nonempty, help="where the training pictures are now")
        command.add_argument(
            "--out", type=nonempty, help="JSON report; None: by --ckpt or --samples"
        )
        return command

    def add_features(command: Parser) -> None:
        kinds = ["auto", "inception", "classifier"]
        why = "auto: the classifier for a --ckpt below 64 pixels"
        command.add_argument("--features", choices=kinds, default="auto", help=why)
        command.add_argument(
            "--inception", type=nonempty, help="file of its weights; None: downloaded"
        )

    # The two halves of Fig. 4 sample from a run, so they share nearly all flags.
    for function in (stages, reconstruct):
        command = add_command(function, "out/letters/ckpt.pt")
        add = command.add_argument
        add_features(command)
        add("--num", type=at_least(int, 4), default=1000, help="pictures, at most those held out")
        add("--cfg", type=scales, default="1,1.5,2,3.5,5.5", help="guidance scales with a prior")
        add("--solver", choices=["euler", "dopri5"], default="euler", help="Euler or RK45")
        add("--steps", type=natural, default=20, help="Euler steps in each stage")
        add("--batch-size", type=natural, default=64, help="pictures sampled at a time")
        add_sampling_flags(command)
        if function == stages:
            add("--stages", type=natural, help="None: 3, without LEM 1")
            add("--cfg-stage1", type=scales_or_none, default="1.5,2,3,4", help="or none")

    # Sets of pictures need no run, unless its classifier is to judge them.
    command = add_command(samples, None)
    add_features(command)
    add = command.add_argument
    add("--ref", type=nonempty, required=True, help="folder of pictures or .npz")
    add("--samples", type=nonempty, required=True, help="folder of pictures or .npz")
    add("--ref-is-training-set", action="store_true", help="--ref holds the whole training set")

    # The probe draws no samples: it needs neither guidance nor a solver.
    command = add_command(probe, "out/letters/ckpt.pt")
    command.add_argument(
        "--num", type=at_least(int, 4), default=10_000, help="pictures of each set"
    )

    # The other commands have these from add_sampling_flags.
    for command in (commands.choices["samples"], commands.choices["probe"]):
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
        command.add_argument("--vae", type=nonempty, help="where the checkpoint's VAE is now")
        command.add_argument("--overwrite", action="store_true", help="replace --out")

    # Reports are all that this command reads.
    command = name_command(cost)
    command.add_argument("reports", nargs="+", help="reports of `stages`, of any runs and steps")
    command.add_argument("--out", type=nonempty, default="cost.json", help="JSON report")
    command.add_argument("--overwrite", action="store_true", help="replace --out")
    return parser.parse_args(argv)


def scales_or_none(text: str) -> list[float]:
    """An argparse type: guidance scales, or none."""
    return [] if text == "none" else scales(text)


def main() -> None:
    """Settles where the report goes, before any work is done, and runs the command."""
    # By default it lies beside the checkpoint, or beside the set of samples.
    args = parse(sys.argv[1:])
    if args.out:
        args.out = Path(args.out)
    elif args.command == "samples":
        args.out = Path(str(Path(args.samples).resolve()).removesuffix(".npz"))
    else:
        args.out = Path(args.ckpt).parent / f"{args.command}.json"
    if args.out.name in ("", ".."):
        raise UserError(f"{args.out} is a folder; --out NAME.json says where the report goes")
    # Not with_suffix, which would turn "w-2.5" into "w-2.json".
    if args.out.suffix != ".json":
        args.out = args.out.with_name(args.out.name + ".json")

    # A file in the way is better reported now than after an hour of sampling.
    may_write(args.out, (".json",), args.overwrite)
    if args.command in ("stages", "reconstruct", "cost"):
        may_write(beside(args.out, ".png"), (".png",), args.overwrite)
    if args.command in ("stages", "reconstruct"):
        may_write(beside(args.out, ".pictures.png"), (".png",), args.overwrite)
    args.function(args)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"evaluate.py: warning: {message}\n"
    run_command(main)
