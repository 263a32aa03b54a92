"""Figures of GPUs that people have."""

from moevlm.runtime.core.gpu_models import GPU_MODELS
from moevlm.runtime.core.gpus import sm_of


def test_models_are_of_the_kinds_that_their_names_mean() -> None:
    for model in GPU_MODELS:
        assert sm_of(model.name.removesuffix(" 40GB").removesuffix(" 80GB").removesuffix(" 64GB")) == model.sm, model
    assert len({model.name for model in GPU_MODELS}) == len(GPU_MODELS)


def test_figures_are_in_bytes() -> None:
    for model in GPU_MODELS:
        assert 10e9 < model.memory < 200e9, model
        assert 200e9 <= model.bandwidth <= 8e12, model
        assert model.link == 0 or 9 * model.link < model.bandwidth < 150 * model.link, model
