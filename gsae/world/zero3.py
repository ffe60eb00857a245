"""Parameters split over ranks. In: modules, filled by the first rank. Out: the same modules, a share of each parameter on every rank."""

import logging
import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from torch import nn

from gsae.errors import ModelError
from gsae.world.group import Group


class Zero3:
    """Parameters of frozen modules split over all ranks: DeepSpeed's ZeRO-3, through accelerate.

    Each rank keeps a share of every parameter. A parameter is whole only while the module that owns it runs, so that a forward is a
    collective of all ranks. Must live as long as the modules are used.

    Args:
        group: all ranks of the world.
        offload: whether a share stays in the host's memory.
        whole_at_once: elements of parameters that a rank may gather ahead of their use.
        kept_whole_below: parameters of at most so many elements stay on every rank once they have been used.

    Raises:
        ModelError: DeepSpeed is missing or does not work here.
    """

    def __init__(self, group: Group, offload: bool, whole_at_once: int, kept_whole_below: int) -> None:
        zero: dict[str, Any] = {
            "stage": 3,
            "stage3_prefetch_bucket_size": whole_at_once,
            "stage3_max_live_parameters": 2 * whole_at_once,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": kept_whole_below,
            "memory_efficient_linear": False,  # it puts a function of its own in the place of torch's, for the whole process
        }
        if offload:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        self._settings = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": group.size, "zero_optimization": zero}
        self._deepspeed = _import_deepspeed(group.device)
        self._accelerator: Accelerator | None = None

    def split(self, module: nn.Module) -> None:
        """Take each parameter's values from the first rank; leave every rank its share. All ranks call this, in the same order."""
        self._deepspeed.zero.Init(module=module, config_dict_or_path=self._settings)

    def gather_when_run(self, module: nn.Module) -> None:
        """Have the split parameters of `module` gathered around each of its forwards. All ranks call this, once."""
        AcceleratorState._reset_state()  # what an earlier model left: accelerate takes DeepSpeed's settings once a process
        plugin = DeepSpeedPlugin(hf_ds_config=self._settings, zero3_init_flag=False)
        self._accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="no")
        self._accelerator.prepare(module)
        plugin.dschf = None  # as long as this lives, transformers makes every further model a split one


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for this kind of device, without its words, and without the kernels that it would compile for collectives on CPUs."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    try:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(verbose=False)
    except Exception as error:  # a compiler, a driver or a package that it misses, each with an error of its own
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"llm.sharding 'zero3' needs DeepSpeed, which cannot be used here ({type(error).__name__}: {reason}): "
            "pip install 'deepspeed>=0.18' for this torch, or set llm.sharding: replicate"
        ) from None
    return deepspeed
