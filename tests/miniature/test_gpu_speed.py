"""What makes the trainings fast or clear on a GPU changes nothing where it cannot help."""

import pytest
import torch
from torch import nn

from miniature.base import compile_if_faster
from miniature.drawing import face_place, photo, silhouette
from miniature.people import SPLITS, sample_context, sample_person
from miniature.vae import face_weights, reconstruction_loss


class Small(nn.Module):
    """A "base" whose "UNet" is a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.Linear(2, 2)
        self.register_buffer("rows", torch.arange(3))

    def loss(self) -> torch.Tensor:
        return self.unet(torch.ones(1, 2)).sum()


def test_a_unet_that_cannot_be_compiled_is_used_as_it_is(monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("no compiler")

    base = Small()
    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(base.unet, "compile", fail)
    assert "not compiled: RuntimeError: no compiler" in compile_if_faster(base, base.loss)
    assert base.unet.weight.grad is None and base.loss().isfinite()


def test_a_compiled_unet_that_is_no_faster_is_taken_back(monkeypatch):
    base, times = Small(), iter([0.0, 1.0, 0.0, 9.0])
    monkeypatch.setattr("miniature.base.time.perf_counter", lambda: next(times))
    monkeypatch.setattr(base.unet, "compile", lambda: setattr(base.unet, "_compiled_call_impl", base.unet._call_impl))
    assert compile_if_faster(base, base.loss, steps=1) == "1.000 s a step, compiled 9.000 s"
    assert base.unet._compiled_call_impl is None


def test_errors_on_a_face_count_more():
    weights = face_weights(128)
    assert weights.mean() == pytest.approx(1) and weights[0, 0, 64, 64] == pytest.approx(3 * float(weights[0, 0, 2, 2]))
    assert face_weights(16, 2).shape == (1, 1, 16, 32)
    picture = torch.zeros(1, 3, 128, 128)
    on, off = picture.clone(), picture.clone()
    on[..., 60:66, 60:66] = 0.5
    off[..., 2:8, 2:8] = 0.5
    assert reconstruction_loss(on, picture, weights) == pytest.approx(
        3 * float(reconstruction_loss(off, picture, weights)), rel=0.01
    )


def test_faces_are_where_they_are_said_to_be():
    place = face_place() > 0
    for seed in SPLITS["dev"][:10]:
        person, context = sample_person(seed), sample_context(seed, "photo")
        assert (silhouette(person, context)[place] > 0).mean() > 0.95


def test_a_silhouette_is_where_background_does_not_show():
    seed = SPLITS["dev"][0]
    person, context = sample_person(seed), sample_context(seed, "photo")
    pictures = [
        photo(person, context.__class__(**{**vars(context), "background": wall}))
        for wall in ("white wall", "green wall")
    ]
    differs = (pictures[0] != pictures[1]).any(-1)
    shape = silhouette(person, context)
    assert differs[shape == 0].all() and differs[shape == 255].mean() < 0.01
    assert 0.3 < (shape == 255).mean() < 0.8 and ((shape > 0) & (shape < 255)).mean() < 0.05
