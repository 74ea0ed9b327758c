"""What whitening costs: seconds of ``whiten`` against one forward of the policy it guides.

    python benchmarks/whitening.py [--device cpu] [--repeats 1]

The latent is that of a Wan 2.1 1.3B video, (1, 16, 21, 60, 104). Two gradients: amplitude 1/f, which
is what images have, and a random walk in the plane, steep enough to use all passes of the projection.
On a GPU the forward is the whole transformer in bfloat16. On a CPU that takes most of an hour: one
block of the same class is timed in fp32 at fewer frames, a + b n + c n^2 is fitted to the tokens n,
and the forward is said to be its layers times the fit at full length.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import torch

from rollout.guidance.whitening import Operator, WhiteningConfig, whiten
from rollout.policies.wan import PUBLISHED

SIZES = PUBLISHED["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
LATENT = (16, 21, 60, 104)
TEXT_TOKENS = 512
# Frames of the latent at which a block is timed; 1,560 tokens each.
FRAMES = (1, 2, 3, 4, 6)


def gradients(device: torch.device) -> dict[str, torch.Tensor]:
    """Two gradients (1, ...) of the latent's shape."""
    noise = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(0)).to(device)
    axes = [torch.fft.fftfreq(n, device=device) for n in LATENT[1:]]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)
    radius[0, 0, 0] = 1 / max(LATENT[1:])
    spectrum = torch.fft.fftn(noise, dim=(2, 3, 4)) / radius
    smooth = torch.fft.ifftn(spectrum, dim=(2, 3, 4)).real
    return {"1/f": smooth, "walk": noise.cumsum(-1).cumsum(-2)}


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of ``work`` after one call that is not counted."""
    taken: list[float] = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def transformer(layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    """The published architecture with random weights and so many layers."""
    from diffusers import WanTransformer3DModel

    with device:
        sizes: dict[str, Any] = SIZES | {"num_layers": layers}
        network: Any = WanTransformer3DModel(**sizes)
    return network.to(dtype).eval()


def forward(network: Any, frames: int, device: torch.device, dtype: torch.dtype) -> None:
    """One forward of a latent of so many frames."""
    _, _, height, width = LATENT
    with torch.no_grad():
        network(
            hidden_states=torch.zeros(
                1, LATENT[0], frames, height, width, device=device, dtype=dtype
            ),
            timestep=torch.full((1,), 500.0, device=device),
            encoder_hidden_states=torch.zeros(
                1, TEXT_TOKENS, SIZES["text_dim"], device=device, dtype=dtype
            ),
        )


def forward_extrapolated(device: torch.device) -> float:
    """Seconds of a forward from one block at a few lengths, in fp32."""
    network = transformer(1, device, torch.float32)
    started: list[float] = []
    block: list[float] = []
    network.blocks[0].register_forward_pre_hook(
        lambda module, inputs: started.append(time.perf_counter())
    )
    network.blocks[0].register_forward_hook(
        lambda module, inputs, output: block.append(time.perf_counter() - started[-1])
    )
    forward(network, 1, device, torch.float32)
    block.clear()
    per_frame = LATENT[2] * LATENT[3] // 4
    for frames in FRAMES:
        forward(network, frames, device, torch.float32)
        print(f"one block at {frames * per_frame} tokens: {block[-1]:.2f} s", flush=True)
    fit = np.polynomial.Polynomial.fit([f * per_frame for f in FRAMES], block, 2)
    full = float(fit(LATENT[1] * per_frame))
    print(f"EXTRAPOLATED to {LATENT[1] * per_frame} tokens: {full:.0f} s a block")
    return full * SIZES["num_layers"]


def forward_whole(device: torch.device, repeats: int) -> float:
    """Seconds of a forward of the whole network in bfloat16."""
    network = transformer(SIZES["num_layers"], device, torch.bfloat16)
    return seconds(lambda: forward(network, LATENT[1], device, torch.bfloat16), device, repeats)


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description="What whitening costs.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    whole = device.type == "cuda"
    policy = forward_whole(device, options.repeats) if whole else forward_extrapolated(device)
    how = "bfloat16, measured" if whole else "fp32, EXTRAPOLATED from one block"
    print(f"one forward of {LATENT} on {device}: {policy:.3g} s ({how})\n")
    print("| operator | gradient | seconds | share of a forward |\n|---|---|---|---|")
    for name, gradient in gradients(device).items():
        for operator in get_args(Operator):
            config = WhiteningConfig(operator=operator)

            def work(g: torch.Tensor = gradient, c: WhiteningConfig = config) -> None:
                whiten(g, c)

            taken = seconds(work, device, options.repeats)
            share = 100 * taken / policy
            print(f"| {operator} | {name} | {taken:.3f} | {share:.2f} % |", flush=True)


if __name__ == "__main__":
    main()
