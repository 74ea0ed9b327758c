"""Memory of parameters, gradients and optimiser on one rank, by arithmetic.

Bytes of tensors. Not in them: the CUDA context, workspaces of kernels, and what an allocator keeps
unused. T are the trained parameters, N the ranks, all fp32. DeepSpeed 0.19 as configured in
``cluster/deepspeed_engine.py``, measured on one rank and two:

    stage  parameters  gradients  optimiser                    buffers while gradients arrive
    0      whole       T          2 T, AdamW's moments         none
    1      whole       T          2 T/N, and T/N fp32 weights  the bucket
    2      whole       T/N        2 T/N, and T/N fp32 weights  the bucket, its copy, T/N arriving
    3      1/N         T/N        2 T/N, and T/N fp32 weights  the bucket, its copy, gathered weights
"""

from __future__ import annotations

FP32, BF16 = 4, 2
# Elements, DeepSpeed's defaults: reduce_bucket_size and stage3_max_live_parameters.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000


def state_memory(
    frozen: int, width: int, trained: int, zero_stage: int, ranks: int, gpu: bool, reference: bool
) -> dict[str, int]:
    """Bytes of parameters, gradients and optimiser on rank 0, see the module's docstring.

    Args:
        frozen: number of parameters that do not train, of ``width`` bytes each.
        trained: number of parameters that do, in fp32.
        zero_stage: DeepSpeed's; ranks: over which it shards.
        gpu: its bucket takes its whole size; on a CPU only the pages that gradients were written to.
        reference: there is a KL to the weights before training, which takes a copy if all trains.

    Returns:
        ``average`` is rank 0's exponential average; other ranks have none.
    """
    whole, share = FP32 * trained, FP32 * -(-trained // ranks)
    parameters = width * frozen + whole if zero_stage < 3 else width * -(-frozen // ranks) + share
    written = FP32 * min(trained, REDUCE_BUCKET)
    sent = written if ranks > 1 else 0
    bucket = FP32 * REDUCE_BUCKET if gpu else written
    live = min(trained, LIVE_PARAMETERS)
    gathered = FP32 * live + width * min(frozen, LIVE_PARAMETERS - live)
    buffers = (0, bucket, bucket + sent + share, bucket + written + gathered)
    return {
        "parameters": parameters + (whole if reference and not frozen else 0),
        "gradients": whole if zero_stage < 2 else share,
        "optimiser": 3 * share if zero_stage else 2 * whole,
        "average": whole,
        "buffers": buffers[zero_stage],
    }
