"""`import matexport.hf` registers our torch classes with transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageClassification

from matexport.families.matmamba.modeling import MatMambaVisionConfig, MatMambaVisionForImageClassification

AutoConfig.register(MatMambaVisionConfig.model_type, MatMambaVisionConfig, exist_ok=True)
AutoModelForImageClassification.register(MatMambaVisionConfig, MatMambaVisionForImageClassification, exist_ok=True)
