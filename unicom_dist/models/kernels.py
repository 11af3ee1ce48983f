"""Puts the chosen kernels into a model."""

from torch import nn

from unicom_dist.models import functions
from unicom_dist.models.layers import RMSNorm
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.parallel.kernels import Kernels, apex_rms_norm


def use(module: nn.Module, kernels: Kernels) -> None:
    """From here on `module` computes with `kernels`; compiled functions serve the whole process."""
    if kernels.fused_norm:
        for norm in module.modules():
            if isinstance(norm, RMSNorm):
                norm.normalise = apex_rms_norm
    if isinstance(module, Transfusion):
        module.share.flex = kernels.flex_attention
    if kernels.compile:
        functions.compile_all()
