"""Inference engine of validation, prediction, chat and `InternVL.generate`. Built on model/ alone."""
