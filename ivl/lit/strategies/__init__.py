"""Lightning strategies beyond its own: layers over devices, FSDP2, DeepSpeed's needs."""
