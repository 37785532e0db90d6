"""`import matexport.hf` registers our torch classes with transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageClassification

from matexport.families.matmamba.modeling import MatMambaVisionConfig, MatMambaVisionForImageClassification

AutoConfig.register(MatMambaVisionConfig.model_type, MatMambaVisionConfig, exist_ok=True)
AutoModelForImageClassification.register(MatMambaVisionConfig, MatMambaVisionForImageClassification, exist_ok=True)

# save_pretrained then writes the code along, so that what it saves loads without matexport too
MatMambaVisionConfig.register_for_auto_class("AutoConfig")
MatMambaVisionForImageClassification.register_for_auto_class("AutoModelForImageClassification")
