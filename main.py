"""BYOL in JAX: python main.py --config=configs/div2k.py[:ARG] [--workdir=DIR] [--mode=MODE]."""

from byol_jax.__main__ import run

if __name__ == '__main__':
    run()
