"""HyperDreamBooth in plain PyTorch: LiDB persons, their bases, files, adapters and the fast fine-tune."""
