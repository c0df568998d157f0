"""What numbers come from: libraries, processor, command.

Rounding depends on the processor, and what thousands of training steps end in on rounding.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

# As XLA's --xla_cpu_max_isa says them, from the least; the flag of /proc/cpuinfo of each.
_LEVELS = {
    "SSE4_2": "sse4_2", "AVX": "avx", "AVX2": "avx2", "AVX512": "avx512f",
    "AVX512_VNNI": "avx512_vnni", "AVX512_BF16": "avx512_bf16", "AMX": "amx_tile",
    "AMX_FP16": "amx_fp16",
}  # fmt: skip
_CPUINFO = Path("/proc/cpuinfo")


PACKAGES = ("liftplace_jax", "jax", "flax", "optax", "numpy")


def versions() -> dict[str, Any]:
    """Of the libraries that numbers depend on; the device, and what `processor` finds."""
    libraries = {name: _version(name) for name in PACKAGES}
    return libraries | {"device": jax.devices()[0].device_kind} | processor()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"  # run from a checkout


def command() -> str:
    """What started this process, as typed in a shell; of Python's path the last part alone."""
    words = [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
    if len(words) > 1 and sys.argv[0] == words[1] and not words[1].endswith(".py"):
        words = [Path(words[1]).name, *words[2:]]  # of an installed command
    return shlex.join(words)


def processor() -> dict[str, Any]:
    """This machine's processor, as programs for the CPU see it.

    Returns:
      "processor": its name; "instructions": the widest set that XLA uses, by its name for it, or
      the kind of machine where that is not known; "threads": how many XLA computes with; and
      "xla_flags", if any are set.
    """
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:  # other systems have none
        text = ""
    flags = os.environ.get("XLA_FLAGS", "")
    found = {
        "processor": _name(text) or platform.processor() or platform.machine(),
        "instructions": instructions(text, flags) or platform.machine(),
        "threads": _threads(os.environ),
    }
    return found | ({"xla_flags": " ".join(flags.split())} if flags.strip() else {})


def line(found: Mapping[str, Any]) -> str:
    """What `versions` found of the machine, for people."""
    if "processor" not in found:
        return "a processor that was not recorded"
    text = f"{found['processor']}, {found['instructions']}, {found['threads']} threads"
    device = found.get("device", "cpu")
    return text if device == "cpu" else f"{device} ({text})"


def instructions(cpuinfo: str, xla_flags: str = "") -> str | None:
    """The widest instruction set of an x86 processor that XLA uses; None of others.

    Args:
      cpuinfo: the text of /proc/cpuinfo.
      xla_flags: $XLA_FLAGS, which may limit it.
    """
    has = set(_field(cpuinfo, "flags").split())
    known = [level for level, flag in _LEVELS.items() if flag in has]
    for limit in re.findall(r"--xla_cpu_max_isa=(\w+)", xla_flags):
        if limit.upper() in _LEVELS:
            order = list(_LEVELS)
            known = [k for k in known if order.index(k) <= order.index(limit.upper())]
    return known[-1] if known else None


def _name(cpuinfo: str) -> str:
    name = _field(cpuinfo, "model name") or _field(cpuinfo, "Model")
    if not name and sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if family := _field(cpuinfo, "cpu family"):
        # Virtual machines hide the number of the model behind the maker's name.
        name += f" (family {family}, model {_field(cpuinfo, 'model')})"
    elif not name and (implementer := _field(cpuinfo, "CPU implementer")):
        name = f"{platform.machine()} {implementer} {_field(cpuinfo, 'CPU part')}"
    return name.strip()


def _field(cpuinfo: str, name: str) -> str:
    found = re.search(rf"^{name}[ \t]*:[ \t]*(.*)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else ""


def _threads(environment: Mapping[str, str]) -> int:
    for name in ("PJRT_NPROC", "NPROC"):  # XLA obeys the first that is a number
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
