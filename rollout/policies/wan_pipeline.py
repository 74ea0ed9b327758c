"""Published Wan text-to-video pipelines (2.1, 2.2) as flow policies.

A directory as stock ``WanPipeline`` reads it: ``model_index.json``, ``transformer/`` (of Wan2.2 also
``transformer_2/``, with ``boundary_ratio``), ``vae/``, ``text_encoder/``, ``tokenizer/``,
``scheduler/``. The transformers train; text encoder and VAE are frozen and read when first used. With
stock's sigmas and Euler steps, samples are stock's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rollout.policies.pipelines import (
    INDEX,
    RENOISING,
    STEPPING,
    PipelinePolicy,
    pipeline_index,
    prepare_transformer,
    save_transformer,
    save_two_steps,
)
from rollout.policies.prompt_embeddings import UMT5Embeddings, shared_embeddings
from rollout.policies.wan_network import network_features, network_times, network_velocity

if TYPE_CHECKING:
    from rollout.policies.wan import WanConfig

PIPELINE = "WanPipeline"
NETWORKS = ("transformer", "transformer_2")
# Text encoder and VAE of the published sizes, by the keys of their configs; other keys are defaults.
PUBLISHED_PARTS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "d_model": 4096,
        "d_ff": 10240,
        "num_heads": 64,
        "d_kv": 64,
        "num_layers": 24,
        "vocab_size": 256384,
    },
    "vae": {"z_dim": 16},
}
PUBLISHED_CLASSES = {
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
}


def wan_index(directory: Path) -> dict[str, Any]:
    """``model_index.json`` of a text-to-video pipeline, after a look at its components.

    Raises:
        ValueError: another pipeline, or one with a component missing.
    """
    index: dict[str, Any] = json.loads((directory / INDEX).read_text())
    if index.get("expand_timesteps"):
        raise ValueError(f"{directory} is no WanPipeline of Wan 2.1 or 2.2 A14B (expand_timesteps)")
    names = network_names(index)
    found = pipeline_index(directory, PIPELINE, names)
    if len(names) > 1 and index.get("boundary_ratio") is None:
        raise ValueError(f"{directory} has two transformers and no boundary_ratio in {INDEX}")
    return found


def network_names(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The transformers that a ``model_index.json`` lists."""
    return NETWORKS if (index.get(NETWORKS[1]) or [None])[0] else NETWORKS[:1]


def latent_shape(vae: Mapping[str, Any], config: WanConfig) -> tuple[int, int, int, int]:
    """(channels, frames, height, width) of a sample in the latents of ``vae``, by its config.

    Raises:
        ValueError: frames or pixels that its compression does not divide.
    """
    time, space = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    if (config.frames - 1) % time or config.height % (2 * space) or config.width % (2 * space):
        raise ValueError(
            f"{config.frames} frames of {config.width} x {config.height} do not fit {config.checkpoint}: "
            f"frames must be 1 more than a multiple of {time}, width and height multiples of {2 * space}"
        )
    frames = (config.frames - 1) // time + 1
    return vae["z_dim"], frames, config.height // space, config.width // space


class _Two(nn.ModuleDict):
    """Wan2.2's transformers, with the switch that one has for its adapter."""

    def disable_adapters(self) -> None:
        for network in self.values():
            network.disable_adapters()  # pyright: ignore[reportCallIssue]

    def enable_adapters(self) -> None:
        for network in self.values():
            network.enable_adapters()  # pyright: ignore[reportCallIssue]


