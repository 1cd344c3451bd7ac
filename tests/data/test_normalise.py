"""Text as the corpora hold it."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost.data.normalise import normalise


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("", ""),
        (" \n\t\n", ""),
        ("a\r\nb\rc", "a\nb\nc\n"),
        ("a  \nb\t\n", "a\nb\n"),
        ("\n\na\n\n\n\nb\n\n", "a\n\nb\n"),
        ("\ufeffe\u0301", "\u00e9\n"),
        ("a\x00b\x0cc\td\x85", "abc\td\n"),
        ("  indented", "  indented\n"),
        ("\u200cX\u200d", "\u200cX\u200d\n"),  # joiners carry meaning in many scripts
    ],
)
def test_the_normal_form(raw: str, wanted: str) -> None:
    assert normalise(raw) == wanted


@given(st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from("\r\n\t \u0301\ufeff\x00")))
def test_normalising_twice_changes_nothing(raw: str) -> None:
    once = normalise(raw)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert once == "" or once.endswith("\n")
