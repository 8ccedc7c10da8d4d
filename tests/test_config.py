"""Configs: recipes, checks, JSON, and --config on the command line."""

import ast
import json
from typing import Any

import jax
import ml_collections
import pytest
from cli import ROOT, python
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import load_recipe

from ddaebm_jax import config as config_lib
from ddaebm_jax import diffusion, models
from ddaebm_jax.config import checks, choices, fields
from ddaebm_jax.data import synthetic

CONFIGS = ROOT / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.py"))
BASE = dict(fields.leaves(config_lib.base()))


def read(text: str) -> dict[str, Any]:
    """Returns fields written as `name=value`, by white space apart."""
    pairs = (part.split("=", 1) for part in text.split())
    return {field: ast.literal_eval(value) for field, value in pairs}


def recipe(name: str, changes: dict[str, Any] | None = None) -> Any:
    """Returns a valid recipe, changed past its type checks, as JSON and code can."""
    config = load_recipe(CONFIGS / f"{name}.py")
    needs_path = {"data.path": "mine"} if name in ("table", "folder") else {}
    for field, value in (needs_path | (changes or {})).items():
        section, _, key = field.rpartition(".")
        node = config
        for part in filter(None, section.split(".")):
            node = node[part]
        with node.ignore_type():
            node[key] = value
    return config


def problems(name: str, changes: dict[str, Any]) -> list[str]:
    return config_lib.problems(recipe(name, changes))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_survives_json(name: str):
    config = recipe(name)
    assert config_lib.problems(config) == []
    text = config_lib.to_json(config)
    assert config_lib.differences(config, config_lib.from_json(text)) == {}


@pytest.mark.parametrize("name", RECIPES)
def test_every_ablation_is_one_switch_on_any_recipe(name: str):
    steps = (2, 4, 8) if recipe(name).diffusion.time == "lsun" else (1, 2, 4, 8)
    for switch in (
        *("game.latent=False", "game.posterior=False", "game.divergence='reverse_kl'"),
        *("optimizer.schedule='constant'", "diffusion.variance='cosine'"),
        *(f"diffusion.num_steps={number}" for number in steps),
    ):
        assert problems(name, read(switch)) == []


