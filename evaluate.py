"""evaluate.py -- FID, sFID, IS, precision, recall, rFID, PSNR, SSIM and linear probe. Section 4.1.

The formulas behind Fig. 4 and Tables 2 to 5 are written out; the Inception network alone comes from
a library (torch-fidelity), with the weights of all published FIDs. It knows ImageNet: for pictures
below 64 pixels a small CNN takes its place, trained on the training pictures, on its own scale.

Samples are compared with held-out pictures or, where a guidance is to be chosen, with training
pictures (--against). Fig. 4's first row is the floor: other training pictures, as many.
Pictures are uint8 (n, channels, height, width); D features, K classes.

    python evaluate.py stages                   # Fig. 4, right, of the run in out/letters
    python evaluate.py stages --stages 2 --cfg 1,2,3.5 --against training --out scan.json
    python evaluate.py reconstruct              # Fig. 4, left: held-out pictures as priors
    python evaluate.py probe                    # Table 2, right: the class in LEM's tokens
    python evaluate.py samples --ref VIRTUAL_imagenet256_labeled.npz --samples samples.npz
    python evaluate.py --benchmark              # our Fréchet distance against scipy's sqrtm
"""

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Subset, default_collate
from tqdm import tqdm

import sample
import train
from model import UserError, count_macs, stage_parts
from sample import at_least, pick_device, replacing

# ------------------------------------------------------------------------------------- the metrics


def add_rows(moments: tuple, x: torch.Tensor) -> tuple:
    """Updates (n, mu (D,), scatter (D, D)) by a batch x (b, D), in float64 (Chan et al., 1979).

    The scatter matrix is the sum of (x - mu)(x - mu)ᵀ, n - 1 times the covariance (ddof = 1).
    Start from (0, 0, 0). Raises UserError if a feature is NaN or infinite.
    """
    (n, mu, scatter), b, x = moments, len(x), x.cpu().double()
    if not x.isfinite().all():
        raise UserError(f"features of pictures {n} to {n + b - 1} are NaN or infinite")
    shift, centred = x.mean(0) - mu, x - x.mean(0)
    scatter = scatter + centred.T @ centred + n * b / (n + b) * shift.outer(shift)
    return n + b, mu + b / (n + b) * shift, scatter


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """FID (Heusel et al., 2017): |mu1 - mu2|² + tr(S1 + S2 - 2 (S1 S2)^1/2), float64.

    With S1 = A Aᵀ, S1 S2 has the eigenvalues of Aᵀ S2 A, which is symmetric. A is Cholesky's
    factor, or V Λ^1/2 where S1 = V Λ Vᵀ is singular. mu (D,), sigma (D, D), tensors or arrays.
    Raises UserError if shapes do not match or a number is not finite.
    """
    parts = [torch.as_tensor(x, dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2)]
    shapes, D = [tuple(x.shape) for x in parts], len(parts[0])
    if shapes != [(D,), (D, D)] * 2 or not all(x.isfinite().all() for x in parts):
        raise UserError(f"moments of shapes {shapes}; (D,), (D, D), twice, all finite, are needed")
    mu1, sigma1, mu2, sigma2 = parts
    A, failed = torch.linalg.cholesky_ex(sigma1)
    pivots, rounding = A.diagonal().square(), D * torch.finfo(A.dtype).eps
    if failed or pivots.min() < rounding * pivots.max():
        values, V = torch.linalg.eigh(sigma1)
        kept = values > rounding * values.max()
        A = V[:, kept] * values[kept].sqrt()
    spectrum = torch.linalg.eigvalsh(A.T @ sigma2 @ A).clamp(min=0)  # rounding may go below 0
    traces = sigma1.trace() + sigma2.trace() - 2 * spectrum.sqrt().sum()
    return ((mu1 - mu2).square().sum() + traces).item()


