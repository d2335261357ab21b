"""The offline check compiles the launch table and fails when a promise is broken.

It runs in a process of its own: kernels that Triton's interpreter runs cannot be compiled.
"""

import json
import os
import subprocess
import sys

import pytest

from tcpa.bench import static
from tcpa.bench.static.cases import StaticCase
from tcpa.bench.static.compile import Report, check
from tcpa.bench.static.sass import LINE, MachineCode, ctas_per_sm
from tcpa.kernels.launch import Launch

FWD = "gated_attention_fwd/vit_b16_224"


def run_static(*arguments, script="from tcpa.bench.static import main"):
    """Run the command in a fresh process without the interpreter."""
    code = f"{script}\nimport sys\nsys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_promised_kernel_passes(tmp_path):
    path = tmp_path / "static.json"
    options = ("--arch", "sm_90", "gfx942", "--dtype", "bf16", "--only", FWD, "--json", str(path))
    done = run_static(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wgmma" in done.stdout and "mfma" in done.stdout and "broken promises" in done.stdout
    report, cls_report, *_ = json.loads(path.read_text())["kernels"]
    assert report["name"] == FWD and cls_report["name"] == FWD + "_cls"
    assert report["spill_stores"] == report["spill_loads"] == 0 and report["failures"] == []
    assert report["registers"] <= 128 and report["programs"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "dtype"), [("sm_80", "fp16"), ("sm_90", "bf16")])
def test_every_promise_is_kept(architecture, dtype, tmp_path):
    path = tmp_path / "static.json"
    done = run_static("--arch", architecture, "--dtype", dtype, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    promised = [one for one in json.loads(path.read_text())["kernels"] if one["promised"]]
    assert len(promised) > 30
    assert all(one["spill_stores"] == one["spill_loads"] == 0 for one in promised)


# A launch compiles integers that are 1 in (one sample, one head, one key), as plain numbers without
# methods; the interpreter never does. The kernels without a launch row are here too.
SINGULAR = """
import torch
from tcpa.bench.static.cases import FLOATS, make_case, static_cases
from tcpa.bench.static.compile import compile_case
from tcpa.kernels.launch import Launch
from tcpa.kernels.matching.forward import _distance_kernel
from tcpa.kernels.matching.keys import _unit_keys_bwd_kernel, _unit_keys_kernel

KEYS = {"C": 100, "BLOCK_C": 128}
SMALL = {
    _unit_keys_kernel: KEYS,
    _unit_keys_bwd_kernel: {**KEYS, "BLOCK_SLABS": 8},
    _distance_kernel: {"BLOCK": 1024},
}
POINTERS = {"p_parts": "*fp16", **dict.fromkeys(("p_inverse", "p_distance", "p_dkeys"), "*fp32")}
LAUNCH = Launch(blocks={}, num_warps=4, num_stages=2)


def main(_):
    cases = {case.kernel: case for case in static_cases("sm_90", torch.bfloat16)}
    small = [
        make_case(kernel.__name__, kernel, torch.bfloat16, constants, LAUNCH, pointers=POINTERS)
        for kernel, constants in SMALL.items()
    ]
    for case in (*small, *cases.values()):
        integers = [name for name, kind in case.signature.items() if kind == "i32"]
        for ones in ([], integers) if case.kernel in SMALL else (integers,):
            compile_case(case, "sm_90", dict.fromkeys(ones, 1))
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
from tcpa.bench.static import cases, main
choose = cases.attention_launch
cases.attention_launch = lambda *a: dataclasses.replace(choose(*a), {change})
"""
    options = ("--arch", architecture, "--dtype", "bf16", "--only", FWD + "_cls")
    done = run_static(*options, script=script)
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stdout


def test_bad_options_are_refused_before_compiling(tmp_path):
    done = run_static("--only", "zzz", "--json", str(tmp_path / "static.json"))
    assert done.returncode == 2 and done.stdout == "" and not any(tmp_path.iterdir())
    assert "--only: got 'zzz', expected a part of one of these names:" in done.stderr
    assert f"  {FWD}\n" in done.stderr
    done = run_static("--only", FWD, "--json", str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert f"tcpa-bench static: --json: got {tmp_path}, expected a file" in done.stderr


def test_an_interruption_keeps_what_was_compiled(tmp_path, monkeypatch):
    def stop(case, architecture, dtype):
        if case.name.endswith("_cls"):
            raise KeyboardInterrupt
        return Report(name=case.name, architecture=architecture, dtype=dtype, promised=True)

    monkeypatch.setattr(static, "interpreting", lambda: False)
    monkeypatch.setattr(static, "inspect_case", stop)
    path = tmp_path / "static.json"
    assert static.main(["--only", FWD, "--json", str(path)]) == 130
    assert [row["name"] for row in json.loads(path.read_text())["kernels"]][:1] == [FWD]


def test_refuses_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(static, "interpreting", lambda: True)
    assert static.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_shared_memory_over_the_limit_is_a_failure():
    report = Report(name="x", architecture="gfx942", dtype="bf16", promised=True)
    report.shared = 70000
    case = StaticCase(
        name="x", kernel=None, signature={}, constants={}, promised=True,
        launch=Launch(blocks={}, num_warps=4, num_stages=2),
    )  # fmt: skip
    check(report, case)
    assert report.failures == ["shared memory: 70000 bytes of 65536"]


def test_counts_opcodes_and_ctas():
    listing = (
        "        /*0000*/                   STL.64 [R1], R2 ;   /* 0x00 */\n"
        "        /*0010*/                   @!P1 LDL R24, [R1] ;   /* 0x00 */\n"
    )
    assert LINE.findall(listing) == ["STL", "LDL"]
    code = MachineCode(registers=168, stack=0, opcodes={})
    assert ctas_per_sm(code, 33000, 4, 233472) == 3
