import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

TRANSFORMERS = ["transformers>=5.6", "accelerate>=1.0"]  # it needs accelerate for GPUs and GGUF files
RAY = ["ray[data]>=2.60"]
GPU = ["triton>=3.6; sys_platform == 'linux'"]  # the tests interpret its kernels
TEST = [
    *TRANSFORMERS,
    *RAY,
    *GPU,
    "hypothesis>=6.100",
    "import-linter>=2.1",
    "mypy>=1.11",
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.8",
    "types-psutil",
    "types-tqdm",
]
BENCH = ["matplotlib>=3.9"]  # bench.py --plot

CSRC = Path("nanovllm/csrc")
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
# one source, compiled for each instruction set; the library chooses when it is loaded
LEVELS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mavx512vbmi"]}

EXACTLY = ["-ffp-contract=off"]  # no product is added to something before it is rounded


class BuildNative(build_ext):
    """A shared library with a plain C interface, loaded by ctypes: no Python headers, no Python symbols.

    One that lies in the source tree is taken as it is, unless a source is newer or --force is given.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        in_place = self.get_ext_filename(ext.name)
        if not self.force and not newer_group([*ext.sources, *ext.depends], in_place):
            self.copy_file(in_place, str(target))
            return
        levels = LEVELS if platform.machine() in ("x86_64", "AMD64") else {}
        parts: list[tuple[str, str, list[str]]] = []
        for source in ext.sources:
            name = Path(source).stem
            if name == "quantize":
                for level, flags in {"generic": [], **levels}.items():
                    parts.append((source, level, [*flags, *EXACTLY, f"-DLEVEL={level}"]))
            else:
                parts.append((source, "", levels.get(name.removeprefix("level_"), [])))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [path for paths in pool.map(self._compiled, *zip(*parts, strict=True)) for path in paths]
        self.compiler.link_shared_object(objects, str(target), extra_postargs=["-fopenmp"], target_lang="c++")

    def _compiled(self, source: str, folder: str, flags: list[str]) -> list[str]:
        flags = ["-std=c++17", "-O3", "-fopenmp", *flags]
        place = str(Path(self.build_temp, folder))
        return self.compiler.compile([source], output_dir=place, extra_postargs=flags)


NATIVE = Extension(
    "nanovllm.csrc.libnanovllm",
    # functions that levels share, such as those of the standard library, are taken from the first file that has them:
    # it must be one that runs everywhere
    sources=[
        str(CSRC / f"{name}.cpp")
        for name in ("library", "pack", "level_generic", *(f"level_{level}" for level in LEVELS), "quantize")
    ],
    depends=["setup.py", *sorted(str(path) for path in CSRC.glob("*.h"))],
    optional=True,  # without a compiler torch's kernels run
)

setup(
    name="nanovllm",
    version="0.1.0",
    description="A small, exact LLM inference engine on PyTorch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["nanovllm", "nanovllm.*"]),
    package_data={"nanovllm": ["py.typed", "csrc/*.h"]},
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildNative},
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
    extras_require={"test": TEST, "dev": TEST, "bench": BENCH, "gpu": GPU, "ray": RAY, "transformers": TRANSFORMERS},
    entry_points={"console_scripts": ["nanovllm = nanovllm.cli.main:main"]},
)
