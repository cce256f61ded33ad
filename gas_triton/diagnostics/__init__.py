"""Instruments that look into the approximation: ages, errors, Lipschitz constants, bounds and the bias of gradients."""

from gas_triton.diagnostics.diagnosis import diagnose
from gas_triton.diagnostics.gradients import GradientBias
from gas_triton.diagnostics.report import Diagnosis, LayerDiagnosis, OutputDiagnosis
from gas_triton.diagnostics.statistics import Group, Summary

__all__ = ["Diagnosis", "GradientBias", "Group", "LayerDiagnosis", "OutputDiagnosis", "Summary", "diagnose"]
