"""Runtimes: each module runs one kind of artefact behind the same call, inputs by name to outputs by name."""
