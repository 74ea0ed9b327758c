"""LLaDA: the masked-diffusion transformer, its tokenizer, its policy, and the embedded small ones."""