def inception_score(probs, splits: int | list[int] = 10) -> tuple[float, float]:
    """IS (Salimans et al., 2016): exp(mean over x of KL(p(y|x) | p(y))), from 1 to K.

    probs (n, K): each picture's p(y|x). splits: how many contiguous parts, each with its own p(y),
    or where to cut -> mean, standard deviation of the parts. UserError if one is empty or NaN.
    """
    scores = []
    for p in torch.as_tensor(probs).double().tensor_split(splits):
        if not len(p) or not p.isfinite().all():
            raise UserError(f"IS of {len(probs)} pictures, splits {splits}: a part is empty or NaN")
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # 0 log 0 = 0
        scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019) of features (m, D) and (n, D).

    Precision: the share of fakes inside a ball around any real picture, which reaches that one's
    k-th nearest real neighbour (border included); recall: the reverse. In blocks of 128 MB, fp32.
    Raises UserError for sets smaller than k + 1 or widths that differ.
    """
    real, fake = (torch.as_tensor(x, dtype=torch.float32) for x in (real, fake))
    if min(len(real), len(fake)) < k + 1 or real.shape[1] != fake.shape[1]:
        got = f"features {tuple(real.shape)} against {tuple(fake.shape)}"
        raise UserError(f"{got}; at least {k + 1} pictures each, of one width, are needed")

    def covered(points, centres):
        rows = max(1, 2**25 // len(centres))
        distances = (torch.cdist(block, centres) for block in centres.split(rows))
        radii = torch.cat([block.kthvalue(k + 1).values for block in distances])  # + 1: itself
        distances = (torch.cdist(block, centres) for block in points.split(rows))
        return torch.cat([(block <= radii).any(1) for block in distances]).double().mean().item()

    return covered(fake, real), covered(real, fake)


def comparable(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    """Both in float64. Raises UserError unless they are uint8 pictures of one shape."""
    if a.dtype != torch.uint8 or b.dtype != torch.uint8 or a.shape != b.shape:
        got = f"{a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
        raise UserError(f"{got}; uint8 (n, channels, height, width) of one shape is needed")
    return [x.cpu().double() for x in (a, b)]


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """10 log10(255² / mean (a - b)²), dB: uint8 pictures -> (n,); infinite for equal ones."""
    a, b = comparable(a, b)
    return 10 * (255**2 / (a - b).square().flatten(1).mean(1)).log10()


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004), uint8 pictures -> (n,), at most 1: the mean of

    (2 mu_a mu_b + c1)(2 cov + c2) / ((mu_a² + mu_b² + c1)(var_a + var_b + c2)), c1 = (0.01 · 255)²,
    c2 = (0.03 · 255)², over the channels and the places of an 11 x 11 Gaussian window, sigma 1.5,
    that lie inside; it weights the moments. The pictures must have 11 x 11 pixels or more.
    """
    a, b = comparable(a, b)
    g = (-torch.arange(-5, 6).double().square() / (2 * 1.5**2)).softmax(0)

    def mean(x):
        x = F.conv2d(x.flatten(0, 1)[:, None], g.view(1, 1, -1, 1))
        return F.conv2d(x, g.view(1, 1, 1, -1)).view(len(a), -1)

    mu_a, mu_b, c1, c2 = mean(a), mean(b), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
    shares = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / (mu_a**2 + mu_b**2 + c1)
    return (shares / (var_a + var_b + c2)).mean(1)


def linear_probe(x, y, x_test, y_test, decay: float = 1e-4) -> float:
    """Top-1 on (x_test, y_test), in [0, 1], of BatchNorm without affine + Linear fit to (x, y).

    x (n, D) features, y (n,) classes. With x as one batch, BatchNorm scales each feature to mean 0
    and variance 1. CHOICE: the loss is cross-entropy + decay/2 |W|²: so it has a minimum, which
    L-BFGS finds, also where the classes separate.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x.double().cpu())
    x, x_test = (scaler.transform(part.double().cpu()) for part in (x, x_test))
    return LogisticRegression(C=1 / (decay * len(x)), max_iter=2000).fit(x, y).score(x_test, y_test)


# ------------------------------------------------------------------------------------ the features

# A network of features maps uint8 (b, channels, height, width) to pooled features (b, D), logits
# (b, K) and spatial features (b, D') or None. With it goes what the report says about it.


def inception(path: str | None, device: torch.device) -> tuple[Callable, dict]:
    """The Inception-v3 of published FIDs: TensorFlow's weights and resize to 299, 1008 logits.

    pool 2048; logits without bias; spatial, for sFID (Nash et al., 2021): the first 7 channels of
    Mixed_6d, 17 x 17, channels last. Raises UserError without the library or the weights.
    """
    kept = f"{torch.hub.get_dir()}/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    file, spatial = Path(path or kept), []
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
    network.Mixed_6d.register_forward_hook(lambda module, inputs, x: spatial.append(x[:, :7]))

    def features(images):
        pool, logits = network(images.to(device).expand(-1, 3, -1, -1))
        return pool, logits, spatial.pop().permute(0, 2, 3, 1).flatten(1)

    return features, {"features": "inception", "weights": str(file)}


def fit(network: nn.Sequential, images: torch.Tensor, y: torch.Tensor, steps: int = 500) -> None:
    """Trains it anew, within a minute. One CPU thread, one seed: the same weights each time.

    CHOICE: on pictures with up to 24 of 255 grey levels of noise, or its features tell a faint
    noise from clean pictures better than scrambled letters from letters.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for layer in network:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in tqdm(range(steps), desc="training the classifier", leave=False):
        batch = torch.randint(len(images), (128,))
        noise = 24 * torch.rand(128, 1, 1, 1) * torch.randn(128, *images.shape[1:])
        optimizer.zero_grad()
        F.cross_entropy(network((images[batch] + noise) / 127.5 - 1), y[batch]).backward()
        optimizer.step()
    torch.set_num_threads(threads)


