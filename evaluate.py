"""evaluate.py -- FID, sFID, IS, precision, recall, rFID, PSNR, SSIM, linear probe. Section 4.1.

The formulas behind Fig. 4 and Tables 2 to 5 are written out; the Inception network alone comes from
a library (torch-fidelity), with the weights of all published FIDs. It knows ImageNet: for pictures
below 64 pixels a small CNN takes its place, trained on the training pictures, on its own scale.

Samples are compared with held-out pictures, or with training pictures (--against) where guidance is
chosen. A table's first row is the floor: as many other training pictures in the samples' place.
Pictures are uint8 (n, channels, height, width); D features, K classes.

    python evaluate.py stages                   # Fig. 4, right, of the run in out/letters
    python evaluate.py stages --stages 2 --cfg 1,2,3.5,5.5 --against training --out scan.json
    python evaluate.py reconstruct              # Fig. 4, left: held-out pictures as priors
    python evaluate.py probe                    # Table 2, right: the class in LEM's tokens
    python evaluate.py samples --ref VIRTUAL_imagenet256_labeled.npz --samples samples.npz
"""

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Subset, default_collate
from tqdm import tqdm

import sample
import train
from model import UserError, count_macs
from sample import at_least, pick_device, replacing

# ------------------------------------------------------------------------------------- the metrics


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """FID (Heusel et al., 2017): |mu1 - mu2|² + tr(S1 + S2 - 2 (S1 S2)^1/2), float64.

    With S1 = V Λ Vᵀ and A = V Λ^1/2, less what is rounding in Λ, S1 S2 has the eigenvalues of
    Aᵀ S2 A, which is symmetric. mu (D,), sigma (D, D), tensors or arrays. Raises UserError if
    shapes do not match or a number is not finite.
    """
    parts = [torch.as_tensor(x, dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2)]
    shapes, D = [tuple(x.shape) for x in parts], len(parts[0])
    if shapes != [(D,), (D, D)] * 2 or not all(x.isfinite().all() for x in parts):
        raise UserError(f"moments of shapes {shapes}; (D,), (D, D), twice, all finite, are needed")
    mu1, sigma1, mu2, sigma2 = parts
    values, V = torch.linalg.eigh(sigma1)
    kept = values > D * torch.finfo(values.dtype).eps * values.max()
    A = V[:, kept] * values[kept].sqrt()
    spectrum = torch.linalg.eigvalsh(A.T @ sigma2 @ A).clamp(min=0)  # rounding may go below 0
    traces = sigma1.trace() + sigma2.trace() - 2 * spectrum.sqrt().sum()
    return ((mu1 - mu2).square().sum() + traces).item()


def inception_score(probs, splits: int | list[int] = 10) -> tuple[float, float]:
    """IS (Salimans et al., 2016): exp(mean over x of KL(p(y|x) | p(y))), from 1 to K.

    probs (n, K): each picture's p(y|x). splits: how many contiguous parts, each with its own p(y),
    or where to cut -> mean, standard deviation of the parts.
    """
    scores = []
    for p in torch.as_tensor(probs).double().tensor_split(splits):
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # 0 log 0 = 0
        scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019) of features (m, D) and (n, D).

    Precision: the share of fakes inside a ball around any real picture, which reaches that one's
    k-th nearest real neighbour (border included); recall: the reverse. In blocks of 128 MB, fp32.
    """

    def distances(a, b):
        return (torch.cdist(block, b) for block in a.split(max(1, 2**25 // len(b))))

    def covered(points, centres):
        radii = [block.kthvalue(k + 1).values for block in distances(centres, centres)]  # + itself
        inside = [(block <= torch.cat(radii)).any(1) for block in distances(points, centres)]
        return torch.cat(inside).double().mean().item()

    return covered(fake, real), covered(real, fake)


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """10 log10(255² / mean (a - b)²), dB: uint8 pictures -> (n,); infinite for equal ones."""
    return 10 * (255**2 / (a.double() - b.double()).square().flatten(1).mean(1)).log10()


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004), uint8 pictures -> (n,), at most 1: the mean of

    (2 mu_a mu_b + c1)(2 cov + c2) / ((mu_a² + mu_b² + c1)(var_a + var_b + c2)), c1 = (0.01 · 255)²,
    c2 = (0.03 · 255)², over the channels and the places of an 11 x 11 Gaussian window, sigma 1.5,
    that lie inside; it weights the moments. The pictures must have 11 x 11 pixels or more.
    """
    from scipy.ndimage import gaussian_filter

    def mean(x):
        return gaussian_filter(x, (0, 0, 1.5, 1.5), radius=5)[..., 5:-5, 5:-5]

    a, b = a.double().numpy(), b.double().numpy()
    mu_a, mu_b, c1, c2 = mean(a), mean(b), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
    shares = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / (mu_a**2 + mu_b**2 + c1)
    return torch.from_numpy(shares / (var_a + var_b + c2)).flatten(1).mean(1)


