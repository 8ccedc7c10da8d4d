"""Validation names every field at fault, and a config survives being saved."""

import importlib.util
from pathlib import Path
from typing import Any

import ml_collections
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddaebm_jax import config as config_lib
from ddaebm_jax.config import checks as validation
from ddaebm_jax.config import combinations

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(CONFIGS.glob("*.py"))


def load_recipe(path: Path) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _changed(**fields: object) -> ml_collections.ConfigDict:
    config = config_lib.base()
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in fields.items()}
    )
    return config


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"gaussians25", "released_gaussians25"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_survives_json(path: Path):
    config = load_recipe(path)
    if config.data.name in ("table", "folder"):
        config.data.path = "mine"  # the one field that is the user's to give
    config_lib.validate(config)
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.differences(config, again) == {}


def test_the_released_recipe_is_the_design_table():
    config = load_recipe(CONFIGS / "released_gaussians25.py")
    process, game, adam = config.diffusion, config.game, config.optimizer
    assert (process.num_steps, process.beta_min, process.beta_max) == (4, 0.01, 0.1)
    assert (process.variance, process.time) == ("vp", "uniform")
    assert (config.data.batch_size, config.train.num_steps) == (200, 100_000)
    assert (adam.learning_rate, adam.schedule) == (1e-4, "constant")
    assert (adam.beta1, adam.beta2, adam.ema_decay) == (0.0, 0.9, 0.0)
    assert (game.gamma, game.lambda_z, game.lambda_f) == (0.02, 0.1, 1.0)
    assert (game.recon, game.recon_latent, game.recon_floor) == (
        "nll",
        "posterior",
        0.01,
    )
    assert (config.model.nz, config.model.mlp.norm) == (2, "batch")
    assert tuple(config.model.mlp.hidden) == (300, 300)


# DESIGN.md, section 4, a column each. T, ranges of β, nz, z_emb, t_emb, n_mlp, ngf,
# attention and Adam are the same in all three.
IMAGE_RECIPES: dict[str, dict[str, Any]] = {
    "cifar10": {
        "model.unet.nf": 128,
        "model.unet.ch_mult": (1, 2, 2, 2),
        "model.unet.num_res_blocks": 2,
        "model.unet.dropout": 0.1,
        "model.unet.fir": True,
        "model.unet.progressive_input": "residual",
        "diffusion.time": "uniform",
        "data.batch_size": 256,
        "data.image_size": 32,
        "data.crop": None,
        "data.limit": 0,
        "optimizer.learning_rate": 1e-4,
        "optimizer.ema_decay": 0.9999,
        "game.gamma": 0.02,
        "game.recon": "mse",
        "game.recon_latent": "prior",
    },
    "celeba64": {
        "model.unet.nf": 64,
        "model.unet.ch_mult": (1, 1, 2, 2, 4),
        "model.unet.num_res_blocks": 2,
        "model.unet.dropout": 0.1,
        "model.unet.fir": True,
        "model.unet.progressive_input": "residual",
        "diffusion.time": "uniform",
        "data.batch_size": 128,
        "data.image_size": 64,
        "data.crop": (15, 40, 163, 188),
        "data.limit": 0,
        "optimizer.learning_rate": 5e-5,
        "optimizer.ema_decay": 0.999,
        "game.gamma": 0.002,
        "game.recon": "mse",
        "game.recon_latent": "prior",
    },
    "lsun_church128": {
        "model.unet.nf": 64,
        "model.unet.ch_mult": (1, 2, 2, 4, 4),
        "model.unet.num_res_blocks": 2,
        "model.unet.dropout": 0.0,
        "model.unet.fir": False,
        "model.unet.progressive_input": "none",
        "diffusion.time": "lsun",
        "data.batch_size": 48,
        "data.image_size": 128,
        "data.crop": None,
        "data.limit": 120_000,
        "optimizer.learning_rate": 5e-5,
        "optimizer.ema_decay": 0.999,
        "game.gamma": 0.005,
        "game.recon": "weighted_nll",
        "game.recon_latent": "posterior",
    },
}
IN_ALL_IMAGE_RECIPES: dict[str, Any] = {
    "data.name": "tfds",
    "data.channels": 3,
    "data.flip": True,
    "model.name": "ncsnpp",
    "model.nz": 100,
    "model.dtype": "float32",
    "model.unet.z_emb_dim": 256,
    "model.unet.n_mlp": 4,
    "model.unet.attn_resolutions": (16,),
    "model.encoder.ngf": 64,
    "model.encoder.t_emb_dim": 256,
    "diffusion.num_steps": 4,
    "diffusion.variance": "vp",
    "diffusion.beta_min": 0.1,
    "diffusion.beta_max": 20.0,
    "diffusion.time_eps": 1e-3,
    "diffusion.max_beta": 0.999,
    "diffusion.min_posterior_var": 1e-4,
    "game.gamma_final": None,
    "game.lazy_reg": 1,
    "game.lambda_z": 0.1,
    "game.lambda_f": 1.0,
    "game.energy_l2": 0.0,
    "game.recon_floor": None,
    "game.latent": True,
    "game.posterior": True,
    "game.divergence": "jeffreys",
    "optimizer.energy_learning_rate": None,
    "optimizer.schedule": "cosine",
    "optimizer.final_learning_rate": 1e-5,
    "optimizer.beta1": 0.0,
    "optimizer.beta2": 0.9,
    "optimizer.max_grad_norm": None,
}
# Epochs and images; the steps of an epoch that is not whole are left out at the end.
EPOCHS = {
    "cifar10": (1300, 50_000),
    "celeba64": (600, 162_770),
    "lsun_church128": (500, 120_000),
}
NAMES_IN_TFDS = {
    "cifar10": ("cifar10", "train", "test"),
    "celeba64": ("celeb_a", "train", "test"),
    "lsun_church128": ("lsun/church_outdoor", "train", "validation"),
}


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_the_released_image_recipes_are_the_design_table(name: str):
    config = load_recipe(CONFIGS / f"{name}.py")
    found = dict(validation.leaves(config))
    wanted = IMAGE_RECIPES[name] | IN_ALL_IMAGE_RECIPES
    assert {field: found[field] for field in wanted} == wanted
    epochs, images = EPOCHS[name]
    assert config.train.num_steps == epochs * images // config.data.batch_size
    data = config.data
    assert (data.tfds, data.split, data.test_split) == NAMES_IN_TFDS[name]


