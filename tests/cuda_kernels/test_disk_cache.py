"""What is kept on disk: found again, named by all it depends on, whole or not there, shared."""

import importlib.util
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from cuda_kernels import disk_cache
from cuda_kernels.resources import CONFIGURATIONS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIP_SOFTMAX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "things"


def test_what_was_written_is_read_again(folder):
    assert disk_cache.read("things", "a") is None
    disk_cache.write("things", "a", b"first")
    disk_cache.write("things", "a", b"second")
    assert disk_cache.read("things", "a") == b"second"
    assert disk_cache.read("others", "a") is None
    assert [file.name for file in folder.iterdir()] == ["a"]


@pytest.mark.parametrize("damage", [lambda x: x[:-1], lambda x: x[:40], lambda x: x[:-1] + b"!"])
def test_a_damaged_entry_is_no_entry(folder, damage):
    disk_cache.write("things", "a", b"as it was")
    file = folder / "a"
    file.write_bytes(damage(file.read_bytes()))
    assert disk_cache.read("things", "a") is None
    disk_cache.write("things", "a", b"anew")
    assert disk_cache.read("things", "a") == b"anew"


def test_a_folder_that_cannot_be_written_is_named_once(tmp_path, monkeypatch, recwarn):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SKIP_SOFTMAX_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match=r"cannot be kept in .*set SKIP_SOFTMAX_CACHE_DIR"):
        disk_cache.write("things", "a", b"")
    disk_cache.write("things", "b", b"")
    assert not recwarn
    assert disk_cache.read("things", "a") is None


def test_the_oldest_are_forgotten(folder, monkeypatch):
    monkeypatch.setattr(disk_cache, "MOST", 3)
    for i, name in enumerate("abcde"):
        disk_cache.write("things", name, b"")
        if (folder / name).exists():
            os.utime(folder / name, (i, i))
    assert disk_cache.read("things", "a") is disk_cache.read("things", "b") is None
    assert len(list(folder.iterdir())) == 3


WRITER = """
import sys
from cuda_kernels import disk_cache

for i in range(150):
    disk_cache.write("things", "a", sys.argv[1].encode() * 300_000)
    kept = disk_cache.read("things", "a")
    assert kept in (b"1" * 300_000, b"2" * 300_000), kept and len(kept)
"""


