"""The offline check compiles the launch table and fails when a promise is broken.

It runs in a process of its own: kernels that Triton's interpreter runs cannot be compiled.
"""

import json
import os
import subprocess
import sys

import pytest

from tcpa.bench import sass, static
from tcpa.kernels.launch import Launch
from tcpa.kernels.static_case import StaticCase

FWD = "gated_attention_fwd/vit_b16_224"


def run_static(*arguments, script="from tcpa.bench.static import *"):
    """Run the command in a fresh process without the interpreter."""
    code = f"{script}\nimport sys\nsys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_promised_kernel_passes(tmp_path):
    path = tmp_path / "static.json"
    options = ("--arch", "sm_90", "--dtype", "bf16", "--only", FWD, "--json", str(path))
    done = run_static(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wgmma" in done.stdout and "broken promises" in done.stdout
    report, cls_report = json.loads(path.read_text())["kernels"]
    assert report["name"] == FWD and cls_report["name"] == FWD + "_cls"
    assert report["spill_stores"] == report["spill_loads"] == 0 and report["failures"] == []
    assert report["registers"] <= 128 and report["programs"] == 2
    # 2 products of 256 x 256 x 64 for 1536 heads at 2048 multiply-adds per clock take 27 us.
    assert report["pipes_us"]["tensor"] == pytest.approx(27.2, abs=0.3)
    assert max(report["pipes_us"].values()) < 75


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_every_promise_is_kept(architecture, dtype, tmp_path):
    path = tmp_path / "static.json"
    done = run_static("--arch", architecture, "--dtype", dtype, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    promised = [one for one in json.loads(path.read_text())["kernels"] if one["promised"]]
    assert len(promised) > 30
    assert all(one["spill_stores"] == one["spill_loads"] == 0 for one in promised)


def test_compiles_for_amd():
    done = run_static("--arch", "gfx942", "--dtype", "fp16", "--only", FWD + "_cls")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mfma" in done.stdout


# A launch compiles integers that are 1 in (one sample, one head, one key), as plain numbers without
# methods; the interpreter never does. The kernels without a launch row are here too.
SINGULAR = """
import torch
from tcpa.bench.static import *
from tcpa.kernels import match_cases
from tcpa.kernels.launch import Launch
from tcpa.kernels.match_forward import _distance_kernel
from tcpa.kernels.match_keys import _unit_keys_bwd_kernel, _unit_keys_kernel
from tcpa.kernels.static_case import static_signature

KEYS = {"C": 100, "BLOCK_C": 128}
SMALL = {
    _unit_keys_kernel: KEYS,
    _unit_keys_bwd_kernel: {**KEYS, "BLOCK_SLABS": 8},
    _distance_kernel: {"BLOCK": 1024},
}
POINTERS = {"p_parts": "*fp16", **dict.fromkeys(("p_inverse", "p_distance", "p_dkeys"), "*fp32")}


def small_cases():
    for kernel, constants in SMALL.items():
        signature = static_signature(
            kernel, torch.bfloat16, constants, {**match_cases.POINTERS, **POINTERS}
        )
        signature |= {name: "fp32" for name in match_cases.FLOATS if name in signature}
        launch = Launch(blocks={}, num_warps=4, num_stages=2)
        yield StaticCase(
            name=kernel.__name__, kernel=kernel, signature=signature, constants=constants,
            launch=launch, promised=True, tensor_core=False,
        )


def main(_):
    cases = {case.kernel: case for case in collect("sm_90", "bf16")}
    for case in (*small_cases(), *cases.values()):
        integers = [name for name, kind in case.signature.items() if kind == "i32"]
        for ones in ([], integers) if case.kernel in SMALL else (integers,):
            part = Part(programs=1, trips=(), constants=dict.fromkeys(ones, 1))
            compile_case(case, "sm_90", part)
        print(case.kernel.__name__)
"""


def test_compiles_with_every_size_one():
    done = run_static(script=SINGULAR)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.split()) == 10


BROKEN = {
    "spills": ("blocks={'BLOCK_M': 128, 'BLOCK_N': 128}, num_warps=4", "sm_90", "FAIL spills"),
    "no_wgmma": ("blocks={'BLOCK_M': 16, 'BLOCK_N': 64}", "sm_90", "FAIL no wgmma"),
    "no_compile": ("blocks={'BLOCK_M': 48, 'BLOCK_N': 64}", "sm_90", "FAIL does not compile"),
}


@pytest.mark.parametrize(("change", "architecture", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_promise_fails(change, architecture, message):
    script = f"""
import dataclasses
from tcpa.kernels import gated_attention_cases as cases
from tcpa.bench.static import *
choose = cases._launch
cases._launch = lambda *a: dataclasses.replace(choose(*a), {change})
"""
    options = ("--arch", architecture, "--dtype", "bf16", "--only", FWD + "_cls")
    done = run_static(*options, script=script)
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stdout


def test_a_name_of_nothing_is_refused_with_the_names_there_are(tmp_path):
    done = run_static("--only", "zzz", "--json", str(tmp_path / "static.json"))
    assert done.returncode == 2 and done.stdout == "" and not any(tmp_path.iterdir())
    assert "--only: got 'zzz', expected a part of one of these names:" in done.stderr
    assert f"  {FWD}\n" in done.stderr


def test_an_unwritable_file_is_refused_before_compiling(tmp_path):
    done = run_static("--only", FWD, "--json", str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert f"tcpa-bench static: --json: got {tmp_path}, expected a file" in done.stderr


def test_an_interruption_keeps_what_was_compiled(tmp_path):
    script = """
from tcpa.bench import static
from tcpa.bench.static import *
def stop(case, architecture, dtype):
    if case.name.endswith("_cls"):
        raise KeyboardInterrupt
    return Report(name=case.name, architecture=architecture, dtype=dtype, promised=True)
static.inspect = stop
"""
    path = tmp_path / "static.json"
    done = run_static("--only", FWD, "--json", str(path), script=script)
    assert done.returncode == 130 and done.stderr == "tcpa-bench static: interrupted\n"
    assert [row["name"] for row in json.loads(path.read_text())["kernels"]] == [FWD]


def test_refuses_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(static, "interpreting", lambda: True)
    assert static.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_shared_memory_over_the_limit_is_a_failure():
    report = static.Report(name="x", architecture="gfx942", dtype="bf16", promised=True)
    report.shared = 70000
    case = StaticCase(
        name="x", kernel=None, signature={}, constants={}, promised=True,
        launch=Launch(blocks={}, num_warps=4, num_stages=2),
    )  # fmt: skip
    static._check(report, case)
    assert report.failures == ["shared memory: 70000 bytes of 65536"]


def line(address, text):
    """Write a line as the disassembler does."""
    return f"        /*{address:04x}*/                   {text} ;   /* 0x00 */\n"


def test_counts_loops_and_pipes():
    listing = (
        line(0, "MUFU.EX2 R1, R2") + line(0x10, "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24")
        + line(0x20, "HMMA.16816.F32.BF16 R1, R2, R3, R4") + line(0x30, "@!P1 BRA 0x10")
        + line(0x40, "LDG.E.128 R1, desc[UR4][R2.64]") + line(0x50, "BRA 0x50")
    )  # fmt: skip
    found = sass.LINE.findall(listing)
    instructions = tuple(sass.Instruction(int(a, 16), op, rest.strip()) for a, op, rest in found)
    code = sass.MachineCode(registers=168, stack=0, instructions=instructions)
    assert sass.find_loops(code) == [(0x10, 0x30)]
    h200 = sass.PROCESSORS["sm_90"]
    cycles = sass.pipe_cycles(code, (3.0,), 4, h200)
    assert cycles["mufu"] == 4 * 2
    assert cycles["tensor"] == 3 * (64 * 64 * 16 / 2048 + 4 * 1)
    assert cycles["shared"] == 3 * 2 * 16 * (64 + 64) / 128
    assert cycles["global"] == 4 * 32 * 16 / 64
    with pytest.raises(ValueError, match="got 2 loops, the machine code has 1"):
        sass.pipe_cycles(code, (1.0, 1.0), 4, h200)
    assert sass.programs_per_processor(code, 33000, 4, h200) == 3
