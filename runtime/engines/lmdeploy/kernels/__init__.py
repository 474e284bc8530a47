"""Attention kernels of `sagellm_ir.runtime.accel` inside LMDeploy."""
