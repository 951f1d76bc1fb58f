"""The engine on megatron.core: tensor, pipeline, data and context parallelism."""
