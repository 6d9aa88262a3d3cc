"""One engine for validation, prediction, chat and `InternVL.generate`. Stands on model/ alone."""