def classifier(ckpt: Path, saved: dict, training) -> tuple[Callable, dict]:
    """For small pictures: a CNN fit to the checkpoint's training pictures, and kept beside it.

    pool 64; logits of the checkpoint's classes. The CPU computes it, everywhere alike.
    """
    size, channels = saved["image_size"], saved["channels"]
    name = f"{Path(saved['data']).name}-{size}-{channels}-{saved['held_out']:g}"
    file, layers = ckpt.with_name(f"classifier-{name}.pt"), [nn.AdaptiveAvgPool2d(min(size, 32))]
    for before, after in ((channels, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2, ceil_mode=True)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(saved["classes"]))]
    network = nn.Sequential(*layers)
    try:
        network.load_state_dict(torch.load(file, weights_only=True))
    except Exception:  # not there, damaged, or of other classes
        fit(network, *first(training, 10_000))
        with replacing(file) as temporary, temporary.open("wb") as stream:
            torch.save(network.state_dict(), stream)
    network.eval()

    def features(images):
        pool = network[:-1](images.float() / 127.5 - 1)
        return pool, network[-1](pool), None

    return features, {"features": "classifier", "weights": str(file)}


# -------------------------------------------------------------------------------- sets of pictures


def first(data, n: int) -> list[torch.Tensor]:
    """n pictures of a data set (its order is random): uint8 (n, channels, size, size), y (n,).

    Raises UserError if it has fewer than 4.
    """
    if len(data) < 4:
        more = "--against training compares with others, train.py --held-out leaves more"
        raise UserError(f"{len(data)} pictures to compare with, at least 4 are needed; {more}")
    return default_collate([data[i] for i in range(min(n, len(data)))])


def read_pictures(path: Path) -> Iterator[torch.Tensor]:
    """A folder's pictures, or arr_0 of guided-diffusion's .npz: uint8 (channels, height, width).

    Raises UserError that names what is missing, unreadable or of another kind.
    """
    if path.is_dir():
        suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
        for file in sorted(f for f in path.rglob("[!.]*") if f.suffix.lower() in suffixes):
            image = sample.open_picture(file)
            pixels = np.array(image if image.mode == "L" else image.convert("RGB"))
            yield torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)
        return
    try:
        with np.load(path) as file:
            pixels = file["arr_0"]
        if pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
            raise ValueError(f"arr_0 has the shape {pixels.shape}")
    except Exception as error:  # NumPy has many kinds for files that are no .npz
        need = "a folder of pictures or an .npz with arr_0, uint8 (n, height, width, 3), is needed"
        raise UserError(f"{path}: {error}; {need}") from None
    yield from torch.from_numpy(pixels).permute(0, 3, 1, 2)


class Measured(NamedTuple):
    """What is left of n pictures after their passage through a network."""

    shape: torch.Size  # channels, height, width
    sha256: str  # of the pixels, channels last
    fid: tuple  # mean and covariance of the pooled features
    sfid: tuple  # of the spatial features; () without them
    pool: torch.Tensor  # (n, D), fp32
    logits: torch.Tensor  # (n, K)


