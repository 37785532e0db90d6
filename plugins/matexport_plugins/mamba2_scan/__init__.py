"""Mamba2Scan: the Mamba-2 state space scan. See README.md for equations, shapes and states."""
