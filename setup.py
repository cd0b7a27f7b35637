"""Packaging: ``pip install .`` for users with their own environment; ``make demo`` and ``make test`` use
requirements.txt.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="scf_fast",
    version="0.1.0",
    description="Sphere Confidence Face training with fused Triton kernels, DALI input and DeepSpeed ZeRO",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["scf_fast*"]),  # through the links to kernels/ and pipelines/
    package_data={"scf_fast": ["recipes/*.yaml", "py.typed"]},
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
            "mpmath>=1.3",
            "ruff>=0.12",
            "scikit-learn>=1.4",
        ],
    },
)
