"""What pyproject.toml cannot say: where CMake starts, and that ``kernels/`` is installed as ``pyquant.kernels``."""

from setuptools import find_packages, setup

setup(
    cmake_source_dir=".",
    packages=[*find_packages(include=["pyquant", "pyquant.*"]), "pyquant.kernels"],
    package_dir={"pyquant.kernels": "kernels"},
    package_data={
        "pyquant": [
            "py.typed",
            "integrations/shapes/*.json",
            *(f"demo/**/*.{kind}" for kind in ("json", "safetensors", "txt", "jinja")),
        ],
    },
)
