"""The command line: `sagellm-ir ...`, and the same commands as `sage infer ...` inside SAGE."""
