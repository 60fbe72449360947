"""The CPU kernels in C++: faster implementations of operators that Python has for every device.

They are compiled for this machine when first needed (one to two minutes, said on stderr) and kept in the user's cache.
Nothing depends on them but speed: without a C++ compiler, or with ``RWFX_NATIVE=0``, the Python implementations run,
and they are what runs on every other device.

The library registers its kernels for the dispatch keys ``CPU`` and ``AutogradCPU`` of the operators that Python
defines for all devices; so it may be loaded before or after a model is transformed.
"""

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from shutil import which

import torch

SOURCES = (
    "walk.cpp",
    "remember.cpp",
    "magnitude.cpp",
    "examples.cpp",
    "linear.cpp",
    "optim.cpp",
    "sparse.cpp",
    "index.cpp",
    "keys.cpp",
    "candidates.cpp",
    "extremes.cpp",
)
HEADERS = (
    "random.h",
    "draw.h",
    "rows.h",
    "memory.h",
    "keys.h",
    "buckets.h",
    "vectors.h",
    "packing.h",
    "sparse_products.h",
)
_HERE = Path(__file__).parent
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")


@cache
def ready() -> bool:
    """Compile the kernels where that has not been done and load them; False where they cannot be had.

    A failure is a warning, once, that tells the reason.
    """
    if not wanted():
        return False
    try:
        library = _library()
        if not library.exists():
            print(f"rwfx: compiling its CPU kernels, once for this machine, into {library.parent}", file=sys.stderr)
            _build(library)
        torch.ops.load_library(str(library))
    except Exception as error:  # a compiler can fail in any way, and nothing may depend on it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            f"rwfx runs without its CPU kernels, which could not be compiled or loaded: {reason[-1]}. Training is "
            "slower and otherwise the same. They need a C++ compiler (g++ or clang++); RWFX_NATIVE=0 leaves them out.",
            stacklevel=2,
        )
        return False
    return True


def loaded() -> bool:
    """Whether the kernels are what runs on a CPU."""
    # Asked for every weight that is made or moved: once it is known, no source is read again.
    return wanted() and (bool(ready.cache_info().currsize) or _library().exists()) and ready()


def load_if_built() -> None:
    """Load the kernels where an earlier run has compiled them."""
    with suppress(OSError, RuntimeError):  # no home directory, or none that can be read: ready() will say so
        loaded()


def wanted() -> bool:
    """Whether the environment allows the kernels."""
    return os.environ.get("RWFX_NATIVE", "1") != "0"


def _library() -> Path:
    """Where the library for these sources, this torch and this processor lies."""
    key = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        key.update((_HERE / name).read_bytes())
    for fact in (torch.__version__, torch.__config__.show(), platform.machine(), _processor(), *_FLAGS):
        key.update(fact.encode())
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "rwfx" / f"kernels-{key.hexdigest()[:16]}.so"


def _processor() -> str:
    """The instructions that ``-march=native`` may use: a home directory can be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(library: Path) -> None:
    """Compile into a folder of this process alone and move the result: a build that is cut short leaves nothing."""
    torch_at = Path(torch.__file__).parent
    compiler = os.environ.get("CXX") or next(filter(which, ("g++", "c++", "clang++")), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler was found (looked for $CXX, g++, c++ and clang++)")
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    compile_ = [compiler, *_FLAGS, *openmp, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    compile_ += ["-isystem", str(torch_at / "include")]
    compile_ += ["-isystem", str(torch_at / "include" / "torch" / "csrc" / "api" / "include")]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = [f"{folder}/{name}.o" for name in SOURCES]
        _run_all([*compile_, "-c", str(_HERE / name), "-o", o] for name, o in zip(SOURCES, objects, strict=True))
        linked = f"{folder}/kernels.so"
        lib = str(torch_at / "lib")
        link = [compiler, "-shared", *openmp, *objects, f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-lc10"]
        _run_all([[*link, "-o", linked]])
        os.replace(linked, library)


def _run_all(commands: Iterable[list[str]]) -> None:
    """Run the commands side by side; raise ``RuntimeError`` with what the compiler wrote where one fails."""
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    failures = [(process.communicate()[1], process.returncode) for process in running]
    for written, status in failures:
        if status:
            errors = [line for line in written.splitlines() if "error" in line]
            raise RuntimeError((errors or written.splitlines() or [f"the compiler ended with status {status}"])[0])