class WanPipelinePolicy(PipelinePolicy):
    """A text-to-video pipeline.

    Attributes:
        whole_timesteps: the network is fed ``floor(1000 t)``, as the published scheduler does; with an
            Euler or LCM scheduler stock feeds it ``1000 t``.
        boundary: of two transformers, the first serves timesteps from here up, the second below.
    """

    pipeline = PIPELINE

    def __init__(
        self, config: WanConfig, directory: Path, device: str, seed: int, reference: bool
    ) -> None:
        from diffusers import WanTransformer3DModel

        index = wan_index(directory)
        self.config, self.negative_prompt = config, config.negative_prompt
        self.whole_timesteps = index["scheduler"][1] not in (STEPPING, RENOISING)
        self.boundary: float = 1000 * (index.get("boundary_ratio") or 0.0)
        vae = json.loads((directory / "vae" / "config.json").read_text())
        self.latent_shape = latent_shape(vae, config)
        networks: dict[str, Any] = {}
        for offset, name in enumerate(network_names(index)):
            network: Any = WanTransformer3DModel.from_pretrained(
                directory / name, use_safetensors=True
            )
            networks[name] = prepare_transformer(network, config, seed + offset)
        first = networks["transformer"]
        module: Any = first if len(networks) == 1 else _Two(networks)
        embeddings = shared_embeddings(
            UMT5Embeddings, directory.resolve(), config.dtype, torch.device(device)
        )
        adapted = config.lora is not None
        super().__init__(directory, index, module.to(device), embeddings, adapted, reference)
        self.blocks = len(first.blocks)
        self.width = first.config["num_attention_heads"] * first.config["attention_head_dim"]

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """See ``FlowPolicy``; of two transformers, rows go to their noise level's.

        All that trains is then part of the graph, whichever rows there are, and gets its gradient
        after the networks' backward pass, in one order: ZeRO adds up what ranks send in their order.
        """
        times = network_times(t, self.whole_timesteps)
        nothing: Tensor | None = None
        if isinstance(self.module, _Two) and torch.is_grad_enabled():
            # Made before the forward, so that autograd comes to it last.
            trained = [p.sum() for p in self.network.parameters() if p.requires_grad]
            nothing = 0.0 * torch.stack(trained).sum() if trained else None

        def run(network: Any, rows: Any) -> Tensor:
            return network_velocity(
                network, x[rows], times[rows], condition[rows], self.config.dtype
            )

        velocity = self._routed(times, run)
        return velocity if nothing is None else velocity + nothing

    def features(
        self, x: Tensor, t: Tensor, condition: Tensor, layers: Sequence[int]
    ) -> list[Tensor]:
        """See ``FlowPolicy``; one place a patch, of two transformers the rows' own."""
        times = network_times(t, self.whole_timesteps)

        def run(network: Any, rows: Any) -> Tensor:
            own = x[rows], times[rows], condition[rows], self.config.dtype
            found = network_features(
                network, own[0], layers, lambda: network_velocity(network, *own)
            )
            return torch.stack(found, 1)

        return list(self._routed(times, run).unbind(1))

    def _routed(self, times: Tensor, run: Callable[[Any, Any], Tensor]) -> Tensor:
        """``run(network, rows)`` of each network on its rows, in their order."""
        if not isinstance(self.module, _Two):
            return run(self.network, slice(None))
        high = times >= self.boundary
        found = [
            (rows, run(self.network[name], rows))
            for name, rows in zip(NETWORKS, (high, ~high), strict=True)
            if rows.any()
        ]
        order = torch.cat([rows.nonzero()[:, 0] for rows, _ in found]).argsort()
        return torch.cat([values for _, values in found])[order]

    @cached_property
    def _vae(self) -> Any:
        """In fp32, as published; decoded one sample and one tile (of 256 pixels) at a time."""
        from diffusers import AutoencoderKLWan

        vae: Any = AutoencoderKLWan.from_pretrained(self.directory / "vae", use_safetensors=True)
        vae.enable_slicing()
        vae.enable_tiling()
        return vae.eval().requires_grad_(False).to(self.device)

    def pixels(self, x: Tensor) -> Tensor:
        """See ``FlowPolicy``; tiles of a larger frame are blended, which stock does when asked to."""
        shape = (1, -1, 1, 1, 1)
        mean, std = (
            torch.tensor(self._vae.config[key], device=x.device).view(shape)
            for key in ("latents_mean", "latents_std")
        )
        video = self._vae.decode(x.float() / (1.0 / std) + mean, return_dict=False)[0]
        return (video / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)

    def save(
        self, directory: Path, weights: Mapping[str, Tensor], name: str = "transformer"
    ) -> None:
        """See ``PipelinePolicy``.

        The adapter of a second transformer is in ``transformer_2/``, for ``load_lora_weights(directory
        / "transformer_2", load_into_transformer_2=True)``.
        """
        if not isinstance(self.module, _Two):
            return super().save(directory, weights, name)
        directory.mkdir(parents=True, exist_ok=True)
        for network in NETWORKS:
            start = f"{network}."
            own = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
            aside = self._adapted and network != "transformer"
            place = directory / network if aside else directory
            save_transformer(
                self.module[network], own, place, self.pipeline, self._adapted, network
            )
        if not self._adapted:
            self.link_components(directory)

    def save_pipeline(
        self,
        directory: Path,
        sigma: float,
        boundary: float,
        networks: Sequence[str],
        renoise: bool,
    ) -> None:
        """Make saved ``networks`` a two-step pipeline, see ``WanPolicy.save_pipeline``."""
        two = len(networks) > 1
        parts = {
            "transformer_2": ["diffusers", "WanTransformer3DModel"] if two else [None, None],
            "boundary_ratio": boundary if two else None,
        }
        save_two_steps(directory, sigma, renoise, self.index | parts)
