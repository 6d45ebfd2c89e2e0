"""Maps the folders at the root into the import namespace `longhaul`; everything else is in pyproject.toml.

`longhaul` is a namespace without an `__init__`: there is no `longhaul/` folder, so nothing in a checkout can shadow the
installed package, and a user's own `models.py` or `parallel.py` is never in the way.
"""

from setuptools import find_packages, setup

ROOTS = ("models", "parallel", "launcher", "configs")
SUBPACKAGES = [f"{root}.{name}" for root in ROOTS for name in find_packages(root)]

setup(
    packages=[f"longhaul.{name}" for name in (*ROOTS, *SUBPACKAGES)],
    package_dir={f"longhaul.{root}": root for root in ROOTS},
    package_data={"": ["*.yaml", "py.typed"]},
    include_package_data=False,
)
