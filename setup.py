"""Packaging: ``megamix`` from the checkout's root, ``megamix_kernels`` from ``kernels/``, configs and job scripts as
package data."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
(VERSION,) = re.findall(r'__version__ = "(.+?)"', (ROOT / "megamix" / "__init__.py").read_text())

# deepspeed imports torch while it is being built, so the Makefile installs torch before this package.
REQUIRES = [
    "deepspeed>=0.19.8",
    "matplotlib",
    "numpy>=1.26",
    "pydantic>=2.9",
    "pyyaml",
    "regex",
    "rich",
    "safetensors>=0.5",
    "scipy>=1.14",
    "tokenizers>=0.21",
    "torch>=2.11",
    "transformers>=5.17",
    "typer>=0.16",
    "zstandard",
]
EXTRAS = {
    "megatron": ["megatron-core>=0.16.1"],
    "hf": ["accelerate"],
    "parquet": ["pyarrow"],
    "swarm": ["cvxpy>=1.9", "lightgbm>=4.6", "scikit-learn>=1.7"],
    "cuda": ["triton>=3.6"],
    "bench": ["cut-cross-entropy==25.1.1", "liger-kernel==0.8.5", "quack-kernels==0.6.5"],
    "tensorboard": ["tensorboard"],
    "wandb": ["wandb"],
    "dev": [
        "accelerate",
        "codespell",
        "cvxpy>=1.9",
        "grimp",
        "hypothesis",
        "import-linter",
        "lightgbm>=4.6",
        "markdown-it-py",
        "megatron-core>=0.16.1",
        "packaging",
        "pyarrow",
        "pyright",
        "pytest",
        "pytest-benchmark",
        "pytest-timeout",
        "pytest-xdist>=3.8",
        "ruff",
        "scikit-learn>=1.7",
        "setuptools>=77",
        "tensorboard",
        "triton>=3.6",
    ],
}

setup(
    name="megamix",
    version=VERSION,
    description="Online data mixing for language-model pretraining, under DeepSpeed and Megatron",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(".", include=["megamix", "megamix.*"]),
        *find_packages("kernels", include=["megamix_kernels", "megamix_kernels.*"]),
        "megamix.configs",
        "megamix.slurm",
    ],
    package_dir={
        "megamix_kernels": "kernels/megamix_kernels",
        "megamix.configs": "configs",
        "megamix.slurm": "slurm",
    },
    package_data={
        "megamix": ["py.typed"],
        "megamix_kernels": ["py.typed"],
        "megamix.configs": ["*.yaml", "**/*.yaml"],
        "megamix.analysis.report": ["*.css", "*.js"],
        "megamix.slurm": ["*.sbatch", "*.sh"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megamix = megamix.cli:main"]},
)
