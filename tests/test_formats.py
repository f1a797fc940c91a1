"""The two orders of a 4-bit weight: round trips, words written out by hand, and mirrors that agree bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cases import make_scale, make_weight
from pyquant.formats import int4
from pyquant.formats.spec import QuantSpec, num_groups

SIZES = [(1, 1), (63, 65), (64, 64), (65, 63), (130, 200), (128, 1000)]
FORMAT_HEADER = Path(__file__).resolve().parents[1] / "csrc" / "format.cuh"


def signed(word: int) -> int:
    """The int32 with these 32 bits."""
    return word - (1 << 32) if word >> 31 else word


# ------------------------------------------------------------------------------------------------ portable order


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [1, 7, 8, 31, 32, 33, 100])
def test_portable_round_trip(bits, k):
    fields = torch.randint(0, 1 << bits, (5, k), dtype=torch.uint8)
    packed = int4.pack_bits(fields, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, -(-k * bits // 32))
    assert torch.equal(int4.unpack_bits(packed, bits, k), fields)


def test_portable_golden_words_4_bits():
    # the picture: k=0 in the lowest nibble; a row of 9 fields needs a second word, padded with zero bits
    fields = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9], [15, 0, 0, 0, 0, 0, 0, 15, 1]], dtype=torch.uint8)
    want = [[signed(0x87654321), 0x9], [signed(0xF000000F), 0x1]]
    assert int4.pack_bits(fields).tolist() == want


def test_portable_golden_words_3_bits():
    # an octal digit is a field; field 10 has its two low bits in word 0 (bits 30, 31) and its high bit in word 1
    fields = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 0b110, 5]], dtype=torch.uint8)
    want = [signed(0o2107654321 | 0b10 << 30), 0b1 | 5 << 1]
    assert int4.pack_bits(fields, 3).tolist() == [want]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fields_and_codes(bits):
    half = 1 << (bits - 1)
    codes = torch.arange(8 - half, 8 + half, dtype=torch.uint8)  # symmetric container codes
    fields = int4.codes_to_fields(codes, bits, symmetric=True)
    assert fields.tolist() == list(range(2 * half))
    assert torch.equal(int4.fields_to_codes(fields, bits, symmetric=True), codes)
    assert torch.equal(int4.codes_to_fields(codes, bits, symmetric=False), codes)


# ------------------------------------------------------------------------------------------------ tiled order


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_tiled_round_trip(n, k):
    codes = make_weight(n, k, -1, True, torch.float32, "cpu").codes
    qweight = int4.tile_codes(codes)
    assert tuple(qweight.shape) == int4.tiled_shape(n, k)
    assert qweight.is_contiguous()
    assert torch.equal(int4.untile_codes(qweight, n, k), codes)
    n_pad, k_pad = int4.padded_shape(n, k)
    padding = int4.untile_codes(qweight, n_pad, k_pad).int()
    padding[:n, :k] = 8
    assert (padding == 8).all(), "padding must hold code 8"


def test_tiled_golden_words():
    # thread 0, word 0 of a unit, read off the picture: rows 0 and 8, columns 0, 1, 8, 9
    codes = torch.full((64, 64), 8, dtype=torch.uint8)
    for code, (row, col) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8), (0, 1), (8, 1), (0, 9), (8, 9)], start=1):
        codes[row, col] = code
    # thread 127 = warp 3, g 7, c 3; word 3: rows 55 and 63, columns 54, 55, 62, 63
    for code, (row, col) in enumerate([(55, 54), (63, 54), (55, 62), (63, 62), (55, 55), (63, 55), (55, 63), (63, 63)]):
        codes[row, col] = code
    # thread 38 = warp 1, g 1, c 2; word 2: rows 17 and 25, columns 36, 37, 44, 45
    codes[25, 45] = 15  # j = 3, second code: the highest nibble
    codes[17, 36] = 0  # j = 0, first code: the lowest nibble
    words = int4.tile_codes(codes)[0, 0]
    assert words[0].tolist() == [signed(0x87654321), *[signed(0x88888888)] * 3]
    assert words[127].tolist() == [*[signed(0x88888888)] * 3, 0x76543210]
    assert words[38, 2] == signed(0xF8888880)
    assert (words == signed(0x88888888)).sum() == 512 - 3


def test_units_run_along_k_strip_after_strip():
    codes = torch.full((128, 192), 8, dtype=torch.uint8)
    codes[64, 128] = 1  # strip 1, unit 2, thread 0, word 0, lowest nibble
    assert int4.tile_codes(codes).flatten()[(1 * 3 + 2) * 512] == signed(0x88888881)


def test_codes_cover_every_nibble_position():
    qweight = int4.tile_codes(make_weight(64, 64, 64, True, torch.float32, "cpu").codes).flatten()
    for j in range(8):
        assert torch.equal(((qweight >> (4 * j)) & 15).unique(), torch.arange(16)), f"nibble {j}"


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_scale_round_trip(n, k, group_size):
    scale = make_scale(n, num_groups(k, group_size), torch.float32, "cpu")
    tiled = int4.tile_scale(scale, k, group_size)
    assert tuple(tiled.shape) == int4.tiled_scale_shape(n, k, group_size)
    assert torch.equal(int4.untile_scale(tiled, n, k, group_size), scale)
    assert tiled.sum().item() == pytest.approx(scale.sum().item(), rel=1e-5), "padding must be 0"  # fp32 sums reordered


def test_scale_golden_positions():
    tiled = int4.tile_scale(torch.arange(64.0)[:, None], 64, -1)[0, 0]
    # pairs (row, row + 8) of each warp's 16 rows
    assert tiled[:16].tolist() == [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    assert tiled[16:20].tolist() == [16, 24, 17, 25]
    assert tiled[-2:].tolist() == [55, 63]


@pytest.mark.parametrize(("k", "group_size"), [(10, 4), (8, 4), (5, -1), (3, 8)])
def test_expand_groups(k, group_size):
    per_group = torch.arange(float(num_groups(k, group_size)))[None]
    want = [0.0 if group_size == -1 else float(i // group_size) for i in range(k)]
    assert int4.expand_groups(per_group, k, group_size).tolist() == [want]


# ------------------------------------------------------------------------------------------------ mirrors


def tables_of_the_norm() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(word, shift) of each of the 64 x 64 codes of a unit and the position of each row's scale, by tile_codes."""
    number = torch.arange(4096).view(64, 64)  # of each code; tiled one hexadecimal digit at a time
    found = torch.zeros(512, 8, dtype=torch.int64)
    for digit in range(3):
        words = int4.tile_codes(((number >> (4 * digit)) & 15).to(torch.uint8)).flatten()
        for j in range(8):
            found[:, j] += ((words >> (4 * j)) & 15).to(torch.int64) << (4 * digit)
    place = found.flatten().argsort().view(64, 64)
    word, shift = place // 8, place % 8 * 4
    tiled = int4.tile_scale(torch.arange(64.0)[:, None], 64, -1).flatten().to(torch.int64)
    return word, shift, tiled.argsort()


