"""Packaging: ``pip install .`` for users with their own environment; ``make demo`` and ``make test`` use
requirements.txt.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Starts from an empty build folder.

    A wheel takes all of ``build/lib``, so one of a checkout that was built before would bring what has been moved or
    deleted since. Earlier versions left ``build/lib/kernels`` there, which is the name of another project's package.
    """

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    name="scf_fast",
    version="0.1.0",
    description="Sphere Confidence Face training with fused Triton kernels, DALI input and DeepSpeed ZeRO",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    # scf_fast/kernels and scf_fast/pipelines are links to the folders beside scf_fast/. A wheel and an sdist hold what
    # they lead to, so that nothing but scf_fast lies at the top of site-packages.
    packages=find_packages(include=["scf_fast*"]),
    package_data={"scf_fast": ["recipes/*.yaml", "py.typed"]},
    cmdclass={"build_py": BuildPy},
    python_requires=">=3.10,<3.14",
    install_requires=[
        "torch>=2.8",
        "triton>=3.4",
        "deepspeed>=0.19.8",
        "numpy>=1.26",
        "scipy>=1.11",
        "pillow>=10.1",
        "matplotlib>=3.8",
        "tensorboard>=2.15",
        "tqdm>=4.65",
        "PyYAML>=6.0",
        "safetensors>=0.4",
        "setuptools",
    ],
    extras_require={
        "dali": ["nvidia-dali-cuda130>=2.2; platform_system == 'Linux'"],
        "export": ["onnx>=1.17", "onnxscript>=0.6.1", "onnxruntime>=1.20"],
        "embed": ["pyarrow>=15"],
        "test": [
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-timeout>=2.2",
            "pytest-xdist>=3.5",
            "hypothesis>=6.90",
            "markdown-it-py>=3.0",
            "mpmath>=1.3",
            "scikit-learn>=1.4",
            "kernels>=0.10",  # Hugging Face's: ours is tested beside it
            "setuptools>=70.1",
            "ruff>=0.14",
            "codespell>=2.4",
            "mypy>=2.4",
            "types-PyYAML>=6.0",
            "types-tqdm>=4.65",
            "import-linter>=2.6",
        ],
    },
)
