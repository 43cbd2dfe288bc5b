"""`python -m rmft_jax`: the command line, where no `rmft` is on the path."""

from rmft_jax.cli import main

if __name__ == "__main__":
    main()
