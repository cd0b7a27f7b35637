"""Instructions of a disassembly are sorted into classes, and those of loops counted as often as they run."""

import pytest

from bench.measuring.sass import Turns, count, find_loops, parse


def disassembly(*texts: str) -> str:
    """Returns the lines as cuobjdump writes them, 16 bytes an instruction."""
    return "\n".join(
        f"        /*{16 * i:04x}*/                   {text} ;      /* 0x0 */" for i, text in enumerate(texts)
    )


PRODUCT = disassembly(
    "S2R R0, SR_TID.X",  # 0x00
    "LDGSTS.E.128 [R1], [R2.64]",  # 0x10: the loop over tiles
    "LDSM.16.M88.4 R4, [R3]",  # 0x20: the product's loop
    "HMMA.16816.F32.BF16 R8, R4, R6, R8",
    "HMMA.16816.F32.BF16 R12, R4, R6, R12",
    "@!P0 BRA 0x20",
    "MUFU.EX2 R1, R1",  # 0x60
    "@P1 BRA 0x10",
    "@P2 BRA 0x90",
    "EXIT",  # 0x90
    "BRA 0xa0",
    "NOP",
)
AS_WRITTEN, UNROLLED_TWICE = (
    "\n".join(["$L__BB0_1:", *["mma.sync.aligned;"] * number, "@%p1 bra $L__BB0_1;"]) for number in (2, 1)
)


def test_the_padding_is_left_out():
    assert [instruction.opcode for instruction in parse(PRODUCT)][-2:] == ["BRA", "EXIT"]


def test_loops_are_told_apart():
    outer, inner = find_loops(parse(PRODUCT))
    assert (outer.first, outer.last, outer.products, outer.surrounds_product) == (0x10, 0x70, 0, True)
    assert (inner.first, inner.last, inner.products, inner.surrounds_product) == (0x20, 0x50, 2, False)


@pytest.mark.parametrize(
    ("ptx", "turns_of_sass"), [(AS_WRITTEN, 8), (UNROLLED_TWICE, 4)], ids=["as written", "unrolled twice"]
)
def test_loops_count_as_often_as_they_run(ptx, turns_of_sass):
    counts = count(PRODUCT, ptx, Turns(product=8, outer=3), "tensor cores")
    inner = 3 * turns_of_sass
    assert counts.total == 3 + 3 * 3 + 4 * inner
    assert counts.beside == counts.total - 2 * inner and counts.loop == 2 * inner
    assert counts.classes["matrix"] == 2 * inner and counts.classes["mufu"] == 3
    assert counts.classes["memory"] == 3 + inner and counts.classes["integer"] == 1


def test_a_product_unrolled_whole_is_one_with_the_loop_around_it():
    sass = disassembly("FADD R0, R0, R1", *["HMMA.16816.F32.BF16 R8, R4, R6, R8"] * 4, "@!P0 BRA 0x0", "EXIT")
    counts = count(sass, UNROLLED_TWICE, Turns(product=4, outer=5), "tensor cores")
    assert counts.beside == 5 * 2 + 1 and counts.loop is None and counts.classes["matrix"] == 20


def test_a_product_outside_of_the_tensor_cores_is_known_by_its_multiplications():
    sass = disassembly("LDS R1, [R2]", *["FFMA R8, R4, R6, R8"] * 512, "@!P0 BRA 0x0", "FFMA R1, R1, R1, R1", "EXIT")
    ptx = "\n".join(["$L__BB0_1:", *["fma.rn.f32 %f1;"] * 512, "@%p1 bra $L__BB0_1;"])
    counts = count(sass, ptx, Turns(product=16), "fma")
    assert counts.beside == 16 * 2 + 2 and counts.classes["fp32"] == 16 * 512 + 1


def test_a_loop_without_a_product_runs_the_outer_turns():
    sass = disassembly(
        "DADD R0, R0, R2", "SHFL.BFLY R1, R1, 0x1, 0x1f", "BAR.SYNC.DEFER_BLOCKING 0x0", "@P0 BRA 0x0", "EXIT"
    )
    counts = count(sass, "", Turns(outer=2), None)
    assert counts.classes["fp64"] == counts.classes["memory"] == counts.classes["barrier"] == 2 and counts.total == 9


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HGMMA.64x128x16.F32.BF16", "matrix"),
        ("UTCHMMA", "matrix"),
        ("HFMA2.MMA", "fp32"),
        ("FSETP.GE.AND", "integer"),
        ("I2FP.F32.S32", "integer"),
        ("F2I.TRUNC.NTZ", "mufu"),
        ("LDTM.x64", "memory"),
        ("DSETP.GT.AND", "fp64"),
        ("VOTE.ANY", "control"),
        ("IMAD.WIDE", "integer"),
    ],
)
def test_classes(opcode, kind):
    (instruction,) = parse(disassembly(f"@!P3 {opcode} R1, R2"))
    assert instruction.kind == kind
