import numpy as np
import pytest

from bench.executor.errors import (
    ConvergenceError,
    ExecutionError,
    MemoryAccessError,
    RaceError,
    UnwrittenRegisterError,
)

# Every thread stores its number, and reads that of the thread 32 further on: of another warp.
EXCHANGE = """
	shl.b32 %r1, %r0, 2;
	st.shared.b32 [%r1], %r0;
	bar.sync 0;
	xor.b32 %r2, %r1, 128;
	ld.shared.b32 %r3, [%r2];
	bar.sync 0;
	st.shared.b32 [%r1], %r3;
	add.s64 %rd20, %rd0, %rd12;
	st.global.b32 [%rd20], %r3;
	"""

# Copies 16 bytes a thread to shared memory and back.
COPY = """
	shl.b32 %r1, %r0, 4;
	cvt.u64.u32 %rd20, %r1;
	add.s64 %rd21, %rd0, %rd20;
	cp.async.cg.shared.global [%r1], [%rd21], 16;
	cp.async.commit_group;
	cp.async.wait_group 0;
	bar.sync 0;
	ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1];
	add.s32 %r2, %r2, 1;
	st.global.v4.b32 [%rd21], {%r2, %r3, %r4, %r5};
	"""


def test_threads_exchange_values(execute):
    (result,) = execute(EXCHANGE, np.zeros(64, np.uint32), threads=64, shared=256)
    np.testing.assert_array_equal(result, np.arange(64) ^ 32)


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_barrier_left_out_is_a_race(execute, make_program, left_out):
    program = make_program(EXCHANGE, threads=64)
    program = program.without(program.sites("bar.sync")[left_out])
    with pytest.raises(RaceError, match="shared memory"):
        execute(program, np.zeros(64, np.uint32), shared=256)


def test_one_warp_needs_no_barrier(execute, make_program):
    """Its lanes take each instruction together."""
    program = make_program(EXCHANGE.replace("128", "64"), threads=32)
    program = program.without(*program.sites("bar.sync"))
    (result,) = execute(program, np.zeros(32, np.uint32), shared=128)
    np.testing.assert_array_equal(result, np.arange(32) ^ 16)


def test_the_ctas_of_a_launch_have_shared_memory_of_their_own(execute):
    body = EXCHANGE.replace("add.s64 %rd20, %rd0, %rd12;", "").replace("st.global.b32 [%rd20], %r3;", "")
    body += """
	mov.u32 %r4, %ctaid.x;
	mul.wide.u32 %rd20, %r4, 256;
	add.s64 %rd20, %rd20, %rd12;
	add.s64 %rd20, %rd20, %rd0;
	add.s32 %r3, %r3, %r4;
	st.global.b32 [%rd20], %r3;
	"""
    (result,) = execute(body, np.zeros((100, 64), np.uint32), threads=64, grid=(100,), shared=256)
    np.testing.assert_array_equal(result, (np.arange(64) ^ 32) + np.arange(100)[:, None])


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("st.global.b32 [%rd0+128], %r0;", MemoryAccessError, "outside of all allocations"),
        ("ld.global.b32 %r1, [%rd0+-4];", MemoryAccessError, "outside of all allocations"),
        ("ld.global.b32 %r1, [%rd0+2];", MemoryAccessError, "misaligned access of 4 bytes to global"),
        ("ld.global.v2.b32 {%r1, %r2}, [%rd0+4];", MemoryAccessError, "misaligned access of 8 bytes to global"),
        ("mov.b32 %r1, 64; ld.shared.b32 %r2, [%r1];", MemoryAccessError, "shared memory out of bounds"),
        ("mov.b32 %r1, 2; ld.shared.b32 %r2, [%r1];", MemoryAccessError, "misaligned access of 4 bytes to shared"),
        ("add.s32 %r1, %r0, %r2;", UnwrittenRegisterError, "%r2 is read before it is written"),
        ("@%p1 bra $L; $L:", UnwrittenRegisterError, "%p1 is read before it is written"),
        ("st.global.b32 [%rd0], %r0;", RaceError, "different values to one place"),
        ("setp.lt.u32 %p1, %r0, 5; @%p1 bra $L; bar.sync 0; $L:", ConvergenceError, "barrier"),
        (
            "setp.lt.u32 %p1, %r0, 5; @%p1 bra $L; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; $L:",
            ConvergenceError,
            "not every lane of a warp",
        ),
    ],
)
def test_faults_are_reported(execute, body, error, message):
    with pytest.raises(error, match=message):
        execute(body, np.zeros(32, np.uint32), shared=64)


