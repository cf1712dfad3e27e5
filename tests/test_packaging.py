"""The wheel and the source distribution hold what they should, and the wheel works where no checkout is."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("so8t", "so8t_core", "verification", "pipeline")
LEFT_OUT = shutil.ignore_patterns(
    ".git",
    ".tox",
    ".venv",
    "venv",
    "runs",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    ".benchmarks",
    "*.gguf",
    "htmlcov",
    ".coverage*",
)


def build(source: Path, out: Path, *options: str) -> None:
    """A source distribution and a wheel made from it, with the backend that is installed here."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT, symlinks=True)
    build(folder / "source", folder / "out")
    [sdist], [wheel] = (folder / "out").glob("*.tar.gz"), (folder / "out").glob("*.whl")
    return sdist, wheel


def files_of_packages() -> set[str]:
    """Every file that the packages have in the checkout."""
    found = (path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}


def missing(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return files_of_packages() - set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(built: tuple[Path, Path]) -> None:
    assert missing(built[1]) == set()
    with zipfile.ZipFile(built[1]) as archive:
        more = {name for name in set(archive.namelist()) - files_of_packages() if ".dist-info/" not in name}
        [entry_points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        declared = archive.read(entry_points).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert more == set()
    assert "so8t = pipeline.cli.main:main" in declared
    assert "so8t = verification.commands.pytest_plugin" in declared


def test_a_data_file_that_is_not_packaged_would_be_seen(tmp_path: Path) -> None:
    """The same wheel without the line that packages templates and corpus lacks them."""
    shutil.copytree(ROOT, tmp_path / "source", ignore=LEFT_OUT, symlinks=True)
    settings = tmp_path / "source" / "pyproject.toml"
    text = settings.read_text(encoding="utf-8")
    line = 'verification = ["py.typed", "gate/*.yaml", "gguf/*.json", "show/templates/*", "logit_parity/corpus/*"]\n'
    assert line in text
    settings.write_text(
        text.replace(line, "").replace("[tool.setuptools]", "[tool.setuptools]\ninclude-package-data = false")
    )
    build(tmp_path / "source", tmp_path / "out", "--wheel")
    [wheel] = (tmp_path / "out").glob("*.whl")
    lost = missing(wheel)
    assert {"verification/gate/default_policy.yaml", "verification/show/templates/report.html.j2"} <= lost


def test_the_source_distribution_can_run_its_tests(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tox.ini", "constraints.txt", "README.md", "docs/ci.md", "tests/conftest.py", "configs/demo.yaml"} <= names
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    assert tests <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".gguf")]


@pytest.fixture(scope="module")
def elsewhere(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin/` of a fresh environment that has the wheel; the heavy packages are this one's, nothing of the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "venv" / "lib" / version / "site-packages"
    paths = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (packages / "borrowed.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--force-reinstall", str(built[1])], check=True, capture_output=True)
    return python.parent


def so8t(elsewhere: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in a folder that is no checkout."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "COV"))}
    return subprocess.run(
        [str(elsewhere / "so8t"), *arguments], cwd=folder, env=clean, capture_output=True, text=True, check=False
    )


def test_the_installed_package_is_the_wheels(elsewhere: Path, tmp_path: Path) -> None:
    code = f"import sys, {', '.join(PACKAGES)}; print(*(sys.modules[name].__file__ for name in {PACKAGES}))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(elsewhere / "python"), "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
    )
    assert all(str(elsewhere.parent) in path for path in done.stdout.split()), done.stdout


def test_commands_work_outside_a_checkout(elsewhere: Path, tmp_path: Path, tiny_gguf: Path) -> None:
    for arguments, words in (
        (["demo", "--help"], "so8t demo"),
        (["config-schema"], "run_dir"),
        (["doctor"], "llama-cpp-python"),
        (["lint", str(tiny_gguf)], "tensors"),
        (["demo", "train.stepz=1"], "train.stepz"),  # the demo's configuration was found, and read
    ):
        done = so8t(elsewhere, tmp_path, *arguments)
        assert words in done.stdout + done.stderr, (arguments, done.stdout[-500:], done.stderr[-500:])
        assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.soak
def test_the_demo_runs_outside_a_checkout(elsewhere: Path, tmp_path: Path) -> None:
    """Two steps of training: the road is whole, what it makes is not ready to be released, and both are said."""
    short = ["train.steps=2", "data.generator.rows=24", "data.generator.heldout_rows=12", "convert.types=[F16, Q8_0]"]
    done = so8t(elsewhere, tmp_path, "demo", "-q", *short, "verify.chunks=4", "answers=null")
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 1), done.stderr
    made = {path.name for path in (tmp_path / "runs" / "demo").rglob("*")}
    assert {"report.html", "manifest.json", "Modelfile", "adapter_model.safetensors"} <= made