# What the released image recipes share, and each recipe alone.
IMAGE_RECIPES = """
data.name="tfds" data.channels=3 data.flip=True data.split="train"
model.name="ncsnpp" model.nz=100 model.dtype="float32"
model.unet.z_emb_dim=256 model.unet.n_mlp=4 model.unet.num_res_blocks=2
model.unet.attn_resolutions=(16,) model.encoder.ngf=64 model.encoder.t_emb_dim=256
diffusion.num_steps=4 diffusion.variance="vp" diffusion.beta_min=0.1
diffusion.beta_max=20.0 diffusion.time_eps=1e-3 diffusion.max_beta=0.999
diffusion.min_posterior_var=1e-4 game.recon_floor=None game.gamma_final=None
game.lazy_reg=1 game.energy_l2=0.0 game.lambda_z=0.1 game.lambda_f=1.0
game.divergence="jeffreys" game.latent=True game.posterior=True
optimizer.schedule="cosine" optimizer.final_learning_rate=1e-5 optimizer.beta1=0.0
optimizer.beta2=0.9 optimizer.max_grad_norm=None optimizer.energy_learning_rate=None
"""
RELEASED = {
    "released_gaussians25": """
diffusion.num_steps=4 diffusion.beta_min=0.01 diffusion.beta_max=0.1
diffusion.variance="vp" diffusion.time="uniform" data.batch_size=200
train.num_steps=100000 optimizer.learning_rate=1e-4 optimizer.schedule="constant"
optimizer.beta1=0.0 optimizer.beta2=0.9 optimizer.ema_decay=0.0 game.gamma=0.02
game.lambda_z=0.1 game.lambda_f=1.0 game.recon="nll" game.recon_latent="posterior"
game.recon_floor=0.01 model.nz=2 model.mlp.norm="batch" model.mlp.hidden=(300,300)
""",
    "cifar10": """
data.tfds="cifar10" data.test_split="test" data.batch_size=256 data.image_size=32
data.crop=None data.limit=0 diffusion.time="uniform" model.unet.dropout=0.1
model.unet.nf=128 model.unet.ch_mult=(1,2,2,2) model.unet.fir=True
model.unet.progressive_input="residual" game.recon="mse" game.recon_latent="prior"
game.gamma=0.02 optimizer.learning_rate=1e-4 optimizer.ema_decay=0.9999
train.num_steps=253910
""",
    "celeba64": """
data.tfds="celeb_a" data.test_split="test" data.batch_size=128 data.image_size=64
data.crop=(15,40,163,188) data.limit=0 diffusion.time="uniform" model.unet.dropout=0.1
model.unet.nf=64 model.unet.ch_mult=(1,1,2,2,4) model.unet.fir=True
model.unet.progressive_input="residual" game.recon="mse" game.recon_latent="prior"
game.gamma=0.002 optimizer.learning_rate=5e-5 optimizer.ema_decay=0.999
train.num_steps=762980
""",
    "lsun_church128": """
data.tfds="lsun/church_outdoor" data.test_split="validation" data.batch_size=48
data.image_size=128 data.crop=None data.limit=120000 diffusion.time="lsun"
model.unet.dropout=0.0 model.unet.nf=64 model.unet.ch_mult=(1,2,2,4,4)
model.unet.fir=False model.unet.progressive_input="none" game.recon="weighted_nll"
game.recon_latent="posterior" game.gamma=0.005 optimizer.learning_rate=5e-5
optimizer.ema_decay=0.999 train.num_steps=1250000
""",
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_recipes_have_the_published_settings(name: str):
    of_images = "" if name == "released_gaussians25" else IMAGE_RECIPES
    expected = read(of_images + RELEASED[name])
    found = dict(fields.leaves(recipe(name)))
    assert {field: found[field] for field in expected} == expected


@pytest.mark.parametrize("field", sorted(fields.RANGES))
def test_every_range_is_checked_on_both_sides(field: str):
    least, greatest = fields.RANGES[field]
    whole = isinstance(BASE[field], int)
    outside = [least - 1 if whole or least == 0 else least / 2]
    if greatest < float("inf"):
        outside.append(greatest + 1)
    for value in outside:
        value = int(value) if whole else float(value)
        found = problems("released_gaussians25", {field: value})
        assert f"{field} is {value}; it must be at least {least}" in found[0]


@pytest.mark.parametrize("field", sorted(choices.ALLOWED))
def test_every_choice_is_checked_with_the_nearest_name(field: str):
    allowed = choices.ALLOWED[field]
    wrong = f"{allowed[0]}x" if isinstance(allowed[0], str) else 2
    (problem,) = problems("released_gaussians25", {field: wrong})
    listed = ", ".join(map(str, allowed))
    assert problem.startswith(f"{field} is {wrong!r}; allowed: {listed}")
    assert isinstance(wrong, int) or f"did you mean '{allowed[0]}'?" in problem


@pytest.mark.parametrize("field", BASE)
def test_numbers_fit_the_integers_of_devices(field: str):
    if type(BASE[field]) is int:
        assert problems("digits", {field: 2**31})[0].startswith(f"{field} is {2**31};")
    if isinstance(BASE[field], tuple):
        assert problems("digits", {field: (2**31,)})[0].startswith(f"{field} is (")


_ODD = st.one_of(
    *(st.none(), st.booleans(), st.text(max_size=3), st.floats(), st.integers()),
    st.lists(st.integers(), max_size=2),
)


@given(st.sampled_from(sorted(BASE)), _ODD)
def test_any_value_of_any_field_is_accepted_or_named(field: str, value: object):
    for problem in problems("digits", {field: value}):
        assert field in problem


def test_unknown_and_missing_fields_are_reported_with_the_nearest_name():
    config = ml_collections.ConfigDict(config_lib.base().to_dict())
    with config.ignore_type():
        config.recovery = 3
        config.game.gamma = {"start": 0.1}
        config.gaem = {"lambda_z": 1.0}
        config.optimizer.learning_rte = 1e-3
        del config.data["flip"]
    found = config_lib.problems(config)
    assert [problem.split(";")[0] for problem in found] == [
        "data.flip is missing",
        "gaem.lambda_z is not a field of the config",
        "game.gamma is missing",
        "game.gamma.start is not a field of the config",
        "optimizer.learning_rte is not a field of the config",
        "recovery is a section of the config",
    ]
    assert found[1].endswith("did you mean game.lambda_z?")
    assert found[4].endswith("did you mean optimizer.learning_rate?")


_BETA = "diffusion.beta_max=20.0 diffusion.variance="
_DECAY = "optimizer.schedule='exponential' optimizer.final_learning_rate="
COMBINATIONS = [
    ("diffusion.beta_min=20.0", "the first must be below the second"),
    (f"{_BETA}'geometric'", "needs beta_max below 1"),
    ("diffusion.beta_max=4000.0", "nothing of the data is left"),
    ("diffusion.time='lsun' diffusion.num_steps=1", "need at least 2 steps"),
    ("diffusion.time='lsun'", "diffusion.min_posterior_var is None"),
    ("diffusion.time_eps=0.0", "diffusion.min_posterior_var is None"),
    (
        "diffusion.time='karras' diffusion.time_eps=0.2",
        "spaced by noise start near data",
    ),
    ("game.recon_floor=None diffusion.num_steps=1", "which one step lacks"),
    ("game.gamma=0.0 game.gamma_final=1e-3", "γ decays from a positive number"),
    (f"{_DECAY}0.0", "needs a positive final rate"),
    (f"{_DECAY}1.0", "optimizer.learning_rate is 0.0001 and"),
    (f"{_DECAY}1e-4 optimizer.energy_learning_rate=1e-5", "energy_learning_rate is"),
    ("optimizer.accumulate=3", "the first must divide the second"),
    ("optimizer.accumulate=2", "batch norm needs the whole batch"),
    ("parallel.mode='pmap' parallel.fsdp=True", "fsdp needs mode 'jit'"),
    ("data.name='table'", "data.path is '' and data.name is 'table'"),
    ("data.drop_columns=(1,)", "data.drop_columns is (1,); a tuple of names is"),
    ("data.header='no'", "data.header is 'no'; allowed: auto, present, absent"),
    ("game.defensive=0.5", "with one negative the first must be 0.0"),
    ("game.num_negatives=0", "game.num_negatives is 0; it must be at least 1"),
    ("game.num_negatives=4 game.defensive=1.0", "game.defensive is 1.0; it must be"),
    ("game.num_negatives=4 game.defensive=0.3", "a number of draws, must be whole"),
    (
        "game.num_negatives=4 game.negatives_floor=None diffusion.num_steps=1",
        "game.negatives_floor is None and diffusion.num_steps is 1; None is s_1²",
    ),
    ("model.name='ncsnpp'", "images need model.name='ncsnpp'"),
    ("model.mlp.t_embed_dim=15", "is 15; an even number is needed"),
    ("evaluation.num_samples_on_the_way=9", "is 9; 0 or at least 10 is needed"),
]
IMAGE_COMBINATIONS = [
    ("model.name='mlp'", "images need model.name='ncsnpp'"),
    ("data.tfds=''", "a name in TensorFlow Datasets is needed"),
    ("data.name='folder'", "data.path is '' and data.name is 'folder'"),
    ("data.image_size=24", "data.image_size is 24; a power of two is needed"),
    ("data.crop=(9,0,9,8)", "left < right, top < bottom is needed"),
    ("data.crop=(0,0,8)", "four (left, top, right, bottom) whole numbers"),
    ("data.crop=(0,0,8.5,8)", "whole numbers from 0"),
    ("model.unet.ch_mult=(1,1,1,1,1,1,1)", "7 levels halve the side 6 times"),
    ("model.unet.patch_size=3", "3 times, of whole patches of 3 pixels"),
    ("model.unet.patch_size=4", "sides of levels, [8, 4, 2, 1], or (): nowhere"),
    ("model.unet.ch_mult=(1,1024)", "a layer is 131072 wide"),
    ("model.unet.ch_mult=()", "a tuple of one or more whole numbers"),
    ("model.unet.attn_resolutions=(16,7)", "sides of levels, [32, 16, 8, 4]"),
    ("model.unet.attn_resolutions=(0,)", "any number of whole numbers from 1"),
    ("model.unet.fir=False", "use fir=True, or progressive_input='none'"),
    ("model.unet.nf=33", "model.unet.nf is 33; an even number is needed"),
    ("game.recon_floor='none'", "a finite number or None is needed"),
    ("model.reference=2000", "a mixture has 1024 Gaussians at most"),
    ("model.reference_kind='windows'", "leave the first at 'mixture' where the second"),
    (
        "model.reference=9 model.reference_kind='windows' data.whiten=True",
        "windows are chosen for pixels as they are",
    ),
    ("data.image_size=128 optimizer.accumulate=128", "must be a multiple of 4"),
]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [("released_gaussians25", *case) for case in COMBINATIONS]
    + [("cifar10", *case) for case in IMAGE_COMBINATIONS],
)
def test_conflicting_fields_are_refused(name: str, changes: str, expected: str):
    found = problems(name, read(changes))
    assert any(expected in problem for problem in found), found


