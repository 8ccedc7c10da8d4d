"""Train a DDAEBM, or use a trained one: the command `ddaebm`, from a checkout.

python launch/main.py --config=configs/gaussians25.py --config.game.gamma=0.01
python launch/main.py --mode=sample --workdir=runs/gaussians25/... --num_samples=1000

--help lists the modes and their flags, --mode=sample --help explains those of sampling.
"""

from ddaebm_jax.commands import cli

if __name__ == "__main__":
    cli.main()