def test_tuples_and_none_survive_json():
    """JSON has lists only; `()` and `None` must not become the base's values."""
    for fields in (
        {"data.crop": (0, 1, 65, 66), "model.unet.attn_resolutions": ()},
        {"model.unet.attn_resolutions": (32, 8), "game.recon_floor": None},
        {"diffusion.min_posterior_var": None, "diffusion.time_eps": 0.25},
    ):
        config = load_recipe(CONFIGS / "celeba64.py")
        _set(config, fields)
        again = config_lib.from_json(config_lib.to_json(config))
        assert config_lib.differences(config, again) == {}
        leaves = dict(validation.leaves(again))
        for field, value in fields.items():
            assert leaves[field] == value
            assert type(leaves[field]) is type(value)


@pytest.mark.parametrize("field", sorted(validation.RANGES))
def test_every_range_is_checked_on_both_sides(field: str):
    least, greatest, closed = validation.RANGES[field]
    whole = isinstance(dict(validation.leaves(config_lib.base()))[field], int)
    step = 1 if whole else 0.5
    outside = [least - step if closed else least]
    if greatest != float("inf"):
        outside.append(greatest + step)
    for value in outside:
        value = int(value) if whole else float(value)
        (problem,) = config_lib.problems(_changed(**{field: value}))
        assert problem.startswith(f"{field} is {value};")


@pytest.mark.parametrize("field", sorted(validation.CHOICES))
def test_every_choice_is_checked_with_a_suggestion(field: str):
    allowed = validation.CHOICES[field]
    (problem,) = config_lib.problems(_changed(**{field: allowed[0] + "x"}))
    assert field in problem
    assert all(name in problem for name in allowed)
    assert f"did you mean '{allowed[0]}'" in problem


def test_all_problems_are_told_at_once():
    config = _changed(seed=-1, game__recon="nil", data__batch_size=0)
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.validate(config)
    for field in ("seed", "game.recon", "data.batch_size"):
        assert field in str(error.value)


def test_an_unknown_field_in_a_recipe_is_refused_with_a_suggestion():
    config = config_lib.base()
    config.optimizer.learning_rte = 1e-3
    (problem,) = config_lib.problems(config)
    assert "optimizer.learning_rte is not a field" in problem
    assert "optimizer.learning_rate" in problem


