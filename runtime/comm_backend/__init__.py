"""Collectives between ranks: implementations of `CommBackendProtocol`."""
