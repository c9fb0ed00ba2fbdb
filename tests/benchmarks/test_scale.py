"""Costs on paper: the arithmetic on round numbers, and the count on the models themselves."""

from __future__ import annotations

import pytest

from benchmarks.scale import (
    GPUS,
    Counted,
    Gpu,
    Stage,
    Workload,
    count,
    disk_bytes,
    many_photos,
    object_bytes,
    result_of,
    size,
    stages,
    text_of,
)

ROUND = Counted(
    unet=1000, unet_sdxl=8000, text=10, vae=1400, vision=400, denoise=1010, fit_step=2000, predict=20, learn=60, learn_to_see=30,
    latents=100, tokens=500, person=50, core=70, hypernet=900,
)  # fmt: skip
WORK = Workload(
    people=100,
    photos=2,
    fit_steps=10,
    times_pretrained=5,
    times_seen=8,
    batch=16,
    max_photos=2,
    max_iterations=3,
)


def test_stages():
    precompute, pretrain, train, evaluate = stages(ROUND, WORK)
    assert precompute == Stage("precompute", 1000, 1000 * 2000 + 200 * ROUND.vae, 200 * ROUND.vision)
    assert pretrain == Stage("pretrain", 500, 500 * 30, 0)
    assert WORK.steps == 50
    assert WORK.decoded == {"pretrain": 500, "train": 800 * 1.5}
    assert train == Stage("train", 800, 800 * 2000 + 800 * 2 * 60, 0)
    assert evaluate == Stage("evaluate", 4 * 2 * 6, 48 * 1010 + 2 * 2 * 6 * 20, 0)


def test_hours():
    gpu, stage = Gpu("toy", bf16=2e3, float32=1e3), Stage("any", 1, 7.2e6, 1.8e6)
    assert stage.hours(gpu, 1, 1.0) == pytest.approx(1.5)
    assert stage.hours(gpu, 8, 0.5) == pytest.approx(0.375)


def test_bytes():
    assert disk_bytes(ROUND, 10, 30) == {"latents": 6000, "fitted people": 2000, "tokens of ViT-H": 30_000}
    assert 100 < object_bytes(200) < 5000
    many = many_photos(ROUND, WORK, 3200, GPUS[0], 0.5)
    assert (many["group files"], many["full"], many["people in memory"]) == (200, 1300, 3200 * (200 + 200))
    assert many["samples a second"] == pytest.approx(8 * GPUS[0].bf16 * 0.5 / (2000 + 2 * 60))


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12 B"), (1234, "1.23 KB"), (35_200, "35.2 KB"), (9.87e9, "9.87 GB"), (6.6e12, "6.6 TB")]
)
def test_size(value, text):
    assert size(value) == text


def test_report():
    text = text_of(result_of(ROUND, WORK, 0.4, {"width": 64, "depth": 1}))
    assert "| 8 × RTX 4090 |" in text and "50 steps of 16 people" in text and "nothing here was measured" in text


def test_count():
    """On the shapes of SD 1.5; a frozen model's backward costs about as much as its forward."""
    counted = count(width=64, depth=1)
    assert counted.unet == pytest.approx(0.80e12, rel=0.02) and counted.unet_sdxl == pytest.approx(6.8e12, rel=0.02)
    assert 2 < counted.fit_step / counted.denoise < 2.3
    assert 2.5 < counted.learn / counted.predict < 3.2
    assert (counted.latents, counted.tokens, counted.person) == (4 * 64 * 64, 257 * 1280, 176 * 50)