def test_an_error_names_the_instruction_and_its_source(execute):
    body = "	.loc	1 85 0                          // log_bessel.py:85:0\n\tld.global.b32 %r1, [%rd0+2];"
    with pytest.raises(ExecutionError, match=r"instruction \d+ of log_bessel.py:85:0: ld.global.b32 %r1, \[%rd0\+2\]"):
        execute(body, np.zeros(32, np.uint32))


@pytest.mark.parametrize("access", ["ld.global.b32 %r2, [%rd0];", "st.global.b32 [%rd0], 7;"])
def test_ctas_do_not_touch_what_another_one_stores(execute, access):
    body = f"""
	mov.u32 %r1, %ctaid.x;
	setp.eq.u32 %p1, %r1, 0;
	@%p1 st.global.b32 [%rd0], 7;
	@!%p1 {access}
	"""
    with pytest.raises(RaceError, match="global memory"):
        execute(body, np.zeros(1, np.uint32), grid=(2,))
    execute(body, np.zeros(1, np.uint32), grid=(1,))


def test_asynchronous_copies(execute):
    values = np.arange(128, dtype=np.uint32)
    (result,) = execute(COPY, values.copy(), shared=512)
    np.testing.assert_array_equal(result, values + (values % 4 == 0))
    zeros = COPY.replace("[%rd21], 16;", "[%rd21], 16, 0;")
    (result,) = execute(zeros, values.copy(), shared=512)
    np.testing.assert_array_equal(result, values % 4 == 0)


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;"])
def test_copies_are_waited_for(execute, wait):
    with pytest.raises(RaceError, match="was not waited for"):
        execute(COPY.replace("cp.async.wait_group 0;", wait), np.zeros(128, np.uint32), shared=512)


def test_a_copy_that_nobody_waits_for(execute):
    body = "\n".join(COPY.splitlines()[:5])
    with pytest.raises(RaceError, match="ends with copies that were not waited for"):
        execute(body, np.zeros(128, np.uint32), shared=512)


@pytest.mark.parametrize("space", ["shared", "global"])
def test_atomic_additions(execute, space):
    """Each thread counts a number modulo 5; the old values that they get are those of one thread after another."""
    base = "mov.b64 %rd20, 0; mov.b32 %r3, 0;" if space == "shared" else ""
    place = "[%r2]" if space == "shared" else "[%rd22]"
    body = f"""
	{base}
	rem.u32 %r1, %r0, 5;
	shl.b32 %r2, %r1, 2;
	cvt.u64.u32 %rd21, %r2;
	add.s64 %rd22, %rd0, %rd21;
	setp.lt.u32 %p1, %r0, 5;
	shl.b32 %r5, %r0, 2;
	{"@%p1 st.shared.b32 [%r5], 0;" if space == "shared" else ""}
	bar.sync 0;
	atom.{space}.add.u32 %r4, {place}, 1;
	bar.sync 0;
	{"@%p1 ld.shared.b32 %r6, [%r5];" if space == "shared" else ""}
	add.s64 %rd23, %rd0, %rd12;
	{"@%p1 st.global.b32 [%rd23], %r6;" if space == "shared" else ""}
	add.s64 %rd24, %rd1, %rd12;
	st.global.b32 [%rd24], %r4;
	"""
    counts, old = execute(body, np.zeros(5, np.uint32), np.zeros(64, np.uint32), threads=64, shared=64)
    expected = np.bincount(np.arange(64) % 5)
    np.testing.assert_array_equal(counts, expected)
    for k, count in enumerate(expected):
        assert sorted(old[np.arange(64) % 5 == k]) == list(range(count))
