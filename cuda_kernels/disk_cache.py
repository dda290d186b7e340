"""What compilers made, kept on disk: a process compiles only what no process has compiled before.

An entry is named by a hash of all that it depends on (:func:`entry_name`), so it cannot be out of
date: after any change another name is looked for.  It lies in the user's cache folder, or where
``SKIP_SOFTMAX_CACHE_DIR`` says.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

import numpy as np

MOST = 1000  # entries of a kind; beyond that, the ones written first go
COMPILERS = ("numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings", "numpy")
LIBRARIES = ("nvvm", "nvJitLink")  # of the CUDA toolkit, wherever that is
NOT_OURS = {"numba", "numba_cuda", "llvmlite", "cuda", "numpy"}  # modules of the compilers
NOT_OURS |= {"cupy", "torch"}  # these bring arrays, and have no part in machine code
BESIDE_PYTHON = {"site-packages", "dist-packages"}  # the latter is Debian's
_DIGEST = hashlib.sha256().digest_size
_LOADED_AT = time.time()  # the package imports this module before any kernel
_complained: set[Path] = set()


def directory() -> Path:
    """Return the folder of all entries: ``SKIP_SOFTMAX_CACHE_DIR``, or one in the user's cache.

    Examples
    --------
    >>> directory().is_absolute()
    True
    """
    if chosen := os.environ.get("SKIP_SOFTMAX_CACHE_DIR"):
        return Path(chosen).absolute()
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "skip-softmax-lab"


def entry_name(modules: Iterable[str], *parts: Any) -> str | None:
    """Name an entry by sources, by compilers, and by whatever else it depends on.

    Parameters
    ----------
    modules : iterable of str
        Names of the modules that it is made by or of; what they import counts too.
    *parts
        Numbers, strings, None, and tuples of these.

    Returns
    -------
    str or None
        None where nothing can be kept: a module has no file, a part is of another type, or a
        source was changed after this process loaded the package, so that nobody knows which of
        the two it is running.

    Examples
    --------
    >>> entry_name(["cuda_kernels.gemm"], 64) == entry_name(["cuda_kernels.gemm"], 64)
    True
    >>> entry_name(["cuda_kernels.gemm"], 64) == entry_name(["cuda_kernels.gemm"], 128)
    False
    """
    files = [sources(module) for module in modules]
    if not all(files) or not all(map(_tells_all, parts)):
        return None
    key = hashlib.sha256()
    for file in sorted({file for some in files for file in some}):
        if _changed(file):
            return None
        key.update(file.read_bytes())
    key.update(repr((parts, compilers())).encode())
    return key.hexdigest()


def read(kind: str, name: str) -> bytes | None:
    """Return what was kept; None where nothing is, or it is damaged."""
    try:
        content = (directory() / kind / name).read_bytes()
    except OSError:
        return None
    kept = content[_DIGEST:]
    return kept if hashlib.sha256(kept).digest() == content[:_DIGEST] else None


def write(kind: str, name: str, content: bytes) -> None:
    """Keep something.  A reader finds all of it or nothing, whoever else writes at the time.

    Where nothing can be written a warning says so, once.
    """
    folder = directory() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="~") as unseen:
            file = Path(unseen, name)
            file.write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(file, folder / name)
        _forget_the_oldest(folder)
    except OSError as error:
        if folder not in _complained:
            _complained.add(folder)
            warnings.warn(
                f"what was compiled cannot be kept in {folder} ({error.strerror}), so every "
                "process compiles anew; set SKIP_SOFTMAX_CACHE_DIR to a folder that can be written",
                RuntimeWarning,
                stacklevel=2,
            )


def _forget_the_oldest(folder: Path) -> None:
    with suppress(OSError):  # another process forgets them too
        entries = [file for file in folder.iterdir() if file.is_file()]
        for file in sorted(entries, key=lambda file: file.stat().st_mtime)[:-MOST]:
            file.unlink()


@cache
def sources(module: str) -> tuple[Path, ...]:
    """List the files of a module and of all that it imports but what is installed.

    Installed are compilers and array libraries wherever they lie, what lies beside Python, and what
    is in another folder with the record of its distribution: by ``pip install --target``, or a
    wheel unpacked.  It does not matter where in a file something is imported.

    Examples
    --------
    >>> [file.stem for file in sources("cuda_kernels.ptx.fragment")]
    ['compiler', 'fragment', 'instruction', 'scalars']
    """
    found: dict[str, Path | None] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        file = found[name] = _file(name)
        if file is None:
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                here = name if file.name == "__init__.py" else name.rpartition(".")[0]
                origin = resolve_name("." * node.level + (node.module or ""), here)
                inner = [f"{origin}.{alias.name}" for alias in node.names]
                waiting += [x if _file(x) else origin for x in inner]
    return tuple(found[name] for name in sorted(found) if found[name])


def _file(module: str) -> Path | None:
    """Return where a module of ours lies; None for others, and for what is no module."""
    top, *path = module.split(".")
    start = _top(top)
    if start is None or not path:
        return start
    base = start.parent
    for file in (base.joinpath(*path, "__init__.py"), base.joinpath(*path).with_suffix(".py")):
        if start.name == "__init__.py" and file.is_file():
            return file
    return None


@cache
def _top(name: str) -> Path | None:
    """Return where a package of ours, or a module in none, lies; None for others."""
    if name in sys.stdlib_module_names or name in NOT_OURS:
        return None
    try:
        spec = find_spec(name)
    except ValueError:  # __main__
        return None
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin)
    if file.suffix != ".py" or not file.is_file():
        return None
    folder = file.parent.parent if spec.submodule_search_locations else file.parent
    installed = BESIDE_PYTHON & set(file.parts) or _is_installed(name, folder)
    return None if installed else file


def _is_installed(top: str, folder: Path) -> bool:
    """Whether a distribution in this folder lists a module, or files of a package, as its own."""
    own = (f"{top}/".encode(), f"{top}.py,".encode())
    for record in folder.glob("*.dist-info/RECORD"):
        listed = record.read_bytes()
        if listed.startswith(own) or any(b"\n" + one in listed for one in own):
            return True
    return False


@cache
def compilers() -> tuple[Any, ...]:
    """Say which compilers are here, and how they are told to work.

    Versions, size and date of the CUDA toolkit's libraries, and environment variables of Numba.
    """
    found: list[Any] = [platform.python_version(), platform.machine()]
    found += sorted((k, v) for k, v in os.environ.items() if k.startswith("NUMBA_"))
    for distribution in COMPILERS:
        with suppress(PackageNotFoundError):
            found.append((distribution, version(distribution)))
    with suppress(ImportError, RuntimeError):  # no assembler: nothing will be made here
        from cuda.pathfinder import load_nvidia_dynamic_lib

        for name in LIBRARIES:
            library = os.path.realpath(load_nvidia_dynamic_lib(name).abs_path or "")
            about = os.stat(library)
            found.append((library, about.st_size, about.st_mtime_ns))
    return tuple(found)


def _changed(file: Path) -> bool:
    about = file.stat()
    return max(about.st_mtime, about.st_ctime) > _LOADED_AT


def _tells_all(part: Any) -> bool:
    """Whether the ``repr`` of a part says all that there is to it."""
    if isinstance(part, tuple):
        return all(map(_tells_all, part))
    return part is None or isinstance(part, bool | int | float | str | np.generic)
