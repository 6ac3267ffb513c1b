"""What a run will cost before it is begun: memory, seconds, tokens, GPUs. Its formulas are in ``docs/plan.md``."""
