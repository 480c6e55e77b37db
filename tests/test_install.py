"""What installing the project in place makes importable."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_a_clone_named_like_the_package_does_not_hide_it(tmp_path):
    """Python looks into the current folder first, where the clone itself could pass for the package."""
    pytest.importorskip("setuptools", minversion="77")
    clone, wheels, site = (tmp_path / name for name in ("uhd_jax", "wheels", "site"))
    (clone / "uhd_jax").mkdir(parents=True)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "uhd_jax/__init__.py"):
        shutil.copy(ROOT / name, clone / name)
    build = f"from setuptools import build_meta; print(build_meta.build_editable({str(wheels)!r}))"
    wheels.mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)
    with zipfile.ZipFile(next(wheels.iterdir())) as wheel:
        wheel.extractall(site)
    # Without this environment's own packages (-S), among which the project is installed already.
    show = f"import site; site.addsitedir({str(site)!r}); import uhd_jax; print(uhd_jax.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", show], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(clone / "uhd_jax" / "__init__.py")