def linear_probe(x, y, x_test, y_test, decay: float = 1e-4) -> float:
    """Top-1 on (x_test, y_test), in [0, 1], of BatchNorm without affine + Linear fit to (x, y).

    x (n, D) features, y (n,) classes; BatchNorm over all of x standardises it. CHOICE: the loss is
    cross-entropy + decay/2 |W|², which has a minimum also where the classes separate.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    linear = LogisticRegression(C=1 / (decay * len(x)), max_iter=2000)
    probe = make_pipeline(StandardScaler(), linear).fit(x.double().cpu(), y)
    return probe.score(x_test.double().cpu(), y_test)


# --------------------------------------------------------------------- pictures and their features

# A network of features maps uint8 (b, channels, height, width) to pooled features (b, D), logits
# (b, K) and spatial features (b, D'), D' = 0 for none. With it goes what the report says about it.


def inception(path: str | None, device: torch.device) -> tuple[Callable, dict]:
    """The Inception-v3 of published FIDs: TensorFlow's weights and resize to 299, 1008 logits.

    pool 2048; logits without bias; spatial, for sFID (Nash et al., 2021): the first 7 channels of
    Mixed_6d, 17 x 17, channels last. Raises UserError without the library or the weights.
    """
    name = "weights-inception-2015-12-05-6726825d.pth"
    file, spatial = path or f"{torch.hub.get_dir()}/checkpoints/{name}", []
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if path:  # refuse code in the file, which the library would run
            torch.load(path, weights_only=True)
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], path)
    except Exception as error:
        need = f"torch-fidelity and its {name} there, or at --inception PATH, are needed"
        raise UserError(f"no Inception in {file} ({type(error).__name__}); {need}") from None
    network.to(device)
    network.Mixed_6d.register_forward_hook(lambda module, inputs, x: spatial.append(x[:, :7]))

    def features(images):
        pool, logits = network(images.to(device).expand(-1, 3, -1, -1))
        return pool, logits, spatial.pop().permute(0, 2, 3, 1).flatten(1)

    return features, {"features": "inception", "weights": file}


def fit(network: nn.Module, images: torch.Tensor, y: torch.Tensor) -> None:
    """Trains it within a minute. CHOICE: on pictures with up to 24 of 255 grey levels of noise, or
    its features tell faint noise from clean pictures better than scrambled letters from letters."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in tqdm(range(500), desc="training the classifier", leave=False):
        batch = torch.randint(len(images), (128,))
        noise = 24 * torch.rand(128, 1, 1, 1) * torch.randn(128, *images.shape[1:])
        optimizer.zero_grad()
        F.cross_entropy(network((images[batch] + noise) / 127.5 - 1), y[batch]).backward()
        optimizer.step()


