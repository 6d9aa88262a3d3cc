"""Lightning callbacks: checkpoints, predictions on disk, monitoring, sample answers."""