# Recipe, the circumstances, and fields that nothing reads under them.
_IN_IMAGES = """
data.path='a' data.label_column='y' data.tfds='b' data.tfds_dir='c' data.limit=5
data.drop_columns=('a',) data.header='absent'
data.split='d' data.test_split='e' data.crop=(0,0,8,8) data.image_size=64
data.channels=1 data.num_threads=4 data.prefetch=2 data.num_workers=1
data.test_fraction=0.5 data.flip=True data.on_device=True data.skip_corrupt=True
evaluation.batch_size=10 evaluation.inception=True evaluation.num_kept_features=100
evaluation.preprocessing='pytorch_fid' evaluation.reference='test'
model.remat='blocks' model.dtype='bfloat16' model.unet.nf=32 model.encoder.ngf=32
"""
UNREAD = [
    ("released_gaussians25", "game.gamma=0.0", "game.lazy_reg=4"),
    ("released_gaussians25", "game.recon='mse'", "game.recon_floor=0.5"),
    ("gaussians25", "", _IN_IMAGES),
    ("breast_cancer", "", "data.image_size=64 data.num_patches=5"),
    ("digits", "", "model.mlp.hidden=(8,) model.mlp.norm='batch'"),
    ("digits", "", "evaluation.inception_weights='weights.pth' data.limit=9"),
    ("folder", "", "data.tfds='cifar10' data.held_out_classes=(1,)"),
    ("cifar10", "", "data.test_fraction=0.5 data.path='images'"),
    ("lsun_church128", "", "diffusion.time_eps=0.1"),
    ("plane", "compilation_cache.enabled=False", "compilation_cache.directory='a'"),
]


