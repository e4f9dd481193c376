"""The default model (weights and model card); built archives land here too."""
