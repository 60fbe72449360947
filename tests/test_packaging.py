import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import rwfx
from rwfx import native

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]


def modules():
    """Every module in the tree, by dotted name."""
    for folder, name in (("rwfx", "rwfx"), ("passes", "rwfx.passes")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[:1] != ("passes",):
                yield ".".join([name, *parts]).removesuffix(".__init__")


def test_the_build_names_every_package():
    in_tree = {path.parent.relative_to(ROOT) for folder in ("rwfx", "passes") for path in (ROOT / folder).rglob("*.py")}
    names = {".".join(path.parts) for path in in_tree}
    assert set(PACKAGES) == {"rwfx.passes" if name == "passes" else name for name in names}


def test_the_build_takes_the_sources_of_the_kernels():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["rwfx.native"]
    for name in (*native.SOURCES, *native.HEADERS):
        assert any(fnmatchcase(name, pattern) for pattern in patterns), name


def test_passes_are_one_package_reached_by_a_link():
    assert (ROOT / "rwfx" / "passes").is_symlink()
    assert (ROOT / "rwfx" / "passes").resolve() == ROOT / "passes"
    tracked = subprocess.run(["git", "ls-files", "-s", "rwfx/passes"], cwd=ROOT, capture_output=True, text=True)
    assert tracked.stdout.startswith("120000") or tracked.returncode


def test_the_version_is_told_once_and_in_the_changelog():
    assert rwfx.__version__ == PROJECT["project"]["version"]
    assert f"## {rwfx.__version__}" in (ROOT / "rwfx" / "CHANGELOG.md").read_text()


def test_nothing_optional_is_imported_with_the_package():
    code = "import rwfx, sys; print([m for m in ('matplotlib', 'torchvision', 'sklearn') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_module(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--outdir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    for module in modules():
        path = module.replace(".", "/")
        assert f"{path}.py" in names or f"{path}/__init__.py" in names
    assert {"rwfx/py.typed", "rwfx/CHANGELOG.md"} <= set(names)
    assert not any(name.startswith("passes/") for name in names)
    # A wheel built from the sdist, as an installer without wheels would do.
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path / "again", sdist], check=True)
    (again,) = (tmp_path / "again").glob("*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(names)