def classifier(ckpt: Path, saved: dict, training) -> tuple[Callable, dict]:
    """For small pictures: a CNN fit to the checkpoint's training pictures, and kept beside it.

    pool 64; logits of the checkpoint's classes. On the CPU: one number of threads, one result.
    """
    size, channels, classes = saved["image_size"], saved["channels"], len(saved["classes"])
    data, layers = f"{Path(saved['data']).name}-{saved['held_out']:g}", []
    file = ckpt.with_name(f"classifier-{data}-{size}-{channels}-{classes}.pt")
    torch.manual_seed(0)
    for before, after in ((channels, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2, ceil_mode=True)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    network = nn.Sequential(*layers)
    try:
        network.load_state_dict(torch.load(file, weights_only=True))
    except Exception:  # not there, or damaged
        fit(network, *first(training, 10_000))
        with replacing(file) as temporary, temporary.open("wb") as stream:
            torch.save(network.state_dict(), stream)
    network.eval()

    def features(images):
        pool = network[:-1](images.float() / 127.5 - 1)
        return pool, network[-1](pool), pool[:, :0]

    return features, {"features": "classifier", "weights": file}


def first(data, n: int) -> list[torch.Tensor]:
    """n pictures of a data set (its order is random): uint8 (n, channels, size, size), y (n,)."""
    if len(data) < 4:
        raise UserError(f"{len(data)} pictures; at least 4 are needed: train with other --held-out")
    return default_collate([data[i] for i in range(min(n, len(data)))])


def read_pictures(path: Path) -> torch.Tensor:
    """A folder's pictures, or arr_0 of guided-diffusion's .npz -> uint8 (n, 3, height, width).
    Raises UserError that names what is missing, unreadable or of another kind."""
    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    try:
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix.lower() in suffixes)
            pixels = np.stack([np.array(sample.open_picture(f).convert("RGB")) for f in files])
        else:
            with np.load(path) as file:
                pixels = file["arr_0"]
        if pixels.dtype != np.uint8 or pixels.shape[3:] != (3,) or len(pixels) < 4:
            raise ValueError(f"got {pixels.dtype} {pixels.shape}")
    except Exception as error:  # NumPy has many kinds for files that are no .npz
        need = "a folder of pictures of one size or an .npz with arr_0, uint8 (n, height, width, 3)"
        raise UserError(f"{path}: {error}; {need}, 4 or more, is needed") from None
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@torch.no_grad()
def measure(pictures: torch.Tensor, network: Callable) -> SimpleNamespace:
    """uint8 (n, channels, height, width), through a network of features -> pool (n, D), logits
    (n, K); fid, sfid: float64 mean and covariance (ddof = 1) of pooled and spatial features."""
    parts = tqdm(pictures.split(64), desc="features", leave=False)
    parts = [[x.cpu() for x in network(images)] for images in parts]
    pool, logits, spatial = map(torch.cat, zip(*parts, strict=True))
    fid, sfid = ((x.double().mean(0), x.double().T.cov()) for x in (pool, spatial))
    return SimpleNamespace(pool=pool, logits=logits, fid=fid, sfid=sfid)


def compare(real: SimpleNamespace, fake: SimpleNamespace) -> dict[str, float]:
    """The columns of Tables 4 and 5; IS as OpenAI's evaluator, in splits of 5,000 pictures."""
    (n, D), guess, logits = fake.pool.shape, fake.logits.argmax(1), fake.logits
    if min(n, len(real.pool)) < D:
        counts = f"{len(real.pool)} and {n} pictures for {D} features"
        warnings.warn(f"{counts}: too few, the covariances are singular, FID is off", stacklevel=2)
    if n > 5000 and (guess[1:] == guess[:-1]).double().mean() > 0.5:  # few classes in a split
        warnings.warn("samples are in order of class; shuffled (seed 0) for IS", stacklevel=2)
        logits = logits[np.random.default_rng(0).permutation(n)]
    score, deviation = inception_score(logits.double().softmax(1), [*range(5000, n, 5000)])
    precision, recall = precision_recall(real.pool, fake.pool)
    columns = {"fid": frechet_distance(*real.fid, *fake.fid)}
    if len(real.sfid[0]):
        columns["sfid"] = frechet_distance(*real.sfid, *fake.sfid)
    return columns | {"is": score, "is_std": deviation, "precision": precision, "recall": recall}


# ------------------------------------------------------------------------------------ the commands


def load_run(args: argparse.Namespace) -> tuple:
    """--ckpt -> what it says of its run, its model, its codec, training and held-out pictures."""
    saved, device = sample.load_checkpoint(args.ckpt), pick_device(args.device)
    model, codec = sample.load_model(saved, device), sample.load_codec(saved["codec"])
    saved = {k: v for k, v in saved.items() if k not in ("model", "ema", "optimizer")}
    data = (saved[k] for k in ("data", "image_size", "channels", "held_out"))
    return saved, model, codec, *train.load_data(*data)


def follow(plans, args, model, codec, y, prior) -> Iterator[tuple[dict, torch.Tensor]]:
    """Runs each plan (the guidance of each stage) -> the row and the pictures of each stage, once.
    evaluations: of v; a guided one runs the network twice, its second half with S. gflops: Table
    4's compute per picture, in 10^9 multiply-accumulates, the stages before included."""
    macs, seen = count_macs(model.config), set()
    for plan in dict.fromkeys(plans):
        nfe, gflops = [], 0
        latents = sample.generate(
            model, y.to(model.cos.device), len(plan), plan, args.guide_on, args.solver, args.steps,
            args.seed, 0, prior, args.batch_size, True, nfe,
        )  # fmt: skip
        for i, (w, z0) in enumerate(zip(plan, latents, strict=True)):
            n, has_prior = nfe[i].double().mean().item(), i > 0 or prior is not None
            # Of Table 4's parts: e_s has the prior's MLP in it, which we run once per stage.
            runs = {"lem": 1, "e_s": n, "prior_mlp": 1 - n} if has_prior else {"s": n}
            runs["s"] = runs.get("s", 0) + n * (w > 1)
            gflops += sum(times * macs[part] for part, times in runs.items()) / 1e9
            row = {"what": f"stage {i + 1}", "guidance": w, "evaluations": n, "gflops": gflops}
            if plan[: i + 1] not in seen:
                yield row, codec.decode(z0).cpu()
            seen.add(plan[: i + 1])


