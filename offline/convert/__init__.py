"""Steering vectors of other tools: read into packs, written from packs, never unpickled."""
