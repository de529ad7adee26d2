"""Reading the published checkpoints of hybrid-model-factory (awslabs; `model_type` "hybrid_qwen3")."""
