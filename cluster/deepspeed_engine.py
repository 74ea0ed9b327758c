"""The DeepSpeed engine of one learner rank; the only file that imports deepspeed.

Gradients are fp32 at every stage (reduced precision is the policy's autocast), so trained weights
have one fp32 truth: the module's at stages 0-2, the partitions at stage 3.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cluster.engine import MOMENTS, Wrapped, adamw
from recipes.schema import LearnerConfig, OptimizerConfig


def join_group(rank: int, ranks: int, address: str, port: int, gpu: bool) -> None:
    """Join the process group; the environment must be set before deepspeed is imported."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Its shared-memory all-reduce compiles for half a minute at start-up, and a compile that was
    # killed leaves a lock on which every later start hangs; gloo does the work.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", verbose=False)


class DeepSpeedEngine:
    """ZeRO 0-3 around a module. See ``cluster.engine.Engine``."""

    def __init__(self, module: Wrapped, optimizer: OptimizerConfig, learner: LearnerConfig) -> None:
        import deepspeed

        self.stage, self.ranks = learner.zero_stage, learner.ranks
        self.names = [n for n, p in module.network.named_parameters() if p.requires_grad]
        trained = [p for p in module.network.parameters() if p.requires_grad]
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(
            model=cast(nn.Module, module),
            optimizer=adamw(trained, optimizer),
            config={
                "train_micro_batch_size_per_gpu": learner.micro_batch,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": optimizer.clip_norm,
                "zero_optimization": {"stage": learner.zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )
        self.parameters = {
            n: p for n, p in self.engine.module.network.named_parameters() if n in set(self.names)
        }

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """See ``Engine``."""
        return self.engine(*inputs, **options)

    def apply(self, *inputs: Any) -> Any:
        """See ``Engine``. Past the engine: it would await a backward of its own."""
        return self.engine.module(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See ``Engine``. DeepSpeed averages over ranks, hence the factor."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.ranks)

    def step(self, learning_rate: float) -> float:
        """See ``Engine``."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # Stage 0 clips without keeping the norm; its gradients are whole and already averaged.
        gradients = [p.grad for p in self.parameters.values()] if self.stage == 0 else []
        norm = nn.utils.get_total_norm(gradients)
        self.engine.step()
        return float(norm if self.stage == 0 else self.engine.get_global_grad_norm())

    def weights(self) -> dict[str, Tensor]:
        """See ``Engine``."""
        if self.stage < 3:
            return {name: p.detach() for name, p in self.parameters.items()}
        from deepspeed.utils import safe_get_full_fp32_param

        gather: Any = safe_get_full_fp32_param
        return {name: gather(p) for name, p in self.parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        """See ``Engine``."""
        moments: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for key in MOMENTS:
                value = self._moment(parameter, key)
                if value is not None:
                    moments[f"{name}.{key}"] = value
        return moments

    def _moment(self, parameter: Any, key: str) -> Tensor | None:
        if self.stage == 0:
            return self._base_optimizer().state.get(parameter, {}).get(key)
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self._base_optimizer().state:
            return None
        return safe_get_full_optimizer_state(parameter, key)

    def _base_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.engine.optimizer
        return optimizer if self.stage == 0 else optimizer.optimizer

    @torch.no_grad()
    def restore(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], steps: int
    ) -> None:
        """See ``Engine``. Sets the fp32 partitions *and* the module: the forward uses the latter."""
        for name, parameter in self.parameters.items():
            self._set_weight(parameter, weights[name])
            for key in MOMENTS if moments else ():
                self._set_moment(parameter, key, moments[f"{name}.{key}"])
        if moments:
            for state in self._base_optimizer().state.values():
                state["step"] = torch.tensor(float(steps))

    def _set_weight(self, parameter: Any, value: Tensor) -> None:
        value = value.to(parameter.device, torch.float32)
        if self.stage == 0:
            parameter.copy_(value)
            return
        if self.stage < 3:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)
            return
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, self._own_part(parameter, value))
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)

    def _set_moment(self, parameter: Any, key: str, value: Tensor) -> None:
        if self.stage == 0:
            state = self._base_optimizer().state[parameter]
            state[key] = value.clone().to(parameter)
            return
        value = value.to(parameter.device)
        if self.stage < 3:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(parameter, value, key)
            return
        from deepspeed.utils import safe_set_local_optimizer_state

        safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), key)

    def _own_part(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's partition of a whole tensor at stage 3, zeros behind its end.

        DeepSpeed's ``safe_set_full_*`` fail there where the ranks do not divide the elements.
        """
        size = parameter.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, size * self.ranks - value.numel()))
        return padded.narrow(0, size * self.engine.global_rank, size)