def figure_4(args: argparse.Namespace) -> None:
    """Fig. 4. stages, right: stages 1, 2, ..., and stage 1 under class guidance, as samples of the
    reference pictures' classes. reconstruct, left: these pictures' own latents are the priors."""
    saved, model, codec, training, held_out = load_run(args)
    if args.features == "classifier" or (args.features == "auto" and saved["image_size"] < 64):
        network, facts = classifier(args.ckpt, saved, training)
    else:
        network, facts = inception(args.inception, pick_device(args.device))
    if args.against == "training":  # the half that is not the floor's
        held_out = Subset(training, range(len(training) // 2, len(training)))
    real, y = first(held_out, args.num)
    floor, floor_y = first(training, len(y))
    args.guide_on = args.guide_on or model.config.guide_on
    if args.command == "reconstruct":
        prior, plans = codec.encode(real.to(model.cos.device)), [(w,) for w in args.cfg]
    else:
        args.cfg = args.cfg or [model.config.cfg]
        args.stages = args.stages or (3 if model.config.N else 1)
        prior, plans = None, [(1.0, *[w] * (args.stages - 1)) for w in args.cfg]
        plans += [(w,) for w in args.cfg_stage1]

    reference, rows = measure(real, network), []
    sampled = follow(plans, args, model, codec, y, prior)
    for row, images in chain([({"what": "training pictures"}, floor)], sampled):
        fake, expected = measure(images, network), y if rows else floor_y
        row |= compare(reference, fake)
        if facts["features"] == "classifier":
            row["recognised"] = (fake.logits.argmax(1) == expected).double().mean().item()
        if prior is not None and rows:
            row["what"] = "reconstruction"
            row["psnr"] = psnr(real, images).mean().item()
            row["ssim"] = ssim(real, images).mean().item() if min(real.shape[2:]) > 10 else None
        rows.append(row)
    facts["reference"] = f"{len(real)} {args.against} pictures"
    draw_figure(args.out.with_suffix(".png"), rows, facts["reference"])
    report(args, rows, facts | {"count": len(y), "checkpoint": saved}, real)


def samples(args: argparse.Namespace) -> None:
    """Table 5: --samples against --ref, each a folder of pictures or guided-diffusion's .npz."""
    network, facts = inception(args.inception, pick_device(args.device))
    pictures = read_pictures(args.ref), read_pictures(args.samples)
    real, fake = (measure(x, network) for x in pictures)
    if args.ref.is_file():
        with np.load(args.ref) as file:  # moments of the whole data set, of which arr_0 is a part
            if {"mu", "sigma", "mu_s", "sigma_s"} <= {*file.files}:
                real.fid, real.sfid = (file["mu"], file["sigma"]), (file["mu_s"], file["sigma_s"])
    facts |= {"count": len(fake.pool), "reference": f"{len(real.pool)} of {args.ref.name}"}
    report(args, [{"what": args.samples.name} | compare(real, fake)], facts, pictures[0])


@torch.no_grad()
def probe(args: argparse.Namespace) -> None:
    """Table 2, right: linear probes of LEM's latent tokens, top-1 on held-out pictures."""
    saved, model, codec, *data = load_run(args)
    if not model.config.N:
        raise UserError(f"{args.ckpt} is a plain FiTv2: it has no LEM to probe")
    (images, y), (images_test, y_test) = (first(part, args.num) for part in data)
    latents = (codec.encode(part.to(model.cos.device)) for part in (images, images_test))
    x, x_test = (torch.cat([*map(model.lem.encode, z0.split(64))]) for z0 in latents)
    mean = linear_probe(x.mean(1), y, x_test.mean(1), y_test)
    full = linear_probe(x.flatten(1), y, x_test.flatten(1), y_test)
    rows = [{"what": "mean of N tokens", "top1": mean}, {"what": "all N tokens", "top1": full}]
    report(args, rows, {"count": len(y_test), "checkpoint": saved})


def report(args: argparse.Namespace, rows: list[dict], facts: dict, real=None) -> None:
    """Prints the rows as a table; writes them, and all that made them, to --out as JSON."""
    if real is not None:
        data = {"weights": Path(facts["weights"]).read_bytes(), "reference": real.numpy().tobytes()}
        facts |= {f"{k}_sha256": hashlib.sha256(v).hexdigest() for k, v in data.items()}
        counts = f"{facts['count']} pictures against {facts['reference']}"
        print(f"{counts}; features: {facts['features']}")
    full = facts["count"] == 50_000 and facts.get("features") == "inception"
    fid = "rFID" if args.command == "reconstruct" else "FID-50K" if full else "FID"
    titles = {"fid": fid, "sfid": "sFID", "is": "IS", "psnr": "PSNR, dB", "ssim": "SSIM"}
    keys = [key for key in rows[-1] if key not in ("what", "is_std")]
    print(" " * 24 + "".join(f"{titles.get(key, key):>12}" for key in keys))
    for row in rows:
        cells = (f"{row[key]:12.4g}" if row.get(key) is not None else " " * 12 for key in keys)
        print(f"{row['what']:24}" + "".join(cells))
    with replacing(args.out) as temporary:
        versions = {"torch": torch.__version__, "numpy": np.__version__}
        found = vars(args) | facts | {"versions": versions, "rows": rows}
        temporary.write_text(json.dumps(found, indent=1, default=str))
    print(f"wrote {args.out}")


def draw_figure(path: Path, rows: list[dict], reference: str) -> None:
    """A half of Fig. 4: a bar for the FID of each row; a line for the first row's, the floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7, 0.8 * len(rows)), 4), layout="constrained")
    axes, (floor, *fids) = figure.subplots(), [row["fid"] for row in rows]
    names = [f"{row['what']}\nw = {row['guidance']:g}" for row in rows[1:]]
    axes.bar_label(axes.bar(names, fids), fmt="%.3g")
    axes.axhline(floor, color="black", linestyle=":")
    axes.set_title(f"FID against {reference}; dotted: {rows[0]['what']}, {floor:.3g}")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


COMMANDS = {"stages": figure_4, "reconstruct": figure_4, "samples": samples, "probe": probe}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command and its flags; --help after a command shows them."""
    command = argv[0] if argv and argv[0] in COMMANDS else None
    parser = sample.Parser(COMMANDS[command].__doc__ if command else __doc__.splitlines()[0])
    add, natural = parser.add_argument, at_least(int, 1)
    # fmt: off
    add("command", choices=COMMANDS, help="each has its own flags and --help")
    if command == "samples":
        add("--ref", type=Path, required=True, help="folder of pictures or .npz")
        add("--samples", type=Path, required=True, help="folder of pictures or .npz")
    elif command:
        add("--ckpt", type=Path, default="out/letters/ckpt.pt", help="checkpoint of train.py")
        number = 10_000 if command == "probe" else 1000
        add("--num", type=at_least(int, 4), default=number, help="pictures, or all there are")
    if command == "stages":
        add("--stages", type=natural, help="None: 3, without LEM 1")
        add("--cfg-stage1", type=lambda text: sample.scales(text) if text != "none" else [],
            default="1.5,2,3,4", help="w of stage 1, or none")
    if command in ("stages", "reconstruct"):
        scan = "1,2,3.5,5.5,8" if command == "reconstruct" else None
        add("--cfg", type=sample.scales, default=scan, help="w given a prior; None: the model's")
        add("--against", choices=["held-out", "training"], default="held-out", help="the reference")
        add("--guide-on", choices=["both", "prior"], help="v_u lacks it; None: the model's")
        add("--solver", choices=["euler", "dopri5"], default="euler", help="Euler or RK45")
        add("--steps", type=natural, default=20, help="Euler steps per stage")
        add("--seed", type=at_least(int, 0), default=0, help="same seed, same samples")
        add("--batch-size", type=natural, default=64, help="pictures sampled at a time")
        add("--features", choices=["auto", "inception", "classifier"], default="auto",
            help="auto: classifier below 64 pixels")
    if command in ("stages", "reconstruct", "samples"):
        add("--inception", help="file of its weights; None: downloaded once")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--out", type=Path, help="JSON, a figure beside it; None: by --ckpt or --samples")
    add("--overwrite", action="store_true", help="replace --out")
    # fmt: on
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    place = args.samples if args.command == "samples" else args.ckpt.with_name(args.command)
    args.out = (args.out or place).with_suffix(".json")
    for suffix in (".json", ".png")[: 2 if "steps" in args else 1]:
        sample.refuse_existing(args.out.with_suffix(suffix), args.overwrite)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"evaluate.py: warning: {message}\n"
    sample.run_command(main)
