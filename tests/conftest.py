"""Compiled programs are kept from one run of the tests to the next: in pytest's cache, not in the user's."""

import os
from pathlib import Path

import vpt_jax as vj

os.environ['VPT_JAX_CACHE'] = str(Path(__file__).parents[1] / '.pytest_cache' / 'd' / 'vpt_jax')
vj.keep_compiled()