@torch.no_grad()
def measure(pictures: Iterable, network: Callable, what: str, like=None) -> Measured:
    """Passes pictures through a network. Raises UserError unless all are uint8 and of one shape."""
    shape, kept, digest = like and like.shape, [], hashlib.sha256()
    moments = [(0, 0, 0), (0, 0, 0)]
    pictures = iter(tqdm(pictures, desc=f"features of {what}", leave=False))
    while batch := list(islice(pictures, 64)):
        shape = shape or batch[0].shape
        odd = [x for x in batch if x.dtype != torch.uint8 or x.shape != shape]
        if odd:
            got = f"a picture is {odd[0].dtype} {tuple(odd[0].shape)} (channels, height, width)"
            raise UserError(f"{what}: {got}; torch.uint8 {tuple(shape)} is needed")
        images = torch.stack(batch)
        digest.update(images.permute(0, 2, 3, 1).contiguous().numpy())
        pool, logits, spatial = network(images)
        kept.append((pool.cpu(), logits.cpu()))
        for i, x in enumerate((pool, spatial)):
            moments[i] = moments[i] if x is None else add_rows(moments[i], x)
    if moments[0][0] < 2:
        raise UserError(f"{what}: {moments[0][0]} pictures; at least 2 are needed")
    moments = [(mu, scatter / (n - 1)) if n else () for n, mu, scatter in moments]
    return Measured(shape, digest.hexdigest(), *moments, *map(torch.cat, zip(*kept, strict=True)))


def compare(real: Measured, fake: Measured) -> dict[str, float]:
    """The columns of Tables 4 and 5; IS as OpenAI's evaluator, in splits of 5,000 pictures."""
    (n, D), guess, logits = fake.pool.shape, fake.logits.argmax(1), fake.logits
    if min(n, len(real.pool)) < D:
        counts = f"{len(real.pool)} and {n} pictures for {D} features"
        warnings.warn(f"{counts}: too few, the covariances are singular, FID is off", stacklevel=2)
    alike, chance = (guess[1:] == guess[:-1]).sum(), guess.bincount().square().sum() / n
    if alike > chance + 6 * chance.sqrt():  # neighbours are of one class too often for chance
        warnings.warn("samples are in order of class; shuffled (seed 0) for IS", stacklevel=2)
        logits = logits[np.random.default_rng(0).permutation(n)]
    score, deviation = inception_score(logits.double().softmax(1), [*range(5000, n, 5000)])
    precision, recall = precision_recall(real.pool, fake.pool)
    columns = {"fid": frechet_distance(*real.fid, *fake.fid)}
    if real.sfid:
        columns["sfid"] = frechet_distance(*real.sfid, *fake.sfid)
    return columns | {"is": score, "is_std": deviation, "precision": precision, "recall": recall}


# ------------------------------------------------------------------------------------ the commands


def load_run(args: argparse.Namespace) -> tuple:
    """--ckpt -> what it says of its run, model, codec, training and held-out pictures."""
    saved, device = sample.load_checkpoint(args.ckpt), pick_device(args.device)
    model, codec = sample.load_model(saved, device), sample.load_codec(saved["codec"], device)
    saved = {k: v for k, v in saved.items() if k not in train.PARTS}  # no weights
    data = (saved[k] for k in ("data", "image_size", "channels", "held_out"))
    training, held_out = train.load_data(*data)
    return saved, model, codec, training, held_out


def load_network(args: argparse.Namespace, saved=None, training=None) -> tuple[Callable, dict]:
    """What --features asks for; auto: the classifier if the checkpoint's pictures are small."""
    small = saved and saved["image_size"] < 64
    if args.features == "inception" or (args.features == "auto" and not small):
        return inception(args.inception, pick_device(args.device))
    if not saved:
        raise UserError("--features classifier needs --ckpt, whose training pictures it learns")
    return classifier(Path(args.ckpt), saved, training)


