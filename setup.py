"""Packaging: ``megamix`` from the checkout's root, ``megamix_kernels`` from ``kernels/``, configs and job scripts as
package data."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
(VERSION,) = re.findall(r'__version__ = "(.+?)"', (ROOT / "megamix" / "__init__.py").read_text())

REQUIRES = [
    "numpy>=1.26",
    "pydantic>=2.10",
    "pyyaml",
    "rich",
    "scipy>=1.14",
    "typer>=0.19",
]
TORCH = ["torch>=2.6"]
# deepspeed imports torch while it is being built, so the Makefile installs torch before this package.
DEEPSPEED = ["deepspeed>=0.16.9", "safetensors>=0.5", "transformers>=4.51", *TORCH]
MEGATRON = ["megatron-core>=0.16.1", "safetensors>=0.5", *TORCH]
HUGGING_FACE = ["accelerate", "safetensors>=0.5", "tokenizers>=0.21", "transformers>=4.51", *TORCH]
PREPARE = ["pyarrow", "regex", "tokenizers>=0.21", "zstandard"]
REMOTE = ["fsspec"]
SWARM = ["cvxpy>=1.9", "lightgbm>=4.6", "scikit-learn>=1.7"]
PLOT = ["matplotlib"]
CUDA = ["triton>=3.6"]
TENSORBOARD = ["tensorboard"]
EXTRAS = {
    "torch": TORCH,
    "deepspeed": DEEPSPEED,
    "megatron": MEGATRON,
    "hf": HUGGING_FACE,
    "prepare": PREPARE,
    "remote": REMOTE,
    "swarm": SWARM,
    "plot": PLOT,
    "cuda": CUDA,
    "tensorboard": TENSORBOARD,
    "wandb": ["wandb"],
    "datasets": ["datasets>=3"],
    "sentencepiece": ["protobuf", "sentencepiece>=0.2", "tokenizers>=0.21"],
    # Each of these wants one version, and some a GPU: they are in none of the others.
    "bench": ["cut-cross-entropy==25.1.1", "liger-kernel[cutedsl]==0.8.5", "quack-kernels==0.6.5"],
    "all": sorted({*DEEPSPEED, *MEGATRON, *HUGGING_FACE, *PREPARE, *REMOTE, *SWARM, *PLOT, *CUDA, *TENSORBOARD}),
    "docs": ["linkchecker>=10.6", "pdoc>=16"],
    "dev": [
        "codespell",
        "grimp",
        "hypothesis",
        "import-linter",
        "markdown-it-py",
        "packaging",
        "pandas",
        "pyright",
        "pytest",
        "pytest-benchmark",
        "pytest-timeout",
        "pytest-xdist>=3.8",
        "ruff",
        "sentencepiece>=0.2",
        "setuptools>=77",
    ],
}

setup(
    name="megamix",
    version=VERSION,
    description="Online data mixing for language-model pretraining, under DeepSpeed and Megatron",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
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
