import json

import pytest
import torch

from scf_fast.config import BackboneConfig
from scf_fast.engine.learning_rate import LearningRate


def rates(per_epoch=10, **changes):
    c = BackboneConfig(data="d", output_dir="o", lr=1.0, epochs=4, **changes)
    schedule = LearningRate(c, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0), per_epoch)
    return [schedule.at(step) for step in range(4 * per_epoch)]


def test_schedules():
    r = rates(lr_scheduler="Polynomial", power=2.0, warmup_epochs=1.0)
    assert r[0] == pytest.approx(0.1) and r[9] == pytest.approx(1.0) and r[10] == 1.0 and r[25] == pytest.approx(0.25)
    r = rates(lr_scheduler="StepLR", step_size=2, gamma=0.5)
    assert r[:20] == [1.0] * 20 and r[20:] == [0.5] * 20
    r = rates(lr_scheduler="MultiStep", milestones=(1, 3), gamma=0.1)
    assert r[9] == 1.0 and r[10] == pytest.approx(0.1) and r[30] == pytest.approx(0.01)
    r = rates(lr_scheduler="Cosine")
    assert r[0] == 1.0 and r[20] == pytest.approx(0.5)
    assert rates(lr_scheduler="Constant") == [1.0] * 40


def test_plateau_follows_the_loss_and_resumes():
    c = BackboneConfig(data="d", output_dir="o", lr=1.0, lr_scheduler="ReduceLROnPlateau", plateau_patience=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    schedule = LearningRate(c, optimizer, 10)
    for loss in (1.0, 1.0, 1.0):
        schedule.plateau.step(loss)
    state = schedule.state_dict()
    again = LearningRate(c, optimizer, 10)
    again.load_state_dict(state)
    again.plateau.step(1.0)
    assert again.before_step(0) == 1.0
    again.plateau.step(1.0)
    assert again.before_step(0) == pytest.approx(0.1)
    fresh = LearningRate(c, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0), 10)
    fresh.load_state_dict(json.loads(json.dumps(again.state_dict())))  # as a checkpoint holds it
    assert fresh.before_step(0) == pytest.approx(0.1)