def follow(plans, args, model, codec, y, prior) -> Iterator[tuple[dict, torch.Tensor]]:
    """Runs each plan (the guidance of each stage) -> the row and the pictures of each stage, once.

    evaluations: of v; a guided one runs the network twice. gflops: Table 4's compute per picture,
    10^9 multiply-accumulates of the linear layers, with those of the stages before.
    """
    macs, seen = count_macs(model.config), set()
    for plan in dict.fromkeys(plans):
        nfe, gflops = [], 0
        latents = sample.generate(
            model, y.to(model.cos.device), len(plan), plan, args.guide_on, args.solver, args.steps,
            args.seed, 0, prior, args.batch_size, True, nfe,
        )  # fmt: skip
        for i, (w, z0) in enumerate(zip(plan, latents, strict=True)):
            n, has_prior = nfe[i].double().mean().item(), i > 0 or prior is not None
            parts = stage_parts(n, has_prior, w > 1)
            gflops += sum(times * macs[part] for part, times in parts.items()) / 1e9
            row = {"what": f"stage {i + 1}", "guidance": w, "evaluations": n, "gflops": gflops}
            if plan[: i + 1] not in seen:
                yield row, codec.decode(z0).cpu()
            seen.add(plan[: i + 1])


def figure_4(args: argparse.Namespace) -> None:
    """Fig. 4: samples of the reference pictures' classes against these. stages, right: stages 1, 2,
    ..., and stage 1 under class guidance. reconstruct, left: their own latents serve as priors."""
    saved, model, codec, training, held_out = load_run(args)
    network, facts = load_network(args, saved, training)
    half = range((len(training) + 1) // 2, len(training))  # the floor is of the other half
    compared = Subset(training, half) if args.against == "training" else held_out
    (real, y), (floor, floor_y) = first(compared, args.num), first(training, args.num)
    floor, floor_y = floor[: len(y)], floor_y[: len(y)]
    reference, rows, blocks = measure(real, network, args.against), [], [("real", real[:10])]
    if args.command == "reconstruct":  # CHOICE: of the posteriors' means
        prior, plans = codec.encode(real.to(model.cos.device)), [(w,) for w in args.cfg]
    else:
        later = (args.stages or (3 if model.config.N else 1)) - 1
        prior, plans = None, [(1.0, *[w] * later) for w in args.cfg or [model.config.cfg]]
        plans += [(w,) for w in args.cfg_stage1]
    sampled = follow(plans, args, model, codec, y, prior)
    for row, images in chain([({"what": "training pictures"}, floor)], sampled):
        fake, expected = measure(images, network, row["what"], reference), y if rows else floor_y
        row |= compare(reference, fake)
        if facts["features"] == "classifier":
            row["recognised"] = (fake.logits.argmax(1) == expected).double().mean().item()
        if prior is not None and rows:
            pairs = [*zip(real.split(64), images.split(64), strict=True)]
            row["what"] = "reconstruction"
            row["psnr"] = torch.cat([psnr(*pair) for pair in pairs]).mean().item()
            large = min(real.shape[2:]) > 10
            row["ssim"] = torch.cat([ssim(*p) for p in pairs]).mean().item() if large else None
        if rows:
            blocks.append((f"{row['what']}\nw = {row['guidance']:g}", images[:10].clone()))
        rows.append(row)
    draw_figure(args.out.with_suffix(".png"), rows, f"{args.against} pictures")
    with replacing(args.out.with_suffix(".pictures.png")) as temporary:
        sample.draw_grid(blocks, [saved["classes"][k] for k in y[:10]]).save(temporary)
    facts |= {"count": len(y), "checkpoint": saved, "reference": f"{args.against} pictures"}
    report(args, rows, facts, reference)


def samples(args: argparse.Namespace) -> None:
    """Table 5: --samples against --ref, each a folder of pictures or guided-diffusion's .npz."""
    saved, _, _, training, _ = load_run(args) if args.ckpt else [None] * 5
    network, facts = load_network(args, saved, training)
    real = measure(read_pictures(args.ref), network, args.ref.name)
    if args.ref.is_file() and facts["features"] == "inception":
        with np.load(args.ref) as file:  # of the whole data set, of which arr_0 is a part
            if {"mu", "sigma", "mu_s", "sigma_s"} <= {*file.files}:
                fid, sfid = (file["mu"], file["sigma"]), (file["mu_s"], file["sigma_s"])
                real = real._replace(fid=fid, sfid=sfid)
    fake = measure(read_pictures(args.samples), network, args.samples.name, real)
    row = {"what": args.samples.name} | compare(real, fake)
    report(args, [row], facts | {"count": len(fake.pool), "reference": args.ref.name}, real)


@torch.no_grad()
def probe(args: argparse.Namespace) -> None:
    """Table 2, right: linear probes of LEM's latent tokens, top-1 on held-out pictures. CHOICE: of
    their mean and of all of them; the paper does not say how it pools them."""
    saved, model, codec, training, held_out = load_run(args)
    if not model.config.N:
        raise UserError(f"{args.ckpt} is a plain FiTv2: it has no LEM to probe")
    sets = []
    for images, y in (first(training, args.num), first(held_out, args.num)):
        z0 = codec.encode(images.to(model.cos.device))
        l_hat = torch.cat([model.lem.encode(part) for part in z0.split(64)])  # (n, N, d_e)
        sets.append(({"mean of N tokens": l_hat.mean(1), "all N tokens": l_hat.flatten(1)}, y))
    (x, y), (x_test, y_test) = sets
    rows = [{"what": k, "top1": linear_probe(x[k], y, x_test[k], y_test)} for k in x]
    report(args, rows, {"count": len(y_test), "checkpoint": saved})


def report(args: argparse.Namespace, rows: list[dict], facts: dict, reference=None) -> None:
    """Prints the rows as a table; writes them, and all that made them, to --out as JSON."""
    facts["versions"] = {"torch": torch.__version__, "numpy": np.__version__}
    if reference:
        weights = Path(facts["weights"]).read_bytes()
        facts["weights_sha256"] = hashlib.sha256(weights).hexdigest()
        facts |= {"reference_sha256": reference.sha256, "reference_count": len(reference.pool)}
        counts = f"{facts['count']} pictures against {len(reference.pool)} {facts['reference']}"
        print(f"{counts}; features: {facts['features']}")
    full = facts["count"] == 50_000 and facts.get("features") == "inception"
    fid = "rFID" if args.command == "reconstruct" else "FID-50K" if full else "FID"
    titles = {"fid": fid, "sfid": "sFID", "is": "IS", "psnr": "PSNR, dB", "ssim": "SSIM"}
    titles["gflops"] = "GFLOPs"
    keys = [key for key in rows[-1] if key not in ("what", "is_std")]
    print(" " * 24 + "".join(f"{titles.get(key, key):>12}" for key in keys))
    for row in rows:
        cells = (f"{row[key]:12.4g}" if row.get(key) is not None else " " * 12 for key in keys)
        print(f"{row['what']:24}" + "".join(cells))
    with replacing(args.out) as temporary:
        found = vars(args) | facts | {"rows": rows}
        temporary.write_text(json.dumps(found, indent=1, default=str))
    print(f"wrote {args.out}")


def draw_figure(path: Path, rows: list[dict], reference: str) -> None:
    """A half of Fig. 4: a bar for the FID of each row; a line for the first row's, the floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7, len(rows)), 4), layout="constrained")
    axes, (floor, *fids) = figure.subplots(), [row["fid"] for row in rows]
    names = [f"{row['what']}\nw = {row['guidance']:g}" for row in rows[1:]]
    axes.bar_label(axes.bar(names, fids), fmt="%.3g")
    axes.axhline(floor, color="black", linestyle=":")
    axes.set_title(f"FID against {reference}; dotted: {rows[0]['what']}, {floor:.3g}")
    axes.tick_params("x", labelsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def benchmark() -> None:
    """Times frechet_distance against the route by scipy.linalg.sqrtm: 2048 features, in turns."""
    from scipy.linalg import sqrtm

    rng, times = np.random.default_rng(0), []
    mu1, mu2 = rng.standard_normal((2, 2048))
    sigma1, sigma2 = (np.cov(x.T) for x in rng.standard_normal((2, 4096, 2048)))
    for _ in range(3):
        began = time.perf_counter()
        ours = frechet_distance(mu1, sigma1, mu2, sigma2)
        middle = time.perf_counter()
        root = sqrtm(sigma1 @ sigma2).real
        theirs = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
        times.append((middle - began, time.perf_counter() - middle))
        print(f"ours {ours:.9f}, {times[-1][0]:.2f} s; sqrtm {theirs:.9f}, {times[-1][1]:.2f} s")
    fast, slow = np.median(times, axis=0)
    print(f"medians: {slow / fast:.1f} times as fast; difference {abs(ours / theirs - 1):.0e}")


COMMANDS = {"stages": figure_4, "reconstruct": figure_4, "samples": samples, "probe": probe}
FIG_4, MODEL, ALL = "stages reconstruct", "stages reconstruct probe", " ".join(COMMANDS)
NATURAL, SCALES = at_least(int, 1), sample.scales
# fmt: off
FLAGS = [  # the commands that have the flag, the flag, its settings
    ("samples", "--ref", dict(type=Path, required=True, help="folder of pictures or .npz")),
    ("samples", "--samples", dict(type=Path, required=True, help="folder of pictures or .npz")),
    ("samples", "--ckpt", dict(help="the classifier learns this one's training pictures")),
    (MODEL, "--ckpt", dict(default="out/letters/ckpt.pt", help="checkpoint of train.py")),
    ("probe", "--num", dict(type=NATURAL, default=10_000, help="pictures to train on, to test")),
    (FIG_4, "--num", dict(type=NATURAL, default=1000, help="pictures, or all that are held out")),
    ("stages", "--stages", dict(type=NATURAL, help="None: 3, without LEM 1")),
    ("stages", "--cfg", dict(type=SCALES, help="w of stages 2, 3, scanned; None: the model's")),
    ("stages", "--cfg-stage1", dict(type=lambda text: [] if text == "none" else SCALES(text),
        default="1.5,2,3,4", help="w of stage 1 alone, or none")),
    (FIG_4, "--against", dict(choices=["held-out", "training"], default="held-out",
        help="the reference; training: to choose w by")),
    ("reconstruct", "--cfg", dict(type=SCALES, default="1,2,3.5,5.5,8", help="guidance scales w")),
    (FIG_4, "--guide-on", dict(choices=["both", "prior"], default="both", help="v_u lacks it")),
    (FIG_4, "--solver", dict(choices=["euler", "dopri5"], default="euler", help="Euler or RK45")),
    (FIG_4, "--steps", dict(type=NATURAL, default=20, help="Euler steps per stage")),
    (FIG_4, "--seed", dict(type=at_least(int, 0), default=0, help="same seed, same samples")),
    (FIG_4, "--batch-size", dict(type=NATURAL, default=64, help="pictures sampled at a time")),
    (FIG_4 + " samples", "--features", dict(choices=["auto", "inception", "classifier"],
        default="auto", help="auto: the classifier for a --ckpt below 64 pixels")),
    (FIG_4 + " samples", "--inception", dict(help="file of its weights; None: downloaded once")),
    (ALL, "--device", dict(default="auto", help="auto, cpu, cuda, cuda:1, mps")),
    (ALL, "--out", dict(type=Path, help="JSON, figures beside it; None: by --ckpt or --samples")),
    (ALL, "--overwrite", dict(action="store_true", help="replace --out")),
]
# fmt: on


def parse(argv: list[str]) -> argparse.Namespace:
    """The command and its flags; command is None for --benchmark."""
    command = argv[0] if argv and argv[0] in COMMANDS else None
    parser = sample.Parser(COMMANDS[command].__doc__ if command else __doc__.splitlines()[0])
    if not command:
        parser.add_argument("command", nargs="?", choices=COMMANDS, help="each has its --help")
        parser.add_argument("--benchmark", action="store_true", help="time the Fréchet distance")
        args = parser.parse_args(argv)
        if not args.benchmark:
            parser.error(f"a command is needed: {', '.join(COMMANDS)}")
        return args
    parser.prog += f" {command}"
    for commands, flag, settings in FLAGS:
        if command in commands.split():
            parser.add_argument(flag, **settings)
    return parser.parse_args(argv[1:], argparse.Namespace(command=command))


def main() -> None:
    args = parse(sys.argv[1:])
    if args.command is None:
        return benchmark()
    place = args.samples if args.command == "samples" else Path(args.ckpt).with_name(args.command)
    args.out = (args.out or place).with_suffix(".json")
    for suffix in (".json", ".png", ".pictures.png")[: 3 if "steps" in args else 1]:
        sample.refuse_existing(args.out.with_suffix(suffix), args.overwrite)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"evaluate.py: warning: {message}\n"
    sample.run_command(main)
