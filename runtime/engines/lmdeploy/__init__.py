"""LMDeploy's PyTorch engine, patched so that our plans drive it."""
