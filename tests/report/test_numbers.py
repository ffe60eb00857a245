import math

import pytest

from gsae.report.numbers import count, decimals, interval, percent, plain, short_count, significant

MINUS, DASH, THIN = "\u2212", "\u2013", "\u2009"


@pytest.mark.parametrize(
    ("formatter", "value", "text"),
    [
        (decimals(3), 0.31649, "0.316"),
        (decimals(3), -0.5, f"{MINUS}0.500"),
        (decimals(3, signed=True), 0.42, "+0.420"),
        (decimals(3, signed=True), -0.42, f"{MINUS}0.420"),
        (decimals(3), math.nan, "nan"),
        (significant, 4.214, "4.21"),
        (significant, 46.44, "46.4"),
        (significant, 9.996, "10.0"),
        (significant, 1312.4, "1,312"),
        (plain, 0.175, "0.175"),
        (plain, 1e-5, f"1e{MINUS}05"),
        (percent, 0.0123, f"1.2{THIN}%"),
        (percent, 0.0, f"0.0{THIN}%"),
        (percent, 0.0004, f"<0.1{THIN}%"),
        (count, 2304, "2,304"),
        (short_count, 9_999, "9,999"),
        (short_count, 300_032, f"300{THIN}k"),
        (short_count, 1_234_567, f"1.23{THIN}M"),
        (short_count, 999_999, f"1{THIN}M"),
        (short_count, 1.5e9, f"1.5{THIN}G"),
    ],
)
def test_numbers_are_written_for_reading(formatter, value, text):
    assert formatter(value) == text


@pytest.mark.parametrize("formatter", [decimals(2), significant, plain, percent, count, short_count])
def test_a_missing_number_is_a_dash(formatter):
    assert formatter(None) == DASH


def test_an_interval_names_both_ends():
    assert interval((0.938, 0.9491), decimals(3)) == f"0.938 {DASH} 0.949"
    assert interval(None, decimals(3)) == ""
