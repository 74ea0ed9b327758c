"""What several packages' tests need: the embedded policy and the digits recipe."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recipes.schema import Recipe
from recipes.source import load
from rollout.policies.adapters import LoraAdapter
from rollout.policies.digits import TRANSFORMER, vocabulary
from rollout.policies.wan import WanConfig
from rollout.policies.wan_conditional import WanPolicy

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_policy() -> WanPolicy:
    """The embedded digits model, all parameters trainable; treat as read-only."""
    return WanConfig().build(reference=True)


@pytest.fixture
def lora_policy() -> WanPolicy:
    """The embedded digits model with an adapter whose B is no longer zero."""
    policy = WanConfig(lora=LoraAdapter(rank=4, alpha=8)).build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="session")
def random_wan(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a Wan of random weights, of the embedded models' size, for a latent shape and words."""
    from diffusers import WanTransformer3DModel

    def make(latent_shape: list[int], words: list[list[str]]) -> Path:
        directory = tmp_path_factory.mktemp("wan")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            WanTransformer3DModel(**TRANSFORMER).save_pretrained(directory / "transformer")
        conditions = {"latent_shape": latent_shape, "vocabulary": words}
        (directory / "conditions.json").write_text(json.dumps(conditions))
        return directory

    return make


@pytest.fixture(scope="session")
def moving_digits(random_wan: Callable[..., Path]) -> Path:
    """Of the embedded video model's shape and words."""
    return random_wan([1, 4, 8, 8], vocabulary("moving-digits"))


@pytest.fixture(scope="session")
def digits_recipe() -> Callable[..., Recipe]:
    """The packaged digits recipe, small, with ``--set`` overrides."""
    small = [
        "steps=2",
        "rollout.prompts_per_step=4",
        "rollout.group_size=4",
        "rollout.batch_size=8",
        "learner.micro_batch=4",
        "evaluation.samples=20",
        "evaluation.every=2",
        "checkpoints.every=2",
        "tracking=[]",
    ]

    def make(*overrides: str) -> Recipe:
        return copy.deepcopy(load(Path("digits/flash_grpo"), Recipe, [*small, *overrides]).value)

    return make


@pytest.fixture(scope="session")
def llada_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaDA with random weights and the Sudoku tokenizer, in the released layout."""
    from rollout.policies.llada.configuration import LLaDAConfig
    from rollout.policies.llada.modeling import LLaDAModelLM
    from rollout.policies.llada.pretraining import build_tokenizer, model_sizes
    from rollout.policies.llada.tokenizer import EOS, MASK

    directory = tmp_path_factory.mktemp("llada")
    tokenizer = build_tokenizer("sudoku")
    mask, eos = (tokenizer.convert_tokens_to_ids(token) for token in (MASK, EOS))
    small = {**model_sizes("sudoku"), "d_model": 32, "n_layers": 2, "mlp_hidden_size": 64}
    config = LLaDAConfig(**small, mask_token_id=mask, eos_token_id=eos, pad_token_id=eos)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LLaDAModelLM(config)
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