def test_a_missing_field_is_refused():
    config = config_lib.base()
    del config.game["gamma"]
    (problem,) = config_lib.problems(config)
    assert "game.gamma is missing" in problem


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"diffusion.beta_min": 20.0, "diffusion.beta_max": 0.1}, "beta_min is 20.0"),
        ({"diffusion.variance": "geometric"}, "below 1"),
        ({"diffusion.time": "lsun", "diffusion.num_steps": 1}, "at least 2"),
        ({"diffusion.time": "lsun"}, "min_posterior_var"),
        ({"diffusion.time_eps": 1e-300}, "min_posterior_var"),
        ({"diffusion.beta_max": 4000.0}, "every step needs"),
        ({"diffusion.time_eps": 0.0}, "min_posterior_var"),
        ({"game.recon_floor": None, "diffusion.num_steps": 1}, "recon_floor is None"),
        ({"model.mlp.t_embed_dim": 15}, "even"),
        ({"optimizer.schedule": "cosine", "optimizer.learning_rate": 1e-6}, "decays"),
        (
            {"optimizer.schedule": "exponential", "optimizer.final_learning_rate": 0.0},
            "positive",
        ),
        ({"game.gamma": 0.0, "game.gamma_final": 1e-3}, "gamma_final"),
        ({"data.name": "table"}, "data.path is empty"),
        ({"data.path": "rows.csv"}, "nothing would read"),
        ({"data.label_column": "y"}, "it is for data.name table"),
    ],
)
def test_combinations_are_checked(fields: dict, expected: str):
    config = config_lib.base()
    _set(config, fields)
    assert any(expected in problem for problem in config_lib.problems(config))


def _set(config: ml_collections.ConfigDict, fields: dict[str, Any]) -> None:
    """Sets fields past the recipe's type checks: JSON and code can hold anything."""
    for name, value in fields.items():
        section, _, field = name.rpartition(".")
        node = config
        for part in filter(None, section.split(".")):
            node = node[part]
        with node.ignore_type():
            node[field] = value


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"data.image_size": 24}, "data.image_size is 24; the posterior needs a power"),
        (
            {"data.image_size": 8, "model.unet.ch_mult": (1, 1, 1, 1, 1)},
            "data.image_size is 8, not divisible by 16, as the 5 levels",
        ),
        ({"model.unet.fir": False}, "needs model.unet.fir=True; or set it to 'none'"),
        ({"model.unet.nf": 33}, "model.unet.nf is 33; even is needed"),
        ({"model.unet.nf": 30}, "layers of width 30, which 7 groups do not divide"),
        ({"model.unet.nf": 132}, "which 32 groups do not divide"),
        ({"model.unet.ch_mult": (1, 1024)}, "width 262144; at most 65536 is possible"),
        ({"model.encoder.t_emb_dim": 7}, "model.encoder.t_emb_dim is 7; even"),
        ({"model.name": "mlp"}, "'tfds' holds images; use model.name='ncsnpp'"),
        ({"data.name": "gaussians25", "data.tfds": ""}, "use model.name='mlp'"),
        ({"data.tfds": ""}, "data.tfds is empty; data.name 'tfds' needs it"),
        (
            {"data.name": "folder", "data.tfds": ""},
            "data.path is empty; data.name 'folder' needs it",
        ),
        ({"data.channels": 2}, "data.channels is 2; allowed: 1 (grey), 3 (RGB)"),
        ({"data.crop": (9, 0, 9, 8)}, "data.crop is (9, 0, 9, 8); (left, top, right"),
        ({"data.crop": (0, 8, 8, 0)}, "top < bottom is needed"),
        ({"data.crop": (0, 0, 8)}, "data.crop is (0, 0, 8); needed: four whole"),
        ({"data.crop": (-1, 0, 8, 8)}, "needed: four whole numbers"),
        ({"data.crop": (0, 0, 8.5, 8)}, "needed: four whole numbers"),
        (
            {"model.unet.attn_resolutions": (0,)},
            "whole numbers from 1 to 2147483647, or ()",
        ),
        (
            {"model.unet.attn_resolutions": (16, 7)},
            "lists 7, but the levels have sides",
        ),
        ({"model.unet.ch_mult": ()}, "model.unet.ch_mult is ()"),
        ({"data.path": "images"}, "nothing would read; it is for data.name table or"),
        ({"model.dtype": "float16"}, "model.dtype is 'float16'; allowed: float32"),
        ({"model.remat": "block"}, "did you mean 'blocks'?"),
        ({"game.recon_floor": "none"}, "a finite number or None is needed"),
    ],
)
def test_combinations_of_images_are_checked(fields: dict, expected: str):
    config = load_recipe(CONFIGS / "cifar10.py")
    assert config_lib.problems(config) == []
    _set(config, fields)
    assert any(expected in problem for problem in config_lib.problems(config))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        (name, field, value)
        for field, value, readers in (
            ("crop", (0, 0, 8, 8), {"folder"}),
            ("limit", 100, set()),
            ("skip_corrupt", True, {"folder"}),
            ("tfds", "cifar10", set()),
            ("tfds_dir", "sets", set()),
            ("on_device", True, {"digits", "photos", "folder"}),
            ("flip", True, {"digits", "photos", "folder"}),
        )
        for name in ("digits", "photos", "folder", "table", "gaussians25")
        if name not in readers
    ],
)
def test_fields_that_a_data_set_would_ignore_are_refused(
    name: str, field: str, value: object
):
    plane = name in ("gaussians25", "table")
    recipes = {"digits": "digits", "photos": "photos32", "folder": "digits"}
    config = (
        config_lib.base() if plane else load_recipe(CONFIGS / f"{recipes[name]}.py")
    )
    path = "mine" if name in ("folder", "table") else ""
    _set(config, {"data.name": name, "data.path": path})
    for other in ("flip", "on_device"):
        _set(config, {f"data.{other}": False})
    assert config_lib.problems(config) == []
    _set(config, {f"data.{field}": value})
    (problem,) = config_lib.problems(config)
    assert problem.startswith(f"data.{field} is {value!r}, which nothing would read")


