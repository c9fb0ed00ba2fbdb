"""The trainer of the miniature's models: it learns, resumes, reads losses seldom, and keeps nothing that is spoiled."""

import pytest
import torch
from torch import nn

from miniature.training import LOG_EVERY, Trainer, load_average, to_device


def trainer(folder, steps: int = 100) -> tuple[nn.Module, Trainer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    return model, Trainer(model, folder, steps=steps, rate=0.02, warmup=1, muon=True)


def loss_of(model: nn.Module) -> torch.Tensor:
    return (model(torch.ones(4, 8, dtype=torch.bfloat16)).float() - 3).square().mean()


def test_it_learns_and_goes_on_from_its_file(tmp_path):
    model, one = trainer(tmp_path)
    first = loss_of(model).item()
    for _ in range(LOG_EVERY):
        one.step(loss_of(model))
    one.save()
    assert loss_of(model).item() < 0.8 * first
    again, other = trainer(tmp_path)
    assert other.step_count == LOG_EVERY
    assert torch.equal(again[0].weight, model[0].weight)
    assert load_average(tmp_path)["0.weight"].device.type == "cpu"
    assert (tmp_path / "log.csv").read_text().startswith(f"{LOG_EVERY},")


def test_a_loss_is_read_only_when_it_is_logged(tmp_path, monkeypatch):
    model, one = trainer(tmp_path)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a step waits for the device"))
    for _ in range(LOG_EVERY - 1):
        one.step(loss_of(model))
    assert not (tmp_path / "log.csv").exists()


def test_a_spoiled_state_is_not_written(tmp_path):
    model, one = trainer(tmp_path)
    one.step(loss_of(model))
    one.save()
    before = (tmp_path / "state.pt").read_bytes()
    one.step(loss_of(model))
    one.step(loss_of(model) * float("nan"))
    with pytest.raises(RuntimeError, match=r"loss is nan at step 2.*lower --rate"):
        one.save()
    assert (tmp_path / "state.pt").read_bytes() == before


def test_a_tensor_that_is_there_stays(tmp_path):
    tensor = torch.ones(2)
    assert to_device(tensor, "cpu") is tensor
