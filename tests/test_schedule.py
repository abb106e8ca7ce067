"""The reader of libtpu's schedules, on schedules small enough to count by hand."""

import pytest

from conv_pallas.schedule import read_file, read_schedule

PIPELINED = """
     0   :  { %s1 = inlined_call_operand.hbm [shape: bf16[8,128]] }
   0x1 LB: > { %s2 = sphi 0 /* iteration index, stage = 1 */ }
   0x2   : > { %7 = sbr.rel (%p1_p0) target = $region4 }
   0x3   :  {}
   0x4 LB: >> { %s3 = sphi 0 }
   0x5   : >> { %p5_p1 = scmp.ge.s32.totalorder %s3_s3, 8 }
   0x6   : >> { %8 = sbr.rel (!%p5_p1) target = $region9 }
   0x7   : >> { %9 = vst [vmem:[#allocation4_spill] sm:$0xff] %v1 }
   0x8 PF: > { %p6_p2 = scmp.ge.s32.totalorder %s2_s2, 18 /* loop exit test */ }
   0x9   :  { %10 = sbr.rel (!%p6_p2) target = $region3 }
   0xa   :  { %11 = vsyncpa [#allocation1], 1 }
"""


def test_loops_count_with_their_trips():
    schedule = read_schedule(PIPELINED)
    # Eight trips of four bundles, and four more; 18 trips, of which 16 compute; three outside.
    assert schedule.loops == ((2, 8, 4), (1, 16, 8 * 4 + 4))
    assert schedule.bundles == 16 * (8 * 4 + 4) + 3
    assert schedule.length == 11
    assert (schedule.spills, schedule.spilled) == (1, 16 * 8)


def test_a_spill_outside_of_loops_does_not_count():
    outside = "   0xb   :  { %12 = vst [vmem:[#allocation4_spill] sm:$0xff] %v2 }\n"
    assert read_schedule(PIPELINED + outside).spills == 1


def test_a_loop_that_can_not_be_counted_is_no_silent_zero():
    with pytest.raises(ValueError, match="no constant number of trips"):
        read_schedule(uncounted := PIPELINED.replace("%s3_s3, 8", "%s3_s3, %s4_s4"))
    loosely = read_schedule(uncounted, strict=False)
    assert (loosely.uncounted, loosely.bundles) == (1, 16 * (4 + 4) + 3)


def test_a_loop_of_one_trip():
    once = PIPELINED.replace("scmp.ge.s32.totalorder %s3_s3, 8", "pmov 1 /* constant */")
    assert read_schedule(once).loops[0] == (2, 1, 4)


def test_registers_are_those_used_or_as_many_as_were_wanted(tmp_path):
    code = """
     0   :  { %v3_v1 = vld [vmem:[%s1_s1] sm:$0xff]  ;;  %v4_v7 = vadd.f32 %v3_v1, %v2_v7 }
"""
    (file := tmp_path / "17-conv1d.1-72-final_bundles.txt").write_text(code)
    assert read_file(file).registers == read_schedule(code).registers == 2
    report = "Register pressure for vregs is 78\nlen=1681"
    (tmp_path / "17-conv1d.11-46-register-pressure.txt").write_text(report)
    assert read_file(file).registers == 2  # of another operation
    (tmp_path / "17-conv1d.1-46-register-pressure.txt").write_text(report)
    assert read_file(file).registers == 78