# Fields that are set, and what they are then to be used with.
UNREAD: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "penalty": ("gaussians25", {"game.gamma": 0.0}, {"game.lazy_reg": 4}),
    "reconstruction": ("gaussians25", {"game.recon": "mse"}, {"game.recon_floor": 0.5}),
    "time": ("lsun_church128", {}, {"diffusion.time_eps": 0.1}),
    "images in the plane": (
        "gaussians25",
        {},
        {
            "data.image_size": 64,
            "data.channels": 1,
            "data.num_threads": 4,
            "data.prefetch": 2,
            "data.num_workers": 1,
            "data.timeout": 5,
            "data.test_fraction": 0.5,
            "evaluation.batch_size": 10,
            "evaluation.inception": True,
            "evaluation.num_kept_features": 100,
            "model.remat": "blocks",
            "model.unet.nf": 32,
            "model.encoder.ngf": 32,
        },
    ),
    "images in a table": ("breast_cancer", {}, {"data.image_size": 64}),
    "the plane in images": (
        "digits",
        {},
        {"model.mlp.hidden": (8,), "evaluation.num_projections": 10},
    ),
    "weights": ("digits", {}, {"evaluation.inception_weights": "weights.pth"}),
    "share": ("cifar10", {}, {"data.test_fraction": 0.5}),
    "cache": (
        "gaussians25",
        {"compilation_cache.enabled": False},
        {"compilation_cache.directory": "programs"},
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_fields_that_nothing_would_read_are_refused(case: str):
    recipe, circumstances, unread = UNREAD[case]
    config = load_recipe(CONFIGS / f"{recipe}.py")
    if recipe == "gaussians25" and "game.gamma" in circumstances:
        _set(config, {"game.gamma_final": None})
    _set(config, circumstances)
    assert config_lib.problems(config) == []
    _set(config, unread)
    found = config_lib.problems(config)
    assert len(found) == len(unread)
    for field, value in unread.items():
        (problem,) = [
            line for line in found if line.startswith(f"{field} is {value!r}")
        ]
        assert "nothing would read; it is for " in problem and "leave it at" in problem
    # What a run was trained with is no reason not to look at its results.
    assert config_lib.problems(config, saved=True) == []
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.differences(config, again) == {}


def test_conditions_are_of_fields_that_there_are():
    fields = dict(validation.leaves(config_lib.base()))
    for name in combinations.READ_WHEN:
        assert name in fields or any(
            name.endswith(".") and field.startswith(name) for field in fields
        )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_ablation_is_one_switch_on_any_recipe(path: Path):
    switches: list[dict[str, Any]] = [
        {"game.latent": False},
        {"game.posterior": False},
        {"game.divergence": "reverse_kl"},
        *({"diffusion.num_steps": number} for number in (1, 2, 4, 8)),
        {"optimizer.schedule": "constant"},
        {"diffusion.variance": "cosine"},
    ]
    for fields in switches:
        config = load_recipe(path)
        if config.data.name in ("table", "folder"):
            config.data.path = "mine"
        if config.diffusion.time == "lsun" and fields.get("diffusion.num_steps") == 1:
            continue  # Times that one step does not have.
        _set(config, fields)
        assert config_lib.problems(config) == []


def test_a_problem_that_follows_from_another_is_not_told():
    """Not with the base's value in the place of the one that cannot be used."""
    config = load_recipe(CONFIGS / "cifar10.py")
    _set(
        config,
        {"model.unet.ch_mult": (1, 0), "model.unet.attn_resolutions": (2,)},
    )
    (problem,) = config_lib.problems(config)
    assert problem.startswith("model.unet.ch_mult is (1, 0)")
    # Another problem of a check that also reads the unusable field is still told.
    _set(config, {"data.image_size": 24, "optimizer.accumulate": 3})
    assert [problem.split(" is ")[0] for problem in config_lib.problems(config)] == [
        "model.unet.ch_mult",
        "optimizer.accumulate",
        "data.image_size",
    ]


def test_whole_numbers_fit_the_devices_integers():
    for field, value in validation.leaves(config_lib.base()):
        if isinstance(value, int) and not isinstance(value, bool):
            assert validation.RANGES[field][1] <= 2**31 - 1
        if isinstance(value, tuple) or field == "data.crop":
            config = load_recipe(CONFIGS / "cifar10.py")
            _set(config, {field: (2**31,)})
            assert any(
                problem.startswith(f"{field} is ({2**31},)")
                for problem in config_lib.problems(config)
            )


def test_a_section_is_no_field():
    config = ml_collections.ConfigDict(config_lib.base().to_dict())
    with config.ignore_type():
        config.recovery = 3
        config.game.gamma = {"start": 0.1}
        config.gaem = {"lambda_z": 1.0}
    found = config_lib.problems(config)
    assert [problem.partition(";")[0] for problem in found] == [
        "gaem.lambda_z is not a field of the config",
        "game.gamma is missing",
        "game.gamma.start is not a field of the config",
        "recovery is a section of the config",
    ]
    assert found[0].endswith("did you mean game.lambda_z?")


_ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.floats(),
    st.integers(),
    st.lists(st.integers(), max_size=2),
)


