"""Adapters by which other programs' benchmarks drive a model of this one: VLMEvalKit and lmms-eval."""