def test_two_processes_write_the_same_entry_at_once(folder, root):
    writers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", WRITER, which], cwd=root)
        for which in "12"
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert [file.name for file in folder.iterdir()] == ["a"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of three modules, as old as the hills."""
    home = tmp_path / "one_of_mine"
    home.mkdir()
    (home / "__init__.py").write_text("")
    (home / "kernel.py").write_text("import numpy\nfrom one_of_mine import inner\n")
    (home / "inner.py").write_text("def f():\n    from .deeper import x\n    return x\n")
    (home / "deeper.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(disk_cache, "_LOADED_AT", time.time() + 100)
    forget()
    yield home
    forget()


def forget():
    disk_cache.sources.cache_clear()
    disk_cache._top.cache_clear()


def test_a_name_depends_on_all_that_is_imported(package):
    assert [file.stem for file in disk_cache.sources("one_of_mine.kernel")] == [
        "deeper", "inner", "kernel",
    ]  # fmt: skip
    before = disk_cache.entry_name(["one_of_mine.kernel"], 1)
    (package / "__init__.py").write_text("y = 1")
    assert disk_cache.entry_name(["one_of_mine.kernel"], 1) == before
    (package / "deeper.py").write_text("x = 2\n")
    assert disk_cache.entry_name(["one_of_mine.kernel"], 1) != before


def test_what_is_installed_in_any_folder_is_not_walked(package, tmp_path, monkeypatch):
    """Its version says enough, and Numba alone has more than a thousand files."""
    folder = tmp_path / "any"
    for name in ("packed", "alone.py", "mine.py", "numba/__init__.py", "llvmlite/__init__.py"):
        file = folder / name if name.endswith(".py") else folder / name / "__init__.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("from . import more\n" if "__init__" in file.name else "")
        (file.parent / "more.py").write_text("")
    for number, files in enumerate(("packed/__init__.py,,\n", "other/mine.py,,\nalone.py,,\n")):
        (folder / f"{number}-1.0.dist-info").mkdir()
        (folder / f"{number}-1.0.dist-info" / "RECORD").write_text(files)
    beside = tmp_path / "dist-packages" / "of_debian"
    beside.mkdir(parents=True)
    (beside / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.syspath_prepend(beside.parent)
    for name in ("numba", "llvmlite"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        assert Path(importlib.util.find_spec(name).origin).is_relative_to(folder)
    names = "packed, alone, mine, of_debian, numba, llvmlite"
    (package / "kernel.py").write_text(f"import {names}\nfrom packed import more\n")
    found = disk_cache.sources("one_of_mine.kernel")
    assert found == (folder / "mine.py", package / "kernel.py")


def test_what_is_no_source_is_not_read(package, tmp_path):
    (tmp_path / "built.so").write_bytes(b"\x7fELF")
    (package / "kernel.py").write_text("import built, zlib, __main__, no_such_module\n")
    assert disk_cache.sources("one_of_mine.kernel") == (package / "kernel.py",)
    assert disk_cache.entry_name(["one_of_mine.kernel"]) is not None


def test_a_name_depends_on_parts_and_compilers(monkeypatch):
    module = ["cuda_kernels.fragments"]
    parts = [(), (1,), (2,), (1.0,), (True,), ("1",), ((1,),), (1, None)]
    names = {disk_cache.entry_name(module, *some) for some in parts}
    assert len(names) == len(parts)
    assert None not in names
    monkeypatch.setenv("NUMBA_OPT", "1")
    disk_cache.compilers.cache_clear()
    assert disk_cache.entry_name(module, 1) not in names
    monkeypatch.undo()
    disk_cache.compilers.cache_clear()
    assert disk_cache.entry_name(module, 1) in names
    monkeypatch.setattr(disk_cache, "compilers", lambda: ("another",))
    assert disk_cache.entry_name(module, 1) not in names


def test_what_cannot_be_named_is_not_kept(package):
    assert disk_cache.entry_name(["one_of_mine.kernel"], object()) is None
    assert disk_cache.entry_name(["one_of_mine.kernel"], (1, [2])) is None
    assert disk_cache.entry_name(["no_such_module"]) is None
    assert disk_cache.entry_name(["__main__"]) is None
    assert disk_cache.entry_name(["one_of_mine.kernel"], np.float32(1))


def test_a_source_changed_under_a_running_process_is_not_trusted(package, monkeypatch):
    monkeypatch.setattr(disk_cache, "_LOADED_AT", time.time() - 100)
    assert disk_cache.entry_name(["one_of_mine.kernel"]) is None


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, ".cache/skip-softmax-lab"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/skip-softmax-lab"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "Library/Caches/skip-softmax-lab"),
        ("win32", {}, "AppData/Local/skip-softmax-lab"),
        ("win32", {"SKIP_SOFTMAX_CACHE_DIR": "/mine"}, "/mine"),
    ],
)
def test_where_it_lies(platform, variables, expected, monkeypatch):
    for name in ("SKIP_SOFTMAX_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert disk_cache.directory() == Path.home() / expected


def test_every_kernel_of_the_gate_can_be_named():
    """That it closes over numbers alone: otherwise it would be compiled by every process."""
    compiler = pytest.importorskip("cuda_kernels.ptx.compiler")
    if not compiler.COMPILES:
        pytest.skip("nothing compiles here")
    from cuda_kernels.launch import kept_as

    names = set()
    for one in CONFIGURATIONS:
        names |= {kept_as(one.kernel(), one.signature, arch) for arch in one.architectures}
    assert None not in names
    assert len(names) == sum(len(one.architectures) for one in CONFIGURATIONS)


KERNEL = """
    from cuda_kernels.ptx.language import cuda, f32
    from of_mine import numbers

    @cuda.jit
    def kernel(x):
        x[0] = f32(numbers.NUMBER)
"""
BUILD = """
import sys
from cuda_kernels import disk_cache, launch

sys.path.insert(0, sys.argv[1])
from of_mine import kernels

compile_ = launch._compile
launch._compile = lambda *arguments: print("compiled") or compile_(*arguments)
one = launch.build(kernels.kernel, "void(float32[::1])", "sm_80")
assert one.entry.encode() in one.cubin
if "damage" in sys.argv:
    for file in (disk_cache.directory() / "cubins").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
print("again")
assert launch.build(kernels.kernel, "void(float32[::1])", "sm_80") == one
"""


@pytest.mark.assembler
def test_a_process_compiles_what_none_has_compiled(tmp_path, root):
    home = tmp_path / "of_mine"
    home.mkdir()
    (home / "kernels.py").write_text(textwrap.dedent(KERNEL))
    (home / "numbers.py").write_text("NUMBER = 1\n")
    (home / "__init__.py").write_text("")

    def start(*how):
        command = [sys.executable, "-c", BUILD, str(tmp_path), *how]
        return subprocess.Popen(command, cwd=root, text=True, stdout=subprocess.PIPE)

    def said(process):
        return process.communicate(timeout=120)[0].split()

    at_once = [said(process) for process in (start(), start())]
    assert ["compiled", "again"] in at_once
    assert all(words[-1] == "again" for words in at_once)
    assert said(start("damage")) == ["again", "compiled"]
    (home / "numbers.py").write_text("NUMBER = 2\n")
    assert said(start()) == ["compiled", "again"]
