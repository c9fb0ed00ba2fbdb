"""The trainer of the miniature's models: it learns, resumes, reads losses seldom, and keeps nothing that is spoiled."""

import pytest
import torch
from torch import nn

from miniature.training import LOG_EVERY, Length, Trainer, load_average, to_device

HUNDRED = Length(steps=100)


def trainer(folder, length: Length = HUNDRED, **options) -> tuple[nn.Module, Trainer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    return model, Trainer(model, folder, length=length, rate=0.02, warmup=0.01, muon=True, **options)


def loss_of(model: nn.Module) -> torch.Tensor:
    return (model(torch.ones(4, 8, dtype=model[0].weight.dtype)).float() - 3).square().mean()


@pytest.fixture
def clock(monkeypatch):
    """The trainer's clock: a list with the seconds."""
    now = [100.0]
    monkeypatch.setattr("miniature.training.time.monotonic", lambda: now[0])
    return now


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
    head, row = (tmp_path / "log.csv").read_text().splitlines()
    assert head == "step,loss,rate,seconds,waited" and row.startswith(f"{LOG_EVERY},")


def test_a_schedule_by_the_clock_ends_on_time_with_no_rate(tmp_path, clock):
    model, one = trainer(tmp_path, Length(minutes=2))
    clock[0] += 999
    assert one.running  # it takes a step at least
    clock[0] -= 999
    one.step(loss_of(model))
    rates = []
    while one.running:
        clock[0] += 1
        rates.append(one.learning_rate())
    assert len(rates) == 120
    assert max(rates) == pytest.approx(0.02, rel=0.01) and rates.index(max(rates)) < 4
    assert rates[59] == pytest.approx(0.01) and rates[-1] < 1e-5


def test_the_clock_goes_on_where_it_was_stopped(tmp_path, clock):
    model, one = trainer(tmp_path, Length(minutes=2))
    one.step(loss_of(model))
    clock[0] += 90
    one.save()
    clock[0] += 5000  # nobody trains
    _, other = trainer(tmp_path, Length(minutes=2))
    assert other.running and other.progress == pytest.approx(0.75)
    clock[0] += 31
    assert not other.running


def test_waiting_is_counted_and_logged(tmp_path, clock):
    model, one = trainer(tmp_path)
    for _ in range(LOG_EVERY):
        with one.waiting():
            clock[0] += 2
        one.step(loss_of(model))
    assert (tmp_path / "log.csv").read_text().splitlines()[1].endswith(f",{2.0 * LOG_EVERY}")


def test_the_average_is_shown_and_taken_away_again(tmp_path):
    saved = []
    model, one = trainer(tmp_path, save=lambda: saved.append(one.averages()["0.weight"].clone()))
    for _ in range(5):
        one.step(loss_of(model))
    before = model[0].weight.clone()
    with one.averaged():
        assert not torch.equal(model[0].weight, before)
        assert torch.equal(model[0].weight, one.averages()["0.weight"].to(one.dtype))
    assert torch.equal(model[0].weight, before)
    one.save()
    assert torch.equal(saved[0], load_average(tmp_path)["0.weight"])


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
