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


def test_compiles_for_amd():
    done = run_static("--arch", "gfx942", "--dtype", "fp16", "--only", FWD + "_cls")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mfma" in done.stdout


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


def test_nothing_to_check_fails():
    assert run_static("--only", "no such kernel").returncode == 1


def test_refuses_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(static, "interpreting", lambda: True)
    assert static.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().out


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
