"""Names of GPUs."""

from __future__ import annotations

import pytest

from moevlm.plugins.gpu.devices import DEVICES
from moevlm.runtime.core.gpus import NAMES, gpu_text, sm_of, sms_text


@pytest.mark.parametrize(
    ("name", "sm"),
    [
        ("sm89", 89), ("sm_89", 89), ("89", 89), ("8.9", 89), ("sm120", 120), ("12.0", 120),
        ("4090", 89), ("RTX 4090", 89), ("rtx4070ti", 89), ("NVIDIA GeForce RTX 4080 SUPER", 89), ("4070 Ti Super", 89),
        ("3060", 86), ("2080ti", 75), ("GTX 1660", 75), ("5090", 120), ("5090d", 120),
        ("T4", 75), ("a100", 80), ("A10G", 86), ("RTX A6000", 86), ("L4", 89), ("l40s", 89), ("rtx 6000 ada", 89),
        ("h100", 90), ("H200", 90), ("gh200", 90), ("b200", 100), ("gb300", 103), ("RTX PRO 6000", 120),
        ("Jetson Orin", 87), ("orin", 87), ("agx-thor", 110), ("GB10", 121), ("dgx spark", 121),
    ],
)  # fmt: skip
def test_names_that_people_use(name: str, sm: int) -> None:
    assert sm_of(name) == sm


@pytest.mark.parametrize("name", ["", "sm", "rtx", "mi300", "4095", "9090", "geforce", "super", "h100x", "1080"])
def test_other_names_are_not_guessed(name: str) -> None:
    assert sm_of(name) is None


def test_every_kind_that_kernels_are_compiled_for_has_a_name() -> None:
    assert set(NAMES) == set(DEVICES)
    series = ("RTX 20", "GTX 16", "RTX 30", "RTX 40", "RTX 50", "Quadro RTX")
    for sm, names in NAMES.items():
        assert [name for name in names if name not in series and sm_of(name) != sm] == []


def test_texts() -> None:
    assert gpu_text(90) == "sm90 (H100, H200, GH200)"
    assert gpu_text(70) == "sm70"
    assert sms_text((89, 86)) == "sm86, sm89"
    assert sms_text((120, 86), " or ") == "sm86 or sm120"
    assert sms_text(()) == "none"