@pytest.mark.parametrize(("name", "circumstances", "unread"), UNREAD)
def test_fields_that_nothing_would_read_are_refused(name, circumstances, unread):
    circumstances, unread = read(circumstances), read(unread)
    assert problems(name, circumstances) == []
    config = recipe(name, circumstances | unread)
    found = config_lib.problems(config)
    told = "nothing would read the first", "the first is read only with"
    assert all(any(text in problem for text in told) for problem in found)
    assert sorted(problem.split(" is ")[0] for problem in found) == sorted(unread)
    # What a run was trained with is no reason not to use it.
    assert config_lib.problems(config, saved=True) == []


def test_a_problem_that_follows_from_another_is_not_reported():
    changes = {"model.unet.ch_mult": (1, 0), "model.unet.attn_resolutions": (2,)}
    (problem,) = problems("cifar10", changes)
    assert problem.startswith("model.unet.ch_mult is (1, 0)")
    # All others are, at once.
    changes |= {"data.image_size": 24, "optimizer.accumulate": 3, "game.gamma": -1.0}
    changes |= {"seed": "one", "game.gamma_final": 0.1}
    assert [problem.split(" is ")[0] for problem in problems("cifar10", changes)] == [
        *("data.image_size", "game.gamma", "model.unet.ch_mult", "seed"),
        "optimizer.accumulate",
    ]


def test_the_allowed_names_are_those_of_the_code():
    assert choices.ALLOWED["diffusion.variance"] == diffusion.VARIANCES
    assert choices.ALLOWED["diffusion.time"] == (*diffusion.TIMES, "equal_cost")
    assert tuple(synthetic.SYNTHETIC) == choices.SYNTHETIC
    named = {name for names in checks.READ_WHEN.values() for name in names.split()}
    assert named <= set(BASE) | {"model.mlp", "model.unet", "model.encoder"}
    assert config_lib.FREE_ON_RESUME <= set(BASE)


