from pathlib import Path

from setuptools import find_packages, setup

TRANSFORMERS = ["transformers>=5.6", "accelerate>=1.0"]  # it needs accelerate for GPUs and GGUF files
TEST = [
    *TRANSFORMERS,
    "hypothesis>=6.100",
    "import-linter>=2.1",
    "mypy>=1.11",
    "pytest>=8.2",
    "pytest-cov>=5.0",
    "pytest-timeout>=2.3",
    "ruff>=0.8",
    "types-psutil",
    "types-tqdm",
]
GPU = ["triton>=3.6; sys_platform == 'linux'", "flash-attn>=2.6; sys_platform == 'linux'"]

setup(
    name="nanovllm",
    version="0.1.0",
    description="A small, exact LLM inference engine on PyTorch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["nanovllm", "nanovllm.*"]),
    package_data={"nanovllm": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "filelock>=3.13",
        "gguf>=0.17",
        "huggingface_hub>=0.34",
        "jinja2>=3.1",
        "platformdirs>=4.0",
        "psutil>=5.9",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "tqdm>=4.66",
        "xxhash>=3.4",
    ],
    extras_require={"test": TEST, "dev": TEST, "gpu": GPU, "transformers": TRANSFORMERS},
    entry_points={"console_scripts": ["nanovllm = nanovllm.cli.main:main"]},
)
