"""Architecture of a model from its config: fields, families of language models, vision towers."""
