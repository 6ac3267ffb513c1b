"""The C code beside this file, compiled for this processor when it is first needed, and checked.

It takes a C compiler and some seconds; the result is kept in the cache folder (``CCPO_CACHE``), by what it was made from and for. Where there is no
compiler, or the processor does not multiply bfloat16, torch does the same. ``CCPO_COMPILED=0`` asks for that, ``CCPO_COMPILED=vectors`` for no AMX.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from ccpo.cachefolder import cache_folder

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
SECONDS = 120  # that a compiler may take


def sources(suffix: str) -> list[Path]:
    """The files with this suffix, in order."""
    return sorted(SOURCES.glob(f"*{suffix}"))


class Unavailable(Exception):
    """Why the C code is not used here."""


def library() -> ctypes.CDLL | None:
    """The compiled code; None where it is not to be had, and `why_not` says why."""
    return _found()[0]


def why_not() -> str | None:
    """Why there is no compiled code; None if there is."""
    return _found()[1]


def instructions() -> str:
    """What multiplies: ``AMX`` or ``AVX-512``. Only where there is a `library`."""
    return "AMX" if library().tiles else "AVX-512"


@cache
def _found() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return _load(), None
    except Unavailable as reason:
        log.info("no code in C here, torch does it: %s", reason)
        return None, str(reason)


def _load() -> ctypes.CDLL:
    if os.environ.get("CCPO_COMPILED") == "0":
        raise Unavailable("CCPO_COMPILED is 0")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Unavailable(f"it is compiled on Linux on x86-64 only, not on {platform.system()} on {platform.machine()}")
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        raise Unavailable("the processor has no AVX-512 for bfloat16")
    path = _built()
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:  # a folder from which nothing is run, or a file of another system
        raise Unavailable(
            f"{path} cannot be loaded: {error}; remove it, or set CCPO_CACHE to another folder"
        ) from error
    _declare(found)
    found.tiles = found.ccpo_begin(os.environ.get("CCPO_COMPILED") != "vectors")
    if not _right(found):
        raise Unavailable("what was compiled multiplies wrongly here")
    return found


def _built() -> Path:
    """The shared library's path; it is made if it is not there."""
    compiler = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        raise Unavailable("there is no C compiler (cc, gcc or clang); install one, or name one in CC")
    system = "|".join(
        (*FLAGS, os.path.realpath(shutil.which(compiler) or compiler), *platform.libc_ver(), *map(str, _openmp()))
    )
    made_of = (*(path.read_bytes() for path in sources(".h") + sources(".c")), system.encode(), _processor())
    try:
        cache = cache_folder()
        folder = cache / "compiled"
        path = folder / f"kernels-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            _compile(compiler, path)
        for mine in (folder, path):
            _refuse_foreign(mine)
        above = cache.stat()  # who can rename what is in it can put something else there
        if above.st_uid not in (os.getuid(), 0) or (above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX):
            raise Unavailable(f"{cache} can be written by others; make it yours alone (chmod o-w), or set CCPO_CACHE")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise Unavailable(f"the cache folder cannot be used: {error}") from error
    return path


def _openmp() -> list[Path]:
    """torch's own OpenMP, so that its threads are used and no second set stands beside them; empty where it brings none."""
    home = Path(torch.__file__).parent
    return sorted([*home.glob("lib/libgomp*.so*"), *home.parent.glob("torch.libs/libgomp*.so*")])[:1]


def _compile(compiler: str, path: Path) -> None:
    """Beside its place first, so that another process never loads half of it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as beside:
        made = Path(beside) / path.name
        command = [
            compiler,
            *FLAGS,
            "-o",
            str(made),
            *map(str, sources(".c")),
            "-Wl,--as-needed",
            *map(str, _openmp()),
            "-lm",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{compiler} could not run: {error}") from error
        if done.returncode:
            raise Unavailable(f"{compiler} could not compile {SOURCES.name}: {done.stderr.strip()[-500:]}")
        made.chmod(0o700)
        os.replace(made, path)


def _refuse_foreign(path: Path) -> None:
    """Code is loaded only from what belongs to this user, and which nobody else can write."""
    info = path.stat()
    if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unavailable(f"{path} can be written by others; make it yours alone (chmod go-w), or set CCPO_CACHE")


def _processor() -> bytes:
    """What this processor can do: a cache folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    return "|".join(sorted({line for line in lines if line.startswith(("flags", "model name"))})).encode()


# p pointer, i integer, l long, f float; -> what comes back
FUNCTIONS = {
    "ccpo_begin": "i -> i",
    "ccpo_product": "iiippppi",
    "ccpo_room": "piii -> l",
    "ccpo_forward": "pppppiip",
    "ccpo_sample": "iiplplppppi",
    "ccpo_add_norm": "iipppfpppi",
    "ccpo_add_norm_back": "iippppppppi",
    "ccpo_swiglu": "iippi",
    "ccpo_swiglu_back": "iipppi",
    "ccpo_attend_room": "pi -> l",
    "ccpo_attend": "pppppi",
    "ccpo_attend_back": "ppppppi",
    "ccpo_logprobs": "iippppppi",
    "ccpo_logprobs_back": "iippppppppi",
    "ccpo_group_length": "lp -> l",
    "ccpo_advantages": "llpip",
}
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_long, "f": ctypes.c_float}


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A C struct, its fields as ``p keys, i columns``."""
    pairs = [(field, KINDS[kind]) for kind, _, field in (part.partition(" ") for part in fields.split(", "))]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


def _declare(found: ctypes.CDLL) -> None:
    """The types of its functions, without which pointers would be cut to 32 bits."""
    for name, types in FUNCTIONS.items():
        takes, _, gives = types.partition(" -> ")
        function = getattr(found, name)
        function.argtypes, function.restype = [KINDS[t] for t in takes], KINDS.get(gives)


def _right(found: ctypes.CDLL) -> bool:
    """Whether a product comes out as torch's."""
    generator = torch.Generator("cpu").manual_seed(0)
    x, weight = (
        torch.randn(rows, 64, generator=generator, dtype=torch.float32, device="cpu").bfloat16() for rows in (32, 96)
    )
    into, packed = torch.empty(32, 96, dtype=torch.float32, device="cpu"), in_panels(weight).contiguous()
    found.ccpo_product(32, 96, 64, x.data_ptr(), packed.data_ptr(), None, into.data_ptr(), 1)
    return torch.allclose(into, x.float() @ weight.float().t(), rtol=1e-3, atol=1e-3)


def address(tensor: torch.Tensor | None) -> int | None:
    """Where its numbers begin; None, which is NULL, for None."""
    return None if tensor is None else tensor.data_ptr()


def scratch(size: int) -> torch.Tensor:
    """Room for so many bytes from `aligned` on."""
    return torch.empty(size + 64, dtype=torch.uint8, device="cpu")


def aligned(room: torch.Tensor) -> int:
    """Its first address that is a multiple of 64."""
    return -(-room.data_ptr() // 64) * 64


def in_panels(weight: torch.Tensor) -> torch.Tensor:
    """A view of ``[N, K]`` as panels of 16 rows, ``[N / 16, K / 2, 16, 2]``: a contiguous copy of it is what ``product.c`` takes. N and K are
    multiples of 32."""
    N, K = weight.shape
    return weight.view(N // 16, 16, K // 2, 2).transpose(1, 2)
