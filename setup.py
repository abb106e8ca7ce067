"""Metadata and dependencies of conv_pallas; the settings of the tools are in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# The CUDA wheels, triton and libtpu exist for Linux only.  Elsewhere these extras install nothing
# more, and `import conv_pallas` works all the same.
LINUX = "; sys_platform == 'linux'"

DEMO = ["matplotlib", "optax", "rich", "scikit-learn"]
EXAMPLES = [*DEMO, "scipy"]
BENCH = ["pytest-benchmark", "rich"]
TEST = [
    "absl-py",  # jax's and flax's own test files, run against our layer, are written with it
    "flatbuffers",  # jax.export needs it to serialise
    "hypothesis",
    "numpy",
    "orbax-checkpoint",
    "pytest>=8",
    "pytest-benchmark",
    "pytest-xdist",
    "ruff==0.17.*",  # a new minor version may format differently, and `make lint` would fail
    "setuptools",  # to see what is built
]


class Anew(build_py):
    """Builds from nothing: kernels are found by being there, those of an earlier build too."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


PACKAGE = Path(__file__).with_name("conv_pallas") / "__init__.py"

setup(
    name="conv_pallas",
    version=re.search(r'^__version__ = "(.+)"$', PACKAGE.read_text(encoding="utf-8"), re.M)[1],
    description="A faster drop-in for flax.nnx.Conv in temporal convolutional networks",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The conv_pallas authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["jax", "flax", "convolution", "tcn", "wavenet", "pallas", "triton"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.12",
    # Older releases of flax fail to import beside JAX 0.11.2.
    install_requires=["jax>=0.11.2", "flax>=0.12.10"],
    extras_require={
        "cuda": [f"jax[cuda13]{LINUX}", f"triton{LINUX}", f"jax-triton>=0.4.1{LINUX}"],
        "tpu": [f"jax[tpu]{LINUX}"],
        "demo": DEMO,
        "examples": EXAMPLES,
        "bench": BENCH,
        "test": sorted({*EXAMPLES, *BENCH, *TEST}),
        # Compiles for chips that are not there.  jax's own extras pin the libtpu and the CUDA
        # plugin that go with each jax; `cuda13-local` is the one without NVIDIA's libraries,
        # which compiling does not need (triton's wheel carries ptxas).
        "aot": [f"jax[tpu,cuda13-local]{LINUX}", f"triton{LINUX}", f"jax-triton>=0.4.1{LINUX}"],
    },
    # The device code lies in kernels/, beside the package.  It is installed inside the package
    # because another project on PyPI owns the top-level name.
    packages=[*find_packages(include=["conv_pallas", "conv_pallas.*"]), "conv_pallas.kernels"],
    package_dir={"conv_pallas.kernels": "kernels"},
    package_data={"conv_pallas": ["py.typed"], "conv_pallas.kernels": ["triton_tuned_*.json"]},
    cmdclass={"build_py": Anew},
    zip_safe=False,
)