def test_triton_mirror_agrees():
    """Element by element; the helpers for whole tiles are compared in test_triton_interpreter and by the gpu tests."""
    pytest.importorskip("triton")
    from pyquant.kernels import int4 as mirror

    word, shift, position = tables_of_the_norm()
    row, col = torch.arange(64)[:, None], torch.arange(64)[None, :]
    assert torch.equal(mirror.unit_word.fn(row, col), word)
    assert torch.equal(mirror.unit_shift.fn(row, col), shift)
    assert torch.equal(mirror.scale_position.fn(torch.arange(64)), position)


@pytest.mark.skipif(not FORMAT_HEADER.exists(), reason="csrc/format.cuh is not in this tree")
def test_cpp_mirror_agrees(tmp_path):
    """Compile csrc/format.cuh for the host and compare its functions with the norm."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler, "comparing the C++ mirror needs g++ (or $CXX)"
    source = tmp_path / "mirror.cpp"
    source.write_text(
        f"""#include <cstdio>
        #include "{FORMAT_HEADER}"
        static_assert(pyquant::unit_word(0, 16) == 1, "usable at compile time");
        int main() {{
            for (int row = 0; row < 64; ++row)
                for (int col = 0; col < 64; ++col)
                    std::printf("%d %d\\n", pyquant::unit_word(row, col), pyquant::unit_shift(row, col));
            for (int row = 0; row < 64; ++row) std::printf("%d 0\\n", pyquant::scale_position(row));
        }}
        """
    )
    program = tmp_path / "mirror"
    subprocess.run([compiler, "-std=c++17", "-o", program, source], check=True)
    text = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    table = torch.tensor([int(number) for number in text.split()]).view(-1, 2)
    word, shift, position = tables_of_the_norm()
    assert torch.equal(table[:4096, 0].view(64, 64), word)
    assert torch.equal(table[:4096, 1].view(64, 64), shift)
    assert torch.equal(table[4096:, 0], position)


# ------------------------------------------------------------------------------------------------ spec


def test_spec_ranges_and_json():
    spec = QuantSpec(bits=3, group_size=64, symmetric=False)
    assert (spec.qmin, spec.qmax, spec.num_groups(65)) == (0, 7, 2)
    assert (QuantSpec().qmin, QuantSpec().qmax) == (-8, 7)
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    assert QuantSpec(group_size=-1).misfit(5) is None
    assert "multiple of group_size=128" in QuantSpec().misfit(100)


@pytest.mark.parametrize(("fields", "match"), [({"bits": 9}, "bits=9"), ({"group_size": 48}, "group_size=48")])
def test_spec_refuses(fields, match):
    with pytest.raises(ValueError, match=match):
        QuantSpec(**fields)
    with pytest.raises(ValueError, match="unknown"):
        QuantSpec.from_dict({"bit": 4})
