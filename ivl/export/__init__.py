"""Export of a trained model: files of the folder, model card, verification, upload to a hub."""