_PROCESSES = {
    "diffusion.num_steps": st.integers(1, 128),
    "diffusion.variance": st.sampled_from(diffusion.VARIANCES),
    "diffusion.time": st.sampled_from(diffusion.TIMES),
    "diffusion.beta_min": st.floats(1e-6, 2.0),
    "diffusion.beta_max": st.floats(1e-6, 70.0),
    "diffusion.time_eps": st.sampled_from((0.0, 1e-6, 1e-3, 0.5)),
    "diffusion.keep_scale": st.booleans(),
    "diffusion.max_beta": st.sampled_from((1e-6, 0.5, 0.999, 0.999999)),
    "diffusion.min_posterior_var": st.sampled_from((None, 1e-30, 1e-4)),
}


@settings(max_examples=100)
@given(st.fixed_dictionaries(_PROCESSES))
def test_a_schedule_can_be_made_if_the_config_is_valid(process: dict[str, Any]):
    config = recipe("plane", process)
    if config_lib.problems(config, saved=True) == []:
        diffusion.schedule_values(**config.diffusion)


@pytest.mark.parametrize("ch_mult", [(1,), (3, 1, 2)])
@pytest.mark.parametrize("nf", [12, 30, 34, 132])
def test_networks_can_be_built_if_their_widths_are_valid(nf: int, ch_mult: tuple):
    changes = {"model.unet.nf": nf, "model.unet.ch_mult": ch_mult}
    config = recipe("digits", changes | {"model.unet.attn_resolutions": ()})
    init = models.build(config.model, (8, 8, 1)).init
    if config_lib.problems(config) == []:
        jax.eval_shape(init, jax.random.key(0))
    else:
        with pytest.raises((TypeError, ZeroDivisionError)):
            jax.eval_shape(init, jax.random.key(0))


_IMPORTS = f"""
import runpy, sys
import ddaebm_jax.config.flags
for path in {[str(CONFIGS / f"{name}.py") for name in RECIPES]!r}:
    config = runpy.run_path(path)["get_config"]()
    ddaebm_jax.config.problems(config)
loaded = set(sys.modules)
names = "data models evaluation training diffusion objective game sharding".split()
print(sorted({{"jax", "numpy", *("ddaebm_jax." + n for n in names)}} & loaded))
"""


def test_configs_and_recipes_load_nothing_that_they_describe():
    assert python("-c", _IMPORTS) == (0, "[]\n", "")


@pytest.mark.parametrize("text", ["{", "[1]", "NaN", '{"seed": 1}'])
def test_a_damaged_config_file_is_a_config_error(text: str):
    with pytest.raises(config_lib.ConfigError, match=r"is not|gamma is missing"):
        config_lib.from_json(text)


def test_configs_of_versions_with_fewer_fields_are_read():
    values = recipe("gaussians25").to_dict()
    del values["game"]["energy_l2"], values["data"]["flip"]
    read = dict(fields.leaves(config_lib.from_json(json.dumps(values))))
    assert read["game.energy_l2"] == 0.0 and read["data.flip"] is False
    assert read["game.gamma"] == 0.002


def test_configs_of_versions_with_more_fields_are_read():
    values = recipe("gaussians25").to_dict()
    values["recovery"]["save_patience"] = 600
    values["model"]["mlp"]["fourier_octaves"] = 0
    text = json.dumps(values)
    assert (
        config_lib.differences(config_lib.from_json(text), recipe("gaussians25")) == {}
    )
    values["model"]["mlp"]["fourier_octaves"] = 3
    with pytest.raises(config_lib.ConfigError, match="fourier_octaves is not a field"):
        config_lib.from_json(json.dumps(values))


def test_differences_and_the_fields_that_a_resumed_run_may_change():
    old, new = recipe("cifar10"), recipe("cifar10", {"game.gamma": 0.5})
    assert config_lib.differences(old, new) == {"game.gamma": (0.02, 0.5)}
    what_a_fid_is = "num_samples inception inception_weights preprocessing reference"
    for name in (*what_a_fid_is.split(), "num_samples_on_the_way"):
        assert f"evaluation.{name}" not in config_lib.FREE_ON_RESUME
    assert "evaluation.batch_size" in config_lib.FREE_ON_RESUME
    assert config_lib.decays(old) and config_lib.decays(recipe("gaussians25"))
    assert not config_lib.decays(recipe("released_gaussians25"))
