"""The package as users install it: wheel and sdist bring ``scf_fast`` alone, and Hugging Face's ``kernels``, which
transformers uses, works beside it in either order of installation.

Nothing is downloaded: the temporary environments see the packages of the test environment, and the wheel of ``kernels``
is put together again from its installed files.
"""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "scf_fast", "kernels", "pipelines"]
BUILT_IN_PLACE = {"build", "scf_fast.egg-info"}  # what a build leaves in a checkout; .gitignore has both

RUN_OURS = """
import sys
import torch
import scf_fast.kernels, scf_fast.pipelines.sampling.sampler
assert scf_fast.__file__.startswith(sys.prefix), scf_fast.__file__
kappa = torch.tensor([100.0], dtype=torch.float64)
value = scf_fast.kernels.log_vmf_normalizer(kappa, 3)  # in 3 dimensions it is log kappa - log 4 pi - log sinh kappa
assert abs(value.item() - (kappa.log() - kappa - torch.log(torch.tensor(2 * torch.pi))).item()) < 1e-6, value
"""
RUN_THEIRS = """
import sys
import torch
import kernels
assert kernels.__file__.startswith(sys.prefix), kernels.__file__
@kernels.use_kernel_forward_from_hub("Relu")
class Relu(torch.nn.Module):
    def forward(self, x):
        return x.relu()
layer = kernels.kernelize(Relu(), mode=kernels.Mode.INFERENCE, device="cpu", use_fallback=True)
assert layer(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
"""
ABSENT = """
import importlib.util
assert importlib.util.find_spec({name!r}) is None
"""


def run(*command, cwd):
    """Runs a command that must succeed, far from the checkout, and returns what it prints."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def build(source, folder, *kinds):
    """Builds ``"wheel"`` or ``"sdist"`` of a source folder as pip does, with the setuptools that is installed here."""
    program = "from setuptools import build_meta\n"
    program += "\n".join(f"build_meta.build_{kind}({str(folder)!r})" for kind in kinds)
    # -I leaves the checkout out of sys.path: setuptools calls a plugin of Hugging Face's kernels, by that name.
    run(sys.executable, "-I", "-c", program, cwd=source)
    return folder


def files_in(wheel):
    """Returns the files of a wheel without its metadata."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout's sources, in which an earlier version has been built before."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, copy / name)
    left_over = copy / "build" / "lib" / "kernels" / "__init__.py"
    left_over.parent.mkdir(parents=True)
    left_over.touch()
    return copy


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    """The folder of the wheel and the sdist."""
    return build(checkout, tmp_path_factory.mktemp("built"), "wheel", "sdist")


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("scf_fast-*.whl"))


def test_the_wheel_holds_scf_fast_and_nothing_beside_it(wheel, checkout):
    in_checkout = {
        str((Path(folder) / name).relative_to(checkout))
        for folder, _, names in os.walk(checkout / "scf_fast", followlinks=True)
        for name in names
    }
    assert {"scf_fast/kernels/__init__.py", "scf_fast/pipelines/index.py", "scf_fast/py.typed"} < in_checkout
    assert files_in(wheel) == in_checkout
    assert {path.name for path in checkout.iterdir()} <= {*SOURCES, *BUILT_IN_PLACE}


def test_the_source_distribution_builds_the_same_wheel(built, wheel, tmp_path):
    shutil.unpack_archive(next(built.glob("scf_fast-*.tar.gz")), tmp_path)
    (source,) = tmp_path.iterdir()
    assert not {"tests", "bench", "kernels", "pipelines"} & {path.name for path in source.iterdir()}
    build(source, tmp_path, "wheel")
    assert files_in(next(tmp_path.glob("scf_fast-*.whl"))) == files_in(wheel)


class Environment:
    """A virtual environment that sees the packages of this one, but for ``kernels`` and ``scf_fast``."""

    def __init__(self, folder):
        self.folder, self.python = folder, folder / "bin" / "python"
        venv.create(folder, symlinks=True)
        shared = folder / "shared"
        shared.mkdir()
        for site in map(Path, sys.path):
            if site != ROOT and any(site.glob("*.dist-info")):
                for entry in site.iterdir():
                    package = entry.name.removeprefix("__editable__.").partition("-")[0]
                    if package not in ("kernels", "scf_fast", "__pycache__") and not (shared / entry.name).exists():
                        (shared / entry.name).symlink_to(entry)
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "shared.pth").write_text(f"{shared}\n")

    def pip(self, *arguments):
        self.run("-m", "pip", "--disable-pip-version-check", *arguments)

    def install(self, wheel):
        self.pip("install", "-q", "--no-index", "--no-deps", "--no-compile", wheel)

    def uninstall(self, name):
        self.pip("uninstall", "-q", "-y", name)

    def run(self, *arguments):
        return run(self.python, *arguments, cwd=self.folder)


@pytest.fixture(scope="module")
def hugging_face_wheel(tmp_path_factory):
    """The wheel of Hugging Face's ``kernels``, of the files that pip has installed from it."""
    distribution = metadata.distribution("kernels")
    (tag, *_) = [line.split()[1] for line in distribution.read_text("WHEEL").splitlines() if line.startswith("Tag:")]
    path = tmp_path_factory.mktemp("hugging_face") / f"kernels-{distribution.version}-{tag}.whl"
    record = []
    with zipfile.ZipFile(path, "w") as archive:
        for file in distribution.files:
            if file.hash and ".." not in file.parts and file.name not in ("INSTALLER", "REQUESTED", "direct_url.json"):
                archive.write(file.locate(), str(file))
                record.append(f"{file},{file.hash.mode}={file.hash.value},{file.size}\n")
        record_file = f"kernels-{distribution.version}.dist-info/RECORD"
        archive.writestr(record_file, "".join([*record, f"{record_file},,\n"]))
    return path


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours_first", "theirs_first"])
def test_installed_beside_the_kernels_of_hugging_face(wheel, hugging_face_wheel, ours_first, tmp_path):
    environment = Environment(tmp_path / "environment")
    first, second = (wheel, hugging_face_wheel) if ours_first else (hugging_face_wheel, wheel)
    environment.install(first)
    environment.install(second)
    environment.run("-c", RUN_OURS + RUN_THEIRS)
    if ours_first:
        environment.uninstall("scf_fast")
        environment.run("-c", ABSENT.format(name="scf_fast") + RUN_THEIRS)
    else:
        environment.uninstall("kernels")
        environment.run("-c", ABSENT.format(name="kernels") + RUN_OURS)


def test_the_commands_run_from_the_wheel(wheel, tmp_path):
    environment = Environment(tmp_path / "environment")
    environment.install(wheel)
    assert "--stage" in environment.run("-m", "scf_fast.train", "--help")
    assert "--verify" in environment.run("-m", "scf_fast.pipelines.index", "--help")
