"""Proof that an artefact is what it says: provenance bit by bit, parity with the oracle, one report."""
