"""`import matexport.hf` registers our torch classes with transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from matexport.families.matmamba.modeling import (
    MatMambaConfig,
    MatMambaForCausalLM,
    MatMambaVisionConfig,
    MatMambaVisionForImageClassification,
)

for config, model, auto in (
    (MatMambaConfig, MatMambaForCausalLM, AutoModelForCausalLM),
    (MatMambaVisionConfig, MatMambaVisionForImageClassification, AutoModelForImageClassification),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    auto.register(config, model, exist_ok=True)
    # save_pretrained then writes the code along, so that what it saves loads without matexport too
    config.register_for_auto_class("AutoConfig")
    model.register_for_auto_class(auto.__name__)
