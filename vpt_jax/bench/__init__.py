"""How fast a prompted network trains and evaluates: `python -m vpt_jax.bench`."""