@given(st.sampled_from(sorted(dict(validation.leaves(config_lib.base())))), _ODD_VALUES)
def test_no_value_of_any_field_escapes_with_another_error(field: str, value: object):
    """A value is accepted, or refused with the field's name; nothing else happens."""
    config = ml_collections.ConfigDict(config_lib.base().to_dict())
    section, _, name = field.rpartition(".")
    node = config
    for part in filter(None, section.split(".")):
        node = node[part]
    with node.ignore_type():
        node[name] = value
    for problem in config_lib.problems(config):
        assert field in problem or field.split(".")[-1] in problem


def test_differences_name_fields_and_both_values():
    changed = config_lib.differences(_changed(), _changed(game__gamma=0.5))
    assert changed == {"game.gamma": (0.02, 0.5)}


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"seed": 1}'])
def test_a_damaged_config_file_is_a_config_error(text: str):
    with pytest.raises(config_lib.ConfigError):
        config_lib.from_json(text)


def test_everything_that_is_wrong_is_said_at_once():
    """Types, ranges, names and combinations, but for what follows from the others."""
    config = config_lib.base()
    with config.unlocked(), config.ignore_type():
        config.diffusion.num_steps = "four"
        config.game.gamma = -1.0
        config.game.gamma_final = 0.1
        config.model.nam = "mlp"
        config.optimizer.accumulate = 3
    found = config_lib.problems(config)
    assert [problem.split(" is ")[0] for problem in found] == [
        "diffusion.num_steps",
        "game.gamma",
        "model.nam",
        "optimizer.accumulate",
    ]
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.validate(config)
    assert all(problem in str(error.value) for problem in found)
